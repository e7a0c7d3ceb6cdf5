#!/usr/bin/env python3
"""Resolution by Fourier shell correlation: of two half maps, or of a map against a model.

The two maps are cubes on one grid (or --resample brings the second, and the mask, onto the grid of the first). The
line on stdout has, for each curve, the resolution at 0.143 and at 0.5. Half maps with a mask give the curve corrected
by phase randomisation too (Chen et al. 2013), and that is the one to report. --output names a folder, where fsc.json
(curves, resolutions also at half a bit and one bit), fsc.txt (a table) and fsc.png are written.

Of half maps: --directions finds the FSC within cones (directions.png and .txt, and fsc_3d.mrc on the Fourier grid),
--local-resolution that of each place (local_resolution.mrc and .png). --filter makes filtered.mrc of both halves: each
frequency by the signal's share of the power, from the FSC of all directions, of each direction (anisotropic) or of each
place (local). It may be sharpened: --bfactor auto fits the fall of the amplitudes from 10 Å to the resolution. Several
B factors, -50,-100,auto, give a map each: filtered_b-50.mrc, filtered_b-100.mrc, filtered_auto.mrc.

    emc_fsc half1.mrc half2.mrc                                   # unmasked
    emc_fsc half1.mrc half2.mrc --mask mask.mrc --output post     # masked, and corrected for the mask
    emc_fsc half1.mrc half2.mrc --mask mask.mrc --directions --local-resolution
    emc_fsc half1.mrc half2.mrc --mask mask.mrc --filter local --bfactor -150
    emc_fsc half1.mrc half2.mrc --mask mask.mrc --filter anisotropic --structure-factor model.mrc
    emc_fsc map.mrc model.mrc --model --mask mask.mrc             # a map against a model: 0.5 is the one to report
    emc_fsc spt_00/average.mrc emd_3228.mrc --model --resample    # against a map of another box and pixel size
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, from_numpy

from libemc import __version__, resolutions
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.methods import postprocess
from libemc.methods.postprocess import Grid
from libemc.numerics import fourier

BYTES_PER_VOXEL, BYTES_MORE = 100, 150
"""Peak memory: the maps in float32, and the complex transforms, shells and sums of two of them; those of cones."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("maps", nargs=2, type=Path, metavar="MAP", help="two half maps, or a map and a model")
    options.mask(parser)
    parser.add_argument("--model", action="store_true", help="the second map is a model, not the other half")
    parser.add_argument("--resample", action="store_true", help="bring the other maps onto the grid of the first")
    options.output(parser, default=Path("."))
    more = parser.add_argument_group("half maps")
    more.add_argument("--directions", action="store_true", help="find the resolution of each direction")
    more.add_argument("--local-resolution", action="store_true", help="find the resolution of each place")
    options.filter(more)
    options.bfactor(more)
    options.structure_factor(more)
    more.add_argument("--mtf-file", type=Path, metavar="FILE",
                      help="divide by the detector's MTF: a STAR file like RELION's, or a table of 1/px and MTF")  # fmt: skip
    more.add_argument("--mtf-pixel-size", type=options.positive, metavar="A",
                      help="pixel size of the detector in Å (default: the map's)")  # fmt: skip


def finish(args: argparse.Namespace) -> resolutions.Finish:
    """What is asked for beyond the curves.

    Raises:
        InputError: it is asked of a map and a model, or asked for twice.
    """
    wanted = resolutions.Finish(
        args.directions,
        args.local_resolution,
        args.filter,
        args.bfactor or (),
        args.structure_factor,
        args.mtf_file,
        args.mtf_pixel_size,
    )
    if args.model and wanted.wanted:
        raise InputError("has no halves to filter, or to find directions and places in", "--model", "give half maps")
    wanted.check()
    if args.mtf_pixel_size and not args.mtf_file:
        raise InputError("is of an MTF", "--mtf-pixel-size", "give --mtf-file, or leave it out")
    return wanted


def read(path: Path, onto: Grid | None, resample: bool) -> tuple[Tensor, Grid]:
    """A map on a grid, or the first one, a cube, which sets the grid.

    Raises:
        InputError: it is not a cube, or is on another grid and may not be resampled.
    """
    array, pixel_size = mrc.read_volume(path)
    volume, grid = from_numpy(array), Grid(array.shape, pixel_size)
    if onto is None:
        if len(set(array.shape)) > 1:
            raise InputError(f"is not a cube but {grid}", path, "cut or pad it with emc_volume --box")
        return volume, grid
    if grid.same(onto):
        return volume, onto
    if not resample:
        remedy = "give --resample, or bring them onto one grid with emc_volume"
        raise InputError(f"has {grid}, the first map {onto}", path, remedy)
    if not grid.same_sampling(onto):
        volume = postprocess.resample(volume, onto.pixel_size / pixel_size)
    return fourier.centre_fit(volume, onto.shape).contiguous(), onto


def main(args: argparse.Namespace, run: Run) -> None:
    """Read onto one grid, correlate, write and say what was found."""
    paths = [run.input(path) for path in (*args.maps, *([args.mask] if args.mask else []))]
    if os.path.samefile(paths[0], paths[1]):
        raise InputError("is given twice", paths[1], "give two maps")
    wanted = finish(args)
    for source in filter(None, (wanted.structure_factor, wanted.mtf)):
        run.input(source)
    files = {name: run.output(args.output / name) for name in wanted.files()}
    to_json, to_text, to_picture = (run.output(args.output / f"fsc.{end}") for end in ("json", "txt", "png"))
    first, grid = read(paths[0], None, args.resample)
    second, *rest = (read(path, grid, args.resample)[0] for path in paths[1:])
    for path, volume in ((paths[0], first), (paths[1], second)):
        if float(volume.std()) == 0:
            raise InputError("is the same everywhere", path, "give a map with density in it")
    for volume in rest:
        postprocess.check_mask(volume, args.mask)
    per_voxel = BYTES_PER_VOXEL + BYTES_MORE * wanted.wanted
    if run.plan(f"FSC of {paths[0]} and {paths[1]}: {grid}", memory=per_voxel * first.numel()):
        return
    mask = rest[0].clamp(0, 1) if rest else None
    if args.model:
        found = postprocess.model_resolution(first, second, grid.pixel_size, mask)
    else:
        generator = torch.Generator().manual_seed(run.seed)
        found = postprocess.half_map_resolution(first, second, grid.pixel_size, mask, generator)
    if found.stays_above():
        run.warn(
            f"the {found.main} FSC never falls below {found.criterion}: the pixels limit it to {found.value:.2f} Å"
        )
    more, phrases = {}, []
    if wanted.wanted:
        more, phrases = resolutions.finish(first, second, mask, found, wanted, files, run.seed)
    inputs = {"maps": [str(path) for path in paths[:2]], "mask": str(args.mask or "") or None, "seed": run.seed}
    made_by = {"program": run.name, "version": __version__, "argv": list(run.argv)}
    resolutions.write_curves(found, to_text, to_picture)
    write_text(to_json, resolutions.json_text({"made_by": made_by, "inputs": inputs, **found.table(), **more}))
    run.result("; ".join([resolutions.curve_line(found), *phrases]))


program = Program(
    doc=__doc__,
    name="emc_fsc",
    arguments=arguments,
    main=main,
    standard=("threads", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
