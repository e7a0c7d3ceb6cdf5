#!/usr/bin/env python3
"""Refine the poses of a particle set against a reference: gold-standard halves, global search first, then local.

The halves never see each other beyond the starting resolution. The first iterations search all orientations in data to
40 Å and follow the best to finer data; then poses are polished in the band that the FSC between the halves vouches for,
until neither changes. Writes average.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.json, pictures, index.html (the course of
it), run.json and the particles into a numbered folder. Limits are about the poses that the set has. References are the
half maps, each frequency weighed by what both agree on there: in all directions, in its own, or in each place (--filter).

With --classes every particle is compared with each class, made without it, and belongs to each as its images say: of one
reference, after a refinement as one, by what particles differ in; of one for each class; of none, the set's own classes.
Writes class_1.mrc, ... with their half maps, classes.html, montage.png, and the classes into the particles.

    emc_refine ribo --reference initial.mrc --startres 50
    emc_refine ribo --reference initial.mrc --startres 30 --local          # poses are nearly right already
    emc_refine ribo_bin1 --particles spt_00 --reference spt_00/average.mrc --local    # the same particles, finer pixels
    emc_refine spikes --reference spike.mrc --max-tilt 20 --max-shift 30   # axes are known from the membrane
    emc_refine tubes --reference tube.mrc --symmetry helix:9.4,-27.7 --max-tilt 15
    emc_refine ribo --reference initial.mrc --classes 3                    # refined, divided, refined in three classes
    emc_refine pca_00 --classes 3 --focus domain.mrc                       # the classes of emc_cluster
    emc_refine mix --reference a.mrc --reference b.mrc --classes 2 --startres 40
    emc_refine ribo --reference initial.mrc --path spt_00 --resume         # go on where it stopped
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libemc import class_refinements, project, records, refinements
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.methods.refine import align, iteration, references, schedule
from libemc.methods.refine.limits import Limits
from libemc.methods.subtilts import Particles
from libemc.numerics.symmetry import operators

KEPT = ("set_or_run", "particles", "reference", "startres", "local", "max_shift", "max_angle", "max_tilt", "symmetry", "mask",
        "focus", "filter", "keep", "own_noise", "no_motion", "classes")  # fmt: skip
"""Options that a resumed run must repeat."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.reference(parser)
    options.classes(parser)
    parser.add_argument("--startres", type=options.positive, default=50.0, metavar="A",
                        help="resolution of the reference at the start, in Å")  # fmt: skip
    options.particles(parser)
    parser.add_argument("--local", action="store_true", help="no global search: start from the poses that there are")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-shift", type=options.not_negative, metavar="A",
                        help="farthest from where the particle was at the start (default: 0.08 of the box)")  # fmt: skip
    limits.add_argument("--max-angle", type=options.positive, metavar="DEG", help="largest turn from the start")
    limits.add_argument("--max-tilt", type=options.not_negative, metavar="DEG",
                        help="farthest that a particle's z axis may lean; about it, it turns freely")  # fmt: skip
    limits.add_argument("--in-plane-only", action="store_true", help="the z axis stays: as --max-tilt 0")
    options.symmetry(parser, default=None)
    options.mask(parser)
    parser.add_argument("--focus", type=Path, metavar="MAP", help="mask of the references (default: that of the FSC)")
    options.filter(parser, default="spherical")
    options.keep(parser)
    parser.add_argument("--own-noise", action="store_true", help="whiten each particle by its own noise spectrum")
    parser.add_argument("--no-motion", action="store_true", help="particles stand still from exposure to exposure")
    options.iterations(parser)
    options.path(parser)


def limits_of(args: argparse.Namespace, box: int, pixel_size: float) -> Limits:
    """The limits that are asked for; what follows from an option is written into the arguments."""
    if args.in_plane_only and args.max_tilt:
        raise InputError("--in-plane-only leaves no tilt", f"--max-tilt {args.max_tilt:g}", "give one of them")
    args.max_tilt = 0.0 if args.in_plane_only else args.max_tilt
    if args.max_shift is None:
        args.max_shift = align.MAX_SHIFT * box * pixel_size
    return Limits(args.max_shift / pixel_size, args.max_angle, args.max_tilt)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check everything, then refine."""
    if run.resume and not args.path:
        raise InputError("--resume of what?", remedy="give the folder of the run with --path")
    files = [*(args.reference or ()), *filter(None, [args.mask, args.focus])]
    inputs = [*(run.particles(s) for s in (args.set_or_run, args.particles) if s), *map(run.input, files)]
    head, start = project.open_particles(args.set_or_run)
    start = refinements.with_poses_of(start, args.particles) if args.particles else start
    box, pixel_size, args.symmetry = head.box, head.pixel_size, args.symmetry or head.symmetry
    operators(args.symmetry, box * pixel_size)
    limits = limits_of(args, box, pixel_size)
    if args.startres < 2 * pixel_size:
        raise InputError(f"--startres {args.startres:g} is beyond Nyquist", remedy=f"give {2 * pixel_size:g} or more")
    class_refinements.check(args.classes, args.reference or [], start, args.set_or_run)
    maps = [project.read_map(path, box, pixel_size) for path in args.reference or ()]
    mask = project.mask_or_sphere(args.mask, box, pixel_size)
    focus = project.read_mask(args.focus, box, pixel_size) if args.focus else mask
    project.need_halves(start, args.set_or_run)
    what = f"refine {sum(int(p.use.sum()) for p in start)} particles in a box of {box} at {pixel_size:g} Å"
    if run.plan(what + f" in {args.classes} classes" * (args.classes > 1), disk=(3 + 3 * args.classes) * 4 * box**3):
        return
    setup = iteration.Setup(
        mask, focus, references.Filtering(args.filter, mask, pixel_size, run.seed), limits, args.symmetry,
        box * pixel_size / max(args.startres, schedule.JOINED), args.keep, args.own_noise, run.seed, run.memory,
    )  # fmt: skip
    refine(args, head, start, maps, setup, inputs, run)


def refine(
    args: argparse.Namespace, head: records.ParticleSet, start: list[Particles], maps: list[Tensor],
    setup: iteration.Setup, inputs: list[Path], run: Run,
) -> None:  # fmt: skip
    """Iterate until convergence, as one and then in classes, with all of the state in the run's folder after each iteration."""
    box, pixel_size, count = head.box, head.pixel_size, sum(int(p.use.sum()) for p in start)
    kept = project.plain({name: getattr(args, name) for name in KEPT})
    folder = args.path or records.next_run_directory("spt")
    record = folder / "run.json"
    single, again = len(maps) == 1, run.resume and record.exists()
    names = [*refinements.FILES] * single + [*class_refinements.PAGES] * (args.classes > 1)
    run.output(record, owned=again)
    outputs = {name: run.output(folder / name, owned=again) for name in names}
    past, lines, series = list[schedule.Done](), list[dict[str, Any]](), start

    def save(stopped_at: str | None) -> None:
        used, state = {**kept, "iterations": args.iterations}, schedule.state_of(past, count)
        state |= {"classes": lines} if args.classes > 1 else {}
        project.save_run(record, run.name, used, run.seed, state, inputs, stopped_at)

    if run.resume:
        past, lines, series = refinements.resume(folder, {**kept, "seed": run.seed}, start)
    first, motion, step = schedule.Step(args.startres, exhaustive=not args.local), not args.no_motion, None
    if single and not lines:
        if past:
            halves = iteration.next_references(*refinements.read_halves(folder), setup)
        else:
            g = torch.Generator().manual_seed(run.seed)
            halves = references.starting_references(maps[0], setup.focus, pixel_size, args.startres, g)
        step = schedule.next_step(past, first, box, pixel_size, args.iterations, motion)
    if not past and not lines:
        save("iteration 1")
    while step is not None:
        before, out = series, iteration.iteration(series, start, halves, step, setup, run.progress)
        halves, series = out.references, project.save_run_particles(folder, head, out.series, str(args.set_or_run))
        past.append(out.done)
        project.write_average(outputs, out.maps, out.average, setup.mask, pixel_size)
        refinements.save_slices(run.output(folder / refinements.SLICES.format(len(past)), owned=True), out.average)
        step = schedule.next_step(past, first, box, pixel_size, args.iterations, motion)
        save(None if step is None and args.classes == 1 else f"iteration {len(past) + 1}")
        refinements.write_page(outputs["index.html"], folder, kept, past, (start, before, series))
        run.result(schedule.line_of(len(past), past[-1]))
    if args.classes > 1:
        going = class_refinements.Going(start, head, str(args.set_or_run), first, args.iterations, motion, folder, save)
        lines = class_refinements.sort(series, maps, args.classes, setup, going, lines, run)
    elif args.max_shift:
        refinements.warn_of_limits(run, count, align.at_the_limit(start, series, args.max_shift))
    done = f"{past[-1].resolution:.2f} Å at FSC 0.143" if args.classes == 1 else f"{len(lines[-1]['numbers'])} classes"
    run.result(f"{folder}: {count} particles, {done} after {len(past) + len(lines)} iterations")


program = Program(
    doc=__doc__, name="emc_refine", arguments=arguments, main=main,
    standard=("threads", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
