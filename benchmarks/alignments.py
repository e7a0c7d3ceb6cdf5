#!/usr/bin/env python3
"""Alignments of simulated tilt series with random everything, judged by their truth.

Every second series has gold beads. All else is drawn too, from SEED and the series' number alone: sizes, angles, order,
axis, hand, doses, defocus, specimen, drift, errors of the stage, spoilt and missing images, type of the pixels. What can be
asked of an alignment is bounded: in its most tilted image a series has `LEAST_FLUX` electrons per Å² behind the ice, and
without beads it has `LEAST_COUNT` particles in the field or more, whose power over that of the counting noise is
`LEAST_EVIDENCE` for all together and `LEAST_EACH` for one.
The particles go on beyond the field, as a specimen does. A series is imported with its angles and nothing else.

    python benchmarks/alignments.py FOLDER                              # 100 series: made, aligned, scored
    python benchmarks/alignments.py FOLDER --count 24 --generate-only   # NNN.mrc, .rawtlt, _truth.json and the drawn .json
    python benchmarks/alignments.py FOLDER --only 3,7 --stage coarse    # the coarse stage alone, from the library

An alignment's error is the rms distance, in pixels of the images, of points of the true slab from where they are seen, after
the rigid motion that fits best, of the better hand. FOLDER is kept: series that are there are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import Cost, Parameters, chosen, log_uniform, program, scored, words

from libemc import records
from libemc.methods import evaluate, phantom, simulate
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier, grids
from libemc.numerics.ctf import Optics, ctf
from libemc.numerics.rotations import tilt_matrices

LEAST_FLUX = 0.35  # e/Å²
LEAST_EVIDENCE = 1500.0  # summed power of the particles over that of the noise, in the most tilted image
LEAST_EACH = 25.0  # the same of one particle: five standard deviations, what an eye finds
LEAST_COUNT = 25  # particles in the field
DETAIL = 25.0  # Å: what is finer does not count as evidence, damage and motion take it
MOST_SECONDS = 7.0  # CPU time of a simulation, about
MOST_PARTICLES = 1500  # beyond the field too
WITHIN = {True: 1.0, False: 2.0}  # px rms: what counts as aligned, with beads and without
WRONG = 5.0  # px: a tilt that is farther off must be marked
VOLUME_SIDE = 64  # voxels of the tomogram's longer side, about: only the alignment is looked at


# -------------------------------------------------------------------------------------------------------------- drawing


@functools.lru_cache
def spectrum() -> torch.Tensor:
    """Power of a particle's contrast without a lens, (64, 33): its scattering is much the same from all sides."""
    density = phantom.density(phantom.particle(), 64, 6.0)
    contrast = torch.stack([density.sum(dim=k) for k in range(3)]) * 6.0 * 2 * simulate.interaction(300.0)
    return torch.fft.rfft2(contrast).abs().square().mean(dim=0) / 64**2 * 6.0**2  # Å², summed over the plane


def evidence(defocus: float, strength: float, flux: float) -> float:
    """Power of one particle's image over that of the counting noise, summed to `DETAIL`, for `flux` e/Å² behind the ice."""
    ky, kx = (k / (64 * 6.0) for k in grids.rfft_frequencies((64, 64)))
    mean, none = torch.tensor(defocus), torch.tensor(0.0)
    seen = ctf(kx, ky, mean, mean, none, none, Optics()) ** 2 * ((kx**2 + ky**2).sqrt() < 1 / DETAIL)
    weight = torch.full((33,), 2.0)
    weight[0] = weight[-1] = 1.0
    return float((spectrum() * seen * weight).sum()) * strength**2 * flux


def drawn_tilts(rng: np.random.Generator) -> tuple[float, float, float, list[int]]:
    """First, last, step, and the indices of images that are missing."""
    while True:
        reach, step = float(rng.uniform(40, 66)), float(rng.choice([1.5, 2.0, 2.0, 2.5, 3.0, 3.0, 3.0, 3.0, 3.0, 4.0]))
        low, high = -reach, reach
        if rng.random() < 0.3:  # one-sided
            low += float(rng.uniform(10, 40))
        if rng.random() < 0.5:
            low, high = -high, -low
        count = int((high - low) / step + 1e-6) + 1
        if 20 <= count <= 100:
            break
    first = round(low, 2)
    missing: set[int] = set()
    if rng.random() < 0.3:
        start, length = int(rng.integers(count)), int(rng.integers(1, 5))
        missing = {k for k in range(start, min(start + length, count)) if abs(first + k * step) > 5}
    if count - len(missing) < 20:
        missing = set()
    return first, round(first + (count - 1) * step, 2), step, sorted(missing)


def drawn_bad(rng: np.random.Generator, tilts: int) -> list[str]:
    """None to three spoilt images: INDEX:KIND."""
    where = rng.choice(tilts, size=int(rng.choice([0, 0, 1, 2, 3])), replace=False)
    return [f"{j}:{rng.choice(simulate.BAD_KINDS)}" for j in sorted(where)]


def drawn(seed: int, number: int) -> Parameters:
    """Everything about one series, as options of emc_simulate; keys with a leading underscore are notes.

    The same seed and number give the same series, whatever else is made.
    """
    rng = np.random.default_rng([seed, number])
    beads = number % 2 == 0
    pixel = 0.0
    while not 2.2 < pixel < 8:
        side = int(log_uniform(rng, 384, 720))
        pixel = round(log_uniform(rng, 2400, 5500) / side, 2)
    other = np.random.default_rng([seed, number, 1])
    if other.random() < 0.3:  # finer sampling than 600 pixels allow
        side = int(other.uniform(700, 960))
        pixel = round(float(other.uniform(2400, 3300)) / side, 2)
    longer = int(side * rng.choice([1.0, 1.0, rng.uniform(1.0, 1.5)]))
    even = rng.random() < 0.75  # most detectors have, after binning, sides that are products of small primes
    size = [fourier.good_size(n) if even else n for n in (min(longer, 1024), side)][:: int(rng.choice([-1, 1]))]
    area, short = [n * pixel for n in size], min(size) * pixel
    first, last, step, missing = drawn_tilts(rng)
    tilts = [t for j, t in enumerate(simulate.tilt_angles(first, last, step)) if j not in missing]
    slab = [round(float(rng.uniform(-8, 8)), 2) if rng.random() < 0.7 else 0.0 for _ in range(2)]
    dose = round(min(max(float(rng.uniform(50, 150)) / len(tilts), 1.0), 5.0), 2)
    highest = math.radians(min(max(map(abs, tilts)) + abs(slab[0]), 75))
    thickness, defocus = log_uniform(rng, 400, 2500), float(rng.uniform(15000, 60000))

    def flux() -> float:
        return dose * math.exp(-thickness / math.cos(highest) / simulate.MEAN_FREE_PATH)

    while flux() < LEAST_FLUX:
        thickness *= 0.9
    # as many particles as the time allows, between a few and a crowd
    strength, crowded = round(log_uniform(rng, 0.7, 1.5), 2), bool(rng.random() < 0.5)
    distance = float(rng.uniform(160, 200)) if crowded else float(rng.uniform(230, 260))
    thickness = max(thickness, 1.2 * distance)
    room = area[0] * area[1] * max(thickness - distance, 0.25 * distance)
    per_volume = log_uniform(rng, 0.04, 0.2) if crowded else log_uniform(rng, 0.004, 0.04)
    wanted = per_volume * room / (math.pi / 6 * distance**3)
    reach = simulate.wavelength(300.0) * (defocus + short / 2 * math.tan(highest)) / (2 * pixel**2)
    patch = (simulate.box_for(249.0, pixel) + 2 * reach) ** 2
    seconds = MOST_SECONDS - len(tilts) * simulate.SECONDS_PER_PIXEL * size[0] * size[1]
    most = max(seconds, 3.0) / len(tilts) / simulate.SECONDS_PER_PATCH_PIXEL / patch / 1.4
    if not beads:
        faintest = math.sqrt(LEAST_EACH / evidence(defocus, 1.0, flux()))
        strength = max(strength, math.ceil(100 * faintest) / 100)
    needed = max(LEAST_EVIDENCE / evidence(defocus, strength, flux()), LEAST_COUNT)
    inside = min(wanted, most)
    if not beads:
        inside = max(inside, needed)
    inside = max(min(inside, 0.25 * room / (math.pi / 6 * distance**3)), 3.0)
    beads_inside = int(rng.integers(4, 26)) if beads else 0
    # the specimen goes on as far as the images see, and the stage may move by a third of the field
    drift_ratio = log_uniform(rng, 0.003, 0.14)
    margin = short * (0.5 / math.cos(highest) - 0.5 + drift_ratio)
    margin = min(margin, short * (math.sqrt(MOST_PARTICLES / inside) - 1) / 2, 0.7 * short)
    more = math.prod(1 + 2 * margin / a for a in area)
    collective = rng.random() < 0.4
    p: Parameters = {
        "size": size,
        "pixel-size": pixel,
        "tilt-range": [first, last, step],
        "missing": missing,
        "order": str(rng.choice(simulate.ORDERS, p=[0.6, 0.2, 0.2])),
        "dose": dose,
        "axis": round(float(rng.uniform(-180, 180)), 2),
        "xtilt": round(float(rng.uniform(-2, 2)), 2) if rng.random() < 0.5 else 0.0,
        "axis-error": round(float(rng.uniform(0, 0.2)), 3),
        "tilt-error": round(float(rng.uniform(0, 0.3)), 3),
        "magnification-change": round(log_uniform(rng, 2e-4, 3e-3), 5) if rng.random() < 0.5 else 0.0,
        "jitter": round(log_uniform(rng, 1, 0.03 * short), 1) if rng.random() < 0.5 else 0.0,
        "bad": drawn_bad(rng, len(tilts)),
        "thickness": round(thickness, 0),
        "slab-tilt": slab,
        "margin": round(margin, 0),
        "count": round(inside * more),
        "distance": round(distance, 0),
        "strength": strength,
        "particle": [str(v) for v in rng.choice(phantom.VARIANTS, int(rng.integers(1, 4)), replace=False)],
        "motion": round(float(rng.uniform(0.1, 0.5)), 2),
        "motion-range": round(float(rng.uniform(0.3, 1.0)) * short, 0) if collective else 0.0,
        "beads": round(beads_inside * more),
        "bead-radius": round(float(rng.uniform(25, 75)), 1),
        "defocus": round(defocus, 0),
        "defocus-jitter": round(float(rng.uniform(0, 1500)), 0),
        "astigmatism": round(log_uniform(rng, 50, 2500), 0),
        "astigmatism-angle": round(float(rng.uniform(-90, 90)), 1),
        "handedness": int(rng.choice([-1, 1])),
        "mtf": round(float(rng.uniform(0.3, 1.0)), 2),
        "dtype": str(rng.choice(["int8", "int16", "float32", "float16"], p=[0.3, 0.4, 0.2, 0.1])),
        "seed": int(rng.integers(2**31)),
    }
    p["thickness"] = min(p["thickness"], 2500.0)
    p["drift"] = round(bounded_drift(p, len(tilts), tilts, drift_ratio * short), 2)
    p["_beads_in_field"], p["_particles_in_field"] = beads_inside, round(inside)
    p["_crowded"], p["_flux_least"] = crowded, round(flux(), 3)
    p["_evidence_least"] = round(inside * evidence(defocus, strength, flux()), 0)
    return p


def bounded_drift(p: Parameters, count: int, tilts: list[float], far: float) -> float:
    """Å from exposure to exposure, so that the stage ends `far` away, and nowhere beyond a third of the field."""
    drift = far / math.sqrt(count)
    empty = simulate.Specimen(particles=0, beads=0, thickness=500.0)
    stage = simulate.Acquisition(
        tuple(tilts), simulate.order_of_tilts(tilts, p["order"]), drift=drift, jitter=p["jitter"]
    )
    size = p["size"][1], p["size"][0]
    shift = np.abs(simulate.lay_out(stage, simulate.Imaging(), empty, size, p["pixel-size"], p["seed"]).shift)
    most = float((shift / (np.array(p["size"]) * p["pixel-size"])).max())
    return drift * min(1.0, 1 / 3 / most)


# ------------------------------------------------------------------------------------------------------------- programs


def name_of(number: int) -> str:
    """Of a series and its files."""
    return f"series_{number:03d}"


def make(folder: Path, seed: int, number: int) -> Parameters:
    """The series, unless it is there and made of the same numbers."""
    name, parameters = name_of(number), drawn(seed, number)
    note = folder / f"{name}.json"
    if note.exists() and (folder / f"{name}.mrc").exists():
        there = json.loads(note.read_text())
        if words(there) == words(parameters):
            return there
    note.unlink(missing_ok=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    argv = ["emc_simulate", name, *words(parameters), "--overwrite", "--quiet", "--threads", "1"]
    cost = program(argv, folder, log)
    (folder / f"{name}.mdoc").unlink()  # it would tell the axis
    log.unlink()
    parameters |= {"_seconds": round(cost.seconds, 1), "_memory": round(cost.memory)}
    note.write_text(json.dumps(parameters, indent=1) + "\n")
    return parameters


def aligned_by_program(folder: Path, number: int) -> tuple[records.TiltSeriesRecord, Cost]:
    """Import and emc_tomogram, in a project of its own."""
    name = name_of(number)
    project = folder / "runs" / name
    imported(folder, number)
    side = max(json.loads((folder / f"{name}.json").read_text())["size"])
    binning = max(4, round(side / VOLUME_SIDE))
    argv = ["emc_tomogram", name, "--align-only", "--bin", str(binning), "--quiet", "--threads", "1"]
    cost = program(argv, project, project / "log")
    return records.load_tiltseries(name, project), cost


def imported(folder: Path, number: int) -> None:
    """A fresh project that holds the record of one series."""
    name = name_of(number)
    project = folder / "runs" / name
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    pixel = json.loads((folder / f"{name}.json").read_text())["pixel-size"]
    argv = [
        "emc_import",
        f"../../{name}.mrc",
        "--rawtlt",
        f"../../{name}.rawtlt",
        "--pixel-size",
        str(pixel),
        "--quiet",
    ]
    program(argv, project, project / "log")


def aligned_coarsely(folder: Path, number: int) -> tuple[records.TiltSeriesRecord, Cost]:
    """Import, and the library's coarse stage alone, in a process of its own."""
    project = folder / "runs" / name_of(number)
    imported(folder, number)
    argv = [sys.executable, os.path.abspath(__file__), str(folder), "--only", str(number), "--coarse-here"]
    cost = program(argv, project, project / "log")
    return records.load_tiltseries(name_of(number), project), cost


def coarse_here(folder: Path, number: int) -> None:
    """The coarse stage on an imported series; its result goes into the record."""
    from libemc.alignments import reconsidered
    from libemc.methods.align import series
    from libemc.project import open_raw_stack

    os.chdir(folder / "runs" / name_of(number))
    record = reconsidered(records.load_tiltseries(name_of(number)))
    source, tilts = record.source, record.tilts
    load = open_raw_stack(record).array.__getitem__
    pyramid = series.Pyramid(load, source.shape, source.pixel_size, tilts.use, source.contrast == "bright")
    state = series.begin(pyramid, record, None)
    changed = {
        "alignment": state.alignment,
        "tilts": tilts.model_copy(update={"use": tuple(state.use), "reason": tuple(state.reason)}),
    }
    path = records.tiltseries_path(record.name)
    records.update(path, lambda old: old.model_copy(update=changed), records.TiltSeriesRecord)


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Score:
    """What became of one series; errors in pixels of its images.

    Attributes:
        rms, median, worst: over the used tilts; worst_tilt: which one.
        unmarked: used tilts that are more than `WRONG` off, or show nothing of their own (blank, duplicate).
        lost: tilts that are not used, though nothing is wrong with them.
        used, tilts: how many.
        axis: degrees from the true one, modulo 180.
        reported: rms of the errors that the record expects; honesty: median of true over expected error, per tilt;
            None where it expects nothing.
        failure: what went wrong, if there is no alignment.
    """

    number: int
    beads: bool
    rms: float | None = None
    median: float | None = None
    worst: float | None = None
    worst_tilt: int | None = None
    mirrored: bool | None = None
    unmarked: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    used: int = 0
    tilts: int = 0
    axis: float | None = None
    reported: float | None = None
    honesty: float | None = None
    true_errors: tuple[float | None, ...] = ()
    seconds: float = 0.0
    memory: float = 0.0
    failure: str | None = None

    @property
    def aligned(self) -> bool:
        """Whether the series counts as aligned."""
        return self.rms is not None and self.rms <= WITHIN[self.beads]


def true_geometry(truth: dict[str, Any]) -> TiltGeometry:
    """All tilts of a truth file, spoilt ones too."""
    axis, tilt, shift, magnification = (
        torch.tensor(truth[k], dtype=torch.float64) for k in ("axis", "tilt", "shift_A", "magnification")
    )
    return TiltGeometry(tilt_matrices(axis, tilt, truth["xtilt"]), shift, magnification, torch.ones(len(tilt)).bool())


def score(folder: Path, number: int, record: records.TiltSeriesRecord, cost: Cost) -> Score:
    """Compare a record with the truth."""
    truth = json.loads((folder / f"{name_of(number)}_truth.json").read_text())
    alignment, use = records.need(record, "alignment"), record.tilts.use
    pixel, shape = truth["apix"], record.source.shape
    centre = torch.tensor([shape[2] // 2, shape[1] // 2], dtype=torch.float64)
    seen = (torch.tensor(truth["probe2d_px"], dtype=torch.float64) - centre) * pixel
    points = torch.tensor(truth["probe_A"], dtype=torch.float64)
    error = evaluate.alignment_error(TiltGeometry.of(alignment, use), true_geometry(truth), points, seen)
    mirrored = error.mirrored_rms < error.rms
    better = error.mirrored_tilts if mirrored else error.tilts
    off = (better / pixel).tolist()
    used = [j for j in range(len(use)) if use[j]]
    kinds = dict(zip(truth["bad"], truth["bad_kind"], strict=True))
    empty = [j for j in used if kinds.get(j) in ("blank", "duplicate")]
    expected = {j: alignment.error[j] for j in used} if alignment.error else {}
    pairs = [(off[j] * pixel, e) for j, e in expected.items() if e and j not in empty]
    axis = torch.tensor([alignment.axis[j] for j in used]).mean().item() - sum(truth["axis"]) / len(use)
    return Score(
        number=number,
        beads=len(truth["beads_A"]) > 0,
        rms=math.sqrt(sum(off[j] ** 2 for j in used) / len(used)),
        median=float(np.median([off[j] for j in used])),
        worst=max(off[j] for j in used),
        worst_tilt=max(used, key=lambda j: off[j]),
        mirrored=mirrored,
        unmarked=tuple(j for j in used if off[j] > WRONG or j in empty),
        lost=tuple(j for j in range(len(use)) if not use[j] and j not in kinds),
        used=len(used),
        tilts=len(use),
        axis=(axis + 90) % 180 - 90,
        reported=math.sqrt(sum(e**2 for _, e in pairs) / len(pairs)) / pixel if pairs else None,
        honesty=float(np.median([t / e for t, e in pairs])) if pairs else None,
        true_errors=tuple(None if math.isnan(v) else round(v, 3) for v in off),
        seconds=cost.seconds,
        memory=cost.memory,
    )


def row(s: Score) -> str:
    """One line of the table."""
    kind = "beads" if s.beads else "-"
    if s.failure is not None or s.rms is None:
        return f"{s.number:4d} {kind:5s}  failed: {s.failure}"

    def text(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.2f}"

    return (
        f"{s.number:4d} {kind:5s} {s.rms:8.2f} {s.median:8.2f} {s.worst:8.2f} @{s.worst_tilt:<3d} {text(s.axis)}"
        f" {s.used:3d}/{s.tilts:<3d} {len(s.unmarked):4d} {len(s.lost):4d} {text(s.reported)} {text(s.honesty)}"
        f" {s.seconds:6.1f} {s.memory:6.0f} {'ok' if s.aligned else 'FAR'}"
    )


HEAD = " no  kind   rms/px   median    worst tilt   axis  used  unmk lost  report  true/  CPU-s     MB"


def summary(scores: list[Score]) -> list[str]:
    """The figures that count."""
    lines = []
    for beads, text in ((True, "with beads"), (False, "without")):
        mine = [s for s in scores if s.beads == beads]
        if mine:
            lines.append(f"{text} within {WITHIN[beads]:g} px: {sum(s.aligned for s in mine)}/{len(mine)}")
    wrong = [f"{s.number}:{j}" for s in scores for j in s.unmarked]
    lines.append(f"unmarked wrong tilts: {len(wrong)}" + (f" ({' '.join(wrong[:20])})" if wrong else ""))
    lines.append(f"good tilts not used: {sum(len(s.lost) for s in scores)} of {sum(s.tilts for s in scores)}")
    times = [s.seconds for s in scores if s.seconds] or [0.0]
    lines.append(f"CPU-s per series: median {np.median(times):.1f}, most {max(times):.1f}")
    lines.append(
        f"peak memory: {max(s.memory for s in scores):.0f} MB; failed: {sum(s.failure is not None for s in scores)}"
    )
    return lines


STAGES: dict[str, Callable[[Path, int], tuple[records.TiltSeriesRecord, Cost]]] = {
    "program": aligned_by_program,
    "coarse": aligned_coarsely,
}


def main() -> int:
    """Make, align, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="series 0 to N-1; even ones have beads")
    parser.add_argument("--only", help="numbers, with commas and a-b between")
    parser.add_argument("--workers", type=int, default=1, help="series at a time")
    parser.add_argument("--generate-only", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="a series that fails counts as failed")
    parser.add_argument("--stage", choices=STAGES, default="program")
    parser.add_argument("--coarse-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    numbers = chosen(args.count, args.only)
    folder = args.folder.absolute()
    if args.coarse_here:
        coarse_here(folder, numbers[0])
        return 0
    folder.mkdir(parents=True, exist_ok=True)

    def one(number: int) -> Score:
        made = make(folder, args.seed, number)
        if args.generate_only:
            return Score(number, number % 2 == 0, seconds=made["_seconds"], memory=made["_memory"])
        return score(folder, number, *STAGES[args.stage](folder, number))

    args.results = folder / f"scores_{args.stage}.json"
    scores = scored(args, numbers, one, lambda n, why: Score(n, n % 2 == 0, failure=why), HEAD, row)
    if not args.generate_only:
        print("\n".join(summary(scores)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
