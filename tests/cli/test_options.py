"""Options: the values that are taken and refused, and what `options` promises of a declaration. All is exact."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libemc.cli import options
from libemc.errors import InputError


def parsed(*argv: str, add: Callable[..., None] = options.mask, **settings: object) -> argparse.Namespace:
    parser = options.Parser("emc_try", None)
    add(parser, **settings)
    return parser.parse_all(argv)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500M", 500 * 2**20),
        ("4G", 2**32),
        ("1.5gb", 3 * 2**29),
        ("2GiB", 2**31),
        (".5K", 512),
        ("1T", 2**40),
    ],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert options.memory_size(text) == size


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (options.memory_size, "4X"), (options.memory_size, "-1G"), (options.memory_size, "0"),
        (options.number, "nan"), (options.number, "inf"), (options.number, "3Å"), (options.positive, "0"),
        (options.positive, "-2"), (options.not_negative, "-0.1"), (options.fraction, "1.01"),
        (options.fraction, "-0.1"), (options.memory_size, ""),
        (options.integer, "1.5"), (options.count, "0"), (options.seed_number, str(2**32)), (options.box_size, "7"),
        (options.label_name, "a/b"), (options.label_name, ".hidden"), (options.label_name, ""),
        (options.label_name, "-x"),
        (options.integers, "1,2.5"),
        (options.numbers, "1,,2"), (options.region_bounds, "0,1,0,1,0"), (options.region_bounds, "1,0,0,1,0,1"),
        (options.numbers_or_auto, "-50,"), (options.numbers_or_auto, "auto,all"), (options.numbers_or_auto, ""),
        (options.three_angles, "10,20"), (options.three_angles, "1,2,3,4"), (options.three_angles, "a,b,c"),
    ],
)  # fmt: skip
def test_values_that_are_refused(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert "\n" not in str(caught.value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_through_bit_for_bit(value: float) -> None:
    assert options.number(repr(value)) == value
    assert math.copysign(1, options.number(repr(value))) == math.copysign(1, value)


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_lists_of_numbers(values: list[int]) -> None:
    assert options.numbers(",".join(map(str, values))) == tuple(values)


def test_negative_numbers_are_values_and_not_options() -> None:
    assert parsed("--axis", "-85.5", add=options.axis).axis == -85.5
    bounds = (-10.0, 10.0, -20.0, 20.0, -5.0, 5.0)
    assert parsed("--region=-10,10,-20,20,-5,5", add=options.region).region == bounds
    assert parsed("--turn=-10,20,-30.5", add=options.turn).turn == (-10.0, 20.0, -30.5)
    assert parsed("--turn", "-10,20,-30.5", add=options.turn).turn == (-10.0, 20.0, -30.5)
    for words in (("--bfactor", "-50,-.5,auto,-50.0"), ("--bfactor=-50,-.5,auto,-50.0",)):
        assert parsed(*words, add=options.bfactor).bfactor == (-50.0, -0.5, "auto")
    assert parsed("--bfactor", "-100", add=options.bfactor).bfactor == (-100.0,)
    with pytest.raises(InputError, match="'-5x' is not a number"):
        parsed("--bfactor", "-5x", add=options.bfactor)


def test_defaults_belong_to_the_option_or_are_given_by_the_program() -> None:
    assert parsed(add=options.symmetry).symmetry == "c1"
    assert parsed(add=options.lowpass).lowpass is None
    assert parsed(add=options.lowpass, default=40.0).lowpass == 40.0
    with pytest.raises(InputError, match="--mask"):
        parsed(required=True)
    with pytest.raises(TypeError):
        parsed(help="another meaning")


def test_the_help_names_each_default_that_there_is() -> None:
    parser = options.Parser("emc_try", None)
    options.symmetry(parser)
    options.lowpass(parser)
    options.subtomograms(parser)
    options.tiltseries_names(parser)
    options.add_standard(parser, options.STANDARD, "0")
    text = parser.format_help()
    assert "(default: c1)" in " ".join(text.split())
    assert "(default: cpu)" in text
    assert "None" not in text and "False" not in text and "[]" not in text


@pytest.mark.parametrize("word", ["--mas", "--mask-", "--m", "-m", "--masks=x"])
def test_abbreviations_and_misspellings_are_refused(word: str) -> None:
    with pytest.raises(InputError, match=f"there is no option {word.split('=')[0]}"):
        parsed(word, "x")


def test_a_value_may_be_joined_with_an_equals_sign_and_a_name_may_follow_two_dashes() -> None:
    assert str(parsed("--mask=a=b.mrc").mask) == "a=b.mrc"
    assert parsed("--", "--strange", add=options.tiltseries_names).names == ["--strange"]


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert options.usable_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert 1 <= options.usable_threads() <= (os.cpu_count() or 1)


def test_the_memory_of_a_control_group_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000 kB\n"}
    monkeypatch.setattr(options, "_read", lambda file: files.get(file, ""))
    assert options.available_memory() == 8000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "4000\n"}
    assert options.available_memory() == 1000
    files |= {"/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 700\n"}
    assert options.available_memory() == 1700, "a cache of files is given back when it is needed"
    files |= {"/sys/fs/cgroup/memory.max": "max\n"}
    assert options.available_memory() == 8000 * 1024


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 kB"), (3.25 * 2**30, "3.25 GB"), (2**50, "1.02e+03 TB")]
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert options.bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (59.99, "60.0 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert options.seconds_text(seconds) == text
