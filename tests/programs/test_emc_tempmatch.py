"""emc_tempmatch on a tilt series drawn by hand: picks, pictures, what may be searched and what may be resumed."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from matplotlib.image import imread

import emc_import
import emc_tempmatch
from libemc.matches import results
from libemc.methods.match import candidates, find
from libemc.methods.match.find import Search
from libemc.numerics.rotations import matrix_from_euler, rotation_distance
from tests.by_hand import HandSeries, blobs_map, mrc_bytes, rx

PIXEL = 4.0  # Å: of the images, and of the search
TILTS = (-52.0, -36.0, -20.0, -4.0, 12.0, 28.0, 44.0)
NAME, INFO = "TS_hand", "info/TS_hand_info.json"
FOLDER = Path("tomograms/TS_hand_match")
COMMON = ("--resolution", "10", "--step", "24", "--distance", "36", "--thickness", "104", "--threads", "1", "--quiet")
SERIES = HandSeries(shape=(88, 92), pixel=PIXEL, tilts=TILTS, noise=0.6, particles=9, magnify=0.0, unused=(2,), seed=3)
NEAR = "-90,-15,-90,-15,-60,60"  # Å: the region about one particle of the nine


SMALL = (f"--region={NEAR}", "--step", "36")


def ran(*argv: object) -> int:
    return emc_tempmatch.program.main([*COMMON, *map(str, argv)])


def searched(*argv: object) -> int:
    return ran(NAME, "--template", "blobs=blobs.mrc", *argv)


def picks(label: str = "blobs") -> dict:
    return json.loads(Path(INFO).read_text())["picks"][label]


def files() -> set[str]:
    """What there is but for locks and logs."""
    return {str(p) for p in Path().rglob("*") if p.is_file() and ".emc" not in p.parts and p.suffix != ".lock"}


def turns(found: dict) -> torch.Tensor:
    return matrix_from_euler(*(torch.tensor(found[k]).double() for k in ("rot", "tilt", "psi")))


def write(folder: Path) -> None:
    SERIES.write(folder)
    record = json.loads((folder / INFO).read_text())
    del record["picks"]
    (folder / INFO).write_text(json.dumps(record))
    for name, volume in (("blobs", blobs_map(36)), ("other", other(36)), ("mask", ball(36, 14))):
        (folder / f"{name}.mrc").write_bytes(mrc_bytes(volume, 2.0, stack=False))


def other(n: int) -> np.ndarray:
    """A rod of the particle's size."""
    x = np.arange(n) - n // 2
    return np.exp(-(x[:, None, None] ** 2 / 100 + x[:, None] ** 2 / 8 + x**2 / 8)) + np.exp(
        -((x[:, None, None] - 8) ** 2 / 8 + x[:, None] ** 2 / 8 + (x - 6) ** 2 / 8)
    )


def ball(n: int, radius: float) -> np.ndarray:
    x = np.arange(n) - n // 2
    return (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 < radius**2).astype(float)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project that has been searched with --volumes, and what was said."""
    folder, out = tmp_path_factory.mktemp("searched"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.chdir(folder)
        write(folder)
        assert searched("--volumes") == 0, out.getvalue()
    return folder, out.getvalue()


@pytest.fixture
def done(once: tuple[Path, str], project: Path) -> str:
    """A copy of it; what was said."""
    shutil.copytree(once[0], project, dirs_exist_ok=True)
    return once[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few decoys of a shape, and pictures with nothing in them: what the whole search has shown already."""
    monkeypatch.setattr(candidates, "DECOYS", 4)
    monkeypatch.setattr(results.view, "picks_picture", lambda file, *_: file.touch())
    monkeypatch.setattr(results.view, "score_plot", lambda file, *_: file.touch())


@pytest.fixture
def fresh(project: Path, quick: None) -> Path:
    write(project)
    return project


def right(found: dict, wanted: np.ndarray = SERIES.positions) -> tuple[torch.Tensor, torch.Tensor]:
    """For each particle how far the nearest pick is, Å, and its number."""
    distance = torch.cdist(torch.from_numpy(wanted), torch.tensor(found["xyz"]).double().reshape(-1, 3))
    return distance.min(dim=1)


def test_all_particles_are_found(done: str) -> None:
    """To a voxel, and as they are turned; a false one is what was expected at the most."""
    found = picks()
    distance, number = right(found)
    near = distance < 8
    assert int(near.sum()) >= 8 and len(found["xyz"]) <= 10
    assert float(distance[near].median()) < 2
    true = matrix_from_euler(*torch.from_numpy(SERIES.angles.T))
    assert float(rotation_distance(turns(found)[number], true)[near].median()) < 5
    assert set(number[near].tolist()) <= set(range(len(found["xyz"])))


def test_what_the_record_says(done: str) -> None:
    found = picks()
    count = len(found["xyz"])
    assert found["source"] == "emc_tempmatch" and found.get("margin") is None
    assert all(len(found[k]) == count for k in ("rot", "tilt", "psi", "score", "z"))
    assert found["z"] == sorted(found["z"], reverse=True)
    parameters = found["parameters"]
    assert min(found["z"]) > parameters["threshold"] and parameters["expected_false"] == 1.0
    assert (parameters["template"], parameters["symmetry"]) == ("blobs.mrc", "c1")
    assert (parameters["resolution"], parameters["voxel_size"], parameters["step"]) == (10, PIXEL, 24)
    assert parameters["distance"] == pytest.approx(36) and parameters["candidates"] >= count
    history = json.loads(Path(INFO).read_text())["history"][-1]
    assert history["program"] == "emc_tempmatch" and "--template" in history["argv"]
    assert done.count("\n") == 1 and done.startswith(f"{NAME}: {count} picks of blobs with z above ")


def test_pictures_are_there(done: str) -> None:
    for name in ("blobs_picks.png", "scores.png"):
        picture = imread(FOLDER / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.02
    assert not list(FOLDER.glob("*.parts"))  # nothing that only a resumed run needs


def test_volumes_agree_with_the_picks(done: str) -> None:
    """The score's maximum is at a particle, and the number there is that of a rotation near the pick's."""
    with mrcfile.open(FOLDER / "blobs_score.mrc") as file:
        score, voxel = file.data.copy(), float(file.voxel_size.x)
    with mrcfile.open(FOLDER / "blobs_rotation.mrc") as file:
        number = file.data.copy()
    angles = torch.tensor(json.loads((FOLDER / "blobs_rotations.json").read_text())["angles"]).double()
    assert voxel == PIXEL and score.shape == number.shape == (26, 92, 88)  # the axis lies nearer to x: sides exchanged
    assert len(angles) == picks()["parameters"]["rotations"] and number.max() < len(angles)
    found = picks()
    rotations, errors = turns(found), []
    for i, xyz in enumerate(found["xyz"]):
        x, y, z = (round(v / PIXEL) + n // 2 for v, n in zip(xyz, reversed(score.shape), strict=True))
        box = tuple(slice(max(0, c - 1), c + 2) for c in (z, y, x))
        top = np.unravel_index(score[box].argmax(), score[box].shape)
        assert score[box].max() > 0.95 * score[tuple(slice(max(0, c - 3), c + 4) for c in (z, y, x))].max()
        own = matrix_from_euler(*angles[int(number[box][top])])
        errors.append(float(rotation_distance(rotations[i], own)))
    assert np.median(errors) < 24


# ------------------------------------------------------------------------------------------------- small searches


def test_again_and_over_others_picks(done: str, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own picks are replaced without being asked; those of others need --overwrite, and other labels stay."""
    record = json.loads(Path(INFO).read_text())
    record["picks"]["mine"] = {"xyz": [[1.0, 2.0, 3.0]]}
    Path(INFO).write_text(json.dumps(record))
    assert searched(*SMALL) == 0
    first = picks()
    assert len(first["xyz"]) < 9 and picks("mine")["xyz"] == [[1.0, 2.0, 3.0]]
    assert ran(NAME, "--template", "mine=blobs.mrc", *SMALL) == 2
    assert "'mine'" in capsys.readouterr().err and picks("mine")["xyz"] == [[1.0, 2.0, 3.0]]
    assert ran(NAME, "--template", "mine=blobs.mrc", *SMALL, "--overwrite") == 0
    assert picks("mine")["xyz"] == first["xyz"] and picks("mine")["source"] == "emc_tempmatch"


def test_region(fresh: Path) -> None:
    """The particle in it, and none beyond, though they are within the margin that is searched."""
    assert searched(*SMALL) == 0
    xyz = np.array(picks()["xyz"])
    inside = [p for p in SERIES.positions if (p[:2] > -90).all() and (p[:2] < -15).all()]
    assert len(inside) == 1
    assert float(right(picks(), np.array(inside))[0][0]) < 4
    # refinement may carry a pick over the region's border, by half the resolution at the most
    assert (xyz[:, :2] > -95).all() and (xyz[:, :2] < -10).all()


def test_tomogram_mask(fresh: Path) -> None:
    """Only where it is above 0.5: the half of the specimen with x < 0, in voxels of another size."""
    x = (np.arange(60) - 30) * 6.0
    mask = np.broadcast_to((x < -20) * 1.0, (20, 60, 60))
    Path("half.mrc").write_bytes(mrc_bytes(mask, 6.0, stack=False))
    region = "-90,90,-90,-15,-60,60"  # three particles
    assert searched(*SMALL, f"--region={region}", "--tomogram-mask", "half.mrc") == 0
    xyz = np.array(picks()["xyz"])
    assert len(xyz) == 1 and xyz[0, 0] < -20


def test_no_picks_on_gold(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A landmark that is a bead takes the pick there; one that is none doesn't."""
    record = json.loads(Path(INFO).read_text())
    i = int(np.flatnonzero((SERIES.positions[:, :2] < -15).all(axis=1))[0])
    marks = {"xyz": [SERIES.positions[i].tolist()], "kind": ["bead"], "diameter": [30.0], "residual": [1.0]}
    for kind, count in (("bead", 0), ("feature", 1)):
        record["alignment"]["landmarks"] = marks | {"kind": [kind]}
        Path(INFO).write_text(json.dumps(record))
        code = searched(*SMALL)
        near = right(picks(), SERIES.positions[i : i + 1])[0] < 10 if picks()["xyz"] else torch.zeros(1)
        assert int(near.sum()) == count, capsys.readouterr().err
        assert code == (0 if picks()["xyz"] else 2)


def test_dry_run_writes_nothing(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    text = Path(INFO).read_text()
    assert searched("--dry-run") == 0
    assert files() == before and Path(INFO).read_text() == text
    assert not FOLDER.exists()


def test_seed_and_threads(fresh: Path) -> None:
    """The same seed gives the same picks, in one thread or two; another has other decoys, and so another background."""
    before = torch.get_num_threads()
    try:
        found = []
        for more in ((), ("--threads", "2"), ("--seed", "5")):
            searched(*SMALL, "--step", "60", *more)
            found.append(picks())
    finally:
        torch.set_num_threads(before)
    one, two, seed = found
    np.testing.assert_allclose(one["xyz"], two["xyz"], atol=1e-3)
    np.testing.assert_allclose(one["z"], two["z"], rtol=1e-4)
    assert one["parameters"]["background"] != seed["parameters"]["background"]
    assert len(one["xyz"]) == 1


def test_without_a_ctf_there_is_a_warning(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path(INFO).read_text())
    del record["ctf"]
    Path(INFO).write_text(json.dumps(record))
    searched(*SMALL)
    err = capsys.readouterr().err
    assert "has no CTF" in err and "emc_tomoctf" in err


def test_a_template_that_cannot_be_told_is_said_to_be(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rod as coarse as that is like any map of its spectrum: particles of its size are found, with a warning."""
    write(project)
    assert ran(NAME, "--template", "other.mrc", "--step", "36") == 0
    assert "can't be told from anything of its size" in capsys.readouterr().err
    assert not picks("other")["parameters"]["shape"]["telling"]


def test_nothing_is_found_where_nothing_is(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In noise: what is expected by chance at the most, and if nothing, that is said."""
    with mrcfile.open(json.loads(Path(INFO).read_text())["source"]["stack"], "r+") as file:
        shape, kind = file.data.shape, file.data.dtype
        file.set_data(np.random.default_rng(0).normal(100, 10, shape).astype(kind))
    code = searched("--step", "36", "--expected-false", "0.1")
    assert len(picks()["xyz"]) == 0 and code == 2
    assert "no pick reaches the threshold" in capsys.readouterr().err


def test_several_templates_compete(fresh: Path) -> None:
    """Each with its label; where both are candidates the margin says by how much the template's own is better."""
    Path("mirror.mrc").write_bytes(mrc_bytes(blobs_map(36) @ np.eye(36)[::-1], 2.0, stack=False))
    assert ran(NAME, "--template", "blobs=blobs.mrc", "mirror=mirror.mrc", *SMALL, "--step", "24") == 0
    own, mirrored = picks("blobs"), picks("mirror")
    inside = SERIES.positions[(SERIES.positions[:, :2] < -15).all(axis=1)]
    distance, number = right(own, inside)
    assert float(distance[0]) < 4
    margin = own["margin"][int(number[0])]
    assert margin is None or margin > 0
    assert not mirrored["xyz"] or float(right(mirrored, inside)[0][0]) > 20
    assert {p.name for p in FOLDER.glob("*.png")} == {"blobs_picks.png", "mirror_picks.png", "scores.png"}


def test_symmetry_gives_fewer_rotations(fresh: Path) -> None:
    numbers = []
    for group in ("c1", "c4"):
        searched(*SMALL, "--symmetry", group)
        numbers.append(picks()["parameters"]["rotations"])
    assert numbers[1] == pytest.approx(numbers[0] / 4, rel=0.1)


# ------------------------------------------------------------------------------------------------------- resuming


def killed(done: list[int], monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """A run that ends after two parts."""
    part = Search.part

    def failing(self, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return part(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "part", failing)
        assert searched(*SMALL, "--step", "60", *more) == 130
    done.clear()


def counted(done: list[int], monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    part = Search.part

    def counting(self, *args):
        done.append(1)
        return part(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "part", counting)
        searched(*SMALL, "--step", "60", *more)
    number = len(done)
    done.clear()
    return number


def test_resume(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run that was killed its parts aren't searched again, and the picks are those of a whole run."""
    monkeypatch.setattr(find, "LARGEST_PART", 3e4)
    done: list[int] = []
    whole = counted(done, monkeypatch)
    assert whole >= 4
    first = picks()
    shutil.rmtree("tomograms")
    killed(done, monkeypatch)
    assert len(list((FOLDER / "blobs.parts").glob("*.npz"))) == 2
    assert counted(done, monkeypatch, "--resume") == whole - 2
    assert picks()["xyz"] == first["xyz"] and picks()["z"] == first["z"]
    assert not list(FOLDER.glob("*.parts"))
    killed(done, monkeypatch)
    assert counted(done, monkeypatch) == whole  # without --resume all is done again


@pytest.mark.parametrize("more", [("--no-dose",), ("--seed", "3")])
def test_another_search_is_not_resumed(more: tuple[str, ...], fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for differently is searched from the start."""
    monkeypatch.setattr(find, "LARGEST_PART", 3e4)
    done: list[int] = []
    cut = []
    parts = find.parts
    monkeypatch.setattr(find, "parts", lambda *args: cut.append(parts(*args)) or cut[-1])
    killed(done, monkeypatch)
    assert counted(done, monkeypatch, "--resume", *more) == len(cut[-1]) > 2


# ------------------------------------------------------------------------------------------------- finished tomograms


def tomogram(contrast: int) -> list[np.ndarray]:
    """A tomogram of three particles in noise, written; where they are, Å from its centre."""
    shape, places = (28, 44, 48), [(-48.0, -40.0, 0.0), (40.0, -8.0, 8.0), (-20.0, 36.0, -8.0)]
    volume = np.random.default_rng(0).normal(0, 0.12, shape)
    for i, place in enumerate(places):
        low = [int(v / PIXEL) + n // 2 - 8 for v, n in zip(reversed(place), shape, strict=True)]
        part = tuple(slice(a, a + 16) for a in low)
        volume[part] += blobs_map(16, PIXEL, rx(40.0 * i) @ np.eye(3))
    Path("tomogram.mrc").write_bytes(mrc_bytes(contrast * volume, PIXEL, stack=False))
    return [np.array(p) for p in places]


@pytest.mark.parametrize(("word", "contrast"), [("bright", 1), ("dark", -1)])
def test_a_finished_tomogram(word: str, contrast: int, fresh: Path) -> None:
    """All found, as JSON that emc_import reads into a record."""
    places = tomogram(contrast)
    words = ["--volume", "tomogram.mrc", "--template", "blobs=blobs.mrc", "--output", "out/picks.json"]
    rest = ["--resolution", "10", "--step", "24", "--distance", "36", "--threads", "1", "--quiet", "--contrast", word]
    before = Path(INFO).read_text()
    assert emc_tempmatch.program.main([*words, *rest]) == 0
    assert Path(INFO).read_text() == before
    found = json.loads(Path("out/picks.json").read_text())["picks"]["blobs"]
    distance, number = right(found, np.array(places))
    assert float(distance.max()) < 4 and len(found["xyz"]) <= 4
    true = torch.stack([torch.from_numpy(rx(40.0 * i)) for i in range(3)])
    assert float(rotation_distance(turns(found)[number], true).median()) < 8
    assert (Path("out/picks_match/scores.png")).is_file() and (Path("out/picks_match/blobs_picks.png")).is_file()
    if word == "dark":
        argv = ["--picks", "out/picks.json", "--label", "blobs", NAME, "--quiet"]
        assert emc_import.program.main(argv) == 0
        np.testing.assert_allclose(picks()["xyz"], found["xyz"], atol=1e-3)
        np.testing.assert_allclose(picks()["rot"], found["rot"], atol=1e-3)


def test_a_wedge_is_taken_for_what_it_is(fresh: Path) -> None:
    """Of a tomogram without what lies beyond ±50 degrees: found with --wedge, higher than without it."""
    places = tomogram(-1)
    with mrcfile.open("tomogram.mrc", "r+") as file:
        kz, _, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in file.data.shape), indexing="ij")
        seen = np.abs(kz) <= np.tan(np.radians(50)) * np.abs(kx)
        file.set_data(np.fft.ifftn(np.fft.fftn(file.data) * seen).real.astype(np.float32))
    for number, more in enumerate(((), ("--wedge=-50,50",))):
        words = ["--volume", "tomogram.mrc", "--template", "blobs=blobs.mrc", "--output", f"{number}.json", *more]
        rest = ["--resolution", "10", "--step", "36", "--distance", "36", "--threads", "1", "--quiet"]
        assert emc_tempmatch.program.main([*words, *rest]) == 0
    found = json.loads(Path("1.json").read_text())["picks"]["blobs"]
    # one false pick is expected; more than three of them are in 2 of 100
    assert float(right(found, np.array(places))[0].max()) < 6 and len(found["xyz"]) <= 3 + 3
