"""Descents: from nothing to the map, with two classes, with symmetry; and what is asked of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from libemc.methods.initial_model.balls import Balls, noise_variance, particle_balls
from libemc.methods.initial_model.descent import Descent, Wish, assign, descend
from libemc.methods.initial_model.finish import at_poses, class_models, classes_of, of_class, polished
from libemc.methods.initial_model.reference import resampled, sphere
from libemc.methods.overlay import overlay
from libemc.methods.subtilts import Particles
from libemc.numerics.rotations import random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetrise
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL, MEMORY = 24, 8.0, 1 << 30
WISH = Wish(box_length=BOX * PIXEL, diameter=0.8 * BOX * PIXEL, resolution=30.0, max_shift=16.0)
MASK = sphere(WISH.small, WISH.box_length, WISH.diameter)


def lost(particles: Particles) -> Particles:
    """The same without any orientation."""
    turned = random_rotations(len(particles), torch.Generator().manual_seed(99))
    return particles.moved(turned, particles.xyz, particles.score)


def ready(series: list[Particles]) -> Balls:
    balls = particle_balls(series, WISH.box_length / WISH.finest, MEMORY)
    return balls.scaled(noise_variance(balls, MASK, torch.Generator().manual_seed(0)))


def started(balls: Balls, seed: int, **more: object) -> Descent:
    wish = replace(WISH, classes=more.pop("classes", 1))
    return descend(balls, wish, MASK, torch.Generator().manual_seed(seed), **more)


def against(reference: torch.Tensor, density: torch.Tensor) -> float:
    wanted = resampled(density, WISH.small) * MASK
    return overlay(reference, wanted, WISH.box_length / 40, 3.0).correlation


def test_from_nothing_to_the_map() -> None:
    """Two seeds: the poses are the true ones but for one turn and shift of all, which no model of the other hand gives."""
    density = blobs(BOX, seed=8, count=8)  # its mirror image correlates by 0.83 with it, other blobs' up to 0.99
    truth = particle_set(density, 40, PIXEL, 3.0)
    series = [lost(truth)]
    balls = ready(series)
    for seed in range(2):
        done = started(balls, seed)
        assert against(done.references[0], density) > 0.9
        assert len(done.frames) == len(done.steps) + 1 and done.steps[0].band == WISH.bands[0]
        assert done.steps[-1].band == WISH.bands[-1] and done.evidence > 0
        found = assign(balls, WISH, done.references, "c1", torch.Generator().manual_seed(seed))
        there = at_poses(series, balls, found)
        instead = [resampled(r, BOX) for r in done.references]
        wide = sphere(BOX, WISH.box_length, WISH.diameter)
        (model,) = class_models(there, instead, wide, 30.0, "c1", MEMORY, 0)
        (better,) = polished(there, [model.density * wide], 30.0, MEMORY)
        frame = overlay(model.density * wide, density * wide, WISH.box_length / 30, 4.0)
        error = rotation_distance(better.rotation, truth.rotation @ frame.rotation)
        assert float(error.median()) < 3 and int((error < 12).sum()) >= 36
        place = truth.xyz + truth.rotation @ frame.shift * PIXEL
        assert float((better.xyz - place).norm(dim=1).median()) < 4
        assert model.particles == 40 and classes_of(better).tolist() == [1] * 40


def test_two_kinds_of_particles() -> None:
    first, second = blobs(BOX, seed=4), symmetrise(blobs(BOX, seed=9, count=5), "c4")
    series = [lost(particle_set(d, 30, PIXEL, 2.0, seed=s)) for s, d in enumerate((first, second))]
    balls = ready(series)
    done = started(balls, 0, classes=2)
    found = assign(balls, replace(WISH, classes=2), done.references, "c1", torch.Generator().manual_seed(0))
    right = (found.class_ == balls.series).double().mean()
    assert max(float(right), 1 - float(right)) > 0.9
    one, other = done.references if right > 0.5 else done.references.flip(0)
    assert against(one, first) > 0.85 and against(other, second) > 0.85
    there = at_poses(series, balls, found)
    counts = [sum(int(p.use.sum()) for p in of_class(there, number)) for number in (0, 1, 2)]
    assert counts[0] == 0 and sum(counts) == 60


def test_with_symmetry_from_a_reference() -> None:
    """Going on with C4: references are symmetric, and poses are right modulo the group."""
    density = symmetrise(blobs(BOX, seed=9, count=5), "c4")
    truth = particle_set(density, 24, PIXEL, 2.0)
    balls = ready([truth])
    start = symmetrise(resampled(density + 0.5 * blobs(BOX, seed=3), WISH.small) * MASK, "c4")[None]
    strength = float(started(balls, 0).references.norm() / start.norm())
    done = started(balls, 0, symmetry="c4", start=start * strength)
    (reference,) = done.references
    assert float((symmetrise(reference, "c4") - reference).norm() / reference.norm()) < 0.05
    found = assign(balls, WISH, done.references, "c4", torch.Generator().manual_seed(0))
    assert float(rotation_distance(found.rotation, truth.rotation, "c4").median()) < 12
    assert len({s.band for s in done.steps}) <= 2


def test_more_particles_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a part of the particles, averaged over the steps, come to the same map."""
    monkeypatch.setattr("libemc.methods.initial_model.descent.BATCH", 16)
    density = blobs(BOX)
    balls = ready([particle_set(density, 48, PIXEL, 2.0)])
    assert against(started(balls, 1).references[0], density) > 0.85


def test_bands() -> None:
    wish = Wish(box_length=400.0, diameter=300.0, resolution=40.0, max_shift=20.0)
    assert wish.bands[0] == 100.0 and wish.bands[-1] == pytest.approx(wish.finest) == pytest.approx(300 / 5.5)
    assert all(a * 0.9 > b >= a * 0.779 for a, b in zip(wish.bands, wish.bands[1:], strict=False))
    small = replace(wish, diameter=130.0, resolution=20.0)
    assert small.bands[0] == 52.0 and small.finest == pytest.approx(130 / 5.5)
    assert replace(wish, resolution=200.0).bands == [200.0]
