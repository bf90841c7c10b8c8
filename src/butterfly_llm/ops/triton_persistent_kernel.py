# mypy: ignore-errors
"""Triton kernel of a whole decoding step of one stream, all layers in one launch, for `persistent_step`.

All programs are resident at once and hand each other the values of the stream through memory, in words of
64 bits: a float32 value below, the number of the launch above. A reader asks for a word until it carries the
number of this launch. No barrier is needed, nor an order between stores: value and number are one aligned
word, which the memory writes and reads as a whole, and the strong loads (`ld.relaxed.gpu`) pass by the first
cache, which is not kept coherent. Each word is written once a launch, by one program, so none is overwritten
that someone may still read, and the sums do not depend on who was first. What the rings get is read in later
launches only. Weights and ring chunks do not depend on the stream: they are under way before a wait.

Where programs run one after another (Triton's interpreter) nothing waits.
"""

import triton
import triton.language as tl
from triton import constexpr_function


@constexpr_function
def words_in(size: int) -> int:
    return 1 << (size - 1).bit_length()


@constexpr_function
def wait_asm(count: int) -> str:
    """Load `count` words until all carry the launch's number; a wait of seconds is an error of the launch."""
    w = range(count)
    loads = "".join(f"ld.relaxed.gpu.global.b64 w{i}, [${count + i}];" for i in w)
    parts = "".join(f"mov.b64 {{${i}, f}}, w{i}; xor.b32 f, f, ${2 * count}; or.b32 bad, bad, f;" for i in w)
    return (
        "{.reg .pred p; .reg .b32 n, f, bad; .reg .b64 " + ", ".join(f"w{i}" for i in w) + "; mov.u32 n, 0;"
        "again:" + loads + "mov.b32 bad, 0;" + parts + "setp.eq.b32 p, bad, 0; @p bra done;"
        "add.u32 n, n, 1; setp.lt.u32 p, n, 16777216; @p bra again; trap; done: }"
    )


@constexpr_function
def wait_constraints(count: int, pack: int) -> str:
    # Outputs are written while inputs are still needed, hence "&".
    return ",".join(["=&r"] * count + ["l"] * count + ["r"] * pack)


@triton.jit
def _value(word_ptr):
    return tl.load(word_ptr).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _wait(a_ptr, launch, SIZE: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr):
    """The values of SIZE words at a block of pointers, once they are there."""
    if WAIT:
        # The result of a while loop is moved between layouts; that of an operation the compiler would rather
        # compute once more in each layout, and every wait takes its time.
        PACK: tl.constexpr = max(1, SIZE // THREADS)
        bits = launch + tl.zeros(a_ptr.shape, tl.int32)
        waiting = True
        while waiting:
            bits = tl.inline_asm_elementwise(
                wait_asm(PACK), wait_constraints(PACK, PACK), [a_ptr.to(tl.int64), launch], dtype=tl.int32,
                is_pure=False, pack=PACK,
            )  # fmt: skip
            waiting = False
        return bits.to(tl.float32, bitcast=True)
    else:
        return _value(a_ptr)


@triton.jit
def _wait2(a_ptr, b_ptr, launch, SIZE: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr):
    """`_wait` for two blocks of SIZE pointers at once."""
    if WAIT:
        PACK: tl.constexpr = max(1, SIZE // THREADS)
        a = launch + tl.zeros(a_ptr.shape, tl.int32)
        b = a
        waiting = True
        while waiting:
            a, b = tl.inline_asm_elementwise(
                wait_asm(2 * PACK), wait_constraints(2 * PACK, PACK),
                [a_ptr.to(tl.int64), b_ptr.to(tl.int64), launch], dtype=(tl.int32, tl.int32), is_pure=False,
                pack=PACK,
            )  # fmt: skip
            waiting = False
        return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    else:
        return _value(a_ptr), _value(b_ptr)


@triton.jit
def _wait6(q_ptr, k_ptr, v_ptr, launch, HALF: tl.constexpr, WAIT: tl.constexpr):
    """Both halves of a query, a key and a value: pointers to their first halves (HALF,)."""
    if WAIT:
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32)
        q = q_ptr.to(tl.int64)
        k = k_ptr.to(tl.int64)
        v = v_ptr.to(tl.int64)
        q1 = launch + tl.zeros(q_ptr.shape, tl.int32)
        q2 = q1
        k1 = q1
        k2 = q1
        v1 = q1
        v2 = q1
        waiting = True
        while waiting:
            q1, q2, k1, k2, v1, v2 = tl.inline_asm_elementwise(
                wait_asm(6), wait_constraints(6, 1),
                [q, q + 8 * HALF, k, k + 8 * HALF, v, v + 8 * HALF, launch], dtype=kinds, is_pure=False,
                pack=1,
            )  # fmt: skip
            waiting = False
        return (
            q1.to(tl.float32, bitcast=True), q2.to(tl.float32, bitcast=True),
            k1.to(tl.float32, bitcast=True), k2.to(tl.float32, bitcast=True),
            v1.to(tl.float32, bitcast=True), v2.to(tl.float32, bitcast=True),
        )  # fmt: skip
    else:
        return (
            _value(q_ptr), _value(q_ptr + HALF), _value(k_ptr), _value(k_ptr + HALF), _value(v_ptr),
            _value(v_ptr + HALF),
        )  # fmt: skip


@triton.jit
def _send(words_ptr, index, value, mask, launch, copy, COPIES: tl.constexpr):
    """Put values into each copy of the words."""
    low = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = low | (launch.to(tl.int64) << 32)
    for i in tl.static_range(COPIES):
        tl.store(words_ptr + i * copy + index, word, mask=mask)


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
def _rows(w_ptr, first, limit, K: tl.constexpr, R: tl.constexpr):
    """Rows first.. of a matrix (limit, K), padded with zeros to (R, words_in(K))."""
    PADDED: tl.constexpr = words_in(K)
    rows = first + tl.arange(0, R)
    k = tl.arange(0, PADDED)
    inside = (rows >= 0) & (rows < limit)
    mask = inside[:, None] if PADDED == K else inside[:, None] & (k < K)[None, :]
    return tl.load(w_ptr + rows[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def _tiles(w_ptr, first, limit, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    tiles = ()
    for t in tl.static_range(T):
        tiles = tiles + (_rows(w_ptr, first + t * R, limit, K, R),)  # noqa: RUF005 (Triton knows no star)
    return tiles


@triton.jit
def _vector(ptr, launch, K: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr):
    """K values (words_in(K),), zero beyond K, once they are there."""
    PADDED: tl.constexpr = words_in(K)
    k = tl.arange(0, PADDED)
    x = _wait(ptr + tl.minimum(k, K - 1), launch, PADDED, THREADS, WAIT)
    if PADDED != K:
        x = tl.where(k < K, x, 0.0)
    return x


@triton.jit
def _rows_of(
    ptr, first, launch, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, THREADS: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """T blocks of R values from the first-th of N, beside `_tiles`."""
    blocks = ()
    for t in tl.static_range(T):
        at = tl.minimum(first + t * R + tl.arange(0, R), N - 1)
        blocks = blocks + (_wait(ptr + at, launch, R, THREADS, WAIT),)  # noqa: RUF005
    return blocks


@triton.jit
def _scale(x, K: tl.constexpr, eps):
    """The factor of an RMSNorm over K values."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)


@triton.jit
def _times(w, x):
    return tl.sum(w.to(tl.float32) * x[None, :], 1)


@triton.jit
def persistent_kernel(
    ids_ptr, position_ptr, launch_ptr, table_ptr, weights_ptr, vectors_ptr, embed_ptr, turns_ptr, ring_ptr,
    words_ptr, logits_ptr, num_layers, copy, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, FF: tl.constexpr,
    CARRY: tl.constexpr, CHUNK: tl.constexpr, VOCAB: tl.constexpr, GATED: tl.constexpr, SHIFT: tl.constexpr,
    SCALE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    QKV_R: tl.constexpr, QKV_T: tl.constexpr, OUT_R: tl.constexpr, OUT_T: tl.constexpr, UP_R: tl.constexpr,
    UP_T: tl.constexpr, DOWN_R: tl.constexpr, DOWN_T: tl.constexpr, CARRY_R: tl.constexpr,
    HEAD_R: tl.constexpr, COPIES: tl.constexpr, FETCH: tl.constexpr, WAIT: tl.constexpr,
    THREADS: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """logits (VOCAB,) float32 of the character ids (1,) at position (1,); the rings are updated.

    table (num_layers, COLUMNS) int64: what differs from layer to layer, see `persistent_step`. Tiles of R
    rows, T of them, are what a program multiplies of each matrix. SCALE includes log2(e).
    """
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = HEADS * D
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    KEYS: tl.constexpr = 2 * CHUNK // SPLITS
    UP: tl.constexpr = 2 * FF if GATED else FF
    # Of a layer, in `weights`.
    W_READ: tl.constexpr = QKV * WIDTH
    W_OUT: tl.constexpr = W_READ + 2 * KV_HEADS * D * CARRY
    W_UP: tl.constexpr = W_OUT + WIDTH * QUERIES
    W_DOWN: tl.constexpr = W_UP + UP * WIDTH
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

    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    launch = tl.load(launch_ptr)
    position = tl.load(position_ptr)
    chunk = position // CHUNK
    offset = (position % CHUNK).to(tl.int32)
    mine = words_ptr + (pid % COPIES) * copy
    head_ptr = weights_ptr
    layers_ptr = weights_ptr + VOCAB * WIDTH
    writes_ptr = layers_ptr + tl.cast(num_layers, tl.int64) * W_LAYER
    biases_ptr = vectors_ptr + WIDTH + num_layers * V_LAYER
    scans = (num_layers + 1) * X_LAYER
    t = tl.arange(0, HALF)

    if pid == 0:
        k = tl.arange(0, words_in(WIDTH))
        row = embed_ptr + tl.load(ids_ptr) * WIDTH
        x = tl.load(row + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        x = x * _scale(x, WIDTH, eps) * tl.load(vectors_ptr + k, mask=k < WIDTH, other=0.0)
        _send(words_ptr, k, x, k < WIDTH, launch, copy, COPIES)
        if CARRY > 0:  # scan 0 is empty: what layers read that have no carry
            k = tl.arange(0, words_in(CARRY))
            _send(words_ptr, scans + k, k * 0.0, k < CARRY, launch, copy, COPIES)

    for layer in range(num_layers):
        w_ptr = layers_ptr + tl.cast(layer, tl.int64) * W_LAYER
        vector_ptr = vectors_ptr + WIDTH + layer * V_LAYER
        base = layer * X_LAYER
        row_ptr = table_ptr + layer * COLUMNS
        slots = tl.load(row_ptr + 3)
        stride = tl.load(row_ptr + 4)
        exists = chunk >= stride if SHIFT else (chunk & stride) != 0

        if FETCH:  # noqa: SIM102
            if layer + 1 < num_layers:
                next_ptr = w_ptr + W_LAYER
                _fetch_rows(next_ptr, pid * QKV_R * QKV_T, QKV_R * QKV_T, QKV, WIDTH, FETCH)
                if CARRY > 0:
                    _fetch_rows(
                        next_ptr + W_READ, tl.maximum(pid * QKV_R * QKV_T - QUERIES, 0), QKV_R * QKV_T,
                        tl.where(pid * QKV_R * QKV_T + QKV_R * QKV_T > QUERIES, 2 * KV_HEADS * D, 0), CARRY,
                        FETCH,
                    )  # fmt: skip
                    _fetch_rows(next_ptr + W_MERGE, pid * CARRY_R, CARRY_R, CARRY, 2 * CARRY, FETCH)
                _fetch_rows(next_ptr + W_OUT, pid * OUT_R * OUT_T, OUT_R * OUT_T, WIDTH, QUERIES, FETCH)
                _fetch_rows(next_ptr + W_UP, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH)
                if GATED:
                    _fetch_rows(
                        next_ptr + W_UP + FF * WIDTH, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH
                    )
                _fetch_rows(next_ptr + W_DOWN, pid * DOWN_R * DOWN_T, DOWN_R * DOWN_T, WIDTH, FF, FETCH)
                for item in range(programs - 1 - pid, KV_HEADS * SPLITS, programs):
                    far = (item % SPLITS) * KEYS // CHUNK
                    next_slots = tl.load(row_ptr + COLUMNS + 3)
                    at = (item // SPLITS) * next_slots + (chunk + far) % next_slots
                    start = (at * CHUNK + (item % SPLITS) * KEYS % CHUNK) * D
                    size = KEYS * D * (ring_ptr.dtype.element_ty.primitive_bitwidth // 8)
                    _fetch(ring_ptr + tl.load(row_ptr + COLUMNS) + start, size, FETCH)
                    _fetch(ring_ptr + tl.load(row_ptr + COLUMNS + 1) + start, size, FETCH)

        if CARRY > 0:
            written = tl.load(row_ptr + 8)
            if written > 0:  # a pass starts
                write = tl.load(row_ptr + 7)
                write_ptr = writes_ptr + write * (2 * CARRY * WIDTH)
                bias_ptr = biases_ptr + write * (2 * CARRY)
                for row in range(pid * CARRY_R, CARRY, programs * CARRY_R):
                    gate_w = _rows(write_ptr, row, CARRY, WIDTH, CARRY_R)
                    value_w = _rows(write_ptr + CARRY * WIDTH, row, CARRY, WIDTH, CARRY_R)
                    at = row + tl.arange(0, CARRY_R)
                    gate_bias = tl.load(bias_ptr + at, mask=at < CARRY, other=0.0)
                    value_bias = tl.load(bias_ptr + CARRY + at, mask=at < CARRY, other=0.0)
                    x = _vector(mine + base, launch, WIDTH, THREADS, WAIT)
                    scale = _scale(x, WIDTH, eps)
                    gate = _times(gate_w, x) * scale + gate_bias
                    value = _times(value_w, x) * scale + value_bias
                    value = value / (1.0 + tl.exp(-gate))
                    _send(words_ptr, scans + written * CARRY + at, value, at < CARRY, launch, copy, COPIES)

        # Queries, keys and values, as they come from the product.
        first = pid * (QKV_R * QKV_T)
        if first < QKV:
            if not EMPTY:
                tiles = _tiles(w_ptr, first, QKV, WIDTH, QKV_R, QKV_T)
            if CARRY > 0:
                if not EMPTY:
                    reads = _tiles(w_ptr + W_READ, first - QUERIES, 2 * KV_HEADS * D, CARRY, QKV_R, QKV_T)
                lanes_ptr = mine + scans + tl.load(row_ptr + 5) * CARRY
                lanes = _vector(lanes_ptr, launch, CARRY, THREADS, WAIT)
                lanes = lanes * _scale(lanes, CARRY, eps)
            x = _vector(mine + base, launch, WIDTH, THREADS, WAIT)
            scale = _scale(x, WIDTH, eps)
            for i in tl.static_range(QKV_T):
                at = first + i * QKV_R + tl.arange(0, QKV_R)
                if EMPTY:
                    total = at * scale
                else:
                    total = _times(tiles[i], x) * scale
                    if CARRY > 0:
                        total += _times(reads[i], lanes)
                _send(words_ptr, base + X_QKV + at, total, at < QKV, launch, copy, COPIES)

        # A part of the keys of a head: the last programs, which have the fewest rows above.
        for item in range(programs - 1 - pid, KV_HEADS * SPLITS, programs):
            head = item // SPLITS
            part = item % SPLITS
            far = part * KEYS // CHUNK
            key0 = part * KEYS % CHUNK
            start = ((head * slots + (chunk + far) % slots) * CHUNK + key0) * D
            keys_ptr = ring_ptr + tl.multiple_of(tl.load(row_ptr), 16) + tl.multiple_of(start, 16)
            values_ptr = ring_ptr + tl.multiple_of(tl.load(row_ptr + 1), 16) + tl.multiple_of(start, 16)
            kind = ring_ptr.dtype.element_ty
            j = key0 + tl.arange(0, KEYS)
            cells = tl.arange(0, KEYS)[:, None] * D + t[None, :]
            old = tl.where(far == 0, j < offset, exists)[:, None]
            k1 = tl.load(keys_ptr + cells, mask=old, other=0.0)
            k2 = tl.load(keys_ptr + HALF + cells, mask=old, other=0.0)
            v1 = tl.load(values_ptr + cells, mask=old, other=0.0)
            v2 = tl.load(values_ptr + HALF + cells, mask=old, other=0.0)
            turn_ptr = turns_ptr + (offset + far * CHUNK) * HALF + t
            cos = tl.load(turn_ptr)
            sin = tl.load(turn_ptr + 2 * CHUNK * HALF)
            q_gain1 = tl.load(vector_ptr + t)
            q_gain2 = tl.load(vector_ptr + HALF + t)
            k_gain1 = tl.load(vector_ptr + D + t)
            k_gain2 = tl.load(vector_ptr + D + HALF + t)

            qkv_ptr = mine + base + X_QKV
            q_ptr = qkv_ptr + head * (GROUP * D) + t
            k_ptr = qkv_ptr + QUERIES + head * D + t
            q1, q2, new_k1, new_k2, new_v1, new_v2 = _wait6(
                q_ptr, k_ptr, k_ptr + KV_HEADS * D, launch, HALF, WAIT
            )
            scale = 1.0 / tl.sqrt(tl.sum(new_k1 * new_k1 + new_k2 * new_k2, 0) / D + eps)
            new_k1 = new_k1 * scale * k_gain1
            new_k2 = new_k2 * scale * k_gain2
            turned1 = (new_k1 * cos - new_k2 * sin).to(kind)  # right in the own chunk, unused in the other
            turned2 = (new_k2 * cos + new_k1 * sin).to(kind)
            new_v1 = new_v1.to(kind)
            new_v2 = new_v2.to(kind)
            newest = ((j == offset) & (far == 0))[:, None]
            if (far == 0) & (offset >= key0) & (offset < key0 + KEYS):
                new = (offset - key0) * D + t
                tl.store(keys_ptr + new, turned1)
                tl.store(keys_ptr + HALF + new, turned2)
                tl.store(values_ptr + new, new_v1)
                tl.store(values_ptr + HALF + new, new_v2)
            k1 = tl.where(newest, turned1[None, :], k1).to(tl.float32)
            k2 = tl.where(newest, turned2[None, :], k2).to(tl.float32)
            v1 = tl.where(newest, new_v1[None, :], v1).to(tl.float32)
            v2 = tl.where(newest, new_v2[None, :], v2).to(tl.float32)
            seen = tl.where(far == 0, j <= offset, exists)
            for g in tl.static_range(GROUP):
                if g > 0:
                    q1, q2 = _wait2(q_ptr + g * D, q_ptr + g * D + HALF, launch, HALF, THREADS, WAIT)
                scale = SCALE / tl.sqrt(tl.sum(q1 * q1 + q2 * q2, 0) / D + eps)
                q1 = q1 * scale * q_gain1
                q2 = q2 * scale * q_gain2
                scores = tl.sum(k1 * (q1 * cos - q2 * sin)[None, :] + k2 * (q2 * cos + q1 * sin)[None, :], 1)
                scores = tl.where(seen, scores, float("-inf"))
                top = tl.maximum(tl.max(scores, 0), -1e30)
                shares = tl.exp2(scores - top)
                total = tl.sum(shares, 0)
                whole = tl.maximum(total, 1e-30)
                o1 = tl.sum(shares[:, None] * v1, 0) / whole
                o2 = tl.sum(shares[:, None] * v2, 0) / whole
                lse = tl.where(total > 0, top + tl.log2(whole), -1e30)
                at = part * HEADS + head * GROUP + g
                _send(words_ptr, base + X_O + at * D + t, o1, t < HALF, launch, copy, COPIES)
                _send(words_ptr, base + X_O + at * D + HALF + t, o2, t < HALF, launch, copy, COPIES)
                _send(words_ptr, base + X_LSE + at, lse, True, launch, copy, COPIES)

        if CARRY > 0:
            merged = tl.load(row_ptr + 6)
            if merged > 0:
                ring = ring_ptr + tl.load(row_ptr + 2)
                own_ptr = ring + ((chunk % slots) * CHUNK + offset) * CARRY
                far_ptr = ring + (((chunk + 1) % slots) * CHUNK + offset) * CARRY
                k = tl.arange(0, words_in(CARRY))
                for row in range(pid * CARRY_R, CARRY, programs * CARRY_R):
                    at = row + tl.arange(0, CARRY_R)
                    partner = tl.load(far_ptr + k, mask=(k < CARRY) & exists, other=0.0).to(tl.float32)
                    heard = tl.load(far_ptr + at, mask=(at < CARRY) & exists, other=0.0).to(tl.float32)
                    inside = (at < CARRY)[:, None] & (k < CARRY)[None, :]
                    cells = at[:, None] * (2 * CARRY) + k[None, :]
                    w_own = tl.load(w_ptr + W_MERGE + cells, mask=inside, other=0.0)
                    w_far = tl.load(w_ptr + W_MERGE + CARRY + cells, mask=inside, other=0.0)
                    total = tl.load(vector_ptr + V_BIAS + at, mask=at < CARRY, other=0.0)
                    total += _times(w_far, partner)
                    scan_ptr = mine + scans + (merged - 1) * CARRY
                    scan = _vector(scan_ptr, launch, CARRY, THREADS, WAIT)
                    own = _wait(scan_ptr + tl.minimum(at, CARRY - 1), launch, CARRY_R, THREADS, WAIT)
                    total += _times(w_own, scan)
                    value = own + heard / (1.0 + tl.exp(-total))
                    tl.store(own_ptr + at, own.to(ring_ptr.dtype.element_ty), mask=at < CARRY)
                    _send(words_ptr, scans + merged * CARRY + at, value, at < CARRY, launch, copy, COPIES)

        first = pid * (OUT_R * OUT_T)
        if first < WIDTH:
            if not EMPTY:
                tiles = _tiles(w_ptr + W_OUT, first, WIDTH, QUERIES, OUT_R, OUT_T)
            xs = _rows_of(mine + base, first, launch, WIDTH, OUT_R, OUT_T, THREADS, WAIT)
            s = tl.arange(0, SPLITS)
            k = tl.minimum(tl.arange(0, words_in(QUERIES)), QUERIES - 1)
            o_ptr = mine + base + X_O + s[:, None] * QUERIES + k[None, :]
            lse_ptr = mine + base + X_LSE + s[:, None] * HEADS + (k // D)[None, :]
            o, lse = _wait2(o_ptr, lse_ptr, launch, SPLITS * words_in(QUERIES), THREADS, WAIT)
            shares = tl.exp2(lse - tl.max(lse, 0)[None, :])
            y = tl.sum(o * shares, 0) / tl.sum(shares, 0)
            for i in tl.static_range(OUT_T):
                at = first + i * OUT_R + tl.arange(0, OUT_R)
                total = xs[i] + 0.0 * tl.sum(y, 0) if EMPTY else xs[i] + _times(tiles[i], y)
                _send(words_ptr, base + X_MIDDLE + at, total, at < WIDTH, launch, copy, COPIES)

        first = pid * (UP_R * UP_T)
        if first < FF:
            if not EMPTY:
                tiles = _tiles(w_ptr + W_UP, first, FF, WIDTH, UP_R, UP_T)
                if GATED:
                    others = _tiles(w_ptr + W_UP + FF * WIDTH, first, FF, WIDTH, UP_R, UP_T)
            x = _vector(mine + base + X_MIDDLE, launch, WIDTH, THREADS, WAIT)
            scale = _scale(x, WIDTH, eps)
            for i in tl.static_range(UP_T):
                at = first + i * UP_R + tl.arange(0, UP_R)
                total = at * scale if EMPTY else _times(tiles[i], x) * scale
                if GATED:
                    total = total / (1.0 + tl.exp(-total)) * (_times(others[i], x) * scale)
                else:
                    total = tl.maximum(total, 0.0)
                    total = total * total
                _send(words_ptr, base + X_HIDDEN + at, total, at < FF, launch, copy, COPIES)

        first = pid * (DOWN_R * DOWN_T)
        if first < WIDTH:
            if not EMPTY:
                tiles = _tiles(w_ptr + W_DOWN, first, WIDTH, FF, DOWN_R, DOWN_T)
            xs = _rows_of(mine + base + X_MIDDLE, first, launch, WIDTH, DOWN_R, DOWN_T, THREADS, WAIT)
            hidden = _vector(mine + base + X_HIDDEN, launch, FF, THREADS, WAIT)
            for i in tl.static_range(DOWN_T):
                at = first + i * DOWN_R + tl.arange(0, DOWN_R)
                total = xs[i] + 0.0 * tl.sum(hidden, 0) if EMPTY else xs[i] + _times(tiles[i], hidden)
                _send(words_ptr, base + X_LAYER + at, total, at < WIDTH, launch, copy, COPIES)

    for row in range(pid * HEAD_R, VOCAB, programs * HEAD_R):
        rows = _rows(head_ptr, row, VOCAB, WIDTH, HEAD_R)
        x = _vector(mine + num_layers * X_LAYER, launch, WIDTH, THREADS, WAIT)
        at = row + tl.arange(0, HEAD_R)
        tl.store(logits_ptr + at, _times(rows, x) * _scale(x, WIDTH, eps), mask=at < VOCAB)
