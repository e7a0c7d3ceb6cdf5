"""The threshold: the number of false maxima that was asked for, whatever the strength of the noise here and there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.methods.match.significance import LEAST_STRENGTH, Background, local_strength


def exponential(generator: torch.Generator, count: int, scale: float) -> torch.Tensor:
    return -scale * torch.rand(count, generator=generator).double().clamp_min(1e-12).log()


def maxima(generator: torch.Generator, count: int, of: int) -> torch.Tensor:
    """Each the highest of so many normal numbers, (count,)."""
    return torch.randn(count, of, generator=generator).amax(1).double()


def passing(draw, asked: float, repeats: int = 300) -> np.ndarray:
    """How many of a second sample are above the threshold of the first, over and over."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(repeats):
        threshold = Background.of(draw(generator), 1, 1).threshold(asked)
        counts.append(int((draw(generator) > threshold).sum()))
    return np.array(counts)


@pytest.mark.parametrize("asked", [1.0, 5.0])
def test_an_exponential_tail_gives_the_number_asked_for(asked: float) -> None:
    """A tail fitted to 100 has a scale good to 10 %, at ln(100/asked) scales out: so many false ones to some 10 %."""
    counts = passing(lambda g: exponential(g, 1000, 0.7), asked)
    # the mean of exp(error of the logarithm): its deviation is ln(100/asked)/10
    spread = math.log(100 / asked) / 10
    expected = asked * math.exp(spread**2 / 2)
    assert counts.mean() == pytest.approx(expected, rel=0.15)


def test_maxima_of_noise_have_such_a_tail() -> None:
    """The model is approximate for normal noise, whose tail falls faster: at most twice too few, never too many."""
    counts = passing(lambda g: maxima(g, 1000, 50), 1.0)
    assert 0.3 < counts.mean() < 1.3


@pytest.mark.parametrize("times", [4, 16])
def test_more_rotations_are_more_chances(times: int) -> None:
    """At so many times more rotations than the decoys' the threshold rises by scale · ln(times)."""
    heights = exponential(torch.Generator().manual_seed(1), 2000, 0.5) + 3
    same, more = Background.of(heights, 100, 100), Background.of(heights, 100 * times, 100)
    assert more.threshold(1.0) - same.threshold(1.0) == pytest.approx(more.scale * math.log(times))
    # and that is what the maxima of independent chances do
    generator = torch.Generator().manual_seed(2)
    counts = []
    for _ in range(200):
        few, many = exponential(generator, 500, 0.5), exponential(generator, 500 * times, 0.5)
        counts.append(int((many > Background.of(few, times, 1).threshold(3.0)).sum()))
    assert np.mean(counts) == pytest.approx(3.0 * math.exp((math.log(50 * times / 3) ** 2) / 50 / 2), rel=0.25)


def test_expected_number_is_one_at_the_threshold() -> None:
    background = Background.of(exponential(torch.Generator().manual_seed(3), 1000, 0.4), 3, 1)
    for false in (0.1, 1.0, 20.0):
        assert float(background.expected(torch.tensor(background.threshold(false)))) == pytest.approx(false, rel=1e-6)
    start = torch.tensor(background.start)
    assert float(background.expected(start)) == pytest.approx(3 * 100)
    assert float(background.expected(start + background.scale)) == pytest.approx(300 / math.e)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 25])
def test_a_handful_of_maxima(count: int) -> None:
    """A threshold above all of them, and finite."""
    heights = 5 + exponential(torch.Generator().manual_seed(4), count, 0.3)
    background = Background.of(heights, 4, 1)
    assert math.isfinite(background.threshold(1.0)) and background.scale > 0
    assert count == 0 or background.threshold(1.0) > float(heights.median())


def test_equal_heights_have_a_threshold() -> None:
    """A scale of none would promise that nothing is ever higher."""
    background = Background.of(torch.full((50,), 4.0).double(), 10, 1)
    assert 4 < background.threshold(1.0) < 5


# ------------------------------------------------------------------------------------------------------ the strength


def test_strength_of_what_is_the_same_everywhere() -> None:
    for shape in ((20, 33, 41), (7, 9, 50), (3, 5, 4), (64, 64, 64)):
        strength = local_strength(torch.full(shape, 4.0), 6.0)
        assert strength.shape == shape
        torch.testing.assert_close(strength, torch.full(shape, 2.0))


def test_strength_is_that_of_the_surroundings() -> None:
    """One half three times as strong: each half has its own, but for a window about the border."""
    squares = torch.ones(30, 40, 80)
    squares[:, :, 40:] = 9
    squares = squares * (1 + 0.2 * torch.randn(squares.shape, generator=torch.Generator().manual_seed(0))) ** 2
    strength = local_strength(squares, 6.0)
    scale = math.sqrt(1.04)
    assert float(strength[..., :25].mean()) == pytest.approx(scale, rel=0.05)
    assert float(strength[..., 55:].mean()) == pytest.approx(3 * scale, rel=0.05)
    assert float(strength[..., 55:].std()) < 0.1 * scale * 3
    assert bool((strength[..., 60] > strength[..., 20]).all())


def test_particles_do_not_raise_their_own_threshold() -> None:
    """Nor does one of them: less than half of the window."""
    squares = torch.ones(40, 40, 40)
    for z, y, x in ((10, 10, 10), (30, 12, 20), (20, 30, 30)):
        squares[z - 3 : z + 3, y - 3 : y + 3, x - 3 : x + 3] = 100
    torch.testing.assert_close(local_strength(squares, 6.0), torch.ones(40, 40, 40))


def test_nothing_gains_by_emptiness() -> None:
    """Where there's no noise, beyond the field, the strength is half of what is typical."""
    squares = torch.full((20, 40, 40), 4.0)
    squares[:, :, 30:] = 1e-9
    strength = local_strength(squares, 6.0)
    assert float(strength.min()) == pytest.approx(LEAST_STRENGTH * 2)
    assert float(strength[:, :, :20].mean()) == pytest.approx(2)


def test_a_gradient_is_followed_smoothly() -> None:
    """Between the cells it is interpolated: no steps; where it is seen is where it is."""
    x = torch.arange(120) / 60 + 1
    strength = local_strength((x**2).expand(20, 30, 120).contiguous(), 8.0)
    inner = strength[10, 15, 20:-20]
    torch.testing.assert_close(inner, x[20:-20], rtol=0.02, atol=0)
    assert float(inner.diff().abs().max()) < 3 / 60
