"""Fourier transforms with the origin of real space at pixel n//2, and changes of box and sampling that keep it there.

The one place where ifftshift and the Nyquist coefficient are thought about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOOD_SIZES = sorted(
    2**a * 3**b * 5**c for a in range(1, 14) for b in range(8) for c in range(6) if 2**a * 3**b * 5**c <= 16384
)
"""Even sizes whose only prime factors are 2, 3 and 5: fast in every FFT library."""


def good_size(n: int) -> int:
    """The smallest even FFT size >= n with factors 2, 3 and 5 only."""
    return next(s for s in GOOD_SIZES if s >= n)


def _dims(ndim: int) -> tuple[int, ...]:
    return tuple(range(-ndim, 0))


def rfftn_centred(x: Tensor, ndim: int) -> Tensor:
    """Real FFT over the last `ndim` axes with the origin of real space at pixel n//2.

    Args:
        x: (..., *shape) real.

    Returns:
        (..., *shape[:-1], shape[-1]//2+1) complex, torch's rfft layout (unshifted, half of x).
    """
    return torch.fft.rfftn(torch.fft.ifftshift(x, dim=_dims(ndim)), dim=_dims(ndim))


def irfftn_centred(spectrum: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `rfftn_centred`: (..., *rfft layout of shape) complex -> (..., *shape) real."""
    dims = _dims(len(shape))
    return torch.fft.fftshift(torch.fft.irfftn(spectrum, s=tuple(shape), dim=dims), dim=dims)


def irfftn_middle(spectrum: Tensor, n: int, keep: Sequence[int]) -> Tensor:
    """The middle of the inverse of `rfftn_centred` of a cube.

    Each axis is cut before the next is transformed, which for half of the cube takes half of the time.

    Args:
        spectrum: (n, n, n//2+1) complex.
        keep: voxels (z, y, x) to give back, around the origin n//2.
    """
    # the origin is the first voxel here: what is kept are the ends of each axis
    ends = [[(slice(m // 2), slice(n - m // 2, n))] * (m > 1) + [(slice(m // 2, m), slice(m - m // 2))] for m in keep]
    out = torch.empty(tuple(keep), dtype=spectrum.real.dtype, device=spectrum.device)
    columns = torch.fft.ifft(spectrum, dim=0)
    for z_to, z_from in ends[0]:
        planes = torch.fft.ifft(columns[z_from], dim=1)
        for y_to, y_from in ends[1]:
            lines = torch.fft.irfft(planes[:, y_from], n=n, dim=2)
            for x_to, x_from in ends[2]:
                out[z_to, y_to, x_to] = lines[:, :, x_from]
    return out


def _resize_full_axis(spectrum: Tensor, old: int, new: int, dim: int) -> Tensor:
    """Crop or pad one full (unshifted) frequency axis; an even Nyquist is folded when cropped to, split when padded."""
    if new == old:
        return spectrum
    small = min(old, new)
    positive, negative = (small + 1) // 2, (small - 1) // 2
    low = spectrum.narrow(dim, 0, positive)
    high = spectrum.narrow(dim, old - negative, negative)
    parts = [low]
    if small % 2 == 0:
        half = small // 2
        if new < old:
            parts.append(spectrum.narrow(dim, half, 1) + spectrum.narrow(dim, old - half, 1))
        else:
            nyquist = spectrum.narrow(dim, half, 1) / 2
            gap = list(spectrum.shape)
            gap[dim] = new - positive - negative - 2
            parts += [nyquist, spectrum.new_zeros(gap), nyquist]
    elif new > old:
        gap = list(spectrum.shape)
        gap[dim] = new - positive - negative
        parts.append(spectrum.new_zeros(gap))
    parts.append(high)
    return torch.cat(parts, dim=dim)


def _resize_half_axis(spectrum: Tensor, old: int, new: int) -> Tensor:
    """Crop or pad the half axis (the last one) of an rfft layout."""
    if new == old:
        return spectrum
    small = min(old, new)
    out = spectrum[..., : small // 2 + 1].clone()
    if small % 2 == 0:
        out[..., -1] *= 2 if new < old else 0.5
    if new > old:
        out = torch.nn.functional.pad(out, (0, new // 2 - small // 2))
    return out


def resize_spectrum(spectrum: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Crop or pad an rfft layout so that the same real-space field is sampled `new` instead of `old` times.

    Values in real space are kept (the scale of the forward transform is changed accordingly).
    """
    ndim = len(old)
    for d in range(ndim - 1):
        spectrum = _resize_full_axis(spectrum, old[d], new[d], spectrum.ndim - ndim + d)
    spectrum = _resize_half_axis(spectrum, old[-1], new[-1])
    scale = 1.0
    for o, n in zip(old, new, strict=True):
        scale *= n / o
    return spectrum * scale


def resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample the last axes of a real array to `shape` samples over the same field, by Fourier crop or pad.

    The origin n//2 stays on the origin; values are kept (the mean does not change).
    """
    old = tuple(x.shape[-len(shape) :])
    if old == tuple(shape):
        return x
    return irfftn_centred(resize_spectrum(rfftn_centred(x, len(shape)), old, shape), shape)


def centre_crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut the last axes to `shape` around the origin: pixel n//2 becomes pixel m//2. A view."""
    for d, m in enumerate(shape):
        dim = x.ndim - len(shape) + d
        n = x.shape[dim]
        x = x.narrow(dim, n // 2 - m // 2, m)
    return x


def centre_pad(x: Tensor, shape: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes to `shape` with `value` around the origin: pixel n//2 becomes pixel m//2."""
    pads: list[int] = []
    for n, m in zip(reversed(x.shape[-len(shape) :]), reversed(list(shape)), strict=True):
        before = m // 2 - n // 2
        pads += [before, m - n - before]
    return torch.nn.functional.pad(x, pads, value=value)


def centre_fit(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Crop where the array is larger than `shape`, pad with zeros where it is smaller, around the origin n//2."""
    smaller = [min(n, m) for n, m in zip(x.shape[-len(shape) :], shape, strict=True)]
    return centre_pad(centre_crop(x, smaller), shape)


def fourier_shift(images: Tensor, shift: Tensor) -> Tensor:
    """Move (B, y, x) images by `shift` (B, 2) pixels (x, y), exactly and periodically. Positive moves content to +x, +y."""
    spectrum = _shift_spectrum(torch.fft.rfftn(images, dim=(-2, -1)), images.shape[-2:], shift)
    return torch.fft.irfftn(spectrum, s=images.shape[-2:], dim=(-2, -1))


def shift_and_resize(images: Tensor, shift: Tensor, shape: Sequence[int]) -> Tensor:
    """`fourier_shift`, then `resize`, of (B, y, x) images by (B, 2) pixels to (y', x') samples, in one pass."""
    old = images.shape[-2:]
    if tuple(old) == tuple(shape):
        return fourier_shift(images, shift)
    spectrum = _shift_spectrum(rfftn_centred(images, 2), old, shift)
    return irfftn_centred(resize_spectrum(spectrum, old, shape), shape)


def _shift_spectrum(spectrum: Tensor, shape: Sequence[int], shift: Tensor) -> Tensor:
    """Spectra (B, ...) of images of a shape (y, x) times the phases of a shift (B, 2) pixels (x, y)."""
    n_y, n_x = shape
    kx = torch.arange(n_x // 2 + 1, device=spectrum.device, dtype=torch.float64) / n_x
    ky = torch.fft.fftfreq(n_y, device=spectrum.device, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64, device=spectrum.device)
    x, y = (torch.polar(one, -2 * torch.pi * k * shift[:, i, None].double()) for i, k in enumerate((kx, ky)))
    return spectrum * x[:, None].to(spectrum.dtype) * y[..., None].to(spectrum.dtype)
