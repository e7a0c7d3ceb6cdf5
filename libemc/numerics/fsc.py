"""Fourier shell correlation, its thresholds, and its correction for the mask by phase randomisation.

Shell s holds the Fourier coefficients of a box of n with s - 1/2 <= |k| < s + 1/2, for s = 0 ... n//2; the missing
half of the transform counts. What a resolution means is fixed here and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.numerics.grids import rfft_multiplicity, rfft_radius

RANDOMISE_BELOW = 0.8
"""Phases are randomised from the first shell where the unmasked FSC is below this (RELION's choice)."""

_SHELLS_KEPT = 2
"""Shells from there on whose masked FSC is not corrected: the mask smears kept phases into them (RELION's choice)."""


@dataclass(frozen=True)
class Curve:
    """One value per Fourier shell.

    Attributes:
        frequency: (n//2+1,) float64, 1/px.
        values: (n//2+1,) float64.
        count: (n//2+1,) float64, coefficients of the full transform in each shell.
    """

    frequency: Tensor
    values: Tensor
    count: Tensor


@dataclass(frozen=True)
class CorrectedFSC:
    """What `corrected_fsc` finds, in the order in which it is found."""

    unmasked: Curve
    masked: Curve
    randomised: Curve
    corrected: Curve


def _shells(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shell (int64) and multiplicity (float64) of each coefficient of an rfft layout; n//2 + 1 is beyond the shells."""
    n = shape[-1]
    shell = (rfft_radius(shape, device) * n).round().long().clamp_max(n // 2 + 1)  # |k|² is whole: never a tie
    return shell, rfft_multiplicity(shape, device).expand(shell.shape)


def fourier_shell_correlation(a: Tensor, b: Tensor) -> Curve:
    """FSC of two maps (or FRC of two images): Re Σ A·B* / sqrt(Σ|A|² Σ|B|²) over each shell.

    Args:
        a, b: (n, n, n) or (n, n) real.

    Returns:
        n//2 + 1 shells on the maps' device; 0 where one of the maps has no power.

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    if a.shape != b.shape:
        raise InputError(f"maps of {tuple(a.shape)} and {tuple(b.shape)} voxels cannot be compared")
    if len(set(a.shape)) != 1:
        raise InputError(f"a map of {tuple(a.shape)} voxels has no shells", remedy="crop or pad it to a cube")
    n = a.shape[-1]
    shell, multiplicity = _shells(a.shape, a.device)
    fa, fb = torch.fft.rfftn(a), torch.fft.rfftn(b)

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(n // 2 + 2, dtype=torch.float64, device=a.device)
        return sums.index_add_(0, shell.flatten(), (multiplicity * values).flatten())[:-1]

    cross = total(fa.real * fb.real + fa.imag * fb.imag)
    norm = (total(fa.real**2 + fa.imag**2) * total(fb.real**2 + fb.imag**2)).sqrt()
    values = torch.where(norm > 0, cross / norm, 0.0)
    frequency = torch.arange(n // 2 + 1, dtype=torch.float64, device=a.device) / n
    return Curve(frequency, values, total(torch.ones_like(multiplicity)))


def resolution_at(curve: Curve, threshold: float | Tensor, pixel_size: float) -> float:
    """Resolution in Å where the curve first falls below a threshold, by linear interpolation between shells.

    Args:
        threshold: below 1; a number, or one per shell (a threshold curve). In shell 0 the curve is taken as 1.
        pixel_size: Å/px.

    Returns:
        Å; that of the last shell if the curve never falls below.
    """
    excess = curve.values - threshold
    below = (excess[1:] < 0).nonzero()
    if len(below) == 0:
        return pixel_size / float(curve.frequency[-1])
    s = int(below[0]) + 1
    above = excess[s - 1] if s > 1 else excess[1] + 1 - curve.values[1]
    fraction = above / (above - excess[s])
    frequency = curve.frequency[s - 1] + fraction * (curve.frequency[s] - curve.frequency[s - 1])
    return pixel_size / float(frequency)


def information_threshold(curve: Curve, bits: float = 0.5, independent: float = 0.5) -> Curve:
    """The FSC expected where each shell of the full map holds `bits` of information per coefficient.

    van Heel and Schatz 2005, J. Struct. Biol. 151, 250: with S = (2^bits - 1)/2, the SNR of a half map, and N
    independent coefficients, (S + (2 sqrt S + 1)/sqrt N) / (S + 1 + 2 sqrt S / sqrt N).

    Args:
        bits: 0.5 for the half-bit, 1 for the one-bit curve.
        independent: N over the count of a shell: 1/2 for Friedel mates, less for a particle that fills less of the box
            or is symmetric.

    Returns:
        A curve to give to `resolution_at` (its values); at most 1.
    """
    snr = (2**bits - 1) / 2
    root = (independent * curve.count).sqrt()
    values = (snr + (2 * math.sqrt(snr) + 1) / root) / (snr + 1 + 2 * math.sqrt(snr) / root)
    return Curve(curve.frequency, values.clamp_max(1.0), curve.count)


def phase_randomise(volume: Tensor, from_shell: int, generator: torch.Generator | None = None) -> Tensor:
    """Replace the phases at and beyond a shell by those of white noise: amplitudes and Hermitian symmetry are kept.

    Args:
        volume: (n, n, n) or (n, n) real.
        from_shell: first shell that is changed, as in `fourier_shell_correlation`; the box's corners are changed too.
        generator: on the map's device.

    Returns:
        A map like the input.
    """
    noise = torch.randn(volume.shape, dtype=volume.dtype, device=volume.device, generator=generator)
    shell, _ = _shells(volume.shape, volume.device)
    spectrum = torch.fft.rfftn(volume)
    phase = torch.sgn(torch.fft.rfftn(noise))  # z/|z|: of a real map, so Hermitian, and ±1 at self-conjugate points
    return torch.fft.irfftn(torch.where(shell < from_shell, spectrum, spectrum.abs() * phase), s=volume.shape)


def corrected_fsc(half1: Tensor, half2: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> CorrectedFSC:
    """FSC of two half maps within a mask, free of the correlation that the mask itself brings.

    Chen et al. 2013, Ultramicroscopy 135, 24: (masked - randomised) / (1 - randomised), where `randomised` is the
    masked FSC after the phases of both maps were randomised beyond the shell where the unmasked FSC falls below
    `RANDOMISE_BELOW`.

    Args:
        half1, half2: (n, n, n) real, unmasked.
        mask: (n, n, n) in 0 ... 1.
        generator: on the maps' device.

    Returns:
        The four curves (unmasked, masked, randomised, corrected).

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    unmasked = fourier_shell_correlation(half1, half2)
    masked = fourier_shell_correlation(half1 * mask, half2 * mask)
    below = (unmasked.values[1:] < RANDOMISE_BELOW).nonzero()
    start = int(below[0]) + 1 if len(below) else len(unmasked.values)
    noise1, noise2 = (phase_randomise(half, start, generator) for half in (half1, half2))
    randomised = fourier_shell_correlation(noise1 * mask, noise2 * mask)
    true = (masked.values - randomised.values) / (1 - randomised.values).clamp_min(1e-6)
    kept = torch.arange(len(true), device=true.device) < start + _SHELLS_KEPT
    corrected = Curve(masked.frequency, torch.where(kept, masked.values, true), masked.count)
    return CorrectedFSC(unmasked, masked, randomised, corrected)
