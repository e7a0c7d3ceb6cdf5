"""Natural cubic splines against scipy's, and what any interpolation must do."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from libemc.numerics.splines import field_basis, spline_basis


@pytest.mark.parametrize("nodes", [2, 3, 4, 7])
def test_agrees_with_scipy_inside(nodes: int) -> None:
    values = np.random.default_rng(nodes).normal(size=nodes)
    x = np.linspace(-1, 1, 41)
    expected = CubicSpline(np.linspace(-1, 1, nodes), values, bc_type="natural")(x)
    np.testing.assert_allclose(spline_basis(torch.tensor(x), nodes) @ torch.tensor(values), expected, atol=1e-12)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_goes_on_straight_beyond_the_ends(nodes: int) -> None:
    step = 1e-4
    for end, sign in ((-1.0, -1), (1.0, 1)):
        x = torch.tensor([end - sign * step, end, end + sign * step, end + 0.5 * sign, end + sign], dtype=torch.float64)
        b = spline_basis(x, nodes)
        # slope continuous at the end (to the curvature over a step), then constant
        assert torch.allclose(b[2] - b[1], b[1] - b[0], atol=50 * step**2)
        assert torch.allclose(b[4] - b[3], b[3] - b[1], atol=1e-12)


def test_constant_and_linear_fields_are_exact() -> None:
    points = torch.rand(50, 2, dtype=torch.float64) * 300 - 150
    basis = field_basis(points, (200.0, 100.0), 3, 4)
    assert torch.allclose(basis.sum(-1), torch.ones(50).double(), atol=1e-12)
    y, x = torch.meshgrid(torch.linspace(-50, 50, 3).double(), torch.linspace(-100, 100, 4).double(), indexing="ij")
    assert torch.allclose(basis @ (2 * x - 3 * y).flatten(), 2 * points[:, 0] - 3 * points[:, 1], atol=1e-9)
