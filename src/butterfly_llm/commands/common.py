"""What several commands share: where a model runs, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from butterfly_llm.memory import pick_device
from butterfly_llm.text import Encoding, Errors

if TYPE_CHECKING:
    from butterfly_llm.cache import Cache
    from butterfly_llm.model import Butterfly

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|cuda:N")]
Precision = Literal["auto", "float32", "bfloat16"]
Rings = Literal["auto", "float32", "bfloat16", "int8"]

PACKAGE = Path(__file__).parents[1]


def own_source() -> list[Path]:
    """The modules of this package: the text that is at hand wherever it is installed."""
    return sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def load(self) -> Butterfly:
        """The model, ready to generate."""
        return load_model(self.model, self.device, self.precision)


@dataclass(frozen=True)
class TextOptions:
    """How text becomes characters."""

    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "strict"
    """A character outside Latin-1 is refused, or becomes '?'."""

    def read_paths(
        self, paths: Sequence[Path], *, errors: Errors | None = None, max_chars: int | None = None
    ) -> tuple[bytes, str]:
        """The text in files, directories and archives, its last `max_chars`, and what to say about it."""
        from butterfly_llm.data import read_context

        found = read_context(paths, encoding=self.encoding, errors=errors or self.errors, max_chars=max_chars)
        notes = [f"{found.files:,} files"]
        if found.dropped:
            notes.append(f"{found.dropped:,} characters before them left out (--context-chars)")
        if found.replaced:
            notes.append(f"{found.replaced:,} characters replaced by '?'")
        if found.skips.counts:
            notes.append(f"skipped {found.skips.summary()}")
        return found.data, ", ".join(notes)


def new_cache(model: Butterfly, rings: Rings) -> Cache:
    """An empty state for one stream."""
    import torch

    return model.new_cache(1, dtype=None if rings == "auto" else getattr(torch, rings))


def load_model(path: Path | None, device: str, precision: str) -> Butterfly:
    """The model of a folder, None for the shipped one, on its device and ready to generate."""
    import torch

    from butterfly_llm import load_pretrained

    where = pick_device(device)
    model = load_pretrained(path, device=where).eval()
    if precision == "bfloat16" or (precision == "auto" and where.type == "cuda"):
        model.compute_dtype = torch.bfloat16
    return model
