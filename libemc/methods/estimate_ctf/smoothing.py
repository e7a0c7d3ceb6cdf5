"""Values along a tilt series that belong together: a base that walks slowly, and a jitter from tilt to tilt around it.

A hidden Markov model on a grid: exact for any likelihood, also one with several maxima. How far the values jitter and the
base walks isn't known either: all that is tried counts as its evidence says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OUTLIERS = 0.02  # share of the values that jitter much more, and by how many times
OUTLYING = 10.0


@dataclass(frozen=True)
class Smoothed:
    """What a series of log-likelihoods says of its values.

    Attributes:
        evidence: log-probability of the data.
        mean, error: (T,) of each value, given all.
        own: (T,) log-probability of a tilt's data given the others', over that without a signal.
        others, others_error: (T,) what the others alone say of each.
        jitter, walk: the likeliest standard deviations, the base's from one to the next.
    """

    evidence: float
    mean: Array
    error: Array
    own: Array
    others: Array
    others_error: Array
    jitter: float
    walk: float


def smooth(
    likelihood: Array, grid: Array, jitters: Sequence[float], walks: Sequence[float], order: NDArray[np.int64]
) -> Smoothed:
    """The values given all of them.

    Args:
        likelihood: (T, Z) log-likelihoods of each value at the grid's points (Z,), equidistant; 0 is that of no signal.
        jitters, walks: standard deviations, all as likely beforehand; a walk of 0 is a constant base.
        order: (T,) numbers of the values in the order in which the base walks.
    """
    top = likelihood.max(1, keepdims=True)
    peaked = np.exp(likelihood - top)
    distance = np.abs(grid[:, None] - grid)
    tried: list[tuple[float, float, float, Array]] = []
    for jitter, walk in product(jitters, walks):
        kernel = (1 - OUTLIERS) * _normal(distance, jitter) + OUTLIERS * _normal(distance, OUTLYING * jitter)
        message = np.log(peaked @ kernel + 1e-300) + top
        evidence, others = _walk(message[order], None if walk == 0 else _normal(distance, walk))
        apart = np.empty_like(others)
        apart[order] = others @ kernel.T
        tried.append((evidence, jitter, walk, apart))
    evidences = np.array([t[0] for t in tried])
    share = np.exp(evidences - evidences.max())
    share /= share.sum()
    prior, whole = np.zeros_like(peaked), np.zeros((len(peaked), 1))
    for part, (*_, apart) in zip(share, tried, strict=True):
        alone = apart / apart.sum(1, keepdims=True)
        weight = part / (peaked * alone).sum(1, keepdims=True).clip(1e-300)  # without the tilt's own say
        prior, whole = prior + weight * alone, whole + weight
    prior /= whole
    own = np.log((peaked * prior).sum(1) + 1e-300) + top[:, 0]
    posterior = peaked * prior
    posterior /= posterior.sum(1, keepdims=True)
    mean = posterior @ grid
    error = np.sqrt(np.maximum((posterior * (grid - mean[:, None]) ** 2).sum(1), 0))
    others = prior @ grid
    spread = np.sqrt(np.maximum((prior * (grid - others[:, None]) ** 2).sum(1), 0))
    best = tried[int(share.argmax())]
    evidence = float(np.log(np.exp(evidences - best[0]).mean()) + best[0])
    return Smoothed(evidence, mean, error, own, others, spread, best[1], best[2])


def _normal(distance: Array, width: float) -> Array:
    """Normal distributions on the grid, each column's sum 1."""
    out = np.exp(-0.5 * (distance / width) ** 2)
    return np.asarray(out / out.sum(0))


def _walk(message: Array, step: Array | None) -> tuple[float, Array]:
    """Log-probability of all messages (T, Z) about the base, and for each the base's probability by all the others, (T, Z)."""
    size = message.shape[1]
    top = message.max(1, keepdims=True)
    peaked = np.exp(message - top)
    if step is None:
        total = message.sum(0)
        highest = total.max()
        evidence = float(np.log(np.exp(total - highest).sum() / size) + highest)
        others = total - message
        others = np.exp(others - others.max(1, keepdims=True))
        return evidence, others / others.sum(1, keepdims=True)
    evidence, others = _chain(peaked, step)
    return evidence + float(top.sum()), others / np.maximum(others.sum(1, keepdims=True), 1e-300)


def _chain(message: Array, step: Array) -> tuple[float, Array]:
    """Forwards and backwards along a chain of states (S, ...) that are all as likely at first.

    Args:
        message: (T, S, ...) probability of the data in each state.
        step: (S, S) of the first axis, from one to the next.

    Returns:
        Log-probability of all data, and (T, S, ...) each state's probability by the others' data, to a factor.
    """
    before, after = np.empty_like(message), np.empty_like(message)
    state, evidence = np.full(message.shape[1:], 1 / message[0].size), 0.0
    for t in range(len(message)):
        before[t] = state
        state = state * message[t]
        scale = max(state.sum(), 1e-300)
        evidence += float(np.log(scale))
        state = step @ (state / scale)
    state = np.ones(message.shape[1:])
    for t in reversed(range(len(message))):
        after[t] = state
        state = step.T @ (state * message[t])
        state /= max(state.max(), 1e-300)
    return evidence, before * after


@dataclass(frozen=True)
class SmoothedPair:
    """Defocus and phase shift of each tilt, given all.

    Attributes:
        evidence: log-probability of the data.
        mean, error: (T,) of the defocus; phase, phase_error: (T,) radians.
        own, others, others_error: as of `Smoothed`.
        jitter, walk: of the defocus around its base, and of the phase from one tilt to the next.
    """

    evidence: float
    mean: Array
    error: Array
    phase: Array
    phase_error: Array
    own: Array
    others: Array
    others_error: Array
    jitter: float
    walk: float


def smooth_pair(
    likelihood: Array,
    grid: Array,
    phases: Array,
    jitters: Sequence[float],
    walks: Sequence[float],
    order: NDArray[np.int64],
) -> SmoothedPair:
    """Defoci that jitter around a constant base, and phase shifts that walk around the half circle.

    Args:
        likelihood: (T, P, Z) of each tilt's phase shift and defocus.
        grid: (Z,) Å; phases: (P,) radians, equidistant over the whole of the half circle.
        order: as in `smooth`.
    """
    top = likelihood.max((1, 2), keepdims=True)
    peaked = np.exp(likelihood - top)
    distance = np.abs(grid[:, None] - grid)
    turn = np.abs((phases[:, None] - phases + math.pi / 2) % math.pi - math.pi / 2)
    best: tuple[float, float, float, Array] | None = None
    for jitter, walk in product(jitters, walks):
        kernel = (1 - OUTLIERS) * _normal(distance, jitter) + OUTLIERS * _normal(distance, OUTLYING * jitter)
        message = (peaked @ kernel)[order]  # (T, P, base)
        step = np.eye(len(phases)) if walk == 0 else _normal(turn, walk)
        evidence, chained = _chain(message, step)
        if best is None or evidence > best[0]:
            others = np.empty_like(message)
            others[order] = chained
            best = evidence, jitter, walk, others @ kernel.T
    assert best is not None
    evidence, jitter, walk, prior = best
    evidence += float(top.sum())
    prior /= prior.sum((1, 2), keepdims=True)
    posterior = peaked * prior
    own = np.log(posterior.sum((1, 2)) + 1e-300) + top[:, 0, 0]
    alone = prior.sum(1)
    others = alone @ grid
    spread = np.sqrt((alone * (grid - others[:, None]) ** 2).sum(1))
    posterior /= posterior.sum((1, 2), keepdims=True)
    over_grid, over_phase = posterior.sum(1), posterior.sum(2)
    mean = over_grid @ grid
    error = np.sqrt((over_grid * (grid - mean[:, None]) ** 2).sum(1))
    arrow = over_phase @ np.exp(2j * phases)
    phase = (np.angle(arrow) / 2) % math.pi
    apart = (phases - phase[:, None] + math.pi / 2) % math.pi - math.pi / 2
    phase_error = np.sqrt((over_phase * apart**2).sum(1))
    return SmoothedPair(evidence, mean, error, phase, phase_error, own, others, spread, jitter, walk)
