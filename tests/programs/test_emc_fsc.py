"""emc_fsc: the resolution of maps whose signal and noise are known, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import emc_fsc
from libemc.io import mrc
from libemc.methods import postprocess
from libemc.numerics import fourier
from libemc.numerics.filters import lowpass
from libemc.numerics.grids import rfft_radius
from libemc.numerics.masks import soft_sphere

BOX, PIXEL_SIZE, CUT = 40, 4.0, 20.0


def noise(seed: int, box: int = BOX) -> torch.Tensor:
    return torch.randn((box,) * 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def maps(project: Path) -> Path:
    """Half maps with a signal of power 9 times the noise's to CUT Å and none beyond, in a sphere; and its model."""
    mask = soft_sphere(BOX, 12.0, 4.0)
    signal = lowpass(3 * noise(1), PIXEL_SIZE, CUT, edge=0.02) * mask
    for name, volume in {
        "half1": signal + noise(2), "half2": signal + noise(3), "model": signal, "mask": mask,
    }.items():  # fmt: skip
        mrc.write_volume(f"{name}.mrc", volume.numpy(), PIXEL_SIZE)
    return project


def shell_power(volume: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean power and number of the coefficients in each shell of the whole transform."""
    power = np.abs(np.fft.fftn(volume.numpy())) ** 2
    k = np.fft.fftfreq(BOX, 1 / BOX)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int).ravel()
    count = np.bincount(shell)[: BOX // 2 + 1]
    return np.bincount(shell, power.ravel())[: BOX // 2 + 1] / count, count


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert emc_fsc.program.main([*argv, "--quiet"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    assert emc_fsc.program.main(argv) == 2
    assert sorted(Path().rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("emc_fsc: error: ").rstrip("\n")


def test_half_maps_with_a_mask(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S/(S + N) of what is known: the masked signal's power, and N = Σm² for white noise of power 1.

    The standard error of a shell is below 1/sqrt(count · 0.5): the mask leaves half a shell's coefficients independent.
    """
    line = run(capsys, "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--output", "post")
    assert sorted(file.name for file in Path("post").iterdir()) == ["fsc.json", "fsc.png", "fsc.txt"]
    found = json.loads(Path("post/fsc.json").read_text())
    assert (found["curve"], found["threshold"], found["pixel_size"]) == ("corrected", "0.143", PIXEL_SIZE)
    model, mask = (torch.from_numpy(mrc.read_volume(name)[0]) for name in ("model.mrc", "mask.mrc"))
    power, count = shell_power(model * mask)
    expected = power / (power + float((mask**2).sum()))
    error = np.abs(np.array(found["curves"]["corrected"]) - expected)[1:]
    assert np.all(error < 4 / np.sqrt(0.5 * count[1:]))
    shell = int(np.argmax(expected < 0.143))
    assert abs(BOX * PIXEL_SIZE / found["resolution"] - shell) < 1.5  # a shell, and half of one for the interpolation
    assert set(found["resolutions"]) == {"unmasked", "masked", "corrected"}
    assert set(found["resolutions"]["corrected"]) == {"0.143", "0.5", "half_bit", "one_bit"}
    assert line.startswith(f"corrected {found['resolution']:.2f} Å at 0.143 ") and line.count("\n") == 1
    assert found["frequency"][-1] == pytest.approx(1 / (2 * PIXEL_SIZE)) and found["inputs"]["mask"] == "mask.mrc"
    assert found["made_by"]["argv"][:3] == ["emc_fsc", "half1.mrc", "half2.mrc"]
    rows = np.loadtxt("post/fsc.txt")
    assert rows.shape == (BOX // 2 + 1, 6)
    assert np.allclose(rows[:, 5], found["curves"]["corrected"], atol=1e-6)  # its six decimals


def test_the_seed_makes_it_repeatable(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(capsys, "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--output", folder, "--seed", seed)
    texts = {folder: Path(folder, "fsc.txt").read_text() for folder in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_white_signal_and_noise(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signal with a power that falls as exp(-(k/k0)²): F = 0.143 at k0 sqrt(ln 6).

    The error of F there, 1/sqrt(4π 13² ) = 0.02, over its slope, 0.04 per shell: half a shell.
    """
    k0 = 0.25 / PIXEL_SIZE
    gain = torch.exp(-0.5 * (rfft_radius((BOX,) * 3) / PIXEL_SIZE / k0) ** 2).float()
    signal = fourier.irfftn_centred(fourier.rfftn_centred(noise(1), 3) * gain, (BOX,) * 3)
    for half in (1, 2):
        mrc.write_volume(f"half{half}.mrc", (signal + noise(10 + half)).numpy(), PIXEL_SIZE)
    line = run(capsys, "half1.mrc", "half2.mrc")
    found = json.loads(Path("fsc.json").read_text())
    wanted = BOX * PIXEL_SIZE * k0 * math.sqrt(math.log(5.99))
    assert abs(BOX * PIXEL_SIZE / found["resolution"] - wanted) < 1.5
    assert found["curve"] == "unmasked" and line.startswith(f"unmasked {found['resolution']:.2f} Å at 0.143")


def test_a_map_against_its_model(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(capsys, "half1.mrc", "model.mrc", "--model", "--mask", "mask.mrc")
    found = json.loads(Path("fsc.json").read_text())
    assert (found["curve"], found["threshold"]) == ("masked", "0.5")
    assert line.startswith(f"masked {found['resolution']:.2f} Å at 0.5 ")
    assert np.array(found["curves"]["masked"])[3:7] == pytest.approx(math.sqrt(0.9), abs=0.05)  # sqrt(S/(S + N))


def test_another_grid_has_to_be_asked_for(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model at 3 Å in a box of 60 comes back onto the grid of the half map as it was."""
    model, _ = mrc.read_volume("model.mrc")
    other = postprocess.resample(torch.from_numpy(model), 3.0 / PIXEL_SIZE)
    mrc.write_volume("other.mrc", fourier.centre_pad(other, (60,) * 3).numpy(), 3.0)
    assert refused(capsys, "half1.mrc", "other.mrc", "--model") == (
        "other.mrc: has 60 x 60 x 60 voxels of 3 Å, the first map 40 x 40 x 40 voxels of 4 Å; "
        "give --resample, or bring them onto one grid with emc_volume"
    )
    run(capsys, "half1.mrc", "other.mrc", "--model", "--resample", "--output", "a")
    run(capsys, "half1.mrc", "model.mrc", "--model", "--output", "b")
    a, b = (np.array(json.loads(Path(folder, "fsc.json").read_text())["curves"]["unmasked"]) for folder in "ab")
    assert np.allclose(a[:10], b[:10], atol=2e-3)  # within the signal's band; its sphere fades out inside both boxes


def test_a_b_factor_that_cannot_be_fitted_is_refused(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal ends at 20 Å."""
    assert emc_fsc.program.main(["half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--bfactor", "auto"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--bfactor: a B factor can't be fitted: between 10 Å and the resolution of" in err and "0 shells" in err
    assert not Path("fsc.json").exists()


def test_equal_halves_are_said_to_be_limited_by_their_pixels(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("copy.mrc").write_bytes(Path("half1.mrc").read_bytes())
    assert emc_fsc.program.main(["half1.mrc", "copy.mrc"]) == 0
    out, err = capsys.readouterr()
    assert "unmasked 8.00 Å at 0.143" in out and "never falls below 0.143: the pixels limit it to 8.00 Å" in err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["half1.mrc", "half1.mrc"], "half1.mrc: is given twice; give two maps"),
        (["half1.mrc", "none.mrc"], "none.mrc: there is no such file; check the name and the folder you are in"),
        (["half1.mrc", "half2.mrc", "--mask", "half1.mrc"], "half1.mrc: is no mask: its values go from "),
        (["half1.mrc", "flat.mrc"], "flat.mrc: is the same everywhere; give a map with density in it"),
        (["long.mrc", "half1.mrc"],
         "long.mrc: is not a cube but 4 x 8 x 8 voxels of 4 Å; cut or pad it with emc_volume --box"),
        (["half1.mrc", "half2.mrc", "--output", "taken"],
         "taken/fsc.json: exists, and emc_fsc did not write it; give --overwrite to replace it"),
        (["half1.mrc", "half2.mrc", "--model", "--local-resolution"],
         "--model: has no halves to filter, or to find directions and places in; give half maps"),
        (["half1.mrc", "half2.mrc", "--bfactor", "-5", "--structure-factor", "flat.mrc"],
         "--bfactor, --structure-factor: both give the map its contrast; give one of them"),
        (["half1.mrc", "half2.mrc", "--bfactor", "-5,all"],
         "argument --bfactor: 'all' is not a number; see emc_fsc --help"),
        (["half1.mrc", "half2.mrc", "--mtf-pixel-size", "2"], "--mtf-pixel-size: is of an MTF; give --mtf-file, or leave it out"),
        (["half1.mrc"], "the following arguments are required: MAP; see emc_fsc --help"),
    ],
)  # fmt: skip
def test_what_it_refuses(maps: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    mrc.write_volume("flat.mrc", np.ones((BOX,) * 3, np.float32), PIXEL_SIZE)
    mrc.write_volume("long.mrc", np.ones((4, 8, 8), np.float32), PIXEL_SIZE)
    Path("taken").mkdir()
    Path("taken/fsc.json").write_text("{}")
    assert refused(capsys, *argv).startswith(line)


def test_directions_places_and_the_filtered_map(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is found agrees with the whole curve, and each filtered map is nearer to the model than the mean is."""
    model, mask = (torch.from_numpy(mrc.read_volume(name)[0]) for name in ("model.mrc", "mask.mrc"))
    halves = [torch.from_numpy(mrc.read_volume(f"half{h}.mrc")[0]) for h in (1, 2)]

    def error(volume: torch.Tensor) -> float:
        return float((((volume - model) * mask) ** 2).sum() / ((model * mask) ** 2).sum())

    for kind in ("spherical", "anisotropic", "local"):
        line = run(
            capsys, "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--output", kind, "--filter", kind, "--directions",
            "--local-resolution",
        )  # fmt: skip
        filtered, pixel_size = mrc.read_volume(f"{kind}/filtered.mrc")
        assert pixel_size == PIXEL_SIZE
        assert error(torch.from_numpy(filtered)) < 0.6 * error(0.5 * (halves[0] + halves[1]))
    assert "; directions " in line and "; local " in line and line.count("\n") == 1
    found = json.loads(Path("local/fsc.json").read_text())
    cones = found["directions"]
    assert cones["best"]["resolution"] <= found["resolution"] <= cones["worst"]["resolution"]
    assert cones["anisotropy"] == pytest.approx(cones["worst"]["resolution"] / cones["best"]["resolution"])
    assert np.loadtxt("local/directions.txt").shape == (len(cones["axes"]), 6)
    places, _ = mrc.read_volume("local/local_resolution.mrc")
    assert np.all((places > 0) == (mask.numpy() > 0.5))
    assert found["local"]["median"] == pytest.approx(np.median(places[places > 0]), rel=1e-3)
    assert abs(1 / found["local"]["median"] - 1 / CUT) < 2 / found["local"]["window"]
    volume, _ = mrc.read_volume("local/fsc_3d.mrc")
    assert volume[BOX // 2, BOX // 2, BOX // 2] == pytest.approx(1) and volume.min() >= 0 and volume.max() < 1.001
    names = {file.name for file in Path("local").iterdir()}
    assert {"directions.png", "local_resolution.png", "fsc_3d.mrc", "fsc.json", "fsc.txt", "fsc.png"} < names


def test_sharpening(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the map that is only filtered: the gain exp(-B k²/4), 1/MTF, or the power of the model, shell by shell."""
    Path("mtf.txt").write_text("0 1\n0.5 0.4\n")
    Path("mtf.star").write_text(
        "data_mtf\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n0.0 1.0\n0.5 0.4\n\n"
    )
    argv = ["half1.mrc", "half2.mrc", "--mask", "mask.mrc"]
    power = {}
    for name, more in {
        "plain": ["--filter", "spherical"], "b": ["--bfactor", "-300"], "mtf": ["--mtf-file", "mtf.txt"],
        "star": ["--mtf-file", "mtf.star", "--mtf-pixel-size", str(2 * PIXEL_SIZE)],
        "model": ["--structure-factor", "model.mrc"],
    }.items():  # fmt: skip
        run(capsys, *argv, *more, "--output", name)
        power[name], _ = shell_power(torch.from_numpy(mrc.read_volume(f"{name}/filtered.mrc")[0]))
    shells = np.arange(2, 7)
    k = shells / (BOX * PIXEL_SIZE)
    gain = {name: np.sqrt(power[name] / power["plain"])[shells] for name in power}
    assert gain["b"] == pytest.approx(np.exp(300 * k**2 / 4), rel=0.01)  # linear between shells
    assert gain["mtf"] == pytest.approx(1 / (1 - 1.2 * shells / BOX), rel=0.01)
    assert gain["star"] == pytest.approx(1 / (1 - 2.4 * shells / BOX), rel=0.03)
    wanted, _ = shell_power(torch.from_numpy(mrc.read_volume("model.mrc")[0]))
    mean = sum(mrc.read_volume(f"half{h}.mrc")[0] for h in (1, 2)) / 2
    mask, _ = mrc.read_volume("mask.mrc")
    masked, _ = shell_power(torch.from_numpy(mean * mask))
    ratio = gain["model"] ** 2 * masked[shells] / wanted[shells]
    assert ratio == pytest.approx(np.full(len(shells), ratio.mean()), rel=0.15)  # an FSC of 0.95 ± 0.02 goes in
    assert json.loads(Path("b/fsc.json").read_text())["b_factor"] == -300


def test_a_map_for_each_b_factor(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is the mean of both halves times 2 F/(1 + F) exp(-B k²/4), coefficient by coefficient on the axis of a shell."""
    argv = ["half1.mrc", "half2.mrc", "--mask", "mask.mrc"]
    line = run(capsys, *argv, "--bfactor", "-50,-400.5,200", "--output", "three")
    assert line.endswith("; B factors -50, -400, 200 Å²\n")
    names = {"filtered_b-50.mrc": -50, "filtered_b-400.5.mrc": -400.5, "filtered_b200.mrc": 200}
    assert {file.name for file in Path("three").glob("*.mrc")} == set(names)
    found = json.loads(Path("three/fsc.json").read_text())
    assert found["b_factors"] == names and "b_factor" not in found
    spectra = {name: np.fft.fftn(mrc.read_volume(f"three/{name}")[0].astype(float)) for name in names}
    mean = np.fft.fftn(sum(mrc.read_volume(f"half{h}.mrc")[0].astype(float) for h in (1, 2)) / 2)
    for shell in range(2, 7):  # to 23 Å; the signal ends at 20
        f, k = found["curves"]["corrected"][shell], shell / (BOX * PIXEL_SIZE)
        for name, b in names.items():
            gain = 2 * f / (1 + f) * math.exp(-b * k**2 / 4)
            assert spectra[name][0, shell, 0] == pytest.approx(gain * mean[0, shell, 0], rel=1e-4)  # float32
    for b in ("-50", "200"):  # as of one alone
        run(capsys, *argv, f"--bfactor={b}", "--output", f"one{b}")
        assert Path(f"one{b}/filtered.mrc").read_bytes() == Path(f"three/filtered_b{b}.mrc").read_bytes()


def test_a_fitted_b_factor_among_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """White amplitudes that fade with B = -80 Å², in white noise: found as alone, and its map is that of alone."""
    box, pixel_size = 72, 1.5
    fading = torch.exp(-80 * (rfft_radius((box,) * 3) / pixel_size) ** 2 / 4)
    signal = torch.fft.irfftn(torch.fft.rfftn(noise(1, box)) * fading, s=(box,) * 3)
    for half in (1, 2):
        mrc.write_volume(f"half{half}.mrc", (signal + 0.1 * noise(1 + half, box)).numpy(), pixel_size)
    run(capsys, "half1.mrc", "half2.mrc", "--bfactor", "auto", "--output", "alone")
    line = run(capsys, "half1.mrc", "half2.mrc", "--bfactor", "-30,auto", "--output", "both")
    alone, both = (json.loads(Path(name, "fsc.json").read_text()) for name in ("alone", "both"))
    assert both["b_factors"] == {"filtered_b-30.mrc": -30.0, "filtered_auto.mrc": alone["b_factor"]}
    assert alone["b_factor"] == pytest.approx(-80, abs=max(4 * alone["b_factor_error"], 5.0))  # as in test_sharpen
    assert both["b_factor_error"] == alone["b_factor_error"]
    assert line.endswith(f"; B factors -30, {alone['b_factor']:.0f} Å²\n") and Path("both/guinier.png").is_file()
    assert Path("both/filtered_auto.mrc").read_bytes() == Path("alone/filtered.mrc").read_bytes()


def test_dry_run_writes_nothing(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert "FSC of half1.mrc and half2.mrc: 40 x 40 x 40 voxels of 4 Å" in run(
        capsys, "half1.mrc", "half2.mrc", "--dry-run", "--output", "post"
    )
    assert sorted(Path().rglob("*")) == before
