"""One iteration of a gold-standard refinement: every particle against the reference of its own half.

Poses that an exhaustive search finds are followed from its small ball to the band of the iteration, the band doubled and
the unlikely left out each time; the pose that a particle has is always among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods.refine.limits import Limits
from libemc.methods.refine.motion import SAMPLE, Walk, moved_by, polish_with_motion, step_size
from libemc.methods.refine.polish import polish, pose_terms
from libemc.methods.refine.poses import Poses
from libemc.methods.refine.search import LEAST_RADIUS, SearchGrid, diameter, half_balls, search_reference
from libemc.methods.subtilts import Batch, Particles, Progress, batches_by_half, load_batch, narrowed, noise_spectrum
from libemc.numerics.rotations import rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from libemc.numerics.symmetry import point_group

CANDIDATES = 6
"""Rotations of the search that are followed."""
UNLIKELY = 25.0
"""A candidate is given up when its log-likelihood is lower than the best one's by this: 12 of ideal noise, and as much for
noise that is not."""
SAME_TURN, SAME_SLIDE = 0.5, 0.1
"""Candidates are one within this, radians times the band's radius, and this part of the finest period."""
MAX_SHIFT = 0.08
"""Farthest shift unless told otherwise, as a fraction of the box: a quarter of a particle that fills two thirds is too far."""
COARSE_STEPS = 5
"""Steps of the polish in bands that are not the last."""


@dataclass(frozen=True)
class Task:
    """What one iteration does.

    Attributes:
        resolution: Å, finest data that takes part.
        exhaustive: search all rotations and shifts within the limits first.
        limits: about the poses that particles had at the start of the refinement.
        symmetry: of the reference.
        own_noise: whiten each particle by its own noise spectrum, not only by that of its tilt.
        motion: let particles move from exposure to exposure, as far as the images say that they do.
    """

    resolution: float
    exhaustive: bool
    limits: Limits
    symmetry: str = "c1"
    own_noise: bool = False
    motion: bool = False


@dataclass(frozen=True)
class Aligned:
    """What an iteration finds.

    Attributes:
        series: the particles at their new poses, by tilt series; those that no image shows keep theirs, without a score.
        contrast: (N,) of each tilt series: the scale of the particle's images over that of the prediction.
        error: (N,) standard deviation of the contrast.
        step: Å per exposure and axis that particles are found to move, of each tilt series and half that was aligned.
    """

    series: list[Particles]
    contrast: list[Tensor]
    error: list[Tensor]
    step: list[float]


def bands(box: int, first: float, last: float) -> list[Band]:
    """From the radius of the search to that of the iteration, each twice as far."""
    count = max(0, math.floor(math.log2(last / first) + 0.2)) if first < last else 0
    return [Band.of(box, first * 2**k) for k in range(count)] + [Band.of(box, last)]


def follow(batch: Batch, volume: FourierVolume, candidates: list[Poses], first: float, limits: Limits) -> Poses:
    """The best of several poses of each particle, all followed to the batch's band.

    Args:
        batch: within the band of this iteration; its rotations are what the limits are about.
        candidates: the first is the present pose, which takes part in the last band as it is.
        first: radius of the first band, Fourier pixels.
    """
    count = len(batch.rotation)
    alive = torch.ones(count, len(candidates), dtype=torch.bool)
    found = list(candidates)
    steps = bands(batch.band.box, first, batch.band.radius)
    for number, band in enumerate(steps):
        last = number == len(steps) - 1
        low = batch if last else narrowed(batch, band)
        for c in range(len(found)):
            who = torch.nonzero(alive[:, c])[:, 0]
            if not len(who):
                continue
            some, here = (low, found[c]) if len(who) == count else (low.some(who), found[c][who])
            if last:
                better = polish(some, volume, here, limits)
            elif c == 0:
                terms = pose_terms(some, volume, here.rotation, here.shift)
                better = replace(here, score=terms.cross / terms.norm.clamp_min(1e-30).sqrt())
            else:
                better = polish(some, volume, here, limits, steps=COARSE_STEPS)
            found[c] = found[c].replaced(who, better)
        score = torch.stack([f.score for f in found], dim=1).masked_fill(~alive, -torch.inf)
        if not last:
            alive &= _likely(score) & _first_of_its_kind(found, score, alive, band)
    best = score.argmax(dim=1)
    each = torch.arange(count)
    return Poses(
        torch.stack([f.rotation for f in found])[best, each],
        torch.stack([f.shift for f in found])[best, each],
        score[each, best],
    )


def _likely(score: Tensor) -> Tensor:
    """(P, C) which candidates are not beaten by far: the score squared is the log-likelihood."""
    positive = score.clamp_min(0)
    return positive**2 > positive.amax(dim=1, keepdim=True) ** 2 - UNLIKELY


def _first_of_its_kind(found: list[Poses], score: Tensor, alive: Tensor, band: Band) -> Tensor:
    """(P, C) which candidates are not where a better one is."""
    keep = torch.ones_like(alive)
    near_turn, near_slide = SAME_TURN / band.radius, SAME_SLIDE * band.box / band.radius
    for c in range(len(found)):
        for d in range(len(found)):
            if c == d:
                continue
            cosine = ((found[c].rotation * found[d].rotation).sum((1, 2)) - 1) / 2
            turned = torch.arccos(cosine.clamp(-1, 1))
            slid = torch.linalg.vector_norm(found[c].shift - found[d].shift, dim=1)
            beaten = (score[:, d] > score[:, c]) | ((score[:, d] == score[:, c]) & torch.tensor(d < c))
            keep[:, c] &= ~(alive[:, d] & beaten & (turned < near_turn) & (slid < near_slide))
    return keep


def align_batch(
    batch: Batch,
    present: Poses,
    fine: FourierVolume,
    coarse: FourierVolume | None,
    grid: SearchGrid | None,
    limits: Limits,
) -> Poses:
    """Poses of one batch against one reference.

    Args:
        batch: within the band of this iteration, particles at the poses that the limits are about.
        present: where they are now.
        fine: the reference prepared for the batch's band.
        coarse, grid: for the exhaustive search; None: from the present poses only.
    """
    if grid is None or coarse is None:
        first = batch.band.radius / 2
        return follow(batch, fine, [present, present], first, limits)
    balls = half_balls(batch, grid.radius)
    candidates = grid.candidates(balls, coarse, batch.rotation, CANDIDATES)
    return follow(batch, fine, [present, *candidates], min(grid.radius, batch.band.radius), limits)


def iterate(
    series: Sequence[Particles],
    start: Sequence[Particles],
    halves: tuple[Tensor, Tensor],
    task: Task,
    memory: int,
    progress: Progress | None = None,
) -> Aligned:
    """Align every used particle to the reference of its own half.

    Args:
        series: particles by tilt series.
        start: the same at the poses that the limits are about.
        halves: (n, n, n) references of half 1 and half 2, filtered and masked.
        memory: bytes that batches may take.
        progress: wraps the loop over batches of one tilt series and half.
    """
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    band = Band.of(box, max(LEAST_RADIUS, box * pixel_size / task.resolution))
    across = max(diameter(h) for h in halves)
    grid = (
        SearchGrid.of(box, pixel_size, task.resolution, across, task.limits, point_group(task.symmetry))
        if task.exhaustive
        else None
    )
    fine = [FourierVolume.from_map(h, radius=band.radius) for h in halves]
    coarse = [search_reference(h, grid.radius) if grid else None for h in halves]
    out = Aligned([], [], [], [])
    for particles, prior in zip(series, start, strict=True):
        rotation, xyz = particles.rotation.clone(), particles.xyz.clone()
        score, contrast, error = (torch.full_like(particles.score, float("nan")) for _ in range(3))
        noise = noise_spectrum(particles, band)
        seen = particles.use & particles.shown.any(dim=1)
        walk = Walk.of(particles.series, max(task.resolution, 2 * pixel_size))
        # paths are fitted on top of what the particles began with, each time anew
        begun = prior.corrections.shift if task.motion else particles.corrections.shift
        drift = begun.clone()
        about = replace(prior, corrections=replace(particles.corrections, shift=begun))
        steps: dict[int, float] = {}
        for half, piece in batches_by_half(particles, seen, band, memory, progress, "align"):
            batch = load_batch(about, piece, band, noise, own_noise=task.own_noise)
            here = (particles.xyz - prior.xyz)[piece] / pixel_size
            present = Poses.at(particles.rotation[piece], here)
            poses = align_batch(batch, present, fine[half - 1], coarse[half - 1], grid, task.limits)
            if task.motion:
                if half not in steps:
                    some = torch.arange(min(SAMPLE, len(piece)))
                    steps[half] = step_size(batch.some(some), fine[half - 1], poses[some], walk, pixel_size)
                if steps[half] > 0:
                    poses, path = polish_with_motion(
                        batch, fine[half - 1], poses, walk, steps[half] / pixel_size, task.limits
                    )
                    along = torch.einsum("tij,ptj->pti", particles.series.matrices[:, :2], path)
                    drift[piece] = begun[piece] + along * pixel_size
                    batch = replace(batch, shift=moved_by(batch, path))
            terms = pose_terms(batch, fine[half - 1], poses.rotation, poses.shift)
            rotation[piece] = poses.rotation
            xyz[piece] = prior.xyz[piece] + poses.shift * pixel_size
            score[piece] = poses.score
            contrast[piece] = terms.cross / terms.norm.clamp_min(1e-30)
            error[piece] = (2 * terms.norm.clamp_min(1e-30)).rsqrt()
        out.step.extend(steps.values())
        out.series.append(particles.moved(rotation, xyz, score).corrected(shift=drift))
        out.contrast.append(contrast)
        out.error.append(error)
    return out


def pose_change(before: Sequence[Particles], after: Sequence[Particles], symmetry: str) -> tuple[float, float]:
    """Median change of rotation (degrees, modulo symmetry) and of position (Å) over the used particles."""
    group = point_group(symmetry)
    turned = [rotation_distance(a.rotation, b.rotation, group)[b.use] for a, b in zip(before, after, strict=True)]
    moved = [torch.linalg.vector_norm(a.xyz - b.xyz, dim=1)[b.use] for a, b in zip(before, after, strict=True)]
    return float(torch.cat(turned).median()), float(torch.cat(moved).median())


def at_the_limit(start: Sequence[Particles], now: Sequence[Particles], max_shift: float) -> int:
    """How many used particles have gone as far from where they started as they may, Å."""
    return sum(
        int((torch.linalg.vector_norm(b.xyz - a.xyz, dim=1)[b.use] > 0.99 * max_shift).sum())
        for a, b in zip(start, now, strict=True)
    )
