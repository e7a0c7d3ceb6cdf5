"""Which run of which program is writing: the history entry of now, and the records that it has changed.

The runner sets `current` when a program begins; every write of a record then carries the entry, and the runner writes
the finished entry into every record of `touched()` at the end (`store.finish`). Both belong to one thread of one
process: workers return results, and the program writes them.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from libemc.records.models import HistoryEntry, Record

R = TypeVar("R", bound=Record)

current: ContextVar[HistoryEntry | None] = ContextVar("current", default=None)
_touched: dict[str, dict[Path, None]] = {}


def stamped(record: R, path: Path) -> R:
    """The record with the current entry in its history, in the place of an earlier state of it; the path is noted."""
    entry = current.get()
    if entry is None:
        return record
    _touched.setdefault(entry.id, {})[path] = None
    history = [entry if old.id == entry.id else old for old in record.history]
    return record.model_copy(update={"history": (*history, *(() if entry in history else (entry,)))})


def touched() -> tuple[Path, ...]:
    """The records written under the current entry, in the order of their first writing."""
    entry = current.get()
    return () if entry is None else tuple(_touched.get(entry.id, ()))
