"""Fused butterfly attention for CUDA: two PyTorch operators around the kernels in `triton_kernels`.

`butterfly::attention_fwd` and `butterfly::attention_bwd` are opaque to torch.compile, which therefore sees no
graph break; stride and length may be symbolic. Triton is imported at the first launch, never before, so this
module imports everywhere. With TRITON_INTERPRET=1 the same kernels run on the CPU, slowly (tests).

Shapes: B batch, N characters, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from butterfly_llm.ops.rope import rope_table
from butterfly_llm.routing import Topology

HEAD_DIMS = (32, 64, 128)
CHUNK_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_NO_STRIDE = 1 << 30  # chunks; no sequence is that long

Pass = Literal["forward", "query_gradient", "key_gradient"]


def status() -> str:
    """ "available", or the reason why the kernels cannot run here."""
    if not _TRITON_FOUND:
        return "triton is not installed"
    if torch.cuda.is_available() or _interpreted():
        return "available"
    return "no CUDA device"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    registers: int | None = None  # the most a thread may use; None: what the compiler finds best


_HOPPER: dict[Pass, Tiles] = {
    "forward": Tiles(64, 64, 4, 3, 128),
    "query_gradient": Tiles(64, 64, 4, 1, 128),
    "key_gradient": Tiles(64, 64, 4, 1),
}
FORCED_TILES: dict[Pass, Tiles] = {}
"""Overrides the table below, for measurements."""


def tiles(which: Pass, dtype: torch.dtype, head_dim: int, chunk_size: int, shared_limit: int) -> Tiles:
    """Tile sizes of one kernel on a card with `shared_limit` bytes of shared memory per block.

    Those of Hopper, for heads up to 64, are the fastest of a measured sweep (docs/kernels.md); the others are
    chosen so that nothing or little spills. Cards without Hopper's matrix instructions, known here by their
    smaller shared memory, keep operands in registers.
    """
    if which in FORCED_TILES:
        return FORCED_TILES[which]
    if dtype == torch.float32:  # exact products, without tensor cores
        chosen = Tiles(32, 32, 4, 1) if which == "forward" else Tiles(16, 16, 4, 1)
    elif shared_limit < 200 * 1024:
        large = which == "forward" and shared_limit >= 99 * 1024
        chosen = Tiles(64, 64 if head_dim <= 64 else 32, 4, 2) if large else Tiles(32, 32, 4, 1)
    elif head_dim > 64:
        chosen = Tiles(32 if which == "key_gradient" else 64, 64, 4, 1)
    else:
        chosen = _HOPPER[which]
    m, n = min(chosen.block_m, chunk_size), min(chosen.block_n, chunk_size)
    return replace(chosen, block_m=m, block_n=n)


@functools.lru_cache(maxsize=16)
def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may use; BUTTERFLY_SHARED_LIMIT lowers it for tests."""
    forced = os.environ.get("BUTTERFLY_SHARED_LIMIT")
    if forced:
        return int(forced)
    if device.type != "cuda":
        return 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


@functools.lru_cache(maxsize=16)
def _chunk_turns(
    chunk_size: int, head_dim: int, theta: float | None, local: int, device: torch.device
) -> Tensor:
    """cos and sin (local + 1, 2, D / 2) float32 of one whole chunk, of two, .."""
    with torch.inference_mode(False):
        at = chunk_size * torch.arange(1, local + 2, device=device)
        cos, sin = rope_table(at, head_dim, theta, torch.float32)
        return torch.stack([cos[:, 0, head_dim // 2 :], sin[:, 0, head_dim // 2 :]], 1).contiguous()


def _rows(x: Tensor) -> Tensor:
    """x itself if the elements of a row are adjacent, as in views into a fused projection."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensors: list[Tensor]) -> list[int]:
    """Of the first three dimensions. A single sequence has no batch stride: beyond 2**31 elements it would
    be a 64-bit argument and every kernel be compiled again."""
    return [x.stride(axis) if axis or len(x) > 1 else 0 for x in tensors for axis in range(3)]


@dataclass(frozen=True)
class Past:
    """What a slice of a stream reads of the chunks before it."""

    keys: Tensor  # (B, K, S, L, D), rotated by their offset
    values: Tensor
    first: int  # number of the slice's first chunk
    turn: int  # chunk p lies in slot (p + turn) mod S
    near: tuple[Tensor, Tensor, int] | None = None  # keys, values, turn of the local chunks; None: the same

    def arguments(self) -> list[Any]:
        keys, values, turn = self.near or (self.keys, self.values, self.turn)
        strides, near = self.keys.stride(), keys.stride()
        return [
            self.keys, self.values, *strides[:2], self.first, self.keys.shape[2], self.turn,
            keys, values, *near[:2], keys.shape[2], turn,
        ]  # fmt: skip

    def contiguous(self) -> Past:
        """The same where each stream's part is contiguous, keys and values laid out alike."""
        keys, values = _alike(self.keys, self.values)
        near = None if self.near is None else (*_alike(*self.near[:2]), self.near[2])
        return replace(self, keys=keys, values=values, near=near)


def _alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if keys[0].is_contiguous() and values.stride() == keys.stride():
        return keys, values
    return keys.contiguous(), values.contiguous()


def _launch(
    which: Pass,
    tensors: list[Tensor],
    strided: list[Tensor],
    shape: tuple[int, int, int, int, int],
    *,
    stride: int,
    topology: str,
    chunk_size: int,
    rope_theta: float | None,
    local: int = 0,
    past: Past | None = None,
) -> None:
    """Run one kernel over every (block, head, batch). `strided` are the tensors whose strides it takes."""
    from butterfly_llm.ops import triton_kernels

    batch, length, num_heads, num_kv_heads, head_dim = shape
    device, dtype = tensors[0].device, tensors[0].dtype
    cut = tiles(which, dtype, head_dim, chunk_size, _shared_limit(device))
    num_chunks = -(-length // chunk_size)
    # Chunks one stride apart are numbered side by side: `step` rows of `turns` slots, some past the end.
    step = stride if stride < num_chunks else 1
    turns = -(-num_chunks // step)
    over_keys = which == "key_gradient"
    blocks = chunk_size // (cut.block_n if over_keys else cut.block_m)
    programs = batch * turns * step * blocks * (num_kv_heads if over_keys else num_heads)
    kernel = getattr(triton_kernels, f"{which}_kernel")
    stream: list[Any] = []
    if which == "forward":
        unread = Past(tensors[1], tensors[2], 0, 0)
        stream = (past or unread).arguments()
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](
            *tensors,
            _chunk_turns(chunk_size, head_dim, rope_theta, local, device),
            *_strides(strided),
            length,
            num_chunks,
            min(stride, _NO_STRIDE),
            turns,
            step,
            *stream,
            HEADS=num_heads,
            GROUP=num_heads // num_kv_heads,
            D=head_dim,
            CHUNK=chunk_size,
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            SCALE=head_dim**-0.5 * math.log2(math.e),
            TOPOLOGY=topology,
            WHOLE=length % chunk_size == 0,
            STAGES=cut.num_stages,
            LOCAL=local,
            **({"STREAM": past is not None} if which == "forward" else {}),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            **({"maxnreg": cut.registers} if cut.registers else {}),
        )


@torch.library.custom_op("butterfly::attention_fwd", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    topology: str,
    chunk_size: int,
    rope_theta: float | None,
    local: int,
) -> tuple[Tensor, Tensor]:
    """o (B, N, H, D) and the binary logarithm of each row's softmax denominator, (B, H, N) float32."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, length, num_heads, head_dim = q.shape
    o = q.new_empty((batch, length, num_heads, head_dim))
    lse = q.new_empty((batch, num_heads, length), dtype=torch.float32)
    shape = (batch, length, num_heads, k.shape[2], head_dim)
    options: dict[str, Any] = {
        "stride": stride, "topology": topology, "chunk_size": chunk_size, "rope_theta": rope_theta,
        "local": local,
    }  # fmt: skip
    _launch("forward", [q, k, v, o, lse], [q, k, v], shape, **options)
    return o, lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    topology: str,
    chunk_size: int,
    rope_theta: float | None,
    local: int,
) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, head_dim = q.shape
    o = q.new_empty((batch, length, num_heads, head_dim))
    return o, q.new_empty((batch, num_heads, length), dtype=torch.float32)


@torch.library.custom_op("butterfly::attention_bwd", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    stride: int,
    topology: str,
    chunk_size: int,
    rope_theta: float | None,
    local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, N, H, D), dk and dv (B, N, K, D), from the gradient of o."""
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    o, lse = o.contiguous(), lse.contiguous()
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dq = q.new_empty((batch, length, num_heads, head_dim))
    dk, dv = (q.new_empty((batch, length, num_kv_heads, head_dim)) for _ in range(2))
    shape = (batch, length, num_heads, num_kv_heads, head_dim)
    options: dict[str, Any] = {
        "stride": stride, "topology": topology, "chunk_size": chunk_size, "rope_theta": rope_theta,
        "local": local,
    }  # fmt: skip
    delta = torch.empty_like(lse)
    _launch("query_gradient", [q, k, v, o, grad, lse, delta, dq], [q, k, v, grad], shape, **options)
    _launch("key_gradient", [q, k, v, grad, lse, delta, dk, dv], [q, k, v, grad], shape, **options)
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    stride: int,
    topology: str,
    chunk_size: int,
    rope_theta: float | None,
    local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(tuple(q.shape)), k.new_empty(tuple(k.shape)), v.new_empty(tuple(v.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    q, k, v, o, lse = ctx.saved_tensors
    return (*_backward(grad, q, k, v, o, lse, *ctx.options), *(None,) * 5)


_forward.register_autograd(_gradients, setup_context=_save)


def butterfly_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    topology: Topology,
    chunk_size: int,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """q (B, N, H, D), k and v (B, N, K, D) -> (B, N, H, D) contiguous; differentiable once, deterministic.

    q and k come rotated by their offset in the chunk. Scores, softmax and sums are float32; queries turned
    further and weights are rounded to the input's dtype.
    Views with adjacent head elements, such as slices of a fused projection, are read in place.
    ImportError without Triton; ValueError for a device, dtype, head or chunk size that has no kernel.
    """
    _require_kernel(q, k, v, chunk_size)
    return cast(Tensor, _forward(q, k, v, stride, topology, chunk_size, rope_theta, local)[0])


def slice_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past,
    *,
    stride: int,
    topology: Topology,
    rope_theta: float | None,
    local: int = 0,
) -> Tensor:
    """`butterfly_attention_triton` of a slice of a causal stream, from a chunk's start; no gradients.

    q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). Partners before the slice are read where they lie.
    """
    chunk_size = past.keys.shape[3]
    _require_kernel(q, k, v, chunk_size)
    q, k, v = _rows(q), _rows(k), _rows(v)
    past = past.contiguous()
    batch, length, num_heads, head_dim = q.shape
    o = q.new_empty((batch, length, num_heads, head_dim))
    lse = q.new_empty((batch, num_heads, length), dtype=torch.float32)
    _launch(
        "forward", [q, k, v, o, lse], [q, k, v], (batch, length, num_heads, k.shape[2], head_dim),
        stride=stride, topology=topology, chunk_size=chunk_size, rope_theta=rope_theta, local=local,
        past=past,
    )  # fmt: skip
    return o


def _require_kernel(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> None:
    """ImportError and ValueError as `butterfly_attention_triton` raises them."""
    if not _TRITON_FOUND:
        raise ImportError("backend triton: triton is not installed (pip install triton, Linux only)")
    if q.device.type != "cuda" and not _interpreted():
        raise ValueError(f"backend triton: needs CUDA tensors, not {q.device.type}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"backend triton: needs one float dtype of 16 or 32 bits, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] not in HEAD_DIMS or chunk_size not in CHUNK_SIZES:
        raise ValueError(
            f"backend triton: head size {q.shape[3]} and chunk size {chunk_size}: "
            f"choose from {HEAD_DIMS} and {CHUNK_SIZES}"
        )
