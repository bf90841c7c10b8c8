"""Butterfly attention on plain PyTorch: chunks in the batch dimension of scaled_dot_product_attention.

Runs and trains on CPU and CUDA without Triton. Keys and values of a pair are copied side by side, one
chunk at a time of workspace per query chunk; nothing of size N x N. Queries and keys come rotated by their
offset in the chunk. `local` chunks before the own one are read as well; a partner farther back than that then
counts as `local` + 1 chunks back.

Shapes: B batch, N characters, C chunks, L characters in a chunk, H query heads, K key-value heads,
D head size, S ring slots (stride + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.ops.rope import position_table, rotate
from butterfly_llm.rings import Ring
from butterfly_llm.routing import Topology, partner_of


@lru_cache(maxsize=16)
def _pair_mask(chunk_size: int, causal: bool, device: torch.device) -> Tensor:
    """(L, 2L) bool: which keys of [partner, own] a query sees."""
    with torch.inference_mode(False):
        mask = torch.ones(chunk_size, 2 * chunk_size, dtype=torch.bool, device=device)
        return mask.tril(chunk_size) if causal else mask


def _to_chunks(x: Tensor, chunk_size: int, front: int = 0) -> Tensor:
    """(B, N, H, D) -> (B, C, H, L, D), zero-padded by `front` before and up to whole chunks after."""
    batch, num_chars, num_heads, head_dim = x.shape
    back = -(front + num_chars) % chunk_size
    if front or back:
        x = F.pad(x, (0, 0, 0, 0, front, back))
    return x.view(batch, -1, chunk_size, num_heads, head_dim).transpose(2, 3)


def _take(x: Tensor, ids: list[int]) -> Tensor:
    """Chunks `ids` (ascending) of x (B, C, ...): a view where they are consecutive."""
    if ids and ids[-1] - ids[0] == len(ids) - 1:
        return x[:, ids[0] : ids[-1] + 1]
    return x.index_select(1, torch.tensor(ids, dtype=torch.long, device=x.device))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """q (B, C, H, L, D), k and v (B, C, K, M, D), mask broadcastable to (B*C, 1, L, M) -> (B, C, H, L, D)."""
    batch, chunks, num_heads = q.shape[:3]
    if k.shape[2] != num_heads:
        k, v = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return y.view(batch, chunks, *y.shape[1:])


def _attend_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: Callable[[list[int]], tuple[Tensor, Tensor]] | None,
    first_chunk: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int,
) -> Tensor:
    """Chunks first_chunk.. of a causal stream: q (B, C, H, L, D), k and v (B, C, K, L, D), rotated.

    `history` reads keys and values (B, K, C, L, D) of chunks before first_chunk by their number.
    """
    if local:
        return _attend_several(q, k, v, history, first_chunk, stride, topology, rope_theta, local)
    chunks, chunk_size, head_dim = q.shape[1], q.shape[3], q.shape[4]
    with_partner, without, before, from_here = [], [], [], []
    for i in range(chunks):
        partner = partner_of(first_chunk + i, stride, topology)
        if partner < 0:
            without.append(i)
            continue
        with_partner.append(i)
        if partner < first_chunk:
            before.append(partner)
        else:
            from_here.append(partner - first_chunk)

    outputs = []
    if without:
        outputs.append(_attend(_take(q, without), _take(k, without), _take(v, without), None, is_causal=True))
    if with_partner:
        k_partner, v_partner = [], []
        if before:
            assert history is not None
            k_past, v_past = history(before)
            k_partner.append(k_past.transpose(1, 2).to(k.dtype))
            v_partner.append(v_past.transpose(1, 2).to(v.dtype))
        if from_here:
            k_partner.append(_take(k, from_here))
            v_partner.append(_take(v, from_here))
        # A key at offset j of the partner stands at j - L for the queries of this chunk.
        back = position_table(-chunk_size, 1 - chunk_size, head_dim, rope_theta, q.dtype, q.device)
        k_pair = torch.cat([rotate(torch.cat(k_partner, 1), *back), _take(k, with_partner)], 3)
        v_pair = torch.cat([torch.cat(v_partner, 1), _take(v, with_partner)], 3)
        mask = _pair_mask(chunk_size, True, q.device)
        outputs.append(_attend(_take(q, with_partner), k_pair, v_pair, mask))
    y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    order = without + with_partner
    if order != sorted(order):
        y = y.index_select(1, torch.tensor(order, device=y.device).argsort())
    return y


def _attend_several(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: Callable[[list[int]], tuple[Tensor, Tensor]] | None,
    first_chunk: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int,
) -> Tensor:
    """`_attend_causal` with `local` chunks before the own one."""
    batch, chunks, _, chunk_size, head_dim = q.shape
    numbers = range(first_chunk, first_chunk + chunks)
    # By how many chunks back they count: the chunks that are read, -1 where there is none.
    wanted = [[c - back if c >= back else -1 for c in numbers] for back in range(1, local + 1)]
    if stride > local:
        wanted.append([partner_of(c, stride, topology) for c in numbers])
    before = sorted({c for row in wanted for c in row if 0 <= c < first_chunk})
    k_all, v_all = k, v
    if before:
        assert history is not None
        k_all, v_all = (
            torch.cat([past.transpose(1, 2).to(x.dtype), x], 1)
            for past, x in zip(history(before), (k, v), strict=True)
        )
    place = {c: i for i, c in enumerate([*before, *numbers])}
    keys, values, exists = [], [], []
    for back, row in enumerate(wanted, 1):
        index = torch.tensor([place.get(c, 0) for c in row], device=q.device)
        at = -back * chunk_size
        table = position_table(at, at + 1, head_dim, rope_theta, q.dtype, q.device)
        keys.append(rotate(k_all.index_select(1, index), *table))
        values.append(v_all.index_select(1, index))
        exists.append(torch.tensor([c >= 0 for c in row], device=q.device)[:, None].expand(-1, chunk_size))
    own = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
    others = torch.cat(exists, 1)[:, None].expand(-1, chunk_size, -1)  # (C, L, M L)
    mask = torch.cat([others, own.expand(chunks, -1, -1)], 2)[:, None]  # (C, 1, L, (M + 1) L)
    return _attend(q, torch.cat([*keys, k], 3), torch.cat([*values, v], 3), mask.repeat(batch, 1, 1, 1))


def _attend_bidirectional(
    q: Tensor, k: Tensor, v: Tensor, num_chars: int, stride: int, rope_theta: float | None
) -> Tensor:
    """Every chunk with its xor partner, both sides: q (B, C, H, L, D), k and v (B, C, K, L, D), rotated."""
    batch, chunks, _, chunk_size, head_dim = q.shape
    device = q.device
    chunk = torch.arange(chunks, device=device)
    partner = chunk ^ stride
    exists = partner < chunks
    partner = torch.where(exists, partner, chunk)
    k_partner = k.index_select(1, partner)
    before = position_table(-chunk_size, 1 - chunk_size, head_dim, rope_theta, q.dtype, device)
    after = position_table(chunk_size, chunk_size + 1, head_dim, rope_theta, q.dtype, device)
    earlier = (partner < chunk)[:, None, None, None]
    turned = torch.where(earlier, rotate(k_partner, *before), rotate(k_partner, *after))
    real = (torch.arange(chunks * chunk_size, device=device) < num_chars).view(chunks, chunk_size)
    mask = torch.cat([real[partner] & exists[:, None], real], 1)[:, None, None, :]  # (C, 1, 1, 2L)
    k_pair = torch.cat([turned, k], 3)
    v_pair = torch.cat([v.index_select(1, partner), v], 3)
    return _attend(q, k_pair, v_pair, mask.repeat(batch, 1, 1, 1))


def butterfly_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    topology: Topology = "shift",
    chunk_size: int = 128,
    rope_theta: float | None = 10000.0,
    local: int = 0,
) -> Tensor:
    """q (B, N, H, D), k and v (B, N, Hkv, D) -> (B, N, H, D)."""
    num_chars = q.shape[1]
    q, k, v = (_to_chunks(x, chunk_size) for x in (q, k, v))
    if topology == "xor":
        y = _attend_bidirectional(q, k, v, num_chars, stride, rope_theta)
    else:
        y = _attend_causal(q, k, v, None, 0, stride, topology, rope_theta, local)
    return y.transpose(2, 3).flatten(1, 2)[:, :num_chars]


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rings: tuple[Ring, Ring],
    *,
    position: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """Attention of the characters `position`.. of a stream, whose keys and values are appended to the rings.

    q (B, T, H, D), k and v (B, T, K, D); rings of keys and values, windows (B, K, S, L, D), updated in place.
    Returns (B, T, H, D).
    """
    num_chars, chunk_size = q.shape[1], rings[0].window.shape[3]
    first_chunk, front = divmod(position, chunk_size)
    q, k, v = (_to_chunks(x, chunk_size, front) for x in (q, k, v))
    if front:
        for x, ring in zip((k, v), rings, strict=True):
            x[:, 0, :, :front] = ring.read([first_chunk])[:, :, 0, :front]

    def history(chunks: list[int]) -> tuple[Tensor, Tensor]:
        return rings[0].read(chunks), rings[1].read(chunks)

    y = _attend_causal(q, k, v, history, first_chunk, stride, topology, rope_theta, local)
    for x, ring in zip((k, v), rings, strict=True):
        ring.write(first_chunk, x.transpose(1, 2))
    return y.transpose(2, 3).flatten(1, 2)[:, front : front + num_chars]


def _against(
    q: Tensor, num_kv_heads: int, chunk_size: int, rope_theta: float | None, stride: int, local: int
) -> Tensor:
    """q (B, H, D) -> (B, K, R, H / K, D): as it is, for the own chunk, and turned for each other one."""
    q = q.view(len(q), num_kv_heads, -1, q.shape[-1])
    turned = [q]
    for back in range(1, local + 1 + (stride > local)):
        at = back * chunk_size
        table = position_table(at, at + 1, q.shape[-1], rope_theta, q.dtype, q.device)
        turned.append(rotate(q, *table))
    return torch.stack(turned, 2)


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: tuple[Tensor, Tensor],
    *,
    position: int,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """One character of a stream: q (B, H, D), k and v (B, K, D) -> (B, H, D); the rings are updated in place.

    The work is the same for every position, whether the partner exists or not.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    slots, chunk_size = ring[0].shape[2:4]
    chunk, offset = divmod(position, chunk_size)
    slot = chunk % slots
    against = _against(q, num_kv_heads, chunk_size, rope_theta, stride, local)  # (B, K, R, H / K, D)
    ring[0][:, :, slot, offset] = k
    ring[1][:, :, slot, offset] = v

    # With stride + 1 slots the partner c - stride lies in the slot after that of c, around the ring.
    if local:
        read = [slot, *((chunk - back) % slots for back in range(1, local + 1))]
        read += [(slot + 1) % slots] * (stride > local)
        k_read, v_read = (torch.stack([x[:, :, i] for i in read], 2) for x in ring)
    elif slot + 1 < slots:
        k_read, v_read = (x[:, :, slot : slot + 2] for x in ring)  # (B, K, 2, L, D)
    else:
        k_read, v_read = (torch.stack([x[:, :, slot], x[:, :, 0]], 2) for x in ring)
    scores = torch.matmul(against, k_read.transpose(-1, -2).to(q.dtype))  # (B, K, R, H / K, L)
    scores = scores.transpose(2, 3)  # (B, K, H / K, R, L)
    scores[:, :, :, 0, offset + 1 :] = float("-inf")
    for back in range(chunk + 1, local + 1):
        scores[:, :, :, back] = float("-inf")
    if stride > local and partner_of(chunk, stride, topology) < 0:
        scores[:, :, :, -1] = float("-inf")
    weights = (scores.flatten(3) * head_dim**-0.5).softmax(-1)  # (B, K, H / K, R L)
    return torch.matmul(weights, v_read.flatten(2, 3).to(q.dtype)).view(batch, num_heads, head_dim)


def _has_partner(chunk: Tensor, stride: int, topology: Topology) -> Tensor:
    """chunk (B,) -> bool (B,), for the causal topologies."""
    return chunk >= stride if topology == "shift" else chunk & stride != 0


def step_attention_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: tuple[Tensor, Tensor],
    *,
    position: Tensor,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
    shares: list[Tensor] | None = None,
) -> Tensor:
    """`step_attention` for streams that stand at positions of their own: position (B,) int64.

    No value of `position` reaches the host and no shape depends on it. Pairs are copied out of the rings.
    shares: gets (B,), the part of the attention, mean of the heads, that goes to the own chunk.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    slots, chunk_size = ring[0].shape[2:4]
    row = torch.arange(batch, device=q.device)
    chunk, offset = position // chunk_size, position % chunk_size
    slot = chunk % slots
    against = _against(q, num_kv_heads, chunk_size, rope_theta, stride, local)  # (B, K, R, H / K, D)
    ring[0][row, :, slot, offset] = k.to(ring[0].dtype)
    ring[1][row, :, slot, offset] = v.to(ring[1].dtype)

    read = [slot, *((chunk - back) % slots for back in range(1, local + 1))]
    later = torch.arange(chunk_size, device=q.device) > offset[:, None]  # (B, L)
    hidden = [later, *((chunk < back)[:, None].expand_as(later) for back in range(1, local + 1))]
    if stride > local:
        read.append((slot + 1) % slots)
        hidden.append(~_has_partner(chunk, stride, topology)[:, None].expand_as(later))
    index = torch.stack(read, 1)
    k_read, v_read = (x[row[:, None], :, index].transpose(1, 2).to(q.dtype) for x in ring)  # (B, K, R, L, D)
    scores = torch.matmul(against, k_read.transpose(-1, -2)).transpose(2, 3)  # (B, K, H / K, R, L)
    unseen = torch.stack(hidden, 1)[:, None, None]  # (B, 1, 1, R, L)
    weights = (scores.masked_fill(unseen, float("-inf")).flatten(3) * head_dim**-0.5).softmax(-1)
    if shares is not None:
        shares.append(weights[..., :chunk_size].sum(-1).mean((1, 2)))
    return torch.matmul(weights, v_read.flatten(2, 3)).view(batch, num_heads, head_dim)


def _nobody(x: Tensor, scores: int) -> Tensor:
    """A row (M,) like those of x (..., M) for a partner that there is not: zeros after scores of -inf."""
    row = x.new_zeros(x.shape[-1])
    row[:scores] = float("-inf")
    return row


def partner_rows(x: Tensor, stride: int, topology: Topology, chunk_size: int, *, scores: int = 0) -> Tensor:
    """x (B, N, M) -> (B, N, M): the same lane of the partner chunk.

    Where there is none: zeros, but -inf for the first `scores` values, which a softmax then leaves out.
    """
    num_chars = x.shape[1]
    shift = stride * chunk_size
    nobody = _nobody(x, scores)
    if topology == "shift":
        missing = nobody.expand(len(x), min(shift, num_chars), -1)
        return torch.cat([missing, x[:, : max(0, num_chars - shift)]], 1)
    position = torch.arange(num_chars, device=x.device)
    chunk = position // chunk_size
    source = ((chunk ^ stride) * chunk_size) + position % chunk_size
    exists = source < (position if topology == "xor_causal" else num_chars)
    return torch.where(exists[:, None], x[:, torch.where(exists, source, 0)], nobody)


def partner_rows_prefill(
    x: Tensor, ring: Ring, *, position: int, stride: int, topology: Topology, scores: int = 0
) -> Tensor:
    """`partner_rows` for the characters `position`.. of a causal stream; x is appended to the ring.

    x (B, T, M), window of the ring (B, S, L, M) -> (B, T, M).
    """
    batch, num_chars, _ = x.shape
    chunk_size = ring.window.shape[2]
    first_chunk, front = divmod(position, chunk_size)
    nobody = _nobody(x, scores)
    shift = stride * chunk_size
    start = position - shift  # the partner of the first character; before 0 there is none
    stop = start + min(num_chars, shift)
    missing = min(max(0, -start), stop - start)
    parts = [nobody.expand(batch, missing, -1)]
    if start + missing < stop:
        chunks = range((start + missing) // chunk_size, -(-stop // chunk_size))
        skipped = start + missing - chunks[0] * chunk_size
        past = ring.read(chunks).flatten(1, 2)  # (B, C * L, M)
        parts.append(past[:, skipped : skipped + stop - start - missing].to(x.dtype))
    partner = torch.cat([*parts, x[:, : max(0, num_chars - shift)]], 1)
    if topology == "xor_causal":
        steps = torch.arange(num_chars, device=x.device)
        reads = ((position + steps) // chunk_size) & stride != 0
        partner = torch.where(reads[:, None], partner, nobody)
    if front:
        x = torch.cat([ring.read([first_chunk])[:, 0, :front].to(x.dtype), x], 1)
    skipped, newest = last_chunks(x, chunk_size, ring)
    ring.write(first_chunk + skipped, newest)
    return partner


def last_chunks(x: Tensor, chunk_size: int, ring: Ring) -> tuple[int, Tensor]:
    """The chunks of x (B, T, ...) that a ring needs: how many are left out before them, (B, C, L, ...)."""
    batch, num_chars, *row = x.shape
    chunks = -(-num_chars // chunk_size)
    skipped = chunks - ring.needed(chunks)
    x = x[:, skipped * chunk_size :]
    if back := -num_chars % chunk_size:
        x = torch.cat([x, x.new_zeros(batch, back, *row)], 1)
    return skipped, x.view(batch, -1, chunk_size, *row)


def partner_row_step(
    x: Tensor, ring: Tensor, *, position: int, stride: int, topology: Topology, scores: int = 0
) -> Tensor:
    """`partner_rows_prefill` for one character: x (B, M) -> (B, M)."""
    slots, chunk_size = ring.shape[1:3]
    chunk, offset = divmod(position, chunk_size)
    ring[:, chunk % slots, offset] = x
    if partner_of(chunk, stride, topology) < 0:
        return _nobody(x, scores).expand_as(x)
    return ring[:, (chunk + 1) % slots, offset].to(x.dtype)


def partner_row_step_each(
    x: Tensor, ring: Tensor, *, position: Tensor, stride: int, topology: Topology, scores: int = 0
) -> Tensor:
    """`partner_row_step` for streams that stand at positions of their own: position (B,) int64."""
    slots, chunk_size = ring.shape[1:3]
    row = torch.arange(len(x), device=x.device)
    chunk, offset = position // chunk_size, position % chunk_size
    ring[row, chunk % slots, offset] = x.to(ring.dtype)
    partner = ring[row, (chunk + 1) % slots, offset].to(x.dtype)
    return torch.where(_has_partner(chunk, stride, topology)[:, None], partner, _nobody(x, scores))
