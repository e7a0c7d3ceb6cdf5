"""Particles that move while they are exposed: pose and path together, the path a random walk from exposure to exposure.

The path of a particle is d = σ·B·w, in pixels of the specimen's frame: independent steps w of unit variance, summed in the
order of the exposures, their size by the square root of the dose, and freed of the path's mean, weighted by what each
exposure still shows of the finest detail. So the position of a particle is that at which its detail is, and the path what
is left. Pose and path are a Gauss-Newton fit of all the images of the particle at once (Bayesian polishing's prior, Zivanov et
al. 2019, here in space and for one particle at a time); σ is the one that makes the images likeliest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods.refine.limits import Limits
from libemc.methods.refine.polish import DAMPING, LONGEST_SLIDE, LONGEST_TURN, moved_images, within
from libemc.methods.refine.poses import Poses
from libemc.methods.subtilts import Batch, SeriesModel
from libemc.numerics import slices
from libemc.numerics.dose import exposure_filter
from libemc.numerics.rotations import matrix_from_rotvec
from libemc.numerics.slices import FourierVolume

MOTION_STEPS = 4
AT_ONCE = 128
"""Particles whose paths are fitted together: each takes some half a megabyte."""
STEP_SIZES = (0.0, 0.03, 0.06, 0.1, 0.16, 0.25, 0.4, 0.6, 1.0, 1.6)
"""Å per exposure and axis that are tried for σ."""
SAMPLE = 64
"""Particles that say which is likeliest."""


@dataclass(frozen=True)
class Walk:
    """How the exposures of a tilt series follow each other.

    Attributes:
        basis: (T, T - 1) B: the path at each tilt, by unit steps between exposures.
    """

    basis: Tensor

    @staticmethod
    def of(series: SeriesModel, resolution: float) -> Walk:
        """For the used tilts of a series and the resolution, Å, whose detail says where a particle is."""
        dose = series.dose_end
        order = dose.argsort(stable=True)
        gained = (dose[order][1:] - dose[order][:-1]).clamp_min(0)
        size = (gained / gained.mean()).sqrt() if float(gained.sum()) > 0 else torch.ones_like(gained)
        basis = torch.zeros(len(dose), max(0, len(dose) - 1), dtype=torch.float64)
        basis[order[1:]] = torch.tril(torch.ones(len(gained), len(gained), dtype=torch.float64)) * size
        left = exposure_filter(torch.tensor(1 / resolution), dose, series.optics.voltage).double() ** 2 * series.use
        return Walk(basis - (left / left.sum().clamp_min(1e-30)) @ basis)


def moved_by(batch: Batch, path: Tensor) -> Tensor:
    """(B, 2) px: where each image shows its particle, when that has gone along a path (P, T, 3) px of the specimen's frame."""
    along = torch.einsum("bij,bj->bi", batch.tilt_matrices[:, :2], path[batch.owner, batch.tilt])
    return batch.shift + along * batch.magnification[:, None]


@dataclass(frozen=True)
class _Terms:
    """Log-likelihood of P particles with its slope and curvature by pose (6) and by the path at each tilt (T, 3)."""

    score: Tensor
    pose: Tensor
    path: Tensor
    pose_pose: Tensor
    path_pose: Tensor
    path_path: Tensor


def _terms(batch: Batch, volume: FourierVolume, poses: Poses, path: Tensor, tilts: int) -> _Terms:
    """At poses and paths (P, T, 3) px. The scale of each particle is the best one (its curvature is left out)."""
    turn, mag, owner = batch.tilt_matrices, batch.magnification[:, None, None], batch.owner
    seen = moved_images(replace(batch, shift=moved_by(batch, path)), poses.shift)
    sums = slices.fit_sums(
        volume, turn @ poses.rotation[owner], batch.band, batch.values, batch.transfer**2, seen, batch.magnification
    )
    count = len(poses.rotation)

    def total(values: Tensor) -> Tensor:
        start = torch.zeros(count, *values.shape[1:], dtype=torch.float64)
        return start.index_add_(0, owner, values)

    cross, norm = total(sums.cross[:, 0]), total(sums.normal[:, 0, 0]).clamp_min(1e-30)
    scale = (cross.abs() / norm)[owner, None]
    slope = 2 * (scale * sums.cross[:, 1:] - scale**2 * sums.normal[:, 0, 1:])
    curvature = 2 * scale[..., None] ** 2 * sums.normal[:, 1:, 1:]
    along = turn[:, :2] * (2 * math.pi / batch.band.box * mag)  # specimen's shift to the image's parameters 3 and 4
    to_pose = torch.zeros(len(turn), 5, 6, dtype=torch.float64)
    to_pose[:, :3, :3], to_pose[:, 3:, 3:] = turn, along
    path_slope, path_pose, path_path = (torch.zeros(count, tilts, 3, *more).double() for more in ((), (6,), (3,)))
    path_slope[owner, batch.tilt] = torch.einsum("bij,bi->bj", along, slope[:, 3:])
    path_pose[owner, batch.tilt] = along.transpose(1, 2) @ curvature[:, 3:] @ to_pose
    path_path[owner, batch.tilt] = along.transpose(1, 2) @ curvature[:, 3:, 3:] @ along
    return _Terms(
        score=cross / norm.sqrt(),
        pose=total(torch.einsum("bij,bi->bj", to_pose, slope)),
        path=path_slope,
        pose_pose=total(to_pose.transpose(1, 2) @ curvature @ to_pose),
        path_pose=path_pose,
        path_path=path_path,
    )


def _in_steps(terms: _Terms, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Slope (P, 6+3S) and curvature (P, 6+3S, 6+3S) by pose and steps, basis (T, S)."""
    count, steps = len(terms.pose), basis.shape[1]
    slope = torch.cat([terms.pose, torch.einsum("ts,pta->psa", basis, terms.path).flatten(1)], dim=1)
    size = 6 + 3 * steps
    curvature = torch.zeros(count, size, size, dtype=torch.float64)
    curvature[:, :6, :6] = terms.pose_pose
    mixed = torch.einsum("ts,ptab->psab", basis, terms.path_pose).reshape(count, 3 * steps, 6)
    curvature[:, 6:, :6], curvature[:, :6, 6:] = mixed, mixed.transpose(1, 2)
    weighted = torch.einsum("ptab,ts->psatb", terms.path_path, basis).reshape(count, steps * 3, -1, 3)
    square = torch.einsum("pxtb,tu->pxub", weighted, basis)
    curvature[:, 6:, 6:] = square.reshape(count, 3 * steps, 3 * steps)
    return slope, curvature


def likeliest_step(terms_slope: Tensor, terms_curvature: Tensor, pixel_size: float) -> float:
    """Å per exposure and axis that makes the images of all particles likeliest: maximum of the evidence over `STEP_SIZES`.

    In the linear model at the poses without motion: ½ gᵀ(I + H)⁻¹g - ½ log det(I + H), g and H by the unit steps, the pose
    taken out.

    Args:
        terms_slope: (P, 6+3S), terms_curvature: (P, 6+3S, 6+3S), by pose and by steps of a pixel.
    """
    pose, mixed = terms_curvature[:, :6, :6], terms_curvature[:, 6:, :6]
    pose = pose + 1e-9 * torch.diag_embed(pose.diagonal(dim1=1, dim2=2)) + 1e-30 * torch.eye(6)
    onto = torch.linalg.solve(pose, mixed.transpose(1, 2))
    g = terms_slope[:, 6:] - torch.einsum("pij,pi->pj", onto, terms_slope[:, :6])
    values, vectors = torch.linalg.eigh(terms_curvature[:, 6:, 6:] - mixed @ onto)
    values, g2 = values.clamp_min(0), torch.einsum("pij,pi->pj", vectors, g) ** 2
    best, step = -math.inf, 0.0
    for size in STEP_SIZES:
        s2 = (size / pixel_size) ** 2
        evidence = float((0.5 * s2 * g2 / (1 + s2 * values) - 0.5 * torch.log1p(s2 * values)).sum())
        if evidence > best:
            best, step = evidence, size
    return step


def step_size(batch: Batch, volume: FourierVolume, poses: Poses, walk: Walk, pixel_size: float) -> float:
    """`likeliest_step` of a batch at poses found without motion."""
    tilts = len(walk.basis)
    still = torch.zeros(len(poses.rotation), tilts, 3, dtype=torch.float64)
    return likeliest_step(*_in_steps(_terms(batch, volume, poses, still, tilts), walk.basis), pixel_size)


def polish_with_motion(
    batch: Batch, volume: FourierVolume, poses: Poses, walk: Walk, step_px: float, limits: Limits
) -> tuple[Poses, Tensor]:
    """Poses and paths that are best together, never worse than no motion.

    Args:
        poses: the best without motion.
        step_px: σ, pixels per exposure and axis.

    Returns:
        Poses, and paths (P, T, 3) px in the specimen's frame.
    """
    count, steps = len(poses.rotation), walk.basis.shape[1]
    if count > AT_ONCE:
        parts = [
            polish_with_motion(batch.some(who), volume, poses[who], walk, step_px, limits)
            for who in torch.arange(count).split(AT_ONCE)
        ]
        rotation, shift, score = (torch.cat([getattr(p, n) for p, _ in parts]) for n in ("rotation", "shift", "score"))
        return Poses(rotation, shift, score), torch.cat([path for _, path in parts])
    basis, tilts = step_px * walk.basis, len(walk.basis)
    here, w = poses, torch.zeros(count, steps, 3, dtype=torch.float64)
    best, best_w, value = here, w, torch.full((count,), -torch.inf, dtype=torch.float64)
    damping = torch.full((count,), DAMPING[0], dtype=torch.float64)
    slope, curvature = (
        torch.zeros(count, 6 + 3 * steps).double(),
        torch.zeros(count, 6 + 3 * steps, 6 + 3 * steps).double(),
    )
    longest = (LONGEST_TURN / batch.band.radius, LONGEST_SLIDE * batch.band.box / batch.band.radius)
    for number in range(MOTION_STEPS + 1):
        terms = _terms(batch, volume, here, torch.einsum("ts,psa->pta", basis, w), tilts)
        now = terms.score.clamp_min(0) ** 2 - 0.5 * (w**2).sum((1, 2))
        better = now > value
        value = torch.where(better, now, value)
        best = Poses(
            torch.where(better[:, None, None], here.rotation, best.rotation),
            torch.where(better[:, None], here.shift, best.shift),
            torch.where(better, terms.score, best.score),
        )
        best_w = torch.where(better[:, None, None], w, best_w)
        if number == MOTION_STEPS:
            break
        damping = torch.where(better, damping * DAMPING[2], damping * DAMPING[1]).clamp(1e-4, 1e4)
        new_slope, new_curvature = _in_steps(terms, basis)
        new_slope[:, 6:] -= w.flatten(1)
        new_curvature[:, 6:, 6:] += torch.eye(3 * steps, dtype=torch.float64)
        slope[better], curvature[better] = new_slope[better], new_curvature[better]
        diagonal = torch.diagonal(curvature, dim1=1, dim2=2)
        lhs = curvature + torch.diag_embed(damping[:, None] * diagonal + 1e-9 * diagonal.amax(1, keepdim=True) + 1e-30)
        delta = torch.linalg.solve(lhs, slope[..., None])[..., 0]
        turn, slide = within(delta[:, :3], longest[0]), within(delta[:, 3:6], longest[1])
        here = Poses(
            limits.hold(matrix_from_rotvec(torch.rad2deg(turn)) @ best.rotation, batch.rotation),
            within(best.shift + slide, limits.shift_px),
            best.score,
        )
        w = best_w + delta[:, 6:].reshape(count, steps, 3)
    return best, torch.einsum("ts,psa->pta", basis, best_w)
