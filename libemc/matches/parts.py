"""A search part by part: what an interrupted one has done is kept, and read by --resume."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import torch

from libemc.cli import Run
from libemc.matches.plan import Plan
from libemc.matches.scene import Scene, digest
from libemc.methods.match import find
from libemc.methods.match.correlate import Found
from libemc.methods.match.find import Maps, Search
from libemc.methods.match.templates import Template
from libemc.replacement import write_bytes

VERSION = 1
"""Of what an interrupted search leaves behind."""


def searched(scene: Scene, template: Template, plan: Plan, folder: Path, run: Run) -> tuple[Search, Maps]:
    """Search a scene for one template, part by part; with --resume, parts that an interrupted run has done are read.

    Args:
        folder: where the parts are kept until all is done.
    """
    found = Search.of(template, max(plan.diameters), scene.sensitivity, plan.wanted)
    cut = find.parts(scene.grid.shape, template.box, run.memory / 2, run.threads)
    body = hashlib.blake2b(template.density.numpy().tobytes() + found.rotations.numpy().tobytes(), digest_size=16)
    bounds = [(part.low, part.high) for part in cut]
    key = digest([VERSION, scene.key, scene.grid.centre, scene.resolution, body.hexdigest(), bounds, plan.wanted.seed])
    scratch = folder / f"{template.label}.parts"
    if not (run.resume and (scratch / key).exists()):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / key).touch()
    maps = Maps.empty(scene.grid.shape)
    for number, part in enumerate(cut):
        file = scratch / f"{number}.npz"
        if not file.exists():
            own, theirs = found.part(scene.volume, part, run.device, run.progress)
            if len(cut) > 1:
                _save_part(file, own, theirs)
        else:
            own, theirs = _read_part(file)
        maps.put(part, own, theirs)
        if len(cut) > 1:
            run.log.info(f"{scene.name}, {template.label}: part {number + 1} of {len(cut)} done")
    return found, maps


def _save_part(file: Path, own: Found, theirs: Found) -> None:
    assert own.which is not None and theirs.squares is not None
    buffer = io.BytesIO()
    np.savez(buffer, best=own.best, which=own.which, decoys=theirs.best, squares=theirs.squares)
    write_bytes(file, buffer.getvalue())


def _read_part(file: Path) -> tuple[Found, Found]:
    with np.load(file) as data:
        best, which, decoys, squares = (torch.from_numpy(data[n]) for n in ("best", "which", "decoys", "squares"))
    return Found(best, which, None), Found(decoys, None, squares)
