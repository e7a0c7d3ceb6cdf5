"""Bad input to every program: exit 2, one line that names the file and a remedy, and nothing left half-written.

One small project with a tilt series, its particles, a refinement and an analysis of their differences is made once; each
case spoils one thing in a copy of it and runs one program. What a program may leave are locks, logs and empty folders of its own.
A full disk is a system call that fails as it does then; a read-only folder likewise (root may write anywhere).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from libemc import project as rooms
from tests.by_hand import PIXEL, HandSeries, blobs_map, mrc_bytes

SERIES = HandSeries(
    name="TS_01", shape=(100, 111), tilts=(-40.0, -20.0, 0.0, 20.0, 40.0), noise=0.3, particles=4, magnify=0.0
)
RAW, INFO, STACK = "tiltseries/TS_01.mrc", "info/TS_01_info.json", "particles/ribo/TS_01.mrcs"
SET, FILE = "particles/ribo/particles.json", "particles/ribo/TS_01.json"

Prepare = Callable[[pytest.MonkeyPatch], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    SERIES.write(folder)
    volume = blobs_map(24)
    for name, array in (("ref", volume), ("other", volume[::-1]), ("mask", (volume > 0.1) * 1.0)):
        (folder / f"{name}.mrc").write_bytes(mrc_bytes(array, PIXEL, stack=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for argv in (
            "emc_extract TS_01 --label ribo --set ribo --box 24",
            "emc_refine ribo --reference ref.mrc --startres 14 --local --iterations 1 --path spt_00",
            "emc_pca ribo --scales 12 --axes 2 --path pca_00",
        ):
            program, *words = argv.split()
            assert importlib.import_module(program).program.main([*words, "--quiet"]) == 0
    shutil.rmtree(folder / ".emc", ignore_errors=True)
    return folder


# ------------------------------------------------------------------------------------------------- ways to spoil a thing


def write(path: str, data: bytes | str) -> Prepare:
    def prepare(_: pytest.MonkeyPatch) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data.encode() if isinstance(data, str) else data)

    return prepare


def volume(path: str, array: np.ndarray, pixel: float = PIXEL, stack: bool = False) -> Prepare:
    return write(path, mrc_bytes(array, pixel, stack))


def cut(path: str, size: int) -> Prepare:
    return lambda _: os.truncate(path, size)


def gone(path: str) -> Prepare:
    return lambda _: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def folder_is_a_file(path: str) -> Prepare:
    def prepare(_: pytest.MonkeyPatch) -> None:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).write_text("a file\n")

    return prepare


def record(path: str, change: Callable[[dict[str, Any]], Any]) -> Prepare:
    def prepare(_: pytest.MonkeyPatch) -> None:
        content = json.loads(Path(path).read_text())
        change(content)
        Path(path).write_text(json.dumps(content))

    return prepare


def put(path: str, *keys: str | int, value: Any) -> Prepare:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return record(path, change)


def drop(path: str, *keys: str | int) -> Prepare:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return record(path, change)


def images(change: Callable[[np.ndarray], Any], pixel: float = PIXEL) -> Prepare:
    """Change the raw stack's pixels, or take others in their place."""

    def prepare(_: pytest.MonkeyPatch) -> None:
        array = np.frombuffer(Path(RAW).read_bytes()[1024:], "<f4").reshape(5, 100, 111).copy()
        changed = change(array)
        Path(RAW).write_bytes(mrc_bytes(array if changed is None else changed, pixel, stack=True))

    return prepare


def both(*prepares: Prepare) -> Prepare:
    return lambda patch: [prepare(patch) for prepare in prepares]


def failing(number: int, *calls: str) -> Prepare:
    """System calls that fail: writing with ENOSPC, or making files with EROFS."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise OSError(number, os.strerror(number))

        for call in calls:
            patch.setattr(os, call, fails)

    return prepare


def fills_up(after: int) -> Prepare:
    """A disk with room for so many writes, the last of them short."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        write, left = os.pwrite, [after]

        def writes(descriptor: int, data: Any, offset: int) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data[: len(data) // 2 + 1] if left[0] == 0 else data, offset)

        patch.setattr(os, "pwrite", writes)

    return prepare


FULL = failing(errno.ENOSPC, "pwrite", "posix_fallocate", "fsync")
NO_ROOM = lambda patch: patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))  # noqa: E731


def read_only(patch: pytest.MonkeyPatch) -> None:
    """As a user sees a folder of somebody else's: it may be read and not written."""
    access = os.access
    patch.setattr(os, "access", lambda path, mode, **more: not mode & os.W_OK and access(path, mode, **more))


def read_only_disk(patch: pytest.MonkeyPatch) -> None:
    """Files can't be made on it, though the permissions look good."""
    original = os.open

    def opens(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        return original(path, flags, *rest, **more)

    patch.setattr(os, "open", opens)


def unreadable(path: str) -> Prepare:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        access = os.access

        def asked(file: Any, mode: int, **more: Any) -> bool:
            return os.fspath(file) != path and access(file, mode, **more)

        patch.setattr(os, "access", asked)

    return prepare


# -------------------------------------------------------------------------------------------------------------- the cases


@dataclass
class Case:
    """A command, what spoils it, and words that its line must have: the file first."""

    command: str
    prepare: Prepare | None
    words: tuple[str, ...]


def case(command: str, prepare: Prepare | None, *words: str) -> Case:
    return Case(command, prepare, words)


def nan(array: np.ndarray) -> None:
    array[2, 50, 50] = np.nan


def static(array: np.ndarray) -> np.ndarray:
    """Nothing but noise, as many pixels."""
    return np.random.default_rng(0).normal(100, 10, array.shape)


def everyone(key: str, value: Any) -> Prepare:
    """A field of all four particles."""
    return both(*(put(FILE, "particles", i, key, value=value) for i in range(4)))


def blank(array: np.ndarray) -> None:
    array[3] = 7


def fill(value: float) -> None:
    """All pixels of the particles' stack."""
    data = np.full((os.path.getsize(STACK) - 1024) // 2, value, "<f2")
    Path(STACK).write_bytes(Path(STACK).read_bytes()[:1024] + data.tobytes())


def another_set(_: pytest.MonkeyPatch) -> None:
    """A copy of the set and of its stack, of particles that were cut elsewhere."""
    shutil.copytree("particles/ribo", "particles/other")
    for file in Path("particles/other").glob("*.json"):
        content = json.loads(file.read_text().replace("particles/ribo", "particles/other"))
        for particle in content.get("particles", ()):
            particle["centre"][0] += 9.0
        file.write_text(json.dumps(content))


def swap_halves(content: dict[str, Any]) -> None:
    for particle in content["particles"]:
        particle["half"] = 3 - particle["half"]


def everyone_else(path: str) -> Prepare:
    """Other ids for all particles of a file."""

    def change(content: dict[str, Any]) -> None:
        for number, particle in enumerate(content["particles"]):
            particle["id"] = f"{content['name']}.{900 + number:06d}"

    return record(path, change)


def another_run(change: Callable[[dict[str, Any]], Any] | None = None) -> Prepare:
    """A copy of the run, with something changed in its particle file."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        shutil.copytree("spt_00", "other_run")
        for file in Path("other_run/particles").glob("*.json"):
            file.write_text(file.read_text().replace("spt_00/", "other_run/"))
        if change is not None:
            record("other_run/particles/TS_01.json", change)(patch)

    return prepare


def swing(content: dict[str, Any]) -> None:
    content["tilts"]["tilt"][2] += 0.5


CUBE, ONES = blobs_map(24), np.ones((24, 24, 24))
CORNER, BALL = np.zeros((24, 24, 24)), np.zeros((24, 24, 24))
CORNER[:3, :3, :3], BALL[10:15, 10:15, 10:14] = 1, 1
HOLE = np.where(CUBE > 0.5, np.nan, CUBE)
EXTRACT = "emc_extract TS_01 --label ribo --set new --box 24 --quiet"
AGAIN = "emc_extract TS_01 --label ribo --set ribo --box 24 --quiet"
AVERAGE = "emc_average ribo --path avg --quiet"
REFINE = "emc_refine ribo --reference ref.mrc --startres 14 --local --iterations 1 --path spt_01 --quiet"
SELECT = "emc_select ribo --set new --quiet"
RESUME = "emc_refine ribo --reference ref.mrc --startres 14 --local --iterations 2 --path spt_00 --resume --quiet"
SUBTILT = "emc_subtilt spt_00 --path sub_00 --quiet"
TOMOCPR = "emc_tomocpr spt_00 --path cpr_00 --quiet"
TWO = "emc_tomocpr spt_00 other_run --path cpr_00 --no-record --quiet"
PCA = "emc_pca ribo --scales 12 --axes 2 --path pca_01 --quiet"
CLUSTER = "emc_cluster pca_00 --along 12:1 --quiet"
MAPBACK = "emc_mapback spt_00 --pixel-size 8 --quiet"
TOMOGRAM = "emc_tomogram TS_01 --load --bin 2 --quiet"
TOMOCTF = "emc_tomoctf TS_01 --quiet"
MATCH = "emc_tempmatch TS_01 --template ref.mrc --resolution 10 --quiet"
IN_VOLUME = "emc_tempmatch --volume ref.mrc --template other.mrc --resolution 10 --quiet"
IMPORT = "emc_import new.mrc --dose 3 --dose-order sequential --quiet"
TILTS = "-40\n-20\n0\n20\n40\n"
NEW = np.random.default_rng(0).normal(100, 10, (5, 40, 44)).astype(np.float32)


def new(array: np.ndarray = NEW, pixel: float = 3.0, tilts: str | None = TILTS) -> Prepare:
    """A raw stack to import, with its angles beside it."""
    stack = volume("new.mrc", array, pixel, stack=True)
    return stack if tilts is None else both(stack, write("new.rawtlt", tilts))


# fmt: off
CASES = {
    # records
    "info: no such name": case("emc_info TS_1", None, "TS_1", "did you mean TS_01"),
    "info: broken JSON": case("emc_info TS_01", cut(INFO, 300), INFO, "not valid JSON", "restore"),
    "info: empty record": case("emc_info TS_01", write(INFO, ""), INFO, "restore"),
    "info: unknown key": case(
        "emc_info TS_01", put(INFO, "alignment", "axs", value=[]), INFO, "alignment.axs", "did you mean axis",
    ),
    "info: newer schema": case("emc_info TS_01", put(INFO, "schema", value=2), INFO, "schema is 2", "newer"),
    "info: NaN": case("emc_info TS_01", put(INFO, "alignment", "tilt", 0, value=float("nan")), INFO, "alignment.tilt"),
    "info: wrong length": case(
        "emc_info TS_01", put(INFO, "tilts", "use", value=[True]), INFO, "tilts.use", "1 entries",
    ),
    "info: not a record": case("emc_info ref.json", write("ref.json", '{"a": 1}'), "ref.json", "kind"),
    "info: a cut stack": case(f"emc_info {RAW}", cut(RAW, 5000), RAW, "cut short"),
    "info: no history": case("emc_info ref.mrc --history", None, "ref.mrc"),
    "info: not an image": case("emc_info a.mrc", write("a.mrc", "text " * 500), "a.mrc", "not an MRC file"),
    # extraction
    "extract: nothing named": case("emc_extract --label ribo --set new --box 24", None, "--all"),
    "extract: no such series": case(EXTRACT.replace("TS_01", "TS_02"), None, "TS_02", "did you mean TS_01"),
    "extract: not aligned": case(EXTRACT, drop(INFO, "alignment"), INFO, "alignment", "run emc_tomogram TS_01"),
    "extract: no picks": case(EXTRACT, drop(INFO, "picks"), INFO, "picks", "emc_import --picks"),
    "extract: other label": case(EXTRACT.replace("label ribo", "label gold"), None, INFO, "'gold'", "there are ribo"),
    "extract: nobody has them": case("emc_extract --all --label gold --set new --box 24", None, "info", "'gold'"),
    "extract: points and angles": case(
        EXTRACT, put(INFO, "picks", "ribo", "rot", value=[1.0]), INFO, "picks.ribo", "rot",
    ),
    "extract: no stack": case(EXTRACT, gone(RAW), RAW, "no such file"),
    "extract: stack is a folder": case(EXTRACT, both(gone(RAW), write(f"{RAW}/a", "")), RAW, "folder"),
    "extract: may not be read": case(EXTRACT, unreadable(RAW), RAW, "can't be read", "permissions"),
    "extract: empty stack": case(EXTRACT, write(RAW, ""), RAW, "is empty"),
    "extract: half a header": case(EXTRACT, cut(RAW, 700), RAW, "less than a header"),
    "extract: cut stack": case(EXTRACT, cut(RAW, 40000), RAW, "cut short", "copy"),
    "extract: a text": case(EXTRACT, write(RAW, "not an image\n" * 200), RAW, "not an MRC file"),
    "extract: zipped": case(EXTRACT, write(RAW, b"\x1f\x8b" + bytes(2000)), RAW, "gzip", "gunzip"),
    "extract: complex images": case(EXTRACT, write(RAW, mrc_bytes(NEW, PIXEL, True, w3=4)), RAW, "mode 4"),
    "extract: fewer images": case(EXTRACT, images(lambda a: a[:4]), RAW, "(4, 100, 111)", "(5, 100, 111)", "TS_01"),
    "extract: other pixels": case(EXTRACT, images(lambda _: None, 2.7), RAW, "2.7", "2 Å/px", "TS_01"),
    "extract: pixels not square": case(
        EXTRACT, write(RAW, mrc_bytes(SERIES.stack(), PIXEL, True, w11=0x44000000)), RAW, "unequal",
    ),
    "extract: zero pixel size": case(EXTRACT, put(INFO, "source", "pixel_size", value=0.0), INFO, "source.pixel_size"),
    "extract: NaN": case(EXTRACT, images(nan), RAW, "image 2", "not finite", "exclude"),
    "extract: a blank image": case(EXTRACT, images(blank), RAW, "image 3", "no contrast", "exclude"),
    "extract: never seen": case(
        EXTRACT, put(INFO, "picks", "ribo", "xyz", value=[[1e6, 0.0, 0.0]] * 4), INFO, "no tilt sees",
    ),
    "extract: all tilts out": case(EXTRACT, put(INFO, "tilts", "use", value=[False] * 5), INFO, "no tilt sees"),
    "extract: larger than the image": case(EXTRACT.replace("24", "4000"), None, INFO, "no tilt sees"),
    "extract: box of 4": case(EXTRACT.replace("box 24", "box 4"), None, "--box", "'4' is not 8 pixels or more"),
    "extract: symmetry": case(f"{EXTRACT} --symmetry q3", None, "q3", "cN"),
    "extract: two pixel sizes": case(
        EXTRACT.replace("TS_01", "TS_01 TS_02"),
        lambda _: Path("info/TS_02_info.json").write_text(
            Path(INFO).read_text().replace('"TS_01"', '"TS_02"').replace('"pixel_size": 2.0', '"pixel_size": 3.0')
        ),
        "info", "2.0, 3.0", "sets of their own",
    ),
    "extract: folder is a file": case(EXTRACT, folder_is_a_file("particles"), "particles", "is a file, not a folder"),
    "extract: read-only folder": case(EXTRACT, read_only, "particles", "can't be written to", "permissions"),
    "extract: read-only disk": case(EXTRACT, read_only_disk, "particles/new", "read-only"),
    "extract: no room": case(EXTRACT, NO_ROOM, "needs", "are free", "free some space"),
    "extract: disk full": case(EXTRACT, FULL, "particles/new/TS_01.mrcs", "no space left", "free some space"),
    "extract: disk fills up": case(EXTRACT, fills_up(7), "particles/new/TS_01.mrcs", "no space left"),
    "extract: full at the record": case(EXTRACT, failing(errno.ENOSPC, "replace"), "particles/new", "no space left"),
    "extract: full, the old set stays": case(AGAIN, FULL, STACK, "no space left"),
    "extract: misspelt option": case(f"{EXTRACT} --binn 2", None, "--binn", "did you mean --bin"),
    # averages
    "average: no such set": case("emc_average rib", None, "rib", "there are the sets ribo"),
    "average: no images": case(AVERAGE, both(gone(STACK), gone(RAW)), RAW, "is missing", FILE),
    "average: other raw images": case(
        AVERAGE, both(gone(STACK), volume(RAW, SERIES.stack()[::-1], stack=True)), RAW, "not the stack", FILE,
    ),
    "average: raw images of another shape": case(
        AVERAGE, both(gone(STACK), volume(RAW, NEW, stack=True)), RAW, "not the stack", FILE,
    ),
    "average: stack too short": case(AVERAGE, cut(STACK, 9000), STACK, "cut short"),
    "average: stack of others": case(
        AVERAGE, volume(STACK, NEW, stack=True), STACK, "(5, 40, 44)", "extract them again",
    ),
    "average: other pixels": case(AVERAGE, put(FILE, "pixel_size", value=3.0), STACK, "2 Å/px", FILE, "3 Å/px"),
    "average: stack of zeros": case(AVERAGE, lambda _: fill(0), "ribo", "no contrast"),
    "average: constant stack": case(AVERAGE, lambda _: fill(1), "ribo", "no contrast"),
    "average: no particle file": case(AVERAGE, gone(FILE), FILE, "no such record"),
    "average: broken particle file": case(AVERAGE, cut(FILE, 900), FILE, "JSON"),
    "average: wrong length": case(
        AVERAGE, put(FILE, "particles", 1, "visible", value=[1]), FILE, "particles[1].visible",
    ),
    "average: two of one id": case(AVERAGE, put(FILE, "particles", 1, "id", value="TS_01.000000"), FILE, "repeats"),
    "average: half 3": case(AVERAGE, put(FILE, "particles", 0, "half", value=3), FILE, "particles[0].half"),
    "average: newer particles": case(AVERAGE, put(FILE, "schema", value=9), FILE, "newer"),
    "average: a record of another kind": case(AVERAGE, lambda _: shutil.copy(INFO, SET), SET, "tiltseries", "set"),
    "average: nobody is used": case(AVERAGE, everyone("use", False), "ribo", "no particles to use"),
    "average: no such class": case(f"{AVERAGE} --class 7", None, "ribo", "no particles to use", "class"),
    "average: one half only": case(AVERAGE, everyone("half", 1), "ribo", "half 2 has no images"),
    "average: no mask": case(f"{AVERAGE} --mask none.mrc", None, "none.mrc", "no such file"),
    "average: mask of another box": case(
        f"{AVERAGE} --mask m.mrc", volume("m.mrc", ONES[:20, :20, :20]), "m.mrc", "(20, 20, 20)",
    ),
    "average: mask of another pixel": case(f"{AVERAGE} --mask m.mrc", volume("m.mrc", ONES, 3.0), "m.mrc", "3 Å"),
    "average: mask of zeros": case(f"{AVERAGE} --mask m.mrc", volume("m.mrc", 0 * ONES), "m.mrc", "emc_mask"),
    "average: mask to 5": case(f"{AVERAGE} --mask m.mrc", volume("m.mrc", 5 * CUBE), "m.mrc", "from 0 to 1"),
    "average: mask of NaN": case(f"{AVERAGE} --mask m.mrc", volume("m.mrc", HOLE), "m.mrc", "not finite"),
    "average: unknown symmetry": case(f"{AVERAGE} --symmetry x2", None, "x2", "cN"),
    "average: folder is a file": case(AVERAGE, write("avg", "a file"), "avg", "is a file, not a folder"),
    "average: read-only folder": case(AVERAGE, read_only, "can't be written to"),
    "average: no room": case(AVERAGE, NO_ROOM, "free some space"),
    "average: disk full": case(AVERAGE, FULL, "avg/", "no space left"),
    # refinement
    "refine: constant stack": case(REFINE, lambda _: fill(1), "ribo", "no contrast"),
    "refine: no reference": case(REFINE.replace("ref.mrc", "none.mrc"), None, "none.mrc", "no such file"),
    "refine: reference not cubic": case(REFINE, volume("ref.mrc", CUBE[:20]), "ref.mrc", "not a cube", "emc_volume"),
    "refine: constant reference": case(REFINE, volume("ref.mrc", ONES), "ref.mrc", "the same everywhere"),
    "refine: NaN in the reference": case(REFINE, volume("ref.mrc", HOLE), "ref.mrc", "not finite"),
    "refine: no pixel size": case(REFINE, volume("ref.mrc", CUBE, 0.0), "ref.mrc", "no pixel size"),
    "refine: mask of another box": case(
        f"{REFINE} --mask m.mrc", volume("m.mrc", ONES[:20, :20, :20]), "m.mrc", "emc_mask",
    ),
    "refine: mask of zeros": case(f"{REFINE} --mask m.mrc", volume("m.mrc", 0 * ONES), "m.mrc", "emc_mask"),
    "refine: beyond Nyquist": case(REFINE.replace("14", "1"), None, "--startres 1", "give 4 or more"),
    "refine: resume nothing": case("emc_refine ribo --reference ref.mrc --resume", None, "--resume", "--path"),
    "refine: resume as another": case(RESUME.replace("14", "12"), None, "spt_00/run.json", "startres", "same options"),
    "refine: reference changed": case(RESUME, volume("ref.mrc", CUBE[::-1]), "ref.mrc", "has changed"),
    "refine: broken run": case(RESUME, cut("spt_00/run.json", 200), "spt_00/run.json", "JSON"),
    "refine: half map gone": case(RESUME, gone("spt_00/half2.mrc"), "spt_00/half2.mrc", "no such file"),
    "refine: another's folder": case(
        REFINE.replace("spt_01", "avg"), write("avg/average.mrc", "mine"), "avg/average.mrc", "did not write it",
    ),
    "refine: disk full": case(REFINE, FULL, "spt_01/", "no space left"),
    "refine: NaN for a number": case(REFINE.replace("14", "nan"), None, "--startres", "not finite"),
    "refine: no tilt, some tilt": case(f"{REFINE} --in-plane-only --max-tilt 10", None, "--in-plane-only", "--max-tilt 10"),
    "refine: turns by nothing": case(f"{REFINE} --max-angle 0", None, "--max-angle", "not above zero"),
    "refine: a shift below zero": case(f"{REFINE} --max-shift=-3", None, "--max-shift", "below zero"),
    "refine: keeps nobody": case(f"{REFINE} --keep 0", None, "--keep", "leaves nothing"),
    "refine: keeps more than all": case(f"{REFINE} --keep 1.5", None, "--keep", "from 0 to 1"),
    "refine: unknown filter": case(f"{REFINE} --filter round", None, "--filter", "spherical"),
    "refine: unknown symmetry": case(f"{REFINE} --symmetry q7", None, "q7", "cN"),
    "refine: a helix that does not rise": case(f"{REFINE} --symmetry helix:0,20", None, "rise is not above 0"),
    "refine: no focus": case(f"{REFINE} --focus none.mrc", None, "none.mrc", "no such file"),
    "refine: focus of another box": case(
        f"{REFINE} --focus m.mrc", volume("m.mrc", ONES[:20, :20, :20]), "m.mrc", "emc_mask",
    ),
    "refine: focus of NaN": case(f"{REFINE} --focus m.mrc", volume("m.mrc", HOLE), "m.mrc", "not finite"),
    "refine: focus to 5": case(f"{REFINE} --focus m.mrc", volume("m.mrc", 5 * CUBE), "m.mrc", "from 0 to 1"),
    "refine: focus on nothing": case(
        f"{REFINE} --focus m.mrc", both(volume("m.mrc", CORNER), volume("ref.mrc", BALL)), "the reference", "--focus",
    ),
    "refine: one particle": case(REFINE, both(*(put(FILE, "particles", i, "use", value=False) for i in (1, 2, 3))), "ribo",
                                 "has no images", "use more particles"),
    "refine: no particles": case(REFINE, everyone("use", False), "ribo", "no particles to use"),
    "refine: never seen": case(REFINE, everyone("visible", [0] * 5), "ribo", "half 1 has no images"),
    "refine: all tilts out": case(REFINE, put(FILE, "tilts", "use", value=[False] * 5), "ribo", "half 1 has no images"),
    "refine: no such set": case(REFINE.replace("refine ribo", "refine rib"), None, "rib", "there are the sets ribo"),
    "refine: poses of no run": case(f"{REFINE} --particles spt_07", None, "spt_07"),
    "refine: poses of others": case(
        f"{REFINE} --particles spt_00", everyone_else("particles/ribo/TS_01.json"), "spt_00", "none of these particles",
    ),
    "refine: poses of the other half": case(
        f"{REFINE} --particles spt_00", record("spt_00/particles/TS_01.json", swap_halves), "spt_00", "same halves",
    ),
    "refine: resume with a share": case(f"{RESUME} --keep 0.8", None, "spt_00/run.json", "keep", "same options"),
    "refine: resume with limits": case(f"{RESUME} --max-angle 9", None, "spt_00/run.json", "max_angle", "same options"),
    "refine: resume with own noise": case(f"{RESUME} --own-noise", None, "spt_00/run.json", "own_noise", "same options"),
    "refine: resume at rest": case(f"{RESUME} --no-motion", None, "spt_00/run.json", "no_motion", "same options"),
    "refine: resume with a seed": case(f"{RESUME} --seed 4", None, "spt_00/run.json", "seed", "same options"),
    "refine: resume with symmetry": case(f"{RESUME} --symmetry c2", None, "spt_00/run.json", "symmetry", "same options"),
    "refine: resume with a focus": case(
        f"{RESUME} --focus mask.mrc", None, "spt_00/run.json", "focus", "same options",
    ),
    # refinement of images and of tilt series
    "subtilt: a set": case("emc_subtilt ribo --quiet", None, "ribo", "has no half1.mrc", "emc_refine"),
    "subtilt: no such run": case("emc_subtilt spt_07 --quiet", None, "spt_07", "no such particle set or run"),
    "subtilt: no half map": case(SUBTILT, gone("spt_00/half2.mrc"), "spt_00", "has no half2.mrc"),
    "subtilt: maps of another box": case(
        SUBTILT, both(volume("spt_00/mask.mrc", ONES[:20, :20, :20]), put("spt_00/run.json", "options", "mask", value="m.mrc")),
        "spt_00/mask.mrc", "emc_mask",
    ),
    "subtilt: broken run": case(SUBTILT, cut("spt_00/run.json", 200), "spt_00/run.json", "JSON"),
    "subtilt: no images": case(SUBTILT, both(gone(STACK), gone(RAW)), RAW, "is missing"),
    "subtilt: constant stack": case(SUBTILT, lambda _: fill(1), "spt_00", "no contrast"),
    "subtilt: nobody is used": case(
        SUBTILT, both(*(put("spt_00/particles/TS_01.json", "particles", i, "use", value=False) for i in range(4))),
        "spt_00", "no particles to use",
    ),
    "subtilt: one half only": case(
        SUBTILT, both(*(put("spt_00/particles/TS_01.json", "particles", i, "half", value=1) for i in range(4))),
        "spt_00", "half 2 has no images",
    ),
    "subtilt: keeps nobody": case(f"{SUBTILT} --keep 0", None, "--keep", "leaves nothing"),
    "subtilt: keeps more than all": case(f"{SUBTILT} --keep 1.5", None, "--keep", "from 0 to 1"),
    "subtilt: fits nonsense": case(f"{SUBTILT} --fit shift,weight", None, "--fit", "'weight'", "shift, turn, defocus"),
    "subtilt: fits nothing": case(f"{SUBTILT} --fit=", None, "--fit", "shift, turn, defocus"),
    "subtilt: no iterations": case(f"{SUBTILT} --iterations 0", None, "--iterations", "0"),
    "subtilt: unknown filter": case(f"{SUBTILT} --filter round", None, "--filter", "spherical"),
    "subtilt: unknown symmetry": case(f"{SUBTILT} --symmetry q7", None, "q7", "cN"),
    "subtilt: no mask": case(f"{SUBTILT} --mask none.mrc", None, "none.mrc", "no such file"),
    "subtilt: mask of another box": case(
        f"{SUBTILT} --mask m.mrc", volume("m.mrc", ONES[:20, :20, :20]), "m.mrc", "emc_mask",
    ),
    "subtilt: mask to 5": case(f"{SUBTILT} --mask m.mrc", volume("m.mrc", 5 * CUBE), "m.mrc", "from 0 to 1"),
    "subtilt: two runs": case("emc_subtilt spt_00 spt_01 --quiet", None, "spt_01"),
    "subtilt: resume nothing": case("emc_subtilt spt_00 --resume --quiet", None, "--resume", "--path"),
    "subtilt: another's folder": case(
        SUBTILT, write("sub_00/average.mrc", "mine"), "sub_00/average.mrc", "did not write it",
    ),
    "subtilt: onto its own start": case("emc_subtilt spt_00 --path spt_00 --quiet", None, "spt_00/run.json", "exists"),
    "subtilt: read-only folder": case(SUBTILT, read_only, "can't be written to"),
    "subtilt: no room": case(SUBTILT, NO_ROOM, "free some space"),
    "subtilt: disk full": case(SUBTILT, FULL, "sub_00/", "no space left"),
    "tomocpr: a set": case("emc_tomocpr ribo --quiet", None, "ribo", "has no half1.mrc", "emc_refine"),
    "tomocpr: no such run": case("emc_tomocpr spt_07 --quiet", None, "spt_07", "no such particle set or run"),
    "tomocpr: second of them no run": case("emc_tomocpr spt_00 spt_07 --quiet", None, "spt_07", "no such particle set or run"),
    "tomocpr: refines nonsense": case(f"{TOMOCPR} --refine ctf,tilt", None, "--refine", "'tilt'", "geometry, motion, ctf"),
    "tomocpr: one mask for two": case(f"{TWO} --mask mask.mrc", another_run(), "--mask", "each run has its own"),
    "tomocpr: one symmetry for two": case(f"{TWO} --symmetry c2", another_run(), "--symmetry", "each run has its own"),
    "tomocpr: another geometry": case(
        TWO, another_run(swing), "other_run", "another geometry of TS_01 than spt_00", "one alignment",
    ),
    "tomocpr: another geometry, tried": case(
        f"{TWO} --dry-run", another_run(swing), "other_run", "another geometry of TS_01 than spt_00", "one alignment",
    ),
    "tomocpr: the same run twice": case("emc_tomocpr spt_00 spt_00 --quiet", None, "spt_00", "runs of different particles"),
    "tomocpr: the same particles": case(TWO, another_run(), "other_run", "as spt_00 has"),
    "tomocpr: resume nothing": case("emc_tomocpr spt_00 --resume --quiet", None, "--resume", "--path"),
    "tomocpr: aligned anew": case(
        TOMOCPR, put(INFO, "alignment", "shift_x", 2, value=99.0), INFO, "another shift_x", "ribo", "--no-record",
    ),
    "tomocpr: no alignment": case(TOMOCPR, drop(INFO, "alignment"), INFO, "alignment", "run emc_tomogram TS_01"),
    "tomocpr: no record": case(TOMOCPR, gone(INFO), INFO, "no tilt series TS_01"),
    "tomocpr: mask of zeros": case(f"{TOMOCPR} --mask m.mrc", volume("m.mrc", 0 * ONES), "m.mrc", "emc_mask"),
    "tomocpr: another's folder": case(
        TOMOCPR, write("cpr_00/average.mrc", "mine"), "cpr_00/average.mrc", "did not write it",
    ),
    "tomocpr: disk full": case(TOMOCPR, FULL, "cpr_00/", "no space left"),
    # differences, classes, and where they lie
    "pca: no such set": case(PCA.replace("ribo", "rib"), None, "rib", "there are the sets ribo"),
    "pca: no images": case(PCA, both(gone(STACK), gone(RAW)), RAW, "is missing"),
    "pca: constant stack": case(PCA, lambda _: fill(1), "ribo", "no contrast"),
    "pca: nobody is used": case(PCA, everyone("use", False), "ribo", "no particles to use"),
    "pca: no such class": case(f"{PCA} --class 7", None, "ribo", "no particles to use"),
    "pca: one half only": case(PCA, everyone("half", 1), "ribo", "half 2 has no images"),
    "pca: two particles": case(
        PCA, both(*(put(FILE, "particles", i, "half", value=1 + i % 2) for i in (0, 1)),
                  *(put(FILE, "particles", i, "use", value=False) for i in (2, 3))), "ribo", "2 particles", "3 or more",
    ),
    "pca: a subset of two": case(f"{PCA} --subset 2", None, "--subset", "2 particles", "3 or more"),
    "pca: a subset of none": case(f"{PCA} --subset 0", None, "--subset", "not 1 or more"),
    "pca: no axes": case(f"{PCA} --axes 0", None, "--axes", "not 1 or more"),
    "pca: beyond Nyquist": case(f"{PCA} --scales 12,3", None, "--scales", "3 is not within 4 to 16 Å"),
    "pca: larger than the box": case(f"{PCA} --scales 60,12", None, "--scales", "60 is not within 4 to 16 Å"),
    "pca: a scale twice": case(f"{PCA} --scales 12,6,12.0", None, "--scales", "twice"),
    "pca: scales in words": case(f"{PCA} --scales fine", None, "--scales", "'fine' is not a number"),
    "pca: NaN for a scale": case(f"{PCA} --scales nan", None, "--scales", "not finite"),
    "pca: no scale": case(f"{PCA} --scales=", None, "--scales"),
    "pca: unknown components": case(f"{PCA} --components ica", None, "--components", "svd"),
    "pca: unknown symmetry": case(f"{PCA} --symmetry q7", None, "q7", "cN"),
    "pca: no mask": case(f"{PCA} --mask none.mrc", None, "none.mrc", "no such file"),
    "pca: mask of another box": case(
        f"{PCA} --mask m.mrc", volume("m.mrc", ONES[:20, :20, :20]), "m.mrc", "emc_mask",
    ),
    "pca: mask of zeros": case(f"{PCA} --mask m.mrc", volume("m.mrc", 0 * ONES), "m.mrc", "emc_mask"),
    "pca: mask to 5": case(f"{PCA} --mask m.mrc", volume("m.mrc", 5 * CUBE), "m.mrc", "from 0 to 1"),
    "pca: another's folder": case(
        PCA.replace("pca_01", "avg"), write("avg/average.mrc", "mine"), "avg/average.mrc", "did not write it",
    ),
    "pca: onto a refinement": case(PCA.replace("pca_01", "spt_00"), None, "spt_00/run.json", "did not write it"),
    "pca: folder is a file": case(PCA, write("pca_01", "a file"), "pca_01", "is a file, not a folder"),
    "pca: read-only folder": case(PCA, read_only, "can't be written to"),
    "pca: no room": case(PCA, NO_ROOM, "free some space"),
    "pca: disk full": case(PCA, FULL, "pca_01/", "no space left"),
    "cluster: a set": case("emc_cluster ribo", None, "ribo", "no run of emc_pca"),
    "cluster: a refinement": case("emc_cluster spt_00", None, "spt_00", "no run of emc_pca"),
    "cluster: no such run": case("emc_cluster pca_07", None, "pca_07", "no run of emc_pca"),
    "cluster: not finished": case(
        CLUSTER, put("pca_00/run.json", "stopped_at", value="maps"), "pca_00", "not finished", "emc_pca again",
    ),
    "cluster: broken run": case(CLUSTER, cut("pca_00/run.json", 200), "pca_00/run.json", "JSON"),
    "cluster: no coordinates": case(CLUSTER, gone("pca_00/coordinates.npz"), "pca_00/coordinates.npz", "emc_pca again"),
    "cluster: cut coordinates": case(
        CLUSTER, cut("pca_00/coordinates.npz", 300), "pca_00/coordinates.npz", "can't be read",
    ),
    "cluster: no particles": case(CLUSTER, gone("pca_00/particles/TS_01.json"), "pca_00/particles/TS_01.json"),
    "cluster: no images": case(CLUSTER, both(gone(STACK), gone(RAW)), RAW, "is missing"),
    "cluster: no mask": case(CLUSTER, gone("pca_00/mask.mrc"), "pca_00/mask.mrc", "no such file"),
    "cluster: along no scale": case(CLUSTER.replace("12:1", "30:1"), None, "--along", "no scale of 12"),
    "cluster: along no axis": case(CLUSTER.replace("12:1", "12:3"), None, "--along", "no axis from 1 to 2"),
    "cluster: along nonsense": case(CLUSTER.replace("12:1", "all"), None, "--along", "'all'"),
    "cluster: along nothing": case(CLUSTER.replace("12:1", "12"), None, "--along", "no axis from 1 to 2"),
    "cluster: more than particles": case(f"{CLUSTER} --clusters 2,5", None, "--clusters", "5 clusters of 4 particles"),
    "cluster: none": case(f"{CLUSTER} --clusters 0", None, "--clusters", "'0'"),
    "cluster: many": case(f"{CLUSTER} --clusters many", None, "--clusters", "neither auto nor"),
    "cluster: unknown method": case(f"{CLUSTER} --method som", None, "--method", "hierarchical"),
    "cluster: another's map": case(
        f"{CLUSTER} --clusters 1", write("pca_00/class_1.mrc", "mine"), "pca_00/class_1.mrc", "did not write it",
    ),
    "cluster: read-only folder": case(f"{CLUSTER} --clusters 1", read_only, "can't be written to"),
    "mapback: no such run": case(MAPBACK.replace("spt_00", "spt_07"), None, "spt_07", "no such particle set or run"),
    "mapback: no such series": case(MAPBACK.replace("spt_00", "spt_00 TS_02"), None, "TS_02", "there are TS_01"),
    "mapback: a set without a map": case(MAPBACK.replace("spt_00", "ribo"), None, "ribo", "--average"),
    "mapback: no map": case(f"{MAPBACK} --average none.mrc", None, "none.mrc", "no such file"),
    "mapback: a constant map": case(f"{MAPBACK} --average m.mrc", volume("m.mrc", ONES), "m.mrc", "the same everywhere"),
    "mapback: NaN in the map": case(f"{MAPBACK} --average m.mrc", volume("m.mrc", HOLE), "m.mrc", "not finite"),
    "mapback: too many maps": case(f"{MAPBACK} --average ref.mrc --average other.mrc", None, "--average", "2 maps"),
    "mapback: no such class": case(f"{MAPBACK} --class 7", None, "spt_00", "no particles to"),
    "mapback: no record": case(MAPBACK, gone(INFO), INFO, "give --like TOMOGRAM"),
    "mapback: no pixels": case(f"{MAPBACK} --pixel-size 0", None, "--pixel-size", "not above zero"),
    "mapback: like nothing": case(
        "emc_mapback spt_00 --like none.mrc --quiet", None, "none.mrc", "no such file",
    ),
    "mapback: unknown colour": case(f"{MAPBACK} --colour red", None, "--colour", "score"),
    "mapback: another's file": case(
        MAPBACK, write("mapback/TS_01.star", "mine"), "mapback/TS_01.star", "did not write it",
    ),
    "mapback: folder is a file": case(MAPBACK, write("mapback", "a file"), "mapback", "is a file, not a folder"),
    "mapback: read-only folder": case(MAPBACK, read_only, "can't be written to"),
    "mapback: no room": case(MAPBACK, NO_ROOM, "free some space"),
    "mapback: disk full": case(MAPBACK, FULL, "mapback/", "no space left"),
    # selection
    "select: nothing": case("emc_select --set new", None, "particle sets", "--label"),
    "select: sets and picks": case(f"{SELECT} --label ribo", None, "particle sets", "--label"),
    "select: no such set": case(SELECT.replace("ribo", "rib"), None, "rib", "there are the sets ribo"),
    "select: no name": case("emc_select ribo", None, "no name", "--set"),
    "select: onto itself": case("emc_select ribo --set ribo --overwrite", None, "ribo", "name of its own"),
    "select: a part onto another set": case(
        "emc_select spt_00 --set rib --split 2", write("particles/rib_1/particles.json", "{}"),
        "particles/rib_1/particles.json", "did not write it",
    ),
    "select: no stack": case(SELECT, both(gone(STACK), gone(RAW)), "TS_01"),
    "select: no such class": case(f"{SELECT} --class 7,8", None, "ribo", "no particle of 4 is left", "--class"),
    "select: nothing so good": case(
        f"{SELECT} --score-above 5", everyone("score", 1.0), "ribo", "no particle of 4 is left", "--score-above",
    ),
    "select: nobody is used": case(SELECT, everyone("use", False), "ribo", "no particles to use"),
    "select: no z": case(f"{SELECT} --z-above 5", None, "TS_01", "no z", "leave --z-above out"),
    "select: no such series": case(f"{SELECT} --tilt-series TS_02", None, "TS_02", "there are TS_01"),
    "select: too many parts": case(f"{SELECT} --split 5", None, "4 particles", "5 sets"),
    "select: one part": case(f"{SELECT} --split 1", None, "--split", "2 or more"),
    "select: no such part": case(f"{SELECT} --split half", None, "--split", "half"),
    "select: neighbours of any distance": case(f"{SELECT} --neighbours 2", None, "--neighbour-distance", "both"),
    "select: neighbours turned round": case(f"{SELECT} --neighbours 5,2", None, "--neighbours", "MIN,MAX"),
    "select: classes in words": case(f"{SELECT} --class a", None, "--class", "whole number"),
    "select: margins of particles": case(f"{SELECT} --margin-above 0", None, "--margin-above", "particles"),
    "select: best in two ways": case(f"{SELECT} --best 2 --best-fraction 0.5", None, "--best-fraction", "not allowed"),
    "select: other box": case(
        "emc_select ribo spt_00 --set new", both(put("spt_00/particles/particles.json", "box", value=32)),
        "spt_00", "32", "24", "in the same way",
    ),
    "select: other geometry": case(
        "emc_select ribo spt_00 --set new", put(FILE, "tilts", "axis", 0, value=1.0), "TS_01", "ribo and spt_00", "tilts",
    ),
    "select: another's set": case(
        SELECT, write("particles/new/particles.json", "{}"), "particles/new/particles.json", "did not write it",
    ),
    "select: read-only folder": case(SELECT, read_only, "can't be written to"),
    "select: disk full": case(SELECT, FULL, "particles/new/TS_01.json", "no space left"),
    "select: full while it copies": case(
        SELECT.replace("ribo", "ribo other"), both(another_set, FULL), "particles/new/TS_01.mrcs", "no space left",
    ),
    "select: no room to copy": case(SELECT.replace("ribo", "ribo other"), both(another_set, NO_ROOM), "free some space"),
    "select: picks without a label": case("emc_select --label ribo", None, "--to"),
    "select: picks onto themselves": case("emc_select --label ribo --to ribo --overwrite", None, "--to"),
    "select: no such picks": case("emc_select --label gold --to new", None, "info", "'gold'"),
    "select: no such picks there": case(
        "emc_select --label gold --to new --tilt-series TS_01", None, INFO, "'gold'", "there are ribo",
    ),
    "select: no pick is there": case(
        "emc_select --label ribo --to new --region=1e5,2e5,0,1,0,1", None, "ribo", "no pick of 4 is left", "--region",
    ),
    "select: a set of picks": case("emc_select --label ribo --to new --set new", None, "--set", "picks"),
    "select: classes of picks": case("emc_select --label ribo --to new --class 1", None, "--class", "picks"),
    # maps
    "fsc: other sizes": case("emc_fsc ref.mrc b.mrc", volume("b.mrc", CUBE[:20, :20, :20]), "b.mrc"),
    "fsc: other pixels": case("emc_fsc ref.mrc b.mrc", volume("b.mrc", CUBE[::-1], 3.0), "b.mrc", "3"),
    "fsc: not cubic": case(
        "emc_fsc a.mrc b.mrc", both(volume("a.mrc", CUBE[:20]), volume("b.mrc", CUBE[2:22])), "a.mrc",
    ),
    "fsc: constant": case("emc_fsc ref.mrc b.mrc", volume("b.mrc", ONES), "b.mrc", "same everywhere"),
    "fsc: NaN": case("emc_fsc ref.mrc b.mrc", volume("b.mrc", HOLE), "b.mrc", "not finite"),
    "fsc: mask of zeros": case(
        "emc_fsc ref.mrc other.mrc --mask m.mrc", volume("m.mrc", 0 * ONES), "m.mrc", "emc_mask",
    ),
    "fsc: no map": case("emc_fsc ref.mrc none.mrc", None, "none.mrc", "no such file"),
    "fsc: disk full": case("emc_fsc ref.mrc other.mrc --quiet", FULL, "fsc", "no space left"),
    "mask: constant": case("emc_mask b.mrc --output m.mrc --quiet", volume("b.mrc", ONES), "b.mrc", "same everywhere"),
    "mask: no map": case("emc_mask none.mrc", None, "none.mrc", "no such file"),
    "mask: output is a folder": case("emc_mask ref.mrc --output info", None, "info", "is a folder"),
    "mask: another's file": case("emc_mask ref.mrc", None, "mask.mrc", "did not write it", "--overwrite"),
    "mask: disk full": case(
        "emc_mask ref.mrc --sphere 10 --edge 4 --output m.mrc --quiet", FULL, "m.mrc", "no space left",
    ),
    "volume: other grid": case(
        "emc_volume ref.mrc out.mrc --mask b.mrc", volume("b.mrc", ONES, 3.0), "b.mrc", "one grid",
    ),
    "volume: nothing left": case(
        "emc_volume ref.mrc out.mrc --lowpass 30 --highpass 20", None, "--lowpass 30", "coarser",
    ),
    "volume: too large for float16": case(
        "emc_volume b.mrc out.mrc --float16 --quiet", volume("b.mrc", 1e6 * CUBE), "b.mrc", "float16",
    ),
    "volume: cut map": case("emc_volume ref.mrc out.mrc", cut("ref.mrc", 3000), "ref.mrc", "cut short"),
    "volume: disk full": case("emc_volume ref.mrc out.mrc --quiet", FULL, "out.mrc", "no space left"),
    # simulation
    "simulate: dark map": case("emc_simulate sim --map d.mrc", volume("d.mrc", -CUBE), "white", "invert"),
    "simulate: map not cubic": case("emc_simulate sim --map d.mrc", volume("d.mrc", CUBE[:20]), "d.mrc", "not a cube"),
    "simulate: no room for them": case("emc_simulate sim --size 64 64 --count 500", None, "no room", "fewer"),
    "simulate: folder is a file": case("emc_simulate ref.mrc/sim", None, "ref.mrc", "is a file, not a folder"),
    "simulate: disk full": case(
        "emc_simulate sim --size 64 64 --count 1 --thickness 400 --tilt-range 0 0 1 --quiet", FULL, "sim.mrc", "no space left"
    ),
    "simulate: no space": case("emc_simulate sim --quiet", NO_ROOM, "free some space"),
    # tomograms
    "tomogram: not aligned": case(TOMOGRAM, drop(INFO, "alignment"), INFO, "alignment", "run emc_tomogram"),
    "tomogram: aligned already": case("emc_tomogram TS_01 --quiet", None, INFO, "aligned already", "--load"),
    "tomogram: no CTF": case(f"{TOMOGRAM} --ctf wiener", drop(INFO, "ctf"), INFO, "ctf", "run emc_tomoctf"),
    "tomogram: deconvolution without CTF": case(
        f"{TOMOGRAM} --deconvolve", drop(INFO, "ctf"), INFO, "ctf", "run emc_tomoctf"
    ),
    "tomogram: no strength": case(f"{TOMOGRAM} --deconvolve=-1", None, "--deconvolve", "-1"),
    "tomogram: tag with a folder": case(f"{TOMOGRAM} --tag a/b", None, "--tag", "a/b"),
    "tomogram: axis of an alignment": case(f"{TOMOGRAM} --axis 85", None, "--axis", "leave it out"),
    "tomogram: nothing to refine": case(
        "emc_tomogram TS_01 --refine --quiet", drop(INFO, "alignment"), INFO, "alignment", "run emc_tomogram"
    ),
    "tomogram: no stack": case(TOMOGRAM, gone(RAW), RAW, "no such file"),
    "tomogram: cut stack": case(TOMOGRAM, cut(RAW, 40000), RAW, "cut short"),
    "tomogram: other pixels": case(TOMOGRAM, images(lambda _: None, 2.7), RAW, "2.7", "TS_01"),
    "tomogram: NaN": case(TOMOGRAM, images(nan), RAW, "image 2", "not finite", "exclude"),
    "tomogram: all blank": case(TOMOGRAM, images(lambda a: a * 0 + 7), RAW, "contrast"),
    "tomogram: too few tilts": case(TOMOGRAM, put(INFO, "tilts", "use", value=[True] + [False] * 4), INFO, "1 tilts"),
    "tomogram: too small": case(f"{TOMOGRAM} --bin 40", None, "TS_01", "too small", "--bin"),
    "tomogram: region turned round": case(f"{TOMOGRAM} --region=10,-10,0,1,0,1", None, "--region", "x0 < x1"),
    "tomogram: two angles": case(f"{TOMOGRAM} --turn 10,20", None, "--turn", "rot,tilt,psi"),
    "tomogram: no CUDA": case(f"{TOMOGRAM} --device cuda:99", None, "--device", "choose cpu"),
    "tomogram: no room": case(TOMOGRAM, NO_ROOM, "free some space"),
    "tomogram: disk full": case(TOMOGRAM, FULL, "tomograms/TS_01_bin2.mrc", "no space left"),
    "tomogram: folder is a file": case(TOMOGRAM, write("tomograms", "a file"), "tomograms", "is a file, not a folder"),
    # import
    "import: nothing": case("emc_import", None, "nothing to import", "give"),
    "import: no such file": case(IMPORT, None, "new.mrc", "no such file"),
    "import: a text": case(IMPORT, both(new(), write("new.mrc", "text " * 500)), "new.mrc", "not an MRC file"),
    "import: cut": case(IMPORT, both(new(), cut("new.mrc", 20000)), "new.mrc", "cut short"),
    "import: one image": case(IMPORT, new(NEW[:1], tilts=None), "new.mrc", "one image", "--tilt-start"),
    "import: no angles": case(IMPORT, new(tilts=None), "new.mrc", "rawtlt"),
    "import: too many angles": case(IMPORT, new(tilts=f"{TILTS}60\n"), "new.rawtlt", "6", "5"),
    "import: no angle": case(IMPORT, new(tilts="-40\n-20\nzero\n20\n40\n"), "new.rawtlt", "line 3"),
    "import: NaN for an angle": case(
        IMPORT, new(tilts="-40\n-20\nnan\n20\n40\n"), "new.rawtlt", "line 3", "not finite",
    ),
    "import: no pixel size": case(IMPORT, new(pixel=0.0), "new.mrc", "--pixel-size"),
    "import: other pixel size": case(f"{IMPORT} --pixel-size 2.5", new(), "new.mrc", "2.5", "3 Å", "--ignore-header"),
    "import: pixel size of zero": case(f"{IMPORT} --pixel-size 0", new(), "--pixel-size", "not above zero"),
    "import: all constant": case(IMPORT, new(0 * NEW + 7), "new.mrc", "no image can be used", "constant"),
    "import: all NaN": case(IMPORT, new(NEW * np.nan), "new.mrc", "no image can be used", "not finite"),
    "import: there already": case(
        f"emc_import {RAW} --quiet", write("tiltseries/TS_01.rawtlt", TILTS), INFO, "exists", "--overwrite",
    ),
    "import: options of another kind": case(f"{IMPORT} --label a", new(), "--label", "leave it out"),
    "import: alignment of others": case("emc_import --alignment a.xf a.tlt TS_01 --overwrite",
                                        both(write("a.xf", "1 0 0 1 0 0\n" * 3), write("a.tlt", "0\n" * 3)), "a.xf", "3", "5"),
    "import: transform of five": case("emc_import --alignment a.xf a.tlt TS_01 --overwrite",
                                      both(write("a.xf", "1 0 0 1 0\n" * 5), write("a.tlt", "0\n" * 5)), "a.xf", "line 1"),
    "import: no points": case("emc_import --picks p.csv --label new TS_01", write("p.csv", "x,y,z\n"), "p.csv"),
    "import: points in pixels": case("emc_import --picks p.star --label new TS_01",
                                     write("p.star", "data_\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n1 2 3\n"),
                                     "p.star", "pixels", "tomogram"),
    "import: no such series": case("emc_import --picks p.csv --label new TS_09", write("p.csv", "1,2,3\n"), "TS_09"),
    "import: disk full": case(IMPORT, both(new(), FULL), "info/new_info.json", "no space left"),
    # export
    "export: no such set": case("emc_export rib --format relion31", None, "rib", "there are the sets ribo"),
    "export: unknown format": case("emc_export ribo --format pdf", None, "--format", "pdf"),
    "export: folder is a file": case(
        "emc_export ribo --format relion31 --output ref.mrc --quiet", None, "ref.mrc", "not a folder",
    ),
    "export: another's file": case(
        "emc_export ribo --format relion31 --output out --quiet", write("out/TS_01.mrcs", "mine",
    ),
                                   "out/TS_01.mrcs", "did not write it"),
    "export: disk full": case(
        "emc_export ribo --format relion31 --quiet", FULL, "export/ribo/TS_01.mrcs", "no space left",
    ),
    "export: no images": case(
        "emc_export ribo --format relion31 --quiet", both(gone(STACK), gone(RAW)), RAW, "is missing",
    ),
    # CTFs
    "tomoctf: not aligned": case(TOMOCTF, both(drop(INFO, "ctf"), drop(INFO, "alignment")), INFO, "alignment",
                                 "run emc_tomogram TS_01"),
    "tomoctf: hand of what isn't aligned": case(f"{TOMOCTF} --check-hand", drop(INFO, "alignment"), INFO, "alignment"),
    "tomoctf: CTF there": case(TOMOCTF, None, INFO, "has a CTF already", "--overwrite", "--check-hand"),
    "tomoctf: no such name": case("emc_tomoctf TS_1 --quiet", None, "TS_1", "did you mean TS_01"),
    "tomoctf: no stack": case(f"{TOMOCTF} --overwrite", gone(RAW), RAW, "no such file"),
    "tomoctf: cut stack": case(TOMOCTF, both(drop(INFO, "ctf"), cut(RAW, 40000)), RAW, "cut short"),
    "tomoctf: other pixels": case(f"{TOMOCTF} --check-hand", images(lambda _: None, 2.7), RAW, "2.7", "TS_01"),
    "tomoctf: NaN": case(f"{TOMOCTF} --overwrite", images(nan), RAW, "image 2", "not finite", "exclude"),
    "tomoctf: all blank": case(f"{TOMOCTF} --overwrite", images(lambda a: a * 0 + 7), RAW, "contrast", "exclude"),
    "tomoctf: no tilt used": case(
        f"{TOMOCTF} --overwrite", put(INFO, "tilts", "use", value=[False] * 5), INFO, "no tilt is used", "include",
    ),
    "tomoctf: no rings": case(f"{TOMOCTF} --overwrite", images(static), RAW, "no rings"),
    "tomoctf: flip of what isn't aligned": case(f"{TOMOCTF} --flip", drop(INFO, "alignment"), INFO, "alignment"),
    "tomoctf: flip with a phase plate": case(f"{TOMOCTF} --flip --phase-plate", None, "--phase-plate", "--flip"),
    "tomoctf: flip and check": case(f"{TOMOCTF} --flip --check-hand", None, "--flip", "--check-hand"),
    # template matching
    "tempmatch: nothing named": case(MATCH.replace("TS_01 ", ""), None, "--all"),
    "tempmatch: no such name": case(MATCH.replace("TS_01", "TS_1"), None, "TS_1", "did you mean TS_01"),
    "tempmatch: not aligned": case(MATCH, drop(INFO, "alignment"), INFO, "alignment", "run emc_tomogram TS_01"),
    "tempmatch: no stack": case(MATCH, gone(RAW), RAW, "no such file"),
    "tempmatch: cut stack": case(MATCH, cut(RAW, 40000), RAW, "cut short"),
    "tempmatch: other pixels": case(MATCH, images(lambda _: None, 2.7), RAW, "2.7", "TS_01"),
    "tempmatch: NaN": case(MATCH, images(nan), RAW, "image 2", "not finite", "exclude"),
    "tempmatch: all blank": case(MATCH, images(lambda a: a * 0 + 7), RAW, "contrast"),
    "tempmatch: no tilt used": case(MATCH, put(INFO, "tilts", "use", value=[False] * 5), "TS_01", "used"),
    "tempmatch: no template": case(MATCH.replace("ref.mrc", "no.mrc"), None, "no.mrc", "no such file"),
    "tempmatch: template of another kind": case(MATCH, write("ref.mrc", "text " * 500), "ref.mrc", "not an MRC file"),
    "tempmatch: template is no cube": case(MATCH, volume("ref.mrc", CUBE[:20]), "ref.mrc", "cube", "--box"),
    "tempmatch: empty template": case(MATCH, volume("ref.mrc", ONES), "ref.mrc", "the same everywhere"),
    "tempmatch: NaN in the template": case(MATCH, volume("ref.mrc", HOLE), "ref.mrc", "not finite"),
    "tempmatch: mask of another size": case(f"{MATCH} --mask m.mrc", volume("m.mrc", np.ones((20, 20, 20))), "m.mrc"),
    "tempmatch: mask of nothing": case(f"{MATCH} --mask m.mrc", volume("m.mrc", 0 * ONES), "m"),
    "tempmatch: mask that isn't there": case(f"{MATCH} --mask m.mrc", None, "m.mrc", "no such file"),
    "tempmatch: mask for two": case(
        MATCH.replace("ref.mrc", "ref.mrc other.mrc") + " --mask mask.mrc", None, "--mask", "one template",
    ),
    "tempmatch: label for two": case(MATCH.replace("ref.mrc", "ref.mrc other.mrc") + " --label a", None, "--label"),
    "tempmatch: the same label twice": case(MATCH.replace("ref.mrc", "a=ref.mrc a=other.mrc"), None, "LABEL=MAP"),
    "tempmatch: no label": case(MATCH.replace("ref.mrc", "a/b=ref.mrc"), None, "'a/b'", "letters"),
    "tempmatch: two symmetries for one": case(f"{MATCH} --symmetry c1,c2", None, "symmetries"),
    "tempmatch: no symmetry": case(f"{MATCH} --symmetry q3", None, "q3", "cN"),
    "tempmatch: others' picks": case(
        f"{MATCH} --label ribo", None, INFO, "'ribo'", "--overwrite",
    ),
    "tempmatch: finer than the voxels": case(f"{MATCH} --bin 4", None, "--resolution 10", "--bin"),
    "tempmatch: a resolution of zero": case(MATCH.replace("10", "0"), None, "--resolution"),
    "tempmatch: minus one false pick": case(f"{MATCH} --expected-false=-1", None, "--expected-false"),
    "tempmatch: region beyond the field": case(
        f"{MATCH} --region=9000,9100,9000,9100,0,50", None, "TS_01", "--region",
    ),
    "tempmatch: region of too little": case(f"{MATCH} --region=0,0,0,0,0,0", None, "--region"),
    "tempmatch: wedge of a series": case(f"{MATCH} --wedge=-60,60", None, "--wedge", "leave it out"),
    "tempmatch: contrast of a series": case(f"{MATCH} --contrast dark", None, "--contrast", "leave it out"),
    "tempmatch: output of a series": case(f"{MATCH} --output p.json", None, "--output", "leave it out"),
    "tempmatch: volume and a name": case(f"{IN_VOLUME} --output p.json TS_01", None, "--names", "leave it out"),
    "tempmatch: volume and all": case(f"{IN_VOLUME} --output p.json --all", None, "--all", "leave it out"),
    "tempmatch: volume's thickness": case(f"{IN_VOLUME} --output p.json --thickness 9", None, "--thickness"),
    "tempmatch: volume without dose": case(f"{IN_VOLUME} --output p.json --no-dose", None, "--no-dose"),
    "tempmatch: no output": case(IN_VOLUME, None, "--output"),
    "tempmatch: no such volume": case(f"{IN_VOLUME.replace('ref', 'no')} --output p.json", None, "no.mrc", "no such"),
    "tempmatch: volume of nothing": case(
        f"{IN_VOLUME} --output p.json", volume("ref.mrc", ONES), "ref.mrc", "no contrast",
    ),
    "tempmatch: somebody's file": case(
        f"{IN_VOLUME} --output p.json", write("p.json", "mine"), "p.json", "did not write it",
    ),
    "tempmatch: wedge upside down": case(f"{IN_VOLUME} --output p.json --wedge=60,-60", None, "--wedge", "LOW,HIGH"),
    "tempmatch: mask of the tomogram that isn't there": case(f"{MATCH} --tomogram-mask m.mrc", None, "m.mrc", "no such"),
    # the demonstration
    "demo: somebody's folder": case("emc_demo info", None, "info", "is not a folder that emc_demo has made"),
    "demo: a file": case("emc_demo ref.mrc", None, "ref.mrc"),
}
# fmt: on


def listing() -> dict[str, tuple[int, int] | None]:
    """What there is, but for locks, logs and empty folders: size and a checksum of each file."""
    found: dict[str, tuple[int, int] | None] = {}
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if name != ".emc"]
        for name in files:
            if not name.endswith(".lock"):
                data = Path(folder, name).read_bytes()
                found[str(Path(folder, name))] = (len(data), hash(data))
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, base: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, project, dirs_exist_ok=True)
    tried = CASES[name]
    program, *words = tried.command.split()
    module = importlib.import_module(program)
    with monkeypatch.context() as patch:
        if tried.prepare is not None:
            tried.prepare(patch)
        before = listing()
        code = module.program.main(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == "" or program in ("emc_info", "emc_extract"), out
    assert err.count("\n") == 1 and err.startswith(f"{program}: error: "), err
    assert ";" in err, f"no remedy: {err}"
    assert not [word for word in tried.words if word not in err], err
    assert listing() == before


LIMITED = {
    EXTRACT: "particles/new/TS_01.mrcs",
    AVERAGE: "avg/half1.mrc",
    TOMOGRAM: "tomograms/TS_01_bin2.mrc",
    "emc_volume ref.mrc out.mrc --quiet": "out.mrc",
    "emc_export ribo --format relion31 --quiet": "export/ribo/TS_01.mrcs",
    "emc_simulate sim --size 64 64 --count 1 --thickness 400 --tilt-range 0 0 1 --quiet": "sim.mrc",
}


@pytest.mark.parametrize("command", LIMITED)
def test_the_kernel_refuses(command: str, base: Path, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a pretended error: files may grow to 4 kB. Whole files that did fit stay; no part of one does."""
    shutil.copytree(base, project, dirs_exist_ok=True)
    program, *words = command.split()
    module, before = importlib.import_module(program), listing()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = module.program.main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith(f"{program}: error: ") and "file too large; " in err, err
    assert LIMITED[command] in err, err
    assert set(listing()) - set(before) <= {"avg/run.json"}


def test_an_image_that_is_found_spoilt_on_the_way(
    base: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NaN deep in a particle stack: one line that names it; the run's record says that it failed, and there are no maps."""
    shutil.copytree(base, project, dirs_exist_ok=True)
    data = bytearray(Path(STACK).read_bytes())
    data[1024 + 2 * (24 * 24 * 11 + 300) : 1024 + 2 * (24 * 24 * 11 + 301)] = np.array([np.nan], "<f2").tobytes()
    Path(STACK).write_bytes(data)
    monkeypatch.setattr(rooms, "SAMPLED_IMAGES", 1)
    assert importlib.import_module("emc_average").program.main(AVERAGE.split()[1:]) == 2
    assert capsys.readouterr().err.startswith(
        f"emc_average: error: {STACK}: image 11 (from 0) has values that are not finite; "
    )
    assert [path.name for path in Path("avg").iterdir() if not path.name.startswith(".")] == ["run.json"]
    assert json.loads(Path("avg/run.json").read_text())["history"][-1]["state"] == "failed"


def test_one_unreadable_past_hides_no_other(base: Path, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record whose history has a time that is none: what other records know of a file is found all the same."""
    shutil.copytree(base, project, dirs_exist_ok=True)
    content = json.loads(Path(INFO).read_text())
    content["history"] = [{"id": "x", "program": "emc_x", "version": "0", "argv": [], "start": ""}]
    Path(INFO).write_text(json.dumps(content))
    assert importlib.import_module("emc_info").program.main(["spt_00/average.mrc", "--history"]) == 0
    assert "$ emc_refine ribo" in capsys.readouterr().out
