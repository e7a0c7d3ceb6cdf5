"""rings: the model of a spectrum against the CTF written out by hand, and its likelihood against brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from libemc.methods.estimate_ctf import rings
from libemc.methods.estimate_ctf.rings import Background, Evidence, Frame, Rows
from libemc.methods.estimate_ctf.spectra import Spectra
from libemc.numerics.ctf import Optics
from tests.by_hand import ctf, wavelength

OPTICS = Optics(300.0, 2.7, 0.07)
K = np.linspace(0.02, 0.16, 36)


def frame(side=900.0, k=K):
    return Frame.of(k, side, OPTICS)


def some_rows(directions=True, seed=0, k=K):
    """Rows of noise with weights of all sizes: three heights, and four directions each or none."""
    rng = np.random.default_rng(seed)
    count = 12 if directions else 3
    height = np.repeat([-300.0, 20.0, 310.0], count // 3)
    angle = np.tile([0.0, 35.0, 90.0, 140.0], 3) if directions else np.full(count, np.nan)
    weight = rng.uniform(20, 200, (count, len(k)))
    weight[0, :3] = 0
    excess, slope = rng.normal(0, 0.3, (count, len(k))), np.full(count, 60.0)
    blur = frame(k=k).blur(slope, 900.0)
    return Rows(height, angle, slope, 1.2, excess, weight, weight, blur)


def prior(rows, f):
    """Covariance (R·K, R·K) of the background: one for all directions, and one that turns with 2α, ten times smaller per part."""
    turns = np.ones((1, len(rows.angle)))
    if not np.isnan(rows.angle).any():
        double, less = np.radians(2 * rows.angle), rings.ANISOTROPY / rings.REMAINDER
        turns = np.stack([np.ones_like(double), less * np.cos(double), less * np.sin(double)])
    along = f.basis @ f.basis.T
    return np.kron(turns.T @ turns, along)


def log_densities(rows, f, models):
    """Log-density of the excess for each model (R, K), over that of no rings, from the whole covariance."""
    seen = rows.weight.ravel() > 0
    covariance = prior(rows, f)[np.ix_(seen, seen)] + np.diag(1 / rows.weight.ravel()[seen])
    data = rows.excess.ravel()[seen]
    density = multivariate_normal(np.zeros(len(data)), covariance)
    return [density.logpdf(data - m.ravel()[seen]) - density.logpdf(data) for m in models]


def candidates(rows, count=3):
    rng = np.random.default_rng(5)
    return np.linspace(9000, 26000, count)[:, None] + rows.height + rng.normal(0, 300, len(rows.height))


@pytest.mark.parametrize("directions", [False, True])
def test_the_evidence_is_that_of_the_whole_covariance(directions: bool) -> None:
    """The normal distribution of all values at once, background and noise, of a model with any amplitude."""
    f, rows = frame(), some_rows(directions)
    defocus, shift = candidates(rows), 0.4
    rng = np.random.default_rng(2)
    found = rings.evidence(rows, f, defocus, shift)
    assert found.linear.shape == (3, rings.KNOTS) and found.quadratic.shape == (3, rings.KNOTS, rings.KNOTS)
    for _ in range(3):
        amplitude = rng.normal(0.3, 0.3, rings.KNOTS)
        models = [f.rings(z, shift) * rows.blur * (amplitude @ f.knots) for z in defocus]
        want = log_densities(rows, f, models)
        np.testing.assert_allclose(found.at(amplitude), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rings.likelihood(rows, f, defocus, shift, amplitude), want, rtol=1e-6, atol=1e-6)


def test_phase_shifts_of_each_candidate() -> None:
    """(Z, 1) shifts are those of the candidates, one by one."""
    f, rows = frame(), some_rows()
    defocus, shift = candidates(rows), np.array([[0.0], [0.7], [2.1]])
    both = rings.evidence(rows, f, defocus, shift)
    for i in range(3):
        one = rings.evidence(rows, f, defocus[[i]], float(shift[i, 0]), Background(rows, f))
        np.testing.assert_allclose(both.linear[i], one.linear[0])
        np.testing.assert_allclose(both.quadratic[i], one.quadratic[0])


def test_pieces_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that don't fit into memory at once."""
    f, rows = frame(), some_rows()
    defocus, shift = candidates(rows, 7), np.linspace(0, 1, 7)[:, None]
    amplitude = np.linspace(0.5, 0.1, rings.KNOTS)
    whole = rings.evidence(rows, f, defocus, shift), rings.likelihood(rows, f, defocus, 0.2, amplitude)
    large = replace(
        rows, **{n: np.tile(getattr(rows, n), (3000, 1)) for n in ("excess", "weight", "blur", "count")},
        **{n: np.tile(getattr(rows, n), 3000) for n in ("height", "angle", "slope")},
    )  # fmt: skip
    assert large.excess.size * 7 > 4e6 > large.excess.size  # three pieces
    many = replace(large, weight=large.weight / 3000)
    pieces = rings.evidence(many, f, np.tile(defocus, 3000), shift)
    np.testing.assert_allclose(pieces.linear, whole[0].linear, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pieces.quadratic, whole[0].quadratic, rtol=1e-6, atol=1e-6)
    quick = rings.likelihood(many, f, np.tile(defocus, 3000), 0.2, amplitude)
    np.testing.assert_allclose(quick, whole[1], rtol=1e-6, atol=1e-6)


def test_no_rings_are_as_likely_as_none() -> None:
    found = rings.evidence(some_rows(), frame(), candidates(some_rows()))
    assert found.at(np.zeros(rings.KNOTS)).tolist() == [0.0, 0.0, 0.0]


def quadratics(seed=0, size=2, count=4):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(count, size, size)) * 8
    return Evidence(rng.normal(size=(count, size)) * 30, roots @ roots.swapaxes(1, 2) + 3 * np.eye(size))


def test_the_marginal_is_the_integral() -> None:
    """Over a grid of both amplitudes, to eight standard deviations of the prior, times the normal prior."""
    each, series = quadratics(), np.array([0.3, 0.05])
    value, mean = each.marginal(series)
    spread = rings.AMPLITUDE_SPREAD[0] * series + rings.AMPLITUDE_SPREAD[1]
    axes = [np.linspace(s - 8 * w, s + 8 * w, 1201) for s, w in zip(series, spread, strict=True)]
    a = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(-0.5 * (((a - series) / spread) ** 2).sum(1)) / (2 * math.pi * spread.prod())
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    for z in range(len(value)):
        weight = np.exp(a @ each.linear[z] - 0.5 * np.einsum("im,mn,in->i", a, each.quadratic[z], a)) * density * cell
        assert value[z] == pytest.approx(math.log(weight.sum()), abs=1e-6)
        np.testing.assert_allclose(mean[z], weight @ a / weight.sum(), atol=1e-6)


def test_the_best_amplitude_is_nowhere_negative() -> None:
    """As a bounded optimiser finds it; some of the parts are at their bound."""
    each = quadratics(3, size=5, count=6)
    value, amplitude = each.best()
    assert (amplitude >= 0).all() and (amplitude == 0).any() and (amplitude > 0).any()
    for z in range(len(value)):
        right, system = each.linear[z], each.quadratic[z]
        found = minimize(
            lambda a, right=right, system=system: 0.5 * a @ system @ a - right @ a,
            np.full(5, 0.1),
            jac=lambda a, right=right, system=system: system @ a - right,
            bounds=[(0, None)] * 5,
            options={"ftol": 1e-15, "gtol": 1e-10},
        )
        assert value[z] == pytest.approx(-found.fun, rel=1e-6)
        np.testing.assert_allclose(amplitude[z], found.x, atol=1e-5)


def test_sums_of_evidence() -> None:
    first, second = quadratics(1), quadratics(2)
    a = np.array([0.4, -0.2])
    np.testing.assert_allclose((first + second).at(a), first.at(a) + second.at(a))


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(("kv", "cs", "contrast"), [(300.0, 2.7, 0.07), (200.0, 0.01, 0.1), (300.0, 4.0, 0.3)])
def test_the_phase_is_that_of_the_ctf(kv: float, cs: float, contrast: float) -> None:
    """sin of the phase is the CTF, and -cos of its double is 2 CTF² - 1: with spherical aberration and phase shift.

    The two wavelengths differ by 7e-6, which is 6e-4 of the 80 radians that the phase goes to.
    """
    f = Frame.of(K, 1e9, Optics(kv, cs, contrast))  # a window so large that it resolves everything
    defocus = np.array([4000.0, 15000.0, 52000.0])
    for shift in (0.0, 50.0):
        want = np.array([ctf(K, 0 * K, z, z, 0, shift, kv, cs, contrast) for z in defocus])
        np.testing.assert_allclose(np.sin(f.phase(defocus, math.radians(shift))), want, atol=1e-3)
        np.testing.assert_allclose(f.rings(defocus, math.radians(shift)), 2 * want**2 - 1, atol=2e-3)


def test_a_slope_and_a_slab_blur_the_rings() -> None:
    """-cos 2χ averaged over heights all through a slab along the beam, which are normally distributed around its middle."""
    f, defocus, path, slope = Frame.of(K, 1e9, OPTICS), 18000.0, 1400.0, 130.0
    u = (np.arange(400) + 0.5) / 400 - 0.5
    x = np.linspace(-6, 6, 401)
    w = np.exp(-0.5 * x**2)
    heights = (path * u[:, None] + slope * x).ravel()
    weights = np.broadcast_to(w / w.sum() / 400, (400, 401)).ravel()
    want = weights @ -np.cos(2 * f.phase(defocus + heights))
    got = f.rings(np.array([defocus]))[0] * f.blur(np.array([slope]), path)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want[-8:]).max() < 0.8


def contrast_seen(k, defocus, n, pixel):
    """Of the rings under a Hann window n pixels wide: the spectrum's expectation along x, from the whole transform.

    It is the transform of the window's own correlation times that of noise with the CTF's spectrum.
    """
    size = 4 * n
    ky, kx = np.meshgrid(np.fft.fftfreq(size, pixel), np.fft.fftfreq(size, pixel), indexing="ij")
    power = 2 * ctf(kx, ky, defocus, defocus, 0.0, 0.0, 300.0, 2.7, 0.07) ** 2 - 1
    power[np.hypot(kx, ky) > 0.49 / pixel] = 0
    line = np.zeros(size)
    line[:n] = (1 - np.cos(2 * np.pi * np.arange(n) / n)) / 2
    own = np.fft.ifft(np.abs(np.fft.fft(line)) ** 2).real
    own /= own[0]
    seen = np.fft.fft2(np.fft.ifft2(power) * own[:, None] * own).real[0, : size // 2]
    return np.interp(k, np.fft.fftfreq(size, pixel)[: size // 2], seen)


@pytest.mark.parametrize("defocus", [15000.0, 60000.0, 110000.0])
def test_a_window_blurs_narrow_rings(defocus: float) -> None:
    """As the expectation of a periodogram of noise is: from rings that are resolved to such as are nearly gone.

    The model takes rings as waves of one length within the window's reach: to 0.05 beyond the first of them.
    """
    n, pixel = 200, 3.0
    k = np.linspace(0.03, 0.13, 300)
    f = Frame.of(k, n * pixel, OPTICS)
    got, want = f.rings(np.array([defocus]))[0], contrast_seen(k, defocus, n, pixel)
    assert np.abs(got - want).max() < 0.05
    reach = 2 * wavelength(300.0) * defocus * k  # Å
    assert (np.abs(got[reach > n * pixel]) < 1e-3).all()


def test_the_background_is_a_gaussian_process() -> None:
    """Its prior is the stated covariance, and a line of its own; what the shortened basis leaves out is below its threshold."""
    f = frame()
    covariance = f.basis @ f.basis.T
    line = np.stack([np.ones_like(K), (K - K.mean()) / np.ptp(K)], 1)
    want = rings.REMAINDER**2 * np.exp(-0.5 * ((K[:, None] - K) / rings.PERIOD) ** 2) + line @ line.T
    np.testing.assert_allclose(covariance, want, atol=2 * rings.LEAST_VARIANCE * len(K))


def test_the_amplitude_is_linear_between_knots() -> None:
    f = frame()
    np.testing.assert_allclose(f.knots.sum(0), 1)
    assert f.knots.min() >= 0 and ((f.knots > 0).sum(0) <= 2).all()
    at = K[0] + (K[-1] - K[0]) * np.linspace(0, 1, rings.KNOTS) ** rings.BEND
    np.testing.assert_allclose(at @ f.knots, K, atol=1e-12)


def test_what_is_fitted_is_the_posterior_mean() -> None:
    """The background left over: the dense covariance's conditional mean, given what the rings leave."""
    f, rows = frame(), some_rows()
    amplitude = np.linspace(0.4, 0.1, rings.KNOTS)
    defocus = candidates(rows)[0]
    background, model = rings.fitted(rows, f, defocus, 0.3, amplitude)
    np.testing.assert_allclose(model, f.rings(defocus, 0.3) * rows.blur * (amplitude @ f.knots))
    seen = rows.weight.ravel() > 0
    whole = prior(rows, f)
    system = whole[np.ix_(seen, seen)] + np.diag(1 / rows.weight.ravel()[seen])
    want = whole[:, seen] @ np.linalg.solve(system, (rows.excess - model).ravel()[seen])
    np.testing.assert_allclose(background.ravel(), want, atol=1e-6)


def test_rows_of_directions_and_of_all_together() -> None:
    """The groups of one tilt, a row for each sector or for their weighted mean; weights are counts over the model's square."""
    rng, k = np.random.default_rng(1), K
    count = rng.uniform(1, 9, (3, 4, len(k)))
    count[1, 2] = 0
    power = rng.uniform(0.5, 1.5, count.shape)
    angle = np.arange(4) * 45.0
    spectra = Spectra(
        np.array([0, 2, 2]), np.array([5.0, -70.0, 80.0]), np.array([1.0, 2.0, 3.0]), power, count, k, angle, 900.0,
        np.array([1.0, 0.0, 1.5]),
    )  # fmt: skip
    f = frame()
    each = Rows.of(spectra, 2, f, 800.0, True)
    assert each.height.tolist() == [-70.0] * 4 + [80.0] * 4 and each.angle.tolist() == angle.tolist() * 2
    assert each.slope.tolist() == [2.0] * 4 + [3.0] * 4 and each.path == 1.5
    np.testing.assert_allclose(each.excess, power[1:].reshape(8, -1) - 1)
    np.testing.assert_allclose(each.count, count[1:].reshape(8, -1))
    np.testing.assert_allclose(each.blur, f.blur(each.slope, 1200.0))
    together = Rows.of(spectra, 2, f, 800.0, False)
    assert np.isnan(together.angle).all() and together.height.tolist() == [-70.0, 80.0]
    np.testing.assert_allclose(together.count, count[1:].sum(1))
    np.testing.assert_allclose(together.excess, (power * count).sum(1)[1:] / count.sum(1)[1:] - 1)
    model = np.full(each.excess.shape, 2.0)
    np.testing.assert_allclose(each.weighted(model).weight, each.count / 4)
