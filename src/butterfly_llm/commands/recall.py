"""`butterfly eval recall`: planted facts, asked for further on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from butterfly_llm.commands.common import Device, Precision, load_model, own_source
from butterfly_llm.terminal import progress_bar


@dataclass(frozen=True)
class Recall:
    """Plant facts into real text, ask for them further on, and count the answers by hops and distance."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Text to plant into: files, directories, archives. Default: this package's source."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    length: int = 4096
    """Characters in a window."""
    windows: int = 8
    """Windows for each number of hops."""
    distractors: int = 0
    """Facts planted beside each one that is asked for."""
    value_chars: int = 2
    """Digits in a value."""
    seed: int = 0
    """Places, keys and values follow from it."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        if self.length < 512 or self.windows < 1:
            raise ValueError("eval recall: --length must be at least 512 and --windows at least 1")
        from butterfly_llm.data import read_context
        from butterfly_llm.recall import Needles, evaluate_recall

        text = read_context(self.files or own_source(), errors="replace").data
        model = load_model(self.model, self.device, self.precision)
        needles = Needles(distractors=self.distractors, value_chars=self.value_chars)
        with progress_bar("asking", None) as update:
            result = evaluate_recall(
                model,
                text,
                length=self.length,
                windows=self.windows,
                needles=needles,
                seed=self.seed,
                progress=update,
            )
        print(result.to_json() if self.json else "\n".join(result.lines()))
