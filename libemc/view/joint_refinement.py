"""Pictures and page of a refinement by particle and tilt, and of a tilt series refined from its particles.

Each function takes plain arrays and a path, draws with matplotlib's Agg, and writes the file whole. N particles, T tilts,
in any order; what is not known, or not used, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from libemc.replacement import write_bytes
from libemc.view.alignment import BLACK, BLUE, GREY, RED, exaggeration
from libemc.view.plots import save
from libemc.view.refinement import document, illustration, section, table

Array = NDArray[np.float64]

EXPOSURES = matplotlib.colormaps["cool"]
"""Colours of a track from the first exposure to the last: no greys, and none as dark as protein."""
TRACK_SHARE, LONGEST_TRACK = 0.8, 0.12
"""How long a long track is drawn: of the distance between neighbours, and of the shorter side of the image at most."""
LONG = 95.0
"""Percentile of the tracks that is a long one."""
MOST_TRACKS = 150
"""Tracks in a picture: of more particles, some evenly among them."""
IMAGE_CONTRAST = (0.3, 99.7)
"""Percentiles of a tilt image that are drawn black and white."""
BAR_SHARE = 0.2  # of the image, along x: the scale bar
WIDE = 7.0  # inches of the tracks' picture
SCORE_CONTRAST = (1.0, 99.0)
"""Percentiles of the scores that end the colours."""
LEFT_OUT = "#c8c8c8"
MOST_TICKS = 9
"""Tilts that are named under an image of particles and tilts."""
HEADROOM = 1.25  # above curves, for their legend
QUARTILES = (25.0, 50.0, 75.0)
AXES = {"x": BLUE, "y": RED, "z": "#1b7837"}
PANELS: Mapping[str, Mapping[str, str]] = {
    "shift (Å)": {"shift_x": "x", "shift_y": "y"},
    "tilt axis (°)": {"axis": ""},
    "tilt (°)": {"tilt": ""},
    "off-axis tilt (°)": {"xtilt": ""},
    "magnification (%)": {"magnification": ""},
    "defocus (Å)": {"defocus": ""},
}
"""Panels of the changes of a geometry: in each the changes that share it, and their names there."""
UNKNOWN = "–"


@dataclass(frozen=True)
class Tracks:
    """How particles moved while they were exposed.

    Attributes:
        position: (N, 2) Å along x and y from the centre of the image they are drawn on.
        path: (N, T, 2) Å along x and y, of each particle from that position; NaN where it is not known.
        order: (T,) place of each tilt in the order of exposure.
    """

    position: Array
    path: Array = field(repr=False)
    order: NDArray[np.int64]


@dataclass(frozen=True)
class Iteration:
    """One iteration.

    Attributes:
        band: Å of the finest data that took part.
        resolution: Å, of the half maps at 0.143.
        moved: Å, median change of the images' shifts.
    """

    band: float
    resolution: float
    moved: float


@dataclass(frozen=True)
class Level:
    """What cross-validation tried: one more group of parameters, or one strength of it.

    Attributes:
        name: of the parameters.
        strength: of their prior.
        gain: in log-likelihood of the images that were held out.
        error: standard error of the gain.
        kept: whether the refinement goes on with it.
        unit: of the strength.
    """

    name: str
    strength: float
    gain: float
    error: float
    kept: bool
    unit: str = ""


@dataclass(frozen=True)
class Series:
    """A tilt series.

    Attributes:
        particles: that were used.
        images: of these particles, left-out ones too.
        left_out: images without weight.
        before, after: Å, rms displacement of the images from their predictions.
    """

    name: str
    particles: int
    images: int
    left_out: int
    before: float
    after: float


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the page.

    Attributes:
        file: its name, relative to the page.
        headline: above it.
        caption: below it.
    """

    file: str
    headline: str
    caption: str


@dataclass(frozen=True)
class JointPage:
    """All that a page shows.

    Attributes:
        title: the headline.
        options: of the program, by name.
        iterations: in their order.
        levels: in the order in which they were tried; none where nothing was.
        series: the tilt series.
        pictures: in the order of the page.
    """

    title: str
    options: Mapping[str, str]
    iterations: Sequence[Iteration]
    levels: Sequence[Level]
    series: Sequence[Series]
    pictures: Sequence[Picture]


def tracks_plot(
    path: str | PathLike[str], image: NDArray[np.floating], pixel_size: float, tracks: Tracks, title: str = ""
) -> None:
    """Draw on a tilt image how its particles moved, each track coloured along the exposure and enlarged by a round factor.

    Args:
        path: the picture.
        image: (y, x), protein dark, binned as it shall be seen.
        pixel_size: Å, of this image.
        tracks: see there.
        title: the headline; how many particles, and the factor, are added.
    """
    rows, columns = image.shape
    wide, high = columns * pixel_size, rows * pixel_size
    left, low = (-(n // 2 + 0.5) * pixel_size for n in (columns, rows))
    chosen = np.nonzero(_known(tracks.path).any(axis=1) & _known(tracks.position))[0]
    count = len(chosen)
    if count > MOST_TRACKS:
        chosen = chosen[np.linspace(0, count - 1, MOST_TRACKS).round().astype(int)]
    sequence = np.argsort(tracks.order, kind="stable")
    position, moved = tracks.position[chosen], tracks.path[chosen][:, sequence]
    factor = _enlargement(moved, math.sqrt(wide * high / max(len(chosen), 1)), min(wide, high))
    figure = Figure(figsize=(WIDE, WIDE * min(max(high / wide, 0.4), 2.0)), layout="constrained")
    axes = figure.add_subplot()
    black, white = np.percentile(image[np.isfinite(image)], IMAGE_CONTRAST)
    extent = (left, left + wide, low, low + high)
    axes.imshow(image, cmap="gray", vmin=black, vmax=white, origin="lower", extent=extent)
    scale = Normalize(1, max(len(sequence), 2))
    _draw_tracks(axes, position, factor * moved, scale)
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    bar = figure.colorbar(ScalarMappable(scale, EXPOSURES), ax=axes, label="exposure", shrink=0.8, pad=0.02)
    bar.set_ticks(np.unique(np.linspace(1, max(len(sequence), 2), 6).round()).tolist())
    _draw_bar(axes, factor)
    shown = f"{count} particles" if len(chosen) == count else f"{len(chosen)} of {count} particles"
    axes.set_title(_joined(title, f"tracks of {shown}, {factor:g} times enlarged"), fontsize=10)
    save(figure, path)


def _known(vectors: Array) -> NDArray[np.bool_]:
    """(...) of vectors (..., 2 or 3): those that have no NaN."""
    return np.asarray(np.isfinite(vectors).all(axis=-1), dtype=bool)


def _enlargement(moved: Array, apart: float, side: float) -> float:
    """The round factor by which tracks (N, T, 2) Å are drawn where particles are `apart` Å, in an image of `side` Å."""
    reach = np.array([np.hypot(*track[_known(track)].T).max() for track in moved])
    longest = float(np.percentile(reach, LONG)) if len(reach) else 0.0
    return exaggeration(min(TRACK_SHARE * apart, LONGEST_TRACK * side) / longest) if longest > 0 else 1.0


def _draw_tracks(axes: Axes, position: Array, moved: Array, scale: Normalize) -> None:
    """Lines from (N, 2) along (N, T, 2), both in Å of the image, in the order of exposure, with a dark rim."""
    lines, steps, middles = [], [np.zeros((0, 2, 2))], [np.zeros(0)]
    for place, track in zip(position, moved, strict=True):
        known = np.nonzero(_known(track))[0]
        points = place + track[known]
        lines.append(points)
        steps.append(np.stack((points[:-1], points[1:]), axis=1))
        middles.append((known[:-1] + known[1:]) / 2 + 1)
    rim = LineCollection(lines, colors=BLACK, linewidths=2.6, alpha=0.75, capstyle="round")
    coloured = LineCollection(list(np.concatenate(steps)), cmap=EXPOSURES, norm=scale, linewidths=1.4, capstyle="round")
    coloured.set_array(np.concatenate(middles))
    for lines_of_all in (rim, coloured):
        axes.add_collection(lines_of_all, autolim=False)


def _draw_bar(axes: Axes, factor: float) -> None:
    """Below the image: a length, and what it is of tracks that are drawn `factor` times enlarged."""
    left, right = axes.get_xlim()
    length = exaggeration(BAR_SHARE * (right - left))
    below = axes.get_xaxis_transform()
    end = left + length
    axes.plot([left, end], [-0.03] * 2, color=BLACK, linewidth=3, solid_capstyle="butt", transform=below, clip_on=False)
    words = f"  {length:g} Å of the image, {length / factor:g} Å of the tracks"
    axes.text(end, -0.03, words, fontsize=8, va="center", transform=below)


def _joined(title: str, rest: str) -> str:
    return f"{title}: {rest}" if title else rest


def residual_plot(path: str | PathLike[str], tilt: Array, before: Array, after: Array, title: str = "") -> None:
    """Draw how far the particles lie from their predictions in each tilt, before and after.

    Args:
        path: the picture.
        tilt: (T,) degrees.
        before, after: (T,) Å, rms over particles; NaN for tilts that are not used, which are dotted.
        title: the headline.
    """
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(tilt, kind="stable")
    highest = 0.0
    for values, colour, name in ((before, GREY, "before"), (after, BLUE, "after")):
        known = order[np.isfinite(values[order])]
        if len(known):
            rms = math.sqrt(float(np.mean(values[known] ** 2)))
            highest = max(highest, float(values[known].max()))
            axes.plot(
                tilt[known],
                values[known],
                "o-",
                color=colour,
                markersize=4,
                linewidth=1.2,
                label=f"{name}, {rms:.2f} Å",
            )
    _tilt_axis(axes, tilt, np.isfinite(before) | np.isfinite(after))
    axes.set(ylabel="rms displacement (Å)", ylim=(0.0, HEADROOM * highest or 1.0))
    axes.set_title(title, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, title="rms of all tilts", title_fontsize=8, ncols=2, loc="upper center")
    else:
        axes.text(0.5, 0.5, "no residuals known", transform=axes.transAxes, ha="center", color=GREY)
    save(figure, path)


def _tilt_axis(axes: Axes, tilt: Array, use: NDArray[np.bool_]) -> None:
    """Tilts along x; the unused ones are dotted."""
    for angle in tilt[~use]:
        axes.axvline(angle, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("tilt (°)")
    axes.spines[["top", "right"]].set_visible(False)


def geometry_plot(
    path: str | PathLike[str], tilt: Array, changes: Mapping[str, tuple[Array, Array | None]], title: str = ""
) -> None:
    """Draw by how much the geometry and the CTF of each tilt changed, a panel for each kind that is given.

    Args:
        path: the picture.
        tilt: (T,) degrees.
        changes: (T,) and its standard error (T,), or None, by name: `shift_x` and `shift_y` (Å), `axis`, `tilt` and `xtilt`
            (degrees), `magnification` (%), `defocus` (Å); NaN where a tilt is not used.
        title: the headline.

    Raises:
        ValueError: nothing is given, or something that has no panel.
    """
    panels = {label: [n for n in names if n in changes] for label, names in PANELS.items()}
    panels = {label: names for label, names in panels.items() if names}
    strange = set(changes) - {name for names in PANELS.values() for name in names}
    if strange or not panels:
        raise ValueError(f"no panel for {sorted(strange)}" if strange else "no change to draw")
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(3.5 * columns, 5.0), 2.5 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, names) in zip(grid, panels.items(), strict=False):
        _changes(axes, tilt, {PANELS[label][name]: changes[name] for name in names})
        axes.set_ylabel(label)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _changes(axes: Axes, tilt: Array, drawn: Mapping[str, tuple[Array, Array | None]]) -> None:
    """The changes that share a panel, with their errors and their rms."""
    order = np.argsort(tilt, kind="stable")
    used = np.zeros(len(tilt), dtype=bool)
    for (name, (value, error)), colour in zip(drawn.items(), (BLUE, RED), strict=False):
        known = order[np.isfinite(value[order])]
        used[known] = True
        if not len(known):
            continue
        size = math.sqrt(float(np.mean(value[known] ** 2)))
        label = f"{name + ', ' if name else ''}rms {size:.3g}"
        axes.plot(tilt[known], value[known], "o-", color=colour, markersize=3, linewidth=1, label=label)
        if error is not None:
            bars = np.where(np.isfinite(error), error, 0.0)[known]
            axes.errorbar(tilt[known], value[known], bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)
    axes.axhline(0, color=BLACK, linewidth=0.5, zorder=0)
    _tilt_axis(axes, tilt, used)
    low, high = axes.get_ylim()
    if high - low < 1e-6:  # a constant is a line, not its rounding
        axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    if used.any():
        axes.legend(
            frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0.0
        )
    else:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)


def subtilt_plot(path: str | PathLike[str], tilt: Array, score: Array, weight: Array, use: NDArray[np.bool_]) -> None:
    """Draw scores and weights of all images, particles upward and tilts along x, and below what comes of it in each tilt.

    Args:
        path: the picture.
        tilt: (T,) degrees.
        score: (N, T) normalised; NaN where there is no image, which is left white.
        weight: (N, T), 0 or more.
        use: (N, T) whether an image is used; those that are there and aren't are grey.
    """
    order = np.argsort(tilt, kind="stable")
    angles, score, weight, use = tilt[order], score[:, order], weight[:, order], use[:, order]
    count, tilts = score.shape
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    (top, bottom) = figure.subplots(2, 2, sharex=True, height_ratios=(2.2, 1.0))
    there = np.isfinite(score)
    use = use & there
    known = np.where(use, score, np.nan)
    low, high = np.percentile(known[np.isfinite(known)], SCORE_CONTRAST) if np.isfinite(known).any() else (0.0, 1.0)
    largest = max(float(np.max(weight, where=use & np.isfinite(weight), initial=0.0)), 1e-6)
    ranges = {"score": (known, low, high), "weight": (np.where(use, weight, np.nan), 0.0, largest)}
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=LEFT_OUT)
    for axes, (name, (values, least, most)) in zip(top, ranges.items(), strict=True):
        drawn = axes.imshow(
            np.ma.masked_invalid(values), cmap=colours, vmin=least, vmax=most, origin="lower", aspect="auto",
            extent=(-0.5, tilts - 0.5, 0.5, count + 0.5),
        )  # fmt: skip
        nothing = np.ma.masked_where(there, np.zeros(score.shape))
        axes.imshow(nothing, cmap=ListedColormap(["white"]), origin="lower", aspect="auto", extent=drawn.get_extent())
        axes.set_title(f"{name}; grey: left out", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(drawn, ax=axes, pad=0.02)
    top[0].set_ylabel("particle")
    place = np.arange(tilts)
    _quartiles(bottom[0], place, known, BLUE)
    bottom[0].set(ylabel="score", title="median and quartiles of the used images")
    share = 100 * (1 - use.sum(axis=0) / np.maximum(there.sum(axis=0), 1)) * there.any(axis=0)
    bottom[1].bar(place, share, width=0.8, color=GREY)
    bottom[1].set(ylabel="left out (%)", ylim=(0.0, max(1.1 * float(share.max(initial=0.0)), 5.0)))
    bottom[1].set_title(f"{int((there & ~use).sum())} of {int(there.sum())} images left out")
    named = np.unique(np.linspace(0, tilts - 1, min(tilts, MOST_TICKS)).round().astype(int))
    for axes in bottom:
        axes.title.set_fontsize(9)
        axes.set_xticks(named, [f"{angle:.0f}" for angle in angles[named]])
        axes.set(xlim=(-0.5, tilts - 0.5), xlabel="tilt (°)")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _quartiles(axes: Axes, along: Array | NDArray[np.int64], values: Array, colour: str) -> None:
    """The median of values (N, K) at K places, and between which half of them lies; places without any are left out."""
    known = np.nonzero(np.isfinite(values).any(axis=0))[0]
    if not len(known):
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)
        return
    low, middle, high = np.nanpercentile(values[:, known], QUARTILES, axis=0)
    axes.fill_between(along[known], low, high, color=colour, alpha=0.2, linewidth=0, label="quartiles")
    axes.plot(along[known], middle, "o-", color=colour, markersize=3, linewidth=1.2, label="median particle")


def displacement_plot(path: str | PathLike[str], dose: Array, displacement: Array, title: str = "") -> None:
    """Draw how far the particles are displaced along the exposure: each one's rms over the axes, and all of them by axis.

    Args:
        path: the picture.
        dose: (T,) e/Å² that the specimen had received.
        displacement: (N, T, 2 or 3) Å along x, y (and z); NaN where it is not known.
        title: the headline.
    """
    order = np.argsort(dose, kind="stable")
    along, squared = dose[order], displacement[:, order] ** 2
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    _quartiles(axes, along, np.sqrt(squared.mean(axis=2)), BLACK)
    for (name, colour), values in zip(AXES.items(), np.moveaxis(squared, 2, 0), strict=False):
        known = np.nonzero(np.isfinite(values).any(axis=0))[0]
        rms = np.sqrt(np.nanmean(values[:, known], axis=0))
        axes.plot(along[known], rms, "--", color=colour, linewidth=1.0, label=f"rms along {name}")
    axes.set(xlabel="dose (e/Å²)", ylabel="displacement per axis (Å)")
    axes.set_ylim(0.0, max(HEADROOM * axes.get_ylim()[1], 1e-3))
    axes.set_title(_joined(title, f"{int(_known(displacement).any(axis=1).sum())} particles"), fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def write_page(path: str | PathLike[str], page: JointPage) -> None:
    """Write the page, whole or not at all. Its pictures stay the files that they are.

    Args:
        path: the .html file, in the folder that the pictures' names are relative to.
        page: see there.
    """
    parts = [_summary(page)]
    if page.iterations:
        parts.append(section("Iterations", _iterations(page.iterations)))
    if page.levels:
        parts.append(section("Cross-validation", _levels(page.levels)))
    if page.series:
        parts.append(section("Tilt series", _series(page.series)))
    parts += [section(p.headline, illustration(quote(p.file), p.headline, p.caption)) for p in page.pictures]
    write_bytes(path, document(page.title, parts).encode())


def _number(value: float, form: str) -> str:
    """In that form, where there is one."""
    return format(value, form) if math.isfinite(value) else UNKNOWN


def _summary(page: JointPage) -> str:
    """The resolution, how much data, and the options."""
    images, left = sum(s.images for s in page.series), sum(s.left_out for s in page.series)
    particles = f"{sum(s.particles for s in page.series)} of {len(page.series)} tilt series"
    rows = [("particles", particles), ("images", f"{images}, {left} left out"), *page.options.items()]
    first = f'<p class="first">{_number(page.iterations[-1].resolution, ".2f")} Å</p>' if page.iterations else ""
    return first + table(("at FSC 0.143" if first else "", ""), rows)


def _iterations(iterations: Sequence[Iteration]) -> str:
    """A row for each iteration."""
    head = ("iteration", "data to, Å", "resolution, Å", "shifts moved by, Å (median)")
    rows = [
        (str(k), _number(i.band, ".1f"), _number(i.resolution, ".2f"), _number(i.moved, ".2f"))
        for k, i in enumerate(iterations, start=1)
    ]
    return table(head, rows, {len(rows) - 1})


def _levels(levels: Sequence[Level]) -> str:
    """A row for each level that was tried."""
    head = ("level", "strength", "gain in log-likelihood, held-out images", "standard error", "")
    rows = [
        (
            one.name,
            f"{_number(one.strength, 'g')} {one.unit}".strip(),
            _number(one.gain, "+.1f"),
            _number(one.error, ".1f"),
            "kept" if one.kept else "not kept",
        )
        for one in levels
    ]
    return table(head, rows, {k for k, one in enumerate(levels) if one.kept})


def _series(series: Sequence[Series]) -> str:
    """A row for each tilt series."""
    head = ("tilt series", "particles", "images", "left out", "residual before, Å (rms)", "after, Å")
    rows = [
        (s.name, str(s.particles), str(s.images), str(s.left_out), _number(s.before, ".2f"), _number(s.after, ".2f"))
        for s in series
    ]
    return table(head, rows)
