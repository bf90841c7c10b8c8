"""Rotary positions inside a chunk pair: no angle exceeds two chunks, whatever the sequence length.

Queries and keys are rotated once, by their offset in the chunk, where they are projected; attention takes
them so, and turns only the query further, by one whole chunk, against the partner.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]
"""cos and signed sin (P, D) of rows (T, .), where P divides T: row r turns by entry r mod P."""


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


@lru_cache(maxsize=64)
def position_table(
    start: int, stop: int, head_dim: int, theta: float | None, dtype: torch.dtype, device: torch.device
) -> Angles:
    """Tables of positions start..stop-1, each (stop - start, D)."""
    with torch.inference_mode(False):
        cos, sin = rope_table(torch.arange(start, stop, device=device), head_dim, theta, dtype)
        return cos.squeeze(1), sin.squeeze(1)


def offset_angles(
    position: int | Tensor,
    batch: int,
    num_chars: int,
    *,
    chunk_size: int,
    head_dim: int,
    theta: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Angles | None:
    """Of the rows (B * N) that hold the characters position.. of each of B sequences: their offsets' angles.

    position: a tensor (B,) for sequences of one character that stand apart. float32 at least; None where
    theta is: nothing is rotated.
    """
    if theta is None:
        return None
    cos, sin = position_table(
        0, chunk_size, head_dim, theta, torch.promote_types(dtype, torch.float32), device
    )
    if isinstance(position, Tensor):
        at = position % chunk_size
        return cos[at], sin[at]
    offset = position % chunk_size
    if num_chars == 1:
        return cos[offset : offset + 1], sin[offset : offset + 1]
    if offset == 0 and num_chars % chunk_size == 0:
        return cos, sin
    at = (torch.arange(offset, offset + num_chars, device=device) % chunk_size).repeat(batch)
    return cos[at], sin[at]


def rotate_rows(x: Tensor, angles: Angles | None) -> Tensor:
    """x (T, H, D) rotated by the angles of its rows, in their precision, to the dtype of x."""
    if angles is None:
        return x
    cos, sin = angles
    rows = x.view(-1, len(cos), *x.shape[1:]).to(cos.dtype)
    return rotate(rows, cos[:, None], sin[:, None]).to(x.dtype).view(x.shape)
