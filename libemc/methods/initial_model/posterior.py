"""The weights of all poses and classes of a particle, in matrix products: nothing is decided before it must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from libemc.methods.initial_model.balls import Balls
from libemc.numerics import slices
from libemc.numerics.slices import FourierVolume

AT_ONCE = 2**25
"""Scores that are held at a time."""
HOTTEST = 1e5
HEAT_STEPS = 20
"""Halvings of the interval, from 1 to the hottest on a logarithmic scale, in which a temperature is sought."""


@dataclass(frozen=True)
class Poses:
    """The poses that are weighed: rotations (N, 3, 3), and shifts (S, 3) in box lengths, specimen frame."""

    rotations: Tensor
    shifts: Tensor


@dataclass(frozen=True)
class Posterior:
    """The heaviest rotations of each particle, over all classes; the rest of the weight is shared by these.

    Attributes:
        class_: (P, K) int64; rotation: (P, K) int64, place in the list of rotations.
        weight: (P, K, S) float32, of each shift; they sum to 1 over (K, S).
        evidence: (P,) float64, log of the mean likelihood over all poses and classes, against no particle at all.
        perplexity: (P,) float64, effective number of rotations and classes.
    """

    class_: Tensor
    rotation: Tensor
    weight: Tensor
    evidence: Tensor
    perplexity: Tensor


def shift_phases(balls: Balls, shifts: Tensor) -> Tensor:
    """(S, Q) complex64: factors that bring to the centre what lies at each of (S, 3) box lengths."""
    turns = shifts @ balls.points
    return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(torch.complex64)


def perplexity(logarithms: Tensor) -> Tensor:
    """Effective number of outcomes, exp of the entropy, of unnormalised log weights (..., N): (...)."""
    p = torch.log_softmax(logarithms.double(), dim=-1)
    return (-(p.exp() * p).sum(dim=-1)).exp()


def heat_for(logarithms: Tensor, wanted: float) -> float:
    """The lowest temperature, 1 or above, at which half of the particles have so many effective outcomes.

    Args:
        logarithms: (P, N) log weights at temperature 1.
    """
    if float(perplexity(logarithms).median()) >= wanted:
        return 1.0
    low, high = 0.0, math.log(HOTTEST)
    for _ in range(HEAT_STEPS):
        middle = (low + high) / 2
        enough = float(perplexity(logarithms / math.exp(middle)).median()) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return math.exp(high)


def log_weights(balls: Balls, references: Sequence[FourierVolume], poses: Poses) -> Tensor:
    """(P, C·N) logarithm of each rotation's weight in each class, the best shift of each, at temperature 1."""
    phases = shift_phases(balls, poses.shifts)
    found = [
        torch.cat([score.amax(dim=1) for _, score in _scores(part, references, poses, phases)], dim=1)
        for part in _pieces(balls, poses)
    ]
    return torch.cat(found)


def posterior(
    balls: Balls, references: Sequence[FourierVolume], poses: Poses, keep: int, heat: float = 1.0
) -> Posterior:
    """Weigh all poses of all particles.

    Args:
        references: of each class.
        keep: rotations that are kept of each particle.
        heat: temperature, by which the log-likelihood is divided.
    """
    phases = shift_phases(balls, poses.shifts)
    parts = [_weighed(part, references, poses, phases, keep, heat) for part in _pieces(balls, poses)]
    return Posterior(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Posterior)))


def _pieces(balls: Balls, poses: Poses) -> list[Balls]:
    """The particles in parts whose data at all shifts are not too large."""
    size = max(1, AT_ONCE // (len(poses.shifts) * balls.points.shape[1] * 2))
    return [balls.at(index) for index in torch.arange(len(balls)).split(size)]


def _scores(
    balls: Balls, references: Sequence[FourierVolume], poses: Poses, phases: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Pairs of the first place of a block in (class, rotation) and its log-likelihoods (P, S, N)."""
    moved = balls.data[:, None] * phases  # (P, S, Q)
    left = torch.view_as_real(moved).reshape(len(balls) * len(phases), -1)
    block = max(64, AT_ONCE // len(left))
    for c, reference in enumerate(references):
        for first in range(0, len(poses.rotations), block):
            model = slices.sample_points(reference, poses.rotations[first : first + block], balls.points)
            cross = (left @ torch.view_as_real(model).reshape(len(model), -1).T).reshape(len(balls), len(phases), -1)
            norm = balls.weight @ (model.real**2 + model.imag**2).T
            yield c * len(poses.rotations) + first, cross.mul_(2).sub_(norm[:, None])


def _weighed(
    balls: Balls, references: Sequence[FourierVolume], poses: Poses, phases: Tensor, keep: int, heat: float
) -> Posterior:
    count = len(phases)
    tops: list[tuple[Tensor, Tensor, Tensor]] = []
    every = []
    for first, raw in _scores(balls, references, poses, phases):
        score = raw / heat
        over = torch.logsumexp(score, dim=1)  # (P, N)
        every.append(over)
        value, place = over.topk(min(keep, over.shape[1]), dim=1)
        shifted = score.gather(2, place[:, None].expand(-1, count, -1)).transpose(1, 2)
        tops.append((value, place + first, shifted))
    value, place, shifted = (torch.cat(parts, dim=1) for parts in zip(*tops, strict=True))
    order = value.topk(min(keep, value.shape[1]), dim=1).indices
    place = place.gather(1, order)
    shifted = shifted.gather(1, order[..., None].expand(-1, -1, count))
    weight = torch.softmax(shifted.reshape(len(balls), -1), dim=1).reshape(shifted.shape)
    over = torch.cat(every, dim=1).double()
    evidence = torch.logsumexp(over, dim=1) - math.log(over.shape[1] * count)
    rotations = len(poses.rotations)
    return Posterior(place // rotations, place % rotations, weight, evidence, perplexity(over))
