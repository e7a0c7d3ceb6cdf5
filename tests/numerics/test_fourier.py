"""Changes of sampling and shifts in one pass, and parts of an inverse transform, against the steps they are made of."""

from __future__ import annotations

import pytest
import torch

from libemc.numerics import fourier


@pytest.mark.parametrize(
    ("old", "new"), [((24, 24), (12, 12)), ((27, 27), (9, 9)), ((24, 26), (24, 26)), ((26, 22), (13, 11))]
)
def test_shift_and_resize(old: tuple[int, int], new: tuple[int, int]) -> None:
    """One pass is the two after each other, for band-limited images; a shift by whole pixels is a roll."""
    g = torch.Generator().manual_seed(3)
    coarse = torch.randn(5, *(n // 2 - 1 for n in new), generator=g, dtype=torch.float64)
    images = fourier.resize(coarse, old)
    shift = torch.rand(5, 2, generator=g, dtype=torch.float64) * 3 - 1.5
    want = fourier.resize(fourier.fourier_shift(images, shift), new)
    torch.testing.assert_close(fourier.shift_and_resize(images, shift, new), want, rtol=0, atol=1e-12)
    rolled = torch.roll(images[:1], (-2, 3), dims=(1, 2))
    whole = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(fourier.fourier_shift(images[:1], whole), rolled, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "keep"), [(24, (12, 12, 12)), (20, (7, 10, 13)), (18, (18, 1, 18))])
def test_middle_of_an_inverse_transform(n: int, keep: tuple[int, int, int]) -> None:
    volume = torch.randn((n, n, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = fourier.irfftn_middle(fourier.rfftn_centred(volume, 3), n, keep)
    torch.testing.assert_close(found, fourier.centre_crop(volume, keep), rtol=0, atol=1e-12)
