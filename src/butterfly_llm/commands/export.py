"""`butterfly export`: a model in fewer bits, or as one that reads more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write a model in fewer bits, or as one that reads more: of a run, the finished or newest one."""

    model: tyro.conf.Positional[Path]
    """Folder of a run, a checkpoint or a model."""
    out: Path
    """Folder of the new model; replaced if it holds one already."""
    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """Type of the matrices; int8 takes a byte a weight and a scale for each row."""
    levels: int | None = None
    """Levels of a pass, more than it has: new layers that change nothing until they are trained."""
    passes: int | None = None
    """How many passes get them; one is enough to reach everything and keeps least in memory. None: all."""

    ngram_orders: tuple[int, ...] = ()
    """Numbers n: what followed the last n characters becomes an input, of no effect until it is trained."""
    ngram_words: int = 0
    """Likewise what followed the token so far, alone and behind one, two .. words: so many inputs."""
    ngram_ranks: int | None = None
    """How many followers of each n-gram and of each of these are told, the latest ones. None: as before."""

    local_chunks: int | None = None
    """Chunks just before its own that every chunk reads too; what it writes changes a little."""
    local_every: int = 1
    """In every how manyth layer it reads them."""

    def run(self) -> None:
        from butterfly_llm import load_pretrained
        from butterfly_llm.checkpoint import save_model

        model = load_pretrained(self.model)
        if self.levels is not None:
            from butterfly_llm.extend import extend_levels

            model = extend_levels(model, self.levels, self.passes)
        elif self.passes is not None:
            raise ValueError("export: --passes says which of them get more levels: give --levels too")
        if self.ngram_orders or self.ngram_words or self.ngram_ranks is not None:
            from butterfly_llm.extend import extend_ngrams

            ranks = 1 if self.ngram_ranks is None else self.ngram_ranks
            model = extend_ngrams(model, self.ngram_orders, self.ngram_words, ranks)
        if self.local_chunks is not None:
            from butterfly_llm.extend import extend_local

            model = extend_local(model, self.local_chunks, self.local_every)
        elif self.local_every != 1:
            raise ValueError("export: --local-every says which layers read --local-chunks: give them too")
        save_model(model, self.out, dtype=self.dtype)
        print(self.out)
