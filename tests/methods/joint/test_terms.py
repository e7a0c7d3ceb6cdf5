"""Terms as matrices: `adjoint` is the transpose of `forward`, `blocks` those of the normal matrix; what is smooth in space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libemc.methods.joint import terms
from libemc.methods.joint.terms import Smooth, Term, total

N, T, P = 5, 4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 17 * len(shape))).double()


def dense(term: Term) -> Tensor:
    """(N·T·P, numbers): column by column, what a term's numbers add up to, by its formula in plain loops."""
    m, k, c = term.shape
    space = torch.eye(N, dtype=torch.float64) if term.space is None else term.space
    time = torch.eye(T, dtype=torch.float64) if term.time is None else term.time
    basis = term.basis.expand(N, T, P, c)
    out = torch.zeros(N, T, P, m, k, c, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            for i in range(m):
                for j in range(k):
                    out[n, t, :, i, j] = basis[n, t] * space[n, i] * time[t, j]
    return out.reshape(N * T * P, m * k * c)


KINDS = [(basis, space, time) for basis in ("each", "one", "by tilt") for space in (0, 2) for time in (0, 3)]


def made(basis: str, space: int, time: int, c: int = 2) -> Term:
    shape = {"each": (N, T), "one": (1, 1), "by tilt": (1, T)}[basis]
    return Term("x", random(*shape, P, c), random(N, space) if space else None, random(T, time) if time else None, N, T)


@pytest.mark.parametrize(("basis", "space", "time"), KINDS)
def test_forward_adjoint_and_blocks_are_those_of_a_matrix(basis: str, space: int, time: int) -> None:
    """With one and with two batch dimensions, to rounding."""
    term = made(basis, space, time)
    matrix = dense(term)
    assert matrix.shape[1] == term.shape[0] * term.shape[1] * term.shape[2]
    w, u = random(2, 3, *term.shape), random(2, 3, N, T, P, seed=1)
    forward, back = term.forward(w), term.adjoint(u)
    torch.testing.assert_close(forward.flatten(-3), w.flatten(-3) @ matrix.T)
    torch.testing.assert_close(back.flatten(-3), u.flatten(-3) @ matrix)
    torch.testing.assert_close((forward * u).sum(), (w * back).sum())
    root = random(2, N, T, P, P)
    curvature = root @ root.transpose(-1, -2)
    c = term.shape[2]
    for h, blocks in zip(curvature, term.blocks(curvature), strict=True):
        normal = matrix.T @ torch.block_diag(*h.flatten(0, 1)) @ matrix
        for number, block in enumerate(blocks.flatten(0, 1)):
            own = slice(number * c, number * c + c)
            torch.testing.assert_close(block, normal[own, own])


@pytest.mark.parametrize(("basis", "space", "time"), KINDS)
def test_some_of_the_particles(basis: str, space: int, time: int) -> None:
    """Rows of the same matrix, where particles share numbers in space; else numbers of their own."""
    term, chosen = made(basis, space, time), torch.tensor([3, 0])
    few = term.among(chosen)
    w = random(*term.shape)
    torch.testing.assert_close(few.forward(w if space else w[chosen]), term.forward(w)[chosen])


def test_terms_add_up() -> None:
    several = [made(*kind, c=1 + i % 2) for i, kind in enumerate(KINDS)]
    numbers = [random(*t.shape, seed=i) for i, t in enumerate(several)]
    expected = sum(dense(t) @ w.flatten() for t, w in zip(several, numbers, strict=True))
    torch.testing.assert_close(total(several, numbers).flatten(), expected)


@pytest.mark.parametrize("length", [150.0, 500.0])
def test_modes_are_a_root_of_the_covariance(length: float) -> None:
    """exp(-d²/2l²), written out; what the modes left out make of it is below their limit times the largest variance of a mode."""
    points = 400 * random(30, 3)
    smooth = Smooth.of(points, length)
    kernel = torch.tensor([[float(torch.exp(-((a - b) ** 2).sum() / (2 * length**2))) for b in points] for a in points])
    largest = float(torch.linalg.eigvalsh(kernel.double())[-1])
    error = (smooth.modes @ smooth.modes.T - kernel).abs().max()
    assert error < terms.LEAST_MODE * largest + 1e-6
    # the longer the length, the fewer modes
    assert smooth.modes.shape[1] <= 30 and Smooth.of(points, 4 * length).modes.shape[1] < smooth.modes.shape[1]
    torch.testing.assert_close(smooth.at(points), smooth.modes, rtol=0, atol=1e-8)


def test_between_the_points_and_far_from_them() -> None:
    """Of a Gaussian process known at points 100 Å apart with a length of 300 Å: the process itself in their midst (to a
    hundredth of its standard deviation: what the points don't tell, with the modes that are left out), nothing far away."""
    g = torch.Generator().manual_seed(3)
    x = torch.arange(-300.0, 301.0, 100.0)
    points = torch.cartesian_prod(x, x, torch.tensor([0.0, 100.0])).double()
    inside = (torch.rand(20, 3, generator=g).double() - 0.5) * torch.tensor([500.0, 500.0, 0.0])
    inside[:, 2] = 50.0
    every = torch.cat([points, inside])
    covariance = torch.exp(-0.5 * torch.cdist(every, every) ** 2 / 300.0**2)
    values, vectors = torch.linalg.eigh(covariance)
    process = vectors @ (values.clamp_min(0).sqrt() * torch.randn(len(every), generator=g).double())
    smooth = Smooth.of(points, 300.0)
    numbers = torch.linalg.lstsq(smooth.modes, process[: len(points), None]).solution
    found = (smooth.at(inside) @ numbers)[:, 0]
    rms = float((found - process[len(points) :]).square().mean().sqrt())
    assert rms < 0.02, rms
    away = smooth.at(points + torch.tensor([0.0, 3000.0, 0.0]))
    assert away.abs().max() < 1e-6
