"""The CTF of a tilt series of a project: the record that says so, the pictures that show it, and the hand in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from libemc import records
from libemc.cli import Run
from libemc.io import mrc
from libemc.methods import mirror
from libemc.methods.align import coarse
from libemc.methods.estimate_ctf.estimate import DEFAULT_HAND, Estimate, Hand, estimate
from libemc.methods.subtilts import TiltGeometry
from libemc.project import Images
from libemc.records import Alignment, TiltSeriesRecord
from libemc.view.ctf import ctf_plots, ring_plots, spectra_picture

FLAT = 1.0  # degrees: images that are tilted less need no alignment


def geometry(record: TiltSeriesRecord) -> Alignment:
    """The alignment of a record, or the nominal one of images that aren't tilted.

    Raises:
        InputError: the images are tilted, and there's no alignment.
    """
    if record.alignment is None and max(abs(t) for t in record.tilts.nominal) < FLAT:
        return coarse.nominal(record, record.source.tilt_axis or 0.0)
    return records.need(record, "alignment")


def measure(record: TiltSeriesRecord, stack: mrc.MrcImages, phase_plate: bool, run: Run) -> Estimate:
    """The CTF of a tilt series, as its images tell."""
    load = Images(stack, f"exclude that tilt in {records.tiltseries_path(record.name)}", blank=False)
    placed = TiltGeometry.of(geometry(record), record.tilts.use)
    return estimate(
        load.__getitem__, record, placed, phase_plate, lambda part: run.log.info("%s: %s done", record.name, part)
    )


def save(path: Path, record: TiltSeriesRecord, found: Estimate, run: Run) -> TiltSeriesRecord:
    """Write the CTF into the record, and draw it.

    Where the alignment leaves the hand open and the rings decide it, the specimen is turned to where the defocus
    falls with height, which is the default of this suite, of RELION and of CETS.

    Returns:
        The record as saved.
    """
    opened = record.alignment is not None and record.alignment.hand_open

    def change(old: TiltSeriesRecord) -> TiltSeriesRecord:
        tilt = old.ctf.beam_tilt if old.ctf else None  # rings don't tell it
        new = old.model_copy(update={"ctf": found.ctf.model_copy(update={"beam_tilt": tilt})})
        if not (opened and found.hand.decided):
            return new
        if found.hand.sign != DEFAULT_HAND:
            new = mirror.mirrored(new)
        return new.model_copy(
            update={"alignment": records.need(new, "alignment").model_copy(update={"hand_open": False})}
        )

    records.update(path, change, TiltSeriesRecord)
    after = change(record)
    if opened and found.hand.decided and found.hand.sign != DEFAULT_HAND:
        run.warn(mirror.summary(record, after))
    _warn(after, found, run)
    folder, rings = Path("tomograms") / f"{record.name}_ctf", found.rings
    pictures = [run.output(folder / name, owned=True) for name in ("rings.png", "spectra.png", "ctf.png")]
    shown = record.model_copy(update={"ctf": found.ctf, "alignment": geometry(record)})
    ring_plots(shown, pictures[0], rings.k, rings.angle, rings.measured, rings.fitted, rings.error)
    spectra_picture(shown, pictures[1], rings.k, rings.angle, rings.measured, rings.fitted)
    ctf_plots(shown, pictures[2], rings.defocus, rings.score)
    return after


def _warn(record: TiltSeriesRecord, found: Estimate, run: Run) -> None:
    ctf = found.ctf
    weak = [j for j, (m, use) in enumerate(zip(ctf.measured or (), record.tilts.use, strict=True)) if use and not m]
    if weak:
        angles = ", ".join(f"{record.tilts.nominal[j]:g}°" for j in weak)
        run.warn(f"{record.name}: no rings of their own, the defocus is the series': {angles}")
    if not found.hand.decided and len(record.tilts.use) > 1:
        run.warn(f"{record.name}: the hand is undecided ({found.hand.score:.2f}), {found.hand.sign:+d} is taken")


def summary(record: TiltSeriesRecord) -> str:
    """One line: defocus, astigmatism, phase shift, hand, resolution."""
    ctf = records.need(record, "ctf")
    used = [j for j, use in enumerate(record.tilts.use) if use]
    u, v = np.array(ctf.defocus_u)[used], np.array(ctf.defocus_v)[used]
    mean, limits = (u + v) / 2, [ctf.resolution[j] for j in used] if ctf.resolution else []
    seen = [x for x in limits if x is not None]
    words = [f"defocus {np.median(mean) / 1e4:.3f} µm ({mean.min() / 1e4:.3f} to {mean.max() / 1e4:.3f})"]
    words.append(f"astigmatism {np.median(u - v):.0f} Å at {np.median(np.array(ctf.angle)[used]):.0f}°")
    if any(ctf.phase_shift):
        words.append(f"phase shift {np.median(np.array(ctf.phase_shift)[used]):.0f}°")
    words.append(f"hand {ctf.defocus_handedness:+d} ({ctf.handedness_score or 0:.2f})")
    if seen:
        words.append(f"rings to {np.median(seen):.1f} Å")
    return f"{record.name}: {', '.join(words)}; {sum(ctf.measured or ())} of {len(used)} tilts measured"


def hand_in_words(record: TiltSeriesRecord, hand: Hand) -> str:
    """What the rings say about the hand, why, and what to do."""
    lines = [
        f"{record.name}: log-odds {abs(hand.odds):.1f} for hand {hand.sign:+d}, {abs(hand.spread):.1f} standard deviations "
        f"between tilts, score {hand.score:.2f}"
    ]
    if not hand.decided:
        lines.append(
            "  Undecided. Higher tilts, a larger field or more dose would tell; series of the same session have the same hand."
        )
    elif hand.sign == DEFAULT_HAND:
        lines.append("  The defocus falls with height (z) in the specimen as it is aligned: nothing is to be done.")
    else:
        lines.append(
            "  The defocus rises with height (z) in the specimen as it is aligned. With most microscopes the tilt axis is\n"
            "  then 180° off, or the tilt angles have the wrong sign, and tomograms and maps are mirror images:\n"
            f"  emc_tomoctf {record.name} --flip"
        )
    return "\n".join(lines)
