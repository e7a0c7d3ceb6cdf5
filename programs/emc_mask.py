#!/usr/bin/env python3
"""Make a soft mask for a map: a sphere, or the shape of the density above a threshold.

MAP is white (protein positive) and gives the box and the pixel size. A threshold is one number in the units of the map
(after --lowpass), or "auto", which is what is done unless told otherwise: low-pass to 15 Å (or to --lowpass), grow the
particle from the strongest density in the middle of the box down to the noise, leave out its neighbours and what is
not connected to it, and take the threshold that parts it best from what is around it. The mask is 1 up to --extend
from the density and falls to 0 over --edge. Where the map is very noisy, a coarser --lowpass shows more of it. The
line on stdout has the mask's share of the box and its volume, and the volume and mass (as protein, 0.81 Da/Å³) of what
is above the threshold.

    emc_mask spt_00/average.mrc                                              # by itself
    emc_mask half1.mrc --lowpass 30                                          # of a noisy map
    emc_mask average.mrc --threshold 0.02 --extend 10 --edge 20 --output tight.mrc
    emc_mask average.mrc --sphere 150 --edge 30 --output sphere.mrc          # radius 150 Å
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, from_numpy

from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import molecular_mask, postprocess
from libemc.numerics import filters, masks

BYTES_PER_VOXEL = 60
"""Peak memory: the map and the mask in float32, the distance transform and its indices."""


def threshold(text: str) -> float | None:
    """A number, or None for auto."""
    return None if text == "auto" else options.number(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("map", type=Path, metavar="MAP", help="the map, white")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--sphere", type=options.positive, metavar="A", help="a sphere of this radius in Å")
    shape.add_argument("--threshold", type=threshold, metavar="T", help="density above this, or auto (default: auto)")
    options.lowpass(parser)
    parser.add_argument("--largest", action="store_true", help="only the largest connected density")
    parser.add_argument("--extend", type=options.not_negative, metavar="A",
                        help="reach beyond the density in Å (default: 3 pixels)")  # fmt: skip
    parser.add_argument("--edge", type=options.not_negative, metavar="A",
                        help="width of the soft edge in Å (default: 6 pixels)")  # fmt: skip
    options.output(parser, default=Path("mask.mrc"))


def shaped(volume: Tensor, pixel_size: float, args: argparse.Namespace) -> tuple[Tensor, float]:
    """The map that is thresholded, and the threshold.

    Raises:
        InputError: the map is the same everywhere.
    """
    if float(volume.std()) == 0:
        raise InputError("is the same everywhere", args.map, "give a map with density in it, or --sphere")
    resolution = args.lowpass or (molecular_mask.SHAPE if args.threshold is None else 0.0)
    if resolution > 2 * pixel_size:
        volume = filters.lowpass(volume, pixel_size, resolution)
    level = args.threshold
    if level is None:
        region, level = molecular_mask.molecular_region(volume, molecular_mask.noise_level(volume))
        volume = volume.where(region, volume.clamp_max(level))
    return (postprocess.keep_largest(volume, level) if args.largest else volume), level


def main(args: argparse.Namespace, run: Run) -> None:
    """Make the mask, write it, say how large it is."""
    if args.sphere is not None and (args.lowpass or args.largest or args.extend is not None):
        raise InputError("--lowpass, --largest and --extend shape a threshold mask", "--sphere", "leave them out")
    source, output = run.input(args.map), run.output(args.output)
    array, pixel_size = mrc.read_volume(source)
    if run.plan(f"{output}: a mask for {source}", memory=BYTES_PER_VOXEL * array.size, disk=4 * array.size):
        return
    edge = molecular_mask.EDGE_PX if args.edge is None else args.edge / pixel_size
    if args.sphere is not None:
        radius = args.sphere / pixel_size
        mask, kind = masks.soft_sphere(array.shape, radius, edge), "sphere"
        dense = int((masks.soft_sphere(array.shape, radius, 0.0) > 0).sum())
    else:
        volume, level = shaped(from_numpy(array), pixel_size, args)
        extend = molecular_mask.EXTEND_PX if args.extend is None else args.extend / pixel_size
        mask, kind = masks.soft_mask_from_map(volume, level, extend, edge), f"threshold {level:.4g}"
        dense = int((volume > level).sum())
    if max(float(mask.select(dim, end).max()) for dim in range(3) for end in (0, -1)) > 0:
        run.warn(
            "the mask reaches the border of the box: an FSC within it will suffer; use a larger box or a tighter mask"
        )
    mrc.write_volume(output, mask.numpy(), pixel_size)
    voxels, cell = float(mask.double().sum()), pixel_size**3
    run.result(
        f"{output}: {100 * voxels / array.size:.2f} % of the box, {voxels * cell:.4g} Å³; within {kind}: "
        f"{dense * cell:.4g} Å³, {postprocess.protein_mass(dense, pixel_size):.4g} kDa"
    )


program = Program(
    doc=__doc__,
    name="emc_mask",
    arguments=arguments,
    main=main,
    standard=("threads", "overwrite", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
