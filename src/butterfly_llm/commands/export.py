"""`butterfly export`: a model in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write a model in fewer bits: of a run, the finished model or the newest checkpoint."""

    model: tyro.conf.Positional[Path]
    """Folder of a run, a checkpoint or a model."""
    out: Path
    """Folder of the new model; replaced if it holds one already."""
    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """Type of the matrices; int8 takes a byte a weight and a scale for each row."""

    def run(self) -> None:
        from butterfly_llm import load_pretrained
        from butterfly_llm.checkpoint import save_model

        save_model(load_pretrained(self.model), self.out, dtype=self.dtype)
        print(self.out)
