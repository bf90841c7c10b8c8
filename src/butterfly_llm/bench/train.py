"""Time and memory of whole training steps on the device at hand, for each attention backend.

    butterfly bench train --preset small --chars 131072 --lengths 4096 65536
    butterfly bench train --preset full --levels 13 --chars 1048576 --lengths 1048576 --steps 2

Random text: only shapes matter here. Model FLOPs utilisation counts what the model needs and nothing that is
run twice: 6 operations a parameter (the embedding is a lookup) and character, and the visible keys.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch

from butterfly_llm.bench import run
from butterfly_llm.bench.models import add_preset_options, chunks_read, config_of
from butterfly_llm.bench.stream import matmul_rate
from butterfly_llm.captured import Accumulate, CapturedLoss, accumulate
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.memory import available_bytes, require
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import backends, feed_forward
from butterfly_llm.optim import Optimizers, fixed_bytes
from butterfly_llm.recompute import Load, Mode, describe

# Operations a second of dense bfloat16 products with float32 sums, as the makers state them.
NOMINAL = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}


def step_operations(model: Butterfly) -> float:
    """Of one training step, for each character: forward once and backward twice as much."""
    config = model.config
    keys = chunks_read(model) * config.chunk_size
    weights = model.num_parameters() - model.num_lookup_parameters()
    return 6 * weights + 12 * keys * config.num_heads * config.head_dim


def time_steps(
    config: ButterflyConfig,
    length: int,
    chars: int,
    backend: str,
    steps: int,
    compiled: bool,
    graph: bool,
    mode: Mode,
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    free = available_bytes(device)
    model = Butterfly(config).to(device)
    model.compute_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model.backend = backend  # type: ignore[assignment]
    load = Load(
        config,
        chars=chars,
        value_bytes=model.compute_dtype.itemsize,
        fixed_bytes=fixed_bytes(model),
        compiled=compiled,
        fused=backend == "triton",
        fused_feed_forward=backend == "triton" and feed_forward.reason_against(config) is None,
    )
    plan = load.plan(mode, free, available_bytes() if device == "cuda" else 0)
    on_host = load.host_bytes(plan)
    require(on_host, "cpu", "bench train --recompute offload", "use --recompute nested, or lower --chars")
    model.gradient_checkpointing, model.recompute = plan is not None, plan or model.recompute
    if compiled:
        model.compile_layers()
    optimizers = Optimizers(model, TrainConfig())
    gradients: Accumulate = functools.partial(accumulate, model)
    graph = graph and device == "cuda" and not on_host
    if graph:
        gradients, optimizers.drop_gradients = CapturedLoss(model), False
    ids = torch.randint(0, 256, (chars // length, length + 1), device=device)
    bad = torch.zeros((), dtype=torch.bool, device=device)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {"gradients": [], "optimiser": []}  # type: dict[str, list[float]]
    begin = wait()
    first = 0.0
    for step in range(steps + 2):
        start = wait()
        gradients(ids[:, :-1], ids[:, 1:], None, 1.0)
        backward = wait()
        optimizers.step(1e-4, bad)
        end = wait()
        if step == 0:
            first = end - begin
        elif step >= 2:
            seconds["gradients"].append(backward - start)
            seconds["optimiser"].append(end - backward)
    times = {key: sorted(values)[len(values) // 2] for key, values in seconds.items()}
    total = sum(times.values())
    rate = chars * step_operations(model) / total
    return {
        "what": f"training, {backend}",
        "length": length,
        "chars": chars,
        "backend": backend,
        "compiled": compiled,
        "cuda_graph": graph,
        "feed_forward": feed_forward.reason_against(config) or "fused",
        "recompute": describe(plan, config.num_layers),
        "estimated_bytes": load.nbytes(plan),
        "host_bytes": on_host,
        "ms": {key: round(1000 * value, 1) for key, value in times.items()},
        "chars_per_second": round(chars / total),
        "model_tflops": round(rate / 1e12, 5),
        "first_step_seconds": round(first, 1),
        "bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    add_preset_options(parser, "small")
    parser.add_argument("--chars", type=int, default=131072, help="characters in a step")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 65536], help="characters in a window"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["triton", "torch"],
        choices=list(backends()),
        help="of the attention",
    )
    parser.add_argument(
        "--recompute",
        choices=get_args(Mode),
        default="auto",
        help="what the backward pass recomputes, as gradient_checkpointing of a run",
    )
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after two that do not count")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument(
        "--plain-feed-forward", action="store_true", help="without its kernels, as PyTorch compiles it"
    )
    parser.add_argument("--no-graph", action="store_true", help="launch from the host, no CUDA graph")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.steps < 1 or not 1 <= min(options.lengths) <= max(options.lengths) <= options.chars:
        raise ValueError("bench train: --steps must be at least 1, --lengths from 1 to --chars")
    config = config_of(options)
    feed_forward.ENABLED = not options.plain_feed_forward
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    nominal = next((rate for name, rate in NOMINAL.items() if name in device), None)
    measured = matmul_rate(*(("cpu", torch.float32) if device == "cpu" else ("cuda", torch.bfloat16)))
    rows = []
    for backend in options.backends:
        if backends()[backend] != "available":
            print(f"{backend}: {backends()[backend]}")
            continue
        for length in options.lengths:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                row = {"preset": options.preset, "carry_heads": config.carry_heads} | time_steps(
                    config,
                    length,
                    options.chars,
                    backend,
                    options.steps,
                    not options.eager,
                    not options.no_graph,
                    options.recompute,
                )
            except torch.OutOfMemoryError as failure:
                print(f"{backend} at {length}: {str(failure).splitlines()[0]}")
                continue
            operations = 1e12 * row["model_tflops"]
            row["share_of_matmul"] = round(operations / measured, 5)
            row["share_of_nominal"] = round(operations / nominal, 3) if nominal else None
            rows.append(row)
            print(json.dumps(row), flush=True)
    names = ("chars/s", "TFLOP/s", "of matmul", "of nominal", "first step", "peak GB")
    print(f"{'backend':10}{'length':>10}" + "".join(f"{name:>12}" for name in names))
    for row in rows:
        share, peak = row["share_of_nominal"], row["bytes"]
        print(
            f"{row['backend']:10}{row['length']:>10}{row['chars_per_second']:>12,}{row['model_tflops']:>12.1f}"
            f"{row['share_of_matmul']:>12.1%}{'-' if share is None else f'{share:.1%}':>12}"
            f"{row['first_step_seconds']:>11}s{f'{peak / 1e9:.1f}' if peak else '-':>12}"
        )
    return {
        "device": device,
        "torch": torch.__version__,
        "matmul_tflops": round(measured / 1e12, 5),
        "nominal_tflops": nominal and round(nominal / 1e12),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("train", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
