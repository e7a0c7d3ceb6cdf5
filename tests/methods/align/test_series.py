"""Whole alignments of small simulated series, with gold and without, from the images and nominal angles alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.methods.align import coarse, series
from libemc.methods.align.gold import Beads
from libemc.methods.align.series import Result
from libemc.methods.align.slab import Slab
from libemc.methods.align.state import BECAUSE, Pyramid, State
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Source, Tilts, TiltSeriesRecord

TILTS = np.linspace(-54, 54, 19)
PIXEL_SIZE = 12.0  # Å
SHAPE = (140, 150)
AXIS = -87.0
BLANK = 3


def record(shape: tuple[int, ...], tilts: np.ndarray = TILTS) -> TiltSeriesRecord:
    source = Source(stack="s.mrc", shape=shape, pixel_size=PIXEL_SIZE, voltage=300.0, cs=2.7, amplitude_contrast=0.07)
    return TiltSeriesRecord(
        name="s", source=source, tilts=Tilts(nominal=tuple(tilts.tolist()), use=(True,) * len(tilts))
    )


@dataclass
class Simulated:
    """Images (T, y, x), and where points of the specimen (P, 3) are seen in them, (T, P, 2) Å."""

    images: np.ndarray
    points: np.ndarray
    seen: np.ndarray


def simulated(beads: int, noise: float) -> Simulated:
    """A slab of 400 Å, wider than the field: 160 dark filaments of 240 Å, noise, gold.

    Shifts are a random walk of 20 Å a step; gold is spheres of 100 Å. Image `BLANK` is empty.
    """
    rng = np.random.default_rng(0)
    shift = np.cumsum(rng.normal(0, 20, (len(TILTS), 2)), axis=0)
    shift -= shift.mean(0)
    centres = rng.uniform(-0.5, 0.5, (160, 3)) * [3600, 3600, 400]
    along = rng.normal(size=(160, 1, 3)) * [1, 1, 0.3]
    along = along * np.linspace(-120, 120, 7)[:, None] / np.linalg.norm(along, axis=-1, keepdims=True)
    atoms = (centres[:, None] + along).reshape(-1, 3)  # Gaussians of 20 Å
    gold = rng.uniform(-0.5, 0.5, (beads, 3)) * [1300, 1300, 400]
    matrices = tilt_matrices(AXIS, torch.from_numpy(TILTS), 0.0).numpy()[:, :2]
    y, x = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE)

    def at(points: np.ndarray) -> np.ndarray:
        where: np.ndarray = np.einsum("tij,pj->tpi", matrices, points) + shift[:, None]
        return where

    across, down = (np.exp(-((v - at(atoms)[..., i, None]) ** 2) / (2 * 20**2)) for i, v in enumerate((x, y)))
    images = -1.5 * np.einsum("tpy,tpx->tyx", down, across)
    part = (np.arange(4) - 1.5) / 4 * PIXEL_SIZE  # pixels are means over 4 x 4 points
    fine_x, fine_y = ((v[:, None] + part).ravel() for v in (x, y))
    for image, places in zip(images, at(gold), strict=True):
        for p in places:
            path = np.sqrt(np.maximum(1 - ((fine_x - p[0]) ** 2 + ((fine_y - p[1]) ** 2)[:, None]) / 50**2, 0))
            image -= 6 * path.reshape(SHAPE[0], 4, SHAPE[1], 4).mean((1, 3))
    images += noise * rng.standard_normal(images.shape)
    images[BLANK] = 5.0
    points = gold if beads else centres[np.abs(centres[:, :2]).max(1) < 750]
    return Simulated(images.astype(np.float32), points, at(points))


def error(truth: Simulated, result: Result) -> float:
    """Å, rms distance of points from where they are, after the affine map of the specimen that fits best.

    Affine, since hand and, nearly, the angles' scale can't be seen; it's one map of twelve numbers for all points.
    """
    use = np.array(result.use)
    geometry = TiltGeometry.of(result.alignment, result.use)
    matrices = geometry.matrices.numpy()[use][:, :2]
    scale = geometry.magnification.numpy()[use, None, None]
    one = np.concatenate([truth.points, np.ones((len(truth.points), 1))], axis=1)
    design = np.einsum("tai,pk->tpaik", scale * matrices, one).reshape(-1, 12)
    left = (truth.seen[use] - scale * geometry.shift.numpy()[use][:, None]).reshape(-1)
    left = left - design @ np.linalg.lstsq(design, left, rcond=None)[0]
    return float(np.sqrt(2 * (left**2).mean()))


def aligned(truth: Simulated) -> tuple[Simulated, Result, list[str]]:
    parts: list[str] = []
    result = series.align(
        truth.images.__getitem__, record(truth.images.shape), None, trace=lambda part, state: parts.append(part)
    )
    return truth, result, parts


@pytest.fixture(scope="session")
def with_gold() -> tuple[Simulated, Result, list[str]]:
    return aligned(simulated(12, 0.7))


@pytest.fixture(scope="session")
def without() -> tuple[Simulated, Result, list[str]]:
    return aligned(simulated(0, 2.0))


def check(truth: Simulated, result: Result, doubt: float) -> None:
    """What holds for every alignment; `doubt`: degrees that the axis may be off."""
    count = len(TILTS)
    assert result.use == tuple(j != BLANK for j in range(count))
    for j, reason in enumerate(result.reason):
        assert (reason is None) == (j != BLANK)
    assert str(result.reason[BLANK]).startswith(BECAUSE)
    alignment = result.alignment
    assert alignment.hand_open
    assert abs((np.median(alignment.axis) - AXIS + 90) % 180 - 90) < doubt  # or its opposite
    tilt = np.array(alignment.tilt) - TILTS
    assert np.abs(tilt - tilt.mean()).max() < 0.5  # the specimen is levelled: all of them together may move
    landmarks = alignment.landmarks
    assert landmarks is not None
    points = len(landmarks.xyz)
    assert len(landmarks.kind) == len(landmarks.residual) == points
    assert result.position.shape == result.residual.shape == (count, points, 2)
    assert np.isnan(result.residual[BLANK]).all()
    assert alignment.residual is not None
    assert alignment.residual[BLANK] is None
    known = [r for r in alignment.residual if r is not None]
    squares = np.nanmean((result.residual**2).sum(-1)[np.arange(count) != BLANK], axis=1)
    np.testing.assert_allclose(known, np.sqrt(squares))
    # a slab of 400 Å whose faces are rough
    assert alignment.thickness is not None
    assert 200 < alignment.thickness < 800
    assert alignment.freedom is not None
    assert {"images", "coarse", "gold", "slab"} < set(alignment.freedom["seconds"])
    done = record(truth.images.shape)
    tilts = done.tilts.model_copy(update={"use": result.use, "reason": result.reason})
    line = series.summary(done.model_copy(update={"alignment": alignment, "tilts": tilts}))
    assert line.startswith(f"18 of 19 tilts, axis {np.median(alignment.axis):.1f}°, {points} {landmarks.kind[0]}s")


def test_a_series_with_gold(with_gold: tuple[Simulated, Result, list[str]]) -> None:
    truth, result, parts = with_gold
    check(truth, result, 0.5)  # half a pixel at the field's edge, 75 px away
    landmarks = result.alignment.landmarks
    assert landmarks is not None
    assert set(landmarks.kind) == {"bead"}
    assert landmarks.diameter[0] == pytest.approx(100, rel=0.15)  # of eight pixels
    # five beads at least of twelve that fill the field, each to some tenths of a pixel in each image
    assert len(landmarks.xyz) >= 5
    assert error(truth, result) < 0.5 * PIXEL_SIZE
    assert parts == ["coarse", "constellation", "beads 0", "beads 1", "beads 2"]
    assert [e is None for e in result.alignment.error or ()] == [False] * len(TILTS)


def test_a_series_without_gold(without: tuple[Simulated, Result, list[str]]) -> None:
    truth, result, parts = without
    check(truth, result, 2.5)  # three pixels at the field's edge
    landmarks = result.alignment.landmarks
    assert landmarks is not None
    assert set(landmarks.kind) == {"feature"}
    assert error(truth, result) < 2 * PIXEL_SIZE
    assert parts[:4] == ["coarse", "constellation", "features 0", "features 1"]


def test_going_on_from_an_alignment(with_gold: tuple[Simulated, Result, list[str]]) -> None:
    """From its own result with shifts off by a pixel: no coarse stage, and the same again."""
    truth, result, _ = with_gold
    off = PIXEL_SIZE * np.random.default_rng(1).standard_normal((2, len(TILTS)))
    moved = {
        "shift_x": tuple((np.array(result.alignment.shift_x) + off[0]).tolist()),
        "shift_y": tuple((np.array(result.alignment.shift_y) + off[1]).tolist()),
    }
    known = record(truth.images.shape)
    known = known.model_copy(update={"tilts": known.tilts.model_copy(update={"use": result.use})})
    base = result.alignment.model_copy(update=moved)
    again = series.align(truth.images.__getitem__, known, None, base)
    assert again.first.shift_x == base.shift_x
    assert again.use == result.use
    assert error(truth, again) < 0.5 * PIXEL_SIZE


def on_layers(*heights: float) -> Beads:
    """Twelve beads of 100 Å, spread over the field, in turn at some heights above a plane that rises by 5°."""
    rng = np.random.default_rng(6)
    xy = rng.uniform(-700, 700, (12, 2))
    z = np.resize(heights, 12) / np.cos(np.radians(5)) + np.tan(np.radians(5)) * xy[:, 0] + 60.0
    return Beads(torch.from_numpy(np.c_[xy, z]), 100.0)


def specimen(images: np.ndarray, base: Alignment, beads: Beads | None) -> Slab | None:
    pyramid = Pyramid(images.__getitem__, images.shape, PIXEL_SIZE, [True] * len(images), False)
    known = record(images.shape)
    return series.specimen(pyramid, State.of(base, known.tilts.use, (None,) * len(TILTS), known), beads)


def test_beads_on_two_faces_are_the_specimen() -> None:
    """Layers of beads as far apart as `FACES_APART`: the slab is what they hold; one layer says nothing of a thickness."""
    noise = np.random.default_rng(2).standard_normal((len(TILTS), *SHAPE)).astype(np.float32)
    base = coarse.from_angles(TILTS.tolist(), AXIS)
    found = specimen(noise, base, on_layers(-250.0, 250.0))
    assert found is not None
    assert found.thickness == pytest.approx(500.0 + 100.0, abs=20)  # faces are known to some Å, and the plane to 0.5°
    assert found.height == pytest.approx(60.0, abs=10)
    assert np.degrees(np.arccos(found.normal @ np.array([-np.sin(np.radians(5)), 0, np.cos(np.radians(5))]))) < 0.7
    assert specimen(noise, base, on_layers(-0.4 * series.FACES_APART, 0.4 * series.FACES_APART)) is None
    assert specimen(noise, base, None) is None


def test_beads_on_one_face_lie_in_the_specimen(without: tuple[Simulated, Result, list[str]]) -> None:
    """Where they lie in one layer the density says how thick it is, and balls above it are held too."""
    truth, result, _ = without
    images = truth.images
    seen = specimen(images, result.alignment, None)
    assert seen is not None
    normal = np.array(seen.normal)
    xy = np.random.default_rng(6).uniform(-400, 400, (4, 2))
    up = seen.thickness / 2 + 30.0  # of which the beads' upper halves stick out by 80 Å
    above = np.c_[xy, seen.height + (up - xy @ normal[:2]) / normal[2]]
    held = specimen(images, result.alignment, Beads(torch.from_numpy(above), 100.0))
    assert held is not None
    # the density is measured again, without what the beads hide: they are what the upper face is made of
    top = held.height * held.normal[2] + held.thickness / 2
    reach = (above @ np.array(held.normal)).max() + 50.0
    assert top == pytest.approx(reach)


def test_noise_is_refused() -> None:
    images = np.random.default_rng(1).normal(size=(15, 64, 64)).astype(np.float32)
    with pytest.raises(InputError, match="agree"):
        series.align(images.__getitem__, record(images.shape, np.linspace(-56, 56, 15)), None)


def test_mostly_noise_is_refused() -> None:
    """Where only few of the images agree with each other, that's an alignment of nothing."""
    truth = simulated(0, 2.0)
    images = truth.images[:, 20:120, 24:124].copy()
    good = [9, 10, 11, 12]
    for j in range(len(images)):
        if j not in good:
            images[j] = np.random.default_rng(j).normal(size=images.shape[1:])
    with pytest.raises(InputError, match="agree") as caught:
        series.align(images.__getitem__, record(images.shape), AXIS)
    assert caught.value.remedy


def test_summary_without_an_alignment() -> None:
    assert series.summary(record((19, *SHAPE))) == "not aligned"


@pytest.mark.parametrize("shape", [(120, 96), (121, 97), (118, 103)])
def test_a_pyramid_keeps_the_origin(shape: tuple[int, int]) -> None:
    """A blob around pixel n//2 stays there at all samplings, directly and by way of finer ones."""
    y, x = ((np.arange(n) - n // 2) for n in shape)
    image = -np.exp(-(x**2 + y[:, None] ** 2) / (2 * 12.0**2))

    def pyramid(bright: bool = False) -> Pyramid:
        return Pyramid(lambda j: image, (2, *shape), 2.0, [True, False], bright)

    by_steps = pyramid()
    for binning in (1, 2, 4):
        level = by_steps.level(binning)
        assert level.shape == (2, shape[0] // binning, shape[1] // binning)
        assert not level[1].any()  # not wanted
        assert abs(float(level[0].mean())) < 1e-5
        assert float(level[0].std()) == pytest.approx(1, abs=1e-3)
        weight = np.maximum(-level[0] - 0.5, 0).astype(float)
        line_y, line_x = (np.arange(n) - n // 2 for n in weight.shape)
        middle = (weight * line_x).sum() / weight.sum(), (weight * line_y[:, None]).sum() / weight.sum()
        # of what is above a threshold of a sampled blob, and odd sizes lose a line on one side
        np.testing.assert_allclose(middle, 0, atol=0.03)
        direct = pyramid().level(binning)
        # cropping the transform twice or once is the same, but for the border that is cut off before it
        inner = (0, slice(2, -2), slice(2, -2))
        assert np.abs(level[inner] - direct[inner]).max() < 0.02
        np.testing.assert_allclose(pyramid(bright=True).level(binning), -direct, atol=1e-5)
    assert by_steps.level(4) is by_steps.level(4)
    assert by_steps.field == (2.0 * shape[1], 2.0 * shape[0])


def test_levels_come_from_finer_ones() -> None:
    """With sides that divide, the same whether from the images or from a finer level; and without loading them again."""
    loaded: list[int] = []
    images = np.random.default_rng(0).normal(100, 20, (3, 64, 80)).astype(np.float32)

    def load(j: int) -> np.ndarray:
        loaded.append(j)
        image: np.ndarray = images[j]
        return image

    pyramid = Pyramid(load, images.shape, 3.0, [True] * 3, False)
    pyramid.level(2)
    coarser = pyramid.level(8)
    assert loaded == [0, 1, 2]
    np.testing.assert_allclose(coarser, Pyramid(load, images.shape, 3.0, [True] * 3, False).level(8), atol=1e-4)


def test_samplings_are_powers_of_two() -> None:
    pyramid = Pyramid(lambda j: np.zeros((4, 4)), (1, 400, 600), 3.0, [True], False)
    assert [pyramid.binning(p) for p in (1.0, 3.0, 5.9, 6.0, 11.9, 12.0)] == [1, 1, 1, 2, 2, 4]
    assert [pyramid.near(p) for p in (1.0, 4.0, 4.5, 8.0, 9.0, 24.0)] == [1, 1, 2, 2, 4, 8]
    assert pyramid.diameter == 450.0  # a quarter of the longer side


def test_an_image_at_another_tilt_is_left_out(with_gold: tuple[Simulated, Result, list[str]]) -> None:
    """As a copy is; where all tilts stray, none of them is singled out."""
    truth, result, _ = with_gold
    known = record(truth.images.shape)
    others = np.random.default_rng(3).normal(0, 0.5, len(TILTS))
    for stray, expected in ((np.zeros(len(TILTS)), [4]), (others, [])):
        tilt = np.array(known.tilts.nominal) + stray
        tilt[4] += 2.0
        state = State.of(result.alignment, known.tilts.use, (None,) * len(TILTS), known)
        state.alignment = state.alignment.model_copy(update={"tilt": tuple(tilt.tolist())})
        state.error = np.ones(len(TILTS))
        series._judge(state, known)
        assert [j for j, used in enumerate(state.use) if known.tilts.use[j] and not used] == expected
        assert all("instead of" in str(state.reason[j]) for j in expected)
