"""A small simulated project for the tests of emc_pca and emc_cluster: two kinds of particles, mixed, at their true poses.

Two tilt series of 13 images at 10 Å/px with the built-in particle and the same without its head, which lies 70 Å out. Of each
particle the truth says which it is, under the number that its id ends with. The project is made once in a session.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from tests.programs.moving import lines_of, read, write

PIXEL, BOX = 10.0, 36
NAMES = ("TS_01", "TS_02")
KINDS = ("emc", "emc-nohead")
SET, RUN = "mix", "pca_00"
PCA = ("--scales", "60,30", "--axes", 4)

_made: list[Path] = []


def mixture(factory: pytest.TempPathFactory) -> Path:
    """The project: `raw/` with images, truth, true_1.mrc and true_2.mrc; the set `mix`; `pca_00` of it, its lines in `said`."""
    if not _made:
        folder = factory.mktemp("mixture")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            _simulate()
            Path("said").write_text("\n".join(lines_of("emc_pca", SET, *PCA, "--path", RUN)))
        _made.append(folder)
    return _made[0]


def _simulate() -> None:
    Path("raw").mkdir()
    for number, name in enumerate(NAMES):
        words = (
            f"raw/{name} --size 240 240 --pixel-size {PIXEL} --box {BOX} --particle {KINDS[0]} --particle {KINDS[1]} "
            "--count 28 --fractions 4,3 --tilt-range -54 54 9 --thickness 500 --motion 0 --strength 1.2 "
            f"--defocus {22000 + 9000 * number} --seed {number + 1} --map-out raw/true.mrc --overwrite"
        )
        lines_of("emc_simulate", *words.split())
        lines_of("emc_import", f"raw/{name}.mrc")
        truth = f"raw/{name}_truth.json"
        lines_of("emc_import", "--alignment", truth, name, "--overwrite")
        lines_of("emc_import", "--picks", truth, "--label", SET, name)
    lines_of("emc_extract", "--all", "--label", SET, "--set", SET, "--box", BOX)


def true_kinds(ids: list[str]) -> np.ndarray:
    """(N,) the kind of each particle, from 0."""
    truth = {name: read(f"raw/{name}_truth.json")["cls"] for name in NAMES}
    return np.array([truth[i.split(".")[0]][int(i.split(".")[1])] for i in ids])


def change_particles(folder: str, how: Callable[[dict[str, Any]], None]) -> None:
    """Change every particle of a set or run."""
    for name in NAMES:
        content = read(f"{folder}/{name}.json")
        for particle in content["particles"]:
            how(particle)
        write(f"{folder}/{name}.json", content)


def particles(folder: str) -> list[dict[str, Any]]:
    """All particles of a folder of particle files."""
    return [p for name in NAMES for p in read(f"{folder}/{name}.json")["particles"]]


def copied_set(name: str, how: Callable[[dict[str, Any]], None]) -> None:
    """A copy of the set `mix`, of the same images, with something changed in every particle."""
    shutil.copytree(f"particles/{SET}", f"particles/{name}", ignore=shutil.ignore_patterns("*.mrcs", "*.lock"))
    head = read(f"particles/{name}/particles.json")
    files = {key: f"particles/{name}/{key}.json" for key in NAMES}
    write(f"particles/{name}/particles.json", head | {"set": name, "files": files})
    for key in NAMES:
        write(f"particles/{name}/{key}.json", read(f"particles/{name}/{key}.json") | {"set": name})
    change_particles(f"particles/{name}", how)


def one_kind(name: str) -> None:
    """A set of the particles of the first kind alone: the others are not used."""
    copied_set(name, lambda p: p.update(use=bool(true_kinds([p["id"]])[0] == 0)))


def coordinates(run: str) -> dict[str, np.ndarray]:
    """What coordinates.npz has."""
    with np.load(f"{run}/coordinates.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def agreement(folder: str) -> float:
    """Adjusted Rand index between the classes in particle files and the truth."""
    found = particles(folder)
    return float(adjusted_rand_score(true_kinds([p["id"] for p in found]), [p["class"] for p in found]))


def volume(path: str) -> np.ndarray:
    return np.asarray(mrcfile.read(path).astype(float))


def names_in(folder: str) -> set[str]:
    return {p.name for p in Path(folder).iterdir() if not p.name.startswith(".")}
