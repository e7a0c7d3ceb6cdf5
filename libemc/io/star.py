"""STAR files over `starfile`: reading with errors a user can act on, and atomic writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.io.files import StrPath, parse_numbers, read_text, write_text
from libemc.io.geometry import Array

TEXT_COLUMNS = [
    "rlnTomoName", "rlnTomoParticleName", "rlnImageName", "rlnMicrographName", "rlnOpticsGroupName", "rlnGroupName",
    "rlnTomoTiltSeriesName", "rlnTomoTiltSeriesStarFile", "rlnTomoParticlesFile", "rlnTomoTomogramsFile",
    "rlnTomoVisibleFrames", "rlnTomoProjX", "rlnTomoProjY", "rlnTomoProjZ", "rlnTomoProjW",
]  # fmt: skip
"""Columns that stay text although they may look like numbers ("017")."""


def read_star(path: StrPath) -> dict[str, pd.DataFrame]:
    """The blocks of a STAR file by name, each as a table (a simple block is a table of one row).

    Raises:
        InputError: not a STAR file.
    """
    if "data_" not in read_text(path):
        raise InputError("is not a STAR file: it has no data_ block", path, "give a STAR file")
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=TEXT_COLUMNS)
    except Exception as error:  # whatever the library trips over is a line of this file
        reason = " ".join(str(error).split()[:15])
        raise InputError(f"is not a readable STAR file ({reason})", path, "correct or export it again") from None
    tables = {}
    for name, block in blocks.items():
        tables[name] = block if isinstance(block, pd.DataFrame) else pd.DataFrame([block])
    if not any(len(table.columns) for table in tables.values()):
        raise InputError("is a STAR file without values", path, "export it again")
    return tables


def block_with(blocks: Mapping[str, pd.DataFrame], column: str, path: StrPath) -> pd.DataFrame:
    """The first block that has a column; InputError if none has, or if it has no rows."""
    table = next((block for block in blocks.values() if column in block.columns), None)
    if table is None:
        raise InputError(f"has no block with {column}", path, "give a STAR file of the right kind")
    if not len(table):
        raise InputError(f"has no rows beside {column}", path, "it is empty: export it again")
    return table


def numbers(table: pd.DataFrame, column: str, path: StrPath, default: float | None = None) -> Array:
    """A column as float64; InputError if it is missing without a default, or not finite numbers."""
    if column not in table.columns:
        if default is None:
            raise InputError(f"has no column {column}", path, "export it with that column")
        return np.full(len(table), float(default))
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
        raise InputError(f"{column} of row {row} is not a finite number", path, "correct that line")
    return values


def optional(table: pd.DataFrame, column: str, path: StrPath) -> Array | None:
    """A column as float64, or None if the table does not have it."""
    return numbers(table, column, path) if column in table.columns else None


def texts(table: pd.DataFrame, column: str) -> list[str] | None:
    """A column as text, or None if the table does not have it."""
    return [str(value) for value in table[column]] if column in table.columns else None


def vectors(table: pd.DataFrame, column: str, path: StrPath) -> list[NDArray[np.float64]]:
    """A column of RELION's vectors, "[1,0,2.5]"; InputError if it is missing or not such vectors."""
    words = texts(table, column)
    if words is None:
        raise InputError(f"has no column {column}", path, "export it with that column")
    split = [word.strip("[]").replace(",", " ").split() for word in words]
    return [np.array(parse_numbers(row, path, line)) for line, row in enumerate(split, start=1)]


def write_star(path: StrPath, blocks: Mapping[str, Mapping[str, Any] | pd.DataFrame]) -> None:
    """Write blocks by name, whole or not at all: a mapping as a simple block, a table as a loop."""
    text = starfile.to_string(dict(blocks), float_format="%.6f")
    write_text(path, text if isinstance(text, str) else "\n".join(text))
