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

from libemc import project, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.methods import average, refine
from libemc.numerics.filters import lowpass
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
    inputs = [run.particles(args.set_or_run), *map(run.input, filter(None, [args.reference, args.mask]))]
    head, series = project.open_particles(args.set_or_run)
    box, pixel_size, symmetry = head.box, head.pixel_size, args.symmetry or head.symmetry
    symmetry_matrices(symmetry)
    if args.startres < 2 * pixel_size:
        raise InputError(f"--startres {args.startres:g} is beyond Nyquist", remedy=f"give {2 * pixel_size:g} or more")
    reference = project.read_map(args.reference, box, pixel_size)
    mask = project.mask_or_sphere(args.mask, box, pixel_size)
    project.need_halves(series, args.set_or_run)
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
    record = folder / "run.json"
    going_on = run.resume and record.exists()
    outputs = {name: run.output(folder / name, owned=going_on) for name in (record.name, *project.AVERAGE_FILES)}
    past: list[refine.Done] = []

    def save(done: list[refine.Done], stopped_at: str | None) -> None:
        used = {**options_used, "iterations": args.iterations}
        project.save_run(record, run.name, used, run.seed, refine.state_of(done, count), inputs, stopped_at)

    if run.resume:
        past, series = project.resume_refinement(folder, options_used, series)
        run.log.info(f"{folder} has {len(past)} iterations; going on")
    shared = box * pixel_size / max(args.startres, refine.JOINED)
    start = refine.Step(args.startres, exhaustive=not args.local)
    halves = (lowpass(reference, pixel_size, args.startres) * mask,) * 2
    if past:
        halves = project.read_references(folder, mask, shared)
    else:
        save([], "iteration 1")
    step = refine.next_step(past, start, box, pixel_size, args.iterations)
    while step is not None:
        search = refine.Search(step.resolution, options_used["max_shift"], symmetry=symmetry)
        before, series = series, refine.iterate(series, halves, search, step.exhaustive, run.memory, run.progress)
        maps = average.half_maps(series, run.memory, symmetry, progress=run.progress)
        done = average.finish(maps, mask, pixel_size, run.seed)
        turned, moved = refine.pose_change(before, series, symmetry)
        past.append(refine.Done(step, done.resolution, done.reach, turned, moved))
        halves = refine.filtered_references(maps.half1, maps.half2, mask, done.corrected, shared)
        project.write_average(outputs, maps, done, mask, pixel_size)
        series = project.save_run_particles(folder, head, series, str(args.set_or_run))
        step = refine.next_step(past, start, box, pixel_size, args.iterations)
        save(past, None if step is None else f"iteration {len(past) + 1}")
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
