"""The forward model: adjoint, gradients, closed form, round trip, and the compiled kernels against the portable ones."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from libemc.numerics import ctf, kernels
from libemc.numerics.fourier import centre_crop
from libemc.numerics.rotations import random_rotations
from libemc.numerics.slices import (
    Accumulator,
    Backprojection,
    Band,
    FourierVolume,
    extract_slices,
    extract_slices_with_slopes,
    images_from_band,
    project,
    shift_phases,
    spectra_of_images,
)


def random_matrices(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 3) rotations, uniform (QR of a Gaussian matrix with the signs fixed; Stewart 1980)."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None]
    return q * torch.linalg.det(q)[:, None, None]


class Gaussians:
    """A sum of Gaussians with its exact density and exact projections: the closed form."""

    def __init__(self, box: int, count: int = 60, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=g, dtype=torch.float64), dim=1)
        # centres within 0.3 of the box, widths 0.9 to 2.5 pixels: the object fills two thirds of the box
        self.centre = direction * torch.rand(count, 1, generator=g, dtype=torch.float64) ** (1 / 3) * (box / 3 - 2.5)
        self.sigma = 0.9 + 1.6 * torch.rand(count, generator=g, dtype=torch.float64)
        self.mass = 0.5 + torch.rand(count, generator=g, dtype=torch.float64)
        self.box = box

    def _line(self, centre: torch.Tensor) -> torch.Tensor:
        x = torch.arange(self.box, dtype=torch.float64) - self.box // 2
        d = (x - centre[:, None]) / self.sigma[:, None]
        return torch.exp(-0.5 * d**2) / (self.sigma[:, None] * math.sqrt(2 * math.pi))

    def density(self) -> torch.Tensor:
        x, y, z = (self._line(self.centre[:, i]) for i in range(3))
        return torch.einsum("g,gz,gy,gx->zyx", self.mass, z, y, x)

    def projection(self, matrix: torch.Tensor) -> torch.Tensor:
        q = self.centre @ matrix.T
        return torch.einsum("g,gy,gx->yx", self.mass, self._line(q[:, 1]), self._line(q[:, 0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("box", [16, 21])
def test_adjoint_identity(box: int, dtype: torch.dtype, tolerance: float) -> None:
    """<P x, y> = <x, P^T y>, the tolerance of each precision as the issue of rounding demands (sums of about 1e5 terms)."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(box, box, box, generator=g, dtype=dtype, requires_grad=True)
    band = Band.of(box)
    out = extract_slices(FourierVolume.from_map(x), random_matrices(70), band)
    y = torch.complex(*(torch.randn(out.shape, generator=g, dtype=dtype) for _ in range(2)))
    left = (out.conj() * y).real.double().sum()
    (back,) = torch.autograd.grad(out, x, y)
    right = (x.double() * back.double()).sum()
    scale = out.detach().abs().double().norm() * y.abs().double().norm()
    assert abs(left - right) / scale < tolerance


def test_gradients_against_central_differences() -> None:
    """Reference, rotation, shift, magnification and defocus: gradcheck's default tolerances (1e-5 + 1e-3 relative)."""
    box = 8
    g = torch.Generator().manual_seed(5)
    density = torch.randn(box, box, box, generator=g, dtype=torch.float64, requires_grad=True)
    rotation = random_matrices(3, 7).requires_grad_()
    shift = torch.randn(3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    magnification = torch.tensor([1.0, 1.02, 0.97], dtype=torch.float64, requires_grad=True)
    defocus = torch.tensor([[12000.0], [15000.0], [9000.0]], dtype=torch.float64, requires_grad=True)
    band = Band.of(box, 3.2)
    kx, ky = band.frequencies(5.0, torch.float64)
    optics = ctf.Optics()

    def model(x, m, s, mag, u):  # type: ignore[no-untyped-def]
        slices = extract_slices(FourierVolume.from_map(x), m, band, mag)
        zero = torch.zeros((), dtype=torch.float64)
        transfer = ctf.ctf(kx, ky, u * 1e4, u * 1e4 - 300.0, zero + 30.0, zero, optics)
        return torch.view_as_real(slices * transfer * shift_phases(s, band, torch.float64))

    assert torch.autograd.gradcheck(
        model,
        (density, rotation, shift, magnification, (defocus.detach() / 1e4).requires_grad_()),
        fast_mode=False,
        eps=1e-6,
    )


@pytest.mark.parametrize("box", [48, 49])
def test_projections_of_gaussians_against_the_closed_form(box: int) -> None:
    """Better than 1.5 % relative L2 up to 0.8 Nyquist, for an object that fills two thirds of the box."""
    model = Gaussians(box)
    matrices = random_matrices(20, 11)
    band = Band.of(box, 0.8 * box / 2)
    exact = torch.stack([model.projection(m) for m in matrices])
    got = extract_slices(FourierVolume.from_map(model.density()), matrices, band)
    want = spectra_of_images(exact, band)
    error = ((got - want).abs() ** 2 * band.multiplicity).sum() / ((want.abs() ** 2) * band.multiplicity).sum()
    assert math.sqrt(error) < 0.015


@pytest.mark.parametrize("box", [40, 41])
def test_projections_inserted_back(box: int) -> None:
    """500 projections with CTF (defoci 1 to 3 µm) inserted back: FSC > 0.99 in every shell to 0.9 Nyquist."""
    pixel_size, optics = 4.0, ctf.Optics()
    g = torch.Generator().manual_seed(2)
    density = Gaussians(box, 80).density().float()
    matrices = random_matrices(500, 13)
    band = Band.of(box)
    kx, ky = band.frequencies(pixel_size)
    u = 1e4 + 2e4 * torch.rand(500, 1, generator=g)
    zero = torch.zeros(())
    transfer = ctf.ctf(kx, ky, u + 200, u - 200, zero + 40.0, zero, optics)
    shift = (torch.rand(500, 2, generator=g, dtype=torch.float64) - 0.5) * 4
    data = extract_slices(FourierVolume.from_map(density), matrices, band) * transfer * shift_phases(shift, band)
    total = Accumulator(box)
    total.add(data * transfer * shift_phases(-shift, band), transfer**2, matrices, band)
    got = total.map()
    a, b = torch.fft.rfftn(density.double()), torch.fft.rfftn(got.double())
    f = torch.fft.fftfreq(box) * box
    shell = (f[:, None, None] ** 2 + f[None, :, None] ** 2 + torch.arange(box // 2 + 1) ** 2).sqrt().round().long()
    for s in range(1, int(0.9 * box / 2) + 1):
        i = shell == s
        fsc = (a[i] * b[i].conj()).real.sum() / (a[i].abs().norm() * b[i].abs().norm())
        assert fsc > 0.99, (s, float(fsc))
    core = centre_crop(density, (box // 2,) * 3), centre_crop(got, (box // 2,) * 3)
    assert torch.linalg.norm(core[0] - core[1]) / torch.linalg.norm(core[0]) < 0.1  # and the scale is the map's own


def test_compiled_kernels_equal_portable_ones() -> None:
    """Two implementations of the same sums: equal to rounding of float64."""
    half, g = kernels.half_size(10, 1.5), torch.Generator().manual_seed(1)
    shape = kernels.volume_shape(half)
    volume = torch.complex(*(torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2)))
    band = Band.of(20, 9.0)
    points = band.points(torch.float64)
    points[2] = torch.linspace(-3, 3, len(band.kx))  # off the central plane too, as the search in space reads them
    rows = (random_matrices(90, 3) * 1.5).contiguous()
    got = kernels.gather(volume, half, points, rows, slope=True)
    want = kernels.torch_gather(volume, half, points, rows, slope=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(kernels.gather(volume, half, points, rows), want[..., 0], rtol=0, atol=1e-11)
    values = want[..., 0].contiguous()
    weights = torch.rand(values.shape, generator=g, dtype=torch.float64)
    plane = band.points(torch.float64)
    turns = torch.randn(90, 2, generator=g, dtype=torch.float64)
    args = (volume, half, plane, rows, values, torch.rand(values.shape, generator=g, dtype=torch.float64), turns)
    torch.testing.assert_close(kernels.fit_sums(*args), kernels.torch_fit_sums(*args), rtol=1e-10, atol=1e-8)
    a, b = torch.zeros_like(volume), torch.zeros_like(volume)
    kernels.scatter(a, half, points, rows, values)
    kernels.torch_scatter(b, half, points, rows, values)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    a4, b4 = (torch.zeros((*shape, 4), dtype=torch.float64) for _ in range(2))
    kernels.scatter_weighted(a4, half, points, rows, values, weights)
    stacked = torch.stack([values.real, values.imag, weights, torch.zeros_like(weights)], dim=-1)
    kernels.torch_scatter(b4, half, points, rows, stacked)
    torch.testing.assert_close(a4, b4, rtol=0, atol=1e-10)


@pytest.mark.parametrize("box", [20, 21])
def test_compiled_quotient_agrees_with_torch(box: int) -> None:
    """Mean weight of each shell, and values over weights in the rfft layout; both of the same sums in float64."""
    g = torch.Generator().manual_seed(box)
    full = Accumulator(box, dtype=torch.float64)
    full.sums.copy_(torch.randn(full.sums.shape, generator=g, dtype=torch.float64))
    full.sums[..., 2].abs_()
    args = (full.sums, full.half, full.scale)
    means = kernels.shell_means(*args, box // 2)
    torch.testing.assert_close(means, kernels.torch_shell_means(*args, box // 2), rtol=1e-12, atol=0)
    assert (means > 0.5).all()
    for radius in (full.radius, 4.3):
        found = kernels.quotient(*args, radius, 0.1 * means, full.padded)
        want = kernels.torch_quotient(*args, radius, 0.1 * means, full.padded)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        assert found.abs().max() > 1 and found.shape == (full.padded, full.padded, full.padded // 2 + 1)
    empty = kernels.quotient(torch.zeros_like(full.sums), full.half, full.scale, full.radius, 0 * means, full.padded)
    assert not empty.abs().any()


def test_nothing_is_read_or_written_beyond_the_volume() -> None:
    """Points moved out by a magnification read zero and add nothing, compiled and portable; all within count as before."""
    half, g = kernels.half_size(10, 1.5), torch.Generator().manual_seed(1)
    size, guard = int(np.prod(kernels.volume_shape(half))), 4000
    shape = kernels.volume_shape(half)
    around = torch.full((size + 2 * guard,), 1e9 + 0j, dtype=torch.complex128)  # what a read beyond would bring
    volume = around[guard:-guard].view(shape)
    volume.copy_(torch.complex(*(torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))))
    band = Band.of(20)
    points = band.points(torch.float64)
    rows = (random_matrices(90, 3) * torch.linspace(1.0, 2.5, 90)[:, None, None]).contiguous()
    nearest = torch.floor((points.T @ rows) * torch.where((points.T @ rows)[..., :1] < 0, -1, 1) + 0.5)
    within = (nearest.abs() <= half - 1).all(-1)
    assert 0.8 < within.double().mean() < 0.95
    got = kernels.gather(volume, half, points, rows, slope=True)
    assert (got[~within] == 0).all() and (got[within].abs().sum(-1) > 0).all()
    assert got.abs().max() < 100
    torch.testing.assert_close(got, kernels.torch_gather(volume, half, points, rows, slope=True), rtol=0, atol=1e-11)
    torch.testing.assert_close(kernels.gather(volume, half, points, rows), got[..., 0], rtol=0, atol=1e-11)
    values = got[..., 0] + ~within  # where nothing is read there is something to add, and it must not arrive
    weights = torch.ones(values.shape, dtype=torch.float64)
    added = torch.zeros_like(around)
    kernels.scatter(added[guard:-guard].view(shape), half, points, rows, values)
    assert (added[:guard] == 0).all() and (added[-guard:] == 0).all()
    portable = torch.zeros(shape, dtype=torch.complex128)
    kernels.torch_scatter(portable, half, points, rows, values)
    torch.testing.assert_close(added[guard:-guard].view(shape), portable, rtol=0, atol=1e-10)
    weighted = torch.zeros(4 * (size + 2 * guard), dtype=torch.float64)
    kernels.scatter_weighted(weighted[4 * guard : -4 * guard].view(*shape, 4), half, points, rows, values, weights)
    assert (weighted[: 4 * guard] == 0).all() and (weighted[-4 * guard :] == 0).all()
    # the kernel has unit integral, and its taps sum to 1 within a few per cent: the weight of what is within, no more
    total = weighted[4 * guard : -4 * guard].view(*shape, 4)[..., 2].sum()
    assert float(total) == pytest.approx(float(within.sum()), rel=0.05)


def test_magnified_slices_at_full_band() -> None:
    """A magnification of 1.1 on all coefficients: those that the volume holds are as in a smaller band, the rest zero."""
    box, m = 32, random_matrices(5, 2)
    magnification = torch.full((5,), 1.1, dtype=torch.float64)
    g = torch.Generator().manual_seed(8)
    volume = FourierVolume.from_map(torch.randn(box, box, box, generator=g, dtype=torch.float64))
    band, less = Band.of(box), Band.of(box, 13.0)
    whole = extract_slices(volume, m, band, magnification)
    part = less.take(band.put(whole))
    torch.testing.assert_close(part, extract_slices(volume, m, less, magnification), rtol=0, atol=1e-11)
    assert torch.isfinite(torch.view_as_real(whole)).all()
    accumulator = Accumulator(box, dtype=torch.float64)
    accumulator.add(whole, torch.ones_like(whole.real), m, band, magnification)
    assert torch.isfinite(accumulator.map()).all()
    middle = Backprojection(box, (10, 10, 10))
    back = middle(whole.to(torch.complex64), m, band, magnification)
    assert torch.isfinite(back).all()


def test_slopes_are_the_derivatives_of_the_slices() -> None:
    """Against central differences of the slice by its rotation rows, float64: truncation of the differences is 1e-8."""
    box = 16
    volume = FourierVolume.from_map(
        torch.randn(box, box, box, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    m, band, step = random_matrices(2, 9), Band.of(box, 6.0), 1e-5
    _, slope = extract_slices_with_slopes(volume, m, band)
    for axis in range(3):
        moved = torch.zeros_like(m)
        moved[:, 0, axis] = step
        difference = (extract_slices(volume, m + moved, band) - extract_slices(volume, m - moved, band)) / (2 * step)
        torch.testing.assert_close(difference, slope[..., axis] * band.kx, rtol=0, atol=1e-5 * float(slope.abs().max()))


def test_images_and_band_are_inverse() -> None:
    """A band-limited image goes to its list and back unchanged (float64 rounding)."""
    for box in (15, 16):
        band = Band.of(box)
        values = spectra_of_images(torch.randn(4, box, box, dtype=torch.float64), band)
        torch.testing.assert_close(spectra_of_images(images_from_band(values, band), band), values, rtol=0, atol=1e-10)


def test_projection_sums_along_z() -> None:
    """The identity's projection is the sum along z, in the same pixels (interpolation error of the kernel, 1 %)."""
    density = Gaussians(32, 30).density()
    got = project(density, torch.eye(3, dtype=torch.float64)[None])[0]
    want = density.sum(0)
    assert torch.linalg.norm(got - want) / torch.linalg.norm(want) < 0.01


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_add_the_same_sums(threads: int) -> None:
    """Bands of rings in threads of their own, and the gaps after them: the sums of one thread, to rounding, every time."""
    box = 72
    band, matrices = Band.of(box), random_matrices(60, 5)
    g = torch.Generator().manual_seed(4)
    values = torch.complex(*(torch.randn(60, len(band.kx), generator=g) for _ in range(2)))
    weights = torch.rand(60, len(band.kx), generator=g)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Accumulator(box)
        one.add(values, weights, matrices, band)
        torch.set_num_threads(threads)
        for _ in range(4):
            many = Accumulator(box)
            many.add(values, weights, matrices, band)
            torch.testing.assert_close(many.sums, one.sums, rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_ranges_of_different_threads_are_apart() -> None:
    """Whatever the threads: in each phase no two ranges hold points within reach of one voxel, and none is left out."""
    points = Band.of(96).points().numpy()
    radius = 2.0 * (points**2).sum(0) ** 0.5
    for threads in range(1, 9):
        phases = kernels._ring_phases(points, 2.0, threads)
        everything = sorted(i for phase in phases for first, last in phase for i in range(first, last))
        assert everything == list(range(points.shape[1]))
        for phase in phases:
            spans = sorted((radius[a:b].min(), radius[a:b].max()) for a, b in phase if b > a)
            assert all(low[1] + kernels.APART <= high[0] + 1e-9 for low, high in pairwise(spans))


@pytest.mark.parametrize("n", [15, 16])
def test_point_spread_is_the_sum_of_plane_waves(n: int) -> None:
    """Against the direct sum; within the middle third of the box, where the kernel's replicas are below a per cent or two."""
    band = Band.of(n, 0.4 * n)
    matrices = random_rotations(6, torch.Generator().manual_seed(1))
    weights = torch.rand(6, len(band.kx), generator=torch.Generator().manual_seed(2))
    sums = Accumulator(n, 0.4 * n)
    sums.add(torch.zeros(weights.shape, dtype=torch.complex64), weights, matrices.float(), band)
    line = torch.arange(n, dtype=torch.float64) - n // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    r = torch.stack([x, y, z]).flatten(1)
    k = torch.einsum("bij,ik->bjk", matrices, band.points(torch.float64))  # Mᵀk
    waves = torch.cos(2 * torch.pi / n * torch.einsum("bjk,jr->bkr", k, r))
    exact = torch.einsum("bk,bkr->r", weights.double() * band.multiplicity, waves).reshape(n, n, n)
    middle = (slice(n // 3, n - n // 3),) * 3
    found = sums.point_spread().double()
    assert float((found - exact)[middle].norm() / exact[middle].norm()) < 0.02
