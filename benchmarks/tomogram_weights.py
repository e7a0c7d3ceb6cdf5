#!/usr/bin/env python3
"""What the weights of tilts are worth to a tomogram: its FSC with the true density of a thick specimen.

The series are those of ctf_3d.py, made there unless they are there, with their true alignment and CTF. Tomograms of the middle
are made with voxels of two pixels and phases flipped, in turn without weights, weighed by dose under different
assumptions about the noise, and by dose and the path through the specimen; then again with every image shifted by a random error,
of an rms drawn for each image from 1 to 12 Å along x and y, and with that rms known or not.

    python benchmarks/tomogram_weights.py FOLDER

Printed is the mean FSC in each range of resolution, over all series.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from ctf_3d import LABEL, THICKNESS, simulated
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor

from libemc import project, records
from libemc.io import mrc
from libemc.methods import reconstruct
from libemc.methods.reconstruct import CtfCorrection, Grid, Weighting
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics import fourier
from libemc.numerics.fsc import fourier_shell_correlation
from libemc.numerics.masks import cosine_edge
from libemc.numerics.rotations import matrix_from_euler

BINNING = 2
SIDE = 240  # voxels of the tomograms
EDGE = 12  # voxels over which they are tapered
RANGES = (200, 60, 40, 30, 25, 20, 16, 13)  # Å
NOISES = (0.1, 0.3, 3.0)
ERRORS = (1.0, 12.0)  # Å rms along x and y


def density(record: records.TiltSeriesRecord, particle: NDArray[np.float32], pixel_size: float) -> Tensor:
    """The particles where they are, (SIDE, SIDE, SIDE), white."""
    picks, half = records.need_picks(record, LABEL), particle.shape[0] // 2 + 3
    angles = (torch.tensor(a, dtype=torch.float64) for a in (picks.rot, picks.tilt, picks.psi))
    out, line = np.zeros((SIDE + 4 * half,) * 3, np.float32), np.arange(-half, half)
    for xyz, rotation in zip(np.array(picks.xyz), matrix_from_euler(*angles).numpy(), strict=True):
        nearest = np.rint(xyz / pixel_size).astype(int)
        low = (nearest + SIDE // 2 + half)[::-1]
        if (low < 0).any() or (low + 2 * half > len(out)).any():
            continue
        z, y, x = np.meshgrid(line, line, line, indexing="ij")
        u = (np.stack([x, y, z], axis=-1) + nearest - xyz / pixel_size) @ rotation + particle.shape[0] // 2
        part = tuple(slice(a, a + 2 * half) for a in low)
        out[part] += map_coordinates(particle, np.moveaxis(u[..., ::-1], -1, 0), order=3, mode="constant")
    return torch.from_numpy(out[(slice(2 * half, 2 * half + SIDE),) * 3].copy())


def tomogram(record: records.TiltSeriesRecord, shift: NDArray[np.float64], weighting: Weighting, grid: Grid) -> Tensor:
    """White, phases flipped, the images being `shift` (T, 2) Å from where the alignment says."""
    count, rows, columns = record.source.shape
    geometry = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use)
    geometry = replace(geometry, shift=geometry.shift + torch.from_numpy(shift))
    stack = mrc.open_stack(record.source.stack).array
    images = np.empty((count, rows // BINNING, columns // BINNING), np.float32)
    for _ in reconstruct.prepare_images(lambda j: stack[j], geometry, BINNING, grid.pixel_size, weighting, images):
        pass
    slabs = reconstruct.reconstruct(images, geometry, grid, CtfCorrection.of(record, "phaseflip"))
    return -torch.from_numpy(np.concatenate([slab for _, slab in slabs], axis=1))


def curves(record: records.TiltSeriesRecord, particle: NDArray[np.float32], seed: int) -> dict[str, Tensor]:
    """FSC with the truth for each kind of weights."""
    grid = Grid((SIDE,) * 3, BINNING * record.source.pixel_size)
    count = record.source.shape[0]
    rng = np.random.default_rng([seed, count])
    rms = np.exp(rng.uniform(*np.log(ERRORS), count))
    still, moved = np.zeros((count, 2)), rng.normal(size=(count, 2)) * rms[:, None]
    upright = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use).matrices[:, 2, 2].abs()
    dose = replace(Weighting.of(record, grid, range(count), True, None), thickness=THICKNESS, errors=None, paths=None)
    path = replace(dose, paths=THICKNESS / upright)
    error = replace(path, errors=torch.from_numpy(rms * math.sqrt(2)))
    plain = replace(dose, doses=None)
    ways = {"no weights, noise 0": (still, replace(plain, noise=0.0)), "no weights": (still, plain)}
    ways |= {f"dose, noise {noise:g}": (still, replace(dose, noise=noise)) for noise in NOISES}
    ways |= {"dose": (still, dose), "dose, path": (still, path)}
    ways |= {"shifted: dose, path": (moved, path), "shifted: dose, path, error": (moved, error)}
    window = cosine_edge((torch.arange(SIDE) - SIDE // 2).abs().float(), SIDE / 2 - EDGE - 2, EDGE)
    mask = window[:, None, None] * window[:, None] * window
    truth, out = density(record, particle, grid.pixel_size) * mask, {}
    for name, (shift, weighting) in ways.items():
        out[name] = fourier_shell_correlation(tomogram(record, shift, weighting, grid) * mask, truth).values
    return out


def main() -> None:
    """Make what is missing, reconstruct, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    names, truth = simulated(args.seed)
    box, pixel_size = mrc.read_volume(truth)[0].shape[0], BINNING * records.load_tiltseries(names[0]).source.pixel_size
    fine = project.read_map(truth, box, pixel_size / BINNING)
    particle = fourier.resize(fine, (box // BINNING,) * 3).numpy()
    every = [curves(records.load_tiltseries(name), particle, args.seed + i) for i, name in enumerate(names)]
    shells = [round(SIDE * pixel_size / resolution) for resolution in RANGES]
    print(f"{'FSC, mean of':28}" + "".join(f"{a:>5}-{b:2} Å" for a, b in pairwise(RANGES)))
    for way in every[0]:
        mean = torch.stack([c[way] for c in every]).mean(dim=0)
        values = [float(mean[a:b].mean()) for a, b in pairwise(shells)]
        print(f"{way:28}" + "".join(f"{value:10.4f}" for value in values))


if __name__ == "__main__":
    main()
