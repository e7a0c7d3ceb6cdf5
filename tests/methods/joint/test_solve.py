"""The joint fit's linear algebra against dense matrices, and held-out images against a fit without them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from libemc.methods.joint import levels, solve
from libemc.methods.joint.evidence import GEOMETRY
from libemc.methods.joint.levels import Choice
from libemc.methods.joint.terms import Term, total
from tests.methods.joint.joint_data import scene, told

N, T = 6, 5
CHOICES = (
    Choice(levels.SHIFT, 2.0, math.inf),
    Choice(levels.MOTION, 1.0, 300.0),
    Choice(levels.ANGLES, 0.3, math.inf),
    Choice(levels.OWN_SHIFT, 0.6, 0.0),
)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, list[Term]]:
    """Slope (N, T, 5), curvature (N, T, 5, 5), and the pose with four levels."""
    where = scene(N, T, seed)
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(N, T, generator=g) > 0.1
    evidence = told(2 * torch.randn(N, T, 8, generator=g).double(), seed, seen=seen).part(GEOMETRY)
    return evidence.slope, evidence.curvature, [where.pose(), *(where.term(c) for c in CHOICES)]


def columns(terms: list[Term]) -> Tensor:
    """(N·T·5, all numbers): unit number after unit number."""
    out = []
    for t in terms:
        size = math.prod(t.shape)
        out.append(t.forward(torch.eye(size, dtype=torch.float64).reshape(size, *t.shape)).flatten(1).T)
    return torch.cat(out, dim=1)


def dense(curvature: Tensor, terms: list[Term]) -> tuple[Tensor, Tensor]:
    """Normal matrix with its prior, and the terms' columns."""
    x = columns(terms)
    return x.T @ torch.block_diag(*curvature.flatten(0, 1)) @ x + torch.eye(x.shape[1], dtype=torch.float64), x


def flat(numbers: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten(-3) for w in numbers], dim=-1)


def test_against_a_dense_solve() -> None:
    """The residual is below the tolerance that was asked for: 1e-8, so the solution is exact to 1e-5 and better."""
    slope, curvature, terms = problem()
    normal, x = dense(curvature, terms)
    expected = torch.linalg.solve(normal, x.T @ slope.flatten())
    found = flat(solve.solve(slope, curvature, terms, 1e-8))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    pull = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).double() for i, t in enumerate(terms)]
    pulled = flat(solve.solve(slope, curvature, terms, 1e-8, pull))
    torch.testing.assert_close(
        pulled, torch.linalg.solve(normal, x.T @ slope.flatten() + flat(pull)), rtol=0, atol=1e-4
    )
    # at the tolerance that fits use, what is left of the energy is its square
    usual = flat(solve.solve(slope, curvature, terms))
    error = usual - expected
    assert error @ normal @ error < (3 * solve.TOLERANCE) ** 2 * (expected @ normal @ expected)


def test_several_problems_at_once() -> None:
    """Batches with curvatures of their own, one of them empty, against one after the other."""
    slope, curvature, terms = problem()
    scale = torch.tensor([1.0, 0.3, 0.0]).double()[:, None, None, None]
    together = solve.solve(slope * scale, curvature * scale[..., None], terms, 1e-8)
    for k, s in enumerate(scale.flatten()):
        alone = solve.solve(slope * s, curvature * s, terms, 1e-8)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[k], b, rtol=0, atol=1e-6)
    assert not flat(together)[2].any()


def test_spread_is_that_of_the_inverse() -> None:
    """From 32 draws each is known to 1/8: so many of them scatter by that, and on the whole are exact to a tenth of it."""
    _, curvature, terms = problem()
    normal, _ = dense(curvature, terms)
    expected = torch.linalg.inv(normal).diagonal().sqrt()
    ratio = flat(solve.spread(curvature, terms, 0)) / expected
    one = 1 / math.sqrt(2 * solve.SAMPLES)
    assert len(ratio) > 100 and abs(float(ratio.mean()) - 1) < 0.3 * one
    assert float(ratio.std()) == pytest.approx(one, rel=0.3) and float((ratio - 1).abs().max()) < 5 * one


def test_folds_are_of_the_images_that_there_are() -> None:
    seen = torch.rand(40, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    part = solve.folds(seen, 3)
    assert torch.equal(part >= 0, seen) and torch.equal(part, solve.folds(seen, 3))
    counts = torch.bincount(part[seen], minlength=solve.FOLDS)
    expected, count = int(seen.sum()) / solve.FOLDS, len(counts)
    assert count == solve.FOLDS
    # four standard deviations of a binomial
    assert (counts - expected).abs().max() < 4 * math.sqrt(expected)


def test_held_out_images_have_no_part_in_what_is_foretold_of_them() -> None:
    """Against dense fits of the others, image by image; `LOOSE` is how exactly those are solved."""
    g = torch.Generator().manual_seed(4)
    where = scene(N, T)
    seen = torch.rand(N, T, generator=g) > 0.1
    evidence = told(2 * torch.randn(N, T, 8, generator=g).double(), 1, seen=seen).part(GEOMETRY)
    there = torch.randn(N, T, 5, generator=g).double()
    # the same evidence measured at other corrections
    moved = replace(evidence, slope=evidence.slope - (evidence.curvature @ there[..., None])[..., 0])
    terms = [where.pose(), *(where.term(c) for c in CHOICES)]
    part = solve.folds(seen, 0)
    found = solve.foretold(moved, there, terms, part)
    x = columns(terms)
    expected = torch.zeros(N, T, dtype=torch.float64)
    for fold in range(solve.FOLDS):
        others = (seen & (part != fold)).double()
        normal, _ = dense(evidence.curvature * others[..., None, None], terms)
        w = torch.linalg.solve(normal, x.T @ (evidence.slope * others[..., None]).flatten())
        gain = evidence.gain((x @ w).reshape(N, T, 5))
        expected = torch.where(part == fold, gain, expected)
    assert not found[~seen].any() and (found - expected).abs().max() < 10 * solve.LOOSE * expected.abs().max()


def test_a_comparison_is_of_all_images() -> None:
    """Gain and its error written out."""
    a, b = [torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[3.0]])], [torch.zeros(2, 2), torch.tensor([[5.0]])]
    assert solve.compared(a, b) == pytest.approx((7.0 - 2.0, math.sqrt(1 + 4 + 16 + 4)))


def test_what_all_terms_say_of_a_clean_set() -> None:
    """Corrections drawn from the terms themselves come back where images tell much more than the priors."""
    _, _, terms = problem()
    g = torch.Generator().manual_seed(9)
    numbers = [torch.randn(t.shape, generator=g).double() for t in terms]
    truth = total(terms, numbers)
    wide = torch.zeros(N, T, 8, dtype=torch.float64)
    wide[..., GEOMETRY] = truth
    evidence = told(wide, 0, tells=(0.01,) * 8).part(GEOMETRY)
    found = total(terms, solve.solve(evidence.slope, evidence.curvature, terms, 1e-8))
    # a hundredth of a degree and Å each, thirty such at most
    assert (found - truth).abs().max() < 0.1 and truth.abs().max() > 3
