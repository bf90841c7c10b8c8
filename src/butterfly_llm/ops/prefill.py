"""Attention of a whole slice of a stream in one call of `butterfly_attention`, for the fused kernels.

The partners that lie before the slice are fetched from the rings and set in front of it. They are as many as
the slice has chunks, or as the stride is long, and that number is the stride of the joined sequence: no chunk
is copied twice, and what a slice needs does not depend on how much was read before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.ops.portable import prefill_attention
from butterfly_llm.rings import Ring
from butterfly_llm.routing import Topology


def prefill_attention_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rings: tuple[Ring, Ring],
    *,
    position: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    """`prefill_attention` through attend(q, k, v, stride), the `butterfly_attention` of a model's layer.

    A slice of which some chunks have a partner before it and others have none goes to
    `prefill_attention`; slices of a power of two chunks from a multiple of their length never do.
    """
    num_chars = q.shape[1]
    chunk_size, head_dim = rings[0].window.shape[-2:]
    first, front = divmod(position, chunk_size)
    chunks = -(-(front + num_chars) // chunk_size)
    count = min(chunks, stride)  # chunks whose partner, if there is one, lies before the slice
    alone = first + count <= stride
    if topology != "shift" or not (alone or first >= stride):
        return prefill_attention(
            q, k, v, rings, position=position, stride=stride, topology=topology, rope_theta=rope_theta
        )
    before = 0 if alone else count

    def joined(x: Tensor, ring: Ring) -> Tensor:
        """x (B, T, K, D) behind the partners and the characters of its first chunk that are in the ring."""
        parts = []
        if before:
            parts.append(ring.read(range(first - stride, first - stride + before)))  # (B, K, C, L, D)
        if front:
            parts.append(ring.read([first])[..., :front, :])
        return torch.cat([*(part.to(x.dtype).permute(0, 2, 3, 1, 4).flatten(1, 2) for part in parts), x], 1)

    k_all, v_all = joined(k, rings[0]), joined(v, rings[1])
    added = k_all.shape[1] - num_chars
    q_all = F.pad(q, (0, 0, 0, 0, added, 0)) if added else q
    y = attend(q_all, k_all, v_all, before or stride)[:, added:]

    own = added - front
    for x, ring in ((k_all, rings[0]), (v_all, rings[1])):
        x = F.pad(x[:, own:], (0, 0, 0, 0, 0, -(front + num_chars) % chunk_size))
        x = x.view(len(x), chunks, chunk_size, -1, head_dim).permute(0, 3, 1, 2, 4)  # (B, K, C, L, D)
        ring.write(first, x)
    return y
