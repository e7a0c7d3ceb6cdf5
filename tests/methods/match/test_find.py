"""A whole search of a small specimen: what is there is found, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.match import find
from libemc.methods.match.candidates import Candidates, Shape
from libemc.methods.match.find import Maps, Picked, Search, Wanted, compete, parts, pick
from libemc.methods.match.significance import Background
from libemc.numerics.rotations import random_rotations, rotation_distance
from tests.methods.match.blob_specimen import BAND, DIAMETER, PIXEL_SIZE, RESOLUTION, Even, in_volume, wanted

EVEN = Even(BAND)
SHAPE = (34, 54, 58)
PLACES = [(14.3, 15.0, 16.2), (42.0, 20.6, 15.0), (24.0, 40.0, 18.4)]
TURNS = random_rotations(len(PLACES), torch.Generator().manual_seed(4))
HEIGHT = 3.0  # of the particles, in noise of variance 1
STEP = 24.0


def searched(volume: np.ndarray, asked: Wanted, cut: list | None = None) -> tuple[Search, Maps]:
    template = wanted()
    found = Search.of(template, DIAMETER, EVEN, asked)
    maps = Maps.empty(volume.shape)
    for part in cut or parts(volume.shape, template.box, math.inf, 1):
        maps.put(part, *found.part(volume, part, "cpu", None))
    return found, maps


def everywhere(places: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(places), dtype=torch.bool)


@pytest.fixture(scope="module")
def example() -> tuple[np.ndarray, Search, Maps, Wanted]:
    asked = Wanted(step=STEP)
    volume = EVEN.shown(HEIGHT * in_volume(SHAPE, PLACES, list(TURNS.numpy())), noise=1.0, seed=2)
    return volume, *searched(volume, asked), asked


@pytest.fixture(scope="module")
def picked(example) -> Picked:
    volume, found, maps, asked = example
    return pick(volume, maps, found, EVEN, asked, everywhere)


def test_all_are_found_and_no_others(picked: Picked) -> None:
    """Where they are, to a third of a voxel, and as they are turned, to two of the last grid's steps of 3 degrees."""
    kept = picked.candidates[picked.kept]
    assert len(kept) == len(PLACES)
    distance = torch.cdist(torch.tensor(PLACES, dtype=torch.float64), kept.xyz.double())
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert float(distance.amin(1).mean()) < 0.4 and float(distance.amin(1).max()) < 0.8
    errors = rotation_distance(kept.rotation[nearest], TURNS)
    assert float(errors.median()) < 6 and float(errors.max()) < 10


def test_what_is_left_is_the_model_of_chance(picked: Picked) -> None:
    """The other maxima are below all picks, and so many are above a height as the model says."""
    assert bool((picked.z.diff() <= 0).all())
    assert float(picked.z[picked.kept].min()) > picked.threshold
    assert len(picked.others) > 10 and float(picked.others.max()) < float(picked.z[picked.kept].min())
    assert float(picked.background.expected(torch.tensor(picked.threshold))) == pytest.approx(1.0)
    height = picked.background.start
    expected = float(picked.background.expected(torch.tensor(height)))
    assert 0.25 < (int((picked.others > height).sum()) + 1) / (expected + 1) < 4


def test_places_that_are_not_allowed_are_not_picked(example) -> None:
    volume, found, maps, asked = example
    left = pick(volume, maps, found, EVEN, asked, lambda places: places[:, 0] < 30)
    kept = left.candidates.xyz[left.kept]
    assert len(kept) == 2 and bool((kept[:, 0] < 30.5).all())
    assert bool((left.candidates.xyz[:, 0] < 31).all())
    nowhere = pick(volume, maps, found, EVEN, asked, lambda places: torch.zeros(len(places), dtype=torch.bool))
    assert len(nowhere.candidates) == 0 and int(nowhere.kept.sum()) == 0 and math.isfinite(nowhere.threshold)


def test_the_same_again_in_parts(example, picked: Picked) -> None:
    """Deterministic; and cut in parts it is the same but for rounding."""
    volume, found, maps, asked = example
    again = pick(volume, maps, found, EVEN, asked, everywhere)
    for name in ("xyz", "rotation", "score"):
        torch.testing.assert_close(getattr(again.candidates, name), getattr(picked.candidates, name), rtol=0, atol=0)
    assert again.threshold == picked.threshold and torch.equal(again.kept, picked.kept)
    middle = (17, 30, 30)
    cut = [
        find.Part((z[0], y[0], x[0]), (z[1], y[1], x[1]))
        for z in ((0, middle[0]), (middle[0], SHAPE[0]))
        for y in ((0, middle[1]), (middle[1], SHAPE[1]))
        for x in ((0, SHAPE[2]),)
    ]
    (_, whole), (_, in_parts) = (searched(volume, Wanted(step=60.0), how) for how in (None, cut))
    assert np.abs(in_parts.best - whole.best).max() < 0.1 * float(whole.best.std())
    assert np.abs(in_parts.squares / whole.squares - 1).max() < 0.1
    assert (in_parts.which == whole.which).mean() > 0.98


def test_nothing_is_found_in_noise() -> None:
    """One false pick is expected at most, by the threshold; with the shape's test hardly any."""
    shape = (30, 40, 44)
    counts = []
    for seed in range(2):
        volume = EVEN.shown(np.zeros(shape, np.float32), noise=1.0, seed=10 + seed)
        asked = Wanted(step=36.0, seed=seed)
        found, maps = searched(volume, asked)
        counts.append(int(pick(volume, maps, found, EVEN, asked, everywhere).kept.sum()))
    assert sum(counts) <= 2, counts


def test_decoys_are_fewer_and_their_seed_counts() -> None:
    one, two = (Search.of(wanted(), DIAMETER, EVEN, Wanted(step=STEP, seed=seed)) for seed in (0, 1))
    share = len(one.rotations) / one.decoy_rotations
    assert find.DECOY_SHARE <= share < 1.05 * find.DECOY_SHARE
    assert len(one.decoys) == find.DECOY_SEEDS
    assert float((one.decoys[0][0].density - two.decoys[0][0].density).abs().max()) > 0.01
    assert not torch.equal(one.decoys[0][1], one.decoys[1][1])
    torch.testing.assert_close(one.norms, EVEN.norms(one.template, one.rotations))


@pytest.mark.parametrize("seed", [0, 7])
def test_squares_are_those_of_the_decoys(seed: int) -> None:
    """In noise of variance 1 a decoy's score has variance 1: the norm is its deviation, and z is the score."""
    volume = EVEN.shown(np.zeros((30, 40, 44), np.float32), noise=1.0, seed=20 + seed)
    _, maps = searched(volume, Wanted(step=40.0, seed=seed))
    assert float(np.mean(maps.squares[9:-9, 9:-9, 9:-9])) == pytest.approx(1, rel=0.12)


# --------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("shape", [(20, 31, 47), (100, 90, 80), (8, 8, 8), (30, 200, 33)])
@pytest.mark.parametrize("memory", [math.inf, 30e6, 3e6, 1e5])
def test_parts_cover_the_volume_once(shape: tuple[int, int, int], memory: float) -> None:
    count = np.zeros(shape, int)
    cut = parts(shape, 16, memory, 2)
    for part in cut:
        count[tuple(slice(a, b) for a, b in zip(part.low, part.high, strict=True))] += 1
    assert (count == 1).all()
    most = memory / (find.BYTES_SHARED + 2 * find.BYTES_WORKER)
    sizes = [math.prod(part.padded(shape, 16)) for part in cut]
    if memory in (math.inf, 30e6):
        assert max(sizes) <= most
    assert memory < math.inf or len(cut) == 1


def test_parts_are_no_larger_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "LARGEST_PART", 2e5)
    cut = parts((100, 90, 80), 16, math.inf, 1)
    assert len(cut) > 4 and max(math.prod(p.padded((100, 90, 80), 16)) for p in cut) <= 2e5


def test_steps_and_distances() -> None:
    """Twice the Crowther angle; 0.9 of the shortest axis; or what is asked for."""
    template = wanted()
    rotations, step = Wanted().rotations(template, 60.0)
    assert step == pytest.approx(2 * math.degrees(RESOLUTION / 60)) and len(rotations) > 1000
    assert Wanted(step=30.0).rotations(template, 60.0)[1] == 30.0
    whole, quarter = (len(Wanted(step=20.0).rotations(replace(template, symmetry=s), 60.0)[0]) for s in ("c1", "c4"))
    assert quarter == pytest.approx(whole / 4, rel=0.05)
    assert Wanted(distance=12.0).apart(template) == pytest.approx(12.0 / PIXEL_SIZE)
    assert 4 < Wanted().apart(template) < 14  # of blobs within a radius of 7 voxels


# ------------------------------------------------------------------------------------------------------- competition


def of_list(xyz: list, score: list, kept: list | None = None, apart: float = 5.0) -> Picked:
    count = len(xyz)
    candidates = Candidates(
        torch.tensor(xyz, dtype=torch.float64).reshape(-1, 3),
        torch.eye(3).double().expand(count, 3, 3),
        torch.tensor(score, dtype=torch.float32),
    )
    keep = torch.ones(count, dtype=torch.bool) if kept is None else torch.tensor(kept)
    shape = Shape(torch.ones(count), 0.5, 2 * torch.ones(count), torch.zeros(count), 2.0)
    return Picked(candidates, torch.tensor(score), keep, torch.zeros(0), Background(1, 1, 1), 3.0, shape, apart)


def test_the_higher_of_two_at_a_place_stays() -> None:
    """Of three templates; margins to the best of the others, none where there's no other near."""
    a = of_list([[0, 0, 0], [50, 0, 0], [90, 0, 0]], [10.0, 6.0, 5.0])
    b = of_list([[3, 0, 0], [50, 4, 0]], [7.0, 8.0])
    c = of_list([[0, 0, 4], [52, 0, 0]], [9.0, 1.0])
    (kept_a, margin_a), (kept_b, margin_b), (kept_c, margin_c) = compete([a, b, c])
    assert kept_a.tolist() == [True, False, True]
    assert margin_a.tolist()[:2] == pytest.approx([1.0, -2.0]) and math.isnan(margin_a[2])
    assert kept_b.tolist() == [False, True] and margin_b.tolist() == pytest.approx([-3.0, 2.0])
    assert kept_c.tolist() == [False, False] and margin_c.tolist() == pytest.approx([-1.0, -7.0])


def test_what_was_no_pick_takes_no_other_away() -> None:
    """A candidate that failed its own test is none afterwards; the margin of the other template's pick tells of it."""
    a, b = of_list([[0, 0, 0]], [10.0], kept=[False]), of_list([[1, 0, 0]], [4.0])
    (kept_a, _), (kept_b, margin_b) = compete([a, b])
    assert not kept_a[0] and kept_b[0] and float(margin_b) == pytest.approx(-6)


def test_the_larger_distance_of_two_counts() -> None:
    a, b = of_list([[0, 0, 0]], [10.0], apart=3.0), of_list([[0, 8, 0]], [4.0], apart=9.0)
    assert [bool(kept) for kept, _ in compete([a, b])] == [True, False]
    b = replace(b, apart=7.0)
    assert [bool(kept) for kept, _ in compete([a, b])] == [True, True]


def test_one_template_alone_and_none_at_all() -> None:
    ((kept, margin),) = compete([of_list([[0, 0, 0], [1, 0, 0]], [3.0, 2.0])])
    assert kept.all() and margin.isnan().all()
    (kept, _), (none, _) = compete([of_list([[0, 0, 0]], [3.0]), of_list([], [])])
    assert kept.all() and len(none) == 0
