"""The products of a decoding step on CUDA, with norms, gates, activations and residuals in the same launch.

Shapes: B streams, d hidden size, N columns, M carry size, D head size, L characters in a chunk, S slots.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from butterfly_llm.routing import Topology

Kind = Literal["plain", "heads", "relu2", "add"]


def rows_product(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    kind: Kind = "plain",
    residual: Tensor | None = None,
    read: tuple[Tensor, Tensor | None, Tensor] | None = None,
    heads: tuple[int, int, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(norm(x) weight^T) [+ residual]: x (B, K), weight (N, K) -> (B, N) in `dtype`, None for that of x.

    gain:     (K,) of the RMSNorm before the product; None for none.
    read:     lanes (B, M), the gain (M,) of their RMSNorm, None for none, and a matrix (R, M), whose product
              is added to the last R columns.
    heads:    with kind "heads", query heads, key heads and the gains (2, D) that normalise them; N is whole
              heads of D columns, and the values after the keys stay as they are.
    residual: (B, N), with kind "add".
    """
    from butterfly_llm.ops.triton_rows_kernels import rows_kernel

    batch, size = x.shape
    columns = len(weight)
    queries, keys, head_gain = heads or (0, 0, weight)
    block_n = head_gain.shape[1] if heads else 16
    lanes, lane_gain, matrix = read or (x, None, weight)
    gains = tuple(x if each is None else each for each in (gain, lane_gain))
    out = x.new_empty((batch, columns), dtype=dtype or x.dtype)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows_kernel[(-(-columns // block_n), -(-batch // 16))](
            x, gains[0], weight, lanes, gains[1], matrix, head_gain,
            x if residual is None else residual, out, batch, x.stride(0), lanes.stride(0), eps,
            K=size, N=columns, LANES=lanes.shape[1] if read else 0,
            FIRST_READ=columns - len(matrix) if read else columns, HEADS=queries, TURNED=queries + keys,
            BLOCK_B=16, BLOCK_N=block_n, BLOCK_K=min(256, 1 << (size - 1).bit_length()),
            NORM=gain is not None, LANES_NORM=lane_gain is not None, KIND=kind, num_warps=4,
        )  # fmt: skip
    return out


def merge_step(
    scan: Tensor,
    ring: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int,
    topology: Topology,
) -> Tensor:
    """One level of the carry: scan (B, M), ring (B, S, L, M), position (B,) -> the merged scan (B, M).

    The scan as it came is put into the ring. weight (M, 2M), bias (M,).
    """
    from butterfly_llm.ops.triton_rows_kernels import merge_kernel

    batch, size = scan.shape
    slots, chunk_size = ring.shape[1:3]
    block_n = next(n for n in (16, 8, 4, 2, 1) if size % n == 0)
    out = torch.empty_like(scan)
    with torch.cuda.device_of(scan):  # type: ignore[no-untyped-call]
        merge_kernel[(size // block_n, batch)](
            scan, ring, position, weight, bias, out, ring.stride(0), slots, min(stride, 1 << 30),
            M=size, PADDED=1 << (size - 1).bit_length(), BLOCK_N=block_n, CHUNK=chunk_size, TOPOLOGY=topology,
            num_warps=4,
        )  # fmt: skip
    return out


def merge_heads_step(
    scan: Tensor, ring: Tensor, position: Tensor, bias: Tensor, *, stride: int, topology: Topology
) -> Tensor:
    """`merge_step` of a carry with heads: scan (B, G + M), ring (B, S, L, G + M), bias (G,)."""
    from butterfly_llm.ops.triton_rows_kernels import merge_heads_kernel

    batch, size = scan.shape
    slots, chunk_size = ring.shape[1:3]
    out = torch.empty_like(scan)
    with torch.cuda.device_of(scan):  # type: ignore[no-untyped-call]
        merge_heads_kernel[(batch,)](
            scan, ring, position, bias, out, ring.stride(0), slots, min(stride, 1 << 30), HEADS=len(bias),
            ROW=size, PADDED=1 << (size - 1).bit_length(), CHUNK=chunk_size, TOPOLOGY=topology, num_warps=1,
        )  # fmt: skip
    return out
