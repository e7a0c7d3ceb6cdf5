#!/usr/bin/env python3
"""Bring raw tilt series into the project, and what other packages found out about them.

Raw stacks are MRC files; .rawtlt, .tlt and .mdoc files beside a stack with the same stem are found by themselves. The
stack stays where it is unless --copy or --link puts it into tiltseries/. Images that can't be used (dark, constant, not
finite, copies of another) keep their place and are marked. Without an .mdoc the voltage is 300 kV. A micrograph is a
series of one image: enough for emc_tomoctf.

    emc_import raw/TS_01.mrc raw/TS_02.mrc --dose 3 --axis 85.3
    emc_import raw/TS_01.mrc --rawtlt angles.txt --pixel-size 2.7 --dose 3 --dose-order sequential
    emc_import micrographs/*.mrc --tilt-start 0           # single micrographs
    emc_import --alignment TS_01.xf TS_01.tlt TS_01       # or .aln, RELION's STAR, JSON, a simulator's truth
    emc_import --picks ribo.star --label ribo TS_01       # or .csv, .mod, .tbl, JSON
    emc_import --particles matching_optimisation_set.star --set ribo     # RELION 5 or Warp; or 2-D particles of RELION 3.1
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from libemc import records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.interchange import particles as incoming
from libemc.interchange import series
from libemc.methods import import_series

KINDS = {
    "stacks": {field.name for field in fields(series.Told)},
    "alignment": {"alignment"},
    "picks": {"picks", "label", "class_numbers", "tomogram"},
    "particles": {"particles", "set_name", "symmetry", "tomograms", "hand"},
}
"""What can be imported, and the options that go with it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument(
        "names", nargs="*", metavar="STACK|NAME", help="raw stacks; with --alignment or --picks, tilt series"
    )
    raw = parser.add_argument_group("raw stacks")
    raw.add_argument("--rawtlt", type=Path, metavar="F", help="file of tilt angles, one for each image")
    raw.add_argument("--mdoc", type=Path, metavar="F", help="SerialEM's .mdoc of the stack")
    raw.add_argument("--tilt-start", type=options.number, metavar="A", help="angle of the first image in degrees")
    raw.add_argument("--tilt-step", type=options.number, metavar="S", help="angle from image to image in degrees")
    options.pixel_size(raw)
    raw.add_argument("--ignore-header", action="store_true", help="take --pixel-size where the header says otherwise")
    options.voltage(raw, default=None)
    options.cs(raw)
    options.amplitude_contrast(raw)
    options.axis(raw)
    options.dose(raw)
    raw.add_argument("--dose-order", metavar="O", help="order of exposure: sequential, dose-symmetric, or a file that lists "
                     "each image's place or the angles in the order of exposure")  # fmt: skip
    options.contrast(raw)
    place = raw.add_mutually_exclusive_group()
    for way in ("copy", "link"):
        place.add_argument(f"--{way}", dest="place", action="store_const", const=way, default="",
                           help=f"{way} the stack into tiltseries/")  # fmt: skip
    other = parser.add_argument_group("from other packages")
    other.add_argument("--alignment", nargs="+", type=Path, metavar="F", help="alignment files, a CTF file if need be")
    other.add_argument("--picks", type=Path, metavar="F", help="file of coordinates")
    options.label(other)
    options.class_numbers(other)
    other.add_argument("--tomogram", type=Path, metavar="MAP", help="tomogram that coordinates in pixels refer to")
    options.particles(other)
    options.set_name(other)
    options.symmetry(other)
    other.add_argument("--tomograms", type=Path, metavar="F", help="tomograms.star of the particles, if not found")
    other.add_argument("--hand", choices=("auto", "kept", "mirrored"), default="auto",
                       help="of the particles' geometry; auto mirrors what Warp wrote")  # fmt: skip


def main(args: argparse.Namespace, run: Run) -> None:
    """Find out what is to be imported, and whether all options are about that."""
    kinds = [kind for kind in KINDS if getattr(args, kind, None) is not None]
    if len(kinds) > 1:
        raise InputError(f"--{kinds[0]} and --{kinds[1]} at once", remedy="import one after the other")
    kind = kinds[0] if kinds else "stacks"
    defaults = vars(program.parser().parse_all([]))
    given = {name for name, value in vars(args).items() if value != defaults[name]}
    foreign = given & (set().union(*KINDS.values()) - KINDS[kind])
    if foreign:
        option = sorted(foreign)[0].removesuffix("_name").removesuffix("_numbers").replace("place", args.place)
        raise InputError(f"--{option.replace('_', '-')} has no meaning for {kind}", remedy="leave it out")
    {"stacks": stacks, "particles": particles}.get(kind, sections)(args, run)


def stacks(args: argparse.Namespace, run: Run) -> None:
    """Check all stacks, look at all images, then write the records."""
    if not args.names:
        raise InputError("nothing to import", remedy="give raw stacks, --alignment, --picks or --particles")
    if len(args.names) > 1 and (args.rawtlt or args.mdoc):
        raise InputError("one file of angles for several stacks", remedy="put one beside each stack, with its stem")
    told = series.Told(**{name: getattr(args, name) for name in KINDS["stacks"]})
    found = series.raw_stacks([run.input(path) for path in dict.fromkeys(args.names)], told, run.project, run.overwrite)
    for each in found:
        for file in each.files:
            run.input(file)
        for text in each.warnings:
            run.warn(text)
        for path in each.writes:
            run.output(path)
    size = sum(each.images.array.nbytes for each in found)
    plan = f"look at {len(found)} stacks of {options.bytes_text(size)}"
    if run.plan(plan, disk=size if args.place == "copy" else None):
        return
    finished = [each.looked_at(run.progress) for each in found]
    for each, record in zip(found, finished, strict=True):
        each.save(record, link=args.place == "link", overwrite=run.overwrite)
        run.result(import_series.summary(record))


def sections(args: argparse.Namespace, run: Run) -> None:
    """Alignments, or picks, of tilt series that the project has."""
    if args.alignment and not args.names and len(args.alignment) > 1:
        args.names = [str(args.alignment.pop())]  # the last word after --alignment is the tilt series
    if args.picks and args.label is None:
        raise InputError("--picks without --label", remedy="name the picks with --label")
    given = [run.input(path) for path in args.alignment or [args.picks]]
    if len(args.names) > 1 and {path.suffix for path in given} != {".star"}:
        raise InputError("one file for several tilt series", given[0], "only a STAR file may hold several")
    tomogram = args.tomogram and run.input(args.tomogram)
    paths = run.tiltseries(argparse.Namespace(names=args.names, all=False))
    if args.alignment:
        changes = series.alignment_changes(given, paths, run.overwrite)
    else:
        changes = series.picks_changes(given[0], paths, args.label, args.class_numbers, tomogram, run.overwrite)
    if run.plan(f"import what {given[0]} says of {len(changes)} tilt series"):
        return
    for path, change in changes.items():
        for text in change.warnings:
            run.warn(text)
        records.update(path, change.apply, records.TiltSeriesRecord)
        run.result(change.line)


def particles(args: argparse.Namespace, run: Run) -> None:
    """A particle set with its images."""
    if args.set_name is None or args.names:
        raise InputError("--particles wants --set and no other names", remedy="name the set with --set")
    path, folder = run.input(args.particles), Path("particles") / args.set_name
    tomograms = args.tomograms and run.input(args.tomograms)
    found = incoming.incoming_particles(path, args.set_name, tomograms, args.hand, args.symmetry, run.progress)
    head = incoming.common_head(found, path)
    scale = import_series.float16_scale(sample for each in found for sample in each.samples())
    run.output(folder / "particles.json")
    targets = [run.output(folder / f"{each.file.name}.mrcs") for each in found]
    images = sum(each.images for each in found)
    if run.plan(f"import {images} images of {head.box}²", disk=images * head.box**2 * 2):
        return
    for line in incoming.write_set(found, targets, folder, head, scale, run.progress):
        run.result(line)


program = Program(
    doc=__doc__, name="emc_import", arguments=arguments, main=main,
    standard=("overwrite", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
