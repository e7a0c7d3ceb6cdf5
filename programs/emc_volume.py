#!/usr/bin/env python3
"""Change a map or tomogram: rescale, crop, filter, rotate, shift, symmetrise, mask; or compare it with another.

Whatever is asked for is done in this order: --set-pixel-size, --invert, --mirror, --rotate and --shift (in one
interpolation), --find-symmetry, --symmetry, --highpass and --lowpass, --pixel-size or --bin, --box, --normalise,
--mask, --compare. The origin, pixel n//2 of each axis, stays where it is; what comes in from outside is 0. A list that
begins with a minus has to follow an equals sign.

--find-symmetry prints how well the map has each group (correlation over its operators, 1 with half maps if it has it;
`mean` of them and the `worst`) and turns it into the setting of the best one, or of the one that is named.

    emc_volume emd_3228.mrc ref.mrc --pixel-size 6 --box 64 --lowpass 40     # a reference at the sampling of a set
    emc_volume average.mrc turned.mrc --rotate 20,45,-70 --shift=-12,0,4.5   # at R·u + s is what was at u
    emc_volume tomogram.mrc small.mrc --bin 2 --invert --float16
    emc_volume average.mrc mirrored.mrc --mirror z                             # the other hand
    emc_volume average.mrc onto_axes.mrc --find-symmetry auto --half-maps half1.mrc half2.mrc
    emc_volume average.mrc onto_axes.mrc --find-symmetry c7 --symmetry c7
    emc_volume average.mrc --compare other.mrc                               # correlation, difference, FSC = 0.5
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, from_numpy

from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import postprocess
from libemc.methods.change import BEST_GROUP, Changes
from libemc.methods.postprocess import Grid
from libemc.numerics.symmetry import operators, symmetry_matrices

BYTES_PER_VOXEL = 40
"""Peak memory: a transform or the spline coefficients in float64 beside two maps in float32."""
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


def triple(text: str) -> tuple[float, ...]:
    """Three numbers with commas between them."""
    values = options.numbers(text)
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"'{text}' is not three numbers with commas between them")
    return values


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("input", type=Path, metavar="IN", help="the map to read")
    parser.add_argument("result", type=Path, nargs="?", metavar="OUT", help="the map to write, if any")
    parser.add_argument("--set-pixel-size", type=options.positive, metavar="A", help="what that of IN really is, in Å")
    parser.add_argument("--invert", action="store_true", help="black to white: change the sign")
    parser.add_argument("--mirror", choices=("x", "y", "z"), help="mirror along this axis, which changes the hand")
    parser.add_argument("--rotate", type=triple, metavar="ROT,TILT,PSI", help="rotate by R of these, degrees")
    parser.add_argument("--shift", type=triple, metavar="X,Y,Z", help="shift by so many Å")
    options.find_symmetry(parser)
    parser.add_argument(
        "--half-maps", type=Path, nargs=2, metavar="MAP", help="the halves of IN, to find symmetry with"
    )
    options.symmetry(parser)
    parser.add_argument("--highpass", type=options.positive, metavar="A", help="remove what is coarser than this, in Å")
    options.lowpass(parser)
    sampling = parser.add_mutually_exclusive_group()
    options.pixel_size(sampling)
    options.binning(sampling)
    options.box(parser)
    parser.add_argument("--normalise", action="store_true", help="to mean 0 and standard deviation 1")
    options.mask(parser)
    parser.add_argument("--compare", type=Path, metavar="MAP", help="compare the result with this map")
    parser.add_argument("--float16", action="store_true", help="write half the bytes: 11 bits of precision")


def same_grid(path: Path, grid: Grid, of: str = "the result") -> Tensor:
    """A map on the same grid as another.

    Raises:
        InputError: it is on another one.
    """
    array, pixel_size = mrc.read_volume(path)
    own = Grid(array.shape, pixel_size)
    if not own.same(grid):
        raise InputError(f"has {own}, {of} {grid}", path, "bring both onto one grid with --pixel-size and --box")
    return from_numpy(array)


def check(args: argparse.Namespace, pixel_size: float, run: Run) -> None:
    """What can be known to be wrong before any work."""
    if args.result is None and args.compare is None:
        raise InputError("give the map to write, or --compare", remedy="see emc_volume --help")
    if args.lowpass and args.highpass and args.lowpass >= args.highpass:
        what = f"--lowpass {args.lowpass:g} and --highpass {args.highpass:g} Å leave nothing"
        raise InputError(what, remedy="the high-pass is the coarser of the two, the larger number")
    if args.lowpass and args.lowpass <= 2 * pixel_size:
        run.warn(f"--lowpass {args.lowpass:g} is finer than two pixels of {pixel_size:g} Å and does nothing of use")
    operators(args.symmetry, pixel_size)
    if args.half_maps and not args.find_symmetry:
        raise InputError("--half-maps is for --find-symmetry", remedy="see emc_volume --help")
    if args.find_symmetry and args.find_symmetry.lower() != BEST_GROUP:
        symmetry_matrices(args.find_symmetry)


def main(args: argparse.Namespace, run: Run) -> None:
    """Read, change, compare, write."""
    source = run.input(args.input)
    output = run.output(args.result) if args.result else None
    array, pixel_size = mrc.read_volume(source, args.set_pixel_size)
    check(args, pixel_size, run)
    new_pixel_size = args.pixel_size or pixel_size * (args.binning or 1)
    step = new_pixel_size / pixel_size
    shape = (args.box,) * 3 if args.box else tuple(postprocess.resampled_size(n, step) for n in array.shape)
    grid = Grid(shape, new_pixel_size)
    mask = same_grid(run.input(args.mask), grid) if args.mask else None
    if mask is not None:
        postprocess.check_mask(mask, args.mask)
    here = Grid(array.shape, pixel_size)
    halves = [same_grid(run.input(half), here, f"{source}") for half in args.half_maps or ()]
    other = same_grid(run.input(args.compare), grid) if args.compare else None
    dtype = np.dtype(np.float16 if args.float16 else np.float32)
    voxels = math.prod(shape)
    text = f"{output or 'comparison'}: {grid}"
    disk = voxels * dtype.itemsize if output else None
    if run.plan(text, memory=BYTES_PER_VOXEL * max(array.size, voxels), disk=disk):
        return
    changes = Changes(**{option.name: getattr(args, option.name) for option in fields(Changes)})
    volume, ranking = changes.changed(from_numpy(array), pixel_size, step, halves)
    if ranking is not None:
        run.result(f"{ranking.text()}\nthe map is {ranking.chosen} at {ranking.resolution:.1f} Å")
    if mask is not None:
        volume = volume * mask
    if other is not None:
        found = postprocess.compare(volume, other, new_pixel_size)
        run.result(
            f"{source} and {args.compare}: correlation {found.correlation:.6f}, relative difference "
            f"{found.difference:.4g}, FSC 0.5 at {found.resolution:.2f} Å"
        )
    if output is None:
        return
    largest = float(torch.abs(volume).max())
    if args.float16 and largest > LARGEST_FLOAT16:
        raise InputError(
            f"has values to {largest:.4g}, too large for float16", source, "give --normalise, or no --float16"
        )
    mrc.write_volume(output, volume.numpy(), new_pixel_size, dtype)
    run.result(f"{text}, mean {float(volume.mean()):.4g}, standard deviation {float(volume.std()):.4g}")


program = Program(
    doc=__doc__,
    name="emc_volume",
    arguments=arguments,
    main=main,
    standard=("threads", "overwrite", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
