"""Reading a very long stream: memory stays flat, and its end is equal to its reach read afresh.

    python benchmarks/long_read.py --preset small --device cuda --chars 16777216

An untrained model reads random characters in slices. What the last character can have heard lies in as many
chunks before it as all strides add up to; a new stream that reads only those must give the same logits.
Prints a line for every --report characters and, as its last line, one JSON object; exit code 1 where memory
grew once the rings were full, a logit is not finite, or the two differ by more than --most.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from butterfly_llm.bench.models import add_model_options, facts, model_of
from butterfly_llm.cache import routes_of
from butterfly_llm.memory import format_bytes, pick_device


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--chars", type=int, default=1 << 24)
    parser.add_argument("--slice", type=int, help="characters read at once; default: by memory")
    parser.add_argument("--report", type=int, default=1 << 20)
    parser.add_argument("--most", type=float, default=1e-4, help="RMS error over RMS of the last logits")
    parser.set_defaults(bench="long_read", preset="small")
    options = parser.parse_args()
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    with torch.no_grad():
        model = model_of(options)
        for parameter in model.parameters():  # those that start as zeros would carry no signal
            if parameter.ndim == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    size = model.prefill_slice = options.slice or model.slice_chars(1)
    reach = 1 + sum(route.stride for route in routes_of(model.config))
    kept = min(options.chars, -(-reach * model.config.chunk_size // size) * size)
    random = torch.Generator(device).manual_seed(1)
    tail = torch.zeros(1, 0, dtype=torch.uint8, device=device)
    cache = model.new_cache()
    begun = reported = time.perf_counter()
    rows = []
    while cache.position < options.chars:
        count = min(options.report, options.chars - cache.position)
        ids = torch.randint(0, 256, (1, count), generator=random, dtype=torch.uint8, device=device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        logits = model.prefill(ids, cache)
        finite = bool(logits.isfinite().all())  # waits for the device
        now = time.perf_counter()
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else cache.nbytes
        tail = torch.cat([tail, ids], 1)[:, -kept:]
        took = now - reported
        rows.append(
            {"chars": cache.position, "seconds": round(took, 3), "peak_bytes": peak, "finite": finite}
        )
        print(f"{cache.position:12,} characters {count / took:12,.0f}/s  {format_bytes(peak)}", flush=True)
        reported = now
    expected = model.prefill(tail, model.new_cache())
    error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    full = [row["peak_bytes"] for row in rows if row["chars"] > kept + options.report] or [0]
    result = facts(model) | {
        "chars": cache.position, "slice": size, "reach_chars": reach * model.config.chunk_size,
        "read_afresh": tail.shape[1], "error": error, "equal_to_the_bit": torch.equal(logits, expected),
        "finite": all(row["finite"] for row in rows), "growth_bytes": max(full) - min(full),
        "seconds": round(time.perf_counter() - begun, 1), "state_bytes": cache.nbytes, "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if result["finite"] and error <= options.most and result["growth_bytes"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
