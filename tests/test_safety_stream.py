"""A stream of random characters in random pieces, saved and resumed at random: equal to the straight run.

Row 10 of docs/robustness.md; records/long_stream has the run over 10 million characters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from butterfly_llm.cache import cache_nbytes
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.state import load_state, save_state
from conftest import random_model

CONFIG = ButterflyConfig.preset("micro", hidden_size=32, intermediate_size=64, carry_size=8)
PIECES = st.lists(
    st.tuples(st.sampled_from(["prefill", "step", "save"]), st.integers(1, 90)), min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def model() -> Butterfly:
    return random_model(CONFIG).eval()


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 2**31))
def test_random_pieces_saves_and_steps_are_the_straight_run(
    model: Butterfly, pieces: list[tuple[str, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = 1 + sum(size for _, size in pieces)
    ids = torch.randint(0, 256, (1, total), generator=generator)
    with torch.inference_mode():
        straight = model.new_cache()
        expected = model.prefill(ids, straight)
        cache, done = model.new_cache(), 1
        model.prefill(ids[:, :1], cache)
        for how, size in pieces:
            if how == "save":
                with tempfile.TemporaryDirectory() as folder:
                    save_state(cache, Path(folder) / "state", model=model)
                    cache = load_state(Path(folder) / "state", model)
            for part in ids[:, done : done + size].split(1 if how == "step" else size, dim=1):
                if how == "step":
                    model.step(part[:, 0], cache)
                else:
                    model.prefill(part, cache)
            done += size
            assert cache.nbytes == cache_nbytes(CONFIG)
    assert cache.position == straight.position == total and cache.logits is not None
    torch.testing.assert_close(cache.logits, expected, atol=1e-4, rtol=0)


def test_the_state_is_bounded_by_the_schedule_alone(model: Butterfly) -> None:
    """As many characters as fill every ring, and three times as many more: not a byte is added."""
    cache = model.new_cache()
    full = (2 ** (CONFIG.num_levels - 1) + 1) * CONFIG.chunk_size
    sizes = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for _ in range(4):
            model.prefill(torch.randint(0, 256, (1, full)), cache)
            save_state(cache, Path(folder) / "state", model=model)
            rings = sum(path.stat().st_size for path in (Path(folder) / "state").glob("rings-*"))
            sizes.append((cache.nbytes, rings))
    assert len(set(sizes)) == 1 and sizes[0][0] == cache_nbytes(CONFIG)
    assert cache_nbytes(CONFIG) <= sizes[0][1] < cache_nbytes(CONFIG) + 20_000
