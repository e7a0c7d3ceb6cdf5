"""The runner: exit codes, one-line errors, outputs that are refused, dry runs, and a history that is never forgotten.

Each test makes a small program of its own and runs it in a project with one tilt-series record; the signals and a full
disk go through a process of their own, as a user would meet them. No tolerances: everything is exact.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from libemc import __version__, records
from libemc.cli import Program, Run, options, progress
from libemc.errors import InputError

Main = Callable[[argparse.Namespace, Run], None]
ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("overwrite", "seed", "verbose", "quiet", "dry-run")
"""The standard options that need no torch."""


def program(main: Main, standard: tuple[str, ...] = LIGHT, name: str = "emc_try") -> Program:
    return Program(
        doc="Try.\n\n    emc_try TS_01", name=name, main=main, arguments=options.tiltseries_names, standard=standard
    )


@pytest.fixture
def record(project: Path) -> Path:
    """A project with one tilt series without a past."""
    example = records.load(ROOT / "info" / "example_tiltseries.json", records.TiltSeriesRecord)
    path = records.tiltseries_path("TS_01")
    records.save_new(path, example.model_copy(update={"history": (), "name": "TS_01"}))
    return path


def touch(args: argparse.Namespace, run: Run) -> None:
    for path in run.tiltseries(args):
        records.update(path, lambda record: record.model_copy(update={"tomograms": ()}))


def raising(error: BaseException) -> Main:
    def main(args: argparse.Namespace, run: Run) -> None:
        touch(args, run)
        raise error

    return main


def test_done_is_written_into_every_touched_record(record: Path) -> None:
    other = records.tiltseries_path("TS_02")
    records.save_new(other, records.load(record))
    assert program(touch).main(["--all", "--seed", "5"]) == 0
    for path in (record, other):
        (entry,) = records.load(path).history
        assert entry.program == "emc_try"
        assert entry.argv == ("emc_try", "--all", "--seed", "5")
        assert entry.version == __version__
        assert entry.state == "done"
        assert entry.seed == 5
        assert entry.inputs == entry.outputs == ("info/TS_01_info.json", "info/TS_02_info.json")
        assert entry.wall_seconds is not None and 0 <= entry.wall_seconds < 60
        assert entry.cpu_seconds is not None and 0 <= entry.cpu_seconds < 60
        assert entry.peak_memory is not None and 2**20 < entry.peak_memory < 2**40  # Python alone has 10 MB
        assert entry.host


def test_two_runs_are_two_entries_in_order(record: Path) -> None:
    assert program(touch).main(["TS_01"]) == program(touch, name="emc_again").main(["TS_01"]) == 0
    assert [entry.program for entry in records.load(record).history] == ["emc_try", "emc_again"]
    assert len({entry.id for entry in records.load(record).history}) == 2


def test_a_record_that_was_only_read_is_not_changed(record: Path) -> None:
    before = record.read_bytes()
    assert program(lambda args, run: run.tiltseries(args) and None).main(["TS_01"]) == 0
    assert record.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "code", "state", "line"),
    [
        (InputError("is wrong", "a.mrc", "mend it"), 2, "failed", "emc_try: error: a.mrc: is wrong; mend it"),
        (OSError(errno.ENOSPC, "No space left on device", "tomograms/x.mrc"), 2, "failed",
         "emc_try: error: tomograms/x.mrc: no space left on device; "
         "free some space on this disk, or write to another one"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "failed",
         "emc_try: error: x: permission denied; check the permissions of the file and its folder"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "failed",
         "emc_try: error: x: no such file or directory; check the name and the folder you are in"),
        (MemoryError(), 2, "failed", "emc_try: error: out of memory; free some memory"),
        (KeyboardInterrupt(), 130, "interrupted", "emc_try: error: interrupted; what was finished is saved"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(
    record: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, state: str, line: str
) -> None:
    assert program(raising(error)).main(["TS_01"]) == code
    out, err = capsys.readouterr()
    assert err == line + "\n"
    assert out == ""
    assert records.load(record).history[-1].state == state


@pytest.mark.parametrize("error", [ValueError("seven"), SystemExit(3), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_bug_is_a_traceback_and_a_log_file(
    record: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    assert program(raising(error)).main(["TS_01"]) == 1
    err = capsys.readouterr().err
    assert "this is a bug" in err and "Traceback" in err and str(error) in err
    (log,) = Path(".emc/log").iterdir()
    text = log.read_text()
    assert text.startswith("$ emc_try TS_01\n") and "Traceback" in text
    assert str(log) in err
    assert records.load(record).history[-1].state == "failed"


def test_a_bug_outside_of_a_project_has_its_log_file_too(project: Path) -> None:
    def main(args: argparse.Namespace, run: Run) -> None:
        run.log.info("nothing to keep")
        raise ValueError("seven")

    assert program(main).main([]) == 1
    (log,) = Path(".emc/log").iterdir()
    assert "seven" in log.read_text() and "nothing to keep" not in log.read_text()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--sede", "3"], "there is no option --sede; did you mean --seed?"),
        (["--xyzzy"], "there is no option --xyzzy; see emc_try --help"),
        (["--see", "3"], "there is no option --see; did you mean --seed?"),
        (["--seed", "x"], "argument --seed: 'x' is not a whole number; see emc_try --help"),
        (["--seed", "-1"], "argument --seed: '-1' is not from 0 to 4294967295; see emc_try --help"),
        (["--memory", "4G"], "there is no option --memory; see emc_try --help"),
        ([], "give tilt series or --all, one of the two; see emc_try --help"),
        (["TS_01", "--all"], "give tilt series or --all, one of the two; see emc_try --help"),
        (["TS_1"], "TS_1: there is no such tilt series; did you mean TS_01?"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    record: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    before = record.read_bytes()
    assert program(touch).main(argv) == 2
    assert capsys.readouterr().err == f"emc_try: error: {line}\n"
    assert record.read_bytes() == before
    assert not Path(".emc").exists()


def test_help_and_version(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(touch).main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "    emc_try TS_01" in text
    assert all(f"--{name}" in text for name in LIGHT)
    assert "--memory" not in text and "--device" not in text
    assert program(touch).main(["--version"]) == 0
    assert capsys.readouterr().out == f"emc_try {__version__}\n"
    assert os.listdir() == []


def test_a_standard_option_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no such standard option: parallel"):
        program(touch, standard=("parallel",)).parser()


# ------------------------------------------------------------------------------------------------------ inputs, outputs


def writing(name: str, owned: bool = False) -> Main:
    def main(args: argparse.Namespace, run: Run) -> None:
        run.output(name, owned).write_text("new")
        touch(args, run)

    return main


def test_an_output_makes_its_folder_and_is_noted(record: Path) -> None:
    assert program(writing("tomograms/deep/x.mrc")).main(["TS_01"]) == 0
    assert Path("tomograms/deep/x.mrc").read_text() == "new"
    assert records.load(record).history[-1].outputs == ("tomograms/deep/x.mrc", "info/TS_01_info.json")


def test_a_file_of_someone_else_is_not_replaced(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.mrc").write_text("mine")
    assert program(writing("x.mrc")).main(["TS_01"]) == 2
    remedy = "give --overwrite to replace it"
    assert capsys.readouterr().err == f"emc_try: error: x.mrc: exists, and emc_try did not write it; {remedy}\n"
    assert program(writing("x.mrc"), standard=()).main(["TS_01"]) == 2
    assert "--overwrite" not in capsys.readouterr().err
    assert Path("x.mrc").read_text() == "mine"
    assert program(writing("x.mrc")).main(["TS_01", "--overwrite"]) == 0
    assert Path("x.mrc").read_text() == "new"


def test_own_files_are_replaced(record: Path) -> None:
    assert program(writing("x.mrc")).main(["TS_01"]) == 0
    assert program(writing("x.mrc"), name="emc_other").main(["TS_01"]) == 2
    assert program(writing("x.mrc")).main(["TS_01"]) == 0, "the history says that this program wrote it"
    Path("spt_00").mkdir()
    Path("spt_00/average.mrc").write_text("before the kill")
    assert program(writing("spt_00/average.mrc", owned=True)).main(["TS_01"]) == 0


def test_a_file_may_be_named_twice_in_one_run(record: Path) -> None:
    def main(args: argparse.Namespace, run: Run) -> None:
        run.output("x.mrc").write_text("1")
        run.output("x.mrc").write_text("2")

    assert program(main).main(["TS_01"]) == 0


@pytest.mark.parametrize(("name", "line"), [("folder", "is a folder; "), ("file/x.mrc", "is a file, not a folder; ")])
def test_an_output_that_can_not_be(record: Path, capsys: pytest.CaptureFixture[str], name: str, line: str) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    assert program(writing(name)).main(["TS_01"]) == 2
    assert line in capsys.readouterr().err


def test_an_input_that_is_not_there(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(lambda args, run: run.input("mask.mrc") and None).main(["TS_01"]) == 2
    assert capsys.readouterr().err.startswith("emc_try: error: mask.mrc: there is no such file; ")


def test_particles_by_the_name_of_the_set_or_the_folder(record: Path) -> None:
    example = records.load(ROOT / "info" / "example_set.json", records.ParticleSet)
    for folder in ("particles/ribo", "spt_00/particles"):
        records.save_new(Path(folder, "particles.json"), example)
    found: list[Path] = []

    def main(args: argparse.Namespace, run: Run) -> None:
        found.extend(run.particles(name) for name in ("ribo", "spt_00"))

    assert program(main).main([]) == 0
    assert found == [Path("particles/ribo/particles.json"), Path("spt_00/particles/particles.json")]


# ------------------------------------------------------------------------------------------------------ plans, dry runs


def planned(args: argparse.Namespace, run: Run) -> None:
    output = run.output("tomograms/x.mrc")
    if run.plan("one tomogram", seconds=200, memory=3 * 2**30, disk=2**20):
        return
    output.write_text("done")
    touch(args, run)


def listing() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing()
    assert program(planned).main(["TS_01", "--dry-run", "--quiet"]) == 0
    assert listing() == before
    assert not Path("tomograms").exists()
    assert capsys.readouterr().out == "one tomogram (about 3 min 20 s, 3 GB of memory, 1 MB of disk)\n"
    assert program(planned).main(["TS_01"]) == 0
    assert Path("tomograms/x.mrc").exists()


def test_a_dry_run_refuses_what_the_run_would(record: Path) -> None:
    Path("tomograms").mkdir()
    Path("tomograms/x.mrc").write_text("mine")
    assert program(planned).main(["TS_01", "--dry-run"]) == 2


def test_a_program_that_works_in_a_dry_run_is_a_bug(record: Path) -> None:
    assert program(touch).main(["TS_01", "--dry-run"]) == 1


def test_a_plan_that_does_not_fit(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(lambda args, run: run.plan("much", disk=2.0**70) and None).main([]) == 2
    err = capsys.readouterr().err
    assert "needs 1.07e+09 TB of disk" in err and "free some space" in err
    assert program(lambda args, run: run.plan("much", memory=2.0**60) and None).main([]) == 0
    assert "warning: this takes about 1.05e+06 TB of memory" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- talk, device, ...


def test_results_to_stdout_talk_to_stderr(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: argparse.Namespace, run: Run) -> None:
        run.log.debug("detail")
        run.log.info("talk")
        run.warn("careful")
        run.warn("careful")
        warnings.warn("division by zero", RuntimeWarning, stacklevel=1)
        run.result("42")
        touch(args, run)

    def err_lines(*argv: str) -> list[str]:
        assert program(main).main(["TS_01", *argv]) == 0
        out, err = capsys.readouterr()
        assert out == "42\n"
        return [line.removeprefix("emc_try: ") for line in err.splitlines()]

    alarms = ["warning: careful", "warning: RuntimeWarning: division by zero"]
    assert err_lines("--quiet") == alarms
    normal = err_lines()
    assert normal[:3] == ["talk", *alarms] and normal[3].startswith("done in ") and len(normal) == 4
    assert err_lines("--verbose")[:2] == ["detail", "talk"]
    assert records.load(record).history[-1].warnings == ("careful", "RuntimeWarning: division by zero")
    assert all("detail" in log.read_text() for log in Path(".emc/log").iterdir())


def test_threads_memory_and_device_reach_the_numerical_libraries(project: Path) -> None:
    import torch

    seen: list[object] = []

    def main(args: argparse.Namespace, run: Run) -> None:
        seen.extend((run.device, torch.get_num_threads(), run.threads, run.memory, run.resume))

    before = torch.get_num_threads()
    try:
        made = program(main, standard=options.STANDARD)
        assert made.main(["--threads", "2", "--memory", "1.5G", "--resume"]) == 0
        assert seen == [torch.device("cpu"), 2, 2, 3 * 2**29, True]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_here(project: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert program(planned, standard=options.STANDARD).main(["--device", device]) == 2
    line = capsys.readouterr().err
    assert line.startswith("emc_try: error: --device: ") and line.count("\n") == 1 and device in line


def test_a_failing_end_of_the_history_is_told(
    record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(entry: records.HistoryEntry) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "finish", full)
    assert program(touch).main(["TS_01"]) == 2
    assert "the history could not be finished" in capsys.readouterr().err


def test_the_runner_leaves_nothing_behind(record: Path) -> None:
    before = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), warnings.showwarning)
    assert program(touch).main(["TS_01"]) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), warnings.showwarning) == before
    assert progress.LOGGER.handlers == []
    records.update(record, lambda found: found)
    assert len(records.load(record).history) == 1, "outside of a run nothing is recorded"


# ------------------------------------------------------------------------------------------------- a process of its own

SCRIPT = """
import errno, os, sys, time
from libemc import records
from libemc.cli import Program, options

def main(args, run):
    (path,) = run.tiltseries(args)
    records.update(path, lambda record: record)
    run.result("working")
    if os.environ["HOW"] == "wait":
        for item in run.progress(range(600), label="steps"):
            time.sleep(0.1)
    elif os.environ["HOW"] == "disk":
        with open("/dev/full", "w") as file:
            file.write("x")
    elif os.environ["HOW"] == "pipe":
        for number in range(100000):
            run.result(str(number))
        open("finished", "w").close()

program = Program(doc=None, name="emc_try", arguments=options.tiltseries_names, main=main, standard=("quiet",))
program.entry()
"""


def start(how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HOW": how, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, "TS_01"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_and_the_history_says_so(record: Path, number: signal.Signals) -> None:
    process = start("wait")
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    assert records.load(record).history[-1].state == "running"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "emc_try: error: interrupted; what was finished is saved\n"
    assert records.load(record).history[-1].state == "interrupted"


def test_a_killed_program_leaves_a_running_entry(record: Path) -> None:
    process = start("wait")
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.kill()
    process.communicate(timeout=60)
    assert records.load(record).history[-1].state == "running"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_with_2(record: Path) -> None:
    process = start("disk")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "emc_try: error: no space left on device; free some space on this disk, or write to another one\n"


def test_a_reader_that_goes_away_does_not_stop_the_work(record: Path) -> None:
    process = start("pipe")
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    assert Path("finished").exists()
    assert process.returncode == 0 and "Error" not in err


def test_looking_at_the_help_does_not_load_torch(project: Path) -> None:
    code = (
        "import sys, emc_info; emc_info.program.main(['--help']);"
        "print(sorted({'torch', 'numpy', 'numba', 'matplotlib'}.intersection(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'programs'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: emc_info") and done.stdout.splitlines()[-1] == "[]"
