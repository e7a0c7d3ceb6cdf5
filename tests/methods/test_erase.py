"""Beads out of images: the drawn pixels against the closed form, and tomograms in which nothing of a bead is left."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from libemc.methods import erase
from libemc.methods import reconstruct as rec
from libemc.methods.erase import Beads
from libemc.methods.reconstruct import Grid, Weighting
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.grids import centred_radius, rfft_radius
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Landmarks, Source, Tilts, TiltSeriesRecord


def coloured(shape, seed, slope=1.5):
    """Noise whose amplitude falls with frequency, variance 1."""
    generator = torch.Generator().manual_seed(seed)
    k = rfft_radius(shape).float().clamp_min(1 / max(shape))
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(shape, generator=generator)) * k**-slope, s=shape)
    return (noise - noise.mean()) / noise.std()


def test_drawn_pixels_have_the_conditional_distribution():
    """Mean and covariance of many drawings, against the textbook formulas of a Gaussian vector of which part is known."""
    shape = (12, 12)
    spectrum = 1 / (0.02 + rfft_radius(shape).float() ** 2)
    free = centred_radius(shape) <= 2.5
    full = torch.fft.irfft2(spectrum, s=shape).double()
    index = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    lag = (index[:, None] - index[None]) % 12
    covariance = full[lag[..., 0], lag[..., 1]]
    hole = free.flatten()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    weights = covariance[hole][:, ~hole] @ torch.linalg.inv(covariance[~hole][:, ~hole])
    mean = weights @ values.flatten()[~hole].double()
    spread = covariance[hole][:, hole] - weights @ covariance[~hole][:, hole]
    generator = torch.Generator().manual_seed(0)
    draws = [erase.constrained_realisation(values, free, spectrum, generator) for _ in range(600)]
    assert all(torch.equal(d[~free], values[~free]) for d in draws)
    drawn = torch.stack([d[free].double() for d in draws])
    # standard errors of 600 drawings: 4 % of the deviation for means, 6 % of the variance for covariances; five of them
    assert torch.allclose(drawn.mean(0), mean, atol=0.2 * float(spread.diagonal().max().sqrt()))
    assert torch.allclose(torch.cov(drawn.T), spread, atol=0.3 * float(spread.diagonal().max()))


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_filled_discs_look_like_the_rest(slope):
    """Inside erased discs variance and local correlation are those of the image; all else is untouched."""
    shape = (300, 260)
    image = 100 + 5 * coloured(shape, 3, slope)
    line = torch.arange(20, 260, 40).double()
    centres = torch.cartesian_prod(line[:-1], line)
    covered = erase.discs(shape, centres, torch.full((len(centres),), 9.0))
    spoilt = torch.where(covered, torch.tensor(-3000.0), image)
    clean = erase.fill(spoilt, covered, torch.Generator().manual_seed(0))
    assert torch.equal(clean[~covered], image[~covered])
    inner = erase.discs(shape, centres, torch.full((len(centres),), 8.0))

    def texture(x):  # variances of the differences between neighbours, and of the image about its neighbourhood
        smooth = torch.nn.functional.avg_pool2d(x[None, None], 15, 1, 7)[0, 0]
        return (x - smooth)[inner].var(), (x - x.roll(1, 0))[inner].var(), (x - x.roll(3, 1))[inner].var()

    for found, expected in zip(texture(clean), texture(image), strict=True):
        # about 8000 pixels: 2 % for white noise; more for correlated
        assert float(found) == pytest.approx(float(expected), rel=0.15)
    edge = covered & ~erase.discs(shape, centres, torch.full((len(centres),), 8.0))
    steps = (clean - clean.roll(1, 0))[edge].std() / (image - image.roll(1, 0))[edge].std()
    assert float(steps) == pytest.approx(1.0, abs=0.15)  # no seam


def test_overlapping_discs_and_borders():
    image = coloured((80, 90), 0)
    centres = torch.tensor([[0.0, 0.0], [45.0, 40.0], [52.0, 40.0], [88.0, 79.0], [300.0, 20.0]]).double()
    covered = erase.discs((80, 90), centres, torch.full((5,), 6.0))
    clean = erase.fill(torch.where(covered, 50.0, image), covered, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(clean).all())
    assert float(clean[covered].abs().max()) < 6
    nothing = torch.zeros((80, 90), dtype=torch.bool)
    assert torch.equal(erase.fill(image, nothing, torch.Generator()), image)


# ------------------------------------------------------------------------------------------------- a bead's tomogram
TILTS = np.linspace(-60, 60, 17)
PIXEL_SIZE, SIDE, RADIUS = 10.0, 140, 50.0
BEADS = np.array([[300.0, -200.0, 90.0], [-350.0, 150.0, -90.0], [100.0, 420.0, 60.0], [-80.0, -400.0, -60.0],
                  [450.0, 250.0, 0.0]])  # fmt: skip


def landmarks(count):
    return Landmarks(
        xyz=((0.0, 0.0, 0.0), *(tuple(b) for b in BEADS[:count].tolist())),
        kind=("feature", *("bead",) * count),
        diameter=(None, *(2 * RADIUS,) * count),
        residual=(1.0,) * (count + 1),
    )


def record(count, contrast="dark"):
    n, zeros = len(TILTS), (0.0,) * len(TILTS)
    source = Source(
        stack="s.mrc", shape=(n, SIDE, SIDE), pixel_size=PIXEL_SIZE, voltage=300.0, cs=2.7, amplitude_contrast=0.07,
        contrast=contrast,
    )  # fmt: skip
    alignment = Alignment(
        axis=(85.0,) * n, tilt=tuple(TILTS.tolist()), xtilt=zeros, shift_x=zeros, shift_y=zeros,
        landmarks=landmarks(count),
    )  # fmt: skip
    return TiltSeriesRecord(
        name="s", source=source, tilts=Tilts(nominal=tuple(TILTS.tolist()), use=(True,) * n), alignment=alignment
    )


def simulated(sign=1.0):
    """Noise of unit variance with beads of ten times that, a white fringe around each, and the same without beads."""
    g = TiltGeometry(tilt_matrices(85.0, torch.from_numpy(TILTS), 0.0), torch.zeros(17, 2).double(),
                     torch.ones(17).double(), torch.ones(17, dtype=torch.bool))  # fmt: skip
    p = g.project(torch.from_numpy(BEADS))[0].numpy()
    y = x = (np.arange(SIDE) - SIDE // 2) * PIXEL_SIZE
    r = np.sqrt((x - p[..., 0, None, None]) ** 2 + (y[:, None] - p[..., 1, None, None]) ** 2)
    thick = 2 * np.sqrt(np.maximum(RADIUS**2 - r**2, 0)) / (2 * RADIUS)
    fringe = 0.25 * np.exp(-((r - RADIUS - 12) ** 2) / 8.0**2)
    noise = np.stack([coloured((SIDE, SIDE), 10 + j, 0.5).numpy() for j in range(17)])
    return g, noise, noise - sign * 10 * (thick - fringe).sum(0)


def test_nothing_of_a_bead_is_left():
    """Two of five beads are unknown to the alignment. Density and streaks at the beads fall to the background's."""
    g, noise, images = simulated()
    beads = Beads.of(record(3), g, range(17), seed=4)
    assert beads.positions.shape == (17, 3, 2)  # the feature is no bead
    grid, volumes = Grid((36, 110, 110), PIXEL_SIZE), {}
    for name, made, clean in (("noise", noise, None), ("beads", images, None),
                              ("erased", images, lambda j, image: beads.erase(j, image, PIXEL_SIZE))):  # fmt: skip
        filtered = np.empty((17, SIDE, SIDE), np.float32)
        list(rec.prepare_images(lambda j, made=made: made[j], g, 1, PIXEL_SIZE, Weighting(400.0), filtered, clean))
        volumes[name] = np.concatenate([slab for _, slab in rec.reconstruct(filtered, g, grid)], axis=1)
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) * PIXEL_SIZE for n in grid.shape], indexing="ij")
    close, streak = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
    for bx, by, bz in BEADS:
        distance = np.sqrt((x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2)
        close |= distance < 80
        streak |= (np.hypot(x - bx, y - by) < 200) & (distance > 100)
    spread = {name: (v[close].std(), v[streak].std(), v.std()) for name, v in volumes.items()}
    assert spread["beads"][0] > 4 * spread["noise"][0]
    # the same noise but for the discs: 5 x 500 voxels, correlated over a few
    assert spread["erased"][0] == pytest.approx(spread["noise"][0], rel=0.15)
    assert spread["erased"][1] == pytest.approx(spread["noise"][1], rel=0.05)
    assert abs(volumes["erased"][close].mean()) < 0.2 * spread["noise"][0]


@pytest.mark.parametrize("contrast", ["dark", "bright"])
def test_only_beads_are_taken_for_beads(contrast):
    """From the three known beads of an image the other two are found, and no more."""
    g, noise, images = simulated(1.0 if contrast == "dark" else -1.0)
    beads = Beads.of(record(3, contrast), g, range(17), seed=0)
    assert Beads.of(record(0), g, range(17)) is None
    for j in (0, 8, 16):
        covered = beads.covered(j, torch.from_numpy(images[j]).float(), PIXEL_SIZE)
        centres = g.project(torch.from_numpy(BEADS))[0][:, j] / PIXEL_SIZE + SIDE // 2
        radius = RADIUS / PIXEL_SIZE + float(beads.margin[j]) / PIXEL_SIZE
        true = erase.discs((SIDE, SIDE), centres, torch.full((5,), radius - 1.5))
        beyond = erase.discs((SIDE, SIDE), centres, torch.full((5,), radius + 1.5))
        assert bool((covered | ~true).all())
        assert bool((beyond | ~covered).all())
    first, again = (beads.erase(3, torch.from_numpy(images[3]).float(), PIXEL_SIZE) for _ in range(2))
    assert torch.equal(first, again)
    assert math.isclose(float(first.std()), float(noise[3].std()), rel_tol=0.03)


def test_halves_share_no_noise():
    """An image gets the noise of its number in the stack, alone or among others, and no other image the same."""
    g, _, images = simulated()
    whole = Beads.of(record(3), g, range(17), seed=1)
    odd, even = (Beads.of(record(3), g.select(list(t)), t, seed=1) for t in (range(1, 17, 2), range(0, 17, 2)))
    image = torch.from_numpy(images[7]).float()
    assert torch.equal(odd.erase(3, image, PIXEL_SIZE), whole.erase(7, image, PIXEL_SIZE))
    moved = dataclasses.replace(even, positions=odd.positions, margin=odd.margin)
    a, b = odd.erase(3, image, PIXEL_SIZE), moved.erase(3, image, PIXEL_SIZE)
    filled = odd.covered(3, image, PIXEL_SIZE)
    assert torch.equal(a[~filled], b[~filled]) and not torch.equal(a[filled], b[filled])
