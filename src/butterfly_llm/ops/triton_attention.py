"""Fused Triton kernels of butterfly attention (placeholder seat until engineer K's file lands; keep `status`)."""

from __future__ import annotations

from torch import Tensor

from butterfly_llm.routing import Topology


def status() -> str:
    """ "available", or the reason why the kernels cannot run here."""
    return "not built yet"


def butterfly_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, stride: int, topology: Topology, chunk_size: int, rope_theta: float | None
) -> Tensor:
    raise ValueError(f"backend triton: {status()}")
