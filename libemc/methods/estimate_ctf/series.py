"""The CTF of a whole tilt series, fitted to all of its spectra together.

The defocus is sought from nothing, by the sum over all tilts; then each tilt's is found given all (`smoothing`), the
astigmatism and, on request, the phase shift in turn with it. Both hands of the defocus gradient are fitted, and their
evidence compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, RectBivariateSpline

from libemc.methods.estimate_ctf.result import Rings
from libemc.methods.estimate_ctf.rings import Background, Evidence, Frame, Rows, evidence, fitted, likelihood
from libemc.methods.estimate_ctf.smoothing import Smoothed, smooth, smooth_pair
from libemc.methods.estimate_ctf.spectra import Spectra
from libemc.numerics.ctf import Optics, equal_phase

Array = NDArray[np.float64]

RANGE = (3000.0, 100000.0)  # Å of defocus
COARSE, FINE = 200.0, 100.0  # Å: steps of the search and of what follows
SPREADS, PER_ERROR, MOST_POINTS = 5.0, 4.0, 600  # of a finer grid: reach and step in standard errors, points at most
AROUND, NEAR = 4000.0, 1500.0  # Å beyond the defoci found that are looked at again, first and later
JITTERS = (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)  # Å from tilt to tilt
WALKS = (0.0, 60.0, 250.0)  # Å of the series' base from one tilt to the next
PHASES = np.radians(np.arange(0.0, 180.0, 5.0))
PHASE_WALKS = tuple(np.radians([0.0, 2.0, 5.0, 12.0]))  # from one tilt to the next
STRETCH, STRETCH_LAST = 1800.0, 8.0  # Å of (U - V)/2: how far, and the finest step
STRETCH_POINTS, STRETCH_NEARER = 6, 3  # steps from the middle to the side of the first lattice, and of those within it
STRETCH_PRIOR = 500.0  # Å
STRETCH_EACH, STRETCH_EACH_STEP = 900.0, 150.0  # Å of a tilt's around the series': how far, and in what steps
STRETCH_JITTERS = (75.0, 150.0, 300.0)  # Å from tilt to tilt
THICKNESSES = np.arange(0.0, 4001.0, 160.0)  # Å
USUAL_THICKNESS = 1000.0
THICKNESS_ERROR, THICKNESS_WORTH = 0.25, 6.0  # of the thickness, and of log-evidence: what is less certain isn't told
WORTH = 3.0  # of log-evidence: what has less isn't measured, or isn't worth a parameter
LEAST_SCATTER = 8  # tilts whose scatter tells an error
SEEN, SIGNIFICANT = 0.015, 3.0  # 1/Å over which rings are seen or not, and the standard deviations that takes
BLOCK = 6  # rings whose residuals are summed, to see whether they scatter as they should


@dataclass(frozen=True)
class State:
    """Parameters of the N tilts that are looked at.

    Attributes:
        hand: sign of the heights in the defocus.
        defocus: (N,) Å; stretch: (N, 2) Å of (U - V)/2 along x and along the diagonal; shift: (N,) radians.
        amplitude: (M,) of the rings in the series; own: (N, M) in each tilt.
    """

    hand: int
    defocus: Array
    stretch: Array
    shift: Array
    amplitude: Array
    own: Array

    def of(self, rows: Rows, n: int, defocus: Array, stretch: Array | None = None) -> Array:
        """(Z, R) defocus of the rows of tilt n for candidates of its defocus (Z,), and of its stretch (Z, 2)."""
        e = self.stretch[n][None] if stretch is None else stretch
        double = np.radians(2 * np.nan_to_num(rows.angle))
        turned = e[:, :1] * np.cos(double) + e[:, 1:] * np.sin(double)
        return np.asarray(defocus[:, None] + self.hand * rows.height + np.where(np.isnan(rows.angle), 0.0, turned))


@dataclass(frozen=True)
class Fit:
    """A state and how well it is known.

    Attributes:
        state: the parameters.
        evidence: log-probability of the data.
        error: (N,) Å of the defocus; phase_error: (N,) radians; stretch_error: Å.
        own: (N,) log-probability of each tilt's data given the others', over that without rings.
        others, others_error: (N,) Å, what the other tilts alone say of its defocus.
        surplus: how much more the residuals scatter than they should, as a factor of the variance.
        grid: (Z,) Å; likelihood: (N, Z) of each tilt's defocus.
        rows: of each tilt, with the weights of the fit.
    """

    state: State
    evidence: float
    error: Array
    own: Array
    others: Array
    others_error: Array
    grid: Array
    likelihood: Array
    rows: tuple[Rows, ...]
    surplus: float
    phase_error: Array
    stretch_error: float = math.nan


class Series:
    """The spectra of a series, ready to be fitted.

    Args:
        spectra: of the used tilts.
        optics: of the microscope.
        thickness: Å of the specimen; None: not known.
        order: (T,) place of each tilt in the order in which the defocus may have drifted; None: as they are.
    """

    def __init__(
        self, spectra: Spectra, optics: Optics, thickness: float | None, order: Sequence[float] | None = None
    ) -> None:
        self.spectra, self.optics = spectra, optics
        self.frame = Frame.of(spectra.k, spectra.side, optics)
        self.tilts = np.unique(spectra.tilt)
        self.order = np.arange(len(self.tilts)) if order is None else np.argsort(np.asarray(order)[self.tilts])
        self.thickness = USUAL_THICKNESS if thickness is None else thickness

    def rows(self, directions: bool) -> list[Rows]:
        """Of all tilts, all directions together or each by itself."""
        return [Rows.of(self.spectra, int(j), self.frame, self.thickness, directions) for j in self.tilts]

    def search(self, hand: int, shifts: Sequence[float]) -> State:
        """Start from nothing: the defocus, of all that are possible, and the phase shift, of those given, in radians."""
        rows, count = self.rows(False), len(self.tilts)
        grid = np.arange(RANGE[0], RANGE[1] + 1, COARSE)
        best: tuple[float, State, list[Evidence]] | None = None
        for shift in shifts:
            still = State(
                hand, np.zeros(count), np.zeros((count, 2)), np.full(count, shift), np.zeros(0), np.zeros((0, 0))
            )
            each = [evidence(r, self.frame, still.of(r, n, grid), shift) for n, r in enumerate(rows)]
            value, amplitude = sum(each[1:], each[0]).best()
            top = int(value.argmax())
            if best is None or value[top] > best[0]:
                best = float(value[top]), replace(still, amplitude=amplitude[top]), each
        assert best is not None
        _, state, each = best
        for _ in range(2):  # let the tilts differ
            likelihood = np.array([e.marginal(state.amplitude)[0] for e in each])
            found = smooth(likelihood, grid, JITTERS[2:], (0.0,), self.order)
            state = replace(state, defocus=found.mean, amplitude=_amplitude(each, grid, found.mean))
        return state

    def refine(self, state: State, rows: list[Rows], surplus: float = 1.0, around: float = AROUND) -> Fit:
        """The defoci and the amplitudes, within so many Å beyond where they are."""
        low, high = state.defocus.min() - around, state.defocus.max() + around
        grid = np.arange(max(low, FINE), min(high, 1.2 * RANGE[1]), FINE)
        each = [evidence(r, self.frame, state.of(r, n, grid), state.shift[n]) for n, r in enumerate(rows)]
        pairs = [e.marginal(state.amplitude) for e in each]
        likelihood = np.array([p[0] for p in pairs]) / surplus
        smoothed = _smooth_finely(likelihood, grid, self.order)
        nearest = np.abs(smoothed.mean[:, None] - grid).argmin(1)
        own = np.array([p[1][i] for p, i in zip(pairs, nearest, strict=True)])
        amplitude = _at(each, nearest).best()[1][0]
        state = replace(state, defocus=smoothed.mean, amplitude=amplitude, own=np.maximum(own, 0))
        rows, surplus = self._weighed(rows, state)
        nothing = np.zeros(len(rows))
        known = smoothed.evidence, smoothed.error, smoothed.own, smoothed.others, smoothed.others_error
        return Fit(state, *known, grid, likelihood, tuple(rows), surplus, nothing)

    def refine_phases(self, state: State, rows: list[Rows], surplus: float = 1.0) -> Fit:
        """The same, and the phase shifts: anywhere first, and then again on a finer grid."""
        low, high = state.defocus.min() - AROUND, state.defocus.max() + AROUND
        grid = np.arange(max(low, COARSE), min(high, 1.2 * RANGE[1]), COARSE)
        first = self._phases(state, rows, surplus, grid, PHASES)
        apart = (first.state.shift - first.state.shift[0] + math.pi / 2) % math.pi - math.pi / 2 + first.state.shift[0]
        margin = PHASES[1] + SPREADS * first.phase_error.max()
        step = max(math.radians(1.0), (np.ptp(apart) + 2 * margin) / len(PHASES))
        phases = np.arange(apart.min() - margin, apart.max() + margin + step, step)
        margin = COARSE + SPREADS * first.error.max()
        low, high = first.state.defocus.min() - margin, first.state.defocus.max() + margin
        grid = np.arange(max(low, FINE), high, max(FINE / 2, (high - low) / len(grid)))
        if np.ptp(phases) > math.pi - step:
            phases = PHASES
        return self._phases(first.state, list(first.rows), first.surplus, grid, phases)

    def _phases(self, state: State, rows: list[Rows], surplus: float, grid: Array, phases: Array) -> Fit:
        """Defocus and phase shift of each tilt, of a grid (Z,) and of equidistant phases (P,)."""
        shift, defocus = (a.ravel() for a in np.meshgrid(phases, grid, indexing="ij"))
        each = [evidence(r, self.frame, state.of(r, n, defocus), shift[:, None]) for n, r in enumerate(rows)]
        pairs = [e.marginal(state.amplitude) for e in each]
        likelihood = np.array([p[0].reshape(len(phases), -1) for p in pairs]) / surplus
        found = smooth_pair(likelihood, grid, phases, JITTERS[1:], PHASE_WALKS, self.order)
        nearest = [
            int(np.hypot((defocus - z) / (grid[1] - grid[0]), np.sin(shift - p) / (phases[1] - phases[0])).argmin())
            for z, p in zip(found.mean, found.phase, strict=True)
        ]
        own = np.array([p[1][i] for p, i in zip(pairs, nearest, strict=True)])
        amplitude = _at(each, nearest).best()[1][0]
        state = replace(state, defocus=found.mean, shift=found.phase, amplitude=amplitude, own=np.maximum(own, 0))
        rows, surplus = self._weighed(rows, state)
        known = found.evidence, found.error, found.own, found.others, found.others_error
        return Fit(state, *known, grid, likelihood.max(1), tuple(rows), surplus, found.phase_error)

    def _weighed(self, rows: Sequence[Rows], state: State) -> tuple[list[Rows], float]:
        """The rows with the weights that the present model gives them, and how much more they scatter than that."""
        out, scatter = [], []
        for n, r in enumerate(rows):
            defocus = state.of(r, n, state.defocus[[n]])[0]
            remainder, rings = fitted(r, self.frame, defocus, state.shift[n], state.own[n])
            weighted = r.weighted(1 + remainder + rings)
            whole = r.excess.shape[1] // BLOCK * BLOCK
            left = (weighted.weight * (r.excess - remainder - rings))[:, :whole].reshape(len(r.excess), -1, BLOCK)
            scatter.append(left.sum(2) ** 2 / weighted.weight[:, :whole].reshape(left.shape).sum(2).clip(1e-9))
            out.append(weighted)
        return out, max(1.0, float(np.mean(np.concatenate([s.ravel() for s in scatter]))))

    # ----------------------------------------------------------------------------------------------------- astigmatism

    def astigmatic(self, fit: Fit, reach: float = STRETCH) -> Fit:
        """With the astigmatism of the series, from rows that tell directions apart.

        Args:
            fit: with rows of all directions.
            reach: Å around the present (U - V)/2.
        """
        count, centre = len(fit.rows), fit.state.stretch.mean(0)
        step, error = reach / STRETCH_POINTS, math.inf
        while True:
            grid = _square(centre, reach, step)
            each = self._stretched(fit, grid)
            value = sum(each) - 0.5 * (grid**2).sum(1) / STRETCH_PRIOR**2
            mean, error = _moments(grid, np.exp(value - value.max()))
            if error > step or step < STRETCH_LAST:
                break
            centre, reach = grid[value.argmax()], 1.5 * step
            step = reach / STRETCH_NEARER
        error = max(error, _scatter(grid, each, mean))
        state = replace(fit.state, stretch=np.tile(mean, (count, 1)))
        return replace(fit, state=state, stretch_error=2 * error)

    def astigmatic_each(self, fit: Fit) -> Fit:
        """With an astigmatism of each tilt, about the series', where that makes the data clearly more likely."""
        centre = fit.state.stretch.mean(0)
        line = np.arange(-STRETCH_EACH, STRETCH_EACH + 1, STRETCH_EACH_STEP)
        grid = _square(centre, STRETCH_EACH, STRETCH_EACH_STEP)
        each = [e.reshape(len(line), len(line)) for e in self._stretched(fit, grid)]
        fine = np.arange(-STRETCH_EACH, STRETCH_EACH + 1, STRETCH_EACH_STEP / 3)  # splines give what lies between
        each = [RectBivariateSpline(line, line, e)(fine, fine).ravel() for e in each]
        grid = _square(centre, STRETCH_EACH, STRETCH_EACH_STEP / 3)
        prior = -0.5 * (grid**2).sum(1) / STRETCH_PRIOR**2
        best, found = _log_sum(sum(each) + prior) + WORTH, fit
        distance = ((grid[:, None] - grid) ** 2).sum(2)
        tops = np.array([e.max() for e in each])
        peaked = np.exp(np.array(each) - tops[:, None])
        for jitter in STRETCH_JITTERS:
            kernel = np.exp(-0.5 * distance / jitter**2)
            kernel /= kernel.sum(0)
            message = np.log(peaked @ kernel + 1e-300) + tops[:, None]
            total = message.sum(0) + prior
            if _log_sum(total) > best:
                best = _log_sum(total)
                left = total - message
                posterior = peaked * (np.exp(left - left.max(1, keepdims=True)) @ kernel.T)
                moments = [_moments(grid, p) for p in posterior]
                state = replace(fit.state, stretch=np.array([m[0] for m in moments]))
                found = replace(fit, state=state, stretch_error=2 * float(np.mean([m[1] for m in moments])))
        return found

    def _stretched(self, fit: Fit, grid: Array) -> list[Array]:
        """Of each tilt, the log-likelihoods of astigmatisms (Z, 2)."""
        state, out = fit.state, []
        for n, r in enumerate(fit.rows):
            defocus = state.of(r, n, np.full(len(grid), state.defocus[n]), grid)
            out.append(likelihood(r, self.frame, defocus, state.shift[n], state.own[n]) / fit.surplus)
        return out

    # ------------------------------------------------------------------------------------------------------- thickness

    def seen_thickness(self, fit: Fit) -> float | None:
        """Å of the specimen, from how the rings fade and return; None where they don't tell.

        Heights all through a slab blur the rings by a sinc (McMullan et al. 2015, Ultramicroscopy 158:26).
        """
        value = np.empty(len(THICKNESSES))
        backgrounds = [Background(r, self.frame) for r in fit.rows]
        for i, thickness in enumerate(THICKNESSES):
            each = []
            for n, (r, background) in enumerate(zip(fit.rows, backgrounds, strict=True)):
                blurred = replace(r, blur=self.frame.blur(r.slope, thickness * r.path))
                defocus = fit.state.of(r, n, fit.state.defocus[[n]])
                each.append(evidence(blurred, self.frame, defocus, fit.state.shift[n], background))
            value[i] = _at(each, [0] * len(each)).best()[0][0] / fit.surplus
        share = np.exp(value - value.max())
        share /= share.sum()
        mean = float(share @ THICKNESSES)
        error = math.sqrt(share @ (THICKNESSES - mean) ** 2)
        told = value.max() > max(value[0], value[-1]) + THICKNESS_WORTH and error < THICKNESS_ERROR * mean
        return mean if told else None

    # ------------------------------------------------------------------------------------------------ what there is to see

    def shown(self, fit: Fit) -> tuple[Rings, Array, Array]:
        """The rings of all tilts, each brought to the defocus of its image's centre along lines of equal phase.

        Returns:
            The rings, the correlation of each tilt's with the fit (N,), and to how many Å they are seen (N,), NaN where none is.
        """
        k, sectors, state = self.frame.k, len(self.spectra.angle), fit.state
        count = int(self.spectra.tilt.max()) + 1
        sums = np.zeros((3, count, sectors, len(k)))
        score, limit = np.full(len(fit.rows), np.nan), np.full(len(fit.rows), np.nan)
        for n, (j, r) in enumerate(zip(self.tilts, fit.rows, strict=True)):
            defocus = state.of(r, n, state.defocus[[n]])[0]
            remainder, rings = fitted(r, self.frame, defocus, state.shift[n], state.own[n])
            parts = r.weight * np.stack([np.ones_like(rings), r.excess - remainder, rings])
            level = defocus - state.hand * r.height
            for i in range(len(defocus)):  # the rows are heights, and within them sectors
                sums[:, j, i % sectors] += self._moved(parts[:, i], defocus[i], level[i])
            flat = sum(self._moved(parts[:, i], defocus[i], state.defocus[n]) for i in range(len(defocus)))
            score[n], limit[n] = self._agreement(*np.asarray(flat))
        with np.errstate(invalid="ignore", divide="ignore"):
            measured, model = 1 + sums[1:] / sums[0]
            error = np.where(sums[0] > 0, 1 / np.sqrt(sums[0]), np.nan)
        likelihoods = np.full((count, len(fit.grid)), np.nan)
        likelihoods[self.tilts] = fit.likelihood - fit.likelihood.max(1, keepdims=True)
        measured, model, error = (values.astype(np.float32) for values in (measured, model, error))
        return Rings(k, self.spectra.angle, measured, model, error, fit.grid, likelihoods), score, limit

    def _moved(self, values: Array, here: float, there: float) -> Array:
        """(..., K) values at the frequencies where a defocus `there` has the phases that `here` has at theirs; 0 where none."""
        k = self.frame.k
        source = equal_phase(k, there, here, self.optics)
        inside = (source >= k[0]) & (source <= k[-1])
        out = np.zeros_like(values)
        for moved, line in zip(out, values, strict=True):
            moved[inside] = np.interp(source[inside], k, line)
        return out

    def _agreement(self, weight: Array, power: Array, model: Array) -> tuple[float, float]:
        """Correlation of weighted sums over all directions and heights, and the finest period with significant rings."""
        inside = weight > 0
        w, m, f = weight[inside], power[inside] / weight[inside], model[inside] / weight[inside]
        width = max(3, round(SEEN / (self.frame.k[1] - self.frame.k[0])))
        window = np.ones(width)
        both, own = np.convolve(w * m * f, window, "same"), np.convolve(w * f * f, window, "same")
        seen = np.flatnonzero(both > SIGNIFICANT * np.sqrt(own.clip(1e-12)))
        limit = 1 / self.frame.k[inside][seen[-1]] if len(seen) else math.nan
        m, f = m - np.average(m, weights=w), f - np.average(f, weights=w)
        norm = math.sqrt((w @ m**2) * (w @ f**2))
        return (float(w @ (m * f)) / norm if norm > 0 else 0.0), float(limit)


def _smooth_finely(likelihood: Array, grid: Array, order: NDArray[np.int64]) -> Smoothed:
    """`smooth`, then once more where the values are, on a grid finer than their errors.

    The rings repeat with the defocus at 1/(λk²), which is long beside the first grid: splines give the rest.
    """
    first = smooth(likelihood, grid, JITTERS, WALKS, order)
    margin = FINE + SPREADS * first.error.max()
    low, high = max(first.mean.min() - margin, grid[0]), min(first.mean.max() + margin, grid[-1])
    step = max(float(np.median(first.error)) / PER_ERROR, (high - low) / MOST_POINTS)
    if step >= FINE:
        return first
    fine = np.arange(low, high + step / 2, step)
    return smooth(CubicSpline(grid, likelihood, axis=1)(fine), fine, JITTERS, WALKS, order)


def _at(each: Sequence[Evidence], index: Sequence[int] | NDArray[np.int64]) -> Evidence:
    """The sum over the tilts of one candidate of each."""
    return Evidence(
        np.sum([e.linear[[i]] for e, i in zip(each, index, strict=True)], axis=0),
        np.sum([e.quadratic[[i]] for e, i in zip(each, index, strict=True)], axis=0),
    )


def _amplitude(each: Sequence[Evidence], grid: Array, defocus: Array) -> Array:
    """(M,) that fits best to all tilts at their defoci (N,)."""
    return _at(each, np.abs(defocus[:, None] - grid).argmin(1)).best()[1][0]


def _square(centre: Array, reach: float, step: float) -> Array:
    """(Z, 2) points of a square lattice."""
    line = np.arange(-reach, reach + step / 2, step)
    return np.asarray(centre + np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2))


def _moments(grid: Array, weight: Array) -> tuple[Array, float]:
    """Mean (2,) and standard deviation, along an axis, of a distribution on points (Z, 2)."""
    share = weight / weight.sum()
    mean = share @ grid
    return mean, float(math.sqrt(share @ ((grid - mean) ** 2).sum(1) / 2))


def _scatter(grid: Array, each: Sequence[Array], mean: Array) -> float:
    """Standard error along an axis of a common maximum, from how differently the parts' log-likelihoods rise there.

    The sandwich estimate (White 1982, Econometrica 50:1), from parabolas fitted to the lattice near the maximum.
    """
    near = np.argsort(((grid - mean) ** 2).sum(1))[:25]
    x, y = (grid[near] - mean).T
    design = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], axis=1)
    fits = np.linalg.lstsq(design, np.stack([e[near] for e in each], axis=1), rcond=None)[0]
    slope, bend = fits[1:3].T, fits[3:].sum(1)
    hessian = -np.array([[bend[0], bend[1]], [bend[1], bend[2]]])
    if len(each) < LEAST_SCATTER or np.linalg.eigvalsh(hessian)[0] <= 0:
        return 0.0
    inverse = np.linalg.inv(hessian)
    slope = slope - slope.mean(0)
    return float(math.sqrt(np.trace(inverse @ (slope.T @ slope) @ inverse) / 2))


def _log_sum(value: Array) -> float:
    return float(np.log(np.exp(value - value.max()).sum()) + value.max())
