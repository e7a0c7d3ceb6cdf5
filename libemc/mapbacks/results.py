"""All that is written of a tilt series, and what the record says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libemc import __version__, project, records
from libemc.cli import Run
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.mapbacks import picture, scene
from libemc.mapbacks.plan import Placement, Wanted, models
from libemc.methods import mapback, neighbours
from libemc.methods.mapback import Cut, Model
from libemc.numerics.symmetry import point_group, symmetry_matrices

CHANCE, CHANCE_REPEATS = 20000, (20, 200)
"""Distances, about, that the random placements give, and how many placements at least and at most."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the medians of random placements."""
DIGITS = 3
"""Decimals of Å and degrees in the table of neighbours."""


def cost(placements: Sequence[Placement], wanted: Wanted, memory: float, threads: int) -> tuple[float, float]:
    """Bytes of disk, and of memory, of which there is so much, for the largest.

    Args:
        threads: each of which makes some rows of a volume.
    """
    disk = sum(4.0 * p.voxels * len(wanted.groups(p.placed)) for p in placements)
    rows = max(4.0 * (2 * threads + 1) * mapback.ROWS * p.voxels / p.grid.shape[1] for p in placements)
    return disk, max(rows, *(picture.memory_of(p.grid, memory) for p in placements))


def write(
    this: Placement, head: records.ParticleSet, wanted: Wanted, cuts: Mapping[int, Cut], colours: Any, run: Run
) -> dict[str, Any]:
    """Write everything of one tilt series, the script that shows it last.

    Args:
        cuts: of `cut_maps`.
        colours: of its particles, of `colours_of`.

    Returns:
        What the record says of it.
    """
    stem = wanted.folder / this.name
    groups = wanted.groups(this.placed)
    ready = models(cuts, this.grid.pixel_size, groups.values())
    for group, number in groups.items():
        poses = this.placed.poses.at(torch.from_numpy(wanted.members(this.placed, number)))
        file = Path(f"{stem}{group}.mrc")
        with mrc.VolumeWriter(file, this.grid.shape, this.grid.pixel_size) as writer:
            slabs = mapback.placed_rows(ready[number], this.grid, poses)
            blocks = math.ceil(this.grid.shape[1] / mapback.ROWS)
            for y0, slab in run.progress(slabs, blocks, f"{this.name}{group}: rows"):
                writer.write_rows(y0, slab.numpy())
    scene.write_list(Path(f"{stem}.star"), this)
    if wanted.mesh:
        scene.write_mesh(Path(f"{stem}.glb"), this, wanted, ready, colours.rgb, run)
    found = _write_neighbours(stem, this, head, wanted, ready, run)
    picture.draw(Path(f"{stem}.png"), this, wanted, cuts, colours, run)
    if wanted.painted:
        write_text(f"{stem}.cmm", scene.markers(this, colours.rgb))
    write_text(f"{stem}.cxc", scene.script(this, wanted, ready, colours.rgb))
    classes, counts = np.unique(this.placed.classes, return_counts=True)
    return {
        "particles": {str(k): n for k, n in zip(classes.tolist(), counts.tolist(), strict=True)},
        "pixel_size": this.grid.pixel_size,
        "shape": list(this.grid.shape),
        **found,
    }


def line(name: str, told: Mapping[str, Any]) -> str:
    """What is said of a tilt series on stdout."""
    counts = told["particles"]
    only = len(counts) == 1
    what = ", ".join(f"{n} particle{'s' * (n > 1)}" if only else f"{n} of class {k}" for k, n in counts.items())
    if told["distance_median"] is None:
        return f"{name}: {what} placed"
    random = told["random"]["distance_median"]
    return f"{name}: {what} placed, nearest neighbour at {told['distance_median']:.0f} Å (median; {random:.0f} Å by chance)"


def _write_neighbours(
    stem: Path, this: Placement, head: records.ParticleSet, wanted: Wanted, ready: Mapping[int, Model], run: Run
) -> dict[str, Any]:
    """The table of nearest neighbours and its picture; what of it is said in one line."""
    placed, rows = this.placed, []
    summary: dict[str, Any] = {"count": len(placed.ids), "distance_median": None, "angle_median": None}
    if len(placed.ids) > 1:
        group = symmetry_matrices(point_group(head.symmetry))
        found = neighbours.nearest(placed.poses.xyz, placed.poses.rotation, group)
        reach = wanted.within or 4 * max(placing.radius for placing in ready.values())
        owner, _, around = neighbours.around(placed.poses.xyz, placed.poses.rotation, reach)
        repeats = int(np.clip(CHANCE // len(placed.ids), *CHANCE_REPEATS))
        chance = neighbours.chance_distances(placed.poses.xyz.numpy(), repeats, run.seed)
        turned = neighbours.chance_angles(CHANCE, group, run.seed)
        alike = placed.classes == placed.classes[found.index]
        medians = np.median(chance, axis=1)
        low, high = np.percentile(medians, INTERVAL)
        summary |= {
            "distance_median": _rounded(np.median(found.distance)),
            "angle_median": _rounded(np.median(found.angle[alike])) if alike.any() else None,
            "within": _rounded(reach),
            "neighbours_within": _rounded(len(owner) / len(placed.ids)),
            "random": {
                "distance_median": _rounded(np.median(medians)),
                "distance_interval": [_rounded(low), _rounded(high)],
                "angle_median": _rounded(np.median(turned)),
                "placements": repeats,
            },
        }
        rows = [
            {
                "id": placed.ids[i],
                "class": int(placed.classes[i]),
                "score": None if np.isnan(placed.score[i]) else float(placed.score[i]),
                "neighbour": placed.ids[j],
                "distance": _rounded(found.distance[i]),
                "direction": [_rounded(v) for v in found.direction[i]],
                "angle": _rounded(found.angle[i]),
            }
            for i, j in enumerate(found.index.tolist())
        ]
        from libemc.view import mapback as view

        shown = view.Neighbours(found.distance, chance, found.angle[alike], turned, around, reach)
        view.neighbours_plot(f"{stem}_neighbours.png", shown, f"{this.name}: neighbours of {len(placed.ids)} particles")
    made_by = {"program": run.name, "version": __version__, "argv": list(run.argv)}
    table = {"made_by": made_by, "name": this.name, "symmetry": head.symmetry, "summary": summary}
    text = (
        json.dumps(table, indent=1)[:-2] + ',\n "particles": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"
    )
    write_text(f"{stem}_neighbours.json", text)
    return summary


def _rounded(value: Any) -> float:
    return round(float(value), DIGITS)


def save_record(
    path: Path, options: Mapping[str, Any], told: Mapping[str, Any], inputs: Sequence[Path], run: Run
) -> None:
    """Enter tilt series into the record of the folder, beside those that earlier runs placed there.

    Args:
        told: of each tilt series, as `write` gives it.
    """
    if not path.exists():
        project.save_run(path, run.name, options, run.seed, {}, inputs)

    def change(old: records.Run) -> records.Run:
        series = {**old.state.get("series", {}), **told}
        prints = {p.path: p for p in (*old.inputs, *map(records.fingerprint, inputs))}
        new = {
            "options": dict(options),
            "seed": run.seed,
            "state": {"series": series},
            "inputs": tuple(prints.values()),
        }
        return old.model_copy(update=new)

    records.update(path, change, records.Run)
