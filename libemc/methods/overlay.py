"""Maps laid over each other: what turns the one into the other, and how alike they are then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods.refine.search import search_shifts
from libemc.numerics import fourier, slices
from libemc.numerics.slices import FourierVolume
from libemc.numerics.so3 import local_rotation_grid, rotation_grid

COARSE = 1.5
"""Fourier pixels by which the search over all rotations stays below the finest band, as a factor."""
LEVELS = 4
"""How often the steps of the search are halved around the best place."""
CANDIDATES = 5
"""Places of the coarse search that are refined: maps of a symmetric particle fit nearly as well in several ways."""


@dataclass(frozen=True)
class Overlay:
    """What brings a map onto another: moving(Rᵀ(x - s)) = fixed(x), and how well.

    Attributes:
        rotation: (3, 3); shift: (3,) px x, y, z; correlation: over all coefficients of the band, but for the mean.
    """

    rotation: Tensor
    shift: Tensor
    correlation: float


def ball_points(radius: float) -> Tensor:
    """(3, Q) float64: one of each pair of Friedel mates with 0 < |k| < radius, in Fourier pixels."""
    h = math.ceil(radius)
    z, y, x = torch.meshgrid(*(torch.arange(a, h + 1) for a in (-h, -h, 0)), indexing="ij")
    upper = (x > 0) | (y > 0) | ((y == 0) & (z > 0))
    inside = upper & (x**2 + y**2 + z**2 < radius**2)
    return torch.stack([x[inside], y[inside], z[inside]]).double()


def coefficients(density: Tensor, points: Tensor) -> Tensor:
    """The transform of a cubic map at whole Fourier pixels (3, Q), x >= 0: (Q,) complex, origin n//2."""
    x, y, z = points.long()
    n = density.shape[-1]
    return fourier.rfftn_centred(density, 3)[z % n, y % n, x]


def _search(
    volume: FourierVolume, target: Tensor, points: Tensor, rotations: Tensor, shifts: Tensor, keep: int
) -> list[tuple[float, Tensor, Tensor]]:
    turns = shifts @ points / volume.box
    phase = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(target.dtype)
    left = torch.view_as_real(target * phase).reshape(len(shifts), -1)
    found = []
    for block in rotations.split(4096):
        model = slices.sample_points(volume, block, points)
        flat = torch.view_as_real(model).reshape(len(model), -1)
        score = (
            left @ flat.T / (torch.linalg.vector_norm(flat, dim=1) * torch.linalg.vector_norm(target)).clamp_min(1e-30)
        )
        best, which = score.max(dim=0)
        value, place = best.topk(min(keep, len(best)))
        found += [(float(v), block[p], shifts[which[p]]) for v, p in zip(value, place, strict=True)]
    return sorted(found, key=lambda f: -f[0])[:keep]


def overlay(moving: Tensor, fixed: Tensor, radius: float, max_shift: float) -> Overlay:
    """Find the rotation and shift that bring a map onto another: all of them first, then finer and finer about the best.

    Args:
        moving, fixed: (n, n, n), masked.
        radius: Fourier pixels, finest band that is compared.
        max_shift: px.
    """
    n = moving.shape[-1]
    volume = FourierVolume.from_map(moving.float(), radius=min(n / 2, radius + 1))
    coarse = max(3.0, radius / COARSE)
    points = ball_points(coarse)
    step = math.degrees(n / coarse / (0.7 * n))
    spacing = n / coarse / 3
    found = _search(
        volume,
        coefficients(fixed.float(), points),
        points,
        rotation_grid(step),
        search_shifts(max_shift, spacing),
        CANDIDATES,
    )
    points = ball_points(radius)
    target = coefficients(fixed.float(), points)
    best = []
    for _, rotation, shift in found:
        size, slide, value = step, spacing, -1.0
        for _ in range(LEVELS):
            size, slide = size / 2, slide / 2
            turned = local_rotation_grid(size, 1.5 * size) @ rotation
            moved = shift + search_shifts(1.8 * slide, slide)
            ((value, rotation, shift),) = _search(volume, target, points, turned, moved, 1)
        best.append((value, rotation, shift))
    value, rotation, shift = max(best, key=lambda b: b[0])
    return Overlay(rotation, shift, value)
