"""Rotations: matrices, Euler angles, rotation vectors, quaternions, the tilt geometry, the distance between poses.

Matrices are active, act on columns (x, y, z), and are float64; angles are degrees; leading dimensions broadcast. The
signs of every convention are fixed here and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libemc.numerics.symmetry import symmetry_matrices

_SERIES_BELOW = 1e-3
"""Squared angle (rad²) below which sines are taken from their series; its first omitted term is then below 1e-16."""
_GIMBAL = 1e-12
"""Sine (or cosine) of the middle angle below which the first and last axes count as parallel."""


def _degrees(*angles: Tensor | float) -> list[Tensor]:
    """Angles as float64, numbers on the device of the tensors."""
    device = next((a.device for a in angles if isinstance(a, Tensor)), None)
    return [torch.as_tensor(a, dtype=torch.float64, device=device) for a in angles]


def _elementary(axis: str, angle: Tensor) -> Tensor:
    """Rx, Ry or Rz of `angle` degrees (...): (..., 3, 3)."""
    angle = torch.deg2rad(angle)
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = {
        "x": (one, zero, zero, zero, c, -s, zero, s, c),
        "y": (c, zero, s, zero, one, zero, -s, zero, c),
        "z": (c, -s, zero, s, c, zero, zero, zero, one),
    }[axis]
    return torch.stack(rows, dim=-1).reshape(*angle.shape, 3, 3)


def tilt_matrices(axis: Tensor | float, tilt: Tensor | float, xtilt: Tensor | float = 0.0) -> Tensor:
    """Specimen to image frame of each tilt: T = Rz(axis) · Ry(tilt) · Rx(xtilt).

    Args:
        axis, tilt, xtilt: degrees, shapes (...) that broadcast, usually (T,).

    Returns:
        (..., 3, 3) float64; differentiable.
    """
    axis, tilt, xtilt = _degrees(axis, tilt, xtilt)
    return _elementary("z", axis) @ _elementary("y", tilt) @ _elementary("x", xtilt)


def tilt_angles_from_matrix(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(axis, tilt, xtilt) in degrees, each (...), with `tilt_matrices` of them the given (..., 3, 3).

    tilt lies in [-90, 90]; where it is ±90, axis and xtilt turn about the same line and all goes to axis.
    """
    m = matrices.double()
    cosine = torch.hypot(m[..., 0, 0], m[..., 1, 0])
    tilt = torch.atan2(-m[..., 2, 0], cosine)
    axis = torch.where(
        cosine > _GIMBAL, torch.atan2(m[..., 1, 0], m[..., 0, 0]), torch.atan2(-m[..., 0, 1], m[..., 1, 1])
    )
    row = axis.cos()[..., None] * m[..., 1, :] - axis.sin()[..., None] * m[..., 0, :]  # of Ry·Rx: (0, cos, -sin) xtilt
    xtilt = torch.atan2(-row[..., 2], row[..., 1])
    return torch.rad2deg(axis), torch.rad2deg(tilt), torch.rad2deg(xtilt)


def matrix_from_euler(rot: Tensor | float, tilt: Tensor | float, psi: Tensor | float) -> Tensor:
    """Particle to specimen frame from RELION's angles: R = Rz(-psi) · Ry(-tilt) · Rz(-rot).

    Args:
        rot, tilt, psi: degrees, shapes (...) that broadcast.

    Returns:
        (..., 3, 3) float64, the inverse of the intrinsic ZYZ rotation (rot, tilt, psi).
    """
    rot, tilt, psi = _degrees(rot, tilt, psi)
    return _elementary("z", -psi) @ _elementary("y", -tilt) @ _elementary("z", -rot)


def euler_from_matrix(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rot, tilt, psi) in degrees, each (...), with `matrix_from_euler` of them the given (..., 3, 3).

    tilt lies in [0, 180]; where it is 0 or 180, rot and psi turn about the same line and all goes to psi.
    """
    m = matrices.double()
    sine = torch.hypot(m[..., 2, 0], m[..., 2, 1])
    tilt = torch.atan2(sine, m[..., 2, 2])
    rot = torch.where(sine > _GIMBAL, torch.atan2(m[..., 2, 1], m[..., 2, 0]), 0.0)
    column = rot.cos()[..., None] * m[..., :, 1] - rot.sin()[..., None] * m[..., :, 0]  # Rz(-psi)·y = (sin, cos, 0) psi
    psi = torch.atan2(column[..., 0], column[..., 1])
    return torch.rad2deg(rot), torch.rad2deg(tilt), torch.rad2deg(psi)


def matrix_from_rotvec(rotvec: Tensor) -> Tensor:
    """Rotation about each vector by its length (Rodrigues' formula).

    Args:
        rotvec: (..., 3) degrees.

    Returns:
        (..., 3, 3) float64; differentiable everywhere, the zero vector included.
    """
    v = torch.deg2rad(torch.as_tensor(rotvec, dtype=torch.float64))
    t = (v * v).sum(dim=-1)
    small = t < _SERIES_BELOW
    angle = torch.where(small, 1.0, t).sqrt()  # the branch not taken must have a finite gradient too
    a = torch.where(small, 1 - t / 6 * (1 - t / 20 * (1 - t / 42)), angle.sin() / angle)
    b = torch.where(small, (1 - t / 12 * (1 - t / 30 * (1 - t / 56))) / 2, (1 - angle.cos()) / angle**2)
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).reshape(*t.shape, 3, 3)
    identity = torch.eye(3, dtype=torch.float64, device=v.device)
    return identity + a[..., None, None] * cross + b[..., None, None] * (cross @ cross)


def rotvec_from_matrix(matrices: Tensor) -> Tensor:
    """Rotation vectors (..., 3) in degrees, of length 0 to 180, of (..., 3, 3); differentiable below 180 degrees."""
    q = quaternion_from_matrix(matrices)
    w, v = q[..., :1], q[..., 1:]
    n2 = (v * v).sum(dim=-1, keepdim=True)
    small = n2 < 1e-10  # first omitted term of the series: n⁴/5 = 2e-21
    n = torch.where(small, 1.0, n2).sqrt()
    ratio = n2 / w.clamp_min(0.5) ** 2  # where small, w is near 1
    factor = torch.where(small, 2 / w.clamp_min(0.5) * (1 - ratio / 3), 2 * torch.atan2(n, w) / n)
    return torch.rad2deg(factor * v)


def matrix_from_quaternion(quaternions: Tensor) -> Tensor:
    """(..., 3, 3) float64 of quaternions (..., 4) as w, x, y, z; they need not be of unit length."""
    q = quaternions.double()
    w, x, y, z = (q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).reshape(*w.shape, 3, 3)


def quaternion_from_matrix(matrices: Tensor) -> Tensor:
    """Unit quaternions (..., 4) as w, x, y, z, with w >= 0, of rotation matrices (..., 3, 3).

    The four rows of 4 q qᵀ are linear in the matrix; the one with the largest diagonal is taken, so no division is by
    less than 1.
    """
    m = matrices.double()
    d = torch.diagonal(m, dim1=-2, dim2=-1)
    s, p = m + m.transpose(-1, -2), m - m.transpose(-1, -2)
    t = d.sum(dim=-1)
    wx, wy, wz = p[..., 2, 1], p[..., 0, 2], p[..., 1, 0]
    xy, xz, yz = s[..., 0, 1], s[..., 0, 2], s[..., 1, 2]
    xx, yy, zz = (1 - t + 2 * d[..., i] for i in range(3))
    table = torch.stack((1 + t, wx, wy, wz, wx, xx, xy, xz, wy, xy, yy, yz, wz, xz, yz, zz), dim=-1)
    table = table.reshape(*t.shape, 4, 4)
    best = torch.diagonal(table, dim1=-2, dim2=-1).argmax(dim=-1)
    row = torch.take_along_dim(table, best[..., None, None].expand(*t.shape, 1, 4), dim=-2).squeeze(-2)
    row = torch.where(row[..., :1] < 0, -row, row)
    return row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)


def rotation_distance(a: Tensor, b: Tensor, symmetry: str | Tensor | None = None) -> Tensor:
    """Angle between poses: of the rotation that takes a to b, or to the nearest symmetry-equivalent b · S.

    Args:
        a, b: (..., 3, 3) that broadcast.
        symmetry: a group's name, its (G, 3, 3) matrices, or None for C1.

    Returns:
        (...) degrees, 0 to 180, float64; exact also for the smallest angles.
    """
    a, b = torch.broadcast_tensors(a.double(), b.double())
    if symmetry is not None:
        group = symmetry_matrices(symmetry) if isinstance(symmetry, str) else symmetry
        group = group.to(b)
        traces = torch.einsum("...ij,gji->...g", a.transpose(-1, -2) @ b, group)
        b = b @ group[traces.argmax(dim=-1)]
    chord = torch.linalg.matrix_norm(a - b) / 8**0.5  # |A - B| = sqrt(8) sin(angle / 2)
    return torch.rad2deg(2 * torch.asin(chord.clamp_max(1.0)))


def random_rotations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` rotations drawn uniformly over SO(3): (n, 3, 3) float64 on the generator's device.

    Normal quaternions are uniform on the sphere in four dimensions (Shoemake 1992).
    """
    device = None if generator is None else generator.device
    return matrix_from_quaternion(torch.randn(n, 4, dtype=torch.float64, generator=generator, device=device))
