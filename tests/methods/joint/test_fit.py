"""The joint fit of one tilt series: nearer to the truth in everything that was planted, and nothing without a level."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods.joint import levels
from libemc.methods.joint.evidence import SHIFT, TURN
from libemc.methods.joint.fit import (
    PRECISION,
    Fit,
    Member,
    cases,
    errors,
    fit,
    joined,
    measured,
    paths,
    present,
    rms_shift,
    scene_of,
    with_astigmatism,
)
from libemc.methods.joint.levels import Choice
from libemc.methods.subtilts import Corrections, Particles
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance
from tests.methods.joint.joint_data import PIXEL, empty, member, pictured, scattered, still, told, unit_map
from tests.methods.joint.test_levels import smooth_path
from tests.methods.tiltseries_refine.raw_data import with_raw

BOX, COUNT, TILTS, RESOLUTION, MEMORY = 25, 24, 9, 10.0, 1 << 26
SHIFTS, MOTION = Choice(levels.SHIFT, 4.0, math.inf), Choice(levels.MOTION, 0.8, 300.0)
DEFOCUS = Choice(levels.DEFOCUS, 400.0, math.inf)
LEVELS = (SHIFTS, MOTION, DEFOCUS)
ALL = [torch.arange(COUNT)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def everything_wrong(noise: float = 0.5, seed: int = 0) -> tuple[Particles, Particles, Corrections]:
    """Particles with tilts shifted and out of focus, paths of neighbours alike, and poses slightly off; where they truly are, and
    what their images truly have."""
    density = unit_map(BOX)
    right = empty(scattered(COUNT, BOX, tilts=TILTS, seed=seed))
    where, truth = scene_of([member(right, density, RESOLUTION)]), still(right)
    path = torch.einsum("tij,ntj->nti", where.matrices[:, :2], smooth_path(where, 300.0, 0.8, seed))
    tilt_shift, focus = 3 * normal(TILTS, 2, seed=seed), 300 * normal(TILTS, seed=seed + 1)
    truth = replace(truth, shift=tilt_shift + path, defocus=truth.defocus + focus)
    right = pictured(right, density, truth, noise=noise, seed=seed)
    off = matrix_from_rotvec(2.0 * normal(COUNT, 3, seed=seed + 2)) @ right.rotation
    return right.moved(off, right.xyz + 2.0 * normal(COUNT, 3, seed=seed + 3), right.score), right, truth


def seen_at(p: Particles) -> Tensor:
    """(N, T, 2) Å: where images show particles, in the patches, before the magnification."""
    return torch.einsum("tij,nj->nti", p.series.matrices[:, :2], p.xyz - p.centre) + p.corrections.shift


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def one(found: Fit) -> Particles:
    return found.members[0].particles


@pytest.fixture(scope="module")
def problem() -> tuple[Particles, Particles, Corrections]:
    return everything_wrong()


@pytest.fixture(scope="module")
def fitted(problem: tuple[Particles, Particles, Corrections]) -> Fit:
    return fit([member(problem[0], unit_map(BOX), RESOLUTION)], ALL, LEVELS, None, MEMORY)


def test_everything_gets_nearer_to_the_truth(problem: tuple[Particles, Particles, Corrections], fitted: Fit) -> None:
    """What is wrong about positions in images falls to a quarter and less, about the defocus and orientations to about a half; no
    more is left of any than a fit leaves that begins at the truth, but for a tenth."""
    given, right, truth = problem
    best = right.corrected(shift=truth.shift, defocus=truth.defocus)
    known = one(fit([member(best, unit_map(BOX), RESOLUTION)], ALL, LEVELS, None, MEMORY))
    seen, at_best = given.visible, seen_at(best)

    def wrong(p: Particles) -> list[float]:
        focus = (p.corrections.defocus - truth.defocus)[seen]
        return [rms((seen_at(p) - at_best)[seen]), rms(focus), rms(rotation_distance(p.rotation, right.rotation))]

    before, after, least = wrong(given), wrong(one(fitted)), wrong(known)
    assert before[0] > 3.0 and before[1] > 200 and before[2] > 2.0
    assert after[0] < before[0] / 4 and after[1] < before[1] / 1.8 and after[2] < before[2] / 1.8, (before, after)
    assert all(a < 1.1 * b for a, b in zip(after, least, strict=True)), (after, least)


def test_the_numbers_are_those_of_the_corrections(
    problem: tuple[Particles, Particles, Corrections], fitted: Fit
) -> None:
    """Of shifts of tilts and motion, which add up; of the defocus."""
    where = scene_of([member(problem[0], unit_map(BOX), RESOLUTION)])
    (numbers,), own = fitted.numbers, one(fitted).corrections
    assert set(numbers) == {c.level.name for c in LEVELS}
    made = {c.level.name: where.term(c).forward(numbers[c.level.name]) for c in LEVELS}
    shift = (made["shift of tilts"] + made["motion along the exposure"])[..., SHIFT]
    torch.testing.assert_close(shift, own.shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(made["defocus of tilts"][..., 0], own.defocus, rtol=0, atol=1e-9)


def test_errors_are_as_large_as_they_are_said_to_be() -> None:
    """The defocus of nine tilts in four series, in images with twice as much noise as signal: 36 numbers over their errors
    have an rms of 1, with 1/8 for how well the errors are known; four standard errors."""
    pulls, level = [], Choice(levels.DEFOCUS, 800.0, math.inf)
    for seed in range(4):
        plain, density = empty(scattered(80, BOX, tilts=TILTS, seed=seed)), unit_map(BOX)
        truth = 600 * normal(TILTS, seed=seed)
        own = replace(still(plain), defocus=truth.expand(80, TILTS).clone())
        given = member(pictured(plain, density, own, noise=2.0, seed=seed), density, RESOLUTION)
        found = fit([given], [torch.arange(80)], [level], None, MEMORY)
        error = errors(found.members, measured(found.members, MEMORY), [level], seed)["defocus of tilts"]
        assert (error < 0.5).all()  # of the 800 Å that were allowed
        pulls.append((found.numbers[0]["defocus of tilts"] - truth[None, :, None] / 800) / error)
    assert rms(torch.cat(pulls)) == pytest.approx(1.0, abs=4 * math.hypot(1 / math.sqrt(72), 1 / 8 / 6))


def test_without_levels_nothing_moves(problem: tuple[Particles, Particles, Corrections]) -> None:
    """And with those of the CTF alone, nothing but the defocus."""
    given = member(problem[0], unit_map(BOX), RESOLUTION)
    found = one(fit([given], ALL, [], None, MEMORY))
    lens = one(fit([given], ALL, [DEFOCUS], None, MEMORY))
    for p in (found, lens):
        assert torch.equal(p.rotation, problem[0].rotation) and torch.equal(p.xyz, problem[0].xyz)
        assert not p.corrections.shift.any() and not p.corrections.turn.any()
        assert torch.equal(p.lens, problem[0].lens)
    assert not found.corrections.defocus.any() and lens.corrections.defocus.any()


def test_what_there_was_is_kept_or_replaced(problem: tuple[Particles, Particles, Corrections]) -> None:
    """The truth given, and a common shift planted on top of it: with the truth as base it is found and nothing of that is lost;
    else what is known of the paths goes, since no level on can hold it."""
    _, right, truth = problem
    off = torch.tensor([2.0, -3.0], dtype=torch.float64) * torch.tensor([1.0, 0.0] * 5)[:TILTS, None]
    given = right.corrected(shift=truth.shift + off, defocus=truth.defocus)
    m = [member(given, unit_map(BOX), RESOLUTION)]
    kept, replaced = (one(fit(m, ALL, [SHIFTS], base, MEMORY)) for base in (present(m), None))
    there = seen_at(right.corrected(shift=truth.shift))
    before, after, lost = (rms((seen_at(p) - there)[right.visible]) for p in (given, kept, replaced))
    assert after < before / 3 and after < lost / 2, (before, after, lost)
    # and a common shift it is
    change = kept.corrections.shift - given.corrections.shift
    assert (change - change[:1]).abs().max() < 1e-9
    assert torch.equal(kept.corrections.defocus, given.corrections.defocus)
    own = replaced.corrections.shift
    assert (own - own[:1]).abs().max() < 1e-9


def test_a_start_is_a_part_of_what_is_fitted(problem: tuple[Particles, Particles, Corrections]) -> None:
    """A tilt that was moved to where the fit begins: on top of what there was before, the numbers of the level hold all of it,
    not only what the fit added; the choice of levels sees the same."""
    _, right, truth = problem
    far = torch.zeros(TILTS, 2, dtype=torch.float64)
    far[4] = torch.tensor([9.0, -7.0])
    lost = right.corrected(shift=truth.shift - far, defocus=truth.defocus)
    base = present([member(lost, unit_map(BOX), RESOLUTION)])
    begun = [member(right.corrected(shift=truth.shift, defocus=truth.defocus), unit_map(BOX), RESOLUTION)]
    found = fit(begun, ALL, [SHIFTS], base, MEMORY)
    numbers = 4.0 * found.numbers[0]["shift of tilts"][0]
    # in a frame that moves with the particles, whose positions are free: nearly all of it is seen
    assert (numbers[4] - far[4]).norm() < 0.2 * far[4].norm()
    own = one(found).corrections.shift - lost.corrections.shift
    torch.testing.assert_close(own, numbers.expand(COUNT, TILTS, 2), rtol=0, atol=1e-9)
    (case,) = cases(begun, ALL, base, MEMORY)
    torch.testing.assert_close(case.there[..., SHIFT], far.expand(COUNT, TILTS, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("raw", [True, False])
def test_paths_are_those_that_shifted_the_images(raw: bool) -> None:
    """Of smooth motion in three dimensions, beside an alignment that has changed: what is likeliest for a Gaussian process of
    that covariance seen in the images there are, to `PRECISION`, by dense matrices in numpy; to 2 % of it, for modes left out and
    the solver's tolerance. Its projections are those of the truth, well within what counts as exact."""
    file = scattered(COUNT, BOX, tilts=TILTS)
    if raw:
        file = with_raw(file)
        assert file.raw is not None
        shifts = {n: tuple(5.0 + v for v in getattr(file.raw, n)) for n in ("shift_x", "shift_y")}
        file = file.model_copy(update={"tilts": file.tilts.model_copy(update=shifts)})
    p = empty(file)
    where = scene_of([member(p, unit_map(BOX), RESOLUTION)])
    truth = smooth_path(where, 600.0, 1.0, 3)
    assert bool(p.realigned().any()) == raw
    shift = torch.einsum("tij,ntj->nti", where.matrices[:, :2], truth) + p.realigned()
    shift = torch.where(p.visible[..., None], shift, 99.0)
    found = paths(p.corrected(shift=shift), Choice(levels.MOTION, 1.0, 600.0), RESOLUTION)
    seen = p.visible
    apart = torch.einsum("tij,ntj->nti", where.matrices[:, :2], found - truth)
    assert rms(apart[seen]) < PRECISION / 2
    x, walk = where.xyz.numpy(), where.walk.numpy()
    near = np.exp(-((x[:, None] - x) ** 2).sum(-1) / (2 * 600.0**2))
    prior = np.einsum("nm,ts,ij->ntimsj", near, walk @ walk.T, np.eye(3)).reshape(COUNT * TILTS * 3, -1)
    views = np.einsum("nm,ts,tij->ntimsj", np.eye(COUNT), np.eye(TILTS), where.matrices[:, :2].numpy())
    views = views.reshape(COUNT, TILTS, 2, -1)[seen.numpy()].reshape(-1, prior.shape[1])
    data = torch.einsum("tij,ntj->nti", where.matrices[:, :2], truth)[seen].numpy().ravel()
    gain = prior @ views.T @ np.linalg.inv(views @ prior @ views.T + PRECISION**2 * np.eye(len(data)))
    expected = torch.from_numpy(gain @ data).reshape(COUNT, TILTS, 3)
    assert rms(found - expected) < 0.02 * rms(expected) and rms(expected) > 0.5


@pytest.mark.parametrize("apart", [True, False])
def test_groups_are_fitted_by_themselves(apart: bool) -> None:
    """All images of half 2 moved by a pixel: in half 1 nothing changes when halves are groups, and a lot when they aren't.

    What groups share are a tilt's noise and contrast: a moved image has the same noise, and all contrasts here are below the
    least that counts, so that steps are too short, but the same. 1e-3 Å: the power of a moved image is the same but for rounding.
    """
    given, _, _ = everything_wrong(noise=0.5)
    density = unit_map(BOX) * 25
    half = [torch.nonzero(given.half == h)[:, 0] for h in (1, 2)]
    stack = given.stack.reshape(COUNT, TILTS, BOX, BOX).copy()
    stack[half[1]] = np.roll(stack[half[1]], 1, axis=-1)
    moved = replace(given, stack=stack.reshape(-1, BOX, BOX))
    a, b = (
        one(fit([member(p, density, RESOLUTION)], half if apart else ALL, [SHIFTS], None, MEMORY))
        for p in (given, moved)
    )
    first, second = ((a.corrections.shift - b.corrections.shift)[h].abs().max() for h in half)
    turned = rotation_distance(a.rotation, b.rotation)[half[0]].max()
    assert second > 0.1 * PIXEL
    if apart:
        assert first < 1e-3 and turned < 1e-3
        assert not torch.allclose(a.corrections.shift[half[0][0]], a.corrections.shift[half[1][0]], atol=0.05)
    else:
        assert first > 0.1 * PIXEL


def test_two_kinds_share_what_tilts_have() -> None:
    """Kinds of different boxes and pixel sizes in one tilt series: eight particles of each find the shifts of the tilts together,
    each kind with its own references."""
    members, truths = [], []
    shift = 3 * normal(TILTS, 2, seed=5)
    for box, pixel, seed in ((BOX, PIXEL, 1), (32, 3.0, 2)):
        file = scattered(8, box, pixel, TILTS, seed)
        plain, density = empty(file), unit_map(box, file)
        truth = replace(still(plain), shift=still(plain).shift + shift)
        members.append(member(pictured(plain, density, truth, noise=2.0), density, RESOLUTION))
        truths.append(truth.shift)
    together = fit(members, [torch.arange(16)], [SHIFTS], None, MEMORY)
    found = torch.cat([m.particles.corrections.shift for m in together.members])
    assert (found - found[:1]).abs().max() < 1e-9  # one shift for both
    at = [
        seen_at(m.particles) - seen_at(b.particles) - t
        for m, b, t in zip(together.members, members, truths, strict=True)
    ]
    assert rms(torch.cat(at)) < 0.25 * rms(torch.cat(truths))
    evidence = joined([m.evidence(RESOLUTION, MEMORY) for m in members])
    assert evidence.seen.shape == (16, TILTS)
    torch.testing.assert_close(evidence.slope[8:], members[1].evidence(RESOLUTION, MEMORY).slope)


def test_weights_have_no_part_in_the_fit(problem: tuple[Particles, Particles, Corrections]) -> None:
    """An image that an earlier iteration left out is looked at again; particles without weight aren't."""
    weight = torch.ones(COUNT, TILTS, dtype=torch.float64)
    weight[2], weight[5, 3] = 0.5, 0.0
    given = problem[0].corrected(weight=weight)
    before = member(problem[0], unit_map(BOX), RESOLUTION).evidence(RESOLUTION, MEMORY)
    found = member(given, unit_map(BOX), RESOLUTION).evidence(RESOLUTION, MEMORY)
    assert torch.equal(found.seen, before.seen) and found.seen[5, 3]
    # the noise is measured without the image that is left out
    assert (found.cross - before.cross)[found.seen].abs().max() < 0.05 * before.cross.abs().max()
    out = given.weighted(torch.arange(COUNT).ne(7).double(), (None,) * COUNT)
    assert not member(out, unit_map(BOX), RESOLUTION).evidence(RESOLUTION, MEMORY).seen[7].any()


def test_cases_are_those_of_the_fit(problem: tuple[Particles, Particles, Corrections]) -> None:
    """Groups with their own evidence and corrections; on top of what is kept there are none yet."""
    given = problem[0].corrected(shift=problem[2].shift, turn=0.1 * normal(COUNT, TILTS, 3, seed=1))
    given = given.corrected(defocus=problem[2].defocus)
    groups = [torch.arange(COUNT)[::2], torch.arange(COUNT)[1::2]]
    m = [member(given, unit_map(BOX), RESOLUTION)]
    evidence = measured(m, MEMORY)
    for base in (None, present(m)):
        for group, case in zip(groups, cases(m, groups, base, MEMORY), strict=True):
            torch.testing.assert_close(case.scene.xyz, given.xyz[group])
            torch.testing.assert_close(case.evidence.slope, evidence.slope[group])
            expected = torch.cat(
                [given.corrections.turn, given.corrections.shift, given.corrections.defocus[..., None]], dim=-1
            )
            torch.testing.assert_close(
                case.there[..., :6], expected[group] if base is None else torch.zeros_like(expected[group])
            )
    assert torch.equal(present(m)[..., TURN], given.corrections.turn)


def test_astigmatism_adds_up_as_vectors() -> None:
    """(U-V)/2 at twice its angle, by complex numbers; defocus along the axes is the sum of both."""
    g = torch.Generator().manual_seed(3)
    lens = torch.rand(4, 5, 3, generator=g).double() * torch.tensor([300.0, 180.0, 90.0])
    more = 200 * torch.randn(4, 5, 2, generator=g).double()
    found = with_astigmatism(lens, more)
    double = torch.deg2rad(2 * lens[..., 1])
    expected = torch.polar(lens[..., 0], double) + torch.complex(more[..., 0], more[..., 1])
    torch.testing.assert_close(torch.polar(found[..., 0], torch.deg2rad(2 * found[..., 1])), expected)
    assert torch.equal(found[..., 2], lens[..., 2]) and (found[..., 0] >= 0).all()
    assert (found[..., 1] >= 0).all() and (found[..., 1] < 180).all()


def test_astigmatism_is_found() -> None:
    """The same in all images: its lens to a fifth of it, and the mean defocus stays."""
    density = unit_map(BOX)
    plain = empty(scattered(COUNT, BOX, tilts=TILTS))
    more = torch.tensor([300.0, -250.0], dtype=torch.float64).expand(COUNT, TILTS, 2)
    given = pictured(plain, density, more=more, noise=0.5)
    found = one(
        fit([member(given, density, RESOLUTION)], ALL, [Choice(levels.ASTIGMATISM, 400.0, math.inf)], None, MEMORY)
    )
    true = with_astigmatism(plain.lens, more)
    vectors = [torch.polar(x[..., 0], torch.deg2rad(2 * x[..., 1])) for x in (found.lens, true)]
    assert (vectors[0] - vectors[1]).abs().max() < 0.2 * 390
    assert not found.corrections.defocus.any() and torch.equal(found.lens[..., 2], plain.lens[..., 2])


def test_how_far_single_images_would_move() -> None:
    """The rms over images and axes of steps that are known: 1.5 Å where all tell the same, besides their noise; NaN of none."""
    truth = torch.zeros(400, 3, 8, dtype=torch.float64)
    truth[..., SHIFT] = 1.5 * normal(400, 3, 2, seed=0)
    seen = torch.ones(400, 3, dtype=torch.bool)
    seen[:, 2] = False
    sharp = told(truth, 0, tells=(1e-3,) * 8, seen=seen)
    found = rms_shift(sharp)
    # weighed by what each tells, which differs by tens of per cent: some 600 numbers in effect
    assert found[:2].tolist() == pytest.approx([1.5, 1.5], rel=4 / math.sqrt(2 * 600)) and torch.isnan(found[2])


def test_a_member_is_what_takes_part() -> None:
    density = unit_map(BOX)
    p = empty(scattered(4, BOX, tilts=TILTS))
    p = p.using(torch.tensor([True, True, False, True])).weighted(
        torch.tensor([1.0, 0.0, 1.0, 2.0]).double(), (None,) * 4
    )
    m: Member = member(p, density, RESOLUTION)
    assert m.taken.tolist() == [True, False, False, True] and m.resolution == RESOLUTION
