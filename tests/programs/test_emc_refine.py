"""emc_refine on a hand-drawn set whose poses were shaken: it finds them again, says so, and goes on where it stopped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest

import emc_average
import emc_refine
from tests.by_hand import PIXEL, HandSeries, blobs_map, mrc_bytes, pose, shell_correlation
from tests.programs.sets import extracted_by_hand

SERIES = HandSeries(noise=0.3, particles=12)
LOCAL = ("ribo", "--reference", "ref.mrc", "--startres", "14", "--local")
MAPS = ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png")


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a set whose poses are off by 4° about each axis and 2 Å along it, rms, and a reference."""
    folder = extracted_by_hand(tmp_path_factory.mktemp("shaken"), SERIES)
    path, rng = folder / "particles/ribo/TS_hand.json", np.random.default_rng(0)
    content = json.loads(path.read_text())
    for particle in content["particles"]:
        for angle in ("rot", "tilt", "psi"):
            particle[angle] += 4 * rng.normal()
        particle["xyz"] = [x + 2 * rng.normal() for x in particle["xyz"]]
    path.write_text(json.dumps(content))
    (folder / "ref.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    return folder


@pytest.fixture
def here(shaken: Path, project: Path) -> Path:
    shutil.copytree(shaken, project, dirs_exist_ok=True)
    return project


def ran(*argv: object) -> int:
    return emc_refine.program.main([str(word) for word in argv])


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def errors(particles: list[dict]) -> tuple[float, float]:
    """Median error of rotation, degrees, and of position, Å."""
    turned, moved = [], []
    for particle, angles, position in zip(particles, SERIES.angles, SERIES.positions, strict=True):
        difference = pose(particle["rot"], particle["tilt"], particle["psi"]) @ pose(*angles).T
        turned.append(math.degrees(math.acos(min(1.0, (np.trace(difference) - 1) / 2))))
        moved.append(np.linalg.norm(np.array(particle["xyz"]) - position))
    return float(np.median(turned)), float(np.median(moved))


def without_history(path: str | Path) -> dict:
    return {key: value for key, value in read(path).items() if key not in ("history", "parent")}


def test_local_refinement(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 6° and 3 Å to 1.5° and 0.3 Å; the files, the lines and the record say what was done.

    1.5° is a third of a pixel at the rim of the particle: with noise of half the signal 132 images hold it.
    """
    before = read("particles/ribo/TS_hand.json")
    assert errors(before["particles"])[0] > 5 and errors(before["particles"])[1] > 2.5
    assert ran(*LOCAL, "--iterations", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "iteration 1 (local, data to 14.0 Å)", lines[1].split(":")[0], "spt_00",
    ]  # fmt: skip
    after, run = read("spt_00/particles/TS_hand.json"), read("spt_00/run.json")
    turned, moved = errors(after["particles"])
    assert turned < 1.5 and moved < 0.3
    names = {p.name for p in Path("spt_00").iterdir() if not p.name.startswith(".")}
    assert names == {*MAPS, "run.json", "particles"}
    assert {p.name for p in Path("spt_00/particles").glob("[!.]*")} == {"particles.json", "TS_hand.json"}
    for old, new in zip(before["particles"], after["particles"], strict=True):
        kept = ("id", "half", "centre", "defocus", "visible", "class", "use")
        assert all(old[key] == new[key] for key in kept) and new["score"] is not None
    assert after["stack"] == before["stack"] and after["parent"] == "ribo"
    for half in (1, 2):
        assert shell_correlation(mrcfile.read(f"spt_00/half{half}.mrc"), blobs_map(32))[1:5].min() > 0.9
    first, second = run["state"]["iterations"]
    assert (first["band"], first["exhaustive"], second["exhaustive"]) == (14.0, False, False)
    assert 4 < first["turned"] < 8 and second["turned"] < first["turned"] / 2
    assert run["options"]["local"] is True and run["options"]["iterations"] == 2 and run["stopped_at"] is None
    assert second["resolution"] == read("spt_00/fsc.json")["resolution"]
    assert lines[2] == f"spt_00: 12 particles, {second['resolution']:.2f} Å at FSC 0.143 after 2 iterations"
    assert [i["path"] for i in run["inputs"]] == ["particles/ribo/particles.json", "ref.mrc"]
    (entry,) = run["history"]
    assert (
        entry["state"] == "done"
        and entry["program"] == "emc_refine"
        and entry["argv"][1:] == [*LOCAL, "--iterations", "2"]
    )
    assert {f"spt_00/{name}" for name in (*MAPS, "run.json", "particles/TS_hand.json")} <= set(entry["outputs"])
    assert after["history"][-1]["id"] == entry["id"]
    assert read("particles/ribo/TS_hand.json") == before  # the set itself is not touched


def test_global_refinement_and_what_comes_after(here: Path) -> None:
    """All orientations lost: a search and a second one find most; the run can then be averaged and refined further."""
    path = Path("particles/ribo/TS_hand.json")
    content, rng = read(path), np.random.default_rng(5)
    for particle in content["particles"]:
        particle["rot"], particle["psi"] = rng.uniform(-180, 180, 2)
        particle["tilt"] = math.degrees(math.acos(rng.uniform(-1, 1)))
    path.write_text(json.dumps(content))
    assert ran("ribo", "--reference", "ref.mrc", "--startres", 12, "--iterations", 2, "--quiet") == 0
    run = read("spt_00/run.json")
    assert [i["exhaustive"] for i in run["state"]["iterations"]] == [True, True]
    assert errors(read("spt_00/particles/TS_hand.json")["particles"])[0] < 5
    assert (
        ran("spt_00", "--reference", "spt_00/average.mrc", "--local", "--iterations", 1, "--startres", 10, "--quiet")
        == 0
    )
    assert read("spt_01/particles/particles.json")["parent"] == "spt_00"
    assert emc_average.program.main(["spt_01", "--quiet"]) == 0
    again, own = (mrcfile.read(f"{folder}/half1.mrc") for folder in ("avg_00", "spt_01"))
    np.testing.assert_allclose(again, own, atol=1e-5 * abs(own).max())  # poses went through Euler angles


def test_same_seed_same_bytes(here: Path) -> None:
    for _ in range(2):
        assert ran(*LOCAL, "--iterations", 1, "--seed", 5, "--quiet") == 0
    for name in MAPS:
        assert Path(f"spt_00/{name}").read_bytes() == Path(f"spt_01/{name}").read_bytes(), name
    for name in ("run.json", "particles/TS_hand.json"):
        assert without_history(f"spt_00/{name}") == without_history(f"spt_01/{name}")


@pytest.mark.parametrize("where", ["between", "within"])
def test_resume(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Stopped after the first iteration, or in the middle of the second, and resumed: the same bytes as without a stop."""
    assert ran(*LOCAL, "--iterations", 2, "--path", "straight", "--quiet") == 0
    if where == "between":
        assert ran(*LOCAL, "--iterations", 1, "--path", "spt", "--quiet") == 0
        assert read("spt/run.json")["stopped_at"] is None
    else:
        original, calls = emc_refine.average.half_maps, []

        def stops(*args: object, **more: object) -> object:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **more)

        monkeypatch.setattr(emc_refine.average, "half_maps", stops)
        assert ran(*LOCAL, "--iterations", 2, "--path", "spt", "--quiet") == 130
        monkeypatch.undo()
        monkeypatch.chdir(here)
        stopped = read("spt/run.json")
        assert stopped["stopped_at"] == "iteration 2" and stopped["history"][-1]["state"] == "interrupted"
        assert len(stopped["state"]["iterations"]) == 1
    assert ran(*LOCAL, "--iterations", 2, "--path", "spt", "--resume", "--quiet") == 0
    for name in MAPS:
        assert Path(f"spt/{name}").read_bytes() == Path(f"straight/{name}").read_bytes(), name
    for name in ("run.json", "particles/TS_hand.json"):
        assert without_history(f"spt/{name}") == without_history(f"straight/{name}")
    assert len(read("spt/run.json")["history"]) == 2
    before = {name: Path(f"spt/{name}").read_bytes() for name in MAPS}
    assert ran(*LOCAL, "--iterations", 2, "--path", "spt", "--resume", "--quiet") == 0  # nothing is left to do
    assert before == {name: Path(f"spt/{name}").read_bytes() for name in MAPS}


def test_resume_refuses_what_has_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(*LOCAL, "--iterations", 1, "--path", "spt", "--quiet") == 0
    capsys.readouterr()
    again = ("--iterations", 2, "--path", "spt", "--resume")
    assert ran("ribo", "--reference", "ref.mrc", "--startres", 12, "--local", *again) == 2
    assert "spt/run.json: was begun with startres = 14.0, not 12.0; give the same options" in capsys.readouterr().err
    Path("ref.mrc").write_bytes(mrc_bytes(blobs_map(32)[::-1], PIXEL, stack=False))
    assert ran(*LOCAL, *again) == 2
    assert "ref.mrc: has changed since spt was begun from it" in capsys.readouterr().err
    assert ran(*LOCAL, "--resume") == 2
    assert "--path" in capsys.readouterr().err
    assert len(read("spt/run.json")["state"]["iterations"]) == 1


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert ran(*LOCAL, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("refine 12 particles in a box of 32 at 2 Å (about ")
    assert sorted(here.rglob("*")) == before


def test_reference_of_another_sampling_and_box(here: Path) -> None:
    """A reference of 1.25 Å in a box of 61 does as well as one on the particles' own grid."""
    Path("fine.mrc").write_bytes(mrc_bytes(blobs_map(61, 1.25), 1.25, stack=False))
    assert ran("ribo", "--reference", "fine.mrc", "--startres", 14, "--local", "--iterations", 1, "--quiet") == 0
    turned, moved = errors(read("spt_00/particles/TS_hand.json")["particles"])
    assert turned < 2.5 and moved < 0.5
