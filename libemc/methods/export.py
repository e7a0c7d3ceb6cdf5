"""A particle set as a list of 2-D particles: what single-particle programs understand. Each image of each tilt becomes a
particle with a pose, an origin and a CTF of its own; which package's columns they go into is the business of `io`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods.subtilts import Particles
from libemc.numerics.dose import exposure_filter
from libemc.numerics.rotations import euler_from_matrix, matrix_from_rotvec

FITTED_POINTS = 64
"""Frequencies at which a B-factor is fitted to the exposure filter."""


@dataclass(frozen=True)
class ImageTable:
    """The used, visible images of one tilt series' particles that are used and have a weight, B rows, particle by particle.

    Attributes:
        particle, tilt: (B,) int64, place in the particle file, and which tilt.
        rot, tilt_angle, psi: (B,) degrees, of M = T·R (conventions 8 and 9).
        shift: (B, 2) Å, where the particle is seen from the middle of its image.
        defocus_u, defocus_v, defocus_angle, phase_shift: (B,) Å and degrees, U ≥ V; zero where defocus is not known.
        dose_before: (B,) e/Å².
        bfactor: (B,) Å², of an envelope exp(-B k²/4) that is nearest to the exposure filter.
        half: (B,) 1 or 2.
        known: whether every image has a defocus.
    """

    particle: Tensor
    tilt: Tensor
    rot: Tensor
    tilt_angle: Tensor
    psi: Tensor
    shift: Tensor
    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    phase_shift: Tensor
    dose_before: Tensor
    bfactor: Tensor
    half: Tensor
    known: bool

    def __len__(self) -> int:
        return len(self.particle)


def dose_bfactor(dose: Tensor, voltage: float, pixel_size: float) -> Tensor:
    """The B-factor whose envelope exp(-B k²/4) is nearest to the exposure filter of each dose, up to Nyquist.

    Least squares of the logarithms, each frequency weighted by k·filter²: as many coefficients as a slice has there, each
    counting by the signal that is left.

    Args:
        dose: (T,) e/Å² at the end of each exposure; voltage: kV; pixel_size: Å.

    Returns:
        (T,) Å², float64.
    """
    k = torch.linspace(0, 0.5 / pixel_size, FITTED_POINTS + 1, dtype=torch.float64)[1:]
    filters = exposure_filter(k, dose.double()[:, None], voltage)
    weight = k * filters**2
    x = k**2 / 4
    return -(weight * x * filters.log()).sum(1) / (weight * x**2).sum(1)


def image_table(particles: Particles) -> ImageTable:
    """The images of one tilt series' particles, of those that are used and have a weight, as 2-D particles."""
    series, file = particles.series, particles.file
    counted = particles.use & (particles.weight > 0)
    index, tilt = torch.nonzero(particles.shown & counted[:, None], as_tuple=True)
    own = particles.corrections
    matrices = matrix_from_rotvec(own.turn[index, tilt]) @ series.matrices[tilt]
    rot, theta, psi = euler_from_matrix(matrices @ particles.rotation[index])
    q = torch.einsum("bij,bj->bi", series.matrices[tilt], (particles.xyz - particles.centre)[index])
    mean = particles.defocus[index, tilt] + own.defocus[index, tilt] + series.handedness * q[:, 2]
    known = torch.isfinite(mean)
    mean = torch.where(known, mean, torch.zeros_like(mean))
    astigmatism, angle, phase = particles.lens[index, tilt].unbind(1)
    turned = astigmatism < 0
    return ImageTable(
        particle=index,
        tilt=tilt,
        rot=rot,
        tilt_angle=theta,
        psi=psi,
        shift=(q[:, :2] + own.shift[index, tilt]) * series.magnification[tilt][:, None],
        defocus_u=mean + astigmatism.abs(),
        defocus_v=mean - astigmatism.abs(),
        defocus_angle=angle + torch.where(turned, 90.0, 0.0),
        phase_shift=phase,
        dose_before=torch.tensor(file.tilts.dose_before, dtype=torch.float64)[tilt],
        bfactor=dose_bfactor(series.dose_end, series.optics.voltage, file.pixel_size)[tilt],
        half=particles.half[index],
        known=bool(known.all()),
    )


def largest_magnification(particles: Particles) -> float:
    """The largest departure of a used tilt's magnification from 1, which 2-D particles can't hold."""
    change = (particles.series.magnification - 1).abs()[particles.series.use]
    return float(change.max()) if len(change) else math.nan
