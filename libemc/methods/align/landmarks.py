"""Landmarks: which points of a specimen to follow, chosen from a coarse tomogram."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from libemc.methods.reconstruct import Grid, Weighting, small_tomogram
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.peaks import find_peaks

DETAIL = 0.1, 0.67  # of a landmark's diameter: the detail by which it stands out
GRID = 4  # points a side, where nothing stands out
CLIP = 8.0  # deviations at which a voxel is cut off: gold must not hide all else
ENERGY_RADIUS = 0.25  # of a landmark's diameter, over which energy is summed
VISIBLE = 0.6  # share of the tilts that must show a landmark
LEAST = 8  # landmarks
EDGE = 0.25  # of a landmark's diameter that its centre keeps from an image's edge


def coarse_tomogram(images: NDArray[np.float32], pixel_size: float, geometry: TiltGeometry, depth: float) -> Tensor:
    """A small tomogram of the whole field.

    Args:
        images: (T, y, x), mean about 0.
        pixel_size: Å, of images and voxels.
        depth: Å along z.

    Returns:
        (z, y, x), origin at n//2; x and y reach as far as the images' longer side.
    """
    n = max(images.shape[1:])
    grid = Grid((2 * max(4, math.ceil(depth / pixel_size / 2)), n, n), pixel_size)
    weighting = Weighting(thickness=depth, lowpass=3 * pixel_size)
    return torch.from_numpy(small_tomogram(images, geometry, grid, weighting))


def blurred(volume: Tensor, sigma: float) -> Tensor:
    """Blurred by a Gaussian of `sigma` pixels along all axes; the borders are repeated."""
    return torch.from_numpy(gaussian_filter(volume.numpy(), sigma, mode="nearest", truncate=3.0))


def find(
    volume: Tensor, pixel_size: float, geometry: TiltGeometry, field: tuple[float, float], diameter: float, most: int
) -> Tensor:
    """Points that stand out, well spread.

    Args:
        volume: of `coarse_tomogram`.
        field: Å of the images along x and y.
        diameter: Å of what will be looked at around each.
        most: at most so many.

    Returns:
        (P, 3) Å.
    """
    widths = [max(part * diameter / 4 / pixel_size, 0.5) for part in DETAIL]
    fine, broad = (blurred(volume, w) for w in widths)
    detail = fine - broad
    detail = detail / (1.4826 * detail.abs().median()).clamp_min(1e-12)
    energy = blurred(detail.clamp(-CLIP, CLIP).square(), max(ENERGY_RADIUS * diameter / pixel_size / 2, 0.7))
    at, height = find_peaks(energy, float(energy.median()), max(0.3 * diameter / pixel_size, 2.0), 20 * most)
    middle = torch.tensor([n // 2 for n in volume.shape[::-1]], dtype=torch.float64)
    points = (at - middle) * pixel_size
    where, _ = geometry.project(points)
    limit = torch.tensor(field, dtype=torch.float64) / 2 - EDGE * diameter
    inside = (where.abs() <= limit).all(-1)[:, geometry.use].double().mean(1)
    keep = inside >= VISIBLE
    if int(keep.sum()) < LEAST:  # then those that most images show, and if need be a grid
        line = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID - 0.5
        y, x = torch.meshgrid(0.8 * line * field[1], 0.8 * line * field[0], indexing="ij")
        points = torch.cat([points, torch.stack([x, y, 0 * x], -1).reshape(-1, 3)])
        height = torch.cat([height, height.new_zeros(GRID**2)])
        inside = torch.cat([inside, inside.new_full((GRID**2,), VISIBLE)])
        keep = inside >= torch.sort(inside, descending=True).values[LEAST]
    points, height = points[keep], height[keep]
    return points[spread(points, height, 0.5 * diameter, most)]


def spread(points: Tensor, score: Tensor, distance: float, most: int) -> list[int]:
    """Choose points: the best first, none nearer to another than `distance`, and all parts of the field.

    The distance is four times that to begin with and then lowered, so that a crowded corner doesn't take all places.
    """
    order = torch.argsort(score, descending=True).tolist()
    chosen: list[int] = []
    for factor in (4.0, 2.0, 1.0):
        for i in order:
            if len(chosen) >= most:
                return chosen
            if not chosen or float((points[chosen] - points[i]).norm(dim=1).min()) >= factor * distance:
                chosen.append(i)
    return chosen
