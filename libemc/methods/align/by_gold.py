"""A tilt series aligned by its gold: beads are recognised, all images are placed by them as a constellation, and then each
bead is followed from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.align import bundle, constellation, gold, tracks
from libemc.methods.align.bundle import Tracks
from libemc.methods.align.gold import Beads
from libemc.methods.align.state import BECAUSE, STIFF, Pyramid, State, refit, scale_of, tomogram
from libemc.methods.align.tracks import Scale
from libemc.methods.subtilts import TiltGeometry

DIAMETERS = 4.0, 2.4, 2.4  # of a bead, that are looked at around it, pass by pass
PIXELS = 5.0, 16.0  # a bead's diameter over the pixel size, first and last
RADIUS = 0.35  # cycles per pixel
REACH = 2.0, 0.35, 0.15  # of a bead's diameter
PART, SURE = 0.15, 5.0  # of the mean bead, and deviations: with less an image shows none
MISFIT = 1.0, 12.0  # px of the images, and times the usual distance of beads from where they should be
FOUND = 0.5  # of those that an image should show: with fewer it isn't trusted
SHARP = 1.8  # times finer than for features are the images in which beads are recognised
LEAST_BEADS = 4
SEED = 9  # images about the lowest tilt, in which beads are recognised first
PLACED = 0.7  # of the images: with fewer, a constellation is none


def recognise(pyramid: Pyramid, state: State, use: Sequence[bool]) -> Beads | None:
    """The beads that some of the images show."""
    geometry = TiltGeometry.of(state.alignment, use)
    deep, voxel = tomogram(pyramid, geometry, gold.DEPTH)
    dark = gold.candidates(deep, voxel, geometry, pyramid.field)
    fine = pyramid.binning(pyramid.pixel / SHARP)
    return gold.recognise(pyramid.level(fine), pyramid.pixel_size * fine, geometry, dark)


def place(pyramid: Pyramid, state: State) -> Beads | None:
    """Where a few images about the lowest tilt show beads, place all by them; these beads."""
    tilt = np.array(state.alignment.tilt)
    usable = sorted(np.flatnonzero(state.use).tolist(), key=lambda j: tilt[j])
    lowest = min(range(len(usable)), key=lambda k: abs(tilt[usable[k]]))
    first = min(max(lowest - SEED // 2, 0), max(len(usable) - SEED, 0))
    seed = usable[first : first + SEED]
    beads = recognise(pyramid, state, [j in seed for j in range(len(tilt))])
    if beads is None or len(beads.points) < LEAST_BEADS:
        return None
    binning = pyramid.binning(beads.diameter / PIXELS[0])
    pixel_size = pyramid.pixel_size * binning
    maps = constellation.spots(pyramid.level(binning), pixel_size, beads.diameter)
    before = bundle.Geometry.of(state.alignment)
    rest = [j for j in usable if j not in seed]
    extent = (*pyramid.field, gold.DEPTH)
    found, beads, placed = constellation.place(maps, pixel_size, before, beads, seed, rest, extent)
    if len(placed) < PLACED * len(usable):
        return None
    order = sorted(placed, key=lambda j: tilt[j])
    moved = found.shift - before.shift
    shift = before.shift + np.stack([np.interp(tilt, tilt[order], moved[order, k]) for k in range(2)], axis=1)
    state.alignment = replace(found, shift=shift).into(state.alignment)
    return beads


def _look_for(
    pyramid: Pyramid, state: State, beads: Beads, scale: Scale, noise_points: Tensor
) -> tuple[Tracks, NDArray[np.bool_]]:
    """Beads in all images, away from where they are expected by the scale's reach at most; which images show them (T,)."""
    images = pyramid.level(pyramid.binning(scale.pixel_size))
    noise = tracks.noise_power(images, scale, state.geometry, noise_points)
    evidence = gold.compare(images, scale, state.geometry, beads, noise)
    shift = tracks.vote(evidence)
    moved, information = tracks.displacements(evidence, shift, scale.reach / 2)
    part, deviation = gold.presence(evidence, shift)
    there = part > torch.clamp_min(SURE * deviation, PART)
    return Tracks((evidence.centre + moved).numpy(), information.numpy()), there.numpy()


def misfits(residual: NDArray[np.float64], use: Sequence[bool], pixel_size: float) -> list[tuple[int, float]]:
    """Used images whose beads lie far beside where all images together have them, and by how much (median, Å).

    Args:
        residual: (T, P, 2) Å, NaN where not measured.
    """
    off = np.asarray(np.ma.median(np.ma.masked_invalid(np.linalg.norm(residual, axis=-1)), axis=1).filled(0.0))
    usual = float(np.median(off[np.array(use)]))
    limit = max(MISFIT[0] * pixel_size, MISFIT[1] * usual)
    return [(j, float(d)) for j, d in enumerate(off) if use[j] and d > limit]


def follow(pyramid: Pyramid, state: State, beads: Beads, points: Tensor, trace: Callable[[str, State], None]) -> Tracks:
    """Follow beads from coarse to fine; `points` are away from them, for the noise."""
    seen = None
    for i, part in enumerate(REACH):
        wanted = beads.diameter / PIXELS[0 if i == 0 else 1]
        pixel = pyramid.pixel_size * pyramid.binning(wanted)
        reach = max(part * beads.diameter, 3 * pixel)
        scale = scale_of(pixel, DIAMETERS[i] * beads.diameter, RADIUS, reach, beads.diameter)
        seen, there = _look_for(pyramid, state, beads, scale, points)
        fit = refit(pyramid, state, seen, STIFF if i == 0 else None)
        state.alignment, state.error = fit.geometry.into(state.alignment), fit.error
        state.fitted = {"landmarks": "beads", "spreads": bundle.describe(fit.freedom), "cross_validation": fit.scores}
        beads = replace(beads, points=torch.from_numpy(fit.points))
        trace(f"beads {i}", state)
    assert seen is not None
    shown = state.geometry.project(beads.points)[0].abs().transpose(0, 1)
    limit = torch.tensor(pyramid.field, dtype=torch.float64) / 2 - DIAMETERS[-1] * beads.diameter
    expected = (shown <= limit).all(-1).sum(1).numpy()
    found = np.isfinite(seen.position).all(-1).sum(1)
    for j in np.flatnonzero((found < FOUND * expected) | ~there):
        if state.use[j]:
            few = f"only {found[j]} of the {expected[j]} beads it should show are found"
            state.use[j] = False
            state.reason[j] = BECAUSE + (few if there[j] else "no beads where they should be")
    assert state.fit is not None
    for tilt, off in misfits(state.fit.residual, state.use, pyramid.pixel_size):
        state.use[tilt], state.reason[tilt] = (
            False,
            f"{BECAUSE}its beads are {off:.0f} Å from where the other images say",
        )
    return seen
