"""Particles in half balls: the likelihood they give is that of the images themselves, and their noise is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.methods.initial_model.balls import noise_variance, particle_balls
from libemc.methods.refine.search import search_reference
from libemc.methods.subtilts import load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import random_rotations
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.subtilt_data import blobs, particle_set

PIXEL, MEMORY = 8.0, 1 << 30


@pytest.mark.parametrize("box", [24, 27])
def test_products_with_a_reference_are_those_of_the_images(box: int) -> None:
    """⟨F, A⟩ against the sum over all slices: two routes to one number, exact but for the envelope taken as round."""
    density = blobs(box)
    particles = particle_set(density, 6, PIXEL, 1.0)
    radius = 6.0
    balls = particle_balls([particles], radius, MEMORY)
    rotation = random_rotations(6, torch.Generator().manual_seed(1))
    model = slices.sample_points(search_reference(density, radius), rotation, balls.points)
    found = (balls.data.conj() * model).real.sum(dim=1)

    band = Band.of(box, radius)
    batch = load_batch(particles, torch.arange(6), band, noise_spectrum(particles, band))
    cut = slices.extract_slices(FourierVolume.from_map(density), batch.matrices(rotation), band, batch.magnification)
    some = (band.kx != 0) | (band.ky != 0)  # the mean is no part of a ball
    each = (batch.centred().conj() * cut).real[:, some].sum(dim=1)
    wanted = torch.zeros(6).index_add(0, batch.owner, each)
    assert float((found - wanted).abs().max()) < 0.04 * float(wanted.abs().max())
    norm = (batch.transfer**2 * cut.abs() ** 2)[:, some].sum(dim=1)
    wanted = torch.zeros(6).index_add(0, batch.owner, norm)
    flat = slices.sample_points(FourierVolume.from_map(density), rotation, balls.points)
    found = (balls.weight * flat.abs() ** 2).sum(dim=1)
    ratio = found / wanted
    # |A|² is read within the kernel's reach of where it was seen: a fifth more at a spectrum as steep, in all poses alike
    assert 1.0 < float(ratio.mean()) < 1.35 and float(ratio.std()) < 0.06


def test_which_particles_they_are() -> None:
    density = blobs(24)
    first, second = particle_set(density, 5, PIXEL, 1.0), particle_set(density, 4, PIXEL, 1.0, seed=3)
    use = torch.tensor([True, False, True, True, False])
    balls = particle_balls([first.using(use), second], 5.0, MEMORY)
    assert balls.series.tolist() == [0, 0, 0, 1, 1, 1, 1] and balls.place.tolist() == [0, 2, 3, 0, 1, 2, 3]
    inner = balls.within(3.0)
    length = torch.linalg.vector_norm(inner.points, dim=0)
    assert float(length.min()) > 0 and float(length.max()) < 3.0 and inner.data.shape == (7, inner.points.shape[1])
    assert inner.points.shape[1] == 46  # half of the 92 points of a cubic lattice within 3, without the origin
    with pytest.raises(InputError, match="no image shows a particle"):
        particle_balls([second.using(torch.zeros(4, dtype=torch.bool))], 5.0, MEMORY)


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_noise_is_measured(strength: float) -> None:
    """Images of noise alone: their variance is what the whitening says; scaled data say so, each tilt series for itself."""
    density = blobs(24)
    quiet = particle_set(density, 24, PIXEL, 1.0)
    noise = np.random.default_rng(0).normal(size=quiet.stack.shape).astype(np.float32)
    balls = particle_balls([replace(quiet, stack=noise)] * 2, 8.0, MEMORY)
    louder = torch.where(balls.series == 1, strength, 1.0)
    balls = replace(balls, data=balls.data * louder[:, None])
    mask = soft_sphere(20, 7.0, 2.0)
    found = noise_variance(balls, mask, torch.Generator().manual_seed(0))
    assert found.shape == (48,) and len(found.unique()) == (1 if strength == 1 else 2)
    assert float(found[0]) == pytest.approx(1.0, rel=0.12)  # 24 particles: sqrt(2 / (24 · 40 maps that differ)) = 0.05
    assert float(found[-1] / found[0]) == pytest.approx(strength**2, rel=1e-4 if strength == 1 else 1e-3)
    again = noise_variance(balls.scaled(found), mask, torch.Generator().manual_seed(0))
    assert math.isclose(float(again[-1]), 1.0, rel_tol=1e-3)
