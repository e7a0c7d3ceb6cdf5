"""What neighbours show: patches of several particles, drawn by the forward model, less what others show in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods import extract
from libemc.methods.joint.fit import Member
from libemc.methods.refine.left_out import References
from libemc.methods.subtilts import Particles, load_batch
from libemc.methods.tiltseries_refine import neighbours
from libemc.methods.tiltseries_refine.neighbours import (
    WithoutNeighbours,
    centres,
    shown_by_others,
    with_neighbours,
    without_neighbours,
)
from libemc.numerics import fourier, slices
from libemc.numerics.slices import Band
from libemc.records import ParticleFile
from tests.by_hand import tilt_matrix
from tests.methods.joint.joint_data import PIXEL, empty, member, predicted, scattered, unit_map
from tests.methods.tiltseries_refine.raw_data import with_raw

TILTS, RESOLUTION = 5, 2 * PIXEL


def near_each_other(
    box: int, places: Sequence[tuple[float, float, float]], seed: int = 0, raw: bool = False
) -> ParticleFile:
    """Particles with centres at places (in boxes), seen in all tilts, in focus enough that little leaves their boxes."""
    file = scattered(len(places), box, tilts=TILTS, seed=seed)
    t = file.tilts
    rows = np.stack([tilt_matrix(*a)[2] for a in zip(t.axis, t.tilt, t.xtilt, strict=True)])
    particles = []
    for p, place in zip(file.particles, places, strict=True):
        centre = np.array(place) * box * PIXEL
        off = np.subtract(p.xyz, p.centre)
        defocus = 3000 + np.linspace(0, 500, TILTS) + file.defocus_handedness * rows @ centre
        changes = {
            "centre": tuple(centre.tolist()), "xyz": tuple((centre + off).tolist()), "defocus": tuple(defocus.tolist()),
            "visible": (True,) * TILTS,
        }  # fmt: skip
        particles.append(p.model_copy(update=changes))
    file = file.model_copy(update={"particles": tuple(particles)})
    return with_raw(file, seed) if raw else file


def position(p: Particles, raw: bool) -> Tensor:
    """(N, T, 2) px from the image's middle of the patches' centres, by conventions 5 to 7."""
    t = p.file.tilts
    matrices = torch.tensor(np.stack([tilt_matrix(*a) for a in zip(t.axis, t.tilt, t.xtilt, strict=True)]))
    q = torch.einsum("tij,nj->nti", matrices, p.centre)[..., :2]
    if raw:
        assert p.file.raw is not None
        q = q + torch.tensor([p.file.raw.shift_x, p.file.raw.shift_y], dtype=torch.float64).T
    return q * torch.tensor(t.magnification, dtype=torch.float64)[:, None] / p.file.pixel_size


WIDE = 3
"""Boxes of the picture that one particle is drawn in: nothing comes round its edges."""


def micrographs(
    kinds: Sequence[tuple[Particles, Tensor, Tensor]], leave: tuple[int, int] | None, raw: bool, only: bool = False
) -> list[Tensor]:
    """An image of each tilt with all particles of all kinds (particles, map, strengths), each in a picture `WIDE` times its box;
    without one of them, or with that `only`."""
    images = [np.zeros((600, 640)) for _ in range(TILTS)]
    for k, (p, density, strength) in enumerate(kinds):
        wide = WIDE * p.file.box
        far = Particles.of(p.file.model_copy(update={"box": wide}), p.stack)
        band = Band.of(wide)
        values = predicted(replace(far, corrections=p.corrections), fourier.centre_pad(density, (wide,) * 3), band)
        place = position(p, raw)
        nearest = torch.floor(place + 0.5)
        values = values * slices.shift_phases(place - nearest, band, torch.float64)
        drawn_at = slices.images_from_band(values, band).numpy()
        for i in range(len(p)):
            if (leave == (k, i)) != only:
                continue
            for image, one, (x, y) in zip(images, drawn_at[i], nearest[i].long().tolist(), strict=True):
                top, left = 300 + y - wide // 2, 320 + x - wide // 2
                image[top : top + wide, left : left + wide] += float(strength[i]) * one
    return [torch.from_numpy(image) for image in images]


def patches(
    kinds: Sequence[tuple[Particles, Tensor, Tensor]], target: int, alone: bool = False, raw: bool = False
) -> Tensor:
    """(N, T, n, n) of one kind, cut as its images are; `alone`: what each shows itself, nothing else."""
    mine = kinds[target][0]
    place, out = position(mine, raw), []
    for i in range(len(mine)):
        images = micrographs(kinds, (target, i) if alone else None, raw, only=alone)
        box, at = mine.file.box, place[i]
        out.append(torch.cat([extract.extract_tilt(m, at[t : t + 1], box, 1, "bright") for t, m in enumerate(images)]))
    return torch.stack(out).double()


def others(kinds: Sequence[tuple[Particles, Tensor, Tensor]], target: int, raw: bool = False) -> Tensor:
    """(N, T, n, n): what all but itself show in each patch."""
    return patches(kinds, target, False, raw) - patches(kinds, target, True, raw)


def size(images: Tensor) -> Tensor:
    """(N,) of all images of each particle."""
    return images.square().sum((1, 2, 3)).sqrt()


def drawn(members: Sequence[Member], strengths: Sequence[Tensor], target: int) -> Tensor:
    p = members[target].particles
    out = np.zeros((len(p) * TILTS, p.file.box, p.file.box), np.float32)
    contrast = [s[:, None].expand(-1, TILTS).double() for s in strengths]
    shown_by_others(members, contrast, target, out)
    return torch.from_numpy(out).unflatten(0, (len(p), TILTS)).double()


@pytest.mark.parametrize(("box", "raw"), [(32, False), (33, False), (32, True)])
def test_what_others_show_is_taken_off(box: int, raw: bool) -> None:
    """Three particles within a box of each other and one far away, with corrections, contrasts and halves: what is left of each
    image is what its particle shows alone, to a twentieth of what the others showed. That is what leaves a box, or comes round
    its edges, of particles that fill two thirds of it."""
    density = unit_map(box)
    file = near_each_other(box, [(0, 0, 0), (0.6, 0.1, 0.2), (-0.2, -0.55, -0.3), (4.0, 3.0, 0.0)], raw=raw)
    p = empty(file)
    g = torch.Generator().manual_seed(0)
    p = p.corrected(
        shift=3 * torch.randn(4, TILTS, 2, generator=g).double(),
        turn=3 * torch.randn(4, TILTS, 3, generator=g).double(),
        defocus=100 * torch.randn(4, TILTS, generator=g).double(),
    )
    strength = torch.tensor([1.0, 0.7, 1.3, 1.0])
    kinds = [(p, density, strength)]
    every, alone = patches(kinds, 0, False, raw), patches(kinds, 0, True, raw)
    expected = every - alone
    p = replace(p, stack=every.flatten(0, 1).float().numpy())
    m = member(p, density, RESOLUTION)
    found = drawn([m], [strength], 0)
    assert (size(expected)[:3] > 0.2 * size(alone)[:3]).all()
    assert (size(found - expected)[:3] < 0.05 * size(expected)[:3]).all(), size(found - expected) / size(expected)
    assert not found[3].any() and size(expected)[3] < 1e-3 * size(alone)[3]
    # and so it's read
    (clean,) = without_neighbours([m], [found.flatten(0, 1).numpy()])
    images = torch.from_numpy(clean.particles.stack[np.arange(4 * TILTS)]).unflatten(0, (4, TILTS)).double()
    assert (size(images - alone)[:3] < 0.05 * size(expected)[:3]).all()
    (back,) = with_neighbours([clean], [m])
    assert back.particles.stack is m.particles.stack and torch.equal(back.particles.place, m.particles.place)


def test_a_particle_alone_is_left_as_it_is() -> None:
    """To rounding: it is drawn and taken off again."""
    density = unit_map(24)
    p = empty(near_each_other(24, [(0.3, 0.2, 0.1)]))
    found = drawn([member(p, density, RESOLUTION)], [torch.ones(1)], 0)
    assert found.abs().max() < 1e-5 * float(patches([(p, density, torch.ones(1))], 0).abs().max())


def test_halves_have_their_own_references() -> None:
    """In images of particles of half 1 neighbours show the reference of half 1, whatever half they are of themselves."""
    density = unit_map(24)
    p = empty(near_each_other(24, [(0, 0, 0), (0.4, 0, 0), (0.1, 0.4, 0)]))
    p = replace(p, half=torch.tensor([1, 2, 1]))
    ones = torch.ones(3)
    one = drawn([member(p, density, RESOLUTION)], [ones], 0)
    first = drawn([member(p, density, RESOLUTION, torch.zeros_like(density))], [ones], 0)
    second = drawn([member(p, torch.zeros_like(density), RESOLUTION, density)], [ones], 0)
    torch.testing.assert_close(first[[0, 2]], one[[0, 2]])
    torch.testing.assert_close(second[1], one[1])
    assert not first[1].any() and not second[[0, 2]].any() and (one.abs().amax((1, 2, 3)) > 0.1).all()


def test_neighbours_are_drawn_without_their_own_noise() -> None:
    """Each with the reference that it's compared with itself: that of its part."""
    density = unit_map(24)
    p = empty(near_each_other(24, [(0, 0, 0), (0.4, 0, 0), (0.1, 0.4, 0)]))
    black = torch.zeros_like(density)
    parts = {p.file.name: torch.tensor([0, 1, 0])}
    lit = Member(p, References([(black, black), (density, density)], parts, RESOLUTION))
    found = drawn([lit], [torch.ones(3)], 0)
    expected = drawn([member(p, density, RESOLUTION)], [torch.tensor([0.0, 1.0, 0.0])], 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not found[1].abs().max() > 1e-5 and found[0].abs().max() > 0.1


def test_what_has_no_contrast_or_is_not_used() -> None:
    """A neighbour without contrast shows nothing; the images of particles that aren't used are let be; a tilt that isn't, too."""
    density = unit_map(24)
    file = near_each_other(24, [(0, 0, 0), (0.4, 0, 0), (0.1, 0.4, 0)])
    file = file.model_copy(update={"tilts": file.tilts.model_copy(update={"use": (True, True, False, True, True)})})
    p = empty(file)
    pair = drawn([member(p, density, RESOLUTION)], [torch.tensor([1.0, 0.0, 1.0])], 0)
    two = empty(file.model_copy(update={"particles": tuple(file.particles[i] for i in (0, 2))}))
    expected = drawn([member(two, density, RESOLUTION)], [torch.ones(2)], 0)
    torch.testing.assert_close(pair[[0, 2]], expected, rtol=0, atol=1e-5)
    # the one without contrast sees both of the others, and nothing of it is taken off
    both = others([(p, density, torch.tensor([1.0, 0.0, 1.0]))], 0)
    use = p.series.use
    assert (size((pair - both)[:, use]) < 0.05 * size(both[:, use]))[1]
    assert not pair[:, ~use].any()
    unused = drawn([member(p.using(torch.tensor([True, False, True])), density, RESOLUTION)], [torch.ones(3)], 0)
    assert not unused[1].any() and unused[0].any()


def test_another_kind_in_the_images() -> None:
    """Particles of another map, box and tilt series' order: drawn into the first kind's patches with their own, and scaled by the
    noise that stacks are in units of; of another sampling they take no part."""
    first, second = near_each_other(32, [(0, 0, 0)], raw=True), near_each_other(24, [(0.5, 0.2, 0.1)], seed=3, raw=True)
    assert first.raw is not None and second.raw is not None
    raw = second.raw.model_copy(
        update={n: getattr(first.raw, n) for n in ("shift_x", "shift_y")} | {"noise": (1.5,) * TILTS}
    )
    second = second.model_copy(update={"raw": raw})
    maps = unit_map(32), 2 * unit_map(24)
    p, q = empty(first), empty(second)
    members = [member(x, m, RESOLUTION) for x, m in zip((p, q), maps, strict=True)]
    found = drawn(members, [torch.ones(1), torch.ones(1)], 0)
    expected = others([(p, maps[0], torch.ones(1)), (q, maps[1], 1.5 * torch.ones(1))], 0, raw=True)
    assert size(expected) > 1 and size(found - expected) < 0.05 * size(expected)
    back = drawn(members, [torch.ones(1), torch.ones(1)], 1)
    expected = others([(p, maps[0], torch.ones(1) / 1.5), (q, maps[1], torch.ones(1))], 1, raw=True)
    assert size(back - expected) < 0.05 * size(expected)
    coarse = replace(q, file=second.model_copy(update={"pixel_size": 1.01 * PIXEL}))
    other = drawn([members[0], member(coarse, maps[1], RESOLUTION)], [torch.ones(1), torch.ones(1)], 0)
    assert other.abs().max() < 1e-5


@pytest.mark.parametrize("box", [24, 25])
def test_a_particle_is_drawn_as_its_images_show_it(box: int) -> None:
    """In its own box, 100 Å and more from the middle of its patches, with all corrections: against the conventions written out in
    double precision, moved to the nearest pixel; 1e-4 of the largest, for single precision."""
    density = unit_map(box)
    p = empty(scattered(4, box, tilts=TILTS))
    g = torch.Generator().manual_seed(2)
    p = p.moved(p.rotation, p.xyz + 150 * torch.randn(4, 3, generator=g).double(), p.score).corrected(
        shift=3 * torch.randn(4, TILTS, 2, generator=g).double(),
        turn=3 * torch.randn(4, TILTS, 3, generator=g).double(),
        defocus=300 * torch.randn(4, TILTS, generator=g).double(),
    )
    contrast, scale = 0.5 + torch.rand(4, TILTS, generator=g).double(), torch.linspace(1, 2, TILTS).double()
    m = member(p, density, 10.0)
    brush = neighbours._Brush.of(m, contrast, False, box, scale)
    t = p.file.tilts
    matrices = torch.tensor(np.stack([tilt_matrix(*a) for a in zip(t.axis, t.tilt, t.xtilt, strict=True)]))
    q = torch.einsum("tij,nj->nti", matrices, p.xyz - p.centre)[..., :2] + p.corrections.shift
    moved = q * torch.tensor(t.magnification, dtype=torch.float64)[:, None] / PIXEL
    place = position(p, False) + moved
    band = Band.of(box, box * PIXEL / 10.0)
    nearest = torch.floor(place + 0.5)
    values = predicted(p, density, band) * slices.shift_phases(place - nearest - moved, band, torch.float64)
    expected = slices.images_from_band(values, band) * (contrast * scale)[..., None, None]
    for tilt in range(TILTS):
        images, at = brush.patches(torch.arange(4), tilt, 1)
        assert torch.equal(at, nearest[:, tilt].long())
        assert (images - expected[:, tilt]).abs().max() < 1e-4 * expected.abs().max()


def test_pasting_over_edges() -> None:
    """Patches over each corner, far outside, and inside, added pixel by pixel where they lie on the canvas; and taken off."""
    rng = np.random.default_rng(0)
    rows, columns, n = 12, 16, 5
    at = torch.tensor([[0, 0], [-9, -7], [8, 6], [-8, 5], [7, -7], [40, 0], [0, -40], [1, -2]])
    patches = torch.from_numpy(rng.standard_normal((len(at), n, n)).astype(np.float32))
    origin = torch.tensor([1.0, -1.0])
    canvas, expected = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), np.float32)
    neighbours._paste(canvas, patches, at, origin, 1)
    for patch, (x, y) in zip(patches.numpy(), (at - origin.long()).tolist(), strict=True):
        for j in range(n):
            for i in range(n):
                row, column = rows // 2 + y + j - n // 2, columns // 2 + x + i - n // 2
                if 0 <= row < rows and 0 <= column < columns:
                    expected[row, column] += patch[j, i]
    np.testing.assert_array_equal(canvas, expected)
    assert canvas[0, 0] and canvas[-1, -1] and canvas[0, -1] and canvas[-1, 0]
    neighbours._paste(canvas, patches, at, origin, -1)
    assert np.abs(canvas).max() < 1e-6


def test_a_stack_less_something() -> None:
    """Images of particles in another order than in their stack, one by one; batches are read of it as of any stack."""
    rng = np.random.default_rng(1)
    density = unit_map(24)
    p = empty(near_each_other(24, [(0, 0, 0), (0.4, 0, 0), (0.1, 0.4, 0)]))
    stack = rng.standard_normal((5 * TILTS, 24, 24)).astype(np.float16)
    others = rng.standard_normal((3 * TILTS, 24, 24)).astype(np.float16)
    p = replace(p, stack=stack, place=torch.tensor([4, 0, 2]))
    expected = stack.astype(np.float32).reshape(5, TILTS, 24, 24)[[4, 0, 2]] - others.reshape(3, TILTS, 24, 24)
    seen = WithoutNeighbours(stack, p.place.numpy(), TILTS, others)
    np.testing.assert_array_equal(seen[np.array([7, 0, 14])], expected.reshape(-1, 24, 24)[[7, 0, 14]])
    (clean,) = without_neighbours([member(p, density, RESOLUTION)], [others])
    plain = replace(p, stack=expected.reshape(-1, 24, 24), place=torch.arange(3))
    band = Band.of(24)
    a, b = (load_batch(x, torch.tensor([2, 0]), band) for x in (clean.particles, plain))
    torch.testing.assert_close(a.values, b.values)


@pytest.mark.parametrize("raw", [True, False])
def test_where_patches_are(raw: bool) -> None:
    """By the geometry that they were cut with; without it by the present one, but for the shifts."""
    p = empty(near_each_other(24, [(0.3, -0.2, 0.5), (2.0, 1.0, -0.4)], raw=True))
    torch.testing.assert_close(centres(p, raw), position(p, raw))
