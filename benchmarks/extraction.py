"""Time, memory and floor of extraction, and whether particles are better cut beforehand or as they are needed.

    python benchmarks/extraction.py DATA            # DATA holds sim/ and maps/

250 points, spread over the field of a simulated series with its true alignment and CTF, are extracted with subtomograms in
boxes of 64 from 41 images. The floor is the start of the program, reading the raw images once, one transform of each patch,
and for each subtomogram its images' transforms, their insertion and one inverse transform, each alone. Then the same set
without a stack: images and subtomograms must be the same. At last the true particles are averaged and refined in boxes of
120 with a stack and without.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from libemc import project, records
from libemc.io import mrc
from libemc.numerics.slices import Accumulator, Band, spectra_of_images

COUNT, BOX = 250, 64
MARGIN = 75.0
"""Å that the points keep from the field's edges: some patches reach over them."""
THICKNESS = 600.0
RUN = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, code)
"""


def run(*words: object) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak megabytes of a command in the present folder, which must succeed."""
    began = time.perf_counter()
    told = subprocess.run(["python", "-c", RUN, *map(str, words)], check=True, capture_output=True, text=True).stdout
    cpu, peak, code = told.split()
    if code != "0":
        raise SystemExit(f"{' '.join(map(str, words))} ended with {code}")
    return float(cpu), time.perf_counter() - began, float(peak)


def line(what: str, used: tuple[float, float, float]) -> None:
    """Print one measurement."""
    print(f"{what}: {used[0]:.1f} CPU-s, {used[1]:.1f} s, peak {used[2]:.0f} MB")


def cpu_of(work: object, times: int) -> float:
    """CPU seconds of one call, the mean of several; the first isn't counted."""
    work()  # type: ignore[operator]
    began = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(times):
        work()  # type: ignore[operator]
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return (ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime) / times


def floor(images: np.ndarray) -> dict[str, float]:
    """CPU seconds of the least that extraction must do, by step, on one thread."""
    torch.set_num_threads(1)
    patches = torch.randn(len(images), BOX, BOX)
    accumulator, band = Accumulator(BOX), Band.of(BOX)
    values = spectra_of_images(patches, band)
    turns = torch.linalg.qr(torch.randn(len(images), 3, 3, dtype=torch.float64))[0]
    spectrum = torch.zeros(accumulator.padded, accumulator.padded, accumulator.padded // 2 + 1, dtype=torch.complex64)
    return {
        "start": run("emc_extract", "--help")[0],
        "raw images": cpu_of(lambda: np.asarray(images, np.float32).sum(), 3),
        "patches": COUNT * cpu_of(lambda: torch.fft.rfft2(patches), 20),
        "subtomograms": COUNT
        * (
            cpu_of(lambda: spectra_of_images(patches, band), 20)
            + cpu_of(lambda: accumulator.add(values, values.real, turns, band), 20)
            + cpu_of(lambda: torch.fft.irfftn(spectrum, s=(accumulator.padded,) * 3), 20)
        ),
    }


def spread_points(record: records.TiltSeriesRecord) -> records.Picks:
    """The points, the same on every run."""
    rng = np.random.default_rng(0)
    rows, columns = record.source.shape[1:]
    side = np.array([columns, rows, 0]) * record.source.pixel_size - 2 * MARGIN
    side[2] = THICKNESS
    return records.Picks(xyz=tuple((float(x), float(y), float(z)) for x, y, z in (rng.random((COUNT, 3)) - 0.5) * side))


def extraction(images: np.ndarray, threads: list[int]) -> None:
    """Measure extraction, and compare it with what is cut on demand."""
    for number in threads:
        argv = ["emc_extract", "conf_01", "--label", "many", "--box", BOX, "--threads", number, "--overwrite"]
        line(f"extraction and subtomograms, {number} threads", run(*argv, "--set", "cut", "--subtomograms"))
        line(f"extraction, {number} threads", run(*argv, "--set", "stack"))
        line(f"particle files only, {number} threads", run(*argv, "--set", "raw", "--no-stack"))
    parts = floor(images)
    text = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    print(f"floor {sum(parts.values()):.1f} CPU-s: {text}")
    run("emc_extract", "conf_01", "--label", "many", "--box", BOX, "--set", "raw", "--no-stack", "--subtomograms")
    (stacked,), (streamed,) = (project.open_particles(name)[1] for name in ("cut", "raw"))
    numbers = np.arange(len(stacked) * len(stacked.series.use))
    reading = {}
    for name, particles in (("a stack", stacked), ("raw images", streamed)):
        reading[name] = cpu_of(lambda p=particles: p.stack[numbers], 2)  # type: ignore[misc]
    equal = np.array_equal(stacked.stack[numbers], streamed.stack[numbers])
    volumes = sorted(path.name for path in Path("particles/cut/subtomograms").glob("*.mrc"))
    same = filecmp.cmpfiles("particles/cut/subtomograms", "particles/raw/subtomograms", volumes, shallow=False)[0]
    print(
        f"{len(numbers)} images {'identical' if equal else 'DIFFERENT'}, {len(same)} of {len(volumes)} volumes identical"
    )
    print("all images read once: " + ", ".join(f"from {name} {s:.2f} CPU-s" for name, s in reading.items()))


def refinement(data: Path) -> None:
    """Average and refine the true particles, images from a stack and from the raw ones in turn."""
    for name, more in (("stack", []), ("raw", ["--no-stack"])):
        argv = ["emc_extract", "conf_01", "--label", "true", "--box", 120, "--set", f"true_{name}", "--overwrite"]
        line(f"true particles, box 120, extraction, {name}", run(*argv, *more))
    local = ["--reference", data / "maps/splice_3A.mrc", "--startres", 20, "--local", "--iterations", 3]
    for name in ("stack", "raw", "stack", "raw"):
        line(f"emc_average, {name}", run("emc_average", f"true_{name}", "--path", f"avg_{name}"))
        line(f"emc_refine, 3 iterations, {name}", run("emc_refine", f"true_{name}", *local, "--path", f"spt_{name}"))
    files = (Path(f"spt_{name}/average.mrc").read_bytes() for name in ("stack", "raw"))
    print("refined averages " + ("identical" if len(set(files)) == 1 else "DIFFERENT"))


def main() -> None:
    """Run all of it in a temporary project."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-refinement", action="store_true", help="extraction only")
    args = parser.parse_args()
    data = args.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        truth = data / "sim/conf_01_truth.json"
        run("emc_import", data / "sim/conf_01.mrc")
        run("emc_import", "--alignment", truth, "conf_01")
        run("emc_import", "--picks", truth, "--label", "true", "conf_01")
        points = spread_points(records.load_tiltseries("conf_01"))
        records.update(
            records.tiltseries_path("conf_01"), lambda r: r.model_copy(update={"picks": {**r.picks, "many": points}})
        )
        print(f"{COUNT} points, box {BOX}, {len(json.loads(truth.read_text())['tilt'])} images")
        extraction(mrc.open_stack(data / "sim/conf_01.mrc").array, args.threads)
        if not args.no_refinement:
            refinement(data)
        os.chdir("/")


if __name__ == "__main__":
    main()
