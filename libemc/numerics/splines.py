"""Natural cubic splines on a few regular nodes: how smooth fields are stored and evaluated."""

from __future__ import annotations

import torch
from torch import Tensor


def spline_basis(x: Tensor, nodes: int) -> Tensor:
    """The natural cubic spline through each unit vector of values at regular nodes.

    Args:
        x: (...) where to evaluate; the nodes span -1 to 1. Beyond, the spline goes on as a straight line.
        nodes: how many; with one the spline is constant, with two a straight line.

    Returns:
        (..., nodes) float64: what the value at each node contributes at x; the contributions add up to 1.

    Source: de Boor, A Practical Guide to Splines (1978), chapter IV, end condition of vanishing second derivative.
    """
    x = x.double()
    if nodes == 1:
        return torch.ones((*x.shape, 1), dtype=torch.float64)
    identity = torch.eye(nodes, dtype=torch.float64, device=x.device)
    second = torch.zeros_like(identity)  # derivatives at the nodes, in units of their distance
    if nodes > 2:
        inner = nodes - 2
        system = 4 * torch.eye(inner) + torch.diag(torch.ones(inner - 1), 1) + torch.diag(torch.ones(inner - 1), -1)
        curvature = 6 * (identity[2:] - 2 * identity[1:-1] + identity[:-2])
        second[1:-1] = torch.linalg.solve(system.to(identity), curvature)
    place = (x + 1) / 2 * (nodes - 1)
    left = place.detach().floor().clamp(0, nodes - 2).long()
    t = (place - left)[..., None]
    y0, y1, m0, m1 = identity[left], identity[left + 1], second[left], second[left + 1]
    inside = (1 - t) * y0 + t * y1 + ((1 - t) ** 3 - (1 - t)) / 6 * m0 + (t**3 - t) / 6 * m1
    before = y0 + t * (y1 - y0 - (2 * m0 + m1) / 6)
    after = y1 + (t - 1) * (y1 - y0 + (m0 + 2 * m1) / 6)
    return torch.where(t < 0, before, torch.where(t > 1, after, inside))


def field_basis(points: Tensor, field: tuple[float, float], rows: int, columns: int) -> Tensor:
    """What the nodes of a grid contribute to a smooth field at points of the plane.

    Args:
        points: (..., 2) x and y; field: what the nodes span along x and y, around 0, in the same unit.
        rows, columns: nodes along y and x.

    Returns:
        (..., rows * columns) float64, x fastest: tensor product of natural cubic splines.
    """
    along_x = spline_basis(2 * points[..., 0] / field[0], columns)
    along_y = spline_basis(2 * points[..., 1] / field[1], rows)
    return (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)
