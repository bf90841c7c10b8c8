"""The `butterfly` command: finds the module of a command, reads its options, runs it.

Results go to stdout, everything else to stderr. Bad input is one line on stderr and exit code 2. torch is
imported by the commands that need it, so that `butterfly --help` is quick.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from butterfly_llm import __version__
from butterfly_llm.terminal import flatten, one_line, say

COMMANDS = ("prepare", "train", "read", "generate", "eval", "export", "bench", "plot", "serve", "info")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the life of the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its text
    try:
        try:
            _parse(arguments).run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left; closing the broken stdout at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        say(f"butterfly: error: {message}")
        sys.exit(2)


def _parse(arguments: Sequence[str]) -> Any:
    """The chosen command with its options. SystemExit after --help and --version."""
    name, options = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name == "--version":
        print(f"butterfly {__version__}")
        sys.exit(0)
    if name in ("-h", "--help"):
        every = [Annotated[_form(each), tyro.conf.subcommand(each)] for each in COMMANDS]
        description = "A character-level language model for contexts of 64k to 1M+ characters."
        return _tyro(Union[tuple(every)], prog="butterfly", args=["--help"], description=description)  # noqa: UP007
    if name not in COMMANDS:
        raise ValueError(f"unknown command {_near(name, COMMANDS)}")
    if name == "eval" and options and options[0] in ("recall", "repeats"):
        return _tyro(_form(options[0]), prog=f"butterfly eval {options[0]}", args=options[1:])
    if name == "bench" and options and not options[0].startswith("-"):
        return _bench(*options)
    form = _form(name)
    default = {"default": form.defaults(options)} if name == "train" else {}
    return _tyro(form, prog=f"butterfly {name}", args=options, **default)


def _form(name: str) -> Any:
    """The dataclass of a command."""
    return getattr(import_module(f"butterfly_llm.commands.{name}"), name.capitalize())


def _bench(name: str, *options: str) -> Any:
    """A benchmark reads its options itself, so that it also runs where only torch is installed."""
    from butterfly_llm.bench import BENCHES

    if name not in BENCHES:
        raise ValueError(f"unknown benchmark {_near(name, BENCHES)}")
    return _form("bench")(name, options)


def _near(name: str, known: Iterable[str]) -> str:
    """An unknown name, the known one it resembles, and all there are."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{name!r}{hint}: there are {', '.join(known)}"


def _tyro(form: Any, **options: Any) -> Any:
    """tyro.cli, with what it says about wrong options in one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(form, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone), **options)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(flatten(complaint.getvalue())) from None
        raise
