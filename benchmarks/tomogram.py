#!/usr/bin/env python3
"""Time and memory of a tomogram, from raw images to the written volume, and the floor of the arithmetic.

The images are noise: nothing in the work depends on what they show. The floor is what the tiles' Fourier transforms and
insertions would take, with nothing around them, at the rates that this machine reaches in one call of each; the voxels of
overlaps and of the cubes' unused borders are not in it.

    python benchmarks/tomogram.py                          # 1024 x 1024 x 300 voxels from 41 images of 1024 x 1024
    python benchmarks/tomogram.py --side 512 --depth 150 --threads 1
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from libemc.io.mrc import StackWriter, VolumeWriter, open_stack
from libemc.methods.reconstruct import PAYLOAD, Grid, Tiling, Weighting, prepare_images, reconstruct
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import kernels
from libemc.numerics.rotations import tilt_matrices
from libemc.numerics.slices import Band

PIXEL_SIZE = 12.0  # Å


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_memory() -> float:
    """Megabytes; since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def floor(tiling: Tiling, shape: tuple[int, int, int], matrices: torch.Tensor) -> float:
    """CPU seconds for the payload of `shape` in cubes of the tiling's box, of bare transforms and insertions."""
    torch.set_num_threads(1)
    box, band = tiling.box, Band.of(tiling.box)
    spectrum = torch.zeros(box, box, box // 2 + 1, dtype=torch.complex64)
    half = kernels.half_size(box / 2, 1.0)
    volume = torch.zeros(kernels.volume_shape(half), dtype=torch.complex64)
    values = torch.ones(len(matrices), len(band.kx), dtype=torch.complex64)

    def once() -> None:
        torch.fft.irfftn(spectrum, s=(box, box, box))
        kernels.scatter(volume, half, band.points(), matrices.float().contiguous(), values)

    once()
    began = cpu_seconds()
    for _ in range(3):
        once()
    return (cpu_seconds() - began) / 3 * math.prod(shape) / (2 * PAYLOAD * box) ** 3


def main() -> None:
    """Make the images, reconstruct, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=int, default=1024, help="pixels of the images, voxels of the tomogram along x and y"
    )
    parser.add_argument("--depth", type=int, default=300, help="voxels along z")
    parser.add_argument("--tilts", type=int, default=41)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    start = cpu_seconds()
    torch.set_num_threads(args.threads)
    count, n = args.tilts, args.side
    angles = torch.linspace(-60, 60, count, dtype=torch.float64)
    ones = torch.ones(count, dtype=torch.float64)
    geometry = TiltGeometry(tilt_matrices(85.0, angles, 2.0), torch.zeros(count, 2).double(), ones, ones.bool())
    grid = Grid((args.depth, n, n), PIXEL_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        stack = Path(folder) / "stack.mrc"
        rng = np.random.default_rng(0)
        with StackWriter(stack, PIXEL_SIZE) as writer:
            for _ in range(count):
                writer.append(rng.standard_normal((n, n), dtype=np.float32))
        raw = open_stack(stack).array
        began, wall = cpu_seconds(), time.perf_counter()
        images = np.empty((count, n, n), np.float32)
        weighting = Weighting(args.depth * PIXEL_SIZE)
        for _ in prepare_images(lambda j: raw[j], geometry, 1, PIXEL_SIZE, weighting, images):
            pass
        prepared = cpu_seconds()
        writing = 0.0
        with VolumeWriter(Path(folder) / "tomogram.mrc", grid.shape, PIXEL_SIZE) as volume:
            for y0, slab in reconstruct(images, geometry, grid):
                before = time.thread_time()
                volume.write_rows(y0, slab)
                writing += time.thread_time() - before
        ended, wall = cpu_seconds(), time.perf_counter() - wall
    peak = peak_memory()
    tiling = Tiling.of(grid.shape, count)
    least = floor(tiling, grid.shape, geometry.matrices)
    total = ended - began + start
    print(f"tomogram {n} x {n} x {args.depth} from {count} images of {n} x {n}, {args.threads} threads")
    print(f"tiles {len(tiling)} of {tiling.box}^3, {' x '.join(str(k) for k in tiling.keep)} kept")
    parts = {"start": start, "images": prepared - began, "tiles": ended - prepared - writing, "writing": writing}
    print(f"cpu {total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()))
    print(f"wall {wall:.1f} s, peak memory {peak:.0f} MB, floor {least:.1f} s, ratio {total / least:.1f}")


if __name__ == "__main__":
    main()
