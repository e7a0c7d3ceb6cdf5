"""The alignment of a tilt series from beginning to end: coarse, then landmarks at finer and finer sampling, one geometry
fitted to all of them, the specimen levelled, and every tilt judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.errors import InputError
from libemc.methods.align import bundle, coarse, gold, landmarks, relative, slab, tracks
from libemc.methods.align.bundle import Tracks
from libemc.methods.align.deformation import fit_deformation
from libemc.methods.align.gold import Beads
from libemc.methods.align.tracks import Scale
from libemc.methods.reconstruct import bin_image
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.filters import normalise
from libemc.records import Alignment, Landmarks, TiltSeriesRecord

Image = NDArray[Any]
VOXELS = 160  # of the coarse tomogram's longer side
FEATURE_DIAMETER, FEATURE_SHARE = 600.0, 0.25  # what is looked at around a landmark: Å, and of the field, at most
FEATURE_PIXELS, FEATURE_RADIUS = 50.0, 0.3  # of that diameter; cycles per pixel
LEAST_BOX = 26  # px of what is looked at around a landmark
FEATURES = 110
FEATURE_PASSES = 6  # at most
SETTLED = 0.25  # px of the images: when a pass moves landmarks by less, it was the last
FEATURE_REACH = 0.04  # of the field
BEAD_DIAMETERS = 4.0, 2.4, 2.4  # of a bead, that are looked at around it, pass by pass
BEAD_PIXELS = 5.0, 16.0  # a bead's diameter over the pixel size, first and last
BEAD_RADIUS = 0.35  # cycles per pixel
BEAD_REACH = 2.0, 0.35, 0.15  # of a bead's diameter
BEAD_DEPTH = 3000.0  # Å along z in which gold is looked for
BEADS_FOUND = 0.5  # of those that an image should show: with fewer it isn't trusted
SHARP = 1.5  # times finer than for features are the images in which beads are recognised
LEAST_BEADS = 4
UNCERTAIN = 5.0  # px of the images: a tilt that may be off by more isn't used
THICKNESS_MARGIN = 1.15
LEAST_SHARE = 0.4  # of the images: when fewer can be used, the alignment is none
SLAB_DEPTH = 1.8  # of the thickness guessed, in which the specimen's faces are looked for
SAME_PLANE = 2.0  # degrees: the density and the landmarks must agree so far before a specimen without gold is turned
STIFF = bundle.Freedom((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
BECAUSE = "alignment: "
"""How the reasons begin for which an alignment leaves images out; the next one considers them again."""


class Pyramid:
    """The images of a tilt series at several samplings, normalised: mean 0, deviation 1, dark specimen.

    Args:
        load: gives image j (rows, columns) of any real type.
        shape: (T, rows, columns).
        use: (T,) which images are wanted.
        bright: the specimen is brighter than its surroundings.
    """

    def __init__(
        self, load: Callable[[int], Image], shape: Sequence[int], pixel_size: float, use: Sequence[bool], bright: bool
    ) -> None:
        self.load, self.shape, self.pixel_size, self.use = load, tuple(shape), pixel_size, list(use)
        self.sign = -1.0 if bright else 1.0
        self._levels: dict[int, NDArray[np.float32]] = {}

    @property
    def field(self) -> tuple[float, float]:
        """Å along x and y."""
        return self.shape[2] * self.pixel_size, self.shape[1] * self.pixel_size

    @property
    def diameter(self) -> float:
        """Å: what is looked at around a landmark."""
        return min(FEATURE_DIAMETER, FEATURE_SHARE * max(self.field))

    @property
    def pixel(self) -> float:
        """Å: wanted of the pixels in which landmarks are looked at."""
        return self.diameter / FEATURE_PIXELS

    def binning(self, pixel_size: float) -> int:
        """The largest power of two whose pixels are no larger than that; at least 1."""
        return 2 ** max(0, math.floor(math.log2(max(pixel_size / self.pixel_size, 1.0)) + 1e-6))

    def near(self, pixel_size: float) -> int:
        """The power of two as binning whose pixels are nearest to that."""
        return 2 ** max(0, round(math.log2(pixel_size / self.pixel_size)))

    def level(self, binning: int) -> NDArray[np.float32]:
        """(T, rows // binning, columns // binning); images not wanted are 0. Kept for the next call."""
        if binning not in self._levels:
            finer = max((b for b in self._levels if binning % b == 0), default=0)
            rows, columns = self.shape[1] // binning, self.shape[2] // binning
            out = np.zeros((self.shape[0], rows, columns), np.float32)
            for j in range(self.shape[0]):
                if not self.use[j]:
                    continue
                if finer:
                    image = bin_image(torch.from_numpy(self._levels[finer][j]), binning // finer)
                else:
                    image = self.sign * bin_image(torch.from_numpy(np.array(self.load(j), dtype=np.float32)), binning)
                out[j] = normalise(image).numpy()
            self._levels[binning] = out
        return self._levels[binning]


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
        seconds: wall time of the parts.
    """

    alignment: Alignment
    use: tuple[bool, ...]
    reason: tuple[str | None, ...]
    position: NDArray[np.float64]
    residual: NDArray[np.float64]
    first: Alignment
    seconds: dict[str, float]


@dataclass
class State:
    """The present geometry, and what was learnt on the way.

    Attributes:
        gains: (T,) signal of each image over the mean of all; error: (T,) Å; fitted: what, how freely.
    """

    alignment: Alignment
    use: list[bool]
    reason: list[str | None]
    order: Sequence[int] | None
    gains: Tensor
    error: NDArray[np.float64]
    fit: bundle.Fit | None = None
    fitted: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(alignment: Alignment, use: Sequence[bool], reason: Sequence[str | None], record: TiltSeriesRecord) -> State:
        """At the beginning; any local motion in the alignment is taken off."""
        whole = alignment.model_copy(update={"deformation": None})
        count = len(use)
        return State(whole, list(use), list(reason), record.tilts.order, torch.ones(count), np.full(count, np.inf))

    @property
    def geometry(self) -> TiltGeometry:
        """As the forward model needs it."""
        return TiltGeometry.of(self.alignment, self.use)


def _scale(pixel_size: float, diameter: float, radius: float, reach: float, depth: float) -> Scale:
    diameter = max(diameter, LEAST_BOX * pixel_size)
    return Scale(pixel_size, diameter, radius, min(reach, 0.4 * diameter / tracks.WINDOW), depth)


def _tomogram(pyramid: Pyramid, state: State, least: float = 0.0) -> tuple[Tensor, float]:
    """A coarse tomogram and its voxel size; `least` Å deep, or what the specimen is thought to need."""
    binning = pyramid.near(max(pyramid.field) / VOXELS)
    pixel_size = pyramid.pixel_size * binning
    depth = max(THICKNESS_MARGIN * (state.alignment.thickness or coarse.SLAB), least)
    depth = min(depth, 2 / 3 * max(pyramid.field))
    return landmarks.coarse_tomogram(pyramid.level(binning), pixel_size, state.geometry, depth), pixel_size


def follow_features(pyramid: Pyramid, state: State, points: Tensor, scale: Scale) -> Tracks:
    """Find landmarks in all images, and improve the geometry by them."""
    images = pyramid.level(pyramid.binning(scale.pixel_size))
    noise = tracks.noise_power(images, scale, state.geometry, points)
    evidence = tracks.compare(images, scale, state.geometry, points, noise, state.gains)
    state.gains = evidence.gain
    shift, _ = tracks.vote(evidence)
    moved, information = tracks.displacements(evidence, shift, scale.reach / 2)
    assert evidence.links is not None
    moves = relative.explain(
        moved.numpy(),
        information.numpy(),
        evidence.links.double().numpy(),
        evidence.seen.numpy(),
        bundle.Geometry.of(state.alignment),
        points.numpy(),
        scale.reach,
    )
    state.alignment, state.error = moves.geometry.into(state.alignment), moves.error
    state.fitted = {"landmarks": "features", "spread_over_usual": moves.freedom}
    return Tracks(evidence.centre.numpy() + moves.displacement, information.numpy())


def follow_beads(pyramid: Pyramid, state: State, beads: Beads, scale: Scale, noise_points: Tensor) -> Tracks:
    """Find beads in all images."""
    images = pyramid.level(pyramid.binning(scale.pixel_size))
    noise = tracks.noise_power(images, scale, state.geometry, noise_points)
    evidence = gold.compare(images, scale, state.geometry, beads, noise)
    shift, _ = tracks.vote(evidence)
    moved, information = tracks.displacements(evidence, shift, scale.reach / 2)
    return Tracks((evidence.centre + moved).numpy(), information.numpy())


def _fit(pyramid: Pyramid, state: State, seen: Tracks, freedom: bundle.Freedom | None) -> bundle.Fit:
    """Fit geometry and landmarks to tracks."""
    position = np.where(np.array(state.use)[:, None, None], seen.position, np.nan)
    extent = (*pyramid.field, state.alignment.thickness or coarse.SLAB)
    start = bundle.Geometry.of(state.alignment)
    state.fit = bundle.adjust(Tracks(position, seen.information), start, freedom, state.order, field=extent)
    return state.fit


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
        pyramid.level(pyramid.binning(pyramid.pixel / SHARP))
    with timer.part("coarse"):
        state = _begin(pyramid, record, axis) if base is None else State.of(base, record.tilts.use, reason, record)
    first = state.alignment
    trace("coarse", state)
    with timer.part("gold"):
        deep, voxel = _tomogram(pyramid, state, BEAD_DEPTH)
        dark = gold.candidates(deep, voxel, state.geometry, pyramid.field)
        fine = pyramid.binning(pyramid.pixel / SHARP)
        beads = gold.recognise(pyramid.level(fine), source.pixel_size * fine, state.geometry, dark)
    volume, voxel = _tomogram(pyramid, state)
    points = landmarks.find(volume, voxel, state.geometry, pyramid.field, pyramid.diameter, FEATURES)
    if beads is not None and len(beads.points) >= LEAST_BEADS:
        with timer.part("beads"):
            seen = _by_beads(pyramid, state, beads, points, trace)
    else:
        beads = None
        with timer.part("features"):
            seen = _by_features(pyramid, state, points, trace)
    if local:
        with timer.part("local"):
            _bend(pyramid, state, seen)
            trace("local", state)
    _judge(state, record)
    alignment = _described(state, beads)
    with timer.part("slab"):
        alignment = _levelled(pyramid, state, alignment)
    freedom = {**state.fitted, "seconds": timer.seconds}
    alignment = alignment.model_copy(update={"freedom": freedom})
    assert state.fit is not None
    return Result(
        alignment, tuple(state.use), tuple(state.reason), seen.position, state.fit.residual, first, timer.seconds
    )


def _begin(pyramid: Pyramid, record: TiltSeriesRecord, axis: float | None) -> State:
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


def _by_beads(
    pyramid: Pyramid, state: State, beads: Beads, points: Tensor, trace: Callable[[str, State], None]
) -> Tracks:
    """Follow beads from coarse to fine; `points` are away from them, for the noise."""
    seen = None
    for i, part in enumerate(BEAD_REACH):
        wanted = beads.diameter / BEAD_PIXELS[0 if i == 0 else 1]
        pixel = pyramid.pixel_size * pyramid.binning(wanted)
        reach = max(part * beads.diameter, 3 * pixel)
        scale = _scale(pixel, BEAD_DIAMETERS[i] * beads.diameter, BEAD_RADIUS, reach, beads.diameter)
        seen = follow_beads(pyramid, state, beads, scale, points)
        fit = _fit(pyramid, state, seen, STIFF if i == 0 else None)
        state.alignment, state.error = fit.geometry.into(state.alignment), fit.error
        state.fitted = {"landmarks": "beads", "spreads": bundle.describe(fit.freedom), "cross_validation": fit.scores}
        beads = replace(beads, points=torch.from_numpy(fit.points))
        trace(f"beads {i}", state)
    assert seen is not None
    shown = state.geometry.project(beads.points)[0].abs().transpose(0, 1)
    limit = torch.tensor(pyramid.field, dtype=torch.float64) / 2 - BEAD_DIAMETERS[-1] * beads.diameter
    expected = (shown <= limit).all(-1).sum(1).numpy()
    found = np.isfinite(seen.position).all(-1).sum(1)
    for j in np.flatnonzero(found < BEADS_FOUND * expected):
        if state.use[j]:
            state.use[j] = False
            state.reason[j] = f"{BECAUSE}only {found[j]} of the {expected[j]} beads it should show are found"
    return seen


def _by_features(pyramid: Pyramid, state: State, points: Tensor, trace: Callable[[str, State], None]) -> Tracks:
    """Follow whatever stands out, until the geometry settles."""
    pixel_size = pyramid.pixel_size * pyramid.binning(pyramid.pixel)
    seen = None
    for i in range(FEATURE_PASSES):
        if i in (1, 2):
            volume, voxel = _tomogram(pyramid, state)
            points = landmarks.find(volume, voxel, state.geometry, pyramid.field, pyramid.diameter, FEATURES)
        reach = max(FEATURE_REACH * max(pyramid.field) / 2**i, 4 * pixel_size)
        depth = state.alignment.thickness or coarse.SLAB
        scale = _scale(pixel_size, pyramid.diameter, FEATURE_RADIUS, reach, depth)
        before = state.geometry.project(points)[0]
        seen = follow_features(pyramid, state, points, scale)
        trace(f"features {i}", state)
        moved = _not_rigid(state.geometry, (state.geometry.project(points)[0] - before)[:, state.geometry.use])
        if i >= 2 and float(moved.square().sum(-1).mean().sqrt()) < SETTLED * pyramid.pixel_size:
            break
    assert seen is not None
    _fit(pyramid, state, seen, STIFF)  # for the landmarks' places and residuals; the geometry is there already
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


def _levelled(pyramid: Pyramid, state: State, alignment: Alignment) -> Alignment:
    """The alignment with the specimen's plane level, its middle at z = 0, and its thickness, as far as they can be seen."""
    binning = pyramid.near(max(pyramid.field) / VOXELS)
    pixel_size = pyramid.pixel_size * binning
    depth = min(SLAB_DEPTH * (alignment.thickness or coarse.SLAB) + 200.0, 2 / 3 * max(pyramid.field))
    geometry = TiltGeometry.of(alignment, state.use)
    halves = slab.half_tomograms(pyramid.level(binning), geometry, pixel_size, depth)
    seen = slab.measure(*halves, pixel_size)
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
