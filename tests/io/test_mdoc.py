"""The mdoc: real ones of SerialEM, the simulator's, and the order of exposures however it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io.mdoc import read_mdoc
from libemc.io.tilts import read_tilts
from libemc.io.truth import read_truth

HEAD = "PixelSpacing = 2.5\nVoltage = 200\n[T = SerialEM: a = b]\n\n[T =     Tilt axis angle = 84.5, binning = 1]\n\n"


def section(z: int, tilt: float, **fields: object) -> str:
    return f"[ZValue = {z}]\nTiltAngle = {tilt}\n" + "".join(f"{k} = {v}\n" for k, v in fields.items()) + "\n"


def test_real_serialem(shared_data: Path) -> None:
    found = read_mdoc(shared_data / "real/serialem/test_000.mdoc", 2)
    assert (found.pixel_size, found.voltage, found.tilt_axis, found.image_file) == (7.88, 300, -90, "test0.mrc")
    assert found.dose is None and found.dose_before is None  # written as 0
    assert found.order is not None and found.order.tolist() == [0, 1]
    found = read_mdoc(shared_data / "real/metadata/cryocat/TS_017/017.mdoc", 60)
    assert found.tilt_axis == 82.9  # RotationAngle says 172.9
    assert found.frames is not None and found.frames[0] == "017_01.mrc"
    assert found.order is not None and found.dose_before is not None and found.dose is not None
    np.testing.assert_allclose(
        found.dose_before, found.order * 2.2395, atol=3
    )  # one exposure's dose: it is not constant
    assert found.target_defocus is not None and set(found.target_defocus) == {30000.0}
    np.testing.assert_allclose(found.tilt, read_tilts(shared_data / "real/metadata/cryocat/TS_017/017.tlt"), atol=0.01)


@pytest.mark.parametrize("name", ["conf_01", "conf_02"])
def test_simulated(shared_data: Path, name: str) -> None:
    found = read_mdoc(shared_data / f"sim/{name}.mdoc")
    truth = read_truth(shared_data / f"sim/{name}_truth.json")
    assert found.order is not None and found.dose_before is not None and found.defocus is not None
    np.testing.assert_array_equal(found.order, truth.order)
    np.testing.assert_allclose(found.dose_before, truth.order * truth.dose, atol=1e-6)
    np.testing.assert_allclose(
        found.defocus, (truth.ctf.defocus_u + truth.ctf.defocus_v) / 2, atol=0.5
    )  # 4 decimals of µm
    np.testing.assert_allclose(found.tilt, truth.nominal, atol=5e-4)


def test_order_and_dose(tmp_path: Path) -> None:
    path = tmp_path / "a.mdoc"
    stamps = ["01-Jan-26  10:02:00", "01-Jan-26  10:00:00", "31-Dec-25  23:59:59"]
    text = "".join(section(z, 3 * z, ExposureDose=z + 1, DateTime=stamps[z]) for z in (2, 0, 1))
    path.write_text(HEAD + text, encoding="latin-1")
    found = read_mdoc(path)
    assert found.z.tolist() == [0, 1, 2] and found.order is not None and found.order.tolist() == [2, 1, 0]
    assert found.dose_before is not None and found.dose_before.tolist() == [5, 3, 0]
    assert (found.pixel_size, found.voltage, found.tilt_axis) == (2.5, 200, 84.5)
    path.write_text(
        HEAD + "".join(section(z, z, DateTime="2026-Jan-01 10:00:00", PriorRecordDose=6 - z) for z in range(3))
    )
    found = read_mdoc(path)  # the same second: by dose
    assert found.order is not None and found.order.tolist() == [2, 1, 0]
    path.write_text(HEAD + "".join(section(z, z, PriorRecordDose=6 - z) for z in range(3)))
    found = read_mdoc(path)  # no time: by dose
    assert found.order is not None and found.order.tolist() == [2, 1, 0]
    path.write_text(HEAD + "".join(section(z, z, ExposureDose=3) for z in range(3)))
    found = read_mdoc(path)  # neither: not known, and so no dose before either
    assert found.order is None and found.dose_before is None
    with pytest.raises(InputError, match="3 sections for 4 images"):
        read_mdoc(path, 4)
