"""How the states of many streams are kept, and how all streams take one step together.

    stepper = stepper_for(model, slots=8)
    cache = stepper.fresh(None, keep=False, reserved=0)
    stepper.read(b"def ", cache)
    logits = stepper.step([97], [cache])      # any streams, wherever each of them stands

`Separate` gives each stream a cache of its own and steps them in NumPy: on the CPU in float32. `Slots` keeps
the rings of all streams in one allocation, a row each, and steps all rows at once with a `Decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.cache import Cache, cache_nbytes
from butterfly_llm.decode import Decoder
from butterfly_llm.model import Butterfly

MEMORY_ADVICE = "wait for other streams to end, delete contexts, or start the server with fewer --slots"


class Stepper(Protocol):
    """All that the engine asks of a model."""

    model: Butterfly
    device: torch.device
    nbytes: int  # bytes of the full state of a stream

    def fresh(self, base: Cache | None, *, keep: bool, reserved: int) -> Cache:
        """An empty state, or one that goes on from `base`; to write with, or to `keep` as a context.

        ValueError when it does not fit into memory beside `reserved` bytes that others will still claim.
        """

    def release(self, cache: Cache) -> None:
        """A state from `fresh` is needed no more."""

    def read(self, characters: bytes, cache: Cache) -> Tensor:
        """Append characters -> logits (1, V)."""

    def step(
        self, characters: Sequence[int], caches: Sequence[Cache], shares: Sequence[list[float]] | None = None
    ) -> Tensor:
        """Append a character to each of B streams -> logits (B, V). May be repeated when it failed.

        shares: a list for each stream, which gets for each layer the part of the attention that goes to the
        own chunk; the rest goes to the partner and local chunks.
        """


class Separate:
    """Every stream has a cache of its own, whose memory is free when it has left."""

    def __init__(self, model: Butterfly) -> None:
        if not model.config.causal:
            raise ValueError("a bidirectional model (routing xor) cannot write")
        self.model = model
        self.device = model.embed.weight.device
        self.nbytes = cache_nbytes(model.config, 1, model.compute_dtype)

    def fresh(self, base: Cache | None, *, keep: bool, reserved: int) -> Cache:
        what = "one more stream beside those that run" if reserved else "one more stream"
        memory.require(self.nbytes + reserved, str(self.device), what, MEMORY_ADVICE)
        return self.model.new_cache(1) if base is None else base.fork(1)[0]

    def release(self, cache: Cache) -> None:
        """Its memory is free when the last one lets go of it."""

    def read(self, characters: bytes, cache: Cache) -> Tensor:
        ids = torch.frombuffer(bytearray(characters), dtype=torch.uint8)[None]
        return self.model.prefill(ids.to(self.device), cache)

    def step(
        self, characters: Sequence[int], caches: Sequence[Cache], shares: Sequence[list[float]] | None = None
    ) -> Tensor:
        return self.model.step_streams(characters, caches, shares)


class Slots(Separate):
    """Rings for `count` writing streams, made once; a context is kept outside of them."""

    def __init__(self, model: Butterfly, count: int) -> None:
        super().__init__(model)
        self._rings = model.new_cache(count)
        self._rows: list[Cache | None] = [None] * count
        self._decoder = Decoder(model, self._rings)

    def fresh(self, base: Cache | None, *, keep: bool, reserved: int) -> Cache:
        if keep:
            return super().fresh(base, keep=keep, reserved=reserved)
        row = self._rows.index(None)
        rings = self._rings
        cache = Cache(
            rings.config,
            0,
            [keys[row : row + 1] for keys in rings.keys],
            [values[row : row + 1] for values in rings.values],
            [None if carry is None else carry[row : row + 1].zero_() for carry in rings.carries],
            None if rings.ngrams is None else rings.ngrams.rows(slice(row, row + 1)),
        )
        if cache.ngrams is not None:
            for held in cache.ngrams.tensors().values():
                held.zero_()
        if base is not None:
            cache.position = base.position
            for (_, own), (_, other) in zip(cache.filled(), base.filled(), strict=False):  # logits come last
                own.copy_(other)
        self._rows[row] = cache
        return cache

    def release(self, cache: Cache) -> None:
        self._rows = [None if row is cache else row for row in self._rows]

    def step(
        self, characters: Sequence[int], caches: Sequence[Cache], shares: Sequence[list[float]] | None = None
    ) -> Tensor:
        """All rows take part, so that no shape depends on who writes; only those of `caches` go on."""
        rows = [next(i for i, row in enumerate(self._rows) if row is cache) for cache in caches]
        ids = [0] * len(self._rows)
        for row, character in zip(rows, characters, strict=True):
            ids[row] = character
        positions = [0 if cache is None else cache.position for cache in self._rows]
        at = torch.tensor([ids, positions], device=self.device)
        if shares is None:
            logits = self._decoder.step(at[0], at[1])[rows]
        else:
            seen: list[Tensor] = []
            logits = self.model.step_each(at[0], at[1], self._rings, seen)[rows]
            for share, row in zip(shares, torch.stack(seen, 1)[rows].tolist(), strict=True):
                share += row
        for i, cache in enumerate(caches):
            cache.position += 1
            cache.logits = logits[i : i + 1]
        return logits


def stepper_for(model: Butterfly, slots: int) -> Stepper:
    """The faster of the two; ValueError, before anything is read, where the rings of all slots do not fit."""
    in_numpy = model.embed.weight.device.type == "cpu" and model.compute_dtype == torch.float32
    return Separate(model) if in_numpy else Slots(model, slots)
