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

from butterfly_llm.ops.triton_words import (
    EMPTY,
    block_of,
    fetch,
    fetch_rows,
    glance_at,
    glance_rows,
    load_tiles,
    load_vector,
    padded,
    send,
    send_rows,
    settle,
    sum_blocks,
    times_rows,
    wait_for,
)


@triton.jit
def _write_heads(
    x_ptr, w_ptr, bias_ptr, scan_ptr, pid, programs, eps, WIDTH: tl.constexpr, CARRY: tl.constexpr,
    HEADS: tl.constexpr, THREADS: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr,
):  # fmt: skip
    """What the stream puts into a carry with heads; a program takes a whole head, whose values it norms."""
    SIZE: tl.constexpr = CARRY // HEADS
    R: tl.constexpr = min(8, padded(SIZE))
    T: tl.constexpr = (SIZE + R - 1) // R
    r = tl.arange(0, R)
    for head in range(pid, HEADS, programs):
        first = HEADS + head * SIZE
        limit = first + SIZE
        x = load_vector(x_ptr, WIDTH, THREADS, WAIT, PAUSE)
        score, squares = times_rows(load_tiles(w_ptr, head, head + 1, WIDTH, R, 1), x, True, WAIT)
        scale = 1.0 / tl.sqrt(squares / WIDTH + eps)
        score = score * scale + tl.load(bias_ptr + head + r, mask=r == 0, other=0.0)
        send_rows(scan_ptr + head + r, score, r == 0, WAIT)
        values = ()
        total = tl.zeros((R,), tl.float32)
        for i in tl.static_range(T):
            rows = first + i * R + r
            tiles = load_tiles(w_ptr, first + i * R, limit, WIDTH, R, 1)
            value = times_rows(tiles, x, False, WAIT)[0] * scale
            value += tl.load(bias_ptr + rows, mask=rows < limit, other=0.0)
            total += value * value
            values = values + (value,)  # noqa: RUF005
        scale = 1.0 / tl.sqrt(tl.sum(total, 0) / SIZE + eps)
        for i in tl.static_range(T):
            rows = first + i * R + r
            send_rows(scan_ptr + rows, values[i] * scale, rows < limit, WAIT)


@triton.jit
def _merge_heads(
    scan_ptr, own_ptr, far_ptr, exists, bias_ptr, pid, programs, CARRY: tl.constexpr, HEADS: tl.constexpr,
    THREADS: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr,
):  # fmt: skip
    """One level of a carry with heads, a program for each: the scan after this one is sent."""
    SIZE: tl.constexpr = CARRY // HEADS
    SCAN: tl.constexpr = HEADS + CARRY
    k = tl.arange(0, padded(SIZE))
    inside = k < SIZE
    for head in range(pid, HEADS, programs):
        at = HEADS + head * SIZE + tl.minimum(k, SIZE - 1)
        zeros = tl.zeros((padded(SIZE),), tl.int32)
        heard = tl.load(far_ptr + at, mask=inside & exists, other=0.0).to(tl.float32)
        other = tl.load(far_ptr + head + zeros, mask=exists, other=float("-inf")).to(tl.float32)
        other -= tl.load(bias_ptr + head)
        value, score = wait_for((scan_ptr + at, scan_ptr + head + zeros), padded(SIZE), THREADS, WAIT, PAUSE)
        tl.store(own_ptr + at, value.to(own_ptr.dtype.element_ty), mask=inside)
        tl.store(own_ptr + head + zeros, score.to(own_ptr.dtype.element_ty), mask=k == 0)
        share = 1.0 / (1.0 + tl.exp(score - other))
        both = tl.maximum(score, other) + tl.log(1.0 + tl.exp(-tl.abs(score - other)))
        send(scan_ptr + SCAN + at, value + share * (heard - value), inside)
        send(scan_ptr + SCAN + head + zeros, both, k == 0)


@triton.jit
def _route(row_ptr):
    """A row of the table: three places in units of 16 elements, then small numbers."""
    return (
        tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3).to(tl.int32),
        tl.load(row_ptr + 4).to(tl.int32), tl.load(row_ptr + 5).to(tl.int32),
        tl.load(row_ptr + 6).to(tl.int32), tl.load(row_ptr + 7).to(tl.int32),
        tl.load(row_ptr + 8).to(tl.int32), tl.load(row_ptr + 9).to(tl.int32),
        tl.load(row_ptr + 10).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _slot(chunk, part, slots):
    """Where in a ring chunks lie: the own one (part 0), the partner (1), those before the own one (2 ..)."""
    return tl.where(part < 2, chunk + part, chunk + slots - (part - 1)) % slots


@triton.jit
def persistent_kernel(
    ids_ptr, position_ptr, launch_ptr, table_ptr, weights_ptr, vectors_ptr, embed_ptr, turns_ptr, ring_ptr,
    words_ptr, logits_ptr, num_layers, num_words, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, FF: tl.constexpr,
    CARRY: tl.constexpr, CARRY_HEADS: tl.constexpr, CHUNK: tl.constexpr, VOCAB: tl.constexpr,
    GATED: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, LOCAL: tl.constexpr,
    COLUMNS: tl.constexpr, QKV_R: tl.constexpr, QKV_T: tl.constexpr, OUT_R: tl.constexpr, OUT_T: tl.constexpr,
    UP_R: tl.constexpr, UP_T: tl.constexpr, DOWN_R: tl.constexpr, DOWN_T: tl.constexpr, CARRY_R: tl.constexpr,
    HEAD_R: tl.constexpr, FETCH: tl.constexpr, WAIT: tl.constexpr, PAUSE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """logits (VOCAB,) float32 of the character ids (1,) at position (1,); the rings are updated.

    launch (1,): goes up by one with each launch. table (num_layers + 1, COLUMNS) int64: what differs from
    layer to layer, see `persistent_step`; LOCAL is the most chunks before its own that a layer reads. A
    program multiplies T tiles of R rows of each matrix. SCALE includes log2(e).
    """
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = HEADS * D
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    # Chunks that a character sees in a layer: its own, the partner, then local ones, the nearest first.
    PARTS: tl.constexpr = 2 + LOCAL
    # Of a layer, in `weights`.
    W_READ: tl.constexpr = QKV * WIDTH
    W_OUT: tl.constexpr = W_READ + 2 * KV_HEADS * D * CARRY
    W_UP: tl.constexpr = W_OUT + WIDTH * QUERIES
    W_GATED: tl.constexpr = W_UP + FF * WIDTH
    W_DOWN: tl.constexpr = W_GATED + (FF * WIDTH if GATED else 0)
    W_MERGE: tl.constexpr = W_DOWN + WIDTH * FF
    W_LAYER: tl.constexpr = W_MERGE + (0 if CARRY_HEADS else 2 * CARRY * CARRY)
    # Of a layer, in `vectors`: gains of queries and keys, bias of the merge.
    V_BIAS: tl.constexpr = 2 * D
    V_LAYER: tl.constexpr = 2 * D + (CARRY_HEADS if CARRY_HEADS else CARRY)
    # Of a scan, in `words`, and a row of its ring: scores of the heads first.
    SCAN: tl.constexpr = CARRY_HEADS + CARRY
    # Of a layer, in `words`.
    X_QKV: tl.constexpr = WIDTH
    X_O: tl.constexpr = X_QKV + QKV
    X_LSE: tl.constexpr = X_O + PARTS * QUERIES
    X_MIDDLE: tl.constexpr = X_LSE + PARTS * HEADS
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
    lane = tl.arange(0, padded(SCAN))
    kind = ring_ptr.dtype.element_ty
    kind_bytes: tl.constexpr = ring_ptr.dtype.element_ty.primitive_bitwidth // 8

    if pid == 0:
        k = tl.arange(0, padded(WIDTH))
        row_ptr = embed_ptr + tl.load(ids_ptr) * WIDTH
        x = tl.load(row_ptr + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        x = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
        x = x * tl.load(vectors_ptr + k, mask=k < WIDTH, other=0.0)
        send(values_ptr + k, x, k < WIDTH)
        if CARRY > 0:  # scan 0 is empty: what layers read that have no carry
            send(scans_ptr + lane, lane * 0.0, lane < SCAN)
    for word in range(pid * BLOCK, num_words, programs * BLOCK):
        words = word + tl.arange(0, BLOCK)
        tl.store(words_ptr + (1 - turn) * num_words + words, EMPTY, mask=words < num_words)

    route = _route(table_ptr)
    for layer in range(num_layers):
        keys_at, values_at, carry_at, slots, stride, read, merged, write, written, local, carry_slots = route
        route = _route(table_ptr + (layer + 1) * COLUMNS)
        w_ptr = layers_ptr + tl.cast(layer, tl.int64) * W_LAYER
        vector_ptr = vectors_ptr + WIDTH + layer * V_LAYER
        x_ptr = values_ptr + layer * X_LAYER
        exists = chunk >= stride if SHIFT else (chunk & stride) != 0

        if CARRY > 0:
            lanes_ptr = scans_ptr + read * SCAN + CARRY_HEADS
            places, glances = glance_rows(lanes_ptr, 0, CARRY, block_of(CARRY), CARRY // block_of(CARRY))
        fetch_rows(w_ptr + W_UP, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH)
        if GATED:
            fetch_rows(w_ptr + W_GATED, pid * UP_R * UP_T, UP_R * UP_T, FF, WIDTH, FETCH)
        fetch_rows(w_ptr + W_DOWN, pid * DOWN_R * DOWN_T, DOWN_R * DOWN_T, WIDTH, FF, FETCH)

        if CARRY > 0:  # noqa: SIM102 (decided when compiling, the next when running)
            if written > 0:  # a pass starts
                WRITTEN: tl.constexpr = SCAN if CARRY_HEADS else 2 * CARRY
                write_ptr = writes_ptr + write * (WRITTEN * WIDTH)
                bias_ptr = biases_ptr + write * WRITTEN
                scan_ptr = scans_ptr + written * SCAN
                if CARRY_HEADS:
                    _write_heads(
                        x_ptr, write_ptr, bias_ptr, scan_ptr, pid, programs, eps, WIDTH, CARRY, CARRY_HEADS,
                        THREADS, WAIT, PAUSE,
                    )  # fmt: skip
                for row in range(pid * CARRY_R, 0 if CARRY_HEADS else CARRY, programs * CARRY_R):
                    tiles = load_tiles(write_ptr, row, CARRY, WIDTH, CARRY_R, 1)
                    tiles = tiles + load_tiles(write_ptr + CARRY * WIDTH, row, CARRY, WIDTH, CARRY_R, 1)
                    at = row + tl.arange(0, CARRY_R)
                    gate_bias = tl.load(bias_ptr + at, mask=at < CARRY, other=0.0)
                    value_bias = tl.load(bias_ptr + CARRY + at, mask=at < CARRY, other=0.0)
                    x = load_vector(x_ptr, WIDTH, THREADS, WAIT, PAUSE)
                    gate, value, squares = times_rows(tiles, x, True, WAIT)
                    scale = 1.0 / tl.sqrt(squares / WIDTH + eps)
                    value = value * scale + value_bias
                    value = value / (1.0 + tl.exp(-gate * scale - gate_bias))
                    send_rows(scan_ptr + at, value, at < CARRY, WAIT)

        # Queries, keys and values, as they come from the product.
        first = pid * (QKV_R * QKV_T)
        if first < QKV:
            tiles = load_tiles(w_ptr, first, QKV, WIDTH, QKV_R, QKV_T)
            if CARRY > 0:
                reads = load_tiles(w_ptr + W_READ, first - QUERIES, 2 * KV_HEADS * D, CARRY, QKV_R, QKV_T)
                lanes = ()
                for block in tl.static_range(CARRY // block_of(CARRY)):
                    lanes = lanes + (settle(glances[block], places[block], WAIT),)  # noqa: RUF005
                heard = times_rows(reads, lanes, True, WAIT)
                heard_scale = 1.0
                if CARRY_HEADS == 0:
                    heard_scale = 1.0 / tl.sqrt(heard[QKV_T] / CARRY + eps)
            x = load_vector(x_ptr, WIDTH, THREADS, WAIT, PAUSE)
            totals = times_rows(tiles, x, True, WAIT)
            scale = 1.0 / tl.sqrt(totals[QKV_T] / WIDTH + eps)
            for i in tl.static_range(QKV_T):
                at = first + i * QKV_R + tl.arange(0, QKV_R)
                total = totals[i] * scale
                if CARRY > 0:
                    total += heard[i] * heard_scale
                send_rows(x_ptr + X_QKV + at, total, at < QKV, WAIT)

        # One of the chunks of a head: the last programs, which have the fewest rows above.
        for item in range(programs - 1 - pid, KV_HEADS * (2 + local), programs):
            head = item // (2 + local)
            part = item % (2 + local)
            start = (head * slots + _slot(chunk, part, slots)) * (CHUNK * D)
            key_ptr = ring_ptr + keys_at * 16 + start
            value_ptr = ring_ptr + values_at * 16 + start
            j = tl.arange(0, CHUNK)
            cells = j[:, None] * D + t[None, :]
            other = tl.where(part == 1, exists & (stride > local), chunk >= part - 1)
            old = tl.where(part == 0, j < offset, other)
            k1 = tl.load(key_ptr + cells, mask=old[:, None], other=0.0)
            k2 = tl.load(key_ptr + HALF + cells, mask=old[:, None], other=0.0)
            v1 = tl.load(value_ptr + cells, mask=old[:, None], other=0.0)
            v2 = tl.load(value_ptr + HALF + cells, mask=old[:, None], other=0.0)
            back = tl.where(part == 0, 0, tl.where(part == 1, local + 1, part - 1))
            turn_ptr = turns_ptr + (offset + back * CHUNK) * HALF + t
            cos = tl.load(turn_ptr)
            sin = tl.load(turn_ptr + PARTS * CHUNK * HALF)
            q_gain1 = tl.load(vector_ptr + t)
            q_gain2 = tl.load(vector_ptr + HALF + t)
            k_gain1 = tl.load(vector_ptr + D + t)
            k_gain2 = tl.load(vector_ptr + D + HALF + t)

            q_ptr = x_ptr + X_QKV + head * (GROUP * D) + t
            new_k_ptr = x_ptr + X_QKV + QUERIES + head * D + t
            new_v_ptr = new_k_ptr + KV_HEADS * D
            q1, q2, new_k1, new_k2, new_v1, new_v2 = wait_for(
                (q_ptr, q_ptr + HALF, new_k_ptr, new_k_ptr + HALF, new_v_ptr, new_v_ptr + HALF), HALF,
                THREADS, WAIT, PAUSE,
            )  # fmt: skip
            scale = 1.0 / tl.sqrt(tl.sum(new_k1 * new_k1 + new_k2 * new_k2, 0) / D + eps)
            new_k1 = new_k1 * scale * k_gain1
            new_k2 = new_k2 * scale * k_gain2
            # The newest key, beside the tiles: turned right for the own chunk, unused for the others.
            turned1 = (new_k1 * cos - new_k2 * sin).to(kind)
            turned2 = (new_k2 * cos + new_k1 * sin).to(kind)
            new_v1 = new_v1.to(kind)
            new_v2 = new_v2.to(kind)
            newest = part == 0
            for g in tl.static_range(GROUP):
                if g > 0:
                    q1, q2 = wait_for((q_ptr + g * D, q_ptr + g * D + HALF), HALF, THREADS, WAIT, PAUSE)
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
                o1, o2 = sum_blocks(
                    (shares[:, None] * v1.to(tl.float32), shares[:, None] * v2.to(tl.float32)), 0, WAIT
                )
                o1 = (o1 + share * new_v1.to(tl.float32)) / whole
                o2 = (o2 + share * new_v2.to(tl.float32)) / whole
                lse = tl.where(total > 0, top + tl.log2(whole), -1e30)
                at = part * HEADS + head * GROUP + g
                one = tl.zeros((1,), tl.int32)
                send(x_ptr + X_O + at * D + t, o1, t < HALF)
                send(x_ptr + X_O + at * D + HALF + t, o2, t < HALF)
                send(x_ptr + X_LSE + at + one, lse + one, one == 0)
            if newest:
                new = offset * D + t
                tl.store(key_ptr + new, turned1)
                tl.store(key_ptr + HALF + new, turned2)
                tl.store(value_ptr + new, new_v1)
                tl.store(value_ptr + HALF + new, new_v2)

        if CARRY > 0:  # noqa: SIM102
            if merged > 0:
                carry_ptr = ring_ptr + carry_at * 16
                own_ptr = carry_ptr + ((chunk % carry_slots) * CHUNK + offset) * SCAN
                far_ptr = carry_ptr + (((chunk + 1) % carry_slots) * CHUNK + offset) * SCAN
                scan_ptr = scans_ptr + (merged - 1) * SCAN
                if CARRY_HEADS:
                    _merge_heads(
                        scan_ptr, own_ptr, far_ptr, exists, vector_ptr + V_BIAS, pid, programs, CARRY,
                        CARRY_HEADS, THREADS, WAIT, PAUSE,
                    )  # fmt: skip
                for row in range(pid * CARRY_R, 0 if CARRY_HEADS else CARRY, programs * CARRY_R):
                    at = row + tl.arange(0, CARRY_R)
                    partner = tl.load(far_ptr + lane, mask=(lane < CARRY) & exists, other=0.0)
                    part = tl.load(far_ptr + at, mask=(at < CARRY) & exists, other=0.0).to(tl.float32)
                    inside = (at < CARRY)[:, None] & (lane < CARRY)[None, :]
                    cells = w_ptr + W_MERGE + at[:, None] * (2 * CARRY) + lane[None, :]
                    w_own = tl.load(cells, mask=inside, other=0.0)
                    w_far = tl.load(cells + CARRY, mask=inside, other=0.0)
                    total = tl.load(vector_ptr + V_BIAS + at, mask=at < CARRY, other=0.0)
                    at_ptr = scan_ptr + tl.minimum(at, CARRY - 1)
                    seen = glance_at(at_ptr)
                    scan = wait_for(
                        (scan_ptr + tl.minimum(lane, CARRY - 1),), padded(CARRY), THREADS, WAIT, PAUSE
                    )[0]
                    product = w_own.to(tl.float32) * scan[None, :]
                    total += tl.sum(product + w_far.to(tl.float32) * partner.to(tl.float32)[None, :], 1)
                    value = settle(seen, at_ptr, WAIT)
                    tl.store(own_ptr + at, value.to(kind), mask=at < CARRY)
                    value += part / (1.0 + tl.exp(-total))
                    send_rows(scan_ptr + SCAN + at, value, at < CARRY, WAIT)

        first = pid * (OUT_R * OUT_T)
        if first < WIDTH:
            tiles = load_tiles(w_ptr + W_OUT, first, WIDTH, QUERIES, OUT_R, OUT_T)
            own_places, own = glance_rows(x_ptr, first, WIDTH, OUT_R, OUT_T)
            OUT_K: tl.constexpr = block_of(QUERIES)
            pointers = ()
            for block in tl.static_range(QUERIES // OUT_K):
                k = block * OUT_K + tl.arange(0, OUT_K)
                for i in tl.static_range(2):
                    o_ptr = x_ptr + X_O + i * QUERIES + k
                    pointers = pointers + (o_ptr, x_ptr + X_LSE + i * HEADS + k // D)  # noqa: RUF005
            parts = wait_for(pointers, OUT_K, THREADS, WAIT, PAUSE)
            y = ()
            for block in tl.static_range(QUERIES // OUT_K):
                k = block * OUT_K + tl.arange(0, OUT_K)
                top = tl.maximum(parts[4 * block + 1], parts[4 * block + 3])
                own_share = tl.exp2(parts[4 * block + 1] - top)
                share = tl.exp2(parts[4 * block + 3] - top)
                whole = own_share + share
                total = own_share * parts[4 * block] + share * parts[4 * block + 2]
                if LOCAL > 0:
                    for i in range(2, 2 + local):
                        near_ptr = x_ptr + X_O + i * QUERIES + k
                        lse_ptr = x_ptr + X_LSE + i * HEADS + k // D
                        near, lse = wait_for((near_ptr, lse_ptr), OUT_K, THREADS, WAIT, PAUSE)
                        higher = tl.maximum(top, lse)
                        shrink = tl.exp2(top - higher)
                        share = tl.exp2(lse - higher)
                        whole = whole * shrink + share
                        total = total * shrink + share * near
                        top = higher
                y = y + (total / whole,)  # noqa: RUF005
            totals = times_rows(tiles, y, False, WAIT)
            for i in tl.static_range(OUT_T):
                at = first + i * OUT_R + tl.arange(0, OUT_R)
                x = totals[i] + settle(own[i], own_places[i], WAIT)
                send_rows(x_ptr + X_MIDDLE + at, x, at < WIDTH, WAIT)

        if FETCH:  # noqa: SIM102
            if layer + 1 < num_layers:
                next_ptr = w_ptr + W_LAYER
                count = QKV_R * QKV_T
                fetch_rows(next_ptr, pid * count, count, QKV, WIDTH, FETCH)
                if CARRY > 0:
                    limit = tl.where(pid * count + count > QUERIES, 2 * KV_HEADS * D, 0)
                    row = tl.maximum(pid * count - QUERIES, 0)
                    fetch_rows(next_ptr + W_READ, row, count, limit, CARRY, FETCH)
                    if CARRY_HEADS == 0:
                        fetch_rows(next_ptr + W_MERGE, pid * CARRY_R, CARRY_R, CARRY, 2 * CARRY, FETCH)
                fetch_rows(next_ptr + W_OUT, pid * OUT_R * OUT_T, OUT_R * OUT_T, WIDTH, QUERIES, FETCH)
                count = 2 + route[9]
                for item in range(programs - 1 - pid, KV_HEADS * count, programs):
                    start = (item // count * route[3] + _slot(chunk, item % count, route[3])) * (CHUNK * D)
                    fetch(ring_ptr + route[0] * 16 + start, CHUNK * D * kind_bytes, FETCH)
                    fetch(ring_ptr + route[1] * 16 + start, CHUNK * D * kind_bytes, FETCH)

        first = pid * (UP_R * UP_T)
        if first < FF:
            tiles = load_tiles(w_ptr + W_UP, first, FF, WIDTH, UP_R, UP_T)
            if GATED:
                others = load_tiles(w_ptr + W_GATED, first, FF, WIDTH, UP_R, UP_T)
            x = load_vector(x_ptr + X_MIDDLE, WIDTH, THREADS, WAIT, PAUSE)
            totals = times_rows(tiles, x, True, WAIT)
            scale = 1.0 / tl.sqrt(totals[UP_T] / WIDTH + eps)
            if GATED:
                gated = times_rows(others, x, False, WAIT)
            for i in tl.static_range(UP_T):
                at = first + i * UP_R + tl.arange(0, UP_R)
                total = totals[i] * scale
                if GATED:
                    total = total / (1.0 + tl.exp(-total)) * (gated[i] * scale)
                else:
                    total = tl.maximum(total, 0.0)
                    total = total * total
                send_rows(x_ptr + X_HIDDEN + at, total, at < FF, WAIT)

        first = pid * (DOWN_R * DOWN_T)
        if first < WIDTH:
            tiles = load_tiles(w_ptr + W_DOWN, first, WIDTH, FF, DOWN_R, DOWN_T)
            own_places, own = glance_rows(x_ptr + X_MIDDLE, first, WIDTH, DOWN_R, DOWN_T)
            hidden = load_vector(x_ptr + X_HIDDEN, FF, THREADS, WAIT, PAUSE)
            totals = times_rows(tiles, hidden, False, WAIT)
            for i in tl.static_range(DOWN_T):
                at = first + i * DOWN_R + tl.arange(0, DOWN_R)
                x = totals[i] + settle(own[i], own_places[i], WAIT)
                send_rows(x_ptr + X_LAYER + at, x, at < WIDTH, WAIT)

    for row in range(pid * HEAD_R, VOCAB, programs * HEAD_R):
        tiles = load_tiles(weights_ptr, row, VOCAB, WIDTH, HEAD_R, 1)
        x = load_vector(values_ptr + num_layers * X_LAYER, WIDTH, THREADS, WAIT, PAUSE)
        total, squares = times_rows(tiles, x, True, WAIT)
        at = row + tl.arange(0, HEAD_R)
        tl.store(logits_ptr + at, total / tl.sqrt(squares / WIDTH + eps), mask=at < VOCAB)
