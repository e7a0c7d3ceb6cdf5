"""Particles all over a specimen, their images by the conventions written out, and evidence without images: what the tests of
joint fits share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from libemc.methods.joint.evidence import GEOMETRY, LENS, PARAMETERS, Evidence
from libemc.methods.joint.fit import Member
from libemc.methods.joint.levels import Scene
from libemc.methods.refine.left_out import References
from libemc.methods.refine.motion import Walk
from libemc.methods.subtilts import Corrections, Particles
from libemc.numerics import slices
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.dose import exposure_filter
from libemc.numerics.slices import Band, FourierVolume
from libemc.records import ParticleFile
from tests.by_hand import tilt_matrix
from tests.methods.subtilt_data import blobs, particle_file

PIXEL = 4.0
EXTENT = (1500.0, 1200.0, 600.0)
"""Å, of the specimen that particles are scattered over."""


def scattered(count: int, box: int, pixel_size: float = PIXEL, tilts: int = 9, seed: int = 0) -> ParticleFile:
    """`particle_file`, its particles all over the specimen, with the defocus of their heights (convention 13); all tilts used."""
    file = particle_file(count, box, pixel_size, seed, tilts)
    rng = np.random.default_rng(seed)
    centres = (rng.random((count, 3)) - 0.5) * EXTENT
    t = file.tilts
    height = centres @ np.stack([tilt_matrix(*a)[2] for a in zip(t.axis, t.tilt, t.xtilt, strict=True)]).T
    defocus = np.linspace(16000, 19000, tilts) + file.defocus_handedness * height
    particles = [
        p.model_copy(
            update={
                "centre": tuple(c.tolist()),
                "xyz": tuple((c + p.xyz).tolist()),
                "defocus": tuple(z.tolist()),
                "half": 1 + i % 2,
            }
        )
        for i, (p, c, z) in enumerate(zip(file.particles, centres, defocus, strict=True))
    ]
    every = t.model_copy(update={"use": (True,) * tilts})
    return file.model_copy(update={"particles": tuple(particles), "tilts": every})


def empty(file: ParticleFile) -> Particles:
    """With black images."""
    return Particles.of(file, np.zeros((len(file.particles) * len(file.tilts.tilt), file.box, file.box), np.float32))


def still(particles: Particles) -> Corrections:
    """None, in tensors of their own."""
    none = Corrections.none(len(particles), len(particles.series.use))
    return Corrections(none.shift.clone(), none.turn.clone(), none.defocus.clone(), none.weight.clone(), none.score)


def predicted(
    particles: Particles, density: Tensor, band: Band, own: Corrections | None = None, more: Tensor | None = None
) -> Tensor:
    """(N, T, K) complex128: what each image shows, by conventions 5, 8, 11, 13, 14 and 17, in double precision.

    Args:
        own: corrections in the place of the particles' own.
        more: (N, T, 2) Å astigmatism beside the lens: (U-V)/2 times cos and sin of twice its angle.
    """
    file, own = particles.file, own or particles.corrections
    t = file.tilts
    tilts = torch.tensor(np.stack([tilt_matrix(*a) for a in zip(t.axis, t.tilt, t.xtilt, strict=True)]))
    count, number = len(particles), len(tilts)
    turn = Rotation.from_rotvec(own.turn.reshape(-1, 3).numpy(), degrees=True).as_matrix()
    matrices = torch.from_numpy(turn).reshape(count, number, 3, 3) @ tilts @ particles.rotation[:, None]
    magnification = torch.tensor(t.magnification, dtype=torch.float64)
    volume = FourierVolume.from_map(density.double(), radius=band.radius)
    cut = slices.extract_slices(volume, matrices.flatten(0, 1), band, magnification.repeat(count))
    q = torch.einsum("tij,nj->nti", tilts, particles.xyz - particles.centre)
    moved = magnification[:, None] * (q[..., :2] + own.shift) / file.pixel_size
    phase = torch.exp(-2j * math.pi * (moved @ torch.stack([band.kx, band.ky]).double()) / file.box)
    kx, ky = (k.double() / (file.box * file.pixel_size) for k in (band.kx, band.ky))
    mean = particles.defocus + own.defocus + file.defocus_handedness * q[..., 2]
    half, angle = particles.lens[..., 0], particles.lens[..., 1]
    if more is not None:
        x = half * torch.cos(torch.deg2rad(2 * angle)) + more[..., 0]
        y = half * torch.sin(torch.deg2rad(2 * angle)) + more[..., 1]
        half, angle = torch.hypot(x, y), torch.rad2deg(torch.atan2(y, x)) / 2
    u, v, a, ps = (w[..., None] for w in (mean + half, mean - half, angle, particles.lens[..., 2]))
    optics = Optics(file.optics.voltage, file.optics.cs, file.optics.amplitude_contrast)
    lens = ctf(kx, ky, u, v, a, ps, optics)
    dose = torch.tensor(t.dose, dtype=torch.float64) + torch.tensor(t.dose_before, dtype=torch.float64)
    left = exposure_filter((kx**2 + ky**2).sqrt(), dose[:, None], optics.voltage)
    return cut.unflatten(0, (count, number)) * phase * lens * left


def pictured(
    particles: Particles,
    density: Tensor,
    truth: Corrections | None = None,
    more: Tensor | None = None,
    noise: float = 0.0,
    seed: int = 1,
) -> Particles:
    """The particles with images of what `truth` and `more` say (as in `predicted`), of which the particles know nothing.

    Args:
        noise: its standard deviation, over the rms of what images show.
    """
    band = Band.of(particles.file.box)
    images = slices.images_from_band(predicted(particles, density, band, truth, more), band).flatten(0, 1)
    g = torch.Generator().manual_seed(seed)
    images = images + noise * float(images.std()) * torch.randn(images.shape, generator=g, dtype=torch.float64)
    return replace(particles, stack=images.float().numpy(), place=torch.arange(len(particles)))


def member(particles: Particles, density: Tensor, resolution: float, other: Tensor | None = None) -> Member:
    """Compared with one map, or half 2 with another one."""
    parts = {particles.file.name: torch.zeros(len(particles), dtype=torch.long)}
    return Member(particles, References([(density, density if other is None else other)], parts, resolution))


def unit_map(box: int, file: ParticleFile | None = None) -> Tensor:
    """Blobs, (n, n, n) float32, of which images have an rms of about 1."""
    density = blobs(box)
    flat = empty(file or scattered(4, box))
    return density / float(np.std(pictured(flat, density).stack))


def scene(count: int = 40, tilts: int = 11, seed: int = 0) -> Scene:
    """Particles and tilts for evidence that is made up."""
    particles = empty(scattered(count, 8, tilts=tilts, seed=seed))
    return Scene(particles.series.matrices, particles.xyz, Walk.of(particles.series, 8.0).basis)


TELLS = (3.0, 3.0, 3.0, 2.0, 2.0, 200.0, 400.0, 400.0)
"""Standard deviation of each parameter by what one image tells, in their units."""


def told(
    truth: Tensor,
    seed: int,
    tells: Sequence[float] = TELLS,
    seen: Tensor | None = None,
    slope_at: Tensor | None = None,
) -> Evidence:
    """Evidence of images that show `truth` (N, T, 8): slope = curvature·truth + noise of that covariance.

    The curvatures differ from image to image by some tens of per cent, and have correlations.

    Args:
        slope_at: corrections that it's measured at; none if None.
    """
    g = torch.Generator().manual_seed(seed)
    n, t = truth.shape[:2]
    seen = torch.ones(n, t, dtype=torch.bool) if seen is None else seen
    root = torch.zeros(n, t, PARAMETERS, PARAMETERS, dtype=torch.float64)
    for part in (GEOMETRY, LENS):
        size = part.stop - part.start
        mixed = torch.eye(size, dtype=torch.float64) + 0.2 * torch.randn(n, t, size, size, generator=g).double()
        root[..., part, part] = mixed / torch.tensor(tells[part], dtype=torch.float64)[:, None]
    root = root * seen[..., None, None]
    curvature = root @ root.transpose(-1, -2)
    noise = (root @ torch.randn(n, t, PARAMETERS, 1, generator=g).double())[..., 0]
    ones = seen.double()
    left = truth if slope_at is None else truth - slope_at
    return Evidence(seen, ones, ones, ones, (curvature @ left[..., None])[..., 0] + noise, curvature)
