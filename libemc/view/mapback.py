"""Pictures of particles placed back: shaded surfaces as seen from above and from the front, and statistics of neighbours.

Each function takes plain arrays and a path, draws with matplotlib's Agg, and writes the picture whole. N particles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from libemc.view.alignment import BLACK, BLUE, GREY, RED
from libemc.view.plots import class_colour, save, scale_bar

Array = NDArray[np.float64]
Pixels = NDArray[np.float32]

SCORES = "viridis"
SPREAD = (5.0, 95.0)
"""Percentiles of the scores where their colours end."""
UNKNOWN = (0.6, 0.6, 0.6)
"""Colour of a particle without a score."""
LIGHT = (-0.42, 0.5, 0.76)
"""Where the light comes from: right, up, towards the viewer."""
AMBIENT, GLOSS, SHARPNESS = 0.42, 0.18, 24.0
"""Share of light from everywhere, of what is mirrored, and how small a mirrored light is (Blinn 1977)."""
HAZE = 0.45
"""Share of the backdrop in what lies farthest."""
CREASE, CREASE_WIDTH = 0.55, 0.012
"""How much darker is what lies behind what is beside it (Luft, Colditz & Deussen 2006), and over which part of the width."""
PAPER, PALE = 0.97, (0.55, 0.97)
"""Grey of a backdrop of nothing, and of the darkest and brightest of a tomogram."""
CONTRAST = (1.0, 99.0)
WIDE = 8.0  # inches of the picture
BINS = 40
MOST_DOTS = 20000
"""Neighbours that are drawn: of more, some at random."""


@dataclass(frozen=True)
class Colours:
    """Of N particles, and what they stand for.

    Attributes:
        rgb: (N, 3), 0 to 1.
        names: colour of each name in the legend; empty for a scale.
        scale: the scores where a scale of colours begins and ends; None: there are names.
    """

    rgb: Array
    names: Mapping[str, str]
    scale: tuple[float, float] | None = None


def by_kind(kind: Sequence[int], names: Sequence[str]) -> Colours:
    """A colour for each kind: (N,) places in the list of their names."""
    palette = [class_colour(k + 1) for k in range(len(names))]
    rgb = np.array([to_rgb(palette[k]) for k in kind], dtype=np.float64).reshape(-1, 3)
    return Colours(rgb, {name: palette[k] for k, name in enumerate(names)})


def by_score(score: ArrayLike, scale: tuple[float, float]) -> Colours:
    """A scale of colours for scores (N,); NaN is grey."""
    values = np.asarray(score, dtype=np.float64)
    rgb = matplotlib.colormaps[SCORES](Normalize(*scale, clip=True)(np.nan_to_num(values)))[:, :3]
    return Colours(np.where(np.isfinite(values)[:, None], rgb, UNKNOWN), {}, scale)


def score_scale(score: ArrayLike) -> tuple[float, float]:
    """Where the colours of scores (N,), some of which are known, begin and end."""
    known = np.asarray(score, dtype=np.float64)
    low, high = np.percentile(known[np.isfinite(known)], SPREAD)
    return float(low), float(max(high, low + 1e-9))


def shaded(depth: Pixels, normal: Pixels, colour: Array, backdrop: Array) -> Array:
    """A picture of a surface, lit from the upper left, hazier the farther away, darker in creases.

    Args:
        depth: (rows, columns) from the viewer, infinite where there is nothing.
        normal: (rows, columns, 3) outwards: right, up, towards the viewer.
        colour: (rows, columns, 3) of the surface.
        backdrop: (rows, columns) grey, 0 to 1.

    Returns:
        (rows, columns, 3), 0 to 1.
    """
    hit = np.isfinite(depth)
    behind = np.repeat(backdrop[..., None], 3, axis=-1)
    if not hit.any():
        return behind
    low, high = float(depth[hit].min()), float(depth[hit].max())
    filled = np.where(hit, depth, high)
    light = np.array(LIGHT) / np.linalg.norm(LIGHT)
    half = light + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    lit = np.clip(normal @ light, 0, 1)
    mirrored = np.clip(normal @ half, 0, 1) ** SHARPNESS
    width = max(1.0, CREASE_WIDTH * depth.shape[1])
    crease = np.clip((filled - ndimage.gaussian_filter(filled, width)) / (2 * width), 0, 1)
    bright = (AMBIENT + (1 - AMBIENT) * lit) * (1 - CREASE * crease)
    far = HAZE * (filled - low) / max(high - low, 1.0)
    surface = np.clip(colour * bright[..., None] + GLOSS * mirrored[..., None], 0, 1)
    surface = surface * (1 - far[..., None]) + behind * far[..., None]
    # the edge of a surface covers a part of its pixel
    cover = np.where(hit, 1.0, 0.0)
    cover = np.minimum(cover, 0.35 + 0.65 * ndimage.uniform_filter(cover, 3))[..., None]
    return np.asarray(cover * surface + (1 - cover) * behind)


def pale(section: Array | None, shape: tuple[int, ...]) -> Array:
    """A section of a tomogram (rows, columns) in pale greys, NaN where it ends; None: nothing but paper."""
    paper = np.full(shape, PAPER)
    if section is None or not np.isfinite(section).any():
        return paper
    low, high = np.nanpercentile(section, CONTRAST)
    grey = PALE[0] + (PALE[1] - PALE[0]) * np.clip((section - low) / max(high - low, 1e-12), 0, 1)
    return np.where(np.isfinite(section), grey, paper)


def mapback_picture(
    path: str | PathLike[str], top: Array, front: Array, pixel_size: float, colours: Colours, title: str
) -> None:
    """Draw what is seen from above, and beneath it from the front, with a scale bar and what the colours mean.

    Args:
        path: the picture.
        top: (y, x, 3); front: (z, x, 3); 0 to 1, the first row at the bottom.
        pixel_size: Å.
        colours: for the legend.
        title: the headline.
    """
    rows = [top.shape[0], front.shape[0]]
    figure = Figure(figsize=(WIDE, WIDE * sum(rows) / top.shape[1] + 0.9), layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=rows)
    for axes, image, labels in zip(panels, (top, front), ("xy", "xz"), strict=True):
        axes.imshow(image, origin="lower", interpolation="antialiased")
        axes.set(xlabel=labels[0], ylabel=labels[1], xticks=[], yticks=[])
    scale_bar(panels[0], top.shape[1], pixel_size)
    if colours.scale is not None:
        scale = ScalarMappable(Normalize(*colours.scale), SCORES)
        figure.colorbar(scale, ax=panels[1], location="bottom", shrink=0.5, aspect=40, label="score")
    else:
        marks = [Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in colours.names.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 5), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------- neighbours


@dataclass(frozen=True)
class Neighbours:
    """What is drawn of the neighbours of N particles.

    Attributes:
        distance: (N,) Å to the nearest; chance: (repeats, N) Å, at random.
        angle: (A,) degrees to the nearest of the same class; chance_angle: (R,) degrees, at random.
        around: (P, 3) Å, all neighbours in each particle's frame.
        radius: Å within which these are.
    """

    distance: Array
    chance: Array
    angle: Array
    chance_angle: Array
    around: Array
    radius: float


def neighbours_plot(path: str | PathLike[str], found: Neighbours, title: str = "") -> None:
    """Draw how far nearest neighbours are and how they are turned, beside chance, and where neighbours lie in the particle.

    Args:
        path: the picture.
        found: see there.
        title: the headline.
    """
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    distances, angles, places = figure.subplots(1, 3)
    end = max(float(found.distance.max()), float(np.percentile(found.chance, 99.5)))
    _beside_chance(distances, found.distance, found.chance.ravel(), end)
    distances.axvline(float(np.median(found.distance)), color=BLUE, linewidth=1, linestyle="--")
    distances.set(xlabel="distance of the nearest neighbour (Å)", ylabel="particles")
    end = max((float(a.max()) for a in (found.angle, found.chance_angle) if len(a)), default=180.0)
    _beside_chance(angles, found.angle, found.chance_angle, math.ceil(end))
    angles.set(xlabel="angle to the nearest neighbour's pose (°)", ylabel="particles")
    distances.legend(frameon=False, fontsize=8)
    _in_the_particle(places, found)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _beside_chance(axes: Axes, values: Array, chance: Array, end: float) -> None:
    """A histogram from 0 to `end`, and in the same units what chance puts into its bins."""
    bins = int(np.clip(2 * math.sqrt(max(len(values), 1)), 8, BINS))
    edges = np.linspace(0, end, bins + 1)
    counts, expected = (
        np.histogram(values, edges)[0],
        np.histogram(chance, edges)[0] * len(values) / max(1, len(chance)),
    )
    axes.bar(edges[:-1], counts, edges[1], align="edge", color=BLUE, alpha=0.75, label=f"{len(values)} particles")
    axes.stairs(expected, edges, color=BLACK, linewidth=1.3, label="at random")
    axes.set(xlim=(0, end))


def _in_the_particle(axes: Axes, found: Neighbours) -> None:
    """Neighbours in the particle's frame, along z, coloured by height."""
    place = found.around
    if len(place) > MOST_DOTS:
        place = place[np.random.default_rng(0).choice(len(place), MOST_DOTS, replace=False)]
    place = place[np.argsort(place[:, 2], kind="stable")]
    size = float(np.clip(6000 / max(len(place), 1), 1.0, 16.0))
    dots = axes.scatter(
        place[:, 0], place[:, 1], size, place[:, 2], cmap="coolwarm", vmin=-found.radius, vmax=found.radius,
        linewidths=0, alpha=0.8,
    )  # fmt: skip
    axes.plot([0], [0], "+", color=RED, markersize=8)
    circle = np.linspace(0, 2 * np.pi, 181)
    axes.plot(found.radius * np.cos(circle), found.radius * np.sin(circle), color=GREY, linewidth=0.8)
    limit = 1.05 * found.radius
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set(xlabel="x in the particle (Å)", ylabel="y in the particle (Å)")
    axes.set_title(f"{len(found.around)} neighbours within {found.radius:.0f} Å", fontsize=9)
    axes.figure.colorbar(dots, ax=axes, label="z in the particle (Å)", shrink=0.8)
