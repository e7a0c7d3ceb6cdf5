"""Subtilt series out of the raw images: patches around the projections of each particle, centred, white, with their defocus.

Nothing here knows files: images come as an array [tilt, y, x] (a memory map), patches leave in the order of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from libemc.methods.subtilts import Progress, Stack, TiltGeometry, particle_tilts
from libemc.numerics import fourier
from libemc.numerics.grids import centred_radius
from libemc.numerics.patches import cut_patches
from libemc.records import Ctf, Optics, Particle, ParticleFile, TiltSeriesRecord, half_of, need, need_picks

SEEN = 0.5
"""Radius, as a fraction of half the box, of the disc that must lie inside an image for the tilt to count as seeing a
particle: a patch that reaches over the edge is filled with the image's mean."""
NOISE_SAMPLE = 64
"""Particles by which the noise of a tilt is measured."""
BACKGROUND = 0.9
"""Radius, as a fraction of half the box, beyond which a patch counts as background."""


@dataclass(frozen=True)
class Patches:
    """Where each particle lies in each tilt: what extraction is about to cut.

    Attributes:
        position: (N, T, 2) pixels of the raw image from its centre (x, y).
        defocus: (N, T) Å, NaN where the record has no CTF.
        visible: (N, T) bool.
    """

    position: Tensor
    defocus: Tensor
    visible: Tensor


def locate(
    points: Sequence[tuple[float, float, float]],
    geometry: TiltGeometry,
    ctf: Ctf | None,
    shape: tuple[int, int],
    pixel_size: float,
    raw_box: int,
) -> Patches:
    """Project particles into the raw images.

    Args:
        points: N times (x, y, z), Å from the tomogram's centre.
        shape: rows and columns of the raw images; pixel_size: theirs.
        raw_box: side of the patch in raw pixels.
    """
    position, height = geometry.project(torch.tensor(points, dtype=torch.float64).reshape(-1, 3))
    position = position / pixel_size
    rows, columns = shape
    low = torch.tensor([-(columns // 2), -(rows // 2)])
    high = torch.tensor([columns - 1 - columns // 2, rows - 1 - rows // 2])
    reach = SEEN * raw_box / 2
    inside = ((position - reach >= low) & (position + reach <= high)).all(dim=-1)
    defocus = torch.full(height.shape, float("nan"), dtype=torch.float64)
    if ctf is not None:
        mean = (torch.tensor(ctf.defocus_u, dtype=torch.float64) + torch.tensor(ctf.defocus_v, dtype=torch.float64)) / 2
        defocus = mean + ctf.defocus_handedness * height
    return Patches(position, defocus, inside & geometry.use)


def extract_tilt(image: Tensor, position: Tensor, box: int, binning: int = 1, contrast: str = "dark") -> Tensor:
    """Cut the patches of one tilt image.

    Args:
        image: (y, x) float32, raw.
        position: (P, 2) pixels from the image's centre (x, y), anywhere: the fraction is taken up by a phase ramp.
        box: pixels of the patch after binning by Fourier cropping.
        contrast: of the raw image; "dark" is inverted, so that particles leave white (convention 12).

    Returns:
        (P, box, box) float32: background mean 0; the noise of the image as a whole has unit variance at this sampling.
    """
    mean = float(image.mean())
    patches, rest = cut_patches([image.numpy()] * len(position), position, box * binning, mean)
    patches = fourier.fourier_shift(patches - mean, -rest)
    patches = fourier.resize(patches, (box, box)).float()
    outside = (centred_radius((box, box)) > BACKGROUND * box / 2).float()
    patches = patches - ((patches * outside).sum((1, 2)) / outside.sum())[:, None, None]
    return -patches if contrast == "dark" else patches


def particle_file(
    record: TiltSeriesRecord,
    label: str,
    set_name: str,
    box: int,
    pixel_size: float,
    symmetry: str,
    patches: Patches,
    dose: bool = True,
) -> ParticleFile:
    """The particle file of one tilt series: every pick that some tilt sees, with the pose it was picked with.

    Picks without orientation get rot = tilt = psi = 0. A particle's number is its pick's, so that ids stay as they are
    when others drop out.

    Args:
        dose: keep the tilts' doses, by which all that uses the particles weighs them; without, they are zero.
    """
    picks, alignment = need_picks(record, label), need(record, "alignment")
    none = (0.0,) * len(picks.xyz)
    rot, tilt, psi = (v or none for v in (picks.rot, picks.tilt, picks.psi))
    score = picks.score or (None,) * len(picks.xyz)
    known = record.ctf is not None
    defocus, visible = patches.defocus.tolist(), patches.visible.int().tolist()
    particles = []
    for i, xyz in enumerate(picks.xyz):
        if any(visible[i]):
            name = f"{record.name}.{i:06d}"
            particles.append(
                Particle(
                    id=name,
                    xyz=xyz,
                    centre=xyz,
                    rot=rot[i],
                    tilt=tilt[i],
                    psi=psi[i],
                    half=half_of(name),
                    score=score[i],
                    defocus=defocus[i] if known else None,
                    visible=visible[i],
                )
            )
    source, tilts = record.source, particle_tilts(record, alignment, record.ctf)
    if not dose:
        zeros = (0.0,) * len(tilts.dose)
        tilts = tilts.model_copy(update={"dose": zeros, "dose_before": zeros})
    return ParticleFile(
        set=set_name,
        name=record.name,
        box=box,
        pixel_size=pixel_size,
        symmetry=symmetry,
        label=label,
        optics=Optics(voltage=source.voltage, cs=source.cs, amplitude_contrast=source.amplitude_contrast),
        tilts=tilts,
        defocus_handedness=record.ctf.defocus_handedness if record.ctf else -1,
        particles=tuple(particles),
    )


def extract(
    images: Stack,
    patches: Patches,
    kept: Sequence[int],
    box: int,
    binning: int,
    contrast: str,
    memory: int,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """The patches of a tilt series in the order of the stack (particle·T + tilt), in blocks of particles.

    Every tilt is scaled to unit noise: the patches of the first `NOISE_SAMPLE` particles that it sees have unit variance
    outside the particle, all together. The raw images are read once for each block; a block is as large as `memory` allows
    and changes nothing else.

    Args:
        images: (T, y, x) raw stack; kept: particles to cut, in order.

    Yields:
        (n·T, box, box) float16; zero where a tilt is not used or does not see the particle.
    """
    tilts = patches.visible.shape[1]
    block = max(1, min(len(kept), int(memory // 2 // (2 * tilts * box**2 + 60 * (box * binning) ** 2))))
    outside = (centred_radius((box, box)) > BACKGROUND * box / 2).float()
    noise, everything = torch.zeros(tilts), torch.as_tensor(kept)
    steps = [(start, t) for start in range(0, len(kept), block) for t in range(tilts)]
    out = np.zeros((0,), dtype=np.float16)
    for start, t in progress(steps, len(steps), "extract") if progress else steps:
        mine = torch.as_tensor(kept[start : start + block])
        if t == 0:
            out = np.zeros((len(mine), tilts, box, box), dtype=np.float16)
        seen = torch.nonzero(patches.visible[mine, t])[:, 0]
        if len(seen):
            image = torch.from_numpy(np.array(images[t], dtype=np.float32))
            cut = extract_tilt(image, patches.position[mine[seen], t], box, binning, contrast)
            if not noise[t]:
                first = everything[torch.nonzero(patches.visible[everything, t])[:NOISE_SAMPLE, 0]]
                sample = extract_tilt(image, patches.position[first, t], box, binning, contrast)
                noise[t] = ((sample**2 * outside).sum() / (outside.sum() * len(sample))).sqrt().clamp_min(1e-12)
            out[seen.numpy(), t] = (cut / noise[t]).numpy()
        if t == tilts - 1:
            yield out.reshape(-1, box, box)
