"""Other packages' particles and points into our records, and our particles into theirs: for the programs that import and
export. Sees formats, records and methods together, as `project` does; the conventions themselves end in `io`.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from libemc import records
from libemc.errors import InputError
from libemc.io import geometry, mrc, relion
from libemc.io.acquisition import Acquisition, read_acquisition
from libemc.io.detect import read_alignment
from libemc.io.files import read_json, read_table, resolve
from libemc.io.picks import read_picks
from libemc.io.star import read_star
from libemc.io.truth import is_truth, read_truth
from libemc.methods import import_series
from libemc.methods.export import image_table
from libemc.methods.simulate import order_of_tilts
from libemc.methods.subtilts import Particles
from libemc.records import Optics, Particle, ParticleFile, ParticleTilts, TiltSeriesRecord, half_of

SAMPLED = 4
"""Particles of each tilt series that the scale of a set is measured on."""
AT_ONCE = 64
"""Images read at once on the way out."""

Images = NDArray[np.float32]


# -------------------------------------------------------------------------------------------- a raw tilt series

ORDERS = {"sequential": "continuous", "dose-symmetric": "dose-symmetric"}
"""Orders of exposure by name, and what the simulator calls them."""
DEFAULT_VOLTAGE = 300.0


@dataclass(frozen=True)
class Told:
    """What the user says of raw stacks; None: what the files say. Å, degrees, e/Å², kV, mm.

    Attributes:
        rawtlt, mdoc: files of angles.
        tilt_start, tilt_step: angle of the first image, and from image to image.
        ignore_header: whether `pixel_size` is taken where files contradict it.
        dose: of each exposure.
        dose_order: a name in `ORDERS`, or a file that lists the order.
        contrast: dark or bright.
        place: "copy" or "link" the stack into the project, or "" to leave it where it is.
    """

    rawtlt: Path | None
    mdoc: Path | None
    tilt_start: float | None
    tilt_step: float | None
    pixel_size: float | None
    ignore_header: bool
    voltage: float | None
    cs: float
    amplitude_contrast: float
    axis: float | None
    dose: float | None
    dose_order: str | None
    contrast: Literal["dark", "bright"]
    place: str

    def __post_init__(self) -> None:
        if (self.tilt_start is None) != (self.tilt_step is None):
            raise InputError("--tilt-start and --tilt-step go together", remedy="give both")
        if self.ignore_header and self.pixel_size is None:
            raise InputError("--ignore-header without --pixel-size", remedy="give the pixel size")


@dataclass(frozen=True)
class RawSeries:
    """A raw stack on its way in: its record with all tilts used, the stack mapped, the files read, what to warn of."""

    record: TiltSeriesRecord
    images: mrc.MrcImages
    files: tuple[Path, ...]
    warnings: tuple[str, ...]

    def looked_at(self, progress: Callable[..., Iterator[NDArray[Any]]]) -> TiltSeriesRecord:
        """The record after a look at every image, spoilt ones marked.

        Raises:
            InputError: no image can be used.
        """
        numbers = [
            import_series.image_statistics(image) for image in progress(self.images.array, label=self.record.name)
        ]
        reasons = import_series.bad_images(numbers, self.record.tilts.nominal)
        if all(reasons):
            raise InputError(f"no image can be used: image 0 is {reasons[0]}", self.images.path, "check the file")
        return self.record.model_copy(update={"tilts": import_series.without_bad(self.record.tilts, reasons)})


def raw_series(path: Path, told: Told, project: Path) -> RawSeries:
    """A raw stack with the files beside it.

    Raises:
        InputError: the stack or a file can't be read or is not of this stack, or they contradict each other.
    """
    images = mrc.open_stack(path, told.pixel_size if told.ignore_header else None)
    if images.shape[0] < 2:
        raise InputError("holds one image", path, "give a stack with an image for each tilt")
    step = None if told.tilt_start is None or told.tilt_step is None else (told.tilt_start, told.tilt_step)
    found = read_acquisition(path, images.shape[0], told.rawtlt, told.mdoc, step)
    tilts, warning = _tilts(found, told)
    sizes = {"--pixel-size": told.pixel_size, str(path): images.pixel_size}
    if found.mdoc and not told.ignore_header:
        sizes[f"the .mdoc of {path.name}"] = found.mdoc.pixel_size
    absolute = Path(os.path.abspath(path))
    origin = str(absolute.relative_to(project) if absolute.is_relative_to(project) else absolute)
    axis = found.mdoc.tilt_axis if told.axis is None and found.mdoc else told.axis
    source = records.Source(
        stack=f"tiltseries/{path.name}" if told.place else origin,
        shape=images.shape,
        pixel_size=import_series.same_pixel_size(sizes),
        voltage=told.voltage or (found.mdoc and found.mdoc.voltage) or DEFAULT_VOLTAGE,
        cs=told.cs,
        amplitude_contrast=told.amplitude_contrast,
        tilt_axis=axis,
        contrast=told.contrast,
        origin=origin,
    )
    record = TiltSeriesRecord(name=path.stem, source=source, tilts=tilts)
    return RawSeries(record, images, found.files, tuple(text for text in (found.ignored, warning) if text))


def _tilts(found: Acquisition, told: Told) -> tuple[records.Tilts, str | None]:
    """Angles, order and doses of a stack, and what to warn of."""
    nominal, mdoc, warning = found.nominal, found.mdoc, None
    order: Sequence[int] | None = None if mdoc is None or mdoc.order is None else mdoc.order.tolist()
    dose: Sequence[float] | None = None if mdoc is None or mdoc.dose is None else mdoc.dose.tolist()
    before = mdoc.dose_before if mdoc and told.dose is None and told.dose_order is None else None
    if told.dose_order in ORDERS:
        order = order_of_tilts(nominal.tolist(), ORDERS[told.dose_order])
    elif told.dose_order is not None:
        try:
            order = import_series.exposure_order([row[0] for row in read_table(told.dose_order)], nominal)
        except InputError as error:
            raise InputError(error.what, error.where or told.dose_order, error.remedy) from None
    if told.dose is not None:
        dose = (told.dose,) * len(nominal)
    if dose is None and before is None:
        warning = "no doses are known: particles and tomograms will not be weighted by dose"
    elif order is None and before is None:
        warning = "the order of exposure is taken for dose-symmetric; --dose-order says otherwise"
        order = order_of_tilts(nominal.tolist())
    return import_series.tilts_section(nominal, order, dose, None if before is None else before.tolist()), warning


# ------------------------------------------------------------------------------------- sections that others found


DISTORTION = 0.01
"""Shear of an .xf from which on it is worth a warning: 1 % moves the edge of a 4k image by 20 pixels."""


def _row(values: ArrayLike) -> tuple[float, ...]:
    return tuple(float(v) for v in np.asarray(values, dtype=np.float64))


def _points(values: NDArray[np.float64]) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(x), float(y), float(z)) for x, y, z in values)


@dataclass(frozen=True)
class Change:
    """What is to be done to a tilt series' record, the line that says so, and what to warn of."""

    apply: Callable[[TiltSeriesRecord], TiltSeriesRecord]
    line: str
    warnings: tuple[str, ...] = ()


def alignment_change(given: Sequence[Path], record: TiltSeriesRecord) -> Change:
    """An alignment, and the CTF where it is said, in the files of another package.

    Raises:
        InputError: files that can't be read, or are of another stack, or leave no tilt to use.
    """
    source = record.source
    aligned, ctf = read_alignment(
        given,
        shape=source.shape[1:],
        pixel_size=source.pixel_size,
        nominal=np.array(record.tilts.nominal),
        name=record.name,
    )
    use = with_alignment(record, aligned, ctf).tilts.use
    if not any(use):
        raise InputError("leaves no tilt to use", given[0], "check that it belongs to the stack")
    warnings: tuple[str, ...] = ()
    if aligned.distortion > DISTORTION:
        warnings = (f"{record.name}: the transforms shear images by {aligned.distortion:.1%}, which is left out",)
    lens = f"defocus {(ctf.defocus_u + ctf.defocus_v).mean() / 2:.0f} Å" if ctf else "no CTF"
    line = (
        f"{record.name}: alignment of {sum(use)}/{len(use)} tilts, {aligned.tilt.min():g} to {aligned.tilt.max():g} "
        f"degrees, axis {np.median(aligned.axis):g}, {lens}"
    )
    return Change(functools.partial(with_alignment, found=aligned, ctf=ctf), line, warnings)


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


def with_picks(record: TiltSeriesRecord, label: str, picks: records.Picks) -> TiltSeriesRecord:
    """The record with these points under a label, in place of what it had there."""
    return record.model_copy(update={"picks": {**record.picks, label: picks}})


def picks_change(
    path: Path, record: TiltSeriesRecord, label: str, class_number: int | None, tomogram: Path | None
) -> Change:
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
    outside = int((np.abs(np.array(picks.xyz)[:, :2]) > half).any(axis=1).sum())
    if outside == len(picks.xyz):
        what = f"has no point within the images of {record.name}"
        raise InputError(what, path, "positions are in Å from the tomogram's centre")
    warnings = (f"{outside} points of {path} lie outside the images of {record.name}",) if outside else ()
    line = f"{record.name}: {len(picks.xyz)} {label}, {'with' if picks.rot else 'without'} angles"
    return Change(functools.partial(with_picks, label=label, picks=picks), line, warnings)


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

    def write(self, target: Path, scale: float, progress: Callable[..., Iterator[Any]]) -> ParticleFile:
        """Write the stack; gives the record that belongs to it."""
        file = self.file.model_copy(update={"stack": str(target)})
        with mrc.StackWriter(target, file.pixel_size, "float16") as writer:
            for block in progress(self.blocks(scale), len(file.particles), file.name):
                writer.append(block)
        return file

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
        if Path(name).name != name:
            raise InputError(f"names a tomogram {name}", path, "a tilt series' name must do as a file name")
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


# ------------------------------------------------------------------------------------------------------------ the way out


def relion31_table(series: Sequence[Particles], stacks: Mapping[str, Path]) -> relion.Particles2D:
    """The used images of a set as 2-D particles of RELION 3.1, tilt series by tilt series.

    What RELION 3.1 has no exposure filter for goes into its B-factor (`export.dose_bfactor`), unless the images are
    multiplied by their CTF already, which then would not hold it.

    Args:
        stacks: where each tilt series' images will be, by name; the order there is that of the table.
    """
    groups: dict[tuple[float, float, float, bool], relion.OpticsGroup] = {}
    columns: dict[str, list[Any]] = defaultdict(list)
    for particles in series:
        file, table = particles.file, image_table(particles)
        lens = file.optics
        key = (lens.voltage, lens.cs, lens.amplitude_contrast, file.ctf_premultiplied)
        if key not in groups:
            name = f"opticsGroup{len(groups) + 1}"
            groups[key] = relion.OpticsGroup(name, file.pixel_size, file.box, *key)
        tilts = table.tilt.tolist()
        columns["image"] += [f"{row:06d}@{stacks[file.name]}" for row in range(1, len(table) + 1)]
        columns["group"] += [list(groups).index(key)] * len(table)
        columns["group_name"] += [file.name] * len(table)
        columns["micrograph"] += [f"{file.name}_{tilt:03d}" for tilt in tilts]
        columns["particle"] += [file.particles[index].id for index in table.particle.tolist()]
        for name in ("rot", "psi", "defocus_u", "defocus_v", "defocus_angle", "phase_shift", "dose_before", "half"):
            columns[name] += getattr(table, name).tolist()
        columns["tilt"] += table.tilt_angle.tolist()
        columns["dx"] += table.shift[:, 0].tolist()
        columns["dy"] += table.shift[:, 1].tolist()
        columns["bfactor"] += [0.0 if file.ctf_premultiplied else b for b in table.bfactor.tolist()]
    values: dict[str, Any] = {name: columns.pop(name) for name in ("image", "group_name", "micrograph", "particle")}
    integers = {name: np.array(columns.pop(name), dtype=np.int64) for name in ("group", "half")}
    values |= integers | {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    return relion.Particles2D(optics=list(groups.values()), **values)


def write_used_images(particles: Particles, target: Path, progress: Callable[..., Iterator[Any]]) -> None:
    """The images of `image_table` in its order, float32 (RELION 3.1 does not read float16)."""
    table = image_table(particles)
    numbers = (table.particle * len(particles.series.use) + table.tilt).numpy()
    pieces = [numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)]
    with mrc.StackWriter(target, particles.file.pixel_size) as writer:
        for piece in progress(pieces, len(pieces), f"write {particles.file.name}"):
            writer.append(np.asarray(particles.stack[piece], np.float32))
