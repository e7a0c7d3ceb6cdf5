"""IMOD: alignments (.xf, .tlt, .xtilt), and ctfplotter's .defocus.

IMOD takes raw to aligned images by x_aligned = A·(x_raw - c) + c + d with c = (n - 1)/2 in pixels counted from 0, and
tilts the aligned images about the vertical through their centre. Ours takes specimen to raw image about pixel n//2: the
half pixel between the two centres of an even image is added here, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from libemc.errors import InputError
from libemc.io.files import StrPath, read_table, write_text
from libemc.io.geometry import Alignment, Array, Ctf
from libemc.io.tilts import read_tilts, write_tilts

NANOMETRE = 10.0
"""Å"""
ASTIGMATISM, ANGLE_IN_RADIANS, PHASE_SHIFT, PHASE_IN_RADIANS = 1, 2, 4, 8
"""Flags in the first line of a .defocus file (IMOD's manual, ctfphaseflip)."""


def _centre_offset(shape: tuple[int, int]) -> Array:
    """IMOD's centre minus ours, px, (x, y), of images (y, x): -1/2 where n is even."""
    n = np.array(shape[::-1])
    return (n - 1) / 2 - n // 2


def read_imod_alignment(
    xf: StrPath,
    tlt: StrPath,
    xtilt: StrPath | None = None,
    *,
    shape: tuple[int, int],
    pixel_size: float,
    binning: float = 1.0,
) -> Alignment:
    """An alignment from IMOD's files.

    A rotation and a magnification are what our geometry holds: they are the nearest to each A, and what is left over is
    `Alignment.distortion`. A tilt whose line is exactly the identity among others that are not was left out of the
    alignment (AreTomo writes dark images so): its `use` is False and its axis that of the others.

    Args:
        xf: transforms, "A11 A12 A21 A22 dx dy" a line, of the raw images.
        tlt: tilt angles, degrees.
        xtilt: tilts about x, degrees (None: 0).
        shape: (y, x) of the raw images, px.
        pixel_size: Å of the raw images.
        binning: of the images that the .xf was made on, relative to the raw ones.

    Raises:
        InputError: an unreadable file, files of different lengths, or a transform that mirrors or flattens.
    """
    rows = np.array(read_table(xf, (6,)))
    transforms, d = rows[:, :4].reshape(-1, 2, 2), rows[:, 4:] * binning
    determinant = np.linalg.det(transforms)
    if determinant.min() <= 1e-6:
        raise InputError(f"line {int(determinant.argmin()) + 1} mirrors or flattens the image", xf, "align it again")
    count = len(rows)
    tilt = read_tilts(tlt, count)
    angle = np.arctan2(transforms[:, 1, 0] - transforms[:, 0, 1], transforms[:, 0, 0] + transforms[:, 1, 1])
    magnification = determinant**-0.5
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1).reshape(-1, 2, 2)
    distortion = float(np.abs(transforms * magnification[:, None, None] - turn).max())
    left_out = (rows == (1, 0, 0, 1, 0, 0)).all(axis=1)
    left_out &= not left_out.all()
    axis = -np.rad2deg(angle)
    axis[left_out] = np.median(axis[~left_out])
    centre = -np.linalg.solve(transforms, d[..., None])[..., 0] + _centre_offset(shape)
    shift = centre * pixel_size / magnification[:, None]
    return Alignment(
        tilt=tilt,
        axis=axis,
        shift_x=shift[:, 0],
        shift_y=shift[:, 1],
        xtilt=0.0 if xtilt is None else read_tilts(xtilt, count),  # type: ignore[arg-type]
        magnification=magnification,
        use=~left_out,
        distortion=distortion,
    )


def write_imod_alignment(
    alignment: Alignment, stem: StrPath, *, shape: tuple[int, int], pixel_size: float, binning: float = 1.0
) -> tuple[Path, Path, Path]:
    """Write stem.xf, stem.tlt and stem.xtilt; the inverse of `read_imod_alignment`. Returns the three paths."""
    angle = -np.deg2rad(alignment.axis)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1).reshape(-1, 2, 2)
    transforms = turn / alignment.magnification[:, None, None]
    shift = np.stack([alignment.shift_x, alignment.shift_y], axis=-1)
    centre = alignment.magnification[:, None] * shift / pixel_size - _centre_offset(shape)
    d = -np.einsum("tij,tj->ti", transforms, centre) / binning
    lines = np.concatenate([transforms.reshape(-1, 4), d], axis=1)
    paths = tuple(Path(f"{stem}{suffix}") for suffix in (".xf", ".tlt", ".xtilt"))
    write_text(paths[0], "".join("".join(f"{v:14.9f}" for v in line) + "\n" for line in lines))
    write_tilts(paths[1], alignment.tilt)
    write_tilts(paths[2], alignment.xtilt)
    return paths[0], paths[1], paths[2]


def read_defocus(path: StrPath, count: int | None = None) -> Ctf:
    """Defocus of each view from ctfplotter's .defocus file, any of its variants.

    A line covers a range of views; its values hold at the middle of the range, views between are interpolated and views
    beyond take the nearest. Files without a version count views from 1, or from 0 if they name view 0.

    Args:
        path: the file.
        count: views in the stack (None: up to the last that the file names).

    Raises:
        InputError: not such a file, or views beyond `count`.
    """
    rows = read_table(path)
    flags = 0
    if len(rows[0]) == 6 and rows[0][5] == 3 and not any(rows[0][2:5]):
        flags = int(rows.pop(0)[0])
    needed = 5 + (2 if flags & ASTIGMATISM else 0) + (1 if flags & PHASE_SHIFT else 0)
    short = next((i for i, row in enumerate(rows) if len(row) < needed), None)
    if not rows or short is not None:
        raise InputError(f"does not have {needed} columns in every line", path, "give a .defocus file of ctfplotter")
    table = np.array([row[:needed] for row in rows])
    table = table[np.argsort(table[:, :2].mean(axis=1), kind="stable")]
    first = 0 if table[:, 0].min() == 0 else 1
    middle = table[:, :2].mean(axis=1) - first
    if middle.min() < 0 or (count is not None and table[:, 1].max() - first >= count):
        raise InputError(
            f"names view {table[:, 1].max():g} of {count}", path, "give the file that belongs to the stack"
        )
    views = np.arange(int(table[:, 1].max()) - first + 1 if count is None else count)

    def per_view(values: Array) -> Array:
        return np.interp(views, middle, values)

    u = per_view(table[:, 4]) * NANOMETRE
    v, angle, phase = u, np.zeros(len(views)), np.zeros(len(views))
    if flags & ASTIGMATISM:
        v = per_view(table[:, 5]) * NANOMETRE
        twice = 2 * (table[:, 6] if flags & ANGLE_IN_RADIANS else np.deg2rad(table[:, 6]))
        angle = np.rad2deg(np.arctan2(per_view(np.sin(twice)), per_view(np.cos(twice)))) / 2
    if flags & PHASE_SHIFT:
        last = per_view(table[:, needed - 1])
        phase = np.rad2deg(last) if flags & PHASE_IN_RADIANS else last
    return Ctf(defocus_u=u, defocus_v=v, angle=angle, phase_shift=phase)
