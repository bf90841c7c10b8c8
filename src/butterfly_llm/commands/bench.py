"""`butterfly bench`: time and memory on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import tyro


@dataclass(frozen=True)
class Bench:
    """Measure this machine: a table, then one JSON object as the last line. Each has options of its own."""

    name: tyro.conf.Positional[
        Literal[
            "batch", "decode", "feed_forward", "ops", "peers", "prefill", "relay", "rings", "stream", "train",
            "twins",
        ]
    ]  # fmt: skip
    """batch: many streams at once; decode: writing after short and long texts; feed_forward: the half of a
    layer behind the attention, with its kernel and as compiled; ops: one attention layer on a
    GPU; peers: speed and memory beside other architectures; prefill: reading texts of growing length; relay:
    networks that learn to carry a letter; rings: bits per character of rings in fewer bits; stream: reading
    and writing; train: whole training steps; twins: other architectures trained on the same text."""
    options: tyro.conf.Positional[tuple[str, ...]] = ()
    """Options of that benchmark."""

    def run(self) -> None:
        import_module(f"butterfly_llm.bench.{self.name}").main(self.options)
