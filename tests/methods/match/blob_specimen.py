"""A particle of Gaussian blobs, and a tilt series of it, for the tests of matching: maps and images by hand.

Voxels are the unit of length of the particle: a map of any rotation at any place is a closed form (`tests/by_hand.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from libemc.methods.match.specimen import Passband
from libemc.methods.match.templates import Template, prepare
from libemc.methods.reconstruct import CtfCorrection, Weighting
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.ctf import Optics
from tests.by_hand import blobs_image, blobs_map, ctf, exposure, frequencies, pose, rx, tilt_matrix

UNIT = 4.0
"""Of the blobs' lengths to a voxel: widths of 0.8 to 1 voxels within a radius of 7."""
PIXEL_SIZE = 1.5  # Å: so fine that the height of a place is seen in its CTF
BOX = 28  # wide: the CTF spreads the blobs' images by 9 pixels
RESOLUTION = 2.5 * PIXEL_SIZE
DIAMETER = 15 * PIXEL_SIZE
TURN = pose(35.0, 70.0, -110.0)
OVER = rx(180.0)


def density(n: int, rotation: np.ndarray | None = None, at: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """(n, n, n) float32: the particle, turned, its origin `at` voxels (x, y, z) from n//2."""
    return torch.from_numpy(blobs_map(n, UNIT, rotation, np.asarray(at) * UNIT)).float()


Kind = Callable[..., Tensor]
"""What makes a map: `density`, or another of its arguments."""


def in_volume(
    shape: tuple[int, int, int],
    places: Sequence[Sequence[float]],
    rotations: Sequence[np.ndarray],
    box: int = 20,
    kind: Kind = density,
) -> np.ndarray:
    """A volume (z, y, x) with a particle at each of places, voxels (x, y, z) from the first, each wholly within."""
    out = np.zeros(shape, np.float32)
    half = box // 2
    for place, rotation in zip(np.asarray(places, float), rotations, strict=True):
        middle = np.rint(place).astype(int)
        part = tuple(slice(c - half, c - half + box) for c in middle[::-1])
        out[part] += kind(box, rotation, tuple(place - middle)).numpy()
    return out


@dataclass(frozen=True)
class Even:
    """Sensitivity of a volume that shows all directions alike, through a band, in noise of variance 1 before it."""

    band: Passband

    def squared(self, shape: Sequence[int]) -> np.ndarray:
        """At the coefficients of a volume."""
        k = np.linalg.norm(
            np.stack(np.meshgrid(*(np.fft.fftfreq(n, PIXEL_SIZE) for n in shape), indexing="ij")), axis=0
        )
        return self.band(torch.from_numpy(k)).numpy() ** 2

    def shown(self, volume: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
        """What is searched, of a specimen (z, y, x), with noise of some deviation before the band."""
        white = noise * np.random.default_rng(seed).normal(size=volume.shape)
        squared = self.squared(volume.shape)
        return np.fft.ifftn(np.fft.fftn(volume) * squared + np.fft.fftn(white) * np.sqrt(squared)).real.astype(
            np.float32
        )

    def weights(self, template: Template) -> Tensor:
        return self.band(template.ball[0].norm(dim=0) / (template.box * PIXEL_SIZE)) ** 2 / template.box

    def norms(self, template: Template, rotations: Tensor) -> Tensor:
        double = torch.where(template.ball[0][2] == 0, 1.0, 2.0)
        energy = template.coefficients(rotations).abs().square() @ (self.weights(template) * double)
        return energy.double().sqrt() / template.box


def wanted() -> Template:
    """The particle as a search prepares it."""
    return prepare(density(24), PIXEL_SIZE, PIXEL_SIZE, RESOLUTION, "blobs")


def balanced(n: int, rotation: np.ndarray | None = None, at: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """As `density`: the particle less itself upside down, whose transform is small where a search is blind."""
    rotation = np.eye(3) if rotation is None else rotation
    return density(n, rotation, at) - density(n, rotation @ OVER, at)


def plain(resolution: float = RESOLUTION, symmetry: str = "c1") -> Template:
    """The balanced particle as a template without a mask: its projections are closed forms."""
    return Template("blobs", balanced(BOX), torch.ones(BOX, BOX, BOX), PIXEL_SIZE, resolution, symmetry)


def matrix(rotation: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rotation)).double()


@dataclass
class BlobSeries:
    """Images of blob particles: an axis far from the axes, an xtilt, shifts, an astigmatic CTF, doses, coloured noise.

    Attributes:
        places: Å from the specimen's centre, (P, 3); turns: R of each.
        noise: standard deviation of the white part of the noise of the first image; it grows from image to image.
    """

    places: list[tuple[float, float, float]] = field(default_factory=list)
    turns: list[np.ndarray] = field(default_factory=list)
    noise: float = 1.0
    shape: tuple[int, int] = (320, 171)
    tilts: tuple[float, ...] = (-50.0, -30.0, -10.0, 5.0, 25.0, 45.0)
    axis: float = -63.0
    xtilt: float = 3.0
    hand: int = -1
    defocus: float = 2500.0
    astigmatism: float = 600.0
    angle: float = 30.0
    dose: float = 2.0
    magnify: float = 0.02
    seed: int = 5

    def tilt_matrix(self, j: int) -> np.ndarray:
        return tilt_matrix(self.axis + 0.3 * j, self.tilts[j], self.xtilt)

    def shift(self, j: int) -> np.ndarray:
        return np.array([6.3 * math.cos(2.1 * j) + 3, -5.1 * math.sin(1.7 * j) - 2])

    def magnification(self, j: int) -> float:
        return 1 + self.magnify * (j / (len(self.tilts) - 1) - 0.5)

    def lens(self, j: int, height: float) -> np.ndarray:
        """CTF of image j at a height, on its full transform."""
        kx, ky = frequencies(self.shape, PIXEL_SIZE)
        middle, half = self.defocus + 100 * j + self.hand * height, self.astigmatism / 2
        return ctf(kx, ky, middle + half, middle - half, self.angle, 10.0, 300.0, 2.7, 0.07)

    def damage(self, j: int) -> np.ndarray:
        return exposure(*frequencies(self.shape, PIXEL_SIZE), self.dose * (j + 1), 300.0)

    def projection(self, j: int, place: tuple[float, float, float], turn: np.ndarray) -> np.ndarray:
        """Image j of one particle, balanced, its CTF in it, without damage."""
        q = self.tilt_matrix(j) @ np.array(place)
        at, scale = self.magnification(j) * (q[:2] + self.shift(j)), self.magnification(j)
        white, less = (
            blobs_image(self.shape, self.tilt_matrix(j) @ r, at / PIXEL_SIZE * UNIT, scale, UNIT)
            for r in (turn, turn @ OVER)
        )
        # the coordinates are scaled and the transform is left (`slices.extract_slices`): the image's integral is kept
        return np.fft.ifft2(np.fft.fft2((white - less) / scale**2) * self.lens(j, q[2])).real

    def noises(self, j: int) -> np.ndarray:
        """White noise, and twice as much that is coarse."""
        white = np.random.default_rng([self.seed, j]).normal(size=self.shape)
        k = np.hypot(*frequencies(self.shape, PIXEL_SIZE))
        gain = self.noise * (1 + 0.2 * j) * (1 + 2 * np.exp(-((k / 0.15) ** 2)))
        return np.fft.ifft2(np.fft.fft2(white) * gain).real

    def image(self, j: int) -> np.ndarray:
        """(y, x), particles bright on a mean of 50."""
        out = sum(
            (self.projection(j, p, r) for p, r in zip(self.places, self.turns, strict=True)), np.zeros(self.shape)
        )
        return 50 + np.fft.ifft2(np.fft.fft2(out) * self.damage(j)).real + self.noises(j)

    @property
    def geometry(self) -> TiltGeometry:
        j = range(len(self.tilts))
        matrices = torch.from_numpy(np.stack([self.tilt_matrix(i) for i in j]))
        shift = torch.from_numpy(np.stack([self.shift(i) for i in j]))
        magnification = torch.tensor([self.magnification(i) for i in j], dtype=torch.float64)
        return TiltGeometry(matrices, shift, magnification, torch.ones(len(self.tilts), dtype=torch.bool))

    @property
    def correction(self) -> CtfCorrection:
        count, half = len(self.tilts), self.astigmatism / 2
        middle = self.defocus + 100 * torch.arange(count, dtype=torch.float64)
        angle, phase = torch.full((count,), self.angle), torch.full((count,), 10.0)
        return CtfCorrection(
            "multiply", middle + half, middle - half, angle, phase, self.hand, Optics(300.0, 2.7, 0.07),
            resolution=RESOLUTION,
        )  # fmt: skip

    @property
    def weighting(self) -> Weighting:
        return Weighting(100.0, self.dose * (1 + torch.arange(len(self.tilts))))


BAND = Passband(RESOLUTION, DIAMETER)
