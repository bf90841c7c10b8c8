# mypy: ignore-errors
"""Triton kernels of butterfly attention, launched by `triton_attention`. Importing this needs Triton.

Queries and keys come rotated by their offset in the chunk. So keys need nothing and go from memory to the
matrix units by asynchronous copies, blocks ahead; against the partner a query turns by one whole chunk more.

Legend: c own chunk, p its partner, r its reader (the chunk whose partner it is); i query offset in its chunk,
j key offset in its chunk; `side` 1.0 where the query lies after the other chunk of the pair, -1.0 before it.
`table` (LOCAL + 1, 2, D / 2) float32: cos and sin of one whole chunk, of two, ...

LOCAL chunks just before the own one are read too, chunk c - r turned by r chunks. A partner that is no
farther is one of them; a farther one then counts as LOCAL + 1 chunks back.

Row indices inside a chunk are int32, everything above them int64. Programs are numbered so that chunks one
stride apart run side by side: what they share comes from L2.
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
def _read(x_ptr, stride_n, rows, left, D: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, D) of a chunk; zero past the end of the sequence, unless every chunk is WHOLE."""
    x_ptrs = x_ptr + rows[:, None] * stride_n + tl.arange(0, D)[None, :]
    if WHOLE:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=rows[:, None] < left, other=0.0)


@triton.jit
def _further(x1, x2, table_ptr, side, HALF: tl.constexpr):
    """Both halves turned by a whole chunk, in float32."""
    cos = tl.load(table_ptr + tl.arange(0, HALF))[None, :]
    sin = tl.load(table_ptr + HALF + tl.arange(0, HALF))[None, :] * side
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _joined(x1, x2, D: tl.constexpr):
    """Two halves (rows, D / 2) to (rows, D)."""
    return tl.reshape(tl.permute(tl.join(x1, x2), (0, 2, 1)), (x1.shape[0], D))


@triton.jit
def _read_turned(
    q_ptr, stride_n, rows, left, table_ptr, side, D: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """`_read` of queries, turned further."""
    HALF: tl.constexpr = D // 2
    q1 = _read(q_ptr, stride_n, rows, left, HALF, WHOLE)
    q2 = _read(q_ptr + HALF, stride_n, rows, left, HALF, WHOLE)
    y1, y2 = _further(q1, q2, table_ptr, side, HALF)
    return _joined(y1.to(q1.dtype), y2.to(q1.dtype), D)


@triton.jit
def _visit(q, k, v, seen, acc, top, total, SCALE: tl.constexpr, MASK: tl.constexpr):
    """One block of keys into the running softmax."""
    s = _dot(q, tl.trans(k))
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * SCALE)
    shrink = tl.exp2(top - higher)
    w = tl.exp2(s * SCALE - higher[:, None])
    total = total * shrink + tl.sum(w, 1)
    return _dot_add(w.to(v.dtype), v, acc * shrink[:, None]), higher, total


@triton.jit(
    do_not_specialize=[
        "length", "num_chunks", "stride", "turns", "step", "first", "slots", "turn", "near_slots",
        "near_turn",
    ]
)  # fmt: skip
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    length, num_chunks, stride, turns, step,
    ring_k_ptr, ring_v_ptr, stride_rb, stride_rh, first, slots, turn,
    near_k_ptr, near_v_ptr, stride_nb, stride_nh, near_slots, near_turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, LOCAL: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """o (B, N, H, D) and lse (B, H, N), in powers of 2: one program per (query block, head, batch).

    SCALE includes log2(e); WHOLE: CHUNK divides N. STREAM: the sequence is the slice of a stream that begins
    with chunk `first`; chunk p before it lies in slot (p + turn) mod `slots` of the rings (B, K, S, L, D),
    one of the LOCAL chunks in those of `near`.
    """
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    BOUNDED: tl.constexpr = MUTUAL and not WHOLE
    c, block, head, batch = _place(turns, step, HEADS, CHUNK // BLOCK_M)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_M >= left):
        return
    kv_head = head // GROUP
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    if STREAM:
        p, exists = _partner(first + c, stride, num_chunks, TOPOLOGY)
        slot = (p + turn) % slots
        p = p - first
        here = exists & (p >= 0)
    else:
        p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
        here = exists
    if LOCAL > 0:
        exists = exists & (stride > LOCAL)
        here = here & (stride > LOCAL)
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    k_c = _chunk_pointer(k_ptr, batch, kv_head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, kv_head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    k_p = _chunk_pointer(k_ptr, batch, kv_head, p, stride_kb, stride_kn, stride_kh, CHUNK)
    v_p = _chunk_pointer(v_ptr, batch, kv_head, p, stride_vb, stride_vn, stride_vh, CHUNK)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    far_ptr = table_ptr + LOCAL * D
    turned = _read_turned(q_c, stride_qn, i, left, far_ptr, tl.where(p < c, 1.0, -1.0), D, WHOLE)
    if STREAM:
        in_ring = batch.to(tl.int64) * stride_rb + kv_head.to(tl.int64) * stride_rh
        in_ring += slot.to(tl.int64) * (CHUNK * D)
        for t in tl.range(0, tl.where(exists & (p < 0), CHUNK, 0), BLOCK_N, num_stages=STAGES):
            k = _read(ring_k_ptr + in_ring, D, t + j, CHUNK, D, True).to(turned.dtype)
            v = _read(ring_v_ptr + in_ring, D, t + j, CHUNK, D, True).to(turned.dtype)
            acc, top, total = _visit(turned, k, v, True, acc, top, total, SCALE, False)
    p_left = length - p * CHUNK
    for t in tl.range(0, tl.where(here, CHUNK, 0), BLOCK_N, num_stages=STAGES):
        k = _read(k_p, stride_kn, t + j, p_left, D, not BOUNDED)
        v = _read(v_p, stride_vn, t + j, p_left, D, not BOUNDED)
        seen = (t + j)[None, :] < p_left
        acc, top, total = _visit(turned, k, v, seen, acc, top, total, SCALE, BOUNDED)

    for near in range(LOCAL):
        n = c - near - 1
        turned = _read_turned(q_c, stride_qn, i, left, table_ptr + near * D, 1.0, D, WHOLE)
        k_n = _chunk_pointer(k_ptr, batch, kv_head, n, stride_kb, stride_kn, stride_kh, CHUNK)
        v_n = _chunk_pointer(v_ptr, batch, kv_head, n, stride_vb, stride_vn, stride_vh, CHUNK)
        for t in tl.range(0, tl.where(n >= 0, CHUNK, 0), BLOCK_N, num_stages=STAGES):
            k = _read(k_n, stride_kn, t + j, CHUNK, D, True)
            v = _read(v_n, stride_vn, t + j, CHUNK, D, True)
            acc, top, total = _visit(turned, k, v, True, acc, top, total, SCALE, False)
        if STREAM:
            near_slot = (first + n + near_turn) % near_slots
            in_near = batch.to(tl.int64) * stride_nb + kv_head.to(tl.int64) * stride_nh
            in_near += near_slot.to(tl.int64) * (CHUNK * D)
            read = (n < 0) & (first + n >= 0)
            for t in tl.range(0, tl.where(read, CHUNK, 0), BLOCK_N, num_stages=STAGES):
                k = _read(near_k_ptr + in_near, D, t + j, CHUNK, D, True).to(turned.dtype)
                v = _read(near_v_ptr + in_near, D, t + j, CHUNK, D, True).to(turned.dtype)
                acc, top, total = _visit(turned, k, v, True, acc, top, total, SCALE, False)

    q = _read(q_c, stride_qn, i, left, D, WHOLE)
    own_keys = CHUNK if MUTUAL else tl.cdiv((block + 1) * BLOCK_M, BLOCK_N) * BLOCK_N
    for t in tl.range(0, own_keys, BLOCK_N, num_stages=STAGES):
        k = _read(k_c, stride_kn, t + j, left, D, WHOLE)
        v = _read(v_c, stride_vn, t + j, left, D, WHOLE)
        seen = (t + j)[None, :] < left if MUTUAL else i[:, None] >= (t + j)[None, :]
        acc, top, total = _visit(q, k, v, seen, acc, top, total, SCALE, BOUNDED or not MUTUAL)

    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    o_ptrs = o_ptr + row * D + i[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(o_ptrs, (acc * (1.0 / total)[:, None]).to(o_ptr.dtype.element_ty), mask=i[:, None] < left)
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    tl.store(lse_ptr + lse_row + i, top + tl.log2(total), mask=i < left)


@triton.jit
def _turned_back(dq, table_ptr, side, D: tl.constexpr):
    """The gradient of queries from that of turned ones."""
    x1, x2 = tl.split(tl.permute(tl.reshape(dq, (dq.shape[0], 2, D // 2)), (0, 2, 1)))
    x1, x2 = _further(x1, x2, table_ptr, -side, D // 2)
    return _joined(x1, x2, D)


@triton.jit
def _score_gradient(q, k, v, do, lse, delta, seen, SCALE: tl.constexpr, MASK: tl.constexpr):
    """Queries by keys: the gradient of the scores, in the inputs' dtype."""
    w = tl.exp2(_dot(q, tl.trans(k)) * SCALE - lse[:, None])
    if MASK:
        w = tl.where(seen, w, 0.0)
    return (w * (_dot(do, tl.trans(v)) - delta[:, None])).to(k.dtype)


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, D) and delta = rowsum(do * o) (B, H, N): one program per (query block, head, batch)."""
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    BOUNDED: tl.constexpr = MUTUAL and not WHOLE
    c, block, head, batch = _place(turns, step, HEADS, CHUNK // BLOCK_M)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_M >= left):
        return
    p, exists = _partner(c, stride, num_chunks, TOPOLOGY)
    if LOCAL > 0:
        exists = exists & (stride > LOCAL)
    kv_head = head // GROUP
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
    k_c = _chunk_pointer(k_ptr, batch, kv_head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, kv_head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    k_p = _chunk_pointer(k_ptr, batch, kv_head, p, stride_kb, stride_kn, stride_kh, CHUNK)
    v_p = _chunk_pointer(v_ptr, batch, kv_head, p, stride_vb, stride_vn, stride_vh, CHUNK)
    do_c = _chunk_pointer(do_ptr, batch, head, c, stride_gb, stride_gn, stride_gh, CHUNK)
    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head  # row of (B * N * H, D)
    lse_row = (batch.to(tl.int64) * HEADS + head) * length + c * CHUNK
    do = _read(do_c, stride_gn, i, left, D, WHOLE)
    o = _read(o_ptr + row * D, HEADS * D, i, left, D, WHOLE)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + lse_row + i, delta, mask=i < left)
    lse = tl.load(lse_ptr + lse_row + i, mask=i < left, other=0.0)

    side = tl.where(p < c, 1.0, -1.0)
    p_left = length - p * CHUNK
    far_ptr = table_ptr + LOCAL * D
    turned = _read_turned(q_c, stride_qn, i, left, far_ptr, side, D, WHOLE)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for t in tl.range(0, tl.where(exists, CHUNK, 0), BLOCK_N, num_stages=STAGES):
        k = _read(k_p, stride_kn, t + j, p_left, D, not BOUNDED)
        v = _read(v_p, stride_vn, t + j, p_left, D, not BOUNDED)
        seen = (t + j)[None, :] < p_left
        ds = _score_gradient(turned, k, v, do, lse, delta, seen, SCALE, BOUNDED)
        dq = _dot_add(ds, k, dq)
    dq = _turned_back(dq, far_ptr, side, D)

    for near in range(LOCAL):
        n = c - near - 1
        near_ptr = table_ptr + near * D
        turned = _read_turned(q_c, stride_qn, i, left, near_ptr, 1.0, D, WHOLE)
        k_n = _chunk_pointer(k_ptr, batch, kv_head, n, stride_kb, stride_kn, stride_kh, CHUNK)
        v_n = _chunk_pointer(v_ptr, batch, kv_head, n, stride_vb, stride_vn, stride_vh, CHUNK)
        more = tl.zeros([BLOCK_M, D], tl.float32)
        for t in tl.range(0, tl.where(n >= 0, CHUNK, 0), BLOCK_N, num_stages=STAGES):
            k = _read(k_n, stride_kn, t + j, CHUNK, D, True)
            v = _read(v_n, stride_vn, t + j, CHUNK, D, True)
            ds = _score_gradient(turned, k, v, do, lse, delta, True, SCALE, False)
            more = _dot_add(ds, k, more)
        dq += _turned_back(more, near_ptr, 1.0, D)

    q = _read(q_c, stride_qn, i, left, D, WHOLE)
    own_keys = CHUNK if MUTUAL else tl.cdiv((block + 1) * BLOCK_M, BLOCK_N) * BLOCK_N
    for t in tl.range(0, own_keys, BLOCK_N, num_stages=STAGES):
        k = _read(k_c, stride_kn, t + j, left, D, WHOLE)
        v = _read(v_c, stride_vn, t + j, left, D, WHOLE)
        seen = (t + j)[None, :] < left if MUTUAL else i[:, None] >= (t + j)[None, :]
        ds = _score_gradient(q, k, v, do, lse, delta, seen, SCALE, BOUNDED or not MUTUAL)
        dq = _dot_add(ds, k, dq)
    x_ptrs = dq_ptr + row * D + i[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    dq = dq * (SCALE * 0.6931471805599453)
    tl.store(x_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=i[:, None] < left)


@triton.jit
def _key_side(k, v, q, do, lse, delta, seen, dk, dv, SCALE: tl.constexpr, MASK: tl.constexpr):
    """Keys by queries: dk and dv with what one block adds, and the gradient of its scores."""
    w = tl.exp2(_dot(k, tl.trans(q)) * SCALE - lse[None, :])
    if MASK:
        w = tl.where(seen, w, 0.0)
    dv = _dot_add(w.to(do.dtype), do, dv)
    ds = (w * (_dot(v, tl.trans(do)) - delta[None, :])).to(q.dtype)
    return _dot_add(ds, q, dk), dv, ds


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr,
    TOPOLOGY: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, N, Hkv, D): one program per (key block, head, batch) gathers from those who read it.

    Queries past the end are zeros, with zero do and delta: they add nothing. Keys past it are not stored.
    """
    MUTUAL: tl.constexpr = TOPOLOGY == "xor"
    KV_HEADS: tl.constexpr = HEADS // GROUP
    c, block, kv_head, batch = _place(turns, step, KV_HEADS, CHUNK // BLOCK_N)
    left = length - c * CHUNK
    if (c >= num_chunks) | (block * BLOCK_N >= left):
        return
    r, exists = _reader(c, stride, num_chunks, TOPOLOGY)
    if LOCAL > 0:
        exists = exists & (stride > LOCAL)
    r_left = length - r * CHUNK
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_c = _chunk_pointer(k_ptr, batch, kv_head, c, stride_kb, stride_kn, stride_kh, CHUNK)
    v_c = _chunk_pointer(v_ptr, batch, kv_head, c, stride_vb, stride_vn, stride_vh, CHUNK)
    k = _read(k_c, stride_kn, j, left, D, WHOLE)
    v = _read(v_c, stride_vn, j, left, D, WHOLE)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    begin = 0 if MUTUAL else block * BLOCK_N // BLOCK_M * BLOCK_M  # earlier queries do not see these keys
    # The reader's queries turn further, block by block. Keys turned back once instead take a tenth of the
    # instructions away and were measured to be 3% slower.
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q_r = _chunk_pointer(q_ptr, batch, head, r, stride_qb, stride_qn, stride_qh, CHUNK)
        do_r = _chunk_pointer(do_ptr, batch, head, r, stride_gb, stride_gn, stride_gh, CHUNK)
        first = (batch.to(tl.int64) * HEADS + head) * length
        for t in tl.range(0, tl.where(exists, CHUNK, 0), BLOCK_M, num_stages=STAGES):
            i = t + tl.arange(0, BLOCK_M)
            side = tl.where(r > c, 1.0, -1.0)
            q = _read_turned(q_r, stride_qn, i, r_left, table_ptr + LOCAL * D, side, D, WHOLE)
            do = _read(do_r, stride_gn, i, r_left, D, WHOLE)
            lse = tl.load(lse_ptr + first + r * CHUNK + i, mask=i < r_left, other=0.0)
            delta = tl.load(delta_ptr + first + r * CHUNK + i, mask=i < r_left, other=0.0)
            dk, dv, _ = _key_side(k, v, q, do, lse, delta, True, dk, dv, SCALE, False)
        for near in range(LOCAL):
            n = c + near + 1
            n_left = length - n * CHUNK
            q_n = _chunk_pointer(q_ptr, batch, head, n, stride_qb, stride_qn, stride_qh, CHUNK)
            do_n = _chunk_pointer(do_ptr, batch, head, n, stride_gb, stride_gn, stride_gh, CHUNK)
            for t in tl.range(0, tl.where(n < num_chunks, CHUNK, 0), BLOCK_M, num_stages=STAGES):
                i = t + tl.arange(0, BLOCK_M)
                q = _read_turned(q_n, stride_qn, i, n_left, table_ptr + near * D, 1.0, D, WHOLE)
                do = _read(do_n, stride_gn, i, n_left, D, WHOLE)
                lse = tl.load(lse_ptr + first + n * CHUNK + i, mask=i < n_left, other=0.0)
                delta = tl.load(delta_ptr + first + n * CHUNK + i, mask=i < n_left, other=0.0)
                dk, dv, _ = _key_side(k, v, q, do, lse, delta, True, dk, dv, SCALE, False)
        q_c = _chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK)
        do_c = _chunk_pointer(do_ptr, batch, head, c, stride_gb, stride_gn, stride_gh, CHUNK)
        for t in tl.range(begin, CHUNK, BLOCK_M, num_stages=STAGES):
            i = t + tl.arange(0, BLOCK_M)
            q = _read(q_c, stride_qn, i, left, D, WHOLE)
            do = _read(do_c, stride_gn, i, left, D, WHOLE)
            lse = tl.load(lse_ptr + first + c * CHUNK + i, mask=i < left, other=0.0)
            delta = tl.load(delta_ptr + first + c * CHUNK + i, mask=i < left, other=0.0)
            seen = i[None, :] >= j[:, None]
            dk, dv, _ = _key_side(k, v, q, do, lse, delta, seen, dk, dv, SCALE, not MUTUAL)
    row = (batch.to(tl.int64) * length + c * CHUNK) * KV_HEADS + kv_head  # row of (B * N * Hkv, D)
    cells = row * D + j[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    dk = dk * (SCALE * 0.6931471805599453)
    tl.store(dk_ptr + cells, dk.to(dk_ptr.dtype.element_ty), mask=j[:, None] < left)
    tl.store(dv_ptr + cells, dv.to(dv_ptr.dtype.element_ty), mask=j[:, None] < left)
