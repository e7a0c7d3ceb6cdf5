"""A whole search: templates and their decoys through all parts of a volume, then the candidates, to picks with a z-value.

A score's z is the score over the local strength of decoys' scores: 1 in the noise of the images alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from libemc.methods.match import candidates as each
from libemc.methods.match.candidates import Candidates, Shape
from libemc.methods.match.correlate import BYTES_SHARED, BYTES_WORKER, Correlator, Found, Part, search
from libemc.methods.match.significance import Background, local_strength
from libemc.methods.match.specimen import Sensitivity
from libemc.methods.match.templates import Template, decoy, width
from libemc.methods.subtilts import Progress
from libemc.numerics.peaks import find_peaks
from libemc.numerics.so3 import rotation_grid

STEP_OVER_CROWTHER = 2.0
"""Angular step over the Crowther angle, resolution / diameter. At the worst, 0.95 steps off, the outermost detail is blurred, and
what is further in still matches."""
DECOY_SHARE = 4
"""One rotation of a decoy to so many of the template."""
DECOY_SEEDS = 4
"""Different decoys that share these rotations."""
CLOSEST = 0.9
"""Least distance between two picks, in units of the template's shortest axis (`templates.width`)."""
SHAPE_ROTATIONS = 1200
"""So many, or fewer, among which candidates and decoys are looked for before they are refined, no nearer than the search's."""
MOST_CANDIDATES = 4000
"""Of one template and volume that are looked at one by one."""
FEW_MAXIMA = 300
"""With fewer local maxima of the decoys where picks may be, those of all the volume tell what chance is."""
HOPEFUL = 10.0
"""Times the expected number of false picks: so many maxima, by the decoys, are looked at one by one."""
LARGEST_PART = 6e6
"""Voxels of a part with its margins: larger ones are no faster, and what is done is kept part by part."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a search.

    Attributes:
        step: degrees between rotations; None for what resolution and size ask for.
        distance: Å between two picks; None for `CLOSEST` of the template's shortest axis.
        false: how many false picks are expected.
        seed: of the decoys.
    """

    step: float | None = None
    distance: float | None = None
    false: float = 1.0
    seed: int = 0

    def rotations(self, template: Template, diameter: float) -> tuple[Tensor, float]:
        """Those of the search, (N, 3, 3), and the step between them, degrees."""
        step = self.step or STEP_OVER_CROWTHER * math.degrees(template.resolution / diameter)
        return rotation_grid(step, template.symmetry), step

    def apart(self, template: Template) -> float:
        """Voxels between two picks."""
        if self.distance is not None:
            return self.distance / template.pixel_size
        return CLOSEST * width(template.density, template.pixel_size) / template.pixel_size


def parts(shape: tuple[int, int, int], box: int, memory: float, threads: int) -> list[Part]:
    """Cut a volume (z, y, x) into parts that take least time within `memory` bytes, each of `LARGEST_PART` voxels at the most."""
    most = min(LARGEST_PART, memory / (BYTES_SHARED + threads * BYTES_WORKER))
    axes = [_cuts(n, box) for n in shape]
    # the transforms' sizes along an axis don't depend on the others: their sums and maxima multiply
    fits = [cut for cut in product(*axes) if math.prod(c.largest for c in cut) <= most]
    best = min(fits, key=lambda cut: math.prod(c.total for c in cut)) if fits else [axis[-1] for axis in axes]
    spans = [list(pairwise(c.edges)) for c in best]
    return [Part((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in product(*spans)]


@dataclass(frozen=True)
class _Cuts:
    """An axis cut at `edges`; the sum and the largest of the sizes of the transforms."""

    edges: tuple[int, ...]
    total: int
    largest: int


def _cuts(n: int, box: int) -> list[_Cuts]:
    """All ways to cut an axis of n voxels into equal parts that are worth a template's margin, the fewest first."""
    out = []
    for count in range(1, math.ceil(n / box) + 1):
        edges = tuple(n * i // count for i in range(count + 1))
        sizes = [Part((a, 0, 0), (b, 1, 1)).padded((n, 1, 1), box)[0] for a, b in pairwise(edges)]
        out.append(_Cuts(edges, sum(sizes), max(sizes)))
    return out


@dataclass(frozen=True)
class Maps:
    """What the search of a volume finds, each (z, y, x) like the volume.

    Attributes:
        best: highest score of the template; which: number of its rotation.
        decoys: highest score of the decoys; squares: mean of their squared scores.
    """

    best: NDArray[np.float32]
    which: NDArray[np.int32]
    decoys: NDArray[np.float32]
    squares: NDArray[np.float32]

    @staticmethod
    def empty(shape: Sequence[int]) -> Maps:
        """In memory."""
        score, decoys, squares = (np.zeros(shape, np.float32) for _ in range(3))
        return Maps(score, np.zeros(shape, np.int32), decoys, squares)

    def put(self, part: Part, own: Found, theirs: Found) -> None:
        """Write a part."""
        at = tuple(slice(a, b) for a, b in zip(part.low, part.high, strict=True))
        assert own.which is not None and theirs.squares is not None
        for array, found in (
            (self.best, own.best),
            (self.which, own.which),
            (self.decoys, theirs.best),
            (self.squares, theirs.squares),
        ):
            array[at] = found.numpy()


@dataclass(frozen=True)
class Search:
    """One template's search, the same for all parts: its rotations and norms, and those of the decoys."""

    template: Template
    step: float
    rotations: Tensor
    norms: Tensor
    decoys: tuple[tuple[Template, Tensor, Tensor], ...]

    @staticmethod
    def of(template: Template, diameter: float, sensitivity: Sensitivity, wanted: Wanted) -> Search:
        """Everything that doesn't depend on the part. The decoys have other phases in all shells."""
        rotations, step = wanted.rotations(template, diameter)
        generator = torch.Generator().manual_seed(wanted.seed)
        count = max(1, len(rotations) // (DECOY_SHARE * DECOY_SEEDS))
        decoys = []
        for k in range(DECOY_SEEDS):
            other = decoy(template, wanted.seed + 1000 + k, keep_shape=False)
            some = rotations[torch.randperm(len(rotations), generator=generator)[:count]]
            decoys.append((other, some, sensitivity.norms(other, some)))
        return Search(template, step, rotations, sensitivity.norms(template, rotations), tuple(decoys))

    @property
    def decoy_rotations(self) -> int:
        """Of all decoys together."""
        return sum(len(some) for _, some, _ in self.decoys)

    def part(
        self, volume: NDArray[Any], part: Part, device: torch.device | str, progress: Progress | None
    ) -> tuple[Found, Found]:
        """Search one part of a volume: for the template, and for its decoys."""
        cutoff = self.template.pixel_size / self.template.resolution
        correlator = Correlator(volume, part, self.template.box, device, cutoff)
        own = search(correlator, self.template, self.rotations, self.norms, progress=progress)
        found = [search(correlator, t, some, norms, spread=True) for t, some, norms in self.decoys]
        squares = torch.stack([f.squares for f in found if f.squares is not None]).mean(0)
        return own, Found(torch.stack([f.best for f in found]).amax(0), None, squares)


@dataclass(frozen=True)
class Picked:
    """What a search ends with.

    Attributes:
        candidates: refined, best z first, their places in voxels.
        z: (P,); kept: (P,) bool, the picks.
        others: (M,) z of the other local maxima of the search, but for those that the picks explain.
        background, threshold: the model of chance, and the z that is asked for.
        shape: of the candidates.
        apart: voxels that picks are apart at least.
    """

    candidates: Candidates
    z: Tensor
    kept: Tensor
    others: Tensor
    background: Background
    threshold: float
    shape: Shape
    apart: float


def pick(
    volume: NDArray[Any],
    maps: Maps,
    found: Search,
    sensitivity: Sensitivity,
    wanted: Wanted,
    allowed: Callable[[Tensor], Tensor],
    progress: Progress | None = None,
) -> Picked:
    """From score maps to picks.

    Args:
        volume: what was searched, (z, y, x).
        allowed: which of places (P, 3), voxels (x, y, z), may be picked: (P,) bool.
    """
    template, apart = found.template, wanted.apart(found.template)
    strength = local_strength(torch.from_numpy(np.asarray(maps.squares)), template.box)
    z, chance = torch.from_numpy(np.asarray(maps.best)) / strength, torch.from_numpy(np.asarray(maps.decoys)) / strength
    places, heights = find_peaks(chance, 0.0, apart)
    inside = allowed(places)
    share = float(inside.double().mean()) if len(inside) else 1.0
    if int(inside.sum()) >= FEW_MAXIMA:  # else what is elsewhere must do
        places, heights, share = places[inside], heights[inside], 1.0
    sites, peaks = find_peaks(z, 0.0, apart)
    may = allowed(sites)
    sites, peaks = sites[may], peaks[may]
    count = len(found.rotations), found.decoy_rotations

    def scale(at: Tensor) -> Tensor:
        top = torch.tensor(strength.shape[::-1]) - 1
        x, y, z = torch.minimum(at.round().long().clamp_min(0), top).unbind(1)
        return strength[z, y, x].double()

    # by decoys that are as high as most
    first = Background.of(heights[heights < 2 * float(heights.median())] if len(heights) else heights, *count, share)
    least = first.threshold(HOPEFUL * wanted.false)
    hopeful = torch.nonzero(peaks > least)[:MOST_CANDIDATES, 0]
    everywhere, sites, rotations = sites, sites[hopeful], found.rotations
    at = sites.round().long()
    which = torch.from_numpy(np.asarray(maps.which))[at[:, 2], at[:, 1], at[:, 0]].long()
    some = Candidates(sites, rotations[which], peaks[hopeful] * scale(sites))
    eye = each.Eye(template, sensitivity.weights(template))
    wide = each.widened(template)
    residual = each.Residual(volume, eye, each.Eye(wide, sensitivity.weights(wide)))
    taken, height = each.pursue(residual, some, least * scale(sites), rotations, found.step, apart, progress)
    z_taken = height / scale(taken.xyz)
    step = found.step * max(1.0, len(rotations) / SHAPE_ROTATIONS) ** (1 / 3)
    rough = rotation_grid(step, template.symmetry)
    shape = each.shape_test(residual, taken, rough, step, wanted.false, wanted.seed)
    # what stands out has been looked at, and its shape is the judge: chance is what decoys reach elsewhere
    reach = template.box / 2
    heights = heights[_away(places, taken.xyz[z_taken > first.threshold(wanted.false)], reach)]
    explained = taken.xyz[shape.passed]
    others = peaks[_away(everywhere, taken.xyz, apart) & _away(everywhere, explained, reach)]
    background = Background.of(heights, *count, share)
    threshold = background.threshold(wanted.false)
    order = z_taken.argsort(descending=True, stable=True)
    shape = shape[order]
    kept = (z_taken[order] > threshold) & shape.passed
    return Picked(taken[order], z_taken[order], kept, others, background, threshold, shape, apart)


def _away(places: Tensor, from_: Tensor, distance: float) -> Tensor:
    """Which of (P, 3) are further than that from all of (M, 3)."""
    if not len(places) or not len(from_):
        return torch.ones(len(places), dtype=torch.bool)
    nearest, _ = cKDTree(from_.numpy()).query(places.numpy(), distance_upper_bound=distance)
    return torch.from_numpy(~np.isfinite(nearest))


def compete(picked: Sequence[Picked]) -> list[tuple[Tensor, Tensor]]:
    """Let the picks of several templates in one volume compete: where two picks are too near, the higher score stays.

    Returns:
        For each template which of its candidates are picks still, (P,) bool, and by how much each one's score is above the
        highest of another template's candidates at that place, (P,); NaN where there's none.
    """
    out = []
    for i, own in enumerate(picked):
        margin = torch.full_like(own.candidates.score, math.nan, dtype=torch.float64)
        stays = own.kept.clone()
        for j, other in enumerate(picked):
            if i == j or not len(own.candidates) or not len(other.candidates):
                continue
            near = torch.cdist(own.candidates.xyz, other.candidates.xyz) < max(own.apart, other.apart)
            scores = torch.where(near, other.candidates.score.double()[None], -math.inf)
            gain = own.candidates.score.double() - scores.amax(1)
            margin = torch.where(torch.isfinite(gain), torch.fmin(margin, gain), margin)
            stays &= own.candidates.score.double() >= torch.where(other.kept, scores, -math.inf).amax(1)
        out.append((stays, margin))
    return out
