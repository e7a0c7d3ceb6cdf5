"""Figures of a map's resolution: by direction, and by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from libemc.view.plots import CONTRAST, central_slices, save, scale_bar

_ACROSS = 181
"""Points over the disc on which directions are drawn."""
_BLUR = 12.0
"""Degrees over which neighbouring directions run into each other there."""
_SOME = (5.0, 95.0)
"""Percentiles between which resolutions by place are coloured."""


def directions_plot(
    path: str | PathLike[str],
    frequency: ArrayLike,
    sphere: ArrayLike,
    cones: ArrayLike,
    axes: ArrayLike,
    resolution: ArrayLike,
    thresholds: Mapping[str, float | Sequence[float]],
    title: str = "",
) -> None:
    """Draw the FSC of cones as a band about that of the shell, and the resolution of each direction on a disc.

    Args:
        path: the picture.
        frequency: (S,) 1/Å.
        sphere: (S,) FSC of whole shells.
        cones: (C, S) FSC of each cone.
        axes: (C, 3) unit vectors (x, y, z) of their axes, z > 0.
        resolution: (C,) Å.
        thresholds: by name, numbers or curves (S,), dashed.
        title: the headline.
    """
    k, curves = np.asarray(frequency, dtype=np.float64), np.asarray(cones, dtype=np.float64)
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    low, tenth, ninth, high = np.percentile(curves, [0, 10, 90, 100], axis=0)
    left.fill_between(k, low, high, color="#2166ac", alpha=0.15, linewidth=0, label="all cones")
    left.fill_between(k, tenth, ninth, color="#2166ac", alpha=0.35, linewidth=0, label="eight of ten")
    left.plot(k, np.asarray(sphere), color="black", linewidth=2.0, label="all directions")
    for name, level in thresholds.items():
        line = np.broadcast_to(np.asarray(level, dtype=np.float64), k.shape)
        left.plot(k, line, "--", color="#888888", linewidth=0.8)
        left.annotate(name.replace("_", " "), (k[-1], line[-1]), xytext=(4, 0), textcoords="offset points", fontsize=7)
    left.axhline(0.0, color="black", linewidth=0.6)
    left.set(xlim=(0.0, k[-1]), ylim=(min(-0.1, max(-0.5, float(low.min()))), 1.05))
    left.set(xlabel="spatial frequency (1/Å)", ylabel="Fourier shell correlation")
    left.legend(frameon=False, loc="upper right")
    image = right.imshow(
        _on_a_disc(np.asarray(axes, dtype=np.float64), np.asarray(resolution, dtype=np.float64)),
        cmap="viridis_r", origin="lower", extent=(-1, 1, -1, 1), interpolation="bilinear",
    )  # fmt: skip
    for angle in (30, 60, 90):
        turn = np.linspace(0, 2 * np.pi, 181)
        r = np.sqrt(2) * np.sin(np.deg2rad(angle) / 2)
        right.plot(r * np.cos(turn), r * np.sin(turn), color="black" if angle == 90 else "white", linewidth=0.6)
        right.annotate(f"{angle}°", (0, r), color="black", fontsize=7, ha="center", va="bottom")
    right.set(xlabel="x", ylabel="y", xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.08), aspect="equal")
    right.set_title("directions from z, equal areas", fontsize=9)
    right.set_frame_on(False)
    figure.colorbar(image, ax=right, shrink=0.8, label="resolution (Å)")
    figure.suptitle(title)
    save(figure, path)


def _on_a_disc(axes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of directions on the half sphere about z in Lambert's equal-area projection; NaN beside the disc."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, _ACROSS)] * 2)
    square = x**2 + y**2
    z = 1 - square
    part = np.sqrt(np.clip(2 - square, 0, None))
    places = np.stack([x * part, y * part, z], axis=-1)
    angle = np.degrees(np.arccos(np.clip(np.abs(places @ axes.T), 0, 1)))
    weight = np.exp(-0.5 * (angle / _BLUR) ** 2)
    return np.where(square <= 1, weight @ values / weight.sum(axis=-1), np.nan)


def local_resolution_plot(
    path: str | PathLike[str],
    volume: NDArray[np.floating],
    resolution: NDArray[np.floating],
    pixel_size: float,
    title: str = "",
) -> None:
    """Draw the central slices of a map in grey, coloured by resolution where that is known, and its histogram.

    Args:
        path: the picture.
        volume: (n, n, n), white.
        resolution: (n, n, n) Å, 0 where it is not known.
        pixel_size: Å.
        title: the headline.
    """
    known = resolution[resolution > 0]
    best, worst = np.percentile(known, _SOME)
    low, high = np.percentile(volume, CONTRAST)
    figure = Figure(figsize=(12.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 4)
    slices = central_slices(volume)
    for axes, (name, image), colour in zip(panels, slices.items(), central_slices(resolution).values(), strict=False):
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
        over = axes.imshow(
            np.where(colour > 0, colour, np.nan), cmap="turbo", vmin=best, vmax=worst, alpha=0.5, origin="lower"
        )
        axes.set(xlabel=name[0], ylabel=name[1], xticks=[], yticks=[])
    scale_bar(panels[0], volume.shape[2], pixel_size)
    figure.colorbar(over, ax=list(panels[:3]), shrink=0.8, label="resolution (Å)", location="left")
    panels[3].hist(known, bins=np.linspace(best, worst, 41), color="#2166ac")
    panels[3].set(xlabel="resolution (Å)", ylabel="voxels")
    figure.suptitle(title)
    save(figure, path)


def guinier_plot(
    path: str | PathLike[str],
    squared_frequency: ArrayLike,
    log_amplitude: ArrayLike,
    slope: float,
    intercept: float,
    between: tuple[float, float],
    title: str = "",
) -> None:
    """Draw ln amplitude over 1/d², and the line that was fitted.

    Args:
        path: the picture.
        squared_frequency, log_amplitude: (S,) 1/Å² and ln; what is not finite is left out.
        slope, intercept: of the line, Å² and ln.
        between: Å, coarse and fine ends of the fit.
        title: the headline.
    """
    x, y = np.asarray(squared_frequency, dtype=np.float64), np.asarray(log_amplitude, dtype=np.float64)
    figure = Figure(figsize=(7.0, 4.6))
    axes = figure.add_subplot()
    good = np.isfinite(y)
    axes.plot(x[good], y[good], "o-", color="#2166ac", markersize=3, label="signal")
    ends = np.array([1 / d**2 for d in between])
    axes.plot(ends, intercept + slope * ends, color="#b2182b", linewidth=2.0, label="fit")
    axes.set(xlabel="1/d² (1/Å²)", ylabel="ln amplitude")
    axes.legend(frameon=False)
    axes.set_title(title)
    save(figure, path)
