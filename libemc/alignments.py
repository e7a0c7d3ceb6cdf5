"""Aligning a tilt series of a project: the record that says so, and the pictures that show how it went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from libemc import records
from libemc.cli import Run
from libemc.io import mrc
from libemc.methods.align import series
from libemc.methods.align.series import BECAUSE, Result
from libemc.methods.reconstruct import bin_image
from libemc.methods.subtilts import TiltGeometry
from libemc.project import Images
from libemc.records import Alignment, TiltSeriesRecord
from libemc.view.alignment import alignment_plots, landmark_picture, residual_arrows
from libemc.view.movie import tilt_frames, tilt_movie

PATCH = 64  # pixels of a landmark's picture, at most
PICTURES = ("alignment.png", "residuals.png", "tilts.png")
LANDMARK = "landmark.png"  # where one is seen well enough


def reconsidered(record: TiltSeriesRecord) -> TiltSeriesRecord:
    """The record with those tilts in use again that an earlier alignment left out."""
    tilts = record.tilts
    reasons = tilts.reason or (None,) * len(tilts.use)
    again = [reason is not None and reason.startswith(BECAUSE) for reason in reasons]
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

    def tell(part: str, state: series.State) -> None:
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
    """The pictures of an alignment."""
    plots, arrows, movie = (run.output(folder / name, owned=True) for name in PICTURES)
    alignment_plots(record, plots, result.alignment)
    source = record.source
    field = (source.shape[2] * source.pixel_size, source.shape[1] * source.pixel_size)
    labels = [f"{t:.0f}°" for t in result.alignment.tilt]
    residual_arrows(result.position, result.residual, result.use, field, arrows, labels)
    _draw_landmark(record, result, load, folder / LANDMARK, labels, run)
    frames = list(tilt_frames(record, load.__getitem__))
    tilt_movie([frame for _, frame in frames], movie, labels=[label for label, _ in frames])


def _draw_landmark(
    record: TiltSeriesRecord, result: Result, load: Images, file: Path, labels: list[str], run: Run
) -> None:
    """One landmark before and after: of those that most images show, the one that is fitted best."""
    found, source = result.alignment.landmarks, record.source
    assert found is not None
    often = np.isfinite(result.position[list(result.use)]).all(-1).mean(0)
    fits = np.array([np.inf if r is None else r for r in found.residual])
    best = int(np.where(often >= np.median(often), fits, np.inf).argmin())
    width = min(2.5 * (found.diameter[best] or 300.0), min(source.shape[1:]) * source.pixel_size / 4)
    binning = max(1, int(width / source.pixel_size / PATCH))
    before, after = (
        patches(load, TiltGeometry.of(a, result.use), found.xyz[best], source.pixel_size, binning, width)
        for a in (result.first, result.alignment)
    )
    if bool((np.isfinite(before).all((1, 2)) & np.isfinite(after).all((1, 2))).any()):
        title = f"{record.name}: {found.kind[best]} {best + 1} of {len(found.xyz)}"
        landmark_picture(before, after, run.output(file, owned=True), source.pixel_size * binning, labels, title)


def patches(
    load: Images,
    geometry: TiltGeometry,
    point: tuple[float, float, float],
    pixel_size: float,
    binning: int,
    width: float,
) -> NDArray[np.float32]:
    """Images (T, n, n) of a point's surroundings, where a geometry expects it; NaN where it isn't seen or used."""
    n = 2 * round(width / pixel_size / binning / 2)
    half = n * binning // 2
    at = geometry.project(torch.tensor([point], dtype=torch.float64))[0][0] / pixel_size
    out = np.full((len(at), n, n), np.nan, np.float32)
    for j, (x, y) in enumerate(at.tolist()):
        if not bool(geometry.use[j]):
            continue
        image = load[j]
        column, row = round(x) + image.shape[1] // 2, round(y) + image.shape[0] // 2
        if half <= column < image.shape[1] - half and half <= row < image.shape[0] - half:
            patch = torch.from_numpy(image[row - half : row + half, column - half : column + half].astype(np.float32))
            out[j] = bin_image(patch, binning).numpy()
    return out
