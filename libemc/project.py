"""Where files become what methods work on, and results become files: shared by the programs, and the only file that sees
io, records and methods together. No mathematics, no options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libemc import records
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import read_json, write_text
from libemc.methods.average import Average, HalfMaps
from libemc.methods.postprocess import resample
from libemc.methods.refine import Done, Step, filtered_references
from libemc.methods.subtilts import Particles
from libemc.numerics import fourier
from libemc.view import plots

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference below which two pixel sizes are the same: headers keep six digits of a cell's length."""
HEADER_TOLERANCE = 0.005
"""The same for a raw stack and its record: microscopes write rounded sizes, and import takes them for one number."""


def open_particles(
    set_or_run: str | Path, project: Path = Path(), class_number: int | None = None
) -> tuple[records.ParticleSet, list[Particles]]:
    """A particle set or a run's particles with their stacks open (memory-mapped).

    Args:
        class_number: only the particles of this class are used; None: all that are used now.

    Raises:
        InputError: there is no such set, it holds no used particles, or a stack is missing or does not fit it.
    """
    head, files = records.load_particles(set_or_run, project)
    series = []
    for file in files.values():
        if file.stack is None:
            raise InputError("the particles have no stack", head.files[file.name], "cut them out with emc_extract")
        stack = mrc.open_stack(project / file.stack)
        want = (len(file.particles) * len(file.tilts.tilt), file.box, file.box)
        if stack.shape != want:
            raise InputError(
                f"holds {stack.shape} images, its particles ask for {want}", file.stack, "extract them again"
            )
        particles = Particles.of(file, stack.array)
        if class_number is not None:
            chosen = torch.tensor([p.class_ == class_number for p in file.particles], dtype=torch.bool)
            particles = particles.using(particles.use & chosen)
        series.append(particles)
    if not any(bool(p.use.any()) for p in series):
        raise InputError("no particles to use", head.set, "check the class, and which particles have use = true")
    return head, series


def open_raw_stack(record: records.TiltSeriesRecord) -> mrc.MrcImages:
    """The raw images of a tilt series, mapped; the record and the stack's header must say the same of them.

    Raises:
        InputError: the stack is missing or damaged, or its shape or pixel size is not what the record says.
    """
    source = record.source
    stack = mrc.open_stack(source.stack)
    named = f"the record of {record.name} says"
    if stack.shape != source.shape:
        raise InputError(f"has shape {stack.shape}, {named} {source.shape}", source.stack, "import the stack again")
    own = stack.pixel_size
    if own is not None and abs(own / source.pixel_size - 1) > HEADER_TOLERANCE:
        what = f"has {own:g} Å/px in its header, {named} {source.pixel_size:g} Å/px"
        raise InputError(what, source.stack, "correct the one that is wrong")
    return stack


def read_map(path: str | Path, box: int, pixel_size: float) -> Tensor:
    """A cubic map brought to a box and sampling: (n, n, n) float32, the origin n//2 kept on the origin."""
    data, own = mrc.read_volume(path)
    if len(set(data.shape)) != 1:
        raise InputError(f"is not a cube but {data.shape}", path, "cut it with emc_volume --box")
    if float(data.std()) == 0:
        raise InputError("is the same everywhere", path, "give a map with density in it")
    density = torch.from_numpy(data)
    if abs(own / pixel_size - 1) > PIXEL_SIZE_TOLERANCE:
        density = resample(density, pixel_size / own)
    return fourier.centre_fit(density, (box,) * 3)


def read_mask(path: str | Path, box: int, pixel_size: float) -> Tensor:
    """A mask on exactly the grid of the maps: (n, n, n) float32 in 0 ... 1."""
    data, own = mrc.read_volume(path)
    if data.shape != (box,) * 3 or abs(own / pixel_size - 1) > PIXEL_SIZE_TOLERANCE:
        raise InputError(
            f"has shape {data.shape} at {own:g} Å, the maps {box} at {pixel_size:g} Å", path, "make it with emc_mask"
        )
    if data.min() < -1e-3 or data.max() > 1 + 1e-3 or data.max() <= 0:
        raise InputError(f"has values from {data.min():g} to {data.max():g}, a mask from 0 to 1", path, "see emc_mask")
    return torch.from_numpy(data)


def write_average(
    outputs: Mapping[str, Path], maps: HalfMaps, average: Average, mask: Tensor, pixel_size: float
) -> None:
    """average.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.json, fsc.png and average.png of a run, each whole or not at all.

    Args:
        outputs: their checked paths by file name.
    """
    volumes = {"half1.mrc": maps.half1, "half2.mrc": maps.half2, "mask.mrc": mask, "average.mrc": average.average}
    for name, volume in volumes.items():
        mrc.write_volume(outputs[name], volume.float().numpy(), pixel_size)
    table = average.fsc.table()
    write_text(outputs["fsc.json"], json.dumps(table, indent=1))
    curves = {name: values for name, values in table["curves"].items() if name != "randomised"}
    levels = {name: table["thresholds"][name] for name in ("0.143", "0.5")}
    plots.fsc_plot(outputs["fsc.png"], table["frequency"], curves, levels, average.resolution)
    plots.central_slices_plot(outputs["average.png"], average.average.numpy(), pixel_size)


AVERAGE_FILES = ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png")
"""What `write_average` writes into a run's folder."""


def save_run(
    path: Path,
    program: str,
    options: Mapping[str, Any],
    seed: int,
    state: Mapping[str, Any],
    inputs: Sequence[Path],
    stopped_at: str | None = None,
) -> None:
    """Write a run's record, or bring the one that is there up to date (its history stays).

    A run writes it before anything else, so that what a killed one leaves is known to be the program's own.

    Args:
        inputs: files of which size, time and digest are kept.
        stopped_at: what `--resume` begins with; None: the run is complete.
    """
    content = {
        "program": program,
        "options": dict(options),
        "inputs": tuple(map(records.fingerprint, inputs)),
        "seed": seed,
        "state": dict(state),
        "stopped_at": stopped_at,
    }
    if path.exists():
        records.update(path, lambda old: old.model_copy(update=content), records.Run)
    else:
        records.save_new(path, records.Run(**content))


def resume_refinement(
    folder: Path, options: Mapping[str, Any], series: list[Particles]
) -> tuple[list[Done], list[Particles]]:
    """The iterations that a refinement has done, and its particles after the last of them; nothing where none is done.

    Raises:
        InputError: the run was begun with other options, or from files that have changed since.
    """
    path = folder / "run.json"
    if not path.exists():
        return [], series
    record = records.load(path, records.Run)
    for name, value in options.items():
        if record.options.get(name) != value:
            raise InputError(
                f"was begun with {name} = {record.options.get(name)!r}, not {value!r}", path, "give the same options"
            )
    for old in record.inputs:
        new = records.fingerprint(old.path)
        if (new.size, new.digest) != (old.size, old.digest) or (new.digest is None and new.mtime != old.mtime):
            raise InputError(f"has changed since {folder} was begun from it", old.path, "begin a new run")
    past = [
        Done(Step(i["band"], i["exhaustive"]), i["resolution"], i["reach"], i["turned"], i["moved"])
        for i in record.state.get("iterations", [])
    ]
    return past, open_particles(folder)[1] if past else series


def read_references(folder: Path, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The references that a run's half maps make."""
    half1, half2 = (torch.from_numpy(mrc.read_volume(folder / f"half{h}.mrc")[0]) for h in (1, 2))
    fsc = torch.tensor(read_json(folder / "fsc.json")["curves"]["corrected"]).double()
    return filtered_references(half1, half2, mask, fsc)


def save_run_particles(folder: Path, head: records.ParticleSet, series: Sequence[Particles], parent: str) -> None:
    """The particles of a run at their present poses, in `<run>/particles/`."""
    files = {p.file.name: p.to_file().model_copy(update={"parent": parent, "history": ()}) for p in series}
    own = head.model_copy(update={"parent": parent, "history": ()})
    records.save_particles(folder / "particles", own, files)
