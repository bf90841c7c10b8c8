"""Reading and writing a stream, as shares of what this machine can do.

    butterfly bench stream                            # the shipped model on the CPU
    butterfly bench stream --model PATH --device cuda

Measures in one run, so that the shares hold on a noisy machine: a matrix product and a read of memory (the
ceilings), prefill of the long context, and single steps after a short and after the long context in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from butterfly_llm.bench import run
from butterfly_llm.cache import Cache
from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly


def seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    """Fastest of `repeats` runs after a first one that does not count."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a 2048^3 product."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    return 2 * 2048**3 / seconds(lambda: a @ b, 5, device)


def read_bandwidth(device: str) -> float:
    """Bytes a second of summing 512 MB."""
    x = torch.randn(1 << 27, device=device)
    return x.nbytes / seconds(x.sum, 5, device)


def prefill_operations(model: Butterfly, num_chars: int) -> float:
    """Multiplications and additions: 2 for each matrix element and character, and those of visible keys."""
    config = model.config
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    matrices += sum(p.numel() for m in (model.writes, model.merges) for p in m.parameters() if p.ndim == 2)
    keys = 1.5 * config.chunk_size * config.num_layers  # half of the own chunk, all of the partner
    return num_chars * (2 * matrices + 4 * keys * config.num_heads * config.head_dim)


def step_bytes(model: Butterfly, cache: Cache) -> int:
    """What one character must read: every matrix once, and keys and values of two chunks a layer."""
    weights = sum(p.nbytes for p in model.parameters() if p.ndim == 2) - model.embed.weight.nbytes
    rings = sum(x[:, :, :1].nbytes for x in (*cache.keys, *cache.values))
    return int(weights + 1.5 * rings)  # half of the own chunk on average


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder; default: the shipped one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--short", type=int, default=1024, help="characters of the short context")
    parser.add_argument("--long", type=int, default=65_536, help="characters of the long context")
    parser.add_argument("--steps", type=int, default=256, help="characters written after each")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= options.short <= options.long or options.steps < 1:
        raise ValueError("bench stream: --short must be from 1 to --long, and --steps at least 1")
    device = str(pick_device(options.device))
    model = load_pretrained(options.model, device=device)
    dtype = model.compute_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    rate, bandwidth = matmul_rate(device, dtype), read_bandwidth(device)
    text = torch.randint(32, 127, (1, options.long), device=device)
    model.prefill(text[:, :4096], model.new_cache())
    caches = {length: model.new_cache() for length in (options.short, options.long)}
    model.prefill(text[:, : options.short], caches[options.short])
    start = time.perf_counter()
    model.prefill(text, caches[options.long])
    wait(device)
    reading = time.perf_counter() - start
    rate_after = matmul_rate(device, dtype)

    # In turn, character by character: both see the same weather. Both start on a chunk boundary.
    times: dict[int, list[float]] = {length: [] for length in caches}
    for step in range(options.steps + 8):
        for length, cache in caches.items():
            character = text[:, step % options.long]
            wait(device)
            start = time.perf_counter()
            model.step(character, cache)
            wait(device)
            if step >= 8:
                times[length].append(time.perf_counter() - start)
    bandwidth_after = read_bandwidth(device)
    short, long = (statistics.median(times[length]) for length in caches)
    bytes_read = step_bytes(model, caches[options.long])
    result = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "matmul_gflops": [round(rate / 1e9, 1), round(rate_after / 1e9, 1)],
        "read_gbps": [round(bandwidth / 1e9, 1), round(bandwidth_after / 1e9, 1)],
        "prefill_chars": options.long,
        "prefill_chars_per_second": round(options.long / reading),
        "prefill_share_of_matmul": round(
            prefill_operations(model, options.long) / reading / ((rate + rate_after) / 2), 3
        ),
        "step_ms": {str(options.short): round(short * 1e3, 2), str(options.long): round(long * 1e3, 2)},
        "step_long_over_short": round(long / short, 4),
        "steps_per_second": round(1 / long, 1),
        "step_bytes": bytes_read,
        "step_share_of_bandwidth": round(bytes_read / long / ((bandwidth + bandwidth_after) / 2), 3),
        "state_bytes": caches[options.long].nbytes,
    }
    print(f"matrix product      {rate / 1e9:10,.1f} GFLOP/s, then {rate_after / 1e9:,.1f}")
    print(f"memory read         {bandwidth / 1e9:10,.1f} GB/s, then {bandwidth_after / 1e9:,.1f}")
    print(
        f"prefill             {options.long / reading:10,.0f} characters/s"
        f"   {result['prefill_share_of_matmul']:.0%} of the matrix product"
    )
    print(
        f"step                {1 / long:10,.1f} characters/s"
        f"   {result['step_share_of_bandwidth']:.0%} of the bandwidth limit"
    )
    print(f"step after {options.long:,} characters against {options.short:,}: {long / short:.3f}")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    run("stream", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
