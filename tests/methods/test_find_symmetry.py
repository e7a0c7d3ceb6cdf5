"""find_symmetry: groups of built-in particles, turned, off centre and noisy, against how they were made."""

from __future__ import annotations

import json

import pytest
import torch

from libemc.errors import InputError
from libemc.methods import phantom
from libemc.methods.find_symmetry import GROUPS, GroupScore, _Shells, find_symmetry, onto_axes
from libemc.methods.postprocess import place
from libemc.numerics import harmonics
from libemc.numerics.filters import lowpass
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetrise, symmetry_matrices

PIXEL_SIZE = 10.0
RESOLUTION = 30.0


def made(name: str, seed: int, box: int = 36, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halves (2, n, n, n) of a built-in particle, turned and up to 10 Å off, its rotation, and its shift in Å."""
    generator = torch.Generator().manual_seed(seed)
    rotation, other = random_rotations(2, generator)
    shift = 10.0 * other[0]
    volume = phantom.density(phantom.particle("emc", name), box, PIXEL_SIZE)
    moved = place(volume, rotation, (shift / PIXEL_SIZE).tolist())
    deviation = noise * float(moved.std())
    return moved + deviation * torch.randn(2, *moved.shape, generator=generator), rotation, shift


def operator_error(found: GroupScore, rotation: torch.Tensor) -> float:
    """Degrees from the operators found to the nearest true ones, at most."""
    group = symmetry_matrices(found.group)
    ours, true = found.matrix @ group @ found.matrix.T, rotation @ group @ rotation.T
    return float(rotation_distance(ours[:, None], true[None]).amin(dim=1).max())


@pytest.mark.parametrize(
    ("name", "box", "rivals"),
    [("c3", 36, ("c2", "c6", "d3")), ("d2", 37, ("c2", "c4", "d4", "t")), ("t", 36, ("c3", "d2", "o", "i")),
     ("o", 37, ("c4", "d4", "t", "i")), ("i", 36, ("c5", "d5", "t", "o"))],
)  # fmt: skip
def test_a_noisy_map_has_its_own_group(name: str, box: int, rivals: tuple[str, ...]) -> None:
    """Even and odd boxes, noise of the signal's own power: the group, its rotation and its centre."""
    maps, rotation, shift = made(name, 3, box, noise=1.0)
    ranking = find_symmetry(maps, PIXEL_SIZE, RESOLUTION, (name, *rivals))
    assert ranking.chosen == name == ranking.scores[0].group
    best = ranking.of(name)
    assert best.worst > 0.85 and best.order == len(symmetry_matrices(name))
    assert all(s.worst < 0.6 for s in ranking.scores if s.order > best.order)
    assert operator_error(best, rotation) < 1.5  # a twentieth of the resolution at 125 Å is 0.7 degrees
    off = torch.tensor(best.shift, dtype=torch.float64) - shift
    if name[0] == "c":
        off = off - rotation[:, 2] * (rotation[:, 2] @ off)
    assert float(off.norm()) < RESOLUTION / 20
    back = onto_axes(maps.mean(dim=0), best, PIXEL_SIZE)
    clean, noisy = symmetrise(lowpass(back, PIXEL_SIZE, RESOLUTION), name), lowpass(back, PIXEL_SIZE, RESOLUTION)
    assert float(torch.corrcoef(torch.stack((clean.flatten(), noisy.flatten())))[0, 1]) > 0.9


def test_an_asymmetric_map_has_none() -> None:
    maps, _, _ = made("c1", 5, noise=1.0)
    ranking = find_symmetry(maps, PIXEL_SIZE, RESOLUTION)
    assert ranking.chosen == "c1" and not any(ranking.holds(s) for s in ranking.scores)
    assert {s.group for s in ranking.scores} == set(GROUPS)
    assert max(s.worst for s in ranking.scores) < 0.6
    single = find_symmetry(maps.mean(dim=0, keepdim=True), PIXEL_SIZE, RESOLUTION, ("c2", "c3", "d2", "t"))
    assert single.chosen == "c1"


def test_noise_has_none_and_says_that_nothing_can_be_told() -> None:
    noise = torch.randn(2, 36, 36, 36, generator=torch.Generator().manual_seed(1))
    ranking = find_symmetry(noise, PIXEL_SIZE, RESOLUTION, ("c2", "c7", "d7", "o"), radius=120.0)
    assert ranking.chosen == "c1"
    assert "can't be told" in ranking.text() and "holds" not in ranking.text()


def test_one_different_subunit_shows_in_the_scores() -> None:
    """C6 with one subunit lighter: every operator is worse than 1 by the difference, and better than one of another group."""
    whole = phantom.density(phantom.particle("emc", "c6"), 36, PIXEL_SIZE)
    y, x = torch.meshgrid(torch.arange(36) - 18, torch.arange(36) - 18, indexing="ij")
    sector = (torch.rad2deg(torch.atan2(y.double(), x.double())) % 360 < 60).to(whole)
    scores = {}
    for less in (0.0, 0.3):
        volume = place(whole * (1 - less * sector), random_rotations(1, torch.Generator().manual_seed(2))[0])
        scores[less] = find_symmetry(volume[None], PIXEL_SIZE, RESOLUTION, ("c6", "c5"))
    assert scores[0.0].chosen == "c6" and scores[0.0].of("c6").worst > 0.97
    # of subunits 1, 1, 1, 1, 1, 0.7 an operator correlates (4 + 2 · 0.7) / (5 + 0.7²) = 0.984
    assert scores[0.3].of("c5").worst < scores[0.3].of("c6").worst < scores[0.0].of("c6").worst - 0.01


def test_a_map_of_one_half_is_chosen_by_what_its_best_operators_give() -> None:
    maps, _, _ = made("c7", 4, noise=0.5)
    ranking = find_symmetry(maps.mean(dim=0, keepdim=True), PIXEL_SIZE, RESOLUTION, ("c7", "d7", "c2", "c8"))
    assert ranking.chosen == "c7" and ranking.expected < 1
    numbers = json.loads(json.dumps(ranking.table()))
    assert numbers["chosen"] == "c7" and numbers["groups"][0]["holds"] and len(numbers["groups"]) == 4


def test_power_about_axes_is_the_correlation_with_the_turned_map() -> None:
    """The table of one axis and angle against the same map turned in real space."""
    volume = phantom.density(phantom.particle("emc"), 36, PIXEL_SIZE)
    centre = torch.zeros(3, dtype=torch.float64)
    shells = _Shells.of(volume[None], centre, PIXEL_SIZE / 40.0, 125.0 / 40.0)
    power = shells.axis_power(centre).reshape(46, 180, -1)
    angle = 50.0
    for i, j in ((0, 0), (20, 33), (45, 120)):
        theta, phi = (torch.deg2rad(torch.tensor(2.0 * v, dtype=torch.float64)) for v in (i, j))
        axis = torch.stack((theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()))
        turned = _Shells.of(place(volume, matrix_from_rotvec(angle * axis))[None], centre, PIXEL_SIZE / 40, 125 / 40)
        wanted = sum(
            float(((a[0] * b[0].conj()).real.sum(dim=-1) * shells.weights).sum())
            for a, b in zip(shells.coefficients(centre)[1:], turned.coefficients(centre)[1:], strict=True)
        )
        m = torch.arange(power.shape[-1])
        cosine = torch.where(m == 0, 1.0, 2 * torch.cos(torch.deg2rad(m * angle)))
        # turning by cubic splines of 10 Å voxels costs some percent at 40 Å
        assert float(power[i, j] @ cosine) == pytest.approx(wanted, abs=0.05 * float(power[i, j].sum() * 2))
    assert shells.degree == len(harmonics.coefficients(shells.samples.real)) - 1


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="unknown symmetry"):
        find_symmetry(torch.ones(1, 8, 8, 8), 3.0, groups=("q2",))
    with pytest.raises(InputError, match="no point group"):
        find_symmetry(torch.ones(1, 8, 8, 9), 3.0)
    with pytest.raises(InputError, match="no density"):
        find_symmetry(torch.zeros(1, 16, 16, 16), 3.0)
