"""Malformed files of every kind: one line that names the file and says what to do, and never another exception."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io import aretomo, imod, jsonfile, mdoc, mrc, picks, relion, tilts, truth

SHAPE = {"shape": (64, 96), "pixel_size": 2.0}


def good_mrc() -> bytes:
    path = Path(os.environ["PYTEST_TMP"]) / "good.mrc"
    mrc.write_volume(path, np.ones((2, 3, 4)), 2.0)
    return path.read_bytes()


def edited(**fields: object) -> Callable[[], bytes]:
    def make() -> bytes:
        raw = bytearray(good_mrc())
        header = np.frombuffer(raw, mrc.HEADER_DTYPE, 1)
        for name, value in fields.items():
            header[name] = value
        return bytes(raw)

    return make


def xf(path: Path) -> object:
    tilt = path.with_suffix(".tlt")
    tilt.write_text("0\n3\n")
    return imod.read_imod_alignment(path, tilt, **SHAPE)


def series(path: Path) -> object:
    return relion.read_particle_series(path)


OPTICS = (
    "data_optics\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
    "1 300 2.7 0.1\n\n"
)
TOMO = "data_particles\nloop_\n_rlnTomoName\n_rlnOpticsGroup\n_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n"
POINTS = "data_\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n"
MDOC = "[ZValue = 0]\nTiltAngle = 3\n"
TILT_STAR = "data_a\nloop_\n_rlnTomoYTilt\n_rlnTomoZRot\n_rlnTomoXShiftAngst\n_rlnTomoYShiftAngst\n"
PROJ = "data_a\nloop_\n_rlnTomoProjX\n_rlnTomoProjY\n_rlnTomoProjZ\n"

Content = str | bytes | Callable[[], bytes]
CASES: list[tuple[str, Callable[[Path], Any], Content, str]] = [
    # ending, reader, content, what the message must say
    ("mrc", mrc.open_stack, b"", "is empty"),
    ("mrc", mrc.open_stack, b"short", "less than a header"),
    ("mrc", mrc.open_stack, b"not an image " * 100, "is not an MRC file"),
    ("mrc", mrc.open_stack, os.urandom(0) + bytes(2000), "is not an MRC file"),
    ("mrc", mrc.open_stack, b"\x1f\x8b" + bytes(2000), "gunzip"),
    ("mrc", mrc.open_stack, b"II*\0" + bytes(2000), "tif2mrc"),
    ("hdf", mrc.open_stack, b"\x89HDF\r\n" + bytes(2000), "HDF5"),
    ("mrc", mrc.open_stack, lambda: good_mrc()[:-1], "cut short"),
    ("mrc", mrc.open_stack, edited(nz=3), "cut short"),
    ("mrc", mrc.open_stack, edited(nx=0), "is not an MRC file"),
    ("mrc", mrc.open_stack, edited(nx=-4), "is not an MRC file"),
    ("mrc", mrc.open_stack, edited(mode=77), "is not an MRC file"),
    ("mrc", mrc.open_stack, edited(mode=4), "mode 4"),
    ("mrc", mrc.open_stack, edited(mode=101), "newstack"),
    ("mrc", mrc.open_stack, edited(nsymbt=-1), "is not an MRC file"),
    ("mrc", mrc.open_stack, edited(nsymbt=10**9), "cut short"),
    ("mrc", mrc.open_stack, edited(mapc=3, maps=1), "axes in the order"),
    ("mrc", mrc.open_stack, edited(cella=(8.0, 60.0, 4.0)), "unequal"),
    ("mrc", mrc.read_volume, edited(cella=(0.0, 0.0, 0.0)), "no pixel size"),
    ("mrc", mrc.read_volume, edited(cella=(np.nan, np.nan, np.nan)), "no pixel size"),
    ("mrc", mrc.read_volume, edited(cella=(8.0, 6.0, 40.0)), "unequal"),
    ("mrc", mrc.read_volume, lambda: good_mrc()[:-4] + np.float32(np.nan).tobytes(), "not finite"),
    ("rawtlt", tilts.read_tilts, "", "is empty"),
    ("rawtlt", tilts.read_tilts, "\n\n", "no numbers"),
    ("rawtlt", tilts.read_tilts, "1\ntwo\n", "line 2"),
    ("rawtlt", tilts.read_tilts, "1\nnan\n", "not finite"),
    ("rawtlt", tilts.read_tilts, "1\n1000\n", "1000 degrees"),
    ("rawtlt", tilts.read_tilts, b"1\n\0\0", "not a text file"),
    ("rawtlt", lambda p: tilts.read_tilts(p, 3), "1\n2\n", "2 angles for 3 images"),
    ("mdoc", mdoc.read_mdoc, "PixelSpacing = 1\n", "no [ZValue"),
    ("mdoc", mdoc.read_mdoc, "[ZValue = 0]\nTiltAngle = steep\n", "not a readable mdoc"),
    ("mdoc", mdoc.read_mdoc, "a = b = c\n" + MDOC, "not a readable mdoc"),
    ("mdoc", mdoc.read_mdoc, "[ZValue = 0]\nDefocus = 1\n", "without TiltAngle"),
    ("mdoc", mdoc.read_mdoc, MDOC + MDOC, "same ZValue twice"),
    ("xf", xf, "1 0 0 1 0\n1 0 0 1 0 0\n", "5 columns, not 6"),
    ("xf", xf, "1 0 0 1 0 0\n", "2 angles for 1 images"),
    ("xf", xf, "1 0 0 1 0 0\n1 0 0 -1 0 0\n", "line 2 mirrors"),
    ("xf", xf, "1 0 0 1 0 0\n0 0 0 0 0 0\n", "mirrors or flattens"),
    ("defocus", imod.read_defocus, "1 1 0 0\n", "5 columns"),
    ("defocus", imod.read_defocus, "1 0 0 0 0 3\n1 1 0 0 1000\n", "7 columns"),
    ("defocus", imod.read_defocus, "1 0 0 0 0 3\n", "7 columns"),
    ("aln", lambda p: aretomo.read_aln(p, pixel_size=1.0), "# RawSize = 1 1 2\n", "not an .aln"),
    ("aln", lambda p: aretomo.read_aln(p, pixel_size=1.0), "1 2 3\n", "not 10"),
    ("aln", lambda p: aretomo.read_aln(p, pixel_size=1.0), "# RawSize = 9\n", "not a number"),
    ("aln", lambda p: aretomo.read_aln(p, pixel_size=1.0), "# RawSize = 1 1 2\n5 0 1 0 0 1 1 1 0 3\n", "beyond the 2"),
    ("txt", aretomo.read_ctf_table, "1 2 3\n", "not 7"),
    ("star", series, "no blocks\n", "no data_ block"),
    ("star", series, "data_\n\nloop_\n_rlnX\n", "STAR file without|no rows|not a readable|no block"),
    ("star", series, "data_\nloop_\n_rlnX\n1\n", "rlnTomoName"),
    ("star", series, "data_\n\n_rlnTomoParticlesFile  gone.star\n", "refers to gone.star"),
    ("star", series, OPTICS + TOMO + "a 2 0 0 0\n", "optics group 2"),
    ("star", series, OPTICS + TOMO + "a 1 x 0 0\n", "rlnAngleRot of row 1"),
    ("star", series, OPTICS + TOMO + "a 1 0 0 0\n", "rlnCoordinateX"),
    ("star", series, TOMO + "a 1 0 0 0\n", "rlnVoltage"),
    ("star", relion.read_tilt_series, OPTICS, "no alignment"),
    ("star", relion.read_tilt_series, TILT_STAR + "1 2 3\n", "star"),
    ("star", relion.read_tilt_series, TILT_STAR + "1 2 3 inf\n", "rlnTomoYShiftAngst of row 1"),
    ("star", relion.read_tilt_series, PROJ + "[1,0,0] [0,1,0,0] [0,0,1,0]\n", "4 columns"),
    ("star", relion.read_tilt_series, PROJ + "[1,0,0,0] [0,1,0,0] [0,0,-1,0]\n", "not rotations"),
    ("star", relion.read_tilt_series, PROJ + "[1,0,0,5] [0,1,0,0] [0,0,1,0]\n", "translations"),
    ("star", relion.read_tomograms, OPTICS, "rlnTomoName"),
    ("star", relion.read_particles_2d, OPTICS, "rlnImageName"),
    ("star", picks.read_picks, OPTICS, "rlnCoordinateX"),
    ("star", picks.read_picks, POINTS + "1 2 3\n", "in pixels"),
    ("csv", picks.read_picks, "1,2\n", "2 columns"),
    ("csv", picks.read_picks, "1,2,3\n1,2,3,4\n", "line 2 has 4 columns, not 3"),
    ("csv", picks.read_picks, "1,2,b\n", "not a number"),
    ("csv", picks.read_picks, "x,y,z\n", "no coordinates"),
    ("csv", picks.read_picks, "x,y,score\n1,2,3\n", "has columns x, y, score"),
    ("tbl", picks.read_picks, "1 2 3\n", "26 columns"),
    ("mod", picks.read_picks, b"GIMOD" + bytes(300), "not an IMOD model"),
    ("mod", picks.read_picks, b"IMODV1.2" + bytes(232) + b"IEOF", "no points"),
    ("mod", picks.read_picks, b"IMODV1.2" + bytes(232) + b"CONT\0\0\0\x09", "cut short"),
    ("mod", picks.read_picks, b"IMODV1.2" + bytes(232) + b"XXXX\xff\xff\xff\xf8", "damaged"),
    ("xyz3", picks.read_picks, "1 2 3\n", "no kind of coordinate file"),
    ("json", picks.read_picks, "{}", 'no "picks"'),
    ("json", picks.read_picks, "{", "line 1"),
    ("json", picks.read_picks, "[1]", "not a JSON object"),
    ("json", picks.read_picks, '{"picks": {"a": [[1, 2]]}}', "equal length"),
    ("json", picks.read_picks, '{"picks": {"xyz": [[1, 2, 3]], "rot": [1]}}', "some of rot"),
    ("json", picks.read_picks, '{"picks": {"a": [], "b": []}}', "it has a, b"),
    ("json", picks.read_picks, '{"picks": {}}', "it has none"),
    ("json", jsonfile.read_json_alignment, "{}", 'no "alignment"'),
    ("json", jsonfile.read_json_alignment, '{"alignment": {"tilt": [1], "axis": [NaN]}}', "NaN"),
    ("json", jsonfile.read_json_alignment, '{"alignment": {"axis": [1]}}', "has no tilt"),
    ("json", jsonfile.read_json_alignment, '{"alignment": {"tilt": [1, 2], "axis": [1]}}', "1 entries for 2"),
    ("json", jsonfile.read_json_alignment, '{"alignment": {"tilt": ["a"]}}', "not a list of numbers"),
    ("json", truth.read_truth, '{"tilt": [1]}', "simulator's truth"),
    (
        "json",
        truth.read_truth,
        '{"shift_A": [], "poses": [], "pos_A": [], "apix": 1, "tilt": [1]}',
        "not a complete truth",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_malformed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, Callable[[Path], Any], Content, str]
) -> None:
    ending, read, content, message = case
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    data = content() if callable(content) else content
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(InputError) as caught:
        read(path)
    text = str(caught.value)
    assert any(part in text for part in message.split("|")), text
    assert "bad." in text and "\n" not in text and caught.value.remedy


@pytest.mark.parametrize(
    "read",
    [
        mrc.open_stack,
        tilts.read_tilts,
        mdoc.read_mdoc,
        imod.read_defocus,
        aretomo.read_ctf_table,
        series,
        truth.read_truth,
    ],
)
def test_missing_and_folder(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)


def test_steps() -> None:
    assert tilts.tilts_from_step(-3.0, 3.0, 3).tolist() == [-3.0, 0.0, 3.0]
    for start, step, count in ((-60.0, 3.0, 60), (0.0, 0.0, 3), (float("nan"), 1.0, 2)):
        with pytest.raises(InputError, match="correct the start or the step"):
            tilts.tilts_from_step(start, step, count)
