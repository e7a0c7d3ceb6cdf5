"""Whole iterations: junk goes, masks are kept apart, halves stay apart, and noise converges to nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods import average
from libemc.methods.refine import align, iteration, references, schedule
from libemc.methods.refine.limits import Limits
from libemc.methods.subtilts import Particles
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import rotation_distance
from tests.methods.refine.test_align import lost
from tests.methods.subtilt_data import blobs, particle_set

MEMORY, PIXEL = 1 << 28, 8.0


def setup(box: int, startres: float = 60.0, focus: torch.Tensor | None = None, **changes: object) -> iteration.Setup:
    mask = soft_sphere(box, 0.4 * box, 3.0)
    one = iteration.Setup(
        mask=mask,
        focus=mask if focus is None else focus,
        filtering=references.Filtering("spherical", mask, PIXEL, 0),
        limits=Limits(2.0),
        symmetry="c1",
        shared=box * PIXEL / startres,
        keep=None,
        own_noise=False,
        seed=0,
        memory=MEMORY,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def start_from(density: torch.Tensor, resolution: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mask = soft_sphere(len(density), 0.4 * len(density), 3.0)
    generator = torch.Generator().manual_seed(seed)
    return references.starting_references(density, mask, PIXEL, resolution, generator)


def with_junk(particles: Particles, every: int, seed: int) -> tuple[Particles, torch.Tensor]:
    """Every so many-th particle's images are nothing but noise of the same power: the set, and which they are (N,) bool."""
    tilts, stack = len(particles.series.use), particles.stack.astype(np.float32)
    junk = torch.arange(len(particles)) % every == 1
    rng = np.random.default_rng(seed)
    for i in torch.nonzero(junk)[:, 0].tolist():
        mine = stack[i * tilts : (i + 1) * tilts]
        mine[...] = rng.normal(size=mine.shape) * mine.std(axis=(1, 2), keepdims=True)
    return replace(particles, stack=stack), junk


def test_junk_is_rejected() -> None:
    """A fifth noise, four seeds: after a search nine of ten of it are without weight and say why, one in 30 of the others;
    the average is nearer to the truth than with all of them."""
    density = blobs(28)
    real, bad = [], []
    for seed in range(4):
        particles, junk = with_junk(particle_set(density, 40, PIXEL, noise=2.0, seed=seed), 5, seed)
        out = iteration.iteration(
            [particles], [particles], start_from(density, 60.0), schedule.Step(50.0, exhaustive=True), setup(28)
        )
        (found,) = out.series
        gone = found.weight == 0
        assert out.done.rejected == int(gone.sum())
        assert all(("contrast" in (r or "")) == g for r, g in zip(found.reason, gone.tolist(), strict=True))
        real.append(float(gone[~junk].double().mean()))
        bad.append(float(gone[junk].double().mean()))
        everyone = average.half_maps([found.unweighted()], MEMORY)
        with_it, without = (
            fourier_shell_correlation(m.half1 + m.half2, density).values[4:10].mean() for m in (everyone, out.maps)
        )
        assert without > with_it
    assert np.mean(bad) >= 0.9 and np.mean(real) <= 1 / 30


def test_a_share_is_kept() -> None:
    density = blobs(24)
    particles = particle_set(density, 20, PIXEL, noise=2.0)
    out = iteration.iteration(
        [particles], [particles], start_from(density, 60.0), schedule.Step(50.0, False), setup(24, keep=0.8)
    )
    assert out.done.rejected == 4 and int((out.series[0].weight == 0).sum()) == 4


def test_focus_is_not_the_mask_of_the_fsc() -> None:
    """A focus on one side: references are zero beyond it, the FSC within its own mask is the same; other poses come of it."""
    density = blobs(28)
    particles = particle_set(density, 16, PIXEL, noise=2.0)
    x = (torch.arange(28) - 14).expand(28, 28, 28)
    side = soft_sphere(28, 11.0, 3.0) * torch.sigmoid(x / 1.5).float()
    step, start = schedule.Step(40.0, exhaustive=False), start_from(density, 60.0)
    one, other = (iteration.iteration([particles], [particles], start, step, setup(28, focus=f)) for f in (None, side))
    torch.testing.assert_close(
        one.maps.half1, other.maps.half1, rtol=0, atol=0
    )  # the references are of the next iteration
    assert one.done.fsc == other.done.fsc
    beyond = [float((o.references[0][x < -6]).square().mean() / o.references[0].square().mean()) for o in (other, one)]
    assert beyond[0] < 0.2 * beyond[1]
    again = [iteration.iteration(o.series, [particles], o.references, step, setup(28)) for o in (one, other)]
    assert (again[0].series[0].rotation - again[1].series[0].rotation).abs().max() > 1e-3


@pytest.mark.parametrize("box", [28, 29])
def test_halves_stay_apart(box: int) -> None:
    """Half 2's images with the sign changed: half 1's map of this iteration is what it was, to the last bit, and its next
    reference differs only where the halves share one, in half 2's part of the mean.

    With all particles kept at weight 1; otherwise the typical contrast of both halves, one number, comes in.
    """
    density = blobs(box)
    particles = particle_set(density, 16, PIXEL, noise=1.0)
    second = np.repeat(particles.half.numpy() == 2, len(particles.series.use))
    other = replace(particles, stack=np.where(second[:, None, None], -particles.stack, particles.stack))
    common, start = setup(box), start_from(density, 60.0)
    same = torch.ones(16, dtype=torch.float64)
    maps = []
    for one in (particles, other):
        aligned = align.iterate([one], [one], start, align.Task(40.0, True, common.limits), MEMORY)
        maps.append(average.half_maps([aligned.series[0].weighted(same, (None,) * 16)], MEMORY))
    assert torch.equal(maps[0].half1, maps[1].half1) and not torch.equal(maps[0].half2, maps[1].half2)
    fsc = torch.ones(box // 2 + 1, dtype=torch.float64)  # the same filter
    now, then = (iteration.next_references(m.half1, m.half2, fsc, common)[0] for m in maps)
    difference = torch.fft.rfftn(now - then).abs()
    f = torch.fft.fftfreq(box) * box
    radius = (f[:, None, None] ** 2 + f[:, None] ** 2 + torch.arange(box // 2 + 1) ** 2).sqrt()
    beyond = radius > np.floor(common.shared) + 1  # filters are linear between shells
    assert difference[beyond].max() < 1e-5 * difference.max() and difference[radius < common.shared - 1].max() > 0


def test_noise_converges_to_nothing() -> None:
    """Noise images refined until convergence from a reference at 80 Å, shell 2.8, four seeds: the halves agree on nothing
    finer. The first shell beyond has some of the shared ones in it, which end linearly; those after it nothing but chance,
    0.1 for a mean of four that hold so few independent coefficients within the mask.
    """
    box, curves = 28, []
    density = blobs(box)
    for seed in range(4):
        particles = particle_set(torch.zeros_like(density), 24, PIXEL, noise=1.0, seed=seed)
        common, halves, series = setup(box, 80.0), start_from(density, 80.0, seed), [particles]
        past: list[schedule.Done] = []
        start = schedule.Step(80.0, exhaustive=True)
        while (step := schedule.next_step(past, start, box, PIXEL, None, motion=True)) is not None:
            out = iteration.iteration(series, [particles], halves, step, common)
            halves, series = out.references, out.series
            past.append(out.done)
        assert len(past) >= 3 and all(p.step.resolution > 2.5 * PIXEL for p in past)
        curves.append(past[-1].fsc)
    mean = np.mean(curves, axis=0)
    first = int(box * PIXEL / 80.0) + 1
    assert mean[first] < 0.35 and mean[first + 1 :].max() < 0.2 and mean[first + 1 :].mean() < 0.05


def test_a_refinement_comes_to_the_limit() -> None:
    """All poses random, from 60 Å to convergence: nine of ten within 4°, and the average nearly that of the true poses."""
    density = blobs(28)
    truth = particle_set(density, 40, PIXEL, noise=2.0)
    begin = lost(truth)
    common, halves, series = setup(28, limits=Limits(3.0)), start_from(density, 60.0), [begin]
    past: list[schedule.Done] = []
    while (step := schedule.next_step(past, schedule.Step(60.0, True), 28, PIXEL, None)) is not None:
        out = iteration.iteration(series, [begin], halves, step, common)
        halves, series = out.references, out.series
        past.append(out.done)
    assert (rotation_distance(series[0].rotation, truth.rotation) < 4).double().mean() >= 0.9
    best = average.finish(average.half_maps([truth], MEMORY), common.mask, PIXEL, 0)
    found, oracle = (
        fourier_shell_correlation(a.average * common.mask, density * common.mask).values[1:9].mean()
        for a in (out.average, best)
    )
    assert found > oracle - 0.02
