"""The operators against the dense reference, in every output and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.ops import backends, butterfly_attention, default_backend
from butterfly_llm.ops.loss import linear_cross_entropy
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.ops.rope import rope_table, rotate
from butterfly_llm.routing import Topology, partner_of
from conftest import chunk_error
from test_recompute import Peak

TOPOLOGIES = ("shift", "xor", "xor_causal")
# dtype -> largest chunk error allowed; the largest seen were 3e-15, 2.1e-6 and 0.0085
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


def random_qkv(num_chars: int, dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    shapes = [(2, num_chars, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("topology", "local"),
    [*((each, 0) for each in TOPOLOGIES), ("shift", 1), ("shift", 3), ("xor_causal", 2)],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_portable_equals_reference_in_outputs_and_gradients(
    topology: str, local: int, dtype: torch.dtype
) -> None:
    for num_chars in (1, 7, 8, 9, 63, 64, 65, 100):
        for stride in (1, 2, 4, 16):
            inputs = random_qkv(num_chars, dtype)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            settings = {"stride": stride, "topology": topology, "chunk_size": 8, "local": local}
            y = butterfly_attention(*inputs, backend="torch", **settings)
            expected = butterfly_attention_reference(*exact, **settings)  # type: ignore[arg-type]
            upstream = torch.randn_like(expected)
            y.backward(upstream.to(dtype))
            expected.backward(upstream)
            pairs = [(y, expected), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]
            for actual, reference in pairs:
                assert actual is not None and reference is not None
                error = chunk_error(actual.detach(), reference.detach(), 8)
                assert error <= TOLERANCE[dtype], (num_chars, stride, error)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradcheck_of_the_reference(topology: str) -> None:
    inputs = [torch.randn(1, 9, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return butterfly_attention(
            q,
            k,
            v,
            stride=1,
            topology=topology,
            chunk_size=3,
            backend="reference",  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("stride", "local", "chunks"), [(2, 0, [2]), (4, 1, [1, 4]), (4, 2, [1, 2, 4]), (2, 3, [1, 2, 3])]
)
def test_reference_sees_exactly_own_partner_and_local_chunks(
    stride: int, local: int, chunks: list[int]
) -> None:
    num_chars, chunk = 40, 4
    q, k = torch.zeros(1, num_chars, 1, 2), torch.zeros(1, num_chars, 1, 2)
    v = torch.eye(num_chars)[None, :, None, :]
    q, k = (F.pad(x, (0, num_chars - 2)) for x in (q, k))
    weights = butterfly_attention_reference(q, k, v, stride=stride, chunk_size=chunk, local=local)[0, :, 0]
    for t in range(num_chars):
        own = range(t // chunk * chunk, t + 1)
        starts = [(t // chunk - back) * chunk for back in chunks]
        seen = {*own, *(i for start in starts if start >= 0 for i in range(start, start + chunk))}
        assert {u for u in range(num_chars) if weights[t, u] > 0} == seen


@pytest.mark.parametrize(("topology", "stride"), [("shift", 1), ("shift", 5), ("xor_causal", 4)])
@pytest.mark.parametrize("local", [1, 2, 3])
def test_local_chunks_and_partner_stand_side_by_side(topology: Topology, stride: int, local: int) -> None:
    """Against one softmax over plainly numbered positions: partner, local chunks, own."""
    size, chunks = 4, 11
    q, k, v = (x.detach()[:1] for x in random_qkv(size * chunks, torch.float64, heads=2, kv_heads=2))
    y = butterfly_attention_reference(q, k, v, stride=stride, topology=topology, chunk_size=size, local=local)
    for chunk in range(chunks):
        partner = partner_of(chunk, stride, topology)
        near = list(range(max(0, chunk - local), chunk + 1))
        read = {c: c - chunk for c in near} | (
            {partner: -local - 1} if partner >= 0 and stride > local else {}
        )
        rows = torch.cat([torch.arange(size) + c * size for c in read])
        places = torch.cat([torch.arange(size) + (at + local + 1) * size for at in read.values()])
        own = torch.arange(size) + (local + 1) * size
        turned = rotate(q[0, chunk * size : (chunk + 1) * size], *rope_table(own, 8, 10000.0, q.dtype))
        keys = rotate(k[0, rows], *rope_table(places, 8, 10000.0, q.dtype))
        scores = torch.einsum("qhd,khd->hqk", turned, keys) / 8**0.5
        weights = scores.masked_fill(places > own[:, None], float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[0, rows])
        assert torch.allclose(y[0, chunk * size : (chunk + 1) * size], expected, atol=1e-12), chunk


def test_scores_depend_on_the_distance_inside_the_pair_alone() -> None:
    """The same text in every chunk gives the same output in every chunk that has a partner, at any stride."""
    chunk = [torch.randn(1, 8, 2, 8, dtype=torch.float64).repeat(1, 12, 1, 1) for _ in range(3)]
    for stride in (1, 2, 4):
        y = butterfly_attention(*chunk, stride=stride, chunk_size=8, backend="torch").view(12, 8, 2, 8)
        assert torch.allclose(y[stride:], y[stride].expand(12 - stride, -1, -1, -1), atol=1e-12)
        assert torch.allclose(y[stride], y[-1], atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("num_chars", [1, 16, 29])
def test_inputs_may_come_rotated(backend: str, num_chars: int) -> None:
    q, k, v = (x.detach() for x in random_qkv(num_chars, torch.float64))
    table = rope_table(torch.arange(num_chars) % 8, 8, 10000.0, torch.float64)
    settings = {"stride": 1, "chunk_size": 8, "backend": backend}
    expected = butterfly_attention_reference(q, k, v, stride=1, chunk_size=8)
    y = butterfly_attention(rotate(q, *table), rotate(k, *table), v, rotated=True, **settings)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(butterfly_attention(q, k, v, **settings), expected, atol=1e-12)


def test_rotation_is_relative() -> None:
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        tables = [rope_table(torch.tensor([p]), 16, 10000.0, torch.float64) for p in (i, j)]
        return float((rotate(q, *tables[0]) * rotate(k, *tables[1])).sum())

    assert score(130, 5) == pytest.approx(score(125, 0), abs=1e-12)
    assert score(3, 5) != pytest.approx(score(5, 3), abs=1e-6)


def test_sliced_loss_equals_the_plain_one_with_gradients() -> None:
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(256, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 256, (50,), dtype=torch.uint8)
    rows = torch.rand(50)
    logits = F.linear(hidden, weight).float()
    for weights in (None, rows):
        losses = F.cross_entropy(logits, targets.long(), reduction="none")
        plain = losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
        sliced = linear_cross_entropy(hidden, weight, targets, weights, slice_rows=7)
        assert sliced.item() == pytest.approx(plain.item(), rel=1e-6)
        expected = torch.autograd.grad(plain, (hidden, weight), retain_graph=True)
        for a, b in zip(torch.autograd.grad(sliced, (hidden, weight)), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_sliced_loss_holds_the_logits_of_one_slice(weighted: bool) -> None:
    """Forward and backward: nothing as large as all logits, and at no time more than a few slices of them."""
    rows, vocab, size = 8192, 256, 8
    hidden = torch.randn(rows, size, requires_grad=True)
    weight = torch.randn(vocab, size, requires_grad=True)
    targets, weights = torch.randint(0, vocab, (rows,)), torch.rand(rows) if weighted else None
    with Peak() as peak:
        linear_cross_entropy(hidden, weight, targets, weights, slice_rows=512).backward()
    slice_bytes = 4 * 512 * vocab
    assert slice_bytes <= peak.largest < 2 * slice_bytes
    assert peak.most < 6 * slice_bytes < 4 * rows * vocab


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "stride 0"),
        ({"stride": 3, "causal": False}, "power of two"),
        ({"local": 1, "causal": False}, "local 1 must be at least 0, and 0 for xor"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    q, k, v = random_qkv(8, torch.float32)
    with pytest.raises(ValueError, match=message):
        butterfly_attention(q, k, v, **{"stride": 1, **change})  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = random_qkv(8, torch.float32, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="3 heads, 2 key-value"):
        butterfly_attention(q, k, v, stride=1)
    with pytest.raises(ValueError, match=r"expected \(B, N, H, D\)"):
        butterfly_attention(q, k[:, 1:], v, stride=1)


def test_backend_choice_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends()["torch"] == "available"
    monkeypatch.delenv("BUTTERFLY_BACKEND", raising=False)
    assert default_backend("cpu") == "torch"
    monkeypatch.setenv("BUTTERFLY_BACKEND", "reference")
    assert default_backend("cpu") == "reference"
    monkeypatch.setenv("BUTTERFLY_BACKEND", "fast")
    with pytest.raises(ValueError, match="BUTTERFLY_BACKEND=fast"):
        default_backend("cpu")
