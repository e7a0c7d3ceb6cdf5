"""Refinement: derivatives, the exhaustive search against brute force, recovery of known poses, no fit to noise."""

from __future__ import annotations

import pytest
import torch

from libemc.methods import average, refine, subtilts
from libemc.numerics.filters import lowpass
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.subtilt_data import blobs, particle_set

MEMORY = 1 << 28
BOX, PIXEL = 32, 8.0


@pytest.fixture(scope="module")
def density() -> torch.Tensor:
    return blobs(BOX)


def test_derivatives_of_the_score(density: torch.Tensor) -> None:
    """⟨y, m⟩ and |m|² by rotation and shift against central differences (float32 slices: 1 % of the largest)."""
    particles = particle_set(density, 4, PIXEL, noise=0.5)
    band = Band.of(BOX, 9.0)
    batch = subtilts.load_batch(particles, torch.arange(4), band)
    volume = FourierVolume.from_map(density, radius=9.0)
    g = torch.Generator().manual_seed(1)
    rotation = matrix_from_rotvec(torch.randn(4, 3, generator=g).double() * 5) @ batch.rotation
    shift = torch.randn(4, 3, generator=g).double() * 0.5
    _, _, by_cross, by_norm, _ = refine._pose_terms(batch, volume, rotation, shift, slope=True)
    step = 5e-3
    for i in range(3):
        w = torch.zeros(4, 3, dtype=torch.float64)
        w[:, i] = step
        for column, (up, down) in (
            (i, [(matrix_from_rotvec(torch.rad2deg(s * w)) @ rotation, shift) for s in (1, -1)]),
            (3 + i, [(rotation, shift + s * w) for s in (1, -1)]),
        ):
            a = refine._pose_terms(batch, volume, *up, slope=False)
            b = refine._pose_terms(batch, volume, *down, slope=False)
            for term, analytic in ((0, by_cross), (1, by_norm)):
                difference = (a[term] - b[term]) / (2 * step)
                assert (difference - analytic[:, column]).abs().max() < 0.01 * analytic.abs().max()


def test_search_scores_are_those_of_the_slices(density: torch.Tensor) -> None:
    """The half-ball product against exact slices at the same poses: the same ranking, correlation above 0.98."""
    particles = particle_set(density, 3, PIXEL, noise=0.5)
    radius = 6.0
    batch = subtilts.load_batch(particles, torch.arange(3), Band.of(BOX, radius))
    rotations = random_rotations(300, torch.Generator().manual_seed(2))
    shifts = torch.zeros(1, 3, dtype=torch.float64)
    balls = refine.half_balls(batch, radius)
    score, place, _ = refine.search_everywhere(balls, refine.search_reference(density, radius), rotations, shifts, 300)
    volume = FourierVolume.from_map(density, radius=radius)
    exact = torch.stack(
        [
            refine.score_poses(batch, volume, r.expand(3, 3, 3).contiguous(), torch.zeros(3, 3).double())
            for r in rotations
        ],
        dim=1,
    )
    for p in range(3):
        pair = torch.stack([score[p].double(), exact[p][place[p]]])
        assert torch.corrcoef(pair)[0, 1] > 0.98


def test_polish_finds_the_pose(density: torch.Tensor) -> None:
    """From 8° and one pixel away to the known pose; noise of twice the signal leaves 1° and a tenth of a pixel."""
    particles = particle_set(density, 8, PIXEL, noise=2.0)
    band = Band.of(BOX, 12.0)
    batch = subtilts.load_batch(particles, torch.arange(8), band)
    volume = FourierVolume.from_map(density, radius=12.0)
    g = torch.Generator().manual_seed(3)
    axis = torch.nn.functional.normalize(torch.randn(8, 3, generator=g).double(), dim=1)
    start = refine.Poses(
        matrix_from_rotvec(axis * 8) @ batch.rotation,
        torch.nn.functional.normalize(torch.randn(8, 3, generator=g).double(), dim=1),
        torch.empty(0),
    )
    found = refine.polish(batch, volume, start)
    assert rotation_distance(found.rotation, batch.rotation).median() < 1.0
    assert found.shift.norm(dim=1).median() < 0.1
    assert (found.score >= refine.score_poses(batch, volume, start.rotation, start.shift)).all()


def test_random_poses_are_recovered(density: torch.Tensor) -> None:
    """All orientations random, reference at 50 Å: nine of ten within 5° after one iteration."""
    truth = particle_set(density, 20, PIXEL, noise=2.0)
    start = truth.moved(
        random_rotations(20, torch.Generator().manual_seed(9)), torch.zeros_like(truth.xyz), truth.score
    )
    mask = soft_sphere(BOX, 14.0, 2.0)
    reference = lowpass(density, PIXEL, 50.0) * mask
    search = refine.Search(resolution=50.0, max_shift=18.0)
    (found,) = refine.iterate([start], (reference, reference), search, exhaustive=True, memory=MEMORY)
    error = rotation_distance(found.rotation, truth.rotation)
    assert (error < 5).double().mean() >= 0.9
    assert torch.linalg.vector_norm(found.xyz - truth.xyz, dim=1).median() < 0.3 * PIXEL
    assert torch.isfinite(found.score).all()


def test_pure_noise_gives_no_signal_beyond_the_start() -> None:
    """Noise images refined against a reference at 80 Å: no FSC between halves beyond it (0.25: a chance shell of 3 σ)."""
    density = blobs(BOX)
    particles = particle_set(torch.zeros_like(density), 24, PIXEL, noise=1.0)
    mask = soft_sphere(BOX, 13.0, 3.0)
    halves = (lowpass(density, PIXEL, 80.0) * mask,) * 2
    (found,) = refine.iterate([particles], halves, refine.Search(80.0, 10.0), exhaustive=True, memory=MEMORY)
    done = average.finish(average.half_maps([found], MEMORY), mask, PIXEL, seed=0)
    beyond = int(BOX * PIXEL / 80.0) + 2
    assert done.corrected[beyond:].mean() < 0.1
    assert done.fsc.curves["unmasked"].values[beyond:].max() < 0.25


def test_steps_go_from_global_to_local_and_end() -> None:
    """Two searches, then polishing, and an end when nothing changes any more."""
    past: list[refine.Done] = []
    start = refine.Step(50.0, exhaustive=True)
    kinds = []
    for _ in range(20):
        step = refine.next_step(past, start, 64, 4.0, None)
        if step is None:
            break
        kinds.append(step.exhaustive)
        past.append(refine.Done(step, 12.0, 12.0, 100.0 if len(past) == 0 else 0.1, 0.1))
    assert kinds[:3] == [True, True, False]
    assert 3 <= len(kinds) <= 5
    assert refine.next_step(past[:2], start, 64, 4.0, 2) is None
    assert refine.next_step(past[:1], refine.Step(50.0, False), 64, 4.0, None).exhaustive is False
