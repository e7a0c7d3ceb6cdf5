"""What is looked for: a map at the sampling of the search, its mask, and decoys that look like it but are nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.postprocess import resample
from libemc.numerics import fourier
from libemc.numerics.grids import centred_radius, rfft_radius
from libemc.numerics.masks import soft_sphere
from libemc.numerics.slices import FourierVolume, sample_points
from libemc.numerics.symmetry import symmetrise

ENERGY = 0.98
"""Part of a map's squared density within the sphere that is taken as its extent."""
EDGE = 2.0
"""Voxels over which a mask that was not given falls off, beyond that sphere."""
CYCLES = 10
"""Rounds in which a decoy is brought to its mask, its histogram and its spectrum."""
LEAST_BOX = 8
"""Voxels of the box of a template."""


@dataclass(frozen=True)
class Template:
    """A map to look for.

    Attributes:
        label: its name.
        density: (m, m, m) float32, white, masked, of mean 0 under its mask; m is even, the origin is m//2.
        mask: (m, m, m) float32 in 0 ... 1.
        pixel_size: Å.
        resolution: Å to which it takes part.
        symmetry: its group.
    """

    label: str
    density: Tensor
    mask: Tensor
    pixel_size: float
    resolution: float
    symmetry: str = "c1"

    def to(self, device: torch.device) -> Template:
        """The same on another device."""
        return replace(self, density=self.density.to(device), mask=self.mask.to(device))

    @property
    def box(self) -> int:
        """m."""
        return self.density.shape[0]

    @property
    def radius(self) -> float:
        """Of its Fourier coefficients that take part, in those of its box."""
        return min(self.box * self.pixel_size / self.resolution, self.box / 2)

    @cached_property
    def fourier(self) -> FourierVolume:
        """Ready for slices."""
        return FourierVolume.from_map(self.density, radius=self.radius)

    @cached_property
    def ball(self) -> tuple[Tensor, Tensor]:
        """The box's Fourier coefficients with |k| < radius and k_z >= 0: points (3, Q) as (x, y, z), float32, and where
        they stand in the layout [k_x, k_y, k_z >= 0] (Q,)."""
        device = self.density.device
        line = torch.fft.fftfreq(self.box, 1 / self.box, device=device)
        x, y, z = torch.meshgrid(line, line, torch.arange(self.box // 2 + 1.0, device=device), indexing="ij")
        inside = x**2 + y**2 + z**2 < self.radius**2
        return torch.stack([x[inside], y[inside], z[inside]]), torch.nonzero(inside.flatten())[:, 0]

    def coefficients(self, rotations: Tensor) -> Tensor:
        """The coefficients of `ball` of the rotated template, (B, Q) complex64, its origin at the box's centre."""
        return sample_points(self.fourier, rotations.to(self.density), self.ball[0])

    def rotated(self, rotations: Tensor) -> Tensor:
        """The template rotated by each of (B, 3, 3), as [x, y, z]: (B, m, m, m) float32."""
        points, place = self.ball
        m = self.box
        sign = 1 - 2 * (points.long().sum(0) % 2)  # moves the origin from voxel 0 to m//2
        boxes = torch.zeros((len(rotations), m * m * (m // 2 + 1)), dtype=torch.complex64, device=points.device)
        boxes[:, place] = self.coefficients(rotations) * sign
        return torch.fft.irfftn(boxes.reshape(-1, m, m, m // 2 + 1), s=(m, m, m))


def above_solvent(density: Tensor) -> Tensor:
    """A map (n, n, n) less the median of its outermost voxels, which show no molecule."""
    inner = torch.zeros(density.shape, dtype=torch.bool)
    inner[1:-1, 1:-1, 1:-1] = True
    return density - density[~inner].median()


def diameter(density: Tensor, pixel_size: float) -> float:
    """Å: of the sphere about the origin that holds `ENERGY` of a map's squared density, the solvent's being 0."""
    radius = centred_radius(density.shape).flatten()
    order = radius.argsort()
    inside = (density.double().flatten() ** 2)[order].cumsum(0)
    return 2 * pixel_size * max(1.0, float(radius[order][int((inside < ENERGY * inside[-1]).sum())]))


def width(density: Tensor, pixel_size: float) -> float:
    """Å: the shortest axis of the solid ellipsoid that has a map's moments of inertia, its positive density as mass.

    Two of them can hardly be nearer to each other.
    """
    mass = density.double().clamp_min(0)
    mass = torch.where(mass > 0.1 * mass.max(), mass, 0.0)
    line = [torch.arange(n, dtype=torch.float64) - n // 2 for n in density.shape]
    points = torch.stack(torch.meshgrid(*line, indexing="ij")).flatten(1)
    weight = mass.flatten() / mass.sum()
    centred = points - (points * weight).sum(1, keepdim=True)
    variance = float(torch.linalg.eigvalsh((centred * weight) @ centred.T)[0])
    return 2 * pixel_size * math.sqrt(5 * max(variance, 0.25))


def prepare(
    density: Tensor,
    own_pixel_size: float,
    pixel_size: float,
    resolution: float,
    label: str,
    mask: Tensor | None = None,
    symmetry: str = "c1",
) -> Template:
    """A template out of a map.

    Args:
        density: (n, n, n) white, at `own_pixel_size`; mask: the same grid, 0 ... 1; None for a soft sphere that holds the map.
        pixel_size: of the search. resolution: Å, finest detail of it that takes part.

    Raises:
        InputError: the map is the same everywhere under its mask.
    """
    n, scale = density.shape[0], own_pixel_size / pixel_size
    density = above_solvent(density.float())
    if mask is None:
        extent = diameter(density, own_pixel_size) / 2
        reach = min(extent / pixel_size + EDGE, n * scale / 2)
    else:
        outer = centred_radius(density.shape)[mask > 1e-3]
        reach = float(outer.max()) * scale + 1 if len(outer) else 0.0
    box = max(LEAST_BOX, 2 * math.ceil(reach + 1))
    whole = fourier.centre_fit(resample(density, 1 / scale), (box,) * 3)
    if mask is None:
        weight = soft_sphere(box, max(1.0, reach - EDGE), EDGE)
    else:
        weight = fourier.centre_fit(resample(mask.float(), 1 / scale), (box,) * 3).clamp(0, 1)
    template = Template(label, whole, weight, pixel_size, resolution, symmetry)
    inside = _masked(whole, weight)
    if float(inside.abs().max()) <= 1e-6 * float(density.abs().max()):
        raise InputError(f"the template {label} is the same everywhere under its mask", None, "check map and mask")
    return replace(template, density=inside)


def _masked(density: Tensor, mask: Tensor) -> Tensor:
    """A map times a mask, of mean 0 under it."""
    return mask * (density - (density * mask).sum() / mask.sum().clamp_min(1e-6))


def radial_mean(density: Tensor) -> Tensor:
    """A map averaged over all rotations about its origin, linear between shells of one voxel."""
    radius = centred_radius(density.shape).flatten().double()
    low = radius.long()
    part, flat = radius - low, density.flatten().double()
    size = int(low.max()) + 2
    sums, weights = torch.zeros(2, size, dtype=torch.float64)
    for place, share in ((low, 1 - part), (low + 1, part)):
        sums.index_add_(0, place, share * flat)
        weights.index_add_(0, place, share)
    mean = sums / weights.clamp_min(1e-9)
    return ((1 - part) * mean[low] + part * mean[low + 1]).float().reshape(density.shape)


def decoy(template: Template, seed: int, keep_shape: bool) -> Template:
    """A map that has the template's mask, spectrum and symmetry, but phases drawn at random.

    Args:
        keep_shape: it has the template's spherical average and histogram of densities too (surrogates by iterated amplitude
            adjustment: Schreiber & Schmitz 1996, Phys. Rev. Lett. 77:635). A specimen's particle of the right size looks as
            much like it as like any template that is not the particle's own.
    """
    generator = torch.Generator().manual_seed(seed)
    core = radial_mean(template.density) if keep_shape else torch.zeros_like(template.density)
    rest = template.density - core
    shape = rest.shape
    shell = (rfft_radius(shape) * template.box).round().long()
    size = int(shell.max()) + 1
    inside = template.mask > 0.5
    values = template.density[inside].sort().values

    def power(x: Tensor) -> Tensor:
        return torch.zeros(size).index_add_(0, shell.flatten(), torch.fft.rfftn(x).abs().square().flatten())

    wanted = power(rest)
    phases = torch.angle(torch.fft.rfftn(torch.randn(shape, generator=generator)))
    x = torch.fft.irfftn(torch.polar(torch.fft.rfftn(rest).abs(), phases), s=shape)
    for _ in range(CYCLES):
        if template.symmetry != "c1":
            x = symmetrise(x, template.symmetry)
        if keep_shape:
            whole = core + x
            whole[inside] = values[whole[inside].argsort().argsort()]
            x = whole - core
        x = _masked(x, template.mask)
        if keep_shape:
            x = x - radial_mean(x)
        gain = (wanted / power(x).clamp_min(1e-30)).sqrt()
        gain = torch.where(wanted > 1e-12 * wanted.max(), gain, 0.0)
        x = torch.fft.irfftn(torch.fft.rfftn(x) * gain[shell], s=shape)
    return replace(template, density=core + x)
