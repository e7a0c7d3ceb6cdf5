"""RELION and Warp: tomograms, tomographic particles with real images, and 2-D particles written and read."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy.spatial.transform import Rotation

from libemc.errors import InputError
from libemc.io import relion
from libemc.io.geometry import Alignment, matrix_from_euler
from libemc.io.mrc import write_stack
from libemc.io.star import write_star

RIBOSOMES = "real/ribosome_tilts/warptools_test_4-tomos_10-ptcls_box-32_angpix-12"
RIBOSOME_MAP = "real/ribosome_tilts/warptools_test_box-32_angpix-12_reconstruct.mrc"
RELION5 = "real/metadata/cryocat/relion5/clean"


def back_projection(particles: relion.ParticleSeries) -> np.ndarray:
    """The map of a CTF-premultiplied set, by plain trilinear insertion: an implementation of its own."""
    n, volume, weight = 32, np.zeros(32**3, complex), np.zeros(32**3)
    k = np.arange(n) - n // 2
    ky, kx = (a.ravel() for a in np.meshgrid(k, k, indexing="ij"))
    length, azimuth = np.hypot(kx, ky) / (n * 12.0) + 1e-9, np.arctan2(ky, kx)
    wavelength = 0.0196875  # Å, 300 kV
    for p in range(particles.count):
        tomogram = particles.tomograms[particles.tomogram[p]]
        assert tomogram.alignment is not None and tomogram.ctf is not None and tomogram.dose_before is not None
        assert particles.visible is not None
        pose = matrix_from_euler(particles.rot[p], particles.tilt[p], particles.psi[p])
        images, index = particles.open_images(p)
        for j in np.flatnonzero(particles.visible[p]):
            c = tomogram.ctf
            u, v, a = c.defocus_u[j], c.defocus_v[j], np.deg2rad(c.angle[j])
            z = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (azimuth - a))
            chi = np.pi * wavelength * z * length**2 - np.pi / 2 * 2.7e7 * wavelength**3 * length**4
            ctf = np.sqrt(1 - 0.07**2) * np.sin(chi) + 0.07 * np.cos(chi)
            damage = np.exp(-tomogram.dose_before[j] / (2 * (0.245 * length**-1.665 + 2.81)))
            image = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images.array[index[j]].astype(float)))).ravel()
            q = (tomogram.alignment.matrices()[j] @ pose).T @ np.stack([kx, ky, 0 * kx]) + n // 2
            base = np.floor(q).astype(int)
            for corner in np.ndindex(2, 2, 2):
                at = base + np.array(corner)[:, None]
                w = np.prod(1 - np.abs(q - at), axis=0) * ((at >= 0) & (at < n)).all(axis=0)
                flat = np.ravel_multi_index(np.clip(at, 0, n - 1)[::-1], (n, n, n))
                volume += np.bincount(flat, w * (image * damage).real, n**3)
                volume += 1j * np.bincount(flat, w * (image * damage).imag, n**3)
                weight += np.bincount(flat, w * (ctf * damage) ** 2, n**3)
    spectrum = (volume / (weight + 0.05 * weight.max())).reshape(n, n, n)
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum))).real


def shells(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fourier shell correlation, shells 1 to 8."""
    k = np.fft.fftfreq(32) * 32
    shell = np.rint(np.sqrt(sum(g**2 for g in np.meshgrid(k, k, k, indexing="ij")))).astype(int).ravel()
    fa, fb = np.fft.fftn(a).ravel(), np.fft.fftn(b).ravel()
    sums = [np.bincount(shell, x)[1:9] for x in ((fa * fb.conj()).real, np.abs(fa) ** 2, np.abs(fb) ** 2)]
    return sums[0] / np.sqrt(sums[1] * sums[2])


def test_real_ribosomes(shared_data: Path) -> None:
    particles = relion.read_particle_series(shared_data / f"{RIBOSOMES}_optimisation_set.star")
    assert particles.count == 40 and set(particles.tomograms) == {"Unt_083", "Unt_050", "Unt_076", "Unt_088"}
    assert particles.optics[0] == relion.OpticsGroup("opticsGroup1", 12.0, 32, 300.0, 2.7, 0.07, True)
    assert particles.of("Unt_050").count == 10
    # all particles lie in the tomogram, whose sides are 4400, 6000, 1400 px of 1.667 Å: coordinates are in image pixels
    assert (np.abs(particles.xyz) < np.array([4400, 6000, 1400]) * 1.667 / 2).all()
    # P·A of the files, exactly
    rows = starfile.read(shared_data / f"{RIBOSOMES}_tomograms.star", always_dict=True)["Unt_083.tomostar"]
    alignment = particles.tomograms["Unt_083"].alignment
    assert alignment is not None
    for row, axis in enumerate("XYZ"):
        expected = [[float(v) for v in vector.strip("[]").split(",")[:3]] for vector in rows[f"rlnTomoProj{axis}"]]
        np.testing.assert_allclose(alignment.matrices()[:, row], expected, atol=1e-6)  # 7 digits in the file
    # The README's figures for P·A against the mirrored map; our weights differ a little, hence the 0.15.
    reference = np.asarray(mrcfile.read(shared_data / RIBOSOME_MAP), float)
    mirrored_reference = np.roll(reference[::-1], 1, axis=0)
    found = shells(back_projection(particles), mirrored_reference)
    np.testing.assert_allclose(found, [0.98, 0.95, 0.92, 0.89, 0.80, 0.67, 0.60, 0.66], atol=0.15)
    # the mirrored set gives the map in its own hand, as well
    np.testing.assert_allclose(shells(back_projection(particles.mirrored()), reference), found, atol=0.02)


def test_relion_5(shared_data: Path) -> None:
    folder = shared_data / RELION5
    alignment, ctf = relion.read_tilt_series(folder / "relion5_TS_01_tilt.star")
    assert ctf is not None and alignment.count == 40
    first = [getattr(alignment, key)[0] for key in ("xtilt", "tilt", "axis", "shift_x", "shift_y")]
    assert first == [0.0, -57.0, 85.032958, 34.845611, 108.499417]
    assert [ctf.defocus_u[0], ctf.defocus_v[0], ctf.angle[0]] == [39527.78125, 39418.410156, 44.527622]
    particles = relion.read_particle_series(folder / "R5_tutorial_run_data.star")
    assert particles.count == 9053 and set(particles.half) == {1, 2}
    # RELION: R = A(subtomogram)·A(angle), position = coordinate - A(subtomogram)·origin; by scipy
    inner = Rotation.from_euler("ZYZ", [-0.25410, 97.317432, 9.022498], degrees=True).inv()
    outer = Rotation.from_euler("ZYZ", [167.689240, 98.103985, -164.55358], degrees=True).inv()
    pose = matrix_from_euler(particles.rot[0], particles.tilt[0], particles.psi[0])
    np.testing.assert_allclose(pose, (outer * inner).as_matrix(), atol=1e-8)
    expected = np.array([1774.846956, -951.52983, 1127.416439]) - outer.apply([0.028068, 1.040568, 0.365568])
    np.testing.assert_allclose(particles.xyz[0], expected, atol=1e-8)
    with pytest.raises(InputError, match="refers to Tomograms/job006"):
        relion.read_tomograms(folder / "R5_tutorial_run_tomograms.star")
    warp = relion.read_particle_series(
        folder / "warp2_particles_matching.star", folder / "warp2_matching_tomograms.star"
    )
    assert warp.count == 1218 and len(warp.tomograms) == 5


def write_set(folder: Path, matrices: bool) -> Alignment:
    """A tomographic set of one particle and three tilts, its third invisible; geometry in either of RELION's forms."""
    alignment = Alignment(tilt=[-40.0, 0.0, 30.0], axis=85.0, xtilt=[1.0, 2.0, 3.0], shift_x=[5.0, -6, 7], shift_y=8.0)
    write_stack(folder / "tilts.mrc", np.zeros((3, 64, 96)), 2.0)
    write_stack(folder / "p.mrcs", np.zeros((2, 8, 8)), 4.0)
    tilts: dict[str, list] = {
        "rlnMicrographPreExposure": [3.0, 0.0, 6.0],
        "rlnTomoNominalStageTiltAngle": [-40.0, 0, 30],
    }
    tilts |= {"rlnDefocusU": [2e4] * 3, "rlnDefocusV": [1.9e4] * 3, "rlnDefocusAngle": [10.0] * 3}
    if matrices:  # image pixel = T·(tomogram pixel - size/2) + shift/px + image/2
        t = alignment.matrices()
        shift = np.stack([alignment.shift_x, alignment.shift_y, 0 * alignment.tilt], -1) / 2.0
        last = -t @ (50.0, 60.0, 20.0) + shift + (48.0, 32.0, 0.0)
        for row, axis in enumerate("XYZ"):
            tilts[f"rlnTomoProj{axis}"] = [
                f"[{m[0]!s},{m[1]!s},{m[2]!s},{v!s}]" for m, v in zip(t[:, row], last[:, row], strict=True)
            ]
        tilts["rlnTomoProjW"] = ["[0,0,0,1]"] * 3
    else:
        for key, name in {
            "tilt": "YTilt",
            "axis": "ZRot",
            "xtilt": "XTilt",
            "shift_x": "XShiftAngst",
            "shift_y": "YShiftAngst",
        }.items():
            tilts[f"rlnTomo{name}"] = getattr(alignment, key)
    (folder / "tilt_series").mkdir(exist_ok=True)
    write_star(folder / "tilt_series/017.star", {"017": pd.DataFrame(tilts)})
    tomogram = {
        "rlnTomoName": ["017"], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1],
        "rlnTomoHand": [1.0], "rlnTomoTiltSeriesPixelSize": [2.0],
        "rlnTomoTiltSeriesStarFile": ["tilt_series/017.star"],
        "rlnTomoTiltSeriesName": ["tilts.mrc"], "rlnTomoSizeX": [100], "rlnTomoSizeY": [120], "rlnTomoSizeZ": [40],
    }  # fmt: skip
    write_star(folder / "tomograms.star", {"global": pd.DataFrame(tomogram)})
    optics = {
        "rlnOpticsGroup": [3], "rlnOpticsGroupName": ["g"], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [4.0], "rlnImageSize": [8], "rlnBeamTiltX": [0.3],
        "rlnBeamTiltY": [-0.2],
    }  # fmt: skip
    particles = {
        "rlnTomoName": ["017"], "rlnOpticsGroup": [3], "rlnImageName": ["p.mrcs"], "rlnTomoVisibleFrames": ["[1,1,0]"],
        "rlnCoordinateX": [60.0], "rlnCoordinateY": [50.0], "rlnCoordinateZ": [25.0], "rlnOriginXAngst": [1.0],
        "rlnAngleRot": [10.0], "rlnAngleTilt": [20.0], "rlnAnglePsi": [30.0],
    }  # fmt: skip
    write_star(folder / "particles.star", {"optics": pd.DataFrame(optics), "particles": pd.DataFrame(particles)})
    write_star(
        folder / "set.star",
        {"": {"rlnTomoParticlesFile": "particles.star", "rlnTomoTomogramsFile": "tomograms.star"}},
    )
    return alignment


@pytest.mark.parametrize("matrices", [False, True])
def test_both_forms_of_geometry(tmp_path: Path, matrices: bool) -> None:
    alignment = write_set(tmp_path, matrices)
    particles = relion.read_particle_series(tmp_path / "set.star")
    tomogram = particles.tomograms["017"]  # a name that looks like a number stays a name
    assert tomogram.alignment is not None and tomogram.ctf is not None and tomogram.ctf.handedness == 1
    for key in ("tilt", "axis", "xtilt", "shift_x", "shift_y", "magnification"):
        np.testing.assert_allclose(getattr(tomogram.alignment, key), getattr(alignment, key), atol=1e-5)  # 6 decimals
    # RELION 4: unbinned pixels from the corner, origins subtracted
    np.testing.assert_allclose(particles.xyz, [[(60 - 50) * 2 - 1, (50 - 60) * 2, (25 - 20) * 2]])
    stack, index = particles.open_images(0)
    assert stack.shape == (2, 8, 8) and index.tolist() == [0, 1, -1]
    assert particles.optics[0].beam_tilt == (0.3, -0.2)


def test_2d_particles_written_and_read(tmp_path: Path) -> None:
    random, n = np.random.default_rng(6), 5
    values = {
        key: np.round(random.normal(size=n) * 100, 6)
        for key in ("rot", "tilt", "psi", "dx", "dy", "defocus_u", "defocus_v", "defocus_angle", "phase_shift", "scale",
                    "bfactor", "dose_before")
    }  # fmt: skip
    written = relion.Particles2D(
        image=[f"{i + 1:06d}@a b.mrcs" for i in range(n)],
        group=np.array([0, 1, 0, 1, 1]),
        optics=[
            relion.OpticsGroup("one", 2.5, 64, 300.0, 2.7, 0.07),
            relion.OpticsGroup("2", 3.0, 32, 200.0, 2.0, 0.1, True, (0.4, -1.25)),
        ],
        half=np.array([1, 2, 1, 2, 2]),
        group_name=[f"TS_{i:03d}" for i in range(n)],
        micrograph=["m"] * n,
        **values,
    )
    relion.write_particles_2d(tmp_path / "p.star", written)
    found = relion.read_particles_2d(tmp_path / "p.star")
    for key in values:
        np.testing.assert_allclose(getattr(found, key), values[key], atol=1e-6)  # 6 decimals
    assert (found.image, found.optics, found.group_name) == (written.image, written.optics, written.group_name)
    assert found.group.tolist() == written.group.tolist() and found.half.tolist() == written.half.tolist()
    # what RELION itself reads: origins are subtracted, groups count from 1
    table = starfile.read(tmp_path / "p.star")["particles"]
    np.testing.assert_allclose(table["rlnOriginXAngst"], -values["dx"], atol=1e-6)
    assert table["rlnOpticsGroup"].tolist() == [1, 2, 1, 2, 2]
    optics = starfile.read(tmp_path / "p.star")["optics"]
    assert optics["rlnBeamTiltX"].tolist() == [0.0, 0.4] and optics["rlnBeamTiltY"].tolist() == [0.0, -1.25]
    straight = [relion.OpticsGroup("one", 2.5, 64, 300.0, 2.7, 0.07), relion.OpticsGroup("2", 3.0, 32, 200.0, 2.0, 0.1)]
    relion.write_particles_2d(tmp_path / "q.star", relion.Particles2D(**{**vars(written), "optics": straight}))
    assert "BeamTilt" not in (tmp_path / "q.star").read_text()
    with pytest.raises(ValueError, match="no particles"):
        relion.write_particles_2d(tmp_path / "none.star", relion.Particles2D(**{**vars(written), "image": []}))
