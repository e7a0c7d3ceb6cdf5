"""A slab whose geometry is known, in a small tilt series: for the tests of the coarse alignment and its parts."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from libemc.methods.align.images import prepare
from libemc.methods.align.search import Search, Signal
from libemc.numerics.rotations import tilt_matrices

PIXEL_SIZE = 20.0  # Å
SHAPE = (100, 90)
TILTS = np.linspace(-54, 54, 19)
AXIS = 35.0
FLAT = Signal(np.array([0.0, 1.0]), np.ones(2))  # all frequencies alike
LOW = np.linspace(-3, 3, 7)  # tilts so low that all images of a thin specimen are alike


def slab_images(axis, shift, seed=0, noise=0.5):
    """Projections of 250 dark blobs of 40 Å in a slab of 300 Å, larger than the field; noise after it."""
    rng = np.random.default_rng(seed)
    points = (rng.random((250, 3)) - 0.5) * [4200, 4200, 300]
    matrices = tilt_matrices(axis, torch.from_numpy(TILTS), 0.0).numpy()
    y, x = [(np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE]
    images = []
    for matrix, s in zip(matrices, shift, strict=True):
        q = points @ matrix[:2].T + s
        image = -np.exp(
            -((x - q[:, 0, None]) ** 2)[:, None] / 3200 - ((y - q[:, 1, None]) ** 2)[:, :, None] / 3200
        ).sum(0)
        images.append(image + noise * gaussian_filter(rng.standard_normal(SHAPE), 0.5))
    return np.array(images, np.float32)


def about(axis):
    return tilt_matrices(axis, torch.from_numpy(TILTS), 0.0).numpy()


def slab_series():
    """Images about `AXIS`, their shifts, a random walk of 25 Å a step, and their matrices."""
    shift = np.cumsum(np.random.default_rng(3).normal(0, 25, (len(TILTS), 2)), axis=0)
    return slab_images(AXIS, shift), shift, about(AXIS)


def in_common(finest, noise=2.0, shape=(160, 150)):
    """Images at `LOW` tilts that have in common what is coarser than some Å, of deviation 1, and white noise of their own."""
    rng = np.random.default_rng(0)
    k = np.hypot(np.fft.rfftfreq(shape[1]), np.fft.fftfreq(shape[0])[:, None]) / PIXEL_SIZE
    pattern = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * (k < 1 / finest), s=shape)
    return (pattern / pattern.std() + noise * rng.standard_normal((len(LOW), *shape))).astype(np.float32)


def prepared(images, use=None, tilt=None):
    return prepare(images.__getitem__, images.shape, PIXEL_SIZE, use or [True] * len(images), tilt=tilt)


def searching(images, axis, signal, slab=300.0, tilt=TILTS):
    return Search.begin(images, tilt.tolist(), axis, slab, signal)


def at_their_places(images, shift, signal=FLAT):
    """The search when all images have their places."""
    search = searching(images, AXIS, signal)
    search.shift = torch.from_numpy(shift) / PIXEL_SIZE
    search.deviations = dict.fromkeys(search.order, 0.0)
    return search
