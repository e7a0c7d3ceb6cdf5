"""The heart of the search: a part of a volume correlated with one rotated template after the other, the best kept.

Of the three transforms of each direction two are done plane by plane, in cache, with the product between them: the template
is small, so that its transform along x is cheap, and only the last one, back along x, runs through all of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.match.templates import Template
from libemc.methods.subtilts import Progress
from libemc.numerics import fourier
from libemc.numerics.threads import in_threads

PLANES = 8
"""Planes that are transformed at a time: they stay in a core's own cache."""
LEAK = 2.0
"""Fourier pixels beyond the cutoff that are kept: a part that is cut out of a volume has blurred edges there."""
BATCH = 16
"""Rotations whose templates are made at a time."""
BYTES_SHARED, BYTES_WORKER = 4, 20
"""Per voxel of a part with its margins: its spectrum; a worker's product, correlation and what it keeps."""


@dataclass(frozen=True)
class Part:
    """A box of voxels: from `low` to before `high`, each (z, y, x)."""

    low: tuple[int, int, int]
    high: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        z, y, x = (b - a for a, b in zip(self.low, self.high, strict=True))
        return z, y, x

    def padded(self, whole: Sequence[int], box: int) -> tuple[int, int, int]:
        """Sizes of the transforms, (z, y, x): a template of side `box` centred in the part must not come round the end
        onto data. Zeros beyond both ends of the volume do for both."""
        sizes = []
        for low, high, n in zip(self.low, self.high, whole, strict=True):
            before = max(0, box // 2 - low)
            after = max(0, high + box - 1 - box // 2 - n)
            sizes.append(fourier.good_size(high - low + box - 1 - min(before, after)))
        return sizes[0], sizes[1], sizes[2]


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _keep_best(found, scale, number, best, which):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for i in range(found.size):
        value = found[i] * scale
        better = value > best[i]  # without branches, so that it's done on many voxels at a time
        best[i] = value if better else best[i]
        which[i] = number if better else which[i]


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _keep_spread(found, scale, best, squares):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for i in range(found.size):
        value = found[i] * scale
        squares[i] += value * value
        best[i] = max(best[i], value)


@dataclass(frozen=True)
class _Planes:
    """Some neighbouring planes of the volume's spectrum: numbers first to last-1 along k_x, and of k_y the rows within the band,
    `above` from 0 up and `below` from -1 down."""

    first: int
    last: int
    above: int
    below: int
    spectrum: Tensor


class Correlator:
    """Correlation of a part of a volume with templates: the sum over u of volume(r + u) · template(u) for r in the part.

    Args:
        volume: (z, y, x), any array that can be cut.
        box: side of the templates.
        cutoff: cycles per voxel beyond which the volume has nothing; None: it has everything.
    """

    def __init__(
        self,
        volume: NDArray[Any],
        part: Part,
        box: int,
        device: torch.device | str = "cpu",
        cutoff: float | None = None,
    ) -> None:
        self.part, self.box, self.device = part, box, torch.device(device)
        nz, ny, nx = part.padded(volume.shape, box)
        padded = torch.zeros((nx, ny, nz))
        cut, place = [], []
        for low, n, size in zip(part.low, volume.shape, (nz, ny, nx), strict=True):
            start = low - box // 2
            first, last = max(0, start), min(n, start + size)
            cut.append(slice(first, last))
            place.append(slice(first - start, last - start))
        data = np.asarray(volume[tuple(cut)], dtype=np.float32)
        padded[tuple(reversed(place))] = torch.from_numpy(np.ascontiguousarray(data.transpose(2, 1, 0)))
        self.size = (nx, ny, nz)
        spectrum = torch.fft.rfftn(padded.to(self.device), dim=(1, 2, 0))
        step = PLANES if self.device.type == "cpu" else len(spectrum)
        self.planes = []
        for i in range(0, len(spectrum), step):
            reach = ny if cutoff is None else ny * math.sqrt(max(0.0, (cutoff + LEAK / nx) ** 2 - (i / nx) ** 2)) + LEAK
            if cutoff is not None and i / nx > cutoff + LEAK / nx:
                break
            above = min(ny // 2 + 1, math.floor(reach) + 1)
            below = min(ny - above, math.floor(reach))
            rows = torch.cat([spectrum[i : i + step, :above], spectrum[i : i + step, ny - below :]], dim=1)
            # the products' scale: the transform of a conjugate is ny·nz times the conjugate of the inverse
            self.planes.append(_Planes(i, min(i + step, len(spectrum)), above, below, rows * float(ny * nz)))

    def room(self) -> Tensor:
        """What a call works in."""
        z, y, _ = self.part.shape
        return torch.zeros((self.size[0] // 2 + 1, y, z), dtype=torch.complex64, device=self.device)

    def __call__(self, rotated: Tensor, room: Tensor) -> Tensor:
        """(x, y, z) of the part, for a template [x, y, z] of `Template.rotated`."""
        nx, ny, nz = self.size
        z, y, x = self.part.shape
        lines = torch.fft.rfft(rotated, n=nx, dim=0).conj()
        for p in self.planes:
            columns = torch.fft.ifft(lines[p.first : p.last], n=ny, dim=1)
            if p.above + p.below < ny:
                columns = torch.cat([columns[:, : p.above], columns[:, ny - p.below :]], dim=1)
            plane = torch.fft.ifft(columns, n=nz, dim=2)
            plane *= p.spectrum
            plane = torch.fft.ifft(plane, dim=2)[:, :, :z]
            if p.above + p.below < ny:
                whole = torch.zeros((p.last - p.first, ny, z), dtype=plane.dtype, device=plane.device)
                whole[:, : p.above], whole[:, ny - p.below :] = plane[:, : p.above], plane[:, p.above :]
                plane = whole
            room[p.first : p.last] = torch.fft.ifft(plane, dim=1)[:, :y]
        return torch.fft.irfft(room, n=nx, dim=0)[:x]


@dataclass(frozen=True)
class Found:
    """What a search keeps of a part, each (z, y, x).

    Attributes:
        best: highest score over the rotations; which: number of that rotation, int32 (None where it wasn't wanted).
        squares: mean of the squared scores over the rotations (None where it wasn't wanted).
    """

    best: Tensor
    which: Tensor | None
    squares: Tensor | None


class _Keeper:
    """One worker's room and what it has kept so far, [x, y, z] flat."""

    def __init__(self, correlator: Correlator, spread: bool) -> None:
        self.correlator, self.spread = correlator, spread
        count = int(np.prod(correlator.part.shape))
        self.room = correlator.room()
        self.best = torch.full((count,), -torch.inf, device=correlator.device)
        self.other = torch.zeros(count, dtype=torch.float32 if spread else torch.int32, device=correlator.device)

    def add(self, rotated: Tensor, scale: float, number: int) -> None:
        found = self.correlator(rotated, self.room).reshape(-1)
        if found.device.type == "cpu":
            if self.spread:
                _keep_spread(found.numpy(), np.float32(scale), self.best.numpy(), self.other.numpy())
            else:
                _keep_best(found.numpy(), np.float32(scale), np.int32(number), self.best.numpy(), self.other.numpy())
            return
        found = found * scale
        if self.spread:
            self.other += found**2
        else:
            self.other[found > self.best] = number
        torch.maximum(self.best, found, out=self.best)


def search(
    correlator: Correlator,
    template: Template,
    rotations: Tensor,
    norms: Tensor,
    spread: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Score a part of a volume at all rotations: correlation over norm.

    Works in as many threads as torch has, each with room of its own.

    Args:
        rotations: (N, 3, 3); norms: (N,) what each correlation is divided by.
        spread: keep the mean square instead of the number of the best.
    """
    template = template.to(correlator.device)
    threads = torch.get_num_threads() if correlator.device.type == "cpu" else 1
    free = [_Keeper(correlator, spread) for _ in range(threads)]
    keepers = list(free)

    def work(start: int) -> None:
        keeper = free.pop()
        try:
            for i, rotated in enumerate(template.rotated(rotations[start : start + BATCH]), start):
                keeper.add(rotated, 1 / float(norms[i]), i)
        finally:
            free.append(keeper)

    starts = range(0, len(rotations), BATCH)
    for _ in in_threads(work, progress(starts, len(starts), template.label) if progress else starts, threads):
        pass
    best, other = keepers[0].best, keepers[0].other
    for keeper in keepers[1:]:
        other = other + keeper.other if spread else torch.where(keeper.best > best, keeper.other, other)
        best = torch.maximum(best, keeper.best)
    z, y, x = correlator.part.shape

    def volume(flat: Tensor) -> Tensor:
        return flat.reshape(x, y, z).permute(2, 1, 0).contiguous().cpu()

    if spread:
        return Found(volume(best), None, volume(other) / len(rotations))
    return Found(volume(best), volume(other), None)
