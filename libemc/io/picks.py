"""Coordinates of particles: csv and plain text, STAR, Dynamo .tbl, IMOD .mod, and JSON with a "picks" entry.

Positions leave this file in Å from the tomogram's centre (pixel n//2), poses as RELION's Euler angles.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from libemc.errors import InputError
from libemc.io.files import StrPath, parse_numbers, read_bytes, read_json, read_table, read_text
from libemc.io.geometry import Array, Picks, euler_from_matrix, rotation_matrix
from libemc.io.relion import WARP_SUFFIX, read_origins, read_poses
from libemc.io.star import block_with, numbers, optional, read_star, texts

Shape = tuple[int, int, int]
CSV_COLUMNS: dict[int, tuple[str, ...]] = {
    3: ("x", "y", "z"),
    4: ("x", "y", "z", "score"),
    6: ("x", "y", "z", "rot", "tilt", "psi"),
    7: ("x", "y", "z", "rot", "tilt", "psi", "score"),
}
"""What the columns of a text file without a header mean, by their number."""
SCORES = ("rlnAutopickFigureOfMerit", "rlnLogLikeliContribution", "rlnMaxValueProbDistribution")
MOD_UNITS = {-9: 10.0, -10: 1.0, -6: 1e4}
"""Å in the unit of a model's pixel size, by IMOD's power of ten (model file format)."""


def _in_angstroms(index: ArrayLike, shape: Shape | None, pixel_size: float | None, path: StrPath) -> Array:
    """Å from the centre of voxels (N, 3), (x, y, z) counted from 0; InputError if shape or pixel size is not given."""
    if shape is None or pixel_size is None:
        raise InputError("has coordinates in pixels", path, "give the tomogram that they refer to")
    return (np.asarray(index, dtype=np.float64) - np.array(shape[::-1]) // 2) * pixel_size


def _read_csv(path: StrPath) -> Picks:
    rows: list[list[float]] = []
    names: tuple[str, ...] | None = None
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = [word for word in re.split(r"[,;\s]+", line.split("#")[0].strip()) if word]
        if not words:
            continue
        if not rows and names is None and all(word[0].isalpha() for word in words) and "x" in map(str.lower, words):
            names = tuple(word.lower() for word in words)
            continue
        names = names or CSV_COLUMNS.get(len(words))
        if names is None or len(words) != len(names):
            wanted = "3, 4, 6 or 7" if names is None else str(len(names))
            raise InputError(f"line {number} has {len(words)} columns, not {wanted}", path, "correct that line")
        rows.append(parse_numbers(words, path, number))
    if not rows or names is None:
        raise InputError("has no coordinates in it", path, "give x y z in Å from the tomogram's centre, one a line")
    table = dict(zip(names, np.array(rows).T, strict=True))
    if not {"x", "y", "z"} <= table.keys():
        raise InputError(
            f"has columns {', '.join(names)}", path, "name them x, y, z and, if there are, rot, tilt, psi, score"
        )
    pose = {key: table[key] for key in ("rot", "tilt", "psi") if {"rot", "tilt", "psi"} <= table.keys()}
    return Picks(np.stack([table["x"], table["y"], table["z"]], axis=-1), score=table.get("score"), **pose)


def _read_star(path: StrPath, shape: Shape | None, pixel_size: float | None, name: str | None) -> Picks:
    blocks = read_star(path)
    centred = any("rlnCenteredCoordinateXAngst" in block.columns for block in blocks.values())
    table = block_with(blocks, "rlnCenteredCoordinateXAngst" if centred else "rlnCoordinateX", path)
    tomograms = texts(table, "rlnTomoName") or texts(table, "rlnMicrographName")
    if tomograms is not None and (name is not None or len(set(tomograms)) > 1):
        plain = [Path(tomogram.removesuffix(WARP_SUFFIX)).name for tomogram in tomograms]
        here = [tomogram == name or Path(tomogram).stem == name for tomogram in plain]
        if not any(here) and len(set(plain)) > 1:
            listed = ", ".join(sorted(set(plain))[:5])
            raise InputError(f"has no picks of {name}", path, f"it has those of {listed}")
        table = table[np.array(here)] if any(here) else table
    if centred:
        xyz = np.stack([numbers(table, f"rlnCenteredCoordinate{axis}Angst", path) for axis in "XYZ"], axis=-1)
    else:
        pixels = np.stack([numbers(table, f"rlnCoordinate{axis}", path) for axis in "XYZ"], axis=-1)
        xyz = _in_angstroms(pixels, shape, pixel_size, path)
    pose: dict[str, Array] = {}
    if "rlnAngleRot" in table.columns:
        pose = dict(zip(("rot", "tilt", "psi"), read_poses(table, path), strict=True))
    scores = [optional(table, column, path) for column in SCORES if column in table.columns]
    return Picks(xyz - read_origins(table, path), score=scores[0] if scores else None, **pose)


def _read_tbl(path: StrPath, shape: Shape | None, pixel_size: float | None) -> Picks:
    """Dynamo: columns 4-6 shift, 7-9 tdrot tilt narot, 10 score, 24-26 position; voxels counted from 1.

    The angles turn the particle onto the reference, zxz about fixed axes: R is the inverse.
    """
    rows = read_table(path)
    if min(map(len, rows)) < 26:
        raise InputError("has lines of fewer than 26 columns", path, "give a table of Dynamo")
    table = np.array([row[:26] for row in rows])
    tdrot, tilt, narot = table[:, 6:9].T
    onto_reference = rotation_matrix("z", narot) @ rotation_matrix("x", tilt) @ rotation_matrix("z", tdrot)
    rot, theta, psi = euler_from_matrix(onto_reference.swapaxes(-1, -2))
    xyz = _in_angstroms(table[:, 23:26] + table[:, 3:6] - 1, shape, pixel_size, path)
    return Picks(xyz, rot=rot, tilt=theta, psi=psi, score=table[:, 9])


def _read_mod(path: StrPath, shape: Shape | None, pixel_size: float | None) -> Picks:
    """IMOD's binary model: the points of all contours of all objects.

    In a model the middle of the first voxel is at (0.5, 0.5, 0). Shape and pixel size default to the model's own.
    """
    data = read_bytes(path)
    if data[:4] != b"IMOD" or len(data) < 240:
        raise InputError("is not an IMOD model", path, "give a .mod file that 3dmod wrote")
    sides = struct.unpack_from(">3i", data, 136)
    pixel, units = struct.unpack_from(">fi", data, 216)
    if shape is None and min(sides) > 0:
        shape = (sides[2], sides[1], sides[0])
    if pixel_size is None and units in MOD_UNITS and pixel > 0:
        pixel_size = pixel * MOD_UNITS[units]
    points, at = [], 240
    try:
        while at + 4 <= len(data) and (kind := data[at : at + 4]) != b"IEOF":
            if kind == b"OBJT":
                size = 176
            elif kind == b"MESH":
                vertices, indices = struct.unpack_from(">2i", data, at + 4)
                size = 16 + 12 * vertices + 4 * indices
            elif kind == b"CONT":
                (count,) = struct.unpack_from(">i", data, at + 4)
                size = 16 + 12 * count
                points.append(np.frombuffer(data[at + 20 : at + 4 + size], ">f4").reshape(count, 3))
            else:
                size = 4 + struct.unpack_from(">i", data, at + 4)[0]
            if size < 0:
                raise ValueError(kind)
            at += 4 + size
    except (struct.error, ValueError):
        raise InputError("is cut short or damaged", path, "save the model again in 3dmod") from None
    if not sum(map(len, points)):
        raise InputError("has no points", path, "pick some in 3dmod and save the model")
    return Picks(_in_angstroms(np.concatenate(points) - (0.5, 0.5, 0.0), shape, pixel_size, path))


def picks_from_json(entry: Any, path: StrPath) -> Picks:
    """A "picks" entry: {"xyz": [[x, y, z], …], "rot": […], …}, or the list of positions alone; Å and degrees."""
    if isinstance(entry, list):
        entry = {"xyz": entry}
    try:
        xyz = np.array(entry["xyz"], dtype=np.float64).reshape(-1, 3)
        pose = {
            key: np.array(entry[key], dtype=np.float64) for key in ("rot", "tilt", "psi") if entry.get(key) is not None
        }
        score = None if entry.get("score") is None else np.array(entry["score"], dtype=np.float64)
        picks = Picks(xyz, score=score, **pose)
    except (KeyError, TypeError, ValueError):
        what = 'has a "picks" entry that is not lists of equal length'
        raise InputError(what, path, "write xyz as [[x, y, z], ...] and rot, tilt, psi, score as [...]") from None
    if len(pose) not in (0, 3):
        raise InputError("has some of rot, tilt, psi, but not all", path, "give all three or none")
    return picks


def _read_json(path: StrPath, label: str | None) -> Picks:
    data = read_json(path)
    if "picks" not in data:
        raise InputError('has no "picks" entry', path, 'name it "picks", with xyz in Å from the centre')
    entry = data["picks"]
    if isinstance(entry, dict) and "xyz" not in entry:
        if label not in entry and len(entry) != 1:
            raise InputError(f"has no picks of label {label}", path, f"it has {', '.join(list(entry)[:5]) or 'none'}")
        entry = entry.get(label, next(iter(entry.values())))
    return picks_from_json(entry, path)


def read_picks(
    path: StrPath,
    *,
    shape: Shape | None = None,
    pixel_size: float | None = None,
    name: str | None = None,
    label: str | None = None,
) -> Picks:
    """Positions, and poses and scores where there are, from a file of any kind, told by its ending.

    Args:
        path: .csv or .txt (Å from the centre: x y z, with rot tilt psi and score if there are more columns or a header
            names them), .star, .tbl (Dynamo), .mod (IMOD), .json.
        shape: [z, y, x] of the tomogram that pixel coordinates refer to.
        pixel_size: Å of that tomogram.
        name: the tilt series, to choose its rows of a STAR file of several.
        label: to choose an entry of a JSON file of several.

    Raises:
        InputError: a file that is not of its kind, empty, or in pixels without shape and pixel size.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".star":
        return _read_star(path, shape, pixel_size, name)
    if suffix == ".tbl":
        return _read_tbl(path, shape, pixel_size)
    if suffix == ".mod":
        return _read_mod(path, shape, pixel_size)
    if suffix == ".json":
        return _read_json(path, label)
    if suffix in (".csv", ".txt", ".tsv", ".xyz", ".coords"):
        return _read_csv(path)
    raise InputError("is no kind of coordinate file", path, "give .csv, .txt, .star, .tbl, .mod or .json")
