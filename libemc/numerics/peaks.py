"""Peaks of correlation maps: the highest of each of a batch, or all local maxima of one, to a fraction of a pixel.

Positions are index coordinates in the order (x, y) or (x, y, z); subtract n//2 of each axis for a displacement from the
origin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def _parabola(maps: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Top of the paraboloid through the neighbours of each peak, cross terms included.

    Args:
        maps: (B, *shape).
        index: (P, 1 + d) batch and array index of each peak, in the order of the axes.

    Returns:
        Offsets (P, d) in the order of the axes, within 1 px, and heights (P,), float64. A peak at the border of the
        box, or one whose neighbours bend upwards, stays where it is.
    """
    shape = torch.tensor(maps.shape[1:], device=maps.device)
    d = len(shape)
    stride = torch.tensor([math.prod(maps.shape[2 + i :]) for i in range(d)], device=maps.device)
    flat, start, centre = maps.flatten(), index[:, 0] * math.prod(maps.shape[1:]), index[:, 1:]
    interior = ((centre > 0) & (centre < shape - 1)).all(dim=1)
    safe = torch.minimum(centre.clamp_min(1), shape - 2).clamp_min(0)
    unit = torch.eye(d, dtype=torch.long, device=maps.device)

    def value(step: Tensor) -> Tensor:
        return flat[(torch.minimum((safe + step).clamp_min(0), shape - 1) * stride).sum(dim=1) + start].double()

    top = flat[(centre * stride).sum(dim=1) + start].double()
    here = value(torch.zeros_like(unit[0]))
    up, down = [value(e) for e in unit], [value(-e) for e in unit]
    gradient = torch.stack([(u - v) / 2 for u, v in zip(up, down, strict=True)], dim=1)
    hessian = torch.zeros(len(index), d, d, dtype=torch.float64, device=maps.device)
    for i in range(d):
        hessian[:, i, i] = up[i] + down[i] - 2 * here
        for j in range(i):
            a, b = unit[i], unit[j]
            hessian[:, i, j] = hessian[:, j, i] = (value(a + b) - value(a - b) - value(b - a) + value(-a - b)) / 4
    values, vectors = torch.linalg.eigh(hessian)
    good = interior & (values < 0).all(dim=1)
    values = torch.where(good[:, None], values, -1.0)
    offset = -(vectors @ ((vectors.transpose(1, 2) @ gradient[:, :, None]) / values[:, :, None]))[:, :, 0]
    offset = torch.where(good[:, None] & (offset.abs() <= 1).all(dim=1, keepdim=True), offset, 0.0)
    gain = (gradient * offset).sum(dim=1) + 0.5 * torch.einsum("pi,pij,pj->p", offset, hessian, offset)
    return offset, top + gain


def vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through three equidistant values is highest, in steps from the middle one, at most half a step.

    Where they bend upwards it is the middle one.
    """
    bend = left + right - 2 * middle
    return 0.0 if bend >= 0 else min(max((left - right) / (2 * bend), -0.5), 0.5)


def highest_peak(maps: Tensor, ndim: int = 2) -> tuple[Tensor, Tensor]:
    """The highest point of each map, refined by a paraboloid through its neighbours.

    Args:
        maps: (..., *shape) real, `ndim` axes each.

    Returns:
        Positions (..., ndim) as (x, y[, z]) index coordinates, and heights (...), float64.
    """
    lead, shape = maps.shape[: maps.ndim - ndim], maps.shape[maps.ndim - ndim :]
    flat = maps.reshape(-1, *shape)
    index = torch.stack(torch.unravel_index(flat.flatten(1).argmax(dim=1), shape), dim=1)
    offset, height = _parabola(flat, torch.cat((torch.arange(len(flat), device=maps.device)[:, None], index), dim=1))
    return (index + offset).flip(1).reshape(*lead, ndim), height.reshape(lead)


def find_peaks(
    volume: Tensor, threshold: float, distance_px: float = 2.0, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Local maxima above a threshold, no two nearer than a distance, the highest first.

    A maximum is a pixel that none of its neighbours (8 or 26) exceeds. Taken in order of height, each keeps away
    all lower ones nearer than `distance_px`. Positions are then refined by a paraboloid.

    Args:
        volume: (z, y, x) or (y, x) real.
        threshold: in the units of the map; only higher pixels count.
        distance_px: least distance between two peaks, px.
        limit: at most so many; None for all.

    Returns:
        Positions (P, d) as (x, y[, z]) index coordinates and heights (P,), float64, on the map's device.
    """
    pooled = _MAX_POOL[volume.ndim](volume[None, None], kernel_size=3, stride=1, padding=1)[0, 0]
    index = ((volume == pooled) & (volume > threshold)).nonzero()
    order = volume[tuple(index.unbind(1))].argsort(descending=True, stable=True)
    index = index[order]
    points = index.cpu().numpy()
    tree = cKDTree(points) if len(points) else None
    kept: list[int] = []
    free = [True] * len(points)
    for i, point in enumerate(points):
        if tree is None or (limit is not None and len(kept) >= limit):
            break
        if free[i]:
            kept.append(i)
            for j in tree.query_ball_point(point, distance_px * (1 - 1e-9)):
                free[j] = False
    index = index[kept]
    offset, height = _parabola(volume[None], F.pad(index, (1, 0)))
    return (index + offset).flip(1), height
