"""`butterfly read`: read a text once and keep the state, for `butterfly generate --state`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from butterfly_llm.commands.common import ModelOptions, Rings, TextOptions, new_cache
from butterfly_llm.memory import format_bytes
from butterfly_llm.terminal import progress_bar, say


@dataclass(frozen=True)
class Read:
    """Read texts once and save the state of the stream; `butterfly generate --state` goes on from it."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """What to read: files, directories, archives."""
    save: Path
    """Folder of the state; replaced if it holds one already."""
    state: Path | None = None
    """Folder of a state to go on from: the texts are appended to what it has read."""
    rings: Rings = "auto"
    """Type of what a stream keeps; auto: that of the activations. A state keeps its own."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if not self.paths:
            raise ValueError("read: no text; give files, directories or archives")
        from butterfly_llm.folder import STATE, check_target

        check_target(self.save, STATE)  # not only when all is read
        data, note = self.text.read_paths(self.paths)
        model = self.model.load()
        from butterfly_llm.generate import read
        from butterfly_llm.state import load_state, save_state

        cache = new_cache(model, self.rings) if self.state is None else load_state(self.state, model)
        say(f"{len(data):,} characters of {note}")
        started = time.perf_counter()
        with progress_bar("reading", len(data)) as update:
            read(model, data, cache, progress=update)
        rate = len(data) / (time.perf_counter() - started)
        save_state(cache, self.save, model=model)
        size = sum(path.stat().st_size for path in self.save.iterdir())
        say(
            f"read {len(data):,} characters at {rate:,.0f}/s, {cache.position:,} in all; "
            f"state {format_bytes(cache.nbytes)}, {format_bytes(size)} on disk"
        )
        print(self.save)
