#!/usr/bin/env python3
"""Find out how the particles of a set differ: the axes along which they do, in several bands of resolution.

SET is a run of emc_refine or any set at good poses. Each particle is compared with the average as its own images would show
it, with their tilts, CTF, dose and weights. Axes are principal components of the differences within the mask; contrast and
small errors of poses are no differences. How many axes are more than noise is found with the same differences displaced at
random. Axes that follow the missing wedge, defocus or half set are marked and left out. Halves of different frames are
brought into one. Writes into a numbered folder: average.mrc and so on as emc_average, axis_60_1.mrc (and the average at two
standard deviations to both sides, _minus and _plus), variance_60.mrc, coordinates.json, pictures, index.html. emc_cluster
goes on from there.

    emc_pca spt_00                                      # pca_00
    emc_pca spt_00 --scales 40,20 --axes 36 --mask domain.mrc
    emc_pca spt_00 --subset 5000                        # axes of 5000 particles, coordinates of all
    emc_pca spt_00 --components svd                      # singular vectors of masked difference maps, as emClarity's
"""

from __future__ import annotations

import argparse

from libemc import principal_axes, project, records
from libemc.cli import Program, Run, options
from libemc.methods import average
from libemc.numerics.symmetry import operators


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.class_numbers(parser)
    parser.add_argument("--scales", type=options.numbers, default=(60.0, 30.0, 15.0), metavar="A,B,...",
                        help="sizes of differences to look for, in Å: a band of resolution about each")  # fmt: skip
    parser.add_argument("--axes", type=options.count, default=20, metavar="N", help="axes in each band")
    parser.add_argument("--components", choices=("probabilistic", "svd"), default="probabilistic",
                        help="each particle's own sampling in the axes too, or in the differences alone")  # fmt: skip
    parser.add_argument("--subset", type=options.count, metavar="N", help="learn the axes from so many particles")
    options.mask(parser)
    options.symmetry(parser, default=None)
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, average, find axes, write."""
    inputs = [run.particles(args.set_or_run), *map(run.input, filter(None, [args.mask]))]
    head, series = project.open_particles(args.set_or_run, class_numbers=args.class_numbers)
    series = [p.using(p.use & (p.weight > 0)) for p in series]
    box, pixel_size, symmetry = head.box, head.pixel_size, args.symmetry or head.symmetry
    operators(symmetry, box * pixel_size)
    scales = principal_axes.scales_of(args.scales, box, pixel_size)
    plan = principal_axes.Plan(scales, args.axes, args.components == "probabilistic", args.subset, run.seed)
    if args.mask:
        project.read_mask(args.mask, box, pixel_size)
    project.need_halves(series, args.set_or_run)
    count = principal_axes.count_of(series, args.subset, args.set_or_run)
    disk = principal_axes.disk_of(count, box, pixel_size, plan, run.memory)
    if run.plan(f"compare {count} particles in bands about {', '.join(plan.names)} Å", disk=disk):
        return
    kept = {"set_or_run": args.set_or_run, "class": args.class_numbers, "scales": scales, "axes": args.axes,
            "components": args.components, "subset": args.subset, "mask": args.mask, "symmetry": symmetry}  # fmt: skip
    kept = project.plain(kept)
    folder = args.path or records.next_run_directory("pca")
    record = run.output(folder / "run.json")
    outputs = {name: run.output(folder / name) for name in project.AVERAGE_FILES}
    for name in principal_axes.PICTURES:
        run.output(folder / name)
    project.save_run(record, run.name, kept, run.seed, {}, inputs, stopped_at="average")
    series, maps, frames = principal_axes.in_one_frame(series, symmetry, run)
    sphere = project.mask_or_sphere(None, box, pixel_size)
    mask = principal_axes.mask_of(args.mask, average.finish(maps, sphere, pixel_size, run.seed), box, pixel_size, run)
    made = average.finish(maps, mask, pixel_size, run.seed)
    project.write_average(outputs, maps, made, mask, pixel_size)
    found = principal_axes.analyse(series, maps.whole, mask, plan, folder, run)
    principal_axes.claim(folder, found.bands, run)
    project.save_run(record, run.name, kept, run.seed, {}, inputs, stopped_at="maps")
    principal_axes.write_maps(folder, found, made.average, mask, pixel_size, run)
    principal_axes.save_coordinates(folder, found, series, run)
    principal_axes.write_page(folder, found, series, made.average, mask, kept, run)
    principal_axes.remove_older(folder, found.bands, run)
    series = principal_axes.of_classes(series, args.class_numbers)
    project.save_run_particles(folder, head, series, str(args.set_or_run))
    state = {"particles": count, "halves": frames, "bands": [band.state() for band in found.bands]}
    project.save_run(record, run.name, kept, run.seed, state, inputs)
    for band in found.bands:
        run.result(band.line())
    used = sum(len(band.used) for band in found.bands)
    what = f"{used} axes to look for classes in" if used else "no axis is more than noise: the particles look alike"
    run.result(f"{folder}: {count} particles, {what}")


program = Program(
    doc=__doc__,
    name="emc_pca",
    arguments=arguments,
    main=main,
    standard=("threads", "device", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
