"""Runs of particles refined image by image: what is read, one iteration after the other, what is written and drawn.

Shared by emc_subtilt, which fits each half of one kind of particle by itself, and emc_tomocpr, which fits all particles of a
tilt series, of all kinds, together. The state of a run is its record and, while an iteration lasts, the particle file of
every tilt series that is finished, so that a run goes on with the next one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc import project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.methods import average
from libemc.methods.average import Average, HalfMaps
from libemc.methods.joint import fit as joint
from libemc.methods.joint.fit import Member
from libemc.methods.joint.levels import SHIFT, Choice, Level, choose
from libemc.methods.joint.solve import Trial
from libemc.methods.joint.starts import started
from libemc.methods.molecular_mask import automatic_mask
from libemc.methods.refine import left_out
from libemc.methods.refine.left_out import Making, References
from libemc.methods.refine.references import Filtering
from libemc.methods.refine.schedule import JOINED
from libemc.methods.subtilt import quality
from libemc.methods.subtilts import Particles
from libemc.methods.tiltseries_refine import neighbours
from libemc.refinements import repeated

MOST_ITERATIONS = 3
WORTH = 0.01
"""Relative gain in resolution below which an iteration isn't followed by another."""
WORSE = 0.005
"""Relative loss of resolution from which what was before is kept."""
MOST_IMAGES = 8000
"""Images by which levels are chosen: of some tilt series, spread over all."""
ITERATIONS, SETTLED = "iterations", "settled"
"""Folder of what is kept while an iteration lasts, and the part of it that is kept in the end."""

Finished = Callable[[str, "list[Kind]", "list[Member]", "Outcome", "list[Choice]"], "dict[str, Any]"]
"""Called when a tilt series is fitted; gives what its report says besides."""


@dataclass(frozen=True)
class Kind:
    """One kind of particle.

    Attributes:
        run: the folder that it comes from; folder: where it goes to, once the run has begun.
        series: its particles by tilt series.
        mask: (n, n, n) of references and FSC.
        maps, outcome, compared: half maps, average and references of the particles as they are; None until they are made.
    """

    run: str
    folder: Path
    head: records.ParticleSet
    series: dict[str, Particles]
    mask: Tensor
    symmetry: str
    maps: HalfMaps | None = None
    outcome: Average | None = None
    compared: References | None = None

    @property
    def made(self) -> Average:
        """The average, which has been made."""
        assert self.outcome is not None
        return self.outcome

    @property
    def references(self) -> References:
        """What its particles are compared with, which has been made."""
        assert self.compared is not None
        return self.compared


@dataclass(frozen=True)
class Plan:
    """How to go about it.

    Attributes:
        levels: that are tried; without a shift of tilts among them, tilts aren't looked for elsewhere.
        by_half: each half of the particles is fitted by itself.
        keep_corrections: what is fitted comes on top of the corrections that particles have.
        constrained: images are compared with the prediction of all particles in them.
        weighed: images get weights by how well they fit; keep: share of each tilt's images that count.
        filter: of the references.
    """

    levels: tuple[Level, ...]
    by_half: bool
    keep_corrections: bool
    constrained: bool
    weighed: bool
    keep: float | None
    filter: str

    @property
    def aligns(self) -> bool:
        """Whether tilts may be moved."""
        return SHIFT in self.levels


# --------------------------------------------------------------------------------------------------------------- reading


def open_kind(run: str, mask: Path | None, symmetry: str | None) -> Kind:
    """A run with half maps, at the poses it ended with; its maps are made by `averaged`.

    Raises:
        InputError: there is no such run, it has no maps, or they don't belong to its particles.
    """
    head, series = project.open_particles(run)
    where = Path(run)
    for name in ("half1.mrc", "half2.mrc", "average.mrc", "mask.mrc", "run.json"):
        if not (where / name).exists():
            raise InputError(f"has no {name}", run, "give the folder of a run of emc_refine")
    project.need_halves(series, run)
    own = records.load(where / "run.json", records.Run).options
    group = symmetry or own.get("symmetry") or head.symmetry
    shape = mask_of(where, mask, own.get("mask"), head)
    return Kind(run, Path(), head, {p.file.name: p for p in series}, shape, str(group))


def mask_of(run: Path, given: Path | None, of_the_run: object, head: records.ParticleSet) -> Tensor:
    """The mask that was given, else the one that the run was given, else the shape of its average's particle."""
    box, pixel_size = head.box, head.pixel_size
    if given is not None:
        return project.read_mask(given, box, pixel_size)
    if of_the_run is None:
        try:
            return automatic_mask(project.read_map(run / "average.mrc", box, pixel_size), pixel_size)
        except InputError:
            pass  # nothing stands out of the noise
    return project.read_mask(run / "mask.mrc", box, pixel_size)


@dataclass(frozen=True)
class Begun:
    """A run that has a folder.

    Attributes:
        record: its run.json; state: what that says of its course, to be changed in place.
    """

    kinds: list[Kind]
    folder: Path
    record: Path
    state: dict[str, Any]


def begin(kinds: Sequence[Kind], path: Path | None, prefix: str, options: Mapping[str, Any], run: Run) -> Begun:
    """A new run in its folder, or one that is gone on with; several kinds have folders of their own within it.

    Raises:
        InputError: --resume without the folder, with other options or inputs; files of others are in the way.
    """
    if run.resume and not path:
        raise InputError("--resume of what?", remedy="give the folder of the run with --path")
    folder = path or records.next_run_directory(prefix)
    record = folder / "run.json"
    again = run.resume and record.exists()
    state = dict(repeated(record, {**options, "seed": run.seed}).state) if again else {}
    run.output(record, owned=again)
    placed = []
    for kind in kinds:
        own = folder if len(kinds) == 1 else folder / Path(kind.run).name
        for name in (*project.AVERAGE_FILES, "index.html"):
            run.output(own / name, owned=again)
        placed.append(replace(kind, folder=own))
    if len({k.folder for k in placed}) < len(placed):
        raise InputError("two of the runs have the same name", folder, "give runs in folders of different names")
    if not again:
        clear_parts(placed)
    return Begun(placed, folder, record, state)


def referenced(kind: Kind, filter: str, run: Run) -> Kind:
    """With what its particles are compared with, after `averaged`."""
    box, pixel_size = kind.head.box, kind.head.pixel_size
    assert kind.maps is not None
    filtering = Filtering(filter, kind.mask, pixel_size, run.seed)
    making = Making(filtering, kind.symmetry, box * pixel_size / JOINED, run.memory)
    series, made = list(kind.series.values()), kind.made
    return replace(kind, compared=left_out.made(series, kind.maps, made.corrected, made.reach, making, run.progress))


def averaged(kind: Kind, run: Run) -> Kind:
    """With the maps of its particles as they are."""
    maps = average.half_maps(list(kind.series.values()), run.memory, kind.symmetry, progress=run.progress)
    return replace(kind, maps=maps, outcome=average.finish(maps, kind.mask, kind.head.pixel_size, run.seed))


def check_kinds(kinds: Sequence[Kind]) -> None:
    """Check that all kinds in a tilt series were cut out with one geometry, and that none has particles of another.

    Raises:
        InputError: they weren't, or one has.
    """
    for name in sorted({name for k in kinds for name in k.series}):
        first, *others = [k for k in kinds if name in k.series]
        matrices = first.series[name].series.matrices
        for k in others:
            own = k.series[name].series.matrices
            if own.shape != matrices.shape or bool((own - matrices).abs().max() >= 1e-6):
                what = f"has another geometry of {name} than {first.run}"
                raise InputError(what, k.run, "refine both from sets that were extracted with one alignment")
    places: dict[tuple[object, ...], str] = {}
    for k in kinds:
        for particle in (p for series in k.series.values() for p in series.file.particles if p.use):
            same = (particle.id, particle.centre)  # sets of different picks number their particles alike
            if same in places:
                raise InputError(f"has {particle.id}, as {places[same]} has", k.run, "give runs of different particles")
            places[same] = k.run


def members_of(kinds: Sequence[Kind], name: str) -> tuple[list[Kind], list[Member]]:
    """The kinds that are in a tilt series, and its particles of each."""
    there = [k for k in kinds if name in k.series]
    return there, [Member(k.series[name], k.references) for k in there]


def groups_of(members: Sequence[Member], by_half: bool) -> list[Tensor]:
    """Which particles, numbered through all members, are fitted together."""
    half = torch.cat([m.particles.half for m in members])
    if not by_half:
        return [torch.arange(len(half))]
    return [found for h in (1, 2) if len(found := torch.nonzero(half == h)[:, 0])]


# ---------------------------------------------------------------------------------------------------------- an iteration


def chosen(kinds: Sequence[Kind], plan: Plan, run: Run) -> tuple[list[Choice], list[Trial]]:
    """The levels that are on, from as many tilt series as `MOST_IMAGES` needs."""
    names = sorted({name for k in kinds for name in k.series})
    images = {n: sum(int(k.series[n].shown.sum()) for k in kinds if n in k.series) for n in names}
    count = max(1, min(len(names), round(MOST_IMAGES / (sum(images.values()) / len(names)))))
    some = [names[round(i)] for i in np.linspace(0, len(names) - 1, count)]
    found = []
    for name in some:
        _, members = members_of(kinds, name)
        base = joint.present(members) if plan.keep_corrections else None
        if plan.aligns:
            members, _ = started(members, run.memory)
        found += joint.cases(members, groups_of(members, plan.by_half), base, run.memory, run.progress)
    return choose(found, plan.levels, run.seed)


@dataclass(frozen=True)
class Outcome:
    """What the fit of a tilt series ends with.

    Attributes:
        particles: of each kind in it.
        numbers, errors: of the levels' terms by their names, of the first group.
        report: what the run's record says of it.
    """

    particles: list[Particles]
    numbers: dict[str, Tensor]
    errors: dict[str, Tensor]
    report: dict[str, Any]


def fit_series(members: Sequence[Member], plan: Plan, choices: Sequence[Choice], folder: Path, run: Run) -> Outcome:
    """Fit one tilt series.

    Args:
        folder: for scratch files.
    """
    given = list(members)
    members = predicted_together(members, folder, run) if plan.constrained else list(members)
    before = joint.measured(members, run.memory, run.progress)
    base = joint.present(members) if plan.keep_corrections else None
    if plan.aligns:
        members, shift = started(members, run.memory)
        for tilt in torch.nonzero(shift.any(1))[:, 0].tolist():
            name = members[0].particles.file.name
            far = math.hypot(*shift[tilt].tolist())
            run.warn(f"{name}: image {tilt + 1} lies {far:.0f} Å from where its particles are; it's fitted from there")
    found = joint.fit(members, groups_of(members, plan.by_half), choices, base, run.memory, run.progress)
    after = joint.measured(found.members, run.memory, run.progress)
    errors = {} if plan.by_half else joint.errors(found.members, after, choices, run.seed)
    strengths = {c.level.name: c.strength for c in choices}
    done = neighbours.with_neighbours(found.members, given)
    particles, first = [m.particles for m in done], 0
    if plan.weighed:
        score = quality.scores(after)
        weight = quality.weights(after, score, plan.keep)
        for k, p in enumerate(particles):
            mine = slice(first, first := first + len(p))
            particles[k] = p.corrected(score=score[mine], weight=weight[mine])
    moved = torch.cat([_moved(m.particles, p) for m, p in zip(given, particles, strict=True)])
    report = {
        "particles": int(after.seen.any(1).sum()),
        "images": int(after.seen.sum()),
        "left_out": int(sum((p.visible & p.series.use & p.use[:, None] & (p.corrections.weight == 0)).sum() for p in particles)),
        "moved": float(moved[after.seen].median()) if bool(after.seen.any()) else 0.0,
        "errors": {name: round(float(e.pow(2).mean().sqrt()) * strengths[name], 5) for name, e in errors.items()},
        "before": _listed(joint.rms_shift(before)),
        "after": _listed(joint.rms_shift(after)),
    }  # fmt: skip
    return Outcome(particles, found.numbers[0], errors, report)


def predicted_together(members: Sequence[Member], folder: Path, run: Run) -> list[Member]:
    """The members, their images less what all other particles show in them."""
    contrast = [joint.joined([m.evidence(2 * m.resolution, run.memory, run.progress)]) for m in members]
    strength = [torch.where(e.seen.any(1)[:, None], e.contrast, 0.0) for e in contrast]
    others, left = [], float(run.memory)
    for k, m in enumerate(members):
        p = m.particles
        out, left = project.room_for_images((p.visible.numel(), p.file.box, p.file.box), left, folder)
        out[:] = 0
        others.append(neighbours.shown_by_others(members, strength, k, out))
    return neighbours.without_neighbours(members, others)


def _moved(before: Particles, after: Particles) -> Tensor:
    """(N, T) Å by which images show their particles elsewhere."""
    shift = after.corrections.shift - before.corrections.shift
    q = torch.einsum("tij,nj->nti", after.series.matrices[:, :2], after.xyz - before.xyz)
    return torch.linalg.vector_norm(shift + q, dim=-1)


def _listed(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in values.tolist()]


# --------------------------------------------------------------------------------------------------------- state and files


def save_kind(kind: Kind, run: Run, parent: str) -> Kind:
    """Write the particles and maps of a kind into its folder."""
    saved = project.save_run_particles(kind.folder, kind.head, list(kind.series.values()), parent)
    outputs = {name: run.output(kind.folder / name, owned=True) for name in project.AVERAGE_FILES}
    assert kind.maps is not None
    project.write_average(outputs, kind.maps, kind.made, kind.mask, kind.head.pixel_size)
    return replace(kind, series={p.file.name: p for p in saved})


def part_file(kind: Kind, part: str, name: str) -> Path:
    """Where the particles of a tilt series wait until an iteration is finished."""
    return kind.folder / ITERATIONS / part / f"{name}.json"


def save_part(kind: Kind, part: str, particles: Particles) -> Particles:
    """Keep the particles of a tilt series until the iteration is finished; as they are read again."""
    path = part_file(kind, part, particles.file.name)
    file = records.save_new(path, particles.to_file().model_copy(update={"history": ()}), overwrite=True)
    return Particles.of(file, particles.stack)


def load_part(kind: Kind, part: str, name: str) -> Particles | None:
    """What `save_part` has kept, if anything."""
    path = part_file(kind, part, name)
    if not path.exists():
        return None
    return Particles.of(records.load(path, records.ParticleFile), kind.series[name].stack)


def clear_parts(kinds: Sequence[Kind]) -> None:
    """Remove what `save_part` has kept."""
    for kind in kinds:
        shutil.rmtree(kind.folder / ITERATIONS, ignore_errors=True)


def reopened(kind: Kind) -> Kind:
    """A kind as the last iteration left it in its folder."""
    _, series = project.open_particles(kind.folder)
    return replace(kind, series={p.file.name: p for p in series})


def trial_table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For the run's record; a length of null is that of all particles alike."""
    return [
        {
            "level": t.name, "strength": t.strength, "length": t.length if math.isfinite(t.length) else None,
            "gain": round(t.gain, 3), "error": round(t.error, 3), "kept": t.kept,
        }
        for t in trials
    ]  # fmt: skip


def choices_of(trials: Sequence[Mapping[str, Any]], levels: Sequence[Level]) -> list[Choice]:
    """The levels that a run's record says are on."""
    by_name = {level.name: level for level in levels}
    return [
        Choice(by_name[t["level"]], t["strength"], math.inf if t["length"] is None else t["length"])
        for t in trials
        if t["kept"]
    ]


def line_of(number: int, iteration: Mapping[str, Any]) -> str:
    """One iteration in a line."""
    on = ", ".join(f"{t['level']} {t['strength']:g}" for t in iteration["trials"] if t["kept"]) or "nothing to correct"
    named = len(iteration["kinds"]) > 1
    maps = "; ".join(
        f"{name + ' ' if named else ''}{k['resolution']:.2f} Å at FSC 0.143 (before {k['before']:.2f})"
        for name, k in iteration["kinds"].items()
    )
    kept = "" if iteration["kept"] else "; no better, what was before is kept"
    moved = f"images moved {iteration['moved']:.2f} Å (median), {iteration['left_out']} left out"
    return f"iteration {number}: {on}; {moved}; {maps}{kept}"


def refine(
    begun: Begun,
    plan: Plan,
    iterations: int | None,
    save: Callable[[str | None], None],
    run: Run,
    finished: Finished | None = None,
) -> list[Kind]:
    """Iterate; the state of the run is kept after every tilt series.

    Args:
        iterations: how many; None: while they gain.
        save: called with the step to go on with after each change of the state.
        finished: called with (name, kinds in it, outcome, choices) of each tilt series; gives what its report says more.

    Returns:
        The kinds at the end; their folders hold them.
    """
    state, folder = begun.state, begun.folder
    past: list[dict[str, Any]] = state.setdefault("iterations", [])
    kinds = [averaged(reopened(k) if past else k, run) for k in begun.kinds]
    if not past:
        kinds = [save_kind(k, run, k.run) for k in kinds]
        state["start"] = {k.run: _figures(k) for k in kinds}
        save("iteration 1")
    while len(past) < (iterations or MOST_ITERATIONS) and not (iterations is None and past and past[-1]["last"]):
        number = len(past) + 1
        kinds = [referenced(k, plan.filter, run) for k in kinds]
        now = state.setdefault("now", {})
        if "trials" not in now:
            now |= {"trials": trial_table(chosen(kinds, plan, run)[1]), "series": {}}
            save(f"iteration {number}")
        choices = choices_of(now["trials"], plan.levels)
        new = [replace(k, series=dict(k.series)) for k in kinds]
        for name in sorted({name for k in kinds for name in k.series}):
            there, members = members_of(kinds, name)
            again = [load_part(k, str(number), name) for k in there]
            if name not in now["series"] or not all(again):
                out = fit_series(members, plan, choices, folder, run)
                again = [save_part(k, str(number), p) for k, p in zip(there, out.particles, strict=True)]
                more = finished(name, there, members, out, choices) if finished else {}
                now["series"][name] = out.report | more
                save(f"iteration {number}")
            for k in new:
                if name in k.series:
                    k.series[name] = next(
                        p for q, p in zip(there, again, strict=True) if q.run == k.run and p is not None
                    )
        done = [averaged(k, run) for k in new]
        better = _better(kinds, done)
        reports = now["series"].values()
        past.append({
            "band": [k.made.reach for k in kinds],
            "trials": now["trials"],
            "series": now["series"],
            "moved": float(np.mean([r["moved"] for r in reports])),
            "left_out": sum(r["left_out"] for r in reports),
            "kinds": {k.run: _figures(k) | {"before": b.made.resolution} for k, b in zip(done, kinds, strict=True)},
            "kept": better > -WORSE or plan.keep is not None,  # who wants images left out gets that
            "last": better < WORTH,
        })  # fmt: skip
        del state["now"]
        if past[-1]["kept"]:
            kinds = [save_kind(k, run, k.run) for k in done]
        last = len(past) >= (iterations or MOST_ITERATIONS) or (iterations is None and past[-1]["last"])
        save(None if last else f"iteration {number + 1}")
        clear_parts(kinds)
        run.result(line_of(number, past[-1]))
        if not past[-1]["kept"]:
            break
    return list(kinds)


def _figures(kind: Kind) -> dict[str, Any]:
    fsc = [round(v, 5) for v in kind.made.corrected.tolist()]
    return {"resolution": kind.made.resolution, "reach": kind.made.reach, "fsc": fsc}


def _better(before: Sequence[Kind], after: Sequence[Kind]) -> float:
    """Relative gain in the sum of the FSC over its shells, of the kind that gains least: a resolution without the accident of
    where a curve with the gaps of few defoci first falls below a threshold."""

    def shells(kind: Kind) -> float:
        return float(average.for_filters(kind.made.corrected).sum())

    return min(shells(a) / shells(b) - 1 for a, b in zip(after, before, strict=True))
