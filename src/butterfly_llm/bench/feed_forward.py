"""The half of a layer behind the attention: as the compiler makes it, and with the fused feed-forward kernel.

    butterfly bench feed_forward --preset small --rows 131072
    butterfly bench feed_forward --preset full --rows 65536

First each pass of the kernel with several tiles, then both forms with the best: time, what they keep for the
backward pass, and the error of result and gradients against float64. Without a GPU only the first, eager.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.bench.stream import seconds
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.layers import Layer
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import backends, feed_forward
from butterfly_llm.ops.feed_forward import Pass, Tiles

TILES = [
    Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 2),
    Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 128, 8, 2), Tiles(128, 256, 64, 8, 3),
    Tiles(128, 256, 64, 8, 4), Tiles(256, 128, 64, 8, 3), Tiles(64, 256, 64, 8, 3),
    Tiles(64, 256, 64, 4, 3), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3),
]  # fmt: skip
_ERROR_ROWS = 1024
_REPEATS = 15  # the fastest counts


def kernel_rows(config: ButterflyConfig, rows: int) -> list[dict[str, Any]]:
    """Each pass of the kernel with each of TILES, fastest first; leaves the best of each in FORCED_TILES."""
    size, inner = config.hidden_size, config.intermediate_size
    x = torch.randn(rows, size, device="cuda").bfloat16()
    weight = (torch.randn(inner, size, device="cuda") / size**0.5).bfloat16()
    factor, hidden = torch.ones(rows, device="cuda"), torch.rand(rows, inner, device="cuda").bfloat16()

    def timed(which: Pass, cut: Tiles) -> float | None:
        """Milliseconds; None where the tiles do not divide the widths or do not fit this card."""
        if inner % cut.block_n or size % cut.block_k:
            return None
        feed_forward.FORCED_TILES[which] = cut
        held = None if which == "forward" else hidden
        try:
            return 1e3 * seconds(
                lambda: feed_forward._launch(which, x, weight, factor, held), _REPEATS, "cuda"
            )
        except Exception as failure:  # Triton's own: shared memory, registers
            print(f"{which} {cut}: {str(failure).splitlines()[0]}")
            return None

    found = []
    for which in get_args(Pass):
        nbytes = x.nbytes + hidden.nbytes * (1 if which == "forward" else 2)
        times = sorted((ms, i) for i, cut in enumerate(TILES) if (ms := timed(which, cut)) is not None)
        if times:
            feed_forward.FORCED_TILES[which] = TILES[times[0][1]]
        found += [
            {
                "what": f"kernel, {which}",
                "length": rows,
                "tiles": dataclasses.asdict(TILES[index]),
                "ms": round(ms, 4),
                "tflops": round(2 * rows * size * inner / ms / 1e9, 1),
                "tb_per_second": round(nbytes / ms / 1e9, 3),
            }
            for ms, index in times
        ]
    return found


def half_row(layer: Layer, rows: int, fused: bool, device: str) -> dict[str, Any]:
    """Times, memory and errors of one form of `Layer._finish`."""
    config = layer.config
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, config.hidden_size), (rows, config.num_heads, config.head_dim), (rows, config.hidden_size)
    x, y, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    inputs = [x.requires_grad_(), y.requires_grad_()]
    parameters = layer.parts()[1]
    feed_forward.ENABLED = fused
    half: Callable[..., Tensor] = Layer._finish
    if device == "cuda":
        torch._dynamo.reset()
        half = torch.compile(half, dynamic=False, fullgraph=True)

    def both() -> tuple[Tensor, ...]:
        out = half(layer, *inputs, "triton" if fused else "torch")
        return (out.detach(), *torch.autograd.grad(out, [*inputs, *parameters], grad))

    def read() -> Tensor:
        with torch.no_grad():
            return half(layer, *inputs, "triton" if fused else "torch")

    found, kept = both(), None
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        held = half(layer, *inputs, "triton" if fused else "torch")
        kept = torch.cuda.memory_allocated() - before
        del held
    few = min(rows, _ERROR_ROWS)
    exact = [z[:few].detach().double().requires_grad_() for z in inputs]
    wanted = layer.double()._finish(exact[0], exact[1], "torch")
    wanted_gradients = torch.autograd.grad(wanted, exact, grad[:few].double())
    layer.float()
    errors = [
        float((a[:few].double() - b).square().mean().sqrt() / b.square().mean().sqrt())
        for a, b in zip(found, (wanted.detach(), *wanted_gradients), strict=False)
    ]
    return {
        "what": "half a layer, fused" if fused else "half a layer, compiled",
        "length": rows,
        "read_ms": round(1e3 * seconds(read, _REPEATS, device), 3),
        "both_ms": round(1e3 * seconds(both, _REPEATS, device), 3),
        "kept_bytes": kept,
        "errors": [float(f"{error:.2g}") for error in errors],
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", help="full, small, tiny or micro")
    parser.add_argument("--rows", type=int, default=131072, help="characters in a batch")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.rows < 1:
        raise ValueError("bench feed_forward: --rows must be at least 1")
    config = ButterflyConfig.preset(options.preset)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = cast(Layer, Butterfly(config).layers[0]).to(device)
    for matrix in (layer.attention.out.weight, layer.feed_forward.down.weight):
        torch.nn.init.normal_(matrix, std=0.03)
    before = feed_forward.ENABLED
    rows = []
    try:
        if device == "cuda" and backends()["triton"] == "available":
            rows += kernel_rows(config, options.rows)
        for fused in (False, True) if rows else (False,):
            rows.append(half_row(layer, options.rows, fused, device))
    finally:
        feed_forward.ENABLED = before
        feed_forward.FORCED_TILES.clear()
    for row in rows:
        if "tiles" in row:
            cut = " ".join(str(value) for value in row["tiles"].values() if value is not None)
            moved = f"{row['tb_per_second']:8.2f} TB/s{row['tflops']:8.0f} TFLOP/s"
            print(f"{row['what']:24}{row['ms']:9.4f} ms{moved}  {cut}")
        else:
            kept = "" if row["kept_bytes"] is None else f", {row['kept_bytes'] / 1e6:,.0f} MB kept"
            times = f"{row['read_ms']:9.3f} ms read{row['both_ms']:9.3f} ms with backward"
            print(f"{row['what']:24}{times}{kept}, errors {row['errors']}")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"preset": options.preset, "device": name, "torch": torch.__version__, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    run("feed_forward", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
