"""emc_simulate: the files it writes agree with each other, its truth with its images, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import mdocfile
import mrcfile
import numpy as np
import pytest
import torch

import emc_simulate
from libemc.io import mrc
from libemc.methods import phantom

SMALL = ("--size", "110", "96", "--pixel-size", "8", "--box", "40", "--count", "3", "--tilt-range", "-40", "40", "20",
         "--thickness", "500", "--quiet")  # fmt: skip


def ran(*argv: str) -> int:
    return emc_simulate.program.main(argv)


def test_files_agree(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("sub/TS_01", *SMALL, "--map-out", "true.mrc", "--seed", "4", "--dose", "2.5", "--axis", "-93") == 0
    line = capsys.readouterr().out
    truth = json.loads(Path("sub/TS_01_truth.json").read_text())
    with mrcfile.open("sub/TS_01.mrc") as file:
        stack, header = file.data.copy(), file.header
        assert file.is_image_stack() and header.mode == 1
        assert file.voxel_size.x == pytest.approx(8.0)
        assert header.dmean == pytest.approx(stack.mean(), rel=1e-4)
    assert stack.shape == (5, 96, 110)
    assert line.startswith("sub/TS_01.mrc: 5 tilts of 110 x 96, 3 particles,")
    assert float(line.split(",")[-1].split()[0]) == pytest.approx(stack.mean(), abs=0.006)
    # 2.5 e/Å² through 500 Å of ice of which 3500 Å let 1/e pass, a little less for the particles
    assert stack[2].mean() == pytest.approx(2.5 * 64 * np.exp(-500 / 3500), rel=0.02)
    nominal = [-40, -20, 0, 20, 40]
    assert np.loadtxt("sub/TS_01.rawtlt").tolist() == nominal == truth["nominal"]
    mdoc = mdocfile.read("sub/TS_01.mdoc")
    assert mdoc["TiltAngle"].tolist() == nominal
    assert mdoc["PriorRecordDose"].tolist() == [2.5 * k for k in truth["acq"]] == [10.0, 5.0, 0.0, 2.5, 7.5]
    assert set(mdoc["RotationAngle"]) == {-93.0} and set(mdoc["PixelSpacing"]) == {8.0}
    assert set(mdoc["Defocus"]) == {-3.0} and str(mdoc["ImageFile"][0]) == "TS_01.mrc"
    white, pixel_size = mrc.read_volume("true.mrc")
    assert pixel_size == pytest.approx(8.0) and truth["n"] == 40
    assert np.allclose(white, phantom.density(phantom.particle(), 40, 8.0), atol=1e-6)


def test_truth_has_the_keys_of_the_independent_one(project: Path, shared_data: Path) -> None:
    assert ran("TS_01", *SMALL) == 0
    ours, theirs = (
        json.loads(p.read_text()) for p in (Path("TS_01_truth.json"), shared_data / "sim/conf_01_truth.json")
    )
    assert set(theirs) <= set(ours)
    for key, value in theirs.items():
        shape = np.shape(value)
        assert len(np.shape(ours[key])) == len(shape) or (key in ("beads_A", "bad")), key


def test_same_seed_same_bytes_and_maps_of_your_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture of two maps from files, one of them at another pixel size."""
    for name, variant, box, pixel in (("a", "emc", 54, 6.0), ("b", "emc-nohead", 40, 8.0)):
        mrc.write_volume(f"{name}.mrc", phantom.density(phantom.particle(variant), box, pixel).numpy() * 37, pixel)
    argv = (
        "--map",
        "a.mrc",
        "--map",
        "b.mrc",
        "--fractions",
        "2,1",
        "--dtype",
        "float32",
        "--noise-free",
        "--ice",
        "0",
    )
    small = ["--size", "110", "96", "--pixel-size", "8", "--count", "3", "--tilt-range", "-40", "40", "20", "--quiet"]
    for name, seed in (("one", "1"), ("two", "1"), ("three", "2")):
        assert ran(name, *small, *argv, "--seed", seed, "--map-out", f"{name}.map.mrc") == 0
    stacks = [mrcfile.read(f"{name}.mrc") for name in ("one", "two", "three")]
    assert (stacks[0] == stacks[1]).all() and (stacks[0] != stacks[2]).any()
    truth = json.loads(Path("one_truth.json").read_text())
    assert sorted(truth["cls"]) == [0, 0, 1] and truth["maps"] == ["a.mrc", "b.mrc"]
    first = torch.from_numpy(mrc.read_volume("one.map_1.mrc")[0])
    direct = phantom.density(phantom.particle(), first.shape[-1], 8.0)
    # any units become potentials, and 6 Å becomes 8 Å: the same particle
    assert float((first * direct).sum() / first.norm() / direct.norm()) > 0.99
    assert float(first.norm() / direct.norm()) == pytest.approx(1.0, rel=0.05)
    assert np.std(stacks[0][2]) < 0.03 * np.mean(stacks[0][2])  # no counting noise


def test_missing_duplicate_and_beyond_the_field(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--missing",
        "1",
        "--bad",
        "0:duplicate",
        "--margin",
        "300",
        "--magnification-change",
        "0.001",
        "--ice",
        "0",
    ]
    assert ran("TS_01", *SMALL, *argv, "--order", "continuous", "--beads", "3", "--motion-range", "500") == 0
    truth = json.loads(Path("TS_01_truth.json").read_text())
    assert truth["nominal"] == np.loadtxt("TS_01.rawtlt").tolist() == [-40, 0, 20, 40]
    stack = mrcfile.read("TS_01.mrc")
    assert stack.shape[0] == 4 and (stack[0] == stack[1]).all() and (stack[1] != stack[2]).any()
    # rms of what five decimals keep
    assert np.std(truth["magnification"]) == pytest.approx(0.001, rel=0.02)
    assert np.shape(truth["probe2d_px"]) == (100, 4, 2) and np.abs(truth["bead_motion_A"]).max() > 0.01


def test_a_phase_plate(project: Path) -> None:
    assert ran("TS_01", *SMALL, "--ice", "0", "--phase-shift", "50", "--phase-drift", "-20") == 0
    truth = json.loads(Path("TS_01_truth.json").read_text())
    assert truth["phase_shift"] == [50 - 20 * k / 4 for k in truth["acq"]]


def test_a_tilted_beam(project: Path) -> None:
    for name, argv in (("TS_01", ["--beam-tilt", "1.5", "-0.25"]), ("TS_02", [])):
        assert ran(name, *SMALL, "--ice", "0", "--noise-free", "--dtype", "float32", "--seed", "3", *argv) == 0
    said = [json.loads(Path(f"{name}_truth.json").read_text())["beam_tilt"] for name in ("TS_01", "TS_02")]
    assert said == [[1.5, -0.25], [0.0, 0.0]]
    assert (mrcfile.read("TS_01.mrc") != mrcfile.read("TS_02.mrc")).any()


def test_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("TS_01", *SMALL, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("TS_01: 5 tilts, 3 particles (about ")
    assert list(project.iterdir()) == []


def test_refuses_with_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("not.npy", np.zeros(3))
    mrc.write_volume("slab.mrc", np.ones((4, 8, 8), np.float32), 3.0)
    mrc.write_volume("dark.mrc", -phantom.density(phantom.particle(), 40, 8.0).numpy(), 8.0)
    plain = ["--size", "110", "96", "--pixel-size", "8", "--count", "3"]
    for argv, words in (
        (["--map", "none.mrc"], "there is no such file"),
        (["--map", "slab.mrc"], "slab.mrc: is not a cube"),
        (["--map", "dark.mrc"], "not white"),
        (["--map", "dark.mrc", "--particle", "emc"], "not allowed with"),
        (["--symmetry", "q7"], "unknown symmetry 'q7'"),
        (["--count", "900"], "no room for 900"),
        (["--fractions", "1,1"], "2 fractions for 1 classes"),
        (["--bad", "3:upside-down"], "is not INDEX:KIND"),
        (["--bad", "300:dark"], "no image 300 can be dark"),
        (["--tilt-range", "60", "-60", "3"], "no tilt series from 60 to -60"),
        (["--box", "20"], "smaller than the particle"),
    ):
        assert ran("TS_01", *plain, *argv) == 2, argv
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("emc_simulate: ") and words in error, error
    Path("TS_01.mrc").write_text("mine")
    assert ran("TS_01", *SMALL) == 2
    assert Path("TS_01.mrc").read_text() == "mine"
