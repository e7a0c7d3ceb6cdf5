"""Each high score looked at by itself: what is left of it without its neighbours, whether it has the template's shape, its pose.

*Neighbours.* A template that is moved off a particle still matches a part of it. From the highest score down, what the template
predicts at its pose is taken out of the volume, and the next is judged by what is left (matching pursuit: Mallat & Zhang 1993,
IEEE Trans. Signal Process. 41:3397).

*Shape.* Anything of about the right size matches any template in some rotation better than noise does. What tells the template's
own particles: they fit it better than decoys, maps with its spherical average, spectrum and symmetry. Were it exchangeable with K
of these, the chance that it lets more false candidates pass than each of them would be 1 / (K + 1).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.match.templates import Template, decoy
from libemc.methods.subtilts import Progress
from libemc.numerics import fourier
from libemc.numerics.so3 import local_rotation_grid

DECOYS = 16
ROTATIONS_AT_ONCE = 2048
FACES = torch.tensor([(0, 0, 0), *(p for p in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, p)) == 1)])
"""Voxels at which a candidate is scored: its own and the six beside it."""
AROUND = torch.tensor(list(itertools.product((-1, 0, 1), repeat=3)))
"""Steps in which a place is refined."""
LEVELS = 3
"""Halvings of the rotations' step, and of the voxel, in which a pose is refined."""
JUDGED = 2
"""The same, where candidates and decoys are compared."""
TOWARDS = 1 / 3
"""How far from what decoys reach to what the template would a candidate must come, in logarithms. By the decoys alone, one
template in as many as there are decoys would pass where it isn't."""
ALMOST_ALL = 2.0
"""Standard errors below what is expected."""
ERROR = 1.2
"""Relative error of the ratio, times the score: that of the score, 1, and of the decoys' mean, of whose noise they share half."""
TELLING = 1.15
"""Times what decoys reach: what the template must reach itself, or it can't be told from them."""
REACH = 0.75
"""Of a step: rotations that are farther off are another node's, almost all."""


@dataclass(frozen=True)
class Candidates:
    """Places where a template may be, P of them.

    Attributes:
        xyz: (P, 3) voxels (x, y, z) from the volume's first, float64.
        rotation: (P, 3, 3).
        score: (P,) in units of the noise.
    """

    xyz: Tensor
    rotation: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.xyz)

    def __getitem__(self, index: Tensor) -> Candidates:
        return Candidates(self.xyz[index], self.rotation[index], self.score[index])


class Eye:
    """How the specimen shows a template: scores in boxes around places, and what a box holds of it.

    Args:
        template: whose box, mask and band these are.
        weights: (Q,) of `Sensitivity.weights`.
    """

    def __init__(self, template: Template, weights: Tensor) -> None:
        self.template = template
        self.points, self.place = template.ball
        self.double = torch.where(self.points[2] == 0, 1.0, 2.0)
        self.weights = weights * self.double / template.box**2

    def values(self, box: Tensor) -> Tensor:
        """The coefficients (Q,) of `Template.ball` of a box (z, y, x) whose origin is m//2."""
        m = self.template.box
        centred = torch.roll(box, (-(m // 2),) * 3, (0, 1, 2)).permute(2, 1, 0).contiguous()
        return torch.fft.rfftn(centred).flatten()[self.place]

    def phases(self, shifts: Tensor) -> Tensor:
        """(S, Q) by which coefficients are multiplied to bring what is at shifts (S, 3) voxels (x, y, z) to the origin."""
        turns = shifts.float() @ self.points / self.template.box
        return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)

    def scores(
        self, values: Tensor, rotations: Tensor, shifts: Tensor, other: Template | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best score of each of (P, Q) values over rotations (N, 3, 3) and shifts: (P,), rotation's and shift's number.

        Args:
            other: a decoy to be scored instead.
        """
        template, count = other or self.template, len(shifts)
        phases = self.phases(shifts) * (self.double / template.box**3)
        moved = torch.view_as_real(values[:, None] * phases).reshape(len(values) * count, -1)
        best = torch.full((len(values),), -torch.inf)
        which, where = torch.zeros(len(values), dtype=torch.long), torch.zeros(len(values), dtype=torch.long)
        for start in range(0, len(rotations), ROTATIONS_AT_ONCE):
            turned = template.coefficients(rotations[start : start + ROTATIONS_AT_ONCE])
            norms = (turned.abs().square() @ self.weights).sqrt().clamp_min(1e-30)
            cross = (moved @ torch.view_as_real(turned).reshape(len(turned), -1).T) / norms
            top, place = cross.reshape(len(values), -1).max(dim=1)
            better = top > best
            best = torch.where(better, top, best)
            which = torch.where(better, start + place % len(turned), which)
            where = torch.where(better, place // len(turned), where)
        return best, which, where

    def amplitude(self, score: float, rotation: Tensor) -> float:
        """Of the template, at which it would reach a score."""
        return score / float((self.template.coefficients(rotation[None]).abs().square() @ self.weights).sqrt())

    def refined(
        self, values: Tensor, rotation: Tensor, step: float, levels: int = LEVELS, other: Template | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """Pose of what a box (Q,) holds, near a rotation of a grid of `step` degrees: rotation, shift (3,) voxels, score."""
        shift, score = torch.zeros(3), 0.0
        for level in range(levels):
            fine = step / 2 ** (level + 1)
            rotations = local_rotation_grid(fine, REACH * 2 * fine).to(rotation) @ rotation
            shifts = shift + AROUND / 2**level
            best, which, where = self.scores(values[None], rotations, shifts, other)
            rotation, shift, score = rotations[which[0]], shifts[where[0]], float(best[0])
        return rotation, shift, score

    def best(self, boxes: Tensor, rotations: Tensor, step: float, other: Template | None = None) -> Tensor:
        """The score of each of (P, Q) boxes over rotations (N, 3, 3), `step` degrees apart, at its best, refined: (P,)."""
        _, which, _ = self.scores(boxes, rotations, FACES, other)
        found = [
            self.refined(box, rotations[w], step, JUDGED, other)[2]
            for box, w in zip(boxes, which.tolist(), strict=True)
        ]
        return torch.tensor(found)

    def prediction(self, rotation: Tensor, offset: Tensor, wide: Eye) -> Tensor:
        """What the volume shows of the template in a box of `wide`, (z, y, x), `offset` (3,) voxels off its origin."""
        m, template = wide.template.box, wide.template
        values = template.coefficients(rotation[None])[0] * wide.weights / wide.double * m**3
        values = values * wide.phases(-offset[None])[0]
        flat = torch.zeros(m * m * (m // 2 + 1), dtype=torch.complex64)
        flat[wide.place] = values
        box = torch.fft.irfftn(flat.reshape(m, m, -1), s=(m, m, m)).permute(2, 1, 0)
        return torch.roll(box, (m // 2,) * 3, (0, 1, 2))


def widened(template: Template) -> Template:
    """The template in a box twice as wide: what the volume shows of it reaches beyond its own."""
    box = (2 * template.box,) * 3
    return replace(
        template, density=fourier.centre_pad(template.density, box), mask=fourier.centre_pad(template.mask, box)
    )


class Residual:
    """A volume from which particles are taken out, and into which they can be put back.

    Args:
        volume: (z, y, x) float32; it's copied.
        eye, wide: of the template, and of the same in a box twice as wide.
    """

    def __init__(self, volume: NDArray[Any], eye: Eye, wide: Eye) -> None:
        self.volume, self.eye, self.wide = torch.from_numpy(np.array(volume, dtype=np.float32)), eye, wide

    def _cut(self, middle: Tensor, box: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, within = [], []
        for centre, n in zip(reversed(middle.tolist()), self.volume.shape, strict=True):
            first, last = max(0, centre - box // 2), max(0, min(n, centre - box // 2 + box))
            inside.append(slice(first, max(first, last)))
            within.append(slice(first - centre + box // 2, max(first, last) - centre + box // 2))
        return tuple(inside), tuple(within)

    def values(self, xyz: Tensor) -> Tensor:
        """Coefficients (Q,) of the box around the voxel next to a place (3,)."""
        m = self.eye.template.box
        box = torch.zeros(m, m, m)
        inside, within = self._cut(xyz.round().long(), m)
        box[within] = self.volume[inside]
        return self.eye.values(box)

    def add(self, xyz: Tensor, rotation: Tensor, amplitude: float) -> None:
        """Put a particle in; a negative amplitude takes it out."""
        middle = xyz.round().long()
        predicted = self.eye.prediction(rotation, (xyz - middle).float(), self.wide)
        inside, within = self._cut(middle, self.wide.template.box)
        self.volume[inside] += amplitude * predicted[within]


def pursue(
    residual: Residual,
    candidates: Candidates,
    least: Tensor,
    rotations: Tensor,
    step: float,
    apart: float,
    progress: Progress | None = None,
) -> tuple[Candidates, Tensor]:
    """Take candidates out of a volume, the highest first, as long as what is left of them is high enough; refine their poses.

    Args:
        candidates: best first. least: (P,) score that is asked for at each place.
        rotations: (N, 3, 3) of the search, `step` degrees apart.
        apart: least distance between two, voxels.

    Returns:
        Those that were high enough, which stay taken out; and their scores before refinement, (P,), at the rotations of the
        search: those that are comparable with its decoys'.
    """
    eye, reach = residual.eye, residual.wide.template.box / 2
    taken: list[tuple[Tensor, Tensor, float]] = []
    heights = []
    numbers = range(len(candidates))
    for i in progress(numbers, len(numbers), "candidates") if progress else numbers:
        place, rotation, height = candidates.xyz[i], candidates.rotation[i], float(candidates.score[i])
        values = residual.values(place)
        if any(float((xyz - place).norm()) < reach for xyz, _, _ in taken):
            best, which, _ = eye.scores(values[None], rotations, FACES)
            rotation, height = rotations[which[0]], min(height, float(best[0]))
        if height < float(least[i]):
            continue
        turned, shift, score = eye.refined(values, rotation, step)
        xyz = place.round() + shift
        if any(float((other - xyz).norm()) < apart for other, _, _ in taken):
            continue
        residual.add(xyz, turned, -eye.amplitude(score, turned))
        taken.append((xyz, turned, score))
        heights.append(height)
    if not taken:
        return Candidates(torch.zeros(0, 3).double(), torch.zeros(0, 3, 3).double(), torch.zeros(0)), torch.zeros(0)
    places, turns, scores = zip(*taken, strict=True)
    return Candidates(torch.stack(places), torch.stack(turns), torch.tensor(scores)), torch.tensor(heights)


@dataclass(frozen=True)
class Shape:
    """Whether candidates have the template's shape.

    Attributes:
        ratio: (P,) score over the decoys' mean score.
        least: ratio that no decoy lets more than the allowed number of false candidates pass at.
        expected: (P,) ratio that the template itself would reach with the candidate's score.
        error: (P,) standard error of that, by the noise.
        own: the ratio without noise.
    """

    ratio: Tensor
    least: float
    expected: Tensor
    error: Tensor
    own: float

    @property
    def telling(self) -> bool:
        """Whether the template can be told from its decoys at all."""
        return self.own > TELLING * self.least

    @property
    def asked(self) -> Tensor:
        """(P,) ratio that is asked for: from the least by `TOWARDS` of the way to what the template would reach, and no more than
        almost all of its particles have."""
        if not self.least:
            return torch.zeros_like(self.expected)
        asked = self.least * (self.expected / self.least).clamp_min(1.0) ** TOWARDS
        return torch.minimum(asked, self.expected - ALMOST_ALL * self.error)

    @property
    def passed(self) -> Tensor:
        """(P,) bool; all, where it can't be told."""
        return self.ratio > self.asked if self.telling else torch.ones_like(self.ratio, dtype=torch.bool)

    def __getitem__(self, index: Tensor) -> Shape:
        return replace(self, **{name: getattr(self, name)[index] for name in ("ratio", "expected", "error")})


def shape_test(residual: Residual, taken: Candidates, rotations: Tensor, step: float, false: float, seed: int) -> Shape:
    """Compare candidates that were taken out of a volume with the template and with decoys of its shape.

    Each is put back for itself, without its neighbours. The ratio asked for is the least at which no decoy, compared
    with the other decoys, lets more than `false` candidates pass.

    Args:
        rotations: (N, 3, 3), `step` degrees apart, among which all are looked for.
    """
    eye = residual.eye
    values = []
    for xyz, rotation, score in zip(taken.xyz, taken.rotation, taken.score.tolist(), strict=True):
        amplitude = eye.amplitude(score, rotation)
        residual.add(xyz, rotation, amplitude)
        values.append(residual.values(xyz))
        residual.add(xyz, rotation, -amplitude)
    # the template itself, as the specimen shows it without noise
    itself = eye.template.coefficients(torch.eye(3)[None])[0] * eye.weights / eye.double
    boxes = torch.stack([*values, itself])
    own = eye.best(boxes, rotations, step)
    own[:-1] = torch.maximum(own[:-1], taken.score.to(own))
    decoys = [decoy(eye.template, seed + k, keep_shape=True) for k in range(DECOYS)]
    theirs = torch.stack([eye.best(boxes, rotations, step, d) for d in decoys])
    tiny = 1e-6 * float(own.abs().max())
    others = ((theirs.sum(0) - theirs) / (DECOYS - 1)).clamp_min(tiny)
    ratio, false_ratios = own / theirs.mean(0).clamp_min(tiny), (theirs / others)[:, :-1]
    passing, allowed = false_ratios.sort(dim=1, descending=True).values, math.floor(false)
    least = float(passing[:, allowed].max()) if allowed < passing.shape[1] else 0.0
    perfect = float(ratio[-1])
    # the decoys' scores have noise of their own: the highest of that many
    chance = 2 * math.log(len(rotations) * len(FACES))
    expected = own[:-1] / ((own[:-1] / perfect) ** 2 + chance).sqrt()
    error = expected * ERROR / own[:-1].clamp_min(1.0)
    return Shape(ratio[:-1], least, expected, error, perfect)
