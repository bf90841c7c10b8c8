# mypy: ignore-errors
"""Triton kernels of butterfly attention that take a whole chunk at a time, launched by `triton_attention`.

One program per (chunk, head, batch) brings the keys and values of the chunk and of its partner into shared
memory once, rotates each key once, and works through the queries in SPLIT tiles. Both chunks of a pair use
one table of angles: a query turns by its offset against the own chunk, and by a fixed further turn of one
chunk against the partner; keys only ever turn by their offset. ROTATE 0: nothing turns; 1: everything turns
here; 2: queries and keys come turned by their offsets and only the further turn is made here. Names are those
of `triton_kernels`.
"""

import triton
import triton.language as tl

from butterfly_llm.ops.triton_kernels import _chunk_pointer, _dot, _dot_add, _partner, _place


@triton.jit
def _read(x_ptr, stride_n, rows, left, D: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, D) of a chunk; zero past the end of the sequence, unless every chunk is WHOLE."""
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    if WHOLE:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=rows[:, None] < left, other=0.0)


@triton.jit
def _angles(table_ptr, positions, CHUNK: tl.constexpr, HALF: tl.constexpr):
    """cos and sin (positions, HALF). The table (2, 3 * CHUNK, HALF) starts at position -CHUNK."""
    entries = table_ptr + (positions + CHUNK)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(entries).to(tl.float32), tl.load(entries + 3 * CHUNK * HALF).to(tl.float32)


@triton.jit
def _turn(x1, x2, cos, sin):
    """Both halves of a head, rotated."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _key_block(k_ptr, v_ptr, stride_kn, stride_vn, rows, left, HALF: tl.constexpr, WHOLE: tl.constexpr):
    """Keys in two halves and values, as they lie in memory."""
    k1 = _read(k_ptr, stride_kn, rows, left, HALF, WHOLE)
    k2 = _read(k_ptr + HALF, stride_kn, rows, left, HALF, WHOLE)
    return k1, k2, _read(v_ptr, stride_vn, rows, left, 2 * HALF, WHOLE)


@triton.jit
def _turned(x1, x2, table_ptr, positions, CHUNK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr):
    """Both halves turned by their positions, in their own dtype."""
    if ROTATE == 1:
        cos, sin = _angles(table_ptr, positions, CHUNK, HALF)
        y1, y2 = _turn(x1.to(tl.float32), x2.to(tl.float32), cos, sin)
        x1, x2 = y1.to(x1.dtype), y2.to(x2.dtype)
    return x1, x2


@triton.jit
def _visit(
    q1, q2, k1, k2, v, visible, acc, top, total,
    SCALE: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax of a tile of queries; the FIRST hides no row wholly."""
    s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1)))
    if MASK:
        s = tl.where(visible, s, float("-inf"))
    if FIRST:
        top = tl.max(s, 1) * SCALE
        w = tl.exp2(s * SCALE - top[:, None])
        total = tl.sum(w, 1)
        acc = _dot(w.to(v.dtype), v)
    else:
        higher = tl.maximum(top, tl.max(s, 1) * SCALE)
        shrink = tl.exp2(top - higher)
        w = tl.exp2(s * SCALE - higher[:, None])
        total = total * shrink + tl.sum(w, 1)
        acc = _dot_add(w.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit
def _write(x_c, stride_n, rows, left, x, D: tl.constexpr, WHOLE: tl.constexpr):
    x_ptrs = x_c + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    if WHOLE:
        tl.store(x_ptrs, x.to(x_c.dtype.element_ty))
    else:
        tl.store(x_ptrs, x.to(x_c.dtype.element_ty), mask=rows[:, None] < left)


@triton.jit
def _attend_chunk(
    q_c, k_c, v_c, k_p, v_p, o_c, lse_c, table_ptr, stride_qn, stride_kn, stride_vn, left, p_left, shift,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr,
    FAR: tl.constexpr, SCALE: tl.constexpr, MUTUAL: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
    PARTNER: tl.constexpr,
):  # fmt: skip
    """All queries of a chunk. shift: what a query's position gains against the partner's keys."""
    HALF: tl.constexpr = D // 2
    BLOCK: tl.constexpr = CHUNK // SPLIT
    NEAR_KEYS: tl.constexpr = CHUNK // OWN
    FAR_KEYS: tl.constexpr = CHUNK // FAR
    BOUNDED: tl.constexpr = MUTUAL and not WHOLE
    rows = tl.arange(0, BLOCK)
    far = tl.arange(0, FAR_KEYS)
    near = tl.arange(0, NEAR_KEYS)
    # All loads of keys and values stand before the first use of any.
    if PARTNER:
        pa1, pa2, pav = _key_block(k_p, v_p, stride_kn, stride_vn, far, p_left, HALF, not BOUNDED)
        if FAR == 2:
            pb1, pb2, pbv = _key_block(
                k_p, v_p, stride_kn, stride_vn, far + FAR_KEYS, p_left, HALF, not BOUNDED
            )
    ka1, ka2, va = _key_block(k_c, v_c, stride_kn, stride_vn, near, left, HALF, WHOLE)
    if OWN == 2:
        kb1, kb2, vb = _key_block(k_c, v_c, stride_kn, stride_vn, near + NEAR_KEYS, left, HALF, WHOLE)
    if PARTNER:
        pa1, pa2 = _turned(pa1, pa2, table_ptr, far, CHUNK, HALF, ROTATE)
        if FAR == 2:
            pb1, pb2 = _turned(pb1, pb2, table_ptr, far + FAR_KEYS, CHUNK, HALF, ROTATE)
    ka1, ka2 = _turned(ka1, ka2, table_ptr, near, CHUNK, HALF, ROTATE)
    if OWN == 2:
        kb1, kb2 = _turned(kb1, kb2, table_ptr, near + NEAR_KEYS, CHUNK, HALF, ROTATE)

    for m in tl.static_range(SPLIT):
        i = rows + m * BLOCK
        q1 = _read(q_c, stride_qn, i, left, HALF, WHOLE)
        q2 = _read(q_c + HALF, stride_qn, i, left, HALF, WHOLE)
        p1, p2 = q1, q2
        if ROTATE:
            y1, y2 = q1.to(tl.float32), q2.to(tl.float32)
            if ROTATE == 1:
                cos, sin = _angles(table_ptr, i, CHUNK, HALF)
                y1, y2 = _turn(y1, y2, cos, sin)
                q1, q2 = y1.to(p1.dtype), y2.to(p1.dtype)
            if PARTNER:
                cos, sin = _angles(table_ptr, tl.zeros([1], tl.int32) + shift, CHUNK, HALF)
                y1, y2 = _turn(y1, y2, cos, sin)
                p1, p2 = y1.to(p1.dtype), y2.to(p1.dtype)
        acc = tl.zeros([BLOCK, D], tl.float32)
        top = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        if PARTNER:
            seen = far[None, :] < p_left
            acc, top, total = _visit(p1, p2, pa1, pa2, pav, seen, acc, top, total, SCALE, BOUNDED, True)
            if FAR == 2:
                seen = far[None, :] + FAR_KEYS < p_left
                acc, top, total = _visit(p1, p2, pb1, pb2, pbv, seen, acc, top, total, SCALE, BOUNDED, False)
        # A tile of queries and a block of keys meet on the diagonal unless the keys end before it.
        DIAGONAL = not MUTUAL and m * BLOCK < NEAR_KEYS
        seen = near[None, :] < left if MUTUAL else i[:, None] >= near[None, :]
        acc, top, total = _visit(
            q1, q2, ka1, ka2, va, seen, acc, top, total, SCALE, BOUNDED or DIAGONAL, not PARTNER
        )
        if OWN == 2 and (MUTUAL or (m + 1) * BLOCK > NEAR_KEYS):
            j = near + NEAR_KEYS
            seen = j[None, :] < left if MUTUAL else i[:, None] >= j[None, :]
            acc, top, total = _visit(
                q1, q2, kb1, kb2, vb, seen, acc, top, total, SCALE, BOUNDED or not MUTUAL, False
            )
        o = acc * (1.0 / total)[:, None]
        _write(o_c, HEADS * D, i, left, o, D, WHOLE)
        if WHOLE:
            tl.store(lse_c + i, top + tl.log2(total))
        else:
            tl.store(lse_c + i, top + tl.log2(total), mask=i < left)


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def chunk_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
    SCALE: tl.constexpr, TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
    OWN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """o (B, N, H, D) and lse (B, H, N), in powers of 2. SCALE includes log2(e); WHOLE: CHUNK divides N."""
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    c, _, head, batch = _place(turns, step, HEADS, 1)
    if c >= num_chunks:
        return
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    kv_head = head // GROUP
    left = length - c * CHUNK
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    k_c = _chunk_pointer(k_ptr, batch, kv_head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, kv_head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    k_p = _chunk_pointer(k_ptr, batch, kv_head, p, stride_kb, stride_kn, stride_kh, CHUNK)
    v_p = _chunk_pointer(v_ptr, batch, kv_head, p, stride_vb, stride_vn, stride_vh, CHUNK)
    o_c = o_ptr + ((batch.to(tl.int64) * length + c * CHUNK) * HEADS + head) * D
    lse_c = lse_ptr + (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    if exists:
        _attend_chunk(
            q_c, k_c, v_c, k_p, v_p, o_c, lse_c, table_ptr, stride_qn, stride_kn, stride_vn,
            left, length - p * CHUNK, tl.where(p < c, CHUNK, -CHUNK),
            HEADS, D, CHUNK, SPLIT, OWN, FAR, SCALE, MUTUAL, ROTATE, WHOLE, True,
        )  # fmt: skip
    else:
        _attend_chunk(
            q_c, k_c, v_c, k_p, v_p, o_c, lse_c, table_ptr, stride_qn, stride_kn, stride_vn,
            left, left, 0,
            HEADS, D, CHUNK, SPLIT, OWN, FAR, SCALE, MUTUAL, ROTATE, WHOLE, False,
        )  # fmt: skip
