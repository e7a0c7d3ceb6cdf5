"""Mixtures of particles taken apart: how well classes come back, what is proposed where there is nothing, and what it costs.

    python benchmarks/classification.py FOLDER DATA [--mode mixture same unrelated] [--seed 1] [--map splice_3A.mrc]

DATA holds maps/. Each mode makes a project of simulated tilt series in FOLDER (with --generate-only, no more than that):
`mixture`, 300 particles of three kinds: the map, the map without a domain of a tenth of its mass, and with that domain turned
by 30°; `same`, 300 of one kind; `unrelated`, GroEL and apoferritin 1:3. Particles are cut out binned by 2, at poses that
emc_refine finds from random ones with the first map at 50 Å, and at the true ones. Printed is the adjusted Rand index of the
classes proposed, over all particles that some image shows, beside silhouettes and those of data without structure. `--refine`
adds emc_refine --classes, and of `same` divided at random; `--thirds` does emc_pca, emc_cluster and it with each third of the
particles alone. `large` needs no data: 20000 particles of box 48 made of a model, on disk; 36 axes.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import Parameters, program
from refinement import Data, Poses, made, set_at, true_poses
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from libemc import records
from libemc.io import mrc
from libemc.io.files import read_json
from libemc.methods import postprocess
from libemc.methods.classify.axes import ITERATIONS, SUBSPACE, Problem, find, known_axes
from libemc.methods.classify.differences import Differences, release
from libemc.methods.classify.frame import Frame
from libemc.numerics.grids import centred_coordinates
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations

SHARE, TURN = 0.1, 30.0
"""Part of the mass that the domain has, and degrees by which it is turned about its centre of mass."""
EDGE = 2.0
"""Voxels over which the cut through the map is smeared."""
BINNING = 2


@dataclass(frozen=True)
class Mixture(Data):
    """Of several maps.

    Attributes:
        maps: files; fractions: their shares.
        size: pixels along each side of an image.
    """

    maps: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    size: int = 800

    @property
    def folder(self) -> str:
        """Name of the project."""
        return f"{self.particle}_{self.count}in{self.series}_seed{self.seed}"

    def simulated(self, number: int) -> Parameters:
        """Options of emc_simulate for one series: as those of the conf series, with the simulator's own motion."""
        return {
            "map": list(self.maps),
            "fractions": ",".join(f"{f:g}" for f in self.fractions),
            "size": [self.size, self.size],
            "pixel-size": self.pixel_size,
            "tilt-range": [-60, 60, 3],
            "dose": 3.0,
            "thickness": 800.0,
            "count": self.count // self.series + (number < self.count % self.series),
            "defocus": 26000 + 4000 * number,
            "seed": 1000 * self.seed + number,
        }


def cut(density: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A map (n, n, n) in two, by a soft plane across a direction (3,) (x, y, z) beyond which `SHARE` of its mass lies."""
    z, y, x = centred_coordinates(density.shape)
    along = direction[0] * x + direction[1] * y + direction[2] * z
    order = along.reshape(-1).argsort(descending=True)
    beyond = density.clamp_min(0).reshape(-1)[order].double().cumsum(0)
    level = along.reshape(-1)[order][int((beyond < SHARE * beyond[-1]).sum())]
    domain = density * torch.sigmoid((along - level) * 4 / EDGE).to(density)
    return density - domain, domain


def turned(domain: Tensor, rotation: Tensor) -> Tensor:
    """A domain turned by (3, 3) about its own centre of mass."""
    mass = domain.clamp_min(0).double()
    z, y, x = centred_coordinates(domain.shape)
    centre = torch.stack([(mass * c).sum() / mass.sum() for c in (x, y, z)])
    return postprocess.place(domain, rotation, (centre - rotation @ centre).tolist())


def variants(path: Path, folder: Path, seed: int) -> tuple[str, ...]:
    """Files of a map as it is, without a domain, and with the domain turned; which domain, and how turned, by the seed."""
    array, pixel_size = mrc.read_volume(path)
    density = torch.from_numpy(array)
    g = torch.Generator().manual_seed(seed)
    frame = random_rotations(1, g)[0]
    rest, domain = cut(density, frame[0])
    other = rest + turned(domain, matrix_from_rotvec(TURN * frame[1]))
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, volume in (("whole", density), ("without", rest), ("turned", other)):
        names.append(str((folder / f"{path.stem}_{name}_{seed}.mrc").resolve()))
        mrc.write_volume(names[-1], volume.float().numpy(), pixel_size)
    return tuple(names)


def data_of(mode: str, args: argparse.Namespace) -> Mixture:
    """What is simulated for a mode."""
    maps, seed = args.data / "maps", args.seed
    common = {"pixel_size": 3.0, "motion": 0.5, "seed": seed}
    if mode == "unrelated":
        files = tuple(str((maps / f"{name}_3A.mrc").resolve()) for name in ("groel", "apof"))
        return Mixture(particle="groel_apof", count=200, series=2, box=40, maps=files, fractions=(1, 3), **common)
    array, _ = mrc.read_volume(maps / args.map)
    box = math.ceil(0.56 * len(array) / 2) * 2
    made_of = variants(maps / args.map, args.folder / "maps", seed)
    stem = Path(args.map).stem
    if mode == "same":
        return Mixture(
            particle=f"{stem}_same", count=300, series=5, box=box, maps=made_of[:1], fractions=(1,), **common
        )
    return Mixture(particle=f"{stem}_mix", count=300, series=5, box=box, maps=made_of, fractions=(1, 1, 1), **common)


def sets(home: Path, data: Mixture) -> None:
    """The particles at true poses, `known`, and at those that emc_refine finds, `own`, of a set cut out once."""
    if not (home / "particles/start/particles.json").exists():
        argv = ["emc_extract", "--all", "--label", "start", "--set", "start", "--box", data.box, "--bin", BINNING]
        program([*map(str, argv), "--quiet"], home, home / "log")
    if not (home / "particles/known/particles.json").exists():
        found = Poses.of("start", home)
        set_at(home, "start", "known", true_poses(home, data).among(found.ids))
    if not (home / "own/average.mrc").exists():
        argv = ["emc_refine", "start", "--reference", data.maps[0], "--startres", 50, "--path", "own", "--quiet"]
        cost = program([*map(str, argv), "--overwrite"], home, home / "log", threads=1)
        print(f"emc_refine: {cost.seconds:.0f} CPU-s", flush=True)


def true_classes(home: Path, data: Mixture) -> dict[str, int]:
    """Of every particle by its id, from 0."""
    return {
        f"{name}.{i:06d}": int(c)
        for name in data.names
        for i, c in enumerate(read_json(home / f"raw/{name}_truth.json")["cls"])
    }


def agreement(found: dict[str, int], true: dict[str, int]) -> float:
    """Adjusted Rand index over all particles that have a class."""
    ids = sorted(found)
    return float(adjusted_rand_score([true[i] for i in ids], [found[i] for i in ids]))


def found_classes(home: Path, run: str) -> dict[str, int]:
    """Classes of the used particles of a run."""
    _, files = records.load_particles(run, home)
    return {p.id: p.class_ for file in files.values() for p in file.particles if p.use and p.weight != 0 and p.class_}


def silhouettes(trials: list[dict[str, Any]]) -> str:
    """Of each number of clusters, beside the 95th percentile of data without structure."""
    some = [t for t in trials if t["silhouette"] is not None]
    return "".join(
        f"; {t['clusters']}: {t['silhouette']:.2f} (null {np.quantile(t['chance'], 0.95):.2f})" for t in some
    )


def judged(home: Path, data: Mixture, source: str, given: int) -> None:
    """emc_pca and emc_cluster of a set or run, by each method: what is proposed, and how well classes come back.

    Args:
        given: the true number of classes.
    """
    true, log = true_classes(home, data), home / "log"
    for components in ("probabilistic", "svd"):
        run = f"pca_{source}_{components}"
        argv = ["emc_pca", source, "--components", components, "--path", run, "--overwrite", "--quiet"]
        cost = program(argv, home, log)
        bands = read_json(home / run / "run.json")["state"]["bands"]
        axes = ", ".join(f"{b['scale']} Å {b['meaningful']}" for b in bands)
        print(
            f"{data.folder} {source} {components}: axes {axes}; {cost.seconds:.0f} CPU-s, {cost.memory:.0f} MB",
            flush=True,
        )
        for method in ("mixture", "kmeans", "hierarchical"):
            line = f"    {method:12s}"
            cost = program(["emc_cluster", run, "--method", method, "--overwrite", "--quiet"], home, log)
            state = read_json(home / run / "clusters.json")
            line += f" proposed {state['chosen']}: ARI {agreement(found_classes(home, run), true):.3f}"
            print(f"{line}{silhouettes(state['trials'])}; {cost.seconds:.0f} CPU-s", flush=True)
            if state["chosen"] == 1 and components == "probabilistic":
                along = ["--along", f"{bands[0]['scale']}:1,2;{bands[1]['scale']}:1,2"]
                program(["emc_cluster", run, "--method", method, *along, "--overwrite", "--quiet"], home, log)
                state = read_json(home / run / "clusters.json")
                text = f"    {method:12s} along the first axes of two bands: proposed {state['chosen']}"
                print(text + silhouettes(state["trials"]), flush=True)
            elif given > 1 and given != state["chosen"]:
                argv = ["emc_cluster", run, "--method", method, "--clusters", str(given), "--overwrite", "--quiet"]
                try:
                    program(argv, home, log)
                except RuntimeError as error:
                    print(f"    {method:12s} {given} asked for: {error}")
                    continue
                print(
                    f"    {method:12s} {given} asked for: ARI {agreement(found_classes(home, run), true):.3f}",
                    flush=True,
                )


def refined(home: Path, data: Mixture, given: int) -> None:
    """emc_refine --classes: of the clusters of `own`, of one reference, and of all references."""
    true, log = true_classes(home, data), home / "log"
    program(["emc_cluster", "pca_own_probabilistic", "--clusters", str(given), "--overwrite", "--quiet"], home, log)
    every = [word for m in data.maps for word in ("--reference", m)]
    ways = {
        "clusters": ["pca_own_probabilistic"],
        "one": ["start", "--reference", data.maps[0], "--startres", "50"],
        "all": ["start", *every, "--startres", "40"],
    }
    for name, words in ways.items():
        run = f"classes_{name}"
        cost = program(
            ["emc_refine", *words, "--classes", str(given), "--path", run, "--overwrite", "--quiet"], home, log
        )
        lines = read_json(home / run / "run.json")["state"]["classes"]
        resolutions = ", ".join(f"{r:.2f}" for r in lines[-1]["resolutions"])
        print(
            f"{data.folder} refined from {name}: ARI {agreement(found_classes(home, run), true):.3f}, {resolutions} Å, "
            f"{len(lines)} iterations in classes, {cost.seconds:.0f} CPU-s, {cost.memory:.0f} MB",
            flush=True,
        )


def divided_at_random(home: Path, data: Mixture) -> None:
    """emc_refine --classes of particles of one kind, at `own`'s poses, that are divided into two thirds and one at random."""
    log, g = home / "log", np.random.default_rng(data.seed)
    program(["emc_select", "own", "--set", "random", "--overwrite", "--quiet"], home, log)
    head, files = records.load_particles("random", home)
    for name, file in files.items():
        classes = g.choice([1, 1, 2], len(file.particles)).tolist()
        moved = tuple(p.model_copy(update={"class_": k}) for p, k in zip(file.particles, classes, strict=True))
        files[name] = file.model_copy(update={"particles": moved})
    records.save_particles("particles/random", head, files, home)
    argv = ["emc_refine", "random", "--classes", "2", "--local", "--startres", "20", "--path", "classes_random"]
    cost = program([*argv, "--overwrite", "--quiet"], home, log)
    lines = read_json(home / "classes_random/run.json")["state"]["classes"]
    told = ", ".join(f"{line['certainty']:.2f}" for line in lines)
    print(
        f"{data.folder} divided at random: certainty {told} after each of "
        f"{len(lines)} iterations, {cost.seconds:.0f} CPU-s",
        flush=True,
    )


def thirds(home: Path, data: Mixture, given: int) -> None:
    """Each third of the particles of `own` alone: clusters, and classes refined from them."""
    true, log = true_classes(home, data), home / "log"
    program(["emc_select", "own", "--set", "third", "--split", "3", "--overwrite", "--quiet"], home, log)
    for k in (1, 2, 3):
        run, classes = f"pca_third_{k}", f"classes_third_{k}"
        program(["emc_pca", f"third_{k}", "--path", run, "--overwrite", "--quiet"], home, log)
        program(["emc_cluster", run, "--overwrite", "--quiet"], home, log)
        proposed = read_json(home / run / "clusters.json")["chosen"]
        found = agreement(found_classes(home, run), true)
        argv = ["emc_refine", run, "--classes", str(given), "--path", classes, "--overwrite", "--quiet"]
        told = f"{data.folder} third {k}: proposed {proposed}, ARI {found:.3f}"
        if proposed == given:
            program(argv, home, log)
            left = len(read_json(home / classes / "run.json")["state"]["classes"][-1]["numbers"])
            told += f"; refined: {left} classes, ARI {agreement(found_classes(home, classes), true):.3f}"
        print(told, flush=True)


def large(folder: Path, count: int, box: int, axes: int, seed: int) -> None:
    """Axes of many particles whose difference maps lie on disk as float16, made from a model with eight axes and noise; the
    time beside what the same products of matrices take, and one reading of the file."""
    frame, g = Frame.of(box, 6.0, 12.0), torch.Generator().manual_seed(seed)
    mask = soft_sphere(frame.small, 0.3 * frame.small, 2.0)
    average, *drawn = (frame.balls(torch.randn(*mask.shape, generator=g) * mask) for _ in range(9))
    true = torch.stack(drawn)
    q, shape = frame.points.shape[1], (count, frame.points.shape[1])
    true = true / (2 * true.abs().square().sum(dim=1, keepdim=True)).sqrt() * 20**0.5
    folder.mkdir(parents=True, exist_ok=True)
    data = np.memmap(folder / "large_data", np.float16, "w+", shape=(*shape, 2))
    weight = np.memmap(folder / "large_weight", np.float16, "w+", shape=shape)
    for start in range(0, count, 256):
        n = min(256, count - start)
        w = (1 + 0.5 * torch.rand(n, q, generator=g)).float()
        z = torch.randn(n, 8, generator=g)
        noise = torch.randn(n, q, 2, generator=g) * (w / 2).sqrt()[..., None]
        d = torch.view_as_real(w * (z.to(true.dtype) @ true)) + noise
        data[start : start + n], weight[start : start + n] = d.numpy(), w.numpy()
        release(data)
        release(weight)
    size = (data.nbytes + weight.nbytes) / 2**30
    zero = torch.zeros(q, dtype=torch.complex64)
    diff = Differences(frame, data, weight, zero, torch.full((q,), 1.25), zero)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    problem = Problem(diff, slice(0, q), mask, known_axes(frame, frame.maps(average) * mask))
    began = time.perf_counter()
    found = find(problem, axes, g)
    took = time.perf_counter() - began
    angle = subspace_angle(found.balls[:8], true)
    floor, reading = products(count, q, axes + 7), read_once(diff)
    passes = ITERATIONS + SUBSPACE + 2
    print(
        f"{count} particles, box {box}, {q} coefficients, {size:.1f} GB on disk, {axes} axes: {took:.0f} s; floor "
        f"{ITERATIONS * floor + passes * reading:.0f} s ({ITERATIONS} x {floor:.1f} s of products, {passes} x {reading:.1f} s of "
        f"reading); peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB, {resident:.2f} before; "
        f"true axes found to {angle:.1f}°; {torch.get_num_threads()} threads"
    )


def subspace_angle(found: Tensor, true: Tensor) -> float:
    """Degrees, largest principal angle between two sets of axes."""
    a, b = (torch.linalg.qr(torch.view_as_real(m.contiguous()).flatten(1).double().T)[0] for m in (found, true))
    cosine = torch.linalg.svdvals(a.T @ b).clamp(0, 1)
    return float(torch.rad2deg(torch.arccos(cosine.min())))


def products(count: int, q: int, columns: int) -> float:
    """Seconds that one step of EM must spend in matrix products: W with all pairs of columns, there and back."""
    pairs, n = columns * (columns + 1) // 2, 512
    w, p = torch.rand(n, q), torch.rand(pairs, q)
    began = time.perf_counter()
    lower = w @ p.T
    _ = w.T @ lower
    return (time.perf_counter() - began) * count / n


def read_once(diff: Differences) -> float:
    """Seconds to read all difference maps and make float32 of them."""
    began = time.perf_counter()
    for _ in diff.blocks(slice(0, diff.data.shape[1])):
        pass
    return time.perf_counter() - began


def main() -> None:
    """Make data and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--mode", nargs="+", default=["mixture", "same", "unrelated"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--map", default="splice_3A.mrc")
    parser.add_argument("--poses", nargs="*", default=["own", "known"], help="sets to judge: own, known, or none")
    parser.add_argument("--refine", action="store_true", help="refine in classes too")
    parser.add_argument("--thirds", action="store_true", help="each third of the particles alone, too")
    parser.add_argument("--generate-only", action="store_true")
    args = parser.parse_args()
    for mode in args.mode:
        if mode == "large":
            large(args.folder, 20000, 48, 36, args.seed)
            continue
        data = data_of(mode, args)
        home = made(args.folder, data)
        sets(home, data)
        if args.generate_only:
            continue
        for source in args.poses:
            judged(home, data, source, len(data.maps))
        if args.refine and len(data.maps) > 1:
            refined(home, data, len(data.maps))
        if args.refine and len(data.maps) == 1:
            divided_at_random(home, data)
        if args.thirds and len(data.maps) > 1:
            thirds(home, data, len(data.maps))


if __name__ == "__main__":
    main()
