"""Facts to be recalled, planted into the windows of a training run: near ones first, then farther ones; and
windows that are short at first.

The lines are those of `recall`, `#KEY ab=12` and `#GET ab=12`; values can be longer, 4 to 32 hexadecimal
digits, each of which has to be relayed. A window is cut into slots of 64 characters; a random choice of them
gets an item each. Sorted by place and cut into groups of neighbours, the items of a group are paired at
random: the size of the groups is what bounds the distance from a fact to its question.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SLOT = 64  # characters
LONG_VALUES = (4, 8, 16, 32)  # characters
_WORDS = np.frombuffer(b"\n#KEY \n#GET ", dtype=np.uint8).reshape(2, 6)
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
REWORDED = ":"  # in a reworded question, for `=`
_KEYS = 26 * 26
NEAREST = 256  # characters; the reach at the start of a run
MOST_PAIRS = 128  # in a window: as many as a chunk of the shipped models has lanes to keep them in


def growing(first: int, last: int) -> tuple[tuple[float, int], ...]:
    """`TrainConfig.lengths` of a run whose windows grow from `first` characters to `last`, doubling in equal
    parts of its first half."""
    doublings = max(0, math.ceil(math.log2(last / first)))
    return (*((0.5 * (i + 1) / doublings, first << i) for i in range(doublings)), (1.0, last))


def curriculum(
    *,
    share: float,
    weight: float,
    longest: int,
    seed: int,
    full_at: float = 0.6,
    long_share: float = 0.0,
    reworded_share: float = 0.0,
) -> Callable[[Bytes, int, int, float], tuple[Bytes, npt.NDArray[np.float32]]]:
    """A transform for `train` that plants facts and questions into a share of the windows.

    The reach, about how far a question stands from its fact at most, doubles at a steady pace: from 256
    characters at the start of the run to `longest`, its longest window, at progress `full_at`; 0 for all of
    it from the start. Half of the windows have it, half one that is spread evenly over the powers of two
    below. A window gets from one pair to one for every 128 characters, 128 at most; `long_share` of these
    windows have long values, and `reworded_share` of the questions are reworded (`recall.py`). In the loss an
    answer weighs as two characters of `weight`, the rest of a fact or question 0 (a model should answer, not
    write needles of its own), all others 1. A window's needles follow from (seed, step, its number in the
    batch) and the progress alone.
    """
    if not all(0 <= x <= 1 for x in (share, long_share, reworded_share)) or weight <= 0:
        raise ValueError(
            f"recall: share {share}, long_share {long_share} and reworded_share {reworded_share} must lie "
            f"from 0 to 1, weight {weight} above 0"
        )

    def transform(
        windows: Bytes, step: int, first: int, progress: float
    ) -> tuple[Bytes, npt.NDArray[np.float32]]:
        count, chars = windows.shape
        out = windows.copy()
        weights = np.ones((count, chars - 1), dtype=np.float32)
        grown = min(1.0, progress / full_at) if full_at else 1.0
        reach = NEAREST * max(1.0, longest / NEAREST) ** grown
        for row in range(count):
            generator = np.random.Generator(np.random.Philox(key=[seed, step << 32 | (first + row)]))
            if generator.random() < share:
                near = reach if generator.random() < 0.5 else SLOT * (reach / SLOT) ** generator.random()
                pairs = int(generator.integers(1, min(max(1, chars // (2 * SLOT)), MOST_PAIRS) + 1))
                long = long_share and generator.random() < long_share
                chars_of_value = int(generator.choice(LONG_VALUES)) if long else 2
                plant_pairs(
                    out[row], weights[row], generator, pairs=pairs, reach=near, weight=weight,
                    value_chars=chars_of_value, reworded_share=reworded_share,
                )  # fmt: skip
        return out, weights

    return transform


def plant_pairs(
    text: Bytes,
    weights: npt.NDArray[np.float32],
    generator: np.random.Generator,
    *,
    pairs: int,
    reach: float,
    weight: float,
    value_chars: int = 2,
    reworded_share: float = 0.0,
) -> None:
    """Write facts and questions over `text` (N + 1,) in place, and set the weights (N,) of its targets.

    pairs: wanted; as many as there are slots and keys for are planted. reach: characters, about the most
    between a fact and its question. value_chars: decimal digits of a value, hexadecimal ones where there are
    more than two. reworded_share: of the questions. ValueError for a window below four slots.
    """
    shift = int(generator.integers(1, SLOT + 1))  # the first character is nobody's target
    slots = (len(text) - shift) // SLOT
    if slots < 4:
        raise ValueError(f"recall: a window of {len(text)} characters is too short for facts: give 320")
    pairs = min(pairs, slots // 2, _KEYS)
    # Groups of items within reach of each other; where even two neighbours are not, a part of the window.
    within = max(2.0, reach / SLOT)
    part = min(slots, max(2 * pairs, int(within * pairs)))
    group = max(2, 2 ** round(np.log2(max(1.0, within * 2 * pairs / part))))
    chosen = generator.integers(0, slots - part + 1) + np.sort(generator.permutation(part)[: 2 * pairs])
    order = np.argsort(np.arange(2 * pairs) // group + generator.random(2 * pairs))  # shuffled inside groups
    places = np.sort(chosen[order].reshape(pairs, 2), 1)  # (pairs, 2): the slots of fact and question

    names = generator.permutation(_KEYS)[:pairs]
    item = len("\n#KEY ab=\n") + value_chars
    items = np.empty((pairs, 2, item), dtype=np.uint8)
    items[:, :, :6] = _WORDS
    items[:, :, 6] = 97 + names[:, None] % 26
    items[:, :, 7] = 97 + names[:, None] // 26
    items[:, :, 8] = ord("=")
    if reworded_share:
        items[generator.random(pairs) < reworded_share, 1, 8] = ord(REWORDED)
    base = 10 if value_chars == 2 else 16
    items[:, :, 9:-1] = _DIGITS[generator.integers(0, base, (pairs, 1, value_chars))]
    items[:, :, -1] = ord("\n")
    starts = shift + places * SLOT + generator.integers(0, SLOT - item + 1, places.shape)
    at = starts[..., None] + np.arange(item)  # (pairs, 2, characters of an item)
    text[at] = items
    weights[at - 1] = 0.0  # target i is text[i + 1]
    weights[at[:, 1, 9:-1] - 1] = weight * 2 / value_chars
