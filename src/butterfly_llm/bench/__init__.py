"""Benchmarks: `butterfly bench NAME`, or `python -m butterfly_llm.bench.NAME` where only torch is installed.

Each prints a table and, as the last line of stdout, one JSON object. A module has `add_options`, `measure`
(options to the object) and `main`, which is `run` with both. `butterfly plot scaling` draws the `rows` of an
object: `what`, `length` (characters), and `chars_per_second` or `bytes`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any, NoReturn

BENCHES = (
    "batch",
    "decode",
    "feed_forward",
    "ops",
    "peers",
    "prefill",
    "relay",
    "rings",
    "stream",
    "train",
    "twins",
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which option may have been meant; exit code 2."""

    def error(self, message: str) -> NoReturn:
        near = []
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2].partition("=")[0]
            near = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"butterfly: error: {message}{hint}\n")


def run(
    name: str,
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: Sequence[str] | None,
) -> None:
    """Read the options (None: of the process), measure, print the object.

    ValueError and OSError become one line and exit code 2.
    """
    parser = Parser(
        prog=f"butterfly bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="only the JSON object on stdout, the table on stderr"
    )
    options = parser.parse_args(arguments)
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        try:
            result = measure(options)
        except (ValueError, OSError) as failure:
            parser.error(" ".join(str(failure).split()))
    print(json.dumps({"bench": name, "python": platform.python_version(), **result}))
