"""Pictures of picks: written whole, with as many circles and crosses as there are candidates, where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import ndimage

from libemc.view import picks as view

VOXEL, SHAPE = 10.0, (60, 90, 120)
DIAMETER = 150.0


def drawn(path: Path) -> np.ndarray:
    """The picture; nothing else is left in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    return picture


def coloured(picture: np.ndarray) -> np.ndarray:
    """The circles: neither grey, as the sections and crosses, nor the red of the marks; without the bar of colours."""
    inside = picture[:, : int(0.9 * picture.shape[1])]
    return (inside[..., 2] > 0.6) & (np.ptp(inside, axis=-1) > 0.2)


def circles(picture: np.ndarray) -> list[tuple[float, float, float]]:
    """Middle (row, column) and width of what is drawn in colour, pixels."""
    labels, _ = ndimage.label(coloured(picture), np.ones((3, 3)))
    found = []
    for rows, columns in ndimage.find_objects(labels):
        width = columns.stop - columns.start
        if width > 20:  # the bar of colours is narrower
            found.append(((rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2, float(width)))
    return found


def a_tomogram() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def test_every_pick_is_a_circle_in_one_section_and_in_the_upright_one(tmp_path: Path) -> None:
    """Two picks of one height: two circles in the xy section, two below in xz, as far apart as 600 Å are there.

    The distance in diameters comes from the positions; the circles are as wide as 150 Å but for the line.
    """
    xyz = np.array([[-300.0, 0.0, 0.0], [300.0, 0.0, 0.0]])
    path = tmp_path / "p.png"
    view.picks_picture(path, a_tomogram(), VOXEL, (0.0, 0.0, 0.0), xyz, [8.0, 9.0], [True, True], DIAMETER, "t")
    found = sorted(circles(drawn(path)))
    assert len(found) == 4
    for pair in (found[:2], found[2:]):
        (row, left, width), (other, right, _) = sorted(pair, key=lambda c: c[1])
        assert row == pytest.approx(other, abs=2)
        assert (right - left) / width == pytest.approx(600 / DIAMETER, rel=0.05)  # a line of two pixels on forty


def test_the_centre_of_a_part_counts(tmp_path: Path) -> None:
    """A part of the tomogram that lies elsewhere, with the picks in it, is the same picture but for its text."""
    xyz = np.array([[-300.0, 100.0, 0.0], [200.0, -50.0, 40.0]])
    centre = (1000.0, -500.0, 200.0)
    found = []
    for where, shift in ((0.0, 0.0, 0.0), np.zeros(3)), (centre, np.array(centre)):
        view.picks_picture(tmp_path / "p.png", a_tomogram(), VOXEL, where, xyz + shift, [8, 9], [1, 1], DIAMETER)
        found.append(circles(drawn(tmp_path / "p.png")))
    assert found[0] and found[0] == found[1]


def test_rejected_candidates_are_crosses(tmp_path: Path) -> None:
    """What isn't kept is never a circle; crosses are dark and light on a grey volume that has no other structure."""
    xyz = np.array([[-300.0, 0.0, 0.0], [300.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    flat = np.zeros(SHAPE, np.float32)
    flat[::2] = 0.001
    pictures = []
    for count in (1, 3):
        kept = np.arange(count) == 0
        view.picks_picture(
            tmp_path / "p.png", flat, VOXEL, (0.0, 0.0, 0.0), xyz[:count], [8.0, 5.0, 4.0][:count], kept, DIAMETER
        )
        pictures.append(drawn(tmp_path / "p.png"))
    assert len(circles(pictures[0])) == len(circles(pictures[1])) == 2
    light = [int((np.abs(p - 0xE6 / 255) < 0.02).all(axis=-1).sum()) for p in pictures]
    assert light[1] > light[0] + 20


@pytest.mark.parametrize("shape", [(20, 300, 100), (1, 40, 40), (100, 30, 200)])
def test_nothing_found_is_a_picture_too(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    volume = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    none = np.zeros((0, 3))
    view.picks_picture(tmp_path / "p.png", volume, VOXEL, (0.0, 0.0, 0.0), none, none[:, 0], none[:, 0], DIAMETER)
    assert not circles(drawn(tmp_path / "p.png"))


def test_sections_are_a_few_and_reach_every_pick_of_a_usual_specimen() -> None:
    """Of particles over 12 diameters of thickness each is within one diameter of a section; there are 6 at most."""
    rng = np.random.default_rng(2)
    for thickness in (0.5, 3.0, 12.0):
        z = 100 + 10 * rng.uniform(0, thickness, 500)
        levels = view._levels(z, 10.0, 400)
        assert 1 <= len(levels) <= view.SECTIONS
        assert np.abs(z[:, None] - levels).min(axis=1).max() <= 10.0


def test_upright_sections_are_where_the_picks_are_and_apart() -> None:
    rows = view._rows(np.array([20.0, 21.0, 22.0, 70.0, 98.0, 99.0, 101.0, 102.0]), 8.0, 200, 2)
    assert 18 <= rows[0] <= 24 and rows[1] - rows[0] >= 8


def some_heights(threshold: float) -> view.Heights:
    rng = np.random.default_rng(3)
    z = np.concatenate([rng.gumbel(3.2, 0.28, 3000), rng.normal(10, 1, 40)])
    edges = np.linspace(2, 7, 51)
    expected = 3000 * np.diff(np.exp(-np.exp(-(edges - 3.2) / 0.28)))
    return view.Heights("ribosome", z, z > threshold, edges, expected, threshold, 1.0)


def red_columns(picture: np.ndarray) -> np.ndarray:
    """Where a red line goes from bottom to top."""
    red = (np.abs(picture - np.array([0xB2, 0x18, 0x2B]) / 255) < 0.02).all(axis=-1)
    return np.nonzero(red.sum(axis=0) > 0.5 * red.sum(axis=0).max())[0]


def test_the_threshold_stands_at_its_place(tmp_path: Path) -> None:
    """Equal steps of the threshold move the red line equally; each template has its panel."""
    at = []
    for threshold in (5.0, 6.0, 7.0):
        view.score_plot(tmp_path / "s.png", [some_heights(threshold)], "t")
        at.append(red_columns(drawn(tmp_path / "s.png")).mean())
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=2) and at[1] - at[0] > 30
    one = imread(tmp_path / "s.png").shape[0]
    view.score_plot(tmp_path / "s.png", [some_heights(6.0), some_heights(7.0)])
    assert drawn(tmp_path / "s.png").shape[0] > 1.7 * one


def test_the_model_lies_on_what_it_made() -> None:
    """Maxima drawn from the model: where many are expected, the bars are as high as the curve, to five deviations.

    The curve is the model's number in the bins that are drawn, which are not the model's own.
    """
    own = some_heights(6.0)
    axes = Figure().add_subplot()
    view._histogram(axes, own)
    heights = np.array([bar.get_height() for bar in axes.containers[0]])
    x, curve = axes.lines[0].get_data()
    starts = np.array([bar.get_x() + bar.get_width() / 2 for bar in axes.containers[0]])
    bars = heights[np.searchsorted(starts, np.asarray(x) - 1e-9)]
    many = np.asarray(curve) > 50
    assert many.sum() >= 6
    assert (np.abs(bars - curve)[many] < 5 * np.sqrt(np.asarray(curve))[many]).all()
    assert heights.sum() + sum(bar.get_height() for bar in axes.containers[1]) == len(own.z)


def test_no_candidates_at_all(tmp_path: Path) -> None:
    none = np.zeros(0)
    edges = np.linspace(2, 7, 11)
    view.score_plot(tmp_path / "s.png", [view.Heights("x", none, none > 0, edges, np.ones(10), 5.0, 1.0)])
    drawn(tmp_path / "s.png")
