"""ctf: frequencies of equal phase, and the phase of a tilted beam. The function itself is held by test_conventions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.numerics import ctf as model
from libemc.numerics.ctf import Optics

OPTICS = Optics(300.0, 2.7, 0.07)


def test_equal_phase_is_equal_phase() -> None:
    """By the phase aberration of `numerics`, spherical aberration included; none where no frequency has that phase."""
    k = np.linspace(0.01, 0.3, 50)
    there = model.equal_phase(k, 30000.0, 21000.0, OPTICS)
    a, b = (
        model.phase_aberration(torch.from_numpy(x), torch.zeros(50), *(torch.tensor(v) for v in (z, z, 0.0, 0.0)), OPTICS)
        for x, z in ((k, 30000.0), (there, 21000.0))
    )  # fmt: skip
    np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-9)
    assert np.isnan(model.equal_phase(np.array([0.3]), 30000.0, 3000.0, OPTICS)).all()


# --------------------------------------------------------------------------------------------------------- beam tilt

TILTS = ((1.7, -0.6), (-1.7, 0.6), (0.0, 2.0), (-0.9, 0.0))


def relion_wavelength(kilovolts: float) -> float:
    """As RELION writes it, Å."""
    volts = kilovolts * 1e3
    return 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))


def relion_corrected(
    image: np.ndarray, x: float, y: float, pixel_size: float, cs: float, kilovolts: float
) -> np.ndarray:
    """`selfApplyBeamTilt` of RELION 2 and 3.0 (fftw.cpp) coefficient by coefficient: images come out without beam tilt."""
    n, out = image.shape[0], image.astype(complex)
    box = pixel_size * n
    factor = 0.360 * cs * 10000000 * relion_wavelength(kilovolts) ** 2 / box**3
    for i in range(n):
        ip = i if i < n // 2 + 1 else i - n
        for jp in range(n // 2 + 1):
            degrees = factor * (ip * ip + jp * jp) * (ip * y + jp * x)
            out[i, jp] *= np.exp(1j * math.radians(degrees))
    return out


@pytest.mark.parametrize("n", [32, 33])
@pytest.mark.parametrize("tilt", TILTS)
def test_beam_tilt_is_what_relion_takes_away(n: int, tilt: tuple[float, float]) -> None:
    """What a tilted beam adds to the coefficients of an image, RELION's correction removes, at 200 kV and Cs 2 mm."""
    rng, pixel_size = np.random.default_rng(n), 1.5
    image = np.fft.rfft2(rng.normal(size=(n, n)))
    ky, kx = np.meshgrid(np.fft.fftfreq(n, pixel_size), np.fft.rfftfreq(n, pixel_size), indexing="ij")
    if n % 2 == 0:
        ky[n // 2] *= -1  # RELION takes the last row for +n/2, numpy for -n/2
    phase = model.beam_tilt_phase(
        torch.from_numpy(kx), torch.from_numpy(ky), torch.tensor(tilt), Optics(200.0, 2.0, 0.1)
    )
    assert 2 < float(phase.abs().max()) < 20
    tilted = image * np.exp(1j * phase.numpy())
    back = relion_corrected(tilted, *tilt, pixel_size, 2.0, 200.0)
    # its wavelength is 6.4e-6 from ours, which stands squared in a phase of up to 20
    np.testing.assert_allclose(back, image, rtol=0, atol=2.6e-4 * np.abs(image).max())


@pytest.mark.parametrize("tilt", TILTS)
def test_beam_tilt_is_what_relion_predicts(tilt: tuple[float, float]) -> None:
    """RELION 3.1 and later: `insertTilt` puts it among odd Zernike polynomials, whose phase predictions are given."""
    cs, wave = 2.7, relion_wavelength(300.0)
    scale = cs * 20000 * wave * wave * 3.141592654
    z3 = [-scale * t / 3.0 for t in tilt]
    z1 = [2.0 * z for z in z3]
    x, y = np.random.default_rng(3).uniform(-0.25, 0.25, (2, 50))  # 1/Å
    r2 = x**2 + y**2
    want = z1[0] * x + z1[1] * y + (3 * r2 - 2) * (z3[0] * x + z3[1] * y)  # Z(1, 3) = (3 r² - 2) x, Z(-1, 3) with y
    found = model.beam_tilt_phase(torch.from_numpy(x), torch.from_numpy(y), torch.tensor(tilt).double(), OPTICS)
    np.testing.assert_allclose(found.numpy(), want, rtol=2e-5, atol=1e-9)  # its wavelength is 6.4e-6 from ours


def test_beam_tilt_is_odd_batched_and_differentiable() -> None:
    kx, ky = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double() * 0.1
    tilts = torch.tensor(TILTS).double().requires_grad_()
    phase = model.beam_tilt_phase(kx, ky, tilts, OPTICS)
    assert phase.shape == (4, 9)
    assert torch.equal(model.beam_tilt_phase(-kx, -ky, tilts, OPTICS), -phase) and torch.equal(phase[1], -phase[0])
    assert torch.autograd.gradcheck(lambda t: model.beam_tilt_phase(kx, ky, t, OPTICS), tilts)
    k = torch.stack([kx, ky]).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: model.beam_tilt_phase(k[0], k[1], tilts.detach(), OPTICS), k)
