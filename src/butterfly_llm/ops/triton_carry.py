"""One level of a carry with heads for CUDA: the operator around the kernels in `triton_carry_kernels`.

`CarryMerge` of a scan and its shifted copy in one pass over memory, without the copy.

Shapes: B batch, N characters, G heads of the carry, W = G + M a row of it: scores, then values.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from butterfly_llm.routing import Topology

_BLOCK = 64  # rows of a program
_NO_STRIDE = 1 << 30  # chunks; no sequence is that long


def _options(scan: Tensor, bias: Tensor, chunk_size: int, topology: str) -> dict[str, Any]:
    heads = len(bias)
    size = scan.shape[2] // heads - 1
    return {
        "HEADS": heads, "SIZE": size, "PADDED": 1 << (size - 1).bit_length(), "CHUNK": chunk_size,
        "TOPOLOGY": topology, "BLOCK": _BLOCK, "num_warps": 4,
    }  # fmt: skip


def _grid(scan: Tensor, bias: Tensor) -> tuple[int, int]:
    return -(-scan.shape[1] // _BLOCK), scan.shape[0] * len(bias)


@torch.library.custom_op("butterfly::carry_merge", mutates_args=())
def _merge(scan: Tensor, bias: Tensor, stride: int, topology: str, chunk_size: int) -> Tensor:
    from butterfly_llm.ops.triton_carry_kernels import merge_rows_kernel

    scan = scan.contiguous()
    out = torch.empty_like(scan)
    with torch.cuda.device_of(scan):  # type: ignore[no-untyped-call]
        merge_rows_kernel[_grid(scan, bias)](
            scan, bias, out, scan.shape[1], min(stride, _NO_STRIDE),
            **_options(scan, bias, chunk_size, topology),
        )  # fmt: skip
    return out


@torch.library.custom_op("butterfly::carry_merge_bwd", mutates_args=())
def _merge_backward(
    grad: Tensor, scan: Tensor, bias: Tensor, stride: int, topology: str, chunk_size: int
) -> tuple[Tensor, Tensor]:
    from butterfly_llm.ops.triton_carry_kernels import merge_rows_gradient_kernel

    scan, grad = scan.contiguous(), grad.contiguous()
    out = torch.empty_like(scan)
    blocks, others = _grid(scan, bias)
    parts = torch.empty((scan.shape[0], len(bias), blocks), dtype=torch.float32, device=scan.device)
    with torch.cuda.device_of(scan):  # type: ignore[no-untyped-call]
        merge_rows_gradient_kernel[blocks, others](
            scan, bias, grad, out, parts, scan.shape[1], min(stride, _NO_STRIDE),
            **_options(scan, bias, chunk_size, topology),
        )  # fmt: skip
    return out, parts.sum((0, 2)).to(bias.dtype)


@_merge.register_fake
def _(scan: Tensor, bias: Tensor, stride: int, topology: str, chunk_size: int) -> Tensor:
    return scan.new_empty(tuple(scan.shape))


@_merge_backward.register_fake
def _(
    grad: Tensor, scan: Tensor, bias: Tensor, stride: int, topology: str, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return scan.new_empty(tuple(scan.shape)), bias.new_empty(tuple(bias.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scan, bias, *ctx.options = inputs
    ctx.save_for_backward(scan, bias)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_merge_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None)


_merge.register_autograd(_gradients, setup_context=_save)


def merge_heads_triton(
    scan: Tensor, bias: Tensor, *, stride: int, topology: Topology, chunk_size: int
) -> Tensor:
    """The scan after one level: (B, N, W) and bias (G,) -> (B, N, W); differentiable once, deterministic.

    What `CarryMerge` makes of the scan and `partner_rows` of it, computed in float32.
    """
    return cast(Tensor, _merge(scan, bias, stride, topology, chunk_size))
