"""Every attention kernel on small odd shapes, to be run under NVIDIA's compute-sanitizer.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # a tensor is then an allocation of its own, and its end is watched
python benchmarks/sanitize.py            # compiles, and compares with the reference
compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py --head-dims 64
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from butterfly_llm.ops import butterfly_attention
from butterfly_llm.ops.portable import prefill_attention
from butterfly_llm.ops.prefill import prefill_attention_triton
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.triton_step import step_attention_triton
from butterfly_llm.rings import Ring

CHUNK, HEADS, KV_HEADS = 128, 2, 1


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def close(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    assert error < 0.02, float(error)


def train(length: int, head_dim: int) -> None:
    """Forward and backward; a length that is a multiple of 128 takes the kernels without masks."""
    q, k, v = (draw(2, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = butterfly_attention(*leaves, stride=1, backend="triton")
    gradients = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert all(bool(x.isfinite().all()) for x in gradients)
    close(y.detach(), butterfly_attention_reference(*(x.detach().float() for x in leaves), stride=1))


def read(length: int, head_dim: int) -> None:
    """Three slices of a stream."""
    stride, shape = 2, (2, KV_HEADS, 3, CHUNK, head_dim)
    rings, twins = ((Ring(draw(*shape)), Ring(draw(*shape))) for _ in range(2))
    options: dict[str, Any] = {"stride": stride, "topology": "shift", "rope_theta": 10000.0}
    for position in (0, length, 2 * length):
        q, k, v = (draw(2, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
        got = prefill_attention_triton(q, k, v, rings, position=position, **options)
        with sdpa_kernel(SDPBackend.MATH):  # racecheck reports cuDNN's kernel, which is not ours to judge
            want = prefill_attention(q, k, v, twins, position=position, **options)
        close(got, want)


def step(position: int, head_dim: int) -> None:
    ring = (draw(2, KV_HEADS, 3, CHUNK, head_dim), draw(2, KV_HEADS, 3, CHUNK, head_dim))
    at = torch.tensor([position, 3 * position], device="cuda")
    q, k, v = (draw(2, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    y = step_attention_triton(q, k, v, ring, position=at, stride=2, topology="shift", rope_theta=10000.0)
    assert bool(y.isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 129, 256, 500])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    torch.manual_seed(0)
    for length, head_dim in itertools.product(options.lengths, options.head_dims):
        for run in (train, read, step):
            run(length, head_dim)
        torch.cuda.synchronize()
        print(f"{length} characters, heads of {head_dim}: right", flush=True)


if __name__ == "__main__":
    main()
