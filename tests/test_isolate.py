"""Parts of a benchmark that hang, raise or crash cost only themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from butterfly_llm.bench.isolate import Worker, all_at_once


@pytest.fixture
def ask() -> Iterator[Worker]:
    worker = Worker("time")
    yield worker
    worker.stop()


def test_a_part_that_hangs_is_given_up_and_the_next_one_runs(ask: Worker) -> None:
    assert ask.ask(1, "sleep", 60) == "Timeout: sleep took more than 1 s"
    assert ask.ask(30, "gmtime", 0).tm_year == 1970


def test_an_exception_is_one_line_and_keeps_the_process(ask: Worker) -> None:
    assert ask.ask(30, "sleep", -1) == "ValueError: sleep length must be non-negative"
    process = ask.process
    assert ask.ask(30, "gmtime", 0).tm_year == 1970
    assert ask.process is process


def test_a_crash_is_said_and_survived() -> None:
    worker = Worker("os")
    try:
        assert worker.ask(30, "_exit", 3).startswith("Crash: _exit ended the process")
        assert worker.ask(30, "strerror", 2) == "No such file or directory"
    finally:
        worker.stop()


def test_all_at_once_keeps_the_order() -> None:
    assert all_at_once("math", [("sqrt", 4.0), ("sqrt", -1.0), ("sqrt", 9.0)], 60) == [
        2.0,
        "ValueError: math domain error",
        3.0,
    ]
