"""What followed before: against dictionaries, and the same however a text is read."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm import ngrams
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ngrams import HISTORY, NOTHING, Contexts, NgramState, followers, state_nbytes
from butterfly_llm.ops.triton_ngrams import ngram_rows
from conftest import DEVICE, INTERPRETED, kernels, phrases, random_model

ORDERS = (1, 2, 5, 63)
FEW, MANY, ALL = 16, 2**16, 2**22
"""Places: so few that n-grams meet, many, and so many that none do in these texts."""
KINDS = {
    "plain": Contexts(ORDERS),
    "ranks": Contexts(ORDERS, ranks=3),
    "words": Contexts(ORDERS, words=3),
    "both": Contexts((2, 5), words=2, ranks=4),
    "words alone": Contexts((), words=1, ranks=2),
}
kinds = pytest.mark.parametrize("kind", KINDS)
Step = Callable[[Tensor, Tensor, NgramState], Tensor]


def repeating(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Texts (batch, length) of a few letters and blanks, the first fifth five times, a bit misprinted."""
    chance = torch.Generator().manual_seed(seed)
    letters = torch.tensor([97, 98, 99, 97, 32, 46])
    fifth = letters[torch.randint(6, (batch, -(-length // 5)), generator=chance)]
    text = fifth.repeat(1, 5)[:, :length]
    return torch.where(torch.rand(text.shape, generator=chance) < 0.004, 100, text)


def mixed(hashed: int) -> int:
    return (hashed ^ hashed >> 32) * ngrams.MIX % 2**64


def polynomial(text: bytes, add: int = 0) -> int:
    return sum((c + add) * ngrams.BASE**i for i, c in enumerate(reversed(text))) % 2**64


@cache
def place(context: tuple[bytes, ...], slots: int) -> int:
    """Where a context stands in a table, by whole numbers of any size: an n-gram, or after a first None the
    token so far and the words before it, the latest first."""
    if context[0] is not None:
        return (mixed(polynomial(context[0])) >> 42) % slots
    hashed = polynomial(context[1], 1)
    for word in context[2:]:
        hashed = ((hashed ^ hashed >> 29) * ngrams.MIX + polynomial(word, 1)) % 2**64
    return (mixed(hashed) >> 42) % slots


WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+|[^0-9A-Za-z_\x80-\xff]+")


def ending(text: bytes, contexts: Contexts) -> list[tuple[bytes, ...] | None]:
    """The contexts that end with a text; None for those that it is too short for."""
    tokens = WORD.findall(text)
    words = [token for token in tokens[:-1] if token[-1:].isalnum() or token[-1] == 95 or token[-1] > 127]
    words = [b""] * contexts.words + words
    grams = [(text[-n:],) if len(text) >= n else None for n in contexts.orders]
    behind = [(None, tokens[-1], *words[::-1][:w]) if tokens else None for w in range(contexts.words)]
    return [*grams, *behind]


def told(text: list[int], contexts: Contexts, meet: bool = False) -> Tensor:
    """`followers` of a text (T, O * K) from dictionaries of contexts, or of places that hold one each."""
    tables: list[dict[Any, tuple[Any, list[int]]]] = [{} for _ in range(len(contexts))]
    rows, before = [], ending(b"", contexts)
    for end, character in enumerate(text, 1):
        now, row = ending(bytes(text[:end]), contexts), []
        for old, new, table in zip(before, now, tables, strict=True):
            if old is not None:
                key = place(old, contexts.slots) if meet else old
                held, known = table.get(key, (old, []))
                table[key] = old, [character, *(known if held == old else [])]
            held, known = (
                (None, [])
                if new is None
                else table.get(place(new, contexts.slots) if meet else new, (None, []))
            )
            known = known[: contexts.ranks] if held == new else []
            row += known + [NOTHING] * (contexts.ranks - len(known))
        rows.append(row)
        before = now
    return torch.tensor(rows)


def of(kind: str, slots: int = MANY) -> Contexts:
    return dataclasses.replace(KINDS[kind], slots=slots)


def fresh(batch: int, contexts: Contexts, device: str = "cpu") -> NgramState:
    return NgramState.new(contexts, batch, device)


def in_numpy(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """`step_numpy` of each stream."""
    streams = [state.rows(slice(row, row + 1)) for row in range(len(ids))]
    found = [
        ngrams.step_numpy(int(character), int(position), stream.contexts, *stream.arrays())
        for character, position, stream in zip(ids, positions, streams, strict=True)
    ]
    return torch.stack([torch.from_numpy(row) for row in found])


def in_triton(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """The kernel, with rows that say what they are of: the last column is the character."""
    count = len(state.contexts) * state.contexts.ranks
    embed = torch.zeros(256, count + 1, device=DEVICE)
    embed[:, -1] = torch.arange(256)
    rows = torch.zeros(count, NOTHING + 1, count + 1, device=DEVICE)
    for o in range(count):
        rows[o, :, o] = torch.arange(NOTHING + 1)
    out = ngram_rows(ids.to(DEVICE), positions.to(DEVICE), state, embed, rows.flatten(0, 1))
    assert torch.equal(out[:, -1].cpu(), ids.float())
    return out[:, :-1].long().cpu()


STEPS: dict[str, Step] = {"torch": ngrams.step, "numpy": in_numpy, "triton": in_triton}
steps = pytest.mark.parametrize("step", ["torch", "numpy", pytest.param("triton", marks=kernels)])
PLACES = {"torch": "cpu", "numpy": "cpu", "triton": DEVICE}
CHARS = {"torch": 150, "numpy": 150, "triton": 9 if INTERPRETED else 150}
"""To step through."""


def walk(step: str, ids: Tensor, starts: Tensor, state: NgramState) -> Tensor:
    """ids (B, T) one by one to streams that stand at `starts` (B,) -> (B, T, O)."""
    found = [STEPS[step](ids[:, i].contiguous(), starts + i, state) for i in range(ids.shape[1])]
    return torch.stack(found, 1)


def same(state: NgramState, other: NgramState) -> bool:
    """But for what a last step could take back."""
    pairs = (
        (state.history, other.history), (state.entries, other.entries),
        (state.about_words()[1], other.about_words()[1]),
    )  # fmt: skip
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


@kinds
def test_followers_are_what_stood_after_the_latest_occurrences(kind: str) -> None:
    contexts = of(kind, ALL)
    for seed in range(3):
        ids = repeating(400, 2, seed)
        expected = torch.stack([told(text, contexts) for text in ids.tolist()])
        assert torch.equal(followers(ids, contexts), expected)
        assert ((expected != NOTHING).float().mean((0, 1)) >= 0.02).all()  # of every context and rank


@kinds
@pytest.mark.parametrize("slots", [FEW, 64])
def test_a_place_holds_the_newest_context_alone(slots: int, kind: str) -> None:
    ids, contexts = repeating(400, 2), of(kind, slots)
    expected = torch.stack([told(text, contexts, meet=True) for text in ids.tolist()])
    assert torch.equal(followers(ids, contexts), expected)
    all_of_them = torch.stack([told(text, contexts) for text in ids.tolist()])
    forgotten = expected != all_of_them
    assert (expected[forgotten] == NOTHING).all() and forgotten.float().mean() > 0.05


def test_contexts_are_told_apart_in_one_place() -> None:
    """With other ones in between that meet its place, one is not taken for another: the tags differ."""
    texts = torch.randint(256, (1, 4000), generator=torch.Generator().manual_seed(0))
    assert (followers(texts, Contexts((4, 9), ranks=2, slots=FEW)) == NOTHING).all()


@kinds
def test_the_first_characters_are_no_contexts(kind: str) -> None:
    """Not even where they look like what an empty history holds, or one that another stream has left."""
    contexts = of(kind)
    zeros = torch.zeros(1, 70, dtype=torch.int64)
    expected = told(zeros[0].tolist(), contexts)[None]
    for order, row in zip(contexts.orders, expected[0].T[:: contexts.ranks].tolist(), strict=False):
        assert row == [NOTHING] * order + [0] * (70 - order)
    assert torch.equal(followers(zeros, contexts), expected)
    for read in (followers_of, walk_of):
        state = fresh(1, contexts)
        read(repeating(90), state)
        state.entries.zero_()
        assert torch.equal(read(zeros, state), expected)
        state.entries.zero_()
        state.history.zero_()
        state.undo.zero_()
        assert torch.equal(read(zeros, state), expected)
        read(torch.full((1, 5), 97), state)
        state.entries.zero_()
        text = torch.tensor([list(b"aba ab aba ab aba")])
        assert torch.equal(read(text, state), told(text[0].tolist(), contexts)[None])


def followers_of(ids: Tensor, state: NgramState) -> Tensor:
    return followers(ids, state.contexts, state)


def walk_of(ids: Tensor, state: NgramState) -> Tensor:
    return walk("torch", ids, torch.zeros(len(ids), dtype=torch.int64), state)


@kinds
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_parts_are_the_whole(slots: int, kind: str) -> None:
    """Of any lengths, those longer than the history and single characters among them."""
    ids, contexts = repeating(700, 2), of(kind, slots)
    whole = followers(ids, contexts)
    state = fresh(2, contexts)
    assert torch.equal(followers_of(ids, state), whole)
    for seed in range(4):
        chance, parts, position = random.Random(seed), fresh(2, contexts), 0
        while position < 700:
            part = ids[:, position : position + chance.choice([1, 2, 7, HISTORY, 90, 200])]
            found = followers(part, contexts, parts, position)
            assert torch.equal(found, whole[:, position : position + part.shape[1]])
            position += part.shape[1]
        assert same(parts, state)


@kinds
@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_steps_are_the_whole(slots: int, step: str, kind: str) -> None:
    ids, contexts = repeating(CHARS[step], 2, seed=1), of(kind, slots)
    state, stepped = fresh(2, contexts), fresh(2, contexts, PLACES[step])
    found = walk(step, ids, torch.zeros(2, dtype=torch.int64), stepped)
    assert torch.equal(found, followers_of(ids, state)) and same(stepped, state)


@kinds
@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_streams_may_stand_apart(slots: int, step: str, kind: str) -> None:
    """Read to their places in rows of one state, stepped together, and read on: each as if it were alone."""
    ids, contexts = repeating(480, 3, seed=2), of(kind, slots)
    whole, count = followers(ids, contexts), CHARS[step]
    starts = torch.tensor([1, 63, 305])
    state, alone = fresh(3, contexts, PLACES[step]), fresh(3, contexts)
    for row, start in enumerate(starts.tolist()):
        followers_of(ids[row : row + 1, :start].to(PLACES[step]), state.rows(slice(row, row + 1)))
        followers_of(ids[row : row + 1, : start + count], alone.rows(slice(row, row + 1)))
    pieces = torch.stack([row[start : start + count] for row, start in zip(ids, starts, strict=True)])
    expected = torch.stack([row[start : start + count] for row, start in zip(whole, starts, strict=True)])
    if slots == MANY and count > 100:
        assert (expected != NOTHING).any(1).any(0).all()  # of every context and rank
    assert torch.equal(walk(step, pieces, starts, state), expected)
    assert same(state, alone)
    for row, start in enumerate((starts + count).tolist()):
        on = ids[row : row + 1, start : start + 20].to(PLACES[step])
        found = followers(on, contexts, state.rows(slice(row, row + 1)), start)
        assert torch.equal(found[0].cpu(), whole[row, start : start + 20])


@kinds
@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_a_step_that_is_repeated_takes_the_place_of_the_one_before(slots: int, step: str, kind: str) -> None:
    """With other characters first, even those that make another context of the last ones."""
    ids, contexts = repeating(140, 2, seed=3), of(kind, slots)
    whole, stop = followers(ids, contexts), 90 + CHARS[step] // 5
    state, other = (fresh(2, contexts, device) for device in ("cpu", PLACES[step]))
    followers_of(ids[:, :90], state)
    followers_of(ids[:, :90].to(PLACES[step]), other)
    for position in range(90, stop):
        at = torch.full((2,), position)
        for wrong in (ids[:, position - 1], (ids[:, position] + 1) % 256)[: 1 + position % 2]:
            STEPS[step](wrong.contiguous(), at, other)
        found = STEPS[step](ids[:, position].contiguous(), at, other)
        assert torch.equal(found, whole[:, position])
        ngrams.step(ids[:, position], at, state)
        assert same(other, state) and torch.equal(other.undo.cpu(), state.undo)
    STEPS[step](torch.tensor([0, 0]), torch.full((2,), stop), other)
    found = followers(ids[:, stop:].to(PLACES[step]), contexts, other, stop)
    assert torch.equal(found.cpu(), whole[:, stop:])
    followers(ids[:, stop:], contexts, state, stop)
    assert same(other, state)


@kinds
def test_a_first_step_may_be_repeated(kind: str) -> None:
    """In the place of another stream that has ended there."""
    ids, contexts = repeating(60, 1, seed=4), of(kind)
    whole = followers(ids, contexts)
    state = fresh(1, contexts)
    for _ in range(3):
        ngrams.step(torch.tensor([98]), torch.tensor([0]), state)
    assert torch.equal(walk_of(ids, state), whole)


@kinds
def test_a_later_character_changes_nothing_before(kind: str) -> None:
    ids = repeating(300)
    for slots in (FEW, MANY):
        contexts = of(kind, slots)
        before = followers(ids, contexts)
        for at in (0, 1, 4, 62, 63, 150, 298):
            changed = ids.clone()
            changed[0, at] = 120
            after = followers(changed, contexts)
            assert torch.equal(after[:, :at], before[:, :at])
            assert kind == "words alone" or not torch.equal(after[:, at:], before[:, at:])


def test_words_are_found_whatever_stands_between() -> None:
    """After `total,` and `sum` what followed `total = sum` is told, which no n-gram of four finds."""
    text = b"total = sum(x)\n\ttotal,\tsum"
    found = followers(torch.tensor([list(text)]), Contexts((4,), words=2, slots=MANY))[0, -1]
    assert found.tolist() == [NOTHING, ord("("), ord("(")]
    other = followers(
        torch.tensor([list(b"total = sum(x)\n\tother, sum")]), Contexts((), words=2, slots=MANY)
    )
    assert other[0, -1].tolist() == [ord("("), NOTHING]


@steps
def test_what_is_no_character_in_a_damaged_state_is_nothing(step: str) -> None:
    """Nine bits of an older follower can be more than a character's, as in a file from elsewhere."""
    contexts = Contexts((1,), ranks=3, slots=FEW)
    state = fresh(1, contexts, PLACES[step])
    followers_of(torch.tensor([list(b"abacab")]).to(PLACES[step]), state)
    known = walk(step, torch.tensor([[97]]), torch.tensor([6]), NgramState(contexts, *map(torch.clone, (
        state.history, state.entries, state.undo
    ))))  # fmt: skip
    assert known.tolist() == [[[98, 99, 98]]]
    state.entries |= 511 << 31
    assert walk(step, torch.tensor([[97]]), torch.tensor([6]), state).tolist() == [[[98, NOTHING, 98]]]
    found = followers(torch.tensor([[97]]).to(PLACES[step]), contexts, state, 6)
    assert found.tolist() == [[[98, NOTHING, 98]]]


@kinds
def test_copies_and_rows_of_a_state(kind: str) -> None:
    """A slice shares memory, numbers and `clone` do not."""
    contexts = of(kind, FEW)
    state = fresh(3, contexts)
    followers_of(repeating(90, 3), state)
    kept = state.clone()
    picked, view = state.rows(torch.tensor([2, 0])), state.rows(slice(1, 2))
    assert torch.equal(picked.entries, kept.entries[[2, 0]])
    walk("torch", repeating(9, 1, seed=5), torch.tensor([90]), view)
    assert torch.equal(state.entries[[0, 2]], kept.entries[[0, 2]]) and not same(state, kept)
    assert torch.equal(state.history[1:2], view.history) and torch.equal(state.undo[1:2], view.undo)
    assert torch.equal(picked.entries, kept.entries[[2, 0]])
    assert kept.nbytes == 3 * state_nbytes(contexts) and state_nbytes(Contexts(())) == 0
    assert sum(tensor.nbytes for tensor in kept.tensors().values()) == kept.nbytes


@kernels
@pytest.mark.parametrize("part", ["entries", "history", "undo"])
def test_the_kernel_refuses_other_streams_and_strided_states(part: str) -> None:
    contexts = of("ranks", FEW)
    one, rows = (
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(257 * len(contexts) * contexts.ranks, 8, device=DEVICE),
    )
    strided = fresh(1, contexts, DEVICE)
    setattr(strided, part, torch.stack([getattr(strided, part)] * 2, -1)[..., 0])
    for state in (fresh(2, contexts, DEVICE), strided):
        with pytest.raises(ValueError, match=r"ngram_rows: n-grams of . streams for 1"):
            ngram_rows(one, one, state, rows, rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram_orders": (3, 2)}, "ngram_orders must be rising whole numbers from 1 to 63, not (3, 2)"),
        ({"ngram_orders": [2, 2]}, "not [2, 2]"),
        ({"ngram_orders": (0, 2)}, "not (0, 2)"),
        ({"ngram_orders": (2, 64)}, "not (2, 64)"),
        ({"ngram_orders": (True, 2)}, "not (True, 2)"),
        ({"ngram_orders": (2.0,)}, "not (2.0,)"),
        ({"ngram_orders": "23"}, "not '23'"),
        ({"ngram_orders": ["2"]}, "not ['2']"),
        ({"ngram_orders": 3}, "not 3"),
        ({"ngram_orders": None}, "not None"),
        ({"ngram_slots": 1000}, "ngram_slots 1000 must be a power of two from 16 to 4194304"),
        ({"ngram_slots": 8}, "ngram_slots 8 must be"),
        ({"ngram_slots": 2**23}, "ngram_slots 8388608 must be"),
        ({"ngram_slots": 0}, "ngram_slots must be at least 1, not 0"),
        ({"ngram_slots": 64.0}, "ngram_slots must be a whole number, not 64.0"),
        ({"ngram_slots": True}, "ngram_slots must be a whole number, not True"),
        ({"ngram_orders": (2,), "routing": "xor"}, "ngram_orders must be empty for routing xor"),
        ({"ngram_words": 1, "routing": "xor"}, "ngram_words must be empty for routing xor"),
        ({"ngram_words": 9}, "ngram_words 9 must be at most 8"),
        ({"ngram_words": -1}, "ngram_words must be at least 0, not -1"),
        ({"ngram_words": (1, 2)}, "ngram_words must be a whole number, not (1, 2)"),
        ({"ngram_orders": (2,), "ngram_ranks": 5}, "ngram_ranks 5 must be at most 4"),
        ({"ngram_ranks": 2}, "ngram_ranks 2 must be at most 4, 1 without ngram_orders and ngram_words"),
        ({"ngram_ranks": 0}, "ngram_ranks must be at least 1, not 0"),
    ],
)
def test_orders_and_slots_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    for make in (
        lambda: ButterflyConfig.preset("micro", **changes),
        lambda: ButterflyConfig.from_dict(ButterflyConfig.preset("micro").to_dict() | changes),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).startswith("config: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_comes_back_from_json() -> None:
    every = {"ngram_orders": [1, 3, 63], "ngram_slots": 16, "ngram_words": 3, "ngram_ranks": 4}
    for changes in ({}, every, {"ngram_orders": (2,)}, {"ngram_words": 1, "ngram_ranks": 2}):
        config = ButterflyConfig.preset("micro", **changes)
        assert isinstance(config.ngram_orders, tuple) and hash(config) == hash(dataclasses.replace(config))
        written = config.to_dict()
        assert written == json.loads(json.dumps(written))
        assert ButterflyConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(("words", "ranks"), [(0, 1), (2, 2)])
def test_a_model_hears_what_followed(words: int, ranks: int) -> None:
    """Its rows carry signal in these tests; without them, or where nothing is found, other logits."""
    told = {"ngram_orders": (2, 3, 5), "ngram_words": words, "ngram_ranks": ranks, "ngram_slots": 4096}
    model = random_model(ButterflyConfig.preset("micro", **told))
    assert model.ngram is not None
    rows = model.ngram.weight.detach().view((3 + words) * ranks, NOTHING + 1, -1)
    assert rows.any(-1).all()
    ids = phrases(200, 2)
    found = followers(ids, Contexts.of(model.config))
    assert ((found[:, 100:] != NOTHING).float().mean((0, 1)) > (0.5 if ranks == 1 else 0.2)).all()
    with torch.no_grad():
        before = model(ids)
        kept = rows.clone()
        for silent in (slice(0, NOTHING), slice(NOTHING, None)):
            rows[:, silent] = 0
            assert (model(ids) - before).abs().amax(-1)[:, 100:].min() > 1e-3
            rows.copy_(kept)
        assert torch.equal(model(ids), before)
