"""The weights of poses: a few particles by hand, pose by pose, and temperatures."""

from __future__ import annotations

import math

import pytest
import torch

from libemc.methods.initial_model.balls import Balls
from libemc.methods.initial_model.posterior import Poses, heat_for, log_weights, perplexity, posterior
from libemc.methods.overlay import ball_points
from libemc.numerics import slices
from libemc.numerics.rotations import random_rotations
from libemc.numerics.slices import FourierVolume
from tests.methods.subtilt_data import blobs

BOX = 16


def scene() -> tuple[Balls, list[FourierVolume], Poses]:
    g = torch.Generator().manual_seed(2)
    points = ball_points(3.5)
    data = torch.complex(*(3 * torch.randn(2, 5, points.shape[1], generator=g)))
    weight = 0.02 * torch.rand(5, points.shape[1], generator=g)
    balls = Balls(points, data, weight, 3.5, torch.zeros(5, dtype=torch.long), torch.arange(5))
    shifts = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, -0.2, 0.05]], dtype=torch.float64)
    references = [FourierVolume.from_map(blobs(BOX, seed) / 40) for seed in (1, 2)]
    return balls, references, Poses(random_rotations(70, g), shifts)


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_against_every_pose_by_itself(heat: float) -> None:
    balls, references, poses = scene()
    logs = torch.zeros(5, 2, 70, 3, dtype=torch.float64)
    for c, reference in enumerate(references):
        model = slices.sample_points(reference, poses.rotations, balls.points).to(torch.complex128)
        for s, shift in enumerate(poses.shifts):
            # the prediction for a particle that is off its place by `shift`
            moved = model * torch.exp(-2j * torch.pi * (shift @ balls.points))
            cross = torch.einsum("pq,nq->pn", balls.data.to(torch.complex128).conj(), moved).real
            logs[:, c, :, s] = 2 * cross - balls.weight.double() @ (moved.abs() ** 2).T
    found = posterior(balls, references, poses, 70 * 2, heat)
    scaled = logs / heat
    evidence = scaled.reshape(5, -1).logsumexp(dim=1) - math.log(2 * 70 * 3)
    torch.testing.assert_close(found.evidence, evidence, atol=1e-3, rtol=1e-4)
    wanted = torch.softmax(scaled.reshape(5, -1), dim=1).reshape(5, 140, 3)
    place = found.class_ * 70 + found.rotation
    assert all(sorted(row) == list(range(140)) for row in place.tolist())
    got = found.weight.double()
    torch.testing.assert_close(got, wanted.gather(1, place[..., None].expand(-1, -1, 3)), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(
        found.perplexity, perplexity(scaled.logsumexp(dim=3).reshape(5, -1)), rtol=1e-3, atol=1e-3
    )
    best = log_weights(balls, references, poses).double()
    torch.testing.assert_close(best, logs.amax(dim=3).reshape(5, -1), atol=1e-3, rtol=1e-4)


def test_only_the_heaviest_are_kept() -> None:
    balls, references, poses = scene()
    some, every = (posterior(balls, references, poses, keep) for keep in (4, 140))
    assert some.weight.shape == (5, 4, 3)
    torch.testing.assert_close(some.weight.sum(dim=(1, 2)), torch.ones(5))
    heaviest = every.weight.sum(dim=2).topk(4, dim=1).indices
    assert torch.equal(some.rotation, every.rotation.gather(1, heaviest))
    torch.testing.assert_close(some.evidence, every.evidence)


def test_perplexity_and_temperature() -> None:
    flat = torch.zeros(3, 50)
    torch.testing.assert_close(perplexity(flat), torch.full((3,), 50.0, dtype=torch.float64))
    two = torch.full((1, 50), -1e4)
    two[0, :2] = 0
    assert float(perplexity(two)) == pytest.approx(2.0)
    sharp = 100 * torch.randn(9, 400, generator=torch.Generator().manual_seed(0))
    for wanted in (2.0, 30.0, 200.0):
        heat = heat_for(sharp, wanted)
        assert heat > 1 and float(perplexity(sharp / heat).median()) == pytest.approx(wanted, rel=0.01)
    assert heat_for(flat, 20.0) == 1.0
