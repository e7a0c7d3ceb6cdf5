"""The CTF of a tilt series, from images and alignment to what its record says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.methods.estimate_ctf.result import Rings
from libemc.methods.estimate_ctf.series import NEAR, PHASES, WORTH, Fit, Series
from libemc.methods.estimate_ctf.spectra import measure
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.ctf import Optics
from libemc.records import Ctf, TiltSeriesRecord

HEIGHTS = 200.0  # Å: where no tile is higher than this, there is no gradient to see
AGAIN = 200.0  # Å around the astigmatism first found, for a second look
LEAST_EVIDENCE = 6.0  # of rings in the whole series; noise reaches half of that
SURE = 0.9  # score of the hand from which on it is decided
DEFAULT_HAND = -1


@dataclass(frozen=True)
class Hand:
    """Which sign of the heights the spectra support.

    Attributes:
        sign: -1 or 1; the default where there's nothing to see.
        odds: log-odds of +1 over -1.
        spread: how many of its own standard deviations, from tilt to tilt, the difference of the evidence is.
        score: 0, undecided, to 1.
    """

    sign: int
    odds: float
    spread: float
    score: float

    @property
    def decided(self) -> bool:
        """Whether to believe it."""
        return self.score >= SURE

    @staticmethod
    def of(minus: Fit, plus: Fit) -> Hand:
        """From the fits with either sign; the score is that of the posterior probability, 2P - 1."""
        odds = plus.evidence - minus.evidence
        each = plus.own - minus.own
        spread = float(each.sum() / max(math.sqrt(len(each)) * each.std(ddof=1), 1e-9)) if len(each) > 2 else 0.0
        return Hand(1 if odds > 0 else -1, odds, spread, math.tanh(abs(odds) / 2))


@dataclass(frozen=True)
class Estimate:
    """The record's section, what pictures show, and why the hand is what it is."""

    ctf: Ctf
    rings: Rings
    hand: Hand


def estimate(
    load: Callable[[int], NDArray[np.float32]],
    record: TiltSeriesRecord,
    geometry: TiltGeometry,
    phase_plate: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """The CTF of all tilts.

    Args:
        load: gives image j (rows, columns), for j in 0 ... T-1.
        record: of the tilt series; its alignment's thickness is used where there is one.
        geometry: of the T images.
        phase_plate: whether to look for a phase shift.
        tell: takes what has just been done.

    Raises:
        InputError: no used image has rings.
    """
    source = record.source
    optics = Optics(source.voltage, source.cs, source.amplitude_contrast)
    spectra = measure(load, (source.shape[1], source.shape[2]), source.pixel_size, geometry)
    tell("spectra")
    known = record.alignment.thickness if record.alignment else None
    order = record.tilts.order or record.tilts.dose_before
    series = Series(spectra, optics, known, order)
    shifts: Sequence[float] = PHASES[::2].tolist() if phase_plate else [0.0]
    fits = {}
    for sign in (-1, 1):
        if sign == 1 and np.abs(spectra.height).max() < HEIGHTS:
            continue
        start = series.search(sign, shifts)
        first = series.refine(start, series.rows(False))
        fits[sign] = series.refine(first.state, list(first.rows), first.surplus)
    hand = Hand.of(fits[-1], fits[1]) if len(fits) == 2 else Hand(DEFAULT_HAND, 0.0, 0.0, 0.0)
    fit = fits[hand.sign]
    tell("defocus and hand")
    if fit.evidence < LEAST_EVIDENCE or not (fit.own > WORTH).any():
        raise InputError("no rings are seen", source.stack, "look at the images, their pixel size and voltage")
    if phase_plate:
        fit = series.refine_phases(fit.state, list(fit.rows), fit.surplus)
        tell("phase shift")
    turned = series.astigmatic(series.refine(fit.state, series.rows(True), fit.surplus, NEAR))
    last = series.refine(turned.state, list(turned.rows), turned.surplus, NEAR)
    turned = series.astigmatic_each(series.astigmatic(last, AGAIN))
    last = series.refine(turned.state, list(turned.rows), turned.surplus, NEAR)
    tell("astigmatism")
    thickness = series.seen_thickness(last)
    rings, score, limit = series.shown(last)
    value = fit if phase_plate else last
    return Estimate(_section(record, series, value, turned, hand, score, limit, thickness), rings, hand)


def _section(
    record: TiltSeriesRecord,
    series: Series,
    value: Fit,
    turned: Fit,
    hand: Hand,
    score: NDArray[np.float64],
    limit: NDArray[np.float64],
    thickness: float | None,
) -> Ctf:
    """The record's section: tilts that were not looked at have the series' values."""
    tilts, state = series.tilts, value.state
    half = np.hypot(*turned.state.stretch.T)
    angle = np.degrees(np.arctan2(turned.state.stretch[:, 1], turned.state.stretch[:, 0])) / 2 % 180

    def every(values: NDArray[np.float64], other: float) -> tuple[float, ...]:
        out = np.full(len(record.tilts.use), other)
        out[tilts] = values
        return tuple(out.tolist())

    def scores(values: NDArray[np.float64]) -> tuple[float | None, ...]:
        return tuple(v if math.isfinite(v) else None for v in every(values, math.nan))

    measured = value.own > WORTH
    defocus = np.where(measured, state.defocus, value.others)
    error = np.where(measured, value.error, value.others_error)
    mean, stretch = float(np.median(defocus)), np.median(turned.state.stretch, axis=0)
    middle, usual = float(np.hypot(*stretch)), float(np.degrees(np.arctan2(stretch[1], stretch[0])) / 2 % 180)
    shift = np.degrees(state.shift)
    return Ctf(
        defocus_u=every(defocus + half, mean + middle),
        defocus_v=every(defocus - half, mean - middle),
        angle=every(angle, usual),
        phase_shift=every(shift, float(np.median(shift))),
        score=scores(score),
        resolution=scores(np.where(measured, limit, np.nan)),
        error=scores(error),
        astigmatism_error=turned.stretch_error,
        phase_error=scores(np.degrees(value.phase_error)) if value.phase_error.any() else None,
        measured=tuple(m > 0 for m in every(measured.astype(float), 0.0)),
        thickness=thickness,
        defocus_handedness=1 if hand.sign > 0 else -1,
        handedness_score=hand.score,
    )
