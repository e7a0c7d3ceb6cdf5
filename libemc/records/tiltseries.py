"""The tilt series of a project: where their records are, and what to do where a section is not there yet."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Literal, overload

from libemc.errors import InputError
from libemc.records.models import Alignment, Ctf, Picks, TiltSeriesRecord, Tomogram
from libemc.records.store import load

REMEDIES = {
    "alignment": "run emc_tomogram {name}",
    "ctf": "run emc_tomoctf {name}",
    "tomograms": "run emc_tomogram {name}",
    "picks": "import some with emc_import --picks FILE --label L {name}",
}
"""How a tilt series gets a section."""
ONE_IMAGE = "one image can't be aligned: import an alignment with emc_import --alignment FILE... {name}"
"""How a micrograph gets an alignment."""

ENDING = "_info.json"


def tiltseries_path(name: str, project: str | PathLike[str] = ".") -> Path:
    """Where the record of a tilt series is."""
    return Path(project) / "info" / f"{name}{ENDING}"


def find_tiltseries(project: str | PathLike[str] = ".") -> list[Path]:
    """The records of all tilt series of a project, by name."""
    return sorted(path for path in Path(project, "info").glob(f"*{ENDING}") if not path.name.startswith("."))


def load_tiltseries(name_or_path: str | PathLike[str], project: str | PathLike[str] = ".") -> TiltSeriesRecord:
    """The record of a tilt series, by its name in the project or by the record's path.

    Raises:
        InputError: there is none (the line names those that there are), or it cannot be read.
    """
    given = fspath(name_or_path)
    path = Path(given) if given.endswith(".json") else tiltseries_path(given, project)
    if not path.exists():
        names = ", ".join(found.name.removesuffix(ENDING) for found in find_tiltseries(project)[:8])
        remedy = f"there are {names}" if names else "import it with emc_import, in the project's directory"
        raise InputError(f"no tilt series {given}", path, remedy)
    return load(path, TiltSeriesRecord)


@overload
def need(record: TiltSeriesRecord, section: Literal["alignment"]) -> Alignment: ...
@overload
def need(record: TiltSeriesRecord, section: Literal["ctf"]) -> Ctf: ...
@overload
def need(record: TiltSeriesRecord, section: Literal["tomograms"]) -> tuple[Tomogram, ...]: ...
@overload
def need(record: TiltSeriesRecord, section: Literal["picks"]) -> dict[str, Picks]: ...
def need(record: TiltSeriesRecord, section: str) -> Alignment | Ctf | tuple[Tomogram, ...] | dict[str, Picks]:
    """A section that the caller cannot do without.

    Raises:
        InputError: it is not done yet; the line says how it is done.
    """
    found: Alignment | Ctf | tuple[Tomogram, ...] | dict[str, Picks] | None = getattr(record, section)
    if not found:
        single = section == "alignment" and record.source.shape[0] == 1
        remedy = (ONE_IMAGE if single else REMEDIES[section]).format(name=record.name)
        raise InputError(f"section {section} is not done yet", tiltseries_path(record.name), remedy)
    return found


def need_picks(record: TiltSeriesRecord, label: str) -> Picks:
    """The points of one label.

    Raises:
        InputError: there are none; the line names the labels that there are.
    """
    picks = need(record, "picks")
    if label not in picks:
        raise InputError(f"no picks labelled {label!r}", tiltseries_path(record.name), f"there are {', '.join(picks)}")
    return picks[label]
