"""What several commands share: where a model runs, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from butterfly_llm.memory import pick_device

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|cuda:N")]
Precision = Literal["auto", "float32", "bfloat16"]

PACKAGE = Path(__file__).parents[1]


def own_source() -> list[Path]:
    """The modules of this package: the text that is at hand wherever it is installed."""
    return sorted(PACKAGE.rglob("*.py"))


def load_model(path: Path | None, device: str, precision: str) -> Butterfly:
    """The model of a folder, None for the shipped one, on its device and ready to generate."""
    import torch

    from butterfly_llm import load_pretrained

    where = pick_device(device)
    model = load_pretrained(path, device=where).eval()
    if precision == "bfloat16" or (precision == "auto" and where.type == "cuda"):
        model.compute_dtype = torch.bfloat16
    return model
