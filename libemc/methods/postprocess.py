"""What is done with finished maps: their resolution, comparison, resampling, turning, and the threshold of a mask.

Tensors [z, y, x] in, tensors and numbers out; origins at n//2, lengths in Å where not said otherwise. What resolution
and shells mean is `numerics.fsc`'s; what stands here is which curves and crossings are reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from libemc.errors import InputError
from libemc.numerics import fourier
from libemc.numerics.fsc import Curve, corrected_fsc, fourier_shell_correlation, information_threshold, resolution_at

GOLD_STANDARD, MODEL = 0.143, 0.5
"""Thresholds: between independent halves, and between a map and its model (Rosenthal & Henderson 2003)."""

BITS = {"half_bit": 0.5, "one_bit": 1.0}
"""Information thresholds by name (van Heel & Schatz 2005)."""

PROTEIN_DENSITY = 0.81
"""Da/Å³: 1.35 g/cm³, a partial specific volume of 0.74 cm³/g (Harpaz, Gerstein & Chothia 1994, Structure 2, 641)."""

SAME_GRID = 1e-3
"""Relative difference of two pixel sizes that is still taken for rounding: a twentieth of a pixel over 50 pixels."""

SAME_STEP = 1e-6
"""Relative change of the pixel size that is none: what the float32 of a header leaves of a number."""

WHOLE = 0.05
"""Pixels by which two samplings of a field may differ in length and still count as fitting."""

MASK_ROUNDING = 0.01
"""How far a mask may leave 0 ... 1: what resampling one does."""

NOISE_DEVIATIONS = 4.0
"""An automatic threshold is at least this many standard deviations of the background above it."""

_HISTOGRAM_BINS = 1024
DEVIATION_OF_MAD = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""


# ----------------------------------------------------------------------------------------------------------- resolution


@dataclass(frozen=True)
class Resolution:
    """Shell correlations of two maps and where they fall below each threshold.

    Attributes:
        pixel_size: Å.
        curves: by name: unmasked, masked, randomised, corrected, as far as there are such.
        thresholds: by name, what each of the `crossings` compares with: a number, or one per shell.
        crossings: by curve, then by threshold, Å; that of the last shell where the curve stays above.
        main: the curve that counts, the last of corrected, masked, unmasked that there is.
        criterion: the threshold that counts.
    """

    pixel_size: float
    curves: dict[str, Curve]
    thresholds: dict[str, float | Tensor]
    crossings: dict[str, dict[str, float]]
    main: str
    criterion: str

    @property
    def frequency(self) -> list[float]:
        """Frequency of each shell, 1/Å."""
        return [float(f) / self.pixel_size for f in self.curves["unmasked"].frequency]

    @property
    def value(self) -> float:
        """The resolution that counts, Å."""
        return self.crossings[self.main][self.criterion]

    def stays_above(self) -> bool:
        """Whether the main curve never falls below its criterion, so that the pixels limit what is known."""
        return not bool((self.curves[self.main].values[1:] < self.thresholds[self.criterion]).any())

    def table(self) -> dict[str, Any]:
        """All of it as plain numbers, for JSON."""
        curves = {name: [float(v) for v in curve.values] for name, curve in self.curves.items()}
        levels = {
            name: [float(v) for v in level] if isinstance(level, Tensor) else level
            for name, level in self.thresholds.items()
        }
        return {
            "pixel_size": self.pixel_size,
            "resolution": self.value,
            "curve": self.main,
            "threshold": self.criterion,
            "resolutions": self.crossings,
            "frequency": self.frequency,
            "curves": curves,
            "thresholds": levels,
        }


def half_map_resolution(
    half1: Tensor,
    half2: Tensor,
    pixel_size: float,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Resolution:
    """Resolution of two independent half maps: at 0.143, 0.5, half a bit and one bit (convention 16).

    The bits (van Heel & Schatz 2005) are of the coefficients that are independent within the mask.

    Args:
        half1, half2: (n, n, n), unmasked.
        pixel_size: Å.
        mask: (n, n, n) in 0 ... 1; with it the FSC is corrected by phase randomisation.
        generator: of the random phases, on the maps' device.

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    if mask is None:
        curves = {"unmasked": fourier_shell_correlation(half1, half2)}
    else:
        curves = vars(corrected_fsc(half1, half2, mask, generator))
    main = list(curves)[-1]
    share = 0.5 * (1.0 if mask is None else independent_fraction(mask))
    bits = {name: information_threshold(curves[main], b, share).values for name, b in BITS.items()}
    return _resolution(curves, pixel_size, {"0.143": GOLD_STANDARD, "0.5": MODEL, **bits}, main, "0.143")


def model_resolution(volume: Tensor, model: Tensor, pixel_size: float, mask: Tensor | None = None) -> Resolution:
    """To which resolution a map agrees with a model of it: where their FSC falls below 0.5.

    Args:
        volume, model: (n, n, n).
        pixel_size: Å.
        mask: (n, n, n) in 0 ... 1.

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    curves = {"unmasked": fourier_shell_correlation(volume, model)}
    if mask is not None:
        curves["masked"] = fourier_shell_correlation(volume * mask, model * mask)
    return _resolution(curves, pixel_size, {"0.143": GOLD_STANDARD, "0.5": MODEL}, list(curves)[-1], "0.5")


def _resolution(
    curves: dict[str, Curve], pixel_size: float, thresholds: dict[str, float | Tensor], main: str, criterion: str
) -> Resolution:
    crossings: dict[str, dict[str, float]] = {}
    for name, curve in curves.items():
        if name != "randomised":
            levels = {label: _attainable(level, curve) for label, level in thresholds.items()}
            crossings[name] = {label: resolution_at(curve, level, pixel_size) for label, level in levels.items()}
    return Resolution(pixel_size, curves, thresholds, crossings, main, criterion)


def _attainable(level: float | Tensor, curve: Curve) -> float | Tensor:
    """A threshold without its shells of so few coefficients that it is 1 there, which says nothing of the curve."""
    return torch.where(level < 1, level, curve.values) if isinstance(level, Tensor) else level


def independent_fraction(mask: Tensor) -> float:
    """Share of the coefficients of a Fourier shell that are independent of each other in masked white noise.

    The covariance of two of them is the transform of m² at their distance. A shell is a sheet, thinner than that is
    wide; the squared covariances, summed over a plane by Parseval's theorem, are those of the projection p of m² along
    its normal: (Σm²)² / (A Σp²), A the area of the box. The mean of the three axes is taken for all directions.

    Args:
        mask: (n, n, n) in 0 ... 1.

    Returns:
        1 for a mask of ones, 8π/9 (r/n)² for a ball of radius r.
    """
    square = mask.double() ** 2
    projections = torch.stack([square.sum(dim=dim) for dim in range(3)])
    return float(square.sum() ** 2 / (projections**2).mean(dim=0).sum() / projections[0].numel())


class Grid(NamedTuple):
    """Where the samples of a map lie: shape (z, y, x) and pixel size in Å. Its text is for messages."""

    shape: tuple[int, ...]
    pixel_size: float

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))} voxels of {self.pixel_size:g} Å"

    def same_sampling(self, other: Grid) -> bool:
        """Whether the pixels have one size, but for rounding."""
        return abs(self.pixel_size / other.pixel_size - 1) < SAME_GRID

    def same(self, other: Grid) -> bool:
        """Whether two maps can be compared voxel by voxel."""
        return self.same_sampling(other) and self.shape == other.shape


def check_mask(mask: Tensor, where: Any = None) -> None:
    """Raise InputError, about `where`, for a mask that is empty or leaves 0 ... 1."""
    low, high = float(mask.min()), float(mask.max())
    if low < -MASK_ROUNDING or high > 1 + MASK_ROUNDING:
        raise InputError(f"is no mask: its values go from {low:.4g} to {high:.4g}", where, "make one with emc_mask")
    if high <= 0:
        raise InputError("is an empty mask", where, "make one with emc_mask")


# ----------------------------------------------------------------------------------------------------------- comparison


class Comparison(NamedTuple):
    """How two maps differ.

    Attributes:
        correlation: Pearson's, over all voxels; 0 where a map is constant.
        difference: root of the sum of squared differences over that of the second map's squares.
        resolution: Å, where the FSC of their largest common cube falls below 0.5.
    """

    correlation: float
    difference: float
    resolution: float


def compare(a: Tensor, b: Tensor, pixel_size: float) -> Comparison:
    """Compare two maps voxel by voxel and shell by shell.

    Args:
        a, b: (z, y, x) of one shape.
        pixel_size: Å.
    """
    x, y = a.double(), b.double()
    power = float((y**2).sum())
    difference = math.sqrt(float(((x - y) ** 2).sum()) / power) if power > 0 else math.inf
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    side = (min(a.shape),) * 3
    curve = fourier_shell_correlation(fourier.centre_crop(a, side), fourier.centre_crop(b, side))
    correlation = float((x * y).sum()) / norm if norm > 0 else 0.0
    return Comparison(correlation, difference, resolution_at(curve, MODEL, pixel_size))


# ------------------------------------------------------------------------------------------------ sampling and position


def resampled_size(size: int, step: float) -> int:
    """Samples of an axis of `size` at `step` times the pixel size: a whole number that fits, or the nearest even one."""
    exact = size / step
    whole = round(exact)
    return max(whole if abs(exact - whole) < WHOLE else 2 * round(exact / 2), 1)


def _interpolation(size: int, new: int, step: float) -> Tensor:
    """(new, size) float64: the trigonometric interpolation of `size` samples, without what `step` would alias.

    Cosines up to the lower of the two Nyquist frequencies: with new · step = size this is `fourier.resize`.
    """
    k = torch.arange(math.floor(size / (2 * max(step, 1.0)) * (1 + 1e-9)) + 1, dtype=torch.float64)
    weight = torch.where((k == 0) | (2 * k == size), 1.0, 2.0) / size
    omega = 2 * torch.pi * k / size
    there = (torch.arange(new, dtype=torch.float64)[:, None] - new // 2) * step * omega
    here = (torch.arange(size, dtype=torch.float64)[:, None] - size // 2) * omega
    return (there.cos() * weight) @ here.cos().T + (there.sin() * weight) @ here.sin().T


def resample(volume: Tensor, step: float) -> Tensor:
    """A map with another pixel size over the same field, band-limited, exact for any ratio; values are kept.

    Args:
        volume: (z, y, x) real, taken as periodic.
        step: new pixel size over old; an integer is a binning.

    Returns:
        (z', y', x') of `resampled_size`, the origin at n'//2 still on the same point.
    """
    if abs(step - 1) < SAME_STEP:
        return volume
    for size in volume.shape:
        matrix = _interpolation(size, resampled_size(size, step), step).to(volume)
        volume = torch.tensordot(volume, matrix, dims=([0], [1]))  # the new axis comes last: after three, all in order
    return volume.contiguous()


def place(volume: Tensor, rotation: Tensor, shift_px: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Turn a map about its origin, then shift it: the density at R·u + s is the input at u (convention 8).

    One interpolation by cubic splines, on the CPU in float64; 0 comes in from outside the box.

    Args:
        volume: (z, y, x) real.
        rotation: (3, 3), R.
        shift_px: s, pixels, (x, y, z).

    Returns:
        (z, y, x), dtype and device of the input.
    """
    inverse = rotation.double().cpu().numpy().T[::-1, ::-1]  # of [z, y, x]
    origin = np.array([n // 2 for n in volume.shape], dtype=np.float64)
    shift = np.array(shift_px[::-1], dtype=np.float64)
    turned = ndimage.affine_transform(
        volume.double().cpu().numpy(), inverse, origin - inverse @ (origin + shift), order=3, mode="constant"
    )
    return torch.from_numpy(turned).to(volume)


def mirror(volume: Tensor, axis: str) -> Tensor:
    """Reflect a map in the plane through its origin across `axis` (x, y or z).

    The first plane of an even box has no partner and stays.
    """
    dim = "zyx".index(axis)
    return volume.flip(dim).roll(1 - volume.shape[dim] % 2, dim)


# ---------------------------------------------------------------------------------------------------------------- masks


def otsu_threshold(values: Tensor) -> float:
    """The value that parts two classes so that the variance between them is largest (Otsu 1979); any shape."""
    low, high = float(values.min()), float(values.max())
    counts, width = torch.histc(values.double(), _HISTOGRAM_BINS, low, high), (high - low) / _HISTOGRAM_BINS
    edges = low + width * (torch.arange(_HISTOGRAM_BINS, device=counts.device) + 1)
    below, moment = counts.cumsum(0), (counts * (edges - width / 2)).cumsum(0)
    product = below * (below[-1] - below)
    spread = torch.where(product > 0, (moment * below[-1] - moment[-1] * below) ** 2 / product, 0.0)
    return float(edges[spread.argmax()])


def automatic_threshold(volume: Tensor) -> float:
    """The density that parts a particle from its surroundings: Otsu's, and well above the noise of the background.

    Otsu 1979 maximises the variance between the two classes of voxels. Where the particle takes a small part of a noisy
    box that would cut the noise in two; so at least `NOISE_DEVIATIONS` above the median, the deviation taken from the
    median absolute deviation of the half below it, which the particle, white, doesn't reach.

    Args:
        volume: (z, y, x) real, white; smooth it first.
    """
    values = volume.double().flatten()
    median = values.median()
    deviation = DEVIATION_OF_MAD * float((median - values[values <= median]).median())
    return max(otsu_threshold(values), float(median) + NOISE_DEVIATIONS * deviation)


def keep_largest(volume: Tensor, threshold: float) -> Tensor:
    """Lower to the threshold all that is above it outside the largest region whose voxels touch by their faces.

    Args:
        volume: (z, y, x) real.
        threshold: in the units of the map.
    """
    labels, count = ndimage.label((volume > threshold).cpu().numpy())
    if count < 2:
        return volume.clone()
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    outside = torch.from_numpy((labels != largest) & (labels > 0)).to(volume.device)
    return torch.where(outside, torch.as_tensor(threshold).to(volume), volume)


def protein_mass(voxels: int, pixel_size: float) -> float:
    """Mass in kDa of so many voxels of protein."""
    return voxels * pixel_size**3 * PROTEIN_DENSITY / 1000
