"""series: spectra drawn from the model as it is written here once more, in numpy: parameters come back, with their errors."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from libemc.methods.estimate_ctf import series as fitting
from libemc.methods.estimate_ctf.series import Series
from libemc.methods.estimate_ctf.spectra import Spectra
from libemc.numerics.ctf import Optics
from tests.by_hand import ctf, wavelength

OPTICS = Optics(300.0, 2.7, 0.07)
SIDE, SECTORS = 900.0, 12
K = np.arange(18, 143) / SIDE  # 50 to 6.3 Å
ANGLE = np.arange(SECTORS) * 15.0


def drawn(
    defocus,
    hand=-1,
    stretch=(0.0, 0.0),
    shift=0.0,
    thickness=800.0,
    amplitude=0.3,
    finest=0.12,
    seed=0,
    heights=5,
    n=3.0,
):
    """Spectra of T tilts from -54 to 54 degrees, about their smooth background; `n` times k·SIDE coefficients in each value.

    Args:
        defocus: (T,) Å. stretch: of (U - V)/2 along x and the diagonal, (2,) or (T, 2). shift: degrees, one or (T,).
        amplitude: of the rings at k = 0, one or (T,); it falls to a seventh of that at `finest`.
    """
    rng, count = np.random.default_rng(seed), len(defocus)
    tilts = np.linspace(-54, 54, count) if count > 1 else np.zeros(1)
    stretch = np.broadcast_to(stretch, (count, 2))
    shift, amplitude = (np.broadcast_to(a, count) for a in (shift, amplitude))
    lam, parts = wavelength(300.0), {name: [] for name in ("tilt", "height", "slope", "power", "count")}
    kx, ky = K * np.cos(np.radians(ANGLE))[:, None], K * np.sin(np.radians(ANGLE))[:, None]
    for j, tilt in enumerate(np.radians(tilts)):
        half = math.hypot(*stretch[j])
        angle = math.degrees(math.atan2(stretch[j, 1], stretch[j, 0])) / 2
        slope = 128.0 * math.tan(abs(tilt))  # the rms width of a Hann window of 900 Å
        for height in math.tan(tilt) * np.linspace(-700, 700, heights if tilt else 1):
            z = defocus[j] + hand * height
            # -cos 2χ of heights all through the slab along the beam, and normally distributed over the tile
            blur = np.sinc(lam * K**2 * thickness / math.cos(tilt)) * np.exp(-2 * (math.pi * lam * K**2 * slope) ** 2)
            rings = 2 * ctf(kx, ky, z + half, z - half, angle, shift[j], 300.0, 2.7, 0.07) ** 2 - 1
            mean = 1 + amplitude[j] * np.exp(-2 * (K / finest) ** 2) * blur * rings
            number = np.broadcast_to(n * K * SIDE / (1 if tilt else 1 / heights), mean.shape)
            # a mean of n exponential values
            parts["power"].append(rng.gamma(number, mean / number))
            for name, value in (("tilt", j), ("height", height), ("slope", slope), ("count", number)):
                parts[name].append(value)
    values = {name: np.array(value) for name, value in parts.items()}
    # a tile so large that its window blurs no ring
    return Spectra(**values, k=K, angle=ANGLE, side=1e9, beam=1 / np.cos(np.radians(tilts)))


def ready(spectra, thickness=800.0, order=None):
    return Series(spectra, OPTICS, thickness, order)


def around(mean, count=7, jitter=150.0, seed=3):
    return mean + jitter * np.random.default_rng(seed).normal(size=count)


def first_fit(spectra, hand=-1, **more):
    work = ready(spectra, **more)
    return work, work.refine(work.search(hand, [0.0]), work.rows(False))


@cache
def usual():
    """A series that several tests look at: its spectra, defoci, astigmatism, and the fit with directions."""
    defocus, stretch = around(24000.0, 9), np.array([-250.0, 330.0])
    spectra = drawn(defocus, stretch=stretch, seed=1)
    work, fit = first_fit(spectra)
    turned = work.astigmatic(work.refine(fit.state, work.rows(True), fit.surplus))
    return spectra, defocus, stretch, work, work.refine(turned.state, list(turned.rows), turned.surplus), turned


@pytest.mark.parametrize("mean", [3800.0, 9000.0, 33000.0, 90000.0])
def test_the_defocus_is_found_from_nothing(mean: float) -> None:
    """Anywhere in the range that is searched; the coarse grid's step is 200 Å."""
    defocus = around(mean)
    work = ready(drawn(defocus, amplitude=0.4))
    found = work.search(-1, [0.0])
    np.testing.assert_allclose(found.defocus, defocus, atol=300)
    assert found.hand == -1 and (found.amplitude >= 0).all()


def test_errors_are_what_the_defoci_scatter_by() -> None:
    """42 defoci of 6 series: the ratio of deviation and error has a standard deviation of 1, known to 11 %."""
    ratios = []
    for seed in range(6):
        defocus = around(21000.0, 7, 200.0, seed)
        _, fit = first_fit(drawn(defocus, seed=seed, amplitude=0.2))
        ratios.append((fit.state.defocus - defocus) / fit.error)
        assert (fit.error < 200).all() and fit.surplus < 1.3
        assert (fit.own > fitting.WORTH).all()
    ratios = np.concatenate(ratios)
    assert np.sqrt((ratios**2).mean()) == pytest.approx(1.0, abs=0.3)
    assert np.abs(ratios).max() < 3.5


@pytest.mark.parametrize("hand", [-1, 1])
def test_the_hand_has_the_evidence(hand: int) -> None:
    spectra = drawn(around(25000.0), hand)
    fits = {sign: first_fit(spectra, sign)[1] for sign in (-1, 1)}
    assert fits[hand].evidence > fits[-hand].evidence + 50
    assert np.median(fits[hand].own - fits[-hand].own) > 3


def test_the_order_of_the_tilts_does_not_matter() -> None:
    """Tilts turned around in the stack, with the order in which they were taken: the same values."""
    spectra, defocus, *_ = usual()
    count = len(defocus)
    order = list(range(count))
    turned = replace(spectra, tilt=count - 1 - spectra.tilt, beam=spectra.beam[::-1].copy())
    one, other = first_fit(spectra, order=order)[1], first_fit(turned, order=order[::-1])[1]
    np.testing.assert_allclose(other.state.defocus[::-1], one.state.defocus, atol=0.5)
    np.testing.assert_allclose(other.error[::-1], one.error, rtol=1e-3)
    assert other.evidence == pytest.approx(one.evidence, abs=1e-3)


def test_the_amplitude_is_that_of_the_rings() -> None:
    """To a tenth where there is most to see: between 1/25 and 1/11 Å."""
    *_, work, fit, _ = usual()
    inside = (K > 0.04) & (K < 0.09)
    want = 0.3 * np.exp(-2 * (K / 0.12) ** 2)
    np.testing.assert_allclose((fit.state.amplitude @ work.frame.knots)[inside], want[inside], rtol=0.1)


# -------------------------------------------------------------------------------------------------------- astigmatism


def test_the_astigmatism_of_a_series() -> None:
    """Within three errors, in size and direction; the defoci stay within theirs; one value for all tilts."""
    _, defocus, stretch, _, fit, turned = usual()
    found = turned.state.stretch
    assert (found == found[0]).all()
    assert turned.stretch_error < 60
    assert np.abs(found[0] - stretch).max() < 3 * turned.stretch_error / 2
    assert np.abs((fit.state.defocus - defocus) / fit.error).max() < 3.5


@pytest.mark.parametrize("angle", [0.0, 70.0, 155.0])
def test_the_astigmatism_has_its_direction(angle: float) -> None:
    """U - V of 1000 Å in any direction, to 5 degrees and 80 Å."""
    double = math.radians(2 * angle)
    spectra = drawn(around(20000.0, 3), stretch=(500 * math.cos(double), 500 * math.sin(double)), seed=int(angle))
    work, fit = first_fit(spectra)
    found = work.astigmatic(work.refine(fit.state, work.rows(True), fit.surplus)).state.stretch[0]
    turn = math.degrees(math.atan2(found[1], found[0])) / 2 - angle
    assert abs((turn + 90) % 180 - 90) < 5
    assert math.hypot(*found) == pytest.approx(500.0, abs=40)


def test_astigmatism_errors_are_what_it_scatters_by() -> None:
    """16 components of 8 series about zero; `stretch_error` is that of U - V, twice that of a component."""
    ratios = []
    for seed in range(8):
        work, fit = first_fit(drawn(around(20000.0, 3, seed=seed), seed=seed, amplitude=0.2))
        turned = work.astigmatic(work.refine(fit.state, work.rows(True), fit.surplus))
        ratios.append(turned.state.stretch[0] / (turned.stretch_error / 2))
    assert np.sqrt((np.array(ratios) ** 2).mean()) == pytest.approx(1.0, abs=0.4)


def test_astigmatism_of_each_tilt_where_the_rings_say_so() -> None:
    """It turns by 90 degrees through the series: each tilt has its own, nearer to its own truth than a common one could be."""
    turn = np.radians(np.linspace(0, 180, 7))
    stretch = 450 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    work, fit = first_fit(drawn(around(20000.0), stretch=stretch, amplitude=0.5))
    found = work.astigmatic_each(work.astigmatic(work.refine(fit.state, work.rows(True), fit.surplus))).state.stretch
    common = np.sqrt(((stretch - stretch.mean(0)) ** 2).sum(1).mean())
    assert np.sqrt(((found - stretch) ** 2).sum(1).mean()) < 0.4 * common


# ------------------------------------------------------------------------------------------------ phase shift, thickness


@pytest.mark.parametrize("shift", [40.0, 172.0])
def test_phase_shifts(shift: float) -> None:
    """A phase shift that drifts by 2 degrees a tilt: within 10 degrees, and within three and a half errors."""
    shifts, defocus = shift + 2 * np.arange(5.0), around(20000.0, 5)
    work = ready(drawn(defocus, shift=shifts, amplitude=0.5))
    start = work.search(-1, fitting.PHASES[::2].tolist())
    fit = work.refine(start, work.rows(False))
    fit = work.refine_phases(fit.state, list(fit.rows), fit.surplus)
    off = (np.degrees(fit.state.shift) - shifts + 90) % 180 - 90
    assert np.abs(off).max() < 10
    assert np.abs(off / np.degrees(fit.phase_error)).max() < 3.5
    assert np.abs((fit.state.defocus - defocus) / fit.error).max() < 3.5


@pytest.mark.parametrize("thickness", [1600.0, 2500.0])
def test_a_thick_specimen_is_told(thickness: float) -> None:
    """To a tenth, from where the rings fade and return, 1/√(λ·thickness); the fit began with 1000 Å."""
    work, fit = first_fit(drawn(around(24000.0, 5), thickness=thickness, amplitude=0.6, finest=0.3), thickness=1000.0)
    assert work.seen_thickness(fit) == pytest.approx(thickness, rel=0.1)


def test_a_specimen_of_no_thickness_has_none_to_tell() -> None:
    work, fit = first_fit(drawn(around(24000.0, 5), thickness=0.0, amplitude=0.4), thickness=None)
    assert work.thickness == fitting.USUAL_THICKNESS
    assert work.seen_thickness(fit) is None


# ------------------------------------------------------------------------------------------------------ what is shown


def test_all_heights_are_shown_at_the_defocus_of_the_centre() -> None:
    """The rings of each tilt, of all its tiles and in all directions, are those of its own defocus and astigmatism."""
    _, defocus, stretch, work, fit, _ = usual()
    shown, score, limit = work.shown(fit)
    count = len(defocus)
    shape = (count, SECTORS, len(K))
    assert shown.measured.shape == shown.fitted.shape == shown.error.shape == shape
    assert shown.score.shape == (count, len(shown.defocus))
    np.testing.assert_array_equal(shown.k, K)
    np.testing.assert_array_equal(shown.angle, ANGLE)
    half, angle = math.hypot(*stretch), math.degrees(math.atan2(stretch[1], stretch[0])) / 2
    kx, ky = K * np.cos(np.radians(ANGLE))[:, None], K * np.sin(np.radians(ANGLE))[:, None]
    inside = (K > 0.04) & (K < 0.08)
    for j, z in enumerate(defocus):
        want = 2 * ctf(kx, ky, z + half, z - half, angle, 0.0, 300.0, 2.7, 0.07)[:, inside] ** 2 - 1
        assert np.corrcoef((shown.fitted[j][:, inside] - 1).ravel(), want.ravel())[0, 1] > 0.97
        pull = ((shown.measured - shown.fitted) / shown.error)[j][:, inside]
        assert np.nanstd(pull) == pytest.approx(1.0, abs=0.25)  # interpolation between rings takes a part of the noise
        assert shown.defocus[shown.score[j].argmax()] == pytest.approx(z, abs=2 * fitting.FINE)
    assert (shown.score.max(1) == 0).all()
    assert ((score > 0.7) & (score <= 1)).all()
    assert (limit > 1 / K[-1] - 0.1).all() and (limit < 15).all()


def test_tilts_that_are_not_looked_at_show_nothing() -> None:
    spectra = drawn(around(20000.0, 5))
    kept = spectra.tilt != 2
    parts = {n: getattr(spectra, n)[kept] for n in ("tilt", "height", "slope", "power", "count")}
    work, fit = first_fit(replace(spectra, **parts), order=[4, 0, 3, 1, 2])
    shown, score, _ = work.shown(fit)
    assert work.tilts.tolist() == [0, 1, 3, 4] and work.order.tolist() == [1, 2, 3, 0]
    assert np.isnan(shown.measured[2]).all() and np.isnan(shown.score[2]).all()
    assert np.isfinite(shown.fitted[1]).any() and len(score) == 4


@pytest.mark.parametrize("finest", [0.05, 0.09])
def test_the_resolution_is_where_rings_end(finest: float) -> None:
    """Rings that are cut off somewhere are seen to there: to the 0.02/Å from one knot of the amplitude to the next."""
    spectra = drawn(around(24000.0, 5), amplitude=0.5, finest=1.0, thickness=0.0)
    none = np.random.default_rng(0).gamma(spectra.count, 1 / spectra.count)
    cut = replace(spectra, power=np.where(finest < K, none, spectra.power))
    work, fit = first_fit(cut, thickness=0.0)
    _, _, limit = work.shown(fit)
    assert np.median(1 / limit) == pytest.approx(finest, abs=0.02)
