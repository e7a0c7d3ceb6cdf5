"""How high a score must be: what decoys reach in the same specimen, and how often by chance.

A score is divided by the local strength of decoys' scores, which is that of everything that is not the template: noise, ice,
membranes, the edge of carbon. The highest local maxima of many independent scores have an exponential tail (Gumbel's domain;
Coles 2001, An Introduction to Statistical Modeling of Extreme Values, ch. 4), which is fitted to those of the decoys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

TAIL = 0.1
"""Part of the decoys' local maxima that the tail is fitted to."""
LEAST_TAIL = 20
"""So many of them at least."""
LEAST_STRENGTH = 0.5
"""Of the median strength of the decoys' scores, the least that a score is divided by: nothing gains by emptiness."""
WINDOW = 2.5
"""Times the template's diameter: width of the window in which the strength is a median. What fills less than half has no say."""
LEAST_COUNT = 1e-9
"""Local maxima that are expected where none may be picked."""
LEAST_SCALE = 0.05
"""Of the tail, in z: a handful of maxima must not promise that there is none higher."""


def local_strength(squares: Tensor, diameter_px: float) -> Tensor:
    """Standard deviation of the decoys' scores around each voxel, (z, y, x), from their mean squares: a running median.

    Args:
        diameter_px: of the template, voxels.
    """
    step = max(1, round(diameter_px / 4))
    padding = [(0, -n % step) for n in squares.shape]
    cells = np.pad(squares.numpy(), padding, mode="edge")
    cells = cells.reshape(cells.shape[0] // step, step, cells.shape[1] // step, step, -1, step).mean((1, 3, 5))
    width = max(3, round(WINDOW * diameter_px / step)) | 1
    smooth = ndimage.median_filter(cells, width, mode="nearest")
    smooth = smooth.clip(LEAST_STRENGTH**2 * float(np.median(smooth)))
    axes = [((np.arange(n) + 0.5) / step - 0.5).astype(np.float32) for n in squares.shape]
    for axis, at in enumerate(axes):
        low = np.floor(at).astype(int).clip(0, smooth.shape[axis] - 1)
        high = (low + 1).clip(0, smooth.shape[axis] - 1)
        part = (at - low).clip(0, 1).reshape([-1 if a == axis else 1 for a in range(3)])
        smooth = smooth.take(low, axis) * (1 - part) + smooth.take(high, axis) * part
    return torch.from_numpy(np.sqrt(smooth).astype(np.float32))


@dataclass(frozen=True)
class Background:
    """The tail of the heights of local maxima where nothing is.

    Attributes:
        count: local maxima above `start` that are expected of a search with the template.
        start: z; scale: in which the expected number falls to 1/e.
    """

    count: float
    start: float
    scale: float

    @staticmethod
    def of(heights: Tensor, rotations: int, decoy_rotations: int, share: float = 1.0) -> Background:
        """From the local maxima (P,) of a search with decoys at fewer rotations than the template's.

        Each rotation is another chance: the expected number above any height grows with their number.

        Args:
            share: of these places, where picks may be.
        """
        ordered = heights.double().sort(descending=True).values
        tail = min(len(ordered) - 1, max(LEAST_TAIL, int(TAIL * len(ordered))))
        if tail < 2:
            start = float(ordered[0]) if len(ordered) else 5.0
            return Background(share * rotations / decoy_rotations, start, 0.5)
        start = float(ordered[tail])
        scale = max(LEAST_SCALE, float((ordered[:tail] - start).mean()))
        return Background(share * tail * rotations / decoy_rotations, start, scale)

    def expected(self, z: Tensor) -> Tensor:
        """Number of local maxima above z."""
        return self.count * torch.exp(-(z.double() - self.start) / self.scale)

    def threshold(self, false: float) -> float:
        """The z above which so many are expected."""
        return self.start + self.scale * math.log(max(self.count, LEAST_COUNT) / false)
