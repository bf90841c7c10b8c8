"""The carry with heads: a softmax over everything that a lane has heard, in log depth."""

import dataclasses

import pytest
import torch

from butterfly_llm.carry import CarryMerge, CarryWrite
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops.portable import partner_rows
from butterfly_llm.routing import Topology

CONFIG = dataclasses.replace(ButterflyConfig.preset("micro"), carry_heads=4)
SIZE = CONFIG.carry_size


def test_after_a_pass_a_lane_holds_the_softmax_mean_of_all_chunks() -> None:
    torch.manual_seed(0)
    chunks, chunk = 2**CONFIG.num_levels, CONFIG.chunk_size
    rows = torch.randn(1, chunks * chunk, CONFIG.carry_width, dtype=torch.float64)
    rows[..., :4] *= 3
    merge, scan = CarryMerge(CONFIG).double(), rows
    for level in range(CONFIG.num_levels):
        scan = merge(scan, partner_rows(scan, 1 << level, "shift", chunk, scores=4))
    scores = rows[0, :, :4].unflatten(0, (chunks, chunk))  # (C, L, G)
    values = rows[0, :, 4:].unflatten(0, (chunks, chunk)).unflatten(-1, (4, -1))  # (C, L, G, M / G)
    # The last chunk, all bits of whose number are set, hears every other exactly once.
    last = scan[0, -chunk:]
    torch.testing.assert_close(last[:, :4], torch.logsumexp(scores, 0), atol=1e-5, rtol=0)
    wanted = (scores.softmax(0)[..., None] * values).sum(0).flatten(-2)
    torch.testing.assert_close(last[:, 4:], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("topology", ["shift", "xor_causal", "xor"])
def test_who_has_no_partner_keeps_the_carry(topology: Topology) -> None:
    torch.manual_seed(0)
    merge, chunk = CarryMerge(CONFIG), CONFIG.chunk_size
    torch.nn.init.normal_(merge.bias)
    rows = torch.randn(2, 3 * chunk, CONFIG.carry_width, requires_grad=True)
    partner = partner_rows(rows, 2, topology, chunk, scores=4)
    merged = merge(rows, partner)
    alone = partner[0, :, 0].isinf()
    assert torch.equal(merged[:, alone], rows[:, alone]) and not torch.equal(merged, rows)
    assert alone.sum() == {"shift": 2, "xor_causal": 2, "xor": 1}[topology] * chunk
    (gradient,) = torch.autograd.grad(merged.square().sum(), rows)
    assert gradient.isfinite().all()


def test_what_is_written_has_unit_size_in_every_head() -> None:
    torch.manual_seed(0)
    rows = CarryWrite(CONFIG)(torch.randn(5, CONFIG.hidden_size))
    assert rows.shape == (5, SIZE + 4)
    sizes = rows[:, 4:].unflatten(-1, (4, -1)).square().mean(-1)
    torch.testing.assert_close(sizes, torch.ones(5, 4), atol=1e-4, rtol=0)


def test_heads_must_divide_the_carry() -> None:
    with pytest.raises(ValueError, match="carry_heads 3 must divide carry_size 16"):
        dataclasses.replace(CONFIG, carry_heads=3)
