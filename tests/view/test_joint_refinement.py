"""Pictures and page of emc_subtilt and emc_tomocpr: what is drawn and written is what was given."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from libemc.view import joint_refinement as view
from libemc.view import plots
from libemc.view.joint_refinement import Iteration, JointPage, Level, Picture, Series, Tracks

COUNT, TILTS, PIXEL = 12, 9, 10.0
SHAPE = (60, 71)
UNUSED = 2


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written, each of them also as a file with something in it."""
    kept: list[Figure] = []

    def save(figure: Figure, path: Path) -> None:
        plots.save(figure, path)
        picture = imread(path)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        kept.append(figure)

    monkeypatch.setattr(view, "save", save)
    return kept


def tilts() -> np.ndarray:
    """Degrees, as they were exposed: from 0° outward, to both sides in turn."""
    k = np.arange(TILTS)
    return np.where(k % 2 == 1, 1, -1) * (k + 1) // 2 * 10.0


def some_tracks(size: float = 3.0, count: int = COUNT) -> Tracks:
    """Walks of particles, their tilts in the order of the angles; one tilt is not known."""
    rng = np.random.default_rng(0)
    position = rng.uniform(-250, 250, (count, 2))
    steps = rng.normal(size=(count, TILTS, 2)).cumsum(axis=1)
    order = tilts().argsort().astype(np.int64)
    path = size * (steps - steps.mean(axis=1, keepdims=True))[:, order]
    path[:, UNUSED] = np.nan
    return Tracks(position, path, order)


def texts(axes: Axes) -> str:
    return "|".join([axes.get_title(), *(text.get_text() for text in axes.texts)])


def enlargement(axes: Axes) -> float:
    return float(re.search(r"([\d.]+) times enlarged", axes.get_title()).group(1))


def test_tracks_run_along_the_exposure(tmp_path: Path, figures: list[Figure]) -> None:
    """Each line is a particle's position and its enlarged path, in the order of exposure, without the unknown tilt."""
    tracks = some_tracks()
    tracks.path[4] = np.nan
    image = np.random.default_rng(1).normal(size=SHAPE)
    view.tracks_plot(tmp_path / "t.png", image, PIXEL, tracks, "TS_01")
    axes = figures[0].axes[0]
    assert axes.get_title().startswith(f"TS_01: tracks of {COUNT - 1} particles, ")
    factor = enlargement(axes)
    lines, coloured = (c for c in axes.collections if isinstance(c, LineCollection))
    shown = [k for k in range(COUNT) if k != 4]
    assert len(lines.get_segments()) == len(shown)
    sequence = [k for k in np.argsort(tracks.order) if k != UNUSED]
    for k, points in zip(shown, lines.get_segments(), strict=True):
        np.testing.assert_allclose(points, tracks.position[k] + factor * tracks.path[k, sequence], atol=1e-9)
    steps = coloured.get_segments()
    assert len(steps) == len(shown) * (TILTS - 2)
    np.testing.assert_allclose(np.array(steps)[: TILTS - 2, 0], lines.get_segments()[0][:-1])
    exposures = np.sort(1.0 + tracks.order[[k for k in range(TILTS) if k != UNUSED]])
    np.testing.assert_allclose(coloured.get_array()[: TILTS - 2], (exposures[1:] + exposures[:-1]) / 2)
    first, last = (to_hex(colour) for colour in (coloured.get_edgecolors()[0], coloured.get_edgecolors()[TILTS - 3]))
    assert first != last and coloured.norm.vmin == 1 and coloured.norm.vmax == TILTS
    named = [label.get_text() for label in figures[0].axes[1].get_yticklabels()]
    assert named[0] == "1" and named[-1] == str(TILTS)


def test_tracks_lie_on_the_image_as_the_convention_says(tmp_path: Path, figures: list[Figure]) -> None:
    """The origin is pixel n//2, y grows upward: a dark pixel is drawn where its particle's track begins and ends."""
    image = np.random.default_rng(2).normal(size=SHAPE)
    image[50, 20] = -100.0
    place = (np.array([[20, 50]]) - np.array(SHAPE[::-1]) // 2) * PIXEL
    path = np.zeros((1, TILTS, 2))
    view.tracks_plot(tmp_path / "t.png", image, PIXEL, Tracks(place, path, np.arange(TILTS)))
    axes = figures[0].axes[0]
    assert enlargement(axes) == 1 and axes.images[0].origin == "lower"
    left, right, low, high = axes.images[0].get_extent()
    column = (place[0, 0] - left) / (right - left) * SHAPE[1] - 0.5
    row = (place[0, 1] - low) / (high - low) * SHAPE[0] - 0.5
    assert (row, column) == pytest.approx((50, 20))
    assert axes.collections[0].get_segments()[0][0].tolist() == place[0].tolist()


def test_the_bar_is_of_the_image_and_of_the_tracks(tmp_path: Path, figures: list[Figure]) -> None:
    """Its two lengths differ by the factor; it is a round part of the image; large tracks are enlarged less."""
    for size in (3.0, 0.3):
        view.tracks_plot(tmp_path / "t.png", np.eye(*SHAPE), PIXEL, some_tracks(size))
        axes = figures[-1].axes[0]
        (bar,) = axes.lines
        length = float(np.ptp(bar.get_xdata()))
        words = re.search(r"([\d.]+) Å of the image, ([\d.]+) Å of the tracks", texts(axes))
        assert float(words.group(1)) == pytest.approx(length)
        assert length / float(words.group(2)) == pytest.approx(enlargement(axes))
        assert 0.05 < length / (SHAPE[1] * PIXEL) <= view.BAR_SHARE
    large, small = (enlargement(figure.axes[0]) for figure in figures)
    assert small == pytest.approx(10 * large)


def test_of_many_tracks_some_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    count = view.MOST_TRACKS + 50
    view.tracks_plot(tmp_path / "t.png", np.eye(*SHAPE), PIXEL, some_tracks(count=count))
    axes = figures[0].axes[0]
    assert f"tracks of {view.MOST_TRACKS} of {count} particles" in axes.get_title()
    assert len(axes.collections[0].get_segments()) == view.MOST_TRACKS
    view.tracks_plot(tmp_path / "t.png", np.eye(*SHAPE), PIXEL, some_tracks(count=0))
    assert "tracks of 0 particles" in figures[1].axes[0].get_title()


def test_residuals_by_tilt(tmp_path: Path, figures: list[Figure]) -> None:
    """Both curves, sorted by tilt; a tilt that is not used is dotted, and its NaN is in no rms."""
    rng = np.random.default_rng(3)
    before, after = rng.uniform(3, 5, TILTS), rng.uniform(1, 2, TILTS)
    before[UNUSED] = after[UNUSED] = np.nan
    view.residual_plot(tmp_path / "r.png", tilts(), before, after, "TS_01")
    axes = figures[0].axes[0]
    known = [k for k in np.argsort(tilts()) if k != UNUSED]
    curves = [line for line in axes.lines if line.get_linestyle() == "-"]
    for line, values, name in zip(curves, (before, after), ("before", "after"), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), tilts()[known])
        np.testing.assert_array_equal(line.get_ydata(), values[known])
        assert line.get_label() == f"{name}, {math.sqrt(np.nanmean(values**2)):.2f} Å"
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [tilts()[UNUSED]]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > np.nanmax(before)


def test_residuals_that_nobody_knows(tmp_path: Path, figures: list[Figure]) -> None:
    """Only those after, then none at all."""
    nothing = np.full(TILTS, np.nan)
    view.residual_plot(tmp_path / "r.png", tilts(), nothing, np.ones(TILTS))
    assert [label.get_text() for label in figures[0].axes[0].get_legend().texts] == ["after, 1.00 Å"]
    view.residual_plot(tmp_path / "r.png", tilts(), nothing, nothing)
    assert "no residuals known" in texts(figures[1].axes[0])


def test_a_panel_for_each_change_that_is_given(tmp_path: Path, figures: list[Figure]) -> None:
    rng = np.random.default_rng(4)
    names = ("shift_x", "shift_y", "axis", "tilt", "xtilt", "magnification", "defocus")
    everything = {name: (rng.normal(size=TILTS), None) for name in names}
    labels = list(view.PANELS)
    for given, wanted in (
        (names, labels),
        (("shift_y", "defocus"), [labels[0], labels[-1]]),
        (("axis",), [labels[1]]),
        (("defocus", "tilt", "axis", "xtilt", "magnification"), labels[1:]),
    ):
        view.geometry_plot(tmp_path / "g.png", tilts(), {name: everything[name] for name in given})
        shown = [axes for axes in figures[-1].axes if axes.axison]
        assert [axes.get_ylabel() for axes in shown] == wanted
        drawn = [line for axes in shown for line in axes.lines if line.get_marker() == "o"]
        assert len(drawn) == len(given)
        for line, name in zip(drawn, sorted(given, key=names.index), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), everything[name][0][np.argsort(tilts())])
    with pytest.raises(ValueError, match="no change"):
        view.geometry_plot(tmp_path / "g.png", tilts(), {})
    with pytest.raises(ValueError, match="beam"):
        view.geometry_plot(tmp_path / "g.png", tilts(), {"beam": everything["axis"]})


def test_changes_with_their_errors(tmp_path: Path, figures: list[Figure]) -> None:
    """Bars reach one error up and down; an unknown error has none; the unused tilt is dotted, not drawn; rms is told."""
    rng = np.random.default_rng(5)
    value, error = rng.normal(size=TILTS), rng.uniform(0.1, 0.5, TILTS)
    value[UNUSED] = np.nan
    error[5] = np.nan
    view.geometry_plot(tmp_path / "g.png", tilts(), {"defocus": (value, error)}, "TS_01")
    (axes,) = figures[0].axes
    (bars,) = (c for c in axes.collections if isinstance(c, LineCollection))
    known = [k for k in np.argsort(tilts()) if k != UNUSED]
    size = np.where(np.isnan(error), 0, error)[known]
    ends = np.array(bars.get_segments())
    np.testing.assert_allclose(ends[:, :, 0], np.stack([tilts()[known]] * 2, axis=1))
    np.testing.assert_allclose(ends[:, :, 1], np.stack((value[known] - size, value[known] + size), axis=1))
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [tilts()[UNUSED]]
    assert axes.get_legend().texts[0].get_text() == f"rms {math.sqrt(np.nanmean(value**2)):.3g}"


def test_changes_that_are_none(tmp_path: Path, figures: list[Figure]) -> None:
    """Rounding is drawn as a line through 0, and what is unknown is said to be."""
    rounding = 1e-13 * np.random.default_rng(6).normal(size=TILTS)
    changes = {"tilt": (rounding, None), "axis": (np.full(TILTS, np.nan), np.ones(TILTS))}
    view.geometry_plot(tmp_path / "g.png", tilts(), changes)
    axis, tilt = figures[0].axes
    assert tilt.get_ylim()[1] - tilt.get_ylim()[0] > 1
    assert "not known" in texts(axis) and not axis.get_legend()


def test_scores_and_weights_of_every_image(tmp_path: Path, figures: list[Figure]) -> None:
    """Sorted by tilt, left-out images grey, and white where there is none; below them medians of the used ones and the share of
    the others. What isn't there isn't counted, whatever is said of its use.
    """
    rng = np.random.default_rng(7)
    score, weight = rng.normal(size=(2, COUNT, TILTS))
    weight, use = np.abs(weight), rng.uniform(size=(COUNT, TILTS)) > 0.3
    use[3] = False
    score[:, UNUSED] = np.nan
    score[5, :3] = score[3, 4] = np.nan
    said, there = use, np.isfinite(score)
    use = said & there
    assert (said & ~there).sum() > 5 and (~there & ~use).any()
    view.subtilt_plot(tmp_path / "s.png", tilts(), score, weight, said)
    scores, weights, median, share, *bars = figures[0].axes
    assert len(bars) == 2
    order = np.argsort(tilts())
    for axes, values in ((scores, score), (weights, weight)):
        drawn = axes.images[0].get_array()
        np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), use[:, order])
        np.testing.assert_array_equal(drawn[use[:, order]], values[:, order][use[:, order]])
        nothing = axes.images[1]
        np.testing.assert_array_equal(np.ma.getmaskarray(nothing.get_array()), there[:, order])
        assert [to_hex(image.cmap.get_bad()) for image in axes.images] == [view.LEFT_OUT, "#000000"]
        assert (
            to_hex(nothing.cmap(0.5)) == "#ffffff" and nothing.cmap.get_bad()[3] == 0
        )  # nothing is drawn over the others
        assert all(image.get_extent() == [-0.5, TILTS - 0.5, 0.5, COUNT + 0.5] for image in axes.images)
    assert weights.images[0].get_clim() == (0, weight[use].max())
    seen = [k for k in range(TILTS) if order[k] != UNUSED]
    wanted = [np.median(score[use[:, order[k]], order[k]]) for k in seen]
    np.testing.assert_array_equal(median.lines[0].get_xdata(), seen)
    np.testing.assert_allclose(median.lines[0].get_ydata(), wanted)
    heights = [bar.get_height() for bar in share.patches]
    left = (there & ~use)[:, order].sum(axis=0)
    np.testing.assert_allclose(heights, 100 * left / np.maximum(there[:, order].sum(axis=0), 1))
    assert heights[list(order).index(UNUSED)] == 0
    assert share.get_title() == f"{left.sum()} of {there.sum()} images left out"
    assert [t.get_text() for t in median.get_xticklabels()] == [f"{a:.0f}" for a in np.sort(tilts())]


def test_images_without_scores(tmp_path: Path, figures: list[Figure]) -> None:
    """None has a score, so none is there; then all are there and left out."""
    nothing, ones = np.full((COUNT, TILTS), np.nan), np.ones((COUNT, TILTS))
    view.subtilt_plot(tmp_path / "s.png", tilts(), nothing, ones, ones > 0)
    assert "not known" in texts(figures[0].axes[2])
    scores, _, _, share = figures[0].axes[:4]
    assert share.get_title() == "0 of 0 images left out" and {bar.get_height() for bar in share.patches} == {0.0}
    assert not np.ma.getmaskarray(scores.images[1].get_array()).any()
    view.subtilt_plot(tmp_path / "s.png", tilts(), ones, ones, ones < 0)
    assert {bar.get_height() for bar in figures[1].axes[3].patches} == {100.0}
    assert figures[1].axes[3].get_title() == f"{COUNT * TILTS} of {COUNT * TILTS} images left out"


def test_displacements_along_the_dose(tmp_path: Path, figures: list[Figure]) -> None:
    """Median and quartiles of the particles' rms over the axes, and the rms of all along each axis."""
    rng = np.random.default_rng(8)
    moved = rng.normal(size=(COUNT, TILTS, 3)) * (1.0, 2.0, 0.5)
    moved[:, UNUSED] = np.nan
    moved[0] = np.nan
    dose = 3.0 * rng.permutation(TILTS)
    view.displacement_plot(tmp_path / "d.png", dose, moved, "TS_01")
    axes = figures[0].axes[0]
    assert axes.get_title() == f"TS_01: {COUNT - 1} particles"
    known = [k for k in np.argsort(dose) if k != UNUSED]
    middle, *by_axis = axes.lines
    each = np.linalg.norm(moved[1:, known], axis=2) / math.sqrt(3)
    np.testing.assert_array_equal(middle.get_xdata(), dose[known])
    np.testing.assert_allclose(middle.get_ydata(), np.median(each, axis=0))
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices
    for quantile in (0.25, 0.75):
        level = np.quantile(each, quantile, axis=0)[3]
        assert np.abs(edge - (dose[known][3], level)).sum(axis=1).min() < 1e-9
    for k, (line, name) in enumerate(zip(by_axis, "xyz", strict=True)):
        assert line.get_label() == f"rms along {name}"
        np.testing.assert_allclose(line.get_ydata(), np.sqrt((moved[1:, known, k] ** 2).mean(axis=0)))
    view.displacement_plot(tmp_path / "d.png", dose, moved[..., :2])
    assert len(figures[1].axes[0].lines) == 3


class Reader(HTMLParser):
    """Every element is closed by its own end tag; rows, pictures and captions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.strong: list[int] = []
        self.heads: list[str] = []
        self.pictures: list[str] = []
        self.captions: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "b")
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(given["src"])
        elif tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "tr" and given.get("class") == "strong":
            self.strong.append(len(self.rows) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where in ("td", "th"):
            self.rows[-1][-1] += data
        elif where in ("h1", "h2", "p"):
            self.heads.append(data)
        elif where == "figcaption":
            self.captions.append(data)


def written(tmp_path: Path, page: JointPage) -> Reader:
    path = tmp_path / "index.html"
    view.write_page(path, page)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


def a_page() -> JointPage:
    return JointPage(
        title="cpr_00 & friends",
        options={"run": "spt_<00>", "symmetry": "d7"},
        iterations=[Iteration(12.0, 9.125, 2.345), Iteration(9.5, 7.316, 0.8)],
        levels=[
            Level("shifts", 4.0, 1231.24, 40.25, True, "Å"),
            Level("motion", 0.25, 311.0, 22.0, True, "Å per exposure"),
            Level("magnification <b>", 0.1, -3.25, 4.0, False, "%"),
            Level("axis", 1.0, math.nan, math.nan, False),
        ],
        series=[Series("TS_01", 60, 2460, 212, 5.031, 1.919), Series("TS_02", 51, 2091, 100, 4.7, math.nan)],
        pictures=[
            Picture("tracks TS_01#1.png", "Motion of TS_01", "At 0°, 5 < 6."),
            Picture("pictures/geometry.png", "Geometry", "What changed."),
        ],
    )


def test_the_page_names_everything(tmp_path: Path) -> None:
    found = written(tmp_path, a_page())
    assert found.heads == [
        "cpr_00 & friends", "7.32 Å", "Iterations", "Cross-validation", "Tilt series", "Motion of TS_01", "Geometry"
    ]  # fmt: skip
    for row in (
        ["run", "spt_<00>"],
        ["symmetry", "d7"],
        ["particles", "111 of 2 tilt series"],
        ["images", "4551, 312 left out"],
        ["1", "12.0", "9.12", "2.35"],
        ["2", "9.5", "7.32", "0.80"],
        ["shifts", "4 Å", "+1231.2", "40.2", "kept"],
        ["motion", "0.25 Å per exposure", "+311.0", "22.0", "kept"],
        ["magnification <b>", "0.1 %", "-3.2", "4.0", "not kept"],
        ["axis", "1", "–", "–", "not kept"],
        ["TS_01", "60", "2460", "212", "5.03", "1.92"],
        ["TS_02", "51", "2091", "100", "4.70", "–"],
    ):
        assert row in found.rows
    assert [found.rows[k][0] for k in found.strong] == ["2", "shifts", "motion"]


def test_pictures_stay_beside_the_page(tmp_path: Path) -> None:
    """They are linked by names that a browser reads as they are on disk."""
    page = a_page()
    found = written(tmp_path, page)
    assert [unquote(source) for source in found.pictures] == [picture.file for picture in page.pictures]
    assert not any(set("# ") & set(source) for source in found.pictures)
    assert found.captions == [picture.caption for picture in page.pictures]


def test_a_page_of_little(tmp_path: Path) -> None:
    """Nothing was iterated, tried or drawn: no empty tables."""
    found = written(tmp_path, JointPage("sub_00", {}, [], [], [Series("TS_01", 0, 0, 0, math.nan, math.nan)], []))
    assert found.heads == ["sub_00", "Tilt series"] and not found.pictures
    assert ["TS_01", "0", "0", "0", "–", "–"] in found.rows
