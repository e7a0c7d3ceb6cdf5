"""The direction of the tilt axis before any image has its place: pairs of images agree best, at whatever shift, when one
is stretched to the other's tilt about the right axis; and by common lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from libemc.methods.align import common_lines
from libemc.methods.align.images import Images
from libemc.methods.align.search import PADDING, Signal, highest_of, warp
from libemc.numerics import fourier
from libemc.numerics.peaks import vertex
from libemc.numerics.rotations import tilt_matrices

DETAILS = (60.0, 120.0, 240.0, 480.0)  # Å: what signals may be made of; one of them is chosen to begin with
PAIR_STRETCH = (0.93, 0.86)  # ratios of cosines of pairs by which the axis is sought
STRETCH_TOLERANCE = 0.06
MOST_PAIRS = 40
PAIR_RANGE, PAIR_OVERLAP = 0.45, 0.3  # of the field
AXIS_STEP, LINE_STEP, CANDIDATES_APART = 10.0, 3.0, 12.0  # degrees
# agreement of lines that only an object that lies whole in the field reaches: they know the axis best
LINES_ALONE = 0.85


class Pairs:
    """Pairs of images, one stretched to the tilt of the other: how well they agree, wherever they lie."""

    def __init__(self, images: Images, tilt: Sequence[float]) -> None:
        self.images, self.tilt = images, torch.tensor(list(tilt), dtype=torch.float64)
        self.order = sorted((int(j) for j in torch.nonzero(images.usable)[:, 0]), key=lambda j: tilt[j])
        n = images.box
        self.canvas = m = fourier.good_size(round(PADDING * n))
        pad = (0, m - n, 0, m - n)
        self.spectra = torch.fft.rfftn(F.pad(images.pixels, pad), dim=(1, 2))
        area = torch.fft.rfftn(F.pad(images.window**2, pad))
        overlap = torch.fft.fftshift(torch.fft.irfftn(area * area.conj(), s=(m, m)))
        u = (torch.arange(m) - m // 2).float()
        least = PAIR_OVERLAP * overlap.max()
        self.allowed = (overlap > least) & (torch.hypot(u, u[:, None]) < PAIR_RANGE * n)
        self.chance = overlap.clamp_min(least).sqrt()
        steps = zip(self.order[:-1], self.order[1:], strict=True)
        self.steps = [p for p in steps if p not in images.copies and p[::-1] not in images.copies]
        self.stretched = self._stretched()
        self.known: dict[float, float] = {}
        self.signal = self._signal()

    def _signal(self) -> Signal:
        """What neighbours in tilt have most clearly in common, wherever they lie."""
        steps = sorted(self.steps, key=lambda p: abs(float(self.tilt[p[0]] + self.tilt[p[1]])))[:MOST_PAIRS]
        signals = [Signal.of_detail(d, self.images.pixel_size) for d in DETAILS]
        share = float(self.allowed.float().mean())

        def clarity(signal: Signal) -> float:
            self.listen(signal)
            usual = highest_of(share * signal.independent(self.canvas, self.images.pixel_size))
            return float(self.deviations(steps, 0.0).mean()) - usual

        best = max(signals, key=clarity)
        self.listen(best)
        return best

    def listen(self, signal: Signal) -> None:
        """For a signal like this."""
        self.gain = signal.on(self.canvas, self.images.pixel_size)

    def _stretched(self) -> list[tuple[int, int]]:
        """Pairs (lower, higher tilt) whose cosines differ enough to tell the axis, and not too much to agree."""
        cosine = torch.cos(torch.deg2rad(self.tilt)).tolist()
        found = set()
        for j in self.order:
            a = float(self.tilt[j])
            same = [i for i in self.order if cosine[i] > cosine[j] and (a * float(self.tilt[i]) > 0 or abs(a) < 5)]
            for ratio in PAIR_STRETCH:
                close = [(abs(cosine[j] / cosine[i] - ratio), i) for i in same]
                if close and min(close)[0] < STRETCH_TOLERANCE:
                    found.add((min(close)[1], j))
        pairs = sorted(found)
        if len(pairs) > MOST_PAIRS:
            pairs = [pairs[k] for k in np.linspace(0, len(pairs) - 1, MOST_PAIRS).round().astype(int)]
        return pairs

    def deviations(self, pairs: Sequence[tuple[int, int]], axis: float) -> Tensor:
        """(P,) by how many standard deviations over all shifts each pair (i stretched to j) agrees at its best one."""
        m, n = self.canvas, self.images.box
        low, high = [i for i, _ in pairs], [j for _, j in pairs]
        plane = tilt_matrices(torch.full_like(self.tilt, axis), self.tilt, 0.0)[:, :2, :2]
        relative = plane[low] @ torch.linalg.inv(plane[high])
        warped = warp(self.images.pixels, low, relative, torch.zeros(len(low), 2), m)
        product = self.spectra[high] * torch.fft.rfftn(warped, dim=(1, 2)).conj() * self.gain
        roll = 2 * (m // 2) - n // 2
        maps = torch.roll(torch.fft.irfftn(product, s=(m, m), dim=(1, 2)), (roll, roll), (1, 2)) / self.chance
        values = maps[:, self.allowed]
        return values.amax(1) / (1.4826 * values.abs().median(1).values).clamp_min(1e-9)

    def neighbours(self, axis: float) -> dict[int, float]:
        """Mean agreement of each image with the next on either side."""
        total = dict.fromkeys(self.order, 0.0)
        for (i, j), value in zip(self.steps, self.deviations(self.steps, axis).tolist(), strict=True):
            total[i] += value / 2
            total[j] += value / 2
        return total

    def agreement(self, axis: float) -> float:
        """Mean over the stretched pairs; nothing to tell an axis by gives 0."""
        axis = (axis + 90) % 180 - 90
        if axis not in self.known:
            self.known[axis] = float(self.deviations(self.stretched, axis).mean()) if self.stretched else 0.0
        return self.known[axis]

    def refine(self, axis: float, step: float) -> float:
        """The best direction near one, by halving steps down to an eighth and a parabola."""
        best = axis
        for part in (2, 4):
            best = max((best - step / part, best, best + step / part), key=self.agreement)
        left, middle, right = (self.agreement(best + step / 4 * i) for i in (-1, 0, 1))
        return best + step / 4 * vertex(left, middle, right)

    def candidates(self) -> list[float]:
        """Directions of the axis in [-90, 90), the best first, at least `CANDIDATES_APART` from each other."""
        coarse = np.arange(-90.0, 90.0, AXIS_STEP)
        fine = np.arange(-90.0, 90.0, LINE_STEP)
        pairs = np.array([self.agreement(a) for a in coarse])
        lines = common_lines.agreement(self.images.pixels[self.order], fine.tolist()).numpy()
        if lines.max() > LINES_ALONE:
            return [float(fine[lines.argmax()])]
        # each above its own middle, in units of its height: what agrees in all directions alike says nothing
        pairs = (pairs - np.median(pairs)) / max(pairs.max(), 1e-9)
        lines = (lines - np.median(lines)) / max(lines.max(), 1e-9)
        both = np.interp(fine, np.append(coarse, 90.0), np.append(pairs, pairs[0])) + lines
        ranked = [float(fine[both.argmax()]), float(coarse[pairs.argmax()]), float(fine[lines.argmax()])]
        out: list[float] = []
        for axis in ranked:
            if all(abs((axis - known + 90) % 180 - 90) > CANDIDATES_APART for known in out):
                out.append(axis)
        return out


def by_lines(images: Images, tilt: Sequence[float], axis: float) -> float | None:
    """The axis near one by common lines alone, where they agree so well that they know it best."""
    order = sorted((int(j) for j in torch.nonzero(images.usable)[:, 0]), key=lambda j: tilt[j])
    near = axis + np.arange(-6.0, 7.0)
    scores = common_lines.agreement(images.pixels[order], near.tolist()).numpy()
    best = int(np.clip(scores.argmax(), 1, len(near) - 2))
    if scores[best] < LINES_ALONE:
        return None
    return float(near[best]) + vertex(*scores[best - 1 : best + 2].tolist())
