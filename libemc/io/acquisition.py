"""What lies beside a raw stack: its tilt angles and its .mdoc, found by name, read, and held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from libemc.errors import InputError
from libemc.io.files import StrPath
from libemc.io.geometry import Array
from libemc.io.mdoc import Mdoc, read_mdoc
from libemc.io.tilts import read_tilts, tilts_from_step

ANGLES_AGREE = 1.0
"""Degrees by which two lists of nominal angles of one stack may differ: some programs round to whole degrees."""
ANGLE_FILES = (".rawtlt", ".tlt")
"""Endings of files of angles, the raw ones first."""


@dataclass(frozen=True, eq=False)
class Acquisition:
    """What the files beside a stack say of it.

    Attributes:
        nominal: stage angles, degrees, (T,).
        mdoc: SerialEM's file, or None.
        files: those that were read.
        ignored: a found file that contradicts one that was asked for, and how, or None.
    """

    nominal: Array
    mdoc: Mdoc | None
    files: tuple[Path, ...]
    ignored: str | None = None


def beside(stack: StrPath, endings: tuple[str, ...]) -> Path | None:
    """The first file with the stack's stem (or whole name) and one of these endings, or None."""
    path = Path(stack)
    names = [name for ending in endings for name in (path.stem + ending, path.name + ending)]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def read_acquisition(
    stack: StrPath,
    count: int,
    rawtlt: Path | None = None,
    mdoc: Path | None = None,
    start_and_step: tuple[float, float] | None = None,
) -> Acquisition:
    """Angles and .mdoc of a stack: the files that are named, else those beside it.

    Args:
        stack: the stack; count: its images.
        rawtlt, mdoc: files to take; None: .rawtlt, .tlt and .mdoc beside the stack are taken where they are.
        start_and_step: degrees; angles that go before those of any file.

    Raises:
        InputError: there are no angles, a file is not of this stack, or two of equal standing contradict each other.
    """
    angle_file = None if start_and_step else rawtlt or (None if mdoc else beside(stack, ANGLE_FILES))
    mdoc_file = mdoc or beside(stack, (".mdoc",))
    read = None if mdoc_file is None else read_mdoc(mdoc_file, count)
    files = tuple(file for file in (angle_file, mdoc_file) if file is not None)
    if start_and_step is not None:
        nominal = tilts_from_step(*start_and_step, count)
    elif angle_file is not None:
        nominal = read_tilts(angle_file, count)
    elif read is not None:
        nominal = read.tilt
    elif count == 1:
        what = "holds one image and has no tilt angle beside it"
        raise InputError(what, stack, "give --tilt-start (0 for a micrograph), --rawtlt or --mdoc")
    else:
        raise InputError(
            "has no tilt angles beside it", stack, "give --rawtlt, --mdoc, or --tilt-start and --tilt-step"
        )
    if read is None or mdoc_file is None:
        return Acquisition(nominal, None, files)
    apart = float(np.abs(nominal - read.tilt).max())
    if apart <= ANGLES_AGREE:
        return Acquisition(nominal, read, files)
    what = f"its angles differ by up to {apart:.1f} degrees from those of {angle_file or 'start and step'}"
    chosen = rawtlt is not None or start_and_step is not None
    if not chosen or mdoc is not None:
        raise InputError(what, mdoc_file, "give the file that belongs to the stack with --rawtlt or --mdoc")
    return Acquisition(nominal, None, files[:-1], f"{mdoc_file} is ignored: {what}")
