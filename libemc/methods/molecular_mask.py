"""The region of a particle in a noisy average: grown from its strongest density through what is connected to it.

The seeds are the strongest voxels near the middle of the box. They grow, voxel by voxel, through density above a
threshold that falls step by step to the level of the noise, as in EMAN2's automask3d and emClarity (16.8.4). What lies
at the border of the box grows in the same way as a rival, so that a neighbour that the particle touches is parted
from it at the neck between them; noise that touches neither is left out.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.postprocess import DEVIATION_OF_MAD, otsu_threshold
from libemc.numerics.filters import lowpass
from libemc.numerics.grids import centred_radius
from libemc.numerics.masks import soft_mask_from_map

SEED_SHARE = 0.1
"""Of the voxels above the noise within the inner ball, the strongest part that are seeds."""

INNER = (0.4, 0.6, 0.8)
"""Radii of the ball in which seeds lie, over half the box: the first that is not nearly empty (a hollow particle's is)."""

NEARLY_EMPTY = 0.02
"""Share of the voxels of such a ball that are above the floor: noise puts 0.6 % there."""

OUTER = 0.92
"""Radius over half the box beyond which density belongs to neighbours."""

FLOOR_DEVIATIONS = 2.5
"""The threshold ends so many standard deviations of the background above it."""

LEVELS = 24
"""Steps of the falling threshold."""

AROUND = 4
"""Voxels about a region whose densities are compared with its own."""

SHAPE = 15.0
"""Å: finer detail of a map is no shape."""

EXTEND_PX, EDGE_PX = 3.0, 6.0
"""How far a mask reaches beyond the density, and how wide its edge is, unless told otherwise."""

Mask = NDArray[np.bool_]


def noise_level(volume: Tensor, deviations: float = FLOOR_DEVIATIONS) -> float:
    """A density so many standard deviations of the background above its median.

    Both are taken in the shell between 0.75 and 1 of half the box where the particle is not, the deviation from the
    median absolute deviation of the voxels below the median, which neighbours, white, don't reach.

    Args:
        volume: (z, y, x) real, white.
    """
    radius = centred_radius(volume.shape, volume.device)
    half = min(volume.shape) / 2
    values = volume[(radius > 0.75 * half) & (radius <= half)].double()
    median = values.median()
    return float(median) + deviations * DEVIATION_OF_MAD * float((median - values[values <= median]).median())


def _grow(own: Mask, rival: Mask, dense: Mask) -> None:
    """Let both regions grow, in place, through what is dense: where they meet, a voxel in turn, by shared faces.

    What touches only one of them becomes that one's at once; voxels are dilated only where both are in one component.
    """
    labels, count = ndimage.label(dense | own | rival)
    touched = [np.bincount(labels[region], minlength=count + 1) > 0 for region in (own, rival)]
    free = dense & ~own & ~rival
    for region, mine, other in ((own, *touched), (rival, *reversed(touched))):
        region |= free & (mine & ~other)[labels]
    contested = touched[0] & touched[1]
    contested[0] = False
    for label in np.flatnonzero(contested):
        place = ndimage.find_objects(labels, max_label=label)[label - 1]
        pieces = own[place], rival[place]
        left = free[place] & (labels[place] == label)
        growing = True
        while growing:
            growing = False
            for piece in pieces:
                new = ndimage.binary_dilation(piece) & left
                piece |= new
                left &= ~new
                growing |= bool(new.any())


def grown_region(volume: Tensor, floor: float, levels: int = LEVELS) -> Tensor:
    """The voxels of the particle in the middle of the box, and nothing of its neighbours.

    Args:
        volume: (z, y, x) real, white; smooth it first.
        floor: density at which the falling threshold ends, such as `noise_level`.
        levels: steps from the strongest density to the floor.

    Returns:
        (z, y, x) bool on the map's device.

    Raises:
        InputError: hardly any density in the middle of the box is above the floor.
    """
    half = min(volume.shape) / 2
    radius = centred_radius(volume.shape).numpy() / half
    density = volume.cpu().numpy()
    balls = (radius <= inner for inner in INNER)
    ball = next((ball for ball in balls if (density[ball] > floor).mean() > NEARLY_EMPTY), None)
    if ball is None:
        raise InputError(
            f"hardly any density in the middle of the box is above the noise, {floor:.4g}",
            remedy="is the map white, and its particle in the middle? Else give --threshold or --sphere",
        )
    core = density[ball & (density > floor)]
    start = float(np.quantile(core, 1 - SEED_SHARE))
    own = ball & (density >= start)
    rival = (radius >= OUTER) & (density >= floor) & ~own
    for level in np.linspace(start, floor, levels):
        _grow(own, rival, density >= level)
    return torch.from_numpy(ndimage.binary_fill_holes(own) & ~rival).to(volume.device)


def molecular_region(volume: Tensor, floor: float) -> tuple[Tensor, float]:
    """The particle's voxels within its surface, and the density of that surface.

    `grown_region` says what belongs to the particle; the surface is where Otsu's threshold parts it from what is up
    to `AROUND` voxels beside it, or the floor. A region grown to the noise alone would hold the blur around the particle.

    Args:
        volume: (z, y, x) real, white; smooth it first.
        floor: density of the noise, as of `grown_region`.

    Returns:
        (z, y, x) bool, and a density.

    Raises:
        InputError: as `grown_region`.
    """
    grown = grown_region(volume, floor)
    beside = ndimage.binary_dilation(grown.cpu().numpy(), iterations=AROUND)
    level = max(floor, otsu_threshold(volume[torch.from_numpy(beside).to(volume.device)]))
    return grown & (volume > level), level


def automatic_mask(volume: Tensor, pixel_size: float) -> Tensor:
    """The soft mask (z, y, x) of a map's particle, by itself.

    Args:
        volume: (z, y, x) real, white; pixel_size: Å.

    Raises:
        InputError: as `grown_region`.
    """
    smooth = lowpass(volume, pixel_size, SHAPE) if 2 * pixel_size < SHAPE else volume
    region, level = molecular_region(smooth, noise_level(smooth))
    return soft_mask_from_map(smooth.where(region, smooth.clamp_max(level)), level, EXTEND_PX, EDGE_PX)
