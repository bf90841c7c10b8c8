"""What a checkpoint promises: what was saved comes back, what is damaged is refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from butterfly_llm import folder as folders
from butterfly_llm import memory
from butterfly_llm.checkpoint import (
    MANIFEST,
    SHARD_BYTES,
    checkpoint_path,
    checkpoints,
    dequantise,
    estimate_model_bytes,
    load_pretrained,
    load_training,
    prune,
    quantise,
    save_model,
    save_training,
)
from butterfly_llm.config import ButterflyConfig
from conftest import random_model

CONFIG = ButterflyConfig.preset("micro", hidden_size=32, intermediate_size=64, num_passes=1, carry_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model(random_model(CONFIG), path, shard_bytes=50_000)
    return path


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and the manifest with it, as somebody who forges a checkpoint would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).write_bytes(data)


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    rewrite(folder, name, json.dumps(values).encode())


@pytest.mark.parametrize("orders", [(), (2, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_saved_is_loaded(tmp_path: Path, dtype: Any, orders: tuple[int, ...]) -> None:
    config = dataclasses.replace(CONFIG, ngram_orders=orders, ngram_slots=64)
    model = random_model(config)
    save_model(model, tmp_path / "model", dtype=dtype, extra={"note": "é"})
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.config == config
    for (name, before), after in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert after.dtype == torch.float32
        expected = before.detach()
        if before.ndim == 2 and dtype == "bfloat16":
            expected = expected.bfloat16().float()
        if before.ndim == 2 and dtype == "int8":
            expected = dequantise(*quantise(expected))
        assert torch.equal(expected, after), name


def test_int8_moves_no_value_by_more_than_half_a_step() -> None:
    matrix = torch.randn(64, 300) * torch.logspace(-6, 3, 64)[:, None]
    matrix[7] = 0
    codes, scale = quantise(matrix)
    assert codes.dtype == torch.int8 and scale.shape == (64,)
    error = (dequantise(codes, scale) - matrix).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert not error[7].any()


def test_files_stay_below_the_shard_size(tmp_path: Path) -> None:
    assert SHARD_BYTES < 16 * 2**20
    model = random_model(CONFIG)
    save_model(model, tmp_path / "model", shard_bytes=50_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) >= 4 * model.num_parameters() / 50_000 > 1
    largest = max(4 * p.numel() for p in model.parameters())
    for shard in shards:
        tensors = safetensors.torch.load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= max(50_000, largest)
    listed = json.loads((tmp_path / "model" / MANIFEST).read_text())["files"]
    assert {p.name for p in (tmp_path / "model").iterdir()} == {*listed, MANIFEST}


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def drop_tensor(folder: Path) -> None:
    """Take one tensor out, in file and index alike."""
    path = shard(folder)
    tensors = safetensors.torch.load_file(path)
    name = min(tensors)
    del tensors[name]
    rewrite(folder, path.name, safetensors.torch.save(tensors))
    edit_json(folder, "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))


def rename_in_index(folder: Path, value: Any) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][min(index["weight_map"])] = value

    edit_json(folder, "model.safetensors.index.json", change)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (
        lambda f: shard(f).unlink(),
        r"model-00001-of-\d+.safetensors is missing; fetch or copy",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), "no checkpoint .MANIFEST.json is missing"),
    "manifest damaged": (lambda f: (f / MANIFEST).write_text("{"), "MANIFEST.json is not JSON"),
    "foreign manifest": (lambda f: (f / MANIFEST).write_text("{}"), "not of a butterfly-llm checkpoint"),
    "manifest forged": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"sha256"', '"md5"')),
        "must give bytes and sha256 of",
    ),
    "truncated": (
        lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-9]),
        "cut off at .* bytes.*; fetch or copy",
    ),
    "bit flipped": (lambda f: flip(shard(f, 1)), "is damaged .its sha256.*; fetch or copy"),
    "config edited": (lambda f: flip(f / "config.json"), "config.json is damaged"),
    "newer version": (
        lambda f: edit_json(f, "config.json", lambda c: c.update(version=99)),
        "format version 99, this program reads 1",
    ),
    "unknown field": (
        lambda f: edit_json(f, "config.json", lambda c: c["model"].update(hiden_size=3)),
        "unknown field 'hiden_size' .did you mean 'hidden_size'",
    ),
    "unknown entry": (
        lambda f: edit_json(f, "config.json", lambda c: c.update(code="x")),
        "unknown field 'code'",
    ),
    "other width": (
        lambda f: edit_json(f, "config.json", lambda c: c["model"].update(intermediate_size=96)),
        r"makes layers\.\d+\.feed_forward\.\w+\.weight \([0-9, ]*96[0-9, ]*\), but the weights are "
        r"\([0-9, ]*64[0-9, ]*\)",
    ),
    "fewer layers": (
        lambda f: edit_json(f, "config.json", lambda c: c["model"].update(num_refine_layers=0)),
        "belongs to no parameter",
    ),
    "tensor missing": (drop_tensor, r"tensor \S+ of the model in config.json is missing"),
    "path out of the folder": (
        lambda f: rename_in_index(f, "../../secret.safetensors"),
        "names '../../secret.safetensors', which is not a plain file name",
    ),
    "absolute path": (lambda f: rename_in_index(f, "/etc/passwd"), "names '/etc/passwd'"),
    "no name": (lambda f: rename_in_index(f, 7), "names 7"),
    "file outside the manifest": (
        lambda f: rename_in_index(f, "model-9.safetensors"),
        "model-9.safetensors is not in MANIFEST.json",
    ),
    "file of another kind": (
        lambda f: rename_in_index(f, "config.json"),
        "names 'config.json', which is no model file",
    ),
    "pickle as shard": (
        lambda f: rewrite(f, shard(f).name, pickle.dumps({"x": 1})),
        "is a pickle, which can run code",
    ),
    "garbage as shard": (lambda f: rewrite(f, shard(f).name, b"\0" * 64), "is not safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_pickle_files_are_refused_unread(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"x": 1}))
    for name in ("model.pt", "model.pkl"):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            load_pretrained(tmp_path / name)


def test_int8_codes_without_scales_are_refused(tmp_path: Path) -> None:
    save_model(random_model(CONFIG), tmp_path / "m", dtype="int8")
    path = shard(tmp_path / "m")
    tensors = safetensors.torch.load_file(path)
    del tensors["head.weight.scale"]
    rewrite(tmp_path / "m", path.name, safetensors.torch.save(tensors))
    edit_json(
        tmp_path / "m", "model.safetensors.index.json", lambda i: i["weight_map"].pop("head.weight.scale")
    )
    with pytest.raises(ValueError, match=r"head\.weight' lacks its int8 codes or its scales"):
        load_pretrained(tmp_path / "m")


def test_missing_paths_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="holds something else than a model"):
        save_model(random_model(CONFIG), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_memory_is_checked_before_anything_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate_model_bytes(CONFIG) == 4 * random_model(CONFIG).num_parameters()
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    with pytest.raises(ValueError, match=r"needs \d.* on cpu, 1\.0 KB are free: use a smaller model"):
        load_pretrained(folder)
    save_training(random_model(CONFIG), folder.parent / "state", tensors=[], values={})
    with pytest.raises(ValueError, match=r"reading state needs \d.* on cpu, 1\.0 KB are free"):
        load_training(folder.parent / "state")


def test_an_interrupted_save_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_pretrained(folder)
    write, written = folders._write_file, []

    def fail_at_the_third(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr(folders, "_write_file", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        save_model(random_model(CONFIG, seed=1), folder)
    assert torch.equal(before.head.weight, load_pretrained(folder).head.weight)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_training_state_comes_back_and_is_a_model_too(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    tensors = {"random": torch.arange(9, dtype=torch.uint8), "optimizer.x": torch.randn(3, 5)}
    for step in (9, 10, 200):
        path = checkpoint_path(tmp_path, step)
        save_training(model, path, tensors=tensors.items(), values={"step": step})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000200", "step-000000010", "step-000000009"]
    state = load_training(checkpoints(tmp_path)[0])
    assert state.values == {"step": 200} and state.model_config == CONFIG
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[key], tensors[key]) for key in tensors)
    assert torch.equal(load_pretrained(tmp_path).head.weight, model.head.weight)  # the newest of the run

    (tmp_path / "checkpoints" / ".step-000000300-1.partial").mkdir()
    prune(tmp_path, keep=2)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000000010", "step-000000200"]

    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="without training state"):
        load_training(tmp_path / "model")


def test_killed_while_saving_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at some point of an endless series of saves: the newest one that is there is whole."""
    script = f"""
import itertools, torch
from butterfly_llm.checkpoint import *
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
model = Butterfly(ButterflyConfig(**{dataclasses.asdict(CONFIG)!r}))
for step in itertools.count():
    path = checkpoint_path({str(tmp_path)!r}, step)
    save_training(model, path, tensors=[("x", torch.full((1000,), step))], values={{"step": step}})
    prune({str(tmp_path)!r}, 2)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline().strip() != b"3":
        assert process.poll() is None
    time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = load_training(checkpoints(tmp_path)[0])
    assert state.values["step"] >= 3
    assert int(state.tensors["x"][0]) == state.values["step"]
