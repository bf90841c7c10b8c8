"""`butterfly export`: a model in fewer bits, with more levels, or told of n-grams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write a model in fewer bits, with more levels or with n-grams: of a run, the finished or newest one."""

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

    def run(self) -> None:
        from butterfly_llm import load_pretrained
        from butterfly_llm.checkpoint import save_model

        model = load_pretrained(self.model)
        if self.levels is not None:
            from butterfly_llm.extend import extend_levels

            model = extend_levels(model, self.levels, self.passes)
        elif self.passes is not None:
            raise ValueError("export: --passes says which of them get more levels: give --levels too")
        if self.ngram_orders:
            from butterfly_llm.extend import extend_ngrams

            model = extend_ngrams(model, self.ngram_orders)
        save_model(model, self.out, dtype=self.dtype)
        print(self.out)
