"""The continuous optimum of a pose: Gauss-Newton on exact slices, three angles and three shifts, analytic Jacobian,
Levenberg damping. The score is that of `search`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods.refine.limits import Limits
from libemc.methods.refine.poses import Poses
from libemc.methods.subtilts import Batch
from libemc.numerics import slices
from libemc.numerics.rotations import matrix_from_rotvec
from libemc.numerics.slices import FourierVolume

POLISH_STEPS = 10
DAMPING = (1e-2, 4.0, 0.3)
"""Levenberg's first damping, relative to the diagonal; factors after a worse and a better step."""
LONGEST_TURN, LONGEST_SLIDE = 2.0, 1 / (2 * math.pi)
"""Longest step, in radians times the band's radius and in finest periods: beyond it the linear model means nothing."""
ARRIVED = 0.01
"""A pose has arrived when a step is shorter than this part of the longest."""
HELD = 1e6
"""Stiffness of a turn that the limits forbid, over the diagonal of the normal matrix."""
SMALLER = 0.7
"""What has arrived is left out as soon as no more than this part of the particles still moves."""


def moved_images(batch: Batch, shift: Tensor) -> Tensor:
    """(B, 2) px: where each image shows its particle when that is moved by `shift` (P, 3) px in the specimen frame."""
    seen = torch.einsum("bij,bj->bi", batch.tilt_matrices[:, :2], shift[batch.owner])
    return batch.shift + seen * batch.magnification[:, None]


@dataclass(frozen=True)
class PoseTerms:
    """What a step from a pose needs, per particle; the six parameters are a rotation vector (radians) and a shift (px).

    Attributes:
        cross: ⟨y, m⟩ (P,); norm: |m|² (P,).
        by_cross, by_norm: their derivatives (P, 6).
        normal: (P, 6, 6), the Jacobian's.
    """

    cross: Tensor
    norm: Tensor
    by_cross: Tensor
    by_norm: Tensor
    normal: Tensor


def pose_terms(batch: Batch, volume: FourierVolume, rotation: Tensor, shift: Tensor) -> PoseTerms:
    """The terms at rotations (P, 3, 3) and shifts (P, 3) px."""
    turn = batch.tilt_matrices
    sums = slices.fit_sums(
        volume, turn @ rotation[batch.owner], batch.band, batch.values, batch.transfer**2,
        moved_images(batch, shift), batch.magnification,
    )  # fmt: skip
    # the specimen's six parameters as the image's five: a turn, and a shift that the magnification scales
    to_image = torch.zeros(len(turn), 5, 6, dtype=torch.float64)
    to_image[:, :3, :3] = turn
    to_image[:, 3:, 3:] = turn[:, :2] * (2 * torch.pi / batch.band.box * batch.magnification[:, None, None])
    by_cross = torch.einsum("bi,bij->bj", sums.cross[:, 1:], to_image)
    by_norm = 2 * torch.einsum("bi,bij->bj", sums.normal[:, 0, 1:], to_image)
    normal = to_image.transpose(1, 2) @ sums.normal[:, 1:, 1:] @ to_image

    def total(values: Tensor) -> Tensor:
        start = torch.zeros(len(rotation), *values.shape[1:], dtype=torch.float64)
        return start.index_add_(0, batch.owner, values)

    return PoseTerms(*map(total, (sums.cross[:, 0], sums.normal[:, 0, 0], by_cross, by_norm, normal)))


def score_poses(batch: Batch, volume: FourierVolume, rotation: Tensor, shift: Tensor) -> Tensor:
    """(P,) score ⟨y, m⟩ / |m| of poses, exact slices."""
    data = batch.centred(moved_images(batch, shift))
    s = slices.extract_slices(volume, batch.matrices(rotation), batch.band, batch.magnification)
    cross = (data.real * s.real + data.imag * s.imag).sum(1).double()
    norm = (batch.transfer**2 * (s.real**2 + s.imag**2)).sum(1).double()
    zero = torch.zeros(len(rotation), dtype=torch.float64)
    total = zero.index_add(0, batch.owner, norm)
    return zero.index_add(0, batch.owner, cross) / total.clamp_min(1e-30).sqrt()


def within(vectors: Tensor, limit: float) -> Tensor:
    """Vectors (P, 3), those longer than `limit` shortened to it."""
    return vectors * (limit / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


def polish(
    batch: Batch,
    volume: FourierVolume,
    poses: Poses,
    limits: Limits,
    prior: Tensor | None = None,
    steps: int = POLISH_STEPS,
) -> Poses:
    """Continuous optimum of rotation and shift by damped Gauss-Newton, never worse than the start.

    Minimises |y - a·m|² over pose and scale a, the scale eliminated (variable projection in Kaufman's form), with
    y already CTF-weighted: only ⟨y, m⟩ and |m|² are needed. What has arrived is left out of further steps.

    Args:
        poses: where to start.
        limits: what poses may be; shifts are about the batch's positions.
        prior: (P, 3, 3) rotations that the limits are about; None: the batch's own.
    """
    about = batch.rotation if prior is None else prior
    found, here = poses, poses
    who = torch.arange(len(poses.rotation))
    damping = torch.full((len(who),), DAMPING[0], dtype=torch.float64)
    best = torch.full((len(who),), -torch.inf, dtype=torch.float64)
    normal, gradient = torch.zeros(len(who), 6, 6).double(), torch.zeros(len(who), 6).double()
    centre, moving = here, torch.ones(len(who), dtype=torch.bool)
    longest = (LONGEST_TURN / batch.band.radius, LONGEST_SLIDE * batch.band.box / batch.band.radius)
    for step_number in range(steps + 1):
        terms = pose_terms(batch, volume, here.rotation, here.shift)
        norm = terms.norm.clamp_min(1e-30)
        score = terms.cross / norm.sqrt()
        better = score > best
        best = torch.where(better, score, best)
        centre = Poses(
            torch.where(better[:, None, None], here.rotation, centre.rotation),
            torch.where(better[:, None], here.shift, centre.shift),
            best,
        )
        if step_number == steps:
            break
        damping = torch.where(better, damping * DAMPING[2], damping * DAMPING[1]).clamp(1e-4, 1e4)
        # where the images contradict the pose (a negative product) the step still goes uphill
        scale = (terms.cross.abs() / norm).clamp_min(1e-30)
        projected = terms.normal - terms.by_norm[:, :, None] * terms.by_norm[:, None, :] / (4 * norm[:, None, None])
        normal[better] = projected[better]
        gradient[better] = (terms.by_cross / scale[:, None] - terms.by_norm / 2)[better]
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        floor = 1e-9 * diagonal.amax(dim=1, keepdim=True) + 1e-30
        lhs = normal + torch.diag_embed(damping[:, None] * diagonal.clamp_min(0) + floor)
        if limits.max_tilt == 0:
            axis = centre.rotation[:, :, 2]
            across = torch.eye(3, dtype=torch.float64) - axis[:, :, None] * axis[:, None, :]
            lhs[:, :3, :3] += HELD * diagonal.amax(dim=1)[:, None, None] * across
        step = torch.linalg.solve(lhs, gradient[..., None])[..., 0]
        turn, slide = within(step[:, :3], longest[0]), within(step[:, 3:], longest[1])
        here = Poses(
            limits.hold(matrix_from_rotvec(torch.rad2deg(turn)) @ centre.rotation, about),
            within(centre.shift + slide, limits.shift_px),
            best,
        )
        length = torch.maximum(
            torch.linalg.vector_norm(turn, dim=1) / longest[0], torch.linalg.vector_norm(slide, dim=1) / longest[1]
        )
        moving = length > ARRIVED
        if not moving.any():
            break
        if moving.double().mean() < SMALLER:
            found = found.replaced(who, centre)
            keep = torch.nonzero(moving)[:, 0]
            batch, about, here, centre = batch.some(keep), about[keep], here[keep], centre[keep]
            who, damping, best = who[keep], damping[keep], best[keep]
            normal, gradient = normal[keep], gradient[keep]
    return found.replaced(who, centre)
