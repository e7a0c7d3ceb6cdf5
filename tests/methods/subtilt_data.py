"""A small particle set with known poses, made from the forward model: what the tests of methods share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from libemc.methods import subtilts
from libemc.numerics import slices
from libemc.numerics.rotations import euler_from_matrix, random_rotations, tilt_matrices
from libemc.numerics.slices import Band, FourierVolume
from libemc.records import Optics, Particle, ParticleFile, ParticleTilts, half_of


def blobs(box: int, seed: int = 4, count: int = 14) -> torch.Tensor:
    """An asymmetric map of Gaussian blobs within a third of the box, (n, n, n) float32, positive."""
    g = torch.Generator().manual_seed(seed)
    centre = (torch.rand(count, 3, generator=g) - 0.5) * box * 0.42
    width, mass = 1.0 + 1.2 * torch.rand(count, generator=g), 0.5 + torch.rand(count, generator=g)
    x = torch.arange(box) - box // 2
    lines = [torch.exp(-0.5 * ((x - centre[:, i, None]) / width[:, None]) ** 2) for i in range(3)]
    return torch.einsum("g,gz,gy,gx->zyx", mass, lines[2], lines[1], lines[0])


def particle_file(count: int, box: int, pixel_size: float, seed: int = 0, tilts: int = 13) -> ParticleFile:
    """Particles at random poses with shifts, defoci, doses, an off-axis tilt and a magnification: nothing is trivial."""
    g = torch.Generator().manual_seed(seed)
    angles = np.linspace(-54, 54, tilts)
    order = np.argsort(np.argsort(np.abs(angles), kind="stable"))
    rot, tilt, psi = (a.tolist() for a in euler_from_matrix(random_rotations(count, g)))
    moved = (torch.rand(count, 3, generator=g).double() - 0.5) * 3 * pixel_size
    defocus = 18000 + 4000 * torch.rand(count, tilts, generator=g).double()
    particles = []
    for i in range(count):
        name = f"TS_01.{i:06d}"
        particles.append(
            Particle(
                id=name,
                xyz=tuple(moved[i].tolist()),
                centre=(0.0, 0.0, 0.0),
                rot=rot[i],
                tilt=tilt[i],
                psi=psi[i],
                half=half_of(name),
                defocus=defocus[i].tolist(),
                visible=[int(t != i % tilts) for t in range(tilts)],
            )
        )
    return ParticleFile(
        set="ribo",
        name="TS_01",
        box=box,
        pixel_size=pixel_size,
        optics=Optics(voltage=300.0, cs=2.7, amplitude_contrast=0.07),
        tilts=ParticleTilts(
            axis=[84.0] * tilts,
            tilt=angles.tolist(),
            xtilt=[1.5] * tilts,
            magnification=np.linspace(0.99, 1.01, tilts).tolist(),
            dose=[2.0] * tilts,
            dose_before=(2.0 * order).tolist(),
            use=[t != 2 for t in range(tilts)],
            astigmatism=[200.0] * tilts,
            astigmatism_angle=[25.0] * tilts,
            phase_shift=[0.0] * tilts,
        ),
        particles=particles,
    )


def particle_set(
    density: torch.Tensor,
    count: int,
    pixel_size: float,
    noise: float,
    seed: int = 0,
    path: torch.Tensor | None = None,
    **more: int,
) -> subtilts.Particles:
    """The set with its images: predictions of the forward model plus white noise of `noise` times the signal's rms.

    With a path (count, T, 3) Å each image shows its particle displaced by it, of which the set knows nothing.
    """
    box = density.shape[-1]
    file = particle_file(count, box, pixel_size, seed, **more)
    tilts = len(file.tilts.tilt)
    empty = subtilts.Particles.of(file, np.zeros((count * tilts, box, box), np.float32))
    band, volume = Band.of(box), FourierVolume.from_map(density)
    if path is not None:
        drift = torch.einsum("tij,ptj->pti", empty.series.matrices[:, :2], path.double())
        batch = subtilts.load_batch(empty.corrected(shift=drift), torch.arange(count), band)
    else:
        batch = subtilts.load_batch(empty, torch.arange(count), band)
    t = tilt_matrices(*(torch.tensor(v).double() for v in (file.tilts.axis, file.tilts.tilt, file.tilts.xtilt)))[
        batch.tilt
    ]
    matrices = t @ empty.rotation[batch.owner]
    spectra = slices.extract_slices(volume, matrices, band, batch.magnification)
    images = slices.images_from_band(spectra * batch.transfer * slices.shift_phases(batch.shift, band), band)
    images = images / images.std().clamp_min(1e-20)
    g = torch.Generator().manual_seed(seed + 100)
    images = images + noise * torch.randn(images.shape, generator=g)
    stack = np.zeros((count * tilts, box, box), np.float16)
    stack[(batch.index[batch.owner] * tilts + batch.tilt).numpy()] = images.numpy()
    return subtilts.Particles.of(file, stack)


def premultiplied(particles: subtilts.Particles) -> subtilts.Particles:
    """The same set with images times their CTF, and marked as such."""
    band, tilts = Band.of(particles.file.box), len(particles.series.use)
    undamaged = replace(particles.series, dose_end=torch.zeros_like(particles.series.dose_end))
    stack = np.zeros_like(particles.stack)
    for i in range(len(particles)):
        images = torch.from_numpy(particles.stack[i * tilts : (i + 1) * tilts]).float()
        ctf = subtilts.transfer_function(
            undamaged, torch.arange(tilts), particles.defocus[i], particles.lens[i], band, particles.file.pixel_size
        )
        values = slices.spectra_of_images(images, band) * ctf
        stack[i * tilts : (i + 1) * tilts] = slices.images_from_band(values, band).numpy()
    return subtilts.Particles.of(particles.file.model_copy(update={"ctf_premultiplied": True}), stack)
