"""Models and training states on disk: a folder of safetensors shards and JSON, never pickle.

    config.json                        what the model is, how its weights are stored
    model-00001-of-00003.safetensors   weights, and model.safetensors.index.json: which shard holds which
    state.json, state-*.safetensors    only in a training checkpoint: counters, optimisers, random state
    MANIFEST.json                      size and sha256 of every other file

A training checkpoint is also a model folder. `folder.py` says how they are written and checked.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.folder import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    SHARD_BYTES,
    Folder,
    json_bytes,
    shards,
    standing,
    write_folder,
)
from butterfly_llm.model import Butterfly

SHIPPED = Path(__file__).parent / "weights" / "small"

StoredDtype = Literal["float32", "bfloat16", "int8"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCALE = ".scale"


def save_model(
    model: Butterfly,
    directory: str | Path,
    *,
    dtype: StoredDtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the model to the folder `directory`, replacing a model that is there.

    dtype:       of the matrices; vectors stay float32. int8 keeps a float32 scale for each output row.
    shard_bytes: most tensor bytes in a file; a tensor is never cut.
    extra:       JSON kept in config.json, for example how the model was trained.

    ValueError for an unknown dtype and a folder that holds something else than a model.
    """
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"checkpoint: dtype must be float32, bfloat16 or int8, not {dtype!r}")
    stored = _quantised(model) if dtype == "int8" else _cast(model, _DTYPES[dtype])
    write_folder(Path(directory), _model_files(model.config, dtype, stored, shard_bytes, extra or {}))


def load_pretrained(path: str | Path | None = None, *, device: str | torch.device = "cpu") -> Butterfly:
    """The model in a folder, its parameters float32 on `device`; None for the model shipped with the package.

    `path` may be a model folder, a training checkpoint, or the `out` folder of a run (its finished model, or
    else its newest checkpoint). FileNotFoundError where there is nothing; ValueError, one line, for a
    damaged, foreign or inconsistent folder, a pickle, and a model that does not fit into memory.
    """
    if path is None and not SHIPPED.is_dir():
        raise FileNotFoundError("no model is shipped with this installation: give the path of one")
    folder = _ModelFolder(_resolve(SHIPPED if path is None else Path(path)))
    config, dtype = folder.model_config()
    needed = _check_sizes(folder, config, dtype)
    for place in {"cpu", str(device)}:
        memory.require(
            needed,
            place,
            f"the model in {folder.path.name}",
            "use a smaller model or another device",
        )
    with torch.device("meta"):
        model = Butterfly(config)
    model.to_empty(device="cpu")  # `copy_weights` fills every parameter, or refuses
    copy_weights(model, folder.weights(dtype), source=str(folder.path))
    return model.to(device)


def estimate_model_bytes(config: ButterflyConfig) -> int:
    """Bytes of a model's float32 parameters, without making them."""
    with torch.device("meta"):
        return 4 * Butterfly(config).num_parameters()


def copy_weights(model: Butterfly, tensors: Iterable[tuple[str, Tensor]], *, source: str) -> None:
    """Fill every parameter from (name, tensor); ValueError names the first one that does not fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        if name not in parameters:
            raise ValueError(
                f"{source}: tensor {name!r:.80} belongs to no parameter of the model in config.json"
            )
        found, expected = tuple(tensor.shape), tuple(parameters[name].shape)
        if found != expected:
            raise ValueError(f"{source}: config.json makes {name} {expected}, but the weights are {found}")
        with torch.no_grad():
            parameters.pop(name).copy_(tensor)
    if parameters:
        raise ValueError(f"{source}: tensor {min(parameters)} of the model in config.json is missing")


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """A training checkpoint as read from disk."""

    path: Path
    model_config: ButterflyConfig
    weights: dict[str, Tensor]  # by parameter name, float32
    tensors: dict[str, Tensor]  # what `save_training` was given
    values: dict[str, Any]  # likewise, JSON


def save_training(
    model: Butterfly, directory: str | Path, *, tensors: Iterable[tuple[str, Tensor]], values: dict[str, Any]
) -> None:
    """Write float32 weights and the rest of a training state: named tensors of any kind, and JSON values."""

    def files() -> Iterator[tuple[str, bytes]]:
        yield from _model_files(model.config, "float32", _cast(model, torch.float32), SHARD_BYTES, {})
        yield from shards("state", tensors, SHARD_BYTES)
        yield "state.json", json_bytes(values)

    write_folder(Path(directory), files())


def load_training(directory: str | Path) -> TrainingState:
    """Read a training checkpoint, all of it checked; ValueError or FileNotFoundError in one line."""
    folder = _ModelFolder(Path(directory))
    config, dtype = folder.model_config()
    if "state.json" not in folder.manifest:
        raise ValueError(
            f"{directory}: a model without training state (no state.json in {MANIFEST}); training cannot go "
            "on from it"
        )
    weights = _check_sizes(folder, config, dtype)
    folder.check_sizes("state", 0, 3 * weights)
    total = sum(entry["bytes"] for entry in folder.manifest.values())
    memory.require(
        total, "cpu", f"reading {folder.path.name}", "close other programs or use a larger machine"
    )
    return TrainingState(
        path=folder.path,
        model_config=config,
        weights=dict(folder.weights(dtype)),
        tensors=dict(folder.tensors("state")),
        values=folder.json("state.json"),
    )


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in the folder of a run."""
    return Path(run) / "checkpoints" / f"step-{step:09d}"


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    found = (Path(run) / "checkpoints").glob("step-" + "[0-9]" * 9)
    return sorted((path for path in found if (path / MANIFEST).is_file()), reverse=True)


def newest_training(run: str | Path) -> TrainingState | None:
    """The newest checkpoint of a run that is whole; None where there is none at all.

    A damaged one gives way to the one before, with a warning; ValueError where all of them are damaged.
    """
    problems = []
    for path in checkpoints(run):
        try:
            state = load_training(path)
        except (ValueError, OSError) as failure:
            problems.append(str(failure))
            continue
        for problem in problems:
            warnings.warn(f"checkpoint skipped: {problem}", stacklevel=2)
        return state
    if problems:
        raise ValueError(f"{run}: no checkpoint is whole ({problems[0]}); train into another folder")
    return None


def prune(run: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted writers left behind."""
    for path in checkpoints(run)[keep:]:
        shutil.rmtree(path)
    for path in (Path(run) / "checkpoints").glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _cast(model: Butterfly, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to("cpu", dtype if parameter.ndim == 2 else torch.float32)


def _quantised(model: Butterfly) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _cast(model, torch.float32):
        if tensor.ndim == 2:
            codes, scale = quantise(tensor)
            yield name, codes
            yield name + _SCALE, scale
        else:
            yield name, tensor


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: (R, C) -> codes (R, C) int8, scale (R,) float32; no error is above scale / 2."""
    scale = matrix.float().abs().amax(1) / 127
    safe = torch.where(scale > 0, scale, 1.0)
    return (matrix.float() / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantise` up to rounding: float32 (R, C)."""
    return codes.float() * scale[:, None]


def _model_files(
    config: ButterflyConfig,
    dtype: StoredDtype,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
    extra: dict[str, Any],
) -> Iterator[tuple[str, bytes]]:
    header = {"format": MODEL, "version": FORMAT_VERSION, "dtype": dtype}
    yield "config.json", json_bytes({**header, "model": config.to_dict(), "extra": extra})
    yield from shards("model", tensors, shard_bytes)


def _check_sizes(folder: Folder, config: ButterflyConfig, dtype: StoredDtype) -> int:
    """The bytes of the model in float32; ValueError where the files cannot hold it."""
    needed = estimate_model_bytes(config)
    folder.check_sizes("model", needed // {"float32": 1, "bfloat16": 2, "int8": 4}[dtype], needed)
    return needed


def _resolve(path: Path) -> Path:
    """The model folder that `path` means: itself, or what a run in it has come to."""
    path = standing(path)
    if (path / MANIFEST).exists():
        return path
    return next((found for found in (standing(path / "model"), *checkpoints(path)) if found.is_dir()), path)


class _ModelFolder(Folder):
    """The folder of a model or a training checkpoint."""

    def model_config(self) -> tuple[ButterflyConfig, StoredDtype]:
        """The model in config.json, and how its weights are stored."""
        values = self.json("config.json")
        self.check_format("config.json", values)
        unknown = sorted(values.keys() - {"format", "version", "dtype", "model", "extra"})
        if unknown:
            raise ValueError(f"{self.path}: config.json has an unknown field {unknown[0]!r}")
        if values.get("dtype") not in ("float32", "bfloat16", "int8") or not isinstance(
            values.get("model"), dict
        ):
            raise ValueError(f"{self.path}: config.json must give the model and its dtype")
        try:
            return ButterflyConfig.from_dict(values["model"]), cast(StoredDtype, values["dtype"])
        except ValueError as failure:
            raise ValueError(f"{self.path}: {failure}") from None

    def weights(self, dtype: StoredDtype) -> Iterator[tuple[str, Tensor]]:
        """The parameters by name, float32."""
        waiting: dict[str, Tensor] = {}  # codes or scales whose other half is still to come
        for name, tensor in self.tensors("model"):
            if dtype != "int8" or (tensor.ndim == 1 and not name.endswith(_SCALE)):
                yield name, tensor.float()
                continue
            base = name.removesuffix(_SCALE)
            if base not in waiting:
                waiting[base] = tensor
                continue
            other = waiting.pop(base)
            codes, scale = (other, tensor) if name.endswith(_SCALE) else (tensor, other)
            if codes.dtype != torch.int8 or codes.ndim != 2 or scale.shape != codes.shape[:1]:
                raise ValueError(
                    f"{self.path}: {base!r:.80} is {codes.dtype} {tuple(codes.shape)} with scales "
                    f"{tuple(scale.shape)}: no int8 matrix"
                )
            yield base, dequantise(codes, scale)
        if waiting:
            raise ValueError(f"{self.path}: {min(waiting)!r:.80} lacks its int8 codes or its scales")
