"""Averages placed back at the poses of their particles: the density that they make in a volume, and how it looks.

A map is made ready once (`Model`): cut out of its noise, limited to what the volume's voxels can hold, as a cubic B-spline
with two samples for each voxel. Then every voxel that a particle reaches is asked where it lies in the particle (convention
8), so positions are exact and nothing is rounded to voxels. Maps come as tensors [z, y, x] with the origin at n//2, positions
in Å from the tomogram's centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from libemc.methods.molecular_mask import SHAPE, molecular_region, noise_level
from libemc.methods.postprocess import resample
from libemc.methods.reconstruct import Grid
from libemc.numerics.filters import lowpass
from libemc.numerics.grids import centred_radius
from libemc.numerics.masks import soft_mask_from_map
from libemc.numerics.threads import in_threads

SAMPLES = 2
"""Of the map along each axis for a voxel of the volume: a cubic spline through them is off by less than 1 % at its Nyquist."""
BAND_END, BAND_EDGE = 0.9, 2 / 9
"""Half way down over the volume's Nyquist frequency, and width over that: nothing is left at Nyquist."""
EXTEND, EDGE = 8.0, 15.0
"""Å by which what is placed reaches beyond the density, and over which it falls to zero then; 1 and 2 pixels at least."""
NOTHING = 1e-3
"""Of a map's largest value: what is smaller far out is not placed."""
ROWS = 32
"""Rows of a volume that are made at a time: what a thread holds."""
STEPS = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
"""The 26 voxels around one, over which the slope of its density is taken."""

Array = NDArray[np.float64]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """A map's particle.

    Attributes:
        density: (z, y, x) float32, without what is around the particle, or all of it.
        pixel_size: Å.
        volume: Å³ within the particle's surface.
        radius: Å from the origin of the farthest point of it.
    """

    density: Tensor
    pixel_size: float
    volume: float
    radius: float


def cut(density: Tensor, pixel_size: float, masked: bool = True) -> Cut:
    """Find the particle in a map (`molecular_mask`).

    Args:
        density: (z, y, x), white; pixel_size: Å.
        masked: without what is around the particle, with a soft edge.

    Raises:
        InputError: no particle is found in the map.
    """
    smooth = lowpass(density, pixel_size, SHAPE) if 2 * pixel_size < SHAPE else density
    region, threshold = molecular_region(smooth, noise_level(smooth))
    kept = density.float()
    if masked:
        shape, extend, edge = smooth.where(region, smooth.clamp_max(threshold)), EXTEND / pixel_size, EDGE / pixel_size
        kept = kept * soft_mask_from_map(shape, threshold, max(extend, 1.0), max(edge, 2.0))
    radius = pixel_size * float(centred_radius(region.shape)[region].max())
    return Cut(kept, pixel_size, float(region.sum()) * pixel_size**3, radius)


@dataclass(frozen=True)
class Model:
    """A map ready to be placed.

    Attributes:
        density: (z, y, x) float32, band-limited.
        coefficients: (z + 3, y + 3, x + 3) float32 of its cubic B-spline, one more in front and two more behind.
        pixel_size: Å.
        level: where its surface is: what is above takes the same volume as the particle in the map as it was given.
        radius: Å, of the `Cut`.
        reach: Å from the origin beyond which there is nothing.
    """

    density: Tensor
    coefficients: Tensor
    pixel_size: float
    level: float
    radius: float
    reach: float


def model(particle: Cut, voxel: float) -> Model:
    """Make a map ready for a volume of voxels of so many Å."""
    kept, pixel_size = particle.density, particle.pixel_size
    if pixel_size < voxel:
        kept = lowpass(kept, pixel_size, 2 * voxel / BAND_END, edge=BAND_EDGE)
    fine = max(pixel_size, voxel) / SAMPLES
    kept = resample(kept, fine / pixel_size)
    size = round(particle.volume / fine**3)
    level = float(kept.flatten().topk(max(1, min(size, kept.numel()))).values[-1])
    distance = fine * centred_radius(kept.shape)
    reach = float(distance[kept.abs() > NOTHING * float(kept.abs().max())].max()) + fine
    spline = ndimage.spline_filter(kept.double().numpy(), order=3, mode="grid-wrap")
    coefficients = torch.from_numpy(np.pad(spline, [(1, 2)] * 3, mode="wrap").astype(np.float32))
    return Model(kept, coefficients, fine, level, particle.radius, reach)


@dataclass(frozen=True)
class Poses:
    """Of N particles: rotation (N, 3, 3), particle to specimen, and xyz (N, 3) Å; float64."""

    rotation: Tensor
    xyz: Tensor

    def at(self, which: Tensor) -> Poses:
        """Some of them, by a mask or by their places."""
        return Poses(self.rotation[which], self.xyz[which])

    def within(self, grid: Grid) -> Poses:
        """In the frame of a volume: x, y, z along its axes in Å from its voxel n//2."""
        turn = grid.rotation
        return Poses(turn.T @ self.rotation, (self.xyz - torch.tensor(grid.centre, dtype=torch.float64)) @ turn)

    def inside(self, grid: Grid) -> Tensor:
        """(N,) bool, whose position lies in a volume."""
        n = torch.tensor(grid.shape[::-1])
        index = self.within(grid).xyz / grid.pixel_size + n // 2
        return ((index >= -0.5) & (index < n - 0.5)).all(dim=1)

    def from_corner(self, grid: Grid) -> Poses:
        """In the frame of a volume, but in Å from its first voxel: what viewers take for the position of a voxel."""
        own = self.within(grid)
        return replace(own, xyz=own.xyz + torch.tensor([n // 2 for n in grid.shape[::-1]]) * grid.pixel_size)


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _place(coefficients, fine, reach, rotation, xyz, voxel, origin, first, out):  # type: ignore[no-untyped-def]
    """Add to rows `first` ... of a volume, `out` (z, rows, x), all particles; positions in voxels from its voxel (0, 0, 0)."""
    depth, rows, width = out.shape
    far = reach / voxel
    last = (coefficients.shape[0] - 4, coefficients.shape[1] - 4, coefficients.shape[2] - 4)
    wx, wy, wz = np.empty(4, np.float32), np.empty(4, np.float32), np.empty(4, np.float32)
    for i in range(len(xyz)):
        r, px, py, pz = rotation[i], xyz[i, 0], xyz[i, 1], xyz[i, 2]
        step = voxel / fine
        for y in range(max(first, math.ceil(py - far)), min(first + rows - 1, math.floor(py + far)) + 1):
            for z in range(max(0, math.ceil(pz - far)), min(depth - 1, math.floor(pz + far)) + 1):
                dy, dz = y - py, z - pz
                rest = far * far - dy * dy - dz * dz
                if rest < 0:
                    continue
                half = math.sqrt(rest)
                for x in range(max(0, math.ceil(px - half)), min(width - 1, math.floor(px + half)) + 1):
                    dx = x - px
                    ux = step * (r[0, 0] * dx + r[1, 0] * dy + r[2, 0] * dz) + origin[2]
                    uy = step * (r[0, 1] * dx + r[1, 1] * dy + r[2, 1] * dz) + origin[1]
                    uz = step * (r[0, 2] * dx + r[1, 2] * dy + r[2, 2] * dz) + origin[0]
                    ix, iy, iz = math.floor(ux), math.floor(uy), math.floor(uz)
                    if ix < 0 or iy < 0 or iz < 0 or ix > last[2] or iy > last[1] or iz > last[0]:
                        continue
                    for f, w in ((ux - ix, wx), (uy - iy, wy), (uz - iz, wz)):
                        u = 1 - f
                        w[0], w[1] = u * u * u / 6, (4 - 6 * f * f + 3 * f * f * f) / 6
                        w[2], w[3] = (4 - 6 * u * u + 3 * u * u * u) / 6, f * f * f / 6
                    total = 0.0
                    for a in range(4):
                        for b in range(4):
                            row = coefficients[iz + a, iy + b]
                            line = wx[0] * row[ix] + wx[1] * row[ix + 1] + wx[2] * row[ix + 2] + wx[3] * row[ix + 3]
                            total += wz[a] * wy[b] * line
                    out[z, y - first, x] += total


def placed_rows(placing: Model, grid: Grid, poses: Poses, rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
    """The sum of a map at all poses, some rows of every section after the other: (first row, (z, rows, x) float32).

    The density at x + R·u is the map at u (convention 8), 0 where no particle reaches. What lies outside the volume is cut.
    """
    own = poses.within(grid)
    start = torch.tensor([n // 2 for n in grid.shape[::-1]], dtype=torch.float64)
    index, turn = (own.xyz / grid.pixel_size + start).numpy(), own.rotation.contiguous().numpy()
    origin = np.array([n // 2 for n in placing.density.shape], dtype=np.float64)
    depth, height, width = grid.shape
    coefficients = placing.coefficients.numpy()

    def block(first: int) -> tuple[int, Tensor]:
        out = np.zeros((depth, min(rows, height - first), width), np.float32)
        reach = placing.reach
        _place(coefficients, placing.pixel_size, reach, turn, index, grid.pixel_size, origin, first, out)
        return first, torch.from_numpy(out)

    yield from in_threads(block, range(0, height, rows))


def placed(placing: Model, grid: Grid, poses: Poses) -> Tensor:
    """The sum of a map at all poses, (z, y, x) float32: `placed_rows` as a whole."""
    out = torch.zeros(grid.shape)
    for first, slab in placed_rows(placing, grid, poses):
        out[:, first : first + slab.shape[1]] = slab
    return out


# ------------------------------------------------------------------------------------------------------------- surfaces


@dataclass(frozen=True)
class Mesh:
    """A closed surface: vertices (V, 3) Å, normals (V, 3) outwards, float32; triangles (T, 3) uint32, counter-clockwise."""

    vertices: Pixels
    normals: Pixels
    triangles: NDArray[np.uint32]

    def volume(self) -> float:
        """What it encloses, Å³."""
        a, b, c = self.vertices[self.triangles].astype(np.float64).transpose(1, 0, 2)
        return float(np.einsum("ti,ti->", a, np.cross(b, c)) / 6)


def surface(of: Model) -> Mesh:
    """The surface of a map at its level, in the particle's frame: x, y, z in Å from its origin (marching cubes)."""
    import mcubes

    padded = np.pad(of.density.double().numpy(), 1, constant_values=min(0.0, of.level) - abs(of.level) - 1e-6)
    found, corners = mcubes.marching_cubes(padded, of.level)
    origin = np.array([n // 2 + 1 for n in of.density.shape])
    vertices = ((found - origin)[:, ::-1] * of.pixel_size).astype(np.float32)
    # z, y, x read backwards is a reflection: what ran counter-clockwise runs clockwise then
    triangles = np.ascontiguousarray(corners[:, ::-1].astype(np.uint32))
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    normals = np.zeros_like(vertices)
    for corner in triangles.T:
        np.add.at(normals, corner, np.cross(b - a, c - a))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return Mesh(vertices, normals / np.maximum(length, 1e-12), triangles)


@dataclass(frozen=True)
class Sight:
    """A surface as seen from one side, an image of rows up and columns to the right.

    Attributes:
        depth: (rows, columns) voxels from the side of the volume nearest to the viewer; infinite where there is nothing.
        normal: (rows, columns, 3) outwards: to the right, up and towards the viewer.
        index: (rows, columns, 3) x, y, z of the point in the volume, voxels from its first.
    """

    depth: Pixels
    normal: Pixels
    index: Pixels


def seen(volume: Tensor, level: float, side: str) -> Sight:
    """The surface of a volume at a level as seen along an axis.

    Args:
        volume: (z, y, x).
        side: `top`: from +z, with x to the right and y up; `front`: from -y, with x to the right and z up.
    """
    v = volume.numpy()
    v = v[::-1] if side == "top" else v.transpose(1, 0, 2)
    above = v > level
    hit = above.any(axis=0)
    r, c = np.nonzero(hit)
    k = above.argmax(axis=0)[r, c]

    def value(dk: int, dr: int, dc: int) -> Pixels:
        at = (np.clip(i + d, 0, n - 1) for i, d, n in zip((k, r, c), (dk, dr, dc), v.shape, strict=True))
        return np.asarray(v[tuple(at)], np.float32)

    here, before = value(0, 0, 0), value(-1, 0, 0)
    depth = np.where(k > 0, k - (here - level) / np.maximum(here - before, 1e-30), k)
    # the density falls outwards; the mean over a few neighbours, or single voxels would show as steps
    slope = np.zeros((3, len(k)), np.float32)
    for step in STEPS:
        slope += np.array(step, np.float32)[:, None] * value(*step)
    normal = np.stack([-slope[2], -slope[1], slope[0]], axis=-1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-30)
    place = (c, r, v.shape[0] - 1 - depth) if side == "top" else (c, depth, r)
    seen_from = np.full(hit.shape, np.inf, np.float32)
    seen_from[r, c] = depth
    normals, index = np.zeros((2, *hit.shape, 3), np.float32)
    normals[r, c], index[r, c] = normal, np.stack(place, axis=-1)
    return Sight(seen_from, normals, index)


def nearer(one: Sight, other: Sight) -> tuple[Sight, NDArray[np.bool_]]:
    """What is seen of two surfaces in one volume, and where (rows, columns) that is the other."""
    front = other.depth < one.depth
    kept = {
        name: np.where(front if a.ndim == 2 else front[..., None], getattr(other, name), a)
        for name, a in vars(one).items()
    }
    return Sight(**kept), front
