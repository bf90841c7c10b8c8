"""Variants of benchmarks/recall_ablation.py: other strides, other architectures, trained and asked alike."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.layers import Layer
from butterfly_llm.twins import FullAttention
from conftest import benchmark

NANO = ButterflyConfig(
    hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64, carry_size=8,
    num_local_layers=1, num_passes=2, num_levels=3, num_refine_layers=1, chunk_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return benchmark("recall_ablation")


@pytest.mark.parametrize(
    ("strides", "wanted"),
    [
        ("powers", [1, 2, 4, 1, 2, 4]),
        ("previous", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_strides_are_those_of_the_butterfly_layers(
    ablation: ModuleType, strides: str, wanted: list[int]
) -> None:
    model = ablation.builder("butterfly", strides, 0)(NANO)
    assert [route.stride for route in model.routes] == [1, *wanted, 1]


def test_random_strides_follow_the_seed(ablation: ModuleType) -> None:
    first, again, other = (ablation.STRIDES["random"](2, 5, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len(first) == 10 and min(first) >= 1 and max(first) < 32


def rows(chunks: int = 8) -> list[Any]:
    """q, k and v (1, N, H, D) of two heads in chunks of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 16 * chunks, 2, 16, generator=generator) for _ in range(3)]


def test_each_head_reads_at_its_own_stride(ablation: ModuleType) -> None:
    config = dataclasses.replace(NANO, num_heads=2, num_kv_heads=2, head_dim=16)
    layer, plain = ablation.StrideForEachHead(config, True), Layer(config, True)
    q, k, v = rows()
    y = layer.attend(q, k, v, 2, "torch")
    # Three levels and two heads: the second head reads one level beyond the first, here at levels 1 and 2.
    for head, stride in enumerate((2, 4)):
        torch.testing.assert_close(y[:, :, head], plain.attend(q, k, v, stride, "torch")[:, :, head])
    assert ablation.StrideForEachHead(config, True).attend(q, k, v, 4, "torch").shape == q.shape


@pytest.mark.parametrize(
    ("attends", "distances"),
    [
        ("partner and before", [1, 4, 5]),
        ("two partners", [1, 4, 8]),
    ],
)
def test_other_chunks_are_read_beside_the_partner(
    ablation: ModuleType, attends: str, distances: list[int]
) -> None:
    config = dataclasses.replace(NANO, num_heads=2, num_kv_heads=2, head_dim=16)
    layer, plain = ablation.ATTENDS[attends](config, True), Layer(config, True)
    q, k, v = (x[:, :-5].requires_grad_() for x in rows(12))
    y = layer.attend(q, k, v, 4, "torch")
    assert y.shape == q.shape
    # No partner yet: the chunk before only.
    torch.testing.assert_close(y[:, :64], plain.attend(q, k, v, 1, "torch")[:, :64])
    gradient = torch.autograd.grad(y[0, 9 * 16 + 3].sum(), v)[0][0].abs().sum((1, 2))
    chunks = {i for distance in distances for i in range((9 - distance) * 16, (10 - distance) * 16)}
    assert set(gradient.nonzero()[:, 0].tolist()) == chunks | set(range(9 * 16, 9 * 16 + 4))


def test_near_partners_are_local_chunks(ablation: ModuleType) -> None:
    config = dataclasses.replace(NANO, num_heads=2, num_kv_heads=2, head_dim=16)
    local = Layer(dataclasses.replace(config, local_chunks=2), True)
    q, k, v = rows()
    for attends in ("partner and before", "two partners"):
        y = ablation.ATTENDS[attends](config, True).attend(q, k, v, 1, "torch")
        torch.testing.assert_close(y, local.attend(q, k, v, 1, "torch"))


def test_other_kinds_of_layers_keep_their_local_chunks(ablation: ModuleType) -> None:
    config = dataclasses.replace(NANO, local_chunks=2, local_every=2)
    model = ablation.builder("butterfly", "powers", 0, "heads", True)(config)
    assert [layer.local for layer in model.layers] == [0, 2] * 4


@pytest.mark.parametrize("attends", ["heads", "two partners"])
def test_only_butterfly_layers_read_otherwise(ablation: ModuleType, attends: str) -> None:
    model = ablation.builder("butterfly", "powers", 0, attends)(NANO)
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [Layer, *[ablation.ATTENDS[attends]] * 6, Layer]
    ids = torch.randint(256, (2, 100), generator=torch.Generator().manual_seed(0))
    assert model.loss(ids[:, :-1], ids[:, 1:]).isfinite()


@pytest.mark.parametrize(
    ("twin", "attends"), [("butterfly", "partner"), ("butterfly", "two partners"), ("full", "partner")]
)
def test_taps_mix_in_the_characters_just_before(ablation: ModuleType, twin: str, attends: str) -> None:
    plain = ablation.builder(twin, "powers", 0, attends)(NANO)
    model = ablation.builder(twin, "powers", 0, attends, True)(NANO)
    assert model.num_parameters() == plain.num_parameters() + 8 * 3 * 32
    assert all(
        isinstance(layer, type(other)) for layer, other in zip(model.layers, plain.layers, strict=True)
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    layer, generator = model.layers[0], torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 32, generator=generator)
    asked = {"memory": None, "angles": None, "stride": 1, "backend": "torch"}
    torch.testing.assert_close(layer(x, **asked), plain.layers[0](x, **asked))  # they begin at zero
    with torch.no_grad():
        layer.taps[:32] = 1.0
        layer.attention.out.weight.normal_(generator=generator)
    x = x.requires_grad_()
    # Past the chunk and the one before it, only by way of the taps.
    gradient = torch.autograd.grad(layer(x, **asked)[0, 32].sum(), x)[0][0].abs().sum(1)
    first = 0 if twin == "full" else 15
    assert gradient.nonzero()[0].item() == first and gradient[33:].sum() == 0


def test_latest_is_behind_where_the_last_characters_stood_before(ablation: ModuleType) -> None:
    texts = [b"abcabxabcab" + b"\0" * 9, bytes(torch.randint(3, (20,)).tolist())]
    found = ablation.latest(ablation.hashes(torch.tensor([list(text) for text in texts]), 2), 2)
    for text, row in zip(texts, found.tolist(), strict=True):
        for i, at in enumerate(row):
            earlier = text.rfind(text[i - 1 : i + 1], 0, i) if i else -1
            assert at == (earlier + 2 if earlier >= 0 else -1), (text, i)


def test_a_layer_that_looks_reads_behind_where_the_text_stood_before(ablation: ModuleType) -> None:
    plain = ablation.builder("butterfly", "powers", 0)(NANO)
    model = ablation.builder("butterfly", "powers", 0, looks=(4,))(NANO)
    assert model.num_parameters() == plain.num_parameters() + 4 * 32 * 32 + 32
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer, ablation.Lookup)] == [4]
    nn.init.normal_(plain.head.weight)
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.arange(200).repeat(2)[None]  # all that stood before stood 200 characters before
    layer, x = model.layers[4], torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(0))
    asked = {"memory": torch.zeros(1, 400, 8), "angles": None, "stride": 1, "backend": "torch"}
    model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(model(ids), plain(ids))  # the maps begin at zero
    with torch.no_grad():
        for look in layer.looks:
            look.weight.normal_(generator=torch.Generator().manual_seed(1))
    x = x.requires_grad_()
    gradient = torch.autograd.grad(layer(x, **asked)[0, 330].sum(), x)[0][0].abs().sum(1)
    far = gradient[: 330 - 32].nonzero()[:, 0].tolist()
    assert far == [131, 135]  # behind, and four further on; the rest is its own chunk and the one before
    gradient = torch.autograd.grad(layer(x, **asked)[0, 150].sum(), x)[0][0].abs().sum(1)
    assert gradient[: 150 - 32].sum() == 0  # nothing stood before


def test_a_variant_is_a_table_of_settings(ablation: ModuleType) -> None:
    assert ablation.settings("plain") == ("plain", {}, {})
    assert ablation.settings("told:ngram_orders=[2, 3],twin='full',train.seed=3,train.steps=1") == (
        "told", {"ngram_orders": [2, 3], "twin": "full"}, {"seed": 3, "steps": 1}
    )  # fmt: skip


def test_variants_are_trained_and_asked(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.bin").write_bytes(b"all of it is text that says a little and repeats it\n" * 60)
    (tmp_path / "val.bin").write_bytes(b"and this is held out, which says other things anew\n" * 60)
    sizes = ["--length", "512", "--width", "64", "--steps", "1", "--chars", "512", "--windows", "1"]
    variants = ["previous:strides='previous',train.log_every=1", "full attention:twin='full'"]
    monkeypatch.setattr(
        sys, "argv", ["x", str(tmp_path), *variants, *sizes, "--save", str(tmp_path / "rows")]
    )
    trained = []

    def train(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        trained.append(result.model)
        return result

    original = ablation.train
    monkeypatch.setattr(ablation, "train", train)
    ablation.main()
    assert {route.stride for route in trained[0].routes} == {1} and type(trained[1]) is FullAttention
    assert all(model.config.num_contexts == 0 for model in trained)  # what a variant does not ask for
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["previous", "full attention"]
    assert rows[0]["chars_per_second"] > 0 and rows[1]["chars_per_second"] is None  # nothing was logged
    for row in rows:
        assert [place["stop"] for place in row["by_position"]] == [128, 512]
        mean = sum(b["bits_per_char"] * (b["stop"] - b["start"]) for b in row["by_position"]) / 512
        assert mean == pytest.approx(row["bits_per_char"], abs=0.1)
        assert row["chars"] == 512 and [
            (each["distractors"], each["reworded"]) for each in row["recall"]
        ] == [(0, False), (15, False), (15, True)]
    assert abs(rows[0]["parameters"] / rows[1]["parameters"] - 1) < 0.02


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("x:strides='sideways'", "a butterfly has one of powers, "),
        ("x:strides='random',twin='full'", "a butterfly has one of powers, "),
        ("x:taps=true,twin='mamba2'", "no taps for mamba2"),
        ("x:looks=[3],twin='full'", "no looks for full"),
        ("x:twin='mamba2',ngram_orders=[3]", "unknown twin 'mamba2+n-grams': there are "),
        ("x:looks=[99]", "no looks [99]: there are layers 0 to 13"),
        ("x:attends='all'", "a butterfly has one of partner, heads, partner and before"),
        ("x:ngram_orders=[3, 2]", "ngram_orders must be rising whole numbers from 1 to 63, not [3, 2]"),
        ("x:ngram_orders=[3", "Unclosed array"),
        ("x:twin='mamba2'", "pip install 'butterfly-llm[peers]'"),
    ],
)
def test_what_no_variant_is_is_one_line(
    ablation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variant: str,
    said: str,
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"text\n" * 900)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), variant])
    with pytest.raises(SystemExit, match="2"):
        ablation.main()
    assert said in capsys.readouterr().err.splitlines()[-1]
