"""The decoding kernel against `step_attention` in float64: streams at different positions of one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm.ops.portable import step_attention
from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.ops.triton_step import step_attention_triton
from butterfly_llm.routing import Topology
from conftest import DEVICE, kernels
from test_triton_attention import TOLERANCE

HEADS, HEAD_DIM, CHUNK = 4, 32, 16


def relative(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt())


def rings(count: int, kv_heads: int, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (count, kv_heads, slots, CHUNK, HEAD_DIM)
    return torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape, device=DEVICE).to(dtype)


def turned(q: Tensor, k: Tensor, position: int, theta: float | None) -> list[Tensor]:
    """In float64, rotated by the offset."""
    table = rope_table(torch.tensor([position % CHUNK], device=DEVICE), HEAD_DIM, theta, torch.float64)
    return [rotate(x.double(), *table) for x in (q, k)]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, ring: tuple[Tensor, Tensor], positions: list[int], **options: Any
) -> Tensor:
    """Each stream by itself, in float64; the rings are updated."""
    rows = []
    for b, position in enumerate(positions):
        part = slice(b, b + 1)
        own = (ring[0][part], ring[1][part])
        rows.append(
            step_attention(
                *turned(q[part], k[part], position, options["rope_theta"]),
                v[part].double(),
                own,
                position=position,
                **options,
            )
        )
    return torch.cat(rows)


@kernels
@pytest.mark.parametrize("topology", ["shift", "xor_causal"])
@pytest.mark.parametrize(
    "stride, slots, local",
    [
        (1, 2, 0),
        (4, 5, 0),
        (4, 2, 0),
        (1 << 40, 2, 0),
        (1, 2, 1),
        (4, 5, 1),
        (4, 4, 2),
        (2, 4, 3),
        (16, 17, 11),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_streams_at_different_positions(
    topology: Topology, stride: int, slots: int, local: int, kv_heads: int
) -> None:
    torch.manual_seed(stride % 97 + kv_heads)
    positions = [0, 15, 16, 37, 1000, 70_001]
    dtype = torch.float32
    q = torch.randn(len(positions), HEADS, HEAD_DIM, device=DEVICE, dtype=dtype)
    fused = torch.randn(len(positions), 2 * kv_heads, HEAD_DIM, device=DEVICE, dtype=dtype)
    k, v = fused[:, :kv_heads], fused[:, kv_heads:]
    got_ring = rings(len(positions), kv_heads, slots, dtype)
    want_ring = (got_ring[0].double(), got_ring[1].double())
    before = got_ring[0].clone()
    options: dict[str, Any] = {
        "stride": stride, "topology": topology, "rope_theta": 10000.0, "local": local
    }  # fmt: skip
    position = torch.tensor(positions, device=DEVICE)
    got = step_attention_triton(q, k, v, got_ring, position=position, **options)
    want = one_by_one(q, k, v, want_ring, positions, **options)
    assert relative(got, want) < TOLERANCE[dtype]
    for mine, theirs in zip(got_ring, want_ring, strict=True):
        assert relative(mine, theirs) < TOLERANCE[dtype]
    assert (got_ring[0] != before).flatten(3).any(-1).sum() <= len(positions) * kv_heads  # one slot a head
    assert position.tolist() == positions


@kernels
def test_a_whole_stream_with_rings_in_half_precision() -> None:
    """Every offset of three chunks, rings of 16 bits below a float32 query, no rotation."""
    torch.manual_seed(0)
    ring = rings(1, 2, 3, torch.float16)
    twin = (ring[0].clone(), ring[1].clone())
    options: dict[str, Any] = {"stride": 2, "topology": "shift", "rope_theta": None}
    for position in range(0, 3 * CHUNK, 5):
        q, k, v = (torch.randn(1, heads, HEAD_DIM, device=DEVICE) for heads in (HEADS, 2, 2))
        got = step_attention_triton(
            q, k, v, ring, position=torch.tensor([position], device=DEVICE), **options
        )
        want = step_attention(q.double(), k.double(), v.double(), twin, position=position, **options)
        assert relative(got, want) < TOLERANCE[torch.float16]
        assert torch.equal(ring[0], twin[0])
        assert torch.equal(ring[1], twin[1])


@kernels
def test_operator_contract_of_a_step() -> None:
    q, k, v = (torch.randn(2, 2, HEAD_DIM, device=DEVICE) for _ in range(3))
    position = torch.tensor([3, 20], device=DEVICE)
    arguments = (q, k, v, *rings(2, 2, 2, torch.float32), position, 1, "shift", 10000.0, 0)
    torch.library.opcheck(torch.ops.butterfly.attention_step.default, arguments)


def test_errors_of_a_step_are_one_line() -> None:
    q = torch.zeros(2, 2, HEAD_DIM)
    ring = (torch.zeros(2, 2, 2, CHUNK, HEAD_DIM), torch.zeros(2, 2, 2, CHUNK, HEAD_DIM))
    options: dict[str, Any] = {"stride": 1, "topology": "shift", "rope_theta": None}
    with pytest.raises(ValueError, match=r"position \(1,\)"):
        step_attention_triton(q, q, q, ring, position=torch.zeros(1, dtype=torch.int64), **options)
    position = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot stream"):
        step_attention_triton(q, q, q, ring, position=position, **options | {"topology": "xor"})
    turned = (ring[0].transpose(2, 3), ring[1])
    with pytest.raises(ValueError, match="ring of keys"):
        step_attention_triton(q, q, q, turned, position=position, **options)
