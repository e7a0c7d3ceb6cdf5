"""AreTomo: its .aln against the .xf that its own exporter writes of the same numbers, and real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io.aretomo import read_aln, read_ctf_table
from libemc.io.imod import read_imod_alignment
from libemc.io.tilts import write_tilts

NOMINAL = np.arange(-9.0, 10.0, 3.0)


def write_aln(path: Path, sections: np.ndarray, tilt: np.ndarray, shift: np.ndarray, alpha: float = 0.0) -> None:
    head = f"# AreTomo Alignment / Priims bprmMn\n# RawSize = 64 96 7\n# AlphaOffset = {alpha}\n# SEC ROT\n"
    rows = [f"{s} 84.5 1.0 {x} {y} 1 1 1 0 {t}" for s, t, (x, y) in zip(sections, tilt, shift, strict=True)]
    path.write_text(head + "\n".join(rows) + "\n# Local Alignment\n 0 0 1 2 3 4 1.0\n")


def test_same_as_the_xf_that_aretomo_exports(tmp_path: Path) -> None:
    shift = np.random.default_rng(5).normal(size=(7, 2)) * 20
    write_aln(tmp_path / "a.aln", np.arange(7), NOMINAL, shift)
    angle = -np.deg2rad(84.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    lines = [[*turn.ravel(), *(-turn @ s)] for s in shift]
    (tmp_path / "a.xf").write_text("\n".join(" ".join(map(str, line)) for line in lines))
    write_tilts(tmp_path / "a.tlt", NOMINAL)
    aln = read_aln(tmp_path / "a.aln", pixel_size=2.0)
    # odd sides: AreTomo's centre n/2 and IMOD's (n-1)/2 are then both our n//2, up to AreTomo's own half pixel
    xf = read_imod_alignment(tmp_path / "a.xf", tmp_path / "a.tlt", shape=(63, 97), pixel_size=2.0)
    for name in ("axis", "tilt", "shift_x", "shift_y"):
        np.testing.assert_allclose(getattr(aln, name), getattr(xf, name), atol=1e-9)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("offset", [0.0, 4.2])
@pytest.mark.parametrize("by_angle", [False, True])
def test_lines_find_their_images(tmp_path: Path, first: int, offset: float, by_angle: bool) -> None:
    nominal = NOMINAL[[3, 4, 2, 1, 5, 6, 0]]  # dose-symmetric, as taken
    kept = np.array([0, 1, 2, 4, 6])
    rank = np.argsort(np.argsort(nominal))
    numbers = (rank[kept] if by_angle else kept) + first
    write_aln(tmp_path / "a.aln", numbers, nominal[kept] + offset, np.stack([kept, -kept], 1), offset)
    found = read_aln(tmp_path / "a.aln", pixel_size=2.0, count=7, nominal=nominal)
    np.testing.assert_array_equal(np.flatnonzero(found.use), kept)
    np.testing.assert_allclose(found.tilt, nominal + offset)
    np.testing.assert_allclose(found.shift_x[kept], 2.0 * kept)
    np.testing.assert_allclose(found.axis, 84.5)


def test_of_another_stack(tmp_path: Path) -> None:
    write_aln(tmp_path / "a.aln", np.arange(7), NOMINAL * 2, np.zeros((7, 2)))
    with pytest.raises(InputError, match="angles that differ"):
        read_aln(tmp_path / "a.aln", pixel_size=1.0, nominal=NOMINAL)
    with pytest.raises(InputError, match="of 7 images, not 8"):
        read_aln(tmp_path / "a.aln", pixel_size=1.0, count=8)


def test_real_files(shared_data: Path) -> None:
    folder = shared_data / "real/metadata/aretomo_imod"
    found = read_aln(folder / "test.aln", pixel_size=1.0)
    assert found.count == 90 and found.use.sum() == 4
    np.testing.assert_allclose(found.axis, -12.6611)
    np.testing.assert_allclose(found.tilt[found.use], [-61.5, -60.0, -58.5, -57.0])
    np.testing.assert_allclose(found.shift_x[found.use], [24.786, 34.451, 9.951, 5.538])
    ctf = read_ctf_table(folder / "test_CTF.txt")
    np.testing.assert_allclose([ctf.defocus_u[0], ctf.defocus_v[0], ctf.angle[0]], [25951.41, 24469.37, 88.08])
    ctffind = read_ctf_table(shared_data / "real/metadata/cryocat/TS_017/017_ctffind4.txt")
    np.testing.assert_allclose(ctffind.defocus_u[0], 14477.870117)


def test_rings_that_were_not_fitted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# Columns\n1 20000 19000 10 1.5707963 0.1 inf\n")
    ctf = read_ctf_table(tmp_path / "a.txt", 1)
    assert ctf.resolution is not None and ctf.resolution[0] == 999
    np.testing.assert_allclose(ctf.phase_shift, 90, atol=1e-5)  # 8 digits of pi/2
