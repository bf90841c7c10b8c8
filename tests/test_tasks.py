"""The recall tasks of the literature: each window holds the answer where it says, and asks where it says."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from butterfly_llm.commands.recall import Task
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.recall import Needles, plant
from butterfly_llm.tasks import MAKERS, NEEDLES, TASKS, evaluate_task
from conftest import within

TEXT = np.tile(np.arange(97, 123, dtype=np.uint8), 400)
LENGTH = 1024


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def made(task: str, seed: int) -> tuple[bytes, list[tuple[int, int, int]]]:
    window, answers = MAKERS[task](generator(seed), TEXT[: LENGTH + 1])
    assert window.shape == (LENGTH + 1,) and window.dtype == np.uint8
    return window.tobytes(), [(a.start, a.fact, a.chars) for a in answers]


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_what_stands_at_the_fact(task: str, seed: int) -> None:
    text, answers = made(task, seed)
    assert answers
    for start, fact, chars in answers:
        assert 0 <= fact < start and start + chars <= len(text)
        assert text[start : start + chars] == text[fact : fact + chars]
    assert made(task, seed) == (text, answers)
    assert made(task, seed + 100)[0] != text


@pytest.mark.parametrize("seed", range(5))
def test_the_window_alone_determines_the_answer(seed: int) -> None:
    text, [(start, _, _)] = made("induction", seed)
    assert text.count(b"#") == 2
    assert text[text.index(b"#") + 1] == text[start]

    text, answers = made("copying", seed)
    front, equals, copy = text.partition(b"=")
    assert equals and front.replace(b".", b"") == copy and len(copy) == len(answers) == 16

    text, answers = made("mqar", seed)
    items = [text[i : i + 6] for i in range(0, len(text) - 5, 6)]
    facts, rest = items[: len(answers)], items[len(answers) :]
    assert len(answers) == len(items) // 8 and len({fact[:2] for fact in facts}) == len(facts)
    for fact in facts:
        assert rest.count(fact) == 1
    assert sum(item[2:3] == b"=" for item in rest) == len(facts)

    text, [(start, _, _)] = made("variables", seed)
    values: dict[bytes, bytes] = {}
    for line in text.split(b"\n"):
        if line.startswith(b"#VAR "):
            name, _, value = line[5:].partition(b"=")
            assert value.isdigit() == (not values)  # every other one names the one before
            values[name] = values.get(value, value)
    assert len(values) == 5 and values[text[start - 3 : start - 1]] == text[start : start + 2]


def test_near_questions_are_likelier_in_mqar() -> None:
    distances = np.array([start - fact for seed in range(20) for start, fact, _ in made("mqar", seed)[1]])
    assert (distances < LENGTH // 3).sum() > 1.5 * (distances > 2 * LENGTH // 3).sum()


def test_many_asks_at_every_order_of_distance() -> None:
    window, answers = MAKERS["many"](generator(1), np.tile(TEXT, 7)[: 65_536 + 1])
    facts = [window[a.fact - 8 : a.fact].tobytes() for a in answers]
    assert len(answers) == 64 == len(set(facts)) and all(fact.startswith(b"#KEY ") for fact in facts)
    far = np.log2([a.distance / 64 for a in answers])  # even from 0 to 10
    assert (far < 3).sum() > 10 and ((far >= 3) & (far < 7)).sum() > 15 and (far >= 7).sum() > 10
    assert len(MAKERS["many"](generator(1), TEXT[: LENGTH + 1])[1]) == 4


def test_announced_keys_stand_first() -> None:
    window, (answer,) = plant(TEXT[: LENGTH + 1], NEEDLES["announced"], generator(3), within(15))
    text = window.tobytes()
    key = text[answer.start - 3 : answer.start - 1]
    assert text.startswith(b"\n#ASK " + key + b"\n") and answer.fact > 9
    assert text.count(b"#KEY ") > 5
    with pytest.raises(ValueError, match="100 announced keys do not fit"):
        plant(TEXT[: LENGTH + 1], Needles(pairs=100, announced=True), generator(0), within(4))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_asked(task: str) -> None:
    result = evaluate_task(
        Butterfly(ButterflyConfig.preset("micro")), task, TEXT.tobytes(), length=LENGTH, windows=1
    )
    assert sum(asked for _, asked in result.by_hops.values()) > 0
    assert result.length == LENGTH


def test_unknown_tasks_and_short_texts_are_refused() -> None:
    model = Butterfly(ButterflyConfig.preset("micro"))
    assert set(get_args(Task)) == set(TASKS)
    with pytest.raises(ValueError, match="unknown task 'needles': there are needle, "):
        evaluate_task(model, "needles", TEXT.tobytes(), length=LENGTH)
    with pytest.raises(ValueError, match="the text has 10 characters, a window takes 1,025"):
        evaluate_task(model, "mqar", b"0123456789", length=LENGTH)
    for task in MAKERS:
        with pytest.raises(ValueError, match=f"{task}: a window of 4 characters is too short"):
            evaluate_task(model, task, TEXT.tobytes(), length=3)
