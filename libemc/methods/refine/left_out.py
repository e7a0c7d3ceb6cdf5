"""What particles are compared with, none of them with itself.

The average of a few hundred particles still holds the noise of each of them, where it was put: an image that is compared with
it finds its own noise best at the place, turn and defocus that it was averaged with, and stays there. So each half is divided
into `FOLDS` parts, and a particle is compared with the average of the other parts of its half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libemc.methods.average import HIGHEST_FSC, HalfMaps, for_filters, insert_batch
from libemc.methods.refine.references import Filtering, filtered_references
from libemc.methods.subtilts import Particles, Progress, batches_by_half, load_batch, noise_spectrum
from libemc.numerics.slices import Accumulator, Band, FourierVolume
from libemc.numerics.symmetry import operators

FOLDS = 6
"""Parts of each half: a reference loses a sixth of its particles."""


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
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    parts, band = parts_of(series), Band.of(box)
    rotations, shifts = operators(making.symmetry, box * pixel_size)
    copies = (rotations, shifts / pixel_size)
    noises = [noise_spectrum(p, band) for p in series]
    gain = left_out_gain(for_filters(fsc))
    filtered = making.filtering.of(maps.half1, maps.half2, gain)
    out = []
    rest, part_sums = Accumulator(box), Accumulator(box)
    for part in range(FOLDS):
        left: list[Tensor] = []
        for half in (1, 2):
            part_sums.clear()
            for particles, noise in zip(series, noises, strict=True):
                mine = particles.use & (particles.weight > 0) & (particles.half == half)
                mine &= parts[particles.file.name] == part
                for _, piece in batches_by_half(particles, mine, band, making.memory, progress, "leave out of"):
                    batch = load_batch(particles, piece, band, noise, making.own_noise)
                    if len(batch.values):
                        own = particles.weight[piece]
                        insert_batch(part_sums, batch, own[batch.owner].float(), copies)
            rest.clear()
            rest.merge(maps.sums[half - 1])
            rest.sums -= part_sums.sums
            left.append(rest.map())
        out.append(filtered_references(left[0], left[1], making.filtering.mask, filtered, making.shared))
    return References(out, parts, resolution)
