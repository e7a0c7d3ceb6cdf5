#!/usr/bin/env python3
"""Average a particle set at its present poses: half maps, their FSC, and the Wiener-filtered map of both.

Writes average.mrc, half1.mrc, half2.mrc (unfiltered), mask.mrc, fsc.json and pictures into a numbered folder. The
average is filtered by the signal-to-noise ratio of its shells and by how often each frequency was seen. --filter makes
filtered.mrc beside it, of the half maps and their FSC alone, as emc_fsc does. --bfactor or --structure-factor makes
sharpened.mrc, of the average or of the filtered map; several B factors, -50,-100,auto, give a map each, sharpened_b-50.mrc,
sharpened_b-100.mrc, sharpened_auto.mrc. Each is of both halves, weighted by their FSC.

    emc_average ribo                         # avg_00/average.mrc
    emc_average spt_00 --symmetry c7         # the particles of a refinement, with its weights, symmetrised
    emc_average spt_00 --weights none        # those that it rejected too, all the same
    emc_average ribo --mask mask.mrc --class 1 --path avg_class1
    emc_average spt_00 --mask mask.mrc --bfactor auto
    emc_average spt_00 --mask mask.mrc --bfactor -50,-100,auto     # three maps
    emc_average spt_00 --mask mask.mrc --filter local --structure-factor model.mrc
"""

from __future__ import annotations

import argparse
from pathlib import Path

from libemc import project, records, resolutions
from libemc.cli import Program, Run, options
from libemc.methods import average
from libemc.numerics.symmetry import operators


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.class_numbers(parser)
    options.symmetry(parser, default=None)
    parser.add_argument("--weights", choices=("run", "none"), default="run",
                        help="those that a refinement gave the particles, or the same for all")  # fmt: skip
    options.mask(parser)
    options.filter(parser)
    options.bfactor(parser)
    options.structure_factor(parser)
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, insert all images, write the maps."""
    wanted = resolutions.Finish(
        filter=args.filter, b_factors=args.bfactor or (), structure_factor=args.structure_factor
    )
    wanted.check()
    files = [path for path in (args.mask, args.structure_factor) if path]
    inputs = [run.particles(args.set_or_run), *map(run.input, files)]
    head, series = project.open_particles(args.set_or_run, class_numbers=args.class_numbers)
    series = [p.using(p.use & (p.weight > 0)) if args.weights == "run" else p.unweighted() for p in series]
    symmetry = args.symmetry or head.symmetry
    operators(symmetry, head.box * head.pixel_size)
    mask = project.mask_or_sphere(args.mask, head.box, head.pixel_size)
    project.need_halves(series, args.set_or_run)
    count = sum(int(p.use.sum()) for p in series)
    if run.plan(f"average {count} particles in a box of {head.box}", disk=(4 + len(wanted.maps())) * 4 * head.box**3):
        return
    given = {name: getattr(args, name) for name in ("weights", "mask", "filter", "bfactor", "structure_factor")}
    options_used = {"set_or_run": str(args.set_or_run), "symmetry": symmetry, "class": args.class_numbers}
    options_used |= {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    folder = args.path or records.next_run_directory("avg")
    record = run.output(folder / "run.json")
    outputs = {name: run.output(folder / name) for name in project.AVERAGE_FILES}
    kind = "sharpened" if wanted.sharpens else "filtered"
    finished = {name: run.output(folder / name.replace("filtered", kind)) for name in wanted.files()}
    project.save_run(record, run.name, options_used, run.seed, {}, inputs, stopped_at="average")
    maps = average.half_maps(series, run.memory, symmetry, progress=run.progress)
    done = average.finish(maps, mask, head.pixel_size, run.seed)
    more, phrases = resolutions.finish(maps.half1, maps.half2, mask, done.fsc, wanted, finished, run.seed, done.average)
    project.write_average(outputs, maps, done, mask, head.pixel_size, more)
    state = {"particles": count, "images": list(maps.images), "resolution": done.resolution}
    project.save_run(record, run.name, options_used, run.seed, state, inputs)
    line = f"{folder}: {count} particles, {sum(maps.images)} images, {done.resolution:.2f} Å at FSC 0.143"
    run.result("; ".join([line, *phrases]))


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
