"""One decoding step on CUDA: a key and a value go into each stream's rings, a query reads chunks of them.

`butterfly::attention_step` takes the positions as a device tensor, one a stream: a captured CUDA graph can be
replayed for every character, and the streams of a batch may stand anywhere. Unlike the other operators it
takes queries and keys that are not rotated yet: launches are what a step costs, so the kernel does it too.

Shapes: B streams, H query heads, K key-value heads, D head size, L characters in a chunk, S slots of a ring.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from butterfly_llm.ops.rope import position_table
from butterfly_llm.routing import Topology


@lru_cache(maxsize=16)
def _angle_table(positions: int, head_dim: int, theta: float | None, device: torch.device) -> Tensor:
    """cos and sin (2, positions, D / 2) float32 of the positions from 0."""
    with torch.inference_mode(False):
        cos, sin = position_table(0, positions, head_dim, theta, torch.float32, device)
        return torch.stack([cos[:, head_dim // 2 :], sin[:, head_dim // 2 :]]).contiguous()


@torch.library.custom_op("butterfly::attention_step", mutates_args=("ring_keys", "ring_values"))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    position: Tensor,
    stride: int,
    topology: str,
    rope_theta: float | None,
    local: int,
) -> Tensor:
    from butterfly_llm.ops.triton_step_kernel import step_kernel

    batch, num_heads, head_dim = q.shape
    num_kv_heads, slots, chunk_size = ring_keys.shape[1:4]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o = q.new_empty((batch, num_heads, head_dim))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        step_kernel[(batch * num_kv_heads,)](
            q, k, v, ring_keys, ring_values, position, o,
            _angle_table((local + 2) * chunk_size, head_dim, rope_theta, q.device),
            *(x.stride(axis) for x in (q, k, v) for axis in range(2)),
            ring_keys.stride(0), ring_values.stride(0), slots, min(stride, 1 << 30),
            KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, D=head_dim, CHUNK=chunk_size,
            SCALE=head_dim**-0.5 * math.log2(math.e), TOPOLOGY=topology, ROTATE=rope_theta is not None,
            LOCAL=local,
            num_warps=8 if chunk_size >= 128 else 4,
        )  # fmt: skip
    return o


@_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    position: Tensor,
    stride: int,
    topology: str,
    rope_theta: float | None,
    local: int,
) -> Tensor:
    return q.new_empty(tuple(q.shape))


def step_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: tuple[Tensor, Tensor],
    *,
    position: Tensor,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """One character a stream: q (B, H, D), k and v (B, K, D) -> (B, H, D); the rings are updated in place.

    ring: keys (rotated by their offset) and values, (B, K, S, L, D), each stream's part contiguous.
    position (B,) int64 on the device: characters that each stream has read; it is not changed.
    local: chunks just before the own one that are read too; S is then max(stride, local) + 1 at least.
    ValueError for shapes and layouts that do not fit.
    """
    keys, values = ring
    if position.shape != q.shape[:1] or position.dtype != torch.int64:
        raise ValueError(
            f"step: position {tuple(position.shape)} {position.dtype}: expected ({q.shape[0]},) torch.int64"
        )
    if topology == "xor":
        raise ValueError("step: a bidirectional layer (routing xor) cannot stream")
    for name, x in (("keys", keys), ("values", values)):
        if not x[0].is_contiguous() or x.shape[0] != q.shape[0]:
            raise ValueError(
                f"step: ring of {name} {tuple(x.shape)}: expected contiguous ({q.shape[0]}, K, S, L, D)"
            )
    y: Tensor = _step(q, k, v, keys, values, position, stride, topology, rope_theta, local)
    return y
