"""One layer of a Butterfly: attention over the own and other chunks, then feed-forward.

Shapes: B batch, N characters, T rows, d hidden size, H heads, K key-value heads, D head size, M carry size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn as nn
from torch import Tensor

from butterfly_llm.carry import lanes_of
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.modules import FeedForward, Linear, RMSNorm
from butterfly_llm.ops import Backend, butterfly_attention
from butterfly_llm.ops.feed_forward import relu2_feed_forward, takes
from butterfly_llm.ops.rope import Angles, rotate_rows

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """Queries and keys, normalised and rotated by their offset in the chunk, and values.

    `memory`, the normalised carry, adds to keys and values. The rotation costs no pass over memory here, as
    it shares one with the norms; attention kernels would do it again for every block they read.
    """

    def __init__(self, config: ButterflyConfig, reads_carry: bool) -> None:
        super().__init__()
        self.config = config
        self.query_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, self.query_size + 2 * self.kv_size, bias=False)
        self.out = Linear(self.query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        gated = reads_carry and not config.carry_heads
        self.read_norm = RMSNorm(config.carry_size, config.norm_eps) if gated else None
        self.read = Linear(config.carry_size, 2 * self.kv_size, bias=False) if reads_carry else None
        nn.init.zeros_(self.out.weight)

    def project(self, x: Tensor, memory: Tensor | None, angles: Angles | None) -> QueryKeyValue:
        """x (T, d), memory (T, M) -> q (T, H, D), k and v (T, K, D)."""
        q, kv = self.qkv(x).split([self.query_size, 2 * self.kv_size], -1)
        if self.read is not None:
            assert memory is not None
            lanes = lanes_of(memory, self.config.carry_heads)
            kv = kv + self.read(lanes if self.read_norm is None else self.read_norm(lanes))
        k, v = kv.split(self.kv_size, -1)
        heads = (-1, self.config.head_dim)
        return (
            rotate_rows(self.q_norm(q.unflatten(-1, heads)), angles),
            rotate_rows(self.k_norm(k.unflatten(-1, heads)), angles),
            v.unflatten(-1, heads),
        )


class Layer(nn.Module):
    """Pre-norm attention over the own and the partner chunk, and chunks just before, then feed-forward."""

    def __init__(self, config: ButterflyConfig, reads_carry: bool, local: int | None = None) -> None:
        """local: chunks just before; None: `config.local_chunks`."""
        super().__init__()
        self.config = config
        self.local = config.local_chunks if local is None else local
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, reads_carry)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)
        # Both halves around the attention see characters as rows (T, .), whatever B, N and the stride are:
        # `Butterfly.compile_layers` puts compiled ones here that serve every layer and sequence length.
        self.project: Callable[..., QueryKeyValue] = Layer._project
        self.finish: Callable[[Layer, Tensor, Tensor, Backend | None], Tensor] = Layer._finish

    def forward(
        self, x: Tensor, memory: Tensor | None, angles: Angles | None, stride: int, backend: Backend | None
    ) -> Tensor:
        """x (B, N, d), memory (B, N, M) or None, angles of the B * N rows -> (B, N, d)."""
        shape = x.shape[:2]
        rows = None if memory is None else memory.flatten(0, 1)
        q, k, v = (z.view(*shape, *z.shape[1:]) for z in self.project(self, x.flatten(0, 1), rows, angles))
        y = self.attend(q, k, v, stride, backend)
        return self.finish(self, x.flatten(0, 1), y.flatten(0, 1), backend).view(x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stride: int, backend: Backend | None) -> Tensor:
        """q (B, N, H, D), k and v (B, N, K, D), as `project` makes them -> (B, N, H, D)."""
        return butterfly_attention(
            q,
            k,
            v,
            stride=stride,
            topology=self.config.routing,
            chunk_size=self.config.chunk_size,
            rope_theta=self.config.rope_theta,
            backend=backend,
            rotated=True,
            local=self.local,
        )

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters before and after the attention."""
        after = (self.attention.out, self.feed_forward_norm, self.feed_forward)
        finish = [parameter for module in after for parameter in module.parameters()]
        ids = set(map(id, finish))
        return [parameter for parameter in self.parameters() if id(parameter) not in ids], finish

    def stream(
        self,
        x: Tensor,
        memory: Tensor | None,
        stride: int,
        rings: tuple[Any, Any],
        position: int | Tensor,
        angles: Angles | None,
        attend: Callable[..., Tensor],
        backend: Backend,
    ) -> Tensor:
        """`forward` for the characters `position`.. of a stream: x (B, T, d), or (B, d) for a single one.

        attend: `prefill_attention` with rings; `step_attention` with their windows, or where streams stand
        apart (position (B,)) `step_attention_each`.
        """
        rows, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        lanes = None if memory is None else memory.reshape(-1, memory.shape[-1])
        y = attend(
            *(z.view(*shape, *z.shape[1:]) for z in self.project(self, rows, lanes, angles)),
            rings,
            position=position,
            stride=stride,
            topology=self.config.routing,
            rope_theta=self.config.rope_theta,
            local=self.local,
        )
        return self.finish(self, rows, y.reshape(-1, *y.shape[-2:]), backend).view(x.shape)

    def _project(self, x: Tensor, memory: Tensor | None, angles: Angles | None) -> QueryKeyValue:
        """x (T, d), memory (T, M) -> q (T, H, D), k and v (T, K, D)."""
        return self.attention.project(self.attention_norm(x), memory, angles)

    def _finish(self, x: Tensor, y: Tensor, backend: Backend | None) -> Tensor:
        """x (T, d), y (T, H, D) -> (T, d)."""
        x = x + self.attention.out(y.flatten(-2))
        norm, inner = self.feed_forward_norm, self.feed_forward
        if backend == "triton" and takes(x, self.config):
            return relu2_feed_forward(x, norm.weight, inner.up.weight, inner.down.weight, norm.eps)
        return cast(Tensor, x + inner(norm(x)))
