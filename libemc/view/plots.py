"""Figures: FSC curves, the distribution of views, the central slices of a map.

Each function takes plain arrays and a path, draws with matplotlib's Agg (no display, no global state), and writes the
picture whole or not at all, in the format of the path's ending.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from libemc.replacement import write_bytes

DPI = 150
NICE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Resolutions that may be written at a tick, times powers of ten."""
STYLES = {
    "unmasked": {"color": "#888888"},
    "masked": {"color": "#2166ac"},
    "randomised": {"color": "#d6604d", "linewidth": 1.0},
    "corrected": {"color": "black", "linewidth": 2.0},
}
"""How the curves of known names are drawn; others take matplotlib's colours."""
_ROW_PARTS = 16
"""Each row of the sphere is drawn in so many parts, which follow its outline: the sides of a cell are straight."""
CONTRAST = (1.0, 99.9)
"""Percentiles of a map that are drawn black and white."""
PALETTE = ("#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#b8b8b8")
"""Okabe & Ito's colours, which those see apart who don't see all colours; after the last comes the first again."""


def class_colour(number: int) -> str:
    """The colour of a class in all pictures: classes count from 1."""
    return PALETTE[(number - 1) % len(PALETTE)]


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure whole or not at all, in the format of the path's ending."""
    picture = io.BytesIO()
    form = Path(path).suffix.lstrip(".") or "png"
    figure.savefig(picture, format=form, dpi=DPI, bbox_inches="tight")
    write_bytes(path, picture.getbuffer())


def resolution_ticks(highest: float, spacing: float = 0.07) -> list[float]:
    """Round resolutions in Å, coarse to fine, for the ticks of an axis of frequencies from 0 to `highest` (1/Å).

    Args:
        spacing: the least distance between two ticks, as a fraction of the axis.
    """
    powers = 10.0 ** np.arange(-2, 5)
    ticks: list[float] = []
    for value in sorted((float(f"{n * p:.3g}") for n in NICE for p in powers), reverse=True):
        before = 1 / ticks[-1] if ticks else 0.0
        if before + spacing * highest <= 1 / value <= highest:
            ticks.append(value)
    return ticks


def fsc_plot(
    path: str | PathLike[str],
    frequency: ArrayLike,
    curves: Mapping[str, ArrayLike],
    thresholds: Mapping[str, float | Sequence[float]],
    resolution: float | None = None,
    title: str = "",
) -> None:
    """Draw Fourier shell correlations over frequency, with the resolutions in Å along the top.

    Args:
        path: the picture.
        frequency: (S,) 1/Å.
        curves: (S,) each, by name.
        thresholds: by name, numbers or curves (S,), dashed.
        resolution: Å, marked; None: no mark.
        title: the headline; None written where it is empty.
    """
    k = np.asarray(frequency, dtype=np.float64)
    figure = Figure(figsize=(7.0, 4.6))
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(k, np.asarray(values), label=name, **STYLES.get(name, {}))  # type: ignore[arg-type]
    for name, level in thresholds.items():
        line = np.broadcast_to(np.asarray(level, dtype=np.float64), k.shape)
        axes.plot(k, line, "--", color="#bbbbbb", linewidth=0.8, zorder=0)
        label = name.replace("_", " ")
        axes.annotate(label, (k[-1], line[-1]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axhline(0.0, color="black", linewidth=0.6)
    if resolution is not None:
        axes.axvline(1 / resolution, color="#b2182b", linewidth=1.0, linestyle=":")
    lowest = min((float(np.min(values)) for values in curves.values()), default=0.0)
    axes.set(xlim=(0.0, k[-1]), ylim=(max(-1.05, min(-0.1, lowest - 0.05)), 1.05))
    axes.set(xlabel="spatial frequency (1/Å)", ylabel="Fourier shell correlation")
    angstrom_axis(axes, float(k[-1]))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(title)
    save(figure, path)


def angstrom_axis(axes: Axes, highest: float) -> None:
    """A second axis along the top of frequencies: the same places as resolutions in Å."""
    top = axes.secondary_xaxis("top")
    ticks = resolution_ticks(highest)
    top.set_xticks([1 / tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    top.set_xlabel("resolution (Å)")


def angular_distribution_plot(path: str | PathLike[str], rot: ArrayLike, tilt: ArrayLike, title: str = "") -> None:
    """Draw from where the particles are seen: counts over the sphere, in cells of equal area.

    Args:
        path: the picture.
        rot, tilt: (N,) degrees, RELION's: longitude and angle from +z of the view in the particle's frame.
        title: the headline; the number of particles is added.
    """
    longitude = (np.asarray(rot, dtype=np.float64) + 180) % 360 - 180
    height = np.cos(np.deg2rad(np.asarray(tilt, dtype=np.float64)))
    rows = int(np.clip(np.sqrt(longitude.size / 8), 6, 36))
    edges = np.linspace(-180, 180, 2 * rows + 1), np.linspace(-1, 1, rows + 1)
    counts, _, _ = np.histogram2d(longitude, height, bins=edges)
    share = counts / max(longitude.size / counts.size, 1e-300)
    figure = Figure(figsize=(7.5, 4.2))
    axes = figure.add_subplot(projection="mollweide")
    fine = np.linspace(-1, 1, rows * _ROW_PARTS + 1)
    cells = np.repeat(share.T, _ROW_PARTS, axis=0)
    mesh = axes.pcolormesh(np.deg2rad(edges[0]), np.arcsin(fine), cells, cmap="viridis", vmin=0)
    axes.set_xticks(np.deg2rad(np.arange(-120, 121, 60)))
    axes.set_yticks(np.deg2rad([-60, -30, 0, 30, 60]), ["150°", "120°", "90°", "60°", "30°"])  # type: ignore[arg-type]
    axes.tick_params(axis="x", colors="white", labelsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(linewidth=0.3, alpha=0.5)
    figure.colorbar(mesh, ax=axes, shrink=0.7, label="views, 1 = evenly spread")
    axes.set_title(f"{title + ': ' if title else ''}{longitude.size} particles, rot along, tilt down", fontsize=10)
    save(figure, path)


def central_slices(volume: NDArray[np.floating]) -> dict[str, NDArray[np.floating]]:
    """The slices xy [y, x], xz [z, x] and yz [z, y] of a map [z, y, x] through its origin n//2; views."""
    z, y, x = (n // 2 for n in volume.shape)
    return {"xy": volume[z], "xz": volume[:, y], "yz": volume[:, :, x]}


def central_slices_plot(
    path: str | PathLike[str], volume: NDArray[np.floating], pixel_size: float, title: str = ""
) -> None:
    """Draw the slices xy, xz and yz through the origin n//2 of a map, with a scale bar.

    Args:
        path: the picture.
        volume: (z, y, x), white.
        pixel_size: Å.
        title: the headline.
    """
    slices = central_slices(volume)
    low, high = np.percentile(np.concatenate([image.ravel() for image in slices.values()]), CONTRAST)
    widths = [image.shape[1] for image in slices.values()]
    height = 9.0 * max(image.shape[0] for image in slices.values()) / sum(widths)
    figure = Figure(figsize=(9.0, height + 0.5), layout="constrained")
    for axes, (name, image) in zip(figure.subplots(1, 3, width_ratios=widths), slices.items(), strict=True):
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
        axes.set(xlabel=name[0], ylabel=name[1], xticks=[], yticks=[])
    scale_bar(figure.axes[0], volume.shape[2], pixel_size)
    figure.suptitle(title)
    save(figure, path)


def scale_bar(axes: Axes, width: int, pixel_size: float) -> None:
    """A white bar of a round length, about a quarter of the picture, with its length in Å."""
    wanted = 0.25 * width * pixel_size
    power = 10.0 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    start, level = 0.05 * width, 0.05 * axes.get_ylim()[1]
    axes.plot([start, start + length / pixel_size], [level, level], color="white", linewidth=3, solid_capstyle="butt")
    seen = [withStroke(linewidth=1.5, foreground="black")]
    axes.text(start, level * 1.6, f"{length:g} Å", color="white", fontsize=8, va="bottom", path_effects=seen)
