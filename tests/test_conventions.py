"""The conventions, one test at least for each numbered sentence, of the whole library against closed forms by hand.

Everything expected here is written out in `by_hand` or in the test itself, with numpy and numbers; nothing of the
library goes into it. The data have no symmetry and sizes are even and odd, so that a flip, a transposition, half a
pixel or a sign cannot hide.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch

import emc_average
import emc_extract
import emc_fsc
import emc_import
import emc_tomogram
from libemc import project as rooms
from libemc.io import mrc
from libemc.methods import average, extract, phantom, postprocess, reconstruct, simulate, subtilts
from libemc.numerics import fourier, slices
from libemc.numerics.ctf import Optics
from libemc.numerics.fsc import Curve, resolution_at
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import euler_from_matrix, matrix_from_euler, rotation_distance, tilt_matrices
from libemc.numerics.symmetry import symmetrise, symmetry_matrices
from libemc.records import Alignment, ParticleFile, load, load_particles, load_tiltseries
from tests import by_hand
from tests.by_hand import PIXEL, HandSeries, blobs_image, blobs_map, pose, rx, ry, rz

SLICE = 0.015
"""Error of the library's interpolation in Fourier space, relative to the largest value: the bound of its own tests."""


def program(module: object, *argv: object) -> None:
    code = module.program.main([str(word) for word in argv])  # type: ignore[attr-defined]
    assert code == 0, argv


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandSeries]:
    """A project with one hand-made tilt series, extracted and averaged by the programs; the working directory is there."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("hand")
    os.chdir(folder)
    series = HandSeries(noise=0.3, unused=(3,), particles=16)
    series.write(folder)
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "ribo", "--box", 32, "--quiet")
    program(emc_average, "ribo", "--path", "avg", "--quiet")
    yield series
    os.chdir(before)


def particle_record(**changes: object) -> dict[str, object]:
    """A particle file's content with one particle and one tilt, by hand: no CTF, no dose, a box of 32."""
    return {
        "kind": "particles", "schema": 1, "set": "s", "name": "TS", "box": 32, "pixel_size": PIXEL,
        "optics": {"voltage": 300.0, "cs": 2.7, "amplitude_contrast": 0.07},
        "tilts": {
            "axis": [0.0], "tilt": [0.0], "xtilt": [0.0], "magnification": [1.0], "dose": [0.0], "dose_before": [0.0],
            "use": [True], "astigmatism": [0.0], "astigmatism_angle": [0.0], "phase_shift": [0.0],
        },
        "particles": [
            {"id": "TS.000000", "xyz": [0.0, 0.0, 0.0], "centre": [0.0, 0.0, 0.0], "rot": 0.0, "tilt": 0.0, "psi": 0.0,
             "half": 1, "visible": [1]}
        ],
    } | changes  # fmt: skip


def particles_of(content: dict[str, object], stack: np.ndarray) -> subtilts.Particles:
    return subtilts.Particles.of(ParticleFile.model_validate_json(json.dumps(content)), stack)


# ------------------------------------------------------------------------------------------------------ units and arrays


@pytest.mark.parametrize("pixel", [2.0, 3.5])
def test_01_units(pixel: float) -> None:
    """Å, degrees, e/Å², kV, mm and 1/Å: the transfer of an image in a record, from numbers alone.

    At 200 kV the wavelength is 0.025079 Å, and Cs of 2.0 mm is 2e7 Å.
    """
    content = particle_record(pixel_size=pixel, optics={"voltage": 200.0, "cs": 2.0, "amplitude_contrast": 0.1})
    tilts = dict(content["tilts"], dose=[2.0], dose_before=[4.0], phase_shift=[30.0])  # type: ignore[call-overload]
    particles = particles_of(content | {"tilts": tilts}, np.zeros((1, 32, 32), np.float32))
    band = slices.Band.of(32)
    lens = torch.tensor([[0.0, 0.0, 30.0]]).double()
    found = subtilts.transfer_function(
        particles.series, torch.tensor([0]), torch.tensor([15000.0]).double(), lens, band, pixel
    )
    k = math.hypot(5, 3) / (32 * pixel)
    chi = math.pi * 0.025079 * 15000 * k**2 - math.pi / 2 * 2e7 * 0.025079**3 * k**4 + math.pi / 6
    damage = math.exp(-6.0 / (2 * 0.8 * (0.245 * k**-1.665 + 2.81)))
    want = (math.sqrt(0.99) * math.sin(chi) + 0.1 * math.cos(chi)) * damage
    at = int(((band.kx == 5) & (band.ky == -3)).nonzero())
    assert float(found[0, at]) == pytest.approx(
        want, abs=2e-3
    )  # the wavelength has five digits: chi to 1e-4 rad a term


def test_01_positions_are_not_in_pixels(hand: HandSeries) -> None:
    """The same record cut at two samplings: Å in it, Å/px in the header, and the particle's size in Å stays."""
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "coarse", "--box", 16, "--bin", 2, "--quiet")
    with mrcfile.open("particles/coarse/TS_hand.mrcs") as coarse, mrcfile.open("particles/ribo/TS_hand.mrcs") as fine:
        assert (float(coarse.voxel_size.x), float(fine.voxel_size.x)) == (4.0, 2.0)
    _, sets = load_particles("coarse")
    (file,) = sets.values()
    for found, want in zip(file.particles, hand.positions, strict=True):
        assert found.xyz == found.centre == tuple(want)


@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 5, 8)])
def test_02_axes_and_rows(shape: tuple[int, int, int], project: Path) -> None:
    """[z, y, x] as the bytes lie, x fastest, nothing flipped on reading or writing."""
    numbers = np.arange(np.prod(shape), dtype=np.float32)  # the order of the bytes on disk
    (project / "by_hand.mrc").write_bytes(by_hand.mrc_bytes(numbers.reshape(shape), 2.0, stack=False))
    read, _ = mrc.read_volume("by_hand.mrc")
    _, rows, columns = shape
    assert read.shape == shape and read[2, 1, 3] == (2 * rows + 1) * columns + 3
    mrc.write_volume("written.mrc", read, 2.0)
    mrc.write_stack("stack.mrcs", read, 2.0)
    for name in ("written.mrc", "stack.mrcs"):
        assert np.array_equal(np.frombuffer(Path(name).read_bytes()[1024:], "<f4"), numbers)


@pytest.mark.parametrize("n", [32, 33])
def test_02_vectors_are_x_y_z(n: int) -> None:
    """A right-handed (x, y, z): what lies at +y is in a higher row, seen along z; Rz turns x to y."""
    axes = tilt_matrices(torch.tensor([90.0, 0.0, 0.0]), torch.tensor([0.0, 90.0, 0.0]), torch.tensor([0.0, 0.0, 90.0]))
    for found, by in zip(axes, (rz(90), ry(90), rx(90)), strict=True):
        np.testing.assert_allclose(found.numpy(), by, atol=1e-15)
    density = torch.from_numpy(blobs_map(n)).float()
    image = slices.project(density, torch.eye(3).double()[None])[0].numpy()
    want = blobs_image((n, n), np.eye(3))
    assert np.abs(image - want).max() < SLICE * want.max()
    assert (
        postprocess.place(density, torch.from_numpy(rz(90)))[n // 2, n // 2 + 6, n // 2] > 0.5
    )  # the blob at +x is at +y


@pytest.mark.parametrize("n", [24, 25])
@pytest.mark.parametrize("binning", [2, 3])
def test_03_origin(n: int, binning: int) -> None:
    """World zero is pixel n//2 of maps, patches, masks and binned images, whatever the binning."""
    big, point = n * binning, np.array([5.3, -7.1])  # Å

    def spot(size: int, pixel: float, at: np.ndarray) -> np.ndarray:
        x, y = (np.exp(-((by_hand.line(size, pixel) - c) ** 2) / 50) for c in at)
        return y[:, None] * x

    fine, want = torch.from_numpy(spot(big, 1.0, point)), spot(n, binning, point)
    for binned in (fourier.resize(fine, (n, n)), reconstruct.bin_image(fine, binning)):
        assert np.abs(binned.numpy() - want).max() < 1e-3  # a Gaussian of 1.7 px, cut at Nyquist; half a pixel: 0.3
    large = torch.from_numpy(spot(big + 31, 1.0, point))  # room for a patch around the point
    cut = extract.extract_tilt((100 - large).float(), torch.from_numpy(point)[None], n, binning)[0]
    assert np.corrcoef(cut.numpy().ravel(), spot(n, binning, np.zeros(2)).ravel())[0, 1] > 0.9999
    ball = soft_sphere(n, 5.0, 0.0).numpy()
    np.testing.assert_allclose(by_hand.centre_of_mass(ball), 0, atol=1e-9)


@pytest.mark.parametrize("n", [28, 29])
def test_03_maps_of_another_sampling(n: int, project: Path) -> None:
    """A reference at half the pixel size, or in another box, is brought to the particles' with its origin kept."""
    (project / "fine.mrc").write_bytes(by_hand.mrc_bytes(blobs_map(2 * n + 4, PIXEL / 2), PIXEL / 2, stack=False))
    found = rooms.read_map("fine.mrc", n, PIXEL).numpy()
    want = blobs_map(n)
    inner = slice(3, -3)  # the ends of the field are periodic while it is resampled
    assert np.abs(found - want)[inner, inner, inner].max() < 1e-3


@pytest.mark.parametrize("shape", [(4, 6, 7), (5, 3, 8)])
def test_04_transforms(shape: tuple[int, int, int]) -> None:
    """Against the defining sum: half of x, unshifted, phases from pixel n//2 of each axis."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=shape)
    matrices = []
    for n in shape:
        k = [*range((n + 1) // 2), *range(-(n // 2), 0)]
        matrices.append(np.exp(-2j * np.pi * np.outer(k, np.arange(n) - n // 2) / n))
    want = np.einsum("zyx,az,by,cx->abc", data, matrices[0], matrices[1], matrices[2][: shape[2] // 2 + 1])
    found = fourier.rfftn_centred(torch.from_numpy(data), 3)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-11)
    np.testing.assert_allclose(fourier.irfftn_centred(found, shape).numpy(), data, atol=1e-12)


@pytest.mark.parametrize("n", [32, 33])
def test_04_slices_are_the_closed_form(n: int) -> None:
    """Coefficients of a slice at (kx, ky, 0) are the transform at Mᵀk, with the phase of an origin at n//2."""
    band = slices.Band.of(n)
    matrix = by_hand.tilt_matrix(84.0, 37.0, -3.0) @ pose(20.0, 50.0, -70.0)
    volume = slices.FourierVolume.from_map(torch.from_numpy(blobs_map(n)).float())
    found = slices.extract_slices(volume, torch.from_numpy(matrix)[None], band)[0].numpy()
    k = np.stack([band.kx.numpy(), band.ky.numpy(), np.zeros(len(band.kx))], axis=1) / (n * PIXEL)
    want = by_hand.blobs_transform(k @ matrix)
    assert np.abs(found - want).max() < SLICE * np.abs(want).max()


# --------------------------------------------------------------------------------------------------------- tilt geometry


@pytest.mark.parametrize("n", [32, 33])
def test_05_projections(n: int) -> None:
    """q = Rz(axis)·Ry(tilt)·Rx(xtilt)·r, for each rotation alone and for all at once."""
    density = torch.from_numpy(blobs_map(n)).float()
    for angles in ((30.0, 0.0, 0.0), (0.0, 40.0, 0.0), (0.0, 0.0, 25.0), (-93.0, 50.0, 4.0)):
        image = slices.project(density, tilt_matrices(*(torch.tensor([a]) for a in angles)))[0].numpy()
        want = blobs_image((n, n), rz(angles[0]) @ ry(angles[1]) @ rx(angles[2]))
        assert np.abs(image - want).max() < SLICE * want.max()


def test_05_points_through_the_programs(hand: HandSeries) -> None:
    """Patches that emc_extract cut around the projections of points, against images drawn at those projections.

    Without noise; float16 and the wings of the CTF that lie outside the patch leave 0.02 px. A sign would be 10 px.
    """
    series = HandSeries(name="TS_quiet", particles=1, seed=3)
    series.positions += (30.0, -20.0, 11.0)
    series.write(Path())
    for box in (40, 41):
        program(emc_extract, "TS_quiet", "--label", "ribo", "--set", f"quiet{box}", "--box", box, "--quiet")
        stack = mrcfile.read(f"particles/quiet{box}/TS_quiet.mrcs").astype(float)
        for j in range(series.count):
            white = blobs_image(
                (box, box), series.matrix(j) @ pose(*series.angles[0]), magnification=series.magnifications[j]
            )
            want = by_hand.filtered(white, series.transfer((box, box), j, series.seen(0, j)[1]))
            cross = np.fft.fftshift(np.fft.ifft2(np.fft.fft2(stack[j]) * np.fft.fft2(want).conj()).real)
            y, x = np.unravel_index(cross.argmax(), cross.shape)
            peak = [cross[y, x - 1 : x + 2], cross[y - 1 : y + 2, x]]
            offset = [(p[2] - p[0]) / (2 * (2 * p[1] - p[0] - p[2])) for p in peak]
            np.testing.assert_allclose(np.array([x, y]) - box // 2 + offset, 0, atol=0.02)


def test_05_simulated(project: Path) -> None:
    """The simulator sees a point where the formula says, for every tilt: a single blob, no ice, no noise."""
    acquisition = simulate.Acquisition((-40.0, 0.0, 40.0), (1, 0, 2), axis=85.0, xtilt=5.0, drift=9.0)
    imaging = simulate.Imaging(defocus=3000.0, astigmatism=0.0, defocus_jitter=0.0)
    specimen = simulate.Specimen(particles=1, spacing=60.0, thickness=160.0, motion=0.0, ice=0.0)
    scene = simulate.lay_out(acquisition, imaging, specimen, (90, 101), 4.0, seed=5)
    x = by_hand.line(24, 4.0)
    ball = np.exp(-(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2) / (2 * 9.0**2)).astype(np.float32)
    truth = scene.truth()
    for j, image in enumerate(simulate.tilt_images(scene, [torch.from_numpy(ball)], noise=False)):
        matrix = by_hand.tilt_matrix(truth["axis"][j], truth["tilt"][j], 5.0)
        q = (matrix @ truth["pos_A"][0])[:2] + truth["shift_A"][j]
        assert np.abs(q).max() < 160
        dark = np.clip(np.median(image) - image, 0, None)
        np.testing.assert_allclose(by_hand.centre_of_mass(dark) * 4.0, q, atol=0.2)
        np.testing.assert_allclose(truth["pos2d_px"][0][j] - (50, 45), q / 4, atol=1e-9)


def test_05_tomogram(hand: HandSeries) -> None:
    """emc_tomogram shows every particle, dark, at its own x, y, z: its correlation with the map in the particle's pose.

    With 5 tilts in 50° z is known to about a voxel; a mirrored or displaced volume has correlation near 0.
    """
    program(
        emc_tomogram, "TS_hand", "--load", "--bin", 1, "--ctf", "multiply", "--thickness", 120, "--no-dose", "--quiet"
    )
    volume, pixel_size = mrc.read_volume("tomograms/TS_hand_bin1.mrc")
    assert pixel_size == PIXEL
    middle = np.array(volume.shape) // 2
    found, mirrored = [], []
    for i in range(hand.particles):
        voxel = np.rint(hand.positions[i] / PIXEL).astype(int)
        z, y, x = middle + voxel[::-1]
        if (np.array([z, y, x]) < 12).any() or (np.array([z, y, x]) + 12 >= volume.shape).any():
            continue
        there = -volume[z - 12 : z + 12, y - 12 : y + 12, x - 12 : x + 12]
        at = hand.positions[i] - voxel * PIXEL
        want = blobs_map(24, rotation=pose(*hand.angles[i]), at=at)
        found.append(np.corrcoef(there.ravel(), want.ravel())[0, 1])
        mirrored.append(np.corrcoef(there[::-1].ravel(), want.ravel())[0, 1])
    assert len(found) >= 8
    assert np.mean(found) > 0.5 and np.mean(found) > np.mean(mirrored) + 0.2


@pytest.mark.parametrize("n", [32, 33])
def test_06_magnification(n: int) -> None:
    """position = mag·(q + shift) about the image centre, the image of a particle scaled with it; absent means 1."""
    angles = [[10.0, -5.0], [20.0, 40.0], [0.0, 2.0]]
    alignment = Alignment(
        axis=angles[0],
        tilt=angles[1],
        xtilt=angles[2],
        shift_x=[8.0, 0.0],
        shift_y=[-3.0, 6.0],
        magnification=[1.05, 0.9],
    )
    r = np.array([40.0, -25.0, 13.0])
    found, _ = subtilts.TiltGeometry.of(alignment, [True, True]).project(torch.from_numpy(r)[None])
    for j, (mag, shift) in enumerate(((1.05, (8.0, -3.0)), (0.9, (0.0, 6.0)))):
        q = by_hand.tilt_matrix(angles[0][j], angles[1][j], angles[2][j]) @ r
        np.testing.assert_allclose(found[0, j].numpy(), mag * (q[:2] + shift), atol=1e-9)
    plain = subtilts.TiltGeometry.of(alignment.model_copy(update={"magnification": None}), [True, True])
    assert plain.magnification.tolist() == [1.0, 1.0]

    band, matrix = slices.Band.of(n), by_hand.tilt_matrix(30.0, 20.0, 0.0)
    volume = slices.FourierVolume.from_map(torch.from_numpy(blobs_map(n)).float())
    values = slices.extract_slices(volume, torch.from_numpy(matrix)[None], band, torch.tensor([1.05]).double())
    image = slices.images_from_band(values, band)[0].numpy()
    want = blobs_image((n, n), matrix, magnification=1.05)
    assert np.corrcoef(image.ravel(), want.ravel())[0, 1] > 0.9999
    assert np.corrcoef(image.ravel(), blobs_image((n, n), matrix).ravel())[0, 1] < 0.999


def test_07_excluded_tilts_keep_their_place(hand: HandSeries) -> None:
    """Tilt 3 is out: lists and stack keep its entry, empty; what stands in its place is never looked at."""
    record = load_tiltseries("TS_hand")
    _, files = load_particles("ribo")
    file = files["TS_hand"]
    assert len(record.tilts.use) == len(file.tilts.tilt) == hand.count == 11 and not record.tilts.use[3]
    assert file.tilts.tilt == hand.tilts and file.tilts.use == tuple(j != 3 for j in range(11))
    with mrcfile.open("particles/ribo/TS_hand.mrcs") as stack:
        images = stack.data.copy().reshape(16, 11, 32, 32)
    assert not images[:, 3].any() and images[:, [0, 1, 2, *range(4, 11)]].any(axis=(2, 3)).all()
    assert all(p.visible[3] == 0 for p in file.particles)
    poisoned = images.copy()
    poisoned[:, 3] = 1000
    visible = file.model_copy(
        update={"particles": tuple(p.model_copy(update={"visible": (1,) * 11}) for p in file.particles)}
    )
    clean, other = (
        average.half_maps([subtilts.Particles.of(f, s.reshape(-1, 32, 32))], 1 << 28).half1
        for f, s in ((file, images), (visible, poisoned))
    )
    assert torch.equal(clean, other)


# ---------------------------------------------------------------------------------------------------------------- poses


def drawn_particles(n: int, rng: np.random.Generator) -> tuple[subtilts.Particles, np.ndarray]:
    """30 particles at random poses in 7 tilts, drawn by hand, 5 Å rms from where their patches are centred; their angles."""
    content, tilts, count = particle_record(box=n), np.linspace(-60, 60, 7), 30
    rot, psi = rng.uniform(-180, 180, (2, count))
    angles = np.stack([rot, np.rad2deg(np.arccos(rng.uniform(-1, 1, count))), psi], axis=1)
    moved = rng.normal(size=(count, 3)) * 3
    rows, images = [], []
    for i, euler in enumerate(angles.tolist()):
        rows.append(content["particles"][0] | {  # type: ignore[index]
            "id": f"TS.{i:06d}", "half": 1 + i % 2, "xyz": (100 + moved[i]).tolist(), "centre": [100.0, 100.0, 100.0],
            **dict(zip(("rot", "tilt", "psi"), euler, strict=True)), "visible": [1] * 7,
        })  # fmt: skip
        for angle in tilts:
            matrix = by_hand.tilt_matrix(85.0, angle, 1.0)
            images.append(blobs_image((n, n), matrix @ pose(*euler), (matrix @ moved[i])[:2]))
    geometry = {key: value * 7 for key, value in content["tilts"].items()}  # type: ignore[attr-defined]
    geometry |= {"axis": [85.0] * 7, "tilt": tilts.tolist(), "xtilt": [1.0] * 7}
    return particles_of(content | {"tilts": geometry, "particles": rows}, np.array(images, np.float32)), angles


@pytest.mark.parametrize("n", [32, 33])
def test_08_density_at_r_plus_Ru(n: int) -> None:
    """The density at r + R·u is the reference at u: a map placed, its projections, and subtilts averaged back.

    The subtilts are drawn by hand, and not centred on the particles' positions.
    """
    rng = np.random.default_rng(3)
    turn = pose(33.0, 61.0, -48.0)
    placed = postprocess.place(torch.from_numpy(blobs_map(n)), torch.from_numpy(turn), [1.5, -1.0, 0.5]).numpy()
    want = blobs_map(n, rotation=turn, at=np.array([1.5, -1.0, 0.5]) * PIXEL)
    assert np.abs(placed - want).max() < 0.02  # cubic splines of blobs of 1.6 px
    particles, angles = drawn_particles(n, rng)
    found = average.half_maps([particles], 1 << 28, whiten=False)
    for half in (found.half1.numpy(), found.half2.numpy()):
        # 105 slices a half; beyond the eighth shell lies 1e-3 of the power
        assert by_hand.shell_correlation(half, blobs_map(n))[1:9].min() > 0.98
    one = next(average.subtomograms(particles, [4])).numpy()  # in the specimen's frame, a missing wedge of 60°
    here, back = (blobs_map(n, rotation=r) for r in (pose(*angles[4]), pose(*angles[4]).T))
    assert np.corrcoef(one.ravel(), here.ravel())[0, 1] > 0.85
    assert np.corrcoef(one.ravel(), back.ravel())[0, 1] < 0.75


def test_08_from_raw_images_to_the_average(hand: HandSeries) -> None:
    """Conventions 1 to 14 at once: record, stack, emc_extract, emc_average; the map in its own hand and place.

    0.95 to 16 Å, 0.7 to 11 Å: what 80 noisy slices a half at one defocus give; any convention turned round fails it.
    """
    for name in ("half1", "half2", "average"):
        found = mrcfile.read(f"avg/{name}.mrc")
        values = by_hand.shell_correlation(found, blobs_map(32))
        assert values[1:5].min() > 0.95 and values[5:7].min() > 0.7
        mirrored = np.roll(found[::-1], 1, axis=0)
        assert by_hand.shell_correlation(mirrored, blobs_map(32))[2:8].mean() < 0.5
        assert found[16, 16, 16] > 0.5 * found.max()  # white, and the blob at the origin is at the origin


@pytest.fixture(scope="module")
def nine() -> tuple[HandSeries, np.ndarray]:
    series = HandSeries(particles=9, noise=0.2, seed=2)
    return series, series.stack()


@pytest.mark.parametrize("change", ["handedness", "axis", "tilt", "shift", "euler", "contrast"])
def test_08_a_record_that_is_wrong_spoils_the_average(
    change: str, project: Path, nine: tuple[HandSeries, np.ndarray]
) -> None:
    """The test above can fail: each convention turned round in the record costs the map its correlation."""
    series, stack = nine
    series.write(project, stack)
    info = project / "info/TS_hand_info.json"
    record = json.loads(info.read_text())
    alignment, picks = record["alignment"], record["picks"]["ribo"]
    if change == "axis":
        alignment["axis"] = [180 - a for a in alignment["axis"]]
    elif change == "tilt":
        alignment["tilt"] = [-t for t in alignment["tilt"]]
    elif change == "shift":
        alignment["shift_x"] = [-s for s in alignment["shift_x"]]
    elif change == "euler":
        picks["rot"], picks["psi"] = picks["psi"], picks["rot"]
    elif change == "contrast":
        record["source"]["contrast"] = "bright"
    elif change == "handedness":
        record["ctf"]["defocus_u"] = [-u for u in record["ctf"]["defocus_v"]]  # overfocus in place of underfocus
        record["ctf"]["defocus_v"] = [u - series.astigmatism for u in record["ctf"]["defocus_u"]]
    info.write_text(json.dumps(record))
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "ribo", "--box", 32, "--quiet")
    program(emc_average, "ribo", "--path", "avg", "--quiet")
    assert by_hand.shell_correlation(mrcfile.read("avg/half1.mrc"), blobs_map(32))[2:6].mean() < 0.6


@pytest.mark.parametrize("angles", [(90.0, 0.0, 0.0), (0.0, 90.0, 0.0), (25.0, 64.0, -130.0), (10.0, 180.0, 20.0)])
def test_09_euler_angles(angles: tuple[float, float, float]) -> None:
    """R = Rz(-psi)·Ry(-tilt)·Rz(-rot), in and out of a particle file."""
    want = rz(-angles[2]) @ ry(-angles[1]) @ rz(-angles[0])
    found = matrix_from_euler(*(torch.tensor(a).double() for a in angles))
    np.testing.assert_allclose(found.numpy(), want, atol=1e-12)
    back = [float(a) for a in euler_from_matrix(torch.from_numpy(want))]
    np.testing.assert_allclose(pose(*back), want, atol=1e-12)
    row = dict(particle_record()["particles"][0], rot=angles[0], tilt=angles[1], psi=angles[2])  # type: ignore[index]
    particles = particles_of(particle_record(particles=[row]), np.zeros((1, 32, 32), np.float32))
    np.testing.assert_allclose(particles.rotation[0].numpy(), want, atol=1e-12)
    (written,) = particles.to_file().particles
    np.testing.assert_allclose(pose(written.rot, written.tilt, written.psi), want, atol=1e-12)


def test_09_a_particle_turned_by_rot_90() -> None:
    """In words: rot 90 alone brings the reference's +y to the specimen's +x."""
    np.testing.assert_allclose(pose(90.0, 0.0, 0.0) @ [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(matrix_from_euler(90.0, 0.0, 0.0).numpy() @ [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], atol=1e-12)


def turn_about(axis: tuple[float, float, float], order: int) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = np.array(axis) / math.hypot(*axis)
    k, a = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), 2 * math.pi / order
    return np.eye(3) + math.sin(a) * k + (1 - math.cos(a)) * k @ k


GOLDEN = (1 + math.sqrt(5)) / 2
AXES = {
    "c5": (5, [(5, (0, 0, 1))]),
    "d7": (14, [(7, (0, 0, 1)), (2, (1, 0, 0))]),
    "d2": (4, [(2, (0, 0, 1)), (2, (0, 1, 0)), (2, (1, 0, 0))]),
    "t": (12, [(3, (0, 0, 1)), (2, (0, math.sqrt(2), 1))]),
    "o": (24, [(4, (0, 0, 1)), (4, (1, 0, 0)), (3, (1, 1, 1)), (2, (1, 1, 0))]),
    "i": (60, [(2, (0, 0, 1)), (2, (1, 0, 0)), (5, (0, 1, GOLDEN)), (3, (1, 0, GOLDEN**2)), (3, (1, 1, 1))]),
}
"""Order of each group and axes that it must have; of I1 the front-most 5-folds lie in the yz plane (RELION's manual)."""


@pytest.mark.parametrize("name", AXES)
def test_10_symmetry_axes(name: str) -> None:
    """The operators are there, and a reference made from copies S·u of a blob is invariant under its group."""
    order, axes = AXES[name]
    group = symmetry_matrices(name).numpy()
    assert len(group) == order
    for fold, axis in axes:
        assert np.abs(group - turn_about(axis, fold)).max(axis=(1, 2)).min() < 1e-9, (fold, axis)


@pytest.mark.parametrize("n", [28, 29])
def test_10_equivalent_poses_are_RS(n: int) -> None:
    """A pose R·S gives the images of R for a symmetric map, S·R does not; a map symmetrised is Σ over S·u."""
    s, r = turn_about((0, 0, 1), 3), pose(20.0, 50.0, 80.0)
    copies = np.zeros((n, n, n))
    for k in range(3):
        copies += blobs_map(n, rotation=np.linalg.matrix_power(s, k))
    density = torch.from_numpy(copies).float()
    images = slices.project(density, torch.from_numpy(np.stack([r, r @ s, s @ r]))).numpy()
    assert np.abs(images[0] - images[1]).max() < SLICE * images[0].max() < np.abs(images[0] - images[2]).max()
    assert float(rotation_distance(torch.from_numpy(r), torch.from_numpy(r @ s), "c3")) < 1e-5
    assert float(rotation_distance(torch.from_numpy(r), torch.from_numpy(s @ r), "c3")) > 10
    found = symmetrise(torch.from_numpy(blobs_map(n)).float(), "c3").numpy() * 3
    assert np.corrcoef(found.ravel(), copies.ravel())[0, 1] > 0.999
    particles, _ = drawn_particles(n, np.random.default_rng(3))
    half = average.half_maps([particles], 1 << 28, "c3", whiten=False).half1.numpy()
    assert by_hand.shell_correlation(half, copies)[1:7].min() > 0.95  # each image three times, interpolated each time


# --------------------------------------------------------------------------------------------------------- the transfer


@pytest.mark.parametrize("n", [32, 33])
@pytest.mark.parametrize("angle", [0.0, 35.0, -60.0])
def test_11_ctf_on_a_grid(n: int, angle: float) -> None:
    """Every coefficient of an image's half plane, astigmatic, with a phase shift; and of a tomogram's tiles.

    Tolerance: the wavelength's closed form has six digits, chi reaches 60 rad.
    """
    u, v, phase = 21000.0, 19000.0, 15.0
    kx, ky = by_hand.frequencies((n, n), 3.0)
    want = by_hand.ctf(kx, ky, u, v, angle, phase, 300.0, 2.7, 0.1)[:, : n // 2 + 1]
    kx_half = np.abs(kx[:, : n // 2 + 1])  # the last column of an even size is -Nyquist for numpy
    inside = np.hypot(kx_half, ky[:, : n // 2 + 1]) * 3.0 < 0.5 - 1e-9
    band = slices.Band.of(n)
    particles = particles_of(
        particle_record(box=n, pixel_size=3.0, optics={"voltage": 300.0, "cs": 2.7, "amplitude_contrast": 0.1}),
        np.zeros((1, n, n), np.float32),
    )
    lens = torch.tensor([[(u - v) / 2, angle, phase]]).double()
    mean = torch.tensor([(u + v) / 2]).double()
    found = subtilts.transfer_function(particles.series, torch.tensor([0]), mean, lens, band, 3.0)
    grid = band.put(found)[0].numpy()
    assert np.abs(grid - want)[inside].max() < 2e-3
    one = [torch.tensor([value]).double() for value in (u, v, angle, phase)]
    tiles = reconstruct.CtfCorrection("multiply", *one, -1, Optics(300.0, 2.7, 0.1))
    np.testing.assert_allclose(band.put(tiles.factors(torch.zeros(1), band, 3.0))[0].numpy(), grid, atol=1e-5)
    assert float(found[0, int(((band.kx == 0) & (band.ky == 0)).nonzero())]) == pytest.approx(
        math.sin(math.radians(phase) + math.asin(0.1)), abs=1e-6
    )


def test_11_in_words() -> None:
    """CTF(0) = +A; more underfocus brings the first zero inwards; U is the defocus along its own axis."""
    x = torch.linspace(0, 0.05, 2001)
    optics, zero = Optics(300.0, 2.7, 0.07), torch.zeros(1)

    def first_zero(kx: torch.Tensor, ky: torch.Tensor, u: float, v: float, angle: float) -> float:
        values = subtilts.ctf_model.ctf(kx, ky, *(torch.tensor(a) for a in (u, v, angle)), zero, optics)
        assert float(values[0]) == pytest.approx(0.07, abs=1e-6) and values[1:200].min() > 0
        return float(x[int((values < 0).nonzero()[0])])

    flat = torch.zeros_like(x)
    near, far = (first_zero(x, flat, z, z, 0.0) for z in (20000.0, 40000.0))
    assert near / far == pytest.approx(math.sqrt(2), rel=0.01)
    along, across = (first_zero(*k, 40000.0, 20000.0, 90.0) for k in ((flat, x), (x, flat)))
    assert along == pytest.approx(far, rel=1e-3) and across == pytest.approx(near, rel=1e-3)


def beam_phase(shape: tuple[int, int], pixel: float, tilt: tuple[float, float]) -> np.ndarray:
    """exp(-2πi Cs λ² k² (k·β)) at 300 kV (λ = 0.0196875 Å) and Cs = 2.7 mm, β in mrad, on the full transform of an image."""
    kx, ky = by_hand.frequencies(shape, pixel)
    along = 1e-3 * (kx * tilt[0] + ky * tilt[1])
    return np.exp(-2j * math.pi * 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * along)


@pytest.mark.parametrize("n", [32, 33])
def test_11_a_tilted_beam(n: int) -> None:
    """An image of a tilted beam, in a record that says so, is read as the one that it would be without.

    20 mrad are 0.8 rad at 12 Å; 1e-4 of the largest coefficient for images in single precision.
    """
    tilt, band = (20.0, -12.0), slices.Band.of(n, 10.0)
    white = blobs_image((n, n), pose(20.0, 50.0, -70.0))
    image = by_hand.filtered(white, beam_phase((n, n), PIXEL, tilt))
    told = {"voltage": 300.0, "cs": 2.7, "amplitude_contrast": 0.07, "beam_tilt": list(tilt)}
    read, want, untold = (
        subtilts.load_batch(particles_of(content, picture[None].astype(np.float32)), torch.tensor([0]), band).values
        for picture, content in (
            (image, particle_record(box=n, optics=told)), (white, particle_record(box=n)), (image, particle_record(box=n)),
        )
    )  # fmt: skip
    assert (read - want).abs().max() < 1e-4 * want.abs().max()
    assert (untold - want).abs().max() > 0.02 * want.abs().max()


def test_11_a_tilted_beam_simulated() -> None:
    """The simulator's image of a particle, and the phase by hand: turned round it's another image."""
    tilt = (25.0, -15.0)
    scene = simulate.lay_out(
        simulate.Acquisition((0.0,), (0,), dose=3.0, axis=0.0),
        simulate.Imaging(defocus=5000.0, defocus_jitter=0.0, astigmatism=0.0, beam_tilt=tilt),
        simulate.Specimen(particles=1, spacing=60.0, thickness=200.0, motion=0.0, ice=0.0),
        (96, 96), 2.0, seed=12,
    )  # fmt: skip
    x, y, z = scene.truth()["pos_A"][0]
    (image,) = simulate.tilt_images(scene, [torch.from_numpy(blobs_map(32)).float()], noise=False)
    kx, ky = by_hand.frequencies((96, 96))
    lens = by_hand.ctf(kx, ky, *(5000.0 - z,) * 2, 0.0, 0.0, 300.0, 2.7, 0.07) * by_hand.exposure(kx, ky, 3.0, 300.0)
    white, phase = blobs_image((96, 96), scene.rotations[0], (x, y)), beam_phase((96, 96), PIXEL, tilt)
    found = [
        np.corrcoef(-image.ravel(), by_hand.filtered(white, lens * p).ravel())[0, 1] for p in (phase, phase.conj())
    ]
    assert found[0] > 0.999 and found[1] < 0.99


def test_12_dark_until_extraction(hand: HandSeries) -> None:
    """Raw images and tomograms dark, particles and averages white; a record that says bright is not inverted."""
    i = int(np.abs(hand.positions[:, :2]).sum(axis=1).argmin())
    with mrcfile.open("tiltseries/TS_hand.mrc") as raw, mrcfile.open("particles/ribo/TS_hand.mrcs") as cut:
        whole, patches = raw.data.copy(), cut.data.astype(float).reshape(16, 11, 32, 32)
    rows, columns = np.meshgrid(*(np.arange(32) - 16,) * 2, indexing="ij")
    near = np.hypot(rows, columns) < 14
    for j in (2, 5, 8):
        at, _ = hand.seen(i, j)
        x, y = np.rint(at / PIXEL).astype(int) + np.array([90, 85])
        there = whole[j, y - 16 : y + 16, x - 16 : x + 16]
        white = by_hand.filtered(
            blobs_image((32, 32), hand.matrix(j) @ pose(*hand.angles[i])),
            hand.transfer((32, 32), j, hand.seen(i, j)[1]),
        )
        assert np.corrcoef(there[near], white[near])[0, 1] < -0.5
        assert np.corrcoef(patches[i, j][near], white[near])[0, 1] > 0.5
    bright = HandSeries(particles=1, contrast="bright", name="TS_bright")
    bright.write(Path())
    program(emc_extract, "TS_bright", "--label", "ribo", "--set", "bright", "--box", 32, "--quiet")
    patch = mrcfile.read("particles/bright/TS_bright.mrcs")[5].astype(float)
    white = by_hand.filtered(
        blobs_image((32, 32), bright.matrix(5) @ pose(*bright.angles[0])),
        bright.transfer((32, 32), 5, bright.seen(0, 5)[1]),
    )
    assert np.corrcoef(patch.ravel(), white.ravel())[0, 1] > 0.9


def test_12_simulated_images_are_dark() -> None:
    scene = simulate.lay_out(
        simulate.Acquisition((0.0,), (0,)), simulate.Imaging(defocus=8000.0, phase_shift=90.0),
        simulate.Specimen(particles=1, ice=0.0, motion=0.0), (100, 100), 4.0, seed=1,
    )  # fmt: skip
    (image,) = simulate.tilt_images(scene, [phantom.density(phantom.particle(), 80, 4.0)], noise=False)
    x, y = np.rint(scene.truth()["pos2d_px"][0][0]).astype(int).clip(20, 80)
    assert image[y - 5 : y + 5, x - 5 : x + 5].mean() < image.mean()


@pytest.mark.parametrize("hand_sign", [-1, 1])
def test_13_defocus_gradient(hand_sign: int, project: Path) -> None:
    """defocus_j + hand·q_z: in the particle file, in moved particles, in the tiles of a tomogram, in the simulator.

    Tilted by +40° about an axis along y, a point at +x lies lower (q_z = -x·sin 40°).
    """
    series = HandSeries(hand=hand_sign, particles=4, xtilt=0.0)
    series.write(project)
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "ribo", "--box", 32, "--quiet")
    content = json.loads((project / "particles/ribo/TS_hand.json").read_text())
    assert content["defocus_handedness"] == hand_sign
    for i, particle in enumerate(content["particles"]):
        want = [series.seen(i, j)[1] for j in range(series.count)]
        np.testing.assert_allclose(particle["defocus"], want, atol=1e-6)

    x, sine = 1000.0, math.sin(math.radians(40.0))
    tilts = dict(particle_record()["tilts"], tilt=[40.0])  # type: ignore[call-overload]
    row = dict(particle_record()["particles"][0], xyz=[x, 0.0, 0.0], defocus=[20000.0])  # type: ignore[index]
    moved = particles_of(
        particle_record(tilts=tilts, particles=[row], defocus_handedness=hand_sign), np.zeros((1, 32, 32), np.float32)
    )
    band = slices.Band.of(32)
    kx, ky = band.kx.numpy() / 64.0, band.ky.numpy() / 64.0
    want = by_hand.ctf(kx, ky, *(20000.0 - hand_sign * x * sine,) * 2, 0.0, 0.0, 300.0, 2.7, 0.07)
    transfer = subtilts.load_batch(moved, torch.tensor([0]), band).transfer[0].numpy()
    assert np.abs(transfer - want).max() < 5e-3  # chi up to 80 rad in float32, the wavelength to six digits

    one = [torch.tensor([value]).double() for value in (20000.0, 20000.0, 0.0, 0.0)]
    tiles = reconstruct.CtfCorrection("multiply", *one, hand_sign, Optics(300.0, 2.7, 0.07))
    height = torch.tensor([-x * sine]).double()
    assert np.abs(tiles.factors(height, band, PIXEL)[0].numpy() - want).max() < 5e-3

    specimen = simulate.Specimen(particles=3, thickness=900.0, motion=0.0, ice=0.0, spacing=60.0)
    scene = simulate.lay_out(
        simulate.Acquisition((40.0,), (0,), axis=0.0),
        simulate.Imaging(handedness=hand_sign),
        specimen,
        (80, 90),
        6.0,
        3,
    )
    truth = scene.truth()
    for r, found in zip(truth["pos_A"], truth["particle_defocus"], strict=True):
        height_of = -r[0] * sine + r[2] * math.cos(math.radians(40.0))
        np.testing.assert_allclose(found, truth["defocus"] + hand_sign * height_of, atol=1e-6)


@pytest.mark.parametrize("hand_sign", [-1, 1])
def test_13_simulated_images(hand_sign: int) -> None:
    """A particle far above or below the middle of the ice, in the simulator's image: the defocus of its own height."""
    scene = simulate.lay_out(
        simulate.Acquisition((0.0,), (0,), dose=3.0, axis=0.0),
        simulate.Imaging(defocus=5000.0, defocus_jitter=0.0, astigmatism=0.0, handedness=hand_sign),
        simulate.Specimen(particles=1, spacing=60.0, thickness=3000.0, motion=0.0, ice=0.0),
        (96, 96), 2.0, seed=12,
    )  # fmt: skip
    truth = scene.truth()
    x, y, z = truth["pos_A"][0]
    assert abs(z) > 500 and abs(x) < 60 and abs(y) < 60
    (image,) = simulate.tilt_images(scene, [torch.from_numpy(blobs_map(32)).float()], noise=False)
    kx, ky = by_hand.frequencies((96, 96))
    white = blobs_image((96, 96), scene.rotations[0], (x, y))
    found, damage = [], by_hand.exposure(kx, ky, 3.0, 300.0)
    for sign in (hand_sign, -hand_sign):
        lens = by_hand.ctf(kx, ky, *(5000.0 + sign * z,) * 2, 0.0, 0.0, 300.0, 2.7, 0.07)
        found.append(np.corrcoef(-image.ravel(), by_hand.filtered(white, lens * damage).ravel())[0, 1])
    assert found[0] > 0.999 and found[1] < 0.95


def test_13_default_hand(project: Path) -> None:
    series = HandSeries(particles=1).record()
    del series["ctf"]["defocus_handedness"]
    Path("x_info.json").write_text(json.dumps(series))
    assert load("x_info.json").ctf.defocus_handedness == -1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("voltage", "factor"), [(300.0, 1.0), (200.0, 0.8)])
def test_14_exposure(voltage: float, factor: float) -> None:
    """Numbers of Grant & Grigorieff's curve: Nc(0.1/Å) = 14.14, Nc(0.25/Å) = 5.27 e/Å²; the dose at the exposure's end."""
    content = particle_record(
        pixel_size=1.0, box=40, optics={"voltage": voltage, "cs": 2.7, "amplitude_contrast": 0.07}
    )
    tilts = dict(content["tilts"], dose=[3.0], dose_before=[12.0])  # type: ignore[call-overload]
    particles = particles_of(content | {"tilts": tilts}, np.zeros((1, 40, 40), np.float32))
    band = slices.Band.of(40)
    unknown = torch.tensor([float("nan")]).double()
    found = subtilts.transfer_function(
        particles.series, torch.tensor([0]), unknown, torch.zeros(1, 3).double(), band, 1.0
    )
    for k, critical in ((4, 14.14), (10, 5.27)):
        at = int(((band.kx == 0) & (band.ky == k)).nonzero())
        assert float(found[0, at]) == pytest.approx(math.exp(-15.0 / (2 * factor * critical)), rel=2e-3)  # four digits
    assert float(found[0, int(((band.kx == 0) & (band.ky == 0)).nonzero())]) == 1.0


# ---------------------------------------------------------------------------------------------------------------- files


def test_15_written_headers(hand: HandSeries) -> None:
    """Voxel size in every header, volumes as volumes in mode 2, particle stacks as image stacks in mode 12."""
    with mrcfile.open("avg/average.mrc") as volume, mrcfile.open("particles/ribo/TS_hand.mrcs") as stack:
        assert volume.is_volume() and int(volume.header.mode) == 2 and int(volume.header.mz) == 32
        assert stack.is_image_stack() and int(stack.header.mode) == 12 and int(stack.header.mz) == 1
        for file in (volume, stack):
            assert file.voxel_size.x == file.voxel_size.y == file.voxel_size.z == PIXEL
            data = file.data.astype(float)
            found = [float(file.header[name]) for name in ("dmin", "dmax", "dmean", "rms")]
            np.testing.assert_allclose(found, [data.min(), data.max(), data.mean(), data.std()], rtol=1e-5, atol=1e-6)
    assert mrcfile.validate("avg/average.mrc")


@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
def test_15_modes_read(mode: int, project: Path) -> None:
    values = np.arange(60).reshape(3, 4, 5) - (0 if mode == 6 else 20)
    (project / "a.mrc").write_bytes(by_hand.mrc_bytes(values, 1.5, stack=True, mode=mode))
    images = mrc.open_stack("a.mrc")
    assert np.array_equal(images.array.astype(int), values) and images.pixel_size == 1.5 and images.is_stack


@pytest.mark.parametrize(
    ("what", "words"), [("pixel", ("2.5", "2 Å")), ("shape", ("(11, 170, 181)", "(11, 170, 180)"))]
)
def test_15_a_header_that_disagrees(
    what: str, words: tuple[str, str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The raw stack says one thing, the record another: no program goes on, and the line has both."""
    series = HandSeries(particles=1)
    series.write(project)
    if what == "pixel":
        (project / "tiltseries/TS_hand.mrc").write_bytes(by_hand.mrc_bytes(series.stack(), 2.5, stack=True))
    else:
        record = series.record()
        record["source"]["shape"] = [11, 170, 180]
        (project / "info/TS_hand_info.json").write_text(json.dumps(record))
    for module, argv in (
        (emc_extract, ["TS_hand", "--label", "ribo", "--set", "s", "--box", "32"]),
        (emc_tomogram, ["TS_hand", "--load", "--bin", "2"]),
    ):
        assert module.program.main(argv) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "tiltseries/TS_hand.mrc" in line and "TS_hand" in line
        assert all(word in line for word in words), line
    if what == "pixel":  # unless import was told not to believe the header, and the record says so
        record = series.record()
        record["source"]["header_pixel_size"] = 2.5
        (project / "info/TS_hand_info.json").write_text(json.dumps(record))
        program(emc_extract, "TS_hand", "--label", "ribo", "--set", "s", "--box", 32, "--quiet")


def test_16_crossing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first crossing of 0.143, linear between shells, in Å: of a curve, and of two maps through emc_fsc.

    The maps share their signal below shell 8 and half of it up to shell 10; the FSC is computed again in a plain loop.
    """
    values = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.6, 0.0], dtype=torch.float64)
    frequency = torch.arange(6).double() / 10
    found = resolution_at(Curve(frequency, values, torch.ones(6).double()), 0.143, 3.0)
    assert found == pytest.approx(3.0 / (0.2 + 0.1 * (0.5 - 0.143) / (0.5 - 0.1)), rel=1e-12)

    rng = np.random.default_rng(4)
    n = 32
    k = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    common = np.fft.fftn(rng.normal(size=(n, n, n))) * np.clip((11 - radius) / 4, 0, 1) * 2
    for half in (1, 2):
        noise = np.fft.fftn(rng.normal(size=(n, n, n)))
        volume = np.fft.ifftn(common + noise).real
        (project / f"half{half}.mrc").write_bytes(by_hand.mrc_bytes(volume, 2.5, stack=False))
    curve = by_hand.shell_correlation(mrcfile.read("half1.mrc"), mrcfile.read("half2.mrc"))
    s = next(s for s in range(1, n // 2 + 1) if curve[s] < 0.143)
    want = n * 2.5 / (s - 1 + (curve[s - 1] - 0.143) / (curve[s - 1] - curve[s]))
    program(emc_fsc, "half1.mrc", "half2.mrc", "--quiet")
    written = json.loads((project / "fsc.json").read_text())
    assert written["resolution"] == pytest.approx(want, rel=1e-4)  # maps in float32
    np.testing.assert_allclose(written["curves"]["unmasked"], curve, atol=1e-4)
    assert f"{want:.2f}" in capsys.readouterr().out
    mrc.write_volume("mask.mrc", soft_sphere(n, 11.0, 4.0).numpy(), 2.5)
    program(emc_fsc, "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--overwrite", "--quiet")
    assert {"unmasked", "masked", "corrected"} <= set(json.loads((project / "fsc.json").read_text())["resolutions"])


def test_16_of_an_average(hand: HandSeries) -> None:
    """fsc.json of emc_average: three curves of its two halves, the resolution of each where it first crosses 0.143."""
    content = json.loads(Path("avg/fsc.json").read_text())
    want = by_hand.shell_correlation(mrcfile.read("avg/half1.mrc"), mrcfile.read("avg/half2.mrc"))
    np.testing.assert_allclose(content["curves"]["unmasked"], want, atol=1e-4)
    for name in ("unmasked", "masked", "corrected"):
        curve = content["curves"][name]
        s = next(s for s in range(1, 17) if curve[s] < 0.143)
        crossing = 32 * PIXEL / (s - 1 + (curve[s - 1] - 0.143) / (curve[s - 1] - curve[s]))
        assert content["resolutions"][name]["0.143"] == pytest.approx(crossing, rel=1e-9)


# ---------------------------------------------------------------------------------------------- corrections of single images


def wrong_geometry(series: HandSeries, record: dict[str, Any]) -> list[np.ndarray]:
    """Turn, shift and focus every tilt of a record another way, some degrees, Å and 1500 Å; its T_j as they are then."""
    rng, alignment, lens = np.random.default_rng(6), record["alignment"], record["ctf"]
    for key, size in (("axis", 6.0), ("tilt", 6.0), ("xtilt", 6.0), ("shift_x", 3.0), ("shift_y", 3.0)):
        alignment[key] = (np.array(alignment[key]) + size * rng.choice([-1, 1], series.count)).tolist()
    off = 1500.0 * rng.choice([-1, 1], series.count)
    for key in ("defocus_u", "defocus_v"):
        lens[key] = (np.array(lens[key]) + off).tolist()
    angles = zip(alignment["axis"], alignment["tilt"], alignment["xtilt"], strict=True)
    return [by_hand.tilt_matrix(*three) for three in angles]


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """In degrees: the axis from what is not symmetric in it, the angle from its trace (below 90°)."""
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    return axis / np.linalg.norm(axis) * math.degrees(math.acos((np.trace(matrix) - 1) / 2))


@pytest.mark.parametrize("turned_round", ["nothing", "turn", "shift", "ddefocus", "all left out"])
def test_17_corrections_of_single_images(turned_round: str, project: Path, nine: tuple[HandSeries, np.ndarray]) -> None:
    """Cut out with an alignment and a CTF that are wrong in every tilt; corrections by hand give the average of the right ones.

    What is true is T_j of sentence 5, the shift, and the defocus of sentence 13; what the particle file has is the wrong T'_j,
    and patches around where that sees the particle. So exp(turn) = T_j·T'_jᵀ, and (dx, dy) and ddefocus are the differences
    in where the particle is seen and in its defocus. Any of them the other way round, or none, spoils the average.
    """
    series, stack = nine
    series.write(project, stack)
    info, file = project / "info/TS_hand_info.json", project / "particles/ribo/TS_hand.json"
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "right", "--box", 40, "--quiet")
    program(emc_average, "right", "--path", "right", "--quiet")
    record = json.loads(info.read_text())
    wrong, old, lens = wrong_geometry(series, record), record["alignment"], record["ctf"]
    info.write_text(json.dumps(record))
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "ribo", "--box", 40, "--quiet")
    content = json.loads(file.read_text())
    sign = {key: -1.0 if key == turned_round else 1.0 for key in ("turn", "shift", "ddefocus")}
    for i, p in enumerate(content["particles"]):
        r, rows = series.positions[i], []
        for j, matrix in enumerate(wrong):
            q, seen = matrix @ r, series.matrix(j) @ r + (*series.shifts[j], 0)
            turn = rotation_vector(series.matrix(j) @ matrix.T)
            moved = seen[:2] - q[:2] - (old["shift_x"][j], old["shift_y"][j])
            focus = series.seen(i, j)[1] - ((lens["defocus_u"][j] + lens["defocus_v"][j]) / 2 + series.hand * q[2])
            rows.append([*sign["shift"] * moved, *sign["turn"] * turn, sign["ddefocus"] * focus])
        names = ("dx", "dy", "drot", "dtilt", "dpsi", "ddefocus")
        if turned_round != "all left out":
            p["subtilt"] = dict(zip(names, np.transpose(rows).tolist(), strict=True))
            p["subtilt"] |= {"weight": [1.0] * series.count, "score": [None] * series.count}
    file.write_text(json.dumps(content))
    program(emc_average, "ribo", "--path", "avg", "--quiet")
    halves, right = ([mrcfile.read(f"{run}/half{half}.mrc") for half in (1, 2)] for run in ("avg", "right"))
    curves = [by_hand.shell_correlation(*pair) for pair in zip(halves, right, strict=True)]
    if turned_round != "nothing":
        assert max(curve[6:9].mean() for curve in curves) < 0.4
        return
    # what the particle shows is in the first six shells; beyond, patches that lie elsewhere have other noise at their edges
    assert min(curve[1:6].min() for curve in curves) > 0.95 and min(curve[6:9].mean() for curve in curves) > 0.6
    content["tilts"] |= {"shift_x": [7.0] * series.count, "shift_y": [-9.0] * series.count}  # aligned anew since
    file.write_text(json.dumps(content))
    program(emc_average, "ribo", "--path", "again", "--quiet")
    for half, before in enumerate(halves, start=1):  # patches stay where they were cut
        assert np.array_equal(mrcfile.read(f"again/half{half}.mrc"), before)


# ------------------------------------------------------------------------------------------------------------ the border


def imod_files(series: HandSeries) -> list[str]:
    """.xf, .tlt and .defocus (version 3, nm, no astigmatism), and Dynamo's table of the particles.

    x_aligned - c = A·(x_raw - c) + d about c = (n-1)/2 of pixels from 0, the tilt axis then along y.
    """
    offset = np.array([n // 2 - (n - 1) / 2 for n in series.shape[::-1]])
    xf, defocus = [], ["0 0 0. 0. 0 3"]
    for j in range(series.count):
        a = rz(-series.axis - 0.2 * j)[:2, :2]
        xf.append([*a.ravel(), *(-a @ (series.shifts[j] / series.pixel + offset))])
        defocus.append(f"{j + 1} {j + 1} {series.tilts[j]} {series.tilts[j]} {(series.defocus + 30 * j) / 10}")
    Path("TS_hand.xf").write_text("\n".join(" ".join(f"{v:.8f}" for v in row) for row in xf))
    Path("TS_hand.tlt").write_text("\n".join(map(str, series.tilts)))
    Path("TS_hand.defocus").write_text("\n".join(defocus))
    # voxels counted from 1 of a tomogram of 8 Å, whose middle is its voxel n//2 from 0; zxz, reference to particle
    shape = (20, 41, 44)
    Path("tomogram.mrc").write_bytes(by_hand.mrc_bytes(np.zeros(shape), 8.0, stack=False))
    rows = np.zeros((series.particles, 35))
    for row, position, angles in zip(rows, series.positions, series.angles, strict=True):
        m = pose(*angles).T
        row[3:6] = 0.5, -1.0, 0.25
        row[6:9] = np.rad2deg([math.atan2(m[2, 0], m[2, 1]), math.acos(m[2, 2]), math.atan2(m[0, 2], -m[1, 2])])
        row[23:26] = position / 8.0 + np.array(shape[::-1]) // 2 + 1 - row[3:6]
    Path("picks.tbl").write_text("\n".join(" ".join(f"{v:.9f}" for v in row) for row in rows))
    return ["TS_hand.xf", "TS_hand.tlt", "TS_hand.defocus"]


def aretomo_files(series: HandSeries) -> list[str]:
    """.aln (axis ROT, shifts in pixels) and the table of CTFFIND's form, and a csv file of the particles."""
    lines = ["# AreTomo Alignment / Priims bprmMn", f"# RawSize = {series.shape[1]} {series.shape[0]} {series.count}"]
    lines += ["# AlphaOffset = 0.0", "# SEC ROT GMAG TX TY SMEAN SFIT SCALE BASE TILT"]
    table = ["# Columns: number, defocus 1 and 2 (A), azimuth, phase shift (rad), correlation, spacing (A)"]
    for j, (x, y) in enumerate(series.shifts / series.pixel):
        lines.append(f"{j} {series.axis + 0.2 * j} 1.0 {x:.8f} {y:.8f} 1 1 1 0 {series.tilts[j]}")
        mean, half = series.defocus + 30 * j, series.astigmatism / 2
        table.append(f"{j + 1} {mean + half} {mean - half} {series.angle} {math.radians(series.phase)} 0.1 8.0")
    Path("TS_hand.aln").write_text("\n".join(lines) + "\n# Local Alignment\n")
    Path("TS_hand_CTF.txt").write_text("\n".join(table))
    rows = np.concatenate([series.positions, series.angles], axis=1)
    Path("picks.csv").write_text("x,y,z,rot,tilt,psi\n" + "\n".join(",".join(map(str, row)) for row in rows))
    return ["TS_hand.aln", "TS_hand_CTF.txt"]


def star(name: str, rows: dict[str, list]) -> str:
    """One table of a STAR file."""
    head = "".join(f"_rln{key} #{i}\n" for i, key in enumerate(rows, start=1))
    return (
        f"data_{name}\n\nloop_\n{head}"
        + "\n".join(" ".join(map(str, row)) for row in zip(*rows.values(), strict=True))
        + "\n\n"
    )


def relion_files(series: HandSeries) -> list[str]:
    """RELION-5: tomograms.star with the table of tilts, and particles whose origins are to be subtracted."""
    j = np.arange(series.count)
    mean, half = series.defocus + 30 * j, series.astigmatism / 2
    tilts = {
        "TomoXTilt": [series.xtilt] * series.count, "TomoYTilt": series.tilts, "TomoZRot": series.axis + 0.2 * j,
        "TomoXShiftAngst": series.shifts[:, 0], "TomoYShiftAngst": series.shifts[:, 1], "DefocusU": mean + half,
        "DefocusV": mean - half, "DefocusAngle": [series.angle] * series.count, "PhaseShift": [series.phase] * series.count,
    }  # fmt: skip
    Path("tilts.star").write_text(star("TS_hand", {key: list(value) for key, value in tilts.items()}))
    tomograms = {
        "TomoName": ["TS_hand"],
        "TomoTiltSeriesPixelSize": [2.0],
        "TomoHand": [-1],
        "TomoTiltSeriesStarFile": ["tilts.star"],
    }
    Path("tomograms.star").write_text(star("global", tomograms))
    rows = dict(zip(("AngleRot", "AngleTilt", "AnglePsi"), series.angles.T, strict=True))
    for axis, values, origin in zip("XYZ", series.positions.T, (3.0, -2.0, 1.0), strict=True):
        rows |= {f"CenteredCoordinate{axis}Angst": values + origin, f"Origin{axis}Angst": [origin] * len(values)}
    Path("picks.star").write_text(star("particles", {key: list(value) for key, value in rows.items()}))
    return ["tomograms.star"]


BORDER = {
    "imod and dynamo": (imod_files, ["picks.tbl", "--tomogram", "tomogram.mrc"], {"astigmatism": 0.0, "phase": 0.0}),
    "aretomo and csv": (aretomo_files, ["picks.csv"], {"shape": (170, 182)}),  # its centre is n/2
    "relion 5": (relion_files, ["picks.star"], {"xtilt": 2.0}),
}


@pytest.mark.parametrize("package", BORDER)
def test_border(package: str, project: Path) -> None:
    """From other packages' files to the average: the same map, in its own hand and place, as from our own record."""
    files, picks, changes = BORDER[package]
    series = HandSeries(**{"particles": 9, "noise": 0.2, "seed": 2, "xtilt": 0.0, "magnify": 0.0, **changes})  # type: ignore[arg-type]
    Path("TS_hand.mrc").write_bytes(by_hand.mrc_bytes(series.stack(), series.pixel, stack=True))
    Path("TS_hand.rawtlt").write_text("\n".join(f"{t:.0f}" for t in series.tilts))
    Path("order.txt").write_text("\n".join(map(str, series.order)))
    program(emc_import, "TS_hand.mrc", "--dose", 1, "--dose-order", "order.txt", "--quiet")
    program(emc_import, "--alignment", *files(series), "TS_hand", "--quiet")
    program(emc_import, "--picks", *picks, "--label", "ribo", "TS_hand", "--quiet")
    found, want = load_tiltseries("TS_hand"), series.record()
    assert found.alignment is not None and found.ctf is not None and found.ctf.defocus_handedness == -1
    for key in ("axis", "tilt", "xtilt", "shift_x", "shift_y"):
        np.testing.assert_allclose(getattr(found.alignment, key), want["alignment"][key], atol=1e-4, err_msg=key)
    for key in ("defocus_u", "defocus_v", "phase_shift"):
        np.testing.assert_allclose(getattr(found.ctf, key), want["ctf"][key], atol=1e-4, err_msg=key)
    np.testing.assert_allclose(found.picks["ribo"].xyz, series.positions, atol=1e-4)
    program(emc_extract, "TS_hand", "--label", "ribo", "--set", "ribo", "--box", 32, "--quiet")
    program(emc_average, "ribo", "--path", "avg", "--quiet")
    for half in (1, 2):
        values = by_hand.shell_correlation(mrcfile.read(f"avg/half{half}.mrc"), blobs_map(32))
        assert values[1:5].min() > 0.9  # as `test_08_from_raw_images_to_the_average`, with four particles a half
