"""Landmarks: peaks of a coarse tomogram that most images show, from all parts of the field."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from libemc.methods.align import landmarks
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices

TILTS = torch.linspace(-54, 54, 19, dtype=torch.float64)
PIXEL_SIZE = 25.0  # Å
DIAMETER = 300.0
FIELD = 2000.0, 1600.0


def geometry(axis: float = 10.0) -> TiltGeometry:
    one = torch.ones(len(TILTS), dtype=torch.float64)
    return TiltGeometry(tilt_matrices(axis, TILTS, 0.0), torch.zeros(len(TILTS), 2).double(), one, one.bool())


def volume(points: np.ndarray, height: float = 6.0, shape: tuple[int, ...] = (16, 80, 80)) -> torch.Tensor:
    """Noise with blobs of 30 Å at points (P, 3) Å, dark."""
    out = 0.5 * np.random.default_rng(0).standard_normal(shape)
    grid = np.stack(np.meshgrid(*[(np.arange(n) - n // 2) * PIXEL_SIZE for n in shape], indexing="ij")[::-1], -1)
    for point in points:
        out -= height * np.exp(-((grid - point) ** 2).sum(-1) / (2 * 30**2))
    return torch.from_numpy(out).float()


def test_peaks_are_found() -> None:
    """All that stand out and are seen, to a voxel or two, since energy is summed around them."""
    y, x = np.meshgrid([-500.0, 0.0, 500.0], [-600.0, -200.0, 200.0, 600.0])
    z = 75.0 * np.array([-1, 0, 1, 0] * 3)
    points = np.stack([x.ravel(), y.ravel(), z], 1)
    hidden = np.array([[-960.0, -760.0, 0.0]])  # in the corner, half of it out of every image
    found = landmarks.find(volume(np.concatenate([points, hidden])), PIXEL_SIZE, geometry(), FIELD, DIAMETER, 18)
    distance = torch.cdist(torch.from_numpy(points), found)
    assert len(found) == 18  # and some of the noise
    assert float(distance.min(1).values.max()) < 1.5 * PIXEL_SIZE
    assert float(torch.cdist(torch.from_numpy(hidden), found).min()) > 2 * PIXEL_SIZE
    apart = torch.cdist(found, found) + 1e6 * torch.eye(len(found))
    assert float(apart.min()) >= 0.5 * DIAMETER
    where = geometry().project(found)[0].abs()
    inside = (where <= torch.tensor(FIELD) / 2 - landmarks.EDGE * DIAMETER).all(-1).double().mean(1)
    assert (inside >= landmarks.VISIBLE).all()
    # in all quarters of the field
    assert len({(bool(p[0] > 0), bool(p[1] > 0)) for p in found}) == 4


def test_gold_does_not_hide_the_rest() -> None:
    """One spot a hundred times as dark is one landmark among others."""
    points = np.array([[-500.0, -400, 0], [500, -400, 0], [-500, 400, 0], [500, 400, 0], [0, 0, 0]])
    dark = volume(points) + volume(points[:1], 600.0)
    found = landmarks.find(dark, PIXEL_SIZE, geometry(), FIELD, DIAMETER, 12)
    assert float(torch.cdist(torch.from_numpy(points[1:]), found).min(1).values.max()) < 2 * PIXEL_SIZE


def test_a_grid_where_nothing_stands_out() -> None:
    """A featureless tomogram still gives points, spread over the field."""
    found = landmarks.find(torch.zeros(16, 80, 80), PIXEL_SIZE, geometry(), FIELD, DIAMETER, 40)
    assert len(found) >= landmarks.LEAST
    assert float((found.amax(0) - found.amin(0))[:2].min()) > 0.3 * min(FIELD)


def test_spread_keeps_the_distance() -> None:
    """The best first; a crowd of good ones does not take all the places; never nearer than the distance."""
    rng = np.random.default_rng(1)
    crowd = torch.from_numpy(rng.uniform(0, 60, (200, 3)))
    others = torch.tensor([[500.0, 0, 0], [0, 500, 0], [-500, 0, 0], [0, -500, 0]], dtype=torch.float64)
    points = torch.cat([crowd, others])
    score = torch.cat([torch.linspace(2, 1, 200), torch.full((4,), 0.1)])
    chosen = landmarks.spread(points, score, 10.0, 12)
    assert chosen[0] == 0
    assert len(chosen) == len(set(chosen)) == 12
    assert set(range(200, 204)) <= set(chosen)
    apart = torch.cdist(points[chosen], points[chosen]) + 1e6 * torch.eye(12)
    assert float(apart.min()) >= 10.0
    assert landmarks.spread(points[:1], score[:1], 10.0, 5) == [0]
    assert landmarks.spread(points[:0], score[:0], 10.0, 5) == []
    same = torch.zeros(4, 3, dtype=torch.float64)
    assert landmarks.spread(same, torch.tensor([1.0, 3.0, 2.0, 0.0]), 1.0, 4) == [1]


def test_the_tomogram_shows_points_where_they_are() -> None:
    """Projections of dark points, with an image of nonsense that isn't in use: each is the darkest of its surroundings."""
    points = np.array([[300.0, -200.0, 75.0], [-400.0, 250.0, -100.0], [0.0, 0.0, 0.0]])
    here = geometry()
    here = TiltGeometry(here.matrices, here.shift, here.magnification, torch.arange(len(TILTS)) != 4)
    at = here.project(torch.from_numpy(points))[0].numpy().transpose(1, 0, 2)
    x, y = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in (56, 48))
    across, down = (np.exp(-((line - at[..., i, None]) ** 2) / (2 * 30**2)) for i, line in enumerate((x, y)))
    images = -np.einsum("tpy,tpx->tyx", down, across).astype(np.float32)
    images[4] = 100 * gaussian_filter(np.random.default_rng(0).standard_normal(images[4].shape), 2)
    tomogram = landmarks.coarse_tomogram(images, PIXEL_SIZE, here, 400.0)
    assert tomogram.shape == (16, 56, 56)  # as wide as the longer side
    for point in points:
        index = np.round(point[::-1] / PIXEL_SIZE).astype(int) + np.array([8, 28, 28])
        low = index - 2
        around = tomogram.numpy()[tuple(slice(i, i + 5) for i in low)]
        lowest = np.array(np.unravel_index(around.argmin(), around.shape)) + low
        assert np.abs(lowest - index).max() <= 1  # of whole voxels
