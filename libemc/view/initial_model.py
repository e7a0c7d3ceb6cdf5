"""Pictures of a descent from nothing to a model: its course as a strip, as a movie and in curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from libemc.view.movie import tilt_movie
from libemc.view.plots import save

MOST_COLUMNS = 12
"""Steps side by side in the strip: of more, some between the first and the last."""
PANEL = 1.2  # inches of a slice
MAGNIFIED = 160
"""Pixels, at least, of a frame of the movie: voxels are drawn as squares."""
PERCENTILES = (1.0, 99.8)

Array = NDArray[Any]


def shown(count: int) -> list[int]:
    """At most `MOST_COLUMNS` places of a list, evenly from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, MOST_COLUMNS))})


def course_strip(path: str | PathLike[str], frames: Array, bands: Sequence[float], pixel_size: float) -> None:
    """Draw central slices of the references after some of the steps, each with a contrast of its own.

    Args:
        path: the picture.
        frames: (steps + 1, 3, rows, columns), slices xy, xz and yz of the start and after each step, classes side by side.
        bands: (steps,) Å.
        pixel_size: Å of a frame's pixel.
    """
    places = shown(len(frames))
    wide = frames.shape[3] / frames.shape[2]
    figure = Figure(figsize=(PANEL * wide * len(places), PANEL * 3 + 0.4), layout="constrained")
    panels = figure.subplots(3, len(places), squeeze=False)
    for column, place in enumerate(places):
        low, high = np.percentile(frames[place], PERCENTILES)
        for row, axes in enumerate(panels[:, column]):
            axes.imshow(frames[place, row], cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        name = "start" if place == 0 else f"{place}: {bands[place - 1]:.0f} Å"
        panels[0, column].set_title(name, fontsize=8)
    for row, name in enumerate(("x, y", "x, z", "y, z")):
        panels[row, 0].set_ylabel(name, fontsize=8)
    figure.supxlabel(f"{frames.shape[2] * pixel_size:.0f} Å wide", fontsize=8)
    save(figure, path)


def course_movie(path: str | PathLike[str], frames: Array, bands: Sequence[float]) -> None:
    """Write the same slices, xy beside xz beside yz, as an animated PNG: a frame for each step.

    Args:
        frames, bands: as for `course_strip`.
    """
    times = max(1, -(-MAGNIFIED // frames.shape[2]))
    pictures = []
    for frame in frames:
        low, high = np.percentile(frame, PERCENTILES)
        side = np.hstack(list((frame - low) / max(high - low, 1e-30)))
        pictures.append(np.kron(side, np.ones((times, times), np.float32)))
    tilt_movie(pictures, path, fps=6.0, labels=["start", *(f"{k}: {b:.0f} A" for k, b in enumerate(bands, start=1))])


def course_plot(path: str | PathLike[str], courses: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """Draw band, temperature, evidence and change against the step, a line for each seed.

    Args:
        path: the picture.
        courses: the steps of each seed, with `band`, `heat`, `evidence` and `change`.
    """
    names = {"band": "band, Å", "heat": "temperature", "evidence": "log-likelihood per particle", "change": "change"}
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 2).ravel(), names.items(), strict=True):
        for seed, steps in courses.items():
            axes.plot(range(1, len(steps) + 1), [s[name] for s in steps], linewidth=1.2, label=f"seed {seed}")
        axes.set(xlabel="step", ylabel=label)
        if name in ("heat", "change"):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(linewidth=0.3, alpha=0.5)
    figure.axes[0].legend(fontsize=8)
    save(figure, path)
