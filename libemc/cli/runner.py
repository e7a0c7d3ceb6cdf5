"""The runner: the only place that owns `main`, exit codes, signals, the log and the history of records.

A program is a declaration (`Program`) plus a function `main(args, run)`; `Run` is what that function sees of the
outside: the standard options as values, inputs and outputs that are checked and noted, progress, results. Exit codes:
0 done, 2 the user's input (one line: what, where, what to do), 1 our bug (traceback and log file), 130 interrupted. A
new exit code or a new kind of error belongs here, never in a program.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from libemc import __version__, records
from libemc.cli import history, options, progress
from libemc.errors import CommandFailed, InputError

if TYPE_CHECKING:
    import logging

    import torch

T = TypeVar("T")

DONE, BUG, INPUT, INTERRUPTED = 0, 1, 2, 130

_REMEDIES = {
    errno.ENOSPC: "free some space on this disk, or write to another one",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions of the file and its folder",
    errno.EROFS: "this file system is read-only: write to another one",
    errno.ENOENT: "check the name and the folder you are in",
    errno.EISDIR: "this is a folder, name a file",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EFBIG: "this disk, or a limit (ulimit -f), allows no file so large",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "check the disk, or the network that it is on",
}
"""What a user can do about the errors of the operating system that are the user's to mend."""


@dataclass(frozen=True)
class Program:
    """A program: its name, its help, its options and what it does.

    Args:
        name: the command, `emc_x`.
        doc: the help: the program file's docstring, with an example of its use.
        main: what it does, given the parsed arguments and the `Run`.
        arguments: adds the program's own options to a parser; None where it has none.
        standard: which of `options.STANDARD` it offers. One that would do nothing must be left out.
    """

    name: str
    doc: str | None
    main_function: Callable[[argparse.Namespace, Run], None]
    arguments: Callable[[argparse.ArgumentParser], None] | None
    standard: tuple[str, ...]

    def __init__(
        self,
        doc: str | None,
        name: str,
        main: Callable[[argparse.Namespace, Run], None],
        arguments: Callable[[argparse.ArgumentParser], None] | None = None,
        standard: Iterable[str] = options.STANDARD,
    ) -> None:
        for field, value in (
            ("name", name),
            ("doc", doc),
            ("main_function", main),
            ("arguments", arguments),
            ("standard", tuple(standard)),
        ):
            object.__setattr__(self, field, value)

    def parser(self) -> options.Parser:
        """The program's parser: its own options first, then the standard ones it offers."""
        parser = options.Parser(self.name, self.doc)
        if self.arguments is not None:
            self.arguments(parser)
        options.add_standard(parser, self.standard, __version__)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the program and return its exit code.

        Args:
            argv: the words after the command; those of this process where None.
        """
        words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        try:
            arguments = self.parser().parse_all(words)
        except InputError as error:
            print(f"{self.name}: error: {error}", file=sys.stderr)
            return INPUT
        except SystemExit as stop:  # --help and --version
            return int(stop.code or 0)
        return Run(self, arguments, words).execute()

    def entry(self) -> NoReturn:
        """The console script."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without Å must not end the run
        code = self.main()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)


class Run:
    """One run of a program, as its `main` sees it.

    Attributes:
        name: the program's.
        project: the project directory (the one that it was started in).
        threads: how many to use; torch and numba have been told.
        memory: bytes to stay within.
        overwrite, resume, dry_run: the standard options of these names; False where the program doesn't offer them.
        seed: 0 unless given.
        log: the logger, for what a user may want to know on the way.
        warnings: what `warn` and Python's warnings said, for the history.
    """

    def __init__(self, program: Program, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
        def given(name: str, default: Any) -> Any:
            return getattr(arguments, name, default)

        self.name = program.name
        self.project = Path.cwd()
        self.arguments = arguments
        self.argv = (program.name, *argv)
        self.seed: int = given("seed", 0)
        self.overwrite: bool = given("overwrite", False)
        self.resume: bool = given("resume", False)
        self.dry_run: bool = given("dry_run", False)
        self.threads: int = given("threads", None) or options.usable_threads()
        self.memory: int = given("memory", None) or options.available_memory() // 2
        self.log: logging.Logger = progress.LOGGER
        self.warnings: list[str] = []
        self._program = program
        self._quiet: bool = given("quiet", False)
        self._verbose: bool = given("verbose", False)
        self._device: torch.device | None = None
        self._planned = False
        self._recorder = history.Recorder(
            self.name, self.argv, seed=self.seed if "seed" in program.standard else None, project=self.project
        )

    # ------------------------------------------------------------------------------------------- for a program's main

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        if self._device is None:
            self._device = _device(getattr(self.arguments, "device", "cpu"))
        return self._device

    def progress(self, iterable: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
        """Pass the items on and show how far the work is: a bar on a terminal, else a log line each minute."""
        return progress.follow(iterable, total, label, talk=not self._quiet)

    def warn(self, text: str) -> None:
        """Warn the user, once for each text; the history keeps it."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._recorder.note(warnings=(text,))
            self.log.warning(text)

    def result(self, text: str) -> None:
        """Print a line (or a table) of results on stdout. A reader that has gone (`| head`) doesn't stop the work."""
        try:
            with progress.above_bar(sys.stdout):
                print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (it lives as long as the process)

    def input(self, path: str | os.PathLike[str]) -> Path:
        """A file or folder that the program reads, as a path; the history notes it.

        Raises:
            InputError: when it doesn't exist or can't be read.
        """
        file = Path(path)
        if not file.exists():
            raise InputError("there is no such file", file, "check the name and the folder you are in")
        if not os.access(file, os.R_OK):
            raise InputError("can't be read", file, _REMEDIES[errno.EACCES])
        self._recorder.note(inputs=(file,))
        return file

    def output(self, path: str | os.PathLike[str], owned: bool = False) -> Path:
        """A file that the program is about to write, as a path; its folder is made, the history notes it.

        Args:
            path: the file.
            owned: True for a file in a folder that only this run writes to, which may always be replaced.

        Raises:
            InputError: when something else wrote the file and --overwrite wasn't given, or when it is a folder, or when
                its folder can't be written to.
        """
        file = Path(path)
        if file.is_dir():
            raise InputError("is a folder", file, _REMEDIES[errno.EISDIR])
        may_replace = owned or self.overwrite or not file.exists() or self._recorder.notes_output(file)
        if not may_replace and not history.written_by(self.name, file, self.project):
            offered = "overwrite" in self._program.standard
            remedy = "give --overwrite to replace it" if offered else "move it away or choose another name"
            raise InputError(f"exists, and {self.name} did not write it", file, remedy)
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise InputError("is a file, not a folder", folder, "write to another folder")
        if not os.access(folder, os.W_OK):
            raise InputError("can't be written to", folder, _REMEDIES[errno.EACCES])
        if not self.dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._recorder.note(outputs=(file,))
        return file

    def plan(
        self, text: str, seconds: float | None = None, memory: float | None = None, disk: float | None = None
    ) -> bool:
        """Say what is about to be done, and check that there is room for it.

        Call it after all checks and before any work; return when it says True.

        Args:
            text: what will be done.
            seconds: estimate of the time it takes.
            memory: estimate of the memory it takes, bytes.
            disk: bytes that will be written below the project directory.

        Returns:
            True when this is a --dry-run: nothing is to be done.

        Raises:
            InputError: when the disk has less space than that.
        """
        self._planned = True
        needs = [options.seconds_text(seconds)] if seconds is not None else []
        needs += [f"{options.bytes_text(memory)} of memory"] if memory is not None else []
        needs += [f"{options.bytes_text(disk)} of disk"] if disk is not None else []
        line = f"{text} (about {', '.join(needs)})" if needs else text
        if self.dry_run:
            self.result(line)
        else:
            self.log.info(line)
        if memory is not None and memory > self.memory:
            needed, allowed = options.bytes_text(memory), options.bytes_text(self.memory)
            self.warn(f"this takes about {needed} of memory, more than the {allowed} to stay within")
        free = shutil.disk_usage(self.project).free
        if disk is not None and disk > free:
            what = f"needs {options.bytes_text(disk)} of disk, {options.bytes_text(free)} are free"
            raise InputError(what, self.project, _REMEDIES[errno.ENOSPC])
        return self.dry_run

    def tiltseries(self, arguments: argparse.Namespace) -> list[Path]:
        """The records of the tilt series that `options.tiltseries_names` was given, each once; noted as inputs.

        Raises:
            InputError: when none or both of NAME and --all are given, or when one doesn't exist.
        """
        everything = records.find_tiltseries(self.project)
        if bool(arguments.names) == arguments.all:
            raise InputError("give tilt series or --all, one of the two", remedy=f"see {self.name} --help")
        if arguments.all and not everything:
            raise InputError("there are no tilt series", self.project / "info", "import them with emc_import")
        named = (history.tiltseries_record(name, self.project) for name in arguments.names)
        found = everything if arguments.all else named
        return [self.input(file) for file in dict.fromkeys(_short(file, self.project) for file in found)]

    def particles(self, set_or_run: str) -> Path:
        """The `particles.json` of a particle set or a run, from the set's name or the folder; noted as an input.

        Raises:
            InputError: when there is no such set or run.
        """
        return self.input(_short(records.particles_path(set_or_run, self.project), self.project))

    # --------------------------------------------------------------------------------------------------- for `Program`

    def execute(self) -> int:
        """Call the program's `main` between a beginning and an end that no program can forget; gives the exit code."""
        with self._talking(), self._catching_warnings(), self._recorder.recording(), _signals() as ignore_signals:
            try:
                code = self._guarded()
            finally:
                ignore_signals()
            return self._recorded(code)

    def _guarded(self) -> int:
        """The program's `main`; every way in which it can end becomes an exit code."""
        try:
            self._prepare()
            self._program.main_function(self.arguments, self)
            if self.dry_run and (self._recorder.touched() or not self._planned):
                raise RuntimeError("--dry-run must call run.plan before any work and return when it says so")
            return DONE
        except InputError as error:
            self.log.error(str(error))
            return INPUT
        except KeyboardInterrupt:
            self.log.error("interrupted; what was finished is saved")
            return INTERRUPTED
        except CommandFailed as error:
            self.log.error(str(error))
            return error.code
        except (Exception, SystemExit) as error:
            return self._failed(error)

    def _failed(self, error: BaseException) -> int:
        """Tell the machine's limits, which are the user's to mend, from bugs."""
        if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
            remedy = "give a smaller --memory" if "memory" in self._program.standard else "free some memory"
            self.log.error(f"out of memory; {remedy}" + (", or --device cpu" if "CUDA" in str(error) else ""))
            return INPUT
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
            what = (error.strerror or os.strerror(error.errno)).lower()
            self.log.error(str(InputError(what, " -> ".join(names) or None, _REMEDIES[error.errno])))
            return INPUT
        trace = "".join(traceback.format_exception(error)).rstrip()
        where = f" and {self._log_handler.baseFilename}" if self._log_handler else ""
        self.log.error(f"this is a bug: please report it with these lines{where}\n{trace}", extra={"bug": True})
        return BUG

    def _prepare(self) -> None:
        """Tell the numerical libraries what they may use, in a program that offers it: torch is slow to load."""
        if "device" in self._program.standard:
            self._recorder.note(device=_device_name(self.device))
        if "threads" in self._program.standard:
            _set_threads(self.threads)

    def _recorded(self, code: int) -> int:
        """Finish the history in every record that was written to; a failure there is a failure of the run."""
        state = {DONE: "done", INTERRUPTED: "interrupted"}.get(code, "failed")
        try:
            took, peak = self._recorder.finish(state)
        except (InputError, OSError) as error:
            self.log.error(f"the history could not be finished: {error}")
            return code or INPUT
        if code == DONE and not self.dry_run:
            self.log.info(f"done in {options.seconds_text(took)}, peak memory {options.bytes_text(peak)}")
        return code

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """The logger's handlers: the terminal's, and a log file when this is a project."""
        level = "WARNING" if self._quiet else "DEBUG" if self._verbose else "INFO"
        talks = bool({"verbose", "quiet"} & set(self._program.standard))
        only_bugs = not (talks and history.is_project(self.project))
        self._log_handler = None if self.dry_run else progress.log_file(self.project, self.name, self.argv, only_bugs)
        terminal = progress.TalkHandler(self.name, level if talks else "WARNING")
        handlers = [handler for handler in (terminal, self._log_handler) if handler is not None]
        before = self.log.level
        self.log.setLevel("DEBUG")
        for handler in handlers:
            self.log.addHandler(handler)
        try:
            yield
        finally:
            self.log.setLevel(before)
            for handler in handlers:
                self.log.removeHandler(handler)
                handler.close()

    @contextmanager
    def _catching_warnings(self) -> Iterator[None]:
        """Python's warnings become the run's."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            self.warn(f"{category.__name__}: {' '.join(str(message).split())}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield


def _short(path: Path, project: Path) -> Path:
    """A path from the project directory where it lies below it."""
    absolute = path if path.is_absolute() else project / path
    return absolute.relative_to(project) if absolute.is_relative_to(project) else path


def _device(name: str) -> torch.device:
    """The torch device of this name, known to be there.

    Raises:
        InputError: when the name is no device's, or this machine hasn't got it.
    """
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdigit())):
        raise InputError(f"there is no device '{name}'", "--device", "choose cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= there:
        raise InputError(f"'{name}' is not here: {there} CUDA devices can be used", "--device", "choose cpu or another")
    return torch.device("cuda", int(number or 0))


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _set_threads(threads: int) -> None:
    import numba
    import torch

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)  # last: both may stand on one OpenMP


def _is_torch_out_of_memory(error: BaseException) -> bool:
    """Torch has a class of its own for CUDA, and a plain RuntimeError for the CPU's allocator."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in text
    )


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """SIGTERM ends a run like Ctrl-C does; the function yielded has both ignored, while the history is finished."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
