"""Records on disk: read, make, and change. A record changes through `update` and in no other way.

A change is: lock, read again, apply, write beside, flush, replace. So a reader sees the old record or the new one,
whole; programs that change one record at once wait for each other; and a program killed at any moment leaves the
previous record. The lock is the kernel's and dies with its holder. Beside a record `X` lie `.X.lock`, empty and kept,
and for the time of a write `.X.tmp`; one left behind by a kill is overwritten by the next write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from filelock import FileLock, Timeout

from libemc.errors import InputError
from libemc.records import provenance
from libemc.records.models import HistoryEntry, Record
from libemc.records.text import R, dumps, loads

LOCK_TIMEOUT = 600.0
"""Seconds; a write holds the lock for milliseconds, for a few seconds with the largest particle files."""


def load(path: str | PathLike[str], expected: type[R] = Record) -> R:  # type: ignore[assignment]
    """The record in a file, of the kind that the file says.

    Args:
        path: the file.
        expected: the kind wanted, `TiltSeriesRecord` for example; by default any.

    Raises:
        InputError: there is no such file, or it is not a record of that kind (one line: file, key, remedy).
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("no such record", path, "check the name, and that this is the project's directory") from None
    return loads(text, path, expected)


def save_new(path: str | PathLike[str], record: R, overwrite: bool = False) -> R:
    """Write a record where there is none.

    Args:
        path: the file; its directory is made where needed.
        record: what to write.
        overwrite: put it in the place of whatever is there.

    Returns:
        The record as written, with the current history entry.

    Raises:
        InputError: the file exists.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as target:
        if not overwrite and target.exists():
            raise InputError("exists already", path, "use --overwrite to replace it")
        return _replace(target, record)


def update(path: str | PathLike[str], change: Callable[[R], R], expected: type[R] = Record) -> R:  # type: ignore[assignment]
    """Change a record: the one way. Nobody else changes it between the reading and the writing.

    Args:
        path: the file.
        change: from the record as it is now to the record as it shall be; it must not itself update this record.
        expected: the kind that `change` takes.

    Returns:
        The record as written, with the current history entry.

    Raises:
        InputError: as `load`; or another program holds the lock for longer than `LOCK_TIMEOUT`.
    """
    if not os.path.exists(path):
        load(path, expected)  # refuses, and leaves no lock file behind
    with _locked(path) as target:
        return _replace(target, change(load(path, expected)))


def finish(entry: HistoryEntry) -> None:
    """Write the final state of the current run of a program into every record that it has touched."""
    provenance.current.set(entry)
    for path in filter(Path.exists, provenance.touched()):
        update(path, lambda record: record)


@contextmanager
def _locked(path: str | PathLike[str]) -> Iterator[Path]:
    """Hold a record's lock; gives the record's own path, behind all symbolic links."""
    target = Path(os.path.realpath(path))
    try:
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=LOCK_TIMEOUT, poll_interval=0.01):
            yield target
    except Timeout:
        raise InputError(f"locked by another program for {LOCK_TIMEOUT:.0f} s", path, "stop it, or wait") from None


def _replace(target: Path, record: R) -> R:
    """Write a record, whole or not at all.

    Raises:
        ValueError: it would not read back (a copy with a wrong length, say); nothing was written.
        OSError: from the system, with the record's name.
    """
    record = provenance.stamped(record, target)
    text = dumps(record).encode()
    written = type(record).model_validate_json(text, strict=True)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk says so in `write` or `fsync`, which know no names
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot flush a directory; the replacement itself is done
        os.fsync(directory)
    os.close(directory)
    return written
