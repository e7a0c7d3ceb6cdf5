"""The classes that particles fall into, along the axes that `emc_pca` found: tried, averaged, written and drawn. The other half
of `emc_cluster`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libemc.cli import Run, history
from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text
from libemc.methods import average
from libemc.methods.classify import cluster
from libemc.methods.classify.cluster import Trial
from libemc.methods.classify.coordinates import Coordinates
from libemc.methods.directional import wiener_gain
from libemc.methods.refine.references import filter_shells
from libemc.methods.subtilts import Particles
from libemc.principal_axes import in_errors

AUTO = "auto"
CLUSTERS = "clusters.json"
PICTURES = ("montage.png", "trials.png", "classes.png", "classes.html")
PARTS = ("", "_half1", "_half2")
"""What the maps of a class end with."""


def chosen_axes(text: str, bands: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Places, from 0, of the axes of each band to look for classes in: `auto`, or 60:1,2;30:1 with numbers from 1.

    Raises:
        InputError: the text says no such thing, or there is no such band or axis.
    """
    if text == AUTO:
        return {b["scale"]: [k for k in range(b["meaningful"]) if b["left_out"][k] is None] for b in bands}
    known = {b["scale"]: len(b["strength"]) for b in bands}
    out: dict[str, list[int]] = {name: [] for name in known}
    for part in text.split(";"):
        name, _, numbers = part.partition(":")
        if name not in known:
            raise InputError(f"'{part}' begins with no scale of {', '.join(known)}", "--along", "as 60:1,2;30:1")
        for number in numbers.split(","):
            if not number.isdecimal() or not 1 <= int(number) <= known[name]:
                raise InputError(
                    f"'{number}' is no axis from 1 to {known[name]} of {name} Å", "--along", "as 60:1,2;30:1"
                )
            out[name].append(int(number) - 1)
    return {name: sorted(set(places)) for name, places in out.items()}


def counts_of(text: str) -> tuple[int, ...] | None:
    """Numbers of clusters, 1 or more each; None for `auto`."""
    if text == AUTO:
        return None
    parts = text.split(",")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"'{text}' is neither auto nor numbers such as 2,3,4", "--clusters", "give one of the two")
    return tuple(sorted({int(p) for p in parts}))


def try_clusters(points: Coordinates, counts: tuple[int, ...] | None, method: str, run: Run) -> tuple[list[Trial], int]:
    """Cluster into each number, and choose one of them, by place.

    Raises:
        InputError: more clusters than particles, or clusters without an axis.
    """
    size, dimensions = points.b.shape
    wanted = counts or tuple(range(1, min(cluster.MOST, size) + 1))
    if max(wanted) > size:
        raise InputError(f"{max(wanted)} clusters of {size} particles", "--clusters", "ask for fewer")
    if not dimensions:
        if counts is not None and max(counts) > 1:
            raise InputError("no axis is above noise", "--clusters", "name axes with --along, or let it be auto")
        wanted = (1,)
        labels = np.zeros(size, dtype=np.int64)
        one = cluster.Mixture(
            torch.ones(1).double(),
            torch.zeros(1, 0).double(),
            torch.zeros(0, 0).double(),
            torch.ones(size, 1).double(),
            0.0,
        )
        return [Trial(labels, one, math.nan, np.empty(0), math.nan)], 0
    trials: list[Trial] = []
    for count in run.progress(wanted, len(wanted), "clusters"):
        found = cluster.trial(points, count, method, run.seed)
        if found.count < count and counts is not None:
            run.warn(f"{count} clusters were asked for: the mixture needs no more than {found.count}")
        if all(found.count != t.count for t in trials):
            trials.append(found)
    return trials, cluster.proposed(trials)


def trial_line(trial: Trial) -> str:
    """What so many clusters are worth, for the user."""
    if trial.count == 1:
        return f"1 cluster: criterion {trial.mixture.criterion:.0f}"
    chance = float(np.quantile(trial.chance, cluster.CHANCE))
    return (
        f"{trial.count} clusters: criterion {trial.mixture.criterion:.0f}, silhouette {trial.silhouette:.2f} "
        f"(without structure up to {chance:.2f}), stability {trial.stability:.2f}"
        + ("" if trial.real else ": no more than chance")
    )


def trial_state(trial: Trial) -> dict[str, Any]:
    """The same as plain numbers."""

    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {
        "clusters": trial.count,
        "criterion": trial.mixture.criterion,
        "silhouette": plain(trial.silhouette),
        "chance": [float(v) for v in trial.chance],
        "stability": plain(trial.stability),
        "populations": np.bincount(trial.labels, minlength=trial.count).tolist(),
        "real": trial.real,
    }


def with_classes(series: Sequence[Particles], ids: Sequence[str], trial: Trial) -> list[Particles]:
    """Particles with the class that they are in, from 1; 0 for those that weren't clustered."""
    number = dict(zip(ids, (trial.labels + 1).tolist(), strict=True))
    out = []
    for p in series:
        moved = tuple(q.model_copy(update={"class_": number.get(q.id, 0)}) for q in p.file.particles)
        out.append(Particles.of(p.file.model_copy(update={"particles": moved}), p.stack))
    return out


def class_of(series: Sequence[Particles], number: int) -> list[Particles]:
    """The particles of a class that have weight, the others not used."""
    out = []
    for p in series:
        mine = torch.tensor([q.class_ == number for q in p.file.particles], dtype=torch.bool)
        out.append(p.using(p.use & (p.weight > 0) & mine))
    return out


@dataclass(frozen=True)
class ClassAverage:
    """The average of a class: None of both where a half has no images."""

    number: int
    halves: tuple[int, int]
    maps: average.HalfMaps | None
    made: average.Average | None


def class_averages(
    series: Sequence[Particles], count: int, mask: Tensor, symmetry: str, run: Run
) -> list[ClassAverage]:
    """Average each class, as emc_average does."""
    out = []
    for number in range(1, count + 1):
        mine = class_of(series, number)
        size = tuple(sum(int((p.use & (p.half == h)).sum()) for p in mine) for h in (1, 2))
        try:
            maps = average.half_maps(mine, run.memory, symmetry, progress=run.progress)
        except InputError:
            run.warn(f"class {number} has no images in one of the halves: it gets no average")
            out.append(ClassAverage(number, (size[0], size[1]), None, None))
            continue
        made = average.finish(maps, mask, series[0].file.pixel_size, run.seed)
        out.append(ClassAverage(number, (size[0], size[1]), maps, made))
    return out


def write_class_maps(folder: Path, classes: Sequence[ClassAverage], pixel_size: float, run: Run) -> None:
    """class_1.mrc, filtered, and its half maps, of each class."""
    for one in classes:
        if one.maps is None or one.made is None:
            continue
        for end, volume in zip(PARTS, (one.made.average, one.maps.half1, one.maps.half2), strict=True):
            path = run.output(folder / f"class_{one.number}{end}.mrc", owned=True)
            mrc.write_volume(path, volume.float().numpy(), pixel_size)


def claim(folder: Path, count: int, run: Run) -> None:
    """Say what is written of so many classes: a record that is saved then knows the files, should the run be killed.

    Raises:
        InputError: one of them is another's.
    """
    maps = [f"class_{number}{end}.mrc" for number in range(1, count + 1) for end in PARTS]
    for name in (*maps, *PICTURES, CLUSTERS):
        run.output(folder / name)


def remove_older(folder: Path, classes: Sequence[ClassAverage], run: Run) -> None:
    """Remove the maps of classes that an earlier clustering left in the folder, and this one has no average of."""
    new = {f"class_{one.number}{end}.mrc" for one in classes if one.made is not None for end in PARTS}
    for file in sorted(folder.glob("class_*.mrc")):
        if file.name not in new and history.written_by(run.name, file, run.project):
            file.unlink()


def class_views(
    classes: Sequence[ClassAverage], labels: NDArray[np.int64], confidence: Tensor, whole: Tensor
) -> list[Any]:
    """The classes for the page.

    Args:
        labels: (N,) the class of each particle, from 1; confidence: (N,) with which it is in it.
        whole: (n, n, n) unfiltered average of all.
    """
    from libemc.view import classification
    from libemc.view.plots import central_slices

    total = len(labels)
    views = []
    for one in classes:
        mine = confidence[torch.from_numpy(labels == one.number)]
        volume = torch.zeros_like(whole) if one.made is None else one.made.average
        difference = torch.zeros_like(whole)
        if one.made is not None and one.maps is not None:
            gain = wiener_gain(average.for_filters(one.made.corrected))
            difference = filter_shells(one.maps.whole - whole, gain)
        views.append(
            classification.ClassView(
                number=one.number, count=len(mine), halves=one.halves, share=len(mine) / total,
                resolution=one.made.resolution if one.made else None,
                confidence=float(mine.median()) if len(mine) else math.nan,
                slices=dict(central_slices(volume.float().numpy())),
                difference_slices=dict(central_slices(difference.float().numpy())),
            )
        )  # fmt: skip
    return views


def cluster_bands(
    bands: Sequence[Mapping[str, Any]], found: Mapping[str, Coordinates], axes: Mapping[str, list[int]]
) -> list[Any]:
    """The bands for the page of clusters: the axes that were used come first."""
    from libemc.view import heterogeneity

    views = []
    for band in bands:
        used = axes[band["scale"]]
        order = [*used, *(k for k in range(len(band["strength"])) if k not in used)]
        views.append(
            heterogeneity.BandView(
                name=band["scale"], coarse=math.inf if band["coarse"] is None else band["coarse"], fine=band["fine"],
                strength=np.array(band["strength"])[order], noise=np.array(band["noise"]), floor=band["floor"],
                meaningful=len(used), suspects=[band["explained"][k] for k in order], left_out=[False] * len(used),
                coordinates=in_errors(found[band["scale"]])[:, order], axes_slices=[], variance_slices={},
            )
        )  # fmt: skip
    return views


def write_cluster_page(
    folder: Path, title: str, facts: Mapping[str, Any], pixel_size: float, classes: list[Any], trials: Sequence[Trial],
    chosen: int, bands: list[Any], by_series: Mapping[str, Sequence[int]], run: Run,
) -> None:  # fmt: skip
    """The pictures and the page of a clustering."""
    from libemc.view import classification, heterogeneity

    views = [
        classification.Trial(
            clusters=t.count, criterion=t.mixture.criterion, silhouette=t.silhouette,
            null=(float(t.chance.mean()), float(np.quantile(t.chance, cluster.CHANCE))) if len(t.chance) else (math.nan,) * 2,
            stability=t.stability, chosen=k == chosen,
        )
        for k, t in enumerate(trials)
    ]  # fmt: skip
    labels = trials[chosen].labels + 1
    classification.montage_plot(run.output(folder / "montage.png", owned=True), classes, pixel_size)
    classification.trials_plot(run.output(folder / "trials.png", owned=True), views)
    heterogeneity.coordinates_plot(run.output(folder / "classes.png", owned=True), bands, labels)
    page = classification.ClusterPage(
        title=title, facts={k.replace("_", " "): str(v) for k, v in facts.items() if v not in (None, False)},
        pixel_size=pixel_size, classes=classes, trials=views, bands=bands, labels=labels, by_series=by_series,
    )  # fmt: skip
    classification.write_cluster_page(run.output(folder / "classes.html", owned=True), page)


def write_refined_page(
    folder: Path, title: str, pixel_size: float, classes: list[Any], labels: NDArray[np.int64],
    by_series: Mapping[str, Sequence[int]], run: Run,
) -> None:  # fmt: skip
    """The picture and the page of classes that were refined."""
    from libemc.view import classification

    classification.montage_plot(run.output(folder / "montage.png", owned=True), classes, pixel_size)
    page = classification.ClusterPage(
        title=title,
        facts={},
        pixel_size=pixel_size,
        classes=classes,
        trials=[],
        bands=[],
        labels=labels,
        by_series=by_series,
    )
    classification.write_cluster_page(run.output(folder / "classes.html", owned=True), page)


def populations(series: Sequence[Particles], count: int) -> dict[str, list[int]]:
    """Particles of each class in each tilt series."""
    return {
        p.file.name: [int(sum(q.class_ == k and q.use for q in p.file.particles)) for k in range(1, count + 1)]
        for p in series
    }


def save_clusters(
    folder: Path, ids: Sequence[str], trial: Trial, classes: Sequence[ClassAverage], state: Mapping[str, Any], run: Run
) -> None:
    """Each particle's class and probabilities, and the classes, as a table: clusters.json."""
    rows = [
        json.dumps({"id": i, "class": int(label) + 1, "probability": [round(v, 4) for v in row]})
        for i, label, row in zip(ids, trial.labels, trial.mixture.probability.tolist(), strict=True)
    ]
    head = dict(state) | {
        "classes": [
            {
                "number": one.number, "count": int((trial.labels == one.number - 1).sum()), "halves": list(one.halves),
                "resolution": one.made.resolution if one.made else None,
                "fsc": [round(v, 4) for v in one.made.corrected.tolist()] if one.made else None,
            }
            for one in classes
        ]
    }  # fmt: skip
    text = json.dumps(head, indent=1)[:-2] + ',\n "particles": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
    write_text(run.output(folder / CLUSTERS, owned=True), text)
