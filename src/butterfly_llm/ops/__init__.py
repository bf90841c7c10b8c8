"""The operators, each behind one function; the backend is chosen here, explicitly and visibly.

- reference: dense and plain, for tests, any dtype.
- torch:     the portable fast path, CPU and CUDA, no Triton.
- triton:    fused kernels, CUDA (or the CPU under Triton's interpreter).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from butterfly_llm.ops import triton_attention
from butterfly_llm.ops.portable import butterfly_attention_portable
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.rope import offset_angles, rotate_rows
from butterfly_llm.routing import Topology

Backend = Literal["reference", "torch", "triton"]

# Each takes queries and keys that are rotated by their offset in the chunk.
_RUN: dict[Backend, Callable[..., Tensor]] = {
    "reference": partial(butterfly_attention_reference, rotated=True),
    "torch": butterfly_attention_portable,
    "triton": triton_attention.butterfly_attention_triton,
}


def backends() -> dict[str, str]:
    """Each backend with "available" or the reason why it is not."""
    return {"reference": "available", "torch": "available", "triton": triton_attention.status()}


def default_backend(device: torch.device | str) -> Backend:
    """The backend used when none is named: BUTTERFLY_BACKEND if set, else the best for the device."""
    forced = os.environ.get("BUTTERFLY_BACKEND")
    if forced:
        if forced not in get_args(Backend):
            raise ValueError(f"BUTTERFLY_BACKEND={forced}: choose one of {', '.join(get_args(Backend))}")
        return cast(Backend, forced)
    on_cuda = torch.device(device).type == "cuda"
    return "triton" if on_cuda and triton_attention.status() == "available" else "torch"


def butterfly_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    causal: bool = True,
    chunk_size: int = 128,
    rope_theta: float | None = 10000.0,
    backend: Backend | None = None,
    topology: Topology | None = None,
    rotated: bool = False,
    local: int = 0,
) -> Tensor:
    """Each chunk attends to itself and to one partner chunk (design, sections 2 and 5).

    q (B, N, H, D), k and v (B, N, Hkv, D) -> (B, N, H, D), any N >= 1; Hkv divides H; scale D ** -0.5.
    stride: distance of the partner in chunks, a power of two where the topology is an xor.
    causal: True reads chunk c - stride; False reads c XOR stride on either side, and all of the own chunk.
    topology: names the partner rule outright ("xor_causal" has no other name).
    rope_theta: None switches the pair-relative rotation off.
    rotated: q and k come rotated by their offset in the chunk, as `rope.rotate_rows` does it.
    local: so many chunks just before its own are read as well; not where the topology is xor.
    ValueError for shapes that do not fit and for unknown or unavailable backends.
    """
    if topology is None:
        topology = "shift" if causal else "xor"
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"butterfly_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "expected (B, N, H, D) and twice (B, N, Hkv, D)"
        )
    if q.shape[1] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2] or q.shape[3] % 2:
        raise ValueError(
            f"butterfly_attention: {q.shape[1]} characters, {q.shape[2]} heads, {k.shape[2]} key-value "
            f"heads, head size {q.shape[3]}: need a character, heads that divide, an even head size"
        )
    if stride < 1 or (topology != "shift" and stride & (stride - 1)):
        raise ValueError(f"butterfly_attention: stride {stride} must be at least 1, for xor a power of two")
    if local < 0 or (local and topology == "xor"):
        raise ValueError(f"butterfly_attention: local {local} must be at least 0, and 0 for xor")
    chosen = backend or default_backend(q.device)
    if chosen not in _RUN:
        raise ValueError(f"unknown backend {chosen!r}: choose one of {', '.join(_RUN)}")
    if not rotated:
        q, k = (_rotated(x, chunk_size, rope_theta) for x in (q, k))
    return _RUN[chosen](
        q, k, v, stride=stride, topology=topology, chunk_size=chunk_size, rope_theta=rope_theta, local=local
    )


def _rotated(x: Tensor, chunk_size: int, rope_theta: float | None) -> Tensor:
    """x (B, N, H, D) rotated by its offsets."""
    angles = offset_angles(
        0, *x.shape[:2], chunk_size=chunk_size, head_dim=x.shape[3], theta=rope_theta, dtype=x.dtype,
        device=x.device,
    )  # fmt: skip
    return rotate_rows(x.flatten(0, 1), angles).view(x.shape)
