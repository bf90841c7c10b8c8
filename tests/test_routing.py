"""Which chunk reads which: the schedule, its reach, and why XOR with a causal mask does not do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from butterfly_llm.cache import routes_of
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.routing import partner_of, reach, reach_share

LEVELS = [1 << level for level in range(9)]


def test_small_and_full_have_53_layers_in_three_stages() -> None:
    for name in ("small", "full"):
        routes = routes_of(ButterflyConfig.preset(name))
        assert [r.stage for r in routes] == ["local"] * 4 + ["butterfly"] * 45 + ["refine"] * 4
        assert [r.stride for r in routes] == [1] * 4 + LEVELS * 5 + [1] * 4
        assert [r.index for r in routes if r.starts_pass] == [4, 13, 22, 31, 40]
        assert [r.index for r in routes if r.ends_pass] == [12, 21, 30, 39, 48]


def test_thirteen_levels_are_three_passes_and_six_layers() -> None:
    config = ButterflyConfig.preset("small", num_passes=3, num_levels=13, num_extra_levels=6)
    routes = routes_of(config)
    assert len(routes) == 53
    assert routes[4 + 39].starts_pass and not any(r.ends_pass for r in routes[4 + 39 :])
    assert config.reach_chars == 1_048_576


@pytest.mark.parametrize(
    ("strides", "topology", "share"),
    [
        (LEVELS, "shift", 1.0),
        (LEVELS, "xor_causal", 0.1499),
        (LEVELS * 5, "xor_causal", 0.1499),
        ([1] * 4 + LEVELS * 5 + [1] * 4, "shift", 1.0),
        ([1] * 53, "shift", 0.1996),
    ],
)
def test_share_of_512_chunks_reached(strides: list[int], topology: str, share: float) -> None:
    assert reach_share(512, strides, topology) == pytest.approx(share, abs=5e-5)  # type: ignore[arg-type]


def test_xor_with_causal_mask_hears_the_bit_subsets() -> None:
    for chunk, heard in enumerate(reach(64, [1 << b for b in range(6)] * 3, "xor_causal")):
        assert heard == sum(1 << d for d in range(64) if d & chunk == d)


def test_xor_without_mask_reaches_everything_both_ways() -> None:
    assert all(heard == (1 << 64) - 1 for heard in reach(64, [1 << b for b in range(6)], "xor"))


@given(st.integers(0, 5000), st.integers(0, 12), st.sampled_from(["shift", "xor", "xor_causal"]))
def test_every_chunk_is_read_by_at_most_one(chunk: int, level: int, topology: str) -> None:
    stride = 1 << level
    partner = partner_of(chunk, stride, topology)  # type: ignore[arg-type]
    if partner < 0:
        return
    readers = [r for r in {partner + stride, partner ^ stride} if partner_of(r, stride, topology) == partner]  # type: ignore[arg-type]
    assert readers == [chunk]
    assert topology == "xor" or partner < chunk
