"""emc_refine --classes on a mixture of two kinds: from the set's classes, from references, after a stop, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

import emc_info
from libemc import class_refinements, classifications, principal_axes
from tests.by_hand import pose
from tests.programs.mixtures import (
    BOX,
    NAMES,
    PIXEL,
    SET,
    agreement,
    alike,
    change_particles,
    copied_set,
    mixture,
    names_in,
    particles,
    true_kinds,
    volume,
)
from tests.programs.moving import lines_of, listing, program, read, without_history

PAGES = {"classes.html", "montage.png", "classes.json"}
KEPT = ("id", "half", "centre", "visible", "use", "defocus")
WRONG = 0.25
"""Part of the particles of each kind that the set has in the other's class."""


def maps(count: int) -> set[str]:
    return {f"class_{k}{end}.mrc" for k in range(1, count + 1) for end in ("", "_half1", "_half2")}


def misled(p: dict[str, Any]) -> None:
    """A class that is the other one's for every fourth particle."""
    wrong = int(p["id"].split(".")[1]) % round(1 / WRONG) == 1
    p["class"] = 1 + (int(true_kinds([p["id"]])[0]) ^ int(wrong))


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with classes in its set, a quarter wrong, and two iterations from them: `spt_00`, lines in `told`."""
    folder = tmp_path_factory.mktemp("refined")
    shutil.copytree(mixture(tmp_path_factory), folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        change_particles(f"particles/{SET}", misled)
        Path("told").write_text(
            "\n".join(lines_of("emc_refine", SET, *FROM_SET, "--iterations", 2, "--path", "spt_00"))
        )
    return folder


FROM_SET = ("--classes", 2, "--local", "--startres", 30, "--no-motion")


@pytest.fixture
def here(refined: Path, project: Path) -> Path:
    shutil.copytree(refined, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages: for runs of which only the numbers are looked at."""
    monkeypatch.setattr(principal_axes, "write_page", lambda *_: None)
    monkeypatch.setattr(classifications, "write_refined_page", lambda *_: None)


def test_from_the_classes_of_the_set(here: Path) -> None:
    """A quarter is in the wrong class; after two iterations nobody is. Lines, record and particles say the same."""
    assert agreement(f"particles/{SET}") < 0.5
    found = particles("spt_00/particles")
    assert agreement("spt_00/particles") > 0.95
    for p in found:
        assert len(p["classes"]) == 2 and sum(p["classes"]) == pytest.approx(1, abs=2e-4)
        assert p["class"] == 1 + int(np.argmax(p["classes"]))
    for old, new in zip(particles(f"particles/{SET}"), found, strict=True):
        assert all(old[key] == new[key] for key in KEPT)
    run = read("spt_00/run.json")
    assert run["stopped_at"] is None and run["options"]["classes"] == 2 and run["state"]["iterations"] == []
    first, second = run["state"]["classes"]
    assert first["numbers"] == second["numbers"] == [1, 2] and not first["exhaustive"]
    assert 20.0 <= first["band"] < 30.0  # what the classes vouch for
    share = np.mean([p["classes"] for p in found], axis=0)
    np.testing.assert_allclose(second["shares"], share, atol=1e-3)
    assert 0.1 < first["changed"] < 0.45 and second["changed"] < 0.05  # of a quarter that was wrong
    lines = Path("told").read_text().splitlines()
    for number, (line, said) in enumerate(zip((first, second), lines, strict=False), 1):
        assert said == (
            f"iteration {number} (local, data to {line['band']:.1f} Å): "
            + ", ".join(
                f"class {k} {100 * s:.0f} % at {r:.2f} Å"
                for k, s, r in zip(line["numbers"], line["shares"], line["resolutions"], strict=True)
            )
            + f"; {100 * line['changed']:.1f} % changed class, {line['rejected']} rejected"
        )
    assert lines[2:] == [f"spt_00: {len(found)} particles, 2 classes after 2 iterations"]
    table = read("spt_00/classes.json")["classes"]
    assert [row["resolution"] for row in table] == second["resolutions"] and [r["number"] for r in table] == [1, 2]
    assert all(20 <= row["resolution"] < 30 for row in table)


def test_what_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps of both classes, each its own kind's more than the other's and than its mirror image's; the page; a history."""
    assert names_in("spt_00") == maps(2) | PAGES | {"run.json", "particles"}
    truth = [volume(f"raw/true_{k}.mrc") for k in (1, 2)]
    for k in (1, 2):
        with mrcfile.open(f"spt_00/class_{k}.mrc") as file:
            assert file.data.shape == (BOX,) * 3 and file.voxel_size.x == PIXEL
        shown = volume(f"spt_00/class_{k}.mrc")
        own, other = alike(shown, truth[k - 1]), alike(shown, truth[2 - k])
        mirrored = np.roll(truth[k - 1][:, :, ::-1], 1, axis=2)  # about voxel n//2
        assert own > 0.7 and own > other + 0.02 and own > alike(shown, mirrored) + 0.1
        halves = [volume(f"spt_00/class_{k}_half{h}.mrc") for h in (1, 2)]
        assert alike(sum(halves), shown) > 0.6 and np.abs(halves[0] - halves[1]).max() > 0
    page = Path("spt_00/classes.html").read_text()
    assert f"spt_00: 2 classes of {len(particles('spt_00/particles'))} particles" in page
    (entry,) = read("spt_00/run.json")["history"]
    assert entry["state"] == "done" and {Path(p).name for p in entry["outputs"]} >= maps(2) | PAGES | {"run.json"}
    assert emc_info.program.main(["--replay", "spt_00/class_2.mrc"]) == 0
    script = capsys.readouterr().out.splitlines()
    assert f"emc_refine {SET} {' '.join(map(str, FROM_SET))} --iterations 2 --path spt_00 --quiet" in script
    assert read("spt_00/particles/particles.json")["parent"] == SET


def test_history_names_what_is_there(here: Path) -> None:
    (entry,) = read("spt_00/run.json")["history"]
    assert [path for path in entry["outputs"] if not Path(path).exists()] == []


def test_others_go_on_from_it(here: Path, undrawn: None) -> None:
    """A class is selected and averaged; the run is refined further in its classes."""
    size = [sum(p["class"] == k for p in particles("spt_00/particles")) for k in (1, 2)]
    lines_of("emc_select", "spt_00", "--class", 2, "--set", "good")
    assert len(particles("particles/good")) == size[1]
    (line,) = lines_of("emc_average", "spt_00", "--class", 1, "--path", "avg_00")
    assert line.startswith(f"avg_00: {size[0]} particles, ")
    lines = lines_of("emc_refine", "spt_00", *FROM_SET, "--iterations", 1, "--path", "spt_01")
    assert re.search(r"; 0\.\d % changed class", lines[0]) and agreement("spt_01/particles") > 0.95
    assert read("spt_01/particles/particles.json")["parent"] == "spt_00"


def test_a_seed_repeats_exactly(here: Path, undrawn: None) -> None:
    lines = lines_of("emc_refine", SET, *FROM_SET, "--iterations", 2, "--path", "new")
    assert lines == [line.replace("spt_00", "new") for line in Path("told").read_text().splitlines()]
    for name in maps(2):
        assert Path("new", name).read_bytes() == Path("spt_00", name).read_bytes(), name
    for name in ("run.json", *(f"particles/{n}.json" for n in NAMES)):
        assert without_history(f"new/{name}") == without_history(f"spt_00/{name}")


def test_resume_after_a_stop(here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second iteration, gone on with: nearly what two without a stop found. Of each particle only the pose in
    its likeliest class is kept, so that it is not the same to the last digit."""
    original, seen = class_refinements.classes.iteration, list[int]()

    def stops(*rest: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*rest)

    options = (SET, *FROM_SET, "--iterations", 2, "--path", "new")
    with monkeypatch.context() as patch:
        patch.setattr(class_refinements.classes, "iteration", stops)
        assert program("emc_refine", *options, "--quiet") == 130
    record = read("new/run.json")
    assert record["stopped_at"] == "iteration 2" and len(record["state"]["classes"]) == 1
    assert record["state"]["classes"][0] == read("spt_00/run.json")["state"]["classes"][0]
    before = particles("new/particles")
    lines = lines_of("emc_refine", *options, "--resume")
    assert [line.split(" (")[0] for line in lines] == [
        "iteration 2",
        f"new: {len(before)} particles, 2 classes after 2 iterations",
    ]
    assert agreement("new/particles") > 0.95
    record = read("new/run.json")
    assert record["stopped_at"] is None and len(record["state"]["classes"]) == 2
    for k in (1, 2):
        assert alike(volume(f"new/class_{k}.mrc"), volume(f"spt_00/class_{k}.mrc")) > 0.99
    # all of it is done: once more is nothing
    assert lines_of("emc_refine", *options, "--resume") == lines[-1:]
    changed = ("--classes", 2, "--local", "--startres", 40, "--no-motion")
    assert program("emc_refine", SET, *changed, "--iterations", 3, "--path", "new", "--resume", "--quiet") == 2


def test_from_a_reference_of_each(here: Path, undrawn: None) -> None:
    """Whatever classes the set has: both kinds are found from maps at 30 Å, in the order that the references have."""
    one, two = ("--reference", "raw/true_1.mrc"), ("--reference", "raw/true_2.mrc")
    found = []
    for references in ((*one, *two), (*two, *one)):
        lines = lines_of("emc_refine", SET, *FROM_SET, *references, "--iterations", 1, "--path", "new", "--overwrite")
        assert (
            lines[0].startswith("iteration 1 (local, data to 30.0 Å): class 1 ") and agreement("new/particles") > 0.95
        )
        found.append([p["class"] for p in particles("new/particles")])
    assert np.mean(np.array(found[0]) + np.array(found[1]) == 3) > 0.95
    kinds = true_kinds([p["id"] for p in particles("new/particles")])
    assert np.mean(np.array(found[0]) == 1 + kinds) > 0.95
    inputs = {i["path"] for i in read("new/run.json")["inputs"]}
    assert inputs == {f"particles/{SET}/particles.json", "raw/true_1.mrc", "raw/true_2.mrc"}
    assert names_in("new") == maps(2) | {"run.json", "particles", "classes.json"}


def test_from_one_reference(here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refined as one, divided by what the particles differ in, refined in classes; gone on with after a stop between."""
    argv = (SET, *FROM_SET, "--reference", "raw/true_1.mrc", "--iterations", 1, "--path", "new")
    with monkeypatch.context() as patch:
        patch.setattr(class_refinements, "begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert program("emc_refine", *argv, "--quiet") == 130
    record = read("new/run.json")
    assert len(record["state"]["iterations"]) == 1 and record["state"]["classes"] == [] and record["stopped_at"]
    lines = lines_of("emc_refine", *argv, "--resume")
    assert re.match(r"iteration 1 \(local, data to 2\d\.\d Å\): class 1 ", lines[0])
    assert re.fullmatch(r"new: \d+ particles, 2 classes after 2 iterations", lines[-1])
    assert agreement("new/particles") > 0.9
    assert names_in("new") >= maps(2) | {"average.mrc", "half1.mrc", "half2.mrc", "index.html", "classes.json"}
    true = {p["id"]: p for p in particles(f"particles/{SET}")}
    moved = [np.linalg.norm(np.subtract(p["xyz"], true[p["id"]]["xyz"])) for p in particles("new/particles")]
    turned = [
        np.degrees(
            np.arccos(
                np.clip((np.trace(pose(*(p[k] for k in ANGLES)) @ pose(*(q[k] for k in ANGLES)).T) - 1) / 2, -1, 1)
            )
        )
        for p, q in ((p, true[p["id"]]) for p in particles("new/particles"))
    ]
    assert np.median(moved) < 5 and np.median(turned) < 5  # poses were right, and stay


ANGLES = ("rot", "tilt", "psi")


def test_from_a_clustered_run(here: Path, undrawn: None) -> None:
    """The classes of emc_cluster, in the run that emc_pca made, with the search of all orientations left out."""
    lines_of("emc_cluster", "pca_00", "--clusters", 2)
    lines = lines_of("emc_refine", "pca_00", *FROM_SET, "--iterations", 1, "--path", "new")
    assert agreement("new/particles") > 0.95 and len(lines) == 2
    assert read("new/particles/particles.json")["parent"] == "pca_00"


def test_classes_of_one_kind_are_said_to_be_alike(
    here: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Divided at random, they end as the same: a warning says so, the record how much is known. Those of two kinds are known."""
    kinds = true_kinds([p["id"] for p in particles(f"particles/{SET}")])
    label = iter(np.random.default_rng(4).integers(1, 3, len(kinds)).tolist())
    kind = iter(kinds.tolist())
    copied_set("one", lambda p: p.update({"use": next(kind) == 0, "class": next(label)}))
    capsys.readouterr()
    lines_of("emc_refine", "one", *FROM_SET, "--iterations", 4, "--path", "one_00")
    assert "emc_refine: warning: the classes are alike: the halves agree on nothing" in capsys.readouterr().err
    assert read("one_00/run.json")["state"]["classes"][-1]["certainty"] < 0.05
    assert read("spt_00/run.json")["state"]["classes"][-1]["certainty"] > 0.5


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing()
    assert program("emc_refine", SET, *FROM_SET, "--path", "new", "--dry-run") == 0
    out = capsys.readouterr().out
    count = len(particles(f"particles/{SET}"))
    assert out.startswith(f"refine {count} particles in a box of {BOX} at {PIXEL:g} Å in 2 classes (about ")
    assert listing() == before


TRUE = ("--reference", "raw/true_1.mrc")


def none(p: dict[str, Any]) -> None:
    p["class"] = 0


def first_only(p: dict[str, Any]) -> None:
    p["class"] = 1


def few(p: dict[str, Any]) -> None:
    p["use"] = int(p["id"].split(".")[1]) < 4


@pytest.mark.parametrize(
    ("words", "spoil", "says"),
    [
        (("--classes", 2), none, f"{SET}: has the classes 0, not 1 to 2; give --reference, or cluster the particles with "),
        (("--classes", 2), first_only, f"{SET}: has the classes 1, not 1 to 2; "),
        (("--classes", 3), None, f"{SET}: has the classes 1, 2, not 1 to 3; "),
        (("--classes", 2, *TRUE * 3), None, "--reference: 3 references for 2 classes; give one reference, one for each class, "),
        (("--classes", 3, *TRUE * 2), None, "--reference: 2 references for 3 classes; "),
        ((), None, "--reference: one reference is needed; give one, or more --classes"),
        (TRUE * 2, None, "--reference: one reference is needed; "),
        (("--classes", 2), few, f"{SET}: 8 particles are too few for 2 classes; use more, or ask for fewer"),
        (("--classes", 0), None, "argument --classes: "),
        (("--classes", "two"), None, "argument --classes: "),
    ],
)  # fmt: skip
def test_bad_input(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[object, ...],
    spoil: Callable[[dict[str, Any]], None] | None,
    says: str,
) -> None:
    """One line, exit 2, nothing written."""
    if spoil is not None:
        change_particles(f"particles/{SET}", spoil)
    before = listing()
    assert program("emc_refine", SET, *words, "--path", "new", "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"emc_refine: error: {says}"), err
    assert listing() == before


def test_resume_of_another_number_of_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.dumps(without_history("spt_00/run.json"))
    words = ("--classes", 1, *TRUE, "--local", "--startres", 30, "--no-motion", "--path", "spt_00", "--resume")
    assert program("emc_refine", SET, *words, "--quiet") == 2
    said = "spt_00/run.json: was begun with reference = None, not ['raw/true_1.mrc']; give the same options"
    assert said in capsys.readouterr().err
    assert json.dumps(without_history("spt_00/run.json")) == before
