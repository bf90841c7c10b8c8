"""What the model promises: causality, reach, and one answer from forward, prefill and step."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from butterfly_llm import memory
from butterfly_llm.cache import Cache, cache_nbytes, prefill_slice, routes_of
from butterfly_llm.config import PRESETS, ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import Backend
from butterfly_llm.routing import partner_of, reach
from conftest import phrases, random_model

MICRO = ButterflyConfig.preset("micro")
CHUNK = MICRO.chunk_size
VARIANTS = {
    "micro": MICRO,
    "no carry": dataclasses.replace(MICRO, carry_size=0),
    "grouped, gated": dataclasses.replace(MICRO, num_kv_heads=1, feed_forward="swiglu", rope_theta=None),
    "xor_causal": dataclasses.replace(MICRO, routing="xor_causal"),
    "gated carry": dataclasses.replace(MICRO, carry_heads=0),
    "extra levels": dataclasses.replace(MICRO, num_extra_levels=2),
    "local chunks": dataclasses.replace(MICRO, local_chunks=2, num_kv_heads=1),
    "local chunks in every second layer": dataclasses.replace(MICRO, local_chunks=3, local_every=2),
    "n-grams": dataclasses.replace(MICRO, ngram_orders=(1, 2, 5), ngram_slots=4096),
    "n-grams and words": dataclasses.replace(MICRO, ngram_orders=(1, 2), ngram_words=2, ngram_ranks=3),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str) -> None:
    with torch.device("meta"):
        model = Butterfly(ButterflyConfig.preset(name))
    millions = {"full": 396.7, "small": 45.5, "tiny": 3.30, "micro": 0.379}[name]
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_a_character_leaves_earlier_logits_bit_identical(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    ids = phrases(300)
    with torch.no_grad():
        before = model(ids)
        for t in (0, 1, 15, 16, 17, 100, 255, 299):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 256
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


def test_streams_never_hear_the_future() -> None:
    """Two streams that differ from character 150 on agree bit by bit before it, however they are fed."""
    model = random_model(MICRO)
    a = torch.randint(0, 256, (1, 200))
    b = torch.cat([a[:, :150], torch.randint(0, 256, (1, 50))], 1)
    caches = [model.new_cache(), model.new_cache()]
    for t in range(150):
        assert torch.equal(model.step(a[:, t], caches[0]), model.step(b[:, t], caches[1]))
    whole = [model.prefill(x[:, :150], model.new_cache()) for x in (a, b)]
    assert torch.equal(*whole)


@pytest.mark.parametrize("routing", ["shift", "xor_causal"])
@pytest.mark.parametrize("carry_size", [0, 16])
def test_gradient_reaches_exactly_the_chunks_of_the_schedule(routing: str, carry_size: int) -> None:
    """From the last character of every chunk to every chunk: non-zero if the schedule connects them."""
    config = dataclasses.replace(
        MICRO, routing=routing, carry_size=carry_size, num_passes=1, num_levels=4,
        num_local_layers=0, num_refine_layers=0, chunk_size=8,
    )  # fmt: skip
    model = random_model(config).double()
    model.compute_dtype = torch.float64
    num_chunks = 20
    embedded = model._embed(torch.randint(0, 256, (1, num_chunks * 8))).detach().requires_grad_()
    model._embed = lambda *_: embedded  # type: ignore[method-assign]
    logits = model(torch.zeros(1, num_chunks * 8, dtype=torch.long))
    heard = reach(num_chunks, [r.stride for r in routes_of(config)], config.routing)
    for chunk in range(num_chunks):
        (gradient,) = torch.autograd.grad(logits[0, chunk * 8 + 7].sum(), embedded, retain_graph=True)
        norms = gradient[0].view(num_chunks, -1).norm(dim=1)
        expected = torch.tensor([bool(heard[chunk] >> d & 1) for d in range(num_chunks)])
        assert torch.equal(norms > 0, expected), chunk


def test_one_pass_of_shifts_hears_every_earlier_chunk() -> None:
    strides = [1 << level for level in range(4)]
    assert reach(16, strides) == [(1 << (c + 1)) - 1 for c in range(16)]


def test_no_gradient_flows_backwards_in_time() -> None:
    model = random_model(MICRO)
    embedded = model._embed(torch.randint(0, 256, (1, 200))).detach().requires_grad_()
    model._embed = lambda *_: embedded  # type: ignore[method-assign]
    logits = model(torch.zeros(1, 200, dtype=torch.long))
    for t in (0, 15, 16, 17, 99, 198):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embedded, retain_graph=True)
        assert gradient[0, : t + 1].abs().sum() > 0
        assert not gradient[0, t + 1 :].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_chars", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 255, 256, 257])
def test_forward_prefill_and_step_agree(variant: str, num_chars: int) -> None:
    """256 characters are 16 chunks: the longest ring (stride 4, 5 slots) has gone round three times."""
    model = random_model(VARIANTS[variant])
    ids = phrases(num_chars, 2).to(torch.uint8)
    with torch.no_grad():
        expected = model(ids)
    cache = model.new_cache(2)
    stepped = torch.stack([model.step(ids[:, t], cache) for t in range(num_chars)], 1)
    assert (stepped - expected).abs().max() < 1e-4
    assert cache.position == num_chars
    cache = model.new_cache(1)  # a single stream on the CPU steps in NumPy
    single = torch.stack([model.step(ids[:1, t], cache) for t in range(num_chars)], 1)
    assert (single - expected[:1]).abs().max() < 1e-4
    chooser = random.Random(num_chars)
    for slice_chars in (1, CHUNK, 40, 2048) if num_chars < 40 else (40, 2048):
        model.prefill_slice = slice_chars
        cache = model.new_cache(2)
        while cache.position < num_chars:
            end = min(num_chars, cache.position + chooser.randint(1, 90))
            logits = model.prefill(ids[:, cache.position : end], cache)
            assert (logits - expected[:, end - 1]).abs().max() < 1e-4
    mixed = model.new_cache(2)
    model.prefill(ids[:, : max(1, num_chars // 2)], mixed)
    for t in range(max(1, num_chars // 2), num_chars):
        assert (model.step(ids[:, t], mixed) - expected[:, t]).abs().max() < 1e-4


@pytest.mark.slow
def test_forward_prefill_and_step_agree_with_53_layers_and_chunks_of_128() -> None:
    """The `small` schedule (width 32) over 2^16 + 1 characters: every stride up to 256 has its partner."""
    config = ButterflyConfig.preset(
        "small", hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=32, carry_size=8
    )
    model = random_model(config)
    num_chars = 65_537
    ids = torch.randint(0, 256, (1, num_chars))
    with torch.no_grad():
        hidden = model.hidden(ids)
        expected = {t: model.head(hidden[:, t]) for t in (126, 127, 128, 65_535, 65_536)}
    for slices in ((127, 1, 1, 65_407, 1), (128, 65_408, 1)):
        cache = model.new_cache()
        for count in slices:
            logits = model.prefill(ids[:, cache.position : cache.position + count], cache)
            if cache.position - 1 in expected:
                assert (logits - expected[cache.position - 1]).abs().max() < 1e-4
    cache = model.new_cache()
    model.prefill(ids[:, :65_533], cache)
    for t in range(65_533, 65_537):
        logits = model.step(ids[:, t], cache)
    assert (logits - expected[65_536]).abs().max() < 1e-4


def test_the_stream_runs_on_and_its_state_does_not_grow() -> None:
    model = random_model(MICRO)
    cache = model.new_cache()
    size = cache.nbytes
    assert size == cache_nbytes(MICRO)
    addresses = [x.data_ptr() for x in cache.tensors()]
    for _ in range(20):
        logits = model.prefill(torch.randint(0, 256, (1, 500)), cache)
    assert cache.position == 10_000
    assert cache.nbytes == size and [x.data_ptr() for x in cache.tensors()] == addresses
    assert torch.isfinite(logits).all()


def test_state_size_of_small_is_what_the_design_says() -> None:
    config = ButterflyConfig.preset("small")
    chunks = sum(r.stride + 1 for r in routes_of(config) if r.stage == "butterfly")
    assert chunks == 2600 and chunks * config.chunk_size == 332_800


def test_steps_follow_the_weights_wherever_they_go() -> None:
    """The NumPy step reads views of the parameters: training, casting and saving must not leave it behind."""
    model = random_model(MICRO)
    ids = torch.randint(0, 256, (1, 40))

    def step_equals_forward() -> bool:
        cache = model.new_cache()
        stepped = torch.stack([model.step(ids[:, t], cache) for t in range(40)], 1)
        with torch.no_grad():
            return bool((stepped - model(ids)).abs().max() < 1e-4)

    assert step_equals_forward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert step_equals_forward()
    model.double().float()
    assert step_equals_forward()
    model.load_state_dict(before)
    assert step_equals_forward()


def test_a_cloned_cache_goes_its_own_way() -> None:
    model = random_model(MICRO)
    cache = model.new_cache()
    model.prefill(torch.randint(0, 256, (1, 70)), cache)
    fork = cache.clone()
    one, two = torch.tensor([65]), torch.tensor([66])
    model.step(one, fork)
    first = model.step(two, cache)
    again = model.new_cache()
    assert fork.position == cache.position == 71
    assert not torch.equal(fork.keys[0], cache.keys[0])
    assert again.position == 0 and torch.isfinite(first).all()


def test_bidirectional_model_hears_both_sides_and_cannot_stream() -> None:
    model = random_model(dataclasses.replace(MICRO, routing="xor"))
    ids = torch.randint(0, 256, (1, 128))
    changed = ids.clone()
    changed[0, 127] ^= 1
    with torch.no_grad():
        assert not torch.equal(model(ids)[:, 0], model(changed)[:, 0])
    with pytest.raises(ValueError, match="cannot stream"):
        model.new_cache()


def test_gradient_checkpointing_changes_nothing() -> None:
    model = random_model(MICRO)
    ids = torch.randint(0, 256, (2, 101))
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_of_small_is_trained() -> None:
    """53 layers, with chunks of 4 so that the longest stride has partners in a short text."""
    model = random_model(
        ButterflyConfig.preset(
            "small", hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32,
            intermediate_size=32, carry_size=8, chunk_size=4,
        )
    )  # fmt: skip
    ids = torch.randint(0, 256, (1, 1201))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        (torch.zeros(5, dtype=torch.long), "batch, characters"),
        (torch.zeros(1, 5), "uint8, int32 or int64"),
    ],
)
def test_bad_ids_are_named(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Butterfly(MICRO)(ids)


def test_a_state_that_cannot_fit_is_refused_before_allocating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("butterfly_llm.memory.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs .* KB on cpu, 1\.0 KB are free: use fewer streams"):
        Cache.new(MICRO, 1, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "must divide"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_levels": 2.5}, "whole number"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"routing": "ring"}, "routing must be"),
        ({"num_extra_levels": 9}, "raise num_passes"),
        ({"local_chunks": 65}, "local_chunks 65 must be at most 64, 0 for routing xor"),
        ({"local_chunks": 2, "local_every": 0}, "local_every must be at least 1, not 0"),
        ({"local_every": 2}, "local_every 2 must be 1 without local_chunks"),
        ({"local_chunks": 1, "local_every": 99}, "local_every 99 is above the model's"),
    ],
)
def test_configs_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ButterflyConfig(**change)  # type: ignore[arg-type]


def test_a_config_from_before_a_field_existed_has_its_default() -> None:
    values = dataclasses.replace(MICRO, local_chunks=2).to_dict()
    assert values.pop("local_every") == 1
    assert ButterflyConfig.from_dict(values) == dataclasses.replace(MICRO, local_chunks=2)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'small'"):
        ButterflyConfig.preset("smal")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        ButterflyConfig.from_dict({"hiden_size": 3})


def test_partner_slot_is_next_to_the_own_slot() -> None:
    """`step` relies on it: with stride + 1 slots, c - stride lies one slot after c."""
    for stride in (1, 2, 4, 256):
        for chunk in range(stride, 1000):
            assert partner_of(chunk, stride, "shift") % (stride + 1) == (chunk + 1) % (stride + 1)


@pytest.mark.parametrize("local", [1, 2, 3])
@pytest.mark.parametrize("routing", ["shift", "xor_causal"])
def test_local_chunks_are_heard_in_every_layer(routing: str, local: int) -> None:
    """One layer of stride 8: the last character of a chunk hears its own, W before it, and the partner."""
    config = dataclasses.replace(
        MICRO, routing=routing, carry_size=0, num_passes=1, num_levels=4, num_local_layers=0,
        num_refine_layers=0, chunk_size=4, local_chunks=local,
    )  # fmt: skip
    layer = random_model(config).layers[3]
    x = torch.randn(1, 20 * 4, config.hidden_size, requires_grad=True)
    y = layer(x, None, None, 8, "torch")
    for chunk in range(20):
        (gradient,) = torch.autograd.grad(y[0, chunk * 4 + 3].sum(), x, retain_graph=True)
        partner = partner_of(chunk, 8, routing)
        expected = {*range(max(0, chunk - local), chunk + 1), *([partner] if partner >= 0 else [])}
        assert set(gradient[0].view(20, -1).norm(dim=1).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layers_without_local_chunks_are_those_of_a_plain_model(backend: Backend) -> None:
    """Bit for bit: values and gradients in the layers between those that read local chunks."""
    config = dataclasses.replace(MICRO, local_chunks=2, local_every=3)
    near, plain = (random_model(c) for c in (config, MICRO))
    every = random_model(dataclasses.replace(MICRO, local_chunks=2))
    assert [config.local_of(i) for i in range(8)] == [0, 0, 2, 0, 0, 2, 0, 0]
    x = torch.randn(1, 4 * CHUNK, config.hidden_size)
    memory = torch.randn(1, 4 * CHUNK, config.carry_width)
    for i in (0, 1, 2, 5):
        results = []
        for model in (near, every if config.local_of(i) else plain):
            inputs = x.clone().requires_grad_(), memory.clone().requires_grad_()
            y = model.layers[i](inputs[0], inputs[1] if i else None, None, model.routes[i].stride, backend)
            y.square().sum().backward()
            parameters = model.layers[i].parameters()
            results.append([y, inputs[0].grad, inputs[1].grad if i else y, *(p.grad for p in parameters)])
        assert all(map(torch.equal, *results)), i


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("slice_chars", [128, 64, 80, 37])
def test_slices_through_one_call_of_the_attention_agree(variant: str, slice_chars: int) -> None:
    """What fused kernels do, here with the reference: partners from the rings are set before the slice."""
    model = random_model(VARIANTS[variant])
    model.prefill_slice = slice_chars
    ids = phrases(411, 2, seed=2)
    logits, rings = [], []
    for backend in ("torch", "reference"):
        model.backend = backend
        cache = model.new_cache(2)
        logits.append([model.prefill(part, cache) for part in ids.split([390, 1, 20], 1)])
        (fork,) = cache.fork(1)
        logits[-1].append(model.prefill(ids[:, :200], fork))
        rings.append(dict(fork.filled()))
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert all((rings[0][name] - rings[1][name]).abs().max() < 1e-4 for name in rings[0])


def test_the_slice_follows_the_device_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    full = ButterflyConfig.preset("full")
    sizes = []
    for free in (1, 20, 80, 800):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free * 10**9)
        sizes.append(prefill_slice(full, 1, 2, "cuda:0"))
        assert prefill_slice(full, 1, 2, "cpu") == 2048
    assert sizes == [2048, 32_768, 131_072, 262_144]
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert prefill_slice(full, 8, 2, "cuda") == 2048


def test_what_is_only_read_is_read_in_slices_as_wide_as_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    from butterfly_llm import model as module

    rows = []

    def sliced(layer: object, x: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(rest[4])  # after memory, angles, stride and backend
        return x

    monkeypatch.setattr(module, "recomputed_layer", sliced)
    model = Butterfly(MICRO)
    ids = torch.zeros(2, 50_000, dtype=torch.uint8)
    for slice_chars in (64, 40_000, 100_000):
        model.prefill_slice = slice_chars
        with torch.no_grad():
            model.hidden(ids[:, :20_000] if slice_chars == 100_000 else ids)
    assert set(rows[: len(model.routes)]) == {16_384} and set(rows[len(model.routes) :]) == {40_000}
    assert len(rows) == 2 * len(model.routes)  # the last text is not longer than a slice


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_reads_in_slices_what_it_reads_at_once(dtype: torch.dtype) -> None:
    model = random_model(MICRO).cuda()
    model.compute_dtype = dtype
    ids = torch.randint(256, (1, 411), generator=torch.Generator().manual_seed(2)).cuda()
    with torch.no_grad():
        expected = model(ids)[:, -1]
    for slice_chars in (128, 64, 37):
        model.prefill_slice = slice_chars
        cache = model.new_cache()
        for part in ids.split([390, 1, 20], 1):
            logits = model.prefill(part, cache)
        error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < (1e-4 if dtype == torch.float32 else 0.05)
