"""Errors that a user can act on. Every room may import this file; it imports nothing of libemc."""

from __future__ import annotations

from os import PathLike, fspath


class InputError(Exception):
    """Something the user gave is wrong: the runner prints one line and exits with 2.

    Args:
        what: what is wrong, without a full stop.
        where: the file (or option) that it is about.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, where: str | PathLike[str] | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else fspath(where)
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            line = f"{line}; {self.remedy}"
        return " ".join(line.split())


class CommandFailed(Exception):
    """A command that a program has started did not end well: the runner prints one line and exits with its code.

    Args:
        command: as typed.
        code: its exit code, above 0.
    """

    def __init__(self, command: str, code: int) -> None:
        self.code = code
        super().__init__(f"ended with {code}: {command}")
