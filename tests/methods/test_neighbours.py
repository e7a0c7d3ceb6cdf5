"""Neighbours of particles on lattices, where all is known, and what chance gives, against its formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from libemc.methods import neighbours
from libemc.numerics.rotations import random_rotations
from libemc.numerics.symmetry import symmetry_matrices
from tests.by_hand import pose, rz

C1 = symmetry_matrices("c1")


def test_a_row() -> None:
    """Three in a row, each turned by another 20 degrees about z: who, how far, where in its own frame, how turned."""
    xyz = torch.tensor([[0.0, 0, 0], [100, 0, 0], [190, 0, 0]], dtype=torch.float64)
    rotation = torch.from_numpy(np.stack([rz(0), rz(20), rz(40)]))
    found = neighbours.nearest(xyz, rotation, C1)
    assert found.index.tolist() == [1, 2, 1]
    np.testing.assert_allclose(found.distance, [100, 90, 90])
    seen = [[1, 0, 0], [np.cos(np.deg2rad(20)), -np.sin(np.deg2rad(20)), 0]]
    seen.append([-np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40)), 0])
    np.testing.assert_allclose(found.direction, seen, atol=1e-12)
    np.testing.assert_allclose(found.angle, 20, atol=1e-9)


def test_poses_that_are_equivalent_are_not_turned() -> None:
    """In C7 a turn of 360/7 degrees about the particle's z is none, whichever of the two has it."""
    base = pose(33, 71, 125)
    xyz = torch.tensor([[0.0, 0, 0], [50, 0, 0]], dtype=torch.float64)
    for first, second in ((0, 360 / 7), (360 / 7, 0), (720 / 7, -360 / 7)):
        rotation = torch.from_numpy(np.stack([base @ rz(first), base @ rz(second + 9)]))
        np.testing.assert_allclose(neighbours.nearest(xyz, rotation, symmetry_matrices("c7")).angle, 9, atol=1e-9)
        assert neighbours.nearest(xyz, rotation, C1).angle[0] > 40


def test_a_lattice() -> None:
    """A cubic lattice of 80 Å, all particles turned alike: 6 neighbours within 100 Å, seen along ±Rᵀ of the axes."""
    xyz = 80.0 * torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.float64)
    turn = torch.from_numpy(pose(20, 65, -40))
    rotation = turn.expand(64, 3, 3)
    assert np.allclose(neighbours.nearest(xyz, rotation, C1).distance, 80)
    owner, other, place = neighbours.around(xyz, rotation, 100.0)
    inner = [i for i in range(64) if all(0 < v < 240 for v in xyz[i].tolist())]
    assert len(owner) == 2 * 3 * 4 * 4 * 3 and all((owner == i).sum() == 6 for i in inner)
    mine = place[owner == inner[0]]
    wanted = np.concatenate([s * 80 * np.eye(3) @ turn.numpy() for s in (1, -1)])
    assert {tuple(np.round(row, 6) + 0.0) for row in mine} == {tuple(np.round(row, 6) + 0.0) for row in wanted}
    np.testing.assert_allclose((turn @ torch.from_numpy(place)[..., None])[..., 0], xyz[other] - xyz[owner], atol=1e-9)


def test_two_at_one_place() -> None:
    xyz = torch.tensor([[1.0, 2, 3], [1, 2, 3], [50, 0, 0]], dtype=torch.float64)
    found = neighbours.nearest(xyz, torch.eye(3, dtype=torch.float64).expand(3, 3, 3), C1)
    assert found.index[:2].tolist() == [1, 0] and found.distance[:2].tolist() == [0, 0]
    assert np.isfinite(found.direction).all()


def test_nobody_near() -> None:
    xyz = torch.tensor([[0.0, 0, 0], [500, 0, 0]], dtype=torch.float64)
    owner, other, place = neighbours.around(xyz, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), 10.0)
    assert len(owner) == len(other) == 0 and place.shape == (0, 3)


def test_chance_is_that_of_a_poisson_process() -> None:
    """In the middle of n points a unit of volume the nearest is at 0.554 n^(-1/3) in the mean (Chandrasekhar 1943, eq. 671).

    Of the distances, 0.36 of their mean in spread, the mean of some 5 times 1000 has an error of 0.5 %; at the border they are
    larger.
    """
    rng = np.random.default_rng(5)
    xyz, found = rng.uniform(0, 1000, (2000, 3)), []
    for _ in range(5):
        points = neighbours.scattered(xyz, rng)
        found.append(neighbours.nearest_distances(points)[0][(np.abs(points - 500) < 400).all(axis=1)])
    wanted = 0.554 * (1e9 / 2000) ** (1 / 3)
    assert np.concatenate(found).mean() == pytest.approx(wanted, rel=0.015)
    chance = neighbours.chance_distances(xyz, 5, 1)
    assert chance.shape == (5, 2000) and chance.mean() == pytest.approx(1.03 * wanted, rel=0.03)
    assert np.array_equal(chance, neighbours.chance_distances(xyz, 5, 1))
    assert not np.array_equal(chance, neighbours.chance_distances(xyz, 5, 2))


def test_the_slab_may_be_tilted() -> None:
    """Points within ±20 Å of a tilted plane: so are those at random, and not in the box around them."""
    rng = np.random.default_rng(3)
    xy, height = rng.uniform(-1000, 1000, (400, 2)), rng.uniform(-20, 20, 400)
    xyz = np.column_stack([xy, 0.4 * xy[:, 0] - 0.2 * xy[:, 1] + 50 + height])
    found = neighbours.scattered(xyz, rng)
    off = found[:, 2] - (0.4 * found[:, 0] - 0.2 * found[:, 1] + 50)
    assert np.abs(off).max() < 22 and np.ptp(off) > 30


def test_random_angles() -> None:
    """The mean angle of random rotations is 90° + 360°/π² (density (1 - cos ω)/π); that of C7's least is smaller."""
    found = neighbours.chance_angles(20000, C1, 0)
    assert found.mean() == pytest.approx(90 + 360 / np.pi**2, abs=1.0)
    seven = symmetry_matrices("c7")
    other = random_rotations(500, torch.Generator().manual_seed(4))
    traces = torch.stack([torch.diagonal(other @ s, dim1=1, dim2=2).sum(1) for s in seven])
    least = torch.rad2deg(torch.acos(((traces - 1) / 2).clamp(-1, 1))).min(0).values
    of_seven = neighbours.chance_angles(20000, seven, 0)
    assert of_seven.mean() == pytest.approx(float(least.mean()), abs=5.0) and of_seven.mean() < found.mean() - 20
