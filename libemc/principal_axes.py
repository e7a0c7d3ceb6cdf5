"""How the particles of a set differ: what is read, kept for `emc_cluster`, and drawn. The other half of `emc_pca`."""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc import project, records
from libemc.cli import Run, history
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.methods import average
from libemc.methods.classify import axes as axes_of
from libemc.methods.classify import coordinates, differences, halves
from libemc.methods.classify.axes import Axes, Problem, Spectrum
from libemc.methods.classify.coordinates import Coordinates
from libemc.methods.classify.differences import Differences, Member
from libemc.methods.classify.frame import Frame, band_edges, band_slices
from libemc.methods.molecular_mask import automatic_mask
from libemc.methods.subtilts import Particles
from libemc.numerics.masks import soft_sphere

FRAME_RESOLUTION = 40.0
"""Å: halves are compared in data to this."""
MOST_SHOWN, MORE_SHOWN = 8, 2
"""Axes of a band of which maps are written: the meaningful ones and some more, but no more than the first."""
IN_MEMORY = 0.4
"""Part of the memory that difference maps may take; larger sets of them lie in a file while they are worked on."""
TABLE = "coordinates.npz"
FEWEST = 3
"""Particles that axes can be learnt from."""
CLUSTERED = ("class_*.mrc", "clusters.json", "classes.*", "montage.png", "trials.png")
"""What emc_cluster leaves in the folder of an analysis."""
SIGMAS = 2.0
"""Standard deviations along an axis of the maps to both sides."""


# ------------------------------------------------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Plan:
    """What is asked of an analysis.

    Attributes:
        scales: Å, one of each band, coarsest first; count: axes of each.
        em: probabilistic components, or singular vectors alone.
        subset: particles that the axes are learnt from; None: all.
        seed: of everything random.
    """

    scales: tuple[float, ...]
    count: int
    em: bool
    subset: int | None
    seed: int

    @property
    def names(self) -> list[str]:
        """Of the bands."""
        return [f"{s:g}" for s in self.scales]

    def generator(self, band: int) -> torch.Generator:
        """Of a band, by its number."""
        return torch.Generator().manual_seed(1000 * self.seed + band)


def scales_of(values: Sequence[float], box: int, pixel_size: float) -> tuple[float, ...]:
    """The scales, coarsest first.

    Raises:
        InputError: one is beyond the Nyquist frequency, larger than a third of the box, or there twice.
    """
    out = tuple(sorted(values, reverse=True))
    if len(set(out)) < len(out):
        raise InputError("has a scale twice", "--scales", "give each once")
    finest, coarsest = 2 * pixel_size, box * pixel_size / 3
    for scale in out:
        if not finest <= scale <= coarsest:
            what = (
                f"{scale:g} is not within {finest:g} to {coarsest:g} Å, what a box of {box} at {pixel_size:g} Å holds"
            )
            raise InputError(what, "--scales", "give others")
    return out


@dataclass(frozen=True)
class BandResult:
    """What was found in a band.

    Attributes:
        name: its scale; ends: Å, coarse and fine.
        axes, spectrum: as they are; coordinates: of all particles, in the order of the members.
        explained: of each axis, the part of its variance that follows the sampling.
    """

    name: str
    ends: tuple[float, float]
    band: slice
    axes: Axes
    spectrum: Spectrum
    coordinates: Coordinates
    explained: list[dict[str, float]]

    @property
    def left_out(self) -> list[str | None]:
        """Of each meaningful axis, what it follows instead of structure."""
        return [coordinates.follows_sampling(self.explained[k]) for k in range(self.spectrum.meaningful)]

    @property
    def used(self) -> list[int]:
        """Places of the axes that classes are looked for in."""
        return [k for k, follows in enumerate(self.left_out) if follows is None]

    def state(self) -> dict[str, Any]:
        """As plain numbers, for the run's record."""
        known = self.axes.known_precision.clamp_min(1e-30).rsqrt().tolist()
        return {
            "scale": self.name,
            "coarse": None if math.isinf(self.ends[0]) else self.ends[0],
            "fine": self.ends[1],
            "strength": [round(v, 4) for v in self.spectrum.strength.tolist()],
            "noise": [round(v, 4) for v in self.spectrum.noise.tolist()],
            "floor": self.spectrum.floor,
            "meaningful": self.spectrum.meaningful,
            "explained": [{n: round(v, 4) for n, v in e.items()} for e in self.explained],
            "left_out": self.left_out,
            "contrast_deviation": known[0] if known else None,
        }

    def line(self) -> str:
        """For the user."""
        count = self.spectrum.meaningful
        strongest = ", ".join(f"{v:.3g}" for v in self.spectrum.strength[: max(1, count)].tolist())
        text = f"{self.name} Å: {count} of {len(self.spectrum.strength)} axes above noise (strength {strongest}"
        text += f"; floor {self.spectrum.floor:.3g})"
        out = [f"axis {k + 1} follows the {why}: left out" for k, why in enumerate(self.left_out) if why]
        return "; ".join([text, *out])


@dataclass(frozen=True)
class Analysis:
    """A set that was analysed.

    Attributes:
        frame: of the differences.
        members: the particles, in the order of the coordinates.
        bands: what was found.
    """

    frame: Frame
    members: list[Member]
    bands: list[BandResult]


# --------------------------------------------------------------------------------------------------------------- analysis


def count_of(series: Sequence[Particles], subset: int | None, where: str) -> int:
    """Particles that are analysed.

    Raises:
        InputError: they, or those that axes are to be learnt from, are too few to differ along an axis.
    """
    count = len(differences.members(series))
    if count < FEWEST:
        raise InputError(f"has {count} particles that some image shows", where, f"use {FEWEST} or more")
    if subset is not None and subset < FEWEST:
        raise InputError(f"{subset} particles show no axis", "--subset", f"give {FEWEST} or more")
    return count


def in_one_frame(
    series: list[Particles], symmetry: str, run: Run
) -> tuple[list[Particles], average.HalfMaps, dict[str, float]]:
    """The particles, the second half moved into the frame of the first where it is another, their half maps, and how far."""
    maps = average.half_maps(series, run.memory, symmetry, progress=run.progress)
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    mask = soft_sphere(box, average.DEFAULT_MASK * box / 2, average.MASK_EDGE)
    radius = min(box / 2 - 1, box * pixel_size / max(FRAME_RESOLUTION, 2 * pixel_size))
    lies = halves.apart(maps.half1, maps.half2, mask, radius)
    if lies is None:
        return series, maps, {"turned": 0.0, "moved": 0.0}
    series = halves.together(series, lies)
    cosine = float((torch.diagonal(lies.rotation).sum() - 1) / 2)
    how = {
        "turned": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        "moved": float(lies.shift.norm()) * pixel_size,
    }
    run.result(
        f"half 2 lay turned by {how['turned']:.1f}° and moved by {how['moved']:.1f} Å in half 1: brought together"
    )
    return series, average.half_maps(series, run.memory, symmetry, progress=run.progress), how


def of_classes(series: list[Particles], numbers: tuple[int, ...] | None) -> list[Particles]:
    """The particles as a run keeps them: those of other classes than were analysed are not used."""
    if numbers is None:
        return series
    out = []
    for p in series:
        file = p.to_file()
        kept = tuple(q.model_copy(update={"use": q.use and q.class_ in numbers}) for q in file.particles)
        out.append(Particles.of(file.model_copy(update={"particles": kept}), p.stack))
    return out


def mask_of(path: Path | None, made: average.Average, box: int, pixel_size: float, run: Run) -> Tensor:
    """The mask that was given, or that of the average's particle, or a sphere where it shows none: (n, n, n)."""
    if path is not None:
        mask = project.read_mask(path, box, pixel_size)
    else:
        try:
            mask = automatic_mask(made.average, pixel_size)
        except InputError:
            run.warn("the average shows no particle to make a mask of: differences are looked for in a sphere")
            return project.mask_or_sphere(None, box, pixel_size)
    if max(float(mask.select(dim, end).max()) for dim in range(3) for end in (0, -1)) > 0:
        run.warn("the mask reaches the border of the box: the box itself may look like a difference; use a larger one")
    return mask


def _room(count: int, frame: Frame, folder: Path, memory: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Arrays for difference maps: in memory, or as float16 in files of the folder that are gone with the program."""
    shape = (count, frame.points.shape[1])
    if differences.bytes_of(count, frame, np.float32) <= IN_MEMORY * memory:
        return np.empty((*shape, 2), np.float32), np.empty(shape, np.float32)
    data, weight = (_on_disk(s, folder) for s in ((*shape, 2), shape))
    return data, weight


def _on_disk(shape: tuple[int, ...], folder: Path) -> NDArray[Any]:
    """An array of float16 in a file of the folder that has no name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float16, "w+", shape=shape)  # the map keeps what the closed file had


def disk_of(count: int, box: int, pixel_size: float, plan: Plan, memory: float) -> int:
    """Bytes that an analysis writes, for a while or for good."""
    frame = Frame.of(box, pixel_size, min(plan.scales))
    learnt = min(count, plan.subset or count)
    kept = 4 * box**3 * (5 + 3 * len(plan.scales) * 4)
    if differences.bytes_of(learnt, frame, np.float32) <= IN_MEMORY * memory:
        return kept
    return kept + differences.bytes_of(learnt, frame, np.float16)


def analyse(series: Sequence[Particles], whole: Tensor, mask: Tensor, plan: Plan, folder: Path, run: Run) -> Analysis:
    """Read all particles, find the axes of each band, and the coordinates of all particles along them.

    Args:
        whole: (n, n, n) average of the particles, unfiltered; mask: (n, n, n), within which they are compared.
    """
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    frame = Frame.of(box, pixel_size, min(plan.scales))
    members = differences.members(series)
    frame = differences.with_noise(frame, series, members, run.memory)
    learnt = _subset(members, plan)
    batches = differences.read(series, learnt, frame, run.memory // 4, whole, run.progress)
    before = differences.as_shown(frame, series, learnt, whole, run.memory // 4)
    diff = differences.gathered(batches, frame, *_room(len(learnt), frame, folder, run.memory), before)
    small = frame.small_mask(mask)
    known = axes_of.known_axes(frame, frame.maps(diff.average) * small) if plan.em else None
    found: list[tuple[Problem, Axes, Spectrum]] = []
    for number, band in enumerate(band_slices(frame, plan.scales)):
        problem = Problem(diff, band, small, known, device=str(run.device))
        problem, axes = axes_of.measured(problem, plan.count, plan.generator(number), plan.em, run.progress)
        found.append((problem, axes, axes_of.spectrum(problem, axes, plan.generator(number), plan.em, run.progress)))
    places = _coordinates(series, whole, members, learnt, diff, found, known, run)
    if not plan.em:
        places = [c.typical() for c in places]
    groups = coordinates.sampling(series, members)
    bands = [
        BandResult(name, ends, problem.band, axes, spectrum, c, coordinates.explained(c.likely, groups))
        for name, ends, (problem, axes, spectrum), c in zip(
            plan.names, band_edges(plan.scales), found, places, strict=True
        )
    ]
    return Analysis(frame, members, bands)


def _subset(members: list[Member], plan: Plan) -> list[Member]:
    """The particles that axes are learnt from, in their order."""
    if plan.subset is None or plan.subset >= len(members):
        return members
    chosen = np.random.default_rng(plan.seed).choice(len(members), plan.subset, replace=False)
    return [members[k] for k in sorted(chosen.tolist())]


def _coordinates(
    series: Sequence[Particles],
    whole: Tensor,
    members: list[Member],
    learnt: list[Member],
    diff: Differences,
    found: Sequence[tuple[Problem, Axes, Spectrum]],
    known: Tensor | None,
    run: Run,
) -> list[Coordinates]:
    """Of all particles in each band: of those learnt from, and of the rest as they are read."""
    device = str(run.device)
    bands = [problem.band for problem, *_ in found]

    def of(blocks: Any, band: int) -> Coordinates:
        problem, axes, _ = found[band]
        own = None if known is None else known[:, problem.band]
        return coordinates.coordinates(blocks, axes, own, problem.variance, device)

    parts = [[of(diff.blocks(band, device), k)] for k, band in enumerate(bands)]
    among = set(learnt)
    rest = [m for m in members if m not in among]
    if rest:
        batches = differences.read(series, rest, diff.frame, run.memory // 4, whole, run.progress, "project")
        for blocks in coordinates.difference_blocks(batches, diff, bands, device):
            for k, block in enumerate(blocks):
                parts[k].append(of(iter([block]), k))
    order = {m: k for k, m in enumerate([*learnt, *rest])}
    index = torch.tensor([order[m] for m in members])
    return [Coordinates(torch.cat([p.b for p in part]), torch.cat([p.a for p in part])).at(index) for part in parts]


# -------------------------------------------------------------------------------------------------------------- its files


def shown_axes(bands: Sequence[BandResult]) -> list[int]:
    """Axes of each band of which maps are written."""
    return [min(MOST_SHOWN, len(b.axes.balls), b.spectrum.meaningful + MORE_SHOWN) for b in bands]


def map_names(bands: Sequence[BandResult]) -> list[str]:
    """The maps of an analysis, and the picture of each band's axes."""
    names = []
    for band, count in zip(bands, shown_axes(bands), strict=True):
        names += [f"variance_{band.name}.mrc", *([f"axes_{band.name}.png"] if count else [])]
        for k in range(count):
            names += [f"axis_{band.name}_{k + 1}{end}.mrc" for end in ("", "_minus", "_plus")]
    return names


def claim(folder: Path, bands: Sequence[BandResult], run: Run) -> None:
    """Say what is written of the bands: a record that is saved then knows the files, should the run be killed.

    Raises:
        InputError: one of them is another's.
    """
    for name in map_names(bands):
        run.output(folder / name)


def remove_older(folder: Path, bands: Sequence[BandResult], run: Run) -> None:
    """Remove maps and pictures of axes that an earlier analysis left in the folder, and this one hasn't replaced, and what
    emc_cluster made of them."""
    names = set(map_names(bands))
    for pattern in CLUSTERED:
        for file in sorted(folder.glob(pattern)):
            if history.written_by("emc_cluster", file, run.project):
                file.unlink()
    for pattern in ("axis_*.mrc", "variance_*.mrc", "axes_*.png"):
        for file in sorted(folder.glob(pattern)):
            if file.name not in names and history.written_by(run.name, file, run.project):
                file.unlink()


def write_maps(folder: Path, found: Analysis, made: Tensor, mask: Tensor, pixel_size: float, run: Run) -> None:
    """The axes, the average to both sides along them, and the variance of each band beyond noise.

    Args:
        made: (n, n, n) the average that they are shown beside.
    """
    for band, count in zip(found.bands, shown_axes(found.bands), strict=True):
        volumes = axis_maps(found, band) * mask
        for k in range(count):
            stem = f"axis_{band.name}_{k + 1}"
            sides = {"": volumes[k], "_minus": made - SIGMAS * volumes[k], "_plus": made + SIGMAS * volumes[k]}
            for end, volume in sides.items():
                mrc.write_volume(run.output(folder / f"{stem}{end}.mrc"), volume.float().numpy(), pixel_size)
        path = run.output(folder / f"variance_{band.name}.mrc")
        mrc.write_volume(path, variance(band, volumes).float().numpy(), pixel_size)


def axis_maps(found: Analysis, band: BandResult) -> Tensor:
    """(k, n, n, n) densities of a band's axes, per standard deviation."""
    whole = torch.zeros(len(band.axes.balls), found.frame.points.shape[1], dtype=torch.complex64)
    whole[:, band.band] = band.axes.balls
    return torch.stack([found.frame.in_box(b) for b in whole])


def variance(band: BandResult, volumes: Tensor) -> Tensor:
    """(n, n, n) variance of the density among the particles, that of axes as strong as noise taken off."""
    share = (1 - band.spectrum.floor / band.spectrum.strength.clamp_min(1e-30)).clamp_min(0)
    return torch.einsum("k,kzyx->zyx", share.float(), volumes.float() ** 2)


def save_coordinates(folder: Path, found: Analysis, series: Sequence[Particles], run: Run) -> None:
    """What emc_cluster goes on with, and the coordinates along meaningful axes for people."""
    ids = [series[m.series].file.particles[m.place].id for m in found.members]
    arrays: dict[str, NDArray[Any]] = {"ids": np.array(ids)}
    table: dict[str, Any] = {
        "unit": "standard deviation of all particles",
        "axes": {},
        "particles": {i: [] for i in ids},
    }
    for band in found.bands:
        k = band.coordinates.b.shape[1]
        i, j = np.tril_indices(k)
        arrays[f"b_{band.name}"] = band.coordinates.b.numpy().astype(np.float32)
        arrays[f"a_{band.name}"] = band.coordinates.a.numpy()[:, i, j].astype(np.float32)
        table["axes"][band.name] = [n + 1 for n in band.used]
        for name, row in zip(ids, band.coordinates.of_axes(band.used).likely.tolist(), strict=True):
            table["particles"][name] += [round(v, 4) for v in row]
    with run.output(folder / TABLE).open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    rows = ",\n  ".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in table.pop("particles").items())
    head = json.dumps(table)[:-1]
    write_text(run.output(folder / "coordinates.json"), f'{head},\n "particles": {{\n  {rows}\n }}}}\n')


def analysed(folder: str) -> tuple[records.Run, Path]:
    """The record of a run of emc_pca.

    Raises:
        InputError: there is none in the folder.
    """
    path = Path(folder) / "run.json"
    if not path.is_file() or records.load(path, records.Run).program != "emc_pca":
        raise InputError("is no run of emc_pca", folder, "give the folder that emc_pca wrote")
    record = records.load(path, records.Run)
    if record.stopped_at is not None:
        raise InputError("was not finished", folder, "run emc_pca again")
    return record, path


def read_whole(folder: Path, head: records.ParticleSet, run: Run) -> Tensor:
    """(n, n, n) unfiltered average of all particles of a run: the mean of its half maps."""
    half1, half2 = (project.read_map(run.input(folder / f"half{h}.mrc"), head.box, head.pixel_size) for h in (1, 2))
    return 0.5 * (half1 + half2)


def read_coordinates(folder: Path, bands: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Coordinates]]:
    """Ids of the particles, and their coordinates in each band."""
    path = folder / TABLE
    try:
        with np.load(path) as arrays:
            ids = arrays["ids"].tolist()
            found = {}
            for band in bands:
                b, lower = (torch.from_numpy(arrays[f"{n}_{band['scale']}"]).double() for n in "ba")
                a = torch.zeros(len(b), b.shape[1], b.shape[1], dtype=torch.float64)
                i, j = torch.tril_indices(b.shape[1], b.shape[1])
                a[:, i, j] = lower
                a[:, j, i] = lower
                found[band["scale"]] = Coordinates(b, a)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError("can't be read", path, "run emc_pca again") from error
    return ids, found


def band_views(found: Analysis, made: Tensor, mask: Tensor) -> list[Any]:
    """The bands for the page."""
    from libemc.view import heterogeneity  # matplotlib takes half a second that a dry run does without
    from libemc.view.plots import central_slices

    def slices(volume: Tensor) -> dict[str, NDArray[Any]]:
        return dict(central_slices(volume.float().numpy()))

    views = []
    for band, count in zip(found.bands, shown_axes(found.bands), strict=True):
        volumes = axis_maps(found, band) * mask
        shown = [
            {
                "minus": slices(made - SIGMAS * volumes[k]), "average": slices(made),
                "plus": slices(made + SIGMAS * volumes[k]), "axis": slices(volumes[k]),
            }
            for k in range(count)
        ]  # fmt: skip
        views.append(
            heterogeneity.BandView(
                name=band.name, coarse=band.ends[0], fine=band.ends[1], strength=band.spectrum.strength.numpy(),
                noise=band.spectrum.noise.numpy(), floor=band.spectrum.floor, meaningful=band.spectrum.meaningful,
                suspects=band.explained, left_out=[why is not None for why in band.left_out],
                coordinates=in_errors(band.coordinates), axes_slices=shown,
                variance_slices=slices(variance(band, volumes).sqrt()),
            )
        )  # fmt: skip
    return views


def in_errors(places: Coordinates) -> NDArray[np.float64]:
    """(N, k) of each axis by itself, in standard errors of a mean particle, of mean 0."""
    error = torch.diagonal(places.a.mean(dim=0)).clamp_min(1e-30).rsqrt()
    z = places.likely
    return ((z - z.mean(dim=0)) / error).numpy()


def write_page(
    folder: Path,
    found: Analysis,
    series: Sequence[Particles],
    made: Tensor,
    mask: Tensor,
    facts: Mapping[str, Any],
    run: Run,
) -> None:
    """The pictures and the page of an analysis."""
    from libemc.view import heterogeneity
    from libemc.view.plots import central_slices

    pixel_size = series[0].file.pixel_size
    views = band_views(found, made, mask)
    average_slices = dict(central_slices(made.numpy()))
    heterogeneity.spectrum_plot(run.output(folder / "spectrum.png"), views)
    heterogeneity.variance_plot(run.output(folder / "variance.png"), views, average_slices, pixel_size)
    heterogeneity.coordinates_plot(run.output(folder / "coordinates.png"), views)
    for view in views:
        if view.axes_slices:
            heterogeneity.axes_plot(run.output(folder / f"axes_{view.name}.png"), view, pixel_size)
    count = sum(len(view.used) for view in views)
    page = heterogeneity.PcaPage(
        title=f"{folder}: {count} axes of {len(found.members)} particles",
        facts={k.replace("_", " "): str(v) for k, v in facts.items() if v not in (None, False)},
        pixel_size=pixel_size, bands=views, series=[series[m.series].file.name for m in found.members],
        average_slices=average_slices,
    )  # fmt: skip
    heterogeneity.write_pca_page(run.output(folder / "index.html"), page)


PICTURES = ("spectrum.png", "variance.png", "coordinates.png", "coordinates.json", TABLE, "index.html")
"""What an analysis writes beside its maps, whatever it finds."""
