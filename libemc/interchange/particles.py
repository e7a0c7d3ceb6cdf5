"""Particle sets with their images: on their way in from RELION and Warp, and out as 2-D particles of RELION 3.1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.interchange.series import points, row
from libemc.io import mrc, relion
from libemc.io.files import resolve
from libemc.methods import import_series
from libemc.methods.export import image_table
from libemc.methods.subtilts import Particles
from libemc.records import Optics, Particle, ParticleFile, ParticleSet, ParticleTilts, half_of, save_particles

SAMPLED = 4
"""Particles of each tilt series that the scale of a set is measured on."""
AT_ONCE = 64
"""Images read at once on the way out."""

Images = NDArray[np.float32]


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
    positions = points(series.xyz)
    use = np.ones(count, bool) if tomogram.scale is None else tomogram.scale > 0
    particles = tuple(
        Particle(
            id=ids[i],
            xyz=positions[i],
            centre=positions[i],
            rot=float(series.rot[i]),
            tilt=float(series.tilt[i]),
            psi=float(series.psi[i]),
            half=halves[i],
            parent=series.name[i],
            defocus=None if mean is None else row(mean[i]),
            visible=tuple(int(v) for v in seen[i]),
        )
        for i in range(len(ids))
    )
    tilts = {
        "axis": found.axis,
        "tilt": found.tilt,
        "xtilt": found.xtilt,
        "magnification": found.magnification,
        "dose": dose,
        "dose_before": before,
    }
    if ctf is not None:
        tilts |= {
            "astigmatism": (ctf.defocus_u - ctf.defocus_v) / 2,
            "astigmatism_angle": ctf.angle,
            "phase_shift": ctf.phase_shift,
        }
    return _file(set_name, name, optics, tilts, use & found.use, hand, particles)


def _file(
    set_name: str,
    name: str,
    optics: relion.OpticsGroup,
    tilts: Mapping[str, NDArray[np.float64]],
    use: NDArray[np.bool_],
    hand: Literal[-1, 1],
    particles: tuple[Particle, ...],
) -> ParticleFile:
    """A particle file, its `stack` still to be written.

    Args:
        tilts: (T,) columns of `ParticleTilts`; one that is left out is 0.
    """
    numbers = (column for column in ParticleTilts.model_fields if column != "use")
    columns: dict[str, Any] = {column: row(tilts.get(column, np.zeros(len(use)))) for column in numbers}
    return ParticleFile(
        set=set_name,
        name=name,
        box=optics.box,
        pixel_size=optics.pixel_size,
        ctf_premultiplied=optics.premultiplied,
        optics=Optics(
            voltage=optics.voltage,
            cs=optics.cs,
            amplitude_contrast=optics.amplitude_contrast,
            beam_tilt=optics.beam_tilt,
        ),
        tilts=ParticleTilts(use=tuple(bool(v) for v in use), **columns),
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
    before = np.zeros(1) if flat.dose_before is None else flat.dose_before[rows[:1]]
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
    tilts = {"magnification": np.ones(1), "dose_before": before}
    return _file(set_name, name, optics, tilts, np.ones(1, bool), -1, particles)


@dataclass(frozen=True)
class Incoming:
    """Particles of one tilt series on their way in.

    Attributes:
        file: their record, without its stack.
        block: from a particle's place in the file to its images (T, n, n).
    """

    file: ParticleFile
    block: Callable[[int], Images]

    @property
    def images(self) -> int:
        """How many images the stack will hold."""
        return len(self.file.particles) * len(self.file.tilts.tilt)

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


def common_head(incoming: Sequence[Incoming], path: Path) -> ParticleSet:
    """The set's own record, whose box and pixel size all its particles share.

    Raises:
        InputError: they differ.
    """
    found = {(each.file.box, round(each.file.pixel_size, 4)) for each in incoming}
    if len(found) > 1:
        raise InputError(f"has particles of several boxes or pixel sizes {sorted(found)}", path, "export one at a time")
    file = incoming[0].file
    return ParticleSet(set=file.set, box=file.box, pixel_size=file.pixel_size, symmetry=file.symmetry)


def write_set(
    incoming: Sequence[Incoming],
    targets: Sequence[Path],
    folder: Path,
    head: ParticleSet,
    scale: float,
    progress: Callable[..., Iterator[Any]],
) -> Iterator[str]:
    """Write the stacks of a set, then its records.

    Args:
        targets: the stack of each.
        folder: of the set.
        head: its own record, of `common_head`.
        scale: that all images are multiplied by.

    Yields:
        A line about each tilt series, when its stack is there.
    """
    done = {}
    for each, target in zip(incoming, targets, strict=True):
        file = done[each.file.name] = each.write(target, scale, progress)
        seen = sum(sum(p.visible) for p in file.particles) / len(file.particles)
        count = f"{len(file.particles)} particles, {seen:.1f} tilts each"
        yield f"{file.name}: {count}, box {head.box} at {head.pixel_size:g} Å"
    save_particles(folder, head, done)


# ------------------------------------------------------------------------------------------------------------ the way out


def relion31_table(series: Sequence[Particles], stacks: Mapping[str, Path]) -> relion.Particles2D:
    """The used images of a set as 2-D particles of RELION 3.1, tilt series by tilt series.

    What RELION 3.1 has no exposure filter for goes into its B-factor (`export.dose_bfactor`), unless the images are
    multiplied by their CTF already, which then would not hold it.

    Args:
        stacks: where each tilt series' images will be, by name; the order there is that of the table.
    """
    groups: dict[tuple[float, float, float, bool, tuple[float, float] | None], relion.OpticsGroup] = {}
    columns: dict[str, list[Any]] = defaultdict(list)
    for particles in series:
        file, table = particles.file, image_table(particles)
        lens = file.optics
        key = (lens.voltage, lens.cs, lens.amplitude_contrast, file.ctf_premultiplied, lens.beam_tilt)
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
    numbers = particles.numbers(table.particle, table.tilt)
    pieces = [numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)]
    with mrc.StackWriter(target, particles.file.pixel_size) as writer:
        for piece in progress(pieces, len(pieces), f"write {particles.file.name}"):
            writer.append(np.asarray(particles.stack[piece], np.float32))
