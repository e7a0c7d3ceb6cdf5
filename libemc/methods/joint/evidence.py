"""What each image says of its own corrections: the log-likelihood, its slope and its curvature, at the present ones.

The parameters of an image are `PARAMETERS`, in the units of `Corrections`. The log-likelihood is 2a⟨y, m⟩ - a²|m|², m the
prediction, y the whitened data, a the contrast that a particle and a tilt have. The curvature is Gauss-Newton's, which is
what it is on average over the noise; turn and shift know each other, and the CTF's three do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from libemc.methods.subtilts import Batch, Particles, Progress, batches_by_half, load_batch
from libemc.numerics import slices
from libemc.numerics.slices import FourierVolume

TURN, SHIFT, DEFOCUS, ASTIGMATISM = slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 8)
GEOMETRY, LENS = slice(0, 5), slice(5, 8)
PARAMETERS = 8
"""Turn about the image's x, y, z (degrees), shift along x, y (Å), mean defocus (Å), and astigmatism: (U-V)/2 times cos and
sin of twice its angle (Å)."""
CONTRAST = (0.1, 1.5)
"""Least and largest contrast that the slopes are taken at."""


@dataclass(frozen=True)
class Evidence:
    """Of N particles in T tilts, at some corrections and poses; zero where an image doesn't show its particle.

    Attributes:
        seen: (N, T) bool.
        cross: (N, T) ⟨y, m⟩; norm: (N, T) |m|²; power: (N, T) mean power of the whitened image's coefficients.
        slope: (N, T, 8) of the log-likelihood; curvature: (N, T, 8, 8), minus its second derivative.
    """

    seen: Tensor
    cross: Tensor
    norm: Tensor
    power: Tensor
    slope: Tensor
    curvature: Tensor

    @property
    def contrast(self) -> Tensor:
        """(N, T) that of each image's particle times that of its tilt, over the prediction's."""
        return contrasts(self.cross, self.norm)

    def likelihood(self, contrast: Tensor) -> Tensor:
        """(N, T) log-likelihood at contrasts (N, T), over that of there being no particle."""
        return 2 * contrast * self.cross - contrast**2 * self.norm

    def part(self, which: slice) -> Evidence:
        """Of some of the parameters."""
        return replace(self, slope=self.slope[..., which], curvature=self.curvature[..., which, which])

    def some(self, chosen: Tensor) -> Evidence:
        """Of some of the particles."""
        return Evidence(*(getattr(self, f.name)[chosen] for f in fields(Evidence)))

    def about(self, there: Tensor) -> Tensor:
        """(N, T, P) slope at zero corrections, by the quadratic model, when `there` (N, T, P) are the present ones."""
        return self.slope + (self.curvature @ there[..., None])[..., 0]

    def gain(self, change: Tensor) -> Tensor:
        """(N, T) change of the log-likelihood by a change (N, T, P) of the corrections, by the quadratic model."""
        return (self.slope * change).sum(-1) - 0.5 * (change * (self.curvature @ change[..., None])[..., 0]).sum(-1)


def contrasts(cross: Tensor, norm: Tensor) -> Tensor:
    """(N, T) of each particle, from all of its images, times that of each tilt, from all particles."""
    own = (cross.sum(1) / norm.sum(1).clamp_min(1e-30)).clamp(*CONTRAST)
    shared = (own[:, None] * cross).sum(0) / (own[:, None] ** 2 * norm).sum(0).clamp_min(1e-30)
    return (own[:, None] * shared.clamp(*CONTRAST)).clamp(*CONTRAST)


def measure(
    particles: Particles,
    chosen: Tensor,
    parts: Tensor,
    references: Sequence[tuple[FourierVolume, FourierVolume]],
    band: slices.Band,
    noise: Tensor,
    memory: int,
    progress: Progress | None = None,
) -> Evidence:
    """The evidence of the chosen (N,) particles, each against the reference of its own half and part.

    Args:
        particles: at their present poses and corrections.
        parts: (N,) which of the references.
        noise: (T, K) of the band.
        memory: bytes that batches may take.
    """
    shape = particles.visible.shape
    found = {name: torch.zeros(shape, dtype=torch.float64) for name in ("cross", "norm", "power")}
    slope = torch.zeros(*shape, PARAMETERS, dtype=torch.float64)
    curvature = torch.zeros(*shape, PARAMETERS, PARAMETERS, dtype=torch.float64)
    seen = torch.zeros(shape, dtype=torch.bool)
    crosses, normals = torch.zeros_like(slope), torch.zeros_like(slope)
    pieces = [
        (volumes[half - 1], piece)
        for part, volumes in enumerate(references)
        for half, piece in batches_by_half(
            particles, chosen & particles.shown.any(1) & (parts == part), band, memory, None, ""
        )
    ]
    for volume, piece in progress(pieces, len(pieces), f"measure {particles.file.name}") if progress else pieces:
        batch = load_batch(particles, piece, band, noise, detailed=True)
        who, tilt = piece[batch.owner], batch.tilt
        sums = _sums(batch, volume, particles.file.pixel_size)
        seen[who, tilt] = True
        found["cross"][who, tilt], found["norm"][who, tilt], found["power"][who, tilt] = (
            sums.cross,
            sums.norm,
            sums.power,
        )
        crosses[who, tilt], normals[who, tilt], curvature[who, tilt] = sums.by_cross, sums.by_norm, sums.normal
    scale = contrasts(found["cross"], found["norm"])[..., None]
    slope = 2 * (scale * crosses - scale**2 * normals)
    return Evidence(seen, **found, slope=slope, curvature=2 * scale[..., None] ** 2 * curvature)


@dataclass(frozen=True)
class _Sums:
    """Of B images: ⟨y, m⟩, |m|², power (B,); their slopes ⟨y, m'⟩, ⟨m, m'⟩ (B, 8); ⟨m', m'⟩ (B, 8, 8)."""

    cross: Tensor
    norm: Tensor
    power: Tensor
    by_cross: Tensor
    by_norm: Tensor
    normal: Tensor


def _sums(batch: Batch, volume: FourierVolume, pixel_size: float) -> _Sums:
    assert batch.detail is not None
    fit = slices.fit_sums(
        volume, batch.matrices(), batch.band, batch.values, batch.transfer**2, batch.shift, batch.magnification
    )
    unit = torch.ones(len(batch.owner), 5, dtype=torch.float64)
    unit[:, :3] = math.pi / 180
    unit[:, 3:] = (2 * math.pi / (batch.band.box * pixel_size)) * batch.magnification[:, None]
    count = len(unit)
    by_cross, by_norm = torch.zeros(count, PARAMETERS).double(), torch.zeros(count, PARAMETERS).double()
    normal = torch.zeros(count, PARAMETERS, PARAMETERS, dtype=torch.float64)
    by_cross[:, GEOMETRY] = fit.cross[:, 1:] * unit
    by_norm[:, GEOMETRY] = fit.normal[:, 0, 1:] * unit
    normal[:, GEOMETRY, GEOMETRY] = fit.normal[:, 1:, 1:] * unit[:, :, None] * unit[:, None, :]
    if batch.detail.values is not None and batch.detail.transfer is not None:
        s = slices.extract_slices(volume, batch.matrices(), batch.band, batch.magnification)
        data = batch.detail.values * slices.shift_phases(-batch.shift, batch.band)
        basis = astigmatic(batch.band).T  # (K, 3)
        by_cross[:, LENS] = ((data.real * s.real + data.imag * s.imag) @ basis).double()
        squared = batch.detail.transfer * (s.real**2 + s.imag**2)
        by_norm[:, LENS] = ((squared * batch.transfer) @ basis).double()
        pairs = (basis[:, :, None] * basis[:, None, :]).flatten(1)
        normal[:, LENS, LENS] = ((squared * batch.detail.transfer) @ pairs).double().unflatten(1, (3, 3))
    return _Sums(fit.cross[:, 0], fit.normal[:, 0, 0], batch.detail.power, by_cross, by_norm, normal)


def astigmatic(band: slices.Band) -> Tensor:
    """(3, K) float32: how the defocus at each coefficient depends on the mean, and on the two of the astigmatism."""
    angle = 2 * torch.atan2(band.ky.double(), band.kx.double())
    return torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()]).float()
