"""Absolute positions from relative ones: what the comparison of each image with all others says about the geometry.

Where the others are wrong in the same way, an image agrees with them: smooth errors along a tilt series are nearly
invisible to a landmark's images one by one, and adding up small differences adds up their noise. So the differences of
all landmarks are explained together, by changes of the tilt geometry and of the landmarks' places; the links between
the images (`numerics.overlap.couplings`) say what difference each change makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky

from libemc.methods.align.bundle import Geometry

Array = NDArray[np.float64]

AXIS_DOUBT, AXIS_SPREAD, TILT_SPREAD, MAGNIFICATION_SPREAD = 5.0, 0.1, 0.15, 1e-3  # degrees, and of 1
HUBER = 2.0  # standard deviations
ROUNDS = 4
FREEDOMS = (0.0, 0.3, 1.0, 3.0)  # times the spreads: what cross-validation tries
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the reach: how far it lets the images move
FOLDS = 5  # of the landmarks, stripes of the field: what overlaps is in one
LEAST_SCALE = 1e-6  # of the noise over what it was taken for


@dataclass(frozen=True)
class Differences:
    """Where P landmarks were seen in T tilts, against what all other tilts say.

    Attributes:
        moved: (T, P, 2) Å, displacements against predictions that move with the other images; NaN where not measured.
        information: (T, P, 2, 2) 1/Å².
        links: (P, T, T, 2, 2) of `tracks.Evidence`.
        seen: (T, P): images that took part in the predictions.
        geometry: where the landmarks were looked for; points: (P, 3) Å, the same.
        reach: Å: how far off images and landmarks may be.
    """

    moved: Array
    information: Array
    links: Array
    seen: NDArray[np.bool_]
    geometry: Geometry
    points: Array
    reach: float


@dataclass(frozen=True)
class Moves:
    """Where landmarks are, by what was seen of them together.

    Attributes:
        displacement: (T, P, 2) Å of each measured image from where it was looked for; NaN where not measured.
        geometry: with the changes that explain the differences best.
        freedom: how far angles and magnifications of single tilts may stray, times the usual.
        error: (T,) Å, standard deviation of an image's shift, both coordinates together, a motion of the specimen set aside.
    """

    displacement: Array
    geometry: Geometry
    error: Array
    freedom: float


def explain(differences: Differences) -> Moves:
    """Least squares, robust, of all differences together."""
    moved, links, seen = differences.moved, differences.links, differences.seen
    geometry, points, reach = differences.geometry, differences.points, differences.reach
    system = _System.of(differences)
    weights = np.isfinite(moved).all(-1).astype(float)
    freedom, part, scale = FREEDOMS[1], STEPS[-1], 1.0
    fold = np.argsort(np.argsort(points[:, 0])) * FOLDS // max(len(points), 1)
    for step in range(ROUNDS):
        reduced = system.reduced(weights, reach)
        if step == ROUNDS - 2:
            part = _choose(reduced, fold, [system.scaling(freedom, p) for p in STEPS], scale, STEPS, 0.0)
            freedom = _choose(reduced, fold, [system.scaling(f, part) for f in FREEDOMS], scale, FREEDOMS)
        solution, _ = _solve(reduced.sum(0), system.scaling(freedom, part), scale)
        places, squares = system.rest(solution, weights, reach)
        scale = max(float(np.nanmedian(squares)) / (2 * np.log(2)), LEAST_SCALE)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where(np.isfinite(squares), np.minimum(1, HUBER / np.sqrt(squares / scale)), 0.0)
    count = len(seen)
    change = (system.basis @ solution).reshape(6, count)
    jacobian, direction = geometry.jacobians(points)
    explained = np.einsum("tpai,it->tpa", jacobian, change) + np.einsum("tai,pi->tpa", direction, places)
    displacement = moved - np.einsum("prtab,tpb->rpa", links, np.where(seen[..., None], explained, 0.0)) + explained
    # how sure the images' places are, is said as if they could be anywhere
    _, factor = _solve(reduced.sum(0), system.scaling(freedom), scale)
    root = (system.basis[4 * count :] * system.scaling(freedom)).reshape(2, count, -1)
    root = root.transpose(1, 0, 2).reshape(2 * count, -1)
    rigid = np.linalg.qr(direction.reshape(2 * count, 3))[0]
    root = root - rigid @ (rigid.T @ root)
    variance = (root * cho_solve((factor, True), root.T, check_finite=False).T).sum(1)
    return Moves(
        displacement,
        Geometry.from_vector(geometry.vector + system.basis @ solution),
        np.sqrt(variance.reshape(count, 2).sum(1)),
        freedom,
    )


@dataclass(frozen=True)
class _System:
    """The linear problem: what each change of geometry and place does to each difference, in its standard deviations.

    Attributes:
        basis: (6 T, k) changes of the geometry of unit variance; angles: (k,) those that aren't shifts or the one axis;
            shifts: (k,) those that are shifts.
        rows: of each landmark (R, 2, k + 4): changes, place, and the difference itself; tilts: (R,) of each landmark.
    """

    basis: Array
    angles: NDArray[np.bool_]
    shifts: NDArray[np.bool_]
    rows: list[Array]
    tilts: list[NDArray[np.intp]]

    @staticmethod
    def of(differences: Differences) -> _System:
        """Of all landmarks."""
        moved, links, seen = differences.moved, differences.links, differences.seen
        basis, angles, shifts = _basis(len(seen), differences.reach)
        jacobian, direction = differences.geometry.jacobians(differences.points)  # (T, P, 2, 6), (T, 2, 3)
        known = np.isfinite(moved).all(-1)
        shown: Array = seen.astype(float)
        rows, tilts = [], []
        for p in range(seen.shape[1]):
            here = np.flatnonzero(np.asarray(known)[:, p])
            link = links[p][here] * shown[None, :, p, None, None]  # (R, T, 2, 2)
            moves = np.einsum("rtab,tbi->rait", link, jacobian[:, p]).reshape(2 * len(here), len(basis)) @ basis
            place = np.einsum("rtab,tbi->rai", link, direction).reshape(2 * len(here), 3)
            root = np.linalg.cholesky(differences.information[here, p] + 1e-12 * np.eye(2)).transpose(0, 2, 1)
            both = np.concatenate([moves, place, moved[here, p].reshape(-1, 1)], axis=1)
            rows.append(root @ both.reshape(len(here), 2, both.shape[1]))
            tilts.append(here)
        return _System(basis, angles, shifts, rows, tilts)

    def scaling(self, freedom: float, part: float = 1.0) -> Array:
        """(k,): 1 for the one axis, `part` for shifts, `freedom` for the angles and magnifications of single tilts."""
        return np.where(self.angles, freedom, np.where(self.shifts, part, 1.0))

    def reduced(self, weights: Array, reach: float) -> Array:
        """(P, k + 1, k + 1) normal equations of each landmark, its place eliminated; the last row is the right side."""
        k = self.basis.shape[1]
        out = np.zeros((len(self.rows), k + 1, k + 1))
        for p, (rows, tilts) in enumerate(zip(self.rows, self.tilts, strict=True)):
            flat = (rows * np.sqrt(weights[tilts, p])[:, None, None]).reshape(-1, k + 4)
            own, rest = flat[:, k : k + 3], np.delete(flat, slice(k, k + 3), axis=1)
            side = own.T @ rest
            out[p] = rest.T @ rest - side.T @ np.linalg.solve(own.T @ own + np.eye(3) / reach**2, side)
        return out

    def rest(self, solution: Array, weights: Array, reach: float) -> tuple[Array, Array]:
        """Places (P, 3) of the landmarks, and what is left of each difference (T, P): squared, NaN where there is none."""
        k = self.basis.shape[1]
        places, squares = np.zeros((len(self.rows), 3)), np.full(weights.shape, np.nan)
        for p, (rows, tilts) in enumerate(zip(self.rows, self.tilts, strict=True)):
            left = rows[:, :, -1] - rows[:, :, :k] @ solution
            w = weights[tilts, p][:, None, None]
            own = rows[:, :, k : k + 3]
            matrix = np.einsum("rai,raj->ij", w * own, own) + np.eye(3) / reach**2
            places[p] = np.linalg.solve(matrix, np.einsum("rai,ra->i", w * own, left))
            squares[tilts, p] = ((left - own @ places[p]) ** 2).sum(1)
        return places, squares


def _solve(normal: Array, scaling: Array, scale: float) -> tuple[Array, Array]:
    """The changes that fit best, given noise `scale` times what it was taken for, and the Cholesky factor of the precision."""
    matrix = scaling[:, None] * normal[:-1, :-1] * scaling / scale + np.eye(len(scaling))
    factor = cholesky(matrix, lower=True, check_finite=False)
    return scaling * cho_solve((factor, True), scaling * normal[:-1, -1] / scale, check_finite=False), factor


def _choose(
    reduced: Array,
    fold: NDArray[np.intp],
    scalings: Sequence[Array],
    scale: float,
    values: Sequence[float],
    clearly: float = 1.0,
) -> float:
    """The value by whose scaling those landmarks are explained best that had no part in the fit; a later one only if it
    is better by so many standard errors."""
    total = reduced.sum(0)
    losses = np.zeros((len(values), FOLDS))
    for f in range(FOLDS):
        held = reduced[fold == f].sum(0)
        for i, scaling in enumerate(scalings):
            solution, _ = _solve(total - held, scaling, scale)
            ends = np.append(solution, -1.0)
            losses[i, f] = ends @ held @ ends
    best = 0
    for i in range(1, len(values)):
        gain = losses[best] - losses[i]
        if gain.sum() > clearly * gain.std(ddof=1) * np.sqrt(FOLDS):
            best = i
    return values[best]


def _basis(count: int, reach: float) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """(6 T, k): changes of unit variance of axis, tilt, xtilt, magnification and shift; (k,): all but the one axis and
    shifts; (k,): shifts."""
    one, zero = np.eye(count), np.zeros((count, count))
    centred = one - 1 / count
    axis = np.concatenate([np.full((count, 1), AXIS_DOUBT), AXIS_SPREAD * centred], axis=1)
    blocks = [axis, TILT_SPREAD * centred, zero[:, :0], MAGNIFICATION_SPREAD * centred, reach * one, reach * one]
    columns = np.cumsum([0, *(b.shape[1] for b in blocks)])
    out = np.zeros((6 * count, columns[-1]))
    for i, block in enumerate(blocks):
        out[i * count : (i + 1) * count, columns[i] : columns[i + 1]] = block
    k = np.arange(columns[-1])
    return out, (k > 0) & (k < columns[4]), k >= columns[4]
