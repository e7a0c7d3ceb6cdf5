#!/usr/bin/env python3
"""What a refinement of the images' own parameters is worth: emc_subtilt and emc_tomocpr beside emc_refine, and the truth.

    python benchmarks/tiltseries.py FOLDER --mode motion --seeds 1 2 3   # specimens that move, records that are a little wrong
    python benchmarks/tiltseries.py FOLDER --mode still                  # nothing is wrong: nothing may get worse
    python benchmarks/tiltseries.py FOLDER --mode crowded                # two kinds of particle, in each other's way
    python benchmarks/tiltseries.py FOLDER --mode chain --data DATA      # from the raw stacks of DATA/sim alone
    python benchmarks/tiltseries.py FOLDER --steps 2 --subtilt "--iterations 1"   # emc_subtilt again, the rest as it is

Particles start as in refinement.py: positions off by 5 Å rms along each axis, turned anyhow, the true map known to 50 Å. The
record's alignment has the nominal angles and errors in the shifts, its CTF has errors in the defocus, each tilt its own.
Steps: 0 the oracle, the average of the same images at what is true of each (position, rotation, angle, defocus), and `none`,
at true poses with the record's alignment and CTF; 1 emc_refine, with and without paths of particles; 2 emc_subtilt; 3
emc_tomocpr. `--steps` names those to be run; what an earlier call has left of the others is compared as it is.

Of each run: where the FSC of its half maps' mean with the true map falls below 0.5, over that of emc_refine and of the
oracle; what it claims, and whether the truth confirms it. `at` is where an image shows its particle, Å rms along each axis
against the truth, over all images; `path` the same without the best constant offset of each particle; then both weighted by
what the dose has left of detail of 10 Å. `defocus` is its error, Å rms: the mean of each tilt, and of all images. `turn` is by
how many degrees an image's orientation is off, rms of those within 5°; `tilt` the error of the tilt angles, rms, without its
mean over the series. `ms` are CPU-ms for each image and iteration. The motion of the specimen as a whole, and that of the
reference, are left out of all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import refinement
import torch
from commands import Parameters, program
from refinement import DETAIL, RIGHT, STILL, Likeness, Motion, Poses, averaged, likeness
from torch import Tensor

from libemc import comparison, records
from libemc.io import mrc
from libemc.io.files import read_json
from libemc.io.truth import read_truth
from libemc.methods import phantom
from libemc.methods.extract import GEOMETRY
from libemc.methods.subtilts import Particles, TiltGeometry
from libemc.numerics.dose import exposure_filter
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance, tilt_matrices
from libemc.records import Alignment

TILTS = 41
"""Images of a simulated tilt series."""
CHAIN = ("conf_01", "conf_02")
"""Tilt series of known particles that come with the data."""
KNOWN_TO = 40.0
"""Å: to which the map of the chain's template is known."""
REACH = 60.0
"""Å: a pick that is farther from every particle is none of them."""
STRAY = 3.0
"""Of the median distance: what is farther off takes no part in the motion of the specimen."""


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data(refinement.Data):
    """What is simulated, and how wrong its records are.

    Attributes:
        motion_range: Å over which neighbours move together.
        tilt_error: degrees rms by which the true angles are off the nominal ones, which the record has.
        shift_error, defocus_error: Å rms in each tilt of the record, of both shifts, and of the defocus.
        second: another kind of particle, as many, named as `particle` is; None: there is none.
        distance: least distance of two particles in Å; None: as emc_simulate has it.
    """

    motion_range: float = 0.0
    tilt_error: float = 0.0
    shift_error: float = 0.0
    defocus_error: float = 0.0
    second: str | None = None
    distance: float | None = None

    @property
    def folder(self) -> str:
        """Name of the project."""
        kinds = "_".join(Path(kind).stem for kind in (self.particle, self.second) if kind)
        wrong = f"motion{self.motion:.2f}_{self.motion_range:g}" if self.motion else "still"
        return f"{kinds}_{self.count}in{self.series}_{self.pixel_size:g}A_{wrong}_seed{self.seed}"

    def simulated(self, number: int) -> Parameters:
        """Options of emc_simulate for one series, and notes of what is wrong with its record."""
        options = super().simulated(number) | {"motion-range": self.motion_range, "tilt-error": self.tilt_error}
        if self.second is not None:
            kinds, given = [self.particle, self.second], ("particle", "map")
            options = {key: value for key, value in options.items() if key not in given}
            options["particle" if set(kinds) <= set(phantom.VARIANTS) else "map"] = kinds
        if self.distance is not None:
            options["distance"] = self.distance
        return options | {"_shift_error": self.shift_error, "_defocus_error": self.defocus_error}


@dataclass(frozen=True)
class Given(Data):
    """Series that come with the data."""

    @property
    def folder(self) -> str:
        """Name of the project."""
        return "chain"

    @property
    def names(self) -> list[str]:
        """Of the tilt series."""
        return list(CHAIN)


def wrong(record: records.TiltSeriesRecord, data: Data, number: int) -> records.TiltSeriesRecord:
    """A record with picks to start from, nominal angles, and shifts and defocus that are off."""
    g = torch.Generator().manual_seed(1000 * data.seed + number + 500)
    a, c, count = records.need(record, "alignment"), records.need(record, "ctf"), len(record.tilts.nominal)
    x, y = data.shift_error * torch.randn(2, count, generator=g, dtype=torch.float64)
    z = data.defocus_error * torch.randn(count, generator=g, dtype=torch.float64)

    def off(values: tuple[float, ...], errors: Tensor) -> tuple[float, ...]:
        return tuple((torch.tensor(values, dtype=torch.float64) + errors).tolist())

    alignment = {"tilt": record.tilts.nominal, "shift_x": off(a.shift_x, x), "shift_y": off(a.shift_y, y)}
    ctf = {"defocus_u": off(c.defocus_u, z), "defocus_v": off(c.defocus_v, z)}
    changed = {"alignment": a.model_copy(update=alignment), "ctf": c.model_copy(update=ctf)}
    return refinement.scrambled(record, data.seed, number).model_copy(update=changed)


def some_of(home: Path, data: Data, name: str, ids: set[str]) -> str:
    """A set of some of the particles to start from; their images stay where they are."""
    if (home / f"particles/{name}/particles.json").exists():
        return name
    head, files = records.load_particles(refinement.start_set(home, data), home)
    mine = {}
    for series, file in files.items():
        placed = zip(file.particles, records.image_places(file), strict=True)
        some = tuple(p.model_copy(update={"image": place}) for p, place in placed if p.id in ids)
        mine[series] = file.model_copy(update={"set": name, "history": (), "particles": some})
    records.save_particles(f"particles/{name}", head.model_copy(update={"set": name, "history": ()}), mine, home)
    return name


# ---------------------------------------------------------------------------------------------------------------- truth


@dataclass(frozen=True)
class Truth:
    """What is true of the particles of a tilt series, N of them.

    Attributes:
        place: (N, T, 2) Å from the image centre; defocus: (N, T) Å.
        matrices: (T, 3, 3) specimen to image; tilt: (T,) degrees.
        weight: (T,) power that the dose leaves of `DETAIL`.
    """

    place: Tensor
    defocus: Tensor
    matrices: Tensor
    tilt: Tensor
    weight: Tensor

    @staticmethod
    def of(file: Path, shape: tuple[int, int, int]) -> Truth:
        """From a truth file; shape of the raw stack."""
        known, data = read_truth(file), read_json(file)
        axis, tilt, xtilt = (torch.from_numpy(getattr(known.alignment, key)) for key in ("axis", "tilt", "xtilt"))
        centre = torch.tensor([shape[2] // 2, shape[1] // 2])
        dose = torch.from_numpy(known.dose * (known.order + 1.0))
        return Truth(
            place=(torch.tensor(data["pos2d_px"], dtype=torch.float64) - centre) * known.pixel_size,
            defocus=torch.tensor(data["particle_defocus"], dtype=torch.float64),
            matrices=tilt_matrices(axis, tilt, xtilt),
            tilt=tilt,
            weight=exposure_filter(torch.tensor(1 / DETAIL, dtype=torch.float64), dose, known.voltage) ** 2,
        )


@dataclass(frozen=True)
class Known:
    """The truth of a project.

    Attributes:
        series: by name; poses: of all particles, in the true frame, by series and number.
        number: of each particle in the project: its id to that in `poses`. Others are none.
    """

    series: dict[str, Truth]
    poses: Poses
    number: dict[str, str]


def known_of(home: Path, data: Data, number: dict[str, str] | None = None) -> Known:
    """The truth of a project; `number` None: the ids are the true ones."""
    poses = refinement.true_poses(home, data)
    shapes = {name: records.load_tiltseries(name, home).source.shape for name in data.names}
    series = {name: Truth.of(home / f"raw/{name}_truth.json", shape) for name, shape in shapes.items()}
    return Known(series, poses, number or {i: i for i in poses.ids})


# --------------------------------------------------------------------------------------------------------------- scores


def specimen_motion(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation (3, 3) and shift (3,), Å, that take true positions (N, 3) nearest to those found."""
    near = torch.ones(len(found)).bool()
    turn, shift = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        a, b = true[near].mean(0), found[near].mean(0)
        u, _, vh = torch.linalg.svd((found[near] - b).T @ (true[near] - a))
        turn = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.linalg.det(u @ vh))], dtype=torch.float64)) @ vh
        shift = b - turn @ a
        away = (found - true @ turn.T - shift).norm(dim=1)
        near = away <= STRAY * away.median() + 1e-6
    return turn, shift


@dataclass(frozen=True)
class Errors:
    """Of a run; see the head of this file.

    Attributes:
        particles, images: those used. right: share of the particles within `RIGHT`; angle: median, degrees.
        at, path: Å, as it is and weighted. defocus: Å, of tilts and of images. turn, tilt: degrees.
    """

    particles: int
    images: int
    right: float
    angle: float
    at: tuple[float, float]
    path: tuple[float, float]
    defocus: tuple[float, float]
    turn: float
    tilt: float


def rms(values: Tensor, weight: Tensor | None = None) -> float:
    """Root of the (weighted) mean square."""
    weight = torch.ones_like(values) if weight is None else weight.expand_as(values)
    return float(((weight * values**2).sum() / weight.sum()).sqrt())


def compared(home: Path, set_or_run: str, known: Known) -> tuple[Errors, Motion]:
    """How far a run's parameters are from the truth, and how its reference lies in the true frame."""
    series = []  # particles, those of them that are used and true, their true poses, and these in the frame of the run
    for name, file in records.load_particles(set_or_run, home)[1].items():
        p = Particles.of(file, None)
        mine = [k for k, q in enumerate(file.particles) if q.use and p.weight[k] > 0 and q.id in known.number]
        true = known.poses.among([known.number[file.particles[k].id] for k in mine])
        turn, shift = specimen_motion(p.xyz[mine], true.xyz)
        moved = Poses(true.ids, turn @ true.rotation, true.xyz @ turn.T + shift)
        series.append((known.series[name], p, mine, true, moved))
    found = Poses(
        [], *(torch.cat([getattr(p, what)[mine] for _, p, mine, *_ in series]) for what in ("rotation", "xyz"))
    )
    there = Poses([], *(torch.cat([getattr(moved, what) for *_, moved in series]) for what in ("rotation", "xyz")))
    motion = refinement.common_motion(found, there)
    angle = rotation_distance(found.rotation, there.rotation @ motion.turn)
    each = [image_errors(*one, motion) for one in series]
    of = {key: torch.cat([errors[key] for errors in each]) for key in each[0]}
    weight = of["weight"][:, None]
    errors = Errors(
        particles=len(angle),
        images=len(weight),
        right=int((angle < RIGHT).sum()) / len(angle),
        angle=float(angle.median()),
        at=(rms(of["at"]), rms(of["at"], weight)),
        path=(rms(of["path"]), rms(of["path"], weight)),
        defocus=(rms(of["defocus_of_tilts"]), rms(of["defocus"])),
        turn=rms(of["turn"][of["turn"] < RIGHT]),
        tilt=rms(of["tilt"]),
    )
    return errors, motion


def image_errors(
    truth: Truth, p: Particles, mine: list[int], true: Poses, moved: Poses, motion: Motion
) -> dict[str, Tensor]:
    """Errors of the images of some particles of a series, M in all.

    Args:
        true: their true poses; moved: the same in the frame of the run; motion: of its reference.

    Returns:
        at, path: (M, 2) Å; defocus: (M,) Å; turn: (M,) degrees; weight: (M,); and of the tilts that show any,
        defocus_of_tilts in Å and tilt in degrees.
    """
    s, own, raw, shown = p.series, p.corrections, p.file.raw, p.shown[mine]
    assert raw is not None, "the particles are cut from the raw images"
    who = [int(i.split(".")[1]) for i in true.ids]
    cut_by = TiltGeometry.of(Alignment(**{key: getattr(raw, key) for key in GEOMETRY}), p.file.tilts.use)
    rows = s.magnification[:, None, None] * s.matrices[:, :2]
    q = torch.einsum("tij,nj->nti", s.matrices, (p.xyz - p.centre)[mine])
    at = cut_by.project(p.centre[mine])[0] + s.magnification[:, None] * (q[..., :2] + own.shift[mine])
    at = at - truth.place[who] - torch.einsum("tai,ni->nta", rows, moved.rotation @ motion.shift)
    weight = shown * truth.weight
    normal = torch.einsum("nt,tai,taj->nij", weight, rows, rows)
    offset = torch.linalg.lstsq(normal, torch.einsum("nt,tai,nta->ni", weight, rows, at)[..., None]).solution[..., 0]
    defocus = p.defocus[mine] + own.defocus[mine] + s.handedness * q[..., 2] - truth.defocus[who]
    seen = shown.any(0)
    angles = torch.tensor(p.file.tilts.tilt, dtype=torch.float64)
    off = [(sign * angles - truth.tilt)[seen] for sign in (1, -1)]  # the axis may point the other way
    shows = matrix_from_rotvec(own.turn[mine]) @ s.matrices @ p.rotation[mine][:, None]
    return {
        "at": at[shown],
        "path": (at - torch.einsum("tai,ni->nta", rows, offset))[shown],
        "defocus": defocus[shown],
        "turn": rotation_distance(shows, truth.matrices @ (true.rotation @ motion.turn)[:, None])[shown],
        "weight": weight[shown],
        "defocus_of_tilts": (defocus.where(shown, 0 * defocus).sum(0) / shown.sum(0))[seen],
        "tilt": min((o - o.mean() for o in off), key=rms),
    }


@dataclass(frozen=True)
class Row:
    """What a run, or an average, has come to.

    Attributes:
        errors: None of the oracle, which has none.
        gain, oracle: resolution over that of emc_refine and of the oracle; NaN where they are not there.
        iterations, seconds, memory, wall: of the program, as the run's history says; CPU seconds, MB, seconds.
    """

    mode: str
    data: str
    run: str
    likeness: Likeness
    errors: Errors | None
    gain: float
    oracle: float
    iterations: int = 0
    seconds: float = math.nan
    memory: float = math.nan
    wall: float = math.nan


HEAD = (
    "run                  FSC .5 /refine /oracle  claims confirmed ratio |  <5° median |   at  path, weighted: at  path | "
    "defocus: tilts images |  turn   tilt | iter    ms    MB  wall-s"
)


def line(r: Row) -> str:
    """A row of the table."""
    f, e = r.likeness, r.errors
    text = (
        f"{r.run:20s} {f.resolution:6.2f} {r.gain:7.3f} {r.oracle:7.3f} {f.claimed:7.2f} {f.confirmed:9.2f} "
        f"{f.claimed / f.confirmed:5.3f} |"
    )
    if e is None:
        return text
    text += (
        f" {100 * e.right:4.0f} {e.angle:5.2f}° | {e.at[0]:4.2f} {e.path[0]:5.2f} {e.at[1]:13.2f} {e.path[1]:5.2f} | "
        f"{e.defocus[0]:14.0f} {e.defocus[1]:6.0f} | {e.turn:5.2f}° {e.tilt:.3f}° |"
    )
    each = 1000 * r.seconds / (e.images * max(r.iterations, 1))
    return text + f" {r.iterations:4d} {each:5.1f} {r.memory:5.0f} {r.wall:7.0f}" if r.iterations else text


@dataclass(frozen=True)
class Bench:
    """A project with its truth, and what is to be done in it.

    Attributes:
        args: of the command line.
        true: the true map of the particles that are compared; oracle: resolution that their images allow.
    """

    mode: str
    args: argparse.Namespace
    home: Path
    data: Data
    known: Known
    true: str = refinement.TRUE
    oracle: float = math.nan

    def run(self, step: int, name: str, argv: list[str]) -> None:
        """One program, into a folder of this name, if its step is to be done."""
        if step in self.args.steps:
            shutil.rmtree(self.home / name, ignore_errors=True)
            more = getattr(self.args, argv[0].removeprefix("emc_"))
            standard = ["--path", name, "--overwrite", "--quiet", "--threads", str(self.args.threads)]
            program([*argv, *more, *standard], self.home, self.home / "log", self.args.threads)

    def average(self, name: str) -> str:
        """The folder of the average of a set, which is made if it isn't there or step 0 is to be done."""
        if 0 in self.args.steps or not (self.home / f"average_{name}/fsc.json").exists():
            averaged(self.home, name)
        return f"average_{name}"

    def resolved(self, oracle: str) -> tuple[Bench, Row]:
        """With the resolution of an average that nothing is wrong with, and its row."""
        like = likeness(self.home, oracle, self.data, STILL, self.true)
        b = replace(self, oracle=like.resolution)
        return b, Row(b.mode, b.data.folder, "oracle", like, None, math.nan, 1.0)

    def row(self, run: str, first: Row | None = None, particles: str | None = None) -> Row:
        """A run compared with the truth.

        Args:
            first: that of emc_refine.
            particles: those of an average; None: the run's own.
        """
        errors, motion = compared(self.home, particles or run, self.known)
        like = likeness(self.home, run, self.data, motion, self.true)
        gain, over = like.resolution / first.likeness.resolution if first else math.nan, like.resolution / self.oracle
        row = Row(self.mode, self.data.folder, run, like, errors, gain, over)
        own = self.home / run
        note, sets = own / "run.json", 1
        if not note.exists():  # a run of several sets has it beside their folders
            note, sets = own.parent / "run.json", len(list(own.parent.glob("*/particles")))
        if particles or not note.exists():
            return row
        record = records.load(note, records.Run)
        last, count = record.history[-1], len(record.state.get("iterations", []))
        seconds, memory = (last.cpu_seconds or math.nan) / sets, (last.peak_memory or math.nan) / 1e6
        return replace(row, iterations=count, seconds=seconds, memory=memory, wall=last.wall_seconds or math.nan)

    def table(self, runs: list[str], first: str = "refine") -> list[Row]:
        """The rows of those runs that have come to their end, printed; `first` is that of emc_refine."""
        rows: dict[str, Row] = {}
        for run in runs:
            if (self.home / run / "fsc.json").exists():
                rows[run] = self.row(run, rows.get(first))
                print(line(rows[run]), flush=True)
        return list(rows.values())


# ---------------------------------------------------------------------------------------------------------------- modes


def refined(b: Bench, start: str, reference: list[str]) -> list[Row]:
    """A set refined by one program after the other."""
    b.run(1, "refine", ["emc_refine", start, *reference])
    b.run(1, "refine_still", ["emc_refine", start, *reference, "--no-motion"])
    b.run(2, "subtilt", ["emc_subtilt", "refine"])
    b.run(3, "cpr", ["emc_tomocpr", "refine", "--no-record"])
    if b.args.after:
        b.run(3, "cpr_after", ["emc_tomocpr", "subtilt", "--no-record"])
    return b.table(["refine", "refine_still", "subtilt", "cpr", "cpr_after"])


def simulated(b: Bench) -> list[Row]:
    """The modes `motion` and `still`."""
    start = refinement.start_set(b.home, b.data)
    b, oracle = b.resolved(b.average(refinement.oracle_set(b.home, b.data, b.known.poses)))
    none = refinement.set_at(b.home, start, f"none{b.data.box}", b.known.poses)
    rows = [oracle, replace(b.row(b.average(none), particles=none), run="none")]
    print("\n".join(map(line, rows)), flush=True)
    return rows + refined(b, start, refinement.options_of("whole", b.home))


def crowded(b: Bench) -> list[Row]:
    """Two kinds of particle, each refined by itself, then both together, with and without what they add to one another."""
    kinds, classes = [], [k for n in b.data.names for k in read_truth(b.home / f"raw/{n}_truth.json").classes.tolist()]
    for k in (0, 1):
        ids = {i for i, kind in zip(b.known.poses.ids, classes, strict=True) if kind == k}
        start = some_of(b.home, b.data, f"start{b.data.box}_{k + 1}", ids)
        own = replace(b, true=f"raw/true_{k + 1}.mrc")
        perfect = refinement.oracle_set(b.home, b.data, b.known.poses, start)
        kinds.append((*own.resolved(own.average(perfect)), start, f"refine_{k + 1}"))
        options = refinement.options_of("whole", b.home, own.true)
        b.run(1, f"refine_{k + 1}", ["emc_refine", start, *options])
    b.run(3, "cpr", ["emc_tomocpr", "refine_1", "refine_2", "--no-record"])
    b.run(3, "cpr_alone", ["emc_tomocpr", "refine_1", "refine_2", "--no-record", "--alone"])
    told = []
    for own, oracle, start, first in kinds:
        print(line(oracle), flush=True)
        rows = own.table([first, f"cpr_alone/{first}", f"cpr/{first}"], first)
        told += [oracle, *rows]
        if len(rows) == 3:
            alone, both = (row.likeness.resolution for row in rows[1:])
            print(f"{start}: with all neighbours {both / alone:.3f} of the resolution of each alone")
    return told


def laid_out(home: Path, given: Path) -> Path:
    """A project with the given stacks, their truth, and the true map, as a simulation of ours has them."""
    (home / "raw").mkdir(parents=True, exist_ok=True)
    for file in (f for name in CHAIN for f in sorted((given / "sim").glob(f"{name}*"))):
        (home / "raw" / file.name).unlink(missing_ok=True)
        (home / "raw" / file.name).symlink_to(file)
    density, pixel_size = mrc.read_volume(given / "maps/splice_3A.mrc")
    mrc.write_volume(home / refinement.TRUE, density.astype(np.float32), pixel_size)
    program(["emc_import", *(f"raw/{name}.mrc" for name in CHAIN), "--overwrite", "--quiet"], home, home / "log")
    return home


def chain(folder: Path, data: Data, args: argparse.Namespace) -> list[Row]:
    """From the raw stacks to the last average; the oracle is that of the particles that are found."""
    ideal, given = folder / "chain_truth", args.data.resolve()
    if not (ideal / f"particles/start{data.box}/particles.json").exists():
        laid_out(ideal, given)
        for name in CHAIN:
            truth = f"raw/{name}_truth.json"
            program(["emc_import", "--alignment", truth, name, "--quiet"], ideal, ideal / "log")
            program(["emc_import", "--picks", truth, "--label", "start", name, "--quiet"], ideal, ideal / "log")
    best = Bench("chain", args, ideal, data, known_of(ideal, data))
    home, start, template = folder / "chain", f"start{data.box}", "true_40A.mrc"
    if not (home / f"particles/{start}/particles.json").exists():
        laid_out(home, given)
        refinement.known_to(home, KNOWN_TO)
        for argv in (
            ["emc_tomogram", "--all", "--align-only"],
            ["emc_tomoctf", "--all"],
            ["emc_tempmatch", "--all", "--template", template, "--label", "start"],
            ["emc_extract", "--all", "--label", "start", "--set", start, "--box", str(data.box)],
        ):
            cost = program([*argv, "--quiet", "--threads", str(args.threads)], home, home / "log", args.threads)
            print(f"{argv[0]}: {cost.seconds:.0f} CPU-s, {cost.memory:.0f} MB", flush=True)
    truths = {name: home / f"raw/{name}_truth.json" for name in CHAIN}
    for name, truth in truths.items():
        off = comparison.alignment_error(name, truth, home), comparison.defocus_error(name, truth, home)
        print(f"{name}: alignment {off[0].rms:.1f} Å rms, {off[0].median:.1f} median; defocus {off[1]:.0f} Å rms")
    pairs = comparison.pose_errors(start, truths, REACH, None, home)
    ids = [p.id for file in records.load_particles(start, home)[1].values() for p in file.particles if p.use]
    true = best.known.poses.ids
    number = {ids[i]: true[j] for i, j in zip(pairs.found.tolist(), pairs.true.tolist(), strict=True)}
    there = some_of(ideal, data, f"{start}_{len(number)}", set(number.values()))
    best, oracle = best.resolved(best.average(refinement.oracle_set(ideal, data, best.known.poses, there)))
    print(f"{len(ids)} particles found, {len(number)} of them right, of {len(true)}\n{line(oracle)}", flush=True)
    b = Bench("chain", args, home, data, known_of(home, data, number), oracle=best.oracle)
    return [oracle, *refined(b, start, ["--reference", template, "--startres", f"{KNOWN_TO:g}"])]


def kinds_of(folder: Path, names: list[str], box: int, pixel_size: float) -> list[str]:
    """Kinds of particle as emc_simulate takes them: all built-in ones, or all files."""
    if set(names) <= set(phantom.VARIANTS):
        return names
    for name in set(names) & set(phantom.VARIANTS):
        density = phantom.density(phantom.particle(name), box, pixel_size)
        mrc.write_volume(folder / f"{name}.mrc", density.numpy(), pixel_size)
    return [str(folder / f"{n}.mrc") if n in phantom.VARIANTS else str(Path(n).resolve()) for n in names]


def one(folder: Path, mode: str, seed: int, args: argparse.Namespace) -> list[Row]:
    """A table: that of one seed."""
    shape = (args.box or (120 if mode == "chain" else 96), args.pixel_size)
    if mode == "chain":
        print(f"{mode}\n{HEAD}", flush=True)
        return chain(folder, Given("splice", 0, len(CHAIN), *shape, 0.0, seed), args)
    several = mode == "crowded"
    series, count = args.series or (2 if several else 4), args.count or (300 if several else 60)
    kinds = kinds_of(folder, [args.particle, *([args.second] if several else [])], *shape)
    data = Data(kinds[0], count * series, series, *shape, 0.0, seed)
    if mode != "still":
        data = replace(
            data, motion=args.travel / math.sqrt(TILTS), motion_range=args.range, tilt_error=args.tilt_error,
            shift_error=args.shift_error, defocus_error=args.defocus_error,
        )  # fmt: skip
    if several:
        data = replace(data, second=kinds[1], distance=args.distance)
    home = refinement.made(folder, data, lambda record, _, number: wrong(record, data, number))
    print(f"{mode} {home.name}\n{HEAD}", flush=True)
    b = Bench(mode, args, home, data, known_of(home, data))
    return crowded(b) if several else simulated(b)


def main() -> None:
    """A table for each seed of each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where data and runs are kept")
    parser.add_argument("--mode", nargs="+", choices=("motion", "still", "crowded", "chain"), default=["motion"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the simulations")
    parser.add_argument("--steps", type=int, nargs="*", choices=range(4), default=[0, 1, 2, 3], help="those to be run")
    parser.add_argument("--after", choices=("subtilt",), help="emc_tomocpr also after this")
    parser.add_argument("--particle", default="emc", metavar="emc|MAP")
    parser.add_argument("--second", default="emc-nohead", metavar="emc-...|MAP", help="crowded: the other kind")
    parser.add_argument("--count", type=int, help="particles of a tilt series (default: 60; crowded: 300)")
    parser.add_argument("--series", type=int, help="tilt series (default: 4; crowded: 2)")
    parser.add_argument("--box", type=int, help="pixels (default: 96; chain: 120)")
    parser.add_argument("--pixel-size", type=float, default=3.0, help="Å")
    parser.add_argument("--travel", type=float, default=6.0, help="Å rms along each axis, after all exposures")
    parser.add_argument("--range", type=float, default=400.0, help="Å over which neighbours move together")
    parser.add_argument("--tilt-error", type=float, default=0.15, help="degrees rms")
    parser.add_argument("--shift-error", type=float, default=2.0, help="Å rms along each axis")
    parser.add_argument("--defocus-error", type=float, default=300.0, help="Å rms")
    parser.add_argument("--distance", type=float, default=200.0, help="crowded: Å between two particles at least")
    parser.add_argument("--data", type=Path, help="chain: the folder that holds sim/ and maps/")
    parser.add_argument("--threads", type=int, default=1, help="of the programs")
    for name in ("refine", "subtilt", "tomocpr"):
        parser.add_argument(
            f"--{name}", type=shlex.split, default=[], metavar="WORDS", help=f"more options of emc_{name}"
        )
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for mode in args.mode:
        if mode == "chain" and args.data is None:
            parser.error("--mode chain needs --data")
        told = [one(folder, mode, seed, args) for seed in ([1] if mode == "chain" else args.seeds)]
        results = folder / "results.json"
        before = json.loads(results.read_text()) if results.exists() else []
        told_now = json.loads(json.dumps([asdict(row) for rows in told for row in rows]), parse_constant=lambda _: None)
        results.write_text(json.dumps(before + told_now, indent=1) + "\n")
        for run in dict.fromkeys(row.run for rows in told for row in rows if not math.isnan(row.gain)):
            gains = [row.gain for rows in told for row in rows if row.run == run and not math.isnan(row.gain)]
            mean = math.exp(sum(map(math.log, gains)) / len(gains))
            print(f"{mode}: {run} {mean:.3f} of emc_refine's resolution ({', '.join(f'{g:.3f}' for g in gains)})")


if __name__ == "__main__":
    main()
