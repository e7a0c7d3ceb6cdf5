#!/usr/bin/env python3
"""Group particles by where they lie along the axes that emc_pca found, and average each class.

RUN is a folder of emc_pca. Several numbers of clusters are tried, 1 to 6 or those given; the one that is kept is the best by
its Bayesian information criterion among those whose clusters are farther apart than in data without structure. The class of
each particle goes into RUN's particle files; class_1.mrc, ... (the largest class first) with their half maps, montage.png,
trials.png, classes.html and clusters.json beside them. The other numbers that were asked for by name are in RUN/k2, RUN/k3 ...,
complete with particles. Errors of coordinates are those of each particle's own images (mixture); kmeans and hierarchical see
the coordinates alone.

    emc_cluster pca_00
    emc_cluster pca_00 --clusters 2,3,4 --along "60:1,2;30:1"
    emc_select pca_00 --class 1,3 --set good            # on with some of them
    emc_refine pca_00 --reference pca_00/average.mrc --classes 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from libemc import classifications, principal_axes, project, records
from libemc.cli import Program, Run, options
from libemc.io import mrc
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


def write(
    folder: Path, args: argparse.Namespace, head: records.ParticleSet, series: list[Particles], ids: list[str],
    trials: list[Trial], chosen: int, bands: list[object], run: Run,
) -> None:  # fmt: skip
    """Everything of one number of clusters."""
    trial, pixel_size = trials[chosen], head.pixel_size
    series = classifications.with_classes(series, ids, trial)
    mask = project.read_mask(Path(args.set_or_run) / "mask.mrc", head.box, pixel_size)
    classes = classifications.class_averages(series, trial.count, mask, head.symmetry, run)
    halves = [torch.from_numpy(mrc.read_volume(Path(args.set_or_run) / f"half{h}.mrc")[0]) for h in (1, 2)]
    views = classifications.class_views(classes, trial, (halves[0] + halves[1]) / 2, run)
    classifications.write_class_maps(folder, classes, pixel_size, run)
    by_series = classifications.populations(series, trial.count)
    kept = {"clusters": args.clusters, "method": args.method, "axes": args.along}
    title = f"{folder}: {trial.count} classes of {len(ids)} particles"
    classifications.write_cluster_page(
        folder, title, kept, pixel_size, views, trials, chosen, bands, by_series, run
    )  # fmt: skip
    state = {"trials": [classifications.trial_state(t) for t in trials], "chosen": trial.count, **kept}
    classifications.save_clusters(folder, ids, trial, classes, state, run)
    project.save_run_particles(folder, head, series, str(args.set_or_run))
    for one in classes:
        resolution = "" if one.made is None else f", {one.made.resolution:.2f} Å at FSC 0.143"
        run.result(f"{folder}: class {one.number}, {sum(one.halves)} particles{resolution}")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check, cluster, average, write; the record of the analysis last."""
    counts = classifications.counts_of(args.clusters)
    record, path = principal_axes.analysed(args.set_or_run)
    run.particles(args.set_or_run)
    head, series = project.open_particles(args.set_or_run)
    ids, found = principal_axes.read_coordinates(path.parent, record.state["bands"])
    axes = classifications.chosen_axes(args.along, record.state["bands"])
    points = joined([found[name].of_axes(places) for name, places in axes.items()])
    wanted = "1 to 6" if counts is None else args.clusters
    if run.plan(f"group {len(ids)} particles along {points.b.shape[1]} axes into {wanted}"):
        return
    trials, chosen = classifications.try_clusters(points, counts, args.method, run)
    bands = classifications.cluster_bands(record.state["bands"], found, axes)
    for k in range(len(trials)):
        run.result(classifications.trial_line(trials[k]))
        if counts is not None and k != chosen:
            write(path.parent / f"k{trials[k].count}", args, head, series, ids, trials, k, bands, run)
    write(path.parent, args, head, series, ids, trials, chosen, bands, run)
    done = {"trials": [classifications.trial_state(t) for t in trials], "chosen": trials[chosen].count}
    state = {**record.state, "clusters": {**done, "method": args.method, "along": axes}}
    records.update(run.output(path, owned=True), lambda old: old.model_copy(update={"state": state}), records.Run)


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
