"""postprocess: resampling and turning against closed forms, resolutions against expected values, thresholds of masks."""

from __future__ import annotations

import math

import pytest
import torch

from libemc.errors import InputError
from libemc.methods import postprocess as post
from libemc.numerics import fourier
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import centred_coordinates, centred_radius, rfft_radius
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_euler

CENTRE = torch.tensor([1.7, -2.3, 0.9], dtype=torch.float64)
ROOT = torch.tensor([[2.9, 0.0, 0.0], [0.8, 2.4, 0.0], [-0.5, 0.6, 2.1]], dtype=torch.float64)
"""A Gaussian without symmetry: its centre (x, y, z) and a root of its covariance, pixels."""


def gaussian(shape: tuple[int, ...], centre: torch.Tensor = CENTRE, root: torch.Tensor = ROOT) -> torch.Tensor:
    """exp(-rᵀ C⁻¹ r / 2) with C = root · rootᵀ: (z, y, x) float64."""
    z, y, x = centred_coordinates(shape)
    r = torch.stack(torch.broadcast_tensors(x, y, z), dim=-1) - centre
    return torch.exp(-0.5 * (r @ torch.linalg.inv(root).T).square().sum(dim=-1))


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn((n,) * 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fading(n: int, seed: int, k0: float) -> torch.Tensor:
    """Noise whose power at frequency k (1/px) is exp(-(k/k0)²) times that of white noise."""
    spectrum = torch.fft.rfftn(noise(n, seed))
    return torch.fft.irfftn(spectrum * torch.exp(-0.5 * (rfft_radius((n,) * 3) / k0) ** 2), s=(n,) * 3)


# ------------------------------------------------------------------------------------------------- sampling and position


@pytest.mark.parametrize(("size", "new"), [(16, 8), (15, 5), (12, 18), (15, 25), (16, 16)])
def test_resampling_to_a_whole_number_is_fourier_resize(size: int, new: int) -> None:
    volume = noise(size, 1)
    assert torch.allclose(post.resample(volume, size / new), fourier.resize(volume, (new,) * 3), atol=1e-12)  # rounding


@pytest.mark.parametrize("size", [36, 37])
@pytest.mark.parametrize("step", [0.73, 1.37])
def test_resampling_keeps_centre_and_width(size: int, step: float) -> None:
    """The Gaussian's narrowest width is 2.0 px: its transform at the coarser Nyquist 0.365 is exp(-10.5) = 3e-5; as
    much is lost from its peak. The copies of it beyond the box are as small."""
    got = post.resample(gaussian((size, size + 4, size + 2)), step)
    assert got.shape == tuple(post.resampled_size(n, step) for n in (size, size + 4, size + 2))
    assert torch.allclose(got, gaussian(got.shape, CENTRE / step, ROOT / step), atol=1e-4)


def test_resampled_sizes() -> None:
    assert [post.resampled_size(*case) for case in ((64, 2.0), (10, 2.0), (65, 2.0), (64, 3.0), (31, 1.0001))] == [
        32, 5, 32, 22, 31,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(32, 32, 32), (33, 33, 33), (28, 33, 30)])
def test_place_is_the_closed_form(shape: tuple[int, int, int]) -> None:
    """Density at R·u + s is the input at u. Error of cubic splines: f''''/384 = 3/(384 σ⁴) = 5e-4 at σ = 2 px, per axis."""
    rotation = matrix_from_euler(20.0, 50.0, -75.0)
    shift = (1.25, -0.5, 2.0)
    got = post.place(gaussian(shape), rotation, shift)
    wanted = gaussian(shape, rotation @ CENTRE + torch.tensor(shift, dtype=torch.float64), rotation @ ROOT)
    assert torch.allclose(got, wanted, atol=1.5e-3)
    assert float((post.place(gaussian(shape), rotation.T, shift) - wanted).abs().max()) > 0.3  # so that it can fail


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("size", [24, 25])
def test_mirror_is_about_the_origin(size: int, axis: str) -> None:
    sign = torch.ones(3, dtype=torch.float64)
    sign["xyz".index(axis)] = -1
    got = post.mirror(gaussian((size,) * 3), axis)
    wanted = gaussian((size,) * 3, sign * CENTRE, torch.diag(sign) @ ROOT)
    inside = tuple(slice(1, None) for _ in range(3))  # the first plane of an even box has no partner
    assert torch.allclose(got[inside], wanted[inside], atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ resolution


def crossing(got: float, expected: float, share: float = 1.0) -> bool:
    """Whether two resolutions in px agree to within 4 standard errors of an FSC at its crossing.

    Its standard error is 1/sqrt(count/2) with count = 4π s² of independent coefficients in shell s of a box of 48; the
    slope of F = S/(1 + S) with S = exp(-(k/k0)²) at k0 = 0.15 is above 0.02 per shell at F = 0.143.
    """
    shell = 48 / expected
    error = 1 / math.sqrt(share * 2 * math.pi * shell**2) / 0.02
    return abs(48 / got - shell) < 4 * error


def test_the_resolution_of_half_maps() -> None:
    """F = S/(1 + S) = 0.143 where S = 1/6: k = k0 sqrt(ln 6); half a bit is S = 0.2071 in a half map, for many voxels."""
    signal = fading(48, 1, 0.15)
    found = post.half_map_resolution(signal + noise(48, 2), signal + noise(48, 3), 1.0)
    assert (found.main, found.criterion, set(found.curves)) == ("unmasked", "0.143", {"unmasked"})
    assert crossing(found.value, 1 / (0.15 * math.sqrt(math.log(5.99))))
    assert crossing(found.crossings["unmasked"]["half_bit"], 1 / (0.15 * math.sqrt(math.log(1 / 0.2071))))
    assert found.crossings["unmasked"]["one_bit"] > found.crossings["unmasked"]["half_bit"]
    assert not found.stays_above()
    double = post.half_map_resolution(signal + noise(48, 2), signal + noise(48, 3), 2.0)
    assert double.value == pytest.approx(2 * found.value)


def test_a_mask_around_the_signal_shows_more_and_is_corrected() -> None:
    """Signal in a sphere only: the masked FSC is that of signal and noise within, whatever the box around it."""
    mask = soft_sphere(48, 14.0, 4.0).double()
    signal = fading(48, 4, 0.15) * mask
    halves = signal + noise(48, 5), signal + noise(48, 6)
    found = post.half_map_resolution(*halves, 1.0, mask, torch.Generator().manual_seed(0))
    assert found.main == "corrected" and "randomised" not in found.crossings
    assert found.crossings["unmasked"]["0.143"] > 1.1 * found.value
    assert crossing(found.value, 1 / (0.15 * math.sqrt(math.log(5.99))), post.independent_fraction(mask))


def test_the_resolution_against_a_model() -> None:
    """F = sqrt(S/(1 + S)) = 0.5 where S = 1/3."""
    signal = fading(48, 7, 0.15)
    found = post.model_resolution(signal + noise(48, 8), signal, 1.0)
    assert found.criterion == "0.5" and set(found.thresholds) == {"0.143", "0.5"}
    assert crossing(found.value, 1 / (0.15 * math.sqrt(math.log(3))))
    assert set(post.model_resolution(signal, signal, 1.0, soft_sphere(48, 14.0, 4.0).double()).curves) == {
        "unmasked",
        "masked",
    }


def test_equal_maps_are_limited_by_their_pixels() -> None:
    """A small mask makes the one-bit threshold 1 in the first shells: they say nothing and stop nothing."""
    a, mask = noise(24, 9), soft_sphere(24, 3.0, 2.0).double()
    found = post.half_map_resolution(a, a, 3.0, mask, torch.Generator().manual_seed(0))
    assert bool((found.thresholds["one_bit"] >= 1).any())  # type: ignore[operator]
    assert found.stays_above()
    assert set(found.crossings["masked"].values()) == {6.0}


def test_the_table_is_plain_numbers() -> None:
    a = noise(16, 10)
    found = post.half_map_resolution(a + noise(16, 11), a + noise(16, 12), 2.0)
    table = found.table()
    assert len(table["frequency"]) == len(table["curves"]["unmasked"]) == len(table["thresholds"]["half_bit"]) == 9
    assert table["frequency"][-1] == pytest.approx(0.25)
    assert table["resolution"] == table["resolutions"]["unmasked"]["0.143"] == found.value


def test_independent_coefficients_within_a_mask() -> None:
    """The variance of the FSC of noise is 1/(fraction · count), an eighth less as a shell of 1 px isn't quite thin.

    25 pairs of 9 shells in which neighbours go together, some 100 squares of a normal variable: mean ± 0.14 (1 σ).
    """
    ball = soft_sphere(48, 16.0, 0.0).double()
    assert post.independent_fraction(torch.ones(8, 8, 8)) == pytest.approx(1)
    assert post.independent_fraction(ball) == pytest.approx(8 * math.pi / 81, rel=0.02)  # voxels on its surface
    mask = soft_sphere(24, 5.0, 4.0).double()
    squares = []
    for seed in range(25):
        curve = fourier_shell_correlation(noise(24, 2 * seed) * mask, noise(24, 2 * seed + 1) * mask)
        squares.append((curve.values**2 * curve.count)[3:12] * post.independent_fraction(mask))
    assert float(torch.stack(squares).mean()) == pytest.approx(0.88, abs=0.42)


# -------------------------------------------------------------------------------------------------- comparison and masks


def test_comparison() -> None:
    a = noise(20, 13)
    same = post.compare(a, 2 * a, 1.5)
    assert same == pytest.approx((1.0, 0.5, 3.0))
    other = post.compare(a + noise(20, 14), a + noise(20, 15), 1.5)
    assert other.correlation == pytest.approx(0.5, abs=5 / math.sqrt(20**3))  # standard error below 1/sqrt(N)
    assert other.difference == pytest.approx(1.0, abs=0.05)  # sqrt(2/2)
    flat = post.compare(torch.ones(6, 8, 8), torch.zeros(6, 8, 8), 1.0)
    assert (flat.correlation, flat.difference) == (0.0, math.inf)


@pytest.mark.parametrize(("radius", "deviation"), [(10.0, 0.0), (10.0, 0.12), (5.0, 0.12)])
def test_the_automatic_threshold_parts_a_ball_from_noise(radius: float, deviation: float) -> None:
    """A ball with a soft surface 2 px wide, 5 or 0.6 % of the box: half its density is at radius + 1."""
    ball = soft_sphere(44, radius, 2.0).double()
    level = post.automatic_threshold(ball + deviation * noise(44, 16))
    dense = ball + deviation * noise(44, 16) > level
    outside = centred_radius((44,) * 3) > radius + 2
    assert 0.3 < level < 0.75
    assert float(dense[outside].double().mean()) < 2e-4  # 4 deviations: 3e-5 of normal noise
    size = (3 * float(dense.sum()) / (4 * math.pi)) ** (1 / 3)
    assert abs(size - radius - 1) < 0.5


def test_the_largest_density() -> None:
    volume = torch.zeros(12, 12, 12)
    volume[1:4, 1:4, 1:4], volume[6:11, 6:11, 6:11], volume[4, 4, 4] = 2.0, 1.0, 3.0
    kept = post.keep_largest(volume, 0.5)
    assert int((kept > 0.5).sum()) == 125 and bool((kept[6:11, 6:11, 6:11] == 1).all())
    assert float(kept[2, 2, 2]) == 0.5 and torch.equal(kept[5], volume[5])
    assert torch.equal(post.keep_largest(volume, 5.0), volume)


def test_the_mass_of_protein() -> None:
    """8000 Å³ of 0.81 Da."""
    assert post.protein_mass(1000, 2.0) == pytest.approx(6.48)


def test_what_a_mask_must_be() -> None:
    post.check_mask(torch.linspace(0, 1, 27).reshape(3, 3, 3))
    with pytest.raises(InputError, match=r"m.mrc: is no mask: its values go from -1 to 3; make one with emc_mask"):
        post.check_mask(torch.tensor([-1.0, 3.0]), "m.mrc")
    with pytest.raises(InputError, match="empty"):
        post.check_mask(torch.zeros(3))


def test_grids() -> None:
    grid = post.Grid((8, 8, 8), 3.0)
    assert str(grid) == "8 x 8 x 8 voxels of 3 Å"
    assert grid.same(post.Grid((8, 8, 8), 3.0001)) and grid.same_sampling(post.Grid((6, 6, 6), 3.0))
    assert not grid.same(post.Grid((8, 8, 8), 3.01)) and not grid.same(post.Grid((8, 8, 6), 3.0))
