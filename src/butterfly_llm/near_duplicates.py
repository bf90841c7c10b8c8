"""Files that are nearly the same as one seen before: MinHash over their lines, with `datasketch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasketch import MinHash

_FEWEST_LINES = 10
_SHORTEST_LINE = 4  # characters; brackets and separators say nothing
_HASHES = 128


class NearDuplicates:
    """Remembers the distinct lines of each file, as 128 hashes: half a kilobyte.

    share: of the lines that two files have together, how many both must have. Files of fewer than ten
    distinct lines are never alike. ValueError for a share outside 0 to 1, ImportError without datasketch.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"near duplicates: share {share} must be above 0 and at most 1")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ImportError("near duplicates need datasketch: pip install 'butterfly-llm[dedup]'") from None
        self.share = share
        self._new = MinHash
        self._index = MinHashLSH(threshold=share, num_perm=_HASHES)
        self._kept: list[MinHash] = []

    def seen(self, text: bytes) -> bool:
        """Whether a file like `text` has been seen; if not, this one is remembered."""
        lines = {line for line in map(bytes.strip, text.splitlines()) if len(line) >= _SHORTEST_LINE}
        if len(lines) < _FEWEST_LINES:
            return False
        hashes = self._new(num_perm=_HASHES, seed=1)
        hashes.update_batch(sorted(lines))
        if any(hashes.jaccard(self._kept[number]) >= self.share for number in self._index.query(hashes)):
            return True
        self._index.insert(len(self._kept), hashes)
        self._kept.append(hashes)
        return False
