"""How the corrections of a tilt series' images hang together: terms that add up, each linear in numbers of unit variance.

A term is basis · (space · w · timeᵀ): w are its numbers, one set for each of its modes in space and in time; `space` says how
particles share them, `time` how tilts do, and the basis turns what it describes into parameters of each image. Both are
roots of a covariance, so a term is a Gaussian process with the covariance of space times that of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST_MODE = 1e-4
"""Of the largest variance: modes in space below it are left out."""


@dataclass(frozen=True)
class Term:
    """One term of the corrections of N particles in T tilts, with P parameters.

    Attributes:
        basis: (N, T, P, c), or with a 1 in place of N or T.
        space: (N, m); None: each particle for itself. time: (T, k); None: each tilt for itself.
    """

    name: str
    basis: Tensor
    space: Tensor | None
    time: Tensor | None
    count: int
    tilts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of w: modes in space, modes in time, c."""
        m = self.count if self.space is None else self.space.shape[1]
        return m, self.tilts if self.time is None else self.time.shape[1], self.basis.shape[-1]

    def described(self, w: Tensor) -> Tensor:
        """(..., N, T, c): what the term is about, of w (..., m, k, c)."""
        f = w if self.space is None else torch.einsum("nm,...mkc->...nkc", self.space, w)
        return f if self.time is None else self.time @ f

    def forward(self, w: Tensor) -> Tensor:
        """(..., N, T, P) corrections, of w (..., m, k, c)."""
        return (self.basis @ self.described(w)[..., None])[..., 0]

    def adjoint(self, u: Tensor) -> Tensor:
        """(..., m, k, c): the transpose of `forward`, of u (..., N, T, P)."""
        f = (self.basis.transpose(-1, -2) @ u[..., None])[..., 0]
        f = f if self.time is None else self.time.T @ f
        return f if self.space is None else torch.einsum("nm,...nkc->...mkc", self.space, f)

    def blocks(self, curvature: Tensor) -> Tensor:
        """(..., m, k, c, c): the diagonal's blocks of the transpose times `curvature` (..., N, T, P, P) times the term."""
        b = self.basis.transpose(-1, -2) @ curvature @ self.basis
        b = b if self.time is None else torch.einsum("tk,...ntcd->...nkcd", self.time**2, b)
        return b if self.space is None else torch.einsum("nm,...nkcd->...mkcd", self.space**2, b)

    def among(self, chosen: Tensor) -> Term:
        """The same of some of the particles, (N',) int64, that share their numbers with others through `space` alone."""
        basis = self.basis if self.basis.shape[0] == 1 else self.basis[chosen]
        return replace(self, basis=basis, space=None if self.space is None else self.space[chosen], count=len(chosen))


@dataclass(frozen=True)
class Smooth:
    """What is smooth in space: a Gaussian process with covariance exp(-d²/2l²) by its modes at some points.

    Attributes:
        points: (N, 3) Å; length: l, Å. modes: (N, m) root of the covariance; extend: (N, m) that takes covariances with the
            points to the root at other places.
    """

    points: Tensor
    length: float
    modes: Tensor
    extend: Tensor

    @staticmethod
    def of(points: Tensor, length: float) -> Smooth:
        """By points (N, 3) Å."""
        values, vectors = torch.linalg.eigh(_covariance(points, points, length))
        keep = values > LEAST_MODE * values[-1]
        values, vectors = values[keep], vectors[:, keep]
        return Smooth(points, length, vectors * values.sqrt(), vectors / values.sqrt())

    def at(self, places: Tensor) -> Tensor:
        """(M, m): what the modes are at other places (M, 3) Å, as far as the points tell."""
        return _covariance(places, self.points, self.length) @ self.extend


def _covariance(a: Tensor, b: Tensor, length: float) -> Tensor:
    return torch.exp(-0.5 * torch.cdist(a.double(), b.double()) ** 2 / length**2)


def total(terms: Sequence[Term], numbers: Sequence[Tensor]) -> Tensor:
    """(..., N, T, P): what all terms add up to."""
    out = terms[0].forward(numbers[0])
    for term, w in zip(terms[1:], numbers[1:], strict=True):
        out = out + term.forward(w)
    return out
