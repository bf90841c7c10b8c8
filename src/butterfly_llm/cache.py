"""The state of a stream: per layer a ring of the last stride + 1 chunks of keys, values and carry.

The size is fixed by the schedule, not by how much has been read. Pages of the rings are committed by the
operating system when they are first written, so memory grows until the rings are full and then stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.routing import LayerRoute, schedule

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]


def routes_of(config: ButterflyConfig) -> tuple[LayerRoute, ...]:
    return schedule(
        config.num_local_layers, config.num_butterfly_layers, config.num_levels, config.num_refine_layers
    )


def cache_nbytes(config: ButterflyConfig, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a full cache."""
    values = 0
    for route in routes_of(config):
        row = 2 * config.num_kv_heads * config.head_dim
        if route.stage == "butterfly":
            row += config.carry_size
        values += (route.stride + 1) * config.chunk_size * row
    return batch_size * values * dtype.itemsize


@dataclass
class Cache:
    """B streams at one common position. S = stride + 1 slots, chunk c in slot c mod S."""

    config: ButterflyConfig
    position: int  # characters read so far
    keys: list[Tensor]  # per layer (B, Hkv, S, L, D), normalised and rotated by the offset in the chunk
    values: list[Tensor]  # per layer (B, Hkv, S, L, D)
    carries: list[Tensor | None]  # per layer (B, S, L, M) for butterfly layers with a carry, before the merge
    logits: Tensor | None = None  # (B, 256) float32 for the next character, once something is read
    recent: bytes = b""  # the last characters of a single stream, as far as `generate` has read them
    _arrays: list[Arrays] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def new(
        cls, config: ButterflyConfig, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> Cache:
        if not config.causal:
            raise ValueError("a bidirectional model (routing xor) cannot stream: use forward")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        memory.require(
            cache_nbytes(config, batch_size, dtype),
            str(device),
            f"the state of {batch_size} stream(s)",
            "use fewer streams, fewer key-value heads, fewer levels or bfloat16 rings",
        )
        keys, values, carries = [], [], []
        for route in routes_of(config):
            slots = route.stride + 1
            shape = (batch_size, config.num_kv_heads, slots, config.chunk_size, config.head_dim)
            keys.append(torch.zeros(shape, dtype=dtype, device=device))
            values.append(torch.zeros(shape, dtype=dtype, device=device))
            carried = route.stage == "butterfly" and config.carry_size > 0
            carry_shape = (batch_size, slots, config.chunk_size, config.carry_size)
            carries.append(torch.zeros(carry_shape, dtype=dtype, device=device) if carried else None)
        return cls(config, 0, keys, values, carries)

    def arrays(self) -> list[Arrays]:
        """Per layer keys, values (K, S, L, D) and carry (S, L, M) of one CPU stream, sharing memory."""
        if self._arrays is None:
            self._arrays = [
                (k[0].numpy(), v[0].numpy(), None if c is None else c[0].numpy())
                for k, v, c in zip(self.keys, self.values, self.carries, strict=True)
            ]
        return self._arrays

    def filled(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the state: of each ring a view of the slots written to, and the logits."""
        chunks = -(-self.position // self.config.chunk_size)
        for name, rings, axis in (
            ("keys", self.keys, 2),
            ("values", self.values, 2),
            ("carries", self.carries, 1),
        ):
            for layer, ring in enumerate(rings):
                if ring is not None and chunks:
                    yield f"{name}.{layer}", ring.narrow(axis, 0, min(chunks, ring.shape[axis]))
        if self.logits is not None:
            yield "logits", self.logits

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *(carry for carry in self.carries if carry is not None)]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the rings when full."""
        return sum(x.nbytes for x in self.tensors())

    def clone(self) -> Cache:
        """An independent copy: the two streams may continue differently."""
        return Cache(
            self.config,
            self.position,
            [x.clone() for x in self.keys],
            [x.clone() for x in self.values],
            [None if x is None else x.clone() for x in self.carries],
            self.logits,
            self.recent,
        )
