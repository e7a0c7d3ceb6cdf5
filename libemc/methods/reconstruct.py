"""Tomograms: filtered back-projection by the adjoint of the forward model, tile by tile, in bounded memory.

Every image is binned and filtered once (`prepare_images`). A tile is then a small specimen of its own: the patch of
each image around its projection, with the CTF at its own height, goes through the adjoint of `extract_slices`; tiles overlap
a little and are blended with weights that add up to one (`reconstruct`). The filter is the sampled weight of the
geometry, not a guessed ramp: a coefficient counts the less, the more other tilts have measured it too, to within the
resolution in Fourier space that the specimen's thickness allows (Harauz & van Heel 1986, Optik 73:146; any geometry:
Radermacher 1992). It is the same everywhere, so there are no seams. The images' contrast is kept (convention 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from os import PathLike, fspath
from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.ctf import Optics, ctf, wavelength
from libemc.numerics.dose import exposure_filter
from libemc.numerics.filters import normalise
from libemc.numerics.masks import cosine_edge
from libemc.numerics.patches import cut_patches
from libemc.numerics.rotations import matrix_from_euler
from libemc.numerics.slices import Backprojection, Band
from libemc.numerics.threads import in_threads
from libemc.records import TiltSeriesRecord, Tomogram, need

PAYLOAD = 1 / 3  # of a tile's box on each side of its centre: beyond, the kernel's replicas exceed 4 %
SMALLEST_TILE, LARGEST_TILE = (
    48,
    200,
)  # box in voxels; beyond, the transforms' arrays (> 32 MB) are mapped afresh each time
SECONDS_PER_VOXEL, SECONDS_PER_COEFFICIENT = 11e-9, 49e-9  # of a tile, measured at 2.5 GHz: how `Tiling` weighs sizes
SECONDS_PER_CORRECTED_PIXEL = 12e-9  # of an image's patch whose CTF is corrected, likewise
BYTES_PER_VOXEL = 18  # of a tile at work: half volume, spectrum, two transforms
BYTES_PER_PIXEL = 24  # of a tile's patches: themselves, their spectra, and what of these is inserted
BYTES_PER_RAW_PIXEL = 20  # of an image that is being binned
LIBRARIES = 350e6  # bytes of the process before it has read anything
LEAST_OVERLAP = 8  # voxels over which neighbouring tiles are blended
SIGNAL_NOISE = 1.0  # noise over signal of one undamaged image, which a tomogram's filter assumes
MEAN_FREE_PATH = 4000.0  # Å between inelastic scatterings in ice (emClarity's, guide 16.5.1)
LEAST_VOXELS = 8  # on a side of a tomogram
SINGULAR = 0.05  # cosine of the tilt below which an image has no field
SNR_DECAY = 200.0  # Å: at frequency k the signal-to-noise ratio that --deconvolve assumes falls as exp(-200 Å · k)
DECONVOLVE_HIGHPASS = 1000.0  # Å; what is coarser is damped, since a small CTF(0) would amplify it most
CTF_NOISE = 0.2  # noise over signal power in the Wiener correction of the CTF
EDGE_TAPER = 0.02  # of the image's shorter side
FILTER_PADDING = 1.12  # of the image, for the tails of the filter
NYQUIST_EDGE = 0.06  # cycles per pixel over which the filter falls to zero at Nyquist
DEFAULT_THICKNESS = 3000.0  # Å
THICKNESS_MARGIN = 1.5  # of a known thickness of the specimen, for the tomogram
AMPLITUDE_KEPT = 0.9  # at the border of a tile, of what is corrected with the defocus of its centre (`DefocusStep`)
CTF_MODES = ("none", "phaseflip", "multiply", "wiener")


# ---------------------------------------------------------------------------------------------------------- the grid
@dataclass(frozen=True)
class Grid:
    """A tomogram's voxels.

    Attributes:
        shape: (z, y, x).
        pixel_size: Å.
        centre: (x, y, z) Å of the voxel at n//2 of each axis, from the specimen's origin.
        angles: rot, tilt, psi: v Å from that voxel along the volume's axes is centre + R·v in the specimen.
    """

    shape: tuple[int, int, int]
    pixel_size: float
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def rotation(self) -> Tensor:
        """R of the angles, (3, 3) float64."""
        return matrix_from_euler(*(torch.tensor(a, dtype=torch.float64) for a in self.angles))

    @staticmethod
    def of(
        record: TiltSeriesRecord,
        binning: int,
        thickness: float | None = None,
        region: tuple[float, ...] | None = None,
        angles: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> Grid:
        """The grid of a tilt series: the image's field, its sides exchanged where the tilt axis lies nearer to image x.

        Args:
            binning: image pixels to a voxel.
            thickness: Å along z; by default 1.5 times the alignment's, else 3000 but at most half of the field.
            region: x0, x1, y0, y1, z0, z1 in Å from the origin; cut to whole voxels, it overrules `thickness`.
            angles: rot, tilt, psi, degrees, by which all is turned about its middle.

        Raises:
            InputError: fewer than 8 voxels on a side, or a region that no image shows.
        """
        alignment = need(record, "alignment")
        _, rows, columns = record.source.shape
        pixel_size = record.source.pixel_size * binning
        across = 45 < float(np.median(np.abs(np.asarray(alignment.axis) % 180))) < 135
        n_x, n_y = (rows // binning, columns // binning) if across else (columns // binning, rows // binning)
        if thickness is None and alignment.thickness:
            thickness = max(THICKNESS_MARGIN * alignment.thickness, LEAST_VOXELS * pixel_size)
        elif thickness is None:
            thickness = min(DEFAULT_THICKNESS, min(rows, columns) * record.source.pixel_size / 2)
        n_z = 2 * math.ceil(thickness / pixel_size / 2)
        shape, centre = (n_z, n_y, n_x), (0.0, 0.0, 0.0)
        if region is not None:
            low = [round(v / pixel_size) for v in region[0::2]]
            high = [round(v / pixel_size) for v in region[1::2]]
            sides = [b - a for a, b in zip(low, high, strict=True)]
            shape = (sides[2], sides[1], sides[0])
            middle = [(a + n // 2) * pixel_size for a, n in zip(low, sides, strict=True)]
            centre = (middle[0], middle[1], middle[2])
        grid = Grid(shape, pixel_size, centre, angles)
        if region is not None:
            _check_seen(record, grid)
        if min(shape) < LEAST_VOXELS:
            what = f"a tomogram of {shape[2]} x {shape[1]} x {shape[0]} voxels is too small"
            raise InputError(what, record.name, "choose a smaller --bin or a larger --thickness or --region")
        return grid


def _check_seen(record: TiltSeriesRecord, grid: Grid) -> None:
    """Raise unless some used image shows some of a lattice of points of a volume."""
    halves = [n * grid.pixel_size / 2 for n in grid.shape[::-1]]
    lattice = torch.cartesian_prod(*(torch.linspace(-h, h, 9, dtype=torch.float64) for h in halves))
    points = torch.tensor(grid.centre, dtype=torch.float64) + lattice @ grid.rotation.T
    positions, _ = TiltGeometry.of(need(record, "alignment"), record.tilts.use).project(points)
    _, rows, columns = record.source.shape
    half = torch.tensor([columns, rows]) * record.source.pixel_size / 2
    if not bool(((positions.abs() < half).all(dim=2) & torch.tensor(record.tilts.use)).any()):
        remedy = f"the images reach about {half[0]:.0f} and {half[1]:.0f} Å from the centre"
        raise InputError("no used image shows anything of --region", record.name, remedy)


@dataclass(frozen=True)
class TileLimits:
    """What a correction of the CTF asks of tiles, all of whose voxels are corrected with the defocus of the centre.

    What was imaged with sin χ and is corrected for χ + δ keeps cos δ of its amplitude, with δ = π λ k² times the distance from
    the centre along the beam. It shall be 0.9 or more in the worst corner of the tile in the worst tilt, at the highest
    frequency that is wanted. emClarity asks the same of the mean over a section along z, and takes that for the strips
    across the tilt axis too (its guide, 16.7.2); the mean over such a tile is 0.96 or more. And the CTF sends a frequency
    |λ z k - Cs λ³ k³| from where it comes: an image's patch must be wider than the tile by that, or it is lost.

    Attributes:
        beams: (T, 3) change of the height, without its sign, over a voxel along z, y and x in each tilt, in voxels.
        most: height over a tile's centre, in voxels.
        margin: voxels around a tile.
    """

    beams: NDArray[np.float64]
    most: float
    margin: int

    def worst(self, keep: tuple[int, int, int]) -> tuple[float, int]:
        """Of a tile of `keep` voxels: the height of its worst corner over its centre, and the axis to which that owes most."""
        heights = self.beams * np.array(keep) / 2
        tilt = int(heights.sum(axis=1).argmax())
        return float(heights[tilt].sum()), int(heights[tilt].argmax())


@dataclass(frozen=True)
class Tiling:
    """How a volume is cut into tiles.

    Attributes:
        box: voxels of a tile's cube.
        edges: per axis (z, y, x) the bounds of the tiles, from 0 to the axis's length.
        overlap: voxels around an inner bound over which the tiles on both sides are blended.
        patch: pixels of the side of the images' patches that are corrected for the CTF; 0 for none.
    """

    box: int
    edges: tuple[tuple[int, ...], ...]
    overlap: int
    patch: int = 0

    @staticmethod
    def of(
        shape: tuple[int, int, int],
        tilts: int,
        memory: float = math.inf,
        threads: int = 1,
        limits: TileLimits | None = None,
    ) -> Tiling:
        """The tiling that takes least time within `memory` bytes, and within the limits of a correction of the CTF.

        Raises:
            InputError: none does with so little.
        """
        best: tuple[float, Tiling] | None = None
        least = math.inf
        for box in fourier.GOOD_SIZES:
            if box < SMALLEST_TILE or box > LARGEST_TILE:
                continue
            overlap = max(LEAST_OVERLAP, box // 16)
            whole = 2 * int(box * PAYLOAD)
            counts = [1 if n <= whole else math.ceil(n / (whole - overlap)) for n in shape]
            patch = 0 if limits is None else fourier.good_size(box + 2 * limits.margin)
            tiling = Tiling(box, _cut(shape, counts), overlap, patch)
            while limits is not None:
                height, axis = limits.worst(tiling.keep)
                counts[axis] += 1
                if height <= limits.most or shape[axis] < counts[axis] * overlap:
                    break
                tiling = replace(tiling, edges=_cut(shape, counts))
            seconds, size = len(tiling) * tiling.seconds(tilts), tiling.bytes(tilts, threads)
            least = min(least, size)
            if size <= memory and (best is None or seconds < best[0]):
                best = seconds, tiling
        if best is None:
            what = (
                f"a tomogram of {shape[2]} x {shape[1]} x {shape[0]} voxels takes {(least + LIBRARIES) / 2**20:.0f} MB"
            )
            raise InputError(what, None, "give more --memory, or a larger --bin, or a --region")
        return best[1]

    def bytes(self, tilts: int, threads: int = 1) -> float:
        """Estimate of the memory that `reconstruct` takes, beside the images."""
        z, y, x = self.keep
        worker = BYTES_PER_VOXEL * self.box**3 + BYTES_PER_PIXEL * tilts * max(self.box, self.patch) ** 2
        slabs = self.edges[0][-1] * self.edges[2][-1] * (2 * y + self.overlap)  # one being written, one being filled
        return threads * worker + 4.0 * (slabs + (threads + 2) * x * y * z)

    def __len__(self) -> int:
        return math.prod(len(e) - 1 for e in self.edges)

    def seconds(self, tilts: int) -> float:
        """Estimate of the time that one tile takes one core."""
        inserted = SECONDS_PER_COEFFICIENT * math.pi / 8 * self.box**2
        return SECONDS_PER_VOXEL * self.box**3 + tilts * (inserted + SECONDS_PER_CORRECTED_PIXEL * self.patch**2)

    @property
    def keep(self) -> tuple[int, int, int]:
        """Voxels of each axis that the largest tile fills, its share of the overlaps included."""
        z, y, x = (max(b - a for a, b in pairwise(e)) + (len(e) > 2) * self.overlap for e in self.edges)
        return z, y, x

    def span(self, axis: int, i: int) -> tuple[int, int]:
        """First and last-plus-one voxel of tile i along an axis, its share of the overlaps included."""
        edges, half = self.edges[axis], self.overlap // 2
        return edges[i] - half * (i > 0), edges[i + 1] + half * (i + 2 < len(edges))

    def centre(self, index: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxel (z, y, x) on which a tile's cube is centred; what is kept may be wider than a tile at the border needs."""
        z, y, x = (low + (high - low) // 2 for low, high in (self.span(axis, i) for axis, i in enumerate(index)))
        return z, y, x

    def point(self, index: tuple[int, int, int], grid: Grid) -> Tensor:
        """(x, y, z) Å of a tile's centre in the specimen, float64."""
        world = [(m - n // 2) * grid.pixel_size for m, n in zip(self.centre(index), grid.shape, strict=True)]
        return torch.tensor(world[::-1], dtype=torch.float64) + torch.tensor(grid.centre, dtype=torch.float64)

    def window(self, axis: int, i: int) -> Tensor:
        """Blending weights of the voxels of `span`: squared cosines, which add up to one with the neighbour's."""
        low, high = self.span(axis, i)
        width = 2 * (self.overlap // 2)
        ramp = torch.sin((torch.arange(width) + 0.5) * (math.pi / 2 / width)) ** 2
        weights = torch.ones(high - low)
        if i > 0:
            weights[:width] *= ramp
        if i + 2 < len(self.edges[axis]):
            weights[-width:] *= ramp.flip(0)
        return weights


def _cut(shape: tuple[int, int, int], counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Bounds along each axis of so many tiles of as good as equal size."""
    return tuple(tuple(n * i // c for i in range(c + 1)) for n, c in zip(shape, counts, strict=True))


# ---------------------------------------------------------------------------------------------------------- the filter
@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _density(normal, weights, shell, scale, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """out[y, x] = Σ_i weights[i, shell[y, x]] · max(0, 1 - |normal[i]·k|), with k = (x, signed y)·scale."""
    rows, columns = out.shape
    out[:] = 0
    for i in range(len(normal)):
        step = normal[i, 0] * scale[0]
        for y in range(rows):
            base = normal[i, 1] * scale[1] * (y if y < (rows + 1) // 2 else y - rows)
            first, last = 0, columns  # beyond them, |base + step·x| >= 1
            if step != 0:
                a, b = (-1 - base) / step, (1 - base) / step
                first = max(0, math.floor(max(min(a, b), -1.0)))
                last = math.ceil(max(min(max(a, b), float(columns)), 0.0))
            elif abs(base) >= 1:
                last = 0
            for x in range(first, last):
                near = 1 - abs(base + step * x)
                if near > 0:
                    out[y, x] += weights[i, shell[y, x]] * near


SHELLS = 1024  # entries per cycle per pixel of the radial tables


def _radial(values: Callable[[Tensor], Tensor]) -> Tensor:
    """Tabulate a function of |k| (cycles per pixel) up to the corner of the Fourier square."""
    return values(torch.arange(int(SHELLS * 0.75)) / SHELLS).float()


@dataclass(frozen=True)
class Weighting:
    """What the filter of the images is made from.

    Attributes:
        thickness: Å; slices nearer to each other than its inverse measure the same.
        doses: (T,) e/Å² at the end of each exposure, for dose weighting; None for none.
        errors: (T,) Å rms, expected of the positions in each image; None for not known.
        paths: (T,) Å through the specimen; None for not known.
        noise: over the signal of one undamaged image, power; what one image alone saw is not amplified beyond it.
        voltage: kV.
        lowpass, highpass: Å; None for the resolution of the voxels, and for none.
        field: Å along x and y of the specimen that the tomogram can show; what lies beyond, and comes into the images at
            high tilt only, is tapered away. None: all stays.
    """

    thickness: float
    doses: Tensor | None = None
    errors: Tensor | None = None
    paths: Tensor | None = None
    noise: float = 0.0
    voltage: float = 300.0
    lowpass: float | None = None
    highpass: float | None = None
    field: tuple[float, float] | None = None

    @staticmethod
    def of(
        record: TiltSeriesRecord,
        grid: Grid,
        tilts: Sequence[int],
        dose: bool,
        lowpass: float | None,
        deconvolve: bool = False,
    ) -> Weighting:
        """For some tilts of a record: its specimen's thickness, or that of the grid; its doses, if wanted and known; the
        alignment's errors, and the paths through the specimen, where it knows them.

        With `deconvolve` there's the high-pass filter that goes with that correction of the CTF.

        The field is that of the whole tomogram, though the grid may be a part of it: a part looks like the whole.
        """
        alignment, t = need(record, "alignment"), record.tilts
        doses = None
        if dose and t.dose is not None and t.dose_before is not None:
            doses = torch.tensor([t.dose[j] + t.dose_before[j] for j in tilts])
        expected = [None if alignment.error is None else alignment.error[j] for j in tilts]
        errors = None if None in expected else torch.tensor(expected)
        paths = None
        if alignment.thickness:
            upright = TiltGeometry.of(alignment, t.use).matrices[list(tilts), 2, 2].abs().clamp_min(SINGULAR)
            paths = alignment.thickness / upright
        thickness = alignment.thickness or grid.shape[0] * grid.pixel_size
        _, y, x = Grid.of(record, 1, LEAST_VOXELS * record.source.pixel_size).shape
        field = (x * record.source.pixel_size, y * record.source.pixel_size)
        highpass = DECONVOLVE_HIGHPASS if deconvolve else None
        voltage = record.source.voltage
        return Weighting(thickness, doses, errors, paths, SIGNAL_NOISE, voltage, lowpass, highpass, field)

    def signal(self, k: Tensor) -> Tensor:
        """(T, K) or (1, K) amplitude that each image has of the signal, its noise being 1, at K frequencies in 1/Å.

        The exposure filter, exp(-π² k² error²) of the errors (the mean of the phase factors of Gaussian errors of such rms
        in the plane), and the root of the share of the electrons that stay elastic, over that of the shortest path: images
        are scaled to unit noise, which goes with the root of the electrons.
        """
        signal = torch.ones(1, len(k))
        if self.doses is not None:
            signal = signal * exposure_filter(k, self.doses.reshape(-1, 1), self.voltage)
        if self.errors is not None:
            signal = signal * torch.exp(-((math.pi * k * self.errors.reshape(-1, 1)) ** 2))
        if self.paths is not None:
            longer = (self.paths - self.paths.min()).reshape(-1, 1)
            signal = signal * torch.exp(-longer / (2 * MEAN_FREE_PATH))
        return signal.float()

    @property
    def corrections(self) -> list[str]:
        """What it does, in words."""
        dose = [] if self.doses is None else ["dose"]
        return dose if self.lowpass is None else [*dose, f"lowpass {self.lowpass:g}"]


def filters(
    geometry: TiltGeometry, shape: tuple[int, int], pixel_size: float, weighting: Weighting
) -> Iterator[Tensor]:
    """The weights of every image's Fourier coefficients, one rfft layout (y, x//2+1) float32 after the other.

    For tilt j at k: q_j / (Σ_i q_i² · max(0, 1 - D·|distance of the point from slice i|) + noise), with D the thickness
    and q the signal of `Weighting.signal`: the Wiener filter of all images together.
    """
    count = len(geometry.matrices)
    cut = min(0.5, math.inf if weighting.lowpass is None else pixel_size / weighting.lowpass)
    edge = _radial(lambda k: cosine_edge(k, cut - NYQUIST_EDGE, NYQUIST_EDGE))
    if weighting.highpass is not None:
        coarse = weighting.highpass / pixel_size
        edge = edge * _radial(lambda k: 0.5 - 0.5 * torch.cos(math.pi * (k * coarse).clamp_max(1)))
    signal = weighting.signal(_radial(lambda k: k / pixel_size)).expand(count, -1)
    kx, ky = torch.arange(shape[1] // 2 + 1) / shape[1], torch.fft.fftfreq(shape[0])
    shell = (torch.sqrt(ky[:, None] ** 2 + kx**2) * SHELLS).round().long()
    density = np.empty((shape[0], shape[1] // 2 + 1), np.float32)
    matrices = geometry.matrices * geometry.magnification[:, None, None]
    for j in range(count):
        # distances of the points of slice j from every slice, in units of the inverse thickness
        normal = (matrices[:, 2] @ matrices[j, :2].T * weighting.thickness / pixel_size).numpy()
        scale = (1 / shape[1], 1 / shape[0])
        _density(normal, (signal**2).numpy(), shell.numpy(), scale, density)
        yield (signal[j] * edge)[shell] / (torch.from_numpy(density) + weighting.noise)


def binned_shape(shape: Sequence[int], binning: int) -> tuple[int, int]:
    """Rows and columns of an image (rows, columns) binned by a whole number; an incomplete border is cut off."""
    return shape[-2] // binning, shape[-1] // binning


def bin_image(image: Tensor, binning: int) -> Tensor:
    """Bin (..., y, x) images by cropping their Fourier transforms; the origin n//2 stays on the origin."""
    rows, columns = binned_shape(image.shape, binning)
    cropped = fourier.centre_crop(image, (rows * binning, columns * binning))
    return fourier.resize(cropped, (rows, columns))


def field_window(
    geometry: TiltGeometry, j: int, shape: tuple[int, int], pixel_size: float, weighting: Weighting
) -> Tensor:
    """How much the pixels of image j count, (y, x) float32 from 0 to 1: less at its border, and beyond the field.

    A point at height 0 on a side of the field is seen on a straight line in the image. Beyond it, by as much as half of
    the thickness is seen in projection, there's nothing of the field any more, and the window falls to zero.
    """
    width = max(1.0, EDGE_TAPER * min(shape))
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in shape)
    window = torch.ones(shape)
    for axis, line in enumerate((y, x)):
        n = shape[axis]
        ends = cosine_edge(line.abs(), n / 2 - width, width).float()
        window *= ends[:, None] if axis == 0 else ends
    flat = geometry.matrices[j, :2, :2]
    if weighting.field is None or abs(float(torch.linalg.det(flat))) < SINGULAR:
        return window
    inverse = torch.linalg.inv(flat)
    qx, qy = ((line * pixel_size / geometry.magnification[j] - geometry.shift[j, i]) for i, line in ((0, x), (1, y)))
    for row, side in zip(inverse, weighting.field, strict=True):
        length = float(row.norm())  # specimen Å per Å across the line in the image
        depth = abs(float(row @ geometry.matrices[j, :2, 2])) / length * weighting.thickness / 2
        beyond = ((row[0] * qx + row[1] * qy[:, None]).abs() - side / 2) / length
        window *= cosine_edge(beyond, depth, width * pixel_size).float()
    return window


def prepare_images(
    load: Callable[[int], NDArray[Any]],
    geometry: TiltGeometry,
    binning: int,
    pixel_size: float,
    weighting: Weighting,
    out: NDArray[Any],
    clean: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Bin, clean, normalise, taper and filter the images, one after the other.

    Args:
        load: gives image j (rows, columns), of any real type, for j in 0 ... T-1.
        geometry: of the same T images.
        pixel_size: Å, after binning.
        out: (T, *binned_shape) float32 or float16; filled with images of mean 0.
        clean: what else is done to image j, binned: (y, x) to (y, x). None: nothing.

    Yields:
        The number of each image that is done.

    Raises:
        InputError: an image holds values that are not finite.
    """
    rows, columns = out.shape[1:]
    padded = tuple(fourier.good_size(math.ceil(n * FILTER_PADDING)) for n in (rows, columns))
    for j, gain in enumerate(filters(geometry, (padded[0], padded[1]), pixel_size, weighting)):
        image = bin_image(torch.from_numpy(np.array(load(j), dtype=np.float32)), binning)
        if not bool(torch.isfinite(image).all()):
            raise InputError(f"image {j + 1} of the tilt series holds values that are not finite", None, "exclude it")
        if clean is not None:
            image = clean(j, image)
        window = field_window(geometry, j, (rows, columns), pixel_size, weighting)
        image = fourier.centre_pad(window * normalise(image, mask=window), padded)
        spectrum = torch.fft.rfftn(image) * gain
        out[j] = fourier.centre_crop(torch.fft.irfftn(spectrum, s=padded), (rows, columns)).numpy()
        yield j


# ---------------------------------------------------------------------------------------------------------- the CTF
@dataclass(frozen=True)
class CtfCorrection:
    """How, and by what, the images of a tile are corrected.

    Attributes:
        mode: phaseflip, multiply, wiener or deconvolve.
        defocus_u, defocus_v: (T,) Å at the specimen's origin; angle, phase_shift: (T,) degrees.
        handedness: sign of the height in the defocus (convention 13).
        strength, falloff: of deconvolve, a Wiener filter for a signal-to-noise ratio of
            10^(3 strength) · exp(-200 Å · falloff · k): that of Tegunov's deconvolution of tomograms, here at the defocus of
            each tile in each tilt.
        resolution: Å to which it is to hold; None for that of the voxels.
    """

    mode: str
    defocus_u: Tensor
    defocus_v: Tensor
    angle: Tensor
    phase_shift: Tensor
    handedness: int
    optics: Optics
    strength: float = 1.0
    falloff: float = 1.0
    resolution: float | None = None

    @staticmethod
    def of(
        record: TiltSeriesRecord,
        mode: str,
        strength: float = 1.0,
        falloff: float = 1.0,
        resolution: float | None = None,
    ) -> CtfCorrection | None:
        """The correction of all tilts of a record; None for mode none.

        Raises:
            InputError: there is no CTF yet.
        """
        if mode == "none":
            return None
        c, source = need(record, "ctf"), record.source
        u, v, angle, phase = (torch.tensor(x) for x in (c.defocus_u, c.defocus_v, c.angle, c.phase_shift))
        optics = Optics(source.voltage, source.cs, source.amplitude_contrast)
        return CtfCorrection(mode, u, v, angle, phase, c.defocus_handedness, optics, strength, falloff, resolution)

    def select(self, tilts: Sequence[int]) -> CtfCorrection:
        """These tilts only."""
        index = torch.as_tensor(list(tilts), dtype=torch.long)
        parts = {name: getattr(self, name)[index] for name in ("defocus_u", "defocus_v", "angle", "phase_shift")}
        return replace(self, **parts)

    def limits(self, geometry: TiltGeometry, grid: Grid) -> TileLimits:
        """What it asks of tiles; `geometry` is that of the same tilts."""
        k, lam = 1 / max(self.resolution or 0.0, 2 * grid.pixel_size), wavelength(self.optics.voltage)
        beams = (geometry.matrices[:, 2] @ grid.rotation).abs().flip(1)
        most = math.acos(AMPLITUDE_KEPT) / (math.pi * lam * k**2)
        middle = geometry.matrices[:, 2] @ torch.tensor(grid.centre, dtype=torch.float64)
        heights = middle.abs() + beams @ torch.tensor(grid.shape).double() * grid.pixel_size / 2
        defocus = torch.stack([self.defocus_u + heights, self.defocus_v - heights])
        # the slope of χ over 2π: where the frequencies up to k come from
        ks = torch.linspace(0, k, SHELLS, dtype=torch.float64)
        away = [lam * z * ks - self.optics.cs * 1e7 * (lam * ks) ** 3 for z in (defocus.min(), defocus.max())]
        margin = math.ceil(float(torch.stack(away).abs().max()) / grid.pixel_size)
        return TileLimits(beams.numpy(), most / grid.pixel_size, margin)

    def factors(self, heights: Tensor, band: Band, pixel_size: float) -> Tensor:
        """(T, K) what the coefficients are multiplied by, at `heights` (T,) Å along the beam. The contrast is kept."""
        kx, ky = (k.to(heights.device) for k in band.frequencies(pixel_size))
        lift = self.handedness * heights

        def column(x: Tensor) -> Tensor:
            return x.to(heights.device).float()[:, None]

        u, v = column(self.defocus_u.to(lift) + lift), column(self.defocus_v.to(lift) + lift)
        c = ctf(kx, ky, u, v, column(self.angle), column(self.phase_shift), self.optics)
        if self.mode == "phaseflip":
            return torch.where(c < 0, -1.0, 1.0)
        if self.mode == "multiply":
            return c
        if self.mode == "wiener":
            return c / (c**2 + CTF_NOISE)
        k = (kx**2 + ky**2).sqrt()
        return c / (c**2 + torch.exp(SNR_DECAY * self.falloff * k) * 10 ** (-3 * self.strength))

    @property
    def words(self) -> str:
        """What it does, for the record."""
        if self.mode == "deconvolve":
            return f"deconvolve {self.strength:g}, falloff {self.falloff:g}"
        return f"ctf {self.mode}"


# ---------------------------------------------------------------------------------------------------------- the tiles
class _Worker:
    """One tile after the other, in buffers of its own."""

    def __init__(
        self,
        images: NDArray[Any],
        geometry: TiltGeometry,
        grid: Grid,
        correction: CtfCorrection | None,
        tiling: Tiling,
        device: torch.device,
        stretch: float,
    ) -> None:
        self.images, self.geometry, self.grid, self.correction = images, geometry, grid, correction
        self.tiling, self.device = tiling, device
        self.band = Band.of(tiling.box, tiling.box / 2 / stretch, device=device)
        self.columns = (self.band.ky % tiling.box) * (tiling.box // 2 + 1) + self.band.kx
        self.project = Backprojection(tiling.box, tiling.keep, device)

    def __call__(self, index: tuple[int, int, int]) -> Tensor:
        """The tile's voxels (those of `Tiling.span`), times its blending window."""
        spans = [self.tiling.span(axis, i) for axis, i in enumerate(index)]
        middle, point = self.tiling.centre(index), self.tiling.point(index, self.grid)
        positions, heights = self.geometry.project(point[None])
        spectra = self._spectra(positions[0] / self.grid.pixel_size, heights[0])
        values = spectra.reshape(len(spectra), -1)[:, self.columns]
        volume = self.project(values, self.geometry.around(point).to(self.device), self.band).cpu()
        for axis, (i, m, (low, high)) in enumerate(zip(index, middle, spans, strict=True)):
            volume = volume.narrow(axis, self.tiling.keep[axis] // 2 - (m - low), high - low)
            shape = [-1 if a == axis else 1 for a in range(3)]
            volume = volume.mul_(self.tiling.window(axis, i).reshape(shape))
        return volume

    def _spectra(self, positions: Tensor, heights: Tensor) -> Tensor:
        """Spectra (T, n, n//2+1) of the patches at positions (T, 2) px from the image centre; zero beyond the image.

        With a correction they are those of wider patches, corrected for the defocus at `heights` (T,) Å and then cut.
        """
        n = self.tiling.box
        patches, rest = cut_patches(self.images, positions, self.tiling.patch or n)
        patches = patches.to(self.device)
        if self.correction is not None:
            wide = Band.of(self.tiling.patch, device=self.device)
            spectra = torch.fft.rfftn(patches, dim=(1, 2))
            spectra *= wide.put(self.correction.factors(heights.to(self.device), wide, self.grid.pixel_size))
            patches = fourier.centre_crop(torch.fft.irfftn(spectra, s=patches.shape[1:], dim=(1, 2)), (n, n))
        spectra = torch.fft.rfftn(patches, dim=(1, 2))
        # the origin, at pixel n//2 and a fraction, goes to pixel 0: phases of one axis at a time
        offset = (n // 2 + rest).to(self.device)
        for axis, k in ((2, torch.arange(n // 2 + 1)), (1, torch.fft.fftfreq(n, 1 / n))):
            angle = 2 * math.pi / n * k.to(self.device).double() * offset[:, 2 - axis, None]
            phase = torch.polar(torch.ones_like(angle), angle).to(spectra.dtype)
            spectra *= phase[:, None, :] if axis == 2 else phase[:, :, None]
        return spectra


def working_memory(memory: float) -> float:
    """Of the bytes that a process may take, those that are left for images and tiles."""
    return max(memory - LIBRARIES, memory / 4)


def image_format(shape: tuple[int, int, int], memory: float) -> tuple[type[np.floating[Any]], float]:
    """In which precision the filtered images (T, y, x) are kept, and the bytes that they take of `working_memory`.

    Single in up to half of the memory, else half, else they belong in a file: 0 bytes.
    """
    single = math.prod(shape) * 4.0
    if single <= memory / 2:
        return np.float32, single
    return np.float16, single / 2 if single <= memory else 0.0


def _workers(
    grid: Grid, tilts: int, threads: int, memory: float, limits: TileLimits | None = None
) -> tuple[Tiling, int]:
    """The tiling, and how many of the threads can work at a time, that take least time within `memory` bytes."""
    best = Tiling.of(grid.shape, tilts, memory, 1, limits), 1
    for count in range(2, threads + 1):
        try:
            tiling = Tiling.of(grid.shape, tilts, memory, count, limits)
        except InputError:
            break
        if len(tiling) * tiling.seconds(tilts) / count < len(best[0]) * best[0].seconds(tilts) / best[1]:
            best = tiling, count
    return best


def cost(
    grid: Grid,
    source: tuple[int, int, int],
    tilts: int,
    binning: int,
    threads: int,
    memory: float,
    limits: TileLimits | None = None,
) -> tuple[float, float]:
    """Estimates of the seconds and bytes that a tomogram takes, all in all.

    Args:
        source: tilts, rows, columns of the raw stack; tilts: how many of its images are used.
        memory: bytes to stay within.
        limits: of a correction of the CTF.

    Raises:
        InputError: there is no way to.
    """
    spare = working_memory(memory)
    _, images = image_format((tilts, *binned_shape(source, binning)), spare)
    tiling, count = _workers(grid, tilts, threads, spare - images, limits)
    work = max(tiling.bytes(tilts, count), BYTES_PER_RAW_PIXEL * source[1] * source[2])
    return len(tiling) * tiling.seconds(tilts) / count, LIBRARIES + images + work


def reconstruct(
    images: NDArray[Any],
    geometry: TiltGeometry,
    grid: Grid,
    correction: CtfCorrection | None = None,
    memory: float = math.inf,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Back-project filtered images into a volume, which comes as slabs of rows.

    Works in as many threads as torch has and `memory` allows; while it is ample, the result doesn't depend on their number.

    Args:
        images: (T, y, x) of `prepare_images`, at the grid's pixel size, origin at n//2.
        geometry, correction: of the same T images.
        memory: bytes to stay within, beside the images.

    Yields:
        (y0, slab): rows y0, y0 + 1, ... of the volume as (z, y, x) float32, in order and without gaps.

    Raises:
        InputError: so little memory isn't enough.
    """
    device = torch.device(device)
    if any(grid.angles):  # the same in a frame along the volume's axes
        turn = grid.rotation
        geometry = replace(geometry, matrices=geometry.matrices @ turn)
        x, y, z = (turn.T @ torch.tensor(grid.centre, dtype=torch.float64)).tolist()
        grid = Grid(grid.shape, grid.pixel_size, (x, y, z))
    limits = None if correction is None else correction.limits(geometry, grid)
    threads = 1 if device.type != "cpu" else torch.get_num_threads()
    tiling, threads = _workers(grid, len(images), threads, memory, limits)
    counts = [len(e) - 1 for e in tiling.edges]
    stretch = _stretch(geometry, tiling, grid)
    free = [_Worker(images, geometry, grid, correction, tiling, device, stretch) for _ in range(threads)]

    def work(index: tuple[int, int, int]) -> Tensor:
        worker = free.pop()
        try:
            return worker(index)
        finally:
            free.append(worker)

    depth, _, width = grid.shape
    kept = torch.zeros((depth, 0, width))  # rows that the next tiles add to
    for row in range(counts[1]):
        low, high = tiling.span(1, row)
        slab = torch.zeros((depth, high - low, width))
        slab[:, : kept.shape[1]] = kept
        indices = [(z, row, x) for z in range(counts[0]) for x in range(counts[2])]
        for index, tile in zip(indices, in_threads(work, indices, threads), strict=True):
            (z0, z1), (x0, x1) = tiling.span(0, index[0]), tiling.span(2, index[2])
            slab[z0:z1, :, x0:x1] += tile
        done = high if row + 1 == counts[1] else tiling.span(1, row + 1)[0]
        kept = slab[:, done - low :].clone()
        yield low, slab[:, : done - low].numpy()


def small_tomogram(
    images: NDArray[np.float32], geometry: TiltGeometry, grid: Grid, weighting: Weighting
) -> NDArray[np.float32]:
    """A tomogram in memory, (z, y, x), from the used ones of images (T, y, x) at the grid's pixel size."""
    tilts = [j for j in range(len(images)) if bool(geometry.use[j])]
    chosen = geometry.select(tilts)
    filtered = np.empty((len(tilts), *images.shape[1:]), np.float32)
    for _ in prepare_images(lambda j: images[tilts[j]], chosen, 1, grid.pixel_size, weighting, filtered):
        pass
    return np.concatenate([slab for _, slab in reconstruct(filtered, chosen, grid)], axis=1)


def _stretch(geometry: TiltGeometry, tiling: Tiling, grid: Grid) -> float:
    """The largest local scale, 1 or more: the images' coefficients beyond its inverse have no place in a tile's cube."""
    largest = float(geometry.magnification.max())
    if geometry.deformation is not None:
        for z, y, x in product(*(range(len(e) - 1) for e in tiling.edges)):
            local = geometry.around(tiling.point((z, y, x), grid))[:, :2]
            largest = max(largest, float(torch.linalg.matrix_norm(local, ord=2).max()))
    return max(1.0, largest)


def tomogram_entry(
    file: str | PathLike[str], grid: Grid, corrections: Sequence[str], half: Literal[1, 2] | None
) -> Tomogram:
    """What the record says about a tomogram."""
    return Tomogram(
        file=fspath(file),
        pixel_size=grid.pixel_size,
        shape=grid.shape,
        corrections=tuple(corrections),
        half=half,
        centre=grid.centre,
        angles=grid.angles,
    )


def with_tomogram(record: TiltSeriesRecord, made: Tomogram) -> TiltSeriesRecord:
    """The record with a tomogram in the place of any of the same file."""
    others = tuple(t for t in record.tomograms if t.file != made.file)
    return record.model_copy(update={"tomograms": (*others, made)})
