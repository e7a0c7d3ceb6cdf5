"""emc_extract on tilt series drawn by hand: what is cut, where, how it is scaled, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest

import emc_extract
from tests.by_hand import PIXEL, HandSeries, blobs_image, blobs_map, filtered, pose

ARGV = ("--label", "ribo", "--set", "ribo", "--box", "32", "--quiet")


@pytest.fixture(scope="module")
def drawn() -> tuple[HandSeries, np.ndarray]:
    """A series of nine particles with noise of 0.5 on a mean of 100; the fifth lies half outside the field at high tilt."""
    series = HandSeries(noise=0.5, unused=(0,), particles=9)
    series.positions[4] = (120.0, -110.0, 60.0)
    return series, series.stack()


@pytest.fixture
def series(project: Path, drawn: tuple[HandSeries, np.ndarray]) -> HandSeries:
    drawn[0].write(project, drawn[1])
    return drawn[0]


def ran(*argv: object) -> int:
    return emc_extract.program.main([str(word) for word in argv])


def content(name: str = "TS_hand") -> dict:
    return json.loads(Path(f"particles/ribo/{name}.json").read_text())


def changed(**sections: object) -> None:
    """Change sections of the record."""
    path = Path("info/TS_hand_info.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies below, without locks and logs."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(file): (folder / file).read_bytes() for file in files if not any(p.startswith(".") for p in file.parts)}


def test_what_is_written(series: HandSeries, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the particle file against the record it came from, by hand."""
    assert ran("TS_hand", *ARGV, "--symmetry", "c3") == 0
    out = capsys.readouterr()
    assert out.err == "" and out.out.startswith("TS_hand: 9 particles, ") and out.out.count("\n") == 1
    file, record = content(), series.record()
    picks, alignment = record["picks"]["ribo"], record["alignment"]
    assert [p["id"] for p in file["particles"]] == [f"TS_hand.{i:06d}" for i in range(9)]
    for i, particle in enumerate(file["particles"]):
        assert particle["xyz"] == particle["centre"] == picks["xyz"][i]
        assert [particle[k] for k in ("rot", "tilt", "psi")] == [picks[k][i] for k in ("rot", "tilt", "psi")]
        assert particle["use"] is True and particle["score"] is None
        np.testing.assert_allclose(particle["defocus"], [series.seen(i, j)[1] for j in range(11)], atol=1e-6)
    halves = [p["half"] for p in file["particles"]]
    assert sorted(set(halves)) == [1, 2] and abs(halves.count(1) - halves.count(2)) <= 2
    assert (file["box"], file["pixel_size"], file["symmetry"], file["label"]) == (32, 2.0, "c3", "ribo")
    assert (
        file["contrast"] == "white"
        and file["ctf_premultiplied"] is False
        and file["stack"] == "particles/ribo/TS_hand.mrcs"
    )
    assert file["optics"] == {"voltage": 300.0, "cs": 2.7, "amplitude_contrast": 0.07}
    tilts = file["tilts"]
    assert all(tilts[k] == alignment[k] for k in ("axis", "tilt", "xtilt", "magnification"))
    assert (tilts["dose"], tilts["dose_before"]) == ([1.0] * 11, [float(k) for k in series.order])
    assert tilts["astigmatism"] == [200.0] * 11 and tilts["astigmatism_angle"] == [30.0] * 11
    assert tilts["use"] == [False] + [True] * 10
    head = json.loads(Path("particles/ribo/particles.json").read_text())
    assert head["count"] == 9 and head["files"] == {"TS_hand": "particles/ribo/TS_hand.json"}


def test_patches(series: HandSeries) -> None:
    """In the order particle·T + tilt, white, of unit noise; what is not used or not seen is empty and marked.

    The disc of half the box must lie in the image for a tilt to count.
    """
    assert ran("TS_hand", *ARGV) == 0
    with mrcfile.open("particles/ribo/TS_hand.mrcs") as file:
        assert file.data.dtype == np.float16 and file.voxel_size.x == PIXEL
        stack = file.data.astype(float).reshape(9, 11, 32, 32)
    particles = content()["particles"]
    rows, columns = series.shape
    away = np.hypot(*np.meshgrid(*(np.arange(32) - 16,) * 2)) > 0.9 * 16
    for i in range(9):
        for j in range(11):
            (x, y), _ = series.seen(i, j)
            x, y = x / PIXEL + columns // 2, y / PIXEL + rows // 2
            inside = 8 <= x <= columns - 9 and 8 <= y <= rows - 9
            assert particles[i]["visible"][j] == int(inside and j != 0)
            assert stack[i, j].any() == bool(particles[i]["visible"][j])
    assert 0 < sum(particles[4]["visible"]) < 10  # the one that was put at the edge
    for j in range(1, 11):
        seen = [i for i in range(9) if particles[i]["visible"][j]]
        assert stack[seen, j][:, away].std() == pytest.approx(1.0, abs=0.01)  # what scaling to unit variance means
        assert stack[seen, j][:, away].mean() == pytest.approx(0.0, abs=1e-3)
        for i in set(seen) - {4}:
            white = blobs_image(
                (32, 32), series.matrix(j) @ pose(*series.angles[i]), magnification=series.magnifications[j]
            )
            white = filtered(white, series.transfer((32, 32), j, series.seen(i, j)[1]))
            # noise of 0.5 on a signal of 0.6 rms within the particle
            assert np.corrcoef(stack[i, j].ravel(), white.ravel())[0, 1] > 0.4, (i, j)


@pytest.mark.parametrize(("box", "binning"), [(16, 2), (17, 2), (33, 1)])
def test_other_boxes(series: HandSeries, box: int, binning: int) -> None:
    assert ran("TS_hand", "--label", "ribo", "--set", "ribo", "--box", box, "--bin", binning, "--quiet") == 0
    with mrcfile.open("particles/ribo/TS_hand.mrcs") as file:
        assert file.data.shape == (99, box, box) and file.voxel_size.x == PIXEL * binning
        mean = file.data.astype(float).reshape(9, 11, box, box)[:4, 1:].mean((0, 1))
    assert content()["pixel_size"] == PIXEL * binning
    want = np.zeros((box, box))
    for i in range(4):
        for j in range(1, 11):
            white = blobs_image((box, box), series.matrix(j) @ pose(*series.angles[i]), pixel=PIXEL * binning)
            coarse = HandSeries(pixel=PIXEL * binning)
            want += filtered(white, coarse.transfer((box, box), j, series.seen(i, j)[1]))
    assert np.corrcoef(mean.ravel(), want.ravel())[0, 1] > 0.9


def test_subtomograms(series: HandSeries) -> None:
    """One volume a particle in the specimen's frame: the map turned by the pose, seen through noise and the wedge."""
    assert ran("TS_hand", *ARGV, "--subtomograms") == 0
    volumes = sorted(Path("particles/ribo/subtomograms").glob("*.mrc"))
    assert [v.name for v in volumes] == [f"TS_hand_{i:06d}.mrc" for i in range(9)]
    right, other = [], []
    for i in (0, 2, 6, 8):
        with mrcfile.open(volumes[i]) as file:
            assert file.data.shape == (32, 32, 32) and file.voxel_size.z == PIXEL
            found = file.data.ravel()
        right.append(np.corrcoef(found, blobs_map(32, rotation=pose(*series.angles[i])).ravel())[0, 1])
        other.append(np.corrcoef(found, blobs_map(32, rotation=pose(*series.angles[i - 1])).ravel())[0, 1])
    assert min(right) > 0.3 and np.mean(right) > np.mean(other) + 0.1, (right, other)


def test_picks_without_orientation_and_out_of_the_field(series: HandSeries, capsys: pytest.CaptureFixture[str]) -> None:
    """A pick that no tilt sees is left out, and the others keep their numbers; no angles are zero angles."""
    points = [[0.0, 0.0, 0.0], [9000.0, 0.0, 0.0], [10.0, -20.0, 5.0]]
    changed(picks={"ribo": {"xyz": points, "score": [0.5, 0.4, 0.3]}})
    assert ran("TS_hand", *ARGV) == 0
    assert "2 particles" in (out := capsys.readouterr().out) and "1 in no image" in out
    particles = content()["particles"]
    assert [p["id"] for p in particles] == ["TS_hand.000000", "TS_hand.000002"]
    assert [p["score"] for p in particles] == [0.5, 0.3] and all(
        p["rot"] == p["tilt"] == p["psi"] == 0 for p in particles
    )
    assert mrcfile.read("particles/ribo/TS_hand.mrcs").shape == (22, 32, 32)


def test_without_a_ctf(series: HandSeries, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("info/TS_hand_info.json").read_text())
    del record["ctf"]
    Path("info/TS_hand_info.json").write_text(json.dumps(record))
    assert ran("TS_hand", *ARGV) == 0
    assert "has no CTF" in capsys.readouterr().err
    assert content()["particles"][0]["defocus"] is None and content()["tilts"]["astigmatism"] == [0.0] * 11
    assert any("has no CTF" in text for text in content()["history"][-1]["warnings"])


def test_without_doses(series: HandSeries) -> None:
    """The particles lose their doses and nothing else; a subtomogram is then not weighted by them."""
    assert ran("TS_hand", *ARGV, "--subtomograms") == 0
    kept, images = content(), Path("particles/ribo/TS_hand.mrcs").read_bytes()
    weighted = mrcfile.read("particles/ribo/subtomograms/TS_hand_000000.mrc")
    assert ran("TS_hand", *ARGV, "--no-dose", "--subtomograms") == 0
    found = content()
    assert found["tilts"] == kept["tilts"] | {"dose": [0.0] * 11, "dose_before": [0.0] * 11}
    assert found["particles"] == kept["particles"] and Path("particles/ribo/TS_hand.mrcs").read_bytes() == images
    assert not np.allclose(mrcfile.read("particles/ribo/subtomograms/TS_hand_000000.mrc"), weighted)


def test_all_takes_the_series_that_have_such_picks(series: HandSeries, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("info/TS_hand_info.json").read_text())
    for name, label in (("TS_b", "ribo"), ("TS_c", "other")):
        copy = record | {"name": name, "picks": {label: record["picks"]["ribo"]}}
        Path(f"info/{name}_info.json").write_text(json.dumps(copy))
    assert ran("--all", *ARGV) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["TS_b", "TS_hand"]
    head = json.loads(Path("particles/ribo/particles.json").read_text())
    assert head["count"] == 18 and list(head["files"]) == ["TS_b", "TS_hand"]
    assert [p["id"] for p in content("TS_b")["particles"]][:2] == ["TS_b.000000", "TS_b.000001"]


def test_again_and_history(series: HandSeries, project: Path) -> None:
    """A second run of the same command gives the same bytes but for the history, and every record says what was done."""
    raw = files_of(project)
    assert ran("TS_hand", *ARGV) == 0
    first = files_of(project / "particles/ribo")
    assert set(first) == {"particles.json", "TS_hand.json", "TS_hand.mrcs"}
    assert ran("TS_hand", *ARGV) == 0
    second = files_of(project / "particles/ribo")
    assert first["TS_hand.mrcs"] == second["TS_hand.mrcs"]
    for name in ("particles.json", "TS_hand.json"):
        one, two = (json.loads(f[name]) for f in (first, second))
        (entry,) = one["history"]
        assert entry["program"] == "emc_extract" and entry["state"] == "done" and entry["wall_seconds"] > 0
        assert entry["argv"] == ["emc_extract", "TS_hand", *ARGV]
        assert {"info/TS_hand_info.json", "tiltseries/TS_hand.mrc"} <= set(entry["inputs"])
        assert set(entry["outputs"]) == {f"particles/ribo/{n}" for n in first}
        assert {k: v for k, v in one.items() if k != "history"} == {k: v for k, v in two.items() if k != "history"}
    assert raw == {name: data for name, data in files_of(project).items() if not name.startswith("particles/")}


def test_dry_run_writes_nothing(series: HandSeries, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(project)
    assert ran("TS_hand", *ARGV, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("cut 99 images of 32² from 1 tilt series (about ")
    assert files_of(project) == before and not Path("particles").exists()


def test_killed_and_run_again(series: HandSeries, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the second of two series is cut: the set that was there is still whole; again, and it is done."""
    record = json.loads(Path("info/TS_hand_info.json").read_text())
    Path("info/TS_b_info.json").write_text(json.dumps(record | {"name": "TS_b"}))
    assert ran("--all", *ARGV) == 0
    whole = files_of(project / "particles")
    original, calls = emc_extract.extract.extract, []

    def stops(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(emc_extract.extract, "extract", stops)
    assert ran("--all", "--label", "ribo", "--set", "ribo", "--box", 24, "--quiet") == 130
    assert files_of(project / "particles") == whole
    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert ran("--all", "--label", "ribo", "--set", "ribo", "--box", 24, "--quiet") == 0
    assert content()["box"] == content("TS_b")["box"] == 24


def test_what_another_wrote_is_not_replaced(series: HandSeries, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("TS_hand", *ARGV) == 0
    head = Path("particles/ribo/particles.json")
    mine = json.loads(head.read_text())
    mine["history"][0]["program"] = "emc_select"
    head.write_text(json.dumps(mine))
    before = files_of(Path("particles"))
    assert ran("TS_hand", *ARGV) == 2
    assert "--overwrite" in capsys.readouterr().err and files_of(Path("particles")) == before
    assert ran("TS_hand", *ARGV, "--overwrite") == 0


def test_a_subtomogram_of_anothers_is_found_before_the_work(
    series: HandSeries, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path("particles/ribo/subtomograms/TS_hand_000007.mrc")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert ran("TS_hand", *ARGV, "--subtomograms") == 2
    assert f"{mine}: exists, and emc_extract did not write it" in capsys.readouterr().err
    assert files_of(Path("particles")) == {"ribo/subtomograms/TS_hand_000007.mrc": b"mine"}


def test_memory_does_not_change_what_is_cut(series: HandSeries) -> None:
    for memory in ("4G", "100K"):
        assert (
            ran("TS_hand", "--label", "ribo", "--set", f"at{memory}", "--box", 32, "--memory", memory, "--quiet") == 0
        )
    one, other = (mrcfile.read(f"particles/at{memory}/TS_hand.mrcs").astype(float) for memory in ("4G", "100K"))
    np.testing.assert_allclose(one, other, atol=0.01)  # float16
