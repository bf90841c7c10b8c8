# mypy: ignore-errors
"""Triton kernels of the feed-forward layer relu(norm(x) W_up^T)^2 W_down^T, launched by `feed_forward`.

The scale of a row in its RMSNorm is a factor of the whole row, so it is applied to the product and the
normalised rows never exist; the gains are in the weights. Sums are float32.

Shapes: T rows (characters), d hidden size, F intermediate size.

Roofline, 16-bit values, for each row: forward reads d and writes F values, backward reads d + F and writes F,
for 2 d F operations each. Memory bounds it up to d = 256 on an H100, arithmetic from 512 on. In one kernel
both products read d and write d values: arithmetic bounds it.
"""

import triton
import triton.language as tl


@triton.jit
def up_kernel(
    a_ptr, weight_ptr, factor_ptr, hidden_ptr, out_ptr, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """out (T, N) from u = factor (a weight^T), a (T, K), weight (N, K), factor (T,) float32.

    Forward: relu(u)^2. GRADIENT: 2 relu' u, where hidden (T, N) is the square of relu': the gradient of the
    product above, once more times its factor, when a is the gradient of the layer and weight is W_down^T.
    """
    # Programs side by side share rows of a; the weights stay in L2.
    first = tl.program_id(0) // (N // BLOCK_N) * BLOCK_M
    columns = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_M)
    inside = first + inner < rows
    near = tl.minimum(inner, rows - 1 - first)  # rows past the end repeat the last one and are not stored
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + first.to(tl.int64) * K + near[:, None] * K + k[None, :]
    w_ptrs = weight_ptr + columns[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc = acc * tl.load(factor_ptr + first + near)[:, None]
    corner = first.to(tl.int64) * N
    places = inner[:, None] * N + columns[None, :]
    if GRADIENT:
        hidden = tl.load(hidden_ptr + corner + places, mask=inside[:, None], other=0.0)
        acc = acc * (2.0 * tl.sqrt(hidden.to(tl.float32)))
    else:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    tl.store(out_ptr + corner + places, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def whole_kernel(
    x_ptr, up_ptr, down_ptr, factor_ptr, out_ptr, rows,
    D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = x + relu(factor (x up^T))^2 down^T: x and out (T, D), up (F, D), down (D, F), factor (T,).

    A program keeps its rows and their sums, and takes the F values between in slices of BLOCK_F.
    """
    first = tl.program_id(0) * BLOCK_M
    inner = tl.arange(0, BLOCK_M)
    inside = first + inner < rows
    near = tl.minimum(inner, rows - 1 - first)
    d = tl.arange(0, D)
    f = tl.arange(0, BLOCK_F)
    corner = first.to(tl.int64) * D
    x = tl.load(x_ptr + corner + near[:, None] * D + d[None, :])
    factor = tl.load(factor_ptr + first + near)[:, None]
    up_ptrs = up_ptr + f[None, :] * D + d[:, None]
    down_ptrs = down_ptr + d[None, :] * F + f[:, None]
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for _ in range(0, F, BLOCK_F):
        u = tl.maximum(tl.dot(x, tl.load(up_ptrs), input_precision="ieee") * factor, 0.0)
        acc = tl.dot((u * u).to(x.dtype), tl.load(down_ptrs), acc, input_precision="ieee")
        up_ptrs += BLOCK_F * D
        down_ptrs += BLOCK_F
    acc += x.to(tl.float32)
    places = inner[:, None] * D + d[None, :]
    tl.store(out_ptr + corner + places, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
