"""One character of one or more streams on the CPU in NumPy, the same float32 arithmetic as `model`.

A step is some 2,000 operations on single rows. There NumPy costs a fraction of a tensor operation, and its
matrix-vector product reads weights laid out input by output near the speed of memory. Several streams share
every product with a weight, which is then read once for all, and attend one by one, each at a position of
its own. All arrays are views of the model's parameters and of the caches: nothing is copied or goes stale.

Shapes: ... nothing for one stream, (B,) for several; d hidden size, H heads, K key-value heads, D head size,
M carry size, G heads of the carry, L chunk, S ring slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from butterfly_llm.routing import LayerRoute, Topology, partner_of

Array = npt.NDArray[Any]  # float32


@dataclass(frozen=True)
class LayerWeights:
    """Matrices are (input, output)."""

    attention_norm: Array  # (d,)
    qkv: Array  # (d, (H + 2K) D)
    q_norm: Array  # (D,)
    k_norm: Array  # (D,)
    out: Array  # (H D, d)
    feed_forward_norm: Array  # (d,)
    up: Array
    down: Array
    local: int  # chunks just before the own one that are read too
    read_norm: Array | None  # (M,)
    read: Array | None  # (M, 2 K D)
    write: tuple[Array, Array, Array] | None  # norm (d,), matrix (d, X), bias (X,), X 2M or G + M
    merge: tuple[Array, ...] | None  # matrix (2M, M), bias (M,); with heads bias (G,)


@dataclass(frozen=True)
class Weights:
    """A whole model."""

    routes: tuple[LayerRoute, ...]
    layers: list[LayerWeights]
    embed: Array  # (256, d)
    ngram: Array | None  # (O * 257, d)
    embed_norm: Array
    norm: Array
    head: Array  # (d, 256)
    rope: tuple[Array, Array]  # cos and signed sin of positions 0..(2 + W)L-1, W the most of `local`
    num_heads: int
    num_kv_heads: int
    chunk_size: int
    topology: Topology
    gated: bool
    carry_heads: int
    eps: float


Rings = tuple[Array, Array, Array | None]
"""Keys and values (K, S, L, D) and carry (S, L, M) of one layer of one stream."""


def _norm(x: Array, weight: Array, eps: float) -> Array:
    if x.ndim == 2:
        return cast(Array, x * weight / np.sqrt(np.einsum("bd,bd->b", x, x) / x.shape[1] + eps)[:, None])
    scale = 1.0 / math.sqrt(float(x.dot(x)) / x.shape[0] + eps)
    return x * weight * np.float32(scale)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _attend(
    qkv: Array,
    layer: LayerWeights,
    rings: Rings,
    position: int,
    shares: list[float] | None,
    weights: Weights,
    stride: int,
) -> Array:
    """qkv ((H + 2K) D,) -> (H D,); key and value are put into the rings.

    shares: gets the part of the attention, mean of the heads, that goes to the own chunk.
    """
    num_heads, num_kv_heads = weights.num_heads, weights.num_kv_heads
    chunk, offset = divmod(position, weights.chunk_size)
    keys, values, _ = rings
    slots, head_dim = keys.shape[1], keys.shape[3]
    slot = chunk % slots
    heads = qkv.reshape(-1, head_dim)
    qk = heads[: num_heads + num_kv_heads]
    mean_square = np.einsum("hd,hd->h", qk, qk) / head_dim
    qk = qk / np.sqrt(mean_square + np.float32(weights.eps))[:, None]
    qk[:num_heads] *= layer.q_norm
    qk[num_heads:] *= layer.k_norm
    local = layer.local
    count = local + 1 + (stride > local)  # R, chunks that are read
    # Row 0 turned by the offset, the others by one chunk more each: the query against what lies before.
    turns = slice(offset, count * weights.chunk_size, weights.chunk_size)
    cos, sin = (table[turns, None] for table in weights.rope)
    half = head_dim // 2
    turned = qk * cos + np.concatenate([qk[:, half:], qk[:, :half]], 1) * sin  # (R, H + K, D)
    keys[:, slot, offset] = turned[0, num_heads:]
    values[:, slot, offset] = heads[num_heads + num_kv_heads :]

    if local:
        read = [*((chunk - back) % slots for back in range(local + 1)), (slot + 1) % slots][:count]
        k_read, v_read = keys[:, read], values[:, read]
    elif slot + 1 < slots:
        k_read, v_read = keys[:, slot : slot + 2], values[:, slot : slot + 2]  # (K, 2, L, D)
    else:
        k_read, v_read = (np.stack([x[:, slot], x[:, 0]], 1) for x in (keys, values))
    q = turned[:, :num_heads].reshape(count, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    scores = np.matmul(k_read[:, None], q[..., None])[..., 0]  # (K, H / K, R, L)
    scores[:, :, 0, offset + 1 :] = -np.inf
    for back in range(chunk + 1, local + 1):
        scores[:, :, back] = -np.inf
    if stride > local and partner_of(chunk, stride, weights.topology) < 0:
        scores[:, :, -1] = -np.inf
    scores = scores.reshape(num_kv_heads, -1, count * weights.chunk_size)
    scores -= np.maximum.reduce(scores, 2, keepdims=True)
    scores *= np.float32(head_dim**-0.5)
    np.exp(scores, out=scores)
    total = np.add.reduce(scores, 2, keepdims=True)
    if shares is not None:
        own = np.add.reduce(scores[:, :, : weights.chunk_size], 2, keepdims=True)
        shares.append(float((own / total).mean()))
    y = np.matmul(scores, v_read.reshape(num_kv_heads, -1, head_dim)) / total  # (K, H / K, D)
    return cast(Array, y.reshape(-1))


def _partner(scan: Array, rings: Rings, position: int, weights: Weights, stride: int) -> Array:
    """The carry of the partner's lane (M,), where there is none zeros after scores of -inf; scan (M,) is put
    into the ring."""
    carries = rings[2]
    assert carries is not None
    chunk, offset = divmod(position, weights.chunk_size)
    slots = carries.shape[0]
    carries[chunk % slots, offset] = scan
    if partner_of(chunk, stride, weights.topology) < 0:
        nobody = np.zeros_like(scan)
        nobody[: weights.carry_heads] = -np.inf
        return nobody
    return cast(Array, carries[(chunk + 1) % slots, offset])


def _written(both: Array, weights: Weights) -> Array:
    """What a character puts into the carry, as `CarryWrite`: both (..., 2M) -> (..., M), or (..., G + M)."""
    heads = weights.carry_heads
    if not heads:
        gate, value = np.split(both, 2, -1)
        return cast(Array, _sigmoid(gate) * value)
    values = both[..., heads:].reshape(*both.shape[:-1], heads, -1)
    mean_square = np.einsum("...m,...m->...", values, values) / values.shape[-1]
    values = values / np.sqrt(mean_square + np.float32(weights.eps))[..., None]
    return np.concatenate([both[..., :heads], values.reshape(*both.shape[:-1], -1)], -1)


def _merged(scan: Array, partner: Array, merge: tuple[Array, ...], heads: int) -> Array:
    """One level of the carry, as `CarryMerge`: (..., M), or (..., G + M)."""
    if not heads:
        matrix, bias = merge
        return cast(Array, scan + _sigmoid(np.concatenate([scan, partner], -1) @ matrix + bias) * partner)
    own, far = scan[..., :heads], partner[..., :heads] - merge[0]
    ours, theirs = (x[..., heads:].reshape(*x.shape[:-1], heads, -1) for x in (scan, partner))
    values = ours + _sigmoid(far - own)[..., None] * (theirs - ours)
    return np.concatenate([np.logaddexp(own, far), values.reshape(*scan.shape[:-1], -1)], -1)


def _feed_forward(x: Array, layer: LayerWeights, gated: bool) -> Array:
    """x (..., d), normalised -> (..., d)."""
    hidden, down = x @ layer.up, layer.down
    if gated:
        gate, value = np.split(hidden, 2, -1)
        hidden = gate * _sigmoid(gate) * value
    else:
        if hidden.ndim == 1:
            active = np.flatnonzero(hidden > 0)  # a quarter in a trained model: only their rows are read
            hidden, down = hidden[active], down[active]
        else:
            np.maximum(hidden, 0, out=hidden)
        hidden *= hidden
    return hidden @ down


def step(
    characters: Sequence[int],
    positions: Sequence[int],
    weights: Weights,
    rings: Sequence[list[Rings]],
    shares: Sequence[list[float]] | None = None,
    followers: Sequence[Array] = (),
) -> Array:
    """Append a character to each of B streams -> logits (B, 256). The rings are updated in place.

    followers: of each stream (F,), as `ngrams.step_numpy`, for a model with n-grams.

    shares: a list for each stream, which gets for each layer the part of the attention, mean of the heads,
    that goes to the own chunk; the rest goes to the partner and local chunks.
    """
    eps = weights.eps
    alone = len(characters) == 1
    heard_by: Sequence[list[float] | None] = [None] * len(characters) if shares is None else shares

    def rows(x: Array) -> Array:
        return x[None] if alone else x

    def joined(results: list[Array]) -> Array:
        return results[0] if alone else np.stack(results)

    embedded = [weights.embed[character] for character in characters]
    if weights.ngram is not None:
        first = np.arange(0, len(weights.ngram), len(weights.ngram) // len(followers[0]))
        embedded = [
            row + weights.ngram[first + found].sum(0) for row, found in zip(embedded, followers, strict=True)
        ]
    x = _norm(joined(embedded), weights.embed_norm, eps)
    scan: Any = None
    finished: Any = None
    for i, (route, layer) in enumerate(zip(weights.routes, weights.layers, strict=True)):
        stride = route.stride
        places = [(ring[i], position) for ring, position in zip(rings, positions, strict=True)]
        if layer.write is not None:
            norm, matrix, bias = layer.write
            scan = _written(_norm(x, norm, eps) @ matrix + bias, weights)
        qkv = _norm(x, layer.attention_norm, eps) @ layer.qkv
        if layer.read is not None:
            memory = scan if finished is None or route.pass_index == 0 else finished
            memory = memory[..., weights.carry_heads :]
            if layer.read_norm is not None:
                memory = _norm(memory, layer.read_norm, eps)
            qkv[..., -layer.read.shape[1] :] += memory @ layer.read
        heard = [
            _attend(row, layer, *at, share, weights, stride)
            for row, at, share in zip(rows(qkv), places, heard_by, strict=True)
        ]
        x = x + joined(heard) @ layer.out
        x = x + _feed_forward(_norm(x, layer.feed_forward_norm, eps), layer, weights.gated)
        if layer.merge is not None:
            lanes = zip(rows(scan), places, strict=True)
            partner = joined([_partner(lane, *at, weights, stride) for lane, at in lanes])
            scan = _merged(scan, partner, layer.merge, weights.carry_heads)
            if route.ends_pass:
                finished = scan
    return rows(_norm(x, weights.norm, eps) @ weights.head)
