"""A project's results against the truth files of a simulation: reads both and asks `methods.evaluate`. The other half of
`emc_simulate`, for the demonstration and for benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libemc import records
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.truth import read_truth
from libemc.methods import evaluate
from libemc.methods.evaluate import AlignmentError, MapAgreement, PoseErrors
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import matrix_from_euler, tilt_matrices


def alignment_error(name: str, truth: Path, project: Path = Path()) -> AlignmentError:
    """How far the alignment of a tilt series is from the truth, over the inner part of a slab as thick as the specimen.

    Raises:
        InputError: the tilt series has no alignment, or the truth is another's.
    """
    record, known = records.load_tiltseries(name, project), read_truth(truth)
    rows, columns = (n * record.source.pixel_size for n in record.source.shape[1:])
    if len(known.nominal) != record.source.shape[0]:
        raise InputError(f"is of {len(known.nominal)} tilts, {name} has {record.source.shape[0]}", truth)
    axis, tilt, xtilt, x, y, magnification = (
        torch.from_numpy(np.asarray(getattr(known.alignment, key), dtype=np.float64))
        for key in ("axis", "tilt", "xtilt", "shift_x", "shift_y", "magnification")
    )
    use = torch.from_numpy(known.alignment.use)
    right = TiltGeometry(tilt_matrices(axis, tilt, xtilt), torch.stack([x, y], dim=1), magnification, use)
    found = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use)
    return evaluate.alignment_error(found, right, evaluate.slab_points(columns, rows, known.thickness))


def defocus_error(name: str, truth: Path, project: Path = Path()) -> float:
    """Å rms over the used tilts of a tilt series, of the mean of U and V.

    Raises:
        InputError: the tilt series has no CTF, or the truth none.
    """
    record, known = records.load_tiltseries(name, project), read_truth(truth).ctf
    if known is None:
        raise InputError("has no CTF", truth, "give a simulator's truth")
    found, use = records.need(record, "ctf"), np.array(record.tilts.use)
    errors = np.add(found.defocus_u, found.defocus_v) / 2 - np.add(known.defocus_u, known.defocus_v) / 2
    return float(np.sqrt(np.mean(errors[use] ** 2)))


def pose_errors(set_or_run: str, truths: Mapping[str, Path], reach: float, project: Path = Path()) -> PoseErrors:
    """How far particles are from the true ones of their tilt series, in the true frame; all that are used.

    Args:
        truths: the truth file of each tilt series, by name.
        reach: Å; a particle farther from every true one is none of them.

    Returns:
        All pairs; the indices count through the tilt series one after the other.
    """
    head, files = records.load_particles(set_or_run, project)
    pairs, at = [], np.zeros(2, int)
    for name, file in files.items():
        picks = read_truth(truths[name]).picks
        used = [p for p in file.particles if p.use]
        angles = ([getattr(p, a) for p in used] for a in ("rot", "tilt", "psi"))
        found = _rotations(*angles), torch.tensor([p.xyz for p in used], dtype=torch.float64)
        if picks.rot is None or picks.tilt is None or picks.psi is None:
            raise InputError("has no orientations", truths[name], "give a simulator's truth")
        true = _rotations(picks.rot, picks.tilt, picks.psi), torch.from_numpy(picks.xyz)
        pair = evaluate.pose_errors(found, true, reach, head.symmetry)
        pairs.append((pair.found + at[0], pair.true + at[1], pair.angle, pair.distance))
        at += len(used), len(picks.xyz)
    return PoseErrors(*(torch.cat(column) for column in zip(*pairs, strict=True)))


def _rotations(rot: object, tilt: object, psi: object) -> Tensor:
    """(N, 3, 3) of lists or arrays of degrees."""
    return matrix_from_euler(*(torch.from_numpy(np.asarray(angle, dtype=np.float64)) for angle in (rot, tilt, psi)))


def map_agreement(path: Path, truth: Path, mask: Path) -> MapAgreement:
    """How a map agrees with the true one within a mask; all three on one grid."""
    (volume, pixel_size), (true, _), (within, _) = (mrc.read_volume(file) for file in (path, truth, mask))
    if not volume.shape == true.shape == within.shape:
        raise InputError(f"has {volume.shape} voxels, the true map {true.shape}, the mask {within.shape}", path)
    tensors = [torch.from_numpy(array) for array in (volume, true, within)]
    return evaluate.map_agreement(tensors[0], tensors[1], pixel_size, tensors[2])
