"""Pictures and page of a run that refined particles image by image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libemc.cli import Run
from libemc.io import mrc
from libemc.joint_refinements import Kind, choices_of
from libemc.methods.joint.fit import paths
from libemc.methods.joint.levels import MOTION, Choice, Level
from libemc.methods.reconstruct import bin_image
from libemc.methods.subtilts import Particles, TiltGeometry
from libemc.methods.tiltseries_refine.change import Change
from libemc.records import TiltSeriesRecord, need

DRAWN = 6
"""Tilt series of which pictures are on the page."""
WIDTH = 700  # pixels of a tilt image with tracks


def displacements(particles: Particles, motion: Choice | None, resolution: float) -> np.ndarray[Any, Any]:
    """(N, T, 3) Å: the paths of particles along the exposure; NaN in tilts that don't show them.

    Args:
        motion: the level of it; None: images were shifted, which is turned back into the specimen's frame.
    """
    if motion is not None:
        path = paths(particles, motion, resolution)
    else:
        shift = particles.corrections.shift - particles.realigned()
        path = torch.einsum("tij,nti->ntj", particles.series.matrices[:, :2], shift)
    known = (particles.visible & particles.series.use & particles.use[:, None])[..., None]
    return torch.where(known, path, torch.nan).numpy()


def write_page(
    kind: Kind,
    title: str,
    options: Mapping[str, Any],
    state: Mapping[str, Any],
    levels: tuple[Level, ...],
    run: Run,
    records: Mapping[str, TiltSeriesRecord] | None = None,
) -> None:
    """Write index.html of a kind's folder, and its pictures.

    Args:
        options: as the run's record has them; state: the same.
        records: of the tilt series, before they are changed, where geometry was refined.
    """
    from libemc.view import joint_refinement as view  # matplotlib takes half a second that a dry run does without

    past = [i for i in state["iterations"] if i["kept"]] or state["iterations"]
    reports, units = past[-1]["series"], {level.name: level.unit for level in levels}
    motion = next((c for c in choices_of(past[-1]["trials"], levels) if c.level is MOTION), None)
    pictures: list[view.Picture] = []

    def picture(name: str, headline: str, caption: str) -> Path:
        pictures.append(view.Picture(name, headline, caption))
        return run.output(kind.folder / name, owned=True)

    names = sorted(kind.series)
    for name in [names[round(i)] for i in np.linspace(0, len(names) - 1, min(DRAWN, len(names)))]:
        p, told = kind.series[name], reports[name]
        tilt = np.array(p.file.tilts.tilt)
        before, after = (
            np.array([np.nan if v is None else v for v in told[k]], dtype=float) for k in ("before", "after")
        )
        view.residual_plot(
            picture(f"{name}_residual.png", name, "How far images are from their predictions."), tilt, before, after
        )
        moved = displacements(p, motion, kind.made.reach)
        if np.nansum(moved**2) > 0:
            caption = "How far particles are from their positions, along the dose."
            file = picture(f"{name}_motion.png", f"{name}: motion", caption)
            view.displacement_plot(file, p.series.dose_end.numpy(), moved)
        score = p.corrections.score.numpy()
        if np.isfinite(score).any():
            used = (p.shown & p.use[:, None]).numpy()
            file = picture(f"{name}_images.png", f"{name}: images", "Scores and weights of all images.")
            view.subtilt_plot(file, tilt, score, p.corrections.weight.numpy(), used)
        if records is not None and name in records:
            _draw_series(records[name], p, moved[..., :2], told, picture)
    page = view.JointPage(
        title=title,
        options={k.replace("_", " "): str(v) for k, v in options.items() if v not in (None, False)},
        iterations=[
            view.Iteration(min(i["band"]), i["kinds"][kind.run]["resolution"], i["moved"]) for i in state["iterations"]
        ],
        levels=[
            view.Level(
                t["level"] + (f", over {t['length']:g} Å" if t["length"] else ""), t["strength"], t["gain"], t["error"],
                t["kept"], units.get(t["level"], ""),
            )
            for t in past[-1]["trials"]
        ],
        series=[
            view.Series(n, r["particles"], r["images"], r["left_out"], _rms(r["before"]), _rms(r["after"]))
            for n, r in sorted(reports.items())
        ],
        pictures=pictures,
    )  # fmt: skip
    view.write_page(run.output(kind.folder / "index.html", owned=True), page)


def _rms(values: list[float | None]) -> float:
    known = np.array([v for v in values if v is not None])
    return float(np.sqrt((known**2).mean())) if len(known) else float("nan")


def _draw_series(
    record: TiltSeriesRecord, p: Particles, moved: np.ndarray[Any, Any], told: Mapping[str, Any], picture: Any
) -> None:
    """The changes of a geometry, and the tracks of its particles on the least tilted image."""
    from libemc.view import joint_refinement as view

    name, change = record.name, Change.from_table(told["change"])
    alignment = need(record, "alignment")
    changes = _changes(TiltGeometry.of(alignment, record.tilts.use).matrices, change)
    if changes:
        file = picture(f"{name}_geometry.png", f"{name}: geometry", "What has changed of each tilt, with errors.")
        view.geometry_plot(file, np.array(alignment.tilt), changes)
    flat = int(np.argmin(np.where(record.tilts.use, np.abs(alignment.tilt), np.inf)))
    if not Path(record.source.stack).exists():
        return
    image = np.asarray(mrc.open_stack(record.source.stack).array[flat], dtype=np.float32)
    image = -image if record.source.contrast == "bright" else image
    binning = max(1, image.shape[1] // WIDTH)
    small = bin_image(torch.from_numpy(image)[None], binning)[0].numpy()
    position = TiltGeometry.of(alignment, record.tilts.use).project(p.xyz)[0][:, flat].numpy()
    order = np.argsort(np.argsort(p.series.dose_end.numpy(), kind="stable"))
    file = picture(
        f"{name}_tracks.png", f"{name}: motion", "How particles move along the exposures, in the specimen's x and y."
    )
    view.tracks_plot(file, small, record.source.pixel_size * binning, view.Tracks(position, moved, order), name)


def _changes(matrices: torch.Tensor, change: Change) -> dict[str, Any]:
    """Those that there are, from the matrices before: value and error of each tilt."""
    out: dict[str, Any] = {}
    if change.shift.any():
        for k, axis in enumerate("xy"):
            out[f"shift_{axis}"] = (change.shift[:, k].numpy(), change.shift_error[:, k].numpy())
    if change.turn.any():
        for name, moved, error in zip(("axis", "tilt", "xtilt"), *change.angles(matrices), strict=True):
            out[name] = (moved.numpy(), error.numpy())
    if (change.magnification != 1).any():
        out["magnification"] = (100 * (change.magnification.numpy() - 1), None)
    if change.defocus.any():
        out["defocus"] = (change.defocus.numpy(), change.defocus_error.numpy())
    return out
