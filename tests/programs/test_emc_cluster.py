"""emc_cluster on a mixture of two known kinds: who is in which class, what the classes look like, and what goes on from them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

import emc_info
from libemc import classifications, principal_axes
from tests.programs.mixtures import (
    BOX,
    NAMES,
    PCA,
    PIXEL,
    RUN,
    SET,
    agreement,
    alike,
    coordinates,
    mixture,
    names_in,
    one_kind,
    particles,
    true_kinds,
    volume,
)
from tests.programs.moving import lines_of, listing, program, read, without_history, write

PICTURES = {"montage.png", "trials.png", "classes.png", "classes.html"}
PARTS = ("", "_half1", "_half2")
PARTICLES = f"{RUN}/particles"


def maps(count: int) -> set[str]:
    return {f"class_{k}{end}.mrc" for k in range(1, count + 1) for end in PARTS}


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after `emc_cluster pca_00`, its lines in `told`."""
    folder = tmp_path_factory.mktemp("clustered")
    shutil.copytree(mixture(tmp_path_factory), folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("told").write_text("\n".join(lines_of("emc_cluster", RUN)))
    return folder


@pytest.fixture
def here(clustered: Path, project: Path) -> Path:
    shutil.copytree(clustered, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def unclustered(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    shutil.copytree(mixture(tmp_path_factory), project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages: for runs of which only the numbers are looked at."""
    monkeypatch.setattr(principal_axes, "write_page", lambda *_: None)
    monkeypatch.setattr(classifications, "write_cluster_page", lambda *_: None)


def used() -> dict[str, list[int]]:
    """The axes of each band that emc_pca found above noise: one at 60 Å, and perhaps one at 30 Å."""
    found = {b["scale"]: list(range(1, b["meaningful"] + 1)) for b in read(f"{RUN}/run.json")["state"]["bands"]}
    assert found["60"] == [1] and found["30"] in ([], [1])
    return found


def test_the_kinds_are_found(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The class of each particle, in its file, in clusters.json and in what is said; nothing else of it has changed."""
    assert agreement(PARTICLES) >= 0.9
    found, table = particles(f"{RUN}/particles"), read(f"{RUN}/clusters.json")
    classes = np.array([p["class"] for p in found])
    sizes = [int((classes == k).sum()) for k in (1, 2)]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == len(found) > 50
    assert [(row["id"], row["class"]) for row in table["particles"]] == [(p["id"], p["class"]) for p in found]
    for row in table["particles"]:
        assert len(row["probability"]) == 2 and sum(row["probability"]) == pytest.approx(1, abs=2e-4)
        assert row["class"] == 1 + int(np.argmax(row["probability"]))
    for number, row in enumerate(table["classes"], 1):
        mine = [p for p in found if p["class"] == number]
        assert (row["number"], row["count"]) == (number, len(mine))
        assert row["halves"] == [sum(p["half"] == h for p in mine) for h in (1, 2)]
        assert 20 <= row["resolution"] < 30 and len(row["fsc"]) == BOX // 2 + 1 and row["fsc"][1] > 0.9
    assert (table["chosen"], table["clusters"], table["method"], table["axes"]) == (2, "auto", "mixture", "auto")
    state = read(f"{RUN}/run.json")["state"]
    assert state["clusters"] == {
        "trials": table["trials"], "chosen": 2, "method": "mixture", "along": used(),
    }  # fmt: skip
    assert state["particles"] == len(found) and len(state["bands"]) == 2  # what emc_pca said is still there
    before = particles(f"{mixture(tmp_path_factory)}/{RUN}/particles")
    assert before == [p | {"class": 0} for p in found]
    head = read(f"{RUN}/particles/particles.json")
    assert head["parent"] == SET and head["count"] == len(found)
    assert [entry["program"] for entry in head["history"]] == ["emc_pca", "emc_cluster"]


def test_what_is_said(here: Path) -> None:
    """A line for each number of clusters that was tried, with its figures in the record, and one for each class."""
    lines, table = Path("told").read_text().splitlines(), read(f"{RUN}/clusters.json")
    trials = {t["clusters"]: t for t in table["trials"]}
    assert list(trials) == sorted(trials) and 1 in trials and 2 in trials and max(trials) <= 6
    assert lines[0] == f"1 cluster: criterion {trials[1]['criterion']:.0f}"
    for count, line in zip(list(trials)[1:], lines[1:], strict=False):
        trial = trials[count]
        assert sum(trial["populations"]) == len(table["particles"]) and len(trial["chance"]) == 20
        said = re.fullmatch(
            rf"{count} clusters: criterion (\S+), silhouette (\S+) \(without structure up to (\S+)\), stability "
            r"(\d\.\d\d)(: no more than chance)?",
            line,
        )
        assert said and float(said[1]) == round(trial["criterion"])
        assert [float(said[k]) for k in (2, 4)] == pytest.approx([trial["silhouette"], trial["stability"]], abs=0.006)
        assert float(said[3]) == pytest.approx(np.quantile(trial["chance"], 0.95), abs=0.006)
        assert (said[5] is None) == trial["real"] == (np.mean(trial["silhouette"] > np.array(trial["chance"])) >= 0.95)
    real = [t for t in trials.values() if t["real"] and t["clusters"] > 1 and t["criterion"] < trials[1]["criterion"]]
    assert max(real, key=lambda t: t["silhouette"])["clusters"] == 2
    assert trials[2]["silhouette"] > max(trials[2]["chance"]) + 0.1 and trials[2]["stability"] > 0.9
    classes = table["classes"]
    assert lines[len(trials) :] == [
        f"{RUN}: class {c['number']}, {c['count']} particles, {c['resolution']:.2f} Å at FSC 0.143" for c in classes
    ]
    page = Path(RUN, "classes.html").read_text()
    assert f"2 classes of {len(table['particles'])} particles" in page


def test_what_the_classes_look_like(here: Path) -> None:
    """Each is its own true particle more than the other, and more than either's mirror image; its halves make it up."""
    assert names_in(RUN) >= maps(2) | PICTURES | {"clusters.json", "axis_60_1.mrc", "average.mrc"}
    found = particles(f"{RUN}/particles")
    kind = {k: int(np.bincount(true_kinds([p["id"] for p in found if p["class"] == k])).argmax()) for k in (1, 2)}
    truth = [volume(f"raw/true_{k}.mrc") for k in (1, 2)]
    mask = volume(f"{RUN}/mask.mrc") > 0.5
    for k in (1, 2):
        with mrcfile.open(f"{RUN}/class_{k}.mrc") as file:
            assert file.data.shape == (BOX,) * 3 and file.voxel_size.x == PIXEL
        shown = volume(f"{RUN}/class_{k}.mrc")
        own, other = (alike(shown[mask], truth[n][mask]) for n in (kind[k], 1 - kind[k]))
        assert own > 0.8 and own > other + 0.02
        mirrored = np.roll(truth[kind[k]][:, :, ::-1], 1, axis=2)  # about voxel n//2
        assert own > alike(shown[mask], mirrored[mask]) + 0.1
        halves = [volume(f"{RUN}/class_{k}_half{h}.mrc") for h in (1, 2)]
        assert alike(sum(halves)[mask], shown[mask]) > 0.8 and alike(*(h[mask] for h in halves)) > 0.5
    difference, true = (
        a[kind[1]] - a[kind[2]] for a in ({kind[k]: volume(f"{RUN}/class_{k}.mrc") for k in (1, 2)}, truth)
    )
    opposite = np.roll(true[::-1, ::-1, ::-1], 1, (0, 1, 2))  # through the origin
    assert alike(difference, true) > 0.5 > 2 * abs(alike(difference, opposite))


def test_history_and_replay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (f"{RUN}/class_2.mrc", f"{RUN}/clusters.json"):
        assert emc_info.program.main(["--replay", file]) == 0
        script = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("emc_pca", "emc_cluster"))]
        assert script == [f"emc_pca {SET} --scales 60,30 --axes 4 --path {RUN} --quiet", f"emc_cluster {RUN} --quiet"]
    entry = read(f"{RUN}/run.json")["history"][-1]
    assert {Path(p).name for p in entry["outputs"]} >= maps(2) | PICTURES | {"clusters.json", "run.json"}
    assert all(Path(path).exists() for path in entry["outputs"])


def test_others_go_on_from_it(here: Path, undrawn: None) -> None:
    """A class is selected, averaged and placed back with its own map; the parent knows nothing of it."""
    found = {p["id"]: p["class"] for p in particles(f"{RUN}/particles")}
    size = [list(found.values()).count(k) for k in (1, 2)]
    lines_of("emc_select", RUN, "--class", 1, "--set", "good")
    assert {p["id"] for p in particles("particles/good")} == {i for i, k in found.items() if k == 1}
    assert read("particles/good/particles.json")["parent"] == RUN
    (line,) = lines_of("emc_average", RUN, "--class", 2, "--path", "avg_00")
    assert line.startswith(f"avg_00: {size[1]} particles, ")
    average, own = (volume(f) for f in ("avg_00/half1.mrc", f"{RUN}/class_2_half1.mrc"))
    np.testing.assert_allclose(average, own, atol=1e-5 * abs(own).max())  # float32
    lines = lines_of("emc_mapback", RUN, "--pixel-size", 30)
    assert read("mapback/run.json")["options"]["average"] == [f"{RUN}/class_1.mrc", f"{RUN}/class_2.mrc"]
    assert [line.split(" placed")[0] for line in lines] == [
        f"{name}: " + ", ".join(
            f"{sum(k == c and i.startswith(name) for i, k in found.items())} of class {c}" for c in (1, 2)
        )
        for name in NAMES
    ]  # fmt: skip
    assert {f"{name}_class{k}.mrc" for name in NAMES for k in (1, 2)} <= names_in("mapback")
    assert {p["class"] for p in particles(f"particles/{SET}")} == {0}


ALONG = "60:1;30:1"


def test_numbers_asked_for(here: Path, undrawn: None) -> None:
    """The better of two stays in the run, the other is beside it, complete; the class that is left over is gone."""
    before = {name: Path(RUN, name).read_bytes() for name in maps(2)}
    lines = lines_of("emc_cluster", RUN, "--clusters", "3,2", "--along", ALONG, "--method", "kmeans")
    assert [line.split(":")[0] for line in lines[:2]] == ["2 clusters", "3 clusters"]
    assert [line.split(",")[0] for line in lines[2:]] == [
        *(f"{RUN}/k3: class {k}" for k in (1, 2, 3)),
        *(f"{RUN}: class {k}" for k in (1, 2)),
    ]
    assert names_in(f"{RUN}/k3") == maps(3) | {"clusters.json", "particles"} and not Path(RUN, "k2").exists()
    assert {p["class"] for p in particles(f"{RUN}/k3/particles")} == {1, 2, 3} and agreement(PARTICLES) >= 0.9
    assert read(f"{RUN}/k3/particles/particles.json")["parent"] == RUN
    assert read(f"{RUN}/k3/clusters.json")["chosen"] == 3
    assert lines_of("emc_average", f"{RUN}/k3", "--class", 3, "--path", "avg")[0].startswith("avg: ")
    lines_of("emc_cluster", RUN, "--clusters", 3, "--along", ALONG, "--method", "kmeans")
    assert {p["class"] for p in particles(f"{RUN}/particles")} == {1, 2, 3} and maps(3) < names_in(RUN)
    Path(RUN, "class_9.mrc").write_text("mine")
    lines_of("emc_cluster", RUN, "--clusters", 2, "--along", ALONG)
    assert {p.name for p in Path(RUN).glob("class_*.mrc")} == maps(2) | {"class_9.mrc"}
    assert {name: Path(RUN, name).read_bytes() for name in maps(2)} == before  # a seed repeats exactly


@pytest.mark.parametrize("method", ["kmeans", "hierarchical"])
def test_methods(here: Path, undrawn: None, method: str) -> None:
    lines_of("emc_cluster", RUN, "--clusters", 2, "--method", method)
    assert agreement(PARTICLES) >= 0.9
    assert read(f"{RUN}/clusters.json")["method"] == read(f"{RUN}/run.json")["state"]["clusters"]["method"] == method


def test_the_symmetry_of_the_run(here: Path, undrawn: None) -> None:
    """Classes are averaged with the symmetry that emc_pca was given: of c2, they are the same when turned by 180° about z."""
    write(f"{RUN}/run.json", (run := read(f"{RUN}/run.json")) | {"options": run["options"] | {"symmetry": "c2"}})
    plain = volume(f"{RUN}/class_1_half1.mrc")
    lines_of("emc_cluster", RUN, "--clusters", 2)
    for map_, most in ((volume(f"{RUN}/class_1_half1.mrc"), 0.05), (plain, np.inf)):
        found = map_[1:, 1:, 1:]  # the origin is the middle of these 35 voxels
        off = np.linalg.norm(found - found[:, ::-1, ::-1]) / np.linalg.norm(found)
        assert off < most and (off > 0.5) == (most == np.inf)


def test_axes_asked_for(here: Path, undrawn: None) -> None:
    """Along the axis of one band alone the kinds are as far apart; along one of noise they aren't."""
    lines_of("emc_cluster", RUN, "--clusters", 2, "--along", "60:1")
    assert agreement(PARTICLES) >= 0.9 and read(f"{RUN}/run.json")["state"]["clusters"]["along"] == {
        "60": [1],
        "30": [],
    }
    lines_of("emc_cluster", RUN, "--clusters", 2, "--along", "60:1;30:2,1")
    assert agreement(PARTICLES) >= 0.9 and read(f"{RUN}/run.json")["state"]["clusters"]["along"] == {
        "60": [1],
        "30": [1, 2],
    }
    lines_of("emc_cluster", RUN, "--clusters", 2, "--along", "60:3;30:4")
    assert agreement(PARTICLES) < 0.3


def test_all_that_is_alike_is_one_class(unclustered: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an axis, and along one of noise too; what is not used stays in class 0."""
    one_kind("one")
    lines_of("emc_pca", "one", *PCA, "--path", "alone")
    before = listing()
    capsys.readouterr()
    assert program("emc_cluster", "alone", "--clusters", 2, "--quiet") == 2
    assert capsys.readouterr().err == (
        "emc_cluster: error: --clusters: no axis is above noise; name axes with --along, or let it be auto\n"
    )
    assert listing() == before
    lines = lines_of("emc_cluster", "alone")
    count = len(coordinates("alone")["ids"])
    found = particles("alone/particles")
    assert lines[0] == "1 cluster: criterion 0" and lines[1].startswith(f"alone: class 1, {count} particles, ")
    assert len(lines) == 2 and {(p["use"], p["class"]) for p in found} == {(True, 1), (False, 0)}
    average, whole = volume("alone/class_1_half1.mrc"), volume("alone/half1.mrc")
    np.testing.assert_allclose(average, whole, atol=1e-5 * abs(whole).max())  # float32
    lines = lines_of("emc_cluster", "alone", "--along", "60:1")
    assert lines[-1].startswith(f"alone: class 1, {count} particles, ")
    assert all(line.endswith("no more than chance") for line in lines[1:-1])


def test_the_files_of_others_stay(
    unclustered: Path, undrawn: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody put there is refused before anything is written; what a killed run left is replaced."""
    Path(RUN, "class_2.mrc").write_text("mine")
    before = listing()
    assert program("emc_cluster", RUN, "--clusters", 2, "--quiet") == 2
    said = f"{RUN}/class_2.mrc: exists, and emc_cluster did not write it; give --overwrite to replace it"
    assert said in capsys.readouterr().err
    assert listing() == before
    Path(RUN, "class_2.mrc").unlink()
    original = classifications.mrc.write_volume

    def stops(path: Path, *rest: Any) -> None:
        if Path(path).name == "class_2.mrc":
            raise KeyboardInterrupt
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(classifications.mrc, "write_volume", stops)
        assert program("emc_cluster", RUN, "--clusters", 2, "--quiet") == 130
    assert {p["class"] for p in particles(f"{RUN}/particles")} == {0} and Path(RUN, "class_1.mrc").exists()
    assert without_history(f"{RUN}/run.json")["stopped_at"] is None
    lines_of("emc_cluster", RUN, "--clusters", 2)
    assert agreement(PARTICLES) >= 0.9


def test_the_disk_is_full(
    unclustered: Path, undrawn: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the map, the particles as they were, and a history that says so; then there is room again."""

    def fails(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: data for path, data in listing().items() if path != f"{RUN}/run.json"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        assert program("emc_cluster", RUN, "--clusters", 2, "--quiet") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{RUN}/class_1.mrc: no space left on device; free some space" in err
    assert {path: data for path, data in listing().items() if path != f"{RUN}/run.json"} == before
    assert read(f"{RUN}/run.json")["history"][-1]["state"] == "failed"
    lines_of("emc_cluster", RUN, "--clusters", 2)
    assert agreement(PARTICLES) >= 0.9


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, axes = listing(), sum(map(len, used().values()))
    for words, what in (((), "1 to 6"), (("--clusters", "2,3"), "2,3")):
        assert program("emc_cluster", RUN, *words, "--dry-run") == 0
        count = len(particles(f"{RUN}/particles"))
        assert capsys.readouterr().out == f"group {count} particles along {axes} axes into {what}\n"
    assert listing() == before


Spoil = Callable[[], object]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((SET,), f"{SET}: is no run of emc_pca; give the folder that emc_pca wrote"),
        (("pca_07",), "pca_07: is no run of emc_pca; "),
        ((RUN, "--along", "60"), "--along: '' is no axis from 1 to 4 of 60 Å; as 60:1,2;30:1"),
        ((RUN, "--along", "45:1"), "--along: '45:1' begins with no scale of 60, 30; "),
        ((RUN, "--along", "60:5"), "--along: '5' is no axis from 1 to 4 of 60 Å; "),
        ((RUN, "--along", "60:0"), "--along: '0' is no axis from 1 to 4"),
        ((RUN, "--along", "60:1,x"), "--along: 'x' is no axis from 1 to 4"),
        ((RUN, "--along", "60:²"), "--along: '²' is no axis from 1 to 4"),
        ((RUN, "--along", "axes"), "--along: 'axes' begins with no scale of 60, 30; "),
        ((RUN, "--clusters", "999"), "--clusters: 999 clusters of "),
        ((RUN, "--clusters", "0"), "--clusters: '0' is neither auto nor numbers such as 2,3,4; "),
        ((RUN, "--clusters", "2,two"), "--clusters: '2,two' is neither auto nor numbers such as 2,3,4; "),
        ((RUN, "--clusters", "²"), "--clusters: '²' is neither auto nor numbers such as 2,3,4; "),
        ((RUN, "--method", "best"), "argument --method: invalid choice: 'best'"),
    ],
)
def test_bad_input(unclustered: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str) -> None:
    """One line, exit 2, nothing written."""
    before = listing()
    assert program("emc_cluster", *words, "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"emc_cluster: error: {says}") and ";" in err, err
    assert listing() == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda: Path(RUN, "coordinates.npz").unlink(), f"{RUN}/coordinates.npz: can't be read; run emc_pca again"),
        (lambda: Path(RUN, "coordinates.npz").write_text("no"), f"{RUN}/coordinates.npz: can't be read; "),
        (lambda: Path(RUN, "run.json").write_text("{"), f"{RUN}/run.json: "),
        (lambda: Path(RUN, "half1.mrc").unlink(), f"{RUN}/half1.mrc: there is no such file; "),
        (lambda: Path(RUN, "mask.mrc").unlink(), f"{RUN}/mask.mrc: there is no such file"),
    ],
)
def test_spoilt_runs(unclustered: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, says: str) -> None:
    spoil()
    before = listing()
    assert program("emc_cluster", RUN, "--clusters", 2, "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"emc_cluster: error: {says}"), err
    assert listing() == before
