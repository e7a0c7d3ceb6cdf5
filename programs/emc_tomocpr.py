#!/usr/bin/env python3
"""Refine tilt series from their particles: geometry, motion and CTF that make all particles of all kinds fit better.

RUN is a run of emc_refine or emc_subtilt; several, one for each kind of particle in the same tilt series, are taken together.
What is refined: of each tilt shift, axis, tilt, off-axis tilt, magnification and defocus; motion of the specimen along the
exposure, and deformation of the images, as smooth as neighbours say; positions and orientations; the hand, astigmatism and
beam tilt. Each level is switched on where it makes images better foretold that had no part in the fit. Images are compared
with the prediction of all particles in them. Writes the run's folder as emc_refine does (with several kinds, a folder within
it for each) and the new alignment and CTF into the records of the tilt series; the old ones are kept there, and in before/.

    emc_tomocpr spt_00
    emc_tomocpr ribo/spt_03 fas/spt_01 --path cpr_00       # two kinds of particle
    emc_tomocpr spt_00 --refine ctf                        # defocus and astigmatism alone
    emc_tomocpr spt_00 --dry-run                           # what would change
    emc_tomogram --all --load --bin 8                      # tomograms with what was found
    emc_import --alignment cpr_00/before/TS_01.json TS_01 --overwrite  # back to what was before
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libemc import joint_pages, joint_refinements, project, tiltseries_updates
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.joint_refinements import Kind, Outcome
from libemc.methods.joint import levels
from libemc.methods.joint.fit import Member

FITS = {
    "geometry": (levels.SHIFT, levels.ANGLES, levels.MAGNIFICATION, levels.FIELD),
    "motion": (levels.MOTION,),
    "ctf": (levels.DEFOCUS, levels.HEIGHT, levels.ASTIGMATISM),
}
"""What may be refined, and the levels of it."""
ORDER = (levels.SHIFT, levels.MOTION, levels.ANGLES, levels.MAGNIFICATION, levels.FIELD, *FITS["ctf"])
"""In which levels are tried."""
KEPT = ("runs", "refine", "alone", "mask", "symmetry", "filter")
"""Options that a resumed run must repeat."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs with half maps, one for each kind")
    parser.add_argument("--refine", type=options.some_of(FITS), default=",".join(FITS), metavar="WHAT",
                        help="what may be changed, with commas between")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="compare images with the prediction of one particle alone")
    parser.add_argument("--no-record", action="store_true", help="leave the records of the tilt series as they are")
    options.mask(parser)
    options.symmetry(parser, default=None)
    options.filter(parser, default="spherical")
    options.iterations(parser)
    options.path(parser)


def show(kinds: Sequence[Kind], plan: joint_refinements.Plan, run: Run) -> None:
    """What one iteration would change, with nothing written."""
    made = [joint_refinements.referenced(joint_refinements.averaged(kind, run), plan.filter, run) for kind in kinds]
    choices, _ = joint_refinements.chosen(made, plan, run)
    for name in sorted({name for kind in made for name in kind.series}):
        _, members = joint_refinements.members_of(made, name)
        out = joint_refinements.fit_series(members, plan, choices, Path(), run)
        run.result(tiltseries_updates.lines(name, tiltseries_updates.change_of(members, out, choices)))


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, iterate with all of the state in the run's folder, then write geometry, particles and records."""
    if len(args.runs) > 1 and (args.mask or args.symmetry):
        raise InputError("are for one kind of particle", "--mask, --symmetry", "leave them out: each run has its own")
    inputs = [*map(run.particles, args.runs), *map(run.input, filter(None, [args.mask]))]
    kinds = [joint_refinements.open_kind(name, args.mask, args.symmetry) for name in args.runs]
    joint_refinements.check_kinds(kinds)
    before = tiltseries_updates.current(kinds, not args.no_record, args.path if run.resume else None)
    wanted = tuple(level for level in ORDER if any(level in FITS[name] for name in args.refine))
    plan = joint_refinements.Plan(
        levels=wanted, by_half=False, keep_corrections=levels.MOTION not in wanted, constrained=not args.alone,
        weighed=False, keep=None, filter=args.filter,
    )  # fmt: skip
    names = sorted({name for kind in kinds for name in kind.series})
    what = f"refine {len(names)} tilt series from {sum(int(p.use.sum()) for k in kinds for p in k.series.values())} particles"
    if run.plan(what, disk=sum(6 * 4 * k.head.box**3 for k in kinds)):
        return show(kinds, plan, run)
    kept = project.plain({name: getattr(args, name) for name in KEPT})
    begun = joint_refinements.begin(kinds, args.path, "cpr", kept, run)
    tiltseries_updates.count_replaced(before, begun)

    def save(stopped_at: str | None) -> None:
        used = {**kept, "no_record": args.no_record, "iterations": args.iterations}
        project.save_run(begun.record, run.name, used, run.seed, begun.state, inputs, stopped_at)

    def finished(name: str, there: list[Kind], members: list[Member], out: Outcome, choices: Any) -> dict[str, Any]:
        past = [i["series"].get(name) for i in begun.state["iterations"] if i["kept"] and plan.keep_corrections]
        return tiltseries_updates.change_of(members, out, choices, plan.keep_corrections, past[-1] if past else None)

    begun = tiltseries_updates.with_hand(begun, "ctf" in args.refine, args.filter, run)
    done = joint_refinements.refine(begun, plan, args.iterations, save, run, finished)
    done = tiltseries_updates.settle(begun, done, args.filter, run, save)
    if not args.no_record:
        tiltseries_updates.update_records(before, done, begun, run)
    for kind in done:
        title = f"{kind.folder}: {kind.made.resolution:.2f} Å"
        joint_pages.write_page(kind, title, kept, begun.state, wanted, run, before)
        run.result(f"{title} at FSC 0.143")
    for name, report in sorted(tiltseries_updates.reports(begun.state).items()):
        run.result(tiltseries_updates.lines(name, report))
    for line in tiltseries_updates.optics_lines(begun.state):
        run.result(line)


program = Program(
    doc=__doc__,
    name="emc_tomocpr",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
