"""Progress: all items pass, in order; a bar on a terminal, a line a minute elsewhere; a log that comes when needed."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from libemc.cli import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_each_minute_with_the_time_that_is_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "libemc")
    for _ in progress.follow([1, 2, 3, 4], None, "tilt series", talk=True):
        clock[0] += 50
    assert caplog.messages == ["tilt series: 2 of 4, 1 min 40 s left"], "at 100 s; the next is due at 160 s"


def test_items_without_a_number(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)

    caplog.set_level(logging.INFO, "libemc")
    seen = []
    for item in progress.follow(items(), None, "", talk=True):
        seen.append(item)
        clock[0] += 61
    assert seen == [1, 2, 3]
    assert caplog.messages == ["progress: 1", "progress: 2"]


def test_a_bar_on_a_terminal_unless_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress.follow(range(3), None, "tilts", talk=False)) == [0, 1, 2]
    assert screen.getvalue() == ""
    assert list(progress.follow(range(3), None, "tilts", talk=True)) == [0, 1, 2]
    assert "tilts" in screen.getvalue() and "0/3" in screen.getvalue()


def test_a_log_begins_with_the_command_and_with_the_first_thing_worth_keeping(tmp_path: Path) -> None:
    handler = progress.log_file(tmp_path, "emc_try", ["emc_try", "a b"], only_bugs=False)
    logger = logging.getLogger("a_log_of_its_own")
    logger.setLevel("INFO")
    logger.addHandler(handler)
    logger.error("no such file")
    assert not (tmp_path / ".emc").exists(), "an error before any work leaves nothing behind"
    logger.info("begins")
    logger.error("fails")
    handler.close()
    lines = Path(handler.baseFilename).read_text().splitlines()
    assert lines[0] == "$ emc_try 'a b'"
    assert [line.split(" ", 2)[2] for line in lines[1:]] == ["INFO begins", "ERROR fails"]


def test_a_log_that_can_not_be_written_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / ".emc").write_text("in the way")
    handler = progress.log_file(tmp_path, "emc_try", ["emc_try"], only_bugs=False)
    handler.handle(logging.makeLogRecord({"msg": "begins", "levelno": logging.INFO, "levelname": "INFO"}))
    handler.close()
    assert (tmp_path / ".emc").read_text() == "in the way"
