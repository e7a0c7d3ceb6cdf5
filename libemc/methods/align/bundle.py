"""Bundle adjustment: from where landmarks are seen in the tilt images to the tilt geometry and the landmarks' places.

All tilts and all landmarks are fitted together by Gauss-Newton steps on the exact Jacobian; the points are eliminated
from the normal equations (Schur complement; Triggs et al. 2000, "Bundle adjustment: a modern synthesis", section 6).
Outliers lose their weight (Huber, then Tukey), and so do landmarks and tilts that are noisier than the rest. How far
axis, tilt, off-axis tilt and magnification may stray from one value for all is said by Gaussian priors, a part smooth
along the series and a part free in every tilt; the strengths are those that predict landmarks best that had no part in
the fit. What the images cannot tell (a rigid motion of the specimen, its scale) is held: the mean tilt, off-axis tilt
and magnification over the tilts stay what they were, and so does the landmarks' centroid. Everything here is numpy in
float64: Å, degrees, positions from the image centre.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dtrtri

from libemc.errors import InputError
from libemc.records import Alignment

Array = NDArray[np.float64]

KINDS = ("axis", "tilt", "xtilt", "magnification")
STRENGTHS = {  # degrees, and parts of one: what cross-validation tries, as standard deviations
    "axis": (0.0, 0.03, 0.1, 0.3, 1.0),
    "tilt": (0.0, 0.03, 0.1, 0.3, 1.0),
    "xtilt": (0.0, 0.03, 0.1, 0.3),
    "magnification": (0.0, 0.0003, 0.001, 0.003, 0.01),
}
AXIS_DOUBT = 10.0  # degrees: how far the one axis of all may be from where it starts
SHIFT_DOUBT = 0.5  # of the field: how far a shift may be from where it starts
SMOOTH_TILT = 30.0  # degrees over which the smooth part of a parameter changes
SMOOTH_ORDER = 0.25  # the same along the exposures, of their number
SMALLEST = 1e-6  # eigenvalues of a smooth prior below this part of the largest are left out
HUBER, TUKEY = 2.0, 6.0  # distances, in standard deviations of one coordinate, where weights fall and where they end
EXPECTED = 10.0  # measurements that the given covariances count for, against what residuals say of them
LEAST_LEFT = 0.1  # part of its variance that a residual must keep to say anything about the noise
UNREMARKABLE = 4.5  # over sqrt(n): excess of its n residuals up to which a landmark or a tilt is like the others
LEAST_KEPT = 1.0  # sum of weights below which a tilt or a landmark isn't cut off wholly
SOUND = 0.1  # weight from which a measurement holds a tilt in its place
TOLERANCE = 1e-3  # of a measurement's deviation: when a step moves predictions by less, the fit is done
STEPS = 40
FOLDS = 6
LEAST_LANDMARKS = 5  # for a choice of the freedom
PRICE = 2.0  # chi squared that a step to more freedom must bring at least
ROUNDS = 2  # of fit and choice of the freedom
MEDIAN = 2 * np.log(2)  # of chi squared with two degrees of freedom


def _rotations(axis: Array, tilt: Array, xtilt: Array) -> tuple[Array, Array, Array]:
    """Rz(axis), Ry(tilt), Rx(xtilt) of T tilts, each (T, 3, 3)."""
    made = []
    for angle, (i, j) in ((axis, (0, 1)), (tilt, (2, 0)), (xtilt, (1, 2))):
        matrix = np.zeros((len(angle), 3, 3))
        c, s, k = np.cos(np.radians(angle)), np.sin(np.radians(angle)), 3 - i - j
        matrix[:, i, i] = matrix[:, j, j] = c
        matrix[:, i, j], matrix[:, j, i], matrix[:, k, k] = -s, s, 1.0
        made.append(matrix)
    return made[0], made[1], made[2]


@dataclass(frozen=True)
class Geometry:
    """Where T tilts show a point: q = Rz(axis) Ry(tilt) Rx(xtilt) r, image position magnification (q_xy + shift).

    Attributes:
        axis, tilt, xtilt: (T,) degrees.
        magnification: (T,).
        shift: (T, 2) Å.
    """

    axis: Array
    tilt: Array
    xtilt: Array
    magnification: Array
    shift: Array

    @staticmethod
    def of(alignment: Alignment) -> Geometry:
        """The geometry of a record (its deformation is no part of it)."""
        magnification = alignment.magnification or (1.0,) * len(alignment.tilt)
        values = (alignment.axis, alignment.tilt, alignment.xtilt, magnification)
        shift = np.stack([alignment.shift_x, alignment.shift_y], axis=1).astype(float)
        axis, tilt, xtilt, scale = (np.array(v, float) for v in values)
        return Geometry(axis, tilt, xtilt, scale, shift)

    def into(self, alignment: Alignment) -> Alignment:
        """A record with this geometry in it, the rest as it was."""
        values = {kind: tuple(getattr(self, kind).tolist()) for kind in KINDS}
        x, y = self.shift.T.tolist()
        return alignment.model_copy(update={**values, "shift_x": tuple(x), "shift_y": tuple(y)})

    @property
    def matrices(self) -> Array:
        """(T, 3, 3): specimen frame to microscope frame."""
        z, y, x = _rotations(self.axis, self.tilt, self.xtilt)
        return z @ y @ x

    def project(self, points: Array) -> Array:
        """Image positions (T, P, 2) of points (P, 3), Å."""
        q = np.einsum("tij,pj->tpi", self.matrices[:, :2], points)
        return self.magnification[:, None, None] * (q + self.shift[:, None])

    def jacobians(self, points: Array) -> tuple[Array, Array]:
        """Derivatives of `project`.

        Args:
            points: (P, 3) Å.

        Returns:
            (T, P, 2, 6) by axis, tilt, xtilt (per degree), magnification, shift x and y; and (T, 2, 3) by the point.
        """
        z, y, x = _rotations(self.axis, self.tilt, self.xtilt)
        v = np.einsum("tij,pj->tpi", x, points)
        w = np.einsum("tij,tpj->tpi", y, v)
        q = np.einsum("tij,tpj->tpi", z[:, :2], w)
        m = self.magnification[:, None, None]
        out = np.empty((*q.shape, 6))
        out[..., 0] = np.radians(m * np.stack([-q[..., 1], q[..., 0]], axis=-1))
        out[..., 1] = np.radians(m * z[:, None, :2, 0] * w[..., 2:])
        turned = np.stack([np.zeros_like(v[..., 0]), -v[..., 2], v[..., 1]], axis=-1)
        out[..., 2] = np.radians(m * np.einsum("tij,tpj->tpi", (z @ y)[:, :2], turned))
        out[..., 3] = q + self.shift[:, None]
        out[..., 4:] = m[..., None] * np.eye(2)
        return out, self.magnification[:, None, None] * (z @ y @ x)[:, :2]

    @property
    def vector(self) -> Array:
        """(6 T,): axis, tilt, xtilt, magnification, shift x, shift y of all tilts, one after the other."""
        return np.concatenate([*(getattr(self, kind) for kind in KINDS), *self.shift.T])

    @staticmethod
    def from_vector(vector: Array) -> Geometry:
        """The inverse of `vector`."""
        axis, tilt, xtilt, magnification, x, y = vector.reshape(6, -1)
        return Geometry(axis, tilt, xtilt, magnification, np.stack([x, y], axis=1))


@dataclass(frozen=True)
class Tracks:
    """Where P landmarks were seen in T tilts.

    Attributes:
        position: (T, P, 2) Å from the image centre; NaN where a landmark was not measured (all of a tilt not used).
        information: (T, P, 2, 2) inverse covariance, 1/Å².
    """

    position: Array
    information: Array

    def __post_init__(self) -> None:
        if self.position.ndim != 3 or self.information.shape != (*self.position.shape, 2):
            raise InputError(
                f"tracks of shape {self.position.shape} with information of shape {self.information.shape}",
                remedy="give positions (tilts, landmarks, 2) and information (tilts, landmarks, 2, 2)",
            )

    @staticmethod
    def of(position: Array, sigma: Array | float) -> Tracks:
        """Tracks whose coordinates have the standard deviation `sigma` Å, (T, P) or one for all."""
        sigma = np.broadcast_to(np.asarray(sigma, float), position.shape[:2])
        return Tracks(np.asarray(position, float), sigma[..., None, None] ** -2.0 * np.eye(2))

    @cached_property
    def seen(self) -> NDArray[np.bool_]:
        """(T, P): measured, with some information."""
        known = np.isfinite(self.position).all(-1) & np.isfinite(self.information).all((-1, -2))
        return known & (np.trace(np.nan_to_num(self.information), axis1=-2, axis2=-1) > 0)

    @cached_property
    def filled(self) -> tuple[Array, Array]:
        """Position and information with 0 where nothing was seen."""
        seen = self.seen[..., None]
        return np.where(seen, self.position, 0.0), np.where(seen[..., None], self.information, 0.0)

    @cached_property
    def extent(self) -> float:
        """Å: half the width that the measured positions span."""
        p = self.position[self.seen]
        return float(max(np.ptp(p, axis=0).max() / 2, 1e-6)) if len(p) else 1.0


@dataclass(frozen=True)
class Freedom:
    """How far a parameter may stray from one value for all tilts: standard deviations (smooth, free), 0 for not at all.

    Attributes:
        axis, tilt, xtilt: degrees.
        magnification: of 1.
        along: whether the smooth part is smooth over the tilt angle or over the order of exposure.
    """

    axis: tuple[float, float] = (0.1, 0.0)
    tilt: tuple[float, float] = (0.0, 0.1)
    xtilt: tuple[float, float] = (0.0, 0.0)
    magnification: tuple[float, float] = (0.001, 0.0)
    along: str = "tilt"

    def basis(self, kind: str, tilt: Array, order: Array | None, used: NDArray[np.bool_]) -> Array:
        """Columns B such that a parameter's deviations are B u with u of unit variance: (T, k).

        Over the tilts used they have the mean 0, but for the axis, which has a column for its one value.
        """
        smooth, free = getattr(self, kind)
        columns = [np.full((len(tilt), 1), AXIS_DOUBT)] if kind == "axis" else []
        made = []
        if smooth > 0:
            made.append(smooth * _smooth_basis(tilt, order if self.along == "order" else None))
        if free > 0:
            made.append(free * np.eye(len(tilt)))
        if made:
            both = np.concatenate(made, axis=1)
            both = both - both[used].mean(0) if used.any() else both
            if both.shape[1] > len(tilt):  # the same covariance in as few columns
                both = np.asarray(np.linalg.qr(both.T, mode="r")).T
            columns.append(both)
        return np.concatenate(columns, axis=1) if columns else np.zeros((len(tilt), 0))


def _smooth_basis(tilt: Array, order: Array | None) -> Array:
    """(T, k): a root of the covariance exp(-d²/2) of smooth functions along the tilt angle, or the exposures."""
    x = tilt / SMOOTH_TILT if order is None else order / (SMOOTH_ORDER * len(order))
    values, vectors = np.linalg.eigh(np.exp(-0.5 * (x[:, None] - x) ** 2))
    keep = values > SMALLEST * values[-1]
    return vectors[:, keep] * np.sqrt(values[keep])


@dataclass(frozen=True)
class Fit:
    """What came out of `adjust`.

    Attributes:
        geometry: of every tilt, those without landmarks too.
        points: (P, 3) Å, the landmarks.
        residual: (T, P, 2) Å, measured minus predicted; NaN where not measured.
        weight: (T, P) robust weights, 0 to 1; 0 where not measured.
        variance_factor: by which the covariances of the measurements had to be multiplied.
        error: (T,) Å, expected root mean square error of a point's image position, a rigid motion of all set aside.
        effective_parameters: of geometry and points: how many the data decided.
        freedom: what was allowed.
        start: where it began: what the freedom is counted from.
        scores: of cross-validation: mean squared residual of held-out landmarks over that of the noise, by freedom.
    """

    geometry: Geometry
    points: Array
    residual: Array
    weight: Array
    variance_factor: float
    error: Array
    effective_parameters: float
    freedom: Freedom
    start: Geometry
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """Linear parameters that were fitted beside the geometry.

    Attributes:
        system: matrix and vector of the normal equations, the geometry's parameters first.
        strength: standard deviation of each parameter.
        moves: from image positions (T, P, 2) to their derivatives by the parameters (T, P, 2, q).
    """

    system: tuple[Array, Array]
    strength: float
    moves: Callable[[Array], Array]


@dataclass(frozen=True)
class Normal:
    """The normal equations around a geometry, points eliminated.

    Attributes:
        at: (6 T,) the geometry.
        coupling: (6 T, P, 3) L⁻¹ times the coupling of geometry and points; factor: (P, 3, 3) L, the points' Cholesky.
        pull: (P, 3) L⁻¹ times the points' gradient.
        geometry: (6, 6, T, P) J'WJ of the tilts and their gradients, by landmark, for sums over some of them.
        gradient: (6, T, P).
    """

    at: Array
    coupling: Array
    factor: Array
    pull: Array
    geometry: Array
    gradient: Array

    @staticmethod
    def of(
        geometry: Geometry, points: Array, residual: Array, information: Array, prior: tuple[Array, float]
    ) -> Normal:
        """From residuals (T, P, 2) and their information; `prior`: where points are expected, and 1/Å² of it."""
        j, k = geometry.jacobians(points)
        t, p = residual.shape[:2]
        weighted = information @ j  # (T, P, 2, 6)
        pulled = np.einsum("tpab,tpb->tpa", information, residual)
        blocks = np.einsum("tpai,tpaj->ijtp", j, weighted)
        gradient = np.einsum("tpai,tpa->itp", j, pulled)
        own = np.einsum("tai,tpab,tbj->pij", k, information, k, optimize=True) + prior[1] * np.eye(3)
        pull = np.einsum("tai,tpa->pi", k, pulled) - prior[1] * (points - prior[0])
        factor = np.linalg.cholesky(own)
        inverse = np.linalg.inv(factor)
        coupling = np.einsum("tpai,taj,pkj->itpk", weighted, k, inverse, optimize=True)
        return Normal(
            geometry.vector,
            coupling.reshape(6 * t, p, 3),
            factor,
            np.einsum("pij,pj->pi", inverse, pull),
            blocks,
            gradient,
        )

    def over(self, landmarks: NDArray[np.bool_] | slice = slice(None)) -> tuple[Array, Array]:
        """Matrix and vector of some landmarks."""
        t = self.gradient.shape[1]
        w = self.coupling[:, landmarks].reshape(6 * t, -1)
        matrix = -w @ w.T
        view = matrix.reshape(6, t, 6, t)
        i = np.arange(t)
        view[:, i, :, i] += self.geometry[..., landmarks].sum(-1).transpose(2, 0, 1)
        vector = self.gradient[..., landmarks].sum(-1).ravel() - w @ self.pull[landmarks].ravel()
        return matrix, vector

    def points_step(self, step: Array) -> Array:
        """How the points follow (P, 3) a step (6 T,) of the geometry."""
        local = self.pull - np.einsum("npk,n->pk", self.coupling, step)
        return np.einsum("pji,pj->pi", np.linalg.inv(self.factor), local)


@dataclass
class Problem:
    """One adjustment: the data, where it starts, and the robust weights so far."""

    tracks: Tracks
    start: Geometry
    order: Array | None

    def __post_init__(self) -> None:
        self.position, self.information = self.tracks.filled
        self.seen = self.tracks.seen
        self.used: NDArray[np.bool_] = np.asarray(self.seen.any(1))
        self.extent = self.tracks.extent
        self.count = int(self.seen.sum())
        self.geometry = self.start
        self.weight = self.seen.astype(float)
        self.variance = 1.0
        self.rest = 1.0
        self.points = np.zeros((self.position.shape[1], 3))
        self.prior: tuple[Array, float] = (np.zeros(3), self.extent**-2)
        self.warped = np.zeros_like(self.position)

    def residual(self, geometry: Geometry, points: Array) -> Array:
        """Measured minus predicted (T, P, 2), `warped` included; 0 where not measured."""
        return np.where(self.seen[..., None], self.position - self.warped - geometry.project(points), 0.0)

    def squared(self, residual: Array) -> Array:
        """(T, P): squared distance in the measurements' own standard deviations."""
        return np.einsum("tpa,tpab,tpb->tp", residual, self.information, residual, optimize=True)

    def normal(self) -> Normal:
        """The normal equations here, by the present weights."""
        information = self.information * (self.weight / self.variance)[..., None, None]
        residual = self.residual(self.geometry, self.points)
        return Normal.of(self.geometry, self.points, residual, information, self.prior)

    def basis(self, freedom: Freedom) -> list[Array]:
        """One basis for each of the six parameters."""
        angles = [freedom.basis(kind, self.start.tilt, self.order, self.used) for kind in KINDS]
        shift = SHIFT_DOUBT * self.extent * np.eye(len(self.used))
        return [*angles, shift, shift]

    def triangulate(self) -> None:
        """Points by the present geometry and weights; the first time they say where points are expected."""
        t = len(self.used)
        first = not self.points.any()
        for _ in range(2 if first else 1):
            step = self.normal().points_step(np.zeros(6 * t))
            self.points = self.points + step
            if first and self.seen.any():
                self.prior = (np.median(self.points[self.seen.any(0)], axis=0), self.prior[1])

    def reweigh(self, tukey: bool) -> None:
        """Weights and variance factor from the residuals here, each held against what its leverage leaves of it."""
        left = self.left()
        known = self.seen & (left > LEAST_LEFT)
        squared = self.squared(self.residual(self.geometry, self.points)) / np.maximum(left, LEAST_LEFT)
        if not known.any():
            return
        own = np.ones_like(squared)
        base = (left[known].sum() * np.median(squared[known]) / MEDIAN + EXPECTED) / (left[known].sum() + EXPECTED)
        for axis in (
            (0, 1) if tukey else ()
        ):  # a landmark's, then a tilt's own noise, from medians: outliers don't count
            ratio = np.ma.median(np.ma.array(squared / own, mask=~known), axis=axis).filled(base * MEDIAN) / MEDIAN
            usual = 1 + UNREMARKABLE / np.sqrt(np.maximum(known.sum(axis), 1))
            own = own * np.maximum(1.0, np.expand_dims(ratio / base / usual, axis))
        squared = squared / own
        scale = (left[known].sum() * np.median(squared[known]) / MEDIAN + EXPECTED) / (left[known].sum() + EXPECTED)
        if tukey:
            for _ in range(10):
                part = left * np.clip(1 - squared / (scale * TUKEY**2), 0, None) ** 2 * known
                scale = ((part * squared).sum() / TUKEY_MEAN + EXPECTED) / (part.sum() + EXPECTED)
        distance = np.sqrt(np.maximum(squared * np.sqrt(left) / scale, 1e-12))
        robust = np.minimum(1.0, HUBER / distance)
        if tukey:
            redescending = np.clip(1 - (distance / TUKEY) ** 2, 0, None) ** 2
            kept = redescending * self.seen  # a tilt or landmark that loses everything keeps its way back
            lost = (kept.sum(1, keepdims=True) < LEAST_KEPT) | (kept.sum(0) < LEAST_KEPT)
            robust = np.where(lost, robust, redescending)
        self.weight = robust * self.seen / own
        self.variance = float(scale)

    def left(self) -> Array:
        """(T, P): about what part of a measurement's variance its residual keeps: less where few share a tilt."""
        tilt = self.weight / np.maximum(self.weight.sum(1, keepdims=True), 1e-300)
        point = 1.5 * self.weight / np.maximum(self.weight.sum(0), 1e-300)
        return np.clip(1 - tilt, 0, 1) * np.clip(1 - point, 0, 1) * self.rest

    def others(self, factor: Array) -> float:
        """The part of the residuals' variance that parameters other than shifts and points leave, from a posterior."""
        inverse = dtrtri(factor, lower=1)[0]
        total = len(factor) - float((np.tril(inverse) ** 2).sum())
        more = max(total - 2 * int(self.used.sum()) + 3, 0.0)
        rows, columns = self.weight.sum(1), self.weight.sum(0)
        free = 2 * float((self.weight > 0).sum()) - 2 * (rows > 0).sum() - 3 * (columns > 0).sum() + 3
        return float(np.clip(1 - more / max(free, 1.0), 0.2, 1.0))

    def solve(self, freedom: Freedom, tukey: bool, steps: int = STEPS, tolerance: float = TOLERANCE) -> None:
        """Gauss-Newton steps, each with new weights, until predictions stand still."""
        basis = Blocks(self.basis(freedom))
        origin = self.start.vector
        u = None
        for step in range(steps):
            self.reweigh(tukey)
            normal = self.normal()
            matrix, vector = normal.over()
            new, factor = posterior(matrix, vector, normal.at - origin, basis)
            if step % 4 == 3:
                self.rest = self.others(factor)
            if u is None:
                u = new  # where the freedom has changed, the way from here may lie outside it
            before = np.inf if u is new else self.cost(self.geometry, self.points, u)
            for half in range(6):
                part = 0.5**half
                towards = u + part * (new - u)
                geometry = Geometry.from_vector(origin + basis.times(towards))
                points = self.points + normal.points_step(geometry.vector - normal.at)
                if self.cost(geometry, points, towards) <= before:
                    break
            moved = np.where(
                self.seen, self.squared(geometry.project(points) - self.geometry.project(self.points)), 0.0
            )
            self.geometry, self.points, u = geometry, points, towards
            if moved.sum() / max(self.count, 1) < tolerance**2 * min(self.variance, 1.0):
                break

    def folds(self, seed: int) -> NDArray[np.intp]:
        """(P,): the part of cross-validation that each landmark is held out in; -1: in none, it is seen too rarely."""
        able = np.flatnonzero((self.weight > 0).sum(0) >= 3)
        place = np.full(self.weight.shape[1], -1)
        place[np.random.default_rng(seed).permutation(able)] = np.arange(len(able)) % max(min(FOLDS, len(able)), 1)
        return place

    def cost(self, geometry: Geometry, points: Array, u: Array) -> float:
        """What a step should lower: weighted squares and priors, by the present weights."""
        data = (self.weight * self.squared(self.residual(geometry, points))).sum() / self.variance
        return float(data + (u**2).sum() + self.prior[1] * ((points - self.prior[0]) ** 2).sum())


class Blocks:
    """Six bases (T, k) as one block-diagonal matrix (6 T, sum of k)."""

    def __init__(self, blocks: Sequence[Array]) -> None:
        self.blocks = blocks
        self.rows = np.cumsum([0, *(len(b) for b in blocks)])
        self.columns = np.cumsum([0, *(b.shape[1] for b in blocks)])

    def times(self, u: Array) -> Array:
        """B u."""
        return np.concatenate(
            [b @ u[i:j] for b, i, j in zip(self.blocks, self.columns, self.columns[1:], strict=False)]
        )

    def root(self, inverse: Array) -> Array:
        """B L⁻ᵀ: a root of the covariance, from the inverse of the precision's Cholesky factor L."""
        return np.stack([self.times(row) for row in inverse], axis=1)

    def transposed(self, x: Array) -> Array:
        """B' x, for a vector or the columns of a matrix."""
        return np.concatenate([b.T @ x[i:j] for b, i, j in zip(self.blocks, self.rows, self.rows[1:], strict=False)])

    def around(self, matrix: Array) -> Array:
        """B' matrix B."""
        return self.transposed(np.ascontiguousarray(self.transposed(matrix).T))


def posterior(matrix: Array, vector: Array, away: Array, basis: Blocks) -> tuple[Array, Array]:
    """The best u of the quadratic around a place that is `away` from the start; the Cholesky factor of its precision."""
    precision = basis.around(matrix)
    precision[np.diag_indices_from(precision)] += 1.0
    right = basis.transposed(vector + matrix @ away)
    more = 0.0
    while True:
        try:
            factor = cholesky(precision, lower=True, check_finite=False)
            return cho_solve((factor, True), right, check_finite=False), factor
        except np.linalg.LinAlgError:  # rounding, where data are far stronger than priors
            more = 100 * more if more else 1e-14 * float(np.trace(precision))
            precision[np.diag_indices_from(precision)] += more


def _tukey_mean() -> float:
    """E[w d²] / E[w] of Tukey's weight for d² of two Gaussian coordinates."""
    d2 = np.linspace(0, TUKEY**2, 20001)
    w = (1 - d2 / TUKEY**2) ** 2 * np.exp(-d2 / 2)
    return float((w * d2).sum() / w.sum())


TUKEY_MEAN = _tukey_mean()


def _choose(problem: Problem, freedom: Freedom, seed: int) -> tuple[Freedom, dict[str, float]]:
    """The strengths that predict held-out landmarks best, from the linear problem around the present fit."""
    normal = problem.normal()
    place = problem.folds(seed)
    folds, able = place.max() + 1, np.flatnonzero(place >= 0)
    count = len(able)
    if count < LEAST_LANDMARKS:
        return freedom, {}
    t = len(problem.used)
    matrix, vector = normal.over()
    away = normal.at - problem.start.vector
    # shifts have the same prior whatever the freedom: they're eliminated once, and the rest is four parameters a tilt
    shift_prior = (SHIFT_DOUBT * problem.extent) ** -2.0
    reduced = []
    for fold in range(folds):
        held = normal.over(place == fold)
        m, v = matrix - held[0], vector - held[1]
        v = v + m @ away
        n = 4 * t
        own = m[n:, n:] + shift_prior * np.eye(2 * t)
        half = cholesky(own, lower=True, check_finite=False)
        side = solve_triangular(half, m[n:, :n], lower=True, check_finite=False)
        pull = solve_triangular(half, v[n:], lower=True, check_finite=False)
        reduced.append((m[:n, :n] - side.T @ side, v[:n] - side.T @ pull, half, side, pull, place == fold))
    residual = problem.residual(problem.geometry, problem.points)
    j, k = problem.geometry.jacobians(problem.points)
    information = problem.information * (problem.weight / problem.variance)[..., None, None]

    def loss(candidate: Freedom) -> Array:
        """Weighted squared residual of each landmark by the fit that had no part of it, its own place fitted."""
        blocks = Blocks(problem.basis(candidate)[:4])
        out = np.zeros(len(place))
        for m, v, half, side, pull, mine in reduced:
            u, _ = posterior(m, v, np.zeros(len(v)), blocks)
            angles = blocks.times(u)
            shift = solve_triangular(half, pull - side @ angles, lower=True, trans=1, check_finite=False)
            step = (np.concatenate([angles, shift]) - away).reshape(6, t)
            r = residual[:, mine] - np.einsum("tpai,it->tpa", j[:, mine], step)
            wr = np.einsum("tpab,tpb->tpa", information[:, mine], r)
            own = np.einsum("tai,tpa->pi", k, wr)
            best = np.linalg.solve(normal.factor[mine], own[..., None])[..., 0]
            out[mine] = np.einsum("tpa,tpa->p", wr, r) - (best**2).sum(-1)
        return out

    scores: dict[str, float] = {}
    seen: dict[Freedom, Array] = {}
    expected = max(2.0 * problem.weight[:, able].sum() - 3 * count, 1.0)

    def value(candidate: Freedom) -> Array:
        if candidate not in seen:
            seen[candidate] = loss(candidate)
            scores[describe(candidate)] = float(seen[candidate].sum() / expected)
        return seen[candidate]

    best = freedom
    for _ in range(3):
        before = best
        for kind in ("magnification", "tilt", "axis", "xtilt"):
            for which in (0, 1):
                best = _climb(best, kind, which, value)
        if problem.order is not None:
            other = replace(best, along="order" if best.along == "tilt" else "tilt")
            best = other if pays(value(other), value(best)) else best
        if best == before:
            break
    return best, scores


def _climb(best: Freedom, kind: str, which: int, value) -> Freedom:  # type: ignore[no-untyped-def]
    """One strength up or down its ladder while cross-validation pays."""
    ladder = STRENGTHS[kind]
    for direction in (1, -1):
        here = best
        while True:
            pair = list(getattr(here, kind))
            at = int(np.argmin([abs(step - pair[which]) for step in ladder])) + direction
            if not 0 <= at < len(ladder):
                break
            pair[which] = ladder[at]
            there = replace(here, **{kind: (pair[0], pair[1])})  # type: ignore[arg-type]
            if not (pays(value(there), value(here)) if direction > 0 else value(there).sum() <= value(here).sum()):
                break
            here = there
        if here != best:
            return here
    return best


def pays(new: Array, old: Array, errors: float = 0.5) -> bool:
    """Whether the loss of the landmarks falls by more than a price and so many standard errors of the difference."""
    gain = old - new
    return bool(gain.sum() > PRICE + errors * gain.std() * np.sqrt(len(gain)))


def describe(freedom: Freedom) -> str:
    """A freedom in one line: what strays, smoothly and freely, by how much."""
    parts = [f"{kind} {s:g}/{f:g}" for kind in KINDS for s, f in [getattr(freedom, kind)] if s or f]
    return ", ".join(parts or ["one value for all"]) + (" (by order)" if freedom.along == "order" else "")


def adjust(
    tracks: Tracks,
    start: Geometry,
    freedom: Freedom | None = None,
    order: NDArray[np.integer] | Sequence[int] | None = None,
    seed: int = 0,
    field: tuple[float, float, float] | None = None,
) -> Fit:
    """Fit tilt geometry and landmarks to tracks, robustly, with as much freedom as the tracks support.

    Args:
        tracks: of T tilts and P landmarks.
        start: nominal tilt angles, an axis within some 10°, shifts within a quarter of the field.
        freedom: strengths of the priors; None: chosen by cross-validation over landmarks.
        order: (T,) place of each tilt in the exposure, where known.
        seed: of the division of the landmarks for cross-validation.
        field: Å along x, y and z of the specimen over which `error` is meant; None: where the landmarks are.

    Returns:
        The fit, in the frame of the start: mean tilt, off-axis tilt and magnification over the tilts with landmarks and
        the landmarks' centroid are those of the start.

    Raises:
        InputError: tracks and start are not of the same tilts, or there is nothing measured.
    """
    if len(start.tilt) != len(tracks.position):
        raise InputError(f"tracks of {len(tracks.position)} tilts for a geometry of {len(start.tilt)}")
    if not tracks.seen.any():
        raise InputError("no landmark was measured in any tilt", remedy="look for landmarks first")
    places = None if order is None else np.asarray(order, float)
    problem = Problem(tracks, start, places)
    problem.triangulate()
    centroid = problem.points.mean(0)
    stiff = Freedom((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    problem.solve(stiff, tukey=False, steps=12, tolerance=0.1)
    chosen = freedom or Freedom()
    problem.solve(chosen, tukey=False, steps=25, tolerance=0.05)
    problem.solve(chosen, tukey=True)
    scores: dict[str, float] = {}
    for _ in range(ROUNDS if freedom is None else 0):
        better, scores = _choose(problem, chosen, seed)
        if better == chosen:
            break
        chosen = better
        problem.solve(chosen, tukey=True)
    problem.reweigh(tukey=True)
    return replace(finish(problem, chosen, centroid, field), scores=scores)


def finish(
    problem: Problem,
    freedom: Freedom,
    centroid: Array,
    field: tuple[float, float, float] | None = None,
    beside: Beside | None = None,
) -> Fit:
    """The fit with its errors, the landmarks' centroid put where it's wanted.

    Args:
        problem: solved.
        freedom: that it was solved with.
        centroid: (3,) Å.
        field: as in `adjust`.
        beside: what was fitted together with the geometry, if anything was.
    """
    normal = problem.normal()
    matrix, vector = normal.over() if beside is None else beside.system
    t = len(problem.used)
    extra = [] if beside is None else [beside.strength * np.eye(len(vector) - 6 * t)]
    basis = Blocks([*problem.basis(freedom), *extra])
    _, factor = posterior(matrix, vector, np.zeros(len(vector)), basis)
    inverse = solve_triangular(factor, np.eye(len(factor)), lower=True, check_finite=False)
    held = (inverse**2).sum()  # trace of the posterior covariance: what the priors decided
    free = len(factor) - held + 3 * len(problem.points) - problem.prior[1] * (np.linalg.inv(normal.factor) ** 2).sum()
    move = centroid - problem.points.mean(0)
    points = problem.points + move
    geometry = replace(problem.geometry, shift=problem.geometry.shift - problem.geometry.matrices[:, :2] @ move)
    probes = _probes(points[(problem.weight > 0).any(0)], field)
    moved = np.einsum("tpai,itk->tpak", geometry.jacobians(probes)[0], basis.root(inverse)[: 6 * t].reshape(6, t, -1))
    if beside is not None:
        moved = moved + beside.moves(geometry.project(probes)) @ basis.root(inverse)[6 * t :]
    residual = problem.position - problem.warped - geometry.project(points)
    sound: NDArray[np.bool_] = np.asarray(
        (problem.weight > SOUND).sum(1) >= 2
    )  # the others may be anywhere: they don't say how the whole has moved
    return Fit(
        geometry,
        points,
        np.where(problem.seen[..., None], residual, np.nan),
        problem.weight,
        problem.variance,
        _errors(geometry, probes, moved, sound if sound.any() else problem.used),
        float(free),
        freedom,
        problem.start,
    )


def _probes(points: Array, field: tuple[float, float, float] | None) -> Array:
    """Six points with the mean and the covariance of the landmarks, or of a field around their mean.

    Errors are linear in the point, so the mean of their squares over the six is that over the field.
    """
    centre = points.mean(0)
    if field is None:
        values, vectors = np.linalg.eigh((points - centre).T @ (points - centre) / len(points))
        axes = (vectors * np.sqrt(np.maximum(values, 0))).T
    else:
        axes = np.diag(np.asarray(field, float) / np.sqrt(12))
    return centre + np.sqrt(3) * np.concatenate([axes, -axes])


def _errors(geometry: Geometry, probes: Array, moved: Array, used: NDArray[np.bool_]) -> Array:
    """(T,) expected rms error, given the roots (T, 6, 2, k) of the covariance of the probes' images; less rigid motion."""
    t = len(used)
    x = np.zeros((6, 3, 3))  # derivative of a rotated point by the rotation vector
    x[:, 0, 1], x[:, 0, 2], x[:, 1, 2] = probes[:, 2], -probes[:, 1], probes[:, 0]
    turn = x - x.transpose(0, 2, 1)
    k = geometry.jacobians(probes)[1]
    rigid = np.concatenate([np.broadcast_to(k[:, None], (t, 6, 2, 3)), np.einsum("tai,pij->tpaj", k, turn)], axis=-1)
    flat = rigid[used].reshape(-1, 6)
    rest = moved - rigid @ np.linalg.lstsq(flat, moved[used].reshape(len(flat), -1), rcond=None)[0]
    return np.sqrt((rest**2).sum((1, 2, 3)) / 6)
