#!/usr/bin/env python3
"""Run the whole chain on a small simulated data set, and compare what comes out with the truth.

In the new folder DIR two tilt series of two kinds of particles are simulated, imported, aligned and reconstructed, and their
particles found, cut out, made into a model, found again with it, refined, sorted into classes, placed back and exported. Each
command is printed before it runs, as it can be typed in DIR; DIR/commands.sh has all. Last comes a table of what was found and
what is true, and a list of the pictures; DIR/index.html shows both. Nothing else has seen the truth. It takes some minutes on
two cores.

    emc_demo                         # in ./emc_demo
    emc_demo /tmp/look --quick       # a smaller one: one tilt series, about two minutes
    emc_demo --dry-run               # only print the commands
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from libemc import demonstration
from libemc.cli import Program, Run
from libemc.cli.commands import execute
from libemc.errors import InputError
from libemc.io.files import read_text, write_text

SCRIPT = "commands.sh"
FIRST_LINES = "#!/bin/sh\n# By emc_demo.\nset -e"
"""What a folder of this program's has in it, and how that begins: no other folder is ever emptied."""


@dataclass(frozen=True)
class Size:
    """How much is simulated: pixels of an image, degrees between tilts, particles of a tilt series, tilt series."""

    side: int
    step: int
    count: int
    series: int

    @property
    def names(self) -> list[str]:
        """The tilt series."""
        return [f"demo_{k + 1:02d}" for k in range(self.series)]


FULL, QUICK = Size(480, 4, 36, 2), Size(288, 6, 16, 1)

STEPS = (
    ("Tilt series of known particles in ice, with all that a microscope does to them; and the truth",
     "emc_simulate raw/{name} --particle emc --particle emc-nohead --fractions 2,1 --size {side} {side} --pixel-size 6 --box 54 "
     "--count {count} --tilt-range -60 60 {step} "
     "--dose 3.5 --thickness 600 --defocus {defocus} --seed {seed} --map-out raw/{name}_map.mrc"),
    ("Begin a project: angles and doses are found beside the stacks",
     "emc_import {stacks}"),
    ("Align without markers, and reconstruct",
     "emc_tomogram --all --bin 4 --thickness 900"),
    ("Estimate the CTF, which decides the hand that the alignment leaves open where no axis is given",
     "emc_tomoctf --all"),
    ("Reconstruct again, the CTF corrected",
     "emc_tomogram --all --load --bin 2 --thickness 900 --ctf wiener --lowpass 60"),
    ("What is known of the particles is their size: look for balls of it",
     "emc_volume tomograms/{first}_bin4.mrc cube.mrc --box 24",
     "emc_mask cube.mrc --sphere 90 --edge 40 --output ball.mrc",
     "emc_tempmatch --all --template ball.mrc --label ball --resolution 60 --step 60 --expected-false 3"),
    ("Cut out what was found, and make a model of it from nothing",
     "emc_extract --all --label ball --set ball --box 54",
     "emc_sgd ball --path sgd_00"),
    ("With that as the template, find the particles",
     "emc_tempmatch --all --template sgd_00/class1.mrc --label emc --step 24"),
    ("Cut the particles out of the raw images; keep what is certain and no duplicate",
     "emc_extract --all --label emc --set emc --box 54",
     "emc_select emc --set good --z-above 8 --distance 60"),
    ("Find orientations, positions and how the particles moved",
     "emc_refine good --reference sgd_00/class1.mrc --startres 45 --path spt_00"),
    ("Refine the tilt series from their particles, then every image by itself",
     "emc_tomocpr spt_00 --path cpr_00",
     "emc_subtilt cpr_00 --path sub_00"),
    ("How do the particles differ, and which are alike?",
     "emc_pca sub_00 --path pca_00",
     "emc_cluster pca_00"),
    ("The final map of the largest class, each place filtered by its own resolution",
     "emc_select pca_00 --class 1 --set first",
     "emc_mask pca_00/class_1.mrc --lowpass 20",
     "emc_average first --path final --mask mask.mrc --filter local"),
    ("How good is it?",
     "emc_fsc final/half1.mrc final/half2.mrc --mask mask.mrc --output fsc"),
    ("Where is what? The classes back in their tomograms",
     "emc_mapback pca_00 --mesh"),
    ("On with it: to RELION, and the commands that made the map",
     "emc_export sub_00 --format relion31",
     "emc_info sub_00 --history",
     "emc_info sub_00/average.mrc --replay > again.sh"),
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path("emc_demo"), metavar="DIR", help="folder to make")
    parser.add_argument("--quick", action="store_true", help="one small tilt series")


def commands(size: Size, seed: int) -> Iterator[tuple[str, str]]:
    """Each command after the text that it belongs to; those of one tilt series once for each."""
    common = {"side": size.side, "step": size.step, "count": size.count, "first": size.names[0],
              "stacks": " ".join(f"raw/{name}.mrc" for name in size.names)}  # fmt: skip
    for text, *templates in STEPS:
        for template in templates:
            for k, name in enumerate(size.names if "{name}" in template else size.names[:1]):
                # the CTF of each tilt series has its zeros where the other has none
                yield text, template.format(**common, name=name, defocus=25000 + 10000 * k, seed=seed + k)


def main(args: argparse.Namespace, run: Run) -> None:
    """Make the folder, run all commands in it, and say what came out."""
    size, folder = (QUICK if args.quick else FULL), args.folder
    todo = list(commands(size, run.seed))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / SCRIPT).is_file() or not read_text(folder / SCRIPT).startswith(FIRST_LINES):
            raise InputError("is not a folder that emc_demo has made", folder, "name one that does not exist")
        if not run.overwrite:
            raise InputError("is not empty", folder, "give --overwrite to make all of it again, or name another folder")
    plan = f"{folder}: {len(todo)} commands on {size.series} tilt series of {size.count} particles"
    if run.plan(plan, disk=size.series * 3 * size.side**2 * 31 * 4):
        run.result("\n".join(command for _, command in todo))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    write_text(folder / SCRIPT, FIRST_LINES + "".join(f"\n{command}" for _, command in todo) + "\n")
    run.result(f"$ cd {shlex.quote(str(folder))}")
    rows, chapters = [demonstration.HEAD], [text for text, *_ in STEPS]
    for before, (text, command) in zip(["", *(text for text, _ in todo)], todo, strict=False):
        if text != before:
            run.result(f"\n== {chapters.index(text) + 1} of {len(chapters)}: {text}")
        run.result(f"$ {command}")
        execute(command, folder, run.threads)
        if command.startswith("emc_tomogram --all --bin"):
            rows += [demonstration.alignment_row(folder, name) for name in size.names]
        elif command == "emc_tomoctf --all":
            rows += [demonstration.defocus_row(folder, name) for name in size.names]
    rows += demonstration.result_rows(folder, size.names)
    demonstration.write_page(folder, rows, size.names)
    run.result("\n== What came out")
    run.result(demonstration.table(rows))
    run.result("\n    ".join(["\nPictures:", *map(str, sorted(folder.rglob("*.png")))]))


program = Program(
    doc=__doc__,
    name="emc_demo",
    arguments=arguments,
    main=main,
    standard=("threads", "overwrite", "seed", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
