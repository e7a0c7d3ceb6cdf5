"""emc_tomoctf: on a small tilt series of a film that is made here, aligned as it is known to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emc_tomoctf
from libemc import records
from libemc.methods import mirror
from libemc.records import Alignment, Picks, TiltSeriesRecord
from tests.by_hand import mrc_bytes
from tests.methods.estimate_ctf.films import Film

FILM = Film(
    name="ts",
    shape=(400, 420),
    tilts=(-50.0, -25.0, 0.0, 25.0, 50.0),
    unused=(3,),
    signal=1.0,
    astigmatism=700.0,
    seed=5,
)
INFO = Path("info/ts_info.json")
PICTURES = ["ctf.png", "rings.png", "spectra.png"]


def run(*argv: str) -> int:
    return emc_tomoctf.program.main([*argv, "--quiet"])


def load() -> TiltSeriesRecord:
    return records.load_tiltseries("ts")


def change(section: str, **values: Any) -> None:
    content = json.loads(INFO.read_text())
    content[section] |= values
    INFO.write_text(json.dumps(content))


def pictures() -> list[str]:
    return sorted(path.name for path in Path("tomograms/ts_ctf").glob("*.png"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned series."""
    folder = tmp_path_factory.mktemp("fresh")
    FILM.write(folder)
    return folder


@pytest.fixture(scope="module")
def once(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the program has run."""
    folder = tmp_path_factory.mktemp("once")
    shutil.copytree(fresh, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("ts", "--threads", "1") == 0
    return folder


@pytest.fixture
def aligned(fresh: Path, project: Path) -> Path:
    shutil.copytree(fresh, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def done(once: Path, project: Path) -> Path:
    shutil.copytree(once, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take longer than the fit."""
    for name in ("ring_plots", "spectra_picture", "ctf_plots"):
        monkeypatch.setattr(f"libemc.ctfs.{name}", lambda *_: None)


def assert_right(record: TiltSeriesRecord, hand: int = FILM.hand) -> None:
    ctf = record.ctf
    assert ctf is not None and ctf.measured == (True, True, True, False, True)
    for j in (0, 1, 2, 4):
        mean = (ctf.defocus_u[j] + ctf.defocus_v[j]) / 2
        assert abs(mean - FILM.middle(j)) < 3.5 * ctf.error[j] < 300
        assert ctf.defocus_u[j] - ctf.defocus_v[j] == pytest.approx(700, abs=200)
    assert ctf.defocus_handedness == hand and ctf.handedness_score > 0.9


def test_the_record_is_complete(done: Path) -> None:
    """Every list has an entry for every image, the pictures are there, and everything else is as it was."""
    record = load()
    assert_right(record)
    ctf = record.ctf
    for name in ("defocus_u", "defocus_v", "angle", "phase_shift", "score", "resolution", "error", "measured"):
        assert len(getattr(ctf, name)) == FILM.count, name
    assert ctf.error[3] is ctf.score[3] is ctf.resolution[3] is None
    assert ctf.phase_error is None and ctf.phase_shift == (0.0,) * FILM.count
    assert ctf.astigmatism_error > 0 and all(0 <= a < 180 for a in ctf.angle)
    assert pictures() == PICTURES
    assert all((Path("tomograms/ts_ctf") / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    before = FILM.typed()
    for name in ("source", "tilts", "alignment", "tomograms", "picks"):
        assert getattr(record, name) == getattr(before, name), name
    entry = record.history[-1]
    assert (entry.program, entry.state) == ("emc_tomoctf", "done")
    assert FILM.record()["source"]["stack"] in entry.inputs
    assert sorted(Path(path).name for path in entry.outputs if path.endswith(".png")) == PICTURES


def test_one_line_says_what_was_found(aligned: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """And a second run, which has to be asked for, finds the same."""
    assert run("ts", "--threads", "1") == 0
    out, _ = capsys.readouterr()
    ctf = load().ctf
    mean = [(ctf.defocus_u[j] + ctf.defocus_v[j]) / 2e4 for j in (0, 1, 2, 4)]
    assert out.count("\n") == 1 and out.startswith("ts: defocus ")
    assert f"({min(mean):.3f} to {max(mean):.3f})" in out  # µm
    assert "hand -1 (1.00)" in out and out.strip().endswith("; 4 of 4 tilts measured") and "phase" not in out
    before = INFO.read_bytes()
    assert run("ts", "--threads", "1") == 2
    error = capsys.readouterr().err
    assert "has a CTF already" in error and "--overwrite" in error and INFO.read_bytes() == before
    change("ctf", defocus_u=[1.0] * 5, thickness=1.0)
    assert run("ts", "--threads", "1", "--overwrite") == 0
    assert load().ctf == ctf
    assert len(load().history) == 2


def test_check_hand_explains_and_saves_nothing(done: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = INFO.read_bytes()
    assert run("ts", "--check-hand", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "for hand -1" in out and "score 1.00" in out and "nothing is to be done" in out and "--flip" not in out
    assert INFO.read_bytes() == before
    # the mirror image of the alignment: the heights are turned around
    INFO.write_text(json.dumps(FILM.record()))
    change("alignment", axis=[a + 180 for a in FILM.record()["alignment"]["axis"]])
    before = INFO.read_bytes()
    assert run("ts", "--check-hand", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "for hand +1" in out and "emc_tomoctf ts --flip" in out
    assert INFO.read_bytes() == before


def test_dry_run_does_nothing(aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = INFO.read_bytes()
    assert run("ts", "--dry-run") == 0
    assert "estimate the CTF of 1 tilt series" in capsys.readouterr().out
    assert run("ts", "--flip", "--dry-run") == 0
    assert "mirror image" in capsys.readouterr().out
    assert INFO.read_bytes() == before and not Path("tomograms").exists()


def test_flip_is_undone_by_flip(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes what `mirror.mirrored` changes, without looking at the images; tomograms are no longer listed."""
    made = {"file": "tomograms/ts.mrc", "pixel_size": 12.0, "shape": [8, 8, 8]}
    content = json.loads(INFO.read_text())
    INFO.write_text(json.dumps(content | {"tomograms": [made], "picks": {"x": {"xyz": [[100.0, -20.0, 30.0]]}}}))
    before = load()
    Path(FILM.record()["source"]["stack"]).unlink()
    assert run("ts", "--flip") == 0
    out = capsys.readouterr().out
    assert "defocus handedness now +1" in out and "1 picks x inverted" in out
    after = load()
    assert after.model_dump(exclude={"history"}) == mirror.mirrored(before).model_dump(exclude={"history"})
    assert after.tomograms == () and after.ctf.defocus_handedness == 1
    assert after.picks == {"x": Picks(xyz=((-100.0, 20.0, -30.0),))}
    assert run("ts", "--flip") == 0
    again = load()
    assert again.tomograms == () and again.ctf == before.ctf and again.picks == before.picks
    np.testing.assert_allclose(again.alignment.axis, before.alignment.axis)
    assert again.alignment.model_copy(update={"axis": before.alignment.axis}) == before.alignment
    assert again.source.tilt_axis == pytest.approx(before.source.tilt_axis)


def open_hand(turn: float) -> Alignment:
    """An alignment from images alone, its axis turned."""
    change("alignment", axis=[a + turn for a in FILM.record()["alignment"]["axis"]], hand_open=True)
    return load().alignment


def test_an_open_hand_is_closed(aligned: Path, undrawn: None) -> None:
    """Where the axis was guessed right, nothing turns."""
    before = open_hand(0.0)
    assert run("ts", "--threads", "1") == 0
    assert_right(load())
    assert load().alignment == before.model_copy(update={"hand_open": False})


def test_a_wrong_guess_is_turned(aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The axis was guessed 180 degrees off: the defocus rises with height, and the specimen is turned, and the user told so."""
    open_hand(180.0)
    assert run("ts", "--threads", "1") == 0
    out, err = capsys.readouterr()
    record = load()
    assert_right(record)
    assert not record.alignment.hand_open
    turned = np.subtract(record.alignment.axis, FILM.record()["alignment"]["axis"]) / 360
    np.testing.assert_allclose(turned, np.round(turned), atol=1e-9)
    assert "hand -1" in out and "tilt axis" in err + " ".join(record.history[-1].warnings)
    assert pictures() == PICTURES


def test_a_hand_that_is_known_is_not_turned(aligned: Path, undrawn: None) -> None:
    """The microscope's sign is +1, or the alignment is mirrored: the record says so, and --flip is the user's to give."""
    change("alignment", axis=[a + 180 for a in FILM.record()["alignment"]["axis"]])
    before = load().alignment
    assert run("ts", "--threads", "1") == 0
    assert_right(load(), hand=1)
    assert load().alignment == before


def test_an_undecided_hand_stays_open(aligned: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Tilts of a degree: the heights say nothing. A warning says so."""
    open_hand(0.0)
    low = [-1.5, -0.5, 0.0, 0.5, 1.5]
    change("tilts", nominal=low)
    change("alignment", tilt=low, xtilt=[0.0] * 5)
    flat = Film(**{**FILM_FIELDS, "tilts": tuple(low), "xtilt": 0.0})
    Path(FILM.record()["source"]["stack"]).write_bytes(mrc_bytes(flat.stack(), FILM.pixel, stack=True))
    assert run("ts", "--threads", "1") == 0
    record = load()
    assert record.alignment.hand_open and record.ctf.handedness_score < 0.9
    warned = capsys.readouterr().err + " ".join(record.history[-1].warnings)
    assert "the hand is undecided" in warned
    assert run("ts", "--check-hand", "--threads", "1") == 0
    assert "Undecided" in capsys.readouterr().out


FILM_FIELDS = {k: v for k, v in vars(FILM).items() if k not in ("positions", "angles")}


def test_a_micrograph_needs_no_alignment(project: Path) -> None:
    film = Film(**{**FILM_FIELDS, "tilts": (0.0,), "unused": (), "xtilt": 0.0})
    film.write(project)
    content = json.loads(INFO.read_text())
    del content["alignment"]
    INFO.write_text(json.dumps(content))
    assert run("ts", "--threads", "1") == 0
    record = load()
    assert record.alignment is None and record.ctf.measured == (True,)
    mean = (record.ctf.defocus_u[0] + record.ctf.defocus_v[0]) / 2
    assert abs(mean - film.middle(0)) < 3.5 * record.ctf.error[0] < 400
    assert pictures() == PICTURES


def test_a_phase_plate(aligned: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A shift of 60 degrees in the images is found where it's asked for, and told."""
    film = Film(**{**FILM_FIELDS, "phase": 60.0, "astigmatism": 0.0})
    Path(FILM.record()["source"]["stack"]).write_bytes(mrc_bytes(film.stack(), FILM.pixel, stack=True))
    assert run("ts", "--phase-plate", "--threads", "1") == 0
    ctf = load().ctf
    assert [ctf.phase_shift[j] for j in (0, 1, 2, 4)] == pytest.approx([60.0] * 4, abs=12)
    assert len(ctf.phase_error) == FILM.count and ctf.phase_error[3] is None and max(ctf.phase_error[:3]) < 10
    assert "phase shift" in capsys.readouterr().out


def test_all_series_are_checked_before_any(aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of two isn't aligned: the first is not touched."""
    content = FILM.record() | {"name": "zz"}
    del content["alignment"]
    Path("info/zz_info.json").write_text(json.dumps(content))
    before = INFO.read_bytes()
    assert run("--all") == 2
    assert "info/zz_info.json" in capsys.readouterr().err
    assert INFO.read_bytes() == before
