"""What the backward pass recomputes instead of keeping, and how much memory each choice takes.

Keeping everything is fastest. Next, only the input of each layer is kept and the layer is run once more in
the backward pass. For the longest sequences not even every input fits: then the first ones go to the host's
memory (`offload`), or `slots` of them are held at a time, at the borders of segments, and a segment is run
once more to get at the inputs inside it.

A recomputed layer takes all that sees characters as rows in slices of rows, forward and backward, so that the
wide feed-forward activations never exist for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.offload import LayerInput, host_bytes

Angles = tuple[Tensor, Tensor]  # of `ops.rope`
Mode = Literal["auto", "none", "layer", "offload", "nested"]
# Shares of the free memory that a plan may fill: allocators leave gaps, more where much is recomputed.
_FULL, _FULL_RECOMPUTING = 0.93, 0.85
_FULL_HOST = 0.8
_LOSS_ROWS = 131_072
_WIDE_ROWS = 65_536  # of a slice, where every one is launched by the host


@dataclass(frozen=True)
class Recompute:
    """How a model recomputes."""

    slots: int | None = None
    """Layer inputs held at a time; None for all of them."""
    slice_rows: int = 16_384
    """Characters (of all rows of the batch together) that are taken through a layer's products at a time."""
    whole: int = 0
    """The last layers that keep everything, where all inputs are held."""
    on_host: int = 0
    """Layers, the first ones, whose inputs lie in the host's memory. Those a pass starts with do not count:
    the carry is written from them, so they stay on the device."""
    keep_projections: bool = False
    """In a layer's backward pass keep what queries, keys and values came from: slices project once then, not
    twice."""

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
    kept: LayerInput | None = None,
    keep_projections: bool = False,
) -> Tensor:
    """x (B, N, d), memory (B, N, M) or None -> (B, N, d); keeps x and memory alone for the backward pass.

    kept: x, where it is kept in another way than with the graph. keep_projections: as in `Recompute`.
    """
    project, finish = layer.parts()
    how = _How(layer, angles, stride, backend, slice_rows, kept, keep_projections)
    y = _Recomputed.apply(how, x, memory, *project, *finish)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


@dataclass(frozen=True)
class _How:
    """What a layer is run with, besides its input and parameters."""

    layer: SlicedLayer
    angles: Angles | None
    stride: int
    backend: Any
    slice_rows: int
    kept: LayerInput | None
    keep_projections: bool


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, x: Tensor, memory: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x if how.kept is None else None, memory)
        ctx.how = how
        layer = how.layer
        if x.shape[:2].numel() <= how.slice_rows:
            return layer(x, memory, how.angles, how.stride, how.backend)
        q, k, v = _project(how, x, memory)[0]
        y = layer.attend(q, k, v, how.stride, how.backend).flatten(0, 1)
        del q, k, v
        rows = x.flatten(0, 1)
        out = torch.empty_like(rows)
        for part in _slices(len(rows), how.slice_rows):
            out[part] = layer.finish(layer, rows[part], y[part], how.backend)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, memory = ctx.saved_tensors
        how: _How = ctx.how
        layer, angles, stride, backend = how.layer, how.angles, how.stride, how.backend
        if how.kept is not None:
            x = how.kept.take()
        project, finish = layer.parts()
        rows, lanes = x.flatten(0, 1), None if memory is None else memory.flatten(0, 1)
        dout = gradients[0].flatten(0, 1)
        slices = _slices(len(rows), how.slice_rows)
        if len(slices) == 1:  # nothing needs to be projected twice
            leaves = [z.detach().requires_grad_() for z in (x, memory) if z is not None]
            with torch.enable_grad():
                out = layer(leaves[0], leaves[1] if len(leaves) > 1 else None, angles, stride, backend)
            found = torch.autograd.grad(out, [*leaves, *project, *finish], gradients[0])
            return (None, *found[: len(leaves)], *([None] * (2 - len(leaves))), *found[len(leaves) :])

        whole, graphs = _project(how, x, memory, keep_graphs=how.keep_projections)
        q, k, v = (z.requires_grad_() for z in whole)
        del whole
        with torch.enable_grad():
            y = layer.attend(q, k, v, stride, backend)
        heard = y.detach().flatten(0, 1)
        dx, dy = torch.empty_like(rows), torch.empty_like(heard)
        finish_sum = [torch.zeros_like(p) for p in finish]
        for part in slices:
            own, theirs = rows[part].detach().requires_grad_(), heard[part].requires_grad_()
            with torch.enable_grad():
                out = layer.finish(layer, own, theirs, backend)
            found = torch.autograd.grad(out, [own, theirs, *finish], dout[part])
            dx[part], dy[part] = found[:2]
            _add(finish_sum, found[2:])
        del dout, heard
        dq, dk, dv = (z.flatten(0, 1) for z in torch.autograd.grad(y, [q, k, v], dy.view_as(y)))
        del q, k, v, y, dy

        dmemory = None if lanes is None else torch.empty_like(lanes)
        project_sum = [torch.zeros_like(p) for p in project]
        for part in slices:
            graph = graphs.pop(0) if graphs else _projected(how, rows, lanes, part)[1]
            found = torch.autograd.grad(
                graph.outputs, [*graph.inputs, *project], [dq[part], dk[part], dv[part]]
            )
            dx[part] += found[0]
            if dmemory is not None:
                dmemory[part] = found[1]
            _add(project_sum, found[len(graph.inputs) :])
        return (
            None,
            dx.view(x.shape),
            None if dmemory is None else dmemory.view(memory.shape),
            *project_sum,
            *finish_sum,
        )


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Graph(NamedTuple):
    """How queries, keys and values of some rows came about; without the values themselves."""

    inputs: list[Tensor]
    """x and, where there is one, the carry."""
    outputs: list[GradientEdge]


def _projected(how: _How, rows: Tensor, lanes: Tensor | None, part: slice) -> tuple[list[Tensor], _Graph]:
    """q, k, v (T, ., D) of some rows, without and with a graph."""
    inputs = [z[part].detach().requires_grad_() for z in (rows, lanes) if z is not None]
    with torch.enable_grad():
        memory_rows = inputs[1] if len(inputs) > 1 else None
        found = how.layer.project(how.layer, inputs[0], memory_rows, _angles_of(how.angles, part))
    return [z.detach() for z in found], _Graph(inputs, [get_gradient_edge(z) for z in found])


def _project(
    how: _How, x: Tensor, memory: Tensor | None, keep_graphs: bool = False
) -> tuple[list[Tensor], list[_Graph]]:
    """q, k, v (B, N, ., D) without a graph, and where asked for the graphs of the slices."""
    rows, lanes = x.flatten(0, 1), None if memory is None else memory.flatten(0, 1)
    whole: list[Tensor] = []
    graphs = []
    for part in _slices(len(rows), how.slice_rows):
        if keep_graphs:
            found, graph = _projected(how, rows, lanes, part)
            graphs.append(graph)
        else:
            memory_rows = None if lanes is None else lanes[part]
            with torch.no_grad():
                angles = _angles_of(how.angles, part)
                found = list(how.layer.project(how.layer, rows[part], memory_rows, angles))
        if not whole:
            whole = [z.new_empty(len(rows), *z.shape[1:]) for z in found]
        for all_rows, z in zip(whole, found, strict=True):
            all_rows[part] = z
    return [z.view(*x.shape[:2], *z.shape[1:]) for z in whole], graphs


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
        # Chunk by chunk, own, partner and local ones side by side.
        local = [config.local_of(index) for index in range(config.num_layers)]
        copies = 0 if self.fused else 4 * queries + 4 * (2 + max(local)) * keys
        if not self.fused:  # kept by layers of both kinds
            layer += 2 * queries + 2 * (2 * len(local) + sum(local)) * keys // len(local)
        if self.compiled:
            layer = layer * 4 // 5  # `small`, 131,072 characters: 76.7 GB were measured, 76 are estimated
        if self.fused_feed_forward:
            layer -= config.intermediate_size * (1 if self.compiled else 2) + hidden
        if recompute is None:
            return self.fixed_bytes + self.chars * layer * config.num_layers * self.value_bytes
        slots = min(recompute.slots or config.num_layers - recompute.whole, config.num_layers)
        kept = slots * (hidden + carry) + config.num_passes * carry
        # One layer in the backward pass: x, dx, the gradient that came in, q k v y and their gradients.
        working = 3 * hidden + 4 * queries + 4 * keys + 4 * carry + copies
        if recompute.on_host:
            kept -= (recompute.on_host - 1) * hidden  # one is being fetched
        if recompute.keep_projections:
            working += hidden + queries + 4 * keys + carry
        rows = min(self.chars, recompute.slice_rows)
        logits = min(self.chars, _LOSS_ROWS) * config.vocab_size * (self.value_bytes + 8)
        return (
            self.fixed_bytes
            + self.chars * (kept + working) * self.value_bytes
            # At the end of the forward pass; or later, one layer run again, when the whole ones are gone.
            + max(
                self.chars * recompute.whole * layer * self.value_bytes + logits,
                2 * rows * layer * self.value_bytes,
            )
        )

    def host_bytes(self, recompute: Recompute | None) -> int:
        """Bytes of the host's memory that layer inputs take, on a GPU pinned."""
        on_host = 0 if recompute is None else recompute.on_host
        return on_host * host_bytes(self.chars * self.config.hidden_size * self.value_bytes)

    def plan(self, mode: Mode, free: int | None, free_host: int | None = 0) -> Recompute | None:
        """The fastest way that `mode` allows and that fits into `free` bytes; else the one that takes least.

        free: None for no limit. free_host: of the host's memory, 0 where inputs cannot be fetched ahead of
        the computation; `offload` by name does not ask for it.
        """
        layers = self.config.num_layers

        def fits(recompute: Recompute | None) -> bool:
            share = _FULL if recompute is None else _FULL_RECOMPUTING
            return free is None or self.nbytes(recompute) <= share * free

        def fits_host(recompute: Recompute) -> bool:
            return free_host is None or self.host_bytes(recompute) <= _FULL_HOST * free_host

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
        if mode in ("auto", "offload"):
            passes = self.config.num_passes + (self.config.num_extra_levels > 0)
            most = layers - (passes if self.config.carry_width else 0)
            counts = range(1, most + 1)
            offloads = [
                Recompute(on_host=n, keep_projections=keep, slice_rows=rows)
                for keep in (True, False)
                for rows in (_WIDE_ROWS, Recompute.slice_rows)
                for n in counts
            ]
            fitting = (plan for plan in offloads if fits(plan) and (mode == "offload" or fits_host(plan)))
            if found := next(fitting, offloads[-1] if mode == "offload" else None):
                return found
        fewest = fewest_slots(layers)
        slots = (slots for slots in range(layers - 1, fewest, -1) if fits(Recompute(slots)))
        return Recompute(next(slots, min(fewest, layers)))


def describe(recompute: Recompute | None, num_layers: int) -> str:
    """A plan in words."""
    if recompute is None:
        return "every activation is kept"
    if recompute.on_host:
        return (
            f"layers are recomputed from their inputs, {recompute.on_host} of {num_layers} of which go to "
            f"the host's memory, in slices of {recompute.slice_rows:,}, without a CUDA graph "
            "(gradient_checkpointing offload)"
        )
    if recompute.slots is None:
        layers = f"{num_layers - recompute.whole} of {num_layers} layers"
        return f"{layers} are recomputed from their inputs (gradient_checkpointing layer)"
    segments = len(recompute.segments(num_layers))
    return (
        f"layers are recomputed from {recompute.slots} inputs at a time, in {segments} segments "
        "(gradient_checkpointing nested)"
    )
