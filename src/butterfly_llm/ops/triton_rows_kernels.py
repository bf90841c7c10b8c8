# mypy: ignore-errors
"""Triton kernels of a decoding step around its attention, launched by `triton_rows`.

Products of a few rows with a matrix are bound by reading it and by launches: norms, activations, gates and
residuals ride along. Sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    x_ptr, gain_ptr, w_ptr, rows, columns, batch, limit, stride_x, eps,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """RMSNorm(x) W^T for rows x columns (BLOCK_B, BLOCK_N): the norm's factor is taken out of the sum.

    Rows from `batch` and columns from `limit` on are zero.
    """
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < batch) & (k[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
        there = (columns[:, None] < limit) & (k[None, :] < K)
        w = tl.load(w_ptr + columns[:, None] * K + k[None, :], mask=there, other=0.0)
        if NORM:
            squares += tl.sum(x * x, 1)
            gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            x = x * gain[None, :]
        acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    if NORM:
        acc = acc / tl.sqrt(squares / K + eps)[:, None]
    return acc


@triton.jit
def rows_kernel(
    x_ptr, gain_ptr, w_ptr, lanes_ptr, lane_gain_ptr, read_ptr, head_gain_ptr, residual_ptr, out_ptr,
    batch, stride_x, stride_lanes, eps,
    K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, FIRST_READ: tl.constexpr, HEADS: tl.constexpr,
    TURNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, LANES_NORM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """out (B, N) = act(norm(x) W^T [+ [norm](lanes) W_read^T on columns FIRST_READ..]) [+ residual].

    KIND "heads": a block of columns is a head; the first HEADS are queries, up to TURNED keys, both
    normalised with the gains in head_gain (2, BLOCK_N).
    """
    block = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(
        x_ptr, gain_ptr, w_ptr, rows, columns, batch, N, stride_x, eps, K, BLOCK_B, BLOCK_N, BLOCK_K, NORM
    )
    if LANES > 0:  # noqa: SIM102 (decided when compiling, the next when running)
        if block * BLOCK_N >= FIRST_READ:
            acc += _product(
                lanes_ptr, lane_gain_ptr, read_ptr, rows, columns - FIRST_READ, batch, N - FIRST_READ,
                stride_lanes, eps, LANES, BLOCK_B, BLOCK_N, BLOCK_K, LANES_NORM,
            )  # fmt: skip
    if KIND == "heads":  # noqa: SIM102
        if block < TURNED:
            kind = tl.where(block < HEADS, 0, 1)
            gain = tl.load(head_gain_ptr + kind * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.float32)
            acc = acc / tl.sqrt(tl.sum(acc * acc, 1) / BLOCK_N + eps)[:, None] * gain[None, :]
    if KIND == "relu2":
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    places = rows[:, None] * N + columns[None, :]
    inside = (rows[:, None] < batch) & (columns[None, :] < N)
    if KIND == "add":
        acc += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _ring_rows(
    ring_ptr, position_ptr, batch, stride_ring, slots, stride,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, TOPOLOGY: tl.constexpr,
):  # fmt: skip
    """Where the row of a stream and its partner's lie in the ring of the carry, and whether there is one."""
    position = tl.load(position_ptr + batch)
    chunk = position // CHUNK
    offset = position % CHUNK
    exists = chunk >= stride if TOPOLOGY == "shift" else (chunk & stride) != 0
    ring = ring_ptr + batch * stride_ring
    own = ring + ((chunk % slots) * CHUNK + offset) * WIDTH
    far = ring + (((chunk + 1) % slots) * CHUNK + offset) * WIDTH
    return own, far, exists


@triton.jit(do_not_specialize=["slots", "stride"])
def merge_kernel(
    scan_ptr, ring_ptr, position_ptr, w_ptr, bias_ptr, out_ptr, stride_ring, slots, stride,
    M: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, TOPOLOGY: tl.constexpr,
):  # fmt: skip
    """One level of the scan for a stream: scan goes into the ring, its partner comes out of the next slot."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own, far, exists = _ring_rows(
        ring_ptr, position_ptr, batch, stride_ring, slots, stride, M, CHUNK, TOPOLOGY
    )  # fmt: skip
    k = tl.arange(0, PADDED)
    inside = k < M
    scan = tl.load(scan_ptr + batch * M + k, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(far + k, mask=inside & exists, other=0.0).to(tl.float32)
    w_own = tl.load(w_ptr + columns[:, None] * (2 * M) + k[None, :], mask=inside[None, :], other=0.0)
    w_far = tl.load(w_ptr + columns[:, None] * (2 * M) + M + k[None, :], mask=inside[None, :], other=0.0)
    total = tl.sum(w_own.to(tl.float32) * scan[None, :] + w_far.to(tl.float32) * partner[None, :], 1)
    total += tl.load(bias_ptr + columns).to(tl.float32)
    mine = tl.load(scan_ptr + batch * M + columns)
    heard = tl.load(far + columns, mask=(columns < M) & exists, other=0.0).to(tl.float32)
    merged = mine.to(tl.float32) + heard / (1.0 + tl.exp(-total))
    tl.store(own + columns, mine.to(ring_ptr.dtype.element_ty))
    tl.store(out_ptr + batch * M + columns, merged.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["slots", "stride"])
def merge_heads_kernel(
    scan_ptr, ring_ptr, position_ptr, bias_ptr, out_ptr, stride_ring, slots, stride,
    HEADS: tl.constexpr, ROW: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TOPOLOGY: tl.constexpr,
):  # fmt: skip
    """`merge_kernel` of rows (scores of HEADS, values): each value moves to its partner by the softmax."""
    batch = tl.program_id(0).to(tl.int64)
    own, far, exists = _ring_rows(
        ring_ptr, position_ptr, batch, stride_ring, slots, stride, ROW, CHUNK, TOPOLOGY
    )  # fmt: skip
    scan = scan_ptr + batch * ROW
    k = tl.arange(0, PADDED)
    inside = k < ROW
    head = tl.where(k < HEADS, k, (k - HEADS) // ((ROW - HEADS) // HEADS))
    mine = tl.load(scan + k, mask=inside, other=0.0)
    value = mine.to(tl.float32)
    heard = tl.load(far + k, mask=inside & exists, other=0.0).to(tl.float32)
    score = tl.load(scan + head, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(far + head, mask=inside & exists, other=float("-inf")).to(tl.float32)
    other -= tl.load(bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(score - other))
    both = tl.maximum(score, other) + tl.log(1.0 + tl.exp(-tl.abs(score - other)))
    merged = tl.where(k < HEADS, both, value + share * (heard - value))
    tl.store(own + k, mine.to(ring_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + batch * ROW + k, merged.to(out_ptr.dtype.element_ty), mask=inside)
