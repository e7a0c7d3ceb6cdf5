"""What each particle shows beside the average: its images less the average's as the same images would show it.

The average's slices, with the CTF, dose and weight of each image, are taken off the images before those are inserted: the
average distorted by the particle's own sampling, exactly, also where the box is tight (emClarity 14, 16.11 compare the same,
with a wedge mask). What is left is the difference map before anything is divided by. They are kept, white, for as many passes
as an analysis takes: in memory, or on disk as float16 where there is no room.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.classify.frame import Frame
from libemc.methods.subtilts import Particles, Progress, chunk_size, chunks, load_batch, noise_spectrum
from libemc.numerics.slices import Accumulator, Band, FourierVolume, extract_slices

SAMPLE = 64
"""Particles whose weights say what noise is on each shell."""
BLOCK_BYTES = 1 << 26
"""Of data in float32 that are worked on at a time."""


@dataclass(frozen=True)
class Member:
    """Where a particle is: which tilt series, which place in its file."""

    series: int
    place: int


def members(series: Sequence[Particles]) -> list[Member]:
    """All used particles that some image shows and that have weight, tilt series by tilt series."""
    return [
        Member(number, place)
        for number, p in enumerate(series)
        for place in torch.nonzero(p.use & (p.weight > 0) & p.shown.any(dim=1))[:, 0].tolist()
    ]


def read(
    series: Sequence[Particles],
    chosen: Sequence[Member],
    frame: Frame,
    memory: int,
    average: Tensor | None = None,
    progress: Progress | None = None,
    label: str = "differences",
) -> Iterator[tuple[Tensor, Tensor]]:
    """D (P, Q) complex64 and W (P, Q) float32 of one batch of particles after the other, in the order of `chosen`.

    Args:
        chosen: sorted by tilt series.
        average: (n, n, n) that is taken off the images, unfiltered; None: nothing is.
        memory: bytes that images may take at a time.
    """
    box = series[0].file.box
    band = Band.of(box, frame.radius)
    ball = Accumulator(box, frame.radius, padding=1.0)
    if ball.padded != frame.padded or 2 * ball.half + 1 <= 2 * int(frame.points.max()):
        raise ValueError("the frame is not of these particles' box")
    root = frame.noise.sqrt()
    volume = None if average is None else FourierVolume.from_map(average, radius=frame.radius)
    batches = []
    for number, particles in enumerate(series):
        index = torch.tensor([m.place for m in chosen if m.series == number], dtype=torch.long)
        if len(index):
            spectrum = noise_spectrum(particles, band)
            batches += [
                (particles, piece, spectrum) for piece in chunks(index, chunk_size(particles, Band.of(box), memory))
            ]
    for particles, piece, spectrum in progress(batches, len(batches), label) if progress else batches:
        batch = load_batch(particles, piece, band, spectrum)
        values, squared, matrices = batch.centred(), batch.transfer**2, batch.matrices()
        if volume is not None:
            values = values - squared * extract_slices(volume, matrices.float(), band, batch.magnification.float())
        data, weight = [], []
        for p in range(len(piece)):
            mine = batch.owner == p
            ball.clear()
            ball.add(values[mine], squared[mine], matrices[mine], band, batch.magnification[mine])
            numerator, total = ball.folded()
            data.append(numerator.reshape(-1)[frame.place] / root)
            weight.append(total.reshape(-1)[frame.place] / frame.noise)
        yield torch.stack(data), torch.stack(weight)


def _sample(chosen: Sequence[Member]) -> list[Member]:
    places = np.linspace(0, len(chosen) - 1, min(SAMPLE, len(chosen))).round().astype(int)
    return [chosen[k] for k in places.tolist()]


def with_noise(frame: Frame, series: Sequence[Particles], chosen: Sequence[Member], memory: int) -> Frame:
    """The frame with the mean weight of a sample of the particles on each shell."""
    some = _sample(chosen)
    total = sum(weight.sum(dim=0) for _, weight in read(series, some, frame, memory))
    mean = frame.on_shells(torch.as_tensor(total)) / len(some)
    return replace(frame, noise=frame.noise * mean.clamp_min(1e-6 * float(mean.max())))


def as_shown(
    frame: Frame, series: Sequence[Particles], chosen: Sequence[Member], average: Tensor, memory: int
) -> Tensor:
    """(Q,) complex64: the ball h of an average, as W·h comes closest to what is taken off the images of a sample of particles.

    It is the transform of the map times the kernel's envelope but for a percent that weights leave that change from point to
    point; with h as they make it, D - W·h is three times smaller.
    """
    some, count = _sample(chosen), frame.points.shape[1]
    taken, total = torch.zeros(count, dtype=torch.complex64), torch.zeros(count)
    for sign, off in ((1, None), (-1, average)):
        for data, weight in read(series, some, frame, memory, off):
            taken += sign * data.sum(dim=0)
            total += weight.sum(dim=0) / 2  # the same both times
    return mean_of(taken, total)


@dataclass(frozen=True)
class Differences:
    """N particles in a frame.

    Attributes:
        data: (N, Q, 2) real and imaginary part of D; weight: (N, Q) W; arrays of float16 or float32, on disk perhaps.
        mean: (Q,) complex64, in units of the noise, ΣD over ΣW: what the average that was taken off lacked, or all of it where
            none was; mean_weight: (Q,) float32, mean of W.
        before: (Q,) complex64, the average that was taken off the images, in the same units.
    """

    frame: Frame
    data: NDArray[Any]
    weight: NDArray[Any]
    mean: Tensor
    mean_weight: Tensor
    before: Tensor

    @property
    def average(self) -> Tensor:
        """(Q,) complex64, of the particles, in units of the noise."""
        return self.before + self.mean

    def __len__(self) -> int:
        return len(self.data)

    @property
    def block(self) -> int:
        """Particles that are worked on at a time."""
        return max(16, BLOCK_BYTES // (12 * self.data.shape[1]))

    def blocks(
        self, band: slice, device: torch.device | str = "cpu", progress: Progress | None = None, label: str = ""
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which particles, their differences D - W·mean (P, q) complex64 and W (P, q) within a band of the points."""
        mean = self.mean[band].to(device)
        starts: Any = range(0, len(self), self.block)
        for start in progress(starts, len(starts), label) if progress else starts:
            here = slice(start, min(start + self.block, len(self)))
            data = torch.view_as_complex(_on(self.data[here, band], device))
            weight = _on(self.weight[here, band], device)
            yield here, data - weight * mean, weight
            release(self.data)
            release(self.weight)


def release(array: NDArray[Any]) -> None:
    """Let go of the memory that a mapped file was read or written through; the file has it. Nothing for other arrays."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _on(array: NDArray[Any], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device).float()


def bytes_of(count: int, frame: Frame, dtype: Any) -> int:
    """That so many particles take."""
    return count * frame.points.shape[1] * 3 * np.dtype(dtype).itemsize


def mean_of(data: Tensor, weight: Tensor) -> Tensor:
    """(Q,) the average out of ΣD (Q,) and ΣW (Q,): what no particle shows is left dark."""
    return (data / (weight + 1e-3 * weight.mean())).to(torch.complex64)


def gathered(
    batches: Iterator[tuple[Tensor, Tensor]],
    frame: Frame,
    data: NDArray[Any],
    weight: NDArray[Any],
    before: Tensor | None = None,
) -> Differences:
    """Fill arrays (N, Q, 2) and (N, Q) with what `read` gives, and find the mean of it.

    Args:
        before: (Q,) `as_shown`, of the average that `read` takes off the images; None: it takes off nothing.
    """
    start = 0
    sums = torch.zeros(frame.points.shape[1], dtype=torch.complex128), torch.zeros(frame.points.shape[1]).double()
    for d, w in batches:
        data[start : start + len(d)] = torch.view_as_real(d).numpy()
        weight[start : start + len(w)] = w.numpy()
        sums[0].add_(d.sum(dim=0))
        sums[1].add_(w.sum(dim=0))
        start += len(d)
        release(data)
        release(weight)
    mean = mean_of(*sums)
    before = torch.zeros_like(mean) if before is None else before
    return Differences(frame, data, weight, mean, (sums[1] / max(1, start)).float(), before)
