"""The server: one protocol, nobody let in, nobody harmed by the others, nothing left behind."""
# ruff: noqa: E402

import asyncio
import base64
import contextlib
import gc
import http.client
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from butterfly_llm import memory
from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.engine import Busy, Engine, Finished, Job, Read, Serial, Written
from butterfly_llm.generate import generate
from butterfly_llm.guard import loopback, token_of
from butterfly_llm.protocol import ChatMessage, chat_text
from butterfly_llm.serve import create_app, serve
from conftest import random_model

TOKEN = "correct-horse"
PROMPTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(8)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    model = random_model(ButterflyConfig.preset("micro")).eval()
    with torch.no_grad():
        model.head.weight[0] = 0  # no character that ends the document, so that lengths are known
        model.head.weight *= 3
    return model


class Slow(Serial):
    """A step takes some time, as it does on a model of real size."""

    def __init__(self, model, seconds=0.0):
        super().__init__(model)
        self.seconds = seconds
        self.states = weakref.WeakSet()
        self.calls = []

    def fresh(self):
        cache = super().fresh()
        self.states.add(cache.keys[0])  # a Cache is not hashable; its first ring lives as long
        return cache

    def read(self, characters, cache):
        self.calls.append("read")
        return super().read(characters, cache)

    def step(self, characters, caches):
        self.calls.append("step")
        time.sleep(self.seconds)
        return super().step(characters, caches)

    def alive(self):
        gc.collect()
        return len(self.states)


@contextlib.contextmanager
def served(model, seconds=0.0, slots=8, contexts=4, slice_chars=64, **options):
    """(a function that makes one request, the engine): the app in this process."""
    stepper = Slow(model, seconds)
    with Engine(stepper, slots=slots, contexts=contexts, slice_chars=slice_chars) as engine:
        app = create_app(engine, **options)

        def call(method, path, body=None, *, content=None, headers=None, base="http://127.0.0.1:8000"):
            return asyncio.run(one(app, method, path, body, content=content, headers=headers, base=base))

        call.app = app
        yield call, engine


async def one(app, method, path, body=None, *, content=None, headers=None, base="http://127.0.0.1:8000"):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        return await client.request(method, path, json=body, content=content, headers=headers)


def events(response):
    """The data of server-sent events, the last one `[DONE]`."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def solo(model, prompt, count):
    drawn = generate(model, prompt.encode("latin-1"), sampling=SamplingConfig(temperature=0), max_chars=count)
    return bytes(drawn).decode("latin-1")


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# what the protocol says


def test_a_completion_is_what_generate_writes(model):
    with served(model) as (call, _):
        asked = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0}
        answer = call("POST", "/v1/completions", asked).json()
        text = solo(model, PROMPTS[0], 40)
        assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
        read = len(PROMPTS[0])
        assert answer["object"] == "text_completion" and answer["model"] == "butterfly"
        assert answer["usage"] == {
            "prompt_tokens": read, "completion_tokens": 40, "total_tokens": read + 40,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip
        ids = call("POST", "/v1/completions", {**asked, "prompt": list(PROMPTS[0].encode())}).json()
        assert ids["choices"] == answer["choices"]
        echoed = call("POST", "/v1/completions", {**asked, "echo": True}).json()
        assert echoed["choices"][0]["text"] == PROMPTS[0] + text


def test_a_stream_says_the_same_character_by_character(model):
    with served(model) as (call, _):
        asked = {"prompt": "abc", "max_tokens": 30, "temperature": 0, "stream": True}
        parts = events(call("POST", "/v1/completions", asked))
        assert "".join(part["choices"][0]["text"] for part in parts) == solo(model, "abc", 30)
        assert len(parts) == 31 and len({part["id"] for part in parts}) == 1
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 30 + ["length"]
        assert all("usage" not in part for part in parts)
        asked["stream_options"] = {"include_usage": True}
        parts = events(call("POST", "/v1/completions", asked))
        assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 30
        assert all(part["usage"] is None for part in parts[:-1])


def test_seed_temperature_and_top_p_draw_as_generate_does(model):
    with served(model) as (call, _):
        asked = {"prompt": "abc", "max_tokens": 50, "seed": 7, "temperature": 1.2, "top_p": 0.9}
        first, again = (call("POST", "/v1/completions", asked).json()["choices"][0]["text"] for _ in "ab")
        sampling = SamplingConfig(seed=7, temperature=1.2, top_p=0.9)
        expected = bytes(generate(model, b"abc", sampling=sampling, max_chars=50, stop=("\0",)))
        assert first == again == expected.decode("latin-1")
        other = call("POST", "/v1/completions", {**asked, "seed": 8}).json()["choices"][0]["text"]
        assert other != first
        unseeded = {"prompt": "abc", "max_tokens": 50}
        assert len({call("POST", "/v1/completions", unseeded).text for _ in range(2)}) == 2


def test_a_stop_string_ends_the_text_and_is_not_written(model):
    text = solo(model, "abc", 60)
    stop = text[20:23]
    end = text.index(stop)
    with served(model) as (call, _):
        asked = {"prompt": "abc", "max_tokens": 60, "temperature": 0, "stop": ["never\x01", stop]}
        answer = call("POST", "/v1/completions", asked).json()
        assert answer["choices"][0]["text"] == text[:end]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == end + 3
        parts = events(call("POST", "/v1/completions", {**asked, "stop": stop, "stream": True}))
        assert "".join(part["choices"][0]["text"] for part in parts) == text[:end]
        # the beginning of a stop string that is not completed is written after all
        missed = call("POST", "/v1/completions", {**asked, "stop": text[57:60] + "?"}).json()
        assert missed["choices"][0]["text"] == text and missed["choices"][0]["finish_reason"] == "length"


def test_logprobs_are_those_of_the_model(model):
    with served(model) as (call, _):
        asked = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "logprobs": 3}
        answer = call("POST", "/v1/completions", asked).json()["choices"][0]
        found = answer["logprobs"]
        ids = torch.tensor([list(b"abc" + answer["text"].encode("latin-1"))])
        expected = model(ids)[0, 2:-1].detach().log_softmax(-1)
        assert found["tokens"] == list(answer["text"]) and found["text_offset"] == list(range(12))
        for i, (value, top) in enumerate(zip(found["token_logprobs"], found["top_logprobs"], strict=True)):
            assert value == pytest.approx(float(expected[i].max()), abs=1e-3)
            assert len(top) == 3 and max(top.values()) == value
        parts = events(call("POST", "/v1/completions", {**asked, "stream": True}))
        streamed = [p["choices"][0]["logprobs"] for p in parts if p["choices"][0]["logprobs"]]
        assert [each["token_logprobs"][0] for each in streamed] == found["token_logprobs"]
        assert [each["text_offset"][0] for each in streamed] == found["text_offset"]


def test_chat_is_its_template(model):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    text = "system:\nBe short.\n\nuser:\nHi\n\nassistant:\n"
    assert chat_text([ChatMessage(**each) for each in messages]) == text
    with served(model) as (call, _):
        asked = {"messages": messages, "max_completion_tokens": 20, "temperature": 0}
        asked |= {"logprobs": True, "top_logprobs": 2}
        answer = call("POST", "/v1/chat/completions", asked).json()
        choice, written = answer["choices"][0], solo(model, text, 20)
        assert answer["object"] == "chat.completion"
        assert choice["message"] == {"role": "assistant", "content": written}
        content = choice["logprobs"]["content"]
        assert [each["token"] for each in content] == list(written)
        assert all(each["top_logprobs"][0]["logprob"] == each["logprob"] for each in content)
        parts = events(call("POST", "/v1/chat/completions", {**asked, "stream": True}))
        assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == written
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert {p["object"] for p in parts} == {"chat.completion.chunk"}


def test_a_context_is_read_once_and_continued_often(model):
    text = "".join(PROMPTS)  # longer than the rings of micro are
    with served(model) as (call, engine):
        kept = call("POST", "/v1/contexts", {"text": text}).json()
        assert kept["characters"] == len(text) and kept["state_bytes"] > 0
        before = engine.counters.read
        asked = {"prompt": "abc", "max_tokens": 30, "temperature": 0}
        for _ in range(2):
            answer = call("POST", "/v1/completions", {**asked, "context": kept["id"]}).json()
            assert answer["choices"][0]["text"] == solo(model, text + "abc", 30)
        assert answer["usage"]["prompt_tokens"] == len(text) + 3
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": len(text)}
        assert engine.counters.read == before + 6
        bare = call("POST", "/v1/completions", {**asked, "prompt": "", "context": kept["id"]}).json()
        assert bare["choices"][0]["text"] == solo(model, text, 30)
        longer = call("POST", "/v1/contexts", {"text": "abc", "context": kept["id"]}).json()
        assert [each["id"] for each in call("GET", "/v1/contexts").json()["data"]] == [
            kept["id"],
            longer["id"],
        ]
        onward = call("POST", "/v1/completions", {**asked, "prompt": "", "context": longer["id"]}).json()
        assert onward["choices"][0]["text"] == solo(model, text + "abc", 30)
        assert call("DELETE", f"/v1/contexts/{kept['id']}").json()["deleted"]
        assert call("DELETE", f"/v1/contexts/{kept['id']}").status_code == 404
        assert call("POST", "/v1/completions", {**asked, "context": kept["id"]}).status_code == 404
        call("DELETE", f"/v1/contexts/{longer['id']}")
        until(lambda: engine.stepper.alive() == 0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_a_fork_of_a_short_context_is_exact(model, length):
    text = PROMPTS[7][:length]
    with served(model, slice_chars=16) as (call, _):
        name = call("POST", "/v1/contexts", {"text": text}).json()["id"]
        asked = {"prompt": "", "context": name, "max_tokens": 40, "temperature": 0}
        assert call("POST", "/v1/completions", asked).json()["choices"][0]["text"] == solo(model, text, 40)


def test_reading_a_context_shows_its_progress_and_contexts_are_limited(model):
    with served(model, contexts=1) as (call, _):
        parts = events(call("POST", "/v1/contexts", {"text": "x" * 300, "stream": True}))
        assert [part["read"] for part in parts[:-1]] == [64, 128, 192, 256, 300]
        assert parts[-1]["characters"] == 300
        refused = call("POST", "/v1/contexts", {"text": "more"})
        assert refused.status_code == 429 and "delete" in refused.json()["error"]["message"]


def test_models_health_and_metrics(model):
    with served(model, name="micro", reach=128) as (call, engine):
        (listed,) = call("GET", "/v1/models").json()["data"]
        assert (listed["id"], listed["object"], listed["encoding"]) == ("micro", "model", "latin-1")
        assert listed["state_bytes"] == engine.stepper.nbytes
        assert call("GET", "/health").json() == {"status": "ok"}
        call("POST", "/v1/completions", {"prompt": "abcd", "max_tokens": 9, "temperature": 0})
        call("POST", "/v1/completions", {"prompt": ""})
        text = call("GET", "/metrics").text
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"\})?', name) for name in found)
        assert found["butterfly_characters_read_total"] == "4"
        assert found["butterfly_characters_written_total"] == "9"
        assert found['butterfly_streams_total{reason="length"}'] == "1"
        assert found['butterfly_http_responses_total{code="422"}'] == "1"
        assert found["butterfly_slots_used"] == "0" and found["butterfly_state_bytes"] == "0"


def test_utf8_mode_takes_and_gives_any_text(model):
    with served(model, encoding="utf-8") as (call, _):
        asked = {"prompt": "a \u20ac \U0001f98b", "max_tokens": 0, "echo": True}
        answer = call("POST", "/v1/completions", asked).json()
        assert answer["choices"][0]["text"] == asked["prompt"]
        assert answer["usage"]["prompt_tokens"] == len(asked["prompt"].encode())
        drawn = bytes(generate(model, b"abc", sampling=SamplingConfig(temperature=0), max_chars=40))
        asked = {"prompt": "abc", "max_tokens": 40, "temperature": 0, "logprobs": 1}
        choice = call("POST", "/v1/completions", asked).json()["choices"][0]
        assert choice["text"] == drawn.decode("utf-8", "replace")
        assert choice["logprobs"]["tokens"][:3] == [
            chr(c) if c < 128 else f"bytes:\\x{c:02x}" for c in drawn[:3]
        ]


# many at once


def test_eight_streams_at_once_write_what_each_writes_alone(model):
    with served(model) as (call, engine):

        async def all_at_once():
            asked = [{"prompt": p, "max_tokens": 60, "temperature": 0, "logprobs": 0} for p in PROMPTS]
            return await asyncio.gather(*(one(call.app, "POST", "/v1/completions", each) for each in asked))

        def alone(prompt):
            asked = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "logprobs": 0}
            return call("POST", "/v1/completions", asked).json()["choices"]

        together = [answer.json()["choices"] for answer in asyncio.run(all_at_once())]
        turns = engine.stepper.calls
        assert "read" in turns[turns.index("step") :], "they did not overlap"
        assert together == [alone(prompt) for prompt in PROMPTS]  # to the last bit of the log probabilities
        assert [each[0]["text"] for each in together] == [solo(model, prompt, 60) for prompt in PROMPTS]


def test_a_long_prompt_does_not_hold_up_the_others(model):
    with served(model, seconds=0.002, slice_chars=64) as (_, engine):
        ends = []
        engine.submit(
            Job(b"abc", max_chars=50, sampling=SamplingConfig(temperature=0)), lambda e: ends.append(e)
        )
        until(lambda: any(isinstance(e, Written) for e in ends))
        long = []
        stream = engine.submit(Job(b"x" * 64 * 500, max_chars=1), long.append)
        until(lambda: isinstance(ends[-1], Finished))
        assert ends[-1].reason == "length"
        assert not any(isinstance(e, Written) for e in long), "the prompt was too short for this test"
        assert sum(isinstance(e, Read) for e in long) > 2  # and it was read meanwhile
        stream.cancel()


def test_beyond_the_slots_429_says_when_to_come_back(model):
    with served(model, seconds=0.01, slots=2) as (call, engine):
        streams = [engine.submit(Job(b"a", max_chars=10_000), lambda event: None) for _ in range(2)]
        refused = call("POST", "/v1/completions", {"prompt": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert call("POST", "/v1/contexts", {"text": "a"}).status_code == 429
        with pytest.raises(Busy):
            engine.submit(Job(b"a"), print)
        streams[0].cancel()
        until(lambda: engine.active == 1)
        assert call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        streams[1].cancel()


# clients that leave, or do not read


async def talk(app, path, body, leave_after, *, blocked=None):
    """A request by hand: the client goes when `leave_after` parts of the answer came. -> parts."""
    parts, gone = [], asyncio.Event()
    sent = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive():
        message = next(sent, None)
        if message is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message):
        parts.append(message)
        if len(parts) >= leave_after:
            gone.set()
        if blocked is not None and len(parts) > 3:
            await blocked.wait()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1), "server": None,
    }  # fmt: skip
    if leave_after == 0:
        asyncio.get_running_loop().call_later(0.1, gone.set)
    await app(scope, receive, send)
    return parts


@pytest.mark.parametrize(("stream", "leave_after"), [(True, 5), (False, 0)])
def test_work_stops_when_the_client_leaves_and_its_state_is_freed(model, stream, leave_after):
    with served(model, seconds=0.005) as (call, engine):
        body = {"prompt": "abc", "max_tokens": 10_000, "stream": stream}
        other = []
        engine.submit(Job(b"abc", max_chars=150), other.append)
        started = time.monotonic()
        asyncio.run(talk(call.app, "/v1/completions", body, leave_after))
        until(lambda: engine.active == 1, 1.0)
        assert time.monotonic() - started < 2
        assert engine.counters.finished["cancelled"] == 1
        until(lambda: isinstance(other[-1], Finished))
        assert other[-1].reason == "length" and other[-1].drawn == 150  # unharmed
        until(lambda: engine.stepper.alive() == 0)
        assert engine.state_bytes() == 0


def test_work_stops_when_the_client_leaves_while_a_context_is_read(model):
    with served(model, slice_chars=16) as (call, engine):
        asyncio.run(talk(call.app, "/v1/contexts", {"text": "x" * 200_000, "stream": True}, 3))
        until(lambda: engine.active == 0, 1.0)
        assert engine.contexts == {} and engine.counters.read < 200_000


def test_a_slow_reader_pauses_itself_only_and_is_dropped_in_the_end(model):
    with served(model) as (call, engine):
        engine.backlog, engine.stall_seconds = 8, 1.0

        async def scene():
            blocked = asyncio.Event()
            body = {"prompt": "abc", "max_tokens": 10_000, "stream": True}
            slow = asyncio.create_task(talk(call.app, "/v1/completions", body, 10**9, blocked=blocked))
            await asyncio.sleep(0.3)
            written = engine.counters.written
            assert written < 30
            answer = await one(call.app, "POST", "/v1/completions", {"prompt": "b", "max_tokens": 40})
            assert answer.status_code == 200 and engine.counters.written == written + 40
            while engine.active:
                await asyncio.sleep(0.05)
            blocked.set()
            return await slow

        parts = asyncio.run(asyncio.wait_for(scene(), 10))
        assert b"cancelled" in parts[-2]["body"] and engine.counters.finished["cancelled"] == 1
        assert engine.stepper.alive() == 0


# what must not get in


BAD = [
    ({"prompt": ""}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1e3}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 65_537}, "--max-chars"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 1e308}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 2}, "n: "),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "logprobs": 256}, "logprobs"),
    ({"prompt": "a", "logprobs": 1, "echo": True}, "echo"),
    ({"prompt": "a", "stream": 1}, "stream"),
    ({"prompt": "a", "beam": 4}, "beam"),
    ({"prompt": "a", "\ud800": 4}, "unicode"),
    ({"prompt": [1, 256]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "line\nab\u20ac"}, "line 2, column 3: '\\u20ac' (U+20AC)"),
    ({"prompt": "a\ud800"}, "U+D800"),
    ({"prompt": "a", "stop": "\u20ac"}, "U+20AC"),
    ([], "body"),
    (None, "body"),
    ("text", "body"),
]  # fmt: skip


def test_what_is_wrong_is_named_with_422(model):
    with served(model) as (call, engine):
        for body, said in BAD:
            answer = call("POST", "/v1/completions", content=json.dumps(body).encode())
            assert answer.status_code == 422, body
            assert said in answer.json()["error"]["message"], (body, answer.text)
        for content in (
            b"", b"{", b"\xff", b'{"prompt": "a" "b"}', b"[" * 100_000, b'{"prompt": NaN}',
            b'{"prompt":"a","temperature":NaN}', b'{"prompt":"a","temperature":Infinity}',
            b'{"prompt":"a","seed":' + b"9" * 10_000 + b"}", b"\x00\x01",
        ):  # fmt: skip
            answer = call("POST", "/v1/completions", content=content)
            assert answer.status_code == 422 and answer.json()["error"]["message"], content[:40]
        for body in ({}, {"messages": []}, {"messages": [{"role": "cat", "content": ""}]}, {"messages": "hi"},
                     {"messages": [{"role": "user", "content": "\u20ac"}]},
                     {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}):  # fmt: skip
            assert call("POST", "/v1/chat/completions", body).status_code == 422, body
        for body in ({}, {"text": ""}, {"text": 1}, {"text": "\u20ac"}, {"text": "a", "id": "mine"}):
            assert call("POST", "/v1/contexts", body).status_code == 422, body
        for asked in ({"model": "other"}, {"context": "ctx-0"}, {"context": "\ud800"}):
            raw = json.dumps({"prompt": "a", **asked}).encode()
            answer = call("POST", "/v1/completions", content=raw)
            assert answer.status_code in (404, 422), asked
        assert call("GET", "/v1/completions").status_code == 405
        assert call("GET", "/nothing").status_code == 404
        assert engine.active == 0 and engine.alive
        assert call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_body_above_the_limit_is_413_announced_or_not(model):
    with served(model, max_body=1000) as (call, engine):
        body = {"prompt": "a" * 1000}
        assert call("POST", "/v1/completions", body).status_code == 413

        async def pieces():
            for _ in range(10_000):
                taken.append(1)
                yield b" " * 100

        taken = []
        assert call("POST", "/v1/contexts", content=pieces()).status_code == 413
        assert len(taken) < 9_999 or engine.active == 0
        lying = {"content-length": "9" * 30}
        assert call("POST", "/v1/completions", content=b"{}", headers=lying).status_code == 413
        assert call("POST", "/v1/completions", {"prompt": "a" * 900, "max_tokens": 1}).status_code == 200


ROUTES = [
    ("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/contexts"), ("GET", "/v1/contexts"),
    ("DELETE", "/v1/contexts/x"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/none"),
]  # fmt: skip

WRONG = [
    None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN,
    "Basic !!", "Bearer \u00fc", f"Basic {TOKEN}",
]  # fmt: skip


def test_every_route_but_health_wants_the_token(model):
    with served(model, token=TOKEN) as (call, _):
        known = {(m, r.path) for r in call.app.routes for m in r.methods if m != "HEAD"} - {
            ("GET", "/health")
        }
        listed = {(m, p.replace("/x", "/{context}")) for m, p in ROUTES}
        assert known <= listed, "a route is missing from this test"
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for method, path in ROUTES:
            for given in WRONG:
                headers = {} if given is None else {"authorization": given.encode("latin-1")}
                answer = call(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, given)
                assert "Bearer" in answer.headers["www-authenticate"]
            for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
                assert call(method, path, headers={"authorization": given}).status_code != 401
        assert call("GET", "/health").status_code == 200


def test_the_token_is_compared_in_constant_time(model, monkeypatch):
    import hmac

    seen = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    with served(model, token=TOKEN) as (call, _):
        assert call("GET", "/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
    assert seen == [(b"no", TOKEN.encode())]


def test_without_a_token_other_web_pages_stay_out(model):
    with served(model) as (call, _):
        for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.0.0.1"):
            assert call("GET", "/v1/models", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "",
            "localhost.evil:8000",
        ):
            assert call("GET", "/v1/models", headers={"host": host}).status_code == 403, host
        here = {"host": "127.0.0.1:8000"}
        assert call("GET", "/v1/models", headers={**here, "origin": "http://evil.example"}).status_code == 403
        assert call("GET", "/v1/models", headers={**here, "origin": "null"}).status_code == 403
        own = {**here, "origin": "http://127.0.0.1:8000"}
        assert call("GET", "/v1/models", headers=own).status_code == 200


def test_no_address_of_others_without_a_token(model, monkeypatch):
    monkeypatch.delenv("BUTTERFLY_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(ValueError, match="open to other machines"):
            serve(lambda: model, host=host, port=0)
    assert [loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "127.0.0.1.x")] == [
        True, True, True, True, False,
    ]  # fmt: skip
    assert token_of(None) is None and token_of("a-b") == "a-b"
    monkeypatch.setenv("BUTTERFLY_TOKEN", "from-there")
    assert token_of(None) == "from-there" and token_of("flag") == "flag"
    monkeypatch.setenv("BUTTERFLY_TOKEN", "")
    assert token_of(None) is None
    for bad in ("", "two words", "\u00fcber", "line\n"):
        with pytest.raises(ValueError, match="one word"):
            token_of(bad)


# what goes wrong inside


def test_out_of_memory_is_503_with_the_estimate_and_the_server_lives_on(model, monkeypatch):
    with served(model) as (call, engine):
        kept = call("POST", "/v1/contexts", {"text": "abc"}).json()["id"]
        for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": "a", "context": kept}):
            with monkeypatch.context() as patch:
                patch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
                answer = call("POST", "/v1/completions", body)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert re.search(
                r"needs [\d.]+ [KMG]B on cpu, .*1.0 KB.* free", answer.json()["error"]["message"]
            )
        assert engine.active == 0 and engine.counters.finished["failed"] == 3
        assert call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_memory_that_running_streams_will_still_need_is_counted(model, monkeypatch):
    with served(model, seconds=0.01) as (call, engine):
        stream = engine.submit(Job(b"a", max_chars=10_000), lambda event: None)
        until(lambda: engine.state_bytes() > 0)
        # room for one full state: the running stream has claimed most of it
        monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": engine.stepper.nbytes + 1000)
        assert call("POST", "/v1/completions", {"prompt": "a"}).status_code == 503
        stream.cancel()
        until(lambda: engine.active == 0)
        assert call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), 503),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503),
        (torch.OutOfMemoryError("CUDA out of memory"), 503),
        (ValueError("a bug"), 500),
    ],
)
def test_a_failure_on_the_way_ends_its_stream_only(model, error, status):
    class Failing(Slow):
        def step(self, characters, caches):
            if caches[0].position == 20:
                raise type(error)(*error.args)  # a new one: a traceback keeps its frames
            return super().step(characters, caches)

    with Engine(Failing(model), slots=2) as engine:
        app = create_app(engine)
        asked = {"prompt": "a" * 5, "max_tokens": 30, "temperature": 0}
        answer = asyncio.run(one(app, "POST", "/v1/completions", asked))
        assert answer.status_code == status and "bug" not in answer.text
        parts = asyncio.run(one(app, "POST", "/v1/completions", {**asked, "stream": True})).text
        last = json.loads(parts.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error" and "[DONE]" not in parts
        longer = asyncio.run(one(app, "POST", "/v1/completions", {**asked, "prompt": "a" * 40}))
        assert longer.status_code == 200 and longer.json()["usage"]["completion_tokens"] == 30
        assert engine.active == 0 and (status == 500 or engine.stepper.alive() == 0)  # the log keeps frames


def test_closing_ends_the_streams(model):
    got = []
    with Engine(Slow(model, 0.01), slots=2) as engine:
        engine.submit(Job(b"a", max_chars=10_000), got.append)
        until(lambda: any(isinstance(e, Written) for e in got))
    assert got[-1].reason == "cancelled" and not engine.alive
    with pytest.raises(Busy):
        engine.submit(Job(b"a"), print)


# the real thing


@pytest.fixture(scope="module")
def real(model, tmp_path_factory):
    """`butterfly serve` in its own process, with a token: (port, process, what it said)."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    save_model(model, folder)
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1",
        "BUTTERFLY_TOKEN": TOKEN,
    }  # fmt: skip
    command = [sys.executable, "-m", "butterfly_llm", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen([*command, "--slots", "2"], env=environment, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    assert found, line + process.stderr.read()
    yield int(found[1]), process, line
    process.terminate()
    process.wait(10)


def test_the_official_client_works(model, real):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{real[0]}/v1", api_key=TOKEN, max_retries=0)
    name = client.models.list().data[0].id
    whole = client.completions.create(model=name, prompt="abc", max_tokens=20, temperature=0, logprobs=2)
    assert whole.choices[0].text == solo(model, "abc", 20) and whole.usage.completion_tokens == 20
    assert len(whole.choices[0].logprobs.tokens) == 20
    parts = client.completions.create(model=name, prompt="abc", max_tokens=20, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model=name, messages=messages, max_tokens=20, temperature=0)
    assert len(chat.choices[0].message.content) == 20
    stream = client.chat.completions.create(
        model=name,
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = list(stream)
    assert parts[-1].usage.completion_tokens == 20
    said = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert said == chat.choices[0].message.content
    wrong = openai.OpenAI(base_url=f"http://127.0.0.1:{real[0]}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(openai.UnprocessableEntityError, match="U\\+20AC"):
        client.completions.create(model=name, prompt="\u20ac")


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    return connection, answer


def test_real_clients_vanish_and_the_slots_are_free_within_a_second(real):
    port = real[0]

    def used():
        text = ask(port, "GET", "/metrics")[1].read().decode()
        return float(re.search(r"^butterfly_slots_used (\S+)$", text, re.M)[1])

    for stream in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 60_000, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for line in lines:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: used() == 2)
        refused = ask(port, "POST", "/v1/completions", {"prompt": "a"})[1]
        assert refused.status == 429 and refused.getheader("Retry-After")
        for line in lines:
            line.close()
        until(lambda: used() == 0, 1.0)


def test_the_command_says_where_and_refuses_in_one_line(real):
    assert "token needed" in real[2] and TOKEN not in real[2]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "BUTTERFLY_TOKEN": ""}
    arguments = ["serve", "--host", "0.0.0.0"]
    result = subprocess.run(
        [sys.executable, "-m", "butterfly_llm", *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "BUTTERFLY_TOKEN" in result.stderr


def test_an_interrupt_ends_the_server_with_streams_open(model):
    """SIGTERM while a stream is open: the process ends within seconds."""
    engine = Engine(Slow(model, 0.01), slots=1)
    with engine:
        engine.submit(Job(b"a", max_chars=10_000), lambda event: None)
        started = time.monotonic()
    assert time.monotonic() - started < 2 and threading.active_count() < 50
    assert math.isfinite(engine.counters.writing_seconds)
