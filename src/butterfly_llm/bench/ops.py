"""One attention layer, 12 heads of 64, bfloat16: the fused kernels beside what PyTorch offers, and the floor.

    butterfly bench ops            # 65,536 and 1,048,576 characters
    butterfly bench ops --quick    # correctness and the fused kernels at 65,536
    butterfly bench ops --sweep    # tile sizes of the three kernels at 65,536

Milliseconds are medians of CUDA-graph replays, so they
hold no launch overhead. The floor is q, k, v read once and o written once, three times that with the backward
pass, at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.ops import triton_attention
from butterfly_llm.ops.portable import butterfly_attention_portable
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.triton_attention import Tiles, butterfly_attention_triton

HEADS, HEAD_DIM, CHUNK, STRIDE = 12, 64, 128, 32
OPTIONS: dict[str, Any] = {
    "stride": STRIDE, "topology": "shift", "chunk_size": CHUNK, "rope_theta": 10000.0
}  # fmt: skip
# Tile sizes tried for each kernel: (queries, keys, warps, stages).
SWEEP: dict[triton_attention.Pass, list[tuple[int, int, int, int]]] = {
    "forward": [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2),
        (128, 64, 8, 1), (128, 64, 8, 2), (128, 128, 8, 1), (64, 128, 4, 1),
    ],
    "query_gradient": [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 4, 3),
        (128, 64, 8, 1), (128, 64, 8, 2),
    ],
    "key_gradient": [
        (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2),
        (32, 128, 8, 1), (32, 128, 8, 2), (64, 128, 8, 1),
    ],
}  # fmt: skip

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def replay_ms(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `run`, captured in a CUDA graph where that is possible."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    launch = run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        launch = graph.replay
        launch()
    except TimeoutError:
        raise
    except Exception as error:
        print(f"  (timed without a graph: {one_line(error)})")
        torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for start, stop in events:
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) for start, stop in events))


def one_line(error: BaseException) -> str:
    return (type(error).__name__ + ": " + " ".join(str(error).split()))[:200]


def within(seconds: int, part: Callable[[], Any]) -> Any:
    """The result of one part, or the reason why it failed; a part that hangs costs only itself."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return part()
    except Exception as error:
        return one_line(error)
    finally:
        signal.alarm(0)


def views(length: int) -> list[Tensor]:
    """q, k, v (1, N, H, D) as views into one fused projection, as the model has them."""
    fused = torch.randn(1, length, 3 * HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return [x.detach().requires_grad_() for x in torch.split(fused, HEADS, 2)]


def time_attention(attend: Attention, inputs: list[Tensor]) -> dict[str, float]:
    with torch.no_grad():
        forward = replay_ms(lambda: attend(*inputs))
    grad = torch.randn_like(inputs[0], memory_format=torch.contiguous_format)
    both = replay_ms(lambda: torch.autograd.grad(attend(*inputs), inputs, grad))
    return {"forward_ms": forward, "forward_backward_ms": both}


def fused_kernels(length: int) -> dict[str, float]:
    return time_attention(lambda q, k, v: butterfly_attention_triton(q, k, v, **OPTIONS), views(length))


def portable(length: int) -> dict[str, float]:
    """Compiled at 65,536 characters; eager beyond, where tracing its thousands of chunks takes minutes."""
    run: Attention = lambda q, k, v: butterfly_attention_portable(q, k, v, **OPTIONS)  # noqa: E731
    return time_attention(torch.compile(run, dynamic=False) if length <= 1 << 16 else run, views(length))


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


def flex_attention(length: int) -> dict[str, float]:
    """Compiled FlexAttention with the same pattern, rotary positions not included."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = flex_mask(length, "cuda")
    torch.cuda.empty_cache()
    shape = (1, HEADS, length, HEAD_DIM)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(flex_attention, dynamic=False)
    return time_attention(lambda q, k, v: compiled(q, k, v, block_mask=mask), inputs)


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_ms(lambda: target.copy_(source)) * 1e3


def correctness() -> dict[str, float]:
    """RMS error over RMS reference, worst chunk, of the output and the gradients at 4,113 characters."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4096 + 17, 4, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    results = []
    for op, dtype in (
        (butterfly_attention_triton, torch.bfloat16),
        (butterfly_attention_reference, torch.float64),
    ):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
        y = op(q, k, v, **OPTIONS | {"stride": 4})
        results.append([y.detach(), *torch.autograd.grad(y, (q, k, v), inputs[3].to(dtype))])
    errors = {}
    for name, got, want in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        pairs = zip(got.double().split(CHUNK, 1), want.split(CHUNK, 1), strict=True)
        errors[name] = max(((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in pairs)
    return errors


def sweep() -> dict[str, dict[str, Any]]:
    """Milliseconds for each tile size of one kernel, the others as shipped: forward, or with backward."""
    inputs = views(1 << 16)
    grad = torch.randn(1, 1 << 16, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def forward() -> object:
        return butterfly_attention_triton(*(x.detach() for x in inputs), **OPTIONS)

    def both() -> object:
        return torch.autograd.grad(butterfly_attention_triton(*inputs, **OPTIONS), inputs, grad)

    results: dict[str, dict[str, Any]] = {}
    for which, candidates in SWEEP.items():
        run = forward if which == "forward" else both
        results[which] = {}
        for cut in candidates:
            triton_attention.FORCED_TILES[which] = Tiles(*cut)
            result = within(30, partial(replay_ms, run))
            results[which][str(cut)] = result
            print(
                f"{which:<16}{cut!s:<20}{result if isinstance(result, str) else round(result, 4)}", flush=True
            )
        del triton_attention.FORCED_TILES[which]
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="correctness and the fused kernels at 65,536")
    parser.add_argument("--sweep", action="store_true", help="tile sizes of the three kernels at 65,536")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ValueError("bench ops needs a CUDA device")
    begun = time.perf_counter()
    out: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": HEADS,
        "head_dim": HEAD_DIM, "chunk": CHUNK, "stride": STRIDE, "dtype": "bfloat16",
    }  # fmt: skip
    out["error"] = within(60, correctness)
    print("error against the float64 reference:", out["error"], flush=True)
    bandwidth = within(20, copy_bandwidth)
    out["copy_bytes_per_s"] = bandwidth
    parts = {"fused": fused_kernels}
    if not (options.quick or options.sweep):
        parts |= {"flex_attention": flex_attention, "portable": portable}
    print(f"{'characters':>10}  {'what':<16}{'forward ms':>12}{'+ backward':>12}{'of floor':>10}", flush=True)
    for length in (1 << 16,) if options.quick or options.sweep else (1 << 16, 1 << 20):
        results: dict[str, Any] = {}
        if isinstance(bandwidth, float):
            floor = 4 * length * HEADS * HEAD_DIM * 2 / bandwidth * 1e3
            results["floor"] = {"forward_ms": floor, "forward_backward_ms": 3 * floor}
        for name, part in parts.items():
            results[name] = within(25, partial(part, length))
            within(5, torch.cuda.empty_cache)
        out[str(length)] = results
        for name, result in results.items():
            if isinstance(result, str):
                print(f"{length:>10,}  {name:<16}{result}", flush=True)
                continue
            share = (
                results["floor"]["forward_backward_ms"] / result["forward_backward_ms"]
                if "floor" in results
                else 0
            )
            times = f"{result['forward_ms']:>12.3f}{result['forward_backward_ms']:>12.3f}"
            print(f"{length:>10,}  {name:<16}{times}{share:>10.0%}", flush=True)
    if options.sweep:
        out["sweep"] = sweep()
    out["seconds"] = round(time.perf_counter() - begun, 1)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    run("ops", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
