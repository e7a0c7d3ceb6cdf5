"""Poses of picks refined on the tilt images: back to the truth from where a search leaves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from libemc import records
from libemc.methods.match import poses
from libemc.methods.match.poses import Sampling
from libemc.numerics.rotations import matrix_from_euler, matrix_from_rotvec, rotation_distance
from tests.by_hand import PIXEL, HandSeries, blobs_map

TILTS = (-48.0, -32.0, -16.0, 0.0, 16.0, 32.0, 48.0)
SEARCH = 14.0  # Å
DIAMETER = 44.0
MEMORY = 1 << 28


@pytest.fixture(scope="module")
def series() -> tuple[HandSeries, np.ndarray]:
    hand = HandSeries(tilts=TILTS, noise=0.5, particles=6, unused=(2,))
    return hand, hand.stack()


def refine(hand: HandSeries, stack: np.ndarray, folder: Path, xyz: torch.Tensor, rotation: torch.Tensor):
    hand.write(folder, stack)
    record = records.load_tiltseries(folder / f"info/{hand.name}_info.json")
    sampling = Sampling.of(PIXEL, SEARCH, DIAMETER)
    density = torch.from_numpy(blobs_map(sampling.box, PIXEL * sampling.binning))
    return poses.refined(record, stack, xyz, rotation, density, sampling, SEARCH, MEMORY)


def truth(hand: HandSeries) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.from_numpy(hand.angles)
    return torch.from_numpy(hand.positions), matrix_from_euler(angles[:, 0], angles[:, 1], angles[:, 2])


def moved(hand: HandSeries, angstroms: float, degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The truth, each particle moved and turned about some axis."""
    generator = torch.Generator().manual_seed(1)
    aside, axes = torch.randn(2, hand.particles, 3, generator=generator).double()
    xyz, rotation = truth(hand)
    unit = [v / v.norm(dim=1, keepdim=True) for v in (aside, axes)]
    return xyz + angstroms * unit[0], matrix_from_rotvec(degrees * unit[1]) @ rotation


@pytest.mark.parametrize("contrast", ["dark", "bright"])
def test_poses_come_back(contrast: str, series: tuple[HandSeries, np.ndarray], project: Path) -> None:
    """From 3 Å and 6 degrees off to half an Å and a degree and a half: the particles are 44 Å across."""
    hand, stack = series
    if contrast == "bright":
        hand, stack = replace(hand, contrast="bright"), 200 - stack
    xyz, rotation = moved(hand, 3.0, 6.0)
    at, turned, score = refine(hand, stack, project, xyz, rotation)
    true_xyz, true_rotation = truth(hand)
    assert float((at - true_xyz).norm(dim=1).median()) < 0.5
    assert float(rotation_distance(turned, true_rotation).median()) < 1.5
    assert float((at - true_xyz).norm(dim=1).max()) < 1.5
    assert bool((score > 10).all())


def test_the_score_is_in_units_of_the_noise(series: tuple[HandSeries, np.ndarray], project: Path) -> None:
    """⟨image, prediction⟩ / |prediction|: with twice the noise half of it."""
    hand, stack = series
    xyz, rotation = truth(hand)
    more = np.random.default_rng(9).normal(size=stack.shape).astype(np.float32)
    score, weaker = (refine(hand, stack + noise * more, project, xyz, rotation)[2] for noise in (4.0, 8.0))
    # a patch's signal counts as noise too, the more the less there is of it
    assert 0.45 < float((weaker / score).median()) < 0.7
    stack = stack + 4 * more
    # at places where nothing is, the score is a normal number, and what the fit gains, of the neighbours too
    away = xyz + torch.tensor([0.0, 0.0, 60.0])
    nothing = refine(hand, stack, project, away, rotation)[2]
    assert float(nothing.abs().median()) < 0.5 * float(score.median())


def test_none_moves_far(series: tuple[HandSeries, np.ndarray], project: Path) -> None:
    """At most half of the search's resolution, wherever the neighbours are."""
    hand, stack = series
    xyz, rotation = moved(hand, 15.0, 30.0)
    at, _, _ = refine(hand, stack, project, xyz, rotation)
    # the limit holds for the shift that images show; a shift along their mean beam is seen by the tilted ones only
    assert float((at - xyz).norm(dim=1).max()) < poses.FARTHEST * SEARCH * 1.05


def test_what_no_image_shows_stays(series: tuple[HandSeries, np.ndarray], project: Path) -> None:
    """In its place, without a score; the others are refined."""
    hand, stack = series
    xyz, rotation = moved(hand, 2.0, 3.0)
    xyz[2] = torch.tensor([5000.0, 0.0, 0.0])
    at, turned, score = refine(hand, stack, project, xyz, rotation)
    assert torch.equal(at[2], xyz[2]) and torch.equal(turned[2], rotation[2]) and bool(score[2].isnan())
    others = [0, 1, 3, 4, 5]
    assert bool(score[others].isfinite().all()) and bool((at[others] != xyz[others]).any(dim=1).all())
    nobody = refine(hand, stack, project, xyz[2:3], rotation[2:3])
    assert torch.equal(nobody[0], xyz[2:3]) and bool(nobody[2].isnan().all())
    none = refine(hand, stack, project, xyz[:0], rotation[:0])
    assert len(none[0]) == len(none[2]) == 0


def test_arguments_are_left_as_they_are(series: tuple[HandSeries, np.ndarray], project: Path) -> None:
    hand, stack = series
    xyz, rotation = moved(hand, 2.0, 3.0)
    copies = xyz.clone(), rotation.clone()
    refine(hand, stack, project, xyz, rotation)
    assert torch.equal(xyz, copies[0]) and torch.equal(rotation, copies[1])


def test_how_the_images_are_cut() -> None:
    """Finer than the search by 1.7, but no finer than the pixels are; a box of 1.25 diameters, even."""
    sampling = Sampling.of(2.0, 34.0, 250.0)
    assert sampling.resolution == pytest.approx(20.0)
    assert sampling.binning == 4  # 20 Å / 2.2 / 2 Å
    assert sampling.box % 2 == 0 and 250 * 1.25 <= sampling.box * 8.0 < 250 * 1.25 + 16
    assert Sampling.of(10.0, 20.0, 250.0).resolution == pytest.approx(22.0)
    assert Sampling.of(10.0, 20.0, 250.0).binning == 1
    assert Sampling.of(10.0, 20.0, 30.0).box == 16
