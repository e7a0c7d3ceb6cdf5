"""Which images are left out, and what the others weigh: outliers that were planted, and next to nothing among clean ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from libemc.methods.joint.evidence import Evidence
from libemc.methods.subtilt import quality

COUNT, TILTS = 200, 11


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def images(spread: float, seed: int, norm: float = 5.0, count: int = COUNT) -> Evidence:
    """Of particles in tilts that fade: contrasts about 1 that scatter by `spread`, and noise of images on top, as it is.

    ⟨y, m⟩ has the variance |m|²/2; of the power, some hundred coefficients' mean.
    """
    fading = torch.linspace(1.0, 0.4, TILTS).double()
    n = (
        norm
        * fading**2
        * (1 + 0.2 * torch.rand(count, TILTS, generator=torch.Generator().manual_seed(seed + 1)).double())
    )
    own = 1 + spread * normal(count, TILTS, seed=seed + 2)
    cross = own * n + (n / 2).sqrt() * normal(count, TILTS, seed=seed)
    power = 1 + 0.05 * normal(count, TILTS, seed=seed + 3)
    seen = torch.rand(count, TILTS, generator=torch.Generator().manual_seed(seed + 4)) > 0.1
    zero = torch.zeros(count, TILTS, 1, dtype=torch.float64)
    hidden = [torch.where(seen, v, 0.0) for v in (cross, n, power)]
    return Evidence(seen, *hidden, zero, zero[..., None])


def excess(e: Evidence) -> Tensor:
    """⟨y, m⟩ / (|m| |y|), less what the contrast of particle and tilt makes of it."""
    return e.cross / (e.norm * e.power).sqrt() - e.contrast * (e.norm / e.power).sqrt()


def test_views_that_show_more_are_not_better() -> None:
    """Half of the images show four times the power of the others, as predicted: their scores are no higher (four standard
    errors of a mean of a thousand), and of neither half more is left out."""
    e = images(0.0, 11)
    more = (torch.arange(COUNT) % 2 == 0)[:, None]
    cross = torch.where(more, 4 * e.cross - (e.cross - e.norm) * 2, e.cross)  # four times the signal, twice the noise
    clear = Evidence(e.seen, cross, torch.where(more, 4 * e.norm, e.norm), e.power, e.slope, e.curvature)
    score = quality.scores(clear)
    high, low = score[(more & e.seen)], score[~more & e.seen]
    assert abs(float(high.mean() - low.mean())) < 4 * math.sqrt(2 / len(low))


def test_scores_are_correlations_over_what_is_usual() -> None:
    """By numpy and scipy's median deviation, tilt by tilt; NaN where there is no image."""
    e = images(0.2, 0)
    found = quality.scores(e)
    for tilt in range(TILTS):
        ok = e.seen[:, tilt].numpy()
        correlation = excess(e)[:, tilt].numpy()[ok]
        spread = scipy.stats.median_abs_deviation(correlation, scale="normal")
        expected = (correlation - np.median(correlation)) / spread
        # an even number's median is its lower middle one here, the mean of both there
        np.testing.assert_allclose(found[:, tilt].numpy()[ok], expected, atol=0.1)
    assert torch.isnan(found[~e.seen]).all()


def test_with_few_particles_all_tilts_say_what_is_usual() -> None:
    """Five particles: one median and one spread for all images, so that scores stay within what so many normal deviates reach."""
    e = images(0.0, 3, count=5)
    found = quality.scores(e)[e.seen]
    correlation = excess(e)[e.seen].numpy()
    slope = np.polyfit(correlation, found.numpy(), 1)
    np.testing.assert_allclose(found, np.polyval(slope, correlation), atol=1e-9)
    assert slope[0] == pytest.approx(1 / scipy.stats.median_abs_deviation(correlation, scale="normal"), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_outliers_are_left_out(seed: int) -> None:
    """Forty images of two thousand, five spreads below the others: all but a few go, and of those that go a fifth at most are
    good (and four standard deviations of a binomial)."""
    score = normal(COUNT, TILTS, seed=seed)
    bad = torch.zeros(COUNT, TILTS, dtype=torch.bool)
    bad.view(-1)[torch.randperm(COUNT * TILTS, generator=torch.Generator().manual_seed(seed))[:40]] = True
    score = torch.where(bad, score - 5, score)
    limit = quality.lowest(score)
    out = score < limit
    assert limit < -quality.OUTLIER and int((out & bad).sum()) >= 36
    expected = quality.FALSE
    assert int((out & ~bad).sum()) / int(out.sum()) < expected + 4 * math.sqrt(expected * (1 - expected) / 40)


def test_the_limit_is_that_of_benjamini_and_hochberg() -> None:
    """By scipy's adjusted p-values: the same images, outliers or none; NaN counts nowhere."""
    for seed, shift in ((0, 4.0), (1, 3.0), (2, 0.0)):
        score = normal(300, seed=seed)
        score[:12] -= shift
        known = score.numpy()
        adjusted = scipy.stats.false_discovery_control(scipy.stats.norm.cdf(known))
        expected = (adjusted <= quality.FALSE) & (known < -quality.OUTLIER)
        with_gaps = torch.cat([score, torch.full((50,), math.nan).double()])
        assert np.array_equal(known < quality.lowest(with_gaps), expected)
        assert expected.any() == (shift > 0)
    assert quality.lowest(torch.full((4,), math.nan).double()) == -math.inf


@pytest.mark.parametrize("seed", range(3))
def test_of_clean_images_next_to_none_is_left_out(seed: int) -> None:
    """Only noise apart: none or a handful of two thousand go, and weights are those of the particles alike: 1."""
    e = images(0.0, 10 + seed)
    weight = quality.weights(e, quality.scores(e))
    assert int((weight == 0).sum()) <= 5
    counted = weight[e.seen & (weight > 0)]
    # the spread of a tilt's contrasts is known to 5 %, of their variance 10 % may be mistaken for more than noise
    assert float((counted - 1).abs().mean()) < 0.05 and float((counted - 1).abs().max()) < 0.5
    assert (weight[~e.seen] == 1).all()


def test_contrasts_that_differ_are_weights() -> None:
    """Contrasts that scatter by 0.4, in images that know them to 0.1: weights follow them, drawn to 1 by what is uncertain."""
    g = torch.Generator().manual_seed(0)
    own = (1 + 0.4 * torch.randn(COUNT, TILTS, generator=g).double()).clamp(0.2, 1.8)
    norm = torch.full((COUNT, TILTS), 50.0).double()
    cross = own * norm + (norm / 2).sqrt() * torch.randn(COUNT, TILTS, generator=g).double()
    zero = torch.zeros(COUNT, TILTS, 1, dtype=torch.float64)
    e = Evidence(norm > 0, cross, norm, torch.ones_like(norm), zero, zero[..., None])
    weight = quality.weights(e, quality.scores(e))
    kept = weight > 0
    relative = own / e.contrast
    assert torch.corrcoef(torch.stack([weight[kept], relative[kept]]))[0, 1] > 0.95
    slope = np.polyfit(relative[kept].numpy(), weight[kept].numpy(), 1)[0]
    # 0.4² / (0.4² + 0.1²) = 0.94, contrasts relative to their particle's, which are known to 0.4/√11
    assert slope == pytest.approx(0.94, abs=0.08)
    assert float(weight.max()) <= quality.WEIGHTS[1] and float(weight[kept].min()) >= quality.WEIGHTS[0]


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.25])
def test_a_share_of_each_tilt_is_kept(keep: float) -> None:
    """The best by score, to an image."""
    e = images(0.3, 5)
    score = quality.scores(e)
    weight = quality.weights(e, score, keep)
    without = quality.weights(e, score)
    for tilt in range(TILTS):
        ok = e.seen[:, tilt]
        kept = ok & (weight[:, tilt] > 0)
        clean = ok & (without[:, tilt] > 0)
        best = score[ok, tilt].sort(descending=True).values
        number = int(kept.sum())
        assert abs(number - min(keep * int(ok.sum()), int(clean.sum()))) <= 1 + (keep == 1.0) * int((ok & ~clean).sum())
        assert score[kept, tilt].min() >= best[min(len(best) - 1, math.ceil(keep * int(ok.sum())))]
    assert torch.equal(weight[weight > 0], without[weight > 0])


def test_loud_images_go() -> None:
    """Gold beside the particle: twice the power, whatever the score; those of others stay."""
    e = images(0.0, 7)
    loud = torch.zeros(COUNT, TILTS, dtype=torch.bool)
    loud[::17, 3] = True
    loud[5, :] = True
    power = torch.where(loud & e.seen, 2 * e.power, e.power)
    gold = Evidence(e.seen, e.cross * torch.where(loud, 1.5, 1.0), e.norm, power, e.slope, e.curvature)
    weight = quality.weights(gold, quality.scores(gold))
    assert (weight[loud & e.seen] == 0).all() and int((weight[~loud] == 0).sum()) <= 5


def test_a_tilt_that_nobody_shows() -> None:
    """Nothing of it is known, and nothing of others is lost."""
    e = images(0.2, 9)
    dark = torch.arange(TILTS) == 4
    seen = e.seen & ~dark
    hidden = [torch.where(dark, 0.0, v) for v in (e.cross, e.norm, e.power)]
    part = Evidence(seen, *hidden, e.slope, e.curvature)
    score = quality.scores(part)
    assert torch.isnan(score[:, 4]).all() and (quality.weights(part, score)[:, 4] == 1).all()
    # particles' contrasts come from one image less
    torch.testing.assert_close(score[:, ~dark], quality.scores(e)[:, ~dark], equal_nan=True, rtol=0, atol=0.5)
    assert torch.isfinite(quality.weights(part, score, 0.5)).all()
