"""From the references of a descent to what a refinement begins with: poses, class numbers and maps at full sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods import average
from libemc.methods.initial_model.balls import Balls
from libemc.methods.initial_model.descent import Found
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.polish import polish
from libemc.methods.refine.poses import Poses
from libemc.methods.subtilts import Particles, Progress, chunk_size, chunks, load_batch, noise_spectrum
from libemc.numerics.filters import lowpass
from libemc.numerics.slices import Band, FourierVolume

SLIDE = 0.5
"""Farthest shift of a polished pose, in resolutions: as far as the nodes of the search's shifts are apart, and more."""


@dataclass(frozen=True)
class Model:
    """The map of a class.

    Attributes:
        density: (n, n, n) white, low-passed; particles: how many made it.
        resolution: Å at 0.143 between the halves of the class at these poses; they were found with one reference for both,
            so it promises too much. None where a half is empty.
        halves: (2, n, n, n) low-passed maps of the halves, for what must tell noise from density; None likewise.
    """

    density: Tensor
    particles: int
    resolution: float | None
    halves: Tensor | None = None

    def table(self) -> dict[str, float | int | None]:
        """As plain numbers, without the map."""
        return {"particles": self.particles, "resolution_between_halves": self.resolution}


def classes_of(particles: Particles) -> Tensor:
    """(N,) int64, the class numbers in the particles' file."""
    return torch.tensor([p.class_ for p in particles.file.particles], dtype=torch.long)


def at_poses(series: Sequence[Particles], balls: Balls, found: Found) -> list[Particles]:
    """The particles at the poses that were found, with class numbers from 1, the log-likelihood as score.

    Particles that took no part keep their pose, in class 0 and without a score.
    """
    out = []
    for number, particles in enumerate(series):
        mine = balls.series == number
        place = balls.place[mine]
        rotation, xyz = particles.rotation.clone(), particles.xyz.clone()
        score = torch.full_like(particles.score, float("nan"))
        classes = torch.zeros(len(particles), dtype=torch.long)
        rotation[place] = found.rotation[mine]
        xyz[place] += found.shift[mine]
        score[place] = found.evidence[mine]
        classes[place] = found.class_[mine] + 1
        records = tuple(
            p.model_copy(update={"class_": c}) for p, c in zip(particles.file.particles, classes.tolist(), strict=True)
        )
        with_class = replace(particles, file=particles.file.model_copy(update={"particles": records}))
        out.append(with_class.moved(rotation, xyz, score))
    return out


def of_class(series: Sequence[Particles], number: int) -> list[Particles]:
    """The same particles, of which only those of a class are used."""
    return [p.using(p.use & (classes_of(p) == number)) for p in series]


def turned(series: Sequence[Particles], number: int, rotation: Tensor, shift: Tensor) -> list[Particles]:
    """The particles of a class in another frame of its map: what was at R·u + s of the old map is at u of the new.

    Args:
        rotation: (3, 3), R; shift: (3,) Å, s.
    """
    out = []
    for p in series:
        mine = classes_of(p) == number
        own, xyz = p.rotation.clone(), p.xyz.clone()
        xyz[mine] += p.rotation[mine] @ shift
        own[mine] = p.rotation[mine] @ rotation
        out.append(p.moved(own, xyz, p.score))
    return out


def polished(
    series: Sequence[Particles],
    models: Sequence[Tensor],
    resolution: float,
    memory: int,
    progress: Progress | None = None,
) -> list[Particles]:
    """Poses at their continuous optimum against the map of each particle's class, scores left as they are.

    Args:
        models: (n, n, n) of each class, masked.
        resolution: Å, finest data that takes part.
    """
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    band = Band.of(box, min(box / 2, box * pixel_size / resolution))
    limits = Limits(shift_px=SLIDE * resolution / pixel_size)
    ready = [FourierVolume.from_map(model, radius=band.radius) for model in models]
    out = []
    for particles in series:
        rotation, xyz = particles.rotation.clone(), particles.xyz.clone()
        noise, classes = noise_spectrum(particles, band), classes_of(particles)
        seen = particles.use & (particles.visible & particles.series.use).any(dim=1)
        pieces = [
            (number, piece)
            for number in range(1, len(ready) + 1)
            for piece in chunks(torch.nonzero(seen & (classes == number))[:, 0], chunk_size(particles, band, memory))
        ]
        for number, piece in progress(pieces, len(pieces), f"polish {particles.file.name}") if progress else pieces:
            batch = load_batch(particles, piece, band, noise)
            start = Poses.at(batch.rotation, torch.zeros(len(piece), 3, dtype=torch.float64))
            found = polish(batch, ready[number - 1], start, limits)
            rotation[piece] = found.rotation
            xyz[piece] += found.shift * pixel_size
        out.append(particles.moved(rotation, xyz, particles.score))
    return out


def class_models(
    series: Sequence[Particles],
    fallback: Sequence[Tensor],
    mask: Tensor,
    resolution: float,
    symmetry: str,
    memory: int,
    seed: int,
) -> list[Model]:
    """The map of each class at the present poses, both halves together, to a resolution.

    Args:
        fallback: (n, n, n) of each class: the map of one of which a half has no images.
        mask: (n, n, n), for the FSC between halves.
        resolution: Å.
    """
    pixel_size = series[0].file.pixel_size
    models = []
    for number, instead in enumerate(fallback, start=1):
        own = of_class(series, number)
        count = sum(int(p.use.sum()) for p in own)
        halves = {h for p in own for h in p.half[p.use & (p.visible & p.series.use).any(dim=1)].tolist()}
        if halves != {1, 2}:
            models.append(Model(lowpass(instead, pixel_size, resolution), count, None))
            continue
        maps = average.half_maps(own, memory, symmetry)
        done = average.finish(maps, mask, pixel_size, seed)
        smooth = torch.stack([lowpass(h.float(), pixel_size, resolution) for h in (maps.half1, maps.half2)])
        models.append(Model(lowpass(done.average.float(), pixel_size, resolution), count, done.resolution, smooth))
    return models
