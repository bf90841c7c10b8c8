# mypy: ignore-errors
"""Triton kernel of one decoding step: a query against the chunks of its ring, launched by `triton_step`.

One program per (stream, key-value head). Everything is float32 inside; names are those of `triton_kernels`.
"""

import triton
import triton.language as tl


@triton.jit
def _turned_row(x_ptr, table_ptr, position, ENTRIES: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr):
    """Both halves (HALF,) of a row, float32, turned by its position, of which the table has ENTRIES."""
    t = tl.arange(0, HALF)
    x1 = tl.load(x_ptr + t).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + t).to(tl.float32)
    if ROTATE:
        entries = table_ptr + position * HALF + t
        cos = tl.load(entries)
        sin = tl.load(entries + ENTRIES * HALF)
        y1 = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = y1
    return x1, x2


@triton.jit
def _rows(ring_ptr, j, last, D: tl.constexpr):
    """Rows j of a chunk (rows, D) in float32, those before `last`; zero beyond."""
    x_ptrs = ring_ptr + j[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(x_ptrs, mask=j[:, None] < last, other=0.0).to(tl.float32)


@triton.jit
def _rows_half(ring_ptr, j, last, D: tl.constexpr, FIRST: tl.constexpr):
    HALF: tl.constexpr = D // 2
    x_ptrs = ring_ptr + j[:, None] * D + FIRST + tl.arange(0, HALF)[None, :]
    return tl.load(x_ptrs, mask=j[:, None] < last, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["slots", "stride"])
def step_kernel(
    q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, position_ptr, o_ptr, table_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_rk, stride_rv, slots, stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """o (B, H, D); the key and the value of this step are put into the rings (B, K, S, L, D).

    stride_rk, stride_rv: elements from one stream to the next. The own chunk lies in slot c mod S, the
    partner in the slot after it, LOCAL chunks in those before it, around the ring. SCALE includes log2(e).
    """
    HALF: tl.constexpr = D // 2
    ENTRIES: tl.constexpr = (LOCAL + 2) * CHUNK
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    batch = (pid // KV_HEADS).to(tl.int64)
    position = tl.load(position_ptr + batch)
    chunk = position // CHUNK
    offset = (position % CHUNK).to(tl.int32)
    exists = chunk >= stride if TOPOLOGY == "shift" else (chunk & stride) != 0
    if LOCAL > 0:
        exists = exists & (stride > LOCAL)
    own = ((kv_head * slots).to(tl.int64) + chunk % slots) * (CHUNK * D)
    far = ((kv_head * slots).to(tl.int64) + (chunk + 1) % slots) * (CHUNK * D)
    ring_k = ring_k_ptr + batch * stride_rk
    ring_v = ring_v_ptr + batch * stride_rv
    kind = ring_k_ptr.dtype.element_ty

    # The new row goes to the ring and, from registers, to the scores: nothing waits for memory.
    t = tl.arange(0, HALF)
    new1, new2 = _turned_row(
        k_ptr + batch * stride_kb + kv_head * stride_kh, table_ptr, offset, ENTRIES, HALF, ROTATE
    )
    new1 = new1.to(kind)
    new2 = new2.to(kind)
    new_v = tl.load(v_ptr + batch * stride_vb + kv_head * stride_vh + tl.arange(0, D)).to(kind)
    tl.store(ring_k + own + offset * D + t, new1)
    tl.store(ring_k + own + offset * D + HALF + t, new2)
    tl.store(ring_v + own + offset * D + tl.arange(0, D), new_v)

    j = tl.arange(0, CHUNK)
    newest = j[:, None] == offset
    last = tl.where(exists, CHUNK, 0)
    ka1 = tl.where(newest, new1.to(tl.float32)[None, :], _rows_half(ring_k + own, j, offset, D, 0))
    ka2 = tl.where(newest, new2.to(tl.float32)[None, :], _rows_half(ring_k + own, j, offset, D, HALF))
    kb1 = _rows_half(ring_k + far, j, last, D, 0)
    kb2 = _rows_half(ring_k + far, j, last, D, HALF)
    va = tl.where(newest, new_v.to(tl.float32)[None, :], _rows(ring_v + own, j, offset, D))
    vb = _rows(ring_v + far, j, last, D)

    for g in tl.static_range(GROUP):
        head = kv_head * GROUP + g
        q_row = q_ptr + batch * stride_qb + head * stride_qh
        qa1, qa2 = _turned_row(q_row, table_ptr, offset, ENTRIES, HALF, ROTATE)
        qb1, qb2 = _turned_row(q_row, table_ptr, offset + (LOCAL + 1) * CHUNK, ENTRIES, HALF, ROTATE)
        sa = tl.sum(ka1 * qa1[None, :] + ka2 * qa2[None, :], 1) * SCALE
        sb = tl.sum(kb1 * qb1[None, :] + kb2 * qb2[None, :], 1) * SCALE
        sa = tl.where(j <= offset, sa, float("-inf"))
        sb = tl.where(j < last, sb, float("-inf"))
        top = tl.maximum(tl.max(sa, 0), tl.max(sb, 0))
        wa = tl.exp2(sa - top)
        wb = tl.exp2(sb - top)
        o = tl.sum(wa[:, None] * va + wb[:, None] * vb, 0)
        total = tl.sum(wa, 0) + tl.sum(wb, 0)
        for near in range(1, LOCAL + 1):
            last_n = tl.where(chunk >= near, CHUNK, 0)
            in_ring = ((kv_head * slots).to(tl.int64) + (chunk + slots - near) % slots) * (CHUNK * D)
            qn1, qn2 = _turned_row(q_row, table_ptr, offset + near * CHUNK, ENTRIES, HALF, ROTATE)
            kn1 = _rows_half(ring_k + in_ring, j, last_n, D, 0)
            kn2 = _rows_half(ring_k + in_ring, j, last_n, D, HALF)
            sn = tl.sum(kn1 * qn1[None, :] + kn2 * qn2[None, :], 1) * SCALE
            sn = tl.where(j < last_n, sn, float("-inf"))
            higher = tl.maximum(top, tl.max(sn, 0))
            wn = tl.exp2(sn - higher)
            shrink = tl.exp2(top - higher)
            o = o * shrink + tl.sum(wn[:, None] * _rows(ring_v + in_ring, j, last_n, D), 0)
            total = total * shrink + tl.sum(wn, 0)
            top = higher
        o = o / total
        row = (batch * KV_HEADS + kv_head) * GROUP + g
        tl.store(o_ptr + row * D + tl.arange(0, D), o.to(o_ptr.dtype.element_ty))
