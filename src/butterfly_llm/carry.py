"""The carry: a narrow memory stream that rides the routing, one vector for each character.

Written as a pass starts and merged with the partner's lane after each level, it holds by the end of a pass
what the same lane of every earlier chunk has put in: a prefix scan in log depth.

Shapes: d hidden size, M carry size, G heads. Rows are (..., M), with heads (..., G + M): scores first.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.modules import Linear, RMSNorm


def lanes_of(rows: Tensor, heads: int) -> Tensor:
    """Rows (..., M) or (..., G + M) -> what is read of them (..., M)."""
    return rows[..., heads:]


def written(both: Tensor, heads: int, eps: float) -> Tensor:
    """What `CarryWrite` makes of its product: (..., 2M) -> (..., M), or (..., G + M) -> (..., G + M)."""
    if heads:
        values = both[..., heads:].unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
        values = F.rms_norm(values, values.shape[-1:], eps=eps)
        return torch.cat([both[..., :heads], values.flatten(-2)], -1)
    gate, value = both.chunk(2, -1)
    return torch.sigmoid(gate) * value


class CarryWrite(nn.Module):
    """What a character puts into the carry at the start of a pass.

    Gated: sigmoid(a) * b. With heads: a score for each head, then values of unit size.
    """

    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.carry_heads, config.norm_eps
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.linear = Linear(config.hidden_size, config.carry_size + (self.heads or config.carry_size))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., M), or with heads (..., G + M)."""
        return written(self.linear(self.norm(x)), self.heads, self.eps)


class CarryMerge(nn.Module):
    """One level of the scan over the same lane of the two chunks.

    Gated: m + sigmoid(W [m; partner] + 2) * partner. With heads: the mean of both by the softmax of their
    scores, the partner's lowered by `bias`; the new score is the logarithm of the sum. Either leaves m as it
    is where there is no partner.
    """

    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__()
        self.heads = config.carry_heads
        if self.heads:
            self.bias = nn.Parameter(torch.zeros(self.heads))
        else:
            self.linear = Linear(2 * config.carry_size, config.carry_size)
            nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, carry: Tensor, partner: Tensor) -> Tensor:
        """carry and partner (..., M) or (..., G + M) -> the same. No partner: zeros, scores of -inf."""
        if self.heads:
            own, far = carry[..., : self.heads].float(), partner[..., : self.heads].float() - self.bias
            ours, theirs = (
                z[..., self.heads :].unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
                for z in (carry, partner)
            )
            share = torch.sigmoid(far - own)[..., None].to(carry.dtype)
            merged = torch.lerp(ours, theirs, share)
            return torch.cat([torch.logaddexp(own, far).to(carry.dtype), merged.flatten(-2)], -1)
        gate = torch.sigmoid(self.linear(torch.cat([carry, partner], -1)))
        return carry + gate * partner
