"""RELION 3.1 as the oracle of import and export: its projections come in, our particles go out to its reconstruction.

Hand, signs, origins, CTF with astigmatism, Euler angles and file formats all have to agree for these correlations.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import emc_average
import emc_export
import emc_import
from libemc.io import mrc
from libemc.io.relion import OpticsGroup, Particles2D, write_particles_2d
from libemc.methods import phantom
from libemc.numerics import rotations
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import soft_sphere
from tests.programs.sets import tilt_set

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not (shutil.which("relion_project") and shutil.which("relion_reconstruct")),
        reason="RELION is not installed (relion_project, relion_reconstruct)",
    ),
]

BOX, PIXEL = 56, 6.0
UP_TO = int(0.8 * BOX / 2)
"""Shell of 0.8 Nyquist."""
AGREEMENT = 0.98
"""The interpolation of both programs costs up to 0.7 % (seen); a wrong sign, origin or angle costs nearly all."""


def relion(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=300)


def average(set_name: str) -> Tensor:
    """Both half maps of emc_average together, without its Wiener filter."""
    assert emc_average.program.main([set_name, "--quiet", "--path", f"avg_{set_name}"]) == 0
    halves = [mrc.read_volume(f"avg_{set_name}/half{h}.mrc") for h in (1, 2)]
    assert halves[0][1] == pytest.approx(PIXEL)
    return torch.from_numpy(halves[0][0] + halves[1][0])


def correlation(a: Tensor, b: Tensor) -> np.ndarray:
    """FSC of the particle, shells 1 to 0.8 Nyquist: what lies beside it is interpolation error of both programs."""
    mask = soft_sphere(BOX, 0.85 * BOX / 2, 4.0).float()
    return fourier_shell_correlation(a * mask, b * mask).values[1 : UP_TO + 1].numpy()


def mirrored(density: Tensor) -> Tensor:
    return density.flip(0).roll(1, 0)


def test_projections_of_relion_average_to_the_map(project: Path) -> None:
    true = phantom.density(phantom.particle(), BOX, PIXEL)
    mrc.write_volume("true.mrc", true.numpy(), PIXEL)
    random, n = np.random.default_rng(31), 500
    mean, half = random.uniform(12000, 28000, n), random.uniform(200, 1500, n)
    rot, tilt, psi = rotations.euler_from_matrix(rotations.random_rotations(n, torch.Generator().manual_seed(4)))
    write_particles_2d(
        "angles.star",
        Particles2D(
            image=[f"{i:06d}@none.mrcs" for i in range(1, n + 1)],
            rot=rot.numpy(),
            tilt=tilt.numpy(),
            psi=psi.numpy(),
            dx=random.normal(0, 8, n),
            dy=random.normal(0, 8, n),
            defocus_u=mean + half,
            defocus_v=mean - half,
            defocus_angle=random.uniform(0, 180, n),
            phase_shift=np.zeros(n),
            group=np.zeros(n, int),
            optics=[OpticsGroup("one", PIXEL, BOX, 300.0, 2.7, 0.07)],
            half=np.zeros(n, int),
        ),
    )
    relion("relion_project", "--i", "true.mrc", "--o", "set", "--ctf", "--angpix", PIXEL, "--ang", "angles.star")
    assert emc_import.program.main(["--particles", "set.star", "--set", "set", "--quiet"]) == 0
    found = average("set")
    fsc = correlation(found, true)
    assert fsc.min() > AGREEMENT
    assert correlation(found, mirrored(true))[5:].max() < 0.7


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_an_exported_set_reconstructs_to_our_average(project: Path, noise: float) -> None:
    true = phantom.density(phantom.particle(), BOX, PIXEL)
    tilt_set("ours", true, PIXEL, particles=24, tilts=21, noise=noise)
    assert emc_export.program.main(["ours", "--format", "relion31", "--output", "out", "--quiet"]) == 0
    relion("relion_reconstruct", "--i", "out/particles.star", "--o", "relion.mrc", "--ctf")
    theirs, ours = torch.from_numpy(mrc.read_volume("relion.mrc")[0]), average("ours")
    fsc = correlation(ours, theirs)
    assert fsc.min() > AGREEMENT
    assert correlation(theirs, true)[:8].min() > 0.98 and correlation(theirs, mirrored(true))[5:].max() < 0.7
