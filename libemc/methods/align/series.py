"""The alignment of a tilt series from beginning to end: coarse, then landmarks at finer and finer sampling, one geometry
fitted to all of them, the specimen levelled, and every tilt judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.align import bundle, by_gold, coarse, gold, landmarks, relative, slab, tracks
from libemc.methods.align.bundle import Tracks
from libemc.methods.align.deformation import fit_deformation, wandering
from libemc.methods.align.gold import Beads
from libemc.methods.align.relative import Differences
from libemc.methods.align.state import BECAUSE, STIFF, VOXELS, Image, Pyramid, State, refit, scale_of, tomogram
from libemc.methods.align.tracks import Scale
from libemc.methods.subtilts import TiltGeometry
from libemc.records import Alignment, Landmarks, TiltSeriesRecord

FEATURE_RADIUS = 0.3  # cycles per pixel
FEATURES = 110
FEATURE_DEPTH = 250.0  # Å along the beam of one landmark: what else its column holds counts as noise
FEATURE_PASSES = 6  # at most
SETTLED = 0.25  # px of the images: when a pass moves landmarks by less, it was the last
FEATURE_REACH = 0.04  # of the field
UNCERTAIN = 5.0  # px of the images: a tilt that may be off by more isn't used
THICKNESS_MARGIN = 1.15
LEAST_SHARE = 0.4  # of the images: when fewer can be used, the alignment is none
SLAB_DEPTH = 1.8  # of the thickness guessed, in which the specimen's faces are looked for
LEAST_THICKNESS = 400.0  # Å that landmarks are thought to be spread over
FACES_APART = 300.0  # Å between layers of beads that tell them from a single one
STRAY = 1.0, 6.0  # degrees, and times what is usual, by which a tilt may differ from the stage's
SAME_PLANE = 2.0  # degrees: the density and the landmarks must agree so far before a specimen without gold is turned


class Timer:
    """Wall seconds of the parts of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time within to a part."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 3)


@dataclass(frozen=True)
class Result:
    """An alignment with all that is known about it; T tilts, P landmarks.

    Attributes:
        alignment: the record's section.
        use: (T,); reason: (T,) why an image isn't used.
        position: (T, P, 2) Å from the image centre, where the landmarks were seen, NaN where not; residual: (T, P, 2) Å.
        first: the alignment after the coarse stage.
    """

    alignment: Alignment
    use: tuple[bool, ...]
    reason: tuple[str | None, ...]
    position: NDArray[np.float64]
    residual: NDArray[np.float64]
    first: Alignment


def _find(pyramid: Pyramid, state: State) -> Tensor:
    """Landmarks, as the geometry is now."""
    depth = min(THICKNESS_MARGIN * (state.alignment.thickness or coarse.SLAB), 2 / 3 * max(pyramid.field))
    volume, voxel = tomogram(pyramid, state.geometry, depth)
    return landmarks.find(volume, voxel, state.geometry, pyramid.field, pyramid.diameter, FEATURES)


def follow_features(pyramid: Pyramid, state: State, points: Tensor, scale: Scale) -> Tracks:
    """Find landmarks in all images, and improve the geometry by them."""
    images = pyramid.level(pyramid.binning(scale.pixel_size))
    noise = tracks.noise_power(images, scale, state.geometry, points)
    evidence = tracks.compare(images, scale, state.geometry, points, noise, state.gains)
    state.gains = evidence.gain
    shift = tracks.vote(evidence)
    moved, information = tracks.displacements(evidence, shift, scale.reach / 2)
    assert evidence.links is not None
    seen, links = evidence.seen.numpy(), evidence.links.double().numpy()
    geometry = bundle.Geometry.of(state.alignment)
    differences = Differences(moved.numpy(), information.numpy(), links, seen, geometry, points.numpy(), scale.reach)
    moves = relative.explain(differences)
    state.alignment, state.error = moves.geometry.into(state.alignment), moves.error
    state.fitted = {"landmarks": "features", "spread_over_usual": moves.freedom}
    return Tracks(evidence.centre.numpy() + moves.displacement, information.numpy())


def _not_rigid(geometry: TiltGeometry, moved: Tensor) -> Tensor:
    """Image displacements of points, (P, T, 2) of the used tilts, without what a motion of each point explains."""
    rows = geometry.matrices[geometry.use][:, :2].reshape(-1, 3)
    flat = moved.flatten(1)
    q = torch.linalg.qr(rows)[0]
    return (flat - flat @ q @ q.T).reshape(moved.shape)


def align(
    load: Callable[[int], Image],
    record: TiltSeriesRecord,
    axis: float | None,
    base: Alignment | None = None,
    local: bool = False,
    trace: Callable[[str, State], None] = lambda part, state: None,
) -> Result:
    """Align a tilt series.

    Args:
        load: gives raw image j (rows, columns) of any real type.
        record: what is known of it.
        axis: degrees, None where it must be found.
        base: the alignment to start from; None: from nothing but the nominal angles.
        local: look for smooth local motion too, and keep what cross-validation pays for.
        trace: called after every part, for those who want to see how it goes.

    Raises:
        InputError: too few of the images agree with each other.
    """
    source, timer = record.source, Timer()
    pyramid = Pyramid(load, source.shape, source.pixel_size, record.tilts.use, source.contrast == "bright")
    reason = record.tilts.reason or (None,) * source.shape[0]
    with timer.part("images"):
        pyramid.level(pyramid.binning(pyramid.pixel / by_gold.SHARP))
    with timer.part("coarse"):
        state = begin(pyramid, record, axis) if base is None else State.of(base, record.tilts.use, reason, record)
    first = state.alignment
    trace("coarse", state)
    with timer.part("gold"):
        beads = by_gold.place(pyramid, state) if base is None else None
        trace("constellation", state)
        more = by_gold.recognise(pyramid, state, state.use)
        beads = max((b for b in (beads, more) if b is not None), key=lambda b: len(b.points), default=None)
    points = _find(pyramid, state)
    if beads is not None and len(beads.points) >= by_gold.LEAST_BEADS:
        with timer.part("beads"):
            seen = by_gold.follow(pyramid, state, beads, points, trace)
    else:
        beads = None
        with timer.part("features"):
            seen = _by_features(pyramid, state, points, trace)
    if local:
        with timer.part("local"):
            _bend(pyramid, state, seen)
            trace("local", state)
    if beads is not None:
        assert state.fit is not None
        order = np.array(state.order if state.order is not None else state.alignment.tilt)
        directions = state.fit.geometry.matrices[:, :2]
        state.error = np.hypot(state.error, wandering(state.fit.residual, state.fit.points, directions, order))
    _judge(state, record)
    alignment = _described(state, beads)
    with timer.part("slab"):
        alignment = _levelled(pyramid, state, alignment, beads)
    freedom = {**state.fitted, "seconds": timer.seconds}
    alignment = alignment.model_copy(update={"freedom": freedom})
    assert state.fit is not None
    return Result(alignment, tuple(state.use), tuple(state.reason), seen.position, state.fit.residual, first)


def begin(pyramid: Pyramid, record: TiltSeriesRecord, axis: float | None) -> State:
    """The coarse stage."""
    binning, tilts = pyramid.binning(pyramid.pixel), record.tilts
    images, pixel_size = pyramid.level(binning), pyramid.pixel_size * binning
    begun = coarse.start(images.__getitem__, images.shape, pixel_size, tilts.nominal, tilts.use, axis, tilts.order)
    alignment = coarse.from_angles(tilts.nominal, begun.axis).model_copy(
        update={
            "shift_x": tuple(begun.shift[:, 0].tolist()),
            "shift_y": tuple(begun.shift[:, 1].tolist()),
            "thickness": begun.thickness,
            "hand_open": begun.hand_open,
        }
    )
    old = tilts.reason or (None,) * len(tilts.use)
    use = [u and why is None for u, why in zip(tilts.use, begun.reason, strict=True)]
    reason = [
        BECAUSE + why if u and why is not None else before
        for u, why, before in zip(tilts.use, begun.reason, old, strict=True)
    ]
    return State.of(alignment, use, reason, record)


def _by_features(pyramid: Pyramid, state: State, points: Tensor, trace: Callable[[str, State], None]) -> Tracks:
    """Follow whatever stands out, until the geometry settles."""
    pixel_size = pyramid.pixel_size * pyramid.binning(pyramid.pixel)
    seen = None
    for i in range(FEATURE_PASSES):
        if i in (1, 2):
            measured = specimen(pyramid, state)
            if measured is not None:
                thickness = max(LEAST_THICKNESS, measured.thickness)
                state.alignment = state.alignment.model_copy(update={"thickness": thickness})
            points = _find(pyramid, state)
        reach = max(FEATURE_REACH * max(pyramid.field) / 2**i, 4 * pixel_size)
        # to begin with, all that a column holds keeps smooth errors in sight; objects one by one are surer later
        depth = state.alignment.thickness or coarse.SLAB
        depth = depth if i == 0 else min(depth, FEATURE_DEPTH)
        scale = scale_of(pixel_size, pyramid.diameter, FEATURE_RADIUS, reach, depth)
        before = state.geometry.project(points)[0]
        seen = follow_features(pyramid, state, points, scale)
        trace(f"features {i}", state)
        moved = _not_rigid(state.geometry, (state.geometry.project(points)[0] - before)[:, state.geometry.use])
        if i >= 2 and float(moved.square().sum(-1).mean().sqrt()) < SETTLED * pyramid.pixel_size:
            break
    assert seen is not None
    refit(pyramid, state, seen, STIFF)  # for the landmarks' places and residuals; the geometry is there already
    return seen


def _bend(pyramid: Pyramid, state: State, seen: Tracks) -> None:
    """Smooth local motion, if cross-validation pays for it."""
    assert state.fit is not None
    field_, fit, scores = fit_deformation(seen, state.fit, pyramid.field, state.order)
    state.fitted["local"] = scores
    if field_ is not None:
        state.fit = fit
        state.alignment = fit.geometry.into(state.alignment).model_copy(update={"deformation": field_})
        state.error = fit.error


def _judge(state: State, record: TiltSeriesRecord) -> None:
    """Leave out what can't be trusted.

    Raises:
        InputError: too little is left.
    """
    for j, error in enumerate(state.error):
        if state.use[j] and not error <= UNCERTAIN * record.source.pixel_size:
            state.use[j], state.reason[j] = False, f"{BECAUSE}its position is uncertain by {error:.0f} Å"
    nominal, tilt = np.array(record.tilts.nominal), np.array(state.alignment.tilt)
    stray = tilt - nominal
    stray = stray - np.median(stray[state.use])
    usual = 1.4826 * float(np.median(np.abs(stray[state.use])))
    for j, by in enumerate(np.abs(stray)):
        if state.use[j] and by > max(STRAY[0], STRAY[1] * usual):
            state.use[j] = False
            state.reason[j] = f"{BECAUSE}it shows the specimen at {tilt[j]:.1f}° instead of {nominal[j]:.1f}°"
    wanted = sum(record.tilts.use)
    if sum(state.use) < max(LEAST_SHARE * wanted, coarse.LEAST_IMAGES):
        what = f"can't be aligned: only {sum(state.use)} of {wanted} images agree with each other"
        remedy = "look at them: exclude what is spoilt, give --axis, or leave the series out"
        raise InputError(what, record.name, remedy)


def _described(state: State, beads: Beads | None) -> Alignment:
    """The alignment with its landmarks, residuals and errors."""
    fit = state.fit
    assert fit is not None
    squares = np.ma.masked_invalid((fit.residual**2).sum(-1))
    by_tilt, by_landmark = (_listed(np.sqrt(squares.mean(axis=axis)).filled(np.nan)) for axis in (1, 0))
    count = len(fit.points)
    found = Landmarks(
        xyz=tuple((float(x), float(y), float(z)) for x, y, z in fit.points),
        kind=("feature" if beads is None else "bead",) * count,
        diameter=(None if beads is None else beads.diameter,) * count,
        residual=by_landmark,
    )
    update = {"residual": by_tilt, "error": _listed(state.error), "landmarks": found, "loss": None}
    return state.alignment.model_copy(update=update)


def _listed(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(float(v) if np.isfinite(v) else None for v in values)


def specimen(pyramid: Pyramid, state: State, beads: Beads | None = None) -> slab.Slab | None:
    """Where the specimen lies, None if that can't be told: by beads that lie on both faces of it, or by the density without
    the beads."""
    binning = pyramid.near(max(pyramid.field) / VOXELS)
    pixel_size = pyramid.pixel_size * binning
    depth = min(SLAB_DEPTH * (state.alignment.thickness or coarse.SLAB) + 200.0, 2 / 3 * max(pyramid.field))
    images = pyramid.level(binning)
    if beads is not None:
        between = slab.between(beads.points.numpy(), beads.diameter / 2)
        if between is not None and between.thickness - beads.diameter >= FACES_APART:
            return between
        images = gold.without(images, pixel_size, state.geometry, beads)
    seen = slab.measure(*slab.half_tomograms(images, state.geometry, pixel_size, depth), pixel_size)
    return seen if seen is None or beads is None else slab.holding(seen, beads.points.numpy(), beads.diameter / 2)


def _levelled(pyramid: Pyramid, state: State, alignment: Alignment, beads: Beads | None) -> Alignment:
    """The alignment with the specimen's plane level, its middle at z = 0, and its thickness, as far as they can be seen."""
    if beads is not None:
        assert alignment.landmarks is not None
        beads = replace(beads, points=torch.tensor(alignment.landmarks.xyz, dtype=torch.float64))
    seen = specimen(pyramid, state, beads)
    if seen is None:
        return alignment
    assert alignment.landmarks is not None
    if "feature" in alignment.landmarks.kind:
        plane = slab.plane_of_points(np.array(alignment.landmarks.xyz))
        if plane is None or math.degrees(math.acos(min(1.0, float(np.dot(plane.normal, seen.normal))))) > SAME_PLANE:
            seen = replace(seen, normal=(0.0, 0.0, 1.0))
    return slab.level(alignment, seen)


def summary(record: TiltSeriesRecord) -> str:
    """Main figures of a record's alignment in a few words."""
    alignment = record.alignment
    if alignment is None:
        return "not aligned"
    error = [e for e, used in zip(alignment.error or (), record.tilts.use, strict=False) if used and e is not None]
    parts = [f"{sum(record.tilts.use)} of {len(record.tilts.use)} tilts", f"axis {np.median(alignment.axis):.1f}°"]
    if alignment.landmarks:
        parts.append(f"{len(alignment.landmarks.xyz)} {alignment.landmarks.kind[0]}s")
    if error:
        parts.append(f"error {np.median(error):.1f} Å")
    if alignment.thickness:
        parts.append(f"thickness {alignment.thickness:.0f} Å")
    return ", ".join(parts)
