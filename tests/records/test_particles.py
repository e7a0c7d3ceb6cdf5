"""Particle sets and runs: found by every name, halves by id, numbered directories that two programs never share."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libemc.errors import InputError
from libemc.records import (
    ParticleFile,
    ParticleSet,
    fingerprint,
    half_of,
    load,
    load_particles,
    next_run_directory,
    particles_path,
    runs,
    save_particles,
)

INFO = Path(__file__).resolve().parents[2] / "info"
FILE = load(INFO / "example_particles.json", ParticleFile)
HEAD = load(INFO / "example_set.json", ParticleSet)


def test_saved_set_is_found_by_name_directory_and_path(project: Path) -> None:
    other = FILE.model_copy(update={"name": "TS_02", "particles": FILE.particles[:1]})
    written = save_particles("particles/ribo", HEAD, {"TS_01": FILE, "TS_02": other})
    assert written.count == 3
    assert written.files == {"TS_01": "particles/ribo/TS_01.json", "TS_02": "particles/ribo/TS_02.json"}
    for name in ("ribo", "particles/ribo", "particles/ribo/particles.json", project / "particles" / "ribo"):
        head, files = load_particles(name)
        assert head == written and files == {"TS_01": FILE, "TS_02": other}


def test_particles_of_a_run_and_of_a_project_elsewhere(tmp_path: Path) -> None:
    save_particles("spt_00/particles", HEAD, {"TS_01": FILE}, project=tmp_path)
    head, files = load_particles("spt_00", project=tmp_path)
    assert head.files == {"TS_01": "spt_00/particles/TS_01.json"} and files == {"TS_01": FILE}
    assert particles_path("spt_00", tmp_path) == tmp_path / "spt_00" / "particles" / "particles.json"


def test_saving_again_replaces(project: Path) -> None:
    save_particles("particles/ribo", HEAD, {"TS_01": FILE, "TS_02": FILE})
    save_particles("particles/ribo", HEAD, {"TS_01": FILE.model_copy(update={"particles": ()})})
    head, files = load_particles("ribo")
    assert head.count == 0 and list(files) == ["TS_01"] and files["TS_01"].particles == ()


def test_missing_set_names_those_that_there_are(project: Path) -> None:
    with pytest.raises(InputError, match="ribo: no such particle set or run; make a set with emc_extract"):
        load_particles("ribo")
    save_particles("particles/ribo", HEAD, {"TS_01": FILE})
    with pytest.raises(InputError, match="there are the sets ribo"):
        load_particles("rib0")
    os.remove("particles/ribo/TS_01.json")
    with pytest.raises(InputError, match=r"particles/ribo/TS_01.json: no such record"):
        load_particles("ribo")


@given(st.text(max_size=5), st.integers(0, 10**6), st.integers(1, 40))
def test_halves_are_balanced_for_any_run_of_numbers(name: str, first: int, count: int) -> None:
    halves = [half_of(f"{name}.{number:06d}") for number in range(first, first + count)]
    assert abs(halves.count(1) - halves.count(2)) <= 2  # at most one half-pair at either end
    assert set(halves) <= {1, 2}


def test_halves_do_not_alternate_and_never_change() -> None:
    halves = [half_of(f"TS_01.{number:06d}") for number in range(2000)]
    same = sum(a == b for a, b in pairwise(halves))
    # Equal neighbours only between pairs, each a fair coin: 999 coins, five standard deviations are 79.
    assert abs(same - 499.5) < 79
    # Frozen: a change would move particles of existing projects between half sets.
    assert "".join(map(str, halves[:24])) == "211221122112211212212121"
    assert [half_of(odd) for odd in ("", "no number", "TS_02.7")] == [1, 2, 2]


def test_run_directories_are_numbered_after_the_highest(project: Path) -> None:
    assert [next_run_directory("spt").name for _ in range(2)] == ["spt_00", "spt_01"]
    for name in ("spt_41", "spt_old", "xspt_77", "sgd_99"):
        (project / name).mkdir()
    assert next_run_directory("spt", project) == project / "spt_42"
    assert next_run_directory("sgd").name == "sgd_100"


def test_programs_at_once_get_directories_of_their_own(project: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: next_run_directory("spt").name, range(48)))
    assert sorted(made) == [f"spt_{number:02d}" for number in range(48)]


def test_fingerprint_sees_size_time_and_content(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project / "reference.mrc"
    path.write_bytes(b"density")
    os.utime(path, (1000.5, 1000.5))
    seen = fingerprint(path)
    assert (seen.size, seen.mtime, seen.digest) == (7, 1000.5, hashlib.sha256(b"density").hexdigest())
    monkeypatch.setattr(runs, "DIGEST_BELOW", 7)
    assert fingerprint(path).digest is None
    assert json.loads(seen.model_dump_json())["path"] == str(path)
