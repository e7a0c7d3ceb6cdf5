"""Particle sets out of others: opened and joined, then written, with a stack of their own only where they need one; and
picks out of picks. The other half of `emc_select`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libemc import project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import select
from libemc.methods.select import Criteria, Joined, Points
from libemc.methods.subtilts import Particles

SOURCE = "emc_select"
"""What picks that were selected say of where they come from."""


@dataclass(frozen=True)
class Sets:
    """Particle sets and runs, opened.

    Attributes:
        heads: by their names, in the order given.
        series: the particles of each tilt series, by set.
    """

    heads: dict[str, records.ParticleSet]
    series: dict[str, dict[str, Particles]]

    @staticmethod
    def open(names: Sequence[str], tiltseries: Sequence[str] | None) -> Sets:
        """Open sets with their stacks.

        Args:
            tiltseries: only these; None: all.

        Raises:
            InputError: as `project.open_particles`; boxes or pixel sizes differ; a tilt series is in none of them.
        """
        heads: dict[str, records.ParticleSet] = {}
        series: dict[str, dict[str, Particles]] = {}
        for name in names:
            heads[name], opened = project.open_particles(name)
            for particles in opened:
                series.setdefault(particles.file.name, {})[name] = particles
        (first, head), *others = heads.items()
        for name, other in others:
            if (other.box, other.pixel_size) != (head.box, head.pixel_size):
                sizes = [f"a box of {h.box} at {h.pixel_size:g} Å" for h in (other, head)]
                raise InputError(f"has {sizes[0]}, {first} {sizes[1]}", name, "extract both in the same way")
        for name in tiltseries or ():
            if name not in series:
                raise InputError(f"no tilt series {name}", first, f"there are {', '.join(list(series)[:8])}")
        return Sets(heads, {name: series[name] for name in tiltseries or series})

    def head(self, set_name: str) -> records.ParticleSet:
        """The own record of a set made of these."""
        heads = list(self.heads.values())
        return records.ParticleSet(
            set=set_name,
            label=self._common("label"),
            box=heads[0].box,
            pixel_size=heads[0].pixel_size,
            symmetry=self._common("symmetry") or "c1",
            parent=", ".join(self.heads),
        )

    def mixed_symmetry(self) -> bool:
        """Whether the sets differ in symmetry, so that one of them all is of none."""
        return self._common("symmetry") is None

    def _common(self, key: str) -> Any:
        values = {getattr(head, key) for head in self.heads.values()}
        return values.pop() if len(values) == 1 else None

    def select(self, criteria: Criteria) -> tuple[dict[str, Joined], dict[str, str]]:
        """The particles that fulfil criteria, and a line about each tilt series.

        Raises:
            InputError: no particle does, none is in the classes to leave out, or as `select.select`.
        """
        chosen, lines, left = {}, {}, Remaining()
        for name, sets in self.series.items():
            joined = select.join({of: particles.file for of, particles in sets.items()})
            index = left.select(Points.of_particles(joined.file), criteria)
            if len(index):
                chosen[name] = joined.at(index)
            given = sum(len(particles) for particles in sets.values())
            notes = ((joined.repeated, "repeated"), (joined.renamed, "with new ids"))
            more = "".join(f", {count} {what}" for count, what in notes if count)
            lines[name] = f"{name}: {given} particles{more}, {len(index)} kept"
        left.need_some("particle", " ".join(self.heads))
        if criteria.drop_class and not np.isin(criteria.drop_class, self.classes()).any():
            asked, there = (", ".join(map(str, numbers)) for numbers in (criteria.drop_class, self.classes()))
            raise InputError(f"no particle is in class {asked}", "--drop-class", f"the classes are {there}")
        return chosen, lines

    def classes(self) -> list[int]:
        """The classes that particles are in, used or not."""
        return sorted({p.class_ for sets in self.series.values() for one in sets.values() for p in one.file.particles})

    def sources(self, name: str, joined: Joined) -> list[Particles]:
        """A tilt series in each of the sets that some of its joined particles come from."""
        return [list(self.series[name].values())[source] for source in np.unique(joined.source)]

    def needs_stack(self, name: str, joined: Joined) -> bool:
        """Whether the joined particles of a tilt series have images in several places, which one file can't name."""
        first, *others = (particles.file for particles in self.sources(name, joined))
        return any(other.stack != first.stack or (other.stack is None and other.raw != first.raw) for other in others)

    def write(self, folder: Path, parts: Mapping[str, Joined], run: Run) -> None:
        """Write a set: the stacks that it needs, its particle files and its own record, last."""
        head, files = self.head(folder.name), {}
        with ExitStack() as all_or_none:
            for name, joined in parts.items():
                first = self.sources(name, joined)[0].file
                particles = joined.file.particles
                changes: dict[str, Any] = {"set": head.set, "label": head.label, "symmetry": head.symmetry}
                if self.needs_stack(name, joined):
                    target = folder / f"{name}.mrcs"
                    writer = all_or_none.enter_context(mrc.StackWriter(target, head.pixel_size, "float16"))
                    self._copy(name, joined, writer, run)
                    changes |= {"stack": str(target), "raw": None}
                if first.stack is None or "stack" in changes:
                    particles = tuple(p.model_copy(update={"image": None}) for p in particles)
                changes |= {"particles": particles, "parent": ", ".join(self.series[name]), "history": ()}
                files[name] = first.model_copy(update=changes)
        records.save_particles(folder, head, files)

    def _copy(self, name: str, joined: Joined, writer: mrc.StackWriter, run: Run) -> None:
        """The images of joined particles, in their order, as many at once as memory allows."""
        box, tilts = joined.file.box, len(joined.file.tilts.tilt)
        at_once = max(1, int(run.memory // (16 * tilts * box**2)))
        sets, source = list(self.series[name].values()), joined.source
        places = np.array([p.image for p in joined.file.particles], dtype=np.int64)
        blocks = np.split(np.arange(len(source)), range(at_once, len(source), at_once))
        for block in run.progress(blocks, len(blocks), f"copy {name}"):
            images = np.empty((len(block), tilts, box, box), dtype=np.float16)
            for one in np.unique(source[block]):
                mine = source[block] == one
                numbers = places[block[mine], None] * tilts + np.arange(tilts)
                images[mine] = np.asarray(sets[one].stack[numbers.ravel()]).reshape(-1, tilts, box, box)
            writer.append(images.reshape(-1, box, box))


def select_picks(
    paths: Sequence[Path], label: str, new: str, criteria: Criteria, overwrite: bool
) -> tuple[dict[Path, records.Picks | None], dict[Path, str]]:
    """The picks of a label that fulfil criteria, and a line about each tilt series, by the paths of the records.

    Args:
        new: the label that they will have; what another program has under it is replaced with `overwrite` only.

    Returns:
        None for picks: none of that tilt series.

    Raises:
        InputError: no pick fulfils them, there are no such picks, or as `select.select`.
    """
    chosen: dict[Path, records.Picks | None] = {}
    lines, left = {}, Remaining()
    for path in paths:
        record = records.load_tiltseries(path)
        picks, old = records.need_picks(record, label), record.picks.get(new)
        if old is not None and old.source != SOURCE and not overwrite:
            raise InputError(f"has picks labelled {new}", path, "use --overwrite to replace them")
        index = left.select(Points.of_picks(record.name, picks), criteria)
        columns = {key: tuple(values[i] for i in index) for key, values in picks if isinstance(values, tuple)}
        parameters = {**(picks.parameters or {}), "selection": {"label": label, **criteria.asked()}}
        if len(index):
            chosen[path] = picks.model_copy(update={**columns, "source": SOURCE, "parameters": parameters})
        else:
            chosen[path] = None
        lines[path] = f"{record.name}: {len(picks.xyz)} {label}, {len(index)} kept"
    left.need_some("pick", label)
    return chosen, lines


def save_picks(path: Path, label: str, picks: records.Picks | None) -> None:
    """Put picks into the record of a tilt series under a label; None: nothing is left there."""

    def change(record: records.TiltSeriesRecord) -> records.TiltSeriesRecord:
        others = {key: value for key, value in record.picks.items() if key != label}
        return record.model_copy(update={"picks": others if picks is None else {**others, label: picks}})

    records.update(path, change, records.TiltSeriesRecord)


class Remaining:
    """How many points are left after each criterion in turn, over all tilt series."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def select(self, points: Points, criteria: Criteria) -> NDArray[np.int64]:
        """The places of those points that fulfil the criteria."""
        steps = select.select(points, criteria)
        for name, mask in steps.items():
            self.counts[name] = self.counts.get(name, 0) + int(mask.sum())
        return np.flatnonzero(list(steps.values())[-1])

    def need_some(self, what: str, where: str) -> None:
        """Check that there is a selection.

        Raises:
            InputError: there is none; the line names the criterion after which nothing was left.
        """
        empty = next((name for name, count in self.counts.items() if not count), None)
        if empty is not None:
            before = max(self.counts.values())
            because = "is used" if empty == "use" else f"is left after {option(empty)}"
            raise InputError(f"no {what} of {before} {because}", where, "ask for less, or check the values")


def option(criterion: str) -> str:
    """The option that asks for a criterion."""
    return "--" + criterion.removesuffix("_numbers").replace("_", "-")
