"""What the benchmarks that make many tilt series share: commands run and measured, options written out, series counted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Parameters = dict[str, Any]

MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
open(sys.argv[1], "w").write(f"{used.ru_utime + used.ru_stime} {used.ru_maxrss}")
sys.exit(code)
"""
"""A small process that runs a command: Linux counts to a command's peak memory that of the process that began it."""
REPEATED = ("bad", "missing", "particle")  # options that are given once for each item


@dataclass(frozen=True)
class Cost:
    """What a command took: CPU seconds, peak memory in MB, wall seconds."""

    seconds: float
    memory: float
    wall: float


def program(argv: list[str], folder: Path, log: Path, threads: int = 1) -> Cost:
    """Run one command in a folder; what it says is added to a log.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    began = time.perf_counter()
    with log.open("ab") as out, tempfile.NamedTemporaryFile("r") as used:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        measured = [sys.executable, "-I", "-S", "-c", MEASURED, used.name, *argv]
        code = subprocess.run(measured, cwd=folder, stdout=out, stderr=out, env=env).returncode
        told = used.read().split()
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{argv[0]} failed ({code}): {lines[-1] if lines else ''}")
    return Cost(float(told[0]), float(told[1]) / 1024, time.perf_counter() - began)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number of any order of magnitude between the two."""
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def words(parameters: Parameters) -> list[str]:
    """The options of emc_simulate; keys with a leading underscore are notes."""
    out: list[str] = []
    for key, value in parameters.items():
        if key.startswith("_"):
            continue
        if key in REPEATED:
            for item in value:
                out += [f"--{key}", str(item)]
        elif isinstance(value, list):
            out += [f"--{key}", *map(str, value)]
        else:
            out += [f"--{key}", str(value)]
    return out


def chosen(count: int, only: str | None) -> list[int]:
    """Numbers of series: 0 to count - 1, or those of a text with commas and a-b between."""
    if only is None:
        return list(range(count))
    spans = [part.split("-") for part in only.split(",")]
    return [k for span in spans for k in range(int(span[0]), int(span[-1]) + 1)]
