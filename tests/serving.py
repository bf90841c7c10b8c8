"""A server in the test's own process, and the pieces that its tests share."""
# ruff: noqa: E402

import asyncio
import contextlib
import gc
import json
import os
import time
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.engine import Engine
from butterfly_llm.generate import generate
from butterfly_llm.serve import create_app
from butterfly_llm.slots import Separate
from conftest import random_model

TOKEN = "correct-horse"
PROMPTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(8)]


ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = random_model(ButterflyConfig.preset("micro")).eval()
    with torch.no_grad():
        model.head.weight[0] = 0  # no character that ends the document, so that lengths are known
        model.head.weight *= 3
    return model


class Slow(Separate):
    """A step takes some time, as it does on a model of real size."""

    def __init__(self, model, seconds=0.0):
        super().__init__(model)
        self.seconds = seconds
        self.states = weakref.WeakSet()
        self.calls = []

    def fresh(self, base, **asked):
        cache = super().fresh(base, **asked)
        self.states.add(cache.keys[0])  # a Cache is not hashable; its first ring lives as long
        return cache

    def read(self, characters, cache):
        self.calls.append("read")
        return super().read(characters, cache)

    def step(self, characters, caches, shares=None):
        self.calls.append(f"step of {len(caches)}")
        time.sleep(self.seconds)
        return super().step(characters, caches, shares)

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
