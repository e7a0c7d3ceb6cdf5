"""Beam tilt from sums over images: exact without noise, as far off as it says with noise, and found in simulated tilt series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods import extract, phantom, simulate
from libemc.methods.subtilts import Particles, TiltGeometry, load_batch, noise_spectrum
from libemc.methods.tiltseries_refine.beam_tilt import fit_beam_tilt
from libemc.numerics import slices
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.rotations import euler_from_matrix, random_rotations
from libemc.numerics.slices import Band, FourierVolume
from libemc.records import Alignment, Ctf, Picks, Source, Tilts, TiltSeriesRecord
from tests.methods.subtilt_data import blobs

OPTICS, PIXEL = Optics(300.0, 2.7, 0.07), 2.0


def true_phase(band: Band, tilt: tuple[float, float], shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """The phase by beam tilt (mrad) and shift (Å), written out: RELION adds Cs λ² k² (k·tilt) turns to be rid of it."""
    kx, ky = (k.double() / (band.box * PIXEL) for k in (band.kx, band.ky))
    coma = 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * (kx * tilt[0] + ky * tilt[1]) * 1e-3
    return -2 * math.pi * (coma + kx * shift[0] + ky * shift[1])


def spectrum(band: Band) -> Tensor:
    """A sum of |prediction|² with rings, that falls off."""
    k = band.radii / (band.box * PIXEL)
    return 3e3 * torch.exp(-60 * k**2) * (1 + torch.sin(2000 * k**2))


def noisy(mean: Tensor, norm: Tensor, seed: int) -> Tensor:
    """Real and imaginary parts with variance norm/2."""
    g = torch.Generator().manual_seed(seed)
    return mean + (norm / 2).sqrt() * torch.complex(*torch.randn(2, len(norm), generator=g).double())


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("tilt", [(0.6, -0.8), (-0.6, 0.8), (1.0, 0.0), (2.5, 2.0)])
def test_without_noise_it_is_exact(box: int, scale: float, tilt: tuple[float, float]) -> None:
    """Whatever the predictions' scale: phases of one radian at the edge of the band, and of three."""
    band = Band.of(box)
    norm, phase = spectrum(band), true_phase(band, tilt, (0.3, -0.2))
    assert 0.9 < float(true_phase(band, tilt).abs().max()) < 3.5
    found = fit_beam_tilt(scale * norm * torch.polar(torch.ones_like(phase), phase), norm, band, PIXEL, OPTICS)
    # the last step is below 1e-4 errors, and the wavelength has six digits
    np.testing.assert_allclose(found.tilt, tilt, rtol=1e-5, atol=2e-4 * float(found.error.max()))
    np.testing.assert_allclose(found.shift, [0.3, -0.2], atol=1e-5)
    assert found.scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(("falloff", "box"), [(0.0, 40), (-25.0, 40), (-25.0, 41)])
def test_errors_are_those_of_the_noise(falloff: float, box: int) -> None:
    """Also where the images show less of the predictions at high resolution: down to a fifth here."""
    band = Band.of(box)
    norm, tilt = spectrum(band), (0.5, -0.9)
    mean = norm * torch.exp(falloff * (band.radii / (box * PIXEL)) ** 2)
    mean = mean * torch.polar(torch.ones_like(norm), true_phase(band, tilt, (0.1, 0.2)))
    found = [fit_beam_tilt(noisy(mean, norm, seed), norm, band, PIXEL, OPTICS) for seed in range(200)]
    pulls = torch.stack([(f.tilt - torch.tensor(tilt)) / f.error for f in found])
    # 400 numbers of unit variance: four standard errors of their mean and of their spread
    assert abs(float(pulls.mean())) < 4 / math.sqrt(400) and float(pulls.std()) == pytest.approx(
        1, abs=4 / math.sqrt(800)
    )
    assert float(torch.stack([f.error for f in found]).max()) < 0.1 * 0.5


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("tilt", [(1.2, -0.7), (-1.2, 0.7)])
def test_images_with_white_noise(box: int, tilt: tuple[float, float]) -> None:
    """Real images in, of unit variance per pixel: the pull of the estimate is that of a normal deviate."""
    count, band = 30, Band.of(box)
    g = torch.Generator().manual_seed(box)
    kx, ky = band.frequencies(PIXEL)
    defocus = (9000 + 6000 * torch.rand(count, 1, generator=g)).float()
    lens = ctf(kx, ky, defocus + 200, defocus - 200, torch.tensor(30.0), torch.tensor(0.0), OPTICS)
    volume = FourierVolume.from_map(blobs(box))
    prediction = slices.extract_slices(volume, random_rotations(count, g), band) * lens
    phase = true_phase(band, tilt)
    seen = slices.images_from_band(prediction * torch.polar(torch.ones_like(phase), phase).to(prediction.dtype), band)
    strength = 5.0 / float(seen.std())
    prediction = strength * prediction / box  # in units of the noise: white noise has E|coefficient|² = box²
    norm = (prediction.abs() ** 2).double().sum(0)
    pulls = []
    for _ in range(60):
        noise = torch.randn(seen.shape, generator=g)
        data = slices.spectra_of_images(strength * seen + noise, band) / box
        found = fit_beam_tilt((prediction.conj() * data).sum(0), norm, band, PIXEL, OPTICS)
        assert float(found.error.max()) < 0.2
        pulls.append((found.tilt - torch.tensor(tilt)) / found.error)
    every = torch.stack(pulls)
    # 120 numbers of unit variance: four standard errors of their mean and of their spread
    assert abs(float(every.mean())) < 4 / math.sqrt(120) and float(every.std()) == pytest.approx(
        1, abs=4 / math.sqrt(240)
    )


def test_nothing_is_known_of_what_is_not_shown() -> None:
    """Noise alone, or nothing predicted."""
    band = Band.of(40)
    norm = spectrum(band)
    for seed in range(20):
        found = fit_beam_tilt(noisy(torch.zeros(len(norm)), norm, seed), norm, band, PIXEL, OPTICS)
        assert torch.isinf(found.error).all() and not found.tilt.any()
        assert abs(found.scale) * math.sqrt(2 * float(norm.sum())) < 6
    none = fit_beam_tilt(torch.zeros(len(norm)) + 0j, 0 * norm, band, PIXEL, OPTICS)
    assert torch.isinf(none.error).all() and not none.tilt.any() and none.scale == 0


def particles_of(scene: simulate.Scene, box: int, density: Tensor) -> Particles:
    """The particles of a simulated tilt series, extracted where they are, with their true poses and CTF."""
    truth, pixel = scene.truth(), scene.pixel_size
    tilts, half = len(scene.tilt), scene.imaging.astigmatism / 2
    rot, tilt, psi = (tuple(a.tolist()) for a in euler_from_matrix(torch.from_numpy(scene.rotations)))
    dose = (scene.acquisition.dose,) * tilts
    record = TiltSeriesRecord(
        name="TS",
        source=Source(
            stack="s.mrc", shape=(tilts, *scene.shape), pixel_size=pixel, voltage=300.0, cs=2.7, amplitude_contrast=0.07
        ),
        tilts=Tilts(
            nominal=scene.acquisition.tilts,
            dose=dose,
            dose_before=tuple(scene.acquisition.dose * k for k in scene.acquisition.taken),
            use=(True,) * tilts,
        ),
        alignment=Alignment(
            axis=tuple(scene.axis.tolist()),
            tilt=tuple(scene.tilt.tolist()),
            xtilt=(scene.acquisition.xtilt,) * tilts,
            shift_x=tuple(scene.shift[:, 0].tolist()),
            shift_y=tuple(scene.shift[:, 1].tolist()),
        ),
        ctf=Ctf(
            defocus_u=tuple((scene.defocus + half).tolist()),
            defocus_v=tuple((scene.defocus - half).tolist()),
            angle=(scene.imaging.angle,) * tilts,
            phase_shift=tuple(truth["phase_shift"].tolist()),
        ),
        picks={"p": Picks(xyz=tuple(tuple(p) for p in scene.positions.tolist()), rot=rot, tilt=tilt, psi=psi)},
    )
    assert record.alignment is not None
    geometry = TiltGeometry.of(record.alignment, record.tilts.use)
    patches = extract.locate(record.picks["p"].xyz, geometry, record.ctf, scene.shape, pixel, box)
    file = extract.particle_file(record, "p", "s", box, pixel, "c1", patches)
    images = [torch.from_numpy(image) for image in simulate.tilt_images(scene, [density])]
    cut = [extract.extract_tilt(image, patches.position[:, j], box) for j, image in enumerate(images)]
    stack = torch.stack(cut, dim=1)[torch.tensor(patches.kept)] / torch.stack(cut).std()
    return Particles.of(file, stack.flatten(0, 1).float().numpy())


@pytest.mark.parametrize(
    ("beam", "box", "shape"),
    [((4.0, -2.5), 108, (600, 600)), ((-4.0, 2.5), 105, (601, 599)), ((0.0, 0.0), 105, (600, 600))],
)
def test_of_a_simulated_tilt_series(beam: tuple[float, float], box: int, shape: tuple[int, int]) -> None:
    """Thirty particles in three tilts at true poses: the beam's tilt within its errors, which are a tenth of it."""
    pixel = 3.0
    density = phantom.density(phantom.particle(), box, pixel)
    scene = simulate.lay_out(
        simulate.Acquisition((-20.0, 0.0, 20.0), (2, 0, 1), dose=10.0, drift=5.0),
        simulate.Imaging(OPTICS, 15000.0, 200.0, 300.0, 20.0, beam_tilt=beam),
        simulate.Specimen(particles=30, spacing=200.0, thickness=400.0, motion=0.0, ice=0.0),
        shape,
        pixel,
        seed=1,
    )
    particles = particles_of(scene, box, density)
    band = Band.of(box)
    batch = load_batch(particles, torch.arange(len(particles)), band, noise_spectrum(particles, band))
    cut = slices.extract_slices(FourierVolume.from_map(density), batch.matrices(), band, batch.magnification)
    cross = (cut.conj() * batch.centred()).sum(0)
    norm = ((batch.transfer * cut.abs()) ** 2).sum(0)
    found = fit_beam_tilt(cross, norm, band, pixel, OPTICS)
    assert float(found.error.max()) < 0.4
    # three errors
    assert float(((found.tilt - torch.tensor(beam)) / found.error).abs().max()) < 3
    assert float(found.shift.abs().max()) < 0.2  # Å: half a pixel would be 1.5
