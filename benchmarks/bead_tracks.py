"""Bundle adjustment against IMOD's tiltalign on real bead tracks.

    python benchmarks/bead_tracks.py DATA            # DATA holds real/fiducials

The tracks are those of IMOD's midzone2 series, 47 beads in 81 views. `midzone2a.resid` lists for each measurement
x, y, view and a residual; x, y are the measured positions in pixels from the corner of the prealigned (only shifted)
stack, and position + residual is an exact affine function of `midzone2afid.xyz` in every view, to 0.01 px of rounding:
it is tiltalign's prediction by its global solution. The `.xf` map raw images to
aligned ones, the local one isn't used. The linear part of these predictions
shows what was fitted: rotation, magnification and tilt differ freely from view to view; stretch and skew
are piecewise linear, so they come in groups, whose number is counted by the kinks. We start from 1.5° steps in two
sweeps (60 to -18, -18 to -60; that there are two, and where, was read off IMOD's own angles), all axes along y, no
shifts. Ours are effective parameters (shrunk by the priors), IMOD's a count; the strengths of the priors aren't counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from libemc.methods.align.bundle import Fit, Geometry, Tracks, adjust, describe
from libemc.methods.align.deformation import fit_deformation

SIZE = (1950.0, 1024.0)  # pixels, from the .xyz
NOISE = 0.5  # pixels, of one coordinate, to begin with
ANGLES = np.r_[60 - 1.5 * np.arange(53), -18 - 1.5 * np.arange(28)]
KINK = 0.015  # of stretch (%) or skew (degrees) from view to view: more than the rounding of the files


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions and IMOD's residuals (81, 47, 2), its points (47, 3) and its tilt angles."""
    rows = np.loadtxt(folder / "midzone2a.resid", skiprows=1)
    view = rows[:, 2].astype(int)
    bead = np.cumsum(np.r_[False, np.diff(view) < 0])
    position = np.full((view.max() + 1, bead.max() + 1, 2), np.nan)
    residual = position.copy()
    position[view, bead], residual[view, bead] = rows[:, :2], rows[:, 3:]
    lines = (folder / "midzone2afid.xyz").read_text().splitlines()
    points = np.array([line.split()[1:4] for line in lines], float)
    return position, residual, points, np.loadtxt(folder / "midzone2a.tlt")


def imod_parameters(prediction: np.ndarray, points: np.ndarray) -> dict[str, int]:
    """What tiltalign fitted, counted from its predictions."""
    linear = []
    for image in prediction:
        ok = np.isfinite(image[:, 0])
        linear.append(np.linalg.lstsq(np.c_[points[ok], np.ones(ok.sum())], image[ok], rcond=None)[0].T[:, :3])
    gram = np.array(linear) @ np.array(linear).transpose(0, 2, 1)
    stretch = 100 * (np.sqrt(gram[:, 0, 0] / gram[:, 1, 1]) - 1)
    skew = np.degrees(gram[:, 0, 1] / np.sqrt(gram[:, 0, 0] * gram[:, 1, 1]))
    views = len(prediction)
    # a knot between two views shows as a jump of the first difference: two neighbouring second differences
    knots = [int((np.abs(np.diff(s, 2)) > limit).sum() + 1) // 2 for s, limit in ((stretch, KINK), (skew, KINK / 3))]
    return {
        "points": 3 * len(points) - 3,
        "shifts": 2 * views,
        "rotation": views,
        "magnification": views - 1,
        "tilt": views - 1,
        "stretch": knots[0] + 1,
        "skew": knots[1] + 1,
    }


def held_out(position: np.ndarray, start: Geometry, warp: bool, seed: int = 0) -> float:
    """Mean residual, px, of measurements (every tenth) that had no part in the fit, predicted by it.

    Nor have they a part in the choice of the freedom."""
    hidden = np.random.default_rng(seed).random(position.shape[:2]) < 0.1
    tracks = Tracks.of(np.where(hidden[..., None], np.nan, position), NOISE)
    fit = adjust(tracks, start)
    predicted = fit.geometry.project(fit.points)
    if warp:
        deformation, fit, _ = fit_deformation(tracks, fit, SIZE)
        predicted = fit.geometry.project(fit.points)
        predicted = predicted + (displacement(deformation, predicted) if deformation else 0.0)
    return float(np.nanmean(np.linalg.norm((position - predicted)[hidden], axis=-1)))


def displacement(deformation, at: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """(T, P, 2) of a record's field."""
    import torch

    from libemc.numerics.splines import field_basis

    half = np.asarray(deformation.field) / 2
    basis = field_basis(
        torch.from_numpy(np.clip(at, -half, half)), deformation.field, deformation.rows, deformation.columns
    )
    nodes = np.stack([deformation.dx, deformation.dy], axis=-1)
    return np.einsum("tpn,tna->tpa", basis.numpy(), nodes)


def line(name: str, fit: Fit, tilt: np.ndarray, seconds: float, outside: float) -> str:
    """One row of the table."""
    length = np.linalg.norm(fit.residual, axis=-1)
    off = fit.geometry.tilt - tilt
    off = np.abs(off - off.mean())
    return (
        f"{name:18s} {np.nanmean(length):6.3f} {np.sqrt(np.nanmean(length**2)):6.3f} {fit.effective_parameters:8.1f} "
        f"{outside:9.3f} {off.max():9.3f} {np.sqrt((off**2).mean()):9.3f} {seconds:7.1f}   {describe(fit.freedom)}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    position, residual, points, tilt = read(parser.parse_args().data / "real" / "fiducials")
    parts = imod_parameters(position + residual, points)
    centred = position - np.asarray(SIZE) / 2
    views = len(tilt)
    start = Geometry(np.zeros(views), ANGLES, np.zeros(views), np.ones(views), np.zeros((views, 2)))
    tracks = Tracks.of(centred, NOISE)
    length = np.linalg.norm(residual, axis=-1)
    print("fit                mean px  rms px  params  held out  tilt max  tilt rms  seconds   freedom")
    print(
        f"{'IMOD':18s} {np.nanmean(length):6.3f} {np.sqrt(np.nanmean(length**2)):6.3f} {sum(parts.values()):8d}   {parts}"
    )
    began = time.perf_counter()
    fit = adjust(tracks, start)
    print(line("bundle", fit, tilt, time.perf_counter() - began, held_out(centred, start, False)))
    began = time.perf_counter()
    deformation, warped, _ = fit_deformation(tracks, fit, SIZE)
    name = "no deformation" if deformation is None else f"with {deformation.rows} x {deformation.columns} nodes"
    print(line(name, warped, tilt, time.perf_counter() - began, held_out(centred, start, True)))


if __name__ == "__main__":
    main()
