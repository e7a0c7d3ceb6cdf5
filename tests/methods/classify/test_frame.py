"""Half balls and the maps they stand for, against Gaussians in closed form and against the images themselves."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from libemc.methods.classify import differences as module
from libemc.methods.classify.differences import members, read, with_noise
from libemc.methods.classify.frame import LEAST_ENVELOPE, Frame, band_edges, band_slices
from libemc.methods.subtilts import Particles, load_batch, noise_spectrum
from libemc.numerics import fourier, kernels, slices
from libemc.numerics.slices import Accumulator, Band, FourierVolume
from tests.methods.classify_data import (
    MEMORY,
    PIXEL,
    ball_mask,
    blob_map,
    clean_set,
    differences_of,
    flat_set,
    on_cube,
    without_spectrum,
)
from tests.methods.subtilt_data import blobs, particle_set

SMOOTH = [(1.0, (12.0, -6.0, 20.0), 17.0), (-0.6, (-20.0, 14.0, 2.0), 19.0)]
BOXES = [23, 24, 27, 28]  # odd and even; 23 and 27 are padded by a pixel or more


def without_mean(density: torch.Tensor, frame: Frame) -> torch.Tensor:
    """A map whose transform, times the envelope, has no origin, as no ball has it; divided by at least the least: closed."""
    envelope = frame.envelope(density.shape[-1])
    faded = density * envelope
    return (faded - faded.mean()) / envelope.clamp_min(LEAST_ENVELOPE)


@pytest.mark.parametrize("box", BOXES)
def test_maps_of_balls_are_the_maps(box: int) -> None:
    """Gaussians whose transform at the band's end is below 1e-5 of its top; in the corners the envelope is below its least."""
    frame = Frame.of(box, PIXEL, 2.2 * PIXEL)
    assert float(frame.envelope().min()) < LEAST_ENVELOPE / 2
    density = on_cube(SMOOTH, frame)
    again = frame.maps(frame.balls(density))
    assert float((again - without_mean(density, frame)).abs().max()) < 2e-5 * float(density.abs().max())


@pytest.mark.parametrize("box", BOXES)
def test_in_box_reads_the_same_density_at_the_particles_pixels(box: int) -> None:
    frame = Frame.of(box, PIXEL, 2.5 * PIXEL)
    found = frame.in_box(frame.balls(on_cube(SMOOTH, frame)))
    padded = without_mean(blob_map(SMOOTH, frame.padded, PIXEL), frame)
    middle = fourier.centre_crop(padded, (box,) * 3)
    assert found.shape == (box,) * 3
    assert float((found - middle).abs().max()) < 5e-5 * float(middle.abs().max())


def test_noise_is_a_unit_of_balls_only() -> None:
    """The map stays what it is, whatever balls are measured in."""
    plain = Frame.of(24, PIXEL, 3 * PIXEL)
    frame = replace(plain, noise=0.1 + plain.lengths.float() ** 2)
    density = on_cube(SMOOTH, frame)
    balls = frame.balls(density)
    torch.testing.assert_close(balls, plain.balls(density) * frame.noise.sqrt())
    torch.testing.assert_close(frame.maps(balls), plain.maps(plain.balls(density)), atol=1e-6, rtol=1e-5)
    many = frame.maps(torch.stack([balls, 2 * balls]))
    torch.testing.assert_close(many[1], 2 * many[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("box", BOXES)
def test_points_are_one_of_each_pair_and_all_within_the_radius(box: int) -> None:
    resolution = 3.1 * PIXEL
    frame = Frame.of(box, PIXEL, resolution)
    points = frame.points.T.numpy()
    both = {tuple(p) for p in points} | {tuple(-p) for p in points}
    reach = math.ceil(frame.length / resolution)
    line = range(-reach, reach + 1)
    wanted = {
        (x, y, z)
        for x in line
        for y in line
        for z in line
        if 0 < x * x + y * y + z * z < (frame.length / resolution) ** 2
    }
    assert len(both) == 2 * len(points) and both == wanted
    assert bool((frame.lengths.diff() >= 0).all()) and bool((frame.points[0] >= 0).all())


def test_place_is_where_an_accumulator_has_the_points() -> None:
    """A volume that holds its own coordinates; and it is the same volume that particles are inserted into later.

    `read` makes its volume from the frame's radius and not from the resolution: no box may get another size by that.
    """
    for box in (15, 16, 23, 24, 27, 33):
        for resolution in np.linspace(2.05, 8.0, 25) * PIXEL:
            frame = Frame.of(box, PIXEL, float(resolution))
            ball = Accumulator(box, frame.radius, padding=1.0)
            h = ball.half
            z, y, x = np.meshgrid(np.arange(-h, h + 1), np.arange(-h, h + 1), np.arange(0, h + 2), indexing="ij")
            assert ball.folded()[1].shape == z.shape
            there = np.stack([a.reshape(-1)[frame.place.numpy()] for a in (x, y, z)])
            assert (there == frame.points.numpy()).all(), (box, resolution)
            # the small cube holds every point below its Nyquist frequency
            assert int(frame.points.abs().max()) < frame.small // 2


def test_mean_over_shells_is_that_of_a_slow_loop() -> None:
    frame = Frame.of(16, PIXEL, 3 * PIXEL)
    values = torch.rand(frame.points.shape[1], generator=torch.Generator().manual_seed(1))
    shell = np.round(frame.lengths.numpy()).astype(int)
    v = values.double().numpy()
    slow = [v[np.abs(shell - s) <= 1].mean() for s in shell]
    np.testing.assert_allclose(frame.on_shells(values).numpy(), slow, rtol=1e-5)


def test_small_mask_is_the_same_sphere() -> None:
    """A mask as smooth as the small cube holds: a Gaussian, in closed form."""
    frame = Frame.of(27, PIXEL, 3 * PIXEL)
    blob = [(1.0, (8.0, -16.0, 0.0), 22.0)]
    found = frame.small_mask(blob_map(blob, 27, PIXEL))
    wanted = on_cube(blob, frame)
    assert float((found - wanted).abs().max()) < 2e-3  # the Gaussian's own tail at the box's edge
    hard = frame.small_mask((ball_mask(replace(frame, small=27), 60.0) > 0.5).float())
    assert float(hard.min()) >= 0.0 and float(hard.max()) <= 1.0


# ------------------------------------------------------------------------------------ likelihood, against the images


def by_images(particles: Particles, density: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ over a particle's images of 2 Re⟨x, ctf·slice⟩ and |ctf·slice|²: |x|² - |x - ctf·slice|² is their difference."""
    band = Band.of(particles.file.box, radius)
    batch = load_batch(particles, torch.arange(len(particles)), band, noise_spectrum(particles, band))
    volume = FourierVolume.from_map(density)
    cut = slices.extract_slices(volume, batch.matrices(), band, batch.magnification)
    some = (band.kx != 0) | (band.ky != 0)  # the mean is no part of a ball
    linear = 2 * (batch.centred().conj() * cut).real[:, some].sum(dim=1)
    square = (batch.transfer**2 * cut.abs() ** 2)[:, some].sum(dim=1)
    return tuple(torch.zeros(len(particles)).index_add(0, batch.owner, part) for part in (linear, square))  # type: ignore[return-value]


def by_balls(particles: Particles, density: torch.Tensor, frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """2 Re⟨g, D⟩ and ⟨W, |g|²⟩."""
    data, weight = next(read([particles], members([particles]), frame, MEMORY))
    g = frame.balls(fourier.centre_pad(density, (frame.padded,) * 3))
    return 2 * (g.conj() * data).real.sum(dim=1), (weight * g.abs() ** 2).sum(dim=1)


@pytest.fixture(scope="module", params=[24, 27])
def seen(request: pytest.FixtureRequest) -> tuple[Particles, torch.Tensor, Frame]:
    """Asymmetric particles at random poses, with shifts, defoci, a magnification and a missing wedge."""
    density = blobs(request.param)
    particles = particle_set(density, 8, PIXEL, 1.0)
    frame = Frame.of(request.param, PIXEL, 4 * PIXEL)
    return particles, density, with_noise(frame, [particles], members([particles]), MEMORY)


def mirrored(density: torch.Tensor) -> torch.Tensor:
    """By x -> -x about the origin at pixel n // 2."""
    return torch.roll(density.flip(-1), 1 - density.shape[-1] % 2, -1)


def faded(density: torch.Tensor, frame: Frame, power: int) -> torch.Tensor:
    """A map in the particles' box times the envelope to a power."""
    return density * fourier.centre_crop(frame.envelope(frame.padded), density.shape) ** power


def test_products_with_the_data_are_those_of_the_images(seen: tuple[Particles, torch.Tensor, Frame]) -> None:
    """⟨h, D⟩ is ⟨read h, images⟩, insertion and reading being adjoint, and what is read of h has the kernel's envelope on it
    once more: the images' own product with slices of the map times the envelope squared. The two differ by the replicas of a
    volume that isn't padded, some 3 %.

    The mirror image has almost no such product, by either route: a wrong hand, axis order or pose would be seen.
    """
    particles, density, frame = seen
    other = mirrored(density)
    found, mirror = (by_balls(particles, m, frame)[0] for m in (density, other))
    wanted, same = (by_images(particles, faded(m, frame, 2), frame.radius)[0] for m in (density, other))
    assert float((found / wanted - 1).abs().max()) < 0.04
    assert float((mirror - same).abs().max()) < 0.04 * float(wanted.mean())
    assert float(mirror.mean()) < 0.25 * float(found.mean())


def test_weighted_power_of_a_map_is_the_images_times_a_number(seen: tuple[Particles, torch.Tensor, Frame]) -> None:
    """⟨W, |h|²⟩ against the images' own: one factor for all poses and wedges, that the envelope and the unpadded grid make."""
    particles, density, frame = seen
    ratio = by_balls(particles, density, frame)[1] / by_images(particles, density, frame.radius)[1]
    assert float(ratio.std() / ratio.mean()) < 0.05


# ------------------------------------------------------------------------------------------------ the model: D = W·h


@dataclass(frozen=True)
class Noiseless:
    """Identical particles within 55 % of their box, in images without noise: D and W, their mean, and the true map in the
    padded box, with the contrast that it has in the images."""

    flat: bool
    frame: Frame
    data: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    true: torch.Tensor

    def left(self, density: torch.Tensor) -> torch.Tensor:
        """(N,) part of each particle's power that W·h of a map in the padded box leaves."""
        rest = self.data - self.weight * self.frame.balls(density)
        return (rest.abs() ** 2).sum(dim=1) / (self.data.abs() ** 2).sum(dim=1)


@pytest.fixture(scope="module", params=[(35, True), (36, True), (35, False), (36, False)], ids=str)
def noiseless(request: pytest.FixtureRequest) -> Noiseless:
    box, flat = request.param
    density = fourier.centre_pad(blobs(20), (box,) * 3)
    particles = (flat_set if flat else clean_set)(density, 40, 1)
    with pytest.MonkeyPatch.context() as patch:
        without_spectrum(patch)
        patch.setattr(sys.modules[__name__], "noise_spectrum", module.noise_spectrum)
        d = differences_of([particles], 4 * PIXEL, subtracted=False)
        linear, square = by_images(particles, density, d.frame.radius)
    contrast = linear / square / 2
    assert float(contrast.std() / contrast.mean()) < 1e-4  # images are those of the map, times one number
    true = fourier.centre_pad(density, (d.frame.padded,) * 3) * contrast.mean()
    data, weight = torch.view_as_complex(torch.from_numpy(d.data)), torch.from_numpy(d.weight)
    return Noiseless(flat, d.frame, data, weight, d.mean, true)


def test_what_is_inserted_is_the_weight_times_the_map(noiseless: Noiseless) -> None:
    """D against W·h of the true map, contrast included: 1 % of the power is left where the CTF is flat, 2 % where it is steep
    (W·h is h at a point, and D what was read within the kernel's reach, more of it where the CTF is strong). A map with the
    envelope once too often leaves more, the mirror image more than all but the particle's lowest frequencies."""
    n = noiseless
    found = n.left(n.true)
    assert float(found.mean()) < (0.012 if n.flat else 0.025) and float(found.max()) < 0.04
    assert float(n.left(faded(n.true, n.frame, 1)).mean()) > 1.3 * float(found.mean())
    assert float(n.left(torch.roll(n.true.flip(-1), 1, -1)).mean()) > 20 * float(found.mean())


def test_a_particle_has_the_contrast_of_its_images(noiseless: Noiseless) -> None:
    """The contrast at which 2 Re⟨h, D⟩ - ⟨W, |h|²⟩ is largest, against the images': within 10 %, alike for all poses."""
    n = noiseless
    h = n.frame.balls(n.true)
    contrast = (h.conj() * n.data).real.sum(dim=1) / (n.weight * h.abs() ** 2).sum(dim=1)
    assert float(contrast.mean()) == pytest.approx(1, abs=0.1)
    assert float(contrast.std()) < 0.02


def test_the_mean_is_the_true_map_without_a_fade(noiseless: Noiseless) -> None:
    """Within a quarter of the box, which holds the particle: 0.4 % of its power are left, whatever its contrast; without the
    division by the envelope four times as much where the CTF is flat (a steep CTF takes from the low frequencies, what the
    fade takes from the rim)."""
    n, box = noiseless, 36
    true = n.frame.maps(n.frame.balls(n.true), n.frame.padded)
    again = n.frame.maps(n.mean, n.frame.padded)
    plain = n.frame.plain_maps(n.mean / n.frame.noise.sqrt(), n.frame.padded)
    x = (torch.arange(box) - box // 2) / box
    inside = (x**2 + x[:, None] ** 2 + x[:, None, None] ** 2).sqrt() < 0.25
    a = true[inside].double()
    left = [1 - float((a @ b) ** 2 / (a @ a) / (b @ b)) for b in (again[inside].double(), plain[inside].double())]
    assert left[0] < 0.004
    if n.flat:
        assert left[1] > 3 * left[0]
    assert float(a @ again[inside].double() / (a @ a)) == pytest.approx(1, abs=0.12)


def test_noise_of_the_set_is_a_unit_on_every_shell() -> None:
    """The mean weight over three shells is divided out: about 1 over all, and within 1.5 of it on a shell on a slope.

    100 particles, of which 64 are looked at; the innermost shells and the outermost are lighter than their neighbours.
    """
    particles = particle_set(blobs(24), 100, PIXEL, 3.0, tilts=7)
    chosen = members([particles])
    plain = Frame.of(24, PIXEL, 3 * PIXEL)
    frame = with_noise(plain, [particles], chosen, MEMORY)
    weight = torch.cat([w for _, w in read([particles], chosen, frame, MEMORY)])
    before = torch.cat([w for _, w in read([particles], chosen, plain, MEMORY)])
    assert weight.shape == (100, frame.points.shape[1]) and float(weight.min()) >= 0
    assert abs(float(weight.mean()) - 1) < 0.1
    shell = frame.shells()
    three = [before[:, (shell - s).abs() <= 1].mean() for s in shell.unique()]
    for s, mean in zip(shell.unique(), three, strict=True):
        assert float(frame.noise[shell == s].mean() / mean) == pytest.approx(1, abs=0.03)  # of 64 particles of 100
    means = torch.stack([weight[:, shell == s].mean() for s in shell.unique()[2:-1]])
    assert float((means.log()).abs().max()) < math.log(1.5)
    torch.testing.assert_close(weight, before / frame.noise)


def test_noise_reaches_a_product_with_a_map_as_the_images_say() -> None:
    """Images of nothing but white noise: the variance of 2 Re⟨h, D⟩ is twice Σ |ctf·slice|² of what is read of h, that has the
    envelope twice; no ball takes part in that. It is a part ν below 1 of what W says, 2⟨W, |h|²⟩, nearly alike for all maps.

    300 particles, so that a variance is known to 8 % (a standard deviation), of five maps that overlap; the replicas of the
    unpadded grid take 2 to 8 % away.
    """
    box, count = 24, 300
    particles = particle_set(blobs(box), count, PIXEL, 1.0)
    stack = np.random.default_rng(5).standard_normal(particles.stack.shape, dtype=np.float32)
    pure = replace(particles, stack=stack)
    frame = with_noise(Frame.of(box, PIXEL, 4 * PIXEL), [pure], members([pure]), MEMORY)
    ratio, told = [], []
    for seed in range(5):
        density = blobs(box, seed=seed)
        product, power = by_balls(pure, density, frame)
        variance = float((product**2).mean())
        ratio.append(variance / float((2 * by_images(pure, faded(density, frame, 2), frame.radius)[1]).mean()))
        told.append(variance / float((2 * power).mean()))
    assert np.mean(ratio) == pytest.approx(1, abs=0.15)
    assert 0.4 < np.mean(told) < 0.95 and np.std(told) < 0.12 * np.mean(told)


# ------------------------------------------------------------------------------------------------------------- bands


def test_bands_meet_midway_and_cover_all_points_once() -> None:
    scales = [24.0, 96.0, 48.0]
    edges = band_edges(scales)
    assert edges[0][0] == math.inf and edges[-1][1] == 24.0
    assert [e[1] for e in edges[:-1]] == [e[0] for e in edges[1:]]
    assert edges[0][1] == pytest.approx(math.sqrt(96 * 48)) and edges[1][1] / 24.0 == pytest.approx(math.sqrt(2))
    for box in BOXES:
        frame = Frame.of(box, PIXEL, 24.0)
        bands = band_slices(frame, scales)
        number = np.arange(frame.points.shape[1])
        assert np.concatenate([number[b] for b in bands]).tolist() == number.tolist()
        d = frame.length / frame.lengths.numpy()  # Å
        for band, (coarse, fine) in zip(bands, edges, strict=True):
            assert (d[band] > fine - 1e-9).all() and (d[band] <= coarse + 1e-9).all() and len(d[band])


def test_a_single_scale_has_everything_to_its_resolution() -> None:
    frame = Frame.of(24, PIXEL, 3 * PIXEL)
    (band,) = band_slices(frame, [40.0])
    inside = frame.lengths < frame.length / 40.0
    assert band.start == 0 and band.stop == int(inside.sum()) < len(inside)


def test_envelope_is_that_of_the_kernel() -> None:
    """The closed product of one factor per axis, at the same places of the padded box whatever the cube's size."""
    frame = Frame.of(24, PIXEL, 3 * PIXEL)
    for size in (frame.small, frame.padded):
        e = frame.envelope(size)
        at = kernels.kernel_envelope(np.array([0.0, -0.25]))
        middle, quarter = size // 2, size // 2 - size // 4
        assert float(e[middle, middle, middle]) == pytest.approx(1.0, abs=1e-6)
        if size % 4 == 0:
            assert float(e[middle, quarter, middle]) == pytest.approx(float(at[1]), rel=1e-5)
