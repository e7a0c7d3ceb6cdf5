"""Filtered references: closed forms by shells, gains by directions and by places, and halves that stay apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods.postprocess import half_map_resolution
from libemc.methods.refine import references
from libemc.methods.refine.references import Filtering, filtered_references, half_gain
from libemc.numerics.grids import centred_radius, rfft_frequencies, rfft_radius
from libemc.numerics.masks import soft_sphere

KINDS = ("spherical", "anisotropic", "local")
AXIS = torch.nn.functional.normalize(torch.tensor([0.6, 0.3, 0.8]), dim=0)


def noise(n: int, seed: int) -> Tensor:
    return torch.randn(n, n, n, generator=torch.Generator().manual_seed(seed)).double()


def shaped(volume: Tensor, gain: Tensor) -> Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * gain, s=volume.shape)


def particle(n: int, seed: int = 1, radius: float = 13.0) -> Tensor:
    """Noise that falls with frequency, within a ball: asymmetric."""
    return shaped(noise(n, seed), 4 * torch.exp(-0.5 * (rfft_radius((n,) * 3) / 0.15) ** 2)) * soft_sphere(
        n, radius, 4.0
    )


def filtering(kind: str, mask: Tensor, halves: list[Tensor]) -> references.ReferenceFilter:
    found = half_map_resolution(halves[0], halves[1], 3.0, mask, torch.Generator().manual_seed(0))
    return Filtering(kind, mask, 3.0, 0).of(halves[0], halves[1], found.curves["corrected"].values)


@pytest.mark.parametrize("n", [24, 25])
def test_shells_are_weighed_by_the_fsc_of_a_half_and_of_both(n: int) -> None:
    """Against numpy's whole transform: 2F/(1 + F) of the mean below the shared shells, F of a half beyond, 0 at the end."""
    halves, mask = [noise(n, seed) for seed in (1, 2)], torch.ones(n, n, n)
    fsc = torch.where(torch.arange(n // 2 + 1) < 9, 0.6, 0.0).double()
    filtered = Filtering("spherical", mask, 3.0, 0).of(halves[0], halves[1], fsc)
    found = filtered_references(halves[0], halves[1], mask, filtered, shared=4.0)
    k = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    for own, reference in zip(halves, found, strict=True):
        spectra = [np.fft.fftn(v.numpy()) for v in (reference, own, (halves[0] + halves[1]) / 2)]
        low, high, none = (radius >= 1) & (radius <= 3), (radius >= 4) & (radius <= 8), radius >= 9
        np.testing.assert_allclose(spectra[0][low], 1.2 / 1.6 * spectra[2][low], atol=1e-9 * n**3)
        np.testing.assert_allclose(spectra[0][high], 0.6 * spectra[1][high], atol=1e-9 * n**3)
        assert abs(spectra[0][none & (radius < n // 2)]).max() < 1e-9 * n**3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [48, 49])
def test_halves_stay_apart(kind: str, n: int) -> None:
    """With one filter, what changes in half 2 beyond the shared shells never reaches reference 1; below them it does."""
    true, mask = particle(n), soft_sphere(n, 16.0, 4.0).double()
    halves = [true + noise(n, seed) for seed in (2, 3)]
    filtered, shared = filtering(kind, mask, halves), 5.0
    change, radius = noise(n, 4), rfft_radius((n,) * 3) * n
    for gain, reaches in (((radius > shared + 1).double(), False), ((radius < shared - 1).double(), True)):
        before, after = (
            filtered_references(halves[0], halves[1] + part, mask, filtered, shared)
            for part in (torch.zeros(n, n, n), shaped(change, gain))
        )
        assert bool((before[0] - after[0]).abs().max() > 1e-3) is reaches
        assert (before[1] - after[1]).abs().max() > 1e-3


def error(found: tuple[Tensor, Tensor], true: Tensor, mask: Tensor) -> float:
    """Of both references within the mask, over the power of what is true."""
    return float(sum((((f - true) * mask) ** 2).sum() for f in found) / (2 * ((true * mask) ** 2).sum()))


def test_directions_gain_where_noise_has_one_and_lose_little_where_it_has_none() -> None:
    """Noise of 7 times the amplitude within 40° of an axis. Without it: the error is that of the spherical filter, to 3 %."""
    n = 48
    z, y, x = rfft_frequencies((n,) * 3)
    along = (AXIS[0] * x + AXIS[1] * y + AXIS[2] * z).abs() / (x**2 + y**2 + z**2).sqrt().clamp_min(1e-9)
    true, mask = particle(n), soft_sphere(n, 15.0, 5.0).double()
    errors = {}
    for name, gain in (
        ("cone", torch.where(along > math.cos(math.radians(40)), 5.0, 0.7)),
        ("even", torch.tensor(2.0)),
    ):
        halves = [true + shaped(noise(n, seed), gain) for seed in (2, 3)]
        errors[name] = {
            kind: error(filtered_references(*halves, mask, filtering(kind, mask, halves)), true * mask, mask)
            for kind in ("spherical", "anisotropic")
        }
    assert errors["cone"]["anisotropic"] < 0.9 * errors["cone"]["spherical"]
    assert errors["even"]["anisotropic"] < 1.03 * errors["even"]["spherical"]


def test_places_gain_where_surroundings_are_noisy() -> None:
    """A particle in a mask that holds twice its radius, where neighbours add eight times the noise outside of it."""
    n = 64
    true, mask = particle(n, radius=14.0), soft_sphere(n, 27.0, 4.0).double()
    around = torch.where(centred_radius((n,) * 3) > 19, 8.0, 1.0)
    halves = [true + around * noise(n, seed) for seed in (2, 3)]
    errors = {
        kind: error(filtered_references(*halves, mask, filtering(kind, mask, halves)), true, mask)
        for kind in ("spherical", "local")
    }
    assert errors["local"] < 0.8 * errors["spherical"]


def test_places_lose_nothing_where_all_are_alike() -> None:
    """Even noise, of which a window alone would leave little above its threshold."""
    n = 48
    true, mask = particle(n), soft_sphere(n, 15.0, 5.0).double()
    halves = [true + 2 * noise(n, seed) for seed in (2, 3)]
    spherical, local = (
        error(filtered_references(*halves, mask, filtering(kind, mask, halves)), true * mask, mask)
        for kind in ("spherical", "local")
    )
    assert local < 1.03 * spherical


def test_the_gain_of_a_half_is_that_of_signal_and_noise() -> None:
    """S/(S + N) with F = S/(S + N), and nothing for what anticorrelates."""
    assert half_gain(torch.tensor([-0.2, 0.0, 0.25, 1.0])).tolist() == [0.0, 0.0, 0.25, 1.0]
