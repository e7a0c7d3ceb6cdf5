"""What is looked for, and how: a command line's templates with their maps, and what follows from them for some pixel size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libemc import project
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods.match import templates
from libemc.methods.match.find import Wanted
from libemc.methods.match.templates import Template

FINENESS = 7.0
"""Diameter over the resolution of the search, where that isn't given."""
FINEST = 20.0
"""Å: but no finer than this."""
SAMPLING = 2.2
"""Voxels to the resolution of the search, at least."""


@dataclass(frozen=True)
class Wish:
    """A template as it was asked for."""

    label: str
    file: Path
    symmetry: str
    mask: Path | None = None


def wishes(given: Sequence[str], label: str | None, symmetry: str, mask: Path | None) -> list[Wish]:
    """The templates of a command line.

    Args:
        given: MAP or LABEL=MAP; without a label it's `label`, or the file's name.
        symmetry: one for all, or one for each with commas between.

    Raises:
        InputError: labels are the same or no names, or there are more symmetries, or a mask, for more than one template.
    """
    labels, files = [], []
    for text in given:
        name, _, file = text.rpartition("=")
        own = name or (label if len(given) == 1 and label else re.sub(r"[^A-Za-z0-9_.+-]", "_", Path(file).stem))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", own):
            raise InputError(f"{own!r} is no label", text, "use letters, digits and _ . + -")
        labels.append(own)
        files.append(Path(file))
    groups = symmetry.split(",")
    groups = groups * len(files) if len(groups) == 1 else groups
    if len(set(labels)) < len(labels) or len(groups) != len(files):
        raise InputError(
            "templates, labels and symmetries don't match",
            remedy="give LABEL=MAP with labels of their own, and one --symmetry each",
        )
    if label is not None and (len(given) > 1 or label not in labels):
        raise InputError("--label is for one template without a label", remedy="give LABEL=MAP for each")
    if mask is not None and len(files) > 1:
        raise InputError("--mask is for one template", remedy="mask the maps, or search one after the other")
    return [Wish(name, file, group, mask) for name, file, group in zip(labels, files, groups, strict=True)]


@dataclass(frozen=True)
class Plan:
    """A search as it was asked for, the same for all tomograms.

    Attributes:
        wishes: the templates. densities: their maps, (n, n, n), white, and pixel sizes; masks likewise, or None.
        resolution: Å; None for what the smallest template asks for. binning: None for what the resolution asks for.
        wanted: steps, distance, false picks, seed.
        region: x0, x1, y0, y1, z0, z1 in Å; None for all. thickness: Å. allowed: a tomogram's mask file.
        dose: whether to weight by dose. volumes: write those of scores and rotations.
    """

    wishes: tuple[Wish, ...]
    densities: tuple[tuple[Tensor, float], ...]
    masks: tuple[Tensor | None, ...]
    resolution: float | None
    binning: int | None
    wanted: Wanted
    region: tuple[float, ...] | None = None
    thickness: float | None = None
    allowed: Path | None = None
    dose: bool = True
    volumes: bool = False
    diameters: tuple[float, ...] = field(default=())

    @staticmethod
    def read(wishes: Sequence[Wish], **rest: Any) -> Plan:
        """With the maps read.

        Raises:
            InputError: a map is no cube, or empty, or a mask isn't on its grid.
        """
        densities, masks, diameters = [], [], []
        for wish in wishes:
            data, own = mrc.read_volume(wish.file)
            if len(set(data.shape)) != 1:
                raise InputError(f"is not a cube but {data.shape}", wish.file, "cut it with emc_volume --box")
            if float(data.std()) == 0:
                raise InputError("is the same everywhere", wish.file, "give a map with density in it")
            density = torch.from_numpy(data.astype(np.float32))
            mask = None if wish.mask is None else project.read_mask(wish.mask, data.shape[0], own)
            shown = templates.above_solvent(density) if mask is None else density * mask
            densities.append((density, own))
            masks.append(mask)
            diameters.append(templates.diameter(shown, own))
        return Plan(tuple(wishes), tuple(densities), tuple(masks), diameters=tuple(diameters), **rest)

    def fineness(self, pixel_size: float) -> tuple[float, int]:
        """Resolution, Å, and binning of the search in images of `pixel_size` Å.

        Raises:
            InputError: the binning that was asked for doesn't go with the resolution.
        """
        least = 2 * pixel_size * (self.binning or 1)
        resolution = self.resolution or max(min(self.diameters) / FINENESS, FINEST, 1.05 * least)
        binning = self.binning or max(1, math.floor(resolution / SAMPLING / pixel_size))
        if resolution < 2 * binning * pixel_size * (1 - 1e-9):
            what = f"--resolution {resolution:g} is finer than two voxels of {binning * pixel_size:g} Å"
            raise InputError(what, None, "give a coarser one, or a smaller --bin")
        return resolution, binning

    def templates(self, pixel_size: float, resolution: float) -> list[Template]:
        """Ready to be looked for at some voxel size."""
        return [
            templates.prepare(density, own, pixel_size, resolution, wish.label, mask, wish.symmetry)
            for wish, (density, own), mask in zip(self.wishes, self.densities, self.masks, strict=True)
        ]
