"""emc_select on hand-made sets: which particles, with which images, and what the records say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

import emc_average
import emc_export
import emc_extract
import emc_refine
import emc_select
from libemc import project as rooms
from libemc import records
from tests.by_hand import PIXEL, HandSeries, blobs_map, mrc_bytes
from tests.programs.sets import extracted_by_hand

TILTS = 11
SERIES = HandSeries(noise=0.3, particles=9)
EXTRACT = ("TS_hand", "--box", "32", "--quiet")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the set `ribo` of 9 particles in 11 tilts; particle i has score 0.i and class i % 3."""
    folder = extracted_by_hand(tmp_path_factory.mktemp("extracted"), SERIES)
    change("ribo", lambda i, p: p.update({"score": i / 10, "class": i % 3}), folder)
    return folder


@pytest.fixture
def here(extracted: Path, project: Path) -> Path:
    shutil.copytree(extracted, project, dirs_exist_ok=True)
    return project


def ran(*argv: object) -> int:
    return emc_select.program.main([str(word) for word in argv])


def file_of(name: str, series: str = "TS_hand") -> Path:
    return Path("particles", name, f"{series}.json")


def content(name: str, series: str = "TS_hand") -> dict[str, Any]:
    return json.loads(file_of(name, series).read_text())


def change(
    name: str, how: Callable[[int, dict[str, Any]], None], folder: Path = Path(), series: str = "TS_hand"
) -> None:
    path = folder / file_of(name, series)
    data = json.loads(path.read_text())
    for i, particle in enumerate(data["particles"]):
        how(i, particle)
    path.write_text(json.dumps(data))


def numbers(name: str, series: str = "TS_hand") -> list[int]:
    """Those of the ids."""
    return [int(p["id"].split(".")[1]) for p in content(name, series)["particles"]]


def images(name: str) -> dict[str, np.ndarray]:
    """The images of every particle as programs see them, by id."""
    found = {}
    for particles in rooms.open_particles(name)[1]:
        for i, p in enumerate(particles.file.particles):
            rows = int(particles.place[i]) * TILTS + np.arange(TILTS)
            found[p.id] = np.asarray(particles.stack[rows])
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies below, without locks and logs."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(file): (folder / file).read_bytes() for file in files if not any(p.startswith(".") for p in file.parts)}


def second_series(name: str = "TS_b") -> None:
    """The same picks and images under another name, in the same set."""
    record = json.loads(Path("info/TS_hand_info.json").read_text())
    Path(f"info/{name}_info.json").write_text(json.dumps(record | {"name": name}))
    argv = ["--all", "--label", "ribo", "--set", "ribo", "--box", "32", "--quiet"]
    assert emc_extract.program.main(argv) == 0


def test_what_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Particles as they were, with the place of their images in the parent's stack; nothing is copied."""
    assert ran("ribo", "--set", "new", "--class", "1,2", "--score-above", 0.2) == 0
    old, new = content("ribo"), content("new")
    assert numbers("new") == [4, 5, 7, 8]
    for particle, number in zip(new["particles"], [4, 5, 7, 8], strict=True):
        assert particle.pop("image") == number and particle == old["particles"][number]
    keys = {"set", "parent", "history", "particles"}
    assert {k: v for k, v in new.items() if k not in keys} == {k: v for k, v in old.items() if k not in keys}
    assert (new["set"], new["parent"]) == ("new", "ribo")
    head = json.loads(Path("particles/new/particles.json").read_text())
    assert (head["count"], head["parent"], head["label"], head["box"]) == (4, "ribo", "ribo", 32)
    assert head["files"] == {"TS_hand": "particles/new/TS_hand.json"}
    assert set(files_of(Path("particles/new"))) == {"particles.json", "TS_hand.json"}
    halves = [p["half"] for p in new["particles"]]
    assert capsys.readouterr().out.splitlines() == [
        "TS_hand: 9 particles, 4 kept",
        f"particles/new: 4 particles of 1 tilt series, {halves.count(1)} and {halves.count(2)} in the halves",
    ]
    (entry,) = head["history"]
    assert entry["program"] == "emc_select" and entry["state"] == "done"
    assert entry["inputs"] == ["particles/ribo/particles.json"]
    assert set(entry["outputs"]) == {"particles/new/particles.json", "particles/new/TS_hand.json"}


def test_classes_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file as that of all other classes, byte by byte; a class that nobody is in is an error."""
    assert ran("ribo", "--set", "new", "--class", "0,2", "--quiet") == 0
    wanted = content("new")
    assert ran("ribo", "--set", "new", "--drop-class", 1, "--quiet") == 0
    found = content("new")
    assert numbers("new") == [0, 2, 3, 5, 6, 8] and {**found, "history": []} == {**wanted, "history": []}
    assert ran("ribo", "--set", "new", "--drop-class", "0,1", "--score-above", 0.2, "--quiet") == 0
    assert numbers("new") == [5, 8]
    capsys.readouterr()
    for words, line in {
        ("--drop-class", "7,8"): "--drop-class: no particle is in class 7, 8; the classes are 0, 1, 2",
        ("--drop-class", "0,1,2"): "ribo: no particle of 9 is left after --drop-class; ask for less, or check the values",
        ("--drop-class", "1", "--class", "1"):
            "argument --class: not allowed with argument --drop-class; see emc_select --help",
    }.items():  # fmt: skip
        assert ran("ribo", "--set", "other", *words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"emc_select: error: {line}"
    assert ran("--label", "ribo", "--to", "new", "--drop-class", 1) == 2
    assert "--drop-class has no meaning for picks; leave it out" in capsys.readouterr().err


def test_a_class_of_a_run_is_refined_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The particles of one class of a run, with their halves; another refinement takes them, and keeps halves and ids."""
    Path("ref.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    argv = ["--reference", "ref.mrc", "--startres", "14", "--local", "--iterations", "1", "--quiet"]
    assert emc_refine.program.main(["ribo", *argv, "--path", "spt"]) == 0
    path = Path("spt/particles/TS_hand.json")
    old = {p["id"]: p for p in json.loads(path.read_text())["particles"] if p["class"] == 1}
    assert len(old) == 3 and {p["half"] for p in old.values()} == {1, 2}
    assert ran("spt", "--class", 1, "--set", "good", "--quiet") == 0
    new = {p["id"]: p for p in content("good")["particles"]}
    assert new.keys() == old.keys() and content("good")["parent"] == "spt"
    for key, particle in new.items():
        assert {k: v for k, v in particle.items() if k != "image"} == {
            k: v for k, v in old[key].items() if k != "image"
        }
    capsys.readouterr()
    assert emc_refine.program.main(["good", *argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("refine 3 particles in a box of 32 ")
    assert emc_refine.program.main(["good", *argv, "--path", "again"]) == 0
    refined = json.loads(Path("again/particles/TS_hand.json").read_text())["particles"]
    assert {p["id"]: (p["half"], p["class"]) for p in refined} == {key: (p["half"], 1) for key, p in old.items()}


def test_selected_particles_keep_their_images(here: Path) -> None:
    """Also those of a selection's selection, in another order, and of a run of it."""
    assert ran("ribo", "--set", "a", "--score-above", 0.25) == 0
    change("a", lambda i, p: None)
    data = content("a")
    data["particles"].reverse()
    file_of("a").write_text(json.dumps(data))
    assert ran("a", "--set", "b", "--min-tilts", 11, "--class", 0) == 0
    assert numbers("b") == [6, 3] and [p["image"] for p in content("b")["particles"]] == [6, 3]
    Path("ref.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    argv = ["a", "--reference", "ref.mrc", "--startres", "14", "--local", "--iterations", "1", "--path", "spt"]
    assert emc_refine.program.main([*argv, "--quiet"]) == 0
    whole = images("ribo")
    for name, count in (("a", 6), ("b", 2), ("spt", 6)):
        found = images(name)
        assert len(found) == count
        assert all(np.array_equal(found[key], whole[key]) for key in found)


def test_an_average_of_the_selected_is_that_of_the_used(here: Path) -> None:
    """The set with the others switched off gives the same maps, bit for bit, and the same particles to RELION."""
    assert ran("ribo", "--set", "some", "--score-above", 0.25) == 0
    for program, *argv in ((emc_average, "--path"), (emc_export, "--format", "relion31", "--output")):
        assert program.program.main(["some", *argv, f"some_{program.__name__}", "--quiet"]) == 0
    change("ribo", lambda i, p: p.update(use=i >= 3))
    for program, *argv in ((emc_average, "--path"), (emc_export, "--format", "relion31", "--output")):
        assert program.program.main(["ribo", *argv, f"ribo_{program.__name__}", "--quiet"]) == 0
    for name in ("half1.mrc", "half2.mrc", "average.mrc"):
        assert Path("some_emc_average", name).read_bytes() == Path("ribo_emc_average", name).read_bytes()
    stacks = [mrcfile.read(f"{name}_emc_export/TS_hand.mrcs") for name in ("some", "ribo")]
    assert stacks[0].shape == (6 * TILTS, 32, 32) and np.array_equal(*stacks)


def test_unused_particles_stay_behind(here: Path) -> None:
    change("ribo", lambda i, p: p.update(use=i != 4))
    assert ran("ribo", "--set", "new", "--quiet") == 0
    assert numbers("new") == [0, 1, 2, 3, 5, 6, 7, 8]


def test_neighbours_distance_region_and_best(here: Path) -> None:
    """Each against distances and positions that are measured here."""
    xyz = SERIES.positions
    apart = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    least = float(np.sort(apart[np.triu_indices(9, 1)])[6])  # six pairs are nearer
    assert ran("ribo", "--set", "far", "--distance", least, "--quiet") == 0
    kept: list[int] = []
    for i in range(8, -1, -1):  # the higher the number, the better the score
        kept += [i] if all(apart[i, j] >= least for j in kept) else []
    assert numbers("far") == sorted(kept) and 3 < len(kept) < 9
    assert ran("ribo", "--set", "near", "--neighbours", "2,3", "--neighbour-distance", 60, "--quiet") == 0
    others = (apart <= 60).sum(axis=1) - 1
    assert numbers("near") == np.flatnonzero((others >= 2) & (others <= 3)).tolist() != list(range(9))
    assert ran("ribo", "--set", "part", "--region=-30,100,-100,20,-99,99", "--quiet") == 0
    inside = (xyz[:, 0] >= -30) & (xyz[:, 1] <= 20)
    assert numbers("part") == np.flatnonzero(inside).tolist() != list(range(9))
    second_series()
    for series in ("TS_hand", "TS_b"):
        change("ribo", lambda i, p: p.update(score=i / 10), series=series)
    assert ran("ribo", "--set", "best", "--best", 2, "--quiet") == 0
    assert numbers("best") == numbers("best", "TS_b") == [7, 8]
    assert ran("ribo", "--set", "best", "--best-fraction", 0.5, "--tilt-series", "TS_b", "--quiet") == 0
    assert numbers("best", "TS_b") == [5, 6, 7, 8]
    assert list(json.loads(Path("particles/best/particles.json").read_text())["files"]) == ["TS_b"]


def test_sets_of_one_stack_are_joined_without_copying(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is in both the later set counts."""
    assert ran("ribo", "--set", "a", "--class", "0,1", "--quiet") == 0
    assert ran("ribo", "--set", "b", "--class", "1,2", "--quiet") == 0
    change("b", lambda i, p: p.update(rot=77.0, score=2.0))
    capsys.readouterr()
    assert ran("a", "b", "--set", "c") == 0
    assert capsys.readouterr().out.startswith("TS_hand: 12 particles, 3 repeated, 9 kept\nparticles/c: 9 particles ")
    assert sorted(numbers("c")) == list(range(9)) and not list(Path("particles/c").glob("*.mrcs"))
    for particle in content("c")["particles"]:
        number = int(particle["id"][-1])
        assert (particle["rot"] == 77.0) == (number % 3 > 0) and particle["image"] == number
    assert content("c")["stack"] == "particles/ribo/TS_hand.mrcs" and content("c")["parent"] == "a, b"
    found, whole = images("c"), images("ribo")
    assert all(np.array_equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("memory", ["4G", "400K"])
def test_sets_of_several_stacks_get_one_of_their_own(
    here: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two labels, whose picks of one number are different particles; what is missing on the way out is not copied.

    400 kB hold two particles at a time.
    """
    path = Path("info/TS_hand_info.json")
    record = json.loads(path.read_text())
    other = {key: values[2:6] for key, values in record["picks"]["ribo"].items() if isinstance(values, list)}
    other["xyz"] = [[x + 3.0, y, z] for x, y, z in other["xyz"]]
    record["picks"]["other"] = other
    path.write_text(json.dumps(record))
    assert emc_extract.program.main([*EXTRACT, "--label", "other", "--set", "other", "--symmetry", "c2"]) == 0
    change("other", lambda i, p: p.update(score=1.0 + i))
    capsys.readouterr()
    assert ran("ribo", "other", "--set", "both", "--score-above", 0.55, "--memory", memory) == 0
    out = capsys.readouterr()
    assert "TS_hand: 13 particles, 4 with new ids, 7 kept" in out.out
    assert "copy 77 images of 32²" in out.err and "differ in symmetry: the new one is c1" in out.err
    new = content("both")
    assert numbers("both") == [6, 7, 8, 9, 10, 11, 12] and new["label"] is None and new["symmetry"] == "c1"
    assert [p["parent"] for p in new["particles"]] == [None] * 3 + [f"TS_hand.{i:06d}" for i in range(4)]
    assert [p["half"] for p in new["particles"][3:]] == [p["half"] for p in content("other")["particles"]]
    assert new["stack"] == "particles/both/TS_hand.mrcs" and all("image" not in p for p in new["particles"])
    with mrcfile.open(new["stack"]) as file:
        assert file.data.dtype == np.float16 and file.voxel_size.x == PIXEL and file.data.shape == (77, 32, 32)
    found, ribo, others = images("both"), images("ribo"), images("other")
    for particle in new["particles"]:
        source = others[particle["parent"]] if particle["parent"] else ribo[particle["id"]]
        assert np.array_equal(found[particle["id"]], source)
    assert ran("ribo", "other", "--set", "both", "--distance", 5.0, "--quiet") == 0  # the others' score is higher
    assert sorted(numbers("both")) == [0, 1, 6, 7, 8, 9, 10, 11, 12]


def test_a_set_without_what_comes_from_another_stack_needs_none(here: Path) -> None:
    shutil.copytree("particles/ribo", "particles/copy")
    for file in ("particles.json", "TS_hand.json"):
        path = Path("particles/copy", file)
        path.write_text(path.read_text().replace("particles/ribo", "particles/copy"))
    change("copy", lambda i, p: p.update({"class": 5, "centre": [0.0, 0.0, float(i)]}))
    assert ran("ribo", "copy", "--set", "new", "--class", 5, "--quiet") == 0
    assert content("new")["stack"] == "particles/copy/TS_hand.mrcs" and len(numbers("new")) == 9
    assert [p["image"] for p in content("new")["particles"]] == list(range(9))


def test_sets_that_are_cut_out_of_the_raw_images(here: Path) -> None:
    """Selected and joined they need no stack; together with one of another extraction they get one, of the same images."""
    argv = [*EXTRACT, "--label", "ribo", "--set", "raw", "--no-stack"]
    assert emc_extract.program.main(argv) == 0
    change("raw", lambda i, p: p.update({"class": i % 3}))
    for name, classes in (("a", "0,1"), ("b", "1,2")):
        assert ran("raw", "--set", name, "--class", classes, "--quiet") == 0
    assert ran("a", "b", "--set", "c", "--quiet") == 0
    for name, wanted in (("a", [0, 1, 3, 4, 6, 7]), ("c", list(range(9)))):
        assert sorted(numbers(name)) == wanted and content(name)["stack"] is None
        assert not any("image" in p for p in content(name)["particles"])
    assert ran("ribo", "b", "--set", "d", "--quiet") == 0
    assert content("d")["stack"] == "particles/d/TS_hand.mrcs" and "raw" not in content("d")
    whole = images("ribo")
    for name in ("a", "c", "d"):
        found = images(name)
        assert all(np.array_equal(found[key], whole[key]) for key in found)


def test_splits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At random, the same for one seed; and by class. Every particle is in one part."""
    assert ran("ribo", "--set", "part", "--split", 2) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "TS_hand: 9 particles", "particles/part_1: 5 particles of 1 tilt series",
        "particles/part_2: 4 particles of 1 tilt series",
    ]  # fmt: skip
    first = numbers("part_1")
    assert sorted(first + numbers("part_2")) == list(range(9))
    assert ran("ribo", "--set", "part", "--split", 2, "--quiet") == 0 and numbers("part_1") == first
    assert ran("ribo", "--set", "part", "--split", 2, "--seed", 5, "--quiet") == 0 and numbers("part_1") != first
    assert ran("ribo", "--set", "by", "--split", "class", "--score-below", 0.5, "--quiet") == 0
    assert [numbers(f"by_class{k}") for k in range(3)] == [[0, 3], [1, 4], [2]]
    assert content("by_class2")["set"] == "by_class2" and not Path("particles/by").exists()


def test_picks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every column of what is kept, and what was asked; other labels and sections stay."""
    path = Path("info/TS_hand_info.json")
    record = json.loads(path.read_text())
    old = record["picks"]["ribo"]
    old |= {"score": [i / 10 for i in range(9)], "z": [9.0 - i for i in range(9)], "margin": [None] * 4 + [0.2] * 5}
    old["parameters"] = {"threshold": 5.5}
    path.write_text(json.dumps(record))
    before = records.load_tiltseries("TS_hand")
    argv = ("--label", "ribo", "--to", "good", "--z-above", 1.5, "--margin-above", 0.1, "--best", 3)
    assert ran(*argv) == 0
    assert capsys.readouterr().out == "TS_hand: 9 ribo, 3 kept\ngood: 3 picks of 1 tilt series\n"
    new = json.loads(path.read_text())["picks"]["good"]
    for key in ("xyz", "rot", "tilt", "psi", "score", "z", "margin"):
        assert new[key] == old[key][5:8]
    assert new["source"] == "emc_select" and new["parameters"] == {
        "threshold": 5.5, "selection": {"label": "ribo", "z_above": 1.5, "margin_above": 0.1, "best": 3},
    }  # fmt: skip
    now = records.load_tiltseries("TS_hand")
    others = {label: found for label, found in now.picks.items() if label != "good"}
    assert now.model_copy(update={"picks": others, "history": ()}) == before
    assert emc_extract.program.main([*EXTRACT, "--label", "good", "--set", "good"]) == 0
    assert [(p["score"], p["z"]) for p in content("good")["particles"]] == [(0.5, 4.0), (0.6, 3.0), (0.7, 2.0)]
    assert ran("good", "--set", "best", "--z-above", 2.5, "--quiet") == 0 and numbers("best") == [0, 1]
    second_series()
    assert ran("--label", "ribo", "--to", "good", "--distance", 60, "--tilt-series", "TS_b", "--quiet") == 0
    assert json.loads(path.read_text())["picks"]["good"] == new  # that of another tilt series
    record["picks"] = {"ribo": {**old, "score": [9.0] * 9}}
    Path("info/TS_b_info.json").write_text(json.dumps(record | {"name": "TS_b"}))
    assert ran("--label", "ribo", "--to", "good", "--score-above", 5, "--quiet") == 0
    assert "good" not in json.loads(path.read_text())["picks"]  # none is left there, so the old ones go
    assert len(json.loads(Path("info/TS_b_info.json").read_text())["picks"]["good"]["xyz"]) == 9


def test_picks_of_others_are_replaced_only_when_asked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("info/TS_hand_info.json")
    record = json.loads(path.read_text())
    record["picks"]["mine"] = {"xyz": [[1.0, 2.0, 3.0]]}
    path.write_text(json.dumps(record))
    before = path.read_bytes()
    assert ran("--label", "ribo", "--to", "mine") == 2 and path.read_bytes() == before
    assert "TS_hand_info.json: has picks labelled mine; use --overwrite" in capsys.readouterr().err
    assert ran("--label", "ribo", "--to", "mine", "--overwrite", "--quiet") == 0
    assert ran("--label", "ribo", "--to", "mine", "--distance", 60, "--quiet") == 0  # its own


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(here)
    assert ran("ribo", "--set", "new", "--class", 1, "--dry-run") == 0
    assert ran("--label", "ribo", "--to", "new", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "select 3 particles, copy 0 images of 32² (about 0 B of disk)",
        "select 9 of the picks ribo of 1 tilt series",
    ]
    assert files_of(here) == before


def test_stopped_while_it_copies(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays whole; the same command does all of it."""
    argv = [*EXTRACT, "--label", "ribo", "--set", "again"]
    assert emc_extract.program.main(argv) == 0
    change("again", lambda i, p: p.update(centre=[0.0, 0.0, float(i)]))
    words = ("ribo", "again", "--set", "both", "--quiet", "--memory", "400K")
    assert ran(*words) == 0
    before, append, calls = files_of(Path("particles")), emc_select.selections.mrc.StackWriter.append, []

    def stops(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        append(*args)

    monkeypatch.setattr(emc_select.selections.mrc.StackWriter, "append", stops)
    assert ran(*words) == 130 and files_of(Path("particles")) == before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ran(*words) == 0
    assert files_of(Path("particles"))["both/TS_hand.mrcs"] == before["both/TS_hand.mrcs"]
