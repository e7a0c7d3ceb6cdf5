"""The changes that can be made to a map, in the one order in which they are made.

First what concerns the map as it was measured: sign, hand, place; then the axes of its symmetry are found, if they are
asked for; then averaging over the symmetry, filters, sampling, box, normalisation. Another change is another field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libemc.methods import postprocess
from libemc.methods.find_symmetry import GROUPS, Ranking, find_symmetry, onto_axes
from libemc.numerics import filters, fourier
from libemc.numerics.rotations import matrix_from_euler
from libemc.numerics.symmetry import symmetrise

Triple = tuple[float, ...]

BEST_GROUP = "auto"


@dataclass(frozen=True)
class Changes:
    """What is done to a map; a field that is None, False or c1 does nothing.

    Attributes:
        invert: change the sign.
        mirror: x, y or z.
        rotate: rot, tilt, psi, degrees; shift: x, y, z, Å, after it.
        find_symmetry: a group whose axes are brought into place, or `BEST_GROUP`.
        symmetry: a point group or helix to average over.
        highpass, lowpass: Å.
        box: voxels, after resampling.
        normalise: to mean 0 and standard deviation 1.
    """

    invert: bool = False
    mirror: str | None = None
    rotate: Triple | None = None
    shift: Triple | None = None
    find_symmetry: str | None = None
    symmetry: str = "c1"
    highpass: float | None = None
    lowpass: float | None = None
    box: int | None = None
    normalise: bool = False

    def changed(
        self, volume: Tensor, pixel_size: float, step: float = 1.0, half_maps: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Ranking | None]:
        """The map with all changes, and the groups that it was compared with.

        Args:
            volume: (z, y, x) real.
            pixel_size: Å; step: the new one over it.
            half_maps: two like the map, to find the symmetry with.
        """
        volume, *halves = (self._moved(v, pixel_size) for v in (volume, *half_maps))
        ranking = None
        if self.find_symmetry:
            wanted = self.find_symmetry.strip().lower()
            groups = GROUPS if wanted == BEST_GROUP else (wanted,)
            ranking = find_symmetry(torch.stack(halves or [volume]), pixel_size, groups=groups)
            group = ranking.chosen if wanted == BEST_GROUP else wanted
            volume = volume if group == "c1" else onto_axes(volume, ranking.of(group), pixel_size)
        volume = symmetrise(volume, self.symmetry, pixel_size)
        if self.highpass:
            volume = filters.highpass(volume, pixel_size, self.highpass)
        if self.lowpass:
            volume = filters.lowpass(volume, pixel_size, self.lowpass)
        if step != 1:
            volume = postprocess.resample(volume, step)
        if self.box:
            volume = fourier.centre_fit(volume, (self.box,) * 3)
        return (filters.normalise(volume) if self.normalise else volume), ranking

    def _moved(self, volume: Tensor, pixel_size: float) -> Tensor:
        """Sign, hand and place."""
        volume = -volume if self.invert else volume
        if self.mirror:
            volume = postprocess.mirror(volume, self.mirror)
        if not (self.rotate or self.shift):
            return volume
        rotation = matrix_from_euler(*(self.rotate or (0.0, 0.0, 0.0)))
        return postprocess.place(volume, rotation, [s / pixel_size for s in self.shift or (0.0, 0.0, 0.0)])
