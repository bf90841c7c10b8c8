"""Speed and memory of this model beside other architectures with as many parameters, by length.

    butterfly bench peers --save peers.json
    butterfly bench peers --twins butterfly full --lengths 8192 65536 --task reading

Training is forward, backward and optimiser; reading is forward alone, to the logits of the next character;
writing, of ours, the window and full attention, is a step for one stream that has read so much.
Short windows are read side by side, `--chars` together. Up to that many characters every activation is kept
and, on a GPU, a pass replayed as a CUDA graph; beyond, each layer is recomputed from its input. A step that
would take longer than `--limit`, as the shorter length says, is left out, and so is all after `--seconds`.

Random text: only shapes matter here. Every architecture has a process of its own. The first step of the
recurrent ones compiles and tunes some 160 variants of kernels: several processes compile a share each before.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.bench.isolate import Worker, all_at_once, one_line
from butterfly_llm.bench.models import add_preset_options, config_of
from butterfly_llm.bench.stream import wait
from butterfly_llm.captured import Accumulate, CapturedLoss, accumulate
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.decode import Decoder
from butterfly_llm.memory import pick_device
from butterfly_llm.optim import Optimizers
from butterfly_llm.recompute import Recompute
from butterfly_llm.twins import PLAIN, RECURRENT, FullAttention, build, kernel_error, twin_config

MODULE = "butterfly_llm.bench.peers"  # by name: run with -m this file is __main__
LENGTHS = (8192, 65_536, 262_144, 1_048_576)
TASKS = ("reading", "training", "writing")
_WRITTEN = 64
_COMPILERS = 6  # processes that share the compilation of a recurrent twin's kernels
_UNCOUNTED_BELOW = 8.0  # seconds: a step expected to be shorter is preceded by one that does not count
_PER_ROW = 0.5  # seconds that the steps of a row take together, if one is not longer


class Subject:
    """One architecture on its device, in the process that measures it."""

    def __init__(
        self, name: str, config: ButterflyConfig, device: str, compiled: bool, graph: bool, chars: int
    ) -> None:
        """chars: in longer texts layers of ours take that many rows at once: one shape to compile."""
        self.device, self.graph = device, graph
        torch.manual_seed(0)
        self.model = build(name, config).to(device)
        self.model.compute_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model.recompute = Recompute(slice_rows=max(1, chars))
        if compiled:
            self.model.compile_layers()
        self.optimizers = Optimizers(self.model, TrainConfig())

    def clock(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def training(self, ids: Tensor, keep: bool, steps: int, uncounted: int) -> tuple[list[float], bool]:
        """Seconds of each step, and whether they were replays of a graph."""
        model, optimizers = self.model, self.optimizers
        model.gradient_checkpointing = not keep
        gradients: Accumulate = functools.partial(accumulate, model)
        graph = keep and self.graph
        optimizers.drop_gradients = not graph
        if graph:
            gradients = CapturedLoss(model)
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        times = []
        for _ in range(uncounted + steps):
            start = self.clock()
            gradients(ids[:, :-1], ids[:, 1:], None, 1.0)
            optimizers.step(1e-4, bad)
            times.append(self.clock() - start)
        return times[uncounted:], graph

    def reading(self, ids: Tensor, keep: bool, steps: int, uncounted: int) -> tuple[list[float], bool]:
        """Seconds of each reading, and whether they were replays of a graph, as `training` with `keep`."""

        def read() -> object:
            with torch.no_grad():
                return self.model.head(self.model.hidden(ids[:, :-1])[:, -1]).float()

        graph = keep and self.graph
        step = _replayed(read) if graph else read
        times = []
        for _ in range(uncounted + steps):
            start = self.clock()
            step()
            times.append(self.clock() - start)
        return times[uncounted:], graph

    def writing(self, length: int) -> float:
        """Seconds of a step after `length` characters, the mean of 64 in a row.

        What stands in the state is nothing that the time depends on, so nothing is read before.
        """
        ids = torch.full((1,), 65, device=self.device)
        step: Callable[[], object]
        if isinstance(self.model, FullAttention):
            whole = self.model.whole_cache(length)
            step = functools.partial(self.model.write, ids, length - 1, whole)
            if self.graph:
                step = _replayed(step)
        else:
            cache = self.model.new_cache()
            cache.position = length
            step = functools.partial(Decoder(self.model, cache, fused=True).step, ids)
        for _ in range(8):
            step()
        start = self.clock()
        for _ in range(_WRITTEN):
            step()
        return (self.clock() - start) / _WRITTEN

    def forget(self) -> None:
        """Drop what a row has left behind."""
        self.model.zero_grad(set_to_none=True)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def _replayed(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return functools.partial(graph.replay)


subject: Subject | None = None


def prepare(
    name: str, config: dict[str, Any], device: str, compiled: bool, graph: bool, chars: int
) -> dict[str, Any]:
    """Compile and tune on few layers of the same widths, then make the architecture to measure.

    chars: of a pass in training; 0 where none is to be compiled.
    """
    global subject
    begun = time.perf_counter()
    whole = ButterflyConfig.from_dict(config)
    facts: dict[str, Any] = {"cuda_graph": graph}
    if device.startswith("cuda") and chars:
        if name in RECURRENT:
            tune_quickly()
        few = Subject(name, _few_layers(whole), device, compiled, graph, chars)
        ids = torch.randint(0, 256, (1, chars + 1), device=device)
        few.training(ids, True, 1, 0)
        few.forget()
        few.training(ids, False, 1, 0)
        few.reading(ids, True, 1, 0)
        del few
        if name in RECURRENT:
            errors = kernel_error(name, device, torch.bfloat16)
            facts["kernel_error"] = {part: round(error, 4) for part, error in errors.items()}
    subject = Subject(name, whole, device, compiled, graph, chars)
    subject.forget()
    facts["parameters"] = subject.model.num_parameters()
    return facts | {"prepare_seconds": round(time.perf_counter() - begun, 1)}


def _few_layers(config: ButterflyConfig) -> ButterflyConfig:
    """The same widths, and a layer of every kind."""
    passes = min(2, config.num_passes)
    return replace(
        config, num_local_layers=2, num_passes=passes, num_levels=1, num_extra_levels=0, num_long_passes=0,
        num_long_levels=0, num_refine_layers=min(1, config.num_refine_layers),
    )  # fmt: skip


def compile_kernels(name: str, config: dict[str, Any], device: str, chars: int, within: float) -> list[str]:
    """Compile the kernels of a recurrent twin into the cache, in several processes; what failed there.

    chars: of a pass in training. within: seconds.
    """
    shares = [("compile_share", name, config, device, chars, share) for share in range(_COMPILERS)]
    return [each for each in all_at_once(MODULE, shares, within) if each]


def compile_share(name: str, config: dict[str, Any], device: str, chars: int, share: int) -> None:
    """Compile every `_COMPILERS`-th variant of the kernels, beginning with number `share`, into the cache."""
    tune_quickly(share)
    few = Subject(name, _few_layers(ButterflyConfig.from_dict(config)), device, False, False, chars)
    few.training(torch.randint(0, 256, (1, chars + 1), device=device), True, 1, 0)


def tune_quickly(share: int | None = None) -> None:
    """Kernels that are imported from here on: shorter trials, and not anew for every length.

    share: of their variants, take only every `_COMPILERS`-th.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    begin = Autotuner.__init__

    def changed(self: Any, fn: Any, arg_names: Any, configs: Any, key: Any, *rest: Any, **more: Any) -> None:
        if share is not None:
            configs = configs[share::_COMPILERS] or configs[:1]
        # NB is the number of characters in steps of some 10,000.
        begin(self, fn, arg_names, configs, [part for part in key if part != "NB"], *rest, **more)
        self.do_bench = functools.partial(do_bench, warmup=5, rep=25)

    Autotuner.__init__ = changed


def start(
    module: str,
    names: Sequence[str],
    config: ButterflyConfig,
    device: str,
    left: Callable[[], float],
    *,
    chars: int,
    compiled: bool,
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """A process for each twin, all prepared at once, and what each said of itself, or why it `failed`.

    module: has `prepare`. left: seconds that may still pass.
    """
    on_gpu = device.startswith("cuda")
    workers: dict[str, Worker] = {}
    facts: dict[str, dict[str, Any]] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for name in names:
        workers[name] = Worker(module)
        try:
            sizes[name] = twin_config(name, config).to_dict()
        except ModuleNotFoundError as missing:
            facts[name] = {"failed": str(missing)}

    def ready(name: str) -> dict[str, Any]:
        complaints = []
        if name in RECURRENT and on_gpu and chars:
            workers[name].start()  # what it imports takes a while
            complaints = compile_kernels(name, sizes[name], device, chars, left() / 2)
        for graph in (True, False) if on_gpu else (False,):
            options = (compiled and on_gpu, graph, chars)
            found = workers[name].ask(0.7 * left(), "prepare", name, sizes[name], device, *options)
            if not isinstance(found, str):
                break
            complaints.append(found)
            if found.startswith("Timeout"):
                break
        said = {"failed": found} if isinstance(found, str) else dict(found)
        return said | ({"complaints": complaints} if complaints else {})

    with ThreadPoolExecutor() as pool:
        facts |= zip(sizes, pool.map(ready, sizes), strict=True)
    return workers, facts


def measure_row(task: str, length: int, chars: int, expected: float | None) -> dict[str, Any]:
    """What one row says; `failed` and one line where it is nothing."""
    assert subject is not None
    windows, taken = max(1, chars // length), row_chars(task, length, chars)
    ids = torch.randint(0, 256, (windows, length + 1), device=subject.device)
    uncounted = int(expected is None or expected < _UNCOUNTED_BELOW)
    steps = max(1, min(5, int(_PER_ROW / expected))) if expected else 2
    row: dict[str, Any] = {}
    for keep in (True, False) if task == "training" and windows * length <= chars else (False,):
        subject.forget()
        try:
            if task == "training":
                times, row["cuda_graph"] = subject.training(ids, keep, steps, uncounted)
                row["recompute"] = "none" if keep else "layer"
            elif task == "writing":
                times = [subject.writing(length)]
            else:
                short = windows * length <= chars
                times, row["cuda_graph"] = subject.reading(ids, short, steps, uncounted)
            break
        except torch.OutOfMemoryError as failure:
            row["failed"] = "out of memory: " + one_line(failure).partition(". ")[2].partition(". ")[0]
    else:
        return row
    row.pop("failed", None)
    seconds = sorted(times)[len(times) // 2]
    on_gpu = subject.device.startswith("cuda")
    return row | {
        "seconds": round(seconds, 4),
        "chars_per_second": round(taken / seconds),
        "bytes": torch.cuda.max_memory_allocated(subject.device) if on_gpu else None,
    }


def row_chars(task: str, length: int, chars: int) -> int:
    """Characters that one step of a row takes."""
    return 1 if task == "writing" else max(1, chars // length) * length


def expected_seconds(name: str, last: dict[str, Any] | None, length: int, chars: int) -> float | None:
    """Of a step of `chars` characters, at most, from the row of a shorter length; None without one."""
    if last is None:
        return None
    growth = chars / int(last["chars"])
    if name == "full":
        growth *= length / int(last["length"])
    return float(last["seconds"]) * growth


def add_options(parser: argparse.ArgumentParser) -> None:
    add_preset_options(parser, "small")  # whose parameters all have
    parser.add_argument("--twins", nargs="+", choices=PLAIN, default=PLAIN, help="architectures")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS[:2], dest="tasks")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="characters in a window")
    parser.add_argument("--chars", type=int, default=65_536, help="characters side by side in short windows")
    parser.add_argument("--limit", type=float, default=20, help="longest step, seconds")
    parser.add_argument("--seconds", type=float, default=600, help="stop after so many")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--save", type=Path, help="keep the JSON object here, renewed after every row")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lengths = sorted(options.lengths)
    if lengths[0] < 1 or options.chars < 1 or options.limit <= 0 or options.seconds <= 0:
        raise ValueError("bench peers: --lengths, --chars, --limit and --seconds must be above 0")
    device = str(pick_device(options.device))
    config = config_of(options)
    deadline: float = time.monotonic() + options.seconds
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "preset": options.preset,
        "chars": options.chars,
        "twins": {},
        "rows": [],
    }

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    print(f"{'task':<10}{'length':>10} {'architecture':<16}{'chars/s':>12}{'seconds':>10}{'peak GB':>9}")
    to_compile = 0 if set(options.tasks) == {"writing"} else options.chars
    workers, result["twins"] = start(
        MODULE, options.twins, config, device, left, chars=to_compile, compiled=not options.eager
    )
    last: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        for length in lengths:
            for task in options.tasks:
                for name, worker in workers.items():
                    if task == "writing" and name in RECURRENT:
                        continue
                    chars = row_chars(task, length, options.chars)
                    row = {"what": f"{task}, {name}", "twin": name, "task": task}
                    row |= {"length": length, "chars": chars}
                    expected = expected_seconds(name, last.get((name, task)), length, chars)
                    row |= _row(result["twins"][name], worker, row, expected, left(), options)
                    if "seconds" in row:
                        last[name, task] = row
                    result["rows"].append(row)
                    _say(row)
                    if options.save:
                        options.save.write_text(json.dumps({"bench": "peers", **result}) + "\n")
    finally:
        for worker in workers.values():
            worker.stop()
    return result


def _row(
    facts: dict[str, Any],
    worker: Worker,
    row: dict[str, Any],
    expected: float | None,
    left: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What is measured, or why nothing is."""
    if "failed" in facts:
        return {"failed": facts["failed"]}
    if expected is not None and expected > options.limit:
        return {"failed": f"a step would take about {expected:.0f} s", "expected_seconds": round(expected, 2)}
    if left < 1 or (expected is not None and 2 * expected > left):
        return {"failed": f"no time left of {options.seconds:.0f} s"}
    found = worker.ask(left, "measure_row", row["task"], row["length"], options.chars, expected)
    if isinstance(found, str):
        facts["failed"] = found  # its process is gone, or is not to be trusted
        return {"failed": found}
    return dict(found)


def _say(row: dict[str, Any]) -> None:
    head = f"{row['task']:<10}{row['length']:>10,} {row['twin']:<16}"
    if "failed" in row:
        print(f"{head} {row['failed']}", flush=True)
        return
    peak = f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else "-"
    print(f"{head}{row['chars_per_second']:>12,}{row['seconds']:>10.3f}{peak:>9}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    run("peers", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
