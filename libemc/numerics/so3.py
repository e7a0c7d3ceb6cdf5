"""Sets of rotations to search over: a uniform grid over SO(3) modulo a point group, and a local grid about 1.

A `step` of h degrees means as many points per volume of SO(3) as a cubic lattice of spacing h has. All numbers in the
docstrings are measured by the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from libemc.numerics.rotations import matrix_from_quaternion, matrix_from_rotvec
from libemc.numerics.symmetry import symmetry_matrices

_PHI = math.sqrt(2)
_PSI = 1.533751168755204288118041
"""Turns per point of the two phases of the super-Fibonacci spiral: Alexa 2022, the root of x⁴ = x + 4."""

_CHUNK = 1 << 18
"""Points that are tested against a symmetry group at a time."""


def point_count(step: float) -> int:
    """Number of rotations at `step` degrees without symmetry: the volume of SO(3), 8π² rad³, over step³."""
    return max(1, round(8 * math.pi**2 / math.radians(step) ** 3))


def _spiral(n: int) -> Tensor:
    """Super-Fibonacci spiral of n quaternions (n, 4) (Alexa, CVPR 2022, algorithm 1): uniform over SO(3)."""
    s = torch.arange(n, dtype=torch.float64) + 0.5
    alpha, beta = 2 * math.pi * s / _PHI, 2 * math.pi * s / _PSI
    near, far = (s / n).sqrt(), (1 - s / n).sqrt()
    return torch.stack((near * alpha.sin(), near * alpha.cos(), far * beta.sin(), far * beta.cos()), dim=-1)


def _in_asymmetric_unit(rotations: Tensor, group: Tensor) -> Tensor:
    """Which of (n, 3, 3) are the nearest to the identity of all their equivalents R · S: (n,) bool."""
    traces = rotations.reshape(-1, 9) @ group.transpose(-1, -2).reshape(-1, 9).T  # the larger, the smaller the angle
    return traces[:, 0] >= traces.amax(dim=1) - 1e-9


def rotation_grid(step: float, symmetry: str = "c1") -> Tensor:
    """Rotations uniform over SO(3) modulo a point group.

    The points of a super-Fibonacci spiral that are nearer to the identity than their symmetry-equivalents. The mean
    distance of a random rotation to the grid is half a step, the largest 0.95 steps (1.2 where the seam of an
    asymmetric unit comes in).

    Args:
        step: degrees.
        symmetry: a group of `symmetry_matrices`.

    Returns:
        (N, 3, 3) float64 with N = `point_count(step)` / order of the group, to within the points of the seam.

    Raises:
        InputError: the name is not that of a group.
    """
    group = symmetry_matrices(symmetry)
    rotations = matrix_from_quaternion(_spiral(point_count(step)))
    if len(group) == 1:
        return rotations
    return torch.cat([part[_in_asymmetric_unit(part, group)] for part in rotations.split(_CHUNK)])


def local_rotation_grid(step: float, radius: float) -> Tensor:
    """Small rotations about the identity, on a body-centred cubic lattice of rotation vectors.

    Every rotation by up to `radius` is within 0.8 steps of a point (a cubic lattice of as many points: 0.87). To that
    end the points reach half a step beyond `radius`.

    Args:
        step: degrees, as in `rotation_grid`.
        radius: degrees.

    Returns:
        (M, 3, 3) float64, sorted by angle, the identity first.
    """
    spacing = 2 ** (1 / 3) * step  # of the cubic cell, which holds two points
    reach = radius + step / 2
    half = math.ceil(reach / spacing)
    axis = torch.arange(-half, half + 1, dtype=torch.float64)
    corners = torch.cartesian_prod(axis, axis, axis)
    lattice = spacing * torch.cat((corners, corners + 0.5))
    length = torch.linalg.vector_norm(lattice, dim=-1)
    order = length.argsort(stable=True)
    return matrix_from_rotvec(lattice[order[length[order] <= reach]])
