"""RELION: tomograms and tilt series (RELION 5, Warp), tomographic particle sets, and 2-D particles (RELION 3.1).

RELION 5's angles and shifts are ours as they stand. Its projection matrices, where a file has them instead (Warp's
exports), are taken apart into the same angles. Origins are subtracted. RELION's image centre is n/2 and its tomogram
centre size/2, which is our n//2 for the even sizes that are the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.io.files import StrPath, resolve
from libemc.io.geometry import (
    Alignment,
    Array,
    Ctf,
    euler_from_matrix,
    matrix_from_euler,
    tilt_angles_from_matrix,
)
from libemc.io.mrc import MrcImages, open_stack
from libemc.io.star import block_with, numbers, optional, read_star, texts, vectors, write_star

WARP_SUFFIX = ".tomostar"
"""Warp's tomogram names end so, and its coordinates are in pixels of the exported images, not of the tilt series."""
ORTHONORMAL = 1e-3
"""Largest departure of a projection matrix from rotation times scale: they are written with 7 digits."""


@dataclass(frozen=True, eq=False)
class Tomogram:
    """A tilt series as RELION knows it.

    Attributes:
        name: without Warp's ".tomostar".
        pixel_size: Å, of the tilt series.
        size: (x, y, z) of the unbinned tomogram, px, or None.
        voltage, cs, amplitude_contrast: kV, mm, fraction; None where the file does not say.
        alignment: None where the tilt series has not been aligned.
        ctf: with the handedness of rlnTomoHand, or None.
        nominal: stage angles, degrees, (T,), or None.
        dose: e/Å² per tilt, or None.
        dose_before: e/Å², (T,), or None.
        scale: rlnCtfScalefactor, (T,), or None.
        images: file names of the tilts, or None.
    """

    name: str
    pixel_size: float
    size: tuple[float, float, float] | None
    voltage: float | None
    cs: float | None
    amplitude_contrast: float | None
    alignment: Alignment | None
    ctf: Ctf | None
    nominal: Array | None
    dose: float | None
    dose_before: Array | None
    scale: Array | None
    images: list[str] | None


@dataclass(frozen=True)
class OpticsGroup:
    """One row of an optics table: Å, px, kV, mm, mrad (x, y; None: no beam tilt)."""

    name: str
    pixel_size: float
    box: int
    voltage: float
    cs: float
    amplitude_contrast: float
    premultiplied: bool = False
    beam_tilt: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class ParticleSeries:
    """A tomographic particle set whose particles are stacks of 2-D images, one image per tilt.

    Attributes:
        path: the STAR file.
        tomogram, name: of each particle, N.
        xyz: Å from the tomogram's centre, (N, 3).
        rot, tilt, psi: degrees, (N,), particle to specimen.
        half: 1 or 2, 0 where not assigned, (N,).
        group: index into `optics`, (N,).
        optics: the optics groups.
        images: name of each particle's stack, or None where the set has none.
        visible: per particle (T,) bool, or None.
        tomograms: by name; empty where the set was read without them.
        warp: whether Warp wrote it (by its tomogram names).
    """

    path: Path
    tomogram: list[str]
    name: list[str]
    xyz: Array
    rot: Array
    tilt: Array
    psi: Array
    half: NDArray[np.int64]
    group: NDArray[np.int64]
    optics: list[OpticsGroup]
    images: list[str] | None
    visible: list[NDArray[np.bool_]] | None
    tomograms: dict[str, Tomogram]
    warp: bool = False

    @property
    def count(self) -> int:
        """How many particles."""
        return len(self.tomogram)

    def select(self, which: Sequence[int] | NDArray[np.int64]) -> ParticleSeries:
        """The particles of these indices."""
        rows = np.asarray(which, dtype=np.int64)
        names = ("xyz", "rot", "tilt", "psi", "half", "group")
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        lists: dict[str, Any] = {
            key: None if getattr(self, key) is None else [getattr(self, key)[row] for row in rows]
            for key in ("tomogram", "name", "images", "visible")
        }
        return replace(self, **arrays, **lists)

    def of(self, tomogram: str) -> ParticleSeries:
        """The particles of one tomogram."""
        return self.select([i for i, name in enumerate(self.tomogram) if name == tomogram])

    def open_images(self, particle: int) -> tuple[MrcImages, NDArray[np.int64]]:
        """A particle's stack, mapped, and for each tilt the index of its image in it (-1: not there), (T,).

        Warp writes an image for every tilt, RELION only for the visible ones.

        Raises:
            InputError: no such stack, or one of another number of images.
        """
        if self.images is None:
            raise InputError("has no rlnImageName", self.path, "export the particles with their images")
        stack = open_stack(resolve(self.images[particle], self.path))
        visible = None if self.visible is None else self.visible[particle]
        if visible is None or stack.shape[0] == len(visible):
            return stack, np.arange(stack.shape[0])
        if stack.shape[0] != visible.sum():
            what = f"has {stack.shape[0]} images for {visible.sum()} visible of {len(visible)} tilts"
            raise InputError(what, stack.path, "export the particles again")
        return stack, np.where(visible, np.cumsum(visible) - 1, -1)

    def images_of(self, particle: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """A particle's images, zero where a tilt does not show it, (T, n, n), and which tilts do, (T,).

        Raises:
            InputError: as `open_images`; or the images are not square, or not as many as the tomogram has tilts.
        """
        stack, index = self.open_images(particle)
        seen = index >= 0
        if self.visible is not None:
            seen &= self.visible[particle]
        tomogram = self.tomograms.get(self.tomogram[particle])
        tilts = len(index) if tomogram is None or tomogram.alignment is None else tomogram.alignment.count
        count, rows, columns = stack.shape
        if rows != columns or len(index) != tilts:
            what = f"has {count} images of {columns} x {rows} for {tilts} tilts"
            raise InputError(what, stack.path, "export the particles again")
        images = np.zeros((tilts, rows, rows), np.float32)
        images[seen] = stack.array[index[seen]]
        return images, seen

    def mirrored(self) -> ParticleSeries:
        """The same images explained by the mirror image of specimen and particle, z -> -z.

        Which of the two is real, no image can tell: where a map comes out in the wrong hand, this is the cure.
        """
        flip = np.array([1.0, 1.0, -1.0])
        poses = matrix_from_euler(self.rot, self.tilt, self.psi) * flip[:, None] * flip
        rot, tilt, psi = euler_from_matrix(poses)
        tomograms = {
            name: replace(
                tomogram,
                alignment=None if tomogram.alignment is None else tomogram.alignment.mirrored(),
                ctf=None if tomogram.ctf is None else tomogram.ctf.mirrored(),
            )
            for name, tomogram in self.tomograms.items()
        }
        return replace(self, xyz=self.xyz * flip, rot=rot, tilt=tilt, psi=psi, tomograms=tomograms)


@dataclass(frozen=True, eq=False)
class Particles2D:
    """2-D particle images, as RELION 3.1 lists them, N of each.

    Attributes:
        image: "000001@stack.mrcs".
        rot, tilt, psi: degrees, of the image: the Euler angles of T·R.
        dx, dy: Å, where the particle is from the middle of its image (minus rlnOriginX/YAngst).
        defocus_u, defocus_v, defocus_angle, phase_shift: Å, degrees.
        group: index into `optics`.
        optics: the optics groups.
        half: 1 or 2, 0 where not assigned.
        group_name: rlnGroupName, the tilt series, or None.
        particle: rlnTomoParticleName, the particle that a tilt's image belongs to, or None.
        micrograph: rlnMicrographName, or None.
        scale, bfactor: rlnCtfScalefactor and rlnCtfBfactor (Å²), or None.
        dose_before: rlnMicrographPreExposure, e/Å², or None.
    """

    image: list[str]
    rot: Array
    tilt: Array
    psi: Array
    dx: Array
    dy: Array
    defocus_u: Array
    defocus_v: Array
    defocus_angle: Array
    phase_shift: Array
    group: NDArray[np.int64]
    optics: list[OpticsGroup]
    half: NDArray[np.int64]
    group_name: list[str] | None = None
    particle: list[str] | None = None
    micrograph: list[str] | None = None
    scale: Array | None = None
    bfactor: Array | None = None
    dose_before: Array | None = None

    @property
    def count(self) -> int:
        """How many images."""
        return len(self.image)

    def place(self, row: int) -> tuple[str, int]:
        """The stack that an image is in, as the file names it, and its index there, from 0 ("000001@stack.mrcs": 0).

        Raises:
            InputError: it is no such name.
        """
        number, _, name = self.image[row].rpartition("@")
        if not (number or "1").isdigit() or int(number or 1) < 1 or not name:
            raise InputError(f"{self.image[row]} is no image of a stack", None, "write it as 000001@stack.mrcs")
        return name, int(number or 1) - 1


def _plain(name: str) -> str:
    return name.removesuffix(WARP_SUFFIX)


@dataclass(frozen=True)
class _Frame:
    """What projection matrices are relative to: tomogram (x, y, z) and image (x, y) in px, and Å per px."""

    tomogram: tuple[float, float, float] | None
    image: tuple[int, int] | None
    pixel_size: float


def _from_matrices(table: pd.DataFrame, path: StrPath, frame: _Frame | None) -> Alignment:
    """Alignment of the rlnTomoProj… columns: pixels of the image from pixels of the tomogram, both from the corner.

    Warp leaves the translations out (all 0), and with them both centres.
    """
    rows = [vectors(table, f"rlnTomoProj{row}", path) for row in "XYZ"]
    if {len(vector) for row in rows for vector in row} != {4}:
        raise InputError("has projection matrices that are not of 4 columns", path, "export it again")
    p = np.stack([np.stack(row) for row in rows], axis=1)
    linear, translation = p[:, :, :3], p[:, :2, 3]
    scale = np.cbrt(np.linalg.det(linear))
    gram = linear @ linear.swapaxes(-1, -2) - np.square(scale)[:, None, None] * np.eye(3)
    if scale.min() <= 0 or np.abs(gram).max() > ORTHONORMAL:
        raise InputError("has projection matrices that are not rotations", path, "export it again")
    axis, tilt, xtilt = tilt_angles_from_matrix(linear / scale[:, None, None])
    shift = np.zeros((len(p), 2))
    if translation.any():
        if frame is None or frame.tomogram is None or frame.image is None:
            what = "has projection matrices with translations, but not the sizes they refer to"
            raise InputError(what, path, "give rlnTomoSizeX/Y/Z, and put the tilt series it names beside it")
        seen = linear[:, :2] @ (np.array(frame.tomogram) / 2) + translation - np.array(frame.image) // 2
        shift = seen * frame.pixel_size / scale[:, None]
    return Alignment(tilt=tilt, axis=axis, xtilt=xtilt, shift_x=shift[:, 0], shift_y=shift[:, 1], magnification=scale)


def _tilt_series(table: pd.DataFrame, path: StrPath, frame: _Frame | None = None) -> dict[str, Any]:
    """What a per-tilt table says, as the fields of `Tomogram`."""
    alignment, ctf = None, None
    if "rlnTomoProjX" in table.columns:
        alignment = _from_matrices(table, path, frame)
    elif "rlnTomoYTilt" in table.columns:
        alignment = Alignment(
            tilt=numbers(table, "rlnTomoYTilt", path),
            axis=numbers(table, "rlnTomoZRot", path),
            xtilt=numbers(table, "rlnTomoXTilt", path, 0.0),
            shift_x=numbers(table, "rlnTomoXShiftAngst", path),
            shift_y=numbers(table, "rlnTomoYShiftAngst", path),
        )
    if "rlnDefocusU" in table.columns:
        ctf = Ctf(
            defocus_u=numbers(table, "rlnDefocusU", path),
            defocus_v=numbers(table, "rlnDefocusV", path),
            angle=numbers(table, "rlnDefocusAngle", path, 0.0),
            phase_shift=numbers(table, "rlnPhaseShift", path, 0.0),
            score=optional(table, "rlnCtfFigureOfMerit", path),
            resolution=optional(table, "rlnCtfMaxResolution", path),
        )
    return {
        "alignment": alignment,
        "ctf": ctf,
        "nominal": optional(table, "rlnTomoNominalStageTiltAngle", path),
        "dose_before": optional(table, "rlnMicrographPreExposure", path),
        "scale": optional(table, "rlnCtfScalefactor", path),
        "images": texts(table, "rlnMicrographName"),
    }


def _image_size(stack: str, path: StrPath) -> tuple[int, int] | None:
    """(x, y) of a tilt series that a file names, None where it is not there: only some files need it."""
    try:
        shape = open_stack(resolve(stack.rsplit("@", 1)[-1].removesuffix(":mrc"), path)).shape
    except InputError:
        return None
    return shape[2], shape[1]


def read_tilt_series(path: StrPath) -> tuple[Alignment, Ctf | None]:
    """Alignment and CTF of a tilt series' own STAR file; InputError if it is none or not aligned."""
    blocks = read_star(path)
    column = next((c for c in ("rlnTomoYTilt", "rlnTomoProjX") if any(c in b.columns for b in blocks.values())), None)
    if column is None:
        raise InputError("has no alignment (rlnTomoYTilt)", path, "give the STAR file after RELION's alignment job")
    fields = _tilt_series(block_with(blocks, column, path), path)
    return fields["alignment"], fields["ctf"]


def read_tomograms(path: StrPath, names: Sequence[str] | None = None) -> dict[str, Tomogram]:
    """The tomograms of a tomograms.star of RELION 5, RELION 4 or Warp, by name.

    Args:
        path: the file; the tilt series are blocks of it, or files that it names.
        names: only these, with or without Warp's ".tomostar" (None: all).

    Raises:
        InputError: not such a file, a name that it does not have, or a tilt series that is missing or unreadable.
    """
    blocks = read_star(path)
    table = block_with(blocks, "rlnTomoName", path)
    listed = [_plain(str(name)) for name in table["rlnTomoName"]]
    wanted = listed if names is None else [_plain(name) for name in names]
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise InputError(f"has no tomogram {missing[0]}", path, f"it has {', '.join(listed[:5])}")
    pixel_size = numbers(table, "rlnTomoTiltSeriesPixelSize", path)
    hand = optional(table, "rlnTomoHand", path)
    single = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnTomoImportFractionalDose")
    values = {column: optional(table, column, path) for column in single}
    sizes = [optional(table, f"rlnTomoSize{axis}", path) for axis in "XYZ"]
    files, stacks = texts(table, "rlnTomoTiltSeriesStarFile"), texts(table, "rlnTomoTiltSeriesName")
    tomograms = {}
    for name in wanted:
        row = listed.index(name)
        source, block = path, blocks.get(str(table["rlnTomoName"].iloc[row]))
        if files is not None:
            source = resolve(files[row], path)
            inner = read_star(source)
            block = inner.get(name, next(iter(inner.values())))
        if block is None:
            raise InputError(f"has no block of the tilt series {name}", path, "export it again")
        size = None if any(s is None for s in sizes) else tuple(float(s[row]) for s in sizes)  # type: ignore[index]
        size = size if size and all(size) else None
        image = None
        if stacks is not None and "rlnTomoProjX" in block.columns:
            image = _image_size(stacks[row], path)
        fields = _tilt_series(block, source, _Frame(size, image, float(pixel_size[row])))  # type: ignore[arg-type]
        if fields["ctf"] is not None and hand is not None:
            fields["ctf"] = replace(fields["ctf"], handedness=1 if hand[row] > 0 else -1)
        one = [None if values[column] is None else float(values[column][row]) for column in single]  # type: ignore[index]
        tomograms[name] = Tomogram(
            name=name,
            pixel_size=float(pixel_size[row]),
            size=size,  # type: ignore[arg-type]
            voltage=one[0],
            cs=one[1],
            amplitude_contrast=one[2],
            dose=one[3],
            **fields,
        )
    return tomograms


def _optics(table: pd.DataFrame, particles: pd.DataFrame, path: StrPath) -> tuple[list[OpticsGroup], NDArray[np.int64]]:
    """The optics groups, and each particle's index into them."""
    numbered = numbers(table, "rlnOpticsGroup", path, 1.0).astype(int).tolist()
    names = texts(table, "rlnOpticsGroupName") or [f"opticsGroup{n}" for n in numbered]
    columns = {
        "pixel_size": numbers(table, "rlnImagePixelSize", path, 0.0),
        "box": numbers(table, "rlnImageSize", path, 0.0).astype(int),
        "voltage": numbers(table, "rlnVoltage", path),
        "cs": numbers(table, "rlnSphericalAberration", path),
        "amplitude_contrast": numbers(table, "rlnAmplitudeContrast", path),
        "premultiplied": numbers(table, "rlnCtfDataAreCtfPremultiplied", path, 0.0) > 0,
    }
    beam_tilts = zip(*(numbers(table, f"rlnBeamTilt{axis}", path, 0.0).tolist() for axis in "XY"), strict=True)
    groups = [
        OpticsGroup(name, beam_tilt=tilt if any(tilt) else None, **{key: c[row].item() for key, c in columns.items()})
        for row, (name, tilt) in enumerate(zip(names, beam_tilts, strict=True))
    ]
    if "rlnOpticsGroup" not in particles.columns:
        return groups, np.zeros(len(particles), np.int64)
    wanted = numbers(particles, "rlnOpticsGroup", path).astype(int)
    unknown = set(wanted.tolist()) - set(numbered)
    if unknown:
        raise InputError(
            f"has particles of optics group {min(unknown)}, which it does not list", path, "export it again"
        )
    return groups, np.array([numbered.index(n) for n in wanted], np.int64)


def read_poses(table: pd.DataFrame, path: StrPath) -> tuple[Array, Array, Array]:
    """(rot, tilt, psi) of a particle table, with RELION's subtomogram orientation in front where it has one."""
    pose = [numbers(table, f"rlnAngle{name}", path) for name in ("Rot", "Tilt", "Psi")]
    if "rlnTomoSubtomogramRot" not in table.columns:
        return pose[0], pose[1], pose[2]
    outer = [numbers(table, f"rlnTomoSubtomogram{name}", path) for name in ("Rot", "Tilt", "Psi")]
    return euler_from_matrix(matrix_from_euler(*outer) @ matrix_from_euler(*pose))


def read_origins(table: pd.DataFrame, path: StrPath) -> Array:
    """rlnOriginX/Y/ZAngst in the specimen's frame, Å, (N, 3): what is subtracted from a position."""
    origin = np.stack([numbers(table, f"rlnOrigin{axis}Angst", path, 0.0) for axis in "XYZ"], axis=-1)
    if "rlnTomoSubtomogramRot" not in table.columns:
        return origin
    outer = [numbers(table, f"rlnTomoSubtomogram{name}", path) for name in ("Rot", "Tilt", "Psi")]
    return np.einsum("nij,nj->ni", matrix_from_euler(*outer), origin)


def read_particle_series(path: StrPath, tomograms: StrPath | None = None) -> ParticleSeries:
    """A tomographic particle set of RELION 5, RELION 4 or Warp (2-D stacks), or its poses alone.

    The matrix of an image is T·R with T of the tomogram's alignment: for Warp's sets that is RELION's P·A as written
    in the files. Which mirror image of the specimen that is depends on the sign of the tilt angles, see
    `ParticleSeries.mirrored`.

    Args:
        path: an optimisation_set.star, or a particle STAR file.
        tomograms: the tomograms.star; an optimisation set names it itself. None: read the particles alone.

    Raises:
        InputError: a file that is missing or not of its kind, or particles whose tomogram or tilts do not exist.
    """
    blocks = read_star(path)
    sets = next((block for block in blocks.values() if "rlnTomoParticlesFile" in block.columns), None)
    if sets is not None:
        if tomograms is None and "rlnTomoTomogramsFile" in sets.columns:
            tomograms = resolve(str(sets["rlnTomoTomogramsFile"].iloc[0]), path)
        path = resolve(str(sets["rlnTomoParticlesFile"].iloc[0]), path)
        blocks = read_star(path)
    table = block_with(blocks, "rlnTomoName", path)
    optics, group = _optics(block_with(blocks, "rlnVoltage", path), table, path)
    full_names = [str(name) for name in table["rlnTomoName"]]
    names = [_plain(name) for name in full_names]
    known = {} if tomograms is None else read_tomograms(tomograms, sorted(set(names)))
    rot, tilt, psi = read_poses(table, path)
    if "rlnCenteredCoordinateXAngst" in table.columns:
        xyz = np.stack([numbers(table, f"rlnCenteredCoordinate{axis}Angst", path) for axis in "XYZ"], axis=-1)
    else:
        pixels = np.stack([numbers(table, f"rlnCoordinate{axis}", path) for axis in "XYZ"], axis=-1)
        if any(name not in known or known[name].size is None for name in names):
            raise InputError(
                "has coordinates in pixels from the corner", path, "give its tomograms.star with rlnTomoSizeX/Y/Z too"
            )
        of_series = [known[name].pixel_size for name in names]
        of_image = [optics[g].pixel_size or s for g, s in zip(group, of_series, strict=True)]
        warp = [name.endswith(WARP_SUFFIX) for name in full_names]
        unit = np.where(warp, of_image, of_series)
        size = np.array([known[name].size for name in names]) * np.array(of_series)[:, None]
        xyz = pixels * unit[:, None] - size / 2
    visible = None
    if "rlnTomoVisibleFrames" in table.columns:
        visible = [vector > 0 for vector in vectors(table, "rlnTomoVisibleFrames", path)]
        for row, (name, frames) in enumerate(zip(names, visible, strict=True), start=1):
            alignment = known[name].alignment if name in known else None
            if alignment is not None and alignment.count != len(frames):
                what = f"particle {row} has {len(frames)} rlnTomoVisibleFrames for {alignment.count} tilts of {name}"
                raise InputError(what, path, "give the tomograms.star that belongs to the particles")
    return ParticleSeries(
        path=Path(path),
        tomogram=names,
        name=texts(table, "rlnTomoParticleName") or [f"{name}/{row}" for row, name in enumerate(names, start=1)],
        xyz=xyz - read_origins(table, path),
        rot=rot,
        tilt=tilt,
        psi=psi,
        half=numbers(table, "rlnRandomSubset", path, 0.0).astype(np.int64),
        group=group,
        optics=optics,
        images=texts(table, "rlnImageName"),
        visible=visible,
        tomograms=known,
        warp=any(name.endswith(WARP_SUFFIX) for name in full_names),
    )


def is_tomographic(path: StrPath) -> bool:
    """Whether a particle STAR file lists tomographic particles (or is an optimisation set), and not 2-D images."""
    columns = {column for block in read_star(path).values() for column in block.columns}
    return bool(columns & {"rlnTomoName", "rlnTomoParticlesFile"})


def tomograms_beside(path: StrPath) -> Path | None:
    """The tomograms.star that lies beside a particle file: by Warp's name or RELION's, or None."""
    file = Path(path)
    names = (f"{file.stem}_tomograms.star", "tomograms.star")
    return next((file.with_name(name) for name in names if file.with_name(name).is_file()), None)


def read_particles_2d(path: StrPath) -> Particles2D:
    """RELION 3.1's 2-D particles; InputError if the file is not one."""
    blocks = read_star(path)
    table = block_with(blocks, "rlnImageName", path)
    if "rlnTomoName" in table.columns:
        raise InputError("lists tomographic particles, not 2-D images", path, "read it with its tomograms.star")
    optics, group = _optics(block_with(blocks, "rlnVoltage", path), table, path)
    return Particles2D(
        image=texts(table, "rlnImageName") or [],
        rot=numbers(table, "rlnAngleRot", path),
        tilt=numbers(table, "rlnAngleTilt", path),
        psi=numbers(table, "rlnAnglePsi", path),
        dx=-numbers(table, "rlnOriginXAngst", path, 0.0),
        dy=-numbers(table, "rlnOriginYAngst", path, 0.0),
        defocus_u=numbers(table, "rlnDefocusU", path),
        defocus_v=numbers(table, "rlnDefocusV", path),
        defocus_angle=numbers(table, "rlnDefocusAngle", path, 0.0),
        phase_shift=numbers(table, "rlnPhaseShift", path, 0.0),
        group=group,
        optics=optics,
        half=numbers(table, "rlnRandomSubset", path, 0.0).astype(np.int64),
        group_name=texts(table, "rlnGroupName"),
        particle=texts(table, "rlnTomoParticleName"),
        micrograph=texts(table, "rlnMicrographName"),
        scale=optional(table, "rlnCtfScalefactor", path),
        bfactor=optional(table, "rlnCtfBfactor", path),
        dose_before=optional(table, "rlnMicrographPreExposure", path),
    )


def write_particles_2d(path: StrPath, particles: Particles2D) -> None:
    """Write RELION 3.1's 2-D particles, with an optics table; whole or not at all.

    Raises:
        ValueError: no particles at all.
    """
    if not particles.count:
        raise ValueError(f"{path}: no particles to write")
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": range(1, len(particles.optics) + 1),
            "rlnOpticsGroupName": [group.name for group in particles.optics],
            "rlnVoltage": [float(group.voltage) for group in particles.optics],
            "rlnSphericalAberration": [float(group.cs) for group in particles.optics],
            "rlnAmplitudeContrast": [float(group.amplitude_contrast) for group in particles.optics],
            "rlnImagePixelSize": [float(group.pixel_size) for group in particles.optics],
            "rlnImageSize": [int(group.box) for group in particles.optics],
            "rlnImageDimensionality": 2,
            "rlnCtfDataAreCtfPremultiplied": [int(group.premultiplied) for group in particles.optics],
        }
    )
    beam_tilts = [group.beam_tilt or (0.0, 0.0) for group in particles.optics]
    if any(map(any, beam_tilts)):
        optics["rlnBeamTiltX"], optics["rlnBeamTiltY"] = zip(*beam_tilts, strict=True)
    columns: dict[str, object] = {
        "rlnImageName": particles.image,
        "rlnMicrographName": particles.micrograph,
        "rlnOpticsGroup": particles.group + 1,
        "rlnAngleRot": particles.rot,
        "rlnAngleTilt": particles.tilt,
        "rlnAnglePsi": particles.psi,
        "rlnOriginXAngst": -particles.dx,
        "rlnOriginYAngst": -particles.dy,
        "rlnDefocusU": particles.defocus_u,
        "rlnDefocusV": particles.defocus_v,
        "rlnDefocusAngle": particles.defocus_angle,
        "rlnPhaseShift": particles.phase_shift,
        "rlnCtfBfactor": particles.bfactor,
        "rlnCtfScalefactor": particles.scale,
        "rlnMicrographPreExposure": particles.dose_before,
        "rlnGroupName": particles.group_name,
        "rlnTomoParticleName": particles.particle,
        "rlnRandomSubset": particles.half if particles.half.all() else None,
    }
    table = pd.DataFrame({name: column for name, column in columns.items() if column is not None})
    write_star(path, {"optics": optics, "particles": table})
