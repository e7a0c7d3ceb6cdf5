"""What a refinement of tilt series from particles writes: the changed alignments and CTFs in the records, and the particles in
the changed geometry. What was there before is kept in the record, and as a file that emc_import takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libemc import project, records
from libemc.cli import Run
from libemc.errors import InputError
from libemc.io.files import write_text
from libemc.joint_refinements import (
    SETTLED,
    Begun,
    Kind,
    Outcome,
    averaged,
    clear_parts,
    load_part,
    referenced,
    save_kind,
    save_part,
)
from libemc.methods.joint.fit import Member, scene_of
from libemc.methods.joint.levels import Choice
from libemc.methods.subtilts import Particles, TiltGeometry
from libemc.methods.tiltseries_refine import optics
from libemc.methods.tiltseries_refine.beam_tilt import fit_beam_tilt
from libemc.methods.tiltseries_refine.change import Bending, Change, aligned, deformation_of, focused, settled
from libemc.numerics.slices import Band
from libemc.records import Alignment, Deformation, Replaced, TiltSeriesRecord

SURE = 4.0
"""Standard errors from which a hand or a beam tilt counts."""
SAME = 1e-3
"""Degrees and Å within which two alignments are the same."""
COUNTS = "replaced"
"""Part of a run's state: how often each record had been changed before."""


def current(kinds: Sequence[Kind], to_update: bool, resumed: Path | None) -> dict[str, TiltSeriesRecord]:
    """The records of the tilt series of all kinds.

    Args:
        to_update: they are to be changed, so they must be there and have the alignment that the particles have; else only
            those that are there and have one.
        resumed: folder of the run that is gone on with; what it has changed already is given as it was before.

    Raises:
        InputError: there's no record, or it was aligned anew since.
    """
    out: dict[str, TiltSeriesRecord] = {}
    path = None if resumed is None else resumed / "run.json"
    counts = records.load(path, records.Run).state.get(COUNTS, {}) if path is not None and path.exists() else {}
    for kind in kinds:
        for name, particles in kind.series.items():
            if not to_update and not records.tiltseries_path(name).exists():
                continue
            record = out.get(name) or records.load_tiltseries(name)
            if (mine := _replaced_by(resumed, record, counts)) is not None:
                record = record.model_copy(update={"alignment": mine.alignment, "ctf": mine.ctf})
            if to_update:
                _check(records.need(record, "alignment"), particles, name)
            if record.alignment is not None and len(record.alignment.tilt) == len(particles.file.tilts.tilt):
                out[name] = record
    return out


def count_replaced(before: Mapping[str, TiltSeriesRecord], begun: Begun) -> None:
    """Note in a run's state how often the records had been changed when it began: by it they are changed once."""
    begun.state[COUNTS] = {name: len(r.replaced) for name, r in before.items()} | begun.state.get(COUNTS, {})


def _replaced_by(folder: Path | None, record: TiltSeriesRecord, counts: Mapping[str, int]) -> Replaced | None:
    """What a run has put other sections in the place of, if it has come so far; earlier ones may have had its folder."""
    new = record.replaced[counts.get(record.name, len(record.replaced)) :]
    return next((r for r in new if r.run == str(folder)), None)


def _check(alignment: Alignment, particles: Particles, name: str) -> None:
    file, raw = particles.file, particles.file.raw
    theirs: dict[str, Any] = {n: getattr(file.tilts, n) for n in ("axis", "tilt", "xtilt")}
    for n in ("shift_x", "shift_y"):
        known = getattr(file.tilts, n)
        theirs[n] = known if known is not None or raw is None else getattr(raw, n)
    for n, values in theirs.items():
        own = getattr(alignment, n)
        if values is not None and (len(own) != len(values) or np.abs(np.subtract(own, values)).max() > SAME):
            what = f"has another {n} than the particles of {file.set}: it was aligned anew"
            raise InputError(what, records.tiltseries_path(name), "extract and refine them again, or give --no-record")


def told_hand(kinds: Sequence[Kind], run: Run) -> tuple[list[Kind], dict[str, float]]:
    """The kinds with the hand that their images speak for, and by how much: log-likelihood for the other hand, its error."""
    gains = []
    for kind in kinds:
        gains += [optics.hand_gain([Member(p, kind.references)], run.memory) for p in kind.series.values()]
    gain = torch.cat(gains)
    value, error = float(gain.sum()), float((gain**2).sum().sqrt())
    if value > SURE * error:
        run.warn(
            f"the other hand fits better by {value:.0f} ± {error:.0f} in log-likelihood and is taken; if the map is a mirror "
            "image, turn the tilt series with emc_tomoctf --flip and begin again"
        )
        kinds = [replace(k, series={n: optics.other_hand(p) for n, p in k.series.items()}) for k in kinds]
    return list(kinds), {"gain": round(value, 2), "error": round(error, 2)}


def with_hand(begun: Begun, wanted: bool, filter: str, run: Run) -> Begun:
    """A run that begins, with the hand that its images speak for, where that is wanted; what they say is in its state."""
    begun.state["optics"] = wanted
    if not wanted or begun.state.get("iterations"):
        return begun
    kinds, told = told_hand([referenced(averaged(k, run), filter, run) for k in begun.kinds], run)
    begun.state["hand"] = told
    return replace(begun, kinds=kinds)


def told_beam_tilt(kinds: Sequence[Kind], run: Run) -> dict[str, Any] | None:
    """The beam tilt that all particles speak for, mrad, with its error; None where they don't tell."""
    found = []
    for kind in kinds:
        box, pixel_size = kind.head.box, kind.head.pixel_size
        band = Band.of(box, box * pixel_size / kind.made.reach)
        plain = [p for p in kind.series.values() if not p.series.premultiplied]
        sums = [optics.beam_tilt_sums(Member(p, kind.references), band, run.memory) for p in plain]
        if sums:
            cross, norm = (torch.stack([s[k] for s in sums]).sum(0) for k in (0, 1))
            found.append(fit_beam_tilt(cross, norm, band, pixel_size, plain[0].series.optics))
    weight = [f.error.pow(-2) for f in found]
    if not weight or not bool(torch.stack(weight).sum(0).min() > 0):
        return None
    whole = torch.stack(weight).sum(0)
    tilt = torch.stack([f.tilt * w for f, w in zip(found, weight, strict=True)]).sum(0) / whole
    error = whole.rsqrt()
    return {
        "tilt": tilt.tolist(), "error": error.tolist(), "kept": bool(((tilt / error) ** 2).sum() > SURE**2)
    }  # fmt: skip


def change_of(
    members: Sequence[Member],
    out: Outcome,
    choices: Sequence[Choice],
    on_top: bool = False,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the fit of a tilt series changes, for the run's record.

    Args:
        on_top: the fit came on top of the corrections that particles had; else it describes all of them.
        before: the same of an iteration that this one came on top of.
    """
    scene = scene_of(members)
    on_top = on_top or all(c.level.lens for c in choices)
    change = Change.of(choices, out.numbers, out.errors, len(scene.matrices))
    if before is not None:
        change = Change.from_table(before["change"]).then(change)
    bendings = [b for c in choices if (b := Bending.of(scene, c, out.numbers[c.level.name])) is not None]
    return {
        "change": change.table(),
        "on_top": on_top,
        "bendings": [*(before or {}).get("bendings", []), *(b.table() for b in bendings)],
    }


def lines(name: str, report: Mapping[str, Any]) -> str:
    """What has changed of a tilt series, in a line."""
    c = Change.from_table(report["change"])
    figures = {
        "shift": (c.shift, "Å"), "turn": (c.turn, "°"), "magnification": (100 * (c.magnification - 1), "%"),
        "defocus": (c.defocus, "Å"), "astigmatism": (c.astigmatism, "Å"),
    }  # fmt: skip
    words = [f"{k} {float(v.pow(2).mean().sqrt()):.3g} {unit}" for k, (v, unit) in figures.items() if v.any()]
    return f"{name}: {', '.join(words) or 'no change of the geometry'} (rms over tilts and axes)"


def optics_lines(state: Mapping[str, Any]) -> list[str]:
    """What a run has found of the microscope, a line for each thing that it has changed."""
    told = state.get("beam_tilt")
    if not (told and told["kept"]):
        return []
    x, y = (f"{v:.2f} ± {e:.2f}" for v, e in zip(told["tilt"], told["error"], strict=True))
    return [f"beam tilt: {x} and {y} mrad along x and y, beside what there was"]


def settle(begun: Begun, kinds: Sequence[Kind], filter: str, run: Run, save: Any) -> list[Kind]:
    """The particles in the changed geometry, written where they are; no image moves by it. What sharpens them anew, astigmatism
    and beam tilt, makes new maps.

    First they are all written beside, then put in the place of those before: killed in between, a resumed run finishes.
    """
    state = begun.state
    if not state.get("settled"):
        told_of = reports(state)
        told = told_beam_tilt([referenced(k, filter, run) for k in kinds], run) if state.get("optics") else None
        state["beam_tilt"] = told
        for kind in kinds:
            for name, p in kind.series.items():
                change = (
                    Change.from_table(told_of[name]["change"]) if name in told_of else Change.none(len(p.series.use))
                )
                save_part(kind, SETTLED, settled(p, change, _beam_tilt(told, p)))
        state["settled"] = True
        save("settled")
    out = []
    for kind in kinds:
        parts = {name: q for name in kind.series if (q := load_part(kind, SETTLED, name)) is not None}
        if parts:  # else they are in their place already
            saved = project.save_run_particles(kind.folder, kind.head, list((kind.series | parts).values()), kind.run)
            kind = replace(kind, series={p.file.name: p for p in saved})
        out.append(save_kind(averaged(kind, run), run, kind.run) if _sharper(state) else kind)
    save(None)
    clear_parts(kinds)
    return out


def _sharper(state: Mapping[str, Any]) -> bool:
    """Whether images are seen through another lens than those that the last maps were made of."""
    told = state.get("beam_tilt")
    return bool(told and told["kept"]) or any(any(r["change"]["astigmatism"]) for r in reports(state).values())


def _beam_tilt(told: Mapping[str, Any] | None, particles: Particles) -> tuple[float, float] | None:
    """What a particle file's optics have from now on."""
    own = particles.file.optics.beam_tilt
    if told is None or not told["kept"]:
        return own
    x, y = own or (0.0, 0.0)
    return x + told["tilt"][0], y + told["tilt"][1]


def reports(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of each tilt series, of the last iteration that was kept."""
    kept = [i for i in state["iterations"] if i["kept"]]
    return dict(kept[-1]["series"]) if kept else {}


def update_records(
    before: Mapping[str, TiltSeriesRecord], kinds: Sequence[Kind], begun: Begun, run: Run
) -> list[TiltSeriesRecord]:
    """Write the changed alignments and CTFs, keep the old ones; the records as written.

    Args:
        before: as they were when the run began.
    """
    told, out = reports(begun.state), list[TiltSeriesRecord]()
    for name, record in sorted(before.items()):
        if name not in told or _replaced_by(begun.folder, record, begun.state[COUNTS]) is not None:
            continue
        particles = next(k.series[name] for k in kinds if name in k.series)
        new = refined(record, told[name], particles)
        kept = Replaced(program=run.name, run=str(begun.folder), alignment=record.alignment, ctf=record.ctf)
        old = {"alignment": record.alignment, "ctf": record.ctf}
        texts = {k: v.model_dump(by_alias=True) for k, v in old.items() if v is not None}
        write_text(run.output(begun.folder / "before" / f"{name}.json", owned=True), json.dumps(texts, indent=1))

        def change(now: TiltSeriesRecord, new: dict[str, Any] = new, kept: Replaced = kept) -> TiltSeriesRecord:
            return now.model_copy(update={**new, "replaced": (*now.replaced, kept)})

        out.append(records.update(records.tiltseries_path(name), change, TiltSeriesRecord))
    return out


def refined(record: TiltSeriesRecord, report: Mapping[str, Any], particles: Particles) -> dict[str, Any]:
    """The sections of a record that change, as they shall be."""
    change = Change.from_table(report["change"])
    alignment = records.need(record, "alignment")
    rows, columns = record.source.shape[1:]
    field = (columns * record.source.pixel_size, rows * record.source.pixel_size)
    if not report["on_top"] and particles.file.raw is not None:  # the fit tells all that moves since patches were cut
        alignment = alignment.model_copy(update={"deformation": particles.file.raw.deformation})
    geometry = TiltGeometry.of(aligned(alignment, record.tilts.use, change, None), record.tilts.use)
    bendings = [Bending.from_table(t) for t in report["bendings"]]
    height = float(particles.xyz[:, 2].median())
    deformation: Deformation | None = deformation_of(bendings, geometry, height, field)
    sections: dict[str, Any] = {"alignment": aligned(alignment, record.tilts.use, change, deformation)}
    if record.ctf is not None:
        own = particles.file
        sections["ctf"] = focused(record.ctf, change, own.defocus_handedness, own.optics.beam_tilt)
    return sections
