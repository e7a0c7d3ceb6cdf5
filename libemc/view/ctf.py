"""Pictures of a CTF estimate: the rings of every tilt and what was fitted to them, and everything against the tilt.

Each function takes a record with its CTF and plain arrays, draws with matplotlib's Agg, and writes the picture whole. T
tilts, S sectors of the half circle, K frequencies. What is grey was not measured: its defocus is the series'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from libemc.numerics.ctf import Optics, equal_phase, wavelength
from libemc.records import Ctf, TiltSeriesRecord, need
from libemc.view.alignment import BLACK, BLUE, GREY, RED
from libemc.view.plots import DPI, NICE, save

Array = NDArray[np.float64]

COLUMNS = 8  # of panels at most: with more tilts the page grows
WIDE, TALL, HEADLINE = 1.9, 1.5, 0.55  # inches of a panel of rings and of the page's headline
BEYOND = 1.25  # times the highest frequency at which rings are seen: what is drawn
LEAST_TICKS = 0.14  # of the axis between two ticks
LEAST_STEPS, STEPS_PER_RING = 80, 10  # of k²
PIXELS, GAP, ABOVE = 200, 8, 24  # of a spectrum's side, between two, and above each
FAINTEST = 2.0  # median errors: fainter rings aren't enlarged further
ROWS = 240  # of the picture of scores at most: of those that share one the best counts
MICROMETRE = 1e4  # Å


class _Lens:
    """The CTF of a record's tilts as arrays, and which of them are drawn, by their angle."""

    def __init__(self, record: TiltSeriesRecord) -> None:
        self.ctf: Ctf = need(record, "ctf")
        count = len(self.ctf.angle)
        self.tilt, self.use = np.array(record.tilts.nominal), np.array(record.tilts.use)
        self.order = [int(j) for j in np.argsort(self.tilt, kind="stable") if self.use[j]]
        if not self.order:
            raise ValueError("no tilt is used")
        self.u, self.v, self.angle = (np.array(x) for x in (self.ctf.defocus_u, self.ctf.defocus_v, self.ctf.angle))
        self.mean = (self.u + self.v) / 2
        self.measured = np.array(self.ctf.measured or (True,) * count) & self.use
        self.error, self.resolution = (_values(x, count) for x in (self.ctf.error, self.ctf.resolution))
        source = record.source
        self.optics = Optics(source.voltage, source.cs, source.amplitude_contrast)

    def along(self, j: int, angle: Array) -> Array:
        """Å: the defocus of tilt j in directions of the image, degrees."""
        half = (self.u[j] - self.v[j]) / 2
        return np.asarray(self.mean[j] + half * np.cos(2 * np.deg2rad(angle - self.angle[j])))

    def highest(self, k: Array) -> float:
        """1/Å: to where rings are drawn."""
        seen = self.resolution[self.measured & np.isfinite(self.resolution)]
        return min(float(k[-1]), BEYOND / float(seen.min())) if len(seen) else float(k[-1])

    def ink(self, j: int) -> str:
        """In which tilt j's title is written."""
        return BLACK if self.measured[j] else GREY

    def title(self, j: int) -> str:
        """Tilt, defocus and resolution."""
        error = f" ± {self.error[j] / MICROMETRE:.3f}" if np.isfinite(self.error[j]) else ""
        seen = f", {self.resolution[j]:.1f} Å" if np.isfinite(self.resolution[j]) else ""
        return f"{self.tilt[j]:.0f}°: {self.mean[j] / MICROMETRE:.3f}{error} µm{seen}"


def _values(values: Sequence[float | None] | None, count: int) -> Array:
    return np.array([np.nan if v is None else v for v in values or [None] * count], float)


def _page(count: int) -> tuple[int, int, float]:
    """Columns and rows of so many panels, and how much larger than usual each is: a few fill a page, too."""
    columns = max(1, min(COLUMNS, math.ceil(math.sqrt(count))))
    return columns, math.ceil(count / columns), float(np.clip(4 / columns, 1, 2))


def _contrast(fitted: Array, error: Array | None = None) -> float:
    """How far rings reach from 1, and at least the noise."""
    known = np.abs(fitted[np.isfinite(fitted)] - 1)
    reach = float(np.percentile(known, 98)) if len(known) else 0.0
    noise = error[np.isfinite(error)] if error is not None else np.zeros(0)
    return max(reach, FAINTEST * float(np.median(noise)) if len(noise) else 0.0, 1e-3)


def ring_plots(
    record: TiltSeriesRecord,
    path: str | PathLike[str],
    k: ArrayLike,
    angle: ArrayLike,
    measured: ArrayLike,
    fitted: ArrayLike,
    error: ArrayLike,
) -> None:
    """Draw the rings of every used tilt, averaged over directions at equal phase, and the fit, against k² (labelled in Å).

    Args:
        record: for the tilts and their CTF.
        path: the picture.
        k: (K,) 1/Å, rising; angle: (S,) degrees from +x, counter-clockwise, of the sectors' middles.
        measured, fitted, error: (T, S, K) power over the background, about 1, and its standard error; NaN where nothing.
    """
    lens = _Lens(record)
    frequency, sectors = np.asarray(k, float), np.asarray(angle, float)
    highest = lens.highest(frequency)
    columns, rows, larger = _page(len(lens.order))
    height = rows * TALL * larger + HEADLINE
    figure = Figure(figsize=(columns * WIDE * larger, height))
    grid = figure.add_gridspec(
        rows,
        columns,
        wspace=0.06,
        hspace=0.42 / larger,
        left=0.01,
        right=0.99,
        top=1 - HEADLINE / height,
        bottom=0.2 / height,
    )
    ticks = _ticks(highest)
    for place, j in enumerate(lens.order):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        parts = np.stack([np.asarray(a)[j] for a in (measured, fitted, error)]).astype(float)
        x, rings, fit, noise = _round(frequency, sectors, parts, highest, lens, j)
        colour = BLUE if lens.measured[j] else GREY
        axes.fill_between(x, rings - noise, rings + noise, color=colour, alpha=0.3, linewidth=0)
        axes.plot(x, rings, color=colour, linewidth=0.7)
        axes.plot(x, fit, color=RED if lens.measured[j] else BLACK, linewidth=0.9)
        if np.isfinite(lens.resolution[j]):
            axes.axvline(lens.resolution[j] ** -2, color=BLACK, linewidth=0.6, linestyle=":")
        reach = 1.5 * _contrast(fit, noise)
        axes.set(xlim=(0, highest**2), ylim=(1 - reach, 1 + reach), yticks=[])
        axes.set_xticks([d**-2 for d in ticks], [f"{d:g}" for d in ticks])
        axes.tick_params(length=2, pad=1, labelsize=6)
        axes.set_title(lens.title(j), fontsize=7, pad=2, color=lens.ink(j))
    title = (
        f"{record.name}: rings (blue) and fit (red) against k², labelled in Å; in grey, the fit has the series' defocus"
    )
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top")
    save(figure, path)


def _round(
    k: Array, sectors: Array, parts: Array, highest: float, lens: _Lens, j: int
) -> tuple[Array, Array, Array, Array]:
    """Tilt j's rings, fit and error (3, S, K) brought to its mean defocus and averaged over directions, weighted by 1/error².

    Averaged over steps of k², too, as fine as the rings need them.

    Returns:
        k², rings, fit and the rings' error: (N,) each.
    """
    fringes = wavelength(lens.optics.voltage) * abs(lens.mean[j]) * highest**2
    steps = max(LEAST_STEPS, math.ceil(STEPS_PER_RING * fringes))
    total = np.zeros((4, len(k)))
    for z, sector in zip(lens.along(j, sectors), parts.swapaxes(0, 1), strict=True):
        where = equal_phase(k, lens.mean[j], z, lens.optics)
        rings, fit, noise = (np.interp(where, k, values, np.nan, np.nan) for values in sector)
        good = np.isfinite(rings) & np.isfinite(fit) & (noise > 0)
        weight = np.divide(1, noise**2, out=np.zeros_like(k), where=good)
        total += [weight * k**2, *(np.where(good, weight * x, 0.0) for x in (rings, fit)), weight]
    step = (k**2 / highest**2 * steps).astype(int)
    x, rings, fit, weight = (np.bincount(step, row)[:steps] for row in total)
    some = weight > 0
    return x[some] / weight[some], rings[some] / weight[some], fit[some] / weight[some], 1 / np.sqrt(weight[some])


def _ticks(highest: float) -> list[float]:
    """Round resolutions, coarse to fine, for an axis of squared frequencies up to highest² (1/Å²)."""
    ticks: list[float] = []
    for value in sorted((n * p for n in NICE for p in (1.0, 10.0, 100.0)), reverse=True):
        before = ticks[-1] ** -2 if ticks else 0.0
        if before + LEAST_TICKS * highest**2 <= value**-2 <= highest**2:
            ticks.append(value)
    return ticks


def spectra_picture(
    record: TiltSeriesRecord,
    path: str | PathLike[str],
    k: ArrayLike,
    angle: ArrayLike,
    measured: ArrayLike,
    fitted: ArrayLike,
) -> None:
    """Draw the spectrum of every used tilt, the left half as measured, the right half as fitted. Arguments as `ring_plots`.

    Between the sectors' middles the rings are bent as the fitted astigmatism says.
    """
    lens = _Lens(record)
    frequency, sectors = np.asarray(k, float), np.asarray(angle, float)
    highest = lens.highest(frequency)
    shown = frequency <= highest
    columns, rows, larger = _page(len(lens.order))
    side = int(PIXELS * larger)
    line = ((np.arange(side) + 0.5) / side * 2 - 1) * highest
    step = side + GAP, side + ABOVE
    canvas = np.ones((rows * step[1] + ABOVE, columns * step[0]))
    figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 121)) * side / 2 / highest
    for place, j in enumerate(lens.order):
        left, top = place % columns * step[0], ABOVE + place // columns * step[1] + ABOVE
        halves = np.stack([np.asarray(measured)[j], np.asarray(fitted)[j]]).astype(float)
        reach = _contrast(halves[1, :, shown], np.abs(halves[0] - halves[1])[:, shown])
        grey = (_cartesian(halves, frequency, sectors, line, lens, j) - 1) / reach / 2 + 0.5
        canvas[top : top + side, left : left + side] = np.nan_to_num(grey, nan=0.5).clip(0, 1)[::-1]
        if np.isfinite(lens.resolution[j]):
            ring = circle / lens.resolution[j]
            axes.plot(left + side / 2 + ring.real, top + side / 2 + ring.imag, ":", color=RED, linewidth=0.8)
        title = f"{lens.tilt[j]:.0f}°, {lens.mean[j] / MICROMETRE:.2f} µm"
        axes.text(left + side / 2, top - 4, title, ha="center", fontsize=7, color=lens.ink(j))
    extent = (0, canvas.shape[1], canvas.shape[0], 0)
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    title = f"{record.name}: left as measured, right as fitted, to {1 / highest:.1f} Å"
    axes.text(canvas.shape[1] / 2, 0.6 * ABOVE, title, ha="center", fontsize=8)
    save(figure, path)


def _cartesian(halves: Array, k: Array, sectors: Array, line: Array, lens: _Lens, j: int) -> Array:
    """Tilt j's spectrum at frequencies `line` by `line`: the first of `halves` (2, S, K) where kx < 0, else the second.

    A direction lies among four sectors, each read at equal phase, blended by cubic B-splines.
    """
    together = max(1, int((line[1] - line[0]) / (k[1] - k[0])))  # frequencies within a pixel
    k, halves = (x[..., : len(k) // together * together] for x in (k, halves))
    k, halves = (x.reshape(*x.shape[:-1], -1, together).mean(axis=-1) for x in (k, halves))
    radius, direction = np.hypot(line, line[:, None]), np.rad2deg(np.arctan2(line[:, None], line[None]))
    half = np.broadcast_to(line >= 0, radius.shape).astype(int)
    place = (direction - sectors[0]) % 180 / (180 / len(sectors))
    here, along = lens.along(j, direction), lens.along(j, sectors)
    total = np.zeros_like(radius)
    for side in (-1, 0, 1, 2):
        s = (place.astype(int) + side) % len(sectors)
        row = np.interp(equal_phase(radius, here, along[s], lens.optics), k, np.arange(len(k)), np.nan, np.nan)
        i = np.clip(np.nan_to_num(row).astype(int), 0, len(k) - 2)
        part = (row - i) * halves[half, s, i + 1] + (1 - (row - i)) * halves[half, s, i]
        away = np.abs(place % 1 - side)
        total += part * np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away) ** 3 / 6)
    return total


def ctf_plots(record: TiltSeriesRecord, path: str | PathLike[str], defocus: ArrayLike, score: ArrayLike) -> None:
    """Draw how well each defocus would fit, and defocus, astigmatism, phase shift, resolution and score against the tilt.

    Filled: measured. Hollow: the series' value. Crosses: tilts that are not used.

    Args:
        record: for the tilts and their CTF.
        path: the picture.
        defocus: (Z,) Å, rising.
        score: (T, Z) log-likelihood of each tilt's mean defocus, its maximum 0.
    """
    lens = _Lens(record)
    ctf, count = lens.ctf, len(lens.tilt)
    astigmatism = lens.u - lens.v
    middle = np.rad2deg(np.angle((astigmatism * np.exp(2j * np.deg2rad(lens.angle)))[lens.use].sum())) / 2
    phased = any(ctf.phase_shift)
    figure = Figure(figsize=(10.0, 10.5), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=(1.5, 1, 1, 1))
    likelihood = figure.add_subplot(grid[0, :])
    rest = [figure.add_subplot(grid[place // 2, place % 2]) for place in range(2, 6)]
    rest += [figure.add_subplot(grid[3, place]) for place in ((0, 1) if phased else (slice(None),))]
    _scores(likelihood, lens, np.asarray(defocus, float), np.asarray(score, float))
    _against_tilt(rest[0], lens, lens.mean / MICROMETRE, lens.error / MICROMETRE, "defocus (µm)")
    wide = ctf.astigmatism_error or math.nan
    _against_tilt(rest[1], lens, astigmatism / MICROMETRE, np.full(count, wide / MICROMETRE), "astigmatism U - V (µm)")
    rest[1].set_ylim(0, 1.15 * float(np.nanmax(astigmatism + np.nan_to_num(wide))) / MICROMETRE or 1.0)
    near = (lens.angle - middle + 90) % 180 - 90 + middle
    _against_tilt(rest[2], lens, near, np.full(count, math.nan), "angle of U from +x (°)")
    _against_tilt(rest[3], lens, lens.resolution, np.full(count, math.nan), "rings seen to (Å)")
    _against_tilt(rest[4], lens, _values(ctf.score, count), np.full(count, math.nan), "correlation of rings and fit")
    rest[4].set_ylim(0, 1.05)
    if phased:
        _against_tilt(rest[5], lens, np.array(ctf.phase_shift), _values(ctf.phase_error, count), "phase shift (°)")
    rest[0].legend(frameon=False, fontsize=7)
    figure.suptitle(_headline(record, lens), fontsize=11)
    save(figure, path)


def _against_tilt(axes: Axes, lens: _Lens, values: Array, error: Array, label: str) -> None:
    for chosen, name, colour, marker, face in (
        (lens.measured, "measured", BLUE, "o", BLUE),
        (lens.use & ~lens.measured, "the series' value", BLUE, "o", "white"),
        (~lens.use, "not used", GREY, "x", GREY),
    ):
        drawn = chosen & np.isfinite(values)
        if drawn.any():
            bars = np.where(np.isfinite(error), error, 0.0)[drawn]
            axes.errorbar(
                lens.tilt[drawn], values[drawn], bars, linestyle="", markersize=3.5, elinewidth=0.8, label=name,
                color=colour, marker=marker, markerfacecolor=face,
            )  # fmt: skip
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xlabel="nominal tilt (°)", ylabel=label, xlim=(lens.tilt.min() - 4, lens.tilt.max() + 4))


def _scores(axes: Axes, lens: _Lens, defocus: Array, score: Array) -> None:
    """The score as standard errors from the best, tilts side by side in the order of their angle; the chosen values on it."""
    away = np.sqrt(np.maximum(-2 * score[lens.order], 0))
    z = defocus / MICROMETRE
    if len(lens.order) == 1:
        axes.plot(z, away[0], color=BLUE, linewidth=0.8)
        axes.axvline(lens.mean[lens.order[0]] / MICROMETRE, color=RED, linewidth=0.8)
        axes.set(xlabel="defocus (µm)", ylabel="standard errors from the best", xlim=(z[0], z[-1]))
        axes.set_ylim(1.05 * float(np.nanmax(away)), 0)
        return
    step = math.ceil(len(z) / ROWS)
    starts = np.arange(0, len(z), step)
    rows = np.minimum.reduceat(away, starts, axis=1)
    edges = np.append(z[starts], 2 * z[-1] - z[-2])
    limit = float(np.nanpercentile(rows, 90)) or 1.0
    mesh = axes.pcolormesh(np.arange(len(rows) + 1) - 0.5, edges, rows.T, cmap="gray_r", vmin=0, vmax=limit)
    for kind, face in ((True, RED), (False, "none")):
        chosen = [(place, lens.mean[j] / MICROMETRE) for place, j in enumerate(lens.order) if lens.measured[j] == kind]
        size = min(3.0, 180 / len(rows))
        axes.plot(*np.array(chosen).reshape(-1, 2).T, "o", color=RED, markerfacecolor=face, markersize=size)
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 13)).round().astype(int))
    axes.set_xticks(places, [f"{lens.tilt[lens.order[p]]:.0f}" for p in places])
    axes.set(xlabel="nominal tilt (°), in order", ylabel="defocus (µm)")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(mesh, ax=axes, label="standard errors from the best", pad=0.01)


def _headline(record: TiltSeriesRecord, lens: _Lens) -> str:
    ctf, known = lens.ctf, lens.measured if lens.measured.any() else lens.use
    of = f"{int(lens.measured.sum())} of " if ctf.measured is not None else ""
    parts = [f"{of}{int(lens.use.sum())} tilts" + (" measured" if of else "")]
    parts.append(f"defocus {np.median(lens.mean[known]) / MICROMETRE:.2f} µm")
    parts.append(f"astigmatism {np.median((lens.u - lens.v)[known]):.0f} Å")
    hand = f"handedness {ctf.defocus_handedness:+d}"
    if ctf.handedness_score is not None:
        hand += f" (score {ctf.handedness_score:.2f})" if ctf.handedness_score > 0 else " (undecided)"
    parts.append(hand)
    if ctf.thickness is not None:
        parts.append(f"thickness {ctf.thickness:.0f} Å")
    return f"{record.name}: " + ", ".join(parts)
