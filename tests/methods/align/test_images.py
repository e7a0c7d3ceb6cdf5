"""Images as the coarse alignment sees them: white, and with their origin where it was."""

from __future__ import annotations

import numpy as np
import torch

from libemc.methods.align.images import prepare
from tests.methods.align.slab_series import prepared


def test_the_mean_spectrum_is_flat():
    """Images whose amplitude falls by eight over the band are white within it, up to a factor of the steepness."""
    rng = np.random.default_rng(0)
    k = np.hypot(np.fft.rfftfreq(150), np.fft.fftfreq(160)[:, None])
    noise = np.fft.rfft2(rng.standard_normal((7, 160, 150))) / (1 + (20 * k) ** 2)

    def rings(images):
        power = np.abs(np.fft.rfft2(images[:, 20:-20, 20:-20])).mean(0) ** 2
        r = np.hypot(np.fft.rfftfreq(power.shape[1] * 2 - 2), np.fft.fftfreq(len(power))[:, None])
        return np.array([power[(r >= low) & (r < low + 0.05)].mean() for low in (0.1, 0.15, 0.2, 0.25, 0.3)])

    images = np.fft.irfft2(noise, s=(160, 150)).astype(np.float32)
    raw, white = rings(images), rings(prepared(images).pixels.numpy())
    assert raw.max() / raw.min() > 30
    assert white.max() / white.min() < 1.5


def test_blocks_keep_the_origin():
    """A blob at the origin stays there, whatever the binning and the size: to hundredths of a binned pixel."""
    y, x = np.mgrid[:120, :90]
    blob = np.exp(-((x - 45) ** 2 + (y - 60) ** 2) / 200)
    rng = np.random.default_rng(0)
    stack = np.stack([blob, *rng.normal(size=(4, 120, 90))]).astype(np.float32)  # noise: nothing to whiten
    for binning in (1, 2, 3):
        images = prepare(stack.__getitem__, stack.shape, 1.0, [True] * 5, 120 // binning)
        assert images.pixel_size == binning
        for ready in (images, images.smaller(38)):
            pixels = ready.pixels[0].double().clamp_min(1.0)[4:-4, 4:-4] - 1
            u = torch.arange(len(pixels)) + 4 - ready.box // 2
            centre = [float((pixels.sum(dim) * u).sum() / pixels.sum()) for dim in (0, 1)]
            assert np.allclose(centre, 0, atol=0.02)  # of what is above a threshold of the sampled blob
