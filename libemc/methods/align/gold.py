"""Gold beads: found in a coarse tomogram, recognised by their round shape, and followed from image to image.

A bead looks the same from everywhere, so its images are compared with their own mean over all beads, tilts and
directions, whitened by what doesn't fit it: the position found is that of the bead, whatever other images say, and
nothing drifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from libemc.methods.align.landmarks import blurred
from libemc.methods.align.tracks import LOWEST, Cutter, Evidence, Scale
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.peaks import find_peaks, vertex

SIGNIFICANT = 7.0  # robust deviations of the tomogram's detail: less dark is no bead
SHARE = 0.3  # of the darkest spot: beads are alike
APART = 6.0  # voxels
MOST_CANDIDATES = 60
LOWEST_TILTS = 15  # images that a candidate is judged by
CONTRAST, ROUNDNESS = 1.0, 0.8  # of a bead: in a single image; of its mean image
MAJORITY = 0.5  # of the spots as dark as beads: when fewer look like beads, none is
STREAK = 2.0  # of a bead's diameter: what is dark so far beside one is of its making
PATCH = 250.0  # Å on either side that a candidate is judged by
LEAST_PATCHES = 3
DEPTH, DEPTH_STEP = 4400.0, 100.0  # Å along the beam in which gold is looked for
BLUR = 30.0  # Å
ONE_COLUMN = 60.0  # Å: candidates nearer to each other in the lowest tilt are one
FRINGE = 0.9  # of a bead's diameter: how far from its middle it hides the specimen
ALIKE = 1.3  # ratio of diameters within which beads are of one kind


@dataclass(frozen=True)
class Beads:
    """The gold of a specimen.

    Attributes:
        points: (P, 3) Å.
        diameter: Å, one for all.
    """

    points: Tensor
    diameter: float


@dataclass(frozen=True)
class Likeness:
    """How much a landmark looks like a bead.

    Attributes:
        diameter: Å, of the circle around its middle where the profile rises most steeply.
        roundness: part of its mean image's power that its radial profile explains.
        contrast: root mean square within that circle over the noise of a single image.
        offset: (2,) Å of the middle from where the images were cut out.
    """

    diameter: float
    roundness: float
    contrast: float
    offset: Tensor


def candidates(volume: Tensor, pixel_size: float, geometry: TiltGeometry, field: tuple[float, float]) -> Tensor:
    """Dark spots of a coarse tomogram that may be gold: (P, 3) Å."""
    detail = blurred(volume, 0.7) - blurred(volume, 6.0)
    detail = -detail / (1.4826 * detail.abs().median()).clamp_min(1e-12)
    at, _ = find_peaks(detail, max(SIGNIFICANT, SHARE * float(detail.max())), APART, MOST_CANDIDATES)
    middle = torch.tensor([n // 2 for n in volume.shape[::-1]], dtype=torch.float64)
    points = (at - middle) * pixel_size
    where, _ = geometry.project(points)
    limit = torch.tensor(field, dtype=torch.float64) / 2 - 2 * pixel_size
    inside = (where.abs() <= limit).all(-1)[:, geometry.use].double().mean(1)
    return points[inside >= 0.4]


def likeness(patches: Tensor, pixel_size: float) -> Likeness:
    """Whether a landmark's mean image is round, strong, and has an edge.

    Args:
        patches: (J, n, n) images of it, dark specimen below 0.
    """
    n = patches.shape[-1]
    u = torch.arange(n).float() - n // 2
    mean = patches.mean(0)
    centre, reach = torch.zeros(2), n / 3
    for _ in range(6):  # the centre of power, in narrower and narrower circles
        radius = torch.hypot(u - centre[0], u[:, None] - centre[1])
        power = mean.square() * (radius <= reach)
        centre = torch.stack([(power * u).sum(), (power * u[:, None]).sum()]) / power.sum().clamp_min(1e-9)
        reach = max(0.75 * reach, 4.0, min(reach, 1.5 * float((power * radius.square()).sum() / power.sum()) ** 0.5))
    radius = torch.hypot(u - centre[0], u[:, None] - centre[1])
    ring = radius.round().long().flatten()
    counts = torch.bincount(ring).clamp_min(1)
    profile = torch.zeros(len(counts)).index_add_(0, ring, mean.flatten()) / counts
    last = n // 2 - int(centre.abs().max().ceil()) - 2
    if last < 6:
        return Likeness(0.0, 0.0, 0.0, centre.double() * pixel_size)
    rise = profile[1:last] - profile[: last - 1]
    weighted = rise * (torch.arange(1, last).float() - 0.5)  # of the whole circle
    edge = int(weighted.argmax())
    left, here, right = (float(weighted[min(max(edge + i, 0), len(weighted) - 1)]) for i in (-1, 0, 1))
    place = edge + 0.5 + vertex(left, here, right)
    inside, core = radius <= 1.5 * place, radius <= place
    model = profile[ring].reshape(n, n)
    outer = (radius > min(2.5 * place, last)) & (radius <= last + 1)
    if not bool(outer.any()):
        outer = radius > last - 2
    noise = float(patches[:, outer].std(dim=1).mean())
    background = mean[outer].mean()
    total = (mean[inside] - background).square().sum().clamp_min(1e-9)
    round_ = 1 - float((mean[inside] - model[inside]).square().sum() / total)
    contrast = float((mean[core] - background).square().mean().sqrt()) / max(noise, 1e-6)
    return Likeness(2 * place * pixel_size, round_, contrast, centre.double() * pixel_size)


class _Column:
    """What some images show of the points above and below one another."""

    def __init__(
        self, images: NDArray[np.float32], pixel_size: float, geometry: TiltGeometry, tilts: list[int]
    ) -> None:
        self.images, self.pixel_size, self.geometry = images[tilts], pixel_size, geometry.select(tilts)
        self.blurred = gaussian_filter(self.images, (0, BLUR / pixel_size, BLUR / pixel_size), truncate=3.0)
        self.half = math.ceil(PATCH / pixel_size)
        self.direction = self.geometry.matrices[0, 2]  # of the beam in the image of the lowest tilt

    def patches(self, images: NDArray[np.float32], point: Tensor) -> NDArray[np.float32]:
        """(J, 2·half+1, 2·half+1) of the images that show all of it."""
        rows, columns = images.shape[1:]
        at = (self.geometry.project(point[None])[0][0] / self.pixel_size).round().long()
        h, out = self.half, []
        for (x, y), image in zip((at + torch.tensor([columns // 2, rows // 2])).tolist(), images, strict=True):
            if h <= x < columns - h and h <= y < rows - h:
                out.append(image[y - h : y + h + 1, x - h : x + h + 1])
        return np.stack(out) if out else np.zeros((0, 2 * h + 1, 2 * h + 1), np.float32)

    def darkest(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The point of a column at which the mean image is darkest, in the middle or near it; its patches."""
        best, where = -math.inf, point
        near = math.ceil(ONE_COLUMN / self.pixel_size)
        inner = slice(self.half - near, self.half + near + 1)
        for depth in np.arange(-DEPTH / 2, DEPTH / 2 + 1, DEPTH_STEP):
            at = point + (float(depth) - point @ self.direction) * self.direction
            patches = self.patches(self.blurred, at)
            if len(patches) < LEAST_PATCHES:
                continue
            mean = patches.mean(0)
            darkness = math.sqrt(len(patches)) * float(np.median(mean) - mean[inner, inner].min())
            if darkness > best:
                best, where = darkness, at
        return where, torch.from_numpy(self.patches(self.images, where))


def recognise(images: NDArray[np.float32], pixel_size: float, geometry: TiltGeometry, points: Tensor) -> Beads | None:
    """Those of some points that are gold, if any.

    How high a bead lies a coarse tomogram of a few tilts hardly tells: along the beam the darkest place counts.

    Args:
        images: (T, y, x) fine enough to see the beads' outline, mean about 0, dark specimen.
        points: (P, 3) Å.
    """
    order = torch.argsort(geometry.matrices[:, 2, 2], descending=True).tolist()
    column = _Column(images, pixel_size, geometry, [j for j in order if bool(geometry.use[j])][:LOWEST_TILTS])
    across = column.geometry.matrices[0, :2]
    found: list[tuple[Tensor, Likeness]] = []
    tried: list[Tensor] = []  # the darkest first
    rank: list[int] = []
    for point in points:
        if any(float((across @ (point - other)).norm()) < ONE_COLUMN for other in tried):
            continue
        tried.append(point)
        middle, patches = column.darkest(point)
        if len(patches) < LEAST_PATCHES:
            continue
        like = likeness(patches, pixel_size)
        if like.roundness >= ROUNDNESS and like.contrast >= CONTRAST and like.diameter > 0:
            moved = middle + across.T @ like.offset
            if all(float((across @ (moved - other)).norm()) > 0.8 * like.diameter for other, _ in found):
                found.append((moved, like))
                rank.append(len(tried) - 1)
    if not found:
        return None
    diameters = np.array([like.diameter for _, like in found])
    # a bead has dark streaks above and below it, which lie beside it in the tomogram of a poor alignment
    beside = torch.stack([torch.stack([(across @ (p - q)).norm() for q, _ in found]).min() for p in tried])
    as_dark = beside[: int(np.median(rank)) + 1]
    if len(found) < MAJORITY * (len(found) + int((as_dark > STREAK * np.median(diameters)).sum())):
        return None
    # of one kind: as many as possible
    kinds = [np.abs(np.log(diameters / d)) <= math.log(ALIKE) for d in diameters]
    kind = max(kinds, key=lambda k: k.sum())
    return Beads(
        torch.stack([p for (p, _), k in zip(found, kind, strict=True) if k]), float(np.median(diameters[kind]))
    )


def without(
    images: NDArray[np.float32], pixel_size: float, geometry: TiltGeometry, beads: Beads
) -> NDArray[np.float32]:
    """Images (T, y, x), mean about 0, that are 0 where the beads are, and as far around as their fringes reach."""
    out = images.copy()
    radius = math.ceil(FRINGE * beads.diameter / pixel_size)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    y, x = (v[np.hypot(y, x) <= radius] for v in (y, x))
    rows, columns = images.shape[1:]
    middle = torch.tensor([columns // 2, rows // 2])
    at = (geometry.project(beads.points)[0] / pixel_size).round().long() + middle
    for j in range(len(images)):
        for column, row in at[:, j].tolist():
            inside = (row + y >= 0) & (row + y < rows) & (column + x >= 0) & (column + x < columns)
            out[j, (row + y)[inside], (column + x)[inside]] = 0.0
    return out


def compare(images: NDArray[np.float32], scale: Scale, geometry: TiltGeometry, beads: Beads, noise: Tensor) -> Evidence:
    """Compare every image of every bead with their mean over all beads, tilts and directions.

    Args:
        noise: of `tracks.noise_power`, away from the beads.
    """
    band = scale.band
    cutter = Cutter(images, scale, geometry)
    ring = band.radii.round().long()
    counted = band.radii >= LOWEST / 2
    values, seen, where = [], [], []
    for point in beads.points:
        spectra, inside, at = cutter(point)
        values.append(cutter.whitened(spectra, noise)[:, 2 * band.ky, 2 * band.kx])
        seen.append(inside & geometry.use)
        where.append(at)
    value, shown = torch.stack(values), torch.stack(seen)
    rings = noise.shape[1]
    chosen = value[shown]
    template = torch.zeros(rings).index_add_(0, ring, chosen.real.median(0).values)
    template = (template / torch.bincount(ring, minlength=rings)).float()[ring]
    rest = (chosen - template).abs().square().median(0).values / math.log(2)
    variance = torch.zeros(rings).index_add_(0, ring, rest) / torch.bincount(ring, minlength=rings)
    factor = 2 * cutter.share * (band.multiplicity.float() / 2) * counted / variance[ring].clamp_min(0.3)
    cross = value * (template * factor)
    strength = (template.square() * factor).sum().expand(len(value)) / 2
    return Evidence(scale, cross, shown.T, torch.stack(where, 1), torch.ones(len(images)), strength, None)


def presence(evidence: Evidence, shift: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the mean bead there is in each image, at its beads' places moved by one displacement.

    Args:
        evidence: of `compare`; shift: (T, 2) Å, of `tracks.vote`.

    Returns:
        (T,) part of the mean bead, 1 for all of it, 0 where an image shows no bead of those it should; and its standard
        deviation.
    """
    band, n = evidence.scale.band, evidence.scale.box
    k = torch.stack([band.kx, band.ky], 1).double() * (2 * math.pi / n)
    turn = torch.exp(1j * ((shift / evidence.scale.pixel_size) @ k.T))
    like = (evidence.cross.to(torch.complex128) * turn).real.sum(-1).T  # (T, P)
    expected = 2 * (evidence.strength.double() * evidence.seen).sum(1)
    return (like * evidence.seen).sum(1) / expected.clamp_min(1e-9), expected.clamp_min(1e-9).rsqrt()
