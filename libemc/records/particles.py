"""Particle sets: a directory with `particles.json` and one particle file for each tilt series.

All paths inside are from the project directory. A set of its own lies in `particles/<set>/`, a run's particles in
`<run>/particles/`; both are read and written here, and either can be given where particles are asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Literal

from libemc.errors import InputError
from libemc.records.models import ParticleFile, ParticleSet
from libemc.records.store import load, save_new

HEAD = "particles.json"


def half_of(particle_id: str) -> Literal[1, 2]:
    """The half set of a particle, from its id alone: the same for ever, on every machine.

    Of two particles numbered 2m and 2m+1 in one tilt series one is in each half; which of them is a coin thrown by the
    BLAKE2b hash of the pair's name. So the halves of any run of ids differ by two at most, yet do not alternate
    (numbers often follow the specimen along a filament or a row).
    """
    numbered = re.fullmatch(r"(.*?)(\d+)", particle_id, re.DOTALL)
    stem, number = (numbered[1], int(numbered[2])) if numbered else (particle_id, 0)
    coin = blake2b(f"{stem}{number // 2}".encode(), digest_size=1).digest()[0]
    return 1 if (number + coin) % 2 else 2


def image_places(file: ParticleFile) -> tuple[int, ...]:
    """The place of each particle's images in the stack, counted in particles: (N,)."""
    return tuple(place if p.image is None else p.image for place, p in enumerate(file.particles))


def particles_path(set_or_run: str | PathLike[str], project: str | PathLike[str] = ".") -> Path:
    """The `particles.json` meant by a set's name, a set's or a run's directory, or its own path.

    Raises:
        InputError: there is none.
    """
    given = Path(project, set_or_run)
    candidates = (given, given / HEAD, given / "particles" / HEAD, Path(project, "particles", set_or_run, HEAD))
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        names = sorted(path.parent.name for path in Path(project, "particles").glob(f"*/{HEAD}"))
        remedy = f"there are the sets {', '.join(names[:8])}" if names else "make a set with emc_extract"
        raise InputError("no such particle set or run", os.fspath(set_or_run), remedy)
    return found


def load_particles(
    set_or_run: str | PathLike[str], project: str | PathLike[str] = "."
) -> tuple[ParticleSet, dict[str, ParticleFile]]:
    """A particle set and all its particle files, by tilt series.

    Args:
        set_or_run: see `particles_path`.
        project: the project directory.

    Raises:
        InputError: there is no such set, or one of its files is missing or cannot be read.
    """
    head = load(particles_path(set_or_run, project), ParticleSet)
    return head, {name: load(Path(project, path), ParticleFile) for name, path in head.files.items()}


def save_particles(
    directory: str | PathLike[str],
    head: ParticleSet,
    files: Mapping[str, ParticleFile],
    project: str | PathLike[str] = ".",
) -> ParticleSet:
    """Write a particle set in the place of what its directory holds, the set's own record last.

    Args:
        directory: from the project directory, `particles/<set>` or `<run>/particles`.
        head: the set; its `files` and `count` are made from `files`.
        files: the particles by tilt series.
        project: the project directory.

    Returns:
        The set as written.
    """
    paths = {name: os.path.join(directory, f"{name}.json") for name in files}
    for name, particles in files.items():
        save_new(Path(project, paths[name]), particles, overwrite=True)
    count = sum(len(particles.particles) for particles in files.values())
    head = head.model_copy(update={"files": paths, "count": count})
    return save_new(Path(project, directory, HEAD), head, overwrite=True)
