"""Judging raw images, doses and sizes: synthetic images of known faults, and sums done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.methods import import_series as imports
from libemc.methods.simulate import order_of_tilts

TILTS = np.arange(-60, 61, 5.0)


def counts(seed: int = 1, mean: float = 30.0, thickness: float = 300.0) -> np.ndarray:
    """Counting images through ice: nm, with 300 nm of it letting 1/e pass."""
    random = np.random.default_rng(seed)
    through = mean * np.exp(-thickness / 300 / np.cos(np.radians(TILTS)))
    return random.poisson(through[:, None, None], (len(TILTS), 48, 64)).astype(np.int16)


def judged(stack: np.ndarray) -> dict[int, str]:
    reasons = imports.bad_images([imports.image_statistics(image) for image in stack], TILTS)
    return {k: reason for k, reason in enumerate(reasons) if reason}


def test_statistics_of_an_image() -> None:
    image = np.array([[1, 3], [5, 7]], np.uint16)
    found = imports.image_statistics(image)
    assert (found.mean, found.finite) == (4.0, True)
    assert found.deviation == pytest.approx(np.sqrt(5), rel=1e-6)  # float32
    assert found.digest == imports.image_statistics(image.copy()).digest != imports.image_statistics(image.T).digest
    assert not imports.image_statistics(np.array([[1.0, np.inf]], np.float32)).finite
    offset = np.random.default_rng(0).normal(3e4, 1.0, (200, 200)).astype(np.float32)
    assert imports.image_statistics(offset).deviation == pytest.approx(
        1.0, rel=0.02
    )  # 40 000 pixels: 0.4 % twice; float32


@pytest.mark.parametrize("thickness", [50.0, 300.0, 450.0])
def test_thick_ice_at_high_tilt_is_no_fault(thickness: float) -> None:
    """At 450 nm only a twentieth of the beam at 0 degrees is left at 60."""
    assert judged(counts(mean=100.0, thickness=thickness)) == {}
    centred = counts(mean=100.0, thickness=thickness).astype(np.float32)
    assert judged(centred - centred.mean(axis=(1, 2), keepdims=True)) == {}


def test_every_fault_gets_its_reason() -> None:
    stack = counts().astype(np.float32)
    stack[0] *= 0.01
    stack[3] = 7.0
    stack[8, 10, 10] = np.nan
    stack[12] = stack[11]
    stack[-1] = np.random.default_rng(2).poisson(0.3, stack[-1].shape)
    found = judged(stack)
    assert set(found) == {0, 3, 8, 11, 12, len(TILTS) - 1}
    assert found[3] == "constant" and found[8] == "values that are not finite"
    assert [found[k] for k in (11, 12)] == [f"the same as image {k}{imports.UNDECIDED}" for k in (12, 11)]
    assert found[len(TILTS) - 1].startswith("dark: 0.0")
    assert float(found[0].split()[1]) == pytest.approx(
        1e-4, rel=0.7
    )  # the variance of a faint copy; ice varies by less


def test_dark_is_seen_without_a_level_to_go_by_and_never_in_two_images() -> None:
    stack = np.random.default_rng(5).normal(0, 10, (len(TILTS), 32, 32)).astype(np.float32)
    stack[4] *= 0.2
    assert set(judged(stack)) == {4}
    two = [imports.image_statistics(image) for image in (stack[4], stack[5])]
    assert imports.bad_images(two, TILTS[:2]) == [None, None]  # which of two is the odd one, nobody can tell
    assert imports.bad_images([], []) == []


def test_pixel_sizes() -> None:
    assert imports.same_pixel_size({"--pixel-size": None, "a.mrc": 2.7, "a.mdoc": 2.7001}) == 2.7
    assert imports.same_pixel_size({"--pixel-size": 2.71, "a.mrc": 2.7}) == 2.71
    with pytest.raises(InputError, match=r"--pixel-size says 2.5 Å/px, a.mrc says 2.7 Å/px"):
        imports.same_pixel_size({"--pixel-size": 2.5, "a.mrc": 2.7})
    with pytest.raises(InputError, match=r"no pixel size in a.mrc; give it with --pixel-size"):
        imports.same_pixel_size({"--pixel-size": None, "a.mrc": None})


def test_order_of_exposure_from_places_or_angles() -> None:
    nominal = [-6.0, -3.0, 0.0, 3.0, 6.0]
    assert imports.exposure_order([4, 2, 0, 1, 3], nominal) == [4, 2, 0, 1, 3]
    assert imports.exposure_order([5, 3, 1, 2, 4], nominal) == [4, 2, 0, 1, 3]
    assert imports.exposure_order([0.02, 2.9, -3.1, 6.1, -5.8], nominal) == [4, 2, 0, 1, 3]
    assert tuple(imports.exposure_order([0, 3, -3, -6, 6], nominal)) == (3, 2, 0, 1, 4)
    for wrong in ([1, 1, 2, 3, 4], [0, 3, -3, 9, -9], [0, 1, 2]):
        with pytest.raises(InputError, match="not an order of 5 exposures"):
            imports.exposure_order(wrong, nominal)


def test_a_real_list_of_angles_in_the_order_of_exposure(shared_data: Path) -> None:
    folder = shared_data / "real/metadata/emclarity"
    listed, nominal = np.loadtxt(folder / "riboNew05.order"), np.loadtxt(folder / "riboNew05.tlt")
    order = imports.exposure_order(listed, np.round(nominal))
    assert sorted(order) == list(range(len(nominal)))
    for place, angle in zip(order, nominal, strict=True):
        assert abs(listed[place] - angle) <= 1


def test_doses() -> None:
    assert imports.doses_before([2, 0, 1], [3.0, 4.0, 5.0]) == (9.0, 0.0, 4.0)
    assert imports.doses_from_before([9.0, 0.0, 4.0]) == (4.5, 4.0, 5.0)  # the last exposure's is not known: the median
    order = order_of_tilts(TILTS.tolist())
    tilts = imports.tilts_section(TILTS, order, [2.5] * len(TILTS), None)
    assert tilts.dose_before == tuple(2.5 * place for place in order) and all(tilts.use)
    assert imports.tilts_section(TILTS, None, None, tilts.dose_before).dose == (2.5,) * len(TILTS)
    assert imports.tilts_section(TILTS, order, None, None).dose is None
    told = imports.tilts_section([0, 1], [0, 1], [3.0, 3.0], [0.0, 3.5])
    assert told.dose_before == (0.0, 3.5)  # what the microscope says goes before a sum


def test_bad_images_keep_their_place() -> None:
    tilts = imports.without_bad(imports.tilts_section([0, 3, 6], None, None, None), [None, "constant", None])
    assert tilts.use == (True, False, True) and tilts.reason == (None, "constant", None)
    assert tilts.nominal == (0.0, 3.0, 6.0)


def test_float16() -> None:
    images = np.random.default_rng(3).normal(5e5, 1e6, (20, 16, 16)).astype(np.float32)
    scale = imports.float16_scale(iter([images[:10], images[10:]]))
    assert scale == pytest.approx(1e-6, rel=0.05)  # the median of 20 variances of 256 values each: 2 % rms
    spoilt = images * np.where(np.arange(20) == 7, np.float32(1e6), np.float32(1))[:, None, None]
    assert imports.float16_scale([spoilt]) == pytest.approx(scale, rel=0.05)  # one image does not decide
    found = imports.as_float16(images, scale)
    np.testing.assert_allclose(
        found, images * scale, rtol=2**-11, atol=2**-24
    )  # half a unit in the last place of float16
    with pytest.raises(InputError, match="constant"):
        imports.float16_scale([np.ones((2, 4, 4))])
    with pytest.raises(InputError, match="not finite"):
        imports.float16_scale([np.array([[[1.0, np.nan]]])])
    for wrong in (np.nan, np.inf, 7e4):
        with pytest.raises(InputError, match="not finite, or far beyond"):
            imports.as_float16(np.array([1.0, wrong]), 1.0)
