"""One attention layer, 12 heads of 64, bfloat16: the fused kernels beside what PyTorch offers, and the floor.

    butterfly bench ops                      # every variant, then 65,536 and 1,048,576 characters
    butterfly bench ops --quick              # correctness and the kernels as shipped, at 65,536
    butterfly bench ops --save ops.json      # also keeps the object in a file, renewed after every part

Milliseconds are medians of CUDA-graph replays, so they hold no launch overhead. The floor is q, k, v read
once and o written once, three times that with the backward pass, at the measured copy bandwidth. Every part
runs in a process that is replaced when the part fails or takes too long; none starts after --seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.bench.isolate import Worker, all_at_once, one_line
from butterfly_llm.ops import butterfly_attention, triton_attention
from butterfly_llm.ops.portable import butterfly_attention_portable, step_attention
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.ops.triton_attention import Tiles, butterfly_attention_triton

MODULE = "butterfly_llm.bench.ops"  # by name: run with -m this file is __main__
HEADS, HEAD_DIM, CHUNK, STRIDE = 12, 64, 128, 32
SHORT, LONG = 1 << 16, 1 << 20
OPTIONS: dict[str, Any] = {
    "stride": STRIDE, "topology": "shift", "chunk_size": CHUNK, "rope_theta": 10000.0,
    "local": 0,
}  # fmt: skip

# Variants, as the arguments of Tiles: queries, keys, warps, stages, the most registers of a thread.
FORWARD: dict[str, tuple[int | None, ...]] = {
    "64x64 w4 s3 r128": (64, 64, 4, 3, 128),
    "64x64 w4 s2 r128": (64, 64, 4, 2, 128),
    "64x64 w4 s2": (64, 64, 4, 2, None),
    "64x32 w4 s3 r96": (64, 32, 4, 3, 96),
    "128x64 w8 s3 r128": (128, 64, 8, 3, 128),
}
# The tiles of the two kernels of the backward pass: of queries, then of keys.
BACKWARD: dict[str, tuple[tuple[int | None, ...], tuple[int | None, ...]]] = {
    "dq 64x64 s1 r128, dkv 64x64 s1": ((64, 64, 4, 1, 128), (64, 64, 4, 1, None)),
    "dq 64x32 s3, dkv 64x64 s1": ((64, 32, 4, 3, None), (64, 64, 4, 1, None)),
    "dq 64x64 s1, dkv 64x64 s1": ((64, 64, 4, 1, None), (64, 64, 4, 1, None)),
    "dq 64x64 s1 r128, dkv 128x64 s1": ((64, 64, 4, 1, 128), (128, 64, 4, 1, None)),
    "dq 64x64 s1 r128, dkv 32x64 s1": ((64, 64, 4, 1, 128), (32, 64, 4, 1, None)),
}
SHIPPED = (next(iter(FORWARD)), next(iter(BACKWARD)))

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# The parts, each a function of plain values that runs in the worker.


def use(forward: str, backward: str) -> None:
    """Make the tiles of these variants the ones that `butterfly_attention_triton` uses."""
    query_gradient, key_gradient = BACKWARD[backward]
    cuts = {"forward": FORWARD[forward], "query_gradient": query_gradient, "key_gradient": key_gradient}
    for which, cut in cuts.items():
        triton_attention.FORCED_TILES[cast(triton_attention.Pass, which)] = Tiles(*cast(Any, cut))


def replay_ms(run: Callable[[], object], repeats: int = 7, inside: int = 1) -> float:
    """Median time of `run`, captured `inside` times in a CUDA graph where that is possible."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    launch: Callable[[], object] = run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(inside):
                run()
        launch = graph.replay
        launch()
    except Exception as error:
        print(f"  (timed without a graph: {one_line(error)})", file=sys.stderr)
        inside = 1
        torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for start, stop in events:
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) for start, stop in events)) / inside


def ceilings() -> dict[str, Any]:
    """Copy bandwidth, read and written, by the copy engine or by a kernel; rate of an 8192^3 product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    engine = moved / replay_ms(lambda: target.copy_(source)) * 1e3
    kernel = moved / replay_ms(lambda: torch.mul(source, 2, out=target)) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / replay_ms(lambda: a @ b) * 1e3
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": _triton_version(),
        "copy_bytes_per_s": max(engine, kernel), "copy_engine": engine, "copy_kernel": kernel,
        "matmul_flop_per_s": product,
    }  # fmt: skip


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def views(length: int) -> list[Tensor]:
    """q, k, v (1, N, H, D) as views into one fused projection, as the model has them."""
    fused = torch.randn(1, length, 3 * HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return [x.detach().requires_grad_() for x in torch.split(fused, HEADS, 2)]


def first_run(forward: str, backward: str) -> float:
    """Seconds of the first forward and backward pass, for whole and ragged lengths: mostly compilation."""
    torch.randn(8, 8, device="cuda").sum().item()
    use(forward, backward)
    begun = time.perf_counter()
    for length in (4 * CHUNK, 4 * CHUNK - 15):
        q, k, v = views(length)
        y = butterfly_attention_triton(q, k, v, **OPTIONS | {"stride": 1})
        torch.autograd.grad(y, (q, k, v), torch.randn_like(y))
    torch.cuda.synchronize()
    return time.perf_counter() - begun


@functools.lru_cache(maxsize=4)
def expected(length: int, stride: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and a gradient in bfloat16; output and gradients of the reference in float64."""
    torch.manual_seed(length)
    inputs = [torch.randn(1, length, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(4)]
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    y = butterfly_attention_reference(q, k, v, **OPTIONS | {"stride": stride})
    return inputs, [y.detach(), *torch.autograd.grad(y, (q, k, v), inputs[3].double())]


def errors(forward: str, backward: str) -> dict[str, float]:
    """RMS error over RMS reference, worst chunk of several lengths, of the output and the gradients."""
    use(forward, backward)
    worst = dict.fromkeys(("y", "dq", "dk", "dv"), 0.0)
    for length, stride in ((2048 + 17, 4), (2048, 1), (500, 2)):
        inputs, results = expected(length, stride)
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        y = butterfly_attention(q, k, v, backend="triton", **OPTIONS | {"stride": stride})
        found = [y.detach(), *torch.autograd.grad(y, (q, k, v), inputs[3])]
        for name, got, want in zip(worst, found, results, strict=True):
            for a, b in zip(torch.split(got.double(), CHUNK, 1), torch.split(want, CHUNK, 1), strict=True):
                error = ((a - b).square().mean() / b.square().mean()).sqrt().item()
                worst[name] = error if not error <= worst[name] else worst[name]  # NaN stays
    return worst


def forward_ms(forward: str, length: int, stride: int) -> float:
    use(forward, SHIPPED[1])
    q, k, v = (x.detach() for x in views(length))
    options = OPTIONS | {"stride": stride}
    return replay_ms(
        lambda: butterfly_attention_triton(q, k, v, **options), inside=8 if length <= SHORT else 1
    )


def backward_ms(backward: str, length: int, stride: int) -> float:
    """The backward operator alone."""
    use(SHIPPED[0], backward)
    q, k, v = (x.detach() for x in views(length))
    grad = torch.randn(1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    options = OPTIONS | {"stride": stride}
    o, lse = torch.ops.butterfly.attention_fwd(q, k, v, *options.values())
    return replay_ms(
        lambda: torch.ops.butterfly.attention_bwd(grad, q, k, v, o, lse, *options.values()),
        inside=4 if length <= SHORT else 1,
    )


def traffic_ms(length: int, stride: int, partner: bool) -> float:
    """The forward pass without its arithmetic: what the access pattern allows."""
    from butterfly_llm.bench.traffic_kernel import traffic_kernel

    q, k, v = (x.detach() for x in views(length))
    o = torch.empty(1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    chunks = length // CHUNK
    step = stride if stride < chunks else 1
    turns = -(-chunks // step)
    grid = (turns * step * HEADS,)

    def launch() -> None:
        traffic_kernel[grid](
            q, k, v, o, 0, q.stride(1), q.stride(2), length, chunks, stride, turns, step,
            HEADS=HEADS, D=HEAD_DIM, CHUNK=CHUNK, PARTNER=partner,
        )  # fmt: skip

    return replay_ms(launch, inside=8 if length <= SHORT else 1)


def time_attention(attend: Attention, inputs: list[Tensor]) -> dict[str, float]:
    with torch.no_grad():
        forward = replay_ms(lambda: attend(*inputs))
    grad = torch.randn_like(inputs[0], memory_format=torch.contiguous_format)
    both = replay_ms(lambda: torch.autograd.grad(attend(*inputs), inputs, grad))
    return {"forward_ms": forward, "forward_backward_ms": both}


def fused(length: int, forward: str, backward: str) -> dict[str, float]:
    use(forward, backward)
    return time_attention(lambda q, k, v: butterfly_attention_triton(q, k, v, **OPTIONS), views(length))


def portable(length: int) -> dict[str, float]:
    """Compiled at 65,536 characters; eager beyond, where tracing its thousands of chunks takes minutes."""
    run: Attention = lambda q, k, v: butterfly_attention_portable(q, k, v, **OPTIONS)  # noqa: E731
    return time_attention(torch.compile(run, dynamic=False) if length <= SHORT else run, views(length))


def flex_mask(length: int, device: str) -> Any:
    """The same pattern as a FlexAttention mask: own chunk masked inside, partner chunk whole."""
    from torch.nn.attention.flex_attention import BlockMask

    chunks = length // CHUNK
    chunk = torch.arange(chunks, device=device, dtype=torch.int32)
    own, partner = (torch.zeros(1, 1, chunks, chunks, device=device, dtype=torch.int32) for _ in range(2))
    own[..., 0] = chunk
    partner[..., 0] = (chunk - STRIDE).clamp_min(0)
    return BlockMask.from_kv_blocks(
        torch.ones_like(chunk)[None, None], own, (chunk >= STRIDE).int()[None, None], partner,
        BLOCK_SIZE=CHUNK, mask_mod=lambda b, h, i, j: i >= j,
    )  # fmt: skip


def heads_first(length: int) -> list[Tensor]:
    shape = (1, HEADS, length, HEAD_DIM)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def flex(length: int) -> dict[str, float]:
    """Compiled FlexAttention with the same pattern, rotary positions not included."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = flex_mask(length, "cuda")
    torch.cuda.empty_cache()
    compiled = torch.compile(flex_attention, dynamic=False)
    return time_attention(lambda q, k, v: compiled(q, k, v, block_mask=mask), heads_first(length))


def full_causal(length: int) -> dict[str, float]:
    """scaled_dot_product_attention over all earlier characters, forward only."""
    q, k, v = (x.detach() for x in heads_first(length))

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    if length <= SHORT:
        return {"forward_ms": replay_ms(attend, repeats=3)}
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    attend()
    stop.record()
    torch.cuda.synchronize()
    return {"forward_ms": float(start.elapsed_time(stop))}


def repeats(forward: str, backward: str) -> dict[str, Any]:
    """Whether two runs agree bit for bit, and the bytes allocated beyond inputs, outputs and log-sum-exp."""
    use(forward, backward)
    q, k, v = views(SHORT)
    grad = torch.randn(1, SHORT, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def once() -> list[Tensor]:
        y = butterfly_attention_triton(q, k, v, **OPTIONS)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]

    first = once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = once()
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in second) + 4 * HEADS * SHORT
    workspace = torch.cuda.max_memory_allocated() - before - kept
    identical = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return {"identical": identical, "workspace_bytes": workspace}


def beyond_int32(forward: str, backward: str) -> dict[str, Any]:
    """Values and gradients past element 2**31 of every tensor: bit for bit those of the tail by itself."""
    use(forward, backward)
    length = (1 << 31) // (HEADS * HEAD_DIM) // CHUNK * CHUNK + 4 * STRIDE * CHUNK
    tail = 3 * STRIDE * CHUNK
    seen = 2 * STRIDE * CHUNK  # the first stride of the tail lacks its partner
    with torch.no_grad():
        q, k, v = (x.detach() for x in views(length))
    grad = torch.randn(1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    results = []
    for part in (slice(None), slice(length - tail, None)):
        inputs = [x[:, part].requires_grad_() for x in (q, k, v)]
        y = butterfly_attention_triton(*inputs, **OPTIONS)
        gradients = torch.autograd.grad(y, inputs, grad[:, part])
        results.append([x[:, -seen:].clone() for x in (y.detach(), *gradients)])
        del y, gradients
    names = ("y", "dq", "dk", "dv")
    equal = {name: torch.equal(a, b) for name, a, b in zip(names, *results, strict=True)}
    return {"elements": length * HEADS * HEAD_DIM, "equal": equal}


def step(batch: int) -> dict[str, float]:
    """One decoding step of `batch` streams in microseconds, and its error against float64."""
    from butterfly_llm.ops.triton_step import step_attention_triton

    torch.manual_seed(batch)
    shape = (batch, HEADS, 3, CHUNK, HEAD_DIM)
    ring = (torch.randn(shape, device="cuda").bfloat16(), torch.randn(shape, device="cuda").bfloat16())
    q, k, v = (torch.randn(batch, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(3))
    options: dict[str, Any] = {"stride": 2, "topology": "shift", "rope_theta": 10000.0}
    at = 5 * CHUNK + 77
    position = torch.full((batch,), at, device="cuda")
    offset = torch.tensor([at % CHUNK], device="cuda")
    table = rope_table(offset, HEAD_DIM, options["rope_theta"], torch.float64)
    turned_q, turned_k = (rotate(x.double(), *table) for x in (q, k))
    twin = ring[0].clone(), ring[1].clone()
    want = step_attention(turned_q, turned_k, v.double(), twin, position=at, **options)
    got = step_attention_triton(q, k, v, ring, position=position, **options)
    return {
        "error": ((got.double() - want).square().mean() / want.square().mean()).sqrt().item(),
        "kernel_us": 1e3
        * replay_ms(lambda: step_attention_triton(q, k, v, ring, position=position, **options), inside=50),
        "portable_us": 1e3
        * replay_ms(lambda: step_attention(q, k, v, ring, position=at, **options), inside=20),
    }


class Report:
    """What is known so far; printed and, with a path, saved after every part."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.end = path, time.perf_counter() + seconds
        self.begun = time.perf_counter()
        self.worker = Worker(MODULE)
        self.out: dict[str, Any] = {
            "heads": HEADS, "head_dim": HEAD_DIM, "chunk": CHUNK, "stride": STRIDE, "dtype": "bfloat16"
        }  # fmt: skip

    def ask(self, seconds: float, name: str, *arguments: Any) -> Any:
        left = self.end - time.perf_counter()
        return self.worker.ask(min(seconds, left), name, *arguments) if left > 3 else "Skipped: time is up"

    def add(self, section: str, name: str, result: Any) -> Any:
        self.out.setdefault(section, {})[name] = result
        text = (
            {key: shown(value) for key, value in result.items()}
            if isinstance(result, dict)
            else shown(result)
        )
        print(f"{time.perf_counter() - self.begun:6.1f} s  {section:<24}{name:<36}{text}", flush=True)
        self.out["seconds"] = round(time.perf_counter() - self.begun, 1)
        if self.path is not None:
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps(self.out, indent=1), encoding="utf-8")
            os.replace(partial, self.path)
        return result

    def best(self, section: str, names: Sequence[str], fallback: str) -> str:
        """The fastest of the variants that were measured and are correct."""
        times = self.out.get(section, {})
        good = {
            name: times[name] for name in names if isinstance(times.get(name), float) and self.correct(name)
        }
        return min(good, key=lambda name: float(good[name])) if good else fallback

    def correct(self, name: str) -> bool:
        error = self.out.get("error", {}).get(name)
        return isinstance(error, dict) and all(value < 0.016 for value in error.values())


def shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the kernels as shipped, 65,536 characters only")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="keep the JSON object in this file as it grows"
    )
    parser.add_argument("--seconds", type=float, default=190, help="start no further part after this (190)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ValueError("bench ops needs a CUDA device")
    report = Report(options.save, options.seconds)
    try:
        _measure(report, options.quick)
    finally:
        report.worker.stop()
    return report.out


def _measure(report: Report, quick: bool) -> None:
    forwards = [SHIPPED[0]] if quick else list(FORWARD)
    backwards = [SHIPPED[1]] if quick else list(BACKWARD)
    pairs = [(name, SHIPPED[1]) for name in forwards] + [(SHIPPED[0], name) for name in backwards[1:]]
    compiled = all_at_once(MODULE, [("first_run", *pair) for pair in pairs], 100)
    for pair, seconds in zip(pairs, compiled, strict=True):
        report.add("first run, seconds", " + ".join(pair), seconds)
    ceiling = report.add("ceilings", "measured", report.ask(30, "ceilings"))
    for partner in (False, True):
        name = "own and partner" if partner else "own chunk"
        report.add("traffic 64k, ms", name, report.ask(20, "traffic_ms", SHORT, STRIDE, partner))
    for name in forwards:
        report.add("error", name, report.ask(30, "errors", name, SHIPPED[1]))
    for name in backwards:
        report.add("error", name, report.ask(30, "errors", SHIPPED[0], name))
    for name in forwards:
        report.add("forward 64k, ms", name, report.ask(15, "forward_ms", name, SHORT, STRIDE))
    for name in backwards:
        report.add("backward 64k, ms", name, report.ask(15, "backward_ms", name, SHORT, STRIDE))
    forward = report.best("forward 64k, ms", forwards, SHIPPED[0])
    backward = report.best("backward 64k, ms", backwards, SHIPPED[1])
    report.add("variants", "shipped", ", ".join(SHIPPED))
    report.add("variants", "best", f"{forward}, {backward}")
    for length in (SHORT,) if quick else (SHORT, LONG):
        section = f"{length} characters"
        if isinstance(ceiling, dict):
            floor = 4 * length * HEADS * HEAD_DIM * 2 / ceiling["copy_bytes_per_s"] * 1e3
            report.add(section, "floor", {"forward_ms": floor, "forward_backward_ms": 3 * floor})
        report.add(section, "shipped", report.ask(25, "fused", length, *SHIPPED))
        if quick:
            continue
        if (forward, backward) != SHIPPED:
            report.add(section, "best", report.ask(25, "fused", length, forward, backward))
        report.add(section, "flex_attention", report.ask(40, "flex", length))
        if length == SHORT:
            report.add(section, "full causal", report.ask(15, "full_causal", length))
        report.worker.ask(5, "free")
    for batch in (1, 64):
        report.add("step", f"{batch} streams", report.ask(20, "step", batch))
    report.add("properties", "repeats", report.ask(20, "repeats", *SHIPPED))
    if quick:
        return
    report.add("properties", "beyond 2**31", report.ask(30, "beyond_int32", *SHIPPED))
    for stride in (1, 8, 256):
        for i, part in enumerate(("forward", "backward")):
            took = report.ask(15, f"{part}_ms", SHIPPED[i], SHORT, stride)
            report.add(f"stride, {part} ms", str(stride), took)
    for name in forwards:
        report.add("forward 1M, ms", name, report.ask(15, "forward_ms", name, LONG, STRIDE))
    for name in backwards:
        report.add("backward 1M, ms", name, report.ask(15, "backward_ms", name, LONG, STRIDE))
    report.add(f"{SHORT} characters", "gather + SDPA", report.ask(60, "portable", SHORT))
    report.add(f"{LONG} characters", "full causal", report.ask(30, "full_causal", LONG))


def free() -> bool:
    torch.cuda.empty_cache()
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    run("ops", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
