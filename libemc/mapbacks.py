"""Averages placed back in tilt series: which particles, maps and voxels, and all that is written of each tilt series. The
other half of `emc_mapback`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from libemc import __version__, project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io import gltf, mrc
from libemc.io.files import write_text
from libemc.io.star import write_star
from libemc.methods import mapback, neighbours
from libemc.methods.mapback import Cut, Model, Poses, Sight
from libemc.methods.reconstruct import LEAST_VOXELS, Grid
from libemc.methods.subtilts import Particles
from libemc.numerics.rotations import euler_from_matrix
from libemc.numerics.symmetry import point_group, symmetry_matrices
from libemc.records import TiltSeriesRecord, Tomogram

BINNING, LARGEST = 4, 500
"""Of a volume without a tomogram: raw pixels to a voxel, or more where a side had more voxels than this."""
PICTURE, LEAST_PICTURE = 640, 160
"""Pixels along the longest side of the picture, and where memory is short."""
PICTURE_BYTES = 12
"""Memory of a voxel while it is drawn."""
SECTION = 60.0
"""Å of the tomogram that are averaged for the backdrop."""
CHANCE, CHANCE_REPEATS = 20000, (20, 200)
"""Distances, about, that the random placements give, and how many placements at least and at most."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the medians of random placements."""
SHADES = 16
"""Different colours of a scale in a mesh."""
SECTION_CONTRAST = (0.5, 99.5)
"""Percentiles of the section that ChimeraX shows black and white."""
MARGIN = 1.1
"""Of a particle's radius, within which a marker gives its colour."""
MARKER = 2.0
"""Voxels: radius of a marker."""
DIGITS = 3
"""Decimals of Å and degrees in the table of neighbours."""
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


def _models(cuts: Mapping[int, Cut], voxel: float, numbers: Iterable[int]) -> dict[int, Model]:
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


def placement(placed: Placed, record: TiltSeriesRecord, wanted: Wanted, cuts: Mapping[int, Cut], run: Run) -> Placement:
    """Choose the voxels of a tilt series, and the tomogram that is shown with them.

    They are those of the tomogram `like`; else, without a pixel size, of the coarsest whole tomogram in the record; else the
    field of the images, as thick as the particles are spread. Particles outside are left out.

    Raises:
        InputError: no particle lies in the volume, or there is nothing to take it from.
    """
    shown = _tomogram(record, wanted.like, run)
    if shown is not None and (wanted.pixel_size is None or wanted.like is not None):
        grid = shown[1]
    else:
        grid = _field(record, placed, max(c.radius for c in cuts.values()), wanted.pixel_size)
    inside = placed.poses.inside(grid)
    if not bool(inside.any()):
        what = f"none of the {len(placed.ids)} particles of {placed.name} lies in the volume"
        raise InputError(what, shown and shown[0], "give a --pixel-size, or another tomogram to --like")
    if shown is not None and (not shown[0].exists() or (shown[1] != grid and any(shown[1].angles))):
        shown = None
    return Placement(placed.at(inside.numpy()), grid, shown)


def _tomogram(record: TiltSeriesRecord, like: Path | None, run: Run) -> tuple[Path, Grid] | None:
    """The tomogram given, or the coarsest of the whole in the record, or of a part of it: its file and voxels."""

    def entry(known: Tomogram) -> tuple[Path, Grid]:
        return Path(known.file), Grid(known.shape, known.pixel_size, known.centre, known.angles)

    if like is not None:
        images = mrc.open_stack(run.input(like))
        listed = [known for known in record.tomograms if os.path.abspath(known.file) == os.path.abspath(like)]
        if listed:
            return entry(listed[0])
        if images.pixel_size is None:
            raise InputError("has no pixel size in its header", like, "set it with emc_volume --set-pixel-size")
        return like, Grid(images.shape, images.pixel_size)
    both = [known for known in record.tomograms if known.half is None]
    whole = [known for known in both if not any((*known.centre, *known.angles))]
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


def cost(placements: Sequence[Placement], wanted: Wanted, memory: float, threads: int) -> tuple[float, float]:
    """Bytes of disk, and of memory, of which there is so much, for the largest.

    Args:
        threads: each of which makes some rows of a volume.
    """
    disk = sum(4.0 * p.voxels * len(wanted.groups(p.placed)) for p in placements)
    rows = max(4.0 * (2 * threads + 1) * mapback.ROWS * p.voxels / p.grid.shape[1] for p in placements)
    return disk, max(rows, *(PICTURE_BYTES * math.prod(picture_grid(p.grid, memory).shape) for p in placements))


# -------------------------------------------------------------------------------------------------------------- writing


def write(
    this: Placement, head: records.ParticleSet, wanted: Wanted, cuts: Mapping[int, Cut], colours: Any, run: Run
) -> dict[str, Any]:
    """Write everything of one tilt series, the script that shows it last.

    Args:
        cuts: of `cut_maps`.
        colours: of its particles, of `colours_of`.

    Returns:
        What the record says of it.
    """
    stem = wanted.folder / this.name
    groups = wanted.groups(this.placed)
    ready = _models(cuts, this.grid.pixel_size, groups.values())
    for group, number in groups.items():
        poses = this.placed.poses.at(torch.from_numpy(wanted.members(this.placed, number)))
        file = Path(f"{stem}{group}.mrc")
        with mrc.VolumeWriter(file, this.grid.shape, this.grid.pixel_size) as writer:
            slabs = mapback.placed_rows(ready[number], this.grid, poses)
            blocks = math.ceil(this.grid.shape[1] / mapback.ROWS)
            for y0, slab in run.progress(slabs, blocks, f"{this.name}{group}: rows"):
                writer.write_rows(y0, slab.numpy())
    _write_star(Path(f"{stem}.star"), this)
    if wanted.mesh:
        _write_mesh(Path(f"{stem}.glb"), this, wanted, ready, colours.rgb, run)
    found = _write_neighbours(stem, this, head, wanted, ready, run)
    _draw(Path(f"{stem}.png"), this, wanted, cuts, colours, run)
    if wanted.painted:
        write_text(f"{stem}.cmm", markers(this, colours.rgb))
    write_text(f"{stem}.cxc", script(this, wanted, ready, colours.rgb))
    classes, counts = np.unique(this.placed.classes, return_counts=True)
    return {
        "particles": {str(k): n for k, n in zip(classes.tolist(), counts.tolist(), strict=True)},
        "pixel_size": this.grid.pixel_size,
        "shape": list(this.grid.shape),
        **found,
    }


def line(name: str, told: Mapping[str, Any]) -> str:
    """What is said of a tilt series on stdout."""
    counts = told["particles"]
    only = len(counts) == 1
    what = ", ".join(f"{n} particle{'s' * (n > 1)}" if only else f"{n} of class {k}" for k, n in counts.items())
    if told["distance_median"] is None:
        return f"{name}: {what} placed"
    random = told["random"]["distance_median"]
    return f"{name}: {what} placed, nearest neighbour at {told['distance_median']:.0f} Å (median; {random:.0f} Å by chance)"


def _write_star(path: Path, this: Placement) -> None:
    """A particle list in RELION's terms. Its pixels are those of the volume, counted from 0, as ArtiaX takes them."""
    grid, own = this.grid, this.placed.poses.from_corner(this.grid)
    pixels = (own.xyz / grid.pixel_size).numpy()
    columns: dict[str, Any] = {"rlnTomoName": [this.name] * len(pixels), "rlnTomoParticleName": this.placed.ids}
    columns |= {f"rlnCoordinate{axis}": pixels[:, k] for k, axis in enumerate("XYZ")}
    if not any((*grid.centre, *grid.angles)):
        centred = this.placed.poses.xyz.numpy()
        columns |= {f"rlnCenteredCoordinate{axis}Angst": centred[:, k] for k, axis in enumerate("XYZ")}
    angles = euler_from_matrix(own.rotation)
    columns |= {f"rlnAngle{key}": a.numpy() for key, a in zip(("Rot", "Tilt", "Psi"), angles, strict=True)}
    columns["rlnClassNumber"] = this.placed.classes
    if np.isfinite(this.placed.score).all():
        columns["rlnAutopickFigureOfMerit"] = this.placed.score
    write_star(path, {"particles": pd.DataFrame(columns)})


def _write_mesh(
    path: Path, this: Placement, wanted: Wanted, ready: Mapping[int, Model], rgb: NDArray[np.float64], run: Run
) -> None:
    """A surface for each map, drawn at every pose, in Å from the volume's first voxel."""
    place = {number: k for k, number in enumerate(ready)}
    meshes = [mapback.surface(placing) for placing in ready.values()]
    surfaces = [gltf.Surface(mesh.vertices, mesh.normals, mesh.triangles) for mesh in meshes]
    own = this.placed.poses.from_corner(this.grid)
    rotation, xyz = own.rotation.numpy(), own.xyz.numpy()
    which = [0 if wanted.single else place[k] for k in this.placed.classes.tolist()]
    instances = [
        gltf.Instance(*values) for values in zip(this.placed.ids, which, _shades(rgb), rotation, xyz, strict=True)
    ]
    gltf.write_glb(path, surfaces, instances, f"{run.name} {__version__}")


def _shades(rgb: NDArray[np.float64]) -> list[gltf.Colour]:
    """The colours, no more than `SHADES` different ones for each of red, green and blue."""
    return [(r, g, b) for r, g, b in (np.round(rgb * (SHADES - 1)) / (SHADES - 1)).tolist()]


def _write_neighbours(
    stem: Path, this: Placement, head: records.ParticleSet, wanted: Wanted, ready: Mapping[int, Model], run: Run
) -> dict[str, Any]:
    """The table of nearest neighbours and its picture; what of it is said in one line."""
    placed, rows = this.placed, []
    summary: dict[str, Any] = {"count": len(placed.ids), "distance_median": None, "angle_median": None}
    if len(placed.ids) > 1:
        group = symmetry_matrices(point_group(head.symmetry))
        found = neighbours.nearest(placed.poses.xyz, placed.poses.rotation, group)
        reach = wanted.within or 4 * max(placing.radius for placing in ready.values())
        owner, _, around = neighbours.around(placed.poses.xyz, placed.poses.rotation, reach)
        repeats = int(np.clip(CHANCE // len(placed.ids), *CHANCE_REPEATS))
        chance = neighbours.chance_distances(placed.poses.xyz.numpy(), repeats, run.seed)
        turned = neighbours.chance_angles(CHANCE, group, run.seed)
        alike = placed.classes == placed.classes[found.index]
        medians = np.median(chance, axis=1)
        low, high = np.percentile(medians, INTERVAL)
        summary |= {
            "distance_median": _rounded(np.median(found.distance)),
            "angle_median": _rounded(np.median(found.angle[alike])) if alike.any() else None,
            "within": _rounded(reach),
            "neighbours_within": _rounded(len(owner) / len(placed.ids)),
            "random": {
                "distance_median": _rounded(np.median(medians)),
                "distance_interval": [_rounded(low), _rounded(high)],
                "angle_median": _rounded(np.median(turned)),
                "placements": repeats,
            },
        }
        rows = [
            {
                "id": placed.ids[i],
                "class": int(placed.classes[i]),
                "score": None if np.isnan(placed.score[i]) else float(placed.score[i]),
                "neighbour": placed.ids[j],
                "distance": _rounded(found.distance[i]),
                "direction": [_rounded(v) for v in found.direction[i]],
                "angle": _rounded(found.angle[i]),
            }
            for i, j in enumerate(found.index.tolist())
        ]
        from libemc.view import mapback as view

        shown = view.Neighbours(found.distance, chance, found.angle[alike], turned, around, reach)
        view.neighbours_plot(f"{stem}_neighbours.png", shown, f"{this.name}: neighbours of {len(placed.ids)} particles")
    made_by = {"program": run.name, "version": __version__, "argv": list(run.argv)}
    table = {"made_by": made_by, "name": this.name, "symmetry": head.symmetry, "summary": summary}
    text = (
        json.dumps(table, indent=1)[:-2] + ',\n "particles": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"
    )
    write_text(f"{stem}_neighbours.json", text)
    return summary


def _rounded(value: Any) -> float:
    return round(float(value), DIGITS)


# -------------------------------------------------------------------------------------------------------------- showing


def picture_grid(grid: Grid, memory: float) -> Grid:
    """The same box in voxels as small as the pixels of the picture, or as memory allows."""
    side = max(grid.shape)
    voxels = [round(n * PICTURE / side) for n in grid.shape]
    pixels = PICTURE * min(1.0, (memory / 2 / PICTURE_BYTES / math.prod(voxels)) ** (1 / 3))
    pixel_size = grid.pixel_size * side / max(pixels, LEAST_PICTURE)
    z, y, x = (max(2, 2 * round(n * grid.pixel_size / pixel_size / 2)) for n in grid.shape)
    return replace(grid, shape=(z, y, x), pixel_size=pixel_size)


def _draw(path: Path, this: Placement, wanted: Wanted, cuts: Mapping[int, Cut], colours: Any, run: Run) -> None:
    """The picture of a tilt series."""
    from libemc.view import mapback as view

    grid = picture_grid(this.grid, run.memory)
    groups = wanted.groups(this.placed)
    ready = _models(cuts, grid.pixel_size, groups.values())
    images: dict[str, NDArray[np.float64]] = {}
    sights: dict[str, tuple[Sight, NDArray[np.float64]]] = {}
    for number in groups.values():
        members = wanted.members(this.placed, number)
        volume = mapback.placed(ready[number], grid, this.placed.poses.at(torch.from_numpy(members)))
        for side in ("top", "front"):
            sight = mapback.seen(volume, ready[number].level, side)
            rgb = _painted(sight, this.placed.poses.at(torch.from_numpy(members)), grid, colours.rgb[members])
            if side in sights:
                sight, other = mapback.nearer(sights[side][0], sight)
                rgb = np.where(other[..., None], rgb, sights[side][1])
            sights[side] = sight, rgb
        del volume
    for side, (sight, rgb) in sights.items():
        backdrop = view.pale(_section(this, grid, side), sight.depth.shape)
        images[side] = view.shaded(sight.depth, sight.normal, rgb, backdrop)
    title = f"{this.name}: {len(this.placed.ids)} particles"
    view.mapback_picture(path, images["top"], images["front"], grid.pixel_size, colours, title)


def _painted(sight: Sight, poses: Poses, grid: Grid, rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, columns, 3) the colour of the nearest particle at each point that is seen."""
    hit = np.isfinite(sight.depth)
    out = np.zeros((*hit.shape, 3))
    centres = poses.from_corner(grid).xyz.numpy() / grid.pixel_size
    if hit.any():
        out[hit] = rgb[cKDTree(centres).query(sight.index[hit])[1]]
    return out


def _section(this: Placement, grid: Grid, side: str) -> NDArray[np.float64] | None:
    """The middle section of the tomogram at the picture's pixels, NaN outside it; None without a tomogram."""
    if this.tomogram is None:
        return None
    file, there = this.tomogram
    data = mrc.open_stack(file).array
    if data.shape != there.shape:
        raise InputError(f"has shape {data.shape}, its record says {there.shape}", file, "make the tomogram again")
    axis = 0 if side == "top" else 1
    offset = np.array(grid.centre)[::-1] - np.array(there.centre)[::-1]  # z, y, x; both volumes have the same axes
    at = [
        ((np.arange(n) - n // 2) * grid.pixel_size + o) / there.pixel_size + m // 2
        for n, m, o in zip(grid.shape, there.shape, offset, strict=True)
    ]
    half = max(0, round(SECTION / there.pixel_size / 2))
    middle = int(np.clip(round(float(at[axis][grid.shape[axis] // 2])), 0, there.shape[axis] - 1))
    some = slice(max(0, middle - half), middle + half + 1)
    slab = np.asarray(data[some] if axis == 0 else data[:, some], dtype=np.float64).mean(axis=axis)
    rows, columns = (at[k] for k in range(3) if k != axis)
    width = grid.pixel_size / there.pixel_size
    smooth = ndimage.gaussian_filter(slab, 0.5 * width) if width > 1 else slab
    where = np.meshgrid(rows, columns, indexing="ij")
    return np.asarray(ndimage.map_coordinates(smooth, where, order=1, mode="constant", cval=np.nan))


def markers(this: Placement, rgb: NDArray[np.float64]) -> str:
    """A marker in each particle's colour, in ChimeraX's and Chimera's format of markers."""
    xyz, radius = this.placed.poses.from_corner(this.grid).xyz.tolist(), MARKER * this.grid.pixel_size
    rows = [
        f'<marker id="{i}" x="{x:.3f}" y="{y:.3f}" z="{z:.3f}" r="{r:.3f}" g="{g:.3f}" b="{b:.3f}" radius="{radius:.1f}"/>'
        for i, ((x, y, z), (r, g, b)) in enumerate(zip(xyz, rgb.tolist(), strict=True), start=1)
    ]
    return "\n".join([f'<marker_set name="{this.name} particles">', *rows, "</marker_set>", ""])


def script(this: Placement, wanted: Wanted, ready: Mapping[int, Model], rgb: NDArray[np.float64]) -> str:
    """ChimeraX's commands that show all of it, and as comments ArtiaX's.

    Coordinates are Å from the first voxel of the volumes, whatever a header says of an origin.
    """
    volumes = {f"{this.name}{group}.mrc": number for group, number in wanted.groups(this.placed).items()}
    rows = [
        f"# {this.name}: particles placed back. Open this file in an empty session of ChimeraX.",
        f"# x, y, z are in Å from the first voxel of {this.name}'s volumes, and so are the mesh and the markers.",
    ]
    shown = None
    if this.tomogram is not None:
        shown = os.path.relpath(this.tomogram[0], wanted.folder)
        rows += _tomogram_commands(this.tomogram, shown, this.grid)
    first = 1 + (shown is not None)
    numbers = range(first, first + len(volumes))
    for k, (file, number) in zip(numbers, volumes.items(), strict=True):
        colour = "#" + "".join(f"{round(255 * c):02x}" for c in rgb[wanted.members(this.placed, number)][0])
        style = f"step 1 style surface level {ready[number].level:.6g} color {colour}"
        rows += [f'open "{file}"', f"volume #{k} origin 0,0,0 {style}"]
    after = numbers.stop
    if wanted.painted:
        reach = MARGIN * max(placing.radius for placing in ready.values())
        rows += [f'open "{this.name}.cmm"']
        rows += [f"color zone #{k} near #{after} distance {reach:.1f} sharpEdges true" for k in numbers]
        rows += [f"hide #{after} models"]
    if wanted.mesh:
        rows += [f'open "{this.name}.glb"', *(f"hide #{k} models" for k in numbers)]
    same = this.tomogram is not None and this.tomogram[1] == this.grid
    average = os.path.relpath(wanted.maps[min(volumes.values())], wanted.folder)
    rows += [
        "lighting soft",
        "view",
        "",
        "# With ArtiaX, in an empty session in place of the above: the particles as a list, which can be edited.",
        "# artiax start",
        f'# artiax open tomo "{shown if same else next(iter(volumes))}"',
        f'# open "{this.name}.star" format relion',
        f"# artiax particles #1.2.1 originScaleFactor {this.grid.pixel_size:.6g}",
        f'# open "{average}"',
        "# artiax attach #2 toParticleList #1.2.1",
    ]
    return "\n".join(rows) + "\n"


def _tomogram_commands(tomogram: tuple[Path, Grid], shown: str, grid: Grid) -> list[str]:
    """The middle section of a tomogram in grey, in the frame of a volume whose axes are the same."""
    file, there = tomogram
    middle = there.shape[0] // 2
    section = np.asarray(mrc.open_stack(file).array[middle], dtype=np.float64)
    low, high = np.percentile(section, SECTION_CONTRAST)
    corner = (
        c - d + (n // 2) * grid.pixel_size - (m // 2) * there.pixel_size
        for c, d, n, m in zip(there.centre, grid.centre, grid.shape[::-1], there.shape[::-1], strict=True)
    )
    where = "0,0,0" if there == grid else ",".join(f"{c:.6g}" for c in corner)
    style = f"step 1 style image color white level {low:.6g},0 level {high:.6g},1 plane z,{middle}"
    return [f'open "{shown}"', f"volume #1 origin {where} {style}"]


def save_record(
    path: Path, options: Mapping[str, Any], told: Mapping[str, Any], inputs: Sequence[Path], run: Run
) -> None:
    """Enter tilt series into the record of the folder, beside those that earlier runs placed there.

    Args:
        told: of each tilt series, as `write` gives it.
    """
    if not path.exists():
        project.save_run(path, run.name, options, run.seed, {}, inputs)

    def change(old: records.Run) -> records.Run:
        series = {**old.state.get("series", {}), **told}
        prints = {p.path: p for p in (*old.inputs, *map(records.fingerprint, inputs))}
        new = {
            "options": dict(options),
            "seed": run.seed,
            "state": {"series": series},
            "inputs": tuple(prints.values()),
        }
        return old.model_copy(update=new)

    records.update(path, change, records.Run)
