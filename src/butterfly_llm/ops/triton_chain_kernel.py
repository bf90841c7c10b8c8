# mypy: ignore-errors
"""The backward pass of butterfly attention in one Triton kernel, where chunks read the one a stride before.

A program walks a segment of a chain: chunks c, c + stride, c + 2 stride, ... It has the keys of each meet
the chunk's own queries, whose gradient is complete then, and those of its reader, the next of the chain. So
scores are made once for all three gradients, and what is read a second time comes from a cache. Segments
overlap: a walk begins with the keys before its segment, for their part in the first dq, and keeps nothing
else of them.

Importing this needs Triton. Names as in `triton_kernels`.
"""

import triton
import triton.language as tl

from butterfly_llm.ops.triton_kernels import _dot, _dot_add, _key_side, _read, _read_turned, _turned_back


@triton.jit
def _meet(
    q, k, v, do_ptr, o_ptr, lse_ptr, stride_n, left, seen, dk, dv,
    HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """`_key_side` of a block of queries. Pointers are to its first row; `left` rows are there from it on."""
    i = tl.arange(0, q.shape[0])
    do = _read(do_ptr, stride_n, i, left, D, WHOLE)
    o = _read(o_ptr, HEADS * D, i, left, D, WHOLE)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + i, mask=i < left, other=0.0)
    return _key_side(k, v, q, do, lse, delta, seen, dk, dv, SCALE, MASK)


@triton.jit
def _fetch(x_ptr, stride_n, left, CHUNK: tl.constexpr, D: tl.constexpr):
    """Begin to bring the rows of a chunk into the second cache, in whole blocks of 16 bytes."""
    rows = x_ptr + tl.minimum(tl.arange(0, CHUNK), left - 1) * stride_n
    size: tl.constexpr = D * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [rows.to(tl.int64) & -16, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns"])
def chain_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, table_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    length, num_chunks, stride, turns,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, SCALE: tl.constexpr,
    WHOLE: tl.constexpr, SEGMENT: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv (B, N, H, D): one program per (head, chain, segment of SEGMENT chunks, batch).

    `stride` chains, at most one for each chunk, of `turns` segments. Queries past the end are zeros, with
    zero do and delta: they add nothing. Keys past it are not stored.
    """
    pid = tl.program_id(0)
    head = (pid % HEADS).to(tl.int64)
    slot = pid // HEADS % (turns * stride)
    batch = (pid // HEADS // (turns * stride)).to(tl.int64)
    first = slot // stride * (SEGMENT * stride) + slot % stride
    end = tl.minimum(first + SEGMENT * stride, num_chunks)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    do_ptr += batch * stride_gb + head * stride_gh
    lse_ptr += (batch * HEADS + head) * length
    stride_on: tl.constexpr = HEADS * D  # of o and the gradients
    o_ptr += (batch * length * HEADS + head) * D
    dq_ptr += (batch * length * HEADS + head) * D
    dk_ptr += (batch * length * HEADS + head) * D
    dv_ptr += (batch * length * HEADS + head) * D
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, CHUNK)
    d = tl.arange(0, D)
    nothing = tl.zeros([BLOCK_M, D], tl.float32)
    dq = ()
    for _ in tl.static_range(CHUNK // BLOCK_M):
        dq = dq + (nothing,)  # noqa: RUF005 (Triton knows no star)
    for c in tl.range(tl.where(first < stride, first, first - stride), end, stride):
        r = c + stride
        left = length - c * CHUNK
        r_left = length - r * CHUNK
        r_row = r.to(tl.int64) * CHUNK
        c_row = (r - stride).to(tl.int64) * CHUNK
        if FETCH:  # noqa: SIM102 (decided when compiling, the next when running)
            if r < num_chunks:
                _fetch(q_ptr + r_row * stride_qn, stride_qn, r_left, CHUNK, D)
                _fetch(k_ptr + r_row * stride_kn, stride_kn, r_left, CHUNK, D)
                _fetch(v_ptr + r_row * stride_vn, stride_vn, r_left, CHUNK, D)
                _fetch(do_ptr + r_row * stride_gn, stride_gn, r_left, CHUNK, D)
                _fetch(o_ptr + r_row * stride_on, stride_on, r_left, CHUNK, D)
        k = _read(k_ptr + c_row * stride_kn, stride_kn, j, left, D, WHOLE)
        v = _read(v_ptr + c_row * stride_vn, stride_vn, j, left, D, WHOLE)
        dk = tl.zeros([CHUNK, D], tl.float32)
        dv = tl.zeros([CHUNK, D], tl.float32)
        if c >= first:
            for b in tl.static_range(CHUNK // BLOCK_M):
                row = c_row + b * BLOCK_M
                rest = left - b * BLOCK_M
                q = _read(q_ptr + row * stride_qn, stride_qn, i, rest, D, WHOLE)
                seen = (b * BLOCK_M + i)[None, :] >= j[:, None]
                dk, dv, ds = _meet(
                    q, k, v, do_ptr + row * stride_gn, o_ptr + row * stride_on, lse_ptr + row, stride_gn,
                    rest, seen, dk, dv, HEADS, D, SCALE, WHOLE, True,
                )  # fmt: skip
                whole = _dot_add(tl.trans(ds), k, dq[b]) * (SCALE * 0.6931471805599453)
                cells = row * stride_on + i[:, None] * stride_on + d[None, :]
                tl.store(dq_ptr + cells, whole.to(dq_ptr.dtype.element_ty), mask=i[:, None] < rest)
        if r < num_chunks:
            parts = ()
            for b in tl.static_range(CHUNK // BLOCK_M):
                row = r_row + b * BLOCK_M
                rest = r_left - b * BLOCK_M
                q = _read_turned(q_ptr + row * stride_qn, stride_qn, i, rest, table_ptr, 1.0, D, WHOLE)
                dk, dv, ds = _meet(
                    q, k, v, do_ptr + row * stride_gn, o_ptr + row * stride_on, lse_ptr + row, stride_gn,
                    rest, True, dk, dv, HEADS, D, SCALE, WHOLE, False,
                )  # fmt: skip
                part = _turned_back(_dot(tl.trans(ds), k), table_ptr, 1.0, D)
                parts = parts + (part,)  # noqa: RUF005
            dq = parts
        if c >= first:
            cells = c_row * stride_on + j[:, None] * stride_on + d[None, :]
            dk = dk * (SCALE * 0.6931471805599453)
            tl.store(dk_ptr + cells, dk.to(dk_ptr.dtype.element_ty), mask=j[:, None] < left)
            tl.store(dv_ptr + cells, dv.to(dv_ptr.dtype.element_ty), mask=j[:, None] < left)
