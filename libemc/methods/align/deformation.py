"""Smooth deformation of the images, from what a bundle adjustment leaves over, where cross-validation says that it pays.

In each tilt a displacement field on a few nodes is added to the image positions; along the exposures each node's
displacement is a random walk, and everything is fitted together with geometry and landmarks. What the geometry can do
already (shift, turn and scale of an image) is no part of the field. The number of nodes and the length of the walk's
steps are those that predict landmarks best which had no part in the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from libemc.methods.align.bundle import (
    TOLERANCE,
    Array,
    Beside,
    Blocks,
    Fit,
    Geometry,
    Normal,
    Problem,
    Tracks,
    finish,
    pays,
    posterior,
)
from libemc.numerics.splines import field_basis
from libemc.records import Deformation

NODES = (2, 3, 4, 5)  # along each side
FIRST_NODES = 3  # tried in any case; more only while they pay
STRENGTHS = (0.3, 1.0, 3.0, 10.0)  # displacement of a node over the noise of one measurement
SMOOTH = 0.5  # of the field: over which a displacement changes
LEAST_MODE = 0.01  # shapes with less than this part of the largest one's variance are left out
WALK_MODES = 10  # of the random walk, the slowest; faster ones are noise
LEAST_LANDMARKS = 8
CLEARLY = 2.0  # standard errors by which a field must predict held-out landmarks better than none
WORTH = 0.01  # and the part of their squared residual that it must take away
STEPS = 8
NEAREST = 3  # landmarks beside each, whose residuals are compared with its own
FEWEST = 20  # landmarks from which neighbours are near enough for that
OUTLIER = 9.0  # times the median square of a residual at which one is cut off
LEAST_USED = 4  # tilts


@dataclass(frozen=True)
class Warp:
    """A family of displacement fields, linear in its parameters.

    Attributes:
        nodes: along each side; field: Å along x and y that they span.
        modes: (2, nodes², M): displacements of the nodes, without shift, turn and scale of the whole: a root of the
            covariance of smooth ones, with unit variance on average.
        walk: (T, K): a root of the covariance of a mode's amplitude along the series, 0 and of unit variance on average.
    """

    nodes: int
    field: tuple[float, float]
    modes: Array
    walk: Array

    @staticmethod
    def of(nodes: int, field: tuple[float, float], order: Array) -> Warp:
        """By the place of each tilt in the exposure (T,)."""
        x, y = (side.ravel() for side in np.meshgrid(*(np.linspace(-f / 2, f / 2, nodes) for f in field)))
        zero = np.zeros_like(x)
        rigid = np.stack([np.r_[zero + 1, zero], np.r_[zero, zero + 1], np.r_[-y, x], np.r_[x, y]], axis=1)
        rest = np.eye(len(rigid)) - rigid @ np.linalg.pinv(rigid)
        squares = np.square(np.subtract.outer(x, x) / field[0]) + np.square(np.subtract.outer(y, y) / field[1])
        values, vectors = np.linalg.eigh(rest @ np.kron(np.eye(2), np.exp(-0.5 * squares / SMOOTH**2)) @ rest)
        keep = values > LEAST_MODE * values[-1]
        modes = vectors[:, keep] * np.sqrt(values[keep] * len(x) / values[keep].sum())
        rank = np.argsort(np.argsort(order)) / max(len(order) - 1, 1)
        centre = np.eye(len(rank)) - 1 / len(rank)
        values, vectors = np.linalg.eigh(centre @ np.minimum(rank[:, None], rank) @ centre)
        slow = slice(-WALK_MODES, None)
        walk = vectors[:, slow] * np.sqrt(np.maximum(values[slow], 0))
        walk = walk / np.sqrt((walk**2).sum(1).mean())
        return Warp(nodes, field, modes.reshape(2, nodes * nodes, -1), walk)

    def at(self, positions: Array) -> Array:
        """(T, P, 2, M): displacement of image positions (T, P, 2) by each mode; beyond the field, that of its edge."""
        half = np.asarray(self.field) / 2
        inside = torch.from_numpy(np.clip(positions, -half, half))
        return np.einsum("tpn,anm->tpam", field_basis(inside, self.field, self.nodes, self.nodes).numpy(), self.modes)

    def moves(self, positions: Array) -> Array:
        """(T, P, 2, M K): derivatives of the displacements by the amplitudes."""
        out = np.einsum("tpam,tk->tpamk", self.at(positions), self.walk)
        return out.reshape(*positions.shape, -1)

    def displacements(self, amplitudes: Array) -> Array:
        """(T, 2, nodes²) of amplitudes (M K,)."""
        return np.einsum("anm,mk,tk->tan", self.modes, amplitudes.reshape(-1, self.walk.shape[1]), self.walk)

    def record(self, amplitudes: Array) -> Deformation:
        """As it is written into an alignment."""
        x, y = self.displacements(amplitudes).transpose(1, 0, 2).tolist()
        rows = (tuple(tuple(t) for t in side) for side in (x, y))
        return Deformation(rows=self.nodes, columns=self.nodes, field=self.field, dx=next(rows), dy=next(rows))


def _displaced(shapes: Array, warp: Warp, amplitudes: Array) -> Array:
    """(T, P, 2) displacements by shapes (T, P, 2, M) and amplitudes (M K,)."""
    return np.einsum("tpam,mt->tpa", shapes, amplitudes.reshape(-1, warp.walk.shape[1]) @ warp.walk.T)


@dataclass(frozen=True)
class _Joint:
    """Normal equations of geometry and field together, points eliminated."""

    normal: Normal
    points: Array  # (P, 3, M K): L⁻¹ times the coupling of points and field
    cross: Array  # (6, T, P, M)
    own: Array  # (T, P, M, M)
    pulled: Array  # (T, P, M)
    walk: Array

    @staticmethod
    def of(problem: Problem, warp: Warp, shapes: Array) -> _Joint:
        """Around the present fit, whose residual has the present field taken off."""
        information = problem.information * (problem.weight / problem.variance)[..., None, None]
        residual = problem.residual(problem.geometry, problem.points)
        j, k = problem.geometry.jacobians(problem.points)
        normal = problem.normal()
        weighted = information @ shapes
        inverse = np.linalg.inv(normal.factor)
        points = np.einsum("tai,tpam->ptim", k, weighted)
        points = np.einsum("ptim,tk->pimk", points, warp.walk, optimize=True).reshape(*points.shape[::2], -1)
        return _Joint(
            normal,
            inverse @ points,
            np.einsum("tpai,tpam->itpm", j, weighted, optimize=True),
            np.einsum("tpam,tpan->tpmn", shapes, weighted, optimize=True),
            np.einsum("tpam,tpa->tpm", weighted, residual, optimize=True),
            warp.walk,
        )

    def over(self, landmarks: NDArray[np.bool_] | slice = slice(None)) -> tuple[Array, Array]:
        """Matrix and vector of some landmarks: the geometry's parameters, then the field's."""
        matrix, vector = self.normal.over(landmarks)
        walk, q = self.walk, self.points.shape[-1]
        c = self.points[landmarks].reshape(-1, q)
        w = self.normal.coupling[:, landmarks].reshape(len(vector), -1)
        cross = np.einsum("itm,tk->itmk", self.cross[:, :, landmarks].sum(2), walk).reshape(len(vector), q) - w @ c
        own = (
            np.einsum("tmn,tk,tl->mknl", self.own[:, landmarks].sum(1), walk, walk, optimize=True).reshape(q, q)
            - c.T @ c
        )
        pull = np.einsum("tm,tk->mk", self.pulled[:, landmarks].sum(1), walk).ravel()
        pull -= c.T @ self.normal.pull[landmarks].ravel()
        return np.block([[matrix, cross], [cross.T, own]]), np.concatenate([vector, pull])

    def points_step(self, step: Array) -> Array:
        """How the points follow a step of the geometry and the field."""
        n = len(step) - self.points.shape[-1]
        follow = np.einsum("pij,pj->pi", np.linalg.inv(self.normal.factor).transpose(0, 2, 1), self.points @ step[n:])
        return self.normal.points_step(step[:n]) - follow


def _losses(problem: Problem, fit: Fit, warp: Warp, strengths: Sequence[float], seed: int) -> list[Array]:
    """Weighted squared residual (P,) of held-out landmarks, their own place fitted, for each strength in Å."""
    shapes = warp.at(problem.geometry.project(problem.points))
    joint = _Joint.of(problem, warp, shapes)
    information = problem.information * (problem.weight / problem.variance)[..., None, None]
    residual = problem.residual(problem.geometry, problem.points)
    j, k = problem.geometry.jacobians(problem.points)
    place = problem.folds(seed)
    matrix, vector = joint.over()
    t, q = len(problem.used), joint.points.shape[-1]
    away = np.concatenate([joint.normal.at - problem.start.vector, np.zeros(q)])
    geometry = problem.basis(fit.freedom)
    out = [np.zeros(len(place)) for _ in strengths]
    for fold in range(place.max() + 1):
        mine = place == fold
        held = joint.over(mine)
        for strength, loss in zip(strengths, out, strict=True):
            basis = Blocks([*geometry, strength * np.eye(q)])
            u, _ = posterior(matrix - held[0], vector - held[1], away, basis)
            step = basis.times(u) - away
            moves = np.einsum("tpai,it->tpa", j[:, mine], step[: 6 * t].reshape(6, t))
            r = residual[:, mine] - moves - _displaced(shapes[:, mine], warp, step[6 * t :])
            wr = np.einsum("tpab,tpb->tpa", information[:, mine], r)
            pull = np.einsum("tai,tpa->pi", k, wr)
            best = np.linalg.solve(joint.normal.factor[mine], pull[..., None])[..., 0]
            loss[mine] = np.einsum("tpa,tpa->p", wr, r) - (best**2).sum(-1)
    return out


def fit_deformation(
    tracks: Tracks,
    fit: Fit,
    field: tuple[float, float],
    order: NDArray[np.integer] | Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Deformation | None, Fit, dict[str, float]]:
    """A smooth displacement field for every tilt, with geometry and landmarks fitted anew beside it, where it pays.

    Args:
        tracks: what `fit` was made of.
        fit: by `bundle.adjust`.
        field: Å along x and y of a whole image.
        order: (T,) place of each tilt in the exposure; None: the stack's own order.
        seed: of the division of the landmarks for cross-validation.

    Returns:
        The field, or None where it doesn't predict held-out landmarks clearly better; the fit beside it (or `fit`
        itself), its residuals with the field taken off; and the scores: squared residual of held-out landmarks over
        that without a field.
    """
    places = np.arange(len(fit.error), dtype=float) if order is None else np.asarray(order, float)
    problem = Problem(tracks, fit.start, None if order is None else places)
    if (problem.seen.sum(0) >= 3).sum() < LEAST_LANDMARKS:
        return None, fit, {}
    problem.geometry, problem.points, problem.weight = fit.geometry, fit.points, fit.weight
    problem.variance, problem.prior = fit.variance_factor, (np.median(fit.points, axis=0), problem.prior[1])
    problem.reweigh(tukey=True)
    noise = np.sqrt(problem.variance / np.median(problem.information[problem.seen][:, [0, 1], [0, 1]]))
    (none,) = _losses(problem, fit, Warp.of(2, field, places), (0.0,), seed)
    scores = {"none": 1.0}
    best: tuple[Array, Warp | None, float] = (none, None, 0.0)
    for nodes in NODES:
        if nodes > FIRST_NODES and (best[1] is None or best[1].nodes < nodes - 1):
            break  # more nodes have stopped to pay
        warp = Warp.of(nodes, field, places)
        strengths = [s * noise for s in STRENGTHS]
        for strength, loss in zip(strengths, _losses(problem, fit, warp, strengths, seed), strict=True):
            scores[f"{nodes} x {nodes} nodes, {strength:.3g} Å"] = float(loss.sum() / none.sum())
            if pays(loss, best[0]):
                best = (loss, warp, strength)
    loss, chosen, strength = best
    if chosen is None or not pays(loss, none, CLEARLY) or loss.sum() > (1 - WORTH) * none.sum():
        return None, fit, scores
    amplitudes, system = _solve(problem, fit, chosen, strength)
    beside = Beside(system, strength, chosen.moves)
    made = finish(problem, fit.freedom, fit.points.mean(0), None, beside)
    return chosen.record(amplitudes), replace(made, scores=fit.scores), scores


def _solve(problem: Problem, fit: Fit, warp: Warp, strength: float) -> tuple[Array, tuple[Array, Array]]:
    """Gauss-Newton steps for geometry, points and field together; the amplitudes, and the last normal equations."""
    n = 6 * len(problem.used)
    origin = problem.start.vector
    amplitudes = np.zeros(warp.modes.shape[-1] * warp.walk.shape[1])
    basis = Blocks([*problem.basis(fit.freedom), strength * np.eye(len(amplitudes))])
    for _ in range(STEPS):
        before = problem.geometry.project(problem.points)
        shapes = warp.at(before)
        problem.warped = _displaced(shapes, warp, amplitudes)
        problem.reweigh(tukey=True)
        joint = _Joint.of(problem, warp, shapes)
        system = joint.over()
        here = np.concatenate([joint.normal.at - origin, amplitudes])
        new = basis.times(posterior(*system, here, basis)[0])
        problem.points = problem.points + joint.points_step(new - here)
        problem.geometry, amplitudes = Geometry.from_vector(origin + new[:n]), new[n:]
        change = _displaced(shapes, warp, new[n:] - here[n:]) + problem.geometry.project(problem.points) - before
        if problem.squared(np.where(problem.seen[..., None], change, 0.0)).sum() < (
            TOLERANCE**2 * problem.variance * problem.count
        ):
            break
    problem.warped = _displaced(warp.at(problem.geometry.project(problem.points)), warp, amplitudes)
    problem.reweigh(tukey=True)
    return amplitudes, system


def wandering(residual: Array, points: Array, directions: Array, order: Array) -> Array:
    """How far the specimen has moved locally in each tilt from where it was before the first: root mean square, Å, (T,).

    Points move as in a random walk from exposure to exposure. The landmarks' places take up part of that, known from the
    geometry; the residuals say how much the rest is. Errors of measurement are each landmark's own, and neighbours that are
    off in the same way move with the specimen. Of few landmarks, which have no near neighbours, all that is left counts.

    Args:
        residual: (T, P, 2) Å, NaN where not measured; points: (P, 3) Å.
        directions: (T, 2, 3): what a motion in space is in the images; order: (T,) when each was taken.
    """
    seen: NDArray[np.bool_] = np.asarray(np.isfinite(residual).all(-1))
    used = np.flatnonzero(seen.any(1))
    left = np.where(seen[..., None], residual, 0.0)
    squares = (left**2).sum(-1)
    if len(used) < LEAST_USED:
        return np.zeros(len(seen))
    limit = OUTLIER * float(np.median(squares[seen]))
    if len(points) >= FEWEST:
        near = cKDTree(points[:, :2]).query(points[:, :2], NEAREST + 1)[1]
        one, other = np.repeat(np.arange(len(points)), NEAREST), near[:, 1:].ravel()
    else:
        one = other = np.arange(len(points))
    products = np.clip((left[:, one] * left[:, other]).sum(-1), -limit, limit)
    mean = float(products.sum() / max((seen[:, one] & seen[:, other]).sum(), 1))
    steps = np.empty(len(seen))
    steps[np.argsort(order)] = np.arange(1, len(seen) + 1)
    along = np.minimum(steps[used, None], steps[used])
    seen_as = directions[used].reshape(-1, 3)
    walk = (seen_as @ seen_as.T) * np.kron(along, np.ones((2, 2)))
    basis = np.linalg.qr(seen_as)[0]
    kept = float(np.trace(walk) - np.trace(basis.T @ walk @ basis)) / len(used)
    return np.asarray(np.sqrt(max(mean, 0.0) / kept * steps * (directions**2).sum((1, 2))))
