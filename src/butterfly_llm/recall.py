"""Does what one chunk knows arrive at another? Facts planted in real text and asked for later.

A fact is a line `#KEY ab=12`, a question the line `#GET ab=12`, both written over the text of a window; the
answer is the value in the question, which the model must have carried from the fact. A reworded question is
`#GET ab:12`: the characters before its answer stood nowhere, so that no lookup of n-grams can answer it.
Accuracy is given by distance and by hops: the relays that the routing needs, the set bits of the distance in
chunks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from butterfly_llm import ngrams
from butterfly_llm.curriculum import REWORDED
from butterfly_llm.routing import hops

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

Bytes = npt.NDArray[np.uint8]
DISTANCES = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)  # right edges of the buckets, characters
_ATTEMPTS = 40  # to find a free place for one pair


@dataclass(frozen=True)
class Needles:
    """What is planted into a window."""

    pairs: int = 1
    """Facts that are asked for."""
    distractors: int = 0
    """Facts that are not."""
    key_chars: int = 2
    """Letters in a key."""
    value_chars: int = 2
    """Characters of a value."""
    alphabet: str = "0123456789"
    """Characters that a value is made of."""
    announced: bool = False
    """The keys that will be asked for stand at the beginning too, as `#ASK ab`, before the facts."""

    reworded: bool = False
    """Questions have `:` where facts have `=`."""

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.distractors < 0 or self.key_chars < 1 or self.value_chars < 1:
            raise ValueError(f"needles: {self} asks for nothing; pairs, key_chars and value_chars start at 1")
        if 26**self.key_chars < self.pairs + self.distractors:
            raise ValueError(
                f"needles: {self.key_chars} letters cannot name {self.pairs + self.distractors} keys"
            )

    @property
    def item_chars(self) -> int:
        """Length of a fact or a question with the line breaks around it."""
        return len("\n#KEY =\n") + self.key_chars + self.value_chars


@dataclass(frozen=True)
class Answer:
    """One question in a window."""

    start: int  # index of the first character of the value in the question
    fact: int  # index of the first character of the value in the fact
    chars: int

    @property
    def distance(self) -> int:
        return self.start - self.fact

    def chunk_distance(self, chunk_size: int) -> int:
        """Chunks from the fact to the character that predicts the answer."""
        return (self.start - 1) // chunk_size - self.fact // chunk_size


Place = Callable[[np.random.Generator, int], tuple[int, int] | None]
"""(generator, slots) -> slots of a fact and its question, or None to try again."""


def at_hops(count: int, slots_per_chunk: int) -> Place:
    """In the last half of the window, asked from a chunk distance of exactly `count` set bits."""

    def place(generator: np.random.Generator, slots: int) -> tuple[int, int] | None:
        question = int(generator.integers(slots // 2, slots))
        chunk = question // slots_per_chunk
        distances = [d for d in range(chunk + 1) if hops(d) == count]
        if not distances:
            return None
        first = (chunk - int(generator.choice(distances))) * slots_per_chunk
        fact = first + int(generator.integers(0, slots_per_chunk))
        return (fact, question) if fact < question else None

    return place


def plant(
    window: Bytes, needles: Needles, generator: np.random.Generator, place: Place, slot_chars: int = 64
) -> tuple[Bytes, list[Answer]]:
    """A copy of `window` (N,) with facts and questions written over it, and where the answers stand.

    The window is cut into slots, shifted at random so that items lie across chunk borders too; a slot takes
    one item at a random offset. What finds no free place is left out. ValueError for a window below four
    slots.
    """
    shift = int(generator.integers(0, slot_chars))
    slots = (len(window) - shift) // slot_chars
    if slots < 4 or needles.item_chars > slot_chars:
        raise ValueError(
            f"needles: items of {needles.item_chars} characters in slots of {slot_chars} do not fit "
            f"a window of {len(window)}"
        )
    text = window.copy()
    used: set[int] = set()
    names = generator.choice(26**needles.key_chars, needles.pairs + needles.distractors, replace=False)
    answers = []

    def write(slot: int, word: str, name: int, value: str) -> int:
        """Index of the value in the item written into `slot`."""
        sign = REWORDED if needles.reworded and word == "GET" else "="
        item = f"\n#{word} {_letters(name, needles)}{sign}{value}\n".encode("latin-1")
        start = shift + slot * slot_chars + int(generator.integers(0, slot_chars - len(item) + 1))
        text[start : start + len(item)] = np.frombuffer(item, dtype=np.uint8)
        used.add(slot)
        return start + len(item) - 1 - len(value)

    if needles.announced:
        asked = "".join(f"\n#ASK {_letters(name, needles)}" for name in names[: needles.pairs]) + "\n"
        taken = -(-(len(asked) + shift) // slot_chars)
        if taken > slots // 4:
            raise ValueError(f"needles: {needles.pairs} announced keys do not fit a window of {len(window)}")
        text[: len(asked)] = np.frombuffer(asked.encode("latin-1"), dtype=np.uint8)
        used.update(range(taken))

    for number, name in enumerate(names.tolist()):
        value = "".join(generator.choice(list(needles.alphabet), needles.value_chars))
        for _ in range(_ATTEMPTS):
            found = place(generator, slots)
            if found is None or found[0] in used or found[1] in used:
                continue
            fact = write(found[0], "KEY", name, value)
            if number < needles.pairs:
                answers.append(Answer(write(found[1], "GET", name, value), fact, needles.value_chars))
            break
    return text, answers


def _letters(name: int, needles: Needles) -> str:
    """The key with this number."""
    return "".join(chr(97 + name // 26**i % 26) for i in range(needles.key_chars))


@dataclass(frozen=True)
class RecallResult:
    """Exact matches of whole values: share right and number asked, by hops and by distance (right edge)."""

    length: int
    by_hops: dict[int, tuple[float, int]]
    by_distance: dict[int, tuple[float, int]]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{'hops':>12}{'right':>8}{'asked':>8}"
        for count, (share, asked) in self.by_hops.items():
            yield f"{count:>12}{share:>8.2f}{asked:>8}"
        yield f"{'characters':>12}{'right':>8}{'asked':>8}"
        for edge, (share, asked) in self.by_distance.items():
            yield f"{'< ' + format(edge, ','):>12}{share:>8.2f}{asked:>8}"


def evaluate_recall(
    model: Butterfly,
    text: bytes,
    *,
    length: int,
    windows: int = 16,
    needles: Needles | None = None,
    seed: int = 0,
    lookup: bool = True,
    progress: Callable[[int], None] | None = None,
) -> RecallResult:
    """Plant needles into windows of `length` characters of `text`, at every number of hops that fits.

    `windows` is their number for each hop count. A value is right when every character of it is the most
    likely one, given those before. Without `lookup` the n-grams say nothing where an answer is predicted:
    what the network finds by itself. ValueError where the text is shorter than a window.
    """
    needles = needles or Needles()
    chunk_size = model.config.chunk_size
    data = np.frombuffer(text, dtype=np.uint8)
    if len(data) < length + 1:
        raise ValueError(f"recall: the text has {len(data):,} characters, a window takes {length + 1:,}")
    slot_chars = max(64, 2 << (needles.item_chars - 1).bit_length())
    slots_per_chunk = max(1, chunk_size // slot_chars)
    largest = max(1, (length - 1) // chunk_size)

    def cases() -> Iterator[tuple[Bytes, list[Answer]]]:
        for count in range(largest.bit_length() + 1):
            for number in range(windows):
                generator = np.random.Generator(np.random.Philox(key=[seed, count << 32 | number]))
                start = int(generator.integers(0, len(data) - length))
                place = at_hops(count, slots_per_chunk)
                for _ in range(_ATTEMPTS):  # items across chunk borders may be a chunk nearer or further
                    window, answers = plant(
                        data[start : start + length + 1], needles, generator, place, slot_chars
                    )
                    if answers and all(hops(a.chunk_distance(chunk_size)) == count for a in answers):
                        break
                yield window, answers

    return score(model, cases(), length, lookup=lookup, progress=progress)


def score(
    model: Butterfly,
    cases: Iterable[tuple[Bytes, Sequence[Answer]]],
    length: int,
    *,
    lookup: bool = True,
    progress: Callable[[int], None] | None = None,
) -> RecallResult:
    """Ask the model in windows (length + 1,) of characters and count the answers by hops and by distance."""
    by_hops: dict[int, list[bool]] = {}
    by_distance: dict[int, list[bool]] = {}
    for done, (window, answers) in enumerate(cases, 1):
        for answer, right in zip(answers, _right(model, window, answers, lookup), strict=True):
            by_hops.setdefault(hops(answer.chunk_distance(model.config.chunk_size)), []).append(right)
            edge = next((e for e in DISTANCES if answer.distance < e), DISTANCES[-1])
            by_distance.setdefault(edge, []).append(right)
        if progress is not None:
            progress(done)
    return RecallResult(length, _shares(by_hops), _shares(by_distance))


def _right(model: Butterfly, window: Bytes, answers: Sequence[Answer], lookup: bool) -> list[bool]:
    """Whether the model finds each answer of a window (N + 1,)."""
    if not answers:
        return []
    device = model.embed.weight.device
    ids = torch.from_numpy(window).to(device).long()
    targets = torch.tensor([[a.start + i for i in range(a.chars)] for a in answers], device=device)

    def followers(ids: torch.Tensor) -> torch.Tensor:
        found = ngrams.followers(ids, ngrams.Contexts.of(model.config))
        found[:, targets - 1] = ngrams.NOTHING
        return found

    with torch.no_grad():
        hidden = model.hidden(ids[None, :-1], None if lookup else followers)[0]
        guesses = model.head(hidden[targets - 1]).argmax(-1)  # (answers, chars)
    right: list[bool] = (guesses == ids[targets]).all(1).tolist()
    return right


def _shares(outcomes: dict[int, list[bool]]) -> dict[int, tuple[float, int]]:
    return {key: (sum(each) / len(each), len(each)) for key, each in sorted(outcomes.items())}
