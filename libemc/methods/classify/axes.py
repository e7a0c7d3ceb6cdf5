"""The axes along which particles differ: probabilistic principal components of difference maps, each particle seen as it was.

The model is D_i = W_i·(average + Σ z_ik u_k + Σ t_im v_m) + noise of variance W_i: unknown axes u, within a mask and a band,
with coordinates z of unit variance, and known ones v that say nothing of what a particle is: its contrast, and how the
average changes when it is turned and moved, since every pose is a little wrong. EM finds axes and coordinates (Tipping &
Bishop 1999, J. R. Stat. Soc. B 61, 611; for images with a CTF Tagare et al. 2015, J. Struct. Biol. 191, 245). It begins with
the singular vectors of the masked difference maps, found by subspace iteration (Halko, Martinsson & Tropp 2011, SIAM Rev.
53, 217), which are what emClarity's PCA (16.11) works with. Both see the data only in products of matrices.

How strong axes of noise are is seen from the same difference maps, each displaced at random within the box: noise,
neighbours, and all weights stay what they are, and what particles have in common doesn't.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods.classify.differences import Differences
from libemc.methods.classify.frame import Frame
from libemc.methods.subtilts import Progress
from libemc.numerics import fourier

ITERATIONS = 8
"""Of EM: what is left to gain after them is fitted noise."""
SUBSPACE = 4
"""Passes over the data for the singular vectors, the last for the coordinates."""
MORE = 10
"""Vectors beside those asked for, that subspace iteration carries along."""
DISPLACEMENT = 0.2
"""Farthest displacement, in box lengths."""
RIDGE = 1e-3
"""Of the mean weight, added to the weight of every coefficient of an axis: what no particle shows is left dark."""
CONTRAST, SHIFT, TURN = 0.1, 0.3, 0.02
"""Deviations of the known axes at the start: relative, voxels of the small cube, radians."""
POINTS_AT_ONCE = 4096
"""Coefficients whose equations are solved at a time."""
GAP = 3
"""Axes of noise after the first, whose distance from it is taken for how much the first is up to chance."""
UNSURE = 0.1
"""Part of the strength of noise that an axis must be above it at least: displaced noise is the same to within a few percent."""


@dataclass(frozen=True)
class Problem:
    """What axes are looked for in.

    Attributes:
        band: which of the frame's points take part.
        mask: (s, s, s) of the small cube, in 0 ... 1.
        known: (7, Q) complex64 of `known_axes`; None: no known axes.
        displaced: (N, 3) box lengths by which each particle's difference map is displaced; None: by nothing.
        device: where products are computed.
    """

    differences: Differences
    band: slice
    mask: Tensor
    known: Tensor | None
    displaced: Tensor | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Axes:
    """What was found in a band of q points.

    Attributes:
        balls: (k, q) complex64, in units of the noise, per standard deviation of the coordinates; strongest first.
        strength: (k,) float64, 2⟨W, |u|²⟩ of a mean particle: squared deviation of the coordinates over that of their noise.
        known_precision: (7,) float64, inverse variances of the coordinates along the known axes; empty where there are none.
        singular: (k,) singular values of the masked difference maps.
    """

    balls: Tensor
    strength: Tensor
    known_precision: Tensor
    singular: Tensor


def known_axes(frame: Frame, average: Tensor) -> Tensor:
    """(7, Q) complex64: how a particle's ball changes by relative contrast, by a shift along x, y, z by a voxel of the small
    cube, and by a turn about x, y, z by a radian.

    Args:
        average: (s, s, s) of the small cube, masked.
    """
    ball = frame.balls(average)
    line = torch.arange(frame.small, dtype=torch.float32) - frame.small // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    by_z, by_y, by_x = torch.gradient(average.float())
    turns = [y * by_z - z * by_y, z * by_x - x * by_z, x * by_y - y * by_x]
    shifts = [ball * (-2j * math.pi / frame.small) * axis for axis in frame.points.float()]
    return torch.stack([ball, *shifts, *(frame.balls(turn) for turn in turns)])


def displacements(count: int, generator: torch.Generator) -> Tensor:
    """(N, 3) box lengths, evenly within the ball of `DISPLACEMENT`."""
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    return direction * DISPLACEMENT * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)


def _weakening(frame: Frame, mask: Tensor, displaced: Tensor) -> Tensor:
    """(N,) by how much less noise comes to lie in the mask when it is displaced: the insertion kernel fades it outwards."""
    power = frame.envelope(frame.small) ** 2
    spectrum = torch.fft.rfftn(power) * torch.fft.rfftn(mask).conj()
    overlap = torch.fft.irfftn(spectrum, s=power.shape).clamp_min(0)
    voxel = (-displaced * frame.small).round().long() % frame.small
    return (overlap[voxel[:, 2], voxel[:, 1], voxel[:, 0]] / overlap[0, 0, 0]).sqrt().clamp_min(0.1).float()


class _Blocks:
    """The difference maps of a problem, block by block."""

    def __init__(self, problem: Problem, progress: Progress | None) -> None:
        self.problem, self.progress = problem, progress
        frame, displaced = problem.differences.frame, problem.displaced
        self.points = frame.points[:, problem.band].double() * (frame.length / (frame.padded * frame.pixel_size))
        self.factor = None if displaced is None else _weakening(frame, problem.mask, displaced)

    def __call__(self, label: str) -> object:
        p = self.problem
        for here, data, weight in p.differences.blocks(p.band, p.device, self.progress, label):
            if p.displaced is not None and self.factor is not None:
                turns = p.displaced[here] @ self.points
                phase = torch.polar(1 / self.factor[here, None].expand_as(turns), (-2 * torch.pi * turns).float())
                data = data * phase.to(data.device)
            yield here, data, weight


def _flat(balls: Tensor) -> Tensor:
    """(..., Q) complex as (..., 2Q) real."""
    return torch.view_as_real(balls.resolve_conj().contiguous()).flatten(-2)


class _Projector:
    """Between balls within a band and masked maps of the small cube."""

    def __init__(self, problem: Problem) -> None:
        self.frame, self.band, self.mask = problem.differences.frame, problem.band, problem.mask

    def whole(self, balls: Tensor) -> Tensor:
        """(k, Q), zero outside the band."""
        out = torch.zeros(*balls.shape[:-1], self.frame.points.shape[1], dtype=torch.complex64)
        out[..., self.band] = balls.cpu()
        return out

    def masked(self, balls: Tensor) -> Tensor:
        """Balls (k, q) of the maps within the mask, cut back to the band."""
        return torch.stack([self.frame.balls(self.frame.maps(self.whole(b)) * self.mask)[self.band] for b in balls])

    def to_space(self, balls: Tensor) -> Tensor:
        """(k, s³): plain transforms of balls, masked: the adjoint of `to_balls`."""
        s = self.frame.small
        x, y, z = self.frame.points
        out = []
        for ball in self.whole(balls):
            spectrum = ball.new_zeros((s, s, s // 2 + 1))
            spectrum[z % s, y % s, x] = ball
            edge = x == 0
            spectrum[-z[edge] % s, -y[edge] % s, x[edge]] = ball[edge].conj()
            out.append((fourier.irfftn_centred(spectrum, (s,) * 3) * self.mask).flatten() * s**1.5)
        return torch.stack(out)

    def to_balls(self, maps: Tensor) -> Tensor:
        """(k, q): plain transforms of masked maps (k, s³)."""
        s = self.frame.small
        x, y, z = self.frame.points[:, self.band]
        maps = maps.reshape(-1, s, s, s)
        return torch.stack([fourier.rfftn_centred(m * self.mask, 3)[z % s, y % s, x] / s**1.5 for m in maps])

    def unfaded(self, balls: Tensor) -> Tensor:
        """What plain transforms of masked maps (k, q) are as balls that stand for maps."""
        maps = self.to_space(balls).reshape(-1, *self.mask.shape) / self.frame.small**1.5
        noise = self.frame.noise.sqrt()
        return torch.stack([(self.frame.balls(m) / noise)[self.band] for m in maps])


def singular_vectors(
    problem: Problem, count: int, generator: torch.Generator, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """The strongest singular vectors of the masked difference maps within the band.

    Args:
        count: how many.

    Returns:
        (k, q) complex64, balls of the vectors as axes that stand for maps, of coordinates with unit variance as far as the
        difference maps by themselves tell; (k,) float64 singular values.
    """
    projector, blocks = _Projector(problem), _Blocks(problem, progress)
    s, number = projector.frame.small, len(problem.differences)
    width = min(count + MORE, number)
    maps = torch.linalg.qr(torch.randn(s**3, width, generator=generator) * problem.mask.reshape(-1, 1))[0].T
    scores = torch.empty(number, width, dtype=torch.float64)
    for step in range(SUBSPACE):
        right = projector.to_balls(maps).to(problem.device)
        total = torch.zeros(width, right.shape[1] * 2, device=problem.device)
        for here, data, _ in blocks(f"singular vectors {step + 1}"):  # type: ignore[attr-defined]
            flat = _flat(data)
            part = 2 * flat @ _flat(right).T
            scores[here] = part.double().cpu()
            total += part.T @ flat
        if step < SUBSPACE - 1:
            back = torch.view_as_complex(total.reshape(width, -1, 2).contiguous())
            maps = torch.linalg.qr(projector.to_space(back).T)[0].T
    _, singular, turn = torch.linalg.svd(scores, full_matrices=False)
    best = turn[:count].to(maps.dtype) @ maps
    return projector.unfaded(projector.to_balls(best)), singular[:count]


def statistics(data: Tensor, weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What particles say of their coordinates along columns (k, q): log-likelihood = b·z - z·A·z / 2.

    Args:
        data: (P, q) complex64 differences; weight: (P, q).

    Returns:
        b (P, k) and A (P, k, k), float64, on the CPU.
    """
    k = len(columns)
    b = 2 * _flat(data) @ _flat(columns).T
    i, j = torch.tril_indices(k, k)
    products = columns[i].real * columns[j].real + columns[i].imag * columns[j].imag
    lower = (2 * weight @ products.T).double().cpu()
    a = torch.zeros(len(data), k, k, dtype=torch.float64)
    a[:, i, j] = lower
    a[:, j, i] = lower
    return b.double().cpu(), a


def posterior(b: Tensor, a: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (P, k) and covariance (P, k, k) of coordinates with prior variance 1 / precision (k,)."""
    covariance = torch.linalg.inv(a + torch.diag(precision))
    return torch.einsum("nij,nj->ni", covariance, b), covariance


def without_known(b: Tensor, a: Tensor, count: int, precision: Tensor) -> tuple[Tensor, Tensor]:
    """b and A of the first `count` coordinates, whatever those after them are, whose prior precision is (m,)."""
    if a.shape[1] == count:
        return b, a
    other = a[:, count:, count:] + torch.diag(precision)
    solved = torch.linalg.solve(other, torch.cat([a[:, count:, :count], b[:, count:, None]], dim=2))
    across = a[:, :count, count:]
    return b[:, :count] - (across @ solved[..., -1:])[..., 0], a[:, :count, :count] - across @ solved[..., :-1]


def _solved(moments: Tensor, right: Tensor) -> Tensor:
    """Solutions (q, k) complex64 of real symmetric systems, lower triangles (q, k(k+1)/2), right sides (q, k) complex."""
    q, k = right.shape
    i, j = torch.tril_indices(k, k, device=right.device)
    ridge = RIDGE * float(moments[:, i == j].mean()) * torch.eye(k, device=right.device)
    out = torch.empty_like(right)
    for start in range(0, q, POINTS_AT_ONCE):
        here = slice(start, start + POINTS_AT_ONCE)
        matrix = moments.new_zeros(len(right[here]), k, k)
        matrix[:, i, j] = moments[here]
        factor = torch.linalg.cholesky(matrix.tril() + matrix.tril(-1).transpose(1, 2) + ridge)
        solved = torch.cholesky_solve(torch.view_as_real(right[here].contiguous()), factor)
        out[here] = torch.view_as_complex(solved.contiguous())
    return out


def _iteration(problem: Problem, axes: Tensor, precision: Tensor, blocks: _Blocks, label: str) -> tuple[Tensor, Tensor]:
    """One step of EM: new axes (k, q), of coordinates with unit second moments, and new precisions (m,) of the known ones."""
    k, known = len(axes), problem.known
    columns = axes if known is None else torch.cat([axes, known[:, problem.band].to(axes)])
    m = len(columns) - k
    prior = torch.cat([torch.ones(k, dtype=torch.float64), precision])
    i, j = torch.tril_indices(k, k)
    q, device = axes.shape[1], axes.device
    moments, across = torch.zeros(q, len(i), device=device), torch.zeros(q, k * m, device=device)
    right = torch.zeros(q * 2, k, device=device)
    second = torch.zeros(k + m, k + m, dtype=torch.float64)
    for _, data, weight in blocks(label):  # type: ignore[attr-defined]
        mean, covariance = posterior(*statistics(data, weight, columns), prior)
        each = mean[:, :, None] * mean[:, None] + covariance
        second += each.sum(dim=0)
        moments.addmm_(weight.T, each[:, i, j].float().to(device))
        right.addmm_(_flat(data).T, mean[:, :k].float().to(device))
        if m:
            across.addmm_(weight.T, each[:, :k, k:].flatten(1).float().to(device))
    second /= len(problem.differences)
    wanted = torch.view_as_complex(right.reshape(q, 2, k).transpose(1, 2).contiguous())
    if m:
        wanted = wanted - torch.einsum("qkm,mq->qk", across.reshape(q, k, m).to(wanted.dtype), columns[k:])
    new = _Projector(problem).masked(_solved(moments, wanted).T).to(device)
    value, vector = torch.linalg.eigh(second[:k, :k])
    root = (vector * value.sqrt()) @ vector.T
    return root.to(new.dtype).to(device) @ new, 1 / torch.diagonal(second)[k:]


def scaled(problem: Problem, axes: Tensor, progress: Progress | None = None) -> Tensor:
    """Axes (k, q) of unit variance, by the coordinates that each has alone."""
    total = torch.zeros(len(axes), dtype=torch.float64)
    for _, data, weight in _Blocks(problem, progress)("scale"):  # type: ignore[attr-defined]
        b = 2 * (_flat(data) @ _flat(axes.to(data.device)).T).double().cpu()
        a = 2 * (weight @ (axes.abs() ** 2).T.to(weight)).double().cpu()
        total += ((b / a.clamp_min(1e-30)) ** 2 * (a / a.mean(dim=0)).clamp_max(1.0)).sum(dim=0)
    return axes * (total / len(problem.differences)).sqrt().to(axes.dtype)[:, None]


def find(
    problem: Problem, count: int, generator: torch.Generator, em: bool = True, progress: Progress | None = None
) -> Axes:
    """The strongest axes of a problem.

    Args:
        count: how many; no more than there are particles.
        em: go on from the singular vectors to probabilistic principal components.
    """
    count = min(count, len(problem.differences) - 1)
    axes, singular = singular_vectors(problem, count, generator, progress)
    axes = scaled(problem, axes, progress).to(problem.device)
    precision = torch.empty(0, dtype=torch.float64)
    if problem.known is not None:
        deviation = torch.tensor([CONTRAST, *[SHIFT] * 3, *[TURN] * 3], dtype=torch.float64)
        precision = deviation**-2
    blocks = _Blocks(problem, progress)
    for step in range(ITERATIONS if em else 0):
        axes, precision = _iteration(problem, axes, precision, blocks, f"axes {step + 1}")
    axes, strength = _ordered(problem.differences, problem.band, axes.cpu())
    return Axes(axes, strength, precision, singular)


def _ordered(differences: Differences, band: slice, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Axes turned among themselves so that a mean particle tells their coordinates apart, strongest first."""
    weight = differences.mean_weight[band]
    gram = 2 * (_flat(axes * weight) @ _flat(axes).T).double()
    value, vector = torch.linalg.eigh((gram + gram.T) / 2)
    order = value.argsort(descending=True)
    return vector[:, order].T.to(axes.dtype) @ axes, value[order].clamp_min(0)


@dataclass(frozen=True)
class Spectrum:
    """Strengths of axes beside those of noise.

    Attributes:
        strength: (k,); noise: (h,), of the displaced difference maps, both strongest first.
    """

    strength: Tensor
    noise: Tensor

    @property
    def floor(self) -> float:
        """What an axis must exceed to be more than noise."""
        first, later = float(self.noise[0]), float(self.noise[min(GAP, len(self.noise) - 1)])
        return first + max(first - later, UNSURE * first)

    @property
    def meaningful(self) -> int:
        """How many axes do: those before the first that does not."""
        above = (self.strength > self.floor).tolist()
        return above.index(False) if False in above else len(above)


def noise_spectrum(
    problem: Problem, count: int, generator: torch.Generator, em: bool = True, progress: Progress | None = None
) -> Tensor:
    """(count,) strengths of the axes of displaced difference maps."""
    moved = replace(problem, displaced=displacements(len(problem.differences), generator))
    found = find(moved, count, generator, em, progress)
    return found.strength if em else found.singular
