"""Where one layer looks: its attention weights on a text, as numbers and as a figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from butterfly_llm.layers import Layer
from butterfly_llm.model import Butterfly
from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.plot.canvas import BLUE, GREY, INK, SOFT, new_figure
from butterfly_llm.routing import partner_of


@torch.inference_mode()
def attention_map(model: Butterfly, ids: Tensor, layer: int) -> Tensor:
    """Attention weights of the last chunk of a text in one layer, (H, Q, C + Q), rows sum to 1.

    ids: (N,) characters; the last chunk holds the last Q = 1 + (N - 1) mod C of them, C characters a chunk.
    The first C columns are the partner chunk (zero where there is none), the other Q the chunk itself.
    ValueError for a layer that there is not, a bidirectional model, an empty text.
    """
    config = model.config
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layer {layer}: there are 0 to {config.num_layers - 1}")
    if not config.causal:
        raise ValueError(f"routing {config.routing!r} is not causal: its last chunk has no partner before it")
    if local := config.local_of(layer):
        raise ValueError(f"plot attention: draws two chunks, layer {layer} reads {local + 2}")
    seen: list[tuple[Tensor, Tensor | None, Any]] = []
    module = cast(Layer, model.layers[layer])
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1], inputs[2])))
    plan = model.recompute
    model.recompute = dataclasses.replace(plan, slice_rows=max(plan.slice_rows, len(ids)))  # whole layers
    try:
        model.hidden(ids[None])
    finally:
        hook.remove()
        model.recompute = plan
    x, memory, angles = seen[0]
    q, k, _ = module._project(x[0], None if memory is None else memory[0], angles)  # (N, H, D), (N, K, D)
    size = config.chunk_size
    chunk = (len(ids) - 1) // size
    partner = partner_of(chunk, model.routes[layer].stride, config.routing)
    q = q[chunk * size :].float()
    own = k[chunk * size :].float()

    def scores(keys: Tensor, ahead: int) -> Tensor:
        """(Q, H, D) against (K, Hkv, D) of the chunk `ahead` characters before -> (H, Q, K)."""
        keys = keys.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)
        turn = torch.tensor([ahead], device=q.device)
        queries = rotate(q, *rope_table(turn, config.head_dim, config.rope_theta, torch.float32))
        return cast(Tensor, torch.einsum("qhd,khd->hqk", queries, keys) / config.head_dim**0.5)

    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    here = scores(own, 0).masked_fill(future, float("-inf"))
    if partner < 0:
        there = here.new_full((config.num_heads, len(q), size), float("-inf"))
    else:
        there = scores(k[partner * size : (partner + 1) * size].float(), size)
    return torch.cat([there, here], -1).softmax(-1).cpu()


def plot_attention(
    model: Butterfly, text: bytes, path: str | Path, *, layer: int, head: int | None = None
) -> None:
    """Draw where the last chunk of `text` looks in one layer, and letter by letter what its end looks at.

    head: one head, None for their mean. Raises as `attention_map` and `plot.routing.plot_routing` do.
    """
    config, size = model.config, model.config.chunk_size
    if not text:
        raise ValueError("plot attention: the text is empty")
    if head is not None and not 0 <= head < config.num_heads:
        raise ValueError(f"head {head}: there are 0 to {config.num_heads - 1}")
    device = next(model.parameters()).device
    maps = attention_map(model, torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device), layer)
    weights = maps.mean(0) if head is None else maps[head]  # (Q, C + Q)
    chunk, stride = (len(text) - 1) // size, model.routes[layer].stride
    partner = partner_of(chunk, stride, config.routing)
    there = text[partner * size : (partner + 1) * size] if partner >= 0 else b""
    queries = len(weights)
    which = "mean of its heads" if head is None else f"head {head}"
    with new_figure(path, width=7.4, height=6.3) as figure:
        grid = figure.add_axes((0.075, 0.41, 0.91, 0.52))
        peak = weights.quantile(0.995).item()
        grid.imshow(weights.numpy(), cmap=_ramp(), vmin=0, vmax=peak, aspect="auto", interpolation="nearest")
        grid.axvline(size - 0.5, color=INK, linewidth=1)
        grid.set_title(
            f"Layer {layer}, {which}: chunk {chunk} attends to itself and to chunk {chunk} \u2212 {stride}"
        )
        grid.set_xticks([])
        grid.set_yticks([0, queries - 1])
        grid.set_ylabel("character that looks", labelpad=-12)
        for middle, name in (
            (size / 2, f"chunk {chunk} \u2212 {stride}"),
            (size + queries / 2, f"chunk {chunk}"),
        ):
            grid.annotate(
                name, (middle, -0.02), xycoords=("data", "axes fraction"), ha="center", va="top", color=SOFT
            )
        grid.tick_params(length=0)
        grid.spines[:].set_color(GREY)
        _draw_text(figure, there, text[chunk * size :], weights[-1], size)


def _draw_text(figure: Any, there: bytes, here: bytes, weights: Tensor, size: int) -> None:
    """Both chunks, 64 characters a line, each character shaded by its weight for the last one."""
    columns, ramp = 64, _ramp()
    axes = figure.add_axes((0.075, 0.02, 0.91, 0.31))
    peak = weights.max().item()
    titled = (
        ("what the last character sees in the chunk it hears", there, 0),
        ("and in its own (framed: the last character)", here, size),
    )
    line = 0.0
    for title, characters, first in titled:
        if not characters:
            continue
        axes.text(0, line + 0.5, title, va="center", color=SOFT)
        line += 1
        for index, code in enumerate(characters):
            row, column = divmod(index, columns)
            weight = weights[first + index].item() / peak
            last = first == size and index == len(characters) - 1
            axes.add_patch(_rectangle(column, line + row, ramp(weight), edge=INK if last else "none"))
            axes.text(
                column + 0.5, line + row + 0.5, _glyph(code), ha="center", va="center", family="monospace",
                color="white" if weight > 0.55 else INK,
            )  # fmt: skip
        line += -(-len(characters) // columns) + 0.4
    axes.set_xlim(0, columns)
    axes.set_ylim(max(line, 6.8), 0)
    axes.set_axis_off()


def _glyph(code: int) -> str:
    """A character as it can be drawn: line ends and blanks made visible, other controls as a dot."""
    if code == 10:
        return "\u21b5"
    return chr(code) if 32 <= code < 127 or code > 160 else "\u00b7"


def _rectangle(x: float, y: float, colour: Any, edge: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (x, y), 1, 1, facecolor=colour, edgecolor=edge, linewidth=1.2, zorder=2 if edge != "none" else 1
    )


def _ramp() -> Any:
    """White to the blue of the house."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("butterfly", ["white", "#BBD7EA", BLUE, "#003B5C"])
