"""Gold as a constellation: images are placed one after the other, from a sure beginning outwards, by where all the beads
together are.

A correlation of whole images takes any bead for any other where they stand at different heights, and adds up its errors
from tilt to tilt. The constellation can't: its heights are known once a few tilts see it, every image is placed by all
beads at once, wherever in the field, and all tilts placed so far refine the beads' places (as in progressive bundle
adjustment; Han et al. 2015, J. Struct. Biol. 192:403).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.align import bundle
from libemc.methods.align.gold import Beads
from libemc.numerics import fourier
from libemc.numerics.peaks import highest_peak

INNER, OUTER = 1.3, 2.2  # of a bead's radius: the ring that its disc is compared with
TOLERANCE = 0.8  # of a bead's diameter: how far from where it is expected a bead is looked for
CLEAR = 1.5  # log odds above those of the best place by chance: the constellation is in the image
SPOT, USUAL = 4.0, 0.4  # least deviations of a bead, and of what beads have in the first images
LEAST_BEADS, LEAST_PART = 3, 0.5  # that an image must show, in number and of those that lie in it
SETTLE = 3  # images placed between two adjustments


def spots(images: NDArray[np.float32], pixel_size: float, diameter: float) -> Tensor:
    """How much darker a disc of a bead's size is than the ring around it: (T, y, x) robust standard deviations.

    Args:
        images: (T, y, x), dark specimen below the mean, exactly 0 where there is nothing.
    """
    rows, columns = images.shape[1:]
    u, v = torch.arange(columns) - columns // 2, torch.arange(rows) - rows // 2
    radius = torch.hypot(u, v[:, None].float()) * (2 * pixel_size / diameter)
    disc, ring = (radius <= 1).float(), ((radius >= INNER) & (radius <= OUTER)).float()
    kernel = fourier.rfftn_centred(ring / ring.sum() - disc / disc.sum(), 2)
    out = torch.empty(images.shape)
    for j, image in enumerate(images):
        out[j] = fourier.irfftn_centred(fourier.rfftn_centred(torch.from_numpy(image), 2) * kernel, (rows, columns))
        out[j] /= (1.4826 * out[j].abs().median()).clamp_min(1e-9)
    return out


def _pooled(pool: Callable[..., Tensor], image: Tensor, reach: int) -> Tensor:
    """Over squares of `reach` pixels on either side, one axis after the other."""
    width = 2 * reach + 1
    return pool(pool(image[None], (width, 1), 1, (reach, 0)), (1, width), 1, (0, reach))[0]


@dataclass
class _Growth:
    """Beads and images placed so far.

    Attributes:
        maps: of `spots`; geometry: shifts of the placed images and the one axis are right.
        points: (P, 3) Å; position: (T, P, 2) Å, NaN where not seen.
    """

    maps: Tensor
    pixel_size: float
    diameter: float
    geometry: bundle.Geometry
    points: NDArray[np.float64]
    position: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.reach = max(1, round(TOLERANCE * self.diameter / self.pixel_size))
        rows, columns = self.maps.shape[1:]
        self.middle = np.array([columns // 2, rows // 2])
        self.canvas = fourier.good_size(2 * max(rows, columns))
        inside = torch.fft.rfft2(torch.ones(rows, columns), s=(self.canvas, self.canvas))
        self.inside = inside
        self.least = SPOT

    def expected(self, j: int) -> NDArray[np.float64]:
        """(P, 2) px from the image centre: where the beads are, but for the image's shift."""
        return np.asarray(self.geometry.project(self.points)[j] / self.pixel_size)

    def expect(self, seed: Sequence[int]) -> None:
        """Learn from some images how dark the beads are."""
        r, (rows, columns), heights = self.reach, self.maps.shape[1:], []
        for j in seed:
            for x, y in np.round(self.expected(j) + self.middle).astype(int):
                if r <= x < columns - r and r <= y < rows - r:
                    heights.append(float(self.maps[j, y - r : y + r + 1, x - r : x + r + 1].max()))
        self.least = max(SPOT, USUAL * float(np.median(heights or [0.0])))

    def search(self, j: int) -> NDArray[np.float64] | None:
        """(2,) px by which the constellation is away from where it is expected, wherever in the field; None: it isn't there."""
        m = self.canvas
        at = self.expected(j)
        near = np.round(at).astype(int) % m
        sky = torch.zeros(m, m)
        sky.index_put_(
            (torch.from_numpy(near[:, 1]), torch.from_numpy(near[:, 0])), torch.ones(len(at)), accumulate=True
        )
        sky = torch.fft.rfft2(sky).conj()
        dark = _pooled(F.max_pool2d, self.maps[j], self.reach) >= self.least
        chance = float(dark.double().mean().clamp(1e-4, 0.5))
        # pixel d of these maps: the image's centre would lie at its pixel d
        hits, count = (
            torch.fft.irfft2(t * sky, s=(m, m)).round() for t in (torch.fft.rfft2(dark.float(), s=(m, m)), self.inside)
        )
        allowed = count >= max(LEAST_BEADS, LEAST_PART * float(count.max()))
        share = (hits / count.clamp_min(1)).clamp(1e-6, 1 - 1e-6)
        # log odds against so many hits by chance
        odds = count * (share * torch.log(share / chance) + (1 - share) * torch.log((1 - share) / (1 - chance)))
        odds = torch.where(allowed & (share > chance), odds, 0.0)
        tries = max(float(allowed.sum()) / self.reach**2, 1.0)
        if float(odds.max()) < math.log(tries) + CLEAR:
            return None
        # of equals that in the middle of most
        best = odds.clamp_min(float(odds.max()) - 1.0)
        for _ in range(2):
            best = _pooled(F.avg_pool2d, best, self.reach)
        y, x = divmod(int(torch.where(odds >= float(odds.max()) - 0.5, best, -torch.inf).argmax()), m)
        d = np.array([x, y])
        return np.asarray(np.where(d > m / 2 + self.middle, d - m, d) - self.middle)

    def see(self, j: int, shift: NDArray[np.float64]) -> int:
        """Note where the beads of an image are, about (2,) px away from where they are expected; gives their number."""
        rows, columns = self.maps.shape[1:]
        r = self.reach
        self.position[j] = np.nan
        for p, at in enumerate(self.expected(j) + shift + self.middle):
            x, y = np.round(at).astype(int)
            if not (r <= x < columns - r and r <= y < rows - r):
                continue
            part = self.maps[j, y - r : y + r + 1, x - r : x + r + 1]
            peak, height = highest_peak(part)
            border = bool((peak < 1).any() or (peak > 2 * r - 1).any())  # it belongs to something else
            if float(height) >= self.least and not border:
                self.position[j, p] = (np.array([x - r, y - r]) + peak.numpy() - self.middle) * self.pixel_size
        return int(np.isfinite(self.position[j, :, 0]).sum())

    def adjust(self, field: tuple[float, float, float]) -> None:
        """Fit the beads' places, shifts and the one axis to what was seen."""
        tracks = bundle.Tracks.of(self.position, 0.2 * self.diameter)
        stiff = bundle.Freedom((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
        fit = bundle.adjust(tracks, self.geometry, stiff, None, field=field)
        self.geometry = fit.geometry
        self.points = np.where(np.isfinite(fit.points), fit.points, self.points)


def place(
    maps: Tensor,
    pixel_size: float,
    geometry: bundle.Geometry,
    beads: Beads,
    seed: Sequence[int],
    others: Sequence[int],
    field: tuple[float, float, float],
) -> tuple[bundle.Geometry, Beads, list[int]]:
    """Place images by their beads.

    Args:
        maps: (T, y, x) of `spots`; pixel_size: Å of those.
        geometry: of all images; only the seed's shifts need be right.
        beads: seen in the seed.
        seed: images to begin with; others: those to be placed, in any order.
        field: Å along x, y and z.

    Returns:
        The geometry and the beads, adjusted to all images placed, and which these are, in their order.
    """
    count = len(maps)
    points = beads.points.numpy().copy()
    growth = _Growth(maps, pixel_size, beads.diameter, geometry, points, np.full((count, len(points), 2), np.nan))
    growth.expect(seed)
    placed = [j for j in seed if growth.see(j, np.zeros(2)) >= LEAST_BEADS]
    growth.position[[j for j in seed if j not in placed]] = np.nan
    if len(placed) < LEAST_BEADS:
        return geometry, beads, []
    growth.adjust(field)
    rest = [j for j in (*seed, *others) if j not in placed]
    since = 0
    tilt = geometry.tilt
    while rest:
        j = min(rest, key=lambda j: min(abs(tilt[j] - tilt[i]) for i in placed))
        rest.remove(j)
        neighbour = min(placed, key=lambda i: abs(tilt[j] - tilt[i]))
        growth.geometry.shift[j] = growth.geometry.shift[neighbour]
        shift = growth.search(j)
        if shift is None or growth.see(j, shift) < LEAST_BEADS:
            growth.position[j] = np.nan
            continue
        growth.geometry.shift[j] += shift * pixel_size / growth.geometry.magnification[j]
        placed.append(j)
        since += 1
        if since >= SETTLE or not rest:
            growth.adjust(field)
            since = 0
    if since:
        growth.adjust(field)
    return growth.geometry, replace(beads, points=torch.from_numpy(growth.points)), placed
