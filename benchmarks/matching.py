"""Template matching against known answers: F1, errors of poses, false picks, time; and its speed beside the floor and a peer.

    python benchmarks/matching.py known DATA                      # DATA holds sim/ and maps/
    python benchmarks/matching.py speed [--pytme PYTHON]          # a Python that has pytme
    python benchmarks/matching.py series FOLDER [--seed 1] [--count 12] [--maps DATA/maps] [--only 3,7-9] [--cut-offs]

A pick is right when it lies within a radius of a true particle of its class that no better pick has taken. Particles whose
centre is nearer than that to the field's edge needn't be found, and picks there that are none are left out of the precision;
the column `false` counts these too. Poses are compared after the rigid motion between the true specimen and that of the
alignment, modulo the template's symmetry.

In `series` all is drawn from the seed and a series' number alone: particles, pixels, field, thickness, dose, defocus, hand,
tilts, crowding, contrast, gold beads, particles beyond the field, and in a third of them a second kind of particle, whose map
then competes. True alignment and CTF are imported. Each is searched for what is in it and for something that isn't. FOLDER is
kept: series that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import Cost, Parameters, chosen, log_uniform, program, scored, words
from torch import Tensor

from libemc import comparison, records
from libemc.io import mrc
from libemc.io.truth import read_truth
from libemc.methods import phantom, simulate
from libemc.methods.evaluate import RigidMotion
from libemc.methods.match import templates
from libemc.methods.match.correlate import Correlator, Part, search
from libemc.numerics import fourier
from libemc.numerics.rotations import matrix_from_euler, rotation_distance
from libemc.numerics.so3 import rotation_grid
from libemc.records import Picks

RADIUS = 60.0
"""Å: within which a pick is right, of large particles;"""
OF_DIAMETER = 1 / 3
"""of smaller ones, this share of their diameter."""
MANY_FALSE = 50.0
"""--expected-false of a second search, whose picks give the best F1 over all cut-offs."""


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Truth:
    """The particles of a series, M of them, in the true frame.

    Attributes:
        xyz: (M, 3) Å. rotation: (M, 3, 3). classes: (M,).
        field: x and y of the images, Å. motion: from this frame to that of the alignment.
    """

    xyz: Tensor
    rotation: Tensor
    classes: Tensor
    field: tuple[float, float]
    motion: RigidMotion

    @staticmethod
    def of(file: Path, name: str, project: Path) -> Truth:
        """What a truth file says of a series in a project."""
        truth = read_truth(file)
        rows, columns = (n * truth.pixel_size for n in records.load_tiltseries(name, project).source.shape[1:])
        motion = comparison.alignment_error(name, file, project).motion
        return Truth(
            torch.from_numpy(truth.picks.xyz), _rotations(truth.picks), torch.from_numpy(truth.classes), (columns, rows), motion
        )  # fmt: skip

    def near_edge(self, xyz: Tensor, radius: float) -> Tensor:
        """Which of points (P, 3) in this frame are nearer than `radius` to the field's edges, or beyond."""
        return (xyz[:, :2].abs() >= torch.tensor(self.field) / 2 - radius).any(dim=1)


@dataclass(frozen=True)
class Score:
    """What picks are worth.

    Attributes:
        true: particles that are to be found; picks: how many there are; false: picks that are none of these particles.
        precision, recall, f1: of all; best: the highest F1 over all cut-offs.
        position, angle: Å and degrees, medians over the right picks.
        lowest_true, highest_false: z.
        other: picks that are particles of another class.
        pairs: (pick, particle) of those that are right.
    """

    true: int
    picks: int
    false: int
    precision: float
    recall: float
    f1: float
    best: float
    position: float
    angle: float
    lowest_true: float
    highest_false: float
    other: int
    pairs: tuple[tuple[int, int], ...] = field(repr=False, default=())


def _rotations(picks: Any) -> Tensor:
    """(N, 3, 3)."""
    angles = (torch.tensor(np.asarray(getattr(picks, a)), dtype=torch.float64) for a in ("rot", "tilt", "psi"))
    return matrix_from_euler(*angles)


def scored_picks(
    picks: Picks | None, truth: Truth, radius: float, symmetry: str | None = "c1", kind: int | None = None
) -> Score:
    """Compare picks with the truth, the highest z first.

    Args:
        symmetry: of the particle about the template's own axes; None where it has one that isn't known.
        kind: class that is looked for; None for all.
    """
    wanted = torch.ones(len(truth.xyz)).bool() if kind is None else truth.classes == kind
    due = wanted & ~truth.near_edge(truth.xyz, radius)
    places, turns = truth.motion(truth.xyz), truth.motion.rotation @ truth.rotation
    if picks is None or not picks.xyz:
        none = math.nan
        return Score(int(due.sum()), 0, 0, 0.0, 0.0, 0.0, 0.0, none, none, none, none, 0)
    xyz, z = torch.tensor(picks.xyz, dtype=torch.float64), torch.tensor(picks.z, dtype=torch.float64)
    edge = truth.near_edge((xyz - truth.motion.shift) @ truth.motion.rotation, radius)
    taken, pairs, other = torch.zeros(len(places)).bool(), [], 0
    right, curve = torch.zeros(len(xyz)).bool(), []
    for seen, i in enumerate(z.argsort(descending=True).tolist(), 1):
        apart = (places - xyz[i]).norm(dim=1) + 1e9 * taken
        j = int(apart.argmin())
        if apart[j] <= radius:
            taken[j], right[i] = True, wanted[j]
            other += int(not wanted[j])
            if wanted[j]:
                pairs.append((i, j))
        order = z >= z[i]
        counted = seen - int((edge & ~right & order).sum())
        curve.append((len(pairs) / max(1, counted), int((taken & due).sum()) / max(1, int(due.sum()))))
    f1 = [2 * p * r / max(1e-9, p + r) for p, r in curve]
    ours, theirs = (
        (torch.tensor(column) for column in zip(*pairs, strict=True)) if pairs else (torch.zeros(0).long(),) * 2
    )
    position = (xyz[ours] - places[theirs]).norm(dim=1)
    angle = math.nan
    if symmetry is not None and pairs:
        angle = float(rotation_distance(_rotations(picks)[ours], turns[theirs], symmetry).median())
    return Score(
        true=int(due.sum()), picks=len(xyz), false=len(xyz) - len(pairs) - other, precision=curve[-1][0], recall=curve[-1][1],
        f1=f1[-1], best=max(f1), position=float(position.median()) if pairs else math.nan, angle=angle,
        lowest_true=float(z[right].min()) if pairs else math.nan,
        highest_false=float(z[~right].max()) if not bool(right.all()) else math.nan, other=other, pairs=tuple(pairs),
    )  # fmt: skip


def search_angle(
    project: Path, name: str, label: str, picks: Picks, truth: Truth, score: Score, symmetry: str
) -> float:
    """Median angle error, degrees, of the search's own rotations at the right picks: of the best voxel next to each."""
    folder = project / "tomograms" / f"{name}_match"
    best, spacing = mrc.read_volume(folder / f"{label}_score.mrc")
    which = mrc.read_volume(folder / f"{label}_rotation.mrc")[0]
    table = torch.tensor(json.loads((folder / f"{label}_rotations.json").read_text())["angles"], dtype=torch.float64)
    rotations = matrix_from_euler(*table.unbind(1))
    errors = []
    for i, j in score.pairs:
        at = [round(c / spacing) + n // 2 for c, n in zip(reversed(picks.xyz[i]), best.shape, strict=True)]
        around = tuple(slice(max(0, a - 1), a + 2) for a in at)
        number = int(which[around].flat[int(best[around].argmax())])
        right = truth.motion.rotation @ truth.rotation[j]
        errors.append(float(rotation_distance(rotations[number], right, symmetry)))
    return float(np.median(errors)) if errors else math.nan


def searched(project: Path, name: str, options: Sequence[object]) -> Cost:
    """emc_tempmatch on one thread; its picks go into the record. A search that picks nothing says so as a failure."""
    argv = ["emc_tempmatch", name, *map(str, options), "--overwrite", "--quiet", "--threads", "1"]
    try:
        return program(argv, project, project / "log")
    except RuntimeError as error:
        if "no pick reaches the threshold" not in str(error):
            raise
        return Cost(math.nan, math.nan, math.nan)


def picks_of(project: Path, name: str, label: str) -> Picks:
    """From the record."""
    return records.load_tiltseries(name, project).picks[label]


# ---------------------------------------------------------------------------------------------------------------- known


def known(args: argparse.Namespace) -> None:
    """Two series of another simulator: what is in them, what isn't, and what steps and seeds change."""
    data = args.data.resolve()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("conf_01", "conf_02"):
            own = name == "conf_01"
            program(["emc_import", str(data / f"sim/{name}.mrc"), "--quiet"], folder, folder / "log")
            how = ["emc_tomogram", name, "--align-only"]
            if not own:
                how = ["emc_import", "--alignment", str(data / f"sim/{name}_truth.json"), name]
            program([*how, "--quiet"], folder, folder / "log")
            program(["emc_tomoctf", name, "--overwrite", "--quiet"], folder, folder / "log")
        print(
            "series   template what       step true picks  prec   rec    F1  best  pos/Å angle search   low  high "
            "wrong shape  CPU-s    MB"
        )
        first, second = (known_row(folder, data, name, "splice") for name in ("conf_01", "conf_02"))
        for name in ("conf_01", "conf_02"):
            known_row(folder, data, name, "splice", "cut-offs", "--expected-false", MANY_FALSE)
        known_row(folder, data, "conf_01", "splice", "seed 1", "--seed", 1)
        for step in (24, 12):
            known_row(folder, data, "conf_01", "splice", f"{step}°", "--step", step)
        absent = [known_row(folder, data, "conf_01", label, "absent") for label in ("groel", "apof")]
    print(
        f"conf_01 F1 {first.f1:.3f}, {first.position:.1f} Å, {first.angle:.2f}°; conf_02 F1 {second.f1:.3f}; "
        f"picks of absent GroEL {absent[0].picks}, apoferritin {absent[1].picks}"
    )


def known_row(folder: Path, data: Path, name: str, label: str, what: str = "", *more: object) -> Score:
    """Search once, score, print."""
    template = f"{label}={data / 'maps' / label}_3A.mrc"
    cost = searched(folder, name, ["--template", template, "--volumes", *more])
    picks = picks_of(folder, name, label)
    truth = Truth.of(data / f"sim/{name}_truth.json", name, folder)
    score = scored_picks(picks, truth, RADIUS)
    before = search_angle(folder, name, label, picks, truth, score, "c1")
    told = picks.parameters or {}
    print(
        f"{name:8s} {label:8s} {what:8s} {told['step']:6.1f} {score.true:4d} {score.picks:5d} {score.precision:5.3f} "
        f"{score.recall:5.3f} {score.f1:5.3f} {score.best:5.3f} {score.position:6.1f} {score.angle:5.2f} {before:6.1f} "
        f"{score.lowest_true:5.1f} {score.highest_false:5.1f} {told['wrong_shape']:11d} {cost.seconds:6.1f} {cost.memory:5.0f}",
        flush=True,
    )
    return score


# ---------------------------------------------------------------------------------------------------------------- speed

FIELD, BOX, STEP = (100, 200, 200), 32, 15.0
"""Voxels of noise (z, y, x), of the template's side, and degrees."""
NEEDED = (71, 141, 141), 24
"""The same field and template at two voxels to a resolution of 2.8 of these: what emc_tempmatch would search."""
MANY, FEW = 128, 10
"""Rotations, and transforms, that are timed."""
PYTME_STEP = 40
"""Degrees of pytme's rotations: 216 of them are enough to time it."""


def took(work: Callable[[], object], repeats: int = 2) -> tuple[float, float]:
    """The least wall and CPU seconds of some repeats after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - began, time.process_time() - used))
    return min(t[0] for t in times[1:]), min(t[1] for t in times[1:])


def speed(args: argparse.Namespace) -> None:
    """Rotations per second of the search alone, at full sampling and at what the resolution needs."""
    rate = {}
    copied, large = torch.zeros(1 << 26), torch.ones(1 << 26)
    torch.set_num_threads(1)
    bytes_per_second = 2 * large.nbytes / took(lambda: copied.copy_(large))[1]
    print(
        "voxels (x, y, z)  box threads rotations/s  per CPU-s voxel-rotations/CPU-s  one transform  times it  "
        "copied once  times it"
    )
    for shape, box in ((FIELD, BOX), NEEDED):
        volume = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        density = torch.randn((box,) * 3, generator=torch.Generator().manual_seed(1))
        template = templates.Template("noise", density, torch.ones(box, box, box), 1.0, 2.0)
        rotations = rotation_grid(STEP, "c1")
        some, norms = rotations[:MANY], torch.ones(MANY)
        part = Part((0, 0, 0), shape)
        padded = part.padded(shape, box)
        spectrum = torch.fft.rfftn(torch.zeros(padded))
        torch.set_num_threads(1)
        floor = took(lambda s=spectrum, p=padded: [torch.fft.irfftn(s, s=p) for _ in range(FEW)])[1] / FEW  # type: ignore[misc]
        # a spectrum read, a correlation and the best so far, and its number, read and written
        moved = (spectrum.numel() * 8 + 4 * math.prod(shape) * 4) / bytes_per_second
        for threads in (1, 2):
            torch.set_num_threads(threads)
            correlator = Correlator(volume, part, box, cutoff=0.5)
            wall, cpu = took(lambda c=correlator, t=template, s=some, n=norms: search(c, t, s, n))  # type: ignore[misc]
            rate[box, threads], each = MANY / cpu, cpu / MANY
            print(
                f"{shape[2]:4d} {shape[1]:4d} {shape[0]:4d}    {box:3d} {threads:6d} {MANY / wall:10.1f} {1 / each:10.1f} "
                f"{math.prod(shape) / each:21.2e} {floor * 1e3:11.1f} ms {each / floor:9.2f} {moved * 1e3:9.1f} ms "
                f"{each / moved:9.2f}",
                flush=True,
            )
    print(
        f"{len(rotations)} rotations; rotations per CPU-s {rate[BOX, 1]:.1f}, at the sampling that is needed "
        f"{rate[NEEDED[1], 1]:.1f}; in two threads {rate[BOX, 2]:.1f}, {rate[NEEDED[1], 2]:.1f}; "
        f"copying {bytes_per_second / 1e9:.1f} GB/s"
        + (f"; pytme on one core {pytme(args.pytme):.1f}" if args.pytme else "")
    )


def pytme(python: Path) -> float:
    """Rotations per second of pytme's matching on one core, as it times itself: of the wall clock.

    Raises:
        RuntimeError: it failed, or does not say.
    """
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name, shape in (("target", FIELD), ("template", (BOX,) * 3)):
            mrc.write_volume(Path(folder) / f"{name}.mrc", rng.normal(size=shape).astype(np.float32), 1.0)
        argv = ["-m", "target.mrc", "-i", "template.mrc", "-a", str(PYTME_STEP), "-n", "1", "-o", "found.h5"]
        done = subprocess.run(
            [str(python), "-m", "tme.scripts.match_template", *argv], cwd=folder, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )  # fmt: skip
    count, seconds = re.search(r"\[(\d+) rotations\]", done.stdout), re.search(r"Runtime real: ([\d.]+)s", done.stdout)
    if done.returncode or not count or not seconds:
        raise RuntimeError(f"pytme failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-300:]}")
    return int(count[1]) / float(seconds[1])


# --------------------------------------------------------------------------------------------------------------- series


@dataclass(frozen=True)
class Kind:
    """A particle that series are made of.

    Attributes:
        name, family: those of one family are too alike for one to be absent where the other is.
        file: its map.
        searched: symmetry it is searched with; compared: that of its angles, None where its axes aren't ours.
        diameter: Å.
    """

    name: str
    family: str
    file: Path
    searched: str
    compared: str | None
    diameter: float

    @property
    def radius(self) -> float:
        """Å, within which a pick of it is right."""
        return min(RADIUS, OF_DIAMETER * self.diameter)


BUILT_IN = {"emc": ("emc", "c1"), "nohead": ("emc-nohead", "c1"), "d7": ("emc", "d7"), "o": ("emc", "o")}
"""By name of a kind: a variant of the built-in particle, and its symmetry."""
FROM_DATA = {"splice": "c1", "apof": None, "groel": None}
"""Symmetry on our axes of the maps in DATA/maps."""
MAP_PIXEL = 3.0
FIELD_WIDTH = 7.0, 11.0
"""Diameters of the largest and of the smallest particle that a field is wide, at least and at the most: the search's cost
goes by that."""
LEAST_COUNT = 15
MOST_FILLED = 0.2
"""Of the ice."""


def kinds_in(folder: Path, maps: Path | None) -> dict[str, Kind]:
    """All kinds; the built-in ones' maps are written to FOLDER/maps."""
    (folder / "maps").mkdir(parents=True, exist_ok=True)
    kinds = {}
    for name, (variant, symmetry) in BUILT_IN.items():
        file = folder / "maps" / f"{name}.mrc"
        particle = phantom.particle(variant, symmetry)
        if not file.exists():
            box = simulate.box_for(particle.diameter, MAP_PIXEL)
            mrc.write_volume(file, phantom.density(particle, box, MAP_PIXEL).numpy(), MAP_PIXEL)
        family = "emc" if symmetry == "c1" else name
        kinds[name] = Kind(name, family, file, symmetry, symmetry, _diameter(file))
    for name, compared in FROM_DATA.items() if maps else ():
        file = maps.resolve() / f"{name}_3A.mrc"
        kinds[name] = Kind(name, name, file, "c1", compared, _diameter(file))
    return kinds


def _diameter(file: Path) -> float:
    data, pixel = mrc.read_volume(file)
    return templates.diameter(torch.from_numpy(data.astype(np.float32)), pixel)


def drawn(seed: int, number: int, kinds: dict[str, Kind]) -> Parameters:
    """Everything about one series, as options of emc_simulate; keys with a leading underscore are notes."""
    rng = np.random.default_rng([seed, number])
    names = list(kinds)
    kind = kinds[str(rng.choice(names))]
    others = [k for k in kinds.values() if k.family != kind.family]
    mixed = kinds[str(rng.choice([k.name for k in others]))] if rng.random() < 1 / 3 else None
    here = [k for k in (kind, mixed) if k is not None]
    away = [k for k in others if k.family not in {h.family for h in here}]
    absent = min(away, key=lambda k: abs(math.log(k.diameter / kind.diameter)) + 0.1 * rng.random())
    widest = max(k.diameter for k in here)
    shorter = min(k.diameter for k in here)
    side = int(min(rng.uniform(500, 900), FIELD_WIDTH[1] * shorter / 2.0))
    narrow, wide = FIELD_WIDTH[0] * widest / side, FIELD_WIDTH[1] * shorter / side
    pixel = round(min(max(float(rng.uniform(2.0, 4.5)), narrow), max(wide, 2.0), 4.5), 2)
    size = [fourier.good_size(side), fourier.good_size(int(side * rng.uniform(0.8, 1.0)))]
    tilts, reach = int(rng.integers(21, 62)), float(rng.uniform(45, 62))
    step = round(2 * reach / (tilts - 1), 2)
    distance = widest * float(rng.uniform(1.05, 1.7))
    thickness = max(log_uniform(rng, 500, 1500), 1.15 * distance)
    beads = int(rng.integers(4, 20)) if rng.random() < 0.5 else 0
    margin = distance if rng.random() < 0.5 else 0.0
    area = math.prod(n * pixel + 2 * margin for n in size)

    def room() -> float:
        return MOST_FILLED * area * max(thickness - distance, 0.25 * distance) / (math.pi / 6 * distance**3)

    while room() < 2 * LEAST_COUNT and distance > 1.05 * widest:
        distance *= 0.98
    inside = math.prod(n * pixel for n in size) / area
    count = int(min(log_uniform(rng, LEAST_COUNT, 80) / inside, room()))
    p: Parameters = {
        "map": [str(k.file) for k in here],
        "size": size,
        "pixel-size": pixel,
        "tilt-range": [round(-step * (tilts // 2), 2), round(step * (tilts - 1 - tilts // 2), 2), step],
        "dose": round(min(float(rng.uniform(1.5, 4.0)), max(1.5, 160 / tilts)), 2),
        "axis": round(float(rng.uniform(-180, 180)), 1),
        "thickness": round(thickness),
        "slab-tilt": [round(float(v), 1) for v in rng.uniform(-6, 6, 2)],
        "margin": round(margin),
        "count": count,
        "distance": round(distance),
        "strength": round(float(rng.uniform(0.5, 1.0)), 2),
        "beads": beads,
        "bead-radius": round(float(rng.uniform(25, 60)), 1),
        "defocus": round(float(rng.uniform(15000, 50000))),
        "astigmatism": round(log_uniform(rng, 50, 1500)),
        "handedness": int(rng.choice([-1, 1])),
        "mtf": round(float(rng.uniform(0.4, 1.0)), 2),
        "seed": int(rng.integers(2**31)),
    }
    if mixed:
        p["fractions"] = f"{rng.choice([1, 2, 3])},{rng.choice([1, 2, 3])}"
    return p | {"_kinds": [k.name for k in here], "_absent": absent.name, "_tilts": tilts}


def name_of(number: int) -> str:
    """Of a series and its files."""
    return f"match_{number:03d}"


def make(folder: Path, seed: int, number: int, kinds: dict[str, Kind]) -> Parameters:
    """The series, unless it is there and made of the same numbers."""
    name, p = name_of(number), drawn(seed, number, kinds)
    note = folder / f"{name}.json"
    if note.exists() and words(json.loads(note.read_text())) == simulated(p):
        return p
    note.unlink(missing_ok=True)
    log = folder / f"{name}.log"
    argv = ["emc_simulate", name, *simulated(p), "--overwrite", "--quiet", "--threads", "1"]
    program(argv, folder, log)
    log.unlink()
    note.write_text(json.dumps(p, indent=1) + "\n")
    return p


def simulated(p: Parameters) -> list[str]:
    """Options of emc_simulate: each map has its own --map."""
    maps = [word for file in p["map"] for word in ("--map", file)]
    return maps + words({key: value for key, value in p.items() if key != "map"})


@dataclass(frozen=True)
class Row:
    """What became of one series.

    Attributes:
        kinds, absent, made: what is in it, what isn't, and how it was made.
        found: scores of the kinds; best: the highest F1 over all cut-offs, of a search that lets more through.
        absent_picks: picks of what isn't there.
        seconds: CPU of the search for what is there; memory: peak, MB.
    """

    number: int
    kinds: tuple[str, ...] = ()
    absent: str = ""
    made: Parameters = field(default_factory=dict)
    found: tuple[Score, ...] = ()
    best: float = math.nan
    absent_picks: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    failure: str | None = None


def one_series(folder: Path, seed: int, number: int, kinds: dict[str, Kind], cut_offs: bool) -> Row:
    """Make, import, search, score."""
    p, name = make(folder, seed, number, kinds), name_of(number)
    project = folder / "runs" / name
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    truth_file = folder / f"{name}_truth.json"
    program(["emc_import", f"../../{name}.mrc", "--quiet"], project, project / "log")
    program(["emc_import", "--alignment", str(truth_file), name, "--quiet"], project, project / "log")
    truth, here = Truth.of(truth_file, name, project), [kinds[k] for k in p["_kinds"]]
    # a true alignment doesn't say how thick the specimen is
    thick = 2 * (float(truth.xyz[:, 2].abs().max()) + max(k.diameter for k in here) / 2)

    def options(*which: Kind) -> list[object]:
        maps = [f"{k.name}={k.file}" for k in which]
        return ["--template", *maps, "--symmetry", ",".join(k.searched for k in which), "--thickness", round(thick)]

    def scores() -> tuple[Score, ...]:
        return tuple(
            scored_picks(picks_of(project, name, k.name), truth, k.radius, k.compared, c if len(here) > 1 else None)
            for c, k in enumerate(here)
        )

    best = 0.0
    if cut_offs:
        searched(project, name, [*options(*here), "--expected-false", MANY_FALSE])
        best = scores()[0].best
    cost, absent = searched(project, name, options(*here)), kinds[p["_absent"]]
    found = scores()
    searched(project, name, options(absent))
    wrong = len(picks_of(project, name, absent.name).xyz)
    best = max(best, found[0].best)
    return Row(number, tuple(p["_kinds"]), absent.name, p, found, best, wrong, cost.seconds, cost.memory)


SERIES_HEAD = (
    " no kind    true picks false other  prec   rec    F1  best  pos/Å angle   low  high absent      CPU-s    MB | "
    "Å/px  thick dose tilts def/µm str  beads dist/d"
)


def series_row(row: Row) -> str:
    """A line for each kind."""
    if row.failure is not None:
        return f"{row.number:3d} failed: {row.failure}"
    p, lines = row.made, []
    conditions = (
        f"{p['pixel-size']:4.2f} {p['thickness']:6d} {p['dose']:4.2f} {p['_tilts']:5d} {p['defocus'] / 1e4:6.2f} "
        f"{p['strength']:4.2f} {p['beads']:4d} {p['distance']:5d}{' margin' if p['margin'] else ''}"
    )
    for kind, s in zip(row.kinds, row.found, strict=True):
        first = kind == row.kinds[0]
        lines.append(
            f"{row.number:3d} {kind:7s} {s.true:4d} {s.picks:5d} {s.false:5d} {s.other:5d} {s.precision:5.2f} {s.recall:5.2f} "
            f"{s.f1:5.2f} {row.best if first else s.best:5.2f} {s.position:6.1f} {s.angle:5.2f} {s.lowest_true:5.1f} "
            f"{s.highest_false:5.1f} {row.absent_picks if first else '':>3} {row.absent if first else '':7s} "
            + (f"{row.seconds:6.0f} {row.memory:5.0f} | {conditions}" if first else "")
        )
    return "\n".join(lines)


def series(args: argparse.Namespace) -> None:
    """Make, search, score, print."""
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = kinds_in(folder, args.maps)
    args.results, args.generate_only = folder / "scores.json", False
    rows = scored(
        args,
        chosen(args.count, args.only),
        lambda n: one_series(folder, args.seed, n, kinds, args.cut_offs),
        lambda n, why: Row(n, failure=why),
        SERIES_HEAD,
        series_row,
    )
    good = [r for r in rows if r.failure is None]
    if not good:
        raise SystemExit("all failed")
    found, away = [s for r in good for s in r.found], [r.absent_picks for r in good]
    f1, seconds = [s.f1 for s in found], [r.seconds for r in good]
    print(
        f"{len(good)} series, {len(rows) - len(good)} failed: F1 median {np.median(f1):.3f}, worst {min(f1):.3f}; false picks "
        f"{sum(s.false for s in found) / len(found):.2f} per search, {sum(s.other for s in found)} of another class; of absent "
        f"templates {sum(away) / len(away):.2f} per search, most {max(away)}; median {np.nanmedian(seconds):.0f} CPU-s"
    )


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(required=True)
    first = which.add_parser("known", help="conf_01 and conf_02")
    first.add_argument("data", type=Path)
    first.set_defaults(work=known)
    second = which.add_parser("speed", help="rotations per second of the search alone")
    second.add_argument("--pytme", type=Path, metavar="PYTHON", help="a Python that has pytme, to be timed as well")
    second.set_defaults(work=speed)
    third = which.add_parser("series", help="simulated series with random everything")
    third.add_argument("folder", type=Path)
    third.add_argument("--seed", type=int, default=1)
    third.add_argument("--count", type=int, default=12)
    third.add_argument("--only", help="numbers, with commas and a-b between")
    third.add_argument("--maps", type=Path, help="folder of splice_3A.mrc, apof_3A.mrc, groel_3A.mrc, as further kinds")
    third.add_argument("--cut-offs", action="store_true", help="search again with many false picks, for the best F1")
    third.add_argument("--workers", type=int, default=1, help="series at a time")
    third.add_argument("--keep-going", action="store_true", help="a series that fails counts as failed")
    third.set_defaults(work=series)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
