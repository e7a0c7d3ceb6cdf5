"""One iteration: poses that are lost are found, by all routes and within all limits, and halves never meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods import subtilts
from libemc.methods.refine import align
from libemc.methods.refine.limits import Limits
from libemc.methods.subtilts import Particles
from libemc.numerics.filters import lowpass
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetrise
from tests.methods.subtilt_data import blobs, particle_set, premultiplied

MEMORY = 1 << 28
PIXEL = 8.0


def smooth(density: torch.Tensor) -> torch.Tensor:
    box = density.shape[-1]
    return lowpass(density, PIXEL, 50.0) * soft_sphere(box, 0.43 * box, 2.0)


def lost(particles: Particles, seed: int = 9) -> Particles:
    """At the positions of the picks, in random orientations."""
    rotation = random_rotations(len(particles), torch.Generator().manual_seed(seed))
    return particles.moved(rotation, torch.zeros_like(particles.xyz), particles.score)


def turned(particles: Particles, turn: torch.Tensor) -> Particles:
    """Rotations R·turn."""
    return particles.moved(particles.rotation @ turn, particles.xyz, particles.score)


def about(axis: Sequence[float] | torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    axis = torch.as_tensor(axis, dtype=torch.float64)
    return matrix_from_rotvec(torch.nn.functional.normalize(axis, dim=-1) * degrees[:, None])


def aligned(start: Particles, density: torch.Tensor, limits: Limits, symmetry: str = "c1", **more: bool) -> Particles:
    task = align.Task(50.0, exhaustive=True, limits=limits, symmetry=symmetry, **more)
    (found,) = align.iterate([start], [start], (density, density), task, MEMORY).series
    return found


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("images", ["plain", "premultiplied"])
def test_random_poses_are_recovered(box: int, images: str) -> None:
    """All orientations random, reference at 50 Å: nine of ten within 5° after one iteration."""
    density = blobs(box)
    truth = particle_set(density, 20, PIXEL, noise=2.0)
    if images == "premultiplied":
        truth = premultiplied(truth)
    found = aligned(lost(truth), smooth(density), Limits(18.0 / PIXEL))
    assert (rotation_distance(found.rotation, truth.rotation) < 5).double().mean() >= 0.9
    assert torch.linalg.vector_norm(found.xyz - truth.xyz, dim=1).median() < 0.3 * PIXEL
    assert torch.isfinite(found.score).all()


@pytest.mark.parametrize("mirror", [(0,), (0, 1, 2)])
def test_the_other_hand_does_not_fit(mirror: tuple[int, ...]) -> None:
    """The mirrored reference has a lower score for every particle, and no orientation is found with it."""
    density = blobs(33)
    truth = particle_set(density, 8, PIXEL, noise=1.0)
    right, wrong = (aligned(lost(truth), smooth(d), Limits(2.0)) for d in (density, density.flip(mirror)))
    assert (right.score > 1.05 * wrong.score).all()


@pytest.mark.parametrize("symmetry", ["d7", "o"])
def test_symmetric_particles(symmetry: str) -> None:
    """Poses modulo the group, from random ones."""
    density = symmetrise(blobs(32), symmetry)
    truth = particle_set(density, 12, PIXEL, noise=1.0)
    found = aligned(lost(truth), smooth(density), Limits(2.0), symmetry)
    assert (rotation_distance(found.rotation, truth.rotation, symmetry) < 5).double().mean() >= 0.9
    order = {"d7": 7, "o": 4}[symmetry]  # of the fold along z
    for degrees, seen in ((360 / order, 0.0), (360 / order + 8, 8.0)):
        spun = turned(found, about([0, 0, 1.0], torch.full((12,), degrees).double()))
        assert align.pose_change([found], [spun], symmetry) == (pytest.approx(seen, abs=1e-5), 0)


@pytest.mark.parametrize("degrees", [6.0, 170.0])
def test_largest_turn(degrees: float) -> None:
    """--max-angle 10: from 6° off the pose is found; from 170° off it stays within 10° of where it was."""
    density = blobs(32)
    truth = particle_set(density, 16, PIXEL, noise=1.0)
    axis = torch.randn(16, 3, generator=torch.Generator().manual_seed(3)).double()
    start = turned(truth, about(axis, torch.full((16,), degrees).double()))
    found = aligned(start, smooth(density), Limits(2.0, max_angle=10.0))
    assert rotation_distance(found.rotation, start.rotation).max() < 10 + 1e-6
    error = rotation_distance(found.rotation, truth.rotation)
    assert error.median() < 2.5 if degrees == 6 else error.min() > 159


@pytest.mark.parametrize("most", [0.0, 5.0, 25.0])
def test_axes_are_known(most: float) -> None:
    """The axis leans by up to `most`, the turn about it is any: nine of ten are found, and no axis leans by more."""
    density = blobs(32)
    truth = particle_set(density, 20, PIXEL, noise=1.0)
    g = torch.Generator().manual_seed(4)
    lean = torch.randn(20, 3, generator=g).double()
    lean[:, 2] = 0
    spin = about([0, 0, 1.0], 360 * torch.rand(20, generator=g).double())
    start = turned(truth, about(lean, 0.9 * most * torch.rand(20, generator=g).double()) @ spin)
    found = aligned(start, smooth(density), Limits(2.0, max_tilt=most))
    chord = torch.linalg.vector_norm(found.rotation[:, :, 2] - start.rotation[:, :, 2], dim=1)
    assert torch.rad2deg(2 * torch.asin(chord / 2)).max() < most + 1e-6
    assert (rotation_distance(found.rotation, truth.rotation) < 5).double().mean() >= 0.9


def test_farthest_shift() -> None:
    """Particles two pixels from where they are looked for within one: at the edge, never beyond; within three: found."""
    density = blobs(32)
    truth = particle_set(density, 12, PIXEL, noise=1.0)
    away = torch.nn.functional.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(6)).double(), dim=1)
    start = truth.moved(truth.rotation, truth.xyz + 2 * PIXEL * away, truth.score)
    near, far = (aligned(start, smooth(density), Limits(limit)) for limit in (1.0, 3.0))
    length = torch.linalg.vector_norm(near.xyz - start.xyz, dim=1) / PIXEL
    assert length.max() <= 1 + 1e-9 and length.median() > 0.99
    assert torch.linalg.vector_norm(far.xyz - truth.xyz, dim=1).median() < 0.3 * PIXEL


@pytest.mark.parametrize("own_noise", [False, True])
def test_halves_never_meet(own_noise: bool) -> None:
    """Half 2's images with the sign changed, and another reference for it: poses of half 1 are the same to the last bit.

    A change of sign leaves the power of the images as it is, which is all that one half tells the other: noise is measured
    on both.
    """
    density = blobs(28)
    start = lost(particle_set(density, 10, PIXEL, noise=1.0))
    tilts = len(start.series.use)
    second = np.repeat(start.half.numpy() == 2, tilts)
    stack = np.where(second[:, None, None], -start.stack, start.stack)
    other = replace(start, stack=stack)
    task = align.Task(50.0, exhaustive=True, limits=Limits(2.0), own_noise=own_noise)
    reference = smooth(density)
    a = align.iterate([start], [start], (reference, reference), task, MEMORY)
    b = align.iterate([other], [other], (reference, reference.flip(0)), task, MEMORY)
    one = start.half == 1
    for name in ("rotation", "xyz", "score"):
        first, again = getattr(a.series[0], name), getattr(b.series[0], name)
        assert torch.equal(first[one], again[one]) and not torch.equal(first[~one], again[~one])
    assert torch.equal(a.contrast[0][one], b.contrast[0][one]) and torch.equal(a.error[0][one], b.error[0][one])


def test_several_tilt_series() -> None:
    """Two with noise that differs fourfold, one of them with other tilts, one without used particles: each is aligned as
    it is alone, and what is not seen keeps its pose and has no score."""
    density = blobs(28)
    quiet = lost(particle_set(density, 6, PIXEL, noise=4.0, seed=1))
    loud = lost(particle_set(density, 6, PIXEL, noise=16.0, seed=2, tilts=17))
    unused = loud.using(torch.zeros(6, dtype=torch.bool))
    hidden = replace(quiet, visible=quiet.visible & (torch.arange(6) != 3)[:, None])
    task = align.Task(50.0, exhaustive=True, limits=Limits(2.0))
    halves = (smooth(density),) * 2
    together = align.iterate([hidden, unused, loud], [hidden, unused, loud], halves, task, MEMORY)
    for number, one in ((0, hidden), (2, loud)):
        alone = align.iterate([one], [one], halves, task, MEMORY)
        assert torch.equal(alone.series[0].rotation, together.series[number].rotation)
    first, second, third = together.series
    assert torch.equal(first.rotation[3], hidden.rotation[3]) and torch.equal(first.xyz[3], hidden.xyz[3])
    assert first.score.isnan().tolist() == [i == 3 for i in range(6)] and second.score.isnan().all()
    assert torch.equal(second.rotation, unused.rotation)
    assert (
        2.5 < together.error[2].median() / together.error[0][:3].median() < 5
    )  # the noise of the images, a few more tilts
    assert torch.isfinite(third.score).all()


@pytest.mark.parametrize("kind", ["plain", "premultiplied", "own noise"])
def test_error_of_the_contrast(kind: str) -> None:
    """At the true poses the images of 60 particles are all alike but for their noise: contrasts scatter by what `error` says.

    A quarter: the standard deviation of 60 is known to 9 %, and the noise that is measured has the signal in it.
    """
    density = blobs(24)
    particles = particle_set(density, 60, PIXEL, noise=6.0, seed=3)
    if kind == "premultiplied":
        particles = premultiplied(particles)
    task = align.Task(40.0, exhaustive=False, limits=Limits(0.0, max_angle=1e-9), own_noise=kind == "own noise")
    out = align.iterate([particles], [particles], (density, density), task, MEMORY)
    contrast, error = out.contrast[0], out.error[0]
    relative = contrast.std() / contrast.mean()
    assert relative == pytest.approx(float((error / contrast.mean()).square().mean().sqrt()), rel=0.25)


def test_batches_do_not_matter() -> None:
    density = blobs(24)
    start = lost(particle_set(density, 6, PIXEL, noise=1.0))
    task = align.Task(50.0, exhaustive=True, limits=Limits(2.0))
    halves = (smooth(density),) * 2
    large, small = (align.iterate([start], [start], halves, task, memory).series[0] for memory in (MEMORY, 1))
    assert rotation_distance(large.rotation, small.rotation).max() < 0.05
    torch.testing.assert_close(large.score, small.score, rtol=1e-4, atol=0)


def test_likely_and_distinct_candidates() -> None:
    """25 below the best log-likelihood is given up, and of two that are one the better stays."""
    score = torch.tensor([[10.0, 8.7, 8.6, -11.0]]).double()
    assert align._likely(score).tolist() == [[True, True, False, False]]
    band = subtilts.slices.Band.of(32, 8.0)
    one = torch.eye(3, dtype=torch.float64)[None]
    near = about([1.0, 0, 0], torch.tensor([2.0]))  # the limit is 0.5 / 8 rad = 3.6°
    far = about([1.0, 0, 0], torch.tensor([7.0]))
    still = torch.zeros(1, 3, dtype=torch.float64)
    found = [align.Poses.at(r, s) for r, s in ((one, still), (near, still), (far, still), (one, still + 0.5))]
    score, alive = torch.tensor([[5.0, 6.0, 4.0, 5.0]]).double(), torch.ones(1, 4, dtype=torch.bool)
    assert align._first_of_its_kind(found, score, alive, band).tolist() == [[False, True, True, True]]
    alive[0, 1] = False
    assert align._first_of_its_kind(found, score, alive, band)[0, 0]


def test_bands_double() -> None:
    assert [b.radius for b in align.bands(64, 4.0, 30.0)] == [4, 8, 16, 30]
    assert [b.radius for b in align.bands(64, 6.0, 6.0)] == [6] and [b.radius for b in align.bands(64, 9.0, 6.0)] == [6]


def test_particles_at_their_limit_are_counted() -> None:
    start = particle_set(blobs(24), 4, 4.0, noise=0.0)
    moved = torch.tensor([[6.0, 0, 0], [0, 0, -5.99], [3.0, 0, 0], [0, 6.0, 0]], dtype=torch.float64)
    used = start.using(torch.tensor([True, True, True, False]))
    now = used.moved(used.rotation, used.xyz + moved, used.score)
    assert align.at_the_limit([used], [now], 6.0) == 2
