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

from butterfly_llm.ops.triton_kernels import _chunk_pointer, _dot, _dot_add, _partner, _place, _reader


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


@triton.jit
def _turned_queries(
    q_ptr, stride_n, i, left, table_ptr, shift,
    CHUNK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr, FURTHER: tl.constexpr,
):  # fmt: skip
    """Both halves of queries turned by i + shift, in their own dtype; FURTHER: shift is not 0."""
    q1 = _read(q_ptr, stride_n, i, left, HALF, WHOLE)
    q2 = _read(q_ptr + HALF, stride_n, i, left, HALF, WHOLE)
    if ROTATE == 2 and FURTHER:
        return _turned(q1, q2, table_ptr, tl.zeros([1], tl.int32) + shift, CHUNK, HALF, 1)
    return _turned(q1, q2, table_ptr, i + shift, CHUNK, HALF, ROTATE)


@triton.jit
def _delta(do, o_c, i, left, HEADS: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """rowsum(do * o) of a tile of queries."""
    o = _read(o_c, HEADS * D, i, left, D, WHOLE)
    return tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)


@triton.jit
def _row(x_c, i, left, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(x_c + i)
    return tl.load(x_c + i, mask=i < left, other=0.0)


@triton.jit
def _key_side(
    k1, k2, v, q1, q2, do, lse, delta, visible, dk1, dk2, dv, SCALE: tl.constexpr, MASK: tl.constexpr
):
    """One block, keys by queries: what it adds to dk and dv, and the gradient of its scores."""
    s = _dot_add(k2, tl.trans(q2), _dot(k1, tl.trans(q1)))
    w = tl.exp2(s * SCALE - lse[None, :])
    if MASK:
        w = tl.where(visible, w, 0.0)
    dv = _dot_add(w.to(do.dtype), do, dv)
    ds = (w * (_dot(v, tl.trans(do)) - delta[None, :])).to(q1.dtype)
    return ds, _dot_add(ds, q1, dk1), _dot_add(ds, q2, dk2), dv


@triton.jit
def _query_side(
    q1, q2, do, lse, delta, k1, k2, v, visible, dq1, dq2, SCALE: tl.constexpr, MASK: tl.constexpr
):
    """One block, queries by keys: what it adds to dq."""
    s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1)))
    w = tl.exp2(s * SCALE - lse[:, None])
    if MASK:
        w = tl.where(visible, w, 0.0)
    ds = (w * (_dot(do, tl.trans(v)) - delta[:, None])).to(k1.dtype)
    return _dot_add(ds, k1, dq1), _dot_add(ds, k2, dq2)


@triton.jit
def _store_gradient(
    x_c, stride_n, rows, left, x1, x2, table_ptr, SCALE: tl.constexpr,
    CHUNK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores both halves of the gradient of something turned by its rows."""
    x1 = x1 * (SCALE * 0.6931471805599453)
    x2 = x2 * (SCALE * 0.6931471805599453)
    if ROTATE == 1:
        # ".ca" is the default caching. Naming it keeps the compiler from merging these loads with earlier
        # equal ones, which would hold the angles in registers all the way.
        entries = table_ptr + (rows + CHUNK)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(entries, cache_modifier=".ca").to(tl.float32)
        sin = tl.load(entries + 3 * CHUNK * HALF, cache_modifier=".ca").to(tl.float32)
        x1, x2 = _turn(x1, x2, cos, -sin)
    _write(x_c, stride_n, rows, left, x1, HALF, WHOLE)
    _write(x_c + HALF, stride_n, rows, left, x2, HALF, WHOLE)


@triton.jit
def _write(x_c, stride_n, rows, left, x, D: tl.constexpr, WHOLE: tl.constexpr):
    x_ptrs = x_c + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    if WHOLE:
        tl.store(x_ptrs, x.to(x_c.dtype.element_ty))
    else:
        tl.store(x_ptrs, x.to(x_c.dtype.element_ty), mask=rows[:, None] < left)


@triton.jit
def _reader_side(
    k1, k2, v, q_r, o_r, do_r, lse_r, table_ptr, stride_qn, stride_gn, queries, left, shift,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, READ: tl.constexpr,
    SCALE: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the reader's queries add to dk and dv of a tile of keys.

    Queries past the end are zeros, with zero do and delta: they add nothing.
    """
    HALF: tl.constexpr = D // 2
    dk1 = tl.zeros([BLOCK, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK, HALF], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, queries, READ):
        i = t + tl.arange(0, READ)
        q1, q2 = _turned_queries(q_r, stride_qn, i, left, table_ptr, shift, CHUNK, HALF, ROTATE, WHOLE, True)
        do = _read(do_r, stride_gn, i, left, D, WHOLE)
        delta = _delta(do, o_r, i, left, HEADS, D, WHOLE)
        lse = _row(lse_r, i, left, WHOLE)
        _ds, dk1, dk2, dv = _key_side(k1, k2, v, q1, q2, do, lse, delta, True, dk1, dk2, dv, SCALE, False)
    return dk1, dk2, dv


@triton.jit
def _reader_side_twice(
    ka1, ka2, va, kb1, kb2, vb, q_r, o_r, do_r, lse_r, table_ptr, stride_qn, stride_gn, queries, left, shift,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, READ: tl.constexpr,
    SCALE: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`_reader_side` of both tiles of keys, which reads the queries once and keeps twice the sums."""
    HALF: tl.constexpr = D // 2
    dka1 = tl.zeros([BLOCK, HALF], tl.float32)
    dka2 = tl.zeros([BLOCK, HALF], tl.float32)
    dva = tl.zeros([BLOCK, D], tl.float32)
    dkb1 = tl.zeros([BLOCK, HALF], tl.float32)
    dkb2 = tl.zeros([BLOCK, HALF], tl.float32)
    dvb = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, queries, READ):
        i = t + tl.arange(0, READ)
        q1, q2 = _turned_queries(q_r, stride_qn, i, left, table_ptr, shift, CHUNK, HALF, ROTATE, WHOLE, True)
        do = _read(do_r, stride_gn, i, left, D, WHOLE)
        delta = _delta(do, o_r, i, left, HEADS, D, WHOLE)
        lse = _row(lse_r, i, left, WHOLE)
        _da, dka1, dka2, dva = _key_side(
            ka1, ka2, va, q1, q2, do, lse, delta, True, dka1, dka2, dva, SCALE, False
        )
        _db, dkb1, dkb2, dvb = _key_side(
            kb1, kb2, vb, q1, q2, do, lse, delta, True, dkb1, dkb2, dvb, SCALE, False
        )
    return dka1, dka2, dva, dkb1, dkb2, dvb


@triton.jit
def _query_phase(
    q_c, k_c, v_c, k_p, v_p, o_c, do_c, lse_c, table_ptr, stride_qn, stride_kn, stride_vn, stride_gn,
    left, p_left, shift,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, SCALE: tl.constexpr,
    MUTUAL: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
    OWN: tl.constexpr, PARTNER: tl.constexpr,
):  # fmt: skip
    """What the own and the partner's keys add to dq, first and last tile of queries."""
    HALF: tl.constexpr = D // 2
    BLOCK: tl.constexpr = CHUNK // SPLIT
    BOUNDED: tl.constexpr = MUTUAL and not WHOLE
    rows = tl.arange(0, BLOCK)
    j = rows + BLOCK
    if PARTNER:
        pa1, pa2, pav = _key_block(k_p, v_p, stride_kn, stride_vn, rows, p_left, HALF, not BOUNDED)
        if SPLIT == 2:
            pb1, pb2, pbv = _key_block(k_p, v_p, stride_kn, stride_vn, j, p_left, HALF, not BOUNDED)
    if OWN:
        ka1, ka2, va = _key_block(k_c, v_c, stride_kn, stride_vn, rows, left, HALF, WHOLE)
        if SPLIT == 2:
            kb1, kb2, vb = _key_block(k_c, v_c, stride_kn, stride_vn, j, left, HALF, WHOLE)
    if PARTNER:
        pa1, pa2 = _turned(pa1, pa2, table_ptr, rows, CHUNK, HALF, ROTATE)
        if SPLIT == 2:
            pb1, pb2 = _turned(pb1, pb2, table_ptr, j, CHUNK, HALF, ROTATE)
    if OWN:
        ka1, ka2 = _turned(ka1, ka2, table_ptr, rows, CHUNK, HALF, ROTATE)
        if SPLIT == 2:
            kb1, kb2 = _turned(kb1, kb2, table_ptr, j, CHUNK, HALF, ROTATE)
    for m in tl.static_range(SPLIT):
        i = rows + m * BLOCK
        do = _read(do_c, stride_gn, i, left, D, WHOLE)
        delta = _delta(do, o_c, i, left, HEADS, D, WHOLE)
        lse = _row(lse_c, i, left, WHOLE)
        dq1 = tl.zeros([BLOCK, HALF], tl.float32)
        dq2 = tl.zeros([BLOCK, HALF], tl.float32)
        if PARTNER:
            q1, q2 = _turned_queries(
                q_c, stride_qn, i, left, table_ptr, shift, CHUNK, HALF, ROTATE, WHOLE, True
            )
            seen = rows[None, :] < p_left
            dq1, dq2 = _query_side(q1, q2, do, lse, delta, pa1, pa2, pav, seen, dq1, dq2, SCALE, BOUNDED)
            if SPLIT == 2:
                seen = j[None, :] < p_left
                dq1, dq2 = _query_side(q1, q2, do, lse, delta, pb1, pb2, pbv, seen, dq1, dq2, SCALE, BOUNDED)
            if ROTATE:
                cos, sin = _angles(table_ptr, tl.zeros([1], tl.int32) + shift, CHUNK, HALF)
                dq1, dq2 = _turn(dq1, dq2, cos, -sin)
        if OWN:
            q1, q2 = _turned_queries(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, ROTATE, WHOLE, False)
            seen = rows[None, :] < left if MUTUAL else i[:, None] >= rows[None, :]
            dq1, dq2 = _query_side(
                q1,
                q2,
                do,
                lse,
                delta,
                ka1,
                ka2,
                va,
                seen,
                dq1,
                dq2,
                SCALE,
                BOUNDED or (not MUTUAL and m == 0),
            )
            if SPLIT == 2 and (MUTUAL or m == 1):
                seen = j[None, :] < left if MUTUAL else i[:, None] >= j[None, :]
                dq1, dq2 = _query_side(
                    q1, q2, do, lse, delta, kb1, kb2, vb, seen, dq1, dq2, SCALE, BOUNDED or not MUTUAL
                )
        if m == 0:
            a1, a2 = dq1, dq2
    return a1, a2, dq1, dq2


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def chunk_backward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
    SCALE: tl.constexpr, TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr,
    PART: tl.constexpr, READ: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv (B, N, H, D) of one chunk from three blocks of scores: its queries with its own keys, its
    queries with the partner's keys, and its keys with the reader's queries. One key-value head per head.

    The order keeps few sums alive at a time: the reader's block fills dk and dv, the own block finishes
    them, half a chunk of keys after the other, and starts dq, the partner's block finishes dq.
    """
    tl.static_assert(GROUP == 1)
    FUSED: tl.constexpr = PART == "fused"
    KEYS: tl.constexpr = PART != "queries"
    BOTH: tl.constexpr = ONCE and SPLIT == 2 and KEYS
    HALF: tl.constexpr = D // 2
    BLOCK: tl.constexpr = CHUNK // SPLIT
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    CAUSAL: tl.constexpr = not MUTUAL
    BOUNDED: tl.constexpr = MUTUAL and not WHOLE
    c, _, head, batch = _place(turns, step, HEADS, 1)
    if c >= num_chunks:
        return
    p, has_partner = _partner(c, stride, num_chunks, TOPOLOGY)
    r, has_reader = _reader(c, stride, num_chunks, TOPOLOGY)
    left = length - c * CHUNK
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    k_c = _chunk_pointer(k_ptr, batch, head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    do_c = _chunk_pointer(do_ptr, batch, head, c, stride_gb, stride_gn, stride_gh, CHUNK)
    first = batch.to(tl.int64) * length * HEADS + head  # row of (B * N * H, D) where the head begins
    row_c = (first + c.to(tl.int64) * (CHUNK * HEADS)) * D
    row_r = (first + r.to(tl.int64) * (CHUNK * HEADS)) * D
    o_c = o_ptr + row_c
    lse_c = lse_ptr + (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK

    r_q = _chunk_pointer(q_ptr, batch, head, r, stride_qb, stride_qn, stride_qh, CHUNK)
    r_do = _chunk_pointer(do_ptr, batch, head, r, stride_gb, stride_gn, stride_gh, CHUNK)
    r_o = o_ptr + row_r
    r_lse = lse_c + (r - c) * CHUNK

    rows = tl.arange(0, BLOCK)
    dqa1 = tl.zeros([BLOCK, HALF], tl.float32)
    dqa2 = tl.zeros([BLOCK, HALF], tl.float32)
    dqb1 = tl.zeros([BLOCK, HALF], tl.float32)
    dqb2 = tl.zeros([BLOCK, HALF], tl.float32)
    if BOTH:
        ka1, ka2, va = _key_block(k_c, v_c, stride_kn, stride_vn, rows, left, HALF, WHOLE)
        kb1, kb2, vb = _key_block(k_c, v_c, stride_kn, stride_vn, rows + BLOCK, left, HALF, WHOLE)
        ka1, ka2 = _turned(ka1, ka2, table_ptr, rows, CHUNK, HALF, ROTATE)
        kb1, kb2 = _turned(kb1, kb2, table_ptr, rows + BLOCK, CHUNK, HALF, ROTATE)
        dka1, dka2, dva, dkb1, dkb2, dvb = _reader_side_twice(
            ka1, ka2, va, kb1, kb2, vb, r_q, r_o, r_do, r_lse, table_ptr, stride_qn, stride_gn,
            tl.where(has_reader, CHUNK, 0), length - r * CHUNK, tl.where(r > c, CHUNK, -CHUNK),
            HEADS, D, CHUNK, BLOCK, READ, SCALE, ROTATE, WHOLE,
        )  # fmt: skip
    for n in tl.static_range(SPLIT - 1 if KEYS else -1, -1, -1):
        j = rows + n * BLOCK
        if not BOTH:
            k1, k2, v = _key_block(k_c, v_c, stride_kn, stride_vn, j, left, HALF, WHOLE)
            k1, k2 = _turned(k1, k2, table_ptr, j, CHUNK, HALF, ROTATE)
            dk1, dk2, dv = _reader_side(
                k1, k2, v, r_q, r_o, r_do, r_lse, table_ptr, stride_qn, stride_gn,
                tl.where(has_reader, CHUNK, 0), length - r * CHUNK, tl.where(r > c, CHUNK, -CHUNK),
                HEADS, D, CHUNK, BLOCK, READ, SCALE, ROTATE, WHOLE,
            )  # fmt: skip
        elif n == 0:
            k1, k2, v, dk1, dk2, dv = ka1, ka2, va, dka1, dka2, dva
        else:
            k1, k2, v, dk1, dk2, dv = kb1, kb2, vb, dkb1, dkb2, dvb
        for m in tl.static_range(0 if MUTUAL else n, SPLIT):
            i = rows + m * BLOCK
            q1, q2 = _turned_queries(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, ROTATE, WHOLE, False)
            do = _read(do_c, stride_gn, i, left, D, WHOLE)
            delta = _delta(do, o_c, i, left, HEADS, D, WHOLE)
            lse = _row(lse_c, i, left, WHOLE)
            seen = i[None, :] >= j[:, None] if CAUSAL else j[:, None] < left
            ds, dk1, dk2, dv = _key_side(
                k1, k2, v, q1, q2, do, lse, delta, seen, dk1, dk2, dv, SCALE, BOUNDED or (CAUSAL and m == n)
            )
            if FUSED and m == 0:
                dqa1 = _dot_add(tl.trans(ds), k1, dqa1)
                dqa2 = _dot_add(tl.trans(ds), k2, dqa2)
            elif FUSED:
                dqb1 = _dot_add(tl.trans(ds), k1, dqb1)
                dqb2 = _dot_add(tl.trans(ds), k2, dqb2)
        _store_gradient(
            dk_ptr + row_c, HEADS * D, j, left, dk1, dk2, table_ptr, SCALE, CHUNK, HALF, ROTATE, WHOLE
        )
        _write(dv_ptr + row_c, HEADS * D, j, left, dv, D, WHOLE)

    if PART != "keys":
        k_p = _chunk_pointer(k_ptr, batch, head, p, stride_kb, stride_kn, stride_kh, CHUNK)
        v_p = _chunk_pointer(v_ptr, batch, head, p, stride_vb, stride_vn, stride_vh, CHUNK)
        p_left = length - p * CHUNK
        shift = tl.where(p < c, CHUNK, -CHUNK)
        if has_partner:
            a1, a2, b1, b2 = _query_phase(
                q_c, k_c, v_c, k_p, v_p, o_c, do_c, lse_c, table_ptr,
                stride_qn, stride_kn, stride_vn, stride_gn, left, p_left, shift,
                HEADS, D, CHUNK, SPLIT, SCALE, MUTUAL, ROTATE, WHOLE, not FUSED, True,
            )  # fmt: skip
            dqa1 += a1
            dqa2 += a2
            dqb1 += b1
            dqb2 += b2
        elif not FUSED:
            a1, a2, b1, b2 = _query_phase(
                q_c, k_c, v_c, k_p, v_p, o_c, do_c, lse_c, table_ptr,
                stride_qn, stride_kn, stride_vn, stride_gn, left, p_left, shift,
                HEADS, D, CHUNK, SPLIT, SCALE, MUTUAL, ROTATE, WHOLE, True, False,
            )  # fmt: skip
            dqa1 += a1
            dqa2 += a2
            dqb1 += b1
            dqb2 += b2
        dq_c = dq_ptr + row_c
        _store_gradient(dq_c, HEADS * D, rows, left, dqa1, dqa2, table_ptr, SCALE, CHUNK, HALF, ROTATE, WHOLE)
        if SPLIT == 2:
            i = rows + BLOCK
            _store_gradient(
                dq_c, HEADS * D, i, left, dqb1, dqb2, table_ptr, SCALE, CHUNK, HALF, ROTATE, WHOLE
            )
