"""Tomograms against direct back-projection, closed forms, and objects whose place is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from libemc.errors import InputError
from libemc.methods import reconstruct as rec
from libemc.methods.reconstruct import CtfCorrection, Grid, Tiling, Weighting
from libemc.methods.subtilts import Field, TiltGeometry
from libemc.numerics.ctf import Optics
from libemc.numerics.peaks import highest_peak
from libemc.numerics.rotations import tilt_matrices
from libemc.numerics.slices import Band
from libemc.records import Alignment, Source, Tilts, TiltSeriesRecord

REPLICAS = 0.04  # the interpolation kernel's replicas at the edge of what a tile keeps; see `Backprojection`


def geometry(tilts, axis=30.0, xtilt=0.0, shift=None, magnification=None):
    count = len(tilts)
    shift = torch.zeros(count, 2) if shift is None else torch.as_tensor(shift)
    magnification = torch.ones(count) if magnification is None else torch.as_tensor(magnification)
    matrices = tilt_matrices(axis, torch.tensor(tilts, dtype=torch.float64), xtilt)
    return TiltGeometry(matrices, shift.double(), magnification.double(), torch.ones(count, dtype=torch.bool))


def volume_of(images, geometry, grid, **options):
    volume = np.full(grid.shape, np.nan, np.float32)
    row = 0
    for y0, slab in rec.reconstruct(images, geometry, grid, **options):
        assert y0 == row
        row += slab.shape[1]
        volume[:, y0:row] = slab
    assert row == grid.shape[1]
    return volume


def smooth_noise(shape, cut=0.4, seed=0):
    """Images without detail above `cut` cycles per pixel: what can be interpolated exactly."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.standard_normal(shape))
    k = np.hypot(np.fft.fftfreq(shape[-2])[:, None], np.fft.rfftfreq(shape[-1]))
    return np.fft.irfft2(spectrum * (k < cut), s=shape[-2:]).astype(np.float32)


def direct(images, geometry, grid):
    """Σ_j image_j at the projection of each voxel, by splines of order 5; and whether all projections are well inside."""
    axes = [(np.arange(n) - n // 2) * grid.pixel_size for n in grid.shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    turn = Rotation.from_euler("ZYZ", grid.angles, degrees=True).inv().as_matrix()
    points = torch.from_numpy(np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1) @ turn.T + grid.centre)
    positions = geometry.project(points)[0].numpy() / grid.pixel_size
    total, inside = np.zeros(len(points)), np.ones(len(points), bool)
    rows, columns = images.shape[1:]
    for j, image in enumerate(images):
        px, py = positions[:, j, 0] + columns // 2, positions[:, j, 1] + rows // 2
        total += map_coordinates(image, [py, px], order=5, mode="constant")
        inside &= (px > 6) & (px < columns - 7) & (py > 6) & (py < rows - 7)
    return total.reshape(grid.shape), inside.reshape(grid.shape)


TILTS = (-50.0, -30.0, -12.0, 0.0, 17.0, 33.0, 51.0)


@pytest.fixture
def scene():
    """Images, geometry and grid in which nothing is special: turned axis, x tilt, shifts, magnifications, odd sides."""
    shift = np.random.default_rng(1).uniform(-30, 30, (len(TILTS), 2))
    g = geometry(TILTS, axis=31.0, xtilt=4.0, shift=shift, magnification=1 + 0.02 * np.arange(-3, 4))
    return smooth_noise((len(TILTS), 151, 140)), g, Grid((33, 71, 64), 10.0, (20.0, -35.0, 15.0))


@pytest.mark.parametrize("box", [54, 72, 128])
def test_tiles_are_direct_back_projection(scene, box, monkeypatch):
    monkeypatch.setattr(rec, "SMALLEST_TILE", box)
    monkeypatch.setattr(rec, "LARGEST_TILE", box)
    images, g, grid = scene
    expected, inside = direct(images, g, grid)
    assert inside.mean() > 0.5
    got = volume_of(images, g, grid)
    spread = expected[inside].std()
    assert np.sqrt(np.mean((got - expected)[inside] ** 2)) < REPLICAS * spread
    # at the seams between tiles it's no worse
    tiling = Tiling.of(grid.shape, len(images))
    for axis, edges in enumerate(tiling.edges):
        for edge in edges[1:-1]:
            seam = np.take(got - expected, range(edge - 2, edge + 2), axis)[
                np.take(inside, range(edge - 2, edge + 2), axis)
            ]
            assert np.sqrt(np.mean(seam**2)) < REPLICAS * spread


def test_turned_tiles_are_direct_back_projection(scene, monkeypatch):
    monkeypatch.setattr(rec, "SMALLEST_TILE", 54)
    monkeypatch.setattr(rec, "LARGEST_TILE", 54)
    images, g, grid = scene
    g = replace(g, deformation=deformation(len(TILTS), 5.0))
    turned = replace(grid, angles=(25.0, 40.0, -70.0))
    expected, inside = direct(images, g, turned)
    assert inside.mean() > 0.5
    error = volume_of(images, g, turned) - expected
    assert np.sqrt(np.mean(error[inside] ** 2)) < 2 * REPLICAS * expected[inside].std()


def deformation(count, size, nodes=(3, 4), extent=(1500.0, 1600.0), seed=5):
    """A smooth field of `size` Å rms, another one in each tilt."""
    values = np.random.default_rng(seed).normal(0, size, (count, nodes[0] * nodes[1], 2))
    return Field(torch.from_numpy(values), extent, *nodes)


def test_tiles_follow_the_deformation(scene, monkeypatch):
    """Back-projection along the deformed rays. Without the field's slope, tiles would be wrong by it times their size."""
    monkeypatch.setattr(rec, "SMALLEST_TILE", 54)
    monkeypatch.setattr(rec, "LARGEST_TILE", 54)
    images, g, grid = scene
    bent = replace(g, deformation=deformation(len(TILTS), 6.0))
    expected, inside = direct(images, bent, grid)
    spread = expected[inside].std()
    assert np.sqrt(np.mean((direct(images, g, grid)[0] - expected)[inside] ** 2)) > 10 * REPLICAS * spread
    got = volume_of(images, bent, grid)
    # the field's curvature over a tile's 18 voxels adds to the kernel's replicas
    assert np.sqrt(np.mean((got - expected)[inside] ** 2)) < 2 * REPLICAS * spread


def test_deformed_images_give_a_sharp_tomogram():
    """Points imaged with a known field: with it they come back as high as if there had been none, without it lower."""
    pixel_size, side, tilts = 10.0, (120, 128), np.linspace(-60, 60, 31).tolist()
    plain = geometry(tilts, axis=85.0)
    bent = replace(plain, deformation=deformation(31, 12.0, (4, 4), (1280.0, 1200.0)))
    rng = np.random.default_rng(2)
    points = rng.uniform([-400, -400, -80], [400, 400, 80], (12, 3))
    y, x = [(np.arange(n) - n // 2) * pixel_size for n in side]
    height = {}
    for name, seen, told in (("none", plain, plain), ("known", bent, bent), ("ignored", bent, plain)):
        p = seen.project(torch.from_numpy(points))[0].numpy()[..., None, None]
        images = -np.exp(-((x - p[:, :, 0]) ** 2 + (y[:, None] - p[:, :, 1].swapaxes(-1, -2)) ** 2) / 400).sum(0)
        filtered = np.empty((31, *side), np.float32)
        list(rec.prepare_images(lambda j, made=images: made[j], told, 1, pixel_size, Weighting(240.0), filtered))
        volume = volume_of(filtered, told, Grid((24, 100, 100), pixel_size))
        index = np.round(points / pixel_size).astype(int) + np.array([50, 50, 12])
        cuts = [volume[c - 2 : c + 3, b - 2 : b + 3, a - 2 : a + 3] for a, b, c in index]
        height[name] = -np.mean([cut.min() for cut in cuts])
    assert height["known"] > 0.95 * height["none"]  # the rest of the field's bending within a tile
    assert height["ignored"] < 0.8 * height["none"]


def test_threads_and_memory_change_nothing(scene):
    images, g, grid = scene
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = volume_of(images, g, grid)
        torch.set_num_threads(1)
        one = volume_of(images, g, grid)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(one, several)
    small = volume_of(images, g, grid, memory=2 * rec.BYTES_PER_VOXEL * 60**3)
    assert not np.array_equal(one, small)  # other tiles
    assert np.sqrt(np.mean((small - one) ** 2)) < 2 * REPLICAS * one.std()


def test_beyond_the_images_there_is_nothing():
    images = np.ones((1, 40, 40), np.float32)
    volume = volume_of(images, geometry([0.0], axis=0.0), Grid((16, 120, 120), 1.0))
    ring = np.hypot(*np.meshgrid(np.arange(120) - 60, np.arange(120) - 60)) > 40
    assert np.abs(volume[:, ring]).max() < 0.1  # ringing of the images' sharp edges, 10 pixels away
    assert volume[:, 50:70, 50:70].mean() == pytest.approx(1.0, abs=REPLICAS)


@pytest.mark.parametrize(("side", "axis"), [((120, 121), 12.0), ((121, 120), 84.7), ((122, 131), -93.0)])
def test_an_object_is_where_it_is(side, axis):
    """Dark Gaussian blobs, binned twice: each is found, dark, at its place (convention 5)."""
    pixel_size, width = 5.0, 16.0
    points = np.array([[120.0, -90.0, 60.0], [-130.0, 40.0, -70.0], [35.0, 125.0, 10.0]])
    tilts = np.linspace(-60, 60, 41)
    shift = np.random.default_rng(0).uniform(-40, 40, (41, 2))
    g = geometry(tilts.tolist(), axis=axis, xtilt=3.0, shift=shift)
    q = g.project(torch.from_numpy(points))[0].numpy()
    y, x = [(np.arange(n) - n // 2) * pixel_size for n in side]
    images = -sum(
        np.exp(-((x - p[:, 0, None, None]) ** 2 + (y[:, None] - p[:, 1, None, None]) ** 2) / (2 * width**2)) for p in q
    )
    filtered = np.empty((41, *rec.binned_shape(side, 2)), np.float16)
    weighting = Weighting(thickness=300.0)
    assert list(rec.prepare_images(lambda j: images[j], g, 2, 2 * pixel_size, weighting, filtered)) == list(range(41))
    grid = Grid((32, 50, 50), 2 * pixel_size)
    volume = volume_of(filtered, g, grid)
    for point in points:
        index = np.round(point / grid.pixel_size).astype(int) + np.array(grid.shape[::-1]) // 2
        low = index - 5
        cut = volume[low[2] : low[2] + 11, low[1] : low[1] + 11, low[0] : low[0] + 11]
        peak, height = highest_peak(torch.from_numpy(-cut), ndim=3)
        found = (peak.numpy() + low - np.array(grid.shape[::-1]) // 2) * grid.pixel_size
        assert height > 10 * np.median(np.abs(volume))
        # the missing wedge and the other blobs' streaks move a maximum by a fraction of a voxel
        assert np.abs(found - point).max() < 0.35 * grid.pixel_size


# ------------------------------------------------------------------------------------------------------- the filter
def test_filter_is_its_formula():
    g = geometry([-40.0, -5.0, 0.0, 30.0], axis=20.0, xtilt=5.0)
    doses = torch.tensor([9.0, 3.0, 0.5, 30.0])
    errors, paths = torch.tensor([6.0, 0.0, 2.0, 12.0]), torch.tensor([900.0, 700.0, 700.0, 1400.0])
    weighting = Weighting(200.0, doses, errors, paths, noise=0.7, lowpass=30.0)
    shape, pixel_size = (36, 40), 10.0
    ky, kx = np.fft.fftfreq(36)[:, None], np.fft.rfftfreq(40)
    k = np.hypot(kx, ky)

    def left(i):  # Grant & Grigorieff 2015, eq. 3; errors of error²/2 along x and y; electrons that stay elastic
        nc = 0.245 * np.maximum(k / pixel_size, 1e-6) ** -1.665 + 2.81
        blur = np.exp(-2 * math.pi**2 * float(errors[i]) ** 2 / 2 * (k / pixel_size) ** 2)
        elastic = math.exp(-float(paths[i]) / 4000) / math.exp(-700 / 4000)
        return np.exp(-float(doses[i]) / (2 * nc)) * blur * math.sqrt(elastic)

    matrices = g.matrices.numpy()
    for j, gain in enumerate(rec.filters(g, shape, pixel_size, weighting)):
        points = matrices[j].T @ np.stack([kx + 0 * ky, ky + 0 * kx, 0 * k]).reshape(3, -1)
        total = np.full(k.shape, 0.7)
        for i in range(4):
            distance = np.abs(matrices[i, 2] @ points).reshape(k.shape)
            total += left(i) ** 2 * np.maximum(0, 1 - distance * 20.0)
        cut = 1 / 3
        edge = 0.5 + 0.5 * np.cos(math.pi * np.clip((k - cut + rec.NYQUIST_EDGE) / rec.NYQUIST_EDGE, 0, 1))
        expected = left(j) * edge / total
        # radial functions come from a table with 1024 entries per cycle, entered at the nearest
        assert np.allclose(gain.numpy(), expected, atol=0.02 * expected.max())
    ends = next(iter(rec.filters(g, shape, pixel_size, Weighting(200.0))))
    assert ends[0, 0] == pytest.approx(1 / 4)  # all slices share the mean
    assert ends[:, 0].max() <= 1.0 + 1e-6


def test_weights_of_a_record():
    """What is known of the tilts that are chosen, and nothing where it is not known."""
    known = record(0.0, thickness=500.0)
    alignment = known.alignment.model_copy(update={"error": (1.0, 2.0, 3.0), "tilt": (-60.0, 0.0, 45.0)})
    known = known.model_copy(update={"alignment": alignment})
    weighting = Weighting.of(known, Grid.of(known, 4), [0, 2], True, None)
    assert weighting.errors.tolist() == [1.0, 3.0]
    assert weighting.paths.tolist() == pytest.approx([1000.0, 500.0 * math.sqrt(2)])
    assert weighting.doses is None
    bare = record(0.0)
    plain = Weighting.of(bare, Grid.of(bare, 4), [0, 2], True, None)
    assert bool((plain.signal(torch.arange(3.0)) == 1).all()) and plain.noise == rec.SIGNAL_NOISE
    gap = known.model_copy(update={"alignment": alignment.model_copy(update={"error": (None, 2.0, 3.0)})})
    assert Weighting.of(gap, Grid.of(gap, 4), [0, 2], True, None).errors is None
    assert Weighting.of(gap, Grid.of(gap, 4), [1, 2], True, None).errors.tolist() == [2.0, 3.0]


def test_values_that_are_not_finite():
    image = np.zeros((20, 20), np.float32)
    image[3, 4] = np.nan
    out = np.empty((1, 20, 20), np.float32)
    with pytest.raises(InputError, match="image 1"):
        list(rec.prepare_images(lambda j: image, geometry([0.0]), 1, 1.0, Weighting(10.0), out))


def test_window_of_a_tilted_image():
    """Axis along y, 60°: the field's sides are seen at half of their distance, give or take half the thickness's sine."""
    g = geometry([0.0, 60.0, 87.5], axis=0.0, shift=[[0.0, 0.0], [50.0, 0.0], [0.0, 0.0]])
    weighting = Weighting(200.0, field=(2000.0, 2000.0))
    plain, tilted, steep = (rec.field_window(g, j, (200, 200), 10.0, weighting) for j in range(3))
    assert torch.equal(plain, rec.field_window(g, 0, (200, 200), 10.0, Weighting(200.0)))  # nothing but the border
    assert torch.equal(plain, steep)  # hardly any field can be seen
    edge = 0.5 * 1000 + 100 * math.sin(math.radians(60.0))
    x = (np.arange(200) - 100) * 10.0 - 50.0
    inside, outside = np.abs(x) < edge - 1e-6, np.abs(x) > edge + rec.EDGE_TAPER * 2000 + 1e-6
    assert bool((tilted[100, inside] == 1).all())
    assert bool((tilted[100, outside] == 0).all())
    assert float(plain[100, 20]) == 1.0
    assert float(plain[:, 0].max()) < 0.1


def test_what_enters_at_high_tilt_leaves_no_streaks():
    """A bar beyond the field, a hundred times as dark as the noise, is in the images from 30° on."""
    tilts = np.linspace(-60, 60, 25)
    g = geometry(tilts.tolist(), axis=0.0)
    noise = smooth_noise((25, 96, 96), seed=3)
    x = (np.arange(96) - 48) * 10.0
    seen = g.project(torch.tensor([[900.0, 0.0, 0.0]], dtype=torch.float64))[0][0, :, 0].numpy()
    bar = 100 / (1 + np.exp(-(x - seen[:, None] + 50) / 10))[:, None]
    error = {}
    clean = np.empty_like(noise)
    list(rec.prepare_images(lambda j: noise[j], g, 1, 10.0, Weighting(200.0), clean))
    grid = Grid((20, 96, 96), 10.0)
    middle = (slice(None), slice(10, 86), slice(10, 86))
    expected = volume_of(clean, g, grid)[middle]
    for field in (None, (960.0, 960.0)):
        out = np.empty_like(noise)
        images = (noise - noise.std() * bar).astype(np.float32)
        weighting = Weighting(200.0, field=field)
        list(rec.prepare_images(lambda j, made=images: made[j], g, 1, 10.0, weighting, out))
        volume = volume_of(out, g, grid)[middle]
        error[field] = np.sqrt(np.mean((volume - expected) ** 2)) / expected.std()
    assert error[None] > 0.4
    assert error[(960.0, 960.0)] < 0.02  # the corners that the window takes from the field too


# ------------------------------------------------------------------------------------------------------- the CTF
def correction(mode, hand=-1):
    values = [torch.tensor([v]) for v in (31000.0, 29000.0, 25.0, 10.0)]
    return CtfCorrection(mode, *values, hand, Optics(300.0, 2.7, 0.07))


@pytest.mark.parametrize("hand", [-1, 1])
def test_ctf_at_a_height(hand):
    """Convention 11 with the defocus of convention 13, written down again."""
    band, pixel_size, height = Band.of(48), 4.0, 800.0
    kx, ky = (k.double().numpy() for k in band.frequencies(pixel_size))
    k, alpha = np.hypot(kx, ky), np.arctan2(ky, kx)
    z = 30000.0 + hand * height + 1000.0 * np.cos(2 * (alpha - np.deg2rad(25.0)))
    lam = 0.0196875
    chi = np.pi * lam * z * k**2 - np.pi / 2 * 2.7e7 * lam**3 * k**4 + np.deg2rad(10.0)
    c = math.sqrt(1 - 0.07**2) * np.sin(chi) + 0.07 * np.cos(chi)
    factors = {
        mode: correction(mode, hand).factors(torch.tensor([height]), band, pixel_size)[0].numpy()
        for mode in rec.CTF_MODES
        if mode != "none"
    }
    # λ of the constants above to 6 digits times χ of up to 30 radians
    assert np.allclose(factors["multiply"], c, atol=2e-3)
    assert np.allclose(factors["wiener"], c / (c**2 + rec.CTF_NOISE), atol=1e-2)
    sure = np.abs(c) > 2e-3
    assert np.array_equal(factors["phaseflip"][sure], np.sign(c)[sure])
    softer = replace(correction("deconvolve", hand), strength=0.7, falloff=1.2)
    snr = 10**2.1 * np.exp(-200 * 1.2 * k)
    expected = c / (c**2 + 1 / snr)
    found = softer.factors(torch.tensor([height]), band, pixel_size)[0].numpy()
    assert np.allclose(found, expected, atol=2e-2)  # the slope 1/(c² + 1/SNR) at the lowest frequencies is up to 80
    assert softer.words == "deconvolve 0.7, falloff 1.2"


class Lever(CtfCorrection):
    """A defocus that changes with the height as in a specimen 25 times as thick: small test, large effect."""

    def factors(self, heights, band, pixel_size):
        return super().factors(25 * heights, band, pixel_size)


def test_each_tile_has_its_own_defocus(monkeypatch):
    """Points blurred by the CTF at their own heights come back sharp with the right hand only."""
    monkeypatch.setattr(rec, "SMALLEST_TILE", 64)
    monkeypatch.setattr(rec, "LARGEST_TILE", 64)
    pixel_size, n, tilts = 10.0, 128, np.linspace(-40, 40, 17).tolist()
    g = geometry(tilts, axis=10.0)
    columns = [torch.full((17,), v) for v in (20000.0, 20000.0, 0.0, 0.0)]
    truth = Lever("multiply", *columns, 1, Optics(300.0, 2.7, 0.07))
    points = torch.tensor([[150.0, 100.0, 350.0], [-100.0, -120.0, -350.0]], dtype=torch.float64)
    positions, heights = g.project(points)
    kx, ky = torch.arange(n // 2 + 1) / n, torch.fft.fftfreq(n)[:, None]
    spectra = 0
    for at, height in zip(positions / pixel_size, heights, strict=True):
        c = Band.of(n).put(truth.factors(height, Band.of(n), pixel_size).to(torch.complex64))
        turns = at[:, 0, None, None] * kx + at[:, 1, None, None] * ky
        spectra = spectra - c * torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    images = torch.fft.fftshift(torch.fft.irfft2(spectra, s=(n, n)), dim=(1, 2)).float().numpy()
    index = (points / pixel_size).round().long() + torch.tensor([40, 40, 50])
    depth = {}
    for hand in (-1, 1):
        fixed = Lever("phaseflip", *columns, hand, truth.optics)
        volume = volume_of(images, g, Grid((100, 80, 80), pixel_size), correction=fixed)
        depth[hand] = min(-float(volume[z, y, x]) for x, y, z in index)
    # ±8750 Å of defocus are up to 1.4 radians within the band: the wrong sign loses about half of the peak
    assert depth[1] > 1.4 * depth[-1]


def point_by_point(images, g, grid, fixed, voxels):
    """Voxels (N, 3) x, y, z of a back-projection in which every image was corrected anew for each, at its own height."""
    n = images.shape[-1]
    band = Band.of(n)
    spectra = band.take(torch.fft.rfftn(torch.fft.ifftshift(torch.from_numpy(images), dim=(1, 2)), dim=(1, 2)))
    half = torch.tensor(grid.shape[::-1]) // 2
    positions, heights = g.project((voxels - half).double() * grid.pixel_size)
    out = []
    for at, height in zip(positions / grid.pixel_size, heights, strict=True):
        turns = (at[:, :1] * band.kx + at[:, 1:] * band.ky) / n
        waves = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        factors = fixed.factors(height, band, grid.pixel_size)
        out.append(float((band.multiplicity * (spectra * factors * waves).real).sum()) / n**2)
    return np.array(out)


def points_in_focus(g, grid, fixed, n, voxels, band):
    """Images (T, n, n) of dark points (N, 3), each with the CTF of its own height, in a band of cycles per pixel."""
    lens, all_of_it = replace(fixed, mode="multiply"), Band.of(n)
    ring = (all_of_it.radii / n > band[0]) & (all_of_it.radii / n < band[1])
    half = torch.tensor(grid.shape[::-1]) // 2
    positions, heights = g.project((voxels - half).double() * grid.pixel_size)
    images = torch.zeros((len(g.matrices), n, n))
    for at, height in zip(positions / grid.pixel_size, heights, strict=True):
        turns = (at[:, :1] * all_of_it.kx + at[:, 1:] * all_of_it.ky) / n
        waves = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
        spectra = all_of_it.put(lens.factors(height, all_of_it, grid.pixel_size) * ring * waves)
        images -= torch.fft.fftshift(torch.fft.irfft2(spectra, s=(n, n)), dim=(1, 2))
    return images.numpy()


@pytest.mark.parametrize("mode", ["phaseflip", "multiply", "wiener"])
@pytest.mark.parametrize(("pixel_size", "defocus", "cs"), [(0.6, 900.0, 0.0), (2.5, 28000.0, 2.7)])
def test_points_at_all_heights_are_corrected(mode, pixel_size, defocus, cs, monkeypatch):
    """Points all over a volume, each with the CTF of its own height, against a correction anew for each point.

    All detail is within a quarter of the finest, so that no other frequencies hide what is lost there. In the fine voxels
    the height counts, in the others the 44 pixels by which the CTF sends the finest detail away.
    """
    tilts = np.linspace(-60, 60, 9).tolist()
    g, grid, n = geometry(tilts, axis=5.0), Grid((60, 100, 100), pixel_size), 240
    columns = [torch.full((9,), v) for v in (defocus, defocus - 200, 30.0, 0.0)]
    fixed = CtfCorrection(mode, *columns, -1, Optics(300.0, cs, 0.07))
    voxels = torch.from_numpy(np.random.default_rng(4).integers([4, 4, 2], [96, 96, 58], (60, 3)))
    images = points_in_focus(g, grid, fixed, n, voxels, (0.36, 0.48))
    expected = point_by_point(images, g, grid, fixed, voxels)
    x, y, z = voxels.T.numpy()

    def share():
        """Of the right value at each point."""
        return volume_of(images, g, grid, correction=fixed)[z, y, x] / expected

    # the worst corner of a tile keeps 0.9 in one of the tilts, the mean 0.96 (`TileLimits`)
    bounded = share()
    assert bounded.min() > rec.AMPLITUDE_KEPT - REPLICAS
    assert bounded.mean() > 0.96 - REPLICAS
    limits = CtfCorrection.limits
    if pixel_size < 1:
        monkeypatch.setattr(CtfCorrection, "limits", lambda *args: replace(limits(*args), most=math.inf))
    else:
        monkeypatch.setattr(CtfCorrection, "limits", lambda *args: replace(limits(*args), margin=0))
        monkeypatch.setattr(rec, "LARGEST_TILE", 108)
    assert share().min() < rec.AMPLITUDE_KEPT - REPLICAS


def test_tiles_within_limits():
    """The worst corner by hand for tilts about y: sin 60° of half the side and cos 60° of half the depth."""
    g, optics = geometry([-60.0, 0.0, 60.0], axis=0.0), Optics(300.0, 2.7, 0.07)
    columns = [torch.full((3,), v) for v in (20000.0, 20000.0, 0.0, 0.0)]
    fine = CtfCorrection("phaseflip", *columns, -1, optics)
    for pixel_size, resolution in ((1.0, None), (1.0, 4.0), (2.0, None), (8.0, None)):
        grid = Grid((200, 400, 300), pixel_size, (0.0, 30.0, 0.0))
        limits = replace(fine, resolution=resolution).limits(g, grid)
        k = 1 / (resolution or 2 * pixel_size)
        tiling = Tiling.of(grid.shape, 41, limits=limits)
        z, _, x = tiling.keep
        height = max(z, x * math.sin(math.pi / 3) + z * math.cos(math.pi / 3)) / 2 * pixel_size
        assert math.cos(math.pi * 0.0196875 * height * k**2) > rec.AMPLITUDE_KEPT - 1e-4
        highest = (150 * math.sin(math.pi / 3) + 100 * math.cos(math.pi / 3)) * pixel_size
        away = 0.0196875 * (20000 + highest) * k - 2.7e7 * (0.0196875 * k) ** 3
        assert limits.margin == math.ceil(away / pixel_size)
        assert tiling.patch >= tiling.box + 2 * limits.margin
        free = Tiling.of(grid.shape, 41, limits=replace(limits, most=math.inf))
        assert (len(tiling) > len(free)) == (pixel_size < 4 and resolution is None)
    grid, free = Grid((200, 400, 300), 1.0), ((3, 400, 400), 3, 1, 1, 4e9)
    assert rec.cost(grid, *free, fine.limits(g, grid))[0] > 2 * rec.cost(grid, *free)[0]


# ------------------------------------------------------------------------------------------------------- grid and tiles
@pytest.mark.parametrize("shape", [(300, 1024, 1024), (40, 61, 200), (9, 8, 8), (120, 33, 500)])
@pytest.mark.parametrize("memory", [math.inf, 1e8])
def test_tiles_fill_the_volume(shape, memory):
    tiling = Tiling.of(shape, 41, memory)
    assert all(k <= 2 * rec.PAYLOAD * tiling.box + 1 for k in tiling.keep)
    assert tiling.bytes(41) <= memory
    for axis, n in enumerate(shape):
        total = torch.zeros(n)
        for i in range(len(tiling.edges[axis]) - 1):
            low, high = tiling.span(axis, i)
            assert high - low <= tiling.keep[axis]
            total[low:high] += tiling.window(axis, i)
        assert torch.allclose(total, torch.ones(n), atol=1e-6)  # float32


def record(axis, thickness=None):
    zeros = (0.0,) * 3
    source = Source(stack="s.mrc", shape=(3, 500, 401), pixel_size=2.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07)
    alignment = Alignment(
        axis=(axis,) * 3, tilt=(-5.0, 0.0, 5.0), xtilt=zeros, shift_x=zeros, shift_y=zeros, thickness=thickness
    )
    tilts = Tilts(nominal=(-5.0, 0.0, 5.0), use=(True,) * 3)
    return TiltSeriesRecord(name="s", source=source, tilts=tilts, alignment=alignment)


@pytest.mark.parametrize(("axis", "sides"), [(0.0, (125, 100)), (-3.0, (125, 100)), (178.0, (125, 100)),
                                             (85.0, (100, 125)), (-93.0, (100, 125)), (268.0, (100, 125))])  # fmt: skip
def test_field_turns_with_the_axis(axis, sides):
    assert Grid.of(record(axis), 4).shape[1:] == sides


def test_grid():
    assert Grid.of(record(0.0, thickness=160.0), 4).shape[0] == 30  # 240 Å of 8 Å
    assert Grid.of(record(0.0), 4).shape[0] == 52  # half of the shorter side: 401 Å
    assert Grid.of(record(0.0), 4, thickness=100.0).shape[0] == 14
    part = Grid.of(record(0.0), 4, region=(-80.0, 80.0, 0.0, 104.0, -160.0, -80.0))
    assert part.shape == (10, 13, 20)
    assert part.centre == (0.0, 48.0, -120.0)  # voxel n//2 of each axis
    with pytest.raises(InputError, match="too small"):
        Grid.of(record(0.0), 64)
    assert Grid.of(record(0.0, thickness=20.0), 4).shape[0] == 8  # thinner than a tomogram can be
    assert Grid.of(record(0.0, thickness=600.0), 4).shape[0] == 114  # known: not cut to the half of the field
    with pytest.raises(InputError, match="--region"):
        Grid.of(record(0.0), 4, region=(900.0, 1100.0, 0.0, 100.0, -40.0, 40.0))
    turned = Grid.of(record(0.0), 4, region=(-80.0, 80.0, 0.0, 104.0, -160.0, -80.0), angles=(10.0, 20.0, 30.0))
    assert (turned.shape, turned.centre) == (part.shape, part.centre)  # it turns about its middle
    with pytest.raises(InputError, match="no used image"):  # long and beyond the field but for its turned ends
        Grid.of(record(0.0), 4, region=(-2000.0, 2000.0, 880.0, 960.0, -40.0, 40.0))
    Grid.of(record(0.0), 4, region=(-2000.0, 2000.0, 880.0, 960.0, -40.0, 40.0), angles=(70.0, 0.0, 0.0))
    assert Grid.of(record(0.0), 4, region=(300.0, 600.0, 0.0, 100.0, -40.0, 40.0)).shape == (10, 12, 37)  # in part


def test_too_little_memory_is_said():
    with pytest.raises(InputError, match="--memory") as told:
        Tiling.of((300, 1024, 1024), 41, 2e7)
    assert "1024 x 1024 x 300" in str(told.value)
    source, grid = (41, 1024, 1024), Grid((300, 1024, 1024), 12.0)
    seconds, used = rec.cost(grid, source, 41, 1, 2, 1e9)
    assert used < 1e9
    assert seconds > rec.cost(grid, source, 41, 1, 2, math.inf)[0]


def test_region_is_a_part_of_the_whole(scene):
    images, g, _ = scene
    whole = volume_of(images, g, Grid((32, 60, 60), 10.0))
    # voxels -10 to 9 along z, -5 to 19 along y, 0 to 19 along x
    part = volume_of(images, g, Grid((20, 25, 20), 10.0, (100.0, 70.0, 0.0)))
    error = part - whole[6:26, 25:50, 30:50]
    assert np.sqrt(np.mean(error**2)) < 2 * REPLICAS * whole.std()
