"""The page of how particles differ, and its pictures: what is drawn and written is what was given."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from libemc.view import heterogeneity as view
from libemc.view import plots
from libemc.view.alignment import BLUE, RED
from libemc.view.heterogeneity import BandView, PcaPage
from tests.view.figures import kept_figures

COUNT, BOX, PIXEL = 60, 20, 4.5


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    return kept_figures(monkeypatch, view, 0.02)


def ball(shift: int = 0, size: int = BOX) -> np.ndarray:
    """A soft ball, moved along x."""
    z, y, x = np.indices((size,) * 3) - size // 2
    return 1 / (1 + np.exp(np.sqrt(z**2 + y**2 + (x - shift) ** 2) - size / 4))


def a_band(meaningful: int = 3, axes: int = 6, count: int = COUNT, **more) -> BandView:
    """A ball that moves along x, by every axis alike; the second axis is left out where it is meaningful."""
    rng = np.random.default_rng(axes)
    axis = (ball(3) - ball(-3)) / 8
    maps = {"minus": ball() - 2 * axis, "average": ball(), "plus": ball() + 2 * axis, "axis": axis}
    slices = {name: plots.central_slices(volume) for name, volume in maps.items()}
    band = BandView(
        name="60", coarse=math.inf, fine=42.4, strength=1.5 + 30.0 * np.exp(-np.arange(axes)), noise=np.linspace(1.5, 1.0, 9),
        floor=1.625, meaningful=meaningful, suspects=[{"missing wedge": 0.01 + 0.7 * (k == 1)} for k in range(meaningful)],
        left_out=[k == 1 for k in range(meaningful)], coordinates=rng.normal(size=(count, axes)),
        axes_slices=[slices] * meaningful, variance_slices=plots.central_slices(axis**2),
    )  # fmt: skip
    return replace(band, **more)


def a_page(*bands: BandView, count: int = COUNT) -> PcaPage:
    series = [f"TS_{k % 3 + 1}" for k in range(count)]
    facts = {"mask": "a <b>.mrc"}
    return PcaPage("spt_03 & friends", facts, PIXEL, bands, series, plots.central_slices(ball()))


def written(path: Path, page: PcaPage) -> tuple[str, list[str]]:
    """The page without its pictures, which are whole, and its cells."""
    view.write_pca_page(path / "index.html", page)
    text = (path / "index.html").read_text()
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    assert len(re.findall("src=", text)) == len(re.findall("<img ", text)) == text.count('src="data:image/png;base64,')
    assert not re.search(r"<script|<link|href=|url\(|<b>", text)
    assert [file.name for file in path.iterdir()] == ["index.html"]
    return re.sub('src="[^"]+"', "", text), re.findall("<td>(.*?)</td>", text)


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    """Meaningful axes of each band first, then every axis with its numbers, and why it isn't used."""
    second = a_band(1, name="30", coarse=42.4, fine=21.2)
    text, cells = written(tmp_path, a_page(a_band(), second))
    assert '<p class="first">60 Å: 3 axes (1 left out); 30 Å: 1 axis</p>' in text
    assert text.index('class="first"') < text.index("<table>")
    rows = "|".join(cells)
    assert "60 Å|1|31.5|1.62|0.01|yes|" in rows and "60 Å|2|12.5|1.62|0.71|no: follows missing wedge|" in rows
    assert "60 Å|4|2.99|1.62|–|no: as strong as noise|" in rows and "60 Å|6|" not in rows
    assert "the largest to 42 Å" in rows and "42 Å to 21 Å" in rows and "a &lt;b&gt;.mrc" in rows
    assert text.count("<img ") == 5 and "spt_03 &amp; friends" in text


@pytest.mark.parametrize("bands", [[a_band(0)], [a_band(0, axes=1)], [a_band(1, axes=1)], [a_band(2, axes=2)]])
def test_a_page_of_little(tmp_path: Path, bands: list[BandView]) -> None:
    """No meaningful axis, and no more than one: the page has the pictures there are."""
    text, _ = written(tmp_path, a_page(*bands))
    found = bands[0].meaningful
    assert text.count("<img ") == 2 + 2 * (found > 0)
    assert f"60 Å: {found} {'axis' if found == 1 else 'axes'}" in text


def test_three_particles(tmp_path: Path) -> None:
    band = a_band(1, axes=2, count=3, noise=np.array([1.0]), suspects=[], left_out=[])
    text, cells = written(tmp_path, a_page(band, count=3))
    assert text.count("<img ") == 4 and "R²" not in text and "yes" in cells


def test_the_spectrum_shows_which_axes_are_used(tmp_path: Path, figures: list[Figure]) -> None:
    """Filled where used, hollow and red where left out, hollow where no more than noise; one panel for each band."""
    view.spectrum_plot(tmp_path / "s.png", [a_band(), a_band(0, strength=np.array([1.5, 1.0]))])
    first, second = figures[0].axes
    kinds = {}
    for line in first.lines:
        if line.get_marker() == "o":
            kinds[line.get_markeredgecolor(), line.get_markerfacecolor()] = line.get_xdata().tolist()
    assert kinds == {(BLUE, BLUE): [1, 3], (RED, "white"): [2], (BLUE, "white"): [4, 5, 6]}
    assert first.get_title() == "60 Å: 3 meaningful axes, 1 left out" and first.get_yscale() == "log"
    assert second.get_title() == "60 Å: 0 meaningful axes" and second.get_yscale() == "linear"
    dashed = [line for line in first.lines if line.get_linestyle() == "--"]
    assert [float(line.get_ydata()[0]) for line in dashed] == [1.625]


def test_axes_are_drawn_to_both_sides(tmp_path: Path, figures: list[Figure]) -> None:
    """A row for each axis: greys of a row are common, the colours of the axis end alike on both sides."""
    band = a_band()
    view.axes_plot(tmp_path / "a.png", band, PIXEL)
    images = [axes for axes in figures[0].axes if axes.images]
    assert len(images) == 3 * 4 * 2
    row = images[:4]
    for axes, kind in zip(row, ("minus", "average", "plus", "axis"), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), band.axes_slices[0][kind]["xy"])
    limits = [axes.images[0].get_clim() for axes in row]
    assert limits[0] == limits[1] == limits[2] and limits[3][0] == -limits[3][1] < 0
    assert row[0].get_ylabel() == "axis 1, strength 31.5" and "left out" in images[8].get_ylabel()
    many = replace(band, axes_slices=list(band.axes_slices) * 9, strength=np.arange(27.0, 0, -1))
    view.axes_plot(tmp_path / "b.png", many, PIXEL)
    assert len([axes for axes in figures[1].axes if axes.images]) == view.MOST_AXES * 8


def test_an_axis_turned_over_changes_its_colours(tmp_path: Path, figures: list[Figure]) -> None:
    """Red is denser: the right half of the first axis, whose ball moves to the right, and the left one when turned over."""
    red = []
    for sign in (1, -1):
        slices = {
            k: {n: sign * s if k == "axis" else s for n, s in v.items()} for k, v in a_band().axes_slices[0].items()
        }
        view.axes_plot(tmp_path / "a.png", a_band(1, axes_slices=[slices]), PIXEL)
        drawn = figures[-1].axes[3].images[0]
        colours = drawn.cmap(drawn.norm(drawn.get_array()))
        more = colours[..., 0] - colours[..., 2] > 0.2
        red.append((more[:, BOX // 2 + 1 :].sum(), more[:, : BOX // 2].sum()))
    assert red[0][0] > 5 and red[0][1] == 0 and red[1][0] == 0 and red[1][1] > 5


def test_the_variance_has_the_outline_of_the_average(tmp_path: Path, figures: list[Figure]) -> None:
    """Rows of bands; colours begin at 0; the contour is the ball's, and there is none of an average of nothing."""
    average = plots.central_slices(ball())
    view.variance_plot(tmp_path / "v.png", [a_band(), a_band(0, variance_slices=average)], average, PIXEL)
    panels = [axes for axes in figures[0].axes if axes.images and axes.get_label() != "<colorbar>"]
    assert len(panels) == 6 and all(axes.images[0].get_clim()[0] == 0 for axes in panels)
    outline = panels[0].collections[0].get_paths()[0].vertices - BOX // 2
    np.testing.assert_allclose(np.linalg.norm(outline, axis=1), BOX / 4 + math.log(1 / 0.35 - 1), atol=0.4)
    nothing = {name: np.zeros_like(image) for name, image in average.items()}
    view.variance_plot(tmp_path / "w.png", [a_band(variance_slices=nothing)], nothing, PIXEL)
    assert not figures[1].axes[0].collections


def test_dots_are_particles(tmp_path: Path, figures: list[Figure]) -> None:
    """Pairs of used axes; each dot has the place and the colour of its particle; no class is grey."""
    band = a_band(4, left_out=[False, True, False, False])
    labels = np.arange(COUNT) % 3
    view.coordinates_plot(tmp_path / "c.png", [band], labels, {1: "open", 2: "closed"})
    one, two = figures[0].axes
    assert one.get_title() == "60 Å: axes 1 and 3" and two.get_title() == "60 Å: axes 1 and 4"
    assert one.get_xlabel() == "axis 1 (standard errors)" and one.get_aspect() == 1
    without, classed = one.collections
    expected = band.coordinates[:, [0, 2]]
    assert {to_hex(c) for c in without.get_edgecolor()} == {view.UNCLASSED} and len(without.get_offsets()) == COUNT // 3
    colour_of = {
        tuple(p): to_hex(c) for p, c in zip(classed.get_offsets().tolist(), classed.get_facecolor(), strict=True)
    }
    for place, label in zip(expected.tolist(), labels.tolist(), strict=True):
        assert label == 0 or colour_of[tuple(place)] == plots.class_colour(label)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [f"no class: {COUNT // 3}", "open", "closed"]


def test_far_particles_lie_on_the_edge(tmp_path: Path, figures: list[Figure]) -> None:
    """One of a thousand far away, and one that is not known, leave the others where they can be told apart."""
    band = a_band(2, axes=2, count=1000, left_out=[])
    band.coordinates[5] = 1e6, 0
    band.coordinates[6] = np.nan
    view.coordinates_plot(tmp_path / "c.png", [band])
    axes = figures[0].axes[0]
    places = axes.collections[0].get_offsets()
    assert len(places) == 999 and np.ptp(axes.get_xlim()) < 15
    assert (np.abs(places[:, 0]) <= max(np.abs(axes.get_xlim()))).all()


def test_more_classes_than_colours_are_told_apart(tmp_path: Path, figures: list[Figure]) -> None:
    labels = 1 + np.arange(COUNT) % 12
    view.coordinates_plot(tmp_path / "c.png", [a_band(2, axes=2, left_out=[])], labels)
    marks = figures[0].legends[0].legend_handles
    assert len({(to_hex(m.get_color()), m.get_marker()) for m in marks}) == 12


def test_one_axis_is_a_histogram(tmp_path: Path, figures: list[Figure]) -> None:
    """All particles are in it; without a meaningful axis the picture says so; six panels at most, of every band some."""
    view.coordinates_plot(tmp_path / "c.png", [a_band(1)], 1 + np.arange(COUNT) % 2)
    axes = figures[0].axes[0]
    assert sum(patch.get_height() for patch in axes.patches) == COUNT and axes.get_title() == "60 Å: axis 1"
    assert {to_hex(patch.get_facecolor()) for patch in axes.patches} == {plots.class_colour(1), plots.class_colour(2)}
    view.coordinates_plot(tmp_path / "d.png", [a_band(0)])
    assert "no axis is used" in figures[1].axes[0].texts[0].get_text()
    view.coordinates_plot(tmp_path / "e.png", [a_band(20, axes=20), a_band(1, name="30")])
    titles = [axes.get_title() for axes in figures[2].axes if axes.get_title()]
    assert len(titles) == view.MOST_PANELS and titles[-1] == "30 Å: axis 1" and titles[0] == "60 Å: axes 1 and 3"
