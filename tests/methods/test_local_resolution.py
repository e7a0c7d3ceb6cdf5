"""local_resolution: fast against slow, the statistics of noise, two regions of different resolution, the filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from libemc.errors import InputError
from libemc.methods import local_resolution as local
from libemc.numerics.filters import lowpass
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import rfft_radius
from libemc.numerics.masks import soft_sphere


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn((n,) * 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [21, 24])
@pytest.mark.parametrize("m", [8, 11])
def test_a_window_is_a_box_of_its_own(n: int, m: int) -> None:
    """The slow route: cut the box out of the padded map, weight it, and take its FSC; places at the border included."""
    halves = [noise(n, 1) + noise(n, seed) for seed in (2, 3)]
    window = soft_sphere(m, m / 4, m / 4 - 1).double()
    centres = torch.tensor([[0, 0, 0], [n - 1, 2, n // 2], [7, 11, 5], [n // 2] * 3])
    curves = local.windowed_fsc(halves[0], halves[1], centres, window)
    for centre, curve in zip(centres.tolist(), curves, strict=True):
        cubes = []
        for half in halves:
            cube = torch.zeros((m,) * 3, dtype=torch.float64)
            for place in np.ndindex(cube.shape):
                at = [c + i - m // 2 for c, i in zip(centre, place, strict=True)]
                if all(0 <= a < n for a in at):
                    cube[place] = half[tuple(at)]
            cubes.append(cube * window)
        wanted = fourier_shell_correlation(cubes[0], cubes[1]).values
        assert curve[1:].numpy() == pytest.approx(wanted[1:].numpy(), abs=1e-6)  # float32


@pytest.mark.parametrize("m", [16, 22])
def test_noise_exceeds_the_threshold_once_in_twenty(m: int) -> None:
    """Of 375 windows 5 % with an error of 1.1 %, in the shells where noise and not 0.143 sets it; less beyond."""
    window = local.moving_window(m)
    threshold = local.noise_threshold(window)
    centres = torch.cartesian_prod(*[torch.arange(16, 80, 14)] * 3)
    above = torch.cat([
        local.windowed_fsc(noise(96, 2 * i).float(), noise(96, 2 * i + 1).float(), centres, window) > threshold
        for i in range(3)
    ]).double().mean(dim=0)  # fmt: skip
    noisy = (threshold > 0.1431) & (threshold < 0.6)
    assert noisy.sum() >= 3
    assert above[noisy].max() < 0.09 and above[noisy].mean() > 0.02
    assert above[~noisy][2:].max() < 0.06


@pytest.mark.parametrize("m", [8, 9])
def test_the_leakage_is_the_sum_over_pairs_of_coefficients(m: int) -> None:
    window = local.moving_window(m).double()
    leak = local.leakage(window)
    transform = torch.fft.fftn(window).abs() ** 2
    k = torch.fft.fftfreq(m, 1 / m).round().long()
    all_k = torch.cartesian_prod(k, k, k)
    shell = all_k.double().norm(dim=-1).round().long()
    for s, t in ((2, 0), (3, 1), (4, 1), (4, 2)):
        pairs = (all_k[shell == s][:, None] - all_k[shell == t][None]) % m
        total = transform[pairs[..., 0], pairs[..., 1], pairs[..., 2]].sum() / (transform.sum() * (shell == t).sum())
        assert float(leak[s, t]) == pytest.approx(float(total), rel=1e-9)
    assert float(leak.triu(-1).abs().max()) == 0


def test_what_strong_coarse_detail_brings_is_taken_off() -> None:
    """Signal of 30 times the noise's amplitude to 24 Å, shell 3.5 of the window: beyond, the FSC should be near 0."""
    signal = 30 * lowpass(noise(60, 1), 3.0, 24.0, edge=0.02)
    halves = [signal + noise(60, seed) for seed in (2, 3)]
    window = local.moving_window(28).double()
    centres = torch.cartesian_prod(*[torch.arange(16, 48, 10)] * 3)
    plain = local.windowed_fsc(halves[0], halves[1], centres, window).mean(dim=0)
    taken = local.windowed_fsc(halves[0], halves[1], centres, window, local.leakage(window)).mean(dim=0)
    assert float(plain[5]) > 0.8 and float(taken[5]) < 0.65
    assert float(taken[2]) > 0.99 and float(taken[6:].max()) < 0.05


def two_regions(n: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Halves with detail to 10 Å at high z and to 24 Å at low z, at 3 Å; noise of the same power everywhere."""
    z = torch.arange(n)[:, None, None] - n // 2
    fine, coarse = (6 * lowpass(noise(n, seed), 3.0, cut, edge=0.02) for seed, cut in ((1, 10.0), (2, 24.0)))
    signal = torch.where(z >= 0, fine, 4 * coarse)
    return [signal + noise(n, seed) for seed in (3, 4)], z.expand(n, n, n)


@pytest.mark.parametrize("n", [60, 61])
def test_two_regions_are_told_apart(n: int) -> None:
    """Away from the plane between them by half a window; a window smears a sharp end of strong detail over up to two shells."""
    halves, z = two_regions(n)
    mask = soft_sphere(n, 24.0, 4.0).double()
    found = local.local_resolution(halves[0], halves[1], 3.0, mask, 10.0)
    shell = 1 / (found.window * 3.0)
    assert found.window == 28 and (found.resolution[mask <= 0.5] == 0).all()
    fine = found.resolution[(z > 14) & found.inside].median()
    coarse = found.resolution[(z < -14) & found.inside].median()
    assert abs(1 / float(fine) - 1 / 10.0) < 2 * shell and abs(1 / float(coarse) - 1 / 24.0) < 2 * shell
    q = found.quantiles()
    assert q["best_tenth"] < 11.5 and q["worst_tenth"] > 14 and q["best_tenth"] < q["median"] < q["worst_tenth"]


def test_the_local_filter_is_the_filter_of_each_voxel() -> None:
    """The slow route: at a voxel, the gains of the places around it, interpolated; the whole map filtered by them."""
    n = 40
    halves, _ = two_regions(n)
    mask = soft_sphere(n, 14.0, 4.0).double()
    found = local.local_resolution(halves[0], halves[1], 3.0, mask, 8.0)
    mean = 0.5 * (halves[0] + halves[1])
    fast = local.local_filter(mean, found)
    gains = local.shell_gains(found).double().numpy()
    lattice = np.zeros((gains.shape[1], *found.measured.shape))
    nearest = ndimage.distance_transform_edt(~found.measured.numpy(), return_distances=False, return_indices=True)
    lattice[:, found.measured.numpy()] = gains.T
    lattice = lattice[(slice(None), *nearest)]
    position = rfft_radius((n,) * 3).numpy() * found.window
    spectrum = np.fft.rfftn(mean.numpy())
    for voxel in ((20, 20, 20), (27, 13, 22), (9, 25, 18), (33, 30, 35)):
        at = [[v / found.step] for v in voxel]
        curve = np.array([ndimage.map_coordinates(g, at, order=1)[0] for g in lattice])
        gain = np.interp(position, np.arange(len(curve) + 1), [*curve, 0.0])
        slow = np.fft.irfftn(spectrum * gain, s=(n,) * 3)[voxel]
        assert float(fast[voxel]) == pytest.approx(slow, abs=1e-4 * float(mean.std()))


def test_the_local_filter_is_nearer_to_the_truth() -> None:
    """Than the best low-pass for the whole map."""
    n = 60
    halves, z = two_regions(n)
    fine, coarse = (6 * lowpass(noise(n, seed), 3.0, cut, edge=0.02) for seed, cut in ((1, 10.0), (2, 24.0)))
    true, mean = torch.where(z >= 0, fine, 4 * coarse), 0.5 * (halves[0] + halves[1])
    mask = soft_sphere(n, 24.0, 4.0).double()
    found = local.local_resolution(halves[0], halves[1], 3.0, mask, 10.0)

    def error(volume: torch.Tensor) -> float:
        return float((((volume - true) * mask) ** 2).sum() / ((true * mask) ** 2).sum())

    assert error(local.local_filter(mean, found)) < min(
        error(lowpass(mean, 3.0, cut)) for cut in (9.0, 10.0, 12.0, 16.0, 24.0)
    )


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(InputError, match=r"nowhere above 0\.5"):
        local.local_resolution(noise(24, 1), noise(24, 2), 3.0, 0.4 * torch.ones(24, 24, 24), 10.0)
