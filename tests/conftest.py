"""Shared pieces of the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import triton_attention
from butterfly_llm.recall import Place

# Where the kernels run: on a GPU, or on the CPU under Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
kernels = pytest.mark.skipif(
    triton_attention.status() != "available", reason="no GPU and no interpreter here"
)

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker keeps one core busy, with the processes that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def patch_once() -> None:
    """Triton's interpreter rewrites its language again at each call of a helper, a quarter of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    done: set[tuple[bool, bool]] = set()

    def patched(fn: Callable[..., object]) -> interpreter._LangPatchScope:
        seen = fn.__globals__.values()
        which = (any(x is language for x in seen), any(x is language.core for x in seen))
        if which not in done:
            patch(fn)  # never undone: in this process every kernel is interpreted
            done.add(which)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched


if INTERPRETED and triton_attention.status() == "available":
    patch_once()


# With -n these files come first, test by test, so that no long one is left to the end; of the others a worker
# takes each as a whole, since its tests share models.
LONGEST = ("test_interpreter.py", "test_relay.py", "test_train.py", "test_triton_cards.py", "test_model.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.rpartition("/")[2] in LONGEST else file

    config.option.loadscopereorder = False  # the order of the tests, as sorted below
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Where other threads of the test need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def benchmark(name: str) -> ModuleType:
    """The script benchmarks/`name`.py as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def random_model(config: ButterflyConfig, seed: int = 0) -> Butterfly:
    """A model whose zero-initialised matrices are filled too, so that every path carries signal."""
    torch.manual_seed(seed)
    model = Butterfly(config)
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def phrases(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Texts (batch, length) of six words, the same for every seed: what an n-gram was followed by is found.

    No separator, which would end a text.
    """
    words = [torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in range(3, 9)]
    drawn = torch.randint(len(words), (batch, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([torch.cat([words[word] for word in row])[:length] for row in drawn])


def within(max_slots: int) -> Place:
    """Anywhere in the window, at most `max_slots` apart."""

    def place(generator: np.random.Generator, slots: int) -> tuple[int, int] | None:
        fact = int(generator.integers(0, slots - 1))
        return fact, int(generator.integers(fact + 1, min(slots, fact + max_slots + 1)))

    return place


def chunk_error(actual: Tensor, expected: Tensor, chunk_size: int, floor: float = 0.1) -> float:
    """RMS error over RMS reference per chunk of dimension 1, maximum taken: one wrong chunk cannot hide.

    References below `floor` count as `floor` (a query with one key has gradient zero).
    """
    if torch.isnan(actual).any():
        return float("nan")
    errors = (actual.double() - expected.double()).square().split(chunk_size, 1)
    references = expected.double().square().split(chunk_size, 1)
    ratios = [
        e.mean().sqrt() / r.mean().sqrt().clamp_min(floor) for e, r in zip(errors, references, strict=True)
    ]
    return torch.stack(ratios).max().item()
