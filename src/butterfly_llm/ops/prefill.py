"""Attention of a slice of a stream by the fused kernel, which reads partners where they lie in the rings."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.ops.portable import last_chunks
from butterfly_llm.ops.triton_attention import Past, slice_attention_triton
from butterfly_llm.rings import Ring
from butterfly_llm.routing import Topology


def prefill_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rings: tuple[Ring, Ring],
    *,
    position: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """`prefill_attention` on a GPU. Nothing is copied but what the rings take in; the host waits for nothing.

    A slice that begins inside a chunk is joined to the rows of that chunk first.
    """
    chunk_size = rings[0].window.shape[-2]
    first, front = divmod(position, chunk_size)
    if front:
        k, v = (
            torch.cat([ring.read([first])[:, :, 0, :front].transpose(1, 2).to(x.dtype), x], 1)
            for x, ring in zip((k, v), rings, strict=True)
        )
        q = F.pad(q, (0, 0, 0, 0, front, 0))
    chunks = -(-q.shape[1] // chunk_size)
    before = range(max(0, first - stride), max(0, first - stride + min(chunks, stride)))
    (keys, turn), (values, _) = (ring.slots_of(before) for ring in rings)
    past = Past(keys, values, first, turn)
    if local:
        (keys, turn), (values, _) = (ring.slots_of(range(max(0, first - local), first)) for ring in rings)
        past = replace(past, near=(keys, values, turn))
    y = slice_attention_triton(
        q, k, v, past, stride=stride, topology=topology, rope_theta=rope_theta, local=local
    )[:, front:]
    for x, ring in zip((k, v), rings, strict=True):
        skipped, x = last_chunks(x, chunk_size, ring)
        ring.write(first + skipped, x.permute(0, 3, 1, 2, 4))  # (B, K, C, L, D)
    return y
