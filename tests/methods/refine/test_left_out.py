"""References of all but a part: against averages of sets that lack it, and what one loud particle leaves in which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.methods import average
from libemc.methods.refine import left_out
from libemc.methods.refine.left_out import (
    FOLDS,
    Making,
    for_differences,
    left_out_gain,
    made,
    made_of_classes,
    parts_of,
)
from libemc.methods.refine.references import Filtering
from libemc.methods.subtilts import Particles
from tests.methods.joint.joint_data import PIXEL, empty, pictured, scattered, unit_map

MEMORY = 1 << 26


@dataclass(frozen=True)
class Unfiltered:
    """In the place of `Filtering`: maps as they are."""

    mask: Tensor

    def of(self, *_: Any) -> Any:
        return lambda density, _gain: density


def noisy(count: int, box: int, name: str = "TS_01", seed: int = 0) -> Particles:
    file = scattered(count, box, tilts=5, seed=seed).model_copy(update={"name": name})
    return pictured(empty(file), unit_map(box), noise=2.0, seed=seed)


def as_they_are(box: int) -> Making:
    return Making(Unfiltered(torch.ones(box, box, box)), "c1", 0.0, MEMORY)  # type: ignore[arg-type]


def within_nyquist(density: Tensor) -> Tensor:
    """Without the corners of the transform, which references don't have: a line down to nothing beyond Nyquist's shell."""
    return filtered(density, np.ones(density.shape[-1] // 2 + 1))


def filtered(density: Tensor, gain: np.ndarray) -> Tensor:
    """By a gain of shells, written out."""
    n = density.shape[-1]
    k = np.fft.fftfreq(n) * n
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    curve = np.interp(radius, np.arange(n // 2 + 2), np.append(gain, 0.0))
    return torch.from_numpy(np.fft.ifftn(np.fft.fftn(density.numpy()) * curve).real)


def without(particles: Particles, part: Tensor) -> Particles:
    """None of a part counts; which images the noise is measured by stays."""
    return particles.weighted(torch.where(part, 0.0, particles.weight), (None,) * len(particles))


def test_parts_follow_from_the_set_and_are_balanced() -> None:
    series = [noisy(11, 8, "A"), noisy(17, 8, "B", 1)]
    parts = parts_of(series)
    assert {n: len(p) for n, p in parts.items()} == {"A": 11, "B": 17}
    other = [replace(p, stack=p.stack[::-1].copy()).using(p.half == 1) for p in series]
    assert all(torch.equal(a, parts_of(other)[n]) for n, a in parts.items())
    every, half = torch.cat(list(parts.values())), torch.cat([p.half for p in series])
    for h in (1, 2):
        counts = torch.bincount(every[half == h], minlength=FOLDS)
        assert len(counts) == FOLDS and int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(("box", "own_noise"), [(16, False), (17, False), (16, True)])
def test_each_lacks_its_part_and_nothing_else(box: int, own_noise: bool) -> None:
    """Of two tilt series and uneven weights, against averages that were made without the part; 1e-4 of the largest density: sums
    in single precision, the whole less the part."""
    series = [noisy(14, box, "A"), noisy(11, box, "B", 1)]
    weight = torch.linspace(0.5, 1.5, 14).double()
    weight[3] = 0.0
    series[0] = series[0].weighted(weight, (None,) * 14)
    series[1] = series[1].using(torch.arange(11) != 4)
    maps = average.half_maps(series, MEMORY, own_noise=own_noise)
    found = made(series, maps, torch.ones(box // 2 + 1).double(), 20.0, replace(as_they_are(box), own_noise=own_noise))
    assert found.resolution == 20.0 and len(found.maps) == FOLDS
    for part, pair in enumerate(found.maps):
        left = [without(p, found.parts[p.file.name] == part) for p in series]
        expected = average.half_maps(left, MEMORY, own_noise=own_noise)
        for h, (mine, other, whole) in enumerate(
            zip(pair, (expected.half1, expected.half2), (maps.half1, maps.half2), strict=True)
        ):
            apart = (mine - within_nyquist(other)).abs().max() / other.abs().max()
            assert apart < 1e-4, (part, h, apart)
            assert (mine - within_nyquist(whole)).abs().max() > 0.02 * whole.abs().max()  # and the part was something


def test_symmetry_takes_all_copies_out() -> None:
    box = 16
    series = [noisy(14, box)]
    maps = average.half_maps(series, MEMORY, "c3")
    making = replace(as_they_are(box), symmetry="c3")
    found = made(series, maps, torch.ones(box // 2 + 1).double(), 20.0, making)
    expected = average.half_maps([without(series[0], found.parts["TS_01"] == 2)], MEMORY, "c3")
    assert (found.maps[2][0] - within_nyquist(expected.half1)).abs().max() < 1e-4 * expected.half1.abs().max()


def test_no_particle_is_compared_with_itself() -> None:
    """One particle's images hold a spike of a thousand times the rest: half maps and other references hold it, those that it is
    compared with don't, to single precision's 1e-4 of it."""
    box = 16
    particles = noisy(26, box)
    spike, tilts = 5, len(particles.series.use)
    stack = particles.stack.copy()
    stack[spike * tilts : (spike + 1) * tilts, box // 2, box // 2] += 1000 * stack.std()
    loud, plain = ([replace(particles, stack=s)] for s in (stack, particles.stack))
    half, part = int(particles.half[spike]) - 1, int(parts_of(loud)["TS_01"][spike])
    flat = torch.ones(box // 2 + 1).double()
    found, other = (made(s, average.half_maps(s, MEMORY), flat, 20.0, as_they_are(box)) for s in (loud, plain))
    peaks = torch.tensor([[float(m.abs().max()) for m in pair] for pair in found.maps])
    quiet = torch.tensor([[float(m.abs().max()) for m in pair] for pair in other.maps])
    held = peaks > 5 * quiet
    expected = torch.zeros(FOLDS, 2, dtype=torch.bool)
    expected[:, half] = True
    expected[part, half] = False
    assert torch.equal(held, expected), peaks / quiet


def test_filters_and_masks_as_references_are() -> None:
    """With the filter of the whole's FSC, less what a sixth fewer particles see, and the mask; shells that are shared are alike
    in both halves."""
    box = 24
    series = [noisy(26, box)]
    maps = average.half_maps(series, MEMORY)
    x = torch.arange(box) - box // 2
    mask = ((x**2 + x[:, None] ** 2 + x[:, None, None] ** 2).float().sqrt() < 9).float()
    fsc = torch.cat([torch.linspace(1, 0.5, 7), torch.zeros(box // 2 - 6)]).double()
    filtering = Filtering("spherical", mask, PIXEL, 0)
    plain = made(series, maps, fsc, 20.0, as_they_are(box))
    found = made(series, maps, fsc, 20.0, Making(filtering, "c1", 0.0, MEMORY))
    shared = made(series, maps, fsc, 20.0, Making(filtering, "c1", 4.0, MEMORY))
    gain = left_out_gain(average.for_filters(fsc)).numpy()
    for pair, raw, joint in zip(found.maps, plain.maps, shared.maps, strict=True):
        for mine, density in zip(pair, raw, strict=True):
            assert not mine[mask == 0].any()
            expected = filtered(density, gain) * mask
            assert (mine - expected).abs().max() < 1e-4 * expected.abs().max()
        low, apart = ([np.fft.fftn(m.numpy())[:3, :3, :3] for m in p] for p in (joint, pair))
        assert np.abs(low[0] - low[1]).max() < 0.5 * np.abs(apart[0] - apart[1]).max()


def classes_of(box: int) -> tuple[list[list[Particles]], list[average.HalfMaps]]:
    """Two classes of the same particles, a third for certain in the first; and their half maps."""
    series = [noisy(14, box, "A"), noisy(12, box, "B", 1)]
    share = [torch.where(torch.arange(len(p)) % 3 == 0, 1.0, 0.4).double() for p in series]
    kinds = [
        [p.weighted(s if k == 0 else 1 - s, (None,) * len(p)) for p, s in zip(series, share, strict=True)]
        for k in range(2)
    ]
    return kinds, [average.half_maps(kind, MEMORY) for kind in kinds]


def test_classes_that_differ_for_certain_are_themselves() -> None:
    """With an FSC of 1 of what is apart, as with one of what is common, references are the classes' own averages without the
    part, to 4 %: the last shell fades twice. With one of 0 they are the average of all, for every class."""
    box = 16
    kinds, maps = classes_of(box)
    whole = average.together(maps)
    one, nothing = torch.ones(box // 2 + 1).double(), torch.zeros(box // 2 + 1).double()
    apart, alike = (
        made_of_classes(kinds, maps, whole, one, [fsc] * 2, 20.0, as_they_are(box)) for fsc in (one, nothing)
    )
    plain = [k.weighted(torch.ones(len(k)).double(), (None,) * len(k)) for k in kinds[0]]
    everything = made(plain, average.half_maps(plain, MEMORY), one, 20.0, as_they_are(box))
    for kind, m, mine, common in zip(kinds, maps, apart, alike, strict=True):
        own = made(kind, m, one, 20.0, as_they_are(box))
        assert all(torch.equal(mine.parts[n], own.parts[n]) for n in ("A", "B"))
        for found, expected, shared, every in zip(mine.maps, own.maps, common.maps, everything.maps, strict=True):
            for h in (0, 1):
                assert (found[h] - expected[h]).abs().max() < 0.04 * expected[h].abs().max()
                assert (shared[h] - every[h]).abs().max() < 1e-4 * every[h].abs().max()
                assert (shared[h] - expected[h]).abs().max() > 0.05 * expected[h].abs().max()


def test_classes_together_are_the_set() -> None:
    box = 16
    kinds, maps = classes_of(box)
    plain = [k.weighted(torch.ones(len(k)).double(), (None,) * len(k)) for k in kinds[0]]
    expected, found = average.half_maps(plain, MEMORY), average.together(maps)
    for mine, other in ((found.half1, expected.half1), (found.half2, expected.half2)):
        assert (mine - other).abs().max() < 1e-4 * other.abs().max()
    assert found.images == tuple(a + b for a, b in zip(maps[0].images, maps[1].images, strict=True))


def test_an_fsc_of_differences() -> None:
    """Averaged over three shells by how many coefficients they have; what is negative is none."""
    fsc = torch.tensor([1.0, 0.2, 0.4, 0.1, -0.3, -0.1, 0.05])
    found = for_differences(fsc)
    assert found[2] == pytest.approx((1 * 0.2 + 4 * 0.4 + 9 * 0.1) / 14)
    assert found[1] == pytest.approx((0.2 + 4 * 0.4) / 5) and found[0] == pytest.approx(0.2) and found[4] == 0
    assert float(for_differences(torch.ones(5)).max()) < 1


def test_fewer_particles_have_less_signal_to_noise() -> None:
    """By a sixth, from SNR = FSC / (1 - FSC); with none they have none."""
    fsc = torch.tensor([0.9, 0.5, 0.143, 0.0, -0.1]).double()
    found = left_out_gain(fsc)
    snr = fsc[:3] / (1 - fsc[:3])
    torch.testing.assert_close(found[:3] / (1 - found[:3]), snr * 5 / 6)
    assert found[3] == 0 and found[4] == fsc[4]
    assert float(left_out_gain(torch.ones(1).double())) < 1


def test_volumes_are_made_once() -> None:
    box = 16
    maps = [(unit_map(box), 2 * unit_map(box))]
    kept = left_out.References(maps, {}, 20.0)
    first = kept.volumes(6.0)
    assert first is kept.volumes(6.0) and first is not kept.volumes(5.0)
    torch.testing.assert_close(2 * first[0][0].data, first[0][1].data)
