"""What a project keeps of CTFs: an alignment where none is needed, a summary, and the hand in words."""

from __future__ import annotations

import pytest

from libemc import ctfs
from libemc.errors import InputError
from libemc.methods.estimate_ctf.estimate import Hand
from libemc.records import Alignment, Ctf, Source, Tilts, TiltSeriesRecord


def record(nominal: tuple[float, ...], axis: float | None = None, **more: object) -> TiltSeriesRecord:
    count = len(nominal)
    source = Source(
        stack="s.mrc",
        shape=(count, 40, 50),
        pixel_size=5.0,
        voltage=300.0,
        cs=2.7,
        amplitude_contrast=0.07,
        tilt_axis=axis,
    )
    use = more.pop("use", (True,) * count)
    return TiltSeriesRecord(name="s", source=source, tilts=Tilts(nominal=nominal, use=use), **more)


def test_images_that_are_not_tilted_need_no_alignment() -> None:
    """Tilts of less than a degree: those that the stage says, about the nominal axis, without shifts."""
    found = ctfs.geometry(record((0.5, -0.5), 85.0))
    assert (found.axis, found.tilt, found.xtilt) == ((85.0, 85.0), (0.5, -0.5), (0.0, 0.0))
    assert found.shift_x == found.shift_y == (0.0, 0.0)
    assert ctfs.geometry(record((0.0,))).axis == (0.0,)
    with pytest.raises(InputError, match="alignment is not done yet"):
        ctfs.geometry(record((0.0, 1.0), 85.0))
    zeros = (0.0, 0.0)
    known = Alignment(axis=(3.0, 3.0), tilt=(0.1, 0.2), xtilt=zeros, shift_x=(5.0, 5.0), shift_y=zeros)
    assert ctfs.geometry(record(zeros, 85.0, alignment=known)) == known


def test_a_summary_is_of_the_used_tilts() -> None:
    """Defocus in µm: median, least and most; U - V and its angle; the rings' median; how many are measured."""
    section = Ctf(
        defocus_u=(21000.0, 30000.0, 23000.0, 22000.0),
        defocus_v=(20000.0, 10000.0, 21000.0, 21600.0),
        angle=(10.0, 99.0, 20.0, 30.0),
        phase_shift=(0.0, 0.0, 0.0, 0.0),
        resolution=(8.0, 3.0, None, 12.0),
        measured=(True, False, False, True),
        defocus_handedness=1,
        handedness_score=0.456,
    )
    tilts = (0.0, 10.0, 20.0, 30.0)
    line = ctfs.summary(record(tilts, ctf=section, use=(True, False, True, True)))
    assert line == (
        "s: defocus 2.180 µm (2.050 to 2.200), astigmatism 1000 Å at 20°, hand +1 (0.46), rings to 10.0 Å; "
        "2 of 3 tilts measured"
    )
    shifted = section.model_copy(update={"phase_shift": (80.0, 10.0, 90.0, 100.0), "resolution": None})
    line = ctfs.summary(record(tilts, ctf=shifted, use=(True, False, True, True)))
    assert ", phase shift 90°, hand" in line and "rings to" not in line


def test_the_hand_in_words() -> None:
    """Undecided: what would tell; the usual one: nothing to do; the other: the command that turns the series."""
    series = record((0.0, 10.0))
    undecided = ctfs.hand_in_words(series, Hand(1, 0.7, 0.3, 0.34))
    assert "log-odds 0.7 for hand +1, 0.3 standard deviations" in undecided and "score 0.34" in undecided
    assert "Undecided" in undecided and "--flip" not in undecided
    usual = ctfs.hand_in_words(series, Hand(-1, -30.0, -5.0, 1.0))
    assert "log-odds 30.0 for hand -1" in usual and "falls with height" in usual and "--flip" not in usual
    other = ctfs.hand_in_words(series, Hand(1, 30.0, 5.0, 1.0))
    assert "rises with height" in other and other.endswith("emc_tomoctf s --flip")
