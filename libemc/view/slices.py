"""Central slices of a volume, gathered while it's written row by row, as one picture."""

from __future__ import annotations

from os import PathLike

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from libemc.view.plots import save

CONTRAST = 3.0  # standard deviations of a slice on either side of its mean, from black to white
SIDE = 9.0  # inches of the picture's longer side


class CentralSlices:
    """The means of the `depth` sections around the middle of each axis of a volume that comes in slabs of rows.

    Args:
        shape: (z, y, x) of the volume.
        depth: sections to average, for contrast.
    """

    def __init__(self, shape: tuple[int, int, int], depth: int = 5) -> None:
        self.ranges = [(max(n // 2 - depth // 2, 0), min(n // 2 - depth // 2 + depth, n)) for n in shape]
        z, y, x = shape
        self.xy, self.xz, self.zy = np.zeros((y, x)), np.zeros((z, x)), np.zeros((y, z))

    def add(self, y0: int, slab: NDArray[np.float32]) -> None:
        """Take what is needed of rows y0, y0 + 1, ...: slab[z, y, x]."""
        (z_low, z_high), (y_low, y_high), (x_low, x_high) = self.ranges
        rows = slice(y0, y0 + slab.shape[1])
        self.xy[rows] = slab[z_low:z_high].mean(axis=0)
        self.zy[rows] = slab[:, :, x_low:x_high].mean(axis=2).T
        inside = slab[:, max(y_low - y0, 0) : max(y_high - y0, 0)]
        self.xz += inside.sum(axis=1) / (y_high - y_low)


def central_slices_png(slices: CentralSlices, path: str | PathLike[str], title: str = "") -> None:
    """Write the three slices as a PNG: x to the right, y up, xz below and zy beside the xy slice; dark is low."""
    (height, width), depth = slices.xy.shape, slices.xz.shape[0]
    gap = max(height, width) // 50 + 1
    total = np.array([width + gap + depth, height + gap + depth])
    margin = np.array([0.0, 0.3])
    figure = Figure(figsize=tuple(total * SIDE / total.max() + margin))
    parts = [
        (slices.xy, 0, depth + gap, width, height),
        (slices.xz, 0, 0, width, depth),
        (slices.zy, width + gap, depth + gap, depth, height),
    ]
    top = 1 - margin[1] / figure.get_size_inches()[1]
    for image, x, y, w, h in parts:
        axes = figure.add_axes((x / total[0], y / total[1] * top, w / total[0], h / total[1] * top))
        mean, spread = float(image.mean()), CONTRAST * float(image.std()) or 1.0
        axes.imshow(
            image,
            cmap="gray",
            origin="lower",
            vmin=mean - spread,
            vmax=mean + spread,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_axis_off()
    figure.text(0.01, 1 - 0.5 * (1 - top), title, va="center", fontsize=9)
    save(figure, path)
