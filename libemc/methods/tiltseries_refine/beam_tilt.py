"""Beam tilt (axial coma) of a data set, from how its images differ in phase from what is predicted of them.

Image d and prediction p (transfer times slice, both whitened) have, in each coefficient, noise of E|d - p|² = 1 between them, or
1/w where a weight w says so. All that they say of a phase φ which all images have is in two sums over them,

    cross = Σ w·p*·d = scale · norm · exp(iφ) + noise,    norm = Σ w·|p|²,

the real and the imaginary part of the noise with variance norm/2 each: -log L = Σ |cross - scale · norm · exp(iφ)|² / norm. The
sums of images of other tilt series may be added, as long as their band and pixel size are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.numerics.ctf import Optics, beam_tilt_phase
from libemc.numerics.slices import Band

STEPS, HALVINGS = 100, 20
"""Most steps, and most halvings of one; phases up to a radian take about five."""
ENOUGH = 1e-4
"""Standard errors: a smaller step is the last."""
SEEN = 6.0
"""Standard errors of the scale, below which the images don't show what is predicted: the best phase in mere noise reaches 4.5."""


@dataclass(frozen=True)
class BeamTilt:
    """A beam tilt and what else was fitted with it, float64.

    Attributes:
        tilt: (2,) mrad along x and y, to be added to the one that the images were already corrected for.
        error: (2,) its standard errors; infinite, and the tilt 0, where the images don't show what is predicted.
        shift: (2,) Å by which all images show their particles beside where the predictions do.
        scale: of the predictions in the images.
    """

    tilt: Tensor
    error: Tensor
    shift: Tensor
    scale: float


def phases(band: Band, pixel_size: float, optics: Optics) -> Tensor:
    """(4, K) float64, radians: the phase by a beam tilt of 1 mrad along x, along y, and by a shift of 1 Å along x, along y."""
    kx, ky = band.frequencies(pixel_size, torch.float64)
    coma = beam_tilt_phase(kx, ky, torch.eye(2, dtype=torch.float64, device=kx.device), optics)
    return torch.cat([coma, -2 * math.pi * torch.stack([kx, ky])])


def _information(columns: Tensor, weight: Tensor) -> Tensor:
    """(4, 4) Σ 2·weight·columns·columns: the Fisher information, where the weight is scale²·norm."""
    return 2 * (columns * weight) @ columns.T


def _ascended(cross: Tensor, norm: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely parameters (4,), by Gauss-Newton steps from 0; and `cross` (K,) with their phase taken away."""

    def turned(at: Tensor) -> Tensor:
        phase = at @ columns
        return cross * torch.polar(torch.ones_like(phase), -phase)

    inverse = torch.linalg.inv(_information(columns, norm))
    tiny = ENOUGH * inverse.diagonal().sqrt()
    found = torch.zeros(len(columns), dtype=norm.dtype, device=norm.device)
    left = turned(found)
    for _ in range(STEPS):
        scale = abs(float(left.real.sum() / norm.sum())) or 1.0
        step = inverse @ (2 * columns @ left.imag) / scale
        for _ in range(HALVINGS):
            there = turned(found + step)
            if there.real.sum() > left.real.sum():
                break
            step = step / 2
        else:
            break
        found, left = found + step, there
        if (step.abs() * scale < tiny).all():
            break
    return found, left


def fit_beam_tilt(cross: Tensor, norm: Tensor, band: Band, pixel_size: float, optics: Optics) -> BeamTilt:
    """The most likely beam tilt, with a shift of all images and the scale of the predictions as nuisances.

    The search begins at no tilt: where most of what is known comes from, the phase should not be far beyond a radian.
    The errors hold also where the scale changes with the frequency (of a reference that is sharper than the images,
    say), but they are larger than they need be then.

    Args:
        cross: (K,) complex, Σ w·p*·d over images; norm: (K,) real, Σ w·|p|².
        pixel_size: Å.
    """
    cross, norm = cross.to(torch.complex128), norm.double()
    total, scale = float(norm.sum()), 0.0
    if total > 0:
        columns = phases(band, pixel_size, optics)
        found, left = _ascended(cross, norm, columns)
        scale = float(left.real.sum()) / total
    if scale * math.sqrt(2 * total) < SEEN:
        zero = torch.zeros(2, dtype=norm.dtype, device=norm.device)
        return BeamTilt(zero, torch.full_like(zero, math.inf), zero, scale)
    # how steep the likelihood's slope is, and what it scatters by: the same, but for the scale, only where that is constant
    steepness = torch.linalg.inv(_information(columns, left.real))
    error = (steepness @ _information(columns, norm) @ steepness).diagonal().sqrt()
    return BeamTilt(found[:2], error[:2], found[2:], scale)
