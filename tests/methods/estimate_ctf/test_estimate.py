"""estimate: whole tilt series, from images of films whose CTF is known to what the record says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.methods.estimate_ctf.estimate import DEFAULT_HAND, Estimate, Hand, estimate
from libemc.methods.estimate_ctf.series import Fit
from libemc.records import Ctf
from tests.methods.estimate_ctf.films import Film

SHAPE, FIVE = (390, 440), (-48.0, -24.0, 0.0, 24.0, 48.0)
SERIES = Film(
    shape=SHAPE, tilts=FIVE, hand=-1, astigmatism=900.0, angle=35.0, jitter=150.0, magnify=0.01, seed=2, film=400.0
)
OTHER = Film(
    shape=SHAPE, tilts=(*FIVE, 60.0), hand=1, astigmatism=900.0, angle=125.0, axis=85.0, seed=3, unused=(1,), blank=(4,)
)
PLATE = Film(shape=SHAPE, tilts=FIVE[1:4], phase=70.0, defocus=15000.0, seed=4, jitter=100.0)


@cache
def found(name: str) -> Estimate:
    film = {"series": SERIES, "other": OTHER, "plate": PLATE}[name]
    return estimate(film.load, film.typed(), film.geometry(), film.phase > 0)


def of(film: Film, ctf: Ctf) -> np.ndarray:
    """How far the mean defoci are from the truth, Å."""
    return (np.array(ctf.defocus_u) + ctf.defocus_v) / 2 - [film.middle(j) for j in range(film.count)]


def apart(angle, other):
    """Degrees between directions of astigmatism."""
    return np.abs((np.asarray(angle) - other + 90) % 180 - 90)


def test_a_series() -> None:
    """Defoci within three and a half of their errors, which are below 60 Å; astigmatism within three, and 5 degrees."""
    ctf = found("series").ctf
    off, error = of(SERIES, ctf), np.array(ctf.error)
    assert (error < 60).all() and np.abs(off / error).max() < 3.5
    size = np.subtract(ctf.defocus_u, ctf.defocus_v)
    assert ctf.astigmatism_error < 100
    assert np.abs(size - 900).max() < 3 * ctf.astigmatism_error
    assert apart(ctf.angle, 35.0).max() < 5
    assert ctf.phase_shift == (0.0,) * 5 and ctf.phase_error is None
    assert ctf.measured == (True,) * 5
    assert min(ctf.score) > 0.7 and max(ctf.score) <= 1
    assert max(ctf.resolution) < 12 and min(ctf.resolution) >= 2 * SERIES.pixel
    assert ctf.defocus_handedness == -1 and ctf.handedness_score > 0.99
    assert found("series").hand.decided and found("series").hand.sign == -1


def test_the_other_hand_an_image_without_rings_and_one_that_is_not_used() -> None:
    """Neither has rings of its own: they have the series' defocus, and say so; the others are measured."""
    estimated = found("other")
    ctf = estimated.ctf
    assert estimated.hand.decided
    assert ctf.defocus_handedness == 1 and ctf.handedness_score > 0.99
    assert ctf.measured == (True, False, True, True, False, True)
    used = [0, 2, 3, 5]
    off, error = of(OTHER, ctf), np.array([e or np.nan for e in ctf.error])
    assert np.abs(off[used] / error[used]).max() < 3.5
    assert apart(np.array(ctf.angle)[used], 125.0).max() < 5
    assert ctf.error[1] is ctf.score[1] is ctf.resolution[1] is None
    assert ctf.resolution[4] is None
    assert np.isnan(estimated.rings.measured[1]).all() and np.isfinite(estimated.rings.measured[0]).any()
    mean = (np.array(ctf.defocus_u) + ctf.defocus_v) / 2
    assert mean[1] == pytest.approx(np.median(mean[used]), abs=100)


@pytest.mark.parametrize("seed", [10, 11])
def test_a_tilt_without_rings_has_the_values_of_the_series(seed: int) -> None:
    """A used image of nothing but shot noise, among six with rings: its defocus is that of the others, whose range is 180 Å."""
    film = Film(shape=SHAPE, blank=(2,), seed=seed)
    ctf = estimate(film.load, film.typed(), film.geometry()).ctf
    mean = (np.array(ctf.defocus_u) + ctf.defocus_v) / 2
    assert ctf.measured == (True, True, False, True, True, True, True)
    assert mean[2] == pytest.approx(np.median(mean[[0, 1, 3, 4, 5, 6]]), abs=300)


def test_a_phase_plate() -> None:
    """The phase shift within 10 degrees and three and a half errors, the defocus within 500 Å."""
    ctf = found("plate").ctf
    off = np.array(ctf.phase_shift) - 70.0
    assert np.abs(off).max() < 10 and np.abs(off / np.array(ctf.phase_error)).max() < 3.5
    assert np.abs(of(PLATE, ctf)).max() < 500
    assert ctf.defocus_handedness == PLATE.hand


def test_images_in_another_order() -> None:
    """The same images, turned around in the stack: the same values in the other order, to a tenth of an error."""
    record, last = SERIES.typed(), SERIES.count - 1
    back = range(last, -1, -1)

    def turned(section):
        changed = {k: tuple(v[j] for j in back) for k, v in section if isinstance(v, tuple) and len(v) == SERIES.count}
        return section.model_copy(update=changed)

    record = record.model_copy(update={"tilts": turned(record.tilts), "alignment": turned(record.alignment)})
    geometry = SERIES.geometry().select(list(back))
    ctf = estimate(lambda j: SERIES.load(last - j), record, geometry).ctf
    first = found("series").ctf
    for name in ("defocus_u", "defocus_v"):
        np.testing.assert_allclose(getattr(ctf, name)[::-1], getattr(first, name), atol=0.1 * min(first.error))
    assert ctf.handedness_score == pytest.approx(first.handedness_score, abs=1e-3)


def test_what_is_shown_is_what_is_written() -> None:
    """The fitted rings are those of the record's defocus and astigmatism, in the record's directions."""
    result = found("series")
    rings, ctf = result.rings, result.ctf
    assert rings.measured.shape[0] == SERIES.count
    inside = (rings.k > 0.04) & (rings.k < 0.08)
    k, direction = rings.k[inside], np.radians(rings.angle)[:, None]
    lam, cs = 0.0196875, 2.7e7  # Å at 300 kV, and Å
    for j in range(SERIES.count):
        turn = np.cos(2 * (direction - np.radians(ctf.angle[j])))
        z = (ctf.defocus_u[j] + ctf.defocus_v[j]) / 2 + (ctf.defocus_u[j] - ctf.defocus_v[j]) / 2 * turn
        chi = np.pi * lam * z * k**2 - np.pi / 2 * cs * lam**3 * k**4 + np.arcsin(0.07)
        fitted = rings.fitted[j][:, inside] - 1
        assert np.corrcoef(fitted.ravel(), -np.cos(2 * chi).ravel())[0, 1] > 0.95


def test_one_flat_image() -> None:
    """A micrograph: no heights, no hand; U - V of 800 Å, its direction and the defocus as they are."""
    film = Film(tilts=(0.0,), shape=(600, 560), astigmatism=800.0, angle=150.0, seed=5, drift=0.0)
    result = estimate(film.load, film.typed(), film.geometry())
    ctf = result.ctf
    assert result.hand == Hand(DEFAULT_HAND, 0.0, 0.0, 0.0) and not result.hand.decided
    assert (ctf.defocus_handedness, ctf.handedness_score) == (-1, 0.0)
    assert ctf.measured == (True,)
    assert abs(of(film, ctf)[0]) < 3.5 * ctf.error[0] < 250
    assert abs(ctf.defocus_u[0] - ctf.defocus_v[0] - 800) < 3 * ctf.astigmatism_error
    assert apart(ctf.angle[0], 150.0) < 8


def test_a_thick_film_is_told_and_a_thin_one_is_not() -> None:
    film = replace(SERIES, film=3000.0, tilts=(-20.0, -10.0, 0.0, 10.0, 20.0), astigmatism=0.0, signal=1.5)
    ctf = estimate(film.load, film.typed(), film.geometry()).ctf
    assert ctf.thickness == pytest.approx(3000.0, rel=0.15)
    assert found("series").ctf.thickness is None


@pytest.mark.parametrize("seed", range(6))
def test_noise_has_no_rings(seed: int) -> None:
    images = np.random.default_rng(seed).normal(100, 10, (5, *SHAPE)).astype(np.float32)
    with pytest.raises(InputError, match="no rings"):
        estimate(images.__getitem__, SERIES.typed(), SERIES.geometry())


def test_the_hand_is_as_sure_as_its_odds() -> None:
    """Equal evidence is undecided; log-odds of 2·artanh 0.9 are just enough; the sign is that of the better fit."""

    def fit(evidence, own):
        values = dict.fromkeys(Fit.__dataclass_fields__)
        return Fit(**{**values, "evidence": evidence, "own": np.array(own)})

    base = [5.0, 6.0, 4.0, 7.0]
    even = Hand.of(fit(100.0, base), fit(100.0, base))
    assert (even.score, even.decided, even.odds, even.spread) == (0.0, False, 0.0, 0.0)
    enough = 2 * np.arctanh(0.9)
    for sign in (-1, 1):
        gain = np.array([1.0, 3.0, 2.0, 2.0])
        minus, plus = (fit(100.0 + s * (enough + 1e-6) / 2, np.array(base) + s * gain / 2) for s in (-sign, sign))
        hand = Hand.of(minus, plus)
        assert hand.sign == sign and hand.decided
        assert hand.odds == pytest.approx(sign * enough, abs=1e-5)
        # the sum over its standard deviation: that of four values, √(2/3) each
        assert hand.spread == pytest.approx(sign * 8 / np.sqrt(4 * 2 / 3))
        less = Hand.of(fit(100.0, base), fit(100.0 + sign * (enough - 1e-3), base))
        assert not less.decided and less.sign == sign
