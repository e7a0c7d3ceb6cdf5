"""plots: pictures that are written whole or not at all, of the size and with the content that was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from libemc.view import plots

BLACK_ON_WHITE = 0.1
"""A picture with axes, text and lines in it varies at least so much about its mean."""


def drawn(path: Path) -> np.ndarray:
    """The picture; nothing else is left in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)
    assert min(picture.shape[:2]) > 300 and picture.std() > BLACK_ON_WHITE
    return picture


def same_colour(picture: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Where a picture is of a colour to within two steps of 255."""
    return (np.abs(picture[..., :3] - np.array(colour)) < 2.5 / 255).all(axis=-1)


def test_fsc(tmp_path: Path) -> None:
    """The red dotted line stands at the resolution's frequency: two thirds of the axis, whose ends the blue curve marks."""
    k = np.linspace(0, 0.1, 33)
    curves = {"unmasked": np.exp(-((k / 0.03) ** 2)), "masked": np.ones(33)}
    thresholds = {"0.143": 0.143, "half_bit": np.full(33, 0.2)}
    plots.fsc_plot(tmp_path / "fsc.png", k, curves, thresholds, 15.0, "15.00 Å")
    picture = drawn(tmp_path / "fsc.png")
    blue = same_colour(picture, (0x21 / 255, 0x66 / 255, 0xAC / 255))
    row = int(np.argmax(blue.sum(axis=1)))
    ends = np.nonzero(blue[row])[0]
    red = np.nonzero(same_colour(picture, (0xB2 / 255, 0x18 / 255, 0x2B / 255)).sum(axis=0) > 100)[0]
    assert red.mean() == pytest.approx(
        ends.min() + (ends.max() - ends.min()) * 2 / 3, abs=3
    )  # pixels of a line's width


def test_fsc_without_a_mark_or_thresholds(tmp_path: Path) -> None:
    plots.fsc_plot(tmp_path / "fsc.png", [0.0, 0.1, 0.2], {"mine": [1.0, -0.9, 0.2]}, {})
    drawn(tmp_path / "fsc.png")


def test_ticks_are_round_and_apart() -> None:
    ticks = plots.resolution_ticks(0.1)
    assert ticks[-1] == 10 and {20, 60} <= set(ticks)
    assert np.diff(1 / np.array(ticks)).min() >= 0.007 * (1 - 1e-9)
    assert 5 < len(plots.resolution_ticks(0.37)) < 15


def test_angular_distribution(tmp_path: Path) -> None:
    """Views from one direction are one bright cell: right of the middle for rot 60, on the equator for tilt 90."""
    rng = np.random.default_rng(0)
    rot, tilt = rng.uniform(-180, 180, 300), np.degrees(np.arccos(rng.uniform(-1, 1, 300)))
    plots.angular_distribution_plot(
        tmp_path / "a.png", np.append(rot, [61.0] * 300), np.append(tilt, [89.0] * 300), "set"
    )
    picture = drawn(tmp_path / "a.png")
    plane = picture[:, : int(0.86 * picture.shape[1])]  # without the colour bar
    bright = np.argwhere(same_colour(plane, (0.993, 0.906, 0.144)))  # viridis' end
    sphere = np.argwhere(plane[..., :3].max(axis=-1) > plane[..., :3].min(axis=-1) + 0.2)  # what isn't grey
    low, high = sphere.min(axis=0), sphere.max(axis=0)
    middle = (bright.mean(axis=0) - low) / (high - low)
    assert middle == pytest.approx([0.5, 0.5 + 60 / 360], abs=0.06)  # half a cell


def test_angular_distribution_of_one(tmp_path: Path) -> None:
    plots.angular_distribution_plot(tmp_path / "a.png", [0.0], [0.0])
    drawn(tmp_path / "a.png")


def test_central_slices(tmp_path: Path) -> None:
    """They meet in the origin n//2; the picture is brighter for a line in xy than for the same line beside it."""
    volume = np.arange(30 * 41 * 40, dtype=np.float32).reshape(30, 41, 40)
    slices = plots.central_slices(volume)
    assert {name: image.shape for name, image in slices.items()} == {"xy": (41, 40), "xz": (30, 40), "yz": (30, 41)}
    assert slices["xy"][20, 20] == slices["xz"][15, 20] == slices["yz"][15, 20] == volume[15, 20, 20]
    line = np.zeros_like(volume)
    line[15, :, 20] = 1
    plots.central_slices_plot(tmp_path / "s.png", line, 5.0, "a line")
    picture = drawn(tmp_path / "s.png")
    plots.central_slices_plot(tmp_path / "s.png", np.roll(line, 1, axis=0), 5.0, "a line")
    left = np.s_[:, : picture.shape[1] // 3]
    assert picture[left].mean() > drawn(tmp_path / "s.png")[left].mean() + 0.01


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fsc.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        plots.fsc_plot(path, [0.0, 0.1], {"mine": [1.0, 0.0]}, {})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
