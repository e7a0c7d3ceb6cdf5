"""What is next to what: nearest neighbours of particles, where they lie as a particle sees them, and what chance would give.

N particles at xyz (N, 3), Å, and rotation (N, 3, 3), particle to specimen (convention 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from libemc.numerics.rotations import random_rotations, rotation_distance

Array = NDArray[np.float64]
Places = NDArray[np.int64]

TILTED = 0.9
"""A slab is tilted when that makes it thinner than this share: a plane through a few points is tilted by chance."""


@dataclass(frozen=True)
class Nearest:
    """The nearest neighbour of each particle.

    Attributes:
        index: (N,) which it is.
        distance: (N,) Å.
        direction: (N, 3) of length 1: where it lies in the particle's own frame.
        angle: (N,) degrees between the two poses, the least over the symmetry's equivalents.
    """

    index: Places
    distance: Array
    direction: Array
    angle: Array


def nearest(xyz: Tensor, rotation: Tensor, group: Tensor) -> Nearest:
    """The nearest neighbours of two particles or more.

    Args:
        group: (G, 3, 3), of the symmetry; see `symmetry_matrices`.
    """
    distance, index = nearest_distances(xyz.numpy())
    to = rotation.transpose(1, 2) @ (xyz[index] - xyz)[..., None]
    direction = to[..., 0].numpy() / np.maximum(distance, 1e-12)[:, None]
    # S1ᵀ·Rᵀ·R'·S2 turns by as much as Rᵀ·R'·S2·S1ᵀ: one of the two needs to be tried
    angle = rotation_distance(rotation, rotation[index], group).numpy()
    return Nearest(index, distance, direction, angle)


def nearest_distances(xyz: Array) -> tuple[Array, Places]:
    """Of each point (N, 3): the distance (N,) to the nearest other one and its place (N,); N is 2 or more."""
    distance, index = cKDTree(xyz).query(xyz, k=2)
    # of two points at one place either may come first
    itself = index[:, 0] == np.arange(len(xyz))
    return np.where(itself, distance[:, 1], distance[:, 0]), np.where(itself, index[:, 1], index[:, 0])


def around(xyz: Tensor, rotation: Tensor, radius: float) -> tuple[Places, Places, Array]:
    """All neighbours within a distance, as each particle sees them.

    Args:
        radius: Å.

    Returns:
        (P,) whose they are, (P,) which they are, and (P, 3) Å where they lie in that one's frame. Each pair is there twice.
    """
    pairs = cKDTree(xyz.numpy()).query_pairs(radius, output_type="ndarray").reshape(-1, 2)
    owner, other = np.concatenate([pairs, pairs[:, ::-1]]).T
    place = rotation[owner].transpose(1, 2) @ (xyz[other] - xyz[owner])[..., None]
    return owner, other, place[..., 0].numpy()


def scattered(xyz: Array, rng: np.random.Generator) -> Array:
    """As many points at random in the slab of the given ones, (N, 3).

    The slab is as long, wide and thick as they spread along x, y and z. Where they spread less about the plane
    z = a·x + b·y + c that fits them best, it is tilted like that.
    """
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    base = np.stack([xyz[:, 0], xyz[:, 1], np.ones(len(xyz))], axis=1)
    plane = np.linalg.lstsq(base, xyz[:, 2], rcond=None)[0]
    if np.ptp(xyz[:, 2] - base @ plane) > TILTED * np.ptp(xyz[:, 2]):
        plane = np.zeros(3)
    height = xyz[:, 2] - base @ plane
    points = rng.uniform(low, high, xyz.shape)
    z = rng.uniform(height.min(), height.max(), len(xyz))
    points[:, 2] = points[:, 0] * plane[0] + points[:, 1] * plane[1] + plane[2] + z
    return points


def chance_distances(xyz: Array, repeats: int, seed: int) -> Array:
    """Nearest-neighbour distances that chance gives: (repeats, N) Å, of points at random in the same slab (`scattered`).

    They may come as near to each other as they like, which particles can't: their size shows as the distances that are
    missing.
    """
    rng = np.random.default_rng(seed)
    return np.stack([nearest_distances(scattered(xyz, rng))[0] for _ in range(repeats)])


def chance_angles(count: int, group: Tensor, seed: int) -> Array:
    """Angles between poses at random, the least over the equivalents of a symmetry: (count,) degrees."""
    generator = torch.Generator().manual_seed(seed)
    return rotation_distance(torch.eye(3, dtype=torch.float64), random_rotations(count, generator), group).numpy()
