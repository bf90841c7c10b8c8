"""Stopping a long run in order: the first SIGTERM or SIGINT is noted, the second one ends the process."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Notes SIGTERM and SIGINT for the next step boundary; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are the caller's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
