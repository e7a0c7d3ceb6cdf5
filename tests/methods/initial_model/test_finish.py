"""From references to particles: who gets which pose and class, whose map it is, and poses polished against it."""

from __future__ import annotations

import torch

from libemc.methods.initial_model.balls import particle_balls
from libemc.methods.initial_model.descent import Found
from libemc.methods.initial_model.finish import at_poses, class_models, classes_of, of_class, polished
from libemc.methods.initial_model.reference import sphere
from libemc.methods.overlay import overlay
from libemc.numerics.filters import lowpass
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL, MEMORY = 24, 8.0, 1 << 30
WIDE = sphere(BOX, BOX * PIXEL, 0.8 * BOX * PIXEL)


def test_poses_and_classes_go_to_their_particles() -> None:
    density = blobs(BOX)
    first, second = particle_set(density, 5, PIXEL, 1.0), particle_set(density, 4, PIXEL, 1.0, seed=3)
    first = first.using(torch.tensor([True, False, True, True, False]))
    balls = particle_balls([first, second], 5.0, MEMORY)
    rotation = random_rotations(7, torch.Generator().manual_seed(0))
    shift = torch.arange(21, dtype=torch.float64).reshape(7, 3)
    found = Found(rotation, shift, torch.tensor([0, 1, 0, 1, 1, 0, 0]), torch.arange(7.0).double(), torch.ones(7))
    one, other = at_poses([first, second], balls, found)
    assert classes_of(one).tolist() == [1, 0, 2, 1, 0] and classes_of(other).tolist() == [2, 2, 1, 1]
    places = torch.tensor([0, 2, 3])
    torch.testing.assert_close(one.rotation[places], rotation[:3])
    torch.testing.assert_close(one.xyz[places], first.xyz[places] + shift[:3])
    torch.testing.assert_close(one.rotation[1], first.rotation[1])
    torch.testing.assert_close(other.rotation, rotation[3:])
    assert one.score.isnan().tolist() == [False, True, False, False, True] and other.score.tolist() == [3, 4, 5, 6]
    written = other.to_file().particles
    assert [p.class_ for p in written] == [2, 2, 1, 1] and written[0].score == 3
    assert [int(p.use.sum()) for p in of_class([one, other], 1)] == [2, 2]


def test_maps_of_classes_and_polished_poses() -> None:
    """True classes give the two maps; poses shaken by 6° and 5 Å come back; a class in one half only keeps what it was."""
    maps = blobs(BOX, seed=8, count=8), blobs(BOX, seed=4, count=5)
    sets = [particle_set(d, 30, PIXEL, 1.0, seed=s) for s, d in enumerate(maps)]
    balls = particle_balls(sets, 5.0, MEMORY)
    truth = torch.cat([p.rotation for p in sets])
    g = torch.Generator().manual_seed(2)
    shaken = matrix_from_rotvec(torch.randn(60, 3, generator=g).double() * 6 / 3**0.5) @ truth
    off = torch.randn(60, 3, generator=g).double() * 5 / 3**0.5
    nothing = torch.zeros(60, dtype=torch.float64)
    series = at_poses(sets, balls, Found(shaken, off, balls.series, nothing, nothing))
    models = class_models(series, list(maps), WIDE, 24.0, "c1", MEMORY, 0)
    for model, density in zip(models, maps, strict=True):
        assert model.particles == 30 and model.resolution is not None and model.resolution < 45
        assert (
            overlay(model.density * WIDE, lowpass(density, PIXEL, 24.0) * WIDE, BOX * PIXEL / 30, 2.0).correlation
            > 0.93
        )
    better = polished(series, [lowpass(d, PIXEL, 24.0) for d in maps], 24.0, MEMORY)
    error = rotation_distance(torch.cat([p.rotation for p in better]), truth)
    assert float(error.median()) < 1.5
    moved = torch.cat([p.xyz for p in better]) - torch.cat([p.xyz for p in sets])
    assert float(moved.norm(dim=1).median()) < 1.0

    alone = [p.using(p.half == 1) for p in series]
    (kept, _) = class_models(alone, list(maps), WIDE, 24.0, "c1", MEMORY, 0)
    assert kept.resolution is None and kept.table()["resolution_between_halves"] is None
    torch.testing.assert_close(kept.density, lowpass(maps[0], PIXEL, 24.0))
