"""Names that come back: found where they stand, and cheap only for a model that remembers that far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.evaluate import Document
from butterfly_llm.repeats import evaluate_repeats, occurrences

WINDOW = b"first_name = 1\n" + b"." * 600 + b"\nprint(first_name)\nreturn first_name\nother_name\n"


class Memory(nn.Module):
    """Certain of a character whose whole line of 4 characters before it stood at most `span` back."""

    def __init__(self, span: int) -> None:
        super().__init__()
        self.config = ButterflyConfig.preset("micro")
        self.anchor = nn.Parameter(torch.zeros(1))
        self.span = span

    def forward(self, ids: Tensor) -> Tensor:
        text = bytes(ids[0].tolist())
        logits = torch.zeros(1, len(text), 256)
        for i in range(4, len(text)):
            found = text.rfind(text[i - 3 : i + 1], max(0, i - self.span), i)
            if found >= 0:
                logits[0, i, text[found + 4]] = 20.0
        return logits


def test_occurrences_carry_their_distance() -> None:
    found = list(occurrences(WINDOW))
    assert [(WINDOW[start : start + length], distance) for start, length, distance in found] == [
        (b"first_name", 0),
        (b"first_name", 622),
        (b"first_name", 19),
    ]
    assert list(occurrences(WINDOW, max_count=2)) == []
    assert list(occurrences(WINDOW, min_chars=11)) == []


def test_a_long_memory_pays_less_for_what_comes_back() -> None:
    documents = [Document("text", WINDOW * 2)]

    def costs(span: int) -> Any:
        return evaluate_repeats(Memory(span), documents, context=len(WINDOW))  # type: ignore[arg-type]

    short, long = costs(100), costs(10_000)
    assert short.context == len(WINDOW) and short.first.names == 2 and short.first.chars == 20
    assert short.first.bits_per_char == pytest.approx(8, abs=0.1)
    assert set(long.again) == {0, 512}
    assert short.again[512].bits_per_char == pytest.approx(8, abs=0.1)
    for bucket in (0, 512):  # the first four characters of a name cannot be copied by this model
        assert long.again[bucket].bits_per_char < 5
    assert short.again[0].bits_per_char < 5
    assert math.isclose(short.again[0].bits_per_char, long.again[0].bits_per_char, rel_tol=1e-6)


def test_text_without_names_is_refused() -> None:
    with pytest.raises(ValueError, match="no name of 6 characters or more occurs twice"):
        evaluate_repeats(Memory(10), [Document("text", b"a b c")], context=64)  # type: ignore[arg-type]
