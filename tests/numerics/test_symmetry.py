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
from libemc.numerics import fourier, symmetry
from libemc.numerics.grids import centred_coordinates
from libemc.numerics.rotations import matrix_from_euler
from libemc.numerics.slices import project
from libemc.numerics.symmetry import (
    HELIX_SHARE,
    axial_repeat,
    helix,
    is_helical,
    operators,
    point_group,
    symmetrise,
    symmetry_matrices,
)

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
    portable = symmetry._average_portable(padded, noise.shape, *operators("i"), torch.inf)
    assert torch.allclose(symmetrise(noise, "i"), portable, atol=1e-11)  # float64 rounding


def test_symmetrise_keeps_a_constant_and_the_type() -> None:
    ones = torch.ones(9, 8, 10)
    out = symmetrise(ones, "i")
    assert out.dtype == torch.float32 and torch.allclose(out, ones, atol=1e-5)  # float32 rounding through the spline
    assert out is not ones and torch.equal(symmetrise(ones, "c1"), ones)


# ----------------------------------------------------------------------------------------------------------- helices

ATOMS = np.array([[7.0, 1.0, 0.5], [4.0, -2.0, -1.0], [9.0, 3.0, 2.0]])
"""A subunit without symmetry, Å."""


def helical_atoms(rise: float, twist: float, of: str = "c1", copies: range = range(-40, 41)) -> np.ndarray:
    """The subunit at every place of a helix, by scipy's rotations: (copies, group, 3, 3) x, y, z in Å."""
    group = symmetry_matrices(of).numpy()
    screws = Rotation.from_euler("z", [[k * twist] for k in copies], degrees=True).as_matrix().reshape(-1, 3, 3)
    moved = np.einsum("kij,gjl,al->kgai", screws, group, ATOMS)
    return moved + np.array([0, 0, rise]) * np.array(copies)[:, None, None, None]


def density_of(atoms: np.ndarray, box: int, pixel_size: float, sigma: float = 3.0) -> torch.Tensor:
    """Gaussians, heights 1, 2, 3 over the subunit's atoms."""
    axis = (np.arange(box) - box // 2) * pixel_size
    lines = [np.exp(-((axis - c[..., None]) ** 2) / (2 * sigma**2)) for c in np.moveaxis(atoms, -1, 0)]
    heights = np.broadcast_to(np.arange(1.0, len(ATOMS) + 1), atoms.shape[:-1])
    x, y, z = (line.reshape(-1, box) for line in lines)
    return torch.from_numpy(np.einsum("az,ay,ax,a->zyx", z, y, x, heights.ravel(), optimize=True))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


def test_names_of_helices() -> None:
    one = helix("Helix:27.3, -166.7")
    assert (one.rise, one.twist, one.point_group, one.copies) == (27.3, -166.7, "c1", None)
    assert helix("helix:9.4,332.3,n=13").twist == pytest.approx(-27.7)  # whole turns are none
    assert helix("helix:8,30,d6").point_group == "d6"
    for name in ("helix:27.3,-166.7", "helix:9.4,-27.7,n=13", "helix:8,30.5,c6", "helix:8,30.5,c6,n=3"):
        assert helix(name).name == name
    assert is_helical("HELIX:1,2") and not is_helical("c7")
    assert point_group("helix:8,30,c6") == "c6" and point_group("helix:8,30") == "c1" and point_group("D7") == "d7"
    assert axial_repeat("helix:8,30,c6") == 8 and axial_repeat("c7") is None
    assert axial_repeat("helix:9.4,-27.7,n=13") is None


@pytest.mark.parametrize(
    "name",
    [
        "helix:",
        "helix:5",
        "helix:0,30",
        "helix:-5,30",
        "helix:5,30,t",
        "helix:5,30,n=0",
        "helix:5,30,d2,n=3",
        "helix5,3",
    ],
)
def test_wrong_helices_are_refused(name: str) -> None:
    for function in (operators, point_group, axial_repeat, lambda text: operators(text, 100.0)):
        with pytest.raises(InputError, match=r"helix|unknown symmetry"):
            function(name)


@pytest.mark.parametrize(("name", "count"), [("helix:10,40", 7), ("helix:10,40,c3", 21), ("helix:10,40,d2", 28),
                                             ("helix:10,40,n=4", 4), ("helix:10,40,n=13", 7), ("d7", 14)])  # fmt: skip
def test_operators_move_a_quarter_of_the_box_at_most(name: str, count: int) -> None:
    """120 Å hold 30 / 10 copies to either side; each operator takes the atoms of a long helix onto atoms of it."""
    rotations, shifts = (t.numpy() for t in operators(name, 120.0))
    assert len(rotations) == len(shifts) == count
    assert np.array_equal(rotations[0], np.eye(3)) and not shifts[0].any()
    assert np.abs(shifts).max() <= HELIX_SHARE / 2 * 120 and np.allclose(np.linalg.det(rotations), 1)
    if is_helical(name):
        all_atoms = helical_atoms(10.0, 40.0, point_group(name)).reshape(-1, 3)
        for atom in ATOMS @ rotations.transpose(0, 2, 1) + shifts[:, None]:
            assert np.linalg.norm(atom[:, None] - all_atoms, axis=-1).min(axis=1).max() < 1e-9
        steps = sorted(set((shifts[:, 2] / 10).round().astype(int)))
        assert steps == ([-1, 0, 1, 2] if name.endswith("n=4") else list(range(-3, 4)))
    with pytest.raises(ValueError, match="box"):
        operators("helix:10,40")


def test_equivalent_poses_give_the_same_image() -> None:
    """Pose (R, x) and pose (R·S, x + R·t): projections of the map, which its ends, 30 px from the middle, don't reach."""
    pixel_size, box = 3.0, 64
    volume = density_of(helical_atoms(8.0, -50.0, "d1"), box, pixel_size)
    rotation = matrix_from_euler(25.0, 78.0, -40.0)
    middle = slice(box // 2 - 9, box // 2 + 10)
    wanted = project(volume, rotation[None])[0]
    for turn, shift in zip(*operators("helix:8,-50,d1", 0.4 * box * pixel_size), strict=True):
        image = project(volume, (rotation @ turn)[None])
        moved = fourier.fourier_shift(image, (rotation @ shift)[None, :2] / pixel_size)[0]
        # slices are exact to 1.5 % (tests of slices)
        assert float((moved - wanted)[middle, middle].abs().max()) < 0.015 * float(wanted.max())
        wrong = fourier.fourier_shift(image, -(rotation @ shift)[None, :2] / pixel_size)[0]
        assert not shift.any() or float((wrong - wanted)[middle, middle].abs().max()) > 0.05 * float(wanted.max())


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize("of", ["c1", "c3", "d2"])
def test_symmetrise_continues_a_helix_from_its_middle(box: int, of: str) -> None:
    """One subunit of a helix, alone in the box, becomes the whole helix, over the number of copies in the average."""
    pixel_size, rise = 3.0, 12.0
    one = density_of(ATOMS[None, None], box, pixel_size)
    made = symmetrise(one, f"helix:{rise},-65,{of}", pixel_size)
    wanted = density_of(helical_atoms(rise, -65.0, of), box, pixel_size)
    inside = np.hypot(*np.meshgrid(*[np.arange(box) - box // 2] * 2)) < box // 2 - 1  # a cylinder that stays in the box
    count = HELIX_SHARE * box * pixel_size / rise * len(symmetry_matrices(of))
    ratio = (made * wanted)[:, inside].sum() / (wanted[:, inside] ** 2).sum()
    # a place has a whole number of copies in the middle, one more or less than the mean of 5
    assert float(ratio) * count == pytest.approx(1, abs=0.05)
    assert correlation(made[:, inside], wanted[:, inside]) > 0.99
    other = symmetrise(one, f"helix:{rise},65,{of}", pixel_size)
    assert correlation(other[:, inside], wanted[:, inside]) < 0.9  # the other hand


def test_symmetrise_leaves_a_helix_as_it_is_and_keeps_a_constant() -> None:
    pixel_size = 3.0
    whole = density_of(helical_atoms(10.0, 75.0), 40, pixel_size)
    made = symmetrise(whole, "helix:10,75", pixel_size)
    inside = np.hypot(*np.meshgrid(*[np.arange(40) - 20] * 2)) < 19
    # σ = 1 px: cubic splines err by 3/(384 σ⁴) = 1 % per axis of the highest atom (3) and its overlapping neighbours
    assert float((made - whole)[:, inside].abs().max()) < 0.03 * float(whole.max())
    assert torch.allclose(symmetrise(torch.ones(24, 25, 26), "helix:7,20,c2", 2.0), torch.ones(24, 25, 26), atol=1e-5)
    with pytest.raises(ValueError, match="pixel size"):
        symmetrise(whole, "helix:10,75")


def test_a_pseudo_helix_averages_its_copies_alone() -> None:
    """A ring of 13 with a seam: copies -6 ... 6 of a subunit, as of a microtubule; the mean over n=13 has at copy k those
    of the 13 that are there, (13 - |k|) / 13."""
    rise, twist, pixel_size, box = 9.4, -27.7, 4.0, 64
    copies = range(-6, 7)
    ring = helical_atoms(rise, twist, "c1", copies)[:, :, :1] * np.array([7.0, 7.0, 1.0])
    shape = np.ones((13, 1, 1))
    axis = [(np.arange(box) - box // 2) * pixel_size] * 3
    z, y, x = np.meshgrid(*axis, indexing="ij")

    def height_at(volume: torch.Tensor, atom: np.ndarray) -> float:
        near = (x - atom[0]) ** 2 + (y - atom[1]) ** 2 + (z - atom[2]) ** 2 < 7.0**2
        return float(volume.numpy()[near].max())

    lines = [np.exp(-((axis[0] - c.reshape(-1, 1)) ** 2) / (2 * 8.0**2)) for c in np.moveaxis(ring, -1, 0)]
    volume = torch.from_numpy(np.einsum("az,ay,ax,a->zyx", lines[2], lines[1], lines[0], shape.ravel()))
    made = symmetrise(volume, f"helix:{rise},{twist},n=13", pixel_size)
    before = [height_at(volume, ring[k + 6, 0, 0]) for k in copies]
    after = [height_at(made, ring[k + 6, 0, 0]) for k in copies]
    wanted = [(13 - abs(k)) / 13 for k in copies]
    assert np.allclose(np.array(after) / before, wanted, atol=0.08)  # neighbours overlap, peaks fall between voxels
