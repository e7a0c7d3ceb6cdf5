"""What particles say of the microscope: the hand of their tilt series, and the tilt of the beam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libemc.methods.joint.evidence import Evidence
from libemc.methods.joint.fit import Member
from libemc.methods.subtilts import Particles, batches_by_half, load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.slices import Band


def other_hand(particles: Particles) -> Particles:
    """The particles with the defocus falling where it rose along z (convention 13)."""
    hand: int = -particles.series.handedness
    centre = torch.einsum("tj,nj->nt", particles.series.matrices[:, 2], particles.centre)
    defocus = (particles.defocus + 2 * hand * centre).tolist()
    records = tuple(
        p if p.defocus is None else p.model_copy(update={"defocus": tuple(z)})
        for p, z in zip(particles.to_file().particles, defocus, strict=True)
    )
    file = particles.file.model_copy(update={"defocus_handedness": hand, "particles": records})
    return Particles.of(file, particles.stack)


def hand_gain(members: Sequence[Member], memory: int) -> Tensor:
    """(N,) gain of each particle's log-likelihood by the other hand."""
    gains = []
    for m in members:
        here = m.evidence(m.resolution, memory)
        turned = Member(other_hand(m.particles), m.references)
        there: Evidence = turned.evidence(m.resolution, memory)
        contrast = here.contrast
        gains.append((there.likelihood(contrast) - here.likelihood(contrast)).sum(1))
    return torch.cat(gains)


def beam_tilt_sums(member: Member, band: Band, memory: int) -> tuple[Tensor, Tensor]:
    """Σ m*·y (K,) complex and Σ |m|² (K,) over all images: what `beam_tilt.fit_beam_tilt` takes."""
    p = member.particles
    cross, norm = torch.zeros(len(band.kx), dtype=torch.complex128), torch.zeros(len(band.kx), dtype=torch.float64)
    noise, taken = noise_spectrum(p, band), member.taken & p.shown.any(1)
    for part, volumes in enumerate(member.references.volumes(band.radius)):
        for half, piece in batches_by_half(p, taken & (member.parts == part), band, memory, None, ""):
            batch = load_batch(p, piece, band, noise)
            cut = slices.extract_slices(volumes[half - 1], batch.matrices(), band, batch.magnification)
            cross += (cut.conj() * batch.centred()).sum(0)
            norm += ((batch.transfer * cut.abs()) ** 2).sum(0)
    return cross, norm
