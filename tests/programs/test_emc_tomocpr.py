"""emc_tomocpr on specimens that move, with records that are wrong: the records come nearer to the truth, and so do images."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile

import emc_tomocpr
from libemc import joint_pages, joint_refinements, records, tiltseries_updates
from tests.by_hand import pose, tilt_matrix
from tests.programs.moving import (
    ANGLE,
    BOX,
    DEFOCUS,
    KEPT,
    MAPS,
    NAMES,
    PIXEL,
    SHIFT,
    extracted_and_refined,
    images,
    likeness,
    lines_of,
    listing,
    off,
    program,
    read,
    rms,
    same_run,
    simulated,
    write,
)

ONE = ("spt_00", "--iterations", 1)
GEOMETRY = ("axis", "tilt", "xtilt", "shift_x", "shift_y")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with `spt_00`, from picks and records that are wrong."""
    folder = tmp_path_factory.mktemp("moved")
    simulated(folder)
    extracted_and_refined(folder)
    return folder


@pytest.fixture(scope="module")
def refined(moved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with `cpr_00`, what emc_tomocpr makes of it, and its lines in `said`."""
    folder = tmp_path_factory.mktemp("refined")
    shutil.copytree(moved, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("said").write_text("\n".join(lines_of("emc_tomocpr", *ONE)))
    return folder


@pytest.fixture
def before(moved: Path, project: Path) -> Path:
    shutil.copytree(moved, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def here(refined: Path, project: Path) -> Path:
    shutil.copytree(refined, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages: for runs of which only the numbers are looked at."""
    monkeypatch.setattr(joint_pages, "write_page", lambda *_: None)


def info(name: str, folder: Path = Path()) -> dict[str, Any]:
    return read(folder / f"info/{name}_info.json")


def given(section: dict[str, Any]) -> dict[str, Any]:
    """What a section has, whether or not it names what it hasn't."""
    return {key: value for key, value in section.items() if value is not None}


def chosen(run: str) -> dict[str, dict[str, Any]]:
    """The levels that are on in a run's last iteration."""
    return {t["level"]: t for t in read(f"{run}/run.json")["state"]["iterations"][-1]["trials"] if t["kept"]}


def test_images_are_found(here: Path) -> None:
    """Images lie less than half as far from the truth as after emc_refine, and a quarter of the defocus' error is gone.

    What is left is as in test_emc_subtilt, but both halves go together here.
    """
    old, new = off("spt_00"), off("cpr_00")
    assert old[0] > 1.5 and old[1] > 0.7 * DEFOCUS
    assert new[0] < 0.5 * old[0] and new[1] < 0.75 * old[1]
    assert likeness("cpr_00") > likeness("spt_00") + 0.02
    start, found = read("cpr_00/run.json")["state"]["start"]["spt_00"], read("cpr_00/fsc.json")
    assert found["resolution"] <= start["resolution"] < 17


def test_what_is_written(here: Path) -> None:
    """Maps, FSC, pictures and particles as the record and the lines say; particles keep all but their poses and images."""
    names = {p.name for p in Path("cpr_00").iterdir() if not p.name.startswith(".")}
    pictures = {f"{name}_{what}.png" for name in NAMES for what in ("residual", "motion", "geometry", "tracks")}
    assert names == {*MAPS, *pictures, "index.html", "run.json", "particles", "before"}
    head, files = records.load_particles("cpr_00")  # every file is checked as it is read
    assert (head.parent, head.set, sorted(files)) == ("spt_00", "ribo", list(NAMES))
    for name in NAMES:
        old, new = (read(f"{run}/particles/{name}.json") for run in ("spt_00", "cpr_00"))
        same = set(old) - {"tilts", "particles", "history", "parent"}
        assert {key: old[key] for key in same} == {key: new[key] for key in same}
        for p, q in zip(old["particles"], new["particles"], strict=True):
            assert all(p[key] == q[key] for key in KEPT) and set(q["subtilt"]["weight"]) == {1.0}
        alignment = info(name)["alignment"]
        for key in GEOMETRY:
            np.testing.assert_allclose(new["tilts"][key], alignment[key], atol=1e-9)
        lens = info(name)["ctf"]
        mean = np.add(lens["defocus_u"], lens["defocus_v"]) / 2
        geometry = np.stack([tilt_matrix(*a) for a in zip(*(alignment[k] for k in GEOMETRY[:3]), strict=True)])
        for q in new["particles"]:  # at the centre of their patches
            np.testing.assert_allclose(q["defocus"], mean - geometry[:, 2] @ q["centre"], atol=0.01)
    run = read("cpr_00/run.json")
    state, kept = run["state"], chosen("cpr_00")
    assert {"shift of tilts", "motion along the exposure", "angles of tilts", "defocus of tilts"} <= set(kept)
    assert all(t["gain"] > 2 * t["error"] for t in kept.values())
    assert {"astigmatism", "magnification of tilts"}.isdisjoint(kept)  # there is none of it to be found
    assert abs(state["hand"]["gain"]) < 1e4 and state["hand"]["gain"] < 0  # the hand is right
    assert not state["beam_tilt"]["kept"] and state["settled"] and state["replaced"] == dict.fromkeys(NAMES, 0)
    assert run["options"] == {
        "runs": ["spt_00"], "refine": ["geometry", "motion", "ctf"], "alone": False, "mask": None, "symmetry": None,
        "filter": "spherical", "no_record": False, "iterations": 1,
    }  # fmt: skip
    assert run["stopped_at"] is None and run["history"][-1]["state"] == "done"
    found = read("cpr_00/fsc.json")["resolution"]
    lines = Path("said").read_text().splitlines()
    assert lines[0].startswith("iteration 1: shift of tilts ") and lines[1] == f"cpr_00: {found:.2f} Å at FSC 0.143"
    for name, line in zip(NAMES, lines[2:], strict=True):
        shift = rms([np.array(state["iterations"][0]["series"][name]["change"]["shift"])])
        assert line.startswith(f"{name}: shift {shift:.3g} Å, turn ") and 0.4 * SHIFT < shift < 1.4 * SHIFT
    page = Path("cpr_00/index.html").read_text()
    assert "shift of tilts" in page and all(f"{name}_geometry.png" in page for name in NAMES)


def test_records(here: Path, refined: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The records have what was found, nearer to the truth, and what was there before; that comes back from `before/`."""
    wrong_angle, wrong_defocus = [], []
    for name in NAMES:
        old, new, truth = info(name, moved), info(name), read(f"raw/{name}_truth.json")
        assert [(r["program"], r["run"]) for r in new["replaced"]] == [("emc_tomocpr", "cpr_00")]
        assert all(given(new["replaced"][0][key]) == given(old[key]) for key in ("alignment", "ctf"))
        assert [entry["program"] for entry in new["history"]][-1] == "emc_tomocpr"
        for section in ("source", "tilts", "picks"):
            assert new[section] == old[section]
        for key in ("thickness", "magnification", "hand_open"):
            assert new["alignment"][key] == old["alignment"][key]
        wrong_defocus.append([
            np.add(r["ctf"]["defocus_u"], r["ctf"]["defocus_v"]) / 2 - truth["defocus"] for r in (old, new)
        ])  # fmt: skip
        wrong_angle.append([np.subtract(r["alignment"]["tilt"], truth["tilt"]) for r in (old, new)])
        wrong_angle[-1] = [error - error.mean() for error in wrong_angle[-1]]  # a turn of the specimen as a whole
        error = np.array(new["ctf"]["error"])
        assert (error > 100).all() and (error < DEFOCUS).all()
    first, last = (rms([w[k] for w in wrong_defocus]) for k in (0, 1))
    assert first > 0.7 * DEFOCUS and last < 0.75 * first
    first, last = (rms([w[k] for w in wrong_angle]) for k in (0, 1))
    assert 0.7 * ANGLE < first < 1.3 * ANGLE and last < 0.7 * first
    assert program("emc_tomocpr", "spt_00") == 2  # its particles have the old alignment
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "info/TS_01_info.json: has another" in err and "--no-record" in err
    assert not Path("cpr_01").exists()
    for name in NAMES:
        lines_of("emc_import", "--alignment", f"cpr_00/before/{name}.json", name, "--overwrite")
        assert all(given(info(name)[key]) == given(info(name, moved)[key]) for key in ("alignment", "ctf"))


def test_the_new_geometry(here: Path) -> None:
    """What is cut out and reconstructed with it: patches are centred on particles, but for where these were picked.

    What is left is the motion that a particle has alone, and errors of the fit. The deformation is that of the motion.
    """
    assert info("TS_01")["alignment"]["deformation"] is not None
    lines_of("emc_extract", "--all", "--label", "ribo", "--set", "again", "--box", BOX)
    old, new = (rms([i.off_centre for i in images(f"particles/{name}")]) for name in ("ribo", "again"))
    assert old > 2.5 and new < old / 3
    for name in NAMES:
        record = info(name)
        record["alignment"]["deformation"] = None
        write(f"info/{name}_info.json", record)
    lines_of("emc_extract", "--all", "--label", "ribo", "--set", "straight", "--box", BOX)
    assert rms([i.off_centre for i in images("particles/straight")]) > 1.1 * new


def test_tomograms_of_the_new_geometry(here: Path) -> None:
    """Particles are dark where the refined positions are, and the deformation plays its part.

    A map of 250 Å in voxels of 32 Å: the mean of the 27 middle ones against the spread of such means.
    """
    lines_of("emc_tomogram", "TS_01", "--load", "--bin", 4)
    record = info("TS_01")
    bent = mrcfile.read(record["tomograms"][-1]["file"]).astype(float)
    at = np.rint(np.array([p["xyz"] for p in read("cpr_00/particles/TS_01.json")["particles"]]) / (4 * PIXEL)).astype(
        int
    )
    places = at[:, ::-1] + np.array(bent.shape) // 2
    inside = [place for place in places if (place >= 1).all() and (place < np.array(bent.shape) - 1).all()]
    means = np.array([bent[tuple(slice(i - 1, i + 2) for i in place)].mean() for place in inside])
    assert len(inside) > 10 and means.mean() < bent.mean() - bent.std()
    record["alignment"]["deformation"] = None
    write("info/TS_01_info.json", record)
    lines_of("emc_tomogram", "TS_01", "--load", "--bin", 4, "--tag", "straight")
    straight = mrcfile.read(info("TS_01")["tomograms"][-1]["file"]).astype(float)
    assert 0.9 < np.corrcoef(bent.ravel(), straight.ravel())[0, 1] < 0.99999


def test_other_programs_go_on_from_it(here: Path) -> None:
    """Settling has moved no image: the average of the particles as written is the one of before. emc_refine keeps them."""
    lines_of("emc_average", "cpr_00", "--path", "avg")
    again, own = (mrcfile.read(f"{folder}/half1.mrc") for folder in ("avg", "cpr_00"))
    # Å are written to three digits and poses went through angles: 1e-3 of 16 Å is 4e-4 of a phase
    np.testing.assert_allclose(again, own, atol=1e-3 * abs(own).max())
    again, own = (mrcfile.read(f"{folder}/average.mrc") for folder in ("avg", "cpr_00"))
    assert np.corrcoef(again.ravel(), own.ravel())[0, 1] > 0.999
    more = ("--reference", "ref.mrc", "--startres", 30, "--local", "--iterations", 1, "--path", "spt_01")
    lines_of("emc_refine", "cpr_00", *more)
    assert off("spt_01")[0] < off("cpr_00")[0] + 0.1  # its only iteration knows data to 30 Å
    for name in NAMES:
        old, new = (read(f"{run}/particles/{name}.json")["particles"] for run in ("cpr_00", "spt_01"))
        assert [p["subtilt"] for p in old] == [p["subtilt"] for p in new]


def test_once_more(here: Path, undrawn: None) -> None:
    """From its own end there is little left: a quarter of the first time's move, and the geometry stays, as good as it was."""
    lines_of("emc_extract", "--all", "--label", "ribo", "--set", "first", "--box", BOX)
    lines_of("emc_tomocpr", "cpr_00", "--iterations", 1)
    lines_of("emc_extract", "--all", "--label", "ribo", "--set", "second", "--box", BOX)
    old, new = (rms([i.off_centre for i in images(f"particles/{name}")]) for name in ("first", "second"))
    assert new < old + 0.05
    first, second = (read(f"{run}/run.json")["state"]["iterations"][0] for run in ("cpr_00", "cpr_01"))
    assert second["moved"] < first["moved"] / 3
    for name in NAMES:
        changes = [np.array(i["series"][name]["change"]["shift"]) for i in (first, second)]
        assert rms([changes[1]]) < rms([changes[0]]) / 4
        replaced = info(name)["replaced"]
        assert [r["run"] for r in replaced] == ["cpr_00", "cpr_01"]
        assert np.abs(np.subtract(replaced[1]["alignment"]["tilt"], info(name)["alignment"]["tilt"])).max() < 0.1
    assert off("cpr_01")[0] < off("cpr_00")[0] + 0.1


def test_export(here: Path) -> None:
    """RELION's columns of one image by hand: turned by its own turn and the new geometry, shifted, at its own defocus."""
    i, j = 3, 6
    content = read("cpr_00/particles/TS_01.json")
    p, t = content["particles"][i], content["tilts"]
    own, turn = p["subtilt"], (1.0, -2.0, 3.0)
    for key, value in zip(("drot", "dtilt", "dpsi", "ddefocus"), (*turn, 120.0), strict=True):
        own[key][j] = value
    write("cpr_00/particles/TS_01.json", content)
    lines_of("emc_export", "cpr_00", "--format", "relion31")
    table = starfile.read("export/cpr_00/particles.star")["particles"]
    mine = (table["rlnTomoParticleName"] == p["id"]) & (table["rlnMicrographPreExposure"] == t["dose_before"][j])
    (row,) = table[mine].to_dict("records")
    angle, axis = math.radians(math.hypot(*turn)), np.array(turn) / math.hypot(*turn)
    k = np.cross(axis, np.eye(3)).T
    rotation = np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k  # Rodrigues' formula
    assert np.cross(axis, [1.0, 2.0, 0.5]) @ rotation @ [1.0, 2.0, 0.5] > 0  # it turns the way of the right hand
    tilt = tilt_matrix(t["axis"][j], t["tilt"][j], t["xtilt"][j])
    want = rotation @ tilt @ pose(p["rot"], p["tilt"], p["psi"])
    found = pose(row["rlnAngleRot"], row["rlnAngleTilt"], row["rlnAnglePsi"])
    np.testing.assert_allclose(found, want, atol=1e-7)
    q = tilt @ np.subtract(p["xyz"], p["centre"])
    moved = np.array([own["dx"][j], own["dy"][j]])
    seen = q[:2] + moved
    assert np.abs(moved).max() > 1
    np.testing.assert_allclose((row["rlnOriginXAngst"], row["rlnOriginYAngst"]), -seen, atol=2e-6)
    mean = p["defocus"][j] + 120.0 - q[2]
    np.testing.assert_allclose((row["rlnDefocusU"], row["rlnDefocusV"]), (mean + 150, mean - 150), atol=1e-3)


def test_dry_run_says_what_would_change(before: Path, refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, and the lines are those of the run itself."""
    there = listing()
    assert program("emc_tomocpr", "spt_00", "--dry-run") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("refine 2 tilt series from 30 particles (about ")
    assert lines == (refined / "said").read_text().splitlines()[2:]
    assert listing() == there


def test_alone_and_without_the_records(before: Path, undrawn: None) -> None:
    """Without neighbours it does nearly as well where these are far; the records have the same sections as before."""
    old = {name: info(name) for name in NAMES}
    lines_of("emc_tomocpr", *ONE, "--alone", "--no-record", "--path", "alone")
    for name in NAMES:
        assert {k: v for k, v in info(name).items() if k != "history"} == {
            k: v for k, v in old[name].items() if k != "history"
        }
    assert not Path("alone/before").exists() and read("alone/run.json")["options"]["no_record"] is True
    assert off("alone")[0] < 0.5 * off("spt_00")[0]
    assert read("alone/particles/TS_01.json")["tilts"]["shift_x"] != old["TS_01"]["alignment"]["shift_x"]


def test_ctf_alone(before: Path, undrawn: None) -> None:
    """Only the CTF of the records changes, and with it no image moves. Less memory changes sums in their last digits."""
    old = {name: info(name) for name in NAMES}
    lines_of("emc_tomocpr", *ONE, "--refine", "ctf", "--path", "small", "--memory", "8M", "--no-record")
    lines_of("emc_tomocpr", *ONE, "--refine", "ctf")
    for name in NAMES:
        one, other = (read(f"{run}/run.json")["state"]["iterations"][0]["series"][name] for run in ("small", "cpr_00"))
        np.testing.assert_allclose(one["change"]["defocus"], other["change"]["defocus"], atol=5)  # of up to 3000 Å
    tried = {t["level"] for t in read("cpr_00/run.json")["state"]["iterations"][0]["trials"]}
    assert tried == {level.name for level in emc_tomocpr.FITS["ctf"]}
    for name in NAMES:
        new = info(name)
        for key in GEOMETRY:
            np.testing.assert_allclose(new["alignment"][key], old[name]["alignment"][key], atol=1e-9)
        assert new["alignment"]["deformation"] is None and new["ctf"]["defocus_u"] != old[name]["ctf"]["defocus_u"]
    assert off("cpr_00")[0] == pytest.approx(off("spt_00")[0], abs=2e-3)  # written to three digits
    assert off("cpr_00")[1] < 0.9 * off("spt_00")[1]


def test_resume(
    before: Path, refined: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after the first of two tilt series and gone on with: the same bytes and records as without a stop."""
    original, calls = joint_refinements.fit_series, list[str]()

    def stops(members: Any, *more: Any) -> Any:
        calls.append(members[0].particles.file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(members, *more)

    monkeypatch.setattr(joint_refinements, "fit_series", stops)
    go_on = (*ONE, "--path", "cpr_00", "--resume", "--quiet")
    old = {name: info(name) for name in NAMES}
    assert program("emc_tomocpr", *ONE, "--quiet") == 130
    stopped = read("cpr_00/run.json")
    assert stopped["stopped_at"] == "iteration 1" and list(stopped["state"]["now"]["series"]) == [NAMES[0]]
    assert all(info(name)["alignment"] == old[name]["alignment"] for name in NAMES)
    capsys.readouterr()
    for more, what in ((("--refine", "ctf"), "refine"), (("--alone",), "alone")):
        assert program("emc_tomocpr", *go_on, *more) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"cpr_00/run.json: was begun with {what} = " in err and "same options" in err
    assert program("emc_tomocpr", *go_on) == 0
    assert calls == [NAMES[0], NAMES[1], NAMES[1]] and not Path("cpr_00/iterations").exists()
    as_without_a_stop(refined)
    assert program("emc_tomocpr", *go_on) == 0  # nothing is left to do
    as_without_a_stop(refined)


def as_without_a_stop(refined: Path) -> None:
    same_run("cpr_00", str(refined / "cpr_00"))
    for name in NAMES:
        found, want = info(name), info(name, refined)
        assert all(found[key] == want[key] for key in ("alignment", "ctf", "replaced"))
        assert read(f"cpr_00/before/{name}.json") == read(refined / f"cpr_00/before/{name}.json")


def test_stopped_between_two_records(here: Path, refined: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken back, and done again in a folder of the same name, but stopped when one record is written: each changes once."""
    for name in NAMES:
        lines_of("emc_import", "--alignment", f"cpr_00/before/{name}.json", name, "--overwrite")
    shutil.rmtree("cpr_00")
    original, calls = tiltseries_updates.refined, list[str]()

    def stops(record: Any, *more: Any) -> Any:
        calls.append(record.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(record, *more)

    monkeypatch.setattr(tiltseries_updates, "refined", stops)
    go_on = (*ONE, "--path", "cpr_00", "--resume", "--quiet")
    assert program("emc_tomocpr", *ONE, "--quiet") == 130
    assert [len(info(name)["replaced"]) for name in NAMES] == [2, 1]
    for _ in range(2):
        assert program("emc_tomocpr", *go_on) == 0
        assert calls == [NAMES[0], NAMES[1], NAMES[1]]
        for name in NAMES:
            found, want = info(name), info(name, refined)
            assert all(found[key] == want[key] for key in ("alignment", "ctf"))
            assert found["replaced"] == want["replaced"] * 2


def test_two_kinds(before: Path, undrawn: None) -> None:
    """Every second particle is of another kind, in a larger box: one geometry for both, and a folder for each."""
    for name in NAMES:
        record = info(name)
        picks = record["picks"].pop("ribo")
        for first, label in enumerate(("odd", "even")):
            own = {key: value[first::2] if isinstance(value, list) else value for key, value in picks.items()}
            record["picks"][label] = own
        write(f"info/{name}_info.json", record)
    for label, box in (("odd", BOX), ("even", BOX + 8)):
        lines_of("emc_extract", "--all", "--label", label, "--set", label, "--box", box)
        more = ("--reference", "ref.mrc", "--startres", 30, "--local", "--iterations", 1)
        lines_of("emc_refine", label, *more, "--path", f"runs/{label}")
    lines = lines_of("emc_tomocpr", "runs/odd", "runs/even", "--iterations", 1, "--path", "both")
    assert [line.split(":")[0] for line in lines] == ["iteration 1", "both/odd", "both/even", *NAMES]
    state = read("both/run.json")["state"]
    assert set(state["iterations"][0]["kinds"]) == {"runs/odd", "runs/even"}
    for label, box in (("odd", BOX), ("even", BOX + 8)):
        with mrcfile.open(f"both/{label}/average.mrc") as file:
            assert file.data.shape == (box,) * 3
        for name in NAMES:
            tilts = read(f"both/{label}/particles/{name}.json")["tilts"]
            for key in GEOMETRY:
                np.testing.assert_allclose(tilts[key], info(name)["alignment"][key], atol=1e-9)
    for name in NAMES:
        assert [r["run"] for r in info(name)["replaced"]] == ["both"] and Path(f"both/before/{name}.json").exists()
    assert not Path("both/particles").exists() and not Path("both/average.mrc").exists()


def test_nothing_to_correct(project: Path, undrawn: None) -> None:
    """A true record and a specimen at rest: no level is on, the geometry stays, and the average is the same.

    As in test_emc_subtilt, with seeds by which chance passes no level's threshold.
    """
    simulated(project, right=True)
    extracted_and_refined(project, "--no-motion", "--max-angle", 1e-3, "--max-shift", 1e-3, iterations=1)
    old = {name: info(name) for name in NAMES}
    lines = lines_of("emc_tomocpr", *ONE)
    assert lines[0].startswith("iteration 1: nothing to correct; images moved 0.00 Å (median), 0 left out; ")
    assert lines[2:] == [f"{name}: no change of the geometry (rms over tilts and axes)" for name in NAMES]
    for name in NAMES:
        new = info(name)
        for section, keys in (("alignment", GEOMETRY), ("ctf", ("defocus_u", "defocus_v"))):
            for key in keys:
                np.testing.assert_allclose(new[section][key], old[name][section][key], atol=1e-6)
        assert new["alignment"]["deformation"] is None
    lines_of("emc_average", "spt_00", "--path", "avg")
    one, other = (mrcfile.read(f"{run}/half1.mrc") for run in ("avg", "cpr_00"))
    np.testing.assert_allclose(one, other, atol=1e-5 * abs(one).max())
