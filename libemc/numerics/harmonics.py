"""Spherical harmonics of functions on concentric spheres: their coefficients, and what a rotation does to these.

Coefficients are kept per degree: a list over l = 0 ... L of (..., 2l + 1) complex tensors, orders m = -l ... l. The harmonics
are orthonormal, with the Condon-Shortley phase. A rotation mixes orders within a degree alone, so that correlations of
a map with itself, turned, are sums of small matrix products.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=8)
def sphere_points(degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points from which the coefficients up to `degree` follow exactly.

    Returns:
        (T,) polar angles with T = degree + 1 (Gauss-Legendre), their weights (T,), and unit vectors (T, P, 3) at
        P = 2 · degree + 2 evenly spaced azimuths from 0 on; float64.
    """
    cosine, weight = np.polynomial.legendre.leggauss(degree + 1)
    theta = torch.from_numpy(np.arccos(cosine))
    count = 2 * degree + 2
    phi = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    xy = theta.sin()[:, None, None] * torch.stack((phi.cos(), phi.sin()), dim=-1)
    z = theta.cos()[:, None, None].expand(-1, count, 1)
    return theta, torch.from_numpy(weight), torch.cat((xy, z), dim=-1)


@lru_cache(maxsize=8)
def _legendre(degree: int) -> Tensor:
    """Normalised associated Legendre functions (T, l, m) at the polar angles of `sphere_points`, m >= 0, times weights.

    By the recursion in l that is stable upwards (Press et al., Numerical Recipes, 6.7).
    """
    theta, weight, _ = sphere_points(degree)
    x, sine = theta.cos(), theta.sin()
    out = torch.zeros(len(theta), degree + 1, degree + 1, dtype=torch.float64)
    diagonal = torch.full_like(x, math.sqrt(1 / (4 * math.pi)))
    for m in range(degree + 1):
        if m:
            diagonal = -diagonal * sine * math.sqrt((2 * m + 1) / (2 * m))
        out[:, m, m] = diagonal
        for n in range(m + 1, degree + 1):
            a = math.sqrt((4 * n * n - 1) / (n * n - m * m))
            b = math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1)) if n > m + 1 else 0.0
            before = out[:, n - 2, m] if n > m + 1 else torch.zeros_like(x)
            out[:, n, m] = a * (x * out[:, n - 1, m] - b * before)
    return out * weight[:, None, None]


def coefficients(values: Tensor) -> list[Tensor]:
    """Coefficients of real functions on the sphere.

    Args:
        values: (..., T, P) real, at the points of `sphere_points(T - 1)`.

    Returns:
        For each l = 0 ... T - 1 (..., 2l + 1) complex.
    """
    degree = values.shape[-2] - 1
    legendre = _legendre(degree).to(values)
    waves = torch.fft.rfft(values, dim=-1)[..., : degree + 1] * (2 * math.pi / values.shape[-1])
    positive = torch.einsum("...tm,tlm->...lm", waves, legendre.to(waves.dtype))
    out = []
    for n in range(degree + 1):
        half = positive[..., n, : n + 1]
        sign = (-1.0) ** torch.arange(n, 0, -1, device=values.device, dtype=values.dtype)
        out.append(torch.cat((sign * half[..., 1:].flip(-1).conj(), half), dim=-1))
    return out


@lru_cache(maxsize=128)
def _turn_about_y(n: int) -> Tensor:
    """Eigenvectors (2n+1, 2n+1) complex128, columns of eigenvalues -n ... n, of the generator J_y of degree n."""
    m = np.arange(-n, n)
    raising = np.diag(np.sqrt(n * (n + 1) - m * (m + 1)), -1)  # <m+1| J+ |m>
    _, vectors = np.linalg.eigh((raising - raising.T) / 2j)
    return torch.from_numpy(vectors)


def small_wigner(n: int, beta: Tensor) -> Tensor:
    """Wigner's d of degree n: the turn by `beta` (B,) rad about y, (B, m', m) float64."""
    vectors = _turn_about_y(n)
    phases = torch.exp(-1j * beta.double()[:, None] * torch.arange(-n, n + 1))
    return ((vectors * phases[:, None]) @ vectors.conj().T).real


def zyz_angles(rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(α, β, γ) in rad, each (B,), with Rz(α) · Ry(β) · Rz(γ) the given (B, 3, 3); β is 0 to π, and at both ends α 0."""
    r = rotations.double()
    sine = torch.hypot(r[:, 0, 2], r[:, 1, 2])
    beta = torch.atan2(sine, r[:, 2, 2])
    alpha = torch.where(sine > 1e-12, torch.atan2(r[:, 1, 2], r[:, 0, 2]), 0.0)
    # the rest, Ry(-β) Rz(-α) R = Rz(γ), has (cos γ, sin γ, 0) in its first column
    x = alpha.cos() * r[:, 0, 0] + alpha.sin() * r[:, 1, 0]
    gamma = torch.atan2(alpha.cos() * r[:, 1, 0] - alpha.sin() * r[:, 0, 0], beta.cos() * x - beta.sin() * r[:, 2, 0])
    return alpha, beta, gamma


def wigner(n: int, rotations: Tensor) -> Tensor:
    """Wigner's D of degree n, (B, m', m) complex128: the harmonics of f(R⁻¹ u) are D(R) times those of f.

    Args:
        rotations: (B, 3, 3), Rz(α) · Ry(β) · Rz(γ); D = exp(-i m' α) d(β) exp(-i m γ).
    """
    alpha, beta, gamma = zyz_angles(rotations)
    m = torch.arange(-n, n + 1)
    left, right = torch.exp(-1j * alpha[:, None] * m), torch.exp(-1j * gamma[:, None] * m)
    return left[:, :, None] * small_wigner(n, beta) * right[:, None, :]


def turned(values: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """Harmonics of one degree of the function at R·u, R = Rz(α) · Ry(β) · Rz(γ): D(R)† times those of it.

    Args:
        values: (..., 2l+1) complex.
        alpha, beta, gamma: (), rad; differentiable.
    """
    n = (values.shape[-1] - 1) // 2
    m = torch.arange(-n, n + 1)
    vectors = _turn_about_y(n).to(values.dtype)
    about_z, about_y, last = (torch.polar(torch.ones(()).to(a), a * m).to(values.dtype) for a in (alpha, beta, gamma))
    return ((values * about_z) @ vectors.conj() * about_y) @ vectors.T * last
