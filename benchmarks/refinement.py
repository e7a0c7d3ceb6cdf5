#!/usr/bin/env python3
"""Refinement of simulated particles against what their images allow: resolution, poses, honesty, time, memory.

    python benchmarks/refinement.py FOLDER                              # 400 particles, random poses, truth at 50 Å
    python benchmarks/refinement.py FOLDER --particle splice_3A.mrc     # of a map instead of the built-in particle
    python benchmarks/refinement.py FOLDER --mode search local time     # one iteration each; 200 particles in two threads
    python benchmarks/refinement.py FOLDER --mode noise                 # images of noise alone
    python benchmarks/refinement.py FOLDER --mode junk                  # a fifth of the picks are false
    python benchmarks/refinement.py FOLDER --refine "--iterations 4"    # more words for emc_refine

The data are 41 images each of some series, at a defocus of their own, of particles that move between exposures. True
alignment and CTF are imported; picks are off by `OFFSET` along each axis, and turned anyhow. All of it is drawn from the
seed. FOLDER is kept: what is there is not made again.

The oracle is emc_average of the same images at the true rotations, each cut where its particle truly was in that tilt; with
one true position for all tilts, the mean weighted by what the dose has left of detail of `DETAIL`, it is called static: what
poses alone can reach. The resolution of a map is where its FSC with the true one falls below 0.5, both in a mask of the true
one. Poses and maps are compared after the one motion of the reference that fits all poses best, which is printed. What a run
claims, 0.143 of its own half maps, is compared with what the truth confirms in the run's own mask; claimed / confirmed below
1 / 1.08 promises too much.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import Cost, Parameters, program, words
from torch import Tensor

from libemc import project, records
from libemc.io import mrc
from libemc.io.files import read_json
from libemc.io.truth import read_truth
from libemc.methods import extract, postprocess
from libemc.methods.evaluate import map_agreement
from libemc.methods.subtilts import Particles
from libemc.numerics import fourier
from libemc.numerics.dose import exposure_filter
from libemc.numerics.filters import lowpass
from libemc.numerics.grids import centred_radius
from libemc.numerics.masks import soft_mask_from_map
from libemc.numerics.rotations import euler_from_matrix, matrix_from_rotvec, random_rotations, rotation_distance

FIELD, THICKNESS = 2880.0, 900.0  # Å
OFFSET = 5.0
"""Å rms along each axis, by which picks are off."""
START = 50.0
"""Å: to which the true map is known at the start."""
SEARCH = (40.0, 20.0)
"""Å, to which the true map is known before a search of everything, and how far it looks for the particle."""
NEAR = (3.0, 3.0, 12.0)
"""Degrees and Å by which every pose is off before a local iteration, and Å to which the true map is known."""
DETAIL = 10.0
"""Å: a particle's mean position is that of its detail of this size, which only the early exposures show."""
RIGHT = 5.0
"""Degrees within which a pose is right."""
ALIKE = 10.0
"""Degrees: poses that are farther off take no part in the common motion."""
AGREED = 0.01
"""Of a resolution: by how much two programs may differ."""
FALSE = 0.25
"""False picks for each true one in the mode `junk`, half of them beside a particle and half in ice alone."""
BESIDE, ALONE = (110.0, 160.0), 230.0
"""Å from the nearest particle: beside it, farther off than a refinement looks; alone, where a box is full of ice."""
TRUE = "raw/true.mrc"
"""The true map, in the project."""
SMOOTH, EXTEND, EDGE = 15.0, 3.0, 9.0
"""Å: the true map is smoothed for its mask, which reaches so far beyond the density, and its edge is so wide."""


@dataclass(frozen=True)
class Data:
    """What is simulated.

    Attributes:
        particle: `emc`, or the file of a map.
        count: particles in all; series: tilt series.
        box: pixels. pixel_size, motion: Å.
    """

    particle: str
    count: int
    series: int
    box: int
    pixel_size: float
    motion: float
    seed: int

    @property
    def folder(self) -> str:
        """Name of the project."""
        what = f"{Path(self.particle).stem}_{self.count}in{self.series}"
        return f"{what}_{self.pixel_size:g}A_motion{self.motion:g}_seed{self.seed}"

    @property
    def names(self) -> list[str]:
        """Of the tilt series."""
        return [f"TS_{k + 1:02d}" for k in range(self.series)]

    def simulated(self, number: int) -> Parameters:
        """Options of emc_simulate for one series."""
        side = fourier.good_size(round(FIELD / self.pixel_size))
        built_in = self.particle == "emc"
        return {
            "particle" if built_in else "map": [self.particle if built_in else str(Path(self.particle).resolve())],
            "size": [side, side],
            "pixel-size": self.pixel_size,
            "tilt-range": [-60, 60, 3],
            "dose": 3.0,
            "thickness": THICKNESS,
            "count": self.count // self.series + (number < self.count % self.series),
            "motion": self.motion,
            "defocus": 26000 + 4000 * number,
            "seed": 1000 * self.seed + number,
        }


# ----------------------------------------------------------------------------------------------------------------- data


Change = Callable[[records.TiltSeriesRecord, int, int], records.TiltSeriesRecord]
"""What a record becomes that was imported from the truth, given the data's seed and the number of the series."""


def made(folder: Path, data: Data, change: Change | None = None) -> Path:
    """The project of the data: images, alignment, CTF, true picks and those to start from, and the true map.

    Args:
        change: of each record at last; None: `scrambled`.
    """
    change = change or scrambled
    home = folder / data.folder
    note, wanted = home / "data.json", [data.simulated(k) for k in range(data.series)]
    if note.exists() and json.loads(note.read_text()) == wanted:
        return home
    shutil.rmtree(home, ignore_errors=True)
    (home / "raw").mkdir(parents=True, exist_ok=True)
    log = home / "log"
    for number, (name, options) in enumerate(zip(data.names, wanted, strict=True)):
        argv = ["emc_simulate", f"raw/{name}", *words(options), "--map-out", "raw/true.mrc"]
        program([*argv, "--overwrite", "--quiet", "--threads", "1"], home, log)
        truth = f"raw/{name}_truth.json"
        program(["emc_import", f"raw/{name}.mrc", "--overwrite", "--quiet"], home, log)
        program(["emc_import", "--alignment", truth, name, "--overwrite", "--quiet"], home, log)
        program(["emc_import", "--picks", truth, "--label", "true", name, "--overwrite", "--quiet"], home, log)
        records.update(
            records.tiltseries_path(name, home),
            lambda r, k=number: change(r, data.seed, k),
            records.TiltSeriesRecord,
        )
    note.write_text(json.dumps(wanted, indent=1) + "\n")
    return home


def scrambled(record: records.TiltSeriesRecord, seed: int, number: int) -> records.TiltSeriesRecord:
    """A record with picks `start`: those that are called true, moved and turned anyhow."""
    g = torch.Generator().manual_seed(1000 * seed + number)
    xyz = torch.tensor(record.picks["true"].xyz, dtype=torch.float64)
    xyz = xyz + OFFSET * torch.randn(xyz.shape, generator=g, dtype=torch.float64)
    rot, tilt, psi = (a.tolist() for a in euler_from_matrix(random_rotations(len(xyz), g)))
    start = records.Picks(xyz=xyz.tolist(), rot=rot, tilt=tilt, psi=psi, source="benchmark")
    return record.model_copy(update={"picks": {**record.picks, "start": start}})


@dataclass(frozen=True)
class Poses:
    """Of particles by their ids: rotation (N, 3, 3), xyz (N, 3) Å."""

    ids: list[str]
    rotation: Tensor
    xyz: Tensor

    @staticmethod
    def of(set_or_run: str, home: Path) -> Poses:
        """What a set or run says of its used particles."""
        _, files = records.load_particles(set_or_run, home)
        series = [Particles.of(file, None) for file in files.values()]
        ids = [p.id for file in files.values() for p in file.particles if p.use]
        parts = [torch.cat([getattr(p, name)[p.use] for p in series]) for name in ("rotation", "xyz")]
        return Poses(ids, *parts)

    def among(self, ids: list[str]) -> Poses:
        """Those of the given ids, in their order."""
        place = {name: k for k, name in enumerate(self.ids)}
        index = torch.tensor([place[name] for name in ids])
        return Poses(ids, self.rotation[index], self.xyz[index])


def true_poses(home: Path, data: Data) -> Poses:
    """Of all particles; a position is the mean over the tilts, weighted by the power that the exposure filter leaves."""
    ids, rotations, places = [], [], []
    for name in data.names:
        truth = read_json(home / f"raw/{name}_truth.json")
        ids += [f"{name}.{i:06d}" for i in range(len(truth["poses"]))]
        rotations.append(torch.tensor(truth["poses"], dtype=torch.float64))
        dose = truth["dose"] * (torch.tensor(truth["acq"], dtype=torch.float64) + 1)
        weight = exposure_filter(torch.tensor(1 / DETAIL, dtype=torch.float64), dose, truth["kv"]) ** 2
        still = torch.zeros(len(truth["poses"]), len(dose), 3, dtype=torch.float64)
        motion = torch.tensor(truth["motion_A"], dtype=torch.float64) if "motion_A" in truth else still
        mean = torch.einsum("t,nti->ni", weight / weight.sum(), motion)
        places.append(torch.tensor(truth["pos_A"], dtype=torch.float64) + mean)
    return Poses(ids, torch.cat(rotations), torch.cat(places))


def start_set(home: Path, data: Data) -> str:
    """The particles as they are picked, cut out."""
    name = f"start{data.box}"
    if not (home / f"particles/{name}/particles.json").exists():
        argv = ["emc_extract", "--all", "--label", "start", "--set", name, "--box", str(data.box), "--quiet"]
        program(argv, home, home / "log")
    return name


def set_at(home: Path, source: str, name: str, poses: Poses, stacks: dict[str, str] | None = None) -> str:
    """A set of the images of another, or of others in the same order, at other poses."""
    head, files = records.load_particles(source, home)
    angles = torch.stack(euler_from_matrix(poses.rotation), dim=1).tolist()
    place = {i: k for k, i in enumerate(poses.ids)}
    moved = {}
    for series, file in files.items():
        update = {"set": name, "history": ()} | ({"stack": stacks[series], "raw": None} if stacks else {})
        particles = []
        for p in file.particles:
            k = place[p.id]
            rot, tilt, psi = angles[k]
            particles.append(
                p.model_copy(update={"xyz": tuple(poses.xyz[k].tolist()), "rot": rot, "tilt": tilt, "psi": psi})
            )
        moved[series] = file.model_copy(update=update | {"particles": tuple(particles)})
    own = head.model_copy(update={"set": name, "history": ()})
    records.save_particles(f"particles/{name}", own, moved, home)
    return name


def false_places(truth: dict[str, Any], count: int, g: torch.Generator) -> Tensor:
    """(count, 3) Å where no particle is: the first half `BESIDE` one, the others at least `ALONE`."""
    particles = torch.tensor(truth["pos_A"], dtype=torch.float64)
    half = torch.tensor([0.45 * truth["field_A"][0], 0.45 * truth["field_A"][1], 0.35 * truth["thick"]])
    found: list[Tensor] = []
    while len(found) < count:
        place = half * (2 * torch.rand(3, generator=g, dtype=torch.float64) - 1)
        nearest = float((particles - place).norm(dim=1).min())
        if (BESIDE[0] <= nearest <= BESIDE[1]) if len(found) < count // 2 else (nearest >= ALONE):
            found.append(place)
    return torch.stack(found)


def with_false(record: records.TiltSeriesRecord, truth: dict[str, Any], seed: int) -> records.TiltSeriesRecord:
    """A record with picks `junk`: those to start from, and after them false ones, turned anyhow."""
    g = torch.Generator().manual_seed(seed)
    start = record.picks["start"]
    places = false_places(truth, round(FALSE * len(start.xyz)), g)
    angles = [a.tolist() for a in euler_from_matrix(random_rotations(len(places), g))]
    more = {name: [*getattr(start, name), *a] for name, a in zip(("rot", "tilt", "psi"), angles, strict=True)}
    junk = records.Picks(xyz=[*start.xyz, *places.tolist()], source="benchmark", **more)
    return record.model_copy(update={"picks": {**record.picks, "junk": junk}})


def junk_set(home: Path, data: Data) -> str:
    """The particles to start from and the false ones, cut out."""
    name = f"junk_picks{data.box}"
    if not (home / f"particles/{name}/particles.json").exists():
        for number, series in enumerate(data.names):
            truth = read_json(home / f"raw/{series}_truth.json")
            records.update(
                records.tiltseries_path(series, home),
                lambda r, t=truth, k=number: with_false(r, t, 1000 * data.seed + k),
                records.TiltSeriesRecord,
            )
        argv = ["emc_extract", "--all", "--label", "junk", "--set", name, "--box", str(data.box), "--quiet"]
        program(argv, home, home / "log")
    return name


def near_set(home: Path, data: Data, truth: Poses) -> str:
    """The true poses, each turned and moved by as much as `NEAR` says, in a random direction."""
    g = torch.Generator().manual_seed(data.seed)
    turn, move = torch.nn.functional.normalize(torch.randn(2, len(truth.ids), 3, generator=g).double(), dim=2)
    poses = replace(truth, rotation=matrix_from_rotvec(NEAR[0] * turn) @ truth.rotation, xyz=truth.xyz + NEAR[1] * move)
    return set_at(home, start_set(home, data), f"near{data.box}", poses)


def noise_set(home: Path, data: Data) -> str:
    """The particles to start from, with noise in the place of their images."""
    name, source = f"noise{data.box}", start_set(home, data)
    if not (home / f"particles/{name}/particles.json").exists():
        rng, stacks = np.random.default_rng(data.seed), {}
        for series, file in records.load_particles(source, home)[1].items():
            stacks[series] = f"particles/{name}/{series}.mrcs"
            (home / stacks[series]).parent.mkdir(parents=True, exist_ok=True)
            with mrc.StackWriter(home / stacks[series], data.pixel_size, "float16") as writer:
                for _ in file.particles:
                    writer.append(rng.normal(size=(len(file.tilts.tilt), data.box, data.box)).astype(np.float32))
        set_at(home, source, name, Poses.of(source, home), stacks)
    return name


def oracle_set(home: Path, data: Data, truth: Poses, source: str | None = None) -> str:
    """The same particles, each image cut where its particle truly was, in the true tilts: no shift is left to be found.

    Args:
        source: a set of those to start from; None: all.
    """
    source = source or start_set(home, data)
    name = source.replace("start", "oracle")
    if (home / f"particles/{name}/particles.json").exists():
        return name
    head, files = records.load_particles(source, home)
    cut = {}
    for series, file in files.items():
        known = read_json(home / f"raw/{series}_truth.json")
        record = records.load_tiltseries(series, home)
        images = mrc.open_stack(home / f"raw/{series}.mrc").array
        kept = [int(p.id.split(".")[1]) for p in file.particles]
        place = torch.tensor(known["pos2d_px"], dtype=torch.float64)[kept]
        place = place - torch.tensor([images.shape[2] // 2, images.shape[1] // 2])
        visible = torch.tensor([p.visible for p in file.particles], dtype=torch.bool)
        defocus = torch.tensor(known["particle_defocus"], dtype=torch.float64)[kept]
        patches = extract.Patches(place, defocus, visible)
        cutting = extract.Cutting(data.box, contrast=record.source.contrast)
        stack = extract.PatchStack(images, patches, extract.measure(images, patches, cutting), cutting)
        target = f"particles/{name}/{series}.mrcs"
        (home / target).parent.mkdir(parents=True, exist_ok=True)
        with mrc.StackWriter(home / target, data.pixel_size, "float16") as writer:
            for block in extract.extract(stack, range(len(kept)), 1 << 30):
                writer.append(block)
        own = truth.among([p.id for p in file.particles])
        angles = torch.stack(euler_from_matrix(own.rotation), dim=1).tolist()
        particles = [
            p.model_copy(
                update={"xyz": c, "centre": c, "image": None, "rot": a[0], "tilt": a[1], "psi": a[2], "defocus": d}
            )
            for p, c, a, d in zip(
                file.particles, map(tuple, own.xyz.tolist()), angles, map(tuple, defocus.tolist()), strict=True
            )
        ]
        geometry = read_truth(home / f"raw/{series}_truth.json").alignment
        true = {key: tuple(getattr(geometry, key).tolist()) for key in ("axis", "tilt", "xtilt", "magnification")}
        update = {"set": name, "history": (), "stack": target, "raw": None, "particles": tuple(particles)}
        update["tilts"] = file.tilts.model_copy(update=true)
        cut[series] = file.model_copy(update=update)
    records.save_particles(f"particles/{name}", head.model_copy(update={"set": name, "history": ()}), cut, home)
    return name


# --------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Motion:
    """Of the reference: found rotations are R·turn, found positions r + R·shift, of the true R and r. Å, float64."""

    turn: Tensor
    shift: Tensor

    @property
    def angle(self) -> float:
        """Degrees."""
        return float(rotation_distance(self.turn, torch.eye(3, dtype=torch.float64)))


STILL = Motion(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def common_motion(found: Poses, true: Poses) -> Motion:
    """The motion of the reference that takes the true poses nearest to those found; none where most are wrong.

    The rotation is the polar factor of the mean of RᵀR' over the poses within `ALIKE` of it, the shift the mean of
    Rᵀ(r' - r) over the same.
    """
    relative = true.rotation.transpose(1, 2) @ found.rotation
    moved = torch.einsum("nji,nj->ni", true.rotation, found.xyz - true.xyz)
    motion = STILL
    for _ in range(3):
        near = rotation_distance(relative, motion.turn) < ALIKE
        if int(near.sum()) < len(near) / 2:
            break
        u, _, vh = torch.linalg.svd(relative[near].mean(dim=0))
        motion = Motion(u @ vh, moved[near].mean(dim=0))
    return motion


def in_frame(density: Tensor, motion: Motion, pixel_size: float) -> Tensor:
    """The true map as it lies in the frame of a run: there at u what is here at turn·u + shift. Twice as finely sampled
    while it is interpolated.
    """
    if motion is STILL:
        return density
    fine = fourier.resize(density, [2 * n for n in density.shape])
    back = -2 / pixel_size * (motion.turn.T @ motion.shift)
    return fourier.resize(postprocess.place(fine, motion.turn.T, back.tolist()), density.shape)


def truth_mask(density: Tensor, pixel_size: float) -> Tensor:
    """A soft mask close about the true map."""
    smooth = lowpass(density, pixel_size, SMOOTH)
    return soft_mask_from_map(
        smooth, postprocess.automatic_threshold(smooth), EXTEND / pixel_size, EDGE / pixel_size
    )  # fmt: skip


@dataclass(frozen=True)
class Likeness:
    """Of the mean of a folder's half maps to the true map, Å: unfiltered, since in the shells that a filter has emptied a mask
    leaves nothing but what it carries over from others.

    Attributes:
        resolution: where the FSC with the true map falls below 0.5, in the true map's mask.
        claimed: of the half maps at 0.143, as the folder's fsc.json says.
        confirmed: as `resolution`, in the folder's own mask.
    """

    resolution: float
    claimed: float
    confirmed: float


def likeness(home: Path, run: str, data: Data, motion: Motion, true: str = TRUE) -> Likeness:
    """Compare with a true map."""
    density = in_frame(project.read_map(home / true, data.box, data.pixel_size), motion, data.pixel_size)
    half1, half2, mask = (
        torch.from_numpy(mrc.read_volume(home / run / f"{n}.mrc")[0]) for n in ("half1", "half2", "mask")
    )
    within = truth_mask(density, data.pixel_size)
    found, own = (map_agreement((half1 + half2) / 2, density, data.pixel_size, m).resolution for m in (within, mask))
    return Likeness(found, read_json(home / run / "fsc.json")["resolution"], own)


@dataclass(frozen=True)
class Row:
    """What a refinement reached.

    Attributes:
        particles: those that are seen in some image.
        oracle, static, refined: the averages.
        right: share of all particles that are within `RIGHT` and used; angle, position: medians of those used, degrees, Å.
        turn, shift: of the reference, degrees and Å; taken out of the three.
        iterations: how many; cost: of emc_refine, which averages after each of them.
        average: CPU seconds of emc_average of the same particles.
    """

    mode: str
    data: Data
    particles: int
    oracle: Likeness
    static: Likeness
    refined: Likeness
    right: float
    angle: float
    position: float
    turn: float
    shift: float
    iterations: int
    cost: Cost
    average: float


HEAD = (
    "mode   particle    n  box  Å/px | oracle static refined ratio | oracle claims ratio, run claims confirmed ratio |   <5° "
    "median     Å  frame   and Å | iter CPU-s each  average  wall-s    MB"
)


def line(r: Row) -> str:
    """A row of the table."""
    d, o, f = r.data, r.oracle, r.refined
    return (
        f"{r.mode:6s} {Path(d.particle).stem:9s} {r.particles:4d} {d.box:4d} {d.pixel_size:5.2f} | {o.resolution:6.2f} "
        f"{r.static.resolution:6.2f} {f.resolution:7.2f} {f.resolution / o.resolution:5.3f} | "
        f"{o.claimed:13.2f} {o.claimed / o.confirmed:5.3f}, {f.claimed:10.2f} {f.confirmed:9.2f} "
        f"{f.claimed / f.confirmed:5.3f} | "
        f"{100 * r.right:5.1f} {r.angle:5.2f}° {r.position:5.2f} {r.turn:5.2f}° {r.shift:7.2f} | {r.iterations:4d} "
        f"{r.cost.seconds / r.particles:10.3f} {r.average / r.particles:8.3f} {r.cost.wall:7.0f} {r.cost.memory:5.0f}"
    )


# ---------------------------------------------------------------------------------------------------------------- modes


NO_COST = Cost(math.nan, math.nan, math.nan)


def averaged(home: Path, name: str) -> Cost:
    """emc_average of a set, in a folder of its name."""
    argv = ["emc_average", name, "--path", f"average_{name}", "--overwrite", "--quiet", "--threads", "1"]
    return program(argv, home, home / "log")


def refined(home: Path, name: str, path: str, threads: int, options: list[str]) -> Cost:
    """emc_refine of a set."""
    argv = ["emc_refine", name, *options, "--path", path, "--overwrite", "--quiet", "--threads", str(threads)]
    return program(argv, home, home / "log", threads)


def known_to(home: Path, resolution: float, true: str = TRUE) -> str:
    """The true map as far as it is known, written into the project."""
    name = f"{Path(true).stem}_{resolution:g}A.mrc"
    density, pixel_size = mrc.read_volume(home / true)
    mrc.write_volume(home / name, lowpass(torch.from_numpy(density), pixel_size, resolution).numpy(), pixel_size)
    return name


def options_of(mode: str, home: Path, true: str = TRUE) -> list[str]:
    """Of emc_refine; the true map is written as far as it is known at the start."""
    resolution = {"search": SEARCH[0], "local": NEAR[2]}.get(mode, START)
    name = known_to(home, resolution, true)
    start = ["--reference", name, "--startres", f"{resolution:g}"]
    if mode == "search":
        return [*start, "--iterations", "1", "--max-shift", f"{SEARCH[1]:g}"]
    return [*start, "--local", "--iterations", "1"] if mode == "local" else start


def scored(folder: Path, mode: str, data: Data, threads: int, more: list[str] | None) -> tuple[Row, Motion]:
    """Make, refine, compare; with how the run's reference lies in the true frame.

    Args:
        more: options of emc_refine; None: the run that is there is compared, its cost isn't known.
    """
    home = made(folder, data)
    truth = true_poses(home, data)
    name = near_set(home, data, truth) if mode == "local" else start_set(home, data)
    perfect, static = oracle_set(home, data, truth), set_at(home, start_set(home, data), f"static{data.box}", truth)
    average = averaged(home, perfect).seconds
    averaged(home, static)
    run = f"{mode}{data.box}"
    cost = NO_COST if more is None else refined(home, name, run, threads, [*options_of(mode, home), *more])
    found, started = Poses.of(run, home), Poses.of(name, home)
    true = truth.among(found.ids)
    motion = common_motion(found, true)
    angle = rotation_distance(found.rotation, true.rotation @ motion.turn)
    places = true.xyz + true.rotation @ motion.shift
    row = Row(
        mode=mode,
        data=data,
        particles=len(started.ids),
        oracle=likeness(home, f"average_{perfect}", data, STILL),
        static=likeness(home, f"average_{static}", data, STILL),
        refined=likeness(home, run, data, motion),
        right=int((angle < RIGHT).sum()) / len(started.ids),
        angle=float(angle.median()),
        position=float((found.xyz - places).norm(dim=1).median()),
        turn=motion.angle,
        shift=float(motion.shift.norm()),
        iterations=len(read_json(home / run / "run.json")["state"]["iterations"]),
        cost=cost,
        average=average,
    )
    return row, motion


def noise(folder: Path, data: Data, threads: int, more: list[str] | None) -> str:
    """What refinement makes of images of noise: the FSC of its half maps beyond the resolution of the reference; `more` as
    in `scored`.
    """
    home = made(folder, data)
    run = f"noise{data.box}"
    name = noise_set(home, data)
    count = len(Poses.of(name, home).ids)
    cost = NO_COST if more is None else refined(home, name, run, threads, [*options_of("noise", home), *more])
    told = read_json(home / run / "fsc.json")
    beyond = np.array(told["frequency"]) > 1 / START
    curves = {name: np.array(told["curves"][name])[beyond] for name in ("unmasked", "corrected")}
    where = np.array(told["frequency"])[beyond]
    said = "; ".join(
        f"{name} {c.max():.3f} at most, at {1 / where[c.argmax()]:.1f} Å, {c.mean():+.3f} in the mean, "
        f"{int((c > 0.143).sum())} of {len(c)} shells above 0.143"
        for name, c in curves.items()
    )
    iterations = len(read_json(home / run / "run.json")["state"]["iterations"])
    return (
        f"noise  {count} particles, box {data.box} at {data.pixel_size:g} Å: claims {told['resolution']:.2f} Å after "
        f"{iterations} iterations from {START:g} Å; FSC beyond that: {said}; {cost.seconds / count:.3f} CPU-s each, "
        f"{cost.wall:.0f} s, {cost.memory:.0f} MB"
    )


def junk(folder: Path, data: Data, threads: int, more: list[str] | None) -> str:
    """How many false picks a refinement rejects, and how many true ones; its resolution with and without rejection, and that
    of a refinement of the true ones alone; `more` as in `scored`.
    """
    home = made(folder, data)
    truth, name = true_poses(home, data), junk_set(home, data)
    perfect = oracle_set(home, data, truth)
    averaged(home, perfect)
    oracle = likeness(home, f"average_{perfect}", data, STILL).resolution
    runs = {
        "rejecting": (f"junk{data.box}", name, []),
        "--keep 1": (f"junk_all{data.box}", name, ["--keep", "1"]),
        "true ones alone": (f"junk_none{data.box}", start_set(home, data), []),
    }
    known, told = set(truth.ids), []
    for run, (path, source, options) in runs.items():
        if more is not None:
            refined(home, source, path, threads, [*options_of("junk", home), *options, *more])
        particles = [p for file in records.load_particles(path, home)[1].values() for p in file.particles if p.use]
        kept = [p.id for p in particles if p.weight != 0]
        genuine = [i for i in kept if i in known]
        found = Poses.of(path, home).among(genuine)
        motion = common_motion(found, truth.among(genuine))
        angle = rotation_distance(found.rotation, truth.among(genuine).rotation @ motion.turn)
        reached = likeness(home, path, data, motion).resolution
        count = sum(p.id in known for p in particles)
        lost = len(particles) - count - (len(kept) - len(genuine))
        told.append(
            f"{run}: {lost} of {len(particles) - count} false and {count - len(genuine)} of {count} true ones out, "
            f"{int((angle < RIGHT).sum())} of the true within {RIGHT:g}°, {reached:.2f} Å, {reached / oracle:.3f} of the oracle"
        )
    return "\n       ".join([f"junk   box {data.box} at {data.pixel_size:g} Å, oracle {oracle:.2f} Å", *told])


def other_fsc(tool: Path, home: Path, run: str, data: Data, motion: Motion) -> str:
    """Where the FSC with the true map falls below 0.5 as another program sees it, which aligns the maps itself.

    Raises:
        RuntimeError: with its mask, a sphere with a logistic edge, this one finds something else.
    """
    density, pixel_size = home / run / "average.mrc", data.pixel_size
    radius = 0.4 * data.box * pixel_size
    argv = [sys.executable, str(tool), str(density), str(home / "raw/true.mrc"), f"--mask-radius={radius:g}", "--json"]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)["resolution"]
    mask = torch.sigmoid((radius - pixel_size * centred_radius((data.box,) * 3)) / (2 * pixel_size)).float()
    truth = in_frame(project.read_map(home / "raw/true.mrc", data.box, pixel_size), motion, pixel_size)
    own = map_agreement(torch.from_numpy(mrc.read_volume(density)[0]), truth, pixel_size, mask).resolution
    if abs(own / told - 1) > AGREED:
        raise RuntimeError(f"{run}: {tool.name} says {told:.2f} Å, this program {own:.2f} Å")
    return f"{run}: {tool.name} says {told:.2f} Å at 0.5 within {radius:g} Å, this program {own:.2f} Å"


DEFAULTS = {"whole": (400, 96, 3.0), "noise": (400, 96, 3.0), "search": (400, 64, 4.5), "local": (400, 64, 4.5),
            "time": (200, 64, 4.5), "junk": (200, 64, 4.5)}  # fmt: skip
"""Particles, box and Å of a pixel of each mode. At 4.5 Å the resolution ends at 9 Å, which the oracle of 400 reaches: there
the poses are to be compared."""


def main() -> None:
    """One line for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where data and runs are kept")
    parser.add_argument("--mode", nargs="+", choices=DEFAULTS, default=["whole"])
    parser.add_argument("--particle", default="emc", metavar="emc|MAP")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="true particles in all (default: 400; time, junk: 200)")
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--box", type=int, help="pixels (default: 96; search, local, time, junk: 64)")
    parser.add_argument("--pixel-size", type=float, help="Å (default: 3; search, local, time, junk: 4.5)")
    parser.add_argument("--motion", type=float, default=0.5, help="Å rms between exposures")
    parser.add_argument("--threads", type=int, help="of emc_refine (default: 1; time: 2)")
    parser.add_argument("--refine", type=shlex.split, default=[], metavar="WORDS", help="more options of emc_refine")
    parser.add_argument("--rescore", action="store_true", help="compare the runs that are there, and refine nothing")
    parser.add_argument("--other", type=Path, metavar="PROGRAM", help="another program that compares two maps")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results, headed = folder / "results.json", False
    for mode in args.mode:
        count, box, pixel_size = DEFAULTS[mode]
        data = Data(
            args.particle, args.count or count, args.series, args.box or box, args.pixel_size or pixel_size, args.motion,
            args.seed,
        )  # fmt: skip
        threads = args.threads or (2 if mode == "time" else 1)
        more = None if args.rescore else args.refine
        if mode in ("noise", "junk"):
            print((noise if mode == "noise" else junk)(folder, data, threads, more), flush=True)
            continue
        if not headed:
            print(HEAD)
            headed = True
        row, motion = scored(folder, mode, data, threads, more)
        print(line(row), flush=True)
        if not args.rescore:
            before = json.loads(results.read_text()) if results.exists() else []
            results.write_text(json.dumps([*before, asdict(row)], indent=1) + "\n")
        if args.other:
            home, oracle, run = folder / data.folder, f"average_oracle{data.box}", f"{mode}{data.box}"
            for which, frame in ((oracle, STILL), (run, motion)):
                print(other_fsc(args.other, home, which, data, frame), flush=True)


if __name__ == "__main__":
    main()
