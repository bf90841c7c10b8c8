"""`butterfly eval repeats`: what names cost when they come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from butterfly_llm.commands.common import ModelOptions, own_source
from butterfly_llm.terminal import progress_bar


@dataclass(frozen=True)
class Repeats:
    """Bits per character of names in real text, by the distance to where they last occurred."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Text: files, directories, archives. Default: this package's source."""
    context: int = 8192
    """Characters in a window."""
    min_chars: int = 6
    """Shortest name that counts, characters."""
    max_count: int = 8
    """Names that occur more often in a window do not count."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.context < 1 or self.min_chars < 2 or self.max_count < 2:
            raise ValueError("eval repeats: --context starts at 1, --min-chars and --max-count at 2")
        from butterfly_llm.evaluate import load_documents
        from butterfly_llm.repeats import evaluate_repeats

        documents = load_documents(self.files or own_source(), errors="replace")
        model = self.model.load()
        with progress_bar("reading", sum(len(d.data) for d in documents)) as update:
            result = evaluate_repeats(
                model,
                documents,
                context=self.context,
                min_chars=self.min_chars,
                max_count=self.max_count,
                progress=update,
            )
        print(result.to_json() if self.json else "\n".join(result.lines()))
