"""Coarse tilt-series alignment without markers: each image against what its neighbours say it should look like.

The prediction of an image from others is the forward model for a slab, in two dimensions: every other image is turned
and stretched to the tilt in question, and a Fourier coefficient of it counts for as much as the two slices overlap
given the thickness (as in the filter of `reconstruct`); so it's the reprojection of the others' tomogram, without making
one. From the lowest tilt outward each image is shifted to the prediction of all that are aligned already, then, in
sweeps, to that of all others on both sides. The height of the whole can't be seen: the slab is put at z = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.reconstruct import Grid, Weighting, bin_image, prepare_images, reconstruct
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.filters import bandpass, normalise, taper_edges
from libemc.numerics.masks import cosine_edge
from libemc.numerics.peaks import highest_peak
from libemc.records import Alignment, TiltSeriesRecord

WORKING_SIZE = 256  # pixels of an image's longer side, about, that the correlation works with
COARSEST, FINEST = 0.2, 4.0  # band pass: fraction of the field, and pixels at the working size
TAPER = 0.1  # of an image's shorter side
SLAB = 1000.0  # Å: thickness assumed where none is known
WIDEST = 30.0  # degrees: tilts farther from each other share next to nothing
FIRST_RANGE, LATER_RANGE = 0.25, 0.05  # of the field: how far an image may be off, in the first pass and then
SWEEPS = 2
LEAST_IMAGES = 3
OUTLIER = 5.0  # standard deviations at which pixels are cut off: gold beads must not decide alone
LEAST_SIGNAL = 1e-6  # spread of an image over its mean, below which it is blank
AXIS_SIZE = 128  # pixels of an image's longer side, at most, for the search of the axis
AXIS_STEPS = (10.0, 3.0, 1.0)  # degrees
SLAB_DETAIL = 80.0  # Å: detail by which a slab is told from the empty space above and below


@dataclass(frozen=True)
class Images:
    """A tilt series as the correlation sees it.

    Attributes:
        pixels: (T, n, n) band-passed, tapered, mean 0 and deviation 1, zero beyond the image.
        pixel_size: Å.
        usable: (T,) bool: used, and not blank.
        blank: those that should have been used, but show nothing.
    """

    pixels: Tensor
    pixel_size: float
    usable: Tensor
    blank: list[int]

    @property
    def box(self) -> int:
        """n."""
        return int(self.pixels.shape[-1])


def prepare(
    load: Callable[[int], NDArray[Any]],
    shape: Sequence[int],
    pixel_size: float,
    use: Sequence[bool],
    size: int = WORKING_SIZE,
) -> Images:
    """Bin, filter and taper the used images.

    Args:
        load: gives image j (rows, columns) of any real type.
        shape: (T, rows, columns).
        pixel_size: Å, of the raw images.
        use: (T,) which of them to use.
        size: pixels, at most, of the longer side after binning.
    """
    count, rows, columns = shape
    binning = max(1, math.ceil(max(rows, columns) / size))
    rows, columns = rows // binning, columns // binning
    n = fourier.good_size(max(rows, columns))
    width = round(TAPER * min(rows, columns))
    edges = [
        cosine_edge((torch.arange(m) - m // 2).abs().float(), m / 2 - width, float(width)) for m in (rows, columns)
    ]
    window = edges[0][:, None] * edges[1]
    pixels, usable = torch.zeros(count, n, n), torch.tensor(list(use))
    blank = []
    for j in range(count):
        if not use[j]:
            continue
        image = bin_image(torch.from_numpy(np.array(load(j), dtype=np.float32)), binning)
        if not bool(image.std() > LEAST_SIGNAL * image.abs().mean()):  # not finite counts as blank too
            usable[j] = False
            blank.append(j)
            continue
        image = taper_edges(normalise(image), max(width // 4, 1))
        image = normalise(bandpass(image, 1.0, COARSEST * min(rows, columns), FINEST, edge=0.5))
        image = normalise(image.clamp(-OUTLIER, OUTLIER)) * window
        pixels[j] = fourier.centre_pad(image, (n, n))
    return Images(pixels, pixel_size * binning, usable, blank)


def predict(images: Images, matrices: Tensor, shift: Tensor, tilt: int, others: Sequence[int], slab: float) -> Tensor:
    """What `others` say that an image, shifted to its place, looks like: its spectrum.

    Args:
        matrices: (T, 3, 3); shift: (T, 2) pixels, of all images.
        slab: thickness, pixels.

    Returns:
        (n, n//2+1) complex, rfft layout with the origin of real space at pixel n//2.
    """
    n, index = images.box, list(others)
    # points of the slab's middle plane, seen in the tilt and in the others
    plane = matrices[:, :2, :2]
    to_others = (plane[index] @ torch.linalg.inv(plane[tilt])).float()
    u = torch.arange(n, dtype=torch.float32) - n // 2
    here = torch.stack(torch.broadcast_tensors(u, u[:, None]), dim=-1)
    there = torch.einsum("bij,yxj->byxi", to_others, here) + shift[index, None, None].float()
    warped = torch.nn.functional.grid_sample(
        images.pixels[index, None], (2 * there + 1) / n, mode="bilinear", align_corners=False
    )[:, 0]
    # how far apart along z the slices are, over the inverse thickness
    own, normal = matrices[tilt, :2], matrices[index, 2]
    apart = -(normal[:, :2] @ own[:, :2].T) / normal[:, 2:] - own[:, 2]
    apart = (apart * slab).float()[..., None, None]
    k_x, k_y = torch.arange(n // 2 + 1) / n, torch.fft.fftfreq(n)[:, None]
    weight = (1 - (apart[:, 0] * k_x + apart[:, 1] * k_y).abs()).clamp_min(0)
    return (fourier.rfftn_centred(warped, 2) * weight).sum(0) / (weight.sum(0) + 1)


def offset(images: Images, tilt: int, prediction: Tensor, start: Tensor, reach: float) -> tuple[Tensor, float]:
    """Where an image lies, compared with its prediction.

    Args:
        prediction: of `predict`.
        start: (2,) px, where to look; reach: px, how far around it.

    Returns:
        (2,) shift (x, y) in px, and the correlation there (-1 to 1).
    """
    n = images.box
    spectrum = fourier.rfftn_centred(images.pixels[tilt], 2)
    product = spectrum * prediction.conj()
    correlation = fourier.irfftn_centred(product, (n, n))
    norm = (images.pixels[tilt].norm() * fourier.irfftn_centred(prediction, (n, n)).norm()).clamp_min(1e-12)
    u = torch.arange(n) - n // 2
    far = torch.hypot(u - start[0], u[:, None] - start[1]) > reach
    peak, height = highest_peak(correlation.masked_fill(far, -torch.inf).clamp_min(-norm))
    return peak - n // 2, float(height / norm)


def nominal(record: TiltSeriesRecord, axis: float) -> Alignment:
    """What is known before any alignment: the stage's angles, one axis (degrees), no shifts."""
    count = record.source.shape[0]
    zeros = (0.0,) * count
    tilt = record.tilts.nominal
    return Alignment(axis=(axis,) * count, tilt=tilt, xtilt=zeros, shift_x=zeros, shift_y=zeros)


@dataclass
class _Search:
    """The state of an alignment: shifts in pixels, and what doesn't change beside them."""

    images: Images
    tilt: Tensor
    matrices: Tensor
    slab: float
    shift: Tensor
    order: list[int]

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
            min(slab, images.box * images.pixel_size / 2) / images.pixel_size,
            geometry.shift * geometry.magnification[:, None] / images.pixel_size,
            sorted(usable, key=lambda j: abs(float(tilt[j]))),
        )

    def look(self, j: int, candidates: Sequence[int], start: Tensor, reach: float) -> tuple[Tensor, float]:
        """The shift of image j by those candidates that are near it in tilt, and the correlation."""
        near = [i for i in candidates if i != j and abs(float(self.tilt[i] - self.tilt[j])) <= WIDEST]
        if not near:
            return start, 0.0
        prediction = predict(self.images, self.matrices, self.shift, j, near, self.slab)
        return offset(self.images, j, prediction, start, reach * self.images.box)

    def first_pass(self) -> float:
        """Place one image after the other; gives the loss."""
        scores = []
        for place, j in enumerate(self.order[1:], 1):
            side = min(self.order[:place], key=lambda i: abs(float(self.tilt[i] - self.tilt[j])))
            self.shift[j], score = self.look(j, self.order[:place], self.shift[side], FIRST_RANGE)
            scores.append(score)
        return 1 - float(np.mean(scores))

    def sweep(self) -> float:
        """Place every image again by all the others; gives the loss. The lowest tilt stays where it is."""
        scores = []
        for j in self.order[1:]:
            self.shift[j], score = self.look(j, self.order, self.shift[j], LATER_RANGE)
            scores.append(score)
        return 1 - float(np.mean(scores))

    def residuals(self) -> Tensor:
        """(T,) px: half the distance between the shifts by the neighbours on either side alone."""
        out = torch.full((len(self.tilt),), float("nan"), dtype=torch.float64)
        for j in self.order:
            sides = [[i for i in self.order if sign * float(self.tilt[i] - self.tilt[j]) > 0] for sign in (-1, 1)]
            if all(sides):
                one, other = (self.look(j, side, self.shift[j], LATER_RANGE)[0] for side in sides)
                out[j] = (one - other).norm() / 2
        return out

    def fill(self) -> None:
        """Images that can't be used get the shifts between those of their neighbours in tilt."""
        known = sorted(self.order, key=lambda j: float(self.tilt[j]))
        for axis in range(2):
            values = np.interp(self.tilt.numpy(), self.tilt[known].numpy(), self.shift[known, axis].numpy())
            missing = torch.ones(len(self.tilt), dtype=torch.bool)
            missing[known] = False
            self.shift[missing, axis] = torch.from_numpy(values)[missing]

    def slab_heights(self) -> tuple[float, float]:
        """Middle and thickness, px, of what is in a coarse tomogram: where its detail is above that of the empty parts."""
        n, count = self.images.box, len(self.order)
        g = TiltGeometry(
            self.matrices[self.order], self.shift[self.order], torch.ones(count).double(), torch.ones(count).bool()
        )
        filtered = np.empty((count, n, n), np.float32)
        weighting = Weighting(thickness=n / 2, lowpass=SLAB_DETAIL / self.images.pixel_size)
        for _ in prepare_images(lambda j: self.images.pixels[self.order[j]].numpy(), g, 1, 1.0, weighting, filtered):
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
        return float(low + high) / 2, float(high - low) / 0.9


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
    thickness, loss = base.thickness, []
    if first_pass:
        search.shift = torch.zeros_like(search.shift)
        loss.append(search.first_pass())
    loss += [search.sweep() for _ in range(sweeps)]
    if first_pass:
        search.fill()
        middle, height = search.slab_heights()
        search.shift += search.matrices[:, :2, 2] * middle
        thickness = height * images.pixel_size
    residual = (search.residuals() * images.pixel_size).tolist()
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


def find_axis(images: Images, record: TiltSeriesRecord) -> float:
    """The direction of the tilt axis in [-90, 90) degrees with which the images agree best.

    The images can't tell it from its opposite, with which the specimen is mirrored. It must be a slab: a lone object that
    fills less than the field agrees with any axis.

    Args:
        images: of `prepare`, small ones (`AXIS_SIZE`): all directions are tried.
    """
    losses: dict[float, float] = {}

    def loss(axis: float) -> float:
        axis = (axis + 90) % 180 - 90
        if axis not in losses:
            losses[axis] = _Search.begin(images, nominal(record, axis), SLAB).first_pass()
        return losses[axis]

    best = min(np.arange(-90.0, 90.0, AXIS_STEPS[0]).tolist(), key=loss)
    for step in AXIS_STEPS[1:]:
        best = min((best + step * i for i in range(-2, 3)), key=loss)
    left, middle, right = (loss(best + step * i) for i in (-1, 0, 1))
    bend = left + right - 2 * middle
    best += 0.0 if bend <= 0 else step * float(np.clip((left - right) / (2 * bend), -0.5, 0.5))
    return (best + 90) % 180 - 90


def summary(alignment: Alignment) -> str:
    """Main figures in a few words."""
    known = [r for r in alignment.residual or () if r is not None]
    residual = f", median residual {np.median(known):.1f} Å" if known else ""
    return f"axis {np.median(alignment.axis):.1f}°{residual}"
