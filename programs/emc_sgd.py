#!/usr/bin/env python3
"""Make an initial model from nothing: stochastic gradient descent from random orientations, several seeds, several classes.

Each seed begins with particles in random orientations low-passed to 100 Å. In each step all orientations and shifts of a
batch of particles are weighed by their likelihood, and the reference moves to what they say; band and temperature follow
by themselves. The seed that explains the particles best is kept, and how alike all seeds are is reported. Its poses are
polished in data to --resolution. Writes class1.mrc, ..., pictures of the course, the particles with their poses and class
numbers, and run.json into a numbered folder. The poses of the particles are not used; their positions are, to 0.08 of
the box.

--symmetry: the model is made without any, the axes of the group are sought in it, and all is turned onto them and averaged
with it.
--find-symmetry auto: the same with the group that fits best. --diameter is 0.75 of the box unless given.

    emc_sgd ribo                                        # sgd_00/class1.mrc
    emc_sgd ribo --classes 2 --resolution 50
    emc_sgd groel --symmetry d7 --diameter 160
    emc_sgd apo --find-symmetry auto --resolution 20    # what is nearly round must be seen in detail
    emc_refine ribo --reference sgd_00/class1.mrc       # or: emc_refine sgd_00 --reference sgd_00/class1.mrc --local
"""

from __future__ import annotations

import argparse

from libemc import project, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.initial_models import (
    AUTO,
    Scene,
    Seeds,
    compare,
    generator,
    lines,
    models_of,
    save_particles,
    with_symmetry,
    write_models,
)
from libemc.methods.initial_model.descent import Wish, descend
from libemc.numerics.symmetry import symmetry_matrices
from libemc.view.initial_model import course_plot

DIAMETER, MAX_SHIFT = 0.75, 0.08
"""Of the particle, and farthest shift of one, in boxes."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    options.class_numbers(parser)
    options.resolution(parser, default=40.0)
    options.classes(parser)
    parser.add_argument(
        "--diameter", type=options.positive, metavar="A", help="of the sphere that holds the particle, Å"
    )
    parser.add_argument("--seeds", type=options.count, default=3, metavar="N", help="descents from different starts")
    options.symmetry(parser, default=None)
    options.find_symmetry(parser)
    options.path(parser)


def wish_of(args: argparse.Namespace, head: records.ParticleSet) -> Wish:
    """What is asked for, checked."""
    if args.symmetry and args.find_symmetry:
        raise InputError("--symmetry and --find-symmetry exclude each other", remedy="give one of them")
    if args.find_symmetry and args.find_symmetry.lower() != AUTO:
        what = f"--find-symmetry {args.find_symmetry}: the group is known"
        raise InputError(what, remedy=f"give --symmetry {args.find_symmetry}, whose axes are found, or '{AUTO}'")
    if args.find_symmetry and args.classes > 1:
        raise InputError("--find-symmetry takes one class", remedy="classify first, then give --class")
    symmetry_matrices(args.symmetry or "c1")
    length = head.box * head.pixel_size
    diameter = args.diameter or DIAMETER * length
    if diameter > length:
        raise InputError(f"--diameter {diameter:g} is wider than the box of {length:g} Å", remedy="cut larger boxes")
    if not 2 * head.pixel_size <= args.resolution < diameter:
        remedy = f"give from {2 * head.pixel_size:g}, two pixels, to {diameter:g}, the diameter"
        raise InputError(f"--resolution {args.resolution:g} is out of range", remedy=remedy)
    return Wish(length, diameter, args.resolution, MAX_SHIFT * length, args.classes)


def options_of(args: argparse.Namespace, wish: Wish, seed: int) -> dict[str, object]:
    """What a run must have been begun with to be gone on with."""
    return {
        "set_or_run": str(args.set_or_run),
        "class": args.class_numbers and list(args.class_numbers),
        "resolution": args.resolution,
        "classes": args.classes,
        "diameter": wish.diameter,
        "symmetry": AUTO if args.find_symmetry else (args.symmetry or "c1").lower(),
        "seed": seed,
    }


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, descend from each seed, choose, find symmetry, write."""
    if run.resume and not args.path:
        raise InputError("--resume of what?", remedy="give the folder of the run with --path")
    inputs = [run.particles(args.set_or_run)]
    head, series = project.open_particles(args.set_or_run, class_numbers=args.class_numbers)
    wish = wish_of(args, head)
    count = sum(int(p.use.sum()) for p in series)
    if count < 2 * args.classes:
        raise InputError(f"{count} particles are too few for {args.classes} classes", args.set_or_run, "use more")
    what = f"make {args.classes} models of {count} particles in a box of {head.box} at {head.pixel_size:g} Å"
    if run.plan(what, disk=4 * args.classes * (head.box**3 + args.seeds * wish.small**3)):
        return
    used, folder = options_of(args, wish, run.seed), args.path or records.next_run_directory("sgd")
    record = folder / "run.json"
    going_on = run.resume and record.exists()
    names = [f"class{c}.{kind}" for c in range(1, args.classes + 1) for kind in ("mrc", "png")]
    outputs = {name: run.output(folder / name, owned=going_on) for name in ("run.json", "course.png", *names)}
    seeds = Seeds.resumed(folder, used, inputs) if run.resume else Seeds(folder)
    if run.resume:
        run.log.info(f"{folder} has {len(seeds.courses)} seeds; going on")
    state: dict[str, object] = {"particles": count}

    def save(stopped_at: str | None) -> None:
        now = {**state, "seeds": seeds.table()}
        project.save_run(record, run.name, {**used, "seeds": args.seeds}, run.seed, now, inputs, stopped_at)

    save("seeds")
    scene = Scene.of(series, wish, run.memory, run.seed, run.progress)
    for seed in range(run.seed, run.seed + args.seeds):
        if seed not in seeds.courses:
            own = [run.output(file, owned=True) for file in seeds.files(seed, args.classes)]
            seeds.add(seed, descend(scene.balls, wish, scene.mask, generator(seed), progress=run.progress), scene, own)
            save("seeds")
            run.log.info(f"seed {seed}: log-likelihood {seeds.evidence[seed]:.1f} per particle")
    best, state["agreement"] = compare(seeds, scene)
    course_plot(outputs["course.png"], seeds.courses)
    references, symmetry = seeds.references(best, args.classes), "c1"
    found, models = models_of(references, scene, run.progress)
    if used["symmetry"] != "c1":
        symmetry, found, models, state["symmetry"] = with_symmetry(
            found, models, scene, str(used["symmetry"]), run.log.info, run.progress
        )
    write_models(outputs, models, head.pixel_size)
    save_particles(folder, head, found, symmetry, str(args.set_or_run))
    state |= {"chosen": best, "group": symmetry, "classes": [m.table() for m in models]}
    save(None)
    for line in lines(seeds, best, state["agreement"], models, symmetry):
        run.result(line)


program = Program(
    doc=__doc__,
    name="emc_sgd",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
