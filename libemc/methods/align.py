"""Coarse tilt-series alignment without markers: each image against what its neighbours say it should look like.

The prediction of an image from others is the forward model for a slab, in two dimensions: every other image is turned
and stretched to the tilt in question, and a Fourier coefficient of it counts for as much as the two slices overlap
given the thickness (as in the filter of `reconstruct`); so it's the reprojection of the others' tomogram, without making
one. From the lowest tilt outward each image is shifted to the prediction of all that are aligned already, then, in
sweeps, to that of all others on both sides. The shift along z of the whole can't be seen: the slab ends at z = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.reconstruct import bin_image
from libemc.numerics import fourier
from libemc.numerics.filters import bandpass, normalise, taper_edges
from libemc.numerics.masks import cosine_edge
from libemc.numerics.peaks import highest_peak
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment

WORKING_SIZE = 256  # pixels of an image's longer side, about, that the correlation works with
COARSEST, FINEST = 0.2, 4.0  # band pass: fraction of the field, and pixels at the working size
TAPER = 0.1  # of an image's shorter side
SLAB = 1000.0  # Å: thickness assumed where none is known
WIDEST = 30.0  # degrees: tilts farther from each other share next to nothing
FIRST_RANGE, LATER_RANGE = 0.25, 0.05  # of the field: how far an image may be off, in the first pass and then
SWEEPS = 4
OUTLIER = 5.0  # standard deviations at which pixels are cut off: gold beads must not decide alone
LEAST_SIGNAL = 1e-6  # spread of an image over its mean, below which it is blank
AXIS_STEPS = (10.0, 3.0, 1.0)  # degrees


@dataclass(frozen=True)
class Images:
    """A tilt series as the correlation sees it.

    Attributes:
        pixels: (T, n, n) band-passed, tapered, mean 0 and deviation 1, zero beyond the image.
        window: (n, n) the taper.
        pixel_size: Å.
        usable: (T,) bool: used, and not blank.
    """

    pixels: Tensor
    window: Tensor
    pixel_size: float
    usable: Tensor

    @property
    def box(self) -> int:
        """n."""
        return int(self.pixels.shape[-1])


def prepare(
    load: Callable[[int], NDArray[Any]], shape: Sequence[int], pixel_size: float, use: Sequence[bool]
) -> Images:
    """Bin, filter and taper the used images.

    Args:
        load: gives image j (rows, columns) of any real type.
        shape: (T, rows, columns).
        pixel_size: Å, of the raw images.
        use: (T,) which of them to use.
    """
    count, rows, columns = shape
    binning = max(1, math.ceil(max(rows, columns) / WORKING_SIZE))
    rows, columns = rows // binning, columns // binning
    n = fourier.good_size(max(rows, columns))
    width = round(TAPER * min(rows, columns))
    edges = [
        cosine_edge((torch.arange(m) - m // 2).abs().float(), m / 2 - width, float(width)) for m in (rows, columns)
    ]
    window = edges[0][:, None] * edges[1]
    pixels, usable = torch.zeros(count, n, n), torch.tensor(list(use))
    for j in range(count):
        if not use[j]:
            continue
        image = bin_image(torch.from_numpy(np.asarray(load(j), dtype=np.float32)), binning)
        if not bool(image.std() > LEAST_SIGNAL * image.abs().mean()):  # not finite counts as blank too
            usable[j] = False
            continue
        image = taper_edges(normalise(image), max(width // 4, 1))
        image = normalise(bandpass(image, 1.0, COARSEST * min(rows, columns), FINEST, edge=0.5))
        image = normalise(image.clamp(-OUTLIER, OUTLIER)) * window
        pixels[j] = fourier.centre_pad(image, (n, n))
    return Images(pixels, fourier.centre_pad(window, (n, n)), pixel_size * binning, usable)


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


@dataclass(frozen=True)
class Coarse:
    """A coarse alignment.

    Attributes:
        shift: (T, 2) Å; residual: (T,) Å, NaN where there is none.
        loss: 1 - mean correlation with the predictions, after the first pass and after every sweep.
    """

    axis: float
    tilt: Tensor
    shift: Tensor
    residual: Tensor
    loss: tuple[float, ...]

    def section(self, thickness: float | None = None) -> Alignment:
        """The record's section."""
        count = len(self.tilt)
        return Alignment(
            axis=(self.axis,) * count,
            tilt=tuple(self.tilt.tolist()),
            xtilt=(0.0,) * count,
            shift_x=tuple(self.shift[:, 0].tolist()),
            shift_y=tuple(self.shift[:, 1].tolist()),
            residual=tuple(None if math.isnan(r) else r for r in self.residual.tolist()),
            thickness=thickness,
            loss=self.loss,
        )


def _near(tilts: Tensor, tilt: int, candidates: Sequence[int]) -> list[int]:
    return [i for i in candidates if i != tilt and abs(float(tilts[i] - tilts[tilt])) <= WIDEST]


def align(
    images: Images,
    tilt: Tensor,
    axis: float,
    slab: float | None = None,
    start: Tensor | None = None,
    sweeps: int = SWEEPS,
) -> Iterator[Coarse]:
    """Align a tilt series: the result so far after the first pass and after every sweep.

    Args:
        images: of `prepare`.
        tilt: (T,) degrees; axis: degrees (convention 5).
        slab: thickness, Å; None for 1000, at most half of the field.
        start: (T, 2) shifts in Å to begin with; the first pass is then left out.
        sweeps: over all tilts, each against all others.

    Raises:
        InputError: fewer than three images can be used.
    """
    usable = [int(j) for j in torch.nonzero(images.usable)[:, 0]]
    if len(usable) < 3:
        raise InputError(f"{len(usable)} images can be used for alignment, at least 3 are needed", None, "include more")
    tilt = tilt.double()
    matrices = tilt_matrices(axis, tilt, 0.0)
    thickness = min(slab or SLAB, images.box * images.pixel_size / 2) / images.pixel_size
    order = sorted(usable, key=lambda j: abs(float(tilt[j])))
    shift = torch.zeros(len(tilt), 2, dtype=torch.float64)
    scores: list[float] = []
    if start is None:
        for place, j in enumerate(order[1:], 1):
            near = _near(tilt, j, order[:place])
            side = min(near, key=lambda i: abs(float(tilt[i] - tilt[j])))
            prediction = predict(images, matrices, shift, j, near, thickness)
            shift[j], score = offset(images, j, prediction, shift[side], FIRST_RANGE * images.box)
            scores.append(score)
        yield _result(images, axis, tilt, shift, matrices, thickness, [1 - float(np.mean(scores))])
    else:
        shift = start.double() / images.pixel_size
    loss = [1 - float(np.mean(scores))] if scores else []
    for _ in range(sweeps):
        scores = []
        for j in order[1:]:
            prediction = predict(images, matrices, shift, j, _near(tilt, j, usable), thickness)
            shift[j], score = offset(images, j, prediction, shift[j], LATER_RANGE * images.box)
            scores.append(score)
        loss.append(1 - float(np.mean(scores)))
        yield _result(images, axis, tilt, shift, matrices, thickness, loss)


def _result(
    images: Images, axis: float, tilt: Tensor, shift: Tensor, matrices: Tensor, slab: float, loss: list[float]
) -> Coarse:
    return Coarse(axis, tilt, shift * images.pixel_size, torch.full_like(tilt, float("nan")), tuple(loss))
