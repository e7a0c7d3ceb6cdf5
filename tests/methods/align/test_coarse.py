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
from libemc.numerics.fourier import centre_crop, centre_pad, fourier_shift
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
    assert 0 < found.loss[-1] < found.loss[0] + 0.01 < 1  # converged after the first pass
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
    base = align.nominal(record(), 35.0).model_copy(update={"tilt": (20.0,) * len(TILTS)})
    search = align._Search.begin(images, base, 300.0)
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
    search = align._Search.begin(images, align.nominal(record(), 35.0), 300.0)
    moved = torch.tensor([[31.3, -27.6]], dtype=torch.float64)
    n, m = images.box, search.canvas
    prediction = centre_pad(fourier_shift(images.pixels[5:6], -moved)[0], (m, m))
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    look = search.compare(5, torch.fft.rfftn(prediction), start, align.WIDEST_SHIFT)
    assert torch.allclose(look.shift, start + moved[0], atol=0.1)  # a paraboloid through a peak, divided by the overlap
    assert look.clear > align.SURE
    near = search.compare(5, torch.fft.rfftn(prediction), start, 0.05)
    assert float((near.shift - start).norm()) <= 0.05 * n + 1
    assert near.elsewhere > near.deviations + align.BETTER
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(m, m))).float()
    assert search.compare(5, torch.fft.rfftn(noise), start, align.WIDEST_SHIFT).clear < align.LIKELY


def axis_error(found, axis):
    return abs((found - axis + 90) % 180 - 90)


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
    found = align.start(
        lambda j: images[shuffle][j], images.shape, PIXEL_SIZE, TILTS[shuffle].tolist(), [True] * len(TILTS)
    )
    back = np.argsort(shuffle)
    bad = {j: found.reason[back[j]] for j in range(len(TILTS)) if not found.use[back[j]]}
    assert set(bad) == {2, 5, 13, 16}
    assert bad[2] == "shows nothing"
    assert bad[5] == "dark"
    assert bad[16] == f"a copy of image {back[15] + 1}"
    assert found.hand_open
    assert axis_error(found.axis, 35.0) < 1.5
    about = tilt_matrices(found.axis, torch.from_numpy(TILTS), 0.0).numpy()
    good = found.use[back]
    # a percent of the field, and what the error of the axis turns the field's edge by does not count here
    assert shift_error(found.shift[back], shift, about, good) < 0.02 * SHAPE[1] * PIXEL_SIZE
    assert (found.quality[back][good] > align.LIKELY).all()


def test_noise_is_refused():
    images = np.random.default_rng(1).normal(size=(20, 64, 64)).astype(np.float32)
    with pytest.raises(InputError, match="agree"):
        align.start(images.__getitem__, images.shape, PIXEL_SIZE, np.linspace(-57, 57, 20).tolist(), [True] * 20)


def test_blocks_keep_the_origin():
    """A blob at the origin stays there, whatever the binning: its centre of mass, to a hundredth of a binned pixel."""
    y, x = np.mgrid[:120, :90]
    blob = np.exp(-((x - 45) ** 2 + (y - 60) ** 2) / 200).astype(np.float32)
    for binning in (1, 2, 3):
        images = align.prepare(lambda j: blob, (3, 120, 90), 1.0, [True] * 3, 120 // binning)
        pixels = images.pixels[0].double().clamp_min(1.0)[4:-4, 4:-4] - 1
        u = torch.arange(len(pixels)) + 4 - images.box // 2
        centre = [float((pixels.sum(dim) * u).sum() / pixels.sum()) for dim in (0, 1)]
        assert np.allclose(centre, 0, atol=0.02)  # of what is above a threshold of the sampled blob


def test_too_few_images(series):
    use = [j < 2 for j in range(len(TILTS))]
    with pytest.raises(InputError, match="2 images"):
        align.align(prepared(series[0], use), align.nominal(record(), 35.0), first_pass=True)


@pytest.mark.parametrize(("name", "limit"), [("conf_01", 10.0), ("conf_02", 6.0)])
def test_independent_simulation(shared_data, name, limit):
    """Shifts of the independent simulator's series, with its axis, to within half a pixel of the working size (12 Å).

    Every other tilt, which is harder and takes half the time.
    """
    truth = json.loads((shared_data / "sim" / f"{name}_truth.json").read_text())
    stack = mrc.open_stack(shared_data / "sim" / f"{name}.mrc").array
    use = [j not in truth["bad"] and j % 2 == 0 for j in range(len(stack))]
    images = align.prepare(stack.__getitem__, stack.shape, truth["apix"], use)
    zeros = (0.0,) * len(stack)
    base = align.Alignment(
        axis=tuple(truth["axis"]), tilt=tuple(truth["nominal"]), xtilt=zeros, shift_x=zeros, shift_y=zeros
    )
    found = align.align(images, base, first_pass=True, sweeps=0)
    matrices = tilt_matrices(*(torch.tensor(truth[key]) for key in ("axis", "tilt")), 0.0).numpy()
    assert shift_error(shifts_of(found), np.array(truth["shift_A"]), matrices, np.array(use)) < limit
