"""molecular_mask: volumes that are known, neighbours that touch, parts that are joined, and noise."""

from __future__ import annotations

import math

import pytest
import torch

from libemc.errors import InputError
from libemc.methods import molecular_mask as mm
from libemc.methods.postprocess import automatic_threshold, keep_largest
from libemc.numerics.filters import lowpass
from libemc.numerics.grids import centred_coordinates


def ball(n: int, centre: tuple[float, float, float], radius: float) -> torch.Tensor:
    """1 within `radius` px of a centre (x, y, z) from the origin, smooth over 2 px."""
    z, y, x = centred_coordinates((n,) * 3)
    r = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
    return torch.sigmoid((radius - r) / 0.5)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n,) * 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def particle(n: int) -> torch.Tensor:
    """Two domains on a thin, weaker linker: no symmetry."""
    z, y, x = centred_coordinates((n,) * 3)
    linker = 0.6 * ((x - 1).abs() < 1.6) * ((y + 2).abs() < 1.6) * (z.abs() < 8)
    return torch.maximum(torch.maximum(ball(n, (1, -2, -8), 6.0), ball(n, (2, -1, 8), 5.0)), linker)


def found(volume: torch.Tensor) -> tuple[torch.Tensor, float]:
    smooth = lowpass(volume, 4.0, 14.0)
    return mm.molecular_region(smooth, mm.noise_level(smooth))


@pytest.mark.parametrize("n", [56, 57])
@pytest.mark.parametrize("deviation", [0.05, 0.5])
def test_two_domains_on_a_linker_are_one_particle(n: int, deviation: float) -> None:
    """Volume of the density above one half; the surface of so small balls, blurred, is within 15 %."""
    true = particle(n) > 0.5
    region, level = found(particle(n) + deviation * noise(n))
    assert float(region.sum() / true.sum()) == pytest.approx(1, abs=0.15)
    overlap = 2 * float((region & true).sum() / (region.sum() + true.sum()))
    assert overlap > 0.88 and 0.2 < level < 0.8


@pytest.mark.parametrize("n", [56, 57])
def test_neighbours_that_touch_are_parted(n: int) -> None:
    """A neighbour's edge is 2 px from each domain: one threshold for the whole box joins them, or takes both."""
    crowd = particle(n) + ball(n, (1, -2, -24), 8.0) + ball(n, (20, -1, 8), 11.0)
    region, _ = found(crowd + 0.3 * noise(n, 2))
    true, wrong = particle(n) > 0.5, ball(n, (1, -2, -24), 7.0) + ball(n, (20, -1, 8), 10.0) > 0.5
    assert float((region & true).sum() / true.sum()) > 0.85
    assert float((region & wrong).sum() / true.sum()) < 0.03
    smooth = lowpass(crowd + 0.3 * noise(n, 2), 4.0, 14.0)
    level = automatic_threshold(smooth)
    largest = keep_largest(smooth, level) > level
    assert float((largest & wrong).sum() / true.sum()) > 0.5


def test_growing_is_a_flood_of_what_is_connected() -> None:
    """Without a rival: the component of the seeds above the floor, found by another route."""
    n = 40
    volume = lowpass(particle(n) + 0.4 * noise(n, 3), 4.0, 20.0)
    floor = 0.35
    region = mm.grown_region(volume, floor)
    above = volume > floor
    flood = torch.zeros_like(above)
    flood[n // 2 - 8, n // 2 - 2, n // 2 + 1] = True
    for _ in range(200):
        grown = flood.clone()
        for dim in range(3):
            for step in (1, -1):
                grown |= flood.roll(step, dim)
        flood = grown & above
    assert bool(flood.any()) and bool((flood & ~region).sum() == 0)
    assert int((region & ~flood).sum()) < 0.02 * int(flood.sum())  # holes that were filled


def test_the_level_of_noise() -> None:
    """White noise of deviation 2 about 3, and neighbours in a tenth of the shell, which change it little."""
    volume = 3 + 2 * noise(48)
    assert mm.noise_level(volume) == pytest.approx(3 + 2 * mm.FLOOR_DEVIATIONS, abs=0.1)
    z, *_ = centred_coordinates((48,) * 3)
    assert mm.noise_level(torch.where(z > 18, 30.0, volume)) == pytest.approx(3 + 2 * mm.FLOOR_DEVIATIONS, rel=0.15)


def test_an_empty_middle_is_refused() -> None:
    with pytest.raises(InputError, match="hardly any density in the middle"):
        mm.grown_region(ball(40, (0, 0, 17), 2.0), 0.3)


def test_a_ball_has_its_volume() -> None:
    region, _ = found(ball(48, (0.3, -0.4, 0.2), 10.0) + 0.2 * noise(48))
    assert (3 * float(region.sum()) / (4 * math.pi)) ** (1 / 3) == pytest.approx(10.0, abs=0.3)
