"""`butterfly generate`: read a context and a prompt, write on."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from butterfly_llm.commands.common import ModelOptions, Rings, TextOptions, new_cache, own_source
from butterfly_llm.config import SamplingConfig
from butterfly_llm.memory import format_bytes
from butterfly_llm.terminal import progress_bar, say, write
from butterfly_llm.text import encode

if TYPE_CHECKING:
    from butterfly_llm.cache import Cache
    from butterfly_llm.model import Butterfly


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
    num_samples: int = 1
    """Continuations of the same context; the second is drawn with the next seed, and so on."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not written."""
    rings: Rings = "auto"
    """Type of what a stream keeps; auto: that of the activations. A state keeps its own."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.max_chars < 0 or self.context_chars < 0:
            raise ValueError("generate: --max-chars and --context-chars must be 0 or above")
        if self.num_samples < 1:
            raise ValueError(f"generate: --num-samples must be at least 1, not {self.num_samples}")
        data, note = self._context()
        data += encode(self.prompt, source="--prompt", encoding=self.text.encoding, errors=self.text.errors)
        if not data and self.state is None:
            raise ValueError("generate: context and prompt are both empty; give --prompt or --context")
        model = self.model.load()
        from butterfly_llm.generate import read

        if self.state is None:
            cache = new_cache(model, self.rings)
        else:
            from butterfly_llm.state import load_state

            cache = load_state(self.state, model)
            say(f"{self.state}: {cache.position:,} characters read before")
        if note:
            say(note)
        started, reading = time.perf_counter(), ""
        if data:
            with progress_bar("reading", len(data)) as update:
                read(model, data, cache, progress=update)
            reading = (
                f"read {len(data):,} characters at {len(data) / (time.perf_counter() - started):,.0f}/s, "
            )
        position, started = cache.position, time.perf_counter()
        streams = cache.fork(self.num_samples) if self.num_samples > 1 else [cache]
        for number, stream in enumerate(streams):
            if len(streams) > 1:
                write(f"==> sample {number + 1} of {len(streams)} <==\n")
            self._write(model, stream, replace(self.sampling, seed=self.sampling.seed + number))
            if len(streams) > 1 or sys.stdout.isatty():
                write("\n")
        wrote = time.perf_counter() - started
        lengths = [stream.position - position for stream in streams]
        own = sum(stream.held_nbytes for stream in streams) if len(streams) > 1 else 0
        say(
            reading
            + f"wrote {sum(lengths):,} at {sum(lengths) / wrote:,.1f}/s, state {format_bytes(cache.nbytes)}"
            + (f" shared, {format_bytes(own)} beside it" if own else "")
            + ("; the document or a stop string ended it" if min(lengths) < self.max_chars else "")
        )

    def _write(self, model: Butterfly, cache: Cache, sampling: SamplingConfig) -> None:
        from butterfly_llm.decode import Decoder
        from butterfly_llm.generate import generate_text

        on_gpu = cache.keys[0].device.type == "cuda" and cache.paged is None
        for piece in generate_text(
            model,
            b"",
            encoding=self.text.encoding,
            sampling=sampling,
            max_chars=self.max_chars,
            cache=cache,
            stop=("\0", *self.stop),  # NUL ends a document
            step=Decoder(model, cache).step if on_gpu else None,
        ):
            write(piece)

    def _context(self) -> tuple[bytes, str]:
        """The context, and what to say about it: after all that may be refused, which is one line alone."""
        if self.context is None and self.state is not None:
            return b"", ""
        paths: Sequence[Path] = own_source() if self.context is None else self.context
        if not paths:
            return b"", ""
        data, note = self.text.read_paths(
            paths,
            errors="replace" if self.context is None else None,
            max_chars=self.context_chars or None,
        )
        name = "this package's source" if self.context is None else "context"
        return data, f"{name}: {len(data):,} characters of {note}"
