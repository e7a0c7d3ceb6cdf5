"""Refinement in classes: every particle is aligned to all of them, and is a part of each as its images say.

A particle is compared with references that it has no part in (`left_out`): otherwise its own noise in the class that it is in
would hold it there. All of them are what the classes have in common and how each differs from it, as far as both halves agree
that it does: the same noise is in all, so that a class isn't likelier for being larger, and where there is nothing to tell
classes by they come to be the same. A particle's classes are weighed by the
likelihood of its images given each reference, at its best pose there (soft assignment; the classes of Scheres et al. 2005, with
poses maximised over), and each class has its own half maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods import average
from libemc.methods.postprocess import half_map_resolution
from libemc.methods.refine import left_out
from libemc.methods.refine.align import Aligned, Task, iterate
from libemc.methods.refine.iteration import Setup
from libemc.methods.refine.left_out import Making, References
from libemc.methods.refine.schedule import Step
from libemc.methods.refine.weights import contrast_weights
from libemc.methods.subtilts import Particles, Progress

LEAST = 1e-3
"""Probability below which a particle is no part of a class."""
FEWEST = 3.0
"""Particles of each half that a class needs, counted by their probabilities; one with fewer is given up."""
SETTLED = 0.01
"""Part of the particles that change their class in an iteration, below which it is the last."""
MOST_ITERATIONS = 10


@dataclass(frozen=True)
class Class:
    """One class.

    Attributes:
        number: from 1; it stays when others are given up.
        series: all particles at their poses in this class, by tilt series.
        maps, made: its averages; None before the first.
        references: what particles are compared with.
    """

    number: int
    series: list[Particles]
    references: References | tuple[Tensor, Tensor]
    maps: average.HalfMaps | None = None
    made: average.Average | None = None


@dataclass(frozen=True)
class State:
    """All classes, and how particles are divided among them.

    Attributes:
        probability: (N, C) of each tilt series.
        changed: part of the particles whose class has changed in the last iteration.
        rejected: particles without weight.
    """

    classes: list[Class]
    probability: list[Tensor]
    changed: float = 1.0
    rejected: int = 0

    @property
    def numbers(self) -> list[int]:
        """Of the classes."""
        return [c.number for c in self.classes]

    @property
    def reach(self) -> float:
        """Å of the finest data that some class vouches for, or all of them together."""
        return min(c.references.resolution for c in self.classes if isinstance(c.references, References))

    def shares(self) -> list[float]:
        """Part of the particles with weight in each class."""
        total = torch.zeros(len(self.classes), dtype=torch.float64)
        for p, particles in zip(self.probability, self.classes[0].series, strict=True):
            total += p[particles.use & (particles.weight > 0)].sum(dim=0)
        return (total / total.sum().clamp_min(1e-30)).tolist()

    @property
    def certainty(self) -> float:
        """What is known of the classes of particles with weight, beyond how large classes are: 0, nothing, to 1, all of it."""
        known = [p[q.use & (q.weight > 0)] for p, q in zip(self.probability, self.classes[0].series, strict=True)]
        p, share = torch.cat(known), torch.tensor(self.shares(), dtype=torch.float64)
        entropy, left = (-(torch.xlogy(v, v)).sum(dim=-1) for v in (share, p))
        return float(1 - left.mean() / entropy) if float(entropy) > 0 and len(p) else 1.0

    def best(self) -> list[Particles]:
        """Every particle at its pose in its likeliest class, whose number it has, with its probabilities, by tilt series."""
        out = []
        for s, probability in enumerate(self.probability):
            which = probability.argmax(dim=1)
            each = torch.arange(len(which))
            every = [c.series[s] for c in self.classes]

            def chosen(name: str, every: list[Particles] = every, which: Tensor = which, each: Tensor = each) -> Tensor:
                return torch.stack([getattr(p, name) for p in every])[which, each]

            shift = torch.stack([p.corrections.shift for p in every])[which, each]
            particles = every[0].moved(chosen("rotation"), chosen("xyz"), chosen("score")).corrected(shift=shift)
            numbered = tuple(
                q.model_copy(update={"class_": self.classes[k].number, "classes": self._row(row)})
                for q, k, row in zip(particles.file.particles, which.tolist(), probability.tolist(), strict=True)
            )
            out.append(replace(particles, file=particles.file.model_copy(update={"particles": numbered})))
        return out

    def _row(self, row: Sequence[float]) -> tuple[float, ...]:
        """Probabilities of classes 1, 2, ... to the highest number, given up ones 0."""
        by_number = dict(zip(self.numbers, row, strict=True))
        return tuple(round(by_number.get(k, 0.0), 4) for k in range(1, max(self.numbers) + 1))


def divided(series: Sequence[Particles], numbers: Sequence[int]) -> list[Tensor]:
    """(N, C) probabilities out of the particles' records: those they have, or 1 for the class they're in."""
    out = []
    for p in series:
        rows = []
        for q in p.file.particles:
            known = q.classes is not None and len(q.classes) >= max(numbers)
            row = [q.classes[k - 1] if known and q.classes else float(q.class_ == k) for k in numbers]
            rows.append(row if sum(row) > 0 else [1 / len(numbers)] * len(numbers))
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(numbers))
        out.append(table / table.sum(dim=1, keepdim=True))
    return out


def log_likelihood(aligned: Sequence[Aligned], weight: Sequence[Tensor]) -> list[Tensor]:
    """(N, C) log-likelihood of the images of every particle, given the reference of each class, by tilt series.

    With contrast a, the reference's prediction m and ⟨y, m⟩ = c·|m|²: |m|²·(2ac - a²). The contrast is that of a typical
    particle of its tilt series in its likeliest class: a particle is not allowed less of a reference that it lacks a part of.

    Args:
        aligned: of each class.
        weight: (N, C) probabilities of before, of each tilt series.
    """
    out = []
    for s, before in enumerate(weight):
        contrast = torch.stack([a.contrast[s] for a in aligned], dim=1)
        norm = torch.stack([0.5 / a.error[s] ** 2 for a in aligned], dim=1)
        seen = torch.isfinite(contrast).all(dim=1)
        best = contrast.gather(1, before.argmax(dim=1, keepdim=True))[:, 0]
        known = best[seen & (best > 0)]
        typical = float(known.median()) if len(known) else 1.0
        found = norm * typical * (2 * contrast - typical)
        out.append(torch.where(seen[:, None], found, 0.0))
    return out


def assigned(likelihood: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """(N, C) probabilities from log-likelihoods (N, C) and how large classes were, by tilt series."""
    share = sum(p.sum(dim=0) for p in before)
    prior = torch.as_tensor(share).clamp_min(1e-9).log()
    return [torch.softmax(one + prior, dim=1) for one in likelihood]


def averaged(state: State, setup: Setup, progress: Progress | None = None) -> State:
    """Average each class with the probabilities that there are, and make its references; what is too small is given up."""
    keep = []
    for c in range(len(state.classes)):
        sizes = [
            sum(
                float(p[:, c][q.use & (q.weight > 0) & (q.half == half)].sum())
                for p, q in zip(state.probability, state.classes[c].series, strict=True)
            )
            for half in (1, 2)
        ]
        if min(sizes) >= FEWEST:
            keep.append(c)
    if not keep:  # all are small: the set is, and stays as it is
        keep = list(range(len(state.classes)))
    left = [p[:, keep] for p in state.probability]
    # who was in a class that is given up for certain is in each of the others alike
    left = [torch.where(p.sum(dim=1, keepdim=True) > 1e-6, p, 1.0) for p in left]
    left = [p / p.sum(dim=1, keepdim=True) for p in left]
    pixel_size = state.classes[0].series[0].file.pixel_size
    kinds = [
        [_sharing(q, p[:, c]) for q, p in zip(state.classes[k].series, left, strict=True)] for c, k in enumerate(keep)
    ]
    maps = [
        average.half_maps(mine, setup.memory, setup.symmetry, own_noise=setup.own_noise, progress=progress)
        for mine in kinds
    ]
    made = [average.finish(m, setup.mask, pixel_size, setup.seed) for m in maps]
    whole = average.together(maps)
    of_all = average.finish(whole, setup.mask, pixel_size, setup.seed)
    reach = min(m.reach for m in (*made, of_all))
    filtering = replace(setup.filtering, mask=setup.focus)
    making = Making(filtering, setup.symmetry, setup.shared, setup.memory, setup.own_noise)
    apart = [differing(m, whole, setup, pixel_size) for m in maps]
    references = left_out.made_of_classes(kinds, maps, whole, of_all.corrected, apart, reach, making, progress)
    classes = [
        replace(state.classes[k], maps=m, made=a, references=r)
        for k, m, a, r in zip(keep, maps, made, references, strict=True)
    ]
    return replace(state, classes=classes, probability=left)


def differing(maps: average.HalfMaps, whole: average.HalfMaps, setup: Setup, pixel_size: float) -> Tensor:
    """(n//2+1,) FSC between the halves of how a class differs from all of them, where it may."""
    generator = torch.Generator().manual_seed(setup.seed)
    rest = [getattr(maps, half) - getattr(whole, half) for half in ("half1", "half2")]
    found = half_map_resolution(rest[0], rest[1], pixel_size, setup.focus, generator)
    return found.curves["corrected"].values


def _sharing(particles: Particles, probability: Tensor) -> Particles:
    """Particles with their weights times their probability (N,) of a class."""
    weight = torch.where(probability > LEAST, particles.weight * probability, torch.zeros_like(probability))
    return replace(particles, weight=weight)


def iteration(
    state: State, start: Sequence[Particles], step: Step, setup: Setup, progress: Progress | None = None
) -> State:
    """Align all particles to all classes, divide them anew, and average the classes.

    Args:
        start: the particles at the poses that limits are about.
    """
    task = Task(step.resolution, step.exhaustive, setup.limits, setup.symmetry, setup.own_noise, step.motion)
    aligned = [iterate(c.series, start, c.references, task, setup.memory, progress) for c in state.classes]
    probability = assigned(log_likelihood(aligned, state.probability), state.probability)
    used = [p.use for p in state.classes[0].series]
    moved, total = 0.0, 0.0
    for before, after, use in zip(state.probability, probability, used, strict=True):
        moved += float((after - before).abs().sum(dim=1)[use].sum()) / 2
        total += float(use.sum())
    likeliest = [p.argmax(dim=1, keepdim=True) for p in probability]
    contrast, error = (
        [
            torch.stack([getattr(a, name)[s] for a in aligned], dim=1).gather(1, which)[:, 0]
            for s, which in enumerate(likeliest)
        ]
        for name in ("contrast", "error")
    )
    weights = contrast_weights(contrast, error, used, setup.keep)
    classes = [
        replace(c, series=[p.weighted(w.weight, w.reason) for p, w in zip(a.series, weights, strict=True)])
        for c, a in zip(state.classes, aligned, strict=True)
    ]
    rejected = sum(int((u & (w.weight == 0)).sum()) for u, w in zip(used, weights, strict=True))
    return averaged(State(classes, probability, moved / max(total, 1.0), rejected), setup, progress)
