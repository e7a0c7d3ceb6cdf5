"""The built-in particle: its formula against direct sums, its geometry against proteins, its symmetry against the groups."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import phantom
from libemc.methods.phantom import Particle
from libemc.numerics import fourier, grids, slices
from libemc.numerics.rotations import matrix_from_euler, random_rotations
from libemc.numerics.so3 import rotation_grid
from libemc.numerics.symmetry import symmetry_matrices


@functools.lru_cache(maxsize=8)
def made(name: str = "emc", symmetry: str = "c1") -> Particle:
    return phantom.particle(name, symmetry)


@functools.lru_cache(maxsize=8)
def mapped(name: str, symmetry: str, box: int, pixel_size: float) -> Tensor:
    return phantom.density(made(name, symmetry), box, pixel_size)


def residues(atoms: Particle) -> tuple[np.ndarray, np.ndarray]:
    """Backbones and side chains."""
    n = len(atoms.weights) // 3
    return atoms.positions[:n], atoms.positions[n : 2 * n]


@pytest.mark.parametrize(("box", "pixel_size"), [(64, 5.0), (63, 5.1)])
def test_map_is_the_exact_transform_within_its_band(box: int, pixel_size: float) -> None:
    """The DFT of the samples, times the voxel's volume, is the closed-form transform: nothing aliases, nothing is lost."""
    spectrum = fourier.rfftn_centred(mapped("emc", "c1", box, pixel_size).double(), 3) * pixel_size**3
    generator = torch.Generator().manual_seed(1)
    limit = (box - 1) // 2
    k = torch.randint(-limit, limit + 1, (60, 3), generator=generator)
    k[:, 0] = k[:, 0].abs()
    got = spectrum[k[:, 2], k[:, 1], k[:, 0]]
    exact = phantom.spectrum(made(), k / (box * pixel_size))
    # float32 sums of 1e4 atoms, Gaussians cut at five widths (4e-6) and aliases of 3e-6, against the transform's rms
    assert (got - exact).abs().max() < 2e-3 * exact.abs().pow(2).mean().sqrt()


def test_projection_without_a_map_is_the_slice_of_the_map() -> None:
    """Two routes: Gaussians projected in closed form, and the central slice of the map's transform."""
    generator = torch.Generator().manual_seed(2)
    rotations = random_rotations(3, generator)
    direct = phantom.projection(made(), rotations, 64, 5.0)
    sliced = slices.project(mapped("emc", "c1", 64, 5.0), rotations) * 5.0
    # the route by slices leaves out the corners of the band: they are taken from both
    inside = grids.rfft_radius((64, 64)) < 0.49
    a, b = (fourier.rfftn_centred(x, 2)[:, inside] for x in (direct, sliced))
    # the interpolation of the slices is the limit: 1.3 % of the spectrum's rms, whatever the padding
    assert (a - b).abs().pow(2).mean().sqrt() < 0.02 * a.abs().pow(2).mean().sqrt()


def test_units_and_extent() -> None:
    atoms = made()
    total = float(mapped("emc", "c1", 64, 5.0).double().sum()) * 5.0**3
    assert total == pytest.approx(atoms.weights.sum(), rel=1e-4)
    n = len(atoms.weights) // 3
    # the volume of a residue times the contrast of protein in ice, by construction; side chains are 0.5 on average
    assert total / n == pytest.approx(134.0 * 2.2, rel=0.02)
    assert 235 < atoms.diameter < 265
    assert 0.8e6 < n * 110 < 1.5e6


def test_helices_are_right_handed_with_3_6_residues_a_turn() -> None:
    """Measured on the longest row, as a crystallographer would: rise, turn and hand from four consecutive backbones."""
    inner, _ = phantom._row(30.0, 0.0)
    axis = inner[:13]
    chord = axis[1:] - axis[:-1]
    u, v, w = chord[:-2], chord[1:-1], chord[2:]
    dihedral = np.degrees(
        np.arctan2(
            np.einsum("ij,ij->i", np.linalg.norm(v, axis=1, keepdims=True) * u, np.cross(v, w)),
            np.einsum("ij,ij->i", np.cross(u, v), np.cross(v, w)),
        )
    )
    assert (dihedral > 0).all()  # right-handed
    assert np.allclose(np.diff(axis[:, 2]), 1.5)
    turns = np.degrees(np.unwrap(np.arctan2(axis[:, 1], axis[:, 0])))
    assert np.allclose(np.diff(turns), 100.0)


def test_residues_are_packed_like_protein() -> None:
    """Neither lattice nor clash: distances of backbones, and side chains that mark a direction."""
    inner, outer = residues(made())
    tree = cKDTree(inner)
    nearest = tree.query(inner, k=2)[0][:, 1]
    assert np.percentile(nearest, 1) > 1.0 and 2.0 < np.median(nearest) < 5.0
    reach = np.linalg.norm(outer - inner, axis=1)
    assert 2.5 < np.median(reach) < 3.7
    # residues in a ball of 15 Å inside a domain fill it
    counts = np.sort([len(i) for i in tree.query_ball_point(inner[::50], 15.0)])
    assert counts[-1] < 1.4 * 4 / 3 * math.pi * 15**3 / 134.0


def test_power_spectrum_is_a_proteins() -> None:
    """A steep fall at low resolution, a shoulder at 10 Å where helices lie side by side, and signal left at 6 Å."""
    box, pixel_size = 150, 2.0
    power = fourier.rfftn_centred(mapped("emc", "c1", box, pixel_size), 3).abs().square().double()
    k = grids.rfft_radius((box,) * 3) / pixel_size

    def mean(low: float, high: float) -> float:
        return float(power[(k >= 1 / low) & (k < 1 / high)].mean())

    assert mean(200, 100) > 10 * mean(60, 40) > 100 * mean(17, 14)
    assert mean(11, 10) > mean(12, 11) and mean(11, 10) > mean(9, 8)
    assert mean(6.5, 5.5) > 0.25 * mean(11, 10)


@pytest.mark.parametrize("group", ["c3", "d7", "t", "o", "i"])
def test_symmetric_particles_have_their_group_and_no_more(group: str) -> None:
    atoms = made("emc", group)
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    k = k / k.norm(dim=1, keepdim=True) / torch.linspace(15, 40, 8)[:, None]
    here = phantom.spectrum(atoms, k)
    for g in symmetry_matrices(group)[1:4]:
        # an exact symmetry of the atoms: rounding of float64 only
        assert (phantom.spectrum(atoms, k @ g.T) - here).abs().max() < 1e-8 * here.abs().max()
    other = phantom.spectrum(atoms, k @ matrix_from_euler(0.0, 0.0, 45.0 if group != "o" else 30.0).T)
    assert (other - here).abs().max() > 0.1 * here.abs().max()
    mirrored = phantom.spectrum(atoms, k * torch.tensor([-1.0, 1.0, 1.0]))
    assert (mirrored - here).abs().max() > 0.05 * here.abs().max()
    assert 220 < atoms.diameter < 275


def test_it_is_chiral_at_low_resolution() -> None:
    """Hands can be told between 100 and 35 Å: no rotation of a search brings the mirror image onto it."""
    inner, _ = residues(made())
    few = inner[::100]
    coarse = dataclasses.replace(made(), positions=few, weights=np.ones(len(few)), widths=np.full(len(few), 8.0))
    generator = torch.Generator().manual_seed(4)
    k = torch.randn(60, 3, dtype=torch.float64, generator=generator)
    k = k / k.norm(dim=1, keepdim=True) * torch.linspace(0.01, 0.028, 60, dtype=torch.float64)[:, None]
    here = phantom.spectrum(coarse, k)
    best = []
    for hand in (1.0, -1.0):
        turned = torch.einsum("gij,kj->gki", rotation_grid(25.0), k * torch.tensor([hand, 1.0, 1.0])).reshape(-1, 3)
        values = phantom.spectrum(coarse, turned).reshape(-1, 60)
        best.append(float(((values.conj() * here).real.sum(1) / values.norm(dim=1)).max() / here.norm()))
    assert best[0] > best[1] + 0.1, best


def test_variants_differ_where_they_should_and_only_there() -> None:
    whole = mapped("emc", "c1", 54, 6.0)
    for name in phantom.VARIANTS[1:]:
        other = mapped(name, "c1", 54, 6.0)
        changed = float((other - whole).square().sum() / whole.square().sum())
        assert 0.002 < changed < 0.6, name
        kept = set(map(tuple, made(name).positions.round(6))) & set(map(tuple, made().positions.round(6)))
        assert len(kept) > 0.75 * len(made().positions), name
    assert len(made("emc-turned").weights) == len(made().weights)
    assert len(made("emc-nohead").weights) < 0.9 * len(made().weights)


def test_the_formula_is_frozen() -> None:
    """Demos and truths made before must stay what they are: a change here is a new particle, and is to be announced.

    Recipe: the count of residues, and the mean and the mean square of the coordinates, of `phantom.particle("emc")`.
    """
    inner, outer = residues(made())
    got = [len(inner), *inner.mean(0), *(inner**2).mean(0), *(outer**2).mean(0)]
    assert np.allclose(got, FROZEN, atol=1e-3), [round(float(x), 4) for x in got]


FROZEN = [9915.0, -0.0, 0.0, 0.0, 1352.771, 1152.709, 2097.532, 1358.089, 1158.364, 2102.201]  # Å, Å²


def test_refuses_what_it_cannot_make() -> None:
    with pytest.raises(InputError, match="no built-in particle 'ribo'; there are emc"):
        phantom.particle("ribo")
    with pytest.raises(InputError, match="unknown symmetry"):
        phantom.particle("emc", "q3")
    with pytest.raises(InputError, match="smaller than the particle"):
        phantom.density(made(), 40, 6.0)
