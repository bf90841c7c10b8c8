"""Which chunk reads which, layer by layer: pure integer functions, the only source of the schedule.

A sequence is cut into chunks. In each layer a chunk reads itself and at most one other chunk, its
partner. `Topology` says how the partner of chunk c at stride s = 2**level is found:

- shift:      c - s, if there is one. The causal language model; the butterfly of a prefix scan.
- xor:        c XOR s, on either side. The bidirectional hypercube, for encoders.
- xor_causal: c XOR s, only when that is an earlier chunk. Kept for ablation: however many passes are
  made, chunk c hears only the ids whose bits are a subset of its own (design, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Topology = Literal["shift", "xor", "xor_causal"]
Stage = Literal["local", "butterfly", "refine"]


def partner_of(chunk: int, stride: int, topology: Topology) -> int:
    """Partner of `chunk` at `stride` chunks, or -1 if it has none. An xor partner may lie beyond the end."""
    if topology == "shift":
        return chunk - stride if chunk >= stride else -1
    partner = chunk ^ stride
    return partner if topology == "xor" or partner < chunk else -1


@dataclass(frozen=True)
class LayerRoute:
    """Where one layer sits in the schedule."""

    index: int  # layer index in the whole model
    stage: Stage
    stride: int  # partner distance, chunks
    level: int  # log2(stride)
    pass_index: int  # butterfly pass, -1 outside the butterfly stage
    starts_pass: bool  # first layer of a pass: the carry is written here
    ends_pass: bool  # last level of a whole pass: the carry scan is finished after this layer


def schedule(
    num_local_layers: int, pass_levels: Sequence[int], num_extra_levels: int, num_refine_layers: int
) -> tuple[LayerRoute, ...]:
    """The routes of all layers, a pure function of the config (never of the sequence length).

    pass_levels: of each whole pass. The layers of a pass have levels 0, 1, .., one more pass of
    num_extra_levels is incomplete; local and refinement layers have stride 1.
    """
    routes = []
    for index in range(num_local_layers):
        routes.append(LayerRoute(index, "local", 1, 0, -1, False, False))
    for pass_index, levels in enumerate((*pass_levels, num_extra_levels)):
        whole = pass_index < len(pass_levels)
        for level in range(levels):
            ends = whole and level == levels - 1
            routes.append(
                LayerRoute(len(routes), "butterfly", 1 << level, level, pass_index, level == 0, ends)
            )
    for _ in range(num_refine_layers):
        routes.append(LayerRoute(len(routes), "refine", 1, 0, -1, False, False))
    return tuple(routes)


def reach(num_chunks: int, strides: Sequence[int], topology: Topology = "shift") -> list[int]:
    """Which chunks each chunk can have heard after layers with the given strides.

    Returns a bitmask per chunk: bit d of entry c is set when information from chunk d can be in chunk c.
    """
    heard = [1 << c for c in range(num_chunks)]
    for stride in strides:
        partners = [partner_of(c, stride, topology) for c in range(num_chunks)]
        heard = [
            mask | (heard[p] if 0 <= p < num_chunks else 0) for mask, p in zip(heard, partners, strict=True)
        ]
    return heard


def reach_share(num_chunks: int, strides: Sequence[int], topology: Topology = "shift") -> float:
    """Share of the chunk pairs (c, d <= c) that a causal schedule connects, 0 to 1."""
    heard = reach(num_chunks, strides, topology)
    connected = sum((mask & ((1 << (c + 1)) - 1)).bit_count() for c, mask in enumerate(heard))
    return connected / (num_chunks * (num_chunks + 1) / 2)


def hops(distance: int) -> int:
    """Relays needed to cover a distance in chunks: its number of set bits."""
    return distance.bit_count()
