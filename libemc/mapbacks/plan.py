"""Which particles, maps, voxels and colours: all that is known before anything is placed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from libemc import records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import mapback
from libemc.methods.mapback import Cut, Model, Poses
from libemc.methods.reconstruct import LEAST_VOXELS, Grid
from libemc.methods.subtilts import Particles
from libemc.records import TiltSeriesRecord, Tomogram

BINNING, LARGEST = 4, 500
"""Of a volume without a tomogram: raw pixels to a voxel, or more where a side had more voxels than this."""
FOLDER = "mapback"


@dataclass(frozen=True)
class Placed:
    """The particles of one tilt series that are placed.

    Attributes:
        name: of the tilt series.
        ids: of the N particles.
        poses: rotation and position.
        classes: (N,); score: (N,), NaN where not known.
    """

    name: str
    ids: list[str]
    poses: Poses
    classes: NDArray[np.int64]
    score: NDArray[np.float64]

    @staticmethod
    def of(file: records.ParticleFile, class_numbers: tuple[int, ...] | None) -> Placed:
        """The particles of a file that are used and have a weight, and are of one of these classes (None: of any)."""
        particles = Particles.of(file, None)
        chosen = particles.use & (particles.weight > 0)
        classes = torch.tensor([p.class_ for p in file.particles], dtype=torch.long)
        if class_numbers is not None:
            chosen = chosen & torch.isin(classes, torch.tensor(class_numbers))
        ids = [p.id for p, c in zip(file.particles, chosen.tolist(), strict=True) if c]
        poses = Poses(particles.rotation[chosen], particles.xyz[chosen])
        return Placed(file.name, ids, poses, classes[chosen].numpy(), particles.score[chosen].numpy())

    def at(self, which: NDArray[np.bool_]) -> Placed:
        """Some of them."""
        ids = [i for i, w in zip(self.ids, which.tolist(), strict=True) if w]
        poses = self.poses.at(torch.from_numpy(which))
        return replace(self, ids=ids, poses=poses, classes=self.classes[which], score=self.score[which])


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        maps: by class number; all the same where there is one.
        masked: without what is around the particle in them.
        like: a tomogram on whose voxels; pixel_size: Å; None: as `placement` says.
        colour: class, score or series.
        mesh: a scene of surfaces too.
        within: Å of the neighbours that are drawn; None: twice the diameter.
        folder: where everything goes.
    """

    maps: Mapping[int, Path]
    masked: bool
    like: Path | None
    pixel_size: float | None
    colour: str
    mesh: bool
    within: float | None
    folder: Path

    @property
    def single(self) -> bool:
        """Whether there is one map only."""
        return len(set(self.maps.values())) == 1

    @property
    def painted(self) -> bool:
        """Whether a volume holds particles of several colours."""
        return self.colour == "score" or (self.colour == "class" and self.single and len(self.maps) > 1)

    def groups(self, placed: Placed) -> dict[str, int]:
        """The volumes of a tilt series: what is added to its name, and a class of it."""
        present = sorted(set(placed.classes.tolist()))
        return {"": present[0]} if self.single else {f"_class{k}": k for k in present}

    def members(self, placed: Placed, number: int) -> NDArray[np.bool_]:
        """(N,) the particles in the volume of a class."""
        return np.ones(len(placed.ids), dtype=bool) if self.single else placed.classes == number

    def files(self, placed: Placed) -> list[Path]:
        """All that is written of a tilt series."""
        ends = [f"{group}.mrc" for group in self.groups(placed)]
        ends += [".star", ".cxc", ".png", "_neighbours.json"]
        ends += ["_neighbours.png"] * (len(placed.ids) > 1) + [".glb"] * self.mesh + [".cmm"] * self.painted
        return [self.folder / f"{placed.name}{end}" for end in ends]


def open_particles(
    set_or_run: str, names: Sequence[str], class_numbers: tuple[int, ...] | None
) -> tuple[records.ParticleSet, dict[str, Placed]]:
    """The particles to place, by tilt series; no image of them is needed.

    Args:
        names: tilt series; none: all that have some.

    Raises:
        InputError: there is no such set or tilt series in it, or nothing to place.
    """
    head, files = records.load_particles(set_or_run)
    known = {name.removesuffix(records.tiltseries_path("").name): name for name in names}
    wanted = [Path(name).name for name in known]
    for name in wanted:
        if name not in files:
            raise InputError(f"no tilt series {name}", set_or_run, f"there are {', '.join(list(files)[:8])}")
    placed = {name: Placed.of(files[name], class_numbers) for name in dict.fromkeys(wanted or files)}
    empty = [name for name, some in placed.items() if not some.ids]
    if empty and (wanted or len(empty) == len(placed)):
        where = f"{set_or_run}, {empty[0]}" if wanted else set_or_run
        raise InputError(
            "no particles to place", where, "check --class, and which particles are used and have a weight"
        )
    return head, {name: some for name, some in placed.items() if some.ids}


def maps_of(set_or_run: str, given: Sequence[Path], classes: Sequence[int], run: Run) -> dict[int, Path]:
    """The map of each class: those given, one for all or one for each class in their order, or those in the run's folder.

    Raises:
        InputError: there are none, or not as many as classes.
    """
    if given:
        paths = [run.input(path) for path in given]
        if len(paths) not in (1, len(classes)):
            what = f"{len(paths)} maps for the classes {', '.join(map(str, classes))}"
            raise InputError(what, "--average", "give one for all, or one for each class, in this order")
        return dict(zip(classes, paths * len(classes) if len(paths) == 1 else paths, strict=True))
    folder = Path(set_or_run)
    for pattern in ("class_{}.mrc", "class{}.mrc"):
        paths = [folder / pattern.format(k) for k in classes]
        if all(path.is_file() for path in paths):
            return {k: run.input(path) for k, path in zip(classes, paths, strict=True)}
    average = folder / "average.mrc"
    if not average.is_file():
        raise InputError("has no average.mrc, and no class_K.mrc of each class", set_or_run, "give --average MAP")
    return dict.fromkeys(classes, run.input(average))


def cut_maps(wanted: Wanted) -> dict[int, Cut]:
    """The particle of each class, out of its map.

    Raises:
        InputError: a map can't be read, or shows no particle.
    """
    found: dict[Path, Cut] = {}
    for path in dict.fromkeys(wanted.maps.values()):
        density, pixel_size = mrc.read_volume(path)
        if float(density.std()) == 0:
            raise InputError("is the same everywhere", path, "give a map with density in it")
        try:
            found[path] = mapback.cut(torch.from_numpy(density), pixel_size, wanted.masked)
        except InputError:
            remedy = "give a white map with its particle in the middle"
            raise InputError("shows no particle", path, remedy) from None
    return {number: found[path] for number, path in wanted.maps.items()}


def models(cuts: Mapping[int, Cut], voxel: float, numbers: Iterable[int]) -> dict[int, Model]:
    """The maps of classes, ready for a volume of voxels of so many Å."""
    return {number: mapback.model(cuts[number], voxel) for number in numbers}


@dataclass(frozen=True)
class Placement:
    """A tilt series to be done.

    Attributes:
        placed: its particles.
        grid: the voxels.
        tomogram: what is shown with it: its file and voxels; None: nothing.
    """

    placed: Placed
    grid: Grid
    tomogram: tuple[Path, Grid] | None

    @property
    def name(self) -> str:
        """Of the tilt series."""
        return self.placed.name

    @cached_property
    def voxels(self) -> int:
        """How many there are."""
        return math.prod(self.grid.shape)


def record_of(name: str, wanted: Wanted, run: Run) -> TiltSeriesRecord | None:
    """What the project knows of a tilt series; None of one whose particles came without it: a tomogram stands for it then.

    Raises:
        InputError: it knows nothing, and no tomogram is given.
    """
    path = records.tiltseries_path(name)
    if path.exists():
        return records.load_tiltseries(run.input(path))
    if wanted.like is None:
        raise InputError(f"the project has particles of {name}, but no record of it", path, "give --like TOMOGRAM")
    return None


def placement(
    placed: Placed, record: TiltSeriesRecord | None, wanted: Wanted, cuts: Mapping[int, Cut], run: Run
) -> Placement:
    """Choose the voxels of a tilt series, and the tomogram that is shown with them.

    They are those of the tomogram `like`; else, without a pixel size, of the coarsest whole tomogram in the record; else the
    field of the images, as thick as the particles are spread. Particles outside are left out.

    Raises:
        InputError: no particle lies in the volume, or there is nothing to take it from.
    """
    shown = _tomogram(record.tomograms if record else (), wanted.like, run)
    if shown is not None and (record is None or wanted.pixel_size is None or wanted.like is not None):
        grid = shown[1]
    elif record is None:
        raise ValueError(f"neither a record of {placed.name} nor a tomogram")
    else:
        grid = _field(record, placed, max(c.radius for c in cuts.values()), wanted.pixel_size)
    inside = placed.poses.inside(grid)
    if not bool(inside.any()):
        what = f"none of the {len(placed.ids)} particles of {placed.name} lies in the volume"
        raise InputError(what, shown and shown[0], "give a --pixel-size, or another tomogram to --like")
    if shown is not None and (not shown[0].exists() or (shown[1] != grid and any(shown[1].angles))):
        shown = None
    return Placement(placed.at(inside.numpy()), grid, shown)


def _tomogram(known: Sequence[Tomogram], like: Path | None, run: Run) -> tuple[Path, Grid] | None:
    """The tomogram given, or the coarsest of the whole specimen, or of a part of it: its file and voxels.

    Args:
        known: what was reconstructed of the tilt series.
    """

    def entry(one: Tomogram) -> tuple[Path, Grid]:
        return Path(one.file), Grid(one.shape, one.pixel_size, one.centre, one.angles)

    if like is not None:
        images = mrc.open_stack(run.input(like))
        listed = [one for one in known if os.path.abspath(one.file) == os.path.abspath(like)]
        if listed:
            return entry(listed[0])
        if images.pixel_size is None:
            raise InputError("has no pixel size in its header", like, "set it with emc_volume --set-pixel-size")
        return like, Grid(images.shape, images.pixel_size)
    both = [one for one in known if one.half is None]
    whole = [one for one in both if not any((*one.centre, *one.angles))]
    return max(map(entry, whole or both), key=lambda t: t[1].pixel_size, default=None)


def _field(record: TiltSeriesRecord, placed: Placed, radius: float, pixel_size: float | None) -> Grid:
    """Voxels over the field of the images, as thick as the particles are spread."""
    thick = 2 * (float(placed.poses.xyz[:, 2].abs().max()) + radius)
    raw = record.source.pixel_size
    whole = Grid.of(record, 1, thick)
    voxel = pixel_size or raw * max(BINNING, math.ceil(max(whole.shape) / LARGEST))
    z, y, x = (max(LEAST_VOXELS, math.ceil(n * raw / voxel)) for n in whole.shape)
    return Grid((z, y, x), voxel)


def colours_of(series: Mapping[str, Placed], wanted: Wanted) -> dict[str, Any]:
    """The colours of the particles of each tilt series (`view.mapback.Colours`), the same for a class in all of them.

    Raises:
        InputError: they shall show the score, and no particle has one.
    """
    from libemc.view import mapback as view  # matplotlib takes half a second

    if wanted.colour == "score":
        scores = np.concatenate([placed.score for placed in series.values()])
        if not np.isfinite(scores).any():
            raise InputError("no particle has a score", "--colour", "colour them by class or series")
        scale = view.score_scale(scores)
        return {name: view.by_score(placed.score, scale) for name, placed in series.items()}
    if wanted.colour == "series":
        return {name: view.by_kind([k] * len(p.ids), list(series)) for k, (name, p) in enumerate(series.items())}
    numbers = sorted(wanted.maps)
    found = {}
    for name, placed in series.items():
        labels = [f"class {k}: {int((placed.classes == k).sum())}" for k in numbers]
        found[name] = view.by_kind([numbers.index(k) for k in placed.classes.tolist()], labels)
    return found
