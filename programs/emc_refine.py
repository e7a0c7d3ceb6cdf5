#!/usr/bin/env python3
"""Refine the poses of a particle set against a reference: gold-standard halves, global search first, then local.

The halves never see each other beyond the starting resolution. The first iterations search all orientations in data to
40 Å; then poses are polished in the band that the FSC between the halves vouches for, until neither changes. Writes
average.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.json, pictures, run.json and the particles into a numbered folder.

    emc_refine ribo --reference initial.mrc --startres 50
    emc_refine ribo --reference initial.mrc --startres 30 --local          # poses are nearly right already
    emc_refine spt_00 --reference spt_00/average.mrc --local --iterations 2
    emc_refine ribo --reference initial.mrc --path spt_00 --resume         # go on where it stopped
"""

from __future__ import annotations

import argparse
from pathlib import Path

from libemc import project, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.methods import average, refine
from libemc.numerics.filters import lowpass
from libemc.numerics.masks import soft_sphere
from libemc.numerics.symmetry import symmetry_matrices


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.reference(parser, required=True)
    parser.add_argument(
        "--startres",
        type=options.positive,
        default=50.0,
        metavar="A",
        help="resolution of the reference at the start, in Å",
    )
    parser.add_argument("--local", action="store_true", help="no global search: start from the poses that there are")
    parser.add_argument(
        "--max-shift",
        type=options.not_negative,
        metavar="A",
        help="farthest shift in one iteration (default: 0.08 of the box)",
    )
    options.symmetry(parser, default=None)
    options.mask(parser)
    options.iterations(parser)
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, then iterate until convergence, with all of the state in the run's folder after each iteration."""
    if run.resume and not args.path:
        raise InputError("--resume of what?", remedy="give the folder of the run with --path")
    inputs = [run.particles(args.set_or_run), run.input(args.reference)]
    head, series = project.open_particles(args.set_or_run)
    box, pixel_size = head.box, head.pixel_size
    symmetry = args.symmetry or head.symmetry
    symmetry_matrices(symmetry)
    if args.startres < 2 * pixel_size:
        raise InputError(f"--startres {args.startres:g} is beyond Nyquist", remedy=f"give {2 * pixel_size:g} or more")
    reference = project.read_map(args.reference, box, pixel_size)
    if args.mask:
        inputs.append(run.input(args.mask))
        mask = project.read_mask(args.mask, box, pixel_size)
    else:
        mask = soft_sphere(box, average.DEFAULT_MASK * box / 2, average.MASK_EDGE)
    count = sum(int(p.use.sum()) for p in series)
    if run.plan(f"refine {count} particles in a box of {box} at {pixel_size:g} Å", disk=6 * 4 * box**3):
        return
    folder = args.path or records.next_run_directory("spt")
    options_used = {
        "set_or_run": str(args.set_or_run),
        "reference": str(args.reference),
        "startres": args.startres,
        "local": args.local,
        "max_shift": args.max_shift if args.max_shift is not None else refine.MAX_SHIFT * box * pixel_size,
        "symmetry": symmetry,
        "mask": str(args.mask) if args.mask else None,
    }
    record = run.output(folder / "run.json", owned=run.resume)
    outputs = {name: run.output(folder / name, owned=run.resume) for name in project.AVERAGE_FILES}
    past: list[refine.Done] = []
    if run.resume:
        past, series = project.resume_refinement(folder, options_used, series)
        run.log.info(f"{folder} has {len(past)} iterations; going on")
    start = refine.Step(args.startres, exhaustive=not args.local)
    halves = (lowpass(reference, pixel_size, args.startres) * mask,) * 2
    if past:
        halves = project.read_references(folder, mask)
    else:
        project.save_run(record, run.name, options_used, run.seed, refine.state_of([], count), inputs, "iteration 1")
    step = refine.next_step(past, start, box, pixel_size, args.iterations)
    while step is not None:
        search = refine.Search(step.resolution, options_used["max_shift"], symmetry=symmetry)
        before, series = series, refine.iterate(series, halves, search, step.exhaustive, run.memory, run.progress)
        maps = average.half_maps(series, run.memory, symmetry, progress=run.progress)
        done = average.finish(maps, mask, pixel_size, run.seed)
        turned, moved = refine.pose_change(before, series, symmetry)
        past.append(refine.Done(step, done.resolution, done.reach, turned, moved))
        halves = refine.filtered_references(maps.half1, maps.half2, mask, done.corrected)
        project.write_average(outputs, maps, done, mask, pixel_size)
        project.save_run_particles(folder, head, series, str(args.set_or_run))
        step = refine.next_step(past, start, box, pixel_size, args.iterations)
        stopped_at = None if step is None else f"iteration {len(past) + 1}"
        project.save_run(record, run.name, options_used, run.seed, refine.state_of(past, count), inputs, stopped_at)
        run.result(refine.line_of(len(past), past[-1]))
    run.result(f"{folder}: {count} particles, {past[-1].resolution:.2f} Å at FSC 0.143 after {len(past)} iterations")


program = Program(
    doc=__doc__,
    name="emc_refine",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
