"""Spoilt images are told from good ones before anything is aligned."""

from __future__ import annotations

import numpy as np
import torch

from libemc.methods.align import screening


def images(count=9, mean=40.0, seed=0):
    rng = np.random.default_rng(seed)
    specimen = 5 * rng.normal(size=(60, 60))
    return [torch.from_numpy(rng.poisson((mean + specimen).clip(1)).astype(np.float32)) for _ in range(count)]


def test_blank_images():
    good = images()[0]
    assert not screening.is_blank(good)
    assert screening.is_blank(torch.full((20, 20), 3.0))
    assert screening.is_blank(torch.zeros(20, 20))
    assert screening.is_blank(torch.where(good == good.max(), torch.inf, good))


def test_dark_images_are_those_far_below_their_neighbours():
    tilt = np.linspace(-60, 60, 9)
    # thicker ice at high tilt is no darkness
    series = [image * float(np.exp(-0.3 / np.cos(np.deg2rad(t)))) for image, t in zip(images(), tilt, strict=True)]
    assert screening.dark_images(series, tilt.tolist()) == []
    series[6] = torch.from_numpy(np.random.default_rng(1).poisson(0.4, (60, 60)).astype(np.float32))
    assert screening.dark_images(series, tilt.tolist()) == [6]
    assert screening.dark_images([None, *series[1:]], tilt.tolist()) == [6]
    shifted = [image - 30000 for image in series]  # signed counts
    assert screening.dark_images(shifted, tilt.tolist()) == [6]


def test_copies_share_their_noise():
    series: list[torch.Tensor | None] = list(images())
    assert screening.copies(series) == []
    series[7] = 2 * series[3] + 5
    assert screening.copies(series) == [(3, 7)]
    series[3] = None
    assert screening.copies(series) == []
