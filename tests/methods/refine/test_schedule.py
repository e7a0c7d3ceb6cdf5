"""What a refinement does next: courses as they come, as a table of what was done and what follows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from libemc.methods.refine.schedule import MOST_ITERATIONS, Done, Step, done_of, line_of, next_step, state_of

BOX, PIXEL = 64, 4.0
GLOBAL, LOCAL = Step(50.0, exhaustive=True), Step(50.0, exhaustive=False)


def done(step: Step, reach: float = 12.0, turned: float = 0.01) -> Done:
    return Done(
        step, resolution=reach + 1, reach=reach, turned=turned, moved=0.1, rejected=2, travel=0.0, fsc=(1.0, 0.5)
    )


def course(start: Step, reaches: list[float], turns: list[float], most: int | None = None) -> list[Step]:
    """The steps when iterations reach and turn as listed; the last values again and again."""
    past: list[Done] = []
    while (step := next_step(past, start, BOX, PIXEL, most)) is not None:
        at = len(past)
        past.append(done(step, reaches[min(at, len(reaches) - 1)], turns[min(at, len(turns) - 1)]))
        assert len(past) <= 50
    return [p.step for p in past]


def kinds(steps: list[Step]) -> str:
    return "".join("g" if s.exhaustive else "l" for s in steps)


def test_a_refinement_from_nothing() -> None:
    """Two searches while the second still turns most of them a third, then polishing in the band of the FSC, and an end."""
    steps = course(GLOBAL, [30.0, 20.0, 15.0, 12.0, 12.0], [100.0, 1.0, 1.0, 0.5, 0.01])
    assert kinds(steps).startswith("ggl") and set(kinds(steps)[2:]) == {"l"}
    assert [s.resolution for s in steps[:4]] == [50.0, 30.0, 20.0, 15.0] and len(steps) <= 7
    assert kinds(course(GLOBAL, [20.0], [100.0, 50.0, 0.01])).startswith("gggl")
    assert kinds(course(GLOBAL, [20.0], [100.0])).startswith("ggggl")  # it does not search for ever


def test_a_local_one() -> None:
    steps = course(LOCAL, [14.0, 12.0], [2.0, 0.5, 0.01])
    assert set(kinds(steps)) == {"l"} and 3 <= len(steps) <= 5


def test_it_goes_on_while_it_gains() -> None:
    """Resolution that rises by 5 % each time, or poses that still turn, are no end; the most iterations are."""
    assert len(course(LOCAL, [20 * 0.95**i for i in range(40)], [0.01])) == MOST_ITERATIONS
    assert len(course(LOCAL, [12.0], [5.0])) == MOST_ITERATIONS
    assert len(course(LOCAL, [12.0, 12.0, 13.0], [5.0])) < MOST_ITERATIONS  # it gets worse


@pytest.mark.parametrize("most", [1, 2, 5, 20])
def test_as_many_as_are_asked_for(most: int) -> None:
    for start in (GLOBAL, LOCAL):
        assert len(course(start, [12.0], [0.0], most)) == most


def test_no_band_beyond_nyquist() -> None:
    assert all(s.resolution >= 2 * PIXEL for s in course(LOCAL, [3.0], [5.0]))


def test_particles_may_move_only_after_a_polish() -> None:
    """With motion: never in a search, nor in the first polish; and the end is not before it was tried."""
    past: list[Done] = []
    while (step := next_step(past, GLOBAL, BOX, PIXEL, None, motion=True)) is not None:
        past.append(done(step))
    moving = [p.step.motion for p in past]
    assert (
        kinds([p.step for p in past]).startswith("ggl") and moving[:3] == [False] * 3 and all(moving[3:]) and moving[3:]
    )
    assert not any(s.motion for s in course(GLOBAL, [12.0], [0.01]))


def test_state_there_and_back() -> None:
    """Through JSON, every field other than its default."""
    past = [
        Done(Step(33.3, True, False), 20.5, 19.25, 45.0, 3.5, 7, 0.0, (1.0, 0.75, 0.125)),
        Done(Step(19.25, False, True), 12.5, 11.0, 0.5, 0.25, 9, 0.4, (1.0, 0.8, 0.5)),
    ]
    assert done_of(json.loads(json.dumps(state_of(past, 100)))) == past
    assert done_of({}) == []


def test_a_line() -> None:
    one = replace(done(GLOBAL), turned=1.234)
    assert line_of(3, one) == (
        "iteration 3 (global, data to 50.0 Å): 13.00 Å at FSC 0.143, poses moved 1.23° and 0.10 Å (median), 2 rejected"
    )
