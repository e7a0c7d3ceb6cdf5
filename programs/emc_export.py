#!/usr/bin/env python3
"""Write a particle set in the form of another package, with its images.

relion31: every used image of every used particle becomes a 2-D particle, with the Euler angles of tilt and particle together,
its origin, its own defocus and half set. DIR/particles.star and a stack of images (float32, white) for each tilt series;
paths are written as DIR is given, from the folder in which RELION will be run. RELION 3.1 knows no exposure filter: its
place is taken by a B-factor fitted to it.

    emc_export ribo --format relion31                          # export/ribo/particles.star
    emc_export spt_00 --format relion31 --output relion/ribo
    relion_reconstruct --i export/ribo/particles.star --ctf --o map.mrc
"""

from __future__ import annotations

import argparse
from pathlib import Path

from libemc import project
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.interchange import particles as outgoing
from libemc.io import relion
from libemc.methods.export import image_table, largest_magnification

FORMATS = ("relion31",)
MAGNIFICATION = 1e-3
"""Change of a tilt's magnification from which on it is worth a warning that 2-D particles do not hold it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    options.class_numbers(parser)
    options.output(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, write the images, then the table that names them."""
    run.particles(args.set_or_run)
    head, series = project.open_particles(args.set_or_run, class_numbers=args.class_numbers)
    series = [p for p in series if len(image_table(p))]
    if not series:
        raise InputError("no image is used", head.set, "check which particles and tilts have use = true")
    folder = args.output or Path("export") / Path(args.set_or_run).name
    stacks = {p.file.name: run.output(folder / f"{p.file.name}.mrcs") for p in series}
    star = run.output(folder / "particles.star")
    table = outgoing.relion31_table(series, stacks)
    if not all(image_table(p).known for p in series):
        run.warn("some images have no defocus, which is written as 0: leave CTF correction out")
    change = max(largest_magnification(p) for p in series)
    if change > MAGNIFICATION:
        run.warn(f"magnifications differ by up to {change:.2%} between tilts, which 2-D particles do not hold")
    if run.plan(f"write {table.count} images of {head.box}²", disk=table.count * head.box**2 * 4):
        return
    for one in series:
        outgoing.write_used_images(one, stacks[one.file.name], run.progress)
    relion.write_particles_2d(star, table)
    run.result(f"{star}: {table.count} images of {sum(int(p.use.sum()) for p in series)} particles")


program = Program(
    doc=__doc__,
    name="emc_export",
    arguments=arguments,
    main=main,
    standard=("overwrite", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
