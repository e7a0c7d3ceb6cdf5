"""Where picks may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.io import mrc
from libemc.matches.plan import Plan
from libemc.records import TiltSeriesRecord


@dataclass(frozen=True)
class Fences:
    """Where picks may be: in the region, in a mask, not on gold.

    Attributes:
        region: as in `Plan`. mask: (z, y, x) and its pixel size, centred on the tomogram. beads: (B, 4) Å, x, y, z, radius.
    """

    region: tuple[float, ...] | None
    mask: tuple[NDArray[Any], float] | None
    beads: Tensor

    @staticmethod
    def of(plan: Plan, record: TiltSeriesRecord | None, margin: float) -> Fences:
        """For a tilt series, or none. `margin`: Å between a pick and a bead's surface."""
        beads = torch.zeros(0, 4, dtype=torch.float64)
        marks = record.alignment.landmarks if record is not None and record.alignment is not None else None
        if marks is not None:
            gold = [
                (*xyz, d / 2 + margin)
                for xyz, kind, d in zip(marks.xyz, marks.kind, marks.diameter, strict=True)
                if kind == "bead" and d
            ]
            beads = torch.tensor(gold, dtype=torch.float64).reshape(-1, 4)
        return Fences(plan.region, None if plan.allowed is None else mrc.read_volume(plan.allowed), beads)

    def allow(self, xyz: Tensor) -> Tensor:
        """(P,) bool of points (P, 3), Å from the tomogram's centre."""
        inside = torch.ones(len(xyz), dtype=torch.bool)
        if self.region is not None:
            low, high = torch.tensor(self.region[0::2]), torch.tensor(self.region[1::2])
            inside &= ((xyz >= low) & (xyz <= high)).all(dim=1)
        if self.mask is not None:
            data, pixel_size = self.mask
            size = torch.tensor(data.shape[::-1])
            at = (xyz / pixel_size).round().long() + size // 2
            held = ((at >= 0) & (at < size)).all(dim=1)
            x, y, z = torch.minimum(at.clamp_min(0), size - 1).unbind(1)
            inside &= held & (torch.from_numpy(data[z, y, x].astype(np.float32)) > 0.5)
        if len(self.beads) and len(xyz):
            inside &= (torch.cdist(xyz, self.beads[:, :3]) > self.beads[:, 3]).all(dim=1)
        return inside
