"""Frequency grids and shells. Everything about *where* a Fourier coefficient or a pixel lies; nothing about its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def signed_frequencies(n: int, device: torch.device | None = None) -> Tensor:
    """Integer frequencies of a full FFT axis of `n` pixels, in FFT order: 0, 1, ..., -1. Shape (n,), int64."""
    k = torch.arange(n, device=device)
    return torch.where(k < (n + 1) // 2, k, k - n)


def rfft_frequencies(shape: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """Integer frequencies of a torch rfft layout, one broadcastable int64 tensor per axis, in the order of `shape`.

    The last axis is the half axis (0 ... n//2).
    """
    axes = [signed_frequencies(n, device) for n in shape[:-1]]
    axes.append(torch.arange(shape[-1] // 2 + 1, device=device))
    return [
        a.reshape([-1 if i == d else 1 for i in range(len(shape))]) for d, a in enumerate(axes)
    ]  # each broadcasts against the others


def rfft_radius(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """|k| in cycles per pixel of an rfft layout; shape (*shape[:-1], shape[-1]//2+1), float64.

    Axes of different length are weighed by their own length, so spheres stay spheres.
    """
    total: Tensor | float = 0.0
    for k, n in zip(rfft_frequencies(shape, device), shape, strict=True):
        total = total + (k.double() / n) ** 2
    return torch.as_tensor(total).sqrt()


def rfft_multiplicity(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """How often each column of an rfft layout stands in the full transform: 1 at x = 0 and at an even Nyquist, else 2.

    Shape (shape[-1]//2+1,), float64.
    """
    n = shape[-1]
    m = torch.full((n // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    m[0] = 1.0
    if n % 2 == 0:
        m[-1] = 1.0
    return m


def centred_coordinates(shape: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """Pixel coordinates from the origin at n//2, one broadcastable float64 tensor per axis, in the order of `shape`."""
    out = []
    for d, n in enumerate(shape):
        x = torch.arange(n, device=device, dtype=torch.float64) - n // 2
        out.append(x.reshape([-1 if i == d else 1 for i in range(len(shape))]))
    return out


def centred_radius(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Distance in pixels from the origin at n//2; shape `shape`, float64."""
    total: Tensor | float = 0.0
    for x in centred_coordinates(shape, device):
        total = total + x**2
    return torch.as_tensor(total).sqrt()
