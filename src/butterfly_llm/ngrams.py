"""What followed the last time: after each character, for each of several n, the character that came after the
latest earlier occurrence of the last n characters. An input of the model, beside the characters themselves.

This is what an induction head of full attention finds, as a lookup: the cost of a character does not depend
on how far back the passage stands. n-gram heads beside attention: E. Akyurek et al., "In-Context Language
Learning: Architectures and Algorithms", 2024; here the lookup is hashed, so that a stream keeps a table of
fixed size. A place of the table holds the newest n-gram that was hashed to it; another one that meets its
place is forgotten. Reading whole sequences, in parts and one by one gives the same characters, bit by bit.

Shapes: B streams, T characters, R characters of history, O values of n, S places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from butterfly_llm.config import MAX_ORDER

NOTHING = 256
"""In place of a character, where the last n characters did not stand before."""
HISTORY = MAX_ORDER + 1  # R
TAG_BITS = 23
_BASE = 0x5851F42D4C957F2D  # of the polynomial that is a string's hash
MIX = -0x61C8864680B583EB  # an odd number that spreads its bits


def _signed(value: int) -> int:
    """The int64 that has the lowest 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@cache
def powers(order: int) -> tuple[int, ...]:
    """What the last character, the one before it .. of `order` are multiplied by; zeros up to R."""
    factors = [_signed(pow(_BASE, i, 1 << 64)) for i in range(order)]
    return (*factors, *(0,) * (HISTORY - order))


@dataclass
class NgramState:
    """What streams have read: the last characters and, for each n, what followed the n-grams."""

    orders: tuple[int, ...]
    history: Tensor  # (B, R) int64, the character at position p in place p mod R
    entries: Tensor  # (B, O, S) int32, of a place: tag of the n-gram and what followed it; 0 for none

    @classmethod
    def new(
        cls, orders: tuple[int, ...], slots: int, batch_size: int, device: torch.device | str
    ) -> NgramState:
        history = torch.zeros(batch_size, HISTORY, dtype=torch.int64, device=device)
        entries = torch.zeros(batch_size, len(orders), slots, dtype=torch.int32, device=device)
        return cls(orders, history, entries)

    def clone(self) -> NgramState:
        return NgramState(self.orders, self.history.clone(), self.entries.clone())

    def rows(self, rows: slice | Tensor) -> NgramState:
        """Of some of the streams: a view for a slice, a copy for their numbers."""
        return NgramState(self.orders, self.history[rows], self.entries[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"ngrams.history": self.history, "ngrams.entries": self.entries}

    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """History (R,) and entries (O, S) of one stream on the CPU, sharing memory."""
        return self.history[0].numpy(), self.entries[0].numpy()

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.entries.nbytes


def state_nbytes(orders: Sequence[int], slots: int) -> int:
    """Bytes of the state of one stream."""
    return 8 * HISTORY + 4 * len(orders) * slots if orders else 0


def _places(hashed: Any, slots: int) -> tuple[Any, Any]:
    """int64 hashes, tensors or arrays -> places in the table, tags (1 to 2**23 - 1)."""
    mixed = (hashed ^ ((hashed >> 32) & 0xFFFFFFFF)) * MIX
    tags = ((mixed >> 16) & ((1 << TAG_BITS) - 1)) | 1
    return (mixed >> 42) & (slots - 1), tags


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
            factor = _signed(pow(_BASE, done, 1 << 64))
            whole = part if whole is None else whole + factor * before(part, done)
            done += length
        if done == order:
            assert whole is not None
            return whole
        part = part + _signed(pow(_BASE, length, 1 << 64)) * before(part, length)
        length *= 2


@torch.no_grad()
def followers(
    ids: Tensor,
    orders: tuple[int, ...],
    slots: int,
    state: NgramState | None = None,
    position: int = 0,
) -> Tensor:
    """Of texts, or of the characters `position`.. of streams, whose state is brought up to date.

    ids (B, T) int64 -> (B, T, O) int64, what followed the n characters that end with each, or NOTHING.
    """
    batch, chars = ids.shape
    device = ids.device
    if state is None:
        tail = ids.new_zeros(batch, HISTORY)
    else:
        tail = state.history[:, torch.arange(position, position + HISTORY, device=device) % HISTORY]
    # Contexts 0..T of a row: number j ends before the character ids[:, j].
    text = torch.cat([tail, ids], 1)
    number = torch.arange(chars + 1, device=device).expand(batch, -1)
    row = torch.arange(batch, device=device)[:, None]
    found = []
    for o, order in enumerate(orders):
        places, tags = _places(hashes(text, order)[:, HISTORY - 1 :], slots)  # (B, T + 1)
        whole = position + number >= order
        entries = torch.nn.functional.pad(tags[:, :chars] << 8 | ids, (0, 1)).flatten()
        keys = torch.where(whole, places + slots * row, slots * batch).flatten()
        keys, at = keys.sort(stable=True)  # of each place the contexts in their order
        repeats = keys[1:] == keys[:-1]
        latest = torch.full_like(at, -1).scatter_(0, at[1:], torch.where(repeats, at[:-1], -1))
        if state is None:
            held = torch.zeros_like(latest)
        else:
            held = state.entries[:, o].gather(1, places).flatten().long()
        entry = torch.where(latest < 0, held, entries[latest.clamp(min=0)]).view(batch, -1)
        known = (entry >> 8 == tags) & whole
        found.append(torch.where(known, entry & 255, NOTHING)[:, 1:])
        if state is not None:
            # The last context of a row has no follower yet.
            open_ended = number.flatten()[at] == chars
            last = torch.nn.functional.pad(~repeats | open_ended[1:], (0, 1), value=True)
            writes = last & ~open_ended & (keys < slots * batch)
            kept, key = entries[at[writes]].to(torch.int32), keys[writes]
            state.entries[key // slots, o, key % slots] = kept
    if state is not None:
        kept_chars = min(chars, HISTORY)
        where = torch.arange(position + chars - kept_chars, position + chars, device=device) % HISTORY
        state.history[:, where] = ids[:, chars - kept_chars :]
    return torch.stack(found, -1)


@cache
def on_device(orders: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Factors (O, R), orders (O,) and 0 .. R - 2."""
    factors = torch.tensor([powers(order) for order in orders], device=device)
    return factors, torch.tensor(orders, device=device), torch.arange(HISTORY - 1, device=device)


@torch.no_grad()
def step(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """One character of each stream, which may stand apart: ids and positions (B,) int64 -> (B, O) int64.

    A step that is repeated at its position, with another character too, replaces the one before.
    """
    history, entries = state.history, state.entries
    device, slots = ids.device, entries.shape[-1]
    factors, orders, back = on_device(state.orders, device)
    before = history.gather(1, (positions[:, None] - 1 - back) % HISTORY)  # the latest first
    places, tags = _places((before[:, None] * factors[:, :-1]).sum(2), slots)  # (B, O)
    places = places[..., None]
    held = entries.gather(2, places)
    followed = (tags << 8 | ids[:, None])[..., None].to(torch.int32)
    whole = (positions[:, None] >= orders)[..., None]
    entries.scatter_(2, places, torch.where(whole, followed, held))
    history.scatter_(1, (positions % HISTORY)[:, None], ids[:, None])
    now = torch.cat([ids[:, None], before], 1)
    places, tags = _places((now[:, None] * factors).sum(2), slots)
    entry = entries.gather(2, places[..., None])[..., 0].long()
    known = (entry >> 8 == tags) & (positions[:, None] + 1 >= orders)
    return torch.where(known, entry & 255, NOTHING)


@cache
def _numbers(orders: tuple[int, ...]) -> tuple[npt.NDArray[Any], ...]:
    """Factors (O, R), orders (O,) and their numbers."""
    return np.array([powers(order) for order in orders]), np.array(orders), np.arange(len(orders))


_BACK = np.arange(HISTORY - 1)


def step_numpy(
    character: int,
    position: int,
    orders: tuple[int, ...],
    history: npt.NDArray[Any],
    entries: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """`step` of one stream: history (R,), entries (O, S) -> (O,) int64."""
    slots = entries.shape[1]
    factors, lengths, every = _numbers(orders)
    before = history[(position - 1 - _BACK) % HISTORY]
    places, tags = _places((factors[:, :-1] * before).sum(1), slots)
    whole = lengths <= position
    entries[every[whole], places[whole]] = (tags << 8 | character)[whole]
    history[position % HISTORY] = character
    now = np.concatenate([[character], before])
    places, tags = _places((factors * now).sum(1), slots)
    entry = entries[every, places].astype(np.int64)
    return np.where((entry >> 8 == tags) & (lengths <= position + 1), entry & 255, NOTHING)
