"""IMOD: the half pixel, both directions, and real solutions of real beads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io import imod
from libemc.io.geometry import Alignment
from libemc.io.tilts import write_tilts

PX = 2.5  # Å


def imod_position(
    point: np.ndarray, transform: np.ndarray, d: np.ndarray, tilt: float, xtilt: float, shape: tuple[int, int]
) -> np.ndarray:
    """Where IMOD sees a point (px from the specimen's centre) in the raw image, px from 0, as its manual says."""
    a, b = np.deg2rad([tilt, xtilt])
    x, y, z = point
    y, z = y * np.cos(b) - z * np.sin(b), y * np.sin(b) + z * np.cos(b)
    aligned = np.array([x * np.cos(a) + z * np.sin(a), y])
    centre = (np.array(shape[::-1]) - 1) / 2
    return np.linalg.inv(transform) @ (aligned - d) + centre


@pytest.mark.parametrize("shape", [(64, 96), (63, 97), (64, 97)])
@pytest.mark.parametrize("binning", [1.0, 4.0])
def test_points_are_seen_where_imod_sees_them(tmp_path: Path, shape: tuple[int, int], binning: float) -> None:
    random = np.random.default_rng(3)
    angle, size = np.deg2rad([-84.0, 12.0]), np.array([1.02, 0.97])
    transforms = np.array([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angle]) * size[:, None, None]
    d, tilt, xtilt = random.normal(size=(2, 2)) * 9, np.array([-51.0, 33.0]), np.array([2.0, -3.0])
    lines = np.concatenate([transforms.reshape(2, 4), d / binning], axis=1)
    (tmp_path / "a.xf").write_text("\n".join(" ".join(f"{v:.12f}" for v in line) for line in lines))
    write_tilts(tmp_path / "a.tlt", tilt)
    write_tilts(tmp_path / "a.xtilt", xtilt)
    files = [tmp_path / f"a{kind}" for kind in (".xf", ".tlt", ".xtilt")]
    found = imod.read_imod_alignment(*files, shape=shape, pixel_size=PX, binning=binning)
    points = random.normal(size=(5, 3)) * 20
    ours = found.project(points * PX) / PX + np.array(shape[::-1]) // 2
    theirs = [[imod_position(p, transforms[t], d[t], tilt[t], xtilt[t], shape) for p in points] for t in range(2)]
    np.testing.assert_allclose(ours, theirs, atol=1e-8)  # 12 decimals in the file, times 100 px
    assert found.distortion < 1e-10


@pytest.mark.parametrize("shape", [(64, 96), (63, 97)])
def test_written_and_read_again(tmp_path: Path, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(4)
    alignment = Alignment(
        tilt=np.linspace(-60, 60, 7), axis=84.7 + random.normal(size=7), xtilt=random.normal(size=7),
        shift_x=random.normal(size=7) * 50, shift_y=random.normal(size=7) * 50,
        magnification=1 + random.normal(size=7) / 50,
    )  # fmt: skip
    options = {"shape": shape, "pixel_size": PX, "binning": 2.0}
    paths = imod.write_imod_alignment(alignment, tmp_path / "a", **options)
    found = imod.read_imod_alignment(*paths, **options)
    for name in ("tilt", "axis", "xtilt", "magnification", "shift_x", "shift_y"):  # 4 decimals of angles, 9 of the rest
        np.testing.assert_allclose(
            getattr(found, name), getattr(alignment, name), atol=1e-4 if "tilt" in name else 1e-5
        )


def test_real_beads(shared_data: Path) -> None:
    # tiltalign's own positions against its own solution: a mean residual of 0.70 px. What is more than that here is the
    # distortion of its transforms, which our geometry does not hold. With the other sign of tilt it is 34 px.
    folder = shared_data / "real/fiducials"
    found = imod.read_imod_alignment(
        folder / "midzone2a.tltxf",
        folder / "midzone2a.tlt",
        folder / "midzone2a.xtilt",
        shape=(1024, 1950),
        pixel_size=1.0,
    )
    beads = np.array([line.split()[1:4] for line in (folder / "midzone2afid.xyz").read_text().splitlines()], float)
    beads -= (1950 / 2, 1024 / 2, 0)  # IMOD's model coordinates: the corner of the first pixel is 0
    seen = found.project(beads) + np.array([1950 // 2 + 0.5, 1024 // 2 + 0.5])
    residuals = np.loadtxt(folder / "midzone2a.resid", skiprows=1)
    bead = np.cumsum(np.r_[0, np.diff(residuals[:, 2]) <= 0])
    error = seen[residuals[:, 2].astype(int), bead] - residuals[:, :2]
    radius = np.linalg.norm(residuals[:, :2] - (1950 / 2, 1024 / 2), axis=1)
    assert bead.max() == 46
    assert np.linalg.norm(error, axis=1).mean() < 0.70 + found.distortion * radius.mean()
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=0.3)  # px: the distortion, too; half a pixel would be 0.5


def test_dark_images_of_aretomo_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.xf").write_text("0.1 0.995 -0.995 0.1 3 4\n1 0 0 1 0 0\n0.1 0.995 -0.995 0.1 1 2\n")
    write_tilts(tmp_path / "a.tlt", np.array([-3.0, 0.0, 3.0]))
    found = imod.read_imod_alignment(tmp_path / "a.xf", tmp_path / "a.tlt", shape=(64, 64), pixel_size=1.0)
    assert found.use.tolist() == [True, False, True]
    np.testing.assert_allclose(found.axis, found.axis[0])


def test_defocus_in_its_five_variants(shared_data: Path) -> None:
    folder = shared_data / "real/metadata/imod_defocus"
    first = {  # U, V, angle, phase of the first view, from the files
        "astigmatism_and_phase_shift": (14839, 10687, 32.44, 26.49),
        "astigmatism_phase_shift_and_cutoff_freq": (13314, 9175, 32.43, 29.08),
        "only_astigmatism": (16516, 12067, 31.76, 0),
        "only_phase_shift": (13236, 13236, 0, 10.19),
        "plain_estimation": (13600, 13600, 0, 0),
    }
    for name, expected in first.items():
        ctf = imod.read_defocus(folder / f"TS_03_{name}.defocus")
        found = [ctf.defocus_u[0], ctf.defocus_v[0], ctf.angle[0], ctf.phase_shift[0]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(ctf.defocus_u) == len((folder / "TS_03.xf").read_text().splitlines())


def test_defocus_of_ranges_and_of_the_first_version(tmp_path: Path) -> None:
    path = tmp_path / "a.defocus"
    path.write_text("1 3 -6 0 1000 2\n5 5 6 6 3000\n")  # the middle of views 1 to 3 is view 2
    np.testing.assert_allclose(imod.read_defocus(path, 6).defocus_u, [10000, 10000, 50000 / 3, 70000 / 3, 30000, 30000])
    path.write_text("0 0 -3 -3 1000\n1 1 0 0 2000\n")
    np.testing.assert_allclose(imod.read_defocus(path, 2).defocus_u, [10000, 20000])
    path.write_text("15 0 0 0 0 3\n1 1 0 0 1500 1000 -1.5 0.5\n2 2 3 3 1500 1000 1.5 0.5\n")  # radians, both
    ctf = imod.read_defocus(path)
    np.testing.assert_allclose(ctf.angle, np.rad2deg([-1.5, 1.5]))
    np.testing.assert_allclose(ctf.phase_shift, np.rad2deg(0.5))
    with pytest.raises(InputError, match="names view 2 of 1"):
        imod.read_defocus(path, 1)
