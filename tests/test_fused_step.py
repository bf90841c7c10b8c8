"""The step in six launches a layer against the step of the model; on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.fused_step import FusedStep
from butterfly_llm.ops.triton_rows import rows_product
from conftest import DEVICE, kernels, random_model

SHAPES = {
    "gated carry": {"carry_heads": 0},
    "grouped, extra levels, gated carry": {
        "num_kv_heads": 1, "num_extra_levels": 1, "carry_heads": 0, "carry_size": 24,
    },
    "carry with heads": {"carry_heads": 2, "num_extra_levels": 1},
    "long pass": {"carry_heads": 2, "num_passes": 2, "num_long_passes": 1, "num_long_levels": 4},
    "local chunks": {"carry_heads": 2, "num_passes": 1, "local_chunks": 2},
    "local chunks in every second layer": {"carry_heads": 2, "local_chunks": 3, "local_every": 2},
    "carry with three heads": {"carry_heads": 3, "carry_size": 24},
    "xor_causal, no carry": {"routing": "xor_causal", "carry_size": 0, "rope_theta": None},
    "n-grams": {"ngram_orders": (1, 2, 3), "ngram_slots": 4096},
    "n-grams and words": {"ngram_orders": (1, 2), "ngram_words": 2, "ngram_ranks": 3, "ngram_slots": 4096},
}  # fmt: skip


def text(length: int, batch: int) -> torch.Tensor:
    ids = torch.randint(7, (batch, length), generator=torch.Generator().manual_seed(batch))
    return ids.to(DEVICE)


@kernels
@pytest.mark.parametrize(
    ("shape", "batch", "past"),
    list(zip(SHAPES, (1, 3, 2, 2, 2, 2, 1, 2, 3, 2), (79, 14, 50, 90, 30, 94, 65, 47, 60, 61), strict=True)),
)
def test_the_fused_step_is_the_step(shape: str, batch: int, past: int) -> None:
    model = random_model(ButterflyConfig.preset("micro", **{"num_passes": 1, **SHAPES[shape]})).to(DEVICE)
    model.backend = "torch"
    eager, cache = model.new_cache(batch), model.new_cache(batch)
    for each in (eager, cache):
        model.prefill(text(past, batch), each)
    step = FusedStep(model)
    ids = text(20, batch)
    positions = torch.full((batch,), past, device=DEVICE)
    for i in range(2):
        expected = model.step_each(ids[:, i], positions, eager)
        torch.testing.assert_close(step(ids[:, i], positions, cache), expected, rtol=0, atol=1e-4)
        positions += 1
    cache.position = eager.position = past + 2
    for (name, a), (_, b) in zip(eager.filled(), cache.filled(), strict=True):
        if name != "logits":
            assert (a - b).abs().max() < 1e-4, name


@kernels
@pytest.mark.parametrize("batch", [1, 5, 17])
def test_sizes_that_are_no_powers_of_two(batch: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(batch, 48, device=DEVICE), torch.randn(40, 48, device=DEVICE)
    residual = torch.randn(batch, 40, device=DEVICE)
    torch.testing.assert_close(
        rows_product(x, weight, kind="add", residual=residual), x @ weight.t() + residual, rtol=0, atol=1e-4
    )
    gain = torch.rand(48, device=DEVICE)
    normed = torch.nn.functional.rms_norm(x, (48,), gain, 1e-6)
    torch.testing.assert_close(
        rows_product(x, weight, gain=gain, kind="relu2"),
        (normed @ weight.t()).relu() ** 2,
        rtol=1e-4,
        atol=1e-4,
    )


def test_gated_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward 'swiglu' has no kernel"):
        FusedStep(random_model(ButterflyConfig.preset("micro", feed_forward="swiglu")))
