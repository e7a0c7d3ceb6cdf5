"""The built-in particle: a formula that gives residues, from which maps, projections and spectra follow in closed form.

It is asymmetric (or has any point group), about 250 Å across, and is made of helical and globular domains with the
geometry and the packing density of proteins, in the water that they displace; so it has a protein's power spectrum,
with signal to 6 Å and beyond. Nothing is drawn at random and nothing is read: the same name gives the same particle
everywhere, so changing a number here changes every demo and every truth made before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.numerics import fourier
from libemc.numerics.rotations import matrix_from_euler, matrix_from_rotvec
from libemc.numerics.symmetry import symmetry_matrices

Array = NDArray[np.float64]

VARIANTS = ("emc", "emc-noarm", "emc-nohead", "emc-turned")
"""The particle; without its arm; without its head; with its head turned by `HEAD_TURN` degrees."""

RADIUS = 125.0  # Å, of every particle, whatever its symmetry
LONE_RADIUS = 110.0  # Å, of the asymmetric one about the axis of its spiral: its head and arm reach farther
HEAD_TURN = 30.0  # degrees
RESIDUE_VOLUME = 134.0  # Å³: 110 Da at 1.22 Å³/Da (Harpaz, Gerstein & Chothia 1994, Structure 2:641)
PROTEIN_POTENTIAL = 7.0  # V, mean inner potential of densely packed protein and
ICE_POTENTIAL = 4.8  # V, of vitreous ice: about what superposed isolated atoms give (Vulović et al. 2013, JSB 183:19)
HELIX_RISE, HELIX_TURN = 1.5, 100.0  # Å and degrees per residue of an alpha helix, right-handed
BACKBONE_RADIUS, SIDECHAIN_RADIUS = 2.0, 5.0  # Å from the helix axis: N, CA, C, O; centre of an average side chain
SIDECHAIN_LEAN = -0.9  # Å along the helix: side chains point back to its N terminus
HELIX_SPACING = 10.0  # Å between the axes of neighbours in a layer; layers lie where the residues fill their volume
LAYER_TURN = -37.0  # degrees between the helices of neighbouring layers
COIL_RADIUS, COIL_PITCH = 4.9, 140.0  # Å of a two-stranded coiled coil (Crick 1953)
ARM_START = (0.2, 0.25, -0.45)  # in radii of the subunit
ROW_TURN, ROW_SHIFT = 6.0, 1.3  # degrees and Å by which a row may lie off its lattice
LOOP = 6.0  # Å of loop between two helices of a row
ATOM_WIDTH = 1.6  # Å: standard deviation of the atoms of a backbone or a side chain, thermal motion included
WATER_WIDTH = 3.0  # Å: displaced water is smooth at the scale of a residue
NEIGHBOUR_DISTANCE = 1.3  # distance of neighbouring subunits over the radius of one; cells cut what overlaps
REACH = 5.0  # standard deviations within which a Gaussian is drawn; beyond, exp(-12.5) = 4e-6 of its peak
ALIASING = 0.8  # a Gaussian is drawn so finely that what aliases into the band is below exp(-2 π² · 0.8²) = 3e-6


@dataclass(frozen=True)
class Particle:
    """Gaussian pseudo-atoms: positions (N, 3) Å, weights (N,) V·Å³, widths (N,) Å (standard deviations).

    The weights are potentials above that of ice; three pseudo-atoms, of which one is negative (the water that the
    residue displaces), are a residue.
    """

    name: str
    symmetry: str
    positions: Array
    weights: Array
    widths: Array

    @property
    def diameter(self) -> float:
        """Å, of the sphere about the origin that holds every pseudo-atom to within two of its widths."""
        return 2 * float((np.linalg.norm(self.positions, axis=1) + 2 * self.widths).max())


# ------------------------------------------------------------------------------------------------------- the formula


def _spread(count: int, dim: int, start: float) -> Array:
    """(count, dim) numbers in [0, 1) without clumps or gaps: multiples of generalised golden ratios (Roberts 2018)."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (dim + 1))
    return np.asarray((start + np.arange(1, count + 1)[:, None] * ratio ** -np.arange(1.0, dim + 1)) % 1.0)


def _directions(u: Array) -> Array:
    """Points of the unit sphere (N, 3) from two uniform numbers each."""
    z, angle = 2 * u[:, 0] - 1, 2 * math.pi * u[:, 1]
    r = np.sqrt(1 - z**2)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def _row(length: float, start: float) -> tuple[Array, Array]:
    """One row of helices and loops along +z, from z = 0 to `length`: backbones and side chains, (n, 3) each."""
    n = max(int(length / HELIX_RISE), 1)
    z = (np.arange(n) + 0.5) * HELIX_RISE
    angle = np.deg2rad(HELIX_TURN * np.arange(n) + 360 * start)
    inner = np.stack([BACKBONE_RADIUS * np.cos(angle), BACKBONE_RADIUS * np.sin(angle), z], axis=1)
    outer = np.stack([SIDECHAIN_RADIUS * np.cos(angle), SIDECHAIN_RADIUS * np.sin(angle), z + SIDECHAIN_LEAN], axis=1)
    helix = 20.0 + 25.0 * start  # Å: helices of 13 to 30 residues
    loop = (z + helix * start) % (helix + LOOP) > helix
    u = _spread(n, 3, start)
    r = 0.5 * HELIX_SPACING * np.sqrt(u[:, 0])
    wander = np.stack([r * np.cos(2 * math.pi * u[:, 1]), r * np.sin(2 * math.pi * u[:, 1]), z], axis=1)
    inner[loop] = wander[loop]
    outer[loop] = wander[loop] + 3.0 * _directions(u[:, 1:])[loop]
    return inner, outer


def _helical_domain(axes: Array, start: float) -> tuple[Array, Array]:
    """An ellipsoid of semi-axes (3,) Å about the origin, filled with layers of antiparallel rows of helices."""
    layer = RESIDUE_VOLUME / HELIX_RISE / HELIX_SPACING
    inner, outer = [np.zeros((0, 3))], [np.zeros((0, 3))]
    number = 0
    for k in range(-int(axes[1] / layer), int(axes[1] / layer) + 1):
        for m in range(-int(axes.max() / HELIX_SPACING) - 1, int(axes.max() / HELIX_SPACING) + 2):
            wander = 2 * _spread(1, 3, start + 0.37 * k + 0.59 * m)[0] - 1  # no two rows lie quite alike: no lattice
            turn = math.radians(LAYER_TURN * k + ROW_TURN * wander[0])
            along, across = (
                np.array([math.sin(turn), 0, math.cos(turn)]),
                np.array([math.cos(turn), 0, -math.sin(turn)]),
            )
            centre = np.array([0, k * layer + ROW_SHIFT * wander[1], 0])
            centre += ((m + 0.5 * (k % 2)) * HELIX_SPACING + ROW_SHIFT * wander[2]) * across
            # the chord of the row through the ellipsoid: |(centre + s·along) / axes| = 1
            a, b, c = ((along / axes) ** 2).sum(), (along * centre / axes**2).sum(), ((centre / axes) ** 2).sum() - 1
            if b * b - a * c <= 0:
                continue
            half = math.sqrt(b * b - a * c) / a
            number += 1
            row = _row(2 * half, (start + 0.618034 * number) % 1.0)
            flip = 1.0 if m % 2 else -1.0  # antiparallel neighbours: half a turn, never a mirror
            frame = np.stack([flip * across, np.array([0, 1.0, 0]), flip * along])
            first = centre + (-b / a - flip * half) * along
            for part, points in ((inner, row[0]), (outer, row[1])):
                part.append(first + points @ frame)
    return np.concatenate(inner), np.concatenate(outer)


def _globular_domain(axes: Array, start: float) -> tuple[Array, Array]:
    """An ellipsoid of semi-axes (3,) Å about the origin, evenly filled with residues in no order."""
    points = (2 * _spread(int(8 * axes.prod() / RESIDUE_VOLUME), 3, start) - 1) * axes
    points = points[((points / axes) ** 2).sum(1) < 1]
    return points, points + 3.0 * _directions(_spread(len(points), 2, start + 0.5))


def _coiled_coil(length: float) -> tuple[Array, Array]:
    """Two helices about the z axis, from z = 0 to `length` Å, wound left-handed once in `COIL_PITCH`."""
    n = np.arange(max(int(length / HELIX_RISE), 1))
    parts = []
    for radius, lean in ((BACKBONE_RADIUS, 0.0), (SIDECHAIN_RADIUS, SIDECHAIN_LEAN)):
        angle, z = np.deg2rad(HELIX_TURN * n), (n + 0.5) * HELIX_RISE + lean
        strand = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
        for k in range(2):
            winding = math.pi * k - 2 * math.pi * z / COIL_PITCH
            parts.append(strand + COIL_RADIUS * np.stack([np.cos(winding), np.sin(winding), 0 * z], axis=1))
    return np.concatenate(parts[:2]), np.concatenate(parts[2:])


def _subunit(radius: float, variant: str) -> tuple[Array, Array]:
    """Backbones and side chains of one subunit within about `radius` Å of the origin, for a name of `VARIANTS`.

    Domains wind along a left-handed spiral, smaller and smaller; the last of them are the head. The arm stands off the
    first one. What lies inside an earlier domain is left out.
    """
    count = min(max(int(radius / 13), 2), 9)
    first_of_head = count - max(count // 4, 1)
    kept: list[tuple[Array, Array]] = []
    before: list[tuple[Array, Array, Array]] = []  # centre, rotation and semi-axes of the domains so far
    for i in range(count + 1):
        if i < count:
            t, angle = i / (count - 1), math.radians(-75.0 * i)
            centre = radius * np.array([0.40 * math.cos(angle), 0.40 * math.sin(angle), 1.25 * t - 0.55])
            axes = radius * (0.37 - 0.11 * t) * np.array([1.25, 0.8, 0.8 + 0.4 * ((0.618034 * i) % 1)])
            axes *= 1 + 0.2 * max(4 - count, 0)  # few domains must still touch
            rotation = matrix_from_euler(40.0 * i, 65.0 * i + 20.0, 110.0 * i).numpy()
            parts = (_globular_domain if i % 3 == 2 else _helical_domain)(axes, 0.37 * i)
        else:
            centre, rotation = radius * np.array(ARM_START), matrix_from_euler(0.0, 100.0, 25.0).numpy()
            parts = _coiled_coil(0.85 * radius)
        inner, outer = (points @ rotation.T + centre for points in parts)
        free = np.ones(len(inner), dtype=bool)
        for other, turn, semi_axes in before:
            free &= (((inner - other) @ turn / semi_axes) ** 2).sum(axis=1) > 1
        if i == first_of_head:
            pivot = (before[-1][0] + centre) / 2
        if i < count:
            before.append((centre, rotation, axes))
        is_head, is_arm = first_of_head <= i < count, i == count
        if is_head and variant == "emc-turned":
            turn = matrix_from_rotvec(torch.tensor([0.6, -0.8, 0.0]) * HEAD_TURN).numpy()
            inner, outer = (inner - pivot) @ turn.T + pivot, (outer - pivot) @ turn.T + pivot
        if not (is_head and variant == "emc-nohead") and not (is_arm and variant == "emc-noarm"):
            kept.append((inner[free], outer[free]))
    return np.concatenate([k[0] for k in kept]), np.concatenate([k[1] for k in kept])


def _residues(symmetry: str, variant: str) -> tuple[Array, Array]:
    """Backbones and side chains of the whole particle, in its own frame, (N, 3) Å each."""
    group = symmetry_matrices(symmetry).numpy()
    if len(group) == 1:
        centre = _subunit(LONE_RADIUS, "emc")[0].mean(axis=0)  # of the whole one, so that variants lie on each other
        inner, outer = _subunit(LONE_RADIUS, variant)
        return inner - centre, outer - centre
    # the direction whose copies are farthest apart is the middle of the group's cell
    directions = _directions(np.stack([(np.arange(2000) + 0.5) / 2000, _spread(2000, 1, 0.5)[:, 0]], axis=1))
    apart = np.stack([np.linalg.norm(directions @ (g - np.eye(3)).T, axis=1) for g in group[1:]]).min(axis=0)
    middle = directions[int(np.argmax(np.round(apart, 9)))]
    radius = RADIUS / (1 + NEIGHBOUR_DISTANCE / apart.max())
    place = (RADIUS - radius) * middle
    frame = matrix_from_euler(35.0, 60.0, 15.0).numpy()
    inner, outer = (points @ frame.T + place for points in _subunit(radius, variant))
    nearest = np.linalg.norm(inner[None] - (group @ place)[:, None], axis=2).argmin(axis=0)
    inner, outer = inner[nearest == 0], outer[nearest == 0]  # the cell of this copy: copies never overlap
    return tuple(np.concatenate([points @ g.T for g in group]) for points in (inner, outer))  # type: ignore[return-value]


def particle(name: str = "emc", symmetry: str = "c1") -> Particle:
    """The built-in particle.

    Args:
        name: one of `VARIANTS`.
        symmetry: a point group; the variant is then that of every subunit.

    Raises:
        InputError: there is no such variant or group.
    """
    if name not in VARIANTS:
        raise InputError(f"there is no built-in particle '{name}'", remedy=f"there are {', '.join(VARIANTS)}")
    inner, outer = _residues(symmetry, name)
    n, copies = len(inner), len(symmetry_matrices(symmetry))
    share = 0.1 + 0.8 * np.tile(
        _spread(n // copies, 1, 0.25)[:, 0], copies
    )  # of the side chain: from glycine to tryptophan
    mass = RESIDUE_VOLUME * np.stack([0.5 + 0 * share, share, -(0.5 + share)])
    potential = np.array([PROTEIN_POTENTIAL, PROTEIN_POTENTIAL, ICE_POTENTIAL])
    middle = (inner * 0.5 + outer * share[:, None]) / (0.5 + share)[:, None]
    return Particle(
        name=name,
        symmetry=symmetry.lower(),
        positions=np.concatenate([inner, outer, middle]),
        weights=(mass * potential[:, None]).ravel(),
        widths=np.repeat([ATOM_WIDTH, ATOM_WIDTH, WATER_WIDTH], n),
    )


# ---------------------------------------------------------------------------------------------- maps and projections


def spectrum(atoms: Particle, frequencies: Tensor) -> Tensor:
    """The Fourier transform ∫ V(r) exp(-2πi k·r) dr, exactly.

    Args:
        frequencies: (K, 3) in 1/Å, (kx, ky, kz).

    Returns:
        (K,) complex128, V·Å³.
    """
    k = frequencies.double()
    positions, weights, widths = (torch.as_tensor(x) for x in (atoms.positions, atoms.weights, atoms.widths))
    out = torch.zeros(len(k), dtype=torch.complex128)
    for chunk in torch.arange(len(weights)).split(4096):
        decay = torch.exp(-2 * math.pi**2 * widths[chunk, None] ** 2 * (k**2).sum(dim=1))
        out += (weights[chunk, None] * decay * torch.exp(-2j * math.pi * (positions[chunk] @ k.T))).sum(dim=0)
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _draw(positions, weights, width, out):  # type: ignore[no-untyped-def]
    """Add normalised Gaussians at positions (N, D) pixels, in the order x, y(, z), to a periodic (z, y, x) grid.

    `width` is the standard deviation in pixels. With two coordinates the grid has one plane.
    """
    nz, _, nx = out.shape
    dim = positions.shape[1]
    reach = int(np.ceil(REACH * width))
    size = 2 * reach + 1
    g, at = np.ones((3, size)), np.zeros((3, size), np.int64)
    for a in range(positions.shape[0]):
        for d in range(dim):
            n = nx if d < 2 else nz  # ny is nx
            p = positions[a, d] + n // 2
            first = int(np.round(p)) - reach
            for i in range(size):
                g[d, i] = np.exp(-0.5 * ((first + i - p) / width) ** 2) / (np.sqrt(2 * np.pi) * width)
                at[d, i] = (first + i) % n
        for k in range(size if dim == 3 else 1):
            for j in range(size):
                w = weights[a] * g[2, k] * g[1, j]
                for i in range(size):
                    out[at[2, k], at[1, j], at[0, i]] += w * g[0, i]


def _sample(positions: Array, atoms: Particle, box: int, pixel_size: float) -> Tensor:
    """Band-limited samples of the sum of Gaussians at `positions` (N, D) Å, per Å^D: (box,) * D float32."""
    if box * pixel_size < atoms.diameter:
        raise InputError(
            f"a box of {box} pixels of {pixel_size:g} Å is smaller than the particle ({atoms.diameter:.0f} Å)",
            remedy=f"use at least {fourier.good_size(math.ceil(atoms.diameter / pixel_size))} pixels",
        )
    dim = positions.shape[1]
    total: Tensor | float = 0.0
    for width in np.unique(atoms.widths):
        mine = atoms.widths == width
        # drawn on a finer grid over the same field, then cropped to the box's band
        fine = fourier.good_size(math.ceil(box * max(0.5 + ALIASING * pixel_size / width, 1.0)))
        step = box * pixel_size / fine
        drawn = np.zeros((fine if dim == 3 else 1, fine, fine), np.float32)
        _draw(positions[mine] / step, atoms.weights[mine], width / step, drawn)
        total = total + fourier.resize(torch.from_numpy(drawn if dim == 3 else drawn[0]), (box,) * dim) / step**dim
    return torch.as_tensor(total)


def density(atoms: Particle, box: int, pixel_size: float) -> Tensor:
    """The potential above that of ice on a grid: the particle's map, white.

    Args:
        box: pixels.
        pixel_size: Å. What is finer than two pixels is left out, not folded in.

    Returns:
        (box, box, box) float32, V.

    Raises:
        InputError: the box is smaller than the particle.
    """
    return _sample(atoms.positions, atoms, box, pixel_size)


def projection(atoms: Particle, matrices: Tensor, box: int, pixel_size: float) -> Tensor:
    """Line integrals of the rotated particle, image(q) = ∫ V(Mᵀq) dq_z, without a map in between.

    Args:
        matrices: (B, 3, 3), particle to image frame.
        box, pixel_size: of the images, pixels and Å.

    Returns:
        (B, box, box) float32, V·Å.

    Raises:
        InputError: the box is smaller than the particle.
    """
    seen = torch.einsum("bij,nj->bni", matrices.double()[:, :2], torch.as_tensor(atoms.positions)).numpy()
    return torch.stack([_sample(s, atoms, box, pixel_size) for s in seen])
