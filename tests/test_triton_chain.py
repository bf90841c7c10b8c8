"""The backward pass in one kernel against the dense float64 reference, and repeated: chains of every length.

Runs natively on a GPU, else under the interpreter (`test_interpreter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from butterfly_llm.ops import triton_attention
from butterfly_llm.ops.triton_attention import Tiles, butterfly_attention_triton
from conftest import CUDA, INTERPRETED, chunk_error, kernels
from test_triton_attention import TOLERANCE, Case, check, make, poisoned, run

__all__ = ["poisoned"]

Walk = Callable[..., None]


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Make the backward pass walk segments of so many chunks, queries in blocks of so many."""

    def force(segment: int, block_m: int, num_warps: int = 8) -> None:
        triton_attention.FORCED_TILES["chain"] = Tiles(block_m, 0, num_warps, 1, segment=segment)

    yield force
    triton_attention.FORCED_TILES.clear()


def case(length: int, stride: int, chunk: int = 16, heads: int = 1, batch: int = 1, dim: int = 32) -> Case:
    return Case("shift", length, chunk, stride, heads=heads, kv_heads=heads, head_dim=dim, batch=batch)


CASES = [
    (case(1, 1, heads=2, batch=2), 2),
    (case(15, 1, batch=2), 2),
    (case(16, 2), 4),
    (case(17, 1, heads=2, batch=2, dim=64), 2),
    (case(63, 2, heads=2), 2),
    (case(63, 1 << 40), 2),
    (case(64, 4, batch=2), 4),
    (case(127, 4), 2),
    (case(129, 1), 4),
    (case(161, 2, heads=2), 2),
    (case(161, 1, chunk=32), 2),
    (case(500, 4), 2),
    (case(500, 1), 64),
]
NAMES = [f"{c.length}-chunk{c.chunk_size}-stride{c.stride}-segment{segment}" for c, segment in CASES]


@kernels
@pytest.mark.parametrize("case, segment", CASES, ids=NAMES)
def test_float32_matches_the_reference(case: Case, segment: int, walk: Walk, poisoned: None) -> None:
    walk(segment, 16)
    check(case, torch.float32)


@kernels
@pytest.mark.parametrize("case, segment", CASES[3:10:3], ids=NAMES[3:10:3])
def test_float16_matches_the_reference(case: Case, segment: int, walk: Walk, poisoned: None) -> None:
    walk(segment, 16)
    check(case, torch.float16)


@kernels
@pytest.mark.parametrize("block_m", [32, 64, 128])
def test_chunks_of_128(block_m: int, walk: Walk, poisoned: None) -> None:
    walk(2, block_m)
    check(case(2 * 128 + 65, 1, chunk=128, dim=64), torch.float16)


@kernels
def test_repeated_runs_are_identical(walk: Walk) -> None:
    walk(2, 16)
    fused, grad = make(case(81, 1, heads=2), torch.float16)
    first, second = (run(butterfly_attention_triton, fused, grad, case(81, 1, heads=2)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@kernels
def test_one_launch_where_it_is_asked_for_and_can_serve(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = triton_attention._launch

    def count(which: triton_attention.Pass, *arguments: Any, **options: Any) -> None:
        launched.append(which)
        launch(which, *arguments, **options)

    monkeypatch.setattr(triton_attention, "_launch", count)

    def backward(case: Case) -> list[str]:
        launched.clear()
        run(butterfly_attention_triton, *make(case, torch.float32), case)
        return launched[1:]

    two = ["query_gradient", "key_gradient"]
    assert backward(case(17, 1)) == two
    walk(2, 16)
    assert backward(case(17, 1)) == ["chain"]
    assert backward(Case("shift", 17, 16, 1, heads=2)) == two
    assert backward(Case("xor_causal", 17, 16, 1)) == two


gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA or INTERPRETED, reason="needs a GPU")]
GPU_TILES = [
    Tiles(64, 0, 8, 1, segment=4),
    Tiles(64, 0, 8, 1, segment=8, fetch=True),
    Tiles(32, 0, 8, 1, segment=4, fetch=True),
    Tiles(128, 0, 16, 1, segment=2, fetch=True),
]


@pytest.mark.parametrize("stride", [1, 32, 1000])
@pytest.mark.parametrize("cut", [pytest.param(cut, marks=gpu) for cut in GPU_TILES])
def test_gpu_agrees_with_two_kernels(cut: Tiles, stride: int, walk: Walk, poisoned: None) -> None:
    """At about 65,536 characters, the last chunk a part of one; and twice the same bits."""
    shape = case((1 << 16) - 47, stride, chunk=128, heads=4, dim=64)
    fused, grad = make(shape, torch.bfloat16)
    want = run(butterfly_attention_triton, fused, grad, shape)
    triton_attention.FORCED_TILES["chain"] = cut
    got, again = (run(butterfly_attention_triton, fused, grad, shape) for _ in range(2))
    for name in want:
        assert torch.equal(got[name], again[name]), name
        assert chunk_error(got[name], want[name], 128) < TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("fetch", [pytest.param(fetch, marks=gpu) for fetch in (False, True)])
def test_gpu_rows_beyond_two_to_the_31_elements(fetch: bool, walk: Walk) -> None:
    """The end of a long sequence has the gradients that it has by itself, bit for bit."""
    heads, dim, stride, segment = 32, 64, 2, 4
    tail = 4 * segment * stride * 128  # whole segments, so that all is added in the same order
    length = (1 << 31) // (heads * dim) // tail * tail + 2 * tail
    q = torch.randn(1, tail, heads, dim, device="cuda").bfloat16().repeat(1, length // tail, 1, 1)
    assert q.numel() > 1 << 31
    triton_attention.FORCED_TILES["chain"] = Tiles(64, 0, 8, 1, segment=segment, fetch=fetch)
    options = case(length, stride, chunk=128).options()
    o, lse = torch.ops.butterfly.attention_fwd(q, q, q, *options.values())
    found = torch.ops.butterfly.attention_bwd(q, q, q, q, o, lse, *options.values())
    parts = [x[:, -tail:].contiguous() for x in (q, o)]
    short = torch.ops.butterfly.attention_bwd(
        parts[0], *parts[:1] * 3, parts[1], lse[..., -tail:].contiguous(), *options.values()
    )
    seen = tail - stride * 128  # the first chunks of the tail lack their partners
    for name, got, want in zip(("dq", "dk", "dv"), found, short, strict=True):
        assert torch.equal(got[:, -seen:], want[:, -seen:]), name
