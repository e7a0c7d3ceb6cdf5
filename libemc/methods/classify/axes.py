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
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods.classify.differences import Differences
from libemc.methods.classify.frame import Frame
from libemc.methods.subtilts import Progress

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
CONTRAST, SHIFT, TURN = 0.3, 0.6, 0.2
"""Deviations of the known axes before they are fitted: relative, voxels of the small cube, radians."""
FEW = 3
"""Axes that may hold most of the signal."""
SAME = 0.8
"""Of a variance: one that is smaller than this part of what it was taken for needs the axes to be found again."""
DRAWS = 64
"""Maps of noise that the differences' noise is measured with."""
KNOWN_STEPS = 6
"""Of EM for the known axes alone, which come before all others: a free axis along one of them would be as likely."""
POINTS_AT_ONCE = 4096
"""Coefficients whose equations are solved at a time."""
GAP = 3
"""Axes of noise after the first, whose distance from it is taken for how much the first is up to chance."""
STRONG = 1.5
"""Times the floor, above which an axis is taken off before noise is measured."""
MOST_TAKEN = 4
"""Times that the noise is measured, at most."""
LEAST_STRENGTH = 0.1
"""Of an axis: along a weaker one a mean particle's place is known to a third of nothing."""
GAPS = 1.5
"""Times that distance by which an axis must be above noise at least."""
UNSURE = 0.15
"""Part of the strength of noise that an axis must be above it at least: displaced noise is the same to within a few percent."""


@dataclass(frozen=True)
class Problem:
    """What axes are looked for in.

    Attributes:
        band: which of the frame's points take part.
        mask: (s, s, s) of the small cube, in 0 ... 1.
        known: (7, Q) complex64 of `known_axes`; None: no known axes.
        taken: columns (m, q) and places (N, m) along them that are taken off first; None: nothing.
        displaced: (N, 3) box lengths by which each particle's difference map is displaced then; None: by nothing.
        variance: of the noise in a product with a map within the mask, as a part of what the weights say.
        device: where products are computed.
    """

    differences: Differences
    band: slice
    mask: Tensor
    known: Tensor | None
    taken: tuple[Tensor, Tensor] | None = None
    displaced: Tensor | None = None
    variance: float = 1.0
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
    plain = frame.plain_balls(average)
    by_x, by_y, by_z = (frame.plain_maps(plain * (2j * math.pi / frame.small) * k) for k in frame.points.float())
    turns = [z * by_y - y * by_z, x * by_z - z * by_x, y * by_x - x * by_y]
    shifts = [ball * (-2j * math.pi / frame.small) * axis for axis in frame.points.float()]
    return torch.stack([ball, *shifts, *(frame.balls(turn) for turn in turns)])


def displacements(count: int, generator: torch.Generator) -> Tensor:
    """(N, 3) box lengths, evenly within the ball of `DISPLACEMENT`."""
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    return direction * DISPLACEMENT * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)


def _weakening(frame: Frame, mask: Tensor, displaced: Tensor) -> Tensor:
    """(N,) by how much less noise comes to lie in the mask when it is displaced: the insertion kernel fades it outwards."""
    power = frame.envelope() ** 2
    spectrum = torch.fft.rfftn(power) * torch.fft.rfftn(mask).conj()
    overlap = torch.fft.irfftn(spectrum, s=power.shape).clamp_min(0)
    voxel = (-displaced * frame.small).round().long() % frame.small
    return (overlap[voxel[:, 2], voxel[:, 1], voxel[:, 0]] / overlap[0, 0, 0]).sqrt().clamp_min(0.1).float()


class _Blocks:
    """The difference maps of a problem, block by block: what is taken off them, displaced, and in units of their noise."""

    def __init__(self, problem: Problem, progress: Progress | None) -> None:
        self.problem, self.progress = problem, progress
        frame, displaced = problem.differences.frame, problem.displaced
        self.points = frame.points[:, problem.band]
        self.factor = None if displaced is None else _weakening(frame, problem.mask, displaced)

    def __call__(self, label: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        p = self.problem
        for here, data, weight in p.differences.blocks(p.band, p.device, self.progress, label):
            if p.taken is not None:
                columns, places = p.taken
                data = data - weight * (places[here].to(columns) @ columns).to(data.device)
            if p.displaced is not None and self.factor is not None:
                data = data / self.factor[here, None].to(data.device)
                for axis, points in enumerate(self.points):  # one factor of the phase for each
                    line = torch.arange(int(points.min()), int(points.max()) + 1)
                    turns = -2 * torch.pi * p.displaced[here, axis, None] * line
                    phase = torch.polar(torch.ones_like(turns), turns).to(data)
                    data *= phase[:, (points - line[0]).to(data.device)]
            yield here, data / p.variance, weight / p.variance


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
        scale = self.frame.small**1.5
        return torch.stack([(self.frame.plain_maps(b) * self.mask).flatten() * scale for b in self.whole(balls)])

    def to_balls(self, maps: Tensor) -> Tensor:
        """(k, q): plain transforms of masked maps (k, s³)."""
        scale = self.frame.small**1.5
        cubes = maps.reshape(-1, *self.mask.shape)
        return torch.stack([self.frame.plain_balls(m * self.mask)[self.band] / scale for m in cubes])


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
        for here, data, _ in blocks(f"singular vectors {step + 1}"):
            flat = _flat(data)
            part = 2 * flat @ _flat(right).T
            scores[here] = part.double().cpu()
            total += part.T @ flat
        if step < SUBSPACE - 1:
            back = torch.view_as_complex(total.reshape(width, -1, 2).contiguous())
            maps = torch.linalg.qr(projector.to_space(back).T)[0].T
    _, singular, turn = torch.linalg.svd(scores, full_matrices=False)
    best = turn[:count].to(maps.dtype) @ maps
    return projector.to_balls(best), singular[:count]


@dataclass(frozen=True)
class Columns:
    """Balls that coordinates are along, and what weights are multiplied with.

    Attributes:
        flat: (k, 2q) real and imaginary parts.
        products: (k(k+1)/2, q) of each with itself and those before it, in the order of `torch.tril_indices`.
    """

    flat: Tensor
    products: Tensor

    @staticmethod
    def of(balls: Tensor) -> Columns:
        """Of balls (k, q)."""
        k, q = balls.shape
        real, imag = (part.contiguous() for part in (balls.real, balls.imag))
        products = real.new_empty(k * (k + 1) // 2, q)
        for i in range(k):
            row = products[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
            torch.mul(real[: i + 1], real[i], out=row).addcmul_(imag[: i + 1], imag[i])
        return Columns(_flat(balls), products)

    def __len__(self) -> int:
        return len(self.flat)


def statistics(data: Tensor, weight: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """What particles say of their coordinates along columns: log-likelihood = b·z - z·A·z / 2.

    Args:
        data: (P, q) complex64 differences; weight: (P, q).

    Returns:
        b (P, k) and A (P, k, k), float64, on the CPU.
    """
    k = len(columns)
    b = 2 * _flat(data) @ columns.flat.T
    i, j = torch.tril_indices(k, k)
    lower = 2 * (weight @ columns.products.T).double().cpu()
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


def _iteration(problem: Problem, axes: Tensor, precision: Tensor, blocks: _Blocks, label: str) -> Tensor:
    """One step of EM: new axes (k, q), of coordinates with unit second moments.

    Args:
        precision: (m,) of the known axes.
    """
    k, known = len(axes), problem.known
    columns = axes if known is None else torch.cat([axes, known[:, problem.band].to(axes)])
    m = len(columns) - k
    prior = torch.cat([torch.ones(k, dtype=torch.float64), precision])
    i, j = torch.tril_indices(k, k)
    q, device = axes.shape[1], axes.device
    moments, across = torch.zeros(q, len(i), device=device), torch.zeros(q, k * m, device=device)
    right = torch.zeros(q * 2, k, device=device)
    second = torch.zeros(k, k, dtype=torch.float64)
    seen = Columns.of(columns)
    for _, data, weight in blocks(label):
        mean, covariance = posterior(*statistics(data, weight, seen), prior)
        each = mean[:, :, None] * mean[:, None] + covariance
        second += each[:, :k, :k].sum(dim=0)
        moments.addmm_(weight.T, each[:, i, j].float().to(device))
        right.addmm_(_flat(data).T, mean[:, :k].float().to(device))
        if m:
            across.addmm_(weight.T, each[:, :k, k:].flatten(1).float().to(device))
    second /= len(problem.differences)
    wanted = torch.view_as_complex(right.reshape(q, 2, k).transpose(1, 2).contiguous())
    if m:
        wanted = wanted - torch.einsum("qkm,mq->qk", across.reshape(q, k, m).to(wanted.dtype), columns[k:])
    new = _Projector(problem).masked(_solved(moments, wanted).T).to(device)
    value, vector = torch.linalg.eigh(second)
    root = (vector * value.sqrt()) @ vector.T
    return root.to(new.dtype).to(device) @ new


def _places(problem: Problem, columns: Tensor, precision: Tensor, progress: Progress | None) -> Tensor:
    """(N, k) expected coordinates of all particles along columns (k, q), of prior precision (k,)."""
    blocks, along = _Blocks(problem, progress)("places"), Columns.of(columns)
    return torch.cat([posterior(*statistics(data, weight, along), precision)[0] for _, data, weight in blocks])


def noise_variance(
    problem: Problem, generator: torch.Generator, axes: Axes | None = None, progress: Progress | None = None
) -> float:
    """Variance of the products of a typical particle's differences with maps of noise within the mask, over what W says.

    Args:
        axes: the known ones and the first `FEW` of these are taken off before, so that noise alone is left.
    """
    if axes is not None:
        columns = axes.balls[:FEW].to(problem.device)
        precision = torch.cat([axes.known_precision, torch.ones(len(columns), dtype=torch.float64)])
        if problem.known is not None:
            columns = torch.cat([problem.known[:, problem.band].to(columns), columns])
        problem = replace(problem, taken=(columns, _places(problem, columns, precision, progress)))
    frame = problem.differences.frame
    drawn = torch.randn(DRAWS, *problem.mask.shape, generator=generator) * problem.mask
    columns = torch.stack([frame.balls(m)[problem.band] for m in drawn]).to(problem.device)
    power = (columns.abs() ** 2).mean(dim=0)
    found = []
    for _, data, weight in _Blocks(problem, progress)("noise"):
        product = 2 * (_flat(data) @ _flat(columns).T)
        found.append(((product**2).mean(dim=1) / (2 * weight @ power).clamp_min(1e-30)).cpu())
    return max(float(torch.cat(found).median()), 1e-6) * problem.variance


def known_places(problem: Problem, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
    """Precisions (m,) of the coordinates along the known axes, there being no others, and those coordinates (N, m)."""
    if problem.known is None:
        return torch.empty(0, dtype=torch.float64), torch.empty(len(problem.differences), 0, dtype=torch.float64)
    columns = Columns.of(problem.known[:, problem.band].to(problem.device))
    parts = [statistics(d, w, columns) for _, d, w in _Blocks(problem, progress)("known axes")]
    b, a = (torch.cat(each) for each in zip(*parts, strict=True))
    precision = torch.tensor([CONTRAST, *[SHIFT] * 3, *[TURN] * 3], dtype=torch.float64) ** -2
    for _ in range(KNOWN_STEPS):
        mean, covariance = posterior(b, a, precision)
        precision = 1 / (mean**2 + torch.diagonal(covariance, dim1=1, dim2=2)).mean(dim=0)
    return precision, posterior(b, a, precision)[0]


def scaled(problem: Problem, axes: Tensor, progress: Progress | None = None) -> Tensor:
    """Axes (k, q) of unit variance, by the coordinates that each has alone."""
    total = torch.zeros(len(axes), dtype=torch.float64)
    for _, data, weight in _Blocks(problem, progress)("scale"):
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
    precision, places = known_places(problem, progress)
    rest = problem
    if problem.known is not None and problem.taken is None:
        rest = replace(problem, taken=(problem.known[:, problem.band], places))
    axes, singular = singular_vectors(rest, count, generator, progress)
    axes = scaled(rest, axes, progress).to(problem.device)
    blocks = _Blocks(problem, progress)
    for step in range(ITERATIONS if em else 0):
        axes = _iteration(problem, axes, precision, blocks, f"axes {step + 1}")
    axes, strength = _ordered(problem, axes.cpu())
    return Axes(axes, strength, precision, singular)


def _ordered(problem: Problem, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Axes turned among themselves so that a mean particle tells their coordinates apart, strongest first."""
    weight = problem.differences.mean_weight[problem.band]
    gram = 2 * (_flat(axes * weight) @ _flat(axes).T).double() / problem.variance
    value, vector = torch.linalg.eigh((gram + gram.T) / 2)
    order = value.argsort(descending=True)
    found = vector[:, order].T.to(axes.dtype) @ axes
    like = (found.conj() * problem.differences.average[problem.band]).real.sum(dim=1)
    # which side is plus is anyone's choice: where there is more of the average
    return found * torch.where(like < 0, -1.0, 1.0)[:, None], value[order].clamp_min(0)


def measured(
    problem: Problem, count: int, generator: torch.Generator, em: bool = True, progress: Progress | None = None
) -> tuple[Problem, Axes]:
    """A problem with the variance of its noise, and its axes as `find` gives them."""
    problem = replace(problem, variance=noise_variance(problem, generator, progress=progress))
    axes = find(problem, count, generator, em, progress)
    if not em:
        return problem, axes
    variance = noise_variance(problem, generator, axes, progress)
    again = variance < SAME * problem.variance
    strength = axes.strength * problem.variance / variance
    problem = replace(problem, variance=variance)
    return problem, find(problem, count, generator, em, progress) if again else replace(axes, strength=strength)


@dataclass(frozen=True)
class Spectrum:
    """Strengths of axes beside those of noise.

    Attributes:
        strength: (k,); noise: (h,), of the displaced difference maps, both strongest first.
        least: what an axis must have at least to tell anything, whatever noise has.
    """

    strength: Tensor
    noise: Tensor
    least: float = 0.0

    @property
    def floor(self) -> float:
        """What an axis must exceed to be more than noise."""
        first, later = float(self.noise[0]), float(self.noise[min(GAP, len(self.noise) - 1)])
        return max(first + max(GAPS * (first - later), UNSURE * first), self.least)

    @property
    def meaningful(self) -> int:
        """How many axes do: those before the first that does not."""
        above = (self.strength > self.floor).tolist()
        return above.index(False) if False in above else len(above)


def spectrum(
    problem: Problem, axes: Axes, generator: torch.Generator, em: bool = True, progress: Progress | None = None
) -> Spectrum:
    """Axes beside those of the same difference maps displaced.

    What particles have in common along a strong axis makes noise of its own when it is displaced. So the known axes are taken
    off, and the first other one, and as many more as are far above what is left; the first is given back where it isn't. Weak
    ones stay: taking off an axis of noise leaves less noise than there is.

    Args:
        axes: of `find`.
    """
    count, columns = len(axes.balls), axes.balls.to(problem.device)
    known = None if problem.known is None else problem.known[:, problem.band].to(columns)
    every = columns if known is None else torch.cat([known, columns])
    prior = torch.cat([axes.known_precision, torch.ones(count, dtype=torch.float64)])
    places = _places(problem, every, prior, progress)
    own = axes.strength if em else axes.singular
    moved = replace(problem, displaced=displacements(len(problem.differences), generator))

    def beside(taken: int) -> Spectrum:
        some = len(axes.known_precision) + taken
        noise = find(replace(moved, taken=(every[:some], places[:, :some])), count, generator, em, progress)
        return Spectrum(own, noise.strength if em else noise.singular, LEAST_STRENGTH if em else 0.0)

    if not em:
        return beside(0)
    taken = 1
    for _ in range(MOST_TAKEN):
        found = beside(taken)
        strong = int((own[: found.meaningful] > STRONG * found.floor).sum())
        if strong <= taken:
            break
        taken = strong
    return found if strong else beside(0)
