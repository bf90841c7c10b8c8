"""Characters a second that several streams write together on one model, against one stream alone.

    butterfly bench batch                             # the shipped model on the CPU
    butterfly bench batch --model PATH --device cuda

The numbers of streams take turns, step by step, so that all see the same weather on a noisy machine. Every
stream stands at a position of its own, as in the server, whose steps these are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from butterfly_llm.bench import run
from butterfly_llm.bench.stream import wait
from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.memory import pick_device
from butterfly_llm.slots import stepper_for


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder; default: the shipped one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of streams")
    parser.add_argument("--chars", type=int, default=640, help="characters that the shortest stream has read")
    parser.add_argument("--steps", type=int, default=64, help="characters that each number writes")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    counts = sorted({1, *options.streams})
    if counts[0] < 1 or options.chars < 1 or options.steps < 1:
        raise ValueError("bench batch: --streams, --chars and --steps must be at least 1")
    device = str(pick_device(options.device))
    model = load_pretrained(options.model, device=device)
    model.compute_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    stepper = stepper_for(model, counts[-1])
    generator = torch.Generator().manual_seed(0)
    text = bytes(torch.randint(32, 127, (options.chars + 37 * counts[-1],), generator=generator).tolist())
    caches = []
    for i in range(counts[-1]):
        caches.append(stepper.fresh(None, keep=False, reserved=0))
        stepper.read(text[: options.chars + 37 * i], caches[-1])

    times: dict[int, list[float]] = {count: [] for count in counts}
    for step in range(options.steps + 4):
        for count in counts:
            characters = [text[(step + i) % len(text)] for i in range(count)]
            wait(device)
            start = time.perf_counter()
            stepper.step(characters, caches[:count])
            wait(device)
            if step >= 4:
                times[count].append(time.perf_counter() - start)
    steps = {count: statistics.median(each) for count, each in times.items()}
    rows = []
    print(f"{'streams':>8}{'step, ms':>12}{'written, a second':>20}{'against one':>14}")
    for count, seconds in steps.items():
        rate, ratio = count / seconds, count * steps[1] / seconds
        rows.append(
            {"streams": count, "step_ms": round(1e3 * seconds, 2), "chars_per_second": round(rate, 1),
             "against_one": round(ratio, 3)}
        )  # fmt: skip
        print(f"{count:>8}{1e3 * seconds:>12.2f}{rate:>20,.1f}{ratio:>14.2f}")
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stepper": type(stepper).__name__,
        "parameters": model.num_parameters(),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("batch", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
