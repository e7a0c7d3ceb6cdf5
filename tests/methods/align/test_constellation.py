"""Constellations: dark discs in images, and images placed by all their beads at once, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from libemc.methods.align import bundle, constellation
from libemc.methods.align.gold import Beads
from libemc.numerics.peaks import highest_peak

DIAMETER = 100.0  # Å
PIXEL_SIZE = 20.0  # Å: a bead's fifth, as `series` has it
SHAPE = (96, 130)
FIELD = (SHAPE[1] * PIXEL_SIZE, SHAPE[0] * PIXEL_SIZE, 800.0)
TILTS = np.linspace(-60, 60, 21)
SEED = [8, 9, 10, 11, 12]
EMPTY = 4  # an image without beads
AXIS = -75.0


def draw(image: np.ndarray, at: np.ndarray, depth: float) -> None:
    """Take a ball's projection, `at` Å (x, y) from pixel n//2, off an image; pixels are means over 4 x 4 points."""
    part = (np.arange(4) - 1.5) / 4
    y, x = (((np.arange(n) - n // 2)[:, None] + part).ravel() * PIXEL_SIZE for n in image.shape)
    r2 = (x - at[0]) ** 2 + ((y - at[1]) ** 2)[:, None]
    path = np.sqrt(np.maximum(1 - 4 * r2 / DIAMETER**2, 0))
    image -= depth * path.reshape(image.shape[0], 4, image.shape[1], 4).mean((1, 3))


@pytest.mark.parametrize("shape", [(64, 80), (65, 81), (64, 81), (65, 80)])
def test_spots_are_where_beads_are(shape: tuple[int, int]) -> None:
    """The peak is at a bead's middle, whatever part of a pixel that is at, far above noise of deviation 1."""
    rng = np.random.default_rng(0)
    where = np.array([[-331.0, -205.0], [0.0, 0.0], [247.0, 133.0], [411.0, -288.0]])
    images = 0.1 * rng.standard_normal((3, *shape))
    images[2] = 0
    for at in where:
        draw(images[0], at, 3.0)
    images[0] += 7.0  # a constant is no disc
    maps = constellation.spots(images.astype(np.float32), PIXEL_SIZE, DIAMETER)
    assert maps.shape == images.shape
    assert not maps[2].any()  # an image that isn't wanted
    assert float(maps[1].std()) == pytest.approx(1, abs=0.1)  # a thousand discs of noise
    assert float(maps[1].abs().max()) < 6
    middle = np.array([shape[1] // 2, shape[0] // 2])
    for at in where / PIXEL_SIZE:
        x, y = np.round(at).astype(int) + middle
        peak, height = highest_peak(maps[0, y - 3 : y + 4, x - 3 : x + 4])
        # a paraboloid through a peak that is two and a half pixels wide
        np.testing.assert_allclose(peak.numpy() - 3, at + middle - (x, y), atol=0.15)
        assert float(height) > 20


def test_spots_have_the_size_of_a_bead() -> None:
    """A disc on a large dark patch, or the patch's edge, is none; one of twice the size is a weaker one."""
    image = np.zeros((96, 96))
    image[40:, :] = -5.0
    image += 0.1 * np.random.default_rng(0).standard_normal(image.shape)
    heights = []
    for size in (DIAMETER, 2 * DIAMETER):
        one = image.copy()
        part = one[4:36, 30:66]
        y, x = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in part.shape)
        part[np.hypot(x, y[:, None]) < size / 2] -= 5.0
        map_ = constellation.spots(one[None].astype(np.float32), PIXEL_SIZE, DIAMETER)[0]
        heights.append(float(map_[20, 48]))
        # the ring of a disc beside the edge has a half of it at most: the disc itself has all
        assert float(map_[30:50].max()) < 0.6 * heights[0]
        assert float(map_[56:90].abs().max()) < 0.05 * heights[0]
    assert heights[1] < 0.6 * heights[0]


@dataclass
class Simulated:
    """Maps of spots, the true geometry and points, and the geometry that is right for the seed only."""

    maps: torch.Tensor
    truth: bundle.Geometry
    points: np.ndarray
    start: bundle.Geometry

    def place(self, beads: int = 8) -> tuple[bundle.Geometry, Beads, list[int]]:
        """By the first beads, which are known to 30 Å along z and a third of that across."""
        error = np.random.default_rng(8).normal(size=(beads, 3)) * [10, 10, 30]
        known = Beads(torch.from_numpy(self.points[:beads] + error), DIAMETER)
        others = [j for j in range(len(TILTS)) if j not in SEED]
        return constellation.place(self.maps, PIXEL_SIZE, self.start, known, SEED, others[::-1], FIELD)

    def error(self, found: bundle.Geometry, placed: list[int]) -> np.ndarray:
        """(placed,) Å, rms over the beads, after the motion of all that fits best: that can't be seen."""
        rest = (found.project(self.points) - self.truth.project(self.points))[placed]
        design = np.broadcast_to(found.matrices[placed][:, None, :2], (*rest.shape, 3)).reshape(-1, 3)
        rest = rest - (design @ np.linalg.lstsq(design, rest.reshape(-1), rcond=None)[0]).reshape(rest.shape)
        out: np.ndarray = np.sqrt((rest**2).sum(-1).mean(1))
        return out


def simulated(false: int, empty: Sequence[int] = (EMPTY,)) -> Simulated:
    """Eight beads in a slab of 600 Å, noise, false spots; all but the seed are anywhere within a third of the field."""
    rng = np.random.default_rng(3)
    grid = np.array([[x, y] for x in (-0.36, -0.12, 0.12, 0.36) for y in (-0.22, 0.22)]) * FIELD[:2]
    points = np.concatenate([grid + rng.uniform(-90, 90, (8, 2)), rng.uniform(-300, 300, (8, 1))], axis=1)
    count, zeros = len(TILTS), np.zeros(len(TILTS))
    shift = rng.uniform(-1, 1, (count, 2)) * np.array(FIELD[:2]) / 3
    shift[SEED] = rng.normal(0, 60, (len(SEED), 2))
    magnification = 1 + 0.02 * np.sin(np.arange(count))
    truth = bundle.Geometry(np.full(count, AXIS), TILTS, zeros, magnification, shift)
    points = points @ bundle.Geometry(truth.axis[:1], zeros[:1], zeros[:1], magnification, shift).matrices[0]
    images = rng.standard_normal((count, *SHAPE))
    for j, places in enumerate(truth.project(points)):
        for at in places if j not in empty else ():
            draw(images[j], at, 8.0)
        for at in rng.uniform(-0.5, 0.5, (false, 2)) * FIELD[:2]:
            draw(images[j], at, 8.0)
    maps = constellation.spots(images.astype(np.float32), PIXEL_SIZE, DIAMETER)
    start = np.where(np.isin(np.arange(count), SEED)[:, None], shift + rng.normal(0, 8, shift.shape), 0.0)
    return Simulated(maps, truth, points, replace(truth, shift=start))


@pytest.fixture(scope="module")
def with_false_spots() -> Simulated:
    return simulated(6)


def test_images_are_placed(with_false_spots: Simulated) -> None:
    """All that show beads, wherever in the field, nearest in tilt first; and the beads' places get better."""
    s = with_false_spots
    before = replace(s.start, shift=s.start.shift.copy())
    found, beads, placed = s.place()
    np.testing.assert_array_equal(s.start.shift, before.shift)  # the arguments are as they were
    assert sorted(placed) == [j for j in range(len(TILTS)) if j != EMPTY]
    assert placed[: len(SEED)] == SEED
    for k, j in enumerate(placed[len(SEED) :], len(SEED)):
        distances = [min(abs(TILTS[i] - TILTS[h]) for h in placed[:k]) for i in placed[k:]]
        assert distances[0] == min(distances), j
    far = np.abs(s.truth.shift - before.shift).max(1)[placed]
    assert far.max() > 0.27 * FIELD[0]
    # five beads or more in an image, each to a sixth of a pixel as in the test of `spots`, and a false one at times
    assert s.error(found, placed).max() < 0.2 * PIXEL_SIZE
    assert np.all(found.axis == found.axis[0])
    assert abs(found.axis[0] - AXIS) < 0.25  # a quarter of a pixel at the field's edge
    np.testing.assert_array_equal(found.magnification, s.truth.magnification)
    assert beads.diameter == DIAMETER
    rest = beads.points.numpy() - s.points
    assert (
        np.abs(rest - rest.mean(0)).max() < 0.5 * PIXEL_SIZE
    )  # 30 Å of deviation before; along z the wedge is missing


def test_an_image_of_the_seed_may_be_wrong(with_false_spots: Simulated) -> None:
    s = with_false_spots
    wrong = replace(s.start, shift=s.start.shift.copy())
    wrong.shift[10] += [400.0, -300.0]
    found, _, placed = replace(s, start=wrong).place()
    assert sorted(placed) == [j for j in range(len(TILTS)) if j != EMPTY]
    assert placed.index(10) >= len(SEED) - 1
    assert s.error(found, placed).max() < 0.2 * PIXEL_SIZE  # as if it had been right


def test_false_spots_are_no_constellation() -> None:
    """As many dark spots as there are beads, anywhere, don't place an image."""
    _, _, placed = simulated(8, [j for j in range(len(TILTS)) if j not in SEED]).place()
    assert placed == SEED


def test_too_few_beads_place_nothing(with_false_spots: Simulated) -> None:
    """With fewer than `LEAST_BEADS` in the seed's images all stays as it was."""
    s = with_false_spots
    found, beads, placed = s.place(constellation.LEAST_BEADS - 1)
    assert placed == []
    assert found is s.start
    assert len(beads.points) == constellation.LEAST_BEADS - 1
