"""What a project keeps of alignments: images that an earlier one left out get another chance; pictures of landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from libemc import alignments
from libemc.methods.align.state import BECAUSE
from libemc.methods.import_series import UNDECIDED
from libemc.records import Source, Tilts, TiltSeriesRecord


def record(use: tuple[bool, ...], reason: tuple[str | None, ...] | None) -> TiltSeriesRecord:
    source = Source(
        stack="s.mrc", shape=(len(use), 40, 50), pixel_size=5.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07
    )
    nominal = tuple(float(j) for j in range(len(use)))
    return TiltSeriesRecord(name="s", source=source, tilts=Tilts(nominal=nominal, use=use, reason=reason))


def test_what_an_alignment_left_out_is_reconsidered() -> None:
    """And copies that it can tell apart, but nothing else: what the user excluded, with a reason or without, and copies
    told apart by their order stay out; reasons of used images stay."""
    copy = "the same as image 3"
    reasons = (None, BECAUSE + "shows nothing", "user: bad", None, BECAUSE.strip(), "a note", copy + UNDECIDED, copy)
    before = record((True, False, False, False, False, True, False, False), reasons)
    after = alignments.reconsidered(before)
    assert after.tilts.use == (True, True, False, False, False, True, True, False)
    assert after.tilts.reason == (None, None, "user: bad", None, BECAUSE.strip(), "a note", None, copy)
    assert before.tilts.use == (True, False, False, False, False, True, False, False)  # it is not changed
    assert after.source == before.source
    assert alignments.reconsidered(after) == after
    without = alignments.reconsidered(record((True, False), None))
    assert without.tilts.use == (True, False)
    assert not any(without.tilts.reason or ())


@pytest.mark.parametrize("binning", [1, 2])
def test_views_show_the_point(binning: int) -> None:
    """A dark pixel is in the middle of the view of its place, and shifted in that of another; over the edge is nothing."""
    image = np.zeros((120, 140), np.float32)
    image[60 - 20, 70 + 16] = -1.0
    places = torch.tensor([[16.3, -19.8], [12.0, -24.0], [61.0, 0.0], [500.0, 0.0]], dtype=torch.float64)
    found = alignments.views(image, places, 10, binning)
    assert found.shape == (4, 10, 10) and found.dtype == np.float32
    for view, (y, x) in zip(found, ((5, 5), (5 + 4 // binning, 5 + 4 // binning)), strict=False):
        assert np.unravel_index(view.argmin(), view.shape) == (y, x)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[2]).all() == (binning == 2)  # a window of 20 pixels reaches over the edge, one of 10 does not
