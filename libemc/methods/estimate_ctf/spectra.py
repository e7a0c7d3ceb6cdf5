"""Power spectra of a tilt series: tiles of every image, each divided by its own smooth background, gathered by the height at
which they show the specimen, by direction and by spatial frequency.

A tile's spectrum is its periodogram under a Hann window. The rings in it are those of the CTF at the height of the specimen's
middle plane there, blurred by all that is known before anything is fitted: the range of heights within the tile
(its slope), the specimen's thickness along the beam, and the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.erase import without_spots
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier

Array = NDArray[np.float64]

PIXEL = 2.0  # Å: finer images are brought to this sampling
TILE = 900.0  # Å: side of a tile, about
COARSEST = 50.0  # Å: longest period looked at
FINEST = 0.95  # of Nyquist
SECTORS = 12  # of the half circle
LAYER = 300.0  # Å: tiles whose heights differ less than this share a spectrum
SMOOTHNESS = 1 / 8  # of the range of frequencies: the standard deviation that smooths a tile's background


@dataclass(frozen=True)
class Spectra:
    """Mean spectra of groups of tiles, each of one tilt and one height.

    Attributes:
        tilt: (G,) number of the image.
        height: (G,) Å, mean of the tiles' q_z on the specimen's middle plane.
        slope: (G,) Å, standard deviation of q_z within a tile, as the window weighs it.
        power: (G, S, K) over the smooth background, about 1.
        count: (G, S, K) how many independent coefficients a value is the mean of; 0 where there is none.
        k: (K,) 1/Å.
        angle: (S,) degrees from +x, counter-clockwise, of the sectors' middles.
        side: Å of a tile.
        beam: (T,) length of the beam's path through a slab of thickness 1.
    """

    tilt: NDArray[np.int64]
    height: Array
    slope: Array
    power: Array
    count: Array
    k: Array
    angle: Array
    side: float
    beam: Array


def _window(n: int) -> tuple[Tensor, float, float]:
    """Hann window (n, n), its rms width in pixels along an axis, and the share of coefficients that are independent."""
    line = torch.hann_window(n, periodic=True)
    u = torch.arange(n) - n / 2
    width = float(((line**2 * u**2).sum() / (line**2).sum()).sqrt())
    spread = torch.fft.fft(line**2).abs() ** 2  # correlation of neighbouring coefficients
    share = float(spread[0] / spread.sum())
    return line[:, None] * line, width, share**2


def _starts(n: int, side: int) -> list[int]:
    """First pixels of tiles that overlap by half or a little more."""
    steps = max(1, math.ceil((n - side) / (side / 2)))
    return [round(i * (n - side) / steps) for i in range(steps + 1)] if n > side else [0]


def measure(
    load: Callable[[int], NDArray[np.float32]], shape: tuple[int, int], pixel_size: float, geometry: TiltGeometry
) -> Spectra:
    """The spectra of all used images.

    Args:
        load: gives image j (rows, columns), for j in 0 ... T-1.
        shape: rows and columns.
        pixel_size: Å.
        geometry: of the T images; its z = 0 is the specimen's middle plane.
    """
    scale = max(1.0, PIXEL / pixel_size)
    rows, columns = (2 * (int(n / scale) // 2) if scale > 1 else n for n in shape)
    down, right = pixel_size * shape[0] / rows, pixel_size * shape[1] / columns  # nearly the same
    px = (down * right) ** 0.5
    n = min(fourier.good_size(round(TILE / px)), rows, columns)
    n -= n % 2
    window, width, share = _window(n)
    frequency = torch.fft.fftfreq(n, down)[:, None], torch.fft.rfftfreq(n, right)[None]
    k = torch.hypot(*frequency)
    first, last = math.ceil(n * px / COARSEST), int(FINEST * n / 2)
    ring = (k * n * px).round().long() - first
    angle = torch.rad2deg(torch.atan2(frequency[0], frequency[1])) % 180
    sector = ((angle + 90 / SECTORS) * SECTORS / 180).floor().long() % SECTORS
    kept = (ring >= 0) & (ring <= last - first) & ~((frequency[1] == 0) & (frequency[0] < 0))
    size = last - first + 1
    index = (sector * size + ring)[kept]
    number = torch.bincount(index, minlength=SECTORS * size).double().reshape(SECTORS, size)
    mean_k = torch.bincount(ring[kept], k[kept].double(), size) / torch.bincount(ring[kept], minlength=size)
    smoother = _smoother(mean_k)
    groups: list[tuple[int, float, float, Tensor, Tensor]] = []
    for j in torch.nonzero(geometry.use)[:, 0].tolist():
        image = torch.from_numpy(np.asarray(load(j), np.float32))
        if scale > 1:
            image = fourier.resize(image - image.mean(), (rows, columns))
        image = without_spots(image, px, j)
        corners = [(y, x) for y in _starts(image.shape[0], n) for x in _starts(image.shape[1], n)]
        tiles = torch.stack([image[y : y + n, x : x + n] for y, x in corners])
        tiles = (tiles - tiles.mean((1, 2), keepdim=True)) * window
        power = torch.view_as_real(torch.fft.rfft2(tiles)).square().sum(-1)[:, kept]
        sums = torch.zeros(len(tiles), SECTORS * size).index_add_(1, index, power)
        sums = sums.reshape(len(tiles), SECTORS, size).double()
        background = torch.exp(torch.log((sums.sum(1) / number.sum(0)).clamp_min(1e-12)) @ smoother)
        sums = sums / background[:, None]
        middle = torch.tensor(corners).flip(1) + n // 2 - torch.tensor([columns // 2, rows // 2])
        height, slope = _heights(geometry, j, middle * torch.tensor([right, down], dtype=torch.float64))
        layer = (height / LAYER).round().long()
        for one in layer.unique().tolist():
            inside = layer == one
            counts = number * (int(inside.sum()) * share * _overlap(n, image.shape))
            mean = sums[inside].sum(0) / (number * int(inside.sum())).clamp_min(1)
            groups.append((j, float(height[inside].mean()), slope * width * px, mean, counts))
    tilt, at, blur, mean_power, counts_ = zip(*groups, strict=True)
    return Spectra(
        tilt=np.array(tilt),
        height=np.array(at),
        slope=np.array(blur),
        power=torch.stack(mean_power).numpy(),
        count=torch.stack(counts_).numpy(),
        k=mean_k.numpy(),
        angle=np.arange(SECTORS) * 180 / SECTORS,
        side=n * px,
        beam=(1 / geometry.matrices[:, 2, 2].abs().clamp_min(0.1)).numpy(),
    )


def _smoother(k: Tensor) -> Tensor:
    """(K, K) matrix whose columns are the weights of a local line in log k: spectra fall steeply where k is small."""
    x, at = torch.log(k), torch.arange(len(k)).double()
    weights = torch.exp(-0.5 * ((at[:, None] - at) / (SMOOTHNESS * len(k))) ** 2)
    weights = weights / weights.sum(0)
    mean = (weights * x[:, None]).sum(0)
    apart = x[:, None] - mean
    return weights * (1 + apart * (x - mean) / (weights * apart**2).sum(0))


def _overlap(n: int, shape: torch.Size) -> float:
    """Share of the tiles that are independent: the mean power of two has the correlation of their squared windows."""
    squared = torch.hann_window(n, periodic=True, dtype=torch.float64).numpy() ** 2
    common = np.correlate(squared, squared, "full")[n - 1 :]
    share = 1.0
    for m in shape:
        starts = np.array(_starts(m, n))
        apart = np.minimum(np.abs(starts[:, None] - starts), n - 1)
        share *= len(starts) / float((common[apart] / common[0]).sum())
    return share


def _heights(geometry: TiltGeometry, j: int, position: Tensor) -> tuple[Tensor, float]:
    """q_z of the points of the plane z = 0 seen at image positions (N, 2), Å, and its slope per Å across the image."""
    flat, up = geometry.matrices[j, :2, :2], geometry.matrices[j, 2, :2]
    slope = torch.linalg.solve(flat.T, up)
    seen = position / geometry.magnification[j] - geometry.shift[j]
    return seen @ slope, float(slope.norm())
