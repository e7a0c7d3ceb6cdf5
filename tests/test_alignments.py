"""What a project keeps of alignments: images that an earlier one left out get another chance; pictures of landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from libemc import alignments
from libemc.methods.align.series import BECAUSE
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Source, Tilts, TiltSeriesRecord


def record(use: tuple[bool, ...], reason: tuple[str | None, ...] | None) -> TiltSeriesRecord:
    source = Source(
        stack="s.mrc", shape=(len(use), 40, 50), pixel_size=5.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07
    )
    nominal = tuple(float(j) for j in range(len(use)))
    return TiltSeriesRecord(name="s", source=source, tilts=Tilts(nominal=nominal, use=use, reason=reason))


def test_what_an_alignment_left_out_is_reconsidered() -> None:
    """And nothing else: what the user excluded, with a reason or without, stays out; reasons of used images stay."""
    reasons = (None, BECAUSE + "shows nothing", "user: bad", None, BECAUSE.strip(), "a note")
    before = record((True, False, False, False, False, True), reasons)
    after = alignments.reconsidered(before)
    assert after.tilts.use == (True, True, False, False, False, True)
    assert after.tilts.reason == (None, None, "user: bad", None, BECAUSE.strip(), "a note")
    assert before.tilts.use == (True, False, False, False, False, True)  # it is not changed
    assert after.source == before.source
    assert alignments.reconsidered(after) == after
    without = alignments.reconsidered(record((True, False), None))
    assert without.tilts.use == (True, False)
    assert not any(without.tilts.reason or ())


@pytest.mark.parametrize("binning", [1, 2])
def test_patches_show_the_point(binning: int) -> None:
    """A dark pixel at the point is in the middle of every patch; tilts that are not used, or don't show it, are empty."""
    tilts = torch.tensor([-40.0, 0.0, 40.0, 0.0], dtype=torch.float64)
    shift = torch.tensor([[0.0, 0.0], [20.0, -10.0], [0.0, 5.0], [500.0, 0.0]], dtype=torch.float64)
    use = torch.tensor([True, True, True, True])
    geometry = TiltGeometry(tilt_matrices(0.0, tilts, 0.0), shift, torch.ones(4).double(), use)
    point = (15.0, -20.0, 10.0)
    images = np.zeros((4, 120, 140), np.float32)
    at = geometry.project(torch.tensor([point], dtype=torch.float64))[0][0].numpy() / 5.0
    for image, (x, y) in zip(images, at[:3], strict=False):
        image[round(float(y)) + 60, round(float(x)) + 70] = -1.0
    found = alignments.patches(images, geometry, point, 5.0, binning, 80.0)
    n = 2 * round(80.0 / 5.0 / binning / 2)
    assert found.shape == (4, n, n)
    for patch in found[:3]:
        assert np.unravel_index(patch.argmin(), patch.shape) == (n // 2, n // 2)
    assert np.isnan(found[3]).all()
    unused = TiltGeometry(geometry.matrices, shift, geometry.magnification, use & (torch.arange(4) != 1))
    again = alignments.patches(images, unused, point, 5.0, binning, 80.0)
    assert np.isnan(again[1]).all()
    np.testing.assert_array_equal(again[0], found[0])
