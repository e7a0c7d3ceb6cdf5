"""Which reader a file wants: alignments by the ending and the content of the files given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from libemc.errors import InputError
from libemc.io.aretomo import read_aln, read_ctf_table
from libemc.io.files import StrPath, read_json
from libemc.io.geometry import Alignment, Array, Ctf
from libemc.io.imod import read_defocus, read_imod_alignment
from libemc.io.jsonfile import read_json_alignment
from libemc.io.relion import read_tilt_series, read_tomograms
from libemc.io.star import read_star
from libemc.io.truth import is_truth, read_truth

KINDS = (".xf", ".tlt", ".xtilt", ".aln", ".star", ".json", ".defocus", ".txt")


def _spread(ctf: Ctf, use: np.ndarray, path: StrPath) -> Ctf:
    """A CTF of the used tilts only, or of all, as one of all: the tilts left out get the median."""
    if len(ctf.defocus_u) == len(use):
        return ctf
    if len(ctf.defocus_u) != use.sum():
        raise InputError(f"has {len(ctf.defocus_u)} lines for {len(use)} images", path, "give the file of this stack")

    def spread(values: Array | None) -> Array | None:
        if values is None:
            return None
        out = np.full(len(use), np.median(values))
        out[use] = values
        return out

    names = ("defocus_u", "defocus_v", "angle", "phase_shift", "score", "resolution")
    values: dict[str, Any] = {name: spread(getattr(ctf, name)) for name in names}
    return replace(ctf, **values)


def _star_alignment(path: StrPath, name: str | None, pixel_size: float) -> tuple[Alignment, Ctf | None]:
    blocks = read_star(path)
    if not any("rlnTomoName" in block.columns for block in blocks.values()):
        return read_tilt_series(path)
    table = next(block for block in blocks.values() if "rlnTomoName" in block.columns)
    single = len(table) == 1
    found = read_tomograms(path, None if single or name is None else [name])
    if len(found) != 1:
        raise InputError(f"has {len(found)} tomograms", path, "name the tilt series after the one that is meant")
    tomogram = next(iter(found.values()))
    if tomogram.alignment is None:
        raise InputError(f"has no alignment of {tomogram.name}", path, "give the file after RELION's alignment job")
    if abs(tomogram.pixel_size / pixel_size - 1) > 0.01:
        what = f"is of {tomogram.pixel_size:g} Å/px, the tilt series of {pixel_size:g}"
        raise InputError(what, path, "give the file that belongs to the stack")
    return tomogram.alignment, tomogram.ctf


def read_alignment(
    files: Sequence[StrPath],
    *,
    shape: tuple[int, int],
    pixel_size: float,
    nominal: Array,
    name: str | None = None,
    binning: float = 1.0,
) -> tuple[Alignment, Ctf | None]:
    """The alignment, and the CTF if they say it, of one or several files that belong together.

    Args:
        files: one alignment: .xf with .tlt and .xtilt (found beside it by themselves), AreTomo's .aln, RELION's .star
            (tomograms or tilt series), JSON with an "alignment" section, or a simulator's truth; and if need be its
            CTF: IMOD's .defocus, or the .txt table of AreTomo or CTFFIND.
        shape: (y, x) of the raw images, px.
        pixel_size: Å of the raw images.
        nominal: nominal angles of the raw stack, degrees, (T,).
        name: the tilt series, to choose it in a file of several.
        binning: of the images that an .xf was made on.

    Raises:
        InputError: no alignment among the files, more than one, a kind that is not read, or another number of tilts.
    """
    by_kind: dict[str, Path] = {}
    for file in files:
        kind = Path(file).suffix.lower()
        kind = ".tlt" if kind == ".rawtlt" else kind
        if kind not in KINDS:
            raise InputError("is no kind of alignment that is read", file, f"give one of {' '.join(KINDS)}")
        if kind in by_kind:
            raise InputError(f"is the second {kind} file", file, "give the files of one alignment")
        by_kind[kind] = Path(file)
    main = [kind for kind in (".xf", ".aln", ".star", ".json") if kind in by_kind]
    if len(main) != 1:
        listed = ", ".join(str(file) for file in files) or "nothing"
        raise InputError(
            f"{listed}: {len(main)} alignments, one is wanted", None, "give one of .xf, .aln, .star or .json"
        )
    path, count = by_kind[main[0]], len(nominal)
    ctf: Ctf | None = None
    if main[0] == ".xf":
        tlt = by_kind.get(".tlt", path.with_suffix(".tlt"))
        if not tlt.exists():
            raise InputError("has no .tlt beside it", path, "give the .tlt file of tilt angles too")
        xtilt = by_kind.get(".xtilt", path.with_suffix(".xtilt"))
        alignment = read_imod_alignment(
            path, tlt, xtilt if xtilt.exists() else None, shape=shape, pixel_size=pixel_size, binning=binning
        )
    elif main[0] == ".aln":
        alignment = read_aln(path, pixel_size=pixel_size, count=count, nominal=nominal)
    elif main[0] == ".star":
        alignment, ctf = _star_alignment(path, name, pixel_size)
    elif is_truth(read_json(path)):
        truth = read_truth(path)
        alignment, ctf = truth.alignment, truth.ctf
    else:
        alignment, ctf = read_json_alignment(path, count)
    if alignment.count != count:
        raise InputError(f"is of {alignment.count} tilts, not {count}", path, "give the file that belongs to the stack")
    if ".defocus" in by_kind:
        ctf = read_defocus(by_kind[".defocus"], count)
    elif ".txt" in by_kind:
        ctf = _spread(read_ctf_table(by_kind[".txt"]), alignment.use, by_kind[".txt"])
    return alignment, ctf
