# mypy: ignore-errors
"""Triton kernels of one level of a carry with heads, launched by `triton_carry`.

Legend: t a row, p the row that it reads (its lane of the partner chunk), r the row that reads it. A row holds
a score for each head, then SIZE values for each. The partner's lane is read where it lies, so nothing is
shifted in memory, and a row gathers its gradient as t and as p from its reader: no atomics.

Roofline, 16-bit values, W a row's width: forward reads 2 W and writes W values a row, of which the partner's
comes from L2 where chunks are near; backward reads 4 W more. Memory bounds both.
"""

import triton
import triton.language as tl


@triton.jit
def _place(length, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program: its head, the first element of its sequence, its rows, and which of them there are."""
    head = tl.program_id(1) % HEADS
    first = (tl.program_id(1) // HEADS).to(tl.int64) * length * (HEADS * (1 + SIZE))
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return head, first, rows, rows < length


@triton.jit
def _lanes(rows, stride, length, CHUNK: tl.constexpr, TOPOLOGY: tl.constexpr):
    """The rows that `rows` read and those that read them, each with whether there is one."""
    if TOPOLOGY == "shift":
        read = rows - stride * CHUNK
        reader = rows + stride * CHUNK
        return read, read >= 0, reader, reader < length
    read = ((rows // CHUNK) ^ stride) * CHUNK + rows % CHUNK
    if TOPOLOGY == "xor_causal":
        return read, read < rows, read, (read > rows) & (read < length)
    return read, read < length, read, read < length


@triton.jit
def _row(x_ptr, rows, inside, head, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Scores (T,) and values (T, PADDED) of a head in float32, zero where not inside."""
    k = tl.arange(0, PADDED)
    start = rows * (HEADS * (1 + SIZE))
    score = tl.load(x_ptr + start + head, mask=inside, other=0.0).to(tl.float32)
    cells = x_ptr + (start + HEADS + head * SIZE)[:, None] + k[None, :]
    values = tl.load(cells, mask=inside[:, None] & (k < SIZE)[None, :], other=0.0)
    return score, values.to(tl.float32)


@triton.jit
def _store_row(
    x_ptr, rows, inside, head, score, values, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    k = tl.arange(0, PADDED)
    start = rows * (HEADS * (1 + SIZE))
    kind = x_ptr.dtype.element_ty
    tl.store(x_ptr + start + head, score.to(kind), mask=inside)
    cells = x_ptr + (start + HEADS + head * SIZE)[:, None] + k[None, :]
    tl.store(cells, values.to(kind), mask=inside[:, None] & (k < SIZE)[None, :])


@triton.jit
def _terms(own, mine, far, heard, grad_score, grad_values):
    """Gradients of own, of the values mine, of far and of the values heard, at one merge."""
    share = 1.0 / (1.0 + tl.exp(own - far))
    moved = tl.sum(grad_values * (heard - mine), 1) * share * (1.0 - share)
    return (
        grad_score * (1.0 - share) - moved,
        grad_values * (1.0 - share)[:, None],
        grad_score * share + moved,
        grad_values * share[:, None],
    )


@triton.jit
def merge_rows_kernel(
    scan_ptr, bias_ptr, out_ptr, length, stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    TOPOLOGY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, N, W) of scan (B, N, W) and bias (HEADS,): rows of one head and one sequence a program."""
    head, first, rows, inside = _place(length, HEADS, SIZE, BLOCK)
    read, exists, _, _ = _lanes(rows, stride, length, CHUNK, TOPOLOGY)
    own, mine = _row(scan_ptr + first, rows, inside, head, HEADS, SIZE, PADDED)
    far, heard = _row(scan_ptr + first, read, inside & exists, head, HEADS, SIZE, PADDED)
    far = tl.where(exists, far - tl.load(bias_ptr + head).to(tl.float32), float("-inf"))
    share = 1.0 / (1.0 + tl.exp(own - far))
    both = tl.maximum(own, far) + tl.log(1.0 + tl.exp(-tl.abs(own - far)))
    merged = mine + share[:, None] * (heard - mine)
    _store_row(out_ptr + first, rows, inside, head, both, merged, HEADS, SIZE, PADDED)


@triton.jit
def merge_rows_gradient_kernel(
    scan_ptr, bias_ptr, grad_ptr, out_ptr, bias_out_ptr, length, stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    TOPOLOGY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, N, W), the gradient of scan, from grad (B, N, W); bias_out: a part of the bias's a program."""
    head, first, rows, inside = _place(length, HEADS, SIZE, BLOCK)
    bias = tl.load(bias_ptr + head).to(tl.float32)
    read, exists, reader, is_read = _lanes(rows, stride, length, CHUNK, TOPOLOGY)
    own, mine = _row(scan_ptr + first, rows, inside, head, HEADS, SIZE, PADDED)

    far, heard = _row(scan_ptr + first, read, inside & exists, head, HEADS, SIZE, PADDED)
    far = tl.where(exists, far - bias, float("-inf"))
    grad_score, grad_values = _row(grad_ptr + first, rows, inside, head, HEADS, SIZE, PADDED)
    d_own, d_mine, d_far, _ = _terms(own, mine, far, heard, grad_score, grad_values)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(bias_out_ptr + place, -tl.sum(d_far, 0))

    is_read = inside & is_read
    score, values = _row(scan_ptr + first, reader, is_read, head, HEADS, SIZE, PADDED)
    grad_score, grad_values = _row(grad_ptr + first, reader, is_read, head, HEADS, SIZE, PADDED)
    _, _, d_far, d_heard = _terms(score, values, own - bias, mine, grad_score, grad_values)
    d_own += d_far  # zero where nobody reads: there the gradients are
    d_mine += d_heard
    _store_row(out_ptr + first, rows, inside, head, d_own, d_mine, HEADS, SIZE, PADDED)
