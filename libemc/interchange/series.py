"""Tilt series on their way in: raw stacks with the files beside them, and the alignments, CTFs and points that other packages
found. What is decided about images and doses is in `methods.import_series`; here files meet records.
"""

from __future__ import annotations

import functools
import os
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from libemc import records
from libemc.cli.options import label_name
from libemc.errors import InputError
from libemc.io import geometry, mrc
from libemc.io.acquisition import Acquisition, read_acquisition
from libemc.io.detect import read_alignment
from libemc.io.files import place, read_json, read_table
from libemc.io.picks import read_picks
from libemc.io.star import read_star
from libemc.io.truth import is_truth, read_truth
from libemc.methods import import_series
from libemc.methods.simulate import order_of_tilts
from libemc.records import TiltSeriesRecord, tiltseries_path

# -------------------------------------------------------------------------------------------- a raw tilt series

ORDERS = {"sequential": "continuous", "dose-symmetric": "dose-symmetric"}
"""Orders of exposure by name, and what the simulator calls them."""
DEFAULT_VOLTAGE = 300.0
HEADER_DIGITS = 1e-5
"""Relative difference up to which a header says the same pixel size: it keeps seven digits of a cell's length."""


@dataclass(frozen=True)
class Told:
    """What the user says of raw stacks; None: what the files say. Å, degrees, e/Å², kV, mm.

    Attributes:
        rawtlt, mdoc: files of angles.
        tilt_start, tilt_step: angle of the first image, and from image to image; of one image the first is enough.
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
        if self.tilt_start is None and self.tilt_step is not None:
            raise InputError("--tilt-step without --tilt-start", remedy="give both")
        if self.ignore_header and self.pixel_size is None:
            raise InputError("--ignore-header without --pixel-size", remedy="give the pixel size")


@dataclass(frozen=True)
class RawSeries:
    """A raw stack on its way in: its record with all tilts used, the stack mapped, the files read, what to warn of."""

    record: TiltSeriesRecord
    images: mrc.MrcImages
    files: tuple[Path, ...]
    warnings: tuple[str, ...]

    @property
    def writes(self) -> list[Path]:
        """What import will write: the record, and the stack where it is to be put into the project."""
        source = self.record.source
        placed = [] if source.stack == source.origin else [Path(source.stack)]
        return [tiltseries_path(self.record.name), *placed]

    def looked_at(self, progress: Callable[..., Iterator[NDArray[Any]]]) -> TiltSeriesRecord:
        """The record after a look at every image, spoilt ones marked.

        Raises:
            InputError: no image can be used.
        """
        numbers = [
            import_series.image_statistics(image) for image in progress(self.images.array, label=self.record.name)
        ]
        reasons = import_series.bad_images(numbers, self.record.tilts.nominal, self.record.tilts.order)
        if all(reasons):
            raise InputError(f"no image can be used: image 0 is {reasons[0]}", self.images.path, "check the file")
        return self.record.model_copy(update={"tilts": import_series.without_bad(self.record.tilts, reasons)})

    def save(self, record: TiltSeriesRecord, link: bool = False, overwrite: bool = False) -> None:
        """Put the stack where the record says, as a copy or a link, and write the record, the one of `looked_at`."""
        target, *placed = self.writes
        for stack in placed:
            place(self.images.path, stack, link)
        records.save_new(target, record, overwrite)


def raw_stacks(paths: Sequence[Path], told: Told, project: Path, overwrite: bool) -> list[RawSeries]:
    """Raw stacks, each with the files beside it, which name new tilt series of the project.

    Raises:
        InputError: a stem that is no good name, or names two of them, or (without `overwrite`) a tilt series that is there;
            or as `raw_series`.
    """
    found = []
    for path in paths:
        try:
            info = tiltseries_path(label_name(path.stem))
        except ArgumentTypeError as error:
            raise InputError(f"{error}", path, "rename the stack: its stem names the tilt series") from None
        if info.exists() and not overwrite:
            raise InputError("exists already", info, "use --overwrite to replace it and all that was found since")
        found.append(raw_series(path, told, project))
    name, count = Counter(each.record.name for each in found).most_common(1)[0]
    if count > 1:
        raise InputError(f"two stacks are called {name}", remedy="rename one")
    return found


def raw_series(path: Path, told: Told, project: Path) -> RawSeries:
    """A raw stack with the files beside it.

    Raises:
        InputError: the stack or a file can't be read or is not of this stack, or they contradict each other.
    """
    images = mrc.open_stack(path)
    count = images.shape[0]
    if told.tilt_start is not None and told.tilt_step is None and count > 1:
        raise InputError(f"holds {count} images, of which --tilt-start says one angle", path, "give --tilt-step too")
    step = None if told.tilt_start is None else (told.tilt_start, told.tilt_step or 0.0)
    found = read_acquisition(path, count, told.rawtlt, told.mdoc, step)
    tilts, warning = _tilts(found, told)
    sizes = {"--pixel-size": told.pixel_size}
    if not told.ignore_header:
        sizes[str(path)] = images.pixel_size
        sizes |= {f"the .mdoc of {path.name}": found.mdoc.pixel_size} if found.mdoc else {}
    pixel_size = import_series.same_pixel_size(sizes)
    other = images.pixel_size is not None and abs(images.pixel_size / pixel_size - 1) > HEADER_DIGITS
    absolute = Path(os.path.abspath(path))
    origin = str(absolute.relative_to(project) if absolute.is_relative_to(project) else absolute)
    axis = found.mdoc.tilt_axis if told.axis is None and found.mdoc else told.axis
    source = records.Source(
        stack=f"tiltseries/{path.name}" if told.place else origin,
        shape=images.shape,
        pixel_size=pixel_size,
        header_pixel_size=images.pixel_size if other else None,
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
    """Angles, order and doses of a stack, and what to warn of (of one image: nothing, neither matters)."""
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
    tilts = import_series.tilts_section(nominal, order, dose, None if before is None else before.tolist())
    return tilts, warning if len(nominal) > 1 else None


# ------------------------------------------------------------------------------------- sections that others found


DISTORTION = 0.01
"""Shear of an .xf from which on it is worth a warning: 1 % moves the edge of a 4k image by 20 pixels."""


def row(values: ArrayLike) -> tuple[float, ...]:
    """Numbers as a record keeps them."""
    return tuple(float(v) for v in np.asarray(values, dtype=np.float64))


def points(values: NDArray[np.float64]) -> tuple[tuple[float, float, float], ...]:
    """Positions (N, 3) as a record keeps them."""
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


def alignment_changes(given: Sequence[Path], paths: Sequence[Path], overwrite: bool) -> dict[Path, Change]:
    """What files of another package say of the alignment of some tilt series, by the paths of their records.

    Raises:
        InputError: one has an alignment already (without `overwrite`); or as `alignment_change`.
    """
    changes = {}
    for path in paths:
        record = records.load_tiltseries(path)
        if record.alignment is not None and not overwrite:
            raise InputError("has an alignment", path, "use --overwrite to replace it")
        changes[path] = alignment_change(given, record)
    return changes


def with_alignment(record: TiltSeriesRecord, found: geometry.Alignment, ctf: geometry.Ctf | None) -> TiltSeriesRecord:
    """The record with this alignment and, where there is one, CTF; tilts that the alignment left out are unused."""
    magnified = bool(np.any(found.magnification != 1))
    alignment = records.Alignment(
        axis=row(found.axis),
        tilt=row(found.tilt),
        xtilt=row(found.xtilt),
        shift_x=row(found.shift_x),
        shift_y=row(found.shift_y),
        magnification=row(found.magnification) if magnified else None,
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
        old_hand, beam_tilt = (record.ctf.defocus_handedness, record.ctf.beam_tilt) if record.ctf else (-1, None)
        if ctf.beam_tilt is not None:
            beam_tilt = ctf.beam_tilt if any(ctf.beam_tilt) else None
        update["ctf"] = records.Ctf(
            defocus_u=row(ctf.defocus_u),
            defocus_v=row(ctf.defocus_v),
            angle=row(ctf.angle),
            phase_shift=row(ctf.phase_shift),
            score=None if ctf.score is None else row(ctf.score),
            resolution=None if ctf.resolution is None else row(ctf.resolution),
            defocus_handedness=-1 if (ctf.handedness or old_hand) < 0 else 1,
            beam_tilt=beam_tilt,
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
        name: None if getattr(found, name) is None else row(getattr(found, name)[rows])
        for name in ("rot", "tilt", "psi", "score")
    }
    return records.Picks(xyz=points(found.xyz[rows]), source=source, **columns)


def with_picks(record: TiltSeriesRecord, label: str, picks: records.Picks) -> TiltSeriesRecord:
    """The record with these points under a label, in place of what it had there."""
    return record.model_copy(update={"picks": {**record.picks, label: picks}})


def picks_change(
    path: Path, record: TiltSeriesRecord, label: str, class_numbers: tuple[int, ...] | None, tomogram: Path | None
) -> Change:
    """Points of one tilt series from a file of any kind.

    Args:
        class_numbers: of a simulator's truth, only the particles of these classes.
        tomogram: the map that coordinates in pixels refer to; None: the record's own, where it has just one.

    Raises:
        InputError: not a file of points of this tilt series, none of the class, or all out of the microscope's sight.
    """
    truth = path.suffix.lower() == ".json" and is_truth(read_json(path))
    if class_numbers is not None and not truth:
        raise InputError("has no classes that --class could choose", path, "leave --class out")
    chosen = None
    if truth:
        simulated = read_truth(path)
        found = simulated.picks
        chosen = None if class_numbers is None else np.isin(simulated.classes, class_numbers)
    else:
        shape, pixel_size, centre, angles = _frame(record, tomogram)
        found = read_picks(path, shape=shape, pixel_size=pixel_size, name=record.name, label=label)
        if any((*centre, *angles)) and _in_pixels(path):
            found = found.out_of(centre, angles)
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


def picks_changes(
    given: Path,
    paths: Sequence[Path],
    label: str,
    class_numbers: tuple[int, ...] | None,
    tomogram: Path | None,
    overwrite: bool,
) -> dict[Path, Change]:
    """The points of some tilt series in one file, by the paths of their records.

    Raises:
        InputError: one has such picks already (without `overwrite`); or as `picks_change`.
    """
    changes = {}
    for path in paths:
        record = records.load_tiltseries(path)
        if label in record.picks and not overwrite:
            raise InputError(f"has picks labelled {label}", path, "use --overwrite to replace it")
        changes[path] = picks_change(given, record, label, class_numbers, tomogram)
    return changes


def _in_pixels(path: Path) -> bool:
    """Whether a file's positions are in pixels of a tomogram."""
    if path.suffix.lower() == ".star":
        return not any("rlnCenteredCoordinateXAngst" in block.columns for block in read_star(path).values())
    return path.suffix.lower() in (".tbl", ".mod")


def _frame(
    record: TiltSeriesRecord, tomogram: Path | None
) -> tuple[tuple[int, int, int] | None, float | None, tuple[float, float, float], tuple[float, float, float]]:
    """Shape [z, y, x], pixel size, centre and angles of the tomogram of the pixels: the one given, else the only one."""
    nowhere = (0.0, 0.0, 0.0)
    if tomogram is not None:
        images = mrc.open_stack(tomogram)
        listed = [known for known in record.tomograms if os.path.abspath(known.file) == os.path.abspath(tomogram)]
        place = (listed[0].centre, listed[0].angles) if listed else (nowhere, nowhere)
        return images.shape, images.pixel_size, *place
    whole = [known for known in record.tomograms if known.half is None]
    if len(whole) == 1:
        return whole[0].shape, whole[0].pixel_size, whole[0].centre, whole[0].angles
    return None, None, nowhere, nowhere
