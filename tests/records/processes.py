"""Programs for `test_store.py` that need processes of their own: many writers at once, and writers that are killed.

A process of its own that has loaded what it needs forks its children, so that a kill lands in the writing and not in
the imports. Prints one JSON object with what it counted; fails loudly where something was lost or is not readable.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from libemc.records import HistoryEntry, ParticleFile, Run, load, provenance, save_new, store, update


def count_up(record: Run) -> Run:
    """One more in the run's state."""
    return record.model_copy(update={"state": {"count": record.state["count"] + 1}})


def fork(work: Callable[[], None]) -> int:
    """Start a child that works and never returns; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:  # a child must not run on in the parent's code
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def together(folder: Path, processes: int, rounds: int) -> dict[str, int]:
    """So many processes count one record up at the same moment, each under a history entry of its own."""
    path = folder / "run.json"
    save_new(path, Run(program="together", options={}, state={"count": 0}))
    gate, opener = os.pipe()

    def work() -> None:
        os.close(opener)
        os.read(gate, 1)  # returns when the last opener is closed
        entry = HistoryEntry(id=str(os.getpid()), program="together", version="0", argv=(), start="")
        provenance.current.set(entry)
        for _ in range(rounds):
            update(path, count_up, Run)

    children = [fork(work) for _ in range(processes)]
    os.close(opener)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    record = load(path, Run)
    return {"failed": failed, "count": record.state["count"], "entries": len(record.history)}


def killed(folder: Path, kills: int, example: str) -> dict[str, int]:
    """A writer of a record, a particle file and an image is killed again and again, at any moment."""
    import mrcfile
    import numpy as np

    from libemc.io.mrc import write_volume

    store.LOCK_TIMEOUT = 10.0  # a lock that a dead writer still holds shows as an error
    run, particles, image = folder / "run.json", folder / "TS_01.json", folder / "map.mrc"
    file = load(example, ParticleFile)

    def scored(count: int) -> ParticleFile:
        each = tuple(
            file.particles[0].model_copy(update={"id": f"TS_01.{number:06d}", "score": float(count)})
            for number in range(100)
        )
        return file.model_copy(update={"particles": each})

    def step() -> int:
        count = update(run, count_up, Run).state["count"]
        save_new(particles, scored(count), overwrite=True)
        write_volume(image, np.full((48, 48, 48), count, dtype=np.float32), 3.0)
        return count

    def unfinished() -> int:
        return len(list(folder.glob(".*.tmp")))

    def work() -> None:
        while True:
            step()

    save_new(run, Run(program="killed", options={}, state={"count": 0}))
    began = time.monotonic()
    for _ in range(2):
        step()
    longest = time.monotonic() - began  # so that kills land in every part of a step, however busy the machine
    random.seed(1)
    before, score, value, interrupted, beside_image, beside_records = 2, 2.0, 2.0, 0, 0, 0
    for _ in range(kills):
        child = fork(work)
        time.sleep(random.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += unfinished() > 0
        count = load(run, Run).state["count"]
        scores = {particle.score or 0.0 for particle in load(particles, ParticleFile).particles}
        with mrcfile.open(image) as whole:
            values = set(np.unique(whole.data).tolist())
            assert whole.data.shape == (48, 48, 48), whole.data.shape
        # Each whole and none older than before the kill; written in the order record, particles, image.
        assert len(scores) == len(values) == 1, (scores, values)
        assert value <= min(values) <= min(scores) <= count, (value, values, scores, count)
        assert score <= min(scores) and before <= count, (score, scores, before, count)
        score, value = min(scores), min(values)
        before = update(run, count_up, Run).state["count"]
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        of_image = sum(name.startswith(f".{image.name}.") for name in hidden)
        beside_image = max(beside_image, of_image)
        beside_records = max(beside_records, len(hidden) - of_image)
    step()
    return {
        "kills": kills,
        "counted": before,
        "interrupted": interrupted,
        "most_beside_image": beside_image,
        "most_beside_records": beside_records,
        "unfinished": unfinished(),
    }


if __name__ == "__main__":
    what, where, number, last = sys.argv[1:]
    if what == "killed":
        print(json.dumps(killed(Path(where), int(number), last)))
    else:
        print(json.dumps(together(Path(where), int(number), int(last))))
