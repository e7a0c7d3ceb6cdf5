"""What readers return: alignments, CTFs and picks in our conventions, as frozen dataclasses of float64 arrays.

The few rotations that conversions need are here too, in numpy; they are the conventions' own formulae and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_GIMBAL = 1e-9
"""Sine below which two Euler axes count as one: their angles are then known to no better than 1e-16/1e-9 rad."""


def rotation_matrix(axis: str, degrees: ArrayLike) -> Array:
    """Active rotation about "x", "y" or "z" by degrees (...): (..., 3, 3)."""
    angle = np.deg2rad(np.asarray(degrees, dtype=np.float64))
    i = "xyz".index(axis)
    j, k = (i + 1) % 3, (i + 2) % 3
    matrix = np.zeros((*angle.shape, 3, 3))
    matrix[..., i, i] = 1
    matrix[..., j, j] = matrix[..., k, k] = np.cos(angle)
    matrix[..., k, j] = np.sin(angle)
    matrix[..., j, k] = -np.sin(angle)
    return matrix


def matrix_from_euler(rot: ArrayLike, tilt: ArrayLike, psi: ArrayLike) -> Array:
    """R = Rz(-psi)·Ry(-tilt)·Rz(-rot), particle to specimen (RELION's Euler matrix), degrees (...): (..., 3, 3)."""
    rot, tilt, psi = np.asarray(rot), np.asarray(tilt), np.asarray(psi)
    return rotation_matrix("z", -psi) @ rotation_matrix("y", -tilt) @ rotation_matrix("z", -rot)


def euler_from_matrix(matrices: ArrayLike) -> tuple[Array, Array, Array]:
    """(rot, tilt, psi) in degrees, 0 <= tilt <= 180, of particle-to-specimen matrices (..., 3, 3).

    At tilt 0 and 180 only psi ± rot is known; all of it goes to psi.
    """
    m = np.asarray(matrices, dtype=np.float64)
    sine = np.hypot(m[..., 2, 0], m[..., 2, 1])
    rot = np.where(sine > _GIMBAL, np.arctan2(m[..., 2, 1], m[..., 2, 0]), 0.0)
    x = np.cos(rot) * m[..., 0, 1] - np.sin(rot) * m[..., 0, 0]  # R·Rz(rot)·y = Rz(-psi)·y = (sin psi, cos psi, 0)
    y = np.cos(rot) * m[..., 1, 1] - np.sin(rot) * m[..., 1, 0]
    return np.rad2deg(rot), np.rad2deg(np.arctan2(sine, m[..., 2, 2])), np.rad2deg(np.arctan2(x, y))


def tilt_angles_from_matrix(matrices: ArrayLike) -> tuple[Array, Array, Array]:
    """(axis, tilt, xtilt) in degrees with Rz(axis)·Ry(tilt)·Rx(xtilt) = the given (..., 3, 3); -90 <= tilt <= 90."""
    m = np.asarray(matrices, dtype=np.float64)
    cosine = np.hypot(m[..., 0, 0], m[..., 1, 0])
    free = cosine > _GIMBAL
    axis = np.where(free, np.arctan2(m[..., 1, 0], m[..., 0, 0]), np.arctan2(-m[..., 0, 1], m[..., 1, 1]))
    xtilt = np.where(free, np.arctan2(m[..., 2, 1], m[..., 2, 2]), 0.0)
    return np.rad2deg(axis), np.rad2deg(np.arctan2(-m[..., 2, 0], cosine)), np.rad2deg(xtilt)


def _settle(instance: Any, like: str, names: tuple[str, ...]) -> None:
    """Make float64 arrays of the named fields, as long as the field `like`; None stays None."""
    shape = np.asarray(getattr(instance, like), dtype=np.float64).reshape(-1).shape
    for name in names:
        value = getattr(instance, name)
        if value is not None:
            value = np.broadcast_to(np.asarray(value, dtype=np.float64), shape).copy()
        object.__setattr__(instance, name, value)


@dataclass(frozen=True, eq=False)
class Alignment:
    """The geometry of a tilt series (conventions 5 to 7); a number stands for the same number in every tilt.

    A point r (Å from the specimen's centre) is seen at magnification · ((T r)_xy + shift), Å from the image's centre
    (pixel n//2), with T = Rz(axis)·Ry(tilt)·Rx(xtilt).

    Attributes:
        axis, tilt, xtilt: degrees, (T,).
        shift_x, shift_y: Å, (T,).
        magnification: (T,), 1 = none.
        use: (T,) bool.
        distortion: the largest relative departure of a tilt's linear transform from rotation times magnification,
            which this geometry cannot hold (0: none).
    """

    tilt: Array
    axis: Array
    shift_x: Array
    shift_y: Array
    xtilt: Array = field(default_factory=lambda: np.zeros(()))
    magnification: Array = field(default_factory=lambda: np.ones(()))
    use: NDArray[np.bool_] = field(default_factory=lambda: np.ones((), bool))
    distortion: float = 0.0

    def __post_init__(self) -> None:
        _settle(self, "tilt", ("tilt", "axis", "shift_x", "shift_y", "xtilt", "magnification"))
        object.__setattr__(self, "use", np.broadcast_to(np.asarray(self.use, bool), self.tilt.shape).copy())

    @property
    def count(self) -> int:
        """How many tilts."""
        return len(self.tilt)

    def matrices(self) -> Array:
        """Specimen to image frame, (T, 3, 3)."""
        return rotation_matrix("z", self.axis) @ rotation_matrix("y", self.tilt) @ rotation_matrix("x", self.xtilt)

    def project(self, points: ArrayLike) -> Array:
        """Image positions (T, N, 2) in Å of points (N, 3) in Å."""
        flat = np.einsum("tij,nj->tni", self.matrices()[:, :2], np.asarray(points, dtype=np.float64))
        return self.magnification[:, None, None] * (flat + np.stack([self.shift_x, self.shift_y], axis=-1)[:, None])

    def mirrored(self) -> Alignment:
        """The same images explained by the specimen's mirror image, z -> -z (the defocus hand changes sign with it)."""
        return replace(self, tilt=-self.tilt, xtilt=-self.xtilt)


@dataclass(frozen=True, eq=False)
class Ctf:
    """The CTF of each tilt (conventions 11 and 13); U >= V is made so by exchanging the axes.

    Attributes:
        defocus_u, defocus_v: Å, underfocus positive, (T,).
        angle: degrees from +x to the axis of U, (T,).
        phase_shift: degrees, (T,).
        handedness: sign of the defocus slope, or None where the file does not say.
        beam_tilt: (x, y) mrad, or None where the file does not say.
        score, resolution: (T,) or None; resolution in Å.
    """

    defocus_u: Array
    defocus_v: Array
    angle: Array
    phase_shift: Array = field(default_factory=lambda: np.zeros(()))
    handedness: int | None = None
    score: Array | None = None
    resolution: Array | None = None
    beam_tilt: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        names = ("defocus_u", "defocus_v", "angle", "phase_shift", "score", "resolution")
        _settle(self, "defocus_u", names)
        swap = self.defocus_v > self.defocus_u
        u, v = np.where(swap, self.defocus_v, self.defocus_u), np.where(swap, self.defocus_u, self.defocus_v)
        object.__setattr__(self, "defocus_u", u)
        object.__setattr__(self, "defocus_v", v)
        object.__setattr__(self, "angle", self.angle + 90.0 * swap)

    def mirrored(self) -> Ctf:
        """The same images explained by the specimen's mirror image: the defocus slope changes sign."""
        return replace(self, handedness=None if self.handedness is None else -self.handedness)


@dataclass(frozen=True, eq=False)
class Picks:
    """Positions, and poses and scores where the file has them (conventions 8 and 9).

    Attributes:
        xyz: Å from the tomogram's centre, (N, 3).
        rot, tilt, psi: degrees, (N,), all or none.
        score: (N,) or None.
    """

    xyz: Array
    rot: Array | None = None
    tilt: Array | None = None
    psi: Array | None = None
    score: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "xyz", np.asarray(self.xyz, dtype=np.float64).reshape(-1, 3))
        for name in ("rot", "tilt", "psi", "score"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=np.float64).reshape(len(self.xyz)))

    def out_of(self, centre: ArrayLike, angles: tuple[float, float, float]) -> Picks:
        """The same in the specimen, of picks in a volume that lies there with `centre` (3,) Å and `angles` (rot, tilt, psi)."""
        turn = matrix_from_euler(*angles)
        moved = replace(self, xyz=np.asarray(centre) + self.xyz @ turn.T)
        if self.rot is None or self.tilt is None or self.psi is None or not any(angles):
            return moved
        rot, tilt, psi = euler_from_matrix(turn @ matrix_from_euler(self.rot, self.tilt, self.psi))
        return replace(moved, rot=rot, tilt=tilt, psi=psi)

    @property
    def count(self) -> int:
        """How many picks."""
        return len(self.xyz)

    @property
    def matrices(self) -> Array | None:
        """Particle to specimen frame, (N, 3, 3), or None."""
        if self.rot is None or self.tilt is None or self.psi is None:
            return None
        return matrix_from_euler(self.rot, self.tilt, self.psi)
