"""A project's results against the truth files of a simulation: reads both and asks `methods.evaluate`. The other half of
`emc_simulate`, for the demonstration and for benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from libemc import records
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.truth import read_truth
from libemc.methods import evaluate
from libemc.methods.evaluate import AlignmentError, MapAgreement, PoseErrors
from libemc.methods.overlay import overlay
from libemc.methods.postprocess import mirror, place
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


@dataclass(frozen=True)
class Overlaid:
    """A map laid over the true one: a model from nothing has a frame of its own.

    Attributes:
        rotation: (3, 3), shift: (3,) Å; the map at u lies at rotation·u + shift of the true one.
        agreement: there, within the mask. mirrored: highest correlation with the mirror image of the true map.
    """

    rotation: Tensor
    shift: Tensor
    agreement: MapAgreement
    mirrored: float

    @property
    def right_hand(self) -> bool:
        """Whether the map is more like the true one than like its mirror image."""
        return self.agreement.correlation > self.mirrored


def overlaid(run: Path, truth: Path, mask: Path, resolution: float) -> Overlaid:
    """Lay the mean of a run's half maps over the true map, all rotations and shifts tried in data to a resolution, Å.

    Unfiltered: in the shells that a filter has emptied a mask leaves nothing but what it carries over from others. All
    maps are on one grid.

    Args:
        mask: of the map, and in its frame.
    """
    (half1, pixel_size), (half2, _) = (mrc.read_volume(run / f"half{h}.mrc") for h in (1, 2))
    volume, (true, _), (within, _) = (half1 + half2) / 2, mrc.read_volume(truth), mrc.read_volume(mask)
    if not volume.shape == true.shape == within.shape:
        raise InputError(f"has {volume.shape} voxels, the true map {true.shape}, the mask {within.shape}", run)
    found, right, around = (torch.from_numpy(array) for array in (volume, true, within))
    radius = min(len(found) / 2 - 1, len(found) * pixel_size / resolution)
    most = len(found) / 8
    best = overlay(found * around, right, radius, most)
    there = [place(part, best.rotation, best.shift.tolist()) for part in (found, around)]
    agreement = evaluate.map_agreement(there[0], right, pixel_size, there[1])
    other = overlay(found * around, mirror(right, "z"), radius, most)
    turned = [place(part, other.rotation, other.shift.tolist()) for part in (found, around)]
    wrong = evaluate.map_agreement(turned[0], mirror(right, "z"), pixel_size, turned[1]).correlation
    return Overlaid(best.rotation, best.shift * pixel_size, agreement, wrong)


def pose_errors(
    set_or_run: str, truths: Mapping[str, Path], reach: float, turn: Overlaid | None = None, project: Path = Path()
) -> PoseErrors:
    """How far particles are from the true ones of their tilt series; all that are used.

    The frame of each alignment is brought onto the true one first.

    Args:
        truths: the truth file of each tilt series, by name.
        reach: Å; a particle farther from every true one is none of them.
        turn: how the map that the poses belong to lies in the true one; None: as it is.

    Returns:
        All pairs; the indices count through the tilt series one after the other.
    """
    head, files = records.load_particles(set_or_run, project)
    pairs, at = [], np.zeros(2, int)
    for name, file in files.items():
        picks = read_truth(truths[name]).picks
        used = [p for p in file.particles if p.use]
        rotation = _rotations(*([getattr(p, a) for p in used] for a in ("rot", "tilt", "psi")))
        xyz = torch.tensor([p.xyz for p in used], dtype=torch.float64).reshape(-1, 3)
        if turn is not None:
            rotation = rotation @ turn.rotation.T
            xyz = xyz - rotation @ turn.shift
        if picks.rot is None or picks.tilt is None or picks.psi is None:
            raise InputError("has no orientations", truths[name], "give a simulator's truth")
        true = _rotations(picks.rot, picks.tilt, picks.psi), torch.from_numpy(picks.xyz)
        motion = alignment_error(name, truths[name], project).motion
        pair = evaluate.pose_errors((rotation, xyz), true, reach, head.symmetry, motion)
        pairs.append((pair.found + at[0], pair.true + at[1], pair.angle, pair.distance))
        at += len(used), len(picks.xyz)
    return PoseErrors(*(torch.cat(column) for column in zip(*pairs, strict=True)))


@dataclass(frozen=True)
class ClassAgreement:
    """Classes beside the true kinds of the same particles.

    Attributes:
        found: how many classes have particles; count: particles that are found and have a class.
        right: those in a class that has most of their kind.
        rand: adjusted Rand index.
    """

    found: int
    count: int
    right: int
    rand: float


def class_agreement(
    set_or_run: str, truths: Mapping[str, Path], reach: float, turn: Overlaid | None = None, project: Path = Path()
) -> ClassAgreement:
    """How the classes of a run's particles agree with the kinds that were simulated; arguments as for `pose_errors`."""
    pairs = pose_errors(set_or_run, truths, reach, turn, project)
    _, files = records.load_particles(set_or_run, project)
    found = np.array([p.class_ for file in files.values() for p in file.particles if p.use])[pairs.found.numpy()]
    kinds = np.concatenate([read_truth(truths[name]).classes for name in files])[pairs.true.numpy()]
    classed = found > 0
    found, kinds = found[classed], kinds[classed]
    home = {kind: np.bincount(found[kinds == kind]).argmax() for kind in np.unique(kinds)}
    right = sum(int(home[kind] == number) for kind, number in zip(kinds, found, strict=True))
    return ClassAgreement(len(np.unique(found)), len(found), right, float(adjusted_rand_score(kinds, found)))


def _rotations(rot: object, tilt: object, psi: object) -> Tensor:
    """(N, 3, 3) of lists or arrays of degrees."""
    return matrix_from_euler(*(torch.from_numpy(np.asarray(angle, dtype=np.float64)) for angle in (rot, tilt, psi)))
