"""Resolution by place: the FSC of two half maps within a window that moves over them, and a filter that follows it.

Cardone, Heymann & Steven 2013 (J. Struct. Biol. 184, 226). Two things stand between such an FSC and what it seems to
say. A window smears the strong low frequencies into the weak high ones next to them, so both maps are brought to a
flat spectrum first, and what the window still brings from shell to shell is taken off. And a shell of a small window
has few independent coefficients, in which noise alone correlates: the curve must be above 0.143 and above what noise
reaches in one window of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from libemc.errors import InputError
from libemc.methods.directional import wiener_gain
from libemc.methods.postprocess import GOLD_STANDARD, independent_fraction
from libemc.numerics import fourier
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import rfft_multiplicity, rfft_radius
from libemc.numerics.masks import soft_sphere

WINDOW = 8.0
"""Diameter of the window over the resolution of the whole map: the fewest periods that give a shell enough to count."""

LEAST_WINDOW_PX, LARGEST_WINDOW = 16, 0.5
"""Bounds of that: pixels, and a fraction of the box."""

OVERLAP = 6.0
"""Windows lie a sixth of a diameter apart."""

DEVIATIONS = 1.645
"""Standard deviations that noise exceeds once in twenty. That of its FSC is 1/sqrt(N), N of both halves of the
transform: a real part has half the variance of a complex number."""

BATCH = 64
"""Windows that are transformed together."""


@dataclass(frozen=True)
class LocalResolution:
    """FSC curves of windows on a lattice of places.

    Attributes:
        pixel_size: Å.
        box: n, of the maps.
        window: side of the cube in which a window lies, pixels; its shells are 1/window apart.
        step: pixels between places.
        measured: (p, p, p) bool, [z, y, x], which places of the lattice have a curve; place i is pixel i·step.
        curves: (M, window//2+1) float32, in the order of `measured`.
        threshold: (window//2+1,) what a curve is compared with.
        resolution: (n, n, n) float32, Å; 0 outside the mask.
        inside: (n, n, n) bool, the mask.
    """

    pixel_size: float
    box: int
    window: int
    step: int
    measured: Tensor
    curves: Tensor
    threshold: Tensor
    resolution: Tensor
    inside: Tensor

    def quantiles(self) -> dict[str, float]:
        """Å, over the voxels within the mask: the tenth best, the median and the tenth worst."""
        values = self.resolution[self.inside].double().cpu()
        best, median, worst = (float(values.kthvalue(max(1, round(q * len(values)))).values) for q in (0.1, 0.5, 0.9))
        return {"best_tenth": best, "median": median, "worst_tenth": worst}


def _flattened(half1: Tensor, half2: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps with the radial spectrum of their masked mean made flat; one gain for both, so that no FSC changes."""
    n = half1.shape[-1]
    mean = 0.5 * (half1 + half2)
    shell = (rfft_radius(mean.shape, mean.device) * n).round().long().clamp_max(n // 2)
    power = torch.fft.rfftn(mean * mask).abs().double() ** 2
    multiplicity = rfft_multiplicity(mean.shape, mean.device).expand(power.shape)
    sums = torch.zeros(2, n // 2 + 1, dtype=torch.float64, device=mean.device)
    sums.index_add_(1, shell.flatten(), torch.stack(((multiplicity * power).flatten(), multiplicity.flatten())))
    level = (sums[0] / sums[1]).clamp_min(1e-12 * float((sums[0] / sums[1]).max()))
    gain = level.rsqrt()[shell].to(mean.dtype)
    flat1, flat2 = (torch.fft.irfftn(torch.fft.rfftn(h) * gain, s=h.shape) for h in (half1, half2))
    return flat1, flat2


def window_side(resolution: float, pixel_size: float, box: int) -> int:
    """Even side in pixels of the window for maps of a resolution in Å: `WINDOW` times it, within bounds."""
    wanted = max(WINDOW * resolution / pixel_size, LEAST_WINDOW_PX)
    return 2 * math.ceil(min(wanted, LARGEST_WINDOW * box) / 2)


def moving_window(side: int, device: torch.device | None = None) -> Tensor:
    """(m, m, m) float32: half a cosine wave from 1 at the origin to 0 at m/2.

    The flatter it were, the farther it would smear a spectrum.
    """
    return soft_sphere(side, 0.0, side / 2, device)


def noise_threshold(window: Tensor) -> Tensor:
    """(m//2+1,) the larger of 0.143 and what the FSC of noise in a window exceeds once in twenty, at most 1.

    Args:
        window: (m, m, m) weights.
    """
    count = fourier_shell_correlation(window, window).count
    independent = (independent_fraction(window) * count).clamp_min(1.0)
    return (DEVIATIONS / independent.sqrt()).clamp(GOLD_STANDARD, 1.0)


def leakage(window: Tensor) -> Tensor:
    """How much of the power of shell t the window brings into shell s, from two shells below on: (S, S) float64, [s, t].

    |W(k - k')|² of the window's transform W, summed over the coefficients of both shells and scaled so that a sum over a
    shell goes in and one comes out (the mode coupling of Hivon et al. 2002, Astrophys. J. 567, 2, in three dimensions).

    Args:
        window: (m, m, m) weights.
    """
    m = window.shape[-1]
    k = torch.fft.fftfreq(m, 1 / m, dtype=torch.float64, device=window.device)
    shell = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt().round().long()
    power = torch.fft.fftn(window.double()).abs() ** 2
    kernel = torch.fft.rfftn(power / power.sum())
    out = torch.zeros(m // 2 + 1, m // 2 + 1, dtype=torch.float64, device=window.device)
    for t in range(m // 2 - 1):
        source = (shell == t).double()
        spread = torch.fft.irfftn(torch.fft.rfftn(source / source.sum()) * kernel, s=source.shape)
        sums = torch.zeros(int(shell.max()) + 1, dtype=torch.float64, device=window.device)
        out[t + 2 :, t] = sums.index_add_(0, shell.flatten(), spread.flatten())[t + 2 : m // 2 + 1]
    return out


def windowed_fsc(half1: Tensor, half2: Tensor, centres: Tensor, window: Tensor, leak: Tensor | None = None) -> Tensor:
    """FSC of two maps within a window about each of many places; outside the box both are 0.

    Args:
        half1, half2: (n, n, n) real.
        centres: (M, 3) int64 pixels [z, y, x] that come to lie on the window's origin.
        window: (m, m, m) weights.
        leak: `leakage`: what it brings into a shell is taken off the correlated part and off the whole; None: nothing.

    Returns:
        (M, m//2+1) float32; 1 in shell 0.
    """
    m = window.shape[-1]
    before, after = m // 2, m - m // 2 + max(0, int(centres.max()) + 1 - half1.shape[-1])
    padded = torch.stack([functional.pad(h, [before, after] * 3) for h in (half1, half2)])
    shell = (rfft_radius(window.shape, window.device) * m).round().long().clamp_max(m // 2 + 1).flatten()
    weight = rfft_multiplicity(window.shape, window.device).expand(m, m, m // 2 + 1).flatten().to(half1.dtype)
    out = []
    for part in centres.split(BATCH):
        cubes = torch.stack([padded[:, z : z + m, y : y + m, x : x + m] for z, y, x in part.tolist()], dim=1)
        spectra = torch.fft.rfftn(cubes * window, dim=(-3, -2, -1)).flatten(2)
        a, b = spectra
        products = [(a * b.conj()).real, a.real**2 + a.imag**2, b.real**2 + b.imag**2]
        sums = [
            torch.zeros(len(part), m // 2 + 2, dtype=p.dtype, device=p.device).index_add_(1, shell, weight * p)[:, :-1]
            for p in products
        ]
        cross, norm = sums[0].double(), (sums[1].double() * sums[2]).sqrt()
        if leak is not None:
            brought = torch.minimum((cross @ leak.T).clamp_min(0.0), 0.999 * norm)
            cross, norm = cross - brought, norm - brought
        out.append(torch.where(norm > 0, cross / norm, 0.0).clamp(-1.0, 1.0).float())
    curves = torch.cat(out)
    curves[:, 0] = 1.0
    return curves


def _first_crossings(curves: Tensor, threshold: Tensor) -> Tensor:
    """(M,) shells, with fractions, where each curve (M, S) first falls below the threshold (S,); S - 1 where none does."""
    excess = curves - torch.where(threshold < 1, threshold, -1.0).to(curves)
    below = excess[:, 1:] < 0
    at = below.long().argmax(dim=1) + 1
    above = torch.where(at > 1, excess.gather(1, (at - 1)[:, None])[:, 0], 1 - threshold[1].to(curves))
    under = excess.gather(1, at[:, None])[:, 0]
    fraction = above / (above - under).clamp_min(1e-9)
    return torch.where(below.any(dim=1), at - 1 + fraction, float(curves.shape[1] - 1))


def local_resolution(
    half1: Tensor,
    half2: Tensor,
    pixel_size: float,
    mask: Tensor,
    resolution: float,
) -> LocalResolution:
    """FSC within a soft sphere that moves over the mask, and the resolution of each voxel, between places by interpolation.

    Args:
        half1, half2: (n, n, n), unmasked.
        pixel_size: Å.
        mask: (n, n, n) in 0 ... 1: where it is above 0.5 the resolution is wanted; ones for everywhere.
        resolution: Å, of the whole map: it sets the size of the window.

    Raises:
        InputError: the mask is nowhere above 0.5.
    """
    n, m = half1.shape[-1], window_side(resolution, pixel_size, half1.shape[-1])
    step = max(1, round(m / OVERLAP))
    inside = mask > 0.5
    if not bool(inside.any()):
        raise InputError("the mask is nowhere above 0.5", remedy="make one with emc_mask")
    window = moving_window(m, half1.device)
    flat = _flattened(half1, half2, mask)
    count = -(-(n - 1) // step) + 1
    near = functional.max_pool3d(inside[None, None].float(), 2 * step + 1, 1, step)[0, 0] > 0
    places = (torch.arange(count, device=half1.device) * step).clamp_max(n - 1)
    measured = near[places][:, places][:, :, places]
    curves = windowed_fsc(*flat, measured.nonzero() * step, window, leakage(window))
    threshold = noise_threshold(window)
    frequency = _first_crossings(curves, threshold).clamp_min(1.0) / m
    at_voxels = _to_voxels(frequency, measured, step, n)
    found = torch.where(inside, pixel_size / at_voxels, 0.0)
    return LocalResolution(pixel_size, n, m, step, measured, curves, threshold, found, inside)


def _to_voxels(values: Tensor, measured: Tensor, step: int, box: int) -> Tensor:
    """(n, n, n) float32: values (M,) of the places that were measured, trilinear between them, the nearest's beyond."""
    lattice = torch.zeros(measured.shape, device=values.device)
    lattice[measured] = values.float()
    if not bool(measured.all()):
        nearest = ndimage.distance_transform_edt(~measured.cpu().numpy(), return_distances=False, return_indices=True)
        lattice = lattice[tuple(torch.from_numpy(i).long() for i in nearest)]
    side = (lattice.shape[0] - 1) * step + 1
    dense = functional.interpolate(lattice[None, None], size=(side,) * 3, mode="trilinear", align_corners=True)
    return dense[0, 0, :box, :box, :box]


def shell_gains(found: LocalResolution, gain: Callable[[Tensor], Tensor] = wiener_gain, least: float = 0.0) -> Tensor:
    """(M, window//2+1) gain of each window's shells: of its FSC up to its resolution, and zero from the next shell on.

    Args:
        gain: of an FSC of two halves; that of their mean, unless told otherwise.
        least: 1/px; up to it every FSC is believed, whatever noise alone might reach.
    """
    last = _first_crossings(found.curves, found.threshold).clamp_min(least * found.window)
    shell = torch.arange(found.curves.shape[1], device=last.device)
    kept = (last[:, None] + 1 - shell).clamp(0.0, 1.0)
    return gain(found.curves) * kept


def local_filter(
    volume: Tensor,
    found: LocalResolution,
    gain: Callable[[Tensor], Tensor] = wiener_gain,
    least: float = 0.0,
) -> Tensor:
    """Filter each voxel by the Wiener gain of its own surroundings (`shell_gains`), between places by interpolation.

    The gain at a frequency is linear between the shells of the window, so the map is split once into one band a shell,
    triangles that add up to 1, and each band is weighted in real space; frequencies beyond the last shell are left out.

    Args:
        volume: (n, n, n) real, such as the mean of both halves.
        found: of the half maps of the same box.
        gain, least: as in `shell_gains`.
    """
    gains = shell_gains(found, gain, least)
    spectrum = fourier.rfftn_centred(volume, 3)
    position = (rfft_radius(volume.shape, volume.device) * found.window).to(volume.dtype)
    out = torch.zeros_like(volume)
    for shell in range(gains.shape[1]):
        if bool((gains[:, shell] > 0).any()):
            band = (1 - (position - shell).abs()).clamp_min(0.0)
            part = fourier.irfftn_centred(spectrum * band, volume.shape)
            out += part * _to_voxels(gains[:, shell], found.measured, found.step, found.box).to(volume.dtype)
    return out
