"""A very long stream in random pieces, saved and taken up at random: equal to the straight run, bounded.

    python benchmarks/long_stream.py --chars 10000000

An untrained `micro` model reads random characters twice: straight, in blocks of --block, and in pieces of
random size, prefilled or stepped, whose state is at random written to a folder and read back. At the end of
every block the logits of both must agree, and no state may be larger than `cache_nbytes` says. Prints
progress and, as its last line, one JSON object; exit code 1 where they differ by more than --most.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from pathlib import Path

import torch

from butterfly_llm.cache import Cache, cache_nbytes
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.state import load_state, save_state


def untrained(config: ButterflyConfig, seed: int) -> Butterfly:
    """With the matrices filled that start as zeros, so that every path carries signal."""
    torch.manual_seed(seed)
    model = Butterfly(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def read_in_pieces(model: Butterfly, ids: torch.Tensor, cache: Cache, moments: random.Random) -> int:
    """Append ids (1, T) in pieces of 1 to T characters, short ones more often; -> how many pieces."""
    pieces = done = 0
    while done < ids.shape[1]:
        size = min(ids.shape[1] - done, int(2 ** moments.uniform(0, 13)))
        if moments.random() < 0.2:
            size = min(size, 100)
            for place in range(done, done + size):
                model.step(ids[:, place], cache)
        else:
            model.prefill(ids[:, done : done + size], cache)
        done += size
        pieces += 1
    return pieces


def taken_up(model: Butterfly, cache: Cache, folder: Path) -> tuple[Cache, int]:
    """Written and read back; -> the new cache and the bytes on the disk. It must be the same, bit by bit."""
    save_state(cache, folder, model=model)
    again = load_state(folder, model)
    pairs = zip(cache.filled(), again.filled(), strict=True)
    if again.position != cache.position or not all(torch.equal(a[1], b[1]) for a, b in pairs):
        raise SystemExit(f"the state after {cache.position:,} characters came back changed")
    return again, sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--chars", type=int, default=10_000_000)
    options.add_argument("--block", type=int, default=50_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--most", type=float, default=1e-4, help="RMS error over RMS of the logits of a block"
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(arguments.seed)
    text = torch.Generator().manual_seed(arguments.seed)
    config = ButterflyConfig.preset("micro")
    model = untrained(config, arguments.seed)
    bound = cache_nbytes(config)
    straight, pieced = model.new_cache(), model.new_cache()
    worst, pieces, saves, largest, on_disk = 0.0, 0, 0, 0, 0
    started = time.monotonic()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        while straight.position < arguments.chars:
            count = min(arguments.block, arguments.chars - straight.position)
            ids = torch.randint(0, 256, (1, count), generator=text)
            expected = model.prefill(ids, straight)
            cut = moments.randrange(1, count) if count > 1 else 1
            pieces += read_in_pieces(model, ids[:, :cut], pieced, moments)
            if moments.random() < 0.5:
                pieced, size = taken_up(model, pieced, Path(folder) / "state")
                saves, on_disk = saves + 1, max(on_disk, size)
            if cut < count:
                pieces += read_in_pieces(model, ids[:, cut:], pieced, moments)
            assert pieced.logits is not None
            error = (pieced.logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            worst = max(worst, float(error))
            largest = max(largest, pieced.nbytes)
            if straight.position % (20 * arguments.block) == 0:
                minutes = (time.monotonic() - started) / 60
                print(f"{straight.position:12,} characters  error {worst:.1e}  {minutes:.1f} min", flush=True)
    result = {
        "chars": straight.position, "pieces": pieces, "saves": saves, "worst_error": worst,
        "state_bytes": largest, "bound_bytes": bound, "bytes_on_disk": on_disk, "seed": arguments.seed,
        "seconds": round(time.monotonic() - started, 1), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if worst <= arguments.most and largest <= bound else 1


if __name__ == "__main__":
    raise SystemExit(main())
