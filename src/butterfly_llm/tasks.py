"""Recall tasks of the literature, in characters. docs/recall.md says what each asks and where it is from.

Those of `NEEDLES` ask at every number of hops equally often (`recall.evaluate_recall`), those of `MAKERS`
where the questions fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from butterfly_llm.recall import Answer, Bytes, Needles, RecallResult, evaluate_recall, plant, score

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

NEEDLES = {
    "needle": Needles(),
    "multikey": Needles(distractors=15),
    "uuid": Needles(value_chars=32, alphabet="0123456789abcdef"),
    "announced": Needles(distractors=15, announced=True),
    "reworded": Needles(distractors=15, reworded=True),
}
_LETTERS = "abcdefghijklmnop"  # the 16 symbols of induction and copying
_LINKS = 4  # assignments in a chain of variables
_COPIED = 16  # letters to copy
_MANY = 64  # facts in a window, as curriculum plants on average
_SLOT = 64  # characters that one item has
_GAP_POWER = 0.01  # of the distribution of questions in mqar

Made = tuple[Bytes, list[Answer]]
Make = Callable[[np.random.Generator, Bytes], Made]
"""(generator, text (N + 1,)) -> a window (N + 1,) in its place, and where the answers stand."""


def induction(generator: np.random.Generator, text: Bytes) -> Made:
    """Random letters with one `#x`; the window ends in `#`, the answer is x."""
    _fits(text, 5, "induction")
    window = _random(generator, _LETTERS, len(text))
    fact = int(generator.integers(1, len(text) - 3))
    window[[fact - 1, -2]] = ord("#")
    window[-1] = window[fact]
    return window, [Answer(len(text) - 1, fact, 1)]


def copying(generator: np.random.Generator, text: Bytes) -> Made:
    """Letters at random places among dots, then `=` and the letters without the dots."""
    _fits(text, 2 * _COPIED + 1, "copying")
    window = np.full(len(text), ord("."), dtype=np.uint8)
    begin = len(text) - _COPIED
    places = np.sort(generator.choice(begin - 1, _COPIED, replace=False))
    window[places] = window[begin:] = _random(generator, _LETTERS, _COPIED)
    window[begin - 1] = ord("=")
    return window, [Answer(begin + i, int(place), 1) for i, place in enumerate(places)]


def mqar(generator: np.random.Generator, text: Bytes) -> Made:
    """A list `ab=12 ` of pairs, one for eight items in all, then each key once more among random items.

    The gaps between pair and question follow a power law, as published: near ones are likelier.
    """
    item = len("ab=12 ")
    slots = len(text) // item
    _fits(text, 16 * item, "mqar")
    pairs = min(26**2 // 2, max(1, slots // 8))
    names = generator.choice(26**2, pairs, replace=False)
    filler = _random(generator, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", len(text))
    window = filler.copy()
    window[item - 1 : slots * item : item] = ord(" ")
    rest = np.arange(1, slots - pairs + 1, dtype=np.float64)
    share = _GAP_POWER * rest ** (_GAP_POWER - 1)
    questions = pairs + generator.choice(slots - pairs, pairs, replace=False, p=share / share.sum())
    answers = []
    for fact, (question, name) in enumerate(zip(questions.tolist(), names.tolist(), strict=True)):
        value = int(generator.integers(0, 100))
        line = f"{chr(97 + name % 26)}{chr(97 + name // 26)}={value:02}".encode("latin-1")
        for slot in (fact, question):
            window[slot * item : slot * item + len(line)] = np.frombuffer(line, dtype=np.uint8)
        answers.append(Answer(question * item + 3, fact * item + 3, 2))
    return window, answers


def variables(generator: np.random.Generator, text: Bytes) -> Made:
    """Lines `#VAR ab=12`, `#VAR cd=ab` .. strewn over real text; `#GET` of the last one asks for 12."""
    slots = len(text) // _SLOT
    _fits(text, (_LINKS + 2) * _SLOT, "variables")
    names = [f"{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in generator.choice(26**2, _LINKS + 1, False)]
    value = f"{int(generator.integers(0, 100)):02}"
    chain = [f"#VAR {name}={what}" for name, what in zip(names, (value, *names), strict=False)]
    chain.append(f"#GET {names[-1]}={value}")
    places = np.sort(generator.choice(slots, len(chain), replace=False))
    window = text.copy()
    starts = []
    for place, line in zip(places.tolist(), chain, strict=True):
        written = f"\n{line}\n".encode("latin-1")
        start = place * _SLOT + int(generator.integers(0, _SLOT - len(written) + 1))
        window[start : start + len(written)] = np.frombuffer(written, dtype=np.uint8)
        starts.append(start + len(written) - 1 - 2)
    return window, [Answer(starts[-1], starts[0], 2)]


def many(generator: np.random.Generator, text: Bytes) -> Made:
    """64 facts over real text, each asked once, distances spread evenly over the powers of two.

    One pass over a long window asks 64 questions; each fact has 63 others beside it.
    """
    _fits(text, 16 * _SLOT, "many")

    def place(generator: np.random.Generator, slots: int) -> tuple[int, int]:
        distance = int(2 ** generator.uniform(0, math.log2(slots)))
        question = int(generator.integers(distance, slots))
        return question - distance, question

    pairs = min(_MANY, len(text) // _SLOT // 4)
    return plant(text, Needles(pairs=pairs), generator, place, _SLOT)


MAKERS: dict[str, Make] = {
    "many": many, "variables": variables, "mqar": mqar, "induction": induction, "copying": copying
}  # fmt: skip
TASKS = (*NEEDLES, *MAKERS)


def evaluate_task(
    model: Butterfly,
    task: str,
    text: bytes,
    *,
    length: int,
    windows: int = 16,
    seed: int = 0,
    lookup: bool = True,
    progress: Callable[[int], None] | None = None,
) -> RecallResult:
    """Accuracy of `model` at a task in windows of `length` characters, by hops and by distance.

    `windows` is their number, for each number of hops where the task can choose it. `text` is what lines are
    written over. Without `lookup` the n-grams say nothing where an answer is predicted. ValueError for an
    unknown task and for a length or text too short for it.
    """
    if task in NEEDLES:
        return evaluate_recall(
            model, text, length=length, windows=windows, needles=NEEDLES[task], seed=seed, lookup=lookup,
            progress=progress,
        )  # fmt: skip
    if task not in MAKERS:
        raise ValueError(f"unknown task {task!r}: there are {', '.join(TASKS)}")
    data = np.frombuffer(text, dtype=np.uint8)
    if len(data) < length + 1:
        raise ValueError(f"recall: the text has {len(data):,} characters, a window takes {length + 1:,}")

    def cases() -> Iterator[Made]:
        for number in range(windows):
            generator = np.random.Generator(np.random.Philox(key=[seed, number]))
            start = int(generator.integers(0, len(data) - length))
            yield MAKERS[task](generator, data[start : start + length + 1])

    return score(model, cases(), length, lookup=lookup, progress=progress)


def _random(generator: np.random.Generator, alphabet: str, count: int) -> Bytes:
    return generator.choice(np.frombuffer(alphabet.encode("latin-1"), dtype=np.uint8), count)


def _fits(text: Bytes, needed: int, task: str) -> None:
    if len(text) < needed:
        raise ValueError(f"{task}: a window of {len(text)} characters is too short, {needed} are needed")
