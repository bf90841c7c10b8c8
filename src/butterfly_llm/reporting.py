"""What a training run tells: metrics.jsonl for programs, a progress line on stderr for people."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from butterfly_llm.tracking import Tracker


class Reporter:
    """Writes metrics and shows progress: one live line on a terminal, elsewhere a line each time."""

    def __init__(
        self, path: Path, *, resumed_at: int, finished: bool, tracker: Tracker | None = None
    ) -> None:
        """`path`: the JSONL file; its lines that are now made again are dropped.

        Those are the lines of steps after `resumed_at`, the end, and of a finished run its last validation.
        tracker: gets the figures of the records too.
        """
        self._tracker = tracker
        _keep_until(path, resumed_at, finished)
        self._file = path.open("a", encoding="utf-8")
        self._begun: tuple[float, float] | None = None  # time and progress when the first figures came
        self._live: Any = None
        if sys.stderr.isatty():
            self._live = _live_line()

    def record(self, kind: str, **values: Any) -> None:
        """Append one line to the metrics; numbers go to the tracker as well."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        step = numbers.pop(f"{kind}/step", None)
        if self._tracker is not None and step is not None and numbers:
            self._tracker.log(numbers, int(step))

    def show(self, progress: float, text: str) -> None:
        """Progress, 0 to 1, and the figures of the moment."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, progress
        begun, before = self._begun
        left = (now - begun) / (progress - before) * (1 - progress) if progress > before else None
        text = f"{text}  {_clock(left)} left"
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=progress, description=text)
        else:
            print(f"{progress:5.1%}  {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A message that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._live is not None:
            self._live.stop()


class Silent:
    """Stands for a `Reporter` in the processes that leave the telling to the first one."""

    def record(self, kind: str, **values: Any) -> None:
        pass

    def show(self, progress: float, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def plain_warnings() -> None:
    """Show warnings as one line, without the place in the program that they come from."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def _live_line() -> Any:
    """A running rich progress bar on stderr, or None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    except ImportError:
        return None
    live = Progress(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    live.add_task("", total=1.0)
    live.start()
    return live


def _keep_until(path: Path, step: int, finished: bool) -> None:
    """Drop lines that are made again, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if not isinstance(value, dict) or value.get("step", 0) > step or value.get("kind") == "end":
            continue
        if not (finished and value.get("kind") == "val" and value.get("step") == step):
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _clock(seconds: float | None) -> str:
    """1:02:03, 2:03, or ?:?? while unknown."""
    if seconds is None:
        return "?:??"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
