"""Poses of picks, refined on the tilt images: exact slices, each image's own defocus, finer detail than the search's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods import extract
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.polish import polish
from libemc.methods.refine.poses import Poses
from libemc.methods.subtilts import Particles, Progress, TiltGeometry, batches_by_half, load_batch, noise_spectrum
from libemc.numerics.rotations import euler_from_matrix
from libemc.numerics.slices import Band, FourierVolume
from libemc.records import Picks, TiltSeriesRecord, need

FINER = 1.7
"""By so much is the data of the refinement finer than that of the search: what the search's errors can still follow."""
SAMPLING = 2.2
"""Pixels to the resolution, at least."""
MARGIN = 1.25
"""Side of the patches over the template's diameter."""
FARTHEST = 0.5
"""Of the search's resolution: the farthest shift."""


@dataclass(frozen=True)
class Sampling:
    """How the images are cut.

    Attributes:
        binning: raw pixels to a pixel. box: pixels. resolution: Å.
    """

    binning: int
    box: int
    resolution: float

    @staticmethod
    def of(pixel_size: float, search_resolution: float, diameter: float) -> Sampling:
        """For raw pixels of `pixel_size` Å, after a search, of a template of some diameter, Å."""
        resolution = max(search_resolution / FINER, SAMPLING * pixel_size)
        binning = max(1, math.floor(resolution / SAMPLING / pixel_size))
        return Sampling(binning, max(16, 2 * math.ceil(MARGIN * diameter / (binning * pixel_size) / 2)), resolution)


def refined(
    record: TiltSeriesRecord,
    images: NDArray[Any],
    xyz: Tensor,
    rotation: Tensor,
    density: Tensor,
    sampling: Sampling,
    search_resolution: float,
    memory: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best poses near those of a search.

    Args:
        images: (T, y, x) raw, mapped.
        xyz: (P, 3) Å from the tomogram's centre; rotation: (P, 3, 3).
        density: (n, n, n) the template at the box and pixel size of `sampling`.

    Returns:
        xyz (P, 3), rotation (P, 3, 3) and score ⟨image, prediction⟩ / |prediction| in units of the noise (P,), NaN where no
        image shows the whole of a particle, which stays where it is.
    """
    source, alignment = record.source, need(record, "alignment")
    geometry = TiltGeometry.of(alignment, record.tilts.use)
    pixel_size = source.pixel_size * sampling.binning

    def located(points: Tensor) -> extract.Patches:
        places = [(x, y, z) for x, y, z in points.tolist()]
        raw_box = sampling.box * sampling.binning
        return extract.locate(places, geometry, record.ctf, source.shape[1:], source.pixel_size, raw_box)

    out_xyz, out_rotation = xyz.clone(), rotation.clone()
    score = torch.full((len(xyz),), math.nan, dtype=torch.float64)
    seen = torch.nonzero(located(xyz).visible.any(dim=1))[:, 0] if len(xyz) else torch.zeros(0, dtype=torch.long)
    if not len(seen):
        return out_xyz, out_rotation, score
    angles = [tuple(a.tolist()) for a in euler_from_matrix(rotation[seen])]
    picks = Picks(xyz=tuple(map(tuple, xyz[seen].tolist())), rot=angles[0], tilt=angles[1], psi=angles[2])
    series = record.model_copy(update={"picks": {"template": picks}})
    patches = located(xyz[seen])
    cutting = extract.Cutting(sampling.box, sampling.binning, source.contrast)
    levels = extract.measure(images, patches, cutting, memory, progress)
    stack = extract.PatchStack(images, patches, levels, cutting)
    file = extract.particle_file(series, "template", "template", sampling.box, pixel_size, "c1", patches)
    particles = Particles.of(file, stack)
    band = Band.of(sampling.box, min(sampling.box / 2, sampling.box * pixel_size / sampling.resolution))
    volume = FourierVolume.from_map(density.float(), radius=band.radius)
    noise, limits = noise_spectrum(particles, band), Limits(FARTHEST * search_resolution / pixel_size)
    everything = torch.ones(len(particles), dtype=torch.bool)
    for _, piece in batches_by_half(particles, everything, band, memory, progress, "poses of"):
        batch = load_batch(particles, piece, band, noise)
        poses = polish(batch, volume, Poses.at(batch.rotation, torch.zeros(len(piece), 3).double()), limits)
        out_rotation[seen[piece]] = poses.rotation.to(rotation)
        out_xyz[seen[piece]] += poses.shift.to(xyz) * pixel_size
        score[seen[piece]] = poses.score
    return out_xyz, out_rotation, score
