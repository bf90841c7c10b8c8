"""Windows of benchmarks/recall_small.py: questions repeat what facts say, and hops follow the routing."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from butterfly_llm.routing import hops
from conftest import benchmark


@pytest.fixture(scope="module")
def small() -> ModuleType:
    return benchmark("recall_small")


@pytest.mark.parametrize(("keys", "values", "chunk"), [(1, 1, 16), (2, 3, 64), (3, 1, 128)])
@pytest.mark.parametrize("real", [False, True])
def test_questions_repeat_facts(small: ModuleType, keys: int, values: int, chunk: int, real: bool) -> None:
    source = np.frombuffer(bytes(range(256)) * 8, dtype=np.uint8) if real else None
    generator = np.random.Generator(np.random.Philox(key=[1, 0]))
    drawn = small.windows(generator, 20, 512, 6, source, small.Form(keys, values, chunk))
    drawn_arrays = (x.numpy() for x in (drawn.text, drawn.hops, drawn.shared, drawn.plain))
    for text, relays, shared, plain in zip(*drawn_arrays, strict=True):

        def starts(first: int, text: np.ndarray = text) -> list[int]:
            letter = (text >= first) & (text < first + 16)
            return [i for i in np.flatnonzero(letter).tolist() if i == 0 or not letter[i - 1]]

        facts = {tuple(text[i : i + keys] - small.FACT): i for i in starts(small.FACT)}
        asked = starts(small.ASKED)
        assert len(facts) == len(asked) == 6
        found = np.full(512, -1)
        meets = np.zeros(512, dtype=bool)
        for question in asked:
            fact = facts[tuple(text[question : question + keys] - small.ASKED)]
            assert fact < question
            for i in range(keys, keys + values):
                assert text[question + i] == text[fact + i] >= small.VALUE
                found[question + i] = hops((question + i - 1) // chunk - (fact + i) // chunk)
                others = (
                    f + j for f in facts.values() if fact != f < question for j in range(keys, keys + values)
                )
                meets[question + i] = any((place - fact - i) % chunk == 0 for place in others)
        assert (relays == found).all() and (shared == meets).all()
        assert (~plain).sum() == 12 * (keys + values)
        assert (text[plain] < small.FACT).all()
    assert drawn.shared.any() or chunk == 128  # lanes of facts are multiples of five apart there


def test_what_does_not_fit_is_refused(small: ModuleType) -> None:
    generator = np.random.Generator(np.random.Philox(key=[1, 0]))
    with pytest.raises(ValueError, match="40 pairs do not fit 256 characters"):
        small.windows(generator, 1, 256, 40, None, small.Form(2, 1, 16))


def test_a_run_ends_in_a_row(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["heads:carry_heads=4,chunk_size=32", "--steps", "2", "--chars", "256", "--pairs", "4"]
    monkeypatch.setattr(sys, "argv", ["recall_small.py", *arguments, "--key-chars", "2"])
    small.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["variant"] == "heads" and row["key_chars"] == 2 and row["bits_per_char"] is None
    assert sum(row["asked"].values()) == 12 * 16 * 4
    assert all(0 <= share <= 1 for share in row["by_hops"].values())
    far = sum(asked for count, asked in row["asked"].items() if count != "0")
    assert sum(asked for _, asked in row["by_lane"].values()) == far
