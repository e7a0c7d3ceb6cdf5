"""Tilt series of amorphous films made with numpy alone: white noise, each pixel imaged at its own defocus, and shot noise.

What is known of the microscope and of the geometry is that of `HandSeries`, written out by hand from the conventions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from libemc.methods.subtilts import TiltGeometry
from libemc.records import TiltSeriesRecord
from tests.by_hand import HandSeries, ctf, frequencies

LAYER = 100.0  # Å of height that are imaged at one defocus: half of it turns 2χ by 0.15 radians at 1/6.3 Å
MARGIN = 60  # pixels around the image, farther than the CTF sends anything


@dataclass
class Film(HandSeries):
    """A film of white noise, `film` Å thick, as large as the images; `signal` is its standard deviation over the shot noise's.

    Attributes:
        drift: Å that the defocus grows by from one tilt to the next.
        jitter: Å, standard deviation of the defocus from tilt to tilt.
        blank: tilts without signal.
    """

    name: str = "TS_01"
    shape: tuple[int, int] = (400, 430)
    pixel: float = 3.0
    tilts: tuple[float, ...] = (-51.0, -34.0, -17.0, 0.0, 17.0, 34.0, 51.0)
    defocus: float = 21000.0
    astigmatism: float = 0.0
    phase: float = 0.0
    magnify: float = 0.0
    film: float = 200.0
    signal: float = 0.7
    drift: float = 30.0
    jitter: float = 0.0
    blank: tuple[int, ...] = ()

    def middle(self, j: int) -> float:
        """Å: the mean defocus of tilt j at the specimen's origin."""
        return self.defocus + self.drift * j + self.jitter * float(np.random.default_rng([self.seed, 9, j]).normal())

    def heights(self, j: int) -> np.ndarray:
        """[y, x] Å: q_z of what the pixels of tilt j (and its margin) show, anywhere in the film."""
        y, x = np.meshgrid(
            *[(np.arange(n + 2 * MARGIN) - MARGIN - n // 2) * self.pixel for n in self.shape], indexing="ij"
        )
        normal = self.matrix(j)[:, 2]
        seen_x, seen_y = (
            p / self.magnifications[j] - s for p, s in zip((x, y), self.shifts[j], strict=True)
        )  # q·normal = 0 on the middle plane
        plane = -(normal[0] * seen_x + normal[1] * seen_y) / normal[2]
        rng = np.random.default_rng([self.seed, 2, j])
        return plane + self.film / normal[2] * (rng.random(plane.shape) - 0.5)

    def image(self, j: int) -> np.ndarray:
        """[y, x] of tilt j."""
        rng = np.random.default_rng([self.seed, j])
        noise = 0.0 if np.isinf(self.signal) else 1.0
        signal = 1.0 if np.isinf(self.signal) else self.signal * (j not in self.blank)
        height = self.heights(j)
        layer = np.round(height / LAYER).astype(int)
        source, shape = rng.normal(size=height.shape), height.shape
        kx, ky = (k[:, : shape[1] // 2 + 1] for k in frequencies(shape, self.pixel))
        kx, half, total = np.abs(kx), self.astigmatism / 2, np.zeros(kx.shape, complex)
        for one in np.unique(layer):
            z = self.middle(j) + self.hand * LAYER * one
            lens = ctf(kx, ky, z + half, z - half, self.angle, self.phase, self.kv, self.cs, self.contrast_fraction)
            total += lens * np.fft.rfft2(np.where(layer == one, source, 0.0))
        inside = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
        return 100 + signal * np.fft.irfft2(total, s=shape)[inside] + noise * rng.normal(size=self.shape)

    def record(self) -> dict[str, Any]:
        """As it is after the alignment."""
        content = super().record()
        del content["ctf"], content["picks"]
        return content

    def typed(self) -> TiltSeriesRecord:
        """The record as the library has it."""
        return TiltSeriesRecord.model_validate(self.record())

    def geometry(self) -> TiltGeometry:
        """The geometry as the library has it."""
        record = self.typed()
        assert record.alignment is not None
        return TiltGeometry.of(record.alignment, record.tilts.use)

    def load(self, j: int) -> np.ndarray:
        """The images as a method takes them."""
        return self.image(j).astype(np.float32)
