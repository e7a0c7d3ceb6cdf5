"""spectra: rings where the CTF has them, heights where the geometry has them, and counts that the scatter agrees with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods import erase
from libemc.methods.estimate_ctf import spectra
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices
from tests.by_hand import ctf, tilt_matrix
from tests.methods.estimate_ctf.films import Film

FLAT = (0.0,)


def flat(count=1):
    return TiltGeometry(
        torch.eye(3).double().expand(count, 3, 3),
        torch.zeros(count, 2).double(),
        torch.ones(count).double(),
        torch.ones(count).bool(),
    )


def measured(images, pixel, geometry=None):
    return spectra.measure(images.__getitem__, images.shape[1:], pixel, geometry or flat(len(images)))


def noise(count, shape, seed=0):
    return np.random.default_rng(seed).normal(5, 1, (count, *shape)).astype(np.float32)


def contrast(found, film, stretch=1.0, angle=None, defocus=None):
    """(S, K) of -cos 2χ, as 2 CTF² - 1, at frequencies that are `stretch` times what the spectra say."""
    k, direction = found.k * stretch, np.radians(found.angle)[:, None]
    z, half = defocus or film.defocus, film.astigmatism / 2
    optics = film.phase, film.kv, film.cs, film.contrast_fraction
    lens = ctf(k * np.cos(direction), k * np.sin(direction), z + half, z - half, angle or film.angle, *optics)
    return 2 * lens**2 - 1


def agreement(found, expected, finest=0.14):
    """Correlation of rings and expectation, weighted by the counts, without what is coarser than 25 Å."""
    inside = (found.k > 0.04) & (found.k < finest)
    weight = found.count[0][:, inside]
    left, right = ((a[:, inside] - np.average(a[:, inside], weights=weight)) for a in (found.power[0], expected))
    return float((weight * left * right).sum() / math.sqrt((weight * left**2).sum() * (weight * right**2).sum()))


def test_astigmatic_rings_lie_in_their_directions() -> None:
    """Rings of a film without shot noise: the angle is from +x towards +y, which is downwards in the array.

    Of all angles the true one fits best, and nearly all of the spectra is rings: 240 coefficients and more in each value.
    """
    film = Film(tilts=FLAT, shape=(500, 640), astigmatism=2400.0, angle=35.0, film=0.0, signal=np.inf)
    flat_film = film.image(0) - 100
    found = measured(flat_film[None].astype(np.float32), film.pixel)
    assert found.power.shape == found.count.shape == (1, spectra.SECTORS, len(found.k))
    np.testing.assert_allclose(found.angle, np.arange(spectra.SECTORS) * 180 / spectra.SECTORS)
    angles = np.arange(5.0, 185.0, 10.0)
    fits = [agreement(found, contrast(found, film, angle=a)) for a in angles]
    assert angles[int(np.argmax(fits))] == 35.0
    assert max(fits) > 0.8
    assert (found.k >= 1 / spectra.COARSEST - 1e-9).all() and found.k[-1] < 0.5 / film.pixel
    assert found.side == pytest.approx(spectra.TILE, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "pixel"),
    [((400, 431), 3.0), ((431, 400), 3.0), ((417, 431), 3.0), ((400, 430), 3.0), ((612, 604), 1.5), ((603, 600), 1.0)],
)
def test_the_frequencies_are_those_of_the_pixels(shape: tuple[int, int], pixel: float) -> None:
    """Sides even and odd, images kept and resampled: the rings fit best where `k` says, along both axes, to 0.0015 of k.

    Eight films tell it to about 0.0004; one pixel of a side of 400 is 0.0025.
    """
    film = Film(tilts=FLAT, shape=shape, pixel=pixel, defocus=22000.0, film=0.0, signal=np.inf)
    count = 16
    images = np.array([replace(film, seed=s).image(0) - 100 for s in range(8)], np.float32)
    found = measured(images, pixel)
    mean = found.power.mean(0, keepdims=True)
    stretches = 1 + np.linspace(-0.01, 0.01, 41)
    for axis, sectors in (("x", [0, 1, 11]), ("y", [5, 6, 7])):
        count, angle = found.count[:1, sectors], found.angle[sectors]
        part = replace(found, power=mean[:, sectors], count=count, angle=angle)
        fits = np.array([agreement(part, contrast(part, film, s)) for s in stretches])
        curve = np.polyfit(stretches - 1, fits, 2)
        assert abs(-curve[1] / (2 * curve[0])) < 0.0015, axis


def test_fine_images_are_resampled_and_coarse_ones_are_not() -> None:
    """To 2 Å and no coarser; so the highest frequency is 0.95 of that of 2 Å, or of the image's own pixels."""
    for pixel, shape, highest in (
        (1.0, (400, 500), 0.95 / 4),
        (2.0, (400, 500), 0.95 / 4),
        (4.0, (250, 240), 0.95 / 8),
    ):
        found = measured(noise(1, shape), pixel)
        assert found.k[-1] == pytest.approx(highest, rel=0.02)
        assert found.k[0] == pytest.approx(1 / spectra.COARSEST, rel=0.06)


def starts(n, side):
    return np.linspace(0, n - side, math.ceil((n - side) / (side / 2)) + 1).round().astype(int) if n > side else [0]


@pytest.mark.parametrize("shape", [(500, 640), (250, 700)])
def test_heights_and_slopes_are_those_of_the_middle_plane(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers of no thickness every tile is by itself: its centre's line of sight meets the plane where the matrix says.

    Points of the plane, projected by the geometry, are seen at those heights too. The slope is the standard deviation of
    the height over a tile under the square of the window.
    """
    monkeypatch.setattr(spectra, "LAYER", 1e-6)
    pixel, angles = 4.0, ((-63.0, 40.0, 3.0), (85.0, -55.0, -2.0), (10.0, 5.0, 1.0))
    matrices = torch.from_numpy(np.array([tilt_matrix(*a) for a in angles]))
    shift = torch.tensor([[60.0, -45.0], [-80.0, 33.0], [12.0, 120.0]]).double()
    geometry = TiltGeometry(matrices, shift, torch.tensor([1.02, 0.97, 1.0]).double(), torch.ones(3).bool())
    found = measured(noise(3, shape), pixel, geometry)
    n = round(found.side / pixel)
    line = (1 - np.cos(2 * np.pi * np.arange(n) / n)) / 2
    window = np.outer(line, line) ** 2
    for j, matrix in enumerate(matrices.numpy()):
        heights = []
        for row in starts(shape[0], n):
            for column in starts(shape[1], n):
                seen = (np.array([column, row]) + n // 2 - np.array([shape[1] // 2, shape[0] // 2])) * pixel
                # r = (x, y, 0) with magnification · (q_xy + shift) = seen, and its q_z
                target = seen / float(geometry.magnification[j]) - shift[j].numpy()
                a, b, c, d = matrix[0, 0], matrix[0, 1], matrix[1, 0], matrix[1, 1]
                x, y = np.array([d * target[0] - b * target[1], a * target[1] - c * target[0]]) / (a * d - b * c)
                position, height = geometry.project(torch.tensor([[x, y, 0.0]]).double())
                np.testing.assert_allclose(position[0, j].numpy(), seen, atol=1e-8)
                heights.append(float(height[0, j]))
        mine = found.tilt == j
        np.testing.assert_allclose(np.sort(found.height[mine]), np.sort(heights), atol=1e-4)
        normal = matrix[:, 2]
        y, x = np.meshgrid(np.arange(n) * pixel, np.arange(n) * pixel, indexing="ij")
        plane = -(normal[0] * x + normal[1] * y) / normal[2]
        mean = (window * plane).sum() / window.sum()
        spread = math.sqrt((window * (plane - mean) ** 2).sum() / window.sum())
        np.testing.assert_allclose(found.slope[mine], spread, rtol=1e-3)
        assert found.beam[j] == pytest.approx(1 / normal[2])


def test_tiles_of_a_height_share_a_spectrum() -> None:
    """All tiles are in one group of each layer; a flat image has one; unused tilts have none."""
    tilts = torch.tensor([0.0, 50.0, 50.0]).double()
    matrices = tilt_matrices(torch.full((3,), 90.0).double(), tilts, torch.zeros(3).double())
    use = torch.tensor([True, True, False])
    geometry = TiltGeometry(matrices, torch.zeros(3, 2).double(), torch.ones(3).double(), use)
    found = measured(noise(3, (900, 500)), 4.0, geometry)  # the axis lies along x, and the height changes along y
    assert set(found.tilt) == {0, 1}
    (alone,) = found.height[found.tilt == 0]
    assert alone == pytest.approx(0.0, abs=1e-9)
    layers = np.round(found.height[found.tilt == 1] / spectra.LAYER)
    assert len(set(layers)) == len(layers) >= 5
    counts = [found.count[found.tilt == j].sum() for j in (0, 1)]
    assert counts[0] == pytest.approx(counts[1])


def scatter(shape, repeats=80):
    """Variance of means over six rings in images of noise, times their counts."""
    found = measured(noise(repeats, shape), 6.0)
    assert found.count.min() >= 0 and found.side == pytest.approx(900.0)
    whole = found.power.shape[2] // 6 * 6
    power, count = (a[:, :, :whole].reshape(repeats, spectra.SECTORS, -1, 6) for a in (found.power, found.count))
    total = count.sum(3)
    mean = (power * count).sum(3) / total
    assert np.average(mean, weights=total) == pytest.approx(1.0, abs=0.01)
    return float((mean.var(0, ddof=1) * total[0]).mean())


def test_counts_are_what_the_scatter_says() -> None:
    """Means of n independent coefficients scatter by 1/n. A lone tile: by 18 % less than that, because six rings lose less to
    their neighbours than all would; 80 images, 12 sectors and 9 blocks tell it to 2 %."""
    assert scatter((150, 150)) == pytest.approx(0.82, abs=0.06)


@pytest.mark.parametrize("shape", [(375, 300), (150, 160), (380, 300)])
def test_tiles_that_overlap_are_not_counted_twice(shape: tuple[int, int]) -> None:
    """As many coefficients as scatter like those of a lone tile, to 20 %, which is 10 % of an error: overlap by half, by
    nearly all, and by somewhat more than half."""
    assert scatter(shape) / scatter((150, 150)) == pytest.approx(1.0, abs=0.2)


def test_the_background_does_not_matter() -> None:
    """Scale and offset change nothing; a smooth function of frequency leaves one that is smooth, and alike in all directions."""
    images = noise(1, (420, 460), 3)
    ky, kx = np.fft.fftfreq(420)[:, None], np.fft.rfftfreq(460)[None]
    envelope = np.exp(-3 * (kx**2 + ky**2))
    changed = np.fft.irfft2(np.fft.rfft2(images[0]) * envelope, s=images.shape[1:])[None]
    first, second, third = (measured(a.astype(np.float32), 3.0) for a in (images, changed, 37 * images - 1000))
    np.testing.assert_allclose(third.power, first.power, rtol=1e-3, atol=1e-4)
    ratio = (second.power / np.where(first.power > 0, first.power, np.nan))[0]
    mean = np.nanmean(ratio, axis=0)
    assert np.nanstd(ratio - mean) < 0.02  # the noise's own is 0.2
    assert mean.min() > 0.8 and mean.max() < 1.25  # the envelope's square goes from 1 to 0.2
    assert np.abs(np.diff(mean)).max() < 0.02


@pytest.mark.parametrize("shape", [(420, 460), (401, 380)])
def test_gold_is_removed(shape: tuple[int, int]) -> None:
    """Two beads of 100 Å, 12 times as dark as the noise is strong: noise is in their place, pixels far from them stay, and
    the rings are what they were."""
    film = Film(tilts=FLAT, shape=shape, film=0.0, signal=2.0)
    clean = film.load(0) - 100
    y, x = np.meshgrid(*[np.arange(n) * film.pixel for n in shape], indexing="ij")
    far = np.minimum(np.minimum(y, y.max() - y), np.minimum(x, x.max() - x)) > 120
    beads = clean.copy()
    for at in ((300.0, 420.0), (830.0, 700.0)):
        r = np.hypot(y - at[0], x - at[1])
        beads -= np.where(r < 50, 12 * clean.std() * np.sqrt(np.maximum(0, 1 - (r / 50) ** 2)), 0).astype(np.float32)
        far &= r > 50 + erase.SPOT_MARGIN + 3 * erase.SPOT_BLUR
    cleaned = erase.without_spots(torch.from_numpy(beads), film.pixel, 0).numpy()
    np.testing.assert_array_equal(cleaned[far], beads[far])
    spots = np.hypot(y - 300, x - 420) < 50
    assert beads[spots].mean() < -5 * clean.std()
    assert abs(cleaned[spots].mean()) < clean.std() / 2
    assert cleaned[spots].std() == pytest.approx(clean.std(), rel=0.1)  # of 870 pixels
    first, second = measured(clean[None], film.pixel), measured(beads[None], film.pixel)
    expected = contrast(first, film)
    assert agreement(second, expected) > agreement(first, expected) - 0.05 > 0.3


def test_noise_has_no_gold() -> None:
    """In twenty images of noise nothing stands out by six standard deviations, nor at their edges."""
    changed = 0
    for image in noise(20, (300, 320), 4) - 5:
        cleaned = erase.without_spots(torch.from_numpy(image), 3.0, 0).numpy()
        changed += int((cleaned != image).any())
    assert changed == 0


def test_a_turned_image_has_turned_spectra() -> None:
    """An image turned by 90 degrees: the sectors move by half of the half circle."""
    images = noise(1, (300, 300), 8)
    turned = np.rot90(images, axes=(1, 2)).copy()
    first, second = measured(images, 3.0), measured(turned, 3.0)
    moved = np.roll(first.power, spectra.SECTORS // 2, axis=1)
    inside = (first.count > 3) & (np.roll(first.count, spectra.SECTORS // 2, axis=1) > 3)
    assert np.corrcoef(moved[inside], second.power[inside])[0, 1] > 0.95
    assert abs(np.corrcoef(first.power[inside], second.power[inside])[0, 1]) < 0.3
