"""Where the images of a tilt series lie beside each other: each is placed by what the others say it looks like.

The prediction of an image from others is the forward model for a slab, in two dimensions: every other image is turned
and stretched to the tilt in question, and a Fourier coefficient of it counts for as much as the two slices overlap
given the thickness (as in the filter of `reconstruct`); so it's the reprojection of the others' tomogram, without making
one. Correlations are divided by what chance would give at that shift, overlap included (after Padfield 2012, IEEE TIP
21:2706), and measured in standard deviations over all shifts: an image is placed only where it stands out, wherever in
the field that is, the surest first; then each is compared with all others again, and with those on either side alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.align.images import FINEST, SMALL_SIZE, Images
from libemc.methods.reconstruct import Grid, Weighting, small_tomogram
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.peaks import highest_peak
from libemc.numerics.rotations import tilt_matrices

NEAR, MOST_NEAR = 24.0, 8  # degrees and number of images from which one is predicted at first
FAR, MOST_FAR = 40.0, 10  # the same in sweeps: the more, the less drifts
PADDING = 1.5  # of an image, where it may lie anywhere
WIDEST_SHIFT = 0.48  # of the field: how far from its neighbour an image may lie
LATER_RANGE = 0.05  # of the field: how far an image may move in a sweep
LEAST_OVERLAP = 0.25  # of what two images can have in common; less counts as so much
SURE, LIKELY = 2.6, 1.1  # standard deviations above the highest of chance: placed first, and placed at all
CLEAR = 0.7  # standard deviations by which a place must be better than any other
BETTER = 1.5  # standard deviations by which another place must be better for an image to move there
BEGINNINGS, BEGUN = 4, 0.5  # images to begin with that are tried, and the part of all that must find a place
FEWEST_FIRST = 3  # images about the lowest tilt, at least, one of which is placed first
RINGS = 24  # in which the signal is measured
SLAB_DETAIL = 80.0  # Å: detail by which a slab is told from the empty space above and below


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _sample(images, index, matrices, moved, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """out[k, y, x] = images[index[k]] at A·u + b, bilinear, zero beyond the image."""
    n, m = images.shape[-1], out.shape[-1]
    for k in range(len(index)):
        image, a = images[index[k]], matrices[k]
        for y in range(m):
            v = y - m // 2
            x0 = np.float32(a[0, 1] * v + moved[k, 0] + n // 2)
            y0 = np.float32(a[1, 1] * v + moved[k, 1] + n // 2)
            for x in range(m):
                u = x - m // 2
                p, q = x0 + a[0, 0] * u, y0 + a[1, 0] * u
                if p < 0 or q < 0 or p >= n - 1 or q >= n - 1:
                    out[k, y, x] = 0
                    continue
                i, j = int(p), int(q)
                f, g = p - i, q - j
                low = image[j, i] + f * (image[j, i + 1] - image[j, i])
                high = image[j + 1, i] + f * (image[j + 1, i + 1] - image[j + 1, i])
                out[k, y, x] = low + g * (high - low)


def warp(images: Tensor, index: Sequence[int], matrices: Tensor, moved: Tensor, canvas: int) -> Tensor:
    """Images at the points A·u + b (A: (B, 2, 2), b: (B, 2) px) for the u of a canvas, all from their origins: (B, m, m)."""
    out = np.empty((len(index), canvas, canvas), np.float32)
    _sample(images.numpy(), np.asarray(index), matrices.float().numpy(), moved.float().numpy(), out)
    return torch.from_numpy(out)


def highest_of(count: float) -> float:
    """Standard deviations that the highest of so many values exceeds by chance, about."""
    return math.sqrt(2 * math.log(max(count, 3.0)))


@dataclass(frozen=True)
class Look:
    """Where an image lies, compared with a prediction.

    Attributes:
        shift: (2,) px; deviations: of the correlation there over all shifts, above the highest that chance gives;
            elsewhere: of the best at some other place; correlation: -1 to 1.
    """

    shift: Tensor
    deviations: float
    elsewhere: float
    correlation: float

    @property
    def clear(self) -> float:
        """`deviations`, unless another place is as good."""
        return self.deviations if self.deviations - self.elsewhere > CLEAR else min(self.deviations, LIKELY - 1)


@dataclass(frozen=True)
class Signal:
    """How strong the signal is, frequency by frequency, over a prediction of it from other images.

    Attributes:
        frequency: (R,) cycles/Å, rising; gain: (R,).
    """

    frequency: NDArray[np.float64]
    gain: NDArray[np.float64]

    @staticmethod
    def of_detail(detail: float, pixel_size: float) -> Signal:
        """Falling to half at a period of `detail` Å."""
        frequency = np.arange(4 * RINGS) / (4 * RINGS * pixel_size)
        return Signal(frequency, 1 / (1 + (frequency * detail) ** 2))

    def on(self, size: int, pixel_size: float) -> Tensor:
        """(m, m//2+1), rfft layout of images of `size` pixels."""
        k = torch.hypot(torch.arange(size // 2 + 1) / size, torch.fft.fftfreq(size)[:, None]) / pixel_size
        return torch.from_numpy(np.interp(k.numpy(), self.frequency, self.gain)).float()

    def independent(self, size: int, pixel_size: float) -> float:
        """How many independent values a map of `size` squared pixels has, that is filtered by it."""
        gain = self.on(size, pixel_size)
        k_x, k_y = torch.arange(size // 2 + 1) / size, torch.fft.fftfreq(size)[:, None]
        power = gain.square() * (torch.hypot(k_x, k_y) <= 1 / FINEST)
        return 2 * float(power.sum() ** 2 / power.square().sum())


@dataclass
class Search:
    """The state of an alignment.

    Attributes:
        tilt: (T,) degrees; matrices: (T, 3, 3).
        slab: px, thickness that predictions reckon with.
        shift: (T, 2) px.
        order: usable images, by tilt.
        deviations: of those that have a place, above chance.
        padding: of an image's side, where others may lie.
    """

    images: Images
    tilt: Tensor
    matrices: Tensor
    slab: float
    shift: Tensor
    order: list[int]
    signal: Signal
    deviations: dict[int, float] = field(default_factory=dict)
    padding: float = PADDING

    def __post_init__(self) -> None:
        n = self.images.box
        self.canvas = m = fourier.good_size(round(self.padding * n))
        pad = (0, m - n, 0, m - n)
        self.spectra = torch.fft.rfftn(F.pad(self.images.pixels, pad), dim=(1, 2))
        self.area = torch.fft.rfftn(F.pad(self.images.window**2, pad))
        self.k_x, self.k_y = torch.arange(m // 2 + 1) / m, torch.fft.fftfreq(m)[:, None]
        u = (torch.arange(m) - m // 2).float()
        self.away = torch.stack(torch.broadcast_tensors(u, u[:, None]), dim=-1)
        self.radius = self.away.norm(dim=-1)
        self.listen(self.signal)

    def listen(self, signal: Signal) -> None:
        """For a signal like this."""
        self.signal = signal
        self.gain = signal.on(self.canvas, self.images.pixel_size)
        self.independent = signal.independent(self.canvas, self.images.pixel_size)

    def measure_signal(self) -> None:
        """Listen for the signal that the images have in common, as they lie."""
        m, n = self.canvas, self.images.box
        middle = torch.polar(torch.ones(()), 2 * math.pi * (n // 2 - m // 2) * (self.k_x + self.k_y))
        ring = (torch.hypot(self.k_x, self.k_y) * 2 * RINGS).long().flatten()
        cross, power, noise = (torch.zeros(int(ring.max()) + 1).double() for _ in range(3))
        heard, self.gain = self.gain, torch.ones_like(self.gain)
        for j in self.placed:
            near = self.near(j, self.placed, NEAR, MOST_NEAR)
            if not near:
                continue
            prediction = self.predict(j, [near], self.shift[j])[0]
            product = (self.spectra[j] * prediction.conj() * middle).real
            cross.index_add_(0, ring, product.flatten().double())
            power.index_add_(0, ring, prediction.abs().square().flatten().double())
            noise.index_add_(0, ring, (self.spectra[j].abs() * prediction.abs()).square().flatten().double())
        self.gain = heard
        if not power.any():
            return
        sure = cross.square() / (cross.square() + noise).clamp_min(1e-12)
        gain = ((cross / power.clamp_min(1e-12)).clamp_min(0) * sure)[: int(2 * RINGS / FINEST)].numpy()
        if gain.any():
            frequency = (np.arange(len(gain)) + 0.5) / (2 * RINGS * self.images.pixel_size)
            self.listen(Signal(frequency.astype(np.float64), gain / gain.max()))

    @staticmethod
    def begin(images: Images, tilt: Sequence[float], axis: float, slab: float, signal: Signal) -> Search:
        """At the beginning: no image has a place. Tilts and axis in degrees, thickness in Å."""
        usable = [int(j) for j in torch.nonzero(images.usable)[:, 0]]
        angle = torch.tensor(tilt, dtype=torch.float64)
        return Search(
            images,
            angle,
            tilt_matrices(torch.full_like(angle, axis), angle, 0.0),
            slab / images.pixel_size,
            torch.zeros(len(angle), 2, dtype=torch.float64),
            sorted(usable, key=lambda j: float(angle[j])),
            signal,
        )

    def derived(self, axis: float, images: Images, padding: float = 1.0) -> Search:
        """The same series at the same shifts, about an axis, at another sampling."""
        scale = images.box / self.images.box
        matrices = tilt_matrices(torch.full_like(self.tilt, axis), self.tilt, 0.0)
        state = self.slab * scale, self.shift * scale, list(self.order), self.signal, dict(self.deviations)
        return Search(images, self.tilt, matrices, *state, padding)

    def near(self, j: int, candidates: Sequence[int], width: float, most: int) -> list[int]:
        """Those within `width` degrees, at most so many, nearest first and evenly; the nearest of all if there is none."""
        same = {j} | {i for pair in self.images.copies if j in pair for i in pair}
        others = sorted((i for i in candidates if i not in same), key=lambda i: abs(float(self.tilt[i] - self.tilt[j])))
        inside = [i for i in others if abs(float(self.tilt[i] - self.tilt[j])) <= width] or others[:1]
        if len(inside) > most:
            close = inside[: most // 2]
            rest = inside[most // 2 :]
            spread = np.linspace(0, len(rest) - 1, most - len(close)).round().astype(int)
            inside = close + [rest[k] for k in spread]
        return inside

    def predict(self, tilt: int, groups: Sequence[Sequence[int]], start: Tensor) -> list[Tensor]:
        """What groups of others, and all of them, say that an image with the shift `start` (px) looks like.

        Returns:
            Spectra (m, m//2+1) complex, rfft layout of the canvas, its pixel m//2 being the image's origin: of all others
            first, then, if there are several groups, of each.
        """
        index = [i for group in groups for i in group]
        plane = self.matrices[:, :2, :2]
        to_others = plane[index] @ torch.linalg.inv(plane[tilt])
        warped = warp(self.images.pixels, index, to_others, self.shift[index] - to_others @ start, self.canvas)
        # how far apart along z the slices are, over the inverse thickness
        own, normal = self.matrices[tilt, :2], self.matrices[index, 2]
        apart = -(normal[:, :2] @ own[:, :2].T) / normal[:, 2:] - own[:, 2]
        apart = (apart * self.slab).float()[..., None, None]
        weight = (1 - (apart[:, 0] * self.k_x + apart[:, 1] * self.k_y).abs()).clamp_min(0)
        terms = torch.fft.rfftn(warped, dim=(1, 2)) * weight
        out = [self.gain * terms.sum(0) / (weight.sum(0) + 1)]
        if len(groups) > 1:
            sizes = [len(group) for group in groups]
            pairs = zip(terms.split(sizes), weight.split(sizes), strict=True)
            out += [self.gain * t.sum(0) / (w.sum(0) + 1) for t, w in pairs]
        return out

    def compare(self, tilt: int, prediction: Tensor, start: Tensor, reach: float) -> Look:
        """Where an image lies, within `reach` (of the field) of `start` (px), for which the prediction was made."""
        n, m = self.images.box, self.canvas
        expected = torch.fft.irfftn(prediction, s=(m, m))
        product = torch.fft.irfftn(self.spectra[tilt] * prediction.conj(), s=(m, m))
        energy = torch.fft.irfftn(self.area * torch.fft.rfftn(expected.square()).conj(), s=(m, m))
        roll = 2 * (m // 2) - n // 2  # the image's origin lies at n // 2, the prediction's and the map's at m // 2
        product, energy = torch.roll(product, (roll, roll), (0, 1)), torch.roll(energy, (roll, roll), (0, 1))
        least = (LEAST_OVERLAP * energy.max()).clamp_min(1e-12)
        significance = product / energy.clamp_min(least).sqrt()
        allowed = (energy > least) & (self.radius <= WIDEST_SHIFT * n)
        chance = significance[allowed]
        if len(chance) < 2:
            return Look(start, 0.0, 0.0, 0.0)
        middle = chance.median()
        spread = float(1.4826 * (chance - middle).abs().median()) + 1e-9
        usual = highest_of(self.independent * len(chance) / m**2)
        inside = self.radius <= reach * n
        peak, height = highest_peak(significance.masked_fill(~(allowed & inside), float(chance.min())))
        moved = peak - m // 2
        elsewhere = allowed & ((self.away - moved).norm(dim=-1) > max(4.0, 0.04 * n))
        second = float(significance[elsewhere].max() - middle) / spread - usual if bool(elsewhere.any()) else -usual
        at = tuple(int(c) for c in (moved + m // 2).round().flip(0).clamp(0, m - 1))
        norm = self.images.pixels[tilt].norm() * energy[at].clamp_min(least).sqrt()
        correlation = float(product[at] / norm.clamp_min(1e-12))
        return Look(start + moved.double(), float(height - middle) / spread - usual, second, correlation)

    def look(self, j: int, candidates: Sequence[int], start: Tensor) -> Look:
        """Compare image j, about where it lies, with what those candidates that are near it in tilt say."""
        near = self.near(j, candidates, NEAR, MOST_NEAR)
        return self.compare(j, self.predict(j, [near], start)[0], start, LATER_RANGE)

    def grow(self, scores: dict[int, float]) -> None:
        """Place one image after the other, the surest first, wherever in the field; leaves out what finds no place.

        Args:
            scores: how well each image agrees with its neighbours: tells where to begin.
        """
        central = sorted(self.order, key=lambda j: abs(float(self.tilt[j])))[: max(FEWEST_FIRST, len(self.order) // 3)]
        central.sort(key=lambda j: abs(float(self.tilt[j])) / 15 - scores.get(j, 0.0))
        begun = self.shift.clone()
        best: tuple[float, dict[int, float], Tensor] = -math.inf, {}, begun
        for first in central[:BEGINNINGS]:
            self.shift, self.deviations = begun.clone(), {first: math.inf}
            self.extend()
            if self.strength() > best[0]:
                best = self.strength(), self.deviations, self.shift
            if len(self.placed) >= BEGUN * len(self.order):
                break
        _, self.deviations, self.shift = best

    def extend(self) -> None:
        """Place what has no place yet beside what has, the surest first, wherever in the field."""
        place = {j: k for k, j in enumerate(self.order)}
        tried: dict[int, tuple[list[int], Look]] = {}
        for limit in (SURE, LIKELY):
            found = True
            while found:
                found = False
                gaps = {
                    j: min(abs(place[j] - place[i]) for i in self.deviations)
                    for j in self.order
                    if j not in self.deviations
                }
                for j in sorted(gaps, key=lambda j: (gaps[j], abs(float(self.tilt[j])))):
                    if gaps[j] > 4:
                        break
                    near = self.near(j, list(self.deviations), NEAR, MOST_NEAR)
                    if not near:
                        continue
                    if j not in tried or tried[j][0] != near:
                        look = self.compare(
                            j, self.predict(j, [near], self.shift[near[0]])[0], self.shift[near[0]], WIDEST_SHIFT
                        )
                        tried[j] = near, look
                    if tried[j][1].clear >= limit:
                        self.shift[j], self.deviations[j] = tried[j][1].shift, tried[j][1].deviations
                        found = True
                        break

    @property
    def placed(self) -> list[int]:
        """Images that have a place, by tilt."""
        return [j for j in self.order if j in self.deviations]

    def sweep(self, everywhere: bool = False) -> float:
        """Place every image again by all the others; gives the loss. The lowest tilt stays where it is.

        Args:
            everywhere: look at the whole field, and let an image go where it fits far better.
        """
        scores = []
        lowest = min(self.placed, key=lambda j: abs(float(self.tilt[j])))
        for j in self.order if everywhere else self.placed:
            others = [i for i in self.placed if i != j]
            if j == lowest or not others:
                continue
            start = self.shift[j] if j in self.deviations else self.shift[self.near(j, others, NEAR, 1)[0]]
            near = self.near(j, others, FAR, MOST_FAR)
            prediction = self.predict(j, [near], start)[0]
            look = self.compare(j, prediction, start, LATER_RANGE if j in self.deviations else WIDEST_SHIFT)
            if j not in self.deviations:
                if look.clear < LIKELY:
                    continue
            elif everywhere and look.elsewhere > look.deviations + BETTER:
                look = self.compare(j, prediction, start, WIDEST_SHIFT)
            self.shift[j], self.deviations[j] = look.shift, look.deviations
            scores.append(look.correlation)
        return 1 - float(np.mean(scores)) if scores else 1.0

    def strength(self) -> float:
        """How well all is explained: deviations above chance, so limited that no image decides alone."""
        return sum(min(d, 10.0) for d in self.deviations.values())

    def sides(self) -> tuple[Tensor, Tensor]:
        """What the neighbours in tilt on either side say of each image.

        Returns:
            (T,) px: half the distance between the shifts by the two sides, nan where there is one only; and (T,) deviations
            above chance by all others.
        """
        apart = torch.full((len(self.tilt),), float("nan"), dtype=torch.float64)
        quality = torch.zeros(len(self.tilt), dtype=torch.float64)
        for j in self.placed:
            near = self.near(j, self.placed, FAR, MOST_FAR)
            groups = [[i for i in near if sign * float(self.tilt[i] - self.tilt[j]) > 0] for sign in (-1, 1)]
            groups = [group for group in groups if group]
            if not groups:
                continue
            looks = [self.compare(j, p, self.shift[j], LATER_RANGE) for p in self.predict(j, groups, self.shift[j])]
            quality[j] = looks[0].deviations
            if len(groups) == 2:
                apart[j] = (looks[1].shift - looks[2].shift).norm() / 2
        return apart, quality

    def fill(self) -> None:
        """Images without a place get the shifts between those of their neighbours in tilt."""
        known = self.placed
        for axis in range(2):
            values = np.interp(self.tilt.numpy(), self.tilt[known].numpy(), self.shift[known, axis].numpy())
            missing = torch.ones(len(self.tilt), dtype=torch.bool)
            missing[known] = False
            self.shift[missing, axis] = torch.from_numpy(values)[missing]

    def slab_heights(self) -> tuple[float, float]:
        """Middle and thickness, px, of what is in a coarse tomogram: where its detail is above that of the empty parts."""
        known = self.placed
        images = self.images.smaller(SMALL_SIZE)
        n, count, scale = images.box, len(known), self.images.box / images.box
        g = TiltGeometry(
            self.matrices[known], self.shift[known] / scale, torch.ones(count).double(), torch.ones(count).bool()
        )
        weighting = Weighting(thickness=n / 2, lowpass=SLAB_DETAIL / images.pixel_size)
        depth = 2 * (n // 3)
        core = slice(n // 5, n - n // 5)
        volume = small_tomogram(images.pixels[known].numpy(), g, Grid((depth, n, n), 1.0), weighting)
        detail = volume[:, core, core]
        limit = 3 * 1.4826 * float(np.median(np.abs(detail)))  # gold must not decide alone
        profile = np.square(np.clip(detail, -limit, limit)).mean((1, 2))
        empty = np.median(np.sort(profile)[: depth // 4])
        full = np.cumsum(np.clip(profile - 1.3 * empty, 0, None))
        if not full[-1] > 0:
            return 0.0, self.slab
        low, high = np.interp([0.05 * full[-1], 0.95 * full[-1]], full, np.arange(depth) - depth // 2)
        return float(low + high) / 2 * scale, float(high - low) / 0.9 * scale
