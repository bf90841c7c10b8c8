"""What stood before stands here again: where the last characters stood before proposes the next one.

A match model, as in compressors of the PAQ kind (M. Mahoney, "Adaptive Weighing of Context Models for
Lossless Data Compression", 2005). The state of a stream is bounded and cannot hold every passage it has read;
its text is one byte a character. A proposal costs the same at any length, and so does learning how far to
trust it.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import numpy.typing as npt

ORDER = 11  # characters that must agree before anything is proposed
_BITS = 2 * ORDER  # of the hash: each character moves those before it up by two, so that older ones fall out
_MULTIPLIER = 4 * 0x2545F4915
LONGEST = 1 << 16  # a match is not counted further back
# Classes of proposals: half powers of two of the match's length; points of the model's belief, in log-odds.
_LENGTHS = 34
_LOWEST, _APART, _POINTS = -8.0, 2.0, 11
_PRIOR = 2.0  # proposals that a point begins with, right as often as the model believes
_AT_ONCE = 1 << 16  # characters of a text that are Python's numbers at a time
NOTHING = -1


class Match:
    """The characters of a stream so far, and where in it the last ones stood before.

    Memory: the text, one byte a character, and 16 MB. Where two strings share a place in the table the
    earlier one is forgotten; a proposal is never made on the hash alone.
    """

    def __init__(self) -> None:
        self.text = bytearray()
        self.length = 0  # of the match; 0 for none
        self._next = 0  # where the character after it stands
        self._hash = 0
        self._table = array("I", bytes(4 << _BITS))  # hash -> position after the last string that had it

    @property
    def proposal(self) -> int:
        """The character that followed the earlier occurrence, NOTHING where there is none."""
        return self.text[self._next] if self.length else NOTHING

    def push(self, character: int) -> None:
        """Append a character (0 to 255)."""
        text = self.text
        if self.length and text[self._next] == character:
            self._next += 1
            self.length = min(self.length + 1, LONGEST)
        else:
            self.length = 0
        text.append(character)
        self._hash = (self._hash * _MULTIPLIER + character + 1) & ((1 << _BITS) - 1)
        end = len(text)
        if end < ORDER:
            return
        if not self.length:
            self._look_up(self._table[self._hash], end)
        self._table[self._hash] = end & 0xFFFFFFFF  # beyond 4 GB a wrong place, at which nothing will agree

    def _look_up(self, at: int, end: int) -> None:
        """Match the end of the text with what ends at `at`, where at least ORDER characters agree."""
        text = self.text
        if at < ORDER or text[at - ORDER : at] != text[end - ORDER : end]:
            return
        length = ORDER
        while length < min(at, LONGEST) and text[at - 1 - length] == text[end - 1 - length]:
            length += 1
        self._next, self.length = at, length


class Trust:
    """How often proposals were right, by the length of their match and by what the model thought of them.

    An adaptive probability map, as in compressors of the PAQ kind: a belief lies between two points, whose
    shares are interpolated and which learn by their nearness. It begins with the model's own belief.
    """

    def __init__(self) -> None:
        points = [_PRIOR / (1 + math.exp(-(_LOWEST + _APART * k))) for k in range(_POINTS)]
        self._right = [points.copy() for _ in range(_LENGTHS)]
        self._made = [[_PRIOR] * _POINTS for _ in range(_LENGTHS)]

    def nats(self, right: bool, length: int, proposed: float, target: float) -> float:
        """-log of what model and proposal together give the character that came, which is learnt from.

        proposed, target: the model's log-probabilities of the proposal and of the character that came. The
        proposal gets the share that its class had right so far, all others keep their proportions.
        """
        rest = -math.expm1(min(proposed, -1e-9))  # 1 - p(proposal)
        place = (proposed - math.log(rest) - _LOWEST) / _APART
        lower = int(min(max(place, 0.0), _POINTS - 1.001))
        nearness = min(max(place - lower, 0.0), 1.0)  # to the upper point
        i = min(_LENGTHS - 1, int(2 * math.log2(length)))
        rights, made = self._right[i], self._made[i]
        share = 0.0
        for point, near in ((lower, 1 - nearness), (lower + 1, nearness)):
            share += near * rights[point] / made[point]
            made[point] += near
            rights[point] += near * right
        return -math.log(share) if right else -math.log1p(-share) + math.log(rest) - target


def proposals(data: bytes) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """What is proposed for each character of `data` (N,), NOTHING or 0 to 255; the lengths of the matches."""
    match = Match()
    proposed = np.full(len(data), NOTHING, dtype=np.int16)
    lengths = np.zeros(len(data), dtype=np.int32)
    for i, character in enumerate(data):
        if match.length:
            proposed[i], lengths[i] = match.proposal, match.length
        match.push(character)
    return proposed, lengths


class MatchedText:
    """What model and match together make of a text, whose windows may come in any order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._proposed, self._lengths = proposals(data)
        self._nats = np.zeros((2, len(data)), dtype=np.float32)  # of what came, of what was proposed

    def proposed(self, start: int, stop: int) -> npt.NDArray[np.int16]:
        """A character for each of start <= i < stop; 0 where nothing is proposed."""
        return np.maximum(self._proposed[start:stop], 0)

    def take(self, start: int, nats: npt.ArrayLike, of_proposed: npt.ArrayLike) -> None:
        """What the model gives the characters from `start` on, and what `proposed` said of them, in nats."""
        both = np.asarray([nats, of_proposed])
        self._nats[:, start : start + both.shape[1]] = both

    def nats(self) -> float:
        """Sum of -log p over the text, the trust learnt on the way."""
        trust, total = Trust(), 0.0
        for start in range(0, len(self._data), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            columns = (self._proposed[part], self._lengths[part], *self._nats[:, part])
            rows = zip(self._data[part], *(column.tolist() for column in columns), strict=True)
            for character, proposed, length, nats, of_proposed in rows:
                total += trust.nats(proposed == character, length, -of_proposed, -nats) if length else nats
        return total
