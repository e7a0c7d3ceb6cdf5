"""What made what: the history entry of the running program, and the histories of a project's records read backwards.

`Recorder` keeps the entry of one run and finishes it in every record that the run has touched. `replay` walks from a
file through the outputs and inputs of the entries to the commands that made it. The entries themselves, and how they
get into a record, belong to `libemc.records`.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from libemc import __version__, records
from libemc.errors import InputError
from libemc.records import HistoryEntry, provenance

_RECORDS = ("info/*_info.json", "particles/*/particles.json", "*/run.json")
"""The records whose histories tell all: particle files are written together with the record of their set or run."""


class Recorder:
    """The history entry of one run of a program, from `running` to its end.

    Args:
        program: its name.
        argv: the whole command, the program's name first.
        seed: None for a program without random numbers.
        project: the directory from which paths are written.
    """

    def __init__(self, program: str, argv: Sequence[str], seed: int | None, project: Path) -> None:
        self.project = project
        self._began, self._cpu_before = time.monotonic(), _cpu_seconds()
        now, host = datetime.now(timezone.utc), platform.node() or "unknown"
        self.entry = HistoryEntry(
            id=f"{now:%Y%m%dT%H%M%S.%f}-{host}-{os.getpid()}",
            program=program,
            version=__version__,
            commit=commit(),
            argv=tuple(argv),
            start=now.isoformat(timespec="microseconds"),
            host=host,
            seed=seed,
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every record that is written within gets the entry."""
        token = provenance.current.set(self.entry)
        try:
            yield
        finally:
            provenance.current.reset(token)

    def note(
        self,
        inputs: Iterable[Path] = (),
        outputs: Iterable[Path] = (),
        warnings: Iterable[str] = (),
        device: str | None = None,
    ) -> None:
        """Add to the entry, each thing once."""
        old = self.entry
        self.entry = old.model_copy(
            update={
                "inputs": _joined(old.inputs, (self._name(path) for path in inputs)),
                "outputs": _joined(old.outputs, (self._name(path) for path in outputs)),
                "warnings": _joined(old.warnings, warnings),
                "device": device or old.device,
            }
        )
        provenance.current.set(self.entry)

    def notes_output(self, path: Path) -> bool:
        """Whether this run has already said that it writes this file."""
        return self._name(path) in self.entry.outputs

    def touched(self) -> tuple[Path, ...]:
        """The records that this run has written to so far."""
        return provenance.touched()

    def finish(self, state: str) -> tuple[float, int]:
        """Write the finished entry into every record that was touched.

        Args:
            state: `done`, `failed` or `interrupted`.

        Returns:
            The wall time in seconds, and the peak memory in bytes.
        """
        wall, peak = time.monotonic() - self._began, _peak_memory()
        if self.touched():
            self.note(outputs=self.touched())
            figures = {"wall_seconds": round(wall, 3), "cpu_seconds": round(_cpu_seconds() - self._cpu_before, 3)}
            self.entry = self.entry.model_copy(update={**figures, "peak_memory": peak, "state": state})
            records.finish(self.entry)
        return wall, peak

    def _name(self, path: Path) -> str:
        """The path from the project directory where it lies below it, else as a whole."""
        absolute = Path(os.path.abspath(self.project / path))
        return str(absolute.relative_to(self.project) if absolute.is_relative_to(self.project) else absolute)


def _joined(old: tuple[str, ...], new: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_memory() -> int:
    """The most bytes that this process, or any one of its finished children, has had resident."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def commit() -> str | None:
    """The commit of the source tree (`-dirty` where it was changed) when this runs from a git checkout, else None."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


# ----------------------------------------------------------------------------------------------------- a project's past


def is_project(folder: Path) -> bool:
    """Whether there are records in this folder."""
    return any(True for pattern in _RECORDS for _ in folder.glob(pattern))


def find_project(path: Path) -> Path:
    """The project that a path belongs to: it or the nearest folder above it with records, else the present folder."""
    absolute = Path(os.path.abspath(path))
    for folder in (absolute, *absolute.parents):
        if is_project(folder):
            return folder
    return Path.cwd()


def project_records(project: Path) -> list[Path]:
    """The records of tilt series, sets and runs, in that order, each by name."""
    return [file for pattern in _RECORDS for file in sorted(project.glob(pattern))]


def project_history(project: Path) -> list[HistoryEntry]:
    """Every history entry in the project's records once, in the order of their starts.

    A record that is not JSON or whose history can't be read is passed over: it must not hide the others' past.
    """
    entries: dict[str, HistoryEntry] = {}
    for file in project_records(project):
        try:
            found = [HistoryEntry.model_validate(entry) for entry in json.loads(file.read_text()).get("history", ())]
            found.sort(key=_start)  # a time that is none is a ValueError here
        except (OSError, ValueError, AttributeError):
            continue
        for entry in found:
            if entry.id not in entries or entries[entry.id].state == "running":
                entries[entry.id] = entry
    return sorted(entries.values(), key=_start)


def _start(entry: HistoryEntry) -> datetime:
    return datetime.fromisoformat(entry.start)


def written_by(program: str, file: Path, project: Path) -> bool:
    """Whether the project's histories say that this program wrote the file."""
    key = os.path.realpath(project / file)
    return any(
        os.path.realpath(project / output) == key
        for entry in project_history(project)
        if entry.program == program
        for output in entry.outputs
    )


def tiltseries_record(name: str, project: Path) -> Path:
    """The record of a tilt series, from its name or its file.

    Raises:
        InputError: when there is none, naming the one that is spelt most like it.
    """
    file = Path(name) if name.endswith(".json") else project / records.tiltseries_path(name)
    if file.is_file():
        return file
    known = [path.name.removesuffix("_info.json") for path in records.find_tiltseries(project)]
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "emc_import makes one; its record is in info/"
    raise InputError("there is no such tilt series", name, remedy)


def replay(entries: Sequence[HistoryEntry], target: Path, project: Path) -> str:
    """A shell script of the commands that made a file, each after those that made its inputs.

    Of the commands that wrote an ordinary file the last one counts; of those that wrote a record, which is added to,
    every one before it was read. A command that did not end well counts where no later run of the same command did.

    Args:
        entries: the project's history, `project_history`.
        target: the file, or a folder for all that was written into it; from the project directory, or absolute.
        project: the project directory, where the script will run.

    Raises:
        InputError: when no command of the history wrote it.
    """
    writers: dict[str, list[HistoryEntry]] = defaultdict(list)
    for entry in sorted(entries, key=_start):
        for output in entry.outputs:
            writers[os.path.realpath(project / output)].append(entry)
    root, key = os.path.realpath(project), os.path.realpath(project / target)
    wanted = [path for path in writers if path == key or path.startswith(key + os.sep)]
    if not wanted:
        raise InputError(
            "no command in this project's histories wrote it", _short(key, root), "name one of the project's outputs"
        )
    redone = {_command(entry): _start(entry) for entry in sorted(entries, key=_start) if _done(entry)}

    needed: dict[str, HistoryEntry] = {}
    raw: dict[str, None] = {}
    asked: list[tuple[str, HistoryEntry | None]] = [(path, None) for path in wanted]
    while asked:
        path, reader = asked.pop()
        before = [entry for entry in writers.get(path, ()) if reader is None or _start(entry) < _start(reader)]
        before = [
            entry for entry in before if redone.get(_command(entry), _start(entry)) <= _start(entry) or _done(entry)
        ]
        if not before and reader is not None and not any(entry.id == reader.id for entry in writers.get(path, ())):
            raw[path] = None
        for entry in before if path.endswith(".json") else before[-1:]:
            if entry.id not in needed:
                needed[entry.id] = entry
                asked += [(os.path.realpath(project / file), entry) for file in entry.inputs]
    return _script(sorted(needed.values(), key=_start), [_short(path, root) for path in sorted(raw)], _short(key, root))


def _done(entry: HistoryEntry) -> bool:
    return entry.state == "done"


def _command(entry: HistoryEntry) -> tuple[str, ...]:
    """What would be typed to do it again in a fresh folder, where there is nothing to go on from."""
    return tuple(word for word in entry.argv if word != "--resume")


def _short(path: str, root: str) -> str:
    return os.path.relpath(path, root) if path.startswith(root + os.sep) else path


def _script(entries: Sequence[HistoryEntry], raw: Sequence[str], target: str) -> str:
    lines = ["#!/bin/sh", f"# Makes {target!r} again, in an empty project directory.", "set -eu"]
    if raw:
        lines += ["# What no command of the project made has to be there:", f"for file in {shlex.join(raw)}; do"]
        lines += ['    test -e "$file" || { echo "missing: $file" >&2; exit 2; }', "done"]
    for entry in entries:
        lines += ["", f"# {_summary(entry)}", shlex.join(_command(entry))]
    return "\n".join(lines)


def _summary(entry: HistoryEntry) -> str:
    made = entry.version + (f" ({entry.commit})" if entry.commit else "")
    ended = "" if entry.state == "done" else f", {'killed' if entry.state == 'running' else entry.state}"
    return f"emc {made}, {entry.start[:19]}{ended}"


def history_lines(entries: Sequence[HistoryEntry]) -> list[str]:
    """Two or more lines for each entry: when, the state and what it took; the command; warnings."""
    lines: list[str] = []
    for entry in entries:
        figures: dict[str, Any] = {"wall": entry.wall_seconds, "cpu": entry.cpu_seconds}
        took = [f"{name} {value:.1f} s" for name, value in figures.items() if value is not None]
        took += [f"peak {entry.peak_memory / 2**20:.0f} MB"] if entry.peak_memory is not None else []
        state = "killed" if entry.state == "running" else entry.state
        lines += [f"{entry.start[:19]}  {state}  {', '.join([*took, str(entry.host), f'emc {entry.version}'])}"]
        lines += [f"    $ {shlex.join(entry.argv)}", *(f"    warning: {text}" for text in entry.warnings)]
    return lines
