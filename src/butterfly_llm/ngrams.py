"""What followed before: after each character, what came after the latest places in the text that look like
this one. An input of the model, beside the characters themselves.

A place looks like this one where the last n characters are the same, for each of several n (n-grams), or
where the token so far and the word before it, or none, two .. words, are the same, whatever stands between
them. Tokens are words, of letters, digits and `_`, and what stands between words.

This is what an induction head of full attention finds, as a lookup: the cost of a character does not depend
on how far back the passage stands. n-gram heads beside attention: E. Akyurek et al., "In-Context Language
Learning: Architectures and Algorithms", 2024; here the lookup is hashed, so that a stream keeps a table of
fixed size. A slot of the table holds the newest context that was hashed to it, with its latest followers;
another one that meets its slot is forgotten. Reading whole sequences, in parts and one by one gives the same
characters, bit by bit.

Shapes: B streams, T characters, R characters of history, O contexts (the values of n, then none, one .. words
before), K ranks (followers of each, the latest first), S slots, V numbers about words, Y that undo a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from butterfly_llm.config import MAX_ORDER, ButterflyConfig

NOTHING = 256
"""In place of a character, where the context did not stand before."""
HISTORY = MAX_ORDER + 1  # R
TAG_BITS = 23
_TAGS = (1 << TAG_BITS) - 1
_OLDER = 8 + TAG_BITS  # the bit of an entry from which the followers before the latest stand, 9 bits each
BASE = 0x5851F42D4C957F2D  # of the polynomial that is a string's hash
MIX = -0x61C8864680B583EB  # an odd number that spreads its bits


def _signed(value: int) -> int:
    """The int64 that has the lowest 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


# Of a word: letters and digits of ASCII, `_`, and all of Latin-1 beyond ASCII.
_LETTERS = np.zeros(256, dtype=bool)
_LETTERS[[*range(48, 58), *range(65, 91), 95, *range(97, 123), *range(128, 256)]] = True


@cache
def powers(order: int) -> tuple[int, ...]:
    """What the last character, the one before it .. of `order` are multiplied by; zeros up to R."""
    factors = [_signed(pow(BASE, i, 1 << 64)) for i in range(order)]
    return (*factors, *(0,) * (HISTORY - order))


@dataclass(frozen=True)
class Contexts:
    """Which contexts are looked up, how many of their followers are told: fields of a `ButterflyConfig`."""

    orders: tuple[int, ...]
    words: int = 0
    ranks: int = 1
    slots: int = 2**21

    @classmethod
    def of(cls, config: ButterflyConfig) -> Contexts:
        return cls(config.ngram_orders, config.ngram_words, config.ngram_ranks, config.ngram_slots)

    def __len__(self) -> int:
        """O."""
        return len(self.orders) + self.words

    @property
    def named(self) -> tuple[tuple[str, int], ...]:
        """(O,): which context stands where."""
        return (*(("order", n) for n in self.orders), *(("words", w) for w in range(self.words)))

    @property
    def least(self) -> tuple[int, ...]:
        """Characters that each context has at least."""
        return (*self.orders, *(1,) * self.words)

    @property
    def entry_dtype(self) -> torch.dtype:
        """Of an entry: what followed last, the tag, and for more ranks what followed before."""
        return torch.int32 if self.ranks == 1 else torch.int64

    @property
    def word_numbers(self) -> int:
        """V: the hash of the token so far, 1 for a word, and the hashes of the words before it, the latest
        first; zeros before a text."""
        return 1 + self.words if self.words else 0

    @property
    def undo_numbers(self) -> int:
        """Y: the position of the last step, about words before and after it, and the entries it replaced. A
        step of one rank and no words replaces what it wrote by itself."""
        return 1 + 2 * self.word_numbers + len(self) if self.words or self.ranks > 1 else 0


@dataclass
class NgramState:
    """What streams have read: the last characters and, for each context, what followed it."""

    contexts: Contexts
    history: Tensor  # (B, R) int64, the character at position p in place p mod R
    entries: Tensor  # (B, O, S) int32 or int64, 0 for none
    undo: Tensor  # (B, Y) int64

    @classmethod
    def new(cls, contexts: Contexts, batch_size: int, device: torch.device | str) -> NgramState:
        history = torch.zeros(batch_size, HISTORY, dtype=torch.int64, device=device)
        shape = batch_size, len(contexts), contexts.slots
        entries = torch.zeros(shape, dtype=contexts.entry_dtype, device=device)
        undo = torch.zeros(batch_size, contexts.undo_numbers, dtype=torch.int64, device=device)
        return cls(contexts, history, entries, undo)

    def clone(self) -> NgramState:
        return NgramState(self.contexts, self.history.clone(), self.entries.clone(), self.undo.clone())

    def rows(self, rows: slice | Tensor) -> NgramState:
        """Of some of the streams: a view for a slice, a copy for their numbers."""
        return NgramState(self.contexts, self.history[rows], self.entries[rows], self.undo[rows])

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"ngrams.history": self.history, "ngrams.entries": self.entries}
        return tensors | ({"ngrams.undo": self.undo} if self.undo.shape[1] else {})

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """History (R,), entries (O, S) and undo (Y,) of one stream on the CPU, sharing memory."""
        return self.history[0].numpy(), self.entries[0].numpy(), self.undo[0].numpy()

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.entries.nbytes + self.undo.nbytes

    def about_words(self) -> tuple[Tensor, Tensor]:
        """Views (B, V) of `undo`: before the last step, and after it."""
        size = self.contexts.word_numbers
        return self.undo[:, 1 : 1 + size], self.undo[:, 1 + size : 1 + 2 * size]

    def replaced(self) -> Tensor:
        """View (B, O) of `undo`: the entries that the last step replaced."""
        return self.undo[:, 1 + 2 * self.contexts.word_numbers :]


def state_nbytes(contexts: Contexts) -> int:
    """Bytes of the state of one stream."""
    if not len(contexts):
        return 0
    entries = contexts.entry_dtype.itemsize * len(contexts) * contexts.slots
    return 8 * (HISTORY + contexts.undo_numbers) + entries


def _places(hashed: Any, slots: int) -> tuple[Any, Any]:
    """int64 hashes, tensors or arrays -> slots of the table, tags (1 to 2**23 - 1)."""
    mixed = (hashed ^ ((hashed >> 32) & 0xFFFFFFFF)) * MIX
    tags = ((mixed >> 16) & _TAGS) | 1
    return (mixed >> 42) & (slots - 1), tags


def _chain(entries: Any, tags: Any) -> Any:
    """What followed contexts with such tags, of their entries, int64, tensors or arrays: nine bits each, the
    latest lowest, the character and one, or zero for nothing; all zero where another context is held."""
    held = entries * (entries >> 8 & _TAGS == tags)
    return held >> _OLDER << 9 | (held & 255) + (held != 0)


def _characters(told: Tensor) -> Tensor:
    """Of nine bits as in a chain; a state from a damaged file may hold some that are no character's."""
    return torch.where((told == 0) | (told > NOTHING), NOTHING, told - 1)


def _pushed(entries: Any, tags: Any, characters: Any, ranks: int) -> Any:
    """Entries, int64, after a context with such tags was followed by such characters."""
    kept = (1 << 9 * (ranks - 1)) - 1
    return (_chain(entries, tags) & kept) << _OLDER | tags << 8 | characters


def hashes(text: Tensor, order: int) -> Tensor:
    """text (B, X) int64 -> of the `order` characters that end at each place; too short ones are arbitrary.

    A string's hash follows from those of its halves, so that few passes over the text make it.
    """

    def before(x: Tensor, by: int) -> Tensor:
        return torch.nn.functional.pad(x, (by, 0))[:, : x.shape[1]]

    part, length = text, 1  # hashes of 1, 2, 4 .. characters
    whole, done = None, 0
    while True:
        if order & length:
            factor = _signed(pow(BASE, done, 1 << 64))
            whole = part if whole is None else whole + factor * before(part, done)
            done += length
        if done == order:
            assert whole is not None
            return whole
        part = part + _signed(pow(BASE, length, 1 << 64)) * before(part, length)
        length *= 2


def _word_hashes(numbers: Any, words: int) -> list[Any]:
    """numbers (..., V) about words -> (...) each, of the token so far and none, one .. words before it."""
    found = [numbers[..., 0]]
    for before in range(words - 1):
        hashed = found[-1]
        found.append((hashed ^ ((hashed >> 29) & 0x7FFFFFFFF)) * MIX + numbers[..., 2 + before])
    return found


def _next_word_numbers(ids: Tensor, numbers: Tensor) -> Tensor:
    """numbers (B, V) about words, before characters ids (B,) -> those after them."""
    kind = _letters(ids.device)[ids]
    same = kind == numbers[:, 1]
    ended = (~same & (numbers[:, 1] == 1))[:, None]
    before = torch.where(ended, torch.cat([numbers[:, :1], numbers[:, 2:]], 1)[:, :-1], numbers[:, 2:])
    hashed = torch.where(same, numbers[:, 0] * BASE, 0) + ids + 1
    return torch.cat([hashed[:, None], kind[:, None], before], 1)


def _word_numbers(ids: Tensor, numbers: Tensor) -> Tensor:
    """numbers (B, V) about words, before texts ids (B, T) -> (B, T + 1, V), before and after each."""
    chars, most = ids.shape[1], numbers.shape[1] - 2
    kinds = torch.cat([numbers[:, 1:2], _letters(ids.device)[ids]], 1)
    starts = kinds[:, 1:] != kinds[:, :-1]
    here = torch.arange(chars, device=ids.device).expand_as(ids)
    start = torch.where(starts, here, -1).cummax(1).values  # of the token that each is in, -1 before the text
    # The hash of characters a..b is the difference of two sums, brought to one power of the base.
    up, down = _base_powers(1 << chars.bit_length(), ids.device)
    sums = torch.nn.functional.pad(((ids + 1) * down[:chars]).cumsum(1), (1, 0))
    hashed = (sums[:, 1:] - sums.gather(1, start.clamp(min=0))) * up[:chars]
    hashed = hashed + torch.where(start < 0, numbers[:, :1] * up[1 : chars + 1], 0)
    hashed = torch.cat([numbers[:, :1], hashed], 1)
    # The words one after the other, those of before first; what ends no word goes to the last place.
    ended = starts & (kinds[:, :-1] == 1)
    count = torch.nn.functional.pad(ended.cumsum(1), (1, 0))
    every = torch.cat([numbers[:, 2:].flip(1), numbers.new_zeros(len(ids), chars + 1)], 1)
    every.scatter_(1, torch.where(ended, most + count[:, :-1], most + chars), hashed[:, :-1])
    before = [every.gather(1, most + count - back) for back in range(1, most + 1)]
    return torch.stack([hashed, kinds, *before], -1)


@cache
def _letters(device: torch.device) -> Tensor:
    """(256,) int64: 1 for the characters of words."""
    return torch.from_numpy(_LETTERS).long().to(device)


@cache
def _base_powers(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(length,) int64: the powers of the base from 0 on, and their inverses."""
    up, down = (
        np.cumprod(np.array([1] + [base] * (length - 1), dtype=np.uint64)).view(np.int64)
        for base in (BASE, pow(BASE, -1, 1 << 64))
    )
    return torch.from_numpy(up).to(device), torch.from_numpy(down).to(device)


@torch.no_grad()
def followers(ids: Tensor, contexts: Contexts, state: NgramState | None = None, position: int = 0) -> Tensor:
    """Of texts, or of the characters `position`.. of streams, whose state is brought up to date.

    ids (B, T) int64 -> (B, T, O * K) int64, what followed the contexts that end with each, or NOTHING.
    """
    batch, chars = ids.shape
    device, slots, ranks = ids.device, contexts.slots, contexts.ranks
    if state is None:
        tail = ids.new_zeros(batch, HISTORY)
        numbers = ids.new_zeros(batch, contexts.word_numbers)
    else:
        _take_back(state, position)
        tail = state.history[:, torch.arange(position, position + HISTORY, device=device) % HISTORY]
        numbers = state.about_words()[1] * (position > 0)
    # Contexts 0..T of a row: number j ends before the character ids[:, j].
    text = torch.cat([tail, ids], 1)
    hashed = [hashes(text, order)[:, HISTORY - 1 :] for order in contexts.orders]
    if contexts.words:
        through = _word_numbers(ids, numbers)  # (B, T + 1, V)
        hashed += _word_hashes(through, contexts.words)
    number = torch.arange(chars + 1, device=device).expand(batch, -1)
    row = torch.arange(batch, device=device)[:, None]
    here = torch.arange(batch * (chars + 1), device=device)
    found = []
    for o, least in enumerate(contexts.least):
        places, tags = _places(hashed[o], slots)  # (B, T + 1)
        whole = position + number >= least
        keys = torch.where(whole, places + slots * row, slots * batch).flatten()
        keys, at = keys.sort(stable=True)  # of each slot the contexts in their order
        tag, followed = tags.flatten()[at], torch.nn.functional.pad(ids, (0, 1)).flatten()[at]
        meets = torch.nn.functional.pad(keys[1:] != keys[:-1], (1, 0), value=True)
        other = meets | torch.nn.functional.pad(tag[1:] != tag[:-1], (1, 0), value=True)
        first = torch.where(other, here, 0).cummax(0).values  # where the same context began to stand
        earlier = here - first
        held = torch.zeros_like(keys)
        if state is not None:
            key = keys.clamp(max=slots * batch - 1)
            held = state.entries[key // slots, o, key % slots].long()
            held = torch.where(meets[first], held, 0)  # the first of a slot goes on from what it held
        chain = _chain(held, tag)
        told = [  # the character and one, or zero
            torch.where(
                rank < earlier,
                followed[(here - 1 - rank).clamp(min=0)] + 1,
                chain >> (9 * (rank - earlier)).clamp(min=0) & 511,
            )
            for rank in range(ranks)
        ]
        known = torch.empty(len(at), ranks, dtype=torch.int64, device=device)
        known[at] = torch.stack(told, 1)
        found.append(_characters(known.view(batch, -1, ranks) * whole[..., None])[:, 1:])
        if state is not None:
            # The last context of a row has no follower yet.
            open_ended = number.flatten()[at] == chars
            last = torch.nn.functional.pad(meets[1:] | open_ended[1:], (0, 1), value=True)
            writes = last & ~open_ended & (keys < slots * batch)
            entry = tag << 8 | followed
            for rank, older in enumerate(told[: ranks - 1]):
                entry = entry | older << _OLDER + 9 * rank
            key = keys[writes]
            state.entries[key // slots, o, key % slots] = entry[writes].to(state.entries.dtype)
    if state is not None:
        kept_chars = min(chars, HISTORY)
        where = torch.arange(position + chars - kept_chars, position + chars, device=device) % HISTORY
        state.history[:, where] = ids[:, chars - kept_chars :]
        if state.undo.shape[1]:  # what is read is not repeated
            state.undo.zero_()
            state.undo[:, 0] = -1
            if contexts.words:
                state.about_words()[1].copy_(through[:, -1])
    return torch.cat(found, -1)


def _take_back(state: NgramState, position: int) -> None:
    """Undo the last step of the streams whose last step was at `position`."""
    if not state.undo.shape[1]:
        return
    again = state.undo[:, 0] == position
    before, after = state.about_words()
    numbers = torch.where(again[:, None], before, after)
    positions = torch.full_like(state.undo[:, 0], position)
    places, _, whole = _at(_before(state, positions), numbers * (position > 0), state, positions)
    held = state.entries.gather(2, places[..., None])
    kept = state.replaced()[..., None].to(held.dtype)
    state.entries.scatter_(2, places[..., None], torch.where((again[:, None] & whole)[..., None], kept, held))
    after.copy_(numbers)


def _before(state: NgramState, positions: Tensor) -> Tensor:
    """(B, R - 1): the characters before each position, the latest first."""
    back = on_device(state.contexts, positions.device)[2]
    return state.history.gather(1, (positions[:, None] - 1 - back) % HISTORY)


def _at(latest: Tensor, numbers: Tensor, state: NgramState, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """latest (B, R or less) characters, the latest first, numbers about words, and how many characters were
    read in all (B,) -> slots, tags and whether it is whole, of each context that ends there (B, O)."""
    factors, least, _ = on_device(state.contexts, latest.device)
    hashed = (latest[:, None] * factors[:, : latest.shape[1]]).sum(2)
    if state.contexts.words:
        hashed = torch.cat([hashed, torch.stack(_word_hashes(numbers, state.contexts.words), 1)], 1)
    return *_places(hashed, state.contexts.slots), count[:, None] >= least


@cache
def on_device(contexts: Contexts, device: torch.device) -> tuple[Tensor, ...]:
    """Factors of the n-grams (n of them, R), what each context has at least (O,) and 0 .. R - 2."""
    factors = torch.tensor([powers(order) for order in contexts.orders], device=device, dtype=torch.int64)
    least = torch.tensor(contexts.least, device=device)
    return factors.view(-1, HISTORY), least, torch.arange(HISTORY - 1, device=device)


@torch.no_grad()
def step(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """One character of each stream, which may stand apart: ids and positions (B,) int64 -> (B, O * K) int64.

    A step that is repeated at its position, with another character too, replaces the one before.
    """
    contexts, entries = state.contexts, state.entries
    latest = _before(state, positions)
    before, after = state.about_words()
    numbers = after
    if state.undo.shape[1]:
        again = (state.undo[:, 0] == positions)[:, None]
        numbers = torch.where(again, before, after) * (positions > 0)[:, None]
    places, tags, whole = _at(latest, numbers, state, positions)
    held = entries.gather(2, places[..., None])[..., 0].long()
    if state.undo.shape[1]:
        held = torch.where(again, state.replaced(), held)
        state.undo[:, 0] = positions
        state.replaced().copy_(held)
        before.copy_(numbers)
        if contexts.words:
            numbers = _next_word_numbers(ids, numbers)
            after.copy_(numbers)
    entry = torch.where(whole, _pushed(held, tags, ids[:, None], contexts.ranks), held)
    entries.scatter_(2, places[..., None], entry[..., None].to(entries.dtype))
    state.history.scatter_(1, (positions % HISTORY)[:, None], ids[:, None])
    places, tags, whole = _at(torch.cat([ids[:, None], latest], 1), numbers, state, positions + 1)
    chain = _chain(entries.gather(2, places[..., None])[..., 0].long(), tags) * whole
    return _characters(chain[..., None] >> 9 * torch.arange(contexts.ranks, device=ids.device) & 511).flatten(
        1
    )


@cache
def _numbers(contexts: Contexts) -> tuple[npt.NDArray[Any], ...]:
    """Factors (n of them, R), what contexts have at least (O,), their numbers and the bits of each rank."""
    factors = np.array([powers(order) for order in contexts.orders], dtype=np.int64).reshape(-1, HISTORY)
    return factors, np.array(contexts.least), np.arange(len(contexts)), 9 * np.arange(contexts.ranks)


_BACK = np.arange(HISTORY - 1)


def step_numpy(
    character: int,
    position: int,
    contexts: Contexts,
    history: npt.NDArray[Any],
    entries: npt.NDArray[Any],
    undo: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """`step` of one stream: history (R,), entries (O, S), undo (Y,) -> (O * K,) int64."""
    factors, least, every, shifts = _numbers(contexts)
    size = contexts.word_numbers
    again = len(undo) and undo[0] == position
    numbers = undo[1 : 1 + size].copy() if again else undo[1 + size : 1 + 2 * size] * (position > 0)

    def at(latest: npt.NDArray[Any]) -> tuple[Any, Any]:
        hashed = (factors[:, : len(latest)] * latest).sum(1)
        if contexts.words:
            hashed = np.concatenate([hashed, *_word_hashes(numbers[None], contexts.words)])
        return _places(hashed, contexts.slots)

    before = history[(position - 1 - _BACK) % HISTORY]
    places, tags = at(before)
    held = entries[every, places].astype(np.int64)
    if len(undo):
        held = undo[1 + 2 * size :].copy() if again else held
        undo[0] = position
        undo[1 : 1 + size] = numbers
        undo[1 + 2 * size :] = held
        if contexts.words:
            numbers = _next_word_numbers_numpy(character, numbers)
            undo[1 + size : 1 + 2 * size] = numbers
    entry = np.where(least <= position, _pushed(held, tags, character, contexts.ranks), held)
    entries[every, places] = entry
    history[position % HISTORY] = character
    places, tags = at(np.concatenate([[character], before]))
    chain = _chain(entries[every, places].astype(np.int64), tags) * (least <= position + 1)
    told = (chain[:, None] >> shifts & 511).ravel()
    return np.where((told == 0) | (told > NOTHING), NOTHING, told - 1)


def _next_word_numbers_numpy(character: int, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind = int(_LETTERS[character])
    found = numbers.copy()
    if numbers[1] == kind:
        found[:1] *= BASE
    else:
        found[0] = 0
        if numbers[1]:
            found[3:], found[2:3] = numbers[2:-1], numbers[0]
    found[0] += character + 1
    found[1] = kind
    return found
