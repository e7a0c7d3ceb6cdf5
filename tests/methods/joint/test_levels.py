"""Which levels are switched on: those that evidence was made with, about as strong; and nothing where there is only noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from libemc.methods.joint import levels
from libemc.methods.joint.evidence import ASTIGMATISM, DEFOCUS, SHIFT, TURN
from libemc.methods.joint.levels import Case, Choice, Scene, choose
from tests.methods.joint.joint_data import scene, told

COUNT, TILTS = 60, 11
EVERY = (
    levels.SHIFT, levels.MOTION, levels.ANGLES, levels.MAGNIFICATION, levels.FIELD, levels.DEFOCUS, levels.HEIGHT,
    levels.ASTIGMATISM, levels.OWN_SHIFT, levels.OWN_TURN, levels.OWN_DEFOCUS,
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).double()


def nothing(count: int = COUNT) -> Tensor:
    return torch.zeros(count, TILTS, 8, dtype=torch.float64)


def case(where: Scene, truth: Tensor, seed: int) -> Case:
    return Case(where, told(truth, seed), torch.zeros_like(truth))


def rotated(where: Scene, turn: Tensor) -> Tensor:
    """(N, T, 3) Å: where points go when tilts are turned by rotation vectors (T, 3), degrees, in the image's frame: scipy."""
    turned = torch.from_numpy(Rotation.from_rotvec(turn.numpy(), degrees=True).as_matrix())
    q = torch.einsum("tij,nj->nti", where.matrices, where.xyz)
    return torch.einsum("tij,ntj->nti", turned, q) - q


def smooth_path(where: Scene, length: float, step: float, seed: int) -> Tensor:
    """(N, T, 3) Å: steps between exposures from a Gaussian process in space, drawn by numpy from its covariance."""
    rng = np.random.default_rng(seed)
    x = where.xyz.numpy()
    covariance = np.exp(-((x[:, None] - x) ** 2).sum(-1) / (2 * length**2))
    steps = rng.multivariate_normal(np.zeros(len(x)), covariance, (where.walk.shape[1], 3), method="svd")
    return step * torch.einsum("tk,kcn->ntc", where.walk, torch.from_numpy(steps))


def planted(where: Scene, what: str, strength: float, seed: int) -> Tensor:
    """(N, T, 8) corrections of one level."""
    u, n, t = nothing(len(where.xyz)), len(where.xyz), TILTS
    if what == "shift of tilts":
        u[..., SHIFT] += strength * normal(t, 2, seed=seed)
    elif what == "angles of tilts":
        turn = strength * normal(t, 3, seed=seed)
        u[..., TURN] += turn
        u[..., SHIFT] += rotated(where, turn)[..., :2]
    elif what == "magnification of tilts":
        scale = strength / 100 * normal(t, seed=seed)
        u[..., SHIFT] += scale[:, None] * torch.einsum("tij,nj->nti", where.matrices, where.xyz)[..., :2]
    elif what.startswith("motion"):
        path = smooth_path(where, 300.0, strength, seed)
        u[..., SHIFT] += torch.einsum("tij,ntj->nti", where.matrices[:, :2], path)
    elif what == "defocus of tilts":
        u[..., DEFOCUS] += strength * normal(1, t, 1, seed=seed)
    elif what == "defocus of particles":
        u[..., DEFOCUS] += strength * normal(n, 1, 1, seed=seed)
    elif what == "astigmatism":
        u[..., ASTIGMATISM] += strength * normal(2, seed=seed)
    elif what == "shift of single images":
        u[..., SHIFT] += strength * normal(n, t, 2, seed=seed)
    else:
        raise ValueError(what)
    return u


LEVELS = {level.name: level for level in EVERY}


@pytest.mark.parametrize(
    ("what", "strength"),
    [
        ("shift of tilts", 3.0), ("shift of tilts", 0.7), ("angles of tilts", 0.3), ("magnification of tilts", 0.2),
        ("motion along the exposure", 0.8), ("defocus of tilts", 150.0), ("defocus of particles", 120.0),
        ("astigmatism", 200.0), ("shift of single images", 2.4),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(what: str, strength: float) -> None:
    """Switched on, and foretold best with a strength of those beside what was planted (in the grid of a factor of two to four);
    what else may be on, by chance, is at its least."""
    where = scene(COUNT, TILTS)
    chosen, trials = choose([case(where, planted(where, what, strength, 1), 1)], EVERY, 0)
    level = LEVELS[what]
    found = [c for c in chosen if c.level is level]
    assert len(found) == 1, chosen
    grid = np.array(level.strengths)
    near = grid[np.argsort(np.abs(np.log(grid / strength)))[:2]]
    assert found[0].strength in near
    if level is levels.MOTION:
        assert found[0].length in (150.0, 300.0, 600.0)  # 300, to the next
    others = [c for c in chosen if c.level is not level]
    assert all(c.strength == c.level.strengths[0] for c in others), others
    kept = [t for t in trials if t.kept]
    assert {(t.name, t.strength, t.length) for t in kept} == {(c.level.name, c.strength, c.length) for c in chosen}
    assert all(t.gain > 3 * t.error for t in kept)


def test_where_it_was_measured_does_not_matter() -> None:
    """A quadratic likelihood is the same from everywhere: the choice of evidence at no corrections and at others, exactly."""
    where = scene(30, TILTS)
    evidence = told(planted(where, "shift of tilts", 2.0, 3), 2)
    there = 3 * normal(30, TILTS, 8)
    moved = Case(where, told(planted(where, "shift of tilts", 2.0, 3), 2, slope_at=there), there)
    here = Case(where, evidence, torch.zeros_like(there))
    some = (levels.SHIFT, levels.DEFOCUS)
    (a, t), (b, s) = choose([here], some, 0), choose([moved], some, 0)
    assert [c.level for c in a] == [levels.SHIFT] and a == b
    assert [x.gain for x in t] == pytest.approx([x.gain for x in s], rel=1e-6)


def test_several_tilt_series_speak_together() -> None:
    """What one of them says too faintly to be believed, six do; gains add up."""
    where = scene(16, TILTS)
    cases = [case(where, planted(where, "shift of tilts", 0.45, s), s) for s in range(6)]
    alone = [choose([c], (levels.SHIFT,), 0) for c in cases]
    chosen, trials = choose(cases, (levels.SHIFT,), 0)
    assert len(chosen) == 1 and sum(not c for c, _ in alone) >= 2
    for together, *singles in zip(trials, *(t for _, t in alone), strict=True):
        if all(s.strength == together.strength for s in singles):
            assert together.gain == pytest.approx(sum(s.gain for s in singles), rel=1e-9)


def test_noise_alone_switches_nothing_on() -> None:
    """Two standard errors are passed by chance in a fiftieth of the trials of a level: of 66, by four at most (binomial: 2 %
    are more), and then by little. Most series have nothing."""
    where, on = scene(30, TILTS), []
    for seed in range(6):
        chosen, trials = choose([case(where, nothing(30), seed)], EVERY, seed)
        on.append(len(chosen))
        assert {t.name for t in trials} == set(LEVELS)
    assert sum(on) <= 4 and sum(n == 0 for n in on) >= 4


def test_turns_of_tilts_are_turns() -> None:
    """What the basis makes of small turns of the tilts is what rotating the points does, to second order of a hundredth of a
    degree and less: q·ω²/2 + rounding, 1e-3 Å at 600 Å; and turns are degrees."""
    where = scene(COUNT, TILTS)
    turn = 0.1 * normal(TILTS, 3)
    u = where.term(Choice(levels.ANGLES, 0.1, math.inf)).forward(normal(TILTS, 3)[None])
    torch.testing.assert_close(u[..., TURN], turn.expand(COUNT, TILTS, 3))
    exact = rotated(where, turn)[..., :2]
    second = 0.5 * 1000 * torch.deg2rad(turn).square().sum(-1).max()
    assert (u[..., SHIFT] - exact).abs().max() < second < 0.1 * exact.abs().max()
    # a tenth of the turn leaves a hundredth of the difference
    tenth = rotated(where, turn / 10)[..., :2]
    assert (u[..., SHIFT] / 10 - tenth).abs().max() < 0.011 * (u[..., SHIFT] - exact).abs().max()


def test_poses_are_seen_in_all_tilts() -> None:
    """A turned and moved particle, by scipy: T·(turn·R) = turn'·T·R, and the move by its projection."""
    where = scene(8, TILTS)
    numbers = 0.02 * normal(8, 1, 6)
    u = where.pose().forward(numbers)
    turn, move = levels.POSE[0] * numbers[:, 0, :3], levels.POSE[1] * numbers[:, 0, 3:]
    turned = Rotation.from_rotvec(turn.numpy(), degrees=True).as_matrix()
    for tilt, matrix in enumerate(where.matrices.numpy()):
        seen = Rotation.from_matrix(matrix @ turned @ matrix.T).as_rotvec(degrees=True)
        np.testing.assert_allclose(u[:, tilt, TURN], seen, atol=1e-9)
        np.testing.assert_allclose(u[:, tilt, SHIFT], (move.numpy() @ matrix.T)[:, :2], atol=1e-9)


@pytest.mark.parametrize("level", [levels.MOTION, levels.FIELD])
def test_neighbours_share_what_is_near(level: levels.Level) -> None:
    """The covariance of a term's shifts between all images, from its unit numbers, against the kernel written out: of motion by
    the distance in space, times that of the walk, seen in each tilt; of a field by the distance in the plane, tilt by tilt."""
    where = scene(12, 5)
    length, strength = 400.0, 0.7
    term = where.term(Choice(level, strength, length))
    size = math.prod(term.shape)
    columns = term.forward(torch.eye(size, dtype=torch.float64).reshape(size, *term.shape))[..., SHIFT]
    found = torch.einsum("anti,amsj->ntimsj", columns, columns)
    x = where.xyz.clone()
    if level is levels.FIELD:
        x[:, 2] = 0
    near = torch.exp(-((x[:, None] - x) ** 2).sum(-1) / (2 * length**2))
    if level is levels.MOTION:
        walk = where.walk @ where.walk.T
        seen = torch.einsum("tik,sjk->tsij", where.matrices[:, :2], where.matrices[:, :2])
        expected = torch.einsum("nm,ts,tsij->ntimsj", near, walk, seen)
    else:
        eye = torch.eye(5, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        expected = torch.einsum("nm,ts,ij->ntimsj", near, *eye)
    expected = strength**2 * expected
    # modes below 1e-4 of the largest variance, which is at most that of all particles moving together, are left out
    torch.testing.assert_close(found, expected, rtol=0, atol=12e-4 * float(expected.max()))
