"""SerialEM's .mdoc: what the microscope knew of each tilt, over `mdocfile`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
from mdocfile.data_models import Mdoc as MdocFile
from mdocfile.data_models import MdocSectionData
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.io.files import StrPath, read_text
from libemc.io.geometry import Array

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
"""English, whatever the locale: SerialEM and Tomography write them so."""
MICROMETRE = 1e4
"""Å"""
_AXIS = re.compile(r"tilt\s*axis\s*angle\s*=\s*([-+]?[\d.]+)", re.IGNORECASE)
_DATE = re.compile(r"(\d+)-([A-Za-z]{3})-(\d+)\s+(\d+):(\d+):(\d+)")


@dataclass(frozen=True, eq=False)
class Mdoc:
    """What an .mdoc says, one entry per section in the order of ZValue; None where it does not say.

    Attributes:
        z: ZValue of each section, its place in the stack (its place in the file for frame mdocs), (T,).
        tilt: stage angle, degrees, (T,).
        order: 0 for the first exposure, (T,): by time, then dose before, then place.
        dose: e/Å² of each exposure, (T,).
        dose_before: e/Å² before each exposure, (T,): PriorRecordDose, or the sum of doses in `order`.
        defocus: Å, underfocus positive, (T,): the lens reading, which the stage height offsets.
        target_defocus: Å, underfocus positive, (T,).
        frames: file names of the movie of each tilt.
        pixel_size: Å.
        voltage: kV.
        tilt_axis: degrees (the title's "Tilt axis angle"; else RotationAngle, which some set-ups write 90 degrees off).
        image_file: the stack it was written for.
    """

    z: NDArray[np.int64]
    tilt: Array
    order: NDArray[np.int64] | None
    dose: Array | None
    dose_before: Array | None
    defocus: Array | None
    target_defocus: Array | None
    frames: list[str] | None
    pixel_size: float | None
    voltage: float | None
    tilt_axis: float | None
    image_file: str | None


def _time(text: str | None) -> datetime | None:
    """SerialEM's 06-Jun-23  23:19:46 or Tomography's 2023-Jun-06 23:19:46; None if it is neither."""
    match = _DATE.search(text or "")
    if not match or match[2].lower() not in MONTHS:
        return None
    first, last = int(match[1]), int(match[3])
    year, day = (first, last) if first > 31 else (last + (2000 if last < 100 else 0), first)
    try:
        return datetime(year, MONTHS.index(match[2].lower()) + 1, day, int(match[4]), int(match[5]), int(match[6]))
    except ValueError:
        return None


def _parse(path: StrPath) -> MdocFile:
    text = read_text(path)
    if "[ZValue" not in text and "[FrameSet" not in text:
        raise InputError("has no [ZValue = …] section", path, "give the .mdoc that SerialEM wrote beside the stack")
    log = logging.getLogger("mdocfile")  # it tells of every key that it has no name for
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return MdocFile.from_string(text)
    except Exception as error:  # whatever the library trips over is a line of this file
        reason = " ".join(str(error).split()[:18])
        raise InputError(f"is not a readable mdoc ({reason})", path, "correct that line") from None
    finally:
        log.setLevel(level)


def read_mdoc(path: StrPath, count: int | None = None) -> Mdoc:
    """Read a tilt series' .mdoc.

    Args:
        path: the file.
        count: images in the stack, to check against.

    Raises:
        InputError: no sections, a section without a tilt angle, the same ZValue twice, or not `count` sections.
    """
    mdoc = _parse(path)
    sections = list(mdoc.section_data)
    if all(section.ZValue is not None for section in sections):
        sections.sort(key=lambda section: section.ZValue)
    z = np.array([place if s.ZValue is None else s.ZValue for place, s in enumerate(sections)])
    if len(set(z.tolist())) != len(z):
        raise InputError("has the same ZValue twice", path, "remove the sections that were written over")
    if count is not None and len(z) != count:
        raise InputError(f"has {len(z)} sections for {count} images", path, "give the mdoc that belongs to the stack")

    def column(get: Callable[[MdocSectionData], Any]) -> Array | None:
        values = [get(section) for section in sections]
        if any(value is None for value in values):
            return None
        return np.array(values, dtype=np.float64)

    tilt = column(lambda s: s.TiltAngle)
    if tilt is None:
        raise InputError("has a section without TiltAngle", path, "give the angles in a .rawtlt file instead")
    prior, dose = column(lambda s: s.PriorRecordDose), column(lambda s: s.ExposureDose)
    times = [_time(s.DateTime) for s in sections]
    order = None
    if all(times) or (prior is not None and len(np.unique(prior)) == len(prior)):
        keys = [  # time has whole seconds, so the dose decides between exposures of the same one
            (times[i] if all(times) else None, 0.0 if prior is None else prior[i], i) for i in range(len(sections))
        ]
        order = np.argsort(sorted(range(len(sections)), key=lambda i: keys[i][0 if all(times) else 1 :]))
    if dose is not None and not dose.any():
        dose = None
    if prior is not None and not prior.any():
        prior = None
    if prior is None and dose is not None and order is not None:
        by_order = dose[np.argsort(order)]
        prior = (np.cumsum(by_order) - by_order)[order]
    defocus, target = column(lambda s: s.Defocus), column(lambda s: s.TargetDefocus)
    frames = [PureWindowsPath(str(s.SubFramePath)).name for s in sections if s.SubFramePath]
    axis = next((float(m[1]) for title in mdoc.titles if (m := _AXIS.search(title))), sections[0].RotationAngle)
    spacing = mdoc.global_data.PixelSpacing or sections[0].PixelSpacing
    return Mdoc(
        z=z,
        tilt=tilt,
        order=order,
        dose=dose,
        dose_before=prior,
        defocus=None if defocus is None else -MICROMETRE * defocus,
        target_defocus=None if target is None else -MICROMETRE * target,
        frames=frames if len(frames) == len(sections) else None,
        pixel_size=spacing or None,
        voltage=mdoc.global_data.Voltage or sections[0].Voltage,
        tilt_axis=axis,
        image_file=None if mdoc.global_data.ImageFile is None else str(mdoc.global_data.ImageFile),
    )
