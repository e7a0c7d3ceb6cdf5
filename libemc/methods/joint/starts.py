"""Where a fit begins: a tilt that lies periods away from where it should be is found before it is fitted.

Gauss-Newton finds the top of the hill that it begins on. So for every tilt all shifts in its neighbourhood are looked at
once, with all of its particles together, as their cross-correlation with the prediction has them (one Fourier transform);
it begins at the best of them where that is better beyond doubt, else where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from libemc.methods.joint.evidence import contrasts
from libemc.methods.joint.fit import LEAST_RADIUS, Member
from libemc.methods.subtilts import batches_by_half, load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.slices import Band

COARSE = 3.0
"""Times the finest period: of the data that are looked at."""
FARTHEST = 0.2
"""Of the box: how far a tilt is looked for."""
NEAR = 0.25
"""Of the coarse data's period: what is nearer than this the fit finds by itself."""
DOUBT = 20.0
"""Log-likelihood by which another place must be better."""


def correlations(member: Member, memory: int) -> Tensor:
    """(T, n, n) log-likelihood of all of a tilt's images by a common shift, over that at none; the middle pixel is none."""
    p = member.particles
    box, tilts = p.file.box, len(p.series.use)
    band = Band.of(box, max(LEAST_RADIUS, box * p.file.pixel_size / (COARSE * member.resolution)))
    noise, taken = noise_spectrum(p, band), member.taken & p.shown.any(1)
    spectra = torch.zeros(len(p), tilts, dtype=torch.float64), torch.zeros(len(p), tilts, dtype=torch.float64)
    sums = torch.zeros(tilts, len(band.kx), dtype=torch.complex64)
    pieces = [
        (volumes[half - 1], piece)
        for part, volumes in enumerate(member.references.volumes(band.radius))
        for half, piece in batches_by_half(p, taken & (member.parts == part), band, memory, None, "")
    ]
    for volume, piece in pieces:
        batch = load_batch(p, piece, band, noise)
        cut = slices.extract_slices(volume, batch.matrices(), band, batch.magnification)
        products = batch.centred() * cut.conj()
        who = piece[batch.owner]
        spectra[0][who, batch.tilt] = products.real.sum(1).double()
        spectra[1][who, batch.tilt] = (batch.transfer**2 * cut.abs() ** 2).sum(1).double()
        sums.index_add_(0, batch.tilt, products)
    contrast = contrasts(*spectra)
    typical = torch.where(spectra[1] > 0, contrast, torch.nan).nanmean(0).nan_to_num()
    # the sum over the band counts each Friedel pair once, the transform twice; the mean is its own mate
    half_weight = (1 / band.multiplicity).to(sums.dtype)
    maps = slices.images_from_band(sums * half_weight * 2, band).double() * box**2 / 2
    middle = maps[:, box // 2, box // 2][:, None, None]
    return 2 * typical[:, None, None] * (maps - middle)


def started(members: Sequence[Member], memory: int) -> tuple[list[Member], Tensor]:
    """The members with tilts moved to where they begin, and by how much: (T, 2) Å."""
    maps, pixel_sizes = [correlations(m, memory) for m in members], [m.particles.file.pixel_size for m in members]
    best = max(range(len(members)), key=lambda k: float(maps[k].amax((1, 2)).sum()))
    table, pixel_size = maps[best], pixel_sizes[best]
    box = table.shape[-1]
    line = torch.arange(box) - box // 2
    far = (line[:, None] ** 2 + line**2).double().sqrt()
    table = torch.where(far <= FARTHEST * box, table, -torch.inf)
    value, place = table.flatten(1).max(dim=1)
    shift = torch.stack([line[place % box], line[place // box]], dim=1).double() * pixel_size
    period = COARSE * members[best].resolution
    moved = (value > DOUBT) & (torch.linalg.vector_norm(shift, dim=1) > NEAR * period)
    shift = torch.where(moved[:, None], shift, 0.0)
    out = []
    for m in members:
        p = m.particles
        by = shift / p.series.magnification[:, None]
        out.append(replace(m, particles=p.corrected(shift=p.corrections.shift + by)) if bool(moved.any()) else m)
    return out, shift
