"""Coarse alignment of slabs whose geometry is known: from the images and nominal angles to shifts, axis and doubts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods.align import coarse
from libemc.methods.align.axis import Pairs
from libemc.methods.align.images import SMALL_SIZE
from libemc.numerics.rotations import tilt_matrices
from tests.methods.align.slab_series import PIXEL_SIZE, SHAPE, TILTS, about, prepared, slab_images, slab_series

EVERY = [True] * len(TILTS)


def shift_error(found, shift, matrices, use):
    """RMS distance (Å) of shifts, after the best translation of the specimen: it can't be seen."""
    design = matrices[use][:, :2].reshape(-1, 3)
    difference = (found - shift)[use].reshape(-1)
    moved = design @ np.linalg.lstsq(design, difference, rcond=None)[0]
    return float(np.sqrt(2 * np.mean((difference - moved) ** 2)))


def axis_error(found, axis):
    return abs((found - axis + 90) % 180 - 90)


@pytest.fixture(scope="module")
def series():
    return slab_series()


def start(images, axis=None, use=EVERY, order=None, tilt=TILTS):
    return coarse.start(images.__getitem__, images.shape, PIXEL_SIZE, list(tilt), use, axis, order)


def test_shifts_are_found(series):
    images, shift, matrices = series
    found = start(images, 35.0)
    assert found.use.all()
    assert found.reason == (None,) * len(TILTS)
    assert not found.hand_open
    assert np.std(shift) > PIXEL_SIZE
    assert axis_error(found.axis, 35.0) < 0.8  # half a pixel at the field's edge
    # a tenth of a pixel between neighbours, added up over nine tilts to either side at random
    assert shift_error(found.shift, shift, matrices, found.use) < 0.3 * PIXEL_SIZE
    # the slab, which has no middle to be seen but its detail, is put at z = 0
    middle = np.linalg.lstsq(matrices[:, :2].reshape(-1, 3), (found.shift - shift).reshape(-1), rcond=None)[0][2]
    assert abs(middle) < 75.0
    assert found.thickness == coarse.LEAST_SLAB  # and is thinner than what is assumed at least


def test_a_given_axis_is_refined(series):
    """From three degrees away; and it's the end of the axis that was meant, not its opposite."""
    images, shift, _ = series
    found = start(images, 218.0)
    assert abs(found.axis - 215.0) < 0.8  # half a pixel at the field's edge
    assert not found.hand_open
    assert shift_error(found.shift, shift, about(215.0), found.use) < 0.3 * PIXEL_SIZE  # as with the right one


def test_blank_and_excluded_images(series):
    images, shift, matrices = series
    images = images.copy()
    images[4] = 7.0
    images[11] = np.random.default_rng(0).normal(size=SHAPE)
    use = [j != 11 for j in range(len(TILTS))]
    ready = prepared(images, use)
    assert [j for j, usable in enumerate(ready.usable.tolist()) if not usable] == [4, 11]
    assert not ready.pixels[[4, 11]].any()
    found = start(images, 35.0, use)
    assert {j: r for j, r in enumerate(found.reason) if r} == {4: "shows nothing", 11: "excluded"}
    assert np.flatnonzero(~found.use).tolist() == [4, 11]
    assert shift_error(found.shift, shift, matrices, found.use) < 0.3 * PIXEL_SIZE
    for j in (4, 11):
        between = (found.shift[j - 1] + found.shift[j + 1]) / 2  # equal steps of tilt
        # moving the slab to z = 0 bends it a little
        assert np.allclose(found.shift[j], between, atol=0.01 * PIXEL_SIZE)


def test_an_image_of_something_else_is_left_out(series):
    """Noise at its place, or other blobs: the others are placed as if it weren't there."""
    images, shift, matrices = series
    images = images.copy()
    images[7] = slab_images(-60.0, shift, seed=5)[7]
    images[14] = np.random.default_rng(1).normal(size=SHAPE)
    found = start(images, 35.0)
    assert np.flatnonzero(~found.use).tolist() == [7, 14]
    assert all("agrees with the others" in found.reason[j] for j in (7, 14))
    assert shift_error(found.shift, shift, matrices, found.use) < 0.3 * PIXEL_SIZE


def test_the_copy_is_left_out_that_does_not_fit(series):
    """Of two equal images the one at whose tilt the others expect it stays, first or last."""
    images = series[0].copy()
    images[12] = images[6]
    images[15] = images[16]
    found = start(images, 35.0)
    assert {j: r for j, r in enumerate(found.reason) if r} == {12: "a copy of image 7", 15: "a copy of image 17"}
    assert shift_error(found.shift, series[1], series[2], found.use) < 0.3 * PIXEL_SIZE


def test_both_copies_are_left_out_where_nothing_tells(series):
    """At the same tilt one fits as well as the other; with the order of the exposures known, the earlier one stays."""
    tilt = TILTS.copy()
    tilt[9] = tilt[10]
    images = series[0].copy()
    images[9] = images[10]
    found = start(images, 35.0, tilt=tilt)
    reasons = {j: r for j, r in enumerate(found.reason) if r}
    assert reasons == {9: "a copy of image 11", 10: "a copy of image 10"}
    assert np.flatnonzero(~found.use).tolist() == [9, 10]
    found = start(images, 35.0, order=list(range(len(TILTS)))[::-1], tilt=tilt)
    assert {j: r for j, r in enumerate(found.reason) if r} == {9: "a copy of image 11"}


def test_start_finds_everything(series):
    """Shuffled tilts, a jump, a blank, a dark and a noisy image, a copy; axis and shifts from the images alone."""
    images, shift = (np.array(part) for part in series[:2])
    rng = np.random.default_rng(9)
    jump = np.array([0.3, -0.2]) * SHAPE[1] * PIXEL_SIZE
    moved = slab_images(35.0, shift + jump)
    images[6], shift[6] = moved[6], shift[6] + jump
    images = images + 50.0
    images[2] = 7.0
    images[5] = 0.5 + 0.1 * rng.normal(size=SHAPE)
    images[13] = 50 + rng.normal(size=SHAPE)
    images[16] = images[15]
    shuffle = rng.permutation(len(TILTS))
    found = start(images[shuffle], tilt=TILTS[shuffle])
    back = np.argsort(shuffle)
    bad = {j: found.reason[back[j]] for j in range(len(TILTS)) if not found.use[back[j]]}
    assert set(bad) == {2, 5, 13, 16}
    assert bad[2] == "shows nothing"
    assert bad[5] == "dark"
    assert bad[16] == f"a copy of image {back[15] + 1}"
    assert found.hand_open
    assert axis_error(found.axis, 35.0) < 1.5
    good = found.use[back]
    # a percent of the field, and what the error of the axis turns the field's edge by does not count here
    assert shift_error(found.shift[back], shift, about(found.axis), good) < 0.02 * SHAPE[1] * PIXEL_SIZE


@pytest.mark.parametrize("off", [-40.0, 40.0])
def test_a_wrong_axis_is_turned(series, off):
    """Images that have their places about an axis 40° off tell the right one to 3°, within which the sweeps refine it."""
    images = prepared(series[0], tilt=TILTS.tolist())
    pairs = Pairs(images.smaller(SMALL_SIZE), TILTS.tolist())
    wrong = coarse.place(images, TILTS.tolist(), 35.0 + off, pairs)
    search, axis = coarse.turned(wrong, 35.0 + off, pairs)
    assert axis_error(axis, 35.0) < coarse.AXIS_REACH
    assert search.strength() > wrong.strength()
    np.testing.assert_array_equal(search.matrices, about(axis))


def test_noise_is_refused():
    images = np.random.default_rng(1).normal(size=(20, 64, 64)).astype(np.float32)
    with pytest.raises(InputError, match="agree"):
        start(images, tilt=np.linspace(-57, 57, 20), use=[True] * 20)


def test_too_few_images(series):
    with pytest.raises(InputError, match="2 images"):
        start(series[0], 35.0, [j < 2 for j in range(len(TILTS))])


@pytest.mark.parametrize(("name", "limit"), [("conf_01", 10.0), ("conf_02", 6.0)])
def test_independent_simulation(shared_data, name, limit):
    """Shifts of the independent simulator's series, with its axis, to within half a pixel of the working size (12 Å).

    Every other tilt, which is harder and takes half the time.
    """
    truth = json.loads((shared_data / "sim" / f"{name}_truth.json").read_text())
    stack = mrc.open_stack(shared_data / "sim" / f"{name}.mrc").array
    use = [j not in truth["bad"] and j % 2 == 0 for j in range(len(stack))]
    axis = float(np.mean(truth["axis"]))
    found = coarse.start(stack.__getitem__, stack.shape, truth["apix"], truth["nominal"], use, axis)
    assert found.use.tolist() == use
    matrices = tilt_matrices(*(torch.tensor(truth[key]) for key in ("axis", "tilt")), 0.0).numpy()
    assert shift_error(found.shift, np.array(truth["shift_A"]), matrices, found.use) < limit
