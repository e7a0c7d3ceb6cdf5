"""How often the symmetry of a noisy map is found, and from which resolution on it can't be told.

    python benchmarks/symmetry.py MAPS [--draws 20] [--names c3,groel] [--resolutions 20,25,40] [--single] [--seed 1]

MAPS is the folder of `apof_3A.mrc`, `groel_3A.mrc` and `splice_3A.mrc` (O, D7, C1); the other maps are those of the
built-in particle with a group. Each draw turns the map at random, shifts it by up to 10 Å and adds white noise to two
halves, of such a power that their FSC is 0.143 at 15 to 25 Å. With --single the function gets the halves' mean alone. A
line for each map and resolution: how often the right group was chosen, and what else was; the lowest score (worst
operator) of the right group, and the highest of a group that isn't one of its subgroups, over all draws; the largest
error of the operators' rotations, degrees, and of the centre (across the axis, for Cn), Å, where the group was right and
the truth is known (the built-in particle); and the mean CPU time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from libemc.io import mrc
from libemc.methods import phantom, postprocess
from libemc.methods.find_symmetry import GROUPS, GroupScore, find_symmetry
from libemc.numerics import fourier
from libemc.numerics.grids import rfft_radius
from libemc.numerics.rotations import random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetry_matrices

PIXEL_SIZE, BOX = 6.0, 56
FARTHEST = 10.0  # Å
LIMITS = 15.0, 25.0  # Å, where the FSC of the halves is
GOLD_STANDARD = 0.143
FILES = {"apof": "o", "groel": "d7", "splice": "c1"}
NAMES = (*FILES, "c1", "c3", "c4", "c7", "d2", "d7", "t", "o", "i")
SUBGROUPS = {"t": ("c2", "c3", "d2"), "o": ("c2", "c3", "c4", "d2", "d3", "d4", "t"),
             "i": ("c2", "c3", "c5", "d2", "d3", "d5", "t")}  # fmt: skip


def true_map(name: str, folder: Path) -> tuple[Tensor, str]:
    """A map with room to turn in, and its group."""
    if name not in FILES:
        return phantom.density(phantom.particle("emc", name), BOX, PIXEL_SIZE), name
    array, pixel_size = mrc.read_volume(folder / f"{name}_3A.mrc")
    side = max(96, array.shape[0] + 24)
    volume = fourier.centre_pad(torch.from_numpy(array).float(), (side,) * 3)
    return postprocess.resample(volume, PIXEL_SIZE / pixel_size), FILES[name]


def draw(volume: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy halves (2, n, n, n) of the map turned and shifted, the rotation, and the shift in Å."""
    rotation, direction = random_rotations(2, generator)
    shift = direction[0] * FARTHEST * torch.rand(1, generator=generator, dtype=torch.float64)
    moved = postprocess.place(volume, rotation, (shift / PIXEL_SIZE).tolist())
    limit = LIMITS[0] + (LIMITS[1] - LIMITS[0]) * float(torch.rand(1, generator=generator))
    at_limit = (rfft_radius(moved.shape) * limit / PIXEL_SIZE - 1).abs() < 0.5 * limit / (moved.shape[0] * PIXEL_SIZE)
    power = float(torch.fft.rfftn(moved).abs().square()[at_limit].mean()) / moved.numel()
    deviation = math.sqrt(power * (1 - GOLD_STANDARD) / GOLD_STANDARD)
    noise = torch.randn((2, *moved.shape), generator=generator)
    return moved + deviation * noise, rotation, shift


def is_subgroup(small: str, large: str) -> bool:
    """Whether the operators of one group are among those of the other, in some setting."""
    if small in ("c1", large):
        return True
    if large in SUBGROUPS:
        return small in SUBGROUPS[large]
    n, m = (int(g[1:]) if g[1:] else 0 for g in (small, large))
    return n > 0 and (m % n == 0 or (small == "c2" and large[0] == "d")) and (small[0] == "c" or large[0] == "d")


def errors(found: GroupScore, rotation: Tensor, shift: Tensor) -> tuple[float, float]:
    """Degrees from the operators found to the nearest true ones, and Å from the centre (or axis) to the true one."""
    group = symmetry_matrices(found.group)
    ours, true = found.matrix @ group @ found.matrix.T, rotation @ group @ rotation.T
    angle = float(rotation_distance(ours[:, None], true[None]).amin(dim=1).max())
    off = torch.tensor(found.shift, dtype=torch.float64) - shift
    if found.group[0] == "c":
        axis = rotation[:, 2]
        off = off - axis * (axis @ off)
    return angle, float(off.norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--resolutions", default="20,25,40")
    parser.add_argument("--single", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print("map     Å   right  others chosen        right's  others'  angle  centre  CPU-s")
    for name in args.names.split(","):
        volume, group = true_map(name, args.maps)
        for resolution in map(float, args.resolutions.split(",")):
            generator = torch.Generator().manual_seed(args.seed)
            chosen: Counter[str] = Counter()
            right, wrong, off, start = [1.0], [-1.0], [(0.0, 0.0)], time.process_time()
            for _ in range(args.draws):
                maps, rotation, shift = draw(volume, generator)
                maps = maps.mean(dim=0, keepdim=True) if args.single else maps
                ranking = find_symmetry(maps, PIXEL_SIZE, resolution)
                chosen[ranking.chosen] += 1
                wrong.append(max(ranking.of(g).worst for g in GROUPS if not is_subgroup(g, group)))
                if group != "c1":
                    right.append(ranking.of(group).worst)
                    if ranking.chosen == group and name not in FILES:
                        off.append(errors(ranking.of(group), rotation, shift))
            took = (time.process_time() - start) / args.draws
            angle, centre = (max(values) for values in zip(*off, strict=True))
            others = " ".join(f"{g}:{n}" for g, n in chosen.most_common() if g != group) or "-"
            lowest = f"{min(right):7.2f}" if group != "c1" else "      -"
            print(
                f"{name:6s} {resolution:3.0f}  {chosen[group]:2d}/{args.draws:2d}  {others:20s} {lowest}  {max(wrong):7.2f}"
                f"  {angle:5.2f}  {centre:6.2f}  {took:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
