"""The average of a set at its present poses: half maps, the FSC between them, and the Wiener-filtered whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.postprocess import GOLD_STANDARD, Resolution, half_map_resolution
from libemc.methods.subtilts import Batch, Particles, Progress, batches_by_half, load_batch, noise_spectrum
from libemc.numerics.slices import Accumulator, Band
from libemc.numerics.symmetry import operators
from libemc.numerics.threads import in_threads

RUN_BELOW = 3
"""Consecutive shells below the threshold that end the signal."""
DEFAULT_MASK = 0.85
"""Radius of the spherical mask used when none is given, as a fraction of half the box."""
MASK_EDGE = 5.0
"""Width of its soft edge in pixels."""
COPIES = 3
"""Size of all that a subtomogram takes on the way, over that of its accumulator."""
HIGHEST_FSC = 0.999
"""Above it the signal-to-noise ratio is not known, only large."""


@dataclass(frozen=True)
class HalfMaps:
    """What a set gives: two half maps and their sums.

    Attributes:
        half1, half2: (n, n, n) unfiltered.
        sums: accumulator of each half.
        images: how many images went into each half.
    """

    half1: Tensor
    half2: Tensor
    sums: tuple[Accumulator, Accumulator]
    images: tuple[int, int]

    @property
    def whole(self) -> Tensor:
        """(n, n, n) both halves together, unfiltered."""
        return 0.5 * (self.half1 + self.half2)


def together(parts: Sequence[HalfMaps]) -> HalfMaps:
    """Half maps of several sets as one."""
    box = parts[0].sums[0].box
    sums = (Accumulator(box), Accumulator(box))
    for part in parts:
        for total, one in zip(sums, part.sums, strict=True):
            total.merge(one)
    images = [sum(part.images[h] for part in parts) for h in (0, 1)]
    return HalfMaps(sums[0].map(), sums[1].map(), sums, (images[0], images[1]))


def insert_batch(
    accumulator: Accumulator, batch: Batch, weight: Tensor | None, operators: tuple[Tensor, Tensor]
) -> None:
    """Insert a batch at its rotations, once for each operator of the symmetry.

    Args:
        weight: (B,) weight of each image; None: 1.
        operators: rotations (G, 3, 3) and shifts (G, 3) px of `numerics.symmetry.operators`: a particle at (R, x) is one at
            (R·S, x + R·t) as well (convention 10).
    """
    squared = batch.transfer**2
    weighted = batch.values if weight is None else batch.values * weight[:, None]
    squared = squared if weight is None else squared * weight[:, None]
    still = replace(batch, values=weighted).centred()
    for rotation, shift in zip(*operators, strict=True):
        values = still
        if shift.any():
            along = torch.einsum("bij,bj->bi", batch.matrices()[:, :2], shift.expand(len(still), 3))
            values = replace(batch, values=weighted).centred(batch.shift + along * batch.magnification[:, None])
        accumulator.add(values, squared, batch.matrices(batch.rotation @ rotation), batch.band, batch.magnification)


def half_maps(
    series: Sequence[Particles],
    memory: int,
    symmetry: str = "c1",
    whiten: bool = True,
    own_noise: bool = False,
    progress: Progress | None = None,
) -> HalfMaps:
    """Insert all used particles of all tilt series into their half's volume, each with its weight.

    Args:
        series: the particles, by tilt series; one box and pixel size.
        memory: bytes that batches may take.
        symmetry: of the particle; every image is inserted once for each operator.
        whiten: divide by the noise power of each tilt series.
        own_noise: also divide by how much each particle's own noise differs from that.
        progress: wraps the loop over the batches of a tilt series.

    Raises:
        InputError: a half has no images.
    """
    box = series[0].file.box
    band = Band.of(box)
    sums = (Accumulator(box), Accumulator(box))
    counts = [0, 0]
    rotations, shifts = operators(symmetry, box * series[0].file.pixel_size)
    copies = (rotations, shifts / series[0].file.pixel_size)
    for particles in series:
        noise = noise_spectrum(particles, band) if whiten else None
        counted = particles.use & (particles.weight > 0)
        for half, piece in batches_by_half(particles, counted, band, memory, progress, "average"):
            batch = load_batch(particles, piece, band, noise, own_noise)
            if len(batch.values):
                own = particles.weight[piece]
                weight = None if bool((own == 1).all()) else own[batch.owner].float()
                insert_batch(sums[half - 1], batch, weight, copies)
            counts[half - 1] += len(batch.values)
    for half, count in enumerate(counts, start=1):
        if not count:
            raise InputError(f"half {half} of the set has no images", series[0].file.set, "use more particles")
    return HalfMaps(sums[0].map(), sums[1].map(), sums, (counts[0], counts[1]))


def signal_to_noise(fsc: Tensor, whole: bool) -> Tensor:
    """Spectral signal-to-noise ratio per shell from the FSC of two halves; `whole`: of both halves' sum (twice as high)."""
    c = fsc.clamp(0.0, HIGHEST_FSC)
    return c / (1 - c) * (2.0 if whole else 1.0)


@dataclass(frozen=True)
class Average:
    """A finished average.

    Attributes:
        average: (n, n, n) both halves together, Wiener filtered by the FSC (unfiltered where there is none to go by).
        fsc: unmasked, masked, phase-randomised and corrected curves, and where they cross the thresholds.
        reach: Å of the last shell that carries signal.
    """

    average: Tensor
    fsc: Resolution
    reach: float

    @property
    def resolution(self) -> float:
        """Å at 0.143 of the corrected curve."""
        return self.fsc.value

    @property
    def corrected(self) -> Tensor:
        """(n//2+1,) the corrected FSC."""
        return self.fsc.curves["corrected"].values


def finish(maps: HalfMaps, mask: Tensor, pixel_size: float, seed: int) -> Average:
    """FSC of two half maps and the Wiener-filtered average of both.

    Args:
        mask: (n, n, n) between 0 and 1, for the masked FSC.
        seed: of the phase randomisation.
    """
    fsc = half_map_resolution(maps.half1, maps.half2, pixel_size, mask, torch.Generator().manual_seed(seed))
    corrected = fsc.curves["corrected"].values
    both = Accumulator(maps.sums[0].box)
    both.merge(maps.sums[0])
    both.merge(maps.sums[1])
    average = both.map(signal_to_noise(for_filters(corrected), whole=True))
    reach = both.box * pixel_size / max(1, last_shell(corrected))
    return Average(average, fsc, reach)


def last_shell(fsc: Tensor) -> int:
    """The last shell that carries signal: the one before the first run of `RUN_BELOW` shells below 0.143.

    One tilt series at one defocus has gaps at the zeros of its CTF; a single shell below the threshold is not the end of
    the signal, for filters and bands. The resolution that is reported is the first crossing all the same.
    """
    below = (fsc < GOLD_STANDARD).tolist()
    for shell in range(1, len(below) - RUN_BELOW + 1):
        if all(below[shell : shell + RUN_BELOW]):
            return shell - 1
    return len(below) - 1


def for_filters(fsc: Tensor) -> Tensor:
    """An FSC to make filters of: 1 at the origin, zero beyond `last_shell`, never negative."""
    out = fsc.clamp_min(0.0).clone()
    out[0] = 1.0
    out[last_shell(fsc) + 1 :] = 0.0
    return out


def subtomograms(
    particles: Particles, index: Sequence[int], memory: float = math.inf, floor: float = 0.05
) -> Iterator[Tensor]:
    """Particles one by one in the specimen's frame, corrected for CTF and dose: (n, n, n) each, white.

    Args:
        index: places in the particle file.
        memory: bytes to stay within: as many threads work as find room, of those that torch has.
        floor: part of each shell's mean weight that is added to the weights: a single particle's CTF zeros and missing
            wedge are left dark rather than amplified.
    """
    band = Band.of(particles.file.box)
    identity = torch.eye(3, dtype=torch.float64)[None]
    free = [Accumulator(band.box)]
    threads = max(1, int(min(torch.get_num_threads(), memory // (COPIES * free[0].sums.nbytes))))
    free += [Accumulator(band.box) for _ in range(threads - 1)]

    def one(place: int) -> Tensor:
        accumulator = free.pop()
        batch = load_batch(particles, torch.tensor([place]), band)
        accumulator.clear()
        accumulator.add(batch.centred(), batch.transfer**2, batch.matrices(identity), band, batch.magnification)
        volume = accumulator.map(floor=floor)
        free.append(accumulator)
        return volume

    yield from in_threads(one, index, threads)
