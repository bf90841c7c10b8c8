"""The parts that a layer is made of: linear maps, norms, the feed-forward network."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.config import ButterflyConfig


class Linear(nn.Linear):
    """float32 master weights, computed in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class FeedForward(nn.Module):
    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        self.up = Linear(config.hidden_size, config.intermediate_size * (2 if self.gated else 1), bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return cast(Tensor, self.down(F.silu(gate) * x))
        return cast(Tensor, self.down(F.relu(x).square()))
