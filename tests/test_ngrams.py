"""What followed the last n characters: against a dictionary, and the same however a text is read."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm import ngrams
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ngrams import HISTORY, NOTHING, NgramState, followers, state_nbytes
from butterfly_llm.ops.triton_ngrams import ngram_rows
from conftest import DEVICE, INTERPRETED, kernels, phrases, random_model

ORDERS = (1, 2, 5, 63)
FEW, MANY, ALL = 16, 2**16, 2**22
"""Places: so few that n-grams meet, many, and so many that none do in these texts."""
Step = Callable[[Tensor, Tensor, NgramState], Tensor]


def repeating(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Texts (batch, length) of three letters, from the middle on the first half again, a bit misprinted."""
    chance = torch.Generator().manual_seed(seed)
    half = torch.randint(97, 100, (batch, -(-length // 2)), generator=chance)
    wrong = torch.rand(half.shape, generator=chance) < 0.01
    return torch.cat([half, torch.where(wrong, 100, half)], 1)[:, :length]


@cache
def place(ngram: bytes, slots: int) -> int:
    """Where an n-gram stands in a table, by whole numbers of any size."""
    hashed = sum(c * ngrams._BASE**i for i, c in enumerate(reversed(ngram))) % 2**64
    return ((hashed ^ hashed >> 32) * ngrams.MIX % 2**64 >> 42) % slots


def told(text: list[int], orders: tuple[int, ...] = ORDERS, slots: int | None = None) -> Tensor:
    """`followers` of a text (T, O) from a dictionary of n-grams, or of places that hold one n-gram each."""
    tables: list[dict[Any, tuple[bytes, int]]] = [{} for _ in orders]
    rows = []
    for end, character in enumerate(text, 1):
        row = []
        for order, table in zip(orders, tables, strict=True):
            before, now = (bytes(text[max(0, stop - order) : stop]) for stop in (end - 1, end))
            if len(before) == order:
                table[before if slots is None else place(before, slots)] = before, character
            held = table.get(now if slots is None else place(now, slots), (b"", NOTHING))
            row.append(held[1] if held[0] == now and len(now) == order else NOTHING)
        rows.append(row)
    return torch.tensor(rows)


def fresh(batch: int, slots: int = MANY, device: str = "cpu") -> NgramState:
    return NgramState.new(ORDERS, slots, batch, device)


def in_numpy(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """`step_numpy` of each stream."""
    streams = [state.rows(slice(row, row + 1)) for row in range(len(ids))]
    found = [
        ngrams.step_numpy(int(character), int(position), stream.orders, *stream.arrays())
        for character, position, stream in zip(ids, positions, streams, strict=True)
    ]
    return torch.stack([torch.from_numpy(row) for row in found])


def in_triton(ids: Tensor, positions: Tensor, state: NgramState) -> Tensor:
    """The kernel, with rows that say what they are of: the last column is the character."""
    count = len(state.orders)
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
    return all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True)
    )


def test_followers_are_what_stood_after_the_latest_occurrence() -> None:
    for seed in range(3):
        ids = repeating(600, 2, seed)
        expected = torch.stack([told(text) for text in ids.tolist()])
        assert torch.equal(followers(ids, ORDERS, ALL), expected)
        assert ((expected != NOTHING).float().mean((0, 1)) >= 0.1).all()  # of every n


@pytest.mark.parametrize("slots", [FEW, 64])
def test_a_place_holds_the_newest_ngram_alone(slots: int) -> None:
    ids = repeating(600, 2)
    expected = torch.stack([told(text, slots=slots) for text in ids.tolist()])
    assert torch.equal(followers(ids, ORDERS, slots), expected)
    all_of_them = torch.stack([told(text) for text in ids.tolist()])
    forgotten = expected != all_of_them
    assert (expected[forgotten] == NOTHING).all() and forgotten[..., 2].float().mean() > 0.2


def test_ngrams_are_told_apart_in_one_place() -> None:
    """With other n-grams in between that meet its place, one is not taken for another: the tags differ."""
    texts = torch.randint(256, (1, 4000), generator=torch.Generator().manual_seed(0))
    assert (followers(texts, (4, 9), FEW) == NOTHING).all()


def test_the_first_characters_are_no_ngrams() -> None:
    """Not even where they look like what an empty history holds, or one that another stream has left."""
    zeros = torch.zeros(1, 70, dtype=torch.int64)
    expected = told(zeros[0].tolist())[None]
    for order, row in zip(ORDERS, expected[0].T.tolist(), strict=True):
        assert row == [NOTHING] * order + [0] * (70 - order)
    assert torch.equal(followers(zeros, ORDERS, MANY), expected)
    for read in (followers_of, walk_of):
        state = fresh(1)
        read(repeating(90), state)
        state.entries.zero_()
        assert torch.equal(read(zeros, state), expected)
        state.entries.zero_()
        state.history.zero_()
        assert torch.equal(read(zeros, state), expected)


def followers_of(ids: Tensor, state: NgramState) -> Tensor:
    return followers(ids, state.orders, state.entries.shape[2], state)


def walk_of(ids: Tensor, state: NgramState) -> Tensor:
    return walk("torch", ids, torch.zeros(len(ids), dtype=torch.int64), state)


@pytest.mark.parametrize("slots", [FEW, MANY])
def test_parts_are_the_whole(slots: int) -> None:
    """Of any lengths, those longer than the history and single characters among them."""
    ids = repeating(700, 2)
    whole = followers(ids, ORDERS, slots)
    state = fresh(2, slots)
    assert torch.equal(followers_of(ids, state), whole)
    for seed in range(4):
        chance, parts, position = random.Random(seed), fresh(2, slots), 0
        while position < 700:
            part = ids[:, position : position + chance.choice([1, 2, 7, HISTORY, 90, 200])]
            found = followers(part, ORDERS, slots, parts, position)
            assert torch.equal(found, whole[:, position : position + part.shape[1]])
            position += part.shape[1]
        assert same(parts, state)


@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_steps_are_the_whole(slots: int, step: str) -> None:
    ids = repeating(CHARS[step], 2, seed=1)
    state, stepped = fresh(2, slots), fresh(2, slots, PLACES[step])
    found = walk(step, ids, torch.zeros(2, dtype=torch.int64), stepped)
    assert torch.equal(found, followers_of(ids, state)) and same(stepped, state)


@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_streams_may_stand_apart(slots: int, step: str) -> None:
    """Read to their places in rows of one state, stepped together, and read on: each as if it were alone."""
    ids = repeating(480, 3, seed=2)
    whole, count = followers(ids, ORDERS, slots), CHARS[step]
    starts = torch.tensor([1, 63, 305])
    state, alone = fresh(3, slots, PLACES[step]), fresh(3, slots)
    for row, start in enumerate(starts.tolist()):
        followers_of(ids[row : row + 1, :start].to(PLACES[step]), state.rows(slice(row, row + 1)))
        followers_of(ids[row : row + 1, : start + count], alone.rows(slice(row, row + 1)))
    pieces = torch.stack([row[start : start + count] for row, start in zip(ids, starts, strict=True)])
    expected = torch.stack([row[start : start + count] for row, start in zip(whole, starts, strict=True)])
    if slots == MANY:
        assert (expected != NOTHING).any(1).any(0).all()  # of every n
    assert torch.equal(walk(step, pieces, starts, state), expected)
    assert same(state, alone)
    for row, start in enumerate((starts + count).tolist()):
        on = ids[row : row + 1, start : start + 20].to(PLACES[step])
        found = followers(on, ORDERS, slots, state.rows(slice(row, row + 1)), start)
        assert torch.equal(found[0].cpu(), whole[row, start : start + 20])


@steps
@pytest.mark.parametrize("slots", [FEW, MANY])
def test_a_step_that_is_repeated_takes_the_place_of_the_one_before(slots: int, step: str) -> None:
    """With other characters first, even those that make another n-gram of the last ones."""
    ids = repeating(140, 2, seed=3)
    whole, stop = followers(ids, ORDERS, slots), 90 + CHARS[step] // 5
    state, other = (fresh(2, slots, device) for device in ("cpu", PLACES[step]))
    followers_of(ids[:, :90], state)
    followers_of(ids[:, :90].to(PLACES[step]), other)
    for position in range(90, stop):
        at = torch.full((2,), position)
        for wrong in (ids[:, position - 1], (ids[:, position] + 1) % 256)[: 1 + position % 2]:
            STEPS[step](wrong.contiguous(), at, other)
        found = STEPS[step](ids[:, position].contiguous(), at, other)
        assert torch.equal(found, whole[:, position])
        ngrams.step(ids[:, position], at, state)
        assert same(other, state)
    STEPS[step](torch.tensor([0, 0]), torch.full((2,), stop), other)
    found = followers(ids[:, stop:].to(PLACES[step]), ORDERS, slots, other, stop)
    assert torch.equal(found.cpu(), whole[:, stop:])
    followers(ids[:, stop:], ORDERS, slots, state, stop)
    assert same(other, state)


def test_a_later_character_changes_nothing_before() -> None:
    ids = repeating(300)
    for slots in (FEW, MANY):
        before = followers(ids, ORDERS, slots)
        for at in (0, 1, 4, 62, 63, 150, 298):
            changed = ids.clone()
            changed[0, at] = 120
            after = followers(changed, ORDERS, slots)
            assert torch.equal(after[:, :at], before[:, :at])
            assert not torch.equal(after[:, at:], before[:, at:])


def test_copies_and_rows_of_a_state() -> None:
    """A slice shares memory, numbers and `clone` do not."""
    state = fresh(3, FEW)
    followers_of(repeating(90, 3), state)
    kept = state.clone()
    picked, view = state.rows(torch.tensor([2, 0])), state.rows(slice(1, 2))
    assert torch.equal(picked.entries, kept.entries[[2, 0]])
    walk("torch", repeating(9, 1, seed=5), torch.tensor([90]), view)
    assert torch.equal(state.entries[[0, 2]], kept.entries[[0, 2]]) and not same(state, kept)
    assert torch.equal(state.history[1:2], view.history)
    assert torch.equal(picked.entries, kept.entries[[2, 0]])
    assert kept.nbytes == 3 * state_nbytes(ORDERS, FEW) and state_nbytes((), FEW) == 0


@kernels
def test_the_kernel_refuses_other_streams_and_strided_states() -> None:
    one, rows = (
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(257 * len(ORDERS), 8, device=DEVICE),
    )
    strided = fresh(1, 2 * FEW, DEVICE)
    strided.entries = strided.entries[..., ::2]
    for state in (fresh(2, FEW, DEVICE), strided):
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
    for changes in ({}, {"ngram_orders": [1, 3, 63], "ngram_slots": 16}, {"ngram_orders": (2,)}):
        config = ButterflyConfig.preset("micro", **changes)
        assert isinstance(config.ngram_orders, tuple) and hash(config) == hash(dataclasses.replace(config))
        written = config.to_dict()
        assert written == json.loads(json.dumps(written))
        assert ButterflyConfig.from_dict(json.loads(json.dumps(written))) == config


def test_a_model_hears_what_followed() -> None:
    """Its rows carry signal in these tests; without them, or where nothing is found, other logits."""
    model = random_model(ButterflyConfig.preset("micro", ngram_orders=(2, 3, 5), ngram_slots=4096))
    assert model.ngram is not None
    rows = model.ngram.weight.detach().view(3, NOTHING + 1, -1)
    assert rows.any(-1).all()
    ids = phrases(200, 2)
    found = followers(ids, (2, 3, 5), 4096)
    assert ((found[:, 100:] != NOTHING).float().mean((0, 1)) > 0.5).all()
    with torch.no_grad():
        before = model(ids)
        kept = rows.clone()
        for silent in (slice(0, NOTHING), slice(NOTHING, None)):
            rows[:, silent] = 0
            assert (model(ids) - before).abs().amax(-1)[:, 100:].min() > 1e-3
            rows.copy_(kept)
        assert torch.equal(model(ids), before)
