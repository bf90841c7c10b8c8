"""Where the figures of a training run go besides metrics.jsonl: TensorBoard, trackio, Weights & Biases."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

PROJECT = "butterfly-llm"


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step, named as in "train/bits_per_char"."""

    def close(self) -> None:
        """Everything logged is kept."""


def tracker(name: str) -> Callable[[Path, Mapping[str, Any]], Tracker] | None:
    """What opens a run of tracker `name` for (folder of the run, its settings); None for "none".

    A folder that is trained on again goes on in the same run. ModuleNotFoundError with a hint, here and not
    when the run opens, where the package is not installed.
    """
    if name == "none":
        return None
    package = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        module = import_module(package)
    except ImportError:
        raise ModuleNotFoundError(
            f"train: track {name} needs {name}: pip install 'butterfly-llm[{name}]'"
        ) from None
    return partial(_TensorBoard if name == "tensorboard" else _Service, module)


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text(
            "settings", "\n".join(f"    {key} = {value!r}" for key, value in settings.items())
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service:
    """trackio and wandb share an interface: a run of project `butterfly-llm`, named after its folder."""

    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        self._module = module
        # The name tells folders of one name apart, and finds the run again when it is resumed.
        mark = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        name = f"{folder.resolve().name}-{mark}"
        identity = {"id": name} if module.__name__ == "wandb" else {}
        with redirect_stdout(sys.stderr):
            module.init(project=PROJECT, name=name, config=dict(settings), resume="allow", **identity)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()
