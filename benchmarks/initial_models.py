"""Initial models from nothing: how many seeds reach the truth, and what they cost.

    python benchmarks/initial_models.py FOLDER DATA [--seeds 10] [--sets conf splice groel apof emc mix ribo]

FOLDER gets a project with simulated tilt series; DATA holds sim/, maps/ and real/. Of each simulated set the orientations
are thrown away and the positions moved by 6 Å rms along each axis. Each seed is a model of its own, not the consensus:
poses, polish and map as `emc_sgd` makes them. For each: correlation with the truth at 40 Å (within a sphere of 0.75 of the
box, over all Fourier coefficients but the mean, the best of all rotations and shifts), that of its mirror image, how many
poses come back within 12°, and CPU seconds. Beside it stand the correlation that the truth averaged over all directions
has, which says what a correlation is worth, and for the ribosomes that of the average at the published poses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from libemc import project
from libemc.initial_models import AUTO, Scene, generator, models_of, with_symmetry
from libemc.methods import average
from libemc.methods.initial_model.descent import Wish, descend
from libemc.methods.initial_model.finish import classes_of
from libemc.methods.initial_model.reference import sphere
from libemc.methods.overlay import overlay
from libemc.methods.postprocess import mirror
from libemc.methods.subtilts import Particles
from libemc.numerics.grids import centred_radius
from libemc.numerics.rotations import random_rotations, rotation_distance

RIBOSOMES = "warptools_test_4-tomos_10-ptcls_box-32_angpix-12_optimisation_set.star"
RIBOSOME_MAP = "warptools_test_box-32_angpix-12_reconstruct.mrc"
DIAMETER, MAX_SHIFT, MEMORY = 0.75, 0.08, 2 << 30
OFF = 6.0
"""Å rms along each axis by which positions are moved."""


@dataclass(frozen=True)
class Case:
    """A set: what simulates it (None: it is there), its box binned to 6 Å, symmetry, and what is asked of `emc_sgd`."""

    maps: tuple[str, ...]
    simulate: tuple[object, ...] | None
    box: int
    symmetry: str = "c1"
    find: str = "c1"
    resolution: float = 40.0


WIDE = ("--size", 960, 960)
CASES = {
    "conf": Case(("splice_3A.mrc",), None, 64),
    "splice": Case(("splice_3A.mrc",), ("--count", 80, "--seed", 12, *WIDE), 64),
    "groel": Case(("groel_3A.mrc",), ("--count", 80, "--seed", 11, *WIDE), 48, "d7", AUTO),
    "apof": Case(("apof_3A.mrc",), ("--count", 90, "--seed", 13), 40, "o", AUTO, 20.0),
    "emc": Case((), ("--count", 80, "--seed", 15, *WIDE), 64),
    "mix": Case(("splice_3A.mrc", "groel_3A.mrc"), ("--count", 100, "--seed", 14, *WIDE), 64),
}


def run(*words: object) -> None:
    """One command of the suite, in the present folder."""
    subprocess.run([str(w) for w in words], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def prepared(name: str, case: Case, data: Path) -> tuple[list[Path], dict[str, int]]:
    """Make a set with its true picks; its true maps, and the class of each particle by id."""
    maps = [data / "maps" / m for m in case.maps]
    if case.simulate is None:
        stack, truth = data / "sim/conf_01.mrc", data / "sim/conf_01_truth.json"
    else:
        stack, truth = Path(f"raw/{name}.mrc"), Path(f"raw/{name}_truth.json")
        what = [word for m in maps for word in ("--map", m)] or ["--map-out", "raw/emc_map.mrc"]
        if not stack.exists():
            run("emc_simulate", f"raw/{name}", *what, *case.simulate)
        maps = maps or [Path("raw/emc_map.mrc")]
    series = stack.stem
    if not Path(f"particles/{name}").exists():
        run("emc_import", stack)
        run("emc_import", "--alignment", truth, series)
        run("emc_import", "--picks", truth, "--label", "part", series)
        run("emc_extract", series, "--label", "part", "--set", name, "--box", case.box, "--bin", 2)
    table = json.loads(truth.read_text()).get("cls") or []
    return maps, {f"{series}.{i:06d}": int(c) for i, c in enumerate(table)}


def lost(series: list[Particles], seed: int) -> list[Particles]:
    """The same particles in random orientations, a little off their places."""
    g = torch.Generator().manual_seed(1000 + seed)
    return [
        p.moved(
            random_rotations(len(p), g), p.xyz + OFF * torch.randn(len(p), 3, generator=g, dtype=torch.float64), p.score
        )
        for p in series
    ]


def rounded(density: Tensor) -> Tensor:
    """A map averaged over all directions."""
    shell = centred_radius(density.shape).round().long()
    flat = shell.reshape(-1)
    return (torch.bincount(flat, density.reshape(-1).double()) / torch.bincount(flat).clamp_min(1))[shell].float()


def likeness(a: Tensor, b: Tensor, length: float, resolution: float, mask: Tensor) -> float:
    """Correlation of two maps laid over each other."""
    return overlay(a * mask, b * mask, length / resolution, MAX_SHIFT * len(mask)).correlation


def simulated(name: str, case: Case, data: Path, seeds: range) -> None:
    """All seeds of one simulated set."""
    maps, kinds = prepared(name, case, data)
    head, truth = project.open_particles(name)
    length = head.box * head.pixel_size
    true = [project.read_map(m, head.box, head.pixel_size) for m in maps]
    wide = sphere(head.box, length, DIAMETER * length)
    plain = " ".join(f"{likeness(rounded(t * wide), t, length, 40.0, wide):.3f}" for t in true)
    count = sum(int(p.use.sum()) for p in truth)
    print(f"{name}: {count} particles, box {head.box}; round average of the truth {plain}", flush=True)
    wish = Wish(length, DIAMETER * length, case.resolution, MAX_SHIFT * length, len(maps))
    reached = 0
    for seed in seeds:
        start = cpu()
        scene = Scene.of(lost(truth, seed), wish, MEMORY, seed)
        done = descend(scene.balls, wish, scene.mask, generator(seed))
        group = "c1"
        found, models = models_of(done.references, scene)
        if case.find != "c1":
            group, found, models, _ = with_symmetry(found, models, scene, case.find, lambda text: None)
        used = cpu() - start
        said = []
        least = 1.0
        for number, model in enumerate(models, start=1):
            fits = [overlay(model.density * wide, t * wide, length / 40, MAX_SHIFT * head.box) for t in true]
            kind = max(range(len(true)), key=lambda k: fits[k].correlation)
            fit = fits[kind]
            other = likeness(mirror(model.density, "z"), true[kind], length, 40.0, wide)
            right = total = own = 0
            for p, t in zip(found, truth, strict=True):
                mine = (classes_of(p) == number) & p.use
                error = rotation_distance(p.rotation @ fit.rotation.T, t.rotation, case.symmetry)
                right, total = right + int((error[mine] < 12).sum()), total + int(mine.sum())
                ids = [q.id for q, m in zip(p.file.particles, mine.tolist(), strict=True) if m]
                own += sum(kinds.get(i, 0) == kind for i in ids)
            least = min(least, max(fit.correlation, other))
            kept = f", {own} of them {maps[kind].stem}" if len(maps) > 1 else ""
            said.append(f"{fit.correlation:.3f} (mirrored {other:.3f}), {right} of {total} poses within 12°{kept}")
        reached += least >= 0.85
        print(f"{name}: seed {seed}: {'; '.join(said)}; {group}, {used:.0f} CPU-s", flush=True)
    print(f"{name}: {reached} of {len(seeds)} seeds reach 0.85", flush=True)


def ribosomes(data: Path, seeds: range) -> None:
    """The real ribosomes, from nothing."""
    folder = data / "real/ribosome_tilts"
    if not Path("particles/ribo").exists():
        run("emc_import", "--particles", folder / RIBOSOMES, "--set", "ribo")
    head, truth = project.open_particles("ribo")
    length = head.box * head.pixel_size
    bundled = project.read_map(folder / RIBOSOME_MAP, head.box, head.pixel_size)
    wide = sphere(head.box, length, DIAMETER * length)
    maps = average.half_maps(truth, MEMORY)
    limit = likeness(maps.half1 + maps.half2, bundled, length, 50.0, wide)
    plain = likeness(rounded(bundled * wide), bundled, length, 50.0, wide)
    print(f"ribo: at the published poses {limit:.3f} at 50 Å; round average of the bundled map {plain:.3f}", flush=True)
    wish = Wish(length, DIAMETER * length, 50.0, MAX_SHIFT * length)
    for seed in seeds:
        start = cpu()
        scene = Scene.of(truth, wish, MEMORY, seed)
        done = descend(scene.balls, wish, scene.mask, generator(seed))
        found, (model,) = models_of(done.references, scene)
        used = cpu() - start
        fit = overlay(model.density * wide, bundled * wide, length / 50, MAX_SHIFT * head.box)
        other = likeness(mirror(model.density, "z"), bundled, length, 50.0, wide)
        pairs = zip(found, truth, strict=True)
        errors = torch.cat([rotation_distance(p.rotation @ fit.rotation.T, t.rotation) for p, t in pairs])
        print(
            f"ribo: seed {seed}: {fit.correlation:.3f} (mirrored {other:.3f}) at 50 Å, log-likelihood {done.evidence:.2f}, "
            f"{int((errors < 25).sum())} of {len(errors)} poses within 25°, {used:.0f} CPU-s",
            flush=True,
        )


def main() -> None:
    """Run the sets that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--sets", nargs="+", default=[*CASES, "ribo"], choices=[*CASES, "ribo"])
    args = parser.parse_args()
    data = args.data.resolve()
    (args.folder / "raw").mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    seeds = range(args.first, args.first + args.seeds)
    for name in args.sets:
        if name == "ribo":
            ribosomes(data, seeds)
        else:
            simulated(name, CASES[name], data, seeds)


if __name__ == "__main__":
    main()
