"""emc_import: what it puts into a project, held against the files and truths it came from, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE
from scipy.spatial.transform import Rotation

import emc_extract
import emc_import
import emc_info
import emc_tomoctf
import emc_tomogram
from libemc import project as projects
from libemc import records
from libemc.io import geometry, imod, mrc, relion
from libemc.io.star import write_star
from libemc.methods.average import half_maps
from libemc.methods.import_series import UNDECIDED
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import soft_sphere

RIBOSOMES = "real/ribosome_tilts/warptools_test_4-tomos_10-ptcls_box-32_angpix-12"
TILTS = [-20.0, -10.0, 0.0, 10.0, 20.0]
DTYPES = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16}


def ran(*argv: object) -> int:
    return emc_import.program.main([str(word) for word in (*argv, "--quiet")])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert ran(*argv) == 2
    out, err = capsys.readouterr()
    *warnings, line = err.splitlines()
    assert out == "" and line.startswith("emc_import: error: ") and all(": warning: " in text for text in warnings), err
    return line


def images(mode: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(20, (5, 40, 48)).astype(DTYPES[mode])


def stack(
    path: str, data: np.ndarray | None = None, pixel_size: float = 4.0, tilts: list[float] | None = TILTS
) -> Path:
    """An MRC stack, and its .rawtlt unless there are no tilts."""
    Path(path).parent.mkdir(exist_ok=True)
    with mrcfile.new(path, images() if data is None else data, overwrite=True) as file:
        file.set_image_stack()
        file.voxel_size = pixel_size
    if tilts is not None:
        Path(path).with_suffix(".rawtlt").write_text("".join(f"{tilt}\n" for tilt in tilts))
    return Path(path)


def mdoc(path: str, order: list[int], dose: float = 2.0, extra: str = "", tilts: list[float] = TILTS) -> None:
    sections = [
        f"[ZValue = {z}]\nTiltAngle = {tilt}\nExposureDose = {dose}\nDateTime = 01-Jan-26  10:{10 + place}:00\n"
        for z, (tilt, place) in enumerate(zip(tilts, order, strict=True))
    ]
    Path(path).write_text(f"PixelSpacing = 4.0\nVoltage = 200\n{extra}\n\n" + "\n".join(sections))


def record(name: str = "TS_01") -> records.TiltSeriesRecord:
    return records.load_tiltseries(name)


# ----------------------------------------------------------------------------------------------------------- raw stacks


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", DTYPES)
def test_every_mode_and_byte_order(project: Path, mode: int, order: str) -> None:
    data = images(mode)
    file = stack("raw/TS_01.mrc", data)
    if order == ">":
        header = np.frombuffer(file.read_bytes()[:1024], HEADER_DTYPE).byteswap().copy()
        header["machst"] = [0x11, 0x11, 0, 0]
        file.write_bytes(header.tobytes() + data.byteswap().tobytes())
    with mrcfile.open(file, permissive=True) as opened:
        np.testing.assert_array_equal(opened.data, data)  # mrcfile agrees on what was written
    assert ran(file) == 0
    found = record()
    assert found.source.shape == (5, 40, 48) and found.source.pixel_size == 4.0
    assert found.tilts.nominal == tuple(TILTS) and found.tilts.use == (True,) * 5


def test_a_volume_is_a_stack_too_and_defaults(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mrcfile.new("TS_01.st", images(2)) as file:
        file.set_volume()
        file.voxel_size = 2.5
    assert ran("TS_01.st", "--tilt-start", "-20", "--tilt-step", "10", "--axis", "85.3", "--dose", "3") == 0
    found = record()
    source = found.source.model_dump()
    assert source == {
        "stack": "TS_01.st", "shape": (5, 40, 48), "pixel_size": 2.5, "header_pixel_size": None,
        "voltage": 300.0, "cs": 2.7, "amplitude_contrast": 0.07,
        "tilt_axis": 85.3, "contrast": "dark", "origin": "TS_01.st"}  # fmt: skip
    assert found.tilts.order == (4, 2, 0, 1, 3)  # dose-symmetric unless told: 0, +10, -10, +20, -20
    assert found.tilts.dose_before == (12.0, 6.0, 0.0, 3.0, 9.0)
    out, err = capsys.readouterr()
    assert out == "TS_01: 5/5 tilts, 2.5 Å/px, 48 x 40, -20 to 20 degrees, axis 85.3, 15 e/Å²\n"
    assert "taken for dose-symmetric" in err
    assert found.history[-1].program == "emc_import" and found.history[-1].state == "done"
    assert found.history[-1].inputs == ("TS_01.st",)


def test_mdoc_says_doses_order_axis_and_voltage(project: Path) -> None:
    stack("raw/TS_01.mrc", tilts=None)
    mdoc("raw/TS_01.mrc.mdoc", [3, 1, 0, 2, 4], 2.5, "[T = Tilt axis angle = -87.5, binning = 1]\n")
    assert ran("raw/TS_01.mrc") == 0
    found = record()
    assert found.tilts.order == (3, 1, 0, 2, 4) and found.tilts.dose_before == (7.5, 2.5, 0.0, 5.0, 10.0)
    assert (found.source.voltage, found.source.tilt_axis) == (200.0, -87.5)
    # what the user says goes first
    assert ran("raw/TS_01.mrc", "--voltage", "300", "--axis", "3", "--dose", "4", "--overwrite") == 0
    found = record()
    assert (found.source.voltage, found.source.tilt_axis) == (300.0, 3.0)
    assert found.tilts.order == (3, 1, 0, 2, 4) and found.tilts.dose_before == (12.0, 4.0, 0.0, 8.0, 16.0)
    Path("order.txt").write_text("0\n10\n-10\n-20\n20\n")
    for word, order in (("sequential", (0, 1, 2, 3, 4)), ("order.txt", (3, 2, 0, 1, 4))):
        assert ran("raw/TS_01.mrc", "--dose-order", word, "--overwrite") == 0
        assert record().tilts.order == order and record().tilts.dose_before == tuple(2.5 * place for place in order)


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_bad_images_are_marked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(2)
    data[1], data[4] = 3.0, data[3]
    data[0, 5, 5] = np.nan
    assert ran(stack("TS_01.mrc", data), "--dose", "1") == 0
    tilts = record().tilts
    assert tilts.use == (False, False, True, True, False)
    assert tilts.reason == ("values that are not finite", "constant", None, None, "the same as image 3")
    assert "2/5 tilts (0 values that are not finite, 1 constant, 4 the same as image 3)" in capsys.readouterr().out
    assert tilts.dose == (1.0,) * 5  # the specimen had them all the same
    # without an order of exposure there is no telling which of two copies is at its angle
    assert ran("TS_01.mrc", "--overwrite") == 0
    assert record().tilts.use == (False, False, True, False, False)
    assert record().tilts.reason[3:] == tuple(f"the same as image {k}{UNDECIDED}" for k in (4, 3))


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_stacks_without_a_usable_image(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fill in (("nan", np.nan), ("flat", 3.0)):
        stack(f"{name}.mrc", np.full((5, 40, 48), fill, np.float32))
        assert "no image can be used: image 0 is" in refused(capsys, f"{name}.mrc")
    assert not list(Path().glob("info/*.json"))


def test_several_stacks_and_where_they_are_kept(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("microscope")
    for name, seed in (("TS_01", 1), ("TS_02", 2)):
        stack(str(away / f"{name}.mrc"), images(seed=seed))
    assert ran(away / "TS_01.mrc", away / "TS_02.mrc") == 0
    assert record("TS_02").source.stack == str(away / "TS_02.mrc")  # not below the project: as a whole
    before = (away / "TS_01.mrc").read_bytes()
    assert ran(away / "TS_01.mrc", "--copy", "--overwrite") == 0
    assert record().source.stack == "tiltseries/TS_01.mrc" and record().source.origin == str(away / "TS_01.mrc")
    copied = Path("tiltseries/TS_01.mrc")
    assert copied.read_bytes() == before and not copied.is_symlink()
    assert ran(away / "TS_02.mrc", "--link", "--overwrite") == 0
    assert os.readlink("tiltseries/TS_02.mrc") == str(away / "TS_02.mrc")
    np.testing.assert_array_equal(mrc.open_stack(record("TS_02").source.stack).array, images(seed=2))
    assert sorted(os.listdir("tiltseries")) == ["TS_01.mrc", "TS_02.mrc"]
    # a stack that is in its place already stays there
    (copied.with_suffix(".rawtlt")).write_text("\n".join(map(str, TILTS)))
    assert ran(copied, "--copy", "--overwrite") == 0 and copied.read_bytes() == before


def test_dry_run_does_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack("raw/TS_01.mrc")
    assert ran("raw/TS_01.mrc", "--copy", "--dry-run") == 0
    assert "look at 1 stacks" in capsys.readouterr().out
    assert sorted(path.name for path in Path().rglob("*")) == ["TS_01.mrc", "TS_01.rawtlt", "raw"]


def test_refusals_of_stacks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stack("TS_01.mrc")
    both = refused(capsys, file, "--pixel-size", "2.5")
    assert "--pixel-size says 2.5 Å/px" in both and "TS_01.mrc says 4 Å/px" in both
    assert "--pixel-size" in refused(capsys, file, "--ignore-header")
    assert "holds 5 images, of which --tilt-start says one" in refused(capsys, file, "--tilt-start", "3")
    assert "--tilt-step without --tilt-start" in refused(capsys, file, "--tilt-step", "3")
    assert "there is no such file" in refused(capsys, "none.mrc")
    assert "--label has no meaning for stacks" in refused(capsys, file, "--label", "x")
    assert "--copy has no meaning for picks" in refused(capsys, "--picks", "x.csv", "--copy")
    assert "at once" in refused(capsys, "--picks", "x.csv", "--alignment", "y.xf", "TS_01")
    assert "nothing to import" in refused(capsys)
    Path("TS_01.rawtlt").write_text("0\n3\n")
    assert "2 angles for 5 images" in refused(capsys, file)
    Path("TS_01.rawtlt").unlink()
    assert "no tilt angles" in refused(capsys, file)
    mdoc("TS_01.mdoc", [0, 1, 2, 3, 4])
    Path("TS_01.rawtlt").write_text("-20\n-10\n0\n10\n23\n")
    assert "differ by up to 3.0 degrees" in refused(capsys, file)
    assert "not an order" in refused(capsys, file, "--mdoc", "TS_01.mdoc", "--dose-order", "TS_01.rawtlt")
    stack("zero.mrc", pixel_size=0.0)
    assert "no pixel size in" in refused(capsys, "zero.mrc")
    stack("one.mrc", images()[:1], tilts=None)
    line = refused(capsys, "one.mrc")
    assert "one.mrc: holds one image and has no tilt angle" in line and "--tilt-start" in line
    assert "holds one image" in refused(capsys, "one.mrc", "--dose", "3")
    assert "end at 91" in refused(capsys, "one.mrc", "--tilt-start", "91")
    Path("one.rawtlt").write_text("0\n3\n")
    assert "2 angles for 1 images" in refused(capsys, "one.mrc")
    Path("cut.mrc").write_bytes(file.read_bytes()[:3000])
    Path("empty.mrc").touch()
    assert "cut short" in refused(capsys, "cut.mrc") and "is empty" in refused(capsys, "empty.mrc")
    stack("a/TS_03.mrc")
    stack("b/TS_03.mrc")
    assert "two stacks are called TS_03" in refused(capsys, "a/TS_03.mrc", "b/TS_03.mrc")
    assert "several stacks" in refused(capsys, "a/TS_03.mrc", "b/TS_03.mrc", "--rawtlt", "a/TS_03.rawtlt")
    assert not list(Path().glob("info/*.json"))
    assert ran("zero.mrc", "--pixel-size", "3") == 0 and record("zero").source.pixel_size == 3.0
    assert ran("a/TS_03.mrc", "--pixel-size", "2.5", "--ignore-header") == 0
    assert (record("TS_03").source.pixel_size, record("TS_03").source.header_pixel_size) == (2.5, 4.0)
    assert projects.open_raw_stack(record("TS_03")).shape == (5, 40, 48)
    text = Path("info/TS_03_info.json").read_bytes()
    assert "exists already; use --overwrite" in refused(capsys, "a/TS_03.mrc")
    assert Path("info/TS_03_info.json").read_bytes() == text


def test_an_mdoc_that_contradicts_the_angles_that_were_asked_for(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stack("TS_01.mrc")
    mdoc("TS_01.mdoc", [0, 1, 2, 3, 4], tilts=[-40.0, -20, 0, 20, 40])
    assert ran(file, "--rawtlt", "TS_01.rawtlt") == 0
    assert record().tilts.nominal == tuple(TILTS) and record().tilts.dose is None
    assert "TS_01.mdoc is ignored" in capsys.readouterr().err
    assert ran(file, "--mdoc", "TS_01.mdoc", "--overwrite") == 0
    assert record().tilts.nominal == (-40.0, -20.0, 0.0, 20.0, 40.0) and record().tilts.dose == (2.0,) * 5


# --------------------------------------------------------------------------------------------------- single micrographs


def micrograph(path: str, defocus: float = 12000.0, pixel_size: float = 2.0) -> Path:
    """A 2-D MRC file of white noise seen through the CTF at 300 kV, with as much noise again; sides of 400 and 500."""
    rng, shape = np.random.default_rng(4), (400, 500)
    k = np.hypot(np.fft.fftfreq(shape[0], pixel_size)[:, None], np.fft.rfftfreq(shape[1], pixel_size))
    lens = -np.sin(np.pi * 0.0196875 * defocus * k**2 - np.pi / 2 * 2.7e7 * 0.0196875**3 * k**4 + np.arcsin(0.07))
    seen = np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * lens, shape)
    with mrcfile.new(path, (100 + 5 * (seen + rng.normal(size=shape))).astype(np.float32)) as file:
        assert file.is_single_image()
        file.voxel_size = pixel_size
    return Path(path)


def test_a_micrograph_is_a_series_of_one_image(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = micrograph("m_01.mrc")
    line = "m_01: 1/1 tilts, 2 Å/px, 500 x 400, {} degrees, axis not known, {}\n"
    assert ran(file, "--tilt-start", "-0.5") == 0
    assert capsys.readouterr() == (line.format("-0.5", "dose not known"), "")  # no word of orders and doses
    assert record("m_01").source.shape == (1, 400, 500) and record("m_01").tilts.order is None
    assert ran(file, "--tilt-start", "2", "--tilt-step", "3", "--dose", "40", "--overwrite") == 0
    assert capsys.readouterr() == (line.format("2", "40 e/Å²"), "")
    tilts = record("m_01").tilts
    assert (tilts.nominal, tilts.order, tilts.dose, tilts.dose_before) == ((2.0,), (0,), (40.0,), (0.0,))
    Path("m_01.rawtlt").write_text("7.5\n")
    assert ran(file, "--overwrite") == 0 and record("m_01").tilts.nominal == (7.5,)
    Path("m_01.rawtlt").unlink()
    Path("m_01.mdoc").write_text(
        "PixelSpacing = 2.0\nVoltage = 200\n\n[ZValue = 0]\nTiltAngle = 0.02\nExposureDose = 25\n"
    )
    assert ran(file, "--overwrite") == 0
    found = record("m_01")
    assert (found.tilts.nominal, found.tilts.dose, found.source.voltage) == ((0.02,), (25.0,), 200.0)
    text = Path("m_01.mdoc").read_text()
    Path("m_01.mdoc").write_text(text.replace("ExposureDose", "PriorRecordDose"))
    assert ran(file, "--overwrite") == 0
    tilts = record("m_01").tilts
    assert (tilts.dose_before, tilts.dose) == ((25.0,), None)  # of one image nothing says its own


def test_what_can_be_done_with_a_micrograph(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """emc_tomoctf finds the defocus that the image was made with; what wants a tilt series says so in one line."""
    assert ran(micrograph("m_01.mrc"), "--tilt-start", "0") == 0
    capsys.readouterr()
    assert emc_info.program.main([]) == 0 and "m_01_info.json: tiltseries" in capsys.readouterr().out
    assert emc_tomoctf.program.main(["m_01", "--quiet"]) == 0
    found = record("m_01").ctf
    assert found is not None and found.measured == (True,) and found.error is not None and found.error[0] is not None
    mean = (found.defocus_u[0] + found.defocus_v[0]) / 2
    assert abs(mean - 12000) < 3 * found.error[0] < 300
    assert emc_info.program.main(["m_01"]) == 0
    assert f"defocus_u            {found.defocus_u[0]}" in capsys.readouterr().out
    before = Path("info/m_01_info.json").read_bytes()
    for module, words, why in (
        (emc_tomogram, [], "holds 1 image, a tomogram needs 3 at least"),
        (emc_tomogram, ["--load"], "holds 1 image, a tomogram needs 3 at least"),
        (emc_extract, ["--label", "a", "--set", "a", "--box", "32"], "one image can't be aligned"),
    ):
        assert module.program.main(["m_01", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "info/m_01_info.json: " in err and why in err
    assert Path("info/m_01_info.json").read_bytes() == before and not Path("particles").exists()
    assert ran("m_01.mrc", "--tilt-start", "20", "--overwrite") == 0  # its rings would be of many heights
    capsys.readouterr()
    assert emc_tomoctf.program.main(["m_01", "--quiet"]) == 2 and "alignment" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- an independent series


def test_a_simulated_series_with_its_truth(
    project: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "sim/conf_02.mrc"
    truth_file = shared_data / "sim/conf_02_truth.json"
    truth = json.loads(truth_file.read_text())
    assert ran(source) == 0
    line = capsys.readouterr().out
    assert line.startswith("conf_02: 36/37 tilts (0 dark: ") and line.endswith("axis -93, 118.4 e/Å²\n")
    found = record("conf_02")
    assert [k for k, use in enumerate(found.tilts.use) if not use] == truth["bad"] == [0]
    assert list(found.tilts.order or ()) == truth["acq"] and list(found.tilts.nominal) == truth["nominal"]
    assert found.tilts.dose_before == pytest.approx([truth["dose"] * k for k in truth["acq"]])
    assert ran("--alignment", truth_file, "conf_02") == 0
    assert ran("--picks", truth_file, "--label", "spliceosome", "conf_02") == 0
    assert "70 spliceosome, with angles" in capsys.readouterr().out
    found = record("conf_02")
    assert found.alignment is not None and found.ctf is not None
    for key in ("axis", "tilt", "xtilt"):
        np.testing.assert_array_equal(getattr(found.alignment, key), truth[key])
    assert [list(pair) for pair in zip(found.alignment.shift_x, found.alignment.shift_y, strict=True)] == truth[
        "shift_A"
    ]
    mean = [(u + v) / 2 for u, v in zip(found.ctf.defocus_u, found.ctf.defocus_v, strict=True)]
    assert mean == pytest.approx(truth["defocus"], abs=1e-6)
    assert found.ctf.defocus_handedness == truth["defocus_handedness"] == 1 and not found.tilts.use[0]
    # the truth's own image positions of every particle follow from what was imported
    picks = found.picks["spliceosome"]
    for j in (1, 18, 36):
        angles = [getattr(found.alignment, key)[j] for key in ("axis", "tilt", "xtilt")]
        turn = Rotation.from_euler("ZYX", angles, degrees=True)
        seen = turn.apply(np.array(picks.xyz))[:, :2] + truth["shift_A"][j]
        off = seen / 3.0 + (440, 350) - np.array(truth["pos2d_px"])[:, j]
        # particles move at random by some Å between exposures: 1.5 px rms, so 0.18 px rms in the mean of 70
        assert np.abs(off.mean(axis=0)).max() < 0.75 and off.std() < 2.5
    poses = Rotation.from_euler("ZYZ", np.stack([picks.rot, picks.tilt, picks.psi], -1), degrees=True).inv().as_matrix()
    np.testing.assert_allclose(poses, truth["poses"], atol=2e-5)  # five digits in the file
    assert ran("--picks", truth_file, "--label", "first", "--class", "0", "conf_02") == 0
    assert len(record("conf_02").picks["first"].xyz) == sum(c == 0 for c in truth["cls"])


# ------------------------------------------------------------------------------------------------------ other packages


@pytest.fixture
def imported(project: Path) -> Path:
    assert ran(stack("TS_01.mrc"), "--dose", "1") == 0
    return project


def test_alignment_of_imod_and_json(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tilt = [-19.5, -9.8, 0.2, 10.1, 20.4]
    made = geometry.Alignment(tilt=tilt, axis=84.0, shift_x=[5.0, -8, 3, 0, 1], shift_y=[1.0, 2, -3, 4, 5], xtilt=1.5)
    imod.write_imod_alignment(made, "TS_01_ali", shape=(40, 48), pixel_size=4.0)
    assert ran("--alignment", "TS_01_ali.xf", "TS_01_ali.tlt", "TS_01") == 0
    found = record().alignment
    assert found is not None and record().ctf is None
    for key in ("tilt", "axis", "xtilt", "shift_x", "shift_y"):
        np.testing.assert_allclose(
            getattr(found, key), getattr(made, key), atol=1e-4
        )  # .xf and .tlt have 4 to 9 digits
    assert "has an alignment; use --overwrite" in refused(capsys, "--alignment", "TS_01_ali.xf", "TS_01")
    section = {"axis": [80.0] * 5, "tilt": tilt, "xtilt": [0.0] * 5, "shift_x": [0.0] * 5, "shift_y": [2.0] * 5}
    lens = {"defocus_u": [3e4] * 5, "defocus_v": [2.9e4] * 5, "angle": [10.0] * 5, "defocus_handedness": 1}
    use = [True, True, True, True, False]
    Path("a.json").write_text(json.dumps({"alignment": section, "ctf": lens, "tilts": {"use": use}}))
    assert ran("TS_01", "--alignment", "a.json", "--overwrite") == 0
    new = record()
    assert new.alignment is not None and new.alignment.shift_y == (2.0,) * 5 and new.alignment.magnification is None
    assert new.ctf is not None and new.ctf.defocus_handedness == 1 and new.ctf.defocus_v == (2.9e4,) * 5
    assert new.tilts.use == tuple(use) and new.tilts.reason is not None and "left out" in (new.tilts.reason[4] or "")
    assert "TS_01: alignment of 4/5 tilts, -19.5 to 20.4 degrees, axis 80, defocus 29500 Å" in capsys.readouterr().out
    section["tilt"] = tilt[:4]
    Path("short.json").write_text(json.dumps({"alignment": section}))
    text = Path("info/TS_01_info.json").read_bytes()
    assert "short.json" in refused(capsys, "--alignment", "short.json", "TS_01", "--overwrite")
    assert "TS_09" in refused(capsys, "--alignment", "a.json", "TS_09")
    assert "give tilt series or --all" in refused(capsys, "--alignment", "a.json")
    assert "only a STAR file" in refused(capsys, "--alignment", "a.json", "--overwrite", "TS_01", "TS_02")
    assert Path("info/TS_01_info.json").read_bytes() == text


def test_beam_tilt_of_a_ctf(imported: Path) -> None:
    """What a file says of it is taken; one that doesn't say leaves what is known, and two zeros are none."""
    flat = {"axis": [80.0] * 5, "tilt": TILTS, "shift_x": [0.0] * 5, "shift_y": [2.0] * 5}
    for said, want in (([0.5, -1], (0.5, -1.0)), (None, (0.5, -1.0)), ([0.0, 0.0], None), (None, None)):
        lens = {"defocus_u": [3e4] * 5, "beam_tilt": said}
        Path("a.json").write_text(json.dumps({"alignment": flat, "ctf": lens}))
        assert ran("TS_01", "--alignment", "a.json", "--overwrite") == 0
        found = record().ctf
        assert found is not None and found.beam_tilt == want
        assert ("beam_tilt" in Path("info/TS_01_info.json").read_text()) == (want is not None)


def test_alignment_of_relion_for_several_series(imported: Path) -> None:
    assert ran(stack("TS_02.mrc", images(seed=9)), "--dose", "1") == 0
    tables = {}
    for name, axis in (("TS_01", 85.0), ("TS_02", -5.0)):
        tilts = {"rlnTomoYTilt": TILTS, "rlnTomoZRot": [axis] * 5, "rlnTomoXTilt": [1.0] * 5}
        tilts |= {f"rlnTomo{a}ShiftAngst": [3.0, 2, 1, 0, -1] for a in "XY"}
        write_star(f"{name}.star", {name: pd.DataFrame(tilts)})
        tables[name] = axis
    tomograms = {"rlnTomoName": list(tables), "rlnTomoTiltSeriesPixelSize": [4.0, 4.0], "rlnTomoHand": [-1.0, -1.0]}
    tomograms |= {"rlnTomoTiltSeriesStarFile": ["TS_01.star", "TS_02.star"]}
    write_star("tomograms.star", {"global": pd.DataFrame(tomograms)})
    assert ran("TS_01", "TS_02", "--alignment", "tomograms.star") == 0
    for name, axis in tables.items():
        alignment = record(name).alignment
        assert (
            alignment is not None and alignment.axis == (axis,) * 5 and alignment.shift_x == (3.0, 2.0, 1.0, 0.0, -1.0)
        )


def test_picks(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.csv").write_text("x,y,z,rot,tilt,psi,score\n10,-20,5,30,40,50,0.9\n1,2,3,4,5,6,0.8\n")
    assert ran("--picks", "p.csv", "--label", "ribo", "TS_01") == 0
    picks = record().picks["ribo"]
    assert picks.xyz == ((10.0, -20.0, 5.0), (1.0, 2.0, 3.0)) and picks.rot == (30.0, 4.0) and picks.score == (0.9, 0.8)
    assert picks.source == "p.csv" and capsys.readouterr().out.endswith("TS_01: 2 ribo, with angles\n")
    assert "has picks labelled ribo" in refused(capsys, "--picks", "p.csv", "--label", "ribo", "TS_01")
    Path("q.json").write_text(
        json.dumps({"picks": {"ribo": {"xyz": [[1, 1, 1]]}, "fas": {"xyz": [[2, 0, 0], [9, 9, 9]]}}})
    )
    assert ran("--picks", "q.json", "--label", "fas", "TS_01") == 0
    assert len(record().picks["fas"].xyz) == 2 and set(record().picks) == {"ribo", "fas"}
    # pixels of a tomogram: voxel (12, 8, 6) of 20 x 16 x 12, whose middle is (10, 8, 6)
    columns = {"rlnCoordinateX": [12.0], "rlnCoordinateY": [8.0], "rlnCoordinateZ": [6.0]}
    write_star("px.star", {"": pd.DataFrame(columns)})
    mrc.write_volume("tomo.mrc", np.zeros((12, 16, 20), np.float32), 8.0)
    assert "coordinates in pixels" in refused(capsys, "--picks", "px.star", "--label", "px", "TS_01")
    assert ran("--picks", "px.star", "--label", "px", "--tomogram", "tomo.mrc", "TS_01") == 0
    assert record().picks["px"].xyz == ((16.0, 0.0, 0.0),)
    # the same of a tomogram of the record that is a part of the specimen
    part = records.Tomogram(file="tomo.mrc", pixel_size=8.0, shape=(12, 16, 20), centre=(0.0, 24.0, -8.0))
    path = records.tiltseries_path("TS_01")
    records.update(path, lambda r: r.model_copy(update={"tomograms": (part,)}), records.TiltSeriesRecord)
    assert ran("--picks", "px.star", "--label", "part", "TS_01") == 0
    assert record().picks["part"].xyz == ((16.0, 24.0, -8.0),)
    turned = part.model_copy(update={"angles": (0.0, 0.0, 90.0)})  # its x is the specimen's -y
    records.update(path, lambda r: r.model_copy(update={"tomograms": (turned,)}), records.TiltSeriesRecord)
    assert ran("--picks", "px.star", "--label", "turned", "TS_01") == 0
    np.testing.assert_allclose(record().picks["turned"].xyz, [(0.0, 8.0, -8.0)], atol=1e-9)
    Path("far.csv").write_text("5000 0 0\n")
    assert "no point within the images" in refused(capsys, "--picks", "far.csv", "--label", "far", "TS_01")
    Path("some.csv").write_text("5000 0 0\n1 1 1\n")
    assert ran("--picks", "some.csv", "--label", "some", "TS_01") == 0
    assert "1 points of some.csv lie outside" in capsys.readouterr().err
    Path("none.json").write_text('{"picks": {"xyz": []}}')
    assert "has no points" in refused(capsys, "--picks", "none.json", "--label", "none", "TS_01")
    assert "without --label" in refused(capsys, "--picks", "p.csv", "TS_01")
    assert "--class" in refused(capsys, "--picks", "p.csv", "--label", "x", "--class", "1", "TS_01")


def test_real_ribosomes_average_to_their_map_in_its_hand(project: Path, shared_data: Path) -> None:
    """The README's curve, within a sphere of the particle: the published map has little noise outside, ours has its share."""
    expected = [0.98, 0.95, 0.92, 0.89, 0.80, 0.67, 0.60, 0.66, 0.65]
    assert ran("--particles", shared_data / f"{RIBOSOMES}_optimisation_set.star", "--set", "ribo") == 0
    head, series = projects.open_particles("ribo")
    assert (head.count, head.box, head.pixel_size) == (40, 32, 12.0)
    assert [p.file.name for p in series] == ["Unt_083", "Unt_050", "Unt_076", "Unt_088"]
    assert all(p.file.ctf_premultiplied for p in series)
    first = series[0].file.particles[0]
    assert first.id == "Unt_083.000000" and first.parent == "Unt_083/1"
    assert not series[0].stack[0].any() and series[0].stack[1].any()  # [0,1,1,...: the first tilt does not show it
    maps = half_maps(series, memory=10**9)
    both = maps.sums[0]
    both.merge(maps.sums[1])
    name = f"{RIBOSOMES.removesuffix('4-tomos_10-ptcls_box-32_angpix-12')}box-32_angpix-12_reconstruct.mrc"
    true = torch.from_numpy(mrc.read_volume(shared_data / name)[0])
    sphere = soft_sphere(32, 11.0, 3.0).float()  # 132 Å; a ribosome's radius is 125 to 130 Å

    def against(reference: torch.Tensor) -> np.ndarray:
        return fourier_shell_correlation(both.map() * sphere, reference * sphere).values[1:10].numpy()

    assert (against(true) >= np.array(expected) - 0.005).all()  # given to two digits
    assert against(true.flip(0).roll(1, 0))[5:].max() < 0.2


def test_hand_of_the_particles_geometry(project: Path, shared_data: Path) -> None:
    star = shared_data / f"{RIBOSOMES}_optimisation_set.star"
    for hand in ("kept", "mirrored", "auto"):
        assert ran("--particles", star, "--set", hand, "--hand", hand) == 0
    kept, mirrored, auto = (records.load_particles(hand)[1]["Unt_050"] for hand in ("kept", "mirrored", "auto"))
    assert auto.tilts == mirrored.tilts and [p.xyz for p in auto.particles] == [p.xyz for p in mirrored.particles]
    assert kept.defocus_handedness == -mirrored.defocus_handedness == -1
    np.testing.assert_allclose(kept.tilts.tilt, np.negative(mirrored.tilts.tilt), atol=1e-12)
    for a, b in zip(kept.particles, mirrored.particles, strict=True):
        assert a.xyz == (b.xyz[0], b.xyz[1], -b.xyz[2])
        np.testing.assert_allclose(a.defocus, b.defocus, rtol=1e-12)  # the images are the same: so is their defocus


def test_2d_particles(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, n = np.random.default_rng(3), 12
    data = (1e4 * random.normal(size=(n, 16, 16))).astype(np.float32)
    mrc.write_stack("a.mrcs", data[:5], 3.0)
    mrc.write_stack("b.mrcs", data[5:], 3.0)
    flat = relion.Particles2D(
        image=[f"{i + 1:06d}@a.mrcs" for i in range(5)] + [f"{i + 1:06d}@b.mrcs" for i in range(n - 5)],
        rot=random.uniform(-180, 180, n), tilt=random.uniform(0, 180, n), psi=random.uniform(-180, 180, n),
        dx=random.normal(size=n) * 5, dy=random.normal(size=n) * 5, defocus_u=random.uniform(2e4, 2.1e4, n),
        defocus_v=random.uniform(1.9e4, 2e4, n), defocus_angle=random.uniform(0, 180, n), phase_shift=random.uniform(0, 90, n),
        group=np.zeros(n, int), optics=[relion.OpticsGroup("one", 3.0, 16, 200.0, 2.0, 0.1)],
        half=np.array([1, 2] * 6))  # fmt: skip
    relion.write_particles_2d("flat.star", flat)
    assert ran("--particles", "flat.star", "--set", "flat", "--symmetry", "c3") == 0
    head, (series,) = projects.open_particles("flat")
    assert (head.symmetry, head.pixel_size, head.count) == ("c3", 3.0, n)
    assert series.file.optics.model_dump() == {
        "voltage": 200.0,
        "cs": 2.0,
        "amplitude_contrast": 0.1,
        "beam_tilt": None,
    }
    assert series.half.tolist() == [1, 2] * 6
    kept = np.asarray(series.stack, np.float64)
    scale = (kept * data).sum() / (data.astype(np.float64) ** 2).sum()  # one for the whole set; the rest is float16's
    np.testing.assert_allclose(kept, scale * data, rtol=2**-10, atol=2**-24)
    assert kept.std() == pytest.approx(1, rel=0.1)  # measured on 4 of 12 images of 256 values: 2 % rms
    np.testing.assert_allclose((series.xyz - series.centre)[:, :2], np.stack([flat.dx, flat.dy], -1), atol=1e-6)
    np.testing.assert_allclose(series.defocus[:, 0], (flat.defocus_u + flat.defocus_v) / 2, atol=1e-6)
    lens = np.stack([(flat.defocus_u - flat.defocus_v) / 2, flat.defocus_angle, flat.phase_shift], -1)
    np.testing.assert_allclose(series.lens[:, 0], lens, atol=1e-6)
    expected = Rotation.from_euler("ZYZ", np.stack([flat.rot, flat.tilt, flat.psi], -1), degrees=True).inv().as_matrix()
    np.testing.assert_allclose(series.rotation, expected, atol=1e-7)
    np.testing.assert_allclose(series.series.matrices, np.eye(3)[None], atol=1e-15)
    # nothing is written of a set whose images are spoilt or missing
    for spoil, message in (
        (lambda d: d * np.where(np.arange(n) == 7, np.float32(1e7), np.float32(1))[:, None, None], "far beyond"),
        (lambda d: np.zeros_like(d), "constant"),
    ):
        mrc.write_stack("b.mrcs", spoil(data)[5:], 3.0)
        mrc.write_stack("a.mrcs", spoil(data)[:5], 3.0)
        assert message in refused(capsys, "--particles", "flat.star", "--set", "spoilt")
    Path("b.mrcs").unlink()
    assert "b.mrcs" in refused(capsys, "--particles", "flat.star", "--set", "spoilt")
    assert not list(Path("particles/spoilt").glob("*.mrcs")) and not Path("particles/spoilt/particles.json").exists()
    assert "neither tomograms nor a hand" in refused(capsys, "--particles", "flat.star", "--set", "x", "--hand", "kept")
    assert "--set" in refused(capsys, "--particles", "flat.star")
