"""Tilts that lie periods away are found, and stay where they are if they don't."""

from __future__ import annotations

import pytest
import torch

from libemc.methods.joint.starts import correlations, started
from tests.methods.joint.joint_data import PIXEL, empty, member, pictured, scattered, still, unit_map
from tests.methods.joint.test_evidence import measured

MEMORY = 1 << 26


@pytest.mark.parametrize(("box", "far"), [(64, (-9.0, 8.0)), (63, (12.0, 0.0))])
def test_a_tilt_far_away_is_found(box: int, far: tuple[float, float]) -> None:
    """Twelve pixels in one tilt of five, of all its particles: found to the pixel, with its sign, and nothing else moves. The
    particles' corrections have it before the magnification."""
    density = unit_map(box)
    plain = empty(scattered(6, box, tilts=5))
    truth = still(plain)
    truth.shift[:, 3] = PIXEL * torch.tensor(far, dtype=torch.float64) / plain.series.magnification[3]
    lost = pictured(plain, density, truth, noise=2.0)
    (found,), shift = started([member(lost, density, 16.0)], MEMORY)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[3] = PIXEL * torch.tensor(far)
    assert torch.equal(shift, expected)
    torch.testing.assert_close(found.particles.corrections.shift, truth.shift)
    # on top of what corrections there are
    most = lost.corrected(shift=truth.shift + 3.0)
    (again,), more = started([member(most, density, 16.0)], MEMORY)
    assert not more.any() and torch.equal(again.particles.corrections.shift, truth.shift + 3.0)


@pytest.mark.parametrize("noise", [0.5, 50.0])
def test_what_is_where_it_should_be_stays(noise: float) -> None:
    """Tilts that are seen, displaced by less than the fit itself finds; and tilts in which there is but noise."""
    density = unit_map(32)
    plain = empty(scattered(6, 32, tilts=5))
    truth = still(plain)
    truth.shift[:, 1, 0] = 2.0
    given = member(pictured(plain, density, truth, noise=noise), density, 16.0)
    (found,), shift = started([given], MEMORY)
    assert not shift.any() and found is given


@pytest.mark.parametrize("box", [32, 33])
def test_the_map_is_the_likelihood_of_a_common_shift(box: int) -> None:
    """At a few whole pixels: what all images of a tilt say at such corrections, by `measure`, with the tilt's usual contrast."""
    density = unit_map(box)
    particles = pictured(empty(scattered(4, box, tilts=5)), density, noise=1.0)
    particles = particles.using(torch.arange(4) < 2)
    given = member(particles, density, 16.0)
    radius = max(4.0, box * PIXEL / 48.0)
    table = correlations(given, MEMORY)
    chosen = particles.use
    base = measured(particles, density, radius, chosen)
    typical = torch.where(base.seen, base.contrast, torch.nan).nanmean(0)
    for tilt, x, y in ((3, 2, -1), (4, 0, 3), (2, -4, 0)):
        shift = torch.zeros(4, 5, 2, dtype=torch.float64)
        shift[:, tilt] = PIXEL * torch.tensor([x, y]) / particles.series.magnification[tilt]
        there = measured(particles.corrected(shift=shift), density, radius, chosen)
        gain = 2 * typical[tilt] * (there.cross - base.cross)[:, tilt].sum()
        torch.testing.assert_close(table[tilt, box // 2 + y, box // 2 + x], gain, rtol=1e-3, atol=1e-2)
