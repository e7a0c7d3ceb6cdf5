"""What images say of their corrections: sums by another route, slopes and curvatures by finite differences, and the signs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from libemc.methods.joint.evidence import (
    ASTIGMATISM,
    DEFOCUS,
    GEOMETRY,
    LENS,
    PARAMETERS,
    SHIFT,
    TURN,
    Evidence,
    contrasts,
    measure,
)
from libemc.methods.joint.fit import with_astigmatism
from libemc.methods.subtilts import Corrections, Particles, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.joint.joint_data import empty, pictured, predicted, scattered, still, unit_map

STEPS = (0.02, 0.02, 0.02, 0.01, 0.01, 2.0, 2.0, 2.0)
"""Of the parameters, in their units: what a difference over them leaves out is below 1e-5 of it."""


def some(particles: Particles, turn: float, seed: int = 5) -> tuple[Corrections, Tensor]:
    """Corrections of a few Å, `turn` degrees and some hundred Å of defocus, and as much astigmatism."""
    g = torch.Generator().manual_seed(seed)
    own = still(particles)

    def like(t: Tensor) -> Tensor:
        return (0.5 + torch.rand(t.shape, generator=g).double()) * torch.randn(t.shape, generator=g).double().sign()

    corrections = replace(
        own,
        shift=2 * like(own.shift),
        turn=turn * torch.nn.functional.normalize(like(own.turn), dim=-1),
        defocus=200 * like(own.defocus),
    )
    return corrections, 200 * like(own.shift)


def measured(particles: Particles, density: Tensor, radius: float, chosen: Tensor | None = None) -> Evidence:
    band = Band.of(particles.file.box, radius)
    volume = FourierVolume.from_map(density, radius=radius)
    every = torch.ones(len(particles), dtype=torch.bool) if chosen is None else chosen
    parts = torch.zeros(len(particles), dtype=torch.long)
    noise = noise_spectrum(particles, band)
    return measure(particles, every, parts, [(volume, volume)], band, noise, 1 << 26)


def changed(own: Corrections, parameter: int, by: float) -> tuple[Corrections, Tensor]:
    """Corrections with one parameter of all images changed, and the astigmatism beside them."""
    u = torch.zeros(*own.defocus.shape, PARAMETERS, dtype=torch.float64)
    u[..., parameter] = by
    shift, turn, defocus = own.shift + u[..., SHIFT], own.turn + u[..., TURN], own.defocus + u[..., DEFOCUS][..., 0]
    return replace(own, shift=shift, turn=turn, defocus=defocus), u[..., ASTIGMATISM]


@pytest.mark.parametrize(("box", "turn"), [(24, 0.0), (25, 0.0), (25, 1.0)])
def test_against_finite_differences(box: int, turn: float) -> None:
    """Sums, slopes and curvatures of images that are noisy and not where they should be, against predictions in double
    precision. 1e-3: slices in single precision; and turns don't quite add up, which is half of the turn in radians."""
    density, radius = unit_map(box), 9.0
    particles = empty(scattered(3, box, tilts=5))
    truth, more = some(particles, 3.0)
    particles = pictured(particles, density, truth, more, noise=1.0)
    present, _ = some(particles, turn, seed=6)
    particles = particles.corrected(shift=present.shift, turn=present.turn, defocus=present.defocus)
    found = measured(particles, density, radius)

    band = Band.of(box, radius)
    white = noise_spectrum(particles, band).rsqrt()
    data = slices.spectra_of_images(torch.from_numpy(particles.stack).double(), band).unflatten(0, (3, 5)) * white
    seen = particles.visible[..., None]

    def model(own: Corrections, more: Tensor | None = None) -> Tensor:
        return predicted(particles, density, band, own, more) * white * seen

    at = model(present)
    cross, norm = (data.conj() * at).real.sum(-1), (at.abs() ** 2).sum(-1)
    torch.testing.assert_close(found.cross, cross, rtol=0, atol=1e-3 * float(norm.max()))
    torch.testing.assert_close(found.norm, norm, rtol=1e-3, atol=0)
    power = torch.where(particles.visible, (data.abs() ** 2).mean(-1), 0.0)
    torch.testing.assert_close(found.power, power, rtol=1e-5, atol=0)

    a = found.contrast
    slope, jacobian = [], []
    for parameter, h in enumerate(STEPS):
        up, down = (model(*changed(present, parameter, s * h)) for s in (1, -1))
        gain = [2 * a * (data.conj() * m).real.sum(-1) - a**2 * (m.abs() ** 2).sum(-1) for m in (up, down)]
        slope.append((gain[0] - gain[1]) / (2 * h))
        jacobian.append((up - down) / (2 * h))
    inexact = 1e-3 + math.radians(turn) / 2
    for part in (TURN, SHIFT, DEFOCUS, ASTIGMATISM):
        expected = torch.stack(slope, dim=-1)[..., part]
        error = torch.linalg.vector_norm(found.slope[..., part] - expected, dim=-1).max()
        assert error < inexact * torch.linalg.vector_norm(expected, dim=-1).max(), part
    j = torch.stack(jacobian, dim=-2)
    curvature = 2 * a[..., None, None] ** 2 * (j.conj() @ j.transpose(-1, -2)).real
    scale = curvature.diagonal(dim1=-1, dim2=-2).amax((0, 1)).sqrt()
    for part in (GEOMETRY, LENS):
        error = (found.curvature - curvature)[..., part, part] / (scale[part, None] * scale[part])
        assert error.abs().max() < 2 * inexact
    assert not found.curvature[..., GEOMETRY, LENS].any()  # the two are solved one after the other


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("name", ["shift", "turn", "defocus", "astigmatism"])
def test_signs(box: int, name: str) -> None:
    """Images that show their particles elsewhere, turned, or out of focus: the likelihood is highest at corrections of just that,
    and the first steps go there: what three of them leave is below a tenth (the contrast has to settle, too)."""
    density = unit_map(box)
    plain = empty(scattered(6, box, tilts=5))
    some_of, more = some(plain, 2.0)
    part = {"shift": SHIFT, "turn": TURN, "defocus": DEFOCUS, "astigmatism": ASTIGMATISM}[name]
    truth = torch.zeros(6, 5, PARAMETERS, dtype=torch.float64)
    truth[..., SHIFT], truth[..., TURN] = some_of.shift / 2, some_of.turn
    truth[..., DEFOCUS], truth[..., ASTIGMATISM] = some_of.defocus[..., None] / 2, more / 2
    truth = torch.where(torch.isin(torch.arange(PARAMETERS), torch.arange(PARAMETERS)[part]), truth, 0.0)

    def at(particles: Particles, u: Tensor) -> Particles:
        moved = particles.corrected(shift=u[..., SHIFT], turn=u[..., TURN], defocus=u[..., DEFOCUS][..., 0])
        return replace(moved, lens=with_astigmatism(plain.lens, u[..., ASTIGMATISM]))

    planted = at(plain, truth)
    particles = pictured(plain, density, planted.corrections, truth[..., ASTIGMATISM], noise=1e-3)
    one = torch.ones(6, 5, dtype=torch.float64)
    none, half, there, beyond = (
        measured(at(particles, f * truth), density, 9.0).likelihood(one) for f in (0, 0.5, 1, 1.5)
    )
    seen = plain.visible
    assert (there > half)[seen].all() and (half > none)[seen].all() and (there > beyond)[seen].all()
    u = torch.zeros_like(truth)
    for _ in range(3):
        found = measured(at(particles, u), density, 9.0).part(part)
        u[..., part] += torch.where(
            seen[..., None],
            torch.linalg.solve(found.curvature + 1e-12 * torch.eye(part.stop - part.start), found.slope),
            0.0,
        )
    assert (u - truth)[seen].norm() < 0.1 * truth[seen].norm()


def test_what_is_not_shown_says_nothing() -> None:
    """Tilts and particles that aren't used, images that aren't there or have no weight, particles that weren't chosen."""
    density = unit_map(24)
    file = scattered(4, 24, tilts=5)
    file = file.model_copy(update={"tilts": file.tilts.model_copy(update={"use": (True, True, True, False, True)})})
    particles = pictured(empty(file), density, noise=1.0)
    weight = torch.ones(4, 5, dtype=torch.float64)
    weight[1, 4] = 0.0
    particles = particles.corrected(weight=weight)
    chosen = torch.tensor([True, True, False, True])
    found = measured(particles, density, 9.0, chosen)
    expected = particles.visible & (weight > 0) & chosen[:, None]
    expected[:, 3] = False
    assert torch.equal(found.seen, expected) and 8 < int(expected.sum()) < 15
    for value in (found.cross, found.norm, found.power, found.slope, found.curvature):
        flat = value.reshape(4, 5, -1).abs().amax(-1)
        assert not flat[~expected].any() and (flat[expected] > 0).all()


def test_halves_and_parts_have_their_own_references() -> None:
    """One of four references isn't black: only particles of that half and part see anything."""
    density = unit_map(24)
    particles = pictured(empty(scattered(8, 24, tilts=5)), density, noise=1.0)
    parts = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    band = Band.of(24, 9.0)
    full, black = (FourierVolume.from_map(m, radius=9.0) for m in (density, torch.zeros_like(density)))
    references = [(black, black), (black, full)]
    every = torch.ones(8, dtype=torch.bool)
    found = measure(particles, every, parts, references, band, noise_spectrum(particles, band), 1 << 26)
    assert torch.equal((found.norm > 0).any(1), (parts == 1) & (particles.half == 2))


def test_contrasts_are_those_of_particles_and_tilts() -> None:
    """A product of both, exactly, where that's what images have; and within limits, whatever they have."""
    g = torch.Generator().manual_seed(0)
    norm = 1 + torch.rand(7, 5, generator=g).double()
    own, shared = 0.4 + 0.5 * torch.rand(7, 1, generator=g).double(), torch.linspace(0.8, 1.2, 5).double()
    found = contrasts(own * norm, norm)
    torch.testing.assert_close(found, own.expand(7, 5))
    # by tilts, too, once particles see all of them alike
    flat = torch.ones(7, 5, dtype=torch.float64)
    torch.testing.assert_close(contrasts(own * shared * flat, flat), own * shared, rtol=1e-12, atol=0)
    assert contrasts(-norm, norm).unique().tolist() == [0.1] and contrasts(9 * norm, norm).unique().tolist() == [1.5]


def test_the_quadratic_model() -> None:
    """`about` and `gain` of a likelihood that is exactly quadratic, made up: slope(u) = b - H·u."""
    g = torch.Generator().manual_seed(1)
    root, b, here = (torch.randn(3, 4, *s, generator=g).double() for s in ((5, 5), (5,), (5,)))
    h = root @ root.transpose(-1, -2)
    flat = torch.ones(3, 4, dtype=torch.float64)

    def value(u: Tensor) -> Tensor:
        return (b * u).sum(-1) - 0.5 * torch.einsum("nti,ntij,ntj->nt", u, h, u)

    e = Evidence(flat > 0, flat, flat, flat, b - torch.einsum("ntij,ntj->nti", h, here), h)
    torch.testing.assert_close(e.about(here), b)
    change = torch.randn(3, 4, 5, generator=g).double()
    torch.testing.assert_close(e.gain(change), value(here + change) - value(here))
