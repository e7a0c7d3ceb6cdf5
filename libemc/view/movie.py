"""The tilt movie: raw and aligned images side by side, as an animated PNG that any browser plays.

Frames come one after the other and are kept as 8-bit grey of at most 512 pixels' width. The aligned image is only turned (tilt
axis upright) and shifted, never stretched: what moves across the axis is the tilting, what moves along it is an error.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from libemc.records import TiltSeriesRecord, need
from libemc.replacement import write_bytes

WIDEST = 512  # pixels of a frame
GAP = 4  # pixels between raw and aligned
CONTRAST = (2.0, 98.0)  # percentiles of all pixels; the range is widened by `HEADROOM` on both sides
HEADROOM = 0.35
LEVELS = 24  # grey levels that are told apart: noise beyond them costs space and shows nothing
SMOOTHING = 0.8  # pixels, deviation


def _box_binned(image: NDArray[Any], binning: int) -> NDArray[np.float32]:
    rows, columns = (n // binning * binning for n in image.shape)
    blocks = np.asarray(image[:rows, :columns], np.float32).reshape(
        rows // binning, binning, columns // binning, binning
    )
    return np.asarray(blocks.mean(axis=(1, 3)), np.float32)


def tilt_order(record: TiltSeriesRecord) -> list[int]:
    """The tilts that are used, by rising angle of the alignment."""
    tilt = need(record, "alignment").tilt
    return sorted((j for j, use in enumerate(record.tilts.use) if use), key=lambda j: tilt[j])


def tilt_frame(record: TiltSeriesRecord, j: int, image: NDArray[Any], width: int = WIDEST) -> NDArray[np.float32]:
    """An image raw and aligned, side by side.

    Args:
        record: with an alignment.
        j: the image's number.
        image: (rows, columns), raw.
        width: pixels of a frame, at most.

    Returns:
        (rows, columns) of deviation 1 around 0; NaN where there's no image.
    """
    alignment = need(record, "alignment")
    binning = max(1, -(-2 * image.shape[1] // (width - GAP)))
    pixel_size = record.source.pixel_size * binning
    image = _box_binned(image, binning)
    middle = np.median(image)
    spread = 1.4826 * np.median(np.abs(image - middle)) or 1.0
    image = (image - middle) / spread
    image = ndimage.gaussian_filter(image, SMOOTHING)
    # the pixel at u of the aligned image is the raw one at Rz(axis)·u + shift, times the magnification
    angle = np.deg2rad(alignment.axis[j])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # acts on (y, x)
    scale = (alignment.magnification or (1.0,) * len(alignment.tilt))[j]
    centre = np.array([image.shape[0] // 2, image.shape[1] // 2])
    shift = np.array([alignment.shift_y[j], alignment.shift_x[j]]) / pixel_size
    aligned = ndimage.affine_transform(
        image, scale * turn, centre + scale * (shift - turn @ centre), order=1, cval=np.nan
    )
    gap = np.full((image.shape[0], GAP), np.nan, np.float32)
    return np.hstack([image, gap, aligned]).astype(np.float32)


def tilt_movie(
    frames: Iterable[NDArray[Any]],
    path: str | PathLike[str],
    fps: float = 8.0,
    labels: Sequence[str] | None = None,
) -> None:
    """Write frames as an animated PNG in grey, over and over, with one contrast for all.

    Args:
        frames: (rows, columns) each, of one shape, at most `WIDEST` pixels wide or thinned to it; NaN is drawn mid-grey.
        path: the picture, .png.
        fps: frames a second.
        labels: written at the upper left of each.

    Raises:
        ValueError: there are no frames.
    """
    kept: list[NDArray[np.float16]] = []
    for frame in frames:
        thin = -(-frame.shape[1] // WIDEST)
        kept.append(np.asarray(_box_binned(frame, thin) if thin > 1 else frame, np.float16))
    if not kept:
        raise ValueError("a movie without frames")
    sample = np.concatenate([f[::3, ::3].ravel() for f in kept]).astype(np.float32)
    low, high = np.nanpercentile(sample, CONTRAST) if np.isfinite(sample).any() else (0.0, 1.0)
    low, high = low - HEADROOM * (high - low), high + HEADROOM * (high - low)
    pictures = []
    for k, frame in enumerate(kept):
        grey = np.nan_to_num((frame.astype(np.float32) - low) / max(high - low, 1e-6), nan=0.5).clip(0, 1)
        steps = np.round(grey[::-1] * (LEVELS - 1)) * (255 / (LEVELS - 1))  # y upward, as in the other pictures
        shown = Image.fromarray(steps.astype(np.uint8))
        if labels is not None:
            draw = ImageDraw.Draw(shown)
            draw.rectangle((0, 0, 7 * len(labels[k]) + 6, 14), fill=0)
            draw.text((3, 1), labels[k], fill=255)
        pictures.append(shown)
    picture = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": 1000 / fps, "loop": 0}
    pictures[0].save(picture, format="PNG", **options)
    write_bytes(path, picture.getbuffer())
