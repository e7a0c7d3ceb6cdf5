"""Axes against what was planted, dense linear algebra, numerical derivatives, and sets that differ by nothing at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.classify import axes as module
from libemc.methods.classify.axes import (
    DISPLACEMENT,
    Columns,
    Problem,
    Spectrum,
    displacements,
    find,
    known_axes,
    measured,
    noise_variance,
    posterior,
    scaled,
    singular_vectors,
    spectrum,
    statistics,
    without_known,
)
from libemc.methods.classify.differences import Differences
from libemc.methods.classify.frame import Frame
from libemc.methods.subtilts import Particles
from libemc.numerics.rotations import matrix_from_rotvec
from tests.methods.classify_data import (
    PIXEL,
    Blobs,
    ball_mask,
    clean_set,
    differences_of,
    drawn,
    noisy,
    on_cube,
)
from tests.methods.subtilt_data import blobs

FIRST, SECOND = [(1.0, (12.0, 0.0, 4.0), 11.0)], [(1.0, (-9.0, 11.0, -5.0), 11.0)]
"""Two lumps that come and go, well within a mask of 32 Å."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """2 Re⟨a, w b⟩, (k, m) float64, written out in complex numbers."""
    w = torch.ones(a.shape[1]) if weight is None else weight
    return 2 * ((a * w).to(torch.complex128) @ b.to(torch.complex128).conj().T).real


@pytest.fixture(scope="module")
def frame() -> Frame:
    plain = Frame.of(12, PIXEL, 3 * PIXEL)
    return replace(plain, noise=0.5 + plain.lengths.float() / 4)


@pytest.fixture(scope="module")
def planted(frame: Frame) -> torch.Tensor:
    """(2, Q) axes of strength 1 in white weights."""
    u = torch.stack([frame.balls(on_cube(b, frame)) for b in (FIRST, SECOND)])
    return u / product(u, u).diagonal().sqrt()[:, None].to(u.dtype)


def problem(
    d: Differences, known: torch.Tensor | None = None, mask: float = 32.0, band: slice | None = None
) -> Problem:
    whole = slice(0, d.data.shape[1])
    return Problem(d, band or whole, ball_mask(d.frame, mask), known)


# --------------------------------------------------------------------------------------------- the algebra of one step


def whole_box(d: Differences) -> Problem:
    """Without a mask."""
    p = problem(d)
    return replace(p, mask=torch.ones_like(p.mask))


def test_statistics_and_posterior_are_those_of_dense_regression(frame: Frame, planted: torch.Tensor) -> None:
    """Generalised ridge regression on real and imaginary parts, written out one particle at a time."""
    d = drawn(frame, planted, 3 * torch.randn(6, 2, generator=seeded(1)), 2)
    columns = torch.cat([planted, planted.flip(1) * 1j])
    ((_, data, weight),) = d.blocks(slice(None))
    b, a = statistics(data, weight, Columns.of(columns))
    precision = torch.tensor([1.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    mean, covariance = posterior(b, a, precision)
    u = torch.view_as_real(columns).flatten(1).double().numpy().T  # (2Q, 4)
    for i in range(len(d)):
        # D has variance W: real and imaginary part W / 2 each; D = (W u) z + noise
        w = np.repeat(weight[i].double().numpy(), 2)
        y, x = torch.view_as_real(data[i]).flatten().double().numpy(), w[:, None] * u
        some = w > 0
        inverse = np.zeros_like(w)
        inverse[some] = 2 / w[some]
        normal = x.T @ (inverse[:, None] * x)
        np.testing.assert_allclose(a[i], normal, rtol=1e-4, atol=1e-4 * np.abs(normal).max())
        np.testing.assert_allclose(b[i], x.T @ (inverse * y), rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        inside = np.linalg.inv(normal + np.diag(precision))
        np.testing.assert_allclose(covariance[i], inside, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mean[i], inside @ x.T @ (inverse * y), rtol=1e-3, atol=1e-5)


def test_coordinates_without_known_ones_are_the_marginals() -> None:
    """The joint Gaussian of all coordinates, of which a block of the covariance is the marginal one's."""
    root = torch.randn(5, 6, 6, generator=seeded(2), dtype=torch.float64)
    a, b = root @ root.transpose(1, 2), torch.randn(5, 6, generator=seeded(3), dtype=torch.float64)
    precision = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64)
    found_b, found_a = without_known(b, a, 3, precision)
    whole = torch.linalg.inv(a + torch.diag(torch.cat([torch.zeros(3), precision])))
    mean = torch.einsum("nij,nj->ni", whole, b)[:, :3]
    wanted = torch.linalg.inv(whole[:, :3, :3])
    torch.testing.assert_close(found_a, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found_b, torch.einsum("nij,nj->ni", wanted, mean), rtol=1e-8, atol=1e-8)
    assert without_known(b, a, 6, torch.empty(0))[1] is a


def test_equations_are_solved_point_by_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS_AT_ONCE", 7)
    q, k = 23, 3
    root = torch.randn(q, k, 5, generator=seeded(4))
    matrix = root @ root.transpose(1, 2)
    right = torch.complex(*torch.randn(2, q, k, generator=seeded(5)))
    i, j = torch.tril_indices(k, k)
    found = module._solved(matrix[:, i, j], right)
    ridge = module.RIDGE * float(torch.diagonal(matrix, dim1=1, dim2=2).mean()) * np.eye(k)
    wanted = np.stack(
        [np.linalg.solve(m + ridge, r) for m, r in zip(matrix.double().numpy(), right.numpy(), strict=True)]
    )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


# --------------------------------------------------------------------------------------------------- singular vectors


@pytest.mark.parametrize("band", [None, slice(20, 110)])
def test_singular_vectors_are_those_of_the_masked_maps(frame: Frame, planted: torch.Tensor, band: slice | None) -> None:
    """Every masked difference map written out as a sum of waves, and numpy's SVD of the matrix of them."""
    places = torch.randn(40, 2, generator=seeded(6)) * torch.tensor([30.0, 15.0])
    p = problem(drawn(frame, planted, places, 7), band=band)
    some, s = p.band, frame.small
    line = np.arange(s) - s // 2
    z, y, x = (a.ravel() for a in np.meshgrid(line, line, line, indexing="ij"))
    k = frame.points[:, some].numpy()
    waves = np.exp(2j * np.pi * (np.outer(x, k[0]) + np.outer(y, k[1]) + np.outer(z, k[2])) / s)
    data = torch.view_as_complex(torch.from_numpy(p.differences.data))[:, some].numpy()
    mask = p.mask.flatten().numpy()
    maps = 2 * (data @ waves.T).real * mask / s**1.5
    _, singular, right = np.linalg.svd(maps, full_matrices=False)
    found, values = singular_vectors(p, 2, seeded(8))
    # four passes bring the first two, that stand out, to the last digits of float32
    np.testing.assert_allclose(values.numpy(), singular[:2], rtol=1e-4)
    for ball, vector in zip(found, right, strict=False):
        # as a map that the axis stands for: the vector within the mask, the envelope divided out, cut to the band
        plain = (vector * mask).reshape(s, s, s) / frame.envelope(s).numpy().clip(0.05)
        wanted = plain.ravel() @ waves.conj()
        got = ball.numpy()
        cosine = abs(np.vdot(wanted, got).real) / np.linalg.norm(wanted) / np.linalg.norm(got)
        # the way back goes through the band and the mask once more, which a soft edge changes a little
        assert cosine > 0.97


def test_maps_and_balls_are_adjoint(frame: Frame) -> None:
    p = problem(drawn(frame, torch.zeros(1, frame.points.shape[1]), torch.zeros(4, 1), 1))
    projector = module._Projector(p)
    balls = torch.complex(*torch.randn(2, 3, frame.points.shape[1], generator=seeded(1)))
    maps = torch.randn(4, frame.small**3, generator=seeded(2))
    torch.testing.assert_close(
        (projector.to_space(balls) @ maps.T).double(), product(balls, projector.to_balls(maps)), rtol=1e-4, atol=1e-3
    )


# -------------------------------------------------------------------------------------------------------- found axes


def angles(found: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Principal angles in degrees between what axes span, in the metric that a mean particle sees."""
    a, b = (torch.view_as_real(m * weight.sqrt()).flatten(1).double().numpy().T for m in (found, wanted))
    cosine = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def test_planted_axes_are_found(frame: Frame, planted: torch.Tensor) -> None:
    """200 particles, each with a wedge of its own, strengths about 400 and 150.

    Noise of unit variance in 2q directions turns an axis by sqrt(2q / (N · strength)), and what is drawn of a direction is
    within a fifth of that in so many; the envelope, not divided out in the box's corners, adds 2 degrees at most.
    """
    scale = torch.tensor([20.0, 12.0])[:, None]
    places = torch.randn(200, 2, generator=seeded(9), dtype=torch.float64)
    d = drawn(frame, planted * scale, places, 10)
    axes = find(whole_box(d), 2, seeded(11))
    q = planted.shape[1]
    expected = np.degrees((2 * q / 200 / axes.strength.numpy()) ** 0.5)
    assert (angles(axes.balls, planted, d.mean_weight) < 1.2 * expected + [0, 1]).all()
    # strength: 2⟨W, |u|²⟩, of axes turned so that their coordinates are apart, with the variance of the drawn coordinates;
    # noise fitted along with an axis adds 2q / N; a weight is its mean's where particles lie along the axis alike
    u = (planted * scale).to(torch.complex128)
    root = torch.linalg.cholesky(places.T @ places / len(places)).to(u.dtype)
    wanted = torch.linalg.eigvalsh(product(root.T @ u, root.T @ u, d.mean_weight)).flip(0)
    torch.testing.assert_close(axes.strength, wanted, rtol=0.05, atol=2 * q / 200)
    own = product(axes.balls, axes.balls, d.mean_weight)
    torch.testing.assert_close(torch.diag(own), axes.strength, rtol=1e-3, atol=1e-3)
    assert abs(float(own[0, 1])) < 1e-3 * float(own[0, 0]) and float(axes.strength[0]) >= float(axes.strength[1])


def test_em_is_nearer_than_the_singular_vectors(frame: Frame, planted: torch.Tensor) -> None:
    """They know nothing of wedges. Both lie within a mask, so what they can reach are the planted axes within it."""
    scale = torch.tensor([20.0, 12.0])[:, None]
    d = drawn(frame, planted * scale, torch.randn(200, 2, generator=seeded(9)), 10)
    p = problem(d)
    within = module._Projector(p).masked(planted)
    off = [angles(find(p, 2, seeded(11), em=em).balls, within, d.mean_weight).max() for em in (True, False)]
    assert off[0] < 6 and off[0] < off[1] < 20


def test_an_axis_lies_within_the_mask_and_the_band(frame: Frame, planted: torch.Tensor) -> None:
    """Two lumps vary, one of them out of the mask: what is found is the other, and it is nothing beyond the mask, but for what
    the band's end spreads; the corners count as little as the envelope leaves of them."""
    outer = frame.balls(on_cube([(1.0, (0.0, 0.0, 40.0), 8.0)], frame))[None]
    outer = outer / product(outer, outer).sqrt().to(outer.dtype)
    columns = 15 * torch.cat([planted[:1], 3 * outer])
    d = drawn(frame, columns, torch.randn(150, 2, generator=seeded(1)), 2)
    p = problem(d, mask=20.0)
    axes = find(p, 1, seeded(3))
    density = frame.maps(axes.balls[0]) * frame.envelope()
    beyond = density[p.mask == 0]
    assert float((beyond**2).mean()) < 0.05 * float((density[p.mask > 0] ** 2).mean())
    assert angles(axes.balls, planted[:1], d.mean_weight).max() < 25
    band = slice(10, 80)
    assert find(problem(d, band=band), 1, seeded(3)).balls.shape == (1, 70)


def evidence(d: Differences, axes: torch.Tensor, known: torch.Tensor | None, precision: torch.Tensor) -> float:
    """Log-density of all data, coordinates integrated out: one dense Gaussian for each particle."""
    total = 0.0
    columns = axes if known is None else torch.cat([axes, known])
    variance = np.concatenate([np.ones(len(axes)), 1 / precision.numpy()])
    u = torch.view_as_real(columns).flatten(1).double().numpy().T
    for _, data, weight in d.blocks(slice(None)):
        for y, w in zip(torch.view_as_real(data).flatten(1).double().numpy(), weight.double().numpy(), strict=True):
            w = np.repeat(w, 2)
            x = w[:, None] * u
            covariance = np.diag(w / 2) + (x * variance) @ x.T
            sign, logdet = np.linalg.slogdet(covariance)
            assert sign > 0
            total -= 0.5 * (logdet + y @ np.linalg.solve(covariance, y))
    return total


@pytest.mark.parametrize("with_known", [False, True])
def test_em_raises_the_evidence(with_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one number of steps to the next, until it has settled: the ridge of a thousandth and the known axes, which an
    axis is fitted beside, cost less than 1e-3 of what is gained."""
    frame = Frame.of(12, PIXEL, 4.5 * PIXEL)
    u = torch.stack([frame.balls(on_cube(b, frame)) for b in (FIRST, SECOND)])
    u = u / product(u, u).diagonal().sqrt()[:, None].to(u.dtype)
    known = known_axes(frame, on_cube([*FIRST, (1.5, (4.0, -14.0, 9.0), 12.0)], frame)) if with_known else None
    g = seeded(1)
    columns, places = 3 * u, torch.randn(40, 2, generator=g, dtype=torch.float64)
    if known is not None:
        columns = torch.cat([columns, known])
        deviation = torch.tensor([0.1, *[0.3] * 3, *[0.02] * 3], dtype=torch.float64)
        places = torch.cat([places, deviation * torch.randn(40, 7, generator=g, dtype=torch.float64)], dim=1)
    d = drawn(frame, columns, places, 3)
    p = replace(whole_box(d), known=known)
    found = []
    for steps in range(1, 9):
        monkeypatch.setattr(module, "ITERATIONS", steps)
        axes = find(p, 2, seeded(4))
        found.append(evidence(d, axes.balls, known, axes.known_precision))
    gained = found[-1] - found[0]
    assert gained > 0
    assert min(np.diff(found)) > -2e-2 * gained - 1e-3
    # and what is reached is no worse than what the data were drawn from
    if known is None:
        assert found[-1] > evidence(d, 3 * u, None, torch.empty(0))


def test_scale_is_that_of_lone_coordinates(frame: Frame, planted: torch.Tensor) -> None:
    """At high signal to noise coordinates are known, and an axis of another length gets the length of unit variance."""
    places = 5 * torch.randn(300, 1, generator=seeded(1), dtype=torch.float64)
    d = drawn(frame, 10 * planted[:1], places, 2)
    found = scaled(problem(d), 0.3 * planted[:1])
    ratio = float((found / planted[:1]).real.mean())
    assert ratio == pytest.approx(10 * float((places**2).mean().sqrt()), rel=0.1)


def test_fewer_particles_than_axes(frame: Frame, planted: torch.Tensor) -> None:
    axes = find(problem(drawn(frame, planted, torch.ones(4, 2), 1)), 10, seeded(1))
    assert axes.balls.shape[0] == len(axes.strength) == 3 and bool(axes.strength.isfinite().all())


def test_the_same_seed_gives_the_same_axes(frame: Frame, planted: torch.Tensor) -> None:
    d = drawn(frame, 10 * planted, torch.randn(50, 2, generator=seeded(1)), 2)
    one, two = (find(problem(d), 2, seeded(5)) for _ in range(2))
    torch.testing.assert_close(one.balls, two.balls, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- known axes


PARTICLE: Blobs = [(1.0, (14.0, 0.0, 8.0), 14.0), (0.7, (-12.0, 10.0, -6.0), 15.0), (1.2, (0.0, -12.0, 12.0), 14.0)]


def moved(shift: tuple[float, float, float], turn: tuple[float, float, float]) -> Blobs:
    """The particle's lumps turned (radians about x, y, z) and then moved, Å."""
    matrix = matrix_from_rotvec(torch.tensor(turn, dtype=torch.float64).rad2deg()).numpy()
    return [(m, tuple((matrix @ np.array(c) + shift).tolist()), w) for m, c, w in PARTICLE]  # type: ignore[misc]


@pytest.mark.parametrize("axis", range(7))
def test_known_axes_are_the_changes_of_the_particle(axis: int) -> None:
    """Gaussians moved and turned in closed form, by little; the kernel's envelope, that stays where it is when a particle
    moves, is worth some percent, and the gradient between neighbouring voxels makes the axis of a turn 10 to 15 % too short."""
    frame = Frame.of(24, PIXEL, 3 * PIXEL)
    known = known_axes(frame, on_cube(PARTICLE, frame))
    assert known.shape == (7, frame.points.shape[1])
    step = 0.02
    if axis == 0:
        wanted = frame.balls(on_cube(PARTICLE, frame))
    else:
        ends = []
        for sign in (1, -1):
            part = [0.0] * 6
            part[axis - 1] = sign * step * (frame.small_pixel if axis < 4 else 1.0)
            ends.append(frame.balls(on_cube(moved(tuple(part[:3]), tuple(part[3:])), frame)))  # type: ignore[arg-type]
        wanted = (ends[0] - ends[1]) / (2 * step)
    found = known[axis]
    slope = float((found.conj() * wanted).real.sum() / (wanted.abs() ** 2).sum())
    cosine = slope * float(wanted.abs().norm() / found.abs().norm())
    # a turn has no sign that matters, a shift has none either: coordinates have a symmetric prior
    assert abs(cosine) > 0.97 and abs(slope) == pytest.approx(1, abs=0.12 if axis < 4 else 0.15)


# ------------------------------------------------------------------------------------------------ noise and its floor


def test_displacements_fill_a_ball_evenly() -> None:
    """Radius cubed is even between 0 and its largest; directions have no mean."""
    d = displacements(4000, seeded(1))
    radius = torch.linalg.vector_norm(d, dim=1) / DISPLACEMENT
    assert float(radius.max()) <= 1
    assert float((radius**3).mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 4000**0.5)
    assert float(d.mean(dim=0).abs().max()) < 4 * DISPLACEMENT * 0.2**0.5 / 4000**0.5


def test_displaced_maps_are_displaced(frame: Frame, planted: torch.Tensor) -> None:
    """All by the same vector: the axis found is the lump at the place where it came to lie."""
    lump = frame.balls(on_cube([(1.0, (8.0, 0.0, 0.0), 11.0)], frame))  # at a voxel
    d = drawn(frame, 0.5 * lump[None], torch.randn(80, 1, generator=seeded(1)), 2, noise=0.2)
    by = torch.tensor([-1.0, 2.0, 1.0]) / frame.small
    p = replace(problem(d, mask=40.0), displaced=by.expand(80, 3).double())
    density = frame.maps(find(p, 1, seeded(1)).balls[0])
    place = np.unravel_index(int(density.abs().argmax()), density.shape)
    assert (np.array(place) - frame.small // 2).tolist() == [1, 2, 0]  # z, y, x


def test_weakening_is_the_noise_that_comes_to_lie_in_the_mask(frame: Frame) -> None:
    """The envelope's square rolled by whole voxels, summed within the mask: a slow route."""
    s = frame.small
    mask = torch.roll(ball_mask(frame, 20.0), (1, -2, 2), (0, 1, 2))  # to one side, so that a wrong sign would be seen
    steps = torch.tensor([[0, 0, 0], [2, 0, 0], [0, -2, 1], [1, 1, -1], [0, 0, 2]])
    found = module._weakening(frame, mask, steps.double() / s)
    power = frame.envelope(s) ** 2
    still = float((power * mask).sum())
    for step, got in zip(steps.tolist(), found.tolist(), strict=True):
        there = torch.roll(power, (step[2], step[1], step[0]), (0, 1, 2))
        assert got == pytest.approx((float((there * mask).sum()) / still) ** 0.5, rel=1e-4)


def test_meaningful_axes_are_those_above_the_floor() -> None:
    noise = torch.tensor([2.0, 1.9, 1.85, 1.5, 1.4])
    found = Spectrum(torch.tensor([9.0, 2.8, 2.7, 7.0]), noise)
    assert found.floor == pytest.approx(2.0 + 1.5 * 0.5) and found.meaningful == 2
    even = Spectrum(torch.tensor([3.0, 2.35]), torch.tensor([2.0, 2.0]))
    assert even.floor == pytest.approx(1.15 * 2.0) and even.meaningful == 2
    assert Spectrum(torch.tensor([1.0]), noise).meaningful == 0
    weak = Spectrum(torch.tensor([0.2, 0.09]), torch.tensor([1e-3, 1e-3]), 0.1)
    assert weak.floor == 0.1 and weak.meaningful == 1


def spectrum_of(p: Problem, count: int, seed: int) -> Spectrum:
    """As a program makes it."""
    p = replace(p, variance=noise_variance(p, seeded(seed)))
    return spectrum(p, find(p, count, seeded(seed)), seeded(seed))


def test_noise_alone_is_below_the_floor(frame: Frame) -> None:
    """Of 20 sets drawn from noise, at most two have a meaningful axis; and the strongest is not far below, on average: a floor
    that nothing reaches would pass too."""
    nothing = torch.zeros(1, frame.points.shape[1])
    found = [spectrum_of(problem(drawn(frame, nothing, torch.zeros(200, 1), seed)), 4, seed) for seed in range(20)]
    assert sum(f.meaningful > 0 for f in found) <= 2
    assert np.mean([float(f.strength[0]) / f.floor for f in found]) > 0.4


@pytest.mark.parametrize("times", [2, 5])
def test_an_axis_above_the_floor_is_found(frame: Frame, planted: torch.Tensor, times: float) -> None:
    """Noise of the variance that is told, and an axis planted in it, of twice the floor that the noise has by itself."""
    nothing = torch.zeros(1, frame.points.shape[1])
    found = []
    for seed in range(10):
        empty = spectrum_of(problem(drawn(frame, nothing, torch.zeros(200, 1), seed)), 4, seed)
        d = drawn(
            frame, (times * empty.floor) ** 0.5 * planted[:1], torch.randn(200, 1, generator=seeded(seed + 50)), seed
        )
        found.append(spectrum_of(problem(d), 4, seed).meaningful)
    assert found.count(1) >= 9, found


def test_a_strong_axis_does_not_raise_the_floor(frame: Frame, planted: torch.Tensor) -> None:
    """One of a hundred leaves it where nothing planted has it, to a factor of 1.5; displaced along with the rest it would be
    twenty times as high."""
    nothing = torch.zeros(1, frame.points.shape[1])
    for seed in range(4):
        empty = spectrum_of(problem(drawn(frame, nothing, torch.zeros(200, 1), seed)), 4, seed)
        d = drawn(frame, 10 * planted[:1], torch.randn(200, 1, generator=seeded(seed + 50)), seed)
        assert spectrum_of(problem(d), 4, seed).floor < 1.5 * empty.floor


# ------------------------------------------------------------------------- what is taken off, and the variance of noise


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_variance_of_noise_is_measured(frame: Frame, noise: float) -> None:
    """Of noise alone, drawn with a deviation that is not what W says: 200 particles and 64 maps, most of which overlap, know it
    to some percent; a median of squares that each are a mean of 64 is a little below the mean."""
    nothing = torch.zeros(1, frame.points.shape[1])
    for band in (None, slice(20, 110)):
        p = problem(drawn(frame, nothing, torch.zeros(200, 1), 3, noise), band=band)
        found = noise_variance(p, seeded(1))
        assert found == pytest.approx(noise**2, rel=0.12)
        # measured again in units of it: the same, not its square
        assert noise_variance(replace(p, variance=found), seeded(1)) == pytest.approx(found, rel=1e-3)


def test_variance_of_noise_has_no_signal_in_it(frame: Frame, planted: torch.Tensor) -> None:
    """A strong axis within a tight mask: what is told of the noise is that of the noise alone, to 20 %."""
    nothing = torch.zeros(1, frame.points.shape[1])
    found = []
    for columns, places in (
        (nothing, torch.zeros(200, 1)),
        (10 * planted[:1], torch.randn(200, 1, generator=seeded(1))),
    ):
        p, _ = measured(problem(drawn(frame, columns, places, 3), mask=15.0), 4, seeded(1))
        found.append(p.variance)
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_variance_is_a_unit_of_strength(frame: Frame, planted: torch.Tensor) -> None:
    """All in units of a noise that is twice as large: data and weights are divided by it, an axis is the same map, of half the
    strength, and the same statistics come of data that are scaled so."""
    d = drawn(frame, 12 * planted[:1], torch.randn(100, 1, generator=seeded(1)), 2)
    one, two = (replace(problem(d), variance=v) for v in (1.0, 2.0))
    a, b = (next(iter(module._Blocks(p, None)(""))) for p in (one, two))
    torch.testing.assert_close(b[1], a[1] / 2)
    torch.testing.assert_close(b[2], a[2] / 2)
    found = [find(p, 1, seeded(3)) for p in (one, two)]
    assert float(found[1].strength[0] / found[0].strength[0]) == pytest.approx(0.5, rel=0.03)
    assert angles(found[0].balls, found[1].balls, d.mean_weight).max() < 3


def test_what_is_taken_off_is_gone_before_it_is_displaced(frame: Frame, planted: torch.Tensor) -> None:
    """D - W·Σ places·columns, then a phase for each point and a size for each particle: by hand."""
    places = torch.randn(30, 2, generator=seeded(1), dtype=torch.float64)
    d = drawn(frame, 15 * planted, places, 2)
    band = slice(5, 90)
    moved = displacements(30, seeded(3))
    p = replace(
        problem(d, band=band), taken=(15 * planted[:, band], places), displaced=moved, variance=1.5
    )  # fmt: skip
    ((_, data, weight),) = module._Blocks(p, None)("")
    _, raw, w = next(iter(d.blocks(band)))
    left = raw - w * (places.to(torch.complex64) @ (15 * planted[:, band]))
    size = module._weakening(frame, p.mask, moved)
    turn = torch.exp(-2j * torch.pi * (moved @ frame.points[:, band].double()))
    torch.testing.assert_close(data, (left * turn / size[:, None] / 1.5).to(data.dtype), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight, w / 1.5)
    assert float(left.abs().mean()) < 0.8 * float(raw.abs().mean())


def test_places_along_known_axes_are_fitted_alone(frame: Frame) -> None:
    """Coordinates along the known axes drawn with deviations of a contrast of 0.2, shifts of half a voxel and turns of 0.1, in
    little noise: precisions are those, to 4 / sqrt(2 N) of a deviation and what EM's steps leave; places are what was drawn."""
    particle = on_cube([*FIRST, (1.5, (4.0, -14.0, 9.0), 12.0), (0.8, (-10.0, 4.0, -8.0), 11.0)], frame)
    known = 20 * known_axes(frame, particle)
    deviation = torch.tensor([0.2, *[0.5] * 3, *[0.1] * 3], dtype=torch.float64)
    true = torch.randn(400, 7, generator=seeded(1), dtype=torch.float64) * deviation
    p = replace(problem(drawn(frame, known, true, 2)), known=known)
    precision, places = module.known_places(p)
    torch.testing.assert_close(precision.rsqrt(), deviation, rtol=0.2, atol=0)
    for k in range(7):
        assert np.corrcoef(places[:, k], true[:, k])[0, 1] > 0.9
    nothing = module.known_places(replace(p, known=None))
    assert nothing[0].shape == (0,) and nothing[1].shape == (400, 0)


# ----------------------------------------------------------------------------------------------- sets made of images

BOX, COUNT, SEEN = 20, 200, 4 * PIXEL
"""13 tilts each; the particle lies within 45 Å."""


@pytest.fixture(scope="module")
def clean() -> Particles:
    return clean_set(blobs(BOX), COUNT, 1)


def from_images(
    particles: Particles,
    noise: float,
    known: bool = False,
    contrast: torch.Tensor | None = None,
    seed: int = 5,
    mask: float = 45.0,
) -> Spectrum:
    """Of images with noise of `noise` times what a particle's images are, as a program would look for axes."""
    d = differences_of([noisy(particles, noise, seed, contrast)], SEEN)
    p = problem(d, mask=mask)
    if known:
        p = replace(p, known=known_axes(d.frame, d.frame.maps(d.average) * p.mask))
    return spectrum_of(p, 4, seed)


@pytest.mark.parametrize("known", [False, True])
def test_images_of_noise_have_no_meaningful_axes(known: bool) -> None:
    """Once in twelve times at most."""
    few = clean_set(blobs(BOX), 120, 1, tilts=7)
    blank = replace(few, stack=np.zeros_like(few.stack))
    assert sum(from_images(blank, 1.0, known, seed=seed).meaningful > 0 for seed in range(12)) <= 1


@pytest.mark.parametrize("noise", [4.0, 1.0, 0.5])
def test_identical_particles_have_no_meaningful_axes(clean: Particles, noise: float) -> None:
    """Signal to noise of 1 / 16 in a pixel, of 1, and of 4: once in six times at most."""
    assert sum(from_images(clean, noise, True, seed=seed).meaningful > 0 for seed in range(6)) <= 1


@pytest.mark.parametrize("box", [24, 25])
def test_identical_particles_that_fill_their_box_have_no_meaningful_axes(box: int) -> None:
    """Two or three would be what D is beside W·h there, had the average's slices not been taken off: once at most in four."""
    tight = clean_set(blobs(box), 60, 1)
    assert (
        sum(from_images(tight, 1.0, True, seed=seed, mask=PIXEL * box / 2 - 12).meaningful > 0 for seed in range(4))
        <= 1
    )


def test_two_kinds_of_particles_have_a_meaningful_axis() -> None:
    """Half of them with a lump more: one axis, and its coordinates tell which."""
    box = BOX
    x = (torch.arange(box) - box // 2).float()
    line = [torch.exp(-0.5 * ((x - c) / 1.8) ** 2) for c in (-2.0, 1.0, 2.0)]
    more = blobs(box) + 1.5 * torch.einsum("i,j,k->ijk", *line)
    series = [noisy(clean_set(m, COUNT // 2, k), 4.0, k) for k, m in ((1, blobs(box)), (2, more))]
    d = differences_of(series, SEEN)
    p = problem(d, mask=45.0)
    p = replace(p, variance=noise_variance(p, seeded(1)))
    found = find(p, 4, seeded(1))
    assert spectrum(p, found, seeded(2)).meaningful >= 1
    first = Columns.of(found.balls[:1])
    (z,) = [posterior(*statistics(a, w, first), torch.ones(1).double())[0] for _, a, w in d.blocks(p.band)]
    kind = torch.arange(COUNT) >= COUNT // 2
    apart = abs(float(z[kind].mean() - z[~kind].mean())) / float(z[kind].std())
    assert apart > 2


def varied(clean: Particles, what: str) -> tuple[Particles, torch.Tensor | None]:
    """The same particle, that differs by nothing that makes it another one."""
    g = seeded(3)
    c, r = torch.randn(COUNT, generator=g), torch.randn(COUNT, 3, generator=g, dtype=torch.float64)
    if what == "contrast":
        return clean, 1 + 0.25 * c
    if what == "shifts":
        return replace(clean, xyz=clean.xyz + 0.4 * PIXEL * r), None
    return replace(clean, rotation=clean.rotation @ matrix_from_rotvec(torch.rad2deg(0.12 * r))), None


@pytest.mark.parametrize("what", ["contrast", "turns", "shifts"])
def test_known_axes_take_what_is_no_structure(clean: Particles, what: str) -> None:
    """Contrasts of 25 %, poses that are wrong by 3 Å or 7 degrees along each axis: meaningful axes without the known ones in
    most of four sets, and with them in one at most; the strongest is weaker in all."""
    particles, contrast = varied(clean, what)
    without, with_them = (
        [from_images(particles, 4.0, known, contrast, seed) for seed in range(4)] for known in (False, True)
    )
    assert sum(s.meaningful > 0 for s in without) >= 3
    assert sum(s.meaningful > 0 for s in with_them) <= 1
    assert all(float(a.strength[0]) < 0.6 * float(b.strength[0]) for a, b in zip(with_them, without, strict=True))
