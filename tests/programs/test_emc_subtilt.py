"""emc_subtilt on specimens that move, with records that are wrong: every image is found where it truly is, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

import emc_subtilt
from libemc import joint_pages, joint_refinements, records
from tests.programs.moving import (
    BOX,
    DEFOCUS,
    KEPT,
    MAPS,
    NAMES,
    TILTS,
    extracted_and_refined,
    likeness,
    lines_of,
    listing,
    off,
    program,
    read,
    same_run,
    simulated,
    without_history,
    write,
)

OWN = ("drot", "dtilt", "dpsi", "dx", "dy", "ddefocus")
ONE = ("spt_00", "--iterations", 1)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with `spt_00` and what emc_subtilt makes of it, `sub_00`; its lines are in `said`."""
    folder = tmp_path_factory.mktemp("moved")
    simulated(folder)
    extracted_and_refined(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("said").write_text("\n".join(lines_of("emc_subtilt", *ONE, "--path", "sub_00")))
    return folder


@pytest.fixture
def here(moved: Path, project: Path) -> Path:
    shutil.copytree(moved, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages: for runs of which only the numbers are looked at."""
    monkeypatch.setattr(joint_pages, "write_page", lambda *_: None)


def particles(run: str) -> Iterator[dict[str, Any]]:
    for name in NAMES:
        yield from read(f"{run}/particles/{name}.json")["particles"]


def values(run: str, key: str) -> np.ndarray:
    """(N, T) of all particles."""
    return np.array([p["subtilt"][key] for p in particles(run)], dtype=float)


def there(run: str) -> np.ndarray:
    """(N, T) whether an image is there."""
    return np.array([p["visible"] for p in particles(run)]) > 0


def test_images_are_found(here: Path) -> None:
    """Images lie nearer to the truth than after emc_refine by a factor of 1.5, and a sixth of the defocus' error is gone.

    It can't be all: an image's shift is known to about 1.5 Å by itself at 16 Å and with this noise, and that of a tilt to half an
    Å with the seven particles of a half; and 1000 Å of defocus change the CTF by 0.24 rad at 16 Å.
    """
    before, after = off("spt_00"), off("sub_00")
    assert before[0] > 1.5 and before[1] > 0.7 * DEFOCUS
    assert after[0] < before[0] / 1.5 and after[1] < before[1] * 5 / 6
    assert likeness("sub_00") > likeness("spt_00") + 0.02
    start, first = read("sub_00/run.json")["state"]["start"]["spt_00"], read("sub_00/fsc.json")
    assert first["resolution"] <= start["resolution"] < 17


def test_what_is_written(here: Path) -> None:
    """Maps, FSC, pictures and particles, as the record and the lines say; nothing of a particle has changed but its pose."""
    names = {p.name for p in Path("sub_00").iterdir() if not p.name.startswith(".")}
    pictures = {f"{name}_{what}.png" for name in NAMES for what in ("residual", "motion", "images")}
    assert names == {*MAPS, *pictures, "index.html", "run.json", "particles"}
    for name in ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc"):
        with mrcfile.open(f"sub_00/{name}") as file:
            assert file.data.shape == (BOX,) * 3 and file.voxel_size.x == 8
    head, files = records.load_particles("sub_00")  # every file is checked as it is read
    assert (head.parent, head.set, sorted(files)) == ("spt_00", "ribo", list(NAMES))
    for name in NAMES:
        old, new = (read(f"{run}/particles/{name}.json") for run in ("spt_00", "sub_00"))
        assert {key: new[key] for key in new if key not in ("particles", "history", "parent")} == {
            key: old[key] for key in old if key not in ("particles", "history", "parent")
        }
        for p, q in zip(old["particles"], new["particles"], strict=True):
            assert all(p[key] == q[key] for key in (*KEPT, "defocus"))
            assert set(q["subtilt"]) == {*OWN, "weight", "score"} and q["xyz"] != p["xyz"]
            assert {len(v) for v in q["subtilt"].values()} == {TILTS}
    weight, score, shown = values("sub_00", "weight"), values("sub_00", "score"), there("sub_00")
    assert (
        weight.min() >= 0 and weight.max() > 0.9 and np.isfinite(score[shown]).all() and np.isnan(score[~shown]).all()
    )
    run = read("sub_00/run.json")
    (iteration,) = run["state"]["iterations"]
    kept = {t["level"]: t for t in iteration["trials"] if t["kept"]}
    assert {"shift of tilts", "motion along the exposure", "defocus of tilts"} <= set(kept)
    assert all(t["gain"] > 2 * t["error"] for t in kept.values())
    assert iteration["left_out"] == int((weight[shown] == 0).sum()) < 0.05 * shown.sum()
    for name, report in iteration["series"].items():
        old, new = (np.array(report[key], dtype=float) for key in ("before", "after"))
        assert name in NAMES and len(old) == TILTS and np.sqrt((new**2).mean()) < 0.8 * np.sqrt((old**2).mean())
    assert run["options"] == {
        "run": "spt_00", "fit": ["shift", "turn", "defocus"], "keep": None, "mask": None, "symmetry": None,
        "filter": "spherical", "iterations": 1,
    }  # fmt: skip
    assert run["stopped_at"] is None and run["history"][-1]["state"] == "done"
    found = read("sub_00/fsc.json")["resolution"]
    assert iteration["kinds"]["spt_00"]["resolution"] == found
    first, last = Path("said").read_text().splitlines()
    assert first.startswith("iteration 1: shift of tilts ") and f"; {found:.2f} Å at FSC 0.143 (before " in first
    assert last == f"sub_00: {found:.2f} Å at FSC 0.143, {shown.sum()} images"
    page = Path("sub_00/index.html").read_text()
    assert "shift of tilts" in page and all(f"{name}_images.png" in page for name in NAMES)


def test_other_programs_keep_the_corrections(here: Path) -> None:
    """The average is the run's own, and images that emc_refine goes on with stay where they were, but for noise."""
    lines_of("emc_average", "sub_00", "--path", "avg")
    again, own = (mrcfile.read(f"{folder}/half1.mrc") for folder in ("avg", "sub_00"))
    np.testing.assert_allclose(again, own, atol=1e-5 * abs(own).max())  # poses went through Euler angles
    more = ("--reference", "ref.mrc", "--startres", 30, "--local", "--iterations", 1, "--path", "spt_01")
    lines_of("emc_refine", "sub_00", *more)
    assert off("spt_01")[0] < off("sub_00")[0] + 0.1  # its only iteration knows data to 30 Å
    for key in ("dx", "dy", "ddefocus", "weight"):
        np.testing.assert_array_equal(values("spt_01", key), values("sub_00", key))


def test_without_a_stack(here: Path, undrawn: None) -> None:
    """Images that are cut out as it goes, and a second run of the same seed: the same bytes."""
    lines_of("emc_extract", "--all", "--label", "ribo", "--set", "bare", "--box", BOX, "--no-stack")
    for name in NAMES:
        bare = read(f"particles/bare/{name}.json")
        assert bare["stack"] is None and bare["raw"] == read(f"particles/ribo/{name}.json")["raw"]
        refined = read(f"spt_00/particles/{name}.json")
        write(f"spt_00/particles/{name}.json", refined | {"stack": None})
    shutil.rmtree("particles/ribo")
    lines_of("emc_subtilt", *ONE, "--path", "sub_01")
    for file in MAPS:
        assert Path("sub_01", file).read_bytes() == Path("sub_00", file).read_bytes(), file
    assert list(particles("sub_01")) == list(particles("sub_00"))


@pytest.mark.parametrize("words", ["--memory 4M", "--threads 2"])
def test_memory_and_threads(here: Path, undrawn: None, words: str) -> None:
    """The same levels, and images in the same place: sums are made in another order, and the solver stops at 1e-3 of a residual.

    Of shifts up to 8 Å that is 0.01 Å, of defoci up to 2000 Å 2 Å. 4 MB are four particles at a time. Two threads have a process
    of their own, in which they don't burn the time that they wait for a core in.
    """
    argv = ["emc_subtilt", *map(str, ONE), "--path", "small", *words.split()]
    if "--threads" in words:
        passive = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([sys.executable, "-m", *argv, "--quiet"], env=passive, check=True, stdout=subprocess.DEVNULL)
    else:
        lines_of(*argv)
    trials = [
        [t["level"] for t in read(f"{run}/run.json")["state"]["iterations"][0]["trials"] if t["kept"]]
        for run in ("small", "sub_00")
    ]
    assert trials[0] == trials[1]
    for key in (*OWN, "weight"):
        np.testing.assert_allclose(values("small", key), values("sub_00", key), atol=5 if key == "ddefocus" else 0.03)


def test_resume(here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after the first of two tilt series and gone on with: the same bytes as without a stop, also a third time."""
    original, calls = joint_refinements.fit_series, list[str]()

    def stops(members: Any, *more: Any) -> Any:
        calls.append(members[0].particles.file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(members, *more)

    monkeypatch.setattr(joint_refinements, "fit_series", stops)
    go_on = (*ONE, "--path", "sub", "--resume", "--quiet")
    assert program("emc_subtilt", *ONE, "--path", "sub", "--quiet") == 130
    stopped = read("sub/run.json")
    assert stopped["stopped_at"] == "iteration 1" and stopped["history"][-1]["state"] == "interrupted"
    assert stopped["state"]["iterations"] == [] and list(stopped["state"]["now"]["series"]) == [NAMES[0]]
    assert [p.name for p in Path("sub/iterations/1").glob("*.json")] == ["TS_01.json"]
    capsys.readouterr()
    for more, what in ((("--fit", "shift"), "fit"), (("--keep", 0.9), "keep"), (("--seed", 1), "seed")):
        assert program("emc_subtilt", *go_on, *more) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"sub/run.json: was begun with {what} = " in err and "same options" in err
    assert read("sub/run.json")["state"] == stopped["state"] and len(calls) == 2
    assert program("emc_subtilt", *go_on) == 0
    assert calls == [NAMES[0], NAMES[1], NAMES[1]] and not Path("sub/iterations").exists()
    same_run("sub", "sub_00")
    assert program("emc_subtilt", *go_on) == 0  # nothing is left to do
    assert len(calls) == 3 and len(read("sub/run.json")["history"]) == 2
    same_run("sub", "sub_00")


def test_some_of_it(here: Path, undrawn: None) -> None:
    """With shifts alone no image is turned or focused; the best four fifths of each tilt are kept; spoilt images aren't.

    Eight images of early exposures in the first series are turned into their negatives: no pose explains these.
    """
    with mrcfile.mmap("particles/ribo/TS_01.mrcs", mode="r+") as stack:
        shown = np.argwhere(there("spt_00")[: len(stack.data) // TILTS] & (abs(np.arange(TILTS) - TILTS // 2) < 3))
        spoilt = [tuple(shown[k]) for k in range(0, len(shown), len(shown) // 8)][:8]
        for i, j in spoilt:
            stack.data[i * TILTS + j] *= -1
    lines_of("emc_subtilt", *ONE, "--path", "sub_01", "--fit", "shift", "--keep", 0.8)
    for key in ("drot", "dtilt", "dpsi", "ddefocus"):
        assert not values("sub_01", key).any()
    assert np.abs(values("sub_01", "dx")).max() > 1
    tried = {t["level"] for t in read("sub_01/run.json")["state"]["iterations"][0]["trials"]}
    assert tried == {level.name for level in emc_subtilt.FITS["shift"]}
    weight, score, shown = values("sub_01", "weight"), values("sub_01", "score"), there("sub_01")
    assert all(weight[i, j] == 0 for i, j in spoilt)
    first = len(read("sub_01/particles/TS_01.json")["particles"])
    for half in (slice(0, first), slice(first, None)):
        for j in range(TILTS):
            mine = shown[half, j]
            kept = (weight[half, j] > 0) & mine
            assert 0.8 * mine.sum() + 1 >= kept.sum() >= 0.8 * mine.sum() - 3  # a few are too loud besides
            assert score[half, j][kept].min() >= np.quantile(score[half, j][mine], 0.2) - 1e-3  # three digits


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, shown = listing(), there("spt_00").sum()
    assert program("emc_subtilt", "spt_00", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"refine {shown} images of 2 tilt series (about ") and out.count("\n") == 1
    assert listing() == before


def test_nothing_to_correct(project: Path, undrawn: None) -> None:
    """A true record and a specimen at rest: no level is on, no image moves, and but for weights the average is the same.

    Chance may bring a level over its threshold, with several strengths of each; with these seeds it doesn't.
    """
    simulated(project, right=True)
    extracted_and_refined(project, "--no-motion", "--max-angle", 1e-3, "--max-shift", 1e-3, iterations=1)
    lines = lines_of("emc_subtilt", *ONE, "--path", "sub_00")
    assert lines[0].startswith("iteration 1: nothing to correct; images moved 0.00 Å (median), ")
    for p, q in zip(particles("spt_00"), particles("sub_00"), strict=True):
        assert not any(any(q["subtilt"][key]) for key in OWN if "subtilt" in q)
        np.testing.assert_allclose(
            [p[key] for key in ("rot", "tilt", "psi")], [q[key] for key in ("rot", "tilt", "psi")]
        )
        np.testing.assert_allclose(p["xyz"], q["xyz"])
    weights = [w for p in particles("sub_00") for w in p.get("subtilt", {"weight": [1.0]})["weight"]]
    assert np.mean(np.array(weights) == 0) < 0.05
    maps = [mrcfile.read(f"{run}/average.mrc") for run in ("spt_00", "sub_00")]
    assert np.corrcoef(*(m.ravel() for m in maps))[0, 1] > 0.99  # some of 400 images are weighed down, a few left out
    for name in NAMES:
        content = read(f"sub_00/particles/{name}.json")
        for p in content["particles"]:
            p.pop("subtilt", None)
        write(f"sub_00/particles/{name}.json", content)
    for run in ("spt_00", "sub_00"):
        lines_of("emc_average", run, "--path", f"avg_{run}")
    one, other = (mrcfile.read(f"avg_{run}/half1.mrc") for run in ("spt_00", "sub_00"))
    np.testing.assert_allclose(one, other, atol=1e-5 * abs(one).max())  # poses went through matrices
    assert without_history("sub_00/run.json")["state"]["iterations"][0]["moved"] == 0
