"""Other architectures with our parameters and our interface: what they can hear, and that they train."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.evaluate import Document, evaluate
from butterfly_llm.model import Butterfly
from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.recall import evaluate_recall
from butterfly_llm.twins import (
    RECURRENT,
    ROPE_THETA,
    FullAttention,
    FullLayer,
    _two_warps_on_hopper,
    kernel_error,
    twin,
)
from conftest import random_model

MICRO = ButterflyConfig.preset("micro")
HERE = ("butterfly", "window", "full")  # the others need CUDA
needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention (extra peers)"
)


def filled(name: str, **changes: int) -> Butterfly:
    """A twin whose zero-initialised matrices carry signal too."""
    torch.manual_seed(0)
    model = twin(name, dataclasses.replace(MICRO, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("preset", ["micro", "tiny", "small", "full"])
@pytest.mark.parametrize("name", [*HERE, *(pytest.param(n, marks=needs_fla) for n in RECURRENT)])
def test_a_twin_has_the_parameters_and_depth_of_the_model(name: str, preset: str) -> None:
    config = ButterflyConfig.preset(preset)
    with torch.device("meta"):
        ours, theirs = Butterfly(config), twin(name, config)
    assert theirs.num_parameters() == pytest.approx(ours.num_parameters(), rel=0.02)
    assert len(theirs.layers) == config.num_layers
    assert theirs.config.chunk_size == config.chunk_size


@pytest.mark.parametrize("name", ["window+n-grams", "full+n-grams"])
def test_a_twin_is_told_of_n_grams_where_its_name_says_so(name: str) -> None:
    told = dataclasses.replace(MICRO, ngram_orders=(2, 3), ngram_slots=1024)
    model, plain = twin(name, told), twin(name.removesuffix("+n-grams"), told)
    assert type(model) is type(plain) and plain.ngram is None and plain.config.ngram_orders == ()
    assert model.ngram is not None and model.config.ngram_orders == (2, 3)
    assert model.config.rope_theta == plain.config.rope_theta
    ours = Butterfly(told).num_parameters()
    assert model.num_parameters() == pytest.approx(ours, rel=0.02)
    with pytest.raises(ValueError, match="the model has no ngram_orders and no ngram_words"):
        twin(name, dataclasses.replace(MICRO, ngram_orders=()))


def test_a_twin_reads_no_local_chunks() -> None:
    config = twin("full", dataclasses.replace(MICRO, local_chunks=2, local_every=2)).config
    assert (config.local_chunks, config.local_every) == (0, 1)


@pytest.mark.parametrize("name", HERE[1:])
def test_a_twin_hears_what_its_name_says(name: str) -> None:
    model, chunk = filled(name), MICRO.chunk_size
    ids = torch.randint(0, 256, (1, 12 * chunk), generator=torch.Generator().manual_seed(1))
    embedded = model._embed(ids).detach().requires_grad_()
    model._embed = lambda *_: embedded  # type: ignore[method-assign]
    asked = 10 * chunk + 3
    model(ids)[0, asked].sum().backward()
    assert embedded.grad is not None
    heard = embedded.grad[0].abs().sum(-1) > 0  # (N,)
    assert not heard[asked + 1 :].any()
    reach = MICRO.num_layers if name == "window" else 10  # chunks: one more a layer, or everything
    assert heard[(10 - reach) * chunk : asked + 1].all() and not heard[: (10 - reach) * chunk].any()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_full_attention_is_a_softmax_over_all_earlier_characters(kv_heads: int) -> None:
    model = filled("full", num_kv_heads=kv_heads)
    layer = cast(FullLayer, model.layers[0])
    ids = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(2))
    x = layer.attention_norm(model._embed(ids))
    attention = layer.attention
    q, k, v = (
        z.unflatten(-1, (-1, 32)) for z in attention.qkv(x).split([64, 32 * kv_heads, 32 * kv_heads], -1)
    )
    table = rope_table(torch.arange(37), 32, ROPE_THETA, torch.float32)
    q, k = rotate(attention.q_norm(q), *table), rotate(attention.k_norm(k), *table)
    k, v = (z.repeat_interleave(2 // kv_heads, 2) for z in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    heard: list[Tensor] = []
    layer.finish = lambda self, x, y, backend: heard.append(y) or x  # type: ignore[func-returns-value]
    model.hidden(ids)
    assert torch.allclose(heard[0].view(2, 37, 2, 32), expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_full_attention_written_one_by_one_agrees_with_forward(kv_heads: int) -> None:
    model = cast(FullAttention, filled("full", num_kv_heads=kv_heads))
    ids = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(4))
    cache = model.whole_cache(37, 2)
    written = torch.stack([model.write(column, i, cache) for i, column in enumerate(ids.unbind(1))], 1)
    assert torch.allclose(written, model(ids), atol=1e-4)
    assert cache.nbytes == 8 * MICRO.num_layers * 2 * kv_heads * 37 * MICRO.head_dim


@pytest.mark.parametrize("name", HERE[1:])
def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(3))
    gradients = []
    for recompute in (False, True):
        model = filled(name)
        model.gradient_checkpointing = recompute
        model.recompute = dataclasses.replace(model.recompute, slice_rows=64)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None
        assert torch.allclose(plain, recomputed, atol=1e-5)


def test_a_twin_is_evaluated_as_the_model_is_and_has_no_streams() -> None:
    text = Document("text", bytes(range(32, 127)) * 3)
    result = evaluate(filled("full"), [text], context=64, compressors=False)
    assert result.chars == 285 and 4 < result.bits_per_char < 16
    recall = evaluate_recall(filled("window"), text.data * 3, length=512, windows=1)
    assert recall.by_hops and all(count == 1 for _, count in recall.by_hops.values())
    with pytest.raises(ValueError, match="no streams"):
        filled("full").new_cache()
    assert random_model(MICRO).new_cache().position == 0


def test_unknown_names_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown twin 'mamba': there are butterfly, window, full, gated"):
        twin("mamba", MICRO)
    with pytest.raises(ValueError, match="full has no kernels to check: there are gated-deltanet, mamba2"):
        kernel_error("full", "cpu", torch.float32)
    for module in ("fla", "fla.layers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'butterfly-llm\[peers\]'"):
        twin("mamba2", MICRO)


@pytest.mark.parametrize("broken", [True, False])
def test_kernels_that_triton_miscompiles_run_with_two_warps(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    def kernel() -> SimpleNamespace:
        configs = [SimpleNamespace(num_warps=w, num_stages=n) for w in (2, 4) for n in (2, 3)]
        return SimpleNamespace(fn=SimpleNamespace(configs=configs))

    names = ("fla", "fla.ops", "fla.ops.common", "fla.ops.common.chunk_o", "fla.ops.gated_delta_rule",
             "fla.ops.gated_delta_rule.wy_fast")  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    chunk, delta = modules[names[3]], modules[names[5]]
    versions = {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": not broken}
    for module, more in (
        (chunk, {"chunk_bwd_kernel_dqkwg": kernel(), **versions}),
        (delta, {"prepare_wy_repr_bwd_kernel": kernel()}),
    ):
        vars(module).update(more)
    for _ in range(2):
        _two_warps_on_hopper()
    found = [vars(chunk)["chunk_bwd_kernel_dqkwg"], vars(delta)["prepare_wy_repr_bwd_kernel"]]
    expected = [(2, 2), (2, 3)] if broken else [(2, 2), (2, 3), (4, 2), (4, 3)]
    assert [[(c.num_warps, c.num_stages) for c in each.fn.configs] for each in found] == [expected] * 2
    assert vars(chunk)["TRITON_ABOVE_3_7_1"]


@needs_fla
@pytest.mark.gpu
@pytest.mark.parametrize("name", RECURRENT)
def test_the_kernels_of_a_recurrent_twin_have_right_gradients(name: str) -> None:
    errors = kernel_error(name, "cuda", torch.bfloat16)
    assert max(errors.values()) < 0.05, errors
