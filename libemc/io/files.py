"""Whole files: text in, and anything out, atomically. Every format of this room reads and writes through here."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn

from libemc.errors import InputError

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


class Replacement:
    """A new file beside `path` that takes its name when it is committed and leaves nothing when it is discarded.

    Raises:
        OSError: from the system, always with `path` as its filename.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            self._descriptor = self._create()
        except OSError as error:
            self._named(error)

    def _create(self) -> int:
        """Make and lock the new file, and remove those that killed programs left: the dead hold no lock."""
        while True:
            descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with suppress(OSError):  # a file system without locks keeps what is left
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                for left in self.path.parent.iterdir():
                    if left.name.startswith(f".{self.path.name}.") and left.suffix == ".part":
                        with suppress(OSError), open(left, "rb") as file:
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            left.unlink()
            if os.fstat(descriptor).st_nlink:  # not removed by another between its making and its locking
                return descriptor
            os.close(descriptor)

    def _named(self, error: OSError) -> NoReturn:
        raise OSError(error.errno, error.strerror, fspath(self.path)) from error

    def reserve(self, size: int) -> None:
        """Take `size` bytes of disk now, so that a full disk is known before the work is done."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, size)
            else:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._named(error)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                done = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            self._named(error)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def commit(self) -> None:
        """Flush to disk, take the name, flush the folder."""
        try:
            os.fsync(self._descriptor)
            os.replace(self._temporary, self.path)
            self._close()  # only now: the lock says that the writer lives
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._named(error)

    def discard(self) -> None:
        """Remove what was written; whatever had the name before keeps it."""
        self._close()
        self._temporary.unlink(missing_ok=True)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file whole or not at all."""
    replacement = Replacement(path)
    try:
        replacement.write(text.encode("utf-8"), 0)
        replacement.commit()
    except BaseException:
        replacement.discard()
        raise


def place(source: StrPath, target: StrPath, link: bool = False) -> None:
    """Put a copy of a file, or a symbolic link to it, at `target`: whole or not at all, in place of what is there."""
    if link:
        path = Path(target)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        os.symlink(os.path.abspath(source), temporary)
        os.replace(temporary, path)
        return
    replacement = Replacement(target)
    try:
        with open(source, "rb") as file:
            offset = 0
            while block := file.read(COPIED_AT_ONCE):
                replacement.write(block, offset)
                offset += len(block)
        replacement.commit()
    except BaseException:
        replacement.discard()
        raise


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
