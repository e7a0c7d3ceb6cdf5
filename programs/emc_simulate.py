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
from torch import Tensor, from_numpy

from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc, simulated
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
    numbers(
        lens, options.number, ("defocus", 30000.0, "A", "underfocus in Å"), ("phase-shift", 0.0, "DEG", "of a plate")
    )
    numbers(lens, options.number, ("astigmatism-angle", 20.0, "DEG", "from +x to the axis of U"))
    numbers(lens, options.not_negative, ("defocus-jitter", 250.0, "A", "spread of the defocus, Å rms"))
    numbers(lens, options.not_negative, ("astigmatism", 300.0, "A", "U - V in Å"))
    lens.add_argument("--handedness", type=int, choices=(-1, 1), default=-1, help="sign of the defocus along z")
    numbers(lens, transfer, ("mtf", 1.0, "X", "modulation transfer at Nyquist, 1 is perfect"))
    lens.add_argument("--noise-free", action="store_true", help="write the expected counts, without counting noise")
    lens.add_argument("--dtype", choices=DTYPES, default="int16", help="type of the pixels")


def maps_of(args: argparse.Namespace, run: Run) -> tuple[list[Tensor], list[str], float]:
    """The map of each class on the detector's pixels, what it is called, and the diameter of the largest in Å."""
    pixel = args.pixel_size / args.binning
    maps, diameter = [], 0.0
    for path in args.map or []:
        array, spacing = mrc.read_volume(run.input(path))
        if len(set(array.shape)) > 1:
            raise InputError("is not a cube", path, "pad it to one")
        maps.append(simulate.as_potential(simulate.resample(from_numpy(array), spacing, pixel), pixel, args.strength))
        diameter = max(diameter, simulate.BOX_SHARE * array.shape[0] * spacing)
    if args.map:
        if args.symmetry != "c1" or args.box:
            raise InputError("--symmetry and --box are for built-in particles", remedy="leave them out with --map")
        return maps, [path.name for path in args.map], diameter
    names = args.particle or ["emc"]
    atoms = [phantom.particle(name, args.symmetry) for name in names]
    diameter = max(particle.diameter for particle in atoms)
    box = args.box * args.binning if args.box else simulate.box_for(diameter, pixel)
    return [phantom.density(particle, box, pixel) * args.strength for particle in atoms], names, diameter


def class_files(path: Path | None, count: int) -> list[Path]:
    """Where the true maps go: the file itself, or one numbered file for each class."""
    if path is None:
        return []
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{k + 1}") for k in range(count)]


def main(args: argparse.Namespace, run: Run) -> None:
    """Decide the scene, then make and write it image by image; the truth comes last."""
    stem = args.name.as_posix()
    stack, rawtlt, mdoc, truth = (run.output(Path(stem + end)) for end in (".mrc", ".rawtlt", ".mdoc", "_truth.json"))
    maps, names, diameter = maps_of(args, run)
    true_maps = [run.output(path) for path in class_files(args.map_out, len(maps))]
    fractions = args.fractions or (1.0,) * len(maps)
    if len(fractions) != len(maps):
        raise InputError(f"{len(fractions)} fractions for {len(maps)} classes", remedy="give one for each class")
    tilts = tuple(t for j, t in enumerate(simulate.tilt_angles(*args.tilt_range)) if j not in (args.missing or ()))
    acquisition = simulate.Acquisition(
        tilts, simulate.order_of_tilts(tilts, args.order), args.dose, args.axis, args.xtilt,
        args.axis_error, args.tilt_error, args.drift, args.jitter, tuple(args.bad or ()), args.magnification_change)  # fmt: skip
    imaging = simulate.Imaging(
        Optics(args.voltage, args.cs, args.amplitude_contrast), args.defocus, args.defocus_jitter, args.astigmatism,
        args.astigmatism_angle, args.phase_shift, args.handedness, args.mtf)  # fmt: skip
    specimen = simulate.Specimen(
        args.count, args.distance or diameter, fractions, args.thickness, tuple(args.slab_tilt), args.beads,
        args.bead_radius, args.motion, args.motion_range, args.ice, args.margin)  # fmt: skip
    size = args.size[1], args.size[0]
    scene = simulate.lay_out(acquisition, imaging, specimen, size, args.pixel_size, run.seed, args.binning)
    dtype, shape = np.dtype(args.dtype), (len(tilts), *scene.shape)
    seconds, memory = simulate.cost(scene, maps[0].shape[0])
    if run.plan(f"{stem}: {shape[0]} tilts, {args.count} particles", seconds, memory, np.prod(shape) * dtype.itemsize):
        return
    gain, total = simulate.gain_for(scene, dtype), 0.0
    with simulated.detector_stack(stack, shape, args.pixel_size, dtype) as pixels:
        images = simulate.tilt_images(scene, maps, noise=not args.noise_free)
        for j, image in enumerate(run.progress(images, total=shape[0], label="tilts")):
            pixels[j] = simulate.counts(image, dtype, gain)
            total += float(image.mean())
    box = maps[0].shape[0] // args.binning
    known = scene.truth() | {"n": box, "maps": names, "symmetry": args.symmetry, "gain": gain}
    for path, density in zip(true_maps, maps, strict=False):  # none unless asked for
        written = simulate.resample(density, args.pixel_size / args.binning, args.pixel_size)
        mrc.write_volume(path, written.numpy(), args.pixel_size)
    simulated.write_rawtlt(rawtlt, tilts)
    simulated.write_mdoc(mdoc, known, stack.name, shape, simulated.MODES[dtype])
    simulated.write_truth(truth, known)
    size_text = f"{shape[0]} tilts of {shape[2]} x {shape[1]}"
    run.result(f"{stack}: {size_text}, {args.count} particles, {total / shape[0]:.2f} e/px")


program = Program(
    doc=__doc__,
    name="emc_simulate",
    arguments=arguments,
    main=main,
    standard=("threads", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
