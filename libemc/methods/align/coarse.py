"""Coarse tilt-series alignment: from images and nominal angles alone to usable images, the tilt axis, and shifts to about a
percent of the field, each with a measure of trust.

The prediction of an image from others is the forward model for a slab, in two dimensions: every other image is turned
and stretched to the tilt in question, and a Fourier coefficient of it counts for as much as the two slices overlap
given the thickness (as in the filter of `reconstruct`); so it's the reprojection of the others' tomogram, without making
one. Correlations are divided by what chance would give at that shift, overlap included (after Padfield 2012, IEEE TIP
21:2706), and measured in standard deviations over all shifts: an image is placed only where it stands out, wherever in
the field that is, the surest first; then each is compared with all others again, and with those on either side alone.
The axis is first sought without any shifts: pairs of images agree best, at whatever shift, when one is stretched to
the other's tilt about the right axis; and by common lines. Candidates are compared by the whole alignment they give.
The height of the whole can't be seen: the slab is put at z = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.align import common_lines, screening
from libemc.methods.reconstruct import Grid, Weighting, prepare_images, reconstruct
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.filters import bandpass, normalise, taper_edges
from libemc.numerics.masks import cosine_edge
from libemc.numerics.peaks import highest_peak
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, TiltSeriesRecord

WORKING_SIZE = 192  # pixels of an image's longer side, about, that the correlation works with
AXIS_SIZE = 128  # the same for the search of the axis
COARSEST, FINEST = 0.25, 2.5  # band pass: fraction of the field, and pixels at the working size
TAPER = 0.08  # of an image's shorter side
OUTLIER = 3.5  # standard deviations at which pixels are cut off, twice: gold beads must not decide alone
SLAB = 1000.0  # Å: thickness assumed where none is known
SLABS = (400.0, 3000.0)  # Å: others to try, where that leaves images without a place
NEAR, MOST_NEAR = 24.0, 8  # degrees and number of images from which one is predicted at first
FAR, MOST_FAR = 40.0, 10  # the same in sweeps: the more, the less drifts
PADDING = 1.5  # of an image, where it may lie anywhere
WIDEST_SHIFT = 0.48  # of the field: how far from its neighbour an image may lie
LATER_RANGE = 0.05  # of the field: how far an image may move in a sweep
LEAST_OVERLAP = 0.25  # of what two images can have in common; less counts as so much
SURE, LIKELY = 7.0, 5.5  # standard deviations of a correlation above chance: placed first, and placed at all
CLEAR = 0.7  # standard deviations by which a place must be better than any other
BETTER = 1.5  # standard deviations by which another place must be better for an image to move there
DISAGREEMENT = 0.03  # of the field, between the sides' opinions, above which a tilt isn't trusted
SWEEPS = 2
LEAST_IMAGES = 3
PAIR_STRETCH = (0.93, 0.86)  # ratios of cosines of pairs by which the axis is sought
STRETCH_TOLERANCE = 0.06
MOST_PAIRS = 40
PAIR_RANGE, PAIR_OVERLAP = 0.45, 0.3  # of the field
AXIS_STEP, LINE_STEP, CANDIDATES_APART = 10.0, 3.0, 12.0  # degrees
LINES_ALONE = (
    0.85  # agreement of lines that only an object that lies whole in the field reaches: they know the axis best
)
AXIS_REACH = 3.0  # degrees about a candidate within which the whole alignment refines it
SLAB_DETAIL = 80.0  # Å: detail by which a slab is told from the empty space above and below


@dataclass(frozen=True)
class Images:
    """A tilt series as the correlation sees it.

    Attributes:
        pixels: (T, n, n) band-passed, tapered, mean 0 and deviation 1, zero beyond the image.
        window: (n, n) the taper, 0 beyond the image.
        pixel_size: Å.
        usable: (T,) bool: used, and not blank.
        reason: (T,) why an image that should have been used can't be, None for the others.
        copies: pairs of images that are the same; both are usable until one of them fits better.
    """

    pixels: Tensor
    window: Tensor
    pixel_size: float
    usable: Tensor
    reason: tuple[str | None, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def box(self) -> int:
        """n."""
        return int(self.pixels.shape[-1])

    @property
    def blank(self) -> list[int]:
        """Images that should have been used, but show nothing."""
        return [j for j, reason in enumerate(self.reason) if reason is not None]

    def smaller(self, size: int) -> Images:
        """The same at fewer pixels."""
        n = size + size % 2
        if n >= self.box:
            return self
        window = fourier.resize(self.window, (n, n)).clamp(0, 1)
        pixels = fourier.resize(self.pixels, (n, n))
        pixels = pixels / pixels.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-9)
        pixels = pixels * self.window.square().mean().sqrt()
        return Images(pixels, window, self.pixel_size * self.box / n, self.usable, self.reason, self.copies)


def _block_mean(image: NDArray[Any], binning: int) -> Tensor:
    """Means of blocks of binning² pixels, of which one begins at the origin: that is half a block off (see `prepare`)."""
    spans = [((n // 2) // binning, (n - n // 2) // binning) for n in image.shape]
    (y, y_end), (x, x_end) = spans
    top, left = image.shape[0] // 2 - y * binning, image.shape[1] // 2 - x * binning
    part = image[top : image.shape[0] // 2 + y_end * binning, left : image.shape[1] // 2 + x_end * binning]
    if binning == 1:
        return torch.from_numpy(np.array(part, dtype=np.float32))
    exact = np.float32 if part.dtype.kind == "f" else np.int64
    columns = part.reshape(len(part), x + x_end, binning).sum(2, dtype=exact)
    return torch.from_numpy((columns.reshape(y + y_end, binning, -1).sum(1) / binning**2).astype(np.float32))


def prepare(
    load: Callable[[int], NDArray[Any]],
    shape: Sequence[int],
    pixel_size: float,
    use: Sequence[bool],
    size: int = WORKING_SIZE,
    tilt: Sequence[float] | None = None,
) -> Images:
    """Bin, screen, filter and taper the used images.

    Args:
        load: gives image j (rows, columns) of any real type; binned ones spare time.
        shape: (T, rows, columns).
        pixel_size: Å, of the images that `load` gives.
        use: (T,) which of them to use.
        size: pixels, about, of the longer side after binning.
        tilt: degrees; with it dark images and copies are sought too.
    """
    count, rows, columns = shape
    binning = max(1, round(max(rows, columns) / size))
    small: list[Tensor | None] = [_block_mean(load(j), binning) if use[j] else None for j in range(count)]
    reason: list[str | None] = [None] * count
    for j, image in enumerate(small):
        if image is not None and screening.is_blank(image):
            reason[j], small[j] = "shows nothing", None
    copies: list[tuple[int, int]] = []
    if tilt is not None:
        for j in screening.dark_images(small, tilt):
            reason[j], small[j] = "dark", None
        copies = screening.copies(small)
    rows, columns = max((tuple(s.shape) for s in small if s is not None), default=(rows // binning, columns // binning))
    n = max(rows, columns) + max(rows, columns) % 2
    width = round(TAPER * min(rows, columns))
    edges = [
        cosine_edge((torch.arange(m) - m // 2).abs().float(), m / 2 - width, float(width)) for m in (rows, columns)
    ]
    window = edges[0][:, None] * edges[1]
    half = (
        -math.pi * (binning - 1) / binning
    )  # radians per cycle per pixel: back from the blocks' centres to the origin
    k_x, k_y = torch.arange(n // 2 + 1) / n, torch.fft.fftfreq(n)[:, None]
    pixels = torch.zeros(count, n, n)
    for j, image in enumerate(small):
        if image is not None:
            image = taper_edges(normalise(image), max(width // 4, 1))
            image = normalise(bandpass(image, 1.0, COARSEST * min(rows, columns), FINEST, edge=0.5))
            for _ in range(2):
                image = normalise(image.clamp(-OUTLIER, OUTLIER))
            pixels[j] = fourier.centre_pad(normalise(image, mask=window) * window, (n, n))
    turn = torch.polar(torch.ones(n, n // 2 + 1), half * (k_x + k_y))
    pixels = torch.fft.irfftn(torch.fft.rfftn(pixels, dim=(1, 2)) * turn, s=(n, n), dim=(1, 2))
    usable = torch.tensor([image is not None for image in small])
    return Images(
        pixels, fourier.centre_pad(window, (n, n)), pixel_size * binning, usable, tuple(reason), tuple(copies)
    )


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


def _warp(images: Tensor, index: Sequence[int], matrices: Tensor, moved: Tensor, canvas: int) -> Tensor:
    """Images at the points A·u + b (A: (B, 2, 2), b: (B, 2) px) for the u of a canvas, all from their origins: (B, m, m)."""
    out = np.empty((len(index), canvas, canvas), np.float32)
    _sample(images.numpy(), np.asarray(index), matrices.float().numpy(), moved.float().numpy(), out)
    return torch.from_numpy(out)


def nominal(record: TiltSeriesRecord, axis: float) -> Alignment:
    """What is known before any alignment: the stage's angles, one axis (degrees), no shifts."""
    return from_angles(record.tilts.nominal, axis)


def from_angles(tilt: Sequence[float], axis: float) -> Alignment:
    """An alignment of tilt angles and one axis (degrees), without shifts."""
    zeros = (0.0,) * len(tilt)
    return Alignment(axis=(axis,) * len(tilt), tilt=tuple(tilt), xtilt=zeros, shift_x=zeros, shift_y=zeros)


@dataclass(frozen=True)
class Look:
    """Where an image lies, compared with a prediction.

    Attributes:
        shift: (2,) px; deviations: of the correlation there above its median over all shifts; elsewhere: of the best at
            some other place; correlation: -1 to 1.
    """

    shift: Tensor
    deviations: float
    elsewhere: float
    correlation: float

    @property
    def clear(self) -> float:
        """`deviations`, unless another place is as good."""
        return self.deviations if self.deviations - self.elsewhere > CLEAR else min(self.deviations, LIKELY - 1)


@dataclass
class _Search:
    """The state of an alignment: shifts in pixels, and what doesn't change beside them."""

    images: Images
    tilt: Tensor
    matrices: Tensor
    slab: float
    shift: Tensor
    order: list[int]  # usable, by tilt
    deviations: dict[int, float] = field(default_factory=dict)  # of those that have a place
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

    @staticmethod
    def begin(images: Images, base: Alignment, slab: float) -> _Search:
        usable = [int(j) for j in torch.nonzero(images.usable)[:, 0]]
        if len(usable) < LEAST_IMAGES:
            what = f"{len(usable)} images can be used for alignment, at least {LEAST_IMAGES} are needed"
            raise InputError(what, None, "the others are excluded or blank")
        geometry = TiltGeometry.of(base, images.usable.tolist())
        tilt = torch.tensor(base.tilt, dtype=torch.float64)
        return _Search(
            images,
            tilt,
            geometry.matrices * geometry.magnification[:, None, None],
            slab / images.pixel_size,
            geometry.shift * geometry.magnification[:, None] / images.pixel_size,
            sorted(usable, key=lambda j: float(tilt[j])),
        )

    def near(self, j: int, candidates: Sequence[int], width: float, most: int) -> list[int]:
        """Those within `width` degrees, at most so many, nearest first and evenly; the nearest of all if there is none."""
        others = sorted((i for i in candidates if i != j), key=lambda i: abs(float(self.tilt[i] - self.tilt[j])))
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
        warped = _warp(self.images.pixels, index, to_others, self.shift[index] - to_others @ start, self.canvas)
        # how far apart along z the slices are, over the inverse thickness
        own, normal = self.matrices[tilt, :2], self.matrices[index, 2]
        apart = -(normal[:, :2] @ own[:, :2].T) / normal[:, 2:] - own[:, 2]
        apart = (apart * self.slab).float()[..., None, None]
        weight = (1 - (apart[:, 0] * self.k_x + apart[:, 1] * self.k_y).abs()).clamp_min(0)
        terms = torch.fft.rfftn(warped, dim=(1, 2)) * weight
        out = [terms.sum(0) / (weight.sum(0) + 1)]
        if len(groups) > 1:
            sizes = [len(group) for group in groups]
            pairs = zip(terms.split(sizes), weight.split(sizes), strict=True)
            out += [t.sum(0) / (w.sum(0) + 1) for t, w in pairs]
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
        inside = self.radius <= reach * n
        peak, height = highest_peak(significance.masked_fill(~(allowed & inside), float(chance.min())))
        moved = peak - m // 2
        elsewhere = allowed & ((self.away - moved).norm(dim=-1) > max(4.0, 0.04 * n))
        second = float(significance[elsewhere].max() - middle) / spread if bool(elsewhere.any()) else 0.0
        at = tuple(int(c) for c in (moved + m // 2).round().flip(0).clamp(0, m - 1))
        norm = self.images.pixels[tilt].norm() * energy[at].clamp_min(least).sqrt()
        correlation = float(product[at] / norm.clamp_min(1e-12))
        return Look(start + moved.double(), float(height - middle) / spread, second, correlation)

    def look(self, j: int, candidates: Sequence[int], start: Tensor, reach: float, first: bool) -> Look:
        """Compare image j with what those candidates that are near it in tilt say."""
        near = self.near(j, candidates, *((NEAR, MOST_NEAR) if first else (FAR, MOST_FAR)))
        if not near:
            return Look(start, 0.0, 0.0, 0.0)
        return self.compare(j, self.predict(j, [near], start)[0], start, reach)

    def grow(self, scores: dict[int, float]) -> None:
        """Place one image after the other, the surest first, wherever in the field; leaves out what finds no place.

        Args:
            scores: how well each image agrees with its neighbours: tells where to begin.
        """
        central = sorted(self.order, key=lambda j: abs(float(self.tilt[j])))[: max(LEAST_IMAGES, len(self.order) // 3)]
        first = max(central, key=lambda j: scores.get(j, 0.0) - abs(float(self.tilt[j])) / 15)
        self.deviations = {first: math.inf}
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
        return sum(min(d, 15.0) - 4.0 for d in self.deviations.values())

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
        images = self.images.smaller(AXIS_SIZE)
        n, count, scale = images.box, len(known), self.images.box / images.box
        g = TiltGeometry(
            self.matrices[known], self.shift[known] / scale, torch.ones(count).double(), torch.ones(count).bool()
        )
        filtered = np.empty((count, n, n), np.float32)
        weighting = Weighting(thickness=n / 2, lowpass=SLAB_DETAIL / images.pixel_size)
        for _ in prepare_images(lambda j: images.pixels[known[j]].numpy(), g, 1, 1.0, weighting, filtered):
            pass
        depth = 2 * (n // 3)
        core = slice(n // 5, n - n // 5)
        rows = [
            slab[:, max(core.start - y, 0) : max(core.stop - y, 0), core]
            for y, slab in reconstruct(filtered, g, Grid((depth, n, n), 1.0))
        ]
        detail = np.concatenate(rows, axis=1)
        limit = 3 * 1.4826 * float(np.median(np.abs(detail)))  # gold must not decide alone
        profile = np.square(np.clip(detail, -limit, limit)).mean((1, 2))
        empty = np.median(np.sort(profile)[: depth // 4])
        full = np.cumsum(np.clip(profile - 1.3 * empty, 0, None))
        if not full[-1] > 0:
            return 0.0, self.slab
        low, high = np.interp([0.05 * full[-1], 0.95 * full[-1]], full, np.arange(depth) - depth // 2)
        return float(low + high) / 2 * scale, float(high - low) / 0.9 * scale


class _Pairs:
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
        self.stretched = self._stretched()
        self.known: dict[float, float] = {}

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
        warped = _warp(self.images.pixels, low, relative, torch.zeros(len(low), 2), m)
        product = self.spectra[high] * torch.fft.rfftn(warped, dim=(1, 2)).conj()
        roll = 2 * (m // 2) - n // 2
        maps = torch.roll(torch.fft.irfftn(product, s=(m, m), dim=(1, 2)), (roll, roll), (1, 2)) / self.chance
        values = maps[:, self.allowed]
        return values.amax(1) / (1.4826 * values.abs().median(1).values).clamp_min(1e-9)

    def neighbours(self, axis: float) -> dict[int, float]:
        """Mean agreement of each image with the next on either side."""
        pairs = list(zip(self.order[:-1], self.order[1:], strict=True))
        total = dict.fromkeys(self.order, 0.0)
        for (i, j), value in zip(pairs, self.deviations(pairs, axis).tolist(), strict=True):
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
        bend = left + right - 2 * middle
        return best + (0.0 if bend >= 0 else step / 4 * float(np.clip((left - right) / (2 * bend), -0.5, 0.5)))

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


def _by_lines(images: Images, tilt: Sequence[float], axis: float) -> float | None:
    """The axis near one by common lines alone, where they agree so well that they know it best."""
    order = sorted((int(j) for j in torch.nonzero(images.usable)[:, 0]), key=lambda j: tilt[j])
    near = axis + np.arange(-6.0, 7.0)
    scores = common_lines.agreement(images.pixels[order], near.tolist()).numpy()
    best = int(np.clip(scores.argmax(), 1, len(near) - 2))
    if scores[best] < LINES_ALONE:
        return None
    left, middle, right = scores[best - 1 : best + 2]
    bend = float(left + right - 2 * middle)
    return float(near[best]) + (0.0 if bend >= 0 else float(np.clip((left - right) / (2 * bend), -0.5, 0.5)))


def align(images: Images, base: Alignment, first_pass: bool, sweeps: int = SWEEPS) -> Alignment:
    """Find the shifts of a tilt series; its angles are taken as they are.

    Args:
        images: of `prepare`.
        base: where to begin.
        first_pass: begin without the shifts of `base`, place one image after the other, and measure the slab's height and
            thickness at the end; else improve the shifts there are.
        sweeps: over all tilts, each against all others.

    Returns:
        `base` with new shifts; `residual`: Å, half the distance between what the neighbours in tilt on either side say
        (None where there are none); `loss`: 1 - mean correlation with the predictions, after each pass.

    Raises:
        InputError: too few images can be used.
    """
    search = _Search.begin(images, base, base.thickness or SLAB)
    if first_pass:
        search = _place(images, base, _Pairs(images, base.tilt), base.thickness)
    else:
        search.deviations = dict.fromkeys(search.order, 0.0)
    loss = [search.sweep() for _ in range(sweeps)]
    thickness = base.thickness
    if first_pass:
        thickness = _level(search)
    residual = (search.sides()[0] * images.pixel_size).tolist()
    magnification = torch.tensor(base.magnification or (1.0,), dtype=torch.float64)
    shift = search.shift * images.pixel_size / magnification[:, None]
    found = {
        "shift_x": tuple(shift[:, 0].tolist()),
        "shift_y": tuple(shift[:, 1].tolist()),
        "residual": tuple(None if math.isnan(r) else r for r in residual),
        "thickness": thickness,
        "landmarks": None,
        "loss": tuple(loss),
    }
    return base.model_copy(update=found)


def _place(images: Images, base: Alignment, pairs: _Pairs, thickness: float | None) -> _Search:
    """Place all images, with other thicknesses too where some don't find a place."""
    best = None
    axis = float(base.axis[pairs.order[0]])
    scores = pairs.neighbours(axis)
    for slab in (thickness,) if thickness else (SLAB, *SLABS):
        search = _Search.begin(images, base, slab)
        search.shift = torch.zeros_like(search.shift)
        search.grow(scores)
        if best is None or search.strength() > best.strength():
            best = search
        weak = len(search.placed) < 0.95 * len(search.order) or np.median(list(search.deviations.values())) < SURE
        if slab == SLAB and not weak:
            break
    assert best is not None
    return best


def _level(search: _Search) -> float:
    """Give all images shifts, with the slab at z = 0; its thickness, Å."""
    search.fill()
    middle, height = search.slab_heights()
    search.shift += search.matrices[:, :2, 2] * middle
    return height * search.images.pixel_size


def find_axis(images: Images, record: TiltSeriesRecord) -> float:
    """The direction of the tilt axis in [-90, 90) degrees with which the images agree best.

    The images can't tell it from its opposite, with which the specimen is mirrored.

    Args:
        images: of `prepare`, small ones (`AXIS_SIZE`): all directions are tried.
    """
    pairs = _Pairs(images, record.tilts.nominal)
    axis = pairs.refine(pairs.candidates()[0], AXIS_STEP)
    return (axis + 90) % 180 - 90


@dataclass(frozen=True)
class Start:
    """What the coarse stage found; T images.

    Attributes:
        axis: degrees; only up to 180 where `hand_open`.
        shift: (T, 2) Å, with the specimen's middle at z = 0.
        use: (T,) bool; reason: (T,) why an image isn't used, None for those that are.
        quality: (T,) standard deviations by which each image's agreement with the others is above chance; 0 if unused.
        residual: (T,) Å, half the distance between what the neighbours in tilt on either side say, nan where there are none.
        thickness: Å, of the specimen, roughly.
        hand_open: the axis wasn't given.
    """

    axis: float
    shift: NDArray[np.float64]
    use: NDArray[np.bool_]
    reason: tuple[str | None, ...]
    quality: NDArray[np.float64]
    residual: NDArray[np.float64]
    thickness: float
    hand_open: bool


def _derived(search: _Search, axis: float, images: Images, padding: float = 1.0) -> _Search:
    """The same series at the same shifts, about an axis, at another sampling."""
    scale = images.box / search.images.box
    matrices = tilt_matrices(torch.full_like(search.tilt, axis), search.tilt, 0.0)
    state = search.slab * scale, search.shift * scale, list(search.order), dict(search.deviations)
    return _Search(images, search.tilt, matrices, *state, padding)


def _refined(search: _Search, axis: float) -> tuple[_Search, float]:
    """Sweep small images with the axis turned a little either way: the state with the best axis, and that."""
    small = search.images.smaller(AXIS_SIZE)
    turned: dict[float, _Search] = {}
    loss: dict[float, float] = {}

    def nearest(a: float) -> _Search:
        return min(turned.items(), key=lambda t: abs(t[0] - a))[1] if turned else search

    def at(a: float) -> float:
        if a not in loss:
            turned[a] = _derived(nearest(a), a, small)
            loss[a] = turned[a].sweep()
        return loss[a]

    best = min((axis, axis - AXIS_REACH, axis + AXIS_REACH), key=at)
    if best != axis:
        best = min((best, 2 * best - axis), key=at)
    left, middle, right = (at(best + AXIS_REACH * i) for i in (-1, 0, 1))
    bend = left + right - 2 * middle
    best += 0.0 if bend <= 0 else AXIS_REACH * float(np.clip((left - right) / (2 * bend), -0.5, 0.5))
    return _derived(nearest(best), best, search.images), best


def _drop_copies(search: _Search, reason: list[str | None]) -> None:
    """Of two images that are the same, keep the one at whose tilt the others expect it, if they do at all."""
    for i, j in search.images.copies:
        fits = {}
        for k in (i, j):
            others = [other for other in search.placed if other not in (i, j)]
            if others and k in search.order:
                start = search.shift[search.near(k, others, NEAR, 1)[0]]
                fits[k] = search.look(k, others, start, WIDEST_SHIFT, True).deviations
        if len(fits) == 2:
            worse, better = (i, j) if fits[i] < fits[j] else (j, i)
            # where neither fits clearly better, there is no telling which is at its place
            clear = fits[better] > LIKELY and fits[better] - fits[worse] > BETTER
            for k, other in ((worse, better),) if clear else ((i, j), (j, i)):
                search.deviations.pop(k, None)
                search.order.remove(k)
                reason[k] = f"a copy of image {other + 1}"


def start(
    load: Callable[[int], NDArray[Any]],
    shape: Sequence[int],
    pixel_size: float,
    nominal_tilt: Sequence[float],
    use: Sequence[bool],
    axis: float | None = None,
    order: Sequence[int] | None = None,
) -> Start:
    """Everything that images and nominal angles tell of a tilt series at low resolution.

    Args:
        load: gives image j (rows, columns) of any real type; binned ones (at least `WORKING_SIZE`) spare time.
        shape: (T, rows, columns) of what `load` gives; pixel_size: Å of that.
        nominal_tilt: (T,) degrees, in any order.
        use: (T,) images that the user wants.
        axis: degrees, where known; refined.
        order: (T,) when each image was taken, 0 is the first; of two copies the later is then left out.

    Raises:
        InputError: fewer than `LEAST_IMAGES` images can be used.
    """
    images = prepare(load, shape, pixel_size, use, tilt=nominal_tilt)
    reason: list[str | None] = [r if u else "excluded" for r, u in zip(images.reason, use, strict=True)]
    if order is not None:
        for i, j in images.copies:
            later = j if order[j] > order[i] else i
            if images.usable[later]:
                images.usable[later] = False
                reason[later] = f"a copy of image {(i if later == j else j) + 1}"
    pairs = _Pairs(images.smaller(AXIS_SIZE), nominal_tilt)
    _Search.begin(images, from_angles(nominal_tilt, 0.0), SLAB)  # enough images
    rough = pairs.candidates() if axis is None else [axis]
    alone = _by_lines(images, nominal_tilt, rough[0])
    candidates = (
        [alone] if alone is not None else [pairs.refine(a, AXIS_STEP) for a in rough] if axis is None else rough
    )
    best = None
    for candidate in candidates:
        search = _place(images, from_angles(nominal_tilt, candidate), pairs, None)
        if best is None or search.strength() > best[0].strength():
            best = search, candidate
    assert best is not None
    search, found = best
    if order is None:
        _drop_copies(search, reason)
    search = _derived(search, found, images, PADDING)
    search.sweep(everywhere=True)
    search, found = _refined(search, found) if alone is None else (_derived(search, found, images), found)
    for _ in range(SWEEPS):
        search.sweep()
    apart, quality = search.sides()
    limit = DISAGREEMENT * images.box
    for j in list(search.order):
        if j not in search.deviations:
            reason[j] = "nothing in it agrees with the others"
        elif quality[j] < LIKELY:
            reason[j] = (
                f"agrees with the others hardly more than by chance ({float(quality[j]):.1f} standard deviations)"
            )
        elif float(apart[j]) > limit and quality[j] < 2 * SURE:
            reason[j] = "its neighbours on either side disagree about where it lies"
        else:
            continue
        search.deviations.pop(j, None)
        search.order.remove(j)
    if len(search.placed) < LEAST_IMAGES:
        what = f"only {len(search.placed)} images agree with each other, at least {LEAST_IMAGES} are needed"
        raise InputError(what, None, "look at the images: is there anything in them that could be followed?")
    thickness = _level(search)
    used = np.array([r is None for r in reason])
    return Start(
        axis=(found + 90) % 180 - 90 if axis is None else found,
        shift=(search.shift * images.pixel_size).numpy(),
        use=used,
        reason=tuple(reason),
        quality=np.where(used, quality.numpy(), 0.0),
        residual=(apart * images.pixel_size).numpy(),
        thickness=thickness,
        hand_open=axis is None,
    )


def summary(alignment: Alignment) -> str:
    """Main figures in a few words."""
    known = [r for r in alignment.residual or () if r is not None]
    residual = f", median residual {np.median(known):.1f} Å" if known else ""
    return f"axis {np.median(alignment.axis):.1f}°{residual}"
