"""Particle files that know what their patches were cut from."""

from __future__ import annotations

import numpy as np

from libemc.records import ParticleFile, RawImages


def with_raw(file: ParticleFile, seed: int = 0, noise: float = 1.0) -> ParticleFile:
    """With the section of raw images: the tilts' geometry, and shifts of some tens of Å."""
    t, rng = file.tilts, np.random.default_rng(seed)
    count = len(t.tilt)
    x, y = (tuple((25 * rng.standard_normal(count)).tolist()) for _ in range(2))
    raw = RawImages(
        stack="raw.mrc",
        digest="0" * 64,
        shape=(count, 512, 512),
        pixel_size=file.pixel_size,
        binning=1,
        contrast="dark",
        mean=(0.0,) * count,
        noise=(noise,) * count,
        axis=t.axis,
        tilt=t.tilt,
        xtilt=t.xtilt,
        shift_x=x,
        shift_y=y,
        magnification=t.magnification,
    )
    return file.model_copy(update={"raw": raw})
