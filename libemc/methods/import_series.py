"""What import decides before anything is aligned: which images are spoilt, what dose each image had received, and how
tables that other packages wrote become sections of our records. Readers hand over arrays in our conventions; nothing
here knows files. The judgement of images wants numbers of one image at a time, so that no stack is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from libemc.errors import InputError
from libemc.records import (
    Alignment,
    Ctf,
    Optics,
    Particle,
    ParticleFile,
    ParticleTilts,
    Picks,
    Tilts,
    TiltSeriesRecord,
    half_of,
)

Array = NDArray[np.float64]

NEIGHBOURS = 6
"""Images nearest in tilt that an image is compared with: few enough that the thickness seen through hardly changes."""
FAINT = 0.4
"""Share of its neighbours' spread (or, in counts, mean) below which an image is dark. Counting noise goes with the square
root, so a spread of 0.4 is a sixth of the beam; from one tilt to the next ice changes it by some per cent."""
PIXEL_SIZES_AGREE = 0.005
"""Relative difference up to which two pixel sizes are the same number, rounded."""
ANGLES_AGREE = 1.0
"""Degrees by which two lists of nominal angles of one stack may differ: they are rounded to whole degrees at worst."""
FLOAT16_MOST = 6e4
"""A little less than the largest float16."""


# ---------------------------------------------------------------------------------------------------------- bad images


@dataclass(frozen=True)
class ImageStatistics:
    """One raw image in numbers: mean, standard deviation, whether all is finite, and a digest of its pixels."""

    mean: float
    deviation: float
    finite: bool
    digest: bytes


def image_statistics(image: NDArray[Any]) -> ImageStatistics:
    """The statistics of one image (y, x) of any type."""
    pixels = np.ascontiguousarray(image)
    digest = blake2b(pixels.view(np.uint8).data, digest_size=16).digest()
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        return ImageStatistics(0.0, 0.0, False, digest)
    mean = float(values.mean(dtype=np.float64))
    return ImageStatistics(
        mean, float(np.sqrt(np.square(values - np.float32(mean)).mean(dtype=np.float64))), True, digest
    )


def bad_images(statistics: Sequence[ImageStatistics], tilts: ArrayLike) -> list[str | None]:
    """Why each image can't be used, None where it can.

    An image is spoilt when it holds values that are not finite, when it is constant, when it is a copy of an earlier one,
    or when its spread (or its mean, in a stack of counts) is less than `FAINT` of the median of its neighbours in tilt.

    Args:
        statistics: of every image, in the order of the stack.
        tilts: nominal angles, degrees, (T,).
    """
    reasons: list[str | None] = []
    seen: dict[bytes, int] = {}
    for number, image in enumerate(statistics):
        if not image.finite:
            reasons.append("values that are not finite")
        elif image.deviation <= 0:
            reasons.append("constant")
        elif image.digest in seen:
            reasons.append(f"the same as image {seen[image.digest]}")
        else:
            reasons.append(None)
        seen.setdefault(image.digest, number)
    good = [k for k, reason in enumerate(reasons) if reason is None]
    counts = bool(good) and min(statistics[k].mean for k in good) > 0
    angles = np.asarray(tilts, dtype=np.float64)
    for k in good:
        near = sorted((other for other in good if other != k), key=lambda other: abs(angles[other] - angles[k]))
        if len(near) < 2:
            continue
        around = [statistics[other] for other in near[:NEIGHBOURS]]
        share = statistics[k].deviation / float(np.median([image.deviation for image in around]))
        if counts:
            share = min(share, statistics[k].mean / float(np.median([image.mean for image in around])))
        if share < FAINT:
            reasons[k] = f"dark: {share:.2g} of its neighbours"
    return reasons


# ------------------------------------------------------------------------------------------------------ angles and dose


def same_pixel_size(sizes: dict[str, float | None]) -> float:
    """The pixel size on which all sources agree: the first of them that says one, Å.

    Args:
        sizes: by where each comes from, the most trusted first; None where it says none.

    Raises:
        InputError: two of them contradict each other, or none says any.
    """
    known = [(source, size) for source, size in sizes.items() if size]
    if not known:
        raise InputError(f"there is no pixel size in {', '.join(sizes)}", None, "give it with --pixel-size")
    (first, size), *others = known
    for source, other in others:
        if abs(other / size - 1) > PIXEL_SIZES_AGREE:
            what = f"{first} says {size:g} Å/px, {source} says {other:g} Å/px"
            raise InputError(what, None, "find out which is right; --ignore-header takes --pixel-size as it is")
    return size


def exposure_order(listed: ArrayLike, nominal: ArrayLike) -> list[int]:
    """Place of each image in the order of exposure, from a list that says it in one of two ways.

    Args:
        listed: (T,) each image's place, counted from 0 or 1; or the nominal angles in the order of exposure.
        nominal: (T,) nominal angles in the order of the stack, degrees.

    Raises:
        InputError: the list is neither.
    """
    values, angles = np.asarray(listed, dtype=np.float64), np.asarray(nominal, dtype=np.float64)
    if len(values) == len(angles):
        ranks = np.argsort(np.argsort(values, kind="stable"))
        if np.array_equal(values - values.min(), ranks) and values.min() in (0, 1):
            return [int(rank) for rank in ranks]
        by_angle, by_list = np.argsort(angles, kind="stable"), np.argsort(values, kind="stable")
        if np.abs(angles[by_angle] - values[by_list]).max() <= ANGLES_AGREE:
            order = np.empty(len(angles), dtype=int)
            order[by_angle] = by_list
            return [int(place) for place in order]
    what = f"of {len(values)} lines is not an order of {len(angles)} exposures"
    raise InputError(what, None, "give each image's place, or the angles in the order of exposure")


def doses_before(order: Sequence[int], dose: Sequence[float]) -> tuple[float, ...]:
    """What the specimen had received before each image, e/Å²: the doses of all that come before it in `order`."""
    places, doses = np.asarray(order), np.asarray(dose, dtype=np.float64)
    by_order = doses[np.argsort(places)]
    return tuple(float(v) for v in (np.cumsum(by_order) - by_order)[places])


def doses_from_before(before: ArrayLike) -> tuple[float, ...]:
    """Each exposure's dose from what the specimen had received before it; the last one's is the median of the others."""
    values = np.asarray(before, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order])
    dose = np.empty(len(values))
    dose[order] = np.append(steps, np.median(steps) if len(steps) else 0.0)
    return tuple(float(v) for v in dose)


# ------------------------------------------------------------------------- what readers give, as sections of the record


class AlignmentLike(Protocol):
    """Arrays of a tilt geometry, (T,), as our readers give them."""

    axis: Array
    tilt: Array
    xtilt: Array
    shift_x: Array
    shift_y: Array
    magnification: Array
    use: NDArray[np.bool_]

    def matrices(self) -> Array:
        """Specimen to image frame, (T, 3, 3)."""


class CtfLike(Protocol):
    """Arrays of a CTF, (T,), as our readers give them."""

    defocus_u: Array
    defocus_v: Array
    angle: Array
    phase_shift: Array
    handedness: int | None
    score: Array | None
    resolution: Array | None


class PicksLike(Protocol):
    """Points (N, 3) and what is known of each, (N,) or None, as our readers give them."""

    xyz: Array
    rot: Array | None
    tilt: Array | None
    psi: Array | None
    score: Array | None


def _row(values: ArrayLike) -> tuple[float, ...]:
    return tuple(float(v) for v in np.asarray(values, dtype=np.float64))


def _points(values: Array) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(x), float(y), float(z)) for x, y, z in values)


def with_alignment(record: TiltSeriesRecord, found: AlignmentLike, ctf: CtfLike | None) -> TiltSeriesRecord:
    """The record with this alignment and, where there is one, CTF; tilts that the alignment left out are unused."""
    magnified = bool(np.any(found.magnification != 1))
    alignment = Alignment(
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
        update["ctf"] = Ctf(
            defocus_u=_row(ctf.defocus_u),
            defocus_v=_row(ctf.defocus_v),
            angle=_row(ctf.angle),
            phase_shift=_row(ctf.phase_shift),
            score=None if ctf.score is None else _row(ctf.score),
            resolution=None if ctf.resolution is None else _row(ctf.resolution),
            defocus_handedness=-1 if (ctf.handedness or old_hand) < 0 else 1,
        )
    return record.model_copy(update=update)


def picks_section(found: PicksLike, source: str, chosen: NDArray[np.bool_] | None = None) -> Picks:
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
    return Picks(xyz=_points(found.xyz[rows]), source=source, **columns)


def tilts_section(
    nominal: ArrayLike, order: Sequence[int] | None, dose: Sequence[float] | None, before: Sequence[float] | None
) -> Tilts:
    """What the microscope recorded, all tilts used. Doses before each exposure follow from order and dose if not given."""
    if before is None and order is not None and dose is not None:
        before = doses_before(order, dose)
    if dose is None and before is not None:
        dose = doses_from_before(before)
    angles = _row(nominal)
    return Tilts(
        nominal=angles,
        order=None if order is None else tuple(int(k) for k in order),
        dose=None if dose is None else _row(dose),
        dose_before=None if before is None else _row(before),
        use=(True,) * len(angles),
        reason=(None,) * len(angles),
    )


def without_bad(tilts: Tilts, reasons: Sequence[str | None]) -> Tilts:
    """The tilts with the spoilt images unused (they keep their place, convention 7)."""
    return tilts.model_copy(update={"use": tuple(reason is None for reason in reasons), "reason": tuple(reasons)})


# ------------------------------------------------------------------------------------- particle sets of other packages


class OpticsLike(Protocol):
    """One optics group of a particle set."""

    name: str
    pixel_size: float
    box: int
    voltage: float
    cs: float
    amplitude_contrast: float
    premultiplied: bool


class TomogramLike(Protocol):
    """A tilt series as a particle set's files describe it."""

    alignment: AlignmentLike | None
    ctf: CtfLike | None
    dose: float | None
    dose_before: Array | None
    scale: Array | None


class SeriesLike(Protocol):
    """Particles of one tomogram whose images are stacks of tilts."""

    xyz: Array
    rot: Array
    tilt: Array
    psi: Array
    half: NDArray[np.int64]
    group: NDArray[np.int64]
    name: list[str]
    visible: list[NDArray[np.bool_]] | None


class FlatLike(Protocol):
    """2-D particles, each an image with a pose and a CTF of its own."""

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
    half: NDArray[np.int64]
    particle: list[str] | None
    dose_before: Array | None


def _halves(half: NDArray[np.int64], names: Sequence[str]) -> list[Any]:
    """The halves as given where every particle has one, else by name."""
    if np.isin(half, (1, 2)).all():
        return [int(h) for h in half]
    return [half_of(name) for name in names]


def series_file(
    set_name: str, name: str, series: SeriesLike, tomogram: TomogramLike, optics: OpticsLike, seen: NDArray[np.bool_]
) -> ParticleFile:
    """The particle file of one tomogram of a set of tilt stacks; its `stack` is still to be written.

    Args:
        series: its particles, of one optics group.
        seen: (N, T) which images there are.

    Raises:
        InputError: the tomogram has no alignment.
    """
    found, ctf = tomogram.alignment, tomogram.ctf
    if found is None:
        raise InputError(f"{name} has no alignment", None, "export the particles with their tomograms.star")
    count = len(found.tilt)
    zeros = np.zeros(count)
    hand = -1 if ctf is None or (ctf.handedness or -1) < 0 else 1
    height = np.einsum("tj,nj->nt", found.matrices()[:, 2], series.xyz)
    mean = None if ctf is None else (ctf.defocus_u + ctf.defocus_v) / 2 + hand * height
    before = zeros if tomogram.dose_before is None else tomogram.dose_before
    dose = zeros
    if tomogram.dose_before is not None:
        dose = np.full(count, tomogram.dose) if tomogram.dose else np.array(doses_from_before(before))
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


def flat_groups(flat: FlatLike) -> list[NDArray[np.int64]]:
    """The rows of 2-D particles that can share a particle file: those of one optics group and one dose before."""
    dose = np.zeros(len(flat.rot)) if flat.dose_before is None else flat.dose_before
    keys = np.stack([flat.group.astype(np.float64), dose], axis=1)
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [np.flatnonzero(inverse == k) for k in range(int(inverse.max()) + 1)]


def flat_file(set_name: str, name: str, flat: FlatLike, rows: NDArray[np.int64], optics: OpticsLike) -> ParticleFile:
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


def float16_scale(sample: NDArray[Any]) -> float:
    """The factor that gives images unit spread, so that any unit of theirs fits into float16.

    Args:
        sample: some of the set's images, any shape.

    Raises:
        InputError: they are constant, or not finite.
    """
    deviation = float(np.asarray(sample, dtype=np.float64).std())
    if not np.isfinite(deviation) or deviation <= 0:
        raise InputError("images are constant or not finite", None, "export the particles again")
    return 1.0 / deviation


def as_float16(images: NDArray[Any], scale: float) -> NDArray[np.float16]:
    """Images in units of `float16_scale`.

    Raises:
        InputError: values are not finite, or far beyond the rest of the set.
    """
    scaled = np.asarray(images, dtype=np.float32) * np.float32(scale)
    if not (np.abs(scaled) < FLOAT16_MOST).all():
        raise InputError(
            "has values that are not finite, or far beyond those of the other images", None, "export it again"
        )
    return scaled.astype(np.float16)
