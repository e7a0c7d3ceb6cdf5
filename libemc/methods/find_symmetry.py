"""Which point group a map has, and where its axes lie.

Shells of the map's Fourier transform, about its centre of mass, are expanded in spherical harmonics. The correlation of
the map with itself, turned by any angle about any axis, is then a sum over the powers of the orders m about that axis:
one table of these serves all groups. A group is sought in it over all of SO(3); then rotation and centre are refined
together, to the largest power within the group's invariant harmonics, and the operators are scored one by one.

What any group about an axis would share (the hollow ball; for Cn and Dn all that is round about the axis) says nothing
about a group and is left out of the scores. With two half maps, one is compared with the other: noise then lowers no
score, a true operator has 1 within the error, and `chance` says how far one without meaning may reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import postprocess
from libemc.numerics import filters, harmonics, masks
from libemc.numerics.grids import centred_coordinates
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance, rotvec_from_matrix
from libemc.numerics.slices import FourierVolume, sample_points
from libemc.numerics.so3 import rotation_grid
from libemc.numerics.symmetry import symmetry_matrices

GROUPS = (*(f"c{n}" for n in range(2, 13)), *(f"d{n}" for n in range(2, 13)), "t", "o", "i")
"""The groups that are compared if none are named."""

SAMPLING = 3.0
"""Voxels per resolution that the map is binned to."""
LARGEST_DEGREE = 36
"""Of the harmonics: what a particle of radius r shows at resolution d has degrees to 2πr/d; beyond, d is made coarser."""
MOST_SHELLS = 20
FIRST_SHELL = 1.5
"""Fourier pixels: nearer to the origin lies what the mask and the mean make."""
AXIS_STEP = 2.0
"""Degrees between axes of the table: a third of the width of a peak at the largest degree."""
GRID_STEP = 3.0
"""Degrees between rotations of groups with several axes."""
APART = 12.0
"""Degrees between two peaks of the coarse search."""
CANDIDATES = 2
"""Peaks of the coarse search of each group that are looked at closely."""
PROMISING = 0.5
"""Groups are refined where their mean correlation is at least this part of the best group's."""
COARSEST_MASK = 30.0
"""Å: the map is smoothed to this, or to the resolution, before the particle is outlined."""
LEAST_REGION = 0.2
"""Of the mass of the largest region of density: smaller ones are not the particle's."""
MASK_EDGE = 12.0
"""Å from the outermost density to where the mask is 0."""
TRUE_OPERATOR = 0.8
"""Part of the expected correlation that the worst operator of a true group has at least."""
WORST_OF_MANY = 2.0
"""Standard deviations that noise may take the worst of a true group's operators further down."""
LEAST_CORRELATION = 0.6
"""Without half maps the expected correlation isn't known; below this no group is believed."""
LARGEST_CHANCE = 0.15
"""Standard deviation of a meaningless operator's correlation beyond which a group can't be told."""


@dataclass(frozen=True)
class GroupScore:
    """How well a map has a group's symmetry.

    Attributes:
        group: its name; order: of how many operators.
        mean, worst: correlation of the map with itself over the operators but the identity, without what is round.
        chance: standard deviation of such a correlation where there is no symmetry.
        share: of the map's power that isn't a ball, what the scores rest on: 1 but for what is round about an axis.
        rotation, shift: the map at R·u + s (s in Å) has the group in the setting of `symmetry_matrices`.
    """

    group: str
    order: int
    mean: float
    worst: float
    chance: float
    share: float
    rotation: tuple[tuple[float, ...], ...]
    shift: tuple[float, float, float]

    @property
    def matrix(self) -> Tensor:
        """R, (3, 3) float64."""
        return torch.tensor(self.rotation, dtype=torch.float64)


@dataclass(frozen=True)
class Ranking:
    """The groups of a map, those that it has first, larger before smaller.

    Attributes:
        scores: of each group.
        chosen: the largest group whose worst operator holds; "c1" if none does.
        expected: correlation that the operators of a true group have: 1 with half maps, else the best group's worst.
        resolution: Å, to which the maps were compared.
        radius: Å, of the particle about its centre.
    """

    scores: tuple[GroupScore, ...]
    chosen: str
    expected: float
    resolution: float
    radius: float

    def of(self, group: str) -> GroupScore:
        """The score of a group."""
        return next(score for score in self.scores if score.group == group.lower())

    def holds(self, score: GroupScore) -> bool:
        """Whether a group's worst operator is as good as is to be expected, and more than chance."""
        return _holds(score, self.expected)

    def table(self) -> dict[str, Any]:
        """All of it as plain numbers, for JSON."""
        return {
            "chosen": self.chosen,
            "expected": self.expected,
            "resolution": self.resolution,
            "radius": self.radius,
            "groups": [
                {**vars(s), "holds": self.holds(s), "tellable": s.chance <= LARGEST_CHANCE} for s in self.scores
            ],
        }

    def text(self) -> str:
        """A table to print."""
        lines = ["group  order   mean  worst  chance  share  verdict"]
        for s in self.scores:
            verdict = "holds" if self.holds(s) else "no" if s.chance <= LARGEST_CHANCE else "can't be told"
            lines.append(
                f"{s.group:5s}  {s.order:5d}  {s.mean:5.2f}  {s.worst:5.2f}  {s.chance:6.2f}  {s.share:5.2f}  {verdict}"
            )
        return "\n".join(lines)


def find_symmetry(
    maps: Tensor,
    pixel_size: float,
    resolution: float = 20.0,
    groups: Sequence[str] = GROUPS,
    radius: float | None = None,
) -> Ranking:
    """Compare groups: for each the rotation and centre that bring the map best into its setting, and its scores.

    The centre is first taken for that of mass: it must be within about a third of `resolution` of where the axes meet.

    Args:
        maps: (1, n, n, n) a map, or (2, n, n, n) two independent half maps, white, made without symmetry.
        pixel_size: Å.
        resolution: Å to compare to; made coarser where degrees beyond `LARGEST_DEGREE` would take part.
        groups: names; a group alone gives where its axes lie.
        radius: Å of the particle about its centre of mass; None: that of its density.

    Raises:
        InputError: a name is not that of a group, the maps aren't cubes, or there is no density in them.
    """
    names = [g.strip().lower() for g in groups]
    orders = {g: len(symmetry_matrices(g)) for g in names}
    if maps.ndim != 4 or len(set(maps.shape[1:])) != 1 or len(maps) not in (1, 2):
        raise InputError(f"maps of {tuple(maps.shape)} voxels have no point group", remedy="give one or two cubes")
    if resolution / SAMPLING > pixel_size:
        step = resolution / SAMPLING / pixel_size
        maps = torch.stack([postprocess.resample(volume.float(), step) for volume in maps])
        pixel_size *= step
    centre, radius = _outline(maps.float().mean(dim=0), pixel_size, resolution, radius)
    resolution = max(resolution, 2 * math.pi * radius / (LARGEST_DEGREE - 2), 2 * pixel_size)
    ball = _ball(maps.shape[-1], centre, radius / pixel_size, MASK_EDGE / pixel_size)
    shells = _Shells.of(maps.float() * ball, centre, pixel_size / resolution, radius / resolution)
    power = shells.axis_power(centre)
    searched = {g: _coarse(shells, power, g, centre) for g in names if orders[g] > 1}
    if searched:
        best = max(searched, key=lambda g: _score(shells, g, searched[g], centre).worst)
        _, centre = _refined(shells, best, searched[best], centre)
        power = shells.axis_power(centre)
        again = {g: _score(shells, g, r, centre).mean for g, r in searched.items()}
        worth = PROMISING / 2 * max(again.values())
        searched = {g: _coarse(shells, power, g, centre) if again[g] >= worth else r for g, r in searched.items()}
    scores = [_score(shells, g, r, centre) for g, r in searched.items()]
    enough = PROMISING * max((s.mean for s in scores), default=0.0)
    refined = [_score(shells, s.group, *_refined(shells, s.group, s.matrix, centre)) if s.mean >= enough else s
               for s in scores]  # fmt: skip
    if "c1" in names:
        refined.append(_score(shells, "c1", torch.eye(3, dtype=torch.float64), centre))
    tellable = [s.worst for s in refined if s.order > 1 and s.chance <= LARGEST_CHANCE]
    expected = 1.0 if len(maps) == 2 else max([LEAST_CORRELATION / TRUE_OPERATOR, *tellable])
    in_angstrom = [_in_angstrom(s, pixel_size) for s in refined]
    ranked = sorted(in_angstrom, key=lambda s: (not _holds(s, expected), -s.order if _holds(s, expected) else -s.worst))
    chosen = ranked[0].group if ranked and _holds(ranked[0], expected) else "c1"
    return Ranking(tuple(ranked), chosen, expected, resolution, radius)


def onto_axes(volume: Tensor, score: GroupScore, pixel_size: float) -> Tensor:
    """The map turned and shifted into the setting of a group, by `postprocess.place`."""
    rotation = score.matrix.T
    shift = -rotation @ torch.tensor(score.shift, dtype=torch.float64) / pixel_size
    return postprocess.place(volume, rotation, shift.tolist())


def _holds(score: GroupScore, expected: float) -> bool:
    least = TRUE_OPERATOR * expected - WORST_OF_MANY * score.chance
    return score.order == 1 or (score.worst >= least and score.chance <= LARGEST_CHANCE)


def _in_angstrom(score: GroupScore, pixel_size: float) -> GroupScore:
    x, y, z = (s * pixel_size for s in score.shift)
    return GroupScore(**{**vars(score), "shift": (x, y, z)})


# -------------------------------------------------------------------------------------------------------- the particle


def _outline(volume: Tensor, pixel_size: float, resolution: float, radius: float | None) -> tuple[Tensor, float]:
    """Centre of mass (3,) x, y, z in pixels of the density, and the radius about it in Å that holds it."""
    smooth = filters.lowpass(volume, pixel_size, max(resolution, COARSEST_MASK))
    threshold = postprocess.automatic_threshold(smooth)
    above = (smooth - threshold).clamp_min(0).double().numpy()
    labels, count = ndimage.label(above > 0)
    mass = ndimage.sum_labels(above, labels, range(1 + count))  # of the background, label 0, none
    weight = torch.from_numpy(np.where((mass >= LEAST_REGION * mass.max())[labels], above, 0))
    if not bool((weight > 0).any()):
        raise InputError("the map has no density above its background", remedy="it must be white, and not constant")
    z, y, x = centred_coordinates(volume.shape, volume.device)
    positive = (smooth - smooth.median()).clamp_min(0).double()
    centre = torch.stack([(weight * c).sum() for c in (x, y, z)]) / weight.sum()
    for _ in range(2):  # then with all that is about as near: a fainter subunit may be below the threshold
        distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
        near = positive * (distance <= distance[weight > 0].max())
        centre = torch.stack([(near * c).sum() for c in (x, y, z)]) / near.sum()
    if radius is None:
        distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
        radius = float(distance[weight > 0].max()) * pixel_size + MASK_EDGE / 2
    return centre, radius


def _ball(box: int, centre: Tensor, radius: float, edge: float) -> Tensor:
    """A soft mask about a centre off the origin; all in pixels."""
    z, y, x = centred_coordinates((box,) * 3, centre.device)
    distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
    return masks.cosine_edge(distance, radius, edge).float()


@dataclass(frozen=True)
class _Shells:
    """Fourier transforms of H maps on S spheres.

    Attributes:
        samples: (H, S, T, P) complex64 at the points of `harmonics.sphere_points`.
        frequency: (S, T, P, 3) of these, cycles per pixel.
        weights: (S,) of each shell in a correlation: signal over power, times the radius.
    """

    samples: Tensor
    frequency: Tensor
    weights: Tensor

    @staticmethod
    def of(maps: Tensor, centre: Tensor, highest: float, turns: float) -> _Shells:
        """Shells up to a frequency (1/px) of maps with a particle of `turns` wavelengths there in its radius."""
        n = maps.shape[-1]
        last = highest * n
        radii = torch.linspace(
            FIRST_SHELL, last, max(2, min(MOST_SHELLS, round(last - FIRST_SHELL) + 1)), dtype=torch.float64
        )
        _, _, unit = harmonics.sphere_points(math.ceil(2 * math.pi * turns) + 2)
        points = radii[:, None, None, None] * unit
        one = torch.eye(3, dtype=torch.float64)[None]
        spectra = [FourierVolume.from_map(volume, radius=last + 1) for volume in maps]
        samples = torch.stack([sample_points(s, one, points.reshape(-1, 3).T)[0] for s in spectra])
        shells = _Shells(samples.reshape(len(maps), *points.shape[:-1]), (points / n).float(), torch.ones(len(radii)))
        detail = torch.cat(shells.coefficients(centre)[1:], dim=-1)
        power, cross = detail.abs().square().sum(dim=-1), (detail[0] * detail[-1].conj()).real.sum(dim=-1)
        half = cross / (power[0] * power[-1]).sqrt()
        signal = (2 * half / (1 + half)).clamp(0, 1)
        mean = detail.mean(dim=0).abs().square().sum(dim=-1)
        return _Shells(shells.samples, shells.frequency, radii.float() * signal / mean)

    @property
    def degree(self) -> int:
        """The highest l."""
        return self.samples.shape[-2] - 1

    def coefficients(self, centre: Tensor, average: bool = False) -> list[Tensor]:
        """Harmonics about a centre (3,) in pixels: (H, S, 2l+1) for each l; of the mean of the maps if `average`.

        They are those of Re + Im (Hartley): the real part is even, the imaginary one odd, and both turn as the map does.
        """
        angle = 2 * math.pi * (self.frequency @ centre.float())
        samples = self.samples.mean(dim=0, keepdim=True) if average else self.samples
        moved = samples * torch.complex(angle.cos(), angle.sin())
        return harmonics.coefficients(moved.real + moved.imag)

    def axis_power(self, centre: Tensor) -> Tensor:
        """Power, between the maps, of the orders m >= 0 about each axis of `_axes`: (A, L+1); without l = 0."""
        theta, phi = _angles()
        out = torch.zeros(len(theta), len(phi), self.degree + 1)
        root = self.weights.sqrt()[:, None]
        for n, a in enumerate(self.coefficients(centre)[1:], start=1):
            waves = torch.exp(1j * phi[:, None] * torch.arange(-n, n + 1)).to(a.dtype)
            parts = torch.view_as_real((a * root)[:, :, None] * waves).movedim(-1, 1).contiguous()
            for i, d in enumerate(harmonics.small_wigner(n, theta)[:, :, n:].float()):
                turned = parts @ d  # (H, 2, S, φ, m)
                out[i, :, : n + 1] += (turned[0] * turned[-1]).sum(dim=(0, 1))
        return out.flatten(0, 1)


# ------------------------------------------------------------------------------------------------------ the coarse search


def _angles() -> tuple[Tensor, Tensor]:
    """Polar angles and azimuths of the axes of the table, over the upper half of the sphere, rad."""
    theta, phi = torch.arange(0, 90 + AXIS_STEP / 2, AXIS_STEP), torch.arange(0, 360, AXIS_STEP)
    return torch.deg2rad(theta.double()), torch.deg2rad(phi.double())


@lru_cache(maxsize=1)
def _axes() -> Tensor:
    """(A, 3) axes of the table."""
    t, p = torch.meshgrid(*_angles(), indexing="ij")
    return torch.stack((t.sin() * p.cos(), t.sin() * p.sin(), t.cos()), dim=-1).reshape(-1, 3)


def _index(axes: Tensor) -> Tensor:
    """The place in the table of axes (..., 3), either end."""
    x, y, z = torch.where(axes[..., 2:] < 0, -axes, axes).unbind(-1)
    theta, phi = torch.rad2deg(torch.atan2(torch.hypot(x, y), z)), torch.rad2deg(torch.atan2(y, x))
    columns = round(360 / AXIS_STEP)
    return (theta / AXIS_STEP).round().long() * columns + (phi / AXIS_STEP).round().long() % columns


@lru_cache(maxsize=32)
def _rotations(group: str) -> Tensor:
    """(N, 3, 3) float32."""
    return rotation_grid(GRID_STEP, group).float()


def _coarse(shells: _Shells, power: Tensor, group: str, centre: Tensor) -> Tensor:
    """The rotation (3, 3) into a group's setting, to within the steps of the grids."""
    rotvec = torch.deg2rad(rotvec_from_matrix(symmetry_matrices(group)[1:]))
    angle = torch.linalg.vector_norm(rotvec, dim=-1)
    cyclic = group.startswith("c")
    grid = _axes() if cyclic else _rotations(group)
    order = torch.arange(power.shape[-1])
    total, tables = torch.zeros(len(grid)), {}
    for axis, a in zip(rotvec / angle[:, None], angle, strict=True):
        key = round(float(a), 6)
        if key not in tables:
            tables[key] = power @ torch.where(order == 0, 1.0, 2 * torch.cos(order * a)).float()
        total += tables[key] if cyclic else tables[key][_index(grid @ axis.float())]
    peaks: list[Tensor] = []
    for i in total.argsort(descending=True).tolist():
        rotation = _towards(grid[i]) if cyclic else grid[i].double()
        if all(_apart(rotation, other, group) > APART for other in peaks):
            peaks.append(rotation)
        if len(peaks) == CANDIDATES:
            break
    return max(peaks, key=lambda r: _score(shells, group, r, centre).mean)


def _towards(axis: Tensor) -> Tensor:
    """A rotation that takes z to a unit vector."""
    x, y, z = (float(c) for c in axis)
    tilt = math.atan2(math.hypot(x, y), z)
    line = torch.tensor([-y, x, 0.0], dtype=torch.float64)
    return matrix_from_rotvec(math.degrees(tilt) * line / line.norm().clamp_min(1e-12))


def _apart(a: Tensor, b: Tensor, group: str) -> float:
    """Degrees between two settings; of a cyclic group between the lines of the axes."""
    if group.startswith("c"):
        return math.degrees(math.acos(min(1.0, abs(float(a[:, 2] @ b[:, 2])))))
    return float(rotation_distance(a, b, group))


# ------------------------------------------------------------------------------------------------ scores and refinement


@lru_cache(maxsize=64)
def _operators(group: str, n: int) -> Tensor:
    """(G, 2n+1, 2n+1) complex64: what the operators do to the harmonics of degree n."""
    return harmonics.wigner(n, symmetry_matrices(group)).to(torch.complex64)


@lru_cache(maxsize=2048)
def _invariants(group: str, n: int) -> Tensor:
    """(2n+1, K) complex64: an orthonormal basis of the harmonics of degree n that no operator changes."""
    values, vectors = torch.linalg.eigh(_operators(group, n).mean(dim=0).to(torch.complex128))
    return vectors[:, values > 0.5].to(torch.complex64)


def _score(shells: _Shells, group: str, rotation: Tensor, centre: Tensor) -> GroupScore:
    """The scores of a group at a rotation and centre; the shift in pixels."""
    correlations = torch.zeros(len(symmetry_matrices(group)), dtype=torch.float64)
    power, whole = torch.zeros(2, len(shells.weights)), 0.0
    for n, coefficients in enumerate(shells.coefficients(centre)[1:], start=1):
        a = coefficients @ harmonics.wigner(n, rotation[None])[0].conj().to(coefficients.dtype)
        whole += float(((a[0] * a[-1].conj()).real.sum(dim=-1) * shells.weights).sum())
        if (group[0] == "c" and group != "c1") or (group[0] == "d" and n % 2 == 0):
            a[..., n] = 0  # what is round about the axis
        turned = torch.einsum("gij,sj->gsi", _operators(group, n), a[-1])
        correlations += ((turned.conj() * a[0]).real.sum(dim=-1) * shells.weights).sum(dim=-1)
        power += a[[0, -1]].abs().square().sum(dim=-1)
    freedom = shells.degree * (shells.degree + 2)
    one = float(correlations[0])
    chance = float((shells.weights**2 * power[0] * power[1] / freedom).sum().sqrt()) / max(abs(one), 1e-30)
    others = correlations[1:] / one if len(correlations) > 1 else torch.ones(1)
    rows = tuple(tuple(float(v) for v in row) for row in rotation)
    x, y, z = (float(c) for c in centre)
    share = one / whole
    return GroupScore(
        group, len(correlations), float(others.mean()), float(others.min()), chance, share, rows, (x, y, z)
    )


def _refined(shells: _Shells, group: str, rotation: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and centre with the largest power in the invariant harmonics, the ball included.

    R = R0 · Ry(-90°) · Rz(a) · Ry(90° + b) · Rz(c), small a, b and c: never near a pole of the angles.
    """
    degrees = range(shells.degree + 1)
    first = rotation @ torch.tensor([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    fixed = [harmonics.wigner(n, first[None])[0].conj().to(torch.complex64) for n in degrees]
    bases = [_invariants(group, n) for n in degrees]
    unit = torch.tensor([1 / shells.degree] * 3 + [1 / (4 * math.pi * float(shells.frequency.max()))] * 3).double()

    def angles(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[0], x[1] + math.pi / 2, x[2]

    def cost(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        free = torch.from_numpy(values).requires_grad_()
        x = free * unit
        total = torch.zeros(())
        whole = torch.zeros(())
        for n, a in enumerate(shells.coefficients(centre + x[3:], average=True)):
            turned = harmonics.turned(a @ fixed[n], *angles(x)) @ bases[n].conj()
            total = total + (turned.abs().square().sum(dim=(0, 2)) * shells.weights).sum()
            whole = whole + (a.abs().square().sum(dim=(0, 2)) * shells.weights).sum()
        loss = -total / whole
        loss.backward()
        return float(loss.detach()), free.grad.numpy().astype(np.float64)  # type: ignore[union-attr]

    found = torch.from_numpy(
        optimize.minimize(cost, np.zeros(6), jac=True, method="L-BFGS-B", options={"maxiter": 30}).x
    )
    x = found * unit
    about_z, about_y = torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    a, b, c = (torch.rad2deg(v) for v in angles(x))
    return first @ matrix_from_rotvec(a * about_z) @ matrix_from_rotvec(b * about_y) @ matrix_from_rotvec(
        c * about_z
    ), centre + x[3:]
