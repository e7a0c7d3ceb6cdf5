"""emc_export: what RELION is given says the same as the set, read back by other means and by the import."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

import emc_export
import emc_import
from libemc import project as projects
from libemc import records
from libemc.methods.average import half_maps
from libemc.methods.subtilts import load_batch
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.slices import Band
from tests.programs.sets import ANGLE, ASTIGMATISM, PHASE, tilt_set

PIXEL, TILTS, COUNT = 6.0, 7, 10


def blobs(box: int = 20) -> torch.Tensor:
    """An asymmetric map: a few Gaussian blobs."""
    place = (torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) - 0.5) * box / 2
    line = torch.arange(box) - box // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 4) for a, b, c in place]).sum(0)


@pytest.fixture
def made(project: Path) -> records.ParticleFile:
    return tilt_set("ours", blobs(), PIXEL, COUNT, TILTS)


def ran(*argv: object) -> int:
    return emc_export.program.main([str(word) for word in (*argv, "--format", "relion31", "--quiet")])


def used(file: records.ParticleFile) -> list[tuple[int, int]]:
    pairs = ((i, j) for i in range(len(file.particles)) for j in range(TILTS))
    return [(i, j) for i, j in pairs if file.tilts.use[j] and file.particles[i].visible[j] and file.particles[i].use]


def test_the_star_file_and_the_images(made: records.ParticleFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("ours", "--output", "out") == 0
    rows = used(made)
    assert capsys.readouterr().out == f"out/particles.star: {len(rows)} images of {COUNT} particles\n"
    blocks = starfile.read("out/particles.star")
    (optics,), table = blocks["optics"].to_dict("records"), blocks["particles"]
    assert (optics["rlnVoltage"], optics["rlnSphericalAberration"], optics["rlnAmplitudeContrast"]) == (
        300.0,
        2.7,
        0.07,
    )
    assert (optics["rlnImagePixelSize"], optics["rlnImageSize"], optics["rlnImageDimensionality"]) == (PIXEL, 20, 2)
    assert optics["rlnCtfDataAreCtfPremultiplied"] == 0
    assert table["rlnImageName"].tolist() == [f"{k:06d}@out/TS_01.mrcs" for k in range(1, len(rows) + 1)]
    assert table["rlnTomoParticleName"].tolist() == [made.particles[i].id for i, _ in rows]
    assert set(table["rlnGroupName"]) == {"TS_01"}
    assert table["rlnRandomSubset"].tolist() == [made.particles[i].half for i, _ in rows]
    np.testing.assert_allclose(table["rlnMicrographPreExposure"], [made.tilts.dose_before[j] for _, j in rows])
    order = np.argsort([made.tilts.dose_before[j] for _, j in rows], kind="stable")
    assert (np.diff(table["rlnCtfBfactor"].to_numpy()[order]) >= 0).all() and table["rlnCtfBfactor"].min() > 0
    for row, (i, j) in zip(table.to_dict("records"), rows, strict=True):
        p, t = made.particles[i], made.tilts
        tilt = Rotation.from_euler("ZYX", [t.axis[j], t.tilt[j], t.xtilt[j]], degrees=True)
        pose = Rotation.from_euler("ZYZ", [p.rot, p.tilt, p.psi], degrees=True).inv()
        image = Rotation.from_euler("ZYZ", [row[f"rlnAngle{a}"] for a in ("Rot", "Tilt", "Psi")], degrees=True).inv()
        np.testing.assert_allclose(image.as_matrix(), (tilt * pose).as_matrix(), atol=1e-7)  # six decimals of a degree
        q = tilt.apply(np.subtract(p.xyz, p.centre))
        np.testing.assert_allclose([row["rlnOriginXAngst"], row["rlnOriginYAngst"]], -q[:2], atol=1e-6)  # subtracted
        assert p.defocus is not None
        uv = p.defocus[j] - q[2] + np.array([ASTIGMATISM, -ASTIGMATISM])
        np.testing.assert_allclose([row["rlnDefocusU"], row["rlnDefocusV"]], uv, atol=1e-5)
        assert (row["rlnDefocusAngle"], row["rlnPhaseShift"]) == (ANGLE, PHASE)
    with mrcfile.open("out/TS_01.mrcs") as ours, mrcfile.open("particles/ours/TS_01.mrcs") as theirs:
        assert ours.header.mode == 2 and ours.is_image_stack() and ours.voxel_size.x == pytest.approx(PIXEL)
        np.testing.assert_array_equal(ours.data, theirs.data[[i * TILTS + j for i, j in rows]].astype(np.float32))


def test_what_is_exported_comes_back_as_the_same_images(made: records.ParticleFile) -> None:
    """Through RELION's form and the import, every image keeps pose, place, CTF and pixels, and the average its map."""
    assert ran("ours") == 0
    assert emc_import.program.main(["--particles", "export/ours/particles.star", "--set", "back", "--quiet"]) == 0
    (ours,), series = projects.open_particles("ours")[1], projects.open_particles("back")[1]
    assert len(series) == TILTS - 1  # an exposure each: what it had received before is shared
    band, scales, count = Band.of(20), [], 0
    for theirs in series:
        for k, p in enumerate(theirs.file.particles):
            before = theirs.file.tilts.dose_before[0]
            i = next(n for n, q in enumerate(made.particles) if q.id == p.parent)
            j = made.tilts.dose_before.index(before)
            one = load_batch(ours, torch.tensor([i]), band)
            at = int((one.tilt == j).nonzero())
            other = load_batch(theirs, torch.tensor([k]), band)
            np.testing.assert_allclose(other.matrices()[0], one.matrices()[at], atol=1e-7)
            np.testing.assert_allclose(other.shift[0], one.shift[at], atol=1e-6)
            assert theirs.half[k] == ours.half[i]
            dose = torch.tensor(3.0)  # ours filters at the end of the exposure, RELION's column says its beginning
            damage = one.transfer[at] / other.transfer[0]
            far = other.transfer[0].abs() > 0.1
            expected = one_exposure(band, dose)
            np.testing.assert_allclose(damage[far], expected[far], rtol=2e-3)  # float32 CTF beside its zeros
            numbers = (i * TILTS + j, k)
            a, b = (np.asarray(s.stack[n], np.float64) for s, n in zip((ours, theirs), numbers, strict=True))
            scales.append((a * b).sum() / (a * a).sum())
            np.testing.assert_allclose(b, scales[-1] * a, atol=2e-3 * np.abs(b).max())  # twice float16
            count += 1
    assert count == len(used(made))
    np.testing.assert_allclose(scales, scales[0], rtol=1e-3)  # one scale for the set
    maps = [half_maps(each, memory=10**9, whiten=False) for each in ([ours], series)]
    fsc = fourier_shell_correlation(maps[0].half1, maps[1].half1).values[1:10]
    assert fsc.min() > 0.999  # weights differ by one exposure's damage


def one_exposure(band: Band, dose: torch.Tensor) -> torch.Tensor:
    """The exposure filter of one more exposure, which multiplies (Grant & Grigorieff: it is exponential in the dose)."""
    kx, ky = band.frequencies(PIXEL)
    critical = 0.245 * (kx**2 + ky**2).sqrt().clamp_min(1e-6) ** -1.665 + 2.81
    return torch.exp(-dose / (2 * critical))


def test_a_tilted_beam_goes_out_and_comes_back(made: records.ParticleFile) -> None:
    tilted = made.optics.model_copy(update={"beam_tilt": (0.75, -1.5)})
    records.update(
        "particles/ours/TS_01.json", lambda file: file.model_copy(update={"optics": tilted}), records.ParticleFile
    )
    assert ran("ours") == 0
    (optics,) = starfile.read("export/ours/particles.star")["optics"].to_dict("records")
    assert (optics["rlnBeamTiltX"], optics["rlnBeamTiltY"]) == (0.75, -1.5)
    assert emc_import.program.main(["--particles", "export/ours/particles.star", "--set", "back", "--quiet"]) == 0
    assert {file.optics.beam_tilt for file in records.load_particles("back")[1].values()} == {(0.75, -1.5)}


def test_premultiplied_unknown_and_magnified(made: records.ParticleFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = "particles/ours/TS_01.json"
    blind = tuple(p.model_copy(update={"defocus": None}) for p in made.particles)
    larger = made.tilts.model_copy(update={"magnification": (1.01,) * TILTS})
    change = {"ctf_premultiplied": True, "particles": blind, "tilts": larger}
    records.update(path, lambda file: file.model_copy(update=change), records.ParticleFile)
    assert ran("ours") == 0
    err = capsys.readouterr().err
    assert "no defocus, which is written as 0" in err and "magnifications differ by up to 1.00%" in err
    blocks = starfile.read("export/ours/particles.star")
    assert blocks["optics"]["rlnCtfDataAreCtfPremultiplied"].tolist() == [1]
    assert set(blocks["particles"]["rlnCtfBfactor"]) == {0.0}


def test_a_class_and_what_is_refused(made: records.ParticleFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("ours", "--class", "1", "--output", "one") == 0
    names = set(starfile.read("one/particles.star")["particles"]["rlnTomoParticleName"])
    assert names == {p.id for p in made.particles if p.class_ == 1}
    capsys.readouterr()
    for argv, message in (
        (("none",), "no such particle set"),
        (("ours", "--class", "9"), "no particles to use"),
    ):
        assert ran(*argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    Path("mine").mkdir()
    Path("mine/particles.star").write_text("precious")
    assert ran("ours", "--output", "mine") == 2 and "did not write it" in capsys.readouterr().err
    assert Path("mine/particles.star").read_text() == "precious" and not Path("mine/TS_01.mrcs").exists()
    assert ran("ours", "--output", "dry", "--dry-run") == 0 and not Path("dry").exists()
    assert emc_export.program.main(["ours"]) == 2
    assert emc_export.program.main(["ours", "--format", "relion9"]) == 2
