#!/usr/bin/env python3
"""Average a particle set at its present poses: half maps, their FSC, and the Wiener-filtered map of both.

Writes average.mrc, half1.mrc, half2.mrc (unfiltered), mask.mrc, fsc.json and pictures into a numbered folder.

    emc_average ribo                         # avg_00/average.mrc
    emc_average spt_00 --symmetry c7         # the particles of a refinement, symmetrised
    emc_average ribo --mask mask.mrc --class 1 --path avg_class1
"""

from __future__ import annotations

import argparse

from libemc import project, records
from libemc.cli import Program, Run, options
from libemc.methods import average
from libemc.numerics.symmetry import symmetry_matrices


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.class_numbers(parser)
    options.symmetry(parser, default=None)
    options.mask(parser)
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, insert all images, write the maps."""
    inputs = [run.particles(args.set_or_run), *map(run.input, filter(None, [args.mask]))]
    head, series = project.open_particles(args.set_or_run, class_numbers=args.class_numbers)
    symmetry = args.symmetry or head.symmetry
    symmetry_matrices(symmetry)
    mask = project.mask_or_sphere(args.mask, head.box, head.pixel_size)
    project.need_halves(series, args.set_or_run)
    count = sum(int(p.use.sum()) for p in series)
    if run.plan(f"average {count} particles in a box of {head.box}", disk=5 * 4 * head.box**3):
        return
    options_used = {
        "set_or_run": str(args.set_or_run),
        "symmetry": symmetry,
        "class": args.class_numbers,
        "mask": str(args.mask) if args.mask else None,
    }
    folder = args.path or records.next_run_directory("avg")
    record = run.output(folder / "run.json")
    outputs = {name: run.output(folder / name) for name in project.AVERAGE_FILES}
    project.save_run(record, run.name, options_used, run.seed, {}, inputs, stopped_at="average")
    maps = average.half_maps(series, run.memory, symmetry, progress=run.progress)
    done = average.finish(maps, mask, head.pixel_size, run.seed)
    project.write_average(outputs, maps, done, mask, head.pixel_size)
    state = {"particles": count, "images": list(maps.images), "resolution": done.resolution}
    project.save_run(record, run.name, options_used, run.seed, state, inputs)
    run.result(f"{folder}: {count} particles, {sum(maps.images)} images, {done.resolution:.2f} Å at FSC 0.143")


program = Program(
    doc=__doc__,
    name="emc_average",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
