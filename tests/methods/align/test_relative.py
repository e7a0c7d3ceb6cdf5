"""Absolute positions out of relative ones: smooth errors that differences hardly show, and how free the angles are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.align import relative
from libemc.methods.align.bundle import Geometry
from libemc.methods.align.relative import Differences, Moves
from libemc.numerics.overlap import Overlap, couplings
from libemc.numerics.slices import Band

COUNT = 25
LANDMARKS = 24
FLAT = np.zeros(COUNT)
START = Geometry(FLAT + 35.0, np.linspace(-60, 60, COUNT), FLAT, FLAT + 1, np.zeros((COUNT, 2)))
REACH = 100.0  # Å


@pytest.fixture(scope="module")
def links() -> np.ndarray:
    """(T, T, 2, 2) of a small object: what `numerics.overlap` says, as in `tracks.compare`."""
    matrices, band = torch.from_numpy(START.matrices), Band.of(32, 10.0)
    ones = torch.ones(COUNT)
    held, turned = couplings(matrices, band, Overlap(0.6), ones, ones.bool(), torch.ones(COUNT, len(band.kx)))
    out = (-torch.linalg.solve(held.sum(1)[:, None], held) @ turned.mT).numpy()
    out[range(COUNT), range(COUNT)] = np.eye(2)
    return out


POINTS = np.random.default_rng(7).uniform(-0.5, 0.5, (LANDMARKS, 3)) * [3000, 3000, 600]


def seen(links: np.ndarray, change: Geometry, place: np.ndarray, sigma: float) -> tuple[np.ndarray, ...]:
    """Differences (T, P, 2) that a change of geometry and places makes, to first order, with noise; their arguments."""
    jacobian, direction = START.jacobians(POINTS)
    step = (change.vector - START.vector).reshape(6, COUNT)
    moved = np.einsum("tpai,it->tpa", jacobian, step) + np.einsum("tai,pi->tpa", direction, place)
    difference = np.einsum("jiab,ipb->jpa", links, moved)
    difference += sigma * np.random.default_rng(8).standard_normal(difference.shape)
    information = np.broadcast_to(np.eye(2) / max(sigma, 1e-3) ** 2, (COUNT, LANDMARKS, 2, 2)).copy()
    return difference, information, moved


def explained(links: np.ndarray, difference: np.ndarray, information: np.ndarray) -> Moves:
    every = np.ones((COUNT, LANDMARKS), bool)
    of_all = np.broadcast_to(links, (LANDMARKS, *links.shape))
    return relative.explain(Differences(difference, information, of_all, every, START, POINTS, REACH))


def left(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Difference of shifts (T, 2) that no motion of the specimen explains."""
    design = START.matrices[:, :2].reshape(-1, 3)
    flat = (found - truth).reshape(-1)
    return (flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]).reshape(-1, 2)


def smooth() -> np.ndarray:
    """(T, 2) Å: a sine of 15 Å along the tilts."""
    angle = np.linspace(0, 2 * np.pi, COUNT)
    return 15.0 * np.stack([np.sin(angle), np.cos(angle)], axis=1)


def test_smooth_errors_are_recovered(links: np.ndarray) -> None:
    """From all but exact differences, all but exactly, though they show but half of it, or less."""
    place = np.random.default_rng(1).normal(0, 20, (LANDMARKS, 3))
    difference, information, moved = seen(links, replace(START, shift=smooth()), place, 1e-4)
    apparent = np.einsum("jiab,ib->ja", links, left(smooth(), 0 * smooth()))
    assert np.sqrt((apparent[3:-3] ** 2).mean()) < 0.6 * np.sqrt((left(smooth(), 0 * smooth()) ** 2).mean())
    moves = explained(links, difference, information)
    # differences of 1e-4 Å precision, of which smooth errors are seen less by a factor of some tens
    assert np.abs(left(moves.geometry.shift, smooth())).max() < 1e-3 * 15
    np.testing.assert_allclose(moves.geometry.tilt, START.tilt, atol=1e-4)
    np.testing.assert_allclose(moves.geometry.axis, START.axis, atol=1e-4)
    # positions of the landmarks: each but for a motion in space
    design = START.matrices[:, :2].reshape(-1, 3)
    flat = (moves.displacement - moved).transpose(0, 2, 1).reshape(-1, LANDMARKS)
    rest = flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]
    assert np.abs(rest).max() < 2e-3 * 15


def test_errors_are_honest_and_no_freedom_is_taken(links: np.ndarray) -> None:
    """With noise of 3 Å: shifts within what they're said to be, and the angles stay where they are."""
    difference, information, _ = seen(links, replace(START, shift=smooth()), np.zeros((LANDMARKS, 3)), 3.0)
    moves = explained(links, difference, information)
    assert moves.freedom == 0
    assert np.ptp(moves.geometry.axis) < 1e-9
    assert np.ptp(moves.geometry.tilt - START.tilt) < 1e-9
    assert abs(moves.geometry.axis[0] - START.axis[0]) < 0.3
    error = left(moves.geometry.shift, smooth())
    assert np.sqrt((error**2).sum(1).mean()) < 0.3 * 15
    # 50 numbers, correlated along the series: a factor of two
    ratio = np.sqrt((error**2).sum(1).mean() / (moves.error**2).mean())
    assert 0.4 < ratio < 2.0
    assert moves.error[[0, -1]].mean() > moves.error[COUNT // 2]


def test_freedom_where_the_axis_strays(links: np.ndarray) -> None:
    """An axis that strays by 0.3° from tilt to tilt is seen in 24 landmarks (8 Å at the field's edge, noise 3 Å)."""
    stray = np.random.default_rng(3).normal(0, 0.3, COUNT)
    stray -= stray.mean()
    truth = replace(START, axis=START.axis + stray, shift=smooth())
    moves = explained(links, *seen(links, truth, np.zeros((LANDMARKS, 3)), 3.0)[:2])
    assert moves.freedom > 0
    # a turn of the specimen can't be seen, so the axes' differences from neighbours; a third of what they strayed
    error = np.diff(moves.geometry.axis - truth.axis)
    assert error.std() < 0.35 * np.diff(stray).std()


def test_outliers_lose_their_weight(links: np.ndarray) -> None:
    difference, information, _ = seen(links, replace(START, shift=smooth()), np.zeros((LANDMARKS, 3)), 3.0)
    rng = np.random.default_rng(5)
    clean = left(explained(links, difference, information).geometry.shift, smooth())
    bad = rng.random((COUNT, LANDMARKS)) < 0.08
    difference[bad] += rng.normal(0, 60, (int(bad.sum()), 2))
    difference[rng.random((COUNT, LANDMARKS)) < 0.1] = np.nan
    moves = explained(links, difference, information)
    # a tenth of the data less, and what Huber's weights let through
    assert np.sqrt((left(moves.geometry.shift, smooth()) ** 2).mean()) < 2 * np.sqrt((clean**2).mean()) + 1.0
    missing = np.isnan(difference).all(-1)
    assert np.isnan(moves.displacement[missing]).all()
    assert np.isfinite(moves.displacement[~missing]).all()


def test_nothing_moves_where_there_is_nothing_to_find(links: np.ndarray) -> None:
    """Noise of 3 Å alone: cross-validation holds the images, which noise would move by several times as much."""
    difference, information, _ = seen(links, START, np.zeros((LANDMARKS, 3)), 3.0)
    moves = explained(links, difference, information)
    error = np.sqrt((left(moves.geometry.shift, 0 * smooth()) ** 2).sum(1).mean())
    expected = np.sqrt((moves.error**2).mean())  # were they free to move
    assert error < 0.5 * expected
