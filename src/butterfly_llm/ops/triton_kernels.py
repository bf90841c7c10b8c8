# mypy: ignore-errors
"""Triton kernels of butterfly attention, launched by `triton_attention`. Importing this needs Triton.

Legend: c chunk, i query offset in its chunk, j key offset in its chunk, m and n blocks of queries and keys,
p partner chunk (the one c reads), `frame` the position added to a query's offset before it is rotated: 0
against the own chunk, +CHUNK against an earlier partner, -CHUNK against a later one. A key is rotated by j.

Every tile that is rotated is held as two halves of the head, so a rotation needs no exchange between lanes
and a score is the sum of two products. Row indices inside a chunk are int32, everything above them int64.
Programs are numbered so that chunks one stride apart run side by side: what they share comes from L2.
"""

import triton
import triton.language as tl


@triton.jit
def _place(turns, step, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Program number to (chunk, block in chunk, head, batch); the head runs fastest, then the block."""
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    block = pid % BLOCKS
    pid = pid // BLOCKS
    slot = pid % (turns * step)
    batch = pid // (turns * step)
    chunk = (slot % turns) * step + slot // turns
    return chunk, block, head, batch


@triton.jit
def _partner(c, stride, num_chunks, TOPOLOGY: tl.constexpr):
    """The chunk that c reads, and whether there is one."""
    if TOPOLOGY == "shift":
        p = c - stride
        exists = p >= 0
    elif TOPOLOGY == "xor_causal":
        p = c ^ stride
        exists = p < c
    else:
        p = c ^ stride
        exists = p < num_chunks
    return p, exists


@triton.jit
def _reader(c, stride, num_chunks, TOPOLOGY: tl.constexpr):
    """The chunk whose partner is c, and whether there is one."""
    if TOPOLOGY == "shift":
        r = c + stride
        exists = r < num_chunks
    elif TOPOLOGY == "xor_causal":
        r = c ^ stride
        exists = (r > c) & (r < num_chunks)
    else:
        r = c ^ stride
        exists = r < num_chunks
    return r, exists


@triton.jit
def _base(x_ptr, batch, head, chunk, stride_b, stride_h, stride_n, CHUNK: tl.constexpr):
    """Pointer to the first element of a chunk's first row."""
    first = chunk.to(tl.int64) * CHUNK
    return x_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + first * stride_n


@triton.jit
def _load(x_ptr, stride_n, rows, left, D: tl.constexpr, BOUND: tl.constexpr):
    """(rows, D) of a chunk; zero where the sequence has ended (BOUND)."""
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    if BOUND:  # noqa: SIM108
        x = tl.load(x_ptrs, mask=rows[:, None] < left, other=0.0)
    else:
        x = tl.load(x_ptrs)
    return x


@triton.jit
def _angles(table_ptr, positions, CHUNK: tl.constexpr, HALF: tl.constexpr):
    """cos and sin (positions, HALF) float32; the table starts at position -CHUNK."""
    entries = table_ptr + (positions + CHUNK)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(entries), tl.load(entries + 3 * CHUNK * HALF)


@triton.jit
def _load_rotated(
    x_ptr, stride_n, rows, left, table_ptr, frame, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BOUND: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Both halves (rows, HALF) of a chunk's rows, rotated by rows + frame in float32, in their own dtype."""
    x1 = _load(x_ptr, stride_n, rows, left, HALF, BOUND)
    x2 = _load(x_ptr + HALF, stride_n, rows, left, HALF, BOUND)
    if ROTATE:
        cos, sin = _angles(table_ptr, rows + frame, CHUNK, HALF)
        y1 = x1.to(tl.float32) * cos - x2.to(tl.float32) * sin
        y2 = x2.to(tl.float32) * cos + x1.to(tl.float32) * sin
        x1 = y1.to(x1.dtype)
        x2 = y2.to(x2.dtype)
    return x1, x2


@triton.jit
def _store_halves(x_ptr, stride_n, rows, left, x1, x2, HALF: tl.constexpr):
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, HALF)[None, :]
    tl.store(x_ptrs, x1.to(x_ptr.dtype.element_ty), mask=rows[:, None] < left)
    tl.store(x_ptrs + HALF, x2.to(x_ptr.dtype.element_ty), mask=rows[:, None] < left)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _attend(
    acc, top, total, q1, q2, i, k_ptr, v_ptr, stride_kn, stride_vn, end, left, table_ptr, SCALE: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, BOUND: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query block over the keys 0..end of one chunk. SCALE includes log2(e)."""
    for n in range(0, end, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k1, k2 = _load_rotated(k_ptr, stride_kn, j, left, table_ptr, 0, CHUNK, D // 2, BOUND, ROTATE)
        v = _load(v_ptr, stride_vn, j, left, D, BOUND)
        s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1))) * SCALE
        if CAUSAL:  # also hides keys past the end from every real query
            s = tl.where(i[:, None] >= j[None, :], s, float("-inf"))
        elif BOUND:
            s = tl.where(j[None, :] < left, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))  # finite: the first block holds a key for every row
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = _dot_add(p.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """o (B, N, H, D) and lse (B, H, N), natural logarithm: one program per (query block, head, batch)."""
    HALF: tl.constexpr = D // 2
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    c, block, head, batch = _place(turns, step, HEADS, CHUNK // BLOCK_M)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_M >= left):
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_c = _base(q_ptr, batch, head, c, stride_qb, stride_qh, stride_qn, CHUNK)
    k_c = _base(k_ptr, batch, head // GROUP, c, stride_kb, stride_kh, stride_kn, CHUNK)
    v_c = _base(v_ptr, batch, head // GROUP, c, stride_vb, stride_vh, stride_vn, CHUNK)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, True, ROTATE)
    end = CHUNK if MUTUAL else (block + 1) * BLOCK_M
    acc, top, total = _attend(
        acc, top, total, q1, q2, i, k_c, v_c, stride_kn, stride_vn, end, left, table_ptr, SCALE,
        D, CHUNK, BLOCK_N, not MUTUAL, True, ROTATE,
    )  # fmt: skip
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    if exists:
        frame = tl.where(p < c, CHUNK, -CHUNK)
        q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, frame, CHUNK, HALF, True, ROTATE)
        k_p = _base(k_ptr, batch, head // GROUP, p, stride_kb, stride_kh, stride_kn, CHUNK)
        v_p = _base(v_ptr, batch, head // GROUP, p, stride_vb, stride_vh, stride_vn, CHUNK)
        acc, top, total = _attend(
            acc, top, total, q1, q2, i, k_p, v_p, stride_kn, stride_vn, CHUNK, length - p * CHUNK, table_ptr,
            SCALE, D, CHUNK, BLOCK_N, False, MUTUAL, ROTATE,
        )  # fmt: skip

    here = i < left
    o_row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    o_ptrs = o_ptr + o_row * D + i[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(o_ptrs, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=here[:, None])
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    tl.store(lse_ptr + lse_row + i, (top + tl.log2(total)) * 0.6931471805599453, mask=here)


@triton.jit
def _query_gradient(
    dq1, dq2, q1, q2, do, lse, delta, i, k_ptr, v_ptr, stride_kn, stride_vn, end, left, table_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, BOUND: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Adds the keys 0..end of one chunk to the gradient of one block of rotated queries."""
    for n in range(0, end, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k1, k2 = _load_rotated(k_ptr, stride_kn, j, left, table_ptr, 0, CHUNK, D // 2, BOUND, ROTATE)
        v = _load(v_ptr, stride_vn, j, left, D, BOUND)
        s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1)))
        p = tl.exp2(s * SCALE - lse[:, None])
        if CAUSAL:
            p = tl.where(i[:, None] >= j[None, :], p, 0.0)
        elif BOUND:
            p = tl.where(j[None, :] < left, p, 0.0)
        dp = _dot(do, tl.trans(v))
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = _dot_add(ds, k1, dq1)
        dq2 = _dot_add(ds, k2, dq2)
    return dq1, dq2


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, D) and delta = rowsum(do * o) (B, H, N): one program per (query block, head, batch)."""
    HALF: tl.constexpr = D // 2
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    c, block, head, batch = _place(turns, step, HEADS, CHUNK // BLOCK_M)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_M >= left):
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = i < left
    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    do = _load(
        _base(do_ptr, batch, head, c, stride_gb, stride_gh, stride_gn, CHUNK), stride_gn, i, left, D, True
    )
    o = _load(o_ptr + row * D, HEADS * D, i, left, D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + lse_row + i, delta, mask=here)
    lse = tl.load(lse_ptr + lse_row + i, mask=here, other=0.0) * 1.4426950408889634

    q_c = _base(q_ptr, batch, head, c, stride_qb, stride_qh, stride_qn, CHUNK)
    k_c = _base(k_ptr, batch, head // GROUP, c, stride_kb, stride_kh, stride_kn, CHUNK)
    v_c = _base(v_ptr, batch, head // GROUP, c, stride_vb, stride_vh, stride_vn, CHUNK)
    dq1 = tl.zeros([BLOCK_M, HALF], tl.float32)
    dq2 = tl.zeros([BLOCK_M, HALF], tl.float32)
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    if exists:
        frame = tl.where(p < c, CHUNK, -CHUNK)
        q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, frame, CHUNK, HALF, True, ROTATE)
        k_p = _base(k_ptr, batch, head // GROUP, p, stride_kb, stride_kh, stride_kn, CHUNK)
        v_p = _base(v_ptr, batch, head // GROUP, p, stride_vb, stride_vh, stride_vn, CHUNK)
        dq1, dq2 = _query_gradient(
            dq1, dq2, q1, q2, do, lse, delta, i, k_p, v_p, stride_kn, stride_vn, CHUNK, length - p * CHUNK,
            table_ptr, SCALE, D, CHUNK, BLOCK_N, False, MUTUAL, ROTATE,
        )  # fmt: skip
        if ROTATE:  # from the partner's frame to the own one, so that one accumulator serves both
            cos, sin = _angles(table_ptr, frame + tl.zeros([1], tl.int32), CHUNK, HALF)
            turned = dq1 * cos + dq2 * sin
            dq2 = dq2 * cos - dq1 * sin
            dq1 = turned
    q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, True, ROTATE)
    end = CHUNK if MUTUAL else (block + 1) * BLOCK_M
    dq1, dq2 = _query_gradient(
        dq1, dq2, q1, q2, do, lse, delta, i, k_c, v_c, stride_kn, stride_vn, end, left,
        table_ptr, SCALE, D, CHUNK, BLOCK_N, not MUTUAL, True, ROTATE,
    )  # fmt: skip
    if ROTATE:
        cos, sin = _angles(table_ptr, i, CHUNK, HALF)
        turned = dq1 * cos + dq2 * sin
        dq2 = dq2 * cos - dq1 * sin
        dq1 = turned
    scale: tl.constexpr = SCALE * 0.6931471805599453
    _store_halves(dq_ptr + row * D, HEADS * D, i, left, dq1 * scale, dq2 * scale, HALF)


@triton.jit
def _key_gradient(
    dk1, dk2, dv, k1, k2, v, j, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_gn, begin, left, frame,
    table_ptr, SCALE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Adds the queries begin.. of one chunk to the gradients of one block of rotated keys, and of its values.

    Queries past the end are zeros, with zero do and delta: they add nothing. Keys past it are not stored.
    """
    for m in range(begin, CHUNK, BLOCK_M):
        i = m + tl.arange(0, BLOCK_M)
        q1, q2 = _load_rotated(q_ptr, stride_qn, i, left, table_ptr, frame, CHUNK, D // 2, True, ROTATE)
        do = _load(do_ptr, stride_gn, i, left, D, True)
        lse = tl.load(lse_ptr + i, mask=i < left, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + i, mask=i < left, other=0.0)
        s = _dot_add(k2, tl.trans(q2), _dot(k1, tl.trans(q1)))  # (keys, queries)
        p = tl.exp2(s * SCALE - lse[None, :])
        if CAUSAL:
            p = tl.where(i[None, :] >= j[:, None], p, 0.0)
        dv = _dot_add(p.to(do.dtype), do, dv)
        dp = _dot(v, tl.trans(do))
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        dk1 = _dot_add(ds, q1, dk1)
        dk2 = _dot_add(ds, q2, dk2)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, N, Hkv, D): one program per (key block, head, batch) gathers from its two readers."""
    HALF: tl.constexpr = D // 2
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    KV_HEADS: tl.constexpr = HEADS // GROUP
    c, block, kv_head, batch = _place(turns, step, KV_HEADS, CHUNK // BLOCK_N)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_N >= left):
        return
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_c = _base(k_ptr, batch, kv_head, c, stride_kb, stride_kh, stride_kn, CHUNK)
    v_c = _base(v_ptr, batch, kv_head, c, stride_vb, stride_vh, stride_vn, CHUNK)
    k1, k2 = _load_rotated(k_c, stride_kn, j, left, table_ptr, 0, CHUNK, HALF, True, ROTATE)
    v = _load(v_c, stride_vn, j, left, D, True)
    dk1 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    r, exists = _reader(c, stride, num_chunks, TOPOLOGY)
    frame = tl.where(c < r, CHUNK, -CHUNK)
    begin = 0 if MUTUAL else block * BLOCK_N // BLOCK_M * BLOCK_M  # earlier queries do not see these keys
    for g in range(0, GROUP):
        head = kv_head * GROUP + g
        lse_row = (batch.to(tl.int64) * HEADS + head) * length
        dk1, dk2, dv = _key_gradient(
            dk1, dk2, dv, k1, k2, v, j,
            _base(q_ptr, batch, head, c, stride_qb, stride_qh, stride_qn, CHUNK),
            _base(do_ptr, batch, head, c, stride_gb, stride_gh, stride_gn, CHUNK),
            lse_ptr + lse_row + c * CHUNK, delta_ptr + lse_row + c * CHUNK, stride_qn, stride_gn,
            begin, left, 0, table_ptr, SCALE, D, CHUNK, BLOCK_M, not MUTUAL, ROTATE,
        )  # fmt: skip
        if exists:
            dk1, dk2, dv = _key_gradient(
                dk1, dk2, dv, k1, k2, v, j,
                _base(q_ptr, batch, head, r, stride_qb, stride_qh, stride_qn, CHUNK),
                _base(do_ptr, batch, head, r, stride_gb, stride_gh, stride_gn, CHUNK),
                lse_ptr + lse_row + r * CHUNK, delta_ptr + lse_row + r * CHUNK, stride_qn, stride_gn,
                0, length - r * CHUNK, frame, table_ptr, SCALE, D, CHUNK, BLOCK_M, False, ROTATE,
            )  # fmt: skip
    if ROTATE:
        cos, sin = _angles(table_ptr, j, CHUNK, HALF)
        turned = dk1 * cos + dk2 * sin
        dk2 = dk2 * cos - dk1 * sin
        dk1 = turned
    scale: tl.constexpr = SCALE * 0.6931471805599453
    row = (batch.to(tl.int64) * length + c * CHUNK) * KV_HEADS + kv_head  # row of (B * N * Hkv, D)
    _store_halves(dk_ptr + row * D, KV_HEADS * D, j, left, dk1 * scale, dk2 * scale, HALF)
    dv_ptrs = dv_ptr + row * D + j[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=(j < left)[:, None])
