"""How good every image of every particle is: its correlation with the prediction, within its tilt, and the weight that follows.

The score is the Fourier ring correlation of image and prediction over the band, weighted by CTF and signal-to-noise ratio as
the likelihood is, ⟨y, m⟩ / (|m| |y|), less what it should be with the contrast of its particle and tilt, a |m| / |y|: some
views of a particle show more than others. What a tilt's images usually have is taken off, and their usual spread divided out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libemc.methods.joint.evidence import Evidence

OUTLIER = 2.0
"""Spreads of its tilt below the usual score from which an image may be left out: gold, ice, the edge of the field."""
FALSE = 0.2
"""Of those left out, the share that chance alone may have put there: good images have a tail, too."""
LOUD = 5.0
"""The same of an image's power above the usual one."""
WEIGHTS = (0.1, 2.0)
"""Least and largest weight of an image that counts."""
_DEVIATION_OF_MAD = 1.4826
ENOUGH = 8
"""Images that say what is usual in a tilt; with fewer all tilts do."""


def _usual(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Median and spread (T,) of each tilt's values (N, T), those that are seen."""
    known = torch.where(seen, values, torch.nan)
    few = seen.sum(0) < ENOUGH
    middle = torch.where(few, known.nanmedian(), known.nanmedian(0).values)
    spread = (known - middle).abs()
    return middle, _DEVIATION_OF_MAD * torch.where(few, spread.nanmedian(), spread.nanmedian(0).values).clamp_min(1e-12)


def scores(evidence: Evidence) -> Tensor:
    """(N, T): of each image, in spreads from what is usual in its tilt; NaN where there is none."""
    excess = evidence.cross - evidence.contrast * evidence.norm
    correlation = excess / (evidence.norm * evidence.power).clamp_min(1e-30).sqrt()
    middle, spread = _usual(correlation, evidence.seen)
    return torch.where(evidence.seen, (correlation - middle) / spread, torch.nan)


def lowest(score: Tensor) -> float:
    """The score below which images are left out: as many as make up a tail that normal scores don't have.

    Benjamini & Hochberg (1995) with their share of false rejections at `FALSE`, and never above -`OUTLIER`.
    """
    known = score[torch.isfinite(score)].sort().values
    chance = torch.special.ndtr(known)
    rank = torch.arange(1, len(known) + 1, dtype=torch.float64)
    passed = torch.nonzero((chance <= FALSE * rank / max(1, len(known))) & (known < -OUTLIER))[:, 0]
    return float(known[passed[-1]]) + 1e-9 if len(passed) else -torch.inf


def weights(evidence: Evidence, score: Tensor, keep: float | None = None) -> Tensor:
    """(N, T): about 1, by the contrast that an image has beyond chance; 0 for outliers and what isn't among the best.

    The contrast of an image, over that of its particle and its tilt, is drawn towards 1 by as much as it is uncertain.

    Args:
        score: (N, T) of `scores`.
        keep: share of each tilt's images to keep, the best by score; None: all but outliers.
    """
    relative = evidence.cross / (evidence.contrast * evidence.norm).clamp_min(1e-30)
    variance = 1 / (2 * evidence.contrast**2 * evidence.norm).clamp_min(1e-30)
    seen = evidence.seen
    noise = torch.where(seen, variance, torch.nan).nanmedian(0).values
    _, spread = _usual(relative, seen)
    own = (spread**2 - noise).clamp_min(0)  # variance of the contrasts themselves
    weight = (1 + (relative - 1) * own / (own + variance)).clamp(*WEIGHTS)
    power, power_spread = _usual(evidence.power, seen)
    out = (score < lowest(score)) | (evidence.power > power + LOUD * power_spread)
    if keep is not None:
        floor = torch.stack([
            torch.quantile(column[ok], 1 - keep) if ok.any() else torch.tensor(0.0).double()
            for column, ok in zip(score.T, seen.T, strict=True)
        ])  # fmt: skip
        out |= score < floor
    return torch.where(seen & out, 0.0, torch.where(seen, weight, 1.0))
