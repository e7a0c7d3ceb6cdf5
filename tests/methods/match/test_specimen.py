"""What is searched: the score from the volume is that from the images, and its noise has variance 1."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from libemc.methods.match import specimen
from libemc.methods.match.specimen import RINGS, Passband, TiltSensitivity, WedgeSensitivity
from libemc.methods.match.templates import prepare
from libemc.methods.reconstruct import Grid, reconstruct
from libemc.numerics.rotations import random_rotations
from tests.by_hand import frequencies, pose
from tests.methods.match.blob_specimen import (
    BAND,
    BOX,
    DIAMETER,
    PIXEL_SIZE,
    RESOLUTION,
    TURN,
    BlobSeries,
    balanced,
    density,
    matrix,
    plain,
)

GRID = Grid((48, 70, 280), PIXEL_SIZE, centre=(4.0, -6.0, 10.0))
OTHER = pose(-100.0, 40.0, 15.0)
# voxels (x, y, z) of the grid from its middle; far from the tilt axis, where the height changes the CTF
PLACES = [(-120, 6, 3), (118, -9, -4), (0, 0, 0)]


def world(voxel) -> tuple[float, float, float]:
    x, y, z = (PIXEL_SIZE * v + c for v, c in zip(voxel, GRID.centre, strict=True))
    return x, y, z


def ring(shape) -> np.ndarray:
    k = np.hypot(*frequencies(shape, PIXEL_SIZE)) * PIXEL_SIZE
    return np.minimum(np.rint(k * RINGS).astype(int), RINGS - 1)


def band(shape) -> np.ndarray:
    return BAND(torch.from_numpy(np.hypot(*frequencies(shape, PIXEL_SIZE)))).numpy()


def whitened(series: BlobSeries) -> tuple[np.ndarray, torch.Tensor]:
    """The images of `whiten_images`, and their noise."""
    out, noise = np.zeros((len(series.tilts), *series.shape), np.float32), torch.zeros(len(series.tilts), RINGS)
    steps = specimen.whiten_images(
        series.image, series.geometry, 1, PIXEL_SIZE, series.weighting, BAND, out, lambda j, raw: raw
    )
    for j, power in steps:
        noise[j] = power
    return out, noise


def sensitivity(series: BlobSeries, noise: torch.Tensor) -> TiltSensitivity:
    return TiltSensitivity(series.geometry, series.correction, series.weighting, BAND, noise, PIXEL_SIZE)


def volume(images: np.ndarray, series: BlobSeries) -> np.ndarray:
    slabs = reconstruct(images, series.geometry, GRID, series.correction)
    return np.concatenate([slab for _, slab in slabs], axis=1)


def score(volume: np.ndarray, voxel, turn: np.ndarray, norm: float) -> float:
    """Correlation with the map at a voxel, a direct sum, over its norm."""
    middle = [c + n // 2 - BOX // 2 for c, n in zip(reversed(voxel), GRID.shape, strict=True)]
    low = [max(0, -m) for m in middle]
    high = [min(BOX, n - m) for m, n in zip(middle, GRID.shape, strict=True)]
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    part = volume[tuple(slice(m + a, m + b) for m, a, b in zip(middle, low, high, strict=True))]
    return float((part * balanced(BOX, turn).numpy()[inside]).sum()) / norm


def score_of_images(images: np.ndarray, series: BlobSeries, voxel, turn: np.ndarray, norm: float) -> float:
    """The same out of the images, with the prediction for each: its projection, with the CTF at its own height."""
    return sum((images[j] * series.projection(j, world(voxel), turn)).sum() for j in range(len(images))) / norm


def norm_by_hand(series: BlobSeries, noise: torch.Tensor, turn: np.ndarray) -> float:
    """The standard deviation of that, from the images' whole transforms."""
    total = 0.0
    for j in range(len(series.tilts)):
        spectrum = np.fft.fft2(series.projection(j, (0.0, 0.0, 0.0), turn))
        gain = series.damage(j) * band(series.shape)
        total += (np.abs(spectrum * gain) ** 2 / noise[j].numpy()[ring(series.shape)]).sum() / spectrum.size
    return float(np.sqrt(total))


@pytest.fixture(scope="module")
def seen() -> tuple[BlobSeries, np.ndarray, torch.Tensor, np.ndarray]:
    """A series of two particles, its whitened images and their noise, the volume."""
    series = BlobSeries([world(v) for v in PLACES[:2]], [TURN, OTHER], noise=0.4)
    images, noise = whitened(series)
    return series, images, noise, volume(images, series)


def test_images_are_filtered_by_signal_over_noise_power(seen) -> None:
    series, images, noise, _ = seen
    for j in (0, 3):
        spectrum = np.fft.fft2(images[j])
        inner = np.fft.fft2(series.image(j) - 50)
        gain = series.damage(j) * band(series.shape) / noise[j].numpy()[ring(series.shape)]
        # but for the taper of the border
        wanted, found = np.fft.ifft2(inner * gain).real[15:-15, 15:-15], np.fft.ifft2(spectrum).real[15:-15, 15:-15]
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.999
        assert found.std() / wanted.std() == pytest.approx(1, abs=0.01)


def test_noise_is_that_of_a_pixel() -> None:
    """The power of the formula that the noise was made with; rings are noisy, and smoothed over four."""
    series = BlobSeries(noise=0.4)
    _, noise = whitened(series)
    k = torch.arange(RINGS) / RINGS / PIXEL_SIZE
    some = (k > 0.03) & (k < 0.24)
    for j in range(len(series.tilts)):
        made = (0.4 * (1 + 0.2 * j) * (1 + 2 * torch.exp(-((k / 0.15) ** 2)))) ** 2
        ratio = (noise[j] / made)[some]
        assert float(ratio.mean()) == pytest.approx(1, abs=0.03)
        assert float(ratio.std()) < 0.12


def test_an_image_of_nothing_has_no_say() -> None:
    """All its pixels alike: nothing of it gets into the volume; the rounding of its mean is no signal."""
    series = BlobSeries(noise=1.0, shape=(80, 90))
    out, geometry = np.zeros((3, 80, 90), np.float32), series.geometry.select([0, 1, 2])
    weighting = replace(series.weighting, doses=None)
    load = [series.image(0), np.full((80, 90), 107.3), series.image(2)].__getitem__
    for _ in specimen.whiten_images(load, geometry, 1, PIXEL_SIZE, weighting, BAND, out, lambda j, raw: raw):
        pass
    assert np.abs(out[1]).max() < np.abs(out[0]).max()


def test_score_of_the_volume_is_that_of_the_images(seen) -> None:
    """At particles and at none, in a right and a wrong rotation: to a tenth of the noise and 2 %, for tiles of one defocus."""
    series, images, noise, data = seen
    turns = torch.stack([matrix(TURN), matrix(OTHER)])
    norms = sensitivity(series, noise).norms(plain(), turns).tolist()
    heights = []
    for voxel in PLACES:
        for turn, norm in zip((TURN, OTHER), norms, strict=True):
            expected = score_of_images(images, series, voxel, turn, norm)
            assert score(data, voxel, turn, norm) == pytest.approx(expected, rel=0.02, abs=0.1)
            heights.append(expected)
    assert min(heights[0], heights[3]) > 5 > max(heights[4], heights[5])  # both particles are seen, nothing is there


def test_score_needs_the_height_of_each_place(seen) -> None:
    """With the other handedness the volume is another: so the test before can fail."""
    series, images, noise, data = seen
    series = BlobSeries(**{**vars(series), "hand": -series.hand})
    voxel = PLACES[0]
    norm = float(sensitivity(series, noise).norms(plain(), matrix(TURN)[None]))
    assert abs(score(data, voxel, TURN, norm) - score_of_images(images, series, voxel, TURN, norm)) > 0.5


def test_noise_has_scores_of_variance_one() -> None:
    """Over all places, in some rotations. There are some 2000 independent places: 2 % for each rotation."""
    series = BlobSeries(noise=3.0)
    images, noise = whitened(series)
    data = volume(images, series)
    spectrum = np.fft.fftn(data)
    turns = random_rotations(6, torch.Generator().manual_seed(1))
    norms = sensitivity(series, noise).norms(plain(), turns)
    deviations = []
    for turn, norm in zip(turns.numpy(), norms.tolist(), strict=True):
        kernel = np.zeros(GRID.shape)
        kernel[:BOX, :BOX, :BOX] = balanced(BOX, turn).numpy()
        scores = np.fft.ifftn(spectrum * np.fft.fftn(kernel).conj()).real / norm
        deviations.append(scores[:-BOX, :-BOX, :-BOX].std())
    assert np.mean(deviations) == pytest.approx(1, abs=0.04)
    assert max(deviations) / min(deviations) < 1.15


def test_norms_are_the_deviation_of_the_direct_sum(seen) -> None:
    series, _, noise, _ = seen
    turns = random_rotations(4, torch.Generator().manual_seed(2))
    norms = sensitivity(series, noise).norms(plain(), turns)
    for turn, norm in zip(turns.numpy(), norms.tolist(), strict=True):
        assert norm == pytest.approx(norm_by_hand(series, noise, turn), rel=0.01)


def test_norms_without_ctf_or_doses(seen) -> None:
    """The same sum without them; they must not be there by another way."""
    series, _, noise, _ = seen
    bare = BlobSeries(**{**vars(series), "dose": 1e-6})
    bare.lens = lambda j, height: np.ones(series.shape)  # type: ignore[method-assign]
    weighting = specimen.Weighting(100.0)
    norm = TiltSensitivity(series.geometry, None, weighting, BAND, noise, PIXEL_SIZE).norms(plain(), matrix(TURN)[None])
    assert float(norm) == pytest.approx(norm_by_hand(bare, noise, TURN), rel=0.01)


def test_weights_give_the_norms(seen) -> None:
    """The lattice of weights and the slices agree to 2 %, of a template as it is searched for, in white noise."""
    series, _, noise, _ = seen
    eyes = TiltSensitivity(series.geometry, None, series.weighting, BAND, torch.ones_like(noise), PIXEL_SIZE)
    template = prepare(density(24), PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs")
    turns = random_rotations(30, torch.Generator().manual_seed(3))
    double = torch.where(template.ball[0][2] == 0, 1.0, 2.0)
    values = template.coefficients(turns).abs().square()
    found = (values @ (eyes.weights(template) * double)).sqrt() / template.box
    assert float((found / eyes.norms(template, turns) - 1).abs().max()) < 0.02


def test_band() -> None:
    """All between the second coarsest and the finest, nothing beyond."""
    gain = Passband(20.0, 200.0)
    assert gain(torch.tensor([0.0, 1 / 481, 1 / 19.9, 1.0])).tolist() == [0, 0, 0, 0]
    assert gain(torch.tensor([1 / 319, 1 / 100, 0.879 / 20])).tolist() == [1, 1, 1]
    assert 0 < float(gain(torch.tensor(1 / 400))) < 1 and 0 < float(gain(torch.tensor(0.95 / 20))) < 1


# ------------------------------------------------------------------------------------------------- a finished tomogram


def test_a_single_tilt_measures_its_plane() -> None:
    """Tilt a shows the directions (cos a, sin b, sin a): those at right angles to the beam in the specimen."""
    angle = 25.0
    wedge = WedgeSensitivity((angle - 1, angle + 1), BAND, torch.ones(RINGS), PIXEL_SIZE)
    turn = BlobSeries(axis=0.0, xtilt=0.0, tilts=(angle,) * 2).tilt_matrix(0)  # of the image to come: the axis is y
    in_plane = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-1, 0, 0], [-0.6, 0.8, 0]]).double() @ torch.from_numpy(turn)
    beyond = torch.tensor([[0.9, 0, 0.436], [0.9, 0, -0.436], [0, 0, 1.0]]).double() @ torch.from_numpy(turn)
    k = torch.full((1,), 0.1)
    for points, seen in ((in_plane, 1.0), (beyond, 0.0)):
        for x, _, z in (0.1 * points).tolist():
            assert wedge.squared(torch.tensor([x]), torch.tensor([z]), k) == seen
            assert wedge.squared(torch.tensor([-x]), torch.tensor([-z]), k) == seen


def test_the_tilt_axis_is_measured_by_every_tilt() -> None:
    """Also by a wedge that leaves out the untilted image."""
    wedge = WedgeSensitivity((10.0, 50.0), BAND, torch.ones(RINGS), PIXEL_SIZE)
    assert wedge.squared(torch.zeros(1), torch.zeros(1), torch.full((1,), 0.1)) == 1.0


def test_without_a_wedge_all_directions_are_measured() -> None:
    """The norm is the deviation of the correlation with noise whose variance is that of the band at each voxel."""
    wedge, template = WedgeSensitivity(None, BAND, torch.ones(RINGS), PIXEL_SIZE), plain()
    k = np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(3 * BOX, PIXEL_SIZE)] * 3)), axis=0)
    direct = np.abs(np.fft.fftn(balanced(3 * BOX).numpy()) * BAND(torch.from_numpy(k)).numpy()) ** 2
    norms = wedge.norms(template, random_rotations(5, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(norms, torch.full((5,), (direct.sum() / direct.size) ** 0.5).double(), rtol=0.03, atol=0)


SHAPE = (40, 60, 64)


def in_wedge(shape, tilts) -> tuple[np.ndarray, np.ndarray]:
    """|k| in 1/Å of the full transform of a volume, and which coefficients tilts about y measure."""
    kz, ky, kx = np.meshgrid(*[np.fft.fftfreq(n, PIXEL_SIZE) for n in shape], indexing="ij")
    angle = np.degrees(np.arctan2(np.where(kx < 0, -kz, kz), np.abs(kx)))
    return np.sqrt(kx**2 + ky**2 + kz**2), (angle >= tilts[0]) & (angle <= tilts[1])


def coloured(tilts, factor: float = 7.0) -> np.ndarray:
    """Noise that falls with the frequency, within what tilts measure."""
    k, measured = in_wedge(SHAPE, tilts)
    white = np.random.default_rng(0).normal(size=SHAPE)
    return np.fft.ifftn(np.fft.fftn(white) * factor * (0.2 + np.exp(-((k / 0.08) ** 2))) * measured).real


def test_a_whitened_volume_has_been_divided_by_its_noise_power() -> None:
    """Noise of any colour: where the band is 1 all measured shells have the inverse power, and the rest has none.

    Rings of a volume of 40 voxels are a sixth of the colour's width apart: 20 % is what their smoothing leaves.
    """
    tilts = (-50.0, 60.0)
    out, _ = specimen.whiten_volume(torch.from_numpy(coloured(tilts)).float(), tilts, BAND, PIXEL_SIZE)
    k, measured = in_wedge(SHAPE, tilts)
    power = np.abs(np.fft.fftn(out.numpy())) ** 2
    edges = np.linspace(1 / (1.6 * DIAMETER) + 0.005, 0.87 / RESOLUTION, 7)
    colour = (7 * (0.2 + np.exp(-((k / 0.08) ** 2)))) ** 2
    shells = [(power * colour)[measured & (k > a) & (k <= b)].mean() for a, b in pairwise(edges)]
    assert max(shells) / min(shells) < 1.25
    assert power[(k > 1 / RESOLUTION) | ~measured].max() < 1e-6 * power.mean()


def test_noise_of_a_volume_has_scores_of_variance_one() -> None:
    """Whatever its scale and colour, a whitened volume is in the units that the norms are in."""
    tilts = (-50.0, 60.0)
    white, wedge = specimen.whiten_volume(torch.from_numpy(coloured(tilts)).float(), tilts, BAND, PIXEL_SIZE)
    data, template = white.numpy(), plain()
    turns = random_rotations(4, torch.Generator().manual_seed(1))
    for turn, norm in zip(turns.numpy(), wedge.norms(template, turns).tolist(), strict=True):
        kernel = np.zeros(SHAPE)
        kernel[:BOX, :BOX, :BOX] = balanced(BOX, turn).numpy()
        scores = np.fft.ifftn(np.fft.fftn(data) * np.fft.fftn(kernel).conj()).real / norm
        assert scores.std() == pytest.approx(1, abs=0.1)
