"""Corrections of single images: kept in records, and followed wherever images are read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from libemc.methods.subtilts import DIGITS, Corrections, Particles, load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.slices import Band
from libemc.records import ParticleFile
from tests.methods.joint.joint_data import PIXEL, empty, pictured, predicted, scattered, still, unit_map
from tests.methods.subtilt_data import premultiplied

COUNT, TILTS = 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).double()


def some(particles: Particles, seed: int = 0) -> Corrections:
    """Of everything, one image without weight and some without a score."""
    n, t = len(particles), len(particles.series.use)
    weight = 0.5 + torch.rand(n, t, generator=torch.Generator().manual_seed(seed)).double()
    weight[1, 3] = 0.0
    score = normal(n, t, seed=seed)
    score[0, ::2] = math.nan
    return Corrections(3 * normal(n, t, 2), 2 * normal(n, t, 3), 200 * normal(n, t), weight, score)


def noisy(box: int = 24, seed: int = 0) -> Particles:
    return pictured(empty(scattered(COUNT, box, tilts=TILTS, seed=seed)), unit_map(box), noise=1.0, seed=seed)


def test_they_are_kept_in_the_record() -> None:
    """To half of the last digit; through JSON as well; and particles without any have no section."""
    p = noisy()
    own = some(p)
    for values in (own.shift, own.turn, own.defocus, own.weight, own.score):
        values[2] = 0.0
    own.weight[2], own.score[2] = 1.0, math.nan
    found = replace(p, corrections=own).to_file()
    assert [x.subtilt is None for x in found.particles] == [False, False, True, False]
    read = ParticleFile.model_validate_json(found.model_dump_json(by_alias=True))
    back = Corrections.of(read.particles, TILTS)
    for name, digits in DIGITS.items():
        torch.testing.assert_close(
            getattr(back, name), getattr(own, name), rtol=0, atol=0.5 * 10**-digits + 1e-9, equal_nan=True
        )
    # a second time there's nothing left to round
    again = Corrections.of(Particles.of(read, p.stack).to_file().particles, TILTS)
    for name in DIGITS:
        torch.testing.assert_close(getattr(again, name), getattr(back, name), rtol=0, atol=0, equal_nan=True)


def test_no_corrections_are_none() -> None:
    p = noisy()
    none = Corrections.none(COUNT, TILTS)
    assert none.to_subtilts() == [None] * COUNT
    assert not none.shift.any() and not none.turn.any() and not none.defocus.any()
    assert (none.weight == 1).all() and torch.isnan(none.score).all()
    assert none.shift.shape == (COUNT, TILTS, 2) and none.turn.shape == (COUNT, TILTS, 3)
    for name in DIGITS:
        torch.testing.assert_close(getattr(p.corrections, name), getattr(none, name), equal_nan=True)


class Watched:
    """A stack that remembers what was read of it."""

    def __init__(self, stack: Any) -> None:
        self.stack, self.read = stack, set[int]()

    def __getitem__(self, number: Any) -> Any:
        self.read |= set(number.tolist())
        return self.stack[number]


@pytest.mark.parametrize("kind", ["plain", "premultiplied"])
def test_weights_scale_and_what_has_none_is_not_read(kind: str) -> None:
    """A weight w multiplies values by w and the transfer by its root, so that it is that of the residual's square."""
    p = noisy()
    if kind == "premultiplied":
        p = premultiplied(p)
    weight = some(p).weight
    band = Band.of(24, 10.0)
    noise = noise_spectrum(p, band)
    stack = Watched(p.stack)
    for given in (None, noise):
        plain = load_batch(p, torch.arange(COUNT), band, given, detailed=True)
        found = load_batch(
            replace(p, stack=stack).corrected(weight=weight), torch.arange(COUNT), band, given, detailed=True
        )
        kept = weight[plain.owner, plain.tilt] > 0
        assert int((~kept).sum()) == 1 and len(found.owner) == int(kept.sum())
        w = weight[found.owner, found.tilt].float()[:, None]
        torch.testing.assert_close(found.values, plain.values[kept] * w)
        torch.testing.assert_close(found.transfer, plain.transfer[kept] * w.sqrt())
        assert found.detail is not None and plain.detail is not None
        torch.testing.assert_close(found.detail.power, plain.detail.power[kept])
        if found.detail.values is not None and found.detail.transfer is not None:
            torch.testing.assert_close(found.detail.values, plain.detail.values[kept] * w)
            torch.testing.assert_close(found.detail.transfer, plain.detail.transfer[kept] * w.sqrt())
    numbers = {int(n) for n in p.numbers(*torch.nonzero(p.visible & p.series.use, as_tuple=True))}
    assert stack.read == numbers - {1 * TILTS + 3}


@pytest.mark.parametrize("box", [24, 25])
def test_what_a_batch_predicts_is_what_an_image_shows(box: int) -> None:
    """Shift, turn and defocus of every image, in the batch's matrices, shifts and transfer: its prediction against the
    conventions written out in double precision; 1e-4 of the largest coefficient, for single precision."""
    p = noisy(box)
    own = some(p)
    p = p.corrected(shift=own.shift, turn=own.turn, defocus=own.defocus)
    band, density = Band.of(box, 10.0), unit_map(box)
    batch = load_batch(p, torch.arange(COUNT), band)
    volume = slices.FourierVolume.from_map(density, radius=10.0)
    cut = slices.extract_slices(volume, batch.matrices(), band, batch.magnification)
    found = cut * batch.transfer * slices.shift_phases(batch.shift, band)
    expected = predicted(p, density, band)[batch.owner, batch.tilt]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_turn_is_one_of_the_image() -> None:
    """About its z it turns the picture counter-clockwise, as convention 5's axis does: the matrix by scipy, in front of T·R."""
    p = noisy()
    turn = torch.zeros(COUNT, TILTS, 3, dtype=torch.float64)
    turn[..., 2] = 90.0
    batch = load_batch(p.corrected(turn=turn), torch.arange(COUNT), Band.of(24, 8.0))
    plain = load_batch(p, torch.arange(COUNT), Band.of(24, 8.0))
    # x of the image was y's negative: a point at (1, 0) is now seen at (0, 1)
    before, after = (b.matrices()[:, :2, :] for b in (plain, batch))
    torch.testing.assert_close(after[:, 0], -before[:, 1])
    torch.testing.assert_close(after[:, 1], before[:, 0])
    one = still(p).turn
    one[..., 0], one[..., 1] = 1.0, -2.0
    both = load_batch(p.corrected(turn=one), torch.arange(COUNT), Band.of(24, 8.0))
    turned = torch.from_numpy(Rotation.from_rotvec([1.0, -2.0, 0.0], degrees=True).as_matrix())
    torch.testing.assert_close(both.matrices(), turned @ plain.matrices())


def test_a_defocus_is_added_to_that_of_the_place() -> None:
    """As if the particle's own had been that, but nothing else changes."""
    p = noisy()
    more = 300 * normal(COUNT, TILTS)
    band = Band.of(24, 10.0)
    found = load_batch(p.corrected(defocus=more), torch.arange(COUNT), band, detailed=True)
    other = load_batch(replace(p, defocus=p.defocus + more), torch.arange(COUNT), band, detailed=True)
    torch.testing.assert_close(found.transfer, other.transfer)
    torch.testing.assert_close(found.values, other.values)
    assert torch.equal(found.shift, other.shift)
    plain = load_batch(p, torch.arange(COUNT), band, detailed=True)
    assert (found.transfer - plain.transfer).abs().max() > 0.05
    # the detail is the slope by it
    h = 1.0
    up, down = (
        load_batch(p.corrected(defocus=more + s * h), torch.arange(COUNT), band).transfer.double() for s in (1, -1)
    )
    assert found.detail is not None and found.detail.transfer is not None
    slope = (up - down) / (2 * h)
    # single precision of a phase of some ten radians, over a step of 1 Å
    assert (found.detail.transfer - slope).abs().max() < 5e-6 < 0.05 * slope.abs().max()


@pytest.mark.parametrize("kind", ["plain", "premultiplied"])
@pytest.mark.parametrize("box", [24, 25])
def test_a_beam_tilt_is_taken_off_the_images(box: int, kind: str) -> None:
    """Images that were multiplied by its phase, written out as in convention 11, in a record that says so, are read as those
    without: 1e-4 of the largest, for images in single precision."""
    tilt = (1.5, -2.5)
    p = noisy(box)
    if kind == "premultiplied":
        p = premultiplied(p)
    band = Band.of(box, 10.0)
    whole = Band.of(box)
    kx, ky = (k.double() / (box * PIXEL) for k in (whole.kx, whole.ky))
    phase = -2 * math.pi * 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * (kx * tilt[0] + ky * tilt[1]) * 1e-3
    images = torch.from_numpy(np.asarray(p.stack, np.float64))
    spectra = slices.spectra_of_images(images, whole) * torch.polar(torch.ones_like(phase), phase)
    tilted = slices.images_from_band(spectra, whole).numpy()
    optics = p.file.optics.model_copy(update={"beam_tilt": tilt})
    told = Particles.of(p.file.model_copy(update={"optics": optics}), tilted)
    told = replace(told, place=p.place)
    found, expected = (load_batch(x, torch.arange(COUNT), band, detailed=True) for x in (told, p))
    untold = load_batch(replace(p, stack=tilted), torch.arange(COUNT), band)
    largest = expected.values.abs().max()
    assert (found.values - expected.values).abs().max() < 1e-4 * largest
    assert (untold.values - expected.values).abs().max() > 0.02 * largest
    if kind == "plain":
        assert found.detail is not None and found.detail.values is not None
        assert expected.detail is not None and expected.detail.values is not None
        largest = expected.detail.values.abs().max()
        assert (found.detail.values - expected.detail.values).abs().max() < 1e-4 * largest
