"""`butterfly eval`: bits per character of texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from butterfly_llm.commands.common import ModelOptions, TextOptions
from butterfly_llm.terminal import progress_bar, say


@dataclass(frozen=True)
class Eval:
    """Bits per character of a model on texts, by position in the context, next to xz and zstd. There are also
    `butterfly eval recall` (planted facts) and `butterfly eval repeats` (what comes twice)."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Texts: files, directories, archives; of a prepared corpus, its validation projects."""
    context: int | None = None
    """Characters of context, and of a window. Default: the model's reach, at most 65,536."""
    max_chars: int | None = None
    """Take at most this many characters of each text, the first ones."""
    match: bool = False
    """Also let the longest earlier occurrence of the last characters in the text propose the next one."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if not self.files:
            raise ValueError("eval: no text; give files, directories, archives or a prepared corpus")
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"eval: --max-chars must be at least 1, not {self.max_chars}")
        from butterfly_llm.evaluate import evaluate, format_table, load_documents

        documents = load_documents(
            self.files, encoding=self.text.encoding, errors=self.text.errors, max_chars=self.max_chars
        )
        model = self.model.load()
        for document in documents:
            if document.losses:
                say(f"{document.name}: {document.losses}")
        with progress_bar("evaluating", sum(len(d.data) for d in documents)) as update:
            result = evaluate(model, documents, context=self.context, match=self.match, progress=update)
        print(result.to_json() if self.json else format_table(result))
