"""The reference: what particles in known poses make, sums that go on, and a map brought to its middle."""

from __future__ import annotations

import pytest
import torch

from libemc.methods.initial_model.balls import particle_balls
from libemc.methods.initial_model.posterior import Poses, Posterior
from libemc.methods.initial_model.reference import (
    blend,
    centred,
    insert,
    maps_of,
    resampled,
    small_box,
    sphere,
    weighted_sums,
)
from libemc.methods.overlay import ball_points, coefficients, overlay
from libemc.numerics.slices import Accumulator
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL, RADIUS = 24, 8.0, 7.0


def certain(rotations: int, classes: torch.Tensor) -> Posterior:
    """Every particle wholly at a rotation of its own, without a shift."""
    place = torch.arange(rotations)[:, None]
    nothing = torch.zeros(rotations, dtype=torch.float64)
    return Posterior(classes[:, None], place, torch.ones(rotations, 1, 1), nothing, nothing)


def test_particles_at_their_true_poses_make_the_map() -> None:
    """In the band, without the mean: correlation above 0.97; with the hand mirrored or in other poses not."""
    density = blobs(BOX)
    particles = particle_set(density, 30, PIXEL, 0.5)
    balls = particle_balls([particles], RADIUS, 1 << 30)
    small = small_box(RADIUS)
    mask = sphere(small, BOX * PIXEL, 0.75 * BOX * PIXEL)
    poses = Poses(particles.rotation, torch.zeros(1, 3, dtype=torch.float64))
    (found,) = maps_of(weighted_sums(balls, small, certain(30, torch.zeros(30).long()), poses, 1), mask)
    wanted = resampled(density, small) * mask
    points = ball_points(RADIUS)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        x, y = coefficients(a, points), coefficients(b, points)
        return float((x.conj() * y).real.sum() / (x.norm() * y.norm()))

    assert correlation(found, wanted) > 0.97
    assert correlation(found, torch.roll(wanted.flip(0), 1, 0)) < 0.8
    turned = Poses(particles.rotation.roll(1, 0), poses.shifts)
    (wrong,) = maps_of(weighted_sums(balls, small, certain(30, torch.zeros(30).long()), turned, 1), mask)
    assert correlation(wrong, wanted) < 0.8


def test_shared_poses_and_classes() -> None:
    """Half of a particle in each of two poses is the mean of both; a class gets its own particles and no others."""
    particles = particle_set(blobs(BOX), 4, PIXEL, 0.5)
    balls = particle_balls([particles], RADIUS, 1 << 30)
    small, shift = small_box(RADIUS), torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, -0.02]], dtype=torch.float64)
    rotations = particles.rotation[:2]
    weight = torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]).expand(4, 2, 2)
    classes = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]])
    nothing = torch.zeros(4, dtype=torch.float64)
    found = Posterior(classes, torch.tensor([[0, 1]]).expand(4, 2), weight, nothing, nothing)
    sums = weighted_sums(balls, small, found, Poses(rotations, shift), 2)
    phase = torch.exp(2j * torch.pi * (shift @ balls.points)).to(torch.complex64)
    for c, own in enumerate(sums):
        wanted = Accumulator(small, RADIUS)
        for p in (c, c + 2):
            for k in range(2):
                one = slice(k, k + 1)
                insert(
                    wanted,
                    balls.points,
                    0.5 * balls.data[p : p + 1] * phase[k],
                    0.5 * balls.weight[p : p + 1],
                    rotations[one],
                )
        torch.testing.assert_close(own.sums, wanted.sums, rtol=1e-4, atol=1e-5 * float(wanted.sums.abs().max()))
    first = [own.sums.clone() for own in sums]
    again = weighted_sums(balls, small, found, Poses(rotations, shift), 2)
    for own in again:
        own.sums *= 3
    for before, after in zip(first, blend(sums, again, 0.25), strict=True):
        torch.testing.assert_close(after.sums, 1.5 * before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("box", [24, 27])
def test_centre_of_mass(box: int) -> None:
    density = blobs(box)
    x = torch.arange(box) - box // 2
    everywhere = torch.ones(box, box, box)

    def middle(a: torch.Tensor) -> list[float]:
        mass = a.clamp_min(0).double() ** 2
        return [float((mass.sum(dim=d) * x).sum() / mass.sum()) for d in ((0, 1), (0, 2), (1, 2))]

    off = torch.roll(density, (2, -1, 3), (0, 1, 2))
    (found,) = centred(off[None], everywhere, 10.0)
    assert max(map(abs, middle(off))) > 1 and max(map(abs, middle(found))) < 0.05
    (little,) = centred(off[None], everywhere, 1.0)
    moved = torch.tensor(middle(little)) - torch.tensor(middle(off))
    assert float(moved.norm()) == pytest.approx(1.0, abs=0.05)
    assert overlay(found, density, 6.0, 4.0).correlation > 0.99
