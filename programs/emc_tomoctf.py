#!/usr/bin/env python3
"""Estimate the CTF of tilt series: defocus, astigmatism and phase shift of every tilt, and the hand.

Power spectra of overlapping tiles, each at its own height in the aligned specimen, are fitted together by one model of the
whole series. Every tilt gets an error; one without rings of its own has the series' values, and `measured` says so.
The defocus is sought from 0.3 to 10 µm. Tilted images must be aligned first (emc_tomogram --align-only).

The hand is the sign with which the defocus changes with height. Where the alignment had to guess the direction of the tilt
axis, it's decided here: the specimen is turned to where the defocus falls with height. --check-hand says what the rings
tell about it, and saves nothing. --flip turns an aligned series to its mirror image: axis, landmarks, picks and
hand; its tomograms and particles are then to be made again. Pictures are in tomograms/NAME_ctf.

    emc_tomoctf TS_01
    emc_tomoctf --all --overwrite
    emc_tomoctf TS_01 --phase-plate
    emc_tomoctf TS_01 --check-hand
"""

from __future__ import annotations

import argparse
from pathlib import Path

from libemc import ctfs, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import mirror
from libemc.project import open_raw_stack
from libemc.records import TiltSeriesRecord

SECONDS = 8e-9
"""Per pixel of a tilt series."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.tiltseries_names(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check-hand", action="store_true", help="only say what the rings tell about the hand")
    what.add_argument("--flip", action="store_true", help="only turn the series to its mirror image")
    parser.add_argument("--phase-plate", action="store_true", help="look for a phase shift too, which may drift")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check all tilt series, then estimate one after the other."""
    if args.flip and args.phase_plate:
        raise InputError("--phase-plate has no meaning with --flip", remedy="leave it out")
    paths = run.tiltseries(args)
    if args.flip:
        flip(paths, run)
        return
    series = [(path, *checked(records.load_tiltseries(path), args, run)) for path in paths]
    pixels = sum(record.source.shape[0] * record.source.shape[1] * record.source.shape[2] for _, record, _ in series)
    if run.plan(f"estimate the CTF of {len(series)} tilt series", 5 * len(series) + pixels * SECONDS, 1e9):
        return
    for path, record, stack in series:
        found = ctfs.measure(record, stack, args.phase_plate, run)
        if args.check_hand:
            run.result(ctfs.hand_in_words(record, found.hand))
        else:
            run.result(ctfs.summary(ctfs.save(path, record, found, run)))


def checked(record: TiltSeriesRecord, args: argparse.Namespace, run: Run) -> tuple[TiltSeriesRecord, mrc.MrcImages]:
    """The record and its stack; nothing that follows may fail for what a user could have known."""
    if record.ctf is not None and not (run.overwrite or args.check_hand):
        remedy = "give --overwrite to replace it, or --check-hand to look at the hand only"
        raise InputError("has a CTF already", records.tiltseries_path(record.name), remedy)
    ctfs.geometry(record)
    run.input(record.source.stack)
    if not any(record.tilts.use):
        raise InputError("no tilt is used", records.tiltseries_path(record.name), "include some of them")
    return record, open_raw_stack(record)


def flip(paths: list[Path], run: Run) -> None:
    """Turn tilt series to their mirror images."""
    before = [records.load_tiltseries(path) for path in paths]
    for record in before:
        records.need(record, "alignment")
    if run.plan(f"turn {len(paths)} tilt series to their mirror images"):
        return
    for path, record in zip(paths, before, strict=True):
        records.update(path, mirror.mirrored, TiltSeriesRecord)
        run.result(mirror.summary(record, mirror.mirrored(record)))


program = Program(
    doc=__doc__, name="emc_tomoctf", arguments=arguments, main=main,
    standard=("threads", "overwrite", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
