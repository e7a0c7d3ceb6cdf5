"""Gold-standard refinement of particle poses: exhaustive search in space at low resolution, then Gauss-Newton on slices.

The score of a pose is the normalised correlation of a particle's images with the prediction, ⟨y, m⟩ / |m|, over CTF- and
dose-weighted coefficients whitened by the noise: the likelihood with the scale of each particle left free.

Search: each particle's images are inserted once, CTF-weighted, into a small half ball of Fourier space; the reference is
sampled there at every rotation; all particles meet all rotations and shifts in matrix products. Polish: the images
themselves against exact slices, three angles and three shifts, analytic Jacobian, Levenberg damping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods import average
from libemc.methods.subtilts import Batch, Particles, Progress, batches_by_half, load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.grids import centred_radius, rfft_radius
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance
from libemc.numerics.slices import Accumulator, Band, FourierVolume
from libemc.numerics.so3 import rotation_grid

SEARCH_RESOLUTION = 40.0
"""Å: the exhaustive search never uses finer data; what it cannot tell apart there, the polish decides."""
STEP_OVER_CROWTHER = 1.0
"""Angular step of the search over the Crowther angle, resolution / diameter of the reference (Crowther et al. 1970)."""
EXTENT_ENERGY = 0.98
"""Part of a reference's energy that its diameter holds."""
CANDIDATES = 6
"""Rotations of the search that are polished; the best of them after it is kept."""
POLISH_STEPS = 8
DAMPING = (1e-2, 4.0, 0.3)
"""Levenberg's first damping, relative to the diagonal; factors after a worse and a better step."""
MAX_SHIFT = 0.08
"""Farthest shift in one iteration, as a fraction of the box: a quarter of a particle that fills two thirds is too far."""
ROTATIONS_AT_ONCE = 4096
LEAST_ENVELOPE = 0.2
"""The kernel's envelope is not divided out where it is below this: the box's corners, where no particle is."""
JOINED = 40.0
"""Å: the halves share their references to the starting resolution, but never beyond this."""
MOST_ITERATIONS = 12
UNSETTLED = 3.0
"""Degrees: a search that turns half of the particles by more than this is followed by another."""
CONVERGED_SHELL = 0.02
"""Relative gain in resolution below which an iteration counts as no better."""
CONVERGED_ANGLE = 0.25
"""Median change of rotation that counts as none, in units of the angle that one pixel subtends at half the box."""


@dataclass(frozen=True)
class Search:
    """How far and how finely to look.

    Attributes:
        resolution: Å, finest data that takes part.
        max_shift: Å, largest distance from the present position; 0 keeps it.
        symmetry: of the reference.
    """

    resolution: float
    max_shift: float
    symmetry: str = "c1"


@dataclass(frozen=True)
class Poses:
    """Poses of P particles: rotation (P, 3, 3), shift (P, 3) px from the present position (specimen frame), score (P,)."""

    rotation: Tensor
    shift: Tensor
    score: Tensor


@dataclass(frozen=True)
class HalfBalls:
    """CTF-weighted particles in the half ball |q| < radius: what the exhaustive search needs of them.

    Attributes:
        points: (3, Q) in unpadded Fourier pixels.
        data: (P, Q) complex64, sum of CTF·image; weight: (P, Q) float32, sum of CTF².
        box: the particles'.
    """

    points: Tensor
    data: Tensor
    weight: Tensor
    box: int


def half_balls(batch: Batch, radius: float) -> HalfBalls:
    """Insert each particle of a batch, at its present position, into a half ball of its own (no rotation)."""
    box, count = batch.band.box, len(batch.rotation)
    band = Band.of(box, radius)
    values = narrowed(batch, band)
    centred, squared = values.centred(), values.transfer**2
    data, weight, points = [], [], torch.empty(0)
    for p in range(count):
        mine = batch.owner == p
        ball = Accumulator(box, radius, padding=1.0)
        ball.add(centred[mine], squared[mine], values.tilt_matrices[mine], band, values.magnification[mine])
        numerator, total = ball.folded()
        h = ball.half
        line = torch.arange(-h, h + 1)
        z, y, x = torch.meshgrid(line, line, torch.arange(0, h + 2), indexing="ij")
        upper = (x > 0) | (y > 0) | ((y == 0) & (z > 0))
        inside = upper & (x**2 + y**2 + z**2 < (radius * ball.scale) ** 2)
        data.append(numerator[inside])
        weight.append(total[inside])
        points = torch.stack([x[inside], y[inside], z[inside]]).double() / ball.scale
    return HalfBalls(points, torch.stack(data), torch.stack(weight), box)


def narrowed(batch: Batch, band: Band) -> Batch:
    """The same images within a smaller band."""
    keep = batch.band.radii < band.radius
    return replace(batch, values=batch.values[:, keep], transfer=batch.transfer[:, keep], band=band)


def search_shifts(max_shift: float, step: float) -> Tensor:
    """(S, 3) px: the nodes of a cubic grid within a ball, the zero shift first."""
    n = math.floor(max_shift / step)
    line = torch.arange(-n, n + 1, dtype=torch.float64) * step
    grid = torch.cartesian_prod(line, line, line)
    length = torch.linalg.vector_norm(grid, dim=1)
    order = length.argsort(stable=True)
    return grid[order[length[order] <= max_shift + 1e-9]]


def search_reference(density: Tensor, radius: float) -> FourierVolume:
    """A reference for the exhaustive search.

    Unpadded insertion leaves the kernel's envelope on the particles; scores are exact when the reference is divided by
    it. The envelope is taken as round: it is divided out before the reference is turned.
    """
    n = density.shape[-1]
    grid = Accumulator(n, radius, padding=1.0)
    flat = density / slices.envelope(n, grid.padded).clamp_min(LEAST_ENVELOPE).to(density)
    return FourierVolume.from_map(flat, radius=min(radius + 1, n / 2))


def search_everywhere(
    balls: HalfBalls, reference: FourierVolume, rotations: Tensor, shifts: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Score all particles at all rotations and shifts, in matrix products.

    Args:
        rotations: (N, 3, 3); shifts: (S, 3) px, specimen frame.
        keep: how many of the best rotations to return.

    Returns:
        (P, keep) score, (P, keep) int64 rotation, (P, keep) int64 shift; best first.
    """
    turns = shifts @ balls.points / balls.box  # (S, Q)
    phase = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(torch.complex64)
    moved = balls.data[:, None] * phase  # (P, S, Q): content at +shift comes to the centre
    left = torch.view_as_real(moved.reshape(-1, moved.shape[-1])).reshape(moved.shape[0] * moved.shape[1], -1)
    count = len(balls.data)
    best: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(rotations), ROTATIONS_AT_ONCE):
        # the specimen-frame point q is the reference-frame point Rᵀq: sample_points multiplies from the left
        block = slices.sample_points(reference, rotations[first : first + ROTATIONS_AT_ONCE], balls.points)
        cross = (left @ torch.view_as_real(block).reshape(len(block), -1).T).reshape(count, len(shifts), -1)
        top, which = cross.max(dim=1)
        norm = balls.weight @ (block.real**2 + block.imag**2).T
        score = top / norm.clamp_min(torch.finfo(norm.dtype).tiny).sqrt()
        value, place = score.topk(min(keep, score.shape[1]), dim=1)
        best.append((value, place + first, which.gather(1, place)))
    value, rotation, shift = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    value, place = value.topk(min(keep, value.shape[1]), dim=1)
    return value, rotation.gather(1, place), shift.gather(1, place)


def _pose_terms(
    batch: Batch, volume: FourierVolume, rotation: Tensor, shift: Tensor, slope: bool
) -> tuple[Tensor, ...]:
    """Per particle: ⟨y, m⟩, |m|², and with `slope` their derivatives by (rotation vector, shift) and the normal matrix.

    rotation: (P, 3, 3); shift: (P, 3) px. Returns (P,), (P,), and with slope (P, 6), (P, 6), (P, 6, 6).
    """
    band, owner, count = batch.band, batch.owner, len(rotation)
    matrices = batch.tilt_matrices @ rotation[owner]
    moved = (
        batch.shift
        + torch.einsum("bij,bj->bi", batch.tilt_matrices, shift[owner])[:, :2] * batch.magnification[:, None]
    )
    data = batch.centred(moved)
    squared = batch.transfer**2
    total = torch.zeros(count, dtype=torch.float64)
    scaled = matrices * batch.magnification[:, None, None]
    if not slope:
        s = slices.extract_slices(volume, scaled, band)
        cross = (data.real * s.real + data.imag * s.imag).sum(1).double()
        norm = (squared * (s.real**2 + s.imag**2)).sum(1).double()
        return total.index_add(0, owner, cross), total.index_add(0, owner, norm)
    s, gradient = slices.extract_slices_with_slopes(volume, scaled, band)
    cross = (data.real * s.real + data.imag * s.imag).sum(1).double()
    norm = (squared * (s.real**2 + s.imag**2)).sum(1).double()
    # κ = Tᵀk: each coefficient in the specimen frame; turning the particle by ω moves its point by -Rᵀ(ω × κ)
    kappa = torch.einsum("ck,bcd->bkd", band.points(torch.float64), batch.tilt_matrices).float()
    kappa = kappa * batch.magnification[:, None, None].float()
    specimen = torch.einsum("bij,bkj->bki", rotation[owner].to(gradient.dtype), gradient)
    turning = torch.linalg.cross(specimen, kappa.to(gradient.dtype))
    sliding = s[..., None] * kappa * (-2j * torch.pi / band.box)
    jacobian = torch.cat([turning, sliding], dim=2)  # (B, K, 6)
    flat = torch.view_as_real(jacobian).movedim(2, 3).reshape(len(jacobian), -1, 6)  # (B, 2K, 6)
    weighted = flat * squared.repeat_interleave(2, dim=1)[..., None]
    model = torch.view_as_real(s).reshape(len(s), -1, 1)
    target = torch.view_as_real(data).reshape(len(s), -1, 1)
    normal = (flat.transpose(1, 2) @ weighted).double()
    by_cross = (flat.transpose(1, 2) @ target)[..., 0].double()
    by_norm = 2 * (weighted.transpose(1, 2) @ model)[..., 0].double()
    zero6 = torch.zeros(count, 6, dtype=torch.float64)
    return (
        total.index_add(0, owner, cross),
        total.index_add(0, owner, norm),
        zero6.index_add(0, owner, by_cross),
        zero6.index_add(0, owner, by_norm),
        torch.zeros(count, 6, 6, dtype=torch.float64).index_add(0, owner, normal),
    )


def _within(vectors: Tensor, limit: float) -> Tensor:
    """Vectors (P, 3), those longer than `limit` shortened to it."""
    return vectors * (limit / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


def score_poses(batch: Batch, volume: FourierVolume, rotation: Tensor, shift: Tensor) -> Tensor:
    """(P,) score ⟨y, m⟩ / |m| of poses, exact slices."""
    cross, norm = _pose_terms(batch, volume, rotation, shift, slope=False)
    return cross / norm.clamp_min(1e-30).sqrt()


def polish(
    batch: Batch, volume: FourierVolume, poses: Poses, limit: float = math.inf, steps: int = POLISH_STEPS
) -> Poses:
    """Continuous optimum of rotation and shift by damped Gauss-Newton, never worse than the start.

    `limit`: the ball of shifts that it stays in, px.

    Minimises |y - a·m|² over pose and scale a, the scale eliminated (variable projection in Kaufman's form), with
    y already CTF-weighted: only ⟨y, m⟩ and |m|² are needed.
    """
    rotation, shift = poses.rotation.clone(), poses.shift.clone()
    best_rotation, best_shift = rotation.clone(), shift.clone()
    best = torch.full((len(rotation),), -torch.inf, dtype=torch.float64)
    damping = torch.full_like(best, DAMPING[0])
    normal, gradient = torch.zeros(len(best), 6, 6).double(), torch.zeros(len(best), 6).double()
    eye = torch.eye(6, dtype=torch.float64)
    for _ in range(steps):
        cross, norm, by_cross, by_norm, hessian = _pose_terms(batch, volume, rotation, shift, slope=True)
        score = cross / norm.clamp_min(1e-30).sqrt()
        better = score > best
        best = torch.where(better, score, best)
        best_rotation[better], best_shift[better] = rotation[better], shift[better]
        damping = torch.where(better, damping * DAMPING[2], damping * DAMPING[1]).clamp(1e-4, 1e4)
        # where the images contradict the pose (a negative product) the step still goes uphill
        scale = (cross.abs() / norm.clamp_min(1e-30)).clamp_min(1e-30)
        projected = hessian - (by_norm[:, :, None] * by_norm[:, None, :]) / (4 * norm.clamp_min(1e-30)[:, None, None])
        normal[better] = projected[better]
        gradient[better] = (by_cross / scale[:, None] - by_norm / 2)[better]
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        floor = 1e-9 * diagonal.amax(dim=1, keepdim=True) + 1e-30
        lhs = normal + torch.diag_embed(damping[:, None] * diagonal.clamp_min(0) + floor) * eye
        step = torch.linalg.solve(lhs, gradient[..., None])[..., 0]
        # no step further than the band's finest period over 2 pi: beyond it the linear model means nothing
        turn = _within(step[:, :3], 2.0 / batch.band.radius)
        slide = _within(step[:, 3:], batch.band.box / (2 * torch.pi * batch.band.radius))
        rotation = matrix_from_rotvec(torch.rad2deg(turn)) @ best_rotation
        shift = _within(best_shift + slide, limit)
    final = score_poses(batch, volume, rotation, shift)
    better = final > best
    best = torch.where(better, final, best)
    best_rotation[better], best_shift[better] = rotation[better], shift[better]
    return Poses(best_rotation, best_shift, best)


def diameter(density: Tensor) -> float:
    """Pixels: of the sphere about the centre that holds `EXTENT_ENERGY` of a map's squared density (n, n, n)."""
    radius = centred_radius(density.shape).round().long().reshape(-1)
    power = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add_(
        0, radius, density.double().reshape(-1) ** 2
    )
    inside = power.cumsum(0)
    return 2.0 * max(1, int((inside < EXTENT_ENERGY * inside[-1]).sum()))


@dataclass(frozen=True)
class SearchGrid:
    """What the exhaustive search goes through, made once an iteration."""

    radius: float
    rotations: Tensor
    shifts: Tensor

    @staticmethod
    def of(box: int, pixel_size: float, search: Search, across: float) -> SearchGrid:
        """Rotations modulo the symmetry and shifts within the limits, as fine as the data that takes part.

        Args:
            across: diameter of the reference, pixels.
        """
        resolution = max(search.resolution, SEARCH_RESOLUTION, 2 * pixel_size)
        radius = max(3.0, box * pixel_size / resolution)
        step = math.degrees(STEP_OVER_CROWTHER * (box / radius) / min(across, box))
        rotations = rotation_grid(step, search.symmetry)
        # a third of the finest period: the correlation is then still above cos(pi/3·√3/2) between the nodes
        shifts = search_shifts(search.max_shift / pixel_size, box / radius / 3)
        return SearchGrid(radius, rotations, shifts)


def align_batch(
    batch: Batch,
    fine: FourierVolume,
    coarse: FourierVolume | None,
    grid: SearchGrid | None,
    limit: float,
) -> Poses:
    """Poses of one batch against one reference: the present ones, and those of an exhaustive search, all polished.

    Args:
        batch: within the band of this iteration.
        fine: the reference prepared for the batch's band.
        coarse, grid: for the exhaustive search; None: only the present poses are polished.
        limit: px, largest shift from the present position.
    """
    count = len(batch.rotation)
    present = Poses(batch.rotation, torch.zeros(count, 3, dtype=torch.float64), torch.empty(0))
    if grid is None or coarse is None:
        return polish(batch, fine, present, limit)
    balls = half_balls(batch, grid.radius)
    _, rotation, shift = search_everywhere(balls, coarse, grid.rotations, grid.shifts, CANDIDATES)
    low_band = Band.of(batch.band.box, min(grid.radius, batch.band.radius))
    low = narrowed(batch, low_band)
    tried = []
    for c in range(rotation.shape[1]):
        start = Poses(grid.rotations[rotation[:, c]], grid.shifts[shift[:, c]], torch.empty(0))
        tried.append(polish(low, fine, start, limit, steps=4))
    best_two = torch.stack([t.score for t in tried], dim=1).topk(min(2, len(tried)), dim=1).indices
    finals = [polish(batch, fine, present, limit)]
    for c in range(best_two.shape[1]):
        pick = best_two[:, c]
        start = Poses(
            torch.stack([t.rotation for t in tried])[pick, torch.arange(count)],
            torch.stack([t.shift for t in tried])[pick, torch.arange(count)],
            torch.empty(0),
        )
        finals.append(polish(batch, fine, start, limit))
    winner = torch.stack([f.score for f in finals]).argmax(dim=0)
    each = torch.arange(count)
    return Poses(
        torch.stack([f.rotation for f in finals])[winner, each],
        torch.stack([f.shift for f in finals])[winner, each],
        torch.stack([f.score for f in finals])[winner, each],
    )


def reference_filter(fsc: Tensor) -> Tensor:
    """Per-shell weight of a half map as a reference: C_ref = sqrt(2 FSC/(1+FSC)) (Rosenthal & Henderson 2003)."""
    c = average.for_filters(fsc).clamp(0, 1)
    return (2 * c / (1 + c)).sqrt()


def filter_shells(density: Tensor, weights: Tensor) -> Tensor:
    """Multiply the Fourier shells of a cubic map (n, n, n) by weights (n//2+1,), linear between shells, 0 beyond them."""
    n = density.shape[-1]
    radius = rfft_radius(density.shape) * n
    low = radius.floor().long().clamp_max(n // 2)
    fraction = (radius - low).clamp(0, 1)
    padded = torch.cat([weights.double(), torch.zeros(2, dtype=torch.float64)])
    gain = padded[low] * (1 - fraction) + padded[low + 1] * fraction
    spectrum = torch.fft.rfftn(density)
    return torch.fft.irfftn(spectrum * gain.to(spectrum.real.dtype), s=density.shape)


def filtered_references(
    half1: Tensor, half2: Tensor, mask: Tensor, fsc: Tensor, shared: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Both half maps as references: masked, and filtered by the FSC between them (n//2+1,).

    Args:
        shared: shells below this (Fourier pixels) are taken from the mean of both halves. They began from one reference
            there, so the FSC is no evidence in them anyway, and twice the particles make a better reference; it also
            keeps the halves in one frame (Scheres & Chen 2012).
    """
    weights = reference_filter(fsc)
    low = (torch.arange(len(fsc)) < shared).double()
    mean = filter_shells((half1 + half2) / 2, weights * low)
    return tuple((filter_shells(half, weights * (1 - low)) + mean) * mask for half in (half1, half2))  # type: ignore[return-value]


def iterate(
    series: Sequence[Particles],
    halves: tuple[Tensor, Tensor],
    search: Search,
    exhaustive: bool,
    memory: int,
    progress: Progress | None = None,
) -> list[Particles]:
    """Align every used particle to the reference of its own half.

    Args:
        series: particles by tilt series.
        halves: (n, n, n) references of half 1 and half 2, filtered and masked.
        search: limits; `search.resolution` is the finest data that takes part.
        exhaustive: search all of SO(3) (modulo symmetry) and the ball of shifts first.
        memory: bytes that batches may take.
        progress: wraps the loop over batches of one tilt series and half.

    Returns:
        The particles at their new poses, by tilt series. Particles that no image shows keep their pose and get no score.
    """
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    band = Band.of(box, min(box / 2, box * pixel_size / search.resolution))
    limit = search.max_shift / pixel_size
    grid = SearchGrid.of(box, pixel_size, search, max(diameter(h) for h in halves)) if exhaustive else None
    fine = [FourierVolume.from_map(h, radius=band.radius) for h in halves]
    coarse = [search_reference(h, grid.radius) if grid else None for h in halves]
    out = []
    for particles in series:
        rotation, xyz = particles.rotation.clone(), particles.xyz.clone()
        score = torch.full_like(particles.score, float("nan"))
        noise = noise_spectrum(particles, band)
        seen = particles.use & (particles.visible & particles.series.use).any(dim=1)
        for half, piece in batches_by_half(particles, seen, band, memory, progress, "align"):
            batch = load_batch(particles, piece, band, noise)
            poses = align_batch(batch, fine[half - 1], coarse[half - 1], grid, limit)
            rotation[piece] = poses.rotation
            xyz[piece] += poses.shift * pixel_size
            score[piece] = poses.score
        out.append(particles.moved(rotation, xyz, score))
    return out


def pose_change(before: Sequence[Particles], after: Sequence[Particles], symmetry: str) -> tuple[float, float]:
    """Median change of rotation (degrees, modulo symmetry) and of position (Å) over the used particles."""
    turned = [rotation_distance(a.rotation, b.rotation, symmetry)[b.use] for a, b in zip(before, after, strict=True)]
    moved = [torch.linalg.vector_norm(a.xyz - b.xyz, dim=1)[b.use] for a, b in zip(before, after, strict=True)]
    return float(torch.cat(turned).median()), float(torch.cat(moved).median())


@dataclass(frozen=True)
class Step:
    """What the next iteration does: the finest data it uses (Å), and whether it searches exhaustively."""

    resolution: float
    exhaustive: bool


@dataclass(frozen=True)
class Done:
    """What an iteration did.

    Attributes:
        step: what was asked of it.
        resolution: Å at 0.143 of the corrected FSC after it; reach: Å of the last shell that still carries signal.
        turned: median change of rotation, degrees; moved: of position, Å.
    """

    step: Step
    resolution: float
    reach: float
    turned: float
    moved: float


def next_step(past: Sequence[Done], start: Step, box: int, pixel_size: float, most: int | None) -> Step | None:
    """Decide on the next iteration from those that were done; None when the refinement has converged.

    The first two search exhaustively where the start does: the second with a reference made of the particles themselves.
    A third one follows while a search still turns half of the particles by more than its own grid's doubt. From then on
    poses are polished, in the band that the FSC between the halves vouches for, until neither it nor the poses change.

    Args:
        start: the first step; box, pixel_size: the particles', px and Å.
        most: number of iterations to do exactly; None: until convergence, `MOST_ITERATIONS` at the most.
    """
    if len(past) >= (most or MOST_ITERATIONS):
        return None
    if not past:
        return start
    last = past[-1]
    band = max(2 * pixel_size, last.reach)
    searched = sum(done.step.exhaustive for done in past)
    if start.exhaustive and (searched < 2 or (searched == len(past) < 4 and last.turned > UNSETTLED)):
        return Step(band, exhaustive=True)
    if most is None and not last.step.exhaustive and len(past) > 1:
        gained = 1 - last.reach / min(done.reach for done in past[:-1])
        if gained < CONVERGED_SHELL and (last.turned < CONVERGED_ANGLE * math.degrees(2 / box) or gained < 0):
            return None
    return Step(band, exhaustive=False)


def state_of(past: Sequence[Done], particles: int) -> dict[str, object]:
    """The iterations as plain numbers, for the run's record."""
    return {
        "particles": particles,
        "iterations": [
            {
                "band": done.step.resolution,
                "exhaustive": done.step.exhaustive,
                "resolution": done.resolution,
                "reach": done.reach,
                "turned": done.turned,
                "moved": done.moved,
            }
            for done in past
        ],
    }


def line_of(number: int, done: Done) -> str:
    """One iteration in a line."""
    how = "global" if done.step.exhaustive else "local"
    return (
        f"iteration {number} ({how}, data to {done.step.resolution:.1f} Å): {done.resolution:.2f} Å at FSC 0.143, "
        f"poses moved {done.turned:.2f}° and {done.moved:.2f} Å (median)"
    )
