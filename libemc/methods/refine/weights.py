"""How much each particle counts in the average, and which do not count at all, from how strongly its images show the
reference.

The contrast of a particle is the factor a that makes a·prediction fit its images best; the average that loses least weighs
particles in proportion to it. A particle that is none has next to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_CONTRAST = 0.7
"""Of what is typical in its tilt series: a particle with less is taken for none, if its contrast is known well enough."""
CERTAINTY = 4.0
"""Standard deviations by which it must be below what is typical."""
ENOUGH = 8
"""Particles of a tilt series that say what is typical there; with fewer it is what is typical of all."""
_DEVIATION_OF_MAD = 1.4826


@dataclass(frozen=True)
class Weights:
    """What becomes of the particles of one tilt series.

    Attributes:
        weight: (N,) about 1, 0 where rejected.
        reason: of each: why it is rejected, None where it is not.
    """

    weight: Tensor
    reason: tuple[str | None, ...]


def _typical(contrast: Tensor) -> tuple[float, float]:
    """Median and the smaller of its half-widths: what is far above may be fitted noise, what is far below no particle.

    Where a quarter are none, the half-width below is that of the mixture.
    """
    middle = float(contrast.median())
    below, above = (middle - contrast)[contrast <= middle], (contrast - middle)[contrast >= middle]
    return middle, _DEVIATION_OF_MAD * min(float(below.median()), float(above.median()))


def contrast_weights(
    contrast: Sequence[Tensor], error: Sequence[Tensor], used: Sequence[Tensor], keep: float | None = None
) -> list[Weights]:
    """Weights in proportion to contrasts, each drawn towards the typical one by as much as it is uncertain.

    Args:
        contrast, error: (N,) of each tilt series; NaN: not seen, the particle keeps weight 1 and is in no image anyway.
        used: (N,) bool of each, which take part.
        keep: share of the particles to keep, the others rejected by relative contrast; None: reject those that stand out.
    """
    known = [u & torch.isfinite(c) for u, c in zip(used, contrast, strict=True)]
    pooled = torch.cat([c[k] for c, k in zip(contrast, known, strict=True)])
    if not len(pooled):
        return [Weights(torch.ones_like(c), (None,) * len(c)) for c in contrast]
    everywhere = _typical(pooled)
    if everywhere[0] <= 0 and keep is None:  # most show nothing of the reference, so nobody is worse than that
        return [Weights(torch.ones_like(c), (None,) * len(c)) for c in contrast]
    relative, sigma, spread = [], [], []
    for c, e, k in zip(contrast, error, known, strict=True):
        typical = _typical(c[k])[0] if int(k.sum()) >= ENOUGH else everywhere[0]
        typical = typical if typical > 0 else max(everywhere[0], 1e-6)
        relative.append(torch.where(k, c / typical, 1.0))
        sigma.append(torch.where(k, e / typical, 0.0))
        spread.append((c / typical)[k])
    width = _typical(torch.cat(spread))[1]
    noise = torch.cat([s[k] for s, k in zip(sigma, known, strict=True)])
    own = max(width**2 - float((noise**2).median()), 0.0)  # variance of the contrasts themselves
    best = torch.cat(spread).sort(descending=True).values
    cut = None if keep is None else best[max(1, round(keep * len(best))) - 1]
    out = []
    for r, s, k in zip(relative, sigma, known, strict=True):
        lowest = (
            torch.minimum(torch.tensor(LEAST_CONTRAST), 1 - CERTAINTY * (s**2 + own).sqrt()) if cut is None else cut
        )
        rejected = k & (r < lowest)
        weight = torch.where(k, (1 + (r - 1) * own / (own + s**2).clamp_min(1e-12)).clamp(0.1, 2.0), 1.0)
        out.append(Weights(torch.where(rejected, 0.0, weight), _reasons(r, s, rejected, keep)))
    return out


def _reasons(relative: Tensor, sigma: Tensor, rejected: Tensor, keep: float | None) -> tuple[str | None, ...]:
    """Why each is rejected."""
    why = "too little to be one" if keep is None else f"not among the best {100 * keep:.3g} %"
    return tuple(
        f"contrast {r:.2f} ± {s:.2f} of what is typical: {why}" if gone else None
        for r, s, gone in zip(relative.tolist(), sigma.tolist(), rejected.tolist(), strict=True)
    )
