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
from torch import Tensor

from libemc.methods.align.landmarks import blurred
from libemc.methods.align.tracks import LOWEST, Cutter, Evidence, Scale
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.peaks import find_peaks

SIGNIFICANT = 7.0  # robust deviations of the tomogram's detail: less dark is no bead
SHARE = 0.3  # of the darkest spot: beads are alike
APART = 6.0  # voxels
MOST_CANDIDATES = 60
LOWEST_TILTS = 15  # images that a candidate is judged by
CONTRAST, ROUNDNESS = 1.0, 0.8  # of a bead: in a single image; of its mean image
MAJORITY = 0.5  # of the darkest spots: when fewer look like beads, none is
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
    bend = left + right - 2 * here
    place = edge + 0.5 + (0.0 if bend >= 0 else float(np.clip((left - right) / (2 * bend), -0.5, 0.5)))
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


def recognise(images: NDArray[np.float32], pixel_size: float, geometry: TiltGeometry, points: Tensor) -> Beads | None:
    """Those of some points that are gold, if any.

    Args:
        images: (T, y, x) fine enough to see the beads' outline, mean about 0, dark specimen.
        points: (P, 3) Å.
    """
    half = math.ceil(250.0 / pixel_size)
    order = torch.argsort(geometry.matrices[:, 2, 2], descending=True).tolist()
    tilts = [j for j in order if bool(geometry.use[j])][:LOWEST_TILTS]
    where = geometry.project(points)[0] / pixel_size
    rows, columns = images.shape[1:]
    found: list[tuple[Tensor, Likeness]] = []
    judged = passed = 0
    for point, at in zip(points, where, strict=True):
        patches = []
        for j in tilts:
            x, y = round(float(at[j, 0])) + columns // 2, round(float(at[j, 1])) + rows // 2
            if half <= x < columns - half and half <= y < rows - half:
                patches.append(images[j, y - half : y + half + 1, x - half : x + half + 1])
        if len(patches) < 3:
            continue
        judged += 1
        like = likeness(torch.from_numpy(np.stack(patches)), pixel_size)
        if like.roundness >= ROUNDNESS and like.contrast >= CONTRAST and like.diameter > 0:
            passed += 1
            middle = geometry.matrices[tilts[0]]
            moved = point + middle[:2].T @ like.offset
            if all(float((moved - other).norm()) > 0.8 * like.diameter for other, _ in found):
                found.append((moved, like))
    if not found or passed < MAJORITY * judged:
        return None
    diameters = np.array([like.diameter for _, like in found])
    # of one kind: as many as possible
    kinds = [np.abs(np.log(diameters / d)) <= math.log(ALIKE) for d in diameters]
    kind = max(kinds, key=lambda k: k.sum())
    return Beads(
        torch.stack([p for (p, _), k in zip(found, kind, strict=True) if k]), float(np.median(diameters[kind]))
    )


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
