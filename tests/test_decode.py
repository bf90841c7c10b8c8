"""The step whose places follow from a tensor of positions, eager on the CPU and as a graph on a GPU."""

from __future__ import annotations

import pytest
import torch

from butterfly_llm.cache import Cache
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.decode import Decoder
from butterfly_llm.generate import generate
from butterfly_llm.model import Butterfly
from conftest import random_model

VARIANTS = {
    "micro": {},
    "grouped, no carry": {"num_kv_heads": 1, "carry_size": 0},
    "xor_causal, extra levels": {"routing": "xor_causal", "num_extra_levels": 2},
    "long pass": {"num_long_passes": 1, "num_long_levels": 5},
    "local chunks": {"local_chunks": 2},
    "local chunks in every second layer": {"local_chunks": 3, "local_every": 2},
    "n-grams": {"ngram_orders": (1, 2, 3), "ngram_slots": 4096},
    "n-grams and words": {"ngram_orders": (1, 2), "ngram_words": 2, "ngram_ranks": 3, "ngram_slots": 4096},
}
gpu = pytest.param("cuda", marks=pytest.mark.gpu)


def text(length: int, batch: int, device: str, seed: int = 0) -> torch.Tensor:
    """Of seven letters, so that n-grams come back."""
    ids = torch.randint(7, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


def tensors(cache: Cache) -> list[torch.Tensor]:
    told = {} if cache.ngrams is None else cache.ngrams.tensors()
    return [*cache.tensors(), *told.values()]


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("past", "batch"), [(1, 1), (39, 2), (200, 1)])
def test_a_decoder_steps_as_the_model_does(variant: str, past: int, batch: int, device: str) -> None:
    model = random_model(ButterflyConfig.preset("micro", **VARIANTS[variant])).to(device)
    eager = model.new_cache(batch)
    model.prefill(text(past, batch, device), eager)
    cache = eager.clone()
    decoder = Decoder(model, cache)
    ids = text(70, batch, device, 1)
    for i in range(33):
        expected = model.step(ids[:, i], eager)
        torch.testing.assert_close(decoder.step(ids[:, i]), expected, rtol=0, atol=1e-4)
    # Read on in between: the decoder finds its place again.
    for each in (eager, cache):
        model.prefill(ids[:, 33:60], each)
    for i in range(60, 70):
        expected = model.step(ids[:, i], eager)
        torch.testing.assert_close(decoder.step(ids[:, i]), expected, rtol=0, atol=1e-4)
    assert cache.position == eager.position and decoder.positions.tolist() == [cache.position] * batch
    for (name, a), (_, b) in zip(eager.filled(), cache.filled(), strict=True):
        assert (a - b).abs().max() < 1e-4, name


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("variant", ["micro", "n-grams"])
def test_streams_may_stand_apart(variant: str, device: str) -> None:
    model = random_model(ButterflyConfig.preset("micro", **VARIANTS[variant])).to(device)
    lengths = [5, 64, 203]
    alone = [model.new_cache() for _ in lengths]
    rings = model.new_cache(len(lengths))
    decoder = Decoder(model, rings)
    for row, (length, cache) in enumerate(zip(lengths, alone, strict=True)):
        model.prefill(text(length, 1, device, row), cache)
        for whole, own in zip(tensors(rings), tensors(cache), strict=True):
            whole[row] = own[0]
    ids = text(40, len(lengths), device, 9)
    positions = torch.tensor(lengths, device=device)
    for i in range(20):
        logits = decoder.step(ids[:, i], positions + i if i % 7 == 0 else decoder.positions)
        for row, cache in enumerate(alone):
            expected = model.step(ids[row : row + 1, i], cache)
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_one_graph_is_replayed_in_bfloat16(fused: bool) -> None:
    model = random_model(ButterflyConfig.preset("micro")).cuda()
    model.compute_dtype = torch.bfloat16
    eager, cache = model.new_cache(), model.new_cache()
    for each in (eager, cache):
        model.prefill(text(100, 1, "cuda"), each)
    decoder = Decoder(model, cache, fused=fused)
    ids = text(60, 1, "cuda", 1)
    for i in range(60):
        expected = model.step(ids[:, i], eager)
        error = (decoder.step(ids[:, i]) - expected).square().mean().sqrt()
        assert error < 0.05 * expected.square().mean().sqrt()


def test_generate_takes_the_step_of_a_decoder() -> None:
    model: Butterfly = random_model(ButterflyConfig.preset("micro"))
    expected = list(generate(model, b"def main(", max_chars=40))
    cache = model.new_cache()
    decoder = Decoder(model, cache)
    steps = []
    drawn = generate(
        model, b"def main(", max_chars=40, cache=cache, step=lambda ids: steps.append(1) or decoder.step(ids)
    )
    assert list(drawn) == expected and len(steps) == 40


def test_a_decoder_refuses_what_it_cannot_step() -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    with pytest.raises(ValueError, match="steps whole rings"):
        Decoder(model, model.new_cache(dtype=torch.int8))
    with pytest.raises(ValueError, match=r"ids \(2,\) must be \(1,\)"):
        Decoder(model, model.new_cache()).step(torch.tensor([1, 2]))
