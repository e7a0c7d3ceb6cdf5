"""What particles show beside their average, against particles that differ by nothing or by something known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.average import half_maps
from libemc.methods.classify import differences as module
from libemc.methods.classify.differences import (
    Differences,
    Member,
    gathered,
    mean_of,
    members,
    read,
    with_noise,
)
from libemc.methods.classify.frame import Frame, band_slices
from libemc.methods.subtilts import Particles
from libemc.numerics import fourier
from tests.methods.classify_data import MEMORY, PIXEL, clean_set, differences_of, drawn, without_spectrum
from tests.methods.subtilt_data import blobs

BOX, RESOLUTION = 20, 4 * PIXEL


@pytest.fixture(scope="module")
def alike() -> list[Particles]:
    """The same particle without noise in two tilt series, at other poses, defoci and with other tilts missing."""
    return [clean_set(blobs(BOX), 40, 1), clean_set(blobs(BOX), 30, 2)]


@pytest.fixture(scope="module")
def same(alike: list[Particles]) -> Differences:
    return differences_of(alike, RESOLUTION)


def whole(d: Differences, band: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(data, weight) for _, data, weight in d.blocks(band)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def left_of(d: Differences) -> torch.Tensor:
    """(N,) part of each particle's power that the average doesn't explain."""
    rest, weight = whole(d)
    return (rest.abs() ** 2).sum(dim=1) / ((rest + weight * d.average).abs() ** 2).sum(dim=1)


def test_particles_that_differ_by_nothing_have_no_differences(same: Differences) -> None:
    """Of particles that have only the structure in common next to nothing is left; a third of the data's power would be of a
    CTF's sign, a pose or a shift that was wrong."""
    assert float(left_of(same).max()) < 4e-3


def test_a_wrong_pose_is_a_difference(alike: list[Particles]) -> None:
    """The test above can fail: particles turned by 20 degrees about z differ as much as they are particles."""
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    some = torch.arange(len(alike[0])) < 5
    rotation = torch.where(some[:, None, None], alike[0].rotation @ turn, alike[0].rotation)
    d = differences_of([replace(alike[0], rotation=rotation), alike[1]], RESOLUTION)
    left = left_of(d)
    assert float(left[:5].min()) > 3 * float(left[5:].mean())


def test_the_average_is_the_particle(alike: list[Particles], monkeypatch: pytest.MonkeyPatch) -> None:
    """Correlation with the map that the images were made of, in the same ball and in the weights of the set: 0.98, not whitened
    by its own signal. The mirror image is another particle."""
    without_spectrum(monkeypatch)
    same = differences_of(alike, RESOLUTION)
    frame, found = same.frame, []
    for density in (blobs(BOX), torch.roll(blobs(BOX).flip(-1), 1, -1)):
        ball = frame.balls(fourier.centre_pad(density, (frame.padded,) * 3)) * same.mean_weight.sqrt()
        mean = same.average * same.mean_weight.sqrt()
        found.append(float((ball.conj() * mean).real.sum() / (ball.abs().norm() * mean.abs().norm())))
    assert found[0] > 0.98 and found[1] < 0.7


@pytest.mark.parametrize(
    ("box", "inner", "most", "ball"), [(36, 20, 3e-5, 0.008), (35, 20, 3e-5, 0.008), (24, 24, 5e-4, 0.04)]
)
def test_identical_particles_differ_by_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, box: int, inner: int, most: float, ball: float
) -> None:
    """A hundred-thousandth of their power, of particles within 55 % of their box; of those that fill it 0.02 %. By W·h instead
    of slices it is 0.6 % and 3 %, and h as slices make it leaves no more of them. Not whitened by their signal."""
    without_spectrum(monkeypatch)
    series = [clean_set(fourier.centre_pad(blobs(inner), (box,) * 3), 40, 1)]
    by_slices, by_ball = (differences_of(series, RESOLUTION, subtracted=s) for s in (True, False))
    assert float(left_of(by_slices).mean()) < most
    rest, weight = whole(by_ball)
    data = rest + weight * by_ball.mean
    for h in (by_ball.mean, by_slices.average):
        assert most < float(((data - weight * h).abs() ** 2).sum() / (data.abs() ** 2).sum()) < ball


def test_the_noise_that_a_frame_has_is_multiplied(alike: list[Particles]) -> None:
    """Measured in a frame that has some already: the same in the end, since weights are read in its units; measured twice it
    stays what it is, but for the shells' slopes."""
    chosen, plain = members(alike), Frame.of(BOX, PIXEL, RESOLUTION)
    one = with_noise(plain, alike, chosen, MEMORY)
    tenfold = with_noise(replace(plain, noise=torch.full_like(plain.noise, 10.0)), alike, chosen, MEMORY)
    torch.testing.assert_close(tenfold.noise, one.noise, rtol=1e-4, atol=0)
    twice = with_noise(one, alike, chosen, MEMORY)
    weight = torch.cat([w for _, w in read(alike, chosen, one, MEMORY)])
    expected = one.noise * one.on_shells(weight.mean(dim=0))
    assert len(chosen) == 70 > module.SAMPLE  # of a sample of them
    torch.testing.assert_close(twice.noise, expected, rtol=0.05, atol=0)


def test_differences_sum_to_nothing(same: Differences) -> None:
    """By the mean's definition, but for the thousandth of the mean weight that is added where there is little."""
    rest, weight = whole(same)
    data = rest + weight * same.mean
    total, scale = rest.sum(dim=0).abs(), data.sum(dim=0).abs()
    little = weight.mean(dim=0).double()
    allowed = scale.double() * 1e-3 * little.mean() / (little + 1e-3 * little.mean())
    torch.testing.assert_close(total.double(), allowed, atol=2e-6 * float(data.abs().sum(dim=0).mean()), rtol=0.02)


def test_mean_of_is_the_quotient_and_dark_where_nothing_is_seen() -> None:
    weight = torch.tensor([4.0, 2.0, 0.0])
    found = mean_of(torch.tensor([8.0 + 4j, 1j, 0.0]), weight)
    torch.testing.assert_close(found, torch.tensor([2.0 + 1j, 0.5j, 0.0]), rtol=2e-3, atol=0)


def test_a_difference_is_found_where_it_is(alike: list[Particles]) -> None:
    """Half of the particles have a blob more: the mean difference map of these less the others' shows it, in its place."""
    box = BOX
    x = (torch.arange(box) - box // 2).float()
    blob = torch.exp(
        -0.5 * (((x + 3)[:, None, None] / 1.8) ** 2 + ((x - 2)[:, None] / 1.8) ** 2 + ((x - 4) / 1.8) ** 2)
    )
    d = differences_of([clean_set(blobs(box), 40, 1), clean_set(blobs(box) + 1.5 * blob, 40, 2)], RESOLUTION)
    rest, weight = whole(d)
    new = torch.arange(80) >= 40
    apart = rest[new].sum(dim=0) / weight[new].sum(dim=0) - rest[~new].sum(dim=0) / weight[~new].sum(dim=0)
    found = d.frame.in_box(apart)
    z, y, x = np.unravel_index(int(found.argmax()), found.shape)
    assert max(abs(z - box // 2 + 3), abs(y - box // 2 - 2), abs(x - box // 2 - 4)) <= 1


def test_float16_gives_the_same_blocks(alike: list[Particles], same: Differences) -> None:
    """Half precision keeps 11 bits: numbers are right to 2^-11 = 5e-4, and less than half of that on average."""
    half = differences_of(alike, RESOLUTION, np.float16)
    assert half.data.dtype == np.float16 and half.weight.dtype == np.float16
    for band in (slice(None), slice(20, 90)):
        (a, v), (b, w) = whole(half, band), whole(same, band)
        assert a.dtype == b.dtype and v.dtype == w.dtype
        data = b + w * same.mean[band]  # differences are small beside what they are differences of
        assert float((a - b).abs().norm()) < 5e-4 * float(data.abs().norm())
        assert float((v - w).norm()) < 5e-4 * float(w.norm())
    torch.testing.assert_close(half.mean, same.mean)  # summed before it is rounded


def test_blocks_have_all_particles_in_order(same: Differences, monkeypatch: pytest.MonkeyPatch) -> None:
    once = whole(same)
    monkeypatch.setattr(module, "BLOCK_BYTES", 12 * same.data.shape[1] * 17)
    assert same.block == 17
    blocks = list(same.blocks(slice(None)))
    assert [(h.start, h.stop) for h, *_ in blocks] == [(0, 17), (17, 34), (34, 51), (51, 68), (68, 70)]
    for k in (0, 1):
        torch.testing.assert_close(torch.cat([b[k + 1] for b in blocks]), once[k], rtol=0, atol=0)
    bands = band_slices(same.frame, [80.0, RESOLUTION])
    parts = [whole(same, band) for band in bands]
    for k in (0, 1):
        torch.testing.assert_close(torch.cat([p[k] for p in parts], dim=1), once[k], rtol=0, atol=0)


def test_batches_are_no_matter_of_memory(alike: list[Particles], same: Differences) -> None:
    little = differences_of(alike, RESOLUTION, memory=1 << 20)
    np.testing.assert_allclose(little.data, same.data, atol=1e-5 * float(np.abs(same.data).max()))
    frame = same.frame
    sizes = [len(d) for d, _ in read(alike, members(alike), frame, 1 << 20)]
    assert len(sizes) > 2 and sum(sizes) == 70


def test_who_takes_part(alike: list[Particles]) -> None:
    first, second = alike
    use = torch.ones(40, dtype=torch.bool)
    use[3] = False
    weight = torch.ones(30, dtype=torch.float64)
    weight[5] = 0
    visible = second.visible.clone()
    visible[7] = False
    found = members([first.using(use), replace(second, weight=weight, visible=visible)])
    assert len(found) == 40 - 1 + 30 - 2
    left_out = {Member(0, 3), Member(1, 5), Member(1, 7)}
    assert left_out.isdisjoint(found) and found == sorted(found, key=lambda m: (m.series, m.place))


def test_some_particles_are_read_as_among_all(alike: list[Particles], same: Differences) -> None:
    some = [Member(0, 4), Member(0, 11), Member(1, 2)]
    average = half_maps(alike, MEMORY).whole
    data = torch.cat([d for d, _ in read(alike, some, same.frame, MEMORY, average)])
    wanted = torch.view_as_complex(torch.from_numpy(same.data[[4, 11, 42]]))
    torch.testing.assert_close(data, wanted, rtol=1e-4, atol=1e-5)


def test_a_frame_of_another_box_is_refused(alike: list[Particles]) -> None:
    other = Frame.of(BOX + 4, PIXEL, RESOLUTION)
    with pytest.raises(ValueError, match="box"):
        next(read(alike, members(alike), other, MEMORY))


def test_an_empty_list_is_an_empty_average() -> None:
    frame = Frame.of(BOX, PIXEL, RESOLUTION)
    q = frame.points.shape[1]
    d = gathered(iter([]), frame, np.empty((0, q, 2), np.float32), np.empty((0, q), np.float32))
    assert len(d) == 0 and list(d.blocks(slice(None))) == []


def test_differences_of_the_model_are_the_data() -> None:
    """With an average of nothing a block is what was put in."""
    frame = Frame.of(12, PIXEL, 4 * PIXEL)
    columns = torch.zeros(1, frame.points.shape[1], dtype=torch.complex64)
    d = drawn(frame, columns, torch.zeros(20, 1), 3)
    rest, weight = whole(d)
    np.testing.assert_array_equal(torch.view_as_real(rest).numpy(), d.data)
    np.testing.assert_array_equal(weight.numpy(), d.weight)
