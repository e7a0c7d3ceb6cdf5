"""Where particles lie along axes, against where they were put; and what coordinates follow, against what they were made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.average import half_maps
from libemc.methods.classify.axes import Axes, Problem, noise_variance, posterior
from libemc.methods.classify.coordinates import (
    Coordinates,
    coordinates,
    difference_blocks,
    explained,
    follows_sampling,
    joined,
    sampling,
    two_parts,
)
from libemc.methods.classify.differences import Differences, Member, members, read
from libemc.methods.classify.frame import Frame, band_slices
from libemc.numerics.rotations import matrix_from_rotvec
from tests.methods.classify_data import MEMORY, PIXEL, ball_mask, clean_set, differences_of, drawn, noisy, on_cube
from tests.methods.subtilt_data import blobs

NOTHING = torch.empty(0, dtype=torch.float64)
COUNT = 400


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def frame() -> Frame:
    return Frame.of(12, PIXEL, 3 * PIXEL)


@pytest.fixture(scope="module")
def columns(frame: Frame) -> torch.Tensor:
    """(4, Q): two axes of strength about 6, that overlap, and two known ones beside them."""
    centres = [(12.0, 0.0, 4.0), (2.0, 8.0, 0.0), (-8.0, 8.0, -4.0), (0.0, 4.0, 12.0)]
    u = torch.stack([frame.balls(on_cube([(1.0, c, 11.0)], frame)) for c in centres])
    return u * (6 / (2 * (u.abs() ** 2).sum(dim=1))).sqrt()[:, None]


def axes_of(balls: torch.Tensor, precision: torch.Tensor = NOTHING) -> Axes:
    return Axes(balls, torch.ones(len(balls)).double(), precision, torch.ones(len(balls)).double())


def surprise(found: Coordinates, true: torch.Tensor) -> float:
    """Mean of (z - true)ᵀ C⁻¹ (z - true) / k, z and C the posterior's: 1 where errors are as large as they are told."""
    k = true.shape[1]
    mean, covariance = posterior(found.b, found.a, torch.ones(k).double())
    off = mean - true
    return float(torch.einsum("ni,nij,nj->n", off, torch.linalg.inv(covariance), off).mean() / k)


def test_errors_of_coordinates_are_as_large_as_told(frame: Frame, columns: torch.Tensor) -> None:
    """Coordinates of unit variance drawn and found again, within wedges: chi² of k N degrees is 1 to sqrt(2 / (k N)).

    Also what is told of the errors must differ between particles, and matter: those with the smaller told are nearer.
    """
    true = torch.randn(COUNT, 2, generator=seeded(1), dtype=torch.float64)
    d = drawn(frame, columns[:2], true, 2)
    found = coordinates(d.blocks(slice(None)), axes_of(columns[:2]), None)
    assert surprise(found, true) == pytest.approx(1, abs=4 * (2 / (2 * COUNT)) ** 0.5)
    covariance = posterior(found.b, found.a, torch.ones(2).double())[1]
    told = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)
    off = ((found.likely - true) ** 2).sum(dim=1)
    order = told.argsort()
    assert float(off[order[: COUNT // 2]].mean()) < float(off[order[COUNT // 2 :]].mean())
    assert float(off.mean()) == pytest.approx(float(told.mean()), rel=0.2)


def test_known_axes_take_their_share_of_the_error(frame: Frame, columns: torch.Tensor) -> None:
    """What varies along them is in the errors if they are known, and makes these too small if they aren't."""
    deviation = torch.tensor([1.5, 1.0], dtype=torch.float64)
    g = seeded(3)
    true = torch.randn(COUNT, 2, generator=g, dtype=torch.float64)
    other = torch.randn(COUNT, 2, generator=g, dtype=torch.float64) * deviation
    d = drawn(frame, columns, torch.cat([true, other], dim=1), 4)
    knowing = coordinates(d.blocks(slice(None)), axes_of(columns[:2], deviation**-2), columns[2:])
    ignorant = coordinates(d.blocks(slice(None)), axes_of(columns[:2]), None)
    assert surprise(knowing, true) == pytest.approx(1, abs=4 * (2 / (2 * COUNT)) ** 0.5)
    assert surprise(ignorant, true) > 1.5


def test_variance_is_that_of_the_noise(frame: Frame, columns: torch.Tensor) -> None:
    """Noise of twice the deviation that W says: with a variance of 4 errors are as large as told, with 1 they're larger."""
    true = torch.randn(COUNT, 2, generator=seeded(1), dtype=torch.float64)
    d = drawn(frame, 2 * columns[:2], true, 2, noise=2.0)
    told, plain = (
        surprise(coordinates(d.blocks(slice(None)), axes_of(2 * columns[:2]), None, v), true) for v in (4.0, 1.0)
    )
    assert told == pytest.approx(1, abs=4 * (2 / (2 * COUNT)) ** 0.5)
    assert plain > 2.5


def test_errors_of_images_are_as_large_as_told() -> None:
    """Lumps of no height at places all over the mask, in images of noise whose variance is measured with other maps: on average
    the variance of b is A. In the middle of the box it is 1.6 times A and at the mask's rim 0.8, since the kernel fades noise
    outwards and one number is told for all of the mask. With a variance of 1 errors are told too large everywhere."""
    box, count, places = 20, 300, 16
    blank = clean_set(blobs(box), count, 1)
    blank = replace(blank, stack=np.zeros_like(blank.stack))
    d = differences_of([noisy(blank, 1.0, 1)], 4 * PIXEL)
    mask = ball_mask(d.frame, 45.0)
    variance = noise_variance(Problem(d, slice(None), mask, None), seeded(1))
    direction = torch.nn.functional.normalize(torch.randn(places, 3, generator=seeded(2)), dim=1)
    centres = 45 * direction * (torch.arange(places)[:, None] / places + 0.03) ** (1 / 3)  # evenly within 45 Å
    balls = torch.stack([d.frame.balls(on_cube([(1.0, tuple(c), 13.0)], d.frame) * mask) for c in centres.tolist()])
    ratio = []
    for ball in balls:
        ball = ball[None] * (5 / (2 * (ball.abs() ** 2 * d.mean_weight).sum())).sqrt()
        found = coordinates(d.blocks(slice(None)), axes_of(ball), None, variance)
        ratio.append(float((found.b[:, 0] ** 2 / found.a[:, 0, 0]).mean()))  # chi² of b / A, of variance 1 / A
    assert np.mean(ratio) == pytest.approx(1, abs=0.15)
    assert min(ratio) > 0.7 and max(ratio) < 1.8
    assert np.mean(ratio) * variance < 0.8


def test_bands_are_joined_as_independent(frame: Frame, columns: torch.Tensor) -> None:
    """An axis cut into two bands with one coordinate for both: information adds up to that of the whole axis."""
    d = drawn(frame, columns[:2], torch.randn(30, 2, generator=seeded(5)), 6)
    bands = band_slices(frame, [60.0, 3 * PIXEL])
    parts = [coordinates(d.blocks(b), axes_of(columns[:2, b]), None) for b in bands]
    whole = coordinates(d.blocks(slice(None)), axes_of(columns[:2]), None)
    torch.testing.assert_close(parts[0].b + parts[1].b, whole.b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts[0].a + parts[1].a, whole.a, rtol=1e-4, atol=1e-4)
    both = joined(parts)
    assert both.b.shape == (30, 4) and not both.a[:, :2, 2:].any() and not both.a[:, 2:, :2].any()
    for part, at in zip(parts, ([0, 1], [2, 3]), strict=True):
        again = both.of_axes(at)
        torch.testing.assert_close(again.b, part.b, rtol=0, atol=0)
        torch.testing.assert_close(again.a, part.a, rtol=0, atol=0)
    torch.testing.assert_close(both.likely, torch.cat([p.likely for p in parts], dim=1))


def test_parts_of_coordinates() -> None:
    root = torch.randn(7, 3, 3, generator=seeded(1), dtype=torch.float64)
    points = Coordinates(torch.randn(7, 3, generator=seeded(2), dtype=torch.float64), root @ root.transpose(1, 2))
    some = points.at(torch.tensor([5, 0])).of_axes([2, 0])
    assert some.b.tolist() == points.b[[5, 0]][:, [2, 0]].tolist()
    assert some.a[0, 0, 1] == points.a[5, 2, 0] and some.a[1, 1, 1] == points.a[0, 0, 0]
    typical = points.typical()
    assert typical.a.shape == points.a.shape
    torch.testing.assert_close(typical.a[3], points.a.mean(dim=0))
    # distances in standard errors of a mean particle: (z - z')ᵀ A (z - z')
    y, z = points.in_errors, points.likely
    apart = z[:, None] - z
    wanted = torch.einsum("nmi,ij,nmj->nm", apart, points.a.mean(dim=0), apart)
    torch.testing.assert_close(torch.cdist(y, y) ** 2, wanted, rtol=1e-6, atol=1e-9)
    assert points.of_axes([]).in_errors.shape == (7, 0)


def test_further_particles_are_as_those_of_the_set() -> None:
    """Read again, in batches, bands side by side: the same differences as those that were kept."""
    series = [clean_set(blobs(16), 12, 1), clean_set(blobs(16), 9, 2)]
    d = differences_of(series, 4 * PIXEL)
    bands = band_slices(d.frame, [80.0, 4 * PIXEL])
    average = half_maps(series, MEMORY).whole
    batches = list(difference_blocks(read(series, members(series), d.frame, 1 << 20, average), d, bands))
    assert batches[0][0][0].start == 0 and len(batches) > 1 and batches[-1][0][0].stop == 21
    for k, band in enumerate(bands):
        for part in (1, 2):
            found = torch.cat([b[k][part] for b in batches])
            wanted = torch.cat([block[part] for block in d.blocks(band)])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what else they follow


def slow_two_parts(values: np.ndarray) -> np.ndarray:
    """Every threshold between two values tried."""
    best, answer = np.inf, np.zeros(len(values), bool)
    for threshold in np.sort(values)[:-1]:
        upper = values > threshold
        if not upper.any():
            continue
        within = sum(((values[m] - values[m].mean()) ** 2).sum() for m in (upper, ~upper))
        if within < best - 1e-12:
            best, answer = within, upper
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_two_parts_are_the_best_of_all_thresholds(seed: int) -> None:
    g = np.random.default_rng(seed)
    values = np.concatenate([g.normal(0, 1, 20 + seed), g.normal(seed, 1, 13)])
    np.testing.assert_array_equal(two_parts(values), slow_two_parts(values))


def test_two_parts_of_numbers_with_a_mean() -> None:
    """A common offset changes nothing."""
    values = np.array([5.0, 5.1, 9.0, 9.2, 9.1])
    assert two_parts(values).tolist() == two_parts(values - 100).tolist() == [False, False, True, True, True]


def test_what_follows_the_sampling_is_told() -> None:
    """A function of how particles were sampled is; a class that lies differently to the beam, and noise, are not."""
    g = np.random.default_rng(1)
    direction = g.normal(size=(COUNT, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    wedge = np.stack([np.outer(v, v)[np.triu_indices(3)][:5] for v in direction])
    groups = {"missing wedge": wedge, "defocus": g.normal(2e4, 2e3, (COUNT, 1))}
    follows = wedge @ g.normal(size=5)
    follows = follows / follows.std() + 0.3 * g.normal(size=COUNT)
    height = 0.9 * (groups["defocus"][:, 0] - 2e4) / 2e3 + 0.3 * g.normal(size=COUNT)
    # a class: three quarters of those that lie along z, one quarter of the others
    kind = g.random(COUNT) < np.where(np.abs(direction[:, 2]) > 0.5, 0.75, 0.25)
    structure = 3.0 * kind + 0.5 * g.normal(size=COUNT)
    assert np.corrcoef(kind, np.abs(direction[:, 2]))[0, 1] > 0.3
    values = torch.from_numpy(np.stack([follows, height, structure, g.normal(size=COUNT)], axis=1))
    found = explained(values, groups)
    assert [follows_sampling(f) for f in found] == ["missing wedge", "defocus", None, None]
    # what a part of 1 / (1 + 0.09) follows, less what two parts by the coordinate itself hide of it
    assert 0.6 < found[0]["missing wedge"] < 0.93
    # adjusted: noise follows nothing, however many numbers there are to follow, to sqrt(2 · 5) / N
    assert max(found[3].values()) < 4 * 10**0.5 / COUNT


def test_a_coordinate_that_is_a_linear_function_is_wholly_explained() -> None:
    """Exactly 1, in parts too; and 0 of numbers that are the same for all."""
    g = np.random.default_rng(2)
    numbers = g.normal(size=(50, 3))
    values = torch.from_numpy(numbers @ np.array([1.0, -2.0, 0.5]) + 7.0)[:, None]
    (found,) = explained(values, {"all": numbers, "none": np.ones((50, 1)), "twice": np.tile(numbers, 2)})
    assert found["all"] == pytest.approx(1) and found["twice"] == pytest.approx(1) and found["none"] == 0.0
    assert follows_sampling({}) is None and follows_sampling({"x": 0.5}) is None


def test_sampling_is_what_the_file_says() -> None:
    """The wedge in the particle's frame, that a half turn about the tilt axis or the beam leaves, and a quarter doesn't."""
    particles = clean_set(blobs(16), 12, 1)
    chosen = [Member(0, k) for k in (0, 3, 7)]
    found = sampling([particles], chosen)
    assert found["images"][:, 0].tolist() == [float(particles.shown[k].sum()) for k in (0, 3, 7)]
    assert found["half"][:, 0].tolist() == [float(particles.half[k]) for k in (0, 3, 7)]
    seen = [float(particles.defocus[k][particles.shown[k]].mean()) for k in (0, 3, 7)]
    np.testing.assert_allclose(found["defocus"][:, 0], seen)
    for turn, same in (([180.0, 0, 0], True), ([0, 180.0, 0], True), ([0, 0, 180.0], True), ([0, 0, 90.0], False)):
        specimen = matrix_from_rotvec(torch.tensor(turn, dtype=torch.float64))
        other = sampling([replace(particles, rotation=specimen @ particles.rotation)], chosen)
        assert np.allclose(other["missing wedge"], found["missing wedge"]) is same


def test_wedge_numbers_are_of_the_tilt_axis_and_the_beam() -> None:
    """A particle turned about the tilt axis has the same tilt axis, and the weights of its ball say where the beam is not:
    along the beam nothing is seen."""
    particles = noisy(clean_set(blobs(16), 30, 1), 1.0, 1)
    d: Differences = differences_of([particles], 4 * PIXEL)
    numbers = sampling([particles], members([particles]))["missing wedge"]
    points = (d.frame.points / torch.linalg.vector_norm(d.frame.points.double(), dim=0)).numpy()
    for i in range(len(numbers)):
        # the second order in the beam: x², xy, xz, y², yz are told, and z² is what is missing to 1
        xx, xy, xz, yy, yz = numbers[i, 5:]
        second = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, 1 - xx - yy]])
        along = np.einsum("ik,ij,jk->k", points, second, points)  # cos² to the beam
        outer = d.frame.lengths.numpy() > 3
        w = d.weight[i]
        assert w[(along > 0.9) & outer].mean() < 0.1 * w[(along < 0.3) & outer].mean()
