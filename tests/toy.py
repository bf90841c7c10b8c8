"""A stand-in with the model's public methods, small enough to predict by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from butterfly_llm.config import ButterflyConfig


@dataclass
class ToyCache:
    position: int
    batch_size: int
    state: Tensor  # (B, 32)
    nbytes: int = 128
    logits: Tensor | None = None
    recent: bytes = b""


class Toy(nn.Module):
    """Logits are linear in a decaying sum of random vectors, one per character read."""

    def __init__(self, sharpness: float = 1.0, **config: Any) -> None:
        super().__init__()
        self.config = ButterflyConfig.preset("micro", **config)
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(256, 32, generator=generator))
        self.head = nn.Parameter(torch.randn(32, 256, generator=generator) * sharpness)
        self.widths: list[tuple[int, ...]] = []  # shapes that forward has been given

    def new_cache(self, batch_size: int = 1) -> ToyCache:
        return ToyCache(0, batch_size, torch.zeros(batch_size, 32))

    def _read(self, ids: Tensor, cache: ToyCache) -> Tensor:
        cache.state = cache.state * 0.7 + self.embed[ids.long()]
        cache.position += 1
        cache.logits = cache.state @ self.head
        return cache.logits

    def forward(self, ids: Tensor) -> Tensor:
        self.widths.append(tuple(ids.shape))
        cache = self.new_cache(ids.shape[0])
        return torch.stack([self._read(column, cache) for column in ids.unbind(1)], dim=1)

    def prefill(
        self, ids: Tensor, cache: ToyCache, *, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        for i, column in enumerate(ids.unbind(1)):
            logits = self._read(column, cache)
            if progress is not None:
                progress(i + 1)
        return logits

    def step(self, ids: Tensor, cache: ToyCache) -> Tensor:
        return self._read(ids, cache)
