"""The simulator's truth in our conventions: positions, defocus and poses against its own per-particle lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io.mrc import open_stack
from libemc.io.truth import read_truth


@pytest.mark.parametrize(("name", "hand", "bad", "motion"), [("conf_01", -1, [], 1.0), ("conf_02", 1, [0], 1.5)])
def test_simulated(shared_data: Path, name: str, hand: int, bad: list[int], motion: float) -> None:
    path = shared_data / f"sim/{name}_truth.json"
    truth, data = read_truth(path), json.loads(path.read_text())
    assert truth.ctf.handedness == hand and np.flatnonzero(~truth.alignment.use).tolist() == bad
    _, height, width = open_stack(shared_data / f"sim/{name}.mrc").shape
    seen = truth.alignment.project(truth.picks.xyz) / truth.pixel_size + (width // 2, height // 2)
    moved = np.array(data["pos2d_px"]).transpose(1, 0, 2) - seen
    assert moved.std() < motion  # px: random motion was simulated per particle …
    np.testing.assert_allclose(moved.mean(axis=(0, 1)), 0, atol=0.2)  # … of 70 particles; half a pixel would be 0.5
    depth = np.einsum("tj,nj->tn", truth.alignment.matrices()[:, 2], truth.picks.xyz)
    mean = (truth.ctf.defocus_u + truth.ctf.defocus_v) / 2
    np.testing.assert_allclose(
        mean[:, None] + hand * depth, np.array(data["particle_defocus"]).T, atol=1e-3
    )  # 5 decimals
    np.testing.assert_allclose(truth.ctf.defocus_u - truth.ctf.defocus_v, data["astig"])
    np.testing.assert_allclose(truth.picks.matrices, data["poses"], atol=2e-5)  # 5 decimals are not quite a rotation


DATA = {
    "apix": 3.0, "tilt": [-3.0, 0.0, 3.0], "nominal": [-3, 0, 3], "acq": [1, 0, 2], "axis": 85.0, "dose": 3.0,
    "shift_A": [[0.0, 0.0]] * 3, "defocus": 3e4, "defocus_handedness": -1, "poses": [np.eye(3).tolist()],
    "pos_A": [[100.0, 0.0, 0.0]], "kv": 300, "cs": 2.7, "ac": 0.07, "thick": 900,
}  # fmt: skip


def test_phase_shift_of_a_plate(tmp_path: Path) -> None:
    """One number, or one per tilt; 0 without a plate."""
    path = tmp_path / "ts_truth.json"
    for said, want in ((None, [0.0] * 3), (35.0, [35.0] * 3), ([60.0, 50.0, 70.5], [60.0, 50.0, 70.5])):
        path.write_text(json.dumps(DATA | ({} if said is None else {"phase_shift": said})))
        assert read_truth(path).ctf.phase_shift.tolist() == want
    path.write_text(json.dumps(DATA | {"phase_shift": [1.0, 2.0]}))
    with pytest.raises(InputError, match="phase_shift has 2 entries for 3 tilts"):
        read_truth(path)


def test_magnification_of_each_tilt(tmp_path: Path) -> None:
    """A list per tilt, as a simulator writes it; 1 where none is said."""
    path = tmp_path / "ts_truth.json"
    for more, want in (({}, [1.0, 1.0, 1.0]), ({"magnification": [0.99, 1.0, 1.02]}, [0.99, 1.0, 1.02])):
        path.write_text(json.dumps(DATA | more))
        truth = read_truth(path)
        assert truth.alignment.magnification.tolist() == want


def test_beam_tilt_of_the_series(tmp_path: Path) -> None:
    """Two numbers; not said by older simulations."""
    path = tmp_path / "ts_truth.json"
    for more, want in (({}, None), ({"beam_tilt": [0.5, -2]}, (0.5, -2.0)), ({"beam_tilt": [0, 0]}, (0.0, 0.0))):
        path.write_text(json.dumps(DATA | more))
        assert read_truth(path).ctf.beam_tilt == want
    for wrong in ([1.0], [1.0, 2.0, 3.0], 1.0, "12", "one", [1.0, None], {"x": 1.0, "y": 2.0}):
        path.write_text(json.dumps(DATA | {"beam_tilt": wrong}))
        with pytest.raises(InputError, match="beam_tilt is not two finite numbers; write beam_tilt as"):
            read_truth(path)
