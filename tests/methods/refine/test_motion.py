"""Paths of particles: derivatives, recovery of a random walk and of its step, nothing found where nothing moves."""

from __future__ import annotations

import pytest
import torch

from libemc.methods import average, export, subtilts
from libemc.methods.refine import motion
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.polish import polish
from libemc.methods.refine.poses import Poses
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.rotations import rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL, TILTS = 32, 3.0, 13


def walks(count: int, step: float, particles: subtilts.Particles, seed: int = 7) -> torch.Tensor:
    """(count, T, 3) Å: sums of normal steps in the order of the exposures."""
    g = torch.Generator().manual_seed(seed)
    order = particles.series.dose_end.argsort()
    path = torch.zeros(count, TILTS, 3, dtype=torch.float64)
    path[:, order] = (step * torch.randn(count, TILTS, 3, generator=g).double()).cumsum(dim=1)
    return path


def moving_set(step: float, count: int = 24, noise: float = 1.0) -> tuple[subtilts.Particles, torch.Tensor]:
    still = particle_set(blobs(BOX), 1, PIXEL, noise=0.0)
    path = walks(count, step, still)
    return particle_set(blobs(BOX), count, PIXEL, noise=noise, path=path), path


def prepared(particles: subtilts.Particles) -> tuple[subtilts.Batch, FourierVolume, motion.Walk]:
    band = Band.of(BOX, 13.0)
    noise = subtilts.noise_spectrum(particles, band)
    batch = subtilts.load_batch(particles, torch.arange(len(particles)), band, noise)
    return batch, FourierVolume.from_map(blobs(BOX), radius=13.0), motion.Walk.of(particles.series, 8.0)


def test_slopes_and_curvature_are_those_of_the_likelihood() -> None:
    """By central differences of the score squared; the curvature by the slope's own, without noise at the true pose."""
    particles = particle_set(blobs(BOX), 2, PIXEL, noise=0.3)
    batch, volume, _ = prepared(particles)
    poses = Poses.at(batch.rotation, torch.zeros(2, 3).double())
    path = 0.2 * torch.randn(2, TILTS, 3, generator=torch.Generator().manual_seed(0)).double()
    terms = motion._terms(batch, volume, poses, path, TILTS)
    h = 1e-2
    for tilt in (0, 5, 11):
        for axis in range(3):
            values = []
            for sign in (1, -1):
                other = path.clone()
                other[:, tilt, axis] += sign * h
                values.append(motion._terms(batch, volume, poses, other, TILTS).score ** 2)
            slope = (values[0] - values[1]) / (2 * h)
            assert (slope - terms.path[:, tilt, axis]).abs().max() < 0.01 * terms.path.abs().max()
    clean = particle_set(blobs(BOX), 2, PIXEL, noise=0.0)
    batch, volume, _ = prepared(clean)
    still = torch.zeros(2, TILTS, 3).double()
    moved = still.clone()
    moved[:, 5, 0] += h
    terms = motion._terms(batch, volume, poses, still, TILTS)
    change = (motion._terms(batch, volume, poses, moved, TILTS).path - terms.path)[:, 5] / h
    torch.testing.assert_close(
        -change, terms.path_path[:, 5, :, 0], rtol=0.05, atol=0.05 * float(terms.path_path.max())
    )


def test_a_path_is_free_of_its_own_mean() -> None:
    """Whatever the steps, the mean weighted by what is left of the detail is zero; its increments grow with the dose."""
    series = particle_set(blobs(BOX), 1, PIXEL, noise=0.0).series
    walk = motion.Walk.of(series, 8.0)
    assert walk.basis.shape == (TILTS, TILTS - 1)
    left = motion.exposure_filter(torch.tensor(1 / 8.0), series.dose_end, 300.0).double() ** 2 * series.use
    assert (left @ walk.basis).abs().max() < 1e-12
    order = series.dose_end.argsort()
    increments = walk.basis[order].diff(dim=0)
    torch.testing.assert_close(increments, torch.eye(TILTS - 1, dtype=torch.float64))


@pytest.mark.parametrize("step", [0.4, 1.0])
def test_a_random_walk_is_followed(step: float) -> None:
    """The step to the next of those tried; paths and positions far better than without motion, in three dimensions."""
    particles, path = moving_set(step)
    batch, volume, walk = prepared(particles)
    start = polish(batch, volume, Poses.at(batch.rotation, torch.zeros(len(particles), 3).double()), Limits())
    size = motion.step_size(batch, volume, start, walk, PIXEL)
    assert step / 1.7 < size < 1.7 * step
    found, moved = motion.polish_with_motion(batch, volume, start, walk, size / PIXEL, Limits())
    seen = particles.visible & particles.series.use
    error = (found.shift[:, None] + moved) * PIXEL - path
    before = start.shift[:, None] * PIXEL - path
    rms, without = (float((e.square().sum(-1)[seen]).mean().sqrt()) for e in (error, before))
    assert rms < 0.75 * without
    assert (found.score >= start.score - 1e-6).all()
    turned = [float(rotation_distance(p.rotation, batch.rotation).median()) for p in (found, start)]
    assert turned[0] < 1.1 * turned[1]


def test_nothing_is_found_where_nothing_moves() -> None:
    """The likeliest step is none or the least that is tried, and then positions are hardly changed."""
    particles = particle_set(blobs(BOX), 24, PIXEL, noise=1.0)
    batch, volume, walk = prepared(particles)
    start = polish(batch, volume, Poses.at(batch.rotation, torch.zeros(24, 3).double()), Limits())
    assert motion.step_size(batch, volume, start, walk, PIXEL) <= motion.STEP_SIZES[1]
    found, moved = motion.polish_with_motion(batch, volume, start, walk, motion.STEP_SIZES[1] / PIXEL, Limits())
    assert float((moved * PIXEL).norm(dim=-1).mean()) < 0.15
    assert float(((found.shift - start.shift) * PIXEL).norm(dim=-1).median()) < 0.1


def test_many_particles_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether together or a few at a time, and positions stay within the limits."""
    particles, _ = moving_set(1.0, count=7)
    batch, volume, walk = prepared(particles)
    start = Poses.at(batch.rotation, torch.zeros(7, 3).double())
    whole = motion.polish_with_motion(batch, volume, start, walk, 0.3, Limits(0.2))
    monkeypatch.setattr(motion, "AT_ONCE", 3)
    parts = motion.polish_with_motion(batch, volume, start, walk, 0.3, Limits(0.2))
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parts[0].shift, whole[0].shift, rtol=1e-6, atol=1e-8)
    assert float(whole[0].shift.norm(dim=1).max()) < 0.2 + 1e-9


def test_drift_is_kept_in_the_record_followed_by_the_average_and_exported() -> None:
    """A set whose images are displaced: with the drift in its record the average is that of a set that stood still."""
    still = particle_set(blobs(BOX), 1, PIXEL, noise=0.0)
    path = walks(16, 1.5, still)
    blurred = particle_set(blobs(BOX), 16, PIXEL, noise=0.0, path=path)
    drift = torch.einsum("tij,ptj->pti", blurred.series.matrices[:, :2], path)
    kept = subtilts.Particles.of(blurred.corrected(shift=drift).to_file(), blurred.stack)
    assert (kept.corrections.shift - drift).abs().max() <= 0.5 * 10 ** -subtilts.DIGITS["shift"] + 1e-12
    assert kept.file.particles[0].subtilt is not None and blurred.to_file().particles[0].subtilt is None
    sharp = particle_set(blobs(BOX), 16, PIXEL, noise=0.0)
    maps = [average.half_maps([p], 1 << 28, whiten=False) for p in (sharp, kept, blurred)]
    truth, followed, lost = (m.half1 for m in maps)
    curves = [fourier_shell_correlation(m, truth).values[8:13] for m in (followed, lost)]
    assert curves[0].min() > 0.98 and curves[1].max() < 0.97
    moved, before = export.image_table(kept), export.image_table(blurred)
    added = (moved.shift - before.shift) / kept.series.magnification[moved.tilt][:, None]
    torch.testing.assert_close(added, kept.corrections.shift[moved.particle, moved.tilt])


def test_what_has_no_weight_is_in_no_average_and_not_exported() -> None:
    particles = particle_set(blobs(BOX), 6, PIXEL, noise=0.5)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    weighted = particles.weighted(weight, (None, "too little", None, None, None, None))
    back = subtilts.Particles.of(weighted.to_file(), particles.stack)
    assert torch.equal(back.weight, weight) and back.reason[1] == "too little"
    assert 1 not in export.image_table(back).particle and 3 in export.image_table(back).particle
    without = particles.using(weight > 0).weighted(weight, (None,) * 6)
    for a, b in zip(average.half_maps([back], 1 << 28).sums, average.half_maps([without], 1 << 28).sums, strict=True):
        torch.testing.assert_close(a.sums, b.sums, rtol=0.05, atol=0.05 * float(b.sums.abs().max()))
