"""emc_volume: each operation against its closed form on a Gaussian without symmetry, in even and odd boxes."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import emc_volume
from libemc.io import mrc
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.grids import centred_coordinates, rfft_radius
from libemc.numerics.rotations import matrix_from_euler

PIXEL_SIZE = 3.0
CENTRE = torch.tensor([6.0, -8.0, 3.5], dtype=torch.float64)
ROOT = torch.tensor([[9.0, 0.0, 0.0], [2.5, 7.5, 0.0], [-1.5, 2.0, 6.5]], dtype=torch.float64)
"""A Gaussian without symmetry: its centre (x, y, z) and a root of its covariance, Å."""


def gaussian(
    shape: tuple[int, ...], pixel_size: float, centre: torch.Tensor = CENTRE, root: torch.Tensor = ROOT
) -> np.ndarray:
    z, y, x = centred_coordinates(shape)
    r = torch.stack(torch.broadcast_tensors(x, y, z), dim=-1) * pixel_size - centre
    return torch.exp(-0.5 * (r @ torch.linalg.inv(root).T).square().sum(dim=-1)).float().numpy()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert emc_volume.program.main([*argv, "--quiet"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def made(capsys: pytest.CaptureFixture[str], *argv: str, box: int = 30) -> tuple[np.ndarray, float]:
    """What becomes of the Gaussian."""
    mrc.write_volume("in.mrc", gaussian((box,) * 3, PIXEL_SIZE), PIXEL_SIZE)
    line = run(capsys, "in.mrc", "out.mrc", *argv, "--overwrite")
    volume, pixel_size = mrc.read_volume("out.mrc")
    assert line.startswith(f"out.mrc: {' x '.join(map(str, volume.shape))} voxels of {pixel_size:g} Å, mean ")
    return volume, pixel_size


@pytest.mark.parametrize("box", [30, 31])
@pytest.mark.parametrize("argv", [["--pixel-size", "4.1"], ["--pixel-size", "2.3"], ["--bin", "2"], []])
def test_rescaled(project: Path, capsys: pytest.CaptureFixture[str], box: int, argv: list[str]) -> None:
    """Centre and width in Å stay: what is beyond the Nyquist frequency of 6 Å is below exp(-10) of the peak's, as is what
    lies outside the box (5 deviations)."""
    volume, pixel_size = made(capsys, *argv, box=box)
    assert pixel_size == pytest.approx({"--pixel-size": float(argv[-1] if argv else 0), "--bin": 6.0}.get(
        argv[0] if argv else "", PIXEL_SIZE))  # fmt: skip
    assert abs(volume.shape[0] * pixel_size - box * PIXEL_SIZE) <= pixel_size
    assert np.allclose(volume, gaussian(volume.shape, pixel_size), atol=2e-3)


@pytest.mark.parametrize("box", [24, 25, 36])
def test_in_another_box(project: Path, capsys: pytest.CaptureFixture[str], box: int) -> None:
    """Cut and padded about the origin: the samples are those of the Gaussian, or 0 where the input had none."""
    volume, _ = made(capsys, "--box", str(box))
    radius = np.max(np.abs(np.stack(np.meshgrid(*[np.arange(box) - box // 2] * 3, indexing="ij"))), axis=0)
    assert volume.shape == (box,) * 3
    assert np.array_equal(volume[radius < 12], gaussian((box,) * 3, PIXEL_SIZE)[radius < 12])
    assert box < 30 or not volume[radius > 15].any()
    small, pixel_size = made(capsys, "--bin", "3", "--box", "12")
    assert pixel_size == 9 and small.shape == (12, 12, 12)  # the box is counted after binning


@pytest.mark.parametrize("box", [32, 33])
def test_rotated_and_shifted(project: Path, capsys: pytest.CaptureFixture[str], box: int) -> None:
    """Density at R·u + s is the input at u; error of cubic splines f''''/384 = 3/(384 σ⁴) = 5e-4 per axis at σ = 2 px."""
    volume, _ = made(capsys, "--rotate=-25,60,110", "--shift=-5,3.3,7", box=box)
    rotation = matrix_from_euler(-25.0, 60.0, 110.0)
    centre = rotation @ CENTRE + torch.tensor([-5.0, 3.3, 7.0], dtype=torch.float64)
    assert np.allclose(volume, gaussian(volume.shape, PIXEL_SIZE, centre, rotation @ ROOT), atol=1.5e-3)


@pytest.mark.parametrize("box", [30, 31])
def test_mirrored_and_inverted(project: Path, capsys: pytest.CaptureFixture[str], box: int) -> None:
    volume, _ = made(capsys, "--mirror", "z", "--invert", box=box)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    wanted = gaussian(volume.shape, PIXEL_SIZE, mirror @ CENTRE, mirror @ ROOT)
    assert np.allclose(-volume[1:], wanted[1:], atol=1e-6)  # float32


def test_symmetrised(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D2 moves samples onto samples: the mean over (x, y, z), (-x, -y, z), (x, -y, -z), (-x, y, -z) in an odd box."""
    volume, _ = made(capsys, "--symmetry", "d2", box=31)
    one = gaussian((31,) * 3, PIXEL_SIZE)
    four = (one + one[:, ::-1, ::-1] + one[::-1, ::-1] + one[::-1, :, ::-1]) / 4
    assert np.allclose(volume, four, atol=1e-5)  # float32 transforms of spline coefficients


def test_symmetrised_as_a_helix(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a twist: a copy every 18 Å (6 px), so that all is periodic along z, the middle of the box as well."""
    volume, _ = made(capsys, "--symmetry", "helix:18,0", box=30)
    assert np.allclose(volume[6:], volume[:-6], atol=1e-5) and volume.max() > 0.2


def test_found_symmetry_is_brought_onto_its_axes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four Gaussians about an axis off the middle, as two noisy halves: c4 is chosen, and a quarter turn changes nothing."""
    turn, place = matrix_from_euler(40.0, 65.0, -20.0), torch.tensor([6.0, -4.0, 3.0], dtype=torch.float64)
    copies = np.zeros((40,) * 3)
    for k in range(4):
        s = turn @ matrix_from_euler(90.0 * k, 0.0, 0.0)
        for x, y, z in ((30.0, 10.0, 12.0), (45.0, -20.0, -15.0), (10.0, 45.0, 30.0)):
            copies += gaussian((40,) * 3, 5.0, s @ torch.tensor([x, y, z], dtype=torch.float64) + place, s @ ROOT)
    noise = 0.02 * np.random.default_rng(2).normal(size=(2, 40, 40, 40))
    for name, values in (
        ("half1", copies + noise[0]),
        ("half2", copies + noise[1]),
        ("mean", copies + noise.mean(axis=0)),
    ):
        mrc.write_volume(f"{name}.mrc", values.astype(np.float32), 5.0)
    out = run(capsys, "mean.mrc", "out.mrc", "--find-symmetry", "auto", "--half-maps", "half1.mrc", "half2.mrc")
    assert out.splitlines()[1].split()[::6] == ["c4", "holds"] and "the map is c4 at" in out
    volume, _ = mrc.read_volume("out.mrc")
    inner = volume[1:, 1:, 1:]  # without the planes that have no partner
    assert np.corrcoef(inner.ravel(), np.rot90(inner, axes=(1, 2)).ravel())[0, 1] > 0.97
    assert np.corrcoef(inner.ravel(), np.rot90(inner, 2, axes=(0, 2)).ravel())[0, 1] < 0.7
    again = run(capsys, "out.mrc", "c4.mrc", "--find-symmetry", "c4", "--symmetry", "c4")
    assert again.splitlines()[1].startswith("c4 ")


def test_filtered(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frequencies beyond the pass band are gone, those inside untouched; the edges are a tenth of the cut-off wide."""
    noise = np.random.default_rng(0).normal(size=(30,) * 3).astype(np.float32)
    mrc.write_volume("noise.mrc", noise, PIXEL_SIZE)
    run(capsys, "noise.mrc", "out.mrc", "--lowpass", "10", "--highpass", "30")
    gain = np.fft.rfftn(mrc.read_volume("out.mrc")[0]) / np.fft.rfftn(noise)
    k = rfft_radius((30,) * 3).numpy() / PIXEL_SIZE
    inside, outside = (k > 1.06 / 30) & (k < 0.94 / 10), (k < 0.94 / 30) | (k > 1.06 / 10)
    assert np.allclose(gain[inside], 1, atol=1e-4) and np.abs(gain[outside]).max() < 1e-3  # float32


def test_normalised_then_masked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((30,) * 3, np.float32)
    mask[:15] = 1
    mrc.write_volume("mask.mrc", mask, PIXEL_SIZE)
    whole, _ = made(capsys, "--normalise")
    half, _ = made(capsys, "--normalise", "--mask", "mask.mrc")
    assert whole.mean() == pytest.approx(0, abs=1e-6) and whole.std() == pytest.approx(1, abs=1e-5)
    assert np.array_equal(half, whole * mask)


def test_pixel_sizes_and_types(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a pixel size in the header one has to be given; float16 halves the file and keeps 11 bits."""
    data = np.arange(-1000, 1000).reshape(10, 20, 10).astype(np.int16)
    with mrcfile.new("bare.mrc", data) as file:
        file.set_volume()
    assert emc_volume.program.main(["bare.mrc", "out.mrc"]) == 2
    assert "bare.mrc: has no pixel size in its header" in capsys.readouterr().err
    run(capsys, "bare.mrc", "out.mrc", "--set-pixel-size", "2.5", "--float16")
    with mrcfile.open("out.mrc") as file:
        assert file.data.dtype == np.float16 and np.array_equal(file.data, data) and file.voxel_size.z == 2.5
    run(capsys, "out.mrc", "small.mrc", "--bin", "2")
    assert mrc.read_volume("small.mrc")[0].shape == (5, 10, 5)


def test_compared(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """a + n against a: correlation sqrt(1/2) at equal power, difference 1, and the FSC that `numerics.fsc` says."""
    rng = np.random.default_rng(1)
    a, n = (rng.normal(size=(30,) * 3).astype(np.float32) for _ in range(2))
    mrc.write_volume("a.mrc", a, PIXEL_SIZE)
    mrc.write_volume("both.mrc", a + n, PIXEL_SIZE)
    words = run(capsys, "both.mrc", "--compare", "a.mrc").split()
    assert float(words[words.index("correlation") + 1].rstrip(",")) == pytest.approx(0.7071, abs=0.02)  # 27000 voxels
    assert float(words[words.index("difference") + 1].rstrip(",")) == pytest.approx(1, abs=0.03)
    curve = fourier_shell_correlation(torch.from_numpy(a + n), torch.from_numpy(a))
    assert bool((curve.values[1:] > 0.5).all()) and words[-2:] == ["6.00", "Å"]
    assert not Path("out.mrc").exists()
    line = run(capsys, "both.mrc", "out.mrc", "--invert", "--compare", "a.mrc")
    assert "correlation -0.7" in line and "out.mrc: 30 x 30 x 30 voxels" in line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["a.mrc"], "give the map to write, or --compare; see emc_volume --help"),
        (["none.mrc", "out.mrc"], "none.mrc: there is no such file; check the name and the folder you are in"),
        (["a.mrc", "b.mrc"], "b.mrc: exists, and emc_volume did not write it; give --overwrite to replace it"),
        (["a.mrc", "out.mrc", "--bin", "2", "--pixel-size", "5"],
         "argument --pixel-size: not allowed with argument --bin; see emc_volume --help"),
        (["a.mrc", "out.mrc", "--rotate", "1,2"],
         "argument --rotate: '1,2' is not three numbers with commas between them; see emc_volume --help"),
        (["a.mrc", "out.mrc", "--symmetry", "q7"],
         "unknown symmetry 'q7'; use cN, dN, t, o, i (= i1) or i2, for example c7"),
        (["a.mrc", "out.mrc", "--symmetry", "helix:5"],
         "unknown symmetry 'helix:5'; use helix:RISE,TWIST[,cN or dN][,n=COPIES] in Å and degrees"),
        (["a.mrc", "out.mrc", "--find-symmetry", "best"], "unknown symmetry 'best'; use cN, dN, t, o, i"),
        (["a.mrc", "out.mrc", "--half-maps", "a.mrc", "a.mrc"], "--half-maps is for --find-symmetry"),
        (["a.mrc", "out.mrc", "--find-symmetry", "auto", "--half-maps", "a.mrc", "b.mrc"],
         "b.mrc: has 8 x 8 x 10 voxels of 3 Å, a.mrc 8 x 8 x 8 voxels of 3 Å"),
        (["a.mrc", "out.mrc", "--lowpass", "40", "--highpass", "20"],
         "--lowpass 40 and --highpass 20 Å leave nothing; the high-pass is the coarser of the two, the larger number"),
        (["a.mrc", "out.mrc", "--compare", "b.mrc"],
         "b.mrc: has 8 x 8 x 10 voxels of 3 Å, the result 8 x 8 x 8 voxels of 3 Å; "
         "bring both onto one grid with --pixel-size and --box"),
        (["a.mrc", "out.mrc", "--mask", "a.mrc"],
         "a.mrc: is no mask: its values go from 0 to 1e+06; make one with emc_mask"),
        (["a.mrc", "out.mrc", "--float16"],
         "a.mrc: has values to 1e+06, too large for float16; give --normalise, or no --float16"),
        (["text.mrc", "out.mrc"], "text.mrc: is not an MRC file"),
    ],
)  # fmt: skip
def test_what_it_refuses(project: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    mrc.write_volume("a.mrc", np.linspace(0, 1e6, 512, dtype=np.float32).reshape(8, 8, 8), PIXEL_SIZE)
    mrc.write_volume("b.mrc", np.ones((8, 8, 10), np.float32), PIXEL_SIZE)
    Path("text.mrc").write_text("no map")
    before = sorted(Path().rglob("*"))
    assert emc_volume.program.main([*argv, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"emc_volume: error: {line}")
    assert sorted(Path().rglob("*")) == before


def test_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mrc.write_volume("a.mrc", np.ones((8, 8, 8), np.float32), PIXEL_SIZE)
    assert "new/out.mrc: 4 x 4 x 4 voxels of 6 Å" in run(capsys, "a.mrc", "new/out.mrc", "--bin", "2", "--dry-run")
    assert [file.name for file in Path().iterdir()] == ["a.mrc"]
