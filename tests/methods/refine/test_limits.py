"""Limits against scipy's rotations: what is within stays, what is beyond comes to the nearest place within."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from libemc.methods.refine.limits import Limits
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between rotations."""
    return np.degrees((Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude())


def lean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between the z axes of two particles: exact for small ones too."""
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a[..., :, 2] - b[..., :, 2], axis=-1) / 2, 0, 1)))


def pairs(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return random_rotations(count, g), random_rotations(count, g)


@pytest.mark.parametrize(
    "limits",
    [Limits(max_angle=10.0), Limits(max_tilt=0.0), Limits(max_tilt=25.0), Limits(max_angle=40.0, max_tilt=15.0)],
)
def test_what_is_held_is_within(limits: Limits) -> None:
    """Random rotations about random priors, and again what came out: the same, to rounding."""
    rotation, prior = pairs()
    held = limits.hold(rotation, prior)
    if limits.max_angle is not None:
        assert angle(held.numpy(), prior.numpy()).max() < limits.max_angle + 1e-9
    if limits.max_tilt is not None:
        assert lean(held.numpy(), prior.numpy()).max() < limits.max_tilt + 1e-9
    assert angle(limits.hold(held, prior).numpy(), held.numpy()).max() < 1e-6
    np.testing.assert_allclose(np.linalg.det(held.numpy()), 1, atol=1e-12)


@pytest.mark.parametrize("limits", [Limits(max_angle=30.0), Limits(max_tilt=30.0), Limits(max_tilt=0.0)])
def test_it_is_the_nearest(limits: Limits) -> None:
    """Of 40000 rotations that are within the limits none is nearer to the one that was brought back, and one nearly as near.

    5°: how near the nearest of so many is, where they fill the most.
    """
    rotation, prior = (r[:6] for r in pairs())
    held = limits.hold(rotation, prior)
    g = torch.Generator().manual_seed(5)
    turn = torch.nn.functional.normalize(torch.randn(40000, 3, generator=g).double(), dim=1)
    if limits.max_angle is not None:
        within = matrix_from_rotvec(turn * limits.max_angle * torch.rand(40000, 1, generator=g) ** (1 / 3))
    else:
        spin = torch.zeros(40000, 3, dtype=torch.float64)
        spin[:, 2] = 360 * torch.rand(40000, generator=g)
        turn[:, 2] = 0
        tip = torch.nn.functional.normalize(turn, dim=1) * limits.max_tilt * torch.rand(40000, 1, generator=g).sqrt()
        within = matrix_from_rotvec(tip) @ matrix_from_rotvec(spin)
    for r, p, h in zip(rotation.numpy(), prior.numpy(), held.numpy(), strict=True):
        distance = angle(np.broadcast_to(r, within.shape), p @ within.numpy())
        own = angle(r[None], h[None])[0]
        assert own - 1e-6 < distance.min() < own + 5


def test_what_is_within_stays() -> None:
    g = torch.Generator().manual_seed(7)
    _, prior = pairs()
    turn = torch.nn.functional.normalize(torch.randn(400, 3, generator=g).double(), dim=1) * 9
    rotation = prior @ matrix_from_rotvec(turn)
    for limits in (Limits(), Limits(max_angle=9.5), Limits(max_tilt=9.5), Limits(max_angle=9.5, max_tilt=9.5)):
        assert (limits.hold(rotation, prior) - rotation).abs().max() < 1e-12
    assert [limits.bounded for limits in (Limits(3.0), Limits(max_angle=3.0), Limits(max_tilt=0.0))] == [0, 1, 1]


def test_an_axis_that_points_the_other_way() -> None:
    """Exactly opposite there is no nearest axis; any within will do, and nothing divides by zero."""
    prior = random_rotations(1, torch.Generator().manual_seed(1))
    flipped = prior @ torch.diag(torch.tensor([1.0, -1.0, -1.0])).double()
    held = Limits(max_tilt=20.0).hold(flipped, prior)
    assert lean(held.numpy(), prior.numpy())[0] == pytest.approx(20, abs=1e-6)
