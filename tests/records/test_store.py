"""Nothing is lost: many writers, kill -9, a full disk, a lock that is held; and the history of every write."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from libemc.errors import InputError
from libemc.records import HistoryEntry, Run, finish, load, provenance, save_new, store, update

ROOT = Path(__file__).resolve().parents[2]
RUN = Run(program="emc_refine", options={"startres": 50.0}, state={"count": 0})


def entry(name: str, **fields: object) -> HistoryEntry:
    """A history entry with a name."""
    given = {"program": "emc_refine", "version": "0", "argv": ["emc_refine"], "start": "2026-01-01T00:00:00+00:00"}
    return HistoryEntry.model_validate({"id": name, **given, **fields})


def processes(*arguments: object) -> dict[str, int]:
    """Run `processes.py` and give what it printed."""
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sixty_processes_at_once_lose_no_update_and_no_history(tmp_path: Path) -> None:
    assert processes("together", tmp_path, 60, 3) == {"failed": 0, "count": 180, "entries": 60}


def test_two_hundred_kills_leave_everything_readable_no_lock_and_no_heap(tmp_path: Path) -> None:
    kills = processes("killed", tmp_path, 200, ROOT / "info" / "example_particles.json")
    assert kills["kills"] == 200
    assert kills["counted"] > 200  # every kill was followed by a change: no lock stayed behind
    assert kills["interrupted"] > 0  # about one kill in ten lands inside the write of a record: none has p = 0.9^200
    assert kills["most_beside_records"] <= 4  # two records, each with its lock and one unfinished file
    assert kills["unfinished"] == 0  # the next write uses it up
    # A writer of an image removes what the dead have left, once its own file is there; a kill between adds one more.
    assert kills["most_beside_image"] <= 4


def test_room_loads_neither_numpy_nor_torch() -> None:
    code = "import sys, libemc.records; print(sorted({'numpy', 'torch', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_save_new_makes_the_directory_and_refuses_to_replace(tmp_path: Path) -> None:
    path = tmp_path / "spt_00" / "run.json"
    assert save_new(path, RUN) == load(path) == RUN
    with pytest.raises(InputError, match=r"run\.json: exists already; use --overwrite"):
        save_new(path, RUN)
    assert save_new(path, RUN.model_copy(update={"seed": 7}), overwrite=True).seed == 7


def test_update_sees_what_is_on_disk_and_writes_what_it_returns(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_new(path, RUN)
    for _ in range(3):
        changed = update(path, lambda run: run.model_copy(update={"state": {"count": run.state["count"] + 1}}), Run)
    assert changed == load(path) and changed.state == {"count": 3}


def test_update_of_a_missing_record_is_the_users_and_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such record"):
        update(tmp_path / "run.json", lambda record: record)
    assert list(tmp_path.iterdir()) == []


def test_failing_change_leaves_the_record_and_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_new(path, RUN)
    with pytest.raises(ZeroDivisionError):
        update(path, lambda run: run.model_copy(update={"seed": 1 // 0}))
    assert update(path, lambda run: run) == RUN


def test_full_disk_leaves_the_old_record_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    save_new(path, RUN)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(store.os, "fsync", full)
        update(path, lambda run: run.model_copy(update={"seed": 5}))
    assert load(path) == RUN
    assert sorted(file.name for file in tmp_path.iterdir()) == [".run.json.lock", "run.json"]


@pytest.mark.parametrize(
    "wrong",
    [{"state": {"fsc": [float("nan")]}}, {"state": {"model": object()}}, {"seed": "one"}, {"program": None}],
    ids=["nan", "no word in JSON", "type", "null"],
)
def test_what_would_not_read_back_is_never_written(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = tmp_path / "run.json"
    save_new(path, RUN)
    with pytest.raises((ValueError, TypeError)):
        update(path, lambda run: run.model_copy(update=wrong))
    assert load(path) == RUN


def test_held_lock_is_one_line_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    save_new(path, RUN)
    monkeypatch.setattr(store, "LOCK_TIMEOUT", 0.05)
    with FileLock(tmp_path / ".run.json.lock"), pytest.raises(InputError, match="locked by another program"):
        update(path, lambda run: run)


def test_link_stays_a_link_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "run.json"
    save_new(tmp_path / "real" / "run.json", RUN)
    link.symlink_to(tmp_path / "real" / "run.json")
    before = os.umask(0o002)
    try:
        update(link, lambda run: run.model_copy(update={"seed": 3}))
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert load(tmp_path / "real" / "run.json", Run).seed == 3
    assert link.stat().st_mode & 0o777 == 0o664  # a group that shares a project can write it


def test_every_write_carries_the_history_and_the_last_state_is_put_everywhere(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    token = provenance.current.set(entry("one"))
    try:
        save_new(first, RUN)
        save_new(second, RUN)
        update(first, lambda run: run)
        assert provenance.touched() == (first, second)
        assert [old.state for old in load(first).history] == ["running"]
        finish(entry("one", state="done", wall_seconds=2.5))
        provenance.current.set(entry("two"))
        assert provenance.touched() == ()
        update(second, lambda run: run)
    finally:
        provenance.current.reset(token)
    update(second, lambda run: run)
    assert [(old.id, old.state, old.wall_seconds) for old in load(first).history] == [("one", "done", 2.5)]
    assert [(old.id, old.state) for old in load(second).history] == [("one", "done"), ("two", "running")]
