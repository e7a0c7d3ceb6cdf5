"""A refinement in classes: how it begins, its iterations with all of their state in the run's folder, and its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc import classifications, principal_axes, project, records
from libemc.classifications import ClassAverage
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io.files import write_text
from libemc.methods import average
from libemc.methods.classify import cluster
from libemc.methods.classify.coordinates import Coordinates, joined
from libemc.methods.refine import classes, references
from libemc.methods.refine.classes import Class, State
from libemc.methods.refine.iteration import Setup
from libemc.methods.refine.left_out import References
from libemc.methods.refine.schedule import Step
from libemc.methods.subtilts import Particles

SCALES, AXES = (60.0, 30.0, 15.0), 12
"""Å and number of the axes along which particles of one reference are divided at the start."""
ALIKE = 0.05
"""Certainty of all classes below which they are said to be alike."""
TABLE = "classes.json"
NOTHING = References([], {}, math.inf)
"""What a class has to be compared with before its first average."""
PAGES = ("classes.html", "montage.png", TABLE)


def check(count: int, maps: Sequence[Path], series: Sequence[Particles], set_or_run: str) -> None:
    """Whether so many classes can begin, one too.

    Raises:
        InputError: neither one reference, nor one for each class, nor a set that has classes; too few particles.
    """
    if count == 1:
        if len(maps) != 1:
            raise InputError("one reference is needed", "--reference", "give one, or more --classes")
        return
    particles = sum(int(p.use.sum()) for p in series)
    if particles < 2 * classes.FEWEST * count:
        raise InputError(
            f"{particles} particles are too few for {count} classes", set_or_run, "use more, or ask for fewer"
        )
    if len(maps) not in (0, 1, count):
        remedy = "give one reference, one for each class, or none where the set has classes"
        raise InputError(f"{len(maps)} references for {count} classes", "--reference", remedy)
    there = {q.class_ for p in series for q in p.file.particles if q.use}
    if not maps and not set(range(1, count + 1)) <= there:
        what = f"has the classes {', '.join(map(str, sorted(there)))}, not 1 to {count}"
        raise InputError(what, set_or_run, "give --reference, or cluster the particles with emc_cluster")


def from_classes(series: list[Particles], count: int, setup: Setup, run: Run) -> State:
    """Each class as the particles have it."""
    numbers = range(1, count + 1)
    begun = State([Class(k, list(series), NOTHING) for k in numbers], classes.divided(series, numbers))
    return classes.averaged(begun, setup, run.progress)


def from_maps(
    series: list[Particles], maps: Sequence[Tensor], resolution: float, setup: Setup, pixel_size: float
) -> State:
    """Each class with a reference of its own, and no particle in any of them yet."""
    generator = torch.Generator().manual_seed(setup.seed)
    begun = [references.starting_references(m, setup.focus, pixel_size, resolution, generator) for m in maps]
    even = [torch.full((len(p), len(maps)), 1 / len(maps), dtype=torch.float64) for p in series]
    return State([Class(k, list(series), halves) for k, halves in enumerate(begun, start=1)], even)


def from_differences(series: list[Particles], count: int, setup: Setup, folder: Path, run: Run) -> State:
    """Classes of particles that were refined as one: by where they lie along the axes that they differ most along."""
    pixel_size = series[0].file.pixel_size
    scales = tuple(s for s in SCALES if s >= 2 * pixel_size) or (2 * pixel_size,)
    plan = principal_axes.Plan(scales, AXES, True, None, setup.seed)
    whole = average.half_maps(series, run.memory, setup.symmetry, progress=run.progress).whole
    found = principal_axes.analyse(series, whole, setup.mask, plan, folder, run)
    points = joined([band.coordinates.of_axes(band.used) for band in found.bands])
    if not points.b.shape[1]:
        run.warn(f"particles differ no more than by noise: {count} classes may have nothing in them")
        points = _strongest(found.bands)
    labels = cluster.partition(points, count, "mixture", setup.seed)
    probability = [torch.full((len(p), count), 1 / count, dtype=torch.float64) for p in series]
    for member, label in zip(found.members, labels.tolist(), strict=True):
        probability[member.series][member.place] = torch.nn.functional.one_hot(torch.tensor(label), count).double()
    begun = State([Class(k, list(series), NOTHING) for k in range(1, count + 1)], probability)
    return classes.averaged(begun, setup, run.progress)


def _strongest(bands: Sequence[principal_axes.BandResult]) -> Coordinates:
    """Along the first axis of each band."""
    return joined([band.coordinates.of_axes([0]) for band in bands])


@dataclass(frozen=True)
class Going:
    """What a refinement in classes needs beside its state.

    Attributes:
        start: the particles at the poses that limits are about.
        head: of the set; parent: where they come from.
        first: of the first iteration where each class has its own reference; all others are local, in the band that the
            classes vouch for.
        most: iterations to do exactly; None: until particles stay where they are. motion: whether particles may move.
        folder: of the run; save: its record, given where it stopped.
    """

    start: list[Particles]
    head: records.ParticleSet
    parent: str
    first: Step
    most: int | None
    motion: bool
    folder: Path
    save: Callable[[str | None], None]


def begin(series: list[Particles], maps: Sequence[Tensor], count: int, setup: Setup, going: Going, run: Run) -> State:
    """The classes before the first iteration: of a reference each, of the set's own, or of differences.

    Args:
        maps: references; one: the particles are refined already, against it.
    """
    if len(maps) > 1:
        return from_maps(series, maps, going.first.resolution, setup, going.head.pixel_size)
    if not maps:
        return from_classes(series, count, setup, run)
    return from_differences(series, count, setup, going.folder, run)


def sort(
    series: list[Particles],
    maps: Sequence[Tensor],
    count: int,
    setup: Setup,
    going: Going,
    done: list[dict[str, Any]],
    run: Run,
) -> list[dict[str, Any]]:
    """Iterate until particles stay in their classes, with all of the state in the run's folder after each iteration.

    Args:
        series: at the poses to begin with; maps, count: as for `begin`.
        done: what earlier iterations did, to which each new one is added; with some, the run is gone on with.

    Returns:
        What all iterations did.
    """
    pixel_size, most = going.head.pixel_size, going.most or classes.MOST_ITERATIONS
    if len(done) >= most or (done and _settled(done[-1], going)):
        return done
    state = resumed(series, done, setup, run) if done else begin(series, maps, count, setup, going, run)
    step = going.first if len(maps) > 1 and not done else None
    last = False
    while not last:
        step = step or Step(max(2 * pixel_size, state.reach), exhaustive=False, motion=going.motion)
        state = classes.iteration(state, going.start, step, setup, run.progress)
        best = project.save_run_particles(going.folder, going.head, state.best(), going.parent)
        done.append(_line(state, step))
        _write(going.folder, state, best, pixel_size, run)
        last = len(done) >= most or _settled(done[-1], going)
        going.save(None if last else f"iteration {len(done) + 1}")
        run.result(_text(len(done), done[-1]))
        step = None
    if state.certainty < ALIKE:
        run.warn("the classes are alike: the halves agree on nothing that tells one from another; ask for fewer")
    return done


def _settled(line: Mapping[str, Any], going: Going) -> bool:
    """Whether an iteration was the last, if their number is open."""
    moved = line["motion"] or not going.motion
    return going.most is None and moved and not line["exhaustive"] and line["changed"] < classes.SETTLED


def _line(state: State, step: Step) -> dict[str, Any]:
    return {
        "band": step.resolution,
        "exhaustive": step.exhaustive,
        "motion": step.motion,
        "changed": state.changed,
        "certainty": round(state.certainty, 4),
        "rejected": state.rejected,
        "numbers": state.numbers,
        "shares": state.shares(),
        "resolutions": [c.made.resolution for c in state.classes if c.made],
    }


def _text(number: int, line: Mapping[str, Any]) -> str:
    parts = [
        f"class {k} {100 * share:.0f} % at {resolution:.2f} Å"
        for k, share, resolution in zip(line["numbers"], line["shares"], line["resolutions"], strict=True)
    ]
    how = "global" if line["exhaustive"] else "local"
    return (
        f"iteration {number} ({how}, data to {line['band']:.1f} Å): {', '.join(parts)}; "
        f"{100 * line['changed']:.1f} % changed class, {line['rejected']} rejected"
    )


def _write(folder: Path, state: State, best: Sequence[Particles], pixel_size: float, run: Run) -> None:
    """Maps of the classes, their page and their table."""
    labels = np.array([q.class_ for p in best for q in p.file.particles if q.use])
    confidence = torch.cat([p.max(dim=1).values[q.use] for p, q in zip(state.probability, best, strict=True)])
    found = []
    for c in state.classes:
        halves = [
            sum(int(q.class_ == c.number and q.use and q.half == h) for p in best for q in p.file.particles)
            for h in (1, 2)
        ]
        found.append(ClassAverage(c.number, (halves[0], halves[1]), c.maps, c.made))
    classifications.write_class_maps(folder, found, pixel_size, run)
    whole = _whole(state)
    views = classifications.class_views(found, labels, confidence, whole)
    by_series = classifications.populations(best, max(state.numbers))
    title = f"{folder}: {len(found)} classes of {len(labels)} particles"
    classifications.write_refined_page(folder, title, pixel_size, views, labels, by_series, run)
    table = [
        {"number": c.number, "share": share, "resolution": c.made.resolution, "fsc": c.made.fsc.table()}
        for c, share in zip(state.classes, state.shares(), strict=True)
        if c.made is not None
    ]
    write_text(run.output(folder / TABLE, owned=True), json.dumps({"classes": table}, indent=1))


def _whole(state: State) -> Tensor:
    """(n, n, n) unfiltered average of all classes, in proportion to their shares."""
    shares = [s if math.isfinite(s) else 0.0 for s in state.shares()]
    maps = [c.maps.whole for c in state.classes if c.maps is not None]
    return torch.stack([s * m for s, m in zip(shares, maps, strict=True)]).sum(dim=0)


def resumed(series: list[Particles], lines: Sequence[Mapping[str, Any]], setup: Setup, run: Run) -> State:
    """The classes of a run that has stopped, every particle at its pose in the likeliest."""
    numbers = list(lines[-1]["numbers"])
    begun = State([Class(k, list(series), NOTHING) for k in numbers], classes.divided(series, numbers))
    return classes.averaged(begun, setup, run.progress)
