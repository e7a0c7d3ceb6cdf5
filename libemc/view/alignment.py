"""Pictures of an alignment: its parameters against tilt, the landmarks' residuals as arrows, a landmark before and after.

Each function takes a record or plain arrays and a path, draws with matplotlib's Agg, and writes the picture whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from libemc.records import Alignment, TiltSeriesRecord
from libemc.view.plots import save

BLUE, RED, GREY, BLACK = "#2166ac", "#b2182b", "#888888", "black"
PANEL = 1.7  # inches of a small panel
LARGEST_GRID = 48  # panels of arrows at most: more tilts are thinned out evenly
ARROW_SHARE = 0.25  # of the field: how long a large residual is drawn
STRIP = 24  # patches in a strip at most
PATCH_CONTRAST = (1.0, 99.5)  # percentiles of a picture's patches that are black and white


def _values(values: Sequence[float | None] | None, count: int) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in values or [None] * count], float)


def exaggeration(wanted: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) that is nearest below."""
    power = 10.0 ** math.floor(math.log10(max(wanted, 1.0)))
    return max(step * power for step in (1, 2, 5) if step * power <= max(wanted, 1.0))


def alignment_plots(
    record: TiltSeriesRecord, path: str | PathLike[str], alignment: Alignment | None = None, title: str = ""
) -> None:
    """Draw shifts, angles, magnification, residuals and errors against the nominal tilt; unused tilts in grey with their reason.

    Args:
        record: for the nominal angles and which tilts are used.
        path: the picture.
        alignment: to be drawn; None: the record's own.
        title: the headline; empty: the record's name and the alignment's main figures.
    """
    found = alignment or record.alignment
    if found is None:
        raise ValueError("no alignment to draw")
    nominal, use = np.array(record.tilts.nominal), np.array(record.tilts.use)
    count = len(nominal)
    order = np.argsort(nominal, kind="stable")
    figure = Figure(figsize=(10.0, 7.5), layout="constrained")
    (shifts, angles), (axis, scale), (residual, notes) = figure.subplots(3, 2)

    def draw(axes: Axes, values: Sequence[float | None] | NDArray[np.float64] | None, colour: str, label: str) -> None:
        column = np.asarray(values, float) if isinstance(values, np.ndarray) else _values(values, count)
        good = [k for k in order if use[k] and np.isfinite(column[k])]
        bad = [k for k in order if not use[k] and np.isfinite(column[k])]
        if good or bad:
            axes.plot(nominal[good], column[good], "o-", color=colour, markersize=3, linewidth=1, label=label)
            axes.plot(nominal[bad], column[bad], "x", color=GREY, markersize=5)

    draw(shifts, found.shift_x, BLUE, "x")
    draw(shifts, found.shift_y, RED, "y")
    shifts.set_ylabel("shift (Å)")
    draw(angles, np.array(found.tilt) - nominal, BLUE, "tilt - nominal")
    draw(angles, found.xtilt, RED, "off-axis tilt")
    angles.set_ylabel("angle (°)")
    middle = float(np.median(np.array(found.axis)[use] if use.any() else found.axis))
    draw(axis, np.array(found.axis) - middle, BLUE, f"axis - {middle:.2f}°")
    axis.set_ylabel("angle (°)")
    magnification = np.array(found.magnification or (1.0,) * count)
    draw(scale, 100 * (magnification - 1), BLUE, "magnification - 1")
    scale.set_ylabel("magnification - 1 (%)")
    draw(residual, found.residual, BLUE, "residual of the landmarks")
    draw(residual, found.error, RED, "expected error")
    residual.set(ylabel="rms (Å)")
    known = np.concatenate([_values(v, count)[use] for v in (found.residual, found.error)])
    if np.isfinite(known).any():
        residual.set_ylim(0, 1.15 * float(np.nanmax(known)) or 1.0)
    else:
        residual.text(0.5, 0.5, "no residuals known", transform=residual.transAxes, ha="center", color=GREY)
    for axes in (shifts, angles, axis, scale, residual):
        for k in np.nonzero(~use)[0]:
            axes.axvline(nominal[k], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.axhline(0, color=BLACK, linewidth=0.5, zorder=0)
        axes.set_xlabel("nominal tilt (°)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        low, high = axes.get_ylim()
        if axes is not residual and high - low < 0.02:  # a constant is a line, not its rounding
            axes.set_ylim((low + high) / 2 - 0.05, (low + high) / 2 + 0.05)
    _write_notes(notes, record)
    figure.suptitle(title or _headline(record, found), fontsize=11)
    save(figure, path)


def _headline(record: TiltSeriesRecord, alignment: Alignment) -> str:
    use = record.tilts.use
    parts = [f"{sum(use)} of {len(use)} tilts"]
    if alignment.landmarks:
        beads = alignment.landmarks.kind.count("bead")
        parts.append(f"{len(alignment.landmarks.xyz)} landmarks ({beads} beads)")
    if alignment.thickness:
        parts.append(f"thickness {alignment.thickness:.0f} Å")
    if alignment.hand_open:
        parts.append("hand open")
    return f"{record.name}: " + ", ".join(parts)


def _write_notes(axes: Axes, record: TiltSeriesRecord) -> None:
    """The unused tilts with their reasons."""
    axes.set_axis_off()
    t = record.tilts
    reasons = t.reason or (None,) * len(t.use)
    lines = [f"{j + 1:3d}  {t.nominal[j]:6.1f}°  {reasons[j] or ''}" for j in range(len(t.use)) if not t.use[j]]
    shown = lines[:14] + ([f"... and {len(lines) - 14} more"] if len(lines) > 14 else [])
    text = "all tilts are used" if not lines else "not used (grey crosses)\n" + "\n".join(line[:60] for line in shown)
    axes.text(0.02, 0.98, text, va="top", family="monospace", fontsize=7.5, transform=axes.transAxes)


def residual_arrows(
    positions: ArrayLike,
    residuals: ArrayLike,
    use: Sequence[bool],
    field: tuple[float, float],
    path: str | PathLike[str],
    labels: Sequence[str] | None = None,
) -> None:
    """Draw the landmarks' residuals as arrows, a small panel for each used tilt.

    Args:
        positions: (T, P, 2) x and y, Å from the image centre; NaN where a landmark isn't seen.
        residuals: (T, P, 2) measured minus predicted, Å; likewise.
        use: (T,).
        field: Å along x and y of the image.
        path: the picture.
        labels: (T,) written above the panels; None: the images' numbers.
    """
    place, arrow = np.asarray(positions, float), np.asarray(residuals, float)
    chosen = [j for j in range(len(place)) if use[j]]
    if len(chosen) > LARGEST_GRID:
        chosen = [chosen[k] for k in np.unique(np.linspace(0, len(chosen) - 1, LARGEST_GRID).round().astype(int))]
    columns = max(1, min(8, math.ceil(math.sqrt(len(chosen)))))
    rows = max(1, math.ceil(len(chosen) / columns))
    length = np.hypot(arrow[chosen, :, 0], arrow[chosen, :, 1]) if chosen else np.zeros((0, 0))
    typical = float(np.nanpercentile(length, 95)) if np.isfinite(length).any() else 0.0
    factor = exaggeration(ARROW_SHARE * min(field) / typical) if typical > 0 else 1.0
    tall = PANEL * field[1] / field[0]
    figure = Figure(figsize=(max(columns * PANEL, 5.0), rows * (tall + 0.25) + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, j in zip(panels, chosen, strict=False):
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set(xlim=(-field[0] / 2, field[0] / 2), ylim=(-field[1] / 2, field[1] / 2))
        seen = np.isfinite(place[j]).all(axis=1) & np.isfinite(arrow[j]).all(axis=1)
        p, d = place[j][seen], arrow[j][seen]
        axes.plot(*p.T, ".", color=GREY, markersize=2)
        axes.quiver(*p.T, *d.T, angles="xy", scale_units="xy", scale=1 / factor, color=RED, width=0.012)
        rms = math.sqrt(float((d**2).sum(axis=1).mean())) if len(d) else math.nan
        name = labels[j] if labels is not None else str(j + 1)
        axes.set_title(f"{name}: {rms:.1f} Å" if len(d) else f"{name}: none seen", fontsize=7, pad=2)
    if chosen:
        bar = exaggeration(0.3 * field[0])
        x, y = -0.45 * field[0], -0.44 * field[1]
        panels[0].plot([x, x + bar], [y, y], color=BLACK, linewidth=2, solid_capstyle="butt")
        panels[0].text(x, y + 0.03 * field[1], f"{bar:g} Å", fontsize=6, va="bottom")
    figure.suptitle(f"residuals of the landmarks, arrows {factor:g} times enlarged; rms per tilt", fontsize=9)
    save(figure, path)


def landmark_picture(
    before: ArrayLike,
    after: ArrayLike,
    path: str | PathLike[str],
    pixel_size: float,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw a landmark with the first geometry and with the last: the mean of its patches, and the patches tilt by tilt.

    Args:
        before, after: (T, n, n) patches around where each geometry expects it, in one order; NaN-filled where it isn't seen.
        path: the picture.
        pixel_size: Å.
        labels: (T,) written below the patches, the angles for example.
        title: the headline.
    """
    stacks = [np.asarray(stack, float) for stack in (before, after)]
    seen = [k for k in range(len(stacks[0])) if all(np.isfinite(s[k]).all() for s in stacks)]
    if not seen:
        raise ValueError("no tilt shows the landmark in both geometries")
    shown = [seen[k] for k in np.unique(np.linspace(0, len(seen) - 1, min(STRIP, len(seen))).round().astype(int))]
    means = [stack[seen].mean(axis=0) for stack in stacks]
    columns = math.ceil(len(shown) / 2)
    width = 1.8 + 0.62 * columns
    figure = Figure(figsize=(width, 4.4))
    room = {"wspace": 0.08, "hspace": 0.28, "top": 0.87, "bottom": 0.03, "left": 0.02, "right": 0.99}
    grid = figure.add_gridspec(4, columns + 3, **room)
    low, high = np.percentile(np.stack(means), (0, 100))
    floor, ceiling = np.percentile(np.concatenate([stack[shown].ravel() for stack in stacks]), PATCH_CONTRAST)
    for row, (name, stack, mean) in enumerate(zip(("before", "after"), stacks, means, strict=True)):
        axes = figure.add_subplot(grid[2 * row : 2 * row + 2, :3])
        _patch(axes, mean, low, high)
        axes.set_ylabel(name, fontsize=9)
        axes.set_title(f"mean of {len(seen)}", fontsize=7, pad=2)
        if row == 0:
            n = mean.shape[1]
            bar = exaggeration(0.4 * n * pixel_size)
            axes.plot(
                [0.05 * n, 0.05 * n + bar / pixel_size],
                [0.06 * n] * 2,
                color="white",
                linewidth=2.5,
                solid_capstyle="butt",
            )
            axes.text(0.05 * n, 0.09 * n, f"{bar:g} Å", color="white", fontsize=7, va="bottom")
        for place, k in enumerate(shown):
            small = figure.add_subplot(grid[2 * row + place // columns, 3 + place % columns])
            _patch(small, stack[k], floor, ceiling)
            small.set_title(labels[k] if labels is not None else str(k + 1), fontsize=6, pad=1.5)
    figure.suptitle(title or "landmark before and after", fontsize=9, y=0.97)
    save(figure, path)


def _patch(axes: Axes, image: NDArray[np.float64], low: float, high: float) -> None:
    """A patch, its middle marked at the border."""
    n_y, n_x = image.shape
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
    axes.set(xticks=[n_x // 2], yticks=[n_y // 2], xticklabels=[], yticklabels=[])
    axes.tick_params(length=2, color=RED)
