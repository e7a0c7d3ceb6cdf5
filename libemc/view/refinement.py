"""The page of a refinement run: its iterations in a table and in pictures, one file that needs nothing else.

All that is drawn comes as plain numbers and arrays in a `RunPage`. Each figure has a function of its own, which takes the
page's data and a path, draws with matplotlib's Agg, and writes the picture whole. N particles, S shells, n pixels of a map.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from libemc.replacement import write_bytes
from libemc.view.alignment import BLACK, BLUE, GREY, RED
from libemc.view.plots import CONTRAST, angstrom_axis, angular_distribution_plot, save, scale_bar

Array = NDArray[np.float64]

GOLD_STANDARD = 0.143
COURSE, PALEST = "Blues", 0.25
"""Colours of the iterations, from the first, pale, to the last but one; the last is black."""
MOST_COLUMNS = 10
"""Iterations side by side: of more, the first, the last and some between."""
MOST_CURVES = 12
"""Names in the legend of the FSC: of more, the first, the last and some between."""
PANEL = 1.45  # inches of a slice
BINS = 30
FARTHEST = 99.0
"""Percentile of the shifts where their axis ends; those beyond are counted in its last bin."""
LEAST_WIDE, MOST_WIDE, PER_SERIES = 5.0, 14.0, 0.5  # inches of the scores
MOST_NAMES = 40
"""Tilt series that are named under their scores; of more, every second, third ..."""
HALVES = {1: BLUE, 2: "#d6604d"}


@dataclass(frozen=True)
class Iteration:
    """One iteration.

    Attributes:
        kind: what was done, in a word: global, local.
        band: Å of the finest data that took part.
        resolution: Å, of the half maps at 0.143.
        frequency: (S,) 1/Å; fsc: (S,) between the half maps.
        turned, moved: median change of the poses, degrees and Å.
        slices: central slices of the average by the names of their axes, as `plots.central_slices` gives them.
    """

    kind: str
    band: float
    resolution: float
    frequency: Array
    fsc: Array
    turned: float
    moved: float
    slices: Mapping[str, NDArray[np.floating]] = field(repr=False)


@dataclass(frozen=True)
class RunPage:
    """All that a page shows.

    Attributes:
        title: the headline.
        facts: what else is to be said of the run, by name: inputs, options, numbers.
        pixel_size: Å, of the slices.
        iterations: in their order, one at least.
        rotation: (N, 3, 3) of the poses at the end, particle to specimen.
        last_shift, shift: (N, 3) Å, by which each particle moved in the last iteration, and since the start.
        score: (N,) at the end, NaN where there is none.
        half: (N,) 1 or 2.
        series: (N,) name of each particle's tilt series.
        reason: (N,) why a particle is not used; None for those that are.
    """

    title: str
    facts: Mapping[str, str]
    pixel_size: float
    iterations: Sequence[Iteration]
    rotation: Array
    last_shift: Array
    shift: Array
    score: Array
    half: NDArray[np.int64]
    series: Sequence[str]
    reason: Sequence[str | None]

    @property
    def use(self) -> NDArray[np.bool_]:
        """(N,) the particles that are used."""
        return np.array([why is None for why in self.reason], dtype=bool)

    @property
    def has_scores(self) -> bool:
        """Whether any particle has one."""
        return bool(np.isfinite(self.score).any())


def write_page(path: str | PathLike[str], page: RunPage) -> None:
    """Write the page, its pictures within it, whole or not at all.

    Args:
        path: the .html file.
        page: see there.
    """
    pictures: list[tuple[str, str, Callable[[Path, RunPage], None]]] = [
        ("Fourier shell correlation of the half maps", "The last iteration in black.", fsc_plot),
        ("Central slices of the average", "One column for each iteration, its resolution above.", slices_plot),
    ]
    if page.use.any():
        pictures += [
            ("Angular distribution", "From where the used particles are seen.", views_plot),
            ("Shifts", "How far the used particles moved. The dashed line is the median.", shifts_plot),
        ]
    if page.has_scores:
        pictures.append(
            ("Scores", "Of the used particles of each tilt series and half; crosses are rejected ones.", scores_plot)
        )
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (headline, caption, draw) in enumerate(pictures):
            picture = Path(folder) / f"{number}.png"
            draw(picture, page)
            data = base64.b64encode(picture.read_bytes()).decode()
            figures.append(section(headline, illustration(f"data:image/png;base64,{data}", headline, caption)))
    parts = [_summary(page), _iterations_table(page), *figures, _rejected_table(page)]
    write_bytes(path, document(page.title, parts).encode())


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;font-weight:600;border-bottom:2px solid #2166ac;padding-bottom:.3rem}
h2{font-size:1.1rem;font-weight:600;margin:2.2rem 0 .5rem}
table{border-collapse:collapse}
th{text-align:left;font-weight:500;color:#555;border-bottom:1px solid #bbb;padding:.25rem 1.2rem .25rem 0}
td{border-bottom:1px solid #e6e6e6;padding:.25rem 1.2rem .25rem 0;font-variant-numeric:tabular-nums}
tr.strong td{font-weight:600}
figure{margin:0} img{max-width:100%;height:auto} figcaption{color:#555;font-size:.9rem}
.first{font-size:2rem;font-weight:600;margin:.2rem 0}
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A page of HTML, its style within it.

    Args:
        title: text, the headline too.
        parts: markup, one below the other.
    """
    name = escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def section(headline: str, body: str) -> str:
    """A part of a page: its headline is text, its body markup."""
    return f"<section><h2>{escape(headline)}</h2>{body}</section>"


def illustration(source: str, name: str, caption: str) -> str:
    """A picture with its caption: a URL, and two texts."""
    return (
        f'<figure><img alt="{escape(name)}" src="{escape(source)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Container[int] = ()) -> str:
    """A table whose cells are text.

    Args:
        head: names of the columns.
        rows: a cell for each column.
        strong: places of the rows, from 0, that stand out.
    """
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for place, row in enumerate(rows):
        mark = ' class="strong"' if place in strong else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _summary(page: RunPage) -> str:
    """The resolution, how many particles, and the facts."""
    used = int(page.use.sum())
    count = f"{used} of {len(page.reason)} particles" if used < len(page.reason) else f"{used} particles"
    halves = ", ".join(f"{int(((page.half == h) & page.use).sum())} in half {h}" for h in (1, 2))
    rows = [("particles", f"{count}; {halves}"), ("tilt series", str(len(set(page.series)))), *page.facts.items()]
    resolution = page.iterations[-1].resolution
    return f'<p class="first">{resolution:.2f} Å</p>' + table(("at FSC 0.143", ""), rows)


def _iterations_table(page: RunPage) -> str:
    """A row for each iteration."""
    head = ("iteration", "search", "data to, Å", "resolution, Å", "turned by, ° (median)", "moved by, Å (median)")
    rows = [
        (str(k), i.kind, f"{i.band:.1f}", f"{i.resolution:.2f}", f"{i.turned:.2f}", f"{i.moved:.2f}")
        for k, i in enumerate(page.iterations, start=1)
    ]
    return section("Iterations", table(head, rows, {len(rows) - 1}))


def _rejected_table(page: RunPage) -> str:
    """How many particles of each tilt series are left out for which reason."""
    found = Counter((why, name) for why, name in zip(page.reason, page.series, strict=True) if why is not None)
    if not found:
        return section("Rejected particles", "<p>None.</p>")
    rows = []
    for why, count in Counter(why for why in page.reason if why is not None).most_common():
        where = ", ".join(f"{name} {n}" for (other, name), n in found.items() if other == why)
        rows.append((why, str(count), where))
    return section("Rejected particles", table(("reason", "particles", "of"), rows))


def _some(count: int, most: int) -> list[int]:
    """Numbers 0 to count - 1, or `most` of them, evenly, with the first and the last."""
    return list(range(count)) if count <= most else np.linspace(0, count - 1, most).round().astype(int).tolist()


def fsc_plot(path: str | PathLike[str], page: RunPage) -> None:
    """Draw the FSC between the half maps of every iteration, the last one strong, over frequency and resolution."""
    count = len(page.iterations)
    figure = Figure(figsize=(8.0, 4.8))
    axes = figure.add_subplot()
    named = set(_some(count, MOST_CURVES))
    colours = matplotlib.colormaps[COURSE]
    for k, one in enumerate(page.iterations):
        label = f"{k + 1} {one.kind}, {one.resolution:.1f} Å" if k in named else None
        last = k == count - 1
        colour = BLACK if last else colours(PALEST + (0.95 - PALEST) * k / max(count - 2, 1))
        axes.plot(one.frequency, one.fsc, color=colour, linewidth=2.4 if last else 1.1, label=label, zorder=2 + k)
    highest = float(max(np.max(i.frequency) for i in page.iterations))
    lowest = float(min(np.min(i.fsc) for i in page.iterations))
    axes.axhline(GOLD_STANDARD, color=GREY, linestyle="--", linewidth=0.8, zorder=1)
    axes.annotate(
        f"{GOLD_STANDARD}", (highest, GOLD_STANDARD), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7
    )
    axes.axhline(0.0, color=BLACK, linewidth=0.6)
    axes.axvline(1 / page.iterations[-1].resolution, color=RED, linewidth=1.0, linestyle=":")
    axes.set(xlim=(0.0, highest), ylim=(max(-1.05, min(-0.1, lowest - 0.05)), 1.05))
    axes.set(xlabel="spatial frequency (1/Å)", ylabel="Fourier shell correlation")
    angstrom_axis(axes, highest)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    save(figure, path)


def slices_plot(path: str | PathLike[str], page: RunPage) -> None:
    """Draw the central slices of each iteration in a column; grey levels are each column's own."""
    chosen = _some(len(page.iterations), MOST_COLUMNS)
    names = list(page.iterations[0].slices)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(PANEL * len(chosen) + 0.3, PANEL * len(names) + 0.4), layout=layout)
    panels = figure.subplots(len(names), len(chosen), squeeze=False)
    for column, k in zip(panels.T, chosen, strict=True):
        one = page.iterations[k]
        low, high = np.percentile(np.concatenate([image.ravel() for image in one.slices.values()]), CONTRAST)
        for axes, name in zip(column, names, strict=True):
            axes.imshow(one.slices[name], cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        column[0].set_title(f"{k + 1}: {one.resolution:.1f} Å", fontsize=9)
    for axes, name in zip(panels[:, 0], names, strict=True):
        axes.set_ylabel(name, rotation=0, labelpad=9, va="center")
    scale_bar(panels[0, 0], page.iterations[0].slices[names[0]].shape[1], page.pixel_size)
    save(figure, path)


def views_plot(path: str | PathLike[str], page: RunPage) -> None:
    """Draw from where the used particles are seen.

    The view is that of the specimen's +z axis, from the particle's frame: the third row of R, at longitude rot and angle
    tilt from +z (convention 9).
    """
    view = page.rotation[page.use][:, 2]
    angles = np.rad2deg(np.arctan2(view[:, 1], view[:, 0])), np.rad2deg(np.arccos(np.clip(view[:, 2], -1, 1)))
    angular_distribution_plot(path, *angles)


def shifts_plot(path: str | PathLike[str], page: RunPage) -> None:
    """Draw histograms of how far the used particles moved, in the last iteration and since the start."""
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    lengths = [np.linalg.norm(shift[page.use], axis=1) for shift in (page.last_shift, page.shift)]
    for axes, length, what in zip(
        figure.subplots(1, 2), lengths, ("in the last iteration", "since the start"), strict=True
    ):
        end = max(float(np.percentile(length, FARTHEST)), 1e-3)
        axes.hist(np.minimum(length, end), bins=BINS, range=(0.0, end), color=BLUE)
        middle = float(np.median(length))
        axes.axvline(middle, color=RED, linestyle="--", linewidth=1.2)
        axes.set_title(f"{what}: median {middle:.2f} Å, farthest {float(length.max()):.1f} Å", fontsize=9)
        axes.set(xlabel="shift (Å)", ylabel="particles", xlim=(0.0, end))
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def scores_plot(path: str | PathLike[str], page: RunPage) -> None:
    """Draw the scores of each tilt series and half as boxes (quartiles and median), those of rejected particles as crosses."""
    names = sorted(set(page.series))
    place = np.array([names.index(name) for name in page.series])
    known = np.isfinite(page.score)
    figure = Figure(figsize=(min(max(LEAST_WIDE, 2.0 + PER_SERIES * len(names)), MOST_WIDE), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for half, colour in HALVES.items():
        for k in range(len(names)):
            values = page.score[known & page.use & (page.half == half) & (place == k)]
            if len(values):
                axes.boxplot(
                    [values], positions=[k + 0.18 * (2 * half - 3)], widths=0.28, patch_artist=True, manage_ticks=False,
                    boxprops={"facecolor": colour, "alpha": 0.55, "edgecolor": colour}, medianprops={"color": BLACK},
                    whiskerprops={"color": colour}, capprops={"color": colour},
                    flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour},
                )  # fmt: skip
    out = known & ~page.use
    axes.plot(place[out] + 0.18 * (2 * page.half[out] - 3), page.score[out], "x", color=RED, markersize=4)
    step = math.ceil(len(names) / MOST_NAMES)
    upright = len(names) > 8
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if upright else 0, fontsize=7)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylabel="score")
    axes.spines[["top", "right"]].set_visible(False)
    marks = [Line2D([], [], color=c, linewidth=6, alpha=0.55, label=f"half {h}") for h, c in HALVES.items()]
    if out.any():
        marks.append(Line2D([], [], color=RED, marker="x", linestyle="", markersize=4, label="rejected"))
    axes.legend(handles=marks, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)
