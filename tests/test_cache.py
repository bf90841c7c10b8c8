"""Forked states, and rings in fewer bits: what is shared, what it costs, and that the text stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from butterfly_llm.cache import Cache, cache_nbytes, routes_of
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.rings import QuantisedRing
from butterfly_llm.state import load_state, save_state
from conftest import chunk_error, random_model

NGRAMS = {"ngram_orders": (1, 2, 3), "ngram_slots": 4096}
VARIANTS = {
    "micro": {},
    "grouped, no carry": {"num_kv_heads": 1, "carry_size": 0},
    "xor_causal, extra levels": {"routing": "xor_causal", "num_extra_levels": 2},
    "local chunks": {"local_chunks": 3, "num_kv_heads": 1},
    "local chunks in every second layer": {"local_chunks": 3, "local_every": 2},
    "n-grams": NGRAMS,
    "n-grams and words": NGRAMS | {"ngram_words": 2, "ngram_ranks": 3},
}
L = 16
PAST = [1, L - 1, L, 5 * L, 9 * L + 3, 25 * L]


def text(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Of seven letters, so that n-grams come back."""
    return torch.randint(7, (batch, length), generator=torch.Generator().manual_seed(seed))


def go_on(model: Butterfly, cache: Cache, seed: int) -> list[torch.Tensor]:
    """Steps, a long text, steps, a short text: the logits of each."""
    ids = text(130, seed, cache.batch_size)
    logits = [model.step(ids[:, i], cache) for i in range(18)]
    logits.append(model.prefill(ids[:, 18:90], cache))
    logits += [model.step(ids[:, i], cache) for i in range(90, 92)]
    logits.append(model.prefill(ids[:, 92:95], cache))
    logits.append(model.prefill(ids[:, 95:120], cache))
    return logits + [model.step(ids[:, i], cache) for i in range(120, 130)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("past", PAST)
def test_forks_go_on_bit_by_bit_each_for_itself(variant: str, past: int) -> None:
    model = random_model(ButterflyConfig.preset("micro", **VARIANTS[variant]))
    cache = model.new_cache()
    model.prefill(text(past), cache)
    alone = [cache.clone() for _ in range(2)]
    forks = cache.fork(2)
    assert all(torch.equal(fork.logits, cache.logits) for fork in forks)
    for seed, (own, fork) in enumerate(zip(alone, forks, strict=True), 1):
        for expected, actual in zip(go_on(model, own, seed), go_on(model, fork, seed), strict=True):
            assert torch.equal(expected, actual)
    with pytest.raises(ValueError, match="was forked and cannot go on"):
        model.step(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="was forked and cannot go on"):
        model.prefill(text(3), cache)


@pytest.mark.parametrize(
    ("dtype", "pause", "changes"),
    [
        (torch.float32, 2 * L, {}),
        (torch.bfloat16, 7, {}),
        (torch.int8, 7, NGRAMS),
        (torch.int8, 2 * L, {}),
        (torch.float32, 2 * L - 2, {"local_chunks": 3}),  # the second fork stands at the end of a chunk
        (torch.int8, 2 * L, {"local_chunks": 2}),
        (torch.int8, 2 * L, {"local_chunks": 3, "local_every": 2}),
        (torch.float32, 3, NGRAMS),
    ],
)
def test_forks_of_forks_copies_and_batches(dtype: torch.dtype, pause: int, changes: dict[str, Any]) -> None:
    model = random_model(ButterflyConfig.preset("micro", **changes))
    cache = model.new_cache(2, dtype=dtype)
    model.prefill(text(130, batch=2), cache)
    first, _ = cache.fork(2)
    twin = first.clone()
    for i in range(pause):
        for stream in (first, twin):
            model.step(text(pause, 5, 2)[:, i], stream)
    second, third = first.fork(2)
    copy = third.clone()
    wholes = third.gathered(), twin.gathered()
    expected = go_on(model, twin, 9)
    assert all(torch.equal(a, b) for a, b in zip(expected, go_on(model, second, 9), strict=True))
    go_on(model, third, 10)
    assert all(torch.equal(a, b) for a, b in zip(expected, go_on(model, copy, 9), strict=True))
    if dtype == torch.float32:  # a product over a strided ring rounds otherwise than one over a window
        for whole in wholes:
            for a, b in zip(expected, go_on(model, whole, 9), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, NGRAMS])
def test_a_fork_holds_only_what_it_adds(changes: dict[str, Any]) -> None:
    model = random_model(ButterflyConfig.preset("micro", **changes))
    cache = model.new_cache()
    assert cache.nbytes == cache_nbytes(model.config)
    told = 0 if cache.ngrams is None else cache.ngrams.nbytes
    model.prefill(text(300), cache)
    forks = cache.fork(8)
    assert [fork.held_nbytes for fork in forks] == [0] * 8
    assert {fork.keys[3].data_ptr() for fork in forks} == {forks[0].keys[3].data_ptr()}
    slot = sum(x.nbytes // x.shape[-3] for x in cache.tensors())  # a chunk in every ring
    held = []
    for fork in forks:
        for i in range(L):
            model.step(text(L, 3)[:, i], fork)
        held.append(fork.held_nbytes)
    assert held == [3 * slot + told] * 8  # the chunk in progress and its partner, and the one finished
    model.prefill(text(2000, 4), forks[0])
    assert forks[0].held_nbytes == forks[0].nbytes <= cache.nbytes + slot
    with pytest.raises(ValueError, match="count must be at least 1"):
        cache.fork(0)


@pytest.mark.parametrize("every", [1, 2])
def test_local_chunks_cost_slots_for_keys_and_values_alone(every: int) -> None:
    """And those only where they are read."""
    model = random_model(ButterflyConfig.preset("micro", local_chunks=2, local_every=every))
    model.prefill(text(300), cache := model.new_cache())
    assert cache.nbytes == cache_nbytes(model.config)
    (fork,) = cache.fork(1)
    model.prefill(text(2000, 4), fork)
    assert fork.held_nbytes == fork.nbytes
    eight = model.new_cache(dtype=torch.int8)
    for route, whole, near, few in zip(
        model.routes, cache.windows(), fork.windows(), eight.windows(), strict=True
    ):
        local = 2 if every == 1 or route.index % 2 else 0
        slots = 1 + local + (route.stride > local)
        assert whole[0].shape[-3] == whole[1].shape[-3] == max(route.stride, local) + 1
        assert [x.shape[-3] for x in (*near[:2], *few[:2])] == [slots] * 4
        for carry, count in ((whole[2], route.stride + 1), (near[2], 2), (few[2], 2)):
            assert carry is None or carry.shape[-3] == count


@pytest.mark.parametrize("changes", [{}, {"local_chunks": 2}, {"local_chunks": 3, "local_every": 2}, NGRAMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_saved_fork_is_a_state_of_its_own(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    model = random_model(ButterflyConfig.preset("micro", **changes))
    cache = model.new_cache(dtype=dtype)
    model.prefill(text(300), cache)
    fork, other = cache.fork(2)
    go_on(model, other, 7)
    for stop in (0, 5, 40):
        save_state(fork, tmp_path / "state", model=model)
        resumed = load_state(tmp_path / "state", model)
        twin = fork.clone()
        for expected, actual in zip(go_on(model, twin, 1), go_on(model, resumed, 1), strict=True):
            assert torch.equal(expected, actual), stop
        model.prefill(text(17), fork)


@pytest.mark.parametrize(("heads", "local", "every"), [(0, 0, 1), (4, 0, 1), (4, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.int8, 0.03)])
def test_rings_in_fewer_bits_move_the_logits_little(
    dtype: torch.dtype, bound: float, heads: int, local: int, every: int
) -> None:
    near = {"local_chunks": local, "local_every": every}
    model = random_model(ButterflyConfig.preset("micro", num_kv_heads=1, carry_heads=heads, **near))
    exact, small = model.new_cache(), model.new_cache(dtype=dtype)
    assert small.dtype == dtype
    ids = text(300)
    model.prefill(ids, exact), model.prefill(ids, small)
    logits = [torch.stack([model.step(ids[:, i], cache) for i in range(100)], 1) for cache in (exact, small)]
    error = chunk_error(logits[1], logits[0], L)
    assert 1e-4 < error < bound


@pytest.mark.parametrize("changes", [{"carry_heads": 0}, {}, {"local_chunks": 2, **NGRAMS}])
def test_8_bit_rings_are_saved_and_resumed_bit_by_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(ButterflyConfig.preset("micro", **changes))
    for past in (L, 4 * L + 5, 500):
        cache = model.new_cache(2, dtype=torch.int8)
        model.prefill(text(past, batch=2), cache)
        save_state(cache, tmp_path / "state", model=model)
        resumed = load_state(tmp_path / "state", model)
        assert resumed.dtype == torch.int8
        expected = go_on(model, cache, 1)
        assert all(torch.equal(a, b) for a, b in zip(expected, go_on(model, resumed, 1), strict=True)), past


def test_8_bit_codes_are_within_half_a_step() -> None:
    ring = QuantisedRing(torch.zeros(1, 2, 2, 4, 8), stride=4)
    chunks = torch.randn(1, 2, 7, 4, 8) * torch.logspace(-9, 3, 4)[:, None]
    chunks[:, :, 5, 2] = 0
    ring.write(0, chunks)
    back = ring.read([3, 4, 5, 6])
    steps = chunks[:, :, 3:].abs().amax(-1, keepdim=True) / 127
    assert ((back - chunks[:, :, 3:]).abs() <= steps / 2 * 1.001).all()
    assert torch.equal(ring.read([6]), chunks[:, :, 6:])  # in progress: not quantised
    assert not torch.equal(back[:, :, :1], chunks[:, :, 3:4])


def test_scores_of_the_carry_do_not_drown_its_values_in_8_bits() -> None:
    """Scores grow large, values are of size one: a common scale would lose the values."""
    config = ButterflyConfig.preset("micro", carry_heads=4, num_passes=1)
    cache = Cache.new(config, 1, torch.int8, "cpu")
    assert cache.paged is not None
    ring = next(carry for *_, carry in cache.paged if carry is not None)
    chunks = torch.randn(1, 2, L, config.carry_width)
    chunks[..., :4] *= 100
    ring.write(0, chunks)
    back = ring.read([0])
    assert (back - chunks[:, :1])[..., 4:].abs().max() < 0.03 < (back - chunks[:, :1])[..., :4].abs().max()
    assert torch.equal(ring.clone().read([0]), back)


def test_grouped_heads_and_fewer_bits_shrink_the_state() -> None:
    shape = {
        "num_passes": 3, "num_levels": 13, "num_extra_levels": 6,
        "ngram_orders": (), "ngram_words": 0, "ngram_ranks": 1,
    }  # fmt: skip
    full = ButterflyConfig.preset("full", **shape)
    grouped = ButterflyConfig.preset("full", **shape, num_kv_heads=3)
    row = 2 * 12 * 64 + 192 + 4  # 192 values and 4 scores of the carry
    sizes = {config.num_kv_heads: cache_nbytes(config, 1, torch.bfloat16) for config in (full, grouped)}
    assert 0.29 < sizes[3] / sizes[12] < 0.34  # a quarter of keys and values, all of the carry
    eight = cache_nbytes(full, 1, torch.int8)
    assert eight / sizes[12] == pytest.approx((row + 4 * 26) / (2 * row), rel=1e-3)
    micro = ButterflyConfig.preset("micro")
    cache = Cache.new(micro, 1, torch.int8, "cpu")
    windows = sum(x.nbytes for x in cache.tensors())
    slots = sum(route.stride + 1 for route in routes_of(micro)), sum(r.stride for r in routes_of(micro))
    assert cache.nbytes - windows == pytest.approx(
        cache_nbytes(micro, 1, torch.int8) * slots[1] / slots[0], rel=0.05
    )
