"""The tilt movie: frames that are aligned, in a file that plays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Source, Tilts, TiltSeriesRecord
from libemc.view import movie

SIZE, PIXEL = 400, 4.0


def test_a_point_on_the_axis_stays(tmp_path: Path) -> None:
    """The aligned half shows a point of the specimen at its place along the axis, and at x·cos(tilt) across it."""
    tilts = (40.0, -40.0, 0.0)
    shift = np.array([[60.0, -30.0], [-45.0, 75.0], [0.0, 20.0]])
    point = np.array([200.0, 160.0, 0.0])
    u = (np.arange(SIZE) - SIZE // 2) * PIXEL
    images = []
    for tilt, s in zip(tilts, shift, strict=True):
        q = tilt_matrices(70.0, tilt).numpy() @ point
        x, y = q[:2] + s
        images.append(-np.exp(-((u - x) ** 2 + (u[:, None] - y) ** 2) / 800))
    record = TiltSeriesRecord(
        name="s",
        source=Source(
            stack="s.mrc", shape=(3, SIZE, SIZE), pixel_size=PIXEL, voltage=300.0, cs=2.7, amplitude_contrast=0.07
        ),
        tilts=Tilts(nominal=tilts, use=(True, True, True)),
        alignment=Alignment(
            axis=(70.0,) * 3, tilt=tilts, xtilt=(0.0,) * 3,
            shift_x=tuple(shift[:, 0]), shift_y=tuple(shift[:, 1])),
    )  # fmt: skip
    noise = np.random.default_rng(0).normal(0, 0.01, (SIZE, SIZE))
    order = movie.tilt_order(record)
    assert order == [1, 2, 0]
    binning = 2
    for j in order:
        frame = movie.tilt_frame(record, j, images[j] + noise)
        n = SIZE // binning
        assert frame.shape == (n, 2 * n + movie.GAP) and frame.shape[1] <= movie.WIDEST
        half = np.nan_to_num(frame[:, n + movie.GAP :])
        y, x = np.unravel_index(half.argmin(), half.shape)
        wanted = np.array([200 * np.cos(np.deg2rad(tilts[j])), 160]) / (PIXEL * binning) + n // 2
        np.testing.assert_allclose([x, y], wanted, atol=1.5)  # pixels: of the box, the binning's half, the noise


def test_the_file_plays(tmp_path: Path) -> None:
    """As many frames as were given, grey, of their size, with the label in the upper left corner."""
    rng = np.random.default_rng(1)
    frames = [rng.normal(size=(60, 120)) for _ in range(5)]
    movie.tilt_movie(frames, tmp_path / "m.png", 10.0, [f"{k}°" for k in range(5)])
    assert [f.name for f in tmp_path.iterdir()] == ["m.png"]
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.n_frames == 5 and picture.mode in ("L", "P") and picture.size == (120, 60)
        picture.seek(3)
        shown = np.array(picture.convert("L"))
    assert (shown[:14, :15] == 0).mean() > 0.3  # the label's ground
    assert 90 < shown[20:].mean() < 165
    with pytest.raises(ValueError, match="without frames"):
        movie.tilt_movie([], tmp_path / "n.png")


def test_gold_does_not_decide_the_contrast(tmp_path: Path) -> None:
    """A hundredth of the pixels a hundred deviations away leaves the rest with most of its contrast."""
    rng = np.random.default_rng(2)
    frame = rng.normal(size=(100, 100))
    spread = []
    for gold in (0, 10):
        dark = frame.copy()
        dark[:gold, :10] = -100
        movie.tilt_movie([dark, dark], tmp_path / "m.png")
        with Image.open(tmp_path / "m.png") as picture:
            spread.append(np.array(picture.convert("L"))[:80].std())
    assert spread[1] > 0.8 * spread[0]
