"""The page of a classification, and its pictures: all classes, their numbers, and the same colour for each everywhere."""

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

from libemc.view import classification as view
from libemc.view import mapback, plots
from libemc.view.classification import ClassView, ClusterPage, Trial
from libemc.view.heterogeneity import BandView
from tests.view.figures import kept_figures

COUNT, BOX, PIXEL = 60, 16, 4.5


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    return kept_figures(monkeypatch, view, 0.05)


def a_class(number: int, count: int = 20, resolution: float | None = 14.25) -> ClassView:
    """A ball of a size of its own."""
    radius = np.sqrt(((np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(axis=0))
    volume = 1 / (1 + np.exp(radius - 3 - number / 5))
    more = volume - 1 / (1 + np.exp(radius - 3.4))
    slices, differences = plots.central_slices(volume), plots.central_slices(more)
    return ClassView(
        number, count, (count // 2, count - count // 2), count / COUNT, resolution, 0.875, slices, differences
    )


def a_trial(clusters: int, chosen: bool = False) -> Trial:
    return Trial(clusters, 900.0 + 10 * abs(clusters - 3), 0.5 + 0.12 * chosen, (0.2, 0.31), 0.75, chosen)


NOTHING = Trial(1, 1000.0, math.nan, (math.nan, math.nan), math.nan, False)


def a_band(meaningful: int = 2, count: int = COUNT) -> BandView:
    strength = np.array([9.0, 4.0, 1.0])
    coordinates = np.random.default_rng(0).normal(size=(count, 3))
    return BandView("60", math.inf, 42.0, strength, np.ones(3), 1.5, meaningful, [], [], coordinates, [], {})


def a_page(**more) -> ClusterPage:
    page = ClusterPage(
        title="spt_03 & friends", facts={"axes": "a <b>.json"}, pixel_size=PIXEL, classes=[a_class(k) for k in (1, 2, 3)],
        trials=[NOTHING, a_trial(2), a_trial(3, True), a_trial(4)], bands=[a_band()], labels=1 + np.arange(COUNT) % 3,
        by_series={"TS_1": [8, 9, 10], "TS_2": [12, 11, 10]},
    )  # fmt: skip
    return replace(page, **more)


def written(path: Path, page: ClusterPage) -> tuple[str, str]:
    """The page without its pictures, which are whole, and its cells."""
    view.write_cluster_page(path / "index.html", page)
    text = (path / "index.html").read_text()
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    assert len(re.findall("src=", text)) == len(re.findall("<img ", text)) == text.count('src="data:image/png;base64,')
    assert not re.search(r"<script|<link|href=|url\(|<b>", text)
    assert [file.name for file in path.iterdir()] == ["index.html"]
    return re.sub('src="[^"]+"', "", text), "|".join(re.findall("<td>(.*?)</td>", text))


def test_the_page_has_all_classes_and_trials(tmp_path: Path) -> None:
    classes = [a_class(1, 10, 17.04), a_class(2, 21, None), a_class(3, 24, math.nan)]
    labels = np.repeat([0, 1, 2, 3], [5, 10, 21, 24])
    text, cells = written(tmp_path, a_page(classes=classes, labels=labels))
    assert '<p class="first">3 classes</p>' in text and "spt_03 &amp; friends" in text and "a &lt;b&gt;.json" in cells
    assert "1|10|16.7|5|5|17.0|0.88|2|21|35.0|10|11|–|0.88|3|24|40.0|12|12|–|0.88|none|5|8.3|" in cells
    assert "1|100.0|–|–|–|–||2|10.0|0.50|0.31|0.20|0.75||3|0.0|0.62|0.31|0.20|0.75|chosen|4|10.0|" in cells
    assert "structureless data reach" in text and text.count("<img ") == 4
    strong = re.findall('<tr class="strong">(.*?)</tr>', text)
    assert len(strong) == 1 and strong[0].startswith("<td>3</td><td>0.0</td>")


def test_one_class(tmp_path: Path) -> None:
    """What is the same as the average of all differs from it by nothing, whatever rounding says."""
    one = a_class(1, COUNT)
    page = a_page(
        classes=[replace(one, difference_slices={n: 1e-9 * s for n, s in one.slices.items()})], trials=[], bands=[a_band(0)],
        labels=np.ones(COUNT, dtype=np.int64), by_series={"TS_1": [COUNT]},
    )  # fmt: skip
    text, cells = written(tmp_path, page)
    assert "One class: nothing in the data asks for more" in text and f"1|{COUNT}|100.0|30|30|14.2|0.88" in cells
    assert text.count("<img ") == 2 and "Where particles lie" not in text
    text, _ = written(tmp_path, replace(page, trials=[replace(NOTHING, chosen=True)], by_series={}))
    assert text.count("<img ") == 2


def test_three_particles(tmp_path: Path) -> None:
    page = a_page(
        classes=[a_class(1, 2), a_class(2, 1)], bands=[a_band(1, 3), a_band(2, 3)], labels=np.array([1, 1, 2]),
        by_series={"TS_1": [2, 1]},
    )  # fmt: skip
    text, cells = written(tmp_path, page)
    assert text.count("<img ") == 4 and "|2|1|1.7|0|1|14.2|0.88|" in cells


def test_a_class_has_the_colour_of_its_particles_placed_back() -> None:
    names = [f"class {k}" for k in range(1, 12)]
    placed = mapback.by_kind(list(range(11)), names)
    assert [placed.names[name] for name in names] == [plots.class_colour(k) for k in range(1, 12)]
    assert len({plots.class_colour(k) for k in range(1, 9)}) == 8 and plots.class_colour(9) == plots.class_colour(1)


def test_the_montage_has_all_classes(tmp_path: Path, figures: list[Figure]) -> None:
    """Common greys and colours, symmetric ones for differences; the title says which, how many and how fine."""
    classes = [a_class(k, 20 + k) for k in range(1, 9)]
    classes[0] = replace(classes[0], count=1, resolution=math.nan)
    view.montage_plot(tmp_path / "m.png", classes, PIXEL)
    titled = [axes for axes in figures[0].axes if axes.get_title()]
    titles = [axes.get_title().split("\n") for axes in titled]
    assert titles[0] == ["class 1", "1 particle (35 %)"] and titles[7] == ["class 8", "28 particles (47 %)", "14.2 Å"]
    assert [to_hex(axes.spines["top"].get_edgecolor()) for axes in titled] == [
        plots.class_colour(k) for k in range(1, 9)
    ]
    shown = [axes.images[0] for axes in figures[0].axes if axes.images]
    assert len(shown) == 8 * 6
    greys = {image.get_clim() for image in shown if image.cmap.name == "gray"}
    colours = {image.get_clim() for image in shown if image.cmap.name == view.DIVERGING}
    assert len(greys) == len(colours) == 1
    ((low, high),) = colours
    assert low == -high < 0
    for axes, one in zip(titled, classes, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), one.slices["xy"])
    second = [axes.images[0] for axes in figures[0].axes if axes.images and axes.get_subplotspec().colspan.start == 1]
    np.testing.assert_array_equal(second[3].get_array(), classes[1].difference_slices["xy"])


def test_rounding_errors_are_no_differences(tmp_path: Path, figures: list[Figure]) -> None:
    one = a_class(1)
    view.montage_plot(tmp_path / "m.png", [replace(one, difference_slices={"xy": 1e-9 * one.slices["xy"]})], PIXEL)
    image = next(
        axes.images[0] for axes in figures[0].axes if axes.images and axes.images[0].cmap.name == view.DIVERGING
    )
    assert abs(image.norm(1e-9) - 0.5) < 1e-3


def test_the_chosen_number_is_marked(tmp_path: Path, figures: list[Figure]) -> None:
    """What is not known is left out; the band is that of structureless data."""
    view.trials_plot(tmp_path / "t.png", [NOTHING, a_trial(2), a_trial(3, True), a_trial(4)])
    criterion, silhouette, stability = figures[0].axes
    for axes, known in ((criterion, [1, 2, 3, 4]), (silhouette, [2, 3, 4]), (stability, [2, 3, 4])):
        values = next(line for line in axes.lines if line.get_color() == view.BLUE)
        marked = next(line for line in axes.lines if line.get_color() == view.RED and line.get_marker() == "o")
        assert values.get_xdata().tolist() == known and marked.get_xdata().tolist() == [3]
    band = silhouette.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 0.2 and band.max() == 0.31
    view.trials_plot(tmp_path / "u.png", [replace(NOTHING, criterion=math.nan)])
    assert all("not known" in axes.texts[0].get_text() for axes in figures[1].axes)


def test_bars_are_particles(tmp_path: Path, figures: list[Figure]) -> None:
    """Of each tilt series and class, upon each other, in its colour; of many series some are named."""
    view.populations_plot(tmp_path / "p.png", {"TS_2": [5, 0], "TS_1": [3, 4]}, [2, 4])
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["TS_1", "TS_2"]
    bars = [(to_hex(p.get_facecolor()), p.get_y(), p.get_height()) for p in axes.patches]
    two, four = plots.class_colour(2), plots.class_colour(4)
    assert bars == [(two, 0, 3), (two, 0, 5), (four, 3, 4), (four, 5, 0)]
    view.populations_plot(tmp_path / "q.png", {f"TS_{k:03d}": [1] * 10 for k in range(100)}, range(1, 11))
    axes = figures[1].axes[0]
    assert 20 <= len(axes.get_xticks()) <= view.MOST_NAMES
    assert len({(p.get_facecolor(), p.get_hatch()) for p in axes.patches}) == 10
