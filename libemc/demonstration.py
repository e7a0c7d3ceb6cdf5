"""What the demonstration adds to the programs that it runs: the table of what was found and what is true, and its page.

Files are where the commands of `emc_demo` put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from libemc import comparison, records
from libemc.io.files import read_json, write_text
from libemc.io.truth import read_truth
from libemc.view import refinement

RIGHT = 15.0  # degrees within which an orientation counts as found
REACH = 60.0  # Å: a position that is farther from every true one is none of them
HEAD = ("", "true", "found")

Row = tuple[str, ...]


def alignment_row(folder: Path, name: str) -> Row:
    """How well a tilt series is aligned now."""
    error = comparison.alignment_error(name, folder / f"raw/{name}_truth.json", folder)
    found = f"{error.rms:.1f} Å rms, {error.median:.1f} median"
    return f"{name}, alignment: reprojection error", "0 Å", found


def defocus_row(folder: Path, name: str) -> Row:
    """How well the CTF of a tilt series is known now."""
    error = comparison.defocus_error(name, folder / f"raw/{name}_truth.json", folder)
    return f"{name}, defocus: error", "0 Å", f"{error:.0f} Å rms"


def result_rows(folder: Path, names: Sequence[str]) -> list[Row]:
    """Poses, classes, resolution and hand.

    Args:
        names: of the tilt series; the true maps are those of the first.
    """
    truths = {name: folder / f"raw/{name}_truth.json" for name in names}
    claimed = read_json(folder / "fsc/fsc.json")["resolution"]
    maps = [folder / f"raw/{names[0]}_map_{k}.mrc" for k in (1, 2)]
    likes = [comparison.overlaid(folder / "final", path, folder / "mask.mrc", claimed) for path in maps]
    kind = max(range(2), key=lambda k: likes[k].agreement.correlation)
    like = likes[kind]
    refined = comparison.pose_errors("sub_00", truths, REACH, like, folder)
    _, files = records.load_particles("emc", folder)
    count = sum(len(f.particles) for f in files.values())
    there = sum(len(read_truth(truth).picks.xyz) for truth in truths.values())
    picked = comparison.pose_errors("emc", truths, REACH, None, folder)
    _, used = records.load_particles("sub_00", folder)
    refined_count = sum(p.use for f in used.values() for p in f.particles)
    right = int((refined.angle < RIGHT).sum())
    classes = comparison.class_agreement("pca_00", truths, REACH, like, folder)
    return [
        ("particles found", f"{there}", f"{len(picked.angle)}, and {count - len(picked.angle)} wrong"),
        ("refined positions: median error", "0 Å", f"{refined.distance.median():.1f} Å"),
        ("refined orientations: median error", "0°", f"{refined.angle.median():.1f}°"),
        (f"orientations within {RIGHT:g}° of the truth", f"{refined_count}", f"{right} of {refined_count}"),
        ("classes", "2", f"{classes.found}"),
        ("particles in the class of most of their kind", f"{classes.count}", f"{classes.right} of {classes.count}"),
        ("classes against the truth, adjusted Rand index", "1", f"{classes.rand:.2f}"),
        ("class 1 is the particle", "1", f"{kind + 1}"),
        ("resolution of its half maps, FSC = 0.143", "", f"{claimed:.1f} Å"),
        ("resolution against the true map, FSC = 0.5", "", f"{like.agreement.resolution:.1f} Å"),
        ("correlation with the true map", "1", f"{like.agreement.correlation:.3f}"),
        ("correlation with its mirror image", "", f"{like.mirrored:.3f}"),
        ("hand", "right", "right" if like.right_hand else "wrong"),
    ]


PICTURES = (
    ("final/average.png", "The largest class", "Central slices of its average."),
    (
        "pca_00/spectrum.png",
        "How particles differ",
        "Strengths of the axes along which they do, beside those of noise.",
    ),
    ("pca_00/classes.png", "Where they lie", "Each dot is a particle, in the colour of its class."),
    (
        "pca_00/montage.png",
        "The classes",
        "Averages; below, what a class has more (red) and less (blue) than all.",
    ),
)


def write_page(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """index.html: the table, the pictures that say most, and the classes placed back in the tomograms."""
    parts = [refinement.section("Found and true", refinement.table(rows[0], rows[1:]))]
    back = [
        (f"mapback/{name}.png", f"{name}, placed back", "The average of each class at the poses of its particles.")
        for name in names
    ]
    parts += [
        refinement.section(headline, refinement.illustration(picture, headline, caption))
        for picture, headline, caption in (*PICTURES, *back)
        if (folder / picture).exists()
    ]
    write_text(folder / "index.html", refinement.document("What came out of the demonstration", parts))


def table(rows: Sequence[Row]) -> str:
    """Rows of one length with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
