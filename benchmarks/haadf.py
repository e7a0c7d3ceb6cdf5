"""A HAADF tilt series before and after alignment: how sharp the section across the tilt axis is.

    python benchmarks/haadf.py DATA PICTURE.png      # DATA/real/haadf/HAADF.mrc

The series is imported and aligned by the programs, and reconstructed twice: with the nominal angles and no shifts about the
axis that was found, and as aligned. Printed: the axis; and of both, the share of the section's gradient energy in its
strongest hundredth of the pixels, which is high where edges are sharp.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from libemc import project, records
from libemc.methods import reconstruct
from libemc.methods.align import coarse
from libemc.methods.subtilts import TiltGeometry


def section(record: records.TiltSeriesRecord, alignment: records.Alignment) -> np.ndarray:
    """The middle xz section of the specimen, (z, x)."""
    geometry = TiltGeometry.of(alignment, record.tilts.use)
    rows, columns = record.source.shape[1:]
    n = max(rows, columns)
    px = record.source.pixel_size
    images = project.open_raw_stack(record).array.astype(np.float32)
    grid = reconstruct.Grid((n // 2 * 2, 16, n // 2 * 2), px)
    volume = reconstruct.small_tomogram(images, geometry, grid, reconstruct.Weighting(thickness=n * px / 2))
    return volume[:, volume.shape[1] // 2 - 2 : volume.shape[1] // 2 + 3].mean(1)


def sharpness(image: np.ndarray) -> float:
    """Share of the gradient energy in the strongest hundredth of the pixels."""
    energy = np.sort(np.sum(np.square(np.gradient(image)), axis=0).ravel())
    return float(energy[-len(energy) // 100 :].sum() / energy.sum())


def main() -> None:
    """Align, reconstruct twice, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    stack, picture = next((args.data / "real" / "haadf").glob("*.mrc")).resolve(), args.picture.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        imported = ("emc_import", stack, "--contrast", "bright", "--pixel-size", "33.6", "--ignore-header")
        for command in (imported, ("emc_tomogram", stack.stem, "--align-only")):
            subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
        record = records.load_tiltseries(stack.stem)
        aligned = records.need(record, "alignment")
        axis = float(np.median(aligned.axis))
        nominal = coarse.nominal(record, axis)
        both = [section(record, nominal), section(record, aligned)]
        os.chdir(picture.parent)
    words = [f"{what}: sharpness {sharpness(s):.3f}" for what, s in zip(("nominal", "aligned"), both, strict=True)]
    print(f"axis {axis:.2f}°; {'; '.join(words)}")
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for panel, image, title in zip(panels, both, words, strict=True):
        panel.imshow(image, cmap="gray", origin="lower", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99.7))
        panel.set_title(title)
        panel.set_axis_off()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main()
