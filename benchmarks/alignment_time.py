#!/usr/bin/env python3
"""Time and memory from a full-size tilt series on disk to its alignment and tomogram: 41 images of 4096 x 4096 in int8.

The series is simulated at a quarter of the sampling without counting noise, brought to the full one in Fourier space, and
electrons are counted there; it is kept in FOLDER. The alignment's share is what a second run without it saves, its stages
are those that the record tells. The floor is one Fourier transform of each image, in the same run.

    python benchmarks/alignment_time.py FOLDER
    python benchmarks/alignment_time.py FOLDER --beads 0 --threads 1 --size 2048
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch
from commands import Cost, program

from libemc import records
from libemc.io.simulated import detector_stack
from libemc.numerics import fourier

PIXEL_SIZE, DOSE = 1.3, 3.0  # Å, e/Å² per image
FINER = 4  # than what is simulated
TILTS = (-60, 60, 3)


def make(folder: Path, size: int, beads: int) -> Path:
    """The stack, unless it is there: NAME.mrc and NAME.rawtlt, and the truth."""
    name = f"time_{size}_{beads}"
    stack = folder / f"{name}.mrc"
    if stack.exists():
        return stack
    small = size // FINER
    argv = ["emc_simulate", f"{name}_small", "--size", small, small, "--pixel-size", PIXEL_SIZE * FINER, "--noise-free",
            "--dtype", "float32", "--tilt-range", *TILTS, "--dose", DOSE, "--axis", 84.0, "--count", 250,
            "--margin", 1500, "--beads", 3 * beads, "--thickness", 1200, "--tilt-error", 0.1, "--drift", 40,
            "--seed", 1, "--overwrite", "--quiet"]  # fmt: skip
    program([str(a) for a in argv], folder, folder / f"{name}.log")
    rng = np.random.default_rng(1)
    with mrcfile.mmap(folder / f"{name}_small.mrc", permissive=True) as file:
        shape = (len(file.data), size, size)
        with detector_stack(stack, shape, PIXEL_SIZE, np.int8) as pixels:
            for j, image in enumerate(file.data):
                mean = fourier.resize(torch.from_numpy(image.copy()), (size, size)).clamp_min(0) / FINER**2
                pixels[j] = rng.poisson(mean.numpy()).clip(max=127)
    shutil.move(folder / f"{name}_small.rawtlt", folder / f"{name}.rawtlt")
    shutil.move(folder / f"{name}_small_truth.json", folder / f"{name}_truth.json")
    for end in (".mrc", ".mdoc"):
        (folder / f"{name}_small{end}").unlink()
    return stack


def floor(count: int, size: int, threads: int) -> float:
    """Wall seconds for as many transforms of images as large, float32."""
    torch.set_num_threads(threads)
    image = torch.rand(size, size)
    torch.fft.rfft2(image)
    began = time.perf_counter()
    for _ in range(3):
        torch.fft.rfft2(image)
    return (time.perf_counter() - began) / 3 * count


def main() -> None:
    """Make, import, align and reconstruct, reconstruct alone, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--beads", type=int, default=12, help="in the field, about")
    parser.add_argument("--bin", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    stack = make(folder, args.size, args.beads)
    project, name = folder / f"run_{stack.stem}", stack.stem
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    common = ["--threads", str(args.threads), "--quiet"]

    def run(*words: str) -> Cost:
        return program([*words, *common], project, project / "log", args.threads)

    tomogram = ["emc_tomogram", name, "--bin", str(args.bin)]
    pixel = ["--pixel-size", str(PIXEL_SIZE)]
    imported = program(["emc_import", str(stack), "--rawtlt", str(stack.with_suffix(".rawtlt")), *pixel, "--quiet"],
                       project, project / "log", args.threads)  # fmt: skip
    both = run(*tomogram)
    record = records.load_tiltseries(name, project)
    alone = run(*tomogram, "--load", "--overwrite")
    count = record.source.shape[0]
    least = floor(count, args.size, args.threads)
    wall = imported.wall + both.wall
    print(f"{count} images of {args.size} x {args.size}, int8, to a bin-{args.bin} tomogram, {args.threads} threads")
    rest = Cost(both.seconds - alone.seconds, both.memory, both.wall - alone.wall)
    for label, cost in (("import", imported), ("alignment", rest), ("tomogram", alone)):
        share = 100 * cost.wall / wall
        print(f"{label:10s} wall {cost.wall:7.1f} s  {share:3.0f} %  cpu {cost.seconds:7.1f} s")
    for stage, seconds in stages(record).items():
        print(f"  {stage:16s} {seconds:7.1f} s  {100 * seconds / wall:3.0f} %")
    peak = max(imported.memory, both.memory)
    print(f"all        wall {wall:7.1f} s, cpu {imported.seconds + both.seconds:.1f} s, peak memory {peak:.0f} MB")
    print(f"floor      {count} transforms {least:.1f} s, ratio {wall / least:.0f}")
    print(json.dumps({"wall": wall, "cpu": imported.seconds + both.seconds, "memory": peak, "floor": least}))


def stages(record: records.TiltSeriesRecord) -> dict[str, float]:
    """Wall seconds of the alignment's stages, where the record tells them."""
    freedom = record.alignment.freedom if record.alignment else None
    seconds = (freedom or {}).get("seconds")
    return {str(k): float(v) for k, v in seconds.items()} if isinstance(seconds, dict) else {}


if __name__ == "__main__":
    main()
