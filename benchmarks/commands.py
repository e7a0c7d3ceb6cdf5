"""What the benchmarks that make many tilt series share: commands run and measured, options written out, series counted."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
REPEATED = ("bad", "missing", "particle", "map")  # options that are given once for each item


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


def scored(
    args: argparse.Namespace,
    numbers: list[int],
    one: Callable[[int], Any],
    failed: Callable[[int, str], Any],
    head: str,
    row: Callable[[Any], str],
) -> list[Any]:
    """The scores of some series, a line for each as it comes, and all of them in args.results.

    Args:
        args: workers, keep_going, generate_only and results of the command line.
        one: makes and scores a series; failed: the score of one that failed, with the reason.
        head, row: first line, and that of a score.
    """  # fmt: skip

    def kept(number: int) -> Any:
        try:
            return one(number)
        except Exception as error:
            if not args.keep_going:
                raise
            if not isinstance(error, RuntimeError):
                traceback.print_exc()
            return failed(number, str(error))

    began, scores = time.perf_counter(), []
    if not args.generate_only:
        print(head)
    with ThreadPoolExecutor(args.workers) as pool:
        for number, score in zip(numbers, pool.map(kept, numbers), strict=True):
            scores.append(score)
            made = f"{number:03d} {score.failure or f'{score.seconds:.1f} CPU-s, {score.memory:.0f} MB'}"
            print(made if args.generate_only else row(score), flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if not args.generate_only:
        args.results.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    return scores
