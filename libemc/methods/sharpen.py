"""The contrast of a finished map: its B factor, and amplitudes that follow a known structure factor.

What the noise adds to a map's amplitudes is taken off by the FSC first: the amplitude of the signal in the mean of two
half maps is C_ref times the mean's, C_ref² = 2 F/(1 + F) (Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721). All
curves are per shell, as in `numerics.fsc`; gains are for the mean of both halves and come on top of its Wiener filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.directional import wiener_gain
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import rfft_multiplicity, rfft_radius

GUINIER_FROM = 10.0
"""Å. Only finer than this are the amplitudes of proteins those of atoms at random places (Rosenthal & Henderson 2003)."""

FEWEST_SHELLS = 5
"""Shells that a line is fitted to, at least."""


def radial_power(volume: Tensor) -> Tensor:
    """(n//2+1,) float64: mean |F|² of the coefficients in each shell of a map (n, n, n)."""
    n = volume.shape[-1]
    shell = (rfft_radius(volume.shape, volume.device) * n).round().long().clamp_max(n // 2 + 1).flatten()
    multiplicity = rfft_multiplicity(volume.shape, volume.device).expand(n, n, n // 2 + 1).flatten()
    power = torch.fft.rfftn(volume).abs().flatten().double() ** 2
    sums = torch.zeros(2, n // 2 + 2, dtype=torch.float64, device=volume.device)
    sums.index_add_(1, shell, torch.stack((multiplicity * power, multiplicity)))
    return sums[0, :-1] / sums[1, :-1]


def signal_power(mean: Tensor, fsc: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n//2+1,) power of the signal in each shell: that of the masked map times C_ref².

    Args:
        mean: (n, n, n), of both halves.
        fsc: (n//2+1,) of the halves within the mask, corrected for it.
        mask: (n, n, n) in 0 ... 1.
    """
    return radial_power(mean if mask is None else mean * mask) * wiener_gain(fsc)


@dataclass(frozen=True)
class GuinierFit:
    """The straight line through ln amplitude over 1/d².

    Attributes:
        b_factor: Å², twice the slope of ln power: negative for a map that fades, as in RELION; sharpening undoes it.
        error: Å², its standard error.
        coarse, fine: Å, between which the line was fitted.
        squared_frequency, log_amplitude: (n//2+1,) 1/Å² and ln of the signal's amplitude (-inf where there is none).
        intercept: ln amplitude of the line at 0.
    """

    b_factor: float
    error: float
    coarse: float
    fine: float
    squared_frequency: Tensor
    log_amplitude: Tensor
    intercept: float


def guinier_fit(
    power: Tensor, fsc: Tensor, pixel_size: float, box: int, resolution: float, coarse: float = GUINIER_FROM
) -> GuinierFit:
    """B factor of a map from the fall of its signal: ln amplitude = c + (B/4)/d², B negative.

    Least squares from `coarse` to the resolution, each shell weighted by C_ref².

    Args:
        power: (n//2+1,) `signal_power`.
        fsc: (n//2+1,) of which that was made.
        pixel_size: Å.
        box: n.
        resolution: Å, at FSC 0.143.
        coarse: Å.

    Raises:
        InputError: fewer than `FEWEST_SHELLS` shells with signal lie between: the resolution is too low.
    """
    frequency = torch.arange(len(power), dtype=torch.float64, device=power.device) / (box * pixel_size)
    x, y = frequency**2, 0.5 * power.log()
    used = (frequency >= 1 / coarse) & (frequency <= 1 / resolution) & (power > 0)
    if int(used.sum()) < FEWEST_SHELLS:
        raise InputError(
            f"a B factor can't be fitted: between {coarse:g} Å and the resolution of {resolution:.2f} Å there are "
            f"{int(used.sum())} shells, it takes {FEWEST_SHELLS}",
            "--bfactor",
            "give a number, such as --bfactor -200, or none",
        )
    weight = wiener_gain(fsc[used])
    weight = weight / weight.sum()
    dx, dy = x[used] - (weight * x[used]).sum(), y[used] - (weight * y[used]).sum()
    spread = (weight * dx**2).sum()
    slope = float((weight * dx * dy).sum() / spread)
    rest = dy - slope * dx
    variance = float((weight * rest**2).sum() / spread) / (int(used.sum()) - 2)
    intercept = float((weight * (y[used] - slope * x[used])).sum())
    return GuinierFit(4 * slope, 4 * math.sqrt(variance), coarse, resolution, x, y, intercept)


def b_factor_gain(b_factor: float, frequency: Tensor) -> Tensor:
    """Gain exp(-B k²/4) at frequencies (1/Å): a negative B sharpens."""
    return torch.exp(-0.25 * b_factor * frequency**2)


def structure_factor_gain(power: Tensor, frequency: Tensor, wanted: Tensor, wanted_frequency: Tensor) -> Tensor:
    """Gain of each shell that gives the signal the radial power of a structure factor; the signal's whole power is kept.

    Args:
        power: (S,) `signal_power`; 0 where there is no signal, and the gain is 0 there.
        frequency: (S,) 1/Å.
        wanted: (M,) power, above 0 and on any scale.
        wanted_frequency: (M,) 1/Å, rising; the logarithm of `wanted` is interpolated between them, and the ends are held.

    Raises:
        InputError: the structure factor is not above zero everywhere, or its frequencies don't rise.
    """
    if not bool((wanted > 0).all() and (wanted_frequency.diff() > 0).all()):
        raise InputError("is no structure factor: powers must be above 0, at frequencies that rise")
    at = np.interp(frequency.cpu().numpy(), wanted_frequency.cpu().numpy(), wanted.double().log().cpu().numpy())
    aim = torch.from_numpy(at).exp().to(power)
    known = power > 0
    count = frequency**2
    scale = (count * power)[known].sum() / (count * aim)[known].sum()
    return torch.where(known, (scale * aim / torch.where(known, power, 1.0)).sqrt(), 0.0)


def structure_factor_of(volume: Tensor, pixel_size: float) -> tuple[Tensor, Tensor]:
    """Radial power of a map (n, n, n) without its shell 0, and the frequencies in 1/Å: a `structure_factor_gain`'s aim."""
    n = volume.shape[-1]
    curve = fourier_shell_correlation(volume, volume)
    return radial_power(volume)[1:], (curve.frequency / pixel_size)[1 : n // 2 + 1]


def mtf_gain(frequency: Tensor, mtf: Tensor, mtf_frequency: Tensor) -> Tensor:
    """1/MTF of a detector at frequencies (1/Å), linear between the points of its curve and held beyond its ends.

    Raises:
        InputError: the curve is not above 0 and at most 1, or its frequencies don't rise.
    """
    if not bool((mtf > 0).all() and (mtf <= 1 + 1e-3).all() and (mtf_frequency.diff() > 0).all()):
        raise InputError("is no MTF: values must be above 0 and at most 1, at frequencies that rise")
    at = np.interp(frequency.cpu().numpy(), mtf_frequency.cpu().numpy(), mtf.cpu().numpy())
    return torch.from_numpy(1 / at).to(frequency)


def apply_radial(volume: Tensor, gain: Tensor) -> Tensor:
    """A map (n, n, n) times a gain per shell (n//2+1,), linear between shells and 0 beyond the last."""
    n = volume.shape[-1]
    position = rfft_radius(volume.shape, volume.device) * n
    low = position.floor().long().clamp_max(n // 2)
    part = position - low
    table = torch.cat((gain, gain[-1:]))
    values = table[low] + part * (table[low + 1] - table[low])
    values = torch.where(position <= n // 2, values, 0.0).to(volume.dtype)
    return torch.fft.irfftn(torch.fft.rfftn(volume) * values, s=volume.shape)
