"""`butterfly eval recall`: facts that are asked for further on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from butterfly_llm.commands.common import ModelOptions, own_source
from butterfly_llm.terminal import progress_bar

Task = Literal[
    "needle", "multikey", "uuid", "announced", "reworded", "many", "variables", "mqar", "induction", "copying"
]


@dataclass(frozen=True)
class Recall:
    """Ask a model for what it has read, and count the right answers by hops and distance."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Text to plant into: files, directories, archives, or a prepared corpus, of which the validation split
    is taken. Default: this package's source."""
    task: Task = "needle"
    """What is asked: a planted value alone, among others or of 32 digits; key announced before the text;
    question in other characters than the fact (reworded); 64 values in one window (many); a chain of
    assignments; pairs (mqar); what followed a sign (induction); strewn letters (copying)."""
    length: int = 4096
    """Characters in a window."""
    windows: int = 8
    """Windows for each number of hops; in all, where the task cannot choose it."""
    seed: int = 0
    """Places, keys and values follow from it."""
    lookup: bool = True
    """--no-lookup: n-grams say nothing where an answer is predicted; what the network finds by itself."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.length < 512 or self.windows < 1:
            raise ValueError("eval recall: --length must be at least 512 and --windows at least 1")
        from butterfly_llm.corpus import MANIFEST, Corpus
        from butterfly_llm.data import read_context
        from butterfly_llm.tasks import evaluate_task

        if len(self.files) == 1 and (self.files[0] / MANIFEST).is_file():
            text = Corpus(self.files[0], "val").data.tobytes()
        else:
            text = read_context(self.files or own_source(), errors="replace").data
        model = self.model.load()
        with progress_bar("asking", None) as update:
            result = evaluate_task(
                model,
                self.task,
                text,
                length=self.length,
                windows=self.windows,
                seed=self.seed,
                lookup=self.lookup,
                progress=update,
            )
        print(result.to_json() if self.json else "\n".join(result.lines()))
