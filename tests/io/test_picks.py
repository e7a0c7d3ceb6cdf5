"""Coordinates: every kind of file, written by hand with an asymmetric set, gives the same picks."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from libemc.errors import InputError
from libemc.io.picks import read_picks

SHAPE, PX = (20, 31, 40), 4.0  # [z, y, x]: even and odd sides
INDEX = np.array([[0.0, 0.0, 0.0], [20.0, 15.0, 10.0], [39.0, 3.0, 7.5]])  # voxels from 0, (x, y, z)
XYZ = (INDEX - (20, 15, 10)) * PX
MODEL_ORIGIN = np.array([0.5, 0.5, 0.0])
EULER = np.array([[10.0, 20.0, 30.0], [-50.0, 60.0, 170.0], [0.0, 90.0, -90.0]])
SCORE = np.array([0.3, 0.1, 0.9])


def model(points: np.ndarray, units: int = -9) -> bytes:
    """An IMOD model of one object with two contours and a mesh, to the letter of its specification."""
    head = b"IMODV1.2" + b"name".ljust(128, b"\0") + struct.pack(">3i", SHAPE[2], SHAPE[1], SHAPE[0])
    head += bytes(216 - len(head)) + struct.pack(">fi", PX / 10, units)
    head = head.ljust(240, b"\0")
    body = b"OBJT" + bytes(176)
    for part in (points[:2], points[2:]):
        body += b"CONT" + struct.pack(">4i", len(part), 0, 0, 0) + part.astype(">f4").tobytes()
    body += b"MESH" + struct.pack(">3i2h", 1, 2, 0, 0, 0) + bytes(12 + 8) + b"IMAT" + struct.pack(">i", 16) + bytes(16)
    return head + body + b"IEOF"


def table(tomogram: str = "") -> str:
    columns = ["rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst"]
    columns += ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginYAngst", "rlnAutopickFigureOfMerit"]
    columns += ["rlnTomoName"] if tomogram else []
    text = "data_particles\n\nloop_\n" + "".join(f"_{name} #{i + 1}\n" for i, name in enumerate(columns))
    for xyz, angles, score in zip(XYZ, EULER, SCORE, strict=True):
        row = [xyz[0], xyz[1] + 2, xyz[2], *angles, 2.0, score]  # the origin is subtracted
        text += " ".join(map(str, row)) + (f" {tomogram}" if tomogram else "") + "\n"
        if tomogram:
            text += " ".join(map(str, row)) + " other\n"
    return text


def dynamo() -> str:
    # Dynamo's angles turn the particle onto the reference, zxz about fixed axes: scipy's extrinsic "zxz" of R's inverse
    onto = Rotation.from_euler("ZYZ", EULER, degrees=True)
    angles = onto.as_euler("zxz", degrees=True)
    rows = np.zeros((3, 35))
    rows[:, 3:6], rows[:, 6:9], rows[:, 9], rows[:, 23:26] = (
        (0.5, -1.0, 2.0),
        angles,
        SCORE,
        INDEX + 1 - (0.5, -1.0, 2.0),
    )
    return "\n".join(" ".join(map(repr, map(float, row))) for row in rows)


def lines(*columns: np.ndarray, separator: str = " ") -> str:
    """One line per pick."""
    return "\n".join(separator.join(map(str, row)) for row in np.column_stack(columns))


CASES: dict[str, tuple[str, str | bytes, bool, bool]] = {  # ending, content, has poses, has scores
    "csv": ("csv", lines(XYZ, separator=","), False, False),
    "csv with score": ("csv", lines(XYZ, SCORE, separator=", "), False, True),
    "text": ("txt", "# x y z\n" + lines(XYZ, EULER), True, False),
    "header": (
        "csv",
        "score;z;y;x\n" + lines(SCORE, XYZ[:, ::-1], separator=";"),
        False,
        True,
    ),
    "star": ("star", table(), True, True),
    "star of two": ("star", table("TS_01"), True, True),
    "star of warp": ("star", table("TS_01.tomostar"), True, True),
    "star in pixels": (
        "star",
        "data_\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n" + lines(INDEX),
        False,
        False,
    ),
    "dynamo": ("tbl", dynamo(), True, True),
    "imod": ("mod", model(INDEX + MODEL_ORIGIN), False, False),
    "json": (
        "json",
        json.dumps({"picks": {"ribo": {"xyz": XYZ.tolist(), "rot": EULER[:, 0].tolist(), "tilt": EULER[:, 1].tolist(),
                                       "psi": EULER[:, 2].tolist(), "score": SCORE.tolist()}, "other": {"xyz": []}}}),
        True,
        True,
    ),
    "json list": ("json", json.dumps({"picks": XYZ.tolist()}), False, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_kind(tmp_path: Path, case: str) -> None:
    ending, content, poses, scores = CASES[case]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    picks = read_picks(path, shape=SHAPE, pixel_size=PX, name="TS_01", label="ribo")
    np.testing.assert_allclose(picks.xyz, XYZ, atol=1e-4)  # float32 in a model
    assert (picks.matrices is not None, picks.score is not None) == (poses, scores)
    if picks.matrices is not None:
        expected = Rotation.from_euler("ZYZ", EULER, degrees=True).inv().as_matrix()
        np.testing.assert_allclose(picks.matrices, expected, atol=1e-9)
    if picks.score is not None:
        np.testing.assert_allclose(picks.score, SCORE)


def test_a_model_knows_its_own_size_and_pixel(tmp_path: Path) -> None:
    (tmp_path / "a.mod").write_bytes(model(INDEX + MODEL_ORIGIN))
    np.testing.assert_allclose(read_picks(tmp_path / "a.mod").xyz, XYZ, atol=1e-4)
    (tmp_path / "a.mod").write_bytes(model(INDEX, units=0))  # in pixels: it does not
    with pytest.raises(InputError, match="in pixels"):
        read_picks(tmp_path / "a.mod")


def test_real_relion_5_set(shared_data: Path) -> None:
    path = shared_data / "real/metadata/cryocat/relion5/clean/R5_tutorial_run_data.star"
    picks = read_picks(path, name="TS_01")
    assert 0 < picks.count < 9053 and picks.matrices is not None
    with pytest.raises(InputError, match="has no picks of TS_02"):
        read_picks(path, name="TS_02")
