"""What a joint fit changes of a tilt series, and the alignment, CTF and particles that have it.

The fit describes everything as corrections of single images. What tilts have in common becomes the new geometry and CTF here,
so that a particle is seen exactly where its corrections said; the rest stays with the particles as their motion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from libemc.methods.joint import levels
from libemc.methods.joint.fit import with_astigmatism
from libemc.methods.joint.levels import Choice, Scene
from libemc.methods.joint.terms import Smooth
from libemc.methods.subtilts import Field, Particles, SeriesModel, TiltGeometry
from libemc.numerics.rotations import matrix_from_rotvec, rotvec_from_matrix, tilt_angles_from_matrix
from libemc.records import Alignment, Ctf, Deformation, ParticleFile, ParticleTilts

NODES = (3, 15)
"""Fewest and most nodes of a deformation along each side."""


@dataclass(frozen=True)
class Change:
    """Of T tilts, float64; errors are standard deviations, zero where nothing was fitted.

    Attributes:
        shift: (T, 2) Å, before the magnification; turn: (T, 3) degrees, rotation vector in the image's frame.
        magnification: (T,) factor. defocus: (T,) Å. astigmatism: (2,) Å, (U-V)/2 times cos and sin of twice its angle.
        shift_error: (T, 2); turn_error: (T, 3); defocus_error: (T,); astigmatism_error: (2,).
    """

    shift: Tensor
    turn: Tensor
    magnification: Tensor
    defocus: Tensor
    astigmatism: Tensor
    shift_error: Tensor
    turn_error: Tensor
    defocus_error: Tensor
    astigmatism_error: Tensor

    @staticmethod
    def none(tilts: int) -> Change:
        """No change."""
        two, three, one = (torch.zeros(tilts, n, dtype=torch.float64) for n in (2, 3, 1))
        flat, pair = one[:, 0], torch.zeros(2, dtype=torch.float64)
        return Change(two, three, flat + 1, flat, pair, two, three, flat, pair)

    @staticmethod
    def of(
        choices: Sequence[Choice], numbers: Mapping[str, Tensor], errors: Mapping[str, Tensor], tilts: int
    ) -> Change:
        """From the numbers (m, k, c) of the levels' terms, and their errors, by the levels' names."""
        out = Change.none(tilts)
        for c in choices:
            w = numbers[c.level.name][0] * c.strength
            e = errors[c.level.name][0] * c.strength if c.level.name in errors else torch.zeros_like(w)
            if c.level is levels.SHIFT:
                out = replace(out, shift=w, shift_error=e)
            elif c.level is levels.ANGLES:
                out = replace(out, turn=w, turn_error=e)
            elif c.level is levels.MAGNIFICATION:
                out = replace(out, magnification=1 + w[:, 0] / 100)
            elif c.level is levels.DEFOCUS:
                out = replace(out, defocus=w[:, 0], defocus_error=e[:, 0])
            elif c.level is levels.ASTIGMATISM:
                out = replace(out, astigmatism=w[0], astigmatism_error=e[0])
        return out

    def table(self) -> dict[str, Any]:
        """As plain numbers."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Change:
        """The inverse of `table`."""
        return Change(**{f.name: torch.tensor(table[f.name], dtype=torch.float64) for f in fields(Change)})

    def then(self, more: Change) -> Change:
        """This change and another one on top of it; small turns add up.

        Of the astigmatism the other one has all: lenses that were fitted aren't kept with the particles from fit to fit.
        """
        return replace(
            more,
            shift=self.shift + more.shift,
            turn=self.turn + more.turn,
            magnification=self.magnification * more.magnification,
            defocus=self.defocus + more.defocus,
        )

    def matrices(self, old: Tensor) -> Tensor:
        """(T, 3, 3) specimen to image, of the old ones."""
        return matrix_from_rotvec(self.turn) @ old

    def angles(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """(3, T) degrees by which axis, tilt and off-axis tilt change from the matrices (T, 3, 3) before, and their errors."""
        now = self.matrices(old)

        def between(a: Tensor, b: Tensor) -> Tensor:
            x, y = (torch.stack(tilt_angles_from_matrix(m)) for m in (a, b))
            return (y - x + 180) % 360 - 180

        moved = [between(now, matrix_from_rotvec(self.turn_error * axis) @ now) for axis in torch.eye(3).double()]
        return between(old, now), torch.stack(moved).norm(dim=0)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def aligned(old: Alignment, use: Sequence[bool], change: Change, deformation: Deformation | None) -> Alignment:
    """An alignment with the change, and a deformation in the place of its own where there is one."""
    geometry = TiltGeometry.of(old, use)
    axis, tilt, xtilt = (_floats(a) for a in tilt_angles_from_matrix(change.matrices(geometry.matrices)))
    shift = (geometry.shift + change.shift) / change.magnification[:, None]
    scaled = bool((change.magnification != 1).any()) or old.magnification is not None
    return old.model_copy(
        update={
            "axis": axis,
            "tilt": tilt,
            "xtilt": xtilt,
            "shift_x": _floats(shift[:, 0]),
            "shift_y": _floats(shift[:, 1]),
            "magnification": _floats(geometry.magnification * change.magnification) if scaled else None,
            "deformation": deformation or old.deformation,
        }
    )


def focused(old: Ctf, change: Change, handedness: int, beam_tilt: tuple[float, float] | None) -> Ctf:
    """A CTF with the change."""
    names = ("defocus_u", "defocus_v", "angle", "phase_shift")
    u, v, angle, phase = (torch.tensor(getattr(old, n), dtype=torch.float64) for n in names)
    mean = (u + v) / 2 + change.defocus
    lens = with_astigmatism(torch.stack([(u - v) / 2, angle, phase], dim=-1), change.astigmatism.expand(len(u), 2))
    half = lens[:, 0]
    known = bool((change.defocus_error > 0).any())
    return old.model_copy(
        update={
            "defocus_u": _floats(mean + half),
            "defocus_v": _floats(mean - half),
            "angle": _floats(lens[:, 1]),
            "error": _floats(change.defocus_error) if known else old.error,
            "astigmatism_error": 2 * float(change.astigmatism_error.mean())
            if change.astigmatism_error.any()
            else old.astigmatism_error,
            "defocus_handedness": handedness,
            "beam_tilt": beam_tilt,
        }
    )


def settled(particles: Particles, change: Change, beam_tilt: tuple[float, float] | None = None) -> Particles:
    """Particles in the changed geometry: what it explains is taken off their corrections, and no image moves. Their defocus
    follows the height that they have now.

    Args:
        particles: with all of the fit in their corrections. Astigmatism is added to the lenses in their record, whether or not
            they have it already: a lens that was fitted isn't kept when particles are written before they are settled.
        beam_tilt: mrad, of their optics from now on.
    """
    series, file, own = particles.series, particles.file, particles.corrections
    old, new = series.matrices, change.matrices(series.matrices)
    moved = particles.xyz - particles.centre
    scale = change.magnification
    seen = torch.einsum("tij,nj->nti", old[:, :2], moved) + own.shift
    shift = seen / scale[:, None] - torch.einsum("tij,nj->nti", new[:, :2], moved)
    turn = own.turn
    if change.turn.any():
        turn = rotvec_from_matrix(matrix_from_rotvec(own.turn) @ matrix_from_rotvec(change.turn).transpose(1, 2))
    height = torch.einsum("tj,nj->nt", new[:, 2] - old[:, 2], particles.centre)
    axis, tilt, xtilt = (_floats(a) for a in tilt_angles_from_matrix(new))
    lens = _refocused(torch.stack([series.astigmatism, series.astigmatism_angle, series.phase_shift], dim=-1), change)
    lenses = _refocused(Particles.of(file, particles.stack).lens, change)
    tilts: ParticleTilts = file.tilts.model_copy(
        update={
            "axis": axis,
            "tilt": tilt,
            "xtilt": xtilt,
            "magnification": _floats(series.magnification * scale),
            "astigmatism": _floats(lens[:, 0]),
            "astigmatism_angle": _floats(lens[:, 1]),
        }
        | _shifts(file, change)
    )
    defocus = particles.defocus + change.defocus + series.handedness * height
    optics = file.optics if beam_tilt is None else file.optics.model_copy(update={"beam_tilt": beam_tilt})
    own_lens = [p.astigmatism is not None for p in file.particles]
    records = []
    for p, z, mine, has in zip(file.particles, defocus.tolist(), lenses, own_lens, strict=True):
        update: dict[str, Any] = {} if p.defocus is None else {"defocus": tuple(z)}
        if has:
            update |= {"astigmatism": _floats(mine[:, 0]), "astigmatism_angle": _floats(mine[:, 1])}
        records.append(p.model_copy(update=update))
    new_file = file.model_copy(update={"tilts": tilts, "optics": optics, "particles": tuple(records)})
    turn = torch.where(turn.abs() < 1e-9, 0.0, turn)
    corrected = particles.corrected(shift=shift, turn=turn, defocus=own.defocus - change.defocus)
    return replace(corrected, file=new_file, series=SeriesModel.of(new_file), defocus=defocus, lens=lenses)


def _shifts(file: ParticleFile, change: Change) -> dict[str, tuple[float, ...]]:
    """The alignment's shifts after the change; nothing where they aren't known."""
    tilts, raw = file.tilts, file.raw
    if raw is None:
        return {}
    x, y = (raw.shift_x, raw.shift_y) if tilts.shift_x is None else (tilts.shift_x, tilts.shift_y or ())
    shift = (torch.tensor([x, y], dtype=torch.float64).T + change.shift) / change.magnification[:, None]
    return {"shift_x": _floats(shift[:, 0]), "shift_y": _floats(shift[:, 1])}


def _refocused(lens: Tensor, change: Change) -> Tensor:
    """(..., T, 3): astigmatism, angle and phase shift with the change."""
    more = change.astigmatism
    return with_astigmatism(lens, more.expand(*lens.shape[:-1], 2)) if more.any() else lens


@dataclass(frozen=True)
class Bending:
    """A smooth displacement of the specimen or of the images, as the fit left it.

    Attributes:
        smooth: of the particles; numbers: (m, k, c) times the strength; time: (T, k), None: each tilt its own.
        solid: it moves the specimen (c = 3), not the image (c = 2).
    """

    smooth: Smooth
    numbers: Tensor
    time: Tensor | None
    solid: bool

    @staticmethod
    def of(scene: Scene, choice: Choice, numbers: Tensor) -> Bending | None:
        """Of a level that neighbours share over some length; None of others."""
        if choice.level not in (levels.MOTION, levels.FIELD) or not 0 < choice.length < math.inf:
            return None
        solid = choice.level is levels.MOTION
        return Bending(scene.smooth(choice), numbers * choice.strength, scene.walk if solid else None, solid)

    def table(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "points": self.smooth.points.tolist(),
            "length": self.smooth.length,
            "numbers": self.numbers.tolist(),
            "time": None if self.time is None else self.time.tolist(),
            "solid": self.solid,
        }

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Bending:
        """The inverse of `table`."""
        points, numbers = (torch.tensor(table[n], dtype=torch.float64) for n in ("points", "numbers"))
        time = None if table["time"] is None else torch.tensor(table["time"], dtype=torch.float64)
        return Bending(Smooth.of(points, table["length"]), numbers, time, table["solid"])

    def at(self, places: Tensor, tilt: int, matrix: Tensor) -> Tensor:
        """(M, 2) Å along the axes of an image, of specimen points (M, 3) Å."""
        flat = places if self.solid else places * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        modes = self.smooth.at(flat)
        numbers = (
            self.numbers[:, tilt] if self.time is None else torch.einsum("k,mkc->mc", self.time[tilt], self.numbers)
        )
        moved = modes @ numbers
        return moved @ matrix[:2].T if self.solid else moved


def deformation_of(
    bendings: Sequence[Bending], geometry: TiltGeometry, height: float, field: tuple[float, float]
) -> Deformation | None:
    """The field over each image that specimen points in the middle of it follow, added to the geometry's own.

    Args:
        geometry: as it is now; height: Å, z of the points.
        field: Å along x and y of an image.
    """
    if not bendings:
        return None
    shortest = min(b.smooth.length for b in bendings)
    columns, rows = (min(NODES[1], max(NODES[0], round(2 * f / shortest) + 1)) for f in field)
    x, y = (torch.linspace(-f / 2, f / 2, n, dtype=torch.float64) for f, n in zip(field, (columns, rows), strict=True))
    nodes = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    moves = []
    for tilt, matrix in enumerate(geometry.matrices):
        flat = nodes / geometry.magnification[tilt] - geometry.shift[tilt] - matrix[:2, 2] * height
        plane = torch.linalg.solve(matrix[:2, :2], flat.T).T
        places = torch.cat([plane, torch.full((len(plane), 1), height, dtype=torch.float64)], dim=1)
        moved = torch.stack([b.at(places, tilt, matrix) for b in bendings]).sum(0)
        moves.append(moved * geometry.magnification[tilt])
    moved = torch.stack(moves)
    if geometry.deformation is not None:
        moved = moved + _on(geometry.deformation, nodes, len(moved))
    dx, dy = (tuple(tuple(t) for t in moved[..., a].tolist()) for a in (0, 1))
    return Deformation(rows=rows, columns=columns, field=field, dx=dx, dy=dy)


def _on(known: Field, nodes: Tensor, tilts: int) -> Tensor:
    """(T, M, 2) of a field at nodes (M, 2)."""
    return known(nodes[:, None].expand(-1, tilts, 2)).permute(1, 0, 2)
