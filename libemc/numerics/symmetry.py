"""Point groups and helices as lists of operators, and the averaging of a map over one.

The setting of every group is fixed here and nowhere else (RELION's, held to RELION's own operators in the tests). Add a
group by adding its generators.

A helix is named

    helix:RISE,TWIST[,POINT_GROUP][,n=COPIES]      helix:27.3,-166.7    helix:9.4,-27.7,n=13    helix:8.1,30.5,c6

Its axis is z: the density at r comes again at Rz(TWIST)·r + (0, 0, RISE), RISE > 0 in Å, TWIST in degrees; TWIST > 0 is
right-handed. POINT_GROUP (cN or dN about the same axis, c1 by default) acts on top of it. With n=COPIES it is a
pseudo-helix: only so many copies about the middle one are alike, as the protofilaments of a microtubule on either side
of its seam are. Such operators are averaged over, but don't make two poses equal.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

HELIX_PREFIX = "helix:"
HELIX_SHARE = 0.5
"""Share of the length of a box, about its middle, that a helix is averaged over: operators then move by up to a quarter of
the box to either side and what they move is still in it."""

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


@dataclass(frozen=True)
class Helix:
    """A helix about z.

    Attributes:
        rise: Å along z from a copy to the next.
        twist: degrees about z from a copy to the next, -180 to 180; positive is right-handed.
        point_group: "cN" or "dN", on top of it.
        copies: of a pseudo-helix; None for a helix without end.
    """

    rise: float
    twist: float
    point_group: str = "c1"
    copies: int | None = None

    @property
    def name(self) -> str:
        """The text that `helix` reads."""
        parts = [f"{self.rise:.10g}", f"{self.twist:.10g}"]
        parts += [self.point_group] * (self.point_group != "c1")
        parts += [f"n={self.copies}"] * (self.copies is not None)
        return HELIX_PREFIX + ",".join(parts)


@lru_cache(maxsize=64)
def _helix(name: str) -> Helix:
    number = r"([+-]?(?:\d+\.?\d*|\.\d+))"
    match = re.fullmatch(rf"helix:{number},{number}(?:,([cd][1-9]\d{{0,2}}))?(?:,n=([1-9]\d{{0,3}}))?", name)
    remedy = "use helix:RISE,TWIST[,cN or dN][,n=COPIES] in Å and degrees, for example helix:27.3,-166.7"
    if match is None:
        raise InputError(f"unknown symmetry '{name}'", remedy=remedy)
    rise, twist, copies = float(match[1]), float(match[2]), match[4] and int(match[4])
    if rise <= 0:
        raise InputError(f"'{name}': the rise is not above 0", remedy="a left-handed helix has a negative twist")
    if copies and match[3] and match[3][0] == "d":
        raise InputError(f"'{name}': a pseudo-helix has no two-fold across its axis", remedy="use cN with n=COPIES")
    return Helix(rise, twist - 360 * round(twist / 360), match[3] or "c1", copies or None)


def is_helical(name: str) -> bool:
    """Whether a name is meant for that of a helix."""
    return name.strip().lower().startswith(HELIX_PREFIX)


def helix(name: str) -> Helix:
    """The helix of a name.

    Raises:
        InputError: the name is not that of a helix.
    """
    return _helix(re.sub(r"\s*,\s*", ",", name.strip().lower()))


def point_group(name: str) -> str:
    """The point group within a symmetry: the group itself, or that of a helix about its axis.

    Poses R and R·S of this group are the same, and a search over rotations may leave one of them out.

    Raises:
        InputError: the name is not that of a group or helix.
    """
    if is_helical(name):
        return helix(name).point_group
    _group(name.strip().lower())
    return name.strip().lower()


def axial_repeat(name: str) -> float | None:
    """Å along the particle's z within which a pose has one equivalent: the rise of a helix.

    A search of shifts along z needs no more than half of it to either side. None where no shift makes poses equal:
    point groups, and pseudo-helices.

    Raises:
        InputError: the name is not that of a group or helix.
    """
    if not is_helical(name):
        _group(name.strip().lower())
        return None
    return None if helix(name).copies else helix(name).rise


def operators(name: str, box: float | None = None) -> tuple[Tensor, Tensor]:
    """The operators (S, t) of a symmetry: the density at S·r + t is the density at r. The identity is the first.

    With the density at x + R·u that of the reference at u (convention 8), the reference at u is also that at S·u + t; so
    the density at (x + R·t) + (R·S)·u is the reference at u as well, and the pose equivalent to (R, x) is

        (R·S, x + R·t)

    For a point group t is 0. A helix has those operators that move by at most `HELIX_SHARE` / 2 of the box: then the
    middle `HELIX_SHARE` of an average gets all of them from inside the box of every particle. A pseudo-helix has the
    copies -(n-1)//2 ... n//2 of these.

    Args:
        name: of a group or helix.
        box: Å, the length along z; a helix needs it.

    Returns:
        (G, 3, 3) and (G, 3) Å, float64.

    Raises:
        InputError: the name is not that of a group or helix.
        ValueError: a helix without a box.
    """
    if is_helical(name):
        of = helix(name)
        if box is None:
            raise ValueError("the operators of a helix depend on the length of the box")
        return _helical_operators(of, HELIX_SHARE / 2 * box)
    group = symmetry_matrices(name)
    return group, torch.zeros(len(group), 3, dtype=torch.float64)


def _helical_operators(of: Helix, farthest: float) -> tuple[Tensor, Tensor]:
    """`operators` of a helix that move by at most `farthest` Å, those that move least first."""
    last = math.floor(farthest / of.rise + 1e-9)
    first = -last
    if of.copies:
        first, last = max(first, -((of.copies - 1) // 2)), min(last, of.copies // 2)
    steps = torch.tensor(sorted(range(first, last + 1), key=abs), dtype=torch.float64)
    angle = torch.deg2rad(of.twist * steps)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one)
    screw = torch.stack(rows, dim=-1).reshape(-1, 1, 3, 3)
    group = symmetry_matrices(of.point_group)
    shifts = torch.stack((zero, zero, of.rise * steps), dim=-1).repeat_interleave(len(group), dim=0)
    return (screw @ group).reshape(-1, 3, 3), shifts


def _spline_coefficients(volume: Tensor) -> Tensor:
    """Coefficients of the periodic cubic B-spline that passes through the samples of a (z, y, x) map."""
    spectrum = torch.fft.rfftn(volume)
    for dim, n in enumerate(volume.shape):
        k = torch.arange(spectrum.shape[dim], device=volume.device, dtype=volume.dtype)
        gain = (2 + torch.cos(2 * math.pi * k / n)) / 3  # transform of the samples 1/6, 4/6, 1/6 of the spline
        spectrum = spectrum / gain.reshape([-1 if d == dim else 1 for d in range(3)])
    return torch.fft.irfftn(spectrum, s=volume.shape)


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _average_compiled(padded, shape, group, shifts, reach, rows, out):  # type: ignore[no-untyped-def]
    """Slices rows[0] <= z < rows[1] of the average, into `out` (z, y, x); arguments as of `_average_portable`."""
    nz, ny, nx = shape
    wx, wy, wz = np.empty(4, out.dtype), np.empty(4, out.dtype), np.empty(4, out.dtype)
    for z in range(rows[0], rows[1]):
        for y in range(ny):
            for x in range(nx):
                rx, ry, rz = x - nx // 2, y - ny // 2, z - nz // 2
                total, count = 0.0, 0
                for i_g in range(len(group)):
                    g, t = group[i_g], shifts[i_g]
                    px = g[0, 0] * rx + g[0, 1] * ry + g[0, 2] * rz + t[0] + nx // 2
                    py = g[1, 0] * rx + g[1, 1] * ry + g[1, 2] * rz + t[1] + ny // 2
                    pz = g[2, 0] * rx + g[2, 1] * ry + g[2, 2] * rz + t[2] + nz // 2
                    low, high = min(px, py, pz), max(px - nx, py - ny, pz - nz) + 1
                    if low < -_EDGE_TOLERANCE or high > _EDGE_TOLERANCE or abs(pz - nz // 2) > reach:
                        continue
                    ix, iy, iz = math.floor(px), math.floor(py), math.floor(pz)
                    for f, w in ((px - ix, wx), (py - iy, wy), (pz - iz, wz)):
                        u = 1 - f
                        w[0], w[1] = u * u * u / 6, (4 - 6 * f * f + 3 * f * f * f) / 6
                        w[2], w[3] = (4 - 6 * u * u + 3 * u * u * u) / 6, f * f * f / 6
                    for i in range(4):
                        for j in range(4):
                            row = padded[iz + 1 + i, iy + 1 + j]
                            line = wx[0] * row[ix + 1] + wx[1] * row[ix + 2] + wx[2] * row[ix + 3] + wx[3] * row[ix + 4]
                            total += wz[i] * wy[j] * line
                    count += 1
                if count > 0:
                    out[z, y, x] = total / count


def _average_portable(padded: Tensor, shape: torch.Size, group: Tensor, shifts: Tensor, reach: float) -> Tensor:
    """Mean over the operators of a cubic B-spline, each value as 64 gathers in torch.

    Args:
        padded: spline coefficients with two more samples on every side of (z, y, x).
        shape: of the map without the padding.
        group: (G, 3, 3) float64.
        shifts: (G, 3) float64, x, y, z in pixels.
        reach: pixels from the origin along z within which values are taken.

    Returns:
        (z, y, x); what no operator takes to such a value is NaN.
    """
    device, stride = padded.device, (1, padded.shape[2], padded.shape[1] * padded.shape[2])
    size = torch.tensor(shape[::-1], device=device)
    flat, z_slices = padded.flatten(), []
    z, y, x = centred_coordinates(shape, device)
    for slab in z.split(max(1, _SLAB_VOXELS // (shape[1] * shape[2]))):
        r = torch.stack(torch.broadcast_tensors(x, y, slab), dim=-1)
        total, count = torch.zeros_like(r[..., 0]), torch.zeros_like(r[..., 0])
        for matrix, shift in zip(group.to(device), shifts.to(device), strict=True):
            points = r @ matrix.T + shift + size // 2
            inside = ((points >= -_EDGE_TOLERANCE) & (points <= size - 1 + _EDGE_TOLERANCE)).all(dim=-1)
            inside &= (points[..., 2] - shape[0] // 2).abs() <= reach
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


def symmetrise(volume: Tensor, name: str, pixel_size: float | None = None) -> Tensor:
    """Average a map over a symmetry, about the origin n//2, by cubic B-spline interpolation.

    The value at r is the mean of the map at S·r + t over those operators that keep it in the box, so corners and the
    unpaired plane of an even box are neither darkened nor wrapped. Quarter and half turns about the axes move samples
    onto samples and are exact. A helix is averaged from the middle `HELIX_SHARE` of the box along z alone, and so
    continued to the whole box; corners that no operator leaves in the box keep their values. Compiled on the CPU, the
    same in torch elsewhere.

    Args:
        volume: (z, y, x) real.
        name: a group of `symmetry_matrices`, or a helix.
        pixel_size: Å; a helix needs it.

    Returns:
        (z, y, x), dtype and device of the input.

    Raises:
        InputError: the name is not that of a group or helix.
        ValueError: a helix without a pixel size.
    """
    group, shifts, reach = _operators_px(volume.shape[0], name, pixel_size)
    if len(group) == 1:
        return volume.clone()
    padded = F.pad(_spline_coefficients(volume)[None, None], (2,) * 6, mode="circular")[0, 0]
    if volume.device.type != "cpu":
        average = _average_portable(padded, volume.shape, group, shifts, reach)
        return torch.where(average.isnan(), volume, average)
    out = volume.clone(memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    edges = [volume.shape[0] * i // (4 * threads) for i in range(4 * threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(
                _average_compiled,
                padded.numpy(),
                tuple(volume.shape),
                group.numpy(),
                shifts.numpy(),
                reach,
                rows,
                out.numpy(),
            )
            for rows in pairwise(edges)
        ]
        for job in jobs:
            job.result()
    return out


def _operators_px(length: int, name: str, pixel_size: float | None) -> tuple[Tensor, Tensor, float]:
    """Operators that a box of `length` pixels along z is averaged over, shifts in pixels, and the reach along z."""
    if not is_helical(name):
        return *operators(name), math.inf
    if pixel_size is None:
        raise ValueError("a helix in Å can only be applied to a map of known pixel size")
    of = helix(name)
    # a rise at least, so that every place has a copy; copies that end can't be continued
    reach = math.inf if of.copies else max(HELIX_SHARE / 2 * length, of.rise / pixel_size / 2) + _EDGE_TOLERANCE
    group, shifts = _helical_operators(of, pixel_size * (length / 2 + min(reach, length / 2)))
    return group, shifts / pixel_size, reach
