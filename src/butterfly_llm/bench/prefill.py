"""Reading texts of growing length: characters a second and peak memory.

    butterfly bench prefill                                          # the shipped model on the CPU
    butterfly bench prefill --preset full --device cuda --compile
    butterfly bench prefill --preset full --levels 13 --device cuda --limit-gb 24

Random text, and with --preset random weights: only shapes matter here. Lengths from 8,192 to 1,048,576 on a
GPU, 8,192 on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from butterfly_llm.bench import run
from butterfly_llm.bench.models import add_model_options, facts, model_of
from butterfly_llm.bench.stream import matmul_rate, prefill_operations, seconds, wait
from butterfly_llm.memory import pick_device

LENGTHS = (8192, 65_536, 262_144, 1_048_576)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.set_defaults(bench="prefill")
    parser.add_argument("--lengths", type=int, nargs="+", help="characters of the texts")
    parser.add_argument("--slice", type=int, help="characters read at once; default: by memory")
    parser.add_argument("--repeats", type=int, default=2, help="readings of each text; the fastest counts")
    parser.add_argument("--limit-gb", type=float, help="most memory of the GPU to use, in 10^9 bytes")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = str(pick_device(options.device))
    on_gpu = device.startswith("cuda")
    lengths = sorted(options.lengths or (LENGTHS if on_gpu else LENGTHS[:1]))
    if lengths[0] < 1 or options.repeats < 1 or (options.slice or 1) < 1:
        raise ValueError("bench prefill: --lengths, --slice and --repeats must be at least 1")
    if options.limit_gb is not None:
        if not on_gpu:
            raise ValueError("bench prefill: --limit-gb needs --device cuda")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_gb * 1e9 / total), device)
    model = model_of(options)
    model.prefill_slice = options.slice
    ceiling = matmul_rate(device, model.compute_dtype)
    rows: list[dict[str, Any]] = []
    names = ("chars", "slice", "seconds", "chars/s", "TFLOP/s", "of matmul", "peak GB")
    print("".join(f"{name:>{width}}" for name, width in zip(names, (10, 9, 10, 12, 9, 11, 9), strict=True)))
    for length in lengths:
        ids = torch.randint(32, 127, (1, length), dtype=torch.uint8, device=device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        size = model.slice_chars(1)

        def read(ids: torch.Tensor = ids) -> None:
            model.prefill(ids, model.new_cache())

        try:
            took = seconds(read, options.repeats, device)
        except torch.OutOfMemoryError as failure:
            print(f"{length:>10,} {str(failure).splitlines()[0]}")
            continue
        wait(device)
        rate = prefill_operations(model, length) / took
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
        rows.append(
            {
                "what": "reading",
                "length": length,
                "slice": min(size, length),
                "seconds": round(took, 4),
                "chars_per_second": round(length / took),
                "tflops": round(rate / 1e12, 3),
                "share_of_matmul": round(rate / ceiling, 3),
                "bytes": peak,
            }
        )
        print(
            f"{length:>10,}{min(size, length):>9,}{took:>10.3f}{length / took:>12,.0f}{rate / 1e12:>9.2f}"
            f"{rate / ceiling:>11.0%} {f'{peak / 1e9:.2f}' if peak else '-':>8}",
            flush=True,
        )
    return facts(model) | {"limit_gb": options.limit_gb, "compiled": options.compile, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    run("prefill", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
