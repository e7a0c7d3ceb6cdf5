"""Pictures of a descent: their sizes, and what is where in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from libemc.view import initial_model as view

STEPS = 30


def frames() -> np.ndarray:
    """A spot that gets brighter in xy, and moves to the right; slices of two classes side by side."""
    out = np.random.default_rng(0).normal(0, 0.01, (STEPS + 1, 3, 20, 40)).astype(np.float32)
    for k in range(STEPS + 1):
        out[k, 0, 9:12, 4 + k : 7 + k] += 1 + k
    return out


def test_steps_that_are_shown() -> None:
    assert view.shown(4) == [0, 1, 2, 3]
    many = view.shown(STEPS + 1)
    assert len(many) == view.MOST_COLUMNS and many[0] == 0 and many[-1] == STEPS and many == sorted(set(many))


def test_the_strip(tmp_path: Path) -> None:
    view.course_strip(tmp_path / "strip.png", frames(), [100.0] * 10 + [60.0] * 20, 12.0)
    wide, high = Image.open(tmp_path / "strip.png").size
    assert wide > 3 * high  # twelve pairs of slices in three rows


def test_the_movie_has_a_frame_for_each_step(tmp_path: Path) -> None:
    view.course_movie(tmp_path / "movie.png", frames(), [100.0] * STEPS)
    picture = Image.open(tmp_path / "movie.png")
    assert picture.n_frames == STEPS + 1
    times = -(-view.MAGNIFIED // 20)
    thin = -(-3 * 40 * times // 512)
    for k in (3, 25):
        picture.seek(k)
        image = np.array(picture.convert("L"))[16:]  # below the label
        y, x = np.unravel_index(image.argmax(), image.shape)
        assert abs(x * thin / times - (5 + k)) <= 1.5
        assert abs((picture.height - (y + 16)) * thin / times - 10) <= 2  # y upward


def test_the_curves(tmp_path: Path) -> None:
    steps = [
        {"band": 100.0 - k, "heat": 5.0 / (k + 1), "evidence": float(k), "change": 0.1 / (k + 1)} for k in range(9)
    ]
    view.course_plot(tmp_path / "course.png", {0: steps, 3: steps[:4]})
    assert Image.open(tmp_path / "course.png").size[0] > 800
    view.course_plot(tmp_path / "one.png", {0: steps})
    one, two = (np.array(Image.open(tmp_path / n).convert("L")).astype(int) for n in ("one.png", "course.png"))
    assert one.shape != two.shape or np.abs(one - two).max() > 50
