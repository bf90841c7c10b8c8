"""Corpora that `prepare` has written: memory-mapped characters, and windows of them."""

import json
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .text import Encoding

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SEPARATOR = b"\0"


@dataclass(frozen=True, slots=True)
class Document:
    """One project in a corpus: `offset` and `characters` locate it in its split; `source` is a base name."""

    name: str
    split: Split
    offset: int
    characters: int
    files: int
    duplicates: int
    replaced: int
    license: str
    source: str


class Corpus:
    """One split of a prepared directory, or a bare .bin file: `data` (characters,) uint8, memory-mapped.

    `documents` are those of the split (none for a bare file). Raises ValueError when files are missing, empty
    or do not fit the manifest. To look at `data` when the file has been cut short meanwhile ends the process
    (SIGBUS); `read` does not.
    """

    data: npt.NDArray[np.uint8]

    def __init__(self, path: str | Path, split: Split = "train") -> None:
        given = Path(path)
        self.path = given / f"{split}.bin" if given.is_dir() else given
        self.split = split
        self.encoding: Encoding = "latin-1"
        self.documents: tuple[Document, ...] = ()
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such corpus; make one with `butterfly prepare`")
        size = self.path.stat().st_size
        if given.is_dir():
            expected = self._read_manifest(given / MANIFEST)
            if size != expected:
                raise ValueError(f"{self.path}: {size:,} bytes, manifest says {expected:,}; prepare it again")
        if size == 0:
            raise ValueError(
                f"{self.path}: the {split} split is empty; prepare more projects or hold some out"
            )
        self.data = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._reading = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """Characters, separators included."""
        return len(self.data)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Characters start <= i < stop, read from the file; ValueError when it has been cut short."""
        data = bytearray()
        while piece := self._read_at(start + len(data), stop - start - len(data)):
            data += piece
        if len(data) != stop - start:
            raise ValueError(f"{self.path}: was cut short while in use; prepare the corpus again")
        return np.frombuffer(data, np.uint8)

    def _read_at(self, place: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, place)
        with self._reading, open(self._descriptor, "rb", 0, closefd=False) as file:  # on Windows
            return file.read(count) if file.seek(place) == place else b""

    def _read_manifest(self, path: Path) -> int:
        """Take documents and encoding from the manifest; the split's length in characters."""
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            version = manifest["format"]
            documents = [Document(**document) for document in manifest["documents"]]
            expected: object = manifest["splits"][self.split]["characters"]
            if not isinstance(expected, int):
                raise TypeError(f"{expected!r:.40} characters")
            self.encoding = manifest["encoding"]
            if self.encoding not in get_args(Encoding):
                raise ValueError(f"unknown encoding {self.encoding!r:.40}")
            for document in documents:
                _check_document(document, expected if document.split == self.split else sys.maxsize)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
            said = " ".join(str(failure).split())
            raise ValueError(f"{path}: missing or damaged ({said:.200}); prepare the corpus again") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: corpus format {version!r:.40}, not {FORMAT_VERSION}; prepare the corpus again"
            )
        self.documents = tuple(document for document in documents if document.split == self.split)
        return expected


def _check_document(document: Document, characters: int) -> None:
    """TypeError or ValueError unless every field has its type and the document lies in its split."""
    for each in fields(document):
        whole = each.type is int
        value = getattr(document, each.name)
        if (not isinstance(value, int) or value < 0) if whole else not isinstance(value, str):
            raise TypeError(f"{each.name} of a document is {value!r:.40}")
    if document.split not in SPLITS or document.offset + document.characters > characters:
        raise ValueError(f"document {document.name!r:.40} does not lie in a split")


def sample_windows(
    corpus: Corpus, *, length: int, count: int, seed: int, step: int, first: int = 0
) -> npt.NDArray[np.uint8]:
    """Random windows (count, length + 1) uint8, starts uniform over the split, document borders included.

    Window i of step s is a function of (seed, s, first + i) alone, so a batch may be cut into micro-batches,
    spread over devices, or resumed. Raises ValueError when the corpus is shorter than length + 1.
    """
    starts = check_length(corpus, length)
    # A Philox counter block holds four words; sample i owns block i and uses its first word.
    words = np.random.Philox(key=np.array([seed, step], np.uint64), counter=first).random_raw(4 * count)[::4]
    windows = np.empty((count, length + 1), np.uint8)
    for row, start in zip(windows, (words % np.uint64(starts)).tolist(), strict=True):
        row[:] = corpus.read(start, start + length + 1)
    return windows


def val_windows(
    corpus: Corpus, *, length: int, max_chars: int | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """Windows (length + 1,) uint8 in order, overlapping by the one character that is input to the next only.

    Every character but the first is a target once, up to the last whole window or `max_chars` targets. Raises
    ValueError when the corpus is shorter than length + 1.
    """
    whole = (check_length(corpus, length) - 1) // length + 1
    count = whole if max_chars is None else min(whole, max(1, max_chars // length))
    return (corpus.read(k * length, (k + 1) * length + 1) for k in range(count))


def check_length(corpus: Corpus, length: int) -> int:
    """How many windows of length + 1 start in the corpus; ValueError where there is none."""
    if length < 1:
        raise ValueError(f"window length is {length}; give at least 1")
    if len(corpus) < length + 1:
        raise ValueError(
            f"{corpus.path}: {len(corpus):,} characters, but a window needs {length + 1:,}; "
            "use a shorter window or a longer corpus"
        )
    return len(corpus) - length
