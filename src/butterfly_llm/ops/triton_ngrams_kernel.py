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
def ngram_kernel(
    ids_ptr, position_ptr, history_ptr, entries_ptr, factors_ptr, orders_ptr, embed_ptr, ngram_ptr, out_ptr,
    WIDTH: tl.constexpr, ORDERS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, d) = embed[id] + the sum over n of ngram[n, follower]; history (B, R), entries (B, O, S).

    All entries are written before the first is read: an n-gram may stand in the place of the one before.
    """
    b = tl.program_id(0).to(tl.int64)
    character = tl.load(ids_ptr + b)
    position = tl.load(position_ptr + b)
    history_ptr += b * R
    entries_ptr += b * ORDERS * SLOTS
    back = tl.arange(0, R)
    before = tl.load(history_ptr + (position + R - 1 - back) % R)  # the latest first
    # The one before each: `back` and the character now in front of it. The oldest is in no n-gram.
    now = tl.load(history_ptr + (position + R - back) % R)
    now = tl.where(back == 0, character, now)
    tl.debug_barrier()
    tl.store(history_ptr + position % R, character)
    for o in tl.static_range(ORDERS):
        order = tl.load(orders_ptr + o)
        place, tag = _place(tl.sum(before * tl.load(factors_ptr + o * R + back), 0), SLOTS, MIX)
        entry = ((tag << 8) | character).to(tl.int32)
        tl.store(entries_ptr + o * SLOTS + place, entry, mask=position >= order)
    tl.debug_barrier()
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    x = tl.load(embed_ptr + character * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    for o in tl.static_range(ORDERS):
        order = tl.load(orders_ptr + o)
        place, tag = _place(tl.sum(now * tl.load(factors_ptr + o * R + back), 0), SLOTS, MIX)
        entry = tl.load(entries_ptr + o * SLOTS + place).to(tl.int64)
        known = ((entry >> 8) == tag) & (position + 1 >= order)
        follower = tl.where(known, entry & 255, 256)
        x += tl.load(ngram_ptr + (o * 257 + follower) * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * WIDTH + k, x, mask=inside)
