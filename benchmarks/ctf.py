#!/usr/bin/env python3
"""The CTF that emc_tomoctf finds, against what is known: of another simulator, real micrographs, and our own simulator.

    python benchmarks/ctf.py known DATA              # DATA/sim holds conf_01 and conf_02, of a simulator not ours
    python benchmarks/ctf.py micrographs FOLDER      # mrcfile's source distribution, unpacked: two real micrographs
    python benchmarks/ctf.py series FOLDER           # 60 series with random everything: made, estimated, scored
    python benchmarks/ctf.py series FOLDER --only 3,7-9 --generate-only
    python benchmarks/ctf.py phase FOLDER            # 8 with a phase plate, near focus, half of them drifting

Simulated series are imported with their .mdoc and amplitude contrast, and get their true alignment; what else the truth says
of the lens is taken out of the record before the estimate. Everything about a series is drawn from SEED and its number alone.
What can be asked of an estimate is bounded: in the image nearest to 0 degrees the rings of particles and ice stand out of
their smooth mean by `LEAST_RINGS` standard deviations, and by the bound of Cramér and Rao that image alone tells its defocus
to `MOST_DEFOCUS_ERROR` (with a plate also its phase to `MOST_PHASE_ERROR`), its background being any polynomial of degree
`BACKGROUND`. Other images may show nothing: an estimate must then say so. Pixels below `COARSEST_HALF` are made from images
with twice their size without counting noise, brought to the fine sampling in Fourier space, where electrons are counted:
rings then fade, and end at half of Nyquist. The mean defocus of a tilt counts, (U + V) / 2. A tilt is marked where the record
says that it is not measured, or an error of `MARKED` or more. FOLDER is kept: series that are there are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import torch
from commands import Cost, Parameters, chosen, log_uniform, program, scored, words

from libemc import records
from libemc.io.simulated import MODES, detector_stack, write_mdoc, write_truth
from libemc.methods import phantom, simulate
from libemc.methods.estimate_ctf.estimate import SURE
from libemc.numerics import fourier
from libemc.numerics.ctf import Optics, wavelength
from libemc.numerics.dose import exposure_filter

Array = np.ndarray
Record = records.TiltSeriesRecord

LEAST_RINGS = 8.0  # standard deviations
MOST_DEFOCUS_ERROR = 200.0  # Å
MOST_PHASE_ERROR = 6.0  # degrees
BACKGROUND = 6
COARSEST_HALF = 2.25  # Å
LONGEST = 60.0  # Å: coarser rings tell nothing
FREQUENCIES = 2000  # from there to Nyquist, where the rings are reckoned
ATTEMPTS = 200  # to make a series of a pixel size and a number of tilts before these are drawn again
MOST_SECONDS = 8.0  # CPU time of a simulation beyond its start, about
SECONDS_PER_PIXEL, SECONDS_PER_LAYER_PIXEL = 1.2e-7, 3e-8  # without ice, of ice: on one core of a small server
MOST_PATCH = 420  # pixels of a particle with its rings: memory goes with the third power
LOW_TILT = 30.0  # degrees
GROSS = 3000.0  # Å: a tilt that is farther off must be marked
MARKED = 1000.0  # Å
COVERAGE = 68.3  # % of normal errors within one standard deviation
WANTED_PHASE, WANTED_DEFOCUS = 10.0, 500.0  # degrees and Å, with a plate
MICROGRAPHS = {"fei-extended": (10600.0, 10900.0), "epu2.9_example": (27300.0, 28100.0)}
"""Å: the lowest and the highest mean defocus that separate fits to rotational averages gave."""
WANTED_MICROGRAPH = 300.0  # Å beyond these


# -------------------------------------------------------------------------------------------------------------- drawing


@functools.lru_cache
def spectrum() -> tuple[Array, Array]:
    """Frequencies (K,) in 1/Å, and there the power of a particle's potential, V²·Å⁶, as a mean over directions (K,)."""
    k = np.linspace(1 / LONGEST, 1 / 4.0, 80)
    way = np.random.default_rng(0).normal(size=(10, 3))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    points = torch.from_numpy((way[:, None] * k[:, None]).reshape(-1, 3))
    amplitude = phantom.spectrum(phantom.particle(), points).abs().numpy()
    return k, (amplitude.reshape(len(way), -1) ** 2).mean(axis=0)


def bounds(p: Parameters, inside: float) -> tuple[float, float, float]:
    """What the image nearest to 0 degrees can tell by itself, from the power spectrum of its whole field.

    A ring of n independent Fourier coefficients tells the logarithm of its power to 1/sqrt(n).

    Args:
        inside: particles in the field.

    Returns:
        Standard deviations by which the rings differ from a smooth mean; Å, the least standard error of the defocus; degrees,
        that of the phase shift where it is sought too (0 without a plate).
    """
    optics = Optics(p["voltage"], p["cs"], p["amplitude-contrast"])
    wave, pixel, thickness, area = wavelength(optics.voltage), p["pixel-size"], p["thickness"], field_area(p)
    tilts = angles_of(p)
    place = simulate.order_of_tilts(tilts, p["order"])[int(np.abs(tilts).argmin())]
    k, step = np.linspace(1 / LONGEST, 0.5 / pixel, FREQUENCIES, retstep=True)
    damage = exposure_filter(torch.from_numpy(k), torch.tensor(p["dose"] * (place + 1.0)), optics.voltage).numpy() ** 2
    protein = np.interp(k, *spectrum()) * p["strength"] ** 2 * inside / area * damage
    structure = simulate.ICE_COMPRESSION + simulate.ICE_PEAK * np.exp(
        -((k - simulate.ICE_PEAK_AT) ** 2) / (2 * simulate.ICE_PEAK_WIDTH**2)
    )
    ice = phantom.ICE_POTENTIAL**2 / simulate.ICE_DENSITY * thickness * structure
    electrons = p["dose"] * math.exp(-thickness / simulate.MEAN_FREE_PATH) * p["mtf"] ** (2 * (2 * k * pixel) ** 2)
    scale = electrons * (2 * simulate.interaction(optics.voltage)) ** 2
    # heights between the surfaces blur the rings; half the power of the signal is in them
    room = max(thickness - p["distance"], 0.0)
    waves = scale * (protein * np.sinc(wave * k**2 * room) + ice * np.sinc(wave * k**2 * thickness)) / 2
    mean = 1 + scale * (protein + ice) / 2
    chi = math.pi * wave * p["defocus"] * k**2 - math.pi / 2 * optics.cs * 1e7 * wave**3 * k**4
    chi += math.radians(p["phase-shift"]) + math.asin(optics.amplitude_contrast)
    weight = np.sqrt(math.pi * k * step * area)
    columns = [-np.cos(2 * chi), 2 * math.pi * wave * k**2 * np.sin(2 * chi), math.radians(2) * np.sin(2 * chi)]
    basis = np.linalg.qr(weight[:, None] * np.vander(k / k[-1], BACKGROUND + 1))[0]
    told = np.stack([weight * waves / mean * c for c in columns], axis=1)
    told -= basis @ (basis.T @ told)
    plate = p["phase-shift"] != 0
    information = told[:, 1:].T @ told[:, 1:]
    error = np.sqrt(np.diag(np.linalg.inv(information))) if plate else [information[0, 0] ** -0.5, 0.0]
    return float(np.linalg.norm(told[:, 0])), float(error[0]), float(error[1])


def angles_of(p: Parameters) -> tuple[float, ...]:
    """Nominal tilts."""
    return simulate.tilt_angles(*p["tilt-range"])


def field_area(p: Parameters) -> float:
    """Å², of the images that are simulated."""
    return math.prod(p["size"]) * p["pixel-size"] ** 2


def drawn_tilts(rng: np.random.Generator) -> list[float]:
    """First, last and step of 15 to 61 tilts."""
    while True:
        step, count = float(rng.choice([1.0, 1.5, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 5.0])), int(rng.integers(15, 62))
        reach = step * (count - 1) / 2
        middle = float(rng.uniform(-15, 15)) if rng.random() < 0.2 else 0.0
        if reach > 28 and reach + abs(middle) < 68:
            first = round(middle - reach, 2)
            return [first, round(first + (count - 1) * step, 2), step]


def drawn_optics(rng: np.random.Generator, number: int, plate: bool) -> Parameters:
    """The lens; odd numbers have a plate that drifts, where they have one."""
    low, high, jitter = (5000, 20000, 300) if plate else (6000, 80000, 1000)
    p: Parameters = {
        "voltage": float(rng.choice([300.0, 300.0, 200.0])),
        "cs": float(rng.choice([2.7, 2.7, 2.0])),
        "amplitude-contrast": round(float(rng.uniform(0.05, 0.1)), 3),
        "defocus": round(log_uniform(rng, low, high), 0),
        "defocus-jitter": round(log_uniform(rng, 30, jitter), 0),
        "astigmatism": round(float(rng.uniform(0, 1500)), 0),
        "astigmatism-angle": round(float(rng.uniform(-90, 90)), 1),
        "handedness": int(rng.choice([-1, 1])),
        "mtf": round(float(rng.uniform(0.3, 1.0)), 2),
        "phase-shift": 0.0,
        "phase-drift": 0.0,
    }
    if plate:
        drift = float(rng.uniform(20, 40)) if number % 2 else 0.0
        ends = [first := float(rng.uniform(40, 120 - drift)), first + drift][:: int(rng.choice([-1, 1]))]
        p |= {"phase-shift": round(ends[0], 1), "phase-drift": round(ends[1] - ends[0], 1)}
    return p


def drawn(seed: int, number: int, plate: bool = False) -> Parameters:
    """Everything about one series, as options of emc_simulate; keys with a leading underscore are notes.

    The same seed and number give the same series, whatever else is made.
    """
    rng = np.random.default_rng([seed, number, int(plate)])
    while True:
        pixel, tilts = round(log_uniform(rng, 1.3, 4.5), 2), drawn_tilts(rng)  # first: they decide the time
        for _ in range(ATTEMPTS):
            found = attempt(rng, pixel, tilts, drawn_optics(rng, number, plate))
            if found is not None:
                return found


def attempt(rng: np.random.Generator, pixel: float, span: list[float], optics: Parameters) -> Parameters | None:
    """One series, or None where it would take too long, or nobody could tell its defocus."""
    finer = 2 if pixel < COARSEST_HALF else 1
    short = log_uniform(rng, 700, 1400)
    longer = min(short * float(rng.choice([1.0, 1.0, rng.uniform(1.0, 1.4)])), 1400)
    even = rng.random() < 0.75  # most detectors have, after binning, sides that are products of small primes
    size = [fourier.good_size(int(n / finer)) if even else int(n / finer) for n in (longer, short)]
    thickness, strength, crowded = log_uniform(rng, 300, 2500), log_uniform(rng, 0.7, 1.5), bool(rng.random() < 0.5)
    distance = float(rng.uniform(160, 200)) if crowded else float(rng.uniform(230, 260))
    p: Parameters = {
        "size": size[:: int(rng.choice([-1, 1]))],
        "pixel-size": round(pixel * finer, 2),
        "tilt-range": span,
        "order": str(rng.choice(simulate.ORDERS, p=[0.6, 0.2, 0.2])),
        "axis": round(float(rng.uniform(-180, 180)), 2),
        "xtilt": round(float(rng.uniform(-2, 2)), 2) if rng.random() < 0.5 else 0.0,
        "axis-error": round(float(rng.uniform(0, 0.2)), 3),
        "tilt-error": round(float(rng.uniform(0, 0.3)), 3),
        "drift": round(log_uniform(rng, 3, 30), 1),
        "thickness": round(thickness, 0),
        "slab-tilt": [round(float(rng.uniform(-6, 6)), 2) if rng.random() < 0.7 else 0.0 for _ in range(2)],
        "distance": round(distance, 0),
        "strength": round(strength, 2),
        "particle": [str(v) for v in rng.choice(phantom.VARIANTS, int(rng.integers(1, 4)), replace=False)],
        "motion": round(float(rng.uniform(0.1, 0.5)), 2),
        "bead-radius": round(float(rng.uniform(25, 75)), 1),
        "dtype": str(rng.choice(["int8", "int16", "float32", "float16"], p=[0.3, 0.4, 0.2, 0.1])),
        "seed": int(rng.integers(2**31)),
        **optics,
    }
    if finer > 1:  # or the power would fall off a step where the coarse images end
        p["mtf"] = round(float(rng.uniform(0.1, 0.2)), 2)
    tilts = angles_of(p)
    p["dose"] = round(min(max(float(rng.uniform(60, 150)) / len(tilts), 1.0), 8.0), 2)
    # as many particles as the time allows, between a few and a crowd
    room = field_area(p) * max(thickness - distance, 0.25 * distance)
    per_volume = log_uniform(rng, 0.04, 0.2) if crowded else log_uniform(rng, 0.004, 0.04)
    most = affordable(p, tilts, finer)
    inside = min(per_volume * room / (math.pi / 6 * distance**3), most)
    beads = int(rng.integers(4, 21)) if rng.random() < 0.3 else 0
    if inside < 3:
        return None
    rings, defocus_error, phase_error = bounds(p, inside)
    if rings < LEAST_RINGS or defocus_error > MOST_DEFOCUS_ERROR or phase_error > MOST_PHASE_ERROR:
        return None
    # the specimen goes on as far as the images see
    area = [n * p["pixel-size"] for n in p["size"]]
    steepest = math.cos(math.radians(max(map(abs, tilts))))
    margin = min(area) * (0.5 / steepest - 0.5)
    more = math.prod(1 + 2 * margin / a for a in area)
    p |= {"margin": round(margin, 0), "count": round(inside * more), "beads": round(beads * more)}
    p |= {"_finer": finer, "_particles_in_field": round(inside), "_crowded": crowded, "_rings": round(rings, 1)}
    return p | {"_defocus_bound": round(defocus_error, 1), "_phase_bound": round(phase_error, 2)}


def affordable(p: Parameters, tilts: Sequence[float], finer: int) -> float:
    """Particles in the field for which there are time and memory."""
    pixel, pixels = p["pixel-size"], math.prod(p["size"])
    wave, tangent = wavelength(p["voltage"]), np.tan(np.radians(np.abs(tilts)))
    reach = wave * (p["defocus"] + max(p["size"]) * pixel / 2 * tangent.max() + p["thickness"]) / (2 * pixel)
    patch = simulate.box_for(2 * phantom.RADIUS, pixel) + 2 * reach / pixel
    if patch > MOST_PATCH:
        return 0.0
    thickest = 2 * simulate.LAYER_PHASE * (2 * pixel) ** 2 / (math.pi * wave)
    layers = 1 + (min(p["size"]) * pixel * tangent.mean() + p["thickness"]) / thickest
    each = pixels * (SECONDS_PER_PIXEL * (1 + (finer > 1)) + SECONDS_PER_LAYER_PIXEL * float(layers))
    return (MOST_SECONDS / len(tilts) - each) / (simulate.SECONDS_PER_PATCH_PIXEL * patch**2) / 1.4


# ------------------------------------------------------------------------------------------------------------- programs


def make(folder: Path, name: str, parameters: Parameters) -> Parameters:
    """The series, unless it is there and made of the same numbers."""
    note = folder / f"{name}.json"
    if note.exists() and (folder / f"{name}.mrc").exists():
        there = json.loads(note.read_text())
        if words(there) == words(parameters):
            return there
    note.unlink(missing_ok=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    finer = parameters["_finer"]
    stem = f"{name}_coarse" if finer > 1 else name
    options = parameters | ({"dtype": "float32"} if finer > 1 else {})
    noise = ["--noise-free"] if finer > 1 else []
    argv = ["emc_simulate", stem, *words(options), *noise, "--overwrite", "--quiet", "--threads", "1"]
    cost = program(argv, folder, log)
    began = time.thread_time()
    if finer > 1:
        refine(folder, name, parameters)
    log.unlink()
    seconds = cost.seconds + time.thread_time() - began
    parameters |= {"_seconds": round(seconds, 1), "_memory": round(cost.memory)}
    note.write_text(json.dumps(parameters, indent=1) + "\n")
    return parameters


def refine(folder: Path, name: str, p: Parameters) -> None:
    """From NAME_coarse to NAME: finer pixels of the same field, in which electrons are counted."""
    coarse, finer, dtype = folder / f"{name}_coarse", p["_finer"], np.dtype(p["dtype"])
    truth = json.loads(Path(f"{coarse}_truth.json").read_text())
    rng = np.random.default_rng([p["seed"], 1])
    with mrcfile.mmap(f"{coarse}.mrc", permissive=True) as file:
        old = file.data.shape
        shape = (old[0], finer * old[1], finer * old[2])
        with detector_stack(folder / f"{name}.mrc", shape, truth["apix"] / finer, dtype) as pixels:
            for j, image in enumerate(file.data):
                mean = fourier.resize(torch.from_numpy(image.copy()), shape[1:]).clamp_min(0) / finer**2
                pixels[j] = simulate.counts(rng.poisson(mean.numpy()).astype(np.float32), dtype, 1.0)
    centres = [np.array([n[2] // 2, n[1] // 2]) for n in (old, shape)]
    for key in ("pos2d_px", "probe2d_px"):
        truth[key] = (np.array(truth[key]).reshape(-1, old[0], 2) - centres[0]) * finer + centres[1]
    truth["apix"] /= finer
    write_mdoc(folder / f"{name}.mdoc", truth, f"{name}.mrc", shape, MODES[dtype])
    shutil.move(f"{coarse}.rawtlt", folder / f"{name}.rawtlt")
    write_truth(folder / f"{name}_truth.json", truth)
    for end in (".mrc", ".mdoc", "_truth.json"):
        Path(f"{coarse}{end}").unlink()


def fresh(project: Path, stack: Path, options: Sequence[object]) -> Path:
    """A project with the record of one series, imported with these options; and where its commands log."""
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    program(["emc_import", str(stack), *map(str, options), "--quiet"], project, project / "log")
    return project / "log"


def estimate(project: Path, name: str, options: Sequence[str] = ()) -> tuple[Cost, Record]:
    """Run emc_tomoctf with these options on a series of the project."""
    cost = program(["emc_tomoctf", name, *options, "--quiet", "--threads", "1"], project, project / "log")
    return cost, records.load_tiltseries(name, project)


def estimate_simulated(project: Path, file: Path, options: Sequence[str] = ()) -> tuple[Cost, Record]:
    """Import a simulated series, give it its true alignment and nothing else of its truth file, and run emc_tomoctf."""
    name, truth = file.name.removesuffix("_truth.json"), json.loads(file.read_text())
    given = ["--cs", truth["cs"], "--amplitude-contrast", truth["ac"]]
    log = fresh(project, file.with_name(f"{name}.mrc"), given)
    program(["emc_import", "--alignment", str(file), name, "--quiet"], project, log)
    path = records.tiltseries_path(name, project)
    records.update(path, lambda old: old.model_copy(update={"ctf": None}), Record)
    return estimate(project, name, options)


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Score:
    """What became of one series; Å, degrees, over the used tilts.

    Attributes:
        notes: of the series, for the table.
        rms, bias: of the mean defocus; low, high: its rms up to `LOW_TILT` and beyond; None where there is no such tilt.
        worst: the largest error, with its sign; worst_tilt: which tilt has it.
        gross: tilts that are wrong by more than `GROSS` and not marked; marked: tilts that are marked.
        within, told: tilts whose error is no more than the record says, of those of which it says something.
        within_measured, measured: the same of those that have rings of their own.
        astigmatism: length of the difference of the two vectors (U - V, twice the angle), of the mean over the tilts;
            magnitude, angle: the differences of the two by themselves, the angle's modulo 180 degrees.
        hand: 1 right, 0 open (the program calls it undecided), -1 wrong; handedness, hand_score as the record has them.
        thickness: found minus true; None where none was found.
        phase: rms of the phase shift's error; phase_within, phase_told: as for the defocus.
        failure: what went wrong, if there is no estimate.
    """

    name: str
    notes: Parameters
    used: int = 0
    rms: float | None = None
    low: float | None = None
    high: float | None = None
    bias: float = 0.0
    worst: float = 0.0
    worst_tilt: int = 0
    gross: tuple[int, ...] = ()
    marked: int = 0
    within: int = 0
    told: int = 0
    within_measured: int = 0
    measured: int = 0
    astigmatism: float = 0.0
    magnitude: float = 0.0
    angle: float = 0.0
    hand: int = 0
    handedness: int = 0
    hand_score: float = 0.0
    thickness: float | None = None
    phase: float = 0.0
    phase_within: int = 0
    phase_told: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    errors: tuple[float | None, ...] = ()
    failure: str | None = None


def rms(values: Array) -> float | None:
    """Root of the mean square; None of none."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else None


def optional(values: Sequence[float | None] | None, count: int) -> Array:
    """Numbers with NaN for what is not known."""
    return np.array([np.nan if v is None else v for v in values or (None,) * count], dtype=float)


def score(name: str, truth: Parameters, record: Record, cost: Cost, notes: Parameters) -> Score:
    """Compare a record with the truth."""
    found, count = records.need(record, "ctf"), len(truth["tilt"])
    used = np.array(record.tilts.use) & ~np.isin(np.arange(count), truth["bad"])
    u, v, turned = (np.array(getattr(found, key)) for key in ("defocus_u", "defocus_v", "angle"))
    error = (u + v) / 2 - np.array(truth["defocus"])
    sigma = optional(found.error, count)
    measured = np.array(found.measured or (True,) * count)
    marked = ~measured | (sigma >= MARKED)
    told, fine = used & ~np.isnan(sigma), np.abs(error) <= sigma
    flat = np.abs(truth["tilt"]) <= LOW_TILT
    mean = ((u - v) * np.exp(2j * np.radians(turned)))[used].mean()
    true = truth["astig"] * np.exp(2j * np.radians(truth["astig_ang"]))
    hand_score = abs(found.handedness_score or 0.0)
    right = 1 if found.defocus_handedness == truth["defocus_handedness"] else -1
    phase = np.array(found.phase_shift) - np.array(truth.get("phase_shift", 0.0))
    phase_sigma = optional(found.phase_error, count)
    phase_told = used & ~np.isnan(phase_sigma)
    worst = int(np.where(used, np.abs(error), 0).argmax())
    return Score(
        name=name,
        notes=notes,
        used=int(used.sum()),
        rms=rms(error[used]),
        low=rms(error[used & flat]),
        high=rms(error[used & ~flat]),
        bias=float(error[used].mean()),
        worst=float(error[worst]),
        worst_tilt=worst,
        gross=tuple(np.flatnonzero(used & (np.abs(error) > GROSS) & ~marked).tolist()),
        marked=int((used & marked).sum()),
        within=int((told & fine).sum()),
        told=int(told.sum()),
        within_measured=int((told & fine & measured).sum()),
        measured=int((told & measured).sum()),
        astigmatism=float(abs(mean - true)),
        magnitude=float(abs(mean) - abs(true)),
        angle=float(np.degrees(np.angle(mean / true)) / 2) if abs(true) and abs(mean) else 0.0,
        hand=0 if hand_score < SURE else right,
        handedness=found.defocus_handedness,
        hand_score=hand_score,
        thickness=None if found.thickness is None else found.thickness - truth["thick"],
        phase=rms(phase[used]) or 0.0,
        phase_within=int((phase_told & (np.abs(phase) <= phase_sigma)).sum()),
        phase_told=int(phase_told.sum()),
        seconds=cost.seconds,
        memory=cost.memory,
        errors=tuple(round(float(e), 1) if k else None for e, k in zip(error, used, strict=True)),
    )


HANDS = {1: "right", 0: "open", -1: "WRONG"}
HEAD = (
    "name        Å/px   tilts defocus  thick  dose bound |   rms   ≤30°   >30°   bias   worst @     gross marked within"
    " | astig'm  angle  phase thick'n | hand           CPU-s    MB"
)


def percent(part: int, whole: int) -> str:
    """Of so many."""
    return f"{100 * part / whole:3.0f}%" if whole else "   -"


def row(s: Score) -> str:
    """One line of the table."""
    n = s.notes
    pixel = n["pixel-size"] / n.get("_finer", 1)
    kind = (
        f"{s.name:11s} {pixel:4.2f} {len(angles_of(n)):7d} {n['defocus']:7.0f} {n['thickness']:6.0f} {n['dose']:5.2f}"
    )
    kind += f" {n['_defocus_bound']:5.1f} |" if "_defocus_bound" in n else "     - |"
    if s.failure is not None:
        return f"{kind} failed: {s.failure}"
    values = " ".join("     -" if v is None else f"{v:6.0f}" for v in (s.rms, s.low, s.high, s.bias, s.worst))
    thick = "      -" if s.thickness is None else f"{s.thickness:+7.0f}"
    return (
        f"{kind}{values} @{s.worst_tilt:<3d} {len(s.gross):6d} {s.marked:6d}   {percent(s.within, s.told)}"
        f" | {s.astigmatism:7.0f} {s.angle:+6.1f} {s.phase:6.1f} {thick}"
        f" | {HANDS[s.hand]:5s} {s.handedness:+d} {s.hand_score:4.2f} {s.seconds:6.1f} {s.memory:5.0f}"
    )


def summary(scores: list[Score], plate: bool) -> list[str]:
    """The figures that count."""
    done = [s for s in scores if s.failure is None]
    if not done:
        return ["nothing was estimated"]
    gross = [f"{s.name}:{j}" for s in done for j in s.gross]
    every = np.array([e for s in done for e in s.errors if e is not None])
    sums = {key: sum(getattr(s, key) for s in done) for key in ("within", "told", "within_measured", "measured")}
    hands = [s.hand for s in done]
    lines = [
        f"gross errors that are not marked: {len(gross)} of {len(every)} tilts"
        + (f" ({' '.join(gross[:20])})" if gross else ""),
        f"within the reported error: {percent(sums['within'], sums['told'])} of {sums['told']} tilts, "
        f"{percent(sums['within_measured'], sums['measured'])} of {sums['measured']} measured ones ({COVERAGE:g} wanted)",
        f"hands: {hands.count(1)} right, {hands.count(0)} open, {hands.count(-1)} wrong",
        f"defocus: rms {rms(every):.0f} Å over all tilts, median of the series {np.median([s.rms for s in done]):.0f} Å, "
        f"most {max(s.rms or 0 for s in done):.0f} Å",
        f"astigmatism: median error {np.median([s.astigmatism for s in done]):.0f} Å, "
        f"most {max(s.astigmatism for s in done):.0f} Å",
    ]
    if plate:
        phases, told = sum(s.phase_within for s in done), sum(s.phase_told for s in done)
        good = sum(s.phase <= WANTED_PHASE and (s.rms or 0) <= WANTED_DEFOCUS for s in done)
        lines.append(
            f"phase: rms {rms(np.array([s.phase for s in done])):.1f}°, most {max(s.phase for s in done):.1f}°, "
            f"{percent(phases, told)} of {told} tilts within the reported error; "
            f"within {WANTED_PHASE:g}° and {WANTED_DEFOCUS:g} Å: {good} of {len(done)} series"
        )
    times = [s.seconds for s in done]
    lines.append(
        f"CPU-s per series: median {np.median(times):.1f}, most {max(times):.1f}; "
        f"peak memory: {max(s.memory for s in done):.0f} MB; failed: {len(scores) - len(done)}"
    )
    return lines


# ------------------------------------------------------------------------------------------------------------- the four


def simulated(args: argparse.Namespace) -> None:
    """Series of our own simulator: made, estimated, scored."""
    plate, folder = args.kind == "phase", args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--phase-plate"] if plate else []

    def one(number: int) -> Score:
        name, notes = f"{args.kind}_{number:03d}", drawn(args.seed, number, plate)
        notes = make(folder, name, notes)
        if args.generate_only:
            return Score(name, notes, seconds=notes["_seconds"], memory=notes["_memory"])
        truth = folder / f"{name}_truth.json"
        cost, record = estimate_simulated(folder / "runs" / name, truth, options)
        return score(name, json.loads(truth.read_text()), record, cost, notes)

    def failed(number: int, why: str) -> Score:
        return Score(f"{args.kind}_{number:03d}", drawn(args.seed, number, plate), failure=why)

    args.results = folder / f"scores_{args.kind}.json"
    scores = scored(args, chosen(args.count, args.only), one, failed, HEAD, row)
    if not args.generate_only:
        print("\n".join(summary(scores, plate)))


def known(args: argparse.Namespace) -> None:
    """The two series of another simulator, whose `astig` is U - V."""
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        print(HEAD)
        for name in ("conf_01", "conf_02"):
            file = args.data.absolute() / "sim" / f"{name}_truth.json"
            truth = json.loads(file.read_text())
            notes = {"pixel-size": truth["apix"], "defocus": np.mean(truth["defocus"]), "thickness": truth["thick"]}
            notes |= {
                "dose": truth["dose"],
                "tilt-range": [*np.array(truth["nominal"])[[0, -1]], np.diff(truth["nominal"])[0]],
            }
            cost, record = estimate_simulated(Path(folder) / name, file)
            scores.append(score(name, truth, record, cost, notes))
            print(row(scores[-1]), flush=True)
    for s in scores:
        print(
            f"{s.name}: astigmatism {s.magnitude:+.0f} Å and {s.angle:+.1f}° off, "
            f"hand {s.handedness:+d} with score {s.hand_score:.3f} ({HANDS[s.hand]})"
        )
    print("\n".join(summary(scores, False)))


def micrographs(args: argparse.Namespace) -> None:
    """Two real ones, each as a series of one image at 0 degrees."""
    print(
        "micrograph          Å/px   kV   defocus  error  U - V  angle resolution  reference       beyond  CPU-s    MB"
    )
    beyond = []
    for name, (low, high) in MICROGRAPHS.items():
        path = next(args.folder.absolute().rglob(f"{name}.mrc"))
        with tempfile.TemporaryDirectory() as folder, mrcfile.open(path, permissive=True) as file:
            pixel, voltage = float(file.voxel_size.x), float(file.indexed_extended_header["HT"][0]) / 1000
            project = Path(folder) / "project"
            fresh(project, path, ["--tilt-start", 0, "--voltage", voltage])
            cost, record = estimate(project, name)
        found = records.need(record, "ctf")
        u, v = found.defocus_u[0], found.defocus_v[0]
        error, resolution = (math.nan if x is None else x[0] for x in (found.error, found.resolution))
        beyond.append(max(low - (u + v) / 2, (u + v) / 2 - high, 0.0))
        print(
            f"{name:18s} {pixel:5.4f} {voltage:4.0f} {(u + v) / 2:9.0f} {error:6.0f} {u - v:6.0f} {found.angle[0]:+6.1f}"
            f" {resolution:10.1f}  {low:.0f}-{high:.0f} {beyond[-1]:9.0f} {cost.seconds:6.1f} {cost.memory:5.0f}"
        )
    print(
        f"within {WANTED_MICROGRAPH:g} Å of the reference: {sum(b <= WANTED_MICROGRAPH for b in beyond)} of {len(beyond)}"
    )


def main() -> int:
    """One of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("known", help="two series of another simulator").add_argument("data", type=Path)
    kinds.add_parser("micrographs", help="two real micrographs").add_argument("folder", type=Path)
    for kind, count in (("series", 60), ("phase", 8)):
        text = "random tilt series" if kind == "series" else "random tilt series with a phase plate"
        own = kinds.add_parser(kind, help=text)
        own.add_argument("folder", type=Path)
        own.add_argument("--seed", type=int, default=1)
        own.add_argument("--count", type=int, default=count, help="series 0 to N-1")
        own.add_argument("--only", help="numbers, with commas and a-b between")
        own.add_argument("--workers", type=int, default=1, help="series at a time")
        own.add_argument("--generate-only", action="store_true")
        own.add_argument("--keep-going", action="store_true", help="a series that fails counts as failed")
    args = parser.parse_args()
    {"known": known, "micrographs": micrographs}.get(args.kind, simulated)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
