"""The polish: its derivatives, brute force on a fine grid about what it finds, and limits that it never leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from libemc.methods import subtilts
from libemc.methods.refine import polish
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.poses import Poses
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.subtilt_data import blobs, particle_set, premultiplied

PIXEL = 8.0


def off_by(degrees: float, count: int, seed: int) -> torch.Tensor:
    """(N, 3, 3): turns of so many degrees about random axes."""
    axis = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    return matrix_from_rotvec(torch.nn.functional.normalize(axis, dim=1) * degrees)


def off_px(length: float, count: int, seed: int) -> torch.Tensor:
    direction = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    return torch.nn.functional.normalize(direction, dim=1) * length


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("kind", ["plain", "premultiplied", "own noise"])
def test_derivatives_of_the_score(box: int, kind: str) -> None:
    """⟨y, m⟩ and |m|² by rotation and shift against central differences (float32 slices: 1 % of the largest)."""
    density, band = blobs(box), Band.of(box, 9.0)
    particles = particle_set(density, 4, PIXEL, noise=0.5)
    if kind != "plain":
        particles = premultiplied(particles)
    noise = subtilts.noise_spectrum(particles, band)
    batch = subtilts.load_batch(particles, torch.arange(4), band, noise, own_noise=kind == "own noise")
    volume = FourierVolume.from_map(density, radius=9.0)
    g = torch.Generator().manual_seed(1)
    rotation = matrix_from_rotvec(torch.randn(4, 3, generator=g).double() * 5) @ batch.rotation
    shift = torch.randn(4, 3, generator=g).double() * 0.5
    terms = polish.pose_terms(batch, volume, rotation, shift)
    score = polish.score_poses(batch, volume, rotation, shift)
    torch.testing.assert_close(terms.cross / terms.norm.sqrt(), score, rtol=1e-4, atol=0)
    step = 5e-3
    for i in range(3):
        w = torch.zeros(4, 3, dtype=torch.float64)
        w[:, i] = step
        for column, (up, down) in (
            (i, [(matrix_from_rotvec(torch.rad2deg(s * w)) @ rotation, shift) for s in (1, -1)]),
            (3 + i, [(rotation, shift + s * w) for s in (1, -1)]),
        ):
            a, b = (polish.pose_terms(batch, volume, *at) for at in (up, down))
            for value, slope in (("cross", "by_cross"), ("norm", "by_norm")):
                difference = (getattr(a, value) - getattr(b, value)) / (2 * step)
                analytic = getattr(terms, slope)
                assert (difference - analytic[:, column]).abs().max() < 0.01 * analytic.abs().max()


@pytest.mark.parametrize("box", [32, 33])
def test_it_finds_the_pose(box: int) -> None:
    """From 8° and one pixel away to the known pose; noise of twice the signal leaves 1° and a tenth of a pixel."""
    density, band = blobs(box), Band.of(box, 12.0)
    batch = subtilts.load_batch(particle_set(density, 8, PIXEL, noise=2.0), torch.arange(8), band)
    volume = FourierVolume.from_map(density, radius=12.0)
    start = Poses.at(off_by(8, 8, 3) @ batch.rotation, off_px(1, 8, 4))
    found = polish.polish(batch, volume, start, Limits())
    assert rotation_distance(found.rotation, batch.rotation).median() < 1.0
    assert found.shift.norm(dim=1).median() < 0.1
    assert (found.score >= polish.score_poses(batch, volume, start.rotation, start.shift)).all()


@pytest.mark.parametrize("own_noise", [False, True])
def test_premultiplied_images_are_worth_as_much(own_noise: bool) -> None:
    """White noise of five times the signal, so that the best weights are known: none. Whitened by what is measured, plain
    or premultiplied, errors are 15 % larger at most (measured: 10 %)."""
    density, band = blobs(33), Band.of(33, 12.0)
    plain = particle_set(density, 16, PIXEL, noise=5.0)
    volume = FourierVolume.from_map(density, radius=12.0)

    def error(particles: subtilts.Particles, whiten: bool) -> float:
        noise = subtilts.noise_spectrum(particles, band) if whiten else None
        batch = subtilts.load_batch(particles, torch.arange(16), band, noise, own_noise=own_noise and whiten)
        start = Poses.at(off_by(4, 16, 3) @ batch.rotation, off_px(0.5, 16, 4))
        found = polish.polish(batch, volume, start, Limits())
        return float(rotation_distance(found.rotation, batch.rotation).square().mean().sqrt())

    best, both = error(plain, whiten=False), premultiplied(plain)
    assert error(both, whiten=False) == pytest.approx(best, rel=0.02)  # images are kept in float16
    assert error(plain, whiten=True) < 1.15 * best and error(both, whiten=True) < 1.15 * best


@pytest.mark.parametrize("box", [28, 29])
def test_no_pose_of_a_fine_grid_is_better(box: int) -> None:
    """500 rotations within 3° and shifts within half a pixel of what is found, by scipy: none scores higher.

    1e-5: float32 slices.
    """
    density, band = blobs(box), Band.of(box, 10.0)
    batch = subtilts.load_batch(particle_set(density, 3, PIXEL, noise=1.0), torch.arange(3), band)
    volume = FourierVolume.from_map(density, radius=10.0)
    found = polish.polish(
        batch, volume, Poses.at(off_by(5, 3, 1) @ batch.rotation, off_px(0.7, 3, 2)), Limits(), steps=40
    )
    rng = np.random.default_rng(0)
    best = torch.full((3,), -torch.inf, dtype=torch.float64)
    for _ in range(500):
        size = rng.choice([0.1, 0.5, 1.0])
        turn = torch.from_numpy(Rotation.from_rotvec(rng.normal(size=3) * size, degrees=True).as_matrix())
        shift = found.shift + torch.from_numpy(rng.normal(size=3)) * 0.15 * size
        best = torch.maximum(best, polish.score_poses(batch, volume, turn @ found.rotation, shift))
    exact = polish.score_poses(batch, volume, found.rotation, found.shift)
    assert (best < exact * (1 + 1e-5)).all()
    assert (best > 0.98 * exact).all()  # and the grid was near enough to be a test


@pytest.mark.parametrize(
    "limits", [Limits(0.5, max_angle=3.0), Limits(0.5, max_tilt=0.0), Limits(0.5, max_tilt=2.0), Limits(0.0)]
)
def test_limits_are_never_left(limits: Limits) -> None:
    """Priors 10° and two pixels from the truth: what is found is within the limits, better than the prior, and, where it
    is held, better than what is as far in a random direction."""
    density, band = blobs(32), Band.of(32, 10.0)
    particles = particle_set(density, 12, PIXEL, noise=0.5)
    truth = particles.rotation
    prior = particles.moved(off_by(10, 12, 5) @ truth, particles.xyz + PIXEL * off_px(2, 12, 6), particles.score)
    batch = subtilts.load_batch(prior, torch.arange(12), band)
    volume = FourierVolume.from_map(density, radius=10.0)
    start = Poses.at(prior.rotation, torch.zeros(12, 3).double())
    found = polish.polish(batch, volume, start, limits)
    assert found.shift.norm(dim=1).max() <= limits.shift_px + 1e-9
    turned = np.degrees(Rotation.from_matrix((prior.rotation.transpose(1, 2) @ found.rotation).numpy()).magnitude())
    lean = torch.rad2deg(
        2 * torch.asin(torch.linalg.vector_norm(found.rotation[:, :, 2] - prior.rotation[:, :, 2], dim=1) / 2)
    )
    if limits.max_angle is not None:
        assert turned.max() < limits.max_angle + 1e-9
    if limits.max_tilt is not None:
        assert lean.max() < limits.max_tilt + 1e-9
    before = polish.score_poses(batch, volume, start.rotation, start.shift)
    assert (found.score >= before * (1 - 1e-6)).all() and found.score.median() > before.median() * 1.01
    other = limits.hold(off_by(10, 12, 11) @ prior.rotation, prior.rotation)
    assert found.score.median() > polish.score_poses(batch, volume, other, found.shift).median()


def test_spin_about_a_known_axis() -> None:
    """The axis is right and the turn about it off by 12°: with the axis held it comes to 1°, and the axis has not moved."""
    density, band = blobs(33), Band.of(33, 9.0)
    particles = particle_set(density, 8, PIXEL, noise=1.0)
    spin = torch.zeros(8, 3).double()
    spin[:, 2] = torch.tensor([12.0, -12.0] * 4)
    prior = particles.moved(particles.rotation @ matrix_from_rotvec(spin), particles.xyz, particles.score)
    batch = subtilts.load_batch(prior, torch.arange(8), band)
    volume = FourierVolume.from_map(density, radius=9.0)
    found = polish.polish(
        batch, volume, Poses.at(prior.rotation, torch.zeros(8, 3).double()), Limits(1.0, max_tilt=0.0)
    )
    assert rotation_distance(found.rotation, particles.rotation).median() < 1.0
    assert (found.rotation[:, :, 2] - particles.rotation[:, :, 2]).abs().max() < 1e-9


def test_images_without_contrast() -> None:
    """Zeros for images, or for a reference: poses stay, scores are zero, nothing is NaN."""
    density, band = blobs(24), Band.of(24, 8.0)
    particles = particle_set(density, 2, PIXEL, noise=1.0)
    blank = replace(particles, stack=np.zeros_like(particles.stack))
    for images, reference in ((blank, density), (particles, torch.zeros_like(density))):
        batch = subtilts.load_batch(images, torch.arange(2), band)
        volume = FourierVolume.from_map(reference, radius=8.0)
        found = polish.polish(batch, volume, Poses.at(batch.rotation, torch.zeros(2, 3).double()), Limits())
        assert torch.equal(found.score, torch.zeros(2).double())
        torch.testing.assert_close(found.rotation, batch.rotation)
        assert found.shift.abs().max() < 1e-9
