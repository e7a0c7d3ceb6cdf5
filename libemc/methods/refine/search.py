"""The exhaustive search: all particles meet all rotations and shifts in matrix products.

Each particle's images are inserted once, CTF-weighted, into a small half ball of Fourier space; the reference is sampled
there at every rotation. The score of a pose is the normalised correlation of a particle's images with the prediction,
⟨y, m⟩ / |m|, over CTF- and dose-weighted coefficients whitened by the noise: the likelihood with the scale of each
particle left free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods.refine.limits import Limits
from libemc.methods.refine.poses import Poses
from libemc.methods.subtilts import Batch, narrowed
from libemc.numerics import slices
from libemc.numerics.grids import centred_radius
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance
from libemc.numerics.slices import Accumulator, Band, FourierVolume
from libemc.numerics.so3 import local_rotation_grid, rotation_grid

SEARCH_RESOLUTION = 40.0
"""Å: the exhaustive search never uses finer data; what it cannot tell apart there, the polish decides."""
STEP_OVER_CROWTHER = 1.0
"""Angular step of the search over the Crowther angle, resolution / diameter of the reference (Crowther et al. 1970)."""
LEAST_RADIUS = 3.0
"""Fourier pixels: less than this tells no orientations apart."""
EXTENT_ENERGY = 0.98
"""Part of a reference's energy that its diameter holds."""
ROTATIONS_AT_ONCE = 4096
PRODUCTS_AT_ONCE = 1 << 26
"""Scores of particles, shifts and rotations that are held at a time, 256 MB."""
CROWDED = 8
"""So many neighbours of each peak are looked through for the next."""
APART = 1.7
"""Steps between two rotations that are not of one peak."""
LEAST_ENVELOPE = 0.2
"""The kernel's envelope is not divided out where it is below this: the box's corners, where no particle is."""


@dataclass(frozen=True)
class HalfBalls:
    """CTF-weighted particles in the half ball |q| < radius: what the exhaustive search needs of them.

    Attributes:
        points: (3, Q) in unpadded Fourier pixels.
        data: (P, Q) complex64, sum of CTF·image; weight: (P, Q) float32, sum of CTF².
        box: the particles'.
    """

    points: Tensor
    data: Tensor
    weight: Tensor
    box: int


def half_balls(batch: Batch, radius: float) -> HalfBalls:
    """Insert each particle of a batch, at its present position, into a half ball of its own (no rotation)."""
    box, count = batch.band.box, len(batch.rotation)
    band = Band.of(box, radius)
    values = narrowed(batch, band)
    centred, squared = values.centred(), values.transfer**2
    data, weight, points = [], [], torch.empty(0)
    for p in range(count):
        mine = batch.owner == p
        ball = Accumulator(box, radius, padding=1.0)
        ball.add(centred[mine], squared[mine], values.tilt_matrices[mine], band, values.magnification[mine])
        numerator, total = ball.folded()
        h = ball.half
        line = torch.arange(-h, h + 1)
        z, y, x = torch.meshgrid(line, line, torch.arange(0, h + 2), indexing="ij")
        upper = (x > 0) | (y > 0) | ((y == 0) & (z > 0))
        inside = upper & (x**2 + y**2 + z**2 < (radius * ball.scale) ** 2)
        data.append(numerator[inside])
        weight.append(total[inside])
        points = torch.stack([x[inside], y[inside], z[inside]]).double() / ball.scale
    return HalfBalls(points, torch.stack(data), torch.stack(weight), box)


def search_shifts(max_shift: float, step: float) -> Tensor:
    """(S, 3) px: the nodes of a cubic grid within a ball, the zero shift first."""
    n = math.floor(max_shift / step)
    line = torch.arange(-n, n + 1, dtype=torch.float64) * step
    grid = torch.cartesian_prod(line, line, line)
    length = torch.linalg.vector_norm(grid, dim=1)
    order = length.argsort(stable=True)
    return grid[order[length[order] <= max_shift + 1e-9]]


def search_reference(density: Tensor, radius: float) -> FourierVolume:
    """A reference for the exhaustive search.

    Unpadded insertion leaves the kernel's envelope on the particles; scores are exact when the reference is divided by
    it. The envelope is taken as round: it is divided out before the reference is turned.
    """
    n = density.shape[-1]
    grid = Accumulator(n, radius, padding=1.0)
    flat = density / slices.envelope(n, grid.padded).clamp_min(LEAST_ENVELOPE).to(density)
    return FourierVolume.from_map(flat, radius=min(radius + 1, n / 2))


def _shifted(balls: HalfBalls, shifts: Tensor) -> Tensor:
    """(P, S, 2Q) real: the data with the content at each of (S, 3) px brought to the centre."""
    turns = shifts @ balls.points / balls.box  # (S, Q)
    phase = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(torch.complex64)
    return torch.view_as_real(balls.data[:, None] * phase).flatten(2)


def _scores(moved: Tensor, weight: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Best score over the shifts, and which it is, of every particle at every rotation: (P, N) each.

    moved: (P, S, 2Q); weight: (P, Q); block: (N, Q) the reference at each rotation.
    """
    cross = moved.flatten(0, 1) @ torch.view_as_real(block).flatten(1).T
    top, which = cross.view(len(moved), -1, len(block)).max(dim=1)
    norm = weight @ (block.real**2 + block.imag**2).T
    return top / norm.clamp_min(torch.finfo(norm.dtype).tiny).sqrt(), which


def search_everywhere(
    balls: HalfBalls, reference: FourierVolume, rotations: Tensor, shifts: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Score all particles at all rotations and shifts, in matrix products.

    Args:
        rotations: (N, 3, 3); shifts: (S, 3) px, specimen frame.
        keep: how many of the best rotations to return.

    Returns:
        (P, keep) score, (P, keep) int64 rotation, (P, keep) int64 shift; best first.
    """
    moved = _shifted(balls, shifts)
    best: list[tuple[Tensor, Tensor, Tensor]] = []
    at_once = max(1, min(ROTATIONS_AT_ONCE, PRODUCTS_AT_ONCE // (len(balls.data) * len(shifts))))
    for first in range(0, len(rotations), at_once):
        # the specimen-frame point q is the reference-frame point Rᵀq: sample_points multiplies from the left
        block = slices.sample_points(reference, rotations[first : first + at_once], balls.points)
        score, which = _scores(moved, balls.weight, block)
        value, place = score.topk(min(keep, score.shape[1]), dim=1)
        best.append((value, place + first, which.gather(1, place)))
    value, rotation, shift = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    value, place = value.topk(min(keep, value.shape[1]), dim=1)
    return value, rotation.gather(1, place), shift.gather(1, place)


def search_about(
    balls: HalfBalls, reference: FourierVolume, prior: Tensor, turns: Tensor, shifts: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `search_everywhere`, for rotations prior·turn with a prior (P, 3, 3) of each particle and turns (N, 3, 3)."""
    moved = _shifted(balls, shifts)
    found = []
    for p in range(len(prior)):
        block = slices.sample_points(reference, prior[p] @ turns, balls.points)
        score, which = _scores(moved[p : p + 1], balls.weight[p : p + 1], block)
        value, place = score[0].topk(min(keep, len(turns)))
        found.append((value, place, which[0][place]))
    value, rotation, shift = (torch.stack(parts) for parts in zip(*found, strict=True))
    return value, rotation, shift


def distinct(rotation: Tensor, separation: float, most: int) -> Tensor:
    """The first rotations of each particle that are no neighbours of an earlier one.

    Args:
        rotation: (P, C, 3, 3), best first; separation: degrees.
        most: how many to keep.

    Returns:
        (P, C) bool.
    """
    trace = torch.einsum("pcij,pdij->pcd", rotation, rotation)
    near = trace > 1 + 2 * math.cos(math.radians(separation))
    keep = torch.zeros(rotation.shape[:2], dtype=torch.bool)
    for c in range(rotation.shape[1]):
        keep[:, c] = ~(near[:, c] & keep).any(dim=1) & (keep.sum(dim=1) < most)
    return keep


def diameter(density: Tensor) -> float:
    """Pixels: of the sphere about the centre that holds `EXTENT_ENERGY` of a map's squared density (n, n, n)."""
    radius = centred_radius(density.shape).round().long().reshape(-1)
    power = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add_(
        0, radius, density.double().reshape(-1) ** 2
    )
    inside = power.cumsum(0)
    return 2.0 * max(1, int((inside < EXTENT_ENERGY * inside[-1]).sum()))


def _turns_within(limits: Limits, step: float) -> Tensor:
    """(N, 3, 3): rotations about the identity, the first, as dense as a grid of `step` degrees up to the limits and on them."""
    if limits.max_tilt is None:
        grid = local_rotation_grid(step, limits.max_angle or 0.0)
    else:
        count = math.ceil(360 / step)
        spin = torch.zeros(count, 3, dtype=torch.float64)
        spin[:, 2] = torch.arange(count) * (360 / count)
        n = math.ceil(limits.max_tilt / step) + 1
        i, j = torch.cartesian_prod(*[torch.arange(-n, n + 1, dtype=torch.float64)] * 2).T
        # a hexagonal lattice: every point of the plane is within 0.58 steps of one of its points
        lean = step * torch.stack([i + j / 2, j * (math.sqrt(3) / 2), torch.zeros_like(i)], dim=1)
        length = torch.linalg.vector_norm(lean, dim=1)
        lean = lean[length.argsort(stable=True)][: int((length <= min(limits.max_tilt + 0.58 * step, 180.0)).sum())]
        grid = (matrix_from_rotvec(lean)[:, None] @ matrix_from_rotvec(spin)).flatten(0, 1)
    held = limits.hold(grid, torch.eye(3, dtype=torch.float64).expand_as(grid))
    return held[rotation_distance(held, grid) <= 0.58 * step + 1e-6]


@dataclass(frozen=True)
class SearchGrid:
    """What the exhaustive search goes through, made once an iteration.

    Attributes:
        radius: of the half balls, Fourier pixels. step: degrees.
        rotations: (N, 3, 3): of all particles alike, or about each one's prior where `limits` bound them.
        shifts: (S, 3) px.
    """

    radius: float
    step: float
    rotations: Tensor
    shifts: Tensor
    limits: Limits

    @staticmethod
    def of(box: int, pixel_size: float, resolution: float, across: float, limits: Limits, symmetry: str) -> SearchGrid:
        """Rotations modulo the symmetry and shifts within the limits, as fine as the data that takes part.

        Args:
            resolution: Å, finest data that may take part.
            across: diameter of the reference, pixels.
        """
        resolution = max(resolution, SEARCH_RESOLUTION, 2 * pixel_size)
        radius = max(LEAST_RADIUS, box * pixel_size / resolution)
        step = math.degrees(STEP_OVER_CROWTHER * (box / radius) / min(across, box))
        rotations = _turns_within(limits, step) if limits.bounded else rotation_grid(step, symmetry)
        # a third of the finest period: the correlation is then still above cos(pi/3·√3/2) between the nodes
        shifts = search_shifts(min(limits.shift_px, box / 2), box / radius / 3)
        return SearchGrid(radius, step, rotations, shifts, limits)

    def candidates(self, balls: HalfBalls, reference: FourierVolume, prior: Tensor, most: int) -> list[Poses]:
        """The best rotations of each particle that are no neighbours, best first; where there are fewer, the best again."""
        if not len(self.rotations):
            return []
        looked_through = most * CROWDED
        if self.limits.bounded:
            _, place, shift = search_about(balls, reference, prior, self.rotations, self.shifts, looked_through)
            rotation = prior[:, None] @ self.rotations[place]
        else:
            _, place, shift = search_everywhere(balls, reference, self.rotations, self.shifts, looked_through)
            rotation = self.rotations[place]
        peaks = distinct(rotation, APART * self.step, most)
        order, kept = (~peaks).long().argsort(dim=1, stable=True), peaks.sum(dim=1)
        each = torch.arange(len(prior))
        out = []
        for c in range(min(most, order.shape[1])):
            column = torch.where(c < kept, order[:, c], order[:, 0])
            out.append(Poses.at(rotation[each, column], self.shifts[shift[each, column]]))
        return out
