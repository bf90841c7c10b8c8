"""The chunks of a layer that later chunks may still read: whole, forked from another stream, or in 8 bits.

A ring serves the step through its `window`, a tensor whose slot `c mod slots` is the chunk c in progress and
the slot after that, around the end, its partner; and prefill through `read` and `write`, chunks at once.

Shapes: a chunk is (..., L, X), several are (..., C, L, X): (B, K, C, L, D) keys, (B, C, L, M) carry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _spans(chunks: Sequence[int], slots: int) -> list[tuple[int, int]]:
    """Where chunks lie, as (first slot, number of slots). No index tensor, for which a GPU would wait."""
    if chunks[-1] - chunks[0] == len(chunks) - 1:
        start = chunks[0] % slots
        count = min(len(chunks), slots - start)
        return [(start, count), (0, len(chunks) - count)][: 1 + (count < len(chunks))]
    spans: list[tuple[int, int]] = []
    for slot in (c % slots for c in chunks):
        if spans and slot == sum(spans[-1]):
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((slot, 1))
    return spans


def _take(x: Tensor, chunks: Sequence[int]) -> Tensor:
    """Chunks out of the slots x (..., S, L, X)."""
    parts = [x.narrow(-3, *span) for span in _spans(chunks, x.shape[-3])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -3)


def _put(slots: Tensor, first: int, x: Tensor) -> None:
    """Chunks first.. x (..., C, L, X) into their slots, of more than there are slots the last."""
    count = min(x.shape[-3], slots.shape[-3])
    stop, done = first + x.shape[-3], x.shape[-3] - count
    for start, length in _spans(range(stop - count, stop), slots.shape[-3]):
        slots.narrow(-3, start, length).copy_(x.narrow(-3, done, length))
        done += length


class Ring:
    """All chunks in one tensor of S = max(stride, local) + 1 slots, chunk c in slot c mod S; so a partner
    that is no local chunk is next to it."""

    def __init__(self, window: Tensor) -> None:
        self.window = window  # (..., S, L, X)

    @property
    def nbytes(self) -> int:
        """Bytes when full, of this stream alone."""
        return self.window.nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes held beside the window."""
        return 0

    def parts(self) -> dict[str, Tensor]:
        """All tensors by a suffix of their names."""
        return {"": self.window}

    def clone(self) -> Ring:
        return Ring(self.window.clone())

    def seek(self, position: int, chunk_size: int) -> None:
        """Stand at `position`, characters, as after reading so many."""

    def begin(self, chunk: int) -> None:
        """Make ready for the first character of `chunk`."""

    def read(self, chunks: Sequence[int]) -> Tensor:
        """Chunks by their number, ascending -> (..., C, L, X), a view where they lie side by side.

        They must be among the last of so many as there are slots.
        """
        return _take(self.window, chunks)

    def slots_of(self, chunks: range) -> tuple[Tensor, int]:
        """A tensor (..., S, L, X) that holds `chunks`, and the turn: c lies in slot (c + turn) mod S."""
        return self.window, 0

    def needed(self, chunks: int) -> int:
        """How many of so many new chunks, the last ones, `write` wants."""
        return min(chunks, self.window.shape[-3])

    def write(self, first: int, x: Tensor) -> None:
        """Put chunks first.. x (..., C, L, X); the last one may be unfinished."""
        _put(self.window, first, x)


class WindowRing(Ring):
    """A window of the chunk in progress, those just before it that are read too, and its partner, if that is
    none of them; finished chunks lie elsewhere, as many as are read from here on."""

    def __init__(self, window: Tensor, stride: int, finished: int, local: int = 0) -> None:
        super().__init__(window)
        self.stride = stride
        self.local = local
        self.kept = max(stride, local)  # finished chunks
        self.finished = finished  # chunks below this one are not in the window, or no more than copies

    @property
    def slots(self) -> int:
        return self.window.shape[-3]

    def load(self, chunks: Sequence[int]) -> Tensor:
        """Finished chunks -> (..., C, L, X)."""
        raise NotImplementedError

    def save(self, first: int, x: Tensor) -> None:
        """Finished chunks first.. x (..., C, L, X), of which the last `kept` are needed."""
        raise NotImplementedError

    def seek(self, position: int, chunk_size: int) -> None:
        self.finished = max(0, -(-position // chunk_size) - 1)

    def begin(self, chunk: int) -> None:
        if self.finished < chunk:
            self.save(chunk - 1, self.window[..., (chunk - 1) % self.slots, None, :, :])
            self.finished = chunk
        self._fetch(chunk)

    def _fetch(self, chunk: int) -> None:
        """What is read beside `chunk`."""
        wanted = {chunk - back: (chunk - back) % self.slots for back in range(1, self.local + 1)}
        if self.stride > self.local:
            wanted[chunk - self.stride] = (chunk + 1) % self.slots
        for other, slot in wanted.items():
            if other >= 0:
                self.window[..., slot, :, :] = self.load([other])[..., 0, :, :]

    def slots_of(self, chunks: range) -> tuple[Tensor, int]:
        return (self.read(chunks), -chunks.start) if chunks else (self.window, 0)

    def needed(self, chunks: int) -> int:
        return chunks

    def read(self, chunks: Sequence[int]) -> Tensor:
        past = [c for c in chunks if c < self.finished]
        parts = [self.load(past)] if past else []
        if len(past) < len(chunks):  # the one in progress
            parts.append(self.window[..., chunks[-1] % self.slots, None, :, :])
        return torch.cat(parts, -3) if len(parts) > 1 else parts[0]

    def write(self, first: int, x: Tensor) -> None:
        last = first + x.shape[-3] - 1
        if self.finished < first:
            self.begin(first)
        if last > first:
            self.save(first, x[..., :-1, :, :])
            self.finished = last
            self._fetch(last)
        self.window[..., last % self.slots, :, :] = x[..., -1, :, :]


class ForkedRing(WindowRing):
    """The past of another ring, which is not written to any more, and the chunks finished since."""

    def __init__(self, base: Ring, window: Tensor, stride: int, finished: int, local: int = 0) -> None:
        super().__init__(window, stride, finished, local)
        self.base = base
        self.first = finished
        self.own: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return self.window.nbytes // self.slots * (self.kept + self.slots)

    @property
    def held_nbytes(self) -> int:
        return sum(x.nbytes for x in self.own.values())

    def clone(self) -> ForkedRing:
        ring = ForkedRing(self.base, self.window.clone(), self.stride, self.first, self.local)
        ring.finished, ring.own = self.finished, dict(self.own)  # finished chunks are never changed
        return ring

    def load(self, chunks: Sequence[int]) -> Tensor:
        shared = [c for c in chunks if c < self.first]
        parts = [self.base.read(shared).to(self.window.dtype)] if shared else []
        parts += [self.own[c].unsqueeze(-3) for c in chunks if c >= self.first]
        return torch.cat(parts, -3)

    def save(self, first: int, x: Tensor) -> None:
        for i in range(max(0, x.shape[-3] - self.kept), x.shape[-3]):
            self.own[first + i] = x[..., i, :, :].to(self.window.dtype, copy=True)
        oldest = first + x.shape[-3] - self.kept
        self.own = {c: chunk for c, chunk in self.own.items() if c >= oldest}


class QuantisedRing(WindowRing):
    """Finished chunks in 8 bits, each row with a scale of its own; the window is not quantised.

    scores: columns at the front of a row that have a second scale, as they are of another size.
    """

    def __init__(self, window: Tensor, stride: int, scores: int = 0, local: int = 0) -> None:
        super().__init__(window, stride, 0, local)
        *lead, _, rows, width = window.shape
        self.scores = scores
        self.parts_of_row = [scores, width - scores] if scores else [width]
        # The chunk in progress needs none: it is in the window.
        self.codes = torch.zeros(*lead, self.kept, rows, width, dtype=torch.int8, device=window.device)
        scales = (*lead, self.kept, rows, len(self.parts_of_row))
        self.scale = torch.zeros(scales, dtype=torch.float32, device=window.device)

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + self.held_nbytes

    @property
    def held_nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def parts(self) -> dict[str, Tensor]:
        return {".window": self.window, ".codes": self.codes, ".scale": self.scale}

    def clone(self) -> QuantisedRing:
        ring = QuantisedRing(self.window.clone(), self.stride, self.scores, self.local)
        ring.codes.copy_(self.codes)
        ring.scale.copy_(self.scale)
        ring.finished = self.finished
        return ring

    def _spread(self, scale: Tensor) -> Tensor:
        """A scale for each part of a row -> one for each column, or for all."""
        if len(self.parts_of_row) == 1:
            return scale
        columns = zip(torch.split(scale, 1, -1), self.parts_of_row, strict=True)
        return torch.cat([part.expand(*part.shape[:-1], count) for part, count in columns], -1)

    def load(self, chunks: Sequence[int]) -> Tensor:
        return (_take(self.codes, chunks) * self._spread(_take(self.scale, chunks))).to(self.window.dtype)

    def save(self, first: int, x: Tensor) -> None:
        kept = x[..., -self.kept :, :, :].float()
        first += x.shape[-3] - kept.shape[-3]
        parts = torch.split(kept, self.parts_of_row, -1)
        scale = torch.cat([part.abs().amax(-1, keepdim=True) for part in parts], -1) / 127
        steps = self._spread(scale).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (kept / steps).round().to(torch.int8)
        _put(self.codes, first, codes)
        _put(self.scale, first, scale)
