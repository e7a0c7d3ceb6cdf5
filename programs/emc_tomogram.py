#!/usr/bin/env python3
"""Align a tilt series without markers, and reconstruct its tomogram.

The alignment is coarse: shifts by correlation of each image with what the others predict for it. With --load nothing is
aligned; the alignment in the record (imported, or of an earlier run) is used as it is. The tomogram's x, y and z are
those of the specimen: z along the beam at zero tilt, y along the tilt axis where that is nearer to the images' y, its
field that of the images. The contrast is the images' own. A picture of the central slices is written beside it.

    emc_tomogram TS_01 --bin 4                       # align, and reconstruct with voxels of four pixels
    emc_tomogram TS_01 --load --bin 8 --lowpass 60   # once more, with the alignment that the record has
    emc_tomogram --all --load --bin 4 --ctf wiener --half --thickness 2500
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from libemc import records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import reconstruct
from libemc.methods.align import coarse
from libemc.methods.reconstruct import CtfCorrection, Grid, Weighting, binned_shape
from libemc.methods.subtilts import TiltGeometry
from libemc.project import Images, open_raw_stack
from libemc.records import TiltSeriesRecord, Tomogram
from libemc.view.slices import CentralSlices, central_slices_png

HALVES: dict[str, Literal[1, 2] | None] = {"": None, "_even": 1, "_odd": 2}
"""Suffix of each tomogram's name and its number in the record; halves take every other one of the used tilts."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.tiltseries_names(parser)
    options.binning(parser, default=4)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--load", action="store_true", help="use the alignment in the record as it is")
    what.add_argument("--refine", action="store_true", help="improve the shifts of the alignment in the record first")
    options.axis(parser)
    options.thickness(parser)
    options.region(parser)
    parser.add_argument(
        "--ctf", choices=reconstruct.CTF_MODES, default="none", help="correction, at each tile's height"
    )
    parser.add_argument("--no-dose", action="store_true", help="no dose weighting, though the doses are known")
    options.lowpass(parser)
    parser.add_argument("--half", action="store_true", help="also tomograms of every other tilt: _even and _odd")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check all tilt series, then align and reconstruct one after the other."""
    paths = run.tiltseries(args)
    series = [(path, *checked(records.load_tiltseries(path), args, run)) for path in paths]
    costs = [estimate(record, args, run) for _, record, _ in series]
    disk = sum(volume for _, _, volume in costs)
    plan = f"reconstruct {len(series)} tomograms at bin {args.binning}"
    if run.plan(plan, sum(c[0] for c in costs), max(c[1] for c in costs), disk):
        return
    for path, record, stack in series:
        if not args.load:
            record = aligned(path, record, stack, args, run)
        whole = [j for j, use in enumerate(record.tilts.use) if use]
        for suffix, half in HALVES.items():
            if half is None or args.half:
                made = tomogram(record, stack, whole if half is None else whole[half - 1 :: 2], suffix, args, run)
                records.update(path, partial(reconstruct.with_tomogram, made=made), TiltSeriesRecord)
        z, y, x = made.shape
        voxels = f"{x} x {y} x {z} voxels of {made.pixel_size:g} Å from {len(whole)} tilts"
        run.result(f"{record.name}: {voxels}, {coarse.summary(records.need(record, 'alignment'))}")


def checked(record: TiltSeriesRecord, args: argparse.Namespace, run: Run) -> tuple[TiltSeriesRecord, mrc.MrcImages]:
    """The record, with the nominal geometry where nothing is aligned yet, and its stack; nothing that follows may fail."""
    path = records.tiltseries_path(record.name)
    if args.load or args.refine:
        if args.axis is not None:
            raise InputError("--axis has no meaning with --load and --refine", remedy="leave it out")
        records.need(record, "alignment")
    elif record.alignment is not None and not run.overwrite:
        remedy = "give --load to reconstruct with it, --refine to improve it, or --overwrite to replace it"
        raise InputError("is aligned already", path, remedy)
    else:
        axis = args.axis if args.axis is not None else record.source.tilt_axis
        record = record.model_copy(update={"alignment": coarse.nominal(record, axis or 0.0)})
    run.input(record.source.stack)
    stack = open_raw_stack(record)
    if sum(record.tilts.use) < coarse.LEAST_IMAGES:
        raise InputError(f"only {sum(record.tilts.use)} tilts are used", path, "include more of them")
    if record.alignment is not None and record.alignment.deformation is not None:
        run.warn(f"{record.name}: the alignment's local deformation is not applied")
    CtfCorrection.of(record, args.ctf)
    for suffix, half in HALVES.items():
        if half is None or args.half:
            run.output(target(record, suffix, args))
            run.output(target(record, suffix, args).with_suffix(".png"))
    return record, stack


def target(record: TiltSeriesRecord, suffix: str, args: argparse.Namespace) -> Path:
    """The tomogram's file."""
    return Path("tomograms") / f"{record.name}_bin{args.binning}{suffix}.mrc"


def estimate(record: TiltSeriesRecord, args: argparse.Namespace, run: Run) -> tuple[float, float, float]:
    """Seconds, bytes of memory and of disk for one tilt series."""
    grid = Grid.of(record, args.binning, args.thickness, args.region)
    count, copies = sum(record.tilts.use), 3 if args.half else 1
    seconds, memory = reconstruct.cost(grid, count, run.threads, run.memory / 2)
    images = count * math.prod(binned_shape(record.source.shape, args.binning)) * 4
    return copies * seconds, memory + min(images, run.memory / 2), copies * math.prod(grid.shape) * 4.0


def aligned(
    path: Path, record: TiltSeriesRecord, stack: mrc.MrcImages, args: argparse.Namespace, run: Run
) -> TiltSeriesRecord:
    """Align, and save that in the record."""
    source, use = record.source, record.tilts.use
    base = records.need(record, "alignment")
    if not args.refine and args.axis is None and source.tilt_axis is None:
        small = coarse.prepare(stack.array.__getitem__, source.shape, source.pixel_size, use, coarse.AXIS_SIZE)
        base = coarse.nominal(record, coarse.find_axis(small, record))
        run.warn(f"{record.name}: tilt axis found to be {base.axis[0]:.1f}°, or its opposite; better give --axis")
    images = coarse.prepare(stack.array.__getitem__, source.shape, source.pixel_size, use)
    if images.blank:
        run.warn(f"{record.name}: images {images.blank} are blank; exclude them")
    found = coarse.align(images, base, first_pass=not args.refine)
    records.update(path, lambda old: old.model_copy(update={"alignment": found}), TiltSeriesRecord)
    return record.model_copy(update={"alignment": found})


def tomogram(
    record: TiltSeriesRecord, stack: mrc.MrcImages, tilts: list[int], suffix: str, args: argparse.Namespace, run: Run
) -> Tomogram:
    """Reconstruct one tomogram from some of the tilts and write it with its picture."""
    grid = Grid.of(record, args.binning, args.thickness, args.region)
    weighting = Weighting.of(record, grid, tilts, not args.no_dose, args.lowpass)
    geometry = reconstruct.select(TiltGeometry.of(records.need(record, "alignment"), record.tilts.use), tilts)
    correction = CtfCorrection.of(record, args.ctf)
    images = room((len(tilts), *binned_shape(record.source.shape, args.binning)), run)
    name, raw = record.name + suffix, Images(stack, f"exclude that tilt in {records.tiltseries_path(record.name)}")
    prepared = reconstruct.prepare_images(
        lambda j: raw[tilts[j]], geometry, args.binning, grid.pixel_size, weighting, images
    )
    for _ in run.progress(prepared, len(tilts), f"{name}: images"):
        pass
    if not images.any():
        raise InputError("no used image has any contrast", record.source.stack, "check the file, and import it again")
    file = run.output(target(record, suffix, args))
    pictures = CentralSlices(grid.shape)
    slabs = reconstruct.reconstruct(
        images, geometry, grid, correction and correction.select(tilts), run.memory / 2, run.device
    )
    with mrc.VolumeWriter(file, grid.shape, grid.pixel_size) as writer:
        for y0, slab in run.progress(slabs, None, f"{name}: rows"):
            writer.write_rows(y0, slab)
            pictures.add(y0, slab)
    central_slices_png(pictures, run.output(file.with_suffix(".png")), f"{name}, {grid.pixel_size:g} Å/voxel")
    done = [*weighting.corrections, *([f"ctf {args.ctf}"] if correction else [])]
    return reconstruct.tomogram_entry(file, grid, done, HALVES[suffix])


def room(shape: tuple[int, int, int], run: Run) -> np.ndarray:
    """An array for the filtered images: in half of the memory, in half precision if need be, else in a scratch file."""
    for dtype in (np.float32, np.float16):
        if math.prod(shape) * np.dtype(dtype).itemsize <= run.memory / 2:
            return np.empty(shape, dtype)
    return np.memmap(tempfile.TemporaryFile(dir="tomograms"), np.float16, "w+", shape=shape)


program = Program(
    doc=__doc__, name="emc_tomogram", arguments=arguments, main=main,
    standard=("threads", "device", "memory", "overwrite", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
