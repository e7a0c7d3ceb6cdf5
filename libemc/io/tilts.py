"""Tilt angles: .rawtlt and .tlt files of one angle a line, and angles from a start and a step."""

from __future__ import annotations

import numpy as np

from libemc.errors import InputError
from libemc.io.files import StrPath, read_table, write_text
from libemc.io.geometry import Array

STEEPEST = 90.0
"""Degrees; a larger angle in a tilt file means that it is some other file."""


def read_tilts(path: StrPath, count: int | None = None) -> Array:
    """Tilt angles in degrees, (T,): the first column of a .rawtlt or .tlt file.

    Args:
        path: the file.
        count: images in the stack, to check against.

    Raises:
        InputError: not numbers, another number of angles than `count`, or angles beyond ±90 degrees.
    """
    angles = np.array([row[0] for row in read_table(path)])
    if count is not None and len(angles) != count:
        raise InputError(
            f"has {len(angles)} angles for {count} images", path, "give the file that belongs to the stack"
        )
    if np.abs(angles).max() > STEEPEST:
        raise InputError(f"has a tilt angle of {angles[np.abs(angles).argmax()]:g} degrees", path, "correct that line")
    return angles


def tilts_from_step(start: float, step: float, count: int) -> Array:
    """Tilt angles start, start + step, … in degrees, (T,); InputError if they pass ±90 or do not change.

    Of one image the step has no meaning.
    """
    angles: Array = start + step * np.arange(count, dtype=np.float64)
    if not np.isfinite(angles).all() or np.abs(angles).max() > STEEPEST or (step == 0 and count > 1):
        raise InputError(
            f"{count} images from {start:g} by {step:g} degrees end at {angles[-1]:g}",
            None,
            "correct the start or the step",
        )
    return angles


def write_tilts(path: StrPath, angles: Array) -> None:
    """One angle a line, degrees, as IMOD writes .tlt and .rawtlt."""
    write_text(path, "".join(f"{angle:9.4f}\n" for angle in angles))
