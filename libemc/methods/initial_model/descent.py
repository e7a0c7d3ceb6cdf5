"""One descent from random orientations to a model: which band, how hot, how many particles, when it is done.

Every step weighs all poses of a batch of particles, and moves the reference by a Newton step of their likelihood, averaged
with what the steps before it said. The band begins at 100 Å and grows; the temperature begins where a particle fits about
as well in a third of all orientations, and falls until the likelihood is what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from libemc.methods.initial_model.balls import Balls
from libemc.methods.initial_model.posterior import Poses, Posterior, heat_for, log_weights, posterior
from libemc.methods.initial_model.reference import (
    blend,
    centred,
    maps_of,
    random_start,
    small_box,
    volumes,
    weighted_sums,
)
from libemc.methods.refine.search import search_shifts
from libemc.methods.subtilts import Progress
from libemc.numerics.rotations import random_rotations
from libemc.numerics.slices import Accumulator
from libemc.numerics.so3 import rotation_grid
from libemc.numerics.symmetry import symmetrise

START = 100.0
"""Å, where the band begins."""
ELEMENTS = 2.5
"""The first band has at least so many resolution elements across the particle."""
MOST_ELEMENTS = 5.5
"""And the last one no more: rotations grow with the third power, and poses are near enough to be polished."""
BAND_RATIO = 0.78
"""Each band's resolution over that of the one before."""
BATCH = 128
"""Particles of a step; fewer are all taken in every step."""
SAMPLE = 24
"""Particles of which the temperature is found."""
RATE = 0.5
"""Weight of a step's batch against what the steps before it said, where a batch isn't the whole."""
FIRST_PART, LATER_PART = 0.3, 0.003
"""Part of all rotations that a particle fits, by its perplexity, at the first step of the first and of a later band."""
COOLING = 0.6
"""Factor on it after each step."""
COLDEST = 1.5
"""Perplexity below which temperature is no longer what keeps a particle from one pose."""
MOST_STEPS, LEAST_STEPS = 25, 3
"""Steps in a band."""
SETTLED = 0.005
"""A band is done when the temperature is at its end and the references correlate with those before to within this."""
KEEP = 200
"""Rotations of each particle that go into the reference."""
SHIFT_STEP = 1 / 3
"""Distance between shifts, in resolutions."""
CENTRE_STEP = 0.5
"""Farthest move of the centre of mass after a band, in resolutions of it."""


@dataclass(frozen=True)
class Wish:
    """What is asked of a descent.

    Attributes:
        box_length: Å along the particles' box.
        diameter: Å of the sphere that holds the particle.
        resolution: Å, finest band.
        max_shift: Å that a particle may be away from where it is.
        classes: how many references there are.
    """

    box_length: float
    diameter: float
    resolution: float
    max_shift: float
    classes: int = 1

    @property
    def bands(self) -> list[float]:
        """Å, one resolution after the other."""
        last = self.finest
        first = max(last, min(START, self.diameter / ELEMENTS))
        count = max(0, math.ceil(math.log(last / first) / math.log(BAND_RATIO) - 1e-9))
        return [first * (last / first) ** (k / max(1, count)) for k in range(count + 1)]

    @property
    def finest(self) -> float:
        """Å, the last band that is searched exhaustively."""
        return max(self.resolution, self.diameter / MOST_ELEMENTS)

    @property
    def small(self) -> int:
        """Voxels of the references' box."""
        return small_box(self.box_length / self.finest)

    def poses(self, resolution: float, symmetry: str, turn: Tensor) -> Poses:
        """All that are weighed at a resolution, the grid of rotations turned by (3, 3): no two steps have the same."""
        rotations = turn @ rotation_grid(math.degrees(resolution / self.diameter), symmetry)
        length = self.box_length
        return Poses(rotations, search_shifts(self.max_shift / length, SHIFT_STEP * resolution / length))


@dataclass(frozen=True)
class Step:
    """One step of a descent.

    Attributes:
        band: Å; heat: temperature; perplexity: median effective number of rotations and classes.
        evidence: mean log-likelihood of a particle against none at all.
        change: 1 minus the correlation of the references with those before.
        shares: part of the batch in each class.
    """

    band: float
    heat: float
    perplexity: float
    evidence: float
    change: float
    shares: tuple[float, ...]

    def as_table(self) -> dict[str, Any]:
        """As plain numbers."""
        return {**asdict(self), "shares": list(self.shares)}


@dataclass(frozen=True)
class Descent:
    """What a descent ends with.

    Attributes:
        references: (C, m, m, m), in the band of the last step.
        steps: its course; frames: (steps + 1, 3, m, m C), central slices x-y, x-z, y-z of the references after each.
        evidence: of the last reference, mean over all particles at temperature 1.
    """

    references: Tensor
    steps: tuple[Step, ...]
    frames: Tensor
    evidence: float


@dataclass(frozen=True)
class Found:
    """The best pose of each of P particles.

    Attributes:
        rotation: (P, 3, 3); shift: (P, 3) Å from where the particle was; class_: (P,) int64 from 0.
        evidence: (P,) as in `Posterior`; confidence: (P,) weight of that class over all classes.
    """

    rotation: Tensor
    shift: Tensor
    class_: Tensor
    evidence: Tensor
    confidence: Tensor


def central(references: Tensor) -> Tensor:
    """(3, m, m C) float32: central slices of the references, side by side."""
    middle = references.shape[-1] // 2
    planes = [references[:, middle], references[:, :, middle], references[:, :, :, middle]]
    return torch.stack([torch.cat(list(p), dim=1) for p in planes]).float()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two sets of maps as they lie."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


def _spread(count: int, most: int) -> Tensor:
    """At most so many places, evenly over a list."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _shares(found: Posterior, classes: int) -> tuple[float, ...]:
    weight = found.weight.sum(dim=2)
    total = torch.zeros(classes).index_add(0, found.class_.reshape(-1), weight.reshape(-1))
    return tuple((total / total.sum()).tolist())


def descend(
    balls: Balls,
    wish: Wish,
    mask: Tensor,
    generator: torch.Generator,
    symmetry: str = "c1",
    start: Tensor | None = None,
    progress: Progress | None = None,
) -> Descent:
    """From nothing, or from references that there are, to references at the finest band.

    Args:
        balls: within the finest band at least.
        mask: (m, m, m) of the small box.
        symmetry: applied to the references after each step.
        start: (C, m, m, m) to go on from, in the setting of the symmetry: then only the last two bands are gone through.
        progress: wraps the loop over the bands.
    """
    bands = wish.bands if start is None else wish.bands[-2:]
    steps: list[Step] = []
    if start is None:
        first, rotations = balls.within(wish.box_length / bands[0]), random_rotations(len(balls), generator)
        references = maps_of(random_start(first, wish.small, wish.classes, rotations, generator), mask)
    else:
        references = start
    frames = [central(references)]
    for number, band in enumerate(progress(bands, len(bands), "descend") if progress else bands):
        inner = balls.within(wish.box_length / band)
        part = FIRST_PART if number == 0 and start is None else LATER_PART
        references = _in_band(inner, wish, band, references, mask, generator, symmetry, part, steps, frames)
        if symmetry == "c1":
            small_pixel = wish.box_length / wish.small
            references = centred(references, mask, CENTRE_STEP * band / small_pixel)
    evidence = float(assign(balls, wish, references, symmetry, generator).evidence.mean())
    return Descent(references, tuple(steps), torch.stack(frames), evidence)


def _in_band(
    balls: Balls, wish: Wish, band: float, references: Tensor, mask: Tensor, generator: torch.Generator,
    symmetry: str, part: float, steps: list[Step], frames: list[Tensor],
) -> Tensor:  # fmt: skip
    """The steps in one band, noted in `steps` and `frames`."""
    sums: list[Accumulator] | None = None
    for count in range(MOST_STEPS):
        poses = wish.poses(band, symmetry, random_rotations(1, generator)[0])
        batch = balls if len(balls) <= BATCH else balls.at(torch.randperm(len(balls), generator=generator)[:BATCH])
        models = volumes(references, balls.radius)
        wanted = max(COLDEST, part * len(poses.rotations) * wish.classes * COOLING**count)
        heat = heat_for(log_weights(batch.at(_spread(len(batch), SAMPLE)), models, poses), wanted)
        found = posterior(batch, models, poses, KEEP, heat)
        rate = 1.0 if len(batch) == len(balls) or sums is None else RATE
        sums = blend(sums, weighted_sums(batch, wish.small, found, poses, wish.classes), rate)
        before, references = references, maps_of(sums, mask)
        if symmetry != "c1":
            references = torch.stack([symmetrise(r, symmetry) for r in references])
        change = 1 - correlation(before, references)
        typical = float(found.perplexity.median())
        shares = _shares(found, wish.classes)
        steps.append(Step(band, heat, typical, float(found.evidence.mean()), change, shares))
        frames.append(central(references))
        cold = heat == 1.0 or wanted == COLDEST
        if count + 1 >= LEAST_STEPS and cold and change < SETTLED:
            break
    return references


def assign(balls: Balls, wish: Wish, references: Tensor, symmetry: str, generator: torch.Generator) -> Found:
    """The best class, rotation and shift of every particle, against references (C, m, m, m)."""
    inner = balls.within(wish.box_length / wish.finest)
    poses = wish.poses(wish.finest, symmetry, random_rotations(1, generator)[0])
    found = posterior(inner, volumes(references, inner.radius), poses, KEEP)
    best = found.weight.reshape(len(balls), -1).argmax(dim=1)
    k, s = best // found.weight.shape[2], best % found.weight.shape[2]
    each = torch.arange(len(balls))
    class_ = found.class_[each, k]
    confidence = (found.weight.sum(dim=2) * (found.class_ == class_[:, None])).sum(dim=1)
    return Found(
        poses.rotations[found.rotation[each, k]],
        poses.shifts[s] * wish.box_length,
        class_,
        found.evidence,
        confidence,
    )


def best_of(descents: Sequence[Descent]) -> int:
    """Which descent explains the particles best."""
    return max(range(len(descents)), key=lambda i: descents[i].evidence)
