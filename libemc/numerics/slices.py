"""The forward model and its adjoint: slices out of, and into, a Fourier volume.

    image of particle i in tilt j = CTF · dose · shift · slice(reference, M),   M = T_j·R_i   (conventions 5, 8)

*Everything* that this suite predicts or reconstructs goes through this file. Work is done on lists: a `Band` is the half
disc of coefficients within a radius, a slice is (K,) complex numbers, a batch is (B, K). All of it is differentiable in
reference, rotation, shift, magnification and (through `ctf`) defocus; the gradients of the interpolation are analytic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc.numerics import fourier, kernels

READING_PADDING = 1.5
"""Padding of the volume that slices are read from: with the kernel of `kernels` more exact than linear interpolation
padded twice, in a volume 2.4 times smaller."""
RING_WIDTH = 4.0
"""Fourier pixels of the rings in which a band lists its coefficients."""
INSERTION_PADDING = 2.0
"""Padding of the volume that slices are inserted into. Dividing by the sum of weights averages the signal over the reach of
the kernel; at 1.5 that costs up to 1 % of FSC at once where CTF² is steep, at 2 a third of it."""


@dataclass(frozen=True)
class Band:
    """The Fourier coefficients of a square image that take part: |k| < radius, one of each Friedel pair.

    Attributes:
        box: pixels of the image, n.
        radius: in Fourier pixels (1 = one cycle per box), at most n/2: the Nyquist ring itself is left out.
        kx, ky: (K,) int64, kx >= 0.
    """

    box: int
    radius: float
    kx: Tensor = field(compare=False)
    ky: Tensor = field(compare=False)

    @staticmethod
    def of(box: int, radius: float | None = None, device: torch.device | str = "cpu") -> Band:
        """The band of a `box`² image within `radius` Fourier pixels (default: up to Nyquist)."""
        limit = box / 2 if radius is None else min(float(radius), box / 2)
        return _band(box, limit, torch.device(device))

    def take(self, spectra: Tensor) -> Tensor:
        """(..., n, n//2+1) rfft layout -> (..., K)."""
        flat = (self.ky % self.box) * (self.box // 2 + 1) + self.kx
        return spectra.reshape(*spectra.shape[:-2], -1)[..., flat]

    def put(self, values: Tensor) -> Tensor:
        """(..., K) -> (..., n, n//2+1) rfft layout, zero outside the band, Friedel mates at kx = 0 filled in."""
        columns = self.box // 2 + 1
        out = values.new_zeros((*values.shape[:-1], self.box * columns))
        out[..., (self.ky % self.box) * columns + self.kx] = values
        axis = (self.kx == 0) & (self.ky > 0)
        mates = values[..., axis]
        out[..., (-self.ky[axis] % self.box) * columns] = mates.conj() if mates.is_complex() else mates
        return out.reshape(*values.shape[:-1], self.box, columns)

    @property
    def radii(self) -> Tensor:
        """(K,) float64, |k| in Fourier pixels."""
        return (self.kx**2 + self.ky**2).double().sqrt()

    def frequencies(self, pixel_size: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(kx, ky) in 1/Å, each (K,)."""
        scale = 1.0 / (self.box * pixel_size)
        return (self.kx * scale).to(dtype), (self.ky * scale).to(dtype)

    def points(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(3, K): the coefficients as points of the image's Fourier plane, Fourier pixels, z = 0."""
        return torch.stack([self.kx, self.ky, torch.zeros_like(self.kx)]).to(dtype)

    @property
    def multiplicity(self) -> Tensor:
        """(K,) float64: how often each coefficient stands in the full transform: 1 for the mean, 2 for all others."""
        return torch.where((self.kx == 0) & (self.ky == 0), 1.0, 2.0).double()


@lru_cache(maxsize=64)
def _band(box: int, radius: float, device: torch.device) -> Band:
    r = int(np.ceil(radius))
    ky, kx = torch.meshgrid(torch.arange(-r, r + 1), torch.arange(0, r + 1), indexing="ij")
    keep = (kx**2 + ky**2 < radius**2) & ((kx > 0) | (ky >= 0))
    kx, ky = kx[keep], ky[keep]
    # ring by ring, and around each ring: what all images touch at a time is one thin shell of the volume
    ring = (kx**2 + ky**2).double().sqrt().div(RING_WIDTH).floor()
    order = (ring * 4 + torch.atan2(ky.double(), kx.double())).argsort(stable=True)
    return Band(box, radius, kx[order].to(device), ky[order].to(device))


def shift_phases(shift: Tensor, band: Band, dtype: torch.dtype = torch.float32) -> Tensor:
    """Phase factors that move an image's content by `shift`.

    Args:
        shift: (..., 2) pixels (x, y); positive moves to +x, +y.
        dtype: real precision of the answer.

    Returns:
        (..., K) complex.
    """
    turns = (shift[..., 0:1] * band.kx + shift[..., 1:2] * band.ky) / band.box
    # whole turns are taken off before the precision is: large shifts stay exact in float32
    angle = (-2 * torch.pi * (turns - torch.round(turns.detach()))).to(dtype)
    return torch.complex(torch.cos(angle), torch.sin(angle))


def spectra_of_images(images: Tensor, band: Band) -> Tensor:
    """(..., n, n) real images -> (..., K) complex coefficients in the band (origin at pixel n//2)."""
    return band.take(fourier.rfftn_centred(images, 2))


def images_from_band(values: Tensor, band: Band) -> Tensor:
    """(..., K) complex -> (..., n, n) real images."""
    return fourier.irfftn_centred(band.put(values), (band.box, band.box))


@lru_cache(maxsize=16)
def envelope(box: int, padded: int) -> Tensor:
    """(n, n, n) float64: what the interpolation kernel multiplies real space with, one factor per axis."""
    line = torch.from_numpy(kernels.kernel_envelope((np.arange(box) - box // 2) / padded))
    return line[:, None, None] * line[None, :, None] * line[None, None, :]


@dataclass(frozen=True)
class FourierVolume:
    """A map prepared for slicing: its padded transform, divided by the kernel's envelope in real space, half and haloed.

    Attributes:
        data: complex, shape `kernels.volume_shape(half)`.
        box: pixels of the unpadded map; padded: of the padded one.
        half: half extent in padded Fourier pixels; radius: the unpadded radius within which slices may be cut.
    """

    data: Tensor
    box: int
    padded: int
    half: int
    radius: float

    @staticmethod
    def from_map(density: Tensor, padding: float = READING_PADDING, radius: float | None = None) -> FourierVolume:
        """Prepare a cubic map (n, n, n) for slices up to `radius` Fourier pixels (default: Nyquist). Differentiable."""
        n = density.shape[-1]
        padded = fourier.good_size(int(np.ceil(n * padding)))
        limit = n / 2 if radius is None else min(float(radius), n / 2)
        flat = density / envelope(n, padded).to(density)
        spectrum = fourier.rfftn_centred(fourier.centre_pad(flat, (padded,) * 3), 3)
        half = kernels.half_size(limit, padded / n)
        return FourierVolume(_to_haloed(spectrum, padded, half), n, padded, half, limit)

    @property
    def scale(self) -> float:
        """Padded Fourier pixels per unpadded one."""
        return self.padded / self.box


def _to_haloed(spectrum: Tensor, padded: int, half: int) -> Tensor:
    """rfft layout of a padded cube -> haloed half volume; beyond Nyquist the transform is periodic."""
    device = spectrum.device
    line = torch.arange(-half, half + 1, device=device) % padded
    x = torch.arange(-kernels.HALO, half + 2, device=device) % padded
    mate = x > padded // 2
    column = torch.where(mate, padded - x, x)
    direct = spectrum[line][:, line][:, :, column]
    mirrored = spectrum[-line % padded][:, -line % padded][:, :, column[mate]].conj()
    out = direct.clone()
    out[:, :, mate] = mirrored
    return out


class _Gather(torch.autograd.Function):
    """kernels.gather with its analytic gradients by volume and rows."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, matrices: Tensor, half: int, points: Tensor) -> Tensor:
        ctx.save_for_backward(data, matrices, points)
        ctx.half = half
        return kernels.gather(data.detach(), half, points, matrices.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        data, matrices, points = ctx.saved_tensors
        grad_data = grad_matrices = None
        if ctx.needs_input_grad[0]:
            grad_data = torch.zeros_like(data)
            kernels.scatter(grad_data, ctx.half, points, matrices, grad.contiguous())
        if ctx.needs_input_grad[1]:
            slope = kernels.gather(data, ctx.half, points, matrices, slope=True)[..., 1:]
            g = (grad[..., None].conj() * slope).real
            grad_matrices = torch.einsum("ck,bkd->bcd", points, g)
        return grad_data, grad_matrices, None, None


def _scaled(matrices: Tensor, scale: float, magnification: Tensor | None, dtype: torch.dtype) -> Tensor:
    scaled = matrices * scale
    if magnification is not None:
        scaled = scaled * magnification[:, None, None]
    return scaled.to(dtype).contiguous()


def extract_slices(volume: FourierVolume, matrices: Tensor, band: Band, magnification: Tensor | None = None) -> Tensor:
    """Central slices: the transforms of the projections of the map rotated by each matrix.

    Args:
        matrices: (B, 3, 3) M = T·R; the image at q is the integral along z of the map at Mᵀq.
        band: of the map's own box; its radius must not exceed the volume's.
        magnification: (B,) scale of the image about its centre. The coordinates are scaled, the amplitude is left; what
            comes to lie out of the volume is zero.

    Returns:
        (B, K) complex, in the precision of the map. Differentiable in map, matrices and magnification.
    """
    _check_band(band, volume.box, volume.radius)
    real = volume.data.real.dtype
    scaled = _scaled(matrices, volume.scale, magnification, real)
    return _Gather.apply(volume.data, scaled, volume.half, band.points(real))  # type: ignore[no-any-return]


def extract_slices_with_slopes(volume: FourierVolume, matrices: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """As `extract_slices`, with the derivatives of each coefficient by the (unpadded) coordinates of its point.

    Returns:
        (B, K) complex slices, (B, K, 3) complex derivatives by x, y, z in Fourier pixels: what a Gauss-Newton step needs.
    """
    _check_band(band, volume.box, volume.radius)
    real = volume.data.real.dtype
    scaled = _scaled(matrices, volume.scale, None, real)
    out = kernels.gather(volume.data, volume.half, band.points(real), scaled, slope=True)
    return out[..., 0], out[..., 1:] * volume.scale


@dataclass(frozen=True)
class FitSums:
    """Sums over each image for a least-squares fit of its slice S, float64.

    The columns are S and its derivatives by five parameters of the image: a turn of what it shows about its x, y, z
    (radians), and a shift along its x, y (in units of box / 2π pixels).

    Attributes:
        cross: (B, 6) Re Σ d*·J_i, d the data.
        normal: (B, 6, 6) Re Σ w J_i J_h*.
    """

    cross: Tensor
    normal: Tensor


def fit_sums(
    volume: FourierVolume,
    matrices: Tensor,
    band: Band,
    values: Tensor,
    weights: Tensor,
    shift: Tensor,
    magnification: Tensor | None = None,
) -> FitSums:
    """How images compare with the slices that they should be, and how that changes with each image's pose.

    Args:
        matrices: (B, 3, 3) M; magnification: (B,), as for `extract_slices`.
        values: (B, K) complex, data times their weight.
        weights: (B, K) real.
        shift: (B, 2) pixels: where the image shows the origin of the map; the data are brought back by it.
    """
    _check_band(band, volume.box, volume.radius)
    real = volume.data.real.dtype
    scaled = _scaled(matrices, volume.scale, magnification, real)
    turns = shift.double() / band.box
    data, w = values.to(volume.data.dtype), weights.to(real)
    sums = kernels.fit_sums(volume.data, volume.half, band.points(real), scaled, data, w, turns)
    normal = torch.zeros(len(sums), 6, 6, dtype=sums.dtype, device=sums.device)
    row, column = torch.tril_indices(6, 6, device=sums.device)
    normal[:, row, column] = sums[:, 6:]
    normal[:, column, row] = sums[:, 6:]
    return FitSums(sums[:, :6], normal)


def sample_points(volume: FourierVolume, matrices: Tensor, points: Tensor) -> Tensor:
    """The transform of the map rotated by each matrix, at a list of points in space.

    Args:
        matrices: (B, 3, 3); points: (3, K) in Fourier pixels, each within the volume's radius.

    Returns:
        (B, K) complex.
    """
    real = volume.data.real.dtype
    scaled = _scaled(matrices, volume.scale, None, real)
    return kernels.gather(volume.data, volume.half, points.to(real), scaled)


def _check_band(band: Band, box: int, radius: float) -> None:
    if band.box != box or band.radius > radius + 1e-9:
        raise ValueError(f"band of box {band.box}, radius {band.radius} on a volume of box {box}, radius {radius}")


class Accumulator:
    """Slices into a Fourier volume, with the sum of their weights beside them: the adjoint, and the map out of it.

    Sums of accumulators of parts of the data are the accumulator of all of it.
    """

    def __init__(
        self,
        box: int,
        radius: float | None = None,
        padding: float = INSERTION_PADDING,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.box = box
        self.padded = fourier.good_size(int(np.ceil(box * padding)))
        self.radius = box / 2 if radius is None else min(float(radius), box / 2)
        self.half = kernels.half_size(self.radius, self.padded / box)
        self.sums = kernels.zeros((*kernels.volume_shape(self.half), 4), dtype, device)

    @property
    def scale(self) -> float:
        """Padded Fourier pixels per unpadded one."""
        return self.padded / self.box

    def add(
        self,
        values: Tensor,
        weights: Tensor,
        matrices: Tensor,
        band: Band,
        magnification: Tensor | None = None,
    ) -> None:
        """Insert slices.

        Args:
            values: (B, K) complex: the images already multiplied by CTF, dose, phase and weight (w·CTF·image).
            weights: (B, K) real: the squared factors beside them (w·CTF²).
            matrices: (B, 3, 3) M = T·R, as for `extract_slices`.
            magnification: (B,) scale of the image about its centre; what comes to lie out of the volume is left out.
        """
        _check_band(band, self.box, self.radius)
        dtype = self.sums.dtype
        scaled = _scaled(matrices, self.scale, magnification, dtype)
        # the mean is its own Friedel mate, and the fold below adds mates: half of it each time
        once = (band.multiplicity / 2).to(dtype)
        kernels.scatter_weighted(
            self.sums,
            self.half,
            band.points(dtype),
            scaled,
            (values * once).to(torch.complex64 if dtype == torch.float32 else torch.complex128),
            (weights * once).to(dtype),
        )

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator of the same geometry to this one."""
        if other.sums.shape != self.sums.shape:
            raise ValueError("accumulators of different geometry cannot be added")
        self.sums += other.sums

    def clear(self) -> None:
        """Empty it for other data, which takes less time than a new one."""
        self.sums.zero_()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Numerator (complex) and weight (real) with Friedel mates added, haloed layout from x = 0: (2h+1, 2h+1, h+2)."""
        return kernels.folded(self.sums)

    def map(self, signal_to_noise: Tensor | None = None, floor: float = 1e-3) -> Tensor:
        """The Wiener-normalised map: sum of values over sum of weights, regularised.

        Args:
            signal_to_noise: (box//2+1,) spectral signal-to-noise of the average per shell (fsc/(1-fsc)); adds
                mean weight / snr to the weights (RELION, Scheres 2012, eq. 8 in this form). None: no Wiener constant.
            floor: fraction of the shell's mean weight that is always added, so that unseen regions stay empty instead of noisy.

        Returns:
            (n, n, n) real.
        """
        means = kernels.shell_means(self.sums, self.half, self.scale, self.box // 2)
        constant = floor * means
        if signal_to_noise is not None:
            constant = constant + means / signal_to_noise.to(means).clamp_min(1e-3)
        spectrum = kernels.quotient(self.sums, self.half, self.scale, self.radius, constant, self.padded)
        real = fourier.irfftn_middle(spectrum, self.padded, (self.box,) * 3)
        return real / envelope(self.box, self.padded).to(real)

    def point_spread(self) -> Tensor:
        """(n, n, n) real: the sum of the weights' plane waves, Σ w cos(2π k·r / n), n of the box: what the adjoint of the forward
        model makes of the forward model of a point at the origin."""
        _, total = self.folded()
        n, reach = self.padded, min(self.half, (self.padded - 1) // 2)
        line = torch.arange(-reach, reach + 1, device=total.device) % n
        spectrum = torch.zeros((n, n, n // 2 + 1), dtype=torch.complex64, device=total.device)
        middle = slice(self.half - reach, self.half + reach + 1)
        spectrum[line[:, None], line, : reach + 1] = total[middle, middle, : reach + 1].to(spectrum.dtype)
        real = fourier.irfftn_middle(spectrum, n, (self.box,) * 3)
        return real / envelope(self.box, n).to(real) * float(n) ** 3


def project(density: Tensor, matrices: Tensor, radius: float | None = None) -> Tensor:
    """Projections (B, n, n) of a cubic map rotated by each of (B, 3, 3) matrices, band-limited to `radius`."""
    volume = FourierVolume.from_map(density, radius=radius)
    band = Band.of(density.shape[-1], volume.radius, density.device)
    return images_from_band(extract_slices(volume, matrices, band), band)


class Backprojection:
    """The adjoint of `extract_slices` without weights: slices in, the middle of the map out, buffers kept for the next.

    For slices that carry their weights already (filtered back-projection). The volume isn't padded, so what is kept
    must not reach beyond a third of the box from its centre: there the kernel's replicas are below 4 %.

    Args:
        box: pixels of the images and of the cube, even.
        keep: voxels (z, y, x) of the map that is given back, around the origin.
    """

    def __init__(self, box: int, keep: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        if box % 2:
            raise ValueError(f"box {box} is odd")
        self.box, self.keep = box, keep
        self._half = kernels.half_size(box / 2, 1.0)
        self._sums = torch.zeros(kernels.volume_shape(self._half), dtype=torch.complex64, device=device)
        self._spectrum = torch.zeros((box, box, box // 2 + 1), dtype=torch.complex64, device=device)
        gain = [1 / torch.from_numpy(kernels.kernel_envelope((np.arange(n) - n // 2) / box)) for n in keep]
        self._gain_zy = (gain[0][:, None, None] * gain[1][:, None] * box).float().to(device)
        self._gain_x = gain[2].float().to(device)

    def __call__(self, values: Tensor, matrices: Tensor, band: Band, magnification: Tensor | None = None) -> Tensor:
        """Back-project.

        Args:
            values: (B, K) complex64 coefficients of the images, origin at pixel n//2.
            matrices: (B, 3, 3) M: a voxel r gets the value of the image at (M·r)_xy.
            magnification: (B,) scale of the image about its centre.

        Returns:
            (*keep) float32: the sum of the images' values at the projections of each voxel.
        """
        _check_band(band, self.box, self.box / 2)
        scaled = _scaled(matrices, 1.0, magnification, torch.float32)
        values = values * (band.multiplicity / 2).to(values.real.dtype)  # as in `Accumulator.add`
        kernels.scatter(self._sums, self._half, band.points(), scaled, values)
        self._fold()
        out = fourier.irfftn_middle(self._spectrum, self.box, self.keep)
        return out.mul_(self._gain_zy).mul_(self._gain_x)

    def _fold(self) -> None:
        """Add the Friedel mates, move the sums to the rfft layout, and empty them for the next call."""
        sums, half, h, reach = self._sums, self._half, kernels.HALO, self.box // 2 - 1
        sums[:, :, h] += sums[:, :, h].flip(0, 1).conj()  # as in `Accumulator.folded`
        sums[:, :, h + 1] += sums[:, :, h - 1].flip(0, 1).conj()
        here = [(slice(0, reach + 1), slice(half, half + reach + 1)), (slice(-reach, None), slice(half - reach, half))]
        for z_to, z_from in here:
            for y_to, y_from in here:
                self._spectrum[z_to, y_to, : reach + 1] = sums[z_from, y_from, h : h + reach + 1]
        sums.zero_()
