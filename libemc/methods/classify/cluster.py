"""Particles with coordinates that are uncertain, each in its own way, in clusters: how many, which, and how surely.

Partitions come from scikit-learn. The mixture of Gaussians that weighs them knows the error of each particle's coordinates
(extreme deconvolution, Bovy, Hogg & Roweis 2011, Ann. Appl. Stat. 5, 1657): a particle that few images show counts little
where clusters are and how wide, and is given to none for certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from libemc.methods.classify.coordinates import Coordinates

Labels = NDArray[np.int64]

METHODS = ("mixture", "kmeans", "hierarchical")
STARTS = 64
"""Starts of k-means++, the best of which counts."""
STEPS, FEW_STEPS, SETTLED = 200, 30, 1e-6
"""Of EM at most, and where many sets are clustered; gain of the mean log-likelihood at which it ends."""
MOST = 6
"""Clusters that are tried, unless told otherwise."""
DRAWS = 20
"""Sets without structure that silhouettes are compared with."""
CHANCE = 0.95
"""Part of them that must be below what the data have."""
RESAMPLED, KEPT = 10, 0.8
"""Times that the clustering is repeated, and part of the particles each time."""
JUDGED = 2000
"""Particles that silhouettes are computed of, which take distances between all pairs, and that clustering is repeated with."""
LEAST_VARIANCE = 1e-3
"""Of a cluster along an axis, in units of all coordinates' variance."""


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one shape about several centres, and what they say of N particles.

    Attributes:
        share: (c,); centre: (c, k); covariance: (k, k), within a cluster, errors not counted; float64.
        probability: (N, c) of each particle's clusters.
        likelihood: log, of all particles.
    """

    share: Tensor
    centre: Tensor
    covariance: Tensor
    probability: Tensor
    likelihood: float

    @property
    def labels(self) -> Labels:
        """(N,) the likeliest cluster, from 0."""
        return self.probability.argmax(dim=1).numpy()

    @property
    def criterion(self) -> float:
        """Bayesian information criterion: the lower the better."""
        c, k = self.centre.shape
        free = c * k + k * (k + 1) / 2 + c - 1
        return -2 * self.likelihood + free * math.log(len(self.probability))


def _weighed(
    points: Coordinates, share: Tensor, centre: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-likelihood (N, c) of each cluster, coordinates (N, c, k) and their covariance (N, k, k) in it."""
    precision = torch.linalg.inv(covariance)
    inside = torch.linalg.inv(points.a + precision)
    pull = centre @ precision
    h = points.b[:, None] + pull
    mean = torch.einsum("nij,ncj->nci", inside, h)
    logarithm = 0.5 * (h * mean).sum(dim=2) - 0.5 * (pull * centre).sum(dim=1)
    logarithm = logarithm - 0.5 * (torch.logdet(points.a + precision) + torch.logdet(covariance))[:, None]
    return logarithm + share.log(), mean, inside, precision


def mixture(points: Coordinates, labels: Labels, steps: int = STEPS, held: bool = False) -> Mixture:
    """Fit a mixture by EM, from a partition (N,) into clusters numbered from 0.

    Args:
        held: the partition stays as it is; centres and spread are fitted to it.
    """
    count = int(labels.max()) + 1
    z = points.likely
    chosen = torch.nn.functional.one_hot(torch.from_numpy(labels), count).double()
    number = chosen.sum(dim=0).clamp_min(1e-9)
    share, centre = number / len(z), (chosen.T @ z) / number[:, None]
    least = LEAST_VARIANCE * torch.diag(z.var(dim=0).clamp_min(1e-12))
    rest = z - chosen @ centre
    covariance = rest.T @ rest / len(z) + least
    logarithm, mean, inside, _ = _weighed(points, share, centre, covariance)
    for _ in range(steps):
        before = float(torch.logsumexp(logarithm, dim=1).sum())
        probability = chosen if held else torch.softmax(logarithm, dim=1)
        number = probability.sum(dim=0).clamp_min(1e-9)
        share, centre = number / len(z), torch.einsum("nc,nck->ck", probability, mean) / number[:, None]
        away = mean - centre
        spread = torch.einsum("nc,nci,ncj->ij", probability, away, away) + inside.sum(dim=0)
        covariance = spread / len(z) + least
        logarithm, mean, inside, _ = _weighed(points, share, centre, covariance)
        if abs(float(torch.logsumexp(logarithm, dim=1).sum()) - before) < SETTLED * len(z):
            break
    likelihood = float(torch.logsumexp(logarithm, dim=1).sum())
    return Mixture(share, centre, covariance, torch.softmax(logarithm, dim=1), likelihood)


def partition(
    points: Coordinates, count: int, method: str, seed: int, starts: int = STARTS, steps: int = STEPS
) -> Labels:
    """(N,) clusters from 0 by one of `METHODS`; the mixture begins with what k-means finds."""
    y = points.in_errors.numpy()
    if count == 1:
        return np.zeros(len(y), dtype=np.int64)
    if method == "hierarchical":
        return AgglomerativeClustering(count).fit_predict(y).astype(np.int64)
    labels = KMeans(count, n_init=starts, random_state=seed).fit_predict(y).astype(np.int64)
    return mixture(points, labels, steps).labels if method == "mixture" else labels


@dataclass(frozen=True)
class Trial:
    """What so many clusters are worth.

    Attributes:
        labels: (N,) from 0, the largest cluster first; mixture: about the same clusters.
        silhouette: mean over the particles, of distances in standard errors; NaN of one cluster.
        chance: (`DRAWS`,) of sets without structure, in so many clusters; empty of one.
        stability: mean adjusted Rand index between all of the particles clustered and a part of them; NaN of one.
    """

    labels: Labels
    mixture: Mixture
    silhouette: float
    chance: NDArray[np.float64]
    stability: float

    @property
    def count(self) -> int:
        """Clusters."""
        return len(self.mixture.share)

    @property
    def real(self) -> bool:
        """Whether particles are more apart than without structure."""
        return self.count == 1 or bool((self.silhouette > self.chance).mean() >= CHANCE)

    @property
    def confidence(self) -> Tensor:
        """(N,) probability of the cluster that each particle is in."""
        return self.mixture.probability[torch.arange(len(self.labels)), torch.from_numpy(self.labels)]


def _largest_first(labels: Labels) -> Labels:
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order, kind="stable")[labels]


def structureless(points: Coordinates, generator: torch.Generator) -> Coordinates:
    """As many particles, each with its own errors, about one centre and as widely spread."""
    one = mixture(points, np.zeros(len(points.b), dtype=np.int64), FEW_STEPS)
    k = points.b.shape[1]
    root = torch.linalg.cholesky(one.covariance)
    z = one.centre + torch.randn(len(points.b), k, generator=generator, dtype=torch.float64) @ root.T
    noise = torch.randn(len(points.b), k, generator=generator, dtype=torch.float64)
    scale = torch.linalg.cholesky(points.a + 1e-9 * torch.diag(torch.diagonal(points.a.mean(dim=0)).clamp_min(1e-12)))
    return Coordinates(torch.einsum("nij,nj->ni", points.a, z) + torch.einsum("nij,nj->ni", scale, noise), points.a)


def _silhouette(points: Coordinates, labels: Labels, seed: int) -> float:
    found = np.unique(labels)
    if not 1 < len(found) < len(labels):
        return math.nan
    y = points.in_errors.numpy()
    some = JUDGED if len(y) > JUDGED else None
    return float(silhouette_score(y, labels, sample_size=some, random_state=seed))


def trial(points: Coordinates, count: int, method: str, seed: int) -> Trial:
    """Cluster, and judge the clusters."""
    labels = _largest_first(partition(points, count, method, seed))
    fitted = mixture(points, labels, held=method != "mixture")  # a partition stands; the mixture says how sure it is
    if count == 1:
        return Trial(labels, fitted, math.nan, np.empty(0), math.nan)
    generator = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(DRAWS):
        drawn = structureless(points.at(torch.randperm(len(labels), generator=generator)[:JUDGED]), generator)
        chance.append(_silhouette(drawn, partition(drawn, count, method, seed, 4, FEW_STEPS), seed))
    agreed = []
    for _ in range(RESAMPLED):
        part = min(JUDGED, max(count, round(KEPT * len(labels))))
        some = torch.randperm(len(labels), generator=generator)[:part]
        again = partition(points.at(some), count, method, seed, 8, FEW_STEPS)
        agreed.append(adjusted_rand_score(labels[some.numpy()], again))
    silhouette = _silhouette(points, labels, seed)
    return Trial(labels, fitted, silhouette, np.array(chance), float(np.mean(agreed)))


def proposed(trials: Sequence[Trial]) -> int:
    """Which of some trials to believe, by place.

    One cluster unless some more are both likelier, by the criterion, and farther apart than without structure; of those the
    ones that are the most apart, by their silhouette. The criterion alone would go on dividing whatever is not a Gaussian.
    """
    one = next((i for i, t in enumerate(trials) if t.count == 1), None)
    real = [i for i, t in enumerate(trials) if t.count > 1 and t.real]
    if one is not None:
        real = [i for i in real if trials[i].mixture.criterion < trials[one].mixture.criterion]
    if real:
        return max(real, key=lambda i: trials[i].silhouette)
    return one if one is not None else min(range(len(trials)), key=lambda i: trials[i].mixture.criterion)
