"""The step in one launch against the step of the model; on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.decode import Decoder
from butterfly_llm.persistent_step import PersistentStep, tiling, unsupported
from conftest import DEVICE, INTERPRETED, kernels, random_model

SHAPES = {
    "gated carry": {"carry_heads": 0},
    "grouped, extra levels, gated carry": {
        "num_kv_heads": 1, "num_extra_levels": 1, "carry_heads": 0, "carry_size": 24,
    },
    "carry with heads": {"carry_heads": 2, "num_extra_levels": 1},
    "long pass": {"carry_heads": 2, "num_passes": 2, "num_long_passes": 1, "num_long_levels": 4},
    "carry with three heads": {"carry_heads": 3, "carry_size": 24},
    "xor_causal, gated, no carry": {
        "routing": "xor_causal", "feed_forward": "swiglu", "carry_size": 0, "rope_theta": None,
    },
    "n-grams": {"ngram_orders": (1, 2, 3), "ngram_slots": 4096},
    "n-grams and words": {"ngram_orders": (1, 2), "ngram_words": 2, "ngram_ranks": 3, "ngram_slots": 4096},
    "local chunks": {"local_chunks": 11, "num_kv_heads": 1},
    "local chunks in every second layer": {"local_chunks": 3, "local_every": 2},
    "local chunks, no carry": {"local_chunks": 2, "carry_size": 0},
}  # fmt: skip
SMALLEST = {
    "hidden_size": 32, "head_dim": 16, "intermediate_size": 48, "carry_size": 8, "num_local_layers": 0,
    "num_passes": 1, "num_levels": 2, "num_refine_layers": 0,
}  # fmt: skip


def text(length: int) -> torch.Tensor:
    return torch.randint(7, (1, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@kernels
@pytest.mark.parametrize(
    ("shape", "past"), list(zip(SHAPES, (79, 14, 50, 30, 65, 47, 60, 61, 200, 92, 21), strict=True))
)
def test_the_persistent_step_is_the_step(shape: str, past: int) -> None:
    model = random_model(ButterflyConfig.preset("micro", **{"num_passes": 1, **SHAPES[shape]})).to(DEVICE)
    model.backend = "torch"
    ids = text(past + 2)
    eager, cache = model.new_cache(), model.new_cache()
    for each in (eager, cache):
        model.prefill(ids[:, :past], each)
    step = PersistentStep(model, cache)
    positions = torch.full((1,), past, device=DEVICE)
    for i in range(2):
        expected = model.step_each(ids[:, past + i], positions, eager)
        torch.testing.assert_close(step(ids[:, past + i], positions), expected, rtol=0, atol=1e-4)
        positions += 1
    cache.position = eager.position = past + 2
    for (name, a), (_, b) in zip(eager.filled(), cache.filled(), strict=True):
        if name != "logits":
            assert (a - b).abs().max() < 1e-4, name


@kernels
def test_programs_share_the_work() -> None:
    """Where programs run in turn, a launch takes what they hand each other at least one hop further."""
    model = random_model(ButterflyConfig.preset("micro", **SMALLEST)).to(DEVICE)
    model.backend = "torch"
    ids = text(42)
    eager, cache = model.new_cache(), model.new_cache()
    for each in (eager, cache):
        model.prefill(ids[:, :-1], each)
    positions = torch.full((1,), 41, device=DEVICE)
    expected = model.step_each(ids[:, -1], positions, eager)
    step = PersistentStep(model, cache, programs=5)
    if INTERPRETED:
        step.words.zero_()
    for _ in range(14 if INTERPRETED else 1):
        logits = step(ids[:, -1], positions)
        step.launch += 1  # the same set of words again
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for a, b in zip(eager.tensors(), cache.tensors(), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("small", {"carry_heads": 0}), ("full", {"carry_heads": 0}), ("small", {}), ("full", {}),
        ("small", {"local_chunks": 7, "local_every": 2}), ("full", {"local_chunks": 7}),
    ],
)  # fmt: skip
def test_a_graph_steps_over_chunks_and_repeats_to_the_bit(preset: str, changes: dict[str, int]) -> None:
    model = random_model(ButterflyConfig.preset(preset, **changes)).cuda()
    model.compute_dtype = torch.bfloat16
    ids = text(400)
    modules, *caches = (model.new_cache() for _ in range(3))
    for cache in (modules, *caches):
        model.prefill(ids[:, :200], cache)
    reference = Decoder(model, modules)
    one, again = (Decoder(model, cache, fused=True) for cache in caches)
    assert one.path == "one launch"
    for i in range(200, 400):
        expected, found = reference.step(ids[:, i]), one.step(ids[:, i])
        error = (found - expected).square().mean().sqrt()
        assert error < 0.05 * expected.square().mean().sqrt(), i
        assert torch.equal(again.step(ids[:, i]), found)


@pytest.mark.parametrize(
    ("rows", "programs", "warps"),
    [(1024, 64, 4), (256, 132, 4), (2304, 132, 8), (768, 96, 8), (3072, 48, 8), (48, 1, 4)],
)
def test_tiles_take_every_row(rows: int, programs: int, warps: int) -> None:
    size, count = tiling(rows, programs, warps)
    assert programs * size * count >= rows
    assert size & (size - 1) == 0 and count <= 4
    assert size * (count - 1) < max(rows / programs, warps)


def test_what_it_cannot_step_is_named() -> None:
    def reason(batch: int = 1, **changes: int) -> str | None:
        model = random_model(ButterflyConfig.preset("micro", **changes))
        return unsupported(model.config, model.new_cache(batch))

    assert reason() is None
    assert reason(2) == "it steps one stream, not 2"
    assert reason(intermediate_size=200) == "intermediate_size 200 is no multiple of 16"
    assert reason(local_chunks=1) is None
    assert reason(chunk_size=24) == "chunk_size 24 is no power of two"
    model = random_model(ButterflyConfig.preset("micro", carry_size=12))
    with pytest.raises(ValueError, match="persistent step: carry_size 12 is no multiple of 8"):
        PersistentStep(model, model.new_cache())
