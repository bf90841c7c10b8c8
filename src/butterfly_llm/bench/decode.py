"""Writing after short and long texts, one stream and many: time of a step, characters a second.

    butterfly bench decode                                       # the shipped model on the CPU
    butterfly bench decode --preset small --device cuda
    butterfly bench decode --preset full --device cuda --streams 1

Each character is the likeliest one, chosen on the device, so that nothing waits for the host; on a GPU the
step is a captured graph unless --eager. The text is read by one stream; the others copy its state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from butterfly_llm.bench import run
from butterfly_llm.bench.models import add_model_options, facts, model_of
from butterfly_llm.bench.stream import read_bandwidth, step_bytes, wait
from butterfly_llm.cache import Cache
from butterfly_llm.decode import Decoder
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.set_defaults(bench="decode")
    parser.add_argument("--contexts", type=int, nargs="+", help="characters read before")
    parser.add_argument("--streams", type=int, nargs="+", help="numbers of streams")
    parser.add_argument("--steps", type=int, default=256, help="characters that each stream writes")
    parser.add_argument("--eager", action="store_true", help="no captured graph")
    parser.add_argument("--modules", action="store_true", help="capture the modules' step, not a fused one")


def copies(model: Butterfly, cache: Cache, streams: int) -> Cache:
    """`streams` streams in the state of the one in `cache`."""
    many = model.new_cache(streams)
    for whole, own in zip(many.tensors(), cache.tensors(), strict=True):
        whole.copy_(own.expand_as(whole))
    if many.ngrams is not None and cache.ngrams is not None:
        for held, one in zip(many.ngrams.tensors().values(), cache.ngrams.tensors().values(), strict=True):
            held.copy_(one.expand_as(held))
    many.position = cache.position
    return many


def step_seconds(decoder: Decoder, streams: int, steps: int, device: str) -> float:
    """Time of a step, the mean of `steps` in a row after eight that do not count."""
    ids = torch.full((streams,), 65, device=device)
    for step in range(steps + 8):
        if step == 8:
            wait(device)
            start = time.perf_counter()
        ids = decoder.step(ids).argmax(-1)
    wait(device)
    return (time.perf_counter() - start) / steps


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = str(pick_device(options.device))
    on_gpu = device.startswith("cuda")
    contexts = sorted(options.contexts or ((8192, 1_048_576) if on_gpu else (1024, 8192)))
    counts = sorted(options.streams or ((1, 64) if on_gpu else (1, 4)))
    if min(contexts[0], counts[0], options.steps) < 1:
        raise ValueError("bench decode: --contexts, --streams and --steps must be at least 1")
    model = model_of(options)
    bandwidth = read_bandwidth(device)
    rows: list[dict[str, Any]] = []
    print(
        f"{'context':>10}{'streams':>9}{'step, ms':>10}{'chars/s':>10}{'of bandwidth':>14}{'state, MB':>12}"
        "  path"
    )
    for context in contexts:
        alone = model.new_cache()
        model.prefill(torch.randint(32, 127, (1, context), dtype=torch.uint8, device=device), alone)
        for streams in counts:
            try:
                cache = copies(model, alone, streams)
                fused = False if options.modules else None
                decoder = Decoder(model, cache, capture=on_gpu and not options.eager, fused=fused)
                took = step_seconds(decoder, streams, options.steps, device)
            except (ValueError, torch.OutOfMemoryError) as failure:
                print(f"{context:>10,}{streams:>9} {str(failure).splitlines()[0]}")
                continue
            share = step_bytes(model, cache) / took / bandwidth
            rows.append(
                {
                    "what": "writing",
                    "length": context,
                    "streams": streams,
                    "path": decoder.path,
                    "step_ms": round(1e3 * took, 4),
                    "chars_per_second": round(streams / took, 1),
                    "share_of_bandwidth": round(share, 3),
                    "bytes": cache.nbytes,
                }
            )
            print(
                f"{context:>10,}{streams:>9}{1e3 * took:>10.3f}{streams / took:>10,.1f}{share:>14.0%}"
                f"{cache.nbytes / 1e6:>12,.1f}  {decoder.path}",
                flush=True,
            )
            del cache, decoder
    ratios = {}
    for streams in counts:
        times = [row["step_ms"] for row in rows if row["streams"] == streams]
        if len(times) == len(contexts):
            ratios[str(streams)] = round(times[-1] / times[0], 4)
            print(f"{streams} streams: a step after {contexts[-1]:,} takes {ratios[str(streams)]:.3f} of one "
                  f"after {contexts[0]:,}")  # fmt: skip
    return facts(model) | {
        "captured": on_gpu and not options.eager,
        "compiled": options.compile,
        "read_gbps": round(bandwidth / 1e9, 1),
        "long_over_short": ratios,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("decode", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
