"""Writers of what a microscope's computer writes beside a tilt series, and of a simulation's truth.

The simulator's output must look to every reader like real data: the stack in the types that detectors write (which our
own images never have), the tilt angles as .rawtlt, the acquisition as SerialEM's .mdoc.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import DTypeLike, NDArray

from libemc.io.files import write_text

MODES = {np.dtype(np.int8): 0, np.dtype(np.int16): 1, np.dtype(np.float32): 2, np.dtype(np.float16): 12}
START = datetime.datetime(2026, 1, 1, 10, 0)
MINUTES_PER_TILT = 1


@contextmanager
def detector_stack(
    path: Path, shape: tuple[int, int, int], pixel_size: float, dtype: DTypeLike
) -> Iterator[NDArray[Any]]:
    """An MRC image stack on disk, to be filled inside the `with` block; it takes its name when the block ends well.

    Args:
        path: the file.
        shape: (tilts, y, x).
        pixel_size: Å.
        dtype: int8, int16, float32 or float16 (a key of `MODES`).

    Yields:
        The pixels, a memory map of that shape.

    Raises:
        OSError: from the system, with the file's name; a full disk is found at the start.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with mrcfile.new_mmap(beside, shape=shape, mrc_mode=MODES[np.dtype(dtype)], overwrite=True) as mrc:
            _reserve(beside)
            mrc.set_image_stack()
            mrc.voxel_size = (pixel_size, pixel_size, pixel_size)
            yield mrc.data
            mrc.update_header_stats()
            mrc.flush()
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.filename not in (None, os.fspath(beside)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Take the disk that a mapped file will need: to run out of it while writing to the map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def write_rawtlt(path: Path, tilts: Sequence[float]) -> None:
    """Tilt angles in degrees, one line for each image of the stack."""
    write_text(path, "".join(f"{tilt:.2f}\n" for tilt in tilts))


def write_mdoc(path: Path, truth: Mapping[str, Any], stack: str, shape: tuple[int, int, int], mode: int) -> None:
    """What SerialEM knows of a tilt series: the nominal angles, doses, axis and target defocus, never the true ones.

    Args:
        path: the file.
        truth: the simulation's, for `apix`, `kv`, `nominal_axis`, `nominal_defocus`, `nominal`, `acq` and `dose`.
        stack: the file name of the image stack.
        shape: (tilts, y, x) of the stack.
        mode: its MRC mode.
    """
    axis = truth["nominal_axis"]
    lines = [
        f"PixelSpacing = {truth['apix']}",
        f"Voltage = {truth['kv']:g}",
        f"ImageFile = {stack}",
        f"ImageSize = {shape[2]} {shape[1]}",
        f"DataMode = {mode}",
        "",
        f"[T =     Tilt axis angle = {axis:.1f}, binning = 1  spot = 8  camera = 0]",
    ]
    for section, (tilt, order) in enumerate(zip(truth["nominal"], truth["acq"], strict=True)):
        taken = START + datetime.timedelta(minutes=MINUTES_PER_TILT * order)
        lines += [
            "",
            f"[ZValue = {section}]",
            f"TiltAngle = {tilt:.3f}",
            f"ExposureDose = {truth['dose']:.3f}",
            f"PriorRecordDose = {order * truth['dose']:.3f}",
            f"PixelSpacing = {truth['apix']}",
            f"RotationAngle = {axis:.2f}",
            f"Defocus = {-truth['nominal_defocus'] / 1e4:.4f}",
            f"DateTime = {taken:%d-%b-%y  %H:%M:%S}",
        ]
    write_text(path, "\n".join(lines) + "\n")


def _rounded(value: Any) -> Any:
    """Arrays as nested lists, numbers to five decimals, and nothing that isn't finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a truth has a value that is not finite")
        return round(value, 5)
    return value


def write_truth(path: Path, truth: Mapping[str, Any]) -> None:
    """Everything that is known of a simulated tilt series, as JSON with one key to a line."""
    rows = (f"{json.dumps(key)}: {json.dumps(_rounded(value), allow_nan=False)}" for key, value in truth.items())
    write_text(path, "{" + ",\n ".join(rows) + "}\n")
