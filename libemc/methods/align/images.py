"""A tilt series as the coarse alignment sees it: screened, binned, whitened, band-passed and tapered.

A few pixels are enough, and no kind of detail may decide alone: the mean power spectrum of all images is made flat, and
what stands out too far, gold above all, is cut off.
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

from libemc.methods.align import screening
from libemc.numerics import fourier
from libemc.numerics.filters import bandpass, normalise, taper_edges
from libemc.numerics.masks import cosine_edge

WORKING_SIZE = 192  # pixels of an image's longer side, about, that the correlation works with
SMALL_SIZE = 128  # the same for the search of the axis, and for tomograms
COARSEST, FINEST = 0.25, 2.5  # band pass: fraction of the field, and pixels at the working size
RINGS = 96  # per cycle per pixel, in which the power spectrum is made flat
TAPER = 0.08  # of an image's shorter side
OUTLIER = 3.5  # standard deviations at which pixels are cut off, twice: gold beads must not decide alone


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


def _whitening(images: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Flattens the mean power spectrum of images of one shape."""
    if not images:
        return lambda image: image
    shape = images[0].shape
    power = torch.stack([torch.fft.rfft2(i).abs().square() for i in images]).mean(0)
    k_x, k_y = torch.fft.rfftfreq(shape[1]), torch.fft.fftfreq(shape[0])[:, None]
    ring = (torch.hypot(k_x, k_y) * RINGS).long()
    count = torch.bincount(ring.flatten())
    mean = torch.bincount(ring.flatten(), power.flatten().double()) / count.clamp_min(1)
    gain = mean.clamp_min(1e-6 * float(mean.max())).rsqrt()[ring].float()
    return lambda image: torch.fft.irfft2(torch.fft.rfft2(image) * gain, s=shape)


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
    # radians per cycle per pixel: back from the blocks' centres to the origin
    half = -math.pi * (binning - 1) / binning
    k_x, k_y = torch.arange(n // 2 + 1) / n, torch.fft.fftfreq(n)[:, None]
    pixels = torch.zeros(count, n, n)
    small = [None if s is None else taper_edges(normalise(s), max(width // 4, 1)) for s in small]
    white = _whitening([s for s in small if s is not None])
    for j, image in enumerate(small):
        if image is not None:
            image = bandpass(white(image), 1.0, COARSEST * min(rows, columns), FINEST, edge=0.5)
            image = normalise(image)
            for _ in range(2):
                image = normalise(image.clamp(-OUTLIER, OUTLIER))
            pixels[j] = fourier.centre_pad(normalise(image, mask=window) * window, (n, n))
    turn = torch.polar(torch.ones(n, n // 2 + 1), half * (k_x + k_y))
    pixels = torch.fft.irfftn(torch.fft.rfftn(pixels, dim=(1, 2)) * turn, s=(n, n), dim=(1, 2))
    usable = torch.tensor([image is not None for image in small])
    return Images(
        pixels, fourier.centre_pad(window, (n, n)), pixel_size * binning, usable, tuple(reason), tuple(copies)
    )
