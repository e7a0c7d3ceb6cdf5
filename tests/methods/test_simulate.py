"""The simulator against independent numbers: direct sums, counting statistics, and tilt series of another simulator."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import phantom, simulate
from libemc.methods.postprocess import resample
from libemc.methods.simulate import Acquisition, Imaging, Scene, Specimen
from libemc.numerics import filters, grids
from libemc.numerics.ctf import Optics

PIXEL = 6.0
PLAIN = Specimen(particles=1, spacing=250.0, thickness=500.0, motion=0.0, ice=0.0)
THREE = Acquisition((-40.0, 0.0, 30.0), (2, 0, 1), dose=4.0, axis=-77.0, xtilt=3.0, drift=40.0)


@functools.lru_cache(maxsize=2)
def density() -> Tensor:
    return phantom.density(phantom.particle(), 54, PIXEL)


def scene(
    specimen: Specimen = PLAIN, acquisition: Acquisition = THREE, imaging: Imaging | None = None, **more: Any
) -> Scene:
    settings: dict[str, Any] = {"shape": (96, 110), "pixel_size": PIXEL, "seed": 3} | more
    return simulate.lay_out(acquisition, imaging or Imaging(defocus_jitter=100.0), specimen, **settings)


def images(of: Scene, maps: list[Tensor] | None = None, noise: bool = False) -> np.ndarray:
    return np.stack(list(simulate.tilt_images(of, maps or [density()], noise=noise)))


def matrix(axis: float, tilt: float, xtilt: float) -> np.ndarray:
    """Convention 5, written out again."""
    (a, b, c), (s, t, u) = (f(np.deg2rad([axis, tilt, xtilt])) for f in (np.cos, np.sin))
    about_z, about_y = np.array([[a, -s, 0], [s, a, 0], [0, 0, 1]]), np.array([[b, 0, t], [0, 1, 0], [-t, 0, b]])
    return about_z @ about_y @ np.array([[1, 0, 0], [0, c, -u], [0, u, c]])


# ------------------------------------------------------------------------------------------------------- one particle


@pytest.mark.parametrize(
    ("hand", "shape", "beam"),
    [(-1, (150, 160), (0.0, 0.0)), (1, (151, 161), (-40.0, 0.0)), (-1, (150, 160), (20.0, 45.0))],
)
def test_one_particle_is_what_the_conventions_say(hand: int, shape: tuple[int, int], beam: tuple[float, float]) -> None:
    """Expected counts against a direct sum over the pseudo-atoms, with CTF, dose and contrast written out from the papers.

    The beam's tilt is one that is seen at 12 Å; RELION adds Cs λ² k² (k·tilt) turns to be rid of it.

    The particle lies 300 Å above the tilt axis, so that a wrong hand is seen.
    """
    optics = Optics(300.0, 2.7, 0.1)
    imaging = Imaging(optics, 20000.0, 100.0, 1500.0, 25.0, 30.0, hand, beam_tilt=beam)
    whole = phantom.particle()
    few = np.arange(0, len(whole.weights), 97)
    atoms = dataclasses.replace(
        whole, positions=whole.positions[few], weights=whole.weights[few], widths=whole.widths[few]
    )
    here = dataclasses.replace(
        scene(
            dataclasses.replace(PLAIN, thickness=4000.0), dataclasses.replace(THREE, drift=5.0), imaging, shape=shape
        ),
        positions=np.array([[60.0, -40.0, 300.0]]),
    )
    truth = here.truth()
    got = images(here, [phantom.density(atoms, 54, PIXEL)])
    n_y, n_x = shape
    ky, kx = np.meshgrid(np.fft.fftfreq(n_y, PIXEL), np.fft.fftfreq(n_x, PIXEL), indexing="ij")
    inside = np.hypot(kx, ky) < 0.5 / PIXEL * 0.95
    for j in range(3):
        turn = matrix(truth["axis"][j], truth["tilt"][j], truth["xtilt"]) @ truth["poses"][0]
        k = np.stack([kx[inside], ky[inside], 0 * kx[inside]], axis=1) @ turn
        particle = np.zeros((n_y, n_x), complex)
        particle[inside] = phantom.spectrum(atoms, torch.from_numpy(k)).numpy()
        height = (matrix(truth["axis"][j], truth["tilt"][j], truth["xtilt"]) @ truth["pos_A"][0])[2]
        wave, k2 = 0.0196875, kx**2 + ky**2  # Å at 300 kV
        z = truth["defocus"][j] + hand * height + 750.0 * np.cos(2 * (np.arctan2(ky, kx) - math.radians(25.0)))
        chi = np.pi * wave * z * k2 - np.pi / 2 * 2.7e7 * wave**3 * k2**2 + math.radians(30.0)
        ctf = math.sqrt(1 - 0.1**2) * np.sin(chi) + 0.1 * np.cos(chi)
        coma = -2 * np.pi * 2.7e7 * wave**2 * k2 * (kx * beam[0] + ky * beam[1]) * 1e-3
        assert np.abs(coma[inside]).max() > 1.1 or beam == (0.0, 0.0)
        dose = 4.0 * ({0: 2, 1: 0, 2: 1}[j] + 1)
        with np.errstate(divide="ignore"):
            damage = np.exp(-dose / (2 * (0.245 * np.sqrt(k2) ** -1.665 + 2.81)))
        x, y = truth["pos2d_px"][0][j]
        phase = np.exp(-2j * np.pi * PIXEL * (kx * x + ky * y) + 1j * coma)
        contrast = 2 * 6.5262e-4 * np.fft.ifft2(particle * ctf * damage * phase).real / PIXEL**2
        blank = 4.0 * PIXEL**2 * math.exp(-4000.0 / abs(matrix(0, truth["tilt"][j], truth["xtilt"])[2, 2]) / 3500.0)
        expected = (1 - contrast) * blank
        # interpolation of the slices: 2 % of a flat spectrum's rms, without bias; the band's last ring is left out
        a, b = (np.fft.fft2(image)[inside][1:] for image in (got[j].astype(float), expected))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 0.03, (j, error)
        assert (a * b.conj()).real.sum() == pytest.approx((np.abs(b) ** 2).sum(), rel=0.005)
        assert hand * (truth["particle_defocus"][0][j] - truth["defocus"][j]) == pytest.approx(height) and height > 200


def test_particles_are_dark_and_the_rest_is_even() -> None:
    image = images(scene(imaging=Imaging(phase_shift=90.0)))[1]
    x, y = np.rint(scene().truth()["pos2d_px"][0][1]).astype(int)
    assert image[y - 5 : y + 6, x - 5 : x + 6].mean() < 0.97 * np.median(image)


def test_counts_are_a_poisson_process_of_the_expected_image() -> None:
    here = scene()
    mean, counted = images(here), images(here, noise=True)
    ratio = ((counted - mean) ** 2 / mean).mean()
    assert ratio == pytest.approx(
        1.0, abs=5 * math.sqrt(2 / mean.size)
    )  # five standard errors of a mean of chi-squares
    assert (counted == np.rint(counted)).all()
    assert (images(here, noise=True) == counted).all()  # the same seed, the same image


# ----------------------------------------------------------------------------------------------------- the other effects


def test_a_plates_phase_drifts_from_exposure_to_exposure() -> None:
    """Each image of a drifting plate is that of a plate which holds the phase of its place in the order of exposure."""
    full = dataclasses.replace(PLAIN, beads=2, bead_radius=30.0, ice=1.0)
    drifting = scene(full, THREE, Imaging(defocus_jitter=0.0, phase_shift=50.0, phase_drift=30.0))
    got = images(drifting)
    for j, phase in enumerate((80.0, 50.0, 65.0)):
        constant = scene(full, THREE, Imaging(defocus_jitter=0.0, phase_shift=phase))
        assert (images(constant)[j] == got[j]).all() and drifting.truth()["phase_shift"][j] == phase
        assert (images(constant)[j - 1] != got[j - 1]).any()


def test_ice_has_its_spectrum_at_its_defocus() -> None:
    """The power of untilted, thin ice is CTF² times the structure factor, on the physical scale."""
    flat = Acquisition((0.0,), (0,), dose=4.0)
    imaging = Imaging(Optics(300.0, 2.7, 0.07), 15000.0, 0.0, 0.0, 0.0)
    thin = dataclasses.replace(PLAIN, particles=0, thickness=300.0, ice=1.0)
    pixel = 3.0
    here = simulate.lay_out(flat, imaging, thin, (512, 512), pixel, 5)
    image = images(here, [torch.zeros(16, 16, 16)])[0].astype(float)
    power = np.abs(np.fft.fft2(image / image.mean() - 1)) ** 2 / 512**2
    f = np.fft.fftfreq(512, pixel)
    k = np.hypot(f[:, None], f)
    wave = 0.0196875
    chi = np.pi * wave * 15000.0 * k**2 - np.pi / 2 * 2.7e7 * wave**3 * k**4
    ctf2 = (math.sqrt(1 - 0.07**2) * np.sin(chi) + 0.07 * np.cos(chi)) ** 2
    structure = 0.06 + 1.5 * np.exp(-((k - 0.27) ** 2) / (2 * 0.05**2))
    molecule = 4.8 / 0.0311  # V·Å³
    expected = (2 * 6.5262e-4 * molecule) ** 2 * 0.0311 * 300.0 * structure * ctf2 / pixel**2
    for low, high in ((0.02, 0.06), (0.06, 0.1), (0.1, 0.16)):
        band = (k > low) & (k < high)
        # a mean over N coefficients scatters by sqrt(2 / N) of itself, a little more with CTF² as weights: four of that
        assert power[band].mean() == pytest.approx(expected[band].mean(), rel=4 * math.sqrt(4 / band.sum()))
        assert (
            np.corrcoef(power[band], expected[band])[0, 1] > 0.25
        )  # rings: an exponential of mean CTF² scatters by itself


def test_ice_of_a_tilted_slab_is_out_of_focus_on_both_sides() -> None:
    """At 60° the two sides of the field have Thon rings of their own heights, with the sign of the hand."""
    tilted = Acquisition((60.0,), (0,), dose=4.0, axis=0.0, drift=0.0)
    thin = dataclasses.replace(PLAIN, particles=0, thickness=200.0, ice=5.0)
    f = np.fft.fftfreq(256, 4.0)
    k = np.hypot(f[:, None], f)
    band = (k > 0.03) & (k < 0.1)

    def defocus(part: np.ndarray) -> float:
        power = np.abs(np.fft.fft2(part - part.mean())) ** 2
        trials = np.arange(14000.0, 26001.0, 500.0)
        scores = [np.corrcoef(power[band], np.sin(np.pi * 0.0196875 * z * k[band] ** 2) ** 2)[0, 1] for z in trials]
        return float(trials[int(np.argmax(scores))])

    for hand in (-1, 1):
        imaging = Imaging(Optics(300.0, 0.0, 0.0), 20000.0, 0.0, 0.0, handedness=hand)
        here = simulate.lay_out(tilted, imaging, thin, (256, 768), 4.0, 6)
        image = images(here, [torch.zeros(16, 16, 16)])[0]
        # with axis 0 the tilt axis is y, and what is seen at x lies at z = -x·tan 60°; the outer thirds are 1024 Å from it
        slope = defocus(image[:, -256:]) - defocus(image[:, :256])
        assert slope == pytest.approx(
            -hand * 2 * 1024.0 * math.tan(math.radians(60)), abs=1000.0
        )  # two steps of the search


def test_thickness_and_slab_tilt_set_the_mean() -> None:
    tilts = (-50.0, 0.0, 50.0)
    here = scene(
        dataclasses.replace(PLAIN, particles=0, slab_tilt=(10.0, 0.0)), Acquisition(tilts, (2, 0, 1), drift=0.0)
    )
    means = images(here, [torch.zeros(16, 16, 16)]).mean((1, 2))
    # the slab's own 10° about y add to the stage's
    expected = [3.0 * PIXEL**2 * math.exp(-500.0 / math.cos(math.radians(t + 10.0)) / 3500.0) for t in tilts]
    assert means == pytest.approx(expected, rel=1e-5)


def test_a_slower_beam_is_stopped_earlier_and_turned_more() -> None:
    # Kirkland 2010, table 5.1: 0.00729 and 0.00653 rad/(V·nm)·10 at 200 and 300 kV
    assert simulate.interaction(200.0) == pytest.approx(7.288e-4, rel=2e-3)
    assert simulate.interaction(300.0) == pytest.approx(6.526e-4, rel=2e-3)
    assert simulate._mean_free_path(200.0) < simulate._mean_free_path(300.0) == pytest.approx(3500.0)


def test_beads_are_dark_discs_where_the_truth_says() -> None:
    gold = dataclasses.replace(PLAIN, particles=0, beads=4, thickness=600.0)
    here = scene(gold, shape=(256, 256), acquisition=dataclasses.replace(THREE, drift=5.0))
    truth, stack = here.truth(), images(here, [torch.zeros(16, 16, 16)])
    # they touch the surfaces from within
    assert np.abs(here.beads[:, 2]) == pytest.approx(600.0 / 2 - 50.0)
    y, x = np.mgrid[:256, :256]
    for j in range(3):
        seen = here.beads @ matrix(truth["axis"][j], truth["tilt"][j], truth["xtilt"]).T
        at = (seen[:, :2] + truth["shift_A"][j]) / PIXEL + 128
        for p in at:
            near = np.hypot(x - p[0], y - p[1])
            others = np.sort(np.hypot(*(at - p).T))[1]
            if others < 40 or near[20:-20, 20:-20].min() > 1:
                continue
            loss = np.clip(np.median(stack[j]) - stack[j], 0, None) * (near < 8)
            assert loss.max() > 0.5 * np.median(stack[j])
            centroid = np.array([(loss * x).sum(), (loss * y).sum()]) / loss.sum()
            assert np.abs(centroid - p).max() < 0.3  # pixels: a disc cut off at 8 pixels from a sub-pixel centre


@pytest.mark.parametrize("beam", [(60.0, -25.0), (-60.0, 25.0)])
def test_beads_have_the_phase_of_the_beams_tilt(beam: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bead so weak that the image is linear in it: its transform turns by -2π Cs λ² k² (k·tilt)."""
    monkeypatch.setattr(simulate, "GOLD_POTENTIAL", 0.1)
    monkeypatch.setattr(simulate, "GOLD_ABSORPTION", 1e9)
    gold = dataclasses.replace(PLAIN, particles=0, bead_radius=20.0)
    flat = Acquisition((0.0,), (0,), drift=0.0, axis=0.0)
    here = scene(gold, flat, Imaging(defocus_jitter=0.0, beam_tilt=beam), shape=(128, 129))
    here = dataclasses.replace(here, beads=np.array([[3.0, -5.0, 0.0]]), bead_motion=np.zeros((1, 1, 3)))
    straight = dataclasses.replace(here, imaging=dataclasses.replace(here.imaging, beam_tilt=(0.0, 0.0)))
    tilted, plain = (np.fft.fft2(simulate._Camera(s, []).beads(0).double().numpy() - 1) for s in (here, straight))
    ky, kx = np.meshgrid(np.fft.fftfreq(128, PIXEL), np.fft.fftfreq(129, PIXEL), indexing="ij")
    coma = -2 * np.pi * 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * (kx * beam[0] + ky * beam[1]) * 1e-3
    inside = np.hypot(kx, ky) < 0.45 / PIXEL
    assert np.abs(coma[inside]).max() > 1.5
    error = np.linalg.norm((tilted - plain * np.exp(1j * coma))[inside])
    # 1 % is seen, whatever the potential: a patch ends where the highest frequencies along its sides go, those of its corners
    # go further; the opposite sign costs more than all
    assert error < 0.02 * np.linalg.norm(plain[inside])


def test_detector_transfer_weakens_detail_and_keeps_the_mean() -> None:
    sharp, soft = (images(scene(imaging=Imaging(mtf=m, defocus_jitter=0.0)))[1].astype(float) for m in (1.0, 0.4))
    assert soft.mean() == pytest.approx(sharp.mean(), rel=1e-6)
    a, b = (np.fft.fft2(i) for i in (sharp, soft))
    gain = 0.4 ** (4 * (np.fft.fftfreq(96)[:, None] ** 2 + np.fft.fftfreq(110) ** 2))
    rounding = abs(a[0, 0]) * 2**-23  # of a transform in float32, of which the mean is by far the largest coefficient
    assert np.median(abs(a)) > 100 * rounding
    np.testing.assert_allclose(b, a * gain, rtol=0, atol=rounding)


def test_binned_detector_gives_the_same_image() -> None:
    coarse, fine = scene(), scene(oversampling=2)
    assert np.allclose(coarse.truth()["pos2d_px"], fine.truth()["pos2d_px"])
    once = images(coarse)
    twice = images(fine, [resample(density(), 0.5)])
    assert np.allclose(once.mean((1, 2)), twice.mean((1, 2)), rtol=1e-4)
    # where the ends of the band, which a disc of Fourier coefficients cuts off in the one and not in the other, are left out
    a, b = (filters.lowpass(torch.from_numpy(x), PIXEL, 15.0).numpy() for x in (once, twice))
    assert np.sqrt(np.mean((a - b) ** 2)) < 0.05 * a[1].std()  # interpolation of two different Fourier volumes


def test_spoilt_images() -> None:
    acquisition = dataclasses.replace(THREE, bad=((0, "dark"), (1, "blank"), (2, "jump")), drift=0.0)
    here = scene(acquisition=acquisition)
    stack = images(here, noise=True)
    assert stack[1].max() == 0
    # four times the counting error of 1.2 electrons in each of 96 x 110 pixels
    assert stack[0].mean() == pytest.approx(0.01 * images(scene())[0].mean(), rel=0.04)
    assert np.hypot(*here.shift[2]) == pytest.approx(0.35 * 96 * PIXEL)
    assert np.allclose(
        images(here)[2].mean(), images(scene())[2].mean(), rtol=1e-3
    )  # a thousandth: the particle's share
    assert here.truth()["bad"] == [0, 1, 2]
    with pytest.raises(InputError, match="no image 7 can be dark"):
        scene(acquisition=dataclasses.replace(THREE, bad=((7, "dark"),)))


def test_two_classes_and_only_those() -> None:
    """A class of empty density leaves no trace; the shares are met exactly."""
    many = dataclasses.replace(PLAIN, particles=8, fractions=(3.0, 1.0))
    here = scene(many, shape=(300, 300))
    assert np.bincount(here.classes).tolist() == [6, 2]
    image = images(here, [density(), torch.zeros_like(density())])[1]
    at = np.rint(here.truth()["pos2d_px"])[:, 1].astype(int)
    deviation = [np.abs(image[y - 8 : y + 9, x - 8 : x + 9] / np.median(image) - 1).max() for x, y in at.clip(9, 290)]
    assert min(np.array(deviation)[here.classes == 0]) > 3 * max(np.array(deviation)[here.classes == 1])


# ------------------------------------------------------------------------------------------------------------- the layout


def test_truth_holds_together() -> None:
    """pos2d_px and particle_defocus follow from pos_A by convention 5, for any motion, axis and slab."""
    specimen = Specimen(particles=12, thickness=700.0, slab_tilt=(-4.0, 3.0), motion=2.0, motion_range=300.0, beads=3)
    acquisition = Acquisition(
        (-40.0, 0.0, 40.0), (2, 0, 1), axis=-93.0, axis_error=0.2, xtilt=1.0, tilt_error=0.3, jitter=5.0
    )
    here = scene(specimen, acquisition, shape=(400, 333))
    truth = json.loads(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in here.truth().items()}))
    assert len(set(truth["axis"])) == 3 and len(set(truth["tilt"])) == 3
    for j in range(3):
        r = np.array(truth["pos_A"]) + np.array(truth["motion_A"])[:, j]
        q = r @ matrix(truth["axis"][j], truth["tilt"][j], truth["xtilt"]).T
        px = (q[:, :2] + truth["shift_A"][j]) / PIXEL + [333 // 2, 400 // 2]
        assert np.allclose(px, np.array(truth["pos2d_px"])[:, j], atol=1e-9)
        assert np.allclose(truth["defocus"][j] - q[:, 2], np.array(truth["particle_defocus"])[:, j], atol=1e-6)
    level = np.array(truth["pos_A"]) @ matrix(0.0, -4.0, 3.0)
    assert np.abs(level[:, 2]).max() <= (700 - 270) / 2 + 1e-9
    assert np.abs(np.array(truth["beads_A"]) @ matrix(0.0, -4.0, 3.0))[:, 2] == pytest.approx(300.0)
    apart = np.linalg.norm(level[:, None] - level[None], axis=2) + 1e9 * np.eye(12)
    assert apart.min() >= 270.0
    assert np.allclose([np.linalg.det(r) for r in truth["poses"]], 1.0)


def test_drift_and_motion_add_up_along_the_exposure() -> None:
    tilts = simulate.tilt_angles(-50, 50, 1)
    taken = simulate.order_of_tilts(tilts)
    still = dataclasses.replace(PLAIN, particles=60, spacing=100.0, motion=1.5)
    here = scene(still, Acquisition(tilts, taken, drift=10.0), shape=(400, 400))
    order = np.argsort(taken)
    assert (here.shift[order[0]] == 0).all()
    assert np.diff(here.shift[order], axis=0).std() == pytest.approx(10.0, rel=0.2)  # 200 numbers: four standard errors
    steps = np.diff(here.motion[:, order], axis=1)
    assert steps.std() == pytest.approx(1.5, rel=0.02)
    assert here.motion[:, order[-1]].std() == pytest.approx(1.5 * math.sqrt(101), rel=0.25)


def test_what_moves_together_is_smooth_and_has_no_drift() -> None:
    """Particles, beads and probes are in one field of motion; what it has in common is the stage's."""
    tilts = simulate.tilt_angles(-50, 50, 1)
    moved = dataclasses.replace(PLAIN, particles=60, spacing=100.0, motion=1.5, beads=20, bead_radius=20.0)
    stage = Acquisition(tilts, simulate.order_of_tilts(tilts))
    near = scene(dataclasses.replace(moved, motion_range=1000.0), stage, shape=(400, 400))
    everything = np.concatenate([near.positions, near.beads, near.probes])
    motion = np.concatenate([near.motion, near.bead_motion, near.probe_motion])
    apart = np.linalg.norm(everything[:, None] - everything[None], axis=2)
    difference = ((motion[:, None] - motion[None]) ** 2).sum(axis=3).mean(axis=2)
    # a Gaussian field: neighbours' difference grows as 1 - exp(-d²/2R²), 3 axes, two walks of mean 51 steps of 1.5 Å
    for low, high in ((100.0, 300.0), (400.0, 600.0)):
        some = (apart > low) & (apart < high)
        expected = 2 * 3 * 1.5**2 * 51 * (1 - np.exp(-(apart[some] ** 2) / 2e6)).mean()
        assert difference[some].mean() == pytest.approx(expected, rel=0.35)  # the walks of a few modes are random
    assert np.abs(np.concatenate([near.bead_motion, near.probe_motion]).mean(axis=0)).max() < 1e-9
    rigid = scene(dataclasses.replace(moved, motion_range=1e6), stage, shape=(400, 400))
    assert np.abs(rigid.motion).max() < 0.3  # 2400 Å are nothing against 1e6
    alone = scene(moved, stage, shape=(400, 400))
    assert alone.motion.std() > 5 and not alone.bead_motion.any() and not alone.probe_motion.any()


def test_probes_are_in_the_slab_and_where_the_truth_says() -> None:
    thick = dataclasses.replace(PLAIN, slab_tilt=(5.0, -3.0), motion_range=800.0, motion=2.0)
    here = scene(thick, dataclasses.replace(THREE, magnification=0.003))
    truth = here.truth()
    inside = here.probes @ simulate._slab(thick)
    assert (np.abs(inside) <= np.array([110 * PIXEL, 96 * PIXEL, 500.0]) * 0.4).all() and len(inside) == 100
    for j in range(3):
        q = (here.probes + here.probe_motion[:, j]) @ matrix(truth["axis"][j], truth["tilt"][j], 3.0).T
        expected = truth["magnification"][j] * (q[:, :2] + truth["shift_A"][j]) / PIXEL + [55, 48]
        assert truth["probe2d_px"][:, j] == pytest.approx(expected, abs=1e-9)


def test_magnification_is_smooth_and_moves_the_images() -> None:
    tilts = simulate.tilt_angles(-60, 60, 3)
    stage = Acquisition(tilts, simulate.order_of_tilts(tilts), magnification=0.002)
    change = scene(acquisition=stage).magnification - 1
    assert math.sqrt((change**2).mean()) == pytest.approx(0.002) and change.mean() == pytest.approx(0, abs=1e-12)
    design = np.stack([np.ones(41), tilts, np.square(tilts), stage.taken], axis=1)
    assert np.linalg.lstsq(design, change, rcond=None)[1][0] < 1e-20  # four smooth functions are all there is
    # a bead on a pixel, moved to another: its shadow is the same, and so its centre of mass moves as far to rounding
    flat, gold = (
        Acquisition((0.0,), (0,), drift=0.0, axis=0.0),
        dataclasses.replace(PLAIN, particles=0, bead_radius=40.0),
    )
    one = dataclasses.replace(
        scene(gold, flat, Imaging(defocus=5000.0, defocus_jitter=0.0)),
        beads=np.array([[240.0, -120.0, 0.0]]), bead_motion=np.zeros((1, 1, 3)),
    )  # fmt: skip
    y, x = np.mgrid[:96, :110]
    found = []
    for magnification in (1.0, 1.05):
        image = images(dataclasses.replace(one, magnification=np.array([magnification])), [torch.zeros(16, 16, 16)])[0]
        dark = np.clip(0.8 * np.median(image) - image, 0, None)
        found.append([(dark * c).sum() / dark.sum() for c in (x, y)])
    assert np.subtract(*found[::-1]) * PIXEL == pytest.approx([12.0, -6.0], abs=0.01)


def test_a_duplicate_shows_what_was_taken_before_it() -> None:
    spoilt = dataclasses.replace(THREE, bad=((0, "duplicate"), (1, "duplicate")))
    first, second, third = images(scene(acquisition=spoilt), noise=True)
    plain = images(scene(), noise=True)
    assert (third == plain[2]).all()
    assert (first == plain[2]).all()  # taken third, after the one at 30 degrees
    assert (second == plain[2]).all()  # the first exposure has none before it: the second


def test_a_specimen_goes_on_beyond_the_field() -> None:
    wide = dataclasses.replace(PLAIN, particles=40, spacing=100.0, beads=30, bead_radius=20.0, margin=400.0)
    here = scene(wide, dataclasses.replace(THREE, xtilt=0.0))
    for points, reach in ((here.positions, 0.0), (here.beads, 20.0)):
        assert (np.abs(points[:, :2]) <= np.array([330, 288]) + 400 - reach).all()
        outside = (np.abs(points[:, :2]) > [330, 288]).any(axis=1)
        assert 0.6 < outside.mean() < 0.95  # 82 % of the area
    assert (np.abs(here.probes[:, :2]) < [330, 288]).all()


@pytest.mark.parametrize(
    ("order", "sequence"),
    [
        ("dose-symmetric", [0, 3, -3, 6, -6, 9]),
        ("bidirectional", [0, 3, 6, 9, -3, -6]),
        ("continuous", [-6, -3, 0, 3, 6, 9]),
    ],
)
def test_orders_of_tilts(order: str, sequence: list[float]) -> None:
    tilts = simulate.tilt_angles(-6, 9, 3)
    assert tilts == (-6, -3, 0, 3, 6, 9)
    taken = simulate.order_of_tilts(tilts, order)
    assert [tilts[k] for k in np.argsort(taken)] == sequence


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(InputError, match="no room for 50"):
        scene(dataclasses.replace(PLAIN, particles=50, thickness=250.0))
    with pytest.raises(InputError, match="no order of tilts 'random'"):
        simulate.order_of_tilts((0.0,), "random")
    with pytest.raises(InputError, match="no tilt series from 60 to -60"):
        simulate.tilt_angles(60, -60, 3)
    with pytest.raises(InputError, match="not white"):
        simulate.as_potential(-density(), PIXEL)
    with pytest.raises(InputError, match="fractions"):
        scene(dataclasses.replace(PLAIN, fractions=(-1.0,)))


# ---------------------------------------------------------------------------------------------------------------- maps


def test_maps_of_any_units_become_potentials() -> None:
    scaled = simulate.as_potential(density() * 1234.5, PIXEL)
    # the built-in particle is the scale: its interior is what other maps are brought to, to 2 % of the constant's rounding
    assert float((scaled / density())[27, 27, 27]) == pytest.approx(1.0, rel=0.02)
    assert simulate.as_potential(density(), PIXEL, 2.0).sum() == pytest.approx(2 * float(scaled.sum()), rel=1e-5)


@pytest.mark.parametrize("new", [4.0, 7.7])
def test_resampled_maps_are_the_same_particle(new: float) -> None:
    resampled = resample(density(), new / PIXEL)
    box = resampled.shape[-1]
    direct = phantom.density(phantom.particle(), box, new)
    coarse = max(new, PIXEL)
    a, b = (filters.lowpass(m, new, 2.4 * coarse) for m in (resampled, direct))
    # what the coarser sampling leaves; box lengths agree to 1e-4, a hundredth of a pixel at the rim
    assert float((a - b).norm() / b.norm()) < 0.01


def test_integer_detectors_round_and_do_not_overflow() -> None:
    image = np.array([[0.4, 200.0, 33.6]], np.float32)
    assert simulate.counts(image, np.dtype(np.int8), 1.0).tolist() == [[0, 127, 34]]
    assert simulate.counts(image, np.dtype(np.float16), 1.0).dtype == np.float16
    bright = scene(acquisition=dataclasses.replace(THREE, dose=20.0))
    assert 720 * simulate.gain_for(bright, np.dtype(np.int8)) < 127 - 20
    assert simulate.gain_for(bright, np.dtype(np.int16)) == 1.0


# -------------------------------------------------------------------------------------------------- another simulator


def replay(data: Path, name: str, hand: int | None = None) -> tuple[Scene, dict[str, Any]]:
    """A scene with the truth of a tilt series that another simulator made."""
    truth = json.loads((data / "sim" / f"{name}_truth.json").read_text())
    turn = [matrix(a, t, truth["xtilt"]) for a, t in zip(truth["axis"], truth["tilt"], strict=True)]
    position = np.array(truth["pos_A"])
    shape = (round(truth["field_A"][1] / truth["apix"]), round(truth["field_A"][0] / truth["apix"]))
    origin = np.array([shape[1] // 2, shape[0] // 2])
    motion = np.zeros((*position.shape[:1], len(turn), 3))
    for j, t in enumerate(turn):
        seen = (np.array(truth["pos2d_px"])[:, j] - origin) * truth["apix"] - truth["shift_A"][j]
        motion[:, j] = np.pad(seen - (position @ t.T)[:, :2], ((0, 0), (0, 1))) @ t
    return Scene(
        Acquisition(tuple(truth["nominal"]), tuple(truth["acq"]), truth["dose"], xtilt=truth["xtilt"]),
        Imaging(
            Optics(truth["kv"], truth["cs"], truth["ac"]),
            truth["defocus"][0],
            0.0,
            truth["astig"],
            truth["astig_ang"],
            handedness=hand or truth["defocus_handedness"],
        ),
        Specimen(len(position), 0.0, (1.0,), truth["thick"], tuple(truth["slab_tilt"]), ice=0.0),
        shape,
        truth["apix"],
        1,
        0,
        np.array(truth["tilt"]),
        np.array(truth["axis"]),
        np.array(truth["shift_A"]),
        np.ones(len(turn)),
        np.array(truth["defocus"]),
        position,
        np.array(truth["poses"]),
        np.array(truth["cls"]),
        motion,
        np.zeros((0, 3)),
        np.zeros((0, len(turn), 3)),
        np.zeros((0, 3)),
        np.zeros((0, len(turn), 3)),
    ), truth


def test_another_simulators_tilt_series_is_understood(shared_data: Path) -> None:
    """Its truth, put through ours, explains its images down to the counting noise.

    All keys are tested at once: a wrong origin, hand, sign of the pose, dose, astigmatism (U - V) or motion leaves signal behind.
    """
    here, _ = replay(shared_data, "conf_02")
    with mrcfile.open(shared_data / "maps" / "splice_3A.mrc") as file:
        white = torch.from_numpy(file.data.astype(np.float32))
    stack = mrcfile.mmap(shared_data / "sim" / "conf_02.mrc", permissive=True).data
    camera_maps = [simulate.as_potential(white, 3.0)]
    camera = simulate._Camera(here, camera_maps)
    frequency = grids.rfft_radius(here.shape).numpy()
    signal, noise = (frequency > 0.01) & (frequency < 0.12), frequency > 0.3
    error = math.sqrt(1 / signal.sum() + 1 / noise.sum())  # relative, of the ratio of two mean powers

    def excess(image: np.ndarray) -> float:
        power = np.abs(np.fft.rfft2(image)) ** 2
        return float(power[signal].mean() / power[noise].mean() - 1)

    for j in (4, 18):
        image = stack[j].astype(np.float64)
        contrast = camera.particles(j).double().numpy()
        contrast -= contrast.mean()
        strength = -(image * contrast).sum() / (contrast**2).sum() / image.mean()
        assert 0.9 < strength < 1.1  # protein is dark, and as strong as ours
        assert excess(image) > 30 * error
        assert abs(excess(image + strength * image.mean() * contrast)) < 5 * error
    # the other hand is less likely by far: half of N times the difference of the residual variances, in units of them
    image, left = stack[4].astype(np.float64), []
    for hand in (1, -1):
        contrast = simulate._Camera(replay(shared_data, "conf_02", hand)[0], camera_maps).particles(4).double().numpy()
        left.append(1 - np.corrcoef(image.ravel(), contrast.ravel())[0, 1] ** 2)
    assert image.size / 2 * (left[1] - left[0]) / left[0] > 5  # nats
    # the mean follows the thickness and the tilt as ours does (2 %: its mean free path is not known)
    means = [camera.scene.acquisition.dose * 9.0 * math.exp(-700 / 3500 / abs(t)) for t in
             (camera.tilts[[4, 18]] @ simulate._slab(here.specimen))[:, 2, 2]]  # fmt: skip
    assert means == pytest.approx([stack[4].mean(), stack[18].mean()], rel=0.02)
