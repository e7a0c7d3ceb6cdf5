"""Landmarks against predictions by the other images: known displacements, honest errors, votes, invisible motion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.align import tracks
from libemc.methods.align.tracks import Evidence, Scale
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import tilt_matrices

TILTS = torch.linspace(-57, 57, 20, dtype=torch.float64)
AXIS = 40.0
PIXEL_SIZE = 10.0  # Å
SHAPE = (100, 112)
SCALE = Scale(PIXEL_SIZE, diameter=260.0, radius=0.3, reach=60.0, depth=260.0)
OFF = {4: (7.0, -12.0), 11: (-16.0, 5.0)}  # Å, images that are elsewhere than the geometry says
NOISE = 1.5  # deviations of a pixel; a single Gaussian is 1 high


def geometry(shift: np.ndarray) -> TiltGeometry:
    count = len(TILTS)
    ones = torch.ones(count, dtype=torch.float64)
    return TiltGeometry(tilt_matrices(AXIS, TILTS, 0.0), torch.from_numpy(shift), ones, torch.ones(count).bool())


@pytest.fixture(scope="module")
def known() -> tuple[np.ndarray, TiltGeometry, torch.Tensor, torch.Tensor]:
    """Images, the geometry without what two of them are off by, landmarks, and how far each image is off (T, 2) Å.

    A landmark is 14 dark Gaussians of 12 Å, on their own in a field of noise.
    """
    rng = np.random.default_rng(1)
    y, x = np.meshgrid([-300.0, 0.0, 300.0], [-300.0, 0.0, 300.0])
    points = np.stack([x.ravel(), y.ravel(), np.zeros(9)], 1) * [0.95, 0.85, 1]
    atoms = (points[:, None] + rng.uniform(-70, 70, (9, 14, 3))).reshape(-1, 3)
    off = np.zeros((len(TILTS), 2))
    for j, d in OFF.items():
        off[j] = d
    here = geometry(rng.normal(0, 8, (len(TILTS), 2)))
    at = here.project(torch.from_numpy(atoms))[0].numpy().transpose(1, 0, 2) + off[:, None]
    v, u = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE)
    across, down = (np.exp(-((line - at[..., i, None]) ** 2) / 288) for i, line in enumerate((u, v)))
    images = -np.einsum("tpy,tpx->tyx", down, across) + NOISE * rng.standard_normal((len(TILTS), *SHAPE))
    return images.astype(np.float32), here, torch.from_numpy(points), torch.from_numpy(off)


@pytest.fixture(scope="module")
def evidence(known: tuple[np.ndarray, TiltGeometry, torch.Tensor, torch.Tensor]) -> Evidence:
    images, here, points, _ = known
    empty = torch.tensor([[145.0, 130.0, 0.0], [-145.0, -130.0, 0.0]], dtype=torch.float64)
    noise = tracks.noise_power(images, SCALE, here, empty)
    return tracks.compare(images, SCALE, here, points, noise, torch.ones(len(TILTS)))


def test_noise_power_is_that_of_the_noise() -> None:
    images = np.random.default_rng(0).standard_normal((20, *SHAPE)).astype(np.float32)
    images *= np.linspace(1, 2, 20, dtype=np.float32)[:, None, None]
    y, x = torch.meshgrid(torch.linspace(-250, 250, 6), torch.linspace(-250, 250, 6), indexing="ij")
    points = torch.stack([x, y, 0 * x], -1).reshape(-1, 3).double()
    here = geometry(np.zeros((20, 2)))
    power = tracks.noise_power(images, SCALE, here, points)[:, 3:]
    window = float(tracks.Cutter(images, SCALE, here).window.square().sum())
    expected = window * torch.linspace(1, 2, 20) ** 2
    # rings of a few tens of coefficients, the median over 36 patches that overlap: 8 % each, the worst of 20 images more
    torch.testing.assert_close(power.mean(1), expected, rtol=0.12, atol=0)


def test_patches_are_centred(known: tuple[np.ndarray, TiltGeometry, torch.Tensor, torch.Tensor]) -> None:
    """A Gaussian has no phase when it's cut out at its place, whatever part of a pixel that is at."""
    at = np.array([123.4, -77.7])
    v, u = ((np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE)
    image = np.exp(-((u - at[0]) ** 2 + ((v - at[1]) ** 2)[:, None]) / (2 * 15**2))[None].astype(np.float32)
    here = geometry(np.zeros((20, 2))).select([0])
    here = TiltGeometry(torch.eye(3, dtype=torch.float64)[None], here.shift, here.magnification, here.use)
    cutter = tracks.Cutter(image, SCALE, here)
    spectra, seen, where = cutter(torch.tensor([*at, 50.0], dtype=torch.float64))
    assert seen.all()
    np.testing.assert_allclose(where[0], at)
    band = SCALE.band
    angle = spectra[0, 2 * band.ky, 2 * band.kx][band.radii < 6].angle().abs()
    # the window is centred on a whole pixel, at most half of one away from the point; a pixel would turn them by 0.75
    assert float(angle.max()) < 0.06
    assert float(angle.mean()) < 0.012
    assert not cutter(torch.tensor([700.0, 0.0, 0.0], dtype=torch.float64))[1].any()


def test_single_images_are_found(
    known: tuple[np.ndarray, TiltGeometry, torch.Tensor, torch.Tensor], evidence: Evidence
) -> None:
    """What is seen of the images' errors is what the links say, within errors that are what they're said to be."""
    _, here, points, off = known
    torch.testing.assert_close(evidence.centre, here.project(points)[0].transpose(0, 1))
    assert evidence.seen.all()
    assert evidence.links is not None
    assert evidence.seen.shape == (len(TILTS), len(points))
    moved, information = tracks.displacements(evidence, torch.zeros(len(TILTS), 2, dtype=torch.float64), 40.0)
    found = torch.isfinite(moved).all(-1)
    assert float(found.double().mean()) > 0.8
    expected = torch.einsum("pjiab,ib->jpa", evidence.links.double(), off)
    rest = torch.where(found[..., None], moved - expected, 0.0)
    squares = torch.einsum("tpa,tpab,tpb->tp", rest, information, rest)[found]
    # of chi squared with two degrees of freedom; a factor of two in the deviation is one of four
    assert 2 * math.log(2) / 4 < float(squares.median()) < 2 * math.log(2) * 4
    sigma = torch.linalg.inv(information[found]).diagonal(dim1=-2, dim2=-1).sqrt()
    assert 0.1 * PIXEL_SIZE < float(sigma.median()) < 0.6 * PIXEL_SIZE
    for j, d in OFF.items():
        # nine landmarks of half a pixel each at most; their neighbours take back a little of the motion (the links)
        mean = torch.nanmean(moved[j], 0)
        assert float((mean - expected[j].mean(0)).norm()) < 0.35 * PIXEL_SIZE
        assert float((mean - torch.tensor(d)).norm()) < 0.5 * PIXEL_SIZE
    shift = tracks.vote(evidence)
    for j in OFF:
        assert float((shift[j] - expected[j].mean(0)).norm()) < 0.4 * PIXEL_SIZE
    assert float((evidence.gain - 1).abs().mean()) < 0.25  # all images show the same


def test_motion_in_space_is_not_seen(evidence: Evidence) -> None:
    matrices = tilt_matrices(AXIS, TILTS, 0.0)
    assert evidence.links is not None
    for r in torch.eye(3, dtype=torch.float64):
        seen = torch.einsum("pjiab,ib->pja", evidence.links.double(), matrices[:, :2] @ r).norm(dim=-1)
        # as in the test of `couplings`: motion along the beam is missing, on one side of the first and the last image
        assert float(seen[:, 1:-1].mean()) < 0.05
        assert float(seen.max()) < 0.2
    alone = torch.zeros(len(TILTS), 2, dtype=torch.float64)
    alone[9, 0] = 1.0
    assert float(torch.einsum("pjiab,ib->pja", evidence.links.double(), alone)[:, 9, 0].min()) == 1.0


def made(places: np.ndarray, strength: float) -> Evidence:
    """Likelihoods (T, P) that are highest at known displacements, px, as sharp as the band."""
    count, landmarks = places.shape[:2]
    band = SCALE.band
    k = torch.stack([band.kx, band.ky]).float() * (2 * math.pi / SCALE.box)
    cross = strength * torch.polar(torch.tensor(1.0), -(torch.from_numpy(places).float() @ k)).transpose(0, 1)
    cross = cross / len(band.kx)
    return Evidence(
        SCALE,
        cross.contiguous(),
        torch.ones(count, landmarks).bool(),
        torch.zeros(count, landmarks, 2).double(),
        torch.ones(count),
        torch.ones(landmarks),
        None,
    )


def test_votes_for_the_common_shift() -> None:
    """Of ten landmarks four are wrong, and surer than the others."""
    rng = np.random.default_rng(2)
    common = rng.uniform(-4, 4, (8, 1, 2))
    right = common + rng.normal(0, 0.2, (8, 6, 2))
    angle = rng.uniform(0, 2 * math.pi, (8, 4))
    wrong = common * 0.3 + 4.5 * np.stack([np.cos(angle), np.sin(angle)], -1)
    assert np.linalg.norm(wrong - common, axis=-1).min() > 1
    parts = made(right, 12.0), made(wrong, 40.0)
    every = Evidence(
        SCALE,
        torch.cat([e.cross for e in parts]),
        torch.cat([e.seen for e in parts], 1),
        torch.cat([e.centre for e in parts], 1),
        torch.ones(8),
        torch.ones(10),
        None,
    )
    shift = tracks.vote(every)
    assert shift.shape == (8, 2)
    # densities in whole pixels blurred by one: a third of a pixel
    np.testing.assert_allclose(shift / PIXEL_SIZE, common[:, 0], atol=0.5)
    moved, _ = tracks.displacements(every, shift, 15.0)
    np.testing.assert_allclose(moved[:, :6].numpy() / PIXEL_SIZE, right, atol=1e-3)  # Newton steps, converged
    # where a wrong one is found, it's near enough to be looked for
    far = (moved - shift[:, None])[:, 6:].norm(dim=-1)
    assert not (far > 15.0 + 2 * PIXEL_SIZE).any()
    assert bool(torch.isnan(far).any())
    # who isn't seen has no vote: without the six that are right, it's the wrong ones that decide
    alone = replace(every, seen=every.seen & (torch.arange(10) >= 6))
    away = (tracks.vote(alone) / PIXEL_SIZE - torch.from_numpy(common[:, 0])).norm(dim=1)
    assert float(away.min()) > 1  # nearer than this there is none of them


def test_information_is_the_curvature() -> None:
    """The inverse covariance is the likelihood's curvature with the floor added; weak ones give nothing."""
    strong, weak = made(np.zeros((1, 1, 2)) + 0.3, 50.0), made(np.zeros((1, 1, 2)), 0.5)
    zero = torch.zeros(1, 2).double()
    moved, information = tracks.displacements(strong, zero, 40.0)
    np.testing.assert_allclose(moved[0, 0], 0.3 * PIXEL_SIZE, atol=1e-3)
    k = torch.stack([SCALE.band.kx, SCALE.band.ky], 1).double() * (2 * math.pi / SCALE.box)
    curvature = 50.0 / len(k) * k.T @ k
    variance = (torch.linalg.inv(curvature) + tracks.FLOOR**2 * torch.eye(2)) * PIXEL_SIZE**2
    torch.testing.assert_close(information[0, 0], torch.linalg.inv(variance), rtol=1e-3, atol=1e-9)  # and certainty
    moved, information = tracks.displacements(weak, zero, 40.0)
    assert torch.isnan(moved).all()
    assert not information.any()
