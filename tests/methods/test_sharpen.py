"""sharpen: B factors, structure factors and MTFs that are known."""

from __future__ import annotations

import pytest
import torch

from libemc.errors import InputError
from libemc.methods import sharpen
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import rfft_radius

BOX, PIXEL = 72, 1.5


def noise(seed: int, n: int = BOX) -> torch.Tensor:
    return torch.randn((n,) * 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(b_factor: float, deviation: float, n: int = BOX) -> list[torch.Tensor]:
    gain = torch.exp(b_factor * (rfft_radius((n,) * 3) / PIXEL) ** 2 / 4)
    signal = torch.fft.irfftn(torch.fft.rfftn(noise(1, n)) * gain, s=(n,) * 3)
    return [signal + deviation * noise(seed, n) for seed in (2, 3)]


@pytest.mark.parametrize("n", [BOX, BOX + 1])
@pytest.mark.parametrize(("b_factor", "deviation"), [(-80.0, 0.0), (-80.0, 0.4), (-160.0, 0.1)])
def test_the_b_factor_of_a_fading_map(b_factor: float, deviation: float, n: int) -> None:
    """White amplitudes that fade as exp(B k²/4), in white noise: the noise must not make B smaller."""
    maps = halves(b_factor, deviation, n)
    fsc = fourier_shell_correlation(*maps).values.clamp(0, 1)
    mean = 0.5 * (maps[0] + maps[1])
    fit = sharpen.guinier_fit(sharpen.signal_power(mean, fsc), fsc, PIXEL, n, 5.0)
    assert fit.b_factor == pytest.approx(b_factor, abs=max(4 * fit.error, 5.0))
    assert fit.error < 12
    raw = sharpen.guinier_fit(sharpen.radial_power(mean), torch.ones_like(fsc), PIXEL, n, 5.0)
    assert deviation < 0.3 or raw.b_factor > fit.b_factor + 5


def test_a_low_resolution_is_refused() -> None:
    power = torch.ones(BOX // 2 + 1, dtype=torch.float64)
    with pytest.raises(InputError, match=r"between 10 Å and the resolution of 12\.00 Å there are 0 shells, it takes 5"):
        sharpen.guinier_fit(power, power, PIXEL, BOX, 12.0)


def test_sharpening_undoes_the_fall() -> None:
    sharp = halves(0.0, 0.0)[0]
    frequency = torch.arange(BOX // 2 + 1, dtype=torch.float64) / (BOX * PIXEL)
    gain = sharpen.b_factor_gain(-80.0, frequency)
    got = sharpen.apply_radial(halves(-80.0, 0.0)[0], gain)
    assert sharpen.radial_power(got)[1:-1].log().numpy() == pytest.approx(
        sharpen.radial_power(sharp)[1:-1].log().numpy(), abs=0.03
    )  # a gain that is linear between shells, and 0 in the outer half of the last one


def test_a_structure_factor_is_followed() -> None:
    """The signal's power becomes the wanted one on some scale, its sum stays, and shells without signal are left out."""
    frequency = torch.arange(20, dtype=torch.float64) / 60
    power = torch.exp(-30 * frequency) * 5
    power[15:] = 0
    at = torch.linspace(0.01, 0.3, 200, dtype=torch.float64)
    gain = sharpen.structure_factor_gain(power, frequency, torch.exp(-4 * at), at)
    after = gain**2 * power
    ratio = after[1:15] / torch.exp(-4 * frequency[1:15])
    assert torch.allclose(ratio, ratio[:1].expand(14), rtol=1e-9)
    assert float((frequency**2 * after).sum()) == pytest.approx(float((frequency**2 * power).sum()))
    assert gain[15:].max() == 0
    for wrong in (at.flip(0), at):
        with pytest.raises(InputError):
            sharpen.structure_factor_gain(power, frequency, torch.exp(-4 * at) * (1 if wrong[0] > 0.1 else -1), wrong)


def test_the_structure_factor_of_a_map_is_its_power() -> None:
    volume = noise(5, 17)
    power, frequency = sharpen.structure_factor_of(volume, 2.0)
    assert len(power) == len(frequency) == 8
    assert frequency.numpy() == pytest.approx([s / 34 for s in range(1, 9)])
    full = torch.fft.fftn(volume).abs() ** 2
    k = torch.fft.fftfreq(17, 1 / 17)
    shell = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt().round()
    assert power.numpy() == pytest.approx([float(full[shell == s].mean()) for s in range(1, 9)])


def test_an_mtf_is_divided_out() -> None:
    at = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    mtf = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    got = sharpen.mtf_gain(torch.tensor([0.0, 0.125, 0.5, 0.7], dtype=torch.float64), mtf, at)
    assert got.tolist() == pytest.approx([1.0, 1 / 0.75, 4.0, 4.0])
    with pytest.raises(InputError, match="is no MTF"):
        sharpen.mtf_gain(at, mtf - 0.3, at)


@pytest.mark.parametrize("n", [15, 16])
def test_a_radial_gain_is_linear_between_shells(n: int) -> None:
    gain = torch.rand(n // 2 + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    volume = noise(6, n)
    ratio = torch.fft.rfftn(sharpen.apply_radial(volume, gain)) / torch.fft.rfftn(volume)
    assert ratio[0, 0, 3].real == pytest.approx(float(gain[3]), abs=1e-9)
    assert ratio[1, 0, 1].real == pytest.approx(float(gain[1] + (2**0.5 - 1) * (gain[2] - gain[1])), abs=1e-9)
    assert abs(ratio[n // 2, n // 2, 1]) < 1e-9
