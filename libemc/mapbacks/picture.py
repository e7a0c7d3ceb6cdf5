"""The picture of a tilt series: what is placed, from above and from the front, before a section of the tomogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.mapbacks.plan import Placement, Wanted, models
from libemc.methods import mapback
from libemc.methods.mapback import Cut, Poses, Sight
from libemc.methods.reconstruct import Grid

PICTURE, LEAST_PICTURE = 640, 160
"""Pixels along the longest side of the picture, and where memory is short."""
PICTURE_BYTES = 12
"""Memory of a voxel while it is drawn."""
SECTION = 60.0
"""Å of the tomogram that are averaged for the backdrop."""


def picture_grid(grid: Grid, memory: float) -> Grid:
    """The same box in voxels as small as the pixels of the picture, or as memory allows."""
    side = max(grid.shape)
    voxels = [round(n * PICTURE / side) for n in grid.shape]
    pixels = PICTURE * min(1.0, (memory / 2 / PICTURE_BYTES / math.prod(voxels)) ** (1 / 3))
    pixel_size = grid.pixel_size * side / max(pixels, LEAST_PICTURE)
    z, y, x = (max(2, 2 * round(n * grid.pixel_size / pixel_size / 2)) for n in grid.shape)
    return replace(grid, shape=(z, y, x), pixel_size=pixel_size)


def memory_of(grid: Grid, memory: float) -> float:
    """Bytes that the picture takes, of which there is so much."""
    return PICTURE_BYTES * math.prod(picture_grid(grid, memory).shape)


def draw(path: Path, this: Placement, wanted: Wanted, cuts: Mapping[int, Cut], colours: Any, run: Run) -> None:
    """The picture of a tilt series."""
    from libemc.view import mapback as view

    grid = picture_grid(this.grid, run.memory)
    groups = wanted.groups(this.placed)
    ready = models(cuts, grid.pixel_size, groups.values())
    images: dict[str, NDArray[np.float64]] = {}
    sights: dict[str, tuple[Sight, NDArray[np.float64]]] = {}
    for number in groups.values():
        members = wanted.members(this.placed, number)
        volume = mapback.placed(ready[number], grid, this.placed.poses.at(torch.from_numpy(members)))
        for side in ("top", "front"):
            sight = mapback.seen(volume, ready[number].level, side)
            rgb = _painted(sight, this.placed.poses.at(torch.from_numpy(members)), grid, colours.rgb[members])
            if side in sights:
                sight, other = mapback.nearer(sights[side][0], sight)
                rgb = np.where(other[..., None], rgb, sights[side][1])
            sights[side] = sight, rgb
        del volume
    for side, (sight, rgb) in sights.items():
        backdrop = view.pale(_section(this, grid, side), sight.depth.shape)
        images[side] = view.shaded(sight.depth, sight.normal, rgb, backdrop)
    title = f"{this.name}: {len(this.placed.ids)} particles"
    view.mapback_picture(path, images["top"], images["front"], grid.pixel_size, colours, title)


def _painted(sight: Sight, poses: Poses, grid: Grid, rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, columns, 3) the colour of the nearest particle at each point that is seen."""
    hit = np.isfinite(sight.depth)
    out = np.zeros((*hit.shape, 3))
    centres = poses.from_corner(grid).xyz.numpy() / grid.pixel_size
    if hit.any():
        out[hit] = rgb[cKDTree(centres).query(sight.index[hit])[1]]
    return out


def _section(this: Placement, grid: Grid, side: str) -> NDArray[np.float64] | None:
    """The middle section of the tomogram at the picture's pixels, NaN outside it; None without a tomogram."""
    if this.tomogram is None:
        return None
    file, there = this.tomogram
    data = mrc.open_stack(file).array
    if data.shape != there.shape:
        raise InputError(f"has shape {data.shape}, its record says {there.shape}", file, "make the tomogram again")
    axis = 0 if side == "top" else 1
    offset = np.array(grid.centre)[::-1] - np.array(there.centre)[::-1]  # z, y, x; both volumes have the same axes
    at = [
        ((np.arange(n) - n // 2) * grid.pixel_size + o) / there.pixel_size + m // 2
        for n, m, o in zip(grid.shape, there.shape, offset, strict=True)
    ]
    half = max(0, round(SECTION / there.pixel_size / 2))
    middle = int(np.clip(round(float(at[axis][grid.shape[axis] // 2])), 0, there.shape[axis] - 1))
    some = slice(max(0, middle - half), middle + half + 1)
    slab = np.asarray(data[some] if axis == 0 else data[:, some], dtype=np.float64).mean(axis=axis)
    rows, columns = (at[k] for k in range(3) if k != axis)
    width = grid.pixel_size / there.pixel_size
    smooth = ndimage.gaussian_filter(slab, 0.5 * width) if width > 1 else slab
    where = np.meshgrid(rows, columns, indexing="ij")
    return np.asarray(ndimage.map_coordinates(smooth, where, order=1, mode="constant", cval=np.nan))
