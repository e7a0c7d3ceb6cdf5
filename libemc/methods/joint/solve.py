"""The likeliest corrections of all images together, and how well they foretell images that had no part in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods.joint.evidence import Evidence
from libemc.methods.joint.terms import Term, total

TOLERANCE = 1e-3
"""Of the residual of the normal equations, over what it is at zero."""
LOOSE = 1e-2
"""The same where solutions are only compared."""
MOST_STEPS = 300
SAMPLES = 32
"""Draws that errors are worked out from."""
FOLDS = 4
"""Parts of the images: each is foretold by the others."""
CLEARLY = 3.0
"""Standard errors by which a term must foretell images better: the best of some strengths of ten levels, by chance, has two."""


def solve(
    slope: Tensor,
    curvature: Tensor,
    terms: Sequence[Term],
    tolerance: float = TOLERANCE,
    pull: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Maximum of slope·u - u·curvature·u/2 - |w|²/2 over the numbers w of all terms, u what they add up to.

    Conjugate gradients with the diagonal's blocks as preconditioner (Nocedal & Wright 2006, algorithm 5.3); several problems
    of the same terms at once.

    Args:
        slope: (..., N, T, P) at no corrections; curvature: (..., N, T, P, P); zero for images that take no part.
        tolerance: of the residual, over the right side, both as the preconditioner weighs them.
        pull: (..., m, k, c) of each term, a slope on its numbers beside that of the images.

    Returns:
        (..., m, k, c) of each term.
    """

    def adjoint(u: Tensor) -> list[Tensor]:
        return [t.adjoint(u) for t in terms]

    def times(w: Sequence[Tensor]) -> list[Tensor]:
        u = total(terms, w)
        return [a + b for a, b in zip(w, adjoint((curvature @ u[..., None])[..., 0]), strict=True)]

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        sums = [(x * y).flatten(-3).sum(-1) for x, y in zip(a, b, strict=True)]
        return torch.stack(sums).sum(0)[..., None, None, None]

    inverse = [torch.linalg.inv(t.blocks(curvature) + torch.eye(t.shape[2], dtype=torch.float64)) for t in terms]

    def precondition(r: Sequence[Tensor]) -> list[Tensor]:
        return [(f @ x[..., None])[..., 0] for x, f in zip(r, inverse, strict=True)]

    right = adjoint(slope)
    if pull is not None:
        right = [a + b for a, b in zip(right, pull, strict=True)]
    w, r = [torch.zeros_like(b) for b in right], right
    z = precondition(r)
    p, rz, goal = z, dot(r, z), tolerance**2 * dot(right, precondition(right))
    for _ in range(MOST_STEPS):
        if bool((rz <= goal).all()):
            break
        ap = times(p)
        step = rz / dot(p, ap).clamp_min(1e-300)
        w = [a + step * b for a, b in zip(w, p, strict=True)]
        r = [a - step * b for a, b in zip(r, ap, strict=True)]
        z = precondition(r)
        before, rz = rz, dot(r, z)
        p = [a + rz / before.clamp_min(1e-300) * b for a, b in zip(z, p, strict=True)]
    return w


def spread(curvature: Tensor, terms: Sequence[Term], seed: int) -> list[Tensor]:
    """Standard deviation (m, k, c) of the numbers of each term, given the images.

    From `SAMPLES` draws of what the solution would be with other noise and other priors ("perturb and maximise",
    Papandreou & Yuille 2010, exact where all is Gaussian): known to about 1 / sqrt(2 SAMPLES).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=g, dtype=torch.float64)

    values, vectors = torch.linalg.eigh(curvature)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    noise = (root @ normal(*curvature.shape[:-1])[..., None])[..., 0]
    found = solve(noise, curvature, terms, LOOSE, [normal(*t.shape) for t in terms])
    return [(w**2).mean(0).sqrt() for w in found]


def folds(seen: Tensor, seed: int) -> Tensor:
    """(N, T) int64: the part of each image, at random; -1 where there is none."""
    part = torch.randint(FOLDS, seen.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(seen, part, -1)


def foretold(evidence: Evidence, there: Tensor, terms: Sequence[Term], part: Tensor) -> Tensor:
    """(N, T) log-likelihood of each image at what the other parts say of it, over that at no corrections.

    Args:
        evidence: of the parameters that the terms are about, at corrections `there` (N, T, P).
        part: (N, T) of `folds`.
    """
    slope = evidence.about(there)
    taken = torch.stack([(part >= 0) & (part != fold) for fold in range(FOLDS)])[..., None]
    u = total(terms, solve(slope * taken, evidence.curvature * taken[..., None], terms, LOOSE))
    gain = (slope * u).sum(-1) - 0.5 * (u * (evidence.curvature @ u[..., None])[..., 0]).sum(-1)
    return torch.where(part >= 0, gain.gather(0, part.clamp_min(0)[None])[0], 0.0)


@dataclass(frozen=True)
class Trial:
    """How a choice of a term's strengths did.

    Attributes:
        name: the level's; strength, length: in its units and Å; 0: left out.
        gain: of the log-likelihood of all foretold images; error: its standard error.
        kept: whether it was taken.
    """

    name: str
    strength: float
    length: float
    gain: float
    error: float
    kept: bool = False


def compared(now: Sequence[Tensor], best: Sequence[Tensor]) -> tuple[float, float]:
    """Gain of one way to foretell images over another, summed over tilt series, and its standard error."""
    change = torch.cat([(a - b).flatten() for a, b in zip(now, best, strict=True)])
    return float(change.sum()), float((change**2).sum().sqrt())
