"""The state of a stream: per layer a ring of the last stride + 1 chunks of keys, values and carry.

The size is fixed by the schedule, not by how much has been read. Pages of the rings are committed by the
operating system when they are first written, so memory grows until the rings are full and then stays.
A state can be forked: several streams then go on from one past, and keep of their own what they add.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ngrams import Contexts, NgramState, state_nbytes
from butterfly_llm.rings import ForkedRing, QuantisedRing, Ring
from butterfly_llm.routing import LayerRoute, schedule

Layers = list[tuple[Ring, Ring, Ring | None]]
Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]


def routes_of(config: ButterflyConfig) -> tuple[LayerRoute, ...]:
    return schedule(
        config.num_local_layers, config.pass_levels, config.num_extra_levels, config.num_refine_layers
    )


def _window_slots(stride: int, local: int) -> int:
    """Of a window: the own chunk, the local ones, and the partner if it is none of them."""
    return 1 + local + (stride > local)


def cache_nbytes(config: ButterflyConfig, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a full cache; with torch.int8 without the chunks of each window that are not quantised."""
    rows, values = 0, 0
    for route in routes_of(config):
        carried = route.stage == "butterfly" and config.carry_size > 0
        chars = (max(route.stride, config.local_of(route.index)) + 1) * config.chunk_size
        lanes = carried * (route.stride + 1) * config.chunk_size
        rows += chars * 2 * config.num_kv_heads + lanes * (2 if config.carry_heads else 1)
        values += chars * 2 * config.num_kv_heads * config.head_dim + lanes * config.carry_width
    scales = 4 * rows if dtype == torch.int8 else 0
    ngrams = state_nbytes(Contexts.of(config))
    return batch_size * (values * dtype.itemsize + scales + ngrams)


def prefill_slice(config: ButterflyConfig, batch_size: int, value_bytes: int, device: str) -> int:
    """Characters to read at once: a CPU wants few, a GPU as many as it has room for.

    On a GPU a power of two chunks whose workspace is an eighth of the free memory at most, up to 262,144.
    """
    if not device.startswith("cuda"):
        return 16 * config.chunk_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    values = 6 * config.hidden_size + 4 * heads + 3 * config.intermediate_size + 8 * config.carry_size
    free = memory.available_bytes(device) or 0
    fits = free // 8 // (batch_size * values * value_bytes)
    size = 16 * config.chunk_size
    while 2 * size <= min(fits, 262_144):
        size *= 2
    return size


@dataclass
class Cache:
    """B streams at one common position. S = stride + 1 slots (`Ring`), chunk c in slot c mod S.

    In a forked state and in one of 8 bits, keys, values and carries are windows on `paged` of S = 2 slots,
    more where local chunks are read.
    """

    config: ButterflyConfig
    position: int  # characters read so far
    keys: list[Tensor]  # per layer (B, Hkv, S, L, D), normalised and rotated by the offset in the chunk
    values: list[Tensor]  # per layer (B, Hkv, S, L, D)
    carries: list[Tensor | None]  # per layer (B, S, L, M) for butterfly layers with a carry, before the merge
    ngrams: NgramState | None = None  # for a model that is told what followed before
    logits: Tensor | None = None  # (B, 256) float32 for the next character, once something is read
    recent: bytes = b""  # the last characters of a single stream, as far as `generate` has read them
    paged: Layers | None = None
    forked: bool = False  # others go on from here, so nothing may be written any more
    _borrows: bool = field(default=False, repr=False, compare=False)  # windows of other forks too
    _arrays: list[Arrays] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def new(
        cls,
        config: ButterflyConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window_dtype: torch.dtype = torch.float32,
    ) -> Cache:
        """An empty state. dtype torch.int8: finished chunks in 8 bits, the others in `window_dtype`."""
        if not config.causal:
            raise ValueError("a bidirectional model (routing xor) cannot stream: use forward")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        memory.require(
            cache_nbytes(config, batch_size, dtype),
            str(device),
            f"the state of {batch_size} stream(s)",
            "use fewer streams, fewer key-value heads, fewer levels, or rings in bfloat16 or int8",
        )
        layers: Layers = []
        for route in routes_of(config):

            def ring(*shape: int, stride: int = route.stride, scores: int = 0, local: int = 0) -> Ring:
                """A ring of chunks (..., L, X)."""
                slots = _window_slots(stride, local) if dtype == torch.int8 else max(stride, local) + 1
                kind = window_dtype if dtype == torch.int8 else dtype
                window = torch.zeros(*shape[:-2], slots, *shape[-2:], dtype=kind, device=device)
                return QuantisedRing(window, stride, scores, local) if dtype == torch.int8 else Ring(window)

            shape = (batch_size, config.num_kv_heads, config.chunk_size, config.head_dim)
            carried = route.stage == "butterfly" and config.carry_size > 0
            lanes = batch_size, config.chunk_size, config.carry_width
            carry = ring(*lanes, scores=config.carry_heads) if carried else None
            keys, values = (ring(*shape, local=config.local_of(route.index)) for _ in range(2))
            layers.append((keys, values, carry))
        cache = cls._of(config, 0, layers, paged=dtype == torch.int8)
        if config.num_contexts:
            cache.ngrams = NgramState.new(Contexts.of(config), batch_size, device)
        return cache

    @classmethod
    def _of(cls, config: ButterflyConfig, position: int, layers: Layers, *, paged: bool) -> Cache:
        cache = cls(config, position, [], [], [], paged=layers if paged else None)
        cache._show(layers)
        return cache

    def _show(self, layers: Layers) -> None:
        """Take the windows of `layers` for keys, values and carries."""
        self.keys = [keys.window for keys, _, _ in layers]
        self.values = [values.window for _, values, _ in layers]
        self.carries = [None if carry is None else carry.window for *_, carry in layers]
        self._arrays = None

    def rings(self) -> Layers:
        """Per layer the rings of keys, values and carry."""
        if self.paged is not None:
            return self.paged
        return [
            (Ring(keys), Ring(values), None if carry is None else Ring(carry))
            for keys, values, carry in self.windows()
        ]

    def windows(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Per layer what a step reads and writes: keys, values and carry."""
        return list(zip(self.keys, self.values, self.carries, strict=True))

    def begin(self) -> None:
        """Make ready to append at `position`; to be called before every read and step.

        ValueError where other streams go on from this state.
        """
        if self.forked:
            raise ValueError("this state was forked and cannot go on itself: continue one of its forks")
        if self.paged is None:
            return
        if self._borrows:
            for ring in self._all_rings():
                ring.window = ring.window.clone()
            if self.ngrams is not None:
                self.ngrams = self.ngrams.clone()
            self._borrows = False
            self._show(self.paged)
        chunk, offset = divmod(self.position, self.config.chunk_size)
        if offset == 0:
            for ring in self._all_rings():
                ring.begin(chunk)

    def fork(self, count: int) -> list[Cache]:
        """`count` streams that go on from here, each for itself; this one cannot go on any more.

        They share what was read so far and keep of their own the chunks they add: a fork costs nothing until
        it first goes on, then a window of two chunks a layer (more with local ones), and one more for each
        chunk finished (in the type of the windows, also where the past is in 8 bits).
        """
        if count < 1:
            raise ValueError(f"fork: count must be at least 1, not {count}")
        self.forked = True
        chunk, offset = divmod(self.position, self.config.chunk_size)

        def window(ring: Ring, stride: int, local: int) -> Tensor:
            *lead, _, rows, width = ring.window.shape
            slots = _window_slots(stride, local)
            window = ring.window.new_zeros(*lead, slots, rows, width)
            if offset:
                read = {chunk - back: (chunk - back) % slots for back in range(local + 1)}
                if stride > local:
                    read[chunk - stride] = (chunk + 1) % slots
                for number, slot in read.items():
                    if number >= 0:
                        window[..., slot, :, :] = ring.read([number])[..., 0, :, :]
            return window

        bases = [
            (ring, route.stride, 0 if kind == "carry" else self.config.local_of(route.index))
            for layer, route in zip(self.rings(), routes_of(self.config), strict=True)
            for kind, ring in zip(("keys", "values", "carry"), layer, strict=True)
        ]
        windows = [None if ring is None else window(ring, *reads) for ring, *reads in bases]
        forks = []
        for _ in range(count):
            rings = [
                None if ring is None or own is None else ForkedRing(ring, own, stride, chunk, local)
                for (ring, stride, local), own in zip(bases, windows, strict=True)
            ]
            layers = cast(Layers, list(zip(rings[::3], rings[1::3], rings[2::3], strict=True)))
            fork = Cache._of(self.config, self.position, layers, paged=True)
            fork.logits, fork.recent, fork._borrows = self.logits, self.recent, True
            fork.ngrams = self.ngrams
            forks.append(fork)
        return forks

    def _all_rings(self) -> list[Ring]:
        return [ring for layer in self.rings() for ring in layer if ring is not None]

    def arrays(self) -> list[Arrays]:
        """Per layer keys, values (K, S, L, D) and carry (S, L, M) of one CPU stream, sharing memory."""
        if self._arrays is None:
            self._arrays = [
                (k[0].numpy(), v[0].numpy(), None if c is None else c[0].numpy())
                for k, v, c in zip(self.keys, self.values, self.carries, strict=True)
            ]
        return self._arrays

    def filled(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the state: of each ring a view of the slots written to, and the logits."""
        chunks = -(-self.position // self.config.chunk_size)
        if self.paged is not None and isinstance(self.paged[0][0], ForkedRing):
            yield from self.gathered().filled()
            return
        for index, layer in enumerate(self.rings()):
            for name, ring in zip(("keys", "values", "carries"), layer, strict=True):
                if ring is not None and chunks:
                    for part, tensor in ring.parts().items():
                        filled = min(chunks, tensor.shape[-3])
                        yield f"{name}.{index}{part}", tensor.narrow(-3, 0, filled)
        if self.ngrams is not None and chunks:
            yield from self.ngrams.tensors().items()
        if self.logits is not None:
            yield "logits", self.logits

    def gathered(self) -> Cache:
        """A copy whose rings are whole and its own, in the type of the windows."""
        dtype, device = self.keys[0].dtype, self.keys[0].device
        cache = Cache.new(self.config, self.batch_size, dtype, device)
        stop = -(-self.position // self.config.chunk_size)
        for whole, own in zip(cache._all_rings(), self._all_rings(), strict=True):
            start = max(0, stop - whole.window.shape[-3])
            if start < stop:
                whole.write(start, own.read(range(start, stop)))
        cache.position, cache.logits, cache.recent = self.position, self.logits, self.recent
        cache.ngrams = None if self.ngrams is None else self.ngrams.clone()
        return cache

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *(carry for carry in self.carries if carry is not None)]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the rings when full and of the n-grams; of a fork, without the past that it shares."""
        return self._ngram_nbytes + sum(ring.nbytes for ring in self._all_rings())

    @property
    def _ngram_nbytes(self) -> int:
        return 0 if self.ngrams is None else self.ngrams.nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes that this stream holds by now, without what it shares with other forks."""
        windows = 0 if self._borrows else self._ngram_nbytes + sum(x.nbytes for x in self.tensors())
        return windows + sum(ring.held_nbytes for ring in self._all_rings())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the finished chunks."""
        ring = self.rings()[0][0]
        return torch.int8 if isinstance(ring, QuantisedRing) else ring.window.dtype

    def seek(self, position: int) -> None:
        """Stand at `position`, as a state does whose tensors are then filled in."""
        self.position = position
        for ring in self._all_rings():
            ring.seek(position, self.config.chunk_size)

    def clone(self) -> Cache:
        """An independent copy: the two streams may continue differently."""
        layers = [
            (keys.clone(), values.clone(), None if carry is None else carry.clone())
            for keys, values, carry in self.rings()
        ]
        cache = Cache._of(self.config, self.position, layers, paged=self.paged is not None)
        cache.logits, cache.recent = self.logits, self.recent
        cache.ngrams = None if self.ngrams is None else self.ngrams.clone()
        return cache
