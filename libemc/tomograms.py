"""Reconstructing the tomograms of a tilt series of a project: their files and pictures, and what the record says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from libemc import records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import reconstruct
from libemc.methods.erase import Beads
from libemc.methods.reconstruct import CtfCorrection, Grid, Weighting, binned_shape
from libemc.methods.subtilts import TiltGeometry
from libemc.project import Images, room_for_images
from libemc.records import TiltSeriesRecord, Tomogram
from libemc.view.slices import CentralSlices, central_slices_png

HALVES: dict[str, Literal[1, 2] | None] = {"": None, "_even": 1, "_odd": 2}
"""Suffix of each tomogram's name and its number in the record; halves take every other one of the used tilts."""


@dataclass(frozen=True)
class Wanted:
    """What tomograms are asked for. Lengths in Å.

    Attributes:
        binning: image pixels to a voxel.
        thickness, region, angles: as in `reconstruct.Grid.of`.
        tag: word in the files' names.
        ctf: none, one of `reconstruct.CTF_MODES`, or deconvolve; strength, falloff: of deconvolve.
        dose: whether to weight by dose where that is known.
        lowpass: None for the resolution of the voxels.
        erase_beads: replace them by noise first.
        halves: tomograms of every other tilt, too.
    """

    binning: int
    thickness: float | None
    region: tuple[float, ...] | None
    angles: tuple[float, float, float]
    tag: str | None
    ctf: str
    strength: float
    falloff: float
    dose: bool
    lowpass: float | None
    erase_beads: bool
    halves: bool

    @property
    def suffixes(self) -> list[str]:
        """Of the names of all tomograms of a tilt series."""
        return list(HALVES) if self.halves else [""]

    def grid(self, record: TiltSeriesRecord) -> Grid:
        """The voxels."""
        return Grid.of(record, self.binning, self.thickness, self.region, self.angles)

    def correction(self, record: TiltSeriesRecord) -> CtfCorrection | None:
        """The correction for the CTF; None for none."""
        return CtfCorrection.of(record, self.ctf, self.strength, self.falloff, self.lowpass)

    def target(self, record: TiltSeriesRecord, suffix: str) -> Path:
        """A tomogram's file; that of a part of the field never has the name of the whole."""
        tag = self.tag or ("region" if self.region else "turned" if any(self.angles) else None)
        return Path("tomograms") / f"{record.name}_bin{self.binning}{f'_{tag}' if tag else ''}{suffix}.mrc"


def cost(record: TiltSeriesRecord, what: Wanted, run: Run) -> tuple[float, float, float]:
    """Seconds, bytes of memory and of disk for one tilt series."""
    grid = what.grid(record)
    count, copies = sum(record.tilts.use), len(what.suffixes)
    limits, correction = None, what.correction(record)
    if correction is not None:
        used = [j for j, use in enumerate(record.tilts.use) if use]
        geometry = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use).select(used)
        limits = correction.select(used).limits(geometry, grid)
    seconds, memory = reconstruct.cost(grid, record.source.shape, count, what.binning, run.threads, run.memory, limits)
    return copies * seconds, memory, copies * math.prod(grid.shape) * 4.0


def make(record: TiltSeriesRecord, stack: mrc.MrcImages, what: Wanted, run: Run) -> Iterator[Tomogram]:
    """Reconstruct all tomograms of a tilt series, one after the other, and write each with its picture.

    Args:
        record: with an alignment, and a CTF where that is to be corrected.
        stack: the raw images, mapped.
        run: for progress, warnings, what may be used, and the files.

    Yields:
        What the record shall say of each, when its files are there.

    Raises:
        InputError: no used image has any contrast, or one is spoilt.
    """
    whole = [j for j, use in enumerate(record.tilts.use) if use]
    for suffix in what.suffixes:
        half = HALVES[suffix]
        yield _tomogram(record, stack, whole if half is None else whole[half - 1 :: 2], suffix, what, run)


def _tomogram(
    record: TiltSeriesRecord, stack: mrc.MrcImages, tilts: list[int], suffix: str, what: Wanted, run: Run
) -> Tomogram:
    """One tomogram from some of the tilts."""
    grid = what.grid(record)
    weighting = Weighting.of(record, grid, tilts, what.dose, what.lowpass, what.ctf == "deconvolve")
    geometry = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use).select(tilts)
    corrected, beads = what.correction(record), Beads.of(record, geometry, tilts, run.seed)
    if what.erase_beads and beads is None:
        run.warn(f"{record.name}: the alignment has no beads among its landmarks; none are erased")
    clean = partial(beads.erase, pixel_size=grid.pixel_size) if beads and what.erase_beads else None
    images, left = room_for_images(
        (len(tilts), *binned_shape(record.source.shape, what.binning)), run.memory, "tomograms"
    )
    name, raw = record.name + suffix, Images(stack, f"exclude that tilt in {records.tiltseries_path(record.name)}")
    prepared = reconstruct.prepare_images(
        lambda j: raw[tilts[j]], geometry, what.binning, grid.pixel_size, weighting, images, clean
    )
    for _ in run.progress(prepared, len(tilts), f"{name}: images"):
        pass
    if not images.any():
        raise InputError("no used image has any contrast", record.source.stack, "check the file, and import it again")
    file = run.output(what.target(record, suffix))
    pictures = CentralSlices(grid.shape)
    slabs = reconstruct.reconstruct(images, geometry, grid, corrected and corrected.select(tilts), left, run.device)
    with mrc.VolumeWriter(file, grid.shape, grid.pixel_size) as writer:
        for y0, slab in run.progress(slabs, None, f"{name}: rows"):
            writer.write_rows(y0, slab)
            pictures.add(y0, slab)
    central_slices_png(pictures, run.output(file.with_suffix(".png")), f"{name}, {grid.pixel_size:g} Å/voxel")
    done = [*(["beads erased"] if clean else []), *weighting.corrections, *([corrected.words] if corrected else [])]
    return reconstruct.tomogram_entry(file, grid, done, HALVES[suffix])
