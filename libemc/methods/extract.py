"""Subtilt series out of the raw images: patches around the projections of each particle, centred, white, with their defocus.

Nothing here knows files: images come as an array [tilt, y, x] (a memory map), patches leave in the order of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.subtilts import GEOMETRY, Progress, Stack, TiltGeometry, particle_tilts
from libemc.numerics import fourier
from libemc.numerics.grids import centred_radius
from libemc.numerics.patches import cut_patches
from libemc.numerics.threads import in_threads
from libemc.records import (
    Alignment,
    Ctf,
    Optics,
    Particle,
    ParticleFile,
    RawImages,
    TiltSeriesRecord,
    half_of,
    image_places,
    need,
    need_picks,
)

SEEN = 0.5
"""Radius, as a fraction of half the box, of the disc that must lie inside an image for the tilt to count as seeing a
particle: a patch that reaches over the edge is filled with the image's mean."""
NOISE_SAMPLE = 64
"""Particles by which the noise of a tilt is measured."""
ROUNDING = 2**20
"""Parts of a raw pixel that positions are rounded to: those of the same particle are then the same, whoever works them out."""
AT_ONCE = 32
"""Patches that are transformed together: they stay in the cache."""
BYTES_PER_PIXEL = 60
"""Of raw images, or of raw patches, that are live while patches are cut."""
MOST_AT_ONCE = 64
"""Particles of the largest block."""
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

    @property
    def kept(self) -> list[int]:
        """The particles that are in some image."""
        return torch.nonzero(self.visible.any(dim=1))[:, 0].tolist()


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


@dataclass(frozen=True)
class Cutting:
    """How patches are cut.

    Attributes:
        box: pixels of a patch, after binning by Fourier cropping.
        binning: raw pixels to one of the patch.
        contrast: of the raw images; "dark" is inverted, so that particles leave white (convention 12).
    """

    box: int
    binning: int = 1
    contrast: str = "dark"

    @property
    def raw_box(self) -> int:
        """Raw pixels of a patch's side."""
        return self.box * self.binning


def cut(images: Sequence[NDArray[Any]], position: Tensor, mean: Tensor, cutting: Cutting) -> Tensor:
    """Cut one patch out of each image, centred and white.

    In double precision and to `ROUNDING` of a pixel, so that what is cut together, or how many threads there are, does not
    show in what is then rounded to float16.

    Args:
        images: P raw images (y, x); memory maps are read where the patch is only.
        position: (P, 2) pixels from the image's centre (x, y), anywhere: the fraction is taken up by a phase ramp.
        mean: (P,) of each image: what a patch has beyond the edge.

    Returns:
        (P, box, box) float64: background mean 0; the noise of an image as a whole keeps its variance at this sampling.
    """
    size = (cutting.box, cutting.box)
    position = torch.round(position * ROUNDING) / ROUNDING
    patches, rest = cut_patches(images, position, cutting.raw_box, mean.numpy())
    patches = fourier.shift_and_resize(patches.double() - mean.double()[:, None, None], -rest, size)
    outside = background(cutting.box).double()
    patches = patches - ((patches * outside).sum((1, 2)) / outside.sum())[:, None, None]
    return -patches if cutting.contrast == "dark" else patches


def background(box: int) -> Tensor:
    """(box, box) float32: 1 where a patch counts as background, else 0."""
    return (centred_radius((box, box)) > BACKGROUND * box / 2).float()


def extract_tilt(image: Tensor, position: Tensor, box: int, binning: int = 1, contrast: str = "dark") -> Tensor:
    """The patches of one tilt image (y, x) around positions (P, 2), see `cut`: (P, box, box) float64."""
    pixels, mean = [image.numpy()] * len(position), image.mean().expand(len(position))
    return cut(pixels, position, mean, Cutting(box, binning, contrast))


@dataclass(frozen=True)
class Levels:
    """Mean and noise of the raw images.

    Attributes:
        mean: (T,) float64, of each image; 0 where a tilt shows no particle.
        noise: (T,) float64, standard deviation of its patches outside the particle; 0 likewise.
    """

    mean: Tensor
    noise: Tensor


def measure(
    images: Stack, patches: Patches, cutting: Cutting, memory: float = math.inf, progress: Progress | None = None
) -> Levels:
    """What the patches of each tilt are scaled by: those of the first `NOISE_SAMPLE` particles that it sees are to have unit
    variance outside the particle, all together.

    Args:
        images: (T, y, x) raw stack, of which each image with a particle is read once, whole.
        memory: bytes to stay within: as many threads work as find room, of those that torch has.
    """
    outside = background(cutting.box).double()

    def one(t: int) -> tuple[float, float]:
        sample = torch.nonzero(patches.visible[:, t])[:NOISE_SAMPLE, 0]
        if not len(sample):
            return 0.0, 0.0
        image = np.asarray(images[t], dtype=np.float32)
        mean = torch.tensor(float(np.float32(image.mean(dtype=np.float64))), dtype=torch.float64)
        found = cut([image] * len(sample), patches.position[sample, t], mean.expand(len(sample)), cutting)
        noise = ((found**2 * outside).sum() / (outside.sum() * len(sample))).sqrt().clamp_min(1e-12)
        return float(mean), float(noise)

    room = BYTES_PER_PIXEL * (math.prod(images.shape[1:]) + NOISE_SAMPLE * cutting.raw_box**2)
    threads = int(max(1, min(torch.get_num_threads(), memory // room)))
    tilts = range(patches.visible.shape[1])
    levels = in_threads(one, tilts, threads)
    shown = progress(tilts, len(tilts), "measure noise") if progress else tilts
    means, noises = zip(*(level for _, level in zip(shown, levels, strict=True)), strict=True)
    return Levels(torch.tensor(means, dtype=torch.float64), torch.tensor(noises, dtype=torch.float64))


@dataclass(frozen=True)
class PatchStack:
    """The patches of a tilt series as a stack that is cut when it is asked for: image number particle·T + tilt.

    `extract` writes its images, and whoever reads them from here gets the same numbers.

    Attributes:
        images: (T, y, x) raw, read where patches are only.
        patches: where they are; an image that is not visible is zero.
    """

    images: Stack
    patches: Patches
    levels: Levels
    cutting: Cutting

    def __len__(self) -> int:
        return self.patches.visible.numel()

    def cut(self, number: NDArray[np.int64]) -> NDArray[np.float16]:
        """Images by number (B,), in any order: (B, box, box). In as many threads as torch has."""
        box = self.cutting.box
        out = np.zeros((len(number), box, box), dtype=np.float16)
        particle, tilt = np.divmod(number, self.patches.visible.shape[1])
        seen = np.flatnonzero(self.patches.visible[particle, tilt].numpy())
        seen = seen[np.argsort(tilt[seen], kind="stable")]  # image by image, as they lie on the disk

        def work(some: NDArray[np.int64]) -> None:
            p, t = torch.from_numpy(particle[some]), torch.from_numpy(tilt[some])
            pixels = [self.images[j] for j in t.tolist()]
            found = cut(pixels, self.patches.position[p, t], self.levels.mean[t], self.cutting)
            out[some] = (found / self.levels.noise[t, None, None]).numpy()

        for _ in in_threads(work, [seen[i : i + AT_ONCE] for i in range(0, len(seen), AT_ONCE)]):
            pass
        return out

    def __getitem__(self, number: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `cut`, in the precision of a stack that is read."""
        return self.cut(number).astype(np.float32)


def patch_stack(file: ParticleFile, raw: RawImages, images: Stack) -> PatchStack:
    """The stack of a particle file, out of the raw images (T, y, x) that its section `raw` tells of."""
    cutting = Cutting(file.box, raw.binning, raw.contrast)
    alignment = Alignment(**{name: getattr(raw, name) for name in GEOMETRY})
    geometry = TiltGeometry.of(alignment, file.tilts.use)
    found = locate([p.centre for p in file.particles], geometry, None, raw.shape[1:], raw.pixel_size, cutting.raw_box)
    places = torch.tensor(image_places(file), dtype=torch.long)
    count = 1 + int(places.max()) if len(places) else 0
    position = torch.zeros((count, *found.position.shape[1:]), dtype=torch.float64)
    visible = torch.zeros((count, len(file.tilts.tilt)), dtype=torch.bool)
    position[places] = found.position
    visible[places] = torch.tensor([p.visible for p in file.particles], dtype=torch.bool).reshape(visible[places].shape)
    defocus = torch.full(visible.shape, math.nan, dtype=torch.float64)
    levels = Levels(*(torch.tensor(v, dtype=torch.float64) for v in (raw.mean, raw.noise)))
    return PatchStack(images, Patches(position, defocus, visible), levels, cutting)


def raw_section(record: TiltSeriesRecord, digest: str, stack: PatchStack) -> RawImages:
    """What a particle file keeps to cut the patches of a stack again.

    Args:
        digest: of the raw stack, see `RawImages.digest`.
    """
    source, alignment = record.source, need(record, "alignment")
    return RawImages(
        stack=source.stack,
        digest=digest,
        shape=source.shape,
        pixel_size=source.pixel_size,
        binning=stack.cutting.binning,
        contrast=source.contrast,
        mean=tuple(stack.levels.mean.tolist()),
        noise=tuple(stack.levels.noise.tolist()),
        **{name: getattr(alignment, name) for name in GEOMETRY},
    )


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
    score, z = (v or (None,) * len(picks.xyz) for v in (picks.score, picks.z))
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
                    z=z[i],
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
        optics=Optics(
            voltage=source.voltage,
            cs=source.cs,
            amplitude_contrast=source.amplitude_contrast,
            beam_tilt=record.ctf.beam_tilt if record.ctf else None,
        ),
        tilts=tilts,
        defocus_handedness=record.ctf.defocus_handedness if record.ctf else -1,
        particles=tuple(particles),
    )


def extract(
    stack: PatchStack, kept: Sequence[int], memory: int, progress: Progress | None = None
) -> Iterator[NDArray[np.float16]]:
    """The patches of a tilt series in the order of the stack, in blocks of particles.

    A block is as large as `memory` allows and changes nothing else.

    Args:
        kept: particles to cut, in order.

    Yields:
        (n·T, box, box); zero where a tilt is not used or does not see the particle.
    """
    tilts, cutting = stack.patches.visible.shape[1], stack.cutting
    spare = memory // 2 - torch.get_num_threads() * AT_ONCE * BYTES_PER_PIXEL * cutting.raw_box**2
    block = max(1, min(MOST_AT_ONCE, int(spare // (2 * tilts * cutting.box**2))))
    starts = range(0, len(kept), block)
    for start in progress(starts, len(starts), "extract") if progress else starts:
        mine = np.asarray(kept[start : start + block], dtype=np.int64)
        yield stack.cut((mine[:, None] * tilts + np.arange(tilts)).reshape(-1))
