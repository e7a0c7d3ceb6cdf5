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
    """Poses, resolution and hand.

    Args:
        names: of the tilt series; the true map is that of the first.
    """
    truths = {name: folder / f"raw/{name}_truth.json" for name in names}
    true_map = folder / f"raw/{names[0]}_map.mrc"
    claimed = read_json(folder / "fsc/fsc.json")["resolution"]
    like = comparison.overlaid(folder / "sub_00", true_map, folder / "mask.mrc", claimed)
    refined = comparison.pose_errors("sub_00", truths, REACH, like, folder)
    _, files = records.load_particles("emc", folder)
    count = sum(len(f.particles) for f in files.values())
    there = sum(len(read_truth(truth).picks.xyz) for truth in truths.values())
    picked = comparison.pose_errors("emc", truths, REACH, None, folder)
    _, used = records.load_particles("sub_00", folder)
    refined_count = sum(p.use for f in used.values() for p in f.particles)
    right = int((refined.angle < RIGHT).sum())
    return [
        ("particles found", f"{there}", f"{len(picked.angle)}, and {count - len(picked.angle)} wrong"),
        ("refined positions: median error", "0 Å", f"{refined.distance.median():.1f} Å"),
        ("refined orientations: median error", "0°", f"{refined.angle.median():.1f}°"),
        (f"orientations within {RIGHT:g}° of the truth", f"{refined_count}", f"{right} of {refined_count}"),
        ("resolution of the half maps, FSC = 0.143", "", f"{claimed:.1f} Å"),
        ("resolution against the true map, FSC = 0.5", "", f"{like.agreement.resolution:.1f} Å"),
        ("correlation with the true map", "1", f"{like.agreement.correlation:.3f}"),
        ("correlation with its mirror image", "", f"{like.mirrored:.3f}"),
        ("hand", "right", "right" if like.right_hand else "wrong"),
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows of one length with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
