"""What an alignment works on: the images of a tilt series at several samplings, and the geometry as it is at present."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.align import bundle, landmarks, tracks
from libemc.methods.align.bundle import Tracks
from libemc.methods.align.coarse import SLAB
from libemc.methods.align.tracks import Scale
from libemc.methods.reconstruct import bin_image
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.filters import normalise
from libemc.records import Alignment, TiltSeriesRecord

Image = NDArray[Any]
VOXELS = 160  # of the coarse tomogram's longer side
FEATURE_DIAMETER, FEATURE_SHARE = 600.0, 0.25  # what is looked at around a landmark: Å, and of the field, at most
FEATURE_PIXELS = 42.0  # of that diameter
LEAST_BOX = 26  # px of what is looked at around a landmark
STIFF = bundle.Freedom((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
BECAUSE = "alignment: "
"""How the reasons begin for which an alignment leaves images out; the next one considers them again."""


class Pyramid:
    """The images of a tilt series at several samplings, normalised: mean 0, deviation 1, dark specimen.

    Args:
        load: gives image j (rows, columns) of any real type.
        shape: (T, rows, columns).
        use: (T,) which images are wanted.
        bright: the specimen is brighter than its surroundings.
    """

    def __init__(
        self, load: Callable[[int], Image], shape: Sequence[int], pixel_size: float, use: Sequence[bool], bright: bool
    ) -> None:
        self.load, self.shape, self.pixel_size, self.use = load, tuple(shape), pixel_size, list(use)
        self.sign = -1.0 if bright else 1.0
        self._levels: dict[int, NDArray[np.float32]] = {}

    @property
    def field(self) -> tuple[float, float]:
        """Å along x and y."""
        return self.shape[2] * self.pixel_size, self.shape[1] * self.pixel_size

    @property
    def diameter(self) -> float:
        """Å: what is looked at around a landmark."""
        return min(FEATURE_DIAMETER, FEATURE_SHARE * max(self.field))

    @property
    def pixel(self) -> float:
        """Å: wanted of the pixels in which landmarks are looked at."""
        return self.diameter / FEATURE_PIXELS

    def binning(self, pixel_size: float) -> int:
        """The largest power of two whose pixels are no larger than that; at least 1."""
        return 2 ** max(0, math.floor(math.log2(max(pixel_size / self.pixel_size, 1.0)) + 1e-6))

    def near(self, pixel_size: float) -> int:
        """The power of two as binning whose pixels are nearest to that."""
        return 2 ** max(0, round(math.log2(pixel_size / self.pixel_size)))

    def level(self, binning: int) -> NDArray[np.float32]:
        """(T, rows // binning, columns // binning); images not wanted are 0. Kept for the next call."""
        if binning not in self._levels:
            finer = max((b for b in self._levels if binning % b == 0), default=0)
            rows, columns = self.shape[1] // binning, self.shape[2] // binning
            out = np.zeros((self.shape[0], rows, columns), np.float32)
            for j in range(self.shape[0]):
                if not self.use[j]:
                    continue
                if finer:
                    image = bin_image(torch.from_numpy(self._levels[finer][j]), binning // finer)
                else:
                    image = self.sign * bin_image(torch.from_numpy(np.array(self.load(j), dtype=np.float32)), binning)
                out[j] = normalise(image).numpy()
            self._levels[binning] = out
        return self._levels[binning]


@dataclass
class State:
    """The present geometry, and what was learnt on the way.

    Attributes:
        gains: (T,) signal of each image over the mean of all; error: (T,) Å; fitted: what, how freely.
    """

    alignment: Alignment
    use: list[bool]
    reason: list[str | None]
    order: Sequence[int] | None
    gains: Tensor
    error: NDArray[np.float64]
    fit: bundle.Fit | None = None
    fitted: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(alignment: Alignment, use: Sequence[bool], reason: Sequence[str | None], record: TiltSeriesRecord) -> State:
        """At the beginning; any local motion in the alignment is taken off."""
        whole = alignment.model_copy(update={"deformation": None})
        count = len(use)
        return State(whole, list(use), list(reason), record.tilts.order, torch.ones(count), np.full(count, np.inf))

    @property
    def geometry(self) -> TiltGeometry:
        """As the forward model needs it."""
        return TiltGeometry.of(self.alignment, self.use)


def scale_of(pixel_size: float, diameter: float, radius: float, reach: float, depth: float) -> Scale:
    """A scale whose box isn't too small to hold anything, and whose reach isn't too far for the box; lengths in Å."""
    diameter = max(diameter, LEAST_BOX * pixel_size)
    return Scale(pixel_size, diameter, radius, min(reach, 0.4 * diameter / tracks.WINDOW), depth)


def tomogram(pyramid: Pyramid, geometry: TiltGeometry, depth: float) -> tuple[Tensor, float]:
    """A coarse tomogram of `depth` Å, and its voxel size."""
    binning = pyramid.near(max(pyramid.field) / VOXELS)
    pixel_size = pyramid.pixel_size * binning
    return landmarks.coarse_tomogram(pyramid.level(binning), pixel_size, geometry, depth), pixel_size


def refit(pyramid: Pyramid, state: State, seen: Tracks, freedom: bundle.Freedom | None) -> bundle.Fit:
    """Fit geometry and landmarks to tracks."""
    position = np.where(np.array(state.use)[:, None, None], seen.position, np.nan)
    extent = (*pyramid.field, state.alignment.thickness or SLAB)
    start = bundle.Geometry.of(state.alignment)
    state.fit = bundle.adjust(Tracks(position, seen.information), start, freedom, state.order, field=extent)
    return state.fit
