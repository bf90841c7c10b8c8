# mypy: ignore-errors
"""Triton kernel of a whole decoding step of one stream, all layers in one launch, for `persistent_step`.

All programs are resident at once and hand each other the values of the stream through words of memory, which
are EMPTY, a NaN that no arithmetic gives, until a float32 value is put there: a reader asks until it is. No
barrier is needed, nor an order between stores, because a word is all that a reader waits for; the loads that
ask (`ld.relaxed.gpu`) pass by the first cache, which is not kept coherent. Each word is written once a
launch, by one program, so that nothing is overwritten that someone may still read and no sum depends on who
was first. There are two sets of words: launches take them in turn and empty the other one. What the rings get
is read in later launches only. Weights and ring chunks do not depend on the stream: their loads are under way
before a wait.

Where programs run one after another (Triton's interpreter) nothing waits.
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
def _wait(
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
def _glance(word_ptr):
    """What is at a block of pointers by now, for `_settle` to make sure of later."""
    return tl.load(word_ptr, volatile=True)


@triton.jit
def _settle(bits, word_ptr, WAIT: tl.constexpr):
    """The values at which `_glance` had a look; those that were not there are waited for."""
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
def _send(word_ptr, value, mask):
    bits = value.to(tl.int32, bitcast=True)
    tl.store(word_ptr, tl.where(bits == EMPTY, 0x7FFFFFFF, bits), mask=mask)


@triton.jit
def _send_rows(word_ptr, value, mask, WAIT: tl.constexpr):
    """`_send` in the layout that a sum leaves: a store would have the values moved through shared memory."""
    if WAIT:
        tl.inline_asm_elementwise(
            "{.reg .pred p, q; .reg .b32 w; setp.eq.b32 q, $2, -1; selp.b32 w, 0x7FFFFFFF, $2, q;"
            "setp.ne.b32 p, $3, 0; @p st.relaxed.gpu.global.b32 [$1], w; mov.b32 $0, w; }",
            "=r,l,r,r", [word_ptr.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        _send(word_ptr, value, mask)


@triton.jit
def _fetch(ptr, size, FETCH: tl.constexpr):
    """Begin to bring `size` bytes into the second cache, whole blocks of 16."""
    if FETCH:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, t; }",
            "=r,l,r", [ptr.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _fetch_rows(w_ptr, first, rows, limit, K: tl.constexpr, FETCH: tl.constexpr):
    """`_fetch` of rows first.. of a matrix (limit, K)."""
    if FETCH:  # noqa: SIM102 (decided when compiling, the next when running)
        if first < limit:
            size = tl.minimum(rows, limit - first) * (K * (w_ptr.dtype.element_ty.primitive_bitwidth // 8))
            _fetch(w_ptr + first * K, size.to(tl.int32), FETCH)


@triton.jit
def _tiles(w_ptr, first, limit, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
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
def _vector(ptr, K: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr):
    """K values in blocks, once they are there."""
    BLOCK: tl.constexpr = block_of(K)
    pointers = ()
    for block in tl.static_range(K // BLOCK):
        pointers = pointers + (ptr + block * BLOCK + tl.arange(0, BLOCK),)  # noqa: RUF005
    return _wait(pointers, BLOCK, THREADS, WAIT, PAUSE)


@triton.jit
def _glances(ptr, first, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Pointers to T blocks of R values from the first-th of N, and what is there by now; beside `_tiles`."""
    pointers = ()
    blocks = ()
    for t in tl.static_range(T):
        at = ptr + tl.minimum(first + t * R + tl.arange(0, R), N - 1)
        pointers = pointers + (at,)  # noqa: RUF005
        blocks = blocks + (_glance(at),)  # noqa: RUF005
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
def _sums(parts, AXIS: tl.constexpr, WAIT: tl.constexpr):
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
def _times(tiles, x, SQUARES: tl.constexpr, WAIT: tl.constexpr):
    """Rows of `_tiles` times the blocks x: T sums (R,), with SQUARES also that of x's squares in each row."""
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
    return _sums(parts, 1, WAIT)


@triton.jit
def _route(row_ptr):
    """A row of the table: three places in units of 16 elements, then small numbers."""
    return (
        tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3).to(tl.int32),
        tl.load(row_ptr + 4).to(tl.int32), tl.load(row_ptr + 5).to(tl.int32),
        tl.load(row_ptr + 6).to(tl.int32), tl.load(row_ptr + 7).to(tl.int32),
        tl.load(row_ptr + 8).to(tl.int32),
    )  # fmt: skip


@triton.jit
def persistent_kernel(
    ids_ptr, position_ptr, launch_ptr, table_ptr, weights_ptr, vectors_ptr, embed_ptr, turns_ptr, ring_ptr,
    words_ptr, logits_ptr, num_layers, num_words, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, FF: tl.constexpr,
    CARRY: tl.constexpr, CHUNK: tl.constexpr, VOCAB: tl.constexpr, GATED: tl.constexpr, SHIFT: tl.constexpr,
    SCALE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    QKV_R: tl.constexpr, QKV_T: tl.constexpr, OUT_R: tl.constexpr, OUT_T: tl.constexpr, UP_R: tl.constexpr,
    UP_T: tl.constexpr, DOWN_R: tl.constexpr, DOWN_T: tl.constexpr, CARRY_R: tl.constexpr,
    HEAD_R: tl.constexpr, FETCH: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """logits (VOCAB,) float32 of the character ids (1,) at position (1,); the rings are updated.

    launch (1,): goes up by one with each launch. table (num_layers + 1, COLUMNS) int64: what differs from
    layer to layer, see `persistent_step`. A program multiplies T tiles of R rows of each matrix. SCALE
    includes log2(e).
    """
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = HEADS * D
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    KEYS: tl.constexpr = 2 * CHUNK // SPLITS
    # Of a layer, in `weights`.
    W_READ: tl.constexpr = QKV * WIDTH
    W_OUT: tl.constexpr = W_READ + 2 * KV_HEADS * D * CARRY
    W_UP: tl.constexpr = W_OUT + WIDTH * QUERIES
    W_GATED: tl.constexpr = W_UP + FF * WIDTH
    W_DOWN: tl.constexpr = W_GATED + (FF * WIDTH if GATED else 0)
    W_MERGE: tl.constexpr = W_DOWN + WIDTH * FF
    W_LAYER: tl.constexpr = W_MERGE + 2 * CARRY * CARRY
    # Of a layer, in `vectors`: gains of queries and keys, bias of the merge.
    V_BIAS: tl.constexpr = 2 * D
    V_LAYER: tl.constexpr = 2 * D + CARRY
    # Of a layer, in `words`.
    X_QKV: tl.constexpr = WIDTH
    X_O: tl.constexpr = X_QKV + QKV
    X_LSE: tl.constexpr = X_O + SPLITS * QUERIES
    X_MIDDLE: tl.constexpr = X_LSE + SPLITS * HEADS
    X_HIDDEN: tl.constexpr = X_MIDDLE + WIDTH
    X_LAYER: tl.constexpr = X_HIDDEN + FF
    BLOCK: tl.constexpr = 1024

    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    turn = tl.load(launch_ptr) & 1
    position = tl.load(position_ptr)
    chunk = position // CHUNK
    offset = (position % CHUNK).to(tl.int32)
    layers_ptr = weights_ptr + VOCAB * WIDTH  # the head comes first
    writes_ptr = layers_ptr + tl.cast(num_layers, tl.int64) * W_LAYER
    biases_ptr = vectors_ptr + WIDTH + num_layers * V_LAYER
    values_ptr = words_ptr + turn * num_words
    scans_ptr = values_ptr + (num_layers + 1) * X_LAYER
    t = tl.arange(0, HALF)
    lane = tl.arange(0, padded(CARRY))
    kind = ring_ptr.dtype.element_ty
    kind_bytes: tl.constexpr = ring_ptr.dtype.element_ty.primitive_bitwidth // 8

    if pid == 0:
        k = tl.arange(0, padded(WIDTH))
        row_ptr = embed_ptr + tl.load(ids_ptr) * WIDTH
        x = tl.load(row_ptr + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        x = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
        x = x * tl.load(vectors_ptr + k, mask=k < WIDTH, other=0.0)
        _send(values_ptr + k, x, k < WIDTH)
        if CARRY > 0:  # scan 0 is empty: what layers read that have no carry
            _send(scans_ptr + lane, lane * 0.0, lane < CARRY)
    for word in range(pid * BLOCK, num_words, programs * BLOCK):
        words = word + tl.arange(0, BLOCK)
        tl.store(words_ptr + (1 - turn) * num_words + words, EMPTY, mask=words < num_words)

    route = _route(table_ptr)
    for layer in range(num_layers):
        keys_at, values_at, carry_at, slots, stride, read, merged, write, written = route
        route = _route(table_ptr + (layer + 1) * COLUMNS)
        w_ptr = layers_ptr + tl.cast(layer, tl.int64) * W_LAYER
        vector_ptr = vectors_ptr + WIDTH + layer * V_LAYER
        x_ptr = values_ptr + layer * X_LAYER
        exists = chunk >= stride if SHIFT else (chunk & stride) != 0

        if CARRY > 0:
            lanes_ptr = scans_ptr + read * CARRY
            places, glances = _glances(lanes_ptr, 0, CARRY, block_of(CARRY), CARRY // block_of(CARRY))
        _fetch_rows(w_ptr + W_UP, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH)
        if GATED:
            _fetch_rows(w_ptr + W_GATED, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH)
        _fetch_rows(w_ptr + W_DOWN, pid * DOWN_R * DOWN_T, DOWN_R * DOWN_T, WIDTH, FF, FETCH)

        if CARRY > 0:  # noqa: SIM102 (decided when compiling, the next when running)
            if written > 0:  # a pass starts
                write_ptr = writes_ptr + write * (2 * CARRY * WIDTH)
                bias_ptr = biases_ptr + write * (2 * CARRY)
                for row in range(pid * CARRY_R, CARRY, programs * CARRY_R):
                    tiles = _tiles(write_ptr, row, CARRY, WIDTH, CARRY_R, 1)
                    tiles = tiles + _tiles(write_ptr + CARRY * WIDTH, row, CARRY, WIDTH, CARRY_R, 1)
                    at = row + tl.arange(0, CARRY_R)
                    gate_bias = tl.load(bias_ptr + at, mask=at < CARRY, other=0.0)
                    value_bias = tl.load(bias_ptr + CARRY + at, mask=at < CARRY, other=0.0)
                    x = _vector(x_ptr, WIDTH, THREADS, WAIT, PAUSE)
                    gate, value, squares = _times(tiles, x, True, WAIT)
                    scale = 1.0 / tl.sqrt(squares / WIDTH + eps)
                    value = value * scale + value_bias
                    value = value / (1.0 + tl.exp(-gate * scale - gate_bias))
                    _send_rows(scans_ptr + written * CARRY + at, value, at < CARRY, WAIT)

        # Queries, keys and values, as they come from the product.
        first = pid * (QKV_R * QKV_T)
        if first < QKV:
            tiles = _tiles(w_ptr, first, QKV, WIDTH, QKV_R, QKV_T)
            if CARRY > 0:
                reads = _tiles(w_ptr + W_READ, first - QUERIES, 2 * KV_HEADS * D, CARRY, QKV_R, QKV_T)
                lanes = ()
                for block in tl.static_range(CARRY // block_of(CARRY)):
                    lanes = lanes + (_settle(glances[block], places[block], WAIT),)  # noqa: RUF005
                heard = _times(reads, lanes, True, WAIT)
                heard_scale = 1.0 / tl.sqrt(heard[QKV_T] / CARRY + eps)
            x = _vector(x_ptr, WIDTH, THREADS, WAIT, PAUSE)
            totals = _times(tiles, x, True, WAIT)
            scale = 1.0 / tl.sqrt(totals[QKV_T] / WIDTH + eps)
            for i in tl.static_range(QKV_T):
                at = first + i * QKV_R + tl.arange(0, QKV_R)
                total = totals[i] * scale
                if CARRY > 0:
                    total += heard[i] * heard_scale
                _send_rows(x_ptr + X_QKV + at, total, at < QKV, WAIT)

        # A part of the keys of a head: the last programs, which have the fewest rows above.
        for item in range(programs - 1 - pid, KV_HEADS * SPLITS, programs):
            head = item // SPLITS
            part = item % SPLITS
            far = part * KEYS // CHUNK
            key0 = part * KEYS % CHUNK
            start = ((head * slots + (chunk + far) % slots) * CHUNK + key0) * D
            key_ptr = ring_ptr + keys_at * 16 + start
            value_ptr = ring_ptr + values_at * 16 + start
            j = key0 + tl.arange(0, KEYS)
            cells = tl.arange(0, KEYS)[:, None] * D + t[None, :]
            old = tl.where(far == 0, j < offset, exists)
            k1 = tl.load(key_ptr + cells, mask=old[:, None], other=0.0)
            k2 = tl.load(key_ptr + HALF + cells, mask=old[:, None], other=0.0)
            v1 = tl.load(value_ptr + cells, mask=old[:, None], other=0.0)
            v2 = tl.load(value_ptr + HALF + cells, mask=old[:, None], other=0.0)
            turn_ptr = turns_ptr + (offset + far * CHUNK) * HALF + t
            cos = tl.load(turn_ptr)
            sin = tl.load(turn_ptr + 2 * CHUNK * HALF)
            q_gain1 = tl.load(vector_ptr + t)
            q_gain2 = tl.load(vector_ptr + HALF + t)
            k_gain1 = tl.load(vector_ptr + D + t)
            k_gain2 = tl.load(vector_ptr + D + HALF + t)

            q_ptr = x_ptr + X_QKV + head * (GROUP * D) + t
            new_k_ptr = x_ptr + X_QKV + QUERIES + head * D + t
            new_v_ptr = new_k_ptr + KV_HEADS * D
            q1, q2, new_k1, new_k2, new_v1, new_v2 = _wait(
                (q_ptr, q_ptr + HALF, new_k_ptr, new_k_ptr + HALF, new_v_ptr, new_v_ptr + HALF), HALF,
                THREADS, WAIT, PAUSE,
            )  # fmt: skip
            scale = 1.0 / tl.sqrt(tl.sum(new_k1 * new_k1 + new_k2 * new_k2, 0) / D + eps)
            new_k1 = new_k1 * scale * k_gain1
            new_k2 = new_k2 * scale * k_gain2
            # The newest key, beside the tiles: turned right for the own chunk, unused for the other.
            turned1 = (new_k1 * cos - new_k2 * sin).to(kind)
            turned2 = (new_k2 * cos + new_k1 * sin).to(kind)
            new_v1 = new_v1.to(kind)
            new_v2 = new_v2.to(kind)
            newest = (far == 0) & (offset >= key0) & (offset < key0 + KEYS)
            for g in tl.static_range(GROUP):
                if g > 0:
                    q1, q2 = _wait((q_ptr + g * D, q_ptr + g * D + HALF), HALF, THREADS, WAIT, PAUSE)
                scale = SCALE / tl.sqrt(tl.sum(q1 * q1 + q2 * q2, 0) / D + eps)
                q1 = q1 * scale * q_gain1
                q2 = q2 * scale * q_gain2
                y1 = q1 * cos - q2 * sin
                y2 = q2 * cos + q1 * sin
                scores = tl.sum(k1.to(tl.float32) * y1[None, :] + k2.to(tl.float32) * y2[None, :], 1)
                scores = tl.where(old, scores, float("-inf"))
                score = tl.sum(turned1.to(tl.float32) * y1 + turned2.to(tl.float32) * y2, 0)
                score = tl.where(newest, score, float("-inf"))
                top = tl.maximum(tl.maximum(tl.max(scores, 0), score), -1e30)
                shares = tl.exp2(scores - top)
                share = tl.exp2(score - top)
                total = tl.sum(shares, 0) + share
                whole = tl.maximum(total, 1e-30)
                o1, o2 = _sums(
                    (shares[:, None] * v1.to(tl.float32), shares[:, None] * v2.to(tl.float32)), 0, WAIT
                )
                o1 = (o1 + share * new_v1.to(tl.float32)) / whole
                o2 = (o2 + share * new_v2.to(tl.float32)) / whole
                lse = tl.where(total > 0, top + tl.log2(whole), -1e30)
                at = part * HEADS + head * GROUP + g
                one = tl.zeros((1,), tl.int32)
                _send(x_ptr + X_O + at * D + t, o1, t < HALF)
                _send(x_ptr + X_O + at * D + HALF + t, o2, t < HALF)
                _send(x_ptr + X_LSE + at + one, lse + one, one == 0)
            if newest:
                new = (offset - key0) * D + t
                tl.store(key_ptr + new, turned1)
                tl.store(key_ptr + HALF + new, turned2)
                tl.store(value_ptr + new, new_v1)
                tl.store(value_ptr + HALF + new, new_v2)

        if CARRY > 0:  # noqa: SIM102
            if merged > 0:
                carry_ptr = ring_ptr + carry_at * 16
                own_ptr = carry_ptr + ((chunk % slots) * CHUNK + offset) * CARRY
                far_ptr = carry_ptr + (((chunk + 1) % slots) * CHUNK + offset) * CARRY
                scan_ptr = scans_ptr + (merged - 1) * CARRY
                for row in range(pid * CARRY_R, CARRY, programs * CARRY_R):
                    at = row + tl.arange(0, CARRY_R)
                    partner = tl.load(far_ptr + lane, mask=(lane < CARRY) & exists, other=0.0)
                    part = tl.load(far_ptr + at, mask=(at < CARRY) & exists, other=0.0).to(tl.float32)
                    inside = (at < CARRY)[:, None] & (lane < CARRY)[None, :]
                    cells = w_ptr + W_MERGE + at[:, None] * (2 * CARRY) + lane[None, :]
                    w_own = tl.load(cells, mask=inside, other=0.0)
                    w_far = tl.load(cells + CARRY, mask=inside, other=0.0)
                    total = tl.load(vector_ptr + V_BIAS + at, mask=at < CARRY, other=0.0)
                    at_ptr = scan_ptr + tl.minimum(at, CARRY - 1)
                    seen = _glance(at_ptr)
                    scan = _wait(
                        (scan_ptr + tl.minimum(lane, CARRY - 1),), padded(CARRY), THREADS, WAIT, PAUSE
                    )[0]
                    product = w_own.to(tl.float32) * scan[None, :]
                    total += tl.sum(product + w_far.to(tl.float32) * partner.to(tl.float32)[None, :], 1)
                    value = _settle(seen, at_ptr, WAIT)
                    tl.store(own_ptr + at, value.to(kind), mask=at < CARRY)
                    value += part / (1.0 + tl.exp(-total))
                    _send_rows(scans_ptr + merged * CARRY + at, value, at < CARRY, WAIT)

        first = pid * (OUT_R * OUT_T)
        if first < WIDTH:
            tiles = _tiles(w_ptr + W_OUT, first, WIDTH, QUERIES, OUT_R, OUT_T)
            own_places, own = _glances(x_ptr, first, WIDTH, OUT_R, OUT_T)
            OUT_K: tl.constexpr = block_of(QUERIES)
            pointers = ()
            for block in tl.static_range(QUERIES // OUT_K):
                k = block * OUT_K + tl.arange(0, OUT_K)
                for i in tl.static_range(SPLITS):
                    o_ptr = x_ptr + X_O + i * QUERIES + k
                    pointers = pointers + (o_ptr, x_ptr + X_LSE + i * HEADS + k // D)  # noqa: RUF005
            parts = _wait(pointers, OUT_K, THREADS, WAIT, PAUSE)
            y = ()
            for block in tl.static_range(QUERIES // OUT_K):
                top = parts[2 * block * SPLITS + 1]
                for i in tl.static_range(1, SPLITS):
                    top = tl.maximum(top, parts[2 * (block * SPLITS + i) + 1])
                whole = tl.zeros((OUT_K,), tl.float32)
                total = tl.zeros((OUT_K,), tl.float32)
                for i in tl.static_range(SPLITS):
                    share = tl.exp2(parts[2 * (block * SPLITS + i) + 1] - top)
                    whole += share
                    total += share * parts[2 * (block * SPLITS + i)]
                y = y + (total / whole,)  # noqa: RUF005
            totals = _times(tiles, y, False, WAIT)
            for i in tl.static_range(OUT_T):
                at = first + i * OUT_R + tl.arange(0, OUT_R)
                x = totals[i] + _settle(own[i], own_places[i], WAIT)
                _send_rows(x_ptr + X_MIDDLE + at, x, at < WIDTH, WAIT)

        if FETCH:  # noqa: SIM102
            if layer + 1 < num_layers:
                next_ptr = w_ptr + W_LAYER
                count = QKV_R * QKV_T
                _fetch_rows(next_ptr, pid * count, count, QKV, WIDTH, FETCH)
                if CARRY > 0:
                    limit = tl.where(pid * count + count > QUERIES, 2 * KV_HEADS * D, 0)
                    row = tl.maximum(pid * count - QUERIES, 0)
                    _fetch_rows(next_ptr + W_READ, row, count, limit, CARRY, FETCH)
                    _fetch_rows(next_ptr + W_MERGE, pid * CARRY_R, CARRY_R, CARRY, 2 * CARRY, FETCH)
                _fetch_rows(next_ptr + W_OUT, pid * OUT_R * OUT_T, OUT_R * OUT_T, WIDTH, QUERIES, FETCH)
                for item in range(programs - 1 - pid, KV_HEADS * SPLITS, programs):
                    far = (item % SPLITS) * KEYS // CHUNK
                    place = (item // SPLITS) * route[3] + (chunk + far) % route[3]
                    start = (place * CHUNK + (item % SPLITS) * KEYS % CHUNK) * D
                    _fetch(ring_ptr + route[0] * 16 + start, KEYS * D * kind_bytes, FETCH)
                    _fetch(ring_ptr + route[1] * 16 + start, KEYS * D * kind_bytes, FETCH)

        first = pid * (UP_R * UP_T)
        if first < FF:
            tiles = _tiles(w_ptr + W_UP, first, FF, WIDTH, UP_R, UP_T)
            if GATED:
                others = _tiles(w_ptr + W_GATED, first, FF, WIDTH, UP_R, UP_T)
            x = _vector(x_ptr + X_MIDDLE, WIDTH, THREADS, WAIT, PAUSE)
            totals = _times(tiles, x, True, WAIT)
            scale = 1.0 / tl.sqrt(totals[UP_T] / WIDTH + eps)
            if GATED:
                gated = _times(others, x, False, WAIT)
            for i in tl.static_range(UP_T):
                at = first + i * UP_R + tl.arange(0, UP_R)
                total = totals[i] * scale
                if GATED:
                    total = total / (1.0 + tl.exp(-total)) * (gated[i] * scale)
                else:
                    total = tl.maximum(total, 0.0)
                    total = total * total
                _send_rows(x_ptr + X_HIDDEN + at, total, at < FF, WAIT)

        first = pid * (DOWN_R * DOWN_T)
        if first < WIDTH:
            tiles = _tiles(w_ptr + W_DOWN, first, WIDTH, FF, DOWN_R, DOWN_T)
            own_places, own = _glances(x_ptr + X_MIDDLE, first, WIDTH, DOWN_R, DOWN_T)
            hidden = _vector(x_ptr + X_HIDDEN, FF, THREADS, WAIT, PAUSE)
            totals = _times(tiles, hidden, False, WAIT)
            for i in tl.static_range(DOWN_T):
                at = first + i * DOWN_R + tl.arange(0, DOWN_R)
                x = totals[i] + _settle(own[i], own_places[i], WAIT)
                _send_rows(x_ptr + X_LAYER + at, x, at < WIDTH, WAIT)

    for row in range(pid * HEAD_R, VOCAB, programs * HEAD_R):
        tiles = _tiles(weights_ptr, row, VOCAB, WIDTH, HEAD_R, 1)
        x = _vector(values_ptr + num_layers * X_LAYER, WIDTH, THREADS, WAIT, PAUSE)
        total, squares = _times(tiles, x, True, WAIT)
        at = row + tl.arange(0, HEAD_R)
        tl.store(logits_ptr + at, total / tl.sqrt(squares / WIDTH + eps), mask=at < VOCAB)
