"""Bundle adjustment: exact derivatives, exact recovery, the Cramér-Rao bound, honest errors, outliers, poor data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from libemc.errors import InputError
from libemc.methods.align.bundle import KINDS, Freedom, Geometry, Tracks, adjust
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment

SIGMA = 1.0


def nominal(tilts: int, axis: float = 85.0, low: float = -60.0) -> Geometry:
    flat = np.zeros(tilts)
    return Geometry(flat + axis, np.linspace(low, 60, tilts), flat, flat + 1, np.zeros((tilts, 2)))


def wrong(rng: np.random.Generator, start: Geometry, angle: float = 0.15) -> Geometry:
    """A true geometry: axis off and drifting, angles off, magnification smooth, shifts of 30 Å."""
    n = len(start.tilt)
    x = np.linspace(-1, 1, n)
    off = rng.normal(0, angle, n)
    magnification = 1 + 0.003 * rng.normal() * x + 0.002 * rng.normal() * x**2
    return Geometry(
        start.axis + rng.normal() + 0.1 * x,
        start.tilt + off - off.mean(),
        start.xtilt,
        magnification / magnification.mean(),
        rng.normal(0, 30, (n, 2)),
    )


def series(
    seed: int, tilts: int = 25, count: int = 24, sigma: float = SIGMA, outliers: float = 0.05, missing: float = 0.1
) -> tuple[Tracks, Geometry, Geometry, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = nominal(tilts)
    truth = wrong(rng, start)
    points = rng.uniform(-0.5, 0.5, (count, 3)) * [3000, 3000, 800]
    seen = truth.project(points) + rng.normal(0, sigma, (tilts, count, 2)) if sigma else truth.project(points)
    bad = rng.random((tilts, count)) < outliers
    seen[bad] += rng.normal(0, 200, (int(bad.sum()), 2))
    seen[rng.random((tilts, count)) < missing] = np.nan
    return Tracks.of(seen, sigma or SIGMA), start, truth, points


def error(geometry: Geometry, truth: Geometry, points: np.ndarray) -> np.ndarray:
    """(T,) rms distance of the images of the points, after the best rigid motion of the specimen."""
    turn, move, target = np.eye(3), np.zeros(3), truth.project(points)
    for _ in range(6):
        here = points @ turn.T + move
        k = geometry.jacobians(here)[1]
        cross = np.stack([np.stack([np.cross(e, p) for e in np.eye(3)], axis=1) for p in here])
        rows = [np.concatenate([np.broadcast_to(m, (len(here), 2, 3)), m @ cross], axis=-1) for m in k]
        left = (target - geometry.project(here)).ravel()
        step = np.linalg.lstsq(np.concatenate(rows).reshape(-1, 6), left, rcond=None)[0]
        by = Rotation.from_rotvec(step[3:]).as_matrix()
        turn, move = by @ turn, by @ move + step[:3]
    return np.sqrt(((target - geometry.project(points @ turn.T + move)) ** 2).sum(-1).mean(-1))


def test_projection_is_the_suite_s_own() -> None:
    rng = np.random.default_rng(0)
    g = wrong(rng, replace(nominal(5), xtilt=rng.normal(0, 2, 5)))
    points = rng.normal(0, 500, (4, 3))
    q = np.einsum(
        "tij,pj->tpi", tilt_matrices(*(torch.from_numpy(a) for a in (g.axis, g.tilt, g.xtilt))).numpy(), points
    )
    expected = g.magnification[:, None, None] * (q[..., :2] + g.shift[:, None])
    np.testing.assert_allclose(g.project(points), expected, atol=1e-9)  # rounding of 500 Å in float64


def test_jacobians_are_the_derivatives() -> None:
    rng = np.random.default_rng(1)
    g = wrong(rng, replace(nominal(4, axis=-30), xtilt=rng.normal(0, 3, 4)))
    points = rng.normal(0, 500, (3, 3))
    by_geometry, by_point = g.jacobians(points)
    h = 1e-5
    for i in range(6):
        step = np.zeros((6, 4))
        step[i] = h
        ahead, back = (Geometry.from_vector(g.vector + s * step.ravel()).project(points) for s in (1, -1))
        # central differences: rounding 1e-13 of 500 Å over h is 5e-6
        np.testing.assert_allclose(by_geometry[..., i], (ahead - back) / (2 * h), atol=2e-5)
    for i in range(3):
        ahead, back = (g.project(points + s * h * np.eye(3)[i]) for s in (1, -1))
        difference = np.broadcast_to(by_point[:, None, :, i], ahead.shape)
        np.testing.assert_allclose(difference, (ahead - back) / (2 * h), atol=2e-5)


def test_record_there_and_back() -> None:
    g = wrong(np.random.default_rng(2), nominal(3))
    flat = (0.0, 0.0, 0.0)
    record = Alignment(axis=flat, tilt=flat, xtilt=flat, shift_x=flat, shift_y=flat)
    assert np.array_equal(Geometry.of(record).magnification, np.ones(3))
    np.testing.assert_array_equal(Geometry.of(g.into(record)).vector, g.vector)


def test_exact_tracks_are_fitted_exactly() -> None:
    tracks, start, truth, points = series(3, sigma=0.0, outliers=0.0)
    fit = adjust(tracks, start, Freedom((1.0, 1.0), (0.0, 3.0), (0.0, 0.0), (0.01, 0.01)))
    # priors of some degrees against landmarks of 1 Å, hundreds of them: a bias far below a tenth of that
    assert error(fit.geometry, truth, points).max() < 0.1
    assert fit.variance_factor < 0.1


def test_gauge_is_held() -> None:
    tracks, start, _, _ = series(4)
    fit = adjust(tracks, start)
    for kind in KINDS[1:]:
        assert getattr(fit.geometry, kind).mean() == pytest.approx(getattr(start, kind).mean(), abs=1e-9)


def test_close_to_the_bound_and_honest() -> None:
    ratios, losses = [], []
    for seed in range(3):
        tracks, start, truth, points = series(10 + seed)
        fit = adjust(tracks, start, seed=seed)
        made = np.sqrt((error(fit.geometry, truth, points) ** 2).mean())
        ratios.append(made / np.sqrt((fit.error**2).mean()))
        # the bound: the same data without outliers, with the true strengths known
        clean = np.where(np.isnan(tracks.position), np.nan, tracks.position)
        far = np.linalg.norm(clean - truth.project(points), axis=-1) > 6 * SIGMA
        clean[far] = np.nan
        ideal = adjust(Tracks.of(clean, SIGMA), start, Freedom((0.1, 0.0), (0.0, 0.15), (0.0, 0.0), (0.003, 0.0)))
        losses.append(made / np.sqrt((ideal.error**2).mean()))
    assert 0.7 < np.mean(ratios) < 1.4
    assert np.mean(losses) < 1.25  # Tukey's efficiency of 0.95, and what choosing the freedom costs


def test_freedom_follows_the_data() -> None:
    rng = np.random.default_rng(20)
    start = nominal(31)
    points = rng.uniform(-0.5, 0.5, (25, 3)) * [3000, 3000, 800]
    still = replace(start, shift=rng.normal(0, 30, (31, 2)))
    off = rng.normal(0, 0.5, 31)
    moved = replace(still, tilt=start.tilt + off - off.mean())
    chosen = []
    for truth in (still, moved):
        tracks = Tracks.of(truth.project(points) + rng.normal(0, SIGMA, (31, 25, 2)), SIGMA)
        chosen.append(adjust(tracks, start).freedom)
    assert max(*chosen[0].tilt, *chosen[0].axis) <= 0.1
    assert chosen[1].tilt[1] >= 0.3


def test_bad_landmark_and_bad_tilt_lose_their_weight() -> None:
    tracks, start, truth, points = series(30, outliers=0.0)
    rng = np.random.default_rng(31)
    position = tracks.position.copy()
    position[:, 3] += rng.normal(0, 30, (25, 2))
    position[7] += rng.normal(0, 30, position[7].shape)
    fit = adjust(Tracks.of(position, SIGMA), start)
    usual = np.median(fit.weight[tracks.seen])
    assert fit.weight[:, 3].mean() < 0.1 * usual and fit.weight[7].mean() < 0.1 * usual
    others = np.delete(error(fit.geometry, truth, points), 7)
    assert others.max() < 2 * SIGMA
    assert fit.error[7] > 2 * np.median(fit.error)


def test_poor_data_is_survived() -> None:
    """Three landmarks, half of the places missing, tilts with none: finite, and the errors say which tilts are lost."""
    tracks, start, truth, points = series(40, count=3, outliers=0.0, missing=0.3)
    position = tracks.position.copy()
    position[5] = position[6, :2] = np.nan
    position[20:23] = np.nan
    fit = adjust(Tracks.of(position, SIGMA), start)
    assert np.isfinite(fit.geometry.vector).all() and np.isfinite(fit.error).all()
    good = (fit.weight > 0.1).sum(1) >= 2
    assert fit.error[[5, 20, 21, 22]].min() > 100
    assert np.sqrt((error(fit.geometry, truth, points)[good] ** 2).mean()) < 10 * SIGMA


@pytest.mark.parametrize("low, thick", [(0.0, 800.0), (-60.0, 1.0)])
def test_one_sided_and_thin(low: float, thick: float) -> None:
    rng = np.random.default_rng(50)
    start = nominal(25, low=low)
    truth = wrong(rng, start)
    points = rng.uniform(-0.5, 0.5, (30, 3)) * [3000, 3000, thick]
    fit = adjust(Tracks.of(truth.project(points) + rng.normal(0, SIGMA, (25, 30, 2)), SIGMA), start)
    made = np.sqrt((error(fit.geometry, truth, points) ** 2).mean())
    assert made < 2 * np.sqrt((fit.error**2).mean()) and made < 2 * SIGMA


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(InputError, match="no landmark"):
        adjust(Tracks.of(np.full((5, 3, 2), np.nan), SIGMA), nominal(5))
    with pytest.raises(InputError, match="tilts"):
        adjust(Tracks.of(np.zeros((5, 3, 2)), SIGMA), nominal(4))
