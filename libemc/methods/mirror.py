"""The other hand of a tilt series: the same images, seen as those of the specimen's mirror image.

Images alone do not tell a specimen from its mirror image. With the tilt axis turned by 180°, and every point r at -r,
Rz(axis + 180)·Ry(tilt)·Rx(xtilt)·(-r) has the q_x and q_y of convention 5 and the opposite q_z. So every image position stays,
with its shift, magnification and deformation, and every defocus, with the opposite handedness (convention 13).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from libemc.records import TiltSeriesRecord

Vector = tuple[float, float, float]


def mirrored(record: TiltSeriesRecord) -> TiltSeriesRecord:
    """The record of a tilt series with its hand changed.

    Turned are the alignment's axis and the nominal one; landmarks and picks go through the origin; the defocus handedness
    changes its sign. Tomograms, which show the other hand, are no longer listed. Whether the hand is open stays as it is.

    The density at -r + R·u is now what was at r - R·u. So rotations R of picks stay, for the reference inverted through
    its origin; for any other reference they have to be found again.

    The nominal axis ends up on the side of the alignment's, where a new alignment begins; where it wasn't known, it's
    the alignment's.
    """
    alignment, ctf, axis = record.alignment, record.ctf, record.source.tilt_axis
    if alignment is not None:
        landmarks = alignment.landmarks
        turned = _turned(alignment.axis)
        if landmarks is not None:
            landmarks = landmarks.model_copy(update={"xyz": _inverted(landmarks.xyz)})
        alignment = alignment.model_copy(update={"axis": turned, "landmarks": landmarks})
        middle = float(np.median(turned))
        axis = middle if axis is None else _on_the_side_of(middle, axis)
    elif axis is not None:
        (axis,) = _turned((axis,))
    if ctf is not None:
        ctf = ctf.model_copy(update={"defocus_handedness": -ctf.defocus_handedness})
    changed = {
        "source": record.source.model_copy(update={"tilt_axis": axis}),
        "alignment": alignment,
        "ctf": ctf,
        "tomograms": (),
        "picks": {k: v.model_copy(update={"xyz": _inverted(v.xyz)}) for k, v in record.picks.items()},
    }
    return record.model_copy(update=changed)


def summary(before: TiltSeriesRecord, after: TiltSeriesRecord) -> str:
    """One line: what `mirrored` has changed, and what has to be made again."""
    parts = []
    if before.alignment is not None and after.alignment is not None:
        parts.append(f"tilt axis {np.median(before.alignment.axis):.1f}° now {np.median(after.alignment.axis):.1f}°")
    elif after.source.tilt_axis is not None:
        parts.append(f"nominal tilt axis now {after.source.tilt_axis:.1f}°")
    if after.ctf is not None:
        parts.append(f"defocus handedness now {after.ctf.defocus_handedness:+d}")
    landmarks = before.alignment.landmarks if before.alignment is not None else None
    counts = [f"{len(landmarks.xyz)} landmarks"] if landmarks is not None else []
    counts += [f"{len(picks.xyz)} picks {label}" for label, picks in before.picks.items()]
    if counts:
        parts.append(f"{', '.join(counts)} inverted")
    if any(picks.rot is not None for picks in before.picks.values()):
        parts.append("orientations are those of the inverted reference")
    again = "extract its particles again"
    if before.tomograms:
        again = f"make its tomograms again (emc_tomogram {before.name} --load --overwrite), and {again}"
    return f"{before.name}: {', '.join(parts)}; {again}" if parts else f"{before.name}: {again}"


def _inverted(points: Sequence[Vector]) -> tuple[Vector, ...]:
    return tuple((0.0 - x, 0.0 - y, 0.0 - z) for x, y, z in points)  # not -x: a record has no use for -0.0


def _turned(axes: Sequence[float]) -> tuple[float, ...]:
    """The axes turned by 180°, all the same way, so that neighbours stay neighbours; their median in (-180, 180]."""
    middle = float(np.median(axes))
    half_turns = round((180 - -middle % 360 - middle) / 180)
    return tuple(axis + 180.0 * half_turns for axis in axes)


def _on_the_side_of(middle: float, axis: float) -> float:
    """`axis` or its opposite, whichever is nearer."""
    return axis + 180.0 * round((middle - axis) / 180)
