"""`butterfly generate`: read a context and a prompt, write on."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from butterfly_llm.commands.common import Device, Precision, load_model, own_source, read_paths
from butterfly_llm.config import SamplingConfig
from butterfly_llm.memory import format_bytes
from butterfly_llm.terminal import progress_bar, say, write
from butterfly_llm.text import Encoding, Errors, encode


@dataclass(frozen=True)
class Generate:
    """Read a context and a prompt, then write on. The text goes to stdout, character by character."""

    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    context: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[PATH ...]")] = None
    """What to read first: files, directories, archives; nothing if empty. Default: this package's source, or
    nothing more where a state is given."""
    state: Path | None = None
    """Folder that `butterfly read --save` wrote: go on from what it has read."""
    context_chars: int = 65_536
    """Characters of the context that are kept, the last ones; 0 for all."""
    prompt: str = ""
    """Text after the context that the model continues."""
    max_chars: int = 500
    """Characters to write at most; a document may end before."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not written."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "strict"
    """A character outside Latin-1 is refused, or becomes '?'."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        if self.max_chars < 0 or self.context_chars < 0:
            raise ValueError("generate: --max-chars and --context-chars must be 0 or above")
        data, note = self._context()
        data += encode(self.prompt, source="--prompt", encoding=self.encoding, errors=self.errors)
        if not data and self.state is None:
            raise ValueError("generate: context and prompt are both empty; give --prompt or --context")
        model = load_model(self.model, self.device, self.precision)
        from butterfly_llm.generate import generate_text

        if self.state is None:
            cache = model.new_cache(1)
        else:
            from butterfly_llm.state import load_state

            cache = load_state(self.state, model)
            say(f"{self.state}: {cache.position:,} characters read before")
        begun = cache.position
        if note:
            say(note)
        reading, read = time.perf_counter(), 0.0
        with progress_bar("reading", len(data)) as update:

            def progress(chars: int) -> None:
                nonlocal read
                read = time.perf_counter() - reading
                update(chars)

            stream = generate_text(
                model,
                data,
                encoding=self.encoding,
                sampling=self.sampling,
                max_chars=self.max_chars,
                cache=cache,
                stop=("\0", *self.stop),  # NUL ends a document
                progress=progress,
            )
            first = next(stream, "")
        for piece in chain((first,), stream):
            write(piece)
        if sys.stdout.isatty():
            write("\n")
        wrote = time.perf_counter() - reading - read
        drawn = cache.position - begun - len(data)
        say(
            (f"read {len(data):,} characters at {len(data) / read:,.0f}/s, " if data else "")
            + f"wrote {drawn:,} at {drawn / wrote:,.1f}/s, state {format_bytes(cache.nbytes)}"
            + ("; the document or a stop string ended it" if drawn < self.max_chars else "")
        )

    def _context(self) -> tuple[bytes, str]:
        """The context, and what to say about it: after all that may be refused, which is one line alone."""
        if self.context is None and self.state is not None:
            return b"", ""
        paths: Sequence[Path] = own_source() if self.context is None else self.context
        if not paths:
            return b"", ""
        data, note = read_paths(
            paths,
            encoding=self.encoding,
            errors="replace" if self.context is None else self.errors,
            max_chars=self.context_chars or None,
        )
        name = "this package's source" if self.context is None else "context"
        return data, f"{name}: {len(data):,} characters of {note}"
