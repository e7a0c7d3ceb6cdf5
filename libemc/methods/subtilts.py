"""The subtilt series: what flows through the house. Geometry and CTF of tilt series as tensors, particles as arrays, and
batches of band-limited images with the matrix, shift, CTF and weight of each, ready for the forward model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.numerics import ctf as ctf_model
from libemc.numerics import dose as dose_model
from libemc.numerics import slices
from libemc.numerics.rotations import euler_from_matrix, matrix_from_euler, matrix_from_rotvec, tilt_matrices
from libemc.numerics.splines import field_basis
from libemc.records import (
    Alignment,
    Ctf,
    Deformation,
    Particle,
    ParticleFile,
    ParticleTilts,
    Subtilt,
    TiltSeriesRecord,
    image_places,
)

LEAST_NOISE = 1e-4
"""Noise power, over the median of all rings and tilts, below which a ring is taken as empty instead of noiseless."""

DIGITS = {"shift": 3, "turn": 4, "defocus": 1, "weight": 4, "score": 4}
"""Decimals of the corrections of a particle's images: Å, degrees, Å, 1, 1."""

GEOMETRY = ("axis", "tilt", "xtilt", "shift_x", "shift_y", "magnification", "deformation")
"""What of an alignment says where a particle is seen."""

SLOPE_STEP = 1.0
"""Å on each side of a point over which the slope of a deformation field is measured."""

Stack = Any
"""Anything indexed like an array [image, y, x]: a memory map most of the time."""

T = TypeVar("T")


class Progress(Protocol):
    """What shows the user how far a loop is: it passes the items on. The runner's `progress` is one."""

    def __call__(self, iterable: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
        """The items, unchanged."""


def _column(values: Sequence[float] | None, count: int, default: float) -> Tensor:
    return (
        torch.full((count,), default, dtype=torch.float64)
        if values is None
        else torch.tensor(values, dtype=torch.float64)
    )


@dataclass(frozen=True)
class Field:
    """A smooth displacement of the image plane in each tilt (convention 6): what a record's `Deformation` says.

    Attributes:
        nodes: (T, rows * columns, 2) Å along x and y, x fastest, float64.
        extent: Å along x and y that the nodes span, around the image centre.
        rows, columns: nodes along y and x.
    """

    nodes: Tensor
    extent: tuple[float, float]
    rows: int
    columns: int

    @staticmethod
    def of(deformation: Deformation) -> Field:
        """From a record's section."""
        nodes = torch.tensor([deformation.dx, deformation.dy], dtype=torch.float64).permute(1, 2, 0)
        return Field(nodes.contiguous(), deformation.field, deformation.rows, deformation.columns)

    def __call__(self, positions: Tensor) -> Tensor:
        """Displacements (..., T, 2), Å, at image positions (..., T, 2), Å from the image centre."""
        basis = field_basis(positions, self.extent, self.rows, self.columns)
        return torch.einsum("...tk,tki->...ti", basis, self.nodes)


@dataclass(frozen=True)
class TiltGeometry:
    """Where a specimen point is seen in each tilt (conventions 5 to 7), float64.

    Attributes:
        matrices: (T, 3, 3) specimen to image frame.
        shift: (T, 2) Å from the image centre.
        magnification: (T,) scale about the image centre.
        use: (T,) bool.
        deformation: added to the image position after the magnification; None for none.
    """

    matrices: Tensor
    shift: Tensor
    magnification: Tensor
    use: Tensor
    deformation: Field | None = None

    @staticmethod
    def of(alignment: Alignment, use: Sequence[bool]) -> TiltGeometry:
        """From a record's alignment section and its list of used tilts."""
        count = len(alignment.tilt)
        angles = (torch.tensor(v, dtype=torch.float64) for v in (alignment.axis, alignment.tilt, alignment.xtilt))
        shift = torch.tensor([alignment.shift_x, alignment.shift_y], dtype=torch.float64).T
        magnification = _column(alignment.magnification, count, 1.0)
        deformation = None if alignment.deformation is None else Field.of(alignment.deformation)
        return TiltGeometry(tilt_matrices(*angles), shift.contiguous(), magnification, torch.tensor(use), deformation)

    def select(self, tilts: Sequence[int] | Tensor) -> TiltGeometry:
        """The geometry of some tilts only, by number or by a mask (T,) bool."""
        index = torch.as_tensor(tilts)
        field = None if self.deformation is None else replace(self.deformation, nodes=self.deformation.nodes[index])
        return TiltGeometry(self.matrices[index], self.shift[index], self.magnification[index], self.use[index], field)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Image positions (N, T, 2), Å from the image centre, and heights q_z (N, T), Å, of points (N, 3), Å."""
        q = torch.einsum("tij,nj->nti", self.matrices, points.double())
        positions = self.magnification[:, None] * (q[..., :2] + self.shift)
        if self.deformation is not None:
            positions = positions + self.deformation(positions)
        return positions, q[..., 2]

    def around(self, point: Tensor) -> Tensor:
        """How image positions change with the place of a specimen point near `point` (3,), Å.

        Returns:
            (T, 3, 3): rows 0 and 1 are the derivatives of the image position, magnification and the field's slope
            included; row 2 is that of `matrices`.
        """
        local = self.matrices.clone()
        local[:, :2] *= self.magnification[:, None, None]
        if self.deformation is not None:
            undeformed = replace(self, deformation=None).project(point[None])[0][0]
            steps = SLOPE_STEP * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
            d = self.deformation(undeformed + steps[:, None])
            slope = torch.stack([d[0] - d[1], d[2] - d[3]], dim=2) / (2 * SLOPE_STEP)
            local[:, :2] += slope @ local[:, :2]
        return local


def particle_tilts(record: TiltSeriesRecord, alignment: Alignment, ctf: Ctf | None) -> ParticleTilts:
    """What a particle file keeps of its tilt series: geometry, doses and astigmatism, one entry per tilt.

    Without doses in the record they are zero, and no exposure filter is applied to the particles.
    """
    count = record.source.shape[0]
    zeros = (0.0,) * count
    u, v = (ctf.defocus_u, ctf.defocus_v) if ctf else (zeros, zeros)
    return ParticleTilts(
        axis=alignment.axis,
        tilt=alignment.tilt,
        xtilt=alignment.xtilt,
        magnification=alignment.magnification or (1.0,) * count,
        dose=record.tilts.dose or zeros,
        dose_before=record.tilts.dose_before or zeros,
        use=record.tilts.use,
        astigmatism=tuple((a - b) / 2 for a, b in zip(u, v, strict=True)),
        astigmatism_angle=ctf.angle if ctf else zeros,
        phase_shift=ctf.phase_shift if ctf else zeros,
    )


@dataclass(frozen=True)
class SeriesModel:
    """The tilts of one particle file as tensors: everything but the particles.

    Attributes:
        matrices: (T, 3, 3); magnification, dose_end, astigmatism, astigmatism_angle, phase_shift: (T,) float64.
        use: (T,) bool.
        handedness: sign of q_z in the defocus (convention 13).
        premultiplied: the stack's images are already multiplied by the CTF.
    """

    matrices: Tensor
    magnification: Tensor
    dose_end: Tensor
    astigmatism: Tensor
    astigmatism_angle: Tensor
    phase_shift: Tensor
    use: Tensor
    optics: ctf_model.Optics
    handedness: int
    premultiplied: bool

    @staticmethod
    def of(file: ParticleFile) -> SeriesModel:
        """From a particle file."""
        t = file.tilts
        column = {
            name: torch.tensor(getattr(t, name), dtype=torch.float64)
            for name in ("axis", "tilt", "xtilt", "magnification", "astigmatism", "astigmatism_angle", "phase_shift")
        }
        angles = [column.pop(name) for name in ("axis", "tilt", "xtilt")]
        return SeriesModel(
            matrices=tilt_matrices(*angles),
            dose_end=torch.tensor(t.dose, dtype=torch.float64) + torch.tensor(t.dose_before, dtype=torch.float64),
            use=torch.tensor(t.use),
            optics=ctf_model.Optics(file.optics.voltage, file.optics.cs, file.optics.amplitude_contrast),
            handedness=file.defocus_handedness,
            premultiplied=file.ctf_premultiplied,
            **column,
        )


def _lenses(particles: Sequence[Particle], series: SeriesModel) -> Tensor:
    """(N, T, 3) of `Particles.lens`; a view of the tilts' own where no particle has any."""
    names = ("astigmatism", "astigmatism_angle", "phase_shift")
    shared = torch.stack([getattr(series, name) for name in names], dim=-1).expand(len(particles), -1, -1)
    if all(getattr(p, name) is None for p in particles for name in names):
        return shared
    lenses = shared.clone()
    for i, p in enumerate(particles):
        for column, name in enumerate(names):
            own = getattr(p, name)
            if own is not None:
                lenses[i, :, column] = torch.tensor(own, dtype=torch.float64)
    return lenses


@dataclass(frozen=True)
class Corrections:
    """What each image of a particle shows beside what pose and tilt say of it: (N, T, ...) float64.

    Attributes:
        shift: (N, T, 2) Å by which the particle is seen beside where its position is, before the magnification.
        turn: (N, T, 3) degrees, rotation vector in the image's frame: the image shows the particle at exp(turn)·T·R.
        defocus: (N, T) Å, added to that of the particle's place.
        weight: (N, T) of the image, wherever it is compared or averaged; 0: left out.
        score: (N, T) how well it fits, over its tilt's spread; NaN: not known.
    """

    shift: Tensor
    turn: Tensor
    defocus: Tensor
    weight: Tensor
    score: Tensor

    @staticmethod
    def none(count: int, tilts: int) -> Corrections:
        """Nothing to correct; views of single numbers."""
        zero, one, nan = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (0.0, 1.0, float("nan")))
        flat = (count, tilts)
        return Corrections(
            zero.expand(*flat, 2), zero.expand(*flat, 3), zero[0].expand(flat), one[0].expand(flat), nan[0].expand(flat)
        )

    @staticmethod
    def of(particles: Sequence[Particle], tilts: int) -> Corrections:
        """From the particles of a file."""
        if all(p.subtilt is None for p in particles):
            return Corrections.none(len(particles), tilts)
        blank = (0.0,) * tilts
        still = Subtilt(
            dx=blank,
            dy=blank,
            drot=blank,
            dtilt=blank,
            dpsi=blank,
            ddefocus=blank,
            weight=(1.0,) * tilts,
            score=(None,) * tilts,
        )
        found = [p.subtilt or still for p in particles]

        def table(*names: str) -> Tensor:
            return torch.tensor([[getattr(c, n) for n in names] for c in found], dtype=torch.float64).transpose(1, 2)

        scores = torch.tensor([[np.nan if v is None else v for v in c.score] for c in found], dtype=torch.float64)
        turn = table("drot", "dtilt", "dpsi")
        return Corrections(table("dx", "dy"), turn, table("ddefocus")[..., 0], table("weight")[..., 0], scores)

    def to_subtilts(self) -> list[Subtilt | None]:
        """The section of each particle; None where there is nothing to correct."""
        moved = self.shift.any(-1) | self.turn.any(-1) | (self.defocus != 0)
        something = (moved | (self.weight != 1) | torch.isfinite(self.score)).any(1)
        columns = {
            "dx": self.shift[..., 0], "dy": self.shift[..., 1], "drot": self.turn[..., 0], "dtilt": self.turn[..., 1],
            "dpsi": self.turn[..., 2], "ddefocus": self.defocus, "weight": self.weight, "score": self.score,
        }  # fmt: skip
        kinds = ("shift", "shift", "turn", "turn", "turn", "defocus", "weight", "score")

        def one(row: Tensor, digits: int) -> tuple[float | None, ...]:
            return tuple(None if np.isnan(v) else round(v, digits) for v in row.tolist())

        return [
            Subtilt(**{n: one(c[i], DIGITS[k]) for (n, c), k in zip(columns.items(), kinds, strict=True)})  # type: ignore[arg-type]
            if more
            else None
            for i, more in enumerate(something.tolist())
        ]


@dataclass(frozen=True)
class Particles:
    """The particles of one tilt series as arrays, with their stack: (N, ...) float64 unless said otherwise.

    Attributes:
        file: the record they come from.
        stack: array-like (images, box, box), white; `numbers` says which image is whose.
        place: (N,) int64, of each particle's images in the stack, counted in particles.
        rotation: (N, 3, 3) particle to specimen frame.
        xyz, centre: (N, 3) Å; present position, and where the patches are centred.
        defocus: (N, T) Å at `centre`, NaN where not known (no CTF is applied there).
        lens: (N, T, 3) astigmatism (U-V)/2 in Å, its angle and the phase shift in degrees: the particle's, else its tilt's.
        visible: (N, T) bool.
        half: (N,) int64, 1 or 2; use: (N,) bool; score: (N,), NaN where none.
        corrections: of each image.
        weight: (N,) in averages, 0 where left out; reason: of each, why it is not used or has no weight.
    """

    file: ParticleFile
    series: SeriesModel
    stack: Stack
    place: Tensor
    rotation: Tensor
    xyz: Tensor
    centre: Tensor
    defocus: Tensor
    lens: Tensor
    visible: Tensor
    half: Tensor
    use: Tensor
    score: Tensor
    weight: Tensor
    reason: tuple[str | None, ...]
    corrections: Corrections

    @staticmethod
    def of(file: ParticleFile, stack: Stack) -> Particles:
        """From a particle file and its stack."""
        ps, tilts, series = file.particles, len(file.tilts.tilt), SeriesModel.of(file)
        nan = (float("nan"),) * tilts
        return Particles(
            file=file,
            series=series,
            stack=stack,
            place=torch.tensor(image_places(file), dtype=torch.long),
            rotation=matrix_from_euler(
                *(torch.tensor([getattr(p, a) for p in ps], dtype=torch.float64) for a in ("rot", "tilt", "psi"))
            ),
            xyz=torch.tensor([p.xyz for p in ps], dtype=torch.float64).reshape(-1, 3),
            centre=torch.tensor([p.centre for p in ps], dtype=torch.float64).reshape(-1, 3),
            defocus=torch.tensor([p.defocus or nan for p in ps], dtype=torch.float64).reshape(-1, tilts),
            lens=_lenses(ps, series),
            visible=torch.tensor([p.visible for p in ps], dtype=torch.bool).reshape(-1, tilts),
            half=torch.tensor([p.half for p in ps], dtype=torch.long),
            use=torch.tensor([p.use for p in ps], dtype=torch.bool),
            score=torch.tensor([float("nan") if p.score is None else p.score for p in ps], dtype=torch.float64),
            weight=torch.tensor([1.0 if p.weight is None else p.weight for p in ps], dtype=torch.float64),
            reason=tuple(p.reason for p in ps),
            corrections=Corrections.of(ps, tilts),
        )

    def __len__(self) -> int:
        return len(self.rotation)

    def numbers(self, index: Tensor, tilt: Tensor) -> NDArray[np.int64]:
        """Image numbers (B,) in the stack of particles (B,), by place in the file, in tilts (B,)."""
        return (self.place[index] * len(self.series.use) + tilt).numpy()

    def moved(self, rotation: Tensor, xyz: Tensor, score: Tensor) -> Particles:
        """The same particles at other poses."""
        return replace(self, rotation=rotation, xyz=xyz, score=score)

    def using(self, use: Tensor) -> Particles:
        """The same particles, of which others (N,) bool are used."""
        return replace(self, use=use)

    def weighted(self, weight: Tensor, reason: tuple[str | None, ...]) -> Particles:
        """The same particles with other weights; those that are not used keep the reason for that."""
        why = tuple(new if u else old for new, old, u in zip(reason, self.reason, self.use.tolist(), strict=True))
        return replace(self, weight=weight, reason=why)

    def unweighted(self) -> Particles:
        """The same particles, all of weight 1."""
        return self.weighted(torch.ones_like(self.weight), (None,) * len(self))

    def corrected(self, **changes: Tensor) -> Particles:
        """The same particles with other `corrections`: some of its attributes replaced."""
        return replace(self, corrections=replace(self.corrections, **changes))

    def realigned(self) -> Tensor:
        """(N, T, 2) Å: where the tilts' present alignment sees `centre`, beside where it was when the patches were cut; before
        the magnification. A part of `corrections.shift` that is the geometry's."""
        tilts, raw = self.file.tilts, self.file.raw
        if tilts.shift_x is None or tilts.shift_y is None or raw is None:
            return torch.zeros_like(self.corrections.shift)
        cut = {name: getattr(raw, name) for name in GEOMETRY}
        old = TiltGeometry.of(Alignment(**cut | {"deformation": None}), tilts.use)
        shift = torch.tensor([tilts.shift_x, tilts.shift_y], dtype=torch.float64).T
        new = replace(old, matrices=self.series.matrices, magnification=self.series.magnification, shift=shift)
        apart = new.project(self.centre)[0] - old.project(self.centre)[0]
        return apart / self.series.magnification[:, None]

    @property
    def shown(self) -> Tensor:
        """(N, T) bool: the images that there are, of used tilts, and with a weight."""
        return self.visible & self.series.use & (self.corrections.weight > 0)

    def to_file(self) -> ParticleFile:
        """The record, with the present poses and scores."""
        angles = torch.stack(euler_from_matrix(self.rotation), dim=-1).tolist()
        particles = [
            p.model_copy(
                update={
                    "xyz": tuple(xyz),
                    "rot": a[0],
                    "tilt": a[1],
                    "psi": a[2],
                    "score": None if np.isnan(score) else score,
                    "weight": None if weight == 1 else weight,
                    "reason": reason,
                    "subtilt": subtilt,
                }
            )
            for p, xyz, a, score, weight, reason, subtilt in zip(
                self.file.particles,
                self.xyz.tolist(),
                angles,
                self.score.tolist(),
                self.weight.tolist(),
                self.reason,
                self.corrections.to_subtilts(),
                strict=True,
            )
        ]
        return self.file.model_copy(update={"particles": tuple(particles)})


@dataclass(frozen=True)
class Detail:
    """More of a batch's images, where it was asked for.

    Attributes:
        values, transfer: (B, K) complex64 and float32, what the batch's are with the CTF's slope by defocus (1/Å) in the place
            of the CTF; None of premultiplied images, which don't tell.
        power: (B,) mean power of the whitened image's coefficients: 1 where it is all noise.
    """

    values: Tensor | None
    transfer: Tensor | None
    power: Tensor

    def only(self, images: Tensor, coefficients: Tensor | slice = slice(None)) -> Detail:
        """Of some images and coefficients; the power stays that of all coefficients."""
        if self.values is None or self.transfer is None:
            return Detail(None, None, self.power[images])
        return Detail(self.values[images][:, coefficients], self.transfer[images][:, coefficients], self.power[images])


@dataclass(frozen=True)
class Batch:
    """Images of some particles within a band, ready for the forward model. B images of P particles.

    Attributes:
        values: (B, K) complex64, white: the images' coefficients times CTF·dose (CTF already in, if premultiplied).
        transfer: (B, K) float32, CTF·dose.
        tilt_matrices: (B, 3, 3) T of each image, turned by its correction.
        shift: (B, 2) pixels: where the particle's present position is seen in its patch.
        magnification: (B,).
        owner: (B,) which particle of the batch; tilt: (B,) which tilt.
        rotation: (P, 3, 3); index: (P,) place in the particle file.
        detail: None where it wasn't asked for.
    """

    values: Tensor
    transfer: Tensor
    tilt_matrices: Tensor
    shift: Tensor
    magnification: Tensor
    owner: Tensor
    tilt: Tensor
    rotation: Tensor
    index: Tensor
    band: slices.Band
    detail: Detail | None = None

    def matrices(self, rotation: Tensor | None = None) -> Tensor:
        """(B, 3, 3) M = T·R of every image, at the batch's rotations or others (P, 3, 3)."""
        r = self.rotation if rotation is None else rotation
        return self.tilt_matrices @ r[self.owner]

    def centred(self, shift: Tensor | None = None) -> Tensor:
        """(B, K) values with the particle brought to the centre of its box; `shift` (B, 2) px in place of the batch's."""
        s = self.shift if shift is None else shift
        return self.values * slices.shift_phases(-s, self.band)

    def some(self, chosen: Tensor) -> Batch:
        """The images of some particles only, (P',) int64 in ascending order."""
        number = torch.full((len(self.rotation),), -1)
        number[chosen] = torch.arange(len(chosen))
        mine = number[self.owner] >= 0
        return Batch(
            self.values[mine],
            self.transfer[mine],
            self.tilt_matrices[mine],
            self.shift[mine],
            self.magnification[mine],
            number[self.owner[mine]],
            self.tilt[mine],
            self.rotation[chosen],
            self.index[chosen],
            self.band,
            self.detail and self.detail.only(mine),
        )


def narrowed(batch: Batch, band: slices.Band) -> Batch:
    """The same images within a smaller band."""
    keep = batch.band.radii < band.radius
    detail = batch.detail and batch.detail.only(torch.arange(len(batch.owner)), keep)
    return replace(batch, values=batch.values[:, keep], transfer=batch.transfer[:, keep], band=band, detail=detail)


def transfer_function(
    series: SeriesModel,
    tilt: Tensor,
    defocus: Tensor,
    lens: Tensor,
    band: slices.Band,
    pixel_size: float,
    by_defocus: bool = False,
) -> Tensor:
    """CTF·dose of images: (B, K) float32.

    Args:
        tilt: (B,) which tilt each image is.
        defocus: (B,) Å, mean of U and V; NaN: no CTF (1).
        lens: (B, 3) astigmatism, its angle and phase shift, as `Particles.lens`.
        by_defocus: its derivative by the defocus instead, 1/Å.
    """
    kx, ky = band.frequencies(pixel_size)
    at = lens.float()[..., None].unbind(1)
    known = torch.isfinite(defocus)
    z = torch.where(known, defocus, torch.zeros_like(defocus))[:, None].float()
    curve = ctf_model.ctf_by_defocus if by_defocus else ctf_model.ctf
    c = curve(kx, ky, z + at[0], z - at[0], at[1], at[2], series.optics)
    c = torch.where(known[:, None], c, torch.tensor(0.0 if by_defocus else 1.0, dtype=c.dtype))
    return c * dose_filter(series, band, pixel_size)[tilt]


def dose_filter(series: SeriesModel, band: slices.Band, pixel_size: float) -> Tensor:
    """Exposure filter of each tilt, (T, K) float32."""
    kx, ky = band.frequencies(pixel_size)
    return dose_model.exposure_filter((kx**2 + ky**2).sqrt(), series.dose_end[:, None].float(), series.optics.voltage)


def _read_images(particles: Particles, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images of particles (P,) that are shown: (B, box, box) float32, and which particle (B,) and tilt (B,) each is."""
    owner, tilt = torch.nonzero(particles.shown[index], as_tuple=True)
    numbers = particles.numbers(index[owner], tilt)
    return torch.from_numpy(np.asarray(particles.stack[numbers], dtype=np.float32)), owner, tilt


def load_batch(
    particles: Particles,
    index: Tensor,
    band: slices.Band,
    noise: Tensor | None = None,
    own_noise: bool = False,
    detailed: bool = False,
) -> Batch:
    """Read the used, visible images of some particles from the stack, corrected and weighted as `corrections` say.

    Args:
        index: (P,) places in the particle file.
        band: of the particles' box.
        noise: (T, K) `noise_spectrum`, by which images are whitened; None: the noise is white already.
        own_noise: also divide by how much each particle's own noise differs from that (`own_noise_spectrum`).
        detailed: with `Batch.detail`.
    """
    series, file, own = particles.series, particles.file, particles.corrections
    images, owner, tilt = _read_images(particles, index)
    moved = (particles.xyz - particles.centre)[index][owner]
    q = torch.einsum("bij,bj->bi", series.matrices[tilt], moved)
    at_centre = particles.defocus[index][owner, tilt] + own.defocus[index][owner, tilt]
    defocus = at_centre + series.handedness * q[:, 2]
    lens = particles.lens[index][owner, tilt]
    spectra = slices.spectra_of_images(images, band)
    if file.optics.beam_tilt is not None:
        kx, ky = band.frequencies(file.pixel_size)
        phase = ctf_model.beam_tilt_phase(kx, ky, torch.tensor(file.optics.beam_tilt), series.optics)
        spectra = spectra * torch.polar(torch.ones_like(phase), -phase)
    values = spectra
    weighted = series.premultiplied and noise is not None and is_dose_weighted(noise, series, band, file.pixel_size)
    if weighted:
        series = replace(series, dose_end=torch.zeros_like(series.dose_end))
    transfer = transfer_function(series, tilt, defocus, lens, band, file.pixel_size)
    weight = own.weight[index][owner, tilt].float()[:, None]
    scale = weight if noise is None else weight / noise.float()[tilt]
    if not series.premultiplied:
        values = values * (transfer * scale)
        transfer = transfer * scale.sqrt()
    else:
        values = values * dose_filter(series, band, file.pixel_size)[tilt] * weight
        if noise is not None:
            # images times CTF times a weight w, noise power w² times the typical one: the weight is the signal's too, so it
            # stands in the transfer; the typical power goes, as it does above
            typical = float(noise[series.use].mean())
            values = values / typical
            transfer = transfer * (noise.sqrt() / typical).float()[tilt]
        transfer = transfer * weight.sqrt()
    detail = None
    if detailed:
        white = (spectra.abs() ** 2 if noise is None else spectra.abs() ** 2 / noise.float()[tilt]).mean(1).double()
        detail = Detail(None, None, white)
        if not series.premultiplied:
            plain = transfer_function(series, tilt, defocus, lens, band, file.pixel_size, by_defocus=True)
            detail = Detail(spectra * (plain * scale), plain * scale.sqrt(), white)
    if noise is not None and own_noise:
        expected = noise.float()[tilt]
        if series.premultiplied:
            undamaged = replace(series, dose_end=torch.zeros_like(series.dose_end))
            expected = expected * transfer_function(undamaged, tilt, defocus, lens, band, file.pixel_size) ** 2
        excess = own_noise_spectrum(spectra, expected, owner, len(index), band)[owner]
        values, transfer = values / excess, transfer / excess.sqrt()
        if detail and detail.values is not None and detail.transfer is not None:
            detail = replace(detail, values=detail.values / excess, transfer=detail.transfer / excess.sqrt())
    magnification = series.magnification[tilt]
    shift = (q[:, :2] + own.shift[index][owner, tilt]) * magnification[:, None] / file.pixel_size
    turn = own.turn[index][owner, tilt]
    matrices = series.matrices[tilt]
    return Batch(
        values,
        transfer,
        matrix_from_rotvec(turn) @ matrices if turn.any() else matrices,
        shift,
        magnification,
        owner,
        tilt,
        particles.rotation[index],
        index,
        band,
        detail,
    )


def chunks(index: Tensor, size: int) -> Iterator[Tensor]:
    """Pieces of a list of particles, so that memory is bounded by the chunk and not by the set."""
    for start in range(0, len(index), max(1, size)):
        yield index[start : start + max(1, size)]


def batches_by_half(
    particles: Particles, chosen: Tensor, band: slices.Band, memory: int, progress: Progress | None, label: str
) -> Iterator[tuple[int, Tensor]]:
    """Half (1, 2) and indices of one batch after the other of the chosen (N,) particles, as large as `memory` allows."""
    size = chunk_size(particles, band, memory)
    pieces = [
        (half, piece)
        for half in (1, 2)
        for piece in chunks(torch.nonzero(chosen & (particles.half == half))[:, 0], size)
    ]
    yield from progress(pieces, len(pieces), f"{label} {particles.file.name}") if progress else pieces


def chunk_size(particles: Particles, band: slices.Band, memory: int) -> int:
    """How many particles' images fit into `memory` bytes while they are aligned and inserted.

    Some 120 bytes per coefficient are live at the worst moment (values, transfer, slices with three slopes, Jacobian of
    six columns), and 8 per pixel of the images on the way in.
    """
    tilts = max(1, int(particles.series.use.sum()))
    per_particle = tilts * (120 * len(band.kx) + 12 * band.box**2)
    return max(1, min(512, int(memory // max(1, per_particle))))


def noise_spectrum(particles: Particles, band: slices.Band, most: int = 64) -> Tensor:
    """Noise power of each tilt on rings of one Fourier pixel, read at the coefficients of a band: (T, K) float64.

    The signal of one particle in one tilt is far below the noise, so the images' own power is the noise for weighting's
    sake. For premultiplied images the CTF² they carry is divided out; what is left is the square of whatever else they
    were multiplied by. Rings are averaged with their neighbours, since the innermost hold a few coefficients only.

    Args:
        most: how many particles, spread over the file, are looked at.
    """
    use = torch.nonzero(particles.use)[:, 0]
    some = use[torch.linspace(0, len(use) - 1, min(most, len(use))).round().long()] if len(use) else use
    rings = band.radii.round().long()
    power = torch.zeros(len(particles.series.use), int(rings.max()) + 1, dtype=torch.float64)
    norm = torch.zeros_like(power)
    undamaged = replace(particles.series, dose_end=torch.zeros_like(particles.series.dose_end))
    for piece in chunks(some, 16):
        images, owner, tilt = _read_images(particles, piece)
        if not len(images):
            continue
        weight = torch.ones(len(images), len(rings), dtype=torch.float64)
        if particles.series.premultiplied:
            defocus, lens = particles.defocus[piece][owner, tilt], particles.lens[piece][owner, tilt]
            weight = transfer_function(undamaged, tilt, defocus, lens, band, particles.file.pixel_size).double() ** 2
        for table, part in ((power, slices.spectra_of_images(images, band).abs().double() ** 2), (norm, weight)):
            by_ring = torch.zeros(len(part), table.shape[1], dtype=torch.float64).index_add_(1, rings, part)
            table.index_add_(0, tilt, by_ring)
    power[:, 0], norm[:, 0] = 0.0, 0.0  # the mean of an image is no noise
    power, norm = (_with_neighbours(table) for table in (power, norm))
    known = norm > 0
    spectrum = torch.where(known, power / norm.clamp_min(1e-300), 0.0)
    typical = float(spectrum[known].median()) if known.any() else 1.0
    # a ring without power (blank images, nothing beyond a filter) must not get infinite weight
    spectrum = torch.where(spectrum > LEAST_NOISE * typical, spectrum, typical if typical > 0 else 1.0)
    return spectrum[:, rings]


def own_noise_spectrum(spectra: Tensor, expected: Tensor, owner: Tensor, count: int, band: slices.Band) -> Tensor:
    """Noise power of each particle over that of its tilts, on rings of one Fourier pixel: (P, K) float32, about 1.

    Args:
        spectra: (B, K) complex coefficients of the images; expected: (B, K) their noise power.
        owner: (B,) which of the `count` particles each image is of.
    """
    rings = band.radii.round().long()
    tables = []
    for part in (spectra.abs() ** 2, expected):
        by_particle = torch.zeros(count, len(rings)).index_add_(0, owner, part)
        by_ring = torch.zeros(count, int(rings.max()) + 1).index_add_(1, rings, by_particle)
        by_ring[:, 0] = 0.0  # the mean of an image is no noise
        tables.append(_with_neighbours(by_ring))
    excess = tables[0] / tables[1].clamp_min(1e-30)
    # what is blank is not free of noise
    return torch.where(excess > LEAST_NOISE, excess, torch.ones(()))[:, rings]


def _with_neighbours(table: Tensor) -> Tensor:
    """Sums over each ring and its two neighbours, (T, R)."""
    padded = torch.nn.functional.pad(table, (1, 1))
    return padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]


def is_dose_weighted(noise: Tensor, series: SeriesModel, band: slices.Band, pixel_size: float) -> bool:
    """Whether premultiplied images carry a dose weight already, seen from how their noise (T, K) falls with dose.

    The slope of log noise on the log of the exposure filter squared is 1 where they do, 0 where they do not.
    """
    kx, ky = band.frequencies(pixel_size, torch.float64)
    k = (kx**2 + ky**2).sqrt()
    filters = dose_model.exposure_filter(k, series.dose_end[:, None], series.optics.voltage)
    seen = series.use & (noise > 0).all(dim=1)
    x, y = 2 * filters[seen].log(), noise[seen].log()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return bool((x * y).sum() > 0.5 * (x * x).sum()) and bool((x * x).sum() > 0)
