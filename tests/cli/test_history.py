"""History: the chain of commands behind a file, found in the records and proved by running it again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from libemc import records
from libemc.cli import history
from libemc.errors import InputError
from libemc.records import HistoryEntry

# A command that writes each OUT from the concatenated INs; its text is enough to see that an order was kept.
COMMAND = """
import sys
read, write = (part.split(",") for part in sys.argv[1:3])
text = "".join(open(name).read() for name in read if name) + sys.argv[3]
for name in write:
    with open(name, "a" if name.endswith(".json") else "w") as file:
        file.write(text)
"""


def made(
    minute: int, reads: str, writes: str, state: str = "done", words: tuple[str, ...] = (), program: str = "emc_x"
) -> HistoryEntry:
    argv = words or (sys.executable, "-c", COMMAND, reads, writes, f"<{minute}>")
    start = f"2026-01-02T03:{minute:02d}:00.000000+00:00"
    values = {"inputs": tuple(filter(None, reads.split(","))), "outputs": tuple(writes.split(","))}
    return HistoryEntry(id=f"{minute}", program=program, version="0", argv=argv, start=start, state=state, **values)


def commands(script: str) -> list[str]:
    """The minute of each command in a script made of `made`s."""
    return [line.rstrip("'").rpartition("<")[2].rstrip(">") for line in script.splitlines() if line.endswith(">'")]


def test_the_chain_goes_back_to_the_raw_data_and_leaves_out_the_rest(tmp_path: Path) -> None:
    entries = [
        made(1, "raw/a.st", "a.json"),
        made(2, "raw/b.st", "b.json"),
        made(3, "a.json", "a.json,a.mrc"),
        made(4, "b.json", "b.json,b.mrc"),
        made(5, "a.json,a.mrc,mask.mrc", "set.json"),
        made(6, "a.json", "a.json"),
        made(7, "set.json", "average.mrc"),
        made(8, "average.mrc", "fsc.png"),
    ]
    random.Random(1).shuffle(entries)
    script = history.replay(entries, Path("average.mrc"), tmp_path)
    assert commands(script) == ["1", "3", "5", "7"]
    assert "for file in mask.mrc raw/a.st; do" in script
    assert commands(history.replay(entries, Path("b.mrc"), tmp_path)) == ["2", "4"]
    assert commands(history.replay(entries, Path("a.json"), tmp_path)) == ["1", "3", "6"]


def test_the_last_writer_of_a_file_counts_and_only_what_was_there_before_its_reader(tmp_path: Path) -> None:
    entries = [made(1, "raw", "a.mrc"), made(2, "raw", "a.mrc"), made(3, "a.mrc", "b.mrc"), made(4, "raw", "a.mrc")]
    assert commands(history.replay(entries, Path("b.mrc"), tmp_path)) == ["2", "3"]
    assert commands(history.replay(entries, Path("a.mrc"), tmp_path)) == ["4"]


def test_a_folder_means_all_that_was_written_into_it(tmp_path: Path) -> None:
    entries = [made(1, "raw", "spt_00/a.mrc"), made(2, "raw", "spt_00/b.mrc"), made(3, "raw", "spt_001/c.mrc")]
    assert commands(history.replay(entries, Path("spt_00"), tmp_path)) == ["1", "2"]


def test_what_was_cut_short_counts_unless_it_was_done_later(tmp_path: Path) -> None:
    words = ("emc_refine", "ribo")
    stopped = made(1, "", "run.json", state="interrupted", words=words)
    killed = made(2, "", "run.json", state="running", words=(*words, "--resume"))
    done = made(3, "run.json", "run.json,average.mrc", words=(*words, "--resume"))
    script = history.replay([stopped, killed, done], Path("average.mrc"), tmp_path)
    assert script.splitlines()[-1] == "emc_refine ribo" and script.count("emc_refine ribo") == 1
    script = history.replay([stopped], Path("run.json"), tmp_path)
    assert script.splitlines()[-2:] == ["# emc 0, 2026-01-02T03:01:00, interrupted", "emc_refine ribo"]


def test_words_are_quoted_for_the_shell(tmp_path: Path) -> None:
    word = "a 'quoted' $HOME; rm -rf *"
    script = history.replay([made(1, "", "x y.mrc", words=("printf", "%s", word))], Path("x y.mrc"), tmp_path)
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == word


def test_a_file_that_no_command_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^raw: no command in this project's histories wrote it; "):
        history.replay([made(1, "raw", "a.mrc")], Path("raw"), tmp_path)


def test_running_the_script_makes_the_same_file_again(tmp_path: Path) -> None:
    """A random history is executed; the script of its last file, run in an empty folder, gives the same bytes."""
    chance = random.Random(7)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "raw 1.st").write_text("r1")
        (folder / "raw 2.st").write_text("r2")
    files = ["raw 1.st", "raw 2.st"]
    entries = []
    for minute in range(1, 13):
        reads = ",".join(chance.sample(files, min(2, len(files))))
        writes = f"{chance.choice('abcd')}.mrc"
        if writes in reads.split(","):
            continue
        entries.append(made(minute, reads, writes))
        subprocess.run(entries[-1].argv, cwd=first, check=True)
        files = sorted({*files, writes})
    target = entries[-1].outputs[0]
    script = history.replay(entries, Path(target), first)
    assert 1 < len(commands(script)) <= len(entries)
    subprocess.run(["sh", "-c", script], cwd=second, check=True)
    assert (second / target).read_bytes() == (first / target).read_bytes()
    os.remove(second / "raw 1.st")
    done = subprocess.run(["sh", "-c", script], cwd=second, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "missing: raw 1.st\n")


# ------------------------------------------------------------------------------------------------------ project, commit


def write(path: Path, entries: list[HistoryEntry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"history": [entry.model_dump(mode="json") for entry in entries]}))


def test_the_projects_history_is_every_entry_once_in_order(project: Path) -> None:
    one, two, three = made(1, "", "a.mrc"), made(2, "", "b.mrc"), made(3, "", "c.mrc")
    write(Path("info/TS_01_info.json"), [two.model_copy(update={"state": "running"}), three])
    write(Path("particles/ribo/particles.json"), [one, two])
    write(Path("spt_00/run.json"), [three])
    Path("spt_01").mkdir()
    Path("spt_01/run.json").write_text("{ broken")
    assert history.project_history(project) == [one, two, three], "the finished state of an entry counts"
    assert history.is_project(project) and not history.is_project(project / "info")
    assert history.find_project(Path("info/TS_01_info.json")) == history.find_project(Path(".")) == project


def test_who_wrote_a_file(project: Path) -> None:
    write(Path("info/TS_01_info.json"), [made(1, "in.mrc", "a.mrc", program="emc_tomogram")])
    assert history.written_by("emc_tomogram", Path("a.mrc"), project)
    assert history.written_by("emc_tomogram", project / "info" / ".." / "a.mrc", project)
    assert not history.written_by("emc_average", Path("a.mrc"), project)
    assert not history.written_by("emc_tomogram", Path("in.mrc"), project)


def test_a_tilt_series_by_its_name_or_its_file(project: Path) -> None:
    file = records.tiltseries_path("TS_01")
    write(file, [])
    assert history.tiltseries_record("TS_01", project) == project / file
    assert history.tiltseries_record(str(file), project) == file
    with pytest.raises(InputError, match=r"TS_O1: there is no such tilt series; did you mean TS_01\?"):
        history.tiltseries_record("TS_O1", project)


def test_the_commit_is_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "libemc" / "cli"
    package.mkdir(parents=True)
    monkeypatch.setattr(history, "__file__", str(package / "history.py"))
    monkeypatch.setattr(history.subprocess, "run", lambda *_, **__: pytest.fail("git was asked without a checkout"))
    assert history.commit.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(history, "__file__", str(package / "history.py"))

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    assert history.commit.__wrapped__() is None, "a checkout without a commit"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert history.commit.__wrapped__() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert history.commit.__wrapped__() == git("rev-parse", "HEAD") + "-dirty"


def test_history_lines() -> None:
    entry = made(1, "", "a.mrc", words=("emc_x", "a b")).model_copy(
        update={
            "wall_seconds": 2.04,
            "cpu_seconds": 3.0,
            "peak_memory": 2**28,
            "host": "node7",
            "warnings": ("careful",),
        }
    )
    assert history.history_lines([entry]) == [
        "2026-01-02T03:01:00  done  wall 2.0 s, cpu 3.0 s, peak 256 MB, node7, emc 0",
        "    $ emc_x 'a b'",
        "    warning: careful",
    ]
