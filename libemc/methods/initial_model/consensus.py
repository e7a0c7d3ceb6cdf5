"""How alike the models of several seeds are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libemc.methods.overlay import overlay


def likeness(a: Tensor, b: Tensor, radius: float, max_shift: float) -> float:
    """How alike two sets of class maps (C, n, n, n) are: correlation of each class of one with the nearest of the other.

    The mean over the classes of both sets. Hands are told apart: a tomogram knows its own.
    """
    table = torch.tensor([[overlay(x, y, radius, max_shift).correlation for y in b] for x in a])
    return float((table.amax(dim=0).mean() + table.amax(dim=1).mean()) / 2)


def agreement(models: Sequence[Tensor], radius: float, max_shift: float) -> Tensor:
    """(M, M) likeness of every pair of sets of class maps, 1 on the diagonal."""
    table = torch.eye(len(models), dtype=torch.float64)
    for i, a in enumerate(models):
        for j in range(i):
            table[i, j] = table[j, i] = likeness(a, models[j], radius, max_shift)
    return table
