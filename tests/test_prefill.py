"""Slices of a stream by the fused kernel against the portable path: the same output, the same rings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm.ops.portable import prefill_attention
from butterfly_llm.ops.prefill import prefill_attention_triton
from butterfly_llm.rings import ForkedRing, QuantisedRing, Ring
from butterfly_llm.routing import Topology
from conftest import DEVICE, kernels
from test_triton_attention import TOLERANCE

HEADS, KV_HEADS, HEAD_DIM, CHUNK = 2, 1, 32, 16
Rings = tuple[Ring, Ring]


def empty(stride: int, dtype: torch.dtype = torch.float32, local: int = 0) -> Rings:
    shape = (2, KV_HEADS, max(stride, local) + 1, CHUNK, HEAD_DIM)
    return Ring(torch.zeros(shape, dtype=dtype, device=DEVICE)), Ring(
        torch.zeros(shape, dtype=dtype, device=DEVICE)
    )


def characters(count: int, seed: int) -> list[Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D), views into one tensor."""
    torch.manual_seed(seed)
    fused = torch.randn(2, count, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE)
    return list(fused.split([HEADS, KV_HEADS, KV_HEADS], 2))


def read(
    rings: Rings, twins: Rings, parts: list[int], stride: int, topology: Topology, local: int = 0
) -> None:
    """Slices one after the other into both, compared after each."""
    position = 0
    options: dict[str, Any] = {
        "stride": stride, "topology": topology, "rope_theta": 10000.0, "local": local
    }  # fmt: skip
    for seed, count in enumerate(parts):
        inputs = characters(count, seed)
        got = prefill_attention_triton(*inputs, rings, position=position, **options)
        want = prefill_attention(*inputs, twins, position=position, **options)
        assert (got - want).square().mean().sqrt() < TOLERANCE[torch.float32] * want.square().mean().sqrt()
        position += count
        last = range(max(0, -(-position // CHUNK) - stride - 1), -(-position // CHUNK))
        for ring, twin in zip(rings, twins, strict=True):
            rows = (ring.read(last) - twin.read(last)).flatten(2, 3)
            assert not rows[:, :, : position - last.start * CHUNK].any(), (position, count)


@kernels
@pytest.mark.parametrize(
    ("topology", "stride", "parts", "local"),
    [
        *(
            (topology, stride, parts, 0)
            for topology in ("shift", "xor_causal")
            for stride, parts in (
                (1, [48, 16, 33, 5, 40]),
                (2, [1, 30, 64, 17]),
                (4, [64, 64, 32, 3]),
                (8, [32, 32, 32, 96, 130]),
            )
        ),
        ("shift", 4, [64, 64, 32, 3], 1),
        ("shift", 2, [1, 30, 64, 17], 3),
        ("xor_causal", 4, [32, 37, 60], 2),
    ],
    ids=str,
)
def test_slices_of_a_stream(topology: Topology, stride: int, parts: list[int], local: int) -> None:
    rings, twins = (empty(stride, local=local) for _ in range(2))
    read(rings, twins, parts, stride, topology, local)


@kernels
@pytest.mark.parametrize("kind", ["half", "forked", "8 bits"])
def test_other_rings(kind: str) -> None:
    stride = 4
    if kind == "half":
        rings, twins = (empty(stride, torch.float16) for _ in range(2))
    elif kind == "8 bits":
        rings, twins = (
            tuple(
                QuantisedRing(torch.zeros(2, KV_HEADS, 2, CHUNK, HEAD_DIM, device=DEVICE), stride)
                for _ in "kv"
            )
            for _ in range(2)
        )
    else:
        rings, twins = (
            tuple(ForkedRing(base, base.window[:, :, :2].clone(), stride, 0) for base in empty(stride))
            for _ in range(2)
        )
    read(rings, twins, [80, 7, 25, 64], stride, "shift")


def test_spans_of_a_ring() -> None:
    """Chunks that lie side by side are a view; around the end, and apart, they are joined."""
    window = torch.arange(5.0).view(5, 1, 1)
    ring = Ring(window)
    assert ring.read([6, 7]).flatten().tolist() == [1, 2]
    assert ring.read([6, 7]).data_ptr() == window[1].data_ptr()
    assert ring.read(range(8, 12)).flatten().tolist() == [3, 4, 0, 1]
    assert ring.read([4, 6, 7]).flatten().tolist() == [4, 1, 2]
    ring.write(8, -torch.arange(8.0, 15).view(7, 1, 1))  # the last five of them
    assert window.flatten().tolist() == [-10, -11, -12, -13, -14]
    ring.write(14, torch.tensor([14.0, 15]).view(2, 1, 1))
    assert window.flatten().tolist() == [15, -11, -12, -13, 14]
