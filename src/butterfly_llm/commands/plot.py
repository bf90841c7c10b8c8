"""`butterfly plot`: figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from butterfly_llm.commands.common import Device, load_model, own_source


@dataclass(frozen=True)
class Plot:
    """Draw a figure as PNG or SVG: of the routing, of a run, of measurements, of attention."""

    figure: tyro.conf.Positional[
        Literal[
            "routing", "reach", "loss", "context", "recall", "scaling", "peers", "twins", "kernels",
            "attention",
        ]
    ]  # fmt: skip
    """routing: who hears whom; reach: pairs connected by depth; loss: a training run; context: bits by
    position; recall: facts found again, by hops; scaling: speed and memory by length; peers: the same
    beside other architectures; twins: what other architectures learn; kernels: attention against the floor;
    attention: where a layer looks."""
    out: Path
    """The file to write, .png or .svg."""
    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    """loss: the metrics.jsonl of a run; context: outputs of butterfly eval --json; recall: of
    butterfly eval recall --json, or rows of the recall benchmarks; scaling, peers, twins, kernels: outputs of
    butterfly bench; attention: a text, or this package's source if none is given."""
    layer: int = 24
    """attention: which layer, counted from 0."""
    head: int | None = None
    """attention: which head, counted from 0. Default: the mean of all."""
    max_chars: int = 2048
    """attention: characters of the text that are read, the first ones; the last chunk of them is shown."""
    model: Path | None = None
    """attention: folder of a checkpoint. Default: the one that ships with the package."""
    device: Device = "auto"
    """attention: where to run; auto takes a GPU where there is one."""

    def run(self) -> None:
        from butterfly_llm.plot import kernels, peers, recall, results, routing

        if self.figure == "routing":
            routing.plot_routing(self.out)
        elif self.figure == "reach":
            routing.plot_reach(self.out)
        elif self.figure == "attention":
            self._attention()
        elif not self.sources:
            what = {
                "loss": "which run? give its metrics.jsonl",
                "context": "of what? give outputs of butterfly eval --json",
                "recall": "of what? give outputs of butterfly eval recall --json",
                "scaling": "of what? give outputs of butterfly bench",
                "peers": "of what? give outputs of butterfly bench peers",
                "twins": "of what? give outputs of butterfly bench twins",
                "kernels": "of what? give the output of butterfly bench ops",
            }
            raise ValueError(f"plot {self.figure}: {what[self.figure]}")
        elif self.figure == "context":
            results.plot_context(self.sources, self.out)
        elif self.figure == "recall":
            recall.plot_recall(self.sources, self.out)
        elif self.figure == "scaling":
            results.plot_scaling(self.sources, self.out)
        elif self.figure == "peers":
            peers.plot_peers(self.sources, self.out)
        elif self.figure == "twins":
            peers.plot_twins(self.sources, self.out)
        elif len(self.sources) > 1:
            raise ValueError(f"plot {self.figure}: one run at a time")
        elif self.figure == "kernels":
            kernels.plot_kernels(self.sources[0], self.out)
        else:
            results.plot_loss(self.sources[0], self.out)
        print(self.out)

    def _attention(self) -> None:
        from butterfly_llm.data import read_context
        from butterfly_llm.plot.attention import plot_attention

        if self.max_chars < 1:
            raise ValueError(f"plot attention: --max-chars must be at least 1, not {self.max_chars}")
        text = read_context(self.sources or own_source(), errors="replace").data[: self.max_chars]
        model = load_model(self.model, self.device, "float32")
        plot_attention(model, text, self.out, layer=self.layer, head=self.head)
