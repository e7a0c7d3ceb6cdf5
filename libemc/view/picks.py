"""Pictures of picks: how high the maxima are beside what chance would give, and where in the tomogram the picks are.

Each function takes plain arrays and a path, draws with matplotlib's Agg, and writes the picture whole. N candidates, of
which some are kept as picks; their heights are z-values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from libemc.view.alignment import BLACK, BLUE, RED
from libemc.view.plots import save, scale_bar

Array = NDArray[np.float64]

SECTIONS, COLUMNS = 6, 3  # xy sections at most, and how many side by side
WIDE = 11.0  # inches of the page
HEADLINE = 0.3  # inches above each section
CONTRAST = (1.0, 99.0)  # percentiles of the sections that are black and white
SMOOTHING = 1 / 24  # deviation within a section, of the particle's diameter
COLOURS = "cool"  # of z: none of them is a grey
BEST = 95.0  # percentile of the picks' z from where on the colour stays
LEAST_CROSSES = 20  # rejected candidates are drawn, the best first, as many as there are picks and these at least
LOWEST = 0.3  # expected candidates in a bin: the model's curve ends there
BINS = 60  # across the histogram, at least as wide as the model's


@dataclass(frozen=True)
class Heights:
    """Candidates of one template and the model of their heights.

    Attributes:
        label: the template's.
        z: (N,) of all local maxima.
        kept: (N,) which of them are picks.
        edges, expected: (B + 1,) rising and (B,): how many maxima chance puts between each two edges.
        threshold: of z.
        expected_false: picks that chance puts above the threshold.
    """

    label: str
    z: Array
    kept: NDArray[np.bool_]
    edges: Array
    expected: Array
    threshold: float
    expected_false: float


def score_plot(path: str | PathLike[str], heights: Sequence[Heights], title: str = "") -> None:
    """Draw how many maxima have which z, beside the model's number, a panel for each template.

    Picks are blue, the other maxima grey, the model a black curve, the threshold a red line.

    Args:
        path: the picture.
        heights: of each template.
        title: the headline.
    """
    figure = Figure(figsize=(7.0, 3.4 * len(heights) + 0.4), layout="constrained")
    for axes, own in zip(figure.subplots(len(heights), 1, squeeze=False)[:, 0], heights, strict=True):
        _histogram(axes, own)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _histogram(axes: Axes, own: Heights) -> None:
    low = float(min(own.edges[0], own.z.min(initial=own.threshold)))
    high = float(max(own.z.max(initial=own.threshold), own.threshold + 1.0))
    edges = np.linspace(low, high + 0.02 * (high - low), BINS + 1)
    step = edges[1] - edges[0]
    found, above = (np.histogram(own.z[which], edges)[0] for which in (~own.kept, own.kept))
    axes.bar(edges[:-1], found, step, align="edge", color="#cccccc", label=f"{int(found.sum())} not picked")
    axes.bar(edges[:-1], above, step, bottom=found, align="edge", color=BLUE, label=f"{int(above.sum())} picks")
    # the model in these bins: its cumulative number is smooth, also where its own bins are others
    cumulative = np.concatenate([[0.0], np.cumsum(own.expected)])
    expected = np.diff(np.interp(edges, own.edges, cumulative))
    seen = expected > LOWEST
    axes.plot((edges[:-1] + step / 2)[seen], expected[seen], color=BLACK, linewidth=1.2, label="expected by chance")
    axes.axvline(own.threshold, color=RED, linewidth=1.2)
    note = f"z > {own.threshold:.2f}: {int(above.sum())} picks,\n{own.expected_false:.3g} expected by chance"
    right = own.threshold < (low + high) / 2
    axes.annotate(
        note, (own.threshold, 0.62), xycoords=("data", "axes fraction"), xytext=(6 if right else -6, 0),
        textcoords="offset points", ha="left" if right else "right", va="top", fontsize=8, color=RED,
    )  # fmt: skip
    axes.set(xlim=(low, edges[-1]), ylim=(LOWEST, 3.0 * max(float((found + above).max()), float(expected.max()), 1.0)))
    axes.set_yscale("log")
    axes.set(xlabel="z-value", ylabel="local maxima", title=own.label)
    axes.legend(framealpha=1, edgecolor="none", fontsize=8, loc="upper right")


def picks_picture(
    path: str | PathLike[str],
    volume: NDArray[np.floating],
    voxel_size: float,
    centre: tuple[float, float, float],
    xyz: ArrayLike,
    z: ArrayLike,
    kept: ArrayLike,
    diameter: float,
    title: str = "",
) -> None:
    """Draw sections of a tomogram, means over about one particle's diameter, with the picks in them as circles.

    A pick is drawn in the nearest xy section, if it reaches into it, as a circle of the particle's diameter, coloured
    by z; the best of the other candidates are light crosses. The xz sections below lie where the most picks are; red
    marks at the borders say where the sections cut each other.

    Args:
        path: the picture.
        volume: (z, y, x).
        voxel_size: Å.
        centre: (x, y, z) of the volume's origin n//2 in the frame of the positions, Å.
        xyz: (N, 3) positions, Å.
        z: (N,).
        kept: (N,) which candidates are picks.
        diameter: of the particle, Å.
        title: the headline.
    """
    place = (np.asarray(xyz, float).reshape(-1, 3) - centre) / voxel_size + np.array(volume.shape[::-1]) // 2
    height, chosen = np.asarray(z, float), np.asarray(kept, bool)
    width = max(diameter / voxel_size, 1.0)
    drawn = _Drawn(place, height, chosen, width)
    depth, tall, across = volume.shape
    levels = _levels(place[chosen, 2], width, depth)
    columns = min(COLUMNS, len(levels))
    rows = _rows(place[chosen, 1], width, tall, columns)
    flat, upright = ([_section(volume, k, at, width) for at in places] for k, places in ((0, levels), (1, rows)))
    low, high = np.percentile(np.concatenate([s.ravel() for s in (*flat, *upright)]), CONTRAST)

    side = WIDE / max(columns, 2)  # inches
    lines = -(-len(levels) // columns)
    share = [side * tall / across + HEADLINE] * lines + [side * depth / across + HEADLINE]
    figure = Figure(figsize=(columns * side + 0.8, sum(share) + 0.4), layout="constrained")
    panels = figure.subplots(lines + 1, columns, squeeze=False, height_ratios=share)
    nearest = np.abs(place[:, 2, None] - levels).argmin(axis=1)
    for k, (axes, image) in enumerate(zip(panels[:-1].flat, flat, strict=False)):
        inside = (nearest == k) & (np.abs(place[:, 2] - levels[k]) <= width)
        _show(axes, image, low, high, rows)
        drawn.mark(axes, inside, (0, 1))
        at = (levels[k] - depth // 2) * voxel_size + centre[2]
        axes.set_title(f"xy, z = {round(at)} Å: {int((inside & chosen).sum())} picks", fontsize=8, pad=3)
    for axes, image, row in zip(panels[-1], upright, rows, strict=True):
        inside = np.abs(place[:, 1] - row) <= width / 2
        _show(axes, image, low, high, levels)
        drawn.mark(axes, inside, (0, 2))
        at = (row - tall // 2) * voxel_size + centre[1]
        axes.set_title(f"xz, y = {round(at)} Å: {int((inside & chosen).sum())} picks", fontsize=8, pad=3)
    scale_bar(panels[0, 0], across, voxel_size)
    if chosen.any():
        bar = figure.colorbar(drawn.colours, ax=panels, shrink=0.6, aspect=40, pad=0.01)
        bar.set_label("z-value")
    count = f"{int(chosen.sum())} picks (circles) and the best of the other candidates (crosses)"
    figure.suptitle(f"{title}: {count}" if title else count, fontsize=11)
    save(figure, path)


class _Drawn:
    """Candidates in voxels, and how they are marked.

    Args:
        place: (N, 3) x, y, z.
        height: (N,) z-values.
        kept: (N,).
        width: of a circle, voxels.
    """

    def __init__(self, place: Array, height: Array, kept: NDArray[np.bool_], width: float) -> None:
        self.place, self.height, self.kept, self.width = place, height, kept, width
        others = np.nonzero(~kept)[0]
        best = others[np.argsort(-height[others], kind="stable")][: max(int(kept.sum()), LEAST_CROSSES)]
        self.crosses = np.zeros(len(kept), bool)
        self.crosses[best] = True
        own = height[kept]
        low, high = (float(own.min()), float(np.percentile(own, BEST))) if len(own) else (0.0, 1.0)
        self.colours = ScalarMappable(Normalize(low, max(high, low + 1e-6), clip=True), COLOURS)

    def mark(self, axes: Axes, which: NDArray[np.bool_], plane: tuple[int, int]) -> None:
        """Draw those of `which` in the plane of two of the axes x, y, z."""
        cross, circle = which & self.crosses, which & self.kept
        axes.plot(
            *self.place[cross][:, plane].T, "x", color="#e6e6e6", markersize=3.5, markeredgewidth=0.8,
            path_effects=[withStroke(linewidth=1.8, foreground=BLACK)],
        )  # fmt: skip
        size = np.full(int(circle.sum()), self.width)
        axes.add_collection(
            EllipseCollection(
                size, size, np.zeros(len(size)), units="xy", offsets=self.place[circle][:, plane],
                offset_transform=axes.transData, facecolors="none",
                edgecolors=self.colours.to_rgba(self.height[circle]), linewidths=0.9,
            )
        )  # fmt: skip


def _levels(picked: Array, width: float, depth: int) -> Array:
    """Where the xy sections are, voxels along z: evenly through what holds the picks; without any, the volume."""
    low, high = (float(picked.min()), float(picked.max())) if len(picked) else (width / 2, depth - 1 - width / 2)
    low, high = max(low, 0.0), min(high, depth - 1.0)
    count = min(SECTIONS, math.ceil(max(high - low, 1.0) / width))
    count = count if count <= COLUMNS else SECTIONS
    step = max(high - low, 0.0) / count
    return np.asarray(low + step * (np.arange(count) + 0.5), np.float64)


def _rows(picked: Array, width: float, tall: int, count: int) -> Array:
    """Where the xz sections are, voxels along y: in each of `count` equal parts where it holds the most picks."""
    chosen = []
    for a, b in itertools.pairwise(np.linspace(0, tall, count + 1)):
        inset = min(width, b - a - 1) / 2
        part = np.arange(round(a + inset), max(round(b - inset), round(a + inset) + 1), dtype=np.float64)
        held = (np.abs(picked[None] - part[:, None]) <= width / 2).sum(axis=1)
        best = part[held == held.max()]
        chosen.append(float(best[np.abs(best - part.mean()).argmin()]))
    return np.array(chosen)


def _section(volume: NDArray[np.floating], axis: int, level: float, width: float) -> Array:
    """The mean over about `width` voxels around `level`, smoothed."""
    low = int(np.clip(round(level - width / 2), 0, volume.shape[axis] - 1))
    high = max(min(round(level + width / 2), volume.shape[axis]), low + 1)
    slab = np.take(volume, range(low, high), axis=axis).mean(axis=axis, dtype=np.float64)
    return np.asarray(ndimage.gaussian_filter(slab, SMOOTHING * width), np.float64)


def _show(axes: Axes, image: Array, low: float, high: float, cuts: Array) -> None:
    """A section, and at its left and right border short marks where it is cut by others."""
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower")
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(-0.5, image.shape[0] - 0.5))
    axes.set(xticks=[], yticks=list(cuts), yticklabels=[])
    axes.tick_params(axis="y", length=4, width=1, color=RED, right=True)
