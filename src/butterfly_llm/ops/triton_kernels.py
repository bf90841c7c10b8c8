# mypy: ignore-errors
"""Triton kernels of butterfly attention, launched by `triton_attention`. Importing this needs Triton.

Legend: c own chunk, p its partner, r its reader (the chunk whose partner it is), s the one of the two that a
loop step works on; i query offset in its chunk, j key offset in its chunk; `shift` the relative position of
chunk s, whatever the stride: 0 for the own chunk, -CHUNK for an earlier one, +CHUNK for a later one. With it
one causal rule serves both chunks of a pair, and each kernel is a single loop over the blocks of the two.

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
def _chunk_pointer(x_ptr, batch, head, chunk, stride_b, stride_n, stride_h, CHUNK: tl.constexpr):
    """Pointer to a chunk's first row."""
    first = chunk.to(tl.int64) * CHUNK
    return x_ptr + batch.to(tl.int64) * stride_b + first * stride_n + head.to(tl.int64) * stride_h


@triton.jit
def _load(x_ptr, stride_n, rows, left, D: tl.constexpr):
    """(rows, D) of a chunk; zero where the sequence has ended."""
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    return tl.load(x_ptrs, mask=rows[:, None] < left, other=0.0)


@triton.jit
def _load_rotated(
    x_ptr, stride_n, rows, left, table_ptr, shift,
    CHUNK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Both halves (rows, HALF) of a chunk's rows, rotated by rows + shift in float32, in their own dtype.

    The table (2, 3 * CHUNK, HALF) float32 holds cos and sin and starts at position -CHUNK.
    """
    x1 = _load(x_ptr, stride_n, rows, left, HALF)
    x2 = _load(x_ptr + HALF, stride_n, rows, left, HALF)
    if ROTATE:
        entries = table_ptr + (rows + shift + CHUNK)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(entries)
        sin = tl.load(entries + 3 * CHUNK * HALF)
        y1 = x1.to(tl.float32) * cos - x2.to(tl.float32) * sin
        y2 = x2.to(tl.float32) * cos + x1.to(tl.float32) * sin
        x1 = y1.to(x1.dtype)
        x2 = y2.to(x2.dtype)
    return x1, x2


@triton.jit
def _store_unrotated(
    x_ptr, stride_n, rows, left, x1, x2, table_ptr,
    CHUNK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Stores both halves of a gradient, turned back by rows."""
    y1 = x1
    y2 = x2
    if ROTATE:
        # ".ca" is the default caching. Naming it keeps the compiler from merging these loads with equal ones
        # ahead of the loop, which would hold the angles in registers all through it.
        entries = table_ptr + (rows + CHUNK)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(entries, cache_modifier=".ca")
        sin = tl.load(entries + 3 * CHUNK * HALF, cache_modifier=".ca")
        y1 = x1 * cos + x2 * sin
        y2 = x2 * cos - x1 * sin
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, HALF)[None, :]
    tl.store(x_ptrs, y1.to(x_ptr.dtype.element_ty), mask=rows[:, None] < left)
    tl.store(x_ptrs + HALF, y2.to(x_ptr.dtype.element_ty), mask=rows[:, None] < left)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """o (B, N, H, D) and lse (B, H, N), in powers of 2: one program per (query block, head, batch).

    SCALE includes log2(e), here and below.
    """
    HALF: tl.constexpr = D // 2
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    c, block, head, batch = _place(turns, step, HEADS, CHUNK // BLOCK_M)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_M >= left):
        return
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    kv_head = head // GROUP
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, ROTATE)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    own_keys = CHUNK if MUTUAL else tl.cdiv((block + 1) * BLOCK_M, BLOCK_N) * BLOCK_N
    for t in range(0, own_keys + tl.where(exists, CHUNK, 0), BLOCK_N):
        own = t < own_keys
        s_chunk = tl.where(own, c, p)
        shift = tl.where(own, 0, tl.where(p < c, -CHUNK, CHUNK))
        s_left = length - s_chunk * CHUNK
        j = tl.where(own, t, t - own_keys) + tl.arange(0, BLOCK_N)
        k_s = _chunk_pointer(k_ptr, batch, kv_head, s_chunk, stride_kb, stride_kn, stride_kh, CHUNK)
        v_s = _chunk_pointer(v_ptr, batch, kv_head, s_chunk, stride_vb, stride_vn, stride_vh, CHUNK)
        k1, k2 = _load_rotated(k_s, stride_kn, j, s_left, table_ptr, shift, CHUNK, HALF, ROTATE)
        v = _load(v_s, stride_vn, j, s_left, D)
        s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1)))
        if MUTUAL:
            s = tl.where(j[None, :] < s_left, s, float("-inf"))
        else:  # hides keys past the end too, from every real query
            s = tl.where(i[:, None] >= (j + shift)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * SCALE)  # finite: the first block holds a key for every row
        shrink = tl.exp2(top - higher)
        w = tl.exp2(s * SCALE - higher[:, None])
        total = total * shrink + tl.sum(w, 1)
        acc = _dot_add(w.to(v.dtype), v, acc * shrink[:, None])
        top = higher

    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    o_ptrs = o_ptr + row * D + i[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(o_ptrs, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=i[:, None] < left)
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    tl.store(lse_ptr + lse_row + i, top + tl.log2(total), mask=i < left)


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
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    kv_head = head // GROUP
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    do_c = _chunk_pointer(do_ptr, batch, head, c, stride_gb, stride_gn, stride_gh, CHUNK)
    do = _load(do_c, stride_gn, i, left, D)
    o = _load(o_ptr + row * D, HEADS * D, i, left, D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + lse_row + i, delta, mask=i < left)
    lse = tl.load(lse_ptr + lse_row + i, mask=i < left, other=0.0)
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    q1, q2 = _load_rotated(q_c, stride_qn, i, left, table_ptr, 0, CHUNK, HALF, ROTATE)
    dq1 = tl.zeros([BLOCK_M, HALF], tl.float32)
    dq2 = tl.zeros([BLOCK_M, HALF], tl.float32)

    own_keys = CHUNK if MUTUAL else tl.cdiv((block + 1) * BLOCK_M, BLOCK_N) * BLOCK_N
    for t in range(0, own_keys + tl.where(exists, CHUNK, 0), BLOCK_N):
        own = t < own_keys
        s_chunk = tl.where(own, c, p)
        shift = tl.where(own, 0, tl.where(p < c, -CHUNK, CHUNK))
        s_left = length - s_chunk * CHUNK
        j = tl.where(own, t, t - own_keys) + tl.arange(0, BLOCK_N)
        k_s = _chunk_pointer(k_ptr, batch, kv_head, s_chunk, stride_kb, stride_kn, stride_kh, CHUNK)
        v_s = _chunk_pointer(v_ptr, batch, kv_head, s_chunk, stride_vb, stride_vn, stride_vh, CHUNK)
        k1, k2 = _load_rotated(k_s, stride_kn, j, s_left, table_ptr, shift, CHUNK, HALF, ROTATE)
        v = _load(v_s, stride_vn, j, s_left, D)
        s = _dot_add(q2, tl.trans(k2), _dot(q1, tl.trans(k1)))
        w = tl.exp2(s * SCALE - lse[:, None])
        if MUTUAL:
            w = tl.where(j[None, :] < s_left, w, 0.0)
        else:
            w = tl.where(i[:, None] >= (j + shift)[None, :], w, 0.0)
        dw = _dot(do, tl.trans(v))
        ds = (w * (dw - delta[:, None])).to(k1.dtype)
        dq1 = _dot_add(ds, k1, dq1)
        dq2 = _dot_add(ds, k2, dq2)

    scale: tl.constexpr = SCALE * 0.6931471805599453
    _store_unrotated(
        dq_ptr + row * D, HEADS * D, i, left, dq1 * scale, dq2 * scale, table_ptr, CHUNK, HALF, ROTATE
    )


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
    """dk and dv (B, N, Hkv, D): one program per (key block, head, batch) gathers from its two readers.

    Queries past the end are zeros, with zero do and delta: they add nothing. Keys past it are not stored.
    """
    HALF: tl.constexpr = D // 2
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    KV_HEADS: tl.constexpr = HEADS // GROUP
    c, block, kv_head, batch = _place(turns, step, KV_HEADS, CHUNK // BLOCK_N)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_N >= left):
        return
    r, exists = _reader(c, stride, num_chunks, TOPOLOGY)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_c = _chunk_pointer(k_ptr, batch, kv_head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, kv_head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    k1, k2 = _load_rotated(k_c, stride_kn, j, left, table_ptr, 0, CHUNK, HALF, ROTATE)
    v = _load(v_c, stride_vn, j, left, D)
    dk1 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)

    begin = 0 if MUTUAL else block * BLOCK_N // BLOCK_M * BLOCK_M  # earlier queries do not see these keys
    own_queries = CHUNK - begin
    queries = own_queries + tl.where(exists, CHUNK, 0)  # of one head
    for t in range(0, queries * GROUP, BLOCK_M):
        head = kv_head * GROUP + t // queries
        u = t % queries
        own = u < own_queries
        s_chunk = tl.where(own, c, r)
        shift = tl.where(own, 0, tl.where(r < c, -CHUNK, CHUNK))
        s_left = length - s_chunk * CHUNK
        i = tl.where(own, begin + u, u - own_queries) + tl.arange(0, BLOCK_M)
        q_s = _chunk_pointer(q_ptr, batch, head, s_chunk, stride_qb, stride_qn, stride_qh, CHUNK)
        do_s = _chunk_pointer(do_ptr, batch, head, s_chunk, stride_gb, stride_gn, stride_gh, CHUNK)
        lse_row = (batch.to(tl.int64) * HEADS + head) * length + s_chunk * CHUNK
        q1, q2 = _load_rotated(q_s, stride_qn, i, s_left, table_ptr, shift, CHUNK, HALF, ROTATE)
        do = _load(do_s, stride_gn, i, s_left, D)
        lse = tl.load(lse_ptr + lse_row + i, mask=i < s_left, other=0.0)
        delta = tl.load(delta_ptr + lse_row + i, mask=i < s_left, other=0.0)
        s = _dot_add(k2, tl.trans(q2), _dot(k1, tl.trans(q1)))  # (keys, queries)
        w = tl.exp2(s * SCALE - lse[None, :])
        if not MUTUAL:
            w = tl.where((i + shift)[None, :] >= j[:, None], w, 0.0)
        dv = _dot_add(w.to(do.dtype), do, dv)
        dw = _dot(v, tl.trans(do))
        ds = (w * (dw - delta[None, :])).to(q1.dtype)
        dk1 = _dot_add(ds, q1, dk1)
        dk2 = _dot_add(ds, q2, dk2)

    scale: tl.constexpr = SCALE * 0.6931471805599453
    row = (batch.to(tl.int64) * length + c * CHUNK) * KV_HEADS + kv_head  # row of (B * N * Hkv, D)
    _store_unrotated(
        dk_ptr + row * D, KV_HEADS * D, j, left, dk1 * scale, dk2 * scale, table_ptr, CHUNK, HALF, ROTATE
    )
    dv_ptrs = dv_ptr + row * D + j[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=j[:, None] < left)
