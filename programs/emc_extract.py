#!/usr/bin/env python3
"""Cut the subtilt series of picked particles out of the raw tilt images: a particle set.

For each particle the patch around its projection is cut from every used tilt that sees it, centred by a phase shift,
binned by Fourier cropping, turned white and scaled to unit noise. The set's particle files keep the pose of each pick
and its own defocus in every tilt. With --no-dose they have no doses, and nothing that is made of them is weighted by dose.

With --no-stack nothing is cut now: whatever uses the set cuts the same patches out of the raw images when it needs them.
That saves the disk, and costs time on every reading. The same happens where a set's stack has been removed.

    emc_extract TS_01 --label ribo --set ribo --box 64 --bin 2     # 64 pixels after binning twice
    emc_extract --all --label ribo --set ribo --box 128            # every tilt series that has such picks
    emc_extract TS_01 --label ribo --set ribo --box 64 --subtomograms
    emc_extract TS_01 --label ribo --set ribo --box 64 --no-stack   # particle files only
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from libemc import project, records
from libemc.cli import Program, Run, options
from libemc.errors import InputError
from libemc.io import mrc
from libemc.methods import extract
from libemc.methods.average import subtomograms
from libemc.methods.subtilts import Particles, TiltGeometry
from libemc.numerics.symmetry import symmetry_matrices


def arguments(parser: argparse.ArgumentParser) -> None:
    """The program's own options."""
    options.tiltseries_names(parser)
    options.label(parser, required=True)
    options.set_name(parser, required=True)
    options.box(parser, required=True)
    options.binning(parser, default=1)
    options.symmetry(parser)
    options.no_dose(parser)
    options.subtomograms(parser)
    parser.add_argument("--no-stack", action="store_true", help="write no images: they are cut when they are needed")


def main(args: argparse.Namespace, run: Run) -> None:
    """Check every tilt series, then cut them one after the other, the set's own record last."""
    folder = Path("particles") / args.set_name
    series = [records.load_tiltseries(path) for path in run.tiltseries(args)]
    if args.all:
        series = [s for s in series if args.label in s.picks]
    if not series:
        raise InputError(
            f"no tilt series has picks labelled {args.label!r}", "info", "import them with emc_import --picks"
        )
    pixel_size = common_pixel_size(series) * args.binning
    symmetry_matrices(args.symmetry)
    sources = [checked(record, args, run) for record in series]
    head = run.output(folder / "particles.json")
    # without a head, stacks in the set's folder are what a killed run left
    stacks = {} if args.no_stack else {record.name: folder / f"{record.name}.mrcs" for record in series}
    for stack in stacks.values():
        run.output(stack, owned=not head.exists())
    count = sum(len(records.need_picks(r, args.label).xyz) * r.source.shape[0] for r in series)
    volumes = {
        record.name: [run.output(folder / "subtomograms" / f"{record.name}_{i:06d}.mrc") for i in patches.kept]
        for record, (_, patches) in zip(series, sources, strict=True)
        if args.subtomograms
    }
    size = bool(stacks) * count * args.box**2 * 2 + sum(map(len, volumes.values())) * args.box**3 * 4
    what = "cut" if stacks else "find the places of"
    if run.plan(f"{what} {count} images of {args.box}² from {len(series)} tilt series", disk=size):
        return
    files: dict[str, records.ParticleFile] = {}
    with ExitStack() as all_or_none:  # the stacks take their names together: a set is never half old and half new
        for record, (images, patches) in zip(series, sources, strict=True):
            file, stack = measured(record, images, patches, args, run)
            if target := stacks.get(record.name):
                writer = all_or_none.enter_context(mrc.StackWriter(target, pixel_size, "float16"))
                for block in extract.extract(stack, patches.kept, run.memory, run.progress):
                    writer.append(block)
            files[record.name] = file.model_copy(update={"stack": target and str(target)})
            seen = float(patches.visible[patches.kept].float().sum(dim=1).mean())
            run.result(
                f"{record.name}: {len(patches.kept)} particles, {seen:.1f} tilts each, "
                f"{len(patches.visible) - len(patches.kept)} in no image, box {args.box} at {pixel_size:g} Å"
            )
    records.save_particles(
        folder,
        records.ParticleSet(
            set=args.set_name, label=args.label, box=args.box, pixel_size=pixel_size, symmetry=args.symmetry
        ),
        files,
    )
    if volumes:
        _, opened = project.open_particles(args.set_name)
        for particles in opened:
            write_subtomograms(particles, volumes[particles.file.name], run)
    run.log.info(f"wrote {head}")


def common_pixel_size(series: list[records.TiltSeriesRecord]) -> float:
    """The raw pixel size that all tilt series of a set must share."""
    sizes = {round(record.source.pixel_size, 6) for record in series}
    if len(sizes) > 1:
        raise InputError(
            f"tilt series differ in pixel size: {sorted(sizes)}", "info", "extract them into sets of their own"
        )
    return series[0].source.pixel_size


def checked(
    record: records.TiltSeriesRecord, args: argparse.Namespace, run: Run
) -> tuple[mrc.MrcImages, extract.Patches]:
    """The raw stack of a tilt series, and where its particles lie in it."""
    alignment, picks = records.need(record, "alignment"), records.need_picks(record, args.label)
    run.input(record.source.stack)
    stack = project.open_raw_stack(record)
    if record.ctf is None:
        run.warn(f"{record.name} has no CTF: particles are cut without defocus, and will not be corrected for it")
    geometry = TiltGeometry.of(alignment, record.tilts.use)
    located = extract.locate(
        picks.xyz, geometry, record.ctf, record.source.shape[1:], record.source.pixel_size, args.box * args.binning
    )
    if not bool(located.visible.any()):
        raise InputError("no tilt sees any particle", records.tiltseries_path(record.name), "check picks and alignment")
    return stack, located


def measured(
    record: records.TiltSeriesRecord,
    images: mrc.MrcImages,
    patches: extract.Patches,
    args: argparse.Namespace,
    run: Run,
) -> tuple[records.ParticleFile, extract.PatchStack]:
    """The particle file of a tilt series without its stack, and its patches, still to be cut."""
    cutting = extract.Cutting(args.box, args.binning, record.source.contrast)
    sound = project.Images(images, f"exclude that tilt in {records.tiltseries_path(record.name)}", blank=False)
    levels = extract.measure(sound, patches, cutting, run.memory, run.progress)
    stack = extract.PatchStack(images.array.view(np.ndarray), patches, levels, cutting)
    pixel_size = record.source.pixel_size * args.binning
    what = (args.label, args.set_name, args.box, pixel_size, args.symmetry)
    file = extract.particle_file(record, *what, patches, not args.no_dose)
    return file.model_copy(update={"raw": extract.raw_section(record, project.raw_digest(images), stack)}), stack


def write_subtomograms(particles: Particles, paths: Sequence[Path], run: Run) -> None:
    """One CTF-corrected volume a particle, in the specimen's frame."""
    made = subtomograms(particles, range(len(paths)), run.memory)
    for path, volume in zip(run.progress(paths, label="subtomograms"), made, strict=True):
        mrc.write_volume(path, volume.numpy(), particles.file.pixel_size)


program = Program(
    doc=__doc__, name="emc_extract", arguments=arguments, main=main,
    standard=("threads", "memory", "overwrite", "verbose", "quiet", "dry-run"),
)  # fmt: skip
entry = program.entry

if __name__ == "__main__":
    entry()
