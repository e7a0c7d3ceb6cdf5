"""emc_mask: volumes of spheres and balls that are known, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import emc_mask
from libemc.io import mrc
from libemc.numerics.grids import centred_radius
from libemc.numerics.masks import soft_sphere

BOX, PIXEL_SIZE = 44, 4.0


@pytest.fixture
def ball(project: Path) -> Path:
    """A ball of radius 32 Å (its soft surface is 1/2 there) in the origin, a smaller one beside it, in noise of 0.3."""
    volume = soft_sphere(BOX, 7.0, 2.0) + soft_sphere(BOX, 2.0, 2.0).roll((-14, -14, -14), (0, 1, 2))
    noise = torch.randn((BOX,) * 3, generator=torch.Generator().manual_seed(0))
    mrc.write_volume("clean.mrc", volume.numpy(), PIXEL_SIZE)
    mrc.write_volume("map.mrc", (volume + 0.3 * noise).numpy(), PIXEL_SIZE)
    return project


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, float]:
    """The numbers of the result, in the order of the line."""
    capsys.readouterr()
    assert emc_mask.program.main([*argv, "--quiet"]) == 0, capsys.readouterr().err
    line = capsys.readouterr().out
    number = r"([\d.e+-]+)"
    match = re.fullmatch(
        rf"\S+: {number} % of the box, {number} Å³; within (?:sphere|threshold {number}): {number} Å³, {number} kDa\n",
        line,
    )
    assert match, line
    names = ("percent", "volume", "threshold", "dense", "mass")
    return {name: float(text or "nan") for name, text in zip(names, match.groups(), strict=True)}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    assert emc_mask.program.main(argv) == 2
    assert sorted(Path().rglob("*")) == before
    return capsys.readouterr().err.removeprefix("emc_mask: error: ").rstrip("\n")


def test_a_sphere(ball: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4π/3 r³, to the voxels on its surface; the soft edge, half a cosine about r + w/2, has (π² - 8)/π² w²/4 r more."""
    found = run(capsys, "map.mrc", "--sphere", "40", "--edge", "20", "--output", "sphere.mrc")
    mask, pixel_size = mrc.read_volume("sphere.mrc")
    assert pixel_size == PIXEL_SIZE and mask.shape == (BOX,) * 3
    radius = centred_radius(mask.shape).numpy() * PIXEL_SIZE
    assert np.all(mask[radius <= 40] == 1) and np.all(mask[radius >= 60] == 0)
    assert np.allclose(mask[np.abs(radius - 50) < 1e-6], 0.5)
    assert found["dense"] == pytest.approx(4 / 3 * math.pi * 40**3, rel=0.02)
    assert found["mass"] == pytest.approx(found["dense"] * 0.81e-3, rel=1e-3)  # four digits
    edge = 4 / 3 * math.pi * (50**3 + 3 * 50 * 100 * (1 - 8 / math.pi**2))
    assert found["volume"] == pytest.approx(edge, rel=0.01)
    assert found["percent"] == pytest.approx(100 * found["volume"] / (BOX * PIXEL_SIZE) ** 3, abs=0.006)


def test_a_threshold(ball: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both balls, the larger only, and the mask that reaches --extend beyond."""
    both = run(capsys, "clean.mrc", "--threshold", "0.5", "--output", "a.mrc")
    one = run(
        capsys, "clean.mrc", "--threshold", "0.5", "--largest", "--extend", "8", "--edge", "0", "--output", "b.mrc"
    )
    assert both["threshold"] == 0.5 and both["dense"] > one["dense"]
    assert one["dense"] == pytest.approx(4 / 3 * math.pi * 32**3, rel=0.05)  # voxels on a surface at 8 px
    # distances are to the centres of the outermost voxels of the ball, up to half a pixel below its surface
    assert 38 < (3 * one["volume"] / (4 * math.pi)) ** (1 / 3) < 40
    mask, _ = mrc.read_volume("b.mrc")
    assert set(np.unique(mask)) == {0, 1} and mask[8, 8, 8] == 0
    assert mrc.read_volume("a.mrc")[0][8, 8, 8] == 1


@pytest.mark.parametrize("more", [[], ["--lowpass", "24"], ["--lowpass", "24", "--threshold", "auto"]])
def test_by_itself_in_noise(ball: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """A ball of 32 Å, found to within half a pixel, and a mask that holds it and little else."""
    found = run(capsys, "map.mrc", "--largest", *more)
    assert abs((3 * found["dense"] / (4 * math.pi)) ** (1 / 3) - 32) < 2
    mask, _ = mrc.read_volume("mask.mrc")
    radius = centred_radius(mask.shape).numpy() * PIXEL_SIZE
    assert mask[radius < 32].min() == 1
    assert mask[radius > 32 + 9 * PIXEL_SIZE + 4].max() == 0  # 3 px more, 6 px of edge; 4 Å for a bump of the surface


def test_a_mask_at_the_border_is_warned_of(ball: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emc_mask.program.main(["map.mrc", "--sphere", "80", "--edge", "20"]) == 0
    assert "the mask reaches the border of the box" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["map.mrc", "--threshold", "9"],
         "no voxel is above the mask threshold 9; choose one below the map's maximum, "),
        (["map.mrc", "--threshold", "some"], "argument --threshold: 'some' is not a number; see emc_mask --help"),
        (["map.mrc", "--threshold", "1", "--sphere", "5"],
         "argument --sphere: not allowed with argument --threshold; see emc_mask --help"),
        (["map.mrc", "--sphere", "50", "--largest"],
         "--sphere: --lowpass, --largest and --extend shape a threshold mask; leave them out"),
        (["map.mrc", "--sphere", "0"], "argument --sphere: '0' is not above zero; see emc_mask --help"),
        (["flat.mrc"], "flat.mrc: is the same everywhere; give a map with density in it, or --sphere"),
        (["map.mrc", "--output", "clean.mrc"],
         "clean.mrc: exists, and emc_mask did not write it; give --overwrite to replace it"),
        (["none.mrc"], "none.mrc: there is no such file; check the name and the folder you are in"),
    ],
)  # fmt: skip
def test_what_it_refuses(ball: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    mrc.write_volume("flat.mrc", np.ones((8, 8, 8), np.float32), PIXEL_SIZE)
    assert refused(capsys, *argv, *(["--quiet"] if argv[0] != "none.mrc" else [])).startswith(line)


def test_dry_run_writes_nothing(ball: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emc_mask.program.main(["map.mrc", "--dry-run"]) == 0
    assert "mask.mrc: a mask for map.mrc" in capsys.readouterr().out
    assert not Path("mask.mrc").exists()
