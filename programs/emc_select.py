#!/usr/bin/env python3
"""Make a particle set of others, or picks of picks: joined, filtered, rid of duplicates, split.

SET... are particle sets or runs; the new set has their particles with the poses, classes and scores that they have there,
and reads the images where they are already. What is asked is asked of each tilt series, in the order of the options below.
Of a particle that is in several sets (the same id, cut at the same place) the last set counts; particles that are different
and have one id get new ones, and the old one as their parent. Particles that are not used are left out. With --label, it is
the picks of that label in the records of tilt series that are selected, and get another label with --to.

    emc_select spt_00 --set good --score-above 0.2 --distance 120
    emc_select cls_00 --class 1,3 --set good                   # particles of two classes
    emc_select cls_00 --drop-class 2 --set good                # of all but one
    emc_select ribo_a ribo_b --set ribo --distance 120         # two sets as one, duplicates removed
    emc_select ribo --set part --split 4                       # part_1 to part_4, at random
    emc_select --label match --to ribo --z-above 6 --region=-2000,2000,-2000,2000,-300,300
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from libemc import records, selections
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.methods import select

OF_SETS = ("set_or_run", "set_name", "class_numbers", "drop_class", "min_tilts", "split")
OF_PICKS = ("label", "to", "margin_above")
"""Arguments that only the one or the other have a meaning for."""


def least_and_most(text: str) -> tuple[int, int | None]:
    """MIN or MIN,MAX: whole numbers."""
    values = options.integers(text)
    if len(values) > 2 or values[0] < 0 or values[0] > values[-1]:
        raise argparse.ArgumentTypeError(f"'{text}' is not MIN or MIN,MAX with 0 <= MIN <= MAX")
    return values[0], values[1] if len(values) == 2 else None


def parts(text: str) -> int | Literal["class"]:
    """A number of parts, 2 or more, or `class`."""
    if text == "class":
        return "class"
    value = options.integer(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not 2 or more, nor class")
    return value


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser, nargs="*")
    options.set_name(parser)
    options.label(parser)
    parser.add_argument("--to", type=options.label_name, metavar="L", help="label for the picks that are selected")
    parser.add_argument("--tilt-series", nargs="+", metavar="NAME", help="only these tilt series (default: all)")
    what = parser.add_argument_group("what is asked, in this order")
    classes = what.add_mutually_exclusive_group()
    options.class_numbers(classes)
    classes.add_argument("--drop-class", type=options.integers, metavar="K", help="class to leave out, or several: 1,3")
    for value in ("score", "z-value", "margin"):
        name = value.removesuffix("-value")
        what.add_argument(f"--{name}-above", type=options.number, metavar="X", help=f"{value}s above this")
        if name == "score":
            what.add_argument("--score-below", type=options.number, metavar="X", help="scores below this")
    options.region(what)
    what.add_argument(
        "--min-tilts", type=options.count, metavar="N", help="particles seen in so many used tilts or more"
    )
    options.distance(what)
    what.add_argument("--neighbours", type=least_and_most, metavar="MIN[,MAX]",
                      help="particles with so many others within --neighbour-distance")  # fmt: skip
    what.add_argument("--neighbour-distance", type=options.positive, metavar="A", help="how far neighbours are, in Å")
    best = what.add_mutually_exclusive_group()
    best.add_argument("--best", type=options.count, metavar="N", help="the best-scoring N of each tilt series")
    best.add_argument("--best-fraction", type=options.fraction, metavar="F",
                      help="the best-scoring part of each tilt series, from 0 to 1")  # fmt: skip
    parser.add_argument("--split", type=parts, metavar="N|class",
                        help="several sets: N at random, S_1 ..., even in tilt series and halves; or one a class")  # fmt: skip


def main(args: argparse.Namespace, run: Run) -> None:
    """Find out whether it is sets or picks, and whether all options are about that."""
    if bool(args.set_or_run) == (args.label is not None):
        raise InputError("give particle sets, or picks with --label, one of the two", remedy=f"see {run.name} --help")
    foreign, kind = (OF_PICKS, "particles") if args.set_or_run else (OF_SETS, "picks")
    for name in foreign:
        if getattr(args, name) not in (None, []):
            option = selections.option(name.removesuffix("_name"))
            raise InputError(f"{option} has no meaning for {kind}", remedy="leave it out")
    if (args.neighbours is None) != (args.neighbour_distance is None):
        raise InputError("--neighbours and --neighbour-distance need each other", remedy="give both or neither")
    asked = {name: getattr(args, name) for name in vars(select.Criteria())}
    if args.neighbours is not None:
        asked["neighbours"] = (*args.neighbours, args.neighbour_distance)
    (sets if args.set_or_run else picks)(args, select.Criteria(**asked), run)


def sets(args: argparse.Namespace, criteria: select.Criteria, run: Run) -> None:
    """Select particles and write the sets."""
    if args.set_name is None:
        raise InputError("the new set has no name", remedy="name it with --set")
    heads = [run.particles(name) for name in args.set_or_run]
    found = selections.Sets.open(list(dict.fromkeys(args.set_or_run)), args.tilt_series)
    chosen, lines = found.select(criteria)
    new = {args.set_name: chosen}
    if args.split is not None:
        new = {args.set_name + suffix: part for suffix, part in select.split(chosen, args.split, run.seed).items()}
    images = 0
    for name, part in new.items():
        folder = Path("particles") / name
        if any(head.parent.resolve() == folder.resolve() for head in heads):
            raise InputError(f"{name} is one of the sets to select from", remedy="give the new set a name of its own")
        head = run.output(folder / "particles.json")
        for series, joined in part.items():
            if found.needs_stack(series, joined):
                run.output(folder / f"{series}.mrcs", owned=not head.exists())
                images += len(joined.source) * len(joined.file.tilts.tilt)
    box = found.head(args.set_name).box
    count = sum(len(joined.source) for joined in chosen.values())
    if run.plan(f"select {count} particles, copy {images} images of {box}²", disk=images * box**2 * 2):
        return
    if found.mixed_symmetry():
        run.warn("the sets differ in symmetry: the new one is c1")
    for name, part in new.items():
        found.write(Path("particles") / name, part, run)
    for line in lines.values():
        run.result(line)
    for name, part in new.items():
        halves = [p.half for joined in part.values() for p in joined.file.particles]
        each = f"{halves.count(1)} and {halves.count(2)} in the halves"
        run.result(f"particles/{name}: {len(halves)} particles of {len(part)} tilt series, {each}")


def picks(args: argparse.Namespace, criteria: select.Criteria, run: Run) -> None:
    """Select picks and write them into the records."""
    if args.to is None or args.to == args.label:
        raise InputError("the new picks have no label of their own", remedy="give them one with --to")
    named = argparse.Namespace(names=args.tilt_series or [], all=args.tilt_series is None)
    paths = run.tiltseries(named)
    if named.all:
        paths = [path for path in paths if args.label in records.load_tiltseries(path).picks]
    if not paths:
        raise InputError(f"no tilt series has picks labelled {args.label!r}", "info", "see emc_info NAME")
    chosen, lines = selections.select_picks(paths, args.label, args.to, criteria, run.overwrite)
    total = sum(len(found.xyz) for found in chosen.values() if found is not None)
    if run.plan(f"select {total} of the picks {args.label} of {len(paths)} tilt series"):
        return
    for path, found in chosen.items():
        selections.save_picks(path, args.to, found)
        run.result(lines[path])
    run.result(f"{args.to}: {total} picks of {len(paths)} tilt series")


program = Program(
    doc=__doc__, name="emc_select", arguments=arguments, main=main,
    standard=("memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
