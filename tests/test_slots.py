"""Streams that take a step together: each writes what it writes alone, whoever joins or leaves."""

import random
import threading

import pytest
import torch

from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.engine import Engine, Finished, Job, Written
from butterfly_llm.generate import generate
from butterfly_llm.plot.attention import attention_map
from butterfly_llm.routing import partner_of
from butterfly_llm.slots import Separate, Slots, stepper_for
from conftest import random_model
from serving import until

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 4
STEPPERS = {"separate": Separate, "slots": lambda model: Slots(model, COUNT)}
CONFIGS = {
    "micro": {},
    "grouped": {"num_kv_heads": 1, "feed_forward": "swiglu"},
    "no carry": {"carry_size": 0, "rope_theta": None},
    "xor_causal": {"routing": "xor_causal"},
    "local chunks": {"local_chunks": 2},
    "local chunks in every second layer": {"local_chunks": 3, "local_every": 2},
    "n-grams": {"ngram_orders": (1, 2, 3), "ngram_slots": 4096},
    "n-grams and words": {"ngram_orders": (1, 2), "ngram_words": 2, "ngram_ranks": 3, "ngram_slots": 4096},
}


def model_of(name="micro"):
    model = random_model(ButterflyConfig.preset("micro", **CONFIGS[name])).eval()
    with torch.no_grad():
        model.head.weight *= 3
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


def alone_in(model, cache):
    """For each layer whether the last character read its own chunk only."""
    chunk, config = (cache.position - 1) // model.config.chunk_size, model.config
    return [
        partner_of(chunk, route.stride, config.routing) < 0 and not min(chunk, config.local_of(route.index))
        for route in model.routes
    ]


def check_that_each_steps_as_alone(model, stepper, tolerance=1e-4):
    """Streams join, pause and leave at random; what they compute is what a cache of one stream gives."""
    device, near = model.embed.weight.device, {"rtol": tolerance, "atol": tolerance}
    chance = random.Random(3)
    running, furthest = [], 0  # (cache, a cache of one stream alone)
    for _ in range(90):
        if len(running) < COUNT and chance.random() < 0.2:
            text = bytes(chance.randrange(7) for _ in range(chance.randrange(1, 120)))
            cache, alone = stepper.fresh(None, keep=False, reserved=0), model.new_cache()
            first = stepper.read(text, cache)
            torch.testing.assert_close(
                first, model.prefill(torch.tensor([list(text)], device=device), alone), **near
            )
            running.append((cache, alone))
        now = [each for each in running if chance.random() < 0.8]  # the others pause
        if now:
            characters = [chance.randrange(7) for _ in now]
            shares = [[] for _ in now] if chance.random() < 0.5 else None
            logits = stepper.step(characters, [cache for cache, _ in now], shares)
            expected = [
                model.step(torch.tensor([c], device=device), own)
                for c, (_, own) in zip(characters, now, strict=True)
            ]
            torch.testing.assert_close(logits, torch.cat(expected), **near)
            for (cache, _), share in zip(now, shares or [], strict=shares is not None):
                assert [one > 1 - 1e-5 for one in share] == alone_in(model, cache)
            for cache, alone in now:
                assert cache.position == alone.position
                furthest = max(furthest, cache.position)
                torch.testing.assert_close(cache.logits, alone.logits, **near)
        if running and chance.random() < 0.05:
            stepper.release(running.pop(chance.randrange(len(running)))[0])
    assert furthest > 80 + 16  # the longest ring went round


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_streams_at_any_positions_step_as_each_does_alone(stepper, config):
    model = model_of(config)
    check_that_each_steps_as_alone(model, STEPPERS[stepper](model))


@pytest.mark.gpu
def test_slots_on_a_gpu_step_as_each_does_alone():
    model = random_model(ButterflyConfig.preset("tiny")).eval().cuda()
    check_that_each_steps_as_alone(model, Slots(model, COUNT), 2e-3)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_shares_of_attention_are_those_of_the_map(model, stepper):
    stepper = STEPPERS[stepper](model)
    text = bytes(range(32, 102))
    other, cache = (stepper.fresh(None, keep=False, reserved=0) for _ in "ab")
    stepper.read(text[:9], other)
    stepper.read(text[:-1], cache)
    shares = [[], []]
    stepper.step([65, text[-1]], [other, cache], shares)
    ids = torch.tensor(list(text))
    size = model.config.chunk_size
    maps = [attention_map(model, ids, layer)[:, -1] for layer in range(model.config.num_layers)]  # (H, 2C)
    assert shares[1] == pytest.approx([rows[:, size:].sum(1).mean().item() for rows in maps], abs=1e-4)
    assert any(share < 1 for share in shares[1]) and shares[0] == pytest.approx([1] * len(maps))


@pytest.mark.parametrize("stepper", STEPPERS)
def test_joining_and_leaving_at_random_disturbs_nobody(model, stepper):
    """Streams begin and are cancelled at moments that nobody chose; contexts are read and forked between."""
    greedy = SamplingConfig(temperature=0)
    chance = random.Random(5)
    jobs = []
    for i in range(14):
        text = bytes(chance.randrange(32, 127) for _ in range(chance.randrange(1, 150)))
        jobs.append((text, chance.randrange(5, 60), i % 3 == 0))
    wrong, kept = [], []

    def watch(text, stream_events, done, leaves):
        def notify(event):
            stream_events.append(event)
            if isinstance(event, Written) and leaves and len(stream_events) > 8:
                streams[text].cancel()
            if isinstance(event, Finished):
                done.set()

        return notify

    with Engine(STEPPERS[stepper](model), slots=COUNT, contexts=1, slice_chars=16) as engine:
        done = threading.Event()
        engine.submit(Job(b"the text of all\n" * 9, keep=True), watch(b"", kept, done, False))
        assert done.wait(20)
        base = kept[-1].context
        streams, results, waiting = {}, {}, []
        for text, count, leaves in jobs:
            while engine.active == COUNT:
                waiting[chance.randrange(len(waiting))].wait(0.01)
            done, events = threading.Event(), []
            job = Job(text, greedy, count, base=base if count % 2 else None)
            streams[text] = engine.submit(job, watch(text, events, done, leaves))
            results[text] = events
            waiting.append(done)
        assert all(done.wait(20) for done in waiting)
    for text, count, leaves in jobs:
        events = results[text]
        written = b"".join(event.characters for event in events if isinstance(event, Written))
        before = b"the text of all\n" * 9 if count % 2 else b""
        expected = bytes(generate(model, before + text, sampling=greedy, max_chars=count))
        if leaves and count > 20:
            assert events[-1].reason == "cancelled"
        if written != expected[: len(written)] or (not leaves and len(written) != count):
            wrong.append(text)
    assert wrong == []


def test_a_step_that_fails_for_one_fails_for_no_other(model):
    class Failing(Separate):
        def step(self, characters, caches, shares=None):
            if any(cache.position == 55 for cache in caches):
                raise RuntimeError("a broken row")
            return super().step(characters, caches, shares)

    greedy = SamplingConfig(temperature=0)
    events = {b"a": [], b"b" * 60: [], b"c" * 70: []}
    with Engine(Failing(model), slots=3, slice_chars=16) as engine:
        for text, said in events.items():
            engine.submit(Job(text, greedy, 80), said.append)
        until(lambda: engine.active == 0, 20)
    failed, *others = events.items()
    assert type(failed[1][-1]).__name__ == "Failed"
    for text, said in others:
        written = b"".join(event.characters for event in said if isinstance(event, Written))
        assert written == bytes(generate(model, text, sampling=greedy, max_chars=80))


def test_slots_hold_as_many_as_they_were_made_for_and_contexts_beside(model):
    slots = Slots(model, 2)
    first, second = (slots.fresh(None, keep=False, reserved=0) for _ in "ab")
    with pytest.raises(ValueError):
        slots.fresh(None, keep=False, reserved=0)
    kept = slots.fresh(None, keep=True, reserved=0)
    assert kept.keys[0].data_ptr() not in (first.keys[0].data_ptr(), second.keys[0].data_ptr())
    slots.release(first)
    assert slots.fresh(None, keep=False, reserved=0).keys[0].data_ptr() == first.keys[0].data_ptr()


def test_a_slot_keeps_no_text_of_the_stream_before():
    told = model_of("n-grams and words")
    slots = Slots(told, 1)
    first = slots.fresh(None, keep=False, reserved=0)
    for character in b"abcabcab":
        slots.step([character], [first])
    assert all(held.any() for held in first.ngrams.tensors().values())
    slots.release(first)
    second = slots.fresh(None, keep=False, reserved=0)
    assert not any(held.any() for held in second.ngrams.tensors().values())


def test_the_stepper_follows_device_and_type(model):
    assert type(stepper_for(model, 2)) is Separate
    half = model_of()
    half.compute_dtype = torch.bfloat16
    assert type(stepper_for(half, 2)) is Slots
    with pytest.raises(ValueError, match="bidirectional"):
        stepper_for(random_model(ButterflyConfig.preset("micro", routing="xor")), 2)
