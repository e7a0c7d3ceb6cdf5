"""fsc: shells counted by hand, closed forms, and the statistics of noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.numerics import fsc
from libemc.numerics.masks import soft_sphere


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The definition over the whole transform: no half layout, no weights."""
    n = a.shape[0]
    k = np.fft.fftfreq(n, 1 / n)
    shell = np.rint(np.sqrt(sum(g**2 for g in np.meshgrid(*[k] * a.ndim, indexing="ij")))).astype(int)
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    inside = [shell == s for s in range(n // 2 + 1)]
    return np.array(
        [(fa * fb.conj())[m].sum().real / np.sqrt((abs(fa[m]) ** 2).sum() * (abs(fb[m]) ** 2).sum()) for m in inside]
    )


@pytest.mark.parametrize("shape", [(12,) * 3, (13,) * 3, (16,) * 2, (15,) * 2])
def test_half_transform_counts_as_the_whole(shape: tuple[int, ...]) -> None:
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    b = b + 0.7 * a
    curve = fsc.fourier_shell_correlation(a, b)
    assert np.allclose(curve.values, full_fsc(a.numpy(), b.numpy()), atol=1e-12)  # float64 rounding
    assert np.allclose(curve.frequency, np.arange(shape[0] // 2 + 1) / shape[0])


def test_counts_of_the_first_shells() -> None:
    """Shell 0 is the origin; shell 1 the 6 + 12 points with |k|² = 1, 2; shell 2 the 8 + 6 + 24 + 24 with 3 ... 6."""
    assert fsc.fourier_shell_correlation(noise(16, 16, 16), noise(16, 16, 16)).count[:3].tolist() == [1, 18, 62]


def test_a_map_agrees_with_itself_and_not_with_its_negative() -> None:
    a = noise(16, 16, 16).float()
    assert torch.allclose(fsc.fourier_shell_correlation(a, 3 * a).values, torch.ones(9, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(fsc.fourier_shell_correlation(a, -a).values, -torch.ones(9, dtype=torch.float64), atol=1e-6)


def test_noise_has_none_within_its_standard_error() -> None:
    """Independent noise: mean 0, deviation 1/sqrt(count/2), the number of Friedel-independent coefficients."""
    curve = fsc.fourier_shell_correlation(noise(32, 32, 32, seed=3), noise(32, 32, 32, seed=4))
    z = (curve.values * (curve.count / 2).sqrt())[1:]
    assert float(z.abs().max()) < 4.5  # 16 shells, a normal variable
    assert 0.4 < float((z**2).mean()) < 2.0  # chi² of 16 over 16, 1st and 99th percentile


def test_signal_and_noise_give_the_expected_value() -> None:
    """FSC = SNR/(SNR + 1): 1/2 at equal power, to 5 standard errors of (1 - FSC²)/sqrt(count/2) ~ 1/sqrt(count/2)."""
    signal = noise(32, 32, 32, seed=5)
    curve = fsc.fourier_shell_correlation(signal + noise(32, 32, 32, seed=6), signal + noise(32, 32, 32, seed=7))
    assert bool(((curve.values - 0.5).abs() < 5 / (curve.count / 2).sqrt())[1:].all())


def test_shells_without_power_are_zero() -> None:
    assert fsc.fourier_shell_correlation(torch.zeros(8, 8, 8), noise(8, 8, 8).float()).values.tolist() == [0.0] * 5


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        fsc.fourier_shell_correlation(noise(8, 8, 8), noise(10, 10, 10))
    with pytest.raises(InputError, match="no shells"):
        fsc.fourier_shell_correlation(noise(8, 8, 10), noise(8, 8, 10))


def curve_of(values: list[float]) -> fsc.Curve:
    n = 2 * (len(values) - 1)
    v = torch.tensor(values, dtype=torch.float64)
    return fsc.Curve(torch.arange(len(values), dtype=torch.float64) / n, v, torch.full_like(v, 1000.0))


def test_resolution_is_the_first_crossing() -> None:
    curve = curve_of([1, 1, 0.9, 0.4, 0.6, 0.0, 0.0])  # box 12
    assert fsc.resolution_at(curve, 0.5, 2.0) == pytest.approx(2.0 * 12 / 2.8)  # 0.9 → 0.4 crosses 0.5 at shell 2.8
    assert fsc.resolution_at(curve, 0.143, 2.0) == pytest.approx(2.0 * 12 / (4 + (0.6 - 0.143) / 0.6))
    assert fsc.resolution_at(curve_of([1.0] * 7), 0.143, 2.0) == pytest.approx(4.0)  # never: Nyquist
    assert fsc.resolution_at(curve_of([-1.0] + [0.0] * 6), 0.5, 2.0) == pytest.approx(2.0 * 12 / 0.5)  # at once
    threshold = torch.tensor([9, 0.5, 0.5, 0.3, 0.7, 0, 0])  # a curve: crossed between shells 3 (+0.1) and 4 (-0.1)
    assert fsc.resolution_at(curve, threshold, 2.0) == pytest.approx(2.0 * 12 / 3.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(12,) * 3, (13,) * 3, (16,) * 2])
def test_phase_randomisation_keeps_amplitudes_and_reality(shape: tuple[int, ...]) -> None:
    a = noise(*shape, seed=8)
    b = fsc.phase_randomise(a, 3, torch.Generator().manual_seed(1))
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())  # the whole transform of a real map: Hermitian
    assert b.dtype == a.dtype and np.allclose(abs(fa), abs(fb), atol=1e-10)  # float64 rounding, |F| ~ 50
    k = np.fft.fftfreq(shape[0], 1 / shape[0])
    radius = np.sqrt(sum(g**2 for g in np.meshgrid(*[k] * len(shape), indexing="ij")))
    assert np.allclose(fa[radius < 2.5], fb[radius < 2.5], atol=1e-10)
    cosine = (fa * fb.conj()).real[radius > 2.5] / abs(fa[radius > 2.5]) ** 2
    assert abs(cosine.mean()) < 5 * math.sqrt(0.5 / (cosine.size / 2))  # cos of a random phase has variance 1/2
    again = fsc.phase_randomise(a, 3, torch.Generator().manual_seed(1))
    assert torch.equal(b, again) and not torch.equal(b, fsc.phase_randomise(a, 3, torch.Generator().manual_seed(2)))


def test_correction_takes_away_what_the_mask_brings() -> None:
    """Halves that share shells 0 ... 6 only, under a tight mask: the mask correlates, the correction does not."""
    n, cut = 48, 6
    shell = torch.sqrt(sum(g**2 for g in torch.meshgrid(*[torch.fft.fftfreq(n, 1 / n)] * 3, indexing="ij")))
    mask = soft_sphere(n, 7.0, 3.0).double()
    signal = torch.fft.ifftn(torch.fft.fftn(noise(n, n, n, seed=9) * mask) * (shell < cut + 0.5)).real
    halves = [60 * signal + noise(n, n, n, seed=s) for s in (10, 11)]
    found = fsc.corrected_fsc(*halves, mask, torch.Generator().manual_seed(0))
    unmasked, masked, randomised, corrected = found.unmasked, found.masked, found.randomised, found.corrected
    start = int((unmasked.values[1:] < fsc.RANDOMISE_BELOW).nonzero()[0]) + 1
    assert start == cut + 1
    assert torch.equal(corrected.values[: start + 2], masked.values[: start + 2])
    # Beyond what the mask smears nothing is left but the noise of two curves, of as many independent coefficients as
    # the mask leaves: (Σm²)²/Σm⁴ of n³, halved for Friedel mates. Four standard errors.
    beyond = slice(start + 6, None)
    share = float((mask**2).sum() ** 2 / (mask**4).sum()) / n**3
    error = (2 / (unmasked.count[beyond] * share / 2)).sqrt()
    assert bool((corrected.values[beyond].abs() < 4 * error).all())
    assert float(masked.values[start + 2] - corrected.values[start + 2]) > 0.5  # and there was something to take away
    assert float(randomised.values[2:cut].mean()) > 0.9  # phases below the start are kept
    expected = (masked.values - randomised.values) / (1 - randomised.values)
    assert torch.allclose(corrected.values[start + 2 :], expected[start + 2 :])


def test_information_thresholds_of_van_heel_and_schatz() -> None:
    """Their equations with the numbers printed in the paper (four digits), and their limits for many coefficients."""
    curve = fsc.fourier_shell_correlation(noise(16, 16, 16), noise(16, 16, 16))
    root = (curve.count / 2).sqrt()[1:]
    half, one = (fsc.information_threshold(curve, bits).values[1:] for bits in (0.5, 1.0))
    assert torch.allclose(half, (0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root), atol=1e-4)
    assert torch.allclose(one, (0.5 + 2.4142 / root) / (1.5 + 1.4142 / root), atol=1e-4)
    many = fsc.Curve(curve.frequency, curve.values, torch.full_like(curve.values, 1e12))
    assert fsc.information_threshold(many, 0.5).values[1] == pytest.approx(0.1716, abs=1e-4)
    assert fsc.information_threshold(many, 1.0).values[1] == pytest.approx(1 / 3, abs=1e-4)
