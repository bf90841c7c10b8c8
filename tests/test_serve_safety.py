"""The server: nobody let in, nobody harmed by the others, nothing left behind."""
# ruff: noqa: E402

import asyncio
import base64
import json
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from butterfly_llm import memory
from butterfly_llm.engine import Busy, Engine, Finished, Job, Written
from butterfly_llm.guard import loopback, token_of
from butterfly_llm.protocol import ChatRequest, CompletionRequest, ContextRequest
from butterfly_llm.serve import create_app, serve
from serving import TOKEN, Slow, model, one, served, until

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


# clients that leave, or do not read


async def talk(app, path, body, leave_after, *, blocked=None, sent=None, headers=()):
    """A request by hand: the client goes when `leave_after` parts of the answer came. -> parts."""
    parts, gone = [], asyncio.Event()
    sent = sent or iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

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
        "scheme": "http", "headers": [(b"host", b"127.0.0.1"), *headers], "server": None,
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    if leave_after == 0:
        asyncio.get_running_loop().call_later(0.1, gone.set)
    await app(scope, receive, send)
    return parts


@pytest.mark.parametrize(("stream", "leave_after"), [(True, 5), (False, 0)])
def test_work_stops_when_the_client_leaves_and_its_state_is_freed(model, stream, leave_after):
    with served(model, seconds=0.005) as (call, engine):
        body = {"prompt": "abc", "max_tokens": 10_000, "temperature": 0, "stream": stream}
        other = []
        engine.submit(Job(b"abc", max_chars=150), other.append)
        started = time.monotonic()
        asyncio.run(talk(call.app, "/v1/completions", body, leave_after))
        until(lambda: engine.counters.finished["cancelled"] == 1, 1.0)
        assert time.monotonic() - started < 3
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
            body = {"prompt": "abc", "max_tokens": 10_000, "temperature": 0, "stream": True}
            slow = asyncio.create_task(talk(call.app, "/v1/completions", body, 10**9, blocked=blocked))
            await asyncio.sleep(0.3)
            written = engine.counters.written
            assert written < 30
            asked = {"prompt": "b", "max_tokens": 40, "temperature": 0}
            answer = await one(call.app, "POST", "/v1/completions", asked)
            assert answer.status_code == 200 and engine.counters.written == written + 40
            while engine.active:
                await asyncio.sleep(0.05)
            assert engine.stepper.alive() == 0  # though its request still hangs
            blocked.set()
            return await slow

        parts = asyncio.run(asyncio.wait_for(scene(), 10))
        assert b"cancelled" in parts[-2]["body"] and engine.counters.finished["cancelled"] == 1


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


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["a", "user", 1, 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *ContextRequest.model_fields})
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}), max_size=2)


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/contexts"]),
    base=st.sampled_from(
        [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"text": "a"}, {}]
    ),
    more=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)
    | st.fixed_dictionaries({"messages": MESSAGES}),
)
def test_no_body_is_an_error_of_the_server(fuzzed, path, base, more):
    call, engine = fuzzed
    answer = call("POST", path, content=json.dumps({**base, **more}).encode())
    assert answer.status_code in (200, 404, 422), answer.text
    assert "error" not in answer.text or answer.status_code != 200
    for name in list(engine.contexts):
        engine.forget(name)


@pytest.fixture(scope="module")
def fuzzed(model):
    with served(model, max_chars=8) as both:
        yield both


ROUTES = [
    ("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/contexts"), ("GET", "/v1/contexts"),
    ("DELETE", "/v1/contexts/x"), ("GET", "/v1/states"), ("PUT", "/v1/states/x"),
    ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/none"),
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
        last = {"/v1/contexts/x": "/v1/contexts/{context}", "/v1/states/x": "/v1/states/{name}"}
        listed = {(m, last.get(p, p)) for m, p in ROUTES}
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


def test_a_body_announced_above_the_limit_is_not_waited_for(model):
    async def send_nothing():
        said = [(b"content-length", b"1001")]
        talking = talk(call.app, "/v1/contexts", None, 10**9, sent=iter(()), headers=said)
        return await asyncio.wait_for(talking, 2)

    with served(model, max_body=1000) as (call, _):
        assert asyncio.run(send_nothing())[0]["status"] == 413


def test_a_body_that_breaks_off_is_no_error_of_the_server(model):
    with served(model) as (call, engine):
        sent = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
        parts = asyncio.run(talk(call.app, "/v1/completions", None, 10**9, sent=sent))
        assert parts[0]["status"] == 400 and engine.active == 0


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
        def step(self, characters, caches, shares=None):
            if caches[0].position == 20:
                raise type(error)(*error.args)  # a new one: a traceback keeps its frames
            return super().step(characters, caches, shares)

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
