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
import emc_extract
import emc_refine
from libemc.methods import average
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
    assert names == {*MAPS, "run.json", "particles", "index.html", "iterations"}
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


EVERYTHING = {
    "limits": "--max-shift 5 --max-angle 15 --max-tilt 12 --focus focus.mrc --keep 0.8 --own-noise",
    "in plane": "--in-plane-only --mask focus.mrc --symmetry c2 --no-motion --seed 3",
    "filters": "--filter anisotropic --max-angle 20 --symmetry helix:9,40",
    "places": "--filter local --particles first",
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_resume_with_every_option(here: Path, name: str) -> None:
    """An iteration, and another after a stop: the same bytes as two without one."""
    x = np.arange(32) - 16
    radius = np.sqrt((x[:, None, None] - 2) ** 2 + x[:, None] ** 2 + x**2)
    Path("focus.mrc").write_bytes(mrc_bytes(np.clip((13 - radius) / 3, 0, 1), PIXEL, stack=False))
    if name == "places":
        assert ran(*LOCAL, "--iterations", 1, "--path", "first", "--quiet") == 0
    options = (*LOCAL, *EVERYTHING[name].split(), "--quiet")
    assert ran(*options, "--iterations", 2, "--path", "straight") == 0
    assert ran(*options, "--iterations", 1, "--path", "spt") == 0
    assert ran(*options, "--iterations", 2, "--path", "spt", "--resume") == 0
    for file in MAPS:
        assert Path(f"spt/{file}").read_bytes() == Path(f"straight/{file}").read_bytes(), file
    for file in ("run.json", "particles/TS_hand.json"):
        assert without_history(f"spt/{file}") == without_history(f"straight/{file}")
    if name == "limits":
        kept = [p.get("weight") != 0 for p in read("spt/particles/TS_hand.json")["particles"]]
        assert sum(kept) == 10 and read("spt/run.json")["state"]["iterations"][-1]["rejected"] == 2


@pytest.mark.parametrize(
    ("options", "most_turned", "most_leant", "farthest"),
    [
        (("--max-angle", 3, "--max-shift", 1), 3, 180, 1),
        (("--in-plane-only", "--max-shift", 0), 180, 0, 0),
        (("--max-tilt", 2, "--max-shift", 1.5), 180, 2, 1.5),
    ],
)
@pytest.mark.parametrize("how", ["local", "global"])
def test_limits_hold_to_the_end(
    here: Path, how: str, options: tuple[object, ...], most_turned: float, most_leant: float, farthest: float
) -> None:
    """Two iterations: no particle is farther from where the set has it than it may be, and they have moved.

    1e-5: angles and positions went through files, and axes through angles.
    """
    argv = [word for word in LOCAL if how == "local" or word != "--local"]
    assert ran(*argv, *options, "--iterations", 2, "--quiet") == 0
    before, after = (read(f"{where}/TS_hand.json")["particles"] for where in ("particles/ribo", "spt_00/particles"))
    turned, leant, moved = [], [], []
    for old, new in zip(before, after, strict=True):
        a, b = (pose(p["rot"], p["tilt"], p["psi"]) for p in (old, new))
        turned.append(math.degrees(2 * math.asin(min(1.0, np.linalg.norm(a - b) / 8**0.5))))
        leant.append(math.degrees(2 * math.asin(min(1.0, np.linalg.norm(a[:, 2] - b[:, 2]) / 2))))
        moved.append(np.linalg.norm(np.subtract(old["xyz"], new["xyz"])))
    assert max(turned) <= most_turned + 1e-5 and max(leant) <= most_leant + 1e-5 and max(moved) <= farthest + 1e-5
    assert np.median(turned) > 1


def moving(tilts: int) -> dict:
    """A particle's section of corrections by tilt: a quarter of an Å along x."""
    still = [0.0] * tilts
    names = ("dy", "drot", "dtilt", "dpsi", "ddefocus")
    return {"dx": [0.25] * tilts, **dict.fromkeys(names, still), "weight": [1.0] * tilts, "score": [None] * tilts}


def test_poses_of_a_run_at_another_binning(here: Path) -> None:
    """The same picks cut out at 4 Å and refined; then at 2 Å from those poses: better than from the picks, and the maps are
    those of the finer set."""
    coarse = ["TS_hand", "--label", "ribo", "--set", "coarse", "--box", "16", "--bin", "2", "--quiet"]
    assert emc_extract.program.main(coarse) == 0
    shaken = {p["id"]: p for p in read("particles/ribo/TS_hand.json")["particles"]}
    content = read("particles/coarse/TS_hand.json")
    for particle in content["particles"]:
        particle |= {name: shaken[particle["id"]][name] for name in ("xyz", "rot", "tilt", "psi")}
    Path("particles/coarse/TS_hand.json").write_text(json.dumps(content))
    assert ran("coarse", "--reference", "ref.mrc", "--startres", 14, "--local", "--iterations", 2, "--quiet") == 0
    rough = errors(read("spt_00/particles/TS_hand.json")["particles"])
    content = read("spt_00/particles/TS_hand.json")
    content["particles"][3]["subtilt"] = moving(len(content["tilts"]["tilt"]))
    Path("spt_00/particles/TS_hand.json").write_text(json.dumps(content))
    begin = errors(read("particles/ribo/TS_hand.json")["particles"])
    assert rough[0] < 0.6 * begin[0] and rough[1] < 0.6 * begin[1]
    fine = (*LOCAL, "--iterations", 1, "--no-motion", "--max-angle", 0.001, "--max-shift", 0.001, "--quiet")
    assert ran(*fine, "--particles", "spt_00") == 0 and ran(*fine) == 0
    for run, want in (("spt_01", rough), ("spt_02", begin)):
        assert errors(read(f"{run}/particles/TS_hand.json")["particles"]) == pytest.approx(want, abs=0.01)
    assert read("spt_01/run.json")["options"]["particles"] == "spt_00"
    assert read("spt_01/particles/TS_hand.json")["particles"][3]["subtilt"]["dx"] == [0.25] * 11
    assert read("spt_01/fsc.json")["resolution"] < read("spt_02/fsc.json")["resolution"]
    with mrcfile.open("spt_01/average.mrc") as file:
        assert file.data.shape == (32, 32, 32) and file.voxel_size.x == PIXEL


@pytest.mark.parametrize("where", ["between", "within"])
def test_resume(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Stopped after the first iteration, or in the middle of the second, and resumed: the same bytes as without a stop."""
    assert ran(*LOCAL, "--iterations", 2, "--path", "straight", "--quiet") == 0
    if where == "between":
        assert ran(*LOCAL, "--iterations", 1, "--path", "spt", "--quiet") == 0
        assert read("spt/run.json")["stopped_at"] is None
    else:
        original, calls = average.half_maps, []

        def stops(*args: object, **more: object) -> object:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **more)

        monkeypatch.setattr(average, "half_maps", stops)
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


@pytest.mark.parametrize("kind", ["anisotropic", "local"])
def test_filtered_references(here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Poses are found; the first iteration has the reference that was given, the second one's is filtered another way."""
    words = (*LOCAL, "--filter", kind, "--quiet")
    assert ran(*words, "--iterations", 2, "--path", "straight") == 0
    turned, moved = errors(read("straight/particles/TS_hand.json")["particles"])
    assert turned < 1.5 and moved < 0.5
    assert ran(*LOCAL, "--iterations", 2, "--path", "spherical", "--quiet") == 0
    runs = [read(f"{name}/run.json") for name in ("straight", "spherical")]
    first, second = ([run["state"]["iterations"][i]["fsc"] for run in runs] for i in (0, 1))
    assert first[0] == first[1] and second[0] != second[1]
    assert [run["options"]["filter"] for run in runs] == [kind, "spherical"]
    assert ran(*words, "--iterations", 1, "--path", "spt") == 0
    assert ran(*LOCAL, "--iterations", 2, "--path", "spt", "--resume") == 2
    assert f"was begun with filter = '{kind}', not 'spherical'" in capsys.readouterr().err


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
