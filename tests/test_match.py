"""Match: what is proposed is what stood there before, and model and match together stay a distribution."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch

from butterfly_llm.evaluate import Document, evaluate, format_table
from butterfly_llm.match import NOTHING, ORDER, MatchedText, Trust, proposals
from toy import Toy

PASSAGE = bytes(random.Random(0).choices(range(97, 123), k=200))


def naive(text: bytes) -> list[tuple[int, int]]:
    """(proposal, length) for each character, by searching the text."""
    found, at = [], None
    for i in range(len(text)):
        if at is not None and text[at] == text[i - 1]:
            at += 1
        elif i:
            start = text.rfind(text[i - ORDER : i], 0, i - 1) if i >= ORDER else -1
            at = None if start < 0 else start + ORDER
        if at is None:
            found.append((NOTHING, 0))
            continue
        length = 0
        while length < at and text[at - 1 - length] == text[i - 1 - length]:
            length += 1
        found.append((text[at], length))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_proposals_are_those_of_a_search(seed: int) -> None:
    generator = random.Random(seed)
    pieces = [bytes(generator.choices(b"ab", k=generator.randint(1, 30))) for _ in range(12)]
    text = b"".join(generator.choices(pieces, k=60))
    proposed, lengths = proposals(text)
    assert list(zip(proposed.tolist(), lengths.tolist(), strict=True)) == naive(text)
    assert 0 < (lengths == 0).sum() < len(text)


def test_nothing_is_proposed_on_the_hash_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("butterfly_llm.match._BITS", 6)  # every place in the table is shared by many
    text = bytes(random.Random(1).choices(b"abc", k=600)) + PASSAGE + PASSAGE
    proposed, lengths = proposals(text)
    assert (lengths > 0).any()
    for i in np.flatnonzero(lengths):
        assert lengths[i] >= ORDER and text.find(text[i - ORDER : i] + bytes([proposed[i]])) < i - ORDER


def test_a_proposal_depends_on_what_came_before_alone() -> None:
    text = PASSAGE + b"--" + PASSAGE[50:120] + PASSAGE
    whole, lengths = proposals(text)
    for cut in (1, 205, 230, 300):
        part, part_lengths = proposals(text[:cut])
        assert np.array_equal(part, whole[:cut]) and np.array_equal(part_lengths, lengths[:cut])
    assert (lengths[:202] == 0).all() and (whole[:202] == NOTHING).all()
    again = slice(202 + ORDER, 272)
    assert whole[again].tolist() == list(text[again]) and lengths[271] == 69


@pytest.mark.parametrize("rounds", [0, 1, 50])
def test_model_and_proposal_stay_a_distribution(rounds: int) -> None:
    generator = torch.Generator().manual_seed(rounds)
    trust = Trust()
    for i in range(rounds):
        trust.nats(i % 3 > 0, 11 + i, math.log(0.3), math.log(0.3 if i % 3 else 0.1))
    for proposal, length in ((3, 11), (250, 400), (7, 1 << 16)):
        logs = torch.log_softmax(4 * torch.randn(256, generator=generator, dtype=torch.float64), 0).tolist()
        total = sum(
            math.exp(-copy.deepcopy(trust).nats(c == proposal, length, logs[proposal], logs[c]))
            for c in range(256)
        )
        assert total == pytest.approx(1, abs=1e-9)


def test_a_certain_model_gives_finite_figures() -> None:
    assert math.isfinite(Trust().nats(False, 11, 0.0, -40.0))
    assert math.isfinite(Trust().nats(True, 11, -80.0, -80.0))


def test_trust_grows_with_being_right() -> None:
    trust = Trust()
    first, *_, last = (trust.nats(True, 64, math.log(0.1), math.log(0.1)) for _ in range(100))
    assert first == pytest.approx(-math.log(0.1), rel=0.1) and last < 0.05


def test_proposals_cost_little_where_the_model_knows_how_sure_it_is() -> None:
    generator, trust = np.random.default_rng(0), Trust()
    alone = together = 0.0
    for belief in generator.beta(4, 1, 5000).clip(0.001, 0.999).tolist():  # mostly sure, right as often
        right = bool(generator.random() < belief)
        target = math.log(belief if right else 1 - belief)
        alone -= target
        together += trust.nats(right, 64, math.log(belief), target)
    assert alone - 1 < together < 1.05 * alone


def test_windows_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PASSAGE + PASSAGE
    nats = np.linspace(0.5, 3, len(text), dtype=np.float32)
    one, other = MatchedText(text), MatchedText(text)
    one.take(0, nats, nats)
    for start in (300, 0, 100, 200):
        other.take(start, nats[start : start + 100], nats[start : start + 100])
    total = one.nats()
    monkeypatch.setattr("butterfly_llm.match._AT_ONCE", 7)
    assert other.nats() == total < float(nats.sum()) - 100


def test_an_evaluation_says_what_both_give_together() -> None:
    model = Toy(sharpness=0.3)
    documents = [Document("twice", PASSAGE + PASSAGE), Document("once", PASSAGE[:90])]
    plain = evaluate(model, documents, context=64, compressors=False)
    both = evaluate(model, documents, context=64, compressors=False, match=True)
    assert plain.matched is None and plain.documents[0].matched is None
    assert both.bits_per_char == pytest.approx(plain.bits_per_char)
    twice, once = both.documents
    assert twice.matched is not None and once.matched is not None and both.matched is not None
    # Of 400 characters 189 are proposed, rightly; the doubts on the way cost some 30 bits.
    assert twice.matched * 400 < twice.bits_per_char * 211 * 1.1 + 60
    assert once.matched == pytest.approx(once.bits_per_char)
    assert both.matched * 490 == pytest.approx(400 * twice.matched + 90 * once.matched)
    alike = evaluate(model, documents, context=64, batch_chars=64, compressors=False, match=True)
    assert alike.matched == pytest.approx(both.matched)
    assert "and match" in format_table(both) and "and match" not in format_table(plain)
    assert f"{both.matched:.3f}" in format_table(both)
