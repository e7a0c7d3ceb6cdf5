"""What a program says while it works: one logger, a handler for the terminal, a log file, and progress.

Everything here goes to stderr or to a file; stdout belongs to results. A terminal gets a bar with a time to finish;
anything else (a batch job's log) gets a line each minute.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from libemc.cli.options import seconds_text

T = TypeVar("T")

LOGGER = logging.getLogger("libemc")
LINE_EVERY_SECONDS = 60.0


@contextmanager
def above_bar(stream: TextIO) -> Iterator[None]:
    """What is written within stands above a progress bar, where there is one."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=stream):
        yield


class TalkHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Log lines on the stderr of the moment, as `emc_x: text`; a warning or an error says so."""

    def __init__(self, program: str, level: str) -> None:
        super().__init__(sys.stderr)
        self.setLevel(level)
        self.program = program

    def format(self, record: logging.LogRecord) -> str:
        """One line; the traceback of a bug, where there is one, comes before it."""
        name = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.program}: {name}{super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, above a progress bar where there is one."""
        with above_bar(sys.stderr):
            super().emit(record)


class LateFileHandler(logging.FileHandler):
    """A log file that appears, together with its folder, when there is a first line worth keeping.

    Args:
        file: where.
        first_line: what it begins with.
        only_bugs: keep nothing but bugs: for a program that has nothing to say, or a folder that is no project.
    """

    def __init__(self, file: Path, first_line: str, only_bugs: bool) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        self.first_line = first_line
        self.only_bugs = only_bugs
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; an error before any work is for the terminal only, and a full disk must not stop the work."""
        bug = getattr(record, "bug", False)
        if not bug and (self.only_bugs or (self.stream is None and record.levelno >= logging.ERROR)):
            return
        try:
            if self.stream is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
                self.stream = self._open()
                self.stream.write(self.first_line + "\n")
        except OSError:
            self.setLevel(logging.CRITICAL + 1)
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop logging: the work's own writes will tell what is wrong with the disk."""
        self.setLevel(logging.CRITICAL + 1)


def log_file(project: Path, program: str, argv: Iterable[str], only_bugs: bool) -> LateFileHandler:
    """The log of one run: `.emc/log/<program>_<date>_<time>_<process>.log`, its first line the command."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    file = project / ".emc" / "log" / f"{program}_{stamp}_{os.getpid()}.log"
    return LateFileHandler(file, f"$ {shlex.join(argv)}", only_bugs)


def follow(iterable: Iterable[T], total: int | None, label: str, talk: bool) -> Iterator[T]:
    """Pass the items on, with a bar on a terminal, or a log line each minute elsewhere.

    Args:
        iterable: what to pass on.
        total: how many there are; asked of the iterable where None.
        label: what is being counted, e.g. `tilt series`.
        talk: False for a run that was asked to be quiet: no bar (the lines are quietened by the logger).
    """
    if total is None:
        total = len(iterable) if isinstance(iterable, Sized) else None
    if talk and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, total=total, desc=label or None, file=sys.stderr, dynamic_ncols=True, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            last = now
            left = f", {seconds_text((now - start) * (total - done) / done)} left" if total and done else ""
            LOGGER.info("%s: %d%s%s", label or "progress", done, f" of {total}" if total else "", left)
        yield item
