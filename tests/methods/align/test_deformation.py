"""Deformation beside the bundle adjustment: an injected field comes back, noise gives none."""

from __future__ import annotations

import numpy as np
import torch

from libemc.methods.align.bundle import Geometry, Tracks, adjust
from libemc.methods.align.deformation import Warp, fit_deformation, wandering
from libemc.numerics.splines import field_basis

FIELD = (4000.0, 3000.0)
SIGMA = 1.0


def series(seed: int, strength: float) -> tuple[Tracks, Geometry, np.ndarray, np.ndarray]:
    """Tracks, the start, image positions and the true displacements there: a 3 x 3 field growing along the tilts."""
    rng = np.random.default_rng(seed)
    flat = np.zeros(15)
    start = Geometry(flat + 80, np.linspace(-49, 49, 15), flat, flat + 1, np.zeros((15, 2)))
    truth = Geometry(start.axis + 0.5, start.tilt, flat, start.magnification, rng.normal(0, 20, (15, 2)))
    points = rng.uniform(-0.45, 0.45, (50, 3)) * [*FIELD, 600]
    at = truth.project(points)
    warp = Warp.of(3, FIELD, np.arange(15.0))
    amplitudes = rng.normal(0, strength, (warp.modes.shape[-1], 1))
    moves = np.einsum("tpam,mk,tk->tpa", warp.at(at), amplitudes, np.linspace(-1.5, 1.5, 15)[:, None])
    return Tracks.of(at + moves + rng.normal(0, SIGMA, at.shape), SIGMA), start, at, moves


def test_field_comes_back() -> None:
    tracks, start, at, moves = series(0, 6.0)
    fit = adjust(tracks, start)
    deformation, better, scores = fit_deformation(tracks, fit, FIELD)
    assert deformation is not None
    assert min(scores.values()) < 0.9
    # everything that can be seen is explained: what is left is the noise
    assert 0.8 < better.variance_factor < 1.25 < fit.variance_factor
    nodes = np.stack([deformation.dx, deformation.dy], axis=-1)
    basis = field_basis(torch.from_numpy(at), FIELD, deformation.rows, deformation.columns).numpy()
    found = np.einsum("tpn,tna->tpa", basis, nodes)
    predicted = better.geometry.project(better.points) + found
    wrong = predicted - (at + moves)
    assert np.sqrt((wrong**2).sum(-1).mean()) < 0.8 * SIGMA  # far below the noise of one measurement, sqrt(2)


def test_noise_gives_none() -> None:
    for seed in range(2):
        tracks, start, _, _ = series(10 + seed, 0.0)
        fit = adjust(tracks, start)
        deformation, same, _ = fit_deformation(tracks, fit, FIELD)
        assert deformation is None and same is fit


def test_few_landmarks_give_none() -> None:
    tracks, start, _, _ = series(20, 6.0)
    few = Tracks(tracks.position[:, :6], tracks.information[:, :6])
    fit = adjust(few, start)
    assert fit_deformation(few, fit, FIELD) == (None, fit, {})


def test_family_has_no_shift_turn_or_scale() -> None:
    warp = Warp.of(4, FIELD, np.arange(10.0))
    x, y = (side.ravel() for side in np.meshgrid(*(np.linspace(-f / 2, f / 2, 4) for f in FIELD)))
    dx, dy = warp.modes
    for left in (dx.sum(0), dy.sum(0), x @ dx + y @ dy, x @ dy - y @ dx):
        np.testing.assert_allclose(left, 0, atol=1e-8)  # rounding of 2000 Å over 32 nodes
    np.testing.assert_allclose(warp.walk.sum(0), 0, atol=1e-9)


def left_of_a_walk(count: int, noise: float, size: float) -> tuple[np.ndarray, ...]:
    """Residuals (T, P, 2) of landmarks that wander together in groups of a place, each fitted with a place of its own; where
    they are, what they do in the images (T, P, 2), the directions and the order."""
    rng = np.random.default_rng(11)
    tilts, order = np.linspace(-60, 60, 31), np.abs(np.arange(31) - 15) * 2
    order[16:] -= 1
    flat = np.zeros(31)
    directions = Geometry(flat + 80, tilts, flat, flat + 1, np.zeros((31, 2))).matrices[:, :2]
    group = np.repeat(np.arange(count // 4), 4)
    points = rng.uniform(-1500, 1500, (count // 4, 3))[group] + rng.normal(0, 30, (count, 3))
    walk = np.cumsum(rng.normal(0, size, (31, count // 4, 3)), axis=0)[:, group][order]
    seen = np.einsum("tai,tpi->tpa", directions, walk)
    basis = np.linalg.qr(directions.reshape(-1, 3))[0]
    both = (seen + rng.normal(0, noise, seen.shape)).transpose(0, 2, 1).reshape(62, -1)
    rest = (both - basis @ (basis.T @ both)).reshape(31, 2, -1).transpose(0, 2, 1)
    return rest, points, seen, directions, order


def test_wandering_is_told_from_its_residuals() -> None:
    """Ten groups that wander by 1 Å an exposure: their distance from the start within a quarter (of ten walks), although the
    residuals are less than 0.7 of it; twice as far at the end as after a quarter of the exposures."""
    residual, points, seen, directions, order = left_of_a_walk(40, 1.0, 1.0)
    truth = np.sqrt((seen**2).sum(-1).mean(1))
    found = wandering(residual, points, directions, order)
    whole = np.sqrt((found**2).mean()) / np.sqrt((truth**2).mean())
    assert 0.75 < whole < 1.33
    assert np.sqrt((residual**2).sum(-1).mean()) < 0.7 * np.sqrt((truth**2).mean())
    np.testing.assert_allclose(found[order == 29] / found[order == 6], (30 / 7) ** 0.5, rtol=0.35)  # foreshortening


def test_errors_of_measurement_do_not_wander() -> None:
    """Not where landmarks have neighbours; of eight alone no motion can be told from errors, and they count."""
    for count, least, most in ((40, 0.0, 0.5), (8, 1.0, 10.0)):
        residual, points, _, directions, order = left_of_a_walk(count, 1.0, 0.0)
        found = wandering(residual, points, directions, order)
        assert least <= np.sqrt((found**2).mean()) < most
    assert not wandering(np.full((31, 40, 2), np.nan), points, directions, order).any()
