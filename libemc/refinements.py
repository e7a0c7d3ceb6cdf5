"""What a refinement reads when it goes on, and the page that it leaves: files on one side, methods and views on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc import project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import read_json
from libemc.methods.average import Average
from libemc.methods.refine.schedule import Done, done_of
from libemc.methods.subtilts import Particles

SLICES = "iterations/slices_{:02d}.mrc"
"""The central slices xy, xz and yz of each iteration's average."""
FILES = (*project.AVERAGE_FILES, "index.html")
"""What a refinement against one reference writes into its folder."""
MANY = 0.2
"""Share of the particles at the limit of their shifts that is worth a warning."""


def repeated(path: Path, options: Mapping[str, Any]) -> records.Run:
    """The record of a run that is gone on with.

    Raises:
        InputError: the run was begun with other options, or from files that have changed since.
    """
    record = records.load(path, records.Run)
    begun = {**record.options, "seed": record.seed}
    for name, value in options.items():
        if begun.get(name) != value:
            raise InputError(
                f"was begun with {name} = {begun.get(name)!r}, not {value!r}", path, "give the same options"
            )
    for old in record.inputs:
        new = records.fingerprint(old.path)
        if (new.size, new.digest) != (old.size, old.digest) or (new.digest is None and new.mtime != old.mtime):
            raise InputError(f"has changed since {path.parent} was begun from it", old.path, "begin a new run")
    return record


def resume(
    folder: Path, options: Mapping[str, Any], series: list[Particles]
) -> tuple[list[Done], list[dict[str, Any]], list[Particles]]:
    """The iterations that a refinement has done, as one and in classes, and its particles after the last of them; nothing where
    none is done.

    Raises:
        InputError: the run was begun with other options, or from files that have changed since.
    """
    path = folder / "run.json"
    if not path.exists():
        return [], [], series
    record = repeated(path, options)
    past, lines = done_of(record.state), list(record.state.get("classes", []))
    return past, lines, project.open_particles(folder)[1] if past or lines else series


def read_halves(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Half maps and corrected FSC that a run has come to."""
    half1, half2 = (torch.from_numpy(mrc.read_volume(folder / f"half{h}.mrc")[0]) for h in (1, 2))
    fsc = torch.tensor(read_json(folder / "fsc.json")["curves"]["corrected"], dtype=torch.float64)
    return half1, half2, fsc


def with_poses_of(series: Sequence[Particles], run: str | Path) -> list[Particles]:
    """Particles at the poses that a run found for the same ones, by id; its box and sampling may be others.

    Raises:
        InputError: the run has none of them, or has one in the other half.
    """
    _, files = records.load_particles(run)
    out, found = [], 0
    for particles in series:
        file = files.get(particles.file.name)
        there = {p.id: p for p in file.particles} if file else {}
        here = [there.get(p.id, p) for p in particles.file.particles]
        found += sum(p.id in there for p in particles.file.particles)
        for p, other in zip(particles.file.particles, here, strict=True):
            if p.half != other.half:
                what = f"has {p.id} in half {other.half}, the set in {p.half}"
                raise InputError(what, run, "give a run of the same halves")
        own = ["xyz", "rot", "tilt", "psi", "score", "weight", "class_"]
        if file and len(file.tilts.tilt) == len(particles.file.tilts.tilt):
            own.append("subtilt")
        moved = tuple(
            p.model_copy(update={name: getattr(other, name) for name in own} | {"use": p.use and other.use})
            for p, other in zip(particles.file.particles, here, strict=True)
        )
        out.append(Particles.of(particles.file.model_copy(update={"particles": moved}), particles.stack))
    if not found:
        raise InputError("has none of these particles", run, "give a run of the same picks")
    return out


def warn_of_limits(run: Run, count: int, stuck: int) -> None:
    """Say so when many of the particles could go no farther."""
    if stuck > MANY * count:
        run.warn(f"{stuck} of {count} particles are at the limit of --max-shift; is the reference off its centre?")


def save_slices(path: Path, average: Average) -> None:
    """The central slices of an iteration's average."""
    from libemc.view.plots import central_slices  # matplotlib takes half a second that a dry run does without

    pixel_size = average.fsc.pixel_size
    slices = np.stack(list(central_slices(average.average.numpy()).values()))
    mrc.write_volume(path, slices.astype(np.float32), pixel_size)


def write_page(
    path: Path,
    folder: Path,
    options: Mapping[str, Any],
    past: Sequence[Done],
    series: tuple[Sequence[Particles], Sequence[Particles], Sequence[Particles]],
) -> None:
    """The page of the run in a folder.

    Args:
        series: the particles at the start, before the last iteration, and after it.
    """
    from libemc.view import refinement  # as above

    start, before, now = series
    box, pixel_size = now[0].file.box, now[0].file.pixel_size
    frequency = np.arange(box // 2 + 1) / (box * pixel_size)
    names = ("xy", "xz", "yz")
    iterations = [
        refinement.Iteration(
            kind="global" if done.step.exhaustive else "local",
            band=done.step.resolution,
            resolution=done.resolution,
            frequency=frequency,
            fsc=np.array(done.fsc),
            turned=done.turned,
            moved=done.moved,
            slices=dict(zip(names, mrc.read_volume(folder / SLICES.format(number))[0], strict=True)),
        )
        for number, done in enumerate(past, start=1)
    ]
    why = [
        (r or "not used") if not u or w == 0 else None
        for p in now
        for r, u, w in zip(p.reason, p.use.tolist(), p.weight.tolist(), strict=True)
    ]

    def column(particles: Sequence[Particles], name: str) -> np.ndarray[Any, Any]:
        return torch.cat([getattr(p, name) for p in particles]).numpy()

    refinement.write_page(
        path,
        refinement.RunPage(
            title=f"{folder}: {past[-1].resolution:.2f} Å after {len(past)} iterations",
            facts={name.replace("_", " "): str(value) for name, value in options.items() if value not in (None, False)},
            pixel_size=pixel_size,
            iterations=iterations,
            rotation=column(now, "rotation"),
            last_shift=column(now, "xyz") - column(before, "xyz"),
            shift=column(now, "xyz") - column(start, "xyz"),
            score=column(now, "score"),
            half=column(now, "half"),
            series=[p.file.name for p in now for _ in range(len(p))],
            reason=why,
        ),
    )
