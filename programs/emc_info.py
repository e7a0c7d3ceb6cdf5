#!/usr/bin/env python3
"""Print a record or the header of an image file, its history, or the commands that made it.

FILE is a record, the name of a tilt series or of a particle set, the folder of a run, an MRC file, or (with --history
and --replay) any file that a program of the suite has written. A project folder has all its records checked, one line
for each.

    emc_info                                          # check the project in this folder
    emc_info TS_01                                    # what is known of a tilt series
    emc_info spt_00/average.mrc --history             # which runs of which programs wrote this map
    emc_info spt_00/average.mrc --replay > again.sh   # the chain of commands, from the raw data, that makes it again
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libemc import records
from libemc.cli import Program, Run, history
from libemc.errors import InputError

SHORT = 8
"""Lists up to this length are printed whole."""

IMAGES = (".mrc", ".mrcs", ".st", ".map", ".ali", ".rec")
"""The endings that MRC files go by."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("file", nargs="?", default=".", metavar="FILE", help="record, name, folder or file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--history", action="store_true", help="the runs of programs that wrote it")
    what.add_argument("--replay", action="store_true", help="a shell script that makes it again")


def main(args: argparse.Namespace, run: Run) -> None:
    """Find the file and print what is asked of it."""
    path = find(args.file, run.project)
    project = history.find_project(path)
    if args.replay:
        run.result(history.replay(history.project_history(project), path.absolute(), project))
    elif args.history:
        entries = past(path, project)
        if not entries:
            raise InputError("no program's history has it", path, "name a record, or one of the project's outputs")
        run.result("\n".join(history.history_lines(entries)))
    elif path.is_dir():
        check(path, run)
    elif path.suffix == ".json":
        run.result("\n".join(described(records.load(path))))
    elif path.suffix in IMAGES:
        run.result(header(path))
    else:
        raise InputError("is neither a record nor an image", path, "with --history or --replay: how it was made")


def find(text: str, project: Path) -> Path:
    """The file that is meant: a path, the record of a folder, or the record that belongs to a name."""
    path = Path(text)
    if path.is_file() or history.is_project(path):
        return path
    for file in (path / "run.json", path / "particles.json", project / "particles" / path / "particles.json"):
        if file.is_file():
            return file
    if past(path, history.find_project(path)):
        return path
    return history.tiltseries_record(text, project)


def past(path: Path, project: Path) -> list[records.HistoryEntry]:
    """The entries of a record's own history, or for another file those that name it as an output."""
    if path.suffix == ".json" and path.is_file():
        try:
            return list(records.load(path).history)
        except InputError:  # JSON, but no record
            pass
    key = os.path.realpath(path)
    entries = history.project_history(project)
    return [entry for entry in entries if any(os.path.realpath(project / file) == key for file in entry.outputs)]


def check(project: Path, run: Run) -> None:
    """Read every record of a project and print a line for each.

    Raises:
        InputError: after the last one, when some could not be read or have lost their images; or when there are none.
    """
    files = history.project_records(project)
    broken = 0
    for file in files:
        try:
            record = records.load(file)
            if isinstance(record, records.ParticleSet):
                _, parts = records.load_particles(file.absolute(), project)
                for part in parts.values():
                    images = [*filter(None, [part.stack, part.raw and part.raw.stack])]
                    if images and not any((project / path).exists() for path in images):
                        raise InputError(f"its images {images[0]} are missing", file, "extract them again")
            last = f", last {record.history[-1].program} {record.history[-1].state}" if record.history else ""
            run.result(f"{file}: {record.kind}{last}")
        except InputError as error:
            broken += 1
            run.result(f"{error}")
    if broken or not files:
        what = f"{broken} of {len(files)} records can't be used" if files else "there are no records"
        raise InputError(what, project, "each line above says what to do" if broken else "emc_import begins a project")


def header(path: Path) -> str:
    """The line of an MRC file."""
    from libemc.io import mrc  # numpy is not needed for records

    images = mrc.open_stack(path)
    pixel = "without a pixel size" if images.pixel_size is None else f"{images.pixel_size:.6g} Å/px"
    kind = "stack" if images.is_stack else "volume"
    return f"{path}: {kind} {' x '.join(map(str, images.shape))} (z, y, x), {images.array.dtype.name}, {pixel}"


def described(record: records.Record) -> Iterator[str]:
    """The lines of a record; long lists as their length and range."""
    content = record.model_dump(by_alias=True, exclude={"history"})
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield key
            yield from (f"    {name:<20} {brief(entry)}" for name, entry in value.items())
        else:
            yield f"{key:<24} {brief(value)}"
    yield f"{'history':<24} {len(record.history)} runs of programs"


def brief(value: Any, listed: bool = False) -> str:
    """A value in one line; tables within the entries of a list (`listed`) are only counted."""
    if isinstance(value, dict):
        short = {k: f"{len(v)} values" if listed and isinstance(v, dict) and v else brief(v) for k, v in value.items()}
        return ", ".join(f"{key} {text}" for key, text in short.items()) or "none"
    if not isinstance(value, (tuple, list)):
        return "-" if value is None else str(value)
    if value and all(isinstance(entry, bool) for entry in value):
        return f"{sum(value)} of {len(value)}"
    if len(value) <= SHORT and not any(isinstance(entry, dict) and len(entry) > SHORT for entry in value):
        return "; ".join(brief(entry, listed=True) for entry in value) or "none"
    numbers = [entry for entry in value if isinstance(entry, (int, float))]
    spread = f", {min(numbers):.10g} to {max(numbers):.10g}" if numbers else ""
    return f"{len(value)} entries{spread}"


program = Program(doc=__doc__, name="emc_info", arguments=arguments, main=main, standard=())
entry = program.entry

if __name__ == "__main__":
    entry()
