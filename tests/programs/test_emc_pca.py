"""emc_pca on a mixture of two known kinds: the axis that tells them apart, its maps, and what doesn't change it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch

import emc_info
from libemc import principal_axes
from libemc.numerics import rotations
from tests.by_hand import mrc_bytes, pose
from tests.programs.mixtures import (
    BOX,
    NAMES,
    PCA,
    PIXEL,
    RUN,
    SET,
    alike,
    change_particles,
    coordinates,
    copied_set,
    mixture,
    names_in,
    one_kind,
    particles,
    true_kinds,
    volume,
)
from tests.programs.moving import lines_of, listing, program, read, without_history, write

AVERAGE = {"average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png"}
TABLES = {"run.json", "coordinates.json", "coordinates.npz", "particles"}
PICTURES = {"spectrum.png", "variance.png", "coordinates.png", "index.html"}
DRAWN = PICTURES | {"axes_60.png", "axes_30.png"}


def meaningful(run: str) -> dict[int, int]:
    """How many axes of each band are above noise: of 53 particles one at 60 Å, and perhaps, as chance has it, one at 30 Å."""
    return {int(band["scale"]): band["meaningful"] for band in read(f"{run}/run.json")["state"]["bands"]}


def shown(run: str) -> list[tuple[int, int]]:
    """The axes of which there are maps: those that are meaningful, and two more of each band."""
    return [(scale, k) for scale, count in meaningful(run).items() for k in range(1, count + 3)]


@pytest.fixture
def here(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    shutil.copytree(mixture(tmp_path_factory), project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages: for runs of which only the numbers are looked at."""
    monkeypatch.setattr(principal_axes, "write_page", lambda *_: None)


def ran(*words: object, name: str = SET, path: str = "new") -> list[str]:
    """The lines of a run of emc_pca."""
    return lines_of("emc_pca", name, *PCA, "--path", path, *words)


def along(run: str, scale: int = 60) -> np.ndarray:
    """(N,) of the particles along the first axis of a band, as they are likely to lie."""
    found = coordinates(run)
    k = found[f"b_{scale}"].shape[1]
    precision = np.zeros((len(found["ids"]), k, k))
    i, j = np.tril_indices(k)
    precision[:, i, j] = precision[:, j, i] = found[f"a_{scale}"]
    b = found[f"b_{scale}"].astype(float)
    return np.array([np.linalg.solve(a + np.eye(k), row)[0] for a, row in zip(precision, b, strict=True)])


def test_the_axis_tells_the_kinds_apart(here: Path) -> None:
    """Along the first axis of either band the two kinds are well apart; record and lines say one axis at 60 Å, and none or one at
    30 Å, where noise is as strong as what 53 particles show."""
    ids = coordinates(RUN)["ids"].tolist()
    kinds = true_kinds(ids)
    assert ids == [p["id"] for p in particles(f"{RUN}/particles")] and len(ids) > 50
    for scale in (60, 30):
        z = along(RUN, scale)
        apart = abs(z[kinds == 0].mean() - z[kinds == 1].mean())
        assert apart > 3 * np.sqrt((z[kinds == 0].var() + z[kinds == 1].var()) / 2)
        assert 0.7 < z.std() < 1.2  # of unit variance, but for what is drawn towards 0
    record = read(f"{RUN}/run.json")
    state = record["state"]
    assert state["particles"] == len(ids) and state["halves"] == {"turned": 0.0, "moved": 0.0}
    assert record["stopped_at"] is None and record["program"] == "emc_pca"
    assert record["options"] == {
        "set_or_run": SET, "class": None, "scales": [60.0, 30.0], "axes": 4, "components": "probabilistic",
        "subset": None, "mask": None, "symmetry": "c1",
    }  # fmt: skip
    coarse, fine = state["bands"]
    assert (coarse["scale"], coarse["coarse"], fine["scale"], fine["fine"]) == ("60", None, "30", 30.0)
    assert coarse["fine"] == fine["coarse"] == pytest.approx(np.sqrt(60 * 30))
    lines = Path("said").read_text().splitlines()
    for band, line in zip(state["bands"], lines, strict=False):
        strength, floor = band["strength"], band["floor"]
        count = band["meaningful"]
        assert count == sum(s > floor for s in strength) and band["left_out"] == [None] * count
        assert floor > max(strength[1], 1.15 * band["noise"][0] - 1e-3) and strength == sorted(strength, reverse=True)
        assert (
            line == f"{band['scale']} Å: {count} of 4 axes above noise (strength {strength[0]:.3g}; floor {floor:.3g})"
        )
    assert coarse["meaningful"] == 1 and coarse["strength"][0] > 3 * coarse["floor"]
    assert fine["strength"][0] > 1.2 * fine["strength"][1]  # the others are noise
    assert lines[2] == f"{RUN}: {len(ids)} particles, {1 + fine['meaningful']} axes to look for classes in"


def test_what_is_written(here: Path) -> None:
    """Every file; coordinates for people are those for emc_cluster; particles have not moved, and nothing else is left."""
    maps = {f"axis_{scale}_{k}{end}.mrc" for scale, k in shown(RUN) for end in ("", "_minus", "_plus")} | {
        f"variance_{scale}.mrc" for scale in (60, 30)
    }
    assert names_in(RUN) == AVERAGE | TABLES | DRAWN | maps
    table = read(f"{RUN}/coordinates.json")
    count = meaningful(RUN)
    assert table["axes"] == {str(scale): [1] * count[scale] for scale in (60, 30)}
    assert list(table["particles"]) == coordinates(RUN)["ids"].tolist()
    for column, scale in enumerate(s for s in (60, 30) if count[s]):  # of one axis alone: what others share stays in it
        found = np.array([row[column] for row in table["particles"].values()])
        a, b = coordinates(RUN)[f"a_{scale}"][:, 0], coordinates(RUN)[f"b_{scale}"][:, 0]
        np.testing.assert_allclose(found, b / (a + 1), atol=1e-4)
    (entry,) = read(f"{RUN}/run.json")["history"]
    assert entry["state"] == "done" and {Path(p).name for p in entry["outputs"]} >= names_in(RUN) - {"particles"}
    assert all(Path(path).exists() for path in entry["outputs"])
    for old, new in zip(particles(f"particles/{SET}"), particles(f"{RUN}/particles"), strict=True):
        np.testing.assert_array_equal(new["xyz"], old["xyz"])
        np.testing.assert_allclose(*(pose(p["rot"], p["tilt"], p["psi"]) for p in (old, new)), atol=1e-9)
        assert {k: v for k, v in new.items() if k not in ("rot", "tilt", "psi", "xyz", "weight")} == {
            k: v for k, v in old.items() if k not in ("rot", "tilt", "psi", "xyz", "weight")
        }
    assert read(f"{RUN}/particles/particles.json")["parent"] == SET
    page = Path(RUN, "index.html").read_text()
    assert RUN in page and "60" in page and "missing wedge" in page


def test_the_maps_of_axes(here: Path) -> None:
    """Both sides of an axis are the average and two deviations of it, within the mask; one is the headless particle."""
    mask, average = volume(f"{RUN}/mask.mrc"), volume(f"{RUN}/average.mrc")
    truth = [volume(f"raw/true_{k}.mrc") for k in (1, 2)]
    assert mask.min() >= 0 and mask.max() <= 1 and 0.02 < mask.mean() < 0.5
    for scale, k in shown(RUN):
        with mrcfile.open(f"{RUN}/axis_{scale}_{k}.mrc") as file:
            assert file.voxel_size.x == PIXEL and file.data.shape == (BOX,) * 3
            axis = file.data.astype(float)
        minus, plus = (volume(f"{RUN}/axis_{scale}_{k}_{side}.mrc") for side in ("minus", "plus"))
        largest = abs(plus).max()
        np.testing.assert_allclose(plus, average + 2 * axis, atol=1e-5 * largest)  # float32
        np.testing.assert_allclose(minus, average - 2 * axis, atol=1e-5 * largest)
        assert not axis[mask == 0].any() and axis.std() > 0
    for scale in (60, 30):
        axis, variance = volume(f"{RUN}/axis_{scale}_1.mrc"), volume(f"{RUN}/variance_{scale}.mrc")
        assert variance.min() >= 0 and not variance[mask == 0].any()
        band = read(f"{RUN}/run.json")["state"]["bands"][0 if scale == 60 else 1]
        share = max(0.0, 1 - band["floor"] / band["strength"][0])
        np.testing.assert_allclose(variance, share * axis**2, atol=1e-4 * variance.max())
    axis = volume(f"{RUN}/axis_60_1.mrc")
    found = alike(axis, truth[1] - truth[0])
    opposite = np.roll(axis[::-1, ::-1, ::-1], 1, (0, 1, 2))  # through the origin, voxel n//2
    assert abs(found) > 0.6 > 3 * abs(alike(opposite, truth[1] - truth[0]))
    z, kinds = along(RUN), true_kinds(coordinates(RUN)["ids"].tolist())
    assert (z[kinds == 1].mean() > 0) == (found > 0)  # the side of the particles that have no head


def test_history_and_replay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emc_info.program.main(["--replay", f"{RUN}/axis_60_1_plus.mrc"]) == 0
    script = capsys.readouterr().out.splitlines()
    assert f"emc_pca {SET} --scales 60,30 --axes 4 --path {RUN} --quiet" in script
    assert any(line.startswith(f"emc_extract --all --label {SET} --set {SET}") for line in script)


def test_a_seed_repeats_exactly_and_replaces_its_own(here: Path, undrawn: None) -> None:
    """In the same folder, with maps of an earlier run in it that is of another scale; a foreign file stays."""
    lines = ran("--scales", 45, "--axes", 3)
    assert len(lines) == 2 and {"axis_45_1.mrc", "axis_45_1_plus.mrc", "variance_45.mrc"} < names_in("new")
    Path("new/axis_mine.mrc").write_text("mine")
    assert ran() == [line.replace(RUN, "new") for line in Path("said").read_text().splitlines()]
    assert names_in("new") - {"axis_mine.mrc"} == names_in(RUN) - DRAWN
    for name in names_in(RUN) - DRAWN - {"run.json", "particles"}:
        assert Path("new", name).read_bytes() == Path(RUN, name).read_bytes(), name
    for name in ("run.json", *(f"particles/{n}.json" for n in NAMES)):
        assert without_history(f"new/{name}") == without_history(f"{RUN}/{name}")


def test_all_that_is_alike_has_no_axis(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind alone: nothing is above noise. As one class of a set it's analysed as a set of its own is, to the last bit."""

    def by_kind(p: dict[str, Any]) -> None:
        p["class"] = 1 + int(true_kinds([p["id"]])[0])

    change_particles(f"particles/{SET}", by_kind)
    one_kind("one")
    lines = ran("--class", 1)
    count = int((true_kinds(coordinates(RUN)["ids"].tolist()) == 0).sum())
    assert [line.split(" axes")[0] for line in lines[:2]] == ["60 Å: 0 of 4", "30 Å: 0 of 4"]
    assert lines[2] == f"new: {count} particles, no axis is more than noise: the particles look alike"
    table = read("new/coordinates.json")
    assert table["axes"] == {"60": [], "30": []} and set(map(tuple, table["particles"].values())) == {()}
    for band in read("new/run.json")["state"]["bands"]:
        assert band["meaningful"] == 0 and band["strength"][0] < band["floor"]
    assert sorted(p.name for p in Path("new").glob("axis_60_?.mrc")) == ["axis_60_1.mrc", "axis_60_2.mrc"]
    assert volume("new/variance_60.mrc").max() < volume(f"{RUN}/variance_60.mrc").max() / 5
    assert names_in("new") >= DRAWN and read("new/run.json")["options"]["class"] == [1]
    used = [p for p in particles("new/particles") if p["use"]]
    assert {p["class"] for p in used} == {1} and len(used) == count
    assert len(particles("new/particles")) == len(particles(f"particles/{SET}"))
    monkeypatch.setattr(principal_axes, "write_page", lambda *_: None)
    assert ran(name="one", path="alone")[:2] == lines[:2]
    for name, values in coordinates("alone").items():
        np.testing.assert_array_equal(coordinates("new")[name], values)


def test_some_particles_show_the_axes_of_all(here: Path, undrawn: None) -> None:
    """Coordinates of all along the axis that two thirds of them show: those that all of them show, but for noise."""
    lines = ran("--subset", 36)
    assert lines[0].startswith("60 Å: 1 of 4 axes")
    assert coordinates("new")["ids"].tolist() == coordinates(RUN)["ids"].tolist()
    assert abs(alike(along("new"), along(RUN))) > 0.98
    assert alike(volume("new/axis_60_1.mrc"), volume(f"{RUN}/axis_60_1.mrc")) ** 2 > 0.9
    assert read("new/run.json")["state"]["particles"] == len(coordinates(RUN)["ids"])
    assert read("new/run.json")["options"]["subset"] == 36


def test_singular_vectors(here: Path, undrawn: None) -> None:
    """They tell the kinds apart too, if not as well; particles count as if all were sampled alike."""
    assert ran("--components", "svd")[0].startswith("60 Å: 1 of 4 axes")
    assert abs(alike(along("new"), along(RUN))) > 0.94
    a = coordinates("new")["a_60"]
    np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape))
    assert not (coordinates(RUN)["a_60"] == coordinates(RUN)["a_60"][:1]).all()


def test_little_memory(here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences that lie in a file as float16 say the same to its precision, and the file is gone."""
    original, made = principal_axes._on_disk, list[Any]()
    monkeypatch.setattr(principal_axes, "_on_disk", lambda *a: made.append(original(*a)) or made[-1])
    ran("--memory", "500K")
    assert [array.dtype for array in made] == [np.float16] * 2 and made[0].shape[0] == len(along(RUN))
    assert names_in("new") == names_in(RUN) - DRAWN
    assert not [p for p in Path().rglob(".*") if p.is_file() and p.suffix not in (".lock", ".log")]
    for name, values in coordinates(RUN).items():
        if name != "ids":
            np.testing.assert_allclose(coordinates("new")[name], values, atol=0.01 * abs(values).max())


def test_threads(here: Path) -> None:
    """The same to rounding. A process of its own, whose threads don't burn the time that they wait for a core in."""
    passive = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"OMP_WAIT_POLICY": "PASSIVE"}
    argv = [SET, *map(str, PCA), "--path", "new", "--threads", "2", "--quiet"]
    undrawn = "from libemc import principal_axes as p; p.write_page = lambda *_: None; import emc_pca; emc_pca.entry()"
    subprocess.run([sys.executable, "-c", undrawn, *argv], env=passive, check=True, stdout=subprocess.DEVNULL)
    for name, values in coordinates(RUN).items():
        if name != "ids":
            np.testing.assert_allclose(coordinates("new")[name], values, atol=1e-4 * abs(values).max())


def test_a_mask(here: Path, undrawn: None) -> None:
    """Where the mask leaves the head out there is nothing that differs; around the head all of it does."""
    truth = [volume(f"raw/true_{k}.mrc") for k in (1, 2)]
    away = truth[0] - truth[1]
    middle = np.argwhere(away > 0.5 * away.max()).mean(axis=0)
    distance = np.sqrt(sum((i - m) ** 2 for i, m in zip(np.indices((BOX,) * 3), middle, strict=True)))
    automatic = volume(f"{RUN}/mask.mrc")
    masks = {"head": np.clip((8 - distance) / 2, 0, 1), "rest": automatic * np.clip((distance - 9) / 2, 0, 1)}
    for name, mask in masks.items():
        Path(f"{name}.mrc").write_bytes(mrc_bytes(mask, PIXEL, stack=False))
        ran("--mask", f"{name}.mrc", path=name)
        np.testing.assert_allclose(volume(f"{name}/mask.mrc"), mask, atol=1e-6)
        assert not volume(f"{name}/axis_60_1.mrc")[mask == 0].any()
    head, rest = (read(f"{name}/run.json")["state"]["bands"][0] for name in masks)
    assert head["meaningful"] == 1 and rest["meaningful"] == 0  # each mask has a noise of its own
    assert head["strength"][0] / head["floor"] > 3 * rest["strength"][0] / rest["floor"]
    assert abs(alike(along("head"), along(RUN))) > 0.97
    assert {i["path"] for i in read("head/run.json")["inputs"]} == {f"particles/{SET}/particles.json", "head.mrc"}


# ------------------------------------------------------------------------------------------------- halves that lie apart

TURN, MOVE = pose(40.0, 50.0, -20.0), np.array([12.0, -9.0, 14.0])
"""What half 2 has at u, half 1 has at TURN·u + MOVE (Å)."""


def apart(p: dict[str, Any]) -> None:
    """Give a particle of half 2 the pose that it has in a frame of its own."""
    if p["half"] == 2:
        rotation = pose(p["rot"], p["tilt"], p["psi"])
        p["xyz"] = (np.array(p["xyz"]) + rotation @ MOVE).tolist()
        found = rotations.euler_from_matrix(torch.from_numpy(rotation @ TURN))
        p.update(zip(("rot", "tilt", "psi"), map(float, found), strict=True))
        np.testing.assert_allclose(pose(p["rot"], p["tilt"], p["psi"]), rotation @ TURN, atol=1e-9)


def errors(found: Sequence[dict[str, Any]], true: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Degrees and Å between poses."""
    degrees, moved = [], []
    for p, q in zip(found, true, strict=True):
        a, b = (pose(r["rot"], r["tilt"], r["psi"]) for r in (p, q))
        degrees.append(np.degrees(np.arccos(np.clip((np.trace(a.T @ b) - 1) / 2, -1, 1))))
        moved.append(np.linalg.norm(np.subtract(p["xyz"], q["xyz"])))
    return np.array(degrees), np.array(moved)


def test_halves_are_brought_together(here: Path, undrawn: None) -> None:
    """Half 2, turned and moved as a whole, is back to within what 40 Å and 25 particles show; half 1 stays as it was."""
    copied_set("two", apart)
    true = particles(f"particles/{SET}")
    second = np.array([p["half"] == 2 for p in true])
    before = errors(particles("particles/two"), true)
    turned = np.degrees(np.arccos((np.trace(TURN) - 1) / 2))
    np.testing.assert_allclose(before[0][second], turned, atol=1e-6)
    lines = ran(name="two")
    said = re.fullmatch(r"half 2 lay turned by (\S+)° and moved by (\S+) Å in half 1: brought together", lines[0])
    assert said and abs(float(said[1]) - turned) < 1.5 and abs(float(said[2]) - np.linalg.norm(MOVE)) < 3
    state = read("new/run.json")["state"]["halves"]
    assert [f"{state['turned']:.1f}", f"{state['moved']:.1f}"] == [said[1], said[2]]
    degrees, moved = errors(particles("new/particles"), true)
    assert degrees[second].max() < 1.5 and moved[second].max() < 3
    np.testing.assert_array_equal(moved[~second], 0)
    assert degrees[~second].max() < 1e-4
    assert read("new/fsc.json")["resolution"] < 1.1 * read(f"{RUN}/fsc.json")["resolution"]
    assert lines[1].startswith("60 Å: 1 of 4 axes") and abs(alike(along("new"), along(RUN))) > 0.99


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, count = listing(), len(coordinates(RUN)["ids"])
    assert program("emc_pca", SET, *PCA, "--dry-run") == 0
    assert re.fullmatch(
        rf"compare {count} particles in bands about 60, 30 Å \(about \S+ \S+ of disk\)\n", capsys.readouterr().out
    )
    assert listing() == before


def test_stopped_and_run_again(here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped among its maps: the record says where, emc_cluster refuses it, and the same command does all of it."""
    original = principal_axes.mrc.write_volume

    def stops(path: Path, *rest: Any) -> None:
        if Path(path).name == "axis_60_2.mrc":
            raise KeyboardInterrupt
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(principal_axes.mrc, "write_volume", stops)
        assert program("emc_pca", SET, *PCA, "--path", "new", "--quiet") == 130
    record = read("new/run.json")
    assert record["stopped_at"] == "maps" and record["history"][-1]["state"] == "interrupted"
    write("new/run.json", record | {"history": [record["history"][-1] | {"state": "running"}]})  # as if it was killed
    assert program("emc_cluster", "new", "--quiet") == 2
    assert ran() == [line.replace(RUN, "new") for line in Path("said").read_text().splitlines()]
    assert read("new/run.json")["stopped_at"] is None


def test_files_of_others_stay(here: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A map of that name that somebody else wrote is refused before any map of an axis is written."""
    Path("new").mkdir()
    Path("new/axis_30_1.mrc").write_text("mine")
    assert program("emc_pca", SET, *PCA, "--path", "new", "--quiet") == 2
    assert "new/axis_30_1.mrc: exists, and emc_pca did not write it; give --overwrite" in capsys.readouterr().err
    assert Path("new/axis_30_1.mrc").read_text() == "mine" and not Path("new/axis_60_1.mrc").exists()
