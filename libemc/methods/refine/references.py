"""What the particles are compared with: half maps, masked and filtered by what the halves agree on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import average
from libemc.methods.directional import directional_resolution, wiener_gain
from libemc.methods.local_resolution import local_filter, local_resolution
from libemc.methods.postprocess import GOLD_STANDARD
from libemc.numerics.filters import lowpass
from libemc.numerics.fsc import Curve, phase_randomise, resolution_at
from libemc.numerics.grids import rfft_radius

Gain = Callable[[Tensor], Tensor]
"""From an FSC between two halves, any shape, to what a coefficient is multiplied by."""

ReferenceFilter = Callable[[Tensor, Gain], Tensor]
"""Filters a map (n, n, n) by the gain of an FSC: of its shells, its directions or its places."""


def starting_references(
    reference: Tensor, mask: Tensor, pixel_size: float, resolution: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One map made into two references that have nothing in common beyond a resolution: there the phases of each are random.

    Args:
        reference, mask: (n, n, n).
        resolution: Å. What is finer is faint besides: it takes no part before the halves vouch for it.

    Raises:
        InputError: the mask leaves nothing of the map.
    """
    if not (reference * mask).any():
        raise InputError("nothing of the reference is within the mask", remedy="check --mask and --focus")
    n = len(reference)
    first = math.floor(n * pixel_size / resolution) + 1
    smooth = lowpass(reference, pixel_size, resolution)
    low = (torch.arange(n // 2 + 1) < first).double()
    # the mask carries low frequencies beyond the resolution, where the halves must have nothing in common
    common = filter_shells(filter_shells(smooth, low) * mask, low)
    half1, half2 = (filter_shells(phase_randomise(smooth, first, generator), 1 - low) * mask + common for _ in range(2))
    return half1, half2


def half_gain(fsc: Tensor) -> Tensor:
    """Gain that makes a half map the likeliest map: SNR / (1 + SNR) of a half, which is the FSC itself.

    That of the mean of both halves is `wiener_gain`, 2 FSC / (1 + FSC).
    """
    return fsc.clamp(0.0, 1.0)


@dataclass(frozen=True)
class Filtering:
    """How references are filtered.

    Attributes:
        kind: by the FSC of shells (spherical), of directions (anisotropic) or of places (local).
        mask: (n, n, n) in 0 ... 1, within which directions and places are looked at.
        pixel_size: Å.
        seed: of the phase randomisation.
    """

    kind: str
    mask: Tensor
    pixel_size: float
    seed: int

    def of(self, half1: Tensor, half2: Tensor, fsc: Tensor) -> ReferenceFilter:
        """The filter that two half maps (n, n, n), unmasked, ask for.

        Args:
            fsc: (n//2+1,) of the halves within the mask, corrected for it.
        """
        if self.kind == "anisotropic":
            generator = torch.Generator().manual_seed(self.seed)
            volume = directional_resolution(half1, half2, self.pixel_size, self.mask, generator).volume()
            return lambda density, gain: torch.fft.irfftn(torch.fft.rfftn(density) * gain(volume), s=density.shape)
        if self.kind == "local":
            frequency = torch.arange(len(fsc), dtype=torch.float64) / half1.shape[-1]
            resolution = resolution_at(Curve(frequency, fsc, fsc), GOLD_STANDARD, self.pixel_size)
            places = local_resolution(half1, half2, self.pixel_size, self.mask, resolution)
            least = average.last_shell(fsc) / half1.shape[-1]
            return lambda density, gain: local_filter(density, places, gain, least)
        return lambda density, gain: filter_shells(density, gain(average.for_filters(fsc)))


def filter_shells(density: Tensor, weights: Tensor) -> Tensor:
    """Multiply the Fourier shells of a cubic map (n, n, n) by weights (n//2+1,), linear between shells, 0 beyond them."""
    n = density.shape[-1]
    radius = rfft_radius(density.shape) * n
    low = radius.floor().long().clamp_max(n // 2)
    fraction = (radius - low).clamp(0, 1)
    padded = torch.cat([weights.double(), torch.zeros(2, dtype=torch.float64)])
    gain = padded[low] * (1 - fraction) + padded[low + 1] * fraction
    spectrum = torch.fft.rfftn(density)
    return torch.fft.irfftn(spectrum * gain.to(spectrum.real.dtype), s=density.shape)


def filtered_references(
    half1: Tensor, half2: Tensor, mask: Tensor, filtered: ReferenceFilter, shared: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Both half maps as references: filtered, and masked.

    Args:
        mask: (n, n, n).
        filtered: made of what both halves agree on, the same for both; they themselves are not mixed by it.
        shared: shells below this (Fourier pixels) are taken from the mean of both halves. They began from one reference
            there, so the FSC is no evidence in them anyway, and twice the particles make a better reference; it also
            keeps the halves in one frame (Scheres & Chen 2012). They are shared below it alone, to within a shell: what the
            mask carries from there to higher frequencies is cut off.
    """
    low = (torch.arange(half1.shape[-1] // 2 + 1) < shared).double()
    mean = filter_shells(filtered(filter_shells((half1 + half2) / 2, low), wiener_gain) * mask, low)
    own1, own2 = (filtered(filter_shells(half, 1 - low), half_gain) for half in (half1, half2))
    return own1 * mask + mean, own2 * mask + mean
