"""Whole files: text in, and text and copies out, atomically. Every format of this room reads and writes through here."""

from __future__ import annotations

import json
import math
import os
import secrets
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from libemc.errors import InputError
from libemc.replacement import Replacement, write_bytes

StrPath = str | PathLike[str]

COPIED_AT_ONCE = 1 << 24
"""Bytes."""


def read_bytes(path: StrPath, limit: int | None = None) -> bytes:
    """The first `limit` bytes (all: None) of a file; InputError if it is missing, a folder, unreadable or empty."""
    try:
        with open(path, "rb") as file:
            data = file.read() if limit is None else file.read(limit)
    except FileNotFoundError:
        raise InputError("no such file", path, "check the name and the folder you are in") from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", path, "name a file in it") from None
    except PermissionError:
        raise InputError("may not be read", path, "check its permissions") from None
    if not data:
        raise InputError("is empty", path, "copy or make it again")
    return data


def read_text(path: StrPath) -> str:
    """A text file: UTF-8, UTF-16 with a byte-order mark, or Latin-1. InputError if it is binary or empty."""
    data = read_bytes(path)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        raise InputError("is not a text file", path, "check that it is the file you meant")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_json(path: StrPath) -> dict[str, Any]:
    """A JSON object; InputError if it does not parse or is not an object. NaN and Infinity are refused."""

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"contains {constant}, which is not a number", path, "use null for what is not known")

    try:
        data = json.loads(read_text(path), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON (line {error.lineno}: {error.msg})", path, "correct that line") from None
    if not isinstance(data, dict):
        raise InputError("is not a JSON object", path, "it must start with { and name its sections")
    return data


def parse_numbers(words: list[str], path: StrPath, line: int) -> list[float]:
    """Finite floats of the words of one line; InputError names the line."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise InputError(f"line {line} has something that is not a number", path, "correct that line") from None
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"line {line} has a number that is not finite", path, "correct that line")
    return numbers


def read_table(path: StrPath, columns: tuple[int, ...] | None = None, comment: str = "#") -> list[list[float]]:
    """Lines of numbers split at white space; blank lines and comments are skipped.

    Args:
        path: the file.
        columns: the numbers of columns that a line may have; None allows any.
        comment: what starts a comment.

    Raises:
        InputError: no numbers, a word that is not a finite number, or a line of another length.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split(comment)[0].split()
        if not words:
            continue
        if columns is not None and len(words) not in columns:
            wanted = " or ".join(map(str, columns))
            raise InputError(f"line {number} has {len(words)} columns, not {wanted}", path, "correct that line")
        rows.append(parse_numbers(words, path, number))
    if not rows:
        raise InputError("has no numbers in it", path, "copy or make it again")
    return rows


def write_text(path: StrPath, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def place(source: StrPath, target: StrPath, link: bool = False) -> None:
    """Put a copy of a file, or a symbolic link to it, at `target`: whole or not at all, in place of what is there."""
    if link:
        path = Path(target)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        os.symlink(os.path.abspath(source), temporary)
        os.replace(temporary, path)
        return
    with Replacement(target) as replacement, open(source, "rb") as file:
        offset = 0
        while block := file.read(COPIED_AT_ONCE):
            replacement.write(block, offset)
            offset += len(block)


def resolve(reference: str, near: StrPath) -> Path:
    """The file that `near` refers to: as it stands, or relative to the folder of `near` or any folder above it.

    RELION writes names relative to the project, Warp relative to the file. InputError if it is nowhere.
    """
    home = Path(near).resolve().parent
    for folder in (Path.cwd(), home, *home.parents):
        candidate = folder / reference
        if candidate.is_file():
            return candidate
    raise InputError(
        f"refers to {reference}, which is not there", near, "copy it beside, keeping the folders in its name"
    )
