"""Rotary positions inside a chunk pair: no angle exceeds two chunks, whatever the sequence length."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, head_dim: int, theta: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of each position's angles, both (P, 1, head_dim), for `rotate`.

    Dimension t < head_dim / 2 is paired with t + head_dim / 2 and turns by position * theta^(-2t / head_dim).
    `theta` None gives the identity.
    """
    half = head_dim // 2
    if theta is None:
        frequency = torch.zeros(half, dtype=torch.float64, device=positions.device)
    else:
        exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
        frequency = theta**-exponent
    angle = positions.double()[:, None, None] * frequency  # (P, 1, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., D) by tables of `rope_table` that broadcast against it."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
