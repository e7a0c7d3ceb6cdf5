"""Other packages' particles and points into our records, and our particles into theirs: for the programs that import and
export. Sees formats, records and methods together, as `project` does; the conventions themselves end in `io`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from libemc import records
from libemc.errors import InputError
from libemc.io import geometry, mrc, relion
from libemc.io.files import read_json, resolve
from libemc.io.picks import read_picks
from libemc.io.star import read_star
from libemc.io.truth import is_truth, read_truth
from libemc.methods import import_series
from libemc.records import Optics, Particle, ParticleFile, ParticleTilts, TiltSeriesRecord, half_of

SAMPLED = 4
"""Particles of each tilt series that the scale of a set is measured on."""
SPARSE = 16
"""Images read at once on the way out."""

Images = NDArray[np.float32]


# -------------------------------------------------------------------------------------- sections of a tilt series


def _row(values: ArrayLike) -> tuple[float, ...]:
    return tuple(float(v) for v in np.asarray(values, dtype=np.float64))


def _points(values: NDArray[np.float64]) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(x), float(y), float(z)) for x, y, z in values)


def with_alignment(record: TiltSeriesRecord, found: geometry.Alignment, ctf: geometry.Ctf | None) -> TiltSeriesRecord:
    """The record with this alignment and, where there is one, CTF; tilts that the alignment left out are unused."""
    magnified = bool(np.any(found.magnification != 1))
    alignment = records.Alignment(
        axis=_row(found.axis),
        tilt=_row(found.tilt),
        xtilt=_row(found.xtilt),
        shift_x=_row(found.shift_x),
        shift_y=_row(found.shift_y),
        magnification=_row(found.magnification) if magnified else None,
    )
    tilts = record.tilts
    use = [bool(kept) for kept in found.use]
    why = [
        reason or (None if kept else "left out by the imported alignment")
        for reason, kept in zip(tilts.reason or (None,) * len(use), use, strict=True)
    ]
    used = tuple(old and kept for old, kept in zip(tilts.use, use, strict=True))
    update: dict[str, Any] = {
        "alignment": alignment,
        "tilts": tilts.model_copy(update={"use": used, "reason": tuple(why)}),
    }
    if ctf is not None:
        old_hand = record.ctf.defocus_handedness if record.ctf else -1
        update["ctf"] = records.Ctf(
            defocus_u=_row(ctf.defocus_u),
            defocus_v=_row(ctf.defocus_v),
            angle=_row(ctf.angle),
            phase_shift=_row(ctf.phase_shift),
            score=None if ctf.score is None else _row(ctf.score),
            resolution=None if ctf.resolution is None else _row(ctf.resolution),
            defocus_handedness=-1 if (ctf.handedness or old_hand) < 0 else 1,
        )
    return record.model_copy(update=update)


def picks_section(found: geometry.Picks, source: str, chosen: NDArray[np.bool_] | None = None) -> records.Picks:
    """Points as a record's picks.

    Args:
        source: the file that they come from.
        chosen: (N,) which of them; None: all.

    Raises:
        InputError: there are none.
    """
    rows = np.ones(len(found.xyz), bool) if chosen is None else chosen
    if not rows.any():
        raise InputError("has no points" if chosen is None else "has no points of that class", source, "check the file")
    columns: dict[str, Any] = {
        name: None if getattr(found, name) is None else _row(getattr(found, name)[rows])
        for name in ("rot", "tilt", "psi", "score")
    }
    return records.Picks(xyz=_points(found.xyz[rows]), source=source, **columns)


def incoming_picks(
    path: Path, record: TiltSeriesRecord, label: str, class_number: int | None, tomogram: Path | None
) -> records.Picks:
    """Points of one tilt series from a file of any kind.

    Args:
        class_number: of a simulator's truth, only the particles of this class.
        tomogram: the map that coordinates in pixels refer to; None: the record's own, where it has just one.

    Raises:
        InputError: not a file of points of this tilt series, none of the class, or all out of the microscope's sight.
    """
    truth = path.suffix.lower() == ".json" and is_truth(read_json(path))
    if class_number is not None and not truth:
        raise InputError("has no classes that --class could choose", path, "leave --class out")
    chosen = None
    if truth:
        simulated = read_truth(path)
        found = simulated.picks
        chosen = None if class_number is None else simulated.classes == class_number
    else:
        shape, pixel_size, centre = _frame(record, tomogram)
        found = read_picks(path, shape=shape, pixel_size=pixel_size, name=record.name, label=label)
        if any(centre) and _in_pixels(path):
            found = replace(found, xyz=found.xyz + np.array(centre))
    picks = picks_section(found, str(path), chosen)
    _, rows, columns = record.source.shape
    half = np.hypot(rows, columns) * record.source.pixel_size / 2
    if not (np.abs(np.array(picks.xyz)[:, :2]) <= half).all(axis=1).any():
        what = f"has no point within the images of {record.name}"
        raise InputError(what, path, "positions are in Å from the tomogram's centre")
    return picks


def _in_pixels(path: Path) -> bool:
    """Whether a file's positions are in pixels of a tomogram."""
    if path.suffix.lower() == ".star":
        return not any("rlnCenteredCoordinateXAngst" in block.columns for block in read_star(path).values())
    return path.suffix.lower() in (".tbl", ".mod")


def _frame(
    record: TiltSeriesRecord, tomogram: Path | None
) -> tuple[tuple[int, int, int] | None, float | None, tuple[float, float, float]]:
    """Shape [z, y, x], pixel size and centre of the tomogram that pixels refer to: the one given, else the only one."""
    nowhere = (0.0, 0.0, 0.0)
    if tomogram is not None:
        images = mrc.open_stack(tomogram)
        listed = (known for known in record.tomograms if os.path.abspath(known.file) == os.path.abspath(tomogram))
        return images.shape, images.pixel_size, next((known.centre for known in listed), nowhere)
    whole = [known for known in record.tomograms if known.half is None]
    if len(whole) == 1:
        return whole[0].shape, whole[0].pixel_size, whole[0].centre
    return None, None, nowhere


# -------------------------------------------------------------------------------------------------------- particles


def _halves(half: NDArray[np.int64], names: Sequence[str]) -> list[Any]:
    """The halves as given where every particle has one, else by name."""
    if np.isin(half, (1, 2)).all():
        return [int(h) for h in half]
    return [half_of(name) for name in names]


def series_file(
    set_name: str, name: str, series: relion.ParticleSeries, optics: relion.OpticsGroup, seen: NDArray[np.bool_]
) -> ParticleFile:
    """The particle file of one tomogram of a set of tilt stacks; its `stack` is still to be written.

    Args:
        series: its particles, of one optics group.
        seen: (N, T) which images there are.

    Raises:
        InputError: the tomogram has no alignment.
    """
    tomogram = series.tomograms[name]
    found, ctf = tomogram.alignment, tomogram.ctf
    if found is None:
        raise InputError(f"{name} has no alignment", None, "export the particles with their tomograms.star")
    count = len(found.tilt)
    zeros = np.zeros(count)
    hand: Literal[-1, 1] = -1 if ctf is None or (ctf.handedness or -1) < 0 else 1
    height = np.einsum("tj,nj->nt", found.matrices()[:, 2], series.xyz)
    mean = None if ctf is None else (ctf.defocus_u + ctf.defocus_v) / 2 + hand * height
    before = zeros if tomogram.dose_before is None else tomogram.dose_before
    dose = zeros
    if tomogram.dose_before is not None:
        dose = np.full(count, tomogram.dose) if tomogram.dose else np.array(import_series.doses_from_before(before))
    ids = [f"{name}.{i:06d}" for i in range(len(series.xyz))]
    halves = _halves(series.half, ids)
    points = _points(series.xyz)
    use = np.ones(count, bool) if tomogram.scale is None else tomogram.scale > 0
    particles = tuple(
        Particle(
            id=ids[i],
            xyz=points[i],
            centre=points[i],
            rot=float(series.rot[i]),
            tilt=float(series.tilt[i]),
            psi=float(series.psi[i]),
            half=halves[i],
            parent=series.name[i],
            defocus=None if mean is None else _row(mean[i]),
            visible=tuple(int(v) for v in seen[i]),
        )
        for i in range(len(ids))
    )
    return ParticleFile(
        set=set_name,
        name=name,
        box=optics.box,
        pixel_size=optics.pixel_size,
        ctf_premultiplied=optics.premultiplied,
        optics=Optics(voltage=optics.voltage, cs=optics.cs, amplitude_contrast=optics.amplitude_contrast),
        tilts=ParticleTilts(
            axis=_row(found.axis),
            tilt=_row(found.tilt),
            xtilt=_row(found.xtilt),
            magnification=_row(found.magnification),
            dose=_row(dose),
            dose_before=_row(before),
            use=tuple(bool(v) for v in use & found.use),
            astigmatism=_row(zeros if ctf is None else (ctf.defocus_u - ctf.defocus_v) / 2),
            astigmatism_angle=_row(zeros if ctf is None else ctf.angle),
            phase_shift=_row(zeros if ctf is None else ctf.phase_shift),
        ),
        defocus_handedness=hand,
        particles=particles,
    )


def flat_groups(flat: relion.Particles2D) -> list[NDArray[np.int64]]:
    """The rows of 2-D particles that can share a particle file: those of one optics group and one dose before."""
    dose = np.zeros(len(flat.rot)) if flat.dose_before is None else flat.dose_before
    keys = np.stack([flat.group.astype(np.float64), dose], axis=1)
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [np.flatnonzero(inverse == k) for k in range(int(inverse.max()) + 1)]


def flat_file(
    set_name: str, name: str, flat: relion.Particles2D, rows: NDArray[np.int64], optics: relion.OpticsGroup
) -> ParticleFile:
    """2-D particles as a tilt series of one tilt whose frame is the image's; its `stack` is still to be written.

    The pose is that of the image (T is the identity), the position is where the particle is in its image, and the CTF is
    each particle's own.

    Args:
        rows: which of the particles, one of `flat_groups`.
    """
    zero, one = (0.0,), (1.0,)
    before = zero if flat.dose_before is None else (float(flat.dose_before[rows[0]]),)
    ids = [f"{name}.{i:06d}" for i in range(len(rows))]
    parents = [None if flat.particle is None else flat.particle[row] for row in rows]
    halves = _halves(flat.half[rows], [parent or own for parent, own in zip(parents, ids, strict=True)])
    particles = tuple(
        Particle(
            id=ids[i],
            xyz=(float(flat.dx[row]), float(flat.dy[row]), 0.0),
            centre=(0.0, 0.0, 0.0),
            rot=float(flat.rot[row]),
            tilt=float(flat.tilt[row]),
            psi=float(flat.psi[row]),
            half=halves[i],
            parent=parents[i],
            defocus=(float(flat.defocus_u[row] + flat.defocus_v[row]) / 2,),
            astigmatism=(float(flat.defocus_u[row] - flat.defocus_v[row]) / 2,),
            astigmatism_angle=(float(flat.defocus_angle[row]),),
            phase_shift=(float(flat.phase_shift[row]),),
            visible=(1,),
        )
        for i, row in enumerate(rows)
    )
    return ParticleFile(
        set=set_name,
        name=name,
        box=optics.box,
        pixel_size=optics.pixel_size,
        ctf_premultiplied=optics.premultiplied,
        optics=Optics(voltage=optics.voltage, cs=optics.cs, amplitude_contrast=optics.amplitude_contrast),
        tilts=ParticleTilts(
            axis=zero,
            tilt=zero,
            xtilt=zero,
            magnification=one,
            dose=zero,
            dose_before=before,
            use=(True,),
            astigmatism=zero,
            astigmatism_angle=zero,
            phase_shift=zero,
        ),
        particles=particles,
    )


@dataclass(frozen=True)
class Incoming:
    """Particles of one tilt series on their way in.

    Attributes:
        file: their record, without its stack.
        block: from a particle's place in the file to its images (T, n, n).
    """

    file: ParticleFile
    block: Callable[[int], Images]

    def samples(self) -> Iterator[Images]:
        """Images of some particles, those that are empty left out."""
        count = len(self.file.particles)
        for place in np.linspace(0, count - 1, min(SAMPLED, count)).round():
            images = self.block(int(place))
            yield images[images.any(axis=(1, 2))]

    def blocks(self, scale: float) -> Iterator[NDArray[np.float16]]:
        """All images in the order of the stack, particle by particle, times `scale`."""
        for place, particle in enumerate(self.file.particles):
            try:
                yield import_series.as_float16(self.block(place), scale)
            except InputError as error:
                raise InputError(f"{particle.id} {error.what}", self.file.name, error.remedy) from None


def _tomographic(
    path: Path, tomograms: Path | None, hand: str, set_name: str, symmetry: str, progress: Callable[..., Iterator[int]]
) -> list[Incoming]:
    series = relion.read_particle_series(path, tomograms)
    if not series.tomograms:
        beside = relion.tomograms_beside(path)
        if beside is None:
            raise InputError("does not say where its tomograms are", path, "give their file with --tomograms")
        series = relion.read_particle_series(path, beside)
    if hand == "mirrored" or (hand == "auto" and series.warp):
        series = series.mirrored()
    incoming = []
    for name in dict.fromkeys(series.tomogram):
        own = series.of(name)
        if len(set(own.group.tolist())) > 1:
            raise InputError(f"{name} has particles of several optics groups", path, "export one group at a time")
        first, index = own.open_images(0)
        seen = np.zeros((own.count, len(index)), bool)
        for i in progress(range(own.count), label=f"check {name}"):
            stack, index = own.open_images(i)
            if len(index) != seen.shape[1] or stack.shape[1:] != first.shape[1:]:
                raise InputError("has another shape than the stacks of its tomogram", stack.path, "export it again")
            seen[i] = (index >= 0) & (True if own.visible is None else own.visible[i])
        optics = _settled(own.optics[int(own.group[0])], first)
        file = series_file(set_name, name, own, optics, seen)
        incoming.append(Incoming(file.model_copy(update={"symmetry": symmetry}), _blocks_of(own)))
    return incoming


def _blocks_of(series: relion.ParticleSeries) -> Callable[[int], Images]:
    return lambda place: series.images_of(place)[0]


def _settled(optics: relion.OpticsGroup, images: mrc.MrcImages) -> relion.OpticsGroup:
    """The optics group with the box of the images, and their pixel size where it says none."""
    pixel_size = optics.pixel_size or images.pixel_size
    if not pixel_size:
        raise InputError("has no pixel size, nor has its STAR file", images.path, "add rlnImagePixelSize")
    return replace(optics, box=images.shape[1], pixel_size=pixel_size)


def _flat(path: Path, set_name: str, symmetry: str) -> list[Incoming]:
    flat = relion.read_particles_2d(path)
    groups = flat_groups(flat)
    incoming = []
    for number, rows in enumerate(groups):
        name = set_name if len(groups) == 1 else f"{set_name}_{number:03d}"
        first = mrc.open_stack(resolve(flat.place(int(rows[0]))[0], path))
        optics = _settled(flat.optics[int(flat.group[rows[0]])], first)
        file = flat_file(set_name, name, flat, rows, optics)
        incoming.append(
            Incoming(file.model_copy(update={"symmetry": symmetry}), _images_of(flat, rows, path, optics.box))
        )
    return incoming


def _images_of(flat: relion.Particles2D, rows: NDArray[np.int64], path: Path, box: int) -> Callable[[int], Images]:
    mapped: dict[str, mrc.MrcImages] = {}

    def block(place: int) -> Images:
        name, index = flat.place(int(rows[place]))
        if name not in mapped:
            mapped.clear()  # one stack at a time
            mapped[name] = mrc.open_stack(resolve(name, path))
        stack = mapped[name]
        if index >= stack.shape[0] or stack.shape[1:] != (box, box):
            what = f"has shape {stack.shape}, {path.name} asks for image {index + 1} of {box} x {box}"
            raise InputError(what, stack.path, "export the particles again")
        return np.asarray(stack.array[index : index + 1], np.float32)

    return block


def incoming_particles(
    path: Path,
    set_name: str,
    tomograms: Path | None = None,
    hand: str = "auto",
    symmetry: str = "c1",
    progress: Callable[..., Iterator[int]] = lambda items, **_: iter(items),
) -> list[Incoming]:
    """The particles of a STAR file with their images, by tilt series: RELION 5 and 4, Warp, or 2-D of RELION 3.1.

    Args:
        path: a particle STAR file or an optimisation set.
        tomograms: its tomograms.star, where it neither says nor has it beside it.
        hand: "kept", "mirrored" (specimen and particle, z -> -z), or "auto": what Warp wrote is mirrored. By its
            matrices the particles of its published sets come out as mirror images.
        symmetry: of the particle.
        progress: wraps the loop over the particles' files.

    Raises:
        InputError: a file that is missing or not of its kind, or images that don't fit it.
    """
    if relion.is_tomographic(path):
        return _tomographic(path, tomograms, hand, set_name, symmetry, progress)
    if tomograms is not None or hand != "auto":
        raise InputError("lists 2-D particles, which have neither tomograms nor a hand", path, "leave the options out")
    return _flat(path, set_name, symmetry)


def common_box(incoming: Sequence[Incoming], path: Path) -> tuple[int, float]:
    """The box and pixel size that all particles of a set share.

    Raises:
        InputError: they differ.
    """
    found = {(each.file.box, round(each.file.pixel_size, 4)) for each in incoming}
    if len(found) > 1:
        raise InputError(f"has particles of several boxes or pixel sizes {sorted(found)}", path, "export one at a time")
    return incoming[0].file.box, incoming[0].file.pixel_size
