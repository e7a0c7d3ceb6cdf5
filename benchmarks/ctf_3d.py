#!/usr/bin/env python3
"""What each particle's own defocus is worth: averages at the true poses with it, and with less than it.

Series of particles at all heights of a thick specimen are simulated, and imported with their true alignment, CTF and
poses. Three averages are made of the same images. They differ in the defocus of the particles: their own in each tilt (what
emc_extract writes); that of the height across the tilt axis alone, as if all lay in the plane z = 0, which is what strips
of an image have; and the image's, one for all.

    python benchmarks/ctf_3d.py FOLDER               # three series of 150 particles in 1500 Å
    python benchmarks/ctf_3d.py FOLDER --data DATA   # and conf_01 (800 Å) of DATA/sim

Printed for every shell from 60 Å on are the FSC with the true map within a mask, and the share of the image's amplitude that the
wrong phases leave: the mean over images of cos(π λ k² · error of the defocus), weighed by what damage leaves of each. `worth`
is FSC²/(1 - FSC²) over that of the particles' own defocus: as if so many of them had been used. FOLDER is kept: series
that are there are not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from libemc import project, records
from libemc.io import mrc
from libemc.methods import average, extract, subtilts
from libemc.numerics.ctf import wavelength
from libemc.numerics.dose import exposure_filter
from libemc.numerics.fsc import fourier_shell_correlation, resolution_at
from libemc.numerics.masks import soft_sphere

THICKNESS = 1500.0  # Å
DEFOCUS = (20000.0, 26000.0, 33000.0)  # Å: the zeros of one series are seen by the others
PARTICLES = 150
MOTION = 0.2  # Å rms between exposures: less than by default, so that the defocus limits what is seen
COARSEST = 60.0  # Å: of the first shell that is printed
MEMORY = 1 << 30
LABEL = "part"
OWN = "own"
MASK = 0.375  # radius over the box
MASK_EDGE = 6.0  # pixels


def run(*words: object) -> None:
    """One command of the suite, in the present folder."""
    subprocess.run([str(w) for w in words], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def simulated(seed: int) -> tuple[list[str], Path]:
    """Make the series that aren't there, and import them: their names, and the file of the true map."""
    names = [f"thick_{number + 1}" for number in range(len(DEFOCUS))]
    for number, (name, defocus) in enumerate(zip(names, DEFOCUS, strict=True)):
        if not Path(f"raw/{name}_truth.json").exists():
            Path("raw").mkdir(exist_ok=True)
            run(
                "emc_simulate", f"raw/{name}", "--thickness", THICKNESS, "--count", PARTICLES, "--defocus", defocus,
                "--motion", MOTION, "--seed", seed + number, "--map-out", f"raw/{name}_map.mrc", "--overwrite",
            )  # fmt: skip
        imported(name, Path(f"raw/{name}.mrc"), Path(f"raw/{name}_truth.json"))
    return names, Path(f"raw/{names[0]}_map.mrc")


def imported(name: str, stack: Path, truth: Path) -> None:
    """A series in the project with its truth for alignment, CTF and picks; nothing where it is there."""
    if not records.tiltseries_path(name).exists():
        run("emc_import", stack)
        run("emc_import", "--alignment", truth, name)
        run("emc_import", "--picks", truth, "--label", LABEL, name)


def extracted(set_name: str, names: list[str], box: int) -> list[subtilts.Particles]:
    """The particles of all series with their images."""
    run("emc_extract", *names, "--label", LABEL, "--set", set_name, "--box", box, "--overwrite")
    return project.open_particles(set_name)[1]


def variants(particles: subtilts.Particles) -> dict[str, subtilts.Particles]:
    """The particles with their own defocus, that of the plane z = 0 below or above them, and their image's."""
    record = records.load_tiltseries(records.tiltseries_path(particles.file.name))
    geometry = subtilts.TiltGeometry.of(records.need(record, "alignment"), record.tilts.use)
    flat = particles.centre * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    shape, pixel_size = record.source.shape[1:], record.source.pixel_size
    strips, image = (
        extract.locate([tuple(p) for p in points.tolist()], geometry, record.ctf, shape, pixel_size, 1).defocus
        for points in (flat, torch.zeros_like(flat))
    )
    return {
        OWN: particles,
        "z = 0": replace(particles, defocus=strips),
        "image's": replace(particles, defocus=image),
    }


def kept(own: subtilts.Particles, other: subtilts.Particles, k: Tensor) -> Tensor:
    """(2, K): sums over images of q² cos(π λ k² · difference of defocus), and of q², with q what damage leaves."""
    seen = own.visible & own.series.use & own.use[:, None]
    error = (other.defocus - own.defocus)[seen]
    dose = own.series.dose_end.expand_as(seen)[seen]
    voltage = own.series.optics.voltage
    q2 = exposure_filter(k, dose[:, None], voltage) ** 2
    phase = math.pi * wavelength(voltage) * k**2 * error[:, None]
    return torch.stack([(q2 * phase.cos()).sum(dim=0), q2.sum(dim=0)])


def compared(title: str, series: list[subtilts.Particles], density: Tensor, mask: Tensor) -> None:
    """Average the three ways and print how they compare with the truth."""
    box, pixel_size = series[0].file.box, series[0].file.pixel_size
    first, last = math.ceil(box * pixel_size / COARSEST), box // 2 - 1
    k = torch.arange(box // 2 + 1, dtype=torch.float64) / (box * pixel_size)
    versions = [variants(particles) for particles in series]
    curves, left = {}, {}
    for way in versions[0]:
        maps = average.half_maps([v[way] for v in versions], MEMORY)
        both = average.Accumulator(box)
        both.merge(maps.sums[0])
        both.merge(maps.sums[1])
        curves[way] = fourier_shell_correlation(both.map() * mask, density * mask)
        sums = sum(kept(v[OWN], v[way], k) for v in versions)
        left[way] = (sums[0] / sums[1]).tolist()
    others = [way for way in curves if way != OWN]
    images = sum(int((p.visible & p.series.use & p.use[:, None]).sum()) for p in series)
    print(f"{title}: {sum(map(len, series))} particles, {images} images")
    print(f"{'Å':>6} {OWN:>8}" + "".join(f" {way:>8} {'left':>6} {'worth':>6}" for way in others))
    values = {way: curve.values.tolist() for way, curve in curves.items()}
    for shell in range(first, last + 1):
        line = f"{box * pixel_size / shell:6.1f} {values[OWN][shell]:8.3f}"
        for way in others:
            own, other = (max(values[w][shell], 0.0) ** 2 for w in (OWN, way))
            worth = f"{other / (1 - other) / (own / (1 - own)):6.2f}" if 0.05 < own < 1 else f"{'-':>6}"
            line += f" {values[way][shell]:8.3f} {left[way][shell]:6.2f} {worth}"
        print(line)
    at = {way: resolution_at(curve, 0.5, pixel_size) for way, curve in curves.items()}
    print(f"{title}: FSC 0.5 at " + ", ".join(f"{value:.2f} Å ({way})" for way, value in at.items()))
    for way in others:
        gain = [a - b for a, b in zip(values[OWN][first:last], values[way][first:last], strict=True)]
        best = max(range(len(gain)), key=gain.__getitem__)
        mean = sum(gain) / len(gain)
        print(
            f"{title}: own defocus against {way}: FSC {mean:+.3f} in the mean of {box * pixel_size / first:.0f} to "
            f"{box * pixel_size / (last - 1):.1f} Å, at most {gain[best]:+.3f} at {box * pixel_size / (first + best):.1f} Å"
        )


def main() -> None:
    """Make what is missing, average, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="folder that holds sim/ and maps/")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    data = args.data and args.data.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    names, truth = simulated(args.seed)
    box = int(mrc.read_volume(truth)[0].shape[0])
    judged(f"{THICKNESS:.0f} Å", "thick", names, truth, box)
    if data:
        imported("conf_01", data / "sim/conf_01.mrc", data / "sim/conf_01_truth.json")
        judged("conf_01", "conf_01", ["conf_01"], data / "maps/splice_3A.mrc", 120)


def judged(title: str, set_name: str, names: list[str], truth: Path, box: int) -> None:
    """Extract the particles of some series and compare the averages with the true map, within a sphere."""
    series = extracted(set_name, names, box)
    density = project.read_map(truth, box, series[0].file.pixel_size)
    compared(title, series, density, soft_sphere(box, MASK * box, MASK_EDGE))


if __name__ == "__main__":
    main()
