"""Coarse alignment of slabs whose geometry is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods.align import coarse as align
from libemc.numerics.fourier import fourier_shift, irfftn_centred
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Source, Tilts, TiltSeriesRecord

PIXEL_SIZE = 20.0  # Å
SHAPE = (100, 90)
TILTS = np.linspace(-54, 54, 19)


def slab_images(axis, shift, seed=0, noise=0.5):
    """Projections of 250 dark blobs of 40 Å in a slab of 300 Å, larger than the field; noise after it."""
    rng = np.random.default_rng(seed)
    points = (rng.random((250, 3)) - 0.5) * [4200, 4200, 300]
    matrices = tilt_matrices(axis, torch.from_numpy(TILTS), 0.0).numpy()
    y, x = [(np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE]
    images = []
    for matrix, s in zip(matrices, shift, strict=True):
        q = points @ matrix[:2].T + s
        image = -np.exp(
            -((x - q[:, 0, None]) ** 2)[:, None] / 3200 - ((y - q[:, 1, None]) ** 2)[:, :, None] / 3200
        ).sum(0)
        images.append(image + noise * gaussian_filter(rng.standard_normal(SHAPE), 0.5))
    return np.array(images, np.float32)


def record(axis=None, use=None):
    count = len(TILTS)
    source = Source(
        stack="s.mrc",
        shape=(count, *SHAPE),
        pixel_size=PIXEL_SIZE,
        voltage=300.0,
        cs=2.7,
        amplitude_contrast=0.07,
        tilt_axis=axis,
    )
    return TiltSeriesRecord(
        name="s", source=source, tilts=Tilts(nominal=tuple(TILTS.tolist()), use=use or (True,) * count)
    )


def shift_error(found, shift, matrices, use):
    """RMS distance (Å) of shifts, after the best translation of the specimen: it can't be seen."""
    design = matrices[use][:, :2].reshape(-1, 3)
    difference = (found - shift)[use].reshape(-1)
    moved = design @ np.linalg.lstsq(design, difference, rcond=None)[0]
    return float(np.sqrt(2 * np.mean((difference - moved) ** 2)))


def shifts_of(alignment):
    return np.array([alignment.shift_x, alignment.shift_y]).T


@pytest.fixture(scope="module")
def series():
    shift = np.cumsum(np.random.default_rng(3).normal(0, 25, (len(TILTS), 2)), axis=0)
    return slab_images(35.0, shift), shift, tilt_matrices(35.0, torch.from_numpy(TILTS), 0.0).numpy()


def prepared(images, use=None, size=align.WORKING_SIZE):
    return align.prepare(images.__getitem__, images.shape, PIXEL_SIZE, use or [True] * len(images), size)


def test_shifts_are_found(series):
    images, shift, matrices = series
    found = align.align(prepared(images), align.nominal(record(), 35.0), first_pass=True)
    use = np.ones(len(TILTS), bool)
    assert np.std(shift) > PIXEL_SIZE
    # a tenth of a pixel between neighbours, added up over nine tilts to either side at random
    assert shift_error(shifts_of(found), shift, matrices, use) < 0.3 * PIXEL_SIZE
    assert found.loss[-1] < found.loss[0]
    residual = [r for r in found.residual if r is not None]
    assert len(residual) == len(TILTS) - 2
    assert np.median(residual) < 0.3 * PIXEL_SIZE
    # the slab, which has no middle to be seen but its detail, is put at z = 0 and measured
    middle = np.linalg.lstsq(matrices[:, :2].reshape(-1, 3), (shifts_of(found) - shift).reshape(-1), rcond=None)[0][2]
    assert abs(middle) < 75.0
    assert 150.0 < found.thickness < 600.0


def test_blank_and_excluded_images(series):
    images, shift, matrices = series
    images = images.copy()
    images[4] = 7.0
    images[11] = np.random.default_rng(0).normal(size=SHAPE)
    use = [j != 11 for j in range(len(TILTS))]
    ready = prepared(images, use)
    assert [j for j, usable in enumerate(ready.usable.tolist()) if not usable] == [4, 11]
    found = align.align(ready, align.nominal(record(), 35.0), first_pass=True)
    good = np.array(use) & (np.arange(len(TILTS)) != 4)
    assert shift_error(shifts_of(found), shift, matrices, good) < 0.3 * PIXEL_SIZE
    assert found.residual[4] is None
    assert found.residual[11] is None
    between = (shifts_of(found)[3] + shifts_of(found)[5]) / 2  # equal steps of tilt
    assert np.allclose(
        shifts_of(found)[4], between, atol=0.01 * PIXEL_SIZE
    )  # moving the slab to z = 0 bends it a little


def test_refinement_goes_on_from_what_there_is(series):
    images, shift, matrices = series
    base = align.nominal(record(), 35.0)
    moved = shift + np.random.default_rng(5).normal(0, 20, shift.shape)
    base = base.model_copy(update={"shift_x": tuple(moved[:, 0]), "shift_y": tuple(moved[:, 1]), "thickness": 300.0})
    found = align.align(prepared(images), base, first_pass=False)
    use = np.ones(len(TILTS), bool)
    assert shift_error(moved, shift, matrices, use) > PIXEL_SIZE
    assert shift_error(shifts_of(found), shift, matrices, use) < 0.3 * PIXEL_SIZE
    lowest = len(TILTS) // 2
    assert np.allclose(shifts_of(found)[lowest], moved[lowest])  # the lowest tilt stays
    assert found.thickness == 300.0


def test_axis_is_found():
    axis = -88.0
    shift = np.cumsum(np.random.default_rng(4).normal(0, 20, (len(TILTS), 2)), axis=0)
    small = prepared(slab_images(axis, shift, seed=1), size=64)
    found = align.find_axis(small, record())
    # of the last step of the search, 1 degree, and as much again: this is a coarse alignment of a small field
    assert abs((found - axis + 90) % 180 - 90) < 2.0


def test_a_tilt_predicts_itself(series):
    """From an image at the same tilt, the prediction is that image moved to its place, halved by the constant."""
    images = prepared(series[0])
    matrices = tilt_matrices(35.0, torch.full((2,), 20.0, dtype=torch.float64), 0.0)
    shift = torch.tensor([[0.0, 0.0], [3.0, -2.0]], dtype=torch.float64)
    n = images.box
    prediction = irfftn_centred(align.predict(images, matrices, shift, 0, [1], 15.0), (n, n))
    expected = fourier_shift(images.pixels[1:2], -shift[1:2])[0] / 2
    inner = slice(10, -10)
    assert torch.allclose(prediction[inner, inner], expected[inner, inner], atol=2e-3)  # whole pixels: float32 grids


def test_offset(series):
    images = prepared(series[0])
    moved = torch.tensor([[2.3, -1.6]], dtype=torch.float64)
    prediction = torch.fft.rfftn(torch.fft.ifftshift(fourier_shift(images.pixels[5:6], -moved)[0]))
    found, score = align.offset(images, 5, prediction, torch.zeros(2), 6.0)
    assert torch.allclose(found, moved[0], atol=0.05)  # a paraboloid through a smooth peak
    assert 0.9 < score <= 1.0
    near, _ = align.offset(images, 5, prediction, torch.zeros(2), 1.0)
    assert float(near.norm()) < 2.0


def test_too_few_images(series):
    use = [j < 2 for j in range(len(TILTS))]
    with pytest.raises(InputError, match="2 images"):
        align.align(prepared(series[0], use), align.nominal(record(), 35.0), first_pass=True)


@pytest.mark.parametrize(("name", "limit"), [("conf_01", 10.0), ("conf_02", 6.0)])
def test_independent_simulation(shared_data, name, limit):
    """Shifts of the independent simulator's series, with its axis, to within half a pixel of the working size (12 Å)."""
    truth = json.loads((shared_data / "sim" / f"{name}_truth.json").read_text())
    stack = mrc.open_stack(shared_data / "sim" / f"{name}.mrc").array
    use = [j not in truth["bad"] for j in range(len(stack))]
    images = align.prepare(stack.__getitem__, stack.shape, truth["apix"], use)
    zeros = (0.0,) * len(stack)
    base = align.Alignment(
        axis=tuple(truth["axis"]), tilt=tuple(truth["nominal"]), xtilt=zeros, shift_x=zeros, shift_y=zeros
    )
    found = align.align(images, base, first_pass=True, sweeps=0)
    matrices = tilt_matrices(*(torch.tensor(truth[key]) for key in ("axis", "tilt")), 0.0).numpy()
    assert shift_error(shifts_of(found), np.array(truth["shift_A"]), matrices, np.array(use)) < limit
