"""Particles as 2-D images: poses, origins and defocus by scipy's rotations, and a B-factor by brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial.transform import Rotation

from libemc.methods import export
from libemc.methods.subtilts import Particles
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.dose import exposure_filter
from tests.programs.sets import ANGLE, ASTIGMATISM, PHASE, tilt_set

PIXEL = 6.0


@pytest.fixture
def particles(project: Path) -> Particles:
    generator = torch.Generator().manual_seed(1)
    file = tilt_set("ours", torch.randn(12, 12, 12, generator=generator), PIXEL, particles=6, tilts=5)
    return Particles.of(file, np.zeros((30, 12, 12), np.float16))


def test_every_used_visible_image_once(particles: Particles) -> None:
    chosen = particles.using(torch.tensor([True, True, False, True, True, False]))
    table = export.image_table(chosen)
    expected = [
        (i, j)
        for i in (0, 1, 3, 4)
        for j in range(1, 5)
        if (i + j) % 7  # tilt 0 is not used
    ]
    assert list(zip(table.particle.tolist(), table.tilt.tolist(), strict=True)) == expected
    assert len(table) == len(expected) and table.known
    assert table.half.tolist() == [1 + i % 2 for i, _ in expected]
    assert table.dose_before.tolist() == [particles.file.tilts.dose_before[j] for _, j in expected]


def test_poses_origins_and_defocus_by_scipy(particles: Particles) -> None:
    table, tilts = export.image_table(particles), particles.file.tilts
    for row in range(len(table)):
        j, p = int(table.tilt[row]), particles.file.particles[int(table.particle[row])]
        tilt = Rotation.from_euler("ZYX", [tilts.axis[j], tilts.tilt[j], tilts.xtilt[j]], degrees=True)  # Rz·Ry·Rx
        pose = Rotation.from_euler("ZYZ", [p.rot, p.tilt, p.psi], degrees=True).inv()
        angles = [float(v[row]) for v in (table.rot, table.tilt_angle, table.psi)]
        image = Rotation.from_euler("ZYZ", angles, degrees=True).inv()
        np.testing.assert_allclose(image.as_matrix(), (tilt * pose).as_matrix(), atol=1e-12)
        q = tilt.apply(np.subtract(p.xyz, p.centre))
        np.testing.assert_allclose(table.shift[row], q[:2], atol=1e-9)
        assert p.defocus is not None
        mean = p.defocus[j] - q[2]  # handedness -1: what is nearer the electron source has less underfocus
        np.testing.assert_allclose(table.defocus_u[row], mean + ASTIGMATISM, atol=1e-8)
        np.testing.assert_allclose(table.defocus_v[row], mean - ASTIGMATISM, atol=1e-8)
        assert (float(table.defocus_angle[row]), float(table.phase_shift[row])) == (ANGLE, PHASE)


def test_magnification_scales_the_origin(particles: Particles) -> None:
    larger = {"magnification": (1.02,) * 5}
    file = particles.file.model_copy(update={"tilts": particles.file.tilts.model_copy(update=larger)})
    magnified = Particles.of(file, particles.stack)
    ratio = export.image_table(magnified).shift / export.image_table(particles).shift
    np.testing.assert_allclose(ratio, 1.02, rtol=1e-12)
    assert export.largest_magnification(magnified) == pytest.approx(0.02)
    assert export.largest_magnification(particles) == 0


def test_a_particles_own_lens_and_an_unknown_defocus(particles: Particles) -> None:
    first, *others = particles.file.particles
    own = first.model_copy(
        update={"astigmatism": (-300.0,) * 5, "astigmatism_angle": (15.0,) * 5, "phase_shift": (3.0,) * 5}
    )
    file = particles.file.model_copy(update={"particles": (own, *others)})
    table = export.image_table(Particles.of(file, particles.stack))
    mine = table.particle == 0
    assert set(table.phase_shift[mine].tolist()) == {3.0} and set(table.phase_shift[~mine].tolist()) == {PHASE}
    u, v, angle = table.defocus_u[mine], table.defocus_v[mine], table.defocus_angle[mine]
    assert (u - v).tolist() == pytest.approx([600.0] * int(mine.sum()))
    # U >= V with the axis turned is the same function
    kx, ky = torch.linspace(-0.05, 0.05, 9).double(), torch.linspace(0.01, 0.06, 9).double()
    z, zero = (u + v)[:, None] / 2, torch.zeros(1, dtype=torch.float64)
    turned = ctf(kx, ky, u[:, None], v[:, None], angle[:, None], zero, Optics())
    plain = ctf(kx, ky, z - 300.0, z + 300.0, torch.full((1,), 15.0).double(), zero, Optics())
    np.testing.assert_allclose(turned, plain, atol=1e-9)
    blind = file.model_copy(update={"particles": (own.model_copy(update={"defocus": None}), *others)})
    unknown = export.image_table(Particles.of(blind, particles.stack))
    assert not unknown.known and unknown.defocus_u[mine].tolist() == [300.0] * int(mine.sum())


def test_bfactor_is_the_least_squares_one() -> None:
    doses = torch.tensor([0.0, 3.0, 30.0, 120.0])
    found = export.dose_bfactor(doses, 300.0, 3.0)
    assert found[0] == 0 and (found.diff() > 0).all()
    k = np.linspace(0, 1 / 6, 4001)[1:]
    for dose, b in zip(doses[1:], found[1:], strict=True):
        f = exposure_filter(torch.from_numpy(k), dose, 300.0).numpy()
        weighed = k * f**2

        def misfit(x: float, f: np.ndarray = f, weighed: np.ndarray = weighed) -> float:
            return float((weighed * (np.log(f) + x * k**2 / 4) ** 2).sum())

        best = minimize_scalar(misfit, bounds=(0, 1e4), method="bounded")
        assert float(b) == pytest.approx(best.x, rel=0.01)  # 64 frequencies against 4000
