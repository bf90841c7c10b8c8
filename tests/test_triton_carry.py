"""The kernel of the carry's merge against the portable one; on the CPU under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from butterfly_llm.carry import CarryMerge
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops.portable import partner_rows
from butterfly_llm.ops.triton_carry import merge_heads_triton
from butterfly_llm.routing import Topology
from conftest import DEVICE, chunk_error, kernels, random_model

CHUNK = 16
LENGTHS = (1, 16, 17, 161)
HEADS = {2: 16, 3: 24, 4: 32}  # carry sizes
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def drawn(length: int, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, CarryMerge]:
    """A scan and a gradient (2, N, W), rounded to `dtype`, and a merge with a bias."""
    config = dataclasses.replace(ButterflyConfig.preset("micro"), carry_size=HEADS[heads], carry_heads=heads)
    scan, grad = (torch.randn(2, length, config.carry_width).to(dtype) for _ in range(2))
    merge = CarryMerge(config).double()
    torch.nn.init.normal_(merge.bias)
    return scan, grad, merge


def compare(length: int, stride: int, heads: int, topology: Topology, dtype: torch.dtype) -> None:
    scan, grad, merge = drawn(length, heads, dtype)
    exact = scan.double().requires_grad_()
    expected = merge(exact, partner_rows(exact, stride, topology, CHUNK, scores=heads))
    expected.backward(grad.double())
    assert exact.grad is not None and merge.bias.grad is not None

    ours = scan.to(DEVICE).requires_grad_()
    bias = merge.bias.detach().float().to(DEVICE).requires_grad_()
    found = merge_heads_triton(ours, bias, stride=stride, topology=topology, chunk_size=CHUNK)
    found.backward(grad.to(DEVICE))
    assert ours.grad is not None and bias.grad is not None
    tolerance = TOLERANCES[dtype]
    assert chunk_error(found.detach().cpu(), expected.detach(), CHUNK) < tolerance
    assert chunk_error(ours.grad.cpu(), exact.grad, CHUNK) < tolerance
    torch.testing.assert_close(bias.grad.cpu().double(), merge.bias.grad, rtol=tolerance, atol=tolerance)


@kernels
@pytest.mark.parametrize("topology", ["shift", "xor", "xor_causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_merge_and_its_gradients(length: int, topology: Topology) -> None:
    torch.manual_seed(length)
    for stride, heads in ((1, 2), (2, 3), (4, 4), (64, 2)):
        compare(length, stride, heads, topology, torch.float32)
    compare(length, 2, 4, topology, torch.float16)


@kernels
def test_a_model_trains_with_it_as_without() -> None:
    config = ButterflyConfig.preset("micro", carry_heads=4, num_passes=1)
    model = random_model(config).to(DEVICE)
    ids = torch.randint(256, (1, 50), device=DEVICE)
    found: dict[str, dict[str, Tensor]] = {}
    for backend in ("torch", "triton"):
        model.backend = backend  # type: ignore[assignment]
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()  # type: ignore[no-untyped-call]
        found[backend] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("merges.") for name in found["torch"])
    for name, expected in found["torch"].items():
        torch.testing.assert_close(found["triton"][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("topology", ["shift", "xor_causal"])
def test_bfloat16_and_repeats_on_a_gpu(topology: Topology) -> None:
    torch.manual_seed(0)
    for stride in (1, 8, 64):
        compare(5000, stride, 4, topology, torch.bfloat16)
    scan, grad, merge = drawn(5000, 4, torch.bfloat16)
    results = []
    for _ in range(3):
        ours, bias = scan.cuda().requires_grad_(), merge.bias.detach().float().cuda().requires_grad_()
        found = merge_heads_triton(ours, bias, stride=4, topology=topology, chunk_size=CHUNK)
        found.backward(grad.cuda())
        results.append((found.detach(), ours.grad, bias.grad))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    """The last chunk of a scan of 2.3e9 elements is right, forward and backward."""
    torch.manual_seed(0)
    length, heads, size = 1 << 23, 4, 272
    merge = CarryMerge(
        dataclasses.replace(ButterflyConfig.preset("micro"), carry_size=size, carry_heads=heads)
    ).cuda()
    scan = torch.randn(1, length, heads + size, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert scan.numel() > 1 << 31
    found = merge_heads_triton(scan, merge.bias, stride=1, topology="shift", chunk_size=128)
    tail = scan[:, -256:].detach().float().requires_grad_()
    expected = merge(tail, partner_rows(tail, 1, "shift", 128, scores=heads))[:, -128:]
    assert chunk_error(found[:, -128:].detach(), expected.detach(), 128) < 1.5e-2
    found[:, -128:].sum().backward()
    expected.sum().backward()
    assert scan.grad is not None and tail.grad is not None
    assert chunk_error(scan.grad[:, -256:], tail.grad, 128) < 1.5e-2
