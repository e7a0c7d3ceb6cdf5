#!/usr/bin/env python3
"""Group particles by where they lie along the axes that emc_pca found, and average each class.

RUN is a folder of emc_pca. Several numbers of clusters are tried, 1 to 6 or those given. One is kept unless more are likelier,
by their Bayesian information criterion, and farther apart, by their silhouette, than in data without structure; then those that
are the most apart. The class of each particle goes into RUN's particle files; class_1.mrc, ... (the largest class first) with
their half maps, montage.png, trials.png, classes.html and clusters.json beside them. The other numbers that were asked for by
name are in RUN/k2, RUN/k3 ..., complete with particles. Errors of coordinates are those of each particle's own images (mixture);
kmeans and hierarchical see the coordinates alone.

    emc_cluster pca_00
    emc_cluster pca_00 --clusters 2,3,4 --along "60:1,2;30:1"
    emc_select pca_00 --class 1,3 --set good            # on with some of them
    emc_refine pca_00 --classes 3
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from libemc import classifications, principal_axes, project, records
from libemc.cli import Program, Run, options
from libemc.methods.classify import cluster
from libemc.methods.classify.cluster import Trial
from libemc.methods.classify.coordinates import joined
from libemc.methods.subtilts import Particles


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.set_or_run(parser)
    parser.add_argument("--clusters", default="auto", metavar="N,...", help="numbers of clusters to try, or auto")
    parser.add_argument("--method", choices=cluster.METHODS, default="mixture", help="how clusters are made")
    parser.add_argument("--along", default="auto", metavar="S:K,..;S:K", help="axes by scale, as 60:1,2;30:1, or auto")


@dataclass(frozen=True)
class Clustered:
    """What is the same whichever number of clusters is written."""

    args: argparse.Namespace
    head: records.ParticleSet
    series: list[Particles]
    ids: list[str]
    mask: torch.Tensor
    whole: torch.Tensor
    symmetry: str
    trials: list[Trial]
    bands: list[object]


def write(folder: Path, found: Clustered, chosen: int, run: Run) -> None:
    """Everything of one number of clusters."""
    args, head, ids, trial = found.args, found.head, found.ids, found.trials[chosen]
    series = classifications.with_classes(found.series, ids, trial)
    classes = classifications.class_averages(series, trial.count, found.mask, found.symmetry, run)
    views = classifications.class_views(classes, trial.labels + 1, trial.confidence, found.whole)
    classifications.write_class_maps(folder, classes, head.pixel_size, run)
    by_series = classifications.populations(series, trial.count)
    kept = {"clusters": args.clusters, "method": args.method, "axes": args.along}
    title = f"{folder}: {trial.count} classes of {len(ids)} particles"
    classifications.write_cluster_page(
        folder, title, kept, head.pixel_size, views, found.trials, chosen, found.bands, by_series, run
    )
    state = {"trials": [classifications.trial_state(t) for t in found.trials], "chosen": trial.count, **kept}
    classifications.save_clusters(folder, ids, trial, classes, state, run)
    if folder == Path(args.set_or_run):  # its own particles: all but the class stays
        records.save_particles(folder / "particles", head, {p.file.name: p.file for p in series})
    else:
        project.save_run_particles(folder, head, series, str(args.set_or_run))
    classifications.remove_older(folder, classes, run)
    for one in classes:
        resolution = "" if one.made is None else f", {one.made.resolution:.2f} Å at FSC 0.143"
        run.result(f"{folder}: class {one.number}, {sum(one.halves)} particles{resolution}")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, cluster, average, write; the record of the analysis last."""
    counts = classifications.counts_of(args.clusters)
    record, path = principal_axes.analysed(args.set_or_run)
    run.particles(args.set_or_run)
    head, series = project.open_particles(args.set_or_run)
    mask = project.read_mask(run.input(path.parent / "mask.mrc"), head.box, head.pixel_size)
    whole = principal_axes.read_whole(path.parent, head, run)
    ids, found = principal_axes.read_coordinates(path.parent, record.state["bands"])
    axes = classifications.chosen_axes(args.along, record.state["bands"])
    points = joined([found[name].of_axes(places) for name, places in axes.items()])
    wanted = "1 to 6" if counts is None else args.clusters
    if run.plan(f"group {len(ids)} particles along {points.b.shape[1]} axes into {wanted}"):
        return
    trials, chosen = classifications.try_clusters(points, counts, args.method, run)
    bands = classifications.cluster_bands(record.state["bands"], found, axes)
    others = [k for k in range(len(trials)) if counts is not None and k != chosen]
    folders = {**{k: path.parent / f"k{trials[k].count}" for k in others}, chosen: path.parent}
    for k, folder in folders.items():
        classifications.claim(folder, trials[k].count, run)
    records.update(run.output(path, owned=True), lambda old: old, records.Run)
    symmetry = str(record.options["symmetry"])
    clustered = Clustered(args, head, series, ids, mask, whole, symmetry, trials, bands)
    for one in trials:
        run.result(classifications.trial_line(one))
    for k, folder in folders.items():
        write(folder, clustered, k, run)
    done = {"trials": [classifications.trial_state(t) for t in trials], "chosen": trials[chosen].count}
    along = {name: [k + 1 for k in places] for name, places in axes.items()}
    state = {**record.state, "clusters": {**done, "method": args.method, "along": along}}
    records.update(path, lambda old: old.model_copy(update={"state": state}), records.Run)


program = Program(
    doc=__doc__,
    name="emc_cluster",
    arguments=arguments,
    main=main,
    standard=("threads", "memory", "overwrite", "seed", "verbose", "quiet", "dry-run"),
)
entry = program.entry

if __name__ == "__main__":
    entry()
