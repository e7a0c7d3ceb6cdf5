"""What import decides before anything is aligned: which images are spoilt, and what dose each image had received. Nothing
here knows files. The judgement of images wants numbers of one image at a time, so that no stack is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from libemc.errors import InputError
from libemc.records import Tilts, TiltSeriesRecord

Array = NDArray[np.float64]

UNDECIDED = ", which of the two is at its tilt is not known"
NEIGHBOURS = 6
"""Images nearest in tilt that an image is compared with: few enough that the thickness seen through hardly changes."""
FAINT = 0.1
"""Share of its neighbours' beam below which an image is dark. Thick ice (450 nm) takes away up to two thirds of what the
neighbours on one side still have, at 60 degrees in steps of 5."""
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


def bad_images(
    statistics: Sequence[ImageStatistics], tilts: ArrayLike, order: Sequence[int] | None = None
) -> list[str | None]:
    """Why each image can't be used, None where it can.

    An image is spoilt when it holds values that are not finite, when it is constant, when it is a copy of one exposed before,
    or when less than `FAINT` of its neighbours' beam reached it: by its variance, to which counting noise is proportional,
    and in a stack of counts (no mean is below zero) by its mean as well. Neighbours are those in tilt, by their median.

    Args:
        statistics: of every image, in the order of the stack.
        tilts: nominal angles, degrees, (T,).
        order: (T,) place of each in the exposure. None: of two copies neither is used, since one of them isn't what it says;
            their reason then ends in `UNDECIDED`.
    """
    reasons: list[str | None] = []
    seen: dict[bytes, int] = {}
    for number, image in enumerate(statistics):
        if not image.finite:
            reasons.append("values that are not finite")
        elif image.deviation <= 0:
            reasons.append("constant")
        elif image.digest in seen:
            first = seen[image.digest]
            reasons.append(None)
            for copy, other in ((number, first), (first, number)):
                if order is None or order[copy] > order[other]:
                    reasons[copy] = f"the same as image {other}" + (UNDECIDED if order is None else "")
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
        share = (statistics[k].deviation / float(np.median([image.deviation for image in around]))) ** 2
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
        files = ", ".join(source for source in sizes if not source.startswith("--"))
        raise InputError(f"there is no pixel size in {files}", None, "give it with --pixel-size")
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


def tilts_section(
    nominal: ArrayLike, order: Sequence[int] | None, dose: Sequence[float] | None, before: Sequence[float] | None
) -> Tilts:
    """What the microscope recorded, all tilts used.

    Doses before each exposure follow from order and dose if not given, and doses from those before (not of one image).
    """
    if before is None and order is not None and dose is not None:
        before = doses_before(order, dose)
    if dose is None and before is not None and len(before) > 1:
        dose = doses_from_before(before)
    angles = tuple(float(v) for v in np.asarray(nominal))
    return Tilts(
        nominal=angles,
        order=None if order is None else tuple(int(k) for k in order),
        dose=None if dose is None else tuple(float(v) for v in dose),
        dose_before=None if before is None else tuple(float(v) for v in before),
        use=(True,) * len(angles),
        reason=(None,) * len(angles),
    )


def summary(record: TiltSeriesRecord) -> str:
    """One line: tilts used and why others are not, sampling, shape, angles, axis and total dose."""
    source, tilts = record.source, record.tilts
    why = [f"{k} {reason}" for k, reason in enumerate(tilts.reason or ()) if reason]
    count, rows, columns = source.shape
    angles = f"{min(tilts.nominal):g}" + (f" to {max(tilts.nominal):g}" if count > 1 else "")
    parts = [
        f"{record.name}: {sum(tilts.use)}/{count} tilts" + (f" ({', '.join(why)})" if why else ""),
        f"{source.pixel_size:g} Å/px",
        f"{columns} x {rows}",
        f"{angles} degrees",
        "axis not known" if source.tilt_axis is None else f"axis {source.tilt_axis:g}",
        "dose not known" if tilts.dose is None else f"{sum(tilts.dose):g} e/Å²",
    ]
    return ", ".join(parts)


def without_bad(tilts: Tilts, reasons: Sequence[str | None]) -> Tilts:
    """The tilts with the spoilt images unused (they keep their place, convention 7)."""
    return tilts.model_copy(update={"use": tuple(reason is None for reason in reasons), "reason": tuple(reasons)})


# ---------------------------------------------------------------------------------------------------- particle images


def float16_scale(samples: Iterable[NDArray[Any]]) -> float:
    """The factor that gives images unit variance, by the median image, so that any unit of theirs fits into float16.

    Args:
        samples: some of the set's images, arrays (n, y, x).

    Raises:
        InputError: they are constant, or not finite.
    """
    variances = np.concatenate([sample.astype(np.float64).var(axis=(1, 2)) for sample in samples])
    variance = float(np.median(variances)) if len(variances) else 0.0
    if not np.isfinite(variance) or variance <= 0:
        raise InputError("images are constant or not finite", None, "export the particles again")
    return variance**-0.5


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
