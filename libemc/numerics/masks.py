"""Masks with soft edges: 1 inside, 0 outside, half a cosine wave between. Centres are at the origin n//2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from libemc.errors import InputError
from libemc.numerics.grids import centred_radius


def cosine_edge(distance: Tensor, start: float, width: float) -> Tensor:
    """1 up to `start`, 0 from `start + width` on, half a cosine wave between; a step down after `start` if width is 0.

    Any shape, any unit; dtype and device of the input.
    """
    if width <= 0:
        return (distance <= start).to(distance.dtype)
    return 0.5 + 0.5 * torch.cos(math.pi * ((distance - start) / width).clamp(0, 1))


def _round_mask(shape: Sequence[int], radius_px: float, edge_px: float, device: torch.device | None) -> Tensor:
    return cosine_edge(centred_radius(shape, device), radius_px, edge_px).float()


def soft_sphere(
    box: int | Sequence[int], radius_px: float, edge_px: float, device: torch.device | None = None
) -> Tensor:
    """A sphere about the origin of a box: 1 up to `radius_px`, 0 from `radius_px + edge_px` on.

    Args:
        box: n for a cube, or (z, y, x).

    Returns:
        (z, y, x) float32.
    """
    return _round_mask((box,) * 3 if isinstance(box, int) else box, radius_px, edge_px, device)


def soft_disc(box: int | Sequence[int], radius_px: float, edge_px: float, device: torch.device | None = None) -> Tensor:
    """A disc about the origin of an image: 1 up to `radius_px`, 0 from `radius_px + edge_px` on.

    Args:
        box: n for a square, or (y, x).

    Returns:
        (y, x) float32.
    """
    return _round_mask((box,) * 2 if isinstance(box, int) else box, radius_px, edge_px, device)


def soft_mask_from_map(volume: Tensor, threshold: float, extend_px: float, edge_px: float) -> Tensor:
    """A mask about the density of a map: 1 up to `extend_px` from any voxel above `threshold`, then a soft edge.

    The distance transform runs on the CPU wherever the map is.

    Args:
        volume: (z, y, x) real, white.
        threshold: in the units of the map.
        extend_px: how far the mask reaches beyond the density.
        edge_px: width of the soft edge beyond that.

    Returns:
        (z, y, x) float32 on the map's device.

    Raises:
        InputError: no voxel is above the threshold.
    """
    dense = (volume > threshold).cpu().numpy()
    if not dense.any():
        raise InputError(
            f"no voxel is above the mask threshold {threshold:g}",
            remedy=f"choose one below the map's maximum, {float(volume.max()):.4g}",
        )
    distance = torch.from_numpy(ndimage.distance_transform_edt(~dense).astype(np.float32))
    return cosine_edge(distance, extend_px, edge_px).to(volume.device)
