"""The run of an initial model: seeds that are kept as they come, what they agree on, and the model with its symmetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libemc import project, records
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import find_symmetry
from libemc.methods.initial_model import descent, finish
from libemc.methods.initial_model.balls import Balls, noise_variance, particle_balls
from libemc.methods.initial_model.consensus import agreement
from libemc.methods.initial_model.descent import Wish
from libemc.methods.initial_model.finish import Model
from libemc.methods.initial_model.reference import resampled, sphere
from libemc.methods.subtilts import Particles, Progress
from libemc.numerics.symmetry import symmetrise
from libemc.view import initial_model as pictures
from libemc.view import plots

POLISHES = 2
"""Rounds of polishing all poses and averaging at them, after the descent."""
AUTO = "auto"


@dataclass(frozen=True)
class Scene:
    """The particles and what is asked of them.

    Attributes:
        series: by tilt series; balls: within the finest band, their noise measured.
        mask: of the references' small box; wide: of the particles' box.
        memory: bytes to stay within; seed: of the run.
    """

    series: list[Particles]
    balls: Balls
    wish: Wish
    mask: Tensor
    wide: Tensor
    memory: int
    seed: int

    @staticmethod
    def of(series: list[Particles], wish: Wish, memory: int, seed: int, progress: Progress | None = None) -> Scene:
        """Read the particles."""
        box = series[0].file.box
        balls = particle_balls(series, wish.box_length / wish.finest, memory, progress)
        mask = sphere(wish.small, wish.box_length, wish.diameter)
        balls = balls.scaled(noise_variance(balls, mask, generator(seed)))
        return Scene(series, balls, wish, mask, sphere(box, wish.box_length, wish.diameter), memory, seed)

    @property
    def small_pixel(self) -> float:
        """Å of a voxel of the references."""
        return self.wish.box_length / self.wish.small


@dataclass
class Seeds:
    """The descents of a run, each on disk as soon as it is done.

    Attributes:
        folder: of the run.
        courses: steps of each seed, as plain numbers; evidence: of each seed.
    """

    folder: Path
    courses: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    evidence: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def resumed(folder: Path, options: Mapping[str, Any], inputs: Sequence[Path]) -> Seeds:
        """The seeds that an interrupted run has finished; none where there is no run yet.

        Raises:
            InputError: it was begun with other options, or from files that have changed since.
        """
        path = folder / "run.json"
        seeds = Seeds(folder)
        if not path.exists():
            return seeds
        record = records.load(path, records.Run)
        for name, value in options.items():
            if record.options.get(name) != value:
                was = f"was begun with {name} = {record.options.get(name)!r}, not {value!r}"
                raise InputError(was, path, "give the same options")
        known = {old.path: (old.size, old.digest) for old in record.inputs}
        for file in inputs:
            new = records.fingerprint(file)
            if known.get(new.path) != (new.size, new.digest):
                raise InputError(f"has changed since {folder} was begun from it", file, "begin a new run")
        for table in record.state.get("seeds", []):
            seeds.courses[table["seed"]] = table["steps"]
            seeds.evidence[table["seed"]] = table["evidence"]
        return seeds

    def files(self, seed: int, classes: int) -> list[Path]:
        """What `add` writes: the references of a seed, the strip and the movie of its course."""
        maps = [f"seed{seed}_class{c}.mrc" for c in range(1, classes + 1)]
        return [self.folder / name for name in (*maps, f"seed{seed}.png", f"seed{seed}_movie.png")]

    def references(self, seed: int, classes: int) -> Tensor:
        """(C, m, m, m) that a seed has ended with."""
        return torch.stack([torch.from_numpy(mrc.read_volume(f)[0]) for f in self.files(seed, classes)[:classes]])

    def add(self, seed: int, done: descent.Descent, scene: Scene, outputs: Sequence[Path]) -> None:
        """Write what a seed ended with, and pictures of its course.

        Args:
            outputs: the checked paths of `files`.
        """
        *maps, strip, movie = outputs
        for path, density in zip(maps, done.references, strict=True):
            mrc.write_volume(path, density.float().numpy(), scene.small_pixel)
        bands = [s.band for s in done.steps]
        pictures.course_strip(strip, done.frames.numpy(), bands, scene.small_pixel)
        pictures.course_movie(movie, done.frames.numpy(), bands)
        self.courses[seed] = [s.as_table() for s in done.steps]
        self.evidence[seed] = done.evidence

    def table(self) -> list[dict[str, Any]]:
        """For the run's record."""
        return [{"seed": k, "evidence": self.evidence[k], "steps": steps} for k, steps in self.courses.items()]


def generator(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def compare(seeds: Seeds, scene: Scene) -> tuple[int, list[list[float]]]:
    """The seed that explains the particles best, and how alike the seeds' references are, in their order."""
    wish = scene.wish
    sets = [seeds.references(k, wish.classes) for k in seeds.courses]
    radius = wish.box_length / wish.finest
    table = agreement(sets, radius, wish.max_shift / scene.small_pixel)
    return max(seeds.evidence, key=lambda k: seeds.evidence[k]), table.tolist()


def models_of(
    references: Tensor, scene: Scene, progress: Progress | None = None
) -> tuple[list[Particles], list[Model]]:
    """Poses, classes and full-size maps of all particles, from references (C, m, m, m)."""
    found = descent.assign(scene.balls, scene.wish, references, "c1", generator(scene.seed))
    series = finish.at_poses(scene.series, scene.balls, found)
    return _settled(series, [resampled(r, len(scene.wide)) for r in references], scene, "c1", progress)


def _settled(
    series: list[Particles], instead: Sequence[Tensor], scene: Scene, symmetry: str, progress: Progress | None
) -> tuple[list[Particles], list[Model]]:
    """Particles polished against their own maps, and those; `instead`: maps of classes that have too few particles."""

    def averaged() -> list[Model]:
        resolution = scene.wish.resolution
        return finish.class_models(series, instead, scene.wide, resolution, symmetry, scene.memory, scene.seed)

    models = averaged()
    for _ in range(POLISHES):
        masked = [model.density * scene.wide for model in models]
        series = finish.polished(series, masked, scene.wish.resolution, scene.memory, progress)
        models = averaged()
    return series, models


def with_symmetry(
    found: list[Particles],
    models: list[Model],
    scene: Scene,
    wanted: str,
    talk: Callable[[str], None],
    progress: Progress | None = None,
) -> tuple[str, list[Particles], list[Model], list[dict[str, Any]]]:
    """Find the axes of a group, or the group (`AUTO`), in the map of each class; turn all onto them, and average with it.

    The poses are turned along and polished against the symmetrised maps. A group that is found is not looked beyond: with
    one reference for both halves, what has once been imposed on a map that is nearly a ball proves nothing.

    Args:
        talk: is told the scores of the groups.

    Returns:
        The group, the particles and models in its setting, the scores of the groups in each class.
    """
    pixel_size, rankings, turned, placed, group = scene.series[0].file.pixel_size, [], found, [], wanted
    for number, model in enumerate(models, start=1):
        groups = find_symmetry.GROUPS if wanted == AUTO else (wanted,)
        maps = model.density[None].float() if model.halves is None else model.halves
        ranking = find_symmetry.find_symmetry(maps, pixel_size, scene.wish.resolution, groups)
        talk(f"symmetry:\n{ranking.text()}")
        rankings.append(ranking.table())
        group = ranking.chosen if wanted == AUTO else wanted
        if group == "c1":
            return group, found, models, rankings
        score = ranking.of(group)
        turned = finish.turned(turned, number, score.matrix, torch.tensor(score.shift, dtype=torch.float64))
        placed.append(symmetrise(find_symmetry.onto_axes(model.density, score, pixel_size), group))
    series, finished = _settled(turned, placed, scene, group, progress)
    return group, series, finished, rankings


def write_models(outputs: Mapping[str, Path], models: Sequence[Model], pixel_size: float) -> None:
    """class1.mrc and its central slices, and so on for each class."""
    for number, model in enumerate(models, start=1):
        density = model.density.float().numpy()
        mrc.write_volume(outputs[f"class{number}.mrc"], density, pixel_size)
        title = f"class {number}: {model.particles} particles"
        plots.central_slices_plot(outputs[f"class{number}.png"], density, pixel_size, title)


def save_particles(
    folder: Path, head: records.ParticleSet, series: Sequence[Particles], symmetry: str, parent: str
) -> None:
    """The particles of the run at their poses."""
    own = head.model_copy(update={"symmetry": symmetry})
    project.save_run_particles(folder, own, series, parent)


def lines(
    seeds: Seeds, best: int, table: Sequence[Sequence[float]], models: Sequence[Model], symmetry: str
) -> list[str]:
    """What a run has to say: a line for each seed, and one for each class."""
    out = []
    for row, seed in zip(table, seeds.courses, strict=True):
        others = [value for value, other in zip(row, seeds.courses, strict=True) if other != seed]
        alike = f", correlation with the other seeds {sum(others) / len(others):.2f}" if others else ""
        chosen = " (chosen)" if seed == best else ""
        out.append(f"seed {seed}: log-likelihood {seeds.evidence[seed]:.1f} per particle{alike}{chosen}")
    for number, model in enumerate(models, start=1):
        halves = "" if model.resolution is None else f", {model.resolution:.0f} Å between halves of one model"
        path = seeds.folder / f"class{number}.mrc"
        out.append(f"{path}: {model.particles} particles, {symmetry}{halves}")
    return out
