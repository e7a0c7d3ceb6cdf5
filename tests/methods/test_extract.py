"""Extraction: where patches are cut, to a fraction of a pixel, with which sign, scale and defocus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from libemc.methods import extract
from libemc.methods.subtilts import Particles, TiltGeometry, dose_filter
from libemc.numerics.slices import Band
from libemc.records import (
    Alignment,
    Ctf,
    Deformation,
    ParticleFile,
    Picks,
    Source,
    Tilts,
    TiltSeriesRecord,
    dumps,
    parse,
)


def gaussian_image(shape: tuple[int, int], x: float, y: float, sigma: float = 2.5) -> np.ndarray:
    """A dark spot at (x, y) pixels from the centre n//2 of an image of mean 100."""
    rows, columns = shape
    gy, gx = np.arange(rows) - rows // 2 - y, np.arange(columns) - columns // 2 - x
    return (100 - 50 * np.exp(-0.5 * (gy[:, None] ** 2 + gx**2) / sigma**2)).astype(np.float32)


@pytest.mark.parametrize("shape", [(90, 120), (91, 121)])
@pytest.mark.parametrize(("box", "binning"), [(24, 1), (25, 1), (12, 2), (13, 2)])
def test_patches_are_centred(shape: tuple[int, int], box: int, binning: int) -> None:
    """The spot's centre of mass lies on pixel n//2 to 0.02 px, and white, for fractions and even and odd sizes."""
    x, y = 13.37, -8.62
    cut = extract.extract_tilt(
        torch.from_numpy(gaussian_image(shape, x, y)), torch.tensor([[x, y]]).double(), box, binning
    )
    patch = cut[0].clamp_min(0).double()
    assert patch.max() > 10
    line = torch.arange(box).double() - box // 2
    assert abs(float((patch.sum(0) * line).sum() / patch.sum())) < 0.02
    assert abs(float((patch.sum(1) * line).sum() / patch.sum())) < 0.02


def test_bright_contrast_is_kept() -> None:
    image = torch.from_numpy(-gaussian_image((60, 60), 0, 0))
    assert extract.extract_tilt(image, torch.zeros(1, 2).double(), 20, 1, "bright")[0, 10, 10] > 10


def test_positions_and_defocus_follow_the_conventions() -> None:
    """Conventions 5, 6 and 13 written out by hand for one point: axis 90° brings the specimen's x to the image's y."""
    tilt, angle = 30.0, np.deg2rad(30.0)
    alignment = Alignment(axis=[90.0], tilt=[tilt], xtilt=[0.0], shift_x=[12.0], shift_y=[-6.0], magnification=[1.01])
    ctf = Ctf(defocus_u=[21000.0], defocus_v=[19000.0], angle=[0.0], phase_shift=[0.0], defocus_handedness=-1)
    r = (100.0, 40.0, -60.0)
    q = np.array([r[0] * np.cos(angle) + r[2] * np.sin(angle), r[1], -r[0] * np.sin(angle) + r[2] * np.cos(angle)])
    q = np.array([-q[1], q[0], q[2]])
    found = extract.locate([r], TiltGeometry.of(alignment, [True]), ctf, (200, 300), 3.0, 20)
    want = 1.01 * (q[:2] + np.array([12.0, -6.0])) / 3.0
    np.testing.assert_allclose(found.position[0, 0].numpy(), want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(float(found.defocus[0, 0]), 20000.0 - q[2], rtol=0, atol=1e-6)
    assert bool(found.visible[0, 0])


def test_patches_follow_the_deformation() -> None:
    """Convention 6 for a field that is a straight line along x: the particle's patch is cut where it was moved to."""
    section = Deformation(rows=1, columns=2, field=(400.0, 300.0), dx=((-20.0, 20.0),), dy=((6.0, 10.0),))
    plain = Alignment(axis=[0.0], tilt=[0.0], xtilt=[0.0], shift_x=[7.0], shift_y=[0.0], magnification=[1.02])
    bent = plain.model_copy(update={"deformation": section})
    before = np.array([1.02 * (93.0 + 7.0), 1.02 * -40.0])
    want = before + np.array([20.0 * before[0] / 200.0, 8.0 + 2.0 * before[0] / 200.0])
    geometry = TiltGeometry.of(bent, [True])
    found = extract.locate([(93.0, -40.0, 15.0)], geometry, None, (150, 200), 2.0, 20)
    np.testing.assert_allclose(found.position[0, 0].numpy() * 2.0, want, rtol=0, atol=1e-9)
    image = torch.from_numpy(gaussian_image((150, 200), *(want / 2.0)))
    patch = extract.extract_tilt(image, found.position[:, 0], 24)[0]
    assert patch.argmax() == 12 * 24 + 12
    # the derivative of the position, field included, against finite differences
    point = torch.tensor([93.0, -40.0, 15.0], dtype=torch.float64)
    steps = geometry.project(point + torch.eye(3).double())[0] - geometry.project(point - torch.eye(3).double())[0]
    np.testing.assert_allclose(geometry.around(point)[0, :2].numpy(), steps[:, 0].T.numpy() / 2, atol=1e-6)


def test_tilts_that_do_not_see_a_particle() -> None:
    """Out of the field and unused tilts are not visible, and their patches are zero; the order is particle·T + tilt."""
    alignment = Alignment(axis=[0.0] * 3, tilt=[0.0] * 3, xtilt=[0.0] * 3, shift_x=[0.0, 0.0, 42.0], shift_y=[0.0] * 3)
    geometry = TiltGeometry.of(alignment, [True, False, True])
    found = extract.locate([(0.0, 0.0, 0.0), (5.0, 0.0, 0.0)], geometry, None, (100, 100), 1.0, 20)
    assert found.visible.tolist() == [[True, False, True], [True, False, False]]
    assert torch.isnan(found.defocus).all()
    images = np.random.default_rng(0).normal(size=(3, 100, 100)).astype(np.float32)
    cutting = extract.Cutting(20)
    patches = extract.PatchStack(images, found, extract.measure(images, found, cutting), cutting)
    blocks = list(extract.extract(patches, [0, 1], memory=1))
    assert len(blocks) == 2  # as little memory as there can be: one particle a block
    stack = np.concatenate(blocks)
    assert stack.shape == (6, 20, 20) and stack.dtype == np.float16
    assert [bool(np.any(image)) for image in stack] == [True, False, True, True, False, False]
    # white noise of unit variance after scaling (500 background pixels in each tilt: 3 % standard error)
    assert abs(float(stack[0].astype(float).std()) - 1) < 0.15


def test_doses_are_the_records_or_none() -> None:
    """Grant & Grigorieff's filter at 1/10 Å at the end of each exposure, written out; 1 without doses."""
    source = Source(stack="s.mrc", shape=(2, 60, 60), pixel_size=2.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07)
    tilts = Tilts(nominal=(0.0, 3.0), use=(True, True), dose=(3.0, 3.0), dose_before=(3.0, 0.0))
    zeros = (0.0, 0.0)
    alignment = Alignment(axis=zeros, tilt=(0.0, 3.0), xtilt=zeros, shift_x=zeros, shift_y=zeros)
    picks = {"p": Picks(xyz=((0.0, 0.0, 0.0),))}
    record = TiltSeriesRecord(name="s", source=source, tilts=tilts, alignment=alignment, picks=picks)
    patches = extract.locate(picks["p"].xyz, TiltGeometry.of(alignment, tilts.use), None, (60, 60), 2.0, 20)
    band = Band.of(20)
    at = int(((band.kx == 4) & (band.ky == 0)).nonzero()[0])
    for dose, expected in ((True, [6.0, 3.0]), (False, [0.0, 0.0])):
        file = extract.particle_file(record, "p", "set", 20, 2.0, "c1", patches, dose)
        series = Particles.of(file, np.zeros((2, 20, 20), np.float32)).series
        found = dose_filter(series, band, 2.0)[:, at]
        critical = 0.245 * 0.1**-1.665 + 2.81
        np.testing.assert_allclose(found, np.exp(-np.array(expected) / (2 * critical)), rtol=1e-5)


@pytest.mark.parametrize("beam_tilt", [None, (0.5, -1.5)])
def test_beam_tilt_is_handed_over(beam_tilt: tuple[float, float] | None) -> None:
    source = Source(stack="s.mrc", shape=(1, 60, 60), pixel_size=2.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07)
    zero = (0.0,)
    alignment = Alignment(axis=zero, tilt=zero, xtilt=zero, shift_x=zero, shift_y=zero)
    ctf = Ctf(defocus_u=(2e4,), defocus_v=(2e4,), angle=zero, phase_shift=zero, beam_tilt=beam_tilt)
    picks = {"p": Picks(xyz=((0.0, 0.0, 0.0),))}
    tilts = Tilts(nominal=zero, use=(True,))
    record = TiltSeriesRecord(name="s", source=source, tilts=tilts, alignment=alignment, ctf=ctf, picks=picks)
    patches = extract.locate(picks["p"].xyz, TiltGeometry.of(alignment, tilts.use), ctf, (60, 60), 2.0, 20)
    file = extract.particle_file(record, "p", "set", 20, 2.0, "c1", patches)
    assert file.optics.beam_tilt == beam_tilt and (file.optics.voltage, file.optics.cs) == (300.0, 2.7)
    for text in (dumps(record), dumps(file)):  # records of before it was known stay as they are
        assert ("beam_tilt" in text) == (beam_tilt is not None)


def noisy_series(contrast: str, raw_box: int) -> tuple[TiltSeriesRecord, np.ndarray, TiltGeometry, extract.Patches]:
    """Five tilts, the second unused, magnified and deformed; of 30 points some at the edges, one out of the field."""
    rng = np.random.default_rng(5)
    zeros = (0.0,) * 5
    field = Deformation(
        rows=2, columns=3, field=(300.0, 280.0), dx=tuple(tuple(r) for r in rng.normal(0, 4, (5, 6)).tolist()),
        dy=tuple(tuple(r) for r in rng.normal(0, 4, (5, 6)).tolist()),
    )  # fmt: skip
    alignment = Alignment(
        axis=(84.3,) * 5, tilt=(-40.0, -20.0, 0.0, 20.0, 40.0), xtilt=(1.5,) * 5, shift_x=(3.0, 0.0, -7.7, 11.0, 2.2),
        shift_y=(0.0, 1.0, 5.5, -3.3, 8.1), magnification=(0.99, 1.0, 1.0, 1.005, 1.01), deformation=field,
        thickness=500.0,
    )  # fmt: skip
    xyz = (rng.uniform(-0.5, 0.5, (30, 3)) * (290, 270, 80)).tolist()
    picks = Picks(xyz=tuple(tuple(p) for p in [*xyz[:20], (900.0, 0.0, 0.0), *xyz[20:]]))
    source = Source(
        stack="s.mrc",
        shape=(5, 140, 151),
        pixel_size=2.0,
        voltage=300.0,
        cs=2.7,
        amplitude_contrast=0.07,
        contrast=contrast,
    )
    tilts = Tilts(nominal=zeros, use=(True, False, True, True, True))
    record = TiltSeriesRecord(name="s", source=source, tilts=tilts, alignment=alignment, picks={"p": picks})
    images = rng.normal(50, 9, source.shape).astype(np.float32).astype(np.int16)
    geometry = TiltGeometry.of(alignment, tilts.use)
    return record, images, geometry, extract.locate(picks.xyz, geometry, None, source.shape[1:], 2.0, raw_box)


@pytest.mark.parametrize("contrast", ["dark", "bright"])
@pytest.mark.parametrize(("box", "binning"), [(24, 1), (25, 1), (12, 2), (9, 3)])
def test_patches_are_the_same_whenever_they_are_cut(contrast: str, box: int, binning: int) -> None:
    """Bit for bit: in blocks of one particle or of many, with two threads, and out of the written record in any order."""
    record, images, _, patches = noisy_series(contrast, box * binning)
    cutting = extract.Cutting(box, binning, contrast)
    stack = extract.PatchStack(images, patches, extract.measure(images, patches, cutting), cutting)
    kept = torch.nonzero(patches.visible.any(dim=1))[:, 0].tolist()
    assert 20 not in kept and 20 < len(kept) <= 30 and not patches.visible[kept][:, [0, 2, 3, 4]].all()
    written = np.concatenate(list(extract.extract(stack, kept, 1 << 30)))
    assert np.array_equal(written, np.concatenate(list(extract.extract(stack, kept, 1))))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert np.array_equal(written, np.concatenate(list(extract.extract(stack, kept, 1 << 30))))
    finally:
        torch.set_num_threads(threads)
    file = extract.particle_file(record, "p", "set", box, 2.0 * binning, "c1", patches)
    file = file.model_copy(update={"raw": extract.raw_section(record, "0", stack)})
    file = parse(ParticleFile, dumps(file), "s.json")
    again = extract.patch_stack(file, file.raw, images)
    number = np.random.default_rng(0).permutation(len(written))
    assert again[number].dtype == np.float32
    assert np.array_equal(again[number], written[number].astype(np.float32))
    # a part of the particles in another order, whose images stay where they are
    some = [file.particles[i].model_copy(update={"image": i}) for i in (17, 3, 11)]
    part = extract.patch_stack(file.model_copy(update={"particles": tuple(some)}), file.raw, images)
    number = np.array([17 * 5 + 4, 3 * 5, 11 * 5 + 2, 11 * 5 + 1])
    assert np.array_equal(part[number], written[number].astype(np.float32)) and not written[11 * 5 + 1].any()


def test_a_patch_over_the_edge_holds_the_mean_there() -> None:
    """What lies beyond the image is its mean, before the shift by a fraction and the removal of the background."""
    _, images, _, patches = noisy_series("bright", 24)
    levels = extract.measure(images, patches, extract.Cutting(24, 1, "bright"))
    np.testing.assert_allclose(levels.mean[[0, 2, 3, 4]], images[[0, 2, 3, 4]].mean((1, 2)), rtol=1e-6)
    assert levels.mean[1] == levels.noise[1] == 0
    corner = torch.tensor([[-75.0, -70.0]], dtype=torch.float64)  # the pixel in the middle is the image's first
    found = extract.cut([images[0]], corner, levels.mean[:1], extract.Cutting(24, 1, "bright"))[0].numpy()
    want = np.full((24, 24), float(levels.mean[0]))
    want[12:, 12:] = images[0, :12, :12]
    away = np.hypot(*np.meshgrid(*(np.arange(24) - 12,) * 2)) > 0.9 * 12
    np.testing.assert_allclose(found, want - want[away].mean(), atol=1e-10)
