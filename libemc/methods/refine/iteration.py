"""One iteration of a refinement from references to references: align, weigh, average, and filter what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from libemc.methods import average
from libemc.methods.refine.align import Task, iterate, pose_change
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.references import Filtering, filtered_references
from libemc.methods.refine.schedule import Done, Step
from libemc.methods.refine.weights import contrast_weights
from libemc.methods.subtilts import Particles, Progress


@dataclass(frozen=True)
class Setup:
    """What all iterations of a refinement have in common.

    Attributes:
        mask: (n, n, n) of the FSC; focus: of the references.
        filtering: of the references.
        shared: Fourier pixels below which the halves have one reference.
        keep: share of the particles to keep, None: those that stand out by too little contrast are rejected.
        seed: of the phase randomisation.
        memory: bytes that batches may take.
    """

    mask: Tensor
    focus: Tensor
    filtering: Filtering
    limits: Limits
    symmetry: str
    shared: float
    keep: float | None
    own_noise: bool
    seed: int
    memory: int


@dataclass(frozen=True)
class Outcome:
    """What an iteration ends with: particles, maps, the finished average, the next references, and its line in the record."""

    series: list[Particles]
    maps: average.HalfMaps
    average: average.Average
    references: tuple[Tensor, Tensor]
    done: Done


def next_references(half1: Tensor, half2: Tensor, corrected: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    """What two half maps with a corrected FSC (n//2+1,) give as references of the next iteration."""
    filtered = setup.filtering.of(half1, half2, corrected)
    return filtered_references(half1, half2, setup.focus, filtered, setup.shared)


def iteration(
    series: Sequence[Particles],
    start: Sequence[Particles],
    references: tuple[Tensor, Tensor],
    step: Step,
    setup: Setup,
    progress: Progress | None = None,
) -> Outcome:
    """Do one iteration.

    Args:
        series: the particles by tilt series; start: the same at the poses that limits are about.
        references: of half 1 and half 2, filtered and masked.
    """
    task = Task(step.resolution, step.exhaustive, setup.limits, setup.symmetry, setup.own_noise, step.motion)
    aligned = iterate(series, start, references, task, setup.memory, progress)
    weights = contrast_weights(aligned.contrast, aligned.error, [p.use for p in aligned.series], setup.keep)
    moved = [p.weighted(w.weight, w.reason) for p, w in zip(aligned.series, weights, strict=True)]
    maps = average.half_maps(moved, setup.memory, setup.symmetry, own_noise=setup.own_noise, progress=progress)
    finished = average.finish(maps, setup.mask, moved[0].file.pixel_size, setup.seed)
    turned, shifted = pose_change(series, moved, setup.symmetry)
    rejected = sum(int((p.use & (p.weight == 0)).sum()) for p in moved)
    travel = sum(aligned.step) / max(1, len(aligned.step))
    fsc = tuple(round(v, 5) for v in finished.corrected.tolist())
    done = Done(step, finished.resolution, finished.reach, turned, shifted, rejected, travel, fsc)
    return Outcome(moved, maps, finished, next_references(maps.half1, maps.half2, finished.corrected, setup), done)
