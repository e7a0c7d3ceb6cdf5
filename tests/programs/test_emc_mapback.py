"""emc_mapback: where things are, by the closed form, by the simulator's own images, and as every one of its files says it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
import torch

import emc_extract
import emc_import
import emc_info
import emc_mapback
import emc_simulate
import emc_tomogram
from libemc import records
from libemc.io import mrc
from libemc.methods.subtilts import TiltGeometry
from tests.by_hand import CENTRES, HEIGHTS, PIXEL, WIDTHS, HandSeries, blobs_map, line, mrc_bytes, pose
from tests.programs.sets import extracted_by_hand

SERIES = HandSeries(noise=0.3, particles=6)
NAME = SERIES.name
VOXEL = 4.0


def ran(*argv: object) -> int:
    return emc_mapback.program.main([str(word) for word in argv])


def table(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def change(how: Callable[[int, dict[str, Any]], None], folder: Path = Path()) -> None:
    path = folder / "particles/ribo" / f"{NAME}.json"
    data = json.loads(path.read_text())
    for i, particle in enumerate(data["particles"]):
        how(i, particle)
    path.write_text(json.dumps(data))


def listing() -> dict[str, int]:
    files = (p for p in Path().rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts))
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set `ribo`: six particles, classes 1 and 2 in turn, scores 0.0 to 0.5; its true map; no stack is left."""
    folder = extracted_by_hand(tmp_path_factory.mktemp("mapback"), SERIES)
    change(lambda i, p: p.update({"score": i / 10, "class": 1 + i % 2}), folder)
    (folder / "ref.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    (folder / "other.mrc").write_bytes(mrc_bytes(blobs_map(45, 1.5), 1.5, stack=False))
    for stack in (folder / "particles/ribo").glob("*.mrcs"):
        stack.unlink()
    return folder


@pytest.fixture
def here(extracted: Path, project: Path) -> Path:
    shutil.copytree(extracted, project, dirs_exist_ok=True)
    return project


def particles() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(f"particles/ribo/{NAME}.json")["particles"]
    return found


def by_hand(chosen: list[dict[str, Any]], shape: tuple[int, int, int], voxel: float) -> np.ndarray:
    """The blobs of some particles in a volume about the tomogram's centre."""
    z, y, x = (line(n, voxel) for n in shape)
    out = np.zeros(shape)
    for p in chosen:
        blobs = CENTRES @ pose(p["rot"], p["tilt"], p["psi"]).T + np.array(p["xyz"])
        for centre, width, height in zip(blobs, WIDTHS, HEIGHTS, strict=True):
            gx, gy, gz = (np.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in zip((x, y, z), centre, strict=True))
            out += height * gz[:, None, None] * gy[:, None] * gx
    return out


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_one_map_without_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The volume is the sum of the blobs where convention 8 puts them; each file says the same, in the volume's frame.

    Voxels of 2 Å hold all of the blobs, so it is the closed form to a percent: the map of float32 and its spline.
    """
    assert ran("ribo", "--average", "ref.mrc", "--pixel-size", PIXEL, "--quiet") == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        rf"{NAME}: 3 of class 1, 3 of class 2 placed, nearest neighbour at \d+ Å \(median; \d+ Å by chance\)\n", out
    )
    with mrcfile.open(f"mapback/{NAME}.mrc") as file:
        volume, voxel = np.array(file.data), float(file.voxel_size.x)
    assert voxel == PIXEL
    wanted = by_hand(particles(), volume.shape, voxel)
    assert np.abs(volume - wanted).max() < 0.01 * wanted.max()

    star = starfile.read(f"mapback/{NAME}.star")
    centre = np.array(volume.shape[::-1]) // 2
    pixels = star[[f"rlnCoordinate{a}" for a in "XYZ"]].to_numpy()
    centred = star[[f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"]].to_numpy()
    xyz = np.array([p["xyz"] for p in particles()])
    np.testing.assert_allclose((pixels - centre) * voxel, xyz, atol=1e-5)
    np.testing.assert_allclose(centred, xyz, atol=1e-5)
    turned = star[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    for row, p in zip(turned, particles(), strict=True):
        np.testing.assert_allclose(pose(*row), pose(p["rot"], p["tilt"], p["psi"]), atol=1e-6)
    assert list(star["rlnClassNumber"]) == [1, 2, 1, 2, 1, 2] and list(star["rlnTomoName"]) == [NAME] * 6
    np.testing.assert_allclose(star["rlnAutopickFigureOfMerit"], [p["score"] for p in particles()])
    assert emc_import.program.main(["--picks", f"mapback/{NAME}.star", "--label", "again", NAME, "--quiet"]) == 0
    np.testing.assert_allclose(records.load_tiltseries(NAME).picks["again"].xyz, xyz, atol=1e-5)

    marks = re.findall(r'x="(\S+)" y="(\S+)" z="(\S+)"', Path(f"mapback/{NAME}.cmm").read_text())
    np.testing.assert_allclose(np.array(marks, float), pixels * voxel, atol=1e-3)
    script = Path(f"mapback/{NAME}.cxc").read_text()
    assert f'open "{NAME}.mrc"\nvolume #1 origin 0,0,0 step 1 style surface level ' in script
    assert "color zone #1 near #2 " in script and f"originScaleFactor {PIXEL:g}" in script
    level = float(re.search(r"surface level (\S+)", script)[1])  # type: ignore[index]
    assert 0 < level < wanted.max() / 2

    found = table(f"mapback/{NAME}_neighbours.json")
    for row, p in zip(found["particles"], particles(), strict=True):
        apart = xyz - np.array(p["xyz"])
        distance = np.sqrt((apart**2).sum(1))
        distance[distance == 0] = np.inf
        nearest = int(distance.argmin())
        assert row["id"] == p["id"] and row["neighbour"] == particles()[nearest]["id"] and row["class"] == p["class"]
        assert row["distance"] == pytest.approx(distance[nearest], abs=1e-3)
        seen = pose(p["rot"], p["tilt"], p["psi"]).T @ apart[nearest] / distance[nearest]
        np.testing.assert_allclose(row["direction"], seen, atol=1e-3)
    assert found["summary"]["distance_median"] == pytest.approx(
        np.median([r["distance"] for r in found["particles"]]), abs=2e-3
    )
    low, high = found["summary"]["random"]["distance_interval"]
    assert low < found["summary"]["random"]["distance_median"] < high
    for picture in (f"{NAME}.png", f"{NAME}_neighbours.png"):
        assert Path("mapback", picture).stat().st_size > 10000
    assert table("mapback/run.json")["state"]["series"][NAME]["particles"] == {"1": 3, "2": 3}


def test_classes_meshes_and_a_second_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A map and a volume for each class; what was left out is not placed; the scene's nodes lie where the particles do."""

    def left_out(i: int, p: dict[str, Any]) -> None:
        p.update({"use": i != 0, **({"weight": 0.0} if i == 3 else {})})

    change(left_out)
    argv = ("ribo", NAME, "--average", "ref.mrc", "--average", "other.mrc", "--pixel-size", VOXEL, "--mesh", "--quiet")
    assert ran(*argv) == 0
    assert f"{NAME}: 2 of class 1, 2 of class 2 placed" in capsys.readouterr().out
    for number, mine in ((1, (2, 4)), (2, (1, 5))):
        volume = mrcfile.read(f"mapback/{NAME}_class{number}.mrc")
        assert alike(volume, by_hand([particles()[i] for i in mine], volume.shape, VOXEL)) > 0.99
    data = Path(f"mapback/{NAME}.glb").read_bytes()
    (size,) = struct.unpack_from("<I", data, 12)
    scene = json.loads(data[20 : 20 + size])
    chosen = [particles()[i] for i in (1, 2, 4, 5)]
    assert [node["name"] for node in scene["nodes"]] == [p["id"] for p in chosen]
    corner = np.array(volume.shape[::-1]) // 2 * VOXEL
    for node, p in zip(scene["nodes"], chosen, strict=True):
        matrix = np.array(node["matrix"]).reshape(4, 4).T
        np.testing.assert_allclose(matrix[:3, :3], pose(p["rot"], p["tilt"], p["psi"]), atol=1e-9)
        np.testing.assert_allclose(matrix[:3, 3], corner + p["xyz"], atol=1e-6)
    assert [node["mesh"] for node in scene["nodes"]] == [0, 1, 1, 0] and len(scene["materials"]) == 2
    script = Path(f"mapback/{NAME}.cxc").read_text()
    assert f'open "{NAME}.glb"' in script and "hide #2 models" in script
    before = Path(f"mapback/{NAME}_class1.mrc").read_bytes()
    assert ran(*argv) == 0  # it knows its own files, and makes the same
    assert Path(f"mapback/{NAME}_class1.mrc").read_bytes() == before
    assert ran("ribo", "--class", 2, "--average", "ref.mrc", "--colour", "series", "--path", "two", "--quiet") == 0
    assert f"{NAME}: 2 particles placed" in capsys.readouterr().out
    assert len(starfile.read(f"two/{NAME}.star")) == 2
    assert emc_info.program.main(["--replay", f"mapback/{NAME}.glb"]) == 0
    assert "emc_mapback ribo" in capsys.readouterr().out


def test_the_maps_of_a_run(here: Path) -> None:
    """A run's class_K.mrc, where there is one of each class, else its average.mrc."""
    shutil.copytree("particles/ribo", "spt_00/particles")
    head = table("spt_00/particles/particles.json")
    head["files"] = {NAME: f"spt_00/particles/{NAME}.json"}
    Path("spt_00/particles/particles.json").write_text(json.dumps(head))
    shutil.copy("ref.mrc", "spt_00/average.mrc")
    shutil.copy("ref.mrc", "spt_00/class_1.mrc")
    assert ran("spt_00", "--pixel-size", 8, "--quiet", "--path", "one") == 0
    assert (
        Path(f"one/{NAME}.mrc").exists() and table("one/run.json")["options"]["average"] == ["spt_00/average.mrc"] * 2
    )
    shutil.copy("other.mrc", "spt_00/class_2.mrc")
    assert ran("spt_00", "--pixel-size", 8, "--quiet", "--path", "two") == 0
    assert sorted(p.name for p in Path("two").glob("*.mrc")) == [f"{NAME}_class1.mrc", f"{NAME}_class2.mrc"]


def test_a_part_that_is_turned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the voxels of a tomogram elsewhere and turned: what is at R·v + centre in the specimen; others are left out and told."""
    tomogram = {
        "file": "part.mrc",
        "pixel_size": VOXEL,
        "shape": [40, 50, 60],
        "centre": [10.0, -6.0, 4.0],
        "angles": [30.0, 50.0, -20.0],
    }
    mrc.write_volume("part.mrc", np.random.default_rng(0).normal(size=(40, 50, 60)).astype(np.float32), VOXEL)
    path = records.tiltseries_path(NAME)
    path.write_text(json.dumps(table(str(path)) | {"tomograms": [tomogram]}))
    assert ran("ribo", "--average", "ref.mrc") == 0
    err = capsys.readouterr().err
    volume, turn = mrcfile.read(f"mapback/{NAME}.mrc"), pose(*tomogram["angles"])
    assert volume.shape == (40, 50, 60)
    own = [(np.array(p["xyz"]) - tomogram["centre"]) @ turn / VOXEL + (30, 25, 20) for p in particles()]
    inside = [i for i, v in enumerate(own) if ((v >= -0.5) & (v < np.array([60, 50, 40]) - 0.5)).all()]
    if len(inside) < 6:
        assert f"{6 - len(inside)} particles lie outside the volume" in err
    star = starfile.read(f"mapback/{NAME}.star")
    np.testing.assert_allclose(star[[f"rlnCoordinate{a}" for a in "XYZ"]], np.array(own)[inside], atol=1e-5)
    assert "rlnCenteredCoordinateXAngst" not in star.columns  # not those of the tomogram's centre
    first = particles()[inside[0]]
    turned = star[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()[0]
    np.testing.assert_allclose(pose(*turned), turn.T @ pose(first["rot"], first["tilt"], first["psi"]), atol=1e-6)
    script = Path(f"mapback/{NAME}.cxc").read_text()
    assert 'open "../part.mrc"\nvolume #1 origin 0,0,0 step 1 style image' in script
    assert emc_import.program.main(["--picks", f"mapback/{NAME}.star", "--label", "again", NAME, "--quiet"]) == 0
    xyz = np.array([particles()[i]["xyz"] for i in inside])
    np.testing.assert_allclose(records.load_tiltseries(NAME).picks["again"].xyz, xyz, atol=1e-4)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noise-free tilt series of 8 built-in particles at their true poses, and its tomogram."""
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "raw").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        simulate = [
            "raw/TS_01",
            "--size",
            "128",
            "128",
            "--pixel-size",
            "12",
            "--box",
            "32",
            "--count",
            "8",
            "--noise-free",
        ]
        simulate += ["--ice", "0", "--thickness", "700", "--motion", "0", "--tilt-range", "-60", "60", "6", "--quiet"]
        assert emc_simulate.program.main([*simulate, "--map-out", "raw/true.mrc", "--dtype", "float32"]) == 0
        truth = "raw/TS_01_truth.json"
        for argv in (
            ["raw/TS_01.mrc"],
            ["--alignment", truth, "TS_01"],
            ["--picks", truth, "--label", "true", "TS_01"],
        ):
            assert emc_import.program.main([*argv, "--quiet"]) == 0
        extract = ["TS_01", "--label", "true", "--set", "ribo", "--box", "32", "--no-stack", "--quiet"]
        assert emc_extract.program.main(extract) == 0
        assert emc_tomogram.program.main(["TS_01", "--load", "--bin", "1", "--thickness", "900", "--quiet"]) == 0
    return folder


def test_against_the_simulators_images(simulated: Path, project: Path) -> None:
    """The volume's projections show what the simulated images do, in every tilt; those of its mirror image much less.

    The images are the simulator's, of atoms; the projections are sums of the volume's voxels where `project` sees them. A
    CTF of 3 µm is in the images, so contrast (dark) and low frequencies alone agree.
    """
    shutil.copytree(simulated, project, dirs_exist_ok=True)
    assert ran("ribo", "--average", "raw/true.mrc", "--quiet") == 0
    record = records.load_tiltseries("TS_01")
    with mrcfile.open("mapback/TS_01.mrc") as file:
        volume = torch.from_numpy(np.array(file.data))
    assert tuple(volume.shape) == record.tomograms[0].shape
    images = mrcfile.read(record.source.stack).astype(np.float64)
    alignment = records.need(record, "alignment")
    geometry = TiltGeometry.of(alignment, record.tilts.use)

    def projected(v: torch.Tensor, tilt: int) -> np.ndarray:
        z, y, x = torch.nonzero(v.abs() > 1e-3 * v.max(), as_tuple=True)
        points = (torch.stack([x, y, z], 1) - torch.tensor(v.shape[::-1]) // 2).double() * 12.0
        at = (geometry.project(points)[0][:, tilt] / 12.0 + 64).numpy()
        edges = [np.arange(129) - 0.5] * 2
        return np.histogram2d(at[:, 1], at[:, 0], bins=edges, weights=v[z, y, x].numpy())[0]

    for tilt in (2, 5, 17):  # at 0 degrees a mirror image along z looks the same
        right, mirrored = (alike(projected(v, tilt), -images[tilt]) for v in (volume, volume.flip(0)))
        assert right > 0.6 and right > mirrored + 0.2, (tilt, right, mirrored)
    tomogram = mrcfile.read(record.tomograms[0].file)
    right, *mirrored = (alike(v.numpy(), -tomogram) for v in (volume, volume.flip(0), volume.flip(1), volume.flip(2)))
    assert right > 0.3 and right > 3 * max(mirrored), (right, mirrored)


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing()
    assert ran("ribo", "--average", "ref.mrc", "--dry-run") == 0
    assert re.match(
        r"place 6 particles in 1 tilt series \(about .* of memory, .* of disk\)\n$", capsys.readouterr().out
    )
    assert listing() == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "ribo: has no average.mrc, and no class_K.mrc of each class; give --average MAP"),
        (("TS_99", "--average", "ref.mrc"), "ribo: no tilt series TS_99; there are TS_hand"),
        (("--average", "none.mrc"), "none.mrc: there is no such file"),
        (("--average", "ref.mrc") * 3, "--average: 3 maps for the classes 1, 2; give one for all"),
        (("--average", "flat.mrc"), "flat.mrc: is the same everywhere"),
        (("--average", "black.mrc"), "black.mrc: shows no particle"),
        (("--average", "ref.mrc", "--class", 7), "ribo: no particles to place"),
        (("--average", "ref.mrc", "--like", "none.mrc"), "none.mrc: there is no such file"),
        (("--average", "ref.mrc", "--like", "ref.mrc", "--pixel-size", 5), "--like: is of one tilt series"),
        (
            ("--average", "ref.mrc", "--like", "tiny.mrc"),
            "tiny.mrc: none of the 6 particles of TS_hand lies in the volume",
        ),
        (("--average", "ref.mrc", "--path", "ref.mrc"), "/.*/ref.mrc: is a file, not a folder"),
    ],
)
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[object, ...], says: str) -> None:
    """One line, exit 2, nothing written."""
    black = np.random.default_rng(1).normal(0, 0.01, (32,) * 3)
    black -= np.exp(-((np.indices((32,) * 3) - 16.0) ** 2).sum(axis=0) / 200)
    Path("flat.mrc").write_bytes(mrc_bytes(np.ones((16,) * 3), PIXEL, stack=False))
    Path("black.mrc").write_bytes(mrc_bytes(black, PIXEL, stack=False))
    Path("tiny.mrc").write_bytes(mrc_bytes(np.zeros((8,) * 3), 0.05, stack=False))
    before = listing()
    assert ran("ribo", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(f"emc_mapback: error: {says}", err), err
    assert {p: t for p, t in listing().items() if not p.startswith("log")} == before


def test_no_scores_and_others_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(lambda i, p: p.pop("score"))
    assert ran("ribo", "--average", "ref.mrc", "--colour", "score") == 2
    assert "--colour: no particle has a score" in capsys.readouterr().err
    Path("mapback").mkdir()
    Path(f"mapback/{NAME}.star").write_text("mine")
    assert ran("ribo", "--average", "ref.mrc", "--quiet") == 2
    assert Path(f"mapback/{NAME}.star").read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert ran("ribo", "--average", "ref.mrc", "--quiet", "--overwrite") == 0
    assert "rlnAutopickFigureOfMerit" not in Path(f"mapback/{NAME}.star").read_text()


def test_particles_that_came_without_their_tilt_series(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As other packages' do: a tomogram says where they are placed, and without one a line says what is missing."""
    like = np.random.default_rng(1).normal(0, 1, (60, 120, 105)).astype(np.float32)
    Path("like.mrc").write_bytes(mrc_bytes(like, VOXEL, stack=False))
    argv = ("ribo", NAME, "--average", "ref.mrc", "--quiet")
    assert ran(*argv, "--like", "like.mrc", "--path", "known") == 0
    Path(f"info/{NAME}_info.json").unlink()
    assert ran(*argv, "--like", "like.mrc", "--path", "unknown") == 0
    volume = mrcfile.read(f"unknown/{NAME}.mrc")
    np.testing.assert_array_equal(volume, mrcfile.read(f"known/{NAME}.mrc"))
    assert volume.shape == like.shape and alike(volume, by_hand(particles(), volume.shape, VOXEL)) > 0.99
    capsys.readouterr()
    assert ran(*argv) == 2
    assert capsys.readouterr().err == (
        f"emc_mapback: error: info/{NAME}_info.json: the project has particles of {NAME}, but no record of it; "
        "give --like TOMOGRAM\n"
    )


def test_one_particle_has_no_neighbours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(lambda i, p: p.update({"use": i == 2}))
    assert ran("ribo", "--average", "ref.mrc", "--quiet") == 0
    assert capsys.readouterr().out == f"{NAME}: 1 particle placed\n"
    assert table(f"mapback/{NAME}_neighbours.json")["particles"] == []
    assert not Path(f"mapback/{NAME}_neighbours.png").exists()
