"""The Triton kernels against the dense float64 reference: every topology, odd lengths, all gradients.

On a GPU the cases run natively. Elsewhere `test_interpreter.py` runs this file in a process with
TRITON_INTERPRET=1, because Triton reads that once, when first imported. The interpreter has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops import butterfly_attention, triton_attention
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.triton_attention import Tiles, butterfly_attention_triton
from butterfly_llm.routing import Topology
from conftest import CUDA, DEVICE, INTERPRETED, chunk_error, kernels, random_model

# RMS error over RMS reference, worst chunk; observed: float32 3e-7, float16 6e-4.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    topology: Topology
    length: int
    chunk_size: int
    stride: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 32
    batch: int = 1
    theta: float | None = 10000.0
    local: int = 0

    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride, "topology": self.topology,
            "chunk_size": self.chunk_size, "rope_theta": self.theta, "local": self.local,
        }  # fmt: skip


CASES = [
    Case("shift", 1, 16, 1, heads=4, kv_heads=2, batch=2),
    Case("shift", 15, 16, 1, heads=2, kv_heads=1, batch=2),
    Case("shift", 16, 16, 1),
    Case("shift", 17, 16, 1, heads=2, kv_heads=2, batch=2, head_dim=64),
    Case("shift", 63, 16, 2, heads=3, kv_heads=1),
    Case("shift", 127, 16, 4, heads=2, kv_heads=1, theta=None),
    Case("shift", 129, 32, 3, batch=2),
    Case("shift", 63, 16, 1 << 40),
    Case("shift", 64, 16, 2, heads=2, kv_heads=1, batch=2),
    Case("xor", 1, 16, 1),
    Case("xor", 17, 16, 1, heads=2, kv_heads=1, batch=2),
    Case("xor", 63, 16, 2, heads=2, kv_heads=2, theta=None),
    Case("xor", 129, 32, 4, heads=2, kv_heads=1),
    Case("xor", 127, 16, 64),
    Case("xor", 64, 16, 1, heads=2, kv_heads=1, batch=2),
    Case("xor_causal", 64, 16, 2, heads=2, kv_heads=2),
    Case("xor_causal", 17, 16, 1, batch=2),
    Case("xor_causal", 63, 16, 2, heads=2, kv_heads=1),
    Case("xor_causal", 129, 32, 1, head_dim=128),
    Case("shift", 63, 16, 1, heads=2, kv_heads=1, local=1),
    Case("shift", 97, 16, 4, heads=2, kv_heads=1, batch=2, local=1),
    Case("shift", 112, 16, 2, local=3, theta=None),
    Case("shift", 100, 16, 4, heads=2, kv_heads=2, local=2),
    Case("shift", 40, 16, 1 << 40, local=1),
    Case("shift", 170, 16, 10, local=9),
    Case("xor_causal", 64, 16, 2, heads=2, kv_heads=2, local=1),
]
NAMES = [
    f"{c.topology}-{c.length}-chunk{c.chunk_size}-stride{c.stride}" + f"-local{c.local}" * (c.local > 0)
    for c in CASES
]


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A fused projection (B, N, (H + 2K) * D) and a gradient of the output, (B, N, H, D)."""
    torch.manual_seed(seed)
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    fused = torch.randn(case.batch, case.length, width, device=DEVICE).to(dtype)
    grad = torch.randn(case.batch, case.length, case.heads, case.head_dim, device=DEVICE).to(dtype)
    return fused, grad


def split(fused: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Views q, k, v into the fused projection."""
    rows = fused.unflatten(-1, (-1, case.head_dim))
    return rows.split([case.heads, case.kv_heads, case.kv_heads], 2)


def run(op: Callable[..., Tensor], fused: Tensor, grad: Tensor, case: Case) -> dict[str, Tensor]:
    """Output and the gradients of q, k, v."""
    fused = fused.detach().clone().requires_grad_()
    y = op(*split(fused, case), **case.options())
    y.backward(grad)
    assert fused.grad is not None
    return dict(zip(("y", "dq", "dk", "dv"), (y.detach(), *split(fused.grad, case)), strict=True))


def fused_attention(*inputs: Tensor, **options: Any) -> Tensor:
    return butterfly_attention(*inputs, backend="triton", **options)


def check(case: Case, dtype: torch.dtype) -> None:
    fused, grad = make(case, dtype)
    got = run(fused_attention, fused, grad, case)
    want = run(butterfly_attention_reference, fused.double(), grad.double(), case)
    errors = {name: chunk_error(got[name], want[name], case.chunk_size) for name in want}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised buffers hold NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *a, **k: new_empty(x, *a, **k).fill_(float("nan"))
    )
    monkeypatch.setattr(torch, "empty_like", lambda x, *a, **k: empty_like(x, *a, **k).fill_(float("nan")))


@pytest.fixture
def forced_tiles() -> Iterator[dict[triton_attention.Pass, Tiles]]:
    yield triton_attention.FORCED_TILES
    triton_attention.FORCED_TILES.clear()


@kernels
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_float32_matches_the_reference(case: Case, poisoned: None) -> None:
    check(case, torch.float32)


@kernels
@pytest.mark.parametrize("case", CASES[1::4], ids=NAMES[1::4])
def test_float16_matches_the_reference(case: Case, poisoned: None) -> None:
    check(case, torch.float16)


@kernels
@pytest.mark.parametrize("chunk_size", [128, 256])
def test_large_chunks(chunk_size: int, poisoned: None) -> None:
    check(Case("shift", chunk_size + 65, chunk_size, 1, head_dim=64), torch.float16)


@kernels
@pytest.mark.parametrize("topology", ["shift", "xor"])
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16)])
def test_unequal_tiles(
    topology: Topology, block_m: int, block_n: int, forced_tiles: dict[triton_attention.Pass, Tiles]
) -> None:
    for which in ("forward", "query_gradient", "key_gradient"):
        forced_tiles[which] = Tiles(block_m, block_n, 4, 1)
    check(Case(topology, 85, 32, 1), torch.float32)


@kernels
def test_repeated_runs_are_identical() -> None:
    case = Case("shift", 49, 16, 1, heads=2)
    fused, grad = make(case, torch.float16)
    first, second = (run(butterfly_attention_triton, fused, grad, case) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@kernels
def test_any_gradient_layout() -> None:
    """An expanded gradient, as from sum(), and one whose rows are not adjacent."""
    case = Case("shift", 33, 16, 1)
    fused, grad = make(case, torch.float32)
    ones = torch.ones((), device=DEVICE).expand_as(grad)
    turned = grad.transpose(1, 3).contiguous().transpose(1, 3)
    for view in (ones, turned):
        got = run(butterfly_attention_triton, fused, view, case)
        want = run(butterfly_attention_triton, fused, view.contiguous(), case)
        assert all(torch.equal(got[name], want[name]) for name in want)


@kernels
def test_operator_contract() -> None:
    """Schema, fake shapes and strides, autograd registration."""
    case = Case("shift", 17, 16, 1)
    q, k, v = (x.detach().requires_grad_() for x in split(make(case, torch.float32)[0], case))
    torch.library.opcheck(torch.ops.butterfly.attention_fwd.default, (q, k, v, 1, "shift", 16, 10000.0, 1))


@kernels
def test_one_graph_for_every_stride() -> None:
    """torch.compile without a graph break; the stride becomes a symbol, not a recompilation."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=count)
    def layer(fused: Tensor, stride: int) -> Tensor:
        options = case.options() | {"stride": stride}
        return butterfly_attention_triton(*split(fused * 2, case), **options)

    case = Case("shift", 81, 16, 1)
    fused, _ = make(case, torch.float32)
    for stride in (1, 2, 4, 8):
        want = butterfly_attention_triton(*split(fused * 2, case), **case.options() | {"stride": stride})
        assert torch.equal(layer(fused, stride), want)
    assert graphs <= 3  # 1 is always its own case, then one value, then the symbol


@kernels
def test_a_model_is_one_graph_and_equals_eager() -> None:
    """Loss and every gradient, bit for bit, of a butterfly pass with carry."""
    config = ButterflyConfig.preset(
        "micro", num_local_layers=0, num_passes=1, num_levels=2, num_refine_layers=0
    )
    model = random_model(config).to(DEVICE)
    model.backend = "triton"
    ids = torch.randint(0, 256, (1, 20), device=DEVICE)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = wrap(model.loss)(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@kernels
def test_local_chunks_in_every_second_layer() -> None:
    """Loss and every gradient of a butterfly pass with carry, against the dense reference."""
    model = random_model(
        ButterflyConfig.preset(
            "micro", num_local_layers=0, num_passes=1, num_levels=4, num_refine_layers=0, local_chunks=2,
            local_every=2,
        )
    ).to(DEVICE)  # fmt: skip
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        model.backend = backend
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_tiles_fit_the_chunk_and_small_cards() -> None:
    for which in ("forward", "query_gradient", "key_gradient"):
        for dtype in triton_attention.DTYPES:
            for head_dim in triton_attention.HEAD_DIMS:
                small = triton_attention.tiles(which, dtype, head_dim, 128, 99 * 1024)
                large = triton_attention.tiles(which, dtype, head_dim, 128, 227 * 1024)
                assert small.block_m * small.block_n <= large.block_m * large.block_n
                cut = triton_attention.tiles(which, dtype, head_dim, 16, 227 * 1024)
                assert (cut.block_m, cut.block_n) == (16, 16)


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 4, 1, 32)
    options: dict[str, Any] = {"stride": 1, "topology": "shift", "chunk_size": 128, "rope_theta": None}
    monkeypatch.setattr(triton_attention, "_TRITON_FOUND", False)
    assert triton_attention.status() == "triton is not installed"
    with pytest.raises(ImportError, match="pip install triton"):
        butterfly_attention_triton(q, q, q, **options)
    monkeypatch.setattr(triton_attention, "_TRITON_FOUND", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors, not cpu"):
        butterfly_attention_triton(q, q, q, **options)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="head size 48"):
        butterfly_attention_triton(*(torch.zeros(1, 4, 1, 48),) * 3, **options)
    with pytest.raises(ValueError, match="chunk size 24"):
        butterfly_attention_triton(q, q, q, **options | {"chunk_size": 24})
    with pytest.raises(ValueError, match=r"torch\.float64"):
        butterfly_attention_triton(q.double(), q.double(), q.double(), **options)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA or INTERPRETED, reason="needs a GPU")]
GPU_CASES = [
    Case("shift", 4096 + 17, 128, 4, heads=12, kv_heads=12, head_dim=64),
    Case("shift", 2048 + 129, 128, 1, heads=4, kv_heads=2, head_dim=64, batch=2),
    Case("shift", 1500, 64, 8, heads=2, kv_heads=2, head_dim=32),
    Case("shift", 1500, 128, 2, heads=2, kv_heads=1, head_dim=128),
    Case("xor", 2048 + 33, 128, 2, heads=2, kv_heads=2, head_dim=64),
    Case("xor_causal", 2048 + 33, 128, 4, heads=2, kv_heads=1, head_dim=64, theta=None),
]


GPU_RUNS = [
    *((case, torch.bfloat16, 227) for case in GPU_CASES),
    *((case, torch.bfloat16, 99) for case in GPU_CASES[1:4]),
    (GPU_CASES[1], torch.float16, 227),
    *((case, torch.float32, 227) for case in GPU_CASES[1:4]),
]


@pytest.mark.parametrize("case, dtype, shared_kilobytes", [pytest.param(*run, marks=gpu) for run in GPU_RUNS])
def test_gpu_matches_the_reference(
    case: Case, dtype: torch.dtype, shared_kilobytes: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "_shared_limit", lambda device: shared_kilobytes * 1024)
    check(case, dtype)


@pytest.mark.parametrize("case", [pytest.param(case, marks=gpu) for case in GPU_CASES[:2]])
def test_gpu_compiled_equals_eager(case: Case) -> None:
    """Forward and gradients, bit for bit, for changing strides."""
    compiled = torch.compile(butterfly_attention_triton, fullgraph=True)
    fused, grad = make(case, torch.bfloat16)
    for stride in (1, 2, 4, 16):
        strided = Case(**vars(case) | {"stride": stride})
        got, want = (run(op, fused, grad, strided) for op in (compiled, butterfly_attention_triton))
        for name in want:
            assert torch.equal(got[name], want[name]), (stride, name)
