"""Reading and writing a stream, as shares of what this machine can do.

    butterfly bench stream                            # the shipped model on the CPU
    butterfly bench stream --model PATH --device cuda

Measures in one run, so that the shares hold on a noisy machine: a matrix product and a read of memory (the
ceilings), prefill of each context, and single steps after each of them in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from butterfly_llm.bench import run
from butterfly_llm.bench.models import chunks_read
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
    """Operations a second of a product of square matrices, large enough to hide its launch."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 5, device)


def read_bandwidth(device: str) -> float:
    """Bytes a second of summing 512 MB."""
    x = torch.randn(1 << 27, device=device)
    return x.nbytes / seconds(x.sum, 5, device)


def prefill_operations(model: Butterfly, num_chars: int) -> float:
    """Multiplications and additions: 2 for each matrix element and character, and those of visible keys."""
    config = model.config
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    matrices += sum(p.numel() for m in (model.writes, model.merges) for p in m.parameters() if p.ndim == 2)
    keys = chunks_read(model) * config.chunk_size
    return num_chars * (2 * matrices + 4 * keys * config.num_heads * config.head_dim)


def step_bytes(model: Butterfly, cache: Cache) -> int:
    """What a step must read: every matrix in the compute dtype, keys and values of a layer's chunks."""
    values = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.num_lookup_parameters()
    weights = values * model.compute_dtype.itemsize
    chunk = cache.keys[0][:, :, :1].nbytes + cache.values[0][:, :, :1].nbytes
    return int(weights + chunks_read(model) * chunk)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder; default: the shipped one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 65_536], help="characters of the contexts"
    )
    parser.add_argument("--steps", type=int, default=256, help="characters written after each")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lengths = sorted(set(options.lengths))
    if lengths[0] < 1 or options.steps < 1:
        raise ValueError("bench stream: --lengths and --steps must be at least 1")
    device = str(pick_device(options.device))
    model = load_pretrained(options.model, device=device)
    dtype = model.compute_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    rate, bandwidth = matmul_rate(device, dtype), read_bandwidth(device)
    longest = lengths[-1]
    text = torch.randint(32, 127, (1, longest), device=device)
    model.prefill(text[:, :4096], model.new_cache())
    caches, reading = {}, {}
    for length in lengths:
        caches[length] = model.new_cache()
        start = time.perf_counter()
        model.prefill(text[:, :length], caches[length])
        wait(device)
        reading[length] = time.perf_counter() - start
    rate_after = matmul_rate(device, dtype)

    # In turn, character by character: all see the same weather. All start on a chunk boundary.
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for step in range(options.steps + 8):
        for length, cache in caches.items():
            character = text[:, step % longest]
            wait(device)
            start = time.perf_counter()
            model.step(character, cache)
            wait(device)
            if step >= 8:
                times[length].append(time.perf_counter() - start)
    bandwidth_after = read_bandwidth(device)
    steps = {length: statistics.median(times[length]) for length in lengths}
    bytes_read = step_bytes(model, caches[longest])
    prefill_share = prefill_operations(model, longest) / reading[longest] / ((rate + rate_after) / 2)
    step_share = bytes_read / steps[longest] / ((bandwidth + bandwidth_after) / 2)
    rows: list[dict[str, Any]] = []
    print(f"matrix product      {rate / 1e9:10,.1f} GFLOP/s, then {rate_after / 1e9:,.1f}")
    print(f"memory read         {bandwidth / 1e9:10,.1f} GB/s, then {bandwidth_after / 1e9:,.1f}")
    print(
        f"{'characters':>10}{'read, a second':>16}{'step, ms':>12}{'written, a second':>20}{'state, MB':>12}"
    )
    for length, cache in caches.items():
        read, written = length / reading[length], 1 / steps[length]
        rows += [
            {"what": "reading", "length": length, "chars_per_second": round(read)},
            {
                "what": "writing",
                "length": length,
                "chars_per_second": round(written, 1),
                "bytes": cache.nbytes,
            },
        ]
        print(
            f"{length:>10,}{read:>16,.0f}{1e3 * steps[length]:>12.2f}{written:>20,.1f}"
            f"{cache.nbytes / 1e6:>12,.1f}"
        )
    print(
        f"at {longest:,}: reading is {prefill_share:.0%} of the matrix product, "
        f"writing {step_share:.0%} of the bandwidth limit, "
        f"a step takes {steps[longest] / steps[lengths[0]]:.3f} of one at {lengths[0]:,}"
    )
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "matmul_gflops": [round(rate / 1e9, 1), round(rate_after / 1e9, 1)],
        "read_gbps": [round(bandwidth / 1e9, 1), round(bandwidth_after / 1e9, 1)],
        "prefill_share_of_matmul": round(prefill_share, 3),
        "step_share_of_bandwidth": round(step_share, 3),
        "step_bytes": bytes_read,
        "step_long_over_short": round(steps[longest] / steps[lengths[0]], 4),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("stream", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
