"""What is searched: the specimen as its tilt images, or a finished tomogram, show it, with noise as strong at all frequencies.

The images of a tilt series are whitened, multiplied by the CTF at each tile's own height and by the dose filter, and
back-projected (`reconstruct`): the adjoint of the forward model. The scalar product of that volume with a template is then
that of the images with the template's predicted images, Σ_j ⟨image_j, CTF_j dose_j slice_j⟩ / noise_j, for every place and
rotation: the wedge, the CTF and the weights of all tilts are in it as they were, not as a cone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from libemc.methods.erase import without_spots
from libemc.methods.match.templates import Template
from libemc.methods.reconstruct import CtfCorrection, Weighting, bin_image, field_window
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import slices
from libemc.numerics.grids import rfft_frequencies, rfft_radius
from libemc.numerics.masks import cosine_edge
from libemc.numerics.slices import Band
from libemc.numerics.so3 import rotation_grid

RINGS = 400
"""Of the noise spectra, per cycle per pixel."""
SMOOTHING = 4.0
"""Rings over which a noise spectrum is smoothed (Gaussian, standard deviation)."""
COARSEST = (2.4, 1.6)
"""Times the diameter of what is looked for: coarser detail is left out, all finer than the second taken."""
EDGE = 0.12
"""Width of the edge at the resolution of the search, as a fraction of that frequency."""
FLAT = 1e-5
"""Deviation over mean below which an image shows nothing."""
ROTATIONS_AT_ONCE = 64
CALIBRATION = 75.0
"""Degrees between the rotations at which norms are worked out in both ways."""


@dataclass(frozen=True)
class Passband:
    """What frequencies take part.

    Attributes:
        resolution: Å, the finest. diameter: Å, of the largest template.
    """

    resolution: float
    diameter: float

    def __call__(self, k: Tensor) -> Tensor:
        """Gain at frequencies k in 1/Å."""
        fine = cosine_edge(k, (1 - EDGE) / self.resolution, EDGE / self.resolution)
        low, high = (1 / (times * self.diameter) for times in COARSEST)
        return (fine * (1 - cosine_edge(k, low, high - low))).float()


EVERYTHING = Passband(1e-3, 1e9)
"""All frequencies that there are."""


class Sensitivity(Protocol):
    """How strongly a volume would show a template."""

    def norms(self, template: Template, rotations: Tensor) -> Tensor:
        """(N,) float64: the norm of the template's prediction at each rotation, in units of the noise: what a correlation is
        divided by to have noise of variance 1."""

    def weights(self, template: Template) -> Tensor:
        """(Q,) float32: squared sensitivity to each coefficient of `Template.ball`."""


def noise_spectrum(spectrum: Tensor, radius: Tensor) -> Tensor:
    """Power of a spectrum (...) on rings of |k| = radius (cycles per pixel), smoothed: (RINGS,)."""
    ring = _ring(radius).flatten()
    power = torch.zeros(RINGS).index_add_(0, ring, spectrum.abs().square().flatten())
    count = torch.bincount(ring, minlength=RINGS)
    seen = count > 0
    mean = torch.where(seen, power / count.clamp_min(1), 0.0)
    share = gaussian_filter1d(seen.float().numpy(), SMOOTHING, mode="constant").clip(1e-6)
    smooth = torch.from_numpy(gaussian_filter1d(mean.numpy(), SMOOTHING, mode="constant") / share)
    return smooth.clamp_min(1e-6 * float(smooth.max()) + 1e-30)


def whiten_images(
    load: Callable[[int], NDArray[Any]],
    geometry: TiltGeometry,
    binning: int,
    pixel_size: float,
    weighting: Weighting,
    band: Passband,
    out: NDArray[Any],
    clean: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Bin, clean, taper and filter images for the search: each over its noise's power, times the signal it can have.

    Args:
        load: gives raw image j (rows, columns); geometry: of the same T images.
        pixel_size: Å, after binning.
        out: (T, *binned_shape) float; filled with the images.
        clean: what is done to raw image j before all else; None: its strongest spots are taken out.

    Yields:
        The number of each image that is done, and its noise's power (RINGS,) per pixel.
    """
    shape = (out.shape[1], out.shape[2])
    radius = rfft_radius(shape)
    ring = _ring(radius)
    k = torch.arange(RINGS) / RINGS / pixel_size
    signal = weighting.signal(k).expand(len(out), -1) * band(k)
    for j in range(len(out)):
        raw = torch.from_numpy(load(j).astype("float32"))
        raw = without_spots(raw, pixel_size / binning, j) if clean is None else clean(j, raw)
        image = bin_image(raw, binning)
        window = field_window(geometry, j, shape, pixel_size, weighting)
        mean = (image * window).sum() / window.sum()
        if float(image.std()) <= FLAT * abs(float(mean)):  # nothing but rounding
            out[j] = 0
            yield j, torch.full((RINGS,), math.inf)
            continue
        image = (image - mean) * window
        spectrum = torch.fft.rfft2(image)
        area = float((window**2).sum())
        power = noise_spectrum(spectrum, radius) / area
        out[j] = torch.fft.irfft2(spectrum * (signal[j] / power)[ring], s=shape).numpy()
        yield j, power


@dataclass(frozen=True)
class TiltSensitivity:
    """That of the back-projection of `whiten_images`.

    Attributes:
        geometry, correction, weighting: of the same T images.
        band: of the search.
        noise: (T, RINGS) of `whiten_images`, at `pixel_size`.
    """

    geometry: TiltGeometry
    correction: CtfCorrection | None
    weighting: Weighting
    band: Passband
    noise: Tensor
    pixel_size: float

    def squared(self, band: Band) -> Tensor:
        """(T, K) squared transfer over noise of each image's coefficients, at the specimen's centre."""
        kx, ky = band.frequencies(self.pixel_size)
        k = torch.sqrt(kx**2 + ky**2)
        transfer = self.weighting.signal(k) * self.band(k)
        if self.correction is not None:
            heights = torch.zeros(len(self.noise), dtype=torch.float64)
            transfer = transfer * self.correction.factors(heights, band, self.pixel_size)
        return transfer**2 / self.noise[:, _ring(k * self.pixel_size)]

    def norms(self, template: Template, rotations: Tensor) -> Tensor:
        """As `Sensitivity`: exact, from the slices of all images."""
        band = Band.of(template.box, template.radius)
        weights = (self.squared(band) * band.multiplicity).float()
        matrices = self.geometry.around(torch.zeros(3, dtype=torch.float64))
        total = []
        for some in rotations.split(ROTATIONS_AT_ONCE):
            turned = (matrices[None] @ some.to(matrices)[:, None]).reshape(-1, 3, 3)
            values = slices.extract_slices(template.fourier, turned, band).reshape(len(some), len(matrices), -1)
            total.append((values.abs().square() * weights).sum((1, 2)))
        return torch.cat(total).double().sqrt() / template.box

    def weights(self, template: Template) -> Tensor:
        """As `Sensitivity`."""
        band = Band.of(template.box, template.radius)
        squared = self.squared(band).float()
        sums = slices.Accumulator(template.box, template.radius)
        matrices = self.geometry.around(torch.zeros(3, dtype=torch.float64)).float()
        sums.add(torch.zeros(squared.shape, dtype=torch.complex64), squared, matrices, band)
        spread = torch.roll(sums.point_spread(), (-(template.box // 2),) * 3, (0, 1, 2)).permute(2, 1, 0)
        lattice = (torch.fft.rfftn(spread.contiguous()).real / template.box**3).flatten()[template.ball[1]].clamp_min(0)
        # what of the point spread is cut off by the box is some per cent of the norms, the same for all rotations
        few = rotation_grid(CALIBRATION)
        found = _norms(template, few, lattice)
        return lattice * float((self.norms(template, few) / found).mean()) ** 2


@dataclass(frozen=True)
class WedgeSensitivity:
    """That of a finished tomogram, whitened: all directions between the tilts, none beyond.

    Attributes:
        tilts: lowest and highest angle, degrees, about the y axis; None: all directions were measured.
        band: of the search. noise: (RINGS,) power per voxel, at `pixel_size`.
    """

    tilts: tuple[float, float] | None
    band: Passband
    noise: Tensor
    pixel_size: float

    def squared(self, kx: Tensor, kz: Tensor, k: Tensor) -> Tensor:
        """Squared transfer over noise at frequencies in 1/Å."""
        return _passed(self.tilts, self.band, kx, kz, k) ** 2 / self.noise[_ring(k * self.pixel_size)]

    def weights(self, template: Template) -> Tensor:
        """As `Sensitivity`."""
        k = template.ball[0] / (template.box * self.pixel_size)
        return self.squared(k[0], k[2], k.norm(dim=0)) / template.box

    def norms(self, template: Template, rotations: Tensor) -> Tensor:
        """As `Sensitivity`: from the box's Fourier coefficients."""
        return _norms(template, rotations, self.weights(template))


def _norms(template: Template, rotations: Tensor, weights: Tensor) -> Tensor:
    """`Sensitivity.norms` out of `Sensitivity.weights`."""
    double = weights * torch.where(template.ball[0][2] == 0, 1.0, 2.0)
    total = [template.coefficients(some).abs().square() @ double for some in rotations.split(ROTATIONS_AT_ONCE)]
    return torch.cat(total).double().sqrt() / template.box


def _ring(radius: Tensor) -> Tensor:
    """Numbers of the rings of a noise spectrum, at cycles per pixel."""
    return (radius * RINGS).round().long().clamp_max(RINGS - 1)


def _passed(tilts: tuple[float, float] | None, band: Passband, kx: Tensor, kz: Tensor, k: Tensor) -> Tensor:
    """Gain of what a tomogram shows of frequencies, 1/Å."""
    gain = band(k)
    if tilts is None:
        return gain
    low, high = (math.radians(a) for a in tilts)
    # tilt a measures the plane whose normal is the beam: it holds the direction (cos a, 0, sin a) and its opposite, and the axis
    angle = torch.atan2(torch.where(kx < 0, -kz, kz), kx.abs())
    return gain * ((angle >= low) & (angle <= high) | (kx == 0) & (kz == 0)).to(gain)


def whiten_volume(
    volume: Tensor, tilts: tuple[float, float] | None, band: Passband, pixel_size: float
) -> tuple[Tensor, WedgeSensitivity]:
    """A tomogram (z, y, x) over its noise's power by frequency, within what was measured; and how it shows a template.

    Args:
        tilts, band: as in `WedgeSensitivity`. pixel_size: Å.
    """
    axes = zip(rfft_frequencies(volume.shape), volume.shape, strict=True)
    kz, ky, kx = (f / (n * pixel_size) for f, n in axes)
    k = torch.sqrt(kx**2 + ky**2 + kz**2)
    kx, kz, k = torch.broadcast_tensors(kx, kz, k)
    spectrum = torch.fft.rfftn(volume - volume.mean())
    measured = _passed(tilts, EVERYTHING, kx, kz, k) > 0
    power = noise_spectrum(spectrum[measured], (k * pixel_size)[measured]) / volume.numel()
    gain = _passed(tilts, band, kx, kz, k)
    white = torch.fft.irfftn(spectrum * gain / power[_ring(k * pixel_size)], s=volume.shape)
    return white, WedgeSensitivity(tilts, band, power, pixel_size)
