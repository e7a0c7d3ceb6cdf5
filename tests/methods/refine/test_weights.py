"""Weights and rejection from contrasts drawn from known distributions: rates over seeds, and what must never happen."""

from __future__ import annotations

import math

import pytest
import torch

from libemc.methods.refine.weights import contrast_weights


def drawn(count: int, junk: int, own: float, error: float, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Contrasts of a series, the last `junk` of them with none of their own, their errors, and which are used."""
    g = torch.Generator().manual_seed(seed)
    true = 1 + own * torch.randn(count, generator=g).double()
    true[count - junk :] = 0
    seen = true + error * torch.randn(count, generator=g).double()
    return scale * seen, torch.full((count,), scale * error).double(), torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize(("own", "error", "most_kept"), [(0.05, 0.05, 0.0), (0.1, 0.1, 0.1)])
def test_rates_of_rejection(own: float, error: float, most_kept: float) -> None:
    """A fifth junk, contrasts known to 5 and 10 %, 20 seeds: no more than 0.5 % of the real ones go, and no more than a
    tenth of the junk stays."""
    real, kept = 0, 0
    for seed in range(20):
        columns = drawn(100, 20, own, error, seed)
        (found,) = contrast_weights(*([c] for c in columns))
        gone = found.weight == 0
        assert [bool(r) for r in found.reason] == gone.tolist()
        real += int(gone[:80].sum())
        kept += int((~gone[80:]).sum())
    assert real <= 0.005 * 1600 and kept <= most_kept * 400


@pytest.mark.parametrize("theirs", [0.35, 0.55])
def test_another_species_goes(theirs: float) -> None:
    """A quarter are another protein, which fits the reference a third as well, or 0.55: 95 % of them go, of the others none.

    As contrasts of simulated mixtures are (apoferritin among the built-in particle): a scatter of 4 %, errors of 4 %.
    """
    theirs_kept, ours_gone = 0, 0
    for seed in range(20):
        contrast, error, used = drawn(100, 25, 0.04, 0.04, seed)
        contrast[75:] += theirs
        (found,) = contrast_weights([contrast], [error], [used])
        theirs_kept += int((found.weight[75:] > 0).sum())
        ours_gone += int((found.weight[:75] == 0).sum())
    assert theirs_kept <= 0.05 * 20 * 25 and ours_gone == 0


def test_the_reason_has_the_numbers() -> None:
    contrast, error, used = drawn(60, 3, 0.05, 0.05, 1)
    contrast[-1] = 0.0123 * contrast[:-3].median()
    (found,) = contrast_weights([contrast], [error], [used])
    assert (found.reason[-1] or "").startswith("contrast 0.01 ± 0.05 of what is typical")


def test_nothing_is_rejected_when_all_are_alike() -> None:
    """Equal contrasts; contrasts that scatter by no more than their errors; by 20 % of their own; one particle; two."""
    for own, error in ((0.0, 0.05), (0.0, 0.3), (0.2, 0.1), (0.3, 0.02)):
        gone = 0
        for seed in range(20):
            contrast, errors, used = drawn(50, 0, own, error, seed)
            (found,) = contrast_weights([contrast], [errors], [used])
            gone += int((found.weight == 0).sum())
        assert gone <= 0.015 * 20 * 50, (own, error)  # beyond 3 deviations, themselves known to 20 %
    for contrast in (torch.ones(40), torch.tensor([3.0]), torch.tensor([1.0, 1.1])):
        (found,) = contrast_weights([contrast.double()], [0 * contrast.double()], [contrast > 0])
        assert (found.weight > 0.9).all() and not any(found.reason)


def test_weights_follow_the_contrast() -> None:
    """Contrasts that differ by 20 % and are known to 1 % are the weights; known to 200 % the weights are all about 1."""
    true = 1 + 0.2 * torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    used = torch.ones(400, dtype=torch.bool)
    sharp, vague = (
        contrast_weights([true + e * noise], [torch.full((400,), e).double()], [used])[0].weight for e in (0.01, 2.0)
    )
    kept = sharp > 0
    assert torch.corrcoef(torch.stack([sharp[kept], true[kept]]))[0, 1] > 0.99
    assert (sharp[kept] - true[kept] / true.median()).abs().max() < 0.05
    # the own scatter, 20 %, cannot be told from the noise's: the variance of 400 is known to 7 %, of 4.0 that is 0.28
    assert (vague - 1).abs().mean() < math.sqrt(0.28)


def test_series_have_their_own_scale() -> None:
    """Contrasts of 1 and 5 in two series, and a third with one particle, on the common one: only the junk goes."""
    low, high = drawn(40, 4, 0.05, 0.05, 1), drawn(40, 4, 0.05, 0.05, 2, scale=5.0)
    lone = (torch.tensor([1.02]).double(), torch.tensor([0.05]).double(), torch.tensor([True]))
    found = contrast_weights(*(list(c) for c in zip(low, high, lone, strict=True)))
    for series in found[:2]:
        assert (series.weight[-4:] == 0).all() and (series.weight[:-4] > 0).all()
    assert found[2].weight[0] > 0


@pytest.mark.parametrize("keep", [0.8, 0.5, 1.0])
def test_a_share_is_kept(keep: float) -> None:
    """The best so many, whatever their contrasts are, of all series together; the reason says so."""
    series = [drawn(n, 0, 0.2, 0.1, seed) for seed, n in enumerate((30, 50, 20))]
    found = contrast_weights(*(list(c) for c in zip(*series, strict=True)), keep=keep)
    assert sum(int((f.weight > 0).sum()) for f in found) == round(100 * keep)
    relative = [c / c.median() for c, _, _ in series]
    lowest_kept = min(float(r[f.weight > 0].min()) for r, f in zip(relative, found, strict=True))
    for r, f in zip(relative, found, strict=True):
        assert (r[f.weight == 0] < lowest_kept).all()
        assert all(
            (f"best {100 * keep:g} %" in why) if why else w > 0 for why, w in zip(f.reason, f.weight, strict=True)
        )


def test_what_is_not_seen_or_not_used_has_no_say() -> None:
    """NaN contrasts and unused particles keep weight 1 without a reason, and change nothing for the others."""
    contrast, error, used = drawn(30, 3, 0.05, 0.05, 4)
    (alone,) = contrast_weights([contrast], [error], [used])
    nan, wild = torch.tensor([float("nan")] * 5).double(), torch.full((5,), 1e3).double()
    more = [torch.cat([c, n, w]) for c, n, w in ((contrast, nan, wild), (error, nan, wild))]
    flags = torch.cat([used, torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)])
    (found,) = contrast_weights([more[0]], [more[1]], [flags])
    torch.testing.assert_close(found.weight[:30], alone.weight)
    assert (found.weight[30:] == 1).all() and not any(found.reason[30:])
    (none,) = contrast_weights([nan], [nan], [torch.ones(5, dtype=torch.bool)])
    assert (none.weight == 1).all() and not any(none.reason)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_contrasts_of_noise_alone(shift: float) -> None:
    """About zero, or all below it: weights are finite and most particles stay (there is nothing to tell them apart); a share
    can be kept all the same, and a series of nothing beside a good one goes."""
    contrast, error, used = drawn(60, 60, 0.0, 0.1, 5)
    (found,) = contrast_weights([contrast + shift], [error], [used])
    assert torch.isfinite(found.weight).all() and (found.weight <= 2).all() and (found.weight >= 0).all()
    assert (found.weight > 0).double().mean() >= 0.5
    (best,) = contrast_weights([contrast + shift], [error], [used], keep=0.5)
    assert int((best.weight > 0).sum()) == 30 and (contrast[best.weight == 0].max() < contrast[best.weight > 0].min())
    good = drawn(240, 0, 0.05, 0.05, 6)
    real, nothing = contrast_weights([good[0], -contrast.abs()], [good[1], error], [good[2], used])
    assert (real.weight > 0).all() and (nothing.weight == 0).double().mean() > 0.9
