"""The simulator: tilt series of known particles in ice, with all that a microscope does to them, and the truth.

The image of tilt j is drawn from a Poisson distribution of mean

    dose · pixel area · exp(-path through the ice / mean free path) · beads · (1 - Σ particles - ice)

with each particle's contrast 2·σ·∫potential, seen through the CTF at its own height and the dose it has received
(conventions 5, 8, 12 to 14). Particles and ice are weak phase objects; gold beads are strong ones, imaged as waves.
`lay_out` decides every number (a `Scene`); `tilt_images` makes the images of a scene; neither knows a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.phantom import ICE_POTENTIAL
from libemc.numerics import fourier, grids, slices
from libemc.numerics.ctf import Optics, beam_tilt_phase, ctf, phase_aberration, wavelength
from libemc.numerics.dose import exposure_filter
from libemc.numerics.rotations import matrix_from_quaternion, tilt_matrices

Array = NDArray[np.float64]

INTERIOR = 1.8  # V: protein above ice, smoothed over `INTERIOR_WIDTH`, weighed with itself (what `phantom` has)
INTERIOR_WIDTH = 5.0  # Å
REST_ENERGY = 510.99895  # keV of the electron (CODATA 2018)
MEAN_FREE_PATH = 3500.0  # Å at 300 kV: inelastic scattering in vitreous ice, removed by an energy filter
ICE_DENSITY = 0.0311  # water molecules per Å³ at 0.93 g/cm³
ICE_COMPRESSION = 0.06  # structure factor of water at low frequency (compressibility limit)
ICE_PEAK, ICE_PEAK_AT, ICE_PEAK_WIDTH = 1.5, 0.27, 0.05  # its first diffraction ring: height, 1/Å, 1/Å
LAYER_PHASE = 0.5  # rad: ice is seen in layers so thin that the CTF's phase changes less than this within half of one
GOLD_POTENTIAL = 25.0  # V above ice
GOLD_ABSORPTION = 200.0  # Å of gold that let 1/e of the electrons pass the aperture
BEAM_BLOCKED = 0.01  # of the intensity is left in a dark image
STAGE_JUMP = 0.35  # of the field by which the stage moves in a jumped image
BAD_KINDS = ("dark", "blank", "jump", "duplicate")
ORDERS = ("dose-symmetric", "bidirectional", "continuous")
ROOM = 1.3  # of a box over the diameter of the particle in it
BOX_SHARE = 0.75  # of a map's box that its particle is taken to fill
SECONDS_PER_PIXEL, SECONDS_PER_PATCH_PIXEL = 3e-7, 1.1e-7  # measured on one core of a small server
SLICE_PADDING = 1.5  # of the particle's box; what the CTF needs around it counts as padding too
PROBES = 100  # points of the slab whose way through the images is part of the truth
PROBED = 0.8  # of its sides within which they lie
FIRST_TRIES, PLACING_TRIES = 16, 2000  # random places tried for each particle before the field counts as full


@dataclass(frozen=True)
class Acquisition:
    """How the stage and the beam went.

    Attributes:
        tilts: nominal angles in the order of the stack, degrees; taken: when each was taken, 0 is the first.
        dose: e/Å² of each tilt.
        axis, xtilt: degrees; axis_error, tilt_error: their spread from tilt to tilt, degrees rms.
        drift: Å rms (x and y each) by which the stage wanders between exposures; jitter: Å rms that doesn't add up.
        bad: (index in the stack, one of `BAD_KINDS`); a duplicate shows what was taken just before it once more.
        magnification: rms by which it changes, smoothly with the tilt and the time.
    """

    tilts: tuple[float, ...]
    taken: tuple[int, ...]
    dose: float = 3.0
    axis: float = 85.3
    xtilt: float = 0.0
    axis_error: float = 0.0
    tilt_error: float = 0.0
    drift: float = 15.0
    jitter: float = 0.0
    bad: tuple[tuple[int, str], ...] = ()
    magnification: float = 0.0


@dataclass(frozen=True)
class Imaging:
    """What the lenses and the detector do. Lengths in Å, angles in degrees.

    Attributes:
        astigmatism: U - V; angle: from +x to the axis of U.
        defocus_jitter: rms from tilt to tilt.
        phase_shift: of the first exposure; phase_drift: what is added to it by the last, evenly from exposure to exposure.
        handedness: -1 or +1, sign of the defocus along z (convention 13).
        mtf: the detector's modulation transfer at Nyquist, 1 is perfect; Gaussian below. Counting noise stays white.
        beam_tilt: (x, y) mrad, whose phase particles and beads have; the ice would be as random with it as without.
    """

    optics: Optics = field(default_factory=Optics)
    defocus: float = 30000.0
    defocus_jitter: float = 250.0
    astigmatism: float = 300.0
    angle: float = 20.0
    phase_shift: float = 0.0
    handedness: int = -1
    mtf: float = 1.0
    phase_drift: float = 0.0
    beam_tilt: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Specimen:
    """What is in the ice. Lengths in Å.

    Attributes:
        particles: how many; spacing: least distance of their centres.
        fractions: of each map (class), any scale.
        thickness: of the slab; slab_tilt: its normal is Ry(first)·Rx(second)·z, degrees.
        beads: how many of gold, on both surfaces; bead_radius.
        motion: rms per axis by which a particle moves from one exposure to the next, in 3-D;
            motion_range: distance over which neighbours, beads too, move together, 0: each particle alone.
        ice: strength of the ice's own structure: 1 as in nature, 0 none.
        margin: by which particles and beads lie beyond the field on all sides; a tilted image shows more than the field.
    """

    particles: int = 50
    spacing: float = 270.0
    fractions: tuple[float, ...] = (1.0,)
    thickness: float = 800.0
    slab_tilt: tuple[float, float] = (0.0, 0.0)
    beads: int = 0
    bead_radius: float = 50.0
    motion: float = 0.5
    motion_range: float = 0.0
    ice: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Every number of a simulation. Positions in Å from the origin; T tilts, P particles, B beads, K probes.

    Attributes:
        shape: (y, x) pixels of the images that are written; pixel_size of these.
        oversampling: the detector's pixels are this much smaller, and binned by cropping in Fourier space.
        tilt, axis: (T,) true angles; shift: (T, 2); magnification, defocus: (T,).
        positions: (P, 3); rotations: (P, 3, 3); classes: (P,); motion: (P, T, 3).
        beads: (B, 3); bead_motion: (B, T, 3).
        probes: (K, 3) random points of the slab within the field, by which an alignment can be judged; probe_motion: (K, T, 3).
    """

    acquisition: Acquisition
    imaging: Imaging
    specimen: Specimen
    shape: tuple[int, int]
    pixel_size: float
    oversampling: int
    seed: int
    tilt: Array
    axis: Array
    shift: Array
    magnification: Array
    defocus: Array
    positions: Array
    rotations: Array
    classes: NDArray[np.int64]
    motion: Array
    beads: Array
    bead_motion: Array
    probes: Array
    probe_motion: Array

    @property
    def tilt_matrices(self) -> Array:
        """(T, 3, 3) specimen to image."""
        return tilt_matrices(torch.from_numpy(self.axis), torch.from_numpy(self.tilt), self.acquisition.xtilt).numpy()

    @property
    def phase_shift(self) -> Array:
        """(T,) degrees."""
        time = np.array(self.acquisition.taken) / max(len(self.acquisition.taken) - 1, 1)
        return self.imaging.phase_shift + self.imaging.phase_drift * time

    def seen(self, j: int, points: Array | None = None) -> Array:
        """Where tilt j sees points (N, 3), or the particles after their motion: (N, 3), Å from the image centre, and q_z."""
        q = (self.positions + self.motion[:, j] if points is None else points) @ self.tilt_matrices[j].T
        q[:, :2] = self.magnification[j] * (q[:, :2] + self.shift[j])
        return q

    def truth(self) -> dict[str, Any]:
        """All of it under the names of the truth files: `astig` is U - V, `pos2d_px` counts from the first pixel."""
        a, i, s = self.acquisition, self.imaging, self.specimen
        tilts = range(len(a.tilts))
        seen = np.stack([self.seen(j) for j in tilts], axis=1)
        probes = np.stack([self.seen(j, self.probes + self.probe_motion[:, j]) for j in tilts], axis=1)
        centre = np.array([self.shape[1] // 2, self.shape[0] // 2])
        return {
            "apix": float(self.pixel_size),
            "field_A": [self.shape[1] * self.pixel_size, self.shape[0] * self.pixel_size],
            "nominal": list(a.tilts),
            "tilt": self.tilt,
            "axis": self.axis,
            "xtilt": a.xtilt,
            "shift_A": self.shift,
            "magnification": self.magnification,
            "defocus": self.defocus,
            "astig": i.astigmatism,
            "astig_ang": i.angle,
            "phase_shift": self.phase_shift,
            "beam_tilt": list(i.beam_tilt),
            "dose": a.dose,
            "acq": list(a.taken),
            "pos_A": self.positions,
            "poses": self.rotations,
            "cls": self.classes,
            "beads_A": self.beads,
            "bead_r": s.bead_radius,
            "bead_motion_A": self.bead_motion,
            "probe_A": self.probes,
            "probe2d_px": probes[..., :2] / self.pixel_size + centre,
            "pos2d_px": seen[..., :2] / self.pixel_size + centre,
            "particle_defocus": self.defocus + i.handedness * seen[..., 2],
            "motion_A": self.motion,
            "slab_tilt": list(s.slab_tilt),
            "thick": s.thickness,
            "kv": i.optics.voltage,
            "cs": i.optics.cs,
            "ac": i.optics.amplitude_contrast,
            "defocus_handedness": i.handedness,
            "mtf": i.mtf,
            "ice": s.ice,
            "bad": [index for index, _ in a.bad],
            "bad_kind": [kind for _, kind in a.bad],
            "nominal_axis": a.axis,
            "nominal_defocus": i.defocus,
            "bin": self.oversampling,
            "seed": self.seed,
        }


# ---------------------------------------------------------------------------------------------------------- deciding


def tilt_angles(first: float, last: float, step: float) -> tuple[float, ...]:
    """Nominal angles from `first` to `last`, degrees.

    Raises:
        InputError: there are none, or they reach 90 degrees.
    """
    if not (step > 0 and -90 < first <= last < 90):
        raise InputError(
            f"no tilt series from {first:g} to {last:g} by {step:g}", remedy="rising angles within 90 degrees"
        )
    return tuple(round(float(first + step * k), 6) for k in range(int((last - first) / step + 1e-6) + 1))


def box_for(diameter: float, pixel_size: float) -> int:
    """Pixels of a box with room to spare around a particle of `diameter` Å."""
    return fourier.good_size(math.ceil(ROOM * diameter / pixel_size))


def order_of_tilts(tilts: Sequence[float], order: str = "dose-symmetric") -> tuple[int, ...]:
    """When each tilt of a stack is taken: 0 is the first.

    Args:
        tilts: degrees, in the order of the stack.
        order: dose-symmetric (from the lowest tilt, to and fro: Hagen et al. 2017), bidirectional (from the lowest up to the
            highest, then down from it) or continuous (as in the stack).

    Raises:
        InputError: there is no such order.
    """
    angles = np.asarray(tilts, float)
    first = int(np.abs(angles).argmin())
    away = angles - angles[first]
    if order == "dose-symmetric":
        sequence = sorted(range(len(angles)), key=lambda k: (round(abs(away[k]), 6), -away[k]))
    elif order == "bidirectional":
        sequence = sorted(range(len(angles)), key=lambda k: (away[k] < 0, abs(away[k])))
    elif order == "continuous":
        sequence = list(range(len(angles)))
    else:
        raise InputError(f"there is no order of tilts '{order}'", remedy=f"there are {', '.join(ORDERS)}")
    return tuple(int(k) for k in np.argsort(sequence))


def _slab(specimen: Specimen) -> Array:
    """(3, 3) rotation of the slab in the specimen frame."""
    about_y, about_x = specimen.slab_tilt
    return tilt_matrices(0.0, about_y, about_x).numpy()


def _place(count: int, half: Array, apart: float, clear: list[tuple[Array, float]], rng: np.random.Generator) -> Array:
    """Random points in a box, each at least `apart` from each other.

    Args:
        count: how many.
        half: (3,) half sizes of the box; a zero keeps the coordinate at zero.
        clear: points (N, 3) to stay clear of, and by how much.

    Returns:
        (count, 3).

    Raises:
        InputError: they don't fit.
    """
    found = np.zeros((0, 3))
    for _ in range(count):
        tries = rng.uniform(-1, 1, (PLACING_TRIES, 3)) * half
        for trial in (tries[:FIRST_TRIES], tries):  # most fit soon
            near = np.zeros(len(trial), dtype=bool)
            for points, distance in [(found, apart), *clear]:
                for chunk in np.array_split(points, len(points) // 256 + 1):
                    near |= (((trial[:, None] - chunk) ** 2).sum(axis=2) < distance**2).any(axis=1)
            if not near.all():
                break
        else:
            size = " x ".join(f"{2 * h:.0f}" for h in half)
            raise InputError(
                f"there is no room for {count} in {size} Å with {apart:.0f} Å between them",
                remedy="ask for fewer, a larger field or a smaller distance",
            )
        found = np.concatenate([found, trial[~near][:1]])
    return found


def _place_beads(specimen: Specimen, half: Array, particles: Array, rng: np.random.Generator) -> Array:
    """Gold beads that touch the surfaces of the slab from within, clear of each other and of the particles: (B, 3)."""
    radius = specimen.bead_radius
    half = np.array([*(half[:2] - radius).clip(min=0), 0])
    found = np.zeros((0, 3))
    for side in rng.permuted(np.arange(specimen.beads) % 2 * 2 - 1):
        surface = np.array([0, 0, side * max(specimen.thickness / 2 - radius, 0.0)])
        clear = [(particles - surface, specimen.spacing / 2 + radius), (found - surface, 4 * radius)]
        found = np.concatenate([found, _place(1, half, 0.0, clear, rng) + surface])
    return found


def _walks(
    specimen: Specimen, acquisition: Acquisition, positions: Array, common: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Random walks along the exposure, in Å and in the order of the stack; the first step is taken.

    Args:
        positions: (P, 3) of particles.
        common: (N, 3) of all else: without a `motion_range` it stands still.

    Returns:
        (P, T, 3) and (N, T, 3). Where neighbours move together, what all of `common` moves by is the stage's, and left out.
    """
    count = len(positions)
    if specimen.motion_range <= 0:
        steps = rng.normal(0, specimen.motion, (len(acquisition.tilts), count, 3))
        steps = np.concatenate([steps, np.zeros((len(steps), len(common), 3))], axis=1)
    else:
        every = np.concatenate([positions, common])
        d2 = ((every[:, None] - every[None]) ** 2).sum(axis=2)
        covariance = np.exp(-d2 / (2 * specimen.motion_range**2)) + 1e-9 * np.eye(len(every))
        steps = rng.normal(0, specimen.motion, (len(acquisition.tilts), len(every), 3))
        steps = np.einsum("pq,tqd->tpd", np.linalg.cholesky(covariance), steps, optimize=True)
        steps -= steps[:, count:].mean(axis=1, keepdims=True)
    walk = np.cumsum(steps, axis=0)[list(acquisition.taken)].transpose(1, 0, 2)
    return walk[:count], walk[count:]


def _magnification(acquisition: Acquisition, rng: np.random.Generator) -> Array:
    """(T,): 1 and a smooth function of tilt and time of the rms asked for, random up to the second power of the tilt."""
    tilt, time = np.array(acquisition.tilts) / 60, np.array(acquisition.taken) / max(len(acquisition.tilts) - 1, 1)
    change = rng.normal(size=3) @ np.stack([tilt, tilt**2, time])
    change -= change.mean()
    spread = math.sqrt(float((change**2).mean()))
    return np.asarray(1 + acquisition.magnification * change / (spread or 1.0))


def lay_out(
    acquisition: Acquisition,
    imaging: Imaging,
    specimen: Specimen,
    shape: tuple[int, int],
    pixel_size: float,
    seed: int,
    oversampling: int = 1,
) -> Scene:
    """Decide every number of a tilt series.

    Args:
        shape: (y, x) pixels of the images.
        pixel_size: Å.
        seed: the same seed gives the same scene.

    Raises:
        InputError: the particles or beads don't fit, or something that can't be asked for.
    """
    tilts = len(acquisition.tilts)
    if sorted(acquisition.taken) != list(range(tilts)):
        raise ValueError("`taken` is no order of the tilts")
    for index, kind in acquisition.bad:
        if not 0 <= index < tilts or kind not in BAD_KINDS:
            raise InputError(
                f"no image {index} can be {kind}", remedy=f"images are 0 to {tilts - 1}, kinds {', '.join(BAD_KINDS)}"
            )
    if len(specimen.fractions) == 0 or min(specimen.fractions) < 0 or sum(specimen.fractions) <= 0:
        raise InputError("the fractions of the classes must be positive", remedy="give one for each map")
    streams = [np.random.default_rng([seed, k]) for k in range(8)]
    steps = streams[0].normal(0, acquisition.drift, (tilts, 2))
    steps[0] = 0
    shift = np.cumsum(steps, axis=0)[list(acquisition.taken)] + streams[0].normal(0, acquisition.jitter, (tilts, 2))
    field_size = np.array([shape[1], shape[0]]) * pixel_size
    for index, kind in acquisition.bad:
        if kind == "jump":
            angle = streams[0].uniform(0, 2 * math.pi)
            shift[index] += STAGE_JUMP * field_size.min() * np.array([math.cos(angle), math.sin(angle)])
    half = np.array([*(field_size / 2 + specimen.margin), max(specimen.thickness - specimen.spacing, 0.0) / 2])
    inside = _place(specimen.particles, half, specimen.spacing, [], streams[1])
    beads = _place_beads(specimen, half, inside, streams[2])
    probes = streams[6].uniform(-PROBED / 2, PROBED / 2, (PROBES, 3)) * np.array([*field_size, specimen.thickness])
    motion, common = _walks(specimen, acquisition, inside, np.concatenate([beads, probes]), streams[5])
    slab = _slab(specimen)
    share = np.cumsum(specimen.fractions) / sum(specimen.fractions)
    classes = np.searchsorted(share, (np.arange(specimen.particles) + 0.5) / max(specimen.particles, 1), side="right")
    return Scene(
        acquisition=acquisition,
        imaging=imaging,
        specimen=specimen,
        shape=shape,
        pixel_size=pixel_size,
        oversampling=oversampling,
        seed=seed,
        tilt=np.array(acquisition.tilts) + streams[3].normal(0, acquisition.tilt_error, tilts),
        axis=acquisition.axis + streams[3].normal(0, acquisition.axis_error, tilts),
        shift=shift,
        magnification=_magnification(acquisition, streams[7]),
        defocus=imaging.defocus + streams[3].normal(0, imaging.defocus_jitter, tilts),
        positions=inside @ slab.T,
        rotations=matrix_from_quaternion(torch.from_numpy(streams[4].normal(size=(specimen.particles, 4)))).numpy(),
        classes=streams[4].permutation(classes).astype(np.int64),
        motion=motion,
        beads=beads @ slab.T,
        bead_motion=common[: len(beads)],
        probes=probes @ slab.T,
        probe_motion=common[len(beads) :],
    )


# ------------------------------------------------------------------------------------------------------------ the maps


def interior(density: Tensor, pixel_size: float) -> float:
    """The typical value inside a particle: of the map smoothed over `INTERIOR_WIDTH`, the mean weighed with itself."""
    radius = grids.rfft_radius(density.shape[-3:]) / pixel_size
    smooth = torch.exp(-2 * math.pi**2 * INTERIOR_WIDTH**2 * radius**2).to(density.dtype)
    value = fourier.irfftn_centred(fourier.rfftn_centred(density, 3) * smooth, density.shape[-3:]).clamp_min(0)
    return float((value**2).sum() / value.sum()) if value.max() > 0 else 0.0


def as_potential(density: Tensor, pixel_size: float, contrast: float = 1.0) -> Tensor:
    """Scale a map of unknown units so that its interior is `contrast` times that of protein above ice, in V.

    Raises:
        InputError: the map is dark, or empty.
    """
    inside = interior(density, pixel_size)
    if not inside > interior(-density, pixel_size):
        raise InputError("the map is not white: protein must be positive, solvent zero", remedy="invert its contrast")
    return density * (contrast * INTERIOR / inside)


# ---------------------------------------------------------------------------------------------------------- the images


def interaction(voltage: float) -> float:
    """Phase shift per potential and length, rad/(V·Å), for a voltage in kV (Kirkland 2010, eq. 5.6)."""
    return 2 * math.pi / (wavelength(voltage) * voltage * 1e3) * (REST_ENERGY + voltage) / (2 * REST_ENERGY + voltage)


def _mean_free_path(voltage: float) -> float:
    """Å; goes as the square of the electrons' speed."""

    def speed2(kv: float) -> float:
        return 1 - 1 / (1 + kv / REST_ENERGY) ** 2

    return MEAN_FREE_PATH * speed2(voltage) / speed2(300.0)


class _Camera:
    """The images of a scene, on the detector's pixels; what is the same for all tilts is made once."""

    def __init__(self, scene: Scene, maps: Sequence[Tensor]) -> None:
        self.scene, self.imaging, self.specimen = scene, scene.imaging, scene.specimen
        self.pixel = scene.pixel_size / scene.oversampling
        self.shape = (scene.shape[0] * scene.oversampling, scene.shape[1] * scene.oversampling)
        self.tilts = scene.tilt_matrices
        self.wavelength = wavelength(self.imaging.optics.voltage)
        self.sigma = interaction(self.imaging.optics.voltage)
        heights = np.abs(self.tilts[:, 2:3, :2]).sum(-1).max() * max(scene.shape) * scene.pixel_size / 2
        highest = abs(self.imaging.defocus) + heights + self.specimen.thickness + 4 * self.imaging.defocus_jitter
        # the CTF sends the highest frequency this far from where it comes
        self.reach = self.wavelength * highest / (2 * self.pixel)
        coma = 3 * self.imaging.optics.cs * 1e7 * self.wavelength**2 * math.hypot(*self.imaging.beam_tilt) * 1e-3
        self.reach += coma / (2 * self.pixel) ** 2  # slope of the phase of `beam_tilt_phase`
        self.volumes, self.bands = [], []
        for density in maps:
            box = fourier.good_size(density.shape[-1] + 2 * math.ceil(self.reach / self.pixel))
            padding = max(1.0, SLICE_PADDING * density.shape[-1] / box)
            padded = fourier.centre_pad(density, (box,) * 3)
            self.volumes.append(slices.FourierVolume.from_map(padded, padding))
            self.bands.append(slices.Band.of(box))

    def _defocus(self, mean: Tensor, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U, V, angle and phase shift of tilt j for a mean defocus of any shape."""
        half, phase = self.imaging.astigmatism / 2, float(self.scene.phase_shift[j])
        return mean + half, mean - half, torch.tensor(self.imaging.angle), torch.tensor(phase)

    def _exposure(self, k: Tensor, j: int) -> Tensor:
        """What damage leaves at the end of exposure j."""
        dose = self.scene.acquisition.dose * (self.scene.acquisition.taken[j] + 1)
        return exposure_filter(k, torch.tensor(dose, dtype=k.dtype), self.imaging.optics.voltage)

    def _coma(self, kx: Tensor, ky: Tensor) -> Tensor:
        """The phase of the beam's tilt, radians."""
        return beam_tilt_phase(kx, ky, torch.tensor(self.imaging.beam_tilt, dtype=kx.dtype), self.imaging.optics)

    def _corner(self, position: Array, box: int) -> tuple[NDArray[np.int64], Array]:
        """First pixel (x, y) of a patch whose origin is the pixel nearest to `position` (N, 2) Å, and what is left, pixels."""
        at = position / self.pixel + np.array([self.shape[1] // 2, self.shape[0] // 2])
        whole = np.rint(at)
        return whole.astype(np.int64) - box // 2, at - whole

    def _window(self, corner: NDArray[np.int64], box: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
        """Where a patch lies in the image, and which part of the patch that is (y, x each); None outside."""
        low = np.maximum(corner, 0)
        high = np.minimum(corner + box, np.array([self.shape[1], self.shape[0]]))
        if (low >= high).any():
            return None
        image = slice(low[1], high[1]), slice(low[0], high[0])
        patch = slice(low[1] - corner[1], high[1] - corner[1]), slice(low[0] - corner[0], high[0] - corner[0])
        return image, patch

    def particles(self, j: int) -> Tensor:
        """Contrast of all particles in tilt j, (y, x): positive where they take electrons away."""
        out = torch.zeros(self.shape)
        seen = self.scene.seen(j)
        for k, (volume, band) in enumerate(zip(self.volumes, self.bands, strict=True)):
            corner, rest = self._corner(seen[:, :2], band.box)
            inside = [self._window(c, band.box) for c in corner]
            mine = [p for p in range(len(seen)) if self.scene.classes[p] == k and inside[p] is not None]
            kx, ky = band.frequencies(self.pixel)
            damage = torch.polar(self._exposure((kx**2 + ky**2).sqrt(), j), self._coma(kx, ky))
            for chunk in np.array_split(mine, max(1, len(mine) // 32)):
                if len(chunk) == 0:
                    continue
                matrices = torch.from_numpy(self.tilts[j] @ self.scene.rotations[chunk])
                height = torch.from_numpy(seen[chunk, 2:])
                mean = (self.scene.defocus[j] + self.imaging.handedness * height).float()
                values = slices.extract_slices(volume, matrices, band)
                values = values * ctf(kx, ky, *self._defocus(mean, j), self.imaging.optics) * damage
                values = values * slices.shift_phases(torch.from_numpy(rest[chunk]), band)
                patches = slices.images_from_band(values, band)
                for p, patch in zip(chunk, patches, strict=True):
                    image, part = inside[p]  # type: ignore[misc]
                    out[image] += patch[part]
        return out * (2 * self.sigma * self.pixel)  # slices are sums over pixels: one pixel size makes them integrals

    def ice(self, j: int, rng: np.random.Generator) -> Tensor:
        """Contrast of the ice's density fluctuations in tilt j, (y, x), layer by layer through a slab of any tilt."""
        normal = self.tilts[j] @ _slab(self.specimen)[:, 2]
        y, x = ((c * self.pixel).float() for c in grids.centred_coordinates(self.shape))
        shift = self.scene.shift[j]
        middle = -(normal[0] * (x - shift[0]) + normal[1] * (y - shift[1])) / normal[2]
        half = self.specimen.thickness / 2 / abs(normal[2])
        low, high = float(middle.min()) - half, float(middle.max()) + half
        thickest = 2 * LAYER_PHASE * (2 * self.pixel) ** 2 / (math.pi * self.wavelength)
        edges = np.linspace(low, high, max(math.ceil((high - low) / thickest), 1) + 1)
        ky, kx = (
            k.double() / (n * self.pixel) for k, n in zip(grids.rfft_frequencies(self.shape), self.shape, strict=True)
        )
        kx, ky = kx.float(), ky.float()
        k = (kx**2 + ky**2).sqrt()
        total = torch.zeros(k.shape, dtype=torch.complex64)
        for bottom, top in pairwise(edges.tolist()):
            path = ((middle + half).clamp_max(top) - (middle - half).clamp_min(bottom)).clamp_min(0)
            noise = torch.from_numpy(rng.standard_normal(self.shape, dtype=np.float32)) * path.sqrt()
            mean = torch.tensor(self.scene.defocus[j] + self.imaging.handedness * (bottom + top) / 2).float()
            total += torch.fft.rfft2(noise) * ctf(kx, ky, *self._defocus(mean, j), self.imaging.optics)
        structure = ICE_COMPRESSION + ICE_PEAK * torch.exp(-((k - ICE_PEAK_AT) ** 2) / (2 * ICE_PEAK_WIDTH**2))
        # molecules in a column of one pixel fluctuate by sqrt(density · area · path · structure); each is a potential of
        # ICE_POTENTIAL / ICE_DENSITY in V·Å³, spread over the pixel's area
        strength = 2 * self.sigma * ICE_POTENTIAL / math.sqrt(ICE_DENSITY) / self.pixel * self.specimen.ice
        return torch.fft.irfft2(total * structure.sqrt(), s=self.shape) * strength

    def beads(self, j: int) -> Tensor:
        """What the gold lets through in tilt j, (y, x), 1 where there is none: |1 + (wave - 1) ⊗ lens|²."""
        out = torch.ones(self.shape)
        if len(self.scene.beads) == 0:
            return out
        radius = self.specimen.bead_radius
        seen = self.scene.seen(j, self.scene.beads + self.scene.bead_motion[:, j])
        box = fourier.good_size(math.ceil(2 * (radius + self.reach) / self.pixel) + 2)
        line = torch.fft.fftfreq(box, self.pixel)
        for position, corner, rest in zip(seen, *self._corner(seen[:, :2], box), strict=True):
            window = self._window(corner, box)
            if window is None:
                continue
            y, x = grids.centred_coordinates((box, box))
            r2 = ((x - rest[0]) ** 2 + (y - rest[1]) ** 2) * self.pixel**2
            path = (2 * (radius**2 - r2).clamp_min(0).sqrt()).float()
            wave = torch.exp(torch.complex(-path / (2 * GOLD_ABSORPTION), self.sigma * GOLD_POTENTIAL * path))
            mean = torch.tensor(self.scene.defocus[j] + self.imaging.handedness * position[2]).float()
            kx, ky = line[None, :], line[:, None]
            chi = phase_aberration(kx, ky, *self._defocus(mean, j), self.imaging.optics) + self._coma(kx, ky)
            lens = torch.polar(torch.ones_like(chi), chi)
            scattered = torch.fft.ifft2(torch.fft.fft2(wave - 1) * lens)
            image, part = window
            out[image] *= ((1 + scattered).abs() ** 2)[part]
        return out

    def expected(self, j: int, rng: np.random.Generator) -> Tensor:
        """Electrons that each pixel of tilt j receives on average, (y, x)."""
        kind = dict(self.scene.acquisition.bad).get(j)
        if kind == "blank":
            return torch.zeros(self.shape)
        normal = self.tilts[j] @ _slab(self.specimen)[:, 2]
        path = self.specimen.thickness / abs(normal[2])
        electrons = self.scene.acquisition.dose * self.pixel**2
        electrons *= math.exp(-path / _mean_free_path(self.imaging.optics.voltage))
        electrons *= BEAM_BLOCKED if kind == "dark" else 1.0
        contrast = self.particles(j)
        if self.specimen.ice > 0:
            contrast += self.ice(j, rng)
        image = (1 - contrast).clamp_min(0) * self.beads(j) * electrons
        if self.imaging.mtf < 1:
            k = grids.rfft_radius(self.shape)
            transfer = torch.exp(math.log(self.imaging.mtf) * (2 * k) ** 2).float()
            image = torch.fft.irfft2(torch.fft.rfft2(image) * transfer, s=self.shape).clamp_min(0)
        return image


def tilt_images(scene: Scene, maps: Sequence[Tensor], noise: bool = True) -> Iterator[NDArray[np.float32]]:
    """The images of a scene in the order of the stack, one at a time.

    Args:
        scene: from `lay_out`.
        maps: one (n, n, n) map in V for each class, at the detector's pixel size (`pixel_size` / `oversampling`).
        noise: count electrons (Poisson), or give their expected number.

    Yields:
        (y, x) float32, electrons per pixel of the written size, protein dark.
    """
    if len(maps) != len(scene.specimen.fractions):
        raise ValueError(f"{len(maps)} maps for {len(scene.specimen.fractions)} classes")
    camera = _Camera(scene, maps)
    taken = scene.acquisition.taken
    for j in range(len(scene.acquisition.tilts)):
        if dict(scene.acquisition.bad).get(j) == "duplicate":
            j = taken.index(taken[j] - 1 if taken[j] else 1)
        rng = np.random.default_rng([scene.seed, 100, j])
        image = camera.expected(j, rng)
        if noise:
            image = torch.from_numpy(rng.poisson(image.numpy()).astype(np.float32))
        if scene.oversampling > 1:
            image = fourier.resize(image, scene.shape) * scene.oversampling**2
        yield image.numpy()


def cost(scene: Scene, box: int) -> tuple[float, float]:
    """Seconds on one core and bytes of memory, roughly, for particles in a box of `box` detector pixels."""
    camera = _Camera(scene, [])
    patch = (box + 2 * camera.reach / camera.pixel) ** 2
    pixels = camera.shape[0] * camera.shape[1]
    seconds = len(scene.tilt) * (SECONDS_PER_PIXEL * pixels + SECONDS_PER_PATCH_PIXEL * patch * len(scene.positions))
    return seconds, 40.0 * pixels + 12 * len(scene.specimen.fractions) * max(SLICE_PADDING * box, patch**0.5) ** 3


def counts(image: NDArray[np.float32], dtype: np.dtype[Any], gain: float) -> NDArray[Any]:
    """Electrons as a detector writes them: times `gain`, rounded and clipped where the type is an integer's."""
    scaled = image * np.float32(gain)
    if dtype.kind == "f":
        return scaled.astype(dtype)
    limits = np.iinfo(dtype)
    return np.rint(scaled).clip(limits.min, limits.max).astype(dtype)


def gain_for(scene: Scene, dtype: np.dtype[Any]) -> float:
    """Gain that keeps eight standard deviations above the open beam within an integer type: 1 wherever that is enough."""
    if dtype.kind == "f":
        return 1.0
    electrons = scene.acquisition.dose * scene.pixel_size**2
    return min(1.0, float(np.iinfo(dtype).max) / (electrons + 8 * math.sqrt(electrons)))
