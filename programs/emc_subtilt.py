#!/usr/bin/env python3
"""Refine every image of every particle by itself: its shift, turn and defocus, and how much it counts.

Begins from a run of emc_refine. Each half of the particles is fitted to the reference of its own half, all images of a tilt
series together: what neighbours in the image have in common, what goes on along the exposures and what is an image's own are
told apart by how well images are foretold that had no part in the fit. What doesn't foretell them better is left alone, so
the worst answer is no change. Images that fit much worse than others of their tilt are left out, the others weighed. Writes
average.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.json, pictures, index.html, run.json and the particles into a numbered folder;
emc_average, emc_refine --local, emc_export and emc_tomocpr take the corrections as they are there.

    emc_subtilt spt_00
    emc_subtilt spt_00 --keep 0.8                      # the worst fifth of each tilt is left out
    emc_subtilt spt_00 --fit shift --iterations 1      # no turns, no defocus
    emc_subtilt spt_00 --path sub_00 --resume          # go on where it stopped, with the next tilt series
"""

from __future__ import annotations

import argparse

from libemc import joint_pages, joint_refinements, project
from libemc.cli import Program, Run, options
from libemc.methods.joint import levels

FITS = {
    "shift": (levels.SHIFT, levels.MOTION, levels.FIELD, levels.OWN_SHIFT),
    "turn": (levels.ANGLES, levels.OWN_TURN),
    "defocus": (levels.DEFOCUS, levels.HEIGHT, levels.OWN_DEFOCUS),
}
"""What may be fitted, and the levels of it."""
KEPT = ("run", "fit", "keep", "mask", "symmetry", "filter")
"""Options that a resumed run must repeat."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("run", metavar="RUN", help="folder of a run with half maps, of emc_refine or emc_subtilt")
    parser.add_argument("--fit", type=options.some_of(FITS), default=",".join(FITS), metavar="WHAT",
                        help="what may be corrected, with commas between")  # fmt: skip
    options.keep(parser)
    options.mask(parser)
    options.symmetry(parser, default=None)
    options.filter(parser, default="spherical")
    options.iterations(parser)
    options.path(parser)


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, then iterate, with all of the state in the run's folder after each tilt series."""
    inputs = [run.particles(args.run), *map(run.input, filter(None, [args.mask]))]
    kind = joint_refinements.open_kind(args.run, args.mask, args.symmetry)
    wanted = tuple(level for name in args.fit for level in FITS[name])
    plan = joint_refinements.Plan(
        levels=wanted, by_half=True, keep_corrections=levels.MOTION not in wanted, constrained=False, weighed=True,
        keep=args.keep, filter=args.filter,
    )  # fmt: skip
    images = sum(int(p.shown.sum()) for p in kind.series.values())
    if run.plan(f"refine {images} images of {len(kind.series)} tilt series", disk=6 * 4 * kind.head.box**3):
        return
    kept = project.plain({name: getattr(args, name) for name in KEPT})
    begun = joint_refinements.begin([kind], args.path, "sub", kept, run)

    def save(stopped_at: str | None) -> None:
        used = {**kept, "iterations": args.iterations}
        project.save_run(begun.record, run.name, used, run.seed, begun.state, inputs, stopped_at)

    (done,) = joint_refinements.refine(begun, plan, args.iterations, save, run)
    title = f"{done.folder}: {done.made.resolution:.2f} Å"
    joint_pages.write_page(done, title, kept, begun.state, wanted, run)
    run.result(f"{title} at FSC 0.143, {images} images")


program = Program(
    doc=__doc__,
    name="emc_subtilt",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
