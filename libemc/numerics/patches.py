"""Patches: square windows cut out of images around positions that lie anywhere, and what is left of a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def cut_patches(
    images: Sequence[NDArray[Any]] | NDArray[Any], position: Tensor, size: int, fill: float | NDArray[Any] = 0.0
) -> tuple[Tensor, Tensor]:
    """Cut one patch out of each image; only the pixels of the patch are read, so images may be memory maps.

    Args:
        images: N images (y, x) of real numbers: an array [image, y, x], or a list; `[image] * N` for N patches of one.
        position: (N, 2) pixels from the image's centre n//2 (x, y), float64, anywhere.
        size: pixels of a patch's side.
        fill: what a patch holds beyond the edge of its image, one value or (N,); NaN tells afterwards which patches reach
            there.

    Returns:
        Patches (N, size, size) float32, each with the pixel nearest to its position on its own centre size//2, and what is
        left: (N, 2) pixels from there to the position, float64, from -0.5 to below 0.5.
    """
    nearest = torch.floor(position + 0.5)
    patches = np.empty((len(position), size, size), np.float32)
    fills = np.broadcast_to(fill, len(position))
    for patch, image, (right, down), beyond in zip(patches, images, nearest.long().tolist(), fills, strict=True):
        rows, columns = image.shape
        x, y = right + columns // 2 - size // 2, down + rows // 2 - size // 2
        x0, x1, y0, y1 = max(x, 0), min(x + size, columns), max(y, 0), min(y + size, rows)
        if x1 - x0 < size or y1 - y0 < size:
            patch[:] = beyond
        if x1 > x0 and y1 > y0:
            patch[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    return torch.from_numpy(patches), position - nearest
