#!/usr/bin/env python3
"""Align a tilt series, and reconstruct its tomogram.

The alignment needs nothing but the images and their nominal angles. Images that are dark, copies or unlike the others are
left out, and the record says why. Gold beads, or whatever else stands out, are followed through the tilts, and one
geometry is fitted to all; every tilt gets the error to be expected. Pictures are in tomograms/NAME_alignment. Without
--axis or an axis in the record the hand is open: the specimen may be its mirror image.
With --load nothing is aligned; the alignment in the record is used as it is. The tomogram's x, y and z are
those of the specimen: z along the beam at zero tilt, y along the tilt axis where that is nearer to the images' y, its
field that of the images. The contrast is the images' own. A picture of the central slices is written beside it.

A --region is written to a file of its own, NAME_binN_region.mrc, or NAME_binN_T.mrc with --tag T; --half adds _even and
_odd. --erase-beads takes the beads among the alignment's landmarks, and whatever looks like them.

    emc_tomogram TS_01 --bin 4                       # align, and reconstruct with voxels of four pixels
    emc_tomogram TS_01 --load --bin 8 --lowpass 60   # once more, with the alignment that the record has
    emc_tomogram --all --load --bin 4 --erase-beads --deconvolve --half
    emc_tomogram TS_01 --load --bin 2 --region=-800,200,0,900,-400,400 --tag nucleus
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Literal

from libemc import alignments, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import reconstruct
from libemc.methods.align import coarse
from libemc.methods.align.series import summary
from libemc.methods.erase import Beads
from libemc.methods.reconstruct import CtfCorrection, Grid, Weighting, binned_shape
from libemc.methods.subtilts import TiltGeometry
from libemc.project import Images, open_raw_stack, room_for_images
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
    what.add_argument("--refine", action="store_true", help="improve the alignment in the record first")
    what.add_argument("--align-only", action="store_true", help="align, and reconstruct nothing")
    parser.add_argument("--local-motion", action="store_true", help="also align smooth local motion, if it pays")
    options.axis(parser)
    options.thickness(parser)
    options.region(parser)
    lens = parser.add_mutually_exclusive_group()
    lens.add_argument("--ctf", choices=reconstruct.CTF_MODES, default="none", help="correction, at each tile's height")
    options.deconvolve(lens)
    options.snr_falloff(parser)
    parser.add_argument("--no-dose", action="store_true", help="no dose weighting, though the doses are known")
    options.lowpass(parser)
    options.erase_beads(parser)
    options.tag(parser)
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
        if args.align_only:
            run.result(f"{record.name}: {summary(record)}")
            continue
        whole = [j for j, use in enumerate(record.tilts.use) if use]
        for suffix, half in HALVES.items():
            if half is None or args.half:
                made = tomogram(record, stack, whole if half is None else whole[half - 1 :: 2], suffix, args, run)
                records.update(path, partial(reconstruct.with_tomogram, made=made), TiltSeriesRecord)
        z, y, x = made.shape
        voxels = f"{x} x {y} x {z} voxels of {made.pixel_size:g} Å from {len(whole)} tilts"
        run.result(f"{record.name}: {voxels}, {summary(record)}")


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
        record = alignments.reconsidered(record)
        record = record.model_copy(update={"alignment": coarse.nominal(record, axis or 0.0)})
    run.input(record.source.stack)
    stack = open_raw_stack(record)
    if sum(record.tilts.use) < coarse.LEAST_IMAGES:
        raise InputError(f"only {sum(record.tilts.use)} tilts are used", path, "include more of them")
    correction(record, args)
    for suffix, half in () if args.align_only else HALVES.items():
        if half is None or args.half:
            run.output(target(record, suffix, args))
            run.output(target(record, suffix, args).with_suffix(".png"))
    return record, stack


def target(record: TiltSeriesRecord, suffix: str, args: argparse.Namespace) -> Path:
    """The tomogram's file; that of a part of the field never has the name of the whole."""
    tag = args.tag or ("region" if args.region else None)
    return Path("tomograms") / f"{record.name}_bin{args.binning}{f'_{tag}' if tag else ''}{suffix}.mrc"


def correction(record: TiltSeriesRecord, args: argparse.Namespace) -> CtfCorrection | None:
    """The correction for the CTF that was asked for; None for none."""
    mode = args.ctf if args.deconvolve is None else "deconvolve"
    return CtfCorrection.of(record, mode, args.deconvolve or 1.0, args.snr_falloff)


def estimate(record: TiltSeriesRecord, args: argparse.Namespace, run: Run) -> tuple[float, float, float]:
    """Seconds, bytes of memory and of disk for one tilt series."""
    grid = Grid.of(record, args.binning, args.thickness, args.region)
    count, copies = sum(record.tilts.use), 3 if args.half else 1
    seconds, memory = reconstruct.cost(grid, record.source.shape, count, args.binning, run.threads, run.memory)
    return copies * seconds, memory, copies * math.prod(grid.shape) * 4.0


def aligned(
    path: Path, record: TiltSeriesRecord, stack: mrc.MrcImages, args: argparse.Namespace, run: Run
) -> TiltSeriesRecord:
    """Align, and save that in the record."""
    axis = args.axis if args.axis is not None else record.source.tilt_axis
    base = records.need(record, "alignment") if args.refine else None
    return alignments.align(path, record, stack, axis, base, args.local_motion, run)


def tomogram(
    record: TiltSeriesRecord, stack: mrc.MrcImages, tilts: list[int], suffix: str, args: argparse.Namespace, run: Run
) -> Tomogram:
    """Reconstruct one tomogram from some of the tilts and write it with its picture."""
    grid = Grid.of(record, args.binning, args.thickness, args.region)
    weighting = Weighting.of(record, grid, tilts, not args.no_dose, args.lowpass, args.deconvolve is not None)
    geometry = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use).select(tilts)
    corrected, beads = correction(record, args), Beads.of(record, geometry, tilts, run.seed)
    if args.erase_beads and beads is None:
        run.warn(f"{record.name}: the alignment has no beads among its landmarks; none are erased")
    clean = partial(beads.erase, pixel_size=grid.pixel_size) if beads and args.erase_beads else None
    images, left = room_for_images(
        (len(tilts), *binned_shape(record.source.shape, args.binning)), run.memory, "tomograms"
    )
    name, raw = record.name + suffix, Images(stack, f"exclude that tilt in {records.tiltseries_path(record.name)}")
    prepared = reconstruct.prepare_images(
        lambda j: raw[tilts[j]], geometry, args.binning, grid.pixel_size, weighting, images, clean
    )
    for _ in run.progress(prepared, len(tilts), f"{name}: images"):
        pass
    if not images.any():
        raise InputError("no used image has any contrast", record.source.stack, "check the file, and import it again")
    file = run.output(target(record, suffix, args))
    pictures = CentralSlices(grid.shape)
    slabs = reconstruct.reconstruct(images, geometry, grid, corrected and corrected.select(tilts), left, run.device)
    with mrc.VolumeWriter(file, grid.shape, grid.pixel_size) as writer:
        for y0, slab in run.progress(slabs, None, f"{name}: rows"):
            writer.write_rows(y0, slab)
            pictures.add(y0, slab)
    central_slices_png(pictures, run.output(file.with_suffix(".png")), f"{name}, {grid.pixel_size:g} Å/voxel")
    done = [*(["beads erased"] if clean else []), *weighting.corrections, *([corrected.words] if corrected else [])]
    return reconstruct.tomogram_entry(file, grid, done, HALVES[suffix])


program = Program(
    doc=__doc__, name="emc_tomogram", arguments=arguments, main=main,
    standard=("threads", "device", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
