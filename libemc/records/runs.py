"""Run directories: a number of their own, and what their inputs were."""

from __future__ import annotations

import hashlib
import re
from os import PathLike, fspath
from pathlib import Path

from libemc.records.models import Fingerprint

DIGEST_BELOW = 16 * 2**20
"""Bytes; a larger file is known by its size and modification time only."""


def next_run_directory(prefix: str, project: str | PathLike[str] = ".") -> Path:
    """Make the next numbered directory of a kind of run (`spt_00`, `spt_01`, …); two programs never get the same.

    Args:
        prefix: `spt`, `sgd`, …
        project: the project directory.

    Returns:
        Its path, one higher than the highest there is.
    """
    root = Path(project)
    while True:
        numbers = (re.fullmatch(rf"{re.escape(prefix)}_(\d{{2,}})", path.name) for path in root.iterdir())
        directory = root / f"{prefix}_{1 + max((int(found[1]) for found in numbers if found), default=-1):02d}"
        try:
            directory.mkdir()
        except FileExistsError:  # another program was faster
            continue
        return directory


def fingerprint(path: str | PathLike[str]) -> Fingerprint:
    """A file's size, modification time and, where it is small, SHA-256: a changed input is seen before `--resume`."""
    status = Path(path).stat()
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if status.st_size < DIGEST_BELOW else None
    return Fingerprint(path=fspath(path), size=status.st_size, mtime=status.st_mtime, digest=digest)
