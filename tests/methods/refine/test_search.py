"""The exhaustive search against slices, explicit loops, and grids that must leave no gaps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from libemc.methods import subtilts
from libemc.methods.refine import polish, search
from libemc.methods.refine.limits import Limits
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from libemc.numerics.symmetry import symmetrise
from tests.methods.subtilt_data import blobs, particle_set

PIXEL = 8.0
NOWHERE = torch.zeros(1, 3, dtype=torch.float64)


@pytest.mark.parametrize("box", [32, 33])
def test_scores_are_those_of_the_slices(box: int) -> None:
    """The half-ball product against exact slices at the same poses: the same ranking, correlation above 0.98."""
    density, radius = blobs(box), 6.0
    batch = subtilts.load_batch(particle_set(density, 3, PIXEL, noise=0.5), torch.arange(3), Band.of(box, radius))
    rotations = random_rotations(300, torch.Generator().manual_seed(2))
    balls = search.half_balls(batch, radius)
    score, place, _ = search.search_everywhere(balls, search.search_reference(density, radius), rotations, NOWHERE, 300)
    volume = FourierVolume.from_map(density, radius=radius)
    exact = torch.stack(
        [polish.score_poses(batch, volume, r.expand(3, 3, 3).contiguous(), NOWHERE.expand(3, 3)) for r in rotations], 1
    )
    for p in range(3):
        pair = torch.stack([score[p].double(), exact[p][place[p]]])
        assert torch.corrcoef(pair)[0, 1] > 0.98


@pytest.mark.parametrize("box", [28, 29])
def test_best_pose_is_that_of_brute_force(box: int) -> None:
    """Every rotation and shift of the grid scored by exact slices one after the other: what the search puts first is
    no more than 3 % below the best of all (the error of unpadded half balls).
    """
    density, radius = blobs(box), 5.0
    batch = subtilts.load_batch(particle_set(density, 2, PIXEL, noise=1.0), torch.arange(2), Band.of(box, radius))
    rotations = torch.cat([random_rotations(60, torch.Generator().manual_seed(3)), batch.rotation])
    shifts = search.search_shifts(2.0, 2.0)
    volume, balls = FourierVolume.from_map(density, radius=radius), search.half_balls(batch, radius)
    reference = search.search_reference(density, radius)
    _, place, shift = search.search_everywhere(balls, reference, rotations, shifts, 1)
    every = torch.stack(
        [
            polish.score_poses(batch, volume, r.expand(2, 3, 3).contiguous(), s.expand(2, 3))
            for r, s in itertools.product(rotations, shifts)
        ],
        dim=1,
    ).view(2, len(rotations), len(shifts))
    for p in range(2):
        found = every[p, place[p, 0], shift[p, 0]]
        assert found > 0.97 * every[p].max()
        assert place[p, 0] == 60 + p  # its own
        per_rotation = search.search_about(balls, reference, batch.rotation, batch.rotation[p].T @ rotations, shifts, 1)
        assert per_rotation[1][p, 0] == 60 + p and per_rotation[2][p, 0] == shift[p, 0]


def test_the_other_hand_scores_less() -> None:
    """A mirrored reference: the best of all rotations explains the images worse for every particle."""
    density, radius = blobs(33), 8.0
    batch = subtilts.load_batch(particle_set(density, 4, PIXEL, noise=0.5), torch.arange(4), Band.of(33, radius))
    balls, grid = search.half_balls(batch, radius), search.SearchGrid.of(33, PIXEL, 33.0, 20.0, Limits(3.0), "c1")
    best = [
        search.search_everywhere(balls, search.search_reference(d, radius), grid.rotations, grid.shifts, 1)[0][:, 0]
        for d in (density, density.flip(0))
    ]
    assert (best[0] > 1.05 * best[1]).all()


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few products are held at a time, the same answer."""
    density, radius = blobs(28), 5.0
    batch = subtilts.load_batch(particle_set(density, 3, PIXEL, noise=1.0), torch.arange(3), Band.of(28, radius))
    rotations, shifts = random_rotations(101, torch.Generator().manual_seed(4)), search.search_shifts(2.0, 1.0)
    args = (search.half_balls(batch, radius), search.search_reference(density, radius), rotations, shifts, 7)
    whole = search.search_everywhere(*args)
    monkeypatch.setattr(search, "PRODUCTS_AT_ONCE", 3 * len(shifts) * 10)
    for a, b in zip(whole, search.search_everywhere(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_angle=6.0), Limits(max_angle=25.0), Limits(max_angle=110.0), Limits(max_tilt=0.0), Limits(max_tilt=4.0),
        Limits(max_tilt=30.0), Limits(max_tilt=90.0), Limits(max_angle=50.0, max_tilt=10.0),
    ],
)  # fmt: skip
def test_grids_within_limits_have_no_gaps(limits: Limits) -> None:
    """Each of 3000 rotations within the limits has one of the grid within a step, and the grid has none beyond the limits."""
    grid = search.SearchGrid.of(32, PIXEL, 50.0, 22.0, limits, "c1")
    one = torch.eye(3, dtype=torch.float64)[None]
    assert rotation_distance(grid.rotations, limits.hold(grid.rotations, one.expand_as(grid.rotations))).max() < 3e-6
    assert rotation_distance(grid.rotations[:1], one) < 1e-6
    g = torch.Generator().manual_seed(6)
    turn = torch.nn.functional.normalize(torch.randn(3000, 3, generator=g).double(), dim=1)
    rotations = matrix_from_rotvec(turn * 180 * torch.rand(3000, 1, generator=g))
    rotations = limits.hold(rotations, one.expand_as(rotations))
    trace = torch.einsum("nij,mij->nm", rotations, grid.rotations).amax(dim=1)
    assert torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1))).max() < grid.step


@pytest.mark.parametrize(("symmetry", "order"), [("c1", 1), ("d7", 14), ("o", 24)])
def test_rotations_modulo_the_symmetry(symmetry: str, order: int) -> None:
    """As many as without, over the order of the group (the seam takes some more); random ones have an equivalent near."""
    grid = search.SearchGrid.of(32, PIXEL, 40.0, 22.0, Limits(2.0), symmetry)
    free = search.SearchGrid.of(32, PIXEL, 40.0, 22.0, Limits(2.0), "c1")
    assert len(free.rotations) / order == pytest.approx(len(grid.rotations), rel=0.1)
    some = random_rotations(50, torch.Generator().manual_seed(8))
    near = rotation_distance(some[:, None], grid.rotations[None], symmetry).amin(dim=1)
    assert near.max() < 1.3 * grid.step


@pytest.mark.parametrize("symmetry", ["d7", "o"])
def test_symmetric_references_are_found(symmetry: str) -> None:
    """Images of a symmetric map: one of the candidates is within a step and a half of the pose modulo the group."""
    density = symmetrise(blobs(32), symmetry)
    limits, radius = Limits(2.0), 10.0
    batch = subtilts.load_batch(particle_set(density, 6, PIXEL, noise=0.5), torch.arange(6), Band.of(32, radius))
    grid = search.SearchGrid.of(32, PIXEL, 256 / radius, search.diameter(density), limits, symmetry)
    balls = search.half_balls(batch, grid.radius)
    found = grid.candidates(balls, search.search_reference(density, grid.radius), batch.rotation, 6)
    distance = torch.stack([rotation_distance(f.rotation, batch.rotation, symmetry) for f in found]).amin(dim=0)
    assert distance.max() < 1.5 * grid.step


def test_shifts_are_a_grid_in_a_ball() -> None:
    shifts = search.search_shifts(5.0, 1.5)
    want = {
        tuple(1.5 * c for c in node)
        for node in itertools.product(range(-9, 10), repeat=3)
        if 1.5 * math.dist(node, (0, 0, 0)) <= 5
    }
    assert shifts[0].tolist() == [0, 0, 0] and {tuple(s) for s in shifts.tolist()} == want and len(shifts) == len(want)
    assert search.search_shifts(1.0, 1.5).tolist() == [[0, 0, 0]]


def test_distinct_rotations() -> None:
    """Against the plain loop: take the best that is far enough from all that were taken."""
    rotation = random_rotations(80, torch.Generator().manual_seed(9)).view(2, 40, 3, 3)
    kept = search.distinct(rotation, 50.0, 5)
    for p in range(2):
        taken: list[int] = []
        for c in range(40):
            far = all(float(rotation_distance(rotation[p, c], rotation[p, t])) > 50 for t in taken)
            if far and len(taken) < 5:
                taken.append(c)
        assert torch.nonzero(kept[p])[:, 0].tolist() == taken


@pytest.mark.parametrize("box", [32, 33])
def test_diameter_of_a_ball(box: int) -> None:
    """A ball of radius 9 holds 98 % of its energy within 9·0.98^(1/3); to one pixel at each side."""
    x = torch.arange(box) - box // 2
    ball = (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 <= 81).float()
    assert search.diameter(ball) == pytest.approx(2 * 9 * 0.98 ** (1 / 3), abs=2)
