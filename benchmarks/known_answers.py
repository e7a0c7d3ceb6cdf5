"""What the suite makes of data with known answers: simulated series with their truth, and 40 real ribosomes.

    python benchmarks/known_answers.py DATA            # DATA holds sim/, maps/ and real/

For each simulated series, imported with its true alignment, CTF and poses: the average's resolution against the map that made
it (FSC 0.5), also at the true position of every particle in every tilt; and where the density of a tomogram stands
around the true centres. For the ribosomes: the FSC of the average at the published poses with the bundled map, then all
orientations made random and refined from that map low-passed to 60 Å: how many come back within 12°.
"""

from __future__ import annotations

import argparse
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
from libemc.methods import average, extract, subtilts
from libemc.numerics.fsc import fourier_shell_correlation, resolution_at
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import euler_from_matrix, matrix_from_euler, random_rotations, rotation_distance

RIBOSOMES = "warptools_test_4-tomos_10-ptcls_box-32_angpix-12_optimisation_set.star"
RIBOSOME_MAP = "warptools_test_box-32_angpix-12_reconstruct.mrc"


def run(*words: object) -> None:
    """One command of the suite, in the present folder."""
    subprocess.run([str(w) for w in words], check=True, stderr=subprocess.DEVNULL)


def cpu() -> float:
    """CPU seconds of this process and its children so far."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both)


def sum_of(maps: average.HalfMaps) -> torch.Tensor:
    """Both halves in one unfiltered map."""
    both = average.Accumulator(maps.sums[0].box)
    both.merge(maps.sums[0])
    both.merge(maps.sums[1])
    return both.map()


def against(volume: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor, pixel_size: float) -> str:
    """FSC of a map with the truth, and of its mirror image."""
    curve = fourier_shell_correlation(volume * mask, truth * mask)
    mirrored = torch.roll(volume.flip(0), 1 - volume.shape[0] % 2, dims=0)
    other = fourier_shell_correlation(mirrored * mask, truth * mask).values[4:20].mean()
    return (
        f"{resolution_at(curve, 0.5, pixel_size):.2f} Å at 0.5; every 4th shell "
        + " ".join(f"{v:.2f}" for v in curve.values[::4].tolist())
        + f"; mirrored {other:.2f}"
    )


def simulated(data: Path, name: str) -> None:
    """One simulated series with its truth imported."""
    truth_file, box = data / f"sim/{name}_truth.json", 120
    truth = json.loads(truth_file.read_text())
    run("emc_import", data / f"sim/{name}.mrc")
    run("emc_import", "--alignment", truth_file, name)
    run("emc_import", "--picks", truth_file, "--label", "part", name)
    run("emc_extract", name, "--label", "part", "--set", name, "--box", box)
    run("emc_average", name, "--path", f"avg_{name}")
    mask = soft_sphere(box, 45, 6)
    density = project.read_map(data / "maps/splice_3A.mrc", box, 3.0)
    _, series = project.open_particles(name)
    print(f"{name}: truth imported: {against(sum_of(average.half_maps(series, 2 << 30)), density, mask, 3.0)}")

    (own,) = series
    images = mrc.open_stack(data / f"sim/{name}.mrc").array
    kept = [int(p.id.split(".")[1]) for p in own.file.particles]
    size = torch.tensor([images.shape[2] // 2, images.shape[1] // 2])
    position = torch.tensor(truth["pos2d_px"], dtype=torch.float64) - size
    visible = torch.zeros(len(position), images.shape[0], dtype=torch.bool)
    visible[kept] = own.visible
    true = extract.Patches(position, torch.tensor(truth["particle_defocus"], dtype=torch.float64), visible)
    cutting = extract.Cutting(box)
    stack = extract.PatchStack(images, true, extract.measure(images, true, cutting), cutting)
    moved = subtilts.Particles.of(own.file, np.concatenate(list(extract.extract(stack, kept, 4 << 30))))
    print(
        f"{name}: and the true position in every tilt: {against(sum_of(average.half_maps([moved], 2 << 30)), density, mask, 3.0)}"
    )

    before = cpu()
    run("emc_tomogram", name, "--load", "--bin", "4")
    record = records.load_tiltseries(name)
    volume, pixel = mrc.read_volume(record.tomograms[-1].file)
    reach = round(100 / pixel)
    cubes = []
    for x, y, z in (np.asarray(truth["pos_A"])[kept] / pixel).tolist():
        at = [round(c) + n // 2 for c, n in zip((z, y, x), volume.shape, strict=True)]
        if all(reach <= a < n - reach for a, n in zip(at, volume.shape, strict=True)):
            cubes.append(volume[tuple(slice(a - reach, a + reach + 1) for a in at)])
    mean = -np.mean(cubes, axis=0)
    mean = np.clip(mean - np.median(mean), 0, None) ** 2
    line = np.arange(-reach, reach + 1)
    where = [float((mean.sum(axis=tuple({0, 1, 2} - {d})) * line).sum() / mean.sum()) for d in (2, 1, 0)]
    offset = " ".join(f"{w:+.2f}" for w in where)
    print(f"{name}: tomogram {volume.shape[::-1]} at {pixel:g} Å in {cpu() - before:.0f} CPU-s")
    print(f"{name}: mean density of {len(cubes)} particles: {offset} voxels (x, y, z) from the true centres")


def ribosomes(data: Path, seeds: int) -> None:
    """The real ribosomes: the average at the published poses, and the poses found from random ones."""
    folder = data / "real/ribosome_tilts"
    run("emc_import", "--particles", folder / RIBOSOMES, "--set", "ribo")
    head, series = project.open_particles("ribo")
    bundled = project.read_map(folder / RIBOSOME_MAP, head.box, head.pixel_size)
    volume = sum_of(average.half_maps(series, 1 << 30))
    mask = soft_sphere(head.box, 11.0, 3.0)
    for name, m in (("unmasked", torch.ones_like(mask)), ("within 132 Å", mask)):
        curve = fourier_shell_correlation(volume * m, bundled * m).values[1:10]
        print(f"ribosomes: FSC with the bundled map, {name}: " + " ".join(f"{v:.2f}" for v in curve.tolist()))
    _, files = records.load_particles("ribo")
    for seed in range(seeds):
        g, start, used = torch.Generator().manual_seed(seed), time.time(), cpu()
        lost = {}
        for name, file in files.items():
            angles = torch.stack(euler_from_matrix(random_rotations(len(file.particles), g)), dim=1).tolist()
            particles = tuple(
                p.model_copy(update={"rot": a[0], "tilt": a[1], "psi": a[2]})
                for p, a in zip(file.particles, angles, strict=True)
            )
            lost[name] = file.model_copy(update={"particles": particles, "set": f"lost{seed}", "history": ()})
        records.save_particles(
            f"particles/lost{seed}", head.model_copy(update={"set": f"lost{seed}", "history": ()}), lost
        )
        run(
            "emc_refine", f"lost{seed}", "--reference", folder / RIBOSOME_MAP, "--startres", 60, "--max-shift", 15,
            "--path", f"spt_{seed}",
        )  # fmt: skip
        found = records.load_particles(f"spt_{seed}")[1]
        error = {name: rotation_distance(*(rotations(f[name]) for f in (files, found))) for name in files}
        every = torch.cat(list(error.values()))
        by_series = ", ".join(f"{name} {int((e < 12).sum())}/{len(e)}" for name, e in error.items())
        print(
            f"ribosomes: seed {seed}: {int((every < 12).sum())} of {len(every)} within 12° ({by_series}), "
            f"median {float(every.median()):.1f}°, {time.time() - start:.0f} s, {cpu() - used:.0f} CPU-s"
        )


def rotations(file: records.ParticleFile) -> torch.Tensor:
    """(N, 3, 3) of a particle file."""
    columns = ([getattr(p, angle) for p in file.particles] for angle in ("rot", "tilt", "psi"))
    return matrix_from_euler(*(torch.tensor(c, dtype=torch.float64) for c in columns))


def main() -> None:
    """Run all of it in a temporary project."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = args.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("conf_01", "conf_02"):
            simulated(data, name)
        ribosomes(data, args.seeds)


if __name__ == "__main__":
    main()
