"""What particles are compared with, none of them with itself.

The average of a few hundred particles still holds the noise of each of them, where it was put: an image that is compared with
it finds its own noise best at the place, turn and defocus that it was averaged with, and stays there. So each half is divided
into `FOLDS` parts, and a particle is compared with the average of the other parts of its half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libemc.methods.average import HIGHEST_FSC, HalfMaps, for_filters, insert_batch
from libemc.methods.refine.references import Filtering, ReferenceFilter, filter_shells, filtered_references
from libemc.methods.subtilts import Particles, Progress, batches_by_half, load_batch, noise_spectrum
from libemc.numerics.slices import Accumulator, Band, FourierVolume
from libemc.numerics.symmetry import operators

FOLDS = 6
"""Parts of each half: a reference loses a sixth of its particles."""
NEIGHBOURS = 1
"""Shells to either side that an FSC of differences is averaged with."""


@dataclass(frozen=True)
class References:
    """Of one kind of particle.

    Attributes:
        maps: for each part the references (n, n, n) of half 1 and half 2, made of all but that part.
        parts: (N,) part of each particle, by tilt series.
        resolution: Å, finest data that takes part.
    """

    maps: Sequence[tuple[Tensor, Tensor]]
    parts: Mapping[str, Tensor]
    resolution: float
    _volumes: dict[float, list[tuple[FourierVolume, FourierVolume]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @staticmethod
    def whole(halves: tuple[Tensor, Tensor], series: Sequence[Particles], resolution: float) -> References:
        """One reference of each half for all of its particles, as where they don't come from them."""
        return References([halves], {p.file.name: torch.zeros(len(p), dtype=torch.long) for p in series}, resolution)

    def volumes(self, radius: float) -> list[tuple[FourierVolume, FourierVolume]]:
        """The maps of each part prepared for slices up to a radius in Fourier pixels; kept for the next call."""
        if radius not in self._volumes:
            made = [tuple(FourierVolume.from_map(m, radius=radius) for m in pair) for pair in self.maps]
            self._volumes[radius] = [(a, b) for a, b in made]
        return self._volumes[radius]


def parts_of(series: Sequence[Particles]) -> dict[str, Tensor]:
    """(N,) part of every particle, by tilt series: those of a half in turn, so that it follows from the set alone."""
    count, out = {1: 0, 2: 0}, {}
    for particles in series:
        part = torch.zeros(len(particles), dtype=torch.long)
        for i, half in enumerate(particles.half.tolist()):
            part[i] = count[half] % FOLDS
            count[half] += 1
        out[particles.file.name] = part
    return out


def left_out_gain(fsc: Tensor) -> Tensor:
    """FSC of two halves (n//2+1,) if both had a part less: what their references are filtered by."""
    c = fsc.clamp(0.0, HIGHEST_FSC)
    snr = c / (1 - c) * (1 - 1 / FOLDS)
    return torch.where(fsc > 0, snr / (1 + snr), fsc)


@dataclass(frozen=True)
class Making:
    """How references are made.

    Attributes:
        filtering: by what the halves agree on; its mask is that of the references, too.
        symmetry: of the particle.
        shared: Fourier pixels below which both halves have one reference.
        memory: bytes that batches may take.
        own_noise: images are whitened by each particle's own noise, too, as they were in the average.
    """

    filtering: Filtering
    symmetry: str
    shared: float
    memory: int
    own_noise: bool = False


def made(
    series: Sequence[Particles],
    maps: HalfMaps,
    fsc: Tensor,
    resolution: float,
    making: Making,
    progress: Progress | None = None,
) -> References:
    """The references of particles whose average is known.

    Args:
        maps: of all of them; fsc: (n//2+1,) of the halves, corrected for the mask.
        resolution: Å, what `References` says.
    """
    parts, gain = parts_of(series), left_out_gain(for_filters(fsc))
    filtered = making.filtering.of(maps.half1, maps.half2, gain)
    out = []
    for part in _parts([series], [maps], parts, making, progress):
        ((left1, left2),) = part.kinds
        out.append(filtered_references(left1, left2, making.filtering.mask, filtered, making.shared))
    return References(out, parts, resolution)


def made_of_classes(
    series: Sequence[Sequence[Particles]],
    maps: Sequence[HalfMaps],
    whole: HalfMaps,
    fsc: Tensor,
    apart: Sequence[Tensor],
    resolution: float,
    making: Making,
    progress: Progress | None = None,
) -> list[References]:
    """The references of classes of the same particles: what all of them have in common, and how each differs from it.

    Either is filtered by what is known of it. A class's own average, filtered by its own FSC, would hold more of the particle
    the more particles it has, and be likelier than a smaller one's whatever an image shows: the largest class would take them
    all. In what is compared here classes differ in nothing but what both halves say that they differ in, each by itself: where
    particles differ by noise alone, they are sorted by other noise in each half, and classes come to be the same.

    Args:
        series: the particles of each class, weighted by their probabilities of it; maps: of each class.
        whole: of all classes together; fsc: (n//2+1,) of its halves, corrected for the mask.
        apart: of each class, the FSC (n//2+1,) of the differences between its half maps and those of all.
        resolution: Å, what `References` says.
    """
    parts, mask = parts_of(series[0]), making.filtering.mask
    common = making.filtering.of(whole.half1, whole.half2, left_out_gain(for_filters(fsc)))
    own = [_shells(left_out_gain(for_differences(one))) for one in apart]
    out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in maps]
    for part in _parts(series, maps, parts, making, progress):
        base = filtered_references(*part.whole, mask, common, making.shared)
        for k, kind in enumerate(part.kinds):
            rest = [one - whole for one, whole in zip(kind, part.whole, strict=True)]
            more = filtered_references(
                rest[0], rest[1], mask, own[k]
            )  # none of it shared, or they would agree on noise
            out[k].append((base[0] + more[0], base[1] + more[1]))
    return [References(pairs, parts, resolution) for pairs in out]


def for_differences(fsc: Tensor) -> Tensor:
    """An FSC (n//2+1,) of differences to make filters of: 0 ... 1, its shells averaged with their neighbours by their size.

    There is no shell after which nothing counts, as there is for maps: what is different is a small part of what is within
    the mask, so that little of it is alike in both halves even where it is beyond doubt.
    """
    size = torch.arange(len(fsc), dtype=torch.float64) ** 2
    kernel = torch.ones(1, 1, 2 * NEIGHBOURS + 1, dtype=torch.float64)
    total, weight = (
        torch.nn.functional.conv1d(t[None, None], kernel, padding=NEIGHBOURS)[0, 0] for t in (fsc.double() * size, size)
    )
    return (total / weight.clamp_min(1e-30)).clamp(0.0, HIGHEST_FSC)


def _shells(fsc: Tensor) -> ReferenceFilter:
    """A filter by an FSC (n//2+1,) as it is."""
    return lambda density, gain: filter_shells(density, gain(fsc))


@dataclass(frozen=True)
class _Part:
    """Half maps (n, n, n) without the particles of a part: of each kind, and of all kinds together."""

    kinds: list[tuple[Tensor, Tensor]]
    whole: tuple[Tensor, Tensor]


def _parts(
    series: Sequence[Sequence[Particles]],
    maps: Sequence[HalfMaps],
    parts: Mapping[str, Tensor],
    making: Making,
    progress: Progress | None,
) -> Iterator[_Part]:
    """One part after the other left out of the averages of some kinds of particles.

    Args:
        series: of each kind, the same tilt series.
    """
    box, pixel_size = series[0][0].file.box, series[0][0].file.pixel_size
    band = Band.of(box)
    rotations, shifts = operators(making.symmetry, box * pixel_size)
    copies = (rotations, shifts / pixel_size)
    noises = [noise_spectrum(p, band) for p in series[0]]
    rest, gone, whole = Accumulator(box), Accumulator(box), Accumulator(box)
    for part in range(FOLDS):
        left: list[list[Tensor]] = [[] for _ in maps]
        both: list[Tensor] = []
        for half in (1, 2):
            whole.clear()
            for k, (kind, m) in enumerate(zip(series, maps, strict=True)):
                gone.clear()
                for particles, noise in zip(kind, noises, strict=True):
                    mine = particles.use & (particles.weight > 0) & (particles.half == half)
                    mine &= parts[particles.file.name] == part
                    for _, piece in batches_by_half(particles, mine, band, making.memory, progress, "leave out of"):
                        batch = load_batch(particles, piece, band, noise, making.own_noise)
                        if len(batch.values):
                            own = particles.weight[piece]
                            insert_batch(gone, batch, own[batch.owner].float(), copies)
                rest.clear()
                rest.merge(m.sums[half - 1])
                rest.sums -= gone.sums
                left[k].append(rest.map())
                if len(maps) > 1:
                    whole.merge(rest)
            both.append(whole.map() if len(maps) > 1 else left[0][-1])
        yield _Part([(one[0], one[1]) for one in left], (both[0], both[1]))
