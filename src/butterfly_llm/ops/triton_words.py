# mypy: ignore-errors
"""Pieces of the kernel of a whole step: words that programs hand each other, rows of matrices times vectors.

Words are EMPTY, a NaN that no arithmetic gives, until a float32 value is put there. A reader asks with loads
that pass by the first cache, which is not kept coherent, until it is. With WAIT off (Triton's interpreter,
where programs run one after another) nothing waits.
"""

import triton
import triton.language as tl
from triton import constexpr_function

EMPTY = tl.constexpr(-1)


@constexpr_function
def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


@constexpr_function
def block_of(size: int) -> int:
    """Columns that are taken at once: as many as a warp loads together, of wide matrices as four warps do.

    Every block of a vector is handed to all warps through shared memory, for itself.
    """
    return min(256 if size < 1024 else 1024, size & -size)


@constexpr_function
def wait_asm(count: int, pause: int) -> str:
    """Load `count` words until none is empty; a wait of seconds is an error of the launch."""
    loads = "".join(f"ld.relaxed.gpu.global.b32 ${i}, [${count + i}];" for i in range(count))
    checks = "setp.eq.b32 p, $0, -1;" + "".join(f"setp.eq.or.b32 p, ${i}, -1, p;" for i in range(1, count))
    rest = f"nanosleep.u32 {pause};" if pause else ""
    return (
        "{.reg .pred p; .reg .b32 n; mov.u32 n, 0; again:" + loads + checks + "@!p bra done;" + rest
        + "add.u32 n, n, 1; setp.lt.u32 p, n, 16777216; @p bra again; trap; done: }"
    )  # fmt: skip


@constexpr_function
def wait_constraints(count: int) -> str:
    # Outputs are written while inputs are still needed, hence "&".
    return ",".join(["=&r"] * count + ["l"] * count)


@constexpr_function
def wait_types(count: int) -> tuple[tl.dtype, ...]:
    return (tl.int32,) * count


@triton.jit
def wait_for(
    pointers, SIZE: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr = 0
):  # fmt: skip
    """The values at each of a tuple of blocks of SIZE pointers, once all are there; a tuple."""
    N: tl.constexpr = len(pointers)
    values = ()
    if WAIT:
        # The result of a while loop is moved between layouts; that of an operation the compiler would rather
        # compute once more in each layout, and every wait takes its time.
        PACK: tl.constexpr = max(1, SIZE // THREADS)
        places = ()
        bits = ()
        for i in tl.static_range(N):
            places = places + (pointers[i].to(tl.int64),)  # noqa: RUF005 (Triton knows no star)
            bits = bits + (tl.zeros(pointers[i].shape, tl.int32),)  # noqa: RUF005
        waiting = True
        while waiting:
            bits = tl.inline_asm_elementwise(
                wait_asm(N * PACK, PAUSE), wait_constraints(N * PACK), places, dtype=wait_types(N),
                is_pure=False, pack=PACK,
            )  # fmt: skip
            waiting = False
        for i in tl.static_range(N):
            values = values + (bits[i].to(tl.float32, bitcast=True),)  # noqa: RUF005
    else:
        for i in tl.static_range(N):
            values = values + (tl.load(pointers[i]).to(tl.float32, bitcast=True),)  # noqa: RUF005
    return values


@triton.jit
def glance_at(word_ptr):
    """What is at a block of pointers by now, for `settle` to make sure of later."""
    return tl.load(word_ptr, volatile=True)


@triton.jit
def settle(bits, word_ptr, WAIT: tl.constexpr):
    """The values at which `glance_at` had a look; those that were not there are waited for."""
    if WAIT:
        bits = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 n; mov.u32 n, 0; mov.b32 $0, $1;"
            "again: setp.ne.b32 p, $0, -1; @p bra done; ld.relaxed.gpu.global.b32 $0, [$2];"
            "add.u32 n, n, 1; setp.lt.u32 p, n, 16777216; @p bra again; trap; done: }",
            "=&r,r,l", [bits, word_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        bits = tl.load(word_ptr)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def send(word_ptr, value, mask):
    bits = value.to(tl.int32, bitcast=True)
    tl.store(word_ptr, tl.where(bits == EMPTY, 0x7FFFFFFF, bits), mask=mask)


@triton.jit
def send_rows(word_ptr, value, mask, WAIT: tl.constexpr):
    """`send` in the layout that a sum leaves: a store would have the values moved through shared memory."""
    if WAIT:
        tl.inline_asm_elementwise(
            "{.reg .pred p, q; .reg .b32 w; setp.eq.b32 q, $2, -1; selp.b32 w, 0x7FFFFFFF, $2, q;"
            "setp.ne.b32 p, $3, 0; @p st.relaxed.gpu.global.b32 [$1], w; mov.b32 $0, w; }",
            "=r,l,r,r", [word_ptr.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        send(word_ptr, value, mask)


@triton.jit
def fetch(ptr, size, FETCH: tl.constexpr):
    """Begin to bring `size` bytes into the second cache, whole blocks of 16."""
    if FETCH:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, t; }",
            "=r,l,r", [ptr.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fetch_rows(w_ptr, first, rows, limit, K: tl.constexpr, FETCH: tl.constexpr):
    """`fetch` of rows first.. of a matrix (limit, K)."""
    if FETCH:  # noqa: SIM102 (decided when compiling, the next when running)
        if first < limit:
            size = tl.minimum(rows, limit - first) * (K * (w_ptr.dtype.element_ty.primitive_bitwidth // 8))
            fetch(w_ptr + first * K, size.to(tl.int32), FETCH)


@triton.jit
def load_tiles(w_ptr, first, limit, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Rows first.. of a matrix (limit, K), zeros beyond: T times R of them, in blocks of columns each."""
    BLOCK: tl.constexpr = block_of(K)
    k = tl.arange(0, BLOCK)
    tiles = ()
    for i in tl.static_range(T):
        rows = first + i * R + tl.arange(0, R)
        inside = ((rows >= 0) & (rows < limit))[:, None]
        for block in tl.static_range(K // BLOCK):
            cells = w_ptr + rows[:, None] * K + (block * BLOCK + k)[None, :]
            tiles = tiles + (tl.load(cells, mask=inside, other=0.0),)  # noqa: RUF005 (Triton knows no star)
    return tiles


@triton.jit
def load_vector(ptr, K: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr):
    """K values in blocks, once they are there."""
    BLOCK: tl.constexpr = block_of(K)
    pointers = ()
    for block in tl.static_range(K // BLOCK):
        pointers = pointers + (ptr + block * BLOCK + tl.arange(0, BLOCK),)  # noqa: RUF005
    return wait_for(pointers, BLOCK, THREADS, WAIT, PAUSE)


@triton.jit
def glance_rows(ptr, first, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Pointers to T blocks of R values from the first-th of N, and what is there by now."""
    pointers = ()
    blocks = ()
    for t in tl.static_range(T):
        at = ptr + tl.minimum(first + t * R + tl.arange(0, R), N - 1)
        pointers = pointers + (at,)  # noqa: RUF005
        blocks = blocks + (glance_at(at),)  # noqa: RUF005
    return pointers, blocks


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _add5(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def sum_blocks(parts, AXIS: tl.constexpr, WAIT: tl.constexpr):
    """The sums of up to five blocks along an axis: in one reduction, except in the interpreter."""
    N: tl.constexpr = len(parts)
    if WAIT and N == 2:
        return tl.reduce(parts, AXIS, _add2)
    elif WAIT and N == 3:
        return tl.reduce(parts, AXIS, _add3)
    elif WAIT and N == 4:
        return tl.reduce(parts, AXIS, _add4)
    elif WAIT and N == 5:
        return tl.reduce(parts, AXIS, _add5)
    else:
        sums = ()
        for i in tl.static_range(N):
            sums = sums + (tl.sum(parts[i], AXIS),)  # noqa: RUF005
        return sums


@triton.jit
def times_rows(tiles, x, SQUARES: tl.constexpr, WAIT: tl.constexpr):
    """Rows of `load_tiles` times the blocks x: T sums (R,), with SQUARES also that of x's squares."""
    BLOCKS: tl.constexpr = len(x)
    T: tl.constexpr = len(tiles) // len(x)
    parts = ()
    for i in tl.static_range(T):
        part = tiles[i * BLOCKS].to(tl.float32) * x[0][None, :]
        for block in tl.static_range(1, BLOCKS):
            part += tiles[i * BLOCKS + block].to(tl.float32) * x[block][None, :]
        parts = parts + (part,)  # noqa: RUF005
    if SQUARES:
        part = tl.zeros(tiles[0].shape, tl.float32)
        for block in tl.static_range(BLOCKS):
            rows = tl.broadcast_to(x[block][None, :], part.shape)
            part += rows * rows
        parts = parts + (part,)  # noqa: RUF005
    return sum_blocks(parts, 1, WAIT)
