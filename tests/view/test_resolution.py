"""resolution: figures that are written whole and show what they were given where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from libemc.view import resolution


def drawn(path: Path) -> np.ndarray:
    """The picture; nothing else is left in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    return picture


AXES = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [-0.7, 0, 0.714], [0, -0.7, 0.714]])


def test_directions(tmp_path: Path) -> None:
    k = np.linspace(0, 0.1, 17)
    curves = np.stack([np.exp(-((k / w) ** 2)) for w in (0.03, 0.04, 0.05, 0.06, 0.07)])
    resolution.directions_plot(
        tmp_path / "d.png", k, curves.mean(axis=0), curves, AXES, [20, 18, 16, 14, 12], {"0.143": 0.143}, "title"
    )
    drawn(tmp_path / "d.png")


def test_a_direction_lies_where_it_points() -> None:
    """Right for +x, up for +y; an axis and its opposite are one, so the rim shows both ends."""
    disc = resolution._on_a_disc(AXES, np.array([1.0, 2, 3, 4, 5]))
    middle, last = disc.shape[0] // 2, disc.shape[0] - 1
    assert np.isnan(disc[0, 0]) and abs(disc[middle, middle] - 1) < 0.2
    assert abs(disc[middle, last] - 2) < 0.3 and abs(disc[last, middle] - 3) < 0.3
    assert abs(disc[middle, 0] - 2) < 0.3
    radius = round(middle * np.sqrt(1 - 0.714))
    assert abs(disc[middle, middle - radius] - 4) < 0.3 and abs(disc[middle - radius, middle] - 5) < 0.3


def test_places(tmp_path: Path) -> None:
    """Colour where the resolution is known, grey where it is not: blue and red for the good and the bad half."""
    volume = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    found = np.zeros_like(volume)
    found[8:16, 8:16, 6:12], found[8:16, 8:16, 12:18] = 8.0, 16.0
    resolution.local_resolution_plot(tmp_path / "l.png", volume, found, 3.0)
    picture = drawn(tmp_path / "l.png")
    slices = picture[:, picture.shape[1] // 8 : 3 * picture.shape[1] // 4]
    red, blue = slices[..., 0] - slices[..., 1], slices[..., 2] - slices[..., 1]
    assert (red > 0.15).sum() > 500 and (blue > 0.05).sum() > 500


def test_guinier(tmp_path: Path) -> None:
    x = np.linspace(0, 0.05, 30)
    y = 3 - 40 * x
    y[25:] = -np.inf
    resolution.guinier_plot(tmp_path / "g.png", x, y, -40.0, 3.0, (10.0, 5.0), "B")
    picture = drawn(tmp_path / "g.png")
    assert ((picture[..., 0] > 0.65) & (picture[..., 1] < 0.2)).sum() > 100  # the red line
