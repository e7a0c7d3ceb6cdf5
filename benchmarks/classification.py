"""Mixtures of particles taken apart: how well classes come back, what is proposed where there is nothing, and what it costs.

    python benchmarks/classification.py FOLDER DATA [--mode mixture same unrelated] [--seed 1] [--map splice_3A.mrc]

DATA holds maps/. Each mode makes a project of simulated tilt series in FOLDER (with --generate-only, no more than that):
`mixture`, 300 particles of three kinds: the map, the map without a domain of a tenth of its mass, and with that domain turned
by 30°; `same`, 300 of one kind; `unrelated`, GroEL and apoferritin 1:3. Particles are cut out binned by 2, at poses that
emc_refine finds from random ones with the first map at 50 Å, and at the true ones.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from commands import Parameters, program
from refinement import Data, Poses, made, set_at, true_poses
from torch import Tensor

from libemc.io import mrc
from libemc.methods import postprocess
from libemc.numerics.grids import centred_coordinates
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations

SHARE, TURN = 0.1, 30.0
"""Part of the mass that the domain has, and degrees by which it is turned about its centre of mass."""
EDGE = 2.0
"""Voxels over which the cut through the map is smeared."""
BINNING = 2


@dataclass(frozen=True)
class Mixture(Data):
    """Of several maps.

    Attributes:
        maps: files; fractions: their shares.
        size: pixels along each side of an image.
    """

    maps: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    size: int = 800

    @property
    def folder(self) -> str:
        """Name of the project."""
        return f"{self.particle}_{self.count}in{self.series}_seed{self.seed}"

    def simulated(self, number: int) -> Parameters:
        """Options of emc_simulate for one series: as those of the conf series, with the simulator's own motion."""
        return {
            "map": list(self.maps),
            "fractions": ",".join(f"{f:g}" for f in self.fractions),
            "size": [self.size, self.size],
            "pixel-size": self.pixel_size,
            "tilt-range": [-60, 60, 3],
            "dose": 3.0,
            "thickness": 800.0,
            "count": self.count // self.series + (number < self.count % self.series),
            "defocus": 26000 + 4000 * number,
            "seed": 1000 * self.seed + number,
        }


def cut(density: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A map (n, n, n) in two, by a soft plane across a direction (3,) (x, y, z) beyond which `SHARE` of its mass lies."""
    z, y, x = centred_coordinates(density.shape)
    along = direction[0] * x + direction[1] * y + direction[2] * z
    order = along.reshape(-1).argsort(descending=True)
    beyond = density.clamp_min(0).reshape(-1)[order].double().cumsum(0)
    level = along.reshape(-1)[order][int((beyond < SHARE * beyond[-1]).sum())]
    domain = density * torch.sigmoid((along - level) * 4 / EDGE).to(density)
    return density - domain, domain


def turned(domain: Tensor, rotation: Tensor) -> Tensor:
    """A domain turned by (3, 3) about its own centre of mass."""
    mass = domain.clamp_min(0).double()
    z, y, x = centred_coordinates(domain.shape)
    centre = torch.stack([(mass * c).sum() / mass.sum() for c in (x, y, z)])
    return postprocess.place(domain, rotation, (centre - rotation @ centre).tolist())


def variants(path: Path, folder: Path, seed: int) -> tuple[str, ...]:
    """Files of a map as it is, without a domain, and with the domain turned; which domain, and how turned, by the seed."""
    array, pixel_size = mrc.read_volume(path)
    density = torch.from_numpy(array)
    g = torch.Generator().manual_seed(seed)
    frame = random_rotations(1, g)[0]
    rest, domain = cut(density, frame[0])
    other = rest + turned(domain, matrix_from_rotvec(TURN * frame[1]))
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, volume in (("whole", density), ("without", rest), ("turned", other)):
        names.append(str((folder / f"{path.stem}_{name}_{seed}.mrc").resolve()))
        mrc.write_volume(names[-1], volume.float().numpy(), pixel_size)
    return tuple(names)


def data_of(mode: str, args: argparse.Namespace) -> Mixture:
    """What is simulated for a mode."""
    maps, seed = args.data / "maps", args.seed
    common = {"pixel_size": 3.0, "motion": 0.5, "seed": seed}
    if mode == "unrelated":
        files = tuple(str((maps / f"{name}_3A.mrc").resolve()) for name in ("groel", "apof"))
        return Mixture(particle="groel_apof", count=200, series=2, box=40, maps=files, fractions=(1, 3), **common)
    array, _ = mrc.read_volume(maps / args.map)
    box = math.ceil(0.56 * len(array) / 2) * 2
    made_of = variants(maps / args.map, args.folder / "maps", seed)
    stem = Path(args.map).stem
    if mode == "same":
        return Mixture(
            particle=f"{stem}_same", count=300, series=5, box=box, maps=made_of[:1], fractions=(1,), **common
        )
    return Mixture(particle=f"{stem}_mix", count=300, series=5, box=box, maps=made_of, fractions=(1, 1, 1), **common)


def sets(home: Path, data: Mixture) -> None:
    """The particles at true poses, `known`, and at those that emc_refine finds, `own`, of a set cut out once."""
    if not (home / "particles/start/particles.json").exists():
        argv = ["emc_extract", "--all", "--label", "start", "--set", "start", "--box", data.box, "--bin", BINNING]
        program([*map(str, argv), "--quiet"], home, home / "log")
    if not (home / "particles/known/particles.json").exists():
        found = Poses.of("start", home)
        set_at(home, "start", "known", true_poses(home, data).among(found.ids))
    if not (home / "own/average.mrc").exists():
        argv = ["emc_refine", "start", "--reference", data.maps[0], "--startres", 50, "--path", "own", "--quiet"]
        cost = program([*map(str, argv), "--overwrite"], home, home / "log", threads=1)
        print(f"emc_refine: {cost.seconds:.0f} CPU-s", flush=True)


def main() -> None:
    """Make data and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--mode", nargs="+", default=["mixture", "same", "unrelated"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--map", default="splice_3A.mrc")
    parser.add_argument("--generate-only", action="store_true")
    args = parser.parse_args()
    for mode in args.mode:
        data = data_of(mode, args)
        home = made(args.folder, data)
        sets(home, data)


if __name__ == "__main__":
    main()
