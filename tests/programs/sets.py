"""Particle sets for the tests of what reads and writes them: made by the forward model, or cut out of images by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import emc_extract
from libemc import records
from libemc.io import mrc
from libemc.numerics import rotations, slices
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.dose import exposure_filter
from tests.by_hand import HandSeries

OPTICS = Optics(300.0, 2.7, 0.07)
ASTIGMATISM, ANGLE, PHASE = 700.0, 25.0, 10.0


def extracted_by_hand(folder: Path, series: HandSeries) -> Path:
    """Make a project of a folder, with the set `ribo` of the particles of a hand-made tilt series in boxes of 32."""
    series.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = [series.name, "--label", "ribo", "--set", "ribo", "--box", "32", "--quiet"]
        assert emc_extract.program.main(argv) == 0
    return folder


def tilt_set(
    name: str, true: Tensor, pixel_size: float, particles: int, tilts: int, noise: float = 0.0
) -> records.ParticleFile:
    """Write a set of one tilt series: doses, an xtilt, particles off the centres of their patches, a defocus for each image.

    The first tilt is not used, and every seventh image of a particle not visible (it holds noise or what is there).
    """
    generator = torch.Generator().manual_seed(8)
    box = true.shape[-1]
    angles = torch.linspace(-60, 60, tilts).double()
    axis, xtilt = torch.full_like(angles, 85.0), torch.full_like(angles, 2.0)
    matrices = rotations.tilt_matrices(axis, angles, xtilt)
    rotation = rotations.random_rotations(particles, generator)
    centre = (torch.rand(particles, 3, generator=generator).double() - 0.5) * 3000
    moved = torch.randn(particles, 3, generator=generator).double() * 6
    before = 3.0 * angles.abs().argsort().argsort().double()
    defocus = 20000 + 80 * angles - torch.einsum("tij,nj->nti", matrices, centre)[..., 2]  # handedness -1
    band = slices.Band.of(box)
    volume = slices.FourierVolume.from_map(true)
    kx, ky = band.frequencies(pixel_size)
    damage = exposure_filter((kx**2 + ky**2).sqrt(), (before + 3.0)[:, None], OPTICS.voltage)
    stack = []
    for i in range(particles):
        q = torch.einsum("tij,j->ti", matrices, moved[i])
        z = (defocus[i] - q[:, 2])[:, None]
        lens = ctf(kx, ky, z + ASTIGMATISM, z - ASTIGMATISM, torch.tensor(ANGLE), torch.tensor(PHASE), OPTICS)
        values = slices.extract_slices(volume, matrices @ rotation[i], band)
        values = values * (lens * damage).float() * slices.shift_phases(q[:, :2] / pixel_size, band)
        stack.append(slices.images_from_band(values, band))
    images = torch.cat(stack)
    images = images / images.std() + noise * torch.randn(images.shape, generator=generator)
    rot, tilt, psi = rotations.euler_from_matrix(rotation)
    file = records.ParticleFile(
        set=name, name="TS_01", box=box, pixel_size=pixel_size, stack=f"particles/{name}/TS_01.mrcs",
        optics=records.Optics(**vars(OPTICS)),
        tilts=records.ParticleTilts(
            axis=tuple(axis.tolist()), tilt=tuple(angles.tolist()), xtilt=tuple(xtilt.tolist()), magnification=(1.0,) * tilts,
            dose=(3.0,) * tilts, dose_before=tuple(before.tolist()), use=(False, *(True,) * (tilts - 1)),
            astigmatism=(ASTIGMATISM,) * tilts, astigmatism_angle=(ANGLE,) * tilts, phase_shift=(PHASE,) * tilts),
        particles=tuple(
            records.Particle(
                id=f"TS_01.{i:06d}", xyz=tuple((centre[i] + moved[i]).tolist()), centre=tuple(centre[i].tolist()),
                rot=float(rot[i]), tilt=float(tilt[i]), psi=float(psi[i]), half=1 + i % 2, class_=i % 3,
                defocus=tuple(defocus[i].tolist()), visible=tuple(int((i + j) % 7 > 0) for j in range(tilts)))
            for i in range(particles)))  # fmt: skip
    Path("particles", name).mkdir(parents=True)
    mrc.write_stack(file.stack or "", images.numpy(), pixel_size, "float16")
    records.save_particles(
        f"particles/{name}", records.ParticleSet(set=name, box=box, pixel_size=pixel_size), {"TS_01": file}
    )
    return file
