"""harmonics: against scipy's spherical harmonics, and rotations of coefficients against rotated functions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special

from libemc.numerics.harmonics import coefficients, small_wigner, sphere_points, wigner
from libemc.numerics.rotations import matrix_from_euler, random_rotations


def test_coefficients_are_those_of_scipys_harmonics() -> None:
    """A real function made of scipy's harmonics gives back what it was made of."""
    degree = 7
    theta, _, points = sphere_points(degree)
    phi = torch.atan2(points[..., 1], points[..., 0])
    generator = torch.Generator().manual_seed(0)
    wanted, values = [], torch.zeros(points.shape[:2], dtype=torch.float64)
    for n in range(degree + 1):
        half = torch.randn(n + 1, dtype=torch.complex128, generator=generator)
        half[0] = half[0].real.clone()
        wanted.append(half)
        for m in range(n + 1):
            legendre = torch.from_numpy(special.lpmv(m, n, theta.cos().numpy()))  # with the Condon-Shortley phase
            norm = math.sqrt((2 * n + 1) / (4 * math.pi) * math.factorial(n - m) / math.factorial(n + m))
            harmonic = norm * legendre[:, None] * torch.exp(1j * m * phi)
            values += (half[m] * harmonic).real * (1 if m == 0 else 2)
    for n, found in enumerate(coefficients(values)):
        assert torch.allclose(found[n:], wanted[n], atol=1e-12)
        sign = (-1.0) ** torch.arange(n + 1)
        assert torch.allclose(found[: n + 1].flip(0), sign * wanted[n].conj(), atol=1e-12)


@pytest.mark.parametrize("special_case", [None, (0.0, 0.0, 0.0), (30.0, 0.0, 20.0), (30.0, 180.0, 20.0)])
def test_a_rotation_of_the_function_is_wigners_matrix(special_case: tuple[float, float, float] | None) -> None:
    """f(R⁻¹ u) sampled anew; f is a polynomial of degree 6 without symmetry."""
    generator = torch.Generator().manual_seed(1)
    rotation = random_rotations(1, generator)[0] if special_case is None else matrix_from_euler(*special_case)
    directions = torch.randn(6, 3, dtype=torch.float64, generator=generator)

    def function(u: torch.Tensor) -> torch.Tensor:
        return sum(((u @ d) ** k for k, d in enumerate(directions, start=1)), torch.zeros(u.shape[:-1]).double())

    _, _, points = sphere_points(6)
    before, after = coefficients(function(points)), coefficients(function(points @ rotation))
    for n in range(7):
        assert torch.allclose(wigner(n, rotation[None])[0] @ before[n], after[n], atol=1e-11)


def test_wigner_matrices_represent_the_rotations() -> None:
    a, b = random_rotations(2, torch.Generator().manual_seed(2))
    for n in (1, 5, 30):
        product = wigner(n, a[None])[0] @ wigner(n, b[None])[0]
        assert torch.allclose(product, wigner(n, (a @ b)[None])[0], atol=1e-10)
        d = small_wigner(n, torch.tensor([0.3]))[0]
        assert torch.allclose(d @ d.T, torch.eye(2 * n + 1, dtype=torch.float64), atol=1e-12)
