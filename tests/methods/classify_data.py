"""Difference maps whose structure is known: drawn from the model itself, or made from images of small particle sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods import average
from libemc.methods.classify import differences
from libemc.methods.classify.differences import Differences, bytes_of, gathered, members, read, with_noise
from libemc.methods.classify.frame import Frame
from libemc.methods.subtilts import Particles
from libemc.numerics.slices import Band
from libemc.records import ParticleFile
from tests.methods import subtilt_data
from tests.methods.subtilt_data import particle_file, particle_set

MEMORY = 1 << 28
PIXEL = 8.0

Blobs = Sequence[tuple[float, tuple[float, float, float], float]]
"""Mass, centre (x, y, z) in Å, and width in Å of Gaussians."""


def blob_map(blobs: Blobs, size: int, voxel: float) -> torch.Tensor:
    """Gaussians read at the voxels of a cube (size, size, size) float32, origin at voxel size // 2."""
    line = (torch.arange(size, dtype=torch.float64) - size // 2) * voxel
    total = torch.zeros(size, size, size, dtype=torch.float64)
    for mass, centre, width in blobs:
        x, y, z = (torch.exp(-0.5 * ((line - c) / width) ** 2) for c in centre)
        total += mass * z[:, None, None] * y[:, None] * x
    return total.float()


def on_cube(blobs: Blobs, frame: Frame) -> torch.Tensor:
    """The same in the small cube of a frame."""
    return blob_map(blobs, frame.small, frame.small_pixel)


def ball_mask(frame: Frame, radius: float, edge: float = 10.0) -> torch.Tensor:
    """A sphere of a radius in Å in the small cube, that falls from 1 to 0 within `edge` Å."""
    line = (torch.arange(frame.small) - frame.small // 2) * frame.small_pixel
    distance = (line[:, None, None] ** 2 + line[:, None] ** 2 + line**2).sqrt()
    return ((radius + edge - distance) / edge).clamp(0, 1)


def wedges(frame: Frame, count: int, seed: int) -> torch.Tensor:
    """(N, Q) weights: each particle lacks a wedge of its own of 60 degrees, and has a level of its own; mean about 1."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(count, 2, 3, generator=g), dim=2)
    beam = torch.nn.functional.normalize(torch.linalg.cross(axis[:, 0], axis[:, 1], dim=1), dim=1)
    across = torch.linalg.cross(axis[:, 0], beam, dim=1)
    points = frame.points.float()
    seen = (beam @ points).abs() < 1.73 * (across @ points).abs() + 0.5
    level = 0.5 + torch.rand(count, 1, generator=g)
    return level * (0.02 + 1.2 * seen)


def drawn(frame: Frame, columns: torch.Tensor, places: torch.Tensor, seed: int, noise: float = 1.0) -> Differences:
    """Particles drawn from the model: D = W·Σ z u + noise of variance W, average nothing, arrays of float32.

    Args:
        columns: (k, Q) complex; places: (N, k) coordinates.
        noise: deviation in units of what it should be.
    """
    g = torch.Generator().manual_seed(seed)
    weight = wedges(frame, len(places), seed + 1000)
    white = torch.randn(*weight.shape, 2, generator=g, dtype=torch.float64) / 2**0.5
    signal = places.to(torch.complex128) @ columns.to(torch.complex128)
    data = weight * signal + noise * weight.sqrt() * torch.view_as_complex(white)
    mean = torch.zeros(weight.shape[1], dtype=torch.complex64)
    arrays = torch.view_as_real(data).float().numpy(), weight.float().numpy()
    return Differences(frame, *arrays, mean, weight.mean(dim=0).float(), mean)


def differences_of(
    series: Sequence[Particles],
    resolution: float,
    dtype: type[np.floating] = np.float32,
    memory: int = MEMORY,
    subtracted: bool = True,
) -> Differences:
    """Difference maps of particle sets, as a program makes them; or what the average is not taken off before."""
    chosen, file = members(series), series[0].file
    frame = with_noise(Frame.of(file.box, file.pixel_size, resolution), series, chosen, memory)
    points = frame.points.shape[1]
    data, weight = np.empty((len(chosen), points, 2), dtype), np.empty((len(chosen), points), dtype)
    assert data.nbytes + weight.nbytes == bytes_of(len(chosen), frame, dtype)
    if not subtracted:
        return gathered(read(series, chosen, frame, memory), frame, data, weight)
    whole = average.half_maps(series, memory).whole
    before = differences.as_shown(frame, series, chosen, whole, memory)
    return gathered(read(series, chosen, frame, memory, whole), frame, data, weight, before)


def noisy(particles: Particles, noise: float, seed: int, contrast: torch.Tensor | None = None) -> Particles:
    """The same particles with white noise added to their images, the images of each multiplied by its contrast (N,) first."""
    tilts = len(particles.series.use)
    g = np.random.default_rng(seed)
    stack = np.asarray(particles.stack, dtype=np.float32)
    if contrast is not None:
        stack = stack * np.repeat(contrast.numpy(), tilts).astype(np.float32)[:, None, None]
    return replace(particles, stack=stack + noise * g.standard_normal(stack.shape, dtype=np.float32))


def clean_set(density: torch.Tensor, count: int, seed: int = 0, tilts: int = 13) -> Particles:
    """Particles without noise, images of unit variance."""
    return particle_set(density, count, PIXEL, 0.0, seed, tilts=tilts)


def without_spectrum(patch: pytest.MonkeyPatch) -> None:
    """Images aren't whitened: those without noise would be by their own signal, steeply, as no set with noise is."""

    def even(particles: Particles, band: Band) -> torch.Tensor:
        return torch.ones(len(particles.series.use), len(band.kx), dtype=torch.float64)

    for module in (differences, average):
        patch.setattr(module, "noise_spectrum", even)


def flat_set(density: torch.Tensor, count: int, seed: int = 0) -> Particles:
    """As `clean_set`, by a phase plate in focus: the CTF is the same everywhere, but for the dose's part of it."""

    def flat(*args: int, **more: int) -> ParticleFile:
        file = particle_file(*args, **more)
        tilts = len(file.tilts.tilt)
        in_focus = tuple(p.model_copy(update={"defocus": [0.0] * tilts}) for p in file.particles)
        plate = file.tilts.model_copy(update={"phase_shift": [90.0] * tilts, "astigmatism": [0.0] * tilts})
        return file.model_copy(update={"tilts": plate, "particles": in_focus})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subtilt_data, "particle_file", flat)
        return clean_set(density, count, seed)
