"""Filters of maps and images: low, high and band pass with cosine edges, edge tapers, normalisation.

Each acts on the last `ndim` axes of a real array (all of them if not given), batches over the others, and keeps
dtype and device. Pass edges are in 1/Å, half way down at the resolution that is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libemc.numerics.grids import rfft_radius
from libemc.numerics.masks import cosine_edge

EDGE_WIDTH = 0.1
"""Width of a filter's cosine edge as a fraction of its cut-off frequency."""


def _dims(x: Tensor, ndim: int | None) -> tuple[int, ...]:
    return tuple(range(-(ndim or x.ndim), 0))


def _gain(radius: Tensor, pixel_size: float, resolution: float, edge: float) -> Tensor:
    """Low-pass gain at frequencies `radius` (1/px): 1/2 at 1/resolution."""
    cutoff = pixel_size / resolution
    return cosine_edge(radius, cutoff * (1 - edge / 2), cutoff * edge)


def _apply(x: Tensor, gain: Tensor, dims: tuple[int, ...]) -> Tensor:
    spectrum = torch.fft.rfftn(x, dim=dims)
    return torch.fft.irfftn(spectrum * gain.to(x.dtype), s=[x.shape[d] for d in dims], dim=dims)


def _radius(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return rfft_radius([x.shape[d] for d in dims], x.device)


def lowpass(
    x: Tensor, pixel_size: float, resolution: float, ndim: int | None = None, edge: float = EDGE_WIDTH
) -> Tensor:
    """Remove detail finer than `resolution`; the mean is kept.

    Args:
        x: (..., *shape) real.
        pixel_size: Å/px.
        resolution: Å.
        ndim: how many of the last axes are the map's or image's; None for all.
        edge: width of the edge as a fraction of the cut-off frequency.
    """
    dims = _dims(x, ndim)
    return _apply(x, _gain(_radius(x, dims), pixel_size, resolution, edge), dims)


def highpass(
    x: Tensor, pixel_size: float, resolution: float, ndim: int | None = None, edge: float = EDGE_WIDTH
) -> Tensor:
    """Remove what is coarser than `resolution`, the mean included; arguments as of `lowpass`.

    `lowpass` and `highpass` at one resolution add up to the input.
    """
    dims = _dims(x, ndim)
    return _apply(x, 1 - _gain(_radius(x, dims), pixel_size, resolution, edge), dims)


def bandpass(
    x: Tensor, pixel_size: float, coarse: float, fine: float, ndim: int | None = None, edge: float = EDGE_WIDTH
) -> Tensor:
    """Keep what lies between the resolutions `coarse` and `fine` (Å): a `highpass` and a `lowpass` in one step."""
    dims = _dims(x, ndim)
    radius = _radius(x, dims)
    gain = _gain(radius, pixel_size, fine, edge) * (1 - _gain(radius, pixel_size, coarse, edge))
    return _apply(x, gain, dims)


def taper_edges(images: Tensor, width: int, ndim: int = 2) -> Tensor:
    """Lead each image smoothly to one value at its border, so that it has no step when it is wrapped.

    The value is the mean of the image weighted by what the taper takes away, so the image's mean is kept.

    Args:
        images: (..., *shape) real, `ndim` axes each.
        width: px over which a cosine falls from 1 to 0, the outermost pixel being 0; 0 changes nothing.

    Returns:
        Like the input.
    """
    if width <= 0:
        return images.clone()
    dims = _dims(images, ndim)
    window = torch.ones((), dtype=images.dtype, device=images.device)
    for dim in dims:
        n = images.shape[dim]
        i = torch.arange(n, dtype=images.dtype, device=images.device)
        profile = 1 - cosine_edge(torch.minimum(i, n - 1 - i), 0.0, float(width))
        window = window * profile.reshape([-1] + [1] * (-dim - 1))
    rest = 1 - window
    level = (rest * images).sum(dim=dims, keepdim=True) / rest.sum()
    return window * images + rest * level


def normalise(x: Tensor, ndim: int | None = None, mask: Tensor | None = None) -> Tensor:
    """Shift and scale each map or image to mean 0 and standard deviation 1.

    Args:
        x: (..., *shape) real.
        ndim: how many of the last axes are the map's or image's; None for all.
        mask: (*shape) weights under which mean and deviation are taken; None for all alike.

    Returns:
        Like the input; a constant image becomes 0.
    """
    dims = _dims(x, ndim)
    weight = torch.ones_like(x[(0,) * (x.ndim - len(dims))]) if mask is None else mask.to(x)
    weight = weight / weight.sum()
    centred = x - (weight * x).sum(dim=dims, keepdim=True)
    deviation = (weight * centred**2).sum(dim=dims, keepdim=True).sqrt()
    tiny = torch.finfo(x.dtype).eps * x.abs().amax(dim=dims, keepdim=True) * 4  # rounding of a constant image
    return torch.where(deviation > tiny, centred / deviation, 0.0)
