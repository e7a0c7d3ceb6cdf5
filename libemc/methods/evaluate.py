"""Results against a known truth: what a simulation was made of, or what a better experiment has found.

Three questions are answered: how far an alignment puts the points of a specimen from where they are seen, how far poses
are from true ones, and to which resolution, and in which hand, a map agrees with the true one. An alignment sees its
specimen only up to a rigid motion; that motion is found first, and poses are compared after the same one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import postprocess
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.fsc import Curve, fourier_shell_correlation, resolution_at
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance, tilt_matrices

INNER = 0.8
"""Share of a slab's sides within which an alignment is judged: what lies nearer to the edge leaves the tilted images."""
ROBUST = 20.0
"""Å: a tilt that is off by more counts for less in the rigid motion, so that a single bad one cannot turn the others."""
_STEPS = 30
_CONVERGED = 1e-10


# ------------------------------------------------------------------------------------------------------------ alignment


@dataclass(frozen=True)
class RigidMotion:
    """From the true specimen frame to that of an alignment: r becomes rotation · r + shift.

    Attributes:
        rotation: (3, 3), of determinant -1 where the alignment mirrors; shift: (3,) Å. float64.
    """

    rotation: Tensor
    shift: Tensor

    @staticmethod
    def none() -> RigidMotion:
        """The motion of an alignment that keeps the true frame."""
        return RigidMotion(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def __call__(self, points: Tensor) -> Tensor:
        """Points (N, 3) after the motion."""
        return points.double() @ self.rotation.T + self.shift


@dataclass(frozen=True)
class AlignmentError:
    """How far an alignment is from the truth.

    Attributes:
        tilts: (T,) Å rms of the points in each tilt, NaN where it is not used.
        angles: (T,) degrees between the tilt matrices after the motion, NaN where not used.
        mirrored_tilts: (T,) what `tilts` would be if the specimen were the mirror image.
        motion: the rigid motion that fits best.
    """

    tilts: Tensor
    angles: Tensor
    mirrored_tilts: Tensor
    motion: RigidMotion

    @property
    def rms(self) -> float:
        """Å, over all points and used tilts."""
        return float((self.tilts**2).nanmean().sqrt())

    @property
    def mirrored_rms(self) -> float:
        """Å, what `rms` would be if the specimen were the mirror image."""
        return float((self.mirrored_tilts**2).nanmean().sqrt())

    @property
    def median(self) -> float:
        """Å, of the tilts."""
        return float(self.tilts.nanmedian())

    @property
    def worst(self) -> int:
        """The tilt that is farthest off."""
        return int(self.tilts.nan_to_num(-1.0).argmax())

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image explains where the points are seen with less than half the squared error."""
        return self.mirrored_rms**2 < self.rms**2 / 2


def slab_points(width: float, height: float, thickness: float, slab_tilt: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Eight points (8, 3) that stand for the inner part of a slab.

    They have its centre and its second moments, and the squared error of an alignment is quadratic in position: its mean
    over the eight is that over the slab.

    Args:
        width, height, thickness: Å.
        slab_tilt: the slab's normal is Ry(first)·Rx(second)·z, degrees.
    """
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    half = INNER * torch.tensor([width, height, thickness], dtype=torch.float64) / 2
    return corners * half / math.sqrt(3) @ tilt_matrices(0.0, *slab_tilt).T


def alignment_error(
    found: TiltGeometry, truth: TiltGeometry, points: Tensor, seen: Tensor | None = None
) -> AlignmentError:
    """Reprojection error of an alignment after the rigid motion of the specimen that fits best.

    Args:
        found, truth: of the same tilts; those that either leaves out take no part.
        points: (N, 3) Å in the true frame, not in a plane: particles, or `slab_points`.
        seen: (N, T, 2) Å from the image centre, where the points are truly seen; None: where `truth` projects them. They
            differ where the specimen has moved within itself.

    Raises:
        InputError: they differ in the number of tilts, or have fewer than two in common.
    """
    if len(found.use) != len(truth.use):
        raise InputError(f"{len(found.use)} tilts cannot be compared with {len(truth.use)}")
    use = found.use & truth.use
    if int(use.sum()) < 2:
        raise InputError("an alignment cannot be judged by fewer than two tilts", remedy="use more of them")
    some = found.select(use)
    target = (truth.project(points)[0] if seen is None else seen.double())[:, use]
    fits = [_best_motion(some, points.double(), target, hand) for hand in (1.0, -1.0)]
    errors = torch.full((2, *use.shape), float("nan"), dtype=torch.float64)
    errors[:, use] = torch.stack([residual for _, residual in fits]).square().sum(dim=3).mean(dim=1).sqrt()
    angles = torch.full(use.shape, float("nan"), dtype=torch.float64)
    motion = fits[0][0]
    angles[use] = rotation_distance(some.matrices @ motion.rotation, truth.matrices[use])
    return AlignmentError(errors[0], angles, errors[1], motion)


def _best_motion(geometry: TiltGeometry, points: Tensor, target: Tensor, hand: float) -> tuple[RigidMotion, Tensor]:
    """The motion of determinant `hand` after which a geometry projects points (N, 3) nearest to targets (N, T, 2).

    Begins with the affine map that fits best, made a rotation by its polar decomposition; then Gauss-Newton, the tilts
    weighted as in the pseudo-Huber loss (1 / sqrt(1 + (e / ROBUST)²), e their rms). A deformation of the images is in the
    residuals, its slope is left out of the steps.

    Returns:
        The motion and the residuals (N, T, 2), Å.
    """
    rows = geometry.magnification[:, None, None] * geometry.matrices[:, :2]  # (T, 2, 3): image position of a point
    at = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    design = torch.einsum("tai,nk->ntaik", rows, at).reshape(-1, 12)
    wanted = target - geometry.magnification[:, None] * geometry.shift
    affine = torch.linalg.lstsq(design, wanted.reshape(-1, 1), driver="gelsd").solution.reshape(3, 4)
    u, _, vh = torch.linalg.svd(affine[:, :3])
    signs = torch.tensor([1.0, 1.0, hand * float(torch.linalg.det(u @ vh).sign())], dtype=torch.float64)
    motion = RigidMotion(u @ torch.diag(signs) @ vh, affine[:, 3])
    for _ in range(_STEPS):
        turned = points @ motion.rotation.T
        residual = geometry.project(turned + motion.shift)[0] - target
        weight = (1 + residual.square().sum(dim=2).mean(dim=0) / ROBUST**2).rsqrt()  # (T,)
        basis = torch.eye(3, dtype=torch.float64).expand(len(points), 3, 3)
        slopes = torch.cat([torch.linalg.cross(basis, turned[:, None, :].expand_as(basis)), basis], dim=1)  # (N, 6, 3)
        jacobian = torch.einsum("tai,nki->ntak", rows, slopes)
        normal = torch.einsum("t,ntak,ntal->kl", weight, jacobian, jacobian)
        gradient = torch.einsum("t,ntak,nta->k", weight, jacobian, residual)
        step = -torch.linalg.lstsq(normal, gradient[:, None], driver="gelsd").solution[:, 0]
        rotation = matrix_from_rotvec(torch.rad2deg(step[:3])) @ motion.rotation
        motion = RigidMotion(rotation, motion.shift + step[3:])
        if float(step[:3].norm()) < _CONVERGED and float(step[3:].norm()) < 1e-6:
            break
    return motion, geometry.project(motion(points))[0] - target


# ---------------------------------------------------------------------------------------------------------------- poses


@dataclass(frozen=True)
class PoseErrors:
    """How far poses are from true ones, for those that have one.

    Attributes:
        found, true: (M,) indices of the pairs.
        angle: (M,) degrees, modulo symmetry; distance: (M,) Å.
    """

    found: Tensor
    true: Tensor
    angle: Tensor
    distance: Tensor


def pose_errors(
    found: tuple[Tensor, Tensor],
    true: tuple[Tensor, Tensor],
    reach: float,
    symmetry: str = "c1",
    motion: RigidMotion | None = None,
) -> PoseErrors:
    """Compare poses with true ones; each is paired with at most one, so that the distances add up to the least.

    Args:
        found: rotations (N, 3, 3) and positions (N, 3), Å, in the frame of the alignment they were found with.
        true: the same of M particles, in the true frame.
        reach: Å; what is farther apart is no pair.
        symmetry: of the particle.
        motion: that alignment's, from `alignment_error`; None: it kept the true frame.
    """
    motion = motion or RigidMotion.none()
    apart = torch.cdist(found[1].double(), motion(true[1]))
    # what is out of reach costs as much as any other such pair, so that it does not draw near ones apart
    cost = torch.where(apart <= reach, apart, torch.full_like(apart, 2 * reach))
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
    near = apart[rows, columns] <= reach
    rows, columns = rows[near], columns[near]
    angle = rotation_distance(found[0][rows], motion.rotation @ true[0][columns].double(), symmetry)
    return PoseErrors(rows, columns, angle, apart[rows, columns])


# ----------------------------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class MapAgreement:
    """How a map agrees with the true one.

    Attributes:
        curve: their FSC.
        resolution: Å, where it falls below 0.5.
        correlation: of all voxels; mirrored: the highest with a mirror image of the true map.
    """

    curve: Curve
    resolution: float
    correlation: float
    mirrored: float

    @property
    def right_hand(self) -> bool:
        """Whether the map is more like the true one than like its mirror images."""
        return self.correlation > self.mirrored


def map_agreement(volume: Tensor, truth: Tensor, pixel_size: float, mask: Tensor | None = None) -> MapAgreement:
    """FSC and hand of a map in the frame of the true one: nothing is searched for.

    Args:
        volume, truth: (n, n, n), white.
        pixel_size: Å.
        mask: (n, n, n) in 0 ... 1, of both.

    Raises:
        InputError: the maps differ in shape, or are not cubic.
    """
    weight = torch.ones_like(volume) if mask is None else mask
    curve = fourier_shell_correlation(volume * weight, truth * weight)
    mirrors = [postprocess.mirror(truth, axis) for axis in "xyz"]
    mirrors.append(postprocess.mirror(postprocess.mirror(mirrors[0], "y"), "z"))  # through the origin
    direct, *others = (
        postprocess.compare(volume * weight, other * weight, pixel_size).correlation for other in (truth, *mirrors)
    )
    return MapAgreement(curve, resolution_at(curve, postprocess.MODEL, pixel_size), direct, max(others))
