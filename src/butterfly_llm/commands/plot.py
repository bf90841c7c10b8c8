"""`butterfly plot`: figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Plot:
    """Draw a figure: the routing of the chunks, or the loss of a training run."""

    figure: tyro.conf.Positional[Literal["routing", "loss"]]
    """Which figure."""
    out: Path
    """The file to write, .png or .svg."""
    metrics: Path | None = None
    """For loss: the metrics.jsonl of a run."""

    def run(self) -> None:
        from butterfly_llm.plot import plot_loss, plot_routing

        if self.figure == "routing":
            plot_routing(self.out)
        elif self.metrics is None:
            raise ValueError("plot loss: which run? give --metrics RUN/metrics.jsonl")
        else:
            plot_loss(self.metrics, self.out)
        print(self.out)
