"""Does far context help with real text? Bits per character of names that come back after a distance.

A name is an identifier of at least `min_chars` characters that occurs two to `max_count` times in a window.
Its first occurrence must be guessed; a later one could be copied. What a later one costs, by the distance to
the one before, says how far back the model finds what it has read. A model that cannot reach that far
pays about as much as for the first.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from butterfly_llm.corpus import SEPARATOR
from butterfly_llm.evaluate import Document, character_nats

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

DISTANCES = (512, 2048, 8192, 32_768, 131_072, 524_288)
"""Left edges of the buckets, characters; nearer ones are in a bucket from 0."""


@dataclass(frozen=True)
class Cost:
    """Bits per character over `chars` characters of `names` occurrences."""

    bits_per_char: float
    chars: int
    names: int


@dataclass(frozen=True)
class Repeats:
    """First occurrences, and later ones by the left edge of their distance bucket."""

    context: int
    first: Cost
    again: dict[int, Cost]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{'last seen':>20}{'bits/char':>11}{'names':>9}"
        yield f"{'never':>20}{self.first.bits_per_char:>11.3f}{self.first.names:>9,}"
        for edge, cost in self.again.items():
            yield f"{f'{edge:,}+ back':>20}{cost.bits_per_char:>11.3f}{cost.names:>9,}"


def occurrences(window: bytes, *, min_chars: int = 6, max_count: int = 8) -> Iterator[tuple[int, int, int]]:
    """(start, length, distance) of every occurrence of the names of a window; distance 0 for the first."""
    places: dict[bytes, list[int]] = {}
    for match in re.finditer(rb"[A-Za-z_][A-Za-z0-9_]{%d,}" % (min_chars - 1), window):
        places.setdefault(match.group(), []).append(match.start())
    for name, starts in places.items():
        if 2 <= len(starts) <= max_count:
            for before, start in zip([None, *starts[:-1]], starts, strict=True):
                yield start, len(name), 0 if before is None else start - before


def evaluate_repeats(
    model: Butterfly,
    documents: Sequence[Document],
    *,
    context: int,
    min_chars: int = 6,
    max_count: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Repeats:
    """What names cost in windows of `context` characters that do not overlap.

    `progress` is called with the number of characters read so far. ValueError for no name that repeats.
    """
    device = next(model.parameters()).device
    edges = (0, *DISTANCES)
    nats = [0.0] * (len(edges) + 1)  # the first occurrences, then a bucket for each left edge
    chars, names = [0] * len(nats), [0] * len(nats)
    done = 0
    for document in documents:
        for begin in range(0, len(document.data), context):
            window = document.data[begin : begin + context]
            before = document.data[begin - 1 : begin] or SEPARATOR
            ids = torch.frombuffer(bytearray(before + window), dtype=torch.uint8).to(device)
            costs = character_nats(model, ids[None, :-1], ids[None, 1:])[0].cumsum(0).tolist()
            for start, length, distance in occurrences(window, min_chars=min_chars, max_count=max_count):
                bucket = bisect_right(edges, distance) if distance else 0
                nats[bucket] += costs[start + length - 1] - (costs[start - 1] if start else 0.0)
                chars[bucket] += length
                names[bucket] += 1
            done += len(window)
            if progress is not None:
                progress(done)
    if not chars[0]:
        raise ValueError(
            f"repeats: no name of {min_chars} characters or more occurs twice in {context:,} characters"
        )
    costs_of = [
        Cost(total / math.log(2) / max(1, count), count, number)
        for total, count, number in zip(nats, chars, names, strict=True)
    ]
    again = {edge: cost for edge, cost in zip(edges, costs_of[1:], strict=True) if cost.names}
    return Repeats(context, costs_of[0], again)
