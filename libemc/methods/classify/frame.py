"""The half ball of Fourier space, in the average's frame, in which particles are compared, and the maps that live in it.

A particle's images are inserted into it once, at its pose: D is the sum of CTF·image at the ball's whole points, W that of
CTF², both white. The insertion kernel leaves its envelope on what it inserts, so D is W·h and noise, with h the transform of
the map times the envelope: that to a few percent, as long as the map is well within the box. Then
log-likelihood of the images given h, against nothing at all = (2 Re⟨h, D⟩ - ⟨W, |h|²⟩) / ν, where ν, below 1, is what the
kernel leaves of the noise in a product with a map within a mask, and what neighbours and so on add to it; it is measured
(`axes.noise_variance`). All coefficients are in units of the set's mean weight on their shell: W is about 1 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from libemc.numerics import fourier, kernels
from libemc.numerics.slices import Accumulator

LEAST_ENVELOPE = 0.05
"""The kernel's envelope is not divided out where it is below this: in the corners of the box."""


@dataclass(frozen=True)
class Frame:
    """Points of a half ball, in the order of their length, and the small cube that has them all.

    Attributes:
        box: pixels of the particles' box; padded: of the box whose Fourier pixels the points are.
        small: voxels of the cube of the same length that holds the ball.
        pixel_size: Å, of the particles.
        points: (3, Q) int64 x, y, z; x >= 0, one of each pair of Friedel mates, without the origin.
        place: (Q,) int64, of each point in `Accumulator.folded`, flattened.
        noise: (Q,) float32, mean weight W of a particle on each point's shell before it is divided out.
    """

    box: int
    padded: int
    small: int
    pixel_size: float
    points: Tensor
    place: Tensor
    noise: Tensor

    @staticmethod
    def of(box: int, pixel_size: float, resolution: float) -> Frame:
        """The ball of a box to a resolution, Å, or to the Nyquist frequency; its noise is not known yet."""
        ball = Accumulator(box, box * pixel_size / resolution, padding=1.0)
        radius, h = ball.radius * ball.scale, ball.half
        line = torch.arange(-h, h + 1)
        z, y, x = torch.meshgrid(line, line, torch.arange(0, h + 2), indexing="ij")
        length = x**2 + y**2 + z**2
        inside = ((x > 0) | (y > 0) | ((y == 0) & (z > 0))) & (length < radius**2)
        place = torch.nonzero(inside.reshape(-1))[:, 0]
        place = place[length.reshape(-1)[place].argsort(stable=True)]
        points = torch.stack([axis.reshape(-1)[place] for axis in (x, y, z)])
        small = fourier.good_size(2 * math.ceil(radius + 1.5))
        return Frame(box, ball.padded, small, pixel_size, points, place, torch.ones(len(place)))

    @property
    def length(self) -> float:
        """Å, of the box that the points are of."""
        return self.padded * self.pixel_size

    @property
    def radius(self) -> float:
        """Fourier pixels of the particles' box, within which all points lie."""
        return float(self.lengths[-1]) * self.box / self.padded + 1e-6

    @property
    def lengths(self) -> Tensor:
        """(Q,) float64, |point|, ascending."""
        return torch.linalg.vector_norm(self.points.double(), dim=0)

    @property
    def small_pixel(self) -> float:
        """Å, of the small cube."""
        return self.length / self.small

    def shells(self) -> Tensor:
        """(Q,) int64, the shell of one Fourier pixel of each point."""
        return self.lengths.round().long()

    def on_shells(self, values: Tensor) -> Tensor:
        """Mean of values (Q,) over each point's shell and its neighbours, (Q,)."""
        shell = self.shells()
        count = int(shell.max()) + 2
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, shell, values.double())
        number = torch.bincount(shell, minlength=count).double()
        wide = [torch.nn.functional.avg_pool1d(t[None, None], 3, 1, 1)[0, 0] for t in (total, number)]
        return (wide[0] / wide[1].clamp_min(1e-30))[shell].to(values.dtype)

    def plain_maps(self, balls: Tensor, size: int | None = None) -> Tensor:
        """(..., s, s, s) float32: inverse transforms of balls (..., Q), as they are.

        Args:
            size: voxels over the padded box; None: the small cube.
        """
        s = size or self.small
        x, y, z = self.points.to(balls.device)
        values = balls.to(torch.complex64)
        spectrum = values.new_zeros((*values.shape[:-1], s, s, s // 2 + 1))
        spectrum[..., z % s, y % s, x] = values
        edge = x == 0
        spectrum[..., -z[edge] % s, -y[edge] % s, x[edge]] = values[..., edge].conj()
        return fourier.irfftn_centred(spectrum, (s,) * 3)

    def plain_balls(self, maps: Tensor) -> Tensor:
        """(..., Q) complex64: transforms of maps (..., s, s, s) of the padded box's length, as they are."""
        s = maps.shape[-1]
        x, y, z = self.points.to(maps.device)
        return fourier.rfftn_centred(maps, 3)[..., z % s, y % s, x].to(torch.complex64)

    def envelope(self, size: int | None = None) -> Tensor:
        """(s, s, s) float32: what the insertion kernel multiplies maps with, in a cube over the padded box."""
        return _envelope(size or self.small)

    def maps(self, balls: Tensor, size: int | None = None) -> Tensor:
        """The maps (..., s, s, s) float32 that balls (..., Q), in units of the noise, stand for.

        Args:
            size: voxels over the padded box; None: the small cube. Densities are those of the particles' own pixels.
        """
        s = size or self.small
        faded = self.plain_maps(balls / self.noise.to(balls.device).sqrt(), s) * (s / self.padded) ** 3
        return faded / self.envelope(s).clamp_min(LEAST_ENVELOPE).to(faded)

    def balls(self, maps: Tensor) -> Tensor:
        """The balls (..., Q) complex64 that stand for maps (..., s, s, s) of the padded box's length: inverse of `maps`."""
        s = maps.shape[-1]
        faded = self.plain_balls(maps * self.envelope(s).to(maps))
        return faded * (self.noise.to(maps.device).sqrt() * (self.padded / s) ** 3)

    def in_box(self, balls: Tensor) -> Tensor:
        """The maps in the particles' box, (..., n, n, n)."""
        return fourier.centre_crop(self.maps(balls, self.padded), (self.box,) * 3)

    def small_mask(self, mask: Tensor) -> Tensor:
        """A mask (n, n, n) of the particles' box in the small cube, in 0 ... 1."""
        padded = fourier.centre_pad(mask.float(), (self.padded,) * 3)
        return fourier.resize(padded, (self.small,) * 3).clamp(0.0, 1.0)


@lru_cache(maxsize=4)
def _envelope(size: int) -> Tensor:
    """(s, s, s) float32 of the insertion kernel in a cube of `size` voxels over the padded box."""
    line = torch.from_numpy(kernels.kernel_envelope((np.arange(size) - size // 2) / size)).float()
    return line[:, None, None] * line[:, None] * line


def band_edges(scales: Sequence[float]) -> list[tuple[float, float]]:
    """Å, coarse and fine end of the band of each scale, coarsest first: neighbours meet midway, as ratios go.

    The first begins at the particle's own size (infinity), the last ends at its scale.
    """
    fine = sorted(scales, reverse=True)
    between = [math.sqrt(a * b) for a, b in pairwise(fine)]
    return list(zip([math.inf, *between], [*between, fine[-1]], strict=True))


def band_slices(frame: Frame, scales: Sequence[float]) -> list[slice]:
    """Which of the points each scale's band has: they lie in the order of their length."""
    lengths = frame.lengths
    out = []
    for coarse, fine in band_edges(scales):
        low, high = (0.0 if math.isinf(d) else frame.length / d for d in (coarse, fine))
        out.append(slice(int((lengths < low).sum()), int((lengths < high).sum())))
    return out
