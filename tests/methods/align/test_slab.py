"""slab: planes of known points and volumes, and a levelled alignment that moves no image point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from libemc.methods.align import slab
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Landmarks


def angle(found, normal):
    """Degrees between a slab's normal and another."""
    return math.degrees(math.acos(min(1.0, float(np.dot(found.normal, normal)))))


def normal_of(about_y, about_x):
    return tilt_matrices(0.0, about_y, about_x).numpy()[:, 2]


def layer(normal, height, heights, rng, field=2400.0):
    """Points at given distances from a plane, anywhere in the field."""
    xy = rng.uniform(-field / 2, field / 2, (len(heights), 2))
    return np.c_[xy, height + (heights - xy @ normal[:2]) / normal[2]]


def an_alignment(count=21):
    rng = np.random.default_rng(4)
    nominal = np.linspace(-60, 60, count)
    return Alignment(
        axis=tuple(-93 + rng.normal(0, 0.1, count)),
        tilt=tuple(nominal + rng.normal(0, 0.2, count)),
        xtilt=tuple(rng.normal(0.5, 0.1, count)),
        shift_x=tuple(rng.normal(0, 100, count)),
        shift_y=tuple(rng.normal(0, 100, count)),
        magnification=tuple(1 + rng.normal(0, 1e-3, count)),
        landmarks=Landmarks(
            xyz=tuple(map(tuple, rng.normal(0, 500, (12, 3)).tolist())),
            kind=("feature",) * 12,
            diameter=(None,) * 12,
            residual=(1.0,) * 12,
        ),
    )


def test_levelling_moves_no_image_point() -> None:
    """Landmarks are seen where they were, to rounding (1e-9 of lengths of 1000 Å); the slab lies at z = 0, flat."""
    before = an_alignment()
    found = slab.Slab(tuple(normal_of(6.0, -5.0).tolist()), 130.0, 700.0, 0.1, 20, 1.0)
    after = slab.level(before, found)
    use = [True] * len(before.tilt)
    seen = [
        TiltGeometry.of(a, use).project(torch.tensor(a.landmarks.xyz, dtype=torch.float64))[0] for a in (before, after)
    ]
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-9)
    assert after.thickness == 700.0
    # points of the middle plane: those of the old frame, carried over by what carries the landmarks over
    rng = np.random.default_rng(0)
    plane = layer(np.array(found.normal), 130.0, np.zeros(12), rng)
    moved = slab.level(
        before.model_copy(update={"landmarks": before.landmarks.model_copy(update={"xyz": tuple(map(tuple, plane))})}),
        found,
    )
    np.testing.assert_allclose(np.array(moved.landmarks.xyz)[:, 2], 0, atol=1e-9)
    # the angles stay near what they were: changes are of the order of the slab's slopes (7.8 degrees in all)
    assert np.abs(np.subtract(after.axis, before.axis)).max() < 15
    assert np.abs(np.subtract(after.tilt, before.tilt)).max() < 8


def test_levelling_a_level_slab_changes_nothing() -> None:
    before = an_alignment()
    after = slab.level(before, slab.Slab((0.0, 0.0, 1.0), 0.0, 700.0, 0.1, 20, 1.0))
    for name in ("axis", "tilt", "xtilt", "shift_x", "shift_y"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), atol=1e-9)


@pytest.mark.parametrize("strays", [0, 2])
def test_points_on_two_faces(strays: int) -> None:
    """24 points within 10 Å of two faces fix the plane to 10 Å over some 1000 Å: about 0.5 degrees; strays don't count."""
    rng = np.random.default_rng(1)
    normal = normal_of(5.0, -7.0)
    points = layer(normal, 60.0, np.tile([-300.0, 300.0], 12) + rng.uniform(-5, 5, 24), rng)
    extra = np.c_[rng.uniform(-1200, 1200, (strays, 2)), rng.uniform(700, 900, strays)]
    found = slab.plane_of_points(np.concatenate([points, extra]), depth=2000.0)
    assert found is not None and angle(found, normal) < 0.5
    assert found.height == pytest.approx(60.0, abs=10)
    assert found.thickness == pytest.approx(600.0, abs=20)
    assert found.angle_error < 1


def test_points_all_through_a_slab() -> None:
    """The slope of 150 uniform points in 500 Å: the layer's ends are known to about 500/150 Å, over a quarter of the field."""
    rng = np.random.default_rng(2)
    normal = normal_of(-4.0, 3.0)
    found = slab.plane_of_points(layer(normal, -80.0, rng.uniform(-250, 250, 150), rng), depth=2000.0)
    assert found is not None and angle(found, normal) < 1.0
    assert found.height == pytest.approx(-80.0, abs=20)
    assert found.thickness == pytest.approx(500.0, rel=0.05)


def test_no_slab_in_too_little() -> None:
    """Too few points, points of a needle, points everywhere."""
    rng = np.random.default_rng(3)
    assert slab.plane_of_points(rng.normal(0, 100, (4, 3))) is None
    needle = np.c_[rng.uniform(-1000, 1000, 60), rng.normal(0, 30, 60), rng.normal(0, 30, 60)]
    assert slab.plane_of_points(needle, depth=2000.0) is None
    assert slab.plane_of_points(rng.uniform(-1000, 1000, (200, 3)), depth=2000.0) is None


def noisy_halves(points, rng, radius=80.0, shape=(70, 110, 110), pixel_size=24.0):
    """Two volumes of the same balls with noise of their own."""
    signal = np.zeros(shape)
    index = np.round(points[:, ::-1] / pixel_size).astype(int) + np.array(shape) // 2
    signal[tuple(index.T)] = 1
    signal = gaussian_filter(signal, radius / 2 / pixel_size)
    signal /= signal.max()
    return [signal + gaussian_filter(rng.normal(0, 0.6, shape), 0.7) for _ in range(2)]


def test_measured_in_volumes() -> None:
    """Balls in a slab: plane within a degree, height within 50 Å, thickness, to the balls' edges, within 15 %."""
    rng = np.random.default_rng(5)
    normal = normal_of(6.0, 4.0)
    points = layer(normal, 100.0, rng.uniform(-200, 200, 120), rng)
    found = slab.measure(*noisy_halves(points, rng), 24.0)
    assert found is not None and angle(found, normal) < 1.0
    assert found.height == pytest.approx(100.0, abs=50)
    assert found.thickness == pytest.approx(400 + 160, rel=0.15)


def test_nothing_in_noise() -> None:
    rng = np.random.default_rng(6)
    assert slab.measure(*[rng.normal(size=(40, 80, 80)) for _ in range(2)], 20.0) is None


def test_halves_show_beads_where_they_are() -> None:
    """Dots in images come back at their places in both halves, and the slab from them is theirs."""
    rng = np.random.default_rng(7)
    normal = normal_of(-5.0, 4.0)
    points = layer(normal, 50.0, np.tile([-200.0, 200.0], 12), rng, field=1200.0)
    tilts, n, pixel_size = torch.linspace(-57, 57, 39).double(), 96, 20.0
    geometry = TiltGeometry(
        tilt_matrices(30.0, tilts, 0.0), torch.zeros(39, 2).double(), torch.ones(39).double(), torch.ones(39).bool()
    )
    u = (np.arange(n) - n // 2) * pixel_size
    images = []
    for q in geometry.project(torch.from_numpy(points))[0].numpy().transpose(1, 0, 2):
        spot = np.exp(-((u - q[:, 0, None]) ** 2)[:, None] / 2450 - ((u - q[:, 1, None]) ** 2)[:, :, None] / 2450)
        images.append(-spot.sum(0) + rng.normal(0, 0.3, (n, n)))
    first, second = slab.half_tomograms(np.array(images, np.float32), geometry, pixel_size, 1300.0)
    assert first.shape == second.shape == (64, n, n)  # 1300 Å in voxels of 20 Å, an even number of them
    found = slab.measure(first, second, pixel_size)
    assert found is not None and angle(found, normal) < 1.0
    assert found.height == pytest.approx(50.0, abs=20)


def a_slab(normal, height=40.0, thickness=600.0):
    return slab.Slab(tuple(normal.tolist()), height, thickness, 0.1, 20, 1.0)


@pytest.mark.parametrize("tilted", [(0.0, 0.0), (7.0, -9.0)])
def test_a_slab_holds_balls(tilted: tuple[float, float]) -> None:
    """Balls inside change nothing; one above makes it thicker by what sticks out, and lifts its middle by half of that."""
    rng = np.random.default_rng(8)
    normal, radius = normal_of(*tilted), 50.0
    before = a_slab(normal)
    inside = layer(normal, 40.0, rng.uniform(-249, 249, 20), rng)
    assert_the_same(slab.holding(before, inside, radius), before)
    assert_the_same(slab.holding(before, np.zeros((0, 3)), radius), before)
    above = layer(normal, 40.0, np.array([370.0]), rng)
    # 370 + 50 over the middle, 300 below; along z the middle rises by more than along the normal
    after = slab.holding(before, np.concatenate([inside, above]), radius)
    assert after.thickness == pytest.approx(720.0)
    assert after.height == pytest.approx(40.0 + 60.0 / normal[2])
    below = layer(normal, 40.0, np.array([-270.0]), rng)
    both = slab.holding(before, np.concatenate([above, below]), radius)
    assert both.thickness == pytest.approx(740.0)
    assert both.height == pytest.approx(40.0 + 50.0 / normal[2])
    # it holds them then: once more changes nothing
    assert_the_same(slab.holding(both, np.concatenate([above, below]), radius), both)


def assert_the_same(one: slab.Slab, other: slab.Slab) -> None:
    """To rounding."""
    assert (one.height, one.thickness) == pytest.approx((other.height, other.thickness))
    assert one.normal == other.normal


def test_balls_far_away_are_ignored() -> None:
    """Farther from the middle than one and a half times the thickness."""
    normal = normal_of(3.0, 2.0)
    before = a_slab(normal)
    far = layer(normal, 40.0, np.array([-905.0, 905.0, 4000.0]), np.random.default_rng(9))
    assert_the_same(slab.holding(before, far, 50.0), before)
    near = layer(normal, 40.0, np.array([895.0]), np.random.default_rng(9))
    assert slab.holding(before, near, 50.0).thickness == pytest.approx(895.0 + 50.0 + 300.0)
