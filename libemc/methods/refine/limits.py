"""How far poses may go from where a refinement found them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.numerics.rotations import matrix_from_rotvec, rotvec_from_matrix


@dataclass(frozen=True)
class Limits:
    """What poses may be, relative to the ones that particles had before the refinement (from picks, most of the time).

    Attributes:
        shift_px: pixels, radius of the ball of positions.
        max_angle: degrees, largest rotation; None for any.
        max_tilt: degrees by which the particle's own z axis may lean, while it turns freely about it; 0 holds the axis.
    """

    shift_px: float = math.inf
    max_angle: float | None = None
    max_tilt: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether some rotations are out of question."""
        return self.max_angle is not None or self.max_tilt is not None

    def hold(self, rotation: Tensor, prior: Tensor) -> Tensor:
        """Rotations (P, 3, 3) brought back to the nearest that are within the limits about `prior` (P, 3, 3)."""
        if self.max_tilt is not None:
            axis, wanted = rotation[:, :, 2], prior[:, :, 2]
            about = torch.linalg.cross(axis, wanted)
            length = torch.linalg.vector_norm(about, dim=1, keepdim=True)
            lean = torch.rad2deg(torch.atan2(length[:, 0], (axis * wanted).sum(1)))
            fallback = rotation[:, :, 0]  # opposite axes: any perpendicular does
            about = torch.where(length > 1e-12, about / length.clamp_min(1e-12), fallback)
            back = (lean - self.max_tilt).clamp_min(0)
            rotation = matrix_from_rotvec(about * back[:, None]) @ rotation
        if self.max_angle is not None:
            turn = rotvec_from_matrix(rotation @ prior.transpose(1, 2))
            length = torch.linalg.vector_norm(turn, dim=1, keepdim=True).clamp_min(1e-12)
            held = matrix_from_rotvec(turn * (self.max_angle / length).clamp_max(1.0)) @ prior
            rotation = torch.where((length[:, 0] > self.max_angle)[:, None, None], held, rotation)
        return rotation
