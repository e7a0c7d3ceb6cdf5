"""Commands of the suite run as a shell would run them: for what chains programs, which never call each other inside.

A command is one line as it is typed, without pipes or globs; `> FILE` at its end is understood.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from libemc.errors import CommandFailed

_ROOT = Path(__file__).resolve().parents[2]


def execute(command: str, folder: Path, threads: int) -> None:
    """Run a command of the suite in a folder, its stdout and stderr those of this process.

    The command that belongs to this interpreter is taken, else the program's file in this source tree.

    Raises:
        CommandFailed: it ended with another code than 0.
    """
    line, _, output = command.partition(" > ")
    program, *words = shlex.split(line)
    installed = shutil.which(program, path=str(Path(sys.executable).parent))
    start = [installed] if installed else [sys.executable, str(_ROOT / "programs" / f"{program}.py")]
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / output, "wb") if output else nullcontext() as file:
        child = subprocess.Popen([*start, *words], cwd=folder, env=environment, stdout=file)
        try:
            code = child.wait()
        except BaseException:  # interrupted: it is to save its state too
            child.terminate()
            child.wait()
            raise
    if code:
        raise CommandFailed(f"(cd {shlex.quote(str(folder))} && {command})", code if code > 0 else 128 - code)
