"""Files that are written whole or not at all: beside, flushed, then put in the place of what was there.

Every room may import this file; it imports nothing of libemc. Records have their own way (`records.store`), under a lock.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import NoReturn


class Replacement:
    """A new file beside `path` that takes its name when it is committed and leaves nothing when it is discarded.

    As a context manager it is committed at the end of the block, and discarded on any exception.

    Raises:
        OSError: from the system, always with `path` as its filename.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            self._descriptor = self._create()
        except OSError as error:
            self._named(error)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()  # of a file that has its name by now there is nothing left to remove

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
            with suppress(OSError):  # some network file systems cannot flush a folder; the file itself is safe
                os.fsync(folder)
            os.close(folder)
        except OSError as error:
            self._named(error)

    def discard(self) -> None:
        """Remove what was written; whatever had the name before keeps it."""
        self._close()
        self._temporary.unlink(missing_ok=True)


def write_bytes(path: str | PathLike[str], data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: from the system, always with `path` as its filename.
    """
    with Replacement(path) as replacement:
        replacement.write(data, 0)
