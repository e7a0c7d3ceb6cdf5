"""Pictures of a CTF estimate: what is measured and fitted is where it should be, for one image and for many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from libemc.methods.estimate_ctf.result import Rings
from libemc.numerics import ctf as ctf_model
from libemc.records import Ctf, Source, Tilts, TiltSeriesRecord
from libemc.view import ctf as view
from libemc.view.alignment import BLUE, GREY, RED
from libemc.view.plots import DPI

OPTICS = ctf_model.Optics()


def a_series(
    count: int = 7,
    seed: int = 0,
    dose: float = 1.0,
    astigmatism: float = 800.0,
    phase: float = 0.0,
    reach: float = 60.0,
    known: bool = True,
) -> tuple[TiltSeriesRecord, Rings]:
    """Rings of a tilt series at about 3 µm, fading with tilt and frequency, with their noise; the last tilt isn't used."""
    rng = np.random.default_rng(seed)
    tilts = np.linspace(-reach, reach, count) if count > 1 else np.zeros(1)
    mean = 30000 + np.cumsum(rng.normal(0, 150, count))
    u, v, angle = mean + astigmatism / 2, mean - astigmatism / 2, np.full(count, -35.0)
    k, sectors = np.linspace(1 / 40, 1 / 6.4, 260), (np.arange(12) + 0.5) * 15
    shape = (count, len(sectors), len(k))
    radians = np.deg2rad(sectors)[:, None]
    kx, ky = (torch.from_numpy(k * f(radians)).expand(shape) for f in (np.cos, np.sin))
    lens = [torch.from_numpy(x)[:, None, None] for x in (u, v, angle, np.full(count, phase))]
    rings = ctf_model.ctf(kx, ky, *lens, OPTICS).numpy() ** 2
    strength = 0.5 * dose * np.cos(np.deg2rad(tilts)) ** 2
    thicker = 60 + 90 / np.cos(np.deg2rad(tilts))
    envelope = strength[:, None, None] * np.exp(-thicker[:, None, None] * k**2)
    fitted = 1 + envelope * (rings - 0.5)
    error = np.broadcast_to(0.16 * (0.06 / k) ** 0.5, shape)
    noisy = fitted + error * rng.standard_normal(shape)
    noisy[:, 3, :5] = np.nan
    seen = strength > 0.2 * dose
    use = (*(True,) * (count - 1), count == 1)
    z = np.arange(3000.0, 100000.0, 50.0)
    width = 60 / strength[:, None]
    score = -0.5 * np.minimum(((z - mean[:, None]) / width) ** 2, (3000 / width) ** 2 * (0.6 + 0.1 * np.sin(z / 700)))
    score += rng.normal(0, 1, score.shape)
    score -= score.max(1, keepdims=True)
    more = {
        "score": tuple(np.clip(2 * strength, 0, 0.98)), "resolution": tuple(np.where(seen, 9 / strength**0.3, 30.0)),
        "error": tuple(np.where(seen, width[:, 0], 300.0)), "astigmatism_error": 70.0, "thickness": 950.0,
        "phase_error": (4.0,) * count, "measured": tuple(seen.tolist()), "handedness_score": 0.93,
    }  # fmt: skip
    ctf = Ctf(
        defocus_u=tuple(u), defocus_v=tuple(v), angle=tuple(angle), phase_shift=(phase,) * count,
        **(more if known else {}),
    )  # fmt: skip
    source = Source(
        stack="s.mrc", shape=(count, 600, 800), pixel_size=3.0, voltage=300.0, cs=2.7, amplitude_contrast=0.07
    )
    record = TiltSeriesRecord(name="TS_01", source=source, tilts=Tilts(nominal=tuple(tilts), use=use), ctf=ctf)
    f4 = np.float32
    return record, Rings(k, sectors, noisy.astype(f4), fitted.astype(f4), error.astype(f4), z, score)


def draw(record: TiltSeriesRecord, r: Rings, folder: Path) -> None:
    view.ring_plots(record, folder / "rings.png", r.k, r.angle, r.measured, r.fitted, r.error)
    view.spectra_picture(record, folder / "spectra.png", r.k, r.angle, r.measured, r.fitted)
    view.ctf_plots(record, folder / "ctf.png", r.defocus, r.score)


def drawn(path: Path) -> np.ndarray:
    """The picture's colours, 0 to 255; the file is taken away."""
    picture = imread(path)
    path.unlink()
    return np.rint(255 * picture[..., :3]).astype(int)


def pixels(picture: np.ndarray, colour: str) -> int:
    """How many are of a colour, or nearly."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - wanted) < 6).all(axis=-1).sum())


def test_rings_of_a_strongly_astigmatic_image_stay_sharp() -> None:
    """Their average over directions is the closed form at the mean defocus; at equal frequency they would cancel."""
    record, r = a_series(1, astigmatism=6000.0)
    parts = np.stack([r.measured[0], r.fitted[0], r.error[0]]).astype(float)
    parts[:, 4, 100:110] = np.nan
    x, rings, fit, error = view._round(r.k, r.angle, parts, 1 / 8, view._Lens(record), 0)
    mean = (record.ctf.defocus_u[0] + record.ctf.defocus_v[0]) / 2
    wave = torch.from_numpy(np.sqrt(x)), torch.zeros(len(x)), *torch.tensor([mean, mean, 0.0, 0.0]).double()
    size = 0.5 * np.exp(-150 * x)
    want = 1 + size * (ctf_model.ctf(*wave, OPTICS).numpy() ** 2 - 0.5)
    # the envelope isn't brought along (10 % of defocus are 10 % of k²), and a tenth of a ring is averaged
    assert (np.abs(fit - want) / size).max() < 0.12
    naive = np.interp(np.sqrt(x), r.k, r.fitted[0].mean(axis=0))
    assert (np.abs(naive - want) / size).max() > 0.4
    # chi squared over about 90 steps is good to 15 %; what is interpolated is a little smoother than the error says
    assert 0.5 < np.mean(((rings - fit) / error) ** 2) < 1.3


def test_spectra_are_measured_on_the_left_and_fitted_on_the_right() -> None:
    """Polar to Cartesian against the closed form, for two images that share nothing but their sectors."""
    record, r = a_series(1, astigmatism=4000.0)
    lens, n = view._Lens(record), 400
    line = ((np.arange(n) + 0.5) / n * 2 - 1) / 10
    smooth = r.fitted[0].astype(float)
    image = view._cartesian(np.stack([2 - smooth, smooth]), r.k, r.angle, line, lens, 0)
    ky, kx = (torch.from_numpy(x.copy()) for x in np.meshgrid(line, line, indexing="ij"))
    c = record.ctf
    values = (torch.tensor(v[0], dtype=torch.float64) for v in (c.defocus_u, c.defocus_v, c.angle, c.phase_shift))
    wave = 0.5 * np.exp(-150 * (kx**2 + ky**2).numpy()) * (ctf_model.ctf(kx, ky, *values, OPTICS).numpy() ** 2 - 0.5)
    known = np.isfinite(image)
    radius = np.hypot(*np.meshgrid(line, line))
    assert known[(radius > 1 / 38) & (radius < 0.13)].all()
    # linear interpolation between samples 5e-4 apart; an angle of the wrong sign makes 0.04
    error = np.abs(np.where(line < 0, 1 - wave, 1 + wave) - image)
    assert error[known].max() < 0.005 and np.abs(wave[known]).max() > 0.15


def test_all_pictures(tmp_path: Path) -> None:
    record, r = a_series(7, phase=60.0)
    draw(record, r, tmp_path)
    for name in ("rings.png", "spectra.png", "ctf.png"):
        picture = drawn(tmp_path / name)
        assert min(picture.shape[:2]) > 400 and picture.std() > 12, name
    assert not list(tmp_path.iterdir())


def test_what_was_not_measured_is_grey(tmp_path: Path) -> None:
    """The curves of a tilt that isn't measured are grey in place of red; its defocus is a hollow point."""
    record, r = a_series(5)
    counts = []
    for measured in ((True,) * 5, (False, False, True, True, True)):
        changed = record.model_copy(update={"ctf": record.ctf.model_copy(update={"measured": measured})})
        draw(changed, r, tmp_path)
        rings, points = drawn(tmp_path / "rings.png"), drawn(tmp_path / "ctf.png")
        counts.append((pixels(rings, RED), pixels(rings, GREY), pixels(points, BLUE)))
    (red, grey, blue), (less_red, more_grey, less_blue) = counts
    assert 0.3 < less_red / red < 0.7 and more_grey > grey + 300 and less_blue < blue - 50


def test_the_page_grows_with_the_tilts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of panels are two rows higher than two: no panel is smaller, and none is left out."""
    monkeypatch.setattr(view, "COLUMNS", 3)
    heights = []
    for count in (7, 13):  # the last isn't used
        record, r = a_series(count)
        view.ring_plots(record, tmp_path / "r.png", r.k, r.angle, r.measured, r.fitted, r.error)
        heights.append(drawn(tmp_path / "r.png").shape[0])
    assert heights[1] - heights[0] == pytest.approx(2 * view.TALL * 4 / 3 * DPI, abs=20)


def test_little_is_known(tmp_path: Path) -> None:
    """An imported CTF has no errors and no scores; one image has no tilt; without a used tilt there's nothing to draw."""
    for record, r in (a_series(5, known=False), a_series(1, known=False)):
        r.measured[0] = np.nan
        draw(record, r, tmp_path)
        assert drawn(tmp_path / "ctf.png").std() > 12
    record, r = a_series(1)
    none = record.model_copy(update={"tilts": record.tilts.model_copy(update={"use": (False,)})})
    with pytest.raises(ValueError, match="no tilt"):
        draw(none, r, tmp_path)
