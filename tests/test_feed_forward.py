"""The fused feed-forward layer against float64: odd numbers of rows, all gradients, the model's own path.

The kernel runs natively on a GPU and under Triton's interpreter elsewhere, in the process that
tests/test_interpreter.py starts for it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.layers import Layer
from butterfly_llm.ops import feed_forward
from butterfly_llm.ops.feed_forward import Pass, Tiles, relu2_feed_forward, tiles
from conftest import CUDA, DEVICE, INTERPRETED, chunk_error, kernels, random_model

EPS = 1e-6
# RMS error over RMS reference, worst 16 rows; observed: float32 4e-7, float16 1.2e-3.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = ("out", "x", "gain", "up", "down")


def make(rows: int, size: int, inner: int, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
    """x, gain, up, down and the gradient of the result, values that the dtype can hold."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, size), (size,), (inner, size), (size, inner), (rows, size))
    x, gain, up, down, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    rounded = [x, 1 + gain / 4, up / size**0.5, down / inner**0.5, grad]
    return [z.to(dtype).float().to(device) for z in rounded]


def plain(x: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    y = F.rms_norm(x, gain.shape, gain, eps)
    return x + F.linear(F.relu(F.linear(y, up)).square(), down)


def run(layer: object, tensors: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The result and the gradients of x, gain, up and down; x in `dtype`."""
    leaves = [z.detach().clone().requires_grad_() for z in tensors[:4]]
    out = layer(leaves[0].to(dtype), *leaves[1:], EPS)  # type: ignore[operator]
    out.backward(tensors[4].to(dtype))
    return dict(zip(NAMES, (out.detach(), *(z.grad for z in leaves)), strict=True))


def check(rows: int, size: int, inner: int, dtype: torch.dtype) -> None:
    tensors = make(rows, size, inner, dtype)
    found = run(relu2_feed_forward, tensors, dtype)
    wanted = run(plain, [z.double() for z in tensors], torch.float64)
    for name in NAMES:
        got, want = (z if z.ndim == 2 else z[None] for z in (found[name], wanted[name]))
        error = chunk_error(got[None], want[None], 16)
        assert error < TOLERANCE[dtype], (name, error)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "size", "inner"), [(1, 32, 16), (63, 48, 80), (129, 64, 192), (200, 16, 64)]
)
def test_result_and_gradients(rows: int, size: int, inner: int, dtype: torch.dtype) -> None:
    check(rows, size, inner, dtype)


def check_read(rows: int, size: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients one kernel takes both products; its result is poisoned before."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x).fill_(float("nan")))
    x, *weights, _ = make(rows, size, inner, dtype)
    calls = []
    monkeypatch.setattr(feed_forward, "_launch", lambda *rest: calls.append(rest))
    with torch.no_grad():
        found = relu2_feed_forward(x.to(dtype), *weights, EPS)
    wanted = plain(x.double(), *(z.double() for z in weights), EPS)
    assert not calls and chunk_error(found[None], wanted[None], 16) < TOLERANCE[dtype]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "size", "inner"), [(1, 32, 16), (63, 16, 80), (129, 64, 192)])
def test_without_gradients_it_is_one_kernel(
    rows: int, size: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(feed_forward.FORCED_TILES, "whole", Tiles(32, 16, size, 4, 1))
    check_read(rows, size, inner, dtype, monkeypatch)


@pytest.fixture
def launched_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes whose kernel was launched."""
    launched: list[str] = []

    def noted(which: str, *rest: object, launch: object = feed_forward._launch) -> Tensor:
        launched.append(which)
        return launch(which, *rest)  # type: ignore[operator]

    monkeypatch.setattr(feed_forward, "_launch", noted)
    monkeypatch.setattr(feed_forward, "ENABLED", True)
    return launched


@kernels
def test_without_gradients_rows_of_other_widths_take_two(launched_passes: list[str]) -> None:
    x, *weights, _ = make(63, 48, 80, torch.float16)
    with torch.no_grad():
        found = relu2_feed_forward(x.half(), *weights, EPS)
    wanted = plain(x.double(), *(z.double() for z in weights), EPS)
    assert launched_passes == ["forward"]
    assert chunk_error(found[None], wanted[None], 16) < TOLERANCE[torch.float16]


def finish(layer: Layer, backend: str, rows: int, half: object = Layer._finish) -> list[Tensor]:
    """The half of a layer behind the attention: result, gradients of both inputs and of all parameters."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 64, generator=generator).to(DEVICE).requires_grad_()
    y = torch.randn(rows, 2, 32, generator=generator).to(DEVICE).requires_grad_()
    out = half(layer, x, y, backend)  # type: ignore[operator]
    leaves = [x, y, *layer.parts()[1]]
    return [
        out.detach(),
        *torch.autograd.grad(out, leaves, torch.randn(rows, 64, generator=generator).to(DEVICE)),
    ]


@kernels
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_takes_it(compiled: bool, launched_passes: list[str]) -> None:
    layer = random_model(ButterflyConfig.preset("micro")).to(DEVICE).layers[0]
    half = Layer._finish
    if compiled:
        half = torch.compile(half, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for a, b in zip(finish(layer, "triton", 130, half), finish(layer, "torch", 130), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert launched_passes == ["forward", "gradient"]


@kernels
def test_a_layer_that_it_does_not_fit_does_without(launched_passes: list[str]) -> None:
    layer = random_model(ButterflyConfig.preset("micro")).to(DEVICE).layers[0]
    gated = random_model(ButterflyConfig.preset("micro", feed_forward="swiglu")).to(DEVICE).layers[0]
    for which, rows in ((layer, 100), (gated, 130)):
        for a, b in zip(finish(which, "triton", rows), finish(which, "torch", rows), strict=True):
            assert torch.equal(a, b)
    assert launched_passes == []


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**changes: object) -> str | None:
        return feed_forward.reason_against(ButterflyConfig.preset("full", **changes))

    monkeypatch.setattr(feed_forward, "ENABLED", False)
    assert "off" in str(reason())
    monkeypatch.setattr(feed_forward, "ENABLED", True)
    assert reason() is None
    assert reason(feed_forward="swiglu") == "swiglu has no kernel"
    assert "3000" in str(reason(intermediate_size=3000))


@pytest.mark.parametrize("which", ["forward", "gradient"])
@pytest.mark.parametrize("kilobytes", [64, 99, 227])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "inner"), [(256, 1024), (768, 3072), (48, 80)])
def test_tiles_divide_the_product(
    size: int, inner: int, dtype: torch.dtype, kilobytes: int, which: Pass
) -> None:
    cut = tiles(which, dtype, inner, size, kilobytes * 1024)
    assert inner % cut.block_n == 0 and size % cut.block_k == 0 and min(cut.block_n, cut.block_k) >= 16
    stages = max(1, cut.num_stages) * (cut.block_m + cut.block_n) * cut.block_k * dtype.itemsize
    assert stages <= kilobytes * 1024


native = pytest.mark.skipif(not CUDA or INTERPRETED, reason="needs a GPU")


@native
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size", "inner"), [(4097, 256, 1024), (333, 128, 512)])
def test_a_gpu_reads_with_one_kernel(
    rows: int, size: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_read(rows, size, inner, dtype, monkeypatch)


@native
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size", "inner"), [(4097, 256, 1024), (1500, 768, 3072), (333, 128, 512)])
def test_gpu_result_and_gradients(rows: int, size: int, inner: int, dtype: torch.dtype) -> None:
    check(rows, size, inner, dtype)


@native
@pytest.mark.gpu
def test_gpu_beyond_32_bits() -> None:
    """2.1 million rows of 1,024 hidden values: the last rows are those of a short run."""
    rows = 2**21 + 300
    x, gain, up, down, _ = make(rows, 64, 1024, torch.bfloat16)
    out = relu2_feed_forward(x.bfloat16(), gain, up, down, EPS)
    short = relu2_feed_forward(x[-300:].bfloat16(), gain, up, down, EPS)
    torch.testing.assert_close(out[-300:], short, rtol=1e-2, atol=1e-2)


@native
@pytest.mark.gpu
@pytest.mark.parametrize("cut", [Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3)])
def test_gpu_repeats_bit_by_bit(cut: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "FORCED_TILES", {"forward": cut, "gradient": cut})
    tensors = make(4097, 256, 1024, torch.bfloat16)
    first, second = (run(relu2_feed_forward, tensors, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
