"""The page of how particles differ: strengths of the axes, what the particle looks like along them, where particles lie.

All that is drawn comes as plain numbers and arrays. Each figure has a function of its own, which draws with matplotlib's
Agg and writes the picture whole. N particles, k axes of a band, h axes of noise, n pixels of a slice. Particles are white.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from libemc.replacement import write_bytes
from libemc.view.alignment import BLACK, BLUE, GREY, RED
from libemc.view.plots import CONTRAST, PALETTE, class_colour, save, scale_bar
from libemc.view.refinement import document, illustration, section, table

Array = NDArray[np.floating]
Slices = Mapping[str, Array]

DIVERGING = "RdBu_r"
"""Colours of more and less density: red and blue, which all see apart."""
VARIANCE, AQUA = "magma", "#7fffd4"
EXTREME = 99.8
"""Percentile of an axis's absolute values where its colours end."""
OUTLINE = 0.35
"""Of the average's brightest part, where its contour is drawn."""
BRIGHTEST = 99.5  # percentile
LOGARITHMIC = 8.0
"""Times the floor: where an axis is stronger, strengths are drawn over powers of ten."""
PANEL = 1.45  # inches of a slice
ALONG = {"minus": "average − 2σ", "average": "average", "plus": "average + 2σ", "axis": "axis"}
"""What is shown of an axis, and the names of the columns."""
PLANES = ("xy", "xz")
"""Of the slices, what is drawn of axes."""
MOST_AXES = 8
"""Axes whose slices are drawn: the first of a band."""
MOST_PANELS, ACROSS = 6, 3
"""Scatter plots in a picture, and in a row."""
SPREAD, MARGIN = 0.2, 0.12
"""Percent of the particles that may lie beyond each end of a scatter plot (on its edge), and its rim."""
INK = 6000.0
"""Points² that the dots of a scatter plot share, each of them within `DOTS`."""
DOTS = (4.0, 30.0)
UNCLASSED = "#c9c9c9"
MARKERS, HATCHES = "os^Dv", ("", "////", "....", "xxxx", "++++")
"""After the last colour has been given, they begin again with the next of these."""
MORE_AXES = 2
"""After the meaningful axes, so many more stand in the table."""
UNKNOWN = "–"


@dataclass(frozen=True)
class BandView:
    """The axes of one band of resolutions.

    Attributes:
        name: its scale in Å, as users name it.
        coarse, fine: Å, ends of the band; the coarse one may be infinite.
        strength: (k,) of the axes, strongest first; noise: (h,) of displaced data, strongest first.
        floor: what an axis must exceed to be more than noise.
        meaningful: how many axes do, the first ones.
        suspects: of the first axes, R² with what is no structure, by name: missing wedge, defocus, ...; may be empty.
        left_out: of the first axes, whether it is meaningful, but follows what is no structure, and isn't used.
        coordinates: (N, k) along the axes, in standard errors, of mean 0.
        axes_slices: of the first axes: central slices {"xy", "xz", "yz"} (n, n) of "minus" and "plus", the average at two
            standard deviations to both sides, of "average", and of "axis" itself.
        variance_slices: central slices (n, n) of the variance map.
    """

    name: str
    coarse: float
    fine: float
    strength: Array
    noise: Array
    floor: float
    meaningful: int
    suspects: Sequence[Mapping[str, float]]
    left_out: Sequence[bool]
    coordinates: Array = field(repr=False)
    axes_slices: Sequence[Mapping[str, Slices]] = field(repr=False)
    variance_slices: Slices = field(repr=False)

    @property
    def used(self) -> list[int]:
        """Places, from 0, of the axes that are meaningful and not left out."""
        return [k for k in range(self.meaningful) if not self.is_left_out(k)]

    def is_left_out(self, place: int) -> bool:
        """Whether the axis at a place, from 0, is meaningful but not used."""
        return place < min(self.meaningful, len(self.left_out)) and bool(self.left_out[place])

    @property
    def label(self) -> str:
        """Its scale with the unit."""
        return f"{self.name} Å"


@dataclass(frozen=True)
class PcaPage:
    """All that a page shows.

    Attributes:
        title: the headline.
        facts: what else is to be said, by name: inputs, options, numbers.
        pixel_size: Å, of all slices.
        bands: in their order, one at least.
        series: (N,) name of each particle's tilt series.
        average_slices: central slices (n, n) of the average.
    """

    title: str
    facts: Mapping[str, str]
    pixel_size: float
    bands: Sequence[BandView]
    series: Sequence[str]
    average_slices: Slices = field(repr=False)


def write_pca_page(path: str | PathLike[str], page: PcaPage) -> None:
    """Write the page, its pictures within it, whole or not at all.

    Args:
        path: the .html file.
        page: see there.
    """
    parts = [_summary(page)]
    words = (
        "Filled axes are used; the dashed line is what noise may reach. Hollow red ones follow what is no structure."
    )
    parts.append(embedded("Strength of the axes", words, partial(spectrum_plot, bands=page.bands)))
    parts.append(section("Axes", _axes_table(page.bands)))
    if any(band.used for band in page.bands):
        labels, names = _by_series(page.series)
        colours = ", coloured by tilt series" if names else ""
        words = f"Each dot is a particle{colours}; those farther out lie on the edge."
        draw = partial(coordinates_plot, bands=page.bands, labels=labels, names=names)
        parts.append(embedded("Where particles lie", words, draw))
    for band in page.bands:
        if band.axes_slices:
            words = "Axis: red where the particle is denser towards plus, blue where it is denser towards minus."
            draw = partial(axes_plot, band=band, pixel_size=page.pixel_size)
            parts.append(embedded(f"Along the axes, {band.label}", words, draw))
    words = "The contour is that of the average."
    draw = partial(variance_plot, bands=page.bands, average_slices=page.average_slices, pixel_size=page.pixel_size)
    parts.append(embedded("Where the particles vary", words, draw))
    write_bytes(path, document(page.title, parts).encode())


def embedded(headline: str, caption: str, draw: Callable[[Path], None]) -> str:
    """A part of a page with a picture within it: texts, and what draws it to a path."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        draw(picture)
        data = base64.b64encode(picture.read_bytes()).decode()
    return section(headline, illustration(f"data:image/png;base64,{data}", headline, caption))


def number(value: float | None, form: str) -> str:
    """In that form, where there is one."""
    return format(value, form) if value is not None and math.isfinite(value) else UNKNOWN


def counted(many: int, one: str, more: str) -> str:
    """A number with its noun."""
    return f"{many} {one if many == 1 else more}"


def _by_series(series: Sequence[str]) -> tuple[NDArray[np.int64] | None, dict[int, str] | None]:
    """Labels (N,) and their names, where there are colours for all tilt series, and more than one."""
    names = sorted(set(series))
    if not 1 < len(names) <= len(PALETTE):
        return None, None
    places = {name: k for k, name in enumerate(names, start=1)}
    return np.array([places[name] for name in series]), {k: name for name, k in places.items()}


def _summary(page: PcaPage) -> str:
    """How many axes are meaningful in each band, and the facts."""
    found = []
    for band in page.bands:
        out = band.meaningful - len(band.used)
        left = f" ({out} left out)" if out else ""
        found.append(f"{band.label}: {counted(band.meaningful, 'axis', 'axes')}{left}")
    rows = [
        ("particles", str(len(page.series))),
        ("tilt series", str(len(set(page.series)))),
        *((f"band {b.label}", _ends(b)) for b in page.bands),
        *page.facts.items(),
    ]
    return f'<p class="first">{escape("; ".join(found))}</p>' + table(("more than noise", ""), rows)


def _ends(band: BandView) -> str:
    """From where to where a band goes."""
    start = f"{band.coarse:.0f} Å" if math.isfinite(band.coarse) else "the largest"
    return f"{start} to {band.fine:.0f} Å"


def _axes_table(bands: Sequence[BandView]) -> str:
    """A row for each meaningful axis and the next ones."""
    names = list(dict.fromkeys(name for band in bands for axis in band.suspects for name in axis))
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for band in bands:
        for k in range(min(len(band.strength), band.meaningful + MORE_AXES)):
            found = band.suspects[k] if k < len(band.suspects) else {}
            if k in band.used:
                strong.add(len(rows))
            values = [number(found.get(name), ".2f") for name in names]
            levels = number(band.strength[k], ".3g"), number(band.floor, ".3g")
            rows.append((band.label, str(k + 1), *levels, *values, _use(band, k)))
    head = ("band", "axis", "strength", "noise reaches", *(f"{name}, R²" for name in names), "used")
    return table(head, rows, strong)


def _use(band: BandView, place: int) -> str:
    """Whether an axis is used, and why not."""
    if not band.is_left_out(place):
        return "yes" if place < band.meaningful else "no: as strong as noise"
    found = band.suspects[place] if place < len(band.suspects) else {}
    return f"no: follows {max(found, key=lambda name: found[name])}" if found else "no: follows the sampling"


# ------------------------------------------------------------------------------------------------------------- pictures


def spectrum_plot(path: str | PathLike[str], bands: Sequence[BandView]) -> None:
    """Draw the strengths of the axes of each band beside those of noise, and what they must exceed.

    Args:
        path: the picture.
        bands: one at least.
    """
    columns = min(len(bands), ACROSS)
    rows = math.ceil(len(bands) / columns)
    figure = Figure(figsize=(max(3.6 * columns, 4.6), 3.0 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(bands) :]:
        axes.set_axis_off()
    for axes, band in zip(grid, bands, strict=False):
        _spectrum(axes, band)
    marks = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="used"),
        Line2D([], [], color=BLUE, marker="o", linestyle="", markerfacecolor="white", label="no more than noise"),
        Line2D([], [], color=GREY, linewidth=6, alpha=0.35, label="noise"),
        Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label="what noise may reach"),
    ]
    if any(band.is_left_out(k) for band in bands for k in range(band.meaningful)):
        hollow = {"markerfacecolor": "white", "markeredgewidth": 1.6}
        marks.insert(1, Line2D([], [], color=RED, marker="o", linestyle="", label="left out: no structure", **hollow))  # type: ignore[arg-type]
    figure.legend(handles=marks, loc="outside lower center", ncols=3 if columns == 1 else 5, frameon=False, fontsize=8)
    save(figure, path)


def _spectrum(axes: Axes, band: BandView) -> None:
    """The panel of one band."""
    strength, noise = np.asarray(band.strength, dtype=np.float64), np.asarray(band.noise, dtype=np.float64)
    known = np.concatenate([strength, noise, [band.floor]])
    known = known[np.isfinite(known) & (known > 0)]
    high = float(known.max(initial=1e-9))
    wide = bool(len(known)) and high > LOGARITHMIC * band.floor > 0
    low = 0.6 * float(known.min()) if wide else 0.0
    place = np.arange(1, len(strength) + 1)
    if len(noise):
        along = np.arange(1, len(noise) + 1)
        axes.fill_between(along, low, np.maximum(noise, low), color=GREY, alpha=0.25, linewidth=0)
        axes.plot(along, np.maximum(noise, low), color=GREY, linewidth=1.2)
    axes.axhline(band.floor, color=BLACK, linestyle="--", linewidth=1)
    axes.plot(place, np.maximum(strength, low), color=BLUE, linewidth=0.8, alpha=0.5)
    out = np.array([band.is_left_out(k) for k in range(len(strength))], dtype=bool)
    used = np.isin(np.arange(len(strength)), band.used)
    kinds = ((~(used | out), BLUE, "white", 1.0), (used, BLUE, BLUE, 1.0), (out, RED, "white", 1.6))
    for here, edge, face, thick in kinds:
        style = {"markeredgecolor": edge, "markerfacecolor": face, "markeredgewidth": thick}
        axes.plot(place[here], np.maximum(strength, low)[here], "o", markersize=5.5, zorder=3, **style)  # type: ignore[arg-type]
    axes.set(xlim=(0.4, max(len(strength), len(noise), 2) + 0.6), xlabel="axis", ylabel="strength")
    axes.set_ylim(low, high * 1.1)
    if wide:
        axes.set(yscale="log", ylim=(low, high * 1.6))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    out_of_use = f", {int(out.sum())} left out" if out.any() else ""
    words = f"{band.label}: {counted(band.meaningful, 'meaningful axis', 'meaningful axes')}{out_of_use}"
    axes.set_title(words, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def axes_plot(path: str | PathLike[str], band: BandView, pixel_size: float) -> None:
    """Draw a row for each axis whose slices are given: the average to both sides along it, in common greys, and the axis.

    Args:
        path: the picture.
        band: with slices of one axis at least; of the first `MOST_AXES`.
        pixel_size: Å.
    """
    shown = list(band.axes_slices)[:MOST_AXES]
    wide = len(ALONG)
    ratios = [1.0] * wide + [0.06] + [1.0] * wide  # a gap between the planes
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    size = (PANEL * sum(ratios) + 0.4, PANEL * len(shown) + 0.4)
    figure = Figure(figsize=size, layout=layout)
    grid = figure.subplots(len(shown), len(ratios), squeeze=False, width_ratios=ratios)
    for k, (row, slices) in enumerate(zip(grid, shown, strict=True)):
        row[wide].set_axis_off()
        greys = np.concatenate([np.ravel(slices["average"][plane]) for plane in PLANES])
        low, high = np.percentile(greys, CONTRAST)
        level = contour_level(slices["average"])
        most = extreme([slices["axis"][plane] for plane in PLANES])
        for plane, panels in zip(PLANES, (row[:wide], row[wide + 1 :]), strict=True):
            for axes, (kind, heading) in zip(panels, ALONG.items(), strict=True):
                limits = {"vmin": -most, "vmax": most} if kind == "axis" else {"vmin": low, "vmax": high}
                picture(axes, slices[kind][plane], DIVERGING if kind == "axis" else "gray", limits)
                if kind == "axis":
                    outline(axes, slices["average"][plane], level, GREY)
                if k == 0:
                    axes.set_title(f"{heading}, {plane}", fontsize=8)
        words = f"axis {k + 1}, strength {number(band.strength[k], '.3g')}"
        row[0].set_ylabel(words + ("\nleft out" if band.is_left_out(k) else ""), fontsize=8)
        if band.is_left_out(k):
            row[0].yaxis.label.set_color(RED)
    scale_bar(grid[0, 0], shown[0]["average"]["xy"].shape[1], pixel_size)
    save(figure, path)


def extreme(images: Sequence[Array]) -> float:
    """Where diverging colours of images end, to both sides; never 0."""
    values = np.abs(np.concatenate([np.ravel(image) for image in images]))
    return max(float(np.percentile(values, EXTREME)), 1e-30)


def picture(axes: Axes, image: Array, colours: str, limits: Mapping[str, float]) -> None:
    """A slice (n, n) without ticks, its first row at the bottom."""
    axes.imshow(image, cmap=colours, origin="lower", interpolation="nearest", **limits)  # type: ignore[arg-type]
    axes.set(xticks=[], yticks=[])


def contour_level(slices: Slices) -> float:
    """Density of the outline of a particle."""
    values = np.concatenate([np.ravel(image) for image in slices.values()])
    dark, bright = np.median(values), np.percentile(values, BRIGHTEST)
    return float(dark + OUTLINE * (bright - dark))


def outline(axes: Axes, image: Array, level: float, colour: str) -> None:
    """A contour of a slice (n, n), where it has one."""
    if image.min() < level < image.max():
        axes.contour(image, levels=[level], colors=[colour], linewidths=0.8, alpha=0.9)


def variance_plot(
    path: str | PathLike[str], bands: Sequence[BandView], average_slices: Slices, pixel_size: float
) -> None:
    """Draw the slices of each band's variance map, a row for each, with the outline of the average.

    Args:
        path: the picture.
        bands: one at least.
        average_slices: (n, n) of the average, of the same shapes.
        pixel_size: Å.
    """
    names = list(average_slices)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    size = (1.5 * PANEL * len(names) + 1.2, 1.5 * PANEL * len(bands) + 0.3)
    figure = Figure(figsize=size, layout=layout)
    grid = figure.subplots(len(bands), len(names), squeeze=False)
    level = contour_level(average_slices)
    for row, band in zip(grid, bands, strict=True):
        values = np.concatenate([np.ravel(band.variance_slices[name]) for name in names])
        most = max(float(np.percentile(values, CONTRAST[1])), 1e-30)
        power = math.floor(math.log10(most))
        for axes, name in zip(row, names, strict=True):
            limits = {"vmin": 0.0, "vmax": most / 10.0**power}
            picture(axes, band.variance_slices[name] / 10.0**power, VARIANCE, limits)
            outline(axes, average_slices[name], level, AQUA)
        row[0].set_ylabel(band.label)
        label = f"variance ($10^{{{power}}}$)" if power else "variance"
        bar = figure.colorbar(row[-1].images[0], ax=list(row), pad=0.02, aspect=18, ticks=MaxNLocator(4))
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    scale_bar(grid[0, 0], average_slices[names[0]].shape[1], pixel_size)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------- coordinates


def coordinates_plot(
    path: str | PathLike[str],
    bands: Sequence[BandView],
    labels: NDArray[np.integer] | None = None,
    names: Mapping[int, str] | None = None,
) -> None:
    """Draw where particles lie along the used axes, by pairs, or as a histogram where a band has only one.

    Args:
        path: the picture.
        bands: one at least.
        labels: (N,) classes, from 1; 0: none. Without them all dots are alike.
        names: of the labels, for the legend; without them "class 1: 97".
    """
    panels = _panels(bands)
    columns = min(max(len(panels), 1), ACROSS)
    rows = math.ceil(max(len(panels), 1) / columns)
    figure = Figure(figsize=(3.3 * columns + (1.5 if labels is not None else 0.0), 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()  # which leaves what is written in it
    if not panels:
        grid[0].text(0.5, 0.5, "no axis is used", transform=grid[0].transAxes, ha="center", color=GREY)
    for axes, (band, pair) in zip(grid, panels, strict=False):
        if len(pair) == 2:
            _scatter(axes, band.coordinates[:, list(pair)].astype(np.float64), labels)
            axes.set_title(f"{band.label}: axes {pair[0] + 1} and {pair[1] + 1}", fontsize=9)
            axes.set_ylabel(f"axis {pair[1] + 1} (standard errors)", fontsize=8)
        else:
            _histogram(axes, band.coordinates[:, pair[0]].astype(np.float64), labels)
            axes.set_title(f"{band.label}: axis {pair[0] + 1}", fontsize=9)
            axes.set_ylabel("particles", fontsize=8)
        axes.set_xlabel(f"axis {pair[0] + 1} (standard errors)", fontsize=8)
        axes.tick_params(labelsize=7)
    if labels is not None:
        figure.legend(handles=_marks(labels, names), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)


def _panels(bands: Sequence[BandView]) -> list[tuple[BandView, tuple[int, ...]]]:
    """Which axes of which band are drawn: of each band its strongest, as long as there is room, in the order of bands."""
    found = []
    for order, band in enumerate(bands):
        used = band.used
        pairs: list[tuple[int, ...]] = list(zip(used[::2], used[1::2], strict=False))
        if len(used) % 2:
            pairs.append((used[0], used[-1]) if len(used) > 1 else (used[0],))
        found += [(turn, order, pair) for turn, pair in enumerate(pairs)]
    chosen = sorted(found)[:MOST_PANELS]
    return [(bands[order], pair) for _, order, pair in sorted(chosen, key=lambda one: (one[1], one[0]))]


def _marker(label: int) -> str:
    return MARKERS[(label - 1) // len(PALETTE) % len(MARKERS)] if label > 0 else "x"


def hatch(label: int) -> str:
    """Of a class's bar: what tells it from another one of the same colour."""
    return HATCHES[(label - 1) // len(PALETTE) % len(HATCHES)]


def _colour(label: int) -> str:
    return class_colour(label) if label > 0 else UNCLASSED


def _reach(values: Array) -> tuple[float, float]:
    """Where the axis of values (N,) begins and ends."""
    low, high = np.percentile(values, (SPREAD, 100 - SPREAD)) if len(values) else (-1.0, 1.0)
    rim = MARGIN * max(float(high - low), 1.0)
    return float(low) - rim, float(high) + rim


def _scatter(axes: Axes, place: Array, labels: NDArray[np.integer] | None) -> None:
    """Dots at (N, 2), in a random order, so that no class hides another."""
    order = np.random.default_rng(0).permutation(len(place))
    order = order[np.isfinite(place[order]).all(axis=1)]
    reach = [_reach(place[order, k]) for k in (0, 1)]
    rim = [0.02 * (high - low) for low, high in reach]
    x, y = (np.clip(place[:, k], reach[k][0] + rim[k], reach[k][1] - rim[k]) for k in (0, 1))
    size = float(np.clip(INK / max(len(order), 1), *DOTS))
    edge = {"edgecolors": "#333333", "linewidths": 0.25 if size > 8 else 0.0}
    of = np.zeros(len(place), dtype=np.int64) if labels is None else np.asarray(labels)
    if labels is None:
        axes.scatter(x[order], y[order], size, color=BLUE, alpha=0.6, linewidths=0)
    else:
        out = order[of[order] <= 0]
        axes.scatter(x[out], y[out], size, color=UNCLASSED, marker="x", linewidths=0.8, zorder=1)
    for marker in sorted({_marker(k) for k in np.unique(of[order]).tolist() if k > 0}):
        here = [k for k in order.tolist() if of[k] > 0 and _marker(int(of[k])) == marker]
        colours = [_colour(int(of[k])) for k in here]
        axes.scatter(x[here], y[here], size, c=colours, marker=marker, alpha=0.85, zorder=2, **edge)  # type: ignore[arg-type]
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    half = max(high - low for low, high in reach) / 2
    across, along = ((sum(ends) / 2 - half, sum(ends) / 2 + half) for ends in reach)
    axes.set(xlim=across, ylim=along, aspect="equal")


def _histogram(axes: Axes, place: Array, labels: NDArray[np.integer] | None) -> None:
    """Counts of (N,), one class upon the other."""
    known = np.isfinite(place)
    low, high = _reach(place[known])
    values = np.clip(place, low, high)
    bins = int(np.clip(2 * math.sqrt(max(int(known.sum()), 1)), 6, 40))
    of = np.zeros(len(place), dtype=np.int64) if labels is None else np.asarray(labels)
    kinds = np.unique(of).tolist()
    axes.hist(
        [values[known & (of == k)] for k in kinds], bins=bins, range=(low, high), stacked=True,
        color=[BLUE if labels is None else _colour(k) for k in kinds], edgecolor="white", linewidth=0.3,
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlim=(low, high), box_aspect=1)


def _marks(labels: NDArray[np.integer], names: Mapping[int, str] | None) -> list[Line2D]:
    """What the colours of labels (N,) mean."""
    marks = []
    for label, many in zip(*(a.tolist() for a in np.unique(labels, return_counts=True)), strict=True):
        name = (names or {}).get(label, f"class {label}: {many}" if label > 0 else f"no class: {many}")
        marks.append(
            Line2D([], [], marker=_marker(label), linestyle="", color=_colour(label), markersize=5, label=name)
        )
    return marks
