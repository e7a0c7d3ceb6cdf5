"""The tilt axis from pairs of images that have no places yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from libemc.methods.align.axis import AXIS_STEP, DETAILS, PAIR_STRETCH, STRETCH_TOLERANCE, Pairs, by_lines
from libemc.methods.align.images import SMALL_SIZE
from libemc.methods.align.search import Signal
from tests.methods.align.lone_object import lone_object
from tests.methods.align.slab_series import AXIS, LOW, PIXEL_SIZE, TILTS, in_common, prepared, slab_series


def test_pairs_choose_a_signal():
    """The finest of the details where there's signal at all frequencies, the coarsest where it's coarse."""
    for finest, detail in ((2 * PIXEL_SIZE, min(DETAILS)), (300.0, max(DETAILS))):
        images = prepared(in_common(finest)).smaller(SMALL_SIZE)
        chosen = Pairs(images, LOW.tolist()).signal
        np.testing.assert_array_equal(chosen.gain, Signal.of_detail(detail, images.pixel_size).gain)


@pytest.fixture(scope="module")
def pairs():
    return Pairs(prepared(slab_series()[0]).smaller(SMALL_SIZE), TILTS.tolist())


def test_pairs_differ_enough(pairs):
    """Each stretches an image to one on the same side whose cosine is a given part of its own."""
    assert pairs.stretched
    for low, high in pairs.stretched:
        assert TILTS[low] * TILTS[high] > 0 or abs(TILTS[high]) < 5
        ratio = np.cos(np.radians(TILTS[high])) / np.cos(np.radians(TILTS[low]))
        assert min(abs(ratio - wanted) for wanted in PAIR_STRETCH) < STRETCH_TOLERANCE


def test_pairs_agree_about_the_axis(pairs):
    """At whatever shift: best about the right one, of which opposites are the same."""
    best = max(np.arange(-90.0, 90.0, AXIS_STEP), key=pairs.agreement)
    assert abs(best - AXIS) <= AXIS_STEP
    assert abs(pairs.refine(best, AXIS_STEP) - AXIS) < 1.25  # half of the finest step, an eighth
    assert pairs.agreement(AXIS) == pairs.agreement(AXIS + 180.0)
    assert min(abs(axis - AXIS) for axis in pairs.candidates()) <= AXIS_STEP


@pytest.mark.parametrize("best", [31.0, 33.7, 39.9])
def test_a_parabola_is_refined_exactly(pairs, monkeypatch, best):
    """Of which the vertex lies within the steps."""
    monkeypatch.setattr(pairs, "agreement", lambda axis: -((axis - best) ** 2))
    assert pairs.refine(AXIS, AXIS_STEP) == pytest.approx(best)


def test_lines_of_a_lone_object_know_the_axis_and_those_of_a_slab_do_not():
    tilts = np.linspace(-60, 60, 41)
    whole = lone_object(31.0, tilts)
    alone = replace(prepared(whole.numpy()), pixels=whole)  # without the filter, which is made for slabs
    assert by_lines(alone, tilts.tolist(), 33.0) == pytest.approx(31.0, abs=1.0)
    assert by_lines(prepared(slab_series()[0]), TILTS.tolist(), AXIS) is None
