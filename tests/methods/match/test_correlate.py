"""The search's heart against direct sums: any size of volume and part, borders, threads, and both ways of keeping."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from libemc.methods.match import correlate
from libemc.methods.match.correlate import Correlator, Part, search
from libemc.methods.match.templates import Template
from libemc.numerics.rotations import random_rotations

BOX = 8
TEMPLATE = Template(
    "noise",
    torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0)),
    torch.ones(BOX, BOX, BOX),
    1.0,
    2.5,
)
ROTATIONS = random_rotations(37, torch.Generator().manual_seed(1))
NORMS = 1 + torch.rand(37, generator=torch.Generator().manual_seed(2)).double()


def noise(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def direct(volume: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Σ_u volume(r + u) · template(u), u from -m//2; nothing beyond the volume. Template [z, y, x]."""
    m = len(template)
    wide = np.pad(volume.astype(float), m)
    out = np.zeros(volume.shape)
    for z, y, x in itertools.product(range(m), repeat=3):
        a = [m + k - m // 2 for k in (z, y, x)]
        out += template[z, y, x] * wide[tuple(slice(b, b + n) for b, n in zip(a, volume.shape, strict=True))]
    return out


def turned(i: int) -> np.ndarray:
    """[z, y, x]."""
    return TEMPLATE.rotated(ROTATIONS[i : i + 1])[0].permute(2, 1, 0).numpy()


def whole(shape: tuple[int, int, int]) -> Part:
    return Part((0, 0, 0), shape)


@pytest.mark.parametrize("shape", [(12, 13, 17), (9, 16, 11), (5, 20, 6), (16, 16, 16)])
def test_correlation_is_the_direct_sum(shape: tuple[int, int, int]) -> None:
    """Odd and even sizes, also smaller than the template; single precision."""
    volume = noise(shape)
    correlator = Correlator(volume, whole(shape), BOX)
    found = correlator(TEMPLATE.rotated(ROTATIONS[:1])[0], correlator.room())
    np.testing.assert_allclose(found.permute(2, 1, 0).numpy(), direct(volume, turned(0)), atol=2e-4)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((0, 0, 0), (5, 7, 6)),
        ((7, 8, 9), (12, 15, 17)),
        ((3, 4, 5), (4, 6, 8)),
        ((0, 5, 0), (12, 6, 17)),
        ((11, 14, 16), (12, 15, 17)),
    ],
)
def test_a_part_is_that_part_of_the_whole(low: tuple[int, int, int], high: tuple[int, int, int]) -> None:
    """At corners, in the middle, smaller than the template, a slab, one voxel."""
    volume = noise((12, 15, 17))
    expected = direct(volume, turned(2))[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    correlator = Correlator(volume, Part(low, high), BOX)
    found = correlator(TEMPLATE.rotated(ROTATIONS[2:3])[0], correlator.room())
    np.testing.assert_allclose(found.permute(2, 1, 0).numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("part", [Part((0, 0, 0), (24, 26, 31)), Part((4, 0, 9), (16, 26, 20))])
@pytest.mark.parametrize("cutoff", [0.25, 0.4])
def test_frequencies_that_the_volume_has_not_may_be_left_out(cutoff: float, part: Part) -> None:
    """A band-limited volume: that of the direct sum to 4 % of the deviation, at a part's cut borders too."""
    shape = (24, 26, 31)
    kz, ky, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    spectrum = np.fft.fftn(noise(shape)) * (kx**2 + ky**2 + kz**2 < cutoff**2)
    volume = np.fft.ifftn(spectrum).real.astype(np.float32)
    correlator = Correlator(volume, part, BOX, cutoff=cutoff)
    low_pass = Template("noise", TEMPLATE.density, TEMPLATE.mask, 1.0, 1 / cutoff)
    rotated = low_pass.rotated(ROTATIONS[1:2])[0]
    found = correlator(rotated, correlator.room()).permute(2, 1, 0).numpy()
    at = tuple(slice(a, b) for a, b in zip(part.low, part.high, strict=True))
    expected = direct(volume, rotated.permute(2, 1, 0).numpy())[at]
    assert (found - expected).std() < 0.04 * expected.std()


def test_transforms_are_no_larger_than_needed() -> None:
    """Zeros at both ends of the volume are shared; a part in the middle needs the template's margin."""
    assert whole((42, 42, 42)).padded((42, 42, 42), 8) == (48, 48, 48)  # 42 + 7 - 3 = 46
    assert Part((20, 20, 20), (30, 30, 30)).padded((60, 60, 60), 8) == (18, 18, 18)  # 10 + 7 = 17
    assert Part((0, 20, 0), (10, 30, 10)).padded((60, 60, 60), 8) == (18, 18, 18)  # zeros at one end only


def table(volume: np.ndarray) -> np.ndarray:
    """Scores at all rotations, (N, z, y, x), by direct sums."""
    return np.stack([direct(volume, turned(i)) / float(NORMS[i]) for i in range(len(ROTATIONS))])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def example() -> tuple[np.ndarray, np.ndarray]:
    volume = noise((10, 12, 11))
    return volume, table(volume)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_best_rotation_of_each_voxel(example, threads: int, one_thread: None) -> None:
    volume, scores = example
    torch.set_num_threads(threads)
    found = search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS)
    np.testing.assert_allclose(found.best.numpy(), scores.max(0), atol=2e-4)
    assert found.which is not None and found.which.dtype == torch.int32 and found.squares is None
    second = np.sort(scores, axis=0)[-2]
    clear = scores.max(0) - second > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.which.numpy()[clear], scores.argmax(0)[clear])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_mean_square_of_each_voxel(example, threads: int, one_thread: None) -> None:
    volume, scores = example
    torch.set_num_threads(threads)
    found = search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS, spread=True)
    assert found.which is None and found.squares is not None
    np.testing.assert_allclose(found.best.numpy(), scores.max(0), atol=2e-4)
    np.testing.assert_allclose(found.squares.numpy(), (scores**2).mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [False, True])
def test_parts_make_up_the_whole(example, spread: bool) -> None:
    """No seams: the same best score, rotation and mean square in any cut."""
    volume, _ = example
    uncut = search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS, spread)
    edges = [(0, 4, 10), (0, 5, 12), (0, 6, 7, 11)]
    for z, y, x in itertools.product(*(list(itertools.pairwise(e)) for e in edges)):
        part = Part((z[0], y[0], x[0]), (z[1], y[1], x[1]))
        at = (slice(*z), slice(*y), slice(*x))
        found = search(Correlator(volume, part, BOX), TEMPLATE, ROTATIONS, NORMS, spread)
        torch.testing.assert_close(found.best, uncut.best[at], atol=2e-4, rtol=0)
        for one, other in ((found.which, uncut.which), (found.squares, uncut.squares)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                near = (one.double() - other[at].double()).abs() < 1e-3
                assert float(near.double().mean()) > 0.99


@pytest.mark.parametrize("spread", [False, True])
def test_the_portable_update_is_the_compiled_one(example, spread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device other than the CPU does: here a tensor of the CPU that says that it is on another."""
    volume, _ = example
    compiled = search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS, spread)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")  # type: ignore[assignment]

    call = Correlator.__call__
    asked = []

    def elsewhere(self: Correlator, rotated: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return call(self, rotated, room).as_subclass(Elsewhere)

    with monkeypatch.context() as patch:
        patch.setattr(Correlator, "__call__", elsewhere)
        for name in ("_keep_best", "_keep_spread"):
            patch.setattr(correlate, name, None)  # not to be called
        portable = search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS, spread)
    assert len(asked) == len(ROTATIONS)
    torch.testing.assert_close(portable.best.as_subclass(torch.Tensor), compiled.best, atol=1e-5, rtol=1e-5)
    if spread:
        assert portable.squares is not None and compiled.squares is not None
        torch.testing.assert_close(portable.squares.as_subclass(torch.Tensor), compiled.squares, atol=1e-5, rtol=1e-5)
    else:
        assert portable.which is not None and compiled.which is not None
        assert portable.which.dtype == torch.int32
        torch.testing.assert_close(portable.which.as_subclass(torch.Tensor), compiled.which)


def test_any_array_can_be_searched(example) -> None:
    """Half precision, and axes in another order, as of a file that is mapped."""
    volume, scores = example
    array = np.asfortranarray(volume).astype(np.float16)
    found = search(Correlator(array, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS)
    np.testing.assert_allclose(found.best.numpy(), scores.max(0), atol=0.05)


def test_progress_counts_all_rotations(example) -> None:
    volume, _ = example
    counted = []

    def progress(items, total=None, label=""):
        assert label == "noise"
        for item in items:
            counted.append(total)
            yield item

    search(Correlator(volume, whole(volume.shape), BOX), TEMPLATE, ROTATIONS, NORMS, progress=progress)
    assert len(counted) == counted[0] == -(-len(ROTATIONS) // correlate.BATCH)
