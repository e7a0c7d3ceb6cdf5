#!/usr/bin/env python3
"""Find a known structure in tilt series: where it is, how it is turned, and how sure that is.

The template goes through the same projection, CTF, dose and noise as the specimen did. Every score becomes a z-value by what
decoys, maps of the template's spectrum with random phases, reach in the same specimen; the threshold is where so many
false picks are expected as --expected-false says. --resolution is the diameter / 7 unless given, at least 20 Å. What has
the template's size but not its shape is left out. Poses are refined on the tilt images. Several templates compete, and
picks say by how much theirs is better. Tilt series must be aligned, and should have a CTF. Picks go to the record,
pictures to tomograms/NAME_match.

With --volume a finished tomogram is searched, without a project; picks go to --output, which emc_import --picks reads.

    emc_tempmatch TS_01 --template ribosome.mrc --label ribo
    emc_tempmatch --all --template apoferritin.mrc --symmetry o --resolution 20
    emc_tempmatch TS_01 --template ribo=a.mrc groel=b.mrc --symmetry c1,d7 --region=-2000,2000,-2000,2000,-300,300
    emc_tempmatch --volume tomogram.mrc --wedge=-60,60 --template ribosome.mrc --output picks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from libemc import records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.matches import plan as plans
from libemc.matches import results, scene
from libemc.matches.plan import Plan
from libemc.methods.match.find import Wanted
from libemc.numerics.symmetry import symmetry_matrices
from libemc.project import Images, open_raw_stack
from libemc.records import TiltSeriesRecord

OF_SERIES = ("names", "all", "thickness", "no_dose")
OF_VOLUMES = ("output", "wedge", "contrast")
"""Arguments that only the one or the other have a meaning for."""


def two_angles(text: str) -> tuple[float, float]:
    """LOW,HIGH, degrees, LOW below HIGH."""
    values = options.numbers(text)
    if len(values) != 2 or not -90 <= values[0] < values[1] <= 90:
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW,HIGH from -90 to 90")
    return values[0], values[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.tiltseries_names(parser)
    parser.add_argument(
        "--template",
        nargs="+",
        required=True,
        metavar="[L=]MAP",
        help="what to look for, white; of several, L names each",
    )
    options.label(parser)
    options.symmetry(parser)
    options.mask(parser)
    number = {"type": options.positive}
    options.resolution(parser)
    parser.add_argument("--step", **number, metavar="DEG", help="between rotations (default: by size and resolution)")
    parser.add_argument(
        "--expected-false", **number, default=1.0, metavar="N", help="false picks to expect in a tomogram"
    )
    options.distance(parser)
    options.binning(parser)
    options.region(parser)
    options.thickness(parser)
    parser.add_argument("--tomogram-mask", type=Path, metavar="MAP", help="pick only where this tomogram is above 0.5")
    options.no_dose(parser)
    parser.add_argument("--volumes", action="store_true", help="write the volumes of scores and of rotations too")
    of_volume = parser.add_argument_group("a finished tomogram instead of tilt series")
    of_volume.add_argument("--volume", type=Path, metavar="MAP", help="tomogram to search")
    of_volume.add_argument("--wedge", type=two_angles, metavar="LOW,HIGH", help="tilts about y, degrees (default: all)")
    options.contrast(of_volume, default=None)
    options.output(of_volume)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, then search one tomogram after the other."""
    plan = planned(args, run)
    if args.volume:
        in_volume(args, plan, run)
        return
    paths = run.tiltseries(args)
    series = [(path, *checked(records.load_tiltseries(path), plan, run)) for path in paths]
    needs = [scene.cost(record, plan, run) for _, record, _ in series]
    what = f"look for {', '.join(w.label for w in plan.wishes)} in {len(series)} tilt series"
    if run.plan(what, sum(n[0] for n in needs), max(n[1] for n in needs)):
        return
    total = 0
    for path, record, stack in series:
        place = scene.scene_of(record, stack, plan, run)
        raw = Images(stack, f"exclude that tilt in {path}")
        found = results.match(place, plan, Path("tomograms") / f"{record.name}_match", run, record, raw)
        records.update(
            path, lambda old, found=found: old.model_copy(update={"picks": {**old.picks, **found}}), TiltSeriesRecord
        )
        for label, picks in found.items():
            total += len(picks.xyz)
            run.result(results.summary(record.name, label, picks))
    if not total:
        remedy = "look at the pictures of the scores in tomograms; try another --resolution, or another template"
        raise InputError("no pick reaches the threshold", remedy=remedy)


def planned(args: argparse.Namespace, run: Run) -> Plan:
    """The search that is asked for, its maps read."""
    given = [name for name in (OF_SERIES if args.volume else OF_VOLUMES) if getattr(args, name)]
    if given:
        where = "with --volume" if args.volume else "without --volume"
        raise InputError(f"--{given[0].replace('_', '-')} has no meaning {where}", remedy="leave it out")
    wishes = plans.wishes(args.template, args.label, args.symmetry, args.mask)
    for wish in wishes:
        symmetry_matrices(wish.symmetry)
    for file in filter(None, [*(w.file for w in wishes), args.mask, args.tomogram_mask]):
        run.input(file)
    wanted = Wanted(args.step, args.distance, args.expected_false, run.seed)
    return Plan.read(
        wishes, resolution=args.resolution, binning=args.binning, wanted=wanted, region=args.region, thickness=args.thickness,
        allowed=args.tomogram_mask, dose=not args.no_dose, volumes=args.volumes,
    )  # fmt: skip


def checked(record: TiltSeriesRecord, plan: Plan, run: Run) -> tuple[TiltSeriesRecord, mrc.MrcImages]:
    """The record and its stack; nothing that follows may fail for what a user could have known."""
    records.need(record, "alignment")
    for wish in plan.wishes:
        there = record.picks.get(wish.label)
        if there is not None and there.source != run.name and not run.overwrite:
            where = records.tiltseries_path(record.name)
            raise InputError(f"has picks of {wish.label!r} already", where, "give --overwrite, or another --label")
    if not any(record.tilts.use):
        raise InputError("no tilt is used", records.tiltseries_path(record.name), "include some of them")
    run.input(record.source.stack)
    scene.grid_of(record, plan)
    return record, open_raw_stack(record)


def in_volume(args: argparse.Namespace, plan: Plan, run: Run) -> None:
    """Search a finished tomogram."""
    if not args.output:
        raise InputError("--volume needs --output", remedy="name a JSON file for the picks")
    place = scene.scene_of_volume(run.input(args.volume), args.contrast or "dark", args.wedge, plan)
    target = run.output(args.output)
    if run.plan(f"look for {', '.join(w.label for w in plan.wishes)} in {args.volume}"):
        return
    found = results.match(place, plan, target.parent / f"{target.stem}_match", run)
    table = {"picks": {label: picks.model_dump(mode="json", exclude_none=True) for label, picks in found.items()}}
    write_text(target, json.dumps(table, indent=1))
    for label, picks in found.items():
        run.result(results.summary(place.name, label, picks))


program = Program(
    doc=__doc__, name="emc_tempmatch", arguments=arguments, main=main,
    standard=("threads", "device", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
