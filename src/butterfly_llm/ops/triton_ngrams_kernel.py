# mypy: ignore-errors
"""One character a stream, embedded with what followed its n-grams, launched by `triton_ngrams`."""

import triton
import triton.language as tl


@triton.jit
def _place(hashed, SLOTS: tl.constexpr, MIX: tl.constexpr):
    """As `ngrams._places`: where an n-gram stands and its tag."""
    mixed = (hashed ^ ((hashed >> 32) & 0xFFFFFFFF)) * MIX
    return (mixed >> 42) & (SLOTS - 1), ((mixed >> 16) & 0x7FFFFF) | 1


@triton.jit
def _pushed(entry, tag, character, RANKS: tl.constexpr):
    """As `ngrams._pushed`."""
    older = ((entry >> 31) << 9 | (entry & 255) + 1) & ((1 << 9 * (RANKS - 1)) - 1)
    older = tl.where(((entry >> 8) & 0x7FFFFF) == tag, older, 0)
    return (older << 31) | (tag << 8) | character


@triton.jit
def _write(entries_ptr, replaced_ptr, again, hashed, whole, character,
           SLOTS: tl.constexpr, MIX: tl.constexpr, RANKS: tl.constexpr, UNDO: tl.constexpr):  # fmt: skip
    """The context that ended before the character is followed by it; a repeated step takes its place."""
    place, tag = _place(hashed, SLOTS, MIX)
    held = tl.load(entries_ptr + place).to(tl.int64)
    if UNDO:
        held = tl.where(again, tl.load(replaced_ptr), held)
        tl.store(replaced_ptr, held)
    entry = tl.where(whole, _pushed(held, tag, character, RANKS), held)
    tl.store(entries_ptr + place, entry.to(entries_ptr.dtype.element_ty))


@triton.jit
def _tell(x, entries_ptr, hashed, whole, ngram_ptr, k,
          WIDTH: tl.constexpr, SLOTS: tl.constexpr, MIX: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """x and the rows of what followed the context, the latest first."""
    place, tag = _place(hashed, SLOTS, MIX)
    entry = tl.load(entries_ptr + place).to(tl.int64)
    known = (((entry >> 8) & 0x7FFFFF) == tag) & whole
    for rank in tl.static_range(RANKS):
        if rank == 0:
            follower = tl.where(known, entry & 255, 256)
        else:
            older = (entry >> (31 + 9 * (rank - 1))) & 511
            follower = tl.where(known & (older > 0) & (older <= 256), older - 1, 256)
        row = ngram_ptr + (rank * 257 + follower) * WIDTH + k
        x += tl.load(row, mask=k < WIDTH, other=0.0).to(tl.float32)
    return x


@triton.jit
def _behind(hashed, numbers, v, w, MIX: tl.constexpr):
    """As `ngrams._word_hashes`: one more word before the token and those that `hashed` is of."""
    return (hashed ^ ((hashed >> 29) & 0x7FFFFFFFF)) * MIX + tl.sum(tl.where(v == 2 + w, numbers, 0), 0)


@triton.jit
def ngram_kernel(
    ids_ptr, position_ptr, history_ptr, entries_ptr, undo_ptr, factors_ptr, orders_ptr, embed_ptr, ngram_ptr,
    out_ptr,
    WIDTH: tl.constexpr, ORDERS: tl.constexpr, WORDS: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr,
    R: tl.constexpr, MIX: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, d) = embed[id] + the sum over contexts and ranks of ngram[n, follower]; history (B, R), entries
    (B, O, S), undo (B, Y).

    All entries are written before the first is read: a context may stand in the place of the one before.
    """
    COUNT: tl.constexpr = ORDERS + WORDS
    UNDO: tl.constexpr = WORDS > 0 or RANKS > 1
    V: tl.constexpr = WORDS + 1 if WORDS > 0 else 0
    b = tl.program_id(0).to(tl.int64)
    character = tl.load(ids_ptr + b)
    position = tl.load(position_ptr + b)
    history_ptr += b * R
    entries_ptr += b * COUNT * SLOTS
    undo_ptr += b * (1 + 2 * V + COUNT)
    replaced_ptr = undo_ptr + 1 + 2 * V
    back = tl.arange(0, R)
    before = tl.load(history_ptr + (position + R - 1 - back) % R)  # the latest first
    # The one before each: `back` and the character now in front of it. The oldest is in no n-gram.
    now = tl.load(history_ptr + (position + R - back) % R)
    now = tl.where(back == 0, character, now)
    again = False
    if UNDO:
        again = tl.load(undo_ptr) == position
    v = tl.arange(0, 16)
    numbers = tl.zeros([16], tl.int64)
    after = numbers
    if WORDS > 0:
        # About words, before this character and after it. What another stream has left counts for nothing.
        numbers_ptr = undo_ptr + 1 + tl.where(again, 0, V)
        numbers = tl.load(numbers_ptr + v, mask=(v < V) & (position > 0), other=0)
        shifted = tl.load(
            numbers_ptr + tl.where(v == 2, 0, v - 1), mask=(v > 1) & (v < V) & (position > 0), other=0
        )
        kind = tl.sum(tl.where(v == 1, numbers, 0), 0)
        token = tl.sum(tl.where(v == 0, numbers, 0), 0)
        letter = (character >= 128) | (character == 95) | ((character >= 48) & (character <= 57))
        letter = letter | (((character | 32) >= 97) & ((character | 32) <= 122))
        same = kind == letter.to(tl.int64)
        after = tl.where((kind == 1) & (same == 0), shifted, numbers)
        after = tl.where(v == 1, letter.to(tl.int64), after)
        after = tl.where(v == 0, tl.where(same, token * BASE, 0) + character + 1, after)
    tl.debug_barrier()
    tl.store(history_ptr + position % R, character)
    if UNDO:
        tl.store(undo_ptr, position)
    if WORDS > 0:
        tl.store(undo_ptr + 1 + v, numbers, mask=v < V)
        tl.store(undo_ptr + 1 + V + v, after, mask=v < V)
    for o in tl.static_range(ORDERS):
        hashed = tl.sum(before * tl.load(factors_ptr + o * R + back), 0)
        whole = position >= tl.load(orders_ptr + o)
        _write(entries_ptr + o * SLOTS, replaced_ptr + o, again, hashed, whole, character,
               SLOTS, MIX, RANKS, UNDO)  # fmt: skip
    hashed = tl.sum(tl.where(v == 0, numbers, 0), 0)
    for w in tl.static_range(WORDS):
        o = ORDERS + w
        _write(entries_ptr + o * SLOTS, replaced_ptr + o, again, hashed, position > 0, character,
               SLOTS, MIX, RANKS, UNDO)  # fmt: skip
        hashed = _behind(hashed, numbers, v, w, MIX)
    tl.debug_barrier()
    k = tl.arange(0, BLOCK)
    x = tl.load(embed_ptr + character * WIDTH + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    for o in tl.static_range(ORDERS):
        hashed = tl.sum(now * tl.load(factors_ptr + o * R + back), 0)
        whole = position + 1 >= tl.load(orders_ptr + o)
        x = _tell(x, entries_ptr + o * SLOTS, hashed, whole, ngram_ptr + o * RANKS * 257 * WIDTH, k,
                  WIDTH, SLOTS, MIX, RANKS)  # fmt: skip
    hashed = tl.sum(tl.where(v == 0, after, 0), 0)
    for w in tl.static_range(WORDS):
        o = ORDERS + w
        x = _tell(x, entries_ptr + o * SLOTS, hashed, True, ngram_ptr + o * RANKS * 257 * WIDTH, k,
                  WIDTH, SLOTS, MIX, RANKS)  # fmt: skip
        hashed = _behind(hashed, after, v, w, MIX)
    tl.store(out_ptr + b * WIDTH + k, x, mask=k < WIDTH)
