"""The page of a classification: the classes side by side, how many there should be, and where their particles are.

All that is drawn comes as plain numbers and arrays. Each figure has a function of its own, which draws with matplotlib's
Agg and writes the picture whole. A class has the same colour in all pictures, those of particles placed back too.
N particles, n pixels of a slice. Particles are white.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from libemc.replacement import write_bytes
from libemc.view.alignment import BLACK, BLUE, GREY, RED
from libemc.view.heterogeneity import (
    DIVERGING,
    PANEL,
    BandView,
    Slices,
    contour_level,
    coordinates_plot,
    counted,
    embedded,
    extreme,
    hatch,
    number,
    outline,
    picture,
)
from libemc.view.plots import CONTRAST, class_colour, save, scale_bar
from libemc.view.refinement import document, section, table

ACROSS = 6
"""Classes side by side; the next ones begin a new row."""
FAINTEST = 0.02
"""Of the greys of the averages, where the colours of the differences end at least: nothing looks like nothing."""
TITLE_PAD = 5.0  # points
FRAME = 2.5  # points: the frame of a class's first slice has its colour
LEAST_WIDE, MOST_WIDE, PER_SERIES = 4.5, 14.0, 0.35  # inches of the populations
MOST_NAMES = 40
"""Tilt series that are named under their bars; of more, every second, third ..."""


@dataclass(frozen=True)
class ClassView:
    """A class.

    Attributes:
        number: from 1.
        count: its particles; halves: those of them in half 1 and 2.
        share: of all particles, 0 to 1.
        resolution: Å, of its half maps at 0.143; None or NaN: not known.
        confidence: median probability with which its particles belong to it.
        slices: central slices {"xy", "xz", "yz"} (n, n) of its average.
        difference_slices: of its average less that of all particles, filtered alike.
    """

    number: int
    count: int
    halves: tuple[int, int]
    share: float
    resolution: float | None
    confidence: float
    slices: Slices = field(repr=False)
    difference_slices: Slices = field(repr=False)


@dataclass(frozen=True)
class Trial:
    """A number of classes that was tried. What is not known is NaN.

    Attributes:
        clusters: how many.
        criterion: Bayesian information criterion, lower is better.
        silhouette: mean over the particles, -1 to 1.
        null: mean and 95th percentile of the silhouette of data without structure.
        stability: mean adjusted Rand index of partitions of resampled data.
        chosen: whether the classes are so many.
    """

    clusters: int
    criterion: float
    silhouette: float
    null: tuple[float, float]
    stability: float
    chosen: bool


@dataclass(frozen=True)
class ClusterPage:
    """All that a page shows.

    Attributes:
        title: the headline.
        facts: what else is to be said, by name: inputs, options, numbers.
        pixel_size: Å, of all slices.
        classes: in the order of their numbers, one at least.
        trials: in the order of the number of classes; none where it was given.
        bands: whose axes the classes were found along.
        labels: (N,) class of each particle; 0: none.
        by_series: particles of each class in each tilt series, in the order of the classes.
    """

    title: str
    facts: Mapping[str, str]
    pixel_size: float
    classes: Sequence[ClassView]
    trials: Sequence[Trial]
    bands: Sequence[BandView]
    labels: NDArray[np.integer] = field(repr=False)
    by_series: Mapping[str, Sequence[int]]


def write_cluster_page(path: str | PathLike[str], page: ClusterPage) -> None:
    """Write the page, its pictures within it, whole or not at all.

    Args:
        path: the .html file.
        page: see there.
    """
    words = "Averages in common greys; below, what a class has more (red) and less (blue) than the average of all."
    draw_classes = partial(montage_plot, classes=page.classes, pixel_size=page.pixel_size)
    parts = [_summary(page), section("Classes", _classes_table(page))]
    parts.append(embedded("Averages of the classes", words, draw_classes))
    if any(band.used for band in page.bands):
        words = "Each dot is a particle in the colour of its class; those farther out lie on the edge."
        draw_places = partial(coordinates_plot, bands=page.bands, labels=page.labels)
        parts.append(embedded("Where particles lie", words, draw_places))
    if page.trials:
        parts.append(section("Number of classes", _trials_table(page.trials)))
        words = "The chosen number is marked. Data without structure have silhouettes up to the upper edge of the band."
        parts.append(embedded("What was tried", words, partial(trials_plot, trials=page.trials)))
    if page.by_series:
        words = "Particles of each class."
        draw_bars = partial(populations_plot, by_series=page.by_series, numbers=[c.number for c in page.classes])
        parts.append(embedded("Tilt series", words, draw_bars))
    write_bytes(path, document(page.title, parts).encode())


def _summary(page: ClusterPage) -> str:
    """How many classes, and the facts."""
    many = len(page.classes)
    first = f"{many} classes" if many > 1 else "One class: nothing in the data asks for more"
    rows = [("particles", str(len(page.labels))), ("tilt series", str(len(page.by_series))), *page.facts.items()]
    return f'<p class="first">{first}</p>' + table(("", ""), rows)


def _classes_table(page: ClusterPage) -> str:
    """A row for each class, and one for particles without."""
    head = ("class", "particles", "share, %", "half 1", "half 2", "resolution, Å", "confidence (median)")
    rows = [
        (
            str(c.number),
            str(c.count),
            number(100 * c.share, ".1f"),
            *map(str, c.halves),
            number(c.resolution, ".1f"),
            number(c.confidence, ".2f"),
        )
        for c in page.classes
    ]
    without = int((page.labels <= 0).sum())
    if without:
        rows.append(("none", str(without), number(100 * without / len(page.labels), ".1f"), "", "", "", ""))
    return table(head, rows)


def _trials_table(trials: Sequence[Trial]) -> str:
    """A row for each number of classes."""
    head = (
        "classes", "BIC, less the lowest", "silhouette", "structureless data reach (95 %)", "their mean",
        "stability (adjusted Rand index)", "",
    )  # fmt: skip
    rows = [
        (
            str(t.clusters),
            number(above, ".1f"),
            number(t.silhouette, ".2f"),
            number(t.null[1], ".2f"),
            number(t.null[0], ".2f"),
            number(t.stability, ".2f"),
            "chosen" if t.chosen else "",
        )
        for t, above in zip(trials, _above_lowest(trials), strict=True)
    ]
    return table(head, rows, {k for k, t in enumerate(trials) if t.chosen})


def _above_lowest(trials: Sequence[Trial]) -> list[float]:
    """The criterion of each trial less the lowest."""
    lowest = min((t.criterion for t in trials if math.isfinite(t.criterion)), default=math.nan)
    return [t.criterion - lowest for t in trials]


# ------------------------------------------------------------------------------------------------------------- pictures


def montage_plot(path: str | PathLike[str], classes: Sequence[ClassView], pixel_size: float) -> None:
    """Draw the classes side by side: slices of their averages in common greys, and below their differences from all.

    Args:
        path: the picture.
        classes: one at least; of more than `ACROSS` the next ones stand below.
        pixel_size: Å.
    """
    planes, others = list(classes[0].slices), list(classes[0].difference_slices)
    height = len(planes) + len(others)
    columns = min(len(classes), ACROSS)
    blocks = math.ceil(len(classes) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.0, hspace=0.0)
    size = (PANEL * max(columns, 2) + 0.4, blocks * (PANEL * height + 0.75))
    figure = Figure(figsize=size, layout=layout)
    grid = figure.subplots(blocks * height, columns, squeeze=False)
    greys = np.percentile(np.concatenate([np.ravel(i) for c in classes for i in c.slices.values()]), CONTRAST)
    most = extreme([image for c in classes for image in c.difference_slices.values()])
    most = max(most, FAINTEST * float(greys[1] - greys[0]))
    for axes in grid.ravel():
        axes.set_axis_off()
    for place, one in enumerate(classes):
        block, column = divmod(place, columns)
        cells = grid[block * height : (block + 1) * height, column]
        _class(list(cells), one, (float(greys[0]), float(greys[1])), most)
        if column == 0:
            for axes, name in zip(cells, [*planes, *(f"{name} difference" for name in others)], strict=True):
                axes.set_ylabel(name, fontsize=8)
    scale_bar(grid[0, 0], classes[0].slices[planes[0]].shape[1], pixel_size)
    save(figure, path)


def _class(cells: Sequence[Axes], one: ClassView, greys: tuple[float, float], most: float) -> None:
    """A column: the slices of the average and of the difference."""
    level = contour_level(one.slices)
    for axes, image in zip(cells, one.slices.values(), strict=False):
        axes.set_axis_on()
        picture(axes, image, "gray", {"vmin": greys[0], "vmax": greys[1]})
    for axes, (name, image) in zip(cells[len(one.slices) :], one.difference_slices.items(), strict=True):
        axes.set_axis_on()
        picture(axes, image, DIVERGING, {"vmin": -most, "vmax": most})
        if name in one.slices:
            outline(axes, one.slices[name], level, GREY)
    many = f"{counted(one.count, 'particle', 'particles')} ({number(100 * one.share, '.0f')} %)"
    known = one.resolution is not None and math.isfinite(one.resolution)
    words = [f"class {one.number}", many, *([f"{one.resolution:.1f} Å"] if known else [])]
    cells[0].set_title("\n".join(words), fontsize=8, pad=TITLE_PAD)
    for spine in cells[0].spines.values():
        spine.set(color=class_colour(one.number), linewidth=FRAME)


def trials_plot(path: str | PathLike[str], trials: Sequence[Trial]) -> None:
    """Draw what was found with each number of classes; the chosen one is marked.

    Args:
        path: the picture.
        trials: one at least.
    """
    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    criterion, silhouette, stability = figure.subplots(1, 3)
    along = np.array([t.clusters for t in trials])
    chosen = np.array([t.chosen for t in trials], dtype=bool)
    null = np.array([t.null for t in trials], dtype=np.float64).reshape(-1, 2)
    known = np.isfinite(null).all(axis=1)
    if known.any():
        silhouette.fill_between(
            along[known], null[known, 0], null[known, 1], color=GREY, alpha=0.3, linewidth=0,
            label="structureless data,\nmean to 95th percentile",
        )  # fmt: skip
        silhouette.plot(along[known], null[known, 1], "_", color=GREY, markersize=9)
    _tried(criterion, along, np.array(_above_lowest(trials), dtype=np.float64), chosen)
    _tried(silhouette, along, np.array([t.silhouette for t in trials], dtype=np.float64), chosen)
    _tried(stability, along, np.array([t.stability for t in trials], dtype=np.float64), chosen)
    criterion.set_title("BIC, less the lowest: lower is better", fontsize=9)
    silhouette.set_title("silhouette: higher is better", fontsize=9)
    stability.set_title("stability: 1 is always the same", fontsize=9)
    criterion.set_ylabel("BIC")
    silhouette.set_ylabel("silhouette")
    stability.set_ylabel("adjusted Rand index")
    stability.set_ylim(min(0.0, stability.get_ylim()[0]), 1.05)
    bottom, top = silhouette.get_ylim()
    silhouette.set_ylim(min(0.0, bottom), top + 0.25 * (top - min(0.0, bottom)))
    if silhouette.get_legend_handles_labels()[0]:
        silhouette.legend(frameon=False, fontsize=7, loc="upper right")
    save(figure, path)


def _tried(axes: Axes, along: NDArray[np.int64], values: NDArray[np.float64], chosen: NDArray[np.bool_]) -> None:
    """Values over the number of classes; what is not known is left out."""
    known = np.isfinite(values)
    for place in along[chosen]:
        axes.axvline(place, color=RED, linewidth=1, linestyle=":", zorder=0)
    axes.plot(along[known], values[known], "o-", color=BLUE, markersize=5, linewidth=1.2, zorder=2)
    axes.plot(along[known & chosen], values[known & chosen], "o", color=RED, markersize=9, zorder=3)
    if not known.any():
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xlim=(along.min() - 0.5, along.max() + 0.5), xlabel="classes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def populations_plot(path: str | PathLike[str], by_series: Mapping[str, Sequence[int]], numbers: Sequence[int]) -> None:
    """Draw how many particles of each class each tilt series has, as bars upon each other.

    Args:
        path: the picture.
        by_series: particles by class, of each tilt series by its name; one at least.
        numbers: of the classes, in the order of these counts.
    """
    names = sorted(by_series)
    counts = np.array([by_series[name] for name in names], dtype=np.int64).reshape(len(names), len(numbers))
    figure = Figure(figsize=(min(max(LEAST_WIDE, 2.0 + PER_SERIES * len(names)), MOST_WIDE), 3.2), layout="constrained")
    axes = figure.add_subplot()
    base = np.zeros(len(names), dtype=np.int64)
    place = np.arange(len(names))
    for one, column in zip(numbers, counts.T, strict=True):
        axes.bar(
            place, column, 0.8, base, color=class_colour(one), hatch=hatch(one), edgecolor="white", linewidth=0.3,
            label=f"class {one}",
        )  # fmt: skip
        base = base + column
    step = math.ceil(len(names) / MOST_NAMES)
    upright = len(names) > 8
    axes.set_xticks(place[::step], names[::step], rotation=90 if upright else 0, fontsize=7)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylabel="particles")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color=BLACK, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    handles, words = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], words[::-1], frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)
