"""What a descent sees of the particles: each one's images, inserted once into a half ball of Fourier space.

With images x of a particle, noise of variance σ² and a reference of transform A, turned by R and moved by s, the
likelihood against no particle at all is exp(2 Re⟨F, A⟩ - ⟨W, |A|²⟩): F, the sum of CTF·x/σ² brought to the place of each
coefficient, and W, that of CTF²/σ², are all there is to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.refine.search import HalfBalls, half_balls
from libemc.methods.subtilts import Particles, Progress, chunk_size, chunks, load_batch, noise_spectrum
from libemc.numerics import fourier, slices
from libemc.numerics.slices import Band, FourierVolume, sample_points

OUTER = 0.5
"""Part of the radius beyond which what the images hold is taken as noise."""
DRAWS = 100
"""Maps of noise that the particles' noise is measured with."""


@dataclass(frozen=True)
class Balls:
    """P particles in the half ball |q| < radius, at their present positions, in the specimen's frame.

    Attributes:
        points: (3, Q) float64, Fourier pixels: cycles per box.
        data: (P, Q) complex64, F; weight: (P, Q) float32, W.
        radius: Fourier pixels.
        series: (P,) int64, tilt series that each is of; place: (P,) int64, place in the series' particle file.
    """

    points: Tensor
    data: Tensor
    weight: Tensor
    radius: float
    series: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def within(self, radius: float) -> Balls:
        """The same particles in a smaller ball."""
        keep = torch.linalg.vector_norm(self.points, dim=0) < radius
        data, weight = self.data[:, keep].contiguous(), self.weight[:, keep].contiguous()
        return replace(self, points=self.points[:, keep], data=data, weight=weight, radius=min(radius, self.radius))

    def at(self, index: Tensor) -> Balls:
        """Some of the particles."""
        return replace(
            self, data=self.data[index], weight=self.weight[index], series=self.series[index], place=self.place[index]
        )

    def scaled(self, variance: Tensor) -> Balls:
        """The same with noise of so many times (P,) the variance that it was thought to have."""
        return replace(self, data=self.data / variance[:, None], weight=self.weight / variance[:, None])


def particle_balls(series: Sequence[Particles], radius: float, memory: int, progress: Progress | None = None) -> Balls:
    """Read all used particles of all tilt series, whitened by the noise of each, and insert each into a ball of its own.

    Args:
        series: particles by tilt series, of one box and pixel size.
        radius: Fourier pixels.
        memory: bytes that images may take at a time.
        progress: wraps the loop over the batches of a tilt series.

    Raises:
        InputError: no image shows a particle.
    """
    box = series[0].file.box
    band = Band.of(box, radius)
    parts: list[HalfBalls] = []
    numbers, places = [], []
    for number, particles in enumerate(series):
        index = torch.nonzero(particles.use & (particles.visible & particles.series.use).any(dim=1))[:, 0]
        if not len(index):
            continue
        noise = noise_spectrum(particles, band)
        pieces = list(chunks(index, chunk_size(particles, Band.of(box), memory)))
        for piece in progress(pieces, len(pieces), f"read {particles.file.name}") if progress else pieces:
            parts.append(half_balls(load_batch(particles, piece, band, noise), radius))
        numbers.append(torch.full_like(index, number))
        places.append(index)
    if not parts:
        raise InputError("no image shows a particle", series[0].file.set, "use more particles")
    data, weight = torch.cat([p.data for p in parts]), torch.cat([p.weight for p in parts])
    return Balls(parts[0].points, data, weight, radius, torch.cat(numbers), torch.cat(places))


def noise_variance(balls: Balls, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Variance of each particle's noise, as a multiple of what its weights say, the same for all of a tilt series.

    The product of the data with a map of noise within the mask has half of the variance that the map's weighted power
    has, if the weights are right. Neighbours and all else that lies within the mask is measured along. Only the outer
    part of the ball is looked at, where there is more noise than particle.

    Args:
        mask: (m, m, m), of a box that is as large in Å as the particles' and holds the band.

    Returns:
        (P,) float32.
    """
    outer = torch.linalg.vector_norm(balls.points, dim=0) >= OUTER * balls.radius
    m = mask.shape[-1]
    identity = torch.eye(3, dtype=torch.float64)[None]
    drawn = []
    for _ in range(DRAWS):
        volume = FourierVolume.from_map(torch.randn(m, m, m, generator=generator) * mask)
        drawn.append(sample_points(volume, identity, balls.points[:, outer])[0])
    maps = torch.stack(drawn)
    data, weight = balls.data[:, outer], balls.weight[:, outer]
    cross = data.real @ maps.real.T + data.imag @ maps.imag.T
    # the kernel that brought the images into the ball multiplies what they are compared with by its envelope
    seen = slices.envelope(m, fourier.good_size(m)) ** 2
    kept = float((mask.double() ** 2 * seen).sum() / (mask.double() ** 2).sum())
    norm = (weight @ (maps.abs() ** 2).T).mean(dim=1)
    ratio = 2 * (cross**2).mean(dim=1) / (kept * norm).clamp_min(1e-30)
    count = int(balls.series.max()) + 1
    total = torch.zeros(count).index_add(0, balls.series, ratio)
    return (total / torch.bincount(balls.series, minlength=count).clamp_min(1))[balls.series]
