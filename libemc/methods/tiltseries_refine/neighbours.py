"""What the images of a particle show of others: the prediction of a tile holds all particles that project into it.

All particles of a tilt series, of all kinds, are drawn onto one image of each tilt, each with its pose, its CTF, its contrast;
out of that the patches of each particle are cut as its images were, without itself. Everything that is compared with the
particle's images is drawn with the references of the particle's own half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.extract import background
from libemc.methods.joint.fit import Member
from libemc.methods.subtilts import GEOMETRY, Particles, Stack, TiltGeometry, transfer_function
from libemc.numerics import fourier, slices
from libemc.numerics.patches import cut_patches
from libemc.numerics.rotations import matrix_from_rotvec
from libemc.numerics.slices import Band, FourierVolume
from libemc.records import Alignment

AT_ONCE = 64
"""Particles that are drawn together."""


@dataclass(frozen=True)
class WithoutNeighbours:
    """A stack less what neighbours show, its images numbered particle·T + tilt by the particles' order.

    Attributes:
        stack: of the particles; place: (N,) of each in it.
        others: (N·T, box, box) what neighbours show.
    """

    stack: Stack
    place: NDArray[np.int64]
    tilts: int
    others: NDArray[Any]

    def __getitem__(self, number: NDArray[np.int64]) -> NDArray[np.float32]:
        particle, tilt = np.divmod(number, self.tilts)
        found = np.asarray(self.stack[self.place[particle] * self.tilts + tilt], dtype=np.float32)
        return found - self.others[number].astype(np.float32)


def centres(particles: Particles, raw: bool) -> Tensor:
    """(N, T, 2) px: where the patches are centred in an image, from its middle.

    Args:
        raw: by the geometry that they were cut with; else as the tilts' present geometry has it, but for a common shift.
    """
    file = particles.file
    if raw and file.raw is not None:
        alignment = Alignment(**{name: getattr(file.raw, name) for name in GEOMETRY})
        return TiltGeometry.of(alignment, file.tilts.use).project(particles.centre)[0] / file.pixel_size
    q = torch.einsum("tij,nj->nti", particles.series.matrices[:, :2], particles.centre)
    return q * particles.series.magnification[:, None] / file.pixel_size


def in_patch(particles: Particles) -> Tensor:
    """(N, T, 2) px: where a patch shows its particle, from the patch's middle."""
    q = torch.einsum("tij,nj->nti", particles.series.matrices[:, :2], particles.xyz - particles.centre)
    moved = (q + particles.corrections.shift) * particles.series.magnification[:, None]
    return moved / particles.file.pixel_size


@dataclass(frozen=True)
class _Brush:
    """Draws the particles of one kind."""

    particles: Particles
    parts: Tensor
    volumes: list[tuple[FourierVolume, FourierVolume]]
    band: Band
    contrast: Tensor
    place: Tensor
    scale: Tensor

    @staticmethod
    def of(member: Member, contrast: Tensor, raw: bool, box: int, scale: Tensor) -> _Brush:
        p = member.particles
        radius = min(box / 2, box * p.file.pixel_size / member.resolution)
        place = centres(p, raw) + in_patch(p)
        return _Brush(p, member.parts, member.references.volumes(radius), Band.of(box, radius), contrast, place, scale)

    def patches(self, who: Tensor, tilt: int, half: int) -> tuple[Tensor, Tensor]:
        """Pictures (P, box, box) of particles (P,), and the pixels (P, 2), from the image's middle, on which they centre."""
        p, own = self.particles, self.particles.corrections
        q = torch.einsum("ij,nj->ni", p.series.matrices[tilt], (p.xyz - p.centre)[who])
        defocus = p.defocus[who, tilt] + own.defocus[who, tilt] + p.series.handedness * q[:, 2]
        tilts = torch.full((len(who),), tilt)
        transfer = transfer_function(p.series, tilts, defocus, p.lens[who, tilt], self.band, p.file.pixel_size)
        matrices = matrix_from_rotvec(own.turn[who, tilt]) @ p.series.matrices[tilt] @ p.rotation[who]
        magnification = p.series.magnification[tilts]
        cut = torch.zeros(len(who), len(self.band.kx), dtype=torch.complex64)
        for part, volumes in enumerate(self.volumes):  # the one without the particle: its noise is the image's own
            mine = self.parts[who] == part
            if mine.any():
                cut[mine] = slices.extract_slices(volumes[half - 1], matrices[mine], self.band, magnification[mine])
        nearest = torch.floor(self.place[who, tilt] + 0.5)
        rest = self.place[who, tilt] - nearest
        values = cut * transfer * slices.shift_phases(rest, self.band)
        strength = (self.contrast[who, tilt] * self.scale[tilt]).float()
        return slices.images_from_band(values * strength[:, None], self.band), nearest.long()


def shown_by_others(
    members: Sequence[Member], contrasts: Sequence[Tensor], target: int, out: NDArray[Any]
) -> NDArray[Any]:
    """What neighbours show in the images of the particles of one kind, in the units of its stack.

    Args:
        members: all kinds in the tilt series; those of another sampling than the target's take no part.
        contrasts: (N, T) of each kind, over its references.
        target: which of them.
        out: (N·T, box, box) to be filled.
    """
    mine = members[target].particles
    box, pixel_size, tilts = mine.file.box, mine.file.pixel_size, len(mine.series.use)
    same = [k for k, m in enumerate(members) if abs(m.particles.file.pixel_size / pixel_size - 1) < 1e-3]
    raw = all(members[k].particles.file.raw is not None for k in same)
    brushes = {k: _brush(members, contrasts[k], k, target, raw) for k in same}
    middle = centres(mine, raw)
    low = torch.stack([b.place.amin((0, 1)) for b in brushes.values()]).amin(0).minimum(middle.amin((0, 1)))
    high = torch.stack([b.place.amax((0, 1)) for b in brushes.values()]).amax(0).maximum(middle.amax((0, 1)))
    largest = max(b.band.box for b in brushes.values()) + box
    origin = ((low + high) / 2).round()
    size = [2 * math.ceil(float(s) / 2) for s in (high - low) + 2 * largest]
    outside = background(box).double()
    for tilt in torch.nonzero(mine.series.use)[:, 0].tolist():
        for half in (1, 2):
            who = torch.nonzero(mine.visible[:, tilt] & (mine.half == half) & mine.use)[:, 0]
            if not len(who):
                continue
            canvas = np.zeros((size[1], size[0]), dtype=np.float32)
            for brush in brushes.values():
                counted = torch.nonzero(brush.contrast[:, tilt] > 0)[:, 0]
                for some in counted.split(AT_ONCE):
                    _paste(canvas, *brush.patches(some, tilt, half), origin, 1)
            for some in who.split(AT_ONCE):
                cut, rest = cut_patches([canvas] * len(some), middle[some, tilt] - origin, box)
                own = brushes[target].contrast[some, tilt] > 0
                for k, (patch, nearest) in enumerate(zip(*brushes[target].patches(some, tilt, half), strict=True)):
                    if own[k]:
                        corner = torch.floor(middle[some[k], tilt] - origin + 0.5) + origin
                        _paste(cut[k].numpy(), patch[None], nearest[None], corner, -1)
                shifted = fourier.shift_and_resize(cut.double(), -rest, (box, box))
                level = (shifted * outside).sum((1, 2), keepdim=True) / outside.sum()  # patches have a background of 0
                out[some.numpy() * tilts + tilt] = (shifted - level).numpy()
    return out


def _brush(members: Sequence[Member], contrast: Tensor, k: int, target: int, raw: bool) -> _Brush:
    """Of one kind, for the stack of another."""
    mine, other = members[target].particles.file, members[k].particles
    scale = torch.ones(len(other.series.use), dtype=torch.float64)
    if raw and other.file.raw is not None and mine.raw is not None:  # stacks are in units of their own noise
        own, its = torch.tensor(mine.raw.noise), torch.tensor(other.file.raw.noise)
        scale = torch.where(own > 0, its / own.clamp_min(1e-30), 1.0).double()
    return _Brush.of(members[k], contrast, raw, other.file.box, scale)


def _paste(canvas: NDArray[np.float32], patches: Tensor, at: Tensor, origin: Tensor, sign: int) -> None:
    """Add patches (P, n, n) to a canvas *in place*, centred on pixels `at` (P, 2) when the canvas's middle is `origin`."""
    rows, columns = canvas.shape
    n = patches.shape[-1]
    x0s, y0s = (at - origin.long() + torch.tensor([columns // 2, rows // 2]) - n // 2).unbind(1)
    for patch, x, y in zip(patches.numpy(), x0s.tolist(), y0s.tolist(), strict=True):
        left, right, top, bottom = max(x, 0), min(x + n, columns), max(y, 0), min(y + n, rows)
        if left < right and top < bottom:
            canvas[top:bottom, left:right] += sign * patch[top - y : bottom - y, left - x : right - x]


def without_neighbours(members: Sequence[Member], others: Sequence[NDArray[Any]]) -> list[Member]:
    """The members with what others show taken off their images."""
    out = []
    for m, shown in zip(members, others, strict=True):
        p = m.particles
        stack = WithoutNeighbours(p.stack, p.place.numpy(), len(p.series.use), shown)
        out.append(replace(m, particles=replace(p, stack=stack, place=torch.arange(len(p)))))
    return out


def with_neighbours(members: Sequence[Member], before: Sequence[Member]) -> list[Member]:
    """The members with the images that they had before."""
    return [
        replace(m, particles=replace(m.particles, stack=b.particles.stack, place=b.particles.place))
        for m, b in zip(members, before, strict=True)
    ]
