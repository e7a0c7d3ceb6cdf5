"""Tilt series of something that lies whole in the field."""

from __future__ import annotations

import numpy as np
import torch

from libemc.numerics.rotations import tilt_matrices


def lone_object(axis, tilts, n=96, seed=0):
    """Projections of 30 blobs within a ball of a third of the field, each image moved at random by up to ten pixels."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(30, 3)) * n / 10
    u = np.arange(n) - n // 2
    out = []
    for matrix in tilt_matrices(axis, torch.from_numpy(tilts), 0.0).numpy():
        q = points @ matrix[:2].T + rng.uniform(-10, 10, 2)
        image = np.exp(-((u - q[:, 0, None]) ** 2)[:, None] / 8 - ((u - q[:, 1, None]) ** 2)[:, :, None] / 8).sum(0)
        out.append(image + 0.05 * rng.normal(size=(n, n)))
    return torch.from_numpy(np.array(out, np.float32))
