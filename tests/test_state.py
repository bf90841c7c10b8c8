"""States on disk: a stream that was saved goes on bit by bit; of another model or damaged, it is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from butterfly_llm import load_state, memory, save_state
from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.folder import MANIFEST
from butterfly_llm.generate import generate, read
from butterfly_llm.model import Butterfly
from conftest import random_model

CONFIG = ButterflyConfig.preset("micro", num_kv_heads=1)
REACH = CONFIG.reach_chars


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Butterfly:
    return random_model(CONFIG)


@pytest.fixture
def folder(model: Butterfly, tmp_path: Path) -> Path:
    cache = model.new_cache()
    read(model, text(100), cache)
    save_state(cache, tmp_path / "state", model=model)
    return tmp_path / "state"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_chunks": 2},
        {"local_chunks": 3, "local_every": 2},
        {"ngram_orders": (1, 2), "ngram_slots": 256},
        {"ngram_orders": (1, 2), "ngram_slots": 256, "ngram_words": 2, "ngram_ranks": 3},
    ],
)
@pytest.mark.parametrize("length", [1, 15, 16, 100, 3 * REACH + 5])
def test_a_resumed_stream_goes_on_bit_by_bit(tmp_path: Path, length: int, changes: dict[str, Any]) -> None:
    model = random_model(dataclasses.replace(CONFIG, **changes))
    # Rules that look back make the text depend on what was read before the state was saved, too.
    sampling = SamplingConfig(seed=3, repetition_penalty=1.2, no_repeat_ngram=2)
    cache = model.new_cache()
    read(model, text(length), cache)
    save_state(cache, tmp_path / "state", model=model)
    resumed = load_state(tmp_path / "state", model)
    assert resumed.position == length
    assert torch.equal(resumed.logits, cache.logits)
    expected = list(generate(model, [], sampling=sampling, max_chars=40, cache=cache))
    assert list(generate(model, [], sampling=sampling, max_chars=40, cache=resumed)) == expected
    whole = model.new_cache()
    assert list(generate(model, text(length), sampling=sampling, max_chars=40, cache=whole)) == expected
    for a, b, c in zip(cache.filled(), resumed.filled(), whole.filled(), strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[1], c[1]), a[0]
    appended = model.prefill(text(77, seed=1), cache), model.prefill(text(77, seed=1), resumed)
    assert torch.equal(*appended)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_streams_in_either_type(model: Butterfly, tmp_path: Path, dtype: torch.dtype) -> None:
    cache = model.new_cache(2, dtype=dtype)
    model.prefill(text(60).expand(2, -1) ^ torch.tensor([[0], [1]]), cache)
    save_state(cache, tmp_path / "state", model=model)
    resumed = load_state(tmp_path / "state", model)
    assert resumed.keys[0].dtype == dtype
    ids = torch.tensor([65, 66])
    for _ in range(20):
        assert torch.equal(model.step(ids, cache), model.step(ids, resumed))


def test_only_what_is_filled_is_written(model: Butterfly, tmp_path: Path) -> None:
    sizes = []
    for length in (1, REACH, 2 * REACH, 3 * REACH):
        cache = model.new_cache()
        model.prefill(text(length), cache)
        save_state(cache, tmp_path / str(length), model=model)
        sizes.append(sum(p.stat().st_size for p in (tmp_path / str(length)).glob("*.safetensors")))
    assert sizes[0] < cache.nbytes / 2 < sizes[1]
    assert abs(sizes[2] - sizes[3]) < 200 and abs(sizes[3] - cache.nbytes) < 8192


def test_an_empty_state_is_one_too(model: Butterfly, tmp_path: Path) -> None:
    save_state(model.new_cache(), tmp_path / "state", model=model)
    resumed = load_state(tmp_path / "state", model)
    assert resumed.position == 0 and resumed.logits is None
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [], max_chars=1, cache=resumed)
    assert torch.equal(model.prefill(text(9), resumed), model.prefill(text(9), model.new_cache()))


def test_a_state_of_another_model_is_refused_with_both_named(model: Butterfly, folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"state: the state of a model with num_kv_heads = 1, this one has 2; "
    ):
        load_state(folder, random_model(dataclasses.replace(CONFIG, num_kv_heads=2)))
    other = random_model(CONFIG)
    with torch.no_grad():
        other.layers[3].attention.q_norm.weight[5] += 1e-6
    with pytest.raises(
        ValueError, match=r"state of the model [0-9a-f]{12}, this one is [0-9a-f]{12} .*; read the text again"
    ):
        load_state(folder, other)
    with pytest.raises(ValueError, match="of another model"):
        save_state(other.new_cache(), folder, model=random_model(ButterflyConfig.preset("micro")))


def test_the_fingerprint_is_of_the_values_alone(model: Butterfly, folder: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    again.step(torch.tensor([1]), again.new_cache())  # lays its matrices out anew
    assert load_state(folder, again).position == 100


def rewrite(folder: Path, name: str, data: bytes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).write_bytes(data)


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "state.json").read_text())
    rewrite(folder, "state.json", json.dumps(values | changes).encode())


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    rewrite(folder, path.name, safetensors.torch.save(tensors))


def drop_tensor(folder: Path, name: str) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    del tensors[name]
    rewrite(folder, path.name, safetensors.torch.save(tensors))
    index = json.loads((folder / "rings.safetensors.index.json").read_text())
    del index["weight_map"][name]
    rewrite(folder, "rings.safetensors.index.json", json.dumps(index).encode())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flipped": (lambda f: flip(next(f.glob("*.safetensors"))), r"rings-00001.* is damaged .its sha256"),
    "file missing": (lambda f: next(f.glob("*.safetensors")).unlink(), r"rings-00001\S+ is missing"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), "no saved state .MANIFEST.json is missing"),
    "another format": (lambda f: edit(f, format="x"), "state.json is not of a butterfly-llm saved state"),
    "field missing": (lambda f: rewrite(f, "state.json", b'{"format": "butterfly-llm-state", "version": 1}'),
        "the field 'config' is missing, unknown or ill-typed"),
    "field unknown": (lambda f: edit(f, code=1), "the field 'code' is missing, unknown or ill-typed"),
    "negative position": (lambda f: edit(f, position=-1), "position -1 and 1 streams cannot be"),
    "true is no number": (lambda f: edit(f, position=True), "the field 'position'"),
    "no streams": (lambda f: edit(f, streams=0), "and 0 streams cannot be"),
    "more streams": (lambda f: edit(f, streams=2), r"is torch.float32 \(1, .*, not torch.float32 \(2, "),
    "other type": (lambda f: edit(f, dtype="bfloat16"), "is torch.float32 .*, not torch.bfloat16"),
    "unknown type": (lambda f: edit(f, dtype="object"), "'object' is not float32 or bfloat16"),
    "shorter": (lambda f: edit(f, position=17), r"is torch.float32 .*, not torch.float32"),
    "not Latin-1": (lambda f: edit(f, recent="é€"), "'recent' is not Latin-1"),
    "ring missing": (lambda f: drop_tensor(f, "values.3"), "tensor values.3 is missing"),
    "logits missing": (lambda f: drop_tensor(f, "logits"), "tensor logits is missing"),
    "logits cut": (lambda f: edit_tensor(f, "logits", lambda x: x[:, :9]), r"logits is .*\(1, 9\), not"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line(model: Butterfly, folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_state(folder, model)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_ngrams_that_are_missing_or_of_another_size_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, ngram_orders=(1, 2), ngram_slots=256)
    model, path = random_model(config), tmp_path / "state"
    model.prefill(text(100), cache := model.new_cache())
    save_state(cache, path, model=model)
    with pytest.raises(ValueError, match=r"model with ngram_slots = 256, this one has 512; read the text"):
        load_state(path, random_model(dataclasses.replace(config, ngram_slots=512)))
    with pytest.raises(ValueError, match=r"model with ngram_orders = \[1, 2\], this one has \[1, 3\]; read"):
        load_state(path, random_model(dataclasses.replace(config, ngram_orders=(1, 3))))
    edit_tensor(path, "ngrams.entries", lambda x: x.float())
    with pytest.raises(ValueError, match=r"ngrams.entries is torch.float32 \(1, 2, 256\), not torch.int32"):
        load_state(path, model)
    drop_tensor(path, "ngrams.entries")
    with pytest.raises(ValueError, match=r"tensor ngrams.entries is missing"):
        load_state(path, model)


def test_models_and_states_do_not_replace_each_other(model: Butterfly, folder: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="holds something else than a saved state"):
        save_state(model.new_cache(), tmp_path / "model", model=model)
    with pytest.raises(ValueError, match="holds something else than a model"):
        save_model(model, folder)
    with pytest.raises(ValueError, match="not of a butterfly-llm saved state"):
        load_state(tmp_path / "model", model)
    with pytest.raises(ValueError, match="not of a butterfly-llm checkpoint"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such saved state"):
        load_state(tmp_path / "nowhere", model)


def test_an_interrupted_save_leaves_the_old_state(
    model: Butterfly, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("butterfly_llm.folder._write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(model.new_cache(), folder, model=model)
    assert load_state(folder, model).position == 100
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_state_that_does_not_fit_is_refused_before_it_is_read(
    model: Butterfly, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder, streams=10**9)
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 10**9)
    with pytest.raises(
        ValueError, match=r"state of 1000000000 stream.s. needs .*GB on cpu, 1\.0 GB are free"
    ):
        load_state(folder, model)


def test_a_state_from_before_a_field_was_added_is_taken(model: Butterfly, tmp_path: Path) -> None:
    cache = model.new_cache()
    read(model, text(20), cache)
    with pytest.MonkeyPatch.context() as patch:
        older = {key: value for key, value in CONFIG.to_dict().items() if not key.startswith("ngram_")}
        patch.setattr(ButterflyConfig, "to_dict", lambda config: older)
        save_state(cache, tmp_path / "state", model=model)
    assert load_state(tmp_path / "state", model).position == 20
