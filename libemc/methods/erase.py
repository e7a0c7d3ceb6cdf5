"""Gold beads out of tilt images: what a bead and its fringe cover is replaced by what might as well have been there.

The pixels under a disc are drawn from the Gaussian field that has the image's own power spectrum and agrees with all
pixels around the disc (constrained realisation: Hoffman & Ribak 1991, Astrophys. J. 380:L5). So slow changes go on
smoothly, correlated noise has no seam, and the variance stays what it was. Beads are the landmarks that the alignment
calls so; others of their size are found in each image by a disc filter whose threshold is what the known ones reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.ctf import wavelength
from libemc.numerics.grids import rfft_multiplicity, rfft_radius
from libemc.numerics.peaks import find_peaks
from libemc.records import TiltSeriesRecord, need

FRINGES = 1.5
"""Width of what is erased around a bead, in units of the first Fresnel fringe, sqrt(wavelength · defocus)."""
USUAL_DEFOCUS = 40000.0
"""Å, where the record has no CTF."""
LEAST_MARGIN = 1.5
"""Pixels around a bead, whatever the fringe."""
RESPONSE = 0.6
"""Of the known beads' median response to the disc filter: what reaches it is a bead too."""
OUTSTANDING = 8.0
"""Standard deviations (by the median of the absolute values) above which a response may be a bead's."""
FRAME = 8
"""A patch's border of 1/8 on each side is left free, so that its opposite sides join smoothly."""
LEAST_POWER = 1e-4
"""Of the strongest frequency, as the least that the model of the noise has."""
TOLERANCE, MOST_STEPS = 1e-3, 200
"""Of the conjugate gradients: relative residual, and steps."""

SPOT_BLUR, SPOT_LEVEL = 15.0, 6.0
"""Å, and standard deviations: what stands out so far after that blur is a spot."""
SPOT_MARGIN, SPOT_SURROUNDINGS = 40.0, 200.0
"""Å around a spot, and the width of the square whose mean takes its place."""
MOST_SPOTS = 0.7
"""Of an image: what covers more isn't spots."""


def radial_power(image: Tensor, masked: Tensor, size: int) -> Tensor:
    """Mean power of an image's unmasked part by frequency.

    Args:
        image: (y, x) float32; masked: (y, x) bool, left out.
        size: side of the windows whose periodograms are averaged (Welch's method, half overlapping, Hann).

    Returns:
        (size//2+1,) variance per pixel at 0, 1, ... size//2 cycles per `size` pixels; the mean itself counts nothing, and
        frequency 0 has the power of the next.
    """
    size = min(size, *image.shape) // 2 * 2
    step = size // 2
    line = torch.hann_window(size, periodic=False)
    known = 1 - masked.unfold(0, size, step).unfold(1, size, step).reshape(-1, size, size).float()
    weight = line[:, None] * line * known
    share = (weight**2).sum((1, 2))
    chosen = share >= max(float(share.quantile(0.5)), 1e-6)  # those that are covered least
    weight, share = weight[chosen], share[chosen]
    windows = image.unfold(0, size, step).unfold(1, size, step).reshape(-1, size, size)[chosen]
    centred = weight * (windows - ((windows * weight).sum((1, 2)) / weight.sum((1, 2)))[:, None, None])
    power = (torch.fft.rfft2(centred).abs() ** 2 / share[:, None, None]).mean(0)
    ring = (rfft_radius((size, size)) * size).round().long().clamp_max(size // 2)
    count = torch.zeros(size // 2 + 1).index_add_(0, ring.flatten(), torch.ones(ring.numel()))
    mean = torch.zeros(size // 2 + 1).index_add_(0, ring.flatten(), power.flatten()) / count
    mean[0] = mean[1]
    return mean


def _spectrum(power: Tensor, shape: tuple[int, int]) -> Tensor:
    """A table of `radial_power` at the frequencies of an rfft layout, floored; the mean may be anything."""
    place = (rfft_radius(shape) * 2 * (len(power) - 1)).clamp_max(len(power) - 1)
    low = place.long().clamp_max(len(power) - 2)
    part = (place - low).float()
    table = (1 - part) * power[low] + part * power[low + 1]
    table = table.clamp_min(LEAST_POWER * float(table.max()))
    table[0, 0] = table.max() * table.numel()
    return table


def constrained_realisation(values: Tensor, free: Tensor, spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the free pixels of a periodic Gaussian field whose other pixels are known.

    Args:
        values: (y, x) float32, mean about 0; free: (y, x) bool, where values say nothing.
        spectrum: (y, x//2+1) variance per pixel at each frequency, positive.

    Returns:
        (y, x): the known pixels as they were, the free ones drawn.
    """
    shape = (values.shape[0], values.shape[1])

    def apply(factor: Tensor, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factor, s=shape)

    inverse, hole = 1 / spectrum, free.float()
    drawn = apply(spectrum.sqrt(), torch.randn(shape, generator=generator))
    # the difference from what was drawn has the smallest energy that the known pixels allow: Q_ff e_f = -Q_fk e_k
    known = (1 - hole) * (values - drawn)
    x = torch.zeros(shape)
    residual = -hole * apply(inverse, known)
    goal = TOLERANCE * float(residual.norm())
    direction, last = torch.zeros(shape), 1.0
    for step in range(MOST_STEPS):
        if float(residual.norm()) <= goal:
            break
        preconditioned = hole * apply(spectrum, residual)
        product = float((residual * preconditioned).sum())
        direction = preconditioned + (product / last if step else 0.0) * direction
        image = hole * apply(inverse, direction)
        length = product / float((direction * image).sum())
        x, residual, last = x + length * direction, residual - length * image, product
    return torch.where(free, drawn + x, values)


def discs(shape: tuple[int, int], centres: Tensor, radii: Tensor) -> Tensor:
    """Pixels (y, x) bool within any disc; centres (N, 2) are index coordinates (x, y), radii (N,) px."""
    covered = torch.zeros(shape, dtype=torch.bool)
    for (x, y), radius in zip(centres.tolist(), radii.tolist(), strict=True):
        y0, y1 = max(0, math.ceil(y - radius)), min(shape[0], math.floor(y + radius) + 1)
        x0, x1 = max(0, math.ceil(x - radius)), min(shape[1], math.floor(x + radius) + 1)
        if y0 < y1 and x0 < x1:
            dy, dx = torch.arange(y0, y1)[:, None] - y, torch.arange(x0, x1) - x
            covered[y0:y1, x0:x1] |= dy**2 + dx**2 <= radius**2
    return covered


def fill(image: Tensor, covered: Tensor, generator: torch.Generator) -> Tensor:
    """The image with its covered pixels (y, x) bool replaced by a realisation of what surrounds them."""
    if not bool(covered.any()) or bool(covered.all()):
        return image
    labels, _ = ndimage.label(covered.numpy())
    places = ndimage.find_objects(labels)
    largest = max(max(s.stop - s.start for s in place) for place in places)
    power = radial_power(image, covered, fourier.good_size(max(64, 3 * largest)))
    out, unknown = image.clone(), covered.clone()
    for number, place in enumerate(places, 1):
        window = tuple(
            _window(s.start, s.stop, n) for s, n in zip(place, image.shape, strict=True)
        )  # the disc, as much again around it, and the frame
        patch, free = out[window], unknown[window].clone()
        shape = (patch.shape[0], patch.shape[1])
        mean = float(patch[~free].median()) if bool((~free).any()) else float(image.median())
        values = torch.where(free, 0.0, patch - mean)
        spectrum = _spectrum(power, shape) * _local_scale(patch, ~free, _spectrum(power, shape))
        frame = [max(1, n // FRAME) for n in shape]
        free[: frame[0]] = free[-frame[0] :] = True
        free[:, : frame[1]] = free[:, -frame[1] :] = True
        mine = torch.from_numpy(labels[window] == number)
        drawn = constrained_realisation(values, free, spectrum, generator)
        patch[mine] = drawn[mine] + mean
        unknown[window] &= ~mine
    return out


def _window(start: int, stop: int, n: int) -> slice:
    """Of an axis of n pixels, what is looked at around start:stop."""
    size = min(fourier.good_size(math.ceil(max(2.5 * (stop - start), 32) * FRAME / (FRAME - 2))), n)
    low = min(max(0, (start + stop - size) // 2), n - size)
    return slice(low, low + size)


def _local_scale(patch: Tensor, known: Tensor, spectrum: Tensor) -> float:
    """Noise power of a patch over that of the model, from the differences between neighbouring known pixels.

    Differences, since slow changes, of which a patch shows a part only, must not count; by quartiles, which a particle or
    a bit of ice moves little.
    """
    steps = (patch[:, 1:] - patch[:, :-1])[known[:, 1:] & known[:, :-1]]
    if len(steps) < 16:
        return 1.0
    low, high = torch.quantile(steps[: 1 << 20], torch.tensor([0.25, 0.75])).tolist()
    shape = (patch.shape[0], patch.shape[1])
    kx = torch.arange(shape[1] // 2 + 1) / shape[1]
    share = spectrum * rfft_multiplicity(shape) * (2 - 2 * torch.cos(2 * math.pi * kx)) / math.prod(shape)
    expected = float(share.sum())
    seen = ((high - low) / 1.349) ** 2
    return seen / expected if seen > 0 and expected > 0 else 1.0


def disc_response(image: Tensor, radius: float, margin: float) -> Tensor:
    """How much darker than its surroundings is a disc at each pixel: mean of a ring minus mean of the disc, (y, x).

    Args:
        radius: px of the disc; the ring begins `margin` px beyond and is as wide as the radius.
    """
    reach = math.ceil(2 * radius + margin)
    shape = [fourier.good_size(n + reach) for n in image.shape]
    ky, kx = torch.fft.fftfreq(shape[0]) * shape[0], torch.fft.fftfreq(shape[1]) * shape[1]
    distance = torch.sqrt(ky[:, None] ** 2 + kx**2)
    disc = (distance <= radius).float()
    ring = ((distance > radius + margin) & (distance <= 2 * radius + margin)).float()
    kernel = torch.fft.rfft2(ring / ring.sum() - disc / disc.sum())
    mean = image.mean()
    pads = (0, shape[1] - image.shape[1], 0, shape[0] - image.shape[0])
    padded = torch.nn.functional.pad(image - mean, pads)
    response = torch.fft.irfft2(torch.fft.rfft2(padded) * kernel, s=tuple(shape))
    return response[: image.shape[0], : image.shape[1]]


def without_spots(image: Tensor, pixel_size: float, seed: int) -> Tensor:
    """An image whose strongest spots, gold or ice, are replaced: by detail from elsewhere in it, about the mean around them.

    For spectra, and where no alignment says where beads are. Detail of the same image keeps its rings; a bead's form factor
    has rings of its own, and is stronger than all else.

    Args:
        image: (y, x) float32. pixel_size: Å. seed: of where the detail comes from.
    """
    pixels = image.numpy()
    step = max(1, int(SPOT_BLUR / 2 / pixel_size))
    small = torch.nn.functional.avg_pool2d(image[None, None], step, ceil_mode=True)[0, 0].numpy()
    smooth = ndimage.gaussian_filter(small, SPOT_BLUR / (step * pixel_size), mode="reflect")
    smooth -= np.median(smooth)
    outside = np.abs(smooth) <= SPOT_LEVEL * 1.4826 * float(np.median(np.abs(smooth)))
    if outside.all():
        return image
    near = ndimage.distance_transform_edt(outside) * step * pixel_size < SPOT_MARGIN
    if near.mean() > MOST_SPOTS:
        return image
    spots = near.repeat(step, 0).repeat(step, 1)[: pixels.shape[0], : pixels.shape[1]]
    known = (~spots).astype(np.float32)
    width = max(1, round(SPOT_SURROUNDINGS / pixel_size))
    share = ndimage.uniform_filter(known, width, mode="nearest").clip(1e-3)
    mean = ndimage.uniform_filter(pixels * known, width, mode="nearest") / share
    left = np.where(spots, 0.0, pixels - mean)
    shift = np.random.default_rng(seed).integers(np.array(pixels.shape) // 4, np.array(pixels.shape) * 3 // 4)
    noise = np.roll(left, shift, (0, 1))
    return torch.from_numpy(np.where(spots, mean + noise, pixels).astype(np.float32))


@dataclass(frozen=True)
class Beads:
    """The known beads of a tilt series in some of its tilts, and how to be rid of them.

    Attributes:
        positions: (T, N, 2) Å from the image centre.
        diameters: (N,) Å.
        margin: (T,) Å around a bead that its fringe takes.
        tilts: (T,) the images' numbers in the stack: no two of them get the same noise, whatever tomogram they go into.
        sign: 1 where the specimen is dark in the images, -1 where it is bright.
        seed: of the noise.
    """

    positions: Tensor
    diameters: Tensor
    margin: Tensor
    tilts: tuple[int, ...]
    sign: int
    seed: int

    @staticmethod
    def of(record: TiltSeriesRecord, geometry: TiltGeometry, tilts: Sequence[int], seed: int = 0) -> Beads | None:
        """Those landmarks of a record's alignment that are beads; None if there are none.

        Args:
            geometry: of these tilts only.
        """
        landmarks = need(record, "alignment").landmarks
        found = [] if landmarks is None else zip(landmarks.xyz, landmarks.kind, landmarks.diameter, strict=True)
        beads = [(xyz, diameter) for xyz, kind, diameter in found if kind == "bead" and diameter]
        if not beads:
            return None
        points = torch.tensor([xyz for xyz, _ in beads], dtype=torch.float64)
        defocus = torch.full((len(tilts),), USUAL_DEFOCUS)
        if record.ctf is not None:
            defocus = torch.tensor([record.ctf.defocus_u[j] + record.ctf.defocus_v[j] for j in tilts]) / 2
        margin = FRINGES * (wavelength(record.source.voltage) * defocus.abs()).sqrt()
        diameters = torch.tensor([d for _, d in beads])
        sign = 1 if record.source.contrast == "dark" else -1
        positions = geometry.project(points)[0].transpose(0, 1).contiguous()
        return Beads(positions, diameters, margin, tuple(tilts), sign, seed)

    def covered(self, j: int, image: Tensor, pixel_size: float) -> Tensor:
        """Pixels (y, x) bool of image j that known beads, others like them, and their fringes take."""
        shape = (image.shape[0], image.shape[1])
        margin = max(LEAST_MARGIN, float(self.margin[j]) / pixel_size)
        centres = self.positions[j] / pixel_size + torch.tensor([shape[1] // 2, shape[0] // 2])
        radii = self.diameters / 2 / pixel_size
        usual = max(1.0, float(radii.median()))
        response = disc_response(self.sign * image, usual, margin)
        whole = centres.round().long()
        inside = ((whole >= 0) & (whole < torch.tensor([shape[1], shape[0]]))).all(1)
        if bool(inside.any()):
            reach = max(1, round(usual / 2))  # the alignment's error
            highest = torch.nn.functional.max_pool2d(response[None, None], 2 * reach + 1, 1, reach)[0, 0]
            known = highest[whole[inside, 1], whole[inside, 0]]
            noise = 1.4826 * float(response[::2, ::2].abs().median())
            limit = max(RESPONSE * float(known.median()), OUTSTANDING * noise)
            others, _ = find_peaks(response, limit, usual)
            centres = torch.cat([centres, others])
            radii = torch.cat([radii, torch.full((len(others),), usual)])
        return discs(shape, centres, radii + margin)

    def erase(self, j: int, image: Tensor, pixel_size: float) -> Tensor:
        """Image j (y, x), of any binning, without beads; the same noise whenever it is asked for."""
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.tilts[j])
        return fill(image, self.covered(j, image, pixel_size), generator)
