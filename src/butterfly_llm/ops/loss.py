"""Next-character loss without holding every logit at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _sum_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    slice_rows: int = 131072,
) -> Tensor:
    """Mean cross-entropy in nats of hidden (R, d) through weight (V, d) against targets (R,) integers.

    More than `slice_rows` rows are taken in slices whose logits are recomputed in the backward pass.
    `weights` (R,) makes it a weighted mean.
    """
    targets = targets.long()
    total = hidden.new_zeros((), dtype=torch.float32)
    if len(hidden) <= slice_rows:
        total = _sum_loss(hidden, weight, targets, weights)
    else:
        # split: its backward pass joins the gradients once, slices would each make one of full length
        rows, wanted = torch.split(hidden, slice_rows), torch.split(targets, slice_rows)
        shares = [None] * len(rows) if weights is None else torch.split(weights, slice_rows)
        for part in zip(rows, wanted, shares, strict=True):
            total = total + checkpoint(
                _sum_loss, part[0], weight, *part[1:], use_reentrant=False, preserve_rng_state=False
            )
    return total / (len(targets) if weights is None else weights.sum())
