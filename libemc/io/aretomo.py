"""AreTomo: the .aln alignment, and the CTF table that AreTomo and CTFFIND share.

ROT is our axis, TX and TY are our shifts in pixels, TILT is our tilt with AlphaOffset already in it; AreTomo's own
exporter writes the .xf of them as A = Rz(-ROT), d = -A·(TX, TY). Its image centre is n/2, so there is no half pixel.
The local alignment of a file is not read.
"""

from __future__ import annotations

import re

import numpy as np

from libemc.errors import InputError
from libemc.io.files import StrPath, parse_numbers, read_text
from libemc.io.geometry import Alignment, Array, Ctf

ANGLE_TOLERANCE = 1.0
"""Degrees by which aligned and nominal angles may differ, after one common offset, and still be the same image."""
UNRESOLVED = 999.0
"""Å, for the inf that CTFFIND writes where no ring was fitted; RELION's number for the same."""
_HEADER = re.compile(r"#\s*(RawSize|AlphaOffset)\s*=\s*(.*)")


def _sections(numbers: Array, tilt: Array, total: int, nominal: Array | None, path: StrPath) -> np.ndarray:
    """Place in the raw stack (from 0) of the lines that the file numbers so.

    Versions of AreTomo count from 0 or from 1, in the order of the stack or of the angle: the nominal angles tell.
    """
    first = int(numbers.min())
    if nominal is None:
        base = 1 if first >= 1 and int(numbers.max()) >= total else 0
        candidates = [numbers.astype(int) - base]
    else:
        by_angle = np.argsort(nominal, kind="stable")
        plain = [numbers.astype(int) - base for base in (0, 1)]
        plain = [p for p in plain if p.min() >= 0 and p.max() < total]
        candidates = [*plain, *(by_angle[p] for p in plain)]
    candidates = [c for c in candidates if c.min() >= 0 and c.max() < total and len(set(c.tolist())) == len(c)]
    if not candidates:
        raise InputError(f"numbers sections beyond the {total} images", path, "give the file that belongs to the stack")
    if nominal is None:
        return candidates[0]
    differences = [tilt - nominal[c] for c in candidates]
    worst = [float(np.abs(d - np.median(d)).max()) for d in differences]
    offset = [abs(float(np.median(d))) for d in differences]
    best = min(range(len(candidates)), key=lambda i: (worst[i] > ANGLE_TOLERANCE, offset[i], worst[i]))
    if worst[best] > ANGLE_TOLERANCE:
        raise InputError(
            f"has angles that differ by {worst[best]:.1f} degrees from the tilt series'",
            path,
            "give the file of this stack",
        )
    return candidates[best]


def read_aln(path: StrPath, *, pixel_size: float, count: int | None = None, nominal: Array | None = None) -> Alignment:
    """An alignment from AreTomo's .aln; images that it left out as dark keep their place with `use` False.

    Args:
        path: the file.
        pixel_size: Å of the raw images.
        count: images in the raw stack, checked against RawSize (None: RawSize).
        nominal: nominal angles of the raw stack, degrees, (T,), by which lines find their images.

    Raises:
        InputError: not such a file, or not of this stack.
    """
    lines, total, alpha = [], None, 0.0
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.startswith("# Local Alignment"):
            break
        header = _HEADER.match(line)
        if header and header[1] == "RawSize":
            total = int(parse_numbers(header[2].split()[2:3] or ["?"], path, number)[0])
        elif header:
            alpha = parse_numbers(header[2].split()[:1] or ["?"], path, number)[0]
        if line.startswith("#") or not line.strip():
            continue
        words = line.split()
        if len(words) != 10:
            raise InputError(f"line {number} has {len(words)} columns, not 10", path, "give an .aln file of AreTomo")
        lines.append(parse_numbers(words, path, number))
    if not lines or total is None:
        raise InputError("is not an .aln file", path, "give an .aln file of AreTomo")
    if count is not None and count != total:
        raise InputError(f"is of {total} images, not {count}", path, "give the file that belongs to the stack")
    table = np.array(lines)
    place = _sections(table[:, 0], table[:, 9] - alpha, total, nominal, path)
    use = np.zeros(total, bool)
    use[place] = True
    offset = 0.0 if nominal is None else float(np.median(table[:, 9] - nominal[place]))
    tilt = np.zeros(total) if nominal is None else nominal + offset
    axis, shift_x, shift_y = np.full(total, np.median(table[:, 1])), np.zeros(total), np.zeros(total)
    tilt[place], axis[place] = table[:, 9], table[:, 1]
    shift_x[place], shift_y[place] = table[:, 3] * pixel_size, table[:, 4] * pixel_size
    return Alignment(tilt=tilt, axis=axis, shift_x=shift_x, shift_y=shift_y, use=use)


def read_ctf_table(path: StrPath, count: int | None = None) -> Ctf:
    """The CTF table of AreTomo (_CTF.txt) and CTFFIND 4 and 5: one line per image, phase shift in radians.

    Raises:
        InputError: not such a table, or not `count` lines.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split("#")[0].split()
        if words and len(words) < 7:
            raise InputError(
                f"line {number} has {len(words)} columns, not 7", path, "give a CTF table of CTFFIND or AreTomo"
            )
        if words:
            unresolved = words[6].lower() in ("inf", "nan", "-nan")
            rows.append(parse_numbers([*words[:6], str(UNRESOLVED) if unresolved else words[6]], path, number))
    if not rows:
        raise InputError("has no numbers in it", path, "copy or make it again")
    table = np.array(rows)
    if count is not None and len(table) != count:
        raise InputError(f"has {len(table)} lines for {count} images", path, "give the file that belongs to the stack")
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Ctf(
        defocus_u=table[:, 1],
        defocus_v=table[:, 2],
        angle=table[:, 3],
        phase_shift=np.rad2deg(table[:, 4]),
        score=table[:, 5],
        resolution=table[:, 6],
    )
