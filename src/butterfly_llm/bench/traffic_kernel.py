# mypy: ignore-errors
"""What memory alone allows: a kernel that reads and writes what the forward pass does, and only adds."""

import triton
import triton.language as tl

from butterfly_llm.ops.triton_kernels import _chunk_pointer, _partner, _place


@triton.jit(do_not_specialize=["length", "num_chunks", "stride", "turns", "step"])
def traffic_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    stride_qb, stride_qn, stride_qh, length, num_chunks, stride, turns, step,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PARTNER: tl.constexpr,
):  # fmt: skip
    """o = q + k + v of the own chunk, with PARTNER + k + v of the partner; one program a chunk and head."""
    c, _, head, batch = _place(turns, step, HEADS, 1)
    if c >= num_chunks:
        return
    p, exists = _partner(c, stride, num_chunks, "shift")
    cells = tl.arange(0, CHUNK)[:, None] * stride_qn + tl.arange(0, D)[None, :]
    x = tl.load(_chunk_pointer(q_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK) + cells)
    x += tl.load(_chunk_pointer(k_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK) + cells)
    x += tl.load(_chunk_pointer(v_ptr, batch, head, c, stride_qb, stride_qn, stride_qh, CHUNK) + cells)
    if PARTNER and exists:
        x += tl.load(_chunk_pointer(k_ptr, batch, head, p, stride_qb, stride_qn, stride_qh, CHUNK) + cells)
        x += tl.load(_chunk_pointer(v_ptr, batch, head, p, stride_qb, stride_qn, stride_qh, CHUNK) + cells)
    row = (batch.to(tl.int64) * length + c * CHUNK) * HEADS + head
    tl.store(o_ptr + row * D + tl.arange(0, CHUNK)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :], x)
