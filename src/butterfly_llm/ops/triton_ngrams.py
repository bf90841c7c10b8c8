"""One character a stream on CUDA, embedded with what followed its n-grams before, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from butterfly_llm import ngrams
from butterfly_llm.ngrams import NgramState


def ngram_rows(ids: Tensor, positions: Tensor, state: NgramState, embed: Tensor, ngram: Tensor) -> Tensor:
    """ids and positions (B,) int64, tables (256, d) and (O * K * 257, d) -> (B, d), the sums before the norm.

    The lookup is `ngrams.step`, bit by bit; the state is brought up to date. ValueError for a state that is
    not contiguous or of other streams.
    """
    from butterfly_llm.ops.triton_ngrams_kernel import ngram_kernel

    batch, contexts = len(state.entries), state.contexts
    held = (state.entries, state.history, state.undo)
    if batch != len(ids) or not all(tensor.is_contiguous() for tensor in held):
        raise ValueError(
            f"ngram_rows: n-grams of {batch} streams for {len(ids)}: expected as many, and contiguous"
        )
    factors, orders, _ = ngrams.on_device(contexts, ids.device)
    width = embed.shape[1]
    out = embed.new_empty(batch, width)
    with torch.cuda.device_of(ids):  # type: ignore[no-untyped-call]
        ngram_kernel[(batch,)](
            ids.contiguous(), positions.contiguous(), state.history, state.entries, state.undo, factors,
            orders, embed, ngram, out,
            WIDTH=width, ORDERS=len(contexts.orders), WORDS=contexts.words, RANKS=contexts.ranks,
            SLOTS=contexts.slots, R=ngrams.HISTORY, MIX=ngrams.MIX, BASE=ngrams.BASE,
            BLOCK=1 << (width - 1).bit_length(), num_warps=4,
        )  # fmt: skip
    return out
