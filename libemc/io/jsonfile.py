"""Alignments and CTFs in JSON: any object with an "alignment" section (and "ctf", "tilts") named as in our records."""

from __future__ import annotations

from typing import Any

import numpy as np

from libemc.errors import InputError
from libemc.io.files import StrPath, read_json
from libemc.io.geometry import Alignment, Array, Ctf


def per_tilt(
    section: dict[str, Any], key: str, path: StrPath, count: int | None, default: float | None = None
) -> Array:
    """A list of a section, or one number for all tilts, as float64 (T,).

    Raises:
        InputError: missing without a default, not finite numbers, or another length than `count`.
    """
    value = section.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"has no {key}", path, f"write {key} as a list of one number per tilt")
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{key} is not a list of numbers", path, "write one number per tilt") from None
    if not np.isfinite(numbers).all() or numbers.ndim > 1:
        raise InputError(f"{key} is not a list of finite numbers", path, "write one number per tilt")
    if numbers.ndim == 0:
        return np.full(1 if count is None else count, float(numbers))
    if count is not None and len(numbers) != count:
        raise InputError(f"{key} has {len(numbers)} entries for {count} tilts", path, "write one number per tilt")
    return numbers


def pair(section: dict[str, Any], key: str, path: StrPath) -> tuple[float, float] | None:
    """Two numbers of a section, or None where it does not say them.

    Raises:
        InputError: it says something else.
    """
    if section.get(key) is None:
        return None
    try:
        numbers = np.asarray(section[key], dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape != (2,) or not np.isfinite(numbers).all():
        raise InputError(f"{key} is not two finite numbers", path, f"write {key} as [x, y]")
    return float(numbers[0]), float(numbers[1])


def read_json_alignment(path: StrPath, count: int | None = None) -> tuple[Alignment, Ctf | None]:
    """Alignment and, if there is one, CTF of a JSON file in our own conventions and names.

    Raises:
        InputError: not JSON, no "alignment" section, or lists of unequal length.
    """
    data = read_json(path)
    section = data.get("alignment")
    if not isinstance(section, dict):
        raise InputError('has no "alignment" section', path, "write alignment: {axis, tilt, shift_x, shift_y}")
    tilt = per_tilt(section, "tilt", path, count)
    count = len(tilt)
    use = np.ones(count, bool)
    if isinstance(data.get("tilts"), dict) and data["tilts"].get("use") is not None:
        use = per_tilt(data["tilts"], "use", path, count) > 0
    alignment = Alignment(
        tilt=tilt,
        axis=per_tilt(section, "axis", path, count),
        xtilt=per_tilt(section, "xtilt", path, count, 0.0),
        shift_x=per_tilt(section, "shift_x", path, count),
        shift_y=per_tilt(section, "shift_y", path, count),
        magnification=per_tilt(section, "magnification", path, count, 1.0),
        use=use,
    )
    if not isinstance(data.get("ctf"), dict):
        return alignment, None
    section = data["ctf"]
    hand = section.get("defocus_handedness")
    if hand not in (None, -1, 1):
        raise InputError(f"defocus_handedness is {hand}", path, "write -1 or 1")
    defocus_u = per_tilt(section, "defocus_u", path, count)
    return alignment, Ctf(
        defocus_u=defocus_u,
        defocus_v=per_tilt(section, "defocus_v", path, count) if section.get("defocus_v") is not None else defocus_u,
        angle=per_tilt(section, "angle", path, count, 0.0),
        phase_shift=per_tilt(section, "phase_shift", path, count, 0.0),
        handedness=hand,
        beam_tilt=pair(section, "beam_tilt", path),
    )
