"""The contrast transfer function: conventions 11 and 13, in one place.

Underfocus is positive; CTF(0) = +amplitude contrast, so particles are white where the CTF is positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PLANCK = 6.62607015e-34  # J s, CODATA 2018
ELECTRON_MASS = 9.1093837015e-31  # kg
ELEMENTARY_CHARGE = 1.602176634e-19  # C
SPEED_OF_LIGHT = 299792458.0  # m/s


@dataclass(frozen=True)
class Optics:
    """The microscope: voltage in kV, spherical aberration in mm, amplitude contrast as a fraction."""

    voltage: float = 300.0
    cs: float = 2.7
    amplitude_contrast: float = 0.07


def wavelength(voltage: float) -> float:
    """Relativistic electron wavelength in Å for an accelerating voltage in kV (de Broglie with the relativistic momentum)."""
    ev = ELEMENTARY_CHARGE * voltage * 1e3
    momentum = math.sqrt(2 * ELECTRON_MASS * ev * (1 + ev / (2 * ELECTRON_MASS * SPEED_OF_LIGHT**2)))
    return PLANCK / momentum * 1e10


def phase_aberration(
    kx: Tensor, ky: Tensor, defocus_u: Tensor, defocus_v: Tensor, angle: Tensor, phase_shift: Tensor, optics: Optics
) -> Tensor:
    """χ of convention 11, in radians; arguments broadcast against each other.

    Args:
        kx, ky: spatial frequency in 1/Å.
        defocus_u, defocus_v: Å, underfocus positive.
        angle: degrees from +x to the axis of `defocus_u`, counter-clockwise.
        phase_shift: degrees.
    """
    lam = wavelength(optics.voltage)
    k2 = kx**2 + ky**2
    radians = torch.deg2rad(angle)
    mean, half = (defocus_u + defocus_v) / 2, (defocus_u - defocus_v) / 2
    # z(α)·k² with cos 2(α - angle)·k² written without the arctangent: no division at k = 0, smooth gradients
    zk2 = mean * k2 + half * ((kx**2 - ky**2) * torch.cos(2 * radians) + 2 * kx * ky * torch.sin(2 * radians))
    return math.pi * lam * zk2 - (math.pi / 2) * optics.cs * 1e7 * lam**3 * k2**2 + torch.deg2rad(phase_shift)


def ctf(
    kx: Tensor, ky: Tensor, defocus_u: Tensor, defocus_v: Tensor, angle: Tensor, phase_shift: Tensor, optics: Optics
) -> Tensor:
    """sqrt(1-A²)·sin χ + A·cos χ (convention 11); arguments as for `phase_aberration`."""
    chi = phase_aberration(kx, ky, defocus_u, defocus_v, angle, phase_shift, optics)
    # one sine instead of two: sqrt(1-A²) sin χ + A cos χ = sin(χ + asin A)
    return torch.sin(chi + math.asin(optics.amplitude_contrast))


def ctf_by_defocus(
    kx: Tensor, ky: Tensor, defocus_u: Tensor, defocus_v: Tensor, angle: Tensor, phase_shift: Tensor, optics: Optics
) -> Tensor:
    """Derivative of `ctf` by the mean of U and V, 1/Å; arguments as for `phase_aberration`."""
    chi = phase_aberration(kx, ky, defocus_u, defocus_v, angle, phase_shift, optics)
    slope = math.pi * wavelength(optics.voltage) * (kx**2 + ky**2)
    return torch.cos(chi + math.asin(optics.amplitude_contrast)) * slope


def beam_tilt_phase(kx: Tensor, ky: Tensor, beam_tilt: Tensor, optics: Optics) -> Tensor:
    """The odd phase that images have of a tilted beam (axial coma), in radians: -2π Cs λ² |k|² (k·β).

    An image's transform is what it were without beam tilt times exp(i·phase). The sign is that of RELION's rlnBeamTiltX and
    rlnBeamTiltY (Zivanov et al. 2018): up to version 3.0 its `selfApplyBeamTilt` multiplies images by exp(+2πi Cs λ² |k|² k·β)
    to be rid of the phase, and since 3.1 `TiltHelper::insertTilt` writes it as -2π Cs λ² |k|² k·β, which
    `ObservationModel` gives to predictions and takes from images.

    Args:
        kx, ky: spatial frequency in 1/Å, (..., K).
        beam_tilt: (..., 2) mrad along x and y.

    Returns:
        (..., K). Differentiable.
    """
    along = beam_tilt[..., 0:1] * kx + beam_tilt[..., 1:2] * ky
    strength = -2 * math.pi * optics.cs * 1e7 * wavelength(optics.voltage) ** 2 * 1e-3
    return strength * (kx**2 + ky**2) * along


def equal_phase(
    k: NDArray[np.float64], here: NDArray[np.float64] | float, there: NDArray[np.float64] | float, optics: Optics
) -> NDArray[np.float64]:
    """Where a defocus `there` gives the phase aberration that `here` gives at k (convention 11).

    Args:
        k: 1/Å; here, there: Å; they broadcast.

    Returns:
        1/Å; NaN where no frequency does.
    """
    spherical = optics.cs * 1e7 * wavelength(optics.voltage) ** 2
    phase = here * k**2 - spherical * k**4 / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt(2 * phase / (there + np.sqrt(there**2 - 2 * spherical * phase))))
