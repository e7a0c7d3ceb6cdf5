"""The conventions written out once more, by hand, in numpy: what the tests hold the library to.

Nothing of libemc is used here. A particle is a handful of Gaussian blobs, chiral and without symmetry; its map, its
projections and its transform are closed forms. `HandSeries` makes a tilt series of such particles and writes it, with
its record as JSON text and its stack as MRC bytes, into a project directory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PIXEL = 2.0  # Å
# centres in Å of six blobs in a radius of 19 Å, no plane or axis of symmetry; widths are 1.6 px and more, so that a blob's
# transform is below 4e-6 of its peak at Nyquist and sampling it loses nothing
CENTRES = np.array(
    [[0.0, 0.0, 0.0], [13.0, 0.0, 0.0], [0.0, 17.0, 4.0], [0.0, 0.0, -15.0], [-9.0, -6.0, 12.0], [7.0, -11.0, -6.0]]
)
WIDTHS = np.array([3.6, 3.2, 4.0, 3.4, 3.2, 3.8])
HEIGHTS = np.array([1.0, 0.8, 1.2, 0.9, 1.1, 0.7])


def rx(degrees: float) -> np.ndarray:
    """Standard active rotation about x: y goes to z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def ry(degrees: float) -> np.ndarray:
    """Standard active rotation about y: z goes to x."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def rz(degrees: float) -> np.ndarray:
    """Standard active rotation about z: x goes to y."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def tilt_matrix(axis: float, tilt: float, xtilt: float) -> np.ndarray:
    """Convention 5."""
    return rz(axis) @ ry(tilt) @ rx(xtilt)


def pose(rot: float, tilt: float, psi: float) -> np.ndarray:
    """Convention 9."""
    return rz(-psi) @ ry(-tilt) @ rz(-rot)


def line(n: int, pixel: float = PIXEL) -> np.ndarray:
    """Convention 3: world coordinates of an axis."""
    return (np.arange(n) - n // 2) * pixel


def blobs_map(
    n: int, pixel: float = PIXEL, rotation: np.ndarray | None = None, at: Sequence[float] = (0, 0, 0)
) -> np.ndarray:
    """[z, y, x] (n, n, n): the particle turned by `rotation` with its origin at `at` Å."""
    x = line(n, pixel)
    centres = CENTRES @ (np.eye(3) if rotation is None else rotation).T + np.asarray(at, float)
    out = np.zeros((n, n, n))
    for (cx, cy, cz), width, height in zip(centres, WIDTHS, HEIGHTS, strict=True):
        gx, gy, gz = (np.exp(-((x - c) ** 2) / (2 * width**2)) for c in (cx, cy, cz))
        out += height * gz[:, None, None] * gy[None, :, None] * gx[None, None, :]
    return out


def blobs_image(
    shape: tuple[int, int],
    matrix: np.ndarray,
    at: Sequence[float] = (0, 0),
    magnification: float = 1.0,
    pixel: float = PIXEL,
) -> np.ndarray:
    """[y, x]: the integral along z (in pixels) of the particle turned by `matrix`, its origin seen at `at` Å.

    A magnification scales the image about the particle's origin; heights are kept.
    """
    y, x = line(shape[0], pixel), line(shape[1], pixel)
    out = np.zeros(shape)
    for centre, width, height in zip(CENTRES @ matrix.T * magnification, WIDTHS * magnification, HEIGHTS, strict=True):
        gx = np.exp(-((x - centre[0] - at[0]) ** 2) / (2 * width**2))
        gy = np.exp(-((y - centre[1] - at[1]) ** 2) / (2 * width**2))
        out += height * width / magnification * math.sqrt(2 * math.pi) / pixel * gy[:, None] * gx[None, :]
    return out


def blobs_transform(k: np.ndarray, pixel: float = PIXEL) -> np.ndarray:
    """Transform of the particle's samples at frequencies k (..., 3) in 1/Å."""
    k2 = (k**2).sum(-1)
    out = np.zeros(k.shape[:-1], complex)
    for centre, width, height in zip(CENTRES, WIDTHS, HEIGHTS, strict=True):
        volume = height * (2 * math.pi * width**2) ** 1.5 / pixel**3
        out += volume * np.exp(-2 * math.pi**2 * width**2 * k2 - 2j * math.pi * (k @ centre))
    return out


def frequencies(shape: tuple[int, int], pixel: float = PIXEL) -> tuple[np.ndarray, np.ndarray]:
    """(kx, ky) in 1/Å of the full transform of an image, unshifted."""
    ky, kx = np.meshgrid(np.fft.fftfreq(shape[0], pixel), np.fft.fftfreq(shape[1], pixel), indexing="ij")
    return kx, ky


def wavelength(kilovolt: float) -> float:
    """Å, the usual closed form with volts (Reimer & Kohl, Transmission Electron Microscopy, 5th ed., eq. 2.6)."""
    volts = 1000 * kilovolt
    return 12.2643 / math.sqrt(volts + 0.97845e-6 * volts**2)


def ctf(
    kx: np.ndarray, ky: np.ndarray, u: float, v: float, angle: float, phase: float, kv: float, cs_mm: float, a: float
) -> np.ndarray:
    """Convention 11, with the angle of each frequency by arctan2."""
    lam, k2 = wavelength(kv), kx**2 + ky**2
    alpha = np.arctan2(ky, kx)
    z = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (alpha - math.radians(angle)))
    chi = math.pi * lam * z * k2 - math.pi / 2 * cs_mm * 1e7 * lam**3 * k2**2 + math.radians(phase)
    return math.sqrt(1 - a**2) * np.sin(chi) + a * np.cos(chi)


def exposure(kx: np.ndarray, ky: np.ndarray, dose_at_end: float, kv: float) -> np.ndarray:
    """Convention 14."""
    k = np.maximum(np.hypot(kx, ky), 1e-6)
    critical = (0.245 * k**-1.665 + 2.81) * {300: 1.0, 200: 0.8}[round(kv)]
    return np.exp(-dose_at_end / (2 * critical))


def filtered(image: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """An image with its (full, unshifted) transform multiplied."""
    return np.fft.ifft2(np.fft.fft2(image) * gain).real


def mrc_bytes(array: np.ndarray, pixel: float, stack: bool, mode: int = 2, **changes: int) -> bytes:
    """An MRC2014 file, byte by byte; `changes` are words of the header by number, from 0."""
    nz, ny, nx = array.shape
    words: dict[int, Any] = {0: nx, 1: ny, 2: nz, 3: mode, 7: nx, 8: ny, 9: 1 if stack else nz, 16: 1, 17: 2, 18: 3}
    words |= {10: nx * pixel, 11: ny * pixel, 12: (1 if stack else nz) * pixel, 13: 90.0, 14: 90.0, 15: 90.0}
    words |= {22: 0 if stack else 1, 27: 20141} | {int(k.lstrip("w")): v for k, v in changes.items()}
    header = bytearray(1024)
    for place, value in words.items():
        struct.pack_into("<f" if isinstance(value, float) else "<i", header, 4 * place, value)
    header[208:216] = b"MAP \x44\x44\x00\x00"
    kind = {0: "<i1", 1: "<i2", 2: "<f4", 6: "<u2", 12: "<f2"}[mode]
    return bytes(header) + np.ascontiguousarray(array).astype(kind).tobytes()


@dataclass
class HandSeries:
    """A tilt series of blob particles with everything that the conventions speak of; lengths in Å, angles in degrees.

    Nothing is trivial: the axis is not 0 or 90, there is an off-axis tilt, shifts, magnifications, astigmatism, a phase
    shift, and both sides of the image differ, one even and one odd.
    """

    name: str = "TS_hand"
    shape: tuple[int, int] = (170, 181)  # rows, columns
    pixel: float = PIXEL
    tilts: tuple[float, ...] = (-50.0, -40.0, -30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0, 40.0, 50.0)
    axis: float = -63.0
    xtilt: float = 2.0
    hand: int = -1
    kv: float = 300.0
    cs: float = 2.7
    contrast_fraction: float = 0.07
    defocus: float = 6000.0
    astigmatism: float = 400.0  # U - V
    angle: float = 30.0
    phase: float = 10.0
    dose: float = 1.0
    noise: float = 0.0
    unused: tuple[int, ...] = ()
    particles: int = 9
    magnify: float = 0.02  # the magnifications go from 1 minus this to 1 plus this
    seed: int = 1
    contrast: str = "dark"
    positions: np.ndarray = field(init=False)
    angles: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        ranges = ((-180, 180), (10, 170), (-180, 180))
        self.angles = np.stack([rng.uniform(low, high, self.particles) for low, high in ranges], axis=1)
        side = math.ceil(math.sqrt(self.particles))
        nodes = (np.stack(np.divmod(np.arange(self.particles), side), axis=1) - (side - 1) / 2) * 52.0
        self.positions = np.concatenate([nodes, rng.uniform(-25, 25, (self.particles, 1))], axis=1)
        self.positions[:, :2] += rng.uniform(-3, 3, (self.particles, 2))

    @property
    def count(self) -> int:
        """Tilts."""
        return len(self.tilts)

    @property
    def order(self) -> list[int]:
        """Dose-symmetric: 0 for the lowest tilt."""
        return np.argsort(np.argsort(np.abs(np.array(self.tilts) + 0.1), kind="stable"), kind="stable").tolist()

    @property
    def shifts(self) -> np.ndarray:
        """(T, 2)."""
        j = np.arange(self.count)
        return np.stack([9.3 * np.cos(2.1 * j) + 11, -8.1 * np.sin(1.7 * j) - 9], axis=1)

    @property
    def magnifications(self) -> np.ndarray:
        """(T,)."""
        return np.linspace(1 - self.magnify, 1 + self.magnify, self.count)

    def matrix(self, j: int) -> np.ndarray:
        """T of tilt j."""
        return tilt_matrix(self.axis + 0.2 * j, self.tilts[j], self.xtilt)

    def seen(self, i: int, j: int) -> tuple[np.ndarray, float]:
        """Where tilt j sees the origin of particle i (2,), Å from the image centre, and the defocus there."""
        q = self.matrix(j) @ self.positions[i]
        return self.magnifications[j] * (q[:2] + self.shifts[j]), self.defocus + 30 * j + self.hand * q[2]

    def transfer(self, shape: tuple[int, int], j: int, defocus: float) -> np.ndarray:
        """CTF and dose of tilt j on the full transform of an image."""
        kx, ky = frequencies(shape, self.pixel)
        half = self.astigmatism / 2
        lens = ctf(
            kx, ky, defocus + half, defocus - half, self.angle, self.phase, self.kv, self.cs, self.contrast_fraction
        )
        return lens * exposure(kx, ky, self.dose * (self.order[j] + 1), self.kv)

    def image(self, j: int) -> np.ndarray:
        """[y, x] of tilt j: dark particles (or bright) on a mean of 100, with white noise."""
        out = np.zeros(self.shape)
        for i in range(self.particles):
            at, defocus = self.seen(i, j)
            white = blobs_image(
                self.shape, self.matrix(j) @ pose(*self.angles[i]), at, self.magnifications[j], self.pixel
            )
            out += filtered(white, self.transfer(self.shape, j, defocus))
        rng = np.random.default_rng([self.seed, j])
        return 100 + (out if self.contrast == "bright" else -out) + self.noise * rng.normal(size=self.shape)

    def record(self) -> dict[str, Any]:
        """The record, key by key as design/records.md names them."""
        j = range(self.count)
        u = [self.defocus + 30 * k + self.astigmatism / 2 for k in j]
        return {
            "kind": "tiltseries", "schema": 1, "name": self.name,
            "source": {
                "stack": f"tiltseries/{self.name}.mrc", "shape": [self.count, *self.shape], "pixel_size": self.pixel,
                "voltage": self.kv, "cs": self.cs, "amplitude_contrast": self.contrast_fraction,
                "tilt_axis": self.axis, "contrast": self.contrast,
            },
            "tilts": {
                "nominal": list(self.tilts), "order": self.order, "dose": [self.dose] * self.count,
                "dose_before": [self.dose * k for k in self.order], "use": [k not in self.unused for k in j],
            },
            "alignment": {
                "axis": [self.axis + 0.2 * k for k in j], "tilt": list(self.tilts), "xtilt": [self.xtilt] * self.count,
                "shift_x": self.shifts[:, 0].tolist(), "shift_y": self.shifts[:, 1].tolist(),
                "magnification": self.magnifications.tolist(),
            },
            "ctf": {
                "defocus_u": u, "defocus_v": [value - self.astigmatism for value in u], "angle": [self.angle] * self.count,
                "phase_shift": [self.phase] * self.count, "defocus_handedness": self.hand,
            },
            "picks": {
                "ribo": {
                    "xyz": self.positions.tolist(), "rot": self.angles[:, 0].tolist(),
                    "tilt": self.angles[:, 1].tolist(), "psi": self.angles[:, 2].tolist(),
                }
            },
            "history": [],
        }  # fmt: skip

    def stack(self) -> np.ndarray:
        """[tilt, y, x] float32."""
        return np.stack([self.image(j) for j in range(self.count)]).astype(np.float32)

    def write(self, project: Path, stack: np.ndarray | None = None) -> None:
        """The project's files for this series; `stack` where it has been drawn before."""
        for folder in ("info", "tiltseries"):
            (project / folder).mkdir(exist_ok=True)
        (project / f"tiltseries/{self.name}.mrc").write_bytes(
            mrc_bytes(self.stack() if stack is None else stack, self.pixel, stack=True)
        )
        (project / f"info/{self.name}_info.json").write_text(json.dumps(self.record()))


def shell_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FSC of two cubes, shell by shell over the full transform, in a plain loop."""
    n = a.shape[0]
    k = np.fft.fftfreq(n, 1 / n)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int)
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    values = []
    for s in range(n // 2 + 1):
        x, y = fa[shell == s], fb[shell == s]
        values.append((x * y.conj()).sum().real / math.sqrt((abs(x) ** 2).sum() * (abs(y) ** 2).sum()))
    return np.array(values)


def centre_of_mass(image: np.ndarray) -> np.ndarray:
    """(x, y[, z]) pixels from n//2, of what is above a tenth of the peak."""
    mass = np.where(image > 0.1 * image.max(), image, 0.0)
    grids = np.meshgrid(*[np.arange(n) - n // 2 for n in image.shape], indexing="ij")
    return np.array([(g * mass).sum() / mass.sum() for g in grids])[::-1]
