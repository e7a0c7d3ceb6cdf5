"""Coarse tilt-series alignment: from images and nominal angles alone to usable images, the tilt axis, and shifts to about a
percent of the field, and which images can't be trusted.

Images are placed by each other (`search`) about an axis that is sought without any shifts first (`axis`), and then turned
to where all images agree best. Candidates are compared by the whole alignment they give. The height of the whole can't
be seen: the slab is put at z = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.methods.align.axis import AXIS_STEP, Pairs, by_lines
from libemc.methods.align.images import SMALL_SIZE, Images, prepare
from libemc.methods.align.search import BETTER, LIKELY, PADDING, SURE, Search
from libemc.numerics.peaks import vertex
from libemc.records import Alignment, TiltSeriesRecord

SLAB = 1000.0  # Å: thickness assumed where none is known
LEAST_SLAB = 400.0  # Å: gold on one face alone makes a specimen look thinner
SLABS = (400.0, 3000.0)  # Å: others to try, where that leaves images without a place
ENOUGH = 0.95  # of the images: with fewer placed, the other thicknesses are tried
DISAGREEMENT = 0.03  # of the field, between the sides' opinions, above which a tilt isn't trusted
LEAST_IMAGES = 3
PLACED = 0.7  # of the images: with fewer, other candidates of the axis are tried
AXIS_SCAN = 30.0  # degrees between the directions tried with all images at their places
AXIS_REACH = 3.0  # degrees about a candidate within which the whole alignment refines it


@dataclass(frozen=True)
class Start:
    """What the coarse stage found; T images.

    Attributes:
        axis: degrees; only up to 180 where `hand_open`.
        shift: (T, 2) Å, with the specimen's middle at z = 0.
        reason: (T,) why an image isn't used, None for those that are.
        thickness: Å, of the specimen, roughly.
        hand_open: the axis wasn't given.
    """

    axis: float
    shift: NDArray[np.float64]
    reason: tuple[str | None, ...]
    thickness: float
    hand_open: bool

    @property
    def use(self) -> NDArray[np.bool_]:
        """(T,)."""
        return np.array([why is None for why in self.reason])


def nominal(record: TiltSeriesRecord, axis: float) -> Alignment:
    """What is known before any alignment: the stage's angles, one axis (degrees), no shifts."""
    return from_angles(record.tilts.nominal, axis)


def from_angles(tilt: Sequence[float], axis: float) -> Alignment:
    """An alignment of tilt angles and one axis (degrees), without shifts."""
    zeros = (0.0,) * len(tilt)
    return Alignment(axis=(axis,) * len(tilt), tilt=tuple(tilt), xtilt=zeros, shift_x=zeros, shift_y=zeros)


def place(images: Images, tilt: Sequence[float], axis: float, pairs: Pairs) -> Search:
    """Place all images, with other thicknesses too where some don't find a place."""
    best = None
    scores = pairs.neighbours(axis)
    for slab in (SLAB, *SLABS):
        search = Search.begin(images, tilt, axis, slab, pairs.signal)
        search.grow(scores)
        if best is None or search.strength() > best.strength():
            best = search
        weak = len(search.placed) < ENOUGH * len(search.order) or np.median(list(search.deviations.values())) < SURE
        if slab == SLAB and not weak:
            break
    assert best is not None
    return best


def _by_candidates(
    images: Images, tilt: Sequence[float], candidates: Sequence[float], pairs: Pairs
) -> tuple[Search, float]:
    """Place all images about the first of some axes, about the others too where many find no place: the best, and its axis."""
    search, found = place(images, tilt, candidates[0], pairs), candidates[0]
    if len(search.placed) < PLACED * len(search.order):
        for other in candidates[1:]:
            tried = place(images, tilt, other, pairs)
            if tried.strength() > search.strength():
                search, found = tried, other
    return search, found


def turned(search: Search, axis: float, pairs: Pairs) -> tuple[Search, float]:
    """Turn the axis to where images that have their places agree best: the state placed about that, and the axis.

    Even where the axis was wrong, shifts are nearly right, and with them all images tell of the axis together: how well
    they agree is about a cosine of twice the angle by which it is wrong.
    """
    for _ in range(2):
        small = search.images.smaller(SMALL_SIZE)
        by = np.arange(0.0, 180.0, AXIS_SCAN)
        loss = np.array([search.derived(axis + b, small).sweep() for b in by])
        turn = np.degrees(np.angle(-(loss * np.exp(2j * np.radians(by))).sum())) / 2
        if abs(turn) < 2 * AXIS_REACH:
            break
        other = place(search.images, search.tilt.tolist(), axis + turn, pairs)
        if other.strength() <= search.strength():
            break
        search, axis = other, axis + turn
    return search, axis


def _refined(search: Search, axis: float) -> tuple[Search, float]:
    """Sweep small images with the axis turned a little either way: the state with the best axis, and that."""
    small = search.images.smaller(SMALL_SIZE)
    turned: dict[float, Search] = {}
    loss: dict[float, float] = {}

    def nearest(a: float) -> Search:
        return min(turned.items(), key=lambda t: abs(t[0] - a))[1] if turned else search

    def at(a: float) -> float:
        if a not in loss:
            turned[a] = nearest(a).derived(a, small)
            loss[a] = turned[a].sweep()
        return loss[a]

    best = min((axis, axis - AXIS_REACH, axis + AXIS_REACH), key=at)
    if best != axis:
        best = min((best, 2 * best - axis), key=at)
    left, middle, right = (at(best + AXIS_REACH * i) for i in (-1, 0, 1))
    best += AXIS_REACH * vertex(-left, -middle, -right)
    return nearest(best).derived(best, search.images), best


def _drop_copies(search: Search, reason: list[str | None]) -> None:
    """Of two images that are the same, keep the one at whose tilt the others expect it, if they do at all."""
    for i, j in search.images.copies:
        fits = {}
        for k in (i, j):
            others = [other for other in search.placed if other not in (i, j)]
            if others and k in search.placed:
                fits[k] = search.look(k, others, search.shift[k]).deviations
        if len(fits) == 2:
            worse, better = (i, j) if fits[i] < fits[j] else (j, i)
            # where neither fits clearly better, there is no telling which is at its place
            clear = fits[better] > LIKELY and fits[better] - fits[worse] > BETTER
            for k, other in ((worse, better),) if clear else ((i, j), (j, i)):
                search.deviations.pop(k, None)
                search.order.remove(k)
                reason[k] = f"a copy of image {other + 1}"


def _leave_out_doubtful(search: Search, reason: list[str | None]) -> None:
    """Leave out images that have no place, or hardly a better one than by chance, or one that the others disagree about."""
    apart, quality = search.sides()
    limit = DISAGREEMENT * search.images.box
    for j in list(search.order):
        if j not in search.deviations:
            reason[j] = "nothing in it agrees with the others"
        elif quality[j] < LIKELY:
            deviations = f"{float(quality[j]):.1f} standard deviations"
            reason[j] = f"agrees with the others hardly more than by chance ({deviations})"
        elif float(apart[j]) > limit and quality[j] < 2 * SURE:
            reason[j] = "its neighbours on either side disagree about where it lies"
        else:
            continue
        search.deviations.pop(j, None)
        search.order.remove(j)


def _level(search: Search) -> float:
    """Give all images shifts, with the slab at z = 0; its thickness, Å."""
    search.fill()
    middle, height = search.slab_heights()
    search.shift += search.matrices[:, :2, 2] * middle
    return height * search.images.pixel_size


def start(
    load: Callable[[int], NDArray[Any]],
    shape: Sequence[int],
    pixel_size: float,
    nominal_tilt: Sequence[float],
    use: Sequence[bool],
    axis: float | None = None,
    order: Sequence[int] | None = None,
) -> Start:
    """Everything that images and nominal angles tell of a tilt series at low resolution.

    Args:
        load: gives image j (rows, columns) of any real type; binned ones (at least `WORKING_SIZE`) spare time.
        shape: (T, rows, columns) of what `load` gives; pixel_size: Å of that.
        nominal_tilt: (T,) degrees, in any order.
        use: (T,) images that the user wants.
        axis: degrees, where known; refined.
        order: (T,) when each image was taken, 0 is the first; of two copies the later is then left out.

    Raises:
        InputError: fewer than `LEAST_IMAGES` images can be used, or agree with each other.
    """
    images = prepare(load, shape, pixel_size, use, tilt=nominal_tilt)
    reason: list[str | None] = [r if u else "excluded" for r, u in zip(images.reason, use, strict=True)]
    if order is not None:
        for i, j in images.copies:
            later = j if order[j] > order[i] else i
            if images.usable[later]:
                images.usable[later] = False
                reason[later] = f"a copy of image {(i if later == j else j) + 1}"
    usable = int(images.usable.sum())
    if usable < LEAST_IMAGES:
        what = f"{usable} images can be used for alignment, at least {LEAST_IMAGES} are needed"
        raise InputError(what, None, "the others are excluded or blank")
    pairs = Pairs(images.smaller(SMALL_SIZE), nominal_tilt)
    candidates = pairs.candidates() if axis is None else [axis]
    alone = by_lines(images, nominal_tilt, candidates[0])
    if alone is not None:
        candidates = [alone]
    elif axis is None:
        candidates = [pairs.refine(a, AXIS_STEP) for a in candidates]
    search, found = _by_candidates(images, nominal_tilt, candidates, pairs)
    if axis is None and alone is None:
        search, found = turned(search, found, pairs)
    search = search.derived(found, images, PADDING)
    search.measure_signal()
    search.sweep(everywhere=True)
    search.measure_signal()
    search, found = _refined(search, found) if alone is None else (search.derived(found, images), found)
    search.sweep()
    if len(search.placed) < len(search.order):
        search = search.derived(found, images, PADDING)
        search.extend()
        search = search.derived(found, images)
    search.sweep()
    if order is None:
        _drop_copies(search, reason)
    _leave_out_doubtful(search, reason)
    if len(search.placed) < LEAST_IMAGES:
        what = f"only {len(search.placed)} images agree with each other, at least {LEAST_IMAGES} are needed"
        raise InputError(what, None, "look at the images: is there anything in them that could be followed?")
    thickness = max(_level(search), LEAST_SLAB)
    return Start(
        axis=(found + 90) % 180 - 90 if axis is None else found,
        shift=(search.shift * images.pixel_size).numpy(),
        reason=tuple(reason),
        thickness=thickness,
        hand_open=axis is None,
    )
