"""What a refinement does next, decided from what it has done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

JOINED = 40.0
"""Å: the halves share their references to the starting resolution, but never beyond this."""
MOST_ITERATIONS = 12
UNSETTLED = 3.0
"""Degrees: a search that turns half of the particles by more than this is followed by another."""
LEAST_MOVING = 2
"""Iterations in which particles move, at least: the first finds out of a blurred reference how far they do."""
CONVERGED_SHELL = 0.02
"""Relative gain in resolution below which an iteration counts as no better."""
CONVERGED_ANGLE = 0.25
"""Median change of rotation that counts as none, in units of the angle that one pixel subtends at half the box."""


@dataclass(frozen=True)
class Step:
    """What the next iteration does: the finest data it uses (Å), whether it searches exhaustively, lets particles move."""

    resolution: float
    exhaustive: bool
    motion: bool = False


@dataclass(frozen=True)
class Done:
    """What an iteration did.

    Attributes:
        step: what was asked of it.
        resolution: Å at 0.143 of the corrected FSC after it; reach: Å of the last shell that still carries signal.
        turned: median change of rotation, degrees; moved: of position, Å.
        rejected: particles without weight in the average.
        travel: Å per exposure and axis by which particles were found to move; 0 where they were not let.
        fsc: the corrected curve between the halves, one value per shell.
    """

    step: Step
    resolution: float
    reach: float
    turned: float
    moved: float
    rejected: int
    travel: float
    fsc: tuple[float, ...]


def next_step(
    past: Sequence[Done], start: Step, box: int, pixel_size: float, most: int | None, motion: bool = False
) -> Step | None:
    """Decide on the next iteration from those that were done; None when the refinement has converged.

    The first two search exhaustively where the start does: the second with a reference made of the particles themselves.
    A third one follows while a search still turns half of the particles by more than its own grid's doubt. From then on
    poses are polished, in the band that the FSC between the halves vouches for, until neither it nor the poses change; after
    one such iteration particles may move.

    Args:
        start: the first step; box, pixel_size: the particles', px and Å.
        most: number of iterations to do exactly; None: until convergence, `MOST_ITERATIONS` at the most.
        motion: whether particles may move from exposure to exposure.
    """
    if len(past) >= (most or MOST_ITERATIONS):
        return None
    if not past:
        return start
    last = past[-1]
    band = max(2 * pixel_size, last.reach)
    searched = sum(done.step.exhaustive for done in past)
    if start.exhaustive and (searched < 2 or (searched == len(past) < 4 and last.turned > UNSETTLED)):
        return Step(band, exhaustive=True)
    moving = motion and not last.step.exhaustive
    settled = sum(done.step.motion for done in past) >= LEAST_MOVING if moving else not last.step.exhaustive
    if most is None and settled and len(past) > 1:
        gained = 1 - last.reach / min(done.reach for done in past[:-1])
        if gained < CONVERGED_SHELL and (last.turned < CONVERGED_ANGLE * math.degrees(2 / box) or gained < 0):
            return None
    return Step(band, exhaustive=False, motion=moving)


def state_of(past: Sequence[Done], particles: int) -> dict[str, object]:
    """The iterations as plain numbers, for the run's record."""
    return {
        "particles": particles,
        "iterations": [
            {
                "band": done.step.resolution,
                "exhaustive": done.step.exhaustive,
                "resolution": done.resolution,
                "reach": done.reach,
                "turned": done.turned,
                "moved": done.moved,
                "motion": done.step.motion,
                "travel": done.travel,
                "rejected": done.rejected,
                "fsc": list(done.fsc),
            }
            for done in past
        ],
    }


def line_of(number: int, done: Done) -> str:
    """One iteration in a line."""
    how = "global" if done.step.exhaustive else "local"
    moving = f", motion {done.travel:.2f} Å per exposure" if done.step.motion else ""
    return (
        f"iteration {number} ({how}, data to {done.step.resolution:.1f} Å): {done.resolution:.2f} Å at FSC 0.143, "
        f"poses moved {done.turned:.2f}° and {done.moved:.2f} Å (median){moving}, {done.rejected} rejected"
    )


def done_of(state: dict[str, Any]) -> list[Done]:
    """The iterations out of a run's record: the inverse of `state_of`."""
    return [
        Done(
            Step(i["band"], i["exhaustive"], i["motion"]), i["resolution"], i["reach"], i["turned"], i["moved"],
            i["rejected"], i["travel"], tuple(i["fsc"]),
        )
        for i in state.get("iterations", [])
    ]  # fmt: skip
