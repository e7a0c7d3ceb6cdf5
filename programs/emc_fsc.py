#!/usr/bin/env python3
"""Resolution by Fourier shell correlation: of two half maps, or of a map against a model.

The two maps are cubes on one grid (or --resample brings the second, and the mask, onto the grid of the first). The
line on stdout has, for each curve, the resolution at 0.143 and at 0.5. Half maps with a mask give the curve corrected
by phase randomisation too (Chen et al. 2013), and that is the one to report. --output names a folder, where fsc.json
(curves, resolutions also at half a bit and one bit), fsc.txt (a table) and fsc.png are written.

    emc_fsc half1.mrc half2.mrc                                   # unmasked
    emc_fsc half1.mrc half2.mrc --mask mask.mrc --output post     # masked, and corrected for the mask
    emc_fsc map.mrc model.mrc --model --mask mask.mrc             # a map against a model: 0.5 is the one to report
    emc_fsc spt_00/average.mrc emd_3228.mrc --model --resample    # against a map of another box and pixel size
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, from_numpy

from libemc import __version__
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.methods import postprocess
from libemc.methods.postprocess import Grid
from libemc.numerics import fourier
from libemc.view import plots

BYTES_PER_VOXEL = 100
"""Peak memory: the maps in float32, and the complex transforms, shells and sums of two of them."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("maps", nargs=2, type=Path, metavar="MAP", help="two half maps, or a map and a model")
    options.mask(parser)
    parser.add_argument("--model", action="store_true", help="the second map is a model, not the other half")
    parser.add_argument("--resample", action="store_true", help="bring the other maps onto the grid of the first")
    options.output(parser, default=Path("."))


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


def line(found: postprocess.Resolution) -> str:
    """The main curve first: its name and its resolutions."""
    names = [found.main, *(name for name in found.crossings if name != found.main)]
    wanted = ("0.143", "0.5") if found.criterion == "0.143" else ("0.5", "0.143")
    return "; ".join(
        f"{name} " + " ".join(f"{found.crossings[name][label]:.2f} Å at {label}" for label in wanted) for name in names
    )


def json_text(content: dict[str, Any]) -> str:
    """One key to a line."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return "{" + ",\n ".join(f"{encode(key)}: {encode(value)}" for key, value in content.items()) + "}\n"


def table_text(found: postprocess.Resolution) -> str:
    """A line for each shell: frequency, resolution, and the value of each curve."""
    lines = ["# 1/Å Å " + " ".join(found.curves)]
    for shell, frequency in enumerate(found.frequency):
        values = " ".join(f"{float(curve.values[shell]):9.6f}" for curve in found.curves.values())
        lines.append(f"{frequency:.6f} {1 / frequency if frequency else float('inf'):9.3f} {values}")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace, run: Run) -> None:
    """Read onto one grid, correlate, write and say what was found."""
    paths = [run.input(path) for path in (*args.maps, *([args.mask] if args.mask else []))]
    if os.path.samefile(paths[0], paths[1]):
        raise InputError("is given twice", paths[1], "give two maps")
    to_json, to_text, to_picture = (run.output(args.output / f"fsc.{end}") for end in ("json", "txt", "png"))
    first, grid = read(paths[0], None, args.resample)
    second, *rest = (read(path, grid, args.resample)[0] for path in paths[1:])
    for path, volume in ((paths[0], first), (paths[1], second)):
        if float(volume.std()) == 0:
            raise InputError("is the same everywhere", path, "give a map with density in it")
    for volume in rest:
        postprocess.check_mask(volume, args.mask)
    if run.plan(f"FSC of {paths[0]} and {paths[1]}: {grid}", memory=BYTES_PER_VOXEL * first.numel()):
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
    inputs = {"maps": [str(path) for path in paths[:2]], "mask": str(args.mask or "") or None, "seed": run.seed}
    made_by = {"program": run.name, "version": __version__, "argv": list(run.argv)}
    write_text(to_text, table_text(found))
    table = found.table()
    title = f"{found.value:.2f} Å where the {found.main} FSC falls below {found.criterion}"
    plots.fsc_plot(to_picture, found.frequency, table["curves"], table["thresholds"], found.value, title)
    write_text(to_json, json_text({"made_by": made_by, "inputs": inputs, **table}))
    run.result(line(found))


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
