"""directional: cones against a slow route and closed forms, the direction that is found, and the filter that is made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.methods import directional as d
from libemc.methods.postprocess import half_map_resolution
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import rfft_frequencies, rfft_radius
from libemc.numerics.masks import soft_sphere

AXIS = torch.nn.functional.normalize(torch.tensor([0.6, -0.5, 0.62], dtype=torch.float64), dim=0)
"""A direction that no symmetry of a cube leaves where it is."""


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn((n,) * 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaped(volume: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * gain, s=volume.shape)


def cosine_to(axis: torch.Tensor, n: int) -> torch.Tensor:
    """|cos| of the angle between each coefficient and an axis (x, y, z)."""
    z, y, x = rfft_frequencies((n,) * 3)
    return ((x * axis[0] + y * axis[1] + z * axis[2]) / (rfft_radius((n,) * 3) * n).clamp_min(1)).abs()


@pytest.mark.parametrize("n", [15, 16])
def test_a_cone_of_ninety_degrees_is_the_shell(n: int) -> None:
    a, b = noise(n, 1), noise(n, 2)
    curves, counts = d.conical_fsc(a, a + b, d.cone_axes(3), 90.0)
    whole = fourier_shell_correlation(a, a + b)
    assert torch.allclose(curves[:, 1:], whole.values[1:].expand(3, -1), atol=1e-6)  # directions are float32
    assert torch.equal(counts[:, 1:], whole.count[1:].expand(3, -1))


@pytest.mark.parametrize("n", [15, 16])
def test_a_cone_is_the_sum_over_the_whole_transform(n: int) -> None:
    """The slow route: numpy's full transform, coefficient by coefficient."""
    a, b = noise(n, 1), noise(n, 1) + noise(n, 2)
    curves, counts = d.conical_fsc(a, b, AXIS[None], 40.0)
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())
    sums = np.zeros((4, n // 2 + 1))
    for place in np.ndindex(fa.shape):
        k = np.array([(i + n // 2 - (n % 2 == 0)) % n - n // 2 + (n % 2 == 0) for i in place])[::-1]  # (x, y, z)
        radius = np.linalg.norm(k)
        if 0.5 <= radius < n // 2 + 0.5 and abs(k @ AXIS.numpy()) >= math.cos(math.radians(40)) * radius - 1e-6:
            cross, pa, pb = (fa[place] * fb[place].conj()).real, abs(fa[place]) ** 2, abs(fb[place]) ** 2
            sums[:, round(radius)] += cross, pa, pb, 1
    # a coefficient at -n/2 stands for +n/2 too: which of both is in the cone differs in the last shell of an even box
    last = n // 2 if n % 2 == 0 else n // 2 + 1
    assert np.array_equal(counts[0, 1:last], sums[3, 1:last])
    found = sums[0, 1:last] / np.sqrt(np.maximum(sums[1] * sums[2], 1e-30))[1:last]
    assert np.allclose(curves[0, 1:last], found, atol=1e-9)


@pytest.mark.parametrize("n", [32, 33])
def test_the_weak_direction_is_found_and_not_its_mirror_image(n: int) -> None:
    """White signal of power 1; noise of power 1, and 9 within 35° of an axis: F = 1/2 and 1/10 in closed form.

    A cone of 25° about the axis has 9 % of a shell of 4π 12² coefficients: its error is 1/sqrt(170) = 0.08.
    """
    inside = cosine_to(AXIS, n) > math.cos(math.radians(35))
    gain = torch.where(inside, 3.0, 1.0)
    halves = [noise(n, 1) + shaped(noise(n, seed), gain) for seed in (2, 3)]
    axes = torch.stack((AXIS, AXIS * torch.tensor([-1.0, 1, 1]), AXIS * torch.tensor([1.0, -1, 1])))
    curves, _ = d.conical_fsc(halves[0], halves[1], axes)
    mean = curves[:, 8:16].mean(dim=1)
    assert mean[0] == pytest.approx(0.1, abs=0.1) and mean[1:].numpy() == pytest.approx([0.5, 0.5], abs=0.12)
    found = d.directional_resolution(halves[0], halves[1], 2.0)
    weak = found.curves[:, 8:16].mean(dim=1) < 0.25
    assert int(weak.sum()) >= 3 and (found.axes[weak] @ AXIS).abs().min() > math.cos(math.radians(45))
    volume = found.volume()
    in_band = (rfft_radius((n,) * 3) * n > 6) & (rfft_radius((n,) * 3) * n < 12)
    assert volume[in_band & (cosine_to(AXIS, n) > 0.94)].mean() < 0.2
    assert volume[in_band & (cosine_to(axes[1], n) > 0.94)].mean() > 0.35
    dense = found.centred_volume()
    full = torch.fft.fftshift(torch.fft.fftn(torch.fft.irfftn(volume.double(), s=(n,) * 3))).real
    assert torch.allclose(dense.double()[1:, 1:, 1:], full[1:, 1:, 1:], atol=1e-5)


def test_one_curve_for_all_cones_is_expanded_to_itself() -> None:
    curve = torch.linspace(1, 0, 9, dtype=torch.float64)
    volume = d.expand(curve.expand(60, -1), d.cone_axes(), d.HALF_ANGLE, 16)
    radius = rfft_radius((16,) * 3) * 16
    expected = torch.where(radius.round() <= 8, curve[radius.round().long().clamp_max(8)], 0.0)
    assert torch.allclose(volume.double(), expected, atol=1e-6)


def test_noise_gives_no_gain_beyond_the_first_shells() -> None:
    found = d.directional_resolution(
        noise(32, 1), noise(32, 2), 3.0, soft_sphere(32, 10.0, 4.0).double(), torch.Generator().manual_seed(0)
    )
    assert found.gain()[rfft_radius((32,) * 3) * 32 > 8].max() < 0.05


def test_the_filter_by_directions_is_nearer_to_the_truth() -> None:
    """Within the mask: the error of the filtered mean, against the filter by whole shells, and the best of all filters.

    The best knows signal and noise of each coefficient. The mask mixes neighbours, so the margin is what was seen.
    """
    n = 48
    inside = cosine_to(AXIS, n) > math.cos(math.radians(40))
    radius = rfft_radius((n,) * 3)
    fall, gain = 4 * torch.exp(-0.5 * (radius / 0.15) ** 2), torch.where(inside, 5.0, 0.7)
    mask = soft_sphere(n, 15.0, 5.0).double()
    true = shaped(noise(n, 1), fall) * soft_sphere(n, 13.0, 4.0)
    halves = [true + shaped(noise(n, seed), gain) for seed in (2, 3)]
    mean = 0.5 * (halves[0] + halves[1])

    def error(kept: torch.Tensor) -> float:
        return float((((shaped(mean, kept) - true) * mask) ** 2).sum() / ((true * mask) ** 2).sum())

    generator = torch.Generator().manual_seed(0)
    cones = d.directional_resolution(halves[0], halves[1], 2.0, mask, generator)
    sphere = d.directional_resolution(halves[0], halves[1], 2.0, mask, generator, AXIS[None], 90.0)
    share = float((soft_sphere(n, 13.0, 4.0) ** 2).mean() / (mask**2).mean())
    best = fall**2 * share / (fall**2 * share + gain**2 / 2)
    assert error(best) < error(cones.gain()) < 0.9 * error(sphere.gain())
    assert cones.anisotropy > 1.3 > 1.0 and cones.sphericity < 0.97
    spherical = half_map_resolution(halves[0], halves[1], 2.0, mask, torch.Generator().manual_seed(0))
    assert float(cones.crossings["0.143"].min()) < spherical.value < float(cones.crossings["0.143"].max())
    table = cones.table()
    assert abs(float(torch.tensor(table["worst"]["axis"], dtype=torch.float64) @ AXIS)) > math.cos(math.radians(40))
    assert len(cones.text().splitlines()) == 61


def test_the_wiener_gain_is_that_of_signal_and_noise() -> None:
    """S/(S + N/2) with F = S/(S + N)."""
    signal, noise_power = torch.tensor([0.0, 0.2, 1.0, 7.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    gain = d.wiener_gain(signal / (signal + noise_power))
    assert torch.allclose(gain, signal / (signal + noise_power / 2))
    assert d.wiener_gain(torch.tensor(-0.3)) == 0


def test_the_sphericity_of_a_ball_and_of_an_ellipsoid() -> None:
    """A prolate ellipsoid of axes 1, 1, 2: volume 8π/3, area 2π (1 + (2/e) asin e), e = sqrt(3)/2.

    Narrow cones follow its surface; they round it by less than 1 %.
    """
    axes = d.cone_axes(800)
    assert d.sphericity(axes, torch.full((800,), 3.0, dtype=torch.float64), 10.0) == pytest.approx(1, abs=1e-6)
    z = axes[:, 2]
    radii = 1 / (1 - z**2 + (z / 2) ** 2).sqrt()
    e = math.sqrt(3) / 2
    exact = math.pi ** (1 / 3) * (6 * 8 * math.pi / 3) ** (2 / 3) / (2 * math.pi * (1 + 2 / e * math.asin(e)))
    assert d.sphericity(axes, radii, 10.0) == pytest.approx(exact, abs=0.01)
