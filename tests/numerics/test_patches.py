"""Patches: which pixels are cut, what lies beyond the edge, and what is left of a pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from libemc.numerics.patches import cut_patches


@pytest.mark.parametrize("shape", [(20, 30), (21, 31)])
@pytest.mark.parametrize("size", [6, 7])
def test_against_padding(shape: tuple[int, int], size: int) -> None:
    """Pixel by pixel what indexing the padded image gives, for places within, across every edge and far outside."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape).astype(np.float16)
    padded = np.pad(image.astype(np.float32), 40, constant_values=7.0)
    at = torch.from_numpy(rng.uniform(-28, 28, (200, 2)))
    patches, rest = cut_patches([image] * 200, at, size, 7.0)
    assert patches.dtype == torch.float32 and rest.dtype == torch.float64
    assert float(rest.abs().max()) <= 0.5
    for patch, (x, y) in zip(patches.numpy(), (at - rest).numpy(), strict=True):
        assert x == round(x) and y == round(y)
        row, column = 40 + shape[0] // 2 + round(y) - size // 2, 40 + shape[1] // 2 + round(x) - size // 2
        np.testing.assert_array_equal(patch, padded[row : row + size, column : column + size])


def test_one_of_each_image() -> None:
    """A stack gives a patch of each of its images; NaN marks those that reach over the edge."""
    stack = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 9, 9), np.float32)
    patches, _ = cut_patches(stack, torch.tensor([[0.0, 0.0], [2.0, -2.0], [4.0, 0.0]], dtype=torch.float64), 5, np.nan)
    assert patches[:2, 0, 0].tolist() == [0.0, 1.0] and bool(torch.isfinite(patches[:2]).all())
    assert torch.isnan(patches[2]).sum() == 10  # two columns of five lie beyond


def test_halves_go_up_everywhere() -> None:
    """Places a pixel apart are cut a pixel apart: a half is rounded upwards, not to even numbers."""
    line = torch.arange(-3, 3, dtype=torch.float64) + 0.5
    patches, rest = cut_patches(
        [np.arange(12, dtype=np.float32)[None].repeat(12, 0)] * 6, torch.stack([line, 0 * line], 1), 1
    )
    assert rest[:, 0].tolist() == [-0.5] * 6
    assert patches.flatten().tolist() == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
