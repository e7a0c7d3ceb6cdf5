"""The joint fit of one tilt series: corrections and poses of all its particles, by the levels that are on.

Gauss-Newton: measure the evidence where everything is now, solve the linear problem with all of its neighbours in space and
time, go there, and again; in coarse data first, since a period of the finest is soon jumped. Particles of several kinds share
what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from libemc.methods.joint.evidence import (
    ASTIGMATISM,
    DEFOCUS,
    GEOMETRY,
    LENS,
    PARAMETERS,
    SHIFT,
    TURN,
    Evidence,
    measure,
)
from libemc.methods.joint.levels import POSE, Case, Choice, Scene
from libemc.methods.joint.solve import solve, spread
from libemc.methods.joint.terms import total
from libemc.methods.refine.left_out import References
from libemc.methods.refine.motion import Walk
from libemc.methods.subtilts import Particles, Progress, noise_spectrum
from libemc.numerics.rotations import matrix_from_rotvec
from libemc.numerics.slices import Band

COARSE = 2.0
"""Times the finest period: of the data that a fit begins in."""
STEPS = (2, 2)
"""Gauss-Newton steps in coarse and in fine data."""
PRECISION = 0.3
"""Å within which a path follows the shifts of its images."""
LEAST_RADIUS = 4.0
"""Fourier pixels of the coarsest band."""


@dataclass(frozen=True)
class Member:
    """The particles of one kind in a tilt series, and what they are compared with.

    Attributes:
        particles: with their present poses and corrections.
    """

    particles: Particles
    references: References

    @property
    def resolution(self) -> float:
        """Å, finest data that takes part."""
        return self.references.resolution

    @property
    def parts(self) -> Tensor:
        """(N,) which of the references each is compared with."""
        return self.references.parts[self.particles.file.name]

    @property
    def taken(self) -> Tensor:
        """(N,) bool: those that take part."""
        return self.particles.use & (self.particles.weight > 0)

    def evidence(self, resolution: float, memory: int, progress: Progress | None = None) -> Evidence:
        """All images with their present weights taken off, in data to a resolution in Å."""
        file = self.particles.file
        band = Band.of(file.box, max(LEAST_RADIUS, file.box * file.pixel_size / resolution))
        volumes = self.references.volumes(band.radius)
        every = self.particles.corrected(weight=torch.ones_like(self.particles.corrections.weight))
        noise = noise_spectrum(self.particles, band)
        return measure(every, self.taken, self.parts, volumes, band, noise, memory, progress)


def joined(found: Sequence[Evidence]) -> Evidence:
    """The evidence of several kinds as one, particle after particle."""
    return Evidence(*(torch.cat([getattr(e, f.name) for e in found]) for f in fields(Evidence)))


def scene_of(members: Sequence[Member]) -> Scene:
    """Where all of the particles are."""
    series = members[0].particles.series
    finest = min(m.resolution for m in members)
    return Scene(series.matrices, torch.cat([m.particles.xyz for m in members]), Walk.of(series, finest).basis)


def present(members: Sequence[Member]) -> Tensor:
    """(N, T, 8): the corrections that particles have, beside the present alignment."""
    out = []
    for m in members:
        own = m.particles.corrections
        u = torch.zeros(*own.defocus.shape, PARAMETERS, dtype=torch.float64)
        u[..., TURN], u[..., DEFOCUS] = own.turn, own.defocus[..., None]
        u[..., SHIFT] = own.shift - m.particles.realigned()
        out.append(u)
    return torch.cat(out)


def cases(
    members: Sequence[Member],
    groups: Sequence[Tensor],
    base: Tensor | None,
    memory: int,
    progress: Progress | None = None,
) -> list[Case]:
    """What levels are chosen by: the groups of particles of a tilt series, as in `fit`, in the finest data."""
    evidence, scene = measured(members, memory, progress), scene_of(members)
    there = present(members) if base is None else present(members) - base
    return [Case(replace(scene, xyz=scene.xyz[g]), evidence.some(g), there[g]) for g in groups]


def measured(members: Sequence[Member], memory: int, progress: Progress | None = None) -> Evidence:
    """The evidence of all members as one, in the finest data."""
    return joined([m.evidence(m.resolution, memory, progress) for m in members])


@dataclass(frozen=True)
class Fit:
    """What a fit ends with.

    Attributes:
        members: particles at their new poses, with their new corrections.
        numbers: for each group, those (m, k, c) of its levels' terms by their names.
    """

    members: list[Member]
    numbers: list[dict[str, Tensor]]


def fit(
    members: Sequence[Member],
    groups: Sequence[Tensor],
    choices: Sequence[Choice],
    base: Tensor | None,
    memory: int,
    progress: Progress | None = None,
) -> Fit:
    """Fit the particles of one tilt series.

    Args:
        groups: particles, numbered through all members, that are fitted by themselves; together all of them.
        choices: the levels that are on. Without one of the geometry, poses and geometry stay; without one of the CTF, that.
        base: (N, T, 8) corrections, as of `present`, on top of which the levels come; None: levels make up all of them.
    """
    scene, now = scene_of(members), list(members)
    corrections, lens = present(members), torch.cat([m.particles.lens for m in members])
    base = torch.zeros_like(corrections) if base is None else base
    numbers: list[dict[str, Tensor]] = [{} for _ in groups]
    for number, steps in enumerate(STEPS):
        for _ in range(steps):
            coarser = COARSE if number == 0 else 1.0
            evidence = joined([m.evidence(m.resolution * coarser, memory, progress) for m in now])
            pose = torch.zeros(len(corrections), 6, dtype=torch.float64)
            target = corrections.clone()
            for group, share in zip(groups, numbers, strict=True):
                own = replace(scene, xyz=scene.xyz[group])
                for part in (GEOMETRY, LENS):
                    some = [c for c in choices if c.level.lens == (part is LENS)]
                    if not some:
                        continue
                    e = evidence.some(group).part(part)
                    terms = [own.term(c) for c in some]
                    free = [] if part is LENS else [own.pose()]
                    slope = e.about((corrections - base)[group][..., part])
                    w = solve(slope, e.curvature, [*free, *terms])
                    if free:
                        pose[group] = w[0][:, 0]
                        w = w[1:]
                    target[group, :, part] = base[group, :, part] + total(terms, w)
                    share |= {c.level.name: x for c, x in zip(some, w, strict=True)}
            corrections = target
            now = _at(now, corrections, lens, pose)
    return Fit(now, numbers)


def _at(members: Sequence[Member], corrections: Tensor, lens: Tensor, pose: Tensor) -> list[Member]:
    """With corrections (N, T, 8) about astigmatism `lens` (N, T, 3), and poses moved by (N, 6) of `POSE`."""
    out, first = [], 0
    for m in members:
        mine = slice(first, first + len(m.particles))
        first = mine.stop
        u, p, step = corrections[mine], m.particles, pose[mine]
        turned = matrix_from_rotvec(POSE[0] * step[:, :3]) @ p.rotation
        moved = p.moved(turned, p.xyz + POSE[1] * step[:, 3:], p.score)
        shift = u[..., SHIFT] + p.realigned()
        moved = moved.corrected(turn=u[..., TURN].clone(), shift=shift, defocus=u[..., 5].clone())
        if u[..., ASTIGMATISM].any():
            moved = replace(moved, lens=with_astigmatism(lens[mine], u[..., ASTIGMATISM]))
        out.append(replace(m, particles=moved))
    return out


def with_astigmatism(lens: Tensor, more: Tensor) -> Tensor:
    """(N, T, 3) astigmatism, angle and phase shift `lens` with `more` (N, T, 2) of astigmatism added."""
    angle = torch.deg2rad(2 * lens[..., 1])
    x, y = lens[..., 0] * angle.cos() + more[..., 0], lens[..., 0] * angle.sin() + more[..., 1]
    return torch.stack([torch.hypot(x, y), torch.rad2deg(torch.atan2(y, x)) / 2 % 180, lens[..., 2]], dim=-1)


def paths(particles: Particles, motion: Choice, resolution: float) -> Tensor:
    """(N, T, 3) Å: how particles move along the exposure, as the shifts of their images beside the present alignment say.

    What an image doesn't show of a path is what the level of motion expects of it, by its neighbours in time and space.

    Args:
        resolution: Å, whose detail is where a particle's position is.
    """
    scene = Scene(particles.series.matrices, particles.xyz, Walk.of(particles.series, resolution).basis)
    term = scene.term(motion)
    seen = (particles.shown & particles.use[:, None])[..., None].double()
    known = torch.zeros(*particles.visible.shape, 5, dtype=torch.float64)
    known[..., SHIFT] = (particles.corrections.shift - particles.realigned()) * seen / PRECISION**2
    curvature = torch.zeros(*known.shape, 5, dtype=torch.float64)
    curvature[..., SHIFT, SHIFT] = seen[..., None] * torch.eye(2, dtype=torch.float64) / PRECISION**2
    (numbers,) = solve(known, curvature, [term])
    return motion.strength * term.described(numbers)


def errors(members: Sequence[Member], evidence: Evidence, choices: Sequence[Choice], seed: int) -> dict[str, Tensor]:
    """Standard deviations (m, k, c) of the levels' numbers by their names, when all particles are fitted together.

    Args:
        evidence: of all members.
    """
    scene, out = scene_of(members), dict[str, Tensor]()
    for part in (GEOMETRY, LENS):
        some = [c for c in choices if c.level.lens == (part is LENS)]
        if some:
            free = [] if part is LENS else [scene.pose()]
            found = spread(evidence.part(part).curvature, [*free, *map(scene.term, some)], seed)
            out |= {c.level.name: e for c, e in zip(some, found[len(free) :], strict=True)}
    return out


def rms_shift(evidence: Evidence) -> Tensor:
    """(T,) Å rms per axis by which single images would shift their particles; NaN where a tilt shows nothing.

    Each image is weighed by what it tells. Its own noise is in it, the least that can be left: 1 / sqrt(curvature).
    """
    h = evidence.curvature[..., SHIFT, SHIFT]
    weight = torch.where(evidence.seen, h.diagonal(dim1=-1, dim2=-2).sum(-1), 0.0)
    step = torch.linalg.solve(h + 1e-9 * torch.eye(2, dtype=torch.float64), evidence.slope[..., SHIFT, None])[..., 0]
    power = (weight * (step**2).sum(-1)).sum(0) / weight.sum(0)
    return torch.where(weight.sum(0) > 0, (power / 2).sqrt(), math.nan)
