"""Predictions of an image by the others: against a Fourier volume, closed forms, and what can't be seen at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.numerics.overlap import Overlap, couplings, predict
from libemc.numerics.rotations import tilt_matrices
from libemc.numerics.slices import Accumulator, Band, FourierVolume, extract_slices, spectra_of_images

BOX = 32
DIAMETER = 16.0  # px of the object
TILTS = torch.linspace(-60, 60, 25, dtype=torch.float64)
MATRICES = tilt_matrices(35.0, TILTS, 0.0)
BAND = Band.of(BOX, 10.0)
LONE = Overlap(DIAMETER / BOX)
ALL = torch.ones(len(TILTS), dtype=torch.bool)
ONES = torch.ones(len(TILTS))


def images(matrices: torch.Tensor = MATRICES, shift: torch.Tensor | None = None) -> torch.Tensor:
    """(T, n, n): exact projections of 16 Gaussians of 1.5 px, of either sign, each image moved by `shift` px."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (16, 3)) * DIAMETER / 3
    at = torch.einsum("tij,pj->tpi", matrices[:, :2], torch.from_numpy(points))
    at = at if shift is None else at + shift[:, None]
    u = torch.arange(BOX) - BOX // 2
    x, y = (torch.exp(-((u - at[..., i, None]) ** 2) / (2 * 1.5**2)) for i in (0, 1))
    return torch.einsum("p,tpy,tpx->tyx", torch.from_numpy(rng.normal(size=16)), y, x).float()


def padded(pixels: torch.Tensor) -> torch.Tensor:
    """The spectra that `predict` takes."""
    out = torch.zeros(len(pixels), 2 * BOX, 2 * BOX)
    out[:, :BOX, :BOX] = pixels
    return torch.fft.rfft2(torch.roll(out, (-(BOX // 2), -(BOX // 2)), dims=(1, 2)))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b.conj()).real.sum() / (a.abs().square().sum() * b.abs().square().sum()).sqrt())


def test_as_by_a_fourier_volume() -> None:
    """Prediction of each image from the tomogram of all others, without a volume and with one."""
    pixels = images()
    values, sums, weights = predict(padded(pixels), MATRICES, BAND, LONE, ONES, ALL)
    spectra = spectra_of_images(pixels, BAND)
    torch.testing.assert_close(values, spectra, rtol=1e-4, atol=1e-3)  # of about 100, float32 transforms
    wrong = predict(padded(pixels), tilt_matrices(-35.0, TILTS, 0.0), BAND, LONE, ONES, ALL)
    for j in (7, 12, 20):
        others = [i for i in range(len(TILTS)) if i != j]
        volume = Accumulator(BOX, BAND.radius)
        volume.add(spectra[others], torch.ones(len(others), len(BAND.kx)), MATRICES[others], BAND)
        slices = extract_slices(FourierVolume.from_map(volume.map(), radius=BAND.radius), MATRICES[[j]], BAND)[0]
        assert correlation(slices, values[j]) > 0.985
        # the overlap averages over all of 1/diameter, the volume's kernel over half a pixel:
        # some percent; less than what the wrong hand costs
        here = sums[j] / (weights[j] + 0.1)
        assert correlation(here, slices) > 0.93
        assert correlation(here, values[j]) > 0.93
        assert correlation(wrong[1][j] / (wrong[2][j] + 0.1), values[j]) < 0.92


def test_an_image_does_not_predict_itself() -> None:
    pixels = images()
    before = predict(padded(pixels), MATRICES, BAND, LONE, ONES, ALL)
    changed = pixels.clone()
    changed[7] = torch.randn(BOX, BOX, generator=torch.Generator().manual_seed(0))
    after = predict(padded(changed), MATRICES, BAND, LONE, ONES, ALL)
    assert torch.equal(after[1][7], before[1][7])  # exactly
    assert torch.equal(after[2][7], before[2][7])
    assert not torch.allclose(after[1][8], before[1][8], rtol=0.1)
    # nor do those that are not used, or have no signal, predict anything, or get predictions
    use = ALL.clone()
    use[7] = False
    without = [predict(padded(p), MATRICES, BAND, LONE, ONES, use) for p in (pixels, changed)]
    assert torch.equal(without[0][1], without[1][1])
    assert not without[0][1][7].any()
    assert not without[0][2][7].any()
    silent = predict(padded(changed), MATRICES, BAND, LONE, torch.where(use, 1.0, 0.0), ALL)
    assert torch.equal(silent[1][8], without[0][1][8])
    assert silent[2][7].any()


def test_two_images_at_one_tilt() -> None:
    """One predicts the other as it is, times its gain; turned by half a turn in the plane, as its mirrored self."""
    turned = tilt_matrices(torch.tensor([35.0, 35.0 + 180.0]), torch.tensor([20.0, 20.0]), 0.0)
    two = images(turned)
    gains = torch.tensor([0.5, 2.0])
    values, sums, weights = predict(padded(two), turned, BAND, LONE, gains, ALL[:2])
    # points of the grid, up to the rounding of the matrices in float32
    torch.testing.assert_close(sums[0], 2.0 * values[0], rtol=1e-3, atol=0.02)
    torch.testing.assert_close(sums[1], 0.5 * values[1], rtol=1e-3, atol=0.02)
    torch.testing.assert_close(weights, torch.tensor([4.0, 0.25])[:, None].expand_as(weights), rtol=1e-4, atol=0)


def test_overlap_falls_off_across_the_axis() -> None:
    """Slices θ apart are k·sin θ apart at k across the axis: weight (1 - depth·k·sin θ)², nothing beyond 1/depth."""
    matrices = tilt_matrices(0.0, torch.tensor([0.0, 30.0], dtype=torch.float64), 0.0)
    _, _, weights = predict(padded(images(matrices)), matrices, BAND, LONE, ONES[:2], ALL[:2])
    near = (1 - DIAMETER / BOX * BAND.kx * math.sin(math.radians(30))).clamp_min(0)
    torch.testing.assert_close(weights[0], near.float() ** 2, rtol=1e-4, atol=1e-5)
    assert not weights[:, BAND.kx >= 5].any()


def test_columns_of_a_layer_share_less() -> None:
    layer = Overlap(2.0, 0.5).common(MATRICES)
    assert torch.equal(LONE.common(MATRICES), torch.ones(25, 25))
    torch.testing.assert_close(layer, layer.T)
    torch.testing.assert_close(layer.diagonal(), ONES)
    # two columns of width w and depth d, θ apart, share w² / sin θ of w·d where that's less than the half
    apart = 2.0 / 2 * math.tan(math.radians(60)) / 0.5
    assert float(layer[12, 24]) == pytest.approx(1 / (2 * apart), rel=1e-5)
    assert (layer[12, 12:].diff() < 0).all()


def test_motion_in_space_is_not_seen() -> None:
    """A point that moves in space moves all images as the prediction from the others does."""
    held, turned = couplings(MATRICES, BAND, LONE, ONES, ALL, torch.ones(25, len(BAND.kx)))
    assert not held[range(25), range(25)].any()
    total = held.sum(1)
    for r in torch.eye(3, dtype=torch.float64):
        e = MATRICES[:, :2] @ r
        predicted = torch.linalg.solve(total[:, None], held) @ (turned.mT @ e[None, :, :, None])
        # motion along the beam is missing, on one side of the first and the last image: some percent, there more
        rest = (e - predicted[..., 0].sum(1)).norm(dim=1)
        assert float(rest[1:-1].max()) < 0.08
        assert float(rest.max()) < 0.15
    # while an image that moves alone is seen
    assert float(torch.linalg.solve(total[:, None], held)[:, 12].diagonal(dim1=-2, dim2=-1).max()) < 0.5


def test_couplings_are_the_derivative_of_predictions() -> None:
    """Moving one image by a little moves the predictions from it by its share."""
    e = torch.zeros(25, 2, dtype=torch.float64)
    e[10] = torch.tensor([0.2, -0.1])
    still, moved = (predict(padded(images(shift=s)), MATRICES, BAND, LONE, ONES, ALL) for s in (None, e))
    told = still[0].abs().square() / still[2].clamp_min(1e-6)
    held, turned = couplings(MATRICES, BAND, LONE, ONES, ALL, told)
    expected = torch.linalg.solve(held.sum(1), held[:, 10] @ (turned[:, 10].mT @ e[10])[..., None])[..., 0]
    k = torch.stack([BAND.kx, BAND.ky], 1).double() * 2 * math.pi / BOX
    for j in (9, 11, 12):
        # the Newton step of the correlation of the image with its prediction
        correlated, changed = (
            (still[0][j] * v.conj() / still[2][j].clamp_min(1e-6)).to(torch.complex128)
            for v in (still[1][j], moved[1][j] - still[1][j])
        )
        d = torch.linalg.solve(k.T @ (correlated.real[:, None] * k), k.T @ changed.imag)
        # a fifth: the object's coefficients aren't as alike as the overlap says of any object of its size
        assert float((d - expected[j]).norm()) < 0.25 * float(expected[j].norm())
