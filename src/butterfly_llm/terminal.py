"""What the command shows: progress and notes on stderr, text on stdout, errors in one line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# What a terminal would obey; a model may write any of the 256 characters.
_CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


def flatten(box: str) -> str:
    """The message in a box that tyro draws (UTF-8 or ASCII): its first part, and the options it suggests."""
    parts: list[list[str]] = [[]]
    for line in (raw.strip("\u2502 ") for raw in box.strip().splitlines()):
        if re.fullmatch(r"[\u2500-]{8,}", line):
            parts.append([])
        elif line[:1] not in ("", "\u256d", "\u2570"):
            parts[-1].append(line)
    if "\u256d" not in box:
        parts = parts[1:]  # the title, which the UTF-8 box has in its frame
    message = " ".join(parts[0]) if parts else " ".join(box.split())
    near = [line for part in parts[1:] if part and part[0].startswith("Perhaps") for line in part]
    meant = dict.fromkeys(line.split()[0] for line in near if line.startswith("--"))
    message = re.sub(r"^Error parsing (?!-)\S+: ", "", message)
    if choice := re.match(r"invalid choice '(.*?)' for .* Expected one of \((.*)\)", message):
        meant = dict.fromkeys(difflib.get_close_matches(choice[1], re.findall(r"'(.*?)'", choice[2]), 1))
    return message + (f" (did you mean {' or '.join(meant)}?)" if meant else "")


def one_line(error: Exception) -> str | None:
    """One line for what a user can mend, None for what is a bug."""
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif isinstance(error, (ValueError, ImportError, MemoryError)):
        text = str(error) or "out of memory"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        asked, free = (
            re.search(pattern, str(error)) for pattern in (r"allocate ([\d.]+ \w+)", r"([\d.]+ \w+) is free")
        )
        figures = f" ({asked[1]} more were needed, {free[1]} were free)" if asked and free else ""
        text = (
            f"the GPU is out of memory{figures}: use a shorter context (generate --context-chars, eval "
            "--context), --precision bfloat16, --device cpu or a smaller --model"
        )
    else:
        return None
    return " ".join(text.split())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text to stdout at once; to a terminal without the characters that would command it."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} chars/s")


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, when that is a terminal; yields the function that takes the characters done so far."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} chars"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.update(task, completed=done)
