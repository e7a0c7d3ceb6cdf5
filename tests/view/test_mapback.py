"""Pictures of particles placed back: light from the upper left, colours and the backdrop where they belong, written whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from libemc.view import mapback as view


def ball(size: int = 60, radius: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Depth and normals of a ball in the middle."""
    y, x = np.indices((size, size)) - size / 2
    z2 = radius**2 - x**2 - y**2
    hit = z2 > 0
    z = np.sqrt(np.maximum(z2, 0))
    normal = np.where(hit[..., None], np.stack([x, y, z], -1) / radius, 0).astype(np.float32)
    return np.where(hit, 50 - z, np.inf).astype(np.float32), normal


def test_a_ball_is_lit_from_the_upper_left() -> None:
    """Rows go up: its brightest part is above and left of its middle, its own colour stays, the backdrop around it too."""
    depth, normal = ball()
    colour = np.tile([0.9, 0.4, 0.1], (60, 60, 1))
    image = view.shaded(depth, normal, colour, np.full((60, 60), 0.8))
    assert image.shape == (60, 60, 3) and 0 <= image.min() <= image.max() <= 1
    assert np.allclose(image[~np.isfinite(depth)], 0.8)
    row, column = np.unravel_index(np.where(np.isfinite(depth), image.sum(-1), 0).argmax(), (60, 60))
    assert row > 30 and column < 30
    inside = image[25:35, 25:35].reshape(-1, 3)
    assert (inside[:, 0] > inside[:, 1]).all() and (inside[:, 1] > inside[:, 2]).all()


def test_what_is_far_is_hazier() -> None:
    """Two balls of one colour, the one on the right 100 voxels farther off: it is nearer to the backdrop."""
    depth, normal = ball()
    both = np.concatenate([depth, depth + 100], axis=1)
    colour = np.tile([0.9, 0.1, 0.1], (60, 120, 1))
    image = view.shaded(both, np.concatenate([normal, normal], axis=1), colour, np.full((60, 120), 0.9))
    left, right = image[30, 30], image[30, 90]
    assert np.ptp(left) > np.ptp(right) + 0.2


def test_nothing_is_the_backdrop() -> None:
    nothing = np.full((5, 6), np.inf, np.float32)
    image = view.shaded(nothing, np.zeros((5, 6, 3), np.float32), np.zeros((5, 6, 3)), np.full((5, 6), 0.5))
    assert (image == 0.5).all()


def test_the_backdrop_is_pale_and_paper_where_it_ends() -> None:
    section = np.random.default_rng(0).normal(size=(40, 50))
    section[:, 45:] = np.nan
    grey = view.pale(section, section.shape)
    assert (grey[:, 45:] == view.PAPER).all()
    assert grey[:, :45].min() == view.PALE[0] and grey[:, :45].max() == view.PALE[1]
    assert (view.pale(None, (3, 4)) == view.PAPER).all()


def test_colours() -> None:
    kinds = view.by_kind([1, 0, 1, 8], [f"class {k}" for k in range(9)])
    assert (kinds.rgb[0] == kinds.rgb[2]).all() and (kinds.rgb[0] != kinds.rgb[1]).any()
    assert (kinds.rgb[3] == kinds.rgb[1]).all() and len(kinds.names) == 9  # the ninth is the first again
    score = np.array([0.0, 0.5, 1.0, np.nan])
    scale = view.score_scale(np.linspace(0, 1, 101))
    np.testing.assert_allclose(scale, (0.05, 0.95))
    found = view.by_score(score, scale)
    assert tuple(found.rgb[3]) == view.UNKNOWN
    assert found.rgb[0, 2] > found.rgb[2, 2] and found.rgb[2, 0] > found.rgb[0, 0]  # from blue to yellow


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    depth, normal = ball()
    image = view.shaded(depth, normal, np.tile([0.0, 0.2, 0.9], (60, 60, 1)), np.full((60, 60), 0.9))
    kinds, scores = view.by_kind([0, 1], ["class 1: 5", "class 2: 7"]), view.by_score([0.1, 0.2], (0.1, 0.2))
    for name, colours in (("kinds", kinds), ("scores", scores)):
        path = tmp_path / f"{name}.png"
        view.mapback_picture(path, image, image[20:40], 10.0, colours, "a title")
        picture = imread(path)[..., :3]
        blue = (picture[..., 2] > 0.5) & (picture[..., 0] < 0.3)
        assert min(picture.shape[:2]) > 300 and blue.sum() > 1000
    rng = np.random.default_rng(0)
    found = view.Neighbours(
        rng.normal(200, 20, 50), rng.normal(180, 40, (20, 50)), rng.uniform(0, 180, 30), rng.uniform(0, 180, 500),
        rng.uniform(-200, 200, (300, 3)), 300.0,
    )  # fmt: skip
    view.neighbours_plot(tmp_path / "neighbours.png", found, "a title")
    empty = view.Neighbours(
        found.distance[:1], found.chance, found.angle[:0], found.chance_angle, found.around[:0], 300.0
    )
    view.neighbours_plot(tmp_path / "few.png", empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.png", "kinds.png", "neighbours.png", "scores.png"]
