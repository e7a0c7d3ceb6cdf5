"""Pictures of an alignment: written whole, with something in them, also where little is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from libemc.records import Alignment, Source, Tilts, TiltSeriesRecord
from libemc.view import alignment as view

COUNT = 7


def a_record(**more) -> TiltSeriesRecord:
    tilts = tuple(range(-30, 31, 10))
    zeros = (0.0,) * COUNT
    found = Alignment(axis=(84.0,) * COUNT, tilt=tilts, xtilt=zeros, shift_x=tilts, shift_y=zeros, **more)
    source = Source(
        stack="s.mrc", shape=(COUNT, 60, 80), pixel_size=3.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07
    )
    use = (False, *(True,) * (COUNT - 1))
    reason = ("blank", *(None,) * (COUNT - 1))
    return TiltSeriesRecord(
        name="s", source=source, tilts=Tilts(nominal=tilts, use=use, reason=reason), alignment=found
    )


def drawn(path: Path) -> np.ndarray:
    """The picture; nothing else is left in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)
    assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05
    return picture


def red(picture: np.ndarray) -> int:
    """How many pixels are of the arrows' colour."""
    return int((np.abs(picture[..., :3] - np.array([0xB2, 0x18, 0x2B]) / 255) < 0.02).all(axis=-1).sum())


def test_parameters_against_tilt(tmp_path: Path) -> None:
    view.alignment_plots(a_record(), tmp_path / "plain.png")
    drawn(tmp_path / "plain.png")


def test_errors_are_drawn_in_red(tmp_path: Path) -> None:
    """With errors there is one red curve more than without."""
    pictures = []
    for more in ({}, {"residual": (None, *(2.0,) * 6), "error": (None, *(1.0,) * 6)}):
        view.alignment_plots(a_record(**more), tmp_path / "a.png")
        pictures.append(drawn(tmp_path / "a.png"))
    assert red(pictures[1]) > red(pictures[0]) + 200


def test_arrows_are_enlarged_to_be_seen(tmp_path: Path) -> None:
    """Residuals of 1 Å and of 3 Å are drawn alike but for the rounding of the enlargement; none are drawn for none."""
    rng = np.random.default_rng(0)
    place = rng.uniform(-100, 100, (COUNT, 30, 2))
    place[2] = np.nan
    arrow = rng.normal(0, 1, place.shape)
    reds = []
    for factor in (0.0, 1.0, 3.0):
        view.residual_arrows(place, factor * arrow, [True] * COUNT, (240.0, 180.0), tmp_path / "a.png")
        reds.append(red(drawn(tmp_path / "a.png")))
    assert reds[0] < 0.3 * min(reds[1:]) and 1 / 3 < reds[1] / reds[2] < 3


def test_a_landmark_before_and_after(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=(2, COUNT, 16, 16))
    before[3] = np.nan
    after[:, 6:10, 6:10] -= 5
    view.landmark_picture(before, after, tmp_path / "l.png", 3.0, [f"{k}°" for k in range(COUNT)])
    drawn(tmp_path / "l.png")
    with pytest.raises(ValueError, match="no tilt"):
        view.landmark_picture(before * np.nan, after, tmp_path / "l.png", 3.0)
