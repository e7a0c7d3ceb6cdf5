"""Images are placed by what others say of them: predictions, where they agree, and how much noise agrees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.methods.align import search as method
from libemc.methods.align.images import FINEST
from libemc.methods.align.search import RINGS, Search, Signal
from libemc.numerics.fourier import centre_crop, centre_pad, fourier_shift
from tests.methods.align.slab_series import (
    FLAT,
    LOW,
    PIXEL_SIZE,
    SHAPE,
    TILTS,
    at_their_places,
    in_common,
    prepared,
    searching,
    slab_images,
    slab_series,
)


@pytest.fixture(scope="module")
def series():
    return slab_series()


def test_copies_do_not_predict_each_other(series):
    images = series[0].copy()
    images[12] = images[6]
    ready = prepared(images, tilt=TILTS.tolist())
    assert ready.copies == ((6, 12),)
    assert ready.usable.all()
    search = searching(ready, 35.0, FLAT)
    assert 6 not in search.near(12, search.order, 180.0, 100)
    assert 12 not in search.near(6, search.order, 180.0, 100)
    assert len(search.near(6, search.order, 180.0, 100)) == len(TILTS) - 2


@pytest.mark.parametrize("detail", [120.0, 240.0])
def test_a_signal_falls_by_half_at_its_detail(detail):
    """Against 1 / (1 + (k·d)²) and its integrals over the plane, up to the finest frequency that is looked at."""
    signal, m = Signal.of_detail(detail, PIXEL_SIZE), 800
    k = torch.hypot(torch.arange(m // 2 + 1) / m, torch.fft.fftfreq(m)[:, None]) / PIXEL_SIZE
    expected = 1 / (1 + (k * detail) ** 2)
    assert float(expected.reshape(-1)[(k * detail - 1).abs().argmin()]) == pytest.approx(0.5, abs=0.01)
    # straight lines between points a 96th of the sampling apart: their square over 8 times a second derivative of 2
    step = detail / PIXEL_SIZE / (4 * RINGS)
    assert torch.allclose(signal.on(m, PIXEL_SIZE), expected, rtol=0, atol=2 * step**2 / 8)
    # (Σ g²)² / Σ g⁴ over the plane; on one side of the transform the line k_x = 0 counts twice
    u2 = (detail / FINEST / PIXEL_SIZE) ** 2
    closed = 3 * math.pi * (m * PIXEL_SIZE / detail) ** 2 * (1 - 1 / (1 + u2)) ** 2 / (1 - (1 + u2) ** -3)
    assert signal.independent(m, PIXEL_SIZE) == pytest.approx(closed, rel=0.02)
    assert FLAT.independent(m, PIXEL_SIZE) == pytest.approx(math.pi * (m / FINEST) ** 2, rel=0.01)


@pytest.mark.parametrize("finest", [100.0, 150.0, 300.0])
def test_the_signal_is_measured(finest):
    """Where the images have something in common all of it is listened to, and elsewhere nothing."""
    search = searching(prepared(in_common(finest)), 35.0, Signal.of_detail(240.0, PIXEL_SIZE), tilt=LOW)
    before = search.gain
    search.measure_signal()
    assert search.gain is before  # nothing has a place yet
    search.deviations = dict.fromkeys(search.order, 0.0)
    search.measure_signal()
    frequency, gain = search.signal.frequency, search.signal.gain
    ring = frequency[1] - frequency[0]
    assert frequency[-1] * PIXEL_SIZE == pytest.approx(1 / FINEST, abs=1 / 48)
    assert gain.max() == 1
    # of a ring and a half's width is the edge: the one it lies in, and what turning and the window blur
    assert gain[frequency < 1 / finest - 1.5 * ring].min() > 0.9
    # rings of a hundred coefficients and more, in seven images: 0.1 is far beyond their noise, at the coarsest too
    assert gain[frequency > 1 / finest + 1.5 * ring].max() < 0.1
    assert torch.equal(search.gain, search.signal.on(search.canvas, PIXEL_SIZE))


@pytest.mark.parametrize("detail", [None, 120.0, 240.0])
def test_chance_is_no_agreement(detail):
    """What noise says of where an image lies stands out by nothing on average, however fine the signal."""
    images = prepared(np.random.default_rng(9).normal(size=(len(TILTS), *SHAPE)).astype(np.float32))
    signal = FLAT if detail is None else Signal.of_detail(detail, PIXEL_SIZE)
    search = searching(images, 35.0, signal)
    looks = []
    for j in search.order:
        near = search.near(j, search.order, method.NEAR, method.MOST_NEAR)
        looks.append(search.compare(j, search.predict(j, [near], search.shift[j])[0], search.shift[j], 0.5))
    deviations = np.array([look.deviations for look in looks])
    # the highest of so many is spread by 0.4, and so is what the asymptotic formula is off by
    assert abs(deviations.mean()) < 0.5
    assert 0.15 < deviations.std() < 0.8
    assert max(look.clear for look in looks) < method.SURE


def test_a_tilt_predicts_itself(series):
    """From an image at the same tilt, the prediction is that image moved to its place, halved by the constant."""
    images = prepared(series[0])
    search = Search.begin(images, [20.0] * len(TILTS), 35.0, 300.0, FLAT)
    search.shift[1] = torch.tensor([3.0, -2.0])
    n, m = images.box, search.canvas
    start = torch.tensor([1.0, 4.0], dtype=torch.float64)
    prediction = torch.fft.irfftn(search.predict(0, [[1]], start)[0], s=(m, m))
    expected = fourier_shift(images.pixels[1:2], start[None] - search.shift[1:2])[0] / 2
    inner = slice(10, -10)
    assert torch.allclose(centre_crop(prediction, (n, n))[inner, inner], expected[inner, inner], atol=2e-3)  # float32


def test_a_place_is_found_anywhere(series):
    """A shifted copy is found to a fraction of a pixel, a third of the field away, and not where one may not look."""
    images = prepared(series[0])
    search = searching(images, 35.0, FLAT)
    moved = torch.tensor([[31.3, -27.6]], dtype=torch.float64)
    n, m = images.box, search.canvas
    prediction = centre_pad(fourier_shift(images.pixels[5:6], -moved)[0], (m, m))
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    look = search.compare(5, torch.fft.rfftn(prediction), start, method.WIDEST_SHIFT)
    assert torch.allclose(look.shift, start + moved[0], atol=0.1)  # a paraboloid through a peak, divided by the overlap
    assert look.clear > method.SURE
    near = search.compare(5, torch.fft.rfftn(prediction), start, 0.05)
    assert float((near.shift - start).norm()) <= 0.05 * n + 1
    assert near.elsewhere > near.deviations + method.BETTER
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(m, m))).float()
    assert search.compare(5, torch.fft.rfftn(noise), start, method.WIDEST_SHIFT).clear < method.LIKELY


@pytest.mark.parametrize("middle", [0.0, 250.0])
def test_the_slab_is_seen(series, middle):
    """Its middle and its height, a blob's size and a coarse voxel added at either face."""
    images, shift, matrices = series
    search = at_their_places(prepared(images), shift - middle * matrices[:, :2, 2])
    low, height = search.slab_heights()
    assert low * PIXEL_SIZE == pytest.approx(middle, abs=75.0)  # a quarter of the height: of 250 blobs, a wedge missing
    assert 150.0 < height * PIXEL_SIZE < 600.0


def test_what_either_side_says(series):
    """Of images at their places the two sides agree, and all others see far more than chance; at the ends is one side only."""
    apart, quality = at_their_places(prepared(series[0]), series[1]).sides()
    assert torch.isnan(apart[[0, -1]]).all()
    assert 0 < float(apart[1:-1].median()) < 0.3  # each places an image to a few tenths of a pixel
    # noise of the deviation that a blob's height has twice: far above what chance gives
    assert float(quality.min()) > 2 * method.SURE


def test_what_has_no_place_is_placed_beside_the_others(series):
    """At either end, in between, and far away; what shows something else stays out, and the others stay where they are."""
    images, shift = (np.array(part) for part in series[:2])
    jump = np.array([0.3, -0.2]) * SHAPE[1] * PIXEL_SIZE
    shift[10] += jump
    images[10] = slab_images(35.0, shift)[10]
    images[14] = np.random.default_rng(1).normal(size=SHAPE)
    search = at_their_places(prepared(images), shift)
    search.listen(Signal.of_detail(120.0, PIXEL_SIZE))
    for j in (0, 1, 10, 14, 18):
        search.shift[j] = 0.0
        del search.deviations[j]
    before = search.shift.clone()
    search.extend()
    assert search.placed == [j for j in range(len(TILTS)) if j != 14]
    found = [0, 1, 10, 18]
    assert min(search.deviations[j] for j in found) >= method.LIKELY
    # to half a pixel from one side of slabs that overlap less and less
    error = (search.shift - torch.from_numpy(shift) / PIXEL_SIZE).norm(dim=1)
    assert float(error[found].max()) < 0.5
    others = [j for j in range(len(TILTS)) if j not in found]
    assert torch.equal(search.shift[others], before[others])


def test_images_without_a_place_lie_between_their_neighbours(series):
    images, shift = series[:2]
    search = at_their_places(prepared(images), shift)
    before = search.shift.clone()
    for j in (0, 7, 8):
        search.shift[j] = 99.0
        del search.deviations[j]
    search.fill()
    others = [j for j in range(len(TILTS)) if j not in (0, 7, 8)]
    assert torch.equal(search.shift[others], before[others])
    share = torch.from_numpy((TILTS[7:9] - TILTS[6]) / (TILTS[9] - TILTS[6]))[:, None]
    torch.testing.assert_close(search.shift[7:9], before[6] + share * (before[9] - before[6]))
    assert torch.equal(search.shift[0], before[1])
