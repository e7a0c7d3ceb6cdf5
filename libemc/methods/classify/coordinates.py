"""Where particles lie along the axes, and what else their coordinates follow: how they were sampled, most of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.methods.classify.axes import Axes, Columns, posterior, statistics, without_known
from libemc.methods.classify.differences import Differences, Member
from libemc.methods.subtilts import Particles

Array = NDArray[np.float64]

FOLLOWS = 0.5
"""Part of an axis's variance that is explained by how particles were sampled, beyond which it's taken for that."""


@dataclass(frozen=True)
class Coordinates:
    """What N particles say of their places along the k axes of a band: log-likelihood = b·z - z·A·z / 2, z of unit variance.

    Attributes:
        b: (N, k); a: (N, k, k); float64.
    """

    b: Tensor
    a: Tensor

    def of_axes(self, which: Sequence[int]) -> Coordinates:
        """Along some of the axes, those left out being no axes at all."""
        index = torch.tensor(list(which), dtype=torch.long)
        return Coordinates(self.b[:, index], self.a[:, index][:, :, index])

    def at(self, particles: Tensor) -> Coordinates:
        """Of some particles, (P,) int64 or a mask."""
        return Coordinates(self.b[particles], self.a[particles])

    def typical(self) -> Coordinates:
        """As if all particles were sampled alike."""
        return Coordinates(self.b, self.a.mean(dim=0, keepdim=True).expand_as(self.a))

    @property
    def likely(self) -> Tensor:
        """(N, k) float64: the expected coordinates, drawn towards 0 by as much as they are uncertain."""
        count = self.b.shape[1]
        return posterior(self.b, self.a, torch.ones(count, dtype=torch.float64))[0]

    @property
    def in_errors(self) -> Tensor:
        """(N, k) float64: `likely`, in standard errors of a mean particle, the axes made independent of each other."""
        if not self.b.shape[1]:
            return self.b
        mean = self.a.mean(dim=0)
        return self.likely @ torch.linalg.cholesky(mean + 1e-9 * torch.diag(torch.diagonal(mean)))


def joined(parts: Sequence[Coordinates]) -> Coordinates:
    """Coordinates along the axes of several bands: noise in one says nothing of noise in another."""
    b = torch.cat([p.b for p in parts], dim=1)
    a = torch.zeros(len(b), b.shape[1], b.shape[1], dtype=torch.float64)
    start = 0
    for p in parts:
        end = start + p.b.shape[1]
        a[:, start:end, start:end] = p.a
        start = end
    return Coordinates(b, a)


def coordinates(
    blocks: Iterator[tuple[slice, Tensor, Tensor]],
    axes: Axes,
    known: Tensor | None,
    variance: float = 1.0,
    device: str = "cpu",
) -> Coordinates:
    """Of particles whose differences and weights come in blocks, whatever their contrast and small errors of their poses are.

    Args:
        blocks: as `Differences.blocks` of the axes' band gives them.
        known: (7, q), the known axes within the band; None: none.
        variance: of the noise, as `Problem` has it.
    """
    columns = Columns.of((axes.balls if known is None else torch.cat([axes.balls, known])).to(device))
    count = len(axes.balls)
    b, a = [], []
    for _, data, weight in blocks:
        b_and_a = statistics(data / variance, weight / variance, columns)
        found = without_known(*b_and_a, count, axes.known_precision)
        b.append(found[0])
        a.append(found[1])
    return Coordinates(torch.cat(b), torch.cat(a))


def difference_blocks(
    batches: Iterator[tuple[Tensor, Tensor]], differences: Differences, bands: Sequence[slice], device: str = "cpu"
) -> Iterator[list[tuple[slice, Tensor, Tensor]]]:
    """What `differences.read` gives of further particles as blocks, those of every band for each batch."""
    start = 0
    for data, weight in batches:
        here = slice(start, start + len(data))
        rest = data - weight * differences.mean
        yield [(here, rest[:, band].to(device), weight[:, band].to(device)) for band in bands]
        start = here.stop


# -------------------------------------------------------------------------------------------------- what else they follow


def sampling(series: Sequence[Particles], chosen: Sequence[Member]) -> dict[str, Array]:
    """How particles were sampled, in numbers that coordinates may follow: name to (N, m).

    The missing wedge: where beam and tilt axis lie in the particle's frame (second order in their directions, which have no
    sign); images: how many show it; defocus: its mean; half: which.
    """
    wedge, images, defocus, half = [], [], [], []
    for m in chosen:
        p = series[m.series]
        axes = p.rotation[m.place].numpy()[1:]  # tilt axis and beam
        wedge.append(np.concatenate([np.outer(v, v)[np.triu_indices(3)][:5] for v in axes]))
        shown = p.shown[m.place]
        images.append([float(shown.sum())])
        seen = p.defocus[m.place][shown]
        defocus.append([float(seen.mean()) if len(seen) and bool(seen.isfinite().all()) else 0.0])
        half.append([float(p.half[m.place])])
    groups = {"missing wedge": wedge, "images": images, "defocus": defocus, "half": half}
    return {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}


def two_parts(values: Array) -> NDArray[np.bool_]:
    """(N,) which of some numbers (N,) are in the upper of the two parts that leave the least variance within."""
    if len(values) < 2:
        return np.zeros(len(values), dtype=bool)
    order = np.sort(values)
    count = np.arange(1, len(order))
    total = np.cumsum(order)
    between = total[:-1] ** 2 / count + (total[-1] - total[:-1]) ** 2 / (len(order) - count)
    return np.asarray(values > order[int(between.argmax())])


def explained(values: Tensor, groups: Mapping[str, Array]) -> list[dict[str, float]]:
    """Of each of k coordinates (N, k): the part of its variance that follows each group of numbers (R², adjusted).

    Only what is within the two parts that a coordinate falls into by itself counts: kinds of particles may well lie
    differently to the beam, or be picked at different heights, and the axis that tells them apart is none of the sampling's.
    """
    out: list[dict[str, float]] = []
    for z in values.numpy().T:
        parts = two_parts(z).astype(int)
        found = {}
        for name, numbers in groups.items():
            rest, design = z.copy(), np.array(numbers)
            for part in np.unique(parts):
                mine = parts == part
                rest[mine] -= rest[mine].mean()
                design[mine] -= design[mine].mean(axis=0)
            rank = int(np.linalg.matrix_rank(design))
            left = rest - design @ np.linalg.lstsq(design, rest, rcond=None)[0]
            free, whole = max(1, len(z) - 2 - rank), max(1, len(z) - 2)
            ratio = (left @ left) / max(float(rest @ rest), 1e-300) * whole / free
            found[name] = float(max(0.0, 1 - ratio)) if rank else 0.0
        out.append(found)
    return out


def follows_sampling(found: Mapping[str, float]) -> str | None:
    """What an axis follows instead of structure; None: nothing."""
    name = max(found, key=lambda n: found[n], default=None)
    return name if name is not None and found[name] > FOLLOWS else None
