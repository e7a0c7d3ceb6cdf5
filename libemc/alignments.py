"""Aligning a tilt series of a project: the record that says so, and the pictures that show how it went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc import records
from libemc.cli import Run
from libemc.io import mrc
from libemc.methods.align import series
from libemc.methods.align.series import Result
from libemc.methods.align.state import BECAUSE, State
from libemc.methods.import_series import UNDECIDED
from libemc.methods.reconstruct import bin_image
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.patches import cut_patches
from libemc.project import Images
from libemc.records import Alignment, TiltSeriesRecord
from libemc.view.alignment import alignment_plots, landmark_picture, residual_arrows
from libemc.view.movie import tilt_frame, tilt_movie, tilt_order

PATCH = 64  # pixels of a landmark's picture, at most
PICTURES = ("alignment.png", "residuals.png", "tilts.png")
LANDMARK = "landmark.png"  # where one is seen well enough


def reconsidered(record: TiltSeriesRecord) -> TiltSeriesRecord:
    """The record with those tilts in use again that an earlier alignment left out, and copies that it can tell apart."""
    tilts = record.tilts
    reasons = tilts.reason or (None,) * len(tilts.use)
    again = [reason is not None and (reason.startswith(BECAUSE) or reason.endswith(UNDECIDED)) for reason in reasons]
    use = tuple(u or a for u, a in zip(tilts.use, again, strict=True))
    reason = tuple(None if a else r for r, a in zip(reasons, again, strict=True))
    return record.model_copy(update={"tilts": tilts.model_copy(update={"use": use, "reason": reason})})


def align(
    path: Path,
    record: TiltSeriesRecord,
    stack: mrc.MrcImages,
    axis: float | None,
    base: Alignment | None,
    local: bool,
    run: Run,
) -> TiltSeriesRecord:
    """Align a tilt series, save that in its record, and draw it.

    Args:
        path: of the record.
        axis: degrees, where it's known.
        base: the alignment to improve; None: from the nominal angles.
        local: look for smooth local motion too.
        run: for progress, warnings and the folder of the pictures, tomograms/NAME_alignment.

    Returns:
        The record as saved.
    """
    load = Images(stack, f"exclude that tilt in {path}", blank=True)

    def tell(part: str, state: State) -> None:
        run.log.info("%s: %s done, %d images in use", record.name, part, sum(state.use))

    result = series.align(load.__getitem__, record, axis, base, local, tell)
    tilts = record.tilts.model_copy(update={"use": result.use, "reason": result.reason})
    changed = {"alignment": result.alignment, "tilts": tilts}
    records.update(path, lambda old: old.model_copy(update=changed), TiltSeriesRecord)
    done = record.model_copy(update=changed)
    left_out = [j for j, (was, now) in enumerate(zip(record.tilts.use, result.use, strict=True)) if was and not now]
    for j in left_out:
        run.warn(f"{record.name}: image {j + 1} ({record.tilts.nominal[j]:g}°) is not used: {result.reason[j]}")
    if result.alignment.hand_open:
        axis_found = float(np.median(result.alignment.axis))
        run.warn(
            f"{record.name}: the axis, {axis_found:.1f}°, was found from the images: it may be its opposite, and the "
            "specimen its mirror image; the CTF tells, or give --axis"
        )
    _draw(done, result, load, Path("tomograms") / f"{record.name}_alignment", run)
    return done


def _draw(record: TiltSeriesRecord, result: Result, load: Images, folder: Path, run: Run) -> None:
    """The pictures of an alignment. Every image is read once: for the movie, and for one landmark before and after."""
    plots, arrows, movie = (run.output(folder / name, owned=True) for name in PICTURES)
    alignment_plots(record, plots, result.alignment)
    source = record.source
    field = (source.shape[2] * source.pixel_size, source.shape[1] * source.pixel_size)
    labels = [f"{t:.0f}°" for t in result.alignment.tilt]
    residual_arrows(result.position, result.residual, result.use, field, arrows, labels)
    found = result.alignment.landmarks
    assert found is not None
    best = _clearest(result)
    width = min(2.5 * (found.diameter[best] or 300.0), min(field) / 4) / source.pixel_size
    binning = max(1, int(width / PATCH))
    size = 2 * round(width / binning / 2)
    point = torch.tensor([found.xyz[best]], dtype=torch.float64)
    where = torch.stack([TiltGeometry.of(a, result.use).project(point)[0][0] for a in (result.first, result.alignment)])
    strips = np.full((2, len(labels), size, size), np.nan, np.float32)
    frames = []
    order = tilt_order(record)
    for j in order:
        image = load[j]
        frames.append(tilt_frame(record, j, image))
        strips[:, j] = views(image, where[:, j] / source.pixel_size, size, binning)
    if bool(np.isfinite(strips).all((0, 2, 3)).any()):
        title = f"{record.name}: {found.kind[best]} {best + 1} of {len(found.xyz)}"
        pixel_size = source.pixel_size * binning
        landmark_picture(strips[0], strips[1], run.output(folder / LANDMARK, owned=True), pixel_size, labels, title)
    tilt_movie(frames, movie, labels=[f"{result.alignment.tilt[j]:+.1f}°" for j in order])


def _clearest(result: Result) -> int:
    """The landmark that is fitted best, of those that most images show."""
    found = result.alignment.landmarks
    assert found is not None
    often = np.isfinite(result.position[list(result.use)]).all(-1).mean(0)
    fits = np.array([np.inf if r is None else r for r in found.residual])
    return int(np.where(often >= np.median(often), fits, np.inf).argmin())


def views(image: NDArray[np.float32], positions: Tensor, size: int, binning: int) -> NDArray[np.float32]:
    """The surroundings of positions (N, 2), px from the centre of an image (y, x), binned: (N, size, size) float32.

    NaN, all of it, where they reach beyond the image.
    """
    patches, _ = cut_patches([image] * len(positions), positions, size * binning, np.nan)
    whole = torch.isfinite(patches).flatten(1).all(dim=1)
    return torch.where(whole[:, None, None], bin_image(patches, binning), np.nan).numpy()
