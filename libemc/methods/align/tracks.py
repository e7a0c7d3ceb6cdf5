"""Tracks: where the points of a specimen are seen in every image, found by what all other images say.

A landmark is anything that stands out, gold or not. Its images are cut out of the tilt series where the present geometry
puts them; each is compared with the reprojection of the local tomogram of all others (`numerics.overlap`), in which
noise counts for what it is. The comparison is a log-likelihood of displacements, so every position comes with its
covariance, weak landmarks say little instead of something wrong, and the landmarks of a tilt can vote together on how
far the whole image is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.masks import soft_disc
from libemc.numerics.overlap import Overlap, couplings, predict
from libemc.numerics.patches import cut_patches
from libemc.numerics.slices import Band

WINDOW = 0.8  # diameter of what is looked at, over the box
COLUMN = 0.75  # of the diameter: width of the window at half height
LOWEST = 2.0  # Fourier pixels: below, the window's edge and the background decide
EPSILON = 0.2  # share of a landmark's vote that is spread over all displacements
VOTE_BLUR = 1.0  # px: how far landmarks may disagree and still vote for the same displacement
LEAST_CERTAIN = 0.5  # share of the likelihood near the highest peak, below which there is no measurement
PEAK_RADIUS = 2.5  # px around the highest peak that count as the peak
NEWTON_STEPS = 4
FLOOR = 0.1  # px: nothing is measured better than this
GAINS = (0.1, 3.0)  # bounds of an image's signal over that of the others


@dataclass(frozen=True)
class Scale:
    """At what sampling, and how far around, landmarks are looked at.

    Attributes:
        pixel_size: Å of the images.
        diameter: Å of what is looked at in the image.
        depth: Å along the beam of what is seen there: of the whole specimen, but for gold.
        radius: of the band, cycles per pixel.
        reach: Å: how far from where it's expected a landmark is looked for.
    """

    pixel_size: float
    diameter: float
    radius: float
    reach: float
    depth: float

    @property
    def box(self) -> int:
        """Pixels, even."""
        return 2 * math.ceil(self.diameter / WINDOW / self.pixel_size / 2)

    @property
    def band(self) -> Band:
        """Of the box."""
        return Band.of(self.box, self.radius * self.box)


@dataclass(frozen=True)
class Evidence:
    """What the images say about displacements, for T tilts and P landmarks.

    Attributes:
        cross: (P, T, K) complex64: log-likelihood of displacement d (px) is Re Σ cross·exp(2πi k·d / box).
        seen: (T, P) bool: which were compared.
        centre: (T, P, 2) Å from the image centre: where d = 0 is.
        gain: (T,) signal of each image over the mean of all.
        strength: (P,) expected log-likelihood that a landmark's images together gain at the right place.
        links: (P, T, T, 2, 2): a displacement e of all images, [j, i], is seen as Σ_i links[j, i]·e_i; unit matrices on the
            diagonal. None: every image is compared with something that doesn't move with the others.
    """

    scale: Scale
    cross: Tensor
    seen: Tensor
    centre: Tensor
    gain: Tensor
    strength: Tensor
    links: Tensor | None


def noise_power(
    images: NDArray[np.float32], scale: Scale, geometry: TiltGeometry, points: Tensor, most: int = 40
) -> Tensor:
    """Power spectrum of each image, median over the landmarks' patches.

    Returns:
        (T, box//2 + 1) per ring of one Fourier pixel of the box, relative to a patch of white noise of deviation 1.
    """
    step = max(1, len(points) // most)
    cutter = Cutter(images, scale, geometry)
    band = Band.of(scale.box)
    ring = band.radii.round().long()
    counts = torch.bincount(ring, minlength=scale.box // 2 + 1)
    rows = []
    for point in points[::step]:
        spectra, seen, _ = cutter(point)
        power = spectra[:, 2 * band.ky, 2 * band.kx].abs().square()
        rings = torch.zeros(len(power), len(counts)).index_add_(1, ring, power) / counts
        rows.append(torch.where(seen[:, None], rings, torch.nan))
    power = torch.nanmedian(torch.stack(rows), dim=0).values
    overall = torch.nanmedian(power, dim=0).values  # for images that show none of the landmarks
    power = torch.where(torch.isfinite(power), power, overall)
    return power.clamp_min(1e-3 * float(power.median()))


class Cutter:
    """Cuts a landmark out of all images, windowed, padded to twice the box, centred to a fraction of a pixel."""

    def __init__(self, images: NDArray[np.float32], scale: Scale, geometry: TiltGeometry) -> None:
        self.images, self.scale, self.geometry = images, scale, geometry
        n = scale.box
        radius = scale.diameter / scale.pixel_size / 2
        self.window = soft_disc(n, 0.75 * radius, 0.5 * radius).float()
        self.share = float(self.window.square().mean())
        """Of the coefficients, those that are independent."""
        self.k_x = torch.arange(n + 1) / (2 * n)
        self.k_y = torch.fft.fftfreq(2 * n)

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spectra (T, 2n, n+1) with the point at pixel 0; which images show it (T,); where it is, (T, 2) Å."""
        n, size = self.scale.box, self.images.shape[:0:-1]
        where = self.geometry.project(point[None])[0][0]
        position = where / self.scale.pixel_size
        cut, rest = cut_patches(self.images, position, n)
        pixel = position - rest + torch.tensor([length // 2 for length in size])
        seen = ((pixel >= n // 4) & (pixel < torch.tensor(size) - n // 4)).all(dim=1)
        cut[~seen] = 0
        inside = self.window * (cut != 0)
        mean = (cut * inside).sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True).clamp_min(1)
        cut = (cut - mean) * inside
        padded = torch.zeros(len(cut), 2 * n, 2 * n)
        padded[:, n // 2 : n // 2 + n, n // 2 : n // 2 + n] = cut
        spectra = torch.fft.rfft2(torch.roll(padded, (-n, -n), dims=(1, 2)))
        rest = rest.float()
        turns = rest[:, :1] * self.k_x, rest[:, 1:] * self.k_y
        phases = [torch.polar(torch.ones_like(t), 2 * math.pi * t) for t in turns]
        spectra *= phases[1][:, :, None] * phases[0][:, None, :]
        return spectra, seen, where

    def whitened(self, spectra: Tensor, noise: Tensor) -> Tensor:
        """Padded spectra (T, 2n, n+1) over the root of the noise power (T, rings), interpolated between the rings."""
        n = self.scale.box
        radius = torch.hypot(n * self.k_y[:, None], n * self.k_x)
        low = radius.long().clamp_max(noise.shape[1] - 2)
        part = (radius - low).clamp(0, 1)
        for j, power in enumerate(noise):
            spectra[j] *= torch.lerp(power[low], power[low + 1], part).rsqrt()
        return spectra


def compare(
    images: NDArray[np.float32],
    scale: Scale,
    geometry: TiltGeometry,
    points: Tensor,
    noise: Tensor,
    gains: Tensor,
) -> Evidence:
    """Compare every image of every landmark with what the others predict.

    Args:
        images: (T, y, x) at the scale's pixel size, mean about 0, exactly 0 where there's nothing; origin at n//2.
        geometry: where to look; tilts that aren't in use are passed over.
        points: (P, 3) Å.
        noise: of `noise_power`.
        gains: (T,) as far as known; ones to begin with.
    """
    band = scale.band
    cutter = Cutter(images, scale, geometry)
    rings = noise.shape[1]
    ring = band.radii.round().long()
    counted = band.radii >= LOWEST
    multiplicity = band.multiplicity.float() / 2
    size = scale.box * scale.pixel_size
    lone = scale.depth <= scale.diameter
    overlap = Overlap(scale.depth / size, math.inf if lone else COLUMN * scale.diameter / size)

    def one(point: Tensor) -> tuple[Tensor, ...]:
        spectra, seen, where = cutter(point)
        seen = seen & geometry.use
        values, sums, weights = predict(cutter.whitened(spectra, noise), geometry.matrices, band, overlap, gains, seen)
        gain = gains[:, None].float()
        agreement = (values * sums.conj()).real * gain * counted
        expected = weights * gain**2 * counted
        top = torch.zeros(rings).index_add_(0, ring, agreement.sum(0))
        bottom = torch.zeros(rings).index_add_(0, ring, expected.sum(0))
        # three rings together; what is not positive is nothing
        top, bottom = (torch.nn.functional.avg_pool1d(v[None, None], 3, 1, 1)[0, 0] for v in (top, bottom))
        signal = (top / bottom.clamp_min(1e-6)).clamp_min(0)[ring]
        predicted = sums * (signal / (weights * signal + 1)) * gain
        variance = 1 + gain**2 * signal / (weights * signal + 1)
        factor = 2 * cutter.share * multiplicity * counted / variance
        cross = values * predicted.conj() * factor
        own = (agreement * signal).sum(1), (expected * signal**2).sum(1)
        # what an image's coefficient tells about its displacement is shared by those that predict it
        told = factor * signal**2 * gain**2 / (weights * signal + 1)
        held, turned = couplings(geometry.matrices, band, overlap, gains, seen, told)
        total = held.sum(1) + 1e-9 * torch.eye(2)
        links = -torch.linalg.solve(total[:, None], held) @ turned.mT
        links[range(len(links)), range(len(links))] = torch.eye(2).double()
        return cross, seen, where, own[0], own[1], (predicted.abs().square() * factor).sum() / 2, links.float()

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = list(pool.map(one, points))
    cross, seen, where, top, bottom, strength, links = (torch.stack(p) for p in zip(*parts, strict=True))
    gain = top.sum(0) / bottom.sum(0).clamp_min(1e-9)
    gain = (gain * gains).clamp(*GAINS)
    used = geometry.use & seen.any(0)
    gain = torch.where(used, gain / gain[used].mean().clamp_min(1e-6), 1.0).clamp(*GAINS)
    return Evidence(scale, cross, seen.T, where.transpose(0, 1), gain, strength, links)


def _maps(evidence: Evidence, reach: int) -> Iterator[tuple[int, Tensor]]:
    """The log-likelihood (T, 2·reach+1, 2·reach+1) of each landmark over displacements in whole pixels."""
    n, band = evidence.scale.box, evidence.scale.band
    for p in range(len(evidence.cross)):
        # sum over the half plane of Re(c·exp(2πi k·d/n)), as an inverse transform (its mates are added there)
        half = band.put(evidence.cross[p] / band.multiplicity.float())
        maps = torch.fft.irfft2(half, s=(n, n)) * n**2
        maps = torch.fft.fftshift(maps, dim=(-2, -1))
        middle = n // 2
        yield p, maps[:, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]


def _reach(evidence: Evidence) -> int:
    scale = evidence.scale
    return min(max(round(scale.reach / scale.pixel_size), 2), scale.box // 2 - 1)


def _blur(maps: Tensor) -> Tensor:
    """Densities (T, r, r) blurred by `VOTE_BLUR`."""
    u = torch.arange(-3, 4)
    line = torch.exp(-(u**2) / (2 * VOTE_BLUR**2))
    line = (line / line.sum())[None, None]
    for axis in (-1, -2):
        swapped = maps.transpose(-1, axis)
        shape = swapped.shape
        flat = torch.nn.functional.conv1d(swapped.reshape(-1, 1, shape[-1]), line, padding=3)
        maps = flat.reshape(shape).transpose(-1, axis)
    return maps


def vote(evidence: Evidence) -> Tensor:
    """How far each image as a whole is off, by all its landmarks.

    Every landmark's likelihood is a density over the displacements, part of which (`EPSILON`) is spread evenly: none can
    outvote the others.

    Returns:
        (T, 2) Å.
    """
    reach = _reach(evidence)
    side = 2 * reach + 1
    total = torch.zeros(len(evidence.seen), side, side)
    u = torch.arange(-reach, reach + 1)
    disc = torch.hypot(u.float(), u[:, None].float()) <= reach + 0.5
    area = int(disc.sum())
    for p, maps in _maps(evidence, reach):
        density = torch.softmax(maps.masked_fill(~disc, -torch.inf).flatten(1), 1).reshape(maps.shape)
        logs = torch.log((1 - EPSILON) * _blur(density) + EPSILON / area)
        total += torch.where(evidence.seen[:, p, None, None], logs, 0)
    total.masked_fill_(~disc, -torch.inf)
    best = total.flatten(1).argmax(1)
    y, x = best // side, best % side
    shift = torch.stack([x - reach, y - reach], 1).double()
    for j in range(len(total)):
        shift[j] += _centroid(total[j], int(y[j]), int(x[j]))
    return shift * evidence.scale.pixel_size


def _centroid(logs: Tensor, y: int, x: int) -> Tensor:
    """Mean displacement (x, y) px from a peak of log-odds, over its 5 by 5 neighbourhood."""
    y0, x0 = max(y - 2, 0), max(x - 2, 0)
    near = logs[y0 : y + 3, x0 : x + 3]
    weight = torch.exp(near - near.max()).double()
    weight = weight / weight.sum()
    along_x = (weight.sum(0) * (torch.arange(near.shape[1]) + x0 - x)).sum()
    along_y = (weight.sum(1) * (torch.arange(near.shape[0]) + y0 - y)).sum()
    return torch.stack([along_x, along_y])


def displacements(evidence: Evidence, around: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Every landmark's position in every image, where there is one that stands out.

    Args:
        around: (T, 2) Å: displacement of each image as a whole, of `vote`.
        reach: Å: how far from there a landmark is looked for.

    Returns:
        (T, P, 2) Å from `centre`, NaN where nothing is found, and (T, P, 2, 2) inverse covariances, 1/Å².
    """
    scale, band = evidence.scale, evidence.scale.band
    k = torch.stack([band.kx, band.ky], 1).double() * (2 * math.pi / scale.box)
    whole = _reach(evidence)
    u = torch.arange(-whole, whole + 1).double()
    start = around / scale.pixel_size
    distance = torch.hypot(u - start[:, 0, None, None], u[:, None] - start[:, 1, None, None])
    allowed = distance <= max(reach / scale.pixel_size, 1.5)
    count, landmarks = evidence.seen.shape
    found = torch.full((count, landmarks, 2), torch.nan, dtype=torch.float64)
    information = torch.zeros(count, landmarks, 2, 2, dtype=torch.float64)
    for p, maps in _maps(evidence, whole):
        rows = torch.nonzero(evidence.seen[:, p] & allowed.any((1, 2)))[:, 0]
        if not len(rows):
            continue
        logs = maps[rows].double().masked_fill(~allowed[rows], -torch.inf)
        best = logs.flatten(1).argmax(1)
        d = torch.stack([u[best % len(u)], u[best // len(u)]], 1)
        cross = evidence.cross[p, rows].to(torch.complex128)
        density = torch.softmax(logs.flatten(1), 1).reshape(logs.shape)
        near = torch.hypot(u - d[:, 0, None, None], u[:, None] - d[:, 1, None, None]) <= PEAK_RADIUS
        certain = (density * near).sum((1, 2))
        first = d.clone()
        for _ in range(NEWTON_STEPS):
            terms = cross * torch.exp(1j * (d @ k.T))
            gradient = -terms.imag @ k
            hessian = torch.einsum("tk,ka,kb->tab", terms.real, k, k)
            values, vectors = torch.linalg.eigh(hessian)
            values = values.clamp_min(1e-3)
            step = (vectors @ ((vectors.mT @ gradient[..., None]) / values[..., None]))[..., 0]
            d = d + step.clamp(-0.7, 0.7)
        good = (certain >= LEAST_CERTAIN) & ((d - first).norm(dim=1) < 1.5) & (torch.linalg.eigvalsh(hessian)[:, 0] > 0)
        covariance = torch.linalg.inv((vectors * values[:, None, :]) @ vectors.mT) + FLOOR**2 * torch.eye(2)
        inverse = torch.linalg.inv(covariance) * certain[:, None, None] / scale.pixel_size**2
        moved = torch.full((count, 2), torch.nan, dtype=torch.float64)
        moved[rows[good]] = d[good] * scale.pixel_size
        inverses = torch.zeros(count, 2, 2, dtype=torch.float64)
        inverses[rows[good]] = inverse[good]
        found[:, p] = moved
        information[:, p] = inverses
    return found, information
