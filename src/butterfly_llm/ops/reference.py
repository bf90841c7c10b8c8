"""Butterfly attention written for the reader: dense N x N scores, any dtype including float64.

The fast backends are judged against this file alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.routing import Topology, partner_of


def butterfly_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    topology: Topology = "shift",
    chunk_size: int = 128,
    rope_theta: float | None = 10000.0,
    rotated: bool = False,
    local: int = 0,
) -> Tensor:
    """q (B, N, H, D), k and v (B, N, Hkv, D) -> (B, N, H, D). O(N^2) time and memory.

    rotated: q and k come rotated by their offset in the chunk. local: chunks before the own one read as well.
    """
    num_chars, num_heads, head_dim = q.shape[1:]
    group = num_heads // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))

    position = torch.arange(num_chars, device=q.device)
    chunk, offset = position // chunk_size, position % chunk_size
    partner = torch.tensor([partner_of(int(c), stride, topology) for c in chunk], device=q.device)
    own = chunk[:, None] == chunk[None, :]  # (N, N), query by key
    if topology != "xor":
        own &= position[:, None] >= position[None, :]
    # A partner among the local chunks is read as one of them.
    across = (partner[:, None] == chunk[None, :]) & (stride > local)

    def scores(query_turn: Tensor) -> Tensor:
        return torch.einsum(
            "bqhd,bkhd->bhqk",
            rotate(q, *rope_table(query_turn, head_dim, rope_theta, q.dtype)),
            rotate(k, *rope_table(turn, head_dim, rope_theta, q.dtype)),
        )

    # The partner counts as the chunk just before the local ones, or just after when it lies later.
    turn = torch.zeros_like(offset) if rotated else offset
    further = turn + (local + 1) * chunk_size * torch.sign(chunk - partner)
    visible, seen = torch.where(own, scores(turn), scores(further)), own | across
    for back in range(1, local + 1):
        near = chunk[:, None] == chunk[None, :] + back
        visible, seen = torch.where(near, scores(turn + back * chunk_size), visible), seen | near
    weights = (visible / head_dim**0.5).masked_fill(~seen, float("-inf")).softmax(-1)  # (B, H, N, N)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
