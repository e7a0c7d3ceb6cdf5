"""Gold: told from other dark things by its outline, found in a small series, and measured to a fraction of a pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.align import gold, landmarks, tracks
from libemc.methods.align.gold import Beads
from libemc.methods.align.tracks import Scale
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices

FINE = 5.0  # Å, pixels in which single beads are drawn
DIAMETER = 100.0  # Å
TILTS = torch.linspace(-56, 56, 15, dtype=torch.float64)
PIXEL_SIZE = 12.5  # Å, of the series
SHAPE = (112, 120)


def sphere(at: np.ndarray, line_y: np.ndarray, line_x: np.ndarray, diameter: float = DIAMETER) -> np.ndarray:
    """(y, x): path through a sphere around `at` over its diameter, averaged over pixels (4 x 4 points)."""
    step = line_x[1] - line_x[0]
    part = (np.arange(4) - 1.5) / 4 * step
    x, y = ((line[:, None] + part).ravel() for line in (line_x, line_y))
    r2 = (x - at[0]) ** 2 + ((y - at[1]) ** 2)[:, None]
    path = np.sqrt(np.maximum(1 - 4 * r2 / diameter**2, 0))
    return path.reshape(len(line_y), 4, len(line_x), 4).mean((1, 3))


def fresnel(path: np.ndarray, defocus: float) -> np.ndarray:
    """Intensity of a wave that a bead of this path turned by 2 rad and weakened, at an underfocus (Å) and 300 kV."""
    wave = np.exp((2.0j - 0.8) * path)
    k2 = np.add.outer(np.fft.fftfreq(len(path), FINE) ** 2, np.fft.fftfreq(path.shape[1], FINE) ** 2)
    moved = np.fft.ifft2(np.fft.fft2(wave) * np.exp(1j * np.pi * 0.0197 * defocus * k2))
    return np.abs(moved) ** 2 - 1


LINE = (np.arange(101) - 50) * FINE


def patches(image: np.ndarray, noise: float, count: int = 15) -> torch.Tensor:
    return torch.from_numpy(image + noise * np.random.default_rng(0).standard_normal((count, *image.shape))).float()


@pytest.mark.parametrize("defocus", [None, 15000.0, 25000.0])
@pytest.mark.parametrize("diameter", [80.0, 120.0])
def test_a_bead_is_recognised(defocus: float | None, diameter: float) -> None:
    """A disc, with and without a Fresnel rim: its size to 10 %, its middle to half a pixel, round, and in contrast."""
    at = np.array([18.0, -11.0])
    path = sphere(at, LINE, LINE, diameter)
    image = -path if defocus is None else fresnel(path, defocus)
    like = gold.likeness(patches(image, 0.3), FINE)
    assert abs(like.diameter / diameter - 1) < 0.1
    assert like.roundness > gold.ROUNDNESS
    assert like.contrast > gold.CONTRAST
    np.testing.assert_allclose(like.offset, at, atol=0.5 * FINE)


def test_others_are_not_beads() -> None:
    """A lop-sided blob isn't round; noise is not, nor in contrast; a faint disc is round, but not strong."""
    lopsided = -sphere(np.array([-45.0, -10.0]), LINE, LINE) - sphere(np.array([35.0, 10.0]), LINE, LINE, 90.0)
    assert gold.likeness(patches(lopsided, 0.3), FINE).roundness < gold.ROUNDNESS
    nothing = gold.likeness(patches(0 * lopsided, 0.3), FINE)
    assert nothing.roundness < gold.ROUNDNESS
    assert nothing.contrast < gold.CONTRAST
    faint = gold.likeness(patches(-sphere(np.zeros(2), LINE, LINE), 2.0, 200), FINE)
    assert faint.roundness > gold.ROUNDNESS
    assert faint.contrast < gold.CONTRAST


Series = tuple[np.ndarray, TiltGeometry, np.ndarray, np.ndarray]


def series(depth_of_beads: float) -> Series:
    """Images of six beads among 150 faint blobs in a slab, their geometry; where the beads, and some of the blobs, are."""
    rng = np.random.default_rng(4)
    beads = np.array(
        [[-400, -300, 20], [300, -350, -60], [0, 0, 70], [-350, 320, 0], [380, 250, 40], [60, -120, -90.0]]
    )
    blobs = rng.uniform(-0.5, 0.5, (150, 3)) * [1600, 1500, 300]
    count = len(TILTS)
    one = torch.ones(count, dtype=torch.float64)
    shift = torch.from_numpy(rng.normal(0, 20, (count, 2)))
    geometry = TiltGeometry(tilt_matrices(20.0, TILTS, 0.0), shift, one, one.bool())
    y, x = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE)
    at = geometry.project(torch.from_numpy(blobs))[0].numpy().transpose(1, 0, 2)
    across, down = (np.exp(-((line - at[..., i, None]) ** 2) / (2 * 30**2)) for i, line in enumerate((x, y)))
    images = -0.4 * np.einsum("tpy,tpx->tyx", down, across)
    for image, places in zip(images, geometry.project(torch.from_numpy(beads))[0].transpose(0, 1).numpy(), strict=True):
        for place in places:
            image -= depth_of_beads * sphere(place, y, x)
    images += 0.5 * rng.standard_normal(images.shape)
    images -= images.mean((1, 2), keepdims=True)
    return images.astype(np.float32), geometry, beads, blobs


@pytest.fixture(scope="module")
def with_beads() -> Series:
    return series(5.0)


def field() -> tuple[float, float]:
    return SHAPE[1] * PIXEL_SIZE, SHAPE[0] * PIXEL_SIZE


def found_in(images: np.ndarray, geometry: TiltGeometry) -> tuple[torch.Tensor, Beads | None]:
    binned = images.reshape(len(images), SHAPE[0] // 2, 2, SHAPE[1] // 2, 2).mean((2, 4))
    # blocks of two pixels have their origin half a fine pixel further on
    moved = TiltGeometry(geometry.matrices, geometry.shift - PIXEL_SIZE / 2, geometry.magnification, geometry.use)
    volume = landmarks.coarse_tomogram(binned.astype(np.float32), 2 * PIXEL_SIZE, moved, 400.0)
    points = gold.candidates(volume, 2 * PIXEL_SIZE, moved, field())
    return points, gold.recognise(images, PIXEL_SIZE, geometry, points)


def test_beads_are_found(with_beads: Series) -> None:
    images, geometry, beads, _ = with_beads
    points, found = found_in(images, geometry)
    distance = torch.cdist(torch.from_numpy(beads), points).min(1).values
    assert float(distance.max()) < 2 * 2 * PIXEL_SIZE  # voxels of the tomogram, along z worse by the missing wedge
    assert found is not None
    assert abs(found.diameter / DIAMETER - 1) < 0.15  # of eight pixels
    apart = torch.cdist(torch.from_numpy(beads), found.points)
    assert len(found.points) == len(beads)
    assert float(apart.min(1).values.max()) < 2 * 2 * PIXEL_SIZE


def test_no_beads_where_there_are_none() -> None:
    images, geometry, _, _ = series(0.0)
    assert found_in(images, geometry)[1] is None


def test_the_depth_of_a_bead_is_looked_for(with_beads: Series) -> None:
    """From seven low tilts, and 500 Å and more above or below their places, beads are found where they are."""
    images, geometry, beads, _ = with_beads
    low = replace(geometry, use=TILTS.abs() < 25)
    true = torch.from_numpy(beads)[1:5]  # farther from each other, and from the border, than is looked around them
    off = torch.tensor([[15, 10, 700], [-20, 5, -500], [10, -20, -900], [-5, 15, 500]], dtype=torch.float64)
    assert gold.recognise(images, PIXEL_SIZE, replace(low, use=TILTS == 0), true + off) is None  # one says nothing
    found = gold.recognise(images, PIXEL_SIZE, low, true + off)
    assert found is not None
    assert len(found.points) == len(true)
    rest = (found.points - true).abs()
    assert float(rest[:, :2].max()) < 0.5 * PIXEL_SIZE  # a mean of seven images, as in the test of `likeness`
    assert float(rest[:, 2].max()) < gold.DEPTH_STEP  # half of one by the steps, the other half by noise
    assert abs(found.diameter / DIAMETER - 1) < 0.15  # of eight pixels


def shown(images: np.ndarray, geometry: TiltGeometry, beads: np.ndarray, blobs: np.ndarray) -> tracks.Evidence:
    """The evidence of six beads; noise is measured at blobs that are away from them."""
    scale = Scale(PIXEL_SIZE, 2.4 * DIAMETER, 0.35, 50.0, DIAMETER)
    away = torch.cdist(torch.from_numpy(blobs), torch.from_numpy(beads)).min(1).values > 250
    inside = (torch.from_numpy(blobs).abs()[:, :2] < 500).all(1)
    noise = tracks.noise_power(images, scale, geometry, torch.from_numpy(blobs)[away & inside])
    return gold.compare(images, scale, geometry, Beads(torch.from_numpy(beads), DIAMETER), noise)


def test_presence_of_beads(with_beads: Series) -> None:
    """Images without beads are told, by what `presence` says itself of its error; and so is half of a bead."""
    images, geometry, beads, blobs = with_beads
    evidence = shown(images, geometry, beads, blobs)
    whole, deviation = gold.presence(evidence, tracks.vote(evidence))
    assert abs(float(whole.mean()) - 1) < 0.05  # the template is a median, and parts are a mean: noise of 90 images
    # six beads lie on other blobs in every image, of some 10 %, and 8 % of a bead's peak each
    assert 0.7 < float(whole.min()) < float(whole.max()) < 1.3
    half, none, moved = 4, 12, 9
    mixed = images.copy()
    mixed[half] = series(2.5)[0][half]
    mixed[none] = series(0.0)[0][none]
    mixed[moved] = np.roll(images[moved], (2, -3), (0, 1))
    evidence = shown(mixed, geometry, beads, blobs)
    shift = tracks.vote(evidence)
    part, deviation = gold.presence(evidence, shift)
    assert float(deviation.max()) < 0.05
    others = [j for j in range(len(TILTS)) if j not in (half, none)]
    common = float((part / whole)[others].median())  # what the template has lost by the two
    assert 1 < common < 1 + 1.5 * 2 / len(TILTS)
    # noise is the same in the two series: a half is one but for the blobs that beads lie on
    assert abs(float(part[half] / whole[half]) / common - 0.5) < 3 * float(deviation[half])
    # of 50 places that a vote may choose from, the highest by chance is at 2.8 deviations
    assert abs(float(part[none])) < 4 * float(deviation[none])
    # wherever they are, but for what the window, half a bead away from its place, has cut off
    assert 0.85 < float(part[moved] / whole[moved]) / common < 1.02
    unmoved = gold.presence(evidence, torch.zeros_like(shift))[0][moved]
    assert float(unmoved) < 0.8 * float(part[moved])  # half a bead away
    nowhere = replace(evidence, seen=torch.zeros_like(evidence.seen))
    assert not gold.presence(nowhere, shift)[0].any()  # where none should be


def test_positions_of_beads(with_beads: Series) -> None:
    """Each bead in each image to a tenth of a pixel, though images were off by 10 Å: nothing is relative here."""
    images, geometry, beads, blobs = with_beads
    off = torch.from_numpy(np.random.default_rng(2).normal(0, 10, (len(TILTS), 2)))
    wrong = TiltGeometry(geometry.matrices, geometry.shift - off, geometry.magnification, geometry.use)
    evidence = shown(images, wrong, beads, blobs)
    assert evidence.links is None
    moved, information = tracks.displacements(evidence, tracks.vote(evidence), 40.0)
    truth = geometry.project(torch.from_numpy(beads))[0].transpose(0, 1)
    rest = evidence.centre + moved - truth
    known = torch.isfinite(rest).all(-1)
    assert float(known[evidence.seen].double().mean()) > 0.9
    # a template's middle is where the mean of all is: the same for all, and up to 10 Å / sqrt(90) away
    rest = rest - rest[known].mean(0)
    robust = 1.4826 * rest[known].abs().median()
    assert float(robust) < 0.1 * PIXEL_SIZE
    sigma = torch.linalg.inv(information[known]).diagonal(dim1=-2, dim2=-1).sqrt().median()
    # said with care: what images are off by before they're aligned counts as noise of the template
    assert 0.2 < float(robust / sigma) < 2


@pytest.mark.parametrize("shape", [(90, 101), (64, 71)])
def test_beads_are_taken_out(shape: tuple[int, int]) -> None:
    """Nothing is left within `FRINGE` diameters of a bead, to a pixel, and the rest is as it was; at borders too."""
    rng = np.random.default_rng(4)
    tilts = torch.tensor([-50.0, 0.0, 40.0], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    shift = torch.from_numpy(rng.normal(0, 40, (3, 2)))
    geometry = TiltGeometry(tilt_matrices(20.0, tilts, 0.0), shift, one, torch.tensor([True, False, True]))
    # in the middle, at heights, across a border, just beyond one, and far away
    points = [[30, -20, 150], [-200, 260, -100], [shape[1] / 2 * PIXEL_SIZE, 0, 0], [0, -520, 50], [0, 9000, 0.0]]
    beads = Beads(torch.tensor(points, dtype=torch.float64), DIAMETER)
    images = (1 + rng.random((3, *shape))).astype(np.float32)
    before = images.copy()
    out = gold.without(images, PIXEL_SIZE, geometry, beads)
    np.testing.assert_array_equal(images, before)
    y, x = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in shape)
    at = geometry.project(beads.points)[0].numpy()  # (P, T, 2)
    distance = np.hypot(x - at[..., 0, None, None], y[:, None] - at[..., 1, None, None]).min(0)
    radius, off = gold.FRINGE * DIAMETER, PIXEL_SIZE / np.sqrt(2)  # a place is rounded to pixels, a radius up to them
    assert not out[distance <= radius - off].any()
    untouched = distance > radius + PIXEL_SIZE + off
    np.testing.assert_array_equal(out[untouched], images[untouched])
    assert ((out == 0) | (out == images)).all()
    assert (out[:, :, -1] == 0).any()  # the border was reached


def test_a_column_gives_whole_patches(with_beads: Series) -> None:
    """What images show around a point, its nearest pixel in the middle, of those images that show all of it."""
    images, geometry, _, _ = with_beads
    column = gold._Column(images, PIXEL_SIZE, geometry, list(range(len(TILTS))))
    h = column.half
    for place in ([40.0, -60.0, 30.0], [560.0, 0.0, 0.0], [0.0, 5000.0, 0.0]):
        point = torch.tensor(place, dtype=torch.float64)
        pixel = (geometry.project(point[None])[0][0] / PIXEL_SIZE).round().long().numpy() + np.array(SHAPE[::-1]) // 2
        padded = np.pad(images, ((0, 0), (h, h), (h, h)), constant_values=np.nan)
        cut = [
            image[y : y + 2 * h + 1, x : x + 2 * h + 1]
            for image, (x, y) in zip(padded, pixel, strict=True)
            if 0 <= x < SHAPE[1] and 0 <= y < SHAPE[0]
        ]
        whole = [c for c in cut if np.isfinite(c).all()]
        np.testing.assert_array_equal(column.patches(images, point), np.reshape(whole, (-1, 2 * h + 1, 2 * h + 1)))
