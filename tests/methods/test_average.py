"""Averages of sets with known poses, against the map that made them."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import map_coordinates

from libemc.errors import InputError
from libemc.methods import average, subtilts
from libemc.numerics import fourier, slices
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_rotvec
from libemc.numerics.slices import Band
from libemc.numerics.symmetry import operators
from tests.methods.subtilt_data import blobs, particle_set, premultiplied

MEMORY = 1 << 28


@pytest.mark.parametrize("box", [28, 29])
def test_average_is_the_map(box: int) -> None:
    """40 particles × 12 tilts without noise: both halves give the map in every shell to 0.8 Nyquist, in its own hand.

    0.9: what 240 slices a half, damped by 26 e/Å², leave of the outermost shell; mirrored the mean is below 0.5.
    """
    density = blobs(box)
    maps = average.half_maps([particle_set(density, 40, 4.0, noise=0.0)], MEMORY)
    top = int(0.8 * box / 2)
    for half in (maps.half1, maps.half2):
        values = fourier_shell_correlation(half, density).values[1:top]
        assert values.min() > 0.9 and values.mean() > 0.98
    # z -> -z about the origin n//2
    mirrored = torch.roll(maps.half1.flip(0), 1 - box % 2, dims=0)
    assert fourier_shell_correlation(mirrored, density).values[3:top].mean() < 0.5


def test_chunks_do_not_matter() -> None:
    """One particle at a time or all together: the same sums (rounding of float32 sums in another order)."""
    particles = particle_set(blobs(24), 12, 5.0, noise=1.0)
    large, small = average.half_maps([particles], MEMORY), average.half_maps([particles], 1)
    torch.testing.assert_close(large.half1, small.half1, rtol=0, atol=2e-4 * float(large.half1.abs().max()))


def test_premultiplied_images_give_the_same_average() -> None:
    """Images times their CTF, marked as such, carry the same information: equal averages (rounding of float16 images)."""
    particles = particle_set(blobs(24), 16, 5.0, noise=0.0)
    plain = average.half_maps([particles], MEMORY, whiten=False)
    other = average.half_maps([premultiplied(particles)], MEMORY, whiten=False)
    assert fourier_shell_correlation(plain.half1, other.half1).values[1:11].min() > 0.999


def test_wiener_filter_follows_the_fsc() -> None:
    """With noise the filtered average is nearer to the map than the unfiltered one, and the FSC between halves honest."""
    density = blobs(28)
    mask = soft_sphere(28, 11.0, 3.0)
    maps = average.half_maps([particle_set(density, 60, 4.0, noise=6.0)], MEMORY)
    done = average.finish(maps, mask, 4.0, seed=0)
    against = fourier_shell_correlation(done.average * mask, density * mask).values
    half = done.corrected.clamp(0, 1)
    promised = (2 * half / (1 + half)).sqrt()  # correlation of the whole with the truth, Rosenthal & Henderson 2003
    top = average.last_shell(done.corrected)
    assert 4 <= top < 14
    # 0.1: standard error of a shell's FSC with a few hundred coefficients
    assert abs(against[2:top] - promised[2:top]).mean() < 0.1


@pytest.mark.parametrize("box", [24, 25])
def test_subtomograms_are_what_they_are_made_of(box: int) -> None:
    """Every image inserted into a volume of its own and added up in float64, divided, transformed whole and cropped.

    1e-4 of the largest voxel: sums of float32 against float64.
    """
    particles = particle_set(blobs(box), 5, 5.0, noise=2.0)
    found = list(average.subtomograms(particles, [3, 1]))
    scarce = list(average.subtomograms(particles, [3, 1], memory=1))
    band = Band.of(box)
    for volume, again, place in zip(found, scarce, (3, 1), strict=True):
        assert torch.equal(volume, again)
        batch = subtilts.load_batch(particles, torch.tensor([place]), band)
        whole = average.Accumulator(box, dtype=torch.float64)
        for j in range(len(batch.values)):
            one = average.Accumulator(box, dtype=torch.float64)
            values = (batch.values * slices.shift_phases(-batch.shift, band))[j : j + 1]
            one.add(
                values,
                batch.transfer[j : j + 1] ** 2,
                batch.tilt_matrices[j : j + 1],
                band,
                batch.magnification[j : j + 1],
            )
            whole.merge(one)
        values, weights = whole.folded()
        line = torch.arange(-whole.half, whole.half + 1).double()
        radii = (line[:, None, None] ** 2 + line[:, None] ** 2 + torch.arange(whole.half + 2) ** 2).sqrt() / whole.scale
        shells = radii.round().long().clamp_max(box // 2)
        constant = torch.stack([weights[radii.round() == s].mean() for s in range(box // 2 + 1)]) * 0.05
        ratio = torch.where(radii < box / 2, values / (weights + constant[shells]), 0)
        n, reach = whole.padded, (whole.padded - 1) // 2
        spectrum = torch.zeros((n, n, n // 2 + 1), dtype=torch.complex128)
        index = torch.arange(-reach, reach + 1)
        middle = index + whole.half
        spectrum[(index % n)[:, None], index % n, : reach + 1] = ratio[middle[:, None], middle, : reach + 1]
        want = fourier.centre_crop(fourier.irfftn_centred(spectrum, (n,) * 3), (box,) * 3) / slices.envelope(box, n)
        assert (volume - want).abs().max() < 1e-4 * want.abs().max()


def test_half_without_images_is_an_error() -> None:
    particles = particle_set(blobs(16), 4, 6.0, noise=0.0)
    with pytest.raises(InputError, match="half 2"):
        average.half_maps([particles.using(particles.half == 1)], MEMORY)


def test_last_shell_passes_over_gaps() -> None:
    """A CTF zero (two shells below) is passed over, three in a row are the end."""
    fsc = torch.tensor([1.0, 0.9, 0.8, 0.1, 0.1, 0.6, 0.5, 0.1, 0.0, 0.1, 0.0])
    assert average.last_shell(fsc) == 6
    assert average.for_filters(fsc)[7:].abs().max() == 0


def test_symmetry_is_applied() -> None:
    """An average with c2 is invariant under its operator: x, y -> -x, -y (interpolation error of the insertion)."""
    maps = average.half_maps([particle_set(blobs(25), 20, 4.0, noise=0.0)], MEMORY, symmetry="c2")
    turned = maps.half1.flip(1, 2)  # an odd box: the origin is the middle
    assert torch.linalg.norm(turned - maps.half1) / torch.linalg.norm(maps.half1) < 1e-3


def tilt_series_pair(noises: tuple[float, float]) -> list[subtilts.Particles]:
    return [particle_set(blobs(25), 20, 4.0, noise=n, seed=s) for s, n in enumerate(noises)]


def test_premultiplied_series_count_by_their_noise() -> None:
    """A series with five times the noise beside a good one: premultiplied or not, the average is the same, and better than
    where both count alike."""
    density, series = blobs(25), tilt_series_pair((3.0, 15.0))

    def found(sets: list[subtilts.Particles], whiten: bool) -> torch.Tensor:
        maps = average.half_maps(sets, MEMORY, whiten=whiten)
        return fourier_shell_correlation(maps.half1 + maps.half2, density).values[3:10]

    plain, multiplied = found(series, True), found([premultiplied(p) for p in series], True)
    assert plain.mean() > found(series, False).mean() + 0.05
    assert multiplied.mean() == pytest.approx(float(plain.mean()), abs=0.02)


def helical(box: int, twist: float, rise_px: float) -> torch.Tensor:
    """A filament along z: a motif of three blobs, none on a symmetry plane, at every step of the helix."""
    motif = torch.tensor([[5.0, 0.0, 0.0], [3.0, 2.5, 1.0], [6.0, -1.5, -0.8]], dtype=torch.float64)
    x = (torch.arange(box) - box // 2).double()
    out = torch.zeros(box, box, box, dtype=torch.float64)
    for step in range(-box, box + 1):
        turn = matrix_from_rotvec(torch.tensor([0.0, 0.0, twist * step], dtype=torch.float64))
        for centre, width in zip(motif, (1.3, 1.0, 1.1), strict=True):
            cx, cy, cz = (turn @ centre + torch.tensor([0.0, 0.0, rise_px * step]).double()).tolist()
            gx, gy, gz = (torch.exp(-((x - c) ** 2) / (2 * width**2)) for c in (cx, cy, cz))
            out += gz[:, None, None] * gy[:, None] * gx
    ends = torch.sigmoid((0.42 * box - x.abs()) / 0.8)  # the particle is a piece of it
    return (out * ends[:, None, None]).float()


@pytest.mark.parametrize("box", [32, 33])
def test_a_helix_is_averaged_over_its_operators(box: int) -> None:
    """12 noisy images' worth of a filament, its middle against the truth: with the helix better than without, with the twist
    of the other hand worse than without."""
    rise, twist = 3.0, 50.0
    density = helical(box, twist, rise)
    particles = particle_set(density, 12, 4.0, noise=4.0)
    middle = soft_sphere(box, 9.0, 3.0)

    def agreement(symmetry: str) -> float:
        maps = average.half_maps([particles], MEMORY, symmetry)
        both = (maps.half1 + maps.half2) * middle
        return float(fourier_shell_correlation(both, density * middle).values[2:12].mean())

    none, right, wrong = (agreement(s) for s in ("c1", f"helix:{4 * rise},{twist}", f"helix:{4 * rise},{-twist}"))
    assert right > none + 0.1 and wrong < none - 0.1


def test_operators_of_a_helix_move_the_map() -> None:
    """One particle without noise, whole and inserted by hand at each operator: density at S·r + t is the density at r."""
    density, pixel = blobs(25), 4.0
    particles = particle_set(density, 30, pixel, noise=0.0)
    maps = average.half_maps([particles], MEMORY, "helix:8,30")
    rotations, shifts = operators("helix:8,30", 25 * pixel)
    one = average.half_maps([particles], MEMORY)
    want = torch.zeros(25, 25, 25, dtype=torch.float64)
    line = (torch.arange(25) - 12).double()
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij")[::-1], dim=-1)
    for s, t in zip(rotations, shifts / pixel, strict=True):
        points = (grid @ s.T + t).flip(-1) + 12  # z, y, x
        want += torch.from_numpy(
            map_coordinates(one.half1.double().numpy(), points.permute(3, 0, 1, 2).numpy(), order=3)
        )
    core = soft_sphere(25, 6.0, 2.0)
    assert fourier_shell_correlation(maps.half1 * core, want * core).values[1:9].min() > 0.97
