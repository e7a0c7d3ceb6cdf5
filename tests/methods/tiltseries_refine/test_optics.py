"""The hand and the beam tilt, of particles that are made with them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libemc.methods.joint.fit import Member
from libemc.methods.subtilts import Particles
from libemc.methods.tiltseries_refine.beam_tilt import fit_beam_tilt
from libemc.methods.tiltseries_refine.optics import beam_tilt_sums, hand_gain, other_hand
from libemc.numerics import slices
from libemc.numerics.slices import Band
from libemc.records import ParticleFile
from tests.by_hand import tilt_matrix
from tests.methods.joint.joint_data import PIXEL, empty, member, pictured, scattered, unit_map

COUNT, TILTS, RESOLUTION, MEMORY = 40, 7, 8.5, 1 << 26


def handed(hand: int, box: int = 32) -> ParticleFile:
    """Particles up to 900 Å above and below, whose defocus follows their height by `hand`, and whose record says so."""
    file = scattered(COUNT, box, tilts=TILTS)
    t = file.tilts
    rows = np.stack([tilt_matrix(*a)[2] for a in zip(t.axis, t.tilt, t.xtilt, strict=True)])
    particles = []
    for p in file.particles:
        centre = np.multiply(p.centre, (2.0, 2.0, 3.0))
        defocus = np.linspace(15000, 17000, TILTS) + hand * rows @ centre
        xyz = centre + np.subtract(p.xyz, p.centre)
        particles.append(
            p.model_copy(
                update={
                    "centre": tuple(centre.tolist()),
                    "xyz": tuple(xyz.tolist()),
                    "defocus": tuple(defocus.tolist()),
                }
            )
        )
    return file.model_copy(update={"particles": tuple(particles), "defocus_handedness": hand})


def members_of(p: Particles, box: int) -> list[Member]:
    return [member(p, unit_map(box), RESOLUTION)]


@pytest.mark.parametrize("hand", [-1, 1])
def test_the_hand_is_told(hand: int) -> None:
    """Particles at all heights, in twice as much noise: the other hand is worse where theirs is right, better where it is
    wrong, each by the same and by more than four standard errors."""
    right = pictured(empty(handed(hand)), unit_map(32), noise=2.0)
    wrong = other_hand(right)
    assert wrong.series.handedness == -hand
    worse, better = (hand_gain(members_of(p, 32), MEMORY) for p in (right, wrong))
    for gain, sign in ((worse, -1), (better, 1)):
        assert gain.shape == (COUNT,)
        error = float((gain**2).sum().sqrt())
        assert sign * float(gain.sum()) > 4 * error
    # contrasts are those of the hand that is compared with
    assert float(worse.sum()) == pytest.approx(-float(better.sum()), rel=0.3)


def test_particles_in_the_middle_do_not_tell() -> None:
    """All at height 0 in all tilts: their defocus is the same by either hand, exactly."""
    file = handed(-1)
    flat = [p.model_copy(update={"centre": (0.0, 0.0, 0.0), "xyz": (0.0, 0.0, 0.0)}) for p in file.particles]
    p = pictured(empty(file.model_copy(update={"particles": tuple(flat)})), unit_map(32), noise=2.0)
    assert hand_gain(members_of(p, 32), MEMORY).abs().max() < 1e-9


def test_the_other_hand_twice_is_the_first() -> None:
    """And once, the defocus falls where it rose: by convention 13 at the centre, d ± z."""
    p = pictured(empty(handed(-1)), unit_map(32), noise=1.0)
    p = p.corrected(
        shift=torch.full((COUNT, TILTS, 2), 0.25).double(), defocus=torch.full((COUNT, TILTS), 12.5).double()
    )
    once = other_hand(p)
    height = torch.einsum("tj,nj->nt", p.series.matrices[:, 2], p.centre)
    torch.testing.assert_close((once.defocus + p.defocus) / 2, p.defocus + height)
    again = other_hand(once)
    assert again.series.handedness == -1
    torch.testing.assert_close(again.defocus, p.defocus)
    torch.testing.assert_close(again.rotation, p.rotation)
    for name in ("xyz", "centre", "visible"):
        torch.testing.assert_close(getattr(again, name), getattr(p, name))
    for name in ("shift", "turn", "defocus", "weight"):
        torch.testing.assert_close(getattr(once.corrections, name), getattr(p.corrections, name))
    assert again.stack is p.stack


@pytest.mark.parametrize("box", [32, 33])
def test_a_beam_tilt_is_in_the_sums(box: int) -> None:
    """Images whose transforms have the phase of one: found within four of the errors that are told, which are a tenth of it; half
    of it when the particles' optics have the other half already."""
    tilt = torch.tensor([24.0, -18.0], dtype=torch.float64)
    density = unit_map(box)
    p = pictured(empty(handed(-1, box)), density, noise=0.3)
    whole = Band.of(box)
    kx, ky = (k.double() / (box * PIXEL) for k in (whole.kx, whole.ky))
    phase = -2 * math.pi * 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * (kx * tilt[0] + ky * tilt[1]) * 1e-3
    spectra = slices.spectra_of_images(torch.from_numpy(p.stack).double(), whole)
    stack = slices.images_from_band(spectra * torch.polar(torch.ones_like(phase), phase), whole).float().numpy()
    band = Band.of(box, box * PIXEL / RESOLUTION)
    tilted = replace(p, stack=stack)
    half = tuple((tilt / 2).tolist())
    told = p.file.model_copy(update={"optics": p.file.optics.model_copy(update={"beam_tilt": half})})
    for q, expected in ((tilted, tilt), (replace(tilted, file=told), tilt / 2), (p, 0 * tilt)):
        cross, norm = beam_tilt_sums(member(q, density, RESOLUTION), band, MEMORY)
        found = fit_beam_tilt(cross, norm, band, PIXEL, p.series.optics)
        assert ((found.tilt - expected).abs() < 4 * found.error).all() and float(found.error.max()) < 3.0
