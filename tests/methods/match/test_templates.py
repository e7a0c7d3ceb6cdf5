"""Templates: turned as the conventions say, of the right size; decoys that have all of them but their shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from libemc.errors import InputError
from libemc.methods.match.templates import EDGE, Template, decoy, diameter, prepare, radial_mean, width
from libemc.numerics.rotations import random_rotations
from libemc.numerics.symmetry import symmetrise, symmetry_matrices
from tests.by_hand import PIXEL, blobs_map, pose
from tests.methods.match.blob_specimen import PIXEL_SIZE, RESOLUTION, density, wanted

BOX = 26
TURNS = [pose(0, 0, 90), pose(35.0, 70.0, -110.0), pose(-100.0, 160.0, 15.0)]


def smooth(n: int, turn: np.ndarray | None = None) -> torch.Tensor:
    """The blobs in finer voxels, so that sampling them loses nothing: widths of 1.3 voxels and more."""
    return torch.from_numpy(blobs_map(n, 2.5, turn)).float()


def of_map(values: torch.Tensor) -> Template:
    return Template("map", values, torch.ones_like(values), 1.0, 2.0)


def ball(n: int, semi_axes: tuple[float, float, float], fine: int = 5) -> torch.Tensor:
    """1 within an ellipsoid of semi-axes (z, y, x) voxels; voxels on its surface by how much of them is within."""
    step = (np.arange(fine) + 0.5) / fine - 0.5
    line = np.arange(n) - n // 2
    z, y, x = ((((line[:, None] + step).ravel()) / a) ** 2 for a in semi_axes)
    inside = (z[:, None, None] + y[:, None] + x < 1).astype(float)
    return torch.from_numpy(inside.reshape(n, fine, n, fine, n, fine).mean((1, 3, 5))).float()


@pytest.mark.parametrize("turn", TURNS)
def test_a_rotated_template_is_the_map_with_its_blobs_moved(turn: np.ndarray) -> None:
    """[x, y, z], density at R·u that of the map at u, origin at m//2; to 1.5 %, the error of reading slices."""
    found = of_map(smooth(BOX)).rotated(torch.from_numpy(turn)[None].double())[0].permute(2, 1, 0)
    expected = smooth(BOX, turn)
    assert float((found - expected).abs().max()) < 0.015 * float(expected.max())
    mirrored = smooth(BOX, np.diag([-1.0, 1, 1]) @ turn)
    assert float((found - mirrored).abs().max()) > 0.3 * float(expected.max())


def test_rotation_by_splines_agrees() -> None:
    """Another route: an affine transform of the map, as it has the inverse rotation and axes z, y, x."""
    turn, values = TURNS[1], smooth(BOX)
    inverse = turn.T[::-1, ::-1]
    middle = np.full(3, BOX // 2)
    expected = affine_transform(values.numpy(), inverse, middle - inverse @ middle, order=3)
    found = of_map(values).rotated(torch.from_numpy(turn)[None].double())[0].permute(2, 1, 0).numpy()
    assert np.abs(found - expected).max() < 0.05 * expected.max()


def test_coefficients_are_those_of_the_rotated_map() -> None:
    template = of_map(smooth(BOX))
    found = template.coefficients(torch.from_numpy(TURNS[1])[None].double())[0].numpy()
    x, y, z = template.ball[0].numpy().astype(int)
    assert (z >= 0).all() and (x**2 + y**2 + z**2 < template.radius**2).all()
    expected = np.fft.fftn(np.fft.ifftshift(smooth(BOX, TURNS[1]).numpy()))[z, y, x]
    assert np.abs(found - expected).max() < 0.015 * np.abs(expected).max()


def test_radius_is_that_of_the_resolution() -> None:
    assert Template("a", density(BOX), density(BOX), 2.0, 8.0).radius == pytest.approx(BOX / 4)
    assert Template("a", density(BOX), density(BOX), 2.0, 3.0).radius == pytest.approx(BOX / 2)


@pytest.mark.parametrize(("n", "scale"), [(48, 0.5), (47, 0.5), (50, 0.4), (31, 0.8), (24, 1.0), (25, 1.0)])
def test_resampling_keeps_the_centre(n: int, scale: float) -> None:
    """The blobs are where they were, in Å from the origin, at another pixel size, from odd boxes as well."""
    fine = PIXEL * scale  # Å; the template's voxels are of 2 Å
    template = prepare(torch.from_numpy(blobs_map(n, fine)).float(), fine, PIXEL, 2 * PIXEL, "blobs")
    assert template.box % 2 == 0 and template.pixel_size == PIXEL
    expected = torch.from_numpy(blobs_map(template.box, PIXEL)).float()
    inside = template.mask > 0.999
    offset = float((template.density - expected)[inside].mean())
    assert float((template.density - expected - offset)[inside].abs().max()) < 0.03 * float(expected.max())


def test_a_template_has_no_mean_under_its_mask() -> None:
    template = prepare(density(30) + 5, PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs")
    assert abs(float(template.density.sum())) < 1e-3 * float(template.density.abs().sum())
    assert bool((template.density[template.mask == 0] == 0).all())
    bare = prepare(density(30), PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs")
    torch.testing.assert_close(template.density, bare.density, atol=1e-4, rtol=0)  # whatever level it had


@pytest.mark.parametrize("box", [24, 32, 40])
def test_the_mask_that_is_not_given_holds_the_map(box: int) -> None:
    """A sphere of the map's extent with an edge of two voxels, however wide the box around it is."""
    template = prepare(ball(box, (9.0, 9.0, 9.0)), 1.0, 1.0, 2.0, "ball")
    x = np.arange(template.box) - template.box // 2
    radius = np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2)
    assert (template.mask.numpy()[radius < 8.5] == 1).all()
    assert (template.mask.numpy()[radius > 9.5 + EDGE] == 0).all()
    assert 9.5 + EDGE <= template.box / 2 <= 9.5 + EDGE + 2


def test_a_mask_cuts_the_map() -> None:
    """Half of it: nothing of the rest is left, and the box is as large as the mask asks for."""
    mask = torch.zeros(30, 30, 30)
    mask[15:23, 9:22, 9:22] = 1
    template = prepare(density(30), PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs", mask=mask, symmetry="c1")
    half = template.box // 2
    assert half - 1 >= math.ceil(math.sqrt(7**2 + 6**2 + 6**2))
    assert float(template.density[:half].abs().max()) == 0
    inner = template.mask == 1
    np.testing.assert_allclose(
        np.diff(template.density[inner].numpy()), np.diff(density(template.box)[inner].numpy()), atol=1e-5
    )


def test_a_map_of_nothing_is_no_template() -> None:
    with pytest.raises(InputError, match="the same everywhere"):
        prepare(torch.ones(20, 20, 20), 1.0, 1.0, 2.0, "empty")
    mask = torch.zeros(30, 30, 30)
    mask[0, 0, 0] = 1
    with pytest.raises(InputError, match="the same everywhere"):
        prepare(density(30), 1.0, 1.0, 2.0, "beside", mask=mask)
    with pytest.raises(InputError, match="the same everywhere"):
        prepare(density(30), 1.0, 1.0, 2.0, "no mask", mask=torch.zeros(30, 30, 30))


def test_diameter_of_what_is_known() -> None:
    """Ball: 98 % of its volume. Gaussian: r² of its square is a sum of three squares of normal numbers."""
    from scipy.stats import chi2

    assert diameter(ball(50, (15.0,) * 3), 3.0) == pytest.approx(3 * 30 * 0.98 ** (1 / 3), abs=3)
    line = torch.arange(40) - 20
    gaussian = torch.exp(-(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) / (2 * 4.0**2))
    assert diameter(gaussian, 1.0) == pytest.approx(2 * 4 * math.sqrt(chi2.ppf(0.98, 3) / 2), abs=0.8)


def test_width_of_what_is_known() -> None:
    """Ball and ellipsoid: the shortest axis; a thin shell's moments are those of a ball √(5/3) times as wide."""
    assert width(ball(40, (12.0,) * 3), 2.0) == pytest.approx(48, rel=0.02)
    assert width(ball(40, (15.0, 6.0, 10.0)), 2.0) == pytest.approx(24, rel=0.02)
    shell = ball(44, (14.0,) * 3) - ball(44, (13.0,) * 3)
    assert width(shell, 1.0) == pytest.approx(27 * math.sqrt(5 / 3), rel=0.02)
    turned = affine_transform(
        ball(40, (15.0, 6.0, 10.0)).numpy(), pose(20, 50, 80), 20 - pose(20, 50, 80) @ np.full(3, 20)
    )
    assert width(torch.from_numpy(turned), 2.0) == pytest.approx(24, rel=0.04)
    moved = torch.roll(ball(40, (6.0,) * 3), (5, -4, 3), (0, 1, 2))
    assert width(moved, 1.0) == pytest.approx(12, rel=0.02)  # about its own centre


def test_radial_mean() -> None:
    """Of a round map it is the map; of any it is round, and the same mean on each shell."""
    line = torch.arange(20) - 10
    r = torch.sqrt((line[:, None, None] ** 2 + line[:, None] ** 2 + line**2).double())
    round_ = (1 + 0.1 * r).float()  # linear between shells is exact
    torch.testing.assert_close(radial_mean(round_)[2:-2, 2:-2, 2:-2], round_[2:-2, 2:-2, 2:-2], atol=0.03, rtol=0)
    mean = radial_mean(density(20))
    for radius in (3.0, 5.0, 6.0):
        same = mean[(r - radius).abs() < 1e-6]
        assert len(same) > 5 and float(same.std()) < 1e-6
    assert float(mean.sum()) == pytest.approx(float(density(20).sum()), rel=0.02)


def shells(values: torch.Tensor) -> np.ndarray:
    """Power of each shell of a cube, over its full transform."""
    n = len(values)
    k = np.fft.fftfreq(n, 1 / n)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int)
    return np.bincount(shell.ravel(), (np.abs(np.fft.fftn(values.numpy())) ** 2).ravel())


@pytest.mark.parametrize("keep_shape", [False, True])
def test_decoys_have_the_spectrum_and_the_mask(keep_shape: bool) -> None:
    """In so small a box the shells of what is kept and of what is drawn aren't quite independent: 20 %."""
    template = wanted()
    found = decoy(template, 3, keep_shape)
    assert (found.box, found.pixel_size, found.resolution) == (template.box, template.pixel_size, template.resolution)
    own, theirs = shells(template.density), shells(found.density)
    strong = own > 0.02 * own.max()
    assert strong.sum() > 5
    np.testing.assert_allclose(theirs[strong], own[strong], rtol=0.2 if keep_shape else 0.1)
    outside = template.mask < 1e-3
    assert float((found.density[outside] ** 2).sum()) < 0.02 * float((found.density**2).sum())


def test_decoys_are_different_and_reproducible() -> None:
    """From the template, from each other; the same seed gives the same."""
    template = wanted()

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    first, again, second = (decoy(template, seed, False).density for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert abs(alike(first, second)) < 0.5 and abs(alike(first, template.density)) < 0.5
    # over many, none in the mean: there are some 30 independent numbers in so small a map
    assert abs(np.mean([alike(decoy(template, s, False).density, template.density) for s in range(40)])) < 0.1


def test_shape_that_is_kept_is_the_radial_mean() -> None:
    """And nothing else: the rest is drawn."""
    template = wanted()
    core = radial_mean(template.density)
    found = radial_mean(decoy(template, 5, True).density)
    assert float((found - core).norm()) < 0.2 * float(core.norm())
    free = radial_mean(decoy(template, 5, False).density)
    assert float((free - core).norm()) > 0.3 * float(core.norm())
    rest = decoy(template, 5, True).density - core
    own = template.density - core
    assert abs(float((rest * own).sum() / (rest.norm() * own.norm()))) < 0.5


@pytest.mark.parametrize("group", ["c3", "d2", "o"])
def test_decoys_have_the_symmetry(group: str) -> None:
    """And not by being round."""
    values = symmetrise(density(26), group)
    template = prepare(values, PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs", symmetry=group)
    found = decoy(template, 7, False).density
    for matrix in symmetry_matrices(group):
        turned = of_map(found).rotated(matrix[None])[0].permute(2, 1, 0)
        assert float((turned - found).norm()) < 0.1 * float(found.norm())
    assert float((radial_mean(found) - found).norm()) > 0.5 * float(found.norm())


def test_many_rotations_at_a_time_are_each() -> None:
    template, rotations = wanted(), random_rotations(5, torch.Generator().manual_seed(0))
    many = template.rotated(rotations)
    for i in range(5):
        torch.testing.assert_close(many[i], template.rotated(rotations[i : i + 1])[0])
