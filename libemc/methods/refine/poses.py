"""Poses of particles while they are looked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Poses:
    """Poses of P particles: rotation (P, 3, 3), shift (P, 3) px from the batch's position (specimen frame), score (P,)."""

    rotation: Tensor
    shift: Tensor
    score: Tensor

    def __getitem__(self, index: Tensor) -> Poses:
        return Poses(self.rotation[index], self.shift[index], self.score[index])

    @staticmethod
    def at(rotation: Tensor, shift: Tensor) -> Poses:
        """Poses that nobody has scored yet."""
        return Poses(rotation, shift, torch.full((len(rotation),), -torch.inf, dtype=torch.float64))

    def better_of(self, other: Poses) -> Poses:
        """Of two poses of each particle, the one with the higher score."""
        wins = other.score > self.score
        return Poses(
            torch.where(wins[:, None, None], other.rotation, self.rotation),
            torch.where(wins[:, None], other.shift, self.shift),
            torch.where(wins, other.score, self.score),
        )

    def replaced(self, who: Tensor, others: Poses) -> Poses:
        """With those of some particles, (P',) int64, replaced by others."""
        out = Poses(self.rotation.clone(), self.shift.clone(), self.score.clone())
        out.rotation[who], out.shift[who], out.score[who] = others.rotation, others.shift, others.score
        return out
