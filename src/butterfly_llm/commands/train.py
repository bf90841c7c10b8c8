"""`butterfly train`: a run as a RUN.toml or a preset says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from butterfly_llm.config import ButterflyConfig, TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a model as RUN.toml or a preset says; flags change single settings."""

    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    model: ButterflyConfig = field(default_factory=ButterflyConfig)
    run_file: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN.toml]")] = None
    """Settings of the run: preset = "small", and tables [model] and [train]."""
    preset: str = "small"
    """Named model, where there is no RUN.toml: full, small, tiny or micro."""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Train:
        """What the RUN.toml or the preset among the arguments says, before the flags have their say."""
        run_file = next((Path(a) for a in arguments if a.endswith(".toml")), None)
        preset = _option(arguments, "--preset")
        if run_file is None:
            preset = preset or "small"
            return cls(model=ButterflyConfig.preset(preset), preset=preset)
        if preset is not None:
            raise ValueError(f"train: {run_file} names its preset; leave --preset out")
        from butterfly_llm.train import load_run

        train, model = load_run(run_file)
        return cls(train=train, model=model, run_file=run_file)

    def run(self) -> None:
        if self.run_file is not None and self.run_file.suffix != ".toml":
            raise ValueError(f"train: {self.run_file}: the name of a run file ends in .toml")
        from butterfly_llm.parallel import is_first
        from butterfly_llm.reporting import plain_warnings
        from butterfly_llm.train import train

        plain_warnings()
        train(self.train, self.model)
        if is_first():
            print(self.train.out)


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE` among raw arguments."""
    for argument, following in zip(arguments, (*arguments[1:], None), strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument[len(name) + 1 :]
    return None
