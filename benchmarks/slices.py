"""Images per second through the forward model and its adjoint, beside the memory floor and relion_reconstruct.

    python benchmarks/slices.py                       # boxes 96 and 192 on one thread, then on all
    python benchmarks/slices.py --box 96 --device cuda

Each image is a whole job, as in a reconstruction: read from an array, Fourier transform, CTF, phase shift, insertion (with
weights); and backwards: slice, CTF, phase shift. `floor` is the time that the same image needs to move its bytes (27 taps
of the kernel, once through the nearest cache that holds a shell) at the copying speed measured on this machine in the same
run. relion_reconstruct is run on as large images when it is installed: CPU time of its process without its gridding
iterations, with what a run with few images takes subtracted.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from libemc.io import mrc
from libemc.numerics import ctf, kernels, slices
from libemc.numerics.rotations import euler_from_matrix, random_rotations
from libemc.numerics.slices import Accumulator, Band, FourierVolume

OPTICS = ctf.Optics()
PIXEL_SIZE = 2.0


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The best wall time of some repeats after one to warm up."""
    best = float("inf")
    for i in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def copy_rate(device: str) -> float:
    """Bytes per second that a large copy moves, reads and writes together."""
    a = torch.zeros(1 << 26, device=device)
    b = torch.ones_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), device)


def one(box: int, count: int, threads: int, device: str) -> dict[str, float]:
    """Images per second of each operation at one box size."""
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    matrices = random_rotations(count, g)
    band = Band.of(box, device=device)
    kx, ky = band.frequencies(PIXEL_SIZE)
    defocus = (1e4 + 2e4 * torch.rand(count, 1, generator=g)).to(device)
    shift = torch.randn(count, 2, generator=g, dtype=torch.float64).to(device)
    images = torch.randn(count, box, box, generator=g).to(device)
    volume = FourierVolume.from_map(torch.randn(box, box, box, generator=g).to(device))
    zero = torch.zeros((), device=device)
    sums = Accumulator(box, device=device)
    m = matrices.to(device)
    points, padded = band.points(), (m * sums.scale).float().contiguous()
    values = torch.randn(count, len(band.kx), 2, generator=g).to(device)
    values = torch.view_as_complex(values)
    weights = torch.ones(count, len(band.kx), device=device)

    def transfer() -> torch.Tensor:
        return ctf.ctf(kx, ky, defocus + 100, defocus - 100, zero + 30, zero, OPTICS)

    def insert() -> None:
        c = transfer()
        sums.add(slices.spectra_of_images(images, band) * slices.shift_phases(-shift, band) * c, c**2, m, band)

    def predict() -> torch.Tensor:
        return slices.extract_slices(volume, m, band) * transfer() * slices.shift_phases(shift, band)

    read = (m * volume.scale).float().contiguous()
    return {
        "insert": count / seconds(insert, device),
        "insert, kernel alone": count
        / seconds(lambda: kernels.scatter_weighted(sums.sums, sums.half, points, padded, values, weights), device),
        "project": count / seconds(predict, device),
        "project, kernel alone": count
        / seconds(lambda: kernels.gather(volume.data, volume.half, points, read), device),
        "coefficients": float(len(band.kx)),
    }


def relion(box: int, counts: tuple[int, int]) -> float | None:
    """Images per CPU second of relion_reconstruct on one thread; None where it is not installed."""
    program = shutil.which("relion_reconstruct")
    if program is None:
        return None
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        used = []
        for count in counts:
            images = rng.standard_normal((count, box, box)).astype(np.float32)
            mrc.write_stack(Path(folder) / f"{count}.mrcs", images, PIXEL_SIZE)
            angles = torch.stack(euler_from_matrix(random_rotations(count)), dim=1).tolist()
            rows = "\n".join(
                f"{i + 1:06d}@{count}.mrcs 1 {a[0]:.4f} {a[1]:.4f} {a[2]:.4f} 1.5 -0.7 {12000 + 10 * i} {11800 + 10 * i} 30"
                for i, a in enumerate(angles)
            )
            names = "ImageName OpticsGroup AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst DefocusU DefocusV DefocusAngle"
            optics = f"data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n_rlnImageDimensionality\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n1 {PIXEL_SIZE} {box} 2 300 2.7 0.07\n\n"  # noqa: E501
            heads = "\n".join(f"_rln{name}" for name in names.split())
            Path(folder, f"{count}.star").write_text(f"{optics}data_particles\n\nloop_\n{heads}\n{rows}\n\n")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [program, "--i", f"{count}.star", "--o", "out.mrc", "--ctf", "--skip_gridding"],
                cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return (counts[1] - counts[0]) / (used[1] - used[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, nargs="*", default=[96, 192])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    for box in args.box:
        count = max(64, 40000 // box)
        # many more for the peer: its start and its gridding iterations take as long as a thousand images
        peer = relion(box, (count, 12 * count)) if args.device == "cpu" else None
        for threads in sorted({1, cores}) if args.device == "cpu" else [1]:
            torch.set_num_threads(threads)
            rate = copy_rate(args.device)
            found = one(box, count, threads, args.device)
            k = found.pop("coefficients")
            print(f"box {box}, {args.device}, {threads} threads, copy {rate / 1e9:.1f} GB/s")
            for name, images in found.items():
                bytes_moved = k * 27 * (32 if "insert" in name else 8)  # read and write of 16 bytes, or read of 8
                floor = rate / bytes_moved
                line = f"  {name:<24} {images:9.0f} images/s   floor {floor:9.0f}   ratio {floor / images:5.2f}"
                if peer and name == "insert":
                    line += f"   relion_reconstruct {peer:6.0f} /s and core: {images / peer:.2f} times"
                print(line, flush=True)


if __name__ == "__main__":
    main()
