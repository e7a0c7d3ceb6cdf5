"""Where it is looked for: the volume that is searched, out of the images of a tilt series or out of a tomogram."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc import project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.matches.plan import Plan
from libemc.methods import reconstruct
from libemc.methods.match import find, specimen
from libemc.methods.match.correlate import BYTES_SHARED, BYTES_WORKER
from libemc.methods.match.specimen import Passband, Sensitivity, TiltSensitivity
from libemc.methods.reconstruct import CtfCorrection, Grid, Weighting, binned_shape
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.records import TiltSeriesRecord

BYTES_PER_VOXEL = 60.0
"""Of the grid: the volume, the same to look at, the maps of the search, and what is made of them."""
BYTES_SETUP = 60
"""Per voxel of a part: while it's transformed."""
SECONDS_PER_VOXEL = 9e-9
"""Of a part with its margins, for one rotation."""


@dataclass(frozen=True)
class Scene:
    """What is searched, with all that the search asks of it.

    Attributes:
        name: of the tilt series or file.
        volume: (z, y, x), particles bright. grid: its place in the tomogram.
        shown: the same as a tomogram to look at.
        sensitivity: how it shows a template.
        key: what makes it what it is, for resuming.
    """

    name: str
    volume: NDArray[np.float32]
    shown: NDArray[np.float32]
    grid: Grid
    sensitivity: Sensitivity
    resolution: float
    key: str

    def angstroms(self, places: Tensor) -> Tensor:
        """(P, 3) Å from the tomogram's centre of places in voxels (x, y, z)."""
        middle = torch.tensor([n // 2 for n in self.grid.shape[::-1]], dtype=torch.float64)
        return (places.double() - middle) * self.grid.pixel_size + torch.tensor(self.grid.centre, dtype=torch.float64)


def used_tilts(record: TiltSeriesRecord) -> list[int]:
    """Numbers of the tilts that are used."""
    return [j for j, use in enumerate(record.tilts.use) if use]


def grid_of(record: TiltSeriesRecord, plan: Plan) -> Grid:
    """The voxels that are searched: those of the region with a margin of the largest template, or of the whole field."""
    _, binning = plan.fineness(record.source.pixel_size)
    region = plan.region
    if region is not None:
        reach = max(plan.diameters) / 2
        region = tuple(v + (reach if i % 2 else -reach) for i, v in enumerate(region))
    return Grid.of(record, binning, plan.thickness, region)


def cost(record: TiltSeriesRecord, plan: Plan, run: Run) -> tuple[float, float]:
    """Estimates of seconds and bytes for one tilt series."""
    grid = grid_of(record, plan)
    resolution, binning = plan.fineness(record.source.pixel_size)
    seconds, largest = 0.0, 0
    for template in plan.templates(grid.pixel_size, resolution):
        rotations = len(plan.wanted.rotations(template, max(plan.diameters))[0])
        cut = find.parts(grid.shape, template.box, run.memory / 2, run.threads)
        sizes = [math.prod(p.padded(grid.shape, template.box)) for p in cut]
        largest, voxels = max(largest, max(sizes)), sum(sizes)
        seconds += SECONDS_PER_VOXEL * voxels * rotations * (1 + 1 / find.DECOY_SHARE) / run.threads
    images = sum(record.tilts.use) * math.prod(binned_shape(record.source.shape, binning)) * 4.0
    part = largest * float(BYTES_SETUP + BYTES_SHARED + run.threads * BYTES_WORKER)
    return seconds, reconstruct.LIBRARIES + images + math.prod(grid.shape) * BYTES_PER_VOXEL + part


def scene_of(record: TiltSeriesRecord, stack: mrc.MrcImages, plan: Plan, run: Run) -> Scene:
    """The specimen of a tilt series, reconstructed for the search."""
    tilts = used_tilts(record)
    grid = grid_of(record, plan)
    resolution, binning = plan.fineness(record.source.pixel_size)
    geometry = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use).select(tilts)
    weighting = Weighting.of(record, grid, tilts, plan.dose, None)
    correction = None
    if record.ctf is None:
        run.warn(f"{record.name} has no CTF: the search is blind to it; estimate it first with emc_tomoctf")
    else:
        made = CtfCorrection.of(record, "multiply", resolution=resolution)
        correction = made and made.select(tilts)
    band = Passband(resolution, max(plan.diameters))
    images, left = project.room_for_images(
        (len(tilts), *binned_shape(record.source.shape, binning)), run.memory, "tomograms"
    )
    raw = project.Images(stack, f"exclude that tilt in {records.tiltseries_path(record.name)}")
    noise = torch.zeros(len(tilts), specimen.RINGS)
    whitened = specimen.whiten_images(
        lambda j: raw[tilts[j]], geometry, binning, grid.pixel_size, weighting, band, images
    )
    for j, power in run.progress(whitened, len(tilts), f"{record.name}: images"):
        noise[j] = power
    if not images.any():
        raise InputError("no used image has any contrast", record.source.stack, "check the file, and import it again")
    volume, shown = np.empty(grid.shape, np.float32), np.empty(grid.shape, np.float32)
    slabs = reconstruct.reconstruct(images, geometry, grid, correction, left, run.device)
    for y0, slab in run.progress(slabs, None, f"{record.name}: tomogram"):
        volume[:, y0 : y0 + slab.shape[1]] = -slab if record.source.contrast == "dark" else slab
    prepared = reconstruct.prepare_images(
        lambda j: raw[tilts[j]], geometry, binning, grid.pixel_size, weighting, images
    )
    for _ in run.progress(prepared, len(tilts), f"{record.name}: images to look at"):
        pass
    for y0, slab in reconstruct.reconstruct(images, geometry, grid, None, left, run.device):
        shown[:, y0 : y0 + slab.shape[1]] = slab
    sensitivity = TiltSensitivity(geometry, correction, weighting, band, noise, grid.pixel_size)
    content = record.model_dump(mode="json", include={"source", "tilts", "alignment", "ctf"})
    return Scene(record.name, volume, shown, grid, sensitivity, resolution, digest([content, plan.dose, band.diameter]))


def scene_of_volume(file: Path, contrast: str, tilts: tuple[float, float] | None, plan: Plan) -> Scene:
    """A finished tomogram, whitened, binned as the resolution asks for."""
    data, own = mrc.read_volume(file)
    if float(data.std()) == 0 or not np.isfinite(data).all():
        raise InputError("has no contrast, or values that are not finite", file, "check the file")
    resolution, binning = plan.fineness(own)
    volume = torch.from_numpy(data.astype(np.float32))
    shape = (data.shape[0] // binning, data.shape[1] // binning, data.shape[2] // binning)
    if min(shape) < reconstruct.LEAST_VOXELS:
        raise InputError(
            f"is too small: {shape} voxels after binning {binning} times", file, "give a finer --resolution"
        )
    volume = fourier.resize(fourier.centre_crop(volume, [n * binning for n in shape]), shape)
    pixel_size = own * binning
    band = Passband(resolution, max(plan.diameters))
    white, sensitivity = specimen.whiten_volume(-volume if contrast == "dark" else volume, tilts, band, pixel_size)
    key = digest([str(file), file.stat().st_size, file.stat().st_mtime, contrast, tilts, band.diameter])
    return Scene(file.stem, white.numpy(), volume.numpy(), Grid(shape, pixel_size), sensitivity, resolution, key)


def digest(content: Any) -> str:
    """What tells contents apart, of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
