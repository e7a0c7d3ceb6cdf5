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
_odd. With --turn the volume's axes are turned about its middle: what lies in the specimen as a particle of these angles
stands upright. --erase-beads takes the beads among the alignment's landmarks, and whatever looks like them.

    emc_tomogram TS_01 --bin 4                       # align, and reconstruct with voxels of four pixels
    emc_tomogram TS_01 --load --bin 8 --lowpass 60   # once more, with the alignment that the record has
    emc_tomogram --all --load --bin 4 --erase-beads --deconvolve --half
    emc_tomogram TS_01 --load --bin 2 --region=-800,200,0,900,-400,400 --turn 0,25,-40 --tag nucleus
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from libemc import alignments, records, tomograms
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import reconstruct
from libemc.methods.align import coarse
from libemc.methods.align.series import summary
from libemc.project import open_raw_stack
from libemc.records import TiltSeriesRecord


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
    options.turn(parser)
    lens = parser.add_mutually_exclusive_group()
    lens.add_argument("--ctf", choices=reconstruct.CTF_MODES, default="none", help="correction, at each tile's height")
    options.deconvolve(lens)
    options.snr_falloff(parser)
    options.no_dose(parser)
    options.lowpass(parser)
    options.erase_beads(parser)
    options.tag(parser)
    parser.add_argument("--half", action="store_true", help="also tomograms of every other tilt: _even and _odd")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check all tilt series, then align and reconstruct one after the other."""
    paths = run.tiltseries(args)
    lens = args.ctf if args.deconvolve is None else "deconvolve"
    what = tomograms.Wanted(
        args.binning, args.thickness, args.region, args.turn, args.tag, lens, args.deconvolve or 1.0, args.snr_falloff,
        not args.no_dose, args.lowpass, args.erase_beads, args.half)  # fmt: skip
    series = [(path, *checked(records.load_tiltseries(path), what, args, run)) for path in paths]
    if args.align_only:
        done = run.plan(f"align {len(series)} tilt series")
    else:
        costs = [tomograms.cost(record, what, run) for _, record, _ in series]
        plan = f"reconstruct {len(series)} tomograms at bin {args.binning}"
        done = run.plan(plan, sum(c[0] for c in costs), max(c[1] for c in costs), sum(c[2] for c in costs))
    if done:
        return
    for path, record, stack in series:
        if not args.load:
            record = aligned(path, record, stack, args, run)
        if args.align_only:
            run.result(f"{record.name}: {summary(record)}")
            continue
        for made in tomograms.make(record, stack, what, run):
            records.update(path, partial(reconstruct.with_tomogram, made=made), TiltSeriesRecord)
        z, y, x = made.shape
        voxels = f"{x} x {y} x {z} voxels of {made.pixel_size:g} Å from {sum(record.tilts.use)} tilts"
        run.result(f"{record.name}: {voxels}, {summary(record)}")


def checked(
    record: TiltSeriesRecord, what: tomograms.Wanted, args: argparse.Namespace, run: Run
) -> tuple[TiltSeriesRecord, mrc.MrcImages]:
    """The record, with the nominal geometry where nothing is aligned yet, and its stack; nothing that follows may fail."""
    path, count = records.tiltseries_path(record.name), len(record.tilts.use)
    if count < coarse.LEAST_IMAGES:
        what = f"holds {count} image{'s' * (count > 1)}, a tomogram needs {coarse.LEAST_IMAGES} at least"
        raise InputError(what, path, "name other tilt series")
    if args.load or args.refine:
        if args.axis is not None:
            raise InputError("--axis has no meaning with --load and --refine", remedy="leave it out")
        if args.load and args.local_motion:
            raise InputError("--local-motion has no meaning with --load", remedy="leave it out, or give --refine")
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
    what.correction(record)
    for suffix in () if args.align_only else what.suffixes:
        run.output(what.target(record, suffix))
        run.output(what.target(record, suffix).with_suffix(".png"))
    return record, stack


def aligned(
    path: Path, record: TiltSeriesRecord, stack: mrc.MrcImages, args: argparse.Namespace, run: Run
) -> TiltSeriesRecord:
    """Align, and save that in the record."""
    axis = args.axis if args.axis is not None else record.source.tilt_axis
    base = records.need(record, "alignment") if args.refine else None
    return alignments.align(path, record, stack, axis, base, args.local_motion, run)


program = Program(
    doc=__doc__, name="emc_tomogram", arguments=arguments, main=main,
    standard=("threads", "device", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
