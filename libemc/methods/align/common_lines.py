"""The direction of the tilt axis from common lines: all images of a specimen agree, up to their shifts, on the line of
Fourier coefficients along the axis, or, which is the same, on their projection onto it (Crowther et al. 1970, Proc. R.
Soc. A 317:319; Liu et al. 1995, Ultramicroscopy 58:393). No model of the specimen is needed: a lone object, which has no
slab's foreshortening, shows its axis so too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from libemc.numerics import fourier

LAGS = (4, 8, 16, 32, 48, 64)  # images in the order of the tilts between those that are compared
EMPHASIS = 2.0  # power of the frequency by which lines are weighed: what is coarse agrees in all directions
PADDING = 2
LOWEST = 2.0  # periods in the field: coarser ones are the edges'
HIGHEST = 0.25  # cycles per pixel


def agreement(images: Tensor, axes: Sequence[float]) -> Tensor:
    """How well the lines in each direction agree.

    Args:
        images: (T, n, n) band-passed, tapered, in the order of their tilts.
        axes: (A,) degrees, convention 5.

    Returns:
        (A,) mean correlation (-1 to 1) of lines, each pair at its best shift.
    """
    n = images.shape[-1]
    m = PADDING * n
    spectra = torch.fft.fftshift(fourier.rfftn_centred(fourier.centre_pad(images, (m, m)), 2), dim=1)
    planes = torch.stack([spectra.real, spectra.imag], dim=1)
    first = round(LOWEST * PADDING)
    k = torch.arange(first, int(HIGHEST * m)).float()
    lags = [lag for lag in LAGS if lag < len(images)]
    out = []
    for axis in torch.deg2rad(torch.tensor(axes, dtype=torch.float64)):
        # the axis is (-sin, cos); of it and its opposite the one in the stored half, x >= 0
        x, y = -float(torch.sin(axis)), float(torch.cos(axis))
        x, y = (-x, -y) if x < 0 else (x, y)
        grid = torch.stack([(2 * k * x + 1) / (m // 2 + 1) - 1, (2 * (k * y + m // 2) + 1) / m - 1], dim=-1)
        lines = F.grid_sample(planes, grid.expand(len(images), 1, -1, 2), align_corners=False)[:, :, 0]
        line = torch.complex(lines[:, 0], lines[:, 1]) * k**EMPHASIS
        line = line / line.abs().square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        scores = []
        for lag in lags:
            product = F.pad(line[lag:] * line[:-lag].conj(), (first, m - first - len(k)))
            scores.append(torch.fft.ifft(product, dim=1).real.amax(1).mean() * m)
        out.append(torch.stack(scores).mean())
    return torch.stack(out)
