"""The specimen as a slab: its plane, its height and its thickness, and the alignment that lays it flat.

Density is told from noise and from the streaks of a limited tilt range by two tomograms from every other tilt: what is
there lies at the same place in both, the streaks of one fall between those of the other. The product of the two,
smoothed, has its peaks on particles, beads and whatever else has detail; a slab is the plane layer that holds nearly
all of them and is as thin as it can be. Faces say more than means here: a few particles on either face fix the plane
better than many in between (the least-squares plane of N points in a layer is off by about thickness over field over √N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from libemc.methods.reconstruct import Grid, Weighting, small_tomogram
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.filters import bandpass
from libemc.numerics.rotations import tilt_angles_from_matrix
from libemc.records import Alignment

Array = NDArray[np.float64]

FINEST = 40.0  # Å, and at least 3 voxels: the finest detail that is looked at
COARSE_OVER_FINE = 5.0
OUTLIER = 3.0  # deviations of the noise at which voxels are cut off: gold must not outshine the rest
SMOOTHING = 40.0  # Å: deviation of the Gaussian under which the two halves are compared
APART = 60.0  # Å: a peak is the highest within so much along each axis
SIGNIFICANT = 7.0  # deviations of the noise for a peak; the most negative ones of noise and streaks stay below
BORDER = 1 / 30  # of the field: peaks nearer to the border are artefacts
FEWEST = 6  # points that a slab is believed from
STEEPEST, PRIOR = 25.0, 6.0  # degrees: search range of each slope, and the deviation of what is met in practice
COARSE_STEP, FINE_STEPS = 1.0, 21  # degrees; places on each side of the fine grid
FACE, FACE_SHARE = 30.0, 0.1  # Å from a face that count as on it, and the share of the points expected there
STRAY = 0.02  # share of points expected outside the slab
MOST_STRAY = 0.15  # at most
LEAST_SPREAD = 0.08  # of the field: deviation of the points across their narrowest direction
LARGEST_ERROR = 4.0  # degrees: a plane less certain than this isn't one
FULL = 0.92  # of the volume's depth: a layer that thick is no layer
LEAST_GAIN = 6.0, 0.12  # log-likelihood over that of points anywhere: in all, and for each point
EXTENT_LEVEL = 0.25  # of an object's power, half of its amplitude: where its edge is taken to be
REACH = 240.0  # Å around a peak in which its extent is looked for


@dataclass(frozen=True)
class Slab:
    """A plane layer in the specimen frame.

    Attributes:
        normal: (x, y, z), unit length, z > 0.
        height: Å, z of the middle plane on the z axis (x = y = 0).
        thickness: Å along the normal; of `plane_of_points`, between the outermost points.
        angle_error: degrees, expected error of the normal.
        points: how many objects it rests on.
        inside: share of them that lies in it.
    """

    normal: tuple[float, float, float]
    height: float
    thickness: float
    angle_error: float
    points: int
    inside: float

    @property
    def slopes(self) -> tuple[float, float]:
        """Degrees by which the middle plane rises along x and along y."""
        x, y, z = self.normal
        return math.degrees(math.atan2(-x, z)), math.degrees(math.atan2(-y, z))


# ------------------------------------------------------------------------------------------------- what is in the volume
def half_tomograms(
    images: NDArray[Any], geometry: TiltGeometry, pixel_size: float, depth: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two tomograms of the whole field, each from every other used tilt in the order of their angles.

    Args:
        images: (T, rows, columns) small ones (a few hundred pixels), tapered to 0 at the border.
        geometry: of these T images, Å.
        pixel_size: Å, of the images and of the voxels.
        depth: Å along z; by default two thirds of the longer side.

    Returns:
        Both (z, y, x), a square field that holds the images in any direction.
    """
    used = torch.nonzero(geometry.use)[:, 0]
    height = geometry.matrices[used, 2, 2].clamp(-1, 1)
    side = torch.sign(geometry.matrices[used, 2, 0])
    order = used[torch.argsort(torch.acos(height) * side)].tolist()
    n = max(images.shape[1:])
    n_z = 2 * round((2 / 3 * n if depth is None else depth / pixel_size) / 2)
    grid, weighting = Grid((n_z, n, n), pixel_size), Weighting(thickness=n * pixel_size / 2)
    first, second = (
        small_tomogram(images[part], geometry.select(part), grid, weighting) for part in (order[0::2], order[1::2])
    )
    return first, second


def _detail(volume: NDArray[Any], pixel_size: float) -> tuple[NDArray[np.float32], float]:
    """A volume's detail and the level of its outliers."""
    fine = max(FINEST, 3 * pixel_size)
    values = bandpass(
        torch.from_numpy(np.asarray(volume, np.float32)), pixel_size, COARSE_OVER_FINE * fine, fine
    ).numpy()
    return values, OUTLIER * 1.4826 * float(np.median(np.abs(values)))


def _peaks(power: NDArray[np.float32], pixel_size: float) -> NDArray[np.int64]:
    """(P, 3) voxels z, y, x of the significant peaks of a volume whose noise is even about 0."""
    smooth = ndimage.gaussian_filter(power, SMOOTHING / pixel_size)
    negative = smooth[smooth < 0]
    if negative.size == 0:
        return np.zeros((0, 3), np.int64)
    level = SIGNIFICANT * float(np.median(-negative)) / 0.6745
    size = 2 * max(1, round(APART / pixel_size)) + 1
    top = (smooth > level) & (smooth == ndimage.maximum_filter(smooth, size=size))
    margin = max(2, round(BORDER * max(smooth.shape)))
    inner = np.zeros_like(top)
    inner[margin:-margin, margin:-margin, margin:-margin] = True
    return np.argwhere(top & inner)


def _extent(power: NDArray[np.float32], places: NDArray[np.int64], pixel_size: float) -> float:
    """Å from the middle of the objects at some voxels to their edges across the beam, typical of all of them.

    Across, since along it the missing tilts draw everything out.
    """
    if not len(places):
        return 0.0
    reach = round(REACH / 2 / pixel_size)
    offset = np.arange(-reach, reach + 1)
    radius = np.hypot(offset, offset[:, None]) * pixel_size
    ring = np.minimum(radius / pixel_size, reach).astype(int)
    counts = np.bincount(ring.ravel())
    padded = np.pad(power, ((1, 1), (reach, reach), (reach, reach)))
    profiles = []
    for z, y, x in places:
        disc = padded[z : z + 3, y : y + 2 * reach + 1, x : x + 2 * reach + 1].mean(axis=0)
        profile = np.bincount(ring.ravel(), disc.ravel()) / counts
        profiles.append(profile / max(float(profile.max()), 1e-30))
    profile = np.median(profiles, axis=0)
    profile = profile / profile.max()
    outside = np.nonzero(profile[int(profile.argmax()) :] < EXTENT_LEVEL)[0]
    if not len(outside):
        return REACH / 2
    i = int(outside[0]) + int(profile.argmax())
    part = (profile[i - 1] - EXTENT_LEVEL) / (profile[i - 1] - profile[i])
    return float((i - 1 + 0.5 + part) * pixel_size)


# ------------------------------------------------------------------------------------------------- the layer of the points
def _layers(heights: Array, weights: Array, depth: float) -> tuple[Array, Array]:
    """Log-likelihood (G,) of the best layer at each of G directions, and its faces (G, 2).

    Points lie anywhere in it with one probability, on its faces with another, outside with a small one.

    Args:
        heights: (G, P) along the normal, Å.
        weights: (P,) how far each point counts.
        depth: Å, where points outside may be.
    """
    order = np.argsort(heights, axis=1)
    h, w = np.take_along_axis(heights, order, axis=1), weights[order]
    most = int(MOST_STRAY * h.shape[1])
    trims = sorted({round(most * f) for f in (0, 0.08, 0.2, 0.4, 0.6, 1)} | set(range(min(most, 4) + 1)))
    best = np.full(len(h), -np.inf)
    faces = np.zeros((len(h), 2))
    for low, high in product(trims, trims):
        if low + high > most:
            continue
        bottom, top = h[:, low, None], h[:, h.shape[1] - 1 - high, None]
        width = np.maximum(top - bottom, 2 * FACE)
        inside = (h >= bottom) & (h <= top)
        on_face = (inside & (h - bottom <= FACE)).astype(float) + (inside & (top - h <= FACE))
        density = (1 - STRAY) * ((1 - FACE_SHARE) * inside / width + FACE_SHARE * on_face / (2 * FACE)) + STRAY / depth
        likelihood = (w * np.log(density)).sum(axis=1)
        better = likelihood > best
        best[better] = likelihood[better]
        faces[better] = np.concatenate([bottom, top], axis=1)[better]
    return best, faces


def plane_of_points(points: Array, confidence: Array | None = None, depth: float | None = None) -> Slab | None:
    """The thinnest layer that holds nearly all points: landmarks, for example.

    The plane is the mean over all directions, each as likely as the layer that it allows.

    Args:
        points: (P, 3) x, y, z, Å.
        confidence: (P,) 0 to 1, what each counts; None: all the same.
        depth: Å along z where points could be; by default three times the extent of these.

    Returns:
        None where they are too few, too near to one line, or no layer.
    """
    points = np.asarray(points, float).reshape(-1, 3)
    weights = np.ones(len(points)) if confidence is None else np.asarray(confidence, float)
    points, weights = points[weights > 0], weights[weights > 0]
    if len(points) < FEWEST:
        return None
    flat = points[:, :2] - points[:, :2].mean(axis=0)
    if np.sqrt(np.linalg.eigvalsh(flat.T @ flat / len(flat))[0]) < LEAST_SPREAD * np.ptp(points[:, :2], axis=0).max():
        return None
    depth = 3 * max(float(np.ptp(points[:, 2])), 4 * FACE) if depth is None else depth

    def search(slopes: Array) -> tuple[Array, Array, Array]:
        tangents = np.tan(np.deg2rad(slopes))
        stretch = np.sqrt(1 + (tangents**2).sum(axis=1))
        heights = (points[:, 2] - tangents @ points[:, :2].T) / stretch[:, None]
        likelihood, faces = _layers(heights, weights, depth)
        return likelihood - (slopes**2).sum(axis=1) / (2 * PRIOR**2), faces, stretch

    side = np.arange(-STEEPEST, STEEPEST + COARSE_STEP / 2, COARSE_STEP)
    slopes = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    value, faces, _ = search(slopes)
    for step in (COARSE_STEP / 2, None):
        # the next grid is as wide as what is still likely, and at least two steps of the last one
        chance = np.exp(value - value.max())
        middle = slopes[value.argmax()] if step else (chance[:, None] * slopes).sum(axis=0) / chance.sum()
        spread = np.sqrt((chance[:, None] * (slopes - middle) ** 2).sum(axis=0) / chance.sum())
        half = np.clip(3 * spread, 2 * (step or COARSE_STEP / 5), STEEPEST)
        axes = [m + np.linspace(-w, w, FINE_STEPS) for m, w in zip(middle, half, strict=True)]
        slopes = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
        value, faces, _ = search(slopes)
    chance = np.exp(value - value.max())
    chance /= chance.sum()
    slope = (chance[:, None] * slopes).sum(axis=0)
    error = float(np.sqrt((chance * ((slopes - slope) ** 2).sum(axis=1)).sum() / 2))
    value, faces, stretch = search(slope[None])
    (bottom, top), count = faces[0], len(points)
    tangents = np.tan(np.deg2rad(slope))
    heights = (points[:, 2] - points[:, :2] @ tangents) / stretch[0]
    ends = np.sort(heights)
    first, last = np.searchsorted(ends, [bottom, top])
    while first > 0 and ends[first] - ends[first - 1] < 2 * FACE:  # left out for the plane's sake, but no strays
        first -= 1
    while last + 1 < count and ends[last + 1] - ends[last] < 2 * FACE:
        last += 1
    bottom, top = ends[first], ends[last]
    inside = float(weights[(heights >= bottom) & (heights <= top)].sum() / weights.sum())
    gain = float(value[0] + weights.sum() * math.log(depth))
    if top - bottom > FULL * depth or gain < max(LEAST_GAIN[0], LEAST_GAIN[1] * count) or error > LARGEST_ERROR:
        return None
    x, y, z = (float(v) for v in np.array([*-tangents, 1.0]) / stretch[0])
    # beyond the outermost points lies about as much as between the next ones: nothing where they sit on a face
    ends = ends[first : last + 1]
    width = float(top - bottom + (ends[2] - ends[0] + ends[-1] - ends[-3]) / 2)
    return Slab((x, y, z), float((bottom + top) / 2 * stretch[0]), width, error, count, inside)


def measure(first: NDArray[Any], second: NDArray[Any], pixel_size: float) -> Slab | None:
    """Plane, height and thickness of what is in a tomogram.

    Args:
        first, second: (z, y, x) from every other tilt each (`half_tomograms`), with room above and below the specimen; the
            origin is voxel n//2. Voxels of 10 to 20 Å are fine enough.
        pixel_size: Å.

    Returns:
        None where no slab is seen: nothing significant, too few or too badly spread objects to tell a plane, or
        no end above and below.
    """
    (one, limit_one), (other, limit_other) = (_detail(v, pixel_size) for v in (first, second))
    places = _peaks(np.clip(one, -limit_one, limit_one) * np.clip(other, -limit_other, limit_other), pixel_size)
    if len(places) < FEWEST:
        return None
    points = (places[:, ::-1] - np.array(first.shape)[::-1] // 2) * pixel_size
    slab = plane_of_points(points, depth=first.shape[0] * pixel_size)
    if slab is None:
        return None
    distance = np.abs((points - [0, 0, slab.height]) @ np.array(slab.normal))
    outermost = distance > slab.thickness / 2 - 2 * FACE
    extent = _extent(one * other, places[outermost & (distance <= slab.thickness)], pixel_size)
    return Slab(slab.normal, slab.height, slab.thickness + 2 * extent, slab.angle_error, slab.points, slab.inside)


def between(points: Array, radius: float) -> Slab | None:
    """The layer of balls (Å: places (P, 3) and their radius) that lie on its two faces; None where they tell no plane."""
    slab = plane_of_points(points)
    if slab is None:
        return None
    height = points @ np.array(slab.normal) - slab.height * slab.normal[2]
    within = height[np.abs(height) <= slab.thickness / 2]
    low, high = float(within.min()), float(within.max())
    return replace(slab, height=slab.height + (low + high) / 2 / slab.normal[2], thickness=high - low + 2 * radius)


def holding(slab: Slab, points: Array, radius: float) -> Slab:
    """The slab, thicker on either side where balls (Å: places (P, 3) and their radius) would lie outside of it.

    Balls farther outside than the slab is thick have nothing to do with it.
    """
    middle = slab.height * slab.normal[2]
    height = points @ np.array(slab.normal) - middle
    near = height[np.abs(height) <= 1.5 * slab.thickness] if len(points) else height
    low = min(-slab.thickness / 2, float((near - radius).min(initial=0.0)))
    high = max(slab.thickness / 2, float((near + radius).max(initial=0.0)))
    return replace(slab, height=(middle + (low + high) / 2) / slab.normal[2], thickness=high - low)


# ------------------------------------------------------------------------------------------------------ the alignment
def level(alignment: Alignment, slab: Slab) -> Alignment:
    """The same alignment in a specimen frame in which the slab is horizontal and its middle at z = 0.

    A point r goes to R·(r - c), with c the slab's middle on the z axis and R the smallest rotation that takes the normal to
    z: directions in the plane stay, so the tilt axis stays along y. No point's image moves.

    Args:
        alignment: tilt geometry, with landmarks or without.
        slab: in the frame of this alignment.
    """
    x, y, z = slab.normal
    # the rotation by the angle between n and z about n × z (Rodrigues)
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    rotation = np.eye(3) + cross + cross @ cross / (1 + z)
    centre = np.array([0.0, 0.0, slab.height])
    geometry = TiltGeometry.of(alignment, [True] * len(alignment.tilt))
    axis, tilt, xtilt = tilt_angles_from_matrix(geometry.matrices @ torch.from_numpy(rotation.T))
    shift = geometry.shift + geometry.matrices[:, :2] @ torch.from_numpy(centre)
    moved: dict[str, Any] = {
        "axis": _near(axis.tolist(), alignment.axis),
        "tilt": tuple(tilt.tolist()),
        "xtilt": tuple(xtilt.tolist()),
        "shift_x": tuple(shift[:, 0].tolist()),
        "shift_y": tuple(shift[:, 1].tolist()),
        "thickness": slab.thickness,
    }
    if alignment.landmarks is not None:
        xyz = (np.array(alignment.landmarks.xyz).reshape(-1, 3) - centre) @ rotation.T
        points = tuple((float(a), float(b), float(c)) for a, b, c in xyz)
        moved["landmarks"] = alignment.landmarks.model_copy(update={"xyz": points})
    return alignment.model_copy(update=moved)


def _near(angles: list[float], wanted: tuple[float, ...]) -> tuple[float, ...]:
    """Angles in degrees with whole turns added so that they are nearest to others."""
    return tuple(a + 360 * round((b - a) / 360) for a, b in zip(angles, wanted, strict=True))
