"""symmetry: group axioms, scipy's and RELION's groups, and averaging about n//2."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation

from libemc.errors import InputError
from libemc.numerics import symmetry
from libemc.numerics.grids import centred_coordinates
from libemc.numerics.symmetry import symmetrise, symmetry_matrices

ORDERS = {
    "c1": 1,
    "c2": 2,
    "c7": 7,
    "c13": 13,
    "d1": 2,
    "d2": 4,
    "d7": 14,
    "t": 12,
    "o": 24,
    "i": 60,
    "i1": 60,
    "i2": 60,
}


def same_set(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Each matrix of one set is a matrix of the other."""
    distance = np.abs(a[:, None] - b[None]).max(axis=(2, 3))
    return len(a) == len(b) and distance.min(axis=0).max() < tolerance and distance.min(axis=1).max() < tolerance


def blobs(shape: tuple[int, ...], centres: np.ndarray, sigma: float = 1.5) -> torch.Tensor:
    """Gaussians at (x, y, z) px from the origin n//2, with heights 1, 2, 3, ..."""
    z, y, x = centred_coordinates(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    for height, (cx, cy, cz) in enumerate(centres, start=1):
        total += height * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * sigma**2))
    return total


@pytest.mark.parametrize("name", ORDERS)
def test_group_axioms(name: str) -> None:
    group = symmetry_matrices(name).numpy()
    assert len(group) == ORDERS[name]
    assert np.array_equal(group[0], np.eye(3))
    assert np.allclose(group @ group.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(group), 1)
    for g in group:  # closed, and no element twice
        assert same_set(group @ g, group, 1e-10)
    assert len(np.unique(group.round(6), axis=0)) == len(group)


@pytest.mark.parametrize(("name", "scipys"), [("c5", "C5"), ("d7", "D7"), ("o", "O"), ("i1", "I"), ("i2", "I")])
def test_groups_against_scipy(name: str, scipys: str) -> None:
    theirs = Rotation.create_group(scipys).as_matrix()
    ours = symmetry_matrices(name).numpy()
    quarter = Rotation.from_euler("z", 90, degrees=True).as_matrix()  # the two icosahedral settings differ by this
    assert same_set(ours, theirs, 1e-10) or same_set(ours, quarter @ theirs @ quarter.T, 1e-10)


def test_the_two_icosahedral_settings_differ_by_a_quarter_turn() -> None:
    quarter = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    i1, i2 = symmetry_matrices("i1").numpy(), symmetry_matrices("i2").numpy()
    assert not same_set(i1, i2, 0.1)
    assert same_set(i1, quarter @ i2 @ quarter.T, 1e-10)
    assert same_set(i1, symmetry_matrices("I").numpy(), 1e-15)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["c1", "c2", "c7", "d2", "d7", "t", "o", "i1", "i2"])
def test_groups_are_relions(name: str) -> None:
    relion = shutil.which("relion_refine")
    if relion is None:
        pytest.skip("relion_refine is not installed")
    text = subprocess.run([relion, "--sym", name, "--print_symmetry_ops"], capture_output=True, text=True).stdout
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    theirs = re.findall(r"R\(\d+\)=\s+" + r"\s+".join([number] * 9), text)
    assert len(theirs) == ORDERS[name]
    # RELION takes its axes from rounded constants, and prints five digits
    assert same_set(symmetry_matrices(name).numpy(), np.array(theirs, float).reshape(-1, 3, 3), 2e-5)


@pytest.mark.parametrize("name", ["x", "c0", "c", "d", "c-1", "c1000", "i4", "", "c2 c3"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown symmetry"):
        symmetry_matrices(name)


def test_names_may_be_upper_case_and_groups_are_copies() -> None:
    symmetry_matrices("D2")[:] = 0
    assert float(symmetry_matrices("d2").abs().sum()) == pytest.approx(12)


@pytest.mark.parametrize("n", [24, 25])
@pytest.mark.parametrize("name", ["c3", "d2", "o", "i"])
def test_symmetrise_moves_blobs_to_their_equivalents(n: int, name: str) -> None:
    """The average of Gaussians over a group is the sum of Gaussians at all equivalent places, about n//2."""
    group = symmetry_matrices(name).numpy()
    centres = np.array([[5.0, 2.0, 1.0], [-3.0, 4.0, 2.5]])
    expected = sum(blobs((n, n, n), centres @ g.T) for g in group) / len(group)
    ours = symmetrise(blobs((n, n, n), centres), name)
    # cubic B-splines at sigma = 1.5 px err by 1.0e-3 of the highest blob (2); a linear kernel would by 0.1
    assert float((ours - expected).abs().max()) < 3e-3


@pytest.mark.parametrize("n", [10, 11])
def test_quarter_turns_are_exact_even_for_noise(n: int) -> None:
    noise = torch.randn(n, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = symmetrise(noise, "c4")
    z, y, x = np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")
    total, count = np.zeros((n, n, n)), np.zeros((n, n, n))
    for cx, cy in ((x, y), (-y, x), (-x, -y), (y, -x)):
        inside = (abs(cx + 0.5) <= n / 2) & (abs(cy + 0.5) <= n / 2) if n % 2 == 0 else np.ones_like(x, bool)
        pick = tuple(np.clip(c + n // 2, 0, n - 1) for c in (z, cy, cx))
        total += np.where(inside, noise.numpy()[pick], 0)
        count += inside
    assert np.allclose(turned.numpy(), total / count, atol=1e-11)
    assert np.allclose(symmetrise(turned, "c4").numpy(), turned.numpy(), atol=1e-11)


def test_interpolation_is_scipys_cubic_spline() -> None:
    """One rotation by 120 degrees, against ndimage with the same (periodic) spline."""
    noise = torch.randn(12, 13, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, y, x = (c.numpy() for c in centred_coordinates(noise.shape))
    total, count = noise.numpy().copy(), np.ones(noise.shape)
    for g in symmetry_matrices("c3").numpy()[1:]:
        points = np.einsum("ij,jzyx->izyx", g, np.stack(np.broadcast_arrays(x, y, z)))
        index = points[::-1] + (np.array(noise.shape) // 2)[:, None, None, None]
        inside = np.all((index > -1e-6) & (index < np.array(noise.shape)[:, None, None, None] - 1 + 1e-6), axis=0)
        total += np.where(inside, ndimage.map_coordinates(noise.numpy(), index, order=3, mode="grid-wrap"), 0)
        count += inside
    assert np.allclose(symmetrise(noise, "c3").numpy(), total / count, atol=1e-10)


def test_compiled_and_portable_routes_agree() -> None:
    noise = torch.randn(8, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = F.pad(symmetry._spline_coefficients(noise)[None, None], (2,) * 6, mode="circular")[0, 0]
    portable = symmetry._average_portable(padded, noise.shape, symmetry_matrices("i"))
    assert torch.allclose(symmetrise(noise, "i"), portable, atol=1e-11)  # float64 rounding


def test_symmetrise_keeps_a_constant_and_the_type() -> None:
    ones = torch.ones(9, 8, 10)
    out = symmetrise(ones, "i")
    assert out.dtype == torch.float32 and torch.allclose(out, ones, atol=1e-5)  # float32 rounding through the spline
    assert out is not ones and torch.equal(symmetrise(ones, "c1"), ones)
