"""filters: single waves pass or don't, means are kept, and low and high pass add up."""

from __future__ import annotations

import math

import pytest
import torch

from libemc.numerics import filters


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def wave(n: int, cycles: int) -> torch.Tensor:
    """A cosine of so many cycles along y, over n² pixels."""
    return torch.cos(2 * math.pi * cycles * torch.arange(n, dtype=torch.float64) / n)[:, None].expand(n, n)


@pytest.mark.parametrize(("cycles", "gain"), [(0, 1.0), (10, 1.0), (15, 1.0), (16, 0.5), (17, 0.0), (31, 0.0)])
def test_gain_of_single_waves(cycles: int, gain: float) -> None:
    """64 px at 2 Å: 8 Å is 16 cycles; the edge of 10 % reaches from 15.2 to 16.8."""
    x = wave(64, cycles)
    assert torch.allclose(filters.lowpass(x, 2.0, 8.0), gain * x, atol=1e-12)
    assert torch.allclose(filters.highpass(x, 2.0, 8.0), (1 - gain) * x, atol=1e-12)


def test_edge_is_a_cosine_of_the_given_width() -> None:
    gain = [float((filters.lowpass(wave(64, c), 2.0, 8.0, edge=0.5) * wave(64, c)).sum() / 2048) for c in range(12, 21)]
    assert gain == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(9)], abs=1e-12)


def test_low_pass_keeps_the_mean_and_high_pass_removes_it() -> None:
    x = noise(3, 20, 21, 22) + 5
    means = x.mean(dim=(1, 2, 3))
    assert torch.allclose(filters.lowpass(x, 1.0, 4.0, ndim=3).mean(dim=(1, 2, 3)), means)
    assert filters.highpass(x, 1.0, 4.0, ndim=3).mean(dim=(1, 2, 3)).abs().max() < 1e-12


def test_low_and_high_pass_add_up_and_the_band_is_both() -> None:
    x = noise(24, 30)
    low, high = filters.lowpass(x, 1.5, 7.0), filters.highpass(x, 1.5, 7.0)
    assert torch.allclose(low + high, x)
    both = filters.lowpass(filters.highpass(x, 1.5, 20.0), 1.5, 7.0)
    assert torch.allclose(filters.bandpass(x, 1.5, 20.0, 7.0), both)


def test_stacks_are_filtered_image_by_image() -> None:
    stack = noise(4, 16, 18).float()
    together = filters.lowpass(stack, 1.0, 5.0, ndim=2)
    assert together.dtype == torch.float32
    for image, one in zip(stack, together, strict=True):
        assert torch.allclose(filters.lowpass(image, 1.0, 5.0), one, atol=1e-6)


def test_oblong_boxes_keep_round_passes() -> None:
    """A diagonal wave of 0.2·(0.6, 0.8) cycles/px lies at 5 px whatever the sides of the image."""
    y, x = torch.meshgrid(torch.arange(50.0).double(), torch.arange(100.0).double(), indexing="ij")
    image = torch.cos(2 * math.pi * (0.12 * x + 0.16 * y))
    assert torch.allclose(filters.lowpass(image, 1.0, 5.3), 0 * image, atol=1e-12)
    assert torch.allclose(filters.lowpass(image, 1.0, 4.7), image, atol=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_taper_keeps_the_mean_and_ends_on_one_value(ndim: int) -> None:
    x = noise(2, 17, 20, 24) + torch.linspace(0, 9, 24, dtype=torch.float64)
    out = filters.taper_edges(x, 5, ndim)
    dims = tuple(range(-ndim, 0))
    assert torch.allclose(out.mean(dim=dims), x.mean(dim=dims))
    for image in out.reshape(-1, *x.shape[-ndim:]):
        border = torch.cat([image[..., 0].flatten(), image[..., -1].flatten(), image[..., 0, :].flatten()])
        assert float(border.max() - border.min()) < 1e-12
    inner = (..., *[slice(5, -5)] * ndim)
    assert torch.allclose(out[inner], x[inner])
    assert torch.equal(filters.taper_edges(x, 0), x)


def test_normalise() -> None:
    x = 7 * noise(3, 8, 9) - 2
    out = filters.normalise(x, ndim=2)
    assert torch.allclose(out.mean(dim=(1, 2)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(out.std(dim=(1, 2), correction=0), torch.ones(3).double())
    mask = (noise(8, 9) > 0).double()
    inside = filters.normalise(x, ndim=2, mask=mask)[:, mask > 0]
    assert inside.mean(dim=1).abs().max() < 1e-12 and torch.allclose(
        inside.std(dim=1, correction=0), torch.ones(3).double()
    )
    assert torch.equal(filters.normalise(torch.full((5, 5), 0.1)), torch.zeros(5, 5))


def test_arguments_are_left_alone() -> None:
    x = noise(8, 8)
    before = x.clone()
    for out in (
        filters.lowpass(x, 1.0, 4.0),
        filters.taper_edges(x, 2),
        filters.taper_edges(x, 0),
        filters.normalise(x),
    ):
        out += 1
    assert torch.equal(x, before)
