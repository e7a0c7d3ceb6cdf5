"""A whole search of a scene: from its templates to the picks of the record, and to pictures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc.cli import Run
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.matches.fences import Fences
from libemc.matches.parts import searched
from libemc.matches.plan import Plan
from libemc.matches.scene import Scene
from libemc.methods.match import find, poses, templates
from libemc.methods.match.find import Maps, Picked, Search
from libemc.numerics import fourier
from libemc.numerics.rotations import euler_from_matrix
from libemc.records import Picks, TiltSeriesRecord
from libemc.view import picks as view

BEAD_REACH = 0.25
"""Of the template's shortest axis, beyond a bead's radius: no pick is so near to a bead's centre."""
MODEL_BINS = 60
"""Of the curve in the picture of the scores."""


def _allowed(scene: Scene, allow: Callable[[Tensor], Tensor], places: Tensor) -> Tensor:
    """Which of places in voxels are allowed."""
    return allow(scene.angstroms(places))


def match(
    scene: Scene, plan: Plan, folder: Path, run: Run, record: TiltSeriesRecord | None = None, images: Any = None
) -> dict[str, Picks]:
    """Search a scene for all templates, let them compete, refine the picks' poses, and draw.

    Args:
        folder: of the pictures, and of volumes.
        record, images: the tilt series and its raw images, on which the poses are refined; None for a finished tomogram.

    Returns:
        The picks by label, best first.
    """
    found, results = [], []
    for template in plan.templates(scene.grid.pixel_size, scene.resolution):
        search, maps = searched(scene, template, plan, folder, run)
        clearance = BEAD_REACH * templates.width(template.density, template.pixel_size)
        allow = Fences.of(plan, record, clearance).allow
        picked = find.pick(
            scene.volume, maps, search, scene.sensitivity, plan.wanted,
            partial(_allowed, scene, allow), run.progress,
        )  # fmt: skip
        if not picked.shape.telling and bool(picked.kept.any()):
            run.warn(
                f"{scene.name}: at {scene.resolution:.3g} Å {template.label} can't be told from anything of its size and "
                "roundness; a finer --resolution might"
            )
        if plan.volumes:
            _write_volumes(scene, search, maps, folder, run)
        found.append(search)
        results.append(picked)
    out, heights = {}, []
    for number, (search, picked, (kept, margin)) in enumerate(zip(found, results, find.compete(results), strict=True)):
        label = search.template.label
        xyz, rotation, score = (
            scene.angstroms(picked.candidates.xyz),
            picked.candidates.rotation,
            picked.candidates.score,
        )
        at = torch.nonzero(kept)[:, 0]
        if record is not None and len(at):
            sampling = poses.Sampling.of(record.source.pixel_size, scene.resolution, plan.diameters[number])
            finer = plan.templates(record.source.pixel_size * sampling.binning, sampling.resolution)[number]
            fine = fourier.centre_fit(finer.density, (sampling.box,) * 3)
            moved = poses.refined(
                record, images, xyz[at], rotation[at], fine, sampling, scene.resolution, run.memory, run.progress
            )
            seen = torch.isfinite(moved[2])
            xyz[at], rotation[at] = moved[0], moved[1]
            score = score.double()
            score[at[seen]] = moved[2][seen]
        out[label] = _picks(scene, plan, search, picked, at, xyz, rotation, score, margin)
        heights.append(_heights(label, picked, kept, plan.wanted.false))
        view.picks_picture(
            run.output(folder / f"{label}_picks.png", owned=True), scene.shown, scene.grid.pixel_size, scene.grid.centre,
            xyz.numpy(), picked.z.numpy(), kept.numpy(), plan.diameters[number], f"{scene.name}: {label}",
        )  # fmt: skip
    view.score_plot(run.output(folder / "scores.png", owned=True), heights, scene.name)
    for search in found:
        shutil.rmtree(folder / f"{search.template.label}.parts", ignore_errors=True)
    return out


def _picks(
    scene: Scene,
    plan: Plan,
    search: Search,
    picked: Picked,
    at: Tensor,
    xyz: Tensor,
    rotation: Tensor,
    score: Tensor,
    margin: Tensor,
) -> Picks:
    """What the record says."""
    rot, tilt, psi = euler_from_matrix(rotation[at])
    wish = next(w for w in plan.wishes if w.label == search.template.label)
    parameters = {
        "template": str(wish.file),
        "symmetry": wish.symmetry,
        "resolution": scene.resolution,
        "voxel_size": scene.grid.pixel_size,
        "step": search.step,
        "rotations": len(search.rotations),
        "distance": picked.apart * scene.grid.pixel_size,
        "threshold": picked.threshold,
        "expected_false": plan.wanted.false,
        "background": {
            "count": picked.background.count,
            "start": picked.background.start,
            "scale": picked.background.scale,
        },
        "shape": {"least": picked.shape.least, "expected": picked.shape.own, "telling": picked.shape.telling},
        "candidates": len(picked.z),
        "wrong_shape": int((~picked.shape.passed & (picked.z > picked.threshold)).sum()),
    }
    several = len(plan.wishes) > 1
    margins = tuple(None if math.isnan(m) else m for m in margin[at].tolist())
    return Picks(
        xyz=tuple((x, y, z) for x, y, z in xyz[at].tolist()),
        rot=tuple(rot.tolist()),
        tilt=tuple(tilt.tolist()),
        psi=tuple(psi.tolist()),
        score=tuple(score[at].double().tolist()),
        z=tuple(picked.z[at].double().tolist()),
        margin=margins if several else None,
        source="emc_tempmatch",
        parameters=parameters,
    )


def _heights(label: str, picked: Picked, kept: Tensor, false: float) -> view.Heights:
    """For the picture of the scores: the candidates, and the other maxima of the search."""
    z = torch.cat([picked.z.double(), picked.others.double()])
    mine = torch.cat([kept, torch.zeros(len(picked.others), dtype=torch.bool)])
    edges = torch.linspace(picked.background.start, max(picked.threshold, picked.background.start) + 1, MODEL_BINS + 1)
    above = picked.background.expected(edges)
    return view.Heights(
        label,
        z.numpy(),
        mine.numpy(),
        edges.double().numpy(),
        (above[:-1] - above[1:]).numpy(),
        picked.threshold,
        false,
    )


def _write_volumes(scene: Scene, search: Search, maps: Maps, folder: Path, run: Run) -> None:
    """The score of each voxel, the number of its rotation, and what those numbers mean."""
    label = search.template.label
    mrc.write_volume(run.output(folder / f"{label}_score.mrc"), maps.best, scene.grid.pixel_size)
    mrc.write_volume(run.output(folder / f"{label}_rotation.mrc"), maps.which.astype(np.float32), scene.grid.pixel_size)
    angles = torch.stack(euler_from_matrix(search.rotations), dim=1).tolist()
    table = {"rotation": "rot, tilt, psi in degrees by number", "angles": angles}
    write_text(run.output(folder / f"{label}_rotations.json"), json.dumps(table))


def summary(name: str, label: str, picks: Picks) -> str:
    """One line."""
    p = picks.parameters or {}
    words = [f"{len(picks.xyz)} picks of {label} with z above {p['threshold']:.1f}"]
    if picks.z:
        ordered = sorted(z for z in picks.z if z is not None)
        words[0] += f" (z {ordered[0]:.1f} to {ordered[-1]:.1f}, median {ordered[len(ordered) // 2]:.1f})"
    if p["wrong_shape"]:
        words.append(f"{p['wrong_shape']} of its size but not of its shape left out")
    words.append(f"{p['rotations']} rotations {p['step']:.1f}° apart, {p['resolution']:.3g} Å")
    return f"{name}: {'; '.join(words)}"
