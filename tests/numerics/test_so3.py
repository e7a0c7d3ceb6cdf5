"""so3: counts, covering and uniformity of the grids, measured with random rotations and scipy's KD-tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from libemc.errors import InputError
from libemc.numerics.rotations import (
    matrix_from_rotvec,
    quaternion_from_matrix,
    random_rotations,
    rotation_distance,
)
from libemc.numerics.so3 import local_rotation_grid, point_count, rotation_grid
from libemc.numerics.symmetry import symmetry_matrices


def nearest(grid: torch.Tensor, probes: torch.Tensor) -> np.ndarray:
    """Degrees from each probe to the nearest grid point: |q - q'| = 2 sin(angle / 4) on the sphere of quaternions."""
    q = quaternion_from_matrix(grid).numpy()
    chord, _ = cKDTree(np.concatenate([q, -q])).query(quaternion_from_matrix(probes).numpy())
    return np.degrees(4 * np.arcsin(chord / 2))


def probes(n: int = 20000) -> torch.Tensor:
    return random_rotations(n, torch.Generator().manual_seed(0))


def test_count_is_that_of_healpix_orders() -> None:
    """HEALPix with psi at nominally 7.5 degrees has 768 x 48 = 36864 points; 8π²/step³ is within 5 % of it."""
    assert point_count(7.5) == len(rotation_grid(7.5)) == pytest.approx(36864, rel=0.05)


@pytest.mark.parametrize("step", [7.5, 12.0, 20.0])
def test_covering_without_symmetry(step: float) -> None:
    distance = nearest(rotation_grid(step), probes())
    assert distance.max() < 0.95 * step
    # mean distance to the nearest of n points: 0.48 steps for any good lattice (cubic: 0.480), 0.554 for random points
    assert distance.mean() < 0.515 * step


@pytest.mark.parametrize("symmetry", ["c2", "c7", "d2", "d7", "t", "o", "i"])
def test_covering_and_count_modulo_symmetry(symmetry: str) -> None:
    step, group = 8.0, symmetry_matrices(symmetry)
    grid = rotation_grid(step, symmetry)
    # the seam holds about count^(2/3) points, in or out by chance: three standard deviations
    expected = point_count(step) / len(group)
    assert abs(len(grid) - expected) < max(2.0, 3 * expected ** (1 / 3) * 1.5)
    distance = nearest((grid[:, None] @ group).reshape(-1, 3, 3), probes())
    assert distance.max() < 1.2 * step
    assert distance.mean() < 0.515 * step


def test_asymmetric_unit_holds_no_equivalent_pairs() -> None:
    """Within the unit no equivalent of a point is nearer to the identity than the point itself."""
    grid, group = rotation_grid(12.0, "o"), symmetry_matrices("o")
    identity = torch.eye(3, dtype=torch.float64)
    angles = rotation_distance(identity, grid[:, None] @ group)
    assert bool((angles[:, 0] <= angles.amin(dim=1) + 1e-6).all())
    pairs = rotation_distance(grid[:, None], grid[None], "o") + 180 * torch.eye(len(grid))
    assert float(pairs.min()) > 0.2 * 12.0  # 0.55 steps within the grid; across the seam points may come nearer


def test_points_are_uniform() -> None:
    """60 random caps hold their share of the points, far better than random points would."""
    q = quaternion_from_matrix(rotation_grid(10.0)).numpy()
    axes = quaternion_from_matrix(probes(60)).numpy()
    # share of S³ with |q·a| > cos θ: (θ - sin θ cos θ)·2/π; of random points the worst of 60 would be off by 0.9/sqrt n
    share = (np.abs(q @ axes.T) > np.cos(np.pi / 4)).mean(axis=0)
    assert np.abs(share - (np.pi / 4 - 0.5) * 2 / np.pi).max() < 0.3 / len(q) ** 0.5


def test_grid_consists_of_rotations() -> None:
    grid = rotation_grid(20.0, "d3")
    assert grid.dtype == torch.float64
    assert torch.allclose(grid @ grid.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand_as(grid), atol=1e-12)
    assert torch.allclose(torch.linalg.det(grid), torch.ones(len(grid), dtype=torch.float64), atol=1e-12)


def test_unknown_symmetry_is_refused() -> None:
    with pytest.raises(InputError, match="unknown symmetry 'q5'"):
        rotation_grid(30.0, "q5")


@pytest.mark.parametrize(("step", "radius"), [(2.0, 2.0), (2.0, 3.0), (1.0, 6.0), (4.0, 3.0), (3.0, 12.0)])
def test_local_grid_covers_its_ball(step: float, radius: float) -> None:
    grid = local_rotation_grid(step, radius)
    v = torch.randn(5000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = v / v.norm(dim=1, keepdim=True) * radius * torch.linspace(0, 1, 5000, dtype=torch.float64)[:, None] ** (1 / 3)
    assert nearest(grid, matrix_from_rotvec(v)).max() < 0.8 * step
    angles = rotation_distance(grid, torch.eye(3, dtype=torch.float64))
    assert torch.equal(grid[0], torch.eye(3, dtype=torch.float64))
    assert float(angles.max()) <= radius + step / 2 + 1e-9
    assert bool((angles.diff() > -1e-9).all())


def test_local_grid_has_the_density_of_its_step() -> None:
    """A ball of radius r + step/2 holds 4/3 π (r/step + 1/2)³ points; 5 % for the surface of 10 steps."""
    assert len(local_rotation_grid(1.0, 10.0)) == pytest.approx(4 / 3 * np.pi * 10.5**3, rel=0.05)
