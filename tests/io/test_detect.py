"""Which reader a file wants; and one alignment, written in every form, comes out the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from libemc.errors import InputError
from libemc.io.detect import read_alignment
from libemc.io.geometry import Alignment
from libemc.io.imod import write_imod_alignment
from libemc.io.star import write_star

SHAPE, PX = (64, 96), 2.0
TILT = np.array([-30.0, 0.0, 30.0])
TRUE = Alignment(tilt=TILT, axis=[84.0, 85.0, 86.0], shift_x=[5.0, -6.0, 7.0], shift_y=[1.0, 2.0, -3.0])
NAMES = {"tilt": "YTilt", "axis": "ZRot", "xtilt": "XTilt", "shift_x": "XShiftAngst", "shift_y": "YShiftAngst"}


def write_all(folder: Path) -> dict[str, list[Path]]:
    write_imod_alignment(TRUE, folder / "a", shape=SHAPE, pixel_size=PX)
    columns = zip(range(3), TRUE.axis, TRUE.shift_x / PX, TRUE.shift_y / PX, TILT, strict=True)
    rows = "".join(f"{i} {a} 1.0 {x} {y} 1 1 1 0 {t}\n" for i, a, x, y, t in columns)
    (folder / "a.aln").write_text(f"# RawSize = 96 64 3\n{rows}")
    table = {f"rlnTomo{name}": getattr(TRUE, key) for key, name in NAMES.items()}
    write_star(folder / "tilts.star", {"TS_01": pd.DataFrame(table)})
    head = {"rlnTomoName": ["TS_01", "TS_02"], "rlnTomoTiltSeriesPixelSize": [PX] * 2}
    head["rlnTomoTiltSeriesStarFile"] = ["tilts.star"] * 2
    write_star(folder / "tomograms.star", {"global": pd.DataFrame(head)})
    section = {key: getattr(TRUE, key).tolist() for key in ("tilt", "axis", "shift_x", "shift_y")}
    content = {"alignment": {**section, "xtilt": 0}, "tilts": {"use": [True, False, True]}}
    content["ctf"] = {"defocus_u": [2e4] * 3, "defocus_v": 1.9e4, "defocus_handedness": -1}
    (folder / "a.json").write_text(json.dumps(content))
    return {kind: [folder / kind] for kind in ("a.xf", "a.aln", "tilts.star", "tomograms.star", "a.json")}


@pytest.mark.parametrize("kind", ["a.xf", "a.aln", "tilts.star", "tomograms.star", "a.json"])
def test_every_form(tmp_path: Path, kind: str) -> None:
    files = write_all(tmp_path)[kind]
    found, ctf = read_alignment(files, shape=SHAPE, pixel_size=PX, nominal=TILT, name="TS_01")
    for key in ("tilt", "axis", "xtilt", "shift_x", "shift_y", "magnification"):
        np.testing.assert_allclose(getattr(found, key), getattr(TRUE, key), atol=1e-5)  # 6 decimals in a STAR file
    assert (ctf is not None) == (kind == "a.json")
    assert found.use.tolist() == [True, kind != "a.json", True]


def test_ctf_beside_it(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    options = {"shape": SHAPE, "pixel_size": PX, "nominal": TILT}
    (tmp_path / "a.defocus").write_text("1 1 0 0 1000 2\n2 2 0 0 2000\n3 3 0 0 3000\n")
    _, ctf = read_alignment([*files["a.xf"], tmp_path / "a.defocus"], **options)
    assert ctf is not None and ctf.defocus_u.tolist() == [1e4, 2e4, 3e4]
    (tmp_path / "ctf.txt").write_text("1 30000 10000 5 0 0.1 9\n2 50000 10000 5 0 0.1 9\n")
    _, ctf = read_alignment([*files["a.json"], tmp_path / "ctf.txt"], **options)  # of the used tilts only
    assert ctf is not None and ctf.defocus_u.tolist() == [3e4, 4e4, 5e4]


def test_truth_is_an_alignment(shared_data: Path) -> None:
    nominal = np.arange(-60, 61, 3.0)
    found, ctf = read_alignment(
        [shared_data / "sim/conf_01_truth.json"], shape=(800, 800), pixel_size=3.0, nominal=nominal
    )
    assert found.count == 41 and ctf is not None and ctf.handedness == -1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "0 alignments"),
        (["a.xf", "a.json"], "2 alignments"),
        (["a.json", "a.json"], "second .json"),
        (["a.mrc"], "no kind of alignment"),
        (["b.xf"], "no .tlt beside"),
    ],
)
def test_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write_all(tmp_path)
    (tmp_path / "b.xf").write_text("1 0 0 1 0 0\n")
    with pytest.raises(InputError, match=message):
        read_alignment([tmp_path / name for name in names], shape=SHAPE, pixel_size=PX, nominal=TILT)


def test_of_another_stack(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    for kind in files:
        with pytest.raises(InputError, match=r"not 4|for 4"):
            read_alignment(files[kind], shape=SHAPE, pixel_size=PX, nominal=np.arange(4.0), name="TS_01")
    with pytest.raises(InputError, match="is of 2 Å/px"):
        read_alignment(files["tomograms.star"], shape=SHAPE, pixel_size=3.0, nominal=TILT, name="TS_01")
    with pytest.raises(InputError, match="has no tomogram TS_09"):
        read_alignment(files["tomograms.star"], shape=SHAPE, pixel_size=PX, nominal=TILT, name="TS_09")
