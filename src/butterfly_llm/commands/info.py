"""`butterfly info`: versions, devices, backends, sizes of models."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from butterfly_llm import __version__
from butterfly_llm.config import PRESETS, ButterflyConfig
from butterfly_llm.memory import format_bytes


@dataclass(frozen=True)
class Info:
    """Versions, devices and backends; parameters, state and reach of a preset or a checkpoint."""

    model: Path | None = None
    """Folder of a checkpoint."""
    preset: str | None = None
    """Name of a preset."""
    json: bool = False
    """Print one line of JSON instead of text."""

    def run(self) -> None:
        import torch

        from butterfly_llm.ops import backends, default_backend

        devices = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
        facts: dict[str, Any] = {
            "versions": {"butterfly-llm": __version__, "python": platform.python_version()}
            | {name: _version(name) for name in ("torch", "triton", "numpy", "safetensors")}
            | {"torch": torch.__version__},  # with the build, which the metadata of a wheel may lack
            "devices": devices,
            "backends": backends(),
            "default_backends": {name: default_backend(name) for name in devices},
            "models": {name: _describe(config) for name, config in self._configs().items()},
        }
        print(json.dumps(facts) if self.json else "\n".join(_lines(facts)))

    def _configs(self) -> dict[str, ButterflyConfig]:
        if self.model is None and self.preset is None:
            return dict(PRESETS)
        configs = {} if self.preset is None else {self.preset: ButterflyConfig.preset(self.preset)}
        if self.model is not None:
            from butterfly_llm import load_pretrained

            configs[str(self.model)] = load_pretrained(self.model).config
        return configs


def _describe(config: ButterflyConfig) -> dict[str, Any]:
    """Numbers of a model, without allocating it."""
    import torch

    from butterfly_llm.cache import cache_nbytes
    from butterfly_llm.model import Butterfly
    from butterfly_llm.ops.feed_forward import reason_against

    with torch.device("meta"):
        parameters = Butterfly(config).num_parameters()
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "parameters": parameters,
        "feed_forward": reason_against(config) or "fused with triton",
        "reach_chars": config.reach_chars,
        "state_bytes_float32": cache_nbytes(config, 1, torch.float32) if config.causal else None,
        "config": config.to_dict(),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    for name, what in facts["devices"].items():
        yield f"device {name}: {what}, backend {facts['default_backends'][name]}"
    for name, status in facts["backends"].items():
        yield f"backend {name}: {status}"
    for name, model in facts["models"].items():
        state = model["state_bytes_float32"]
        yield (
            f"model {name}: {model['parameters']:,} parameters, {model['layers']} layers of width "
            f"{model['hidden_size']}, reach {model['reach_chars']:,} characters, "
            f"feed-forward {model['feed_forward']}, "
            f"state {format_bytes(state) if state is not None else 'none (bidirectional)'}"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
