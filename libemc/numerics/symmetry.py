"""Point groups as rotation matrices, and the averaging of a map over one.

The setting of every group is fixed here and nowhere else (RELION's, held to RELION's own operators in the tests). Add a
group by adding its generators.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise, product

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from libemc.errors import InputError
from libemc.numerics.grids import centred_coordinates

_PHI = (1 + math.sqrt(5)) / 2
_GENERATORS: dict[str, list[tuple[int, tuple[float, float, float]]]] = {
    "t": [(3, (0.0, 0.0, 1.0)), (2, (0.0, math.sqrt(2 / 3), math.sqrt(1 / 3)))],
    "o": [(4, (0.0, 0.0, 1.0)), (3, (1.0, 1.0, 1.0))],
    "i1": [(2, (1.0, 0.0, 0.0)), (5, (_PHI, 0.0, -1.0)), (3, (_PHI**2, 1.0, 0.0))],
    "i2": [(2, (0.0, 0.0, 1.0)), (5, (1.0, 0.0, _PHI)), (3, (0.0, 1.0, _PHI**2))],
}
"""Generators (order n, axis along x, y, z) of the polyhedral groups."""

_EDGE_TOLERANCE = 1e-6
"""Pixels by which rounding may carry a rotated edge pixel out of its box."""

_SLAB_VOXELS = 1 << 21
"""Voxels that the portable route rotates at a time: bounds its memory to some 300 MB beyond the maps."""


def _rotation(order: int, axis: tuple[float, float, float]) -> Tensor:
    """Active rotation by 360/order degrees about `axis`: (3, 3)."""
    x, y, z = (c / math.hypot(*axis) for c in axis)
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(2 * math.pi / order * cross)


def _closure(generators: list[Tensor]) -> Tensor:
    """All products of the generators, the identity first: (G, 3, 3)."""
    group = [torch.eye(3, dtype=torch.float64)]
    for member in group:  # grows while it is walked, until every product is known
        for generator in generators:
            product = member @ generator
            if all((product - known).abs().max() > 1e-6 for known in group):
                group.append(product)
    return torch.stack(group)


@lru_cache(maxsize=64)
def _group(name: str) -> Tensor:
    match = re.fullmatch(r"([cd])([1-9]\d{0,2})", name)
    if match:
        turn = _rotation(int(match[2]), (0.0, 0.0, 1.0))
        axial = torch.stack([torch.matrix_power(turn, k) for k in range(int(match[2]))])
        flip = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
        return axial if match[1] == "c" else torch.cat([axial, axial @ flip])
    if name == "i":
        return _group("i1")
    if name in _GENERATORS:
        return _closure([_rotation(order, axis) for order, axis in _GENERATORS[name]])
    raise InputError(f"unknown symmetry '{name}'", remedy="use cN, dN, t, o, i (= i1) or i2, for example c7")


def symmetry_matrices(name: str) -> Tensor:
    """The rotations of a point group, the identity first.

    Cn and Dn have the n-fold along z, Dn a 2-fold along x; T a 3-fold along z and a 2-fold in the yz plane; O the
    4-folds along x, y and z; I (= I1) and I2 the 2-folds along x, y and z, and differ by a quarter turn. This is
    RELION's setting, except that RELION 3.1 reads a bare "I" as I2.

    Args:
        name: "c1", "c7", "d2", "t", "o", "i", "i1", "i2", ...; either case.

    Returns:
        (G, 3, 3) float64. A pose equivalent to R is R @ S for each S of these.

    Raises:
        InputError: the name is not that of a group.
    """
    return _group(name.strip().lower()).clone()


def _spline_coefficients(volume: Tensor) -> Tensor:
    """Coefficients of the periodic cubic B-spline that passes through the samples of a (z, y, x) map."""
    spectrum = torch.fft.rfftn(volume)
    for dim, n in enumerate(volume.shape):
        k = torch.arange(spectrum.shape[dim], device=volume.device, dtype=volume.dtype)
        gain = (2 + torch.cos(2 * math.pi * k / n)) / 3  # transform of the samples 1/6, 4/6, 1/6 of the spline
        spectrum = spectrum / gain.reshape([-1 if d == dim else 1 for d in range(3)])
    return torch.fft.irfftn(spectrum, s=volume.shape)


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _average_compiled(padded, shape, group, rows, out):  # type: ignore[no-untyped-def]
    """Slices rows[0] <= z < rows[1] of the average, into `out` (z, y, x); arguments as of `_average_portable`."""
    nz, ny, nx = shape
    wx, wy, wz = np.empty(4, out.dtype), np.empty(4, out.dtype), np.empty(4, out.dtype)
    for z in range(rows[0], rows[1]):
        for y in range(ny):
            for x in range(nx):
                rx, ry, rz = x - nx // 2, y - ny // 2, z - nz // 2
                total, count = 0.0, 0
                for g in group:
                    px = g[0, 0] * rx + g[0, 1] * ry + g[0, 2] * rz + nx // 2
                    py = g[1, 0] * rx + g[1, 1] * ry + g[1, 2] * rz + ny // 2
                    pz = g[2, 0] * rx + g[2, 1] * ry + g[2, 2] * rz + nz // 2
                    low, high = min(px, py, pz), max(px - nx, py - ny, pz - nz) + 1
                    if low < -_EDGE_TOLERANCE or high > _EDGE_TOLERANCE:
                        continue
                    ix, iy, iz = math.floor(px), math.floor(py), math.floor(pz)
                    for t, w in ((px - ix, wx), (py - iy, wy), (pz - iz, wz)):
                        u = 1 - t
                        w[0], w[1] = u * u * u / 6, (4 - 6 * t * t + 3 * t * t * t) / 6
                        w[2], w[3] = (4 - 6 * u * u + 3 * u * u * u) / 6, t * t * t / 6
                    for i in range(4):
                        for j in range(4):
                            row = padded[iz + 1 + i, iy + 1 + j]
                            line = wx[0] * row[ix + 1] + wx[1] * row[ix + 2] + wx[2] * row[ix + 3] + wx[3] * row[ix + 4]
                            total += wz[i] * wy[j] * line
                    count += 1
                out[z, y, x] = total / count


def _average_portable(padded: Tensor, shape: torch.Size, group: Tensor) -> Tensor:
    """Mean over the group of a cubic B-spline, each value as 64 gathers in torch.

    Args:
        padded: spline coefficients with two more samples on every side of (z, y, x).
        shape: of the map without the padding.
        group: (G, 3, 3) float64.

    Returns:
        (z, y, x).
    """
    device, stride = padded.device, (1, padded.shape[2], padded.shape[1] * padded.shape[2])
    size = torch.tensor(shape[::-1], device=device)
    flat, z_slices = padded.flatten(), []
    z, y, x = centred_coordinates(shape, device)
    for slab in z.split(max(1, _SLAB_VOXELS // (shape[1] * shape[2]))):
        r = torch.stack(torch.broadcast_tensors(x, y, slab), dim=-1)
        total, count = torch.zeros_like(r[..., 0]), torch.zeros_like(r[..., 0])
        for matrix in group.to(device):
            points = r @ matrix.T + size // 2
            inside = ((points >= -_EDGE_TOLERANCE) & (points <= size - 1 + _EDGE_TOLERANCE)).all(dim=-1)
            points = torch.minimum(points.clamp_min(0), size - 1)
            whole = points.floor()
            t = points - whole
            u = 1 - t
            taps = (u**3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (4 - 6 * u**2 + 3 * u**3) / 6, t**3 / 6)
            base = ((whole.long() + 1) * torch.tensor(stride, device=device)).sum(dim=-1)
            for i, j, k in product(range(4), repeat=3):
                weight = inside * taps[i][..., 0] * taps[j][..., 1] * taps[k][..., 2]
                total += weight * flat[base + i * stride[0] + j * stride[1] + k * stride[2]]
            count += inside
        z_slices.append((total / count).to(padded.dtype))
    return torch.cat(z_slices)


def symmetrise(volume: Tensor, name: str) -> Tensor:
    """Average a map over a point group, about the origin n//2, by cubic B-spline interpolation.

    The value at r is the mean of the map at S r over those S that keep r in the box, so corners and the unpaired plane
    of an even box are neither darkened nor wrapped. Quarter and half turns about the axes move samples onto samples
    and are exact. Compiled on the CPU, the same in torch elsewhere.

    Args:
        volume: (z, y, x) real.
        name: a group of `symmetry_matrices`.

    Returns:
        (z, y, x), dtype and device of the input.

    Raises:
        InputError: the name is not that of a group.
    """
    group = symmetry_matrices(name)
    if len(group) == 1:
        return volume.clone()
    padded = F.pad(_spline_coefficients(volume)[None, None], (2,) * 6, mode="circular")[0, 0]
    if volume.device.type != "cpu":
        return _average_portable(padded, volume.shape, group)
    out = torch.empty_like(volume, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    edges = [volume.shape[0] * i // (4 * threads) for i in range(4 * threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(_average_compiled, padded.numpy(), tuple(volume.shape), group.numpy(), rows, out.numpy())
            for rows in pairwise(edges)
        ]
        for job in jobs:
            job.result()
    return out
