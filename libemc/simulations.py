"""A simulation's files: the maps of its particles in, and what a microscope's computer would write, and the truth, out.

What the scene and its images are is decided in `methods.simulate`; here files meet it, for `emc_simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from libemc.errors import InputError
from libemc.io import mrc, simulated
from libemc.methods import phantom, simulate
from libemc.methods.postprocess import resample


@dataclass(frozen=True)
class Classes:
    """The kinds of particle.

    Attributes:
        maps: (n, n, n) each, V, at the detector's pixel size.
        names: what each is called in the truth.
        symmetry: of the built-in ones.
        diameter: Å, of the largest.
    """

    maps: list[Tensor]
    names: list[str]
    symmetry: str
    diameter: float


def from_files(paths: Sequence[Path], pixel_size: float, strength: float) -> Classes:
    """Maps of any units and sampling.

    Args:
        pixel_size: Å, of the detector.
        strength: contrast, 1 is that of protein in ice.

    Raises:
        InputError: a map that can't be read, is no cube, or is not white.
    """
    maps, diameter = [], 0.0
    for path in paths:
        array, spacing = mrc.read_volume(path)
        if len(set(array.shape)) > 1:
            raise InputError("is not a cube", path, "pad it to one")
        maps.append(simulate.as_potential(resample(from_numpy(array), pixel_size / spacing), pixel_size, strength))
        diameter = max(diameter, simulate.BOX_SHARE * array.shape[0] * spacing)
    return Classes(maps, [path.name for path in paths], "c1", diameter)


def built_in(names: Sequence[str], symmetry: str, box: int | None, pixel_size: float, strength: float) -> Classes:
    """Built-in particles.

    Args:
        names: of `phantom.VARIANTS`.
        box: detector pixels; None: with room to spare around the largest.
        pixel_size, strength: as in `from_files`.

    Raises:
        InputError: there is no such symmetry, or the box is too small.
    """
    atoms = [phantom.particle(name, symmetry) for name in names]
    diameter = max(particle.diameter for particle in atoms)
    box = box or simulate.box_for(diameter, pixel_size)
    maps = [phantom.density(particle, box, pixel_size) * strength for particle in atoms]
    return Classes(maps, list(names), symmetry, diameter)


def numbered(path: Path | None, count: int) -> list[Path]:
    """Where so many maps go: the file itself for one, or a numbered one each; none where there is no file."""
    if path is None:
        return []
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{k + 1}") for k in range(count)]


@dataclass(frozen=True)
class Files:
    """What is written of a simulated tilt series."""

    stack: Path
    rawtlt: Path
    mdoc: Path
    truth: Path

    @staticmethod
    def of(stem: Path) -> Files:
        """All beside each other."""
        return Files(*(Path(f"{stem.as_posix()}{end}") for end in (".mrc", ".rawtlt", ".mdoc", "_truth.json")))


def write(
    files: Files,
    scene: simulate.Scene,
    classes: Classes,
    dtype: np.dtype[Any],
    noise: bool,
    true_maps: Sequence[Path],
    progress: Callable[..., Iterator[Any]],
) -> float:
    """Make the images of a scene and write them one by one, then all that is known of it; the truth comes last.

    Args:
        dtype: of the pixels, one of `simulated.MODES`.
        noise: count electrons, or write their expected number.
        true_maps: where the map of each class goes, at the pixel size of the images; empty: nowhere.
        progress: wraps the loop over the images.

    Returns:
        The mean of all pixels, electrons.
    """
    shape, total = (len(scene.tilt), *scene.shape), 0.0
    gain = simulate.gain_for(scene, dtype)
    with simulated.detector_stack(files.stack, shape, scene.pixel_size, dtype) as pixels:
        images = simulate.tilt_images(scene, classes.maps, noise)
        for j, image in enumerate(progress(images, total=shape[0], label="tilts")):
            pixels[j] = simulate.counts(image, dtype, gain)
            total += float(image.mean())
    for path, density in zip(true_maps, classes.maps, strict=False):  # none unless asked for
        mrc.write_volume(path, resample(density, scene.oversampling).numpy(), scene.pixel_size)
    box = classes.maps[0].shape[0] // scene.oversampling
    known = scene.truth() | {"n": box, "maps": classes.names, "symmetry": classes.symmetry, "gain": gain}
    simulated.write_rawtlt(files.rawtlt, scene.acquisition.tilts)
    simulated.write_mdoc(files.mdoc, known, files.stack.name, shape, simulated.MODES[dtype])
    simulated.write_truth(files.truth, known)
    return total / shape[0]
