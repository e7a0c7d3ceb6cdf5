"""RELION 3.1 as the oracle of import and export: its projections come in, our particles go out to its reconstruction.

Hand, signs, origins, CTF with astigmatism, Euler angles and file formats all have to agree for these correlations.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emc_average
import emc_export
import emc_import
import numpy as np
import pytest
import torch
from torch import Tensor

from libemc import records
from libemc.io import mrc
from libemc.io.relion import OpticsGroup, Particles2D, write_particles_2d
from libemc.methods import phantom
from libemc.numerics import rotations, slices
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.dose import exposure_filter
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import soft_sphere

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
OPTICS = Optics(300.0, 2.7, 0.07)


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
            optics=[OpticsGroup("one", PIXEL, BOX, *vars(OPTICS).values())],
            half=np.zeros(n, int),
        ),
    )
    relion("relion_project", "--i", "true.mrc", "--o", "set", "--ctf", "--angpix", PIXEL, "--ang", "angles.star")
    assert emc_import.program.main(["--particles", "set.star", "--set", "set", "--quiet"]) == 0
    found = average("set")
    fsc = correlation(found, true)
    print(fsc.round(4))
    assert fsc.min() > 0.98  # the founder's bound; both programs interpolate linearly or better in padded transforms
    assert correlation(found, mirrored(true))[5:].max() < 0.7


def simulated(name: str, true: Tensor, particles: int, tilts: int, noise: float) -> None:
    """A set of one tilt series: tilted, magnified by nothing, dosed, off centre and with a defocus for each image."""
    generator = torch.Generator().manual_seed(8)
    angles = torch.linspace(-60, 60, tilts).double()
    axis, xtilt = torch.full_like(angles, 85.0), torch.full_like(angles, 2.0)
    matrices = rotations.tilt_matrices(axis, angles, xtilt)
    rotation = rotations.random_rotations(particles, generator)
    centre = (torch.rand(particles, 3, generator=generator).double() - 0.5) * 3000
    moved = torch.randn(particles, 3, generator=generator).double() * 6
    before = 3.0 * angles.abs().argsort().argsort().double()
    height = torch.einsum("tij,nj->nti", matrices, centre)[..., 2]
    defocus = 20000 + 80 * angles - height  # hand -1
    band = slices.Band.of(BOX)
    volume = slices.FourierVolume.from_map(true)
    kx, ky = band.frequencies(PIXEL)
    stack = []
    for i in range(particles):
        q = torch.einsum("tij,j->ti", matrices, moved[i])
        z = (defocus[i] - q[:, 2])[:, None]
        values = slices.extract_slices(volume, matrices @ rotation[i], band)
        lens = ctf(kx, ky, z + 700, z - 700, torch.tensor(25.0), torch.tensor(10.0), OPTICS)
        damage = exposure_filter((kx**2 + ky**2).sqrt(), (before + 3.0)[:, None], 300.0)
        values = values * (lens * damage).float() * slices.shift_phases(q[:, :2] / PIXEL, band)
        stack.append(slices.images_from_band(values, band))
    images = torch.cat(stack)
    images = images / images.std() + noise * torch.randn(images.shape, generator=generator)
    rot, tilt, psi = rotations.euler_from_matrix(rotation)
    zeros = (0.0,) * tilts
    file = records.ParticleFile(
        set=name, name="TS_01", box=BOX, pixel_size=PIXEL, stack=f"particles/{name}/TS_01.mrcs",
        optics=records.Optics(**vars(OPTICS)),
        tilts=records.ParticleTilts(
            axis=tuple(axis.tolist()), tilt=tuple(angles.tolist()), xtilt=tuple(xtilt.tolist()), magnification=(1.0,) * tilts,
            dose=(3.0,) * tilts, dose_before=tuple(before.tolist()), use=(False, *(True,) * (tilts - 1)),
            astigmatism=(700.0,) * tilts, astigmatism_angle=(25.0,) * tilts, phase_shift=(10.0,) * tilts),
        particles=tuple(
            records.Particle(
                id=f"TS_01.{i:06d}", xyz=tuple((centre[i] + moved[i]).tolist()), centre=tuple(centre[i].tolist()),
                rot=float(rot[i]), tilt=float(tilt[i]), psi=float(psi[i]), half=1 + i % 2,
                defocus=tuple(defocus[i].tolist()), visible=tuple(int((i + j) % 7 > 0) for j in range(tilts)))
            for i in range(particles)))  # fmt: skip
    del zeros
    head = records.ParticleSet(set=name, box=BOX, pixel_size=PIXEL)
    Path("particles", name).mkdir(parents=True)
    mrc.write_stack(f"particles/{name}/TS_01.mrcs", images.numpy(), PIXEL, "float16")
    records.save_particles(f"particles/{name}", head, {"TS_01": file})


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_an_exported_set_reconstructs_to_our_average(project: Path, noise: float) -> None:
    true = phantom.density(phantom.particle(), BOX, PIXEL)
    simulated("ours", true, particles=24, tilts=21, noise=noise)
    assert emc_export.program.main(["ours", "--format", "relion31", "--output", "out", "--quiet"]) == 0
    relion("relion_reconstruct", "--i", "out/particles.star", "--o", "relion.mrc", "--ctf")
    theirs, ours = torch.from_numpy(mrc.read_volume("relion.mrc")[0]), average("ours")
    fsc = correlation(ours, theirs)
    print(fsc.round(4), correlation(ours, true).round(3), correlation(theirs, true).round(3))
    assert fsc.min() > 0.98
    assert correlation(theirs, true)[:8].min() > 0.98 and correlation(theirs, mirrored(true))[5:].max() < 0.7
