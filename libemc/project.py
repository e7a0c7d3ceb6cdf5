"""Where files become what methods work on, and results become files: shared by the programs, and a file that sees
io, records and methods together. No mathematics, no options.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from libemc import records
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.methods import reconstruct
from libemc.methods.average import DEFAULT_MASK, MASK_EDGE, Average, HalfMaps
from libemc.methods.extract import PatchStack, patch_stack
from libemc.methods.postprocess import resample
from libemc.methods.subtilts import Particles
from libemc.numerics import fourier
from libemc.numerics.masks import soft_sphere

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference below which two pixel sizes are the same: headers keep six digits of a cell's length."""
HEADER_TOLERANCE = 0.005
"""The same for a raw stack and its record: microscopes write rounded sizes, and import takes them for one number."""
SAMPLED_IMAGES = 16
"""So many images of each half and tilt series are looked at before a run."""


def open_particles(
    set_or_run: str | Path, project: Path = Path(), class_numbers: tuple[int, ...] | None = None
) -> tuple[records.ParticleSet, list[Particles]]:
    """A particle set or a run's particles with their stacks open (memory-mapped), or what their images are cut from.

    Args:
        class_numbers: only the particles of these classes are used; None: all that are used now.

    Raises:
        InputError: there is no such set, it holds no used particles, or a stack is missing or does not fit it, or there is
            none and the raw images are missing or others.
    """
    head, files = records.load_particles(set_or_run, project)
    series = []
    for file in files.values():
        particles = Particles.of(file, _images_of(file, head.files[file.name], project))
        if class_numbers is not None:
            chosen = torch.tensor([p.class_ in class_numbers for p in file.particles], dtype=torch.bool)
            particles = particles.using(particles.use & chosen)
        series.append(particles)
    if not any(bool(p.use.any()) for p in series):
        raise InputError("no particles to use", set_or_run, "check the class, and which particles have use = true")
    return head, series


def _images_of(file: records.ParticleFile, where: str, project: Path) -> Images | PatchStack:
    """The images of a particle file: its stack, or where there is none the raw images, out of which they are cut."""
    if file.raw is not None and (file.stack is None or not (project / file.stack).exists()):
        return _raw_patches(file, file.raw, where, project)
    if file.stack is None:
        raise InputError("the particles have no stack", where, "cut them out with emc_extract")
    stack = mrc.open_stack(project / file.stack)
    tilts = len(file.tilts.tilt)
    count = (1 + max(records.image_places(file), default=-1)) * tilts
    if any(p.image is not None for p in file.particles) and stack.shape[0] % tilts == 0:
        count = max(count, stack.shape[0])  # the stack of a selection has the images of others too
    want = (count, file.box, file.box)
    if stack.shape != want:
        raise InputError(f"holds {stack.shape} images, its particles ask for {want}", file.stack, "extract them again")
    if stack.pixel_size is not None and abs(stack.pixel_size / file.pixel_size - 1) > HEADER_TOLERANCE:
        what = f"has {stack.pixel_size:g} Å/px in its header, {where} says {file.pixel_size:g} Å/px"
        raise InputError(what, file.stack, "extract them again")
    return Images(stack, "extract them again")


def _raw_patches(file: records.ParticleFile, raw: records.RawImages, where: str, project: Path) -> PatchStack:
    """The images of a particle file, cut out of the raw ones when they are asked for."""
    path, remedy = project / raw.stack, "put the raw stack back, or extract the particles again"
    if not path.exists():
        raise InputError(f"is missing, and {where} has no other images", raw.stack, remedy)
    stack = mrc.open_stack(path)
    if stack.shape != raw.shape or raw_digest(stack) != raw.digest:
        raise InputError(f"is not the stack that the particles of {where} were cut from", raw.stack, remedy)
    return patch_stack(file, raw, stack.array.view(np.ndarray))


def raw_digest(stack: mrc.MrcImages) -> str:
    """SHA-256 of the middle row of every image as it is stored: of a large stack too in no time."""
    return hashlib.sha256(stack.array[:, stack.shape[1] // 2].tobytes()).hexdigest()


def need_halves(series: Sequence[Particles], set_or_run: str | Path) -> None:
    """Check before a long run that there will be two half maps.

    Raises:
        InputError: one of the halves has no images, or none with anything in it among those that are looked at.
    """
    for half in (1, 2):
        empty, blank = True, True
        for particles in series:
            mine = particles.use & (particles.half == half)
            images = torch.nonzero((particles.visible & particles.series.use) & mine[:, None])
            some = images[:: max(1, len(images) // SAMPLED_IMAGES)]
            empty = empty and not len(images)
            for index, tilt in some.tolist():
                image = particles.stack[particles.numbers(torch.tensor([index]), torch.tensor([tilt]))]
                blank = blank and bool(image.max() <= image.min())
        if empty or blank:
            what = "no images" if empty else "only images with no contrast at all"
            raise InputError(
                f"half {half} has {what}", set_or_run, "use more particles" if empty else "extract them again"
            )


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
    own, expected = stack.pixel_size, source.header_pixel_size or source.pixel_size
    if own is not None and abs(own / expected - 1) > HEADER_TOLERANCE:
        what = f"has {own:g} Å/px in its header, {named} {source.pixel_size:g} Å/px"
        raise InputError(what, source.stack, "correct the one that is wrong")
    return stack


class Images:
    """Images on disk by number, float32: what methods take as a stack.

    Args:
        stack: mapped.
        remedy: what to do about an image that is spoilt.
        blank: whether images that are the same everywhere may pass.

    Raises:
        InputError: when an image is asked for that has values which are not finite, or is blank and must not be.
    """

    def __init__(self, stack: mrc.MrcImages, remedy: str, blank: bool = True) -> None:
        self.stack, self.remedy, self.blank = stack, remedy, blank
        self.shape = stack.shape

    def __getitem__(self, number: int | NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.array(self.stack.array[number], dtype=np.float32)
        low, high = found.min(axis=(-2, -1)), found.max(axis=(-2, -1))  # NaN where there is one
        for spoilt, what in (
            (~np.isfinite(high - low), "values that are not finite"),
            (high <= low, "no contrast at all"),
        ):
            if spoilt.any() and not (self.blank and what.startswith("no")):
                which = np.atleast_1d(number)[np.atleast_1d(spoilt)][0]
                raise InputError(f"image {which} (from 0) has {what}", self.stack.path, self.remedy)
        return found

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them."""
        return self[np.arange(len(self.stack.array))].astype(dtype or np.float32)


def room_for_images(shape: tuple[int, int, int], memory: float, folder: str | Path) -> tuple[NDArray[Any], float]:
    """An array for filtered images, in memory or in a scratch file of a folder, and the bytes of memory left for the rest."""
    left = reconstruct.working_memory(memory)
    dtype, size = reconstruct.image_format(shape, left)
    if size:
        return np.empty(shape, dtype), left - size
    return np.memmap(tempfile.TemporaryFile(dir=folder), dtype, "w+", shape=shape), left


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


def mask_or_sphere(path: Path | None, box: int, pixel_size: float) -> Tensor:
    """The mask that was given, or the soft sphere that there is without one: (n, n, n) float32 in 0 ... 1."""
    if path is None:
        return soft_sphere(box, DEFAULT_MASK * box / 2, MASK_EDGE)
    return read_mask(path, box, pixel_size)


def write_average(
    outputs: Mapping[str, Path],
    maps: HalfMaps,
    average: Average,
    mask: Tensor,
    pixel_size: float,
    more: Mapping[str, Any] | None = None,
) -> None:
    """average.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.json, fsc.png and average.png of a run, each whole or not at all.

    Args:
        outputs: their checked paths by file name.
        more: what else fsc.json says.
    """
    from libemc.view import plots  # matplotlib takes half a second that only averages need

    volumes = {"half1.mrc": maps.half1, "half2.mrc": maps.half2, "mask.mrc": mask, "average.mrc": average.average}
    for name, volume in volumes.items():
        mrc.write_volume(outputs[name], volume.float().numpy(), pixel_size)
    table = average.fsc.table()
    write_text(outputs["fsc.json"], json.dumps(table | dict(more or {}), indent=1))
    curves = {name: values for name, values in table["curves"].items() if name != "randomised"}
    levels = {name: table["thresholds"][name] for name in ("0.143", "0.5")}
    plots.fsc_plot(outputs["fsc.png"], table["frequency"], curves, levels, average.resolution)
    plots.central_slices_plot(outputs["average.png"], average.average.numpy(), pixel_size)


AVERAGE_FILES = ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png")
"""What `write_average` writes into a run's folder."""


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a run's record holds them: paths as text, tuples as lists."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: one(value) for name, value in options.items()}


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
    content: dict[str, Any] = {
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


def save_run_particles(
    folder: Path, head: records.ParticleSet, series: Sequence[Particles], parent: str
) -> list[Particles]:
    """The particles of a run at their present poses, in `<run>/particles/`.

    Returns:
        The same particles, to the last bit as a resumed run reads them: angles are not matrices.
    """
    files = {p.file.name: p.to_file().model_copy(update={"parent": parent, "history": ()}) for p in series}
    own = head.model_copy(update={"parent": parent, "history": ()})
    records.save_particles(folder / "particles", own, files)
    return [Particles.of(files[p.file.name], p.stack) for p in series]
