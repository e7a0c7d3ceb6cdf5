"""Clusters of uncertain coordinates, against planted ones, and against integrals worked out number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from libemc.methods.classify import cluster as module
from libemc.methods.classify.cluster import METHODS, mixture, partition, proposed, structureless, trial
from libemc.methods.classify.coordinates import Coordinates


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observed(true: torch.Tensor, seed: int, unequal: float = 1.0, precision: float = 30.0) -> Coordinates:
    """What particles at known places would say of them: A is precision times a spread by factors of up to `unequal` each
    way, and not round."""
    g = seeded(seed)
    n, k = true.shape
    level = precision * unequal ** (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1)
    root = torch.eye(k, dtype=torch.float64) + 0.3 * torch.randn(n, k, k, generator=g, dtype=torch.float64) / k**0.5
    a = level[:, None, None] * root @ root.transpose(1, 2)
    noise = torch.randn(n, k, generator=g, dtype=torch.float64)
    return Coordinates(
        torch.einsum("nij,nj->ni", a, true) + torch.einsum("nij,nj->ni", torch.linalg.cholesky(a), noise), a
    )


def lumps(counts: list[int], centres: torch.Tensor, width: float, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Places (N, k) about centres, shuffled, and which centre each is of."""
    g = seeded(seed)
    which = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    which = which[torch.randperm(len(which), generator=g)]
    noise = torch.randn(len(which), centres.shape[1], generator=g, dtype=torch.float64)
    return centres.double()[which] + width * noise, which.numpy()


THREE = torch.tensor([[1.4, 0.0], [-0.8, 1.0], [-0.8, -1.2]])


@pytest.fixture(scope="module")
def planted() -> tuple[Coordinates, np.ndarray]:
    """Three clusters of 90, 60 and 30, errors between a third and three times as usual."""
    true, which = lumps([90, 60, 30], THREE, 0.15, 1)
    return observed(true, 2, unequal=9.0, precision=20.0), which


# ---------------------------------------------------------------------------------------------------------- mixture


def test_responsibilities_are_integrals() -> None:
    """One coordinate, two clusters: exp(b z - a z² / 2) times each Gaussian, summed over a fine line.

    A step of 1e-3 of a smooth function that is 0 at both ends: the sum is the integral to the last digits.
    """
    true, which = lumps([25, 15], torch.tensor([[1.0], [-1.0]]), 0.3, 3)
    points = observed(true, 4, unequal=9.0, precision=2.0)
    fit = mixture(points, which.astype(np.int64), 30)
    z = np.arange(-15, 15, 1e-3)
    b, a = points.b[:, 0].numpy(), points.a[:, 0, 0].numpy()
    variance = float(fit.covariance[0, 0])
    each = np.empty((40, 2))
    logarithm, mean, inside, _ = module._weighed(points, fit.share, fit.centre, fit.covariance)
    for c in range(2):
        prior = np.exp(-0.5 * (z - float(fit.centre[c, 0])) ** 2 / variance) / (2 * np.pi * variance) ** 0.5
        for i in range(40):
            density = np.exp(b[i] * z - 0.5 * a[i] * z**2) * prior
            each[i, c] = float(fit.share[c]) * density.sum() * 1e-3
            middle = (density * z).sum() / density.sum()
            assert float(mean[i, c, 0]) == pytest.approx(middle, abs=1e-6)
            assert float(inside[i, 0, 0]) == pytest.approx(
                (density * (z - middle) ** 2).sum() / density.sum(), abs=1e-6
            )
    np.testing.assert_allclose(logarithm.numpy(), np.log(each), atol=1e-6)
    settled = mixture(points, which.astype(np.int64))
    again = module._weighed(points, settled.share, settled.centre, settled.covariance)[0]
    torch.testing.assert_close(settled.probability, torch.softmax(again, dim=1), atol=1e-9, rtol=0)
    assert settled.likelihood == pytest.approx(float(torch.logsumexp(again, dim=1).sum()))


def test_likelihood_never_falls(planted: tuple[Coordinates, np.ndarray]) -> None:
    """With more and more steps, from a poor start; the least variance, that is added each time, is worth 1e-6 each."""
    points, which = planted
    start = np.random.default_rng(1).integers(0, 3, len(which))
    found = [mixture(points, start, steps).likelihood for steps in (*range(1, 30), 60, 120)]
    assert found[-1] - found[0] > 50
    assert min(np.diff(found)) > -1e-6 * len(which)


def test_mixture_recovers_what_was_drawn() -> None:
    """2000 particles: shares to sqrt(p q / N), centres and the width within, errors taken out, to a few percent."""
    true, which = lumps([1200, 800], torch.tensor([[1.0, 0.5], [-1.0, -0.5]]), 0.4, 5)
    points = observed(true, 6, unequal=4.0, precision=6.0)
    fit = mixture(points, which.astype(np.int64))
    assert fit.share[0] == pytest.approx(0.6, abs=4 * (0.24 / 2000) ** 0.5)
    # a centre is known to sqrt((0.16 + 1 / 6) / 800) = 0.02; a variance within to some 0.33 · sqrt(2 / 2000) = 0.01
    torch.testing.assert_close(fit.centre, torch.tensor([[1.0, 0.5], [-1.0, -0.5]]).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(fit.covariance, 0.16 * torch.eye(2).double(), atol=0.04, rtol=0)
    # the spread of the likely coordinates is no such thing: they are drawn to 0, and it would be too narrow or too wide
    surest = fit.probability.max(dim=1).values
    right = fit.labels == which
    # probabilities mean what they say
    assert float(surest.mean()) == pytest.approx(float(right.mean()), abs=4 * (0.1 / 2000) ** 0.5)


def test_criterion_counts_what_is_free(planted: tuple[Coordinates, np.ndarray]) -> None:
    points, which = planted
    fit = mixture(points, which.astype(np.int64))
    free = 3 * 2 + 3 + 2  # centres, a covariance for all, shares that sum to 1
    assert fit.criterion == pytest.approx(-2 * fit.likelihood + free * math.log(180))


def by_truth(
    measured: np.ndarray, error: np.ndarray, share: np.ndarray, centre: np.ndarray, variance: float
) -> np.ndarray:
    """The likeliest cluster of measured coordinates with their errors (N, k, k), all of the mixture being known: Bayes' rule
    with Gaussians of the covariance that errors and cluster have together."""
    whole = error + variance * np.eye(centre.shape[1])
    off = measured[:, None] - centre
    distance = np.einsum("nci,nij,ncj->nc", off, np.linalg.inv(whole), off)
    return np.asarray((np.log(share) - 0.5 * distance).argmax(axis=1))


def test_errors_count_where_they_are_unequal() -> None:
    """150 and 50 particles, some known forty times as well as others: better than k-means of the coordinates as measured or
    as likely, and as good as if shares, centres and width were known, which nothing can be better than on average."""
    counts, centres = [150, 50], torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = []
    for seed in range(8):
        true, which = lumps(counts, centres, 0.1, seed)
        points = observed(true, seed + 20, unequal=40.0, precision=3.0)
        measured = torch.linalg.solve(points.a, points.b[..., None])[..., 0].numpy()
        best = by_truth(measured, torch.linalg.inv(points.a).numpy(), np.array([0.75, 0.25]), centres.numpy(), 0.01)
        plain = KMeans(2, n_init=10, random_state=0).fit_predict(measured)
        tried = [plain, partition(points, 2, "kmeans", 0, 8), partition(points, 2, "mixture", 0, 8), best]
        found.append([adjusted_rand_score(which, labels) for labels in tried])
    plain_mean, likely_mean, mixture_mean, best_mean = np.mean(found, axis=0)
    assert mixture_mean > plain_mean + 0.1 and mixture_mean > likely_mean + 0.1
    assert mixture_mean == pytest.approx(best_mean, abs=0.04)


# --------------------------------------------------------------------------------------------------------- partitions


@pytest.mark.parametrize("method", METHODS)
def test_partitions_find_clusters_that_are_apart(method: str) -> None:
    true, which = lumps([60, 40, 20], 3 * THREE, 0.2, 7)
    labels = partition(observed(true, 8, precision=50.0), 3, method, 0, 8)
    assert adjusted_rand_score(which, labels) > 0.97
    assert labels.dtype == np.int64 and set(labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_is_the_same_partition(planted: tuple[Coordinates, np.ndarray], method: str) -> None:
    one, two = (partition(planted[0], 4, method, 3, 4) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not partition(planted[0], 1, method, 3).any()


def test_largest_cluster_first() -> None:
    labels = np.array([2, 2, 0, 1, 1, 1, 2, 1, 0, 4])
    found = module._largest_first(labels)
    assert found.tolist() == [1, 1, 2, 0, 0, 0, 1, 0, 2, 3]
    assert (np.diff(np.bincount(found)) <= 0).all()


# ------------------------------------------------------------------------------------------------------------- trials


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer starts and repetitions: what is found of clusters this size doesn't take more, and the test takes less."""
    for name, value in (("STARTS", 8), ("RESAMPLED", 4), ("DRAWS", 10)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.partition, "__defaults__", (8, module.STEPS))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("method", "unequal"), [("mixture", 9.0), ("kmeans", 3.0), ("hierarchical", 3.0)])
def test_planted_clusters_are_proposed(method: str, unequal: float) -> None:
    """The right number, from 1 to 5; those of particles with very unequal errors by the mixture, which knows of them."""
    true, which = lumps([90, 60, 30], THREE, 0.3, 1)
    points = observed(true, 2, unequal, precision=20.0)
    trials = [trial(points, count, method, 1) for count in range(1, 6)]
    best = trials[proposed(trials)]
    assert best.count == 3
    assert adjusted_rand_score(which, best.labels) > 0.85
    assert (np.diff(np.bincount(best.labels)) <= 0).all()
    assert best.stability > 0.85 and best.real and best.silhouette > best.chance.max()
    right = best.labels == _matched(best.labels, which)
    assert float(best.confidence.mean()) == pytest.approx(float(right.mean()), abs=0.05)  # sure as often as right
    assert len(best.chance) == module.DRAWS and trials[0].chance.size == 0 and math.isnan(trials[0].silhouette)


def _matched(labels: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The label of each particle's true cluster: that of most of its kind."""
    most = {w: np.bincount(labels[which == w]).argmax() for w in np.unique(which)}
    return np.array([most[w] for w in which])


@pytest.mark.usefixtures("few")
def test_a_line_is_no_clusters() -> None:
    """Particles evenly along an axis, as of something that moves: the criterion of Gaussians of one shape is best for one."""
    seed = 1
    true = torch.zeros(150, 2, dtype=torch.float64)
    true[:, 0] = torch.rand(150, generator=seeded(seed), dtype=torch.float64) * 3.4 - 1.7
    trials = [trial(observed(true, seed + 60, 3.0, 15.0), count, "mixture", seed) for count in (1, 2, 3)]
    assert trials[proposed(trials)].count == 1


@pytest.mark.usefixtures("few")
def test_one_blob_is_one_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gaussian of particles with unequal errors, ten times: at least nine times it is proposed to be one.

    With fewer sets drawn by chance, more clusters pass for real: it is no easier.
    """
    monkeypatch.setattr(module, "DRAWS", 5)
    monkeypatch.setattr(module, "RESAMPLED", 1)

    found = []
    for seed in range(10):
        g = seeded(seed)
        true = torch.randn(100, 2, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.5])
        points = observed(true, seed + 40, unequal=4.0, precision=8.0)
        trials = [trial(points, count, "mixture", seed) for count in (1, 2, 3)]
        found.append(trials[proposed(trials)].count)
    assert found.count(1) >= 9, found


def test_sets_without_structure_are_as_spread_and_as_uncertain(planted: tuple[Coordinates, np.ndarray]) -> None:
    """The same errors; coordinates about one centre, with the mean and the variance of a single fitted Gaussian."""
    points = planted[0]
    drawn = [structureless(points, seeded(k)) for k in range(60)]
    assert all(d.a is points.a for d in drawn)
    one = mixture(points, np.zeros(180, dtype=np.int64))
    measured = torch.stack([torch.linalg.solve(d.a, d.b[..., None])[..., 0] for d in drawn])
    expected = one.covariance + torch.linalg.inv(points.a).mean(dim=0)
    torch.testing.assert_close(measured.mean(dim=(0, 1)), one.centre[0], atol=0.06, rtol=0)
    # 10800 draws of a variance: sqrt(2 / 10800) = 1.4 %, and the tails of unequal errors
    torch.testing.assert_close(torch.cov(measured.flatten(0, 1).T), expected, rtol=0.08, atol=0.03)


def test_proposed_are_the_most_apart_that_are_likelier_and_no_chance() -> None:
    """By the silhouette among those that are more than chance and have a better criterion than one cluster; else that one."""
    true, _ = lumps([30, 30], THREE[:2], 0.2, 1)
    points = observed(true, 2)
    base = module.trial(points, 1, "mixture", 0)
    nothing = base.labels

    def made(likelihood: float, count: int, silhouette: float) -> module.Trial:
        fit = module.Mixture(
            torch.full((count,), 1 / count).double(), torch.zeros(count, 2).double(), torch.eye(2).double(),
            torch.full((60, count), 1 / count).double(), likelihood,
        )  # fmt: skip
        return module.Trial(nothing, fit, silhouette, np.linspace(0, 0.5, 20) if count > 1 else np.empty(0), 1.0)

    one, two, three = made(-100, 1, math.nan), made(-60, 2, 0.6), made(-10, 3, 0.3)
    assert one.real and two.real and not three.real
    assert proposed([one, two, three]) == 1  # three is likeliest, and chance
    assert proposed([one, three]) == 0 and proposed([three]) == 0
    assert proposed([three, two, one]) == 1
    four = made(-5, 4, 0.55)  # likeliest, and less apart than two
    assert four.real and proposed([one, two, four]) == 1 and proposed([one, four]) == 1
    # two clusters have three numbers more, a centre and a share: 1.5 log 60 = 6.1 is what the likelihood must gain
    assert proposed([one, made(-94.5, 2, 0.9)]) == 0 and proposed([one, made(-93.5, 2, 0.9)]) == 1
    # where one was not asked for, the likeliest of those that are no chance; of those that are, the least unlikely
    assert proposed([two, four]) == 0 and proposed([made(-60, 2, 0.1), made(-10, 3, 0.1)]) == 1


def test_a_partition_that_is_held_stays(planted: tuple[Coordinates, np.ndarray]) -> None:
    """Centres, shares and spread of a partition as it is: of the true kinds they are what was drawn, and of kinds that were
    dealt at random all centres are alike, where EM that may move particles goes to the true ones."""
    points, which = planted
    fit = mixture(points, which.astype(np.int64), held=True)
    torch.testing.assert_close(fit.share, torch.tensor([90, 60, 30]).double() / 180)
    torch.testing.assert_close(fit.centre, THREE.double(), atol=0.15, rtol=0)
    chance = np.random.default_rng(1).integers(0, 3, len(which))
    held, free = (mixture(points, chance, held=h) for h in (True, False))
    torch.testing.assert_close(held.share, torch.from_numpy(np.bincount(chance)).double() / 180)
    apart = [float(torch.pdist(f.centre).min()) for f in (held, free)]
    assert apart[0] < 0.5 < 1.0 < apart[1]
    assert held.likelihood < fit.likelihood
