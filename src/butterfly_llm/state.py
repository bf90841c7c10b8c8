"""The state of a stream on disk: read a text once, go on from it any number of times.

save_state(cache, "state/", model=model)
cache = load_state("state/", model)          # goes on as if it had never stopped, bit by bit

state.json                        position, streams, types, the model's config and sha256, the last text
rings-00001-of-00009.safetensors  what is filled of the rings, and the logits for the next character
MANIFEST.json                     size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from butterfly_llm.cache import Cache
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.folder import FORMAT_VERSION, STATE, Folder, json_bytes, shards, standing, write_folder
from butterfly_llm.model import Butterfly

_SHARD_BYTES = 64 * 2**20
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8)}
_FIELDS = {
    "format": str, "version": int, "position": int, "streams": int, "dtype": str, "recent": str,
    "model_sha256": str, "config": dict,
}  # fmt: skip
_OTHER_MODEL = "read the text again, or give the model it was read with"


def save_state(cache: Cache, path: str | Path, *, model: Butterfly) -> None:
    """Write the streams of `cache`, which `model` has read, to the folder `path`; a state there is replaced.

    The folder appears whole or not at all. Only what is filled of the rings is written.
    ValueError for a cache of another config, and for a folder that holds something else than a state.
    """
    if cache.config != model.config:
        raise ValueError(f"save_state: the cache is of another model than the one given ({model.config})")
    header = {
        "format": STATE,
        "version": FORMAT_VERSION,
        "position": cache.position,
        "streams": cache.batch_size,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "recent": cache.recent.decode("latin-1"),
        "model_sha256": fingerprint(model),
        "config": cache.config.to_dict(),
    }

    def files() -> Iterator[tuple[str, bytes]]:
        yield "state.json", json_bytes(header)
        yield from shards("rings", cache.filled(), _SHARD_BYTES)

    write_folder(Path(path), files(), STATE)


def load_state(path: str | Path, model: Butterfly) -> Cache:
    """The streams in a folder, on the device of `model`.

    To go on bit by bit, the model must also compute in the type and on the kind of device it read with.
    FileNotFoundError where there is nothing; ValueError, one line, for a damaged folder, the state of another
    model (both are named), and a state that does not fit into memory.
    """
    folder = Folder(standing(Path(path)), STATE)
    header = _header(folder)
    config = model.config.to_dict()
    # What a config says since a state was written, it then said by its default.
    saved = ButterflyConfig().to_dict() | header["config"]
    for key in sorted(config.keys() | saved.keys()):
        there, here = saved.get(key), config.get(key)
        if there != here:
            raise ValueError(
                f"{path}: the state of a model with {key if key in config else repr(key)} = {there!r:.80}, "
                f"this one has {here!r}; {_OTHER_MODEL}"
            )
    digest = fingerprint(model)
    if header["model_sha256"] != digest:
        raise ValueError(
            f"{path}: the state of the model {header['model_sha256'][:12]}, this one is {digest[:12]} "
            f"(sha256 of the weights); {_OTHER_MODEL}"
        )
    cache = model.new_cache(header["streams"], dtype=_DTYPES[header["dtype"]])
    cache.seek(header["position"])
    cache.recent = header["recent"].encode("latin-1")
    expected = dict(cache.filled())
    size = sum(tensor.nbytes for tensor in expected.values())
    folder.check_sizes("rings", size, size)
    for name, tensor in folder.tensors("rings"):
        if name == "logits" and tensor.dtype == torch.float32:
            cache.logits = tensor.to(cache.keys[0].device)
            expected[name] = cache.logits.new_empty(cache.batch_size, model.config.vocab_size)
        if name not in expected:
            raise ValueError(f"{path}: tensor {name!r:.80} belongs to no ring of the model")
        target = expected.pop(name)
        if (tensor.shape, tensor.dtype) != (target.shape, target.dtype):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {target.dtype} "
                f"{tuple(target.shape)}"
            )
        if name != "logits":
            target.copy_(tensor)
    if cache.position and cache.logits is None:
        expected["logits"] = cache.keys[0]
    if expected:
        raise ValueError(f"{path}: tensor {min(expected)} is missing")
    return cache


def fingerprint(model: Butterfly) -> str:
    """sha256 over the names and float32 values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _header(folder: Folder) -> dict[str, Any]:
    """state.json, every field of its type."""
    header = folder.json("state.json")
    folder.check_format("state.json", header)
    types = {key: type(value) for key, value in header.items()}
    if types != _FIELDS:
        wrong = min(key for key in types.keys() | _FIELDS.keys() if types.get(key) != _FIELDS.get(key))
        raise ValueError(f"{folder.path}: state.json: the field {wrong!r} is missing, unknown or ill-typed")
    if header["position"] < 0 or header["position"] >= 2**62 or header["streams"] < 1:
        raise ValueError(
            f"{folder.path}: state.json: position {header['position']} and {header['streams']} streams "
            "cannot be"
        )
    if not re.fullmatch("[0-9a-f]{64}", header["model_sha256"]):
        raise ValueError(f"{folder.path}: state.json: the field 'model_sha256' is no sha256")
    if header["dtype"] not in _DTYPES:
        raise ValueError(
            f"{folder.path}: state.json: dtype {header['dtype']!r} is not {' or '.join(_DTYPES)}"
        )
    if not header["recent"].isascii() and max(header["recent"]) > "\xff":
        raise ValueError(f"{folder.path}: state.json: the field 'recent' is not Latin-1")
    return header
