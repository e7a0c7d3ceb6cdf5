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

from libemc.methods.refine.left_out import References
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


@dataclass(frozen=True)
class _Going:
    """One tilt series while its particles are aligned; its tensors are filled in place."""

    particles: Particles
    prior: Particles
    about: Particles
    noise: Tensor
    walk: Walk
    seen: Tensor
    begun: Tensor
    rotation: Tensor
    xyz: Tensor
    score: Tensor
    contrast: Tensor
    error: Tensor
    drift: Tensor
    steps: dict[int, float]

    @staticmethod
    def of(particles: Particles, prior: Particles, task: Task, band: Band) -> _Going:
        """Before anything is aligned."""
        # paths are fitted on top of what the particles began with, each time anew
        begun = prior.corrections.shift if task.motion else particles.corrections.shift
        unknown = torch.full_like(particles.score, float("nan"))
        return _Going(
            particles=particles,
            prior=prior,
            about=replace(prior, corrections=replace(particles.corrections, shift=begun)),
            noise=noise_spectrum(particles, band),
            walk=Walk.of(particles.series, max(task.resolution, 2 * particles.file.pixel_size)),
            seen=particles.use & particles.shown.any(dim=1),
            begun=begun,
            rotation=particles.rotation.clone(),
            xyz=particles.xyz.clone(),
            score=unknown,
            contrast=unknown.clone(),
            error=unknown.clone(),
            drift=begun.clone(),
            steps={},
        )

    def align(
        self, half: int, piece: Tensor, fine: FourierVolume, coarse: FourierVolume | None, grid: SearchGrid | None,
        task: Task, band: Band,
    ) -> None:  # fmt: skip
        """Fill in what the reference of their half says of a batch of particles."""
        pixel_size = self.particles.file.pixel_size
        batch = load_batch(self.about, piece, band, self.noise, own_noise=task.own_noise)
        here = (self.particles.xyz - self.prior.xyz)[piece] / pixel_size
        present = Poses.at(self.particles.rotation[piece], here)
        poses = align_batch(batch, present, fine, coarse, grid, task.limits)
        if task.motion:
            if half not in self.steps:
                some = torch.arange(min(SAMPLE, len(piece)))
                self.steps[half] = step_size(batch.some(some), fine, poses[some], self.walk, pixel_size)
            if self.steps[half] > 0:
                step = self.steps[half] / pixel_size
                poses, path = polish_with_motion(batch, fine, poses, self.walk, step, task.limits)
                along = torch.einsum("tij,ptj->pti", self.particles.series.matrices[:, :2], path)
                self.drift[piece] = self.begun[piece] + along * pixel_size
                batch = replace(batch, shift=moved_by(batch, path))
        terms = pose_terms(batch, fine, poses.rotation, poses.shift)
        self.rotation[piece] = poses.rotation
        self.xyz[piece] = self.prior.xyz[piece] + poses.shift * pixel_size
        self.score[piece] = poses.score
        self.contrast[piece] = terms.cross / terms.norm.clamp_min(1e-30)
        self.error[piece] = (2 * terms.norm.clamp_min(1e-30)).rsqrt()


def iterate(
    series: Sequence[Particles],
    start: Sequence[Particles],
    references: References | tuple[Tensor, Tensor],
    task: Task,
    memory: int,
    progress: Progress | None = None,
) -> Aligned:
    """Align every used particle to the reference of its own half and part.

    Args:
        series: particles by tilt series.
        start: the same at the poses that the limits are about.
        references: (n, n, n) each, filtered and masked; a pair is of half 1 and half 2, one for all parts.
        memory: bytes that batches may take.
        progress: wraps the loop over batches of one tilt series and half.
    """
    if not isinstance(references, References):
        references = References.whole(references, series, task.resolution)
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    band = Band.of(box, max(LEAST_RADIUS, box * pixel_size / task.resolution))
    across = max(diameter(h) for pair in references.maps for h in pair)
    grid = (
        SearchGrid.of(box, pixel_size, task.resolution, across, task.limits, point_group(task.symmetry))
        if task.exhaustive
        else None
    )
    going = [_Going.of(p, prior, task, band) for p, prior in zip(series, start, strict=True)]
    for part, pair in enumerate(references.maps):
        fine = [FourierVolume.from_map(h, radius=band.radius) for h in pair]
        coarse = [search_reference(h, grid.radius) if grid else None for h in pair]
        for one in going:
            mine = one.seen & (references.parts[one.particles.file.name] == part)
            for half, piece in batches_by_half(one.particles, mine, band, memory, progress, "align"):
                one.align(half, piece, fine[half - 1], coarse[half - 1], grid, task, band)
    return Aligned(
        [one.particles.moved(one.rotation, one.xyz, one.score).corrected(shift=one.drift) for one in going],
        [one.contrast for one in going],
        [one.error for one in going],
        [step for one in going for step in one.steps.values()],
    )


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
