"""Butterfly-LLM: a character-level language model for contexts of 64k to 1M+ characters on one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Butterfly", "ButterflyConfig", "load_pretrained", "load_state", "save_state"]

if TYPE_CHECKING:
    from butterfly_llm.checkpoint import load_pretrained
    from butterfly_llm.config import ButterflyConfig
    from butterfly_llm.model import Butterfly
    from butterfly_llm.state import load_state, save_state

_HOMES = {
    "Butterfly": "model",
    "ButterflyConfig": "config",
    "load_pretrained": "checkpoint",
    "load_state": "state",
    "save_state": "state",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only what is used pays for it.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"butterfly_llm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'butterfly_llm' has no attribute {name!r}")
