"""The run of an initial model without its program: seeds on disk, which is chosen, and a group whose axes are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from libemc import initial_models as runs
from libemc import records
from libemc.errors import InputError
from libemc.methods.find_symmetry import find_symmetry
from libemc.methods.initial_model import finish
from libemc.methods.initial_model.descent import Descent, Found, Step, Wish
from libemc.methods.initial_model.finish import Model
from libemc.methods.initial_model.reference import resampled
from libemc.methods.overlay import overlay
from libemc.methods.postprocess import place
from libemc.numerics.rotations import random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetrise
from libemc.project import save_run
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL = 24, 8.0
WISH = Wish(box_length=BOX * PIXEL, diameter=0.8 * BOX * PIXEL, resolution=30.0, max_shift=16.0)


def scene(density: torch.Tensor, count: int = 24) -> runs.Scene:
    return runs.Scene.of([particle_set(density, count, PIXEL, 1.0)], WISH, 1 << 30, 0)


def done(density: torch.Tensor, evidence: float) -> Descent:
    small = resampled(density, WISH.small)[None]
    return Descent(small, (Step(40.0, 1.0, 2.0, 3.0, 0.1, (1.0,)),), torch.rand(2, 3, WISH.small, WISH.small), evidence)


def test_seeds_are_kept_and_the_likeliest_is_chosen(project: Path) -> None:
    one, other = blobs(BOX, seed=8, count=8), blobs(BOX, seed=4, count=5)
    place_of = scene(one, 4)
    seeds = runs.Seeds(Path("sgd"))
    Path("sgd").mkdir()
    for seed, density, evidence in ((3, one, 5.0), (4, other, 2.0), (5, one, 4.0)):
        seeds.add(seed, done(density, evidence), place_of, seeds.files(seed, 1))
    torch.testing.assert_close(seeds.references(4, 1)[0], resampled(other, WISH.small))
    best, table = runs.compare(seeds, place_of)
    assert best == 3 and table[0][2] > 0.99 > 0.97 > table[0][1] == table[1][0]
    source = Path("input.json")
    source.write_text("{}")
    save_run(Path("sgd/run.json"), "emc_sgd", {"resolution": 30.0}, 0, {"seeds": seeds.table()}, [source], "seeds")
    again = runs.Seeds.resumed(Path("sgd"), {"resolution": 30.0}, [source])
    assert again.courses == seeds.courses and again.evidence == seeds.evidence
    with pytest.raises(InputError, match=r"was begun with resolution = 30.0, not 20.0"):
        runs.Seeds.resumed(Path("sgd"), {"resolution": 20.0}, [source])
    source.write_text("{} ")
    with pytest.raises(InputError, match="has changed since"):
        runs.Seeds.resumed(Path("sgd"), {"resolution": 30.0}, [source])
    assert records.load("sgd/run.json", records.Run).stopped_at == "seeds"
    text = runs.lines(seeds, best, table, [Model(one, 4, None)], "c1")
    assert text[0].endswith("(chosen)") and text[1].startswith("seed 4: log-likelihood 2.0 ") and len(text) == 4
    assert text[3] == "sgd/class1.mrc: 4 particles, c1"


def test_a_group_is_brought_onto_its_axes_and_applied() -> None:
    """A C4 map that lies askew: its axis comes to z, and the poses with it: predictions still meet the images."""
    density = symmetrise(blobs(BOX, seed=8, count=6), "c4")
    askew = place(density, random_rotations(1, torch.Generator().manual_seed(3))[0], (0.6, -0.4, 0.3))
    particles = scene(askew)
    told: list[str] = []
    truth = finish.at_poses(particles.series, particles.balls, true_poses(particles))
    group, found, models, table = runs.with_symmetry(truth, [Model(askew, 24, None)], particles, "c4", told.append)
    assert group == "c4" and table[0]["groups"][0]["group"] == "c4" and "c4" in told[0]
    own = models[0].density * particles.wide
    assert float((symmetrise(own, "c4") - own).norm() / own.norm()) < 0.05
    score = find_symmetry(models[0].density[None], PIXEL, 35.0, ["c4"]).of("c4")
    assert abs(float(score.matrix[2, 2])) > 0.99  # the axis that is found in it is z
    fit = overlay(own, askew * particles.wide, BOX * PIXEL / 35, 3.0)
    assert fit.correlation > 0.95
    error = rotation_distance(found[0].rotation @ fit.rotation.T, truth[0].rotation, None)
    other = rotation_distance(found[0].rotation, truth[0].rotation @ fit.rotation, "c4")
    assert float(torch.minimum(error, other).median()) < 3
    moved = found[0].xyz - truth[0].xyz - truth[0].rotation @ fit.shift * PIXEL
    assert float(moved.norm(dim=1).median()) < 3


def true_poses(particles: runs.Scene) -> Found:
    (own,) = particles.series
    nothing = torch.zeros(len(own), dtype=torch.float64)
    return Found(own.rotation, torch.zeros(len(own), 3).double(), nothing.long(), nothing, nothing)


def test_without_any_symmetry_nothing_changes() -> None:
    density = blobs(BOX, seed=8, count=8)
    particles = scene(density, 4)
    models = [Model(density, 4, None)]
    group, found, same, table = runs.with_symmetry(particles.series, models, particles, runs.AUTO, lambda text: None)
    assert group == "c1" and found is particles.series and same is models and len(table[0]["groups"]) > 20
