"""Resolution by direction: the FSC of two half maps within cones, and the gain of a Wiener filter made of it.

A cone and its opposite are one, for the transform of a real map has Friedel's symmetry. Directions are evenly spread,
with no seam and no pole; each cone is so wide that neighbours overlap, for an FSC of few coefficients says little. The
curves are expanded back onto the Fourier grid with weights that fall smoothly from the axis of each cone to its edge,
so that the filter has no steps. The correction for the mask is phase randomisation as for the whole shell (convention
16), cone by cone, for what a mask correlates depends on its extent in that direction. A correction by the fraction of
the mask that the particle fills would need that fraction, and raises every curve by what one believes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from libemc.methods.postprocess import BITS, GOLD_STANDARD, independent_fraction
from libemc.numerics.fsc import (
    RANDOMISE_BELOW,
    Curve,
    corrected_fsc,
    fourier_shell_correlation,
    information_threshold,
    phase_randomise,
    resolution_at,
)
from libemc.numerics.grids import rfft_frequencies, rfft_multiplicity
from libemc.numerics.masks import cosine_edge

HALF_ANGLE = 25.0
"""Degrees: a cone has 9 % of a shell. Narrower ones (20° in Tan et al. 2017) are noisier where a map is weak, wider ones
(36° in emClarity) blur a missing wedge; errors of the filtered map are within 1 % of each other from 20° to 30°."""

DIRECTIONS = 60
"""Axes on the half sphere: neighbours are about 18° apart, so that cones overlap everywhere."""

RANDOMISATIONS = 3
"""Sets of random phases whose FSC is averaged: one alone would add as much noise as a cone's curve has."""

RUN_BELOW = 3
"""Consecutive shells below a threshold that end the signal: a zero of the CTF is no end."""

CUT_EDGE = 4.0
"""Shells over which the curve of a cone is led to zero at the end of its signal."""

_GOLDEN = math.pi * (3 - math.sqrt(5))
_TINY = 1e-6
_SURFACE_POINTS, _STEP = 2000, 1e-3
"""Directions at which a surface is measured; radians over which its slope is."""


def cone_axes(count: int = DIRECTIONS) -> Tensor:
    """(count, 3) float64 unit vectors (x, y, z) evenly spread over the half sphere z > 0: a Fibonacci lattice."""
    i = torch.arange(count, dtype=torch.float64)
    z = 1 - (i + 0.5) / count
    r = (1 - z**2).sqrt()
    return torch.stack((r * torch.cos(_GOLDEN * i), r * torch.sin(_GOLDEN * i), z), dim=-1)


@dataclass(frozen=True)
class _Ball:
    """The coefficients of shells 1 ... n//2 of a cube's rfft layout.

    Attributes:
        index: (K,) int64 places in the flattened layout.
        shell: (K,) int64.
        weight: (K,) float64, 2 where the missing half has the same coefficient.
        direction: (K, 3) float32 unit vectors (x, y, z).
    """

    n: int
    index: Tensor
    shell: Tensor
    weight: Tensor
    direction: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> _Ball:
        z, y, x = torch.broadcast_tensors(*rfft_frequencies((n,) * 3, device))
        k = torch.stack((x, y, z), dim=-1).reshape(-1, 3).float()
        radius = k.norm(dim=-1)
        shell = radius.double().round().long()
        index = ((shell > 0) & (shell <= n // 2)).nonzero()[:, 0]
        weight = rfft_multiplicity((n,) * 3, device).expand(z.shape).flatten()[index]
        return cls(n, index, shell[index], weight, k[index] / radius[index, None])

    def sums(self, values: list[Tensor], inside: Tensor) -> Tensor:
        """(len(values), n//2+1) sums over the shells of (K,) values, of the coefficients where `inside` (K,) is true."""
        shell = self.shell[inside]
        return torch.stack([
            torch.zeros(self.n // 2 + 1, dtype=torch.float64, device=shell.device).index_add_(0, shell, v[inside])
            for v in values
        ])  # fmt: skip

    def cones(self, axes: Tensor, half_angle: float) -> list[Tensor]:
        """(K,) bool for each axis: which coefficients lie within `half_angle` degrees of it, or of its opposite."""
        least = math.cos(math.radians(half_angle)) - _TINY
        return [(self.direction @ axis).abs() >= least for axis in axes.to(self.direction)]

    def products(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """Re A·B*, |A|² and |B|² of two maps, weighted: (K,) float64 each."""
        fa, fb = (torch.fft.rfftn(v).flatten()[self.index].to(torch.complex128) for v in (a, b))
        return [self.weight * v for v in ((fa * fb.conj()).real, fa.abs() ** 2, fb.abs() ** 2)]


def _correlation(sums: Tensor) -> Tensor:
    cross, first, second = sums[:3]
    norm = (first * second).sqrt()
    return torch.where(norm > 0, cross / norm, 0.0)


def conical_fsc(a: Tensor, b: Tensor, axes: Tensor, half_angle: float = HALF_ANGLE) -> tuple[Tensor, Tensor]:
    """FSC of two maps within double cones: the sums of each shell over the cone's coefficients alone.

    Diebolder et al. 2015, J. Struct. Biol. 190, 215.

    Args:
        a, b: (n, n, n) real.
        axes: (C, 3) unit vectors (x, y, z).
        half_angle: degrees; 90 is the whole shell.

    Returns:
        curves (C, n//2+1) float64, 1 in shell 0, and how many coefficients each is of (C, n//2+1), both halves of the
        transform.
    """
    ball = _Ball.of(a.shape[-1], a.device)
    values = [*ball.products(a, b), ball.weight]
    sums = torch.stack([ball.sums(values, inside) for inside in ball.cones(axes, half_angle)])
    curves = torch.stack([_correlation(cone) for cone in sums])
    curves[:, 0] = 1.0
    return curves, sums[:, 3]


@dataclass(frozen=True)
class Directions:
    """The FSC of two half maps by direction.

    Attributes:
        pixel_size: Å.
        box: n.
        axes: (C, 3) unit vectors (x, y, z), z > 0.
        half_angle: degrees.
        curves: (C, n//2+1) FSC within each cone, corrected for the mask where there is one.
        counts: (C, n//2+1) coefficients of each.
        sphere: (n//2+1,) FSC of all directions, corrected likewise.
        crossings: by threshold (0.143, half_bit, one_bit), (C,) Å, of the curves averaged over three shells. Noise of the
            curves spreads them: by a factor of 1.2 to 1.5 between the worst and the best of isotropic maps.
        used: (C, n//2+1) what filters are made of: 0 ... 1, led to zero where the signal of the cone ends.
    """

    pixel_size: float
    box: int
    axes: Tensor
    half_angle: float
    curves: Tensor
    counts: Tensor
    sphere: Tensor
    crossings: dict[str, Tensor]
    used: Tensor

    @property
    def anisotropy(self) -> float:
        """Resolution of the worst direction over that of the best, at 0.143; 1 for an isotropic map."""
        return float(self.crossings["0.143"].max() / self.crossings["0.143"].min())

    @property
    def sphericity(self) -> float:
        """Of the surface out to which the resolution reaches in frequency: π^(1/3) (6V)^(2/3) / A, 1 for a ball.

        The measure of Tan et al. 2017 (Nat. Methods 14, 793). The surface is the crossing at 0.143, expanded from the
        cones onto directions; area and volume are integrals over them.
        """
        return sphericity(self.axes, 1 / self.crossings["0.143"], self.half_angle)

    def table(self) -> dict[str, Any]:
        """All of it as plain numbers, for JSON."""
        at = self.crossings["0.143"]
        worst, best = int(at.argmax()), int(at.argmin())
        return {
            "half_angle": self.half_angle,
            "worst": {"axis": self.axes[worst].tolist(), "resolution": float(at[worst])},
            "best": {"axis": self.axes[best].tolist(), "resolution": float(at[best])},
            "anisotropy": self.anisotropy,
            "sphericity": self.sphericity,
            "axes": self.axes.tolist(),
            "resolutions": {name: values.tolist() for name, values in self.crossings.items()},
            "curves": self.curves.tolist(),
        }

    def text(self) -> str:
        """A line for each cone: its axis and its resolutions."""
        lines = ["# x y z " + " ".join(f"Å({name})" for name in self.crossings)]
        for axis, values in zip(self.axes.tolist(), zip(*self.crossings.values(), strict=True), strict=True):
            lines.append(" ".join(f"{v:8.5f}" for v in axis) + " " + " ".join(f"{float(v):8.3f}" for v in values))
        return "\n".join(lines) + "\n"

    def volume(self) -> Tensor:
        """(n, n, n//2+1) float32: the FSC at every coefficient, rfft layout, 1 at the origin, 0 beyond shell n//2."""
        return expand(self.used, self.axes, self.half_angle, self.box)

    def centred_volume(self) -> Tensor:
        """(n, n, n) float32: `volume` of the whole transform with the origin at n//2, to be looked at."""
        k = torch.arange(self.box, device=self.used.device) - self.box // 2
        z, y, x = torch.meshgrid(k, k, k, indexing="ij")
        sign = torch.where(x < 0, -1, 1)
        return self.volume()[(sign * z) % self.box, (sign * y) % self.box, x.abs()]

    def gain(self) -> Tensor:
        """(n, n, n//2+1) float32: the Wiener filter of the mean of both halves, `wiener_gain` of `volume`."""
        return wiener_gain(self.volume())


def wiener_gain(fsc: Tensor) -> Tensor:
    """Gain of the mean of two half maps that brings it nearest to the truth within the mask: C_ref² = 2 F/(1 + F).

    The signal's share S/(S + N/2) of the mean's power, with F = S/(S + N) of two halves. C_ref is the figure of merit
    of Rosenthal & Henderson 2003 (J. Mol. Biol. 333, 721). The F of the masked maps makes it the volume-normalised filter
    of Sindelar & Grigorieff 2012 (J. Struct. Biol. 180, 26): the noise of the solvent has no part in it.

    Args:
        fsc: any shape.
    """
    f = fsc.clamp(0.0, 1.0)
    return 2 * f / (1 + f)


def _end(excess: Tensor) -> Tensor:
    """(C,) shells before the first run of `RUN_BELOW` shells where `excess` (C, S) is negative; S - 1 where there is none."""
    below = (excess[:, 1:] < 0).long().unfold(1, RUN_BELOW, 1).sum(dim=-1) == RUN_BELOW
    last = excess.shape[1] - 1
    return torch.where(below.any(dim=1), below.long().argmax(dim=1), last)


def _thresholds(counts: Tensor, share: float) -> dict[str, Tensor]:
    """(C, S) each: 0.143 and the information thresholds of so many coefficients."""
    frequency = torch.zeros_like(counts[0])
    curves = {
        name: torch.stack([
            information_threshold(Curve(frequency, frequency, count.clamp_min(1.0)), bits, 0.5 * share).values
            for count in counts
        ])
        for name, bits in BITS.items()
    }  # fmt: skip
    return {"0.143": torch.full_like(counts, GOLD_STANDARD), **curves}


def directional_resolution(
    half1: Tensor,
    half2: Tensor,
    pixel_size: float,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    axes: Tensor | None = None,
    half_angle: float = HALF_ANGLE,
) -> Directions:
    """FSC of two half maps within cones, where each crosses the thresholds, and how far it may be believed.

    Shells where a cone has so few independent coefficients that half a bit needs an FSC of 1 take the FSC of the whole
    shell. For filters a curve ends before the first `RUN_BELOW` shells where, averaged over three, it is below 0.143, and is
    led to zero over `CUT_EDGE` shells. An end between one bit and half a bit (emClarity 16.8.6) costs a weak map more than
    noise does: a cone has so few coefficients that half a bit is a high threshold.

    Args:
        half1, half2: (n, n, n), unmasked.
        pixel_size: Å.
        mask: (n, n, n) in 0 ... 1; with it the curves are corrected by phase randomisation (Chen et al. 2013).
        generator: of the random phases, on the maps' device.
        axes: (C, 3) unit vectors; None: `cone_axes`.
        half_angle: degrees.

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    axes = cone_axes() if axes is None else axes
    share = 1.0
    if mask is None:
        whole = fourier_shell_correlation(half1, half2).values
        curves, counts = conical_fsc(half1, half2, axes, half_angle)
    else:
        share = independent_fraction(mask)
        spherical = corrected_fsc(half1, half2, mask, generator)
        whole = spherical.corrected.values
        masked, counts = conical_fsc(half1 * mask, half2 * mask, axes, half_angle)
        below = (spherical.unmasked.values[1:] < RANDOMISE_BELOW).nonzero()
        start = int(below[0]) + 1 if len(below) else len(whole)
        chance = torch.zeros_like(masked)
        for _ in range(RANDOMISATIONS):
            noise = [phase_randomise(half, start, generator) * mask for half in (half1, half2)]
            chance += conical_fsc(noise[0], noise[1], axes, half_angle)[0] / RANDOMISATIONS
        kept = torch.arange(len(whole), device=whole.device) < start + 2
        curves = torch.where(kept, masked, (masked - chance) / (1 - chance).clamp_min(_TINY))
    levels = _thresholds(counts, share)
    sparse = levels["half_bit"] >= 1
    curves = torch.where(sparse, whole, curves)
    smooth = _smooth(curves, counts)
    ends = _end(smooth - GOLD_STANDARD)
    crossings = {name: _crossings(smooth, level, pixel_size, half1.shape[-1]) for name, level in levels.items()}
    return Directions(
        pixel_size,
        half1.shape[-1],
        axes,
        half_angle,
        curves,
        counts,
        whole,
        crossings,
        _led_to_zero(curves, ends),
    )


def _smooth(curves: Tensor, counts: Tensor) -> Tensor:
    """Curves (C, S) averaged over three neighbouring shells, weighted by their coefficients; shell 0 stays 1.

    One shell of a cone dips below a threshold by chance, and the first such shell of all is what would be found.
    """
    sums = [
        functional.avg_pool1d(functional.pad(v, (1, 1)), 3, 1) for v in (curves[:, 1:] * counts[:, 1:], counts[:, 1:])
    ]
    return torch.cat((curves[:, :1], sums[0] / sums[1].clamp_min(_TINY)), dim=1)


def _crossings(curves: Tensor, level: Tensor, pixel_size: float, box: int) -> Tensor:
    """(C,) Å where each curve first falls below its threshold, shells that need an FSC of 1 aside."""
    frequency = torch.arange(curves.shape[1], dtype=torch.float64, device=curves.device) / box
    attainable = torch.where(level < 1, level, curves)
    found = [
        resolution_at(Curve(frequency, values, values), at, pixel_size)
        for values, at in zip(curves, attainable, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def believable(curves: Tensor, counts: Tensor, share: float = 1.0) -> Tensor:
    """Curves (C, S) to make filters of: 0 ... 1, led to zero beyond the middle between the ends of one and of half a bit.

    Args:
        curves: (C, S) FSC.
        counts: (C, S) coefficients of each.
        share: of them that is independent within the mask, `independent_fraction`.
    """
    levels = _thresholds(counts, share)
    ends = [_end(torch.where(levels[name] < 1, curves - levels[name], 0.0)) for name in BITS]
    return _led_to_zero(curves, 0.5 * (ends[0] + ends[1]))


def _led_to_zero(curves: Tensor, ends: Tensor) -> Tensor:
    """Curves (C, S) within 0 ... 1, led to zero over `CUT_EDGE` shells beyond their ends (C,)."""
    shell = torch.arange(curves.shape[1], dtype=torch.float64, device=curves.device)
    return curves.clamp(0.0, 1.0) * cosine_edge(shell[None] - ends[:, None], 0.0, CUT_EDGE)


def _nearness(directions: Tensor, axis: Tensor, half_angle: float) -> Tensor:
    """(K,) 1 for unit vectors (K, 3) along an axis, either way, falling as cos² to 0 at `half_angle` degrees from it."""
    angle = torch.acos((directions @ axis.to(directions)).abs().clamp_max(1.0))
    return torch.cos((angle / math.radians(half_angle)).clamp_max(1.0) * math.pi / 2) ** 2


def expand(curves: Tensor, axes: Tensor, half_angle: float, box: int) -> Tensor:
    """Values of cones and shells on the Fourier grid: the mean of the cones, weighted by how near their axes are.

    Args:
        curves: (C, box//2+1).
        axes: (C, 3) unit vectors (x, y, z); every direction within `half_angle` degrees of one.
        half_angle: degrees.
        box: n.

    Returns:
        (n, n, n//2+1) float32, rfft layout: the mean of shell 0 at the origin, 0 beyond shell n//2.
    """
    ball = _Ball.of(box, curves.device)
    total = torch.zeros(len(ball.index), device=curves.device)
    weight = torch.zeros_like(total)
    for values, axis in zip(curves.float(), axes, strict=True):
        near = _nearness(ball.direction, axis, half_angle)
        total += near * values[ball.shell]
        weight += near
    out = torch.zeros(box * box * (box // 2 + 1), device=curves.device)
    out[ball.index] = total / weight.clamp_min(_TINY)
    out[0] = curves[:, 0].mean()
    return out.reshape(box, box, box // 2 + 1)


def sphericity(axes: Tensor, radii: Tensor, half_angle: float) -> float:
    """Of the surface at distances `radii` (C,) along the axes (C, 3) and opposite to them: 1 for a ball, else less.

    The radius in any direction is the mean of the cones', weighted as in `expand`; volume ∫ r³/3 and area
    ∫ r sqrt(r² + |∇r|²) are sums over evenly spread directions.
    """
    u = cone_axes(_SURFACE_POINTS)

    def radius(at: Tensor) -> Tensor:
        near = torch.stack([_nearness(at, axis, half_angle) for axis in axes.to(at)], dim=-1)
        return (near @ radii.to(at)) / near.sum(dim=-1)

    across = torch.linalg.cross(u, torch.tensor([1.0, 0.0, 0.0], dtype=u.dtype).expand_as(u))
    across = across / across.norm(dim=-1, keepdim=True)
    slopes = []
    for tangent in (across, torch.linalg.cross(u, across)):
        ends = [math.cos(_STEP) * u + sign * math.sin(_STEP) * tangent for sign in (1, -1)]
        slopes.append((radius(ends[0]) - radius(ends[1])) / (2 * _STEP))
    r = radius(u)
    volume = 4 * math.pi * float((r**3).mean()) / 3
    area = 4 * math.pi * float((r * (r**2 + slopes[0] ** 2 + slopes[1] ** 2).sqrt()).mean())
    return math.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area
