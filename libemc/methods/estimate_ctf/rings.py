"""The rings of the CTF in power spectra, and how likely the spectra are for a given defocus.

A spectrum over its smooth background is modelled as 1 + b(k) - a(k)·D·cos 2χ(k): what the background left over, b, is a
Gaussian process in k; a is the rings' amplitude between knots; D is what is known to blur them. A mean of n
independent coefficients of a periodogram has the variance 1/n of its square. With b integrated out the log-likelihood
is quadratic in a, and only the defocus and the phase shift have to be searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from libemc.methods.estimate_ctf.spectra import Spectra
from libemc.numerics.ctf import Optics, wavelength

Array = NDArray[np.float64]

PERIOD = 0.02  # 1/Å: length over which the background's remainder stays alike
REMAINDER = 0.5  # its standard deviation
ANISOTROPY = 0.1  # that of its part that changes with the direction
LEAST_VARIANCE = 1e-5  # of the remainder: what lies below isn't modelled
KNOTS, BEND = 9, 1.6  # of the amplitude, denser at low frequencies by this power
AMPLITUDE_SPREAD = 0.5, 0.003  # of a tilt's amplitude around the series', relative and absolute


@dataclass(frozen=True)
class Frame:
    """What all tilts share.

    Attributes:
        k: (K,) 1/Å.
        knots: (M, K) the amplitude's basis functions.
        basis: (K, B) of the background's remainder, each with prior variance 1.
        wavelength: Å; offset: (K,) the part of the phase that no defocus changes, spherical aberration and amplitude contrast.
        side: Å of a tile.
    """

    k: Array
    knots: Array
    basis: Array
    wavelength: float
    offset: Array
    side: float

    @staticmethod
    def of(k: Array, side: float, optics: Optics) -> Frame:
        """For spectra of tiles with `side` Å."""
        lam = wavelength(optics.voltage)
        at = k[0] + (k[-1] - k[0]) * np.linspace(0, 1, KNOTS) ** BEND
        knots = np.array([np.interp(k, at, row) for row in np.eye(KNOTS)])
        covariance = REMAINDER**2 * np.exp(-0.5 * ((k[:, None] - k) / PERIOD) ** 2)
        values, vectors = np.linalg.eigh(covariance)
        seen = values > LEAST_VARIANCE * values[-1]
        line = np.stack([np.ones_like(k), (k - k.mean()) / np.ptp(k)], axis=1)
        basis = np.concatenate([line, vectors[:, seen] * np.sqrt(values[seen])], axis=1)
        offset = math.asin(optics.amplitude_contrast) - math.pi / 2 * optics.cs * 1e7 * lam**3 * k**4
        return Frame(k, knots, basis, lam, offset, side)

    def phase(self, defocus: Array, shift: Array | float = 0.0) -> Array:
        """χ with the amplitude contrast's share, (..., K), for defoci (...), Å, and phase shifts, radians."""
        return math.pi * self.wavelength * defocus[..., None] * self.k**2 + self.offset + np.asarray(shift)[..., None]

    def rings(self, defocus: Array, shift: Array | float = 0.0) -> Array:
        """-cos 2χ as a Hann window shows it, (..., K): rings that come from far away in a tile are weaker.

        In single precision, but for what is the same for all defoci.
        """
        z = torch.from_numpy(np.asarray(defocus, np.float32))[..., None]
        scale = torch.from_numpy((2 * math.pi * self.wavelength * self.k**2).astype(np.float32))
        rest = torch.from_numpy(np.asarray(2 * (self.offset + np.asarray(shift)[..., None]), np.float32))
        moved = (
            (z * torch.from_numpy((2 * self.wavelength * self.k / self.side).astype(np.float32))).abs_().clamp_(max=1)
        )
        rings = torch.cos(z * scale + rest).neg_()
        turn = 2 * math.pi * moved  # the window's correlation with itself, which is 1 where nothing has moved
        seen = (2 / 3 + torch.cos(turn) / 3) * (1 - moved) + torch.sin(turn) / (2 * math.pi)
        return np.asarray((rings * seen).numpy(), np.float64)

    def blur(self, slope: Array, path: float) -> Array:
        """(..., K): what a spread of heights (...), Å, and a specimen of `path` Å along the beam leave of the rings."""
        k2 = self.wavelength * self.k**2
        return np.asarray(np.sinc(k2 * path) * np.exp(-2 * (math.pi * k2 * slope[..., None]) ** 2))


@dataclass(frozen=True)
class Rows:
    """One tilt's spectra: a row for each height and, where directions are told apart, each direction.

    Attributes:
        height: (R,) Å, as the defocus changes with it if the hand is positive.
        angle: (R,) degrees, NaN where all directions are together.
        excess: (R, K) power - 1.
        weight: (R, K) inverse variances.
        count: (R, K) independent coefficients.
        slope: (R,) Å, spread of the heights within a tile.
        path: of the beam through a slab of thickness 1.
        blur: (R, K) what they and the thickness leave of the rings.
    """

    height: Array
    angle: Array
    slope: Array
    path: float
    excess: Array
    weight: Array
    count: Array
    blur: Array

    @staticmethod
    def of(spectra: Spectra, j: int, frame: Frame, thickness: float, directions: bool) -> Rows:
        """Of tilt j; `thickness` Å along the specimen's normal."""
        mine = np.flatnonzero(spectra.tilt == j)
        power, count = spectra.power[mine], spectra.count[mine]
        height, slope = spectra.height[mine], spectra.slope[mine]
        if directions:
            sectors = len(spectra.angle)
            power, count = power.reshape(-1, power.shape[-1]), count.reshape(-1, power.shape[-1])
            height, slope = np.repeat(height, sectors), np.repeat(slope, sectors)
            angle = np.tile(spectra.angle, len(mine))
        else:
            total = count.sum(1)
            power, count = (power * count).sum(1) / np.maximum(total, 1e-9), total
            angle = np.full(len(mine), np.nan)
        path = float(spectra.beam[j])
        return Rows(height, angle, slope, path, power - 1, count, count, frame.blur(slope, thickness * path))

    def weighted(self, model: Array) -> Rows:
        """With the weights that a model (R, K) of the power over the background asks for."""
        return replace(self, weight=self.count / np.maximum(model, 0.1) ** 2)


@dataclass(frozen=True)
class Evidence:
    """The log-likelihood as a quadratic function of the amplitude a: linear·a - a·quadratic·a/2, over candidates (Z).

    Attributes:
        linear: (Z, M); quadratic: (Z, M, M).
    """

    linear: Array
    quadratic: Array

    def at(self, amplitude: Array) -> Array:
        """(Z,) for a known amplitude (M,)."""
        return np.asarray(self.linear @ amplitude - 0.5 * np.einsum("m,zmn,n->z", amplitude, self.quadratic, amplitude))

    def marginal(self, amplitude: Array) -> tuple[Array, Array]:
        """(Z,) with the amplitude integrated out, which is about the series' (M,); and its mean (Z, M)."""
        relative, absolute = AMPLITUDE_SPREAD
        precision = 1 / (relative * amplitude + absolute) ** 2
        system = self.quadratic + np.diag(precision)
        right = self.linear + precision * amplitude
        mean = np.asarray(np.linalg.solve(system, right[..., None])[..., 0], np.float64)
        determinant = np.linalg.slogdet(system)[1] - np.log(precision).sum()
        value = 0.5 * ((right * mean).sum(-1) - (precision * amplitude**2).sum() - determinant)
        return np.asarray(value, np.float64), mean

    def best(self) -> tuple[Array, Array]:
        """(Z,) with the amplitude that fits best and is nowhere negative, and that, (Z, M)."""
        value, amplitude = np.zeros(len(self.linear)), np.zeros_like(self.linear)
        for z, (right, system) in enumerate(zip(self.linear, self.quadratic, strict=True)):
            ridge = 1e-9 * np.trace(system) * np.eye(len(right))
            lower = np.linalg.cholesky(system + ridge)
            amplitude[z] = nnls(lower.T, np.linalg.solve(lower, right))[0]
            value[z] = right @ amplitude[z] - 0.5 * amplitude[z] @ system @ amplitude[z]
        return value, amplitude

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.linear + other.linear, self.quadratic + other.quadratic)


class Background:
    """What a tilt's spectra hold besides rings, integrated out: its projection takes away all that it can explain."""

    def __init__(self, rows: Rows, frame: Frame) -> None:
        turns = np.ones((1, len(rows.angle)))
        scales = np.ones(1)
        if not np.isnan(rows.angle).any():
            double = np.radians(2 * rows.angle)
            turns = np.stack([np.ones_like(double), np.cos(double), np.sin(double)])
            scales = np.array([1.0, ANISOTROPY / REMAINDER, ANISOTROPY / REMAINDER])
        self.turns, self.frame = turns * scales[:, None], frame
        pairs = np.einsum("ar,br,rk->abk", self.turns, self.turns, rows.weight, optimize=True)
        size = len(turns) * frame.basis.shape[1]
        normal = np.einsum("kp,abk,kq->apbq", frame.basis, pairs, frame.basis, optimize=True).reshape(size, size)
        self.inverse = np.linalg.inv(normal + np.eye(size))
        self.right = self.onto(rows.weight * rows.excess)
        self.solution = self.inverse @ self.right

    def onto(self, weighted: Array) -> Array:
        """(..., P) products of weighted rows (..., R, K) with all basis functions."""
        turned = np.einsum("ar,...rk->...ak", self.turns, weighted, optimize=True)
        return np.asarray((turned @ self.frame.basis).reshape(*turned.shape[:-2], -1))

    def rows(self, coefficients: Array) -> Array:
        """(R, K) of the background with coefficients (P,)."""
        parts = coefficients.reshape(len(self.turns), -1) @ self.frame.basis.T
        return np.asarray(self.turns.T @ parts)


def evidence(
    rows: Rows, frame: Frame, defocus: Array, shift: Array | float = 0.0, background: Background | None = None
) -> Evidence:
    """For candidates of the defocus in each row.

    Args:
        defocus: (Z, R) Å. shift: (Z, 1) or a number, radians.
        background: of these rows, where it is known.
    """
    background = background or Background(rows, frame)
    knots, linear, quadratic = frame.knots, [], []
    step = max(1, int(4e6 / rows.excess.size))
    for low in range(0, len(defocus), step):
        some = slice(low, low + step)
        rings = frame.rings(defocus[some], shift if np.ndim(shift) == 0 else np.asarray(shift)[some]) * rows.blur
        weighted = rings * rows.weight
        turned = np.einsum("ar,zrk->zak", background.turns, weighted, optimize=True)
        onto = np.einsum("zak,mk,kp->zmap", turned, knots, frame.basis, optimize=True)
        onto = onto.reshape(*onto.shape[:2], -1)
        linear.append((weighted * rows.excess).sum(1) @ knots.T - onto @ background.solution)
        own = np.einsum("zk,mk,nk->zmn", (weighted * rings).sum(1), knots, knots, optimize=True)
        quadratic.append(own - onto @ background.inverse @ onto.swapaxes(1, 2))
    return Evidence(np.concatenate(linear), np.concatenate(quadratic))


def likelihood(rows: Rows, frame: Frame, defocus: Array, shift: float, amplitude: Array) -> Array:
    """(Z,) log-likelihood for candidates of the defocus (Z, R) at a known amplitude (M,): `Evidence.at`, but quicker."""
    background, out = Background(rows, frame), np.empty(len(defocus))
    height = amplitude @ frame.knots
    step = max(1, int(4e6 / rows.excess.size))
    for low in range(0, len(defocus), step):
        some = slice(low, low + step)
        rings = frame.rings(defocus[some], shift) * (rows.blur * height)
        weighted = rings * rows.weight
        onto = background.onto(weighted)
        fits = np.einsum("zrk,rk->z", weighted, rows.excess) - onto @ background.solution
        own = np.einsum("zrk,zrk->z", weighted, rings) - np.einsum("zp,pq,zq->z", onto, background.inverse, onto)
        out[some] = fits - 0.5 * own
    return out


def fitted(rows: Rows, frame: Frame, defocus: Array, shift: float, amplitude: Array) -> tuple[Array, Array]:
    """What remains of the background, and the rings: both (R, K), for defoci (R,) and an amplitude (M,)."""
    rings = frame.rings(defocus, shift) * rows.blur * (amplitude @ frame.knots)
    left = replace(rows, excess=rows.excess - rings)
    background = Background(left, frame)
    return background.rows(background.solution), rings
