"""Text and back: bit for bit, byte for byte, a particle to a line; and one line for everything that can be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libemc.errors import InputError
from libemc.records import ParticleFile, Picks, Record, Run, TiltSeriesRecord, dumps, half_of, load
from libemc.records.text import loads

INFO = Path(__file__).resolve().parents[2] / "info"
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, st.none() | NUMBERS), max_size=5)


def example(kind: str) -> Any:
    """The plain content of an example."""
    return json.loads((INFO / f"example_{kind}.json").read_text())


def message(content: Any, expected: type[Record] = Record) -> str:
    """What reading this content says."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(InputError) as caught:
        loads(text, "info/TS_01_info.json", expected)
    line = str(caught.value)
    assert line.startswith("info/TS_01_info.json: ") and "\n" not in line and caught.value.remedy
    return line.removeprefix("info/TS_01_info.json: ")


def bits(numbers: list[float]) -> bytes:
    """The very bits of float64 numbers: tells -0.0 from 0.0."""
    return struct.pack(f"{len(numbers)}d", *numbers)


@given(POINTS, st.dictionaries(st.text(), NUMBERS | st.text() | st.lists(NUMBERS) | st.none(), max_size=3))
def test_numbers_and_names_read_back_bit_for_bit(points: list[Any], free: dict[str, Any]) -> None:
    picks = Picks(xyz=tuple(point[:3] for point in points), score=tuple(point[3] for point in points), parameters=free)
    record = load(INFO / "example_tiltseries.json", TiltSeriesRecord).model_copy(update={"picks": {"ä 1": picks}})
    text = dumps(record)
    again = loads(text.encode(), "x", TiltSeriesRecord)
    assert again == record
    assert dumps(again) == text
    flat = [[number for point in each.picks["ä 1"].xyz for number in point] for each in (record, again)]
    assert bits(flat[0]) == bits(flat[1])


def test_particle_file_is_json_with_a_particle_to_a_line() -> None:
    file = load(INFO / "example_particles.json", ParticleFile)
    many = tuple(file.particles[i % 2].model_copy(update={"id": f"TS_01.{i:06d}"}) for i in range(50))
    text = dumps(file.model_copy(update={"particles": many}))
    lines = [line.rstrip(",") for line in text.splitlines() if line.startswith('{"id": "TS_01.')]
    parsed = json.loads(text)
    assert [json.loads(line) for line in lines] == parsed["particles"]
    assert len(lines) == 50 and list(parsed)[-1] == "particles"
    assert [particle["class"] for particle in parsed["particles"]] == [0] * 50
    assert "subtilt" in parsed["particles"][0] and "subtilt" not in parsed["particles"][1]  # absent until refined


def test_per_tilt_lists_are_one_line_each_and_undone_sections_are_absent() -> None:
    record = load(INFO / "example_tiltseries.json", TiltSeriesRecord)
    lines = dumps(record).splitlines()
    assert '  "shift_x": [1.5, -20.25, 0.0],' in lines
    undone = record.model_copy(update={"alignment": None, "ctf": None, "tomograms": (), "picks": {}})
    assert list(json.loads(dumps(undone))) == ["kind", "schema", "name", "source", "tilts", "history"]
    assert loads(dumps(undone).encode(), "x", TiltSeriesRecord) == undone


@pytest.mark.parametrize(("kind", "section"), [("tiltseries", "ctf"), ("particles", "optics")])
def test_a_beam_tilt_is_two_numbers_or_absent(kind: str, section: str) -> None:
    """Of the tilt series, which may have any number of tilts."""
    content = example(kind)
    record = loads(json.dumps(content).encode(), "x", Record)
    assert json.loads(dumps(record))[section]["beam_tilt"] == content[section]["beam_tilt"] == [0.35, -0.12]
    del content[section]["beam_tilt"]
    without = loads(json.dumps(content).encode(), "x", Record)
    assert getattr(without, section).beam_tilt is None and "beam_tilt" not in dumps(without)
    content[section]["beam_tilt"] = [0.1, 0.2, 0.3]
    assert message(content).startswith(f"key {section}.beam_tilt")


def test_records_are_frozen() -> None:
    record = load(INFO / "example_tiltseries.json", TiltSeriesRecord)
    with pytest.raises(ValueError, match="frozen"):
        record.name = "other"  # type: ignore[misc]


WRONG = [
    ("alignment.shift_x", [1.0], "key alignment.shift_x has 1 entries, but there are 3 images in source.shape; "),
    ("tilts.reason", [None] * 4, "key tilts.reason has 4 entries"),
    ("ctf.score", [0.1, 0.2], "key ctf.score has 2 entries"),
    ("picks.ribo.rot", [1.0], "key picks.ribo.rot has 1 entries, but there are 2 points"),
    ("source.shape", [3, 64], "key source.shape"),
    ("source.pixel_size", 0, "key source.pixel_size is wrong: input should be greater than 0; correct it"),
    ("source.pixel_size", "3.0", "key source.pixel_size is wrong: input should be a valid number"),
    ("source.apix", 3.0, "key source.apix is unknown; remove it"),
    ("source.pixelsize", 3.0, "key source.pixelsize is unknown; did you mean pixel_size?"),
    ("alignement", {}, "key alignement is unknown; did you mean alignment?"),
    ("ctf.defocus_u", [1.0, float("nan"), 2.0], "key ctf.defocus_u[1] is NaN or infinite; write a finite number"),
    ("ctf.defocus_v", [1.0, -float("inf"), 2.0], "key ctf.defocus_v[1] is NaN or infinite"),
    ("alignment.freedom", {"a": [{"b": float("nan")}]}, "key alignment.freedom is NaN or infinite"),
    ("ctf.defocus_handedness", 0, "key ctf.defocus_handedness is wrong"),
    ("tilts.use", [1, 1, 0], "key tilts.use[0] is wrong: input should be a valid boolean (and 2 more like it)"),
    ("schema", 2, "key schema is 2, newer than this emc reads (1); install"),
    ("schema", "1", "key schema is wrong"),
    ("schema", -1, "is not a tiltseries record of schema -1"),
    ("kind", "tilt_series", "key kind is 'tilt_series', not 'tiltseries' or 'particles' or 'set' or 'run'; give"),
]


@pytest.mark.parametrize(("key", "value", "line"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_wrong_content_is_one_line_with_file_key_and_remedy(key: str, value: Any, line: str) -> None:
    content = example("tiltseries")
    *sections, last = key.split(".")
    part = content
    for section in sections:
        part = part[section]
    part[last] = value
    assert message(content).startswith(line)


@pytest.mark.parametrize("key", ["kind", "schema", "name", "source", "tilts"])
def test_missing_key_is_named(key: str) -> None:
    content = example("tiltseries")
    del content[key]
    assert message(content).startswith(f"key {key} is missing")


def test_wrong_particles_are_named_by_their_place() -> None:
    content = example("particles")
    content["particles"][1]["visible"] = [1]
    assert message(content).startswith("key particles[1].visible has 1 entries, but there are 3 tilts")
    content = example("particles")
    content["particles"][0]["subtilt"]["dx"] = [0.0]
    assert message(content).startswith("key particles[0].subtilt.dx has 1 entries")
    content = example("particles")
    content["tilts"]["dose"] = []
    assert message(content).startswith("key tilts.dose has 0 entries")
    content = example("particles")
    content["particles"][1]["id"] = "TS_01.000000"
    assert message(content).startswith("key particles[1].id repeats 'TS_01.000000'; give every particle an id")
    content = example("particles")
    content["particles"][1]["half"] = 3
    assert message(content).startswith("key particles[1].half is wrong")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"kind": "run",}', b"not json"])
def test_broken_json_says_where(text: bytes) -> None:
    assert message(text).startswith("not valid JSON: ")


def test_json_that_is_no_object() -> None:
    assert message([]).startswith("the content is wrong: input should be an object")


def test_another_kind_than_expected() -> None:
    assert message(example("run"), TiltSeriesRecord).startswith("key kind is 'run', not 'tiltseries'; give")


def test_every_prefix_of_a_record_is_refused() -> None:
    text = (INFO / "example_set.json").read_bytes().rstrip()
    for length in range(0, len(text), 7):
        message(text[:length])


def test_free_values_are_checked_where_they_are_made() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Run(program="x", options={"a": (1.0, float("inf"))})


def test_halves_of_the_example_agree_with_their_ids() -> None:
    for particle in load(INFO / "example_particles.json", ParticleFile).particles:
        assert particle.half == half_of(particle.id)
