"""The server: what the protocol says, many streams at once, the command."""
# ruff: noqa: E402

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.engine import Busy, Engine, Finished, Job, Read, Written
from butterfly_llm.generate import generate
from butterfly_llm.protocol import ChatMessage, chat_text
from butterfly_llm.serve import create_app
from butterfly_llm.state import load_state, save_state
from conftest import random_model
from serving import ENVIRONMENT, PROMPTS, TOKEN, Slow, events, model, one, served, solo, until

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_answer_in_a_chat_ends_where_the_user_would_speak(model):
    script = "ok\n\nuse\n\nuser:\nmore"

    class Scripted(Slow):
        at = 0

        def read(self, characters, cache):
            super().read(characters, cache)
            return self.next()

        def step(self, characters, caches, shares=None):
            return self.next()

        def next(self):
            logits = torch.zeros(1, 256)
            logits[0, ord(script[self.at])] = 9
            self.at += 1
            return logits

    with Engine(Scripted(model), slice_chars=64) as engine:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
        answer = asyncio.run(one(create_app(engine), "POST", "/v1/chat/completions", asked))
        choice = answer.json()["choices"][0]
        assert choice["message"]["content"] == "ok\n\nuse" and choice["finish_reason"] == "stop"


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
    with served(model, name="micro") as (call, engine):
        (listed,) = call("GET", "/v1/models").json()["data"]
        assert (listed["id"], listed["object"], listed["encoding"]) == ("micro", "model", "latin-1")
        assert listed["state_bytes"] == engine.stepper.nbytes and listed["reach_chars"] == 128
        assert [layer["stride"] for layer in listed["layers"]] == [1, 1, 2, 4, 1, 2, 4, 1]
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
        assert found["butterfly_streams_waiting"] == "0"
        buckets = [int(value) for name, value in found.items() if "step_seconds_bucket" in name]
        assert buckets == sorted(buckets) and buckets[-1] == 8  # the ninth character is not read any more
        assert found["butterfly_step_seconds_count"] == "8"
        assert float(found["butterfly_step_seconds_sum"]) > 0
        assert found["butterfly_slots_used"] == "0" and found["butterfly_state_bytes"] == "0"


def test_a_stream_tells_where_its_characters_listen(model):
    with served(model) as (call, _):
        asked = {"prompt": "x" * 14, "max_tokens": 30, "temperature": 0, "stream": True}
        plain = events(call("POST", "/v1/completions", asked))
        parts = events(call("POST", "/v1/completions", {**asked, "attention": True}))
        assert [p["choices"][0]["text"] for p in parts if p["choices"]] == [
            p["choices"][0]["text"] for p in plain
        ]
        heard = [part["attention"] for part in parts if "attention" in part]
        assert [each["position"] for each in heard] == list(range(14, 43))
        assert "attention" in parts[1] and parts[-1]["choices"], "one after each character, not at the end"
        assert 0 < heard[0]["state_bytes"] <= heard[-1]["state_bytes"]
        first, later = heard[0]["own"], heard[-1]["own"]
        assert first == [1.0] * 8  # chunk 0 has no partner
        # chunk 2 hears chunk 1 and 0, but not four back
        assert [share == 1 for share in later] == [False, False, False, True, False, False, True, False]
        assert all(0 < share <= 1 for share in later)
        refused = call("POST", "/v1/completions", {**asked, "attention": True, "stream": False})
        assert refused.status_code == 422 and "stream" in refused.text


def test_contexts_are_saved_and_loaded_by_name(model, tmp_path):
    text = "".join(PROMPTS)
    with served(model, states=tmp_path) as (call, engine):
        kept = call("POST", "/v1/contexts", {"text": text}).json()["id"]
        longer = call("POST", "/v1/contexts", {"text": "abc", "context": kept}).json()["id"]
        for name, context in (("short", kept), ("long.1", longer)):
            saved = call("PUT", f"/v1/states/{name}", {"context": context})
            assert saved.status_code == 200 and saved.json()["name"] == name
        for name in ("..", ".hidden", "a b", "x" * 65, "a%2Fb"):
            assert call("PUT", f"/v1/states/{name}", {"context": kept}).status_code in (404, 405, 422), name
        assert call("PUT", "/v1/states/new", {"context": "nosuch"}).status_code == 404
    (tmp_path / "notes.txt").write_text("not a state")
    save_state(load_state(tmp_path / "short", model), tmp_path / "broken", model=model)
    shard = next((tmp_path / "broken").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with served(model, states=tmp_path, contexts=2) as (call, engine):
        listed = call("GET", "/v1/states").json()["data"]
        assert [(each["name"], each["characters"]) for each in listed] == [
            ("broken", len(text)), ("long.1", len(text) + 3), ("short", len(text))
        ]  # fmt: skip
        for name, before in (("short", text), ("long.1", text + "abc")):
            loaded = call("POST", "/v1/contexts", {"state": name})
            assert loaded.status_code == 200 and loaded.json()["characters"] == len(before)
            assert loaded.json()["id"] == name
            asked = {"prompt": "", "context": name, "max_tokens": 30, "temperature": 0}
            assert call("POST", "/v1/completions", asked).json()["choices"][0]["text"] == solo(
                model, before, 30
            )
        assert call("POST", "/v1/contexts", {"state": "short"}).status_code == 200  # it is here already
        assert call("POST", "/v1/contexts", {"state": "broken"}).status_code == 429
        call("DELETE", "/v1/contexts/short")
        for body, status, said in (
            ({"state": "broken"}, 422, "broken"),
            ({"state": "nosuch"}, 404, "GET /v1/states"),
            ({"state": "../short"}, 422, "a name is"),
            ({"state": "short", "text": "a"}, 422, "or the name"),
            ({"state": "short", "stream": True}, 422, "at once"),
        ):
            answer = call("POST", "/v1/contexts", body)
            assert answer.status_code == status and said in answer.json()["error"]["message"], body
        assert list(engine.contexts) == ["long.1"]
    with served(model) as (call, _):
        assert call("GET", "/v1/states").json()["data"] == []
        assert call("POST", "/v1/contexts", {"state": "short"}).status_code == 404


def test_a_million_characters_by_upload_and_by_name(tmp_path):
    light = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "num_passes": 1, "num_local_layers": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_levels": 2, "chunk_size": 128}
    model = random_model(ButterflyConfig.preset("micro", **light, **sizes)).eval()
    text = "".join(f"line {i}\n" for i in range(100_000))[:1_000_000]
    with served(model, states=tmp_path, slice_chars=2048) as (call, _):
        parts = events(call("POST", "/v1/contexts", {"text": text, "stream": True}))
        assert len(parts) > 400 and parts[-1]["characters"] == 1_000_000
        name = parts[-1]["id"]
        assert parts[-1]["state_bytes"] == parts[10]["state_bytes"], "the state grew with the text"
        asked = {"prompt": "line ", "max_tokens": 20, "temperature": 0}
        answer = call("POST", "/v1/completions", {**asked, "context": name}).json()
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1_000_000}
        assert call("PUT", "/v1/states/lines", {"context": name}).status_code == 200
    with served(model, states=tmp_path) as (call, _):
        assert call("POST", "/v1/contexts", {"state": "lines"}).json()["characters"] == 1_000_000
        again = call("POST", "/v1/completions", {**asked, "context": "lines"}).json()
        assert again["choices"] == answer["choices"]


def test_the_page_comes_from_here_alone(model):
    with served(model) as (call, _):
        page = call("GET", "/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'; connect-src 'self'" in page.headers["content-security-policy"]
        assert not re.search(r"//[a-z]|src=|@import|url\(", page.text), "it would ask the network"
        routes = {route.path for route in call.app.routes}
        asked = set(re.findall(r'"(/v1/[^"]*?)/?"', page.text))
        assert asked == {"/v1/models", "/v1/contexts", "/v1/completions", "/v1/states"} and asked <= routes
        ids = set(re.findall(r'id="([^"]+)"', page.text))
        assert set(re.findall(r'\$\("([^"]+)"\)', page.text)) <= ids


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
            asked = [{"prompt": p, "max_tokens": 100, "temperature": 0, "logprobs": 0} for p in PROMPTS]
            return await asyncio.gather(*(one(call.app, "POST", "/v1/completions", each) for each in asked))

        def alone(prompt):
            asked = {"prompt": prompt, "max_tokens": 100, "temperature": 0, "logprobs": 0}
            return call("POST", "/v1/completions", asked).json()["choices"]

        together = [answer.json()["choices"] for answer in asyncio.run(all_at_once())]
        turns = engine.stepper.calls
        assert "read" in turns[turns.index("step of 1") :], "they did not overlap"
        assert max(turn for turn in turns if turn != "read") == "step of 8"
        for prompt, (choice,) in zip(PROMPTS, together, strict=True):
            (expected,) = alone(prompt)
            values = [each.pop("logprobs")["token_logprobs"] for each in (choice, expected)]
            assert choice == expected and values[0] == pytest.approx(values[1], abs=1e-4)
        assert [each[0]["text"] for each in together] == [solo(model, prompt, 100) for prompt in PROMPTS]


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


# the real thing


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    """A function that starts `butterfly serve` with a token: (process, port, what it said)."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    save_model(model, folder)
    processes = []

    def begin():
        command = [sys.executable, "-m", "butterfly_llm", "serve", "--model", str(folder), "--port", "0"]
        process = subprocess.Popen(
            [*command, "--slots", "2"],
            env={**ENVIRONMENT, "BUTTERFLY_TOKEN": TOKEN},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + process.stderr.read()
        return process, int(found[1]), line

    yield begin
    for process in processes:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def real(start):
    return start()


def test_the_official_client_works(model, real):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{real[1]}/v1", api_key=TOKEN, max_retries=0)
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
    wrong = openai.OpenAI(base_url=f"http://127.0.0.1:{real[1]}/v1", api_key="wrong", max_retries=0)
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
    port = real[1]

    def used():
        text = ask(port, "GET", "/metrics")[1].read().decode()
        return float(re.search(r"^butterfly_slots_used (\S+)$", text, re.M)[1])

    for stream in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 60_000, "temperature": 0, "stream": stream}).encode()
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
    arguments = ["serve", "--host", "0.0.0.0"]
    result = subprocess.run(
        [sys.executable, "-m", "butterfly_llm", *arguments],
        env={**ENVIRONMENT, "BUTTERFLY_TOKEN": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "BUTTERFLY_TOKEN" in result.stderr


def test_without_the_extra_there_is_a_one_line_hint():
    program = "import sys; sys.modules['fastapi'] = None; from butterfly_llm.cli import main; main(['serve'])"
    result = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "pip install 'butterfly-llm[serve]'" in result.stderr


def test_sigterm_ends_the_server_though_a_stream_is_open(start):
    process, port, _ = start()
    asked = {"prompt": "a", "max_tokens": 60_000, "temperature": 0, "stream": True}
    connection, answer = ask(port, "POST", "/v1/completions", asked)
    assert answer.read(5) == b"data:"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = answer.read().decode()
    assert process.wait(10) in (-signal.SIGTERM, 143) and time.monotonic() - started < 5
    assert "cancelled" in rest.strip().split("\n\n")[-1]
    assert "Traceback" not in process.stderr.read()
    connection.close()
