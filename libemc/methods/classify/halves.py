"""Half sets that were refined apart, brought into one frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libemc.methods.overlay import Overlay, ball_points, coefficients, overlay
from libemc.methods.subtilts import Particles

FAR = 0.125
"""Part of the box by which the halves may be apart."""
GAIN = 0.02
"""By how much their correlation must rise for one to be moved: less is within what poses are refined to anyway."""


def apart(half1: Tensor, half2: Tensor, mask: Tensor, radius: float) -> Overlay | None:
    """How half 2 lies in the frame of half 1; None where it lies as well as it can.

    Args:
        half1, half2, mask: (n, n, n).
        radius: Fourier pixels within which they are compared.
    """
    points = ball_points(radius)
    a, b = (coefficients((half * mask).float(), points) for half in (half1, half2))
    now = float((a.conj() * b).real.sum() / (a.abs().norm() * b.abs().norm()).clamp_min(1e-30))
    best = overlay(half2 * mask, half1 * mask, radius, FAR * len(half1))
    return best if best.correlation > now + GAIN else None


def together(series: Sequence[Particles], lies: Overlay) -> list[Particles]:
    """Particles whose second half is given the poses that it has in the frame of the first.

    Args:
        lies: of `apart`: what half 2 has at u, half 1 has at rotation·u + shift (pixels).
    """
    out = []
    for p in series:
        second = p.half == 2
        turned = p.rotation @ lies.rotation.T
        moved = p.xyz - turned @ (lies.shift.double() * p.file.pixel_size)
        rotation = torch.where(second[:, None, None], turned, p.rotation)
        out.append(p.moved(rotation, torch.where(second[:, None], moved, p.xyz), p.score))
    return out
