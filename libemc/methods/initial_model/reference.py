"""The reference of a descent: a small map for each class, and what the particles say it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from libemc.methods.initial_model.balls import Balls
from libemc.methods.initial_model.posterior import Poses, Posterior, shift_phases
from libemc.numerics import fourier, kernels
from libemc.numerics.masks import soft_sphere
from libemc.numerics.slices import Accumulator, FourierVolume

ROOM = 2.0
"""Fourier pixels between the finest band and the Nyquist frequency of the small box."""
LEAST_WEIGHT = 1e-3
"""Poses of less weight are left out."""
PRIOR = 0.05
"""Strength of the prior that a coefficient is zero, as a part of the mean weight in its shell."""
EDGE = 2.0
"""Voxels of the small box over which the mask falls off."""


def small_box(radius: float) -> int:
    """Voxels of a cube that is as large in Å as the particles' box, and holds the band |k| < radius."""
    return 2 * math.ceil(radius + ROOM)


def sphere(small: int, box_length: float, diameter: float) -> Tensor:
    """(m, m, m) float32: the soft mask of a descent, `diameter` Å wide in a box of `box_length` Å."""
    return soft_sphere(small, diameter / 2 / (box_length / small), EDGE)


def volumes(references: Tensor, radius: float) -> list[FourierVolume]:
    """References (C, m, m, m) ready to be sampled within a radius in Fourier pixels."""
    return [FourierVolume.from_map(r, radius=min(r.shape[-1] / 2, radius + 1)) for r in references]


def insert(sums: Accumulator, points: Tensor, values: Tensor, weights: Tensor, rotations: Tensor) -> None:
    """Add balls, values (B, Q) complex and weights (B, Q), of the specimen's frame, to the reference's frame.

    Args:
        points: (3, Q) Fourier pixels; rotations: (B, 3, 3), reference to specimen.
    """
    matrices = (rotations * sums.scale).float().contiguous()
    kernels.scatter_weighted(sums.sums, sums.half, points.float(), matrices, values, weights)


def random_start(
    balls: Balls, small: int, classes: int, rotations: Tensor, generator: torch.Generator
) -> list[Accumulator]:
    """Sums of the particles in given rotations (P, 3, 3), each in a class at random."""
    chosen = torch.randperm(len(balls), generator=generator) % classes
    sums = [Accumulator(small, balls.radius) for _ in range(classes)]
    for c, own in enumerate(sums):
        mine = chosen == c
        insert(own, balls.points, balls.data[mine], balls.weight[mine], rotations[mine])
    return sums


def weighted_sums(balls: Balls, small: int, found: Posterior, poses: Poses, classes: int) -> list[Accumulator]:
    """Sums of the particles at all poses that were kept of them, each at its weight, by class.

    Values over weights is where the likelihood that the posterior weighs is highest: a Newton step of it from anywhere,
    since it is quadratic in the reference.
    """
    sums = [Accumulator(small, balls.radius) for _ in range(classes)]
    phases = shift_phases(balls, poses.shifts)
    for p in range(len(balls)):
        whole = found.weight[p].sum(dim=1)  # (K,)
        kept = whole > LEAST_WEIGHT
        values = found.weight[p][kept].to(phases.dtype) @ phases * balls.data[p]
        weights = whole[kept][:, None] * balls.weight[p]
        rotations, classes_of = poses.rotations[found.rotation[p][kept]], found.class_[p][kept]
        for c in classes_of.unique().tolist():
            mine = classes_of == c
            insert(sums[c], balls.points, values[mine], weights[mine], rotations[mine])
    return sums


def blend(old: Sequence[Accumulator] | None, new: Sequence[Accumulator], rate: float) -> list[Accumulator]:
    """Sums that go on from old ones: the new at `rate`, the old at the rest (Cappé & Moulines 2009, eq. 11)."""
    if old is None:
        return list(new)
    for before, after in zip(old, new, strict=True):
        after.sums.mul_(rate).add_(before.sums, alpha=1 - rate)
    return list(new)


def maps_of(sums: Sequence[Accumulator], mask: Tensor) -> Tensor:
    """(C, m, m, m) references out of the sums, masked."""
    return torch.stack([own.map(floor=PRIOR) * mask for own in sums])


def centred(references: Tensor, mask: Tensor, most: float) -> Tensor:
    """References moved so that the centre of mass of each one's positive density, squared, is at the origin.

    Args:
        most: voxels, farthest move.
    """
    out = []
    for density in references:
        mass = density.clamp_min(0).double() ** 2
        line = torch.arange(len(mass), dtype=torch.float64) - len(mass) // 2
        total = mass.sum().clamp_min(1e-300)
        offset = torch.stack([(mass.sum(dim=d) * line).sum() for d in ((0, 1), (0, 2), (1, 2))]) / total
        offset = offset * (most / torch.linalg.vector_norm(offset).clamp_min(1e-12)).clamp_max(1.0)
        out.append(_moved(density, -offset) * mask)
    return torch.stack(out)


def _moved(density: Tensor, shift: Tensor) -> Tensor:
    """A cubic map whose content is moved by (3,) voxels x, y, z."""
    n = density.shape[-1]
    spectrum = torch.fft.rfftn(density)
    kz, ky, kx = (torch.fft.fftfreq(n), torch.fft.fftfreq(n), torch.fft.rfftfreq(n))
    turns = kx * shift[0] + ky[:, None] * shift[1] + kz[:, None, None] * shift[2]
    phase = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns).to(spectrum.dtype)
    return torch.fft.irfftn(spectrum * phase, s=density.shape)


def resampled(density: Tensor, box: int) -> Tensor:
    """A cubic map sampled anew by `box` voxels over the same length."""
    return fourier.resize(density, (box,) * 3)
