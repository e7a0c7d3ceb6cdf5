"""A small simulated project for the tests of emc_subtilt and emc_tomocpr: specimens that move, records that are wrong.

Two tilt series of 15 images at 8 Å/px with 16 particles each, neighbours of which move together. The records have the nominal
angles, and shifts and defoci with an error in each tilt; picks are a little off the truth. What programs make of it is compared
with the truth here, in numpy and by the formulas of info/conventions.md: nothing of libemc is used for that.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from tests.by_hand import pose, shell_correlation, tilt_matrix

PIXEL, BOX, PARTICLES, TILTS = 8.0, 32, 16, 15
NAMES = ("TS_01", "TS_02")
SHIFT, DEFOCUS, ANGLE = 3.5, 2500.0, 0.6
"""Å, Å and degrees rms by which a record's shifts (along each axis), its defocus and its tilt angles are off."""
PICK, TURN = 3.0, 2.0
"""Å and degrees rms, along and about each axis, by which picks are off."""
MAPS = ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png")
KEPT = ("id", "half", "centre", "visible", "class", "use")
"""Of a particle, what no refinement may change."""


def program(name: str, *argv: object) -> int:
    """Run a program in this process."""
    return int(importlib.import_module(name).program.main([str(word) for word in argv]))


def lines_of(name: str, *argv: object) -> list[str]:
    """The lines of a program's result; it must end with 0."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert program(name, *argv, "--quiet") == 0
    return out.getvalue().splitlines()


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def write(path: str | Path, content: Any) -> None:
    Path(path).write_text(json.dumps(content))


def without_history(path: str | Path) -> Any:
    """A record but for what tells when and where it was made."""
    return {key: value for key, value in read(path).items() if key not in ("history", "parent")}


def listing() -> dict[str, bytes]:
    """Every file but locks and logs."""
    files = (p for p in Path().rglob("*") if p.is_file() and p.suffix != ".lock" and ".emc" not in p.parts)
    return {str(p): p.read_bytes() for p in files}


def same_run(one: str, other: str) -> None:
    """Two runs have the same maps, byte by byte, and the same particles and state, number by number."""
    for file in MAPS:
        assert Path(one, file).read_bytes() == Path(other, file).read_bytes(), file
    for file in ("run.json", *(f"particles/{name}.json" for name in NAMES)):
        assert without_history(Path(one, file)) == without_history(Path(other, file)), file


# ---------------------------------------------------------------------------------------------------------- the project


def simulated(folder: Path, right: bool = False) -> None:
    """Make a project of a folder: `raw/` with images and truth, imported, with picks `ribo`, and `ref.mrc`.

    Args:
        right: nothing is wrong with alignment, CTF and picks, and nothing moves.
    """
    motion, angle = (0.0, 0.0) if right else (0.8, ANGLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("raw").mkdir()
        for number, name in enumerate(NAMES):
            words = (
                f"raw/{name} --size 170 176 --pixel-size {PIXEL} --box {BOX} --count {PARTICLES} --tilt-range -49 49 7 "
                f"--thickness 500 --strength 1.5 --motion {motion} --motion-range 400 --tilt-error {angle} "
                f"--defocus {22000 + 9000 * number} --seed {number + (401 if right else 1)} --map-out raw/true.mrc --overwrite"
            )
            lines_of("emc_simulate", *words.split())
            lines_of("emc_import", f"raw/{name}.mrc")
            truth = f"raw/{name}_truth.json"
            lines_of("emc_import", "--alignment", truth, name, "--overwrite")
            lines_of("emc_import", "--picks", truth, "--label", "ribo", name)
            if not right:
                spoil(f"info/{name}_info.json", np.random.default_rng(number))
        lines_of("emc_volume", "raw/true.mrc", "ref.mrc", "--lowpass", 40)


def spoil(path: str, rng: np.random.Generator) -> None:
    """Make a record wrong."""
    record = read(path)
    alignment, ctf, picks = record["alignment"], record["ctf"], record["picks"]["ribo"]
    alignment["tilt"] = record["tilts"]["nominal"]
    for key in ("shift_x", "shift_y"):
        alignment[key] = [s + SHIFT * rng.normal() for s in alignment[key]]
    off = DEFOCUS * rng.normal(size=TILTS)
    for key in ("defocus_u", "defocus_v"):
        ctf[key] = (np.array(ctf[key]) + off).tolist()
    picks["xyz"] = [[x + PICK * rng.normal() for x in r] for r in picks["xyz"]]
    for key in ("rot", "tilt", "psi"):
        picks[key] = [a + TURN * rng.normal() for a in picks[key]]
    write(path, record)


def extracted_and_refined(folder: Path, *more: object, iterations: int = 2) -> None:
    """The set `ribo` of a project, and from it `spt_00`, a run of emc_refine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines_of("emc_extract", "--all", "--label", "ribo", "--set", "ribo", "--box", BOX)
        argv = ("--reference", "ref.mrc", "--startres", 30, "--local", "--iterations", iterations)
        lines_of("emc_refine", "ribo", *argv, "--path", "spt_00", *more)


# ------------------------------------------------------------------------------------------------------ the truth of it


def bent(deformation: dict[str, Any] | None, at: np.ndarray) -> np.ndarray:
    """Image positions (T, 2) Å with the deformation of each tilt added: natural cubic splines between its nodes."""
    if deformation is None:
        return at
    rows, columns = deformation["rows"], deformation["columns"]
    x, y = (np.linspace(-f / 2, f / 2, n) for f, n in zip(deformation["field"], (columns, rows), strict=True))
    out = at.copy()
    for axis, key in enumerate(("dx", "dy")):
        for tilt, values in enumerate(deformation[key]):
            along_x = CubicSpline(x, np.reshape(values, (rows, columns)), axis=1, bc_type="natural")(at[tilt, 0])
            out[tilt, axis] += CubicSpline(y, along_x, bc_type="natural")(at[tilt, 1])
    return out


@dataclass(frozen=True)
class Images:
    """What a particle file says of its particles' images, and what is true of them.

    Attributes:
        patch, at, true: (N, T, 2) Å from the image centre: where the patch is centred, where the particle is said to be, and
            where it is.
        defocus, true_defocus: (N, T) Å.
        shown: (N, T) whether an image is there and counts.
        matrices: (T, 3, 3) of the tilts; rotations: (N, 3, 3) and xyz: (N, 3) Å of the particles, as they are now.
    """

    patch: np.ndarray
    at: np.ndarray
    true: np.ndarray
    defocus: np.ndarray
    true_defocus: np.ndarray
    shown: np.ndarray
    matrices: np.ndarray
    rotations: np.ndarray
    xyz: np.ndarray

    @staticmethod
    def of(file: dict[str, Any], truth: dict[str, Any]) -> Images:
        """From the JSON of a particle file and of a truth."""
        tilts, raw, particles = file["tilts"], file["raw"], file["particles"]
        now, cut = (
            np.stack([tilt_matrix(*angles) for angles in zip(g["axis"], g["tilt"], g["xtilt"], strict=True)])
            for g in (tilts, raw)
        )
        scale, cut_scale = (np.array(g["magnification"] or [1.0] * TILTS)[:, None] for g in (tilts, raw))
        cut_shift = np.stack([raw["shift_x"], raw["shift_y"]], axis=1)
        middle = [raw["shape"][2] // 2, raw["shape"][1] // 2]
        who = [int(p["id"].split(".")[1]) for p in particles]
        rows: dict[str, list[np.ndarray]] = {key: [] for key in ("patch", "at", "defocus", "shown")}
        for p in particles:
            own = p.get("subtilt") or dict.fromkeys(("dx", "dy", "ddefocus"), [0.0] * TILTS) | {"weight": [1.0] * TILTS}
            q = np.einsum("tij,j->ti", now, np.subtract(p["xyz"], p["centre"]))
            patch = bent(raw["deformation"], cut_scale * (np.einsum("tij,j->ti", cut[:, :2], p["centre"]) + cut_shift))
            rows["patch"].append(patch)
            rows["at"].append(patch + scale * (q[:, :2] + np.stack([own["dx"], own["dy"]], axis=1)))
            rows["defocus"].append(np.array(p["defocus"]) + own["ddefocus"] + file["defocus_handedness"] * q[:, 2])
            rows["shown"].append(np.array(p["visible"]) * np.array(tilts["use"]) * (np.array(own["weight"]) > 0) > 0)
        return Images(
            **{key: np.array(values) for key, values in rows.items()},
            true=(np.array(truth["pos2d_px"])[who] - middle) * PIXEL,
            true_defocus=np.array(truth["particle_defocus"])[who],
            matrices=now,
            rotations=np.stack([pose(p["rot"], p["tilt"], p["psi"]) for p in particles]),
            xyz=np.array([p["xyz"] for p in particles]),
        )

    @property
    def displacement(self) -> np.ndarray:
        """(K, 2) Å of the shown images from the truth, but for a motion of the whole specimen and one of the reference."""
        rows = self.matrices[:, :2]
        turned = np.stack([np.cross(axis, self.xyz) for axis in np.eye(3)], axis=-1)
        basis = [np.broadcast_to(rows, (len(self.xyz), *rows.shape))]
        basis += [np.einsum("tij,njk->ntik", rows, m) for m in (turned, self.rotations)]
        x, y = np.concatenate(basis, axis=-1)[self.shown].reshape(-1, 9), (self.at - self.true)[self.shown].ravel()
        return np.asarray((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).reshape(-1, 2))

    @property
    def off_centre(self) -> np.ndarray:
        """(K, 2) Å of the shown images' centres from the truth, but for a constant offset of each particle in space."""
        out = []
        for centre, true, shown in zip(self.patch, self.true, self.shown, strict=True):
            x, y = self.matrices[shown, :2].reshape(-1, 3), (centre - true)[shown].ravel()
            out.append((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).reshape(-1, 2))
        return np.concatenate(out)


def images(folder: str | Path) -> list[Images]:
    """Of both tilt series of a folder of particle files."""
    return [Images.of(read(Path(folder, f"{name}.json")), read(f"raw/{name}_truth.json")) for name in NAMES]


def rms(values: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(np.mean(np.concatenate([v.ravel() for v in values]) ** 2)))


def off(run: str) -> tuple[float, float]:
    """Of a run: Å rms along each axis by which particles aren't where their images show them, and Å rms of their defocus."""
    both = images(f"{run}/particles")
    return rms([i.displacement for i in both]), rms([(i.defocus - i.true_defocus)[i.shown] for i in both])


def likeness(run: str) -> float:
    """Mean FSC of a run's average with the true map, from 64 to 17 Å."""
    curve = shell_correlation(mrcfile.read(f"{run}/average.mrc"), mrcfile.read("raw/true.mrc"))
    return float(curve[4:16].mean())
