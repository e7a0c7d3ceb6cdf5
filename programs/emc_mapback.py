#!/usr/bin/env python3
"""Place averages back at the poses of their particles, as they are in the tomogram, and look at who is next to whom.

Of each tilt series (all of the run's, unless some are named) it writes into mapback/: NAME.mrc, the sum of the map at all
poses (NAME_class1.mrc, ... of several maps); NAME.cxc, which shows it with the tomogram in ChimeraX; NAME.star, a particle list
of RELION's kind in pixels of the volume, which ArtiaX opens; NAME.png, a picture from above and from the front; and
NAME_neighbours.json and .png, of each particle the nearest neighbour, its distance, its direction as the particle sees it, and
the angle between both, beside what chance would give. With --mesh NAME.glb holds a surface for each particle, with --colour score
NAME.cmm a marker.

The volume has the voxels of --like, else those of the coarsest tomogram in the record, else --pixel-size over the field of the
images (without one, bin 4 or coarser). All files have one frame: Å from the volume's first voxel.

    emc_mapback spt_00                                     # all tilt series of a run, with its average
    emc_mapback spt_00 TS_01 --colour score --mesh
    emc_mapback cls_00 TS_01 TS_02 --class 1,2             # each class with its own class_K.mrc
    emc_mapback ribo --average emd_3228.mrc --pixel-size 12 --path where
"""

from __future__ import annotations

import argparse
from pathlib import Path

from libemc import project
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.mapbacks import plan, results


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    parser.add_argument("series", nargs="*", metavar="NAME", help="tilt series of it (default: all)")
    options.class_numbers(parser)
    parser.add_argument("--average", type=Path, action="append", metavar="MAP",
                        help="the map, white; again for each further class (default: the run's own)")  # fmt: skip
    parser.add_argument("--no-mask", action="store_true", help="place all of the map, not the particle alone")
    parser.add_argument("--like", type=Path, metavar="TOMOGRAM", help="take the voxels of this tomogram")
    options.pixel_size(parser)
    parser.add_argument("--colour", choices=("class", "score", "series"), default="class", help="what colours show")
    parser.add_argument("--mesh", action="store_true", help="write a scene of surfaces too")
    parser.add_argument("--within", type=options.positive, metavar="A",
                        help="draw neighbours within so many Å (default: two diameters)")  # fmt: skip
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check all tilt series, then do one after the other."""
    inputs = [run.particles(args.set_or_run)]
    head, series = plan.open_particles(args.set_or_run, args.series, args.class_numbers)
    if args.like and (len(series) > 1 or args.pixel_size):
        raise InputError("is of one tilt series, and has its own pixel size", "--like", "name one, and no --pixel-size")
    classes = sorted({int(k) for placed in series.values() for k in placed.classes})
    maps = plan.maps_of(args.set_or_run, args.average or (), classes, run)
    folder = args.path or Path(plan.FOLDER)
    wanted = plan.Wanted(
        maps, not args.no_mask, args.like, args.pixel_size, args.colour, args.mesh, args.within, folder
    )
    cuts, todo = plan.cut_maps(wanted), []
    for name, placed in series.items():
        todo.append(plan.placement(placed, plan.record_of(name, wanted, run), wanted, cuts, run))
        if len(todo[-1].placed.ids) < len(placed.ids):
            run.warn(f"{name}: {len(placed.ids) - len(todo[-1].placed.ids)} particles lie outside the volume")
    inside = {one.name: one.placed for one in todo}
    colours = plan.colours_of(inside, wanted)
    written = run.output(folder / "run.json")
    for placed in inside.values():
        for file in wanted.files(placed):
            run.output(file)
    count, (disk, memory) = (
        sum(len(placed.ids) for placed in inside.values()),
        results.cost(todo, wanted, run.memory, run.threads),
    )
    if run.plan(f"place {count} particles in {len(todo)} tilt series", memory=memory, disk=disk):
        return
    names = ("set_or_run", "class_numbers", "average", "no_mask", "like", "pixel_size", "colour", "mesh", "within")
    used = project.plain({key: getattr(args, key) for key in names if key != "average"})
    used |= {"average": [str(maps[k]) for k in classes]}
    inputs += sorted(set(maps.values()))
    results.save_record(written, used, {}, inputs, run)
    for one in todo:
        told = results.write(one, head, wanted, cuts, colours[one.name], run)
        results.save_record(written, used, {one.name: told}, inputs, run)
        run.result(results.line(one.name, told))


program = Program(
    doc=__doc__,
    name="emc_mapback",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
