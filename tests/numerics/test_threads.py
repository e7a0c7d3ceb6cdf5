"""Work in threads: order, errors, and how many at a time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from libemc.numerics.threads import in_threads


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_few_at_a_time(threads: int) -> None:
    """The first items take longest; what is begun is never more than two beyond what works, and what is taken."""
    begun: list[int] = []

    def work(item: int) -> tuple[int, int]:
        begun.append(item)
        time.sleep(0.01 if item < 3 else 0.0)
        return item, torch.get_num_threads()

    for place, (item, inner) in enumerate(in_threads(work, range(20), threads)):
        assert item == place and inner == 1
        assert len(begun) <= place + threads + 3


def test_an_error_ends_the_work() -> None:
    seen: set[int] = set()
    gate = threading.Event()

    def work(item: int) -> int:
        seen.add(item)
        if item == 2:
            raise ValueError("no")
        gate.wait(1.0) if item > 4 else None
        return item

    with pytest.raises(ValueError, match="no"):
        list(in_threads(work, range(100), 2))
    gate.set()
    assert len(seen) < 20
