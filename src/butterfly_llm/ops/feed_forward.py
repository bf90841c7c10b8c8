"""Fused feed-forward layer for CUDA: two operators around the kernel in `triton_feed_forward_kernels`.

The activation relu(u)^2 rides in the epilogue of the product that makes u, and its gradient in the epilogue
of the product that makes the gradient of relu(u)^2: u, the normalised rows and that gradient never reach
memory, forward or backward. What is kept for the backward pass is the squares, whose roots are relu(u). The
products that are left are plain ones, in the hands of PyTorch and, compiled, fused with what is next to them.
Where no gradient is wanted and rows are narrow, one kernel takes both products and u^2 stays in registers.

Shapes: T rows (characters), d hidden size, F intermediate size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops import triton_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FEWEST_ROWS = 128  # below, launches count and not bytes
_STEP = 16  # widths are whole multiples of it
_HOPPER = 200 * 1024  # bytes of shared memory that a block can have
_WIDEST_WHOLE = 256  # values in a row that one program holds, with its sums

Pass = Literal["forward", "gradient", "whole"]


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts its work."""

    block_m: int  # rows
    block_n: int  # columns of the product
    block_k: int  # columns of a that are taken at a time; with "whole" all of them
    num_warps: int
    num_stages: int
    registers: int | None = None  # the most a thread may use; None: what the compiler finds best


FORCED_TILES: dict[Pass, Tiles] = {}
"""Overrides the table below, for measurements."""
ENABLED = True
"""Models with the backend triton use the kernels. Off to measure what they gain."""


def tiles(which: Pass, dtype: torch.dtype, columns: int, size: int, shared_limit: int) -> Tiles:
    """Tiles for a product of `columns` columns over rows of `size` values, on a card with `shared_limit`
    bytes of shared memory a block. Those for Hopper are the best of 14 on an H100 (docs/kernels.md)."""
    if which in FORCED_TILES:
        return FORCED_TILES[which]
    if dtype == torch.float32:  # exact products, without tensor cores
        chosen = Tiles(64, 64, 32, 4, 1)
    elif shared_limit < _HOPPER:
        chosen = Tiles(64, 64, 32, 4, 3)
    elif which == "whole":
        chosen = Tiles(128, 64, 64, 8, 2)
    elif which == "gradient":
        chosen = Tiles(128 if size > 256 else 64, 128, 64, 4, 3)
    else:
        chosen = Tiles(128, 256, 64, 8, 4) if size > 256 else Tiles(128, 128, 64, 8, 3)
    return Tiles(
        chosen.block_m,
        min(chosen.block_n, _power_of_two_in(columns)),
        min(chosen.block_k, _power_of_two_in(size)),
        chosen.num_warps,
        chosen.num_stages,
    )


def _power_of_two_in(number: int) -> int:
    """The largest power of two that divides number."""
    return number & -number


def reason_against(config: ButterflyConfig) -> str | None:
    """Why the layers of a model are not fused with the backend triton; None if they are."""
    if not ENABLED:
        return "compiled, the fused kernel is off"
    if config.feed_forward != "relu2":
        return f"{config.feed_forward} has no kernel"
    if config.hidden_size % _STEP or config.intermediate_size % _STEP:
        return f"widths {config.hidden_size} and {config.intermediate_size} are not multiples of {_STEP}"
    return None


def takes(x: Tensor, config: ButterflyConfig) -> bool:
    """Whether `relu2_feed_forward` has kernels for rows x (T, d) here, and they pay."""
    return (
        x.dtype in DTYPES
        and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
        and len(x) >= _FEWEST_ROWS
        and reason_against(config) is None
    )


def _launch(which: Pass, a: Tensor, weight: Tensor, factor: Tensor, hidden: Tensor | None) -> Tensor:
    from butterfly_llm.ops.triton_feed_forward_kernels import up_kernel

    a, weight, hidden = a.contiguous(), weight.contiguous(), None if hidden is None else hidden.contiguous()
    (rows, size), columns = a.shape, len(weight)
    out = a.new_empty((rows, columns))
    cut = tiles(which, a.dtype, columns, size, triton_attention._shared_limit(a.device))
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        up_kernel[(-(-rows // cut.block_m) * (columns // cut.block_n),)](
            a, weight, factor, out if hidden is None else hidden, out, rows,
            K=size, N=columns, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            GRADIENT=which == "gradient", num_warps=cut.num_warps, num_stages=cut.num_stages,
            **({"maxnreg": cut.registers} if cut.registers else {}),
        )  # fmt: skip
    return out


@torch.library.custom_op("butterfly::relu2_whole", mutates_args=())
def _whole(x: Tensor, up: Tensor, down: Tensor, factor: Tensor) -> Tensor:
    """x + relu(factor (x up^T))^2 down^T: x (T, d), up (F, d), down (d, F), factor (T,) float32 -> (T, d).

    In one kernel where rows are narrow and shared memory holds what it needs.
    """
    from butterfly_llm.ops.triton_feed_forward_kernels import whole_kernel

    x, up, down = x.contiguous(), up.contiguous(), down.contiguous()
    (rows, size), inner = x.shape, len(up)
    limit = triton_attention._shared_limit(x.device)
    fits = "whole" in FORCED_TILES or (x.dtype != torch.float32 and limit >= _HOPPER)
    if size > _WIDEST_WHOLE or _power_of_two_in(size) != size or not fits:
        return torch.addmm(x, _launch("forward", x, up, factor, None), down.t())
    out = torch.empty_like(x)
    cut = tiles("whole", x.dtype, inner, size, limit)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        whole_kernel[(-(-rows // cut.block_m),)](
            x, up, down, factor, out, rows, D=size, F=inner, BLOCK_M=cut.block_m, BLOCK_F=cut.block_n,
            num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
    return out


@_whole.register_fake
def _(x: Tensor, up: Tensor, down: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("butterfly::relu2_up", mutates_args=())
def _up(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """relu(factor (x weight^T))^2: x (T, d), weight (F, d), factor (T,) float32 -> (T, F)."""
    return _launch("forward", x, weight, factor, None)


@torch.library.custom_op("butterfly::relu2_up_gradient", mutates_args=())
def _up_gradient(grad: Tensor, weight: Tensor, factor: Tensor, hidden: Tensor) -> Tensor:
    """2 factor sqrt(hidden) (grad weight^T): grad (T, d), weight (F, d), hidden (T, F) -> (T, F)."""
    return _launch("gradient", grad, weight, factor, hidden)


@_up.register_fake
def _(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty((len(x), len(weight)))


@_up_gradient.register_fake
def _(grad: Tensor, weight: Tensor, factor: Tensor, hidden: Tensor) -> Tensor:
    return grad.new_empty((len(grad), len(weight)))


def _factor(x: Tensor, eps: float) -> Tensor:
    """Of each row in its RMSNorm: (T, d) -> (T,) float32."""
    return torch.rsqrt(x.float().square().mean(-1) + eps)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
        factor = _factor(x, eps)
        hidden = _up(x, (up * gain).to(x.dtype), factor)
        ctx.save_for_backward(x, gain, up, down, factor, hidden)
        return torch.addmm(x, hidden, down.to(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With r the factors, y = r g x the normalised rows and du the gradient of u = y up^T:

        a = (r du) (up g) is r g dy, and dx = a - x (r^2 / d) sum(a x) behind the norm; (r du)^T x is the
        gradient of up g, from which those of up and of g follow without another pass over the rows.
        """
        x, gain, up, down, factor, hidden = ctx.saved_tensors
        grad = gradients[0]
        dproduct = _up_gradient(grad, down.t().to(x.dtype).contiguous(), factor, hidden)  # r du
        ddown = (grad.t() @ hidden).float()
        dscaled = (dproduct.t() @ x).float()
        a = (dproduct @ (up * gain).to(x.dtype)).float()
        wide = x.float()
        along = (a * wide).sum(-1, keepdim=True) * factor.square()[:, None] / x.shape[1]
        dx = (grad.float() + a - wide * along).to(x.dtype)
        return dx, (dscaled * up).sum(0), dscaled * gain, ddown, None


def relu2_feed_forward(x: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """x + relu(norm(x) up^T)^2 down^T, where norm(x) = gain x / sqrt(mean(x^2) + eps).

    x (T, d); float32 gain (d,), up (F, d), down (d, F) -> (T, d); differentiable once, deterministic.
    Needs what `takes` asks for.
    """
    if not torch.is_grad_enabled():
        return cast(Tensor, _whole(x, (up * gain).to(x.dtype), down.to(x.dtype), _factor(x, eps)))
    return cast(Tensor, _FeedForward.apply(x, gain, up, down, eps))  # type: ignore[no-untyped-call]
