"""What the demonstration adds to the programs that it runs: the table of what was found and what is true.

Files are where the commands of `emc_demo` put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from libemc import comparison, records
from libemc.io.files import read_json
from libemc.io.truth import read_truth

RIGHT = 15.0  # degrees within which an orientation counts as found
REACH = 60.0  # Å: a position that is farther from every true one is none of them
HEAD = ("", "true", "true poses", "found")

Row = tuple[str, ...]


def alignment_row(folder: Path, name: str) -> Row:
    """How well a tilt series is aligned now."""
    error = comparison.alignment_error(name, folder / f"raw/{name}_truth.json", folder)
    found = f"{error.rms:.1f} Å rms, {error.median:.1f} median"
    return f"{name}, alignment: reprojection error", "0 Å", "", found


def defocus_row(folder: Path, name: str) -> Row:
    """How well the CTF of a tilt series is known now."""
    error = comparison.defocus_error(name, folder / f"raw/{name}_truth.json", folder)
    return f"{name}, defocus: error", "0 Å", "", f"{error:.0f} Å rms"


def result_rows(folder: Path, names: Sequence[str]) -> list[Row]:
    """Poses, resolution and hand.

    Args:
        names: of the tilt series; the true map is that of the first.
    """
    truths = {name: folder / f"raw/{name}_truth.json" for name in names}
    picked, refined = (comparison.pose_errors(source, truths, REACH, folder) for source in ("emc", "spt_00"))
    runs = folder / "oracle", folder / "spt_00"
    likes = [
        comparison.map_agreement(run / "average.mrc", folder / f"raw/{names[0]}_map.mrc", folder / "mask.mrc")
        for run in runs
    ]
    maps = {
        "resolution of the half maps, FSC = 0.143": [f"{read_json(r / 'fsc.json')['resolution']:.1f} Å" for r in runs],
        "resolution against the true map, FSC = 0.5": [f"{like.resolution:.1f} Å" for like in likes],
        "correlation with the true map": [f"{like.correlation:.3f}" for like in likes],
        "correlation with its mirror image": [f"{like.mirrored:.3f}" for like in likes],
    }
    _, files = records.load_particles("emc", folder)
    count, all_of_them = sum(len(f.particles) for f in files.values()), len(picked.angle)
    there = sum(len(read_truth(truth).picks.xyz) for truth in truths.values())
    found = int((refined.angle < RIGHT).sum())
    return [
        ("particles found", f"{there}", "", f"{all_of_them}, and {count - all_of_them} wrong"),
        (f"positions (picked {picked.distance.median():.1f} Å off): median error", "0 Å", "",
         f"{refined.distance.median():.1f} Å"),
        (f"orientations (picked {picked.angle.median():.1f}° off): median error", "0°", "",
         f"{refined.angle.median():.1f}°"),
        (f"orientations within {RIGHT:g}° of the truth", f"{all_of_them}", "", f"{found} of {all_of_them}"),
        *((text, "", *cells) for text, cells in maps.items()),
        ("hand", "right", *("right" if like.right_hand else "wrong" for like in likes)),
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows of one length with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
