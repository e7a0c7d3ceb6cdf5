"""Which points of a tilt series to keep, particles or picks alike; particles of several sets as one; sets in parts.

Records and arrays come in; masks, parts and records come out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from libemc.errors import InputError
from libemc.records import Particle, ParticleFile, Picks, image_places

Mask = NDArray[np.bool_]
Place = tuple[float, float, float]

SHARED = ("box", "pixel_size", "ctf_premultiplied", "contrast", "optics", "tilts", "defocus_handedness")
"""What particles of one tilt series must have in common to be in one file."""


@dataclass(frozen=True)
class Points:
    """The particles, or the picks of one label, of one tilt series.

    Attributes:
        name: of the tilt series.
        ids: names, by whose order ties are decided.
        xyz: (N, 3) Å from the tomogram's centre.
        score, z, margin: (N,) NaN where not known.
        use: (N,) bool.
        classes: (N,) int64; tilts: (N,) int64, used tilts that see it; both 0 for picks.
    """

    name: str
    ids: Sequence[str]
    xyz: NDArray[np.float64]
    score: NDArray[np.float64]
    z: NDArray[np.float64]
    margin: NDArray[np.float64]
    use: Mask
    classes: NDArray[np.int64]
    tilts: NDArray[np.int64]

    @staticmethod
    def of_particles(file: ParticleFile) -> Points:
        """From a particle file."""
        ps = file.particles
        visible = np.array([p.visible for p in ps], dtype=bool).reshape(len(ps), -1)
        return Points(
            name=file.name,
            ids=[p.id for p in ps],
            xyz=np.array([p.xyz for p in ps], dtype=np.float64).reshape(-1, 3),
            score=_known([p.score for p in ps], len(ps)),
            z=_known([p.z for p in ps], len(ps)),
            margin=_known(None, len(ps)),
            use=np.array([p.use for p in ps], dtype=bool),
            classes=np.array([p.class_ for p in ps], dtype=np.int64),
            tilts=(visible & np.array(file.tilts.use)).sum(axis=1),
        )

    @staticmethod
    def of_picks(name: str, picks: Picks) -> Points:
        """From the picks of a tilt series; their ids are their places, written so that they sort."""
        n = len(picks.xyz)
        return Points(
            name=name,
            ids=[f"{i:09d}" for i in range(n)],
            xyz=np.array(picks.xyz, dtype=np.float64).reshape(-1, 3),
            score=_known(picks.score, n),
            z=_known(picks.z, n),
            margin=_known(picks.margin, n),
            use=np.ones(n, dtype=bool),
            classes=np.zeros(n, dtype=np.int64),
            tilts=np.zeros(n, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.xyz)

    def at(self, index: NDArray[np.int64]) -> Points:
        """Some of them, by their places."""
        columns = {key: values[index] for key, values in vars(self).items() if key not in ("name", "ids")}
        return Points(name=self.name, ids=[self.ids[i] for i in index], **columns)

    def ranked(self) -> NDArray[np.int64]:
        """(N,) places from the highest score to the lowest, those without one last; equal scores by id."""
        return np.lexsort((np.array(self.ids), -np.nan_to_num(self.score, nan=-np.inf)))


def _known(values: Sequence[float | None] | None, n: int) -> NDArray[np.float64]:
    return np.full(n, np.nan) if values is None else np.array([np.nan if v is None else v for v in values], dtype=float)


@dataclass(frozen=True)
class Criteria:
    """What is asked of points, all of it, one after the other in this order; None: nothing.

    Attributes:
        class_numbers: one of these classes; drop_class: none of these.
        score_above, score_below, z_above, margin_above: limits, excluded; a point without the value does not pass.
        region: x0, x1, y0, y1, z0, z1 in Å from the tomogram's centre, included.
        min_tilts: used tilts that see it, at least.
        distance: Å; of points nearer to each other than this the better-scoring one stays, see `distinct`.
        neighbours: least and greatest number (None: any) of other points within so many Å.
        best: so many of the highest scores in the tilt series; best_fraction: such a part of what is left.
    """

    class_numbers: tuple[int, ...] | None = None
    drop_class: tuple[int, ...] | None = None
    score_above: float | None = None
    score_below: float | None = None
    z_above: float | None = None
    margin_above: float | None = None
    region: tuple[float, ...] | None = None
    min_tilts: int | None = None
    distance: float | None = None
    neighbours: tuple[int, int | None, float] | None = None
    best: int | None = None
    best_fraction: float | None = None

    def asked(self) -> dict[str, Any]:
        """Those that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


TESTS: dict[str, Callable[[Points, Any], Mask]] = {
    "class_numbers": lambda points, numbers: np.isin(points.classes, numbers),
    "drop_class": lambda points, numbers: ~np.isin(points.classes, numbers),
    "score_above": lambda points, limit: points.score > limit,
    "score_below": lambda points, limit: points.score < limit,
    "z_above": lambda points, limit: points.z > limit,
    "margin_above": lambda points, limit: points.margin > limit,
    "region": lambda points, bounds: within(points.xyz, bounds),
    "min_tilts": lambda points, least: points.tilts >= least,
    "distance": lambda points, distance: distinct(points.xyz, points.ranked(), distance),
    "neighbours": lambda points, wanted: crowded(points.xyz, *wanted),
    "best": lambda points, count: first(points.ranked(), count),
    "best_fraction": lambda points, part: first(points.ranked(), round(part * len(points))),
}
"""Of the points that are left and what is asked of them: (N,) bool, which stay."""
NEEDS = {"best": "score", "best_fraction": "score"} | {
    f"{value}_{side}": value for value in ("score", "z", "margin") for side in ("above", "below")
}
"""The value without which a criterion says nothing."""


def select(points: Points, criteria: Criteria) -> dict[str, Mask]:
    """What is left of the points after each criterion in turn: (N,) bool by its name.

    The first entry, `use`, has all that are used; the last is the selection.

    Raises:
        InputError: no point has the value that a criterion is about.
    """
    left = points.use
    steps = {"use": left}
    for name, wanted in criteria.asked().items():
        value = NEEDS.get(name)
        if value and len(points) and np.isnan(getattr(points, value)).all():
            raise InputError(f"there is no {value} to select by", points.name, f"leave --{name.replace('_', '-')} out")
        index = np.flatnonzero(left)
        left = np.zeros_like(left)
        left[index[TESTS[name](points.at(index), wanted)]] = True
        steps[name] = left
    return steps


def within(xyz: NDArray[np.float64], bounds: Sequence[float]) -> Mask:
    """Which points (N, 3) lie in x0, x1, y0, y1, z0, z1, the limits included: (N,) bool."""
    low, high = np.reshape(bounds, (3, 2)).T
    return ((xyz >= low) & (xyz <= high)).all(axis=1)


def distinct(xyz: NDArray[np.float64], order: NDArray[np.int64], distance: float) -> Mask:
    """The points that stay when, in a given order, each drops those after it that are nearer to it than a distance.

    A point that has been dropped drops none itself: of a row of points the first, third, fifth may stay. No two that
    stay are nearer than the distance, and each that went was nearer than it to one that stays and comes before it.

    Args:
        xyz: (N, 3) Å.
        order: (N,) places, the best first.
        distance: Å.

    Returns:
        (N,) bool.
    """
    pairs = cKDTree(xyz).query_pairs(distance, output_type="ndarray") if len(xyz) else np.zeros((0, 2), np.int64)
    pairs = pairs[np.linalg.norm(xyz[pairs[:, 0]] - xyz[pairs[:, 1]], axis=1) < distance]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    start = np.searchsorted(both[:, 0], np.arange(len(xyz) + 1))
    stays, decided = np.zeros(len(xyz), dtype=bool), np.zeros(len(xyz), dtype=bool)
    for i in order:
        if not decided[i]:
            stays[i] = True
            decided[both[start[i] : start[i + 1], 1]] = True
    return stays


def crowded(xyz: NDArray[np.float64], least: int, most: int | None, distance: float) -> Mask:
    """Which points (N, 3) have from `least` to `most` (None: any number) others within a distance: (N,) bool."""
    if not len(xyz):
        return np.zeros(0, dtype=bool)
    others = cKDTree(xyz).query_ball_point(xyz, distance, return_length=True) - 1
    return (others >= least) & (others <= (len(xyz) if most is None else most))


def first(order: NDArray[np.int64], count: int) -> Mask:
    """The first `count` of places (N,) that are in order: (N,) bool, by place."""
    mask = np.zeros(len(order), dtype=bool)
    mask[order[:count]] = True
    return mask


def deal(keys: Sequence[Any], parts: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Parts at random and as even as can be: (N,) from 0 to parts - 1.

    The parts differ by one at most in all and among those of one key; the same where keys that sort beside each other
    are taken together.

    Args:
        keys: N keys that can be sorted, (half, tilt series) for example.
    """
    shuffled = generator.permutation(len(keys))
    order = sorted(shuffled.tolist(), key=lambda i: keys[i])  # keeps those of one key shuffled
    part = np.empty(len(keys), dtype=np.int64)
    part[order] = np.arange(len(keys)) % parts
    return part


# -------------------------------------------------------------------------------------------------- particles of a series


@dataclass(frozen=True)
class Joined:
    """The particles of one tilt series out of several sets.

    Attributes:
        file: their record, each with the place of its images in the stack of the set that it comes from.
        source: (N,) int64, which set that is.
        repeated: how many were in a later set again; renamed: how many got a new id.
    """

    file: ParticleFile
    source: NDArray[np.int64]
    repeated: int
    renamed: int

    def at(self, index: NDArray[np.int64]) -> Joined:
        """Some of the particles, by their places."""
        kept = tuple(self.file.particles[i] for i in index)
        return replace(self, file=self.file.model_copy(update={"particles": kept}), source=self.source[index])


def join(files: Mapping[str, ParticleFile]) -> Joined:
    """The particles of one tilt series in several sets, as one file.

    Particles of one id that were cut at one place are the same: the last set says their pose, class and score. Of one id
    at different places (picks of different labels) they are different: the later one gets the next free number for its
    id, keeps its half, and the old id becomes its `parent`.

    Args:
        files: by the name of their set, in order.

    Raises:
        InputError: they differ in what the particles of a file share, such as box or tilt geometry.
    """
    (base_name, base), *others = files.items()
    for name, file in others:
        for key in SHARED:
            if getattr(file, key) != getattr(base, key):
                what = f"{base_name} and {name} differ in {key.replace('_', ' ')}"
                raise InputError(what, base.name, "extract both in the same way, or keep them apart")
    free = _next_number(p.id for file in files.values() for p in file.particles)
    found: dict[tuple[str, Place], tuple[Particle, int]] = {}
    taken: dict[str, Place] = {}
    repeated = 0
    for source, file in enumerate(files.values()):
        for place, particle in zip(image_places(file), file.particles, strict=True):
            same = (particle.id, particle.centre)
            repeated += same in found
            found[same] = (particle.model_copy(update={"image": place}), source)
            taken.setdefault(*same)
    particles, renamed = [], 0
    for (name, centre), (particle, _) in found.items():
        if taken[name] != centre:
            particle = particle.model_copy(update={"id": f"{base.name}.{free + renamed:06d}", "parent": name})
            renamed += 1
        particles.append(particle)
    sources = np.array([source for _, source in found.values()], dtype=np.int64)
    return Joined(base.model_copy(update={"particles": tuple(particles)}), sources, repeated, renamed)


def split(joined: Mapping[str, Joined], wanted: int | Literal["class"], seed: int) -> dict[str, dict[str, Joined]]:
    """A set in parts: what is added to its name to the particles of each tilt series.

    Args:
        joined: by tilt series.
        wanted: so many parts, `_1`, `_2`, ..., at random and as even as can be in each half and tilt series; or `class`:
            a part for each class, `_class0`, ....
        seed: of what is random.

    Raises:
        InputError: there are fewer particles than parts.
    """
    everyone = [(p, name) for name, one in joined.items() for p in one.file.particles]
    if wanted == "class":
        labels = np.array([p.class_ for p, _ in everyone])
        names = {number: f"_class{number}" for number in sorted(set(labels.tolist()))}
    else:
        if len(everyone) < wanted:
            raise InputError(f"{len(everyone)} particles can't be split into {wanted} sets", remedy="split into fewer")
        labels = deal([(p.half, name) for p, name in everyone], wanted, np.random.default_rng(seed))
        names = {number: f"_{number + 1}" for number in range(wanted)}
    begin = np.cumsum([0, *(len(one.source) for one in joined.values())])
    parts: dict[str, dict[str, Joined]] = {}
    for number, suffix in names.items():
        places = {name: np.flatnonzero(labels[begin[i] : begin[i + 1]] == number) for i, name in enumerate(joined)}
        parts[suffix] = {name: joined[name].at(index) for name, index in places.items() if len(index)}
    return parts


def _next_number(ids: Iterable[str]) -> int:
    """One more than the highest number at the end of an id."""
    numbers = (re.search(r"\d+$", name) for name in ids)
    return 1 + max((int(number[0]) for number in numbers if number), default=-1)
