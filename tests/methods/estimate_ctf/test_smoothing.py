"""smoothing: against sums over all values and bases of a short series, one by one."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest

from libemc.methods.estimate_ctf import smoothing
from libemc.methods.estimate_ctf.smoothing import smooth, smooth_pair

GRID = 20000 + 150.0 * np.arange(6)
INORDER = np.arange(4)


def likelihoods(seed=0, shape=(4, 6), scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def transition(grid, width, turn=False):
    """P(value | base), a column for each base; a value outside jitters ten times as much, in two of a hundred."""

    def normal(w):
        out = np.exp(-0.5 * ((grid[:, None] - grid) / w) ** 2)
        return out / out.sum(0)

    return 0.98 * normal(width) + 0.02 * normal(10 * width)


def step(grid, width):
    """P(next base | base)."""
    if width == 0:
        return np.eye(len(grid))
    out = np.exp(-0.5 * ((grid[:, None] - grid) / width) ** 2)
    return out / out.sum(0)


def everything(likelihood, jitter, walk, order):
    """The probability of the data, and its parts (T, Z) in which value t is z: over all bases and all values."""
    count, size = likelihood.shape
    given, going = transition(GRID, jitter), step(GRID, walk)
    total, parts = 0.0, np.zeros((count, size))
    for bases in product(range(size), repeat=count):  # in the order of the walk
        chance = 1 / size
        for before, after in pairwise(bases):
            chance *= going[after, before]
        if chance == 0:
            continue
        each = np.array([given[:, b] * np.exp(likelihood[t]) for t, b in zip(order, bases, strict=True)])  # (place, Z)
        sums = each.sum(1)
        total += chance * sums.prod()
        for place, t in enumerate(order):
            parts[t] += chance * np.delete(sums, place).prod() * each[place]
    return total, parts


@pytest.mark.parametrize("walk", [0.0, 120.0])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_one_jitter_and_one_walk(walk: float, order: tuple[int, ...]) -> None:
    likelihood, jitter = likelihoods(), 200.0
    total, parts = everything(likelihood, jitter, walk, order)
    found = smooth(likelihood, GRID, (jitter,), (walk,), np.array(order))
    assert found.evidence == pytest.approx(math.log(total), abs=1e-9)
    posterior = parts / parts.sum(1, keepdims=True)
    mean = posterior @ GRID
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    want = np.sqrt((posterior * (GRID - mean[:, None]) ** 2).sum(1))
    np.testing.assert_allclose(found.error, want, atol=1e-6)
    for t in range(4):
        others, _ = everything(np.where(np.arange(4)[:, None] == t, 0.0, likelihood), jitter, walk, order)
        assert found.own[t] == pytest.approx(math.log(total / others), abs=1e-9)
    assert (found.jitter, found.walk) == (jitter, walk)


def test_jitters_and_walks_that_are_not_known() -> None:
    """All are as likely beforehand; each counts as the data make it likely, and the likeliest is named."""
    likelihood, jitters, walks = likelihoods(4, scale=3.0), (60.0, 400.0), (0.0, 200.0)
    tried = [(jitter, walk, *everything(likelihood, jitter, walk, INORDER)) for jitter, walk in product(jitters, walks)]
    found = smooth(likelihood, GRID, jitters, walks, INORDER)
    totals = np.array([t[2] for t in tried])
    assert found.evidence == pytest.approx(math.log(totals.mean()), abs=1e-9)
    assert (found.jitter, found.walk) == tried[int(totals.argmax())][:2]
    posterior = np.sum([t[3] for t in tried], axis=0)
    posterior /= posterior.sum(1, keepdims=True)
    np.testing.assert_allclose(found.mean, posterior @ GRID, atol=1e-3)
    for t in range(4):
        without = np.where(np.arange(4)[:, None] == t, 0.0, likelihood)
        others = np.mean([everything(without, j, w, INORDER)[0] for j, w in product(jitters, walks)])
        assert found.own[t] == pytest.approx(math.log(totals.mean() / others), abs=1e-6)


def test_the_order_of_the_tilts_is_only_their_order() -> None:
    """Tilts that lie otherwise in the stack, and the order in which they were taken turned with them."""
    grid = 15000 + 100.0 * np.arange(40)
    likelihood = likelihoods(2, (7, 40))
    before = np.array([3, 4, 2, 5, 1, 6, 0])
    moved = np.array([6, 2, 0, 5, 1, 3, 4])  # what was at moved[i] is now at i
    back = np.argsort(moved)
    first = smooth(likelihood, grid, (100.0, 300.0), (0.0, 150.0), before)
    second = smooth(likelihood[moved], grid, (100.0, 300.0), (0.0, 150.0), back[before])
    for name in ("mean", "error", "own"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name)[moved], rtol=1e-9)
    assert second.evidence == pytest.approx(first.evidence)
    shuffled = smooth(likelihood, grid, (100.0,), (150.0,), np.arange(7))
    assert shuffled.evidence != pytest.approx(smooth(likelihood, grid, (100.0,), (150.0,), before).evidence, abs=1e-3)


def parabolas(centres, errors, grid, height=30.0):
    return height - 0.5 * ((grid - np.array(centres)[:, None]) / np.array(errors)[:, None]) ** 2


def test_a_flat_tilt_takes_what_the_others_say_and_an_outlier_changes_nothing() -> None:
    """Three tilts of 12 are flat, and one is sharp 4000 Å off: it keeps its value, the flat ones have the others'."""
    grid = np.arange(12000.0, 24000.0, 50.0)
    centres = np.full(12, 16000.0) + np.tile([-40.0, 40.0], 6)
    likelihood = parabolas(centres, np.full(12, 60.0), grid)
    likelihood[[2, 7, 11]] = 0.0
    clean = smooth(likelihood, grid, (60.0, 240.0), (0.0, 60.0), np.arange(12))
    np.testing.assert_allclose(clean.mean[[2, 7, 11]], 16000.0, atol=40)
    assert (clean.error[[2, 7, 11]] > clean.error[[0, 5]].max()).all()
    np.testing.assert_allclose(clean.own[[2, 7, 11]], 0, atol=1e-6)
    assert (np.delete(clean.own, [2, 7, 11]) > 25).all()
    likelihood[5] = parabolas([20000.0], [60.0], grid)[0]
    spoilt = smooth(likelihood, grid, (60.0, 240.0), (0.0, 60.0), np.arange(12))
    assert spoilt.mean[5] == pytest.approx(20000.0, abs=60)
    others = [0, 1, 3, 4, 6, 8, 9, 10]
    np.testing.assert_allclose(spoilt.mean[others], clean.mean[others], atol=30)
    np.testing.assert_allclose(spoilt.mean[[2, 7, 11]], 16000.0, atol=100)


def test_a_tilt_with_two_maxima_takes_the_others() -> None:
    grid = np.arange(12000.0, 24000.0, 50.0)
    likelihood = parabolas(np.full(5, 15000.0), np.full(5, 80.0), grid)
    likelihood[2] = np.logaddexp(likelihood[2], parabolas([21000.0], [80.0], grid, 33.0)[0])  # its own is the other one
    found = smooth(likelihood, grid, (60.0, 240.0), (0.0,), np.arange(5))
    assert found.mean[2] == pytest.approx(15000.0, abs=30)


def test_errors_of_many_sharp_tilts_are_their_own() -> None:
    """Likelihoods much sharper than the jitter: nothing to be gained from the others. Less sharp ones: they gain."""
    grid = np.arange(14000.0, 18000.0, 10.0)
    jumps = 16000 + np.random.default_rng(1).normal(0, 500, 9)
    sharp = smooth(parabolas(jumps, np.full(9, 40.0), grid), grid, (480.0,), (0.0,), np.arange(9))
    np.testing.assert_allclose(sharp.error, 40.0, rtol=0.03)
    np.testing.assert_allclose(sharp.mean, jumps, atol=8)
    same = smooth(parabolas(np.full(9, 16000.0), np.full(9, 300.0), grid), grid, (60.0,), (0.0,), np.arange(9))
    assert (same.error < 150).all()  # 300/√9, and the jitter


def test_a_walking_base_follows_a_drift() -> None:
    """A drift of 200 Å a tilt that a constant base cannot have: the walk's evidence is higher, and flat tilts are between."""
    grid = np.arange(14000.0, 20000.0, 20.0)
    centres = 15000 + 200.0 * np.arange(15)
    likelihood = parabolas(centres, np.full(15, 50.0), grid)
    likelihood[7] = 0.0
    found = smooth(likelihood, grid, (60.0,), (0.0, 60.0, 250.0), np.arange(15))
    assert found.walk == 250.0
    assert found.mean[7] == pytest.approx(centres[7], abs=40)
    still = smooth(
        parabolas(np.full(15, 15000.0), np.full(15, 50.0), grid), grid, (60.0,), (0.0, 60.0, 250.0), INORDER15
    )
    assert still.walk == 0.0


INORDER15 = np.arange(15)


# ----------------------------------------------------------------------------------------------- defocus and phase shift

PHASES = np.radians([0.0, 45.0, 90.0, 135.0])


def turning(walk):
    """P(next phase | phase) around the half circle."""
    if walk == 0:
        return np.eye(4)
    apart = PHASES[:, None] - PHASES
    apart = np.minimum(np.abs(apart), math.pi - np.abs(apart))
    out = np.exp(-0.5 * (apart / walk) ** 2)
    return out / out.sum(0)


@pytest.mark.parametrize("walk", [0.0, math.radians(30.0)])
def test_pairs_against_all_that_there_are(walk: float) -> None:
    """A constant base, values that jitter around it, and phases that walk: all bases and all ways of the phase."""
    grid, order, jitter = GRID[:4], np.array([1, 2, 0]), 200.0
    likelihood = likelihoods(6, (3, 4, 4))
    given, going = transition(grid, jitter), turning(walk)
    total, parts = 0.0, np.zeros((3, 4, 4))
    for base in range(4):
        each = np.exp(likelihood) * given[:, base]  # (T, P, Z)
        for phases in product(range(4), repeat=3):
            chance = 1 / 16 * going[phases[1], phases[0]] * going[phases[2], phases[1]]
            rows = [each[t, p] for t, p in zip(order, phases, strict=True)]
            sums = np.array([r.sum() for r in rows])
            total += chance * sums.prod()
            for place, (t, p) in enumerate(zip(order, phases, strict=True)):
                parts[t, p] += chance * np.delete(sums, place).prod() * rows[place]
    found = smooth_pair(likelihood, grid, PHASES, (jitter,), (walk,), order)
    assert found.evidence == pytest.approx(math.log(total), abs=1e-9)
    posterior = parts / parts.sum((1, 2), keepdims=True)
    mean = posterior.sum(1) @ grid
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    spread = (posterior.sum(1) * (grid - mean[:, None]) ** 2).sum(1)
    np.testing.assert_allclose(found.error, np.sqrt(spread), atol=1e-6)
    arrow = posterior.sum(2) @ np.exp(2j * PHASES)
    np.testing.assert_allclose(np.exp(2j * found.phase), arrow / np.abs(arrow), atol=1e-9)
    assert (found.phase >= 0).all() and (found.phase < math.pi).all()
    apart = [[min((p - f) % math.pi, (f - p) % math.pi) for p in PHASES] for f in found.phase]
    want = np.sqrt((posterior.sum(2) * np.array(apart) ** 2).sum(1))
    np.testing.assert_allclose(found.phase_error, want, atol=1e-9)


def test_the_likeliest_jitter_and_walk_of_pairs() -> None:
    grid, order, likelihood = GRID[:4], np.arange(3), likelihoods(7, (3, 4, 4))
    tried = {
        (j, w): smooth_pair(likelihood, grid, PHASES, (j,), (w,), order) for j in (80.0, 500.0) for w in (0.0, 0.3, 1.0)
    }
    best = max(tried, key=lambda key: tried[key].evidence)
    found = smooth_pair(likelihood, grid, PHASES, (80.0, 500.0), (0.0, 0.3, 1.0), order)
    assert (found.jitter, found.walk) == best
    np.testing.assert_allclose(found.phase, tried[best].phase)
    np.testing.assert_allclose(found.mean, tried[best].mean)


def test_phases_over_the_end_of_the_half_circle() -> None:
    """Phases about 178 degrees, which reach over to 3: their mean stays there."""
    phases = np.radians(np.arange(0.0, 180.0, 5.0))
    turn = (phases - math.radians(178.0) + math.pi / 2) % math.pi - math.pi / 2
    likelihood = np.tile(-0.5 * (turn / math.radians(6.0))[:, None] ** 2, (5, 1, 4))
    found = smooth_pair(likelihood, GRID[:4], phases, (200.0,), tuple(np.radians([0.0, 5.0])), np.arange(5))
    np.testing.assert_allclose(np.degrees(found.phase), 178.0, atol=1.0)
    assert (np.degrees(found.phase_error) < 6).all()


def test_nothing_at_all() -> None:
    """Flat likelihoods: the evidence of no signal, and no tilt has any of its own."""
    found = smooth(np.zeros((4, 30)), 100.0 * np.arange(30), (60.0, 500.0), (0.0, 100.0), INORDER)
    assert found.evidence == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(found.own, 0.0, atol=1e-9)
    assert smoothing.OUTLIERS > 0
