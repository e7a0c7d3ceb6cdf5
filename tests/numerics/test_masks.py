"""masks: values on the axes, volumes of balls, and distances from known shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.numerics.masks import cosine_edge, soft_disc, soft_mask_from_map, soft_sphere


@pytest.mark.parametrize("n", [32, 33])
def test_sphere_along_an_axis(n: int) -> None:
    mask = soft_sphere(n, 8.0, 4.0)
    assert mask.shape == (n, n, n) and mask.dtype == torch.float32
    ray = mask[n // 2, n // 2, n // 2 :]
    expected = [1.0] * 9 + [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3)] + [0.0] * (len(ray) - 12)
    assert np.allclose(ray, expected, atol=1e-6)  # float32
    for dim in range(3):  # symmetric about n//2
        body = mask if n % 2 else mask.narrow(dim, 1, n - 1)
        assert torch.equal(body, body.flip(dim))


def test_volumes_and_areas() -> None:
    """A ball's volume half way down the edge; to 1 %, for the curvature of the edge and the pixels."""
    assert float(soft_sphere(48, 14.0, 2.0).sum()) == pytest.approx(4 / 3 * math.pi * 15**3, rel=0.01)
    assert float(soft_disc((40, 64), 14.0, 2.0).sum()) == pytest.approx(math.pi * 15**2, rel=0.01)


def test_edge_width_zero_is_a_step() -> None:
    assert set(soft_sphere(16, 5.0, 0.0).unique().tolist()) == {0.0, 1.0}
    assert soft_disc(16, 5.0, 0.0)[8, 8:14].tolist() == [1, 1, 1, 1, 1, 1]
    assert soft_disc(16, 5.0, 0.0)[8, 14] == 0


def test_cosine_edge_is_monotone_and_keeps_the_type() -> None:
    x = torch.linspace(0, 10, 101, dtype=torch.float64)
    y = cosine_edge(x, 3.0, 4.0)
    assert y.dtype == torch.float64 and bool((y.diff() <= 0).all())
    assert y[30] == 1 and y[70] == pytest.approx(0) and y[50] == pytest.approx(0.5)


@pytest.mark.parametrize(("extend", "edge"), [(0.0, 0.0), (2.0, 3.0), (3.5, 5.0)])
def test_mask_from_a_map_is_the_distance_from_its_density(extend: float, edge: float) -> None:
    volume = torch.zeros(20, 22, 24)
    dense = np.array([[5, 8, 9], [14, 13, 12], [14, 14, 12]])
    volume[tuple(dense.T)] = 1.0
    mask = soft_mask_from_map(volume, 0.5, extend, edge)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), axis=-1)
    distance = np.sqrt(((grid[..., None, :] - dense) ** 2).sum(-1)).min(-1)  # by hand, not by a transform
    expected = cosine_edge(torch.from_numpy(distance), extend, edge)
    assert torch.allclose(mask.double(), expected, atol=1e-5)  # float32 distances
    assert mask.dtype == torch.float32


def test_empty_masks_are_refused_with_the_maximum() -> None:
    with pytest.raises(InputError, match=r"maximum, 0\.25"):
        soft_mask_from_map(torch.full((4, 4, 4), 0.25), 0.5, 1.0, 1.0)
