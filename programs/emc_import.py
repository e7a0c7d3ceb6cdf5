#!/usr/bin/env python3
"""Bring raw tilt series into the project, and what other packages found out about them.

Raw stacks are MRC files; .rawtlt, .tlt and .mdoc files beside a stack with the same stem are found by themselves. The
stack stays where it is unless --copy or --link puts it into tiltseries/. Images that can't be used (dark, constant, not
finite, copies of another) keep their place and are marked. Without an .mdoc the voltage is 300 kV.

    emc_import raw/TS_01.mrc raw/TS_02.mrc --dose 3 --axis 85.3
    emc_import raw/TS_01.mrc --rawtlt angles.txt --pixel-size 2.7 --dose 3 --dose-order sequential
    emc_import --alignment TS_01.xf TS_01.tlt TS_01       # or .aln, RELION's STAR, JSON, a simulator's truth
    emc_import --picks ribo.star --label ribo TS_01       # or .csv, .mod, .tbl, JSON
    emc_import --particles matching_optimisation_set.star --set ribo     # RELION 5 or Warp; or 2-D particles of RELION 3.1
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np

from libemc import interchange, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import files, mrc
from libemc.io.acquisition import Acquisition, read_acquisition
from libemc.io.detect import read_alignment
from libemc.methods import import_series
from libemc.methods.simulate import order_of_tilts
from libemc.records import TiltSeriesRecord

ORDERS = {"sequential": "continuous", "dose-symmetric": "dose-symmetric"}
DISTORTION = 0.01
"""Shear of an .xf from which on it is worth a warning: 1 % moves the edge of a 4k image by 20 pixels."""
KINDS = {
    "alignment": {"alignment"},
    "picks": {"picks", "label", "class_number", "tomogram"},
    "particles": {"particles", "set_name", "symmetry", "tomograms", "hand"},
}
"""The options that go with each thing that is not a raw stack."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("names", nargs="*", metavar="STACK|NAME", help="raw stacks; with --alignment or --picks, tilt series")
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
    raw.add_argument("--contrast", choices=("dark", "bright"), default="dark", help="of the specimen in the raw images")
    place = raw.add_mutually_exclusive_group()
    place.add_argument("--copy", action="store_true", help="copy the stack into tiltseries/")
    place.add_argument("--link", action="store_true", help="link the stack into tiltseries/")
    other = parser.add_argument_group("from other packages")
    other.add_argument("--alignment", nargs="+", type=Path, metavar="F", help="alignment files, and a CTF file if need be")
    other.add_argument("--picks", type=Path, metavar="F", help="file of coordinates")
    options.label(other)
    options.class_number(other)
    other.add_argument("--tomogram", type=Path, metavar="MAP", help="tomogram that coordinates in pixels refer to")
    options.particles(other)
    options.set_name(other)
    options.symmetry(other)
    other.add_argument("--tomograms", type=Path, metavar="F", help="tomograms.star of the particles, where it isn't found")
    other.add_argument("--hand", choices=("auto", "kept", "mirrored"), default="auto",
                       help="of the particles' geometry; auto mirrors what Warp wrote")  # fmt: skip


def main(args: argparse.Namespace, run: Run) -> None:
    """Find out what is to be imported, and whether all options are about that."""
    kinds = [kind for kind in KINDS if getattr(args, kind) is not None]
    if len(kinds) > 1:
        raise InputError(f"--{kinds[0]} and --{kinds[1]} at once", remedy="import one after the other")
    kind = kinds[0] if kinds else "stacks"
    others = set().union(*KINDS.values())
    standard = {"overwrite", "verbose", "quiet", "dry_run", "names"}
    defaults = vars(program.parser().parse_all([]))
    given = {name for name, value in vars(args).items() if value != defaults[name]} - standard
    foreign = given - KINDS[kind] if kind in KINDS else given & others
    if foreign:
        option = sorted(foreign)[0].removesuffix("_name").removesuffix("_number").replace("_", "-")
        raise InputError(f"--{option} has no meaning for {kind}", remedy="leave it out")
    {"stacks": stacks, "alignment": alignment, "picks": points, "particles": particles}[kind](args, run)


# ---------------------------------------------------------------------------------------------------------- raw stacks


def stacks(args: argparse.Namespace, run: Run) -> None:
    """Check all stacks, look at all images, then write the records."""
    if not args.names:
        raise InputError("nothing to import", remedy="give raw stacks, --alignment, --picks or --particles")
    if len(args.names) > 1 and (args.rawtlt or args.mdoc):
        raise InputError("one file of angles for several stacks", remedy="put one beside each stack, with its stem")
    found = [checked(run.input(path), args, run) for path in dict.fromkeys(args.names)]
    names = Counter(record.name for record, _ in found)
    if max(names.values()) > 1:
        raise InputError(f"two stacks are called {names.most_common(1)[0][0]}", remedy="rename one")
    for record, _ in found:
        run.output(records.tiltseries_path(record.name))
        if record.source.stack != record.source.origin:
            run.output(record.source.stack)
    size = sum(images.array.nbytes for _, images in found)
    if run.plan(f"look at {len(found)} stacks of {options.bytes_text(size)}", disk=size if args.copy else None):
        return
    looked_at = []
    for record, images in found:
        numbers = [import_series.image_statistics(image) for image in run.progress(images.array, label=record.name)]
        reasons = import_series.bad_images(numbers, record.tilts.nominal)
        if all(reasons):
            raise InputError(f"no image can be used: image 0 is {reasons[0]}", images.path, "check the file")
        looked_at.append(record.model_copy(update={"tilts": import_series.without_bad(record.tilts, reasons)}))
    for (record, images), finished in zip(found, looked_at, strict=True):
        if record.source.stack != record.source.origin:
            files.place(images.path, run.output(record.source.stack), link=args.link)
        records.save_new(run.output(records.tiltseries_path(record.name)), finished, overwrite=run.overwrite)
        run.result(import_series.summary(finished))


def checked(path: Path, args: argparse.Namespace, run: Run) -> tuple[TiltSeriesRecord, mrc.MrcImages]:
    """The record that a stack will get, all images used so far, and the stack, mapped."""
    name = path.stem
    try:
        info = records.tiltseries_path(options.label_name(name))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{error}", path, "rename the stack: its stem names the tilt series") from None
    if info.exists() and not run.overwrite:
        raise InputError("exists already", info, "use --overwrite to replace it and all that was found since")
    if (args.tilt_start is None) != (args.tilt_step is None):
        raise InputError("--tilt-start and --tilt-step go together", remedy="give both")
    if args.ignore_header and args.pixel_size is None:
        raise InputError("--ignore-header without --pixel-size", remedy="give the pixel size")
    images = mrc.open_stack(path, args.pixel_size if args.ignore_header else None)
    count = images.shape[0]
    if count < 2:
        raise InputError("holds one image", path, "give a stack with an image for each tilt")
    step = None if args.tilt_start is None else (args.tilt_start, args.tilt_step)
    seen = read_acquisition(path, count, args.rawtlt, args.mdoc, step)
    for file in seen.files:
        run.input(file)
    if seen.ignored:
        run.warn(seen.ignored)
    sizes = {"--pixel-size": args.pixel_size, str(path): images.pixel_size}
    if seen.mdoc and not args.ignore_header:
        sizes[f"the mdoc of {path}"] = seen.mdoc.pixel_size
    tilts = import_series.tilts_section(seen.nominal, *doses(args, run, seen))
    absolute = Path(os.path.abspath(path))
    origin = str(absolute.relative_to(run.project) if absolute.is_relative_to(run.project) else absolute)
    source = records.Source(
        stack=f"tiltseries/{path.name}" if args.copy or args.link else origin,
        shape=images.shape,
        pixel_size=import_series.same_pixel_size(sizes),
        voltage=args.voltage or (seen.mdoc and seen.mdoc.voltage) or 300.0,
        cs=args.cs,
        amplitude_contrast=args.amplitude_contrast,
        tilt_axis=args.axis if args.axis is not None or not seen.mdoc else seen.mdoc.tilt_axis,
        contrast=args.contrast,
        origin=origin,
    )
    return TiltSeriesRecord(name=name, source=source, tilts=tilts), images


def doses(
    args: argparse.Namespace, run: Run, seen: Acquisition
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None, np.ndarray | None]:
    """Order of exposure, dose of each exposure, and dose before each where the .mdoc says it: None where not known."""
    mdoc = seen.mdoc
    order, dose = (mdoc.order, mdoc.dose) if mdoc else (None, None)
    if args.dose_order in ORDERS:
        order = order_of_tilts(seen.nominal, ORDERS[args.dose_order])
    elif args.dose_order:
        listed = [row[0] for row in files.read_table(run.input(args.dose_order))]
        order = import_series.exposure_order(listed, seen.nominal)
    before = mdoc.dose_before if mdoc and args.dose is None and args.dose_order is None else None
    if args.dose is not None:
        dose = (args.dose,) * len(seen.nominal)
    if dose is None and before is None:
        run.warn("no doses are known: particles and tomograms will not be weighted by dose")
    elif order is None and before is None:
        run.warn("the order of exposure is taken for dose-symmetric; --dose-order says otherwise")
        order = order_of_tilts(seen.nominal)
    return order, dose, before


# ---------------------------------------------------------------------------------------------- from other packages


def named(args: argparse.Namespace, run: Run, files_given: list[Path]) -> list[Path]:
    """The records of the tilt series that something is imported for; a file of several tilt series serves them all."""
    if len(args.names) > 1 and {path.suffix for path in files_given} != {".star"}:
        raise InputError("one file for several tilt series", files_given[0], "only a STAR file may hold several")
    return run.tiltseries(argparse.Namespace(names=args.names, all=False))


def alignment(args: argparse.Namespace, run: Run) -> None:
    """Alignment, and CTF where it is said, of tilt series."""
    if not args.names and len(args.alignment) > 1:
        args.names = [str(args.alignment.pop())]  # the last word after --alignment is the tilt series
    given = [run.input(path) for path in args.alignment]
    found = []
    for path in named(args, run, given):
        record = records.load_tiltseries(path)
        if record.alignment is not None and not run.overwrite:
            raise InputError("has an alignment", path, "use --overwrite to replace it")
        source = record.source
        aligned, ctf = read_alignment(
            given, shape=source.shape[1:], pixel_size=source.pixel_size, nominal=np.array(record.tilts.nominal),
            name=record.name)  # fmt: skip
        if aligned.distortion > DISTORTION:
            run.warn(f"{record.name}: the transforms shear images by {aligned.distortion:.1%}, which is left out")
        if not any(interchange.with_alignment(record, aligned, ctf).tilts.use):
            raise InputError("leaves no tilt to use", given[0], "check that it belongs to the stack")
        found.append((path, aligned, ctf))
    if run.plan(f"import the alignment of {len(found)} tilt series"):
        return
    for path, aligned, ctf in found:
        new = records.update(path, lambda r, a=aligned, c=ctf: interchange.with_alignment(r, a, c), TiltSeriesRecord)
        lens = f"defocus {(ctf.defocus_u + ctf.defocus_v).mean() / 2:.0f} Å" if ctf else "no CTF"
        run.result(
            f"{new.name}: alignment of {sum(new.tilts.use)}/{len(new.tilts.use)} tilts, "
            f"{aligned.tilt.min():g} to {aligned.tilt.max():g} degrees, axis {np.median(aligned.axis):g}, {lens}"
        )


def points(args: argparse.Namespace, run: Run) -> None:
    """Positions, with angles where there are, as picks of a label."""
    if args.label is None:
        raise InputError("--picks without --label", remedy="name the picks with --label")
    given, tomogram = run.input(args.picks), args.tomogram and run.input(args.tomogram)
    found = []
    for path in named(args, run, [given]):
        record = records.load_tiltseries(path)
        if args.label in record.picks and not run.overwrite:
            raise InputError(f"has picks labelled {args.label}", path, "use --overwrite to replace them")
        found.append((path, interchange.incoming_picks(given, record, args.label, args.class_number, tomogram)))
    if run.plan(f"import the picks of {len(found)} tilt series"):
        return
    for path, picks in found:
        new = records.update(
            path, lambda r, p=picks: r.model_copy(update={"picks": {**r.picks, args.label: p}}), TiltSeriesRecord
        )
        run.result(f"{new.name}: {len(picks.xyz)} {args.label}, {'with' if picks.rot else 'without'} angles")


def particles(args: argparse.Namespace, run: Run) -> None:
    """A particle set with its images."""
    if args.set_name is None or args.names:
        raise InputError("--particles wants --set and no other names", remedy="name the set with --set")
    path, folder = run.input(args.particles), Path("particles") / args.set_name
    tomograms = args.tomograms and run.input(args.tomograms)
    incoming = interchange.incoming_particles(path, args.set_name, tomograms, args.hand, args.symmetry, run.progress)
    box, pixel_size = interchange.common_box(incoming, path)
    scale = import_series.float16_scale(sample for each in incoming for sample in each.samples())
    run.output(folder / "particles.json")
    stacks_out = {each.file.name: run.output(folder / f"{each.file.name}.mrcs") for each in incoming}
    images = sum(len(each.file.particles) * len(each.file.tilts.tilt) for each in incoming)
    if run.plan(f"import {images} images of {box}²", disk=images * box**2 * 2):
        return
    done = {}
    for each in incoming:
        file = each.file.model_copy(update={"stack": str(stacks_out[each.file.name])})
        with mrc.StackWriter(stacks_out[file.name], pixel_size, "float16") as writer:
            for block in run.progress(each.blocks(scale), len(file.particles), file.name):
                writer.append(block)
        done[file.name] = file
        seen = sum(sum(p.visible) for p in file.particles) / len(file.particles)
        run.result(f"{file.name}: {len(file.particles)} particles, {seen:.1f} tilts each, box {box} at {pixel_size:g} Å")
    head = records.ParticleSet(set=args.set_name, box=box, pixel_size=pixel_size, symmetry=args.symmetry)
    records.save_particles(folder, head, done)


program = Program(
    doc=__doc__,
    name="emc_import",
    arguments=arguments,
    main=main,
    standard=("overwrite", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
