"""What the backward pass recomputes instead of keeping, and how much memory each choice takes.

Keeping everything is fastest. Next, only the input of each layer is kept and the layer is run once more in
the backward pass. For the longest sequences not even every input fits: then `slots` of them are held at a
time, at the borders of segments, and a segment is run once more to get at the inputs inside it.

A recomputed layer takes all that sees characters as rows in slices of rows, forward and backward, so that the
wide feed-forward activations never exist for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from butterfly_llm.config import ButterflyConfig

Angles = tuple[Tensor, Tensor]  # of `ops.rope`
Mode = Literal["auto", "none", "layer", "nested"]
# Shares of the free memory that a plan may fill: allocators leave gaps, more where much is recomputed.
_FULL, _FULL_RECOMPUTING = 0.93, 0.85
_LOSS_ROWS = 131_072


@dataclass(frozen=True)
class Recompute:
    """How a model recomputes."""

    slots: int | None = None
    """Layer inputs held at a time; None for all of them."""
    slice_rows: int = 16_384
    """Characters (of all rows of the batch together) that are taken through a layer's products at a time."""
    whole: int = 0
    """The last layers that keep everything, where all inputs are held."""

    def segments(self, num_layers: int) -> list[tuple[int, int]]:
        """Layers (start, stop) to run as one: the last segment needs no second run.

        While a segment is run again, the inputs of those behind it are no longer needed: each may be a layer
        longer than the one after it. ValueError where the slots are too few.
        """
        slots = num_layers if self.slots is None else self.slots
        for count in range(1, slots + 1):
            sizes = [slots - i for i in range(count)]  # first to last
            if sum(sizes) >= num_layers:
                break
        else:
            fewest = fewest_slots(num_layers)
            raise ValueError(f"{slots} slots are too few to recompute {num_layers} layers: it takes {fewest}")
        borders, stop = [], num_layers
        for size in reversed(sizes):
            borders.append((max(0, stop - size), stop))
            stop -= size
        return borders[::-1]


def fewest_slots(num_layers: int) -> int:
    """The smallest s with s (s + 1) / 2 >= num_layers: every layer is run at most three times."""
    slots = 1
    while slots * (slots + 1) // 2 < num_layers:
        slots += 1
    return slots


class SlicedLayer(Protocol):
    """What a layer must offer; characters are rows (T, .)."""

    project: Callable[[Any, Tensor, Tensor | None, Angles | None], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Any, Tensor, Tensor, Any], Tensor]

    def __call__(
        self, x: Tensor, memory: Tensor | None, angles: Angles | None, stride: int, backend: Any
    ) -> Tensor: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stride: int, backend: Any) -> Tensor: ...

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]: ...


def recomputed_layer(
    layer: SlicedLayer,
    x: Tensor,
    memory: Tensor | None,
    angles: Angles | None,
    stride: int,
    backend: Any,
    slice_rows: int,
) -> Tensor:
    """x (B, N, d), memory (B, N, M) or None -> (B, N, d); keeps x and memory alone for the backward pass."""
    project, finish = layer.parts()
    y = _Recomputed.apply(layer, angles, stride, backend, slice_rows, x, memory, *project, *finish)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: SlicedLayer,
        angles: Angles | None,
        stride: int,
        backend: Any,
        slice_rows: int,
        x: Tensor,
        memory: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, memory)
        ctx.rest = layer, angles, stride, backend, slice_rows
        if x.shape[:2].numel() <= slice_rows:
            return layer(x, memory, angles, stride, backend)
        q, k, v = _project(layer, x, memory, angles, slice_rows)
        y = layer.attend(q, k, v, stride, backend).flatten(0, 1)
        del q, k, v
        rows = x.flatten(0, 1)
        out = torch.empty_like(rows)
        for part in _slices(len(rows), slice_rows):
            out[part] = layer.finish(layer, rows[part], y[part], backend)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, memory = ctx.saved_tensors
        layer, angles, stride, backend, slice_rows = ctx.rest
        project, finish = layer.parts()
        rows, lanes = x.flatten(0, 1), None if memory is None else memory.flatten(0, 1)
        dout = gradients[0].flatten(0, 1)
        slices = _slices(len(rows), slice_rows)
        if len(slices) == 1:  # nothing needs to be projected twice
            leaves = [z.detach().requires_grad_() for z in (x, memory) if z is not None]
            with torch.enable_grad():
                out = layer(*leaves, *((None,) if memory is None else ()), angles, stride, backend)
            found = torch.autograd.grad(out, [*leaves, *project, *finish], gradients[0])
            return (None,) * 5 + (*found[: len(leaves)], *([None] * (2 - len(leaves))), *found[len(leaves) :])

        q, k, v = (z.requires_grad_() for z in _project(layer, x, memory, angles, slice_rows))
        with torch.enable_grad():
            y = layer.attend(q, k, v, stride, backend)
        heard = y.detach().flatten(0, 1)
        dx, dy = torch.empty_like(rows), torch.empty_like(heard)
        finish_sum = [torch.zeros_like(p) for p in finish]
        for part in slices:
            inputs = [rows[part].detach().requires_grad_(), heard[part].requires_grad_()]
            with torch.enable_grad():
                out = layer.finish(layer, *inputs, backend)
            found = torch.autograd.grad(out, [*inputs, *finish], dout[part])
            dx[part], dy[part] = found[:2]
            _add(finish_sum, found[2:])
        del dout, heard
        dq, dk, dv = (z.flatten(0, 1) for z in torch.autograd.grad(y, [q, k, v], dy.view_as(y)))
        del q, k, v, y, dy

        dmemory = None if lanes is None else torch.empty_like(lanes)
        project_sum = [torch.zeros_like(p) for p in project]
        for part in slices:
            inputs = [rows[part].detach().requires_grad_()]
            if lanes is not None:
                inputs.append(lanes[part].detach().requires_grad_())
            with torch.enable_grad():
                memory_rows = inputs[1] if len(inputs) > 1 else None
                outputs = layer.project(layer, inputs[0], memory_rows, _angles_of(angles, part))
            found = torch.autograd.grad(outputs, [*inputs, *project], [dq[part], dk[part], dv[part]])
            dx[part] += found[0]
            if dmemory is not None:
                dmemory[part] = found[1]
            _add(project_sum, found[len(inputs) :])
        return (
            *(None,) * 5,
            dx.view(x.shape),
            None if dmemory is None else dmemory.view(memory.shape),
            *project_sum,
            *finish_sum,
        )


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _project(
    layer: SlicedLayer, x: Tensor, memory: Tensor | None, angles: Angles | None, slice_rows: int
) -> list[Tensor]:
    """q, k, v (B, N, ., D) without a graph."""
    rows, lanes = x.flatten(0, 1), None if memory is None else memory.flatten(0, 1)
    whole: list[Tensor] = []
    with torch.no_grad():
        for part in _slices(len(rows), slice_rows):
            memory_rows = None if lanes is None else lanes[part]
            found = layer.project(layer, rows[part], memory_rows, _angles_of(angles, part))
            if not whole:
                whole = [z.new_empty(len(rows), *z.shape[1:]) for z in found]
            for all_rows, z in zip(whole, found, strict=True):
                all_rows[part] = z
    return [z.view(*x.shape[:2], *z.shape[1:]) for z in whole]


def _angles_of(angles: Angles | None, rows: slice) -> Angles | None:
    """The angles of some of the rows."""
    if angles is None:
        return None
    cos, sin = angles
    if rows.start % len(cos) == 0 and rows.stop % len(cos) == 0:
        return angles
    at = torch.arange(rows.start, rows.stop, device=cos.device) % len(cos)
    return cos[at], sin[at]


def _add(sums: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for total, gradient in zip(sums, found, strict=True):
        total += gradient


@dataclass(frozen=True)
class Load:
    """What a forward and backward pass has to hold."""

    config: ButterflyConfig
    chars: int
    """Characters in one pass."""
    value_bytes: int
    """Bytes of an activation."""
    fixed_bytes: int
    """Weights, gradients and the state of the optimisers."""
    compiled: bool = False
    fused: bool = True
    """The attention kernel keeps no copies of keys and values."""
    fused_feed_forward: bool = False
    """The kernels of the feed-forward layer keep its squares alone, and no normalised rows."""

    def nbytes(self, recompute: Recompute | None) -> int:
        """About the peak of a training step; None keeps every activation."""
        config = self.config
        hidden, carry = config.hidden_size, config.carry_width
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        wide = (5 if config.feed_forward == "swiglu" else 3) * config.intermediate_size
        layer = 5 * hidden + 8 * queries + wide + 6 * carry
        copies = 0 if self.fused else 4 * queries + 8 * keys  # chunk by chunk, own and partner side by side
        layer += copies // 2
        if self.compiled:
            layer = layer * 4 // 5  # `small`, 131,072 characters: 76.7 GB were measured, 76 are estimated
        if self.fused_feed_forward:
            layer -= config.intermediate_size * (1 if self.compiled else 2) + hidden
        if recompute is None:
            return self.fixed_bytes + self.chars * layer * config.num_layers * self.value_bytes
        slots = min(recompute.slots or config.num_layers, config.num_layers)
        kept = slots * (hidden + carry) + config.num_passes * carry
        # One layer in the backward pass: x, dx, the gradient that came in, q k v y and their gradients.
        working = 3 * hidden + 4 * queries + 4 * keys + 4 * carry + copies
        rows = min(self.chars, recompute.slice_rows)
        logits = min(self.chars, _LOSS_ROWS) * config.vocab_size * (self.value_bytes + 8)
        return (
            self.fixed_bytes
            + self.chars * (kept + working + recompute.whole * layer) * self.value_bytes
            + max(2 * rows * layer * self.value_bytes, logits)
        )

    def plan(self, mode: Mode, free: int | None) -> Recompute | None:
        """The fastest way that `mode` allows and that fits into `free` bytes; else the one that takes least.

        free: None for no limit.
        """
        layers = self.config.num_layers

        def fits(recompute: Recompute | None) -> bool:
            share = _FULL if recompute is None else _FULL_RECOMPUTING
            return free is None or self.nbytes(recompute) <= share * free

        if mode == "none" or (mode == "auto" and fits(None)):
            return None
        if mode == "layer":
            return Recompute()
        if mode == "auto":
            sizes = (self.chars, Recompute.slice_rows)
            plans = [Recompute(whole=n, slice_rows=rows) for n in range(layers - 1, -1, -1) for rows in sizes]

            def cost(recompute: Recompute) -> float:
                """Layers run again; slices project twice, which is about a third of a layer."""
                again = layers - recompute.whole
                return again if recompute.slice_rows >= self.chars else 4 / 3 * again

            if found := min(filter(fits, plans), key=cost, default=None):
                return found
        fewest = fewest_slots(layers)
        slots = (slots for slots in range(layers - 1, fewest, -1) if fits(Recompute(slots)))
        return Recompute(next(slots, min(fewest, layers)))


def describe(recompute: Recompute | None, num_layers: int) -> str:
    """A plan in words."""
    if recompute is None:
        return "every activation is kept"
    if recompute.slots is None:
        layers = f"{num_layers - recompute.whole} of {num_layers} layers"
        return f"{layers} are recomputed from their inputs (gradient_checkpointing layer)"
    segments = len(recompute.segments(num_layers))
    return (
        f"layers are recomputed from {recompute.slots} inputs at a time, in {segments} segments "
        "(gradient_checkpointing nested)"
    )
