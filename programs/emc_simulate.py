#!/usr/bin/env python3
"""Make a tilt series of known particles in ice, with everything that a microscope does to them and the whole truth.

NAME is the stem of what is written: NAME.mrc (the stack, protein dark), NAME.rawtlt, NAME.mdoc, and NAME_truth.json
(true angles, shifts, defocus, positions, rotations, classes). The particles are the built-in one or its variants
(emc, emc-noarm, emc-nohead, emc-turned), or maps of yours; give several for a mixture of classes.

    emc_simulate TS_01                                            # the built-in particle, 41 tilts of 800 x 800, 3 Å
    emc_simulate TS_02 --symmetry d7 --beads 9 --tilt-error 0.15  # D7, gold beads, angles that are not quite true
    emc_simulate TS_03 --map a.mrc --map b.mrc --fractions 3,1    # two classes
    emc_simulate demo --size 400 400 --pixel-size 6 --box 64 --count 40 --tilt-range -60 60 4 --map-out true.mrc
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from libemc import simulations
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.methods import phantom, simulate
from libemc.numerics.ctf import Optics

DTYPES = ("int8", "int16", "float32", "float16")


def bad_image(text: str) -> tuple[int, str]:
    """INDEX:KIND."""
    index, _, kind = text.partition(":")
    if kind not in simulate.BAD_KINDS:
        raise argparse.ArgumentTypeError(f"'{text}' is not INDEX:KIND with a kind of {', '.join(simulate.BAD_KINDS)}")
    return options.integer(index), kind


def transfer(text: str) -> float:
    """A number above 0 and up to 1."""
    return options.positive(str(options.fraction(text)))


def numbers(group: argparse._ArgumentGroup, kind: Callable[[str], float], *rows: tuple[str, float, str, str]) -> None:
    """Options of one kind of number: name, default, unit, help."""
    for name, default, unit, text in rows:
        group.add_argument(f"--{name}", type=kind, default=default, metavar=unit, help=text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("name", type=Path, metavar="NAME", help="stem of the files to write")
    further = "again for a further class"
    what = parser.add_argument_group("particles")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--map", type=Path, action="append", metavar="MAP", help=f"a white map; {further}")
    which.add_argument("--particle", choices=phantom.VARIANTS, action="append", help=f"a built-in one; {further}")
    options.symmetry(what)
    options.box(what)
    what.add_argument("--fractions", type=options.numbers, metavar="A,B", help="shares of the classes (default: equal)")
    what.add_argument("--count", type=options.count, default=70, metavar="N", help="number of particles")
    options.distance(what)
    numbers(what, options.positive, ("strength", 1.0, "X", "contrast, 1 is that of protein in ice"))
    numbers(what, options.not_negative, ("motion", 0.5, "A", "motion between exposures, Å rms"))
    numbers(what, options.not_negative, ("motion-range", 0.0, "A", "distance over which neighbours move together, Å"))
    what.add_argument("--map-out", type=Path, metavar="FILE", help="write the true map; FILE_1, FILE_2 of several")

    ice = parser.add_argument_group("ice and gold")
    options.thickness(ice, default=800.0)
    turn = "tilt of the slab about y and x, degrees"
    ice.add_argument("--slab-tilt", type=options.number, nargs=2, default=(0.0, 0.0), metavar=("Y", "X"), help=turn)
    ice.add_argument("--beads", type=options.integer, default=0, metavar="N", help="gold beads on the surfaces")
    numbers(ice, options.positive, ("bead-radius", 50.0, "A", "their radius in Å"))
    beyond = ("margin", 0.0, "A", "particles and beads beyond the field's edges")
    numbers(ice, options.not_negative, ("ice", 1.0, "X", "structure of the ice, 0 none, 1 as in nature"), beyond)

    stage = parser.add_argument_group("tilt series")
    stage.add_argument("--size", type=options.box_size, nargs=2, default=(800, 800), metavar=("X", "Y"), help="pixels")
    options.pixel_size(stage, default=3.0)
    options.binning(stage, default=1)
    span, sweep = ("FIRST", "LAST", "STEP"), (-60.0, 60.0, 3.0)
    stage.add_argument("--tilt-range", type=options.number, nargs=3, default=sweep, metavar=span, help="nominal angles")
    stage.add_argument("--order", choices=simulate.ORDERS, default=simulate.ORDERS[0], help="order of the tilts")
    options.dose(stage, default=3.0)
    options.axis(stage, default=85.3)
    numbers(stage, options.number, ("xtilt", 0.0, "DEG", "tilt of the axis out of the plane"))
    numbers(
        stage,
        options.not_negative,
        ("axis-error", 0.0, "DEG", "axis from tilt to tilt, rms"),
        ("tilt-error", 0.0, "DEG", "angles against nominal, rms"),
        ("drift", 15.0, "A", "stage drift per tilt, Å rms"),
        ("jitter", 0.0, "A", "shifts that don't add up, Å rms"),
        ("magnification-change", 0.0, "X", "over the series, smooth, rms"),
    )
    stage.add_argument("--missing", type=options.integer, action="append", metavar="INDEX", help="an image never taken")
    spoilt = f"spoil an image: {', '.join(simulate.BAD_KINDS)}; may be given again"
    stage.add_argument("--bad", type=bad_image, action="append", metavar="INDEX:KIND", help=spoilt)

    lens = parser.add_argument_group("microscope")
    options.voltage(lens)
    options.cs(lens)
    options.amplitude_contrast(lens)
    plate = ("phase-shift", 0.0, "DEG", "of a plate, in the first exposure")
    drift = ("phase-drift", 0.0, "DEG", "added to it by the last exposure")
    jitter = ("defocus-jitter", 250.0, "A", "spread of the defocus, Å rms")
    numbers(lens, options.number, ("defocus", 30000.0, "A", "underfocus in Å"), plate, drift)
    numbers(lens, options.number, ("astigmatism-angle", 20.0, "DEG", "from +x to the axis of U"))
    numbers(lens, options.not_negative, jitter, ("astigmatism", 300.0, "A", "U - V in Å"))
    lens.add_argument("--handedness", type=int, choices=(-1, 1), default=-1, help="sign of the defocus along z")
    beam = "of the beam, mrad: its axial coma"
    lens.add_argument("--beam-tilt", type=options.number, nargs=2, default=(0.0, 0.0), metavar=("X", "Y"), help=beam)
    numbers(lens, transfer, ("mtf", 1.0, "X", "modulation transfer at Nyquist, 1 is perfect"))
    lens.add_argument("--noise-free", action="store_true", help="write the expected counts, without counting noise")
    lens.add_argument("--dtype", choices=DTYPES, default="int16", help="type of the pixels")


def main(args: argparse.Namespace, run: Run) -> None:
    """Decide the scene, then make and write it image by image; the truth comes last."""
    if args.map and (args.symmetry != "c1" or args.box):
        raise InputError("--symmetry and --box are for built-in particles", remedy="leave them out with --map")
    files = simulations.Files.of(args.name)
    for path in files.stack, files.rawtlt, files.mdoc, files.truth:
        run.output(path)
    if args.map:
        paths = [run.input(path) for path in args.map]
        classes = simulations.from_files(paths, args.pixel_size / args.binning, args.strength)
    else:
        names, box = args.particle or ["emc"], args.box and args.box * args.binning
        classes = simulations.built_in(names, args.symmetry, box, args.pixel_size / args.binning, args.strength)
    true_maps = [run.output(path) for path in simulations.numbered(args.map_out, len(classes.maps))]
    fractions = args.fractions or (1.0,) * len(classes.maps)
    if len(fractions) != len(classes.maps):
        raise InputError(
            f"{len(fractions)} fractions for {len(classes.maps)} classes", remedy="give one for each class"
        )
    tilts = tuple(t for j, t in enumerate(simulate.tilt_angles(*args.tilt_range)) if j not in (args.missing or ()))
    acquisition = simulate.Acquisition(
        tilts, simulate.order_of_tilts(tilts, args.order), args.dose, args.axis, args.xtilt,
        args.axis_error, args.tilt_error, args.drift, args.jitter, tuple(args.bad or ()), args.magnification_change)  # fmt: skip
    imaging = simulate.Imaging(
        Optics(args.voltage, args.cs, args.amplitude_contrast), args.defocus, args.defocus_jitter, args.astigmatism,
        args.astigmatism_angle, args.phase_shift, args.handedness, args.mtf, args.phase_drift,
        tuple(args.beam_tilt))  # fmt: skip
    specimen = simulate.Specimen(
        args.count, args.distance or classes.diameter, fractions, args.thickness, tuple(args.slab_tilt), args.beads,
        args.bead_radius, args.motion, args.motion_range, args.ice, args.margin)  # fmt: skip
    size = args.size[1], args.size[0]
    scene = simulate.lay_out(acquisition, imaging, specimen, size, args.pixel_size, run.seed, args.binning)
    dtype, shape = np.dtype(args.dtype), (len(tilts), *scene.shape)
    seconds, memory = simulate.cost(scene, classes.maps[0].shape[0])
    stem = args.name.as_posix()
    if run.plan(f"{stem}: {shape[0]} tilts, {args.count} particles", seconds, memory, np.prod(shape) * dtype.itemsize):
        return
    mean = simulations.write(files, scene, classes, dtype, not args.noise_free, true_maps, run.progress)
    size_text = f"{shape[0]} tilts of {shape[2]} x {shape[1]}"
    run.result(f"{files.stack}: {size_text}, {args.count} particles, {mean:.2f} e/px")


program = Program(
    doc=__doc__, name="emc_simulate", arguments=arguments, main=main,
    standard=("threads", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
