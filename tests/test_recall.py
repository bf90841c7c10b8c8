"""The recall tasks: what is planted can be found, is counted rightly, and follows from the seed."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.curriculum import LONG_VALUES, MOST_PAIRS, curriculum, plant_pairs
from butterfly_llm.model import Butterfly
from butterfly_llm.ngrams import NOTHING, Contexts, followers
from butterfly_llm.recall import Needles, at_hops, evaluate_recall, plant
from butterfly_llm.routing import hops
from butterfly_llm.tasks import evaluate_task
from butterfly_llm.train import Transform, train
from conftest import within

TEXT = np.tile(np.arange(97, 123, dtype=np.uint8), 4000)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


@pytest.mark.parametrize("seed", range(5))
def test_answers_stand_where_they_are_said_to_stand(seed: int) -> None:
    needles = Needles(pairs=6, distractors=5, value_chars=3)
    window, answers = plant(TEXT[:4097], needles, generator(seed), within(10))
    text = window.tobytes()
    assert len(answers) == 6
    assert text.count(b"#KEY ") == 11 and text.count(b"#GET ") == 6
    keys = [text[a.start - 3 : a.start - 1] for a in answers]
    assert len(set(keys)) == 6
    for key, answer in zip(keys, answers, strict=True):
        value = text[answer.start : answer.start + 3]
        assert (
            value.isdigit()
            and text[answer.fact - 8 : answer.fact + 4] == b"#KEY " + key + b"=" + value + b"\n"
        )
        assert text[answer.start - 8 : answer.start] == b"#GET " + key + b"="
        assert 0 < answer.distance <= 11 * 64
    changed = np.flatnonzero(window != TEXT[:4097])
    assert len(changed) <= 17 * needles.item_chars


def test_items_lie_across_chunk_borders_too() -> None:
    crossing = 0
    for seed in range(200):
        _, (answer,) = plant(TEXT[:1025], Needles(), generator(seed), within(8))
        crossing += answer.start // 128 != (answer.start + 1) // 128
    assert crossing > 0


@pytest.mark.parametrize("count", range(5))
def test_hops_are_those_of_the_place(count: int) -> None:
    for _ in range(20):
        found = at_hops(count, 2)(generator(count), 64)
        if found is not None:
            fact, question = found
            assert fact < question and question >= 32
            assert hops(question // 2 - fact // 2) == count


class Oracle:
    """Finds the value of a key in the text before it, up to `memory` characters back; else says '?'."""

    def __init__(self, memory: int) -> None:
        self.config = ButterflyConfig.preset("small")
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self.memory = memory
        self.asked = 0

    def hidden(self, ids: Tensor, followers: None = None) -> Tensor:
        text = bytes(ids[0].tolist())
        out = torch.full((1, len(text)), ord("?"))
        for at in range(len(text)):
            for digits in (0, 1):
                end = at + 1 - digits
                if text[end - 1 : end] == b"=" and text[max(0, end - 8) : end - 3] == b"#GET ":
                    fact = text.rfind(b"#KEY " + text[end - 3 : end], max(0, at - self.memory), at)
                    out[0, at] = text[fact + 8 + digits] if fact >= 0 else ord("?")
        return out[..., None]

    def head(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0], 256)


def test_an_oracle_is_right_at_every_hop_and_a_short_memory_only_near() -> None:
    whole = evaluate_recall(Oracle(10**6), TEXT.tobytes(), length=4096, windows=3)  # type: ignore[arg-type]
    assert list(whole.by_hops) == [0, 1, 2, 3, 4, 5]  # 32 chunks: 31 is five set bits, from last to first
    assert all(share == 1.0 for share, _ in whole.by_hops.values())
    assert all(whole.by_hops[count][1] == 3 for count in range(5))
    short = evaluate_recall(Oracle(1000), TEXT.tobytes(), length=4096, windows=8)  # type: ignore[arg-type]
    assert short.by_distance[256][0] == 1.0
    assert short.by_distance[4096][0] == 0.0
    assert "hops" in next(short.lines()) and '"by_hops"' in short.to_json()


class Repeater(Oracle):
    """Says what followed the last three characters before, as it is told."""

    def hidden(self, ids: Tensor, told: Any = None) -> Tensor:
        config = self.config
        found = followers(ids, Contexts.of(config)) if told is None else told(ids)
        self.said = int((found[..., 0] != NOTHING).sum())
        return found[..., :1].clamp(max=255)


def test_without_the_lookup_a_model_that_only_repeats_finds_nothing() -> None:
    model = Repeater(0)
    asked = {"length": 1024, "windows": 4}
    found = evaluate_task(model, "multikey", TEXT.tobytes(), **asked)  # type: ignore[arg-type]
    said = model.said
    alone = evaluate_task(model, "multikey", TEXT.tobytes(), lookup=False, **asked)  # type: ignore[arg-type]
    assert all(share == 1.0 for share, _ in found.by_hops.values())
    assert all(share == 0.0 for share, _ in alone.by_hops.values())
    assert model.said == said - 2  # it is kept from the two digits of the answer alone


def test_an_untrained_model_finds_nothing() -> None:
    model = Butterfly(ButterflyConfig.preset("micro"))
    result = evaluate_recall(model, TEXT.tobytes(), length=1024, windows=2)
    assert sum(share for share, _ in result.by_hops.values()) == 0.0


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 100 characters, a window takes 4,097"):
        evaluate_recall(Butterfly(ButterflyConfig.preset("micro")), b"a" * 100, length=4096)


def test_impossible_needles_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot name 30 keys"):
        Needles(pairs=30, key_chars=1)
    with pytest.raises(ValueError, match="do not fit"):
        plant(TEXT[:200], Needles(), generator(), within(2))


def test_the_curriculum_depends_on_step_and_row_alone() -> None:
    transform = curriculum(share=0.5, weight=10.0, longest=4096, seed=3)
    windows = np.stack([TEXT[i : i + 1025] for i in range(8)])
    text, weights = transform(windows, 7, 0, 0.3)
    assert 0 < sum((a != b).any() for a, b in zip(text, windows, strict=True)) < 8
    for first in (2, 5):
        part, part_weights = transform(windows[first:], 7, first, 0.3)
        assert np.array_equal(part, text[first:]) and np.array_equal(part_weights, weights[first:])
    other, _ = transform(windows, 8, 0, 0.3)
    assert not np.array_equal(other, text)
    for row in range(8):  # targets[i] is window[i + 1]
        changed = np.flatnonzero(text[row] != windows[row])
        heavy = np.flatnonzero(weights[row] == 10.0) + 1
        assert all(chr(text[row, i]).isdigit() for i in heavy)
        assert (len(heavy) > 0) == (len(changed) > 0)
        # What was written over the text counts for nothing, unless it is an answer.
        rest = changed[(changed > 0) & ~np.isin(changed, heavy)]
        assert (weights[row, rest - 1] == 0.0).all()
        assert (weights[row] == 0.0).sum() <= len(heavy) * 12  # per digit: half a fact and half a question


def test_the_distance_grows_with_progress() -> None:
    transform = curriculum(share=1.0, weight=10.0, longest=16_384, seed=0)
    windows = np.stack([TEXT[:16_385]] * 4)

    def distances(progress: float, transform: Transform = transform) -> list[int]:
        found = []
        text, weights = transform(windows, 0, 0, progress)
        for row, each in zip(text, weights, strict=True):
            whole = row.tobytes()
            for i in np.flatnonzero((each == 10.0) & (np.roll(each, 1) == 0.0)):
                key = whole[i - 2 : i + 1]
                found.append(int(i) - whole.index(b"#KEY " + key))
        return found

    farthest = [np.quantile(distances(p), 0.9) for p in (0.0, 0.2, 0.4, 0.6)]
    assert farthest[0] < 512
    assert all(b > 1.5 * a for a, b in itertools.pairwise(farthest))
    assert max(distances(1.0)) > 8192
    late = distances(1.0)  # far ones do not crowd out near ones
    assert sum(d < 6 * 64 for d in late) > 0.1 * len(late)
    at_once = curriculum(share=1.0, weight=10.0, longest=16_384, seed=0, full_at=0.0)
    assert distances(0.0, at_once) == late


@pytest.mark.parametrize("pairs", [1, 2, 15, 10_000])
@pytest.mark.parametrize("length", [320, 1000, 4096])
def test_every_pair_that_fits_is_planted_whole(length: int, pairs: int) -> None:
    for seed in range(20):
        text, weights = TEXT[: length + 1].copy(), np.ones(length, dtype=np.float32)
        generator = np.random.Generator(np.random.Philox(seed))
        plant_pairs(text, weights, generator, pairs=pairs, reach=256.0, weight=7.0)
        facts = dict(re.findall(rb"\n#KEY (\w\w)=(\d\d)\n", text.tobytes()))
        asked = [(m[1], m[2], m.start(2)) for m in re.finditer(rb"\n#GET (\w\w)=(\d\d)\n", text.tobytes())]
        fitting = (length + 1 - 64) // 64 // 2
        assert min(pairs, fitting) <= len(facts) <= min(pairs, fitting + 1) and len(asked) == len(facts)
        assert all(facts[key] == value for key, value, _ in asked)
        assert sorted(np.flatnonzero(weights == 7.0)) == sorted(s + i - 1 for *_, s in asked for i in (0, 1))
        assert (weights == 0.0).sum() == 22 * len(facts)
        for key, _, start in asked:
            assert text.tobytes().index(b"#KEY " + key) < start


@pytest.mark.parametrize("value_chars", LONG_VALUES)
def test_long_values_weigh_together_as_much_as_short_ones(value_chars: int) -> None:
    text, weights = TEXT[:4097].copy(), np.ones(4096, dtype=np.float32)
    plant_pairs(text, weights, generator(), pairs=12, reach=512.0, weight=7.0, value_chars=value_chars)
    pattern = rb"\n#%s (\w\w)=([0-9a-f]{" + str(value_chars).encode() + rb"})\n"
    facts = dict(re.findall(pattern % b"KEY", text.tobytes()))
    asked = [(m[1], m[2], m.start(2)) for m in re.finditer(pattern % b"GET", text.tobytes())]
    assert len(facts) == len(asked) == 12 and all(facts[key] == value for key, value, _ in asked)
    heavy = [start + i - 1 for *_, start in asked for i in range(value_chars)]
    np.testing.assert_allclose(weights[heavy], 14.0 / value_chars)
    assert (weights == 0.0).sum() == 12 * (20 + value_chars) and (weights == 1.0).sum() > 2048


def test_a_share_of_the_windows_gets_long_values() -> None:
    windows = np.stack([TEXT[:2049]] * 40)

    def longest(share: float) -> list[int]:
        text, _ = curriculum(share=1.0, weight=10.0, longest=2048, seed=0, long_share=share)(
            windows, 0, 0, 1.0
        )
        return [max(len(m) for m in re.findall(rb"#KEY \w\w=(\w+)\n", row.tobytes())) for row in text]

    assert set(longest(0.0)) == {2} and set(longest(1.0)) == set(LONG_VALUES)
    assert 10 < longest(0.5).count(2) < 30
    with pytest.raises(ValueError, match=r"long_share 1\.5 and reworded_share 0\.0 must lie from 0 to 1"):
        curriculum(share=1.0, weight=10.0, longest=2048, seed=0, long_share=1.5)


def test_questions_are_reworded_as_often_as_asked() -> None:
    windows = np.stack([TEXT[:2049]] * 40)

    def planted(**options: float) -> bytes:
        transform = curriculum(share=1.0, weight=10.0, longest=2048, seed=0, **options)  # type: ignore[arg-type]
        return transform(windows, 0, 0, 1.0)[0].tobytes()

    def asked(text: bytes) -> tuple[int, int]:
        plain, reworded = (len(re.findall(rb"#GET \w\w" + sign + rb"\d\d\n", text)) for sign in (b"=", b":"))
        assert len(re.findall(rb"#KEY \w\w=\d\d\n", text)) == plain + reworded
        return plain, reworded

    assert planted(reworded_share=0.0) == planted()  # runs of before are repeated to the bit
    assert asked(planted())[1] == 0 and asked(planted(reworded_share=1.0))[0] == 0
    plain, reworded = asked(planted(reworded_share=0.25))
    assert 0.15 < reworded / (plain + reworded) < 0.35
    with pytest.raises(ValueError, match=r"reworded_share 1\.5 must lie from 0 to 1"):
        planted(reworded_share=1.5)


def test_no_lookup_answers_a_reworded_question() -> None:
    orders = (3, 4, 6, 8, 12, 16, 24)
    for needles, found in ((Needles(distractors=3), True), (Needles(distractors=3, reworded=True), False)):
        for seed in range(10):
            text, answers = plant(TEXT[:4097], needles, generator(seed), within(8))
            ids = torch.from_numpy(text.astype(np.int64))[None]
            told = followers(ids, Contexts(orders, slots=1 << 16))[0]
            for answer in answers:
                before = bytes(text[answer.start - 4 : answer.start])
                assert before[3:] == (b"=" if found else b":") and chr(text[answer.fact - 1]) == "="
                for at in range(answer.start, answer.start + answer.chars):
                    assert (int(text[at]) in told[at - 1].tolist()) == found


def test_a_long_window_gets_no_more_facts_than_a_chunk_has_lanes() -> None:
    window = np.resize(TEXT, 65_537)[None]
    transform = curriculum(share=1.0, weight=10.0, longest=65_536, seed=0)
    counts = [transform(window, step, 0, 1.0)[0].tobytes().count(b"\n#KEY ") for step in range(20)]
    assert 64 < max(counts) <= MOST_PAIRS


def test_a_window_too_short_for_facts_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 257 characters is too short for facts"):
        curriculum(share=1.0, weight=2.0, longest=256, seed=0)(TEXT[None, :257], 0, 0, 0.0)


def test_training_plants_needles_and_repeats_itself(tmp_path: Path) -> None:
    source = tmp_path / "train.bin"
    source.write_bytes(TEXT.tobytes())
    corpus = Corpus(source)

    def losses(name: str, share: float, full_at: float = 0.6) -> list[float]:
        settings = TrainConfig(
            out=str(tmp_path / name), device="cpu", steps=3, batch_chars=1024, lengths=((1.0, 512),),
            val_chars=512, recall_share=share, recall_full_at=full_at,
        )  # fmt: skip
        micro = ButterflyConfig.preset("micro")
        return train(settings, micro, corpus=corpus, val_corpus=corpus).losses

    planted = losses("planted", 1.0)
    assert planted == losses("again", 1.0)
    assert planted != losses("plain", 0.0)
    assert planted != losses("far", 1.0, 0.0)
