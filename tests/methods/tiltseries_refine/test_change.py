"""What a fit found becomes geometry and CTF: no image moves by it, records say the same as the particles, and no more is left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods.joint import levels
from libemc.methods.joint.evidence import ASTIGMATISM, DEFOCUS, GEOMETRY, SHIFT, TURN
from libemc.methods.joint.fit import present, scene_of, with_astigmatism
from libemc.methods.joint.levels import Choice, Scene
from libemc.methods.joint.terms import total
from libemc.methods.subtilts import Field, Particles, TiltGeometry, load_batch
from libemc.methods.tiltseries_refine.change import Bending, Change, aligned, deformation_of, focused, settled
from libemc.numerics.rotations import tilt_matrices
from libemc.numerics.slices import Band
from libemc.records import Alignment, Ctf, Deformation, ParticleFile, RawImages
from tests.methods.joint.joint_data import EXTENT, empty, member, scattered
from tests.methods.tiltseries_refine.raw_data import with_raw

COUNT, TILTS, BOX = 12, 7, 24
COMMON = (
    Choice(levels.SHIFT, 8.0, math.inf),
    Choice(levels.ANGLES, 0.3, math.inf),
    Choice(levels.MAGNIFICATION, 0.1, math.inf),
    Choice(levels.DEFOCUS, 200.0, math.inf),
    Choice(levels.ASTIGMATISM, 200.0, math.inf),
)
MOTION = Choice(levels.MOTION, 0.8, 600.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).double()


@dataclass(frozen=True)
class Fitted:
    """Particles with all of a fit in their corrections: what it began with, the change, and the motion that's beside it."""

    before: Particles
    particles: Particles
    change: Change
    scene: Scene
    motion: Tensor


def fitted(
    raw: bool, choices: Sequence[Choice] = COMMON, seed: int = 0, own_lens: bool = False, start: Particles | None = None
) -> Fitted:
    """As `fit` leaves them, of terms with random numbers."""
    if start is None:
        file = scattered(COUNT, BOX, tilts=TILTS, seed=seed)
        file = with_raw(file, seed) if raw else file
        if own_lens:
            g = torch.Generator().manual_seed(seed)
            own = [
                torch.rand(2, TILTS, generator=g).double() * torch.tensor([[300.0], [180.0]]) for _ in file.particles
            ]
            file = file.model_copy(
                update={
                    "particles": tuple(
                        p.model_copy(update={"astigmatism": tuple(a.tolist()), "astigmatism_angle": tuple(b.tolist())})
                        if k % 2
                        else p
                        for k, (p, (a, b)) in enumerate(zip(file.particles, own, strict=True))
                    )
                }
            )
        start = empty(file)
    scene = scene_of([member(start, torch.zeros(BOX, BOX, BOX), 10.0)])
    numbers = {c.level.name: normal(*scene.term(c).shape, seed=seed) for c in (*choices, MOTION)}
    geometry = [c for c in (*choices, MOTION) if not c.level.lens]
    lens = [c for c in choices if c.level.lens]
    moved = total([scene.term(c) for c in geometry], [numbers[c.level.name] for c in geometry])
    motion = scene.term(MOTION).forward(numbers[MOTION.level.name])[..., SHIFT]
    u = present([member(start, torch.zeros(BOX, BOX, BOX), 10.0)])
    u[..., GEOMETRY] += moved
    for c in lens:
        u[..., 5:8] += scene.term(c).forward(numbers[c.level.name])
    p = start.corrected(
        turn=u[..., TURN].clone(), shift=u[..., SHIFT] + start.realigned(), defocus=u[..., DEFOCUS][..., 0].clone()
    )
    p = replace(p, lens=with_astigmatism(p.lens, u[..., ASTIGMATISM]))
    return Fitted(start, p, Change.of(choices, numbers, {}, TILTS), scene, motion)


def seen(p: Particles) -> tuple[Tensor, Tensor, Tensor]:
    """Of all images that are visible: where in the patch (px), at which matrix, and with which CTF·dose."""
    batch = load_batch(p, torch.arange(COUNT), Band.of(BOX, 11.0))
    return batch.shift, batch.matrices(), batch.transfer


def risen(p: Particles, before: Particles) -> Particles:
    """`before` with the defocus that particles have at the heights that the tilts of `p` see them at."""
    height = torch.einsum("tj,nj->nt", p.series.matrices[:, 2] - before.series.matrices[:, 2], before.xyz)
    return replace(before, defocus=before.defocus + before.series.handedness * height)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("which", ["all", *(c.level.name for c in COMMON)])
def test_no_image_moves(raw: bool, which: str) -> None:
    """Every image shows its particle where, how and through which lens it did, whatever of it is geometry now; but that the
    defocus follows the height at which a turned tilt sees the particle. To rounding, of single precision in the transfer."""
    f = fitted(raw, [c for c in COMMON if which in ("all", c.level.name)])
    found = settled(f.particles, f.change)
    (shift, matrices, transfer), (shift0, matrices0, _) = seen(found), seen(f.particles)
    torch.testing.assert_close(shift, shift0, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrices, matrices0, rtol=0, atol=1e-9)
    torch.testing.assert_close(transfer, seen(risen(found, f.particles))[2], rtol=0, atol=1e-4)
    assert torch.equal(found.xyz, f.particles.xyz) and torch.equal(found.centre, f.particles.centre)
    # and as it is read again from its file, but for the last digits of corrections
    again = Particles.of(ParticleFile.model_validate_json(found.to_file().model_dump_json(by_alias=True)), found.stack)
    shift1, matrices1, transfer1 = seen(again)
    torch.testing.assert_close(shift1, shift, rtol=0, atol=1e-3)
    torch.testing.assert_close(matrices1, matrices, rtol=0, atol=1e-5)
    torch.testing.assert_close(transfer1, transfer, rtol=0, atol=1e-3)


def test_turns_of_single_images_stay_with_them() -> None:
    """Beside those of tilts: every image shows its particle turned as before, to the last digit. They are what they were, but for
    half of the product of both turns in radians, by which turns don't commute."""
    f = fitted(True)
    own = 2 * normal(COUNT, TILTS, 3, seed=9)
    p = f.particles.corrected(turn=f.particles.corrections.turn + own)
    found = settled(p, f.change)
    torch.testing.assert_close(seen(found)[1], seen(p)[1], rtol=0, atol=1e-9)
    size = 0.5 * float(own.norm(dim=-1).max() * torch.deg2rad(f.change.turn).norm(dim=-1).max())
    assert (found.corrections.turn - own).norm(dim=-1).max() < 1.5 * size < 0.1


def test_particles_with_lenses_of_their_own() -> None:
    """Half of them: the change is added to each particle's, to the tilts', and in the record of both; also where the fit's lens
    was not kept, since it isn't in a particle's record until then."""
    f = fitted(True, seed=1, own_lens=True)
    kept = Particles.of(f.particles.to_file(), f.particles.stack)
    more = f.change.astigmatism.expand(COUNT, TILTS, 2)
    expected = with_astigmatism(f.before.lens, more)
    assert f.change.astigmatism.abs().min() > 50
    for p in (f.particles, kept):
        found = settled(p, f.change)
        again = Particles.of(found.to_file(), found.stack)
        for lens in (found.lens, again.lens):
            torch.testing.assert_close(lens, expected, rtol=0, atol=1e-6)
    tilts = settled(f.particles, f.change).series
    old = f.before.series
    own = with_astigmatism(torch.stack([old.astigmatism, old.astigmatism_angle, old.phase_shift], dim=-1), more[0])
    torch.testing.assert_close(torch.stack([tilts.astigmatism, tilts.astigmatism_angle], dim=-1), own[:, :2])


def alignment_of(file: ParticleFile) -> Alignment:
    assert file.raw is not None
    names = ("axis", "tilt", "xtilt", "shift_x", "shift_y", "magnification")
    return Alignment(**{n: getattr(file.raw, n) for n in names})


def second_order(change: Change) -> float:
    """Å: points lie within 1000 Å, shifts come to 30 Å; products of turns (radians), of scales, and of these with shifts."""
    turn = float(torch.deg2rad(change.turn).norm(dim=1).max())
    scale = float((change.magnification - 1).abs().max())
    return 1000 * (turn + scale) ** 2 + 30 * (turn + scale)


def test_the_alignment_sees_what_the_corrections_said() -> None:
    """Projected by the new alignment, a particle is where the old one with its corrections saw it, less its motion: to what is of
    second order in turns and scales."""
    f = fitted(True)
    old = TiltGeometry.of(alignment_of(f.before.file), f.before.file.tilts.use)
    new = TiltGeometry.of(
        aligned(alignment_of(f.before.file), f.before.file.tilts.use, f.change, None), old.use.tolist()
    )
    own = f.particles.corrections.shift - f.motion
    expected = old.project(f.before.xyz)[0] + old.magnification[:, None] * own
    found = new.project(f.before.xyz)[0]
    apart, moved = ((found - x).abs().max() for x in (expected, old.project(f.before.xyz)[0]))
    assert apart < second_order(f.change) < 0.2 * moved, (apart, second_order(f.change), moved)
    # what is of second order falls with the square
    small = replace(
        f.change,
        shift=f.change.shift / 10,
        turn=f.change.turn / 10,
        magnification=1 + (f.change.magnification - 1) / 10,
    )
    near = TiltGeometry.of(aligned(alignment_of(f.before.file), f.before.file.tilts.use, small, None), old.use.tolist())
    tenth = old.project(f.before.xyz)[0] + old.magnification[:, None] * own / 10
    assert (near.project(f.before.xyz)[0] - tenth).abs().max() < 0.02 * apart


def test_settled_particles_have_the_new_alignment() -> None:
    """The record's alignment and the particles' tilts say one thing; where the new geometry projects a particle, with what of
    corrections is left, is where its patch shows it. What is left is its motion."""
    f = fitted(True)
    old = alignment_of(f.before.file)
    use = f.before.file.tilts.use
    new = aligned(old, use, f.change, None)
    found = settled(f.particles, f.change)
    for name in ("axis", "tilt", "xtilt", "magnification", "shift_x", "shift_y"):
        np.testing.assert_allclose(getattr(found.file.tilts, name), getattr(new, name), atol=1e-9)
    assert found.file.raw == f.before.file.raw
    left = present([member(found, torch.zeros(BOX, BOX, BOX), 10.0)])
    was = f.particles.realigned()
    assert not was.any() and found.realigned().any()
    geometry = TiltGeometry.of(new, use)
    in_image = geometry.project(found.xyz)[0] + geometry.magnification[:, None] * left[..., SHIFT]
    middle = TiltGeometry.of(old, use).project(found.centre)[0]
    q = torch.einsum("tij,nj->nti", found.series.matrices[:, :2], found.xyz - found.centre)
    in_patch = found.series.magnification[:, None] * (q + found.corrections.shift)
    torch.testing.assert_close(in_image, middle + in_patch, rtol=0, atol=1e-8)
    assert (left[..., SHIFT] - f.motion).abs().max() < second_order(f.change)
    assert not left[..., TURN].any() and left[..., DEFOCUS].abs().max() < 1e-9


def test_a_second_round_is_on_top() -> None:
    """Settled, fitted again, settled: no image moves, and both changes are in the geometry, which starts from where the patches
    were cut; as if both had come at once, to second order."""
    one = fitted(True, seed=1)
    first = settled(one.particles, one.change)
    two = fitted(True, seed=2, start=first)
    second = settled(two.particles, two.change)
    for a, b in zip(seen(second)[:2], seen(two.particles)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    old = alignment_of(one.before.file)
    use = one.before.file.tilts.use
    twice = aligned(aligned(old, use, one.change, None), use, two.change, None)
    for name in ("axis", "tilt", "xtilt", "magnification", "shift_x", "shift_y"):
        np.testing.assert_allclose(getattr(second.file.tilts, name), getattr(twice, name), atol=1e-9)
    once = aligned(old, use, one.change.then(two.change), None)
    points = one.before.xyz
    apart, moved = (
        (TiltGeometry.of(twice, use).project(points)[0] - TiltGeometry.of(x, use).project(points)[0]).abs().max()
        for x in (once, old)
    )
    assert apart < second_order(one.change) + second_order(two.change) and apart < 0.1 * moved


def test_changes_after_another() -> None:
    """What adds up and what multiplies. Astigmatism is found anew by each fit, since particles' records don't keep it meanwhile;
    errors are the last one's."""
    a, b = (fitted(False, seed=s).change for s in (3, 4))
    b = replace(b, shift_error=b.shift_error + 1)
    both = a.then(b)
    torch.testing.assert_close(both.shift, a.shift + b.shift)
    torch.testing.assert_close(both.turn, a.turn + b.turn)
    torch.testing.assert_close(both.magnification, a.magnification * b.magnification)
    torch.testing.assert_close(both.defocus, a.defocus + b.defocus)
    assert torch.equal(both.astigmatism, b.astigmatism) and torch.equal(both.shift_error, b.shift_error)
    none = Change.none(TILTS)
    for c in (none.then(a), a):
        assert json.dumps(c.table()) == json.dumps(a.table())


def test_no_change_is_none() -> None:
    f = fitted(True, [])
    assert json.dumps(f.change.table()) == json.dumps(Change.none(TILTS).table())
    found = settled(f.particles, f.change)
    torch.testing.assert_close(found.corrections.shift, f.particles.corrections.shift)
    torch.testing.assert_close(found.defocus, f.particles.defocus)
    old = alignment_of(f.before.file)
    new = aligned(old, f.before.file.tilts.use, f.change, None)
    for name in ("axis", "tilt", "xtilt", "shift_x", "shift_y", "magnification"):
        np.testing.assert_allclose(getattr(new, name), getattr(old, name), atol=1e-9)
    plain = old.model_copy(update={"magnification": None})
    assert aligned(plain, f.before.file.tilts.use, f.change, None).magnification is None


def test_tables_are_read_again() -> None:
    """Through JSON, exactly; bendings by what they do."""
    f = fitted(True)
    back = Change.from_table(json.loads(json.dumps(f.change.table())))
    assert all(torch.equal(getattr(back, n), getattr(f.change, n)) for n in f.change.table())
    for bending in bendings_of(f.scene):
        again = Bending.from_table(json.loads(json.dumps(bending.table())))
        places = torch.cat([f.scene.xyz, 200 * normal(5, 3)])
        for tilt, matrix in enumerate(f.scene.matrices):
            torch.testing.assert_close(again.at(places, tilt, matrix), bending.at(places, tilt, matrix))


def test_a_ctf_has_the_change() -> None:
    """The mean of U and V is the defocus, their difference a vector at twice its angle."""
    rng = np.random.default_rng(0)
    u = 20000 + 500 * rng.random(TILTS)
    old = Ctf(
        defocus_u=tuple(u), defocus_v=tuple(u - 300), angle=tuple(170 * rng.random(TILTS)), phase_shift=(3.0,) * TILTS
    )
    change = replace(fitted(False).change, defocus_error=10 + normal(TILTS).abs())
    new = focused(old, change, 1, (0.1, -0.2))
    mean, before = (np.add(c.defocus_u, c.defocus_v) / 2 for c in (new, old))
    np.testing.assert_allclose(mean, before + change.defocus.numpy())
    vectors = [np.subtract(c.defocus_u, c.defocus_v) / 2 * np.exp(2j * np.radians(c.angle)) for c in (new, old)]
    np.testing.assert_allclose(vectors[0], vectors[1] + complex(*change.astigmatism.tolist()))
    assert (np.subtract(new.defocus_u, new.defocus_v) >= 0).all() and new.phase_shift == old.phase_shift
    assert new.error == tuple(change.defocus_error.tolist()) and new.defocus_handedness == 1
    assert new.beam_tilt == (0.1, -0.2) and focused(old, Change.none(TILTS), -1, None).error == old.error


def test_numbers_of_levels_are_in_their_units() -> None:
    """Against what the terms themselves do to a particle 100 Å from the axis."""
    f = fitted(False)
    scene = replace(f.scene, xyz=torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float64))
    numbers = {c.level.name: normal(*scene.term(c).shape, seed=1) for c in COMMON}
    errors = {name: w.abs() for name, w in numbers.items()}
    change = Change.of(COMMON, numbers, errors, TILTS)
    by = {c.level.name: scene.term(c).forward(numbers[c.level.name])[0] for c in COMMON}
    torch.testing.assert_close(by["shift of tilts"][:, SHIFT], change.shift)
    torch.testing.assert_close(by["angles of tilts"][:, TURN], change.turn)
    q = scene.matrices[:, :2] @ scene.xyz[0]
    torch.testing.assert_close(by["magnification of tilts"][:, SHIFT], q * (change.magnification - 1)[:, None])
    torch.testing.assert_close(by["defocus of tilts"][:, 0], change.defocus)
    torch.testing.assert_close(by["astigmatism"][:, 1:], change.astigmatism.expand(TILTS, 2))
    for value, error in (
        (change.shift, change.shift_error),
        (change.turn, change.turn_error),
        (change.defocus, change.defocus_error),
        (change.astigmatism, change.astigmatism_error),
    ):
        torch.testing.assert_close(error, value.abs())


def bendings_of(scene: Scene) -> list[Bending]:
    choices = (MOTION, Choice(levels.FIELD, 2.0, 600.0))
    found = [Bending.of(scene, c, normal(*scene.term(c).shape, seed=3)) for c in choices]
    assert Bending.of(scene, Choice(levels.MOTION, 1.0, 0.0), torch.zeros(1)) is None
    assert Bending.of(scene, Choice(levels.SHIFT, 1.0, math.inf), torch.zeros(1)) is None
    return [b for b in found if b is not None]


@pytest.mark.parametrize("known", [False, True])
def test_a_deformation_shows_what_bends(known: bool) -> None:
    """At the places of particles in the middle of the specimen, the field over each image is what their terms said, to a
    twentieth: nodes lie half as far apart as neighbours are alike. A deformation that there was is still there."""
    f = fitted(True)
    flat = replace(f.scene, xyz=f.scene.xyz * torch.tensor([0.8, 0.8, 0.0]))
    bendings = bendings_of(flat)
    choices = (MOTION, Choice(levels.FIELD, 2.0, 600.0))
    terms = [flat.term(c) for c in choices]
    moved = total(terms, [normal(*t.shape, seed=3) for t in terms])[..., SHIFT]
    geometry = TiltGeometry.of(alignment_of(f.before.file), f.before.file.tilts.use)
    geometry = replace(geometry, magnification=1.2 * geometry.magnification)
    field = (EXTENT[0] + 300.0, EXTENT[1] + 300.0)
    places = geometry.project(flat.xyz)[0]
    expected = geometry.magnification[:, None] * moved
    if known:
        g = normal(2, TILTS, 9, seed=5)
        dx, dy = (tuple(tuple(t) for t in g[k].tolist()) for k in (0, 1))
        deformation = Deformation(rows=3, columns=3, field=field, dx=dx, dy=dy)
        geometry = replace(geometry, deformation=Field.of(deformation))
        expected = expected + Field.of(deformation)(places)
    found = deformation_of(bendings, geometry, 0.0, field)
    assert found is not None and found.field == field
    seen_at = Field.of(found)(places)
    rms, size = ((x).square().mean().sqrt() for x in (seen_at - expected, expected))
    assert rms < 0.05 * size, (rms, size)
    assert deformation_of([], geometry, 0.0, field) is None


def test_points_at_their_height() -> None:
    """The field of particles 150 Å up is that of points 150 Å up: what bends is followed to where a tilted image sees them."""
    f = fitted(True)
    high = replace(f.scene, xyz=torch.cat([f.scene.xyz[:, :2] * 0.8, torch.full((COUNT, 1), 150.0).double()], dim=1))
    (motion,) = [b for b in bendings_of(high) if b.solid]
    geometry = TiltGeometry.of(alignment_of(f.before.file), f.before.file.tilts.use)
    field = (EXTENT[0] + 300.0, EXTENT[1] + 300.0)
    term = high.term(MOTION)
    expected = geometry.magnification[:, None] * term.forward(normal(*term.shape, seed=3))[..., SHIFT]
    places = geometry.project(high.xyz)[0]
    wrong = []
    for height in (150.0, -150.0):
        found = deformation_of([motion], geometry, height, field)
        assert found is not None
        wrong.append(float((Field.of(found)(places) - expected).square().mean().sqrt()))
    assert wrong[0] < 0.05 * float(expected.square().mean().sqrt()) and wrong[0] < 0.3 * wrong[1]


def test_raw_images_say_how_patches_were_cut() -> None:
    file = with_raw(scattered(3, BOX, tilts=TILTS), 0)
    assert isinstance(file.raw, RawImages) and any(file.raw.shift_x)


def test_angles_change_by_the_turn_and_its_error() -> None:
    """Of an untilted image a turn about z is one of the axis, about the axis' own direction one of the tilt; errors likewise,
    to first order (0.1° of 0.1 rad)."""
    tilts = 5
    matrices = tilt_matrices(torch.full((tilts,), 90.0), torch.zeros(tilts), torch.zeros(tilts))
    turn = torch.zeros(tilts, 3, dtype=torch.float64)
    turn[0, 2], turn[1, 0] = 0.1, 0.1  # with the axis at 90° the tilt axis lies along -x
    change = replace(Change.none(tilts), turn=turn, turn_error=torch.full((tilts, 3), 0.01, dtype=torch.float64))
    moved, error = change.angles(matrices)
    torch.testing.assert_close(moved[:, 0], torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(moved[:, 1], torch.tensor([0.0, -0.1, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(error, torch.full((3, tilts), 0.01, dtype=torch.float64), rtol=1e-3, atol=0)
